"""What every client's file uses: the server's addresses, accounts, mail to deliver, and the lines that say ok or FAIL.

`run.sh` starts the server and sets the environment. A file of a client is run as `python3 -m clients.NAME`, so that it
may have the name of the library that it drives.
"""

import contextlib
import imaplib
import mailbox
import os
import pathlib
import random
import re
import shutil
import signal
import smtplib
import ssl
import subprocess
import sys
import time
import traceback

SCRATCH = pathlib.Path(os.environ["CLIENTS_SCRATCH"])
POSTHASTE = os.environ["POSTHASTE"]
DATA = os.environ["CLIENTS_DATA"]
# One password for all: with characters that configuration files and shells tend to get wrong.
PASSWORD = "pa$$ w0rd'%+"
DOMAIN = "clients.test"

# imaplib refuses lines of more than 1 MB; a FETCH of a large literal is not one, but a SEARCH may be.
imaplib._MAXLINE = 10_000_000

_name = sys.argv[0].rsplit("/", 1)[-1].removesuffix(".py")
_results = {"passed": 0, "failed": 0}


class Address:
    """Where a service listens."""

    def __init__(self, text):
        self.text = text
        if text.startswith("unix:"):
            self.path = text.removeprefix("unix:")
        else:
            self.host, _, port = text.rpartition(":")
            self.port = int(port)


def _services():
    services = {}
    for item in os.environ["CLIENTS_SERVICES"].split():
        service, _, where = item.partition("=")
        services["lmtp-unix" if where.startswith("unix:") else service] = Address(where)
    return services


SERVICES = _services()


def where(service):
    return SERVICES[service]


def begin(name, version):
    """Says which client this is. The version is printed so that a report of a failure is worth something."""
    global _name
    _name = name
    print(f"== {name}: {version}", flush=True)


def check(what, good, detail=""):
    """One line of the result."""
    _results["passed" if good else "failed"] += 1
    print(f"{'ok  ' if good else 'FAIL'} {_name}: {what}", flush=True)
    if not good and detail != "":
        text = str(detail)
        print("     " + text[-600:].replace("\n", "\n     "), flush=True)
    return good


def same(what, got, expected):
    """As `check`, for two values that are to be equal: it says where they differ."""
    return check(what, got == expected, "" if got == expected else _difference(got, expected))


def _difference(got, expected):
    if isinstance(got, dict) and isinstance(expected, dict):
        lost = [key for key in expected if key not in got]
        more = [key for key in got if key not in expected]
        other = [key for key in got if key in expected and got[key] != expected[key]]
        text = f"{len(lost)} missing {lost[:3]}, {len(more)} too many {more[:3]}, {len(other)} different {other[:3]}"
        return text + (f"\n{_difference(got[other[0]], expected[other[0]])}" if other else "")
    if isinstance(got, bytes) and isinstance(expected, bytes):
        at = next((i for i, (a, b) in enumerate(zip(got, expected)) if a != b), min(len(got), len(expected)))
        start = max(0, at - 60)
        return (
            f"{len(got)} octets for {len(expected)}, from octet {at}:\n"
            f"got      {got[start:at + 60]!r}\nexpected {expected[start:at + 60]!r}"
        )
    if isinstance(got, tuple) and isinstance(expected, tuple) and len(got) == len(expected):
        return "; ".join(_difference(a, b) for a, b in zip(got, expected) if a != b)
    if isinstance(got, list) and isinstance(expected, list) and len(got) == len(expected) > 3:
        at = next(i for i, (a, b) in enumerate(zip(got, expected)) if a != b)
        return f"item {at}: {_difference(got[at], expected[at])}"
    return f"got      {got!r:.600}\nexpected {expected!r:.600}"


def end():
    """Ends the client's file: to be its last line."""
    with open(SCRATCH / "results", "a", encoding="ascii") as results:
        results.write(f"{_results['passed']} {_results['failed']}\n")
    sys.stdout.flush()
    # Not sys.exit(): an exception is not to be met by _died() again.
    os._exit(1 if _results["failed"] else 0)


def _died(*error):
    """What a file did not expect is a failure like others: what came before counts."""
    check("it ended as it should", False, "".join(traceback.format_exception(*error)))
    end()


