"""Python's own imaplib, poplib and smtplib (SMTP and LMTP)."""

import imaplib
import poplib
import smtplib
import sys
import time

from . import harness
from .harness import check, same

harness.begin("python", f"imaplib, poplib, smtplib of Python {sys.version.split()[0]}")
user = harness.user()
other = harness.user("python-other")
nobody = f"nobody@{harness.DOMAIN}"
SENDER = "sender@sender.test"


def refusal(error_type, action, *arguments, **options):
    """What an action is refused with."""
    try:
        return f"not refused: {action(*arguments, **options)}"
    except error_type as error:
        return error


def new_messages(name, mailbox="INBOX"):
    """What has come into a mailbox since it was last asked for."""
    known = seen.setdefault((name, mailbox), set())
    found = [message for message in harness.stored(name, mailbox) if message.uid not in known]
    known.update(message.uid for message in found)
    return found


seen = {}


def delivered(what, name, sent):
    found = new_messages(name)
    same(f"{what}: {name} has it", [message.id for message in found], [harness.message_id(raw) for raw in sent])
    check(
        f"{what}: the octets are those that were sent",
        all(message.raw.endswith(raw) for message, raw in zip(found, sent)),
    )


def lmtp():
    where = harness.where("lmtp")
    return smtplib.LMTP(where.host, where.port, local_hostname="client.test")


# LMTP. smtplib takes only the first of the replies after DATA, so several recipients are spoken by hand.
client = lmtp()
client.ehlo_or_helo_if_needed()
same(
    "LMTP extensions",
    {"8bitmime", "pipelining", "size", "enhancedstatuscodes", "smtputf8"} - set(client.esmtp_features),
    set(),
)
client.sendmail(SENDER, [user], harness.message(1), mail_options=["BODY=8BITMIME"])
delivered("LMTP", user, [harness.message(1)])
same("LMTP: MAIL", client.mail(SENDER)[0], 250)
same("LMTP: RCPT, one of three unknown", [client.rcpt(name)[0] for name in (user, nobody, other)], [250, 550, 250])
same("LMTP: DATA", client.docmd("DATA")[0], 354)
client.send(harness.message(3) + b".\r\n")
same("LMTP: a reply for each recipient that was taken", [client.getreply()[0] for _ in range(2)], [250, 250])
for name in (user, other):
    delivered("LMTP, two recipients", name, [harness.message(3)])
unknown = refusal(smtplib.SMTPRecipientsRefused, client.sendmail, SENDER, [nobody], harness.message(1))
check(
    "LMTP: a message for nobody is refused, with 550 5.1.1",
    "not refused" not in str(unknown)
    and unknown.recipients[nobody][0] == 550
    and unknown.recipients[nobody][1].startswith(b"5.1.1"),
    unknown,
)
client.sendmail("", [f"python+detail@{harness.DOMAIN}"], harness.message(4))
delivered("LMTP, a bounce to an address with a detail", user, [harness.message(4)])
client.sendmail(SENDER, [f"PYTHON@{harness.DOMAIN.upper()}"], harness.message(5))
delivered("LMTP, an address in capitals", user, [harness.message(5)])
same("LMTP: RSET, NOOP, VRFY", (client.rset()[0], client.noop()[0], client.verify(user)[0]), (250, 250, 252))
client.quit()
client = smtplib.LMTP(harness.SERVICES["lmtp-unix"].path, local_hostname="client.test")
client.sendmail(SENDER, [user], harness.message(2))
client.quit()
delivered("LMTP by a Unix socket", user, [harness.message(2)])


# SMTP.
def send_by_smtp(what, client, number):
    client.sendmail(SENDER, [user, other], harness.message(number), mail_options=["BODY=8BITMIME"])
    for name in (user, other):
        delivered(what, name, [harness.message(number)])
    check(
        f"{what}: a message for nobody is refused",
        "not refused"
        not in str(refusal(smtplib.SMTPRecipientsRefused, client.sendmail, SENDER, [nobody], harness.message(number))),
    )
    same(
        f"{what}: only the unknown recipient is refused",
        {name: code for name, (code, _) in client.sendmail(SENDER, [nobody, user], harness.message(number)).items()},
        {nobody: 550},
    )
    client.quit()
    new_messages(user)


