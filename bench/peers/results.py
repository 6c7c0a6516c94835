"""Writes what was measured as a Markdown page."""

import figures
import servers
import workloads

# Others that used more of a core than this while a server was measured disturbed its rate.
NOISE_CORES = 0.25
# A client that used more of a core than this may be what limited the rate.
CLIENT_SHARE = 0.8
# Rounds whose CPU per operation differ by more than this factor are called uneven.
UNEVEN = 1.3
# A larger share of flushes by other programs is mentioned.
FOREIGN_FLUSHES = 0.05
OURS = "posthaste"
PEER = "dovecot"


def number(value, digits=3):
    """A number with so many digits that count, and thousands apart."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    magnitude = abs(value)
    decimals = 0
    while magnitude < 10 ** (digits - 1) and decimals < 3:
        magnitude *= 10
        decimals += 1
    return f"{value:,.{decimals}f}"


def shown(spread, scale=1.0, digits=3):
    """A median with the smallest and the largest."""
    if spread is None:
        return "-"
    low, high = number(spread.low / scale, digits), number(spread.high / scale, digits)
    return f"{number(spread.median / scale, digits)} ({low}–{high})"


def times(spread):
    """A ratio."""
    return "-" if spread is None else f"{number(spread.median, 2)} ({number(spread.low, 2)}–{number(spread.high, 2)})"


def table(heads, rows):
    """Numbers go to the right, the first column to the left."""
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def peers_of(runs, workload):
    return [server for server in runs.servers(workload) if servers.KINDS[server].family == PEER]


def first_field(workload):
    """What servers are compared by."""
    return "anonymous_bytes_each" if workloads.WORKLOADS[workload].holds else "cpu_us_per_operation"


def own_servers(runs, workload):
    return [server for server in runs.servers(workload) if servers.KINDS[server].family == OURS]


def summary(runs):
    """One line for each workload and own server: beside it the best Dovecot, and Cyrus."""
    rows = []
    for workload in runs.workloads():
        field = first_field(workload)
        best = runs.least(workload, field, peers_of(runs, workload))
        fastest = runs.most(workload, "rate", peers_of(runs, workload))
        for server in own_servers(runs, workload):
            own = runs.spread(workload, server, field)
            cyrus = runs.spread(workload, "cyrus", field)
            fixed = workloads.WORKLOADS[workload].has_fixed_rate
            variant = server.removeprefix(OURS).replace("-", ", ")
            rows.append(
                [
                    f"[{workload}](#{workload}){variant}",
                    "memory, octets" if field == "anonymous_bytes_each" else "CPU, us",
                    number(own.median if own else None),
                    f"{number(runs.spread(workload, best, field).median)} ({best.removeprefix('dovecot-')})" if best else "-",
                    times(runs.ratio(workload, field, best, server)) if best else "-",
                    times(runs.ratio(workload, "rate", server, fastest)) if fastest and not fixed else "-",
                    number(cyrus.median if cyrus else None),
                    times(runs.ratio(workload, field, "cyrus", server)),
                ]
            )
    heads = ["workload", "per operation", "Posthaste", "best Dovecot", "Dovecot / Posthaste", "rate: Posthaste / fastest Dovecot"]
    return table(heads + ["Cyrus", "Cyrus / Posthaste"], rows)


def stored(runs):
    rows = []
    for server in runs.servers("deliver"):
        good = [record for record in runs.good("deliver", server) if record.get("stored")]
        received = [record["received_bytes"] for record in good]
        rows.append(
            [
                server,
                shown(figures.spread([record["stored"]["used"] / octets for record, octets in zip(good, received)])),
                shown(figures.spread([record["stored"]["allocated"] / octets for record, octets in zip(good, received)])),
                number(figures.spread([record["stored"]["files"] for record in good]).median) if good else "-",
            ]
        )
    return table(["server", "stored per octet received", "with reserved space", "files"], rows)


def details(runs, workload):
    """The table of one workload."""
    kind = workloads.WORKLOADS[workload]
    rows = []
    for server in runs.servers(workload):
        failed = [record for record in runs.of(workload, server) if record.get("failed")]
        if failed and not runs.good(workload, server):
            rows.append([server, "failed"])
            continue

        def of(field, scale=1.0, server=server):
            return shown(runs.spread(workload, server, field), scale)

        if kind.holds:
            memory = [of("anonymous_bytes_each", 1024), of("kernel_bytes_each", 1024)]
            rows.append([server, *memory, of("cpu_us_per_operation"), of("idle_cores")])
            continue
        row = [server, of("rate"), of("cpu_us_per_operation"), of("p50_us"), of("p99_us")]
        row += [of("flushes_per_operation")] if kind.writes else []
        row += [of("written_per_byte")] if kind.takes_mail else []
        rows.append([*row, of("client_cpu_share"), of("cost.others_cores")])
    if kind.holds:
        heads = ["server", "anonymous KB each", "kernel KB each", "CPU us per login", "cores while idle"]
    else:
        heads = ["server", "rate /s", "CPU us each", "p50 us", "p99 us"]
        heads += ["flushes each"] if kind.writes else []
        heads += ["written per octet"] if kind.takes_mail else []
        heads += ["client, cores", "others, cores"]
    return table(heads, [row + ["-"] * (len(heads) - len(row)) for row in rows])


def told(runs, workload):
    """What an operation came to with each server, as the client counted it: the same, if they did the same."""
    said = []
    for name in workloads.WORKLOADS[workload].tells:
        found = {}
        for server in runs.servers(workload):
            each = [(record.get("counts") or {}).get(name, 0) / record["operations"] for record in runs.good(workload, server)]
            if each:
                found.setdefault(number(figures.spread(each).median, 2), []).append(server)
        if len(found) == 1:
            said.append(f"{name} {next(iter(found))}")
        elif found:
            said.append(f"{name} " + ", ".join(f"{figure} ({', '.join(those)})" for figure, those in found.items()))
    return said


def remarks(runs, workload, ran=()):
    """What a reader should know before believing the figures. `ran` are the servers that were measured at all."""
    said = []
    for family, reason in workloads.WORKLOADS[workload].lacking.items():
        lacking = [server for server in ran if servers.KINDS[server].family == family and servers.KINDS[server].only is None]
        if lacking:
            said.append(f"Not with {', '.join(lacking)}: {reason}.")
    if counted := told(runs, workload):
        said.append(f"The client counted, for each operation: {'; '.join(counted)}.")
    bound = [
        server
        for server in runs.servers(workload)
        if (share := runs.spread(workload, server, "client_cpu_share")) and share.median > CLIENT_SHARE
    ]
    if bound:
        said.append(f"The client was the limit, or near it, with {', '.join(bound)}: rates and latencies are its own, CPU is the server's.")
    noisy = [
        server
        for server in runs.servers(workload)
        if (others := runs.spread(workload, server, "cost.others_cores")) and others.median > NOISE_CORES
    ]
    if noisy:
        many = "all servers" if noisy == runs.servers(workload) else ", ".join(noisy)
        said.append(f"Other programs used more than {NOISE_CORES} cores with {many}: rates and latencies could be better.")
    uneven = [
        server
        for server in runs.servers(workload)
        if (spread := runs.spread(workload, server, first_field(workload))) and spread.high > spread.low * UNEVEN
    ]
    if uneven:
        said.append(f"Uneven rounds: {', '.join(uneven)}.")
    shares = {
        server: figures.spread([foreign_flushes(record) for record in runs.good(workload, server)])
        for server in runs.servers(workload)
    }
    foreign = [f"{server} about {share.median:.0%}" for server, share in shares.items() if share and share.median > FOREIGN_FLUSHES]
    if foreign:
        said.append(f"By what the device did just before, some of the flushes were made by other programs: {', '.join(foreign)}.")
    for server in runs.servers(workload):
        errors = sum(record.get("errors") or 0 for record in runs.of(workload, server))
        if errors:
            first = next(record["first_error"] for record in runs.of(workload, server) if record.get("first_error"))
            said.append(f"{server}: {errors} errors in all rounds, which are in no figure; the first: `{first}`.")
        for record in runs.of(workload, server):
            if record.get("failed"):
                said.append(f"{server}: round {record['round']} could not be run: `{record['failed']}`.")
    return said


def foreign_flushes(record):
    """The share of a run's flushes that other programs' would be, had they gone on as before it."""
    counted, each_second = figures.value(record, "cost.device_flushes"), figures.value(record, "background.device_flushes")
    if not counted or each_second is None:
        return None
    return min(1.0, each_second * record["cost"]["metered_seconds"] / counted)


def command_of(runs, workload, corpus):
    """The client's command line, without this machine's places."""
    for record in runs.records:
        if record["workload"] == workload and record["server"] == OURS and record.get("command"):
            return command(record["command"], corpus)
    return None


def command(line, corpus):
    words = []
    for word in line:
        if word == corpus:
            word = "CORPUS"
        words.append(f"'{word}'" if set(word) & set(" [](){}") else word)
    return " ".join(["posthaste-bench", *words])


PAGE = """# Results beside Dovecot and Cyrus

