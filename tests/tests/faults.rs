//! Each operation of the store on its storage fails in each way that it can: what callers are told then, that nothing
//! acknowledged is lost, and that there is service again. `docs/durability.md` has the same as a table.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MailboxId, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{Aim, Fault, Operation, Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::shard::{Shard, ShardConfig, ShardEvent};
use posthaste_engine::storage::StorageError;
use posthaste_engine::storage::local::{Local, READ_TIMEOUT};
use posthaste_tests::simulation::{check_everything, within};

type Store = Local<SimIo>;

const NAME: &str = "a@example.org";
/// More than indexes that always stay in memory, so that pages are read.
const MAILBOXES: usize = 12;
const FOR_GOOD: u32 = u32::MAX;

/// What is known to be so, by answers alone.
#[derive(Clone, Debug, Default)]
struct Truth {
    /// The number of each message that there is.
    there: BTreeMap<(MailboxId, u32), u64>,
    flagged: BTreeSet<(MailboxId, u32)>,
    /// Messages of which a change was answered with an error: it may have happened.
    in_doubt: BTreeSet<(MailboxId, u32)>,
    /// Numbers of messages that may be there.
    numbers_in_doubt: BTreeSet<u64>,
    next_number: u64,
}

#[derive(Clone)]
struct Client {
    worker: Worker<Store>,
    shard: Shard<Store>,
    account: AccountId,
    inbox: MailboxId,
    truth: Rc<RefCell<Truth>>,
}

/// What did not work.
#[derive(Debug, Default)]
struct Failures {
    /// Of what clients do that add or change something, or only look.
    deliveries: Vec<EngineError>,
    changes: Vec<EngineError>,
    reads: Vec<EngineError>,
    /// Of what the store does by itself.
    housekeeping: Vec<EngineError>,
    /// Things that the operator was told.
    told: usize,
}

fn config() -> ShardConfig {
    ShardConfig {
        segment_size_bytes: 64 << 10,
        checkpoint_bytes: 1 << 30,
        reserve_bytes: 128 << 10,
        index_cache_bytes: 0,
        message_cache_bytes: 0,
        ..ShardConfig::default()
    }
}

async fn open(io: &SimIo, truth: &Rc<RefCell<Truth>>) -> Result<Client, EngineError> {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await?;
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let config = StoreConfig { shard: config() };
    let (worker, reports) = Worker::open(storage, cluster, seats.remove(0), config).await?;
    assert!(reports[0].damage.is_empty(), "damage where there is none: {:?}", reports[0].damage);
    if worker.cluster().directory().is_empty() {
        worker.add_accounts(vec![NewAccount { name: NAME.to_owned(), password: String::new() }]).await?;
    }
    let account = worker.cluster().directory().find(NAME).expect("it exists now").account;
    let shard = worker.local(ShardId(0)).expect("there is one worker");
    let inbox = shard.inbox(account).await?;
    Ok(Client { worker, shard, account, inbox, truth: Rc::clone(truth) })
}

fn header(number: u64) -> String {
    format!("Subject: {number}\r\n\r\n")
}

