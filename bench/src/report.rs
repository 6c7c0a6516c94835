//! What a run says at its end: a table, or one JSON object with all that is needed to repeat it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::OpenOptions;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::calibrate::Calibration;
use crate::drive::{Load, Ran};
use crate::observe::{Cost, Machine};
use crate::verify::Verdict;

/// A generator that is busier than this may be what limited the rate.
const CLIENT_BOUND_SHARE: f64 = 0.9;
/// In an open loop: a lateness of the client up to this does not count, because other programs cause as much.
const LAG_US_MAX: u64 = 1_000;
/// A client that causes more than this of the latency is what was measured.
const LAG_SHARE_MAX: f64 = 0.2;

/// What makes a report one that can be compared later.
#[derive(Clone, Debug, Default, Args)]
pub struct Keep {
    /// Append the report as one line of JSON to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// What is measured, for example a server and its version: a text for the report
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
    /// Measure the machine first: the disk by a file in this directory, loopback and CPU. Takes about 3 s
    #[arg(long, value_name = "DIR")]
    calibrate: Option<PathBuf>,
}

impl Keep {
    /// Measures the machine, if that is wanted.
    ///
    /// # Errors
    /// It could not be measured.
    pub fn calibration(&self) -> Result<Option<Calibration>, Box<dyn Error>> {
        self.calibrate.as_deref().map(Calibration::measure).transpose()
    }

    /// Appends a report to the file, if there is one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn append(&self, report: &impl Serialize) -> Result<(), Box<dyn Error>> {
        self.output.as_deref().map_or(Ok(()), |path| append_line(path, report))
    }
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub workload: &'static str,
    pub version: &'static str,
    /// How it was compiled: a debug build measures itself.
    pub build: &'static str,
    /// What was measured, as the user named it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// The command line, which repeats the run.
    pub command: Vec<String>,
    /// Seconds since 1970.
    pub ended: u64,
    pub machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What random choices came from.
    pub seed: u64,
    /// The workload's parameters, defaults included.
    pub parameters: BTreeMap<&'static str, serde_json::Value>,
    pub seconds: f64,
    /// What is counted, in the plural.
    pub unit: &'static str,
    pub operations: u64,
    pub rate: f64,
    pub bytes: u64,
    pub bytes_per_second: f64,
    pub latency_us: Latency,
    /// The arrivals of an open loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open_loop: Option<OpenLoop>,
    /// A part of each operation: its name and latencies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<(&'static str, Latency)>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub counts: BTreeMap<&'static str, u64>,
    pub errors: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    pub cost: Cost,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cpu_us_per_operation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cpu_us_per_megabyte: Option<f64>,
    /// Cores that the server used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server_cores: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flushes_per_operation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub written_bytes_per_byte: Option<f64>,
    pub client_cpu_share: f64,
    pub client_bound: bool,
    /// What was found in the mailboxes afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    #[serde(skip)]
    keep: Keep,
}

/// What became of the operations of an open loop.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OpenLoop {
    /// Operations a second that were asked for.
    pub rate: f64,
    pub arrived: u64,
    /// Found all connections busy, and were sent later.
    pub waited: u64,
    /// The most that waited together.
    pub waited_together: u64,
    /// All connections were busy, and too many waited.
    pub turned_away: u64,
    /// The run was over.
    pub left: u64,
    /// How late the client was although a connection was free, and how late its threads looked at a clock of their own.
    pub lag_us: Latency,
    /// Whether the client was so late that it is a part of what was measured.
    pub client_late: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    #[serde(rename = "p99.9")]
    pub p99_9: u64,
    pub max: u64,
}

