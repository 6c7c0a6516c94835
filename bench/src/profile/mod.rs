//! A profile of users as an open load: operations come when they come, whether or not the server has done those before, and each
//! is timed from when it was due.
//!
//! The schedule is made by a thread of its own, which sleeps more exactly than a runtime's timer. Operations on open sessions
//! wait for their session, others for one of a bounded number of connections; both waits are part of their latency.

mod fleet;
mod operations;
mod report;
mod schedule;
mod settings;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::runtime::Builder;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::LocalSet;

use crate::deliver::MailServer;
use crate::drive::Tally;
use crate::generator::Generator;
use crate::lmtp::Data;
use crate::observe::{Cost, Watch};
use crate::report::Keep;
use crate::session::Login;
use crate::stream::{Address, Connector};

use fleet::Fleet;
use operations::Operations;
use report::{Mix, ProfileReport, What};
use schedule::{Arrival, Hours, Kind, Ranks, Scale, Schedule, idle_connections, rate};
use settings::Profile;

/// Operations that wait for their turn; more are refused and counted, as a server that is too slow would fill the memory.
const WAITING_MAX: usize = 100_000;
/// What was delivered is to be heard of in IDLE until so long after the run.
const PUSH_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, Args)]
pub struct ProfileRun {
    /// The profile; there are some in bench/profiles
    #[arg(value_name = "FILE.toml")]
    file: PathBuf,
    /// The accounts over which the load is spread; they are those of the server, not as many as the profile has users
    #[command(flatten)]
    login: Login,
    #[command(flatten)]
    server: MailServer,
    /// Where POP3 is: HOST:PORT or unix:PATH; without it nobody uses POP3
    #[arg(long, value_name = "ADDR")]
    pop3: Option<Address>,
    /// Do what so many users do [default: users.count of the profile]
    #[arg(long, value_name = "N")]
    as_users: Option<f64>,
    /// The hour of the day, 0 to 23 [default: the busiest]
    #[arg(long, value_name = "H", value_parser = clap::value_parser!(u8).range(0..24), conflicts_with = "day")]
    hour: Option<u8>,
    /// Go through the whole day, from midnight on; connections in IDLE are those of the busiest hour
    #[arg(long)]
    day: bool,
    /// Seconds of the profile in each second of the run
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    speed: f64,
    /// How long operations come [default: 60, with --day until the day is over]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// After that let each kind of operation come alone for so long, to tell what CPU it costs the server
    #[arg(long, value_name = "S")]
    alone: Option<f64>,
    /// Connections that deliver, poll or use POP3 at the same time; what comes meanwhile waits, and the wait is counted
    #[arg(long, value_name = "N", default_value_t = 256)]
    concurrency: usize,
    /// Other mailboxes that a client asks for their STATUS when it looks for news
    #[arg(long, value_name = "N", default_value_t = 5)]
    status_mailboxes: usize,
    /// Messages that are made up; they are delivered in turn
    #[arg(long, value_name = "N", default_value_t = 500)]
    messages: usize,
    /// What comes when, from whom, and the messages depend on it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// An operation that takes longer, after it began, is an error
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    timeout: f64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    keep: Keep,
    #[command(flatten)]
    watch: Watch,
}

impl ProfileRun {
    /// Runs the profile and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut profile = Profile::load(&self.file)?;
        if self.pop3.is_none() {
            profile.users.imap_share += profile.users.pop3_share;
            profile.users.pop3_share = 0.0;
        }
        if !(self.speed.is_finite() && self.speed > 0.0) {
            return Err("--speed is a number above 0".into());
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, measure(self, profile))
    }

    fn hours(&self, profile: &Profile) -> Hours {
        match (self.day, self.hour) {
            (true, _) => Hours::Day,
            (false, hour) => Hours::One(hour.map_or(profile.busiest_hour(), usize::from)),
        }
    }

    fn duration(&self) -> Duration {
        const DAY_S: f64 = 86_400.0;
        let default = if self.day { DAY_S / self.speed } else { 60.0 };
        Duration::from_secs_f64(self.seconds.unwrap_or(default))
    }
}

