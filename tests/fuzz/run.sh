#!/usr/bin/env bash
# Fuzzes every parser, and whole sessions: `tests/fuzz/run.sh SECONDS [TARGET...]`, so many seconds for each target, all of them
# without names. What was found interesting is kept in target/fuzz-corpus and built upon by the next run; FUZZ_CORPUS names
# another place. FUZZ_SEED repeats the choices of a run, as far as its speed allows. A finding is left in tests/fuzz/artifacts, and the run fails.
#
# The coverage instrumentation is the compiler's own and not part of its stable face: RUSTC_BOOTSTRAP lets the pinned
# toolchain use it. Sanitizers are left out: no crate that is fuzzed here has unsafe code of its own but the engine's I/O.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:?how many seconds for each target}
shift
targets=("$@")
[ $# -gt 0 ] || targets=(imap mime smtp pop3 store sessions)
corpus=${FUZZ_CORPUS:-${CARGO_TARGET_DIR:-$PWD/target}/fuzz-corpus}
command -v cargo-fuzz >/dev/null || cargo install --locked --debug cargo-fuzz
export RUSTC_BOOTSTRAP=1

fuzz() { cargo fuzz "$1" --fuzz-dir tests/fuzz -s none "${@:2}"; }
fuzz build
for target in "${targets[@]}"; do
  mkdir -p "$corpus/$target"
  options=(-seed="${FUZZ_SEED:-0}" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -max_len=20000 -verbosity=0 -print_final_stats=1)
  [ -f "tests/fuzz/dictionaries/$target" ] && options+=(-dict="tests/fuzz/dictionaries/$target")
  printf '\n-- %s, %s seconds\n' "$target" "$seconds"
  fuzz run "$target" "$corpus/$target" "tests/fuzz/seeds/$target" -- "${options[@]}"
done
