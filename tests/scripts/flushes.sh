#!/usr/bin/env bash
# Device flushes per delivery: about 1 with one connection, which must wait for each, and few where many share them.
#
# Other work on the same device is counted too: run it on a quiet machine. DEVICE is the block device of the temporary
# directory (default: the one that holds it).
#
# usage: flushes.sh [SECONDS]
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
seconds=${1:-5}
device=${DEVICE:-$(basename "$(df --output=source "$work" | tail -n 1)")}

start_server
status=0
for connections in 1 16 128; do
  "$bench" deliver --json --lmtp "$lmtp" --user-count "$users" --connections "$connections" --seconds "$seconds" \
    --size 6700 --server-pid "$pid" --device "$device" >"$work/report"
  flushes=$(field '["flushes_per_operation"]' "$work/report")
  rate=$(field '["rate"]' "$work/report")
  p50=$(field '["part"][1]["p50"]' "$work/report")
  printf '%4d connections: %.3f flushes per delivery, %.0f deliveries/s, p50 %d us after the dot\n' \
    "$connections" "$flushes" "$rate" "$p50"
  case $connections in
    1) python3 -c "import sys; sys.exit(not 0.9 <= $flushes <= 1.3)" || { echo "  should be about 1"; status=1; } ;;
    128) python3 -c "import sys; sys.exit(not $flushes <= 0.1)" || { echo "  should be at most 0.1"; status=1; } ;;
  esac
done
exit $status
