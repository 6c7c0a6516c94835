#!/bin/bash
# What mail takes on disk, for each octet received: all of a corpus, and mail that dictionaries have not been trained on.
# usage: tests/scripts/space.sh CORPUS [BINARIES]
#   CORPUS    a directory with directories of messages (*.eml), in order
#   BINARIES  where posthaste and posthaste-bench are; target/release if absent
# Of each 25 messages in a row one in five is kept apart; the store is trained on some of the others. Needs ports 2400.
set -euo pipefail
corpus=$(realpath "$1")
bin=$(realpath "${2:-target/release}")
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server"; rm -rf "$work"' EXIT
hash='$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg'
"$bin/posthaste-bench" users --user-count 64 --password "$hash" > "$work/users"

start() {
    # What the one before has said is not to be taken for an answer of this one.
    : > "$work/log"
    "$bin/posthaste" --set store.train_after_bytes=16777216 --set store.reserve_bytes=0 --set store.compaction=false \
        --set store.compaction_bytes_per_s=0 serve --data "$1" --workers 1 --listen lmtp=127.0.0.1:2400 > "$work/log" 2>&1 &
    server=$!
    until grep -q ready "$work/log"; do kill -0 "$server"; done
}
stop() { kill "$server"; wait "$server" || true; server=; }
# Delivers the messages of a directory.
deliver() {
    local count
    count=$(find -L "$1" -name '*.eml' | wc -l)
    "$bin/posthaste-bench" deliver --lmtp 127.0.0.1:2400 --user-count 64 --connections 64 --messages "$count" \
        --corpus "$1" 2> /dev/null | grep -E ' errors +0$' > /dev/null
}
trained() { until "$bin/posthaste" stats --data "$1" | grep -q 'dictionaries *generation'; do :; done; }
octets() { du -sb "$1" | cut -f 1; }
fresh() { rm -rf "$1"; "$bin/posthaste" --set store.shards=1 user import "$work/users" --data "$1" > /dev/null; }
compact() { start "$1"; "$bin/posthaste" compact --wait --data "$1" > /dev/null; stop; }

# Octets as they are received: without mbox lines, with CRLF.
received() {
    find -L "$1" -name '*.eml' -print0 | xargs -0 cat | sed -e '/^From [^ ]* *[A-Z][a-z][a-z] /d' -e 's/\r*$/\r/' | wc -c
}
share() { awk -v octets="$1" -v received="$2" 'BEGIN { printf "%.3f of %.1f MB\n", octets / received, received / 1e6 }'; }

fresh "$work/all"
start "$work/all"
deliver "$corpus"
trained "$work/all"
stop
echo "corpus at once          $(share "$(octets "$work/all")" "$(received "$corpus")")"
fresh "$work/all"
start "$work/all"
deliver "$corpus"
trained "$work/all"
"$bin/posthaste" compact --wait --data "$work/all" > /dev/null
stop
echo "corpus compacted        $(share "$(octets "$work/all")" "$(received "$corpus")")"

for directory in "$corpus"/*/; do
    name=$(basename "$directory")
    mkdir -p "$work/first/$name" "$work/second/$name" "$work/unseen/$name"
    number=0
    for file in "$directory"*.eml; do
        part=first
        if ((number % 5 == 0)); then part=second; fi
        if ((number / 25 % 5 == 0)); then part=unseen; fi
        ln -s "$file" "$work/$part/$name/"
        number=$((number + 1))
    done
done
fresh "$work/store"
start "$work/store"
deliver "$work/first"
trained "$work/store"
# What comes with dictionaries brings them into the log.
deliver "$work/second"
stop
before=$(octets "$work/store")
cp -r "$work/store" "$work/without"
start "$work/store"
deliver "$work/unseen"
stop
unseen=$(received "$work/unseen")
echo "unseen mail at once     $(share $(($(octets "$work/store") - before)) "$unseen")"
compact "$work/store"
compact "$work/without"
echo "unseen mail compacted   $(share $(($(octets "$work/store") - $(octets "$work/without"))) "$unseen")"