sys.excepthook = _died
# run.sh ends what takes too long: what a file has started ends with it, by its `finally`.
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def directory(name=""):
    """A directory of the client's own, empty."""
    path = SCRATCH / _name / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def tool(name):
    """The path of a client's program. That it is not there is a failure: run.sh is told which clients to skip."""
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None:
        check(f"{name} is installed", False, "tests/clients/install.sh installs it")
        end()
    return path


def run(command, timeout=60, env=None, cwd=None, stdin="", text=True):
    """Runs a client's program to its end. Its output is in the result; a hang is a failure, not a wait."""
    environment = {**os.environ, "HOME": str(directory("home")), **(env or {})}
    command = [str(part) for part in command]
    stdin = stdin if text else (stdin or b"")
    try:
        return subprocess.run(
            command,
            timeout=timeout,
            env=environment,
            cwd=cwd,
            input=stdin,
            text=text,
            errors="replace" if text else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as hung:
        output = (hung.output or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, f"hung for {timeout} s; it said:\n{output}", None)


def succeeds(what, *arguments, **options):
    """A program that is to exit with 0; returns what it printed."""
    result = run(*arguments, **options)
    check(what, result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}")
    return result.stdout


def wait_until(what, condition, timeout=20):
    """For what no event tells: a short poll with a limit."""
    limit = time.monotonic() + timeout
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.02)
    check(what, False, f"not within {timeout} s")
    return False


# Accounts


def user(name=None, password=PASSWORD):
    """Makes an account on the running server and returns its address."""
    address = f"{name or _name}@{DOMAIN}"
    command = [POSTHASTE, "--data", DATA, "user", "add", address, "--password-stdin"]
    made = subprocess.run(command, input=password + "\n", text=True, capture_output=True, timeout=60)
    if made.returncode != 0:
        check(f"account {address} made", False, made.stdout + made.stderr)
        end()
    return address


# TLS


# The server's certificate, to be trusted by clients.
CERTIFICATE = os.environ["CLIENTS_CERTIFICATE"]


def tls_context():
    """Trusts the server's certificate and nothing else, and checks the name."""
    return ssl.create_default_context(cafile=CERTIFICATE)


# Mail


WORDS = """mailbox letter parcel envelope stamp postmark courier sorting counter delivery round address sender recipient
window seal ledger depot wagon rider station relay bundle satchel bell whistle dawn frost harbour river bridge""".split()


def message(number, seed=1, to=f"someone@{DOMAIN}", length=None):
    """A message with CRLF line ends, always the same for a number. Its Message-ID is `<NUMBER.SEED@clients.test>`."""
    dice = random.Random(f"{seed}/{number}")

    def prose(words):
        return " ".join(dice.choice(WORDS) for _ in range(words))

    kind = number % 8
    subject = prose(4)
    headers = [
        f'From: "{prose(1).title()}" <sender{number}@sender.test>',
        f"To: <{to}>",
        f"Date: {1 + number % 28} Oct 2025 {number % 24:02}:{number % 60:02}:00 +0{number % 10}00",
        f"Message-ID: <{number}.{seed}@{DOMAIN}>",
    ]
    lines = [prose(dice.randint(1, 12)) for _ in range(dice.randint(1, 30) if length is None else length)]
    if kind == 1:
        subject = f"=?UTF-8?Q?{prose(1)}_gr=C3=BC=C3=9Ft?= {number}"
        headers += ["MIME-Version: 1.0", "Content-Type: text/plain; charset=utf-8", "Content-Transfer-Encoding: 8bit"]
        lines.append("Grüße aus Köln, 東京 и Москвы.")
    elif kind == 2:
        lines += [".", "..", ".dots at the beginning", "From the beginning of a line"]
    elif kind == 3:
        boundary = f"=_{number}_{seed}"
        attachment = dice.randbytes(dice.randint(10, 6000)).hex()
        headers += ["MIME-Version: 1.0", f'Content-Type: multipart/mixed;\r\n\tboundary="{boundary}"']
        lines = [
            "This is MIME.",
            f"--{boundary}",
            "Content-Type: text/plain; charset=us-ascii",
            "",
            *lines,
            f"--{boundary}",
            'Content-Type: application/octet-stream; name="data.bin"',
            'Content-Disposition: attachment; filename="data.bin"',
            "Content-Transfer-Encoding: 7bit",
            "",
        ]
        lines += [attachment[at : at + 76] for at in range(0, len(attachment), 76)] + [f"--{boundary}--"]
    elif kind == 4:
        headers.append("X-Folded: " + "\r\n ".join(prose(5) for _ in range(5)))
        headers.append("References: " + "\r\n\t".join(f"<{n}.{seed}@{DOMAIN}>" for n in range(number, number + 5)))
    elif kind == 5:
        lines.append("long " * 180)
    elif kind == 6:
        lines = []
    elif kind == 7:
        lines += ["", "trailing spaces   ", "\ttab", "", ""]
    headers.insert(2, f"Subject: {subject}")
    return "\r\n".join(headers + ["", *lines, ""]).encode()


