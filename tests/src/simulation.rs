//! A simulated node: workers, shards and sessions on one seeded executor, over a disk that crashes.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::check::check_shard;
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, RecoveryReport};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::base64_lines::put_lines;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{MailboxId, ModSeq, ShardId, Uid};
use posthaste_engine::io::sim::{FaultRates, Sim, SimIo};
use posthaste_engine::io::{Io, Runtime};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Superblock, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::Storage;
use posthaste_engine::storage::faulty::{Faulty, Policy, SharedPolicy};
use posthaste_engine::storage::local::Local;

use crate::dictionaries::invented;
use crate::oracle::{Oracle, Shown, Violation};

/// Every run is on storage that can be bad; whether it is, its policy says.
type Store = Faulty<Local<SimIo>>;

const SHARDS: u32 = 5;
const ACCOUNTS: usize = 6;
const SESSIONS: usize = 6;
const OPERATIONS: usize = 30;
/// Sessions that are not done after so long wait for something that does not come: each has to wait for some reads at most that
/// never return.
const LONGEST_SESSIONS: Duration = Duration::from_secs(40 * 60);

/// How often a failing device fails.
const FAULTS: FaultRates = FaultRates {
    read_errors: 20,
    write_errors: 60,
    sync_errors: 240,
    no_space: 60,
    short_writes: 600,
    hung_reads: 10,
    slow: 60,
};

/// How a run is made up.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    /// Starts of the node; all but the last end in a crash, a fault or a stop.
    pub rounds: u32,
    /// Let the device fail now and then.
    pub faults: bool,
    /// Let storage be far away: slow, failing, and ambiguous about what it did.
    pub remote: bool,
    /// Check the store after each start, and count what recovery reports as damage. Planted bugs are to be caught
    /// without: by acknowledgements and views alone.
    pub check: bool,
}

/// What a run has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    pub acknowledged: u64,
    pub shown: u64,
    pub crashes: u32,
    pub torn_tails: u32,
    pub operations: u64,
}

fn config(sim: &Sim) -> StoreConfig {
    StoreConfig {
        shard: ShardConfig {
            segment_size_bytes: 32 << (10 + sim.below(3)),
            checkpoint_bytes: 16 << (10 + sim.below(3)),
            index_cache_bytes: 4096 << sim.below(4),
            message_cache_bytes: if sim.below(2) == 0 { 0 } else { 4096 },
            reserve_bytes: 64 << 10,
            compaction_run_bytes: 64 << (10 + sim.below(4)),
            ..ShardConfig::default()
        },
    }
}

/// Runs a plan.
///
/// # Errors
/// The first broken promise.
pub fn run(plan: Plan) -> Result<Outcome, Violation> {
    let sim = Sim::new(plan.seed);
    let oracle: Rc<RefCell<Oracle>> = Rc::default();
    let next_token = Rc::new(Cell::new(1));
    let mut outcome = Outcome::default();
    // The index is gone, and no start has made another yet.
    let mut index_is_lost = false;
    for round in 0..plan.rounds {
        oracle.borrow_mut().sessions_end();
        match sim.below(8) {
            0 if round > 0 => {
                lose_index(&sim);
                index_is_lost = true;
            }
            // As an operator would, with a crash in the middle or without.
            1 if round > 0 && plan.check => rebuild_index(&sim)?,
            _ => {}
        }
        let workers = 1 + sim.below(3) as usize;
        let last = round + 1 == plan.rounds;
        let ending = if last { 2 } else { sim.below(4) };
        sim.set_faults(FaultRates::default());
        match ending {
            // Anywhere, recovery included.
            0 | 1 => sim.crash_after(Some(1 + sim.below(if ending == 0 { 60 } else { 1200 }))),
            _ => sim.crash_after(None),
        }
        let node = Node {
            sim: sim.clone(),
            io: sim.io(),
            oracle: Rc::clone(&oracle),
            next_token: Rc::clone(&next_token),
            policy: SharedPolicy::default(),
            remote: plan.remote,
            config: config(&sim),
            workers,
            faults: plan.faults && ending == 3,
            check: plan.check,
            stop: ending == 2,
        };
        let reports = sim.run(async move { node.live().await });
        sim.set_faults(FaultRates::default());
        match reports {
            None => outcome.crashes += 1,
            // It did not open, as it may where the device fails.
            Some(Ok(None)) if sim.below(2) == 0 => sim.crash_now(),
            Some(Ok(None)) => {}
            Some(Ok(Some(reports))) => {
                let was_lost = std::mem::take(&mut index_is_lost);
                outcome.torn_tails += reports.iter().filter(|report| report.torn_tail.is_some()).count() as u32;
                if plan.check
                    && !was_lost
                    && let Some(damage) = reports.iter().flat_map(|report| &report.damage).next()
                {
                    let what = format!("{} at offset {}: {}", damage.file, damage.offset, damage.what);
                    oracle.borrow_mut().fail(format!("damage was reported on a disk without any: {what}"));
                }
                // After faults the whole machine goes down, or the process alone: then the page cache outlives it.
                if ending == 3 && sim.below(2) == 0 {
                    sim.crash_now();
                    outcome.crashes += 1;
                }
            }
            Some(Err(error)) => oracle.borrow_mut().fail(format!("the store did not open: {error}")),
        }
        if let Some(violation) = oracle.borrow().violation.clone() {
            return Err(violation);
        }
        sim.crash_after(None);
        sim.set_capacity(None);
        if plan.check && !index_is_lost {
            check_everything(&sim)?;
        }
    }
    let oracle = oracle.borrow();
    outcome.acknowledged = oracle.acknowledged;
    outcome.shown = oracle.shown;
    outcome.operations = sim.operations();
    Ok(outcome)
}