/// A message of some 5 KB that says its number.
fn message(number: u64) -> Vec<u8> {
    let mut bytes = header(number).into_bytes();
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..40 {
        for _ in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.extend_from_slice(format!("{:016x}", state).as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
    }
    bytes
}

impl Client {
    async fn deliver_to(&self, mailbox: MailboxId) -> Result<Uid, EngineError> {
        let number = {
            let mut truth = self.truth.borrow_mut();
            truth.next_number += 1;
            truth.next_number
        };
        let target = Target {
            account: self.account,
            mailbox: TargetMailbox::Id(mailbox),
            prefix: Vec::new(),
            flags: Vec::new(),
            internal_date: None,
        };
        // In doubt until it is answered: the machine may die before.
        self.truth.borrow_mut().numbers_in_doubt.insert(number);
        let octets = header(number).len();
        let prepared = Prepared::new(&mut Packer::default(), &message(number), octets, b"digest", 1);
        let uid = self.shard.deliver(Arc::new(prepared), vec![target]).await.remove(0)?.uid;
        let mut truth = self.truth.borrow_mut();
        truth.there.insert((mailbox, uid.0), number);
        truth.numbers_in_doubt.remove(&number);
        Ok(uid)
    }

    async fn deliver(&self) -> Result<Uid, EngineError> {
        self.deliver_to(self.inbox).await
    }

    /// Some messages of INBOX that are known to be there.
    fn some(&self, count: usize) -> Vec<u32> {
        let truth = self.truth.borrow();
        let known = truth.there.keys().filter(|key| key.0 == self.inbox && !truth.in_doubt.contains(key));
        known.map(|(_, uid)| *uid).take(count).collect()
    }

    fn doubt(&self, uids: &[u32]) {
        self.truth.borrow_mut().in_doubt.extend(uids.iter().map(|&uid| (self.inbox, uid)));
    }

    fn no_doubt(&self, uids: &[u32]) {
        let mut truth = self.truth.borrow_mut();
        uids.iter().for_each(|&uid| _ = truth.in_doubt.remove(&(self.inbox, uid)));
    }

    async fn flag(&self) -> Result<(), EngineError> {
        let uids = self.some(2);
        self.doubt(&uids);
        let set: UidSet = uids.iter().copied().map(Uid).collect();
        self.shard.store_flags(self.inbox, set, FlagOp::Add, vec![FlagName::Flagged], None).await?;
        self.no_doubt(&uids);
        self.truth.borrow_mut().flagged.extend(uids.iter().map(|&uid| (self.inbox, uid)));
        Ok(())
    }

    async fn expunge(&self) -> Result<(), EngineError> {
        let uids = self.some(1);
        self.doubt(&uids);
        let set: UidSet = uids.iter().copied().map(Uid).collect();
        self.shard.expunge_messages(self.inbox, set).await?;
        self.no_doubt(&uids);
        let mut truth = self.truth.borrow_mut();
        for uid in uids {
            truth.there.remove(&(self.inbox, uid));
            truth.flagged.remove(&(self.inbox, uid));
        }
        Ok(())
    }

    async fn move_to(&self, target: MailboxId) -> Result<(), EngineError> {
        let uids = self.some(1);
        self.doubt(&uids);
        let numbers: Vec<u64> = {
            let mut truth = self.truth.borrow_mut();
            let numbers: Vec<u64> = uids.iter().map(|&uid| truth.there[&(self.inbox, uid)]).collect();
            truth.numbers_in_doubt.extend(&numbers);
            numbers
        };
        let set: UidSet = uids.iter().copied().map(Uid).collect();
        let moved = self.shard.move_messages(self.inbox, set, target).await?;
        self.no_doubt(&uids);
        let mut truth = self.truth.borrow_mut();
        numbers.iter().for_each(|number| _ = truth.numbers_in_doubt.remove(number));
        for (source, copy) in moved.pairs {
            let number = truth.there.remove(&(self.inbox, source.0)).expect("it was chosen from there");
            truth.there.insert((target, copy.0), number);
            if truth.flagged.remove(&(self.inbox, source.0)) {
                truth.flagged.insert((target, copy.0));
            }
        }
        Ok(())
    }

    /// Everything that can be seen, message by message.
    async fn look(&self) -> Result<BTreeMap<(MailboxId, u32), (u64, bool)>, EngineError> {
        let mut seen = BTreeMap::new();
        for info in self.shard.mailboxes(self.account) {
            for found in self.shard.messages(info.mailbox, UidSet::range(1..=1_000_000)).await? {
                let whole = self.shard.read_message(&found.message, info.mailbox, Part::Whole).await?;
                let header = String::from_utf8(whole.header.to_vec()).unwrap();
                let number = header.trim_end().strip_prefix("Subject: ").unwrap().parse().unwrap();
                assert!(whole.rest == message(number), "message {number} is another");
                seen.insert((info.mailbox, found.message.uid.0), (number, found.flags.contains(Flags::FLAGGED)));
            }
        }
        Ok(seen)
    }

    /// Nothing that was acknowledged is missing, and nothing is there that nobody brought.
    async fn check(&self, when: &str) {
        let seen = self.look().await.unwrap_or_else(|error| panic!("{when}: {error}"));
        let truth = self.truth.borrow();
        for (key, number) in &truth.there {
            match seen.get(key) {
                Some((found, is_flagged)) => {
                    assert_eq!(found, number, "{when}: {key:?}");
                    let is_known = truth.in_doubt.contains(key) || *is_flagged == truth.flagged.contains(key);
                    assert!(is_known, "{when}: the flags of {key:?}");
                }
                None => assert!(truth.in_doubt.contains(key), "{when}: {key:?}, message {number}, is lost"),
            }
        }
        for (key, (number, _)) in &seen {
            let is_known = truth.there.contains_key(key) || truth.numbers_in_doubt.contains(number);
            assert!(is_known, "{when}: {key:?}, message {number}, comes from nowhere");
        }
    }

    /// What is doubtful is settled by what a session sees.
    async fn settle(&self) {
        let seen = self.look().await.unwrap();
        let mut truth = self.truth.borrow_mut();
        truth.there = seen.iter().map(|(key, (number, _))| (*key, *number)).collect();
        truth.flagged = seen.iter().filter(|(_, (_, is_flagged))| *is_flagged).map(|(key, _)| *key).collect();
        truth.in_doubt.clear();
        truth.numbers_in_doubt.clear();
    }

    /// All that clients do, and all that the store does by itself.
    async fn work(&self) -> Failures {
        let mut failures = Failures::default();
        fn note<T>(failures: &mut Vec<EngineError>, result: Result<T, EngineError>) {
            failures.extend(result.err());
        }
        let archive = self.shard.mailbox(self.account, "M0").unwrap();
        for round in 0..2 {
            note(&mut failures.reads, self.look().await);
            for _ in 0..12 {
                note(&mut failures.deliveries, self.deliver().await);
            }
            note(&mut failures.changes, self.flag().await);
            note(&mut failures.changes, self.expunge().await);
            note(&mut failures.changes, self.move_to(archive).await);
            note(&mut failures.housekeeping, self.shard.checkpoint().await);
            note(&mut failures.deliveries, self.deliver().await);
            note(&mut failures.housekeeping, self.shard.compact(Choice::All).await);
            note(&mut failures.housekeeping, self.shard.scrub(0).await);
            note(&mut failures.changes, self.expunge().await);
            let name = format!("New {round} {}", self.truth.borrow().next_number);
            note(&mut failures.changes, self.shard.create_mailbox(self.account, &name, 0).await);
        }
        note(&mut failures.reads, self.look().await);
        while let Some(event) = within(self.worker.storage(), Duration::ZERO, self.shard.next_event()).await {
            let is_bad = matches!(event, ShardEvent::DamageFound(_) | ShardEvent::SegmentUnreadable(..));
            assert!(!matches!(event, ShardEvent::SegmentDamaged(..)), "a fault was taken for damage: {event:?}");
            failures.told += usize::from(is_bad);
        }
        failures
    }
}

/// A machine with a store of some segments, stopped, and what is known of it.
fn machine(seed: u64) -> (Sim, Rc<RefCell<Truth>>) {
    let sim = Sim::new(seed);
    let truth: Rc<RefCell<Truth>> = Rc::default();
    let (io, known) = (sim.io(), Rc::clone(&truth));
    sim.run(async move {
        let client = open(&io, &known).await.unwrap();
        for number in 0..MAILBOXES {
            let mailbox = client.shard.create_mailbox(client.account, &format!("M{number}"), 0).await.unwrap();
            client.deliver_to(mailbox).await.unwrap();
        }
        for _ in 0..10 {
            client.deliver().await.unwrap();
        }
        client.worker.stop().await.unwrap();
    });
    (sim, truth)
}

/// What a fault comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Clients notice nothing. What the store does by itself may have to be tried again.
    Unharmed,
    /// What needs space is refused for want of it, until there is some.
    Full,
    /// No change is taken until the store is opened again. All can be read.
    Stops,
    /// What has to be read from there cannot be had until it can. Mail comes in.
    Unreadable,
}

