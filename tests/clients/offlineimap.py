"""OfflineIMAP: a two-way synchronisation with folders, changes on both sides."""

from . import harness
from .harness import check, same

COUNT = 150

offlineimap = harness.tool("offlineimap")
harness.begin("offlineimap", harness.run([offlineimap, "--version"]).stdout.split()[0])
user = harness.user()
home = harness.directory()

# Not STARTTLS: after it, its reading and its writing thread use the TLS connection at once, and when the server's session
# tickets come just then, it hangs in one case of ten.
server = harness.where("imaps")
(home / "password").write_text(harness.PASSWORD + "\n")
(home / "offlineimaprc").write_text(f"""
[general]
accounts = all
metadata = {home}/metadata
ui = basic
fsync = False

[Account all]
localrepository = near
remoterepository = far

[Repository near]
type = Maildir
localfolders = {home}/mail
sep = /

[Repository far]
type = IMAP
remotehost = localhost
remoteport = {server.port}
ssl = yes
sslcacertfile = {harness.CERTIFICATE}
remoteuser = {user}
remotepassfile = {home}/password
expunge = yes
maxconnections = 3
""")


def sync(what):
    output = harness.succeeds(what, [offlineimap, "-c", home / "offlineimaprc", "-o"], timeout=100)
    check(f"{what}: without an error", "ERROR" not in output, output)


def near(name):
    return {
        key: (raw, "".join(sorted(flags))) for key, (raw, flags, _) in harness.maildir(home / "mail" / name).items()
    }


LETTERS = {"\\Seen": "S", "\\Answered": "R", "\\Flagged": "F", "\\Draft": "D", "\\Deleted": "T"}


def far(name):
    return {
        message.id: (harness.lf(message.raw), "".join(sorted(LETTERS[flag] for flag in message.flags)))
        for message in harness.stored(user, name)
    }


def compare(what, name, count):
    ours, theirs = near(name), far(name)
    same(f"{what}: {name} has {count} messages", (len(ours), len(theirs)), (count, count))
    same(f"{what}: {name} is the same on both sides, octets and flags", ours, theirs)


def identity(number, seed=1):
    return f"<{number}.{seed}@{harness.DOMAIN}>"


harness.deliver(user, [harness.message(number) for number in range(COUNT)])
with harness.imap(user) as imap:
    imap.create("Projects")
    imap.create("Projects/Bridge")
    # Modified UTF-7 on the wire: Entwürfe & Ideen.
    imap.create('"Entw&APw-rfe &- Ideen"')
    imap.append("Projects/Bridge", "(\\Seen)", None, harness.message(0, seed=2))
    imap.append('"Entw&APw-rfe &- Ideen"', "(\\Flagged)", None, harness.message(0, seed=4))
sync("first synchronisation")
compare("first", "INBOX", COUNT)
compare("first", "Projects/Bridge", 1)
compare("first", "Entw&APw-rfe &- Ideen", 1)

uids = {message.id: str(message.uid) for message in harness.stored(user)}
with harness.imap(user, "INBOX") as imap:
    imap.uid("STORE", ",".join(uids[identity(number)] for number in range(20)), "+FLAGS", "(\\Seen \\Answered)")
    imap.uid("MOVE", ",".join(uids[identity(number)] for number in range(20, 30)), "Projects")
    imap.uid("STORE", ",".join(uids[identity(number)] for number in range(30, 35)), "+FLAGS", "(\\Deleted)")
    imap.expunge()
harness.deliver(user, [harness.message(number) for number in range(COUNT, COUNT + 5)])
inbox = home / "mail" / "INBOX"
files = harness.maildir(inbox)
for number in range(40, 60):
    file = files[identity(number)][2]
    file.rename(inbox / "cur" / f"{file.name.partition(':2,')[0]}:2,FS")
for number in range(60, 65):
    files[identity(number)][2].unlink()
for number in range(10):
    harness.add_to_maildir(inbox, harness.message(number, seed=3), "S")
harness.make_maildir(home / "mail" / "Local")
harness.add_to_maildir(home / "mail" / "Local", harness.message(0, seed=5), "S")
sync("second synchronisation, changes on both sides")
compare("second", "INBOX", COUNT - 10 - 5 + 5 - 5 + 10)
compare("second", "Projects", 10)
compare("second", "Local", 1)
theirs = far("INBOX")
check("flags set in the Maildir went up", theirs[identity(45)][1] == "FS")
check("what was deleted in the Maildir is gone from the server", identity(61) not in theirs)
check(
    "what was put into the Maildir is on the server, byte for byte",
    all(theirs[identity(number, 3)][0] == harness.lf(harness.message(number, 3)) for number in range(10)),
)
check(
    "uploads carry no mark, as the server has UIDPLUS", not any(b"X-OfflineIMAP" in raw for raw, _ in theirs.values())
)


def state():
    """The highest mod-sequence of each mailbox counts every change on the server."""
    with harness.imap(user) as imap:
        status = {
            name: imap.status(f'"{name}"', "(MESSAGES UIDNEXT HIGHESTMODSEQ)") for name in harness.mailboxes(user)
        }
    return status, {path for path in (home / "mail").rglob("*:2,*")}


before = state()
sync("third synchronisation, nothing to do")
same("it changes nothing on either side", state(), before)
harness.end()
