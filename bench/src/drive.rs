//! Connections in a closed or an open loop: threads, the common start, the end, progress, and what is counted.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::runtime::Builder;
use tokio::sync::Barrier;
use tokio::task::LocalSet;

use crate::calibrate::Calibration;
use crate::observe::{Cost, Watch};
use crate::open_loop::{Alarm, Arrivals, Counts, DRAIN_MAX, Queue, WAITING_MAX};
use crate::report::Keep;

/// The longest latency that is told from longer ones: an hour.
const LATENCY_US_MAX: u64 = 3_600_000_000;
/// How often a thread of an open loop looks how late it is.
const PULSE: Duration = Duration::from_millis(10);
/// The kinds of errors that are the open loop's own.
const ALL_BUSY: &str = "not sent: all connections busy";
const RUN_OVER: &str = "not sent: the run was over";

/// How much load, and for how long.
#[derive(Clone, Debug, clap::Args)]
pub struct Load {
    /// Connections, each with one operation on its way
    #[arg(long, value_name = "C", default_value_t = 1)]
    pub connections: usize,
    /// Open loop: operations that are due in a second, at random moments (Poisson). Latency counts from the moment that an
    /// operation is due [default: each connection begins the next when the last is done]
    #[arg(long, value_name = "R", value_parser = Arrivals::parse_rate)]
    pub rate: Option<f64>,
    /// What random choices come from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
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
    #[command(flatten)]
    pub keep: Keep,
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