use Fault::{Error, Hang, NoSpace, Short, Slow};
use Operation::{Allocate, Create, Link, List, Open, Read, Remove, Rename, Sync, SyncDirectory, Truncate, Write};
use Outcome::{Full, Stops, Unharmed, Unreadable};

/// What each fault may come to. Segments of the log have small numbers, those of compaction begin with a 2.
const FAULTS: &[(Operation, &str, Fault, &[Outcome])] = &[
    // A batch, and what begins and ends a segment.
    (Write, "wal/0", Error, &[Stops]),
    (Write, "wal/0", NoSpace, &[Full]),
    (Write, "wal/0", Short, &[Unharmed]),
    (Sync, "wal/0", Error, &[Stops]),
    (Sync, "wal/0", NoSpace, &[Stops, Full]),
    (Create, "wal/0", Error, &[Stops]),
    (Create, "wal/0", NoSpace, &[Full]),
    (Allocate, "wal/0", Error, &[Stops]),
    (Allocate, "wal/0", NoSpace, &[Full]),
    (SyncDirectory, "wal", Error, &[Stops, Unharmed]),
    (Truncate, "wal/0", Error, &[Stops]),
    (Truncate, "wal/0", NoSpace, &[Full]),
    (Rename, "seg/0", Error, &[Stops]),
    (Rename, "seg/0", NoSpace, &[Full]),
    (SyncDirectory, "seg", Error, &[Stops, Unharmed]),
    (SyncDirectory, "seg", NoSpace, &[Stops, Unharmed]),
    // A checkpoint: its index blob, and the manifest that names it.
    (Create, "idx/", Error, &[Unharmed]),
    (Create, "idx/", NoSpace, &[Full]),
    (Write, "idx/", Error, &[Unharmed]),
    (Write, "idx/", NoSpace, &[Full]),
    (Write, "idx/", Short, &[Unharmed]),
    (Sync, "idx/", Error, &[Unharmed]),
    (Link, "idx/", Error, &[Unharmed]),
    (Link, "idx/", NoSpace, &[Full]),
    (SyncDirectory, "idx", Error, &[Unharmed]),
    (Remove, "idx/", Error, &[Unharmed]),
    (Create, "manifest/", Error, &[Stops]),
    (Create, "manifest/", NoSpace, &[Full]),
    (Write, "manifest/", Error, &[Stops]),
    (Write, "manifest/", NoSpace, &[Full]),
    (Write, "manifest/", Short, &[Unharmed]),
    (Sync, "manifest/", Error, &[Stops]),
    (Link, "manifest/", Error, &[Stops]),
    (SyncDirectory, "manifest", Error, &[Stops, Unharmed]),
    // Compaction.
    (Create, "wal/2", Error, &[Unharmed]),
    (Create, "wal/2", NoSpace, &[Unharmed]),
    (Allocate, "wal/2", NoSpace, &[Unharmed]),
    (Write, "wal/2", Error, &[Unharmed]),
    (Write, "wal/2", NoSpace, &[Unharmed]),
    (Write, "wal/2", Short, &[Unharmed]),
    (Sync, "wal/2", Error, &[Unharmed]),
    (Truncate, "wal/2", Error, &[Unharmed]),
    (Rename, "seg/2", Error, &[Unharmed]),
    (Rename, "seg/2", NoSpace, &[Unharmed]),
    (Remove, "seg/", Error, &[Unharmed]),
    // Reading.
    (Open, "seg/", Error, &[Unreadable]),
    (Open, "seg/", Hang, &[Unreadable]),
    (Open, "idx/", Error, &[Unreadable]),
    (Open, "idx/", Hang, &[Unreadable]),
    (Read, "seg/", Error, &[Unreadable]),
    (Read, "seg/", Hang, &[Unreadable]),
    (Read, "wal/", Error, &[Unreadable]),
    (Read, "wal/", Hang, &[Unreadable]),
    (Read, "idx/", Error, &[Unreadable]),
    (Read, "idx/", Hang, &[Unreadable]),
    (Read, "manifest/", Error, &[Unharmed]),
    (Read, "manifest/", Hang, &[Unharmed]),
    // A device that takes its time.
    (Write, "", Slow, &[Unharmed]),
    (Sync, "", Slow, &[Unharmed]),
    (Read, "", Slow, &[Unharmed]),
    (SyncDirectory, "", Slow, &[Unharmed]),
];

