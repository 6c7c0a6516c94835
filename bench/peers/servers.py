"""The servers that are compared: their configuration, start, stop and users."""

import contextlib
import dataclasses
import imaplib
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import ssl
import subprocess
import time

import meter

HERE = pathlib.Path(__file__).resolve().parent
DOMAIN = "example.org"
PASSWORD = "bench"
# Argon2id of PASSWORD at the lowest cost there is, so that logins compare with servers that compare passwords as they are.
CHEAP_HASH = "$argon2id$v=19$m=8,t=1,p=1$1G+pEhhfcplxx7ANWGl9Mw$3hgdr4Ec6oP3hBCC74tCA/2DTjt4Y3iXPhtXJ2AaZkg"
# Debian has this user on every system.
MAIL_USER = "mail"
CYRUS_ADMINISTRATOR = "cyrus"
# master(8): "On systems with a high connection rate it may be desirable to increase this value." Of 128 clients that connect at once,
# some would wait for minutes with the usual 32.
CYRUS_LISTEN_QUEUE = 1024
START_SECONDS_MAX = 60
STOP_SECONDS_MAX = 60
# Lock files and the like, which the peers' documentation puts on a RAM disk.
RAM_DISK = pathlib.Path("/dev/shm")
# Of the client as well; the servers inherit it.
DESCRIPTORS = 16384
# What is served on the ports from the first one on, in this order.
PROTOCOLS = ("imap", "lmtp", "pop3", "imaps", "smtp")
# Those that begin with TLS.
OVER_TLS = ("imaps",)
CERTIFICATE_DAYS = 3650


class ServerError(Exception):
    """A server does not do what it should; says where to look."""