impl From<&Histogram<u64>> for Latency {
    fn from(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self {
            mean: histogram.mean(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: histogram.max(),
        }
    }
}

impl Report {
    pub fn new(
        workload: &'static str,
        unit: &'static str,
        part: Option<&'static str>,
        load: &Load,
        parameters: BTreeMap<&'static str, serde_json::Value>,
        ran: Ran,
    ) -> Self {
        let Ran { seconds, tally, cost, client_cpu_share, arrivals, calibration } = ran;
        let operations = tally.operations.max(1) as f64;
        let mut parameters = parameters;
        parameters.insert("connections", load.connections.into());
        parameters.insert("messages", load.messages.into());
        parameters.insert("seconds", load.seconds.into());
        parameters.insert("threads", load.threads.into());
        parameters.insert("rate", load.rate.into());
        parameters.insert("timeout", load.timeout.into());
        let latency_us = Latency::from(&tally.latency);
        let open_loop = load.rate.zip(arrivals).map(|(rate, counts)| {
            let lag_us = Latency::from(&tally.lag);
            OpenLoop {
                rate,
                arrived: counts.arrived,
                waited: counts.waited,
                waited_together: counts.longest,
                turned_away: counts.turned_away,
                left: counts.left,
                lag_us,
                client_late: is_late(&lag_us, &latency_us),
            }
        });
        Self {
            workload,
            version: env!("CARGO_PKG_VERSION"),
            build: BUILD,
            label: load.keep.label.clone(),
            seed: load.seed,
            calibration,
            command: std::env::args().collect(),
            ended: seconds_since_1970(),
            machine: Machine::this(),
            parameters,
            seconds,
            unit,
            operations: tally.operations,
            rate: tally.operations as f64 / seconds,
            bytes: tally.bytes,
            bytes_per_second: tally.bytes as f64 / seconds,
            latency_us,
            part: part.map(|name| (name, (&tally.second).into())),
            first_error: tally.first_error,
            counts: tally.counts,
            errors: tally.errors,
            server_cpu_us_per_operation: cost.server_cpu_s.map(|cpu| cpu * 1e6 / operations),
            server_cpu_us_per_megabyte: cost
                .server_cpu_s
                .filter(|_| tally.bytes > 0)
                .map(|cpu| cpu * 1e12 / tally.bytes as f64),
            server_cores: cost.server_cpu_s.map(|cpu| cpu / seconds),
            flushes_per_operation: cost.device_flushes.map(|flushes| flushes as f64 / operations),
            written_bytes_per_byte: cost.device_written_bytes.map(|bytes| bytes as f64 / tally.bytes.max(1) as f64),
            cost,
            client_cpu_share,
            client_bound: client_cpu_share >= CLIENT_BOUND_SHARE || open_loop.is_some_and(|open| open.client_late),
            open_loop,
            verdict: None,
            keep: load.keep.clone(),
        }
    }

    /// Prints it, and appends it to the file of `--output`. True if there were no errors.
    ///
    /// # Errors
    /// Standard output or the file cannot be written.
    pub fn print(&self, json: bool) -> Result<bool, Box<dyn Error>> {
        self.keep.append(self)?;
        let mut out = stdout().lock();
        if json {
            writeln!(out, "{}", serde_json::to_string(self)?)?;
        } else {
            out.write_all(self.table().as_bytes())?;
        }
        Ok(self.errors.is_empty())
    }

    /// As [`Report::print`], and fails if verification did.
    ///
    /// # Errors
    /// Those of [`Report::print`], and a [`crate::verify::Failure`].
    pub fn print_and_judge(&self, json: bool) -> Result<bool, Box<dyn Error>> {
        let succeeded = self.print(json)?;
        match &self.verdict {
            Some(verdict) => verdict.judge().map(|()| succeeded).map_err(Into::into),
            None => Ok(succeeded),
        }
    }