fn is_full(error: &EngineError) -> bool {
    matches!(error, EngineError::Full)
}

/// What clients are told to try again later.
fn is_unavailable(error: &EngineError) -> bool {
    matches!(error, EngineError::Storage(_) | EngineError::Poisoned { .. })
}

/// Whether a fault came to one of those things. Of one that strikes once, less may come.
fn judge(outcomes: &[Outcome], failures: &Failures, is_poisoned: bool, for_good: bool) -> Result<(), String> {
    let judged = outcomes.iter().map(|&outcome| is_outcome(outcome, failures, is_poisoned, for_good));
    judged.reduce(Result::or).expect("something comes of it")
}

fn is_outcome(outcome: Outcome, failures: &Failures, is_poisoned: bool, for_good: bool) -> Result<(), String> {
    let Failures { deliveries, changes, reads, housekeeping, told: told_operator } = failures;
    let none = |failures: &[EngineError]| failures.is_empty();
    let all_clients = || deliveries.iter().chain(changes).chain(reads);
    let told = |what: &str| Err(format!("{what}: {failures:?}, poisoned: {is_poisoned}"));
    if housekeeping.iter().any(|error| !is_full(error) && !is_unavailable(error)) {
        return told("the store met something that is not there");
    }
    if is_poisoned != (outcome == Stops) {
        return told("it takes changes, or not");
    }
    match outcome {
        Unharmed if all_clients().next().is_some() => told("somebody has noticed it"),
        Full if !all_clients().all(is_full) || !none(reads) => told("something else than want of space was told"),
        // A reserve is there so that this goes on.
        Full if !for_good && !none(changes) => told("clients could not make room"),
        Stops if !none(reads) => told("it cannot be read"),
        Stops if !deliveries.iter().chain(changes).all(is_unavailable) => told("something else was told"),
        Unreadable if !none(deliveries) => told("no mail comes in"),
        Unreadable if !all_clients().all(is_unavailable) => told("something else was told"),
        Unreadable if for_good && none(reads) && none(housekeeping) && *told_operator == 0 => {
            told("nobody has noticed")
        }
        _ => Ok(()),
    }
}

