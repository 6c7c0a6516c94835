//! Compares the reports of two files as ratios.
//!
//! Runs belong together if workload and parameters are the same. Where a server listens, and what its users are called, does
//! not count, nor how long a run lasted and what its random choices came from. Of repeated runs the medians are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::Value;

/// Parameters in which runs that belong together may differ.
const NOT_COMPARED: [&str; 12] = [
    "server",
    "delivery_server",
    "pop3_server",
    "users",
    "profile_file",
    "mail",
    "messages",
    "seconds",
    "hold",
    "timeout",
    "seed",
    "verify",
];

/// What is compared.
const FIGURES: [Figure; 11] = [
    Figure { name: "rate, /s", path: &["rate"], by_cpu: Scale::Rate, by_disk: Scale::Rate },
    Figure { name: "p50, us", path: &["latency_us", "p50"], by_cpu: Scale::Time, by_disk: Scale::Time },
    Figure { name: "p99, us", path: &["latency_us", "p99"], by_cpu: Scale::Time, by_disk: Scale::Time },
    Figure {
        name: "server CPU, us each",
        path: &["server_cpu_us_per_operation"],
        by_cpu: Scale::Time,
        by_disk: Scale::None,
    },
    Figure { name: "RssAnon, bytes", path: &["cost", "server_rss_anon_bytes"], ..PLAIN },
    Figure { name: "PSS, bytes", path: &["cost", "server_pss_bytes"], ..PLAIN },
    Figure { name: "written bytes per byte", path: &["written_bytes_per_byte"], ..PLAIN },
    Figure { name: "flushes each", path: &["flushes_per_operation"], ..PLAIN },
    Figure { name: "RssAnon, bytes per connection", path: &["rss_anon_bytes_per_connection"], ..PLAIN },
    Figure { name: "PSS, bytes per connection", path: &["pss_bytes_per_connection"], ..PLAIN },
    Figure { name: "server CPU, us per login", path: &["server_cpu_us_per_login"], by_cpu: Scale::Time, ..PLAIN },
];

/// A figure that does not depend on how fast the machine is.
const PLAIN: Figure = Figure { name: "", path: &[], by_cpu: Scale::None, by_disk: Scale::None };

struct Figure {
    name: &'static str,
    /// Where it is in a report.
    path: &'static [&'static str],
    by_cpu: Scale,
    by_disk: Scale,
}

/// How a figure depends on a machine's speed.
#[derive(Clone, Copy)]
enum Scale {
    None,
    /// A machine that is twice as fast has twice as much.
    Rate,
    /// A machine that is twice as fast has half as much.
    Time,
}

/// Prints ratios of the reports of two files.
#[derive(Clone, Debug, Args)]
pub struct Compare {
    /// Reports that --output has written: what is compared with
    #[arg(value_name = "A.jsonl")]
    a: PathBuf,
    /// Reports that --output has written: what is compared. The ratio of two figures is that of B to A
    #[arg(value_name = "B.jsonl")]
    b: PathBuf,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Runs of one kind in both files.
#[derive(Debug, Serialize)]
struct Comparison {
    workload: String,
    parameters: BTreeMap<String, Value>,
    label_a: Vec<String>,
    label_b: Vec<String>,
    /// How the machines compare, if both were calibrated: B to A.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    disk_ratio: Option<f64>,
    figures: Vec<Compared>,
    /// Runs with errors, or in which the client was the limit: their figures say little.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Compared {
    figure: String,
    a: Spread,
    b: Spread,
    /// Of the medians, B to A.
    ratio: f64,
    /// As it would be if both CPUs were as fast; means something if the CPU was the limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_by_cpu: Option<f64>,
    /// As it would be if both disks were as fast; means something if the disk was the limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_by_disk: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
    n: usize,
}

impl Spread {
    /// `None` of nothing.
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max, n) = (*values.first()?, *values.last()?, values.len());
        let median = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
        Some(Self { median, min, max, n })
    }
}

/// A report that was read.
type Run = Value;
/// Workload and parameters, as text so that they have an order.
type Key = (String, BTreeMap<String, String>);

impl Compare {
    /// Prints the ratios.
    ///
    /// # Errors
    /// A file cannot be read, or nothing in one is like anything in the other.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let (a, b) = (read(&self.a)?, read(&self.b)?);
        let comparisons = compare(&a, &b);
        if comparisons.is_empty() {
            return Err(nothing(&self.a, &a, &self.b, &b).into());
        }
        let mut out = stdout().lock();
        if self.json {
            writeln!(out, "{}", serde_json::to_string(&comparisons)?)?;
        } else {
            let tables: Vec<String> = comparisons.iter().map(Comparison::table).collect();
            out.write_all(tables.join("\n").as_bytes())?;
        }
        Ok(true)
    }
}

