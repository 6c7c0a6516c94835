#!/usr/bin/env bash
# Whether posthaste-bench measures what Postfix' smtp-source measures. For each number of sessions both deliver the same
# message to the same user the same number of times, in turn; the median of the ratios of their rates must be within 15 %
# of 1. smtp-source waits for each reply, so posthaste-bench is told not to pipeline.
#
# The message is text of this repository, by default 64 KB of it: so large that either client waits for the server. First
# both send to a sink: a client whose rate against the server comes near that measures itself. The server has one core and
# the clients another, if there are two. SERVE has further options of serve.
#
# usage: smtp-source.sh [PAIRS [BYTES [SESSIONS...]]]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pairs=${1:-9} size=${2:-65536}
sessions=("${@:3}")
[ ${#sessions[@]} -gt 0 ] || sessions=(1 2 4 8 16)
messages=$((64000000 / size))
messages=$((messages > 5000 ? 5000 : messages))
command -v smtp-source >/dev/null || { echo "smtp-source is not there: apt-get install postfix" >&2; exit 1; }

mkdir "$work/mail"
python3 - "$root" "$size" >"$work/mail/text.eml" <<'PY'
import glob, itertools, sys
root, size = sys.argv[1], int(sys.argv[2])
mail = "From: Bench <bench@example.net>\nTo: <user1@example.org>\nSubject: Text of a repository\n\n"
names = sorted(glob.glob(f"{root}/docs/*.md") + glob.glob(f"{root}/engine/src/*.rs"))
text = [line[at:at + 200] for name in names for line in open(name, encoding="ascii", errors="replace").read().splitlines()
        for at in range(0, max(len(line), 1), 200)]
lines = itertools.cycle(line.encode("ascii", "replace").decode() for line in text)
while len(mail) < size:
    mail += next(lines) + "\n"
print(mail[:size - 1])
PY

# The core for a process and all its threads.
serve_on_first() { if [ "$(nproc)" -gt 1 ]; then taskset --all-tasks --pid 1 "$1" >/dev/null; fi }
client=()
[ "$(nproc)" -eq 1 ] || client=(taskset 2)

# Both give "RATE SHARE": messages a second, and the client's CPU time in the time that it took.
by_bench() {
  "${client[@]}" "$bench" deliver --json --lmtp "$lmtp" --connections "$1" --messages "$messages" --corpus "$work/mail" \
    --no-pipelining >"$work/report" || { cat "$work/report" >&2; return 1; }
  printf '%s %s\n' "$(field '["rate"]' "$work/report")" "$(field '["client_cpu_share"]' "$work/report")"
}
by_source() {
  python3 - "$messages" "${client[@]}" smtp-source -L -d -s "$1" -m "$messages" -F "$work/mail/text.eml" -f bench@example.net \
    -t user1@example.org "inet:$lmtp" <<'PY'
import resource, subprocess, sys, time
start = time.monotonic()
subprocess.run(sys.argv[2:], check=True)
seconds = time.monotonic() - start
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(int(sys.argv[1]) / seconds, (used.ru_utime + used.ru_stime) / seconds)
PY
}

# Lets both deliver over $1 sessions in $2 pairs and prints the medians; is false if they do not agree.
compare() {
  local pair ours theirs results=()
  by_bench "$1" >/dev/null
  by_source "$1" >/dev/null
  for ((pair = 1; pair <= $2; pair++)); do
    # Who is first alternates too.
    if ((pair % 2)); then ours=$(by_bench "$1") theirs=$(by_source "$1"); else theirs=$(by_source "$1") ours=$(by_bench "$1"); fi
    results+=("$ours $theirs")
  done
  python3 - "$1" "${results[@]}" <<'PY'
import statistics, sys
sessions, *results = sys.argv[1:]
results = [tuple(map(float, result.split())) for result in results]
ratios = sorted(ours / theirs for ours, _, theirs, _ in results)
rate, share, source_rate, source_share = map(statistics.median, zip(*results))
median = statistics.median(ratios)
print(f"{sessions:>3} sessions: posthaste-bench {rate:5.0f}/s with {share:4.0%} of a core, "
      f"smtp-source {source_rate:5.0f}/s with {source_share:4.0%}, "
      f"median ratio {median:.3f} of {len(ratios)} ({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)
sys.exit(not 0.85 <= median <= 1.15)
PY
}

echo "$messages messages of $size octets; to a sink:"
"$bench" sink >"$work/sink" &
pids+=("$!")
until [ -s "$work/sink" ]; do read -rt 0.05 <> <(:) || true; done
serve_on_first "${pids[0]}"
lmtp=$(sed -n 's/^listening lmtp //p' "$work/sink")
for count in "${sessions[@]}"; do compare "$count" 3 || true; done
kill "${pids[0]}"

echo "to the server:"
read -ra options <<<"${SERVE:-}"
start_server "${options[@]}"
serve_on_first "$pid"
status=0
for count in "${sessions[@]}"; do compare "$count" "$pairs" || { echo "    should be within 15 % of 1"; status=1; }; done
exit $status
