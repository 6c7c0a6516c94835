"""What is measured. To add a workload, add it to WORKLOADS: its command line and what of the server it needs.

A command line is that of `posthaste-bench` without what all have in common. Words in braces are filled in: {imap}, {lmtp} and
{pop3} are the server's addresses, {corpus} is the mail, {corpus_messages} how many messages that is, {mailbox_messages} how many at
most a mailbox has after `deliver`, {seconds} how long a run takes.

Nothing that one workload changes is read by another, so that all of them find the same on every server, however fast it is:
whatever changes something has users of its own, or comes after those that read what it changes.
"""

import dataclasses

import servers

# Users of the mailboxes that `deliver` fills and that are read. Others get what may not disturb these.
USERS = 32
# Users of the other workloads: pattern and number.
OTHER_USERS = {"many": 128, "one": 1, "small": 64, "idler": 50, "twin": 8, "hot": 1, "changer": 16}
# Messages of each `twin`, which are the same for all of them: an operation is as much work whatever user it is of.
TWIN_MESSAGES = 200
# Connections of `idle`: memory is the difference between the two. The smaller number has all mailboxes open already.
IDLE_CONNECTIONS = (64, 500)
IDLE_HOLD_SECONDS = 8

HEADER_SET = "UID FLAGS INTERNALDATE RFC822.SIZE ENVELOPE BODYSTRUCTURE"
READERS = ["--user-count", str(USERS), "--password", servers.PASSWORD]


def pattern(name):
    return f"{name}{{{{n}}}}@{servers.DOMAIN}"


def all_users():
    """The names of all users there are."""
    groups = {"user": USERS, **OTHER_USERS}
    return [f"{name}{number}@{servers.DOMAIN}" for name, count in groups.items() for number in range(1, count + 1)]


