#!/usr/bin/env bash
# Runs the tests. `bash tests/run.sh` is what CI runs; `bash tests/run.sh nightly [MINUTES]` runs all of it on both I/O
# backends and simulates, mutates and kills for as long as one likes.
set -euo pipefail
cd "$(dirname "$0")/.."
tier=${1:-ci}
minutes=${2:-60}

step() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }

step "licences, bans, sources"
# Tools that run for a second need no minutes of optimisation.
command -v cargo-deny >/dev/null || cargo install --locked --debug cargo-deny
cargo deny check licenses bans sources

step "format and lints"
cargo fmt --all --check
cargo clippy --workspace --all-targets -- -D warnings
cargo clippy -p posthaste-tests --all-targets --features planted-bugs -- -D warnings

step "the program, optimised"
cargo build --release -p posthaste -p posthaste-bench
export POSTHASTE_BIN="$PWD/target/release/posthaste"

step "all tests, io_uring"
cargo test --workspace
# Of the whole workspace, so that nothing is compiled again with other features.
cargo test --workspace --bench engine --bench pieces

step "the comparison with other servers computes what it should"
python3 -m unittest discover bench/peers

step "real mail clients"
bash tests/clients/install.sh
bash tests/clients/run.sh

step "the proofs, optimised"
cargo build --release -p posthaste-tests --features planted-bugs --bin simulate --bin mutations

if [ "$tier" = nightly ]; then
  step "all tests, epoll"
  POSTHASTE_IO=epoll cargo test --workspace
  step "simulation, $minutes minutes"
  target/release/simulate --seed "$(date +%s)" --seconds $((minutes * 60))
  step "planted bugs"
  target/release/mutations --runs 20
  step "kill -9, 100 rounds"
  cargo build --release -p posthaste-tests --features planted-bugs --bin kill-rounds
  target/release/kill-rounds --rounds 100
  step "fuzzing, $minutes minutes"
  bash tests/fuzz/run.sh $((minutes * 10))
else
  step "smoke set, epoll"
  POSTHASTE_IO=epoll cargo test --workspace --test io --test io_accept --test server
  step "simulation, one minute"
  target/release/simulate --seed 0 --seconds 60
  step "planted bugs, one run each"
  target/release/mutations --runs 1
  step "fuzzing, three minutes"
  FUZZ_SEED=1 bash tests/fuzz/run.sh 30
fi
step "done"