fn read(path: &Path) -> Result<BTreeMap<Key, Vec<Run>>, Box<dyn Error>> {
    let text = fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let mut runs: BTreeMap<Key, Vec<Run>> = BTreeMap::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let bad = |what: &dyn std::fmt::Display| format!("{}, line {}: {what}", path.display(), index + 1);
        let run: Run = serde_json::from_str(line).map_err(|error| bad(&error))?;
        let key = key(&run).ok_or_else(|| bad(&"this is no report of a run: it has no workload"))?;
        runs.entry(key).or_default().push(run);
    }
    Ok(runs)
}

fn key(run: &Run) -> Option<Key> {
    let compared = parameters(run).filter(|(name, _)| !NOT_COMPARED.contains(&name.as_str()));
    let parameters = compared.map(|(name, value)| (name.clone(), value.to_string())).collect();
    Some((run["workload"].as_str()?.to_owned(), parameters))
}

/// What was not given is as if there were no such parameter.
fn parameters(run: &Run) -> impl Iterator<Item = (&String, &Value)> {
    run["parameters"].as_object().into_iter().flatten().filter(|(_, value)| !value.is_null())
}

fn compare(a: &BTreeMap<Key, Vec<Run>>, b: &BTreeMap<Key, Vec<Run>>) -> Vec<Comparison> {
    let both = a.iter().filter_map(|(key, of_a)| Some((key, of_a, b.get(key)?)));
    both.map(|(key, of_a, of_b)| Comparison::of(&key.0, of_a, of_b)).collect()
}

fn number(run: &Run, path: &[&str]) -> Option<f64> {
    path.iter().try_fold(run, |value, name| value.get(name))?.as_f64()
}

fn spread(runs: &[Run], path: &[&str]) -> Option<Spread> {
    Spread::of(runs.iter().filter_map(|run| number(run, path)).collect())
}

impl Comparison {
    fn of(workload: &str, a: &[Run], b: &[Run]) -> Self {
        let speed = |path: &[&str]| Some(spread(b, path)?.median / spread(a, path)?.median);
        let cpu_ratio = speed(&["calibration", "cpu_megabytes_per_s"]);
        let disk_ratio = speed(&["calibration", "disk_4k", "syncs_per_s"]);
        let scaled = |ratio: f64, scale: Scale, speed: Option<f64>| match scale {
            Scale::None => None,
            Scale::Rate => Some(ratio / speed?),
            Scale::Time => Some(ratio * speed?),
        };
        let compared = |name: String, path: &[&str], by_cpu: Scale, by_disk: Scale| {
            let (a, b) = (spread(a, path)?, spread(b, path)?);
            let ratio = b.median / a.median;
            ratio.is_finite().then_some(Compared {
                figure: name,
                a,
                b,
                ratio,
                ratio_by_cpu: scaled(ratio, by_cpu, cpu_ratio),
                ratio_by_disk: scaled(ratio, by_disk, disk_ratio),
            })
        };
        let mut figures: Vec<Compared> = FIGURES
            .iter()
            .filter_map(|figure| compared(figure.name.to_owned(), figure.path, figure.by_cpu, figure.by_disk))
            .collect();
        // A profile has operations of several kinds.
        for kind in a[0]["kinds"].as_object().into_iter().flat_map(|kinds| kinds.keys()) {
            for (name, path, by_disk) in [
                ("p50, us", &["latency_us", "p50"][..], Scale::Time),
                ("p99, us", &["latency_us", "p99"], Scale::Time),
                ("server CPU alone, us", &["server_cpu_us_alone"], Scale::None),
            ] {
                let path = [&["kinds", kind.as_str()], path].concat();
                figures.extend(compared(format!("{kind}: {name}"), &path, Scale::Time, by_disk));
            }
        }
        let label = |runs: &[Run]| {
            let labels: BTreeSet<&str> = runs.iter().filter_map(|run| run["label"].as_str()).collect();
            labels.into_iter().map(str::to_owned).collect()
        };
        let matched = parameters(&a[0]).filter(|(name, _)| !NOT_COMPARED.contains(&name.as_str()));
        Self {
            workload: workload.to_owned(),
            parameters: matched.map(|(name, value)| (name.clone(), value.clone())).collect(),
            label_a: label(a),
            label_b: label(b),
            cpu_ratio,
            disk_ratio,
            figures,
            warnings: [("A", a), ("B", b)].iter().flat_map(|(name, runs)| warnings(name, runs)).collect(),
        }
    }

