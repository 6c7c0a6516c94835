//! What each user takes of a worker, and whose turn it is.
//!
//! A session's task is [`metered`]: the time of each poll, and the octets that it sends, receives and reads meanwhile, are its
//! user's. Work that takes long waits for its [`Usages::turn`] between steps. There a user who has had more than an equal share of
//! the worker lately waits until nobody else has anything to do, or the next period begins.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{AccountId, ShardId};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::real::RealIo;
use posthaste_engine::read::octets_read_by_thread;

use crate::control::UserStats;
use crate::limits;

/// What a user has taken of this worker.
#[derive(Debug)]
pub struct Usage {
    account: Arc<AccountRecord>,
    cpu_ns: Cell<u64>,
    received: Cell<u64>,
    sent: Cell<u64>,
    store_read: Cell<u64>,
    polls: Cell<u64>,
    /// Octets that its sessions hold now for what is large.
    held: Cell<u64>,
    /// The period that `in_period_ns` is of.
    period: Cell<u64>,
    in_period_ns: Cell<u64>,
}

fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get().saturating_add(more));
}

impl Usage {
    fn new(account: Arc<AccountRecord>) -> Self {
        let zero = || Cell::new(0);
        Self {
            account,
            cpu_ns: zero(),
            received: zero(),
            sent: zero(),
            store_read: zero(),
            polls: zero(),
            held: zero(),
            period: zero(),
            in_period_ns: zero(),
        }
    }

    pub fn hold(&self, octets: u64) {
        add(&self.held, octets);
    }

    pub fn release(&self, octets: u64) {
        self.held.set(self.held.get().saturating_sub(octets));
    }

    fn to_shown(&self) -> UserStats {
        UserStats {
            name: self.account.name.clone(),
            cpu_us: self.cpu_ns.get() / 1000,
            octets_received: self.received.get(),
            octets_sent: self.sent.get(),
            octets_read: self.store_read.get(),
            octets_held: self.held.get(),
        }
    }
}

thread_local! {
    /// Whose task is being polled.
    static CURRENT: RefCell<Option<Rc<Usage>>> = const { RefCell::new(None) };
    /// Whether that task only waits for its turn.
    static WAITING: Cell<bool> = const { Cell::new(false) };
}

/// The user whose session is being polled.
pub fn current() -> Option<Rc<Usage>> {
    CURRENT.with_borrow(Clone::clone)
}

fn with_current(count: impl FnOnce(&Usage)) {
    CURRENT.with_borrow(|current| current.as_deref().map(count));
}

pub fn count_received(octets: usize) {
    with_current(|usage| add(&usage.received, octets as u64));
}

pub fn count_sent(octets: usize) {
    with_current(|usage| add(&usage.sent, octets as u64));
}

/// The users of one worker.
#[derive(Debug, Default)]
pub struct Usages {
    /// What comes in by LMTP and SMTP has a turn like a user.
    deliveries: OnceCell<Rc<Usage>>,
    by_account: RefCell<HashMap<AccountId, Rc<Usage>>>,
    /// How many were left when the last were forgotten.
    kept: Cell<usize>,
    /// Polls of all sessions, but for those in which one only waited for its turn.
    polls: Cell<u64>,
    /// The number of the period that is now, the users who have run in it, and how many have in the one before.
    period: Cell<u64>,
    active: Cell<u32>,
    active_before: Cell<u32>,
}

impl Usages {
    /// Lets the task that is being polled count for an account from now on.
    pub fn enter(&self, account: &Arc<AccountRecord>) {
        let mut by_account = self.by_account.borrow_mut();
        let is_known = by_account.contains_key(&account.account);
        // All of them may have sessions.
        if !is_known && by_account.len() >= limits::USERS_METERED.max(2 * self.kept.get()) {
            forget_the_least(&mut by_account);
            self.kept.set(by_account.len());
        }
        let usage = by_account.entry(account.account).or_insert_with(|| Rc::new(Usage::new(Arc::clone(account))));
        CURRENT.set(Some(Rc::clone(usage)));
    }