/// What all operations of a run share.
struct Run {
    limit: Duration,
    operations: Rc<Operations>,
    fleet: Fleet,
    permits: Semaphore,
    /// Accounts of users by rank: of all, of those that use POP3, of those that use IMAP.
    everybody: Group,
    pop3_users: Group,
    imap_users: Group,
    tallies: RefCell<BTreeMap<Kind, Tally>>,
    waiting: Cell<usize>,
    waiting_max: Cell<usize>,
}

/// Accounts by the rank of their users.
struct Group {
    accounts: Vec<usize>,
    ranks: Option<Ranks>,
}

impl Group {
    fn new(accounts: Vec<usize>, exponent: f64) -> Self {
        Self { ranks: Ranks::new(accounts.len(), exponent), accounts }
    }

    /// The account of a user that is drawn.
    fn draw(&self, number: u64) -> Option<usize> {
        Some(self.accounts[self.ranks.as_ref()?.draw(number)])
    }
}

async fn measure(plan: ProfileRun, profile: Profile) -> Result<bool, Box<dyn Error>> {
    let users = plan.as_users.unwrap_or(profile.users.count);
    let scale = Scale { users, speed: plan.speed };
    let hours = plan.hours(&profile);
    let fleet_hour = match hours {
        Hours::One(hour) => hour,
        Hours::Day => profile.busiest_hour(),
    };
    let accounts = plan.login.users.user_count.max(1);
    // Every so many accounts one uses POP3, so that both kinds of users are found at all ranks.
    let pop3_until = |account: usize| (account as f64 * profile.users.pop3_share).floor();
    let (pop3_users, imap_users): (Vec<_>, Vec<_>) =
        (0..accounts).partition(|&account| pop3_until(account + 1) > pop3_until(account));
    let exponent = profile.users.zipf_exponent;
    let corpus = Generator::new(&profile.sizes(), plan.seed)?.corpus(plan.messages.max(1));
    let limit = Duration::from_secs_f64(plan.timeout);
    let operations = Rc::new(Operations::new(&plan, &profile, &corpus)?);
    Rc::clone(&operations).prepare(&imap_users, limit).await?;
    // Operations on open sessions need one at least.
    let sessions = idle_connections(&profile, users, fleet_hour).max(1);
    let fleet = Fleet::open(&plan.login, &imap_users, sessions, &profile).await?;
    let run = Rc::new(Run {
        limit,
        operations,
        fleet,
        permits: Semaphore::new(plan.concurrency.max(1)),
        everybody: Group::new((0..accounts).collect(), exponent),
        pop3_users: Group::new(pop3_users, exponent),
        imap_users: Group::new(imap_users, exponent),
        tallies: RefCell::default(),
        waiting: Cell::new(0),
        waiting_max: Cell::new(0),
    });
    let calibration = plan.keep.calibration()?;
    let schedule = |kinds: &[Kind]| Schedule::new(&profile, scale, hours, kinds, plan.seed);
    let mix = phase(&run, &plan.watch, schedule(&Kind::ALL), plan.duration()).await?;
    let push = run.fleet.take_push(PUSH_TIMEOUT).await;
    let mut alone = BTreeMap::new();
    if let Some(seconds) = plan.alone {
        for kind in Kind::ALL {
            if mix.tallies.contains_key(&kind) {
                let duration = Duration::from_secs_f64(seconds);
                alone.insert(kind, phase(&run, &plan.watch, schedule(&[kind]), duration).await?);
            }
        }
    }
    let intended = match hours {
        Hours::One(hour) => Kind::ALL.map(|kind| (kind, rate(&profile, scale, kind, hour))).into_iter().collect(),
        Hours::Day => BTreeMap::new(),
    };
    let what = What { plan: &plan, profile: &profile, scale, hours, sessions: run.fleet.len(), corpus: &corpus };
    let report = ProfileReport::new(&what, calibration, &intended, mix, alone, push);
    plan.keep.append(&report)?;
    report.print(plan.json)
}

