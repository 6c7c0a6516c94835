#!/usr/bin/env bash
# How long a server that was killed takes from its start to `ready`. Fills a store with MESSAGES (each record has 1,000 of
# them, in as many mailboxes), then kills the server in the middle of deliveries and starts it again, ROUNDS times. A page
# of the store is in memory or not, as it happened to be when the server was killed; COLD=1 drops its pages first.
#
# usage: restart.sh [MESSAGES [ROUNDS]]
# DATA=DIR  a store to use and to leave there, in place of one that goes away; what it lacks is delivered
users=${USERS:-10000}
USERS=$users
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
messages=${1:-1000000} rounds=${2:-5}
data=${DATA:-$data}
# Checking 10,000 real passwords is not the subject: this hash of "bench" is a cheap one.
[ -d "$data" ] || make_users '$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg'

deliver() {
  "$bench" deliver --json --lmtp "$lmtp" --user-count "$users" --connections 8 --recipients 1000 --size 2000 "$@"
}

# The files of the store out of the page cache.
drop_pages() {
  local file
  while read -r file; do dd of="$file" oflag=nocache conv=notrunc,fdatasync count=0 status=none </dev/null; done < <(find "$data" -type f)
}

serve --set log.level=debug
[ -s "$data/filled" ] || { deliver --messages $((messages / 1000)) >"$work/report" && echo "$messages" >"$data/filled"; }
times=()
for ((round = 1; round <= rounds; round++)); do
  # Long enough for the log to be somewhere between two checkpoints.
  deliver --seconds 60 >/dev/null 2>&1 &
  load=$!
  sleep "2.$((RANDOM % 10))"
  kill -KILL "$pid"
  kill "$load"
  wait "$pid" "$load" 2>/dev/null || true
  [ -z "${COLD:-}" ] || drop_pages
  : >"$work/log"
  start=$(date +%s.%N)
  serve --set log.level=debug
  took=$(python3 -c "print(f'{$(date +%s.%N) - $start:.3f}')")
  times+=("$took")
  printf 'ready after %s s; RssAnon %s kB' "$took" "$(sed -n 's/^RssAnon:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$pid/status")"
  sed -n 's/.*replayed batches=\([0-9]*\) records=\([0-9]*\) bytes=\([0-9]*\)/; a shard replayed \1 batches, \2 records, \3 bytes/p' "$work/log" | tr -d '\n'
  echo
done
python3 - "${times[@]}" <<'PY'
import statistics, sys
times = sorted(map(float, sys.argv[1:]))
print(f"median {statistics.median(times):.3f} s, from {times[0]:.3f} to {times[-1]:.3f}")
PY
