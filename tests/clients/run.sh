#!/usr/bin/env bash
# Drives real mail clients against a real server: `tests/clients/run.sh [NAME...]`, all of them without names.
#
# POSTHASTE is the server's program (else POSTHASTE_BIN, else what is built in the target directory). A client that is
# not installed is a failure, unless POSTHASTE_SKIP_CLIENTS names it (names with spaces or commas between them).
# CLIENTS_KEEP=1 keeps the scratch directory. `install.sh` installs the clients.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
export CLIENTS_INSTALLED=$target/clients

# The longest that one client may take, in seconds. None comes near it.
client_seconds=120

all=(isync offlineimap getmail fetchmail neomutt curl swaks python imapclient imapflow postfix)
services=(imap imaps pop3 pop3s smtp smtps lmtp)

program=${POSTHASTE:-${POSTHASTE_BIN:-}}
for candidate in "$target/release/posthaste" "$target/debug/posthaste"; do
  [ -z "$program" ] && [ -x "$candidate" ] && program=$candidate
done
[ -x "$program" ] || { echo "no server: build it, or set POSTHASTE" >&2; exit 1; }
POSTHASTE=$(realpath "$program")
export POSTHASTE

skip=" ${POSTHASTE_SKIP_CLIENTS:-} "
skip=${skip//,/ }
names=("$@")
[ $# -gt 0 ] || names=("${all[@]}")
for name in "${names[@]}"; do
  [ -f "$here/$name.py" ] || { echo "no such client: $name" >&2; exit 2; }
done

CLIENTS_SCRATCH=$(mktemp -d)
export CLIENTS_SCRATCH CLIENTS_DATA=$CLIENTS_SCRATCH/data
# Clients that run as another user (Postfix) pass through it.
chmod 711 "$CLIENTS_SCRATCH"
server=
finish() {
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then kill -9 "$server"; fi
  if [ -n "${CLIENTS_KEEP:-}" ]; then echo "kept: $CLIENTS_SCRATCH"; else rm -rf "$CLIENTS_SCRATCH"; fi
}
trap finish EXIT

listen=(--listen "lmtp=unix:$CLIENTS_SCRATCH/lmtp")
for service in "${services[@]}"; do listen+=(--listen "$service=127.0.0.1:0"); done
exec {output}< <(exec "$POSTHASTE" serve --data "$CLIENTS_DATA" --plaintext-auth --set server.host_name=localhost \
  --io "${POSTHASTE_IO:-auto}" "${listen[@]}" 2>"$CLIENTS_SCRATCH/log" </dev/null)
server=$!
CLIENTS_SERVICES=
line=
while [ "$line" != ready ]; do
  if ! read -r -t 60 -u "$output" line; then
    echo "the server did not start:" >&2
    cat "$CLIENTS_SCRATCH/log" >&2
    exit 1
  fi
  if [[ $line =~ ^listening\ ([a-z0-9]+)\ (.+)$ ]]; then CLIENTS_SERVICES+="${BASH_REMATCH[1]}=${BASH_REMATCH[2]} "; fi
done
export CLIENTS_SERVICES CLIENTS_CERTIFICATE=$CLIENTS_DATA/tls/certificate.pem
echo "server: $("$POSTHASTE" --version), $CLIENTS_SERVICES"

failed=()
skipped=()
export PYTHONPATH=$root/tests:$CLIENTS_INSTALLED/python PYTHONDONTWRITEBYTECODE=1
export LC_ALL=C.UTF-8 TZ=UTC
for name in "${names[@]}"; do
  if [[ $skip == *" $name "* ]]; then
    echo "== $name: skipped, as POSTHASTE_SKIP_CLIENTS says"
    skipped+=("$name")
    continue
  fi
  started=$SECONDS
  status=0
  timeout -k 5 "$client_seconds" python3 -m "clients.$name" </dev/null || status=$?
  if [ "$status" != 0 ]; then failed+=("$name"); fi
  if [ "$status" -gt 1 ]; then
    echo "0 1" >>"$CLIENTS_SCRATCH/results"
    echo "FAIL $name: it was ended after $client_seconds s, or crashed (exit code $status)"
  fi
  echo "   $name took $((SECONDS - started)) s"
done

echo "== server"
outcome() { # STATUS TEXT
  if [ "$1" = 0 ]; then echo "1 0" >>"$CLIENTS_SCRATCH/results"; echo "ok   server: $2"; return; fi
  echo "0 1" >>"$CLIENTS_SCRATCH/results"
  echo "FAIL server: $2"
  failed+=(server)
}
stopped=0
kill -TERM "$server" || true
wait "$server" || stopped=$?
outcome "$stopped" "it stops with 0 after SIGTERM"
checked=0
"$POSTHASTE" check --data "$CLIENTS_DATA" >"$CLIENTS_SCRATCH/check" 2>&1 || checked=$?
outcome "$checked" "nothing is damaged in its store"
[ "$checked" = 0 ] || cat "$CLIENTS_SCRATCH/check"
complaints=0
if grep -aE '\bERROR\b|panicked' "$CLIENTS_SCRATCH/log"; then complaints=1; fi
outcome "$complaints" "its log has no error"

[ ${#failed[@]} = 0 ] || echo "failed: ${failed[*]}"
awk -v skipped="${#skipped[@]}" '{ passed += $1; failed += $2 }
  END { printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$CLIENTS_SCRATCH/results"
[ ${#failed[@]} = 0 ]