/// Lets operations come for some time and waits until all are done.
async fn phase(run: &Rc<Run>, watch: &Watch, schedule: Schedule, duration: Duration) -> Result<Mix, Box<dyn Error>> {
    run.waiting_max.set(0);
    let before = watch.snapshot_before()?;
    let following = watch.follow()?;
    let start = Instant::now();
    let mut arrivals = begin(schedule, start, duration)?;
    let mut under_way = tokio::task::JoinSet::new();
    while let Some((arrival, late)) = arrivals.recv().await {
        if run.waiting.get() >= WAITING_MAX {
            let what = || format!("{WAITING_MAX} operations wait already");
            run.tally(arrival.kind, |tally| tally.count_error("not begun".to_owned(), what));
            continue;
        }
        run.waiting.set(run.waiting.get() + 1);
        run.waiting_max.set(run.waiting_max.get().max(run.waiting.get()));
        under_way.spawn_local(operate(Rc::clone(run), arrival, start + arrival.at));
        run.tally(arrival.kind, |tally| tally.count_second(late));
        // Those that have ended are of no interest.
        while under_way.try_join_next().is_some() {}
    }
    while under_way.join_next().await.transpose()?.is_some() {}
    let seconds = start.elapsed().as_secs_f64();
    drop(following);
    let cost = Cost::between(&before, &watch.snapshot()?);
    Ok(Mix { seconds, duration, tallies: run.tallies.take(), cost, waiting_max: run.waiting_max.get() })
}

/// Starts the thread that says what is due, and how late it was when it said it.
fn begin(
    schedule: Schedule,
    start: Instant,
    duration: Duration,
) -> Result<mpsc::UnboundedReceiver<(Arrival, Duration)>, std::io::Error> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let come = move || {
        for arrival in schedule.take_while(|arrival| arrival.at < duration) {
            let due = start + arrival.at;
            let wait = due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                thread::sleep(wait);
            }
            if sender.send((arrival, due.elapsed())).is_err() {
                return;
            }
        }
        // Operations may come until the end of the time, so that the rate is that of the whole of it.
        thread::sleep((start + duration).saturating_duration_since(Instant::now()));
    };
    thread::Builder::new().name("schedule".to_owned()).spawn(come)?;
    Ok(receiver)
}

/// One operation, timed from when it was due.
async fn operate(run: Rc<Run>, arrival: Arrival, due: Instant) {
    let Arrival { kind, number, .. } = arrival;
    let result = match kind {
        Kind::Append | Kind::Read | Kind::Flags | Kind::Search | Kind::Delete => {
            let begun = || run.waiting.set(run.waiting.get() - 1);
            let message = run.operations.message(number);
            run.fleet.operate(kind, number, message, run.limit, begun).await
        }
        Kind::Deliver | Kind::Poll | Kind::Pop3 => {
            let _permit = run.permits.acquire().await.expect("the semaphore is not closed");
            run.waiting.set(run.waiting.get() - 1);
            match kind {
                Kind::Deliver => deliver(&run, number).await,
                Kind::Poll => match run.imap_users.draw(number) {
                    Some(account) => run.operations.poll(account, run.limit).await,
                    None => Ok(0),
                },
                _ => match run.pop3_users.draw(number) {
                    Some(account) => run.operations.pop3(account, run.limit).await,
                    None => Ok(0),
                },
            }
        }
    };
    run.tally(kind, |tally| match result {
        Ok(bytes) => tally.count(bytes, due.elapsed()),
        Err(Failure { kind, message }) => tally.count_error(kind, || message),
    });
}

async fn deliver(run: &Run, number: u64) -> Result<u64, Failure> {
    let account = run.everybody.draw(number).ok_or_else(|| Failure::new("no account", "there is none"))?;
    let octets = run.operations.deliver(account, number, run.limit).await?;
    run.fleet.delivered(account);
    Ok(octets)
}

impl Run {
    fn tally(&self, kind: Kind, count: impl FnOnce(&mut Tally)) {
        count(self.tallies.borrow_mut().entry(kind).or_default());
    }
}

/// Why an operation failed: a few words to count by, and all that is known.
#[derive(Debug)]
struct Failure {
    kind: String,
    message: String,
}

impl Failure {
    fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: kind.into(), message: message.into() }
    }
}

impl From<crate::imap::ImapError> for Failure {
    fn from(error: crate::imap::ImapError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

impl From<crate::lmtp::LmtpError> for Failure {
    fn from(error: crate::lmtp::LmtpError) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

impl From<crate::pop3::Pop3Error> for Failure {
    fn from(error: crate::pop3::Pop3Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

/// A message as it is appended, and as it is delivered.
struct Message {
    bytes: Vec<u8>,
    data: Data,
}

/// Where an address is, without TLS.
fn plain(address: &Address) -> Result<Connector, String> {
    Connector::new(address, None)
}
