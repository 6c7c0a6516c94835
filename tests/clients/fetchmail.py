"""fetchmail: POP3 and IMAP, kept by their UIDs or deleted, delivered to a program (MDA) that writes a Maildir."""

import re

from . import harness
from .harness import check, same

fetchmail = harness.tool("fetchmail")
harness.begin("fetchmail", re.search(r"fetchmail release [\d.]+", harness.run([fetchmail, "--version"]).stdout).group())
home = harness.directory()
# The program that each message is given to: it puts the octets into a file, and nothing else.
deliver = home / "deliver"
deliver.write_text("""#!/bin/sh
cat >"$1/tmp/$$" && mv "$1/tmp/$$" "$1/new/$$"
""")
deliver.chmod(0o755)


def fetch(what, service, tls, user, local, options, expected=0):
    """Runs it once. It exits with 1 if there was no mail."""
    protocol = "protocol pop3 uidl" if service.startswith("pop3") else "protocol imap"
    (home / "fetchmailrc").write_text(f"""
set no bouncemail
set no spambounce
set no softbounce
set idfile "{home}/ids"
poll localhost service {harness.where(service).port} {protocol}
  user "{user}" password "{harness.PASSWORD}" {tls} {options}
  mda "{deliver} {local}" no rewrite
""")
    (home / "fetchmailrc").chmod(0o600)
    result = harness.run(
        [fetchmail, "-f", home / "fetchmailrc", "--pidfile", home / "pid", "--nosyslog", "-v"],
        env={"FETCHMAILHOME": str(home)},
        timeout=40,
    )
    check(f"{what}: it ends with {expected}", result.returncode == expected, result.stdout)
    return result.stdout


def without_trace(raw):
    """fetchmail adds a Received field of its own, and drops the Return-Path it finds."""
    fields, _, body = raw.partition(b"\n\n")
    lines, keep = [], True
    for line in fields.split(b"\n"):
        if not line.startswith((b" ", b"\t")):
            keep = not line.lower().startswith((b"received:", b"return-path:", b"delivered-to:"))
        if keep:
            lines.append(line)
    return b"\n".join(lines) + b"\n\n" + body


def compare(what, local, stored):
    same(
        what,
        {key: without_trace(raw) for key, (raw, _, _) in harness.maildir(local).items()},
        {message.id: without_trace(harness.lf(message.raw)) for message in stored},
    )


def use(what, service, tls):
    user = harness.user("fetchmail-" + what.lower().replace(" ", "-"))
    local = harness.make_maildir(home / f"kept {what}".replace(" ", "-"))
    harness.deliver(user, [harness.message(number) for number in range(60)])
    stored = harness.stored(user)
    fetch(f"{what}, keep", service, tls, user, local, "keep")
    compare(f"{what}, keep: all were fetched, byte for byte", local, stored)
    same(f"{what}, keep: all are still there", len(harness.stored(user)), 60)
    harness.deliver(user, [harness.message(number) for number in range(60, 65)])
    stored = harness.stored(user)
    output = fetch(f"{what}, keep, again", service, tls, user, local, "keep")
    same(f"{what}, keep, again: only the new ones were read", output.count("reading message"), 5)
    compare(f"{what}, keep, again: all were fetched, byte for byte", local, stored)
    fetch(f"{what}, keep, nothing new", service, tls, user, local, "keep", expected=1)
    local = harness.make_maildir(home / f"all {what}".replace(" ", "-"))
    fetch(f"{what}, delete", service, tls, user, local, "nokeep fetchall")
    compare(f"{what}, delete: all were fetched, byte for byte", local, stored)
    same(f"{what}, delete: none is left", harness.stored(user), [])
    fetch(f"{what}, delete, an empty mailbox", service, tls, user, local, "nokeep fetchall", expected=1)


TRUST = f'sslcertck sslcertfile "{harness.CERTIFICATE}"'
use("POP3", "pop3", 'sslproto ""')
use("POP3 with STLS", "pop3", f'sslproto "auto" {TRUST}')
use("POP3S", "pop3s", f"ssl {TRUST}")
use("IMAPS", "imaps", f"ssl {TRUST}")
harness.end()