/// How many are spared before how many are struck. `POSTHASTE_SPARED=20` tries each number up to that.
fn cases() -> Vec<(u32, u32)> {
    match std::env::var("POSTHASTE_SPARED").ok().and_then(|number| number.parse().ok()) {
        Some(spared_max) => (0..=spared_max).flat_map(|spared| [(spared, 1), (spared, FOR_GOOD)]).collect(),
        None => vec![(0, 1), (3, 1), (1, FOR_GOOD)],
    }
}

#[test]
fn whatever_fails_nothing_acknowledged_is_lost_and_there_is_service_again() {
    let begun = std::time::Instant::now();
    let (mut cells, mut wrong) = (0, Vec::new());
    for (row, &(operation, files, fault, outcomes)) in FAULTS.iter().enumerate() {
        for (spared, struck_max) in cases() {
            let seed = (row * 100) as u64 + u64::from(spared);
            let what =
                format!("seed {seed}: {operation:?} of {files:?}: {fault:?}, {spared} spared, {struck_max} struck");
            let (sim, truth) = machine(seed);
            let (io, device, known, name) = (sim.io(), sim.clone(), Rc::clone(&truth), what.clone());
            let judged = sim.run(async move {
                let client = open(&io, &known).await.unwrap();
                device.aim(Some(Aim { operation, files: files.to_owned(), spared, struck_max, fault }));
                let failures = client.work().await;
                let struck = device.struck();
                assert!(struck > 0 || spared > 0, "{name}: it never struck");
                device.aim(None);
                let is_poisoned = client.shard.poisoned().is_some();
                client.check(&format!("{name}, while it runs")).await;
                // Whoever waits for space looks once in a second.
                io.sleep(Duration::from_secs(2)).await;
                assert_eq!(client.deliver().await.is_err(), is_poisoned, "{name}: service is not what it should be");
                if !is_poisoned {
                    client.expunge().await.unwrap();
                    client.shard.checkpoint().await.unwrap();
                }
                if struck > 0 { judge(outcomes, &failures, is_poisoned, struck_max == FOR_GOOD) } else { Ok(()) }
            });
            if let Err(why) = judged.expect("nothing crashes it") {
                wrong.push(format!("{what}: {why}"));
            }
            // The machine goes down, or the process alone: then the page cache outlives it.
            if sim.below(2) == 0 {
                sim.crash_now();
            }
            let (io, known, name) = (sim.io(), Rc::clone(&truth), what.clone());
            sim.run(async move {
                let client = open(&io, &known).await.unwrap();
                client.check(&format!("{name}, after a start")).await;
                client.settle().await;
                client.deliver().await.unwrap();
                client.flag().await.unwrap();
                client.expunge().await.unwrap();
                client.shard.compact(Choice::All).await.unwrap();
                client.check(&format!("{name}, at last")).await;
                client.worker.stop().await.unwrap();
            });
            check_everything(&sim).unwrap_or_else(|found| panic!("{what}: {}", found.0));
            cells += 1;
        }
    }
    println!("{cells} faults in {:?}", begun.elapsed());
    assert!(wrong.is_empty(), "{} of {cells} came to something else: {wrong:#?}", wrong.len());
}