/// Removes all index blobs: the next start has only the log, and what compaction has left of it.
fn lose_index(sim: &Sim) {
    let io = sim.io();
    let lost = sim.run(async move {
        for shard in 0..SHARDS {
            let directory = format!("shard-{shard:04}/idx");
            // There may be no store yet.
            for file in io.list(&directory).await.unwrap_or_default() {
                io.remove(&format!("{directory}/{file}")).await.expect("a device without faults");
            }
            let _ = io.sync_dir(&directory).await;
        }
    });
    lost.expect("nothing crashes it");
}

/// Puts the index of each shard together from its log alone, whatever state a crash has left it in.
fn rebuild_index(sim: &Sim) -> Result<(), Violation> {
    sim.set_faults(FaultRates::default());
    sim.crash_after((sim.below(2) == 0).then(|| 1 + sim.below(400)));
    let (io, config) = (sim.io(), config(sim).shard);
    let rebuilt = sim.run(async move {
        let storage = Local::new(io);
        let Some(bytes) = storage.read_superblock().await? else { return Ok(()) };
        let superblock = Superblock::decode(&bytes).expect("it was written whole or not at all");
        for shard in (0..superblock.shards).map(ShardId) {
            Shard::rebuild(storage.clone(), shard, superblock.store, config.clone()).await?;
        }
        Ok::<_, EngineError>(())
    });
    sim.crash_after(None);
    rebuilt.unwrap_or(Ok(())).map_err(|error| Violation(format!("a rebuild failed: {error}")))
}

/// The check that changes nothing must find nothing, also right after a crash.
pub fn check_everything(sim: &Sim) -> Result<(), Violation> {
    let io = sim.io();
    let checked = sim.run(async move {
        let storage = Local::new(io);
        let Some(bytes) = storage.read_superblock().await? else { return Ok(Vec::new()) };
        let superblock = Superblock::decode(&bytes).expect("it was written whole or not at all");
        let mut checks = Vec::new();
        for shard in (0..superblock.shards).map(ShardId) {
            match check_shard(&storage, shard, superblock.store, |_, _| ()).await {
                Ok(check) => checks.push(check),
                Err(error) => return Err(error),
            }
        }
        Ok(checks)
    });
    match checked {
        None => Ok(()),
        Some(Err(error)) => Err(Violation(format!("the check could not run: {error}"))),
        Some(Ok(checks)) => match checks.iter().flat_map(|check| &check.findings).next() {
            Some(finding) => {
                let what = format!("{} at offset {}: {}", finding.file, finding.offset, finding.what);
                Err(Violation(format!("the check found damage where there is none: {what}")))
            }
            None => Ok(()),
        },
    }
}

struct Node {
    sim: Sim,
    io: SimIo,
    oracle: Rc<RefCell<Oracle>>,
    next_token: Rc<Cell<u64>>,
    policy: SharedPolicy,
    remote: bool,
    config: StoreConfig,
    workers: usize,
    faults: bool,
    check: bool,
    stop: bool,
}

