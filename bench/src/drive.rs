//! Connections in a closed loop: threads, the common start, the end, progress, and what is counted.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::runtime::Builder;
use tokio::sync::Barrier;
use tokio::task::LocalSet;

use crate::observe::{Cost, Watch};

/// The longest latency that is told from longer ones: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;

/// How much load, and for how long.
#[derive(Clone, Debug, clap::Args)]
pub struct Load {
    /// Connections, each with one operation on its way
    #[arg(long, value_name = "C", default_value_t = 1)]
    pub connections: usize,
    /// End after so many operations
    #[arg(long, value_name = "M", conflicts_with = "seconds")]
    pub messages: Option<u64>,
    /// End after so much time [default: 10, if --messages is not given]
    #[arg(long, value_name = "S")]
    pub seconds: Option<f64>,
    /// An operation that takes longer is an error
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    pub timeout: f64,
    /// Threads of the load generator
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub threads: usize,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

impl Load {
    /// The longest an operation may take.
    pub fn operation_timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout)
    }

    /// Whether there is more to do after so many operations in so much time.
    pub fn goes_on(&self, operations: u64, elapsed: Duration) -> bool {
        self.messages.is_none_or(|limit| operations < limit) && self.duration().is_none_or(|limit| elapsed < limit)
    }

    fn duration(&self) -> Option<Duration> {
        match (self.messages, self.seconds) {
            (Some(_), None) => None,
            (_, seconds) => Some(Duration::from_secs_f64(seconds.unwrap_or(10.0))),
        }
    }
}

/// What has been counted.
#[derive(Clone, Debug)]
pub struct Tally {
    pub operations: u64,
    pub bytes: u64,
    /// Microseconds.
    pub latency: Histogram<u64>,
    /// Microseconds of a second interval, if the workload has one.
    pub second: Histogram<u64>,
    /// What else there is to count.
    pub counts: BTreeMap<&'static str, u64>,
    pub errors: BTreeMap<String, u64>,
    /// The first error in full.
    pub first_error: Option<String>,
}

impl Default for Tally {
    fn default() -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("an hour in three digits is allowed");
        let (latency, second) = (histogram(), histogram());
        Self {
            operations: 0,
            bytes: 0,
            latency,
            second,
            counts: BTreeMap::new(),
            errors: BTreeMap::new(),
            first_error: None,
        }
    }
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.operations += other.operations;
        self.bytes += other.bytes;
        for (to, from) in [(&mut self.latency, other.latency), (&mut self.second, other.second)] {
            to.add(from).expect("both have the same bounds");
        }
        for (name, count) in other.counts {
            *self.counts.entry(name).or_default() += count;
        }
        for (kind, count) in other.errors {
            *self.errors.entry(kind).or_default() += count;
        }
        self.first_error = self.first_error.take().or(other.first_error);
    }

    /// Counts one operation.
    pub fn count(&mut self, bytes: u64, latency: Duration) {
        self.operations += 1;
        self.bytes += bytes;
        record(&mut self.latency, latency);
    }

    /// Counts an interval within an operation.
    pub fn count_second(&mut self, latency: Duration) {
        record(&mut self.second, latency);
    }

    pub fn count_error(&mut self, kind: String, message: impl FnOnce() -> String) {
        *self.errors.entry(kind).or_default() += 1;
        if self.first_error.is_none() {
            self.first_error = Some(message());
        }
    }

    pub fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// What all connections share.
struct Common {
    issued: AtomicU64,
    done: AtomicU64,
    errors: AtomicU64,
    limit: Option<u64>,
    deadline: OnceLock<Option<Instant>>,
    ready: Barrier,
    start: Barrier,
    ended: AtomicBool,
}

/// A connection's end of the run.
pub struct Seat {
    /// Counts from 0.
    pub index: usize,
    common: Arc<Common>,
    tally: Rc<RefCell<Tally>>,
}

impl Seat {
    /// Waits until every connection is set up. Each connection calls this once, also if its set-up failed.
    pub async fn ready(&self) {
        self.common.ready.wait().await;
        self.common.start.wait().await;
    }

    /// The number of the next operation, from 0; `None` when the run is over.
    pub fn next(&self) -> Option<u64> {
        if self.common.deadline.get().is_some_and(|deadline| deadline.is_some_and(|at| Instant::now() >= at)) {
            return None;
        }
        let number = self.common.issued.fetch_add(1, Ordering::Relaxed);
        self.common.limit.is_none_or(|limit| number < limit).then_some(number)
    }

    /// Counts operations that succeeded together.
    pub fn count(&self, operations: u64, bytes: u64, latency: Duration) {
        let mut tally = self.tally.borrow_mut();
        tally.operations += operations;
        tally.bytes += bytes;
        record(&mut tally.latency, latency);
        self.common.done.fetch_add(operations, Ordering::Relaxed);
    }

