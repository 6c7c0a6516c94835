#!/usr/bin/env bash
# Installs the clients that `run.sh` drives: programs from the distribution (Debian 12; as root), libraries into the
# target directory, at pinned versions. What is there already is left alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
installed=${CARGO_TARGET_DIR:-$root/target}/clients
mkdir -p "$installed"

packages=(isync offlineimap3 getmail6 fetchmail neomutt curl swaks postfix
  libnet-ssleay-perl)
for command in python3:python3 pip3:python3-pip node:nodejs npm:npm; do
  command -v "${command%%:*}" >/dev/null || packages+=("${command##*:}")
done
missing=()
for package in "${packages[@]}"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update -qq
  # RUNLEVEL=1: no package is to start its service.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

# $1: what is wanted, $2: where it is noted that it is there.
is_there() { cmp -s "$1" "$2"; }

if ! is_there "$here/requirements.txt" "$installed/python/requirements.txt"; then
  rm -rf "$installed/python"
  python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
    --target "$installed/python" -r "$here/requirements.txt"
  cp "$here/requirements.txt" "$installed/python/"
fi

if ! is_there "$here/imapflow/package-lock.json" "$installed/imapflow/installed.json"; then
  rm -rf "$installed/imapflow"
  mkdir -p "$installed/imapflow"
  cp "$here/imapflow/package.json" "$here/imapflow/package-lock.json" "$installed/imapflow/"
  npm ci --prefix "$installed/imapflow" --ignore-scripts --no-audit --no-fund --loglevel=error
  cp "$here/imapflow/package-lock.json" "$installed/imapflow/installed.json"
fi
