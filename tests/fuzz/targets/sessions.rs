//! Whole sessions on a real server within this process: whatever a client sends, before or after its login, the session ends
//! and the server goes on. A panic anywhere in it is an abort, which the fuzzer sees.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;

const SERVICES: [&str; 4] = ["imap", "pop3", "smtp", "lmtp"];
/// Of `secret`, by parameters that cost nothing.
const USERS: &str = "ann@x:{PLAIN}secret\nbob@x:{PLAIN}secret\n";

/// The directory with the sockets of a server that runs.
fn server() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory").keep();
        let data = directory.join("data").display().to_string();
        let users = directory.join("users");
        std::fs::write(&users, USERS).expect("a file");
        let import = ["posthaste", "user", "import", &users.display().to_string(), "--data", &data];
        posthaste::run(&import).expect("accounts");
        let mut arguments: Vec<String> = ["posthaste", "serve", "--plaintext-auth", "--workers", "1", "--data", &data]
            .map(str::to_owned)
            .to_vec();
        for key in [
            "store.segment_size_bytes=16777216",
            "store.gather_us=0",
            "store.reserve_bytes=0",
            "limits.message_bytes=65536",
            "limits.connections_per_user=1000",
            "imap.login_timeout_s=5",
            "log.level=error",
        ] {
            arguments.extend(["--set".to_owned(), key.to_owned()]);
        }
        for service in SERVICES {
            arguments.extend(["--listen".to_owned(), format!("{service}=unix:{}", directory.join(service).display())]);
        }
        std::thread::spawn(move || {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let error = posthaste::run(&arguments).expect_err("it serves until the end of the process");
            panic!("{error}");
        });
        while UnixStream::connect(directory.join(SERVICES[3])).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        directory
    })
}

/// Sends input, reads until the server has no more to say, and ends the connection.
fn talk(service: &str, input: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(server().join(service)).expect("the server accepts");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // A server that has said goodbye reads no more.
    let _ = stream.write_all(input);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the session does not end: {answer:?}"),
        _ => answer,
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, data)) = data.split_first() else { return };
    let service = SERVICES[usize::from(choice & 3)];
    let prefix: &[u8] = match (service, choice & 4) {
        ("imap", 4) => b"a LOGIN ann@x secret\r\nb SELECT INBOX\r\n",
        ("pop3", 4) => b"USER ann@x\r\nPASS secret\r\n",
        ("smtp", 4) => b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<ann@x>\r\n",
        ("lmtp", 4) => b"LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<ann@x>\r\nRCPT TO:<bob@x>\r\n",
        _ => b"",
    };
    let answer = talk(service, &[prefix, data].concat());
    assert!(answer.ends_with(b"\r\n"), "half a reply: {}", String::from_utf8_lossy(&answer));
    // Nobody else notices.
    let bystander = talk("imap", b"a NOOP\r\nb LOGOUT\r\n");
    assert!(bystander.ends_with(b"b OK Logged out\r\n"), "{}", String::from_utf8_lossy(&bystander));
});