def of_others(name):
    return ["--users", pattern(name), "--user-count", str(OTHER_USERS[name])]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of the results."""

    name: str
    # What an operation is, and how many connections there are.
    what: str
    command: tuple
    # The workloads whose mail it reads; they are run before, even if they are not asked for.
    needs: tuple = ()
    # Brings the mail that this workload alone needs.
    mail: tuple | None = None
    # The same kind of load before the measured run; None: nothing is to be warm.
    warm_up: tuple | None = None
    # The client opens its connections before its clock starts. What that costs is found by a run that does no more, and taken off.
    opens_before: bool = False
    # The client does more than that before its clock starts, and reads the server's counters itself when it starts and stops.
    sets_up: bool = False
    # It fills the store, which is fresh before and weighed afterwards.
    fills: bool = False
    # It writes, so that flushes are of interest.
    writes: bool = False
    # Its octets are mail that comes in, so that what is written can be set beside them.
    takes_mail: bool = False
    # What of the client's own counts shows that the servers did the same.
    tells: tuple = ()
    # Families of servers that cannot do it, with the reason.
    lacking: dict = dataclasses.field(default_factory=dict)
    # Memory is taken while the client holds its connections.
    holds: bool = False

    @property
    def has_fixed_rate(self):
        """The client sends so many operations a second, however fast the server is."""
        return "--rate" in self.command


def fetch(name, what, item, batch, connections=32, over=("--imap", "{imap}")):
    command = ("fetch", *over, *READERS, "--connections", str(connections), "--item", item, "--batch", str(batch))
    return Workload(
        name,
        f"{what}; {connections} connections, {batch} messages a command",
        (*command, "--seconds", "{seconds}"),
        needs=("deliver",),
        warm_up=(*command, "--seconds", "{warm_seconds}"),
        opens_before=True,
    )


def repeated(name, what, command, **more):
    """A workload that lasts for a time, and for its warm-up too."""
    return Workload(
        name, what, (*command, "--seconds", "{seconds}"), warm_up=(*command, "--seconds", "{warm_seconds}"), **more
    )


def with_twins(name, what, command, **more):
    """What is done to mailboxes that are all the same."""
    connections = OTHER_USERS["twin"]
    line = (*command, "--imap", "{imap}", *of_others("twin"), "--password", servers.PASSWORD, "--connections", str(connections))
    what = f"{what}; {connections} connections, each with a mailbox of {TWIN_MESSAGES} messages, the same in all"
    return repeated(name, what, line, needs=("deliver-shared",), sets_up=True, **more)


DELIVER = ("deliver", "--lmtp", "{lmtp}")
CORPUS = ("--corpus", "{corpus}")
SYNC = ("fetch", "--imap", "{imap}", *READERS, "--connections", str(USERS), "--item", HEADER_SET, "--batch", "{mailbox_messages}")
SYNC_BODIES = ("sync", "--imap", "{imap}", *READERS, "--connections", "16", "--batch", "50")
SESSIONS = ("sessions", "--imap", "{imap}", *READERS, "--connections", "16")
POP3 = ("pop3", "--pop3", "{pop3}", *READERS, "--connections", "16", "--batch", "10")
PUSH = ("push", "--imap", "{imap}", "--lmtp", "{lmtp}", *of_others("idler"), "--password", servers.PASSWORD)
PUSH += ("--connections", str(OTHER_USERS["idler"]), "--rate", "20", "--timeout", "10")
DELIVER_MANY = (*DELIVER, *CORPUS, *of_others("many"), "--connections", "128")
DELIVER_ONE = (*DELIVER, *CORPUS, *of_others("one"), "--connections", "1")
SMALL = ("--size", "4096", *of_others("small"), "--connections", "16")
DELIVER_ALL = (*DELIVER, *CORPUS, "--user-count", str(USERS), "--connections", "16")
DELIVER_TWINS = (*DELIVER, *CORPUS, *of_others("twin"), "--recipients", str(OTHER_USERS["twin"]), "--connections", "4")
# Each has mailboxes of its own, other than INBOX but for APPEND.
CHANGES = ("--imap", "{imap}", *of_others("changer"), "--password", servers.PASSWORD, "--connections", str(OTHER_USERS["changer"]))
APPEND = ("append", *CHANGES, *CORPUS)
MOVE = ("move", *CHANGES, "--mailbox-messages", "100")
# Four times as many messages as are expunged, so that no connection has to fill its mailbox again.
EXPUNGE = ("expunge", *CHANGES, "--mailbox-messages", "250")
HOT = ("hot", "--imap", "{imap}", "--lmtp", "{lmtp}", *of_others("hot"), "--password", servers.PASSWORD)
HOT += ("--connections", "20", "--rate", "200")
HANDSHAKES = ("handshakes", "--server", "{imaps}", "--connections", "16")
NO_SMTP = {
    "dovecot": "it takes mail for its own users by LMTP alone (its submission service passes mail on to another server)",
    "cyrus": "it takes mail by LMTP alone",
}

# In the order in which they run. `deliver` comes first, and what needs a store that nobody has read yet directly after it. Those
# that change flags come after those that only read the same mailboxes.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "deliver",
            f"a message of the corpus to one of {USERS} users by LMTP, each message once; 16 connections",
            (*DELIVER_ALL, "--messages", "{corpus_messages}"),
            # One message for each user makes all mailboxes.
            warm_up=(*DELIVER_ALL, "--messages", str(USERS)),
            fills=True,
            writes=True,
            takes_mail=True,
        ),
        Workload(
            "sync-first",
            f"the header set of a message, of every message once and for the first time ({HEADER_SET}); {USERS} connections",
            (*SYNC, "--messages", "{all_messages}"),
            needs=("deliver",),
            opens_before=True,
        ),
        repeated("sync-again", f"the same again; {USERS} connections", SYNC, needs=("deliver",), opens_before=True),
        fetch("fetch-envelope", "ENVELOPE of a message", "ENVELOPE", 50),
        fetch("fetch-structure", "BODYSTRUCTURE of a message", "BODYSTRUCTURE", 50),
        fetch("fetch-headers", "BODY.PEEK[HEADER] of a message", "BODY.PEEK[HEADER]", 50),
        fetch("fetch-bodies", "BODY.PEEK[] of a message", "BODY.PEEK[]", 20),
        fetch(
            "fetch-bodies-tls",
            "BODY.PEEK[] of a message over TLS, without the handshakes",
            "BODY.PEEK[]",
            20,
            over=("--imap", "{imaps}", "--tls"),
        ),
        repeated(
            "sync-bodies",
            f"the first sync of a client, a whole mailbox over a connection of its own: LOGIN, SELECT, UID FETCH 1:* (FLAGS RFC822.SIZE), "
            f"BODY.PEEK[] of all messages by 50, LOGOUT. A mailbox has the corpus' messages divided by {USERS}; 16 connections",
            SYNC_BODIES,
            needs=("deliver",),
            tells=("messages synced",),
        ),
        repeated(
            "sessions",
            "an IMAP session over a connection of its own: LOGIN, SELECT, FETCH 1:* (FLAGS), LOGOUT; 16 connections",
            SESSIONS,
            needs=("deliver",),
        ),
        repeated(
            "handshakes",
            "a TCP connection with a TLS handshake, the greeting, and the end; 16 at a time, none resumed",
            HANDSHAKES,
            tells=("resumed",),
        ),
        repeated(
            "handshakes-resumed",
            "a TCP connection with a TLS handshake that offers to resume the session of the last one, the greeting, and the end; 16 at a "
            "time. A server need not take up the session",
            (*HANDSHAKES, "--tls-resume"),
            tells=("resumed",),
        ),
        repeated(
            "pop3",
            "a message retrieved in sessions of login, STAT, LIST, RETR of all, QUIT; 16 connections, 10 RETR at a time",
            POP3,
            needs=("deliver",),
        ),
        Workload(
            "push",
            f"a delivery of 4 KB to one of {OTHER_USERS['idler']} connections in IDLE, 20 a second; the latency is from the 250 to the "
            "EXISTS, and more than 10 s is an error",
            (*PUSH, "--seconds", "{push_seconds}"),
            warm_up=(*DELIVER, "--size", "4096", *of_others("idler"), "--messages", str(OTHER_USERS["idler"])),
            opens_before=True,
            writes=True,
            takes_mail=True,
        ),
        Workload(
            "idle",
            f"a connection in IDLE after LOGIN and SELECT; {IDLE_CONNECTIONS[1]} connections",
            ("idle", "--imap", "{imap}", *READERS, "--hold", str(IDLE_HOLD_SECONDS), "--server-pid", "{pid}", "--connections"),
            needs=("deliver",),
            holds=True,
        ),
        Workload(
            "deliver-shared",
            f"a message of the corpus to one of {OTHER_USERS['twin']} recipients of one transaction, the first {TWIN_MESSAGES} messages; "
            "4 connections",
            # What the client is told to send are transactions.
            (*DELIVER_TWINS, "--messages", str(TWIN_MESSAGES)),
            writes=True,
            takes_mail=True,
        ),
        with_twins(
            "search-flags",
            "SEARCH UNSEEN UNFLAGGED, which finds all messages",
            ("search", "--kind", "flags"),
            tells=("messages found",),
        ),
        with_twins(
            "search-subject",
            'SEARCH SUBJECT "patch"',
            ("search", "--kind", "header"),
            tells=("messages found",),
        ),
        with_twins(
            "search-body",
            'SEARCH BODY "patch"; no server has an index of words',
            ("search", "--kind", "body"),
            tells=("messages found",),
        ),
        with_twins(
            "resync",
            "a client that was there before, over a connection of its own: LOGIN, SELECT, STATUS of five empty mailboxes sent together, "
            "the flags of five messages that have changed, LOGOUT. The client asks for changes by QRESYNC where that is announced, else "
            "by CONDSTORE",
            ("resync",),
            tells=("flags received", "by QRESYNC", "by CONDSTORE"),
        ),
        with_twins(
            "flags-one",
            "a STORE that changes a flag of one message",
            ("flags",),
            writes=True,
            tells=("messages changed",),
        ),
        with_twins(
            "flags-all",
            "a STORE that changes a flag of all messages, 1:*",
            ("flags", "--all"),
            writes=True,
            tells=("messages changed",),
        ),
        repeated(
            "append",
            f"an APPEND of a message of the corpus to the INBOX of one of {OTHER_USERS['changer']} users; 16 connections",
            APPEND,
            sets_up=True,
            writes=True,
            takes_mail=True,
        ),
        repeated(
            "move",
            "a MOVE of one message of 4 KB from a mailbox of 100 messages to an empty one, all of them to and fro; 16 connections, each "
            "with its own two mailboxes",
            MOVE,
            sets_up=True,
            writes=True,
            tells=("messages moved", "by MOVE"),
        ),
        Workload(
            "expunge",
            r"STORE +FLAGS.SILENT (\Deleted) and EXPUNGE of the last message of 4 KB of a mailbox of 250; 16 connections, each with a "
            "mailbox of its own",
            (*EXPUNGE, "--messages", "1000"),
            warm_up=(*EXPUNGE, "--messages", "160"),
            sets_up=True,
            writes=True,
            tells=("messages expunged", "refills"),
        ),
        Workload(
            "hot",
            "a delivery of 4 KB, a STORE of one flag or a NOOP, about 1 : 2 : 2, 200 a second, in one mailbox that 19 connections have "
            "selected: 2 send STORE, 2 NOOP and 15 are in IDLE, all are told of all changes; at the end, which is in the CPU, each asks for "
            "all flags",
            (*HOT, "--messages", "400"),
            mail=(*DELIVER, "--size", "4096", *of_others("hot"), "--messages", "100"),
            warm_up=(*HOT, "--messages", "100"),
            sets_up=True,
            writes=True,
            tells=("deliveries", "STORE commands", "NOOP commands", "responses pushed"),
        ),
        Workload(
            "deliver-128",
            f"a message of the corpus to one of {OTHER_USERS['many']} users, the first 1,000; 128 connections",
            (*DELIVER_MANY, "--messages", "1000"),
            warm_up=(*DELIVER_MANY, "--messages", str(OTHER_USERS["many"])),
            writes=True,
            takes_mail=True,
        ),
        Workload(
            "deliver-1",
            "a message of the corpus to one user, the first 200; 1 connection",
            (*DELIVER_ONE, "--messages", "200"),
            warm_up=(*DELIVER_ONE, "--messages", "20"),
            writes=True,
            takes_mail=True,
        ),
        Workload(
            "deliver-4k",
            f"a message of 4,096 octets of words to one of {OTHER_USERS['small']} users; 16 connections",
            (*DELIVER, *SMALL, "--seconds", "{seconds}"),
            warm_up=(*DELIVER, *SMALL, "--messages", str(OTHER_USERS["small"])),
            writes=True,
            takes_mail=True,
        ),
        Workload(
            "deliver-4k-smtp",
            f"a message of 4,096 octets of words to one of {OTHER_USERS['small']} users by SMTP; 16 connections",
            ("deliver", "--smtp", "{smtp}", *SMALL, "--seconds", "{seconds}"),
            warm_up=("deliver", "--smtp", "{smtp}", *SMALL, "--messages", str(OTHER_USERS["small"])),
            writes=True,
            takes_mail=True,
            lacking=NO_SMTP,
        ),
    )
}


def opening(command):
    """The command line of a run that opens the same connections and does as little as there is to do with them."""
    least = list(command)
    for option, value in (("--seconds", None), ("--messages", "1"), ("--item", "FLAGS"), ("--batch", "1")):
        if option in least:
            at = least.index(option)
            del least[at : at + 2]
            if value and option != "--messages":
                least += [option, value]
    return (*least, "--messages", "1")


def command_line(command, words):
    """Fills in the words."""
    return [word.format_map(words) for word in command]
