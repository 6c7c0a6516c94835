#!/bin/bash
# What a million mailboxes take: memory of each at rest, a start, and opening some that nobody has opened lately.
# usage: tests/scripts/mailboxes.sh [MAILBOXES] [MESSAGES] [BINARIES]
#   MAILBOXES  1000000 if absent: as many accounts as a sixth of it with six each (memory), and as many accounts of one (the rest)
#   MESSAGES   small ones, all different, into random mailboxes; 10000000 if absent
#   BINARIES   where posthaste and posthaste-bench are; target/release if absent
# Drops the kernel's caches, so it has to run as root. Needs ports 2400 and 2401, and some 8 GB of disk for ten million messages.
set -euo pipefail
mailboxes=${1:-1000000}
messages=${2:-10000000}
bin=$(realpath "${3:-target/release}")
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -9 "$server"; rm -rf "$work"' EXIT
hash='$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg'

import() { # STORE ACCOUNTS [OPTION]...
    local store=$1
    "$bin/posthaste-bench" users --user-count "$2" --password "$hash" > "$work/users"
    shift 2
    "$bin/posthaste" user import "$work/users" --data "$store" --set store.shards=1 "$@" > /dev/null
}
start() { # STORE [OPTION]...
    local begun store=$1
    shift
    : > "$work/log"
    begun=$(date +%s.%N)
    "$bin/posthaste" serve --data "$store" --workers 1 --plaintext-auth --listen imap=127.0.0.1:2401 \
        --listen lmtp=127.0.0.1:2400 --set store.compaction=false --set store.scrub_bytes_per_s=0 "$@" > "$work/log" 2>&1 &
    server=$!
    until grep -q '^ready' "$work/log"; do kill -0 "$server"; sleep 0.02; done
    started=$(echo "$(date +%s.%N) - $begun" | bc)
}
stop() { kill "$server"; wait "$server" || true; server=; }
memory() { sed -n 's/^RssAnon:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$server/status"; }
figures() { grep -E ' (in|rate|latency|server CPU|server memory|device|errors) ' || true; }

caches=(--set store.index_cache_bytes=0 --set store.message_cache_bytes=0)
import "$work/six" $((mailboxes / 6))
import "$work/one" $((mailboxes / 6)) --set 'accounts.mailboxes=[]'
start "$work/one" "${caches[@]}"
one=$(memory)
stop
start "$work/six" "${caches[@]}"
six=$(memory)
stop
echo "memory of a mailbox: $(((six - one) * 1024 / (mailboxes / 6 * 5))) octets, $((six * 1024 / mailboxes)) with all that the server has"
echo "start with $((mailboxes / 6)) accounts of six mailboxes: $started s"
rm -rf "$work/one" "$work/six"

import "$work/store" "$mailboxes" --set 'accounts.mailboxes=[]'
start "$work/store"
echo "deliveries into random mailboxes:"
"$bin/posthaste-bench" deliver --lmtp 127.0.0.1:2400 --user-count "$mailboxes" --user-order random --distinct --size 700 \
    --connections 128 --messages "$messages" --server-pid "$server" --device "${DEVICE:-vda}" 2> /dev/null | figures
kill -9 "$server"
wait "$server" 2> /dev/null || true
sync
echo 3 > /proc/sys/vm/drop_caches
start "$work/store"
echo "start after kill -9: $started s"
for item in FLAGS 'BODY.PEEK[]'; do
    echo 3 > /proc/sys/vm/drop_caches
    echo "login, SELECT, FETCH 1:* ($item), logout of random accounts:"
    "$bin/posthaste-bench" sessions --imap 127.0.0.1:2401 --password bench --user-count "$mailboxes" --user-order random \
        --connections 64 --seconds 15 --item "$item" --server-pid "$server" --device "${DEVICE:-vda}" 2> /dev/null | figures
done
stop
