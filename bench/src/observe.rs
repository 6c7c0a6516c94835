//! What a run costs: CPU and memory of processes, and the block device, as the kernel counts them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::cgroup::Cgroup;
use crate::processes::{Memory, Tree, cpu_of_self};

/// /proc/diskstats counts sectors of this size whatever the device's.
const SECTOR_BYTES: u64 = 512;
/// How often one looks for processes of the server that begin and end.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

/// What a block device has done since the system started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Device {
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub read_bytes: u64,
}

/// # Errors
/// There is no such device.
pub fn device(name: &str) -> io::Result<Device> {
    let text = fs::read_to_string("/proc/diskstats")?;
    parse_device(&text, name).ok_or_else(|| io::Error::other(format!("no block device {name} in /proc/diskstats")))
}

/// The kernel's Documentation/admin-guide/iostats.rst numbers the fields after the name from 1: 3 sectors read, 5 writes
/// completed, 7 sectors written, 16 flush requests completed.
fn parse_device(diskstats: &str, name: &str) -> Option<Device> {
    let line = diskstats.lines().find(|line| line.split_ascii_whitespace().nth(2) == Some(name))?;
    let fields: Vec<u64> = line.split_ascii_whitespace().skip(3).map_while(|field| field.parse().ok()).collect();
    let field = |number: usize| fields.get(number - 1).copied();
    Some(Device {
        writes: field(5)?,
        written_bytes: field(7)? * SECTOR_BYTES,
        flushes: field(16)?,
        read_bytes: field(3)? * SECTOR_BYTES,
    })
}

/// What to watch.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Watch {
    /// The server's process, or several: report the CPU and memory of them and of all that they start
    #[arg(long, value_name = "PID", value_delimiter = ',', conflicts_with_all = ["server_cgroup", "server_unit"])]
    pub server_pid: Vec<u32>,
    /// The server's control group (version 1 or 2), by its directory or its name: report its CPU and memory
    #[arg(long, value_name = "PATH", conflicts_with = "server_unit")]
    pub server_cgroup: Option<PathBuf>,
    /// The server's systemd unit: report the CPU and memory of its control group
    #[arg(long, value_name = "NAME")]
    pub server_unit: Option<String>,
    /// The block device of the server's data, for example vda: report its flushes and writes
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// A shell command that prints the server's own counters as JSON: report how they change
    #[arg(long, value_name = "COMMAND")]
    pub server_stats: Option<String>,
    /// The server, once it has been looked for; clones share it.
    #[arg(skip)]
    server: Arc<Mutex<Option<Server>>>,
}

/// A server that was found.
#[derive(Clone, Debug)]
enum Server {
    Processes(Tree),
    Cgroup { cgroup: Cgroup, rss_bytes_max: u64 },
}

impl Server {
    fn update(&mut self) -> io::Result<()> {
        match self {
            Self::Processes(tree) => tree.update(),
            Self::Cgroup { cgroup, rss_bytes_max } => {
                *rss_bytes_max = (*rss_bytes_max).max(cgroup.memory_bytes().unwrap_or(0));
                Ok(())
            }
        }
    }

    fn usage(&mut self) -> io::Result<Usage> {
        self.update()?;
        Ok(match self {
            Self::Processes(tree) => Usage {
                cpu: tree.cpu(),
                memory: Memory::of(tree.pids()),
                cgroup_bytes: None,
                bytes_max: tree.rss_bytes_max(),
            },
            Self::Cgroup { cgroup, rss_bytes_max } => Usage {
                cpu: cgroup.cpu()?,
                memory: Memory::of(cgroup.pids()),
                cgroup_bytes: cgroup.memory_bytes(),
                bytes_max: *rss_bytes_max,
            },
        })
    }
}

/// What a server has used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Since it began to be watched, or before: only differences mean something.
    pub cpu: Duration,
    pub memory: Memory,
    /// What its control group is charged with, page cache included.
    pub cgroup_bytes: Option<u64>,
    /// The most that was seen at once: of resident pages, or of what the control group is charged with.
    pub bytes_max: u64,
}

/// Counters at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub server: Option<Usage>,
    client_cpu: Duration,
    device: Option<Device>,
    stats: BTreeMap<String, i64>,
}

/// Looks at the server's processes from time to time, until it is dropped.
#[derive(Debug)]
pub struct Following {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It has nothing to say.
            let _ = thread.join();
        }
    }
}

impl Watch {
    /// # Errors
    /// The process or the device is not there.
    pub fn snapshot(&self) -> io::Result<Snapshot> {
        let snapshot = self.snapshot_of_system()?;
        Ok(Snapshot { stats: self.stats()?, ..snapshot })
    }

