"""What is measured. To add a workload, add it to WORKLOADS: its command line and what of the server it needs.

A command line is that of `posthaste-bench` without what all have in common. Words in braces are filled in: {imap}, {lmtp} and
{pop3} are the server's addresses, {corpus} is the mail, {corpus_messages} how many messages that is, {mailbox_messages} how many at
most a mailbox has after `deliver`, {seconds} how long a run takes.
"""

import dataclasses

import servers

# Users of the mailboxes that `deliver` fills and that are read. Others get what may not disturb these.
USERS = 32
# Users of the other deliveries: pattern and number.
OTHER_USERS = {"many": 128, "one": 1, "small": 64, "idler": 50}
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
    # The same kind of load before the measured run; None: nothing is to be warm.
    warm_up: tuple | None = None
    # The client opens its connections before its clock starts. What that costs is found by a run that does no more, and taken off.
    opens_before: bool = False
    # It fills the store, which is fresh before and weighed afterwards.
    fills: bool = False
    # It writes, so that flushes and written bytes are of interest.
    writes: bool = False
    # Memory is taken while the client holds its connections.
    holds: bool = False


def fetch(name, what, item, batch, connections=32):
    command = ("fetch", "--imap", "{imap}", *READERS, "--connections", str(connections), "--item", item, "--batch", str(batch))
    return Workload(
        name,
        f"{what}; {connections} connections, {batch} messages a command",
        (*command, "--seconds", "{seconds}"),
        warm_up=(*command, "--seconds", "1"),
        opens_before=True,
    )


DELIVER = ("deliver", "--lmtp", "{lmtp}")
CORPUS = ("--corpus", "{corpus}")
SYNC = ("fetch", "--imap", "{imap}", *READERS, "--connections", str(USERS), "--item", HEADER_SET, "--batch", "{mailbox_messages}")
SESSIONS = ("sessions", "--imap", "{imap}", *READERS, "--connections", "16")
POP3 = ("pop3", "--pop3", "{pop3}", *READERS, "--connections", "16", "--batch", "10")
PUSH = ("push", "--imap", "{imap}", "--lmtp", "{lmtp}", *of_others("idler"), "--password", servers.PASSWORD)
PUSH += ("--connections", str(OTHER_USERS["idler"]), "--rate", "20", "--timeout", "10")
DELIVER_MANY = (*DELIVER, *CORPUS, *of_others("many"), "--connections", "128")
DELIVER_ONE = (*DELIVER, *CORPUS, *of_others("one"), "--connections", "1")
DELIVER_SMALL = (*DELIVER, "--size", "4096", *of_others("small"), "--connections", "16")
DELIVER_ALL = (*DELIVER, *CORPUS, "--user-count", str(USERS), "--connections", "16")

# In the order in which they run. `deliver` comes first, and what needs a store that nobody has read yet directly after it.
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
        ),
        Workload(
            "sync-first",
            f"the header set of a message, of every message once and for the first time ({HEADER_SET}); {USERS} connections",
            (*SYNC, "--messages", "{all_messages}"),
            opens_before=True,
        ),
        Workload(
            "sync-again",
            f"the same again; {USERS} connections",
            (*SYNC, "--seconds", "{seconds}"),
            warm_up=(*SYNC, "--seconds", "1"),
            opens_before=True,
        ),
        fetch("fetch-envelope", "ENVELOPE of a message", "ENVELOPE", 50),
        fetch("fetch-structure", "BODYSTRUCTURE of a message", "BODYSTRUCTURE", 50),
        fetch("fetch-headers", "BODY.PEEK[HEADER] of a message", "BODY.PEEK[HEADER]", 50),
        fetch("fetch-bodies", "BODY.PEEK[] of a message", "BODY.PEEK[]", 20),
        Workload(
            "sessions",
            "an IMAP session over a connection of its own: LOGIN, SELECT, FETCH 1:* (FLAGS), LOGOUT; 16 connections",
            (*SESSIONS, "--seconds", "{seconds}"),
            warm_up=(*SESSIONS, "--seconds", "1"),
        ),
        Workload(
            "pop3",
            "a message retrieved in sessions of login, STAT, LIST, RETR of all, QUIT; 16 connections, 10 RETR at a time",
            (*POP3, "--seconds", "{seconds}"),
            warm_up=(*POP3, "--seconds", "1"),
        ),
        Workload(
            "push",
            f"a delivery of 4 KB to one of {OTHER_USERS['idler']} connections in IDLE, 20 a second; the latency is from the 250 to the "
            "EXISTS, and more than 10 s is an error",
            (*PUSH, "--seconds", "{push_seconds}"),
            warm_up=(*DELIVER, "--size", "4096", *of_others("idler"), "--messages", str(OTHER_USERS["idler"])),
            opens_before=True,
            writes=True,
        ),
        Workload(
            "idle",
            f"a connection in IDLE after LOGIN and SELECT; {IDLE_CONNECTIONS[1]} connections",
            ("idle", "--imap", "{imap}", *READERS, "--hold", str(IDLE_HOLD_SECONDS), "--server-pid", "{pid}", "--connections"),
            holds=True,
        ),
        Workload(
            "deliver-128",
            f"a message of the corpus to one of {OTHER_USERS['many']} users, the first 1,000; 128 connections",
            (*DELIVER_MANY, "--messages", "1000"),
            warm_up=(*DELIVER_MANY, "--messages", str(OTHER_USERS["many"])),
            writes=True,
        ),
        Workload(
            "deliver-1",
            "a message of the corpus to one user, the first 300; 1 connection",
            (*DELIVER_ONE, "--messages", "300"),
            warm_up=(*DELIVER_ONE, "--messages", "20"),
            writes=True,
        ),
        Workload(
            "deliver-4k",
            f"a message of 4,096 octets of words to one of {OTHER_USERS['small']} users; 16 connections",
            (*DELIVER_SMALL, "--seconds", "{seconds}"),
            warm_up=(*DELIVER_SMALL, "--messages", str(OTHER_USERS["small"])),
            writes=True,
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
