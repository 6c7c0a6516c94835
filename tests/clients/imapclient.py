"""IMAPClient: SEARCH, ENVELOPE and BODYSTRUCTURE as a library parses them, IDLE, MOVE, CONDSTORE."""

import datetime

# First, so that it tells of a library that is not installed.
from . import harness
from .harness import check, same

import imapclient
from imapclient import IMAPClient

harness.begin("imapclient", f"IMAPClient {imapclient.__version__}")
user = harness.user()
messages = [harness.message(number) for number in range(40)]
harness.deliver(user, messages)


def connect(service="imap"):
    where = harness.where(service)
    if service == "imaps":
        client = IMAPClient("localhost", where.port, ssl_context=harness.tls_context(), timeout=20)
    else:
        client = IMAPClient(where.host, where.port, ssl=False, timeout=20)
    client.login(user, harness.PASSWORD)
    return client


client = connect("imaps")
starttls = IMAPClient("localhost", harness.where("imap").port, ssl=False, timeout=20)
starttls.starttls(harness.tls_context())
starttls.login(user, harness.PASSWORD)
same("STARTTLS, then SELECT", starttls.select_folder("INBOX")[b"EXISTS"], 40)
starttls.logout()
same("NAMESPACE", client.namespace().personal, (("", "/"),))
check("ID", b"Posthaste" in str(client.id_({"name": "IMAPClient"})).encode())
check("capabilities", all(client.has_capability(name) for name in ("IDLE", "UIDPLUS", "MOVE", "CONDSTORE", "LITERAL+")))
same("ENABLE", client.enable("CONDSTORE"), [b"CONDSTORE"])
selected = client.select_folder("INBOX")
same(
    "SELECT: EXISTS, UIDNEXT, READ-WRITE",
    (selected[b"EXISTS"], selected[b"UIDNEXT"], selected[b"READ-WRITE"]),
    (40, 41, True),
)
check("SELECT: new keywords are allowed", b"\\*" in selected[b"PERMANENTFLAGS"], selected)

# What is known of a message.
data = client.fetch(range(1, 41), ["ENVELOPE", "BODYSTRUCTURE", "RFC822.SIZE", "INTERNALDATE", "FLAGS"])
same("FETCH answers for each UID", sorted(data), list(range(1, 41)))
envelope = data[4][b"ENVELOPE"]
same("ENVELOPE: From", (envelope.from_[0].mailbox, envelope.from_[0].host), (b"sender3", b"sender.test"))
same("ENVELOPE: Message-ID", envelope.message_id, f"<3.1@{harness.DOMAIN}>".encode())
same(
    "ENVELOPE: Date",
    envelope.date,
    datetime.datetime(2025, 10, 4, 3, 3)
    .replace(tzinfo=datetime.timezone(datetime.timedelta(hours=3)))
    .astimezone()
    .replace(tzinfo=None),
)
check("ENVELOPE: Subject stays encoded", data[2][b"ENVELOPE"].subject.startswith(b"=?UTF-8?Q?"), data[2][b"ENVELOPE"])
structure = data[4][b"BODYSTRUCTURE"]
check("BODYSTRUCTURE: multipart", structure.is_multipart and structure[1] == b"mixed", structure)
text, attachment = structure[0]
same(
    "BODYSTRUCTURE: its parts",
    (text[:2], attachment[:2], attachment[2]),
    ((b"text", b"plain"), (b"application", b"octet-stream"), (b"name", b"data.bin")),
)
part = client.fetch(4, ["BODY.PEEK[2]", "BODY.PEEK[1.MIME]", "BODY.PEEK[HEADER]"])[4]
same("BODYSTRUCTURE: the size of a part is that of BODY[2]", attachment[6], len(part[b"BODY[2]"]))
check("BODY[1.MIME]", part[b"BODY[1.MIME]"].startswith(b"Content-Type: text/plain"), part[b"BODY[1.MIME]"])
bodies = client.fetch(range(1, 41), ["BODY.PEEK[]", "RFC822.SIZE"])
check(
    "BODY[] ends with what was sent",
    all(bodies[number + 1][b"BODY[]"].endswith(raw) for number, raw in enumerate(messages)),
)
check(
    "RFC822.SIZE is the size of BODY[]", all(item[b"RFC822.SIZE"] == len(item[b"BODY[]"]) for item in bodies.values())
)

# Flags and SEARCH.
answer = client.add_flags([1, 2, 3], [b"\\Seen", b"$Important"])
same(
    "STORE answers with the flags",
    {uid: set(flags) - {b"\\Recent"} for uid, flags in answer.items()},
    {uid: {b"\\Seen", b"$Important"} for uid in (1, 2, 3)},
)
client.set_flags(4, [b"\\Flagged"])
today = datetime.date.today()
for criteria, expected in (
    (["SEEN"], [1, 2, 3]),
    (["FLAGGED"], [4]),
    (["KEYWORD", "$Important", "NOT", "UID", "2"], [1, 3]),
    (["OR", "UID", "7", "UID", "9"], [7, 9]),
    (["SINCE", today - datetime.timedelta(days=2), "UID", "1:3"], [1, 2, 3]),
    (["BEFORE", today - datetime.timedelta(days=2)], []),
    (["SENTON", datetime.date(2025, 10, 4)], [4, 32]),
    (["LARGER", 3000], [uid for uid, item in bodies.items() if item[b"RFC822.SIZE"] > 3000]),
):
    same(f"SEARCH {criteria}", list(client.search(criteria)), expected)
