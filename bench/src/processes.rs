//! Processes with all that they start: CPU time and memory, also of those that come and go during a run.
//!
//! CPU time of a process is that of its own clock, in nanoseconds and with its ended threads. (The files of /proc have ticks of
//! 10 ms, or nanoseconds of living threads alone.) A child that ends and is waited for hands its time on to its parent, which
//! the kernel tells in ticks for all its children together. So the time of a tree is what its living processes have used, what
//! they have inherited, and what was last seen of processes that ended with nobody of the tree to inherit from them. A parent
//! that ignores SIGCHLD inherits nothing: watch such a server by its cgroup.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::time::Duration;

use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// The kernel counts CPU time in these units in /proc whatever its own clock (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;

/// What /proc/PID/stat tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    parent: u32,
    /// Of the process itself, to 10 ms.
    own: Duration,
    /// Of children that it has waited for.
    inherited: Duration,
    /// When it started: a number may be used again by another process.
    started: u64,
    resident_pages: u64,
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name may contain spaces and parentheses.
    let (_, rest) = text.rsplit_once(')')?;
    // proc_pid_stat(5) numbers the field after the name 3.
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = |first: usize| {
        let ticks = field(first)? + field(first + 1)?;
        Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
    };
    Some(Stat {
        parent: u32::try_from(field(4)?).ok()?,
        own: ticks(14)?,
        inherited: ticks(16)?,
        started: field(22)?,
        resident_pages: field(24)?,
    })
}

fn stat(pid: u32) -> io::Result<Stat> {
    let text = process_file(pid, "stat")?;
    parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

fn process_file(pid: u32, file: &str) -> io::Result<String> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot watch process {pid}: {error}"));
    fs::read_to_string(format!("/proc/{pid}/{file}")).map_err(named)
}

/// CPU time of a process with all its threads, ended ones too, without its children.
fn own_cpu(pid: u32) -> Option<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid).ok()?)).ok()?;
    Some(clock_gettime(clock).ok()?.into())
}

/// CPU time of this process.
///
/// # Errors
/// As the system says.
pub fn cpu_of_self() -> io::Result<Duration> {
    own_cpu(std::process::id()).ok_or_else(|| io::Error::other("this process has no CPU clock"))
}

/// Memory of some processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub processes: usize,
    /// All resident pages; those that processes share count for each.
    pub rss_bytes: u64,
    /// Resident pages that belong to no file.
    pub rss_anon_bytes: u64,
    /// Resident pages, shared ones in equal parts. `None` if the kernel does not say.
    pub pss_bytes: Option<u64>,
}

impl Memory {
    /// Of processes; those that have just ended count for nothing.
    pub fn of(pids: impl IntoIterator<Item = u32>) -> Self {
        let mut sum = Self { pss_bytes: Some(0), ..Self::default() };
        for pid in pids {
            let Ok(status) = process_file(pid, "status") else { continue };
            // A process that has ended and was not waited for has no memory.
            let Some(rss) = kilobytes(&status, "VmRSS:") else { continue };
            sum.processes += 1;
            sum.rss_bytes += rss;
            sum.rss_anon_bytes += kilobytes(&status, "RssAnon:").unwrap_or(0);
            let pss = process_file(pid, "smaps_rollup").ok().and_then(|rollup| kilobytes(&rollup, "Pss:"));
            sum.pss_bytes = sum.pss_bytes.zip(pss).map(|(sum, pss)| sum + pss);
        }
        sum
    }
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    started: u64,
    parent: u32,
    own: Duration,
    inherited: Duration,
    rss_bytes: u64,
}

/// Processes, their children, and so on.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    roots: Vec<u32>,
    seen: BTreeMap<u32, Seen>,
    /// CPU time of those that ended and left it to nobody.
    lost: Duration,
    /// The most resident memory that was seen at once.
    rss_bytes_max: u64,
}

impl Tree {
    /// # Errors
    /// One of `roots` is not there.
    pub fn new(roots: &[u32]) -> io::Result<Self> {
        let mut tree = Self { roots: roots.to_vec(), ..Self::default() };
        tree.update()?;
        Ok(tree)
    }

    /// Looks who is there now. Processes that came and went since the last time are found in what their parents inherited.
    ///
    /// # Errors
    /// One of the roots has ended.
    pub fn update(&mut self) -> io::Result<()> {
        let all = all_processes()?;
        let mut members: BTreeSet<u32> = BTreeSet::new();
        for &root in &self.roots {
            if !all.contains_key(&root) || self.seen.get(&root).is_some_and(|seen| seen.started != all[&root].started) {
                let text = format!("cannot watch process {root}: it is not there");
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
            members.insert(root);
        }
        // Who was in the tree stays, also if its parent has ended.
        let stays = |(pid, seen): &(&u32, &Seen)| all.get(pid).is_some_and(|stat| stat.started == seen.started);
        members.extend(self.seen.iter().filter(stays).map(|(pid, _)| *pid));
        // Children have other numbers than their parents, but not always greater ones.
        loop {
            let children = all.iter().filter(|(pid, stat)| members.contains(&stat.parent) && !members.contains(pid));
            let children: Vec<u32> = children.map(|(pid, _)| *pid).collect();
            if children.is_empty() {
                break;
            }
            members.extend(children);
        }
        let page_bytes = page_bytes();
        let mut now = BTreeMap::new();
        for pid in members {
            // Again, as close as can be to the moment in which the clock is read.
            let Some(own) = own_cpu(pid) else { continue };
            let Ok(stat) = stat(pid) else { continue };
            let Stat { parent, inherited, started, .. } = stat;
            // A clock of a process that has ended may have stopped before.
            let own = own.max(stat.own);
            now.insert(pid, Seen { started, parent, own, inherited, rss_bytes: stat.resident_pages * page_bytes });
        }
        for (pid, seen) in &self.seen {
            let is_there = now.get(pid).is_some_and(|again| again.started == seen.started);
            if !is_there && !now.contains_key(&seen.parent) {
                self.lost += seen.own + seen.inherited;
            }
        }
        self.rss_bytes_max = self.rss_bytes_max.max(now.values().map(|seen| seen.rss_bytes).sum());
        self.seen = now;
        Ok(())
    }

    /// CPU time of all, those that have ended too, as of the last update.
    pub fn cpu(&self) -> Duration {
        self.lost + self.seen.values().map(|seen| seen.own + seen.inherited).sum::<Duration>()
    }

    /// Those of the last update.
    pub fn pids(&self) -> impl Iterator<Item = u32> {
        self.seen.keys().copied()
    }

    pub fn rss_bytes_max(&self) -> u64 {
        self.rss_bytes_max
    }
}

fn all_processes() -> io::Result<BTreeMap<u32, Stat>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended since the directory was read.
        if let Ok(stat) = stat(pid) {
            all.insert(pid, stat);
        }
    }
    Ok(all)
}

