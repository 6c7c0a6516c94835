//! What a run of a profile says at its end.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Write, stdout};
use std::time::Duration;

use serde::Serialize;

use super::ProfileRun;
use super::schedule::{Hours, Kind, Scale};
use super::settings::Profile;
use crate::calibrate::Calibration;
use crate::corpus::Corpus;
use crate::drive::Tally;
use crate::observe::{Cost, Machine};
use crate::report::{BUILD, Latency, seconds_since_1970};
use crate::session::Parameters;

/// The generator has one thread. Busier than this, it may be what made operations late.
const CLIENT_BOUND_SHARE: f64 = 0.9;
/// CPU is counted in ticks of 10 ms: less is not told.
const CPU_TOLD_MIN_S: f64 = 0.05;

/// What happened while operations came.
pub struct Mix {
    /// Until the last was done.
    pub seconds: f64,
    /// While they came.
    pub duration: Duration,
    pub tallies: BTreeMap<Kind, Tally>,
    pub cost: Cost,
    pub waiting_max: usize,
}

impl Mix {
    fn operations(&self) -> u64 {
        self.tallies.values().map(|tally| tally.operations).sum()
    }
}

/// What was run.
pub struct What<'a> {
    pub plan: &'a ProfileRun,
    pub profile: &'a Profile,
    pub scale: Scale,
    pub hours: Hours,
    /// In IDLE.
    pub sessions: usize,
    pub corpus: &'a Corpus,
}

#[derive(Debug, Serialize)]
pub struct ProfileReport {
    workload: &'static str,
    version: &'static str,
    build: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    label: Option<String>,
    command: Vec<String>,
    /// Seconds since 1970.
    ended: u64,
    machine: Machine,
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<Calibration>,
    /// What came when, from whom, and the mail came from it.
    seed: u64,
    profile: Profile,
    parameters: Parameters,
    /// While operations came.
    seconds: f64,
    /// Until the last was done; much more than `seconds` means that the server did not keep up.
    seconds_until_done: f64,
    kinds: BTreeMap<&'static str, OfKind>,
    /// From the acknowledgement of a delivery until a session in IDLE hears of it.
    push: OfKind,
    operations: u64,
    rate: f64,
    /// Operations that waited for their turn at the same time, at most.
    waiting_max: usize,
    cost: Cost,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_cpu_us_per_operation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_cores: Option<f64>,
    client_cpu_share: f64,
    client_bound: bool,
}

#[derive(Debug, Serialize)]
struct OfKind {
    operations: u64,
    /// By second, while operations came.
    rate: f64,
    /// What the profile has in that hour.
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_intended: Option<f64>,
    bytes: u64,
    /// From when it was due.
    latency_us: Latency,
    /// How late the generator began it.
    #[serde(skip_serializing_if = "Option::is_none")]
    begun_late_us: Option<Latency>,
    /// Of an operation when this kind came alone; none if that was not tried or was too little to tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    server_cpu_us_alone: Option<f64>,
    errors: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_error: Option<String>,
}

impl OfKind {
    fn new(tally: Tally, seconds: f64) -> Self {
        Self {
            operations: tally.operations,
            rate: tally.operations as f64 / seconds,
            rate_intended: None,
            bytes: tally.bytes,
            latency_us: (&tally.latency).into(),
            begun_late_us: (!tally.second.is_empty()).then(|| (&tally.second).into()),
            server_cpu_us_alone: None,
            errors: tally.errors,
            first_error: tally.first_error,
        }
    }
}