    fn table(&self) -> String {
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        let megabytes = |bytes: f64| format!("{:.1} MB", bytes / 1e6);
        row(self.unit, format!("{} in {:.2} s", self.operations, self.seconds));
        row("rate", format!("{:.0} /s, {}/s", self.rate, megabytes(self.bytes_per_second)));
        row("latency", show_latency(&self.latency_us));
        if let Some(open) = &self.open_loop {
            let OpenLoop { rate, arrived, waited, waited_together, turned_away, left, .. } = open;
            row("open loop", format!("{arrived} were due, {rate} /s asked for, seed {}", self.seed));
            row("waited", format!("{waited} for a free connection, at most {waited_together} together"));
            if turned_away + left > 0 {
                row("not sent", format!("{turned_away} all connections busy, {left} the run was over"));
            }
            let late = if open.client_late { ": the client could not keep up" } else { "" };
            row("client's lag", format!("{}{late}", show_latency(&open.lag_us)));
        }
        if let Some((name, latency)) = &self.part {
            row(name, show_latency(latency));
        }
        for (name, count) in &self.counts {
            row(name, count.to_string());
        }
        if let (Some(cpu), Some(cores)) = (self.server_cpu_us_per_operation, self.server_cores) {
            let per_megabyte =
                self.server_cpu_us_per_megabyte.map_or(String::new(), |cpu| format!(", {cpu:.0} us per MB"));
            row("server CPU", format!("{cpu:.1} us each{per_megabyte}, {cores:.2} cores"));
        }
        for text in self.cost.show_memory() {
            row("server memory", text);
        }
        if let (Some(flushes), Some(ratio)) = (self.flushes_per_operation, self.written_bytes_per_byte) {
            let (count, bytes) = (self.cost.device_flushes.unwrap_or(0), self.cost.device_written_bytes.unwrap_or(0));
            row("device flushes", format!("{flushes:.3} each, {count} in all"));
            row("device writes", format!("{ratio:.3} bytes per byte, {} in all", megabytes(bytes as f64)));
            row("device reads", megabytes(self.cost.device_read_bytes.unwrap_or(0) as f64));
        }
        for (name, change) in self.cost.server_stats.iter().filter(|(_, change)| **change != 0) {
            row("server stats", format!("{name} {change:+}"));
        }
        let bound = match self.client_cpu_share >= CLIENT_BOUND_SHARE {
            true => ": the client was the limit, use more --threads",
            false => "",
        };
        row("client CPU", format!("{:.0} % of its threads{bound}", self.client_cpu_share * 100.0));
        for (name, value) in self.verdict.iter().flat_map(Verdict::rows) {
            row(name, value);
        }
        row("errors", self.errors.values().sum::<u64>().to_string());
        for (kind, count) in &self.errors {
            row("", format!("{count} {kind}"));
        }
        if let Some(first) = &self.first_error {
            row("first error", first.clone());
        }
        rows.iter().map(|(name, value)| format!("{name:>16}  {value}\n")).collect()
    }
}

/// How this program was compiled.
pub const BUILD: &str = if cfg!(debug_assertions) { "debug" } else { "release" };

/// Appends a value as one line of JSON.
///
/// # Errors
/// The file cannot be written.
pub fn append_line(path: &Path, value: &impl Serialize) -> Result<(), Box<dyn Error>> {
    let named = |error: std::io::Error| format!("cannot write the report to {}: {error}", path.display());
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    // One write, so that lines of several runs do not mix.
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(named)?;
    Ok(file.write_all(&line).map_err(named)?)
}

fn is_late(lag: &Latency, latency: &Latency) -> bool {
    lag.p99 > LAG_US_MAX && lag.p99 as f64 > LAG_SHARE_MAX * latency.p99 as f64
}

fn show_latency(latency: &Latency) -> String {
    let Latency { p50, p90, p99, p99_9, max, .. } = latency;
    format!("p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}, max {max} us")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a report says when it was made, and the load generator is never simulated"
)]
pub fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drive::Tally;

    #[test]
    fn quantiles_are_those_of_known_data() {
        let mut tally = Tally::default();
        // Each number once, not in order: the quantile q is the number 1000000 q.
        for step in 0..1_000_000_u64 {
            let micros = step * 7_919 % 1_000_000 + 1;
            tally.count(1, std::time::Duration::from_micros(micros));
        }
        let latency = Latency::from(&tally.latency);
        let near = |found: f64, exact: f64| assert!((found / exact - 1.0).abs() < 0.001, "{found} is not {exact}");
        for (found, exact) in [
            (latency.p50, 500_000.0),
            (latency.p90, 900_000.0),
            (latency.p99, 990_000.0),
            (latency.p99_9, 999_000.0),
            (latency.max, 1_000_000.0),
        ] {
            near(found as f64, exact);
        }
        near(latency.mean, 500_000.5);
        assert_eq!(tally.operations, 1_000_000);
    }

    #[test]
    fn few_values_are_exact() {
        let mut tally = Tally::default();
        for micros in [1, 2, 3, 4, 5, 6, 7, 8, 9, 1000] {
            tally.count(1, std::time::Duration::from_micros(micros));
        }
        let latency = Latency::from(&tally.latency);
        assert_eq!((latency.p50, latency.p90, latency.p99, latency.max), (5, 9, 1000, 1000));
    }

    #[test]
    fn a_late_client_is_called_so() {
        let latency = |p99| Latency { mean: 0.0, p50: 0, p90: 0, p99, p99_9: 0, max: 0 };
        assert!(!is_late(&latency(900), &latency(900)));
        assert!(is_late(&latency(1_100), &latency(2_000)));
        assert!(!is_late(&latency(1_100), &latency(20_000)));
    }
}