fn page_bytes() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn the_kernels_format_is_understood() {
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 25 30 4 20 0 1 0 77 1000 55 18446744073709551615";
        let expected = Stat {
            parent: 1,
            own: Duration::from_millis(1750),
            inherited: Duration::from_millis(340),
            started: 77,
            resident_pages: 55,
        };
        assert_eq!(parse_stat(stat), Some(expected));
        assert_eq!(kilobytes("VmRSS:\t  12 kB\nRssAnon:\t8 kB\n", "RssAnon:"), Some(8192));
    }

    /// A shell that does what it is told.
    struct Shell(Child, BufReader<std::process::ChildStdout>);

    impl Shell {
        fn start() -> Self {
            let mut child =
                Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("there is a shell");
            let output = BufReader::new(child.stdout.take().unwrap());
            Self(child, output)
        }

        /// The line that the shell answers.
        fn ask(&mut self, command: &str) -> String {
            let input = self.0.stdin.as_mut().unwrap();
            writeln!(input, "{command}").unwrap();
            let mut line = String::new();
            self.1.read_line(&mut line).unwrap();
            line.trim().to_owned()
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            drop(self.0.stdin.take());
            self.0.wait().unwrap();
        }
    }

    /// Uses CPU for a while.
    const WORK: &str = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";

    #[test]
    fn children_that_came_and_went_are_counted() {
        let mut shell = Shell::start();
        shell.ask("echo ready");
        let mut tree = Tree::new(&[shell.0.id()]).unwrap();
        let before = tree.cpu();
        // In a child of a child, which nobody saw alive.
        let start = std::time::Instant::now();
        shell.ask(&format!("sh -c \"sh -c '{}; exit 0'; exit 0\"; echo done", WORK.replace('$', "\\$")));
        let elapsed = start.elapsed();
        tree.update().unwrap();
        assert_eq!(tree.pids().collect::<Vec<_>>(), [shell.0.id()]);
        let used = tree.cpu() - before;
        assert!(used >= Duration::from_millis(30), "only {used:?} of {elapsed:?}");
        assert!(used <= elapsed + Duration::from_millis(20), "{used:?} in {elapsed:?}");
    }

    #[test]
    fn an_orphan_that_was_seen_stays() {
        let mut shell = Shell::start();
        let orphan = shell.ask("sh -c 'sleep 1000 & echo $!; read x; exit 0'; echo over");
        let mut tree = Tree::new(&[shell.0.id()]).unwrap();
        assert_eq!(tree.pids().count(), 3);
        // Its parent ends.
        assert_eq!(shell.ask("x"), "over");
        tree.update().unwrap();
        let pids: Vec<u32> = tree.pids().collect();
        shell.ask(&format!("kill {orphan}; echo killed"));
        assert_eq!(
            pids,
            std::collections::BTreeSet::from([shell.0.id(), orphan.parse().unwrap()]).into_iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn what_is_left_to_nobody_is_kept() {
        let root = std::process::id();
        let mut tree = Tree::new(&[root]).unwrap();
        let ended = |parent| Seen {
            started: 1,
            parent,
            own: Duration::from_secs(100),
            inherited: Duration::from_secs(10),
            rss_bytes: 0,
        };
        // Above the greatest number that a process can have.
        tree.seen.insert(u32::MAX - 1, ended(u32::MAX));
        tree.seen.insert(u32::MAX - 2, ended(root));
        tree.update().unwrap();
        assert_eq!(tree.lost, Duration::from_secs(110));
    }

    #[test]
    fn time_is_counted_to_less_than_a_tick() {
        let (mut last, mut steps) = (cpu_of_self().unwrap(), Vec::new());
        while steps.len() < 100 {
            let now = cpu_of_self().unwrap();
            if now > last {
                steps.push(now - last);
            }
            last = now;
        }
        assert!(steps.iter().min().unwrap() < &Duration::from_millis(1));
    }

    #[test]
    fn nobody_there_is_an_error() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        assert!(Tree::new(&[pid]).unwrap_err().to_string().contains(&pid.to_string()));
        assert_eq!(Memory::of([pid]).processes, 0);
        let memory = Memory::of([std::process::id()]);
        assert!(memory.rss_bytes >= memory.rss_anon_bytes && memory.rss_anon_bytes > 0);
        assert!(memory.pss_bytes.unwrap() <= memory.rss_bytes + (1 << 20));
    }
}