/// What a start does; it may be tried again with all of it.
const FAULTS_OF_A_START: &[(Operation, &str, &[Fault])] = &[
    (List, "", &[Error, Hang]),
    (Open, "", &[Error, Hang]),
    (Read, "seg/", &[Error, Hang]),
    (Read, "wal/", &[Error, Hang]),
    (Read, "idx/", &[Error, Hang]),
    (Read, "manifest/", &[Error, Hang]),
    (Create, "", &[Error, NoSpace]),
    (Write, "wal/", &[Error, NoSpace, Short]),
    (Write, "manifest/", &[Error, NoSpace, Short]),
    (Sync, "", &[Error, NoSpace]),
    (Truncate, "", &[Error, NoSpace]),
    (Rename, "", &[Error, NoSpace]),
    (Link, "", &[Error, NoSpace]),
    (Remove, "", &[Error]),
    (Allocate, "", &[Error, NoSpace]),
    (SyncDirectory, "", &[Error]),
];

#[test]
fn a_start_that_fails_loses_nothing() {
    for (row, &(operation, files, faults)) in FAULTS_OF_A_START.iter().enumerate() {
        for (number, &fault) in faults.iter().enumerate() {
            let mut struck_ever = false;
            for (spared, struck_max) in [(0, 1), (1, 1), (3, 1), (2, FOR_GOOD)] {
                let seed = (5000 + row * 100 + number * 10) as u64 + u64::from(spared);
                let what =
                    format!("seed {seed}: {operation:?} of {files:?}: {fault:?}, {spared} spared, {struck_max} struck");
                let (sim, truth) = machine(seed);
                let (io, known) = (sim.io(), Rc::clone(&truth));
                sim.run(async move {
                    let client = open(&io, &known).await.unwrap();
                    for _ in 0..8 {
                        client.deliver().await.unwrap();
                    }
                    client.flag().await.unwrap();
                });
                sim.crash_now();
                sim.aim(Some(Aim { operation, files: files.to_owned(), spared, struck_max, fault }));
                let (io, known, name) = (sim.io(), Rc::clone(&truth), what.clone());
                sim.run(async move {
                    match open(&io, &known).await {
                        Ok(client) if !matches!(operation, Open | Read) => client.check(&name).await,
                        Ok(_) => {}
                        Err(EngineError::Damaged(damage)) => panic!("{name}: a fault was taken for damage: {damage}"),
                        Err(_) => {}
                    }
                });
                struck_ever |= sim.struck() > 0;
                sim.aim(None);
                if sim.below(2) == 0 {
                    sim.crash_now();
                }
                let (io, known, name) = (sim.io(), Rc::clone(&truth), what.clone());
                sim.run(async move {
                    let client = open(&io, &known).await.unwrap_or_else(|error| panic!("{name}: {error}"));
                    client.check(&name).await;
                    let failures = client.work().await;
                    judge(&[Unharmed], &failures, false, true).unwrap_or_else(|why| panic!("{name}: {why}"));
                    client.worker.stop().await.unwrap();
                });
                check_everything(&sim).unwrap_or_else(|found| panic!("{what}: {}", found.0));
            }
            assert!(struck_ever, "{operation:?} of {files:?} is never done by a start");
        }
    }
}