where = harness.where("smtp")
send_by_smtp("SMTP", smtplib.SMTP(where.host, where.port, local_hostname="client.test"), 8)
client = smtplib.SMTP("localhost", where.port, local_hostname="client.test")
same("SMTP: STARTTLS", client.starttls(context=harness.tls_context())[0], 220)
client.ehlo()
check("SMTP: STARTTLS is not offered twice", not client.has_extn("starttls"))
send_by_smtp("SMTP with STARTTLS", client, 9)
where = harness.where("smtps")
send_by_smtp(
    "SMTPS",
    smtplib.SMTP_SSL("localhost", where.port, local_hostname="client.test", context=harness.tls_context()),
    10,
)


# imaplib.
def use_imap(what, connect, number):
    client = connect()
    wrong = refusal(imaplib.IMAP4.error, client.login, user, "wrong")
    check(f"{what}: a wrong password is refused", "AUTHENTICATIONFAILED" in str(wrong), wrong)
    client.authenticate("PLAIN", lambda _: f"\0{user}\0{harness.PASSWORD}".encode())
    same(f"{what}: AUTHENTICATE PLAIN", client.state, "AUTH")
    check(
        f"{what}: CAPABILITY",
        {"IMAP4REV1", "IDLE", "UIDPLUS", "MOVE", "CONDSTORE"} <= set(client.capabilities)
        or {"IMAP4rev1", "IDLE", "UIDPLUS", "MOVE", "CONDSTORE"} <= set(client.capability()[1][0].decode().split()),
        client.capabilities,
    )
    same(f"{what}: ENABLE", client._simple_command("ENABLE", "CONDSTORE")[0], "OK")
    box = f"Python {number}"
    same(
        f"{what}: CREATE, SUBSCRIBE, LSUB",
        (
            client.create(f'"{box}"')[0],
            client.subscribe(f'"{box}"')[0],
            any(f'"/" "{box}"'.encode() in line for line in client.lsub()[1]),
        ),
        ("OK", "OK", True),
    )
    same(f"{what}: SELECT of an empty mailbox", client.select(f'"{box}"'), ("OK", [b"0"]))
    same(
        f"{what}: FETCH and SEARCH of all of nothing",
        (client.uid("FETCH", "1:*", "(FLAGS)"), client.search(None, "ALL")),
        (("OK", [None]), ("OK", [b""])),
    )
    raw = [harness.message(at, seed=number) for at in range(20)]
    for message in raw:
        ok, data = client.append(f'"{box}"', "(\\Draft $Work)", imaplib.Time2Internaldate(1_700_000_000), message)
        if ok != "OK" or b"APPENDUID" not in data[0]:
            check(f"{what}: APPEND", False, data)
    same(f"{what}: the mailbox has grown", (client.noop()[0], client.response("EXISTS")[1][-1]), ("OK", b"20"))
    ok, data = client.fetch("1:*", "(UID FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])")
    items = [item for item in data if isinstance(item, tuple)]
    same(f"{what}: APPEND keeps every octet", [item[1] for item in items], raw)
    check(
        f"{what}: APPEND keeps date and flags",
        all(
            b"\\Draft" in item[0]
            and b"$Work" in item[0]
            and b"RFC822.SIZE %d " % len(message) in item[0] + b" "
            and time.mktime(imaplib.Internaldate2tuple(item[0])) == 1_700_000_000
            for item, message in zip(items, raw)
        ),
        items[:2],
    )
    ok, data = client.fetch(
        "2", "(BODY.PEEK[HEADER] BODY.PEEK[TEXT] BODY.PEEK[HEADER.FIELDS (SUBJECT)] BODY.PEEK[]<5.10>)"
    )
    parts = [item[1] for item in data if isinstance(item, tuple)]
    same(f"{what}: sections", (parts[0] + parts[1], parts[2][:8], parts[3]), (raw[1], b"Subject:", raw[1][5:15]))
    same(
        f"{what}: SEARCH",
        client.search(None, "KEYWORD", "$Work", "UNSEEN", "3:5", "SINCE", "1-Jan-2023")[1],
        [b"3 4 5"],
    )
    missing = client.append("Nowhere", None, None, raw[0])
    check(
        f"{what}: APPEND to a mailbox that is not there: TRYCREATE",
        missing[0] == "NO" and b"TRYCREATE" in missing[1][0],
        missing,
    )
    same(f"{what}: COPY", client.copy("1:2", f'"{box}"')[0], "OK")
    same(f"{what}: UID MOVE", client.uid("MOVE", "3:4", "INBOX")[0], "OK")
    same(f"{what}: STORE", client.store("1:3", "+FLAGS", "\\Deleted")[0], "OK")
    client.response("EXPUNGE")
    same(f"{what}: EXPUNGE", client.expunge(), ("OK", [b"1", b"1", b"1"]))
    same(
        f"{what}: STATUS",
        client.status(f'"{box}"', "(MESSAGES UIDNEXT)")[1],
        [f'"{box}" (MESSAGES 17 UIDNEXT 23)'.encode()],
    )
    same(
        f"{what}: CLOSE, RENAME, DELETE",
        (client.close()[0], client.rename(f'"{box}"', f'"{box} b"')[0], client.delete(f'"{box} b"')[0]),
        ("OK", "OK", "OK"),
    )
    same(f"{what}: LOGOUT", client.logout()[0], "BYE")
    same(f"{what}: what was moved has arrived", [message.raw for message in new_messages(user)], raw[2:4])