Made by `bench/peers/run.py`, which says how under "Peers" in [docs/benchmarking.md](../docs/benchmarking.md). Nothing here is typed in.

{machine}

## How it was done

- The servers ran the same workloads **in alternation**: each workload against one server after another, then the next workload;
  {rounds} rounds, in each of which another server came first. Only the server that was measured ran. It was started for each
  measurement, and warmed up with the same load.
- In each round every server began with an empty store, which the workload `deliver` filled with the same messages in the same order.
  What is read was written shortly before: **the page cache is warm** for all.
- **CPU** is that of a control group which holds all processes of the server from its start on, with the kernel's work on their
  behalf, from just before the client starts to just after it ends. Where the client opens its connections before its clock starts, the CPU
  for opening and closing them is measured separately and taken off. Where it also fills mailboxes or asks for what it compares with
  (searches, changes of flags, APPEND, MOVE, EXPUNGE, `resync`, `hot`), it reads the counters of CPU and device itself, from the start
  of its clock until the last LOGOUT. CPU is what depends least on this machine's other work. The kernel's threads that write back to
  the device belong to no server.
- **The client checks** what it is told: that flags are as they were set, that what is moved arrives, that a search and its opposite
  find all messages, that bodies are as large as RFC822.SIZE says. What is wrong is an error and in no figure. Below some tables stands
  what the client counted for each operation, which shows whether the servers did the same.