/// How long something takes, in the time of the simulation.
async fn timed<T>(io: &SimIo, future: impl Future<Output = T>) -> (Duration, T) {
    let begun = io.now();
    let value = future.await;
    (io.now() - begun, value)
}

#[test]
fn a_read_that_never_returns_is_given_up_and_keeps_nobody_else_waiting() {
    /// Some commits.
    const AT_ONCE: Duration = Duration::from_millis(500);
    for (seed, files) in ["seg/", "idx/"].into_iter().enumerate() {
        let name = format!("reads of {files:?}");
        let (sim, truth) = machine(7000 + seed as u64);
        let (io, device) = (sim.io(), sim.clone());
        sim.run(async move {
            let client = open(&io, &truth).await.unwrap();
            device.aim(Some(Aim {
                operation: Read,
                files: files.to_owned(),
                spared: 0,
                struck_max: FOR_GOOD,
                fault: Hang,
            }));
            let running = Rc::new(Cell::new(0));
            let spawn = |work: Pin<Box<dyn Future<Output = ()>>>| {
                let running = Rc::clone(&running);
                running.set(running.get() + 1);
                io.spawn(async move {
                    work.await;
                    running.set(running.get() - 1);
                });
            };
            for _ in 0..20 {
                let (client, io, name) = (client.clone(), io.clone(), name.clone());
                spawn(Box::pin(async move {
                    let (took, looked) = timed(&io, client.look()).await;
                    let error = looked.expect_err("it cannot be read");
                    let EngineError::Storage(error) = &error else { panic!("{name}: {error}") };
                    assert!(matches!(**error, StorageError::NoAnswer { .. }), "{name}: {error}");
                    assert!((READ_TIMEOUT..READ_TIMEOUT * 3 / 2).contains(&took), "{name}: after {took:?}");
                }));
            }
            let (compacting, scrubbing) = (client.clone(), client.clone());
            // How they end is not of interest here.
            spawn(Box::pin(async move { drop(compacting.shard.compact(Choice::All).await) }));
            spawn(Box::pin(async move { drop(scrubbing.shard.scrub(0).await) }));
            while running.get() > 1 {
                let (took, delivered) = timed(&io, client.deliver()).await;
                delivered.unwrap();
                assert!(took < AT_ONCE, "{name}: a delivery took {took:?}");
                if files == "seg/" {
                    let (took, flagged) = timed(&io, client.flag()).await;
                    flagged.unwrap();
                    assert!(took < AT_ONCE, "{name}: STORE took {took:?}");
                    let (took, expunged) = timed(&io, client.expunge()).await;
                    expunged.unwrap();
                    assert!(took < AT_ONCE, "{name}: EXPUNGE took {took:?}");
                }
                io.sleep(Duration::from_millis(700)).await;
            }
            assert!(client.shard.poisoned().is_none());
            // A stop may come to nothing, but it comes to an end.
            let (took, _) = timed(&io, client.worker.stop()).await;
            assert!(took < READ_TIMEOUT * 3, "{name}: a stop took {took:?}");
            device.aim(None);
            let again = open(&io, &client.truth).await.unwrap();
            again.check(&name).await;
            again.deliver().await.unwrap();
            again.worker.stop().await.unwrap();
        });
        check_everything(&sim).unwrap_or_else(|found| panic!("{files}: {}", found.0));
    }
}

