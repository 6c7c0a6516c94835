#!/usr/bin/env bash
# Whether posthaste-bench measures what Postfix' smtp-source measures: both deliver the same number of messages of one
# size over the same number of sessions, in turn, and the median of the ratios of their rates is printed. It must be
# within 15 % of 1. smtp-source waits for each reply, so posthaste-bench is told not to pipeline; both send the letter X.
#
# That is only so with few sessions. smtp-source has one thread, takes twice the CPU for a message and sends it in more
# pieces; with many sessions its pace decides how the server groups commits. What both can do against a sink is printed first.
#
# usage: smtp-source.sh [PAIRS [MESSAGES [SESSIONS [BYTES]]]]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
pairs=${1:-7} messages=${2:-5000} sessions=${3:-1} size=${4:-4096}
command -v smtp-source >/dev/null || { echo "smtp-source is not there: apt-get install postfix" >&2; exit 1; }

"$bench" sink >"$work/sink" &
pids+=("$!")
until [ -s "$work/sink" ]; do read -rt 0.05 <> <(:) || true; done
lmtp=$(sed -n 's/^listening lmtp //p' "$work/sink")

by_bench() {
  "$bench" deliver --json --lmtp "$lmtp" --connections "$sessions" --messages "$messages" --size "$size" --fill x \
    --no-pipelining >"$work/report"
  field '["rate"]' "$work/report"
}
by_source() {
  local start end
  start=$(date +%s.%N)
  smtp-source -L -d -s "$sessions" -m "$messages" -l "$size" -f bench@example.net -t user1@example.org "inet:$lmtp"
  end=$(date +%s.%N)
  python3 -c "print($messages / ($end - $start))"
}
printf 'against a sink: posthaste-bench %.0f/s, smtp-source %.0f/s\n' "$(by_bench)" "$(by_source)"
kill "${pids[0]}"

start_server
by_bench >/dev/null
by_source >/dev/null
ratios=()
for ((pair = 1; pair <= pairs; pair++)); do
  # Who is first alternates too.
  if ((pair % 2)); then ours=$(by_bench) theirs=$(by_source); else theirs=$(by_source) ours=$(by_bench); fi
  ratio=$(python3 -c "print(f'{$ours / $theirs:.3f}')")
  ratios+=("$ratio")
  printf 'posthaste-bench %.0f/s, smtp-source %.0f/s, ratio %s\n' "$ours" "$theirs" "$ratio"
done
python3 - "${ratios[@]}" <<'PY'
import statistics, sys
median = statistics.median(map(float, sys.argv[1:]))
print(f"median ratio {median:.3f} of {len(sys.argv) - 1}")
sys.exit(not 0.85 <= median <= 1.15)
PY