- **Device** figures are of the whole device, and other programs write to it too. Written octets include what is written back after
  the run, flushes do not.
- **Caches**: every server has those that it has by default. Posthaste keeps what it has read decompressed in memory, up to 64 MB a
  shard, which is more than the mailboxes have here. `posthaste-uncached` does without.
- **Logs** are as they come: Dovecot writes logins and deliveries to a file, Cyrus to syslog if there is one, Posthaste neither.
- **Passwords** are compared as they are by Dovecot and Cyrus; Posthaste checks an Argon2id hash of the lowest cost.
- **TLS** is used by `fetch-bodies-tls`, `handshakes` and `handshakes-resumed` alone: with all servers versions 1.2 and 1.3, of which the
  client takes 1.3, AES-256-GCM and X25519, and the same certificate (ECDSA, P-256).
- Every account has an INBOX alone, but for what a workload makes: `resync`, `move` and `expunge` do. What one workload changes, no other
  reads. The client uses one core at most, of the same machine.
- **SMTP** is measured with Posthaste alone: Dovecot and Cyrus take mail for their users by LMTP.
- **Flags**: only some servers sync a change of flags before the reply, see [servers](#servers) and the column "flushes each".
- Figures are medians of the rounds, with the smallest and the largest in parentheses. **Ratios** are medians of the ratios within each
  round. "Best" is the Dovecot with the smallest median of that line.

{summary}

## Servers

{servers}

{space}{workloads}
"""


SPACE = """## Space

After `deliver` and a stop, blocks of files and directories together. Posthaste keeps a reserve of 64 MB a shard, which is not
written: the first figure is without such space.

{stored}

"""


def page(header, records):
    """The whole page."""
    runs = figures.Runs(records)
    thinned = f" (each {header['every']}th of a larger one, by name)" if header.get("every", 1) > 1 else ""
    machine = [
        f"- Date: {header['date']}",
        f"- Machine: {header['cpu']}, {header['cores']} cores, {header['memory_gb']} GB; {header['kernel']}",
        f"- Disk: {header['disk']}",
        f"- Corpus: {header['corpus_messages']:,} messages, {header['corpus_bytes']:,} octets{thinned}" if "corpus_bytes" in header else "",
        f"- Rounds: {runs.rounds()}, of {header['seconds']} s where a workload has no number of messages",
        f"- Load generator: posthaste-bench {header.get('client_version', 'of unknown version')}",
    ]
    machine += [f"- {remark}" for remark in header.get("remarks", [])]
    ran = list(dict.fromkeys([*header.get("servers", []), *runs.servers()]))
    sections = []
    for workload in runs.workloads():
        parts = [f"## {workload}", f"An operation is {workloads.WORKLOADS[workload].what}.", details(runs, workload)]
        parts += ["\n".join(f"- {remark}" for remark in said)] if (said := remarks(runs, workload, ran)) else []
        if line := command_of(runs, workload, header["corpus"]):
            parts.append(f"```sh\n{line}\n```")
        sections.append("\n\n".join(parts))
    used = [servers.KINDS[name] for name in runs.servers()]
    rows = []
    for kind in used:
        links = ", ".join(f"[{name}](peers/{name})" for name in kind.configuration)
        rows.append([kind.name, header["versions"][kind.family], links, kind.durability, kind.why_only or "All."])
    # Text, not numbers.
    heads = ["server", "version", "settings", "what is durable at the 250, and how", "measured with"]
    servers_table = table(heads, rows).replace("---:", "---")
    return PAGE.format(
        machine="\n".join(line for line in machine if line),
        rounds=runs.rounds(),
        summary=summary(runs),
        servers=servers_table,
        space=SPACE.format(stored=stored(runs)) if "deliver" in runs.workloads() else "",
        workloads="\n\n".join(sections),
    )