for criteria, expected in (
    (["SUBJECT", "Grüßt"], [uid for uid in range(1, 41) if uid % 8 == 2]),
    (["FROM", "sender17@"], [18]),
    (["BODY", "東京"], [uid for uid in range(1, 41) if uid % 8 == 2]),
    (["HEADER", "Message-ID", f"<11.1@{harness.DOMAIN}>"], [12]),
    (["TEXT", "dots at the beginning"], [uid for uid in range(1, 41) if uid % 8 == 3]),
):
    try:
        same(f"SEARCH {criteria}", list(client.search(criteria, "UTF-8")), expected)
    except IMAPClient.Error as error:
        check(f"SEARCH {criteria}", False, error)

# CONDSTORE.
status = client.folder_status("INBOX", ["HIGHESTMODSEQ", "MESSAGES", "UNSEEN"])
same("STATUS", (status[b"MESSAGES"], status[b"UNSEEN"]), (40, 37))
highest = status[b"HIGHESTMODSEQ"]
client.add_flags(9, [b"\\Answered"])
changed = client.fetch(range(1, 41), ["FLAGS"], [f"CHANGEDSINCE {highest}"])
same(
    "FETCH CHANGEDSINCE has what changed",
    {uid: set(item[b"FLAGS"]) - {b"\\Recent"} for uid, item in changed.items()},
    {9: {b"\\Answered"}},
)
check("FETCH CHANGEDSINCE: the mod-sequence is higher", changed.get(9, {}).get(b"MODSEQ", (0,))[0] > highest, changed)
same("SEARCH MODSEQ", [int(uid) for uid in client.search(["MODSEQ", str(highest + 1)])][:1], [9])

# IDLE tells of what another session does.
other = connect()
other.select_folder("INBOX")
client.idle()
harness.deliver(user, [harness.message(40)])
told = []
while not any(item[1] == b"EXISTS" for item in told):
    new = client.idle_check(timeout=10)
    if not new:
        break
    told += new
same("IDLE: a new message", [item for item in told if item[1] == b"EXISTS"], [(41, b"EXISTS")])
other.add_flags(5, [b"\\Seen"])
told = client.idle_check(timeout=10)
check(
    "IDLE: new flags",
    any(item[0] == 5 and item[1] == b"FETCH" and b"\\Seen" in str(item[2]).encode() for item in told),
    told,
)
other.delete_messages([6])
other.expunge([6])
told = []
while not any(item[1] == b"EXPUNGE" for item in told):
    new = client.idle_check(timeout=10)
    if not new:
        break
    told += new
check("IDLE: an expunged message", (6, b"EXPUNGE") in told, told)
text, _ = client.idle_done()
check("IDLE ends", text is not None, text)
other.logout()

# Mailboxes, COPY and MOVE.
client.create_folder("Grüße/Köln & Bonn")
same(
    "LIST: a name that is not ASCII",
    [name for _, _, name in client.list_folders("", "Gr*")],
    ["Grüße", "Grüße/Köln & Bonn"],
)
check("LIST: children", b"\\HasChildren" in client.list_folders("", "Grüße")[0][0])
client.copy([1, 2], "Grüße/Köln & Bonn")
client.move([3, 4], "Grüße/Köln & Bonn")
same("MOVE takes them away", [uid for uid in client.search("ALL") if uid < 8], [1, 2, 5, 7])
client.select_folder("Grüße/Köln & Bonn")
same(
    "COPY and MOVE keep every octet",
    [item[b"BODY[]"] for _, item in sorted(client.fetch(range(1, 5), ["BODY.PEEK[]"]).items())],
    [bodies[uid][b"BODY[]"] for uid in (1, 2, 3, 4)],
)
check("COPY and MOVE keep flags", b"$Important" in client.get_flags(1)[1] and b"\\Flagged" in client.get_flags(4)[4])
same(
    "APPEND answers with the UID",
    client.append("INBOX", messages[0], [b"\\Seen"], datetime.datetime(2020, 2, 29, 12, 0)).split()[0],
    b"[APPENDUID",
)
client.select_folder("INBOX", readonly=True)
newest = max(client.search("ALL"))
same(
    "APPEND keeps the date",
    client.fetch(newest, ["INTERNALDATE"])[newest][b"INTERNALDATE"],
    datetime.datetime(2020, 2, 29, 12, 0),
)
try:
    client.add_flags(newest, [b"\\Flagged"])
    check("EXAMINE: STORE is refused", False)
except IMAPClient.Error:
    check("EXAMINE: STORE is refused", True)
client.unselect_folder()
client.rename_folder("Grüße", "Alt")
client.delete_folder("Alt/Köln & Bonn")
names = [name for _, _, name in client.list_folders()]
same("RENAME and DELETE", [name for name in names if name.startswith(("Grüße", "Alt"))], ["Alt"])
client.logout()
harness.end()
