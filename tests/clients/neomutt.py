"""NeoMutt, driven by its own key commands on a pseudo-terminal: reading, copying, flags, saving to another mailbox,
deleting, sending with a copy in a mailbox of the server."""

import os
import pty
import re
import select
import subprocess
import time
import urllib.parse

from . import harness
from .harness import check, same

neomutt = harness.tool("neomutt")
harness.begin("neomutt", harness.run([neomutt, "-v"]).stdout.splitlines()[0])
user = harness.user()
home = harness.directory()
COUNT = 60


folder = f"imaps://{urllib.parse.quote(user, safe='')}@localhost:{harness.where('imaps').port}/"


def quoted(text):
    return "'" + text.replace("'", "'\"'\"'") + "'"


(home / "neomuttrc").write_text(f"""
set imap_user = {quoted(user)}
set imap_pass = "`cat {home}/password`"
set ssl_force_tls = no
set ssl_starttls = yes
set ssl_use_system_certs = no
set certificate_file = {harness.CERTIFICATE}
set folder = "{folder}"
set spoolfile = "+INBOX"
set header_cache = "{harness.directory("cache")}"
set message_cachedir = "{harness.directory("bodies")}"
set from = "{user}"
set record = "+Sent"
set postponed = "+Drafts"
set mbox_type = Maildir
set copy = yes
set confirmappend = no
set confirmcreate = no
set delete = yes
set quit = yes
set move = no
set mark_old = no
set wait_key = no
set sort = mailbox-order
set imap_check_subscribed = no
set mail_check = 1
set timeout = 1
set editor = "cp {home}/body"
set sendmail = /bin/true
set sleep_time = 0
set send_charset = "us-ascii:utf-8"
set tmpdir = "{harness.directory("tmp")}"
set smtp_url = "smtp://localhost:{harness.where("smtp").port}/"
""")
# A file keeps the password out of NeoMutt's quoting, which knows $ and ' and %.
(home / "password").write_text(harness.PASSWORD)