    /// Before what is watched: what it costs the server to tell its counters is not in the snapshot's difference to the next.
    ///
    /// # Errors
    /// As [`Watch::snapshot`].
    pub fn snapshot_before(&self) -> io::Result<Snapshot> {
        let stats = self.stats()?;
        Ok(Snapshot { stats, ..self.snapshot_of_system()? })
    }

    fn stats(&self) -> io::Result<BTreeMap<String, i64>> {
        let Some(command) = &self.server_stats else { return Ok(BTreeMap::new()) };
        let output = Command::new("sh").args(["-c", command]).output()?;
        let failed = |what: &dyn std::fmt::Display| io::Error::other(format!("{command:?}: {what}"));
        if !output.status.success() {
            return Err(failed(&String::from_utf8_lossy(&output.stderr)));
        }
        let json = serde_json::from_slice(&output.stdout).map_err(|error| failed(&error))?;
        let mut stats = BTreeMap::new();
        add_numbers("", &json, &mut stats);
        Ok(stats)
    }

    fn snapshot_of_system(&self) -> io::Result<Snapshot> {
        Ok(Snapshot {
            stats: BTreeMap::new(),
            server: self.usage()?,
            client_cpu: cpu_of_self()?,
            device: self.device.as_deref().map(device).transpose()?,
        })
    }

    /// Whether a server is to be watched.
    pub fn has_server(&self) -> bool {
        !self.server_pid.is_empty() || self.server_cgroup.is_some() || self.server_unit.is_some()
    }

    /// What the server has used by now.
    ///
    /// # Errors
    /// It is not there.
    pub fn usage(&self) -> io::Result<Option<Usage>> {
        if !self.has_server() {
            return Ok(None);
        }
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match server.take() {
            Some(found) => found,
            None => self.find_server()?,
        };
        server.insert(found).usage().map(Some)
    }

    fn find_server(&self) -> io::Result<Server> {
        let cgroup = match (&self.server_unit, &self.server_cgroup) {
            (Some(unit), _) => Cgroup::of_unit(unit)?,
            (None, Some(path)) => Cgroup::open(path)?,
            (None, None) => return Ok(Server::Processes(Tree::new(&self.server_pid)?)),
        };
        Ok(Server::Cgroup { cgroup, rss_bytes_max: 0 })
    }

    /// Follows the server while what is returned is kept: finds processes that begin and end, and the most memory.
    ///
    /// # Errors
    /// A thread could not be made.
    pub fn follow(&self) -> io::Result<Following> {
        let over = Arc::new(AtomicBool::new(false));
        if !self.has_server() {
            return Ok(Following { over, thread: None });
        }
        let (server, ended) = (Arc::clone(&self.server), Arc::clone(&over));
        let look = move || {
            while !ended.load(Ordering::Relaxed) {
                thread::park_timeout(FOLLOW_INTERVAL);
                if let Some(server) = server.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                    // The last snapshot says it if the server is gone.
                    let _ = server.update();
                }
            }
        };
        let thread = thread::Builder::new().name("follow".to_owned()).spawn(look)?;
        Ok(Following { over, thread: Some(thread) })
    }
}

/// Adds up the numbers by their names; those of the elements of a list together.
fn add_numbers(name: &str, json: &Value, into: &mut BTreeMap<String, i64>) {
    match json {
        Value::Number(number) => *into.entry(name.to_owned()).or_default() += number.as_i64().unwrap_or(0),
        Value::Array(elements) => elements.iter().for_each(|element| add_numbers(name, element, into)),
        Value::Object(members) => {
            let dot = if name.is_empty() { "" } else { "." };
            members.iter().for_each(|(member, json)| add_numbers(&format!("{name}{dot}{member}"), json, into));
        }
        _ => {}
    }
}

/// What happened between two snapshots.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cpu_s: Option<f64>,
    /// At the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_rss_anon_bytes: Option<u64>,
    /// At the end; pages that processes share count for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_rss_bytes: Option<u64>,
    /// At the end; pages that processes share in equal parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_pss_bytes: Option<u64>,
    /// At the end: what the control group is charged with, page cache included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cgroup_bytes: Option<u64>,
    /// The most that was seen at once: of resident pages, or of what the control group is charged with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_bytes_max: Option<u64>,
    /// At the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_processes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_flushes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_writes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_written_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_read_bytes: Option<u64>,
    pub client_cpu_s: f64,
    /// How the server's own counters changed.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub server_stats: BTreeMap<String, i64>,
}

