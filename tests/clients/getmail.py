"""getmail: POP3 and IMAP into a Maildir, byte for byte; what was seen is not fetched again; deletion."""

import configparser
import os
import shutil

from . import harness
from .harness import check, same

getmail = harness.tool("getmail")
harness.begin("getmail", harness.run([getmail, "--version"]).stdout.strip())


def use(what, kind, service):
    user = harness.user("getmail-" + what.lower())
    home = harness.directory(what)
    local = harness.make_maildir(home / "mail")
    where = harness.where(service)
    config = configparser.ConfigParser(interpolation=None)
    config["retriever"] = {
        "type": kind,
        "server": "localhost",
        "port": where.port,
        "username": user,
        "password_command": f"('cat', '{home}/password')",
    }
    if service.endswith("s"):
        config["retriever"]["ca_certs"] = harness.CERTIFICATE
    if "IMAP" in kind:
        config["retriever"]["mailboxes"] = "('INBOX',)"
    config["destination"] = {"type": "Maildir", "path": f"{local}/"}
    if os.geteuid() == 0:
        # getmail refuses to write as root.
        config["destination"]["user"] = "nobody"
        for path in (local, *local.iterdir()):
            shutil.chown(path, "nobody")
    config["options"] = {"read_all": "false", "delete": "false", "delivered_to": "false", "received": "false"}
    (home / "password").write_text(harness.PASSWORD)

    def fetch(label, **options):
        config["options"].update(options)
        with open(home / "getmailrc", "w", encoding="utf-8") as file:
            config.write(file)
        return harness.succeeds(f"{what}: {label}", [getmail, "--getmaildir", home, "--rcfile", "getmailrc"])

    def got():
        """The Maildir, without the field that getmail adds to what comes by IMAP."""
        return {
            key: raw.replace(b"X-getmail-retrieved-from-mailbox: INBOX\n", b"", 1)
            for key, (raw, _, _) in harness.maildir(local).items()
        }

    def compare(label, count):
        stored = harness.stored(user)
        same(f"{what}: {label}, byte for byte", (len(got()), got()), (count, {m.id: harness.lf(m.raw) for m in stored}))

    harness.deliver(user, [harness.message(number) for number in range(60)])
    fetch("it fetches all")
    compare("all are there", 60)
    harness.deliver(user, [harness.message(number) for number in range(60, 65)])
    output = fetch("it fetches what is new")
    check(f"{what}: it fetches what is new only", "5 messages" in output and "60 skipped" in output, output)
    compare("all are there", 65)
    output = fetch("nothing is new")
    check(f"{what}: it fetches nothing twice", "0 messages" in output and "65 skipped" in output, output)
    for _, _, file in harness.maildir(local).values():
        file.unlink()
    before = {message.id: harness.lf(message.raw) for message in harness.stored(user)}
    fetch("it fetches all again and deletes them", read_all="true", delete="true")
    same(f"{what}: all have come", got(), before)
    same(f"{what}: none is left on the server", harness.stored(user), [])
    fetch("an empty mailbox")


use("POP3", "SimplePOP3Retriever", "pop3")
use("POP3S", "SimplePOP3SSLRetriever", "pop3s")
use("IMAPS", "SimpleIMAPSSLRetriever", "imaps")
harness.end()
