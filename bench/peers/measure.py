"""Runs one workload against one server and says what it cost."""

import json
import os
import statistics
import subprocess
import threading
import time

import meter
import workloads

# Beyond what the workload itself takes: slow deliveries of a whole corpus, logins, the end.
CLIENT_SECONDS_MAX = 400
# Between two looks at the memory while connections are held.
SAMPLE_SECONDS = 0.1
# At the beginning and end of the time in which connections are held, what is still moving is left out. Hibernation takes 2 s.
HOLD_MARGIN_SECONDS = (5.0, 0.3)


class ClientError(Exception):
    """The load generator could not run."""


class Client:
    """The load generator."""

    def __init__(self, program, words):
        self.program = program
        self.words = words

    def run(self, command, server, options=(), **more):
        """Runs a command line against a server. Returns the report and the command line as it was run, without the `options`."""
        words = dict(self.words, **{protocol: server.address(protocol) for protocol in server.ports}, **more)
        line = workloads.command_line(command, words)
        try:
            ran = subprocess.run(
                [self.program, *line, *options, "--json"], capture_output=True, text=True, timeout=CLIENT_SECONDS_MAX, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ClientError(f"{' '.join(line)} did not end within {CLIENT_SECONDS_MAX} s") from error
        # 2 says that it ran and counted errors.
        if ran.returncode not in (0, 2):
            raise ClientError(f"{' '.join(line)}: {ran.stderr.strip()}")
        return json.loads(ran.stdout.splitlines()[-1]), line


def sync():
    """Writes out what is dirty, so that one server's leftovers are not counted for the next."""
    os.sync()


def error_count(report):
    errors = report.get("errors", {})
    return errors if isinstance(errors, int) else sum(errors.values())


def measure(workload, server, client, device_name):
    """Runs a workload against a server that runs. Returns what is to be kept, without round and server."""
    if workload.holds:
        return measure_held(workload, server, client)
    received = 0
    if workload.mail:
        client.run(workload.mail, server)
    if workload.warm_up:
        report, _ = client.run(workload.warm_up, server)
        received += report["bytes"]
        if workload.fills:
            client.words.update(filled_words(report))
    if workload.opens_before:
        # What is made for the first connections, processes above all, is there before the run.
        client.run(workloads.opening(workload.command), server)
    reader = meter.Meter(server.group, device_name)
    sync()
    background = reader.background() if workload.writes else None
    before = reader.read()
    report, line = client.run(workload.command, server, own_meter(server, device_name) if workload.sets_up else ())
    after = reader.read()
    cost = meter.between(before, after)
    if workload.sets_up:
        cost.update(metered_by_client(report))
    if device_name:
        # What is written back later was written for this run too; flushes for that are not the server's.
        sync()
        cost["device_written_bytes"] += reader.read().device.written_bytes - after.device.written_bytes
    opening = 0.0
    if workload.opens_before:
        opening = opening_cpu_seconds(workload, server, client, reader)
    kept = figures(report, cost, opening)
    kept["command"] = line
    if background:
        # Per second, of other programs: what the device did while the server had nothing to do.
        kept["background"] = background
    if not workload.writes:
        kept.pop("flushes_per_operation", None)
    if not workload.takes_mail:
        kept.pop("written_per_byte", None)
    if workload.fills:
        kept["received_bytes"] = received + report["bytes"]
    return kept


def own_meter(server, device_name):
    """Options by which the client reads the server's counters itself."""
    options = ["--server-cgroup", str(server.group.directories["cpuacct"])]
    return options + (["--device", device_name] if device_name else [])


def metered_by_client(report):
    """What the client saw between the start of its clock and the end of its connections."""
    cost = report["cost"]
    seen = {"metered_seconds": report["seconds"], "server_cpu_seconds": cost["server_cpu_s"]}
    names = ("device_flushes", "device_written_bytes", "device_read_bytes")
    return seen | {name: cost[name] for name in names if name in cost}


def filled_words(report):
    """What is known of the corpus once the client has read it."""
    count = report["parameters"]["mail_messages"]
    # The warm-up delivers one to each user.
    most = -(-count // workloads.USERS) + 1
    return {"corpus_messages": count, "mailbox_messages": most, "all_messages": most * workloads.USERS}


def opening_cpu_seconds(workload, server, client, reader):
    """What the server's CPU does for connections that are opened, hardly used and closed."""
    before = reader.read()
    client.run(workloads.opening(workload.command), server)
    return reader.read().server_cpu - before.server_cpu


def figures(report, cost, opening):
    """The figures of a run from the client's report and what the meter saw."""
    operations = report["operations"]
    kept = {
        "operations": operations,
        "bytes": report["bytes"],
        "seconds": report["seconds"],
        "rate": report["rate"],
        "p50_us": report["latency_us"]["p50"],
        "p99_us": report["latency_us"]["p99"],
        "client_cpu_share": report["client_cpu_share"],
        "client_bound": report["client_bound"],
        "errors": error_count(report),
        "error_kinds": report["errors"],
        "first_error": report.get("first_error"),
        "counts": report.get("counts", {}),
        "opening_cpu_seconds": opening,
        "cost": cost,
        "client_version": report["version"],
    }
    if operations:
        kept["cpu_us_per_operation"] = (cost["server_cpu_seconds"] - opening) * 1e6 / operations
        if "device_flushes" in cost:
            kept["flushes_per_operation"] = cost["device_flushes"] / operations
            kept["written_per_byte"] = cost["device_written_bytes"] / max(report["bytes"], 1)
    return kept


class Sampler(threading.Thread):
    """Reads a group's memory and CPU again and again."""

    def __init__(self, group):
        super().__init__(daemon=True)
        self.group = group
        self.samples = []
        self.over = threading.Event()

    def run(self):
        while not self.over.wait(SAMPLE_SECONDS):
            self.samples.append((time.monotonic(), self.group.memory(), self.group.cpu_seconds()))

    def end(self):
        self.over.set()
        self.join()


def measure_held(workload, server, client):
    """Memory of the smaller and the larger number of connections, while nothing happens."""
    levels = []
    for connections in workloads.IDLE_CONNECTIONS:
        sampler = Sampler(server.group)
        cpu_before = server.group.cpu_seconds()
        sampler.start()
        report, line = client.run((*workload.command, str(connections)), server, pid=server.main_process())
        ended = time.monotonic()
        sampler.end()
        levels.append(held(sampler.samples, ended, report["connections"], cpu_before))
        levels[-1]["errors"] = error_count(report)
        levels[-1]["first_error"] = report.get("first_error")
    few, many = levels
    more = many["connections"] - few["connections"]
    if more <= 0:
        raise ClientError(f"only {many['connections']} connections reached IDLE: {many['first_error']}")
    return {
        "operations": many["connections"],
        "anonymous_bytes_each": (many["anonymous"] - few["anonymous"]) / more,
        "kernel_bytes_each": (many["kernel"] - few["kernel"]) / more,
        "cpu_us_per_operation": many["opening_cpu_seconds"] * 1e6 / many["connections"],
        "idle_cores": many["cores"],
        "errors": few["errors"] + many["errors"],
        "first_error": many["first_error"] or few["first_error"],
        "client_version": report.get("version"),
        "levels": levels,
        "command": line,
    }


def held(samples, ended, connections, cpu_before):
    """Medians of the samples from the time in which all connections were held."""
    begin = ended - workloads.IDLE_HOLD_SECONDS + HOLD_MARGIN_SECONDS[0]
    end = ended - HOLD_MARGIN_SECONDS[1]
    window = [sample for sample in samples if begin <= sample[0] <= end]
    if len(window) < 3:
        raise ClientError(f"only {len(window)} samples of the memory could be taken: the machine is too busy")
    return {
        "connections": connections,
        "anonymous": statistics.median(memory.anonymous for _, memory, _ in window),
        "kernel": statistics.median(memory.kernel for _, memory, _ in window),
        "opening_cpu_seconds": window[0][2] - cpu_before,
        "cores": (window[-1][2] - window[0][2]) / (window[-1][0] - window[0][0]),
    }