    /// Lets the task that is being polled count for deliveries from now on.
    pub fn enter_deliveries(&self) {
        let usage = self.deliveries.get_or_init(|| {
            let name = "(deliveries)".to_owned();
            let (account, shard, password) = (AccountId(0), ShardId(0), String::new());
            let record = AccountRecord { account, name, shard, password, deleted: false, uid_validity_floor: 1 };
            Rc::new(Usage::new(Arc::new(record)))
        });
        CURRENT.set(Some(Rc::clone(usage)));
    }

    /// The users who have taken most time, at most so many.
    pub fn top(&self, count: usize) -> Vec<UserStats> {
        let by_account = self.by_account.borrow();
        let mut all: Vec<&Rc<Usage>> = by_account.values().chain(self.deliveries.get()).collect();
        all.sort_unstable_by_key(|usage| std::cmp::Reverse(usage.cpu_ns.get()));
        all.into_iter().take(count).map(|usage| usage.to_shown()).collect()
    }

    /// Lets others run before the next command of a user who has had more than an equal share lately.
    pub async fn turn_of_command(&self, io: &RealIo) {
        if current().is_some_and(|usage| self.has_had_its_share(&usage, io.now())) {
            self.turn(io).await;
        }
    }

    /// Lets others run, as often as the user whose session this is has had more than an equal share lately.
    pub async fn turn(&self, io: &RealIo) {
        let usage = current();
        let others = || self.polls.get() - usage.as_ref().map_or(0, |usage| usage.polls.get());
        loop {
            let before = others();
            WAITING.set(true);
            io.yield_now().await;
            WAITING.set(false);
            let nobody_else_runs = others() == before;
            // Who holds room that others may need goes on.
            let may_wait = |usage: &Rc<Usage>| usage.held.get() == 0 && self.has_had_its_share(usage, io.now());
            if nobody_else_runs || !usage.as_ref().is_some_and(may_wait) {
                return;
            }
        }
    }

    fn has_had_its_share(&self, usage: &Usage, now: Duration) -> bool {
        self.look_at_the_clock(now);
        let users = self.active.get().max(self.active_before.get()).max(1);
        let share = limits::FAIR_PERIOD.as_nanos() as u64 / u64::from(users);
        usage.period.get() == self.period.get() && usage.in_period_ns.get() >= share
    }

    /// Begins a new period if it is time.
    fn look_at_the_clock(&self, now: Duration) {
        let period = 1 + (now.as_nanos() / limits::FAIR_PERIOD.as_nanos()) as u64;
        if period != self.period.get() {
            let follows = period == self.period.get() + 1;
            self.active_before.set(if follows { self.active.get() } else { 0 });
            self.active.set(0);
            self.period.set(period);
        }
    }

    /// Counts a poll that took so long, up to `now`.
    fn count(&self, usage: &Usage, now: Duration, took: Duration, store_read: u64) {
        let took = took.as_nanos() as u64;
        add(&usage.cpu_ns, took);
        add(&usage.store_read, store_read);
        self.look_at_the_clock(now);
        if usage.period.get() != self.period.get() {
            usage.period.set(self.period.get());
            usage.in_period_ns.set(0);
            self.active.set(self.active.get() + 1);
        }
        add(&usage.in_period_ns, took);
    }
}

/// Makes room by forgetting half of those who have no session, who have taken least.
fn forget_the_least(by_account: &mut HashMap<AccountId, Rc<Usage>>) {
    let without_session = by_account.iter().filter(|(_, usage)| Rc::strong_count(usage) == 1);
    let mut idle: Vec<(u64, AccountId)> = without_session.map(|(id, usage)| (usage.cpu_ns.get(), *id)).collect();
    idle.sort_unstable();
    for (_, account) in idle.iter().take(idle.len().div_ceil(2)) {
        by_account.remove(account);
    }
}

/// A session whose time, once it has [entered](Usages::enter), is its user's.
pub fn metered<F: Future<Output = ()>>(
    context: &Rc<crate::node::Context>,
    session: F,
) -> impl Future<Output = ()> + use<F> {
    Metered { context: Rc::clone(context), usage: None, waiting: false, session }
}

