//! What a run says at its end: a table, or one JSON object with all that is needed to repeat it.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Write, stdout};
use std::time::{SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::drive::{Load, Ran};
use crate::observe::{Cost, Machine};

/// A generator that is busier than this may be what limited the rate.
const CLIENT_BOUND_SHARE: f64 = 0.9;

#[derive(Debug, Serialize)]
pub struct Report {
    pub workload: &'static str,
    pub version: &'static str,
    /// The command line, which repeats the run.
    pub command: Vec<String>,
    /// Seconds since 1970.
    pub ended: u64,
    pub machine: Machine,
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
        let Ran { seconds, tally, cost, client_cpu_share } = ran;
        let operations = tally.operations.max(1) as f64;
        let mut parameters = parameters;
        parameters.insert("connections", load.connections.into());
        parameters.insert("messages", load.messages.into());
        parameters.insert("seconds", load.seconds.into());
        parameters.insert("threads", load.threads.into());
        Self {
            workload,
            version: env!("CARGO_PKG_VERSION"),
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
            latency_us: (&tally.latency).into(),
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
            client_bound: client_cpu_share >= CLIENT_BOUND_SHARE,
        }
    }

    /// Prints it. True if there were no errors.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub fn print(&self, json: bool) -> Result<bool, Box<dyn Error>> {
        let mut out = stdout().lock();
        if json {
            writeln!(out, "{}", serde_json::to_string(self)?)?;
        } else {
            out.write_all(self.table().as_bytes())?;
        }
        Ok(self.errors.is_empty())
    }

    fn table(&self) -> String {
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        let megabytes = |bytes: f64| format!("{:.1} MB", bytes / 1e6);
        row(self.unit, format!("{} in {:.2} s", self.operations, self.seconds));
        row("rate", format!("{:.0} /s, {}/s", self.rate, megabytes(self.bytes_per_second)));
        row("latency", show_latency(&self.latency_us));
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
        if let Some(bytes) = self.cost.server_rss_anon_bytes {
            row("server memory", format!("{} RssAnon at the end", megabytes(bytes as f64)));
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
        let bound = if self.client_bound { ": the client was the limit, use more --threads" } else { "" };
        row("client CPU", format!("{:.0} % of its threads{bound}", self.client_cpu_share * 100.0));
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

fn show_latency(latency: &Latency) -> String {
    let Latency { p50, p90, p99, p99_9, max, .. } = latency;
    format!("p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}, max {max} us")
}

#[expect(
    clippy::disallowed_methods,
    reason = "a report says when it was made, and the load generator is never simulated"
)]
fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
