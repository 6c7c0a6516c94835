"""What a run costs, seen from outside: CPU and memory of a control group, the block device, the rest of the machine.

Control groups are used in version 1 (one hierarchy for each controller) and in version 2 (one for all). Every server runs in a
group of its own, so that all its processes are counted, those that have ended too.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import stat
import time

CGROUP_NAME = "posthaste-peers"
# /proc/diskstats counts sectors of this size whatever the device's.
SECTOR_BYTES = 512
# st_blocks counts in these units whatever the file system's.
STAT_BLOCK_BYTES = 512
# How long processes may take to go after SIGKILL.
KILL_SECONDS_MAX = 20
# How long other programs' use of the device is watched before a run.
BACKGROUND_SECONDS = 0.5


class MeterError(Exception):
    """The machine does not let itself be metered; says what to do."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a group at one moment, in octets."""

    anonymous: int
    # Page tables, stacks, sockets and what else the kernel holds for the processes.
    kernel: int


def mounts(text):
    """The mount points of control groups in `/proc/mounts`: controllers by name for version 1, "" for version 2."""
    found = {}
    for line in text.splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2":
            found.setdefault("", point)
        elif kind == "cgroup":
            for option in options.split(","):
                if option in ("cpuacct", "memory"):
                    found[option] = point
    return found


def own_groups(text):
    """The groups of `/proc/self/cgroup`: paths by controller for version 1, "" for version 2."""
    groups = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = path
    return groups


def counter(text, name):
    """A counter of a file whose lines are names and numbers."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise MeterError(f"the kernel's control group has no {name}")


class Group:
    """A control group with its processes."""

    def __init__(self, directories, version):
        """`directories` has one directory for each controller, `cpuacct` and `memory`, which are the same in version 2."""
        self.directories = directories
        self.version = version

    @classmethod
    def create(cls, name):
        """Makes the group, or finds it again."""
        points = mounts(pathlib.Path("/proc/mounts").read_text())
        own = own_groups(pathlib.Path("/proc/self/cgroup").read_text())
        try:
            if "cpuacct" in points and "memory" in points:
                # Below the own group, whose limits hold for the servers too.
                directories = {
                    controller: pathlib.Path(points[controller] + own.get(controller, "/")) / CGROUP_NAME / name
                    for controller in ("cpuacct", "memory")
                }
                version = 1
            elif "" in points:
                # A group with processes cannot have groups below it that are metered, except for the topmost.
                parent = pathlib.Path(points[""]) / CGROUP_NAME
                parent.mkdir(exist_ok=True)
                for above in (parent.parent, parent):
                    (above / "cgroup.subtree_control").write_text("+cpu +memory")
                directories = dict.fromkeys(("cpuacct", "memory"), parent / name)
                version = 2
            else:
                raise MeterError("no control groups for CPU and memory are mounted: mount cgroup2 on /sys/fs/cgroup")
            for directory in directories.values():
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MeterError(f"cannot make a control group: {error}. Run this as root, outside of a container") from error
        return cls(directories, version)

    def entrances(self):
        """The files into which a process writes 0 to enter the group."""
        return sorted({str(directory / "cgroup.procs") for directory in self.directories.values()})

    def processes(self):
        return [int(line) for line in (self.directories["cpuacct"] / "cgroup.procs").read_text().split()]

    def cpu_seconds(self):
        """CPU time of all processes that are or were in the group."""
        if self.version == 1:
            return int((self.directories["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
        return counter((self.directories["cpuacct"] / "cpu.stat").read_text(), "usage_usec") / 1e6

    def memory(self):
        directory = self.directories["memory"]
        text = (directory / "memory.stat").read_text()
        if self.version == 1:
            kernel = int((directory / "memory.kmem.usage_in_bytes").read_text())
            return Memory(anonymous=counter(text, "total_rss"), kernel=kernel)
        return Memory(anonymous=counter(text, "anon"), kernel=counter(text, "kernel"))

    def kill(self):
        """Kills what is left in the group and waits for its end."""
        deadline = time.monotonic() + KILL_SECONDS_MAX
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise MeterError(f"processes {processes} do not end after SIGKILL")
            time.sleep(0.02)

    def remove(self):
        """Removes the group, in which there must be no process any more."""
        for directory in set(self.directories.values()):
            # The kernel takes a moment to forget the last process.
            deadline = time.monotonic() + KILL_SECONDS_MAX
            while True:
                try:
                    directory.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a block device has done since the system started."""

    written_bytes: int
    flushes: int
    read_bytes: int


