"""Tests of what is computed: python3 -m unittest discover bench/peers."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import figures
import install
import measure
import meter
import results
import run
import servers
import workloads


def record(workload, server, round_number, **more):
    return {"workload": workload, "server": server, "round": round_number, "operations": 1, "errors": 0, **more}


class Figures(unittest.TestCase):
    def test_the_median_has_its_extremes(self):
        self.assertEqual(figures.spread([3, 1, None, 2]), figures.Spread(2, 1, 3, 3))
        self.assertEqual(figures.spread([1, 2]).median, 1.5)
        self.assertIsNone(figures.spread([None]))

    def test_ratios_are_of_the_same_round(self):
        # Everything takes twice as long in round 2: the ratio does not change.
        runs = figures.Runs(
            [
                record("w", "a", 1, cost={"x": 10}),
                record("w", "b", 1, cost={"x": 2}),
                record("w", "a", 2, cost={"x": 20}),
                record("w", "b", 2, cost={"x": 4}),
                record("w", "a", 3, cost={"x": 9}),
            ]
        )
        self.assertEqual(runs.ratio("w", "cost.x", "a", "b"), figures.Spread(5, 5, 5, 2))
        self.assertIsNone(runs.ratio("w", "cost.x", "a", "nobody"))
        self.assertEqual(runs.spread("w", "a", "cost.x"), figures.Spread(10, 9, 20, 3))
        self.assertEqual((runs.least("w", "cost.x", ["a", "b", "c"]), runs.most("w", "cost.x", ["a", "b"])), ("b", "a"))

    def test_failed_runs_are_in_no_figure(self):
        runs = figures.Runs(
            [record("w", "a", 1, failed="no", rate=1), record("w", "a", 2, rate=5), dict(record("w", "a", 3, rate=0), operations=0)]
        )
        self.assertEqual(runs.spread("w", "a", "rate"), figures.Spread(5, 5, 5, 1))
        self.assertEqual((runs.rounds(), runs.servers("w"), runs.workloads()), (3, ["a"], ["w"]))


class Meter(unittest.TestCase):
    def test_both_versions_of_control_groups_are_found(self):
        first = "cgroup /sys/fs/cgroup/cpuacct cgroup rw,cpuacct 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n"
        self.assertEqual(meter.mounts(first), {"cpuacct": "/sys/fs/cgroup/cpuacct", "memory": "/sys/fs/cgroup/memory"})
        together = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n"
        self.assertEqual(meter.mounts(together), {"cpuacct": "/sys/fs/cgroup/cpu,cpuacct"})
        self.assertEqual(meter.mounts("cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0"), {"": "/sys/fs/cgroup"})
        own = meter.own_groups("4:memory:/a/b\n2:cpu,cpuacct:/c\n0::/d\n")
        self.assertEqual(own, {"memory": "/a/b", "cpu": "/c", "cpuacct": "/c", "": "/d"})

    def test_a_group_is_read_in_both_versions(self):
        with tempfile.TemporaryDirectory() as place:
            directory = pathlib.Path(place)
            (directory / "cgroup.procs").write_text("12\n13\n")
            (directory / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
            (directory / "memory.stat").write_text("anon 4096\nfile 1\nkernel 512\n")
            group = meter.Group(dict.fromkeys(("cpuacct", "memory"), directory), 2)
            self.assertEqual((group.cpu_seconds(), group.memory()), (2.5, meter.Memory(4096, 512)))
            self.assertEqual((group.processes(), group.entrances()), ([12, 13], [str(directory / "cgroup.procs")]))
            (directory / "cpuacct.usage").write_text("1500000000\n")
            (directory / "memory.stat").write_text("rss 1\ntotal_rss 8192\n")
            (directory / "memory.kmem.usage_in_bytes").write_text("1024\n")
            group = meter.Group(dict.fromkeys(("cpuacct", "memory"), directory), 1)
            self.assertEqual((group.cpu_seconds(), group.memory()), (1.5, meter.Memory(8192, 1024)))
            self.assertRaises(meter.MeterError, meter.counter, "a 1\n", "b")

    def test_the_device_is_read(self):
        line = " 254  0 vda 417265 15305 19582994 268401 29796 66518 2005 76982 0 26176 353590 25560 85 16221168 6814 2671 1392\n"
        expected = meter.Device(written_bytes=2005 * 512, flushes=2671, read_bytes=19582994 * 512)
        self.assertEqual(meter.parse_diskstats(line, "vda"), expected)
        self.assertRaises(meter.MeterError, meter.parse_diskstats, line, "vd")

    def test_others_have_what_is_left_of_the_cpu(self):
        self.assertEqual(meter.busy_seconds("cpu  100 20 30 999 999 1 2 3 50 60\ncpu0 1\n", 100), 1.56)
        before = meter.Moment(at=10, server_cpu=1, client_cpu=2, busy=100, device=meter.Device(100, 5, 7))
        after = meter.Moment(at=14, server_cpu=3, client_cpu=3, busy=109, device=meter.Device(300, 9, 7))
        cost = meter.between(before, after)
        self.assertEqual((cost["server_cpu_seconds"], cost["client_cpu_seconds"], cost["others_cores"]), (2, 1, 1.5))
        self.assertEqual((cost["device_flushes"], cost["device_written_bytes"], cost["device_read_bytes"]), (4, 200, 0))
        self.assertEqual(meter.per_second(cost)["device_written_bytes"], 50)
        idle = meter.between(before, meter.Moment(at=11, server_cpu=2, client_cpu=2, busy=100.9, device=None))
        self.assertEqual((idle["others_cores"], "device_flushes" in idle), (0.0, False))

    def test_reserved_space_is_no_data(self):
        place = pathlib.Path(__file__).parent
        if meter.device_of(place) is None:
            self.skipTest("only a file system on a device reserves space without writing it")
        with tempfile.TemporaryDirectory(dir=place) as place:
            with open(f"{place}/log", "wb") as file:
                file.write(b"x" * 10_000)
                file.flush()
                os.posix_fallocate(file.fileno(), 0, 1 << 20)
                os.fsync(file.fileno())
            os.link(f"{place}/log", f"{place}/again")
            found = meter.stored(place)
            directory = os.lstat(place).st_blocks * 512
            self.assertEqual(found, meter.Stored(allocated=(1 << 20) + directory, used=12288 + directory, files=1))


class Servers(unittest.TestCase):
    def test_configurations_are_filled_in(self):
        self.assertEqual(servers.fill_in("a@B_C@:@D1@ user@example.org", {"B_C": 1, "D1": "x"}), "a1:x user@example.org")
        self.assertRaises(servers.ServerError, servers.fill_in, "@NO@", {})

    def test_every_server_can_be_configured(self):
        programs = servers.Programs(pathlib.Path("p"), pathlib.Path("d"), pathlib.Path("c"))
        ports = []
        for kind in servers.KINDS.values():
            server = servers.Server(kind, pathlib.Path("scratch"), programs, 24000)
            for name in kind.configuration:
                servers.fill_in((servers.HERE / name).read_text(), server._words())
            ports += server.ports.values()
            self.assertLessEqual(kind.only or set(), set(workloads.WORKLOADS))
            self.assertEqual(bool(kind.only), bool(kind.why_only))
        self.assertEqual(len(ports), len(set(ports)))

    def test_smtp_is_only_where_it_is_served(self):
        programs = servers.Programs(pathlib.Path("p"), pathlib.Path("d"), pathlib.Path("c"))
        for kind in servers.KINDS.values():
            ports = servers.Server(kind, pathlib.Path("scratch"), programs, 24000).ports
            self.assertEqual("smtp" in ports, kind.family == "posthaste")
            for workload in filter(kind.measures, workloads.WORKLOADS.values()):
                words = " ".join(workload.command)
                self.assertFalse("{smtp}" in words and "smtp" not in ports, f"{workload.name} with {kind.name}")

    def test_a_server_runs_what_it_is_measured_with_and_what_that_needs(self):
        table = workloads.WORKLOADS
        always, zstd = servers.KINDS["dovecot-sdbox-always"], servers.KINDS["dovecot-mdbox-zstd"]
        chosen = [table["search-body"], table["flags-one"], table["deliver-4k-smtp"]]
        steps = [workload.name for workload in run.steps_of(chosen)]
        self.assertEqual(steps, ["deliver-shared", "search-body", "flags-one", "deliver-4k-smtp"])
        self.assertTrue(always.runs(table["deliver-shared"], chosen))
        self.assertFalse(always.measures(table["deliver-shared"]))
        self.assertFalse(always.runs(table["search-body"], chosen))
        self.assertEqual((zstd.runs(table["flags-one"], chosen), zstd.runs(table["search-body"], chosen)), (False, True))
        self.assertFalse(servers.KINDS["cyrus"].runs(table["deliver-4k-smtp"], chosen))
        self.assertTrue(servers.KINDS["posthaste"].runs(table["deliver-4k-smtp"], chosen))

    def test_what_is_left_of_a_dovecot_is_told_by_names(self):
        self.assertTrue(servers.is_left_alone([]))
        self.assertFalse(servers.is_left_alone([os.getpid()]))

    def test_only_what_cyrus_needs_is_installed(self):
        text = "adduser, cyrus-common (= 3), default-mta | mail-transport-agent, libc6 (>= 2), libpq5 | x, libc6, perl:any"
        self.assertEqual(install.dependencies(text), ["libc6", "libpq5"])


class Measure(unittest.TestCase):
    def test_every_command_line_can_be_filled_in(self):
        words = dict(corpus="c", corpus_messages=9, mailbox_messages=3, all_messages=6, seconds=1, warm_seconds=1, push_seconds=2, pid=7)
        words.update(dict.fromkeys(servers.PROTOCOLS, "a"))
        for workload in workloads.WORKLOADS.values():
            for command in filter(None, (workload.command, workload.warm_up, workload.mail)):
                line = workloads.command_line(command, words)
                self.assertFalse([word for word in line if "{{" in word])
        line = workloads.command_line(workloads.WORKLOADS["push"].command, words)
        self.assertIn("idler{n}@example.org", line)

    def test_opening_does_the_least(self):
        line = workloads.opening(("fetch", "--item", "BODY[]", "--seconds", "5", "--batch", "20", "--connections", "2"))
        self.assertEqual(line, ("fetch", "--connections", "2", "--item", "FLAGS", "--batch", "1", "--messages", "1"))
        self.assertEqual(workloads.opening(("push", "--messages", "9")), ("push", "--messages", "1"))

    def test_opening_keeps_tls(self):
        line = workloads.opening(workloads.WORKLOADS["fetch-bodies-tls"].command)
        self.assertEqual((line[1:4], line[-6:]), (("--imap", "{imaps}", "--tls"), ("--item", "FLAGS", "--batch", "1", "--messages", "1")))

    def test_the_client_meters_where_it_sets_up(self):
        report = dict(seconds=2.0, cost=dict(server_cpu_s=0.5, device_flushes=3, client_cpu_s=1))
        self.assertEqual(measure.metered_by_client(report), dict(metered_seconds=2.0, server_cpu_seconds=0.5, device_flushes=3))

    def test_opening_is_taken_off(self):
        report = dict(operations=100, bytes=5000, seconds=2.0, rate=50.0, latency_us={"p50": 1, "p99": 2}, errors={"a": 1, "b": 2})
        report.update(client_cpu_share=0.5, client_bound=False, version="1", first_error="e")
        cost = dict(server_cpu_seconds=1.5, device_flushes=50, device_written_bytes=10000)
        kept = measure.figures(report, cost, opening=0.5)
        self.assertEqual((kept["cpu_us_per_operation"], kept["errors"]), (10_000, 3))
        self.assertEqual((kept["flushes_per_operation"], kept["written_per_byte"]), (0.5, 2))
        self.assertNotIn("cpu_us_per_operation", measure.figures(dict(report, operations=0), cost, opening=0.5))

    def test_memory_is_taken_while_all_is_quiet(self):
        samples = [(at / 10, meter.Memory(at if 30 <= at <= 57 else 10**9, 1), at / 100) for at in range(100)]
        kept = measure.held(samples, ended=6.0, connections=4, cpu_before=0.1)
        self.assertEqual((kept["anonymous"], kept["kernel"]), (43.5, 1))
        self.assertAlmostEqual(kept["opening_cpu_seconds"], 0.2)
        self.assertAlmostEqual(kept["cores"], 0.1)
        self.assertRaises(measure.ClientError, measure.held, samples, 60.0, 4, 0)


class Workloads(unittest.TestCase):
    def test_what_is_needed_comes_before(self):
        names = list(workloads.WORKLOADS)
        for workload in workloads.WORKLOADS.values():
            for needed in workload.needs:
                self.assertLess(names.index(needed), names.index(workload.name))
                self.assertFalse(workloads.WORKLOADS[needed].needs)

    def test_what_changes_flags_comes_after_what_reads_the_same_mailboxes(self):
        twins = [workload.name for workload in workloads.WORKLOADS.values() if "deliver-shared" in workload.needs]
        changing = [name for name in twins if name in ("resync", "flags-one", "flags-all")]
        self.assertEqual(twins[-len(changing) :], changing)
        # Nobody writes to the mailboxes that `deliver` fills.
        readers = [workload for workload in workloads.WORKLOADS.values() if "deliver" in workload.needs]
        self.assertFalse([workload.name for workload in readers if workload.writes or workload.command[0] in ("resync", "flags")])

    def test_users_are_known(self):
        users = set(workloads.all_users())
        for workload in workloads.WORKLOADS.values():
            for command in filter(None, (workload.command, workload.warm_up, workload.mail)):
                if "--users" in command:
                    last = command[command.index("--users") + 1].replace("{{n}}", command[command.index("--user-count") + 1])
                    self.assertIn(last, users)


class Results(unittest.TestCase):
    def test_numbers_have_three_digits(self):
        shown = [results.number(value) for value in (0, 0.01234, 1.234, 12.34, 123.4, 1234.5, None)]
        self.assertEqual(shown, ["0", "0.012", "1.23", "12.3", "123", "1,234", "-"])
        self.assertEqual(results.shown(figures.Spread(2, 1, 4, 3)), "2.00 (1.00–4.00)")

    def page(self):
        records = []
        for number in (1, 2, 3):
            for server, cpu in (("posthaste", 100), ("dovecot-sdbox", 2000), ("dovecot-mdbox", 1000), ("cyrus", 3000)):
                cost = {"others_cores": 0.9, "device_flushes": 10, "metered_seconds": 1.0}
                more = dict(cpu_us_per_operation=cpu * number, rate=1e6 / cpu, p50_us=1, p99_us=2, client_cpu_share=0.1, cost=cost)
                more.update(flushes_per_operation=1.5, written_per_byte=0.5, received_bytes=100, bytes=90)
                more.update(stored={"used": 50, "allocated": 200, "files": 3}, command=["deliver", "--corpus", "/secret/mail", "a b"])
                more.update(background={"device_flushes": 5.0})
                records.append(record("deliver", server, number, **more))
        records[-1].update(errors=2, first_error="refused")
        head = dict(date="d", cpu="c", cores=2, memory_gb=4, kernel="k", disk="x", seconds=1, corpus="/secret/mail")
        return results.page(dict(head, versions={"posthaste": "1", "dovecot": "2", "cyrus": "3"}), records)

    def test_the_page_says_what_was_measured(self):
        page = self.page()
        own = "| [deliver](#deliver) | CPU, us | 200 | 2,000 (mdbox) | 10 (10–10) | 10 (10–10) | 6,000 | 30 (30–30) |"
        self.assertIn(own, page)
        self.assertIn("| posthaste | 0.500 (0.500–0.500) | 2.00 (2.00–2.00) | 3.00 |", page)
        self.assertIn("cyrus: 2 errors in all rounds, which are in no figure; the first: `refused`.", page)
        self.assertIn("with all servers", page)
        self.assertIn("of the flushes were made by other programs: posthaste about 50%, dovecot-sdbox about 50%", page)

    def other_page(self, workload, **more):
        records = []
        for server, found in (("posthaste", 67), ("dovecot-sdbox", 67), ("cyrus", 70)):
            if servers.KINDS[server].measures(workloads.WORKLOADS[workload]):
                measured = dict(cpu_us_per_operation=5, rate=9, counts={"messages found": found * 2}, operations=2, **more)
                records.append(dict(record(workload, server, 1), **measured))
        head = dict(date="d", cpu="c", cores=2, memory_gb=4, kernel="k", disk="x", seconds=1, corpus="/secret/mail")
        versions = {"posthaste": "1", "dovecot": "2", "cyrus": "3"}
        ran = ["posthaste", "dovecot-sdbox", "dovecot-sdbox-zstd", "cyrus"]
        return results.page(dict(head, versions=versions, servers=ran), records)

    def test_the_page_says_what_the_client_counted(self):
        page = self.other_page("search-body")
        self.assertIn("- The client counted, for each operation: messages found 67 (posthaste, dovecot-sdbox), 70 (cyrus).", page)
        self.assertNotIn("## Space", page)

    def test_the_page_says_who_cannot_do_it(self):
        page = self.other_page("deliver-4k-smtp")
        self.assertIn("- Not with dovecot-sdbox: it takes mail for its own users by LMTP alone", page)
        self.assertIn("- Not with cyrus: it takes mail by LMTP alone.", page)

    def test_fixed_rates_are_not_compared(self):
        self.assertIn("| [hot](#hot) | CPU, us | 5.00 | 5.00 (sdbox) | 1.0 (1.0–1.0) | - |", self.other_page("hot"))

    def test_columns_are_those_of_the_workload(self):
        self.assertIn("| flushes each | written per octet |", self.other_page("append"))
        page = self.other_page("move")
        self.assertIn("| flushes each | client, cores |", page)
        self.assertIn("| p99 us | client, cores |", self.other_page("resync"))

    def test_the_page_names_no_place_of_this_machine(self):
        page = self.page()
        self.assertIn("posthaste-bench deliver --corpus CORPUS 'a b'", page)
        self.assertNotIn("/secret", page)


class Run(unittest.TestCase):
    def test_another_server_is_first_in_each_round(self):
        self.assertEqual([run.rotated(list("abc"), number) for number in (1, 2, 4)], [list("abc"), list("bca"), list("abc")])

    def test_the_file_system_is_found(self):
        table = "/dev/a / ext4 rw 0 0\ntmpfs /srv tmpfs rw 0 0\n/dev/b /srv/mail xfs rw 0 0\n"
        for path, kind in (("/srv/mail/x", "xfs"), ("/srv/mail", "xfs"), ("/srv/mailing", "tmpfs"), ("/home", "ext4")):
            self.assertEqual(run.file_system(pathlib.Path(path), table), kind)

    def test_rounds_of_several_files_are_added(self):
        with tempfile.TemporaryDirectory() as place:
            paths = []
            for name in ("a", "b"):
                keeper = run.Keeper(pathlib.Path(place) / name, {"date": name})
                keeper.add(record("w", "s", 1))
                keeper.add(record("w", "s", 2))
                paths.append(keeper.path)
            head, records = run.read_records(paths)
        self.assertEqual((head["date"], [record["round"] for record in records]), ("a", [1, 2, 3, 4]))

    def test_a_corpus_is_thinned_by_name(self):
        with tempfile.TemporaryDirectory() as place:
            corpus = pathlib.Path(place) / "corpus"
            (corpus / "sub").mkdir(parents=True)
            for name in ("b.eml", "a.eml", "sub/c.eml", "d.txt"):
                (corpus / name).write_text(name)
            thin = run.thinned(corpus, 2, pathlib.Path(place) / "thin")
            self.assertEqual([path.read_text() for path in sorted(thin.iterdir())], ["a.eml", "sub/c.eml"])

    def test_the_help_can_be_read(self):
        ran = subprocess.run([sys.executable, servers.HERE / "run.py", "--help"], capture_output=True, text=True, check=True)
        self.assertIn("install", ran.stdout)


if __name__ == "__main__":
    unittest.main()