def imap_starttls():
    client = imaplib.IMAP4("localhost", harness.where("imap").port)
    client.starttls(harness.tls_context())
    check("IMAP: STARTTLS is not offered twice", "STARTTLS" not in client.capabilities)
    return client


use_imap("IMAP", lambda: imaplib.IMAP4(harness.where("imap").host, harness.where("imap").port), 20)
use_imap("IMAP with STARTTLS", imap_starttls, 21)
use_imap(
    "IMAPS",
    lambda: imaplib.IMAP4_SSL("localhost", harness.where("imaps").port, ssl_context=harness.tls_context()),
    22,
)


# poplib.
def use_pop(what, connect):
    client = connect()
    client.user(user)
    wrong = refusal(poplib.error_proto, client.pass_, "wrong")
    check(f"{what}: a wrong password is refused", "-ERR" in str(wrong), wrong)
    client.close()
    client = connect()
    check(f"{what}: CAPA", {"UIDL", "TOP", "USER"} <= set(client.capa()), client.capa())
    client.user(user)
    client.pass_(harness.PASSWORD)
    messages = harness.stored(user)
    second = connect()
    second.user(user)
    in_use = refusal(poplib.error_proto, second.pass_, harness.PASSWORD)
    check(f"{what}: a second session at the same time is told [IN-USE]", "[IN-USE]" in str(in_use), in_use)
    second.close()
    count, size = client.stat()
    same(f"{what}: STAT", (count, size), (len(messages), sum(len(message.raw) for message in messages)))
    sizes = [int(line.split()[1]) for line in client.list()[1]]
    same(f"{what}: LIST has the size of each", sizes, [len(message.raw) for message in messages])
    ids = [line.split()[1] for line in client.uidl()[1]]
    check(
        f"{what}: UIDL has an id of its own for each",
        len(set(ids)) == count and all(0 < len(name) <= 70 for name in ids),
        ids,
    )
    # poplib takes the line ends away, and the dots that were stuffed.
    got = [b"".join(line + b"\r\n" for line in client.retr(number + 1)[1]) for number in range(count)]
    same(f"{what}: RETR gives every octet", got, [message.raw for message in messages])
    top = client.top(1, 0)[1]
    same(
        f"{what}: TOP gives the header",
        b"".join(line + b"\r\n" for line in top),
        messages[0].raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n",
    )
    same(f"{what}: DELE and RSET", (client.dele(1)[:3], client.rset()[:3], client.stat()[0]), (b"+OK", b"+OK", count))
    client.dele(1)
    gone = refusal(poplib.error_proto, client.retr, 1)
    check(f"{what}: a message marked as deleted is not given out", "-ERR" in str(gone), gone)
    check(f"{what}: NOOP", client.noop().startswith(b"+OK"))
    client.close()
    same(f"{what}: without QUIT nothing is deleted", len(harness.stored(user)), count)
    client = connect()
    client.user(user)
    client.pass_(harness.PASSWORD)
    same(f"{what}: UIDs stay", [line.split()[1] for line in client.uidl()[1]], ids)
    client.retr(2)
    client.dele(1)
    client.quit()
    left = harness.stored(user)
    same(f"{what}: QUIT deletes", [message.uid for message in left], [message.uid for message in messages[1:]])
    check(f"{what}: what was retrieved is seen", "\\Seen" in left[0].flags, left[0].flags)


def pop_starttls():
    client = poplib.POP3("localhost", harness.where("pop3").port)
    client.stls(harness.tls_context())
    return client


use_pop("POP3", lambda: poplib.POP3(harness.where("pop3").host, harness.where("pop3").port))
use_pop("POP3 with STLS", pop_starttls)
use_pop("POP3S", lambda: poplib.POP3_SSL("localhost", harness.where("pop3s").port, context=harness.tls_context()))
harness.end()