def fill_in(template, words):
    """Replaces @WORDS@ in a configuration."""
    def word(match):
        if match[1] not in words:
            raise ServerError(f"a configuration asks for @{match[1]}@, which the runner does not know")
        return str(words[match[1]])

    return re.sub(r"@([A-Z][A-Z0-9_]*)@", word, template)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of the servers by name."""

    name: str
    family: str
    # Files of this directory, one after another.
    configuration: tuple
    # What is on stable storage when a delivery is acknowledged, and how it gets there.
    durability: str
    # The workloads that it is for, None: all, and why not for others.
    only: frozenset | None = None
    why_only: str = ""

    def can(self, workload):
        return self.family not in workload.lacking

    def measures(self, workload):
        """Whether it is measured with a workload."""
        return self.can(workload) and (self.only is None or workload.name in self.only)

    def runs(self, workload, chosen):
        """Whether it runs a workload, be it for what others of those that were chosen read."""
        wanted = [other for other in chosen if self.measures(other)]
        return self.can(workload) and (workload in wanted or any(workload.name in other.needs for other in wanted))


POSTHASTE_DURABILITY = (
    "Message, its place in the mailbox and the mailbox's counters are one record of the log, written and synced (fdatasync) before "
    "the reply; deliveries that arrive together share the sync. All other changes, flags too, likewise. There is no other mode."
)
SDBOX_DURABILITY = (
    "mail_fsync=optimized, the default: the message's file, its directory and the index's transaction log are synced before the reply, "
    "one after another. Changes of flags are not synced."
)
MDBOX_DURABILITY = (
    "mail_fsync=optimized, the default: the storage file, the map's transaction log, the mailbox's transaction log and its directory "
    "are synced before the reply, one after another. Changes of flags are not synced."
)
ALWAYS_DURABILITY = "mail_fsync=always: what optimized syncs, the cache, and with mdbox the map's log once more; changes of flags too."
CYRUS_DURABILITY = "No choice: the message's file and the mailbox's index and cache are synced before the reply; changes of flags too."
WHOLE_MESSAGES = frozenset({"fetch-bodies", "sync-bodies", "pop3", "search-body"})
CONTENTS = frozenset({"deliver", "deliver-shared", "append", "sync-first", "fetch-headers", "fetch-bodies", "search-body"})
WRITERS = frozenset({"deliver", "deliver-128", "deliver-1", "append", "flags-one", "move", "expunge"})
IDLERS = frozenset({"idle", "push"})
UNCACHED_ONLY = "What reads whole messages; nothing else differs."
ZSTD_ONLY = "What writes or reads messages, one workload of each sort; nothing else is compressed."
ALWAYS_ONLY = "What writes, one workload of each sort."
HIBERNATE_ONLY = "Connections in IDLE; others are as with dovecot-sdbox."

KINDS = {
    kind.name: kind
    for kind in (
        Kind("posthaste", "posthaste", ("posthaste.toml",), POSTHASTE_DURABILITY),
        Kind(
            "posthaste-uncached",
            "posthaste",
            ("posthaste.toml", "posthaste-uncached.toml"),
            POSTHASTE_DURABILITY,
            WHOLE_MESSAGES,
            UNCACHED_ONLY,
        ),
        Kind("dovecot-sdbox", "dovecot", ("dovecot.conf", "dovecot-sdbox.conf"), SDBOX_DURABILITY),
        Kind("dovecot-mdbox", "dovecot", ("dovecot.conf", "dovecot-mdbox.conf"), MDBOX_DURABILITY),
        Kind(
            "dovecot-sdbox-zstd",
            "dovecot",
            ("dovecot.conf", "dovecot-sdbox.conf", "dovecot-zstd.conf"),
            SDBOX_DURABILITY,
            CONTENTS,
            ZSTD_ONLY,
        ),
        Kind(
            "dovecot-mdbox-zstd",
            "dovecot",
            ("dovecot.conf", "dovecot-mdbox.conf", "dovecot-zstd.conf"),
            MDBOX_DURABILITY,
            CONTENTS,
            ZSTD_ONLY,
        ),
        Kind(
            "dovecot-sdbox-always",
            "dovecot",
            ("dovecot.conf", "dovecot-sdbox.conf", "dovecot-always.conf"),
            ALWAYS_DURABILITY,
            WRITERS,
            ALWAYS_ONLY,
        ),
        Kind(
            "dovecot-mdbox-always",
            "dovecot",
            ("dovecot.conf", "dovecot-mdbox.conf", "dovecot-always.conf"),
            ALWAYS_DURABILITY,
            WRITERS,
            ALWAYS_ONLY,
        ),
        Kind(
            "dovecot-sdbox-hibernate",
            "dovecot",
            ("dovecot.conf", "dovecot-sdbox.conf", "dovecot-hibernate.conf"),
            SDBOX_DURABILITY,
            IDLERS,
            HIBERNATE_ONLY,
        ),
        Kind("cyrus", "cyrus", ("cyrus-imapd.conf", "cyrus-master.conf"), CYRUS_DURABILITY),
    )
}


@dataclasses.dataclass(frozen=True)
class Programs:
    """Where the programs are."""

    posthaste: pathlib.Path
    dovecot: pathlib.Path
    cyrus_root: pathlib.Path

    def cyrus_environment(self):
        libraries = sorted(str(directory) for directory in self.cyrus_root.glob("usr/lib/*-linux-gnu*"))
        return dict(os.environ, LD_LIBRARY_PATH=":".join(libraries))

    def version(self, family):
        """What the server says it is."""
        command, environment = {
            "posthaste": ([self.posthaste, "--version"], None),
            "dovecot": ([self.dovecot, "--version"], None),
            "cyrus": ([self.cyrus_root / "usr/lib/cyrus/bin/master", "-V"], self.cyrus_environment()),
        }[family]
        try:
            ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ServerError(f"{command[0]} cannot be run: {error}. Install it first, or say where it is") from error
        return ran.stdout.strip()


class Server:
    """A server with a store of its own in a directory of its own, and its control group."""

    def __init__(self, kind, scratch, programs, port_base):
        self.kind = kind
        self.programs = programs
        self.directory = scratch / kind.name
        self.tls = scratch / "tls"
        self.store = self.directory / "store"
        first = port_base + 10 * list(KINDS).index(kind.name)
        # Two runners with ports of their own do not meet.
        self.label = f"{kind.name}-{first}"
        self.volatile = RAM_DISK / meter.CGROUP_NAME / self.label
        self.ports = {
            protocol: first + number
            for number, protocol in enumerate(PROTOCOLS)
            if protocol != "smtp" or kind.family == "posthaste"
        }
        self.group = None

    @property
    def name(self):
        return self.kind.name

    def address(self, protocol):
        return f"127.0.0.1:{self.ports[protocol]}"

    def fresh(self, users):
        """Makes an empty store with these users."""
        self.wipe()
        self.store.mkdir(parents=True)
        if self.kind.family != "posthaste":
            give_to_mail_user(self.directory, self.store)
            # Dovecot makes users when they are first used.
            if self.kind.family == "cyrus":
                self._make_mailboxes(users)
            return
        make_certificate(self.tls)
        self._write_configuration()
        lines = "".join(f"{user}:{CHEAP_HASH}\n" for user in users)
        (self.directory / "users").write_text(lines)
        self._run([self.programs.posthaste, "user", "import", self.directory / "users", *self._posthaste_options()])

    def wipe(self):
        for directory in (self.directory, self.volatile):
            shutil.rmtree(directory, ignore_errors=True)

    def start(self):
        """Starts the server in its control group. It answers when this returns."""
        for protocol, port in self.ports.items():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise ServerError(f"port {port} ({protocol}) is in use: stop what uses it or give another --port-base")
        make_certificate(self.tls)
        self._write_configuration()
        self.group = meter.Group.create(self.label)
        if self.group.processes():
            raise ServerError(f"{self.name} runs already: stop it first")
        command, environment = self._command()
        # The shell enters the group, and everything it becomes and starts stays there.
        enter = 'for file in $GROUPS_TO_ENTER; do echo 0 > "$file" || exit 1; done; unset GROUPS_TO_ENTER; exec "$@"'
        environment = dict(environment or os.environ, GROUPS_TO_ENTER=" ".join(self.group.entrances()))
        with open(self.directory / "output", "ab") as output:
            process = subprocess.Popen(
                ["sh", "-c", f"ulimit -n {DESCRIPTORS}; {enter}", "sh", *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        (self.directory / "pid").write_text(str(process.pid))
        self._wait_until_it_answers(process)

    def stop(self):
        """Stops the server, and kills what does not stop."""
        group = self.group or meter.Group.create(self.label)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = int((self.directory / "pid").read_text())
            if pid in group.processes():
                os.kill(pid, signal.SIGTERM)
                deadline = time.monotonic() + STOP_SECONDS_MAX
                while group.processes() and time.monotonic() < deadline:
                    if self.kind.family == "dovecot" and is_left_alone(group.processes()):
                        break
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
                    time.sleep(0.02)
        group.kill()
        with contextlib.suppress(ChildProcessError, FileNotFoundError):
            os.waitpid(int((self.directory / "pid").read_text()), os.WNOHANG)
        group.remove()
        # A Dovecot that was left alone did not do it.
        (self.directory / "run/master.pid").unlink(missing_ok=True)
        self.group = None

    def main_process(self):
        return int((self.directory / "pid").read_text())

    def log_tail(self, lines=15):
        """The last lines of what the server said, for errors."""
        text = ""
        for name in ("output", "log"):
            with contextlib.suppress(FileNotFoundError):
                text += "\n".join((self.directory / name).read_text(errors="replace").splitlines()[-lines:]) + "\n"
        return text

    def _make_mailboxes(self, users):
        """Makes Cyrus' mailboxes as the administrator does, without quotas."""
        self.start()
        try:
            with imaplib.IMAP4("127.0.0.1", self.ports["imap"]) as connection:
                connection.login(CYRUS_ADMINISTRATOR, PASSWORD)
                for user in users:
                    status, answer = connection.create(f"user/{user}")
                    if status != "OK":
                        raise ServerError(f"cyrus does not make the mailbox of {user}: {answer}")
        finally:
            self.stop()

    def _words(self):
        cores = os.cpu_count()
        return dict(
            {f"{protocol.upper()}_PORT": port for protocol, port in self.ports.items()},
            CERTIFICATE=self.tls / "certificate.pem",
            KEY=self.tls / "key.pem",
            STORE=self.store,
            RUN=self.directory / "run",
            LOG=self.directory / "log",
            VOLATILE=self.volatile,
            MAIL_USER=MAIL_USER,
            ADMINISTRATOR=CYRUS_ADMINISTRATOR,
            PASSWORD=PASSWORD,
            CORES=cores,
            PREFORK=max(cores, 4),
            BIN=self.programs.cyrus_root / "usr/lib/cyrus/bin",
            CONF=self.directory / "cyrus-imapd.conf",
        )

    def _write_configuration(self):
        self.directory.mkdir(parents=True, exist_ok=True)
        words = self._words()
        parts = [(name, fill_in((HERE / name).read_text(), words)) for name in self.kind.configuration]
        if self.kind.family == "cyrus":
            for name, text in parts:
                (self.directory / name).write_text(text)
        else:
            # Later settings replace earlier ones.
            (self.directory / "configuration").write_text("\n".join(text for _, text in parts))
        if self.kind.family != "posthaste":
            self.volatile.mkdir(parents=True, exist_ok=True)
            for name in ("run", "run/state"):
                (self.directory / name).mkdir(exist_ok=True)
            give_to_mail_user(self.volatile, self.store)
        if self.kind.family == "cyrus":
            made = [self.store / name for name in ("config", "spool", "sieve", "config/socket", "config/db", "config/log")]
            made += [self.volatile / name for name in ("proc", "lock")]
            for directory in made:
                directory.mkdir(parents=True, exist_ok=True)
            give_to_mail_user(*made)

    def _posthaste_options(self):
        return ["--data", self.store, "--config", self.directory / "configuration"]

    def _command(self):
        if self.kind.family == "posthaste":
            return [self.programs.posthaste, "serve", *self._posthaste_options()], None
        if self.kind.family == "dovecot":
            return [self.programs.dovecot, "-F", "-c", self.directory / "configuration"], None
        command = [
            self.programs.cyrus_root / "usr/lib/cyrus/bin/master",
            "-C", self.directory / "cyrus-imapd.conf",
            "-M", self.directory / "cyrus-master.conf",
            "-p", self.directory / "run/master.pid",
            "-l", CYRUS_LISTEN_QUEUE,
        ]  # fmt: skip
        return command, self.programs.cyrus_environment()

    def _wait_until_it_answers(self, process):
        deadline = time.monotonic() + START_SECONDS_MAX
        for protocol, port in self.ports.items():
            while not greets(port, protocol in OVER_TLS):
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log_tail()
                    self.stop()
                    raise ServerError(f"{self.name} does not answer on port {port}; it said:\n{tail}")
                time.sleep(0.02)

    def _run(self, command):
        ran = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if ran.returncode != 0:
            raise ServerError(f"{' '.join(map(str, command))} failed:\n{ran.stdout}{ran.stderr}")


def is_left_alone(processes):
    """Whether no more is left of a Dovecot that stops than its master, which sleeps for a second before it looks whether its children
    have ended, and the one that writes the log. Neither has anything of the store."""
    names = set()
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.add(pathlib.Path(f"/proc/{process}/comm").read_text().strip())
    return names <= {"dovecot", "log"}


def give_to_mail_user(*paths):
    user = pwd.getpwnam(MAIL_USER)
    for path in paths:
        os.chown(path, user.pw_uid, user.pw_gid)


def make_certificate(directory):
    """A certificate that signs itself, for all servers the same: ECDSA with P-256."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    if certificate.exists() and key.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-sha256"]
    command += ["-days", str(CERTIFICATE_DAYS), "-subj", "/CN=localhost", "-keyout", key, "-out", certificate]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ServerError(f"cannot make a certificate: {error} {getattr(error, 'stderr', '')}") from error
    # Cyrus reads it as this user, the others as root.
    key.chmod(0o600)
    give_to_mail_user(key)


def greets(port, over_tls=False):
    """Whether a server greets whoever connects."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            if over_tls:
                connection = stack.enter_context(context.wrap_socket(connection))
            return bool(connection.recv(1))
    except OSError:
        return False