    fn table(&self) -> String {
        let parameters = self.parameters.iter().map(|(name, value)| format!("{name} {value}"));
        let mut text = format!("{}: {}\n", self.workload, parameters.collect::<Vec<_>>().join(", "));
        for (name, labels) in [("A", &self.label_a), ("B", &self.label_b)] {
            if !labels.is_empty() {
                text += &format!("  {name}: {}\n", labels.join(", "));
            }
        }
        let machines = [("CPU", self.cpu_ratio), ("disk", self.disk_ratio)];
        for (name, ratio) in machines.iter().filter_map(|(name, ratio)| Some((name, (*ratio)?))) {
            text += &format!("  the {name} of B is {ratio:.2} times as fast as that of A\n");
        }
        let widths = [30, 34, 34, 8, 8, 8];
        let line = |cells: [String; 6]| {
            let cells = cells.iter().zip(widths).enumerate();
            let padded = cells.map(|(at, (cell, width))| match at {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            format!("  {}\n", padded.collect::<Vec<_>>().join(" ").trim_end())
        };
        text += &line(["", "A: median (min-max, n)", "B", "B / A", "by CPU", "by disk"].map(str::to_owned));
        let optional = |ratio: Option<f64>| ratio.map_or(String::new(), |ratio| format!("{ratio:.3}"));
        for compared in &self.figures {
            text += &line([
                compared.figure.clone(),
                show(&compared.a),
                show(&compared.b),
                format!("{:.3}", compared.ratio),
                optional(compared.ratio_by_cpu),
                optional(compared.ratio_by_disk),
            ]);
        }
        for warning in &self.warnings {
            text += &format!("  {warning}\n");
        }
        text
    }
}

/// Three digits after the point for what is small, none for what is large.
fn show(spread: &Spread) -> String {
    let digits = if spread.median.abs() < 100.0 { 3 } else { 0 };
    let Spread { median, min, max, n } = spread;
    format!("{median:.digits$} ({min:.digits$}-{max:.digits$}, {n})")
}

fn warnings(name: &str, runs: &[Run]) -> Vec<String> {
    let count = |is: &dyn Fn(&Run) -> bool| runs.iter().filter(|run| is(run)).count();
    let are = |errors: &Value| match errors {
        Value::Object(errors) => !errors.is_empty(),
        errors => errors.as_u64().is_some_and(|errors| errors > 0),
    };
    let has_errors = move |run: &Run| {
        let kinds = run["kinds"].as_object().into_iter().flat_map(|kinds| kinds.values());
        kinds.chain([run, &run["push"]]).any(|part| are(&part["errors"]))
    };
    let kinds = [
        (count(&has_errors), "had errors"),
        (count(&|run| run["client_bound"] == true), "were limited by the client"),
        (count(&|run| run["build"] == "debug"), "were made with a debug build"),
    ];
    let some = kinds.iter().filter(|(count, _)| *count > 0);
    some.map(|(count, what)| format!("warning: {count} of {} runs of {name} {what}", runs.len())).collect()
}

/// Says why nothing could be compared.
fn nothing(path_a: &Path, a: &BTreeMap<Key, Vec<Run>>, path_b: &Path, b: &BTreeMap<Key, Vec<Run>>) -> String {
    let mut text = format!("no run of {} is like one of {}", path_a.display(), path_b.display());
    for (path, runs) in [(path_a, a), (path_b, b)] {
        if runs.is_empty() {
            return format!("{text}: {} has no reports", path.display());
        }
    }
    let differences = a.keys().flat_map(|(workload, of_a)| {
        let same = b.keys().filter(move |(other, _)| other == workload);
        same.map(move |(_, of_b)| (workload, difference(of_a, of_b)))
    });
    match differences.min_by_key(|(_, difference)| difference.len()) {
        Some((workload, difference)) => {
            text += &format!("; the most similar are runs of {workload} that differ in {}", difference.join(", "));
        }
        None => {
            let names = |runs: &BTreeMap<Key, Vec<Run>>| {
                let names: BTreeSet<&str> = runs.keys().map(|(workload, _)| workload.as_str()).collect();
                names.into_iter().collect::<Vec<_>>().join(", ")
            };
            text += &format!(": the workloads are {} there and {} here", names(a), names(b));
        }
    }
    text
}

fn difference(a: &BTreeMap<String, String>, b: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let value = |of: &BTreeMap<String, String>, name| of.get(name).map_or("none", String::as_str).to_owned();
    let differing = names.into_iter().filter(|name| a.get(*name) != b.get(*name));
    differing.map(|name| format!("{name} ({} and {})", value(a, name), value(b, name))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn run(server: &str, connections: u64, rate: f64, calibrated: Option<(f64, f64)>) -> Run {
        json!({
            "workload": "deliver",
            "label": server,
            "parameters": {"server": server, "connections": connections, "messages": null, "seconds": rate},
            "rate": rate,
            "latency_us": {"p50": 100, "p99": 400},
            "server_cpu_us_per_operation": 1e6 / rate,
            "errors": {},
            "calibration": calibrated.map(|(cpu, disk)| json!({
                "cpu_megabytes_per_s": cpu,
                "disk_4k": {"syncs_per_s": disk},
            })),
        })
    }

    fn file(runs: &[Run]) -> BTreeMap<Key, Vec<Run>> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runs.jsonl");
        fs::write(&path, runs.iter().map(|run| format!("{run}\n\n")).collect::<String>()).unwrap();
        read(&path).unwrap()
    }

    fn figure<'a>(comparison: &'a Comparison, name: &str) -> &'a Compared {
        comparison.figures.iter().find(|compared| compared.figure.starts_with(name)).unwrap()
    }