/// What a session needs.
#[derive(Clone)]
struct Session {
    sim: Sim,
    io: SimIo,
    oracle: Rc<RefCell<Oracle>>,
    next_token: Rc<Cell<u64>>,
    worker: Worker<Store>,
    account: Arc<AccountRecord>,
    /// Nothing fails, so that a scrub has nothing to find.
    is_sound: bool,
}

impl Node {
    /// What opening the store has found; `None` if it did not open, because the device failed.
    async fn live(self) -> Result<Option<Vec<RecoveryReport>>, EngineError> {
        if self.remote {
            self.policy.set(Policy { delay_max: Duration::from_millis(100), ..Policy::default() });
        }
        let fails_early = self.faults && self.sim.below(4) == 0;
        if fails_early {
            self.sim.set_faults(FAULTS);
        }
        let opened = within(&self.io, LONGEST_SESSIONS, self.open()).await;
        self.sim.set_faults(FaultRates::default());
        let Some(opened) = opened else {
            self.oracle.borrow_mut().fail("a start waits for ever".to_owned());
            return Ok(None);
        };
        let (cluster, workers, reports) = match opened {
            Err(_) if fails_early => return Ok(None),
            opened => opened?,
        };
        self.look_at_everything(&workers).await?;
        if self.oracle.borrow().violation.is_some() {
            return Ok(Some(reports));
        }
        let accounts = self.accounts(&workers).await?;
        if self.faults {
            if self.sim.below(3) == 0 {
                // The device fills up for real.
                let left = self.sim.below(512 << 10);
                self.sim.set_capacity(Some(self.sim.used_bytes() + left));
            } else {
                self.sim.set_faults(FAULTS);
            }
        }
        if self.faults && self.remote {
            self.policy.set(Policy {
                delay_max: Duration::from_millis(100),
                failed_appends: 200,
                ambiguous_appends: 400,
                failed_puts: 1000,
                ambiguous_puts: 1000,
                failed_reads: 500,
            });
        }
        let ended = Rc::new(Cell::new(0));
        for _ in 0..SESSIONS {
            let account = Arc::clone(&accounts[self.sim.below(accounts.len() as u64) as usize]);
            let worker = workers[self.sim.below(workers.len() as u64) as usize].clone();
            let session = Session {
                sim: self.sim.clone(),
                io: self.io.clone(),
                oracle: Rc::clone(&self.oracle),
                next_token: Rc::clone(&self.next_token),
                worker,
                account: Arc::clone(&account),
                is_sound: self.check && !self.faults,
            };
            let ended_here = Rc::clone(&ended);
            let watching = {
                let owner = cluster.owner(account.shard);
                Session { worker: workers[owner].clone(), ..session.clone() }
            };
            self.io.spawn(async move {
                session.work().await;
                ended_here.set(ended_here.get() + 1);
            });
            let ended_here = Rc::clone(&ended);
            self.io.spawn(async move {
                watching.watch().await;
                ended_here.set(ended_here.get() + 1);
            });
        }
        let begun = self.io.now();
        while ended.get() < 2 * SESSIONS {
            if self.io.now() - begun > LONGEST_SESSIONS {
                self.oracle.borrow_mut().fail("a session waits for ever".to_owned());
                return Ok(Some(reports));
            }
            self.io.sleep(Duration::from_millis(5)).await;
        }
        self.sim.set_faults(FaultRates::default());
        self.policy.set(Policy::default());
        if !self.faults {
            self.look_at_everything(&workers).await?;
        }
        if self.stop {
            for worker in &workers {
                worker.stop().await?;
            }
        }
        Ok(Some(reports))
    }

    async fn open(&self) -> Result<(Arc<Cluster<Store>>, Vec<Worker<Store>>, Vec<RecoveryReport>), EngineError> {
        let storage = Faulty::new(Local::new(self.io.clone()), self.policy.clone());
        let superblock = open_superblock(&storage, SHARDS).await?;
        let (cluster, seats) = Cluster::new(superblock, self.workers);
        let mut opening = Vec::new();
        for seat in seats {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let storage = Faulty::new(Local::new(self.io.clone()), self.policy.clone());
            let (cluster, config) = (Arc::clone(&cluster), self.config.clone());
            self.io.spawn(async move {
                let _ = sender.send(Worker::open(storage, cluster, seat, config).await);
            });
            opening.push(receiver);
        }
        let (mut workers, mut reports) = (Vec::new(), Vec::new());
        for receiver in opening {
            let (worker, found) = receiver.await.expect("workers open or fail")?;
            workers.push(worker);
            reports.extend(found);
        }
        Ok((cluster, workers, reports))
    }

