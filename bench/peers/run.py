#!/usr/bin/env python3
"""Measures Posthaste beside Dovecot and Cyrus, with posthaste-bench as the client.

    run.py install                                 Dovecot and Cyrus from Debian's packages
    run.py run --corpus DIR                        everything, and bench/RESULTS.md
    run.py start SERVER | stop [SERVER]            one server to try something with

Python's standard library only. Needs root: it installs packages, makes control groups and raises limits of the kernel.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import install
import measure
import meter
import results
import servers
import workloads

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# A connection in IDLE takes one inotify instance of Dovecot's user; Dovecot logs an error and polls if there is none left.
INOTIFY = {"max_user_instances": 65536, "max_user_watches": 1048576, "max_queued_events": 65536}
# A workload's `push` needs some seconds for enough samples at its rate.
PUSH_SECONDS_MIN = 6
# Of a warm-up without a number of messages, at most.
WARM_SECONDS = 0.5


@contextlib.contextmanager
def raised_limits():
    """Raises limits of the kernel and of this process while it runs, never lowers any."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < servers.DESCRIPTORS:
        raise servers.ServerError(f"{servers.DESCRIPTORS} descriptors are needed and {hard} allowed: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (servers.DESCRIPTORS, hard))
    before = {}
    for name, wanted in INOTIFY.items():
        file = pathlib.Path("/proc/sys/fs/inotify") / name
        before[file] = int(file.read_text())
        if before[file] < wanted:
            file.write_text(str(wanted))
    try:
        yield
    finally:
        for file, value in before.items():
            file.write_text(str(value))


def built_from(program):
    """The last commit before a program was built, if it lies in a repository."""
    built = datetime.datetime.fromtimestamp(program.stat().st_mtime, datetime.timezone.utc)
    command = ["git", "-C", program.parent, "log", "-1", f"--before={built.isoformat()}", "--format=%h"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = ran.stdout.strip()
    return f"built {built:%Y-%m-%d %H:%M} UTC" + (f" from commit {commit} or later" if commit else "")


def field_of(file, name):
    """The first value of `name: value` lines."""
    for line in pathlib.Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def file_system(path, table):
    """The type of the file system that has `path`, from /proc/mounts."""
    found = ("", "unknown")
    for line in table.splitlines():
        _, point, kind = line.split()[:3]
        # Of several mounts on one place the last counts.
        if (path / "x").is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def disk(path, device):
    """The device and file system of a directory."""
    kind = file_system(path.resolve(), pathlib.Path("/proc/mounts").read_text())
    if device is None:
        return f"none, {kind}"
    cache = pathlib.Path(f"/sys/block/{device}/queue/write_cache").read_text().strip()
    return f"{device} ({cache} cache), {kind}"


def header(options, programs, device):
    families = dict.fromkeys(servers.KINDS[name].family for name in options.servers)
    versions = {family: programs.version(family) for family in families}
    if "posthaste" in versions:
        versions["posthaste"] += f", {options.commit or built_from(programs.posthaste)}"
    if "dovecot" in versions:
        versions["dovecot"] = f"dovecot {versions['dovecot']}, Debian's package"
    if "cyrus" in versions:
        versions["cyrus"] += ", Debian's package"
    memory_kb = int(field_of("/proc/meminfo", "MemTotal").split()[0])
    return {
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "cpu": field_of("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_kb / 1e6),
        "kernel": f"{platform.system()} {platform.release()}",
        "disk": disk(options.scratch, device),
        "versions": versions,
        "servers": options.servers,
        "seconds": options.seconds,
        "corpus": str(options.corpus),
        "every": options.every,
        "remarks": options.remark,
    }


def thinned(corpus, every, directory):
    """A directory with each Nth message of a corpus, by name. Its names are links."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for number, message in enumerate(sorted(corpus.rglob("*.eml"))[::every]):
        (directory / f"{number:06}.eml").symlink_to(message.resolve())
    return directory


def rotated(names, round_number):
    """Another server comes first in each round."""
    first = (round_number - 1) % len(names)
    return names[first:] + names[:first]


class Keeper:
    """Writes records to a file as they come."""

    def __init__(self, path, head):
        self.path = path
        self.head = head
        self.records = []

    def add(self, record):
        self.records.append(record)
        # What only the runs tell.
        if record.get("client_version"):
            self.head["client_version"] = record["client_version"]
        if record.get("received_bytes"):
            self.head["corpus_messages"] = record["operations"]
            self.head["corpus_bytes"] = record["bytes"]
        lines = [json.dumps(self.head)] + [json.dumps(record) for record in self.records]
        self.path.write_text("".join(line + "\n" for line in lines))


def read_records(paths):
    """Heads and records of raw files. Rounds of later files are counted on."""
    head, records, rounds = None, [], 0
    for path in paths:
        lines = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
        head = head or lines[0]
        for record in lines[1:]:
            records.append(dict(record, round=record["round"] + rounds))
        rounds = max((record["round"] for record in records), default=0)
    return head, records


def steps_of(chosen):
    """The workloads that are chosen and those whose mail they read, in the order of the table."""
    needed = {name for workload in chosen for name in workload.needs}
    return [workload for workload in workloads.WORKLOADS.values() if workload in chosen or workload.name in needed]


def run_one(workload, server, client, device):
    """Starts the server, measures, stops it."""
    try:
        server.start()
        try:
            kept = measure.measure(workload, server, client, device)
        finally:
            server.stop()
    except (servers.ServerError, measure.ClientError) as error:
        return {"failed": str(error), "log": server.log_tail()}
    if workload.fills:
        measure.sync()
        stored = meter.stored(server.store)
        kept["stored"] = {"used": stored.used, "allocated": stored.allocated, "files": stored.files}
    return kept


def run(options):
    programs = programs_of(options)
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.scratch.chmod(0o755)
    device = meter.device_of(options.scratch)
    if options.every > 1:
        options.corpus = thinned(options.corpus, options.every, options.scratch / "corpus")
    keeper = Keeper(options.raw, header(options, programs, device))
    words = {
        "corpus": str(options.corpus),
        "seconds": options.seconds,
        "warm_seconds": min(options.seconds, WARM_SECONDS),
        "push_seconds": max(options.seconds, PUSH_SECONDS_MIN),
    }
    client = measure.Client(options.client, words)
    everyone = {name: servers.Server(servers.KINDS[name], options.scratch, programs, options.port_base) for name in options.servers}
    chosen = [workloads.WORKLOADS[name] for name in workloads.WORKLOADS if name in options.workloads]
    steps = steps_of(chosen)
    with raised_limits():
        for round_number in range(1, options.rounds + 1):
            for server in everyone.values():
                server.fresh(workloads.all_users())
            for workload in steps:
                for name in rotated(options.servers, round_number):
                    server = everyone[name]
                    if not server.kind.runs(workload, chosen):
                        continue
                    began = time.monotonic()
                    kept = run_one(workload, server, client, device)
                    recorded = workload in chosen and server.kind.measures(workload)
                    if recorded or kept.get("failed"):
                        keeper.add({"workload": workload.name, "server": name, "round": round_number, **kept})
                    say(round_number, workload, name, kept, time.monotonic() - began)
            if not options.keep:
                for server in everyone.values():
                    server.wipe()
    if options.results:
        options.results.write_text(results.page(keeper.head, keeper.records))
    print(f"raw figures: {keeper.path}")


def say(round_number, workload, name, kept, seconds):
    """One line of progress: what was found, and how long all of it took."""
    if kept.get("failed"):
        text = f"FAILED: {kept['failed']}\n{kept['log']}"
    else:
        cpu = kept.get("cpu_us_per_operation")
        text = f"{kept.get('rate', 0):9.0f}/s {cpu or 0:9.1f} us"
        if workload.holds:
            text += f" {kept['anonymous_bytes_each'] / 1024:.1f} KB each"
        if kept["errors"]:
            text += f" {kept['errors']} errors: {kept['first_error']}"
    print(f"{round_number} {workload.name:18} {name:24} {seconds:5.1f} s {text}", flush=True)


def programs_of(options):
    return servers.Programs(options.posthaste, options.dovecot, options.cyrus_root)


def server_of(options, name):
    return servers.Server(servers.KINDS[name], options.scratch, programs_of(options), options.port_base)


def start(options):
    options.scratch.mkdir(parents=True, exist_ok=True)
    options.scratch.chmod(0o755)
    server = server_of(options, options.server)
    if not server.store.exists():
        server.fresh(workloads.all_users())
    server.start()
    for protocol in server.ports:
        print(f"{protocol} {server.address(protocol)}")
    print(f"users user1@{servers.DOMAIN} to user{workloads.USERS}@{servers.DOMAIN}, password {servers.PASSWORD}")


def stop(options):
    for name in [options.server] if options.server else list(servers.KINDS):
        server = server_of(options, name)
        if (server.directory / "pid").exists():
            server.stop()
        if options.wipe:
            server.wipe()


def report(options):
    head, records = read_records(options.raw)
    options.results.write_text(results.page(head, records))


def names(known):
    """An option that is a list of names."""

    def parse(text):
        given = text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(known)}")
        return given

    return parse


def arguments():
    built = REPOSITORY / "target/release"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posthaste", type=pathlib.Path, default=built / "posthaste", help="the server")
    parser.add_argument("--dovecot", type=pathlib.Path, default="/usr/sbin/dovecot", help="Dovecot's master")
    parser.add_argument("--cyrus-root", type=pathlib.Path, default=REPOSITORY / "target/peers/cyrus", help="where Cyrus is unpacked")
    place = pathlib.Path(tempfile.gettempdir()) / meter.CGROUP_NAME
    parser.add_argument("--scratch", type=pathlib.Path, default=place, help="for the stores: a directory of the disk to be measured")
    parser.add_argument("--port-base", type=int, default=24000, help="the first of the loopback ports")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("install", help="install Dovecot and unpack Cyrus")
    command.set_defaults(run=lambda options: install.install(options.cyrus_root))

    command = commands.add_parser("start", help="start one server and leave it running")
    command.add_argument("server", choices=list(servers.KINDS))
    command.set_defaults(run=start)

    command = commands.add_parser("stop", help="stop one server, or all")
    command.add_argument("server", nargs="?", choices=list(servers.KINDS))
    command.add_argument("--wipe", action="store_true", help="remove its store too")
    command.set_defaults(run=stop)

    command = commands.add_parser("run", help="measure")
    command.add_argument("--servers", type=names(servers.KINDS), default=list(servers.KINDS), metavar="A,B,...")
    command.add_argument("--workloads", type=names(workloads.WORKLOADS), default=list(workloads.WORKLOADS), metavar="A,B,...")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--seconds", type=float, default=5.0, help="of each run, where it has no number of messages")
    command.add_argument("--corpus", type=pathlib.Path, required=True, help="mail, as posthaste-bench takes it")
    command.add_argument("--every", type=int, default=1, metavar="N", help="take each Nth message of the corpus, a directory")
    command.add_argument("--client", type=pathlib.Path, default=built / "posthaste-bench", help="the load generator")
    command.add_argument("--commit", help="what the server was built from, if it is not the last commit before its file's time")
    command.add_argument("--remark", action="append", default=[], help="what a reader should know, for example what else ran")
    raw = pathlib.Path(tempfile.gettempdir()) / f"peers-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    command.add_argument("--raw", type=pathlib.Path, default=raw, help="where the raw figures go, one run a line")
    command.add_argument("--results", type=pathlib.Path, help="the page to write, for example bench/RESULTS.md")
    command.add_argument("--keep", action="store_true", help="keep the stores of the last round")
    command.set_defaults(run=run)

    command = commands.add_parser("report", help="write the page again from raw figures")
    command.add_argument("raw", type=pathlib.Path, nargs="+", help="files of one or several runs, whose rounds are added")
    command.add_argument("--results", type=pathlib.Path, default=REPOSITORY / "bench/RESULTS.md")
    command.set_defaults(run=report)
    return parser.parse_args()


def main():
    options = arguments()
    # An end that is asked for stops the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run.py: stopped"))
    try:
        options.run(options)
    except (servers.ServerError, measure.ClientError, meter.MeterError, subprocess.CalledProcessError) as error:
        sys.exit(f"run.py: {error}")


if __name__ == "__main__":
    main()