def device_of(path):
    """The name of the block device that has `path`, as /proc/diskstats has it, or None: a RAM disk has none."""
    number = os.stat(path).st_dev
    node = pathlib.Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not node.exists():
        return None
    node = node.resolve()
    # Flushes are counted for the whole device, not for a partition.
    return node.parent.name if (node / "partition").exists() else node.name


def parse_diskstats(text, name):
    """The kernel's Documentation/admin-guide/iostats.rst numbers the fields after the name: 3 sectors read, 7 sectors written,
    16 flush requests completed."""
    for line in text.splitlines():
        fields = line.split()
        if fields[2] == name:
            numbers = [int(field) for field in fields[3:]]
            flushes = numbers[15] if len(numbers) > 15 else 0
            return Device(written_bytes=numbers[6] * SECTOR_BYTES, flushes=flushes, read_bytes=numbers[2] * SECTOR_BYTES)
    raise MeterError(f"/proc/diskstats has no device {name}")


def device(name):
    return parse_diskstats(pathlib.Path("/proc/diskstats").read_text(), name)


def busy_seconds(text, ticks_per_second):
    """CPU time that all cores were not idle, from /proc/stat. Time of guests is in that of users."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in text.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


@dataclasses.dataclass(frozen=True)
class Moment:
    """All counters at one moment."""

    at: float
    server_cpu: float
    client_cpu: float
    busy: float
    device: Device | None


class Meter:
    """Reads everything that belongs to one server's run."""

    def __init__(self, group, device_name):
        self.group = group
        self.device_name = device_name

    def read(self):
        children = os.times()
        return Moment(
            at=time.monotonic(),
            server_cpu=self.group.cpu_seconds(),
            # Of children that have ended and been waited for.
            client_cpu=children.children_user + children.children_system,
            busy=busy_seconds(pathlib.Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK")),
            device=device(self.device_name) if self.device_name else None,
        )


    def background(self):
        """What the device does each second while nothing is asked of the server."""
        before = self.read()
        time.sleep(BACKGROUND_SECONDS)
        return per_second(between(before, self.read()))


def per_second(cost):
    """The device's figures of a cost, divided by its time."""
    names = ("device_flushes", "device_written_bytes", "device_read_bytes")
    return {name: cost[name] / cost["metered_seconds"] for name in names if name in cost}


def between(before, after):
    """What happened between two moments."""
    seconds = after.at - before.at
    server, client = after.server_cpu - before.server_cpu, after.client_cpu - before.client_cpu
    cost = {
        "metered_seconds": seconds,
        "server_cpu_seconds": server,
        "client_cpu_seconds": client,
        # Ticks are coarse, so that a difference may come out below 0.
        "others_cores": max(0.0, (after.busy - before.busy - server - client) / seconds),
    }
    if before.device and after.device:
        cost["device_flushes"] = after.device.flushes - before.device.flushes
        cost["device_written_bytes"] = after.device.written_bytes - before.device.written_bytes
        cost["device_read_bytes"] = after.device.read_bytes - before.device.read_bytes
    return cost


def data_bytes(path):
    """Octets of a file that were ever written. Space that is reserved and not written yet reads as a hole."""
    total = 0
    with open(path, "rb") as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        while at < end:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                # No data up to the end.
                break
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            total += at - start
    return total


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a directory takes on its file system, in octets."""

    # Blocks, those of directories and reserved ones too: what du says.
    allocated: int
    # Without space that is reserved and not written yet.
    used: int
    files: int


def stored(directory):
    """Counts every file once, however many names it has."""
    allocated = used = files = 0
    seen = set()
    for root, _, names in os.walk(directory):
        for path in [root] + [os.path.join(root, name) for name in names]:
            try:
                status = os.lstat(path)
            except FileNotFoundError:
                # A running server may remove it in between.
                continue
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            blocks = status.st_blocks * STAT_BLOCK_BYTES
            allocated += blocks
            if stat.S_ISREG(status.st_mode):
                files += 1
                used += min(blocks, -(-data_bytes(path) // 4096) * 4096)
            else:
                used += blocks
    return Stored(allocated=allocated, used=used, files=files)