impl Cost {
    pub fn between(before: &Snapshot, after: &Snapshot) -> Self {
        let device = before.device.zip(after.device);
        let change = |field: fn(&Device) -> u64| device.map(|(before, after)| field(&after) - field(&before));
        let server = before.server.zip(after.server);
        let memory = after.server.map(|server| server.memory);
        Self {
            server_cpu_s: server.map(|(before, after)| after.cpu.saturating_sub(before.cpu).as_secs_f64()),
            server_rss_anon_bytes: memory.map(|memory| memory.rss_anon_bytes),
            server_rss_bytes: memory.map(|memory| memory.rss_bytes),
            server_pss_bytes: memory.and_then(|memory| memory.pss_bytes),
            server_cgroup_bytes: after.server.and_then(|server| server.cgroup_bytes),
            server_bytes_max: after.server.map(|server| server.bytes_max),
            server_processes: memory.map(|memory| memory.processes),
            device_flushes: change(|device| device.flushes),
            device_writes: change(|device| device.writes),
            device_written_bytes: change(|device| device.written_bytes),
            device_read_bytes: change(|device| device.read_bytes),
            server_stats: after
                .stats
                .iter()
                .map(|(name, after)| (name.clone(), after - before.stats.get(name).unwrap_or(&0)))
                .collect(),
            client_cpu_s: (after.client_cpu - before.client_cpu).as_secs_f64(),
        }
    }
}

impl Cost {
    /// The server's memory in words, a text for each line of a table.
    pub fn show_memory(&self) -> Vec<String> {
        let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        let mut lines = Vec::new();
        if let (Some(anon), Some(rss), Some(processes)) =
            (self.server_rss_anon_bytes, self.server_rss_bytes, self.server_processes)
        {
            let pss = self.server_pss_bytes.map_or(String::new(), |pss| format!(", {} PSS", megabytes(pss)));
            let plural = if processes == 1 { "" } else { "es" };
            let (anon, rss) = (megabytes(anon), megabytes(rss));
            lines.push(format!("{anon} RssAnon, {rss} RSS{pss} at the end, {processes} process{plural}"));
        }
        if let Some(bytes) = self.server_cgroup_bytes {
            lines.push(format!("{} charged to the control group at the end, with page cache", megabytes(bytes)));
        }
        if let Some(bytes) = self.server_bytes_max {
            lines.push(format!("{} at most", megabytes(bytes)));
        }
        lines
    }
}

/// The machine, as far as a figure depends on it.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    pub kernel: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
}

impl Machine {
    pub fn this() -> Self {
        let read = |path: &str| fs::read_to_string(Path::new(path)).unwrap_or_default();
        let after = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key));
            line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
        };
        let memory = after(&read("/proc/meminfo"), "MemTotal");
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: after(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) << 10,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_formats_are_understood() {
        let line = " 254  0 vda 417265 15305 19582994 268401 29796 66518 2005 76982 0 26176 353590 25560 85 16221168 6814 2671 1392";
        let device = parse_device(line, "vda").unwrap();
        let expected = Device { writes: 29796, written_bytes: 2005 * 512, flushes: 2671, read_bytes: 19582994 * 512 };
        assert_eq!(device, expected);
        assert_eq!(parse_device(line, "vd"), None);
    }

    #[test]
    fn counters_are_added_up_by_name() {
        let command = |text: &str| Watch { server_stats: Some(text.to_owned()), ..Watch::default() };
        let stats = command(r#"echo '{"a": 1, "of": [{"b": 2, "c": "x"}, {"b": 3}], "d": null}'"#).stats().unwrap();
        assert_eq!(stats, BTreeMap::from([("a".to_owned(), 1), ("of.b".to_owned(), 5)]));
        assert!(command("echo no >&2; false").stats().unwrap_err().to_string().contains("no"));
        assert!(command("echo {").stats().is_err());
    }

    #[test]
    fn this_process_can_be_watched() {
        let watch = Watch { server_pid: vec![std::process::id()], ..Watch::default() };
        let before = watch.snapshot().unwrap();
        drop(watch.follow().unwrap());
        let cost = Cost::between(&before, &watch.snapshot().unwrap());
        assert!(cost.server_rss_anon_bytes.unwrap() > 0);
        assert!(cost.server_bytes_max.unwrap() > 0);
        assert!(cost.server_cpu_s.unwrap() > 0.0 && cost.server_cpu_s.unwrap() < 60.0);
        assert!(!cost.show_memory().is_empty());
        let nobody = Watch { server_cgroup: Some("/no such group".into()), ..Watch::default() };
        assert!(nobody.snapshot().unwrap_err().to_string().contains("/no such group"));
        assert!(Watch { device: Some("none such".to_owned()), ..Watch::default() }.snapshot().is_err());
        assert!(Machine::this().cores > 0);
    }
}