    #[test]
    fn medians_are_compared() {
        let a = file(&[run("a:1", 4, 100.0, None), run("a:1", 4, 300.0, None), run("a:1", 4, 120.0, None)]);
        let b = file(&[run("b:1", 4, 200.0, None), run("b:1", 4, 280.0, None), run("b:1", 8, 1.0, None)]);
        let comparisons = compare(&a, &b);
        assert_eq!(comparisons.len(), 1);
        let rate = figure(&comparisons[0], "rate");
        assert_eq!(rate.a, Spread { median: 120.0, min: 100.0, max: 300.0, n: 3 });
        assert_eq!(rate.b, Spread { median: 240.0, min: 200.0, max: 280.0, n: 2 });
        assert_eq!((rate.ratio, rate.ratio_by_cpu), (2.0, None));
        assert_eq!(figure(&comparisons[0], "p99").ratio, 1.0);
        let table = comparisons[0].table();
        assert!(table.starts_with("deliver: connections 4\n  A: a:1\n  B: b:1\n"), "{table}");
        assert!(table.contains("120 (100-300, 3)") && table.contains("2.000"), "{table}");
        assert!(comparisons[0].warnings.is_empty());
    }

    #[test]
    fn machines_are_brought_to_the_same_speed() {
        let a = file(&[run("a:1", 4, 100.0, Some((50.0, 1000.0)))]);
        let b = file(&[run("b:1", 4, 300.0, Some((100.0, 500.0)))]);
        let comparison = &compare(&a, &b)[0];
        assert_eq!((comparison.cpu_ratio, comparison.disk_ratio), (Some(2.0), Some(0.5)));
        let rate = figure(comparison, "rate");
        assert_eq!((rate.ratio_by_cpu, rate.ratio_by_disk), (Some(1.5), Some(6.0)));
        let cpu = figure(comparison, "server CPU");
        assert!((cpu.ratio_by_cpu.unwrap() - 2.0 / 3.0).abs() < 1e-9 && cpu.ratio_by_disk.is_none());
    }

    #[test]
    fn it_is_said_why_nothing_matches() {
        let say = |a: &[Run], b: &[Run]| nothing(Path::new("a"), &file(a), Path::new("b"), &file(b));
        let deliver = run("a:1", 4, 100.0, None);
        let text = say(std::slice::from_ref(&deliver), &[run("b:1", 8, 100.0, None)]);
        assert!(text.contains("deliver that differ in connections (4 and 8)"), "{text}");
        let mut other = deliver.clone();
        other["workload"] = "fetch".into();
        let text = say(std::slice::from_ref(&deliver), &[other]);
        assert!(text.contains("the workloads are deliver there and fetch here"), "{text}");
        assert!(say(&[deliver], &[]).contains("b has no reports"));
    }

    #[test]
    fn kinds_of_operations_are_compared() {
        let profile = |p99: u64, errors: Value| {
            json!({
                "workload": "profile",
                "parameters": {"profile_file": format!("/{p99}/isp.toml"), "seed": p99},
                "kinds": {"deliver": {"latency_us": {"p50": 5, "p99": p99}, "errors": errors}},
            })
        };
        let (a, b) = (file(&[profile(100, json!({}))]), file(&[profile(250, json!({"timed out": 1}))]));
        let comparison = &compare(&a, &b)[0];
        assert_eq!(figure(comparison, "deliver: p99").ratio, 2.5);
        assert_eq!(comparison.warnings, ["warning: 1 of 1 runs of B had errors"]);
    }

    #[test]
    fn doubtful_runs_are_named() {
        let mut bad = run("a:1", 4, 100.0, None);
        bad["errors"]["452 after RCPT"] = 3.into();
        bad["client_bound"] = true.into();
        let comparison = &compare(&file(&[bad]), &file(&[run("b:1", 4, 100.0, None)]))[0];
        assert_eq!(comparison.warnings.len(), 2, "{:?}", comparison.warnings);
        assert!(comparison.warnings[0].contains("1 of 1 runs of A had errors"));
    }
}
