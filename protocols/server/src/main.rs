//! The `posthaste` program: see the library.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    posthaste::main()
}
