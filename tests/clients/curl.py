"""curl: IMAP, POP3 and SMTP, in the clear, with STARTTLS and by TLS from the beginning."""

import urllib.parse

from . import harness
from .harness import check, same

curl = harness.tool("curl")
harness.begin("curl", " ".join(harness.run([curl, "--version"]).stdout.split()[:2]))
user = harness.user()
other = harness.user("curl-other")
home = harness.directory()
(home / "netrc").write_text(
    f'machine localhost login {user} password "{harness.PASSWORD}"\n'
    f'machine 127.0.0.1 login {user} password "{harness.PASSWORD}"\n'
)


def ask(url, *options):
    """What a request gives, as octets."""
    return harness.run(
        [curl, "--silent", "--show-error", "--max-time", "20", "--netrc-file", home / "netrc", *options, url],
        text=False,
    )


def base(service, scheme=None):
    where = harness.where(service)
    return f"{scheme or service}://localhost:{where.port}"


def tls(service):
    return ["--cacert", harness.CERTIFICATE] if service.endswith("s") else []


STARTTLS = ["--ssl-reqd", "--cacert", harness.CERTIFICATE]


def use_imap(what, service, options):
    got = ask(base(service) + "/", *options)
    check(f"{what}: LIST", got.returncode == 0 and b'"/" INBOX\r\n' in got.stdout, got.stdout)
    messages = harness.stored(user)
    got = [ask(f"{base(service)}/INBOX;UID={message.uid}", *options).stdout for message in messages]
    same(f"{what}: each message is got byte for byte", got, [message.raw for message in messages])
    got = ask(f"{base(service)}/INBOX;MAILINDEX=2;SECTION=HEADER", *options).stdout
    same(f"{what}: a section of a message", got, messages[1].raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
    got = ask(f"{base(service)}/INBOX?{urllib.parse.quote('UNSEEN 1:3')}", *options)
    check(f"{what}: SEARCH", got.stdout.startswith(b"* SEARCH"), got.stdout)
    got = ask(f"{base(service)}/INBOX", *options, "--request", "STORE 1 +FLAGS (\\Flagged)")
    check(f"{what}: STORE", got.returncode == 0 and b"\\Flagged" in got.stdout, got.stdout)
    (home / "upload").write_bytes(harness.message(3, seed=2))
    got = ask(f"{base(service)}/INBOX", *options, "--upload-file", home / "upload")
    check(f"{what}: APPEND", got.returncode == 0, got.stdout)
    same(f"{what}: what was uploaded is there, byte for byte", harness.stored(user)[-1].raw, harness.message(3, seed=2))
    got = ask(
        f"{base(service)}/INBOX", *options, "--login-options", "AUTH=PLAIN", "--request", "STATUS INBOX (MESSAGES)"
    )
    check(f"{what}: AUTHENTICATE PLAIN, STATUS", b"MESSAGES %d)" % (len(messages) + 1) in got.stdout, got.stdout)
    got = ask(f"{base(service)}/INBOX", *options, "--user", f"{user}:wrong")
    same(f"{what}: a wrong password is refused (67)", got.returncode, 67)
    got = ask(f"{base(service)}/Nowhere;UID=1", *options)
    same(f"{what}: no such mailbox (67)", got.returncode, 67)
    got = ask(f"{base(service)}/INBOX;UID=99999", *options)
    same(f"{what}: no such message (78)", got.returncode, 78)


harness.deliver(user, [harness.message(number) for number in range(10)])
use_imap("imap", "imap", [])
use_imap("imap with STARTTLS", "imap", STARTTLS)
use_imap("imaps", "imaps", tls("imaps"))
for version in ("1.2", "1.3"):
    got = ask(base("imaps") + "/", *tls("imaps"), f"--tlsv{version}", "--tls-max", version, "--verbose")
    check(
        f"imaps: TLS {version}",
        got.returncode == 0 and f"SSL connection using TLSv{version}".encode() in got.stdout,
        got.stdout,
    )
same("imaps: a certificate that is not trusted is not taken (60)", ask(base("imaps") + "/").returncode, 60)


def use_pop(what, service, options):
    messages = harness.stored(user)
    got = ask(base(service) + "/", *options)
    same(
        f"{what}: LIST",
        got.stdout.decode().split(),
        [text for number, message in enumerate(messages) for text in (str(number + 1), str(len(message.raw)))],
    )
    got = [ask(f"{base(service)}/{number + 1}", *options).stdout for number in range(len(messages))]
    same(f"{what}: each message is got byte for byte", got, [message.raw for message in messages])
    got = ask(f"{base(service)}/1", *options, "--login-options", "AUTH=PLAIN")
    same(f"{what}: AUTH PLAIN", got.stdout, messages[0].raw)
    got = ask(base(service) + "/", *options, "--request", "UIDL")
    same(f"{what}: UIDL", len(got.stdout.splitlines()), len(messages))
    got = ask(f"{base(service)}/1", *options, "--request", "DELE", "--head")
    same(
        f"{what}: DELE",
        (got.returncode, [message.uid for message in harness.stored(user)]),
        (0, [message.uid for message in messages[1:]]),
    )
    got = ask(base(service) + "/", *options, "--user", f"{user}:wrong")
    same(f"{what}: a wrong password is refused (67)", got.returncode, 67)


use_pop("pop3", "pop3", [])
use_pop("pop3 with STLS", "pop3", STARTTLS)
use_pop("pop3s", "pop3s", tls("pop3s"))


def use_smtp(what, service, options, number):
    raw = harness.message(number, seed=4)
    (home / "mail").write_bytes(raw)
    got = ask(
        base(service) + "/client.test",
        *options,
        "--mail-from",
        "sender@sender.test",
        "--mail-rcpt",
        user,
        "--mail-rcpt",
        other,
        "--upload-file",
        home / "mail",
    )
    check(f"{what}: a message for two", got.returncode == 0, got.stdout)
    for name in (user, other):
        check(f"{what}: {name} has it, byte for byte", harness.stored(name)[-1].raw.endswith(raw))
    got = ask(
        base(service) + "/client.test",
        *options,
        "--mail-from",
        "sender@sender.test",
        "--mail-rcpt",
        f"nobody@{harness.DOMAIN}",
        "--upload-file",
        home / "mail",
    )
    same(f"{what}: an unknown recipient is refused (55)", got.returncode, 55)


# No account is needed to deliver: curl must not look into the netrc file.
use_smtp("smtp", "smtp", ["--netrc-file", "/dev/null"], 1)
use_smtp("smtp with STARTTLS", "smtp", ["--netrc-file", "/dev/null", *STARTTLS], 2)
use_smtp("smtps", "smtps", ["--netrc-file", "/dev/null", *tls("smtps")], 3)
harness.end()
