"""Postfix, an instance of its own, delivering by LMTP (with STARTTLS over TCP, and over a Unix socket) and by SMTP: to
several recipients, with one that does not exist, to a server that does not answer."""

import email
import email.policy
import os
import re
import smtplib
import socket
import subprocess

from . import harness
from .harness import check, same

postfix = harness.tool("postfix")
postconf = harness.tool("postconf")
harness.begin("postfix", "Postfix " + harness.run([postconf, "-dh", "mail_version"]).stdout.strip())
if os.geteuid() != 0:
    check("Postfix can be started: that takes root", False)
    harness.end()
sender = harness.user("postfix-sender")
users = [harness.user(f"postfix-{number}") for number in range(3)]
by_smtp = harness.user("postfix-smtp")
nobody = f"postfix-nobody@{harness.DOMAIN}"
home = harness.directory()
config, queue, data = (harness.directory(name) for name in ("config", "queue", "data"))
os.chmod(home, 0o755)
log = home / "log"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


port, closed_port = free_port(), free_port()
lmtp, smtp = harness.where("lmtp"), harness.where("smtp")
os.chmod(harness.SERVICES["lmtp-unix"].path, 0o666)
daemons = harness.run([postconf, "-dh", "daemon_directory"]).stdout.strip()
(config / "main.cf").write_text(f"""
compatibility_level = 3.6
queue_directory = {queue}
data_directory = {data}
daemon_directory = {daemons}
maillog_file = {log}
maillog_file_prefixes = {home}
myhostname = relay.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
alias_maps =
alias_database =
relay_domains = {harness.DOMAIN}, sockets.test, away.test
smtpd_relay_restrictions = permit_mynetworks, reject
transport_maps = inline:{{
  {{ {by_smtp} = smtp:[localhost]:{smtp.port} }},
  {{ {harness.DOMAIN} = lmtp-tls:inet:[{lmtp.host}]:{lmtp.port} }},
  {{ sockets.test = lmtp:unix:{harness.SERVICES["lmtp-unix"].path} }},
  {{ away.test = lmtp:inet:[127.0.0.1]:{closed_port} }} }}
virtual_alias_maps = inline:{{ {{ someone@sockets.test = {users[2]} }} }}
lmtp_destination_recipient_limit = 50
smtp_host_lookup = native
smtp_tls_security_level = verify
smtp_tls_verify_cert_match = hostname
smtp_tls_CAfile = {harness.CERTIFICATE}
smtp_tls_loglevel = 1
message_size_limit = 20000000
""")
(config / "master.cf").write_text(f"""
127.0.0.1:{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
lmtp unix - - n - - lmtp
lmtp-tls unix - - n - - lmtp -o lmtp_tls_security_level=encrypt
smtp unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
showq unix n - n - - showq
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
tlsmgr unix - - n 1000? 1 tlsmgr
postlog unix-dgram n - n - 1 postlogd
""")
subprocess.run(["chown", "postfix", data], check=True)


def logged():
    return log.read_text(errors="replace") if log.exists() else ""


def queued():
    listed = harness.run([harness.tool("postqueue"), "-c", config, "-j"]).stdout
    return [line for line in listed.splitlines() if line.startswith("{")]


def send_quietly(recipients, raw):
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.test", timeout=30) as client:
        return client.sendmail(sender, recipients, raw, mail_options=["BODY=8BITMIME"])


def send(what, recipients, raw):
    same(f"{what}: Postfix takes the message", send_quietly(recipients, raw), {})


def arrived(what, name, raws):
    """Messages are on the way: waits for them, then compares."""
    if harness.wait_until(f"{what}: {name} has {len(raws)}", lambda: len(harness.stored(name)) >= len(raws)):
        found = {message.id: message.raw for message in harness.stored(name)}
        same(
            f"{what}: {name} has what was sent, byte for byte",
            {
                key: raw[-len(body) :]
                for (key, raw), body in zip(sorted(found.items()), sorted(raws, key=harness.message_id))
            },
            {harness.message_id(body): body for body in raws},
        )


def scenarios():
    sent = [harness.message(number, seed=6) for number in range(12)]
    for raw in sent[:10]:
        send_quietly(users, raw)
    for name in users:
        arrived("three recipients", name, sent[:10])
    replies = re.findall(
        r"to=<(postfix-\d)@\S+>.*relay=\S+\[127.0.0.1\]:\d+, .*dsn=(\S+), status=(\w+) \((\d+ \S+)", logged()
    )
    check(
        "each was delivered with a reply of its own",
        len(replies) == 30 and set(reply[1:] for reply in replies) == {("2.0.0", "sent", "250 2.0.0")},
        set(reply[1:] for reply in replies),
    )

    send("one unknown", [users[0], nobody, users[1]], sent[10])
    for name in users[:2]:
        arrived("one unknown", name, sent[:11])
    if harness.wait_until("the sender gets a bounce", lambda: harness.stored(sender)):
        bounce = email.message_from_bytes(harness.stored(sender)[0].raw, policy=email.policy.default)
        report = bounce.get_payload()[1].as_string() if bounce.is_multipart() else ""
        check(
            "the bounce names the unknown recipient, and no other",
            bounce.get_content_type() == "multipart/report"
            and re.findall(r"Final-Recipient: rfc822; *(\S+)", report) == [nobody]
            and "Status: 5.1.1" in report
            and "Action: failed" in report,
            harness.stored(sender)[0].raw,
        )
        same("the bounce is from the null path", bounce["Return-Path"], "<>")
    check("Postfix sees a lasting failure", re.search(rf"to=<{nobody}>.*dsn=5.1.1, status=bounced", logged()))

    send("by a Unix socket", ["someone@sockets.test"], sent[11])
    arrived("an alias", users[2], sent[:10] + sent[11:])
    send("by a Unix socket", ["nobody@sockets.test"], sent[11])
    harness.wait_until("an unknown recipient by a Unix socket bounces", lambda: len(harness.stored(sender)) == 2)

    many = [harness.message(number, seed=9) for number in range(20)]
    for raw in many:
        send_quietly([by_smtp], raw)
    arrived("by SMTP with STARTTLS, the certificate verified", by_smtp, many)
    check("Postfix has verified it", "Verified TLS connection established to localhost" in logged())
    check("the Received fields say with ESMTPS", all(b" with ESMTPS " in m.raw for m in harness.stored(by_smtp)))
    check("and those by LMTP say with LMTPS", all(b" with LMTPS " in m.raw for m in harness.stored(users[0])))

    big = harness.message(0, seed=7, length=150_000)
    send("ten megabytes", [users[0]], big)
    arrived("ten megabytes", users[0], [*sent[:11], big])

    send("a server that does not answer", ["someone@away.test"], sent[3])
    harness.wait_until("a server that does not answer: it is deferred", lambda: "status=deferred" in logged())
    same("a server that does not answer: it stays in the queue, the others have left", len(queued()), 1)

    # What arrives at once goes in several connections at a time.
    many = [harness.message(number, seed=8) for number in range(40)]
    for raw in many:
        send_quietly([users[1]], raw)
    arrived("forty in a row", users[1], sent[:11] + many)


harness.succeeds("it starts", [postfix, "-c", config, "start"])
try:
    if harness.wait_until("it listens", lambda: "daemon started" in logged()):
        scenarios()
finally:
    harness.succeeds("it stops", [postfix, "-c", config, "stop"])
    complaints = [line for line in logged().splitlines() if re.search(r"(warning|error|fatal|panic):", line)]
    same("Postfix complains of nothing", [line for line in complaints if "away.test" not in line], [])
harness.end()