/// After a failed sync the kernel may take what was written for clean: the next sync succeeds, and nothing is on the device.
#[test]
fn what_a_failed_sync_has_left_is_acknowledged_by_no_later_one() {
    for seed in 0..10 {
        for (operation, files) in [(Sync, "wal/0"), (SyncDirectory, "wal")] {
            let (sim, truth) = machine(8000 + seed);
            let (io, device, known) = (sim.io(), sim.clone(), Rc::clone(&truth));
            sim.run(async move {
                let client = open(&io, &known).await.unwrap();
                let spared = if operation == Sync { device.below(8) as u32 } else { 0 };
                device.aim(Some(Aim { operation, files: files.to_owned(), spared, struck_max: 1, fault: Error }));
                while device.struck() == 0 {
                    // Of several that share a sync, none is acknowledged.
                    let (first, second) = (client.deliver(), client.flag());
                    let (first, second) = both(first, second).await;
                    let failed = u32::from(first.is_err()) + u32::from(second.is_err());
                    assert!(device.struck() == 0 || failed > 0, "seed {seed}: {files}");
                }
                let segments = || -> Vec<Vec<u8>> {
                    device.files("shard-0000/wal/0").iter().filter_map(|(file, _)| device.contents(file)).collect()
                };
                let before = segments();
                for _ in 0..3 {
                    let failures =
                        [client.deliver().await.err(), client.flag().await.err(), client.expunge().await.err()];
                    let is_told = |error: &Option<EngineError>| matches!(error, Some(EngineError::Poisoned { .. }));
                    assert!(failures.iter().all(is_told), "seed {seed}: {files}: {failures:?}");
                    // When idle, it marks nothing as durable.
                    io.sleep(Duration::from_secs(1)).await;
                }
                client.check(&format!("seed {seed}: {files}")).await;
                assert!(client.worker.stop().await.is_err());
                assert!(segments() == before, "seed {seed}: {files}: something was written after a failed sync");
            });
            if seed % 2 == 0 {
                sim.crash_now();
            }
            for _ in 0..2 {
                let (io, known) = (sim.io(), Rc::clone(&truth));
                sim.run(async move {
                    let client = open(&io, &known).await.unwrap();
                    client.check(&format!("seed {seed}: {files}, after a start")).await;
                    client.settle().await;
                    client.deliver().await.unwrap();
                });
                // What was shown stays.
                sim.crash_now();
            }
            check_everything(&sim).unwrap_or_else(|found| panic!("seed {seed}: {}", found.0));
        }
    }
}

async fn both<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> (A, B) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    let (mut one, mut other) = (None, None);
    std::future::poll_fn(|context| {
        if one.is_none()
            && let Poll::Ready(value) = first.as_mut().poll(context)
        {
            one = Some(value);
        }
        if other.is_none()
            && let Poll::Ready(value) = second.as_mut().poll(context)
        {
            other = Some(value);
        }
        if one.is_some() && other.is_some() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    (one.expect("it is done"), other.expect("it is done"))
}