    async fn accounts(&self, workers: &[Worker<Store>]) -> Result<Vec<Arc<AccountRecord>>, EngineError> {
        let names = (0..ACCOUNTS).map(|number| format!("user{number}@example.org"));
        let missing: Vec<NewAccount> = names
            .clone()
            .filter(|name| workers[0].cluster().directory().find(name).is_none())
            .map(|name| NewAccount { name, password: String::new() })
            .collect();
        if !missing.is_empty() {
            workers[0].add_accounts(missing).await?;
        }
        let directory = workers[0].cluster().directory();
        Ok(names.map(|name| directory.find(&name).expect("all accounts exist now")).collect())
    }

    /// Looks at every mailbox and message, as a client would that syncs everything.
    async fn look_at_everything(&self, workers: &[Worker<Store>]) -> Result<(), EngineError> {
        let directory = workers[0].cluster().directory();
        let mut accounts: Vec<_> = directory.iter().collect();
        accounts.sort_by_key(|account| account.account);
        let mut present = BTreeSet::new();
        let mut counts: BTreeMap<u64, u32> = BTreeMap::new();
        for account in accounts {
            let owner = &workers[workers[0].cluster().owner(account.shard)];
            let shard = owner.local(account.shard).expect("the owner has it");
            for info in shard.mailboxes(account.account) {
                let named = name(account.shard, info.mailbox);
                present.insert(named);
                self.oracle.borrow_mut().mailbox_exists(named, account.account, info.status.uid_validity);
                let messages = show(&shard, info.mailbox, &self.oracle).await?;
                let status = shard.status(info.mailbox).expect("it was just listed");
                self.oracle.borrow_mut().status_shown(named, &status, &messages);
                self.oracle.borrow_mut().contents(named, &messages);
                let all = shard.messages(info.mailbox, UidSet::range(1..=100_000)).await?;
                for found in all {
                    match shard.read_message(&found.message, info.mailbox, Part::Whole).await {
                        Ok(bytes) => match token_of(&bytes.prefix, &bytes.body) {
                            Some(token) => {
                                *counts.entry(token).or_default() += 1;
                                let uid = found.message.uid.0;
                                self.oracle.borrow_mut().token_read(named, uid, token);
                            }
                            None => self.oracle.borrow_mut().fail(format!(
                                "mailbox {} UID {}: the bytes are not those delivered",
                                info.mailbox, found.message.uid
                            )),
                        },
                        Err(EngineError::Damaged(damage)) => self.oracle.borrow_mut().fail(damage.to_string()),
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        let mut oracle = self.oracle.borrow_mut();
        oracle.all_mailboxes(&present);
        oracle.all_tokens(&counts);
        Ok(())
    }
}

/// What a future gives, unless it takes too long.
pub async fn within<T>(io: &impl Runtime, limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    let (mut future, mut clock) = (pin!(future), pin!(io.sleep(limit)));
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => clock.as_mut().poll(context).map(|()| None),
    })
    .await
}

/// A mailbox's name in the oracle: its id is one of its shard only.
fn name(shard: ShardId, mailbox: MailboxId) -> MailboxId {
    MailboxId(mailbox.0 << 3 | u64::from(shard.0))
}

/// A body that tells its token, and whose length depends on it: now and then it takes several blocks. Many have attachments that
/// others have, too, or what looks like one.
fn body_of(token: u64) -> Vec<u8> {
    let mut body = format!("token {token}\r\n").into_bytes();
    let lines = if token.is_multiple_of(97) { 14_000 } else { 1 + token % 40 };
    for line in 0..lines {
        body.extend_from_slice(format!("{token} {line} {}\r\n", line.wrapping_mul(token)).as_bytes());
        if line == 3 && token % 5 < 2 {
            attach(&mut body, 3500 + token % 3, token);
        }
        if line == 5 && token % 7 == 3 {
            // Too short for a block of its own; and then a line of base64 that says nothing with its last bits.
            attach(&mut body, 700 + token % 50, token);
            body.extend_from_slice(b"QR==\r\n");
        }
    }
    if token % 23 == 5 {
        // Larger than what lies in a message's record.
        for number in 0..4 {
            attach(&mut body, 55_000 + token % 2, token + number % 3);
            body.extend_from_slice(format!("--{number}\r\n").as_bytes());
        }
        if token.is_multiple_of(3) {
            body.truncate(body.len() - 7);
        }
    }
    body
}

fn attach(body: &mut Vec<u8>, octets: u64, like: u64) {
    let content: Vec<u8> = (0..octets).map(|octet| ((octet * (7 + like % 3)) >> 3) as u8).collect();
    put_lines(&content, if like.is_multiple_of(11) { 64 } else { 76 }, usize::MAX / 2, body);
}

const HEADER: &[u8] = b"From: a@example.org\r\nSubject: s\r\n\r\n";

fn token_of(prefix: &[u8], body: &[u8]) -> Option<u64> {
    let prefix = str::from_utf8(prefix).ok()?;
    let token: u64 = prefix.strip_prefix("X-Token: ")?.strip_suffix("\r\n")?.parse().ok()?;
    let base: u64 = str::from_utf8(body).ok()?.strip_prefix("token ")?.lines().next()?.parse().ok()?;
    (body == body_of(base)).then_some(token)
}

async fn show(
    shard: &Shard<Store>,
    mailbox: MailboxId,
    oracle: &Rc<RefCell<Oracle>>,
) -> Result<Vec<Shown>, EngineError> {
    let all = shard.messages(mailbox, UidSet::range(1..=100_000)).await?;
    let status = shard.status(mailbox);
    if let Some(status) = status {
        oracle.borrow_mut().counters_shown(name(shard.id(), mailbox), status.uid_next, status.highest_modseq);
    }
    let shown = all.iter().map(|found| Shown {
        uid: found.message.uid.0,
        message: found.message.id,
        modseq: found.message.modseq.0,
        flags: found.flags.0,
    });
    Ok(shown.collect())
}

impl Session {
    fn below(&self, bound: u64) -> u64 {
        self.sim.below(bound)
    }

    fn name(&self, mailbox: MailboxId) -> MailboxId {
        name(self.account.shard, mailbox)
    }

    /// Changes things through the handle, from whatever worker it is on.
    async fn work(self) {
        for _ in 0..OPERATIONS {
            if self.oracle.borrow().violation.is_some() {
                return;
            }
            let result = match self.below(40) / 2 {
                0..=6 => self.deliver().await,
                7..=9 => self.store().await,
                10 | 11 => self.expunge().await,
                12 => self.transfer(false).await,
                13..=15 => self.transfer(true).await,
                16 => self.create().await,
                17 if self.below(3) == 0 => self.delete().await,
                17 | 18 => self.rename().await,
                _ if self.below(2) == 0 => self.compact().await,
                _ if self.below(2) == 0 => self.scrub().await,
                _ => self.subscribe().await,
            };
            match result {
                Ok(()) | Err(EngineError::Refused(_)) => {}
                Err(EngineError::Damaged(damage)) => self.oracle.borrow_mut().fail(damage.to_string()),
                // The device failed, as it may: the session's client would try again later.
                Err(_) => self.io.sleep(Duration::from_millis(1)).await,
            }
            self.io.sleep(Duration::from_micros(self.below(2000))).await;
        }
    }

    /// Some mailbox of the account.
    async fn some_mailbox(&self) -> Result<MailboxId, EngineError> {
        let account = self.account.account;
        let before = self.oracle.borrow().deletions_so_far(account);
        let infos = self.worker.call(self.account.shard, move |shard| async move { shard.mailboxes(account) }).await?;
        for info in &infos {
            if info.name != "INBOX" && self.oracle.borrow().deletion_overlaps(account, before) {
                self.oracle.borrow_mut().attempt_deletion(self.name(info.mailbox));
            }
            self.oracle.borrow_mut().mailbox_exists(self.name(info.mailbox), account, info.status.uid_validity);
        }
        if infos.is_empty() {
            return self
                .worker
                .call(self.account.shard, move |shard| async move { shard.inbox(account).await })
                .await?;
        }
        Ok(infos[self.below(infos.len() as u64) as usize].mailbox)
    }

    /// Some UIDs of a mailbox that exist.
    async fn some_uids(&self, mailbox: MailboxId) -> Result<BTreeSet<u32>, EngineError> {
        let all = UidSet::range(1..=100_000);
        let found = self
            .worker
            .call(self.account.shard, move |shard| async move { shard.messages(mailbox, all).await })
            .await??;
        let chance = 1 + self.below(4);
        Ok(found.iter().map(|found| found.message.uid.0).filter(|_| self.below(4) < chance).collect())
    }

    async fn deliver(&self) -> Result<(), EngineError> {
        let base = self.next_token.get();
        let count = 1 + self.below(3);
        self.next_token.set(base + count);
        let mut message = HEADER.to_vec();
        message.extend_from_slice(&body_of(base));
        let digest = base.to_le_bytes();
        let dictionaries = self.worker.cluster().dictionaries();
        if self.below(12) == 0 {
            let generation = dictionaries.current().map_or(0, |set| set.generation()) + 1;
            dictionaries.offer(invented(generation));
        }
        let mut packer = Packer::default();
        packer.use_dictionaries(dictionaries.current().filter(|_| self.below(8) > 0));
        let prefix_of = |token: u64| format!("X-Token: {token}\r\n").into_bytes();
        // Of one recipient alone the prefix goes with the header.
        let prefix = if count == 1 && base.is_multiple_of(2) { prefix_of(base) } else { Vec::new() };
        let now_ms = self.io.wall_clock_ms();
        let prepared = Prepared::with_prefix(&mut packer, &prefix, &message, HEADER.len(), &digest, now_ms);
        let mut targets = Vec::new();
        for token in base..base + count {
            let mailbox = self.some_mailbox().await?;
            let mut oracle = self.oracle.borrow_mut();
            oracle.token(token).account = self.account.account;
            oracle.on_its_way(token, self.name(mailbox));
            drop(oracle);
            let flags = match self.below(4) {
                0 => vec![FlagName::Seen],
                1 => vec![FlagName::Keyword(format!("$k{}", self.below(5)))],
                _ => Vec::new(),
            };
            targets.push(Target {
                account: self.account.account,
                mailbox: TargetMailbox::Id(mailbox),
                prefix: if prefix.is_empty() { prefix_of(token) } else { Vec::new() },
                flags,
                internal_date: None,
            });
        }
        let prepared = Arc::new(prepared);
        let results = self
            .worker
            .call(self.account.shard, move |shard| async move { shard.deliver(prepared, targets).await })
            .await?;
        let mut result = Ok(());
        for (token, delivered) in (base..).zip(results) {
            match delivered {
                Ok(delivered) => {
                    let mut oracle = self.oracle.borrow_mut();
                    oracle.token(token).acknowledged = true;
                    oracle.placed(self.name(delivered.mailbox), delivered.uid.0, Some(token));
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }

    async fn store(&self) -> Result<(), EngineError> {
        let mailbox = self.some_mailbox().await?;
        let uids = self.some_uids(mailbox).await?;
        let op = [FlagOp::Add, FlagOp::Remove, FlagOp::Replace][self.below(3) as usize];
        let flags = match self.below(4) {
            0 => vec![FlagName::Seen],
            1 => vec![FlagName::Flagged, FlagName::Keyword(format!("$k{}", self.below(5)))],
            2 => vec![FlagName::Answered],
            _ => vec![FlagName::Seen, FlagName::Draft],
        };
        let unchanged_since = (self.below(4) == 0).then(|| ModSeq(self.below(40)));
        let set: UidSet = uids.into_iter().map(Uid).collect();
        let stored = self
            .worker
            .call(self.account.shard, move |shard| async move {
                shard.store_flags(mailbox, set, op, flags, unchanged_since).await
            })
            .await??;
        if let Some(modseq) = stored.modseq {
            let uids = stored.changed.iter().map(|uid| uid.0);
            self.oracle.borrow_mut().modseq_acknowledged(self.name(mailbox), uids, modseq.0);
        }
        Ok(())
    }

    async fn expunge(&self) -> Result<(), EngineError> {
        let mailbox = self.some_mailbox().await?;
        let uids = self.some_uids(mailbox).await?;
        self.oracle.borrow_mut().attempt_removal(self.name(mailbox), &uids, false);
        let set: UidSet = uids.into_iter().map(Uid).collect();
        let gone = self
            .worker
            .call(self.account.shard, move |shard| async move {
                shard.store_flags(mailbox, set.clone(), FlagOp::Add, vec![FlagName::Deleted], None).await?;
                shard.expunge(mailbox, Some(set)).await
            })
            .await??;
        self.oracle.borrow_mut().removed(self.name(mailbox), gone.iter().map(|uid| uid.0));
        self.oracle.borrow_mut().acknowledged += 1;
        Ok(())
    }

    async fn transfer(&self, is_move: bool) -> Result<(), EngineError> {
        let (from, to) = (self.some_mailbox().await?, self.some_mailbox().await?);
        let uids = self.some_uids(from).await?;
        let set: UidSet = uids.iter().copied().map(Uid).collect();
        // Tokens of what is copied are read first, so that the oracle can follow them.
        let tokens = self.tokens_of(from, &set).await?;
        {
            let mut oracle = self.oracle.borrow_mut();
            for token in tokens.values() {
                oracle.token(*token).copied |= !is_move;
                oracle.on_its_way(*token, self.name(to));
            }
            if is_move {
                oracle.attempt_removal(self.name(from), &uids, true);
            }
        }
        let copied = self
            .worker
            .call(self.account.shard, move |shard| async move {
                if is_move { shard.move_messages(from, set, to).await } else { shard.copy(from, set, to).await }
            })
            .await??;
        let mut oracle = self.oracle.borrow_mut();
        for (source, target) in copied.pairs {
            oracle.placed(self.name(to), target.0, tokens.get(&source.0).copied());
            if is_move {
                oracle.removed(self.name(from), [source.0]);
            }
        }
        Ok(())
    }

    async fn tokens_of(&self, mailbox: MailboxId, uids: &UidSet) -> Result<BTreeMap<u32, u64>, EngineError> {
        let uids = uids.clone();
        let read = self
            .worker
            .call(self.account.shard, move |shard| async move {
                let mut read = Vec::new();
                for found in shard.messages(mailbox, uids).await? {
                    let bytes = shard.read_message(&found.message, mailbox, Part::Whole).await?;
                    read.push((found.message.uid.0, bytes));
                }
                Ok::<_, EngineError>(read)
            })
            .await??;
        let mut tokens = BTreeMap::new();
        for (uid, bytes) in read {
            let token = token_of(&bytes.prefix, &bytes.body);
            let mut oracle = self.oracle.borrow_mut();
            match token {
                Some(token) => {
                    oracle.token_read(self.name(mailbox), uid, token);
                    tokens.insert(uid, token);
                }
                None => oracle.fail(format!("mailbox {mailbox} UID {uid}: the bytes are not those delivered")),
            }
        }
        Ok(tokens)
    }

    fn some_name(&self) -> String {
        let name = ["Work", "Work/Old", "Lists", "Lists/a/b", "Archive"][self.below(5) as usize];
        name.to_owned()
    }

    async fn create(&self) -> Result<(), EngineError> {
        let (account, name) = (self.account.account, self.some_name());
        let before = self.oracle.borrow().deletions_so_far(account);
        let mailbox = self
            .worker
            .call(self.account.shard, move |shard| async move {
                let mailbox = shard.create_mailbox(account, &name, 0).await?;
                Ok::<_, EngineError>((mailbox, shard.status(mailbox)))
            })
            .await??;
        if let (mailbox, Some(status)) = mailbox {
            if self.oracle.borrow().deletion_overlaps(account, before) {
                self.oracle.borrow_mut().attempt_deletion(self.name(mailbox));
            }
            self.oracle.borrow_mut().mailbox_exists(self.name(mailbox), account, status.uid_validity);
        }
        Ok(())
    }

    async fn delete(&self) -> Result<(), EngineError> {
        let (account, name) = (self.account.account, self.some_name());
        self.oracle.borrow_mut().deletion_begins(account);
        let names = self.worker.call(self.account.shard, move |shard| async move { shard.mailboxes(account) }).await;
        let result = match names {
            Ok(names) => {
                for info in names.iter().filter(|info| info.name != "INBOX") {
                    self.oracle.borrow_mut().attempt_deletion(self.name(info.mailbox));
                }
                let deletion = move |shard: Shard<Store>| async move { shard.delete_mailbox(account, &name).await };
                self.worker.call(self.account.shard, deletion).await.and_then(|result| result)
            }
            Err(error) => Err(error),
        };
        self.oracle.borrow_mut().deletion_ends(account);
        result
    }

    async fn rename(&self) -> Result<(), EngineError> {
        let (account, from, to) = (self.account.account, self.some_name(), self.some_name());
        self.worker
            .call(self.account.shard, move |shard| async move { shard.rename_mailbox(account, &from, &to).await })
            .await?
    }

    async fn compact(&self) -> Result<(), EngineError> {
        let choice = if self.below(2) == 0 { Choice::All } else { Choice::WherePays };
        self.worker.call(self.account.shard, move |shard| async move { shard.compact(choice).await }).await??;
        Ok(())
    }

    /// Whatever goes on meanwhile, there is no damage.
    async fn scrub(&self) -> Result<(), EngineError> {
        let bytes_per_s = if self.below(2) == 0 { 0 } else { 1 << 20 };
        let scrubbed = self.worker.call(self.account.shard, move |shard| async move {
            let scrubbed = shard.scrub(bytes_per_s).await;
            (scrubbed, shard.scrub_status().findings)
        });
        let (scrubbed, findings) = scrubbed.await?;
        if let Some(finding) = findings.front().filter(|_| self.is_sound) {
            let what = format!("{} at offset {}: {}", finding.file, finding.offset, finding.what);
            self.oracle.borrow_mut().fail(format!("the scrub found damage where there is none: {what}"));
        }
        scrubbed.map(|_| ())
    }

    async fn subscribe(&self) -> Result<(), EngineError> {
        let (account, name, on) = (self.account.account, self.some_name(), self.below(2) == 0);
        self.worker
            .call(self.account.shard, move |shard| async move { shard.subscribe(account, &name, on).await })
            .await?
    }

    /// Watches a mailbox through a view and tells the oracle all it is shown.
    async fn watch(self) {
        for _ in 0..4 {
            let Ok(mailbox) = self.some_mailbox().await else { return };
            let Some(shard) = self.worker.local(self.account.shard) else { return };
            let Ok(mut view) = shard.select(mailbox, self.below(2) == 0).await else { continue };
            let mut expunges_shown_at = view.highest_modseq();
            for _ in 0..8 {
                if self.oracle.borrow().violation.is_some() {
                    return;
                }
                let uids = view.uids();
                let Ok(found) = shard.messages(mailbox, uids).await else { break };
                for found in found {
                    let shown = Shown {
                        uid: found.message.uid.0,
                        message: found.message.id,
                        modseq: found.message.modseq.0,
                        flags: found.flags.0,
                    };
                    self.oracle.borrow_mut().message_shown(self.name(mailbox), shown);
                }
                self.io.sleep(Duration::from_micros(self.below(4000))).await;
                let known = view.uids();
                let allow_expunge = self.below(2) == 0;
                let Ok(changes) = view.sync(allow_expunge).await else { break };
                if changes.gone {
                    break;
                }
                if !changes.expunged.is_empty() && view.highest_modseq() <= expunges_shown_at {
                    // RFC 7162, 3.1.1: an expunge raises HIGHESTMODSEQ.
                    let what = format!("mailbox {mailbox}: an expunge did not raise HIGHESTMODSEQ");
                    self.oracle.borrow_mut().fail(what);
                }
                if allow_expunge {
                    expunges_shown_at = view.highest_modseq();
                }
                let gone = changes.expunged_uids.iter().map(|uid| uid.0);
                self.oracle.borrow_mut().removed(self.name(mailbox), gone);
                self.check_view(&view, &known, &changes);
            }
        }
    }

    /// A view after a sync is the view before it, less what it said was expunged, plus what it said is new.
    fn check_view(
        &self,
        view: &posthaste_engine::view::View<Store>,
        known: &UidSet,
        changes: &posthaste_engine::view::Changes,
    ) {
        let mut mirror: Vec<u32> = known.iter().map(|uid| uid.0).collect();
        for &sequence in &changes.expunged {
            if sequence == 0 || sequence as usize > mirror.len() {
                return self
                    .oracle
                    .borrow_mut()
                    .fail(format!("EXPUNGE of sequence number {sequence} that is not there"));
            }
            mirror.remove(sequence as usize - 1);
        }
        let now: Vec<u32> = view.uids().iter().map(|uid| uid.0).collect();
        if now.len() < mirror.len() || now[..mirror.len()] != mirror[..] {
            return self.oracle.borrow_mut().fail("a view's numbers do not follow from its responses".to_owned());
        }
        let exists = changes.exists.unwrap_or(mirror.len() as u32);
        if exists as usize != now.len() {
            let what = format!("EXISTS {exists} for {} messages: {now:?} after {known:?} and {changes:?}", now.len());
            self.oracle.borrow_mut().fail(what);
        }
    }
}