def drive(what, *arguments, stdin=None, timeout=40):
    """Runs it on a terminal until it ends by itself. A question that nobody expected is a hang, and so a failure."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [neomutt, "-n", "-F", home / "neomuttrc", *map(str, arguments)],
        stdin=stdin or terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "HOME": str(home), "LINES": "50", "COLUMNS": "160"},
    )
    os.close(terminal)
    screen, limit = b"", time.monotonic() + timeout
    while time.monotonic() < limit:
        if select.select([master], [], [], 0.2)[0]:
            try:
                screen += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    hung = process.poll() is None and time.monotonic() >= limit
    if hung:
        process.kill()
    code = process.wait()
    os.close(master)
    check(what, code == 0 and not hung, f"{'it hung; ' if hung else ''}exit code {code}\n{screen[-2000:]!r}")
    return screen


def commands(what, keys, mailbox="+INBOX", **options):
    """Opens a mailbox, presses keys, and quits."""
    return drive(what, "-f", mailbox, "-e", f"push {quoted(keys + '<quit>')}", **options)


def copies(path):
    """What NeoMutt has put into a Maildir, without the header fields that it adds there."""
    return {
        key: re.sub(rb"(?m)^(Content-Length|Lines): \d+\n", b"", raw)
        for key, (raw, _, _) in harness.maildir(path).items()
    }


messages = [harness.message(number) for number in range(COUNT)]
harness.deliver(user, messages)
with harness.imap(user) as imap:
    for name in ("Saved", "Sent", "Drafts"):
        imap.create(name)
stored = {message.id: message for message in harness.stored(user)}


def identity(number):
    return f"<{number}.1@{harness.DOMAIN}>"


def flags(name="INBOX"):
    return {message.id: message.flags for message in harness.stored(user, name)}


# Reading: every message is copied into a Maildir.
local = home / "copied"
commands(
    "it opens the mailbox and copies every message", f"<tag-pattern>~A<enter><tag-prefix><copy-message>{local}<enter>"
)
copied = copies(local)
same("all are there", sorted(copied), sorted(stored))
same("byte for byte", copied, {key: harness.lf(message.raw) for key, message in stored.items()})

# Flags.
commands(
    "it sets flags",
    "<tag-pattern>~m1-10<enter><tag-prefix><flag-message><untag-pattern>~A<enter>"
    "<tag-pattern>~m11-15<enter><tag-prefix><set-flag>r<untag-pattern>~A<enter><sync-mailbox>",
)
now = flags()
check(
    "they are on the server",
    all("\\Flagged" in now[identity(number)] for number in range(10))
    and all("\\Answered" in now[identity(number)] for number in range(10, 15))
    and "\\Flagged" not in now[identity(10)],
    now,
)

# Moving and deleting.
commands(
    "it saves messages to another mailbox",
    "<tag-pattern>~m21-30<enter><tag-prefix><save-message>=Saved<enter><sync-mailbox>",
)
same("they are in the other mailbox", sorted(flags("Saved")), sorted(identity(number) for number in range(20, 30)))
same(
    "byte for byte",
    {m.id: m.raw for m in harness.stored(user, "Saved")},
    {identity(number): stored[identity(number)].raw for number in range(20, 30)},
)
check("and no longer in the first", not any(identity(number) in flags() for number in range(20, 30)))
commands("it deletes messages", "<delete-pattern>~f sender4[0-4]<enter><sync-mailbox>")
check("they are gone", not any(identity(number) in flags() for number in range(40, 45)))
same("the others are not", len(flags()), COUNT - 15)
commands("it reads a message", "<jump>1<enter><display-message><exit>")
check("which is seen then", "\\Seen" in flags()[identity(0)])

# The caches have to be right when another client has changed the mailbox.
harness.deliver(user, [harness.message(COUNT)])
with harness.imap(user, "INBOX") as imap:
    imap.uid("STORE", str(stored[identity(1)].uid), "+FLAGS", "(\\Deleted)")
    imap.expunge()
again = home / "again"
commands(
    "it opens the mailbox again, with its caches", f"<tag-pattern>~A<enter><tag-prefix><copy-message>{again}<enter>"
)
same(
    "what it copies now is byte for byte what is there",
    copies(again),
    {message.id: harness.lf(message.raw) for message in harness.stored(user)},
)

# =b asks the server to search.
found = home / "found"
commands(
    "it searches on the server",
    f'<tag-pattern>=b "dots at the beginning"<enter><tag-prefix><copy-message>{found}<enter>',
)
same(
    "what it finds has the words in its body",
    sorted(copies(found)),
    sorted(message.id for message in harness.stored(user) if b".dots at the beginning" in message.raw),
)

# A message that is written here: a copy of it goes to the server, and with SMTP it is delivered.
(home / "body").write_text("Written in NeoMutt.\n.\nGrüße\n")
before = len(harness.stored(user))
commands("it sends a message", f"<mail>{user}<enter>From NeoMutt<enter><send-message>")
sent = harness.stored(user, "Sent")
check(
    "a copy of it is in Sent, and seen",
    len(sent) == 1 and b"Subject: From NeoMutt" in sent[0].raw and "\\Seen" in sent[0].flags,
    [message.raw for message in sent],
)
commands("it postpones a message", f"<mail>{user}<enter>Later<enter><postpone-message>")
drafts = harness.stored(user, "Drafts")
check("it is in Drafts", len(drafts) == 1 and b"Subject: Later" in drafts[0].raw, [message.raw for message in drafts])
arrived = harness.stored(user)
check(
    "it has arrived",
    len(arrived) == before + 1
    and b"Subject: From NeoMutt" in arrived[-1].raw
    and b"Gr\xc3\xbc\xc3\x9fe" in arrived[-1].raw,
    arrived[-1].raw,
)

# -Z opens the first mailbox with new mail, and ends with 1 if there is none.
drive("-Z: there is new mail", "-Z", "-e", "mailboxes +INBOX +Saved", "-e", "push <quit>")
harness.end()
