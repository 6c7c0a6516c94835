//! What a run costs: CPU and memory of processes, and the block device, as the kernel counts them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

/// The kernel counts CPU time in these units in /proc whatever its own clock (USER_HZ).
const TICKS_PER_SECOND: u64 = 100;
/// /proc/diskstats counts sectors of this size whatever the device's.
const SECTOR_BYTES: u64 = 512;

/// CPU time of a process with all its threads, ended ones too.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let text = process_file(pid, "stat")?;
    parse_cpu_time(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))
}

fn process_file(pid: u32, file: &str) -> io::Result<String> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot watch process {pid}: {error}"));
    fs::read_to_string(format!("/proc/{pid}/{file}")).map_err(named)
}

fn parse_cpu_time(stat: &str) -> Option<Duration> {
    // The name may contain spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Resident anonymous memory of a process.
///
/// # Errors
/// There is no such process.
pub fn rss_anon_bytes(pid: u32) -> io::Result<u64> {
    let text = process_file(pid, "status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kilobytes.map(|kilobytes| kilobytes << 10).ok_or_else(|| io::Error::other("the process has no RssAnon"))
}

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
    /// The server's process: report its CPU and memory
    #[arg(long, value_name = "PID")]
    pub server_pid: Option<u32>,
    /// The block device of the server's data, for example vda: report its flushes and writes
    #[arg(long, value_name = "NAME")]
    pub device: Option<String>,
    /// A shell command that prints the server's own counters as JSON: report how they change
    #[arg(long, value_name = "COMMAND")]
    pub server_stats: Option<String>,
}

/// Counters at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    server_cpu: Option<Duration>,
    client_cpu: Duration,
    device: Option<Device>,
    pub rss_anon_bytes: Option<u64>,
    stats: BTreeMap<String, i64>,
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
            server_cpu: self.server_pid.map(cpu_time).transpose()?,
            client_cpu: cpu_time(std::process::id())?,
            device: self.device.as_deref().map(device).transpose()?,
            rss_anon_bytes: self.server_pid.map(rss_anon_bytes).transpose()?,
        })
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
        Self {
            server_cpu_s: before.server_cpu.zip(after.server_cpu).map(|(before, after)| (after - before).as_secs_f64()),
            server_rss_anon_bytes: after.rss_anon_bytes,
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
        let stat = "12 (a) b) S 1 2 3 4 5 6 7 8 9 10 150 25 0 0 20 0 1";
        assert_eq!(parse_cpu_time(stat), Some(Duration::from_millis(1750)));
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
        let watch = Watch { server_pid: Some(std::process::id()), ..Watch::default() };
        let before = watch.snapshot().unwrap();
        let cost = Cost::between(&before, &watch.snapshot().unwrap());
        assert!(cost.server_rss_anon_bytes.unwrap() > 0);
        assert!(Watch { device: Some("none such".to_owned()), ..Watch::default() }.snapshot().is_err());
        assert!(Machine::this().cores > 0);
    }
}