impl ProfileReport {
    pub fn new(
        what: &What<'_>,
        calibration: Option<Calibration>,
        intended: &BTreeMap<Kind, f64>,
        mix: Mix,
        mut alone: BTreeMap<Kind, Mix>,
        push: Tally,
    ) -> Self {
        let What { plan, profile, scale, hours, sessions, corpus } = *what;
        let mut parameters = plan.login.parameters();
        plan.server.describe(&mut parameters);
        parameters.insert("pop3_server", plan.pop3.as_ref().map(ToString::to_string).into());
        parameters.insert("profile", profile.name.as_str().into());
        parameters.insert("profile_file", plan.file.display().to_string().into());
        parameters.insert("as_users", scale.users.into());
        parameters.insert("speed", scale.speed.into());
        let hour = match hours {
            Hours::One(hour) => hour.into(),
            Hours::Day => "day".into(),
        };
        parameters.insert("hour", hour);
        parameters.insert("sessions_in_idle", sessions.into());
        parameters.insert("concurrency", plan.concurrency.into());
        parameters.insert("status_mailboxes", plan.status_mailboxes.into());
        parameters.insert("timeout", plan.timeout.into());
        parameters.insert("mail", format!("generated, {}", profile.sizes()).into());
        parameters.insert("mail_messages", corpus.mail.len().into());
        parameters.insert("mail_bytes", corpus.octets().into());
        parameters.insert("mail_bytes_median", corpus.median_octets().into());
        let (seconds, operations) = (mix.duration.as_secs_f64(), mix.operations());
        let client_cpu_share = mix.cost.client_cpu_s / mix.seconds;
        let cpu = mix.cost.server_cpu_s;
        let kinds = mix.tallies.into_iter().map(|(kind, tally)| {
            let mut of_kind = OfKind::new(tally, seconds);
            of_kind.rate_intended = intended.get(&kind).copied();
            if let Some(alone) = alone.remove(&kind) {
                let told = alone.cost.server_cpu_s.filter(|&cpu| cpu >= CPU_TOLD_MIN_S);
                of_kind.server_cpu_us_alone = told.map(|cpu| cpu * 1e6 / alone.operations().max(1) as f64);
                for (_, tally) in alone.tallies {
                    for (error, count) in tally.errors {
                        *of_kind.errors.entry(format!("alone: {error}")).or_default() += count;
                    }
                    of_kind.first_error = of_kind.first_error.take().or(tally.first_error);
                }
            }
            (kind.name(), of_kind)
        });
        Self {
            workload: "profile",
            version: env!("CARGO_PKG_VERSION"),
            build: BUILD,
            label: plan.keep.label.clone(),
            command: std::env::args().collect(),
            ended: seconds_since_1970(),
            machine: Machine::this(),
            calibration,
            seed: plan.seed,
            profile: profile.clone(),
            parameters,
            seconds,
            seconds_until_done: mix.seconds,
            kinds: kinds.collect(),
            push: OfKind::new(push, seconds),
            operations,
            rate: operations as f64 / seconds,
            waiting_max: mix.waiting_max,
            server_cpu_us_per_operation: cpu.map(|cpu| cpu * 1e6 / operations.max(1) as f64),
            server_cores: cpu.map(|cpu| cpu / mix.seconds),
            cost: mix.cost,
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
        Ok(self.kinds.values().chain([&self.push]).all(|kind| kind.errors.is_empty()))
    }

    fn table(&self) -> String {
        let mut text = format!(
            "profile {}, as {} users, hour: {}, speed {}: {} operations in {:.1} s, {} sessions in IDLE\n\n",
            self.profile.name,
            self.parameters["as_users"],
            self.parameters["hour"].as_str().map_or(self.parameters["hour"].to_string(), str::to_owned),
            self.parameters["speed"],
            self.operations,
            self.seconds,
            self.parameters["sessions_in_idle"],
        );
        let heads = ["", "count", "rate/s", "due/s", "p50 us", "p90", "p99", "p99.9", "max", "errors", "CPU us alone"];
        let mut rows = vec![heads.map(str::to_owned)];
        let kinds = self.kinds.iter().map(|(name, kind)| (*name, kind));
        for (name, kind) in kinds.chain([("push", &self.push)]) {
            let latency = &kind.latency_us;
            rows.push([
                name.to_owned(),
                kind.operations.to_string(),
                format!("{:.2}", kind.rate),
                kind.rate_intended.map_or(String::new(), |rate| format!("{rate:.2}")),
                latency.p50.to_string(),
                latency.p90.to_string(),
                latency.p99.to_string(),
                latency.p99_9.to_string(),
                latency.max.to_string(),
                kind.errors.values().sum::<u64>().to_string(),
                kind.server_cpu_us_alone.map_or(String::new(), |cpu| format!("{cpu:.0}")),
            ]);
        }
        let widths: Vec<usize> =
            (0..heads.len()).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
        for row in &rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text.push('\n');
        let mut line = |name: &str, value: String| text.push_str(&format!("{name:>16}  {value}\n"));
        if let (Some(cpu), Some(cores)) = (self.server_cpu_us_per_operation, self.server_cores) {
            line("server CPU", format!("{cpu:.0} us each, {cores:.3} cores"));
        }
        for memory in self.cost.show_memory() {
            line("server memory", memory);
        }
        if let (Some(flushes), Some(bytes)) = (self.cost.device_flushes, self.cost.device_written_bytes) {
            line("device", format!("{flushes} flushes, {:.1} MB written", bytes as f64 / 1e6));
        }
        line("done after", format!("{:.1} s; at most {} operations waited", self.seconds_until_done, self.waiting_max));
        let late = self.kinds.values().filter_map(|kind| kind.begun_late_us.as_ref()).map(|late| late.p99).max();
        line("begun late", format!("p99 {} us", late.unwrap_or(0)));
        let bound = if self.client_bound { ": the client was the limit" } else { "" };
        line("client CPU", format!("{:.0} %{bound}", self.client_cpu_share * 100.0));
        for (name, kind) in self.kinds.iter().map(|(name, kind)| (*name, kind)).chain([("push", &self.push)]) {
            for (error, count) in &kind.errors {
                line("errors", format!("{count} {name}: {error}"));
            }
            if let Some(first) = &kind.first_error {
                line("first error", format!("{name}: {first}"));
            }
        }
        text
    }
}
