"""swaks: LMTP and SMTP with pipelining and TLS, transaction by transaction."""

import re

from . import harness
from .harness import check, same

swaks = harness.tool("swaks")
harness.begin("swaks", harness.run([swaks, "--version"]).stdout.splitlines()[0])
user = harness.user()
other = harness.user("swaks-other")
nobody = f"nobody@{harness.DOMAIN}"
file = harness.directory() / "mail"


def server(service):
    if service == "lmtp-unix":
        return ["--protocol", "LMTP", "--socket", harness.SERVICES[service].path]
    where = harness.where(service)
    protocol = {"lmtp": "LMTP", "smtp": "ESMTP", "smtps": "ESMTP"}[service]
    return ["--protocol", protocol, "--server", "localhost", "--port", where.port]


def swak(service, *options):
    return harness.run(
        [swaks, *server(service), "--helo", "client.test", "--from", "sender@sender.test", "--timeout", "20", *options]
    )


def transaction(what, service, number, *options):
    """A message for two and for one that is not known: this one is refused, the others have it."""
    raw = harness.message(number, seed=5)
    # swaks ends the last line by itself.
    file.write_bytes(harness.lf(raw).removesuffix(b"\n"))
    before = {name: len(harness.stored(name)) for name in (user, other)}
    result = swak(service, "--to", f"{user},{nobody},{other}", "--data", f"@{file}", *options)
    text = result.stdout
    # 26: some recipients were refused.
    check(f"{what}: the transaction", result.returncode in (0, 26) and "250 2.1.5" in text, text)
    check(
        f"{what}: the unknown recipient is refused with 550 5.1.1",
        re.search(r"^<(~|\*)\*? *550 5\.1\.1", text, re.M),
        text,
    )
    for name in (user, other):
        stored = harness.stored(name)
        same(f"{what}: {name} has one more", len(stored), before[name] + 1)
        same(f"{what}: it is byte for byte what was sent", stored[-1].raw[-len(raw) :], raw)
        received = re.search(rb"(?im)^Received: [^\r]*(?:\r\n[ \t][^\r]*)*", stored[-1].raw)
        protocol = f"{'LMTP' if service.startswith('lmtp') else 'ESMTP'}{'S' if '--tls' in str(options) else ''}"
        check(
            f"{what}: the Received field says with {protocol}",
            received and f" with {protocol}".encode() in received.group() and b"client.test" in received.group(),
            received,
        )
    return text


# Each transaction has a message of another kind; one without a body does not get through swaks as it is.
numbers = (number for number in range(100) if number % 8 != 6)
for what, service, options in (
    ("LMTP", "lmtp", ()),
    ("LMTP by a Unix socket", "lmtp-unix", ()),
    ("LMTP, pipelined", "lmtp", ("--pipeline",)),
    ("SMTP", "smtp", ()),
    ("SMTP, pipelined", "smtp", ("--pipeline",)),
    ("SMTP with STARTTLS", "smtp", ("--tls", "--tls-verify", "--tls-ca-path", harness.CERTIFICATE)),
    ("SMTP with STARTTLS, pipelined", "smtp", ("--tls", "--pipeline")),
    ("SMTPS", "smtps", ("--tls-on-connect", "--tls-verify", "--tls-ca-path", harness.CERTIFICATE)),
    ("SMTP with TLS 1.2", "smtp", ("--tls", "--tls-protocol", "tlsv1_2")),
):
    transaction(what, service, next(numbers), *options)

for service, hello in (("lmtp", "LHLO"), ("smtp", "EHLO")):
    result = swak(service, "--quit-after", "helo")
    extensions = set(re.findall(r"^<-  250[- ](\S+)", result.stdout, re.M))
    check(
        f"{hello}: extensions",
        {"PIPELINING", "SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8"} <= extensions,
        result.stdout,
    )
    result = swak(service, "--to", nobody, "--quit-after", "rcpt")
    same(f"{service}: a message for nobody (24)", result.returncode, 24)
    result = swak(service, "--to", "not an address", "--quit-after", "rcpt")
    check(
        f"{service}: a path that is none is refused with 501 or 553",
        re.search(r"^<\*\* (501|553) 5", result.stdout, re.M),
        result.stdout,
    )
    result = swak(service, "--to", user, "--ehlo", "[127.0.0.1]", "--from", "<>", "--header", "Subject: a bounce")
    check(f"{service}: from the null path, with an address literal", result.returncode == 0, result.stdout)
    check(f"{service}: it is stored", b"Subject: a bounce" in harness.stored(user)[-1].raw)
harness.end()