    /// How long it is to last, if it ends by time.
    pub fn duration(&self) -> Option<Duration> {
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
    /// Microseconds by which the client itself was late, in an open loop.
    pub lag: Histogram<u64>,
    pub errors: BTreeMap<String, u64>,
    /// The first error in full.
    pub first_error: Option<String>,
}

impl Default for Tally {
    fn default() -> Self {
        let (latency, second, lag) = (latencies(), latencies(), latencies());
        Self {
            operations: 0,
            bytes: 0,
            latency,
            second,
            lag,
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
        let lag = (&mut self.lag, other.lag);
        for (to, from) in [(&mut self.latency, other.latency), (&mut self.second, other.second), lag] {
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
        self.count_errors(1, kind, message);
    }

    /// Counts errors of one kind.
    pub fn count_errors(&mut self, count: u64, kind: String, message: impl FnOnce() -> String) {
        if count == 0 {
            return;
        }
        *self.errors.entry(kind).or_default() += count;
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
    open: Option<Open>,
    ready: Barrier,
    start: Barrier,
    ended: AtomicBool,
}

/// An open loop.
struct Open {
    rate: f64,
    seed: u64,
    /// Set when the run starts; taken when it is over.
    queue: Mutex<Option<Queue>>,
    start: OnceLock<Instant>,
    /// Set if the workload did not ask for the moment of an arrival.
    ignored: AtomicBool,
}

impl Open {
    fn with<T>(&self, act: impl FnOnce(&mut Queue) -> T) -> Option<T> {
        self.queue.lock().expect("no thread panics while it has the queue").as_mut().map(act)
    }
}

/// What the connections of one thread share.
#[derive(Default)]
struct Local {
    tally: RefCell<Tally>,
    /// Whoever has it waits for the next arrival. The others follow in the order in which they became free.
    turn: tokio::sync::Mutex<()>,
    alarm: Alarm,
}

/// An operation that may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Counts from 0.
    pub number: u64,
    /// When it was to begin: latency counts from here. In a closed loop this is when the turn came.
    pub due: Instant,
}

/// A connection's end of the run.
pub struct Seat {
    /// Counts from 0.
    pub index: usize,
    common: Arc<Common>,
    local: Rc<Local>,
}

impl Seat {
    /// Waits until every connection is set up. Each connection calls this once, also if its set-up failed.
    pub async fn ready(&self) {
        self.common.ready.wait().await;
        self.common.start.wait().await;
    }

    /// Waits until the next operation is due, which in a closed loop is now; `None` when the run is over.
    pub async fn turn(&self) -> Option<Turn> {
        let Some(open) = &self.common.open else {
            return self.next().map(|number| Turn { number, due: Instant::now() });
        };
        let free_since = Instant::now();
        let _turn = self.local.turn.lock().await;
        let start = *open.start.get()?;
        let taken = open.with(|queue| (queue.take(start.elapsed()), queue.take_turned_away()));
        let (arrival, turned_away) = taken?;
        if turned_away > 0 {
            let message = || format!("{WAITING_MAX} operations waited for a free connection");
            self.local.tally.borrow_mut().count_errors(turned_away, ALL_BUSY.to_owned(), message);
            self.common.errors.fetch_add(turned_away, Ordering::Relaxed);
        }
        let arrival = arrival?;
        let due = start + arrival.due;
        if let Err(error) = self.local.alarm.wait_until(due).await {
            self.count_error("not sent: no timer".to_owned(), || error.to_string());
            return None;
        }
        if free_since <= due {
            record(&mut self.local.tally.borrow_mut().lag, due.elapsed());
        }
        Some(Turn { number: arrival.number, due })
    }

    /// Whether one more operation may go together with that of the last [`Seat::turn`]. In an open loop an arrival is one
    /// group of operations, whatever their number.
    pub fn goes_along(&self) -> bool {
        self.common.open.is_some() || self.next().is_some()
    }

    /// The number of the next operation of a closed loop, from 0; `None` when the run is over. A workload that asks for
    /// nothing else has no open loop, and a run with a rate fails.
    pub fn next(&self) -> Option<u64> {
        if let Some(open) = &self.common.open {
            open.ignored.store(true, Ordering::Relaxed);
            return None;
        }
        if self.common.deadline.get().is_some_and(|deadline| deadline.is_some_and(|at| Instant::now() >= at)) {
            return None;
        }
        let number = self.common.issued.fetch_add(1, Ordering::Relaxed);
        self.common.limit.is_none_or(|limit| number < limit).then_some(number)
    }

    /// Counts operations that succeeded together.
    pub fn count(&self, operations: u64, bytes: u64, latency: Duration) {
        let mut tally = self.local.tally.borrow_mut();
        tally.operations += operations;
        tally.bytes += bytes;
        record(&mut tally.latency, latency);
        self.common.done.fetch_add(operations, Ordering::Relaxed);
    }

    /// Counts an interval within an operation.
    pub fn count_second(&self, latency: Duration) {
        self.local.tally.borrow_mut().count_second(latency);
    }

    /// Adds to what else there is to count.
    pub fn count_also(&self, name: &'static str, count: u64) {
        *self.local.tally.borrow_mut().counts.entry(name).or_default() += count;
    }

    pub fn count_error(&self, kind: String, message: impl FnOnce() -> String) {
        self.local.tally.borrow_mut().count_error(kind, message);
        self.common.errors.fetch_add(1, Ordering::Relaxed);
    }
}

/// Latencies in microseconds.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_US_MAX, 3).expect("an hour in three digits is allowed")
}

/// Records a latency, one that is too long as the longest there is.
pub fn record(histogram: &mut Histogram<u64>, latency: Duration) {
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
    /// What became of the arrivals of an open loop.
    pub arrivals: Option<Counts>,
    pub calibration: Option<Calibration>,
}

/// Runs `connection` for each connection and waits for their ends. The clock, and the counting of what it costs, starts
/// when all are ready.
///
/// # Errors
/// What is to be watched is not there, a thread could not be made, or the workload has no open loop although a rate is given.
pub fn run<F: Future<Output = ()> + 'static>(
    load: &Load,
    watch: &Watch,
    connection: impl Fn(Seat) -> F + Send + Clone + 'static,
) -> Result<Ran, Box<dyn Error>> {
    watch.snapshot()?;
    let calibration = load.keep.calibration()?;
    let connections = load.connections.max(1);
    let threads = load.threads.clamp(1, connections);
    let open = load.rate.map(|rate| Open {
        rate,
        seed: load.seed,
        queue: Mutex::new(None),
        start: OnceLock::new(),
        ignored: AtomicBool::new(false),
    });
    let common = Arc::new(Common {
        issued: AtomicU64::new(0),
        done: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        limit: load.messages,
        deadline: OnceLock::new(),
        open,
        ready: Barrier::new(connections + 1),
        start: Barrier::new(connections + 1),
        ended: AtomicBool::new(false),
    });
    let mut workers = Vec::with_capacity(threads);
    for thread in 0..threads {
        let (common, connection) = (Arc::clone(&common), connection.clone());
        let indexes = (thread..connections).step_by(threads);
        let worker =
            thread::Builder::new().name(format!("load-{thread}")).spawn(move || work(&common, indexes, &connection))?;
        workers.push(worker);
    }
    let control = Builder::new_current_thread().build()?;
    control.block_on(common.ready.wait());
    let before = watch.snapshot_before()?;
    let following = watch.follow()?;
    let start = Instant::now();
    let deadline = load.duration().map(|duration| start + duration);
    common.deadline.get_or_init(|| deadline);
    if let Some(open) = &common.open {
        let arrivals = Arrivals::new(open.seed, open.rate);
        let drain = load.operation_timeout().min(DRAIN_MAX);
        *open.queue.lock().map_err(|_| "a thread of the load generator panicked")? =
            Some(Queue::new(arrivals, WAITING_MAX, load.messages, load.duration().map(|end| (end, drain))));
        open.start.get_or_init(|| start);
    }
    let progress = show_progress(load, &common, start)?;
    control.block_on(common.start.wait());
    let mut tally = Tally::default();
    for worker in workers {
        tally.add(worker.join().map_err(|_| "a thread of the load generator panicked")?);
    }
    let elapsed = start.elapsed();
    drop(following);
    let after = watch.snapshot()?;
    common.ended.store(true, Ordering::Relaxed);
    progress.thread().unpark();
    progress.join().map_err(|_| "the progress display panicked")?;
    let arrivals = match &common.open {
        Some(open) if open.ignored.load(Ordering::Relaxed) => {
            return Err("this workload has no open loop: leave out --rate".into());
        }
        Some(open) => close(open, elapsed, &mut tally),
        None => None,
    };
    let cost = Cost::between(&before, &after);
    let client_cpu_share = cost.client_cpu_s / elapsed.as_secs_f64() / threads as f64;
    Ok(Ran { seconds: elapsed.as_secs_f64(), tally, cost, client_cpu_share, arrivals, calibration })
}

/// One thread, with its connections.
fn work<F: Future<Output = ()> + 'static>(
    common: &Arc<Common>,
    indexes: impl Iterator<Item = usize>,
    connection: &impl Fn(Seat) -> F,
) -> Tally {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
    let local = Rc::new(Local::default());
    let tasks = LocalSet::new();
    let connections: Vec<_> = indexes
        .map(|index| {
            let seat = Seat { index, common: Arc::clone(common), local: Rc::clone(&local) };
            tasks.spawn_local(connection(seat))
        })
        .collect();
    let pulse = common.open.is_some().then(|| tasks.spawn_local(feel_pulse(Rc::clone(&local), Arc::clone(common))));
    tasks.block_on(&runtime, async {
        for connection in connections {
            connection.await.expect("a connection does not panic");
        }
    });
    if let Some(pulse) = pulse {
        pulse.abort();
    }
    drop(tasks);
    local.tally.take()
}