pin_project_lite::pin_project! {
    struct Metered<F> {
        context: Rc<crate::node::Context>,
        usage: Option<Rc<Usage>>,
        waiting: bool,
        #[pin]
        session: F,
    }
}

impl<F: Future<Output = ()>> Future for Metered<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        let usages = &this.context.usages;
        let (begun, read_before) = (this.context.io.now(), octets_read_by_thread());
        CURRENT.set(this.usage.take());
        WAITING.set(*this.waiting);
        let polled = this.session.poll(task);
        *this.usage = CURRENT.take();
        let only_waited = std::mem::replace(this.waiting, WAITING.take()) && *this.waiting;
        add(&usages.polls, (!only_waited).into());
        if let Some(usage) = this.usage {
            let now = this.context.io.now();
            add(&usage.polls, (!only_waited).into());
            usages.count(usage, now, now.saturating_sub(begun), octets_read_by_thread() - read_before);
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(number: u64) -> Arc<AccountRecord> {
        let name = format!("user{number}");
        let (account, shard) = (AccountId(number), ShardId(0));
        let (password, deleted, uid_validity_floor) = (String::new(), false, 1);
        Arc::new(AccountRecord { account, name, shard, password, deleted, uid_validity_floor })
    }

    fn usage_of(usages: &Usages, number: u64) -> Rc<Usage> {
        usages.enter(&account(number));
        CURRENT.take().expect("entered")
    }

    #[test]
    fn a_share_is_that_of_all_who_run() {
        let usages = Usages::default();
        let (heavy, light) = (usage_of(&usages, 1), usage_of(&usages, 2));
        let (half, step) = (limits::FAIR_PERIOD / 2, limits::FAIR_PERIOD / 100);
        let of_period = |number: u32| limits::FAIR_PERIOD * number + half;
        usages.count(&heavy, of_period(7), half, 0);
        assert!(!usages.has_had_its_share(&heavy, of_period(7)), "nobody else runs");
        usages.count(&light, of_period(7), step, 0);
        assert!(usages.has_had_its_share(&heavy, of_period(7)));
        assert!(!usages.has_had_its_share(&light, of_period(7)));
        // What the next one brings is not known at its beginning, but who ran in the one before is.
        assert!(!usages.has_had_its_share(&heavy, of_period(8)));
        usages.count(&heavy, of_period(8), half, 0);
        assert!(usages.has_had_its_share(&heavy, of_period(8)));
        // After a while of nothing it is forgotten.
        usages.count(&heavy, of_period(20), half, 0);
        assert!(!usages.has_had_its_share(&heavy, of_period(20)));
        assert_eq!(usages.top(9)[1].cpu_us, step.as_micros() as u64);
    }

    #[test]
    fn deliveries_have_a_share() {
        let usages = Usages::default();
        let heavy = usage_of(&usages, 1);
        usages.enter_deliveries();
        let deliveries = CURRENT.take().expect("entered");
        let (now, half) = (limits::FAIR_PERIOD * 7, limits::FAIR_PERIOD / 2);
        usages.count(&heavy, now, half, 0);
        assert!(!usages.has_had_its_share(&heavy, now));
        usages.count(&deliveries, now, half * 2, 0);
        assert!(usages.has_had_its_share(&heavy, now));
        assert_eq!(usages.top(1)[0].name, "(deliveries)");
    }

    #[test]
    fn who_has_a_session_or_has_taken_much_is_remembered() {
        let usages = Usages::default();
        let with_session = usage_of(&usages, 0);
        let greedy = usage_of(&usages, 1);
        usages.count(&greedy, Duration::ZERO, Duration::from_secs(9), 12);
        drop(greedy);
        for number in 2..3 * limits::USERS_METERED as u64 {
            drop(usage_of(&usages, number));
            assert!(usages.by_account.borrow().len() <= limits::USERS_METERED);
        }
        drop(with_session);
        let top = usages.top(1);
        assert_eq!((top[0].name.as_str(), top[0].octets_read), ("user1", 12));
        assert!(usages.by_account.borrow().contains_key(&AccountId(0)));
    }
}
