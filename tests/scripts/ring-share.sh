#!/usr/bin/env bash
# How much of the server's I/O on sockets and on files of the store goes past the ring.
#
# Runs deliveries and fetches while strace counts the calls that read, write or sync by kind of descriptor, and a
# tracepoint counts the operations submitted to io_uring. Prints both and fails if 1 % or more of either kind are calls.
# Needs root, strace and perf. Reads of what is in the page cache are calls too (preadv2 with RWF_NOWAIT, which never
# waits); ALLOW_NOWAIT=1 leaves them out of the judgement, not out of the figures.
#
# usage: ring-share.sh [DELIVERIES [FETCHES]]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
deliveries=${1:-10000} fetches=${2:-10000}

start_server --io uring
perf record -q -e io_uring:io_uring_submit_req -p "$pid" -o "$work/perf" 2>"$work/perf.log" &
perf_pid=$!
pids+=("$perf_pid")
calls=read,write,readv,writev,pread64,pwrite64,preadv,preadv2,pwritev,pwritev2
calls+=,recvfrom,recvmsg,recvmmsg,sendto,sendmsg,sendmmsg,sendfile,splice,tee,copy_file_range
calls+=,fsync,fdatasync,sync_file_range
strace -f -yy -qq -e signal=none -e trace="$calls" -o "$work/trace" -p "$pid" 2>"$work/strace.log" &
strace_pid=$!
pids+=("$strace_pid")
# Both are attached when the server's thread has a tracer and perf has its file.
until grep -q '^TracerPid:[[:space:]]*[1-9]' "/proc/$pid/status" && [ -s "$work/perf" ]; do read -rt 0.05 <> <(:) || true; done

"$bench" deliver --json --lmtp "$lmtp" --user-count "$users" --connections 16 --messages "$deliveries" --size 6700 >"$work/deliver"
"$bench" fetch --json --imap "$imap" --user-count "$users" --password secret --connections 16 --messages "$fetches" >"$work/fetch"
kill "$strace_pid"; wait "$strace_pid" || true
kill -INT "$perf_pid"; wait "$perf_pid" || true

perf script -i "$work/perf" -F trace 2>/dev/null >"$work/submitted"
python3 - "$work/trace" "$work/submitted" "$work/data" <<'PY'
import os, re, sys
from collections import Counter
trace, submitted, data = sys.argv[1:]
calls = Counter()
nowait = Counter()
for line in open(trace, errors="replace"):
    found = re.match(r"\d+\s+(\w+)\(-?\d+<(.*?)>", line)
    if not found:
        continue
    call, target = found.groups()
    if re.match(r"(TCP|UNIX|UDP|socket)", target):
        kind = "socket"
    elif target.startswith(data):
        kind = "store"
    else:
        kind = "other (" + re.sub(r"[\d:\[\]]+", "", target) + ")"
    calls[kind, call] += 1
    nowait[kind] += "RWF_NOWAIT" in line
ring = Counter()
for line in open(submitted, errors="replace"):
    found = re.search(r"opcode (\w+)", line)
    if found:
        ring[found[1]] += 1
sockets = ("RECV", "SEND", "RECVMSG", "SENDMSG", "SEND_ZC", "SENDMSG_ZC")
files = ("READ", "WRITE", "READV", "WRITEV", "FSYNC", "READ_FIXED", "WRITE_FIXED")
print("submitted to the ring:", ", ".join(f"{name} {count}" for name, count in ring.most_common()))
for (kind, call), count in sorted(calls.items()):
    print(f"called: {call} on {kind}: {count}")
bad = False
for kind, names in (("socket", sockets), ("store", files)):
    past = sum(count for (k, _), count in calls.items() if k == kind)
    through = sum(ring[name] for name in names)
    share = past / max(past + through, 1)
    print(f"{kind}: {through} operations on the ring, {past} calls past it: {share:.2%}")
    if nowait[kind]:
        waiting = past - nowait[kind]
        waiting_share = waiting / max(waiting + through, 1)
        print(f"{kind}: without {nowait[kind]} reads that never wait: {waiting} calls past it: {waiting_share:.2%}")
        share = waiting_share if os.environ.get("ALLOW_NOWAIT") else share
    bad |= share >= 0.01 or through == 0
sys.exit(bad)
PY
