# Shared by the measuring scripts: finds the programs, and starts a server on a store of its own.
#
# POSTHASTE_BIN    the server            (default: target/release/posthaste)
# POSTHASTE_BENCH  the load generator    (default: target/release/posthaste-bench)
# WORKERS          worker threads        (default: 1)
# USERS            accounts              (default: 200)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
server=${POSTHASTE_BIN:-$root/target/release/posthaste}
bench=${POSTHASTE_BENCH:-$root/target/release/posthaste-bench}
workers=${WORKERS:-1}
users=${USERS:-200}
for program in "$server" "$bench"; do
  [ -x "$program" ] || { echo "$program is not there: cargo build --release -p posthaste -p posthaste-bench" >&2; exit 1; }
done

work=$(mktemp -d)
data=$work/data
pids=()
clean_up() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}
trap clean_up EXIT

# Makes accounts and starts the server; sets pid, imap and lmtp. Arguments are options of serve.
start_server() {
  make_users secret
  serve "$@"
}

# Makes accounts in the store. The argument is their password, or its hash.
make_users() {
  "$bench" users --user-count "$users" --password "$1" >"$work/users"
  "$server" user import "$work/users" --data "$data" >/dev/null 2>"$work/log"
}

# Starts the server on the store as it is.
serve() {
  [ -p "$work/out" ] || mkfifo "$work/out"
  "$server" serve --data "$data" --listen imap=127.0.0.1:0 --listen lmtp=127.0.0.1:0 --plaintext-auth \
    --workers "$workers" "$@" >"$work/out" 2>>"$work/log" &
  pid=$!
  pids+=("$pid")
  exec 3<"$work/out"
  local line
  while read -r line <&3; do
    case $line in
      "listening imap "*) imap=${line#listening imap } ;;
      "listening lmtp "*) lmtp=${line#listening lmtp } ;;
      ready) return 0 ;;
    esac
  done
  cat "$work/log" >&2
  return 1
}

# A number from a report: field '["latency_us"]["p50"]' FILE
field() { python3 -c 'import json,sys; print(eval("json.load(open(sys.argv[2]))" + sys.argv[1]))' "$1" "$2"; }