    /// Counts an interval within an operation.
    pub fn count_second(&self, latency: Duration) {
        self.tally.borrow_mut().count_second(latency);
    }

    /// Adds to what else there is to count.
    pub fn count_also(&self, name: &'static str, count: u64) {
        *self.tally.borrow_mut().counts.entry(name).or_default() += count;
    }

    pub fn count_error(&self, kind: String, message: impl FnOnce() -> String) {
        self.tally.borrow_mut().count_error(kind, message);
        self.common.errors.fetch_add(1, Ordering::Relaxed);
    }
}

fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    histogram.record(micros.min(LATENCY_US_MAX)).expect("the histogram goes so far");
}

/// A run that has ended.
#[derive(Debug)]
pub struct Ran {
    pub seconds: f64,
    pub tally: Tally,
    pub cost: Cost,
    /// Of the cores that its threads could have used.
    pub client_cpu_share: f64,
}

/// Runs `connection` for each connection and waits for their ends. The clock, and the counting of what it costs, starts
/// when all are ready.
///
/// # Errors
/// What is to be watched is not there, or a thread could not be made.
pub fn run<F: Future<Output = ()> + 'static>(
    load: &Load,
    watch: &Watch,
    connection: impl Fn(Seat) -> F + Send + Clone + 'static,
) -> Result<Ran, Box<dyn Error>> {
    watch.snapshot()?;
    let connections = load.connections.max(1);
    let threads = load.threads.clamp(1, connections);
    let common = Arc::new(Common {
        issued: AtomicU64::new(0),
        done: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        limit: load.messages,
        deadline: OnceLock::new(),
        ready: Barrier::new(connections + 1),
        start: Barrier::new(connections + 1),
        ended: AtomicBool::new(false),
    });
    let mut workers = Vec::with_capacity(threads);
    for thread in 0..threads {
        let (common, connection) = (Arc::clone(&common), connection.clone());
        let worker = thread::Builder::new().name(format!("load-{thread}")).spawn(move || {
            let tally = Rc::new(RefCell::new(Tally::default()));
            let local = LocalSet::new();
            for index in (thread..connections).step_by(threads) {
                let seat = Seat { index, common: Arc::clone(&common), tally: Rc::clone(&tally) };
                local.spawn_local(connection(seat));
            }
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
            runtime.block_on(local);
            tally.take()
        })?;
        workers.push(worker);
    }
    let control = Builder::new_current_thread().build()?;
    control.block_on(common.ready.wait());
    let before = watch.snapshot_before()?;
    let start = Instant::now();
    common.deadline.get_or_init(|| load.duration().map(|duration| start + duration));
    let progress = show_progress(load, &common, start)?;
    control.block_on(common.start.wait());
    let mut tally = Tally::default();
    for worker in workers {
        tally.add(worker.join().map_err(|_| "a thread of the load generator panicked")?);
    }
    let elapsed = start.elapsed();
    let after = watch.snapshot()?;
    common.ended.store(true, Ordering::Relaxed);
    progress.thread().unpark();
    progress.join().map_err(|_| "the progress display panicked")?;
    let cost = Cost::between(&before, &after);
    let client_cpu_share = cost.client_cpu_s / elapsed.as_secs_f64() / threads as f64;
    Ok(Ran { seconds: elapsed.as_secs_f64(), tally, cost, client_cpu_share })
}

/// Shows on a terminal how far the run is.
fn show_progress(load: &Load, common: &Arc<Common>, start: Instant) -> Result<thread::JoinHandle<()>, Box<dyn Error>> {
    let (common, limit, duration) = (Arc::clone(common), load.messages, load.duration());
    let bar = ProgressBar::new(limit.unwrap_or_else(|| duration.unwrap_or_default().as_millis() as u64));
    bar.set_style(ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {msg}")?.progress_chars("=> "));
    let show = move || {
        while !common.ended.load(Ordering::Relaxed) {
            thread::park_timeout(Duration::from_millis(500));
            let (done, errors) = (common.done.load(Ordering::Relaxed), common.errors.load(Ordering::Relaxed));
            let elapsed = start.elapsed();
            bar.set_position(if limit.is_some() { done + errors } else { elapsed.as_millis() as u64 });
            bar.set_message(format!("{done} done, {:.0}/s, {errors} errors", done as f64 / elapsed.as_secs_f64()));
        }
        bar.finish_and_clear();
    };
    Ok(thread::Builder::new().name("progress".to_owned()).spawn(show)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_latencies_are_kept() {
        let mut tally = Tally::default();
        for millis in [1, 50, 70_000] {
            record(&mut tally.latency, Duration::from_millis(millis));
        }
        record(&mut tally.latency, Duration::from_secs(1 << 40));
        assert!((49_900..50_100).contains(&tally.latency.value_at_quantile(0.5)));
        assert!((69_900_000..70_100_000).contains(&tally.latency.value_at_quantile(0.75)));
        assert!(tally.latency.max() >= LATENCY_US_MAX);
    }
}