def message_id(raw):
    found = re.search(rb"(?im)^Message-ID:[ \t]*(\S+)", raw)
    return found.group(1).decode() if found else None


def deliver(recipient, messages, sender="sender@sender.test"):
    """Puts messages into a mailbox, by LMTP, as a mail transfer agent does. (smtplib takes one reply after DATA where LMTP
    has one for each recipient: so there is one recipient.)"""
    lmtp = smtplib.LMTP(where("lmtp").host, where("lmtp").port, local_hostname="client.test")
    for raw in messages:
        lmtp.sendmail(sender, [recipient], raw, mail_options=["BODY=8BITMIME"])
    lmtp.quit()


# The server's side, as a plain reader sees it


@contextlib.contextmanager
def imap(user_name, mailbox_name=None, read_only=False, password=PASSWORD):
    connection = imaplib.IMAP4(where("imap").host, where("imap").port)
    connection.login(user_name, password)
    if mailbox_name is not None:
        ok, data = connection.select(f'"{mailbox_name}"', readonly=read_only)
        if ok != "OK":
            raise RuntimeError(f"{mailbox_name}: {data}")
    try:
        yield connection
    finally:
        connection.logout()


class Stored:
    """A message in a mailbox of the server."""

    def __init__(self, uid, flags, raw, internal_date):
        self.uid, self.flags, self.raw, self.internal_date = uid, flags, raw, internal_date
        self.id = message_id(raw)

    def __repr__(self):
        return f"<{self.uid} {self.id}>"


def stored(user_name, mailbox_name="INBOX", password=PASSWORD):
    """All messages of a mailbox, in order of UID. Changes nothing."""
    with imap(user_name, mailbox_name, read_only=True, password=password) as connection:
        ok, data = connection.uid("FETCH", "1:*", "(FLAGS INTERNALDATE BODY.PEEK[])")
        if ok != "OK":
            raise RuntimeError(str(data))
    found = []
    for item in data:
        if not isinstance(item, tuple):
            continue
        uid = int(re.search(rb"UID (\d+)", item[0]).group(1))
        flags = set(re.search(rb"FLAGS \(([^)]*)\)", item[0]).group(1).decode().split()) - {"\\Recent"}
        date = re.search(rb'INTERNALDATE "([^"]*)"', item[0]).group(1).decode()
        found.append(Stored(uid, flags, item[1], date))
    return found


def mailboxes(user_name, password=PASSWORD):
    with imap(user_name, password=password) as connection:
        return sorted(re.search(rb'"/" "?(.*?)"?$', line).group(1).decode() for line in connection.list()[1])


# Maildirs


def maildir(path):
    """All messages of a Maildir: by Message-ID, octets (with LF line ends) and flags."""
    found = {}
    for sub in ("cur", "new"):
        for file in (pathlib.Path(path) / sub).iterdir() if (pathlib.Path(path) / sub).is_dir() else ():
            raw = file.read_bytes()
            flags = file.name.rpartition(":2,")[2] if ":2," in file.name else ""
            found[message_id(raw)] = (raw, flags, file)
    return found


def make_maildir(path):
    mailbox.Maildir(str(path), create=True)
    return pathlib.Path(path)


def add_to_maildir(path, raw, flags=""):
    """Puts a message where a local program would, with LF line ends."""
    box = mailbox.Maildir(str(path), create=True)
    entry = mailbox.MaildirMessage()
    entry.set_subdir("cur")
    entry.set_flags(flags)
    key = box.add(entry)
    file = pathlib.Path(path) / box._lookup(key)
    file.write_bytes(lf(raw))
    return file


def lf(raw):
    return raw.replace(b"\r\n", b"\n")


def crlf(raw):
    return lf(raw).replace(b"\n", b"\r\n")
