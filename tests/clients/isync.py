"""isync (mbsync): a two-way synchronisation of 2,000 messages, with changes of every kind on both sides."""

import re

from . import harness
from .harness import check, same

COUNT = 2000

mbsync = harness.tool("mbsync")
harness.begin("isync", harness.run([mbsync, "--version"]).stdout.strip())
user = harness.user()
home = harness.directory()
local = harness.make_maildir(home / "INBOX")

server = harness.where("imaps")
(home / "password").write_text(harness.PASSWORD + "\n")
(home / "mbsyncrc").write_text(f"""
IMAPAccount server
Host localhost
Port {server.port}
User {user}
PassCmd "cat {home}/password"
SSLType IMAPS
CertificateFile {harness.CERTIFICATE}

IMAPStore far
Account server

MaildirStore near
Path {home}/
Inbox {home}/INBOX
SubFolders Verbatim

Channel all
Far :far:
Near :near:
Patterns *
Create Both
Remove Both
Expunge Both
CopyArrivalDate yes
SyncState *
""")


def sync(what):
    return harness.succeeds(what, [mbsync, "-c", home / "mbsyncrc", "all"], timeout=100)


def without_tuid(raw):
    """mbsync marks what it uploads with a header field of its own."""
    return re.sub(rb"(?m)^X-TUID: .*\r?\n", b"", raw)


def near(name):
    """The Maildir's messages and flags. Maildirs have T(rashed) for \\Deleted; all of these are expunged."""
    return {
        key: (without_tuid(raw), "".join(sorted(flags)))
        for key, (raw, flags, _) in harness.maildir(home / name).items()
    }


LETTERS = {"\\Seen": "S", "\\Answered": "R", "\\Flagged": "F", "\\Draft": "D", "\\Deleted": "T"}


def far(name):
    return {
        message.id: (without_tuid(harness.lf(message.raw)), "".join(sorted(LETTERS[flag] for flag in message.flags)))
        for message in harness.stored(user, name)
    }


def compare(what, name, count):
    ours, theirs = near(name), far(name)
    same(f"{what}: {name} has {count} messages", (len(ours), len(theirs)), (count, count))
    same(f"{what}: {name} is the same on both sides, octets and flags", ours, theirs)


def identity(number, seed=1):
    return f"<{number}.{seed}@{harness.DOMAIN}>"


# Everything is new, on the server.
sent = [harness.message(number) for number in range(COUNT)]
harness.deliver(user, sent)
sync("first synchronisation")
compare("first", "INBOX", COUNT)
stored = {message.id: message for message in harness.stored(user)}
check("every message ends with what was sent", all(stored[harness.message_id(raw)].raw.endswith(raw) for raw in sent))

# Changes on both sides.
uids = {message.id: str(message.uid) for message in stored.values()}


def uid_set(numbers):
    return ",".join(uids[identity(number)] for number in numbers)


with harness.imap(user, "INBOX") as imap:
    imap.create("Archive")
    imap.create("Work/2025")
    imap.uid("STORE", uid_set(range(0, 200)), "+FLAGS", "(\\Seen)")
    imap.uid("STORE", uid_set(range(100, 120)), "+FLAGS", "(\\Answered \\Flagged)")
    imap.uid("STORE", uid_set(range(300, 340)), "+FLAGS", "(\\Deleted)")
    imap.uid("EXPUNGE", uid_set(range(300, 320)))
    imap.uid("MOVE", uid_set(range(400, 450)), "Archive")
    imap.uid("MOVE", uid_set(range(450, 460)), "Work/2025")
harness.deliver(user, [harness.message(number) for number in range(COUNT, COUNT + 50)])
files = harness.maildir(local)
for number in range(500, 700):
    file = files[identity(number)][2]
    file.rename(local / "cur" / f"{file.name.partition(':2,')[0]}:2,{'FS' if number % 2 else 'S'}")
for number in range(700, 720):
    files[identity(number)][2].unlink()
for number in range(720, 730):
    file = files[identity(number)][2]
    file.rename(local / "cur" / f"{file.name.partition(':2,')[0]}:2,ST")
for number in range(40):
    harness.add_to_maildir(local, harness.message(number, seed=2), "S" if number % 3 else "")
drafts = harness.make_maildir(home / "Drafts")
for number in range(5):
    harness.add_to_maildir(drafts, harness.message(number, seed=3), "DS")
sync("second synchronisation, changes on both sides")
left = COUNT - 40 - 60 + 50 - 30 + 40
compare("second", "INBOX", left)
compare("second", "Archive", 50)
compare("second", "Work/2025", 10)
compare("second", "Drafts", 5)
inbox = near("INBOX")
gone = [*range(300, 340), *range(400, 460), *range(700, 730)]
check(
    "what was deleted or moved on one side is gone from the other",
    not any(identity(number) in inbox for number in gone),
)
check("flags set on the server came down", inbox[identity(110)][1] == "FRS" and inbox[identity(50)][1] == "S")
theirs = far("INBOX")
check("flags set in the Maildir went up", theirs[identity(501)][1] == "FS" and theirs[identity(500)][1] == "S")
for seed, name, numbers in ((2, "INBOX", range(40)), (3, "Drafts", range(5))):
    uploaded = far(name)
    check(
        f"what was put into the Maildir's {name} is on the server, byte for byte",
        all(uploaded[identity(number, seed)][0] == harness.lf(harness.message(number, seed)) for number in numbers),
    )

# Conflicts: a flag here, a deletion there; and the two sides' flags are joined.
with harness.imap(user, "INBOX") as imap:
    imap.uid("STORE", uid_set([800]), "+FLAGS", "(\\Flagged)")
    imap.uid("STORE", uid_set([801]), "+FLAGS", "(\\Deleted)")
    imap.expunge()
files = harness.maildir(local)
for number, flags in ((800, "S"), (801, "S")):
    file = files[identity(number)][2]
    file.rename(local / "cur" / f"{file.name.partition(':2,')[0]}:2,{flags}")
sync("third synchronisation, conflicts")
compare("third", "INBOX", left - 1)
check("flags of both sides are joined", near("INBOX")[identity(800)][1] == "FS")


# Nothing is left to do.
def state():
    """The highest mod-sequence of each mailbox counts every change on the server."""
    with harness.imap(user) as imap:
        status = {
            name: imap.status(f'"{name}"', "(MESSAGES UIDNEXT HIGHESTMODSEQ)") for name in harness.mailboxes(user)
        }
    return status, {path.relative_to(home) for path in home.rglob("*:2,*")}


before = state()
sync("fourth synchronisation, nothing to do")
same("it changes nothing on either side", state(), before)
config = (home / "mbsyncrc").read_text()
config = config.replace(f"Port {server.port}", f"Port {harness.where('imap').port}").replace("IMAPS\n", "STARTTLS\n")
(home / "mbsyncrc").write_text(config)
sync("fifth synchronisation, nothing to do, with STARTTLS")
same("that changes nothing either", state(), before)
harness.end()