/// Looks at short intervals how late this thread is, also while no connection is free.
async fn feel_pulse(local: Rc<Local>, common: Arc<Common>) {
    let alarm = Alarm::default();
    while !common.ended.load(Ordering::Relaxed) {
        let moment = Instant::now() + PULSE;
        if alarm.wait_until(moment).await.is_err() {
            return;
        }
        if common.open.as_ref().is_some_and(|open| open.start.get().is_some()) {
            record(&mut local.tally.borrow_mut().lag, moment.elapsed());
        }
    }
}

/// Ends the schedule and counts what was not sent.
fn close(open: &Open, elapsed: Duration, tally: &mut Tally) -> Option<Counts> {
    let mut queue = open.queue.lock().expect("no thread panics while it has the queue").take()?;
    let counts = queue.close(elapsed);
    tally.count_errors(queue.take_turned_away(), ALL_BUSY.to_owned(), || ALL_BUSY.to_owned());
    tally.count_errors(counts.left, RUN_OVER.to_owned(), || RUN_OVER.to_owned());
    Some(counts)
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

    fn load(arguments: &[&str]) -> Load {
        #[derive(clap::Parser)]
        struct Cli {
            #[command(flatten)]
            load: Load,
        }
        <Cli as clap::Parser>::parse_from([&["test"], arguments].concat()).load
    }

    #[test]
    fn an_open_loop_sends_what_is_due() {
        for threads in ["1", "3"] {
            let load = load(&["--rate", "2000", "--messages", "500", "--connections", "6", "--threads", threads]);
            let ran = run(&load, &Watch::default(), |seat: Seat| async move {
                seat.ready().await;
                while let Some(turn) = seat.turn().await {
                    assert!(turn.due <= Instant::now(), "it begins too early");
                    seat.count(1, turn.number, turn.due.elapsed());
                }
            })
            .unwrap();
            assert_eq!(ran.tally.operations, 500);
            // Each number once.
            assert_eq!(ran.tally.bytes, 500 * 499 / 2);
            assert_eq!(ran.tally.error_count(), 0, "{:?}", ran.tally.errors);
            let counts = ran.arrivals.unwrap();
            assert_eq!((counts.arrived, counts.turned_away, counts.left), (500, 0, 0));
            // 500 gaps of half a millisecond in the mean.
            assert!(ran.seconds > 0.2, "{}", ran.seconds);
        }
    }

    #[test]
    fn a_client_that_is_late_knows_it() {
        let load = load(&["--rate", "500", "--messages", "100", "--connections", "8"]);
        let ran = run(&load, &Watch::default(), |seat: Seat| async move {
            seat.ready().await;
            while let Some(turn) = seat.turn().await {
                // The client's own work, which keeps its thread from all else.
                let busy = Instant::now();
                while busy.elapsed() < Duration::from_millis(10) {}
                seat.count(1, 0, turn.due.elapsed());
            }
        })
        .unwrap();
        assert!(ran.tally.lag.value_at_quantile(0.99) >= 9_000, "{}", ran.tally.lag.value_at_quantile(0.99));
    }

    #[test]
    fn a_workload_without_turns_has_no_open_loop() {
        let load = load(&["--rate", "500", "--messages", "100"]);
        let ran = run(&load, &Watch::default(), |seat: Seat| async move {
            seat.ready().await;
            while seat.next().is_some() {}
        });
        assert!(ran.unwrap_err().to_string().contains("--rate"));
    }
}
