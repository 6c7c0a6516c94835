//! What particular operations on mailboxes, messages and accounts come to, each on a simulated disk.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, Refusal};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::batch::{BatchHeader, end_of};
use posthaste_engine::format::frame::Packer;
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{AccountId, Position, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{FaultRates, Sim, SimIo};
use posthaste_engine::mailboxes::{MAILBOXES_MAX, NAME_LEVELS_MAX, SUBSCRIPTIONS_MAX};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::receipts::ReceiptKey;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::parse_segment_file;
use posthaste_tests::far::{Store, near_and_far, storage};

const NAME: &str = "a@example.org";
const NAME_IN_SECOND_SHARD: &str = "c@example.org";
const SHARD: ShardId = ShardId(0);

/// A node with one worker, one shard and one account.
struct Node {
    shard: Shard<Store>,
    account: AccountId,
    /// Its shard lives as long as it does.
    worker: Worker<Store>,
}

async fn start(io: &SimIo, shard: ShardConfig) -> Node {
    let storage = storage(io);
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let (worker, _) = Worker::open(storage, cluster, seats.remove(0), StoreConfig { shard }).await.unwrap();
    if worker.cluster().directory().find(NAME).is_none() {
        let account = NewAccount { name: NAME.to_owned(), password: String::new() };
        worker.add_accounts(vec![account]).await.unwrap();
    }
    let account = worker.cluster().directory().find(NAME).unwrap().account;
    Node { shard: worker.local(SHARD).unwrap(), account, worker }
}

/// Two workers with a shard each, which open in any order. The account is in the second shard.
async fn start_two(io: &SimIo) -> Vec<Worker<Store>> {
    let superblock = open_superblock(&storage(io), 2).await.unwrap();
    let (cluster, seats) = Cluster::new(superblock, 2);
    let mut opening = Vec::new();
    for seat in seats {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let shard = ShardConfig { segment_size_bytes: 1 << 20, ..ShardConfig::default() };
        let opened = Worker::open(storage(io), Arc::clone(&cluster), seat, StoreConfig { shard });
        io.spawn(async move {
            let _ = sender.send(opened.await);
        });
        opening.push(receiver);
    }
    let mut workers = Vec::new();
    for receiver in opening {
        workers.push(receiver.await.unwrap().unwrap().0);
    }
    workers
}

async fn add_account(worker: &Worker<Store>) -> Arc<AccountRecord> {
    let account = NewAccount { name: NAME_IN_SECOND_SHARD.to_owned(), password: String::new() };
    worker.add_accounts(vec![account]).await.unwrap().remove(0).unwrap();
    let account = worker.cluster().directory().find(NAME_IN_SECOND_SHARD).unwrap();
    assert_eq!(account.shard, ShardId(1));
    account
}

/// Runs a test on a new node.
fn on_a_node(seed: u64, test: impl AsyncFnOnce(Node) + 'static) {
    on_a_node_with(seed, ShardConfig::default(), test);
}

fn on_a_node_with(seed: u64, shard: ShardConfig, test: impl AsyncFnOnce(Node) + 'static) {
    let sim = Sim::new(seed);
    let io = sim.io();
    sim.run(async move { test(start(&io, shard).await).await }).unwrap();
}

fn prepare(header: &str, body: &[u8]) -> Arc<Prepared> {
    let bytes = [header.as_bytes(), body].concat();
    Arc::new(Prepared::new(&mut Packer::default(), &bytes, header.len(), b"digest", 1))
}

/// Text that does not compress much.
fn noise(seed: u64, octets: usize) -> String {
    let mut state = seed.wrapping_mul(2) + 1;
    let letters = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'0' + (state >> 58) as u8)
    });
    letters.take(octets).collect()
}

fn keywords(numbers: std::ops::Range<u32>) -> Vec<FlagName> {
    numbers.map(|number| FlagName::Keyword(format!("k{number}"))).collect()
}

fn all() -> UidSet {
    UidSet::range(1..=1000)
}

impl Node {
    fn target(&self, mailbox: TargetMailbox, flags: Vec<FlagName>) -> Target {
        Target { account: self.account, mailbox, prefix: Vec::new(), flags, internal_date: None }
    }

    async fn append(&self, mailbox: TargetMailbox, flags: Vec<FlagName>) -> Result<Uid, EngineError> {
        let message = prepare("Subject: s\r\n\r\n", b"body\r\n");
        let mut results = self.shard.deliver(message, vec![self.target(mailbox, flags)]).await;
        results.remove(0).map(|delivered| delivered.uid)
    }

    async fn deliver(&self) -> Uid {
        self.append(TargetMailbox::Inbox, Vec::new()).await.unwrap()
    }
}

/// Lets an operation begin: what it promises is pending then.
fn begin(operation: Pin<&mut impl Future>) {
    assert!(operation.poll(&mut Context::from_waker(Waker::noop())).is_pending());
}

fn is_refused_for_keywords<T>(result: Result<T, EngineError>) -> bool {
    matches!(result, Err(EngineError::Refused(Refusal::TooManyKeywords(_))))
}

#[test]
fn a_change_refused_for_too_many_keywords_keeps_none_of_them() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            let other = shard.create_mailbox(node.account, "Other", 0).await.unwrap();
            node.deliver().await;
            shard.store_flags(inbox, all(), FlagOp::Add, keywords(0..119), None).await.unwrap();
            assert!(is_refused_for_keywords(
                shard.store_flags(inbox, all(), FlagOp::Add, keywords(119..121), None).await
            ));
            assert!(is_refused_for_keywords(node.append(TargetMailbox::Inbox, keywords(119..121)).await));
            node.append(TargetMailbox::Id(other), keywords(119..121)).await.unwrap();
            assert!(is_refused_for_keywords(shard.copy(other, all(), inbox).await));
            assert!(is_refused_for_keywords(shard.move_messages(other, all(), inbox).await));
            // What was left pending would come with any later commit.
            node.deliver().await;
            assert_eq!(shard.keywords(inbox).await.unwrap().len(), 119);
            node.append(TargetMailbox::Inbox, keywords(120..121)).await.unwrap();
            assert_eq!(shard.keywords(inbox).await.unwrap()[119], "k120");
        });
    });
}

/// A change that somebody else makes before, after or during a silent STORE of the same message is told with it.
#[test]
fn a_silent_store_hides_only_its_own_change() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            for _ in 0..4 {
                node.deliver().await;
            }
            let store = |uid, flag| shard.store_flags(inbox, UidSet::one(Uid(uid)), FlagOp::Add, vec![flag], None);
            let mut view = shard.select(inbox, false).await.unwrap();
            store(1, FlagName::Flagged).await.unwrap();
            // Of UID 2 the other change is not committed yet when the session makes its own.
            let mut pending = pin!(store(2, FlagName::Flagged));
            begin(pending.as_mut());
            let own = view.store_silently(UidSet::range(1..=4), FlagOp::Add, vec![FlagName::Seen], None).await.unwrap();
            assert_eq!(own.changed.len(), 4);
            pending.await.unwrap();
            store(3, FlagName::Flagged).await.unwrap();
            let told: Vec<_> = view.sync(true).await.unwrap().flags.iter().map(|told| (told.1.0, told.2)).collect();
            let both = Flags::SEEN.with(Flags::FLAGGED);
            assert_eq!(told, [(1, both), (2, both), (3, both)]);
            // A later change is not hidden by what has been told.
            store(4, FlagName::Flagged).await.unwrap();
            assert_eq!(view.sync(true).await.unwrap().flags.len(), 1);
        });
    });
}

#[test]
fn renaming_inbox_takes_along_keywords_that_are_not_committed_yet() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            node.deliver().await;
            shard.store_flags(inbox, all(), FlagOp::Add, keywords(0..1), None).await.unwrap();
            let mut pending = pin!(shard.store_flags(inbox, all(), FlagOp::Add, keywords(1..2), None));
            begin(pending.as_mut());
            shard.rename_mailbox(node.account, "INBOX", "Old").await.unwrap();
            pending.await.unwrap();
            let old = shard.mailbox(node.account, "Old").unwrap();
            assert_eq!(shard.keywords(old).await.unwrap(), ["k0", "k1"]);
            let moved = shard.messages(old, all()).await.unwrap();
            assert_eq!(moved[0].flags, Flags::keyword(0).with(Flags::keyword(1)));
        });
    });
}

/// Ten mailboxes are more than the least that stay loaded.
#[test]
fn a_delivery_with_keywords_finds_its_mailboxes_whose_indexes_are_evicted_meanwhile() {
    near_and_far(|| {
        on_a_node_with(1, ShardConfig { index_cache_bytes: 1, ..ShardConfig::default() }, async |node| {
            let shard = &node.shard;
            let mut mailboxes = Vec::new();
            for number in 0..10 {
                mailboxes.push(shard.create_mailbox(node.account, &number.to_string(), 0).await.unwrap());
            }
            // Of its blocks each waits for a commit.
            let message = prepare("Subject: s\r\n\r\n", &[b'x'; 1_000_000]);
            let target = node.target(TargetMailbox::Id(mailboxes[0]), keywords(0..1));
            let mut pending = pin!(shard.deliver(message, vec![target]));
            begin(pending.as_mut());
            for &mailbox in &mailboxes[1..] {
                shard.messages(mailbox, all()).await.unwrap();
            }
            pending.await.remove(0).unwrap();
            // All of them at once, too.
            let targets = mailboxes.iter().map(|&mailbox| node.target(TargetMailbox::Id(mailbox), keywords(1..2)));
            let delivered = shard.deliver(prepare("Subject: s\r\n\r\n", b"body\r\n"), targets.collect()).await;
            assert!(delivered.iter().all(Result::is_ok), "{delivered:?}");
            assert_eq!(shard.keywords(mailboxes[0]).await.unwrap(), ["k0", "k1"]);
        });
    });
}

/// The records of messages whose blocks were committed together do not all go into the next batch.
#[test]
fn deliveries_of_large_messages_that_go_on_together_keep_batches_small() {
    near_and_far(|| {
        const DELIVERIES: u64 = 24;
        let sim = Sim::new(1);
        let io = sim.io();
        sim.run(async move {
            let node = start(&io, ShardConfig::default()).await;
            let (sender, mut delivered) = tokio::sync::mpsc::unbounded_channel();
            for number in 0..DELIVERIES {
                let header = format!("Subject: {}\r\n\r\n", noise(number, 900_000));
                let (message, target) =
                    (prepare(&header, &[b'x'; 300_000]), node.target(TargetMailbox::Inbox, Vec::new()));
                let (shard, sender) = (node.shard.clone(), sender.clone());
                io.spawn(async move {
                    let _ = sender.send(shard.deliver(message, vec![target]).await.remove(0));
                });
            }
            for _ in 0..DELIVERIES {
                delivered.recv().await.unwrap().unwrap();
            }
        })
        .unwrap();
        let (file, _) = sim.files("shard-0000/wal/").into_iter().max().unwrap();
        let bytes = sim.contents(&file).unwrap();
        let name = parse_segment_file(file.rsplit_once('/').unwrap().1).unwrap();
        let mut position = Position { segment: name.segment, offset: 4096 };
        let mut largest = 0;
        while let Ok(batch) = BatchHeader::decode(&bytes[position.offset as usize..], position, name.epoch) {
            largest = largest.max(batch.total_bytes());
            position = end_of(&batch);
        }
        assert!((4 << 20..10 << 20).contains(&largest), "{largest}");
    });
}

#[test]
fn messages_with_a_flag_are_counted() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            for _ in 0..5 {
                node.deliver().await;
            }
            assert_eq!(shard.count_with(inbox, Flags::DELETED).await.unwrap(), 0);
            shard.store_flags(inbox, UidSet::range(2..=4), FlagOp::Add, vec![FlagName::Deleted], None).await.unwrap();
            assert_eq!(shard.count_with(inbox, Flags::DELETED).await.unwrap(), 3);
            shard.expunge(inbox, Some(UidSet::one(Uid(3)))).await.unwrap();
            assert_eq!(shard.count_with(inbox, Flags::DELETED).await.unwrap(), 2);
        });
    });
}

/// A header of three megabytes, before a body in blocks and before none, and one just larger than its frame.
#[test]
fn a_header_larger_than_its_frame_comes_back_whole() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            let lines = |octets| format!("{}\r\n\r\n", noise(1, octets).replace('0', "\r\nX: "));
            let just_larger = format!("{}\r\n\r\n", noise(2, 1 << 20));
            let cases = [
                (lines(3_000_000), vec![b'x'; 700_000]),
                (lines(3_000_000), b"body\r\n".to_vec()),
                (lines(3_000_000), Vec::new()),
                (just_larger.clone(), b"body\r\n".to_vec()),
                (just_larger, Vec::new()),
                ("Subject: s\r\n\r\n".to_owned(), vec![b'x'; 700_000]),
            ];
            for (header, body) in &cases {
                let target =
                    Target { prefix: b"Prefix: p\r\n".to_vec(), ..node.target(TargetMailbox::Inbox, Vec::new()) };
                shard.deliver(prepare(header, body), vec![target]).await.remove(0).unwrap();
            }
            for (found, (header, body)) in shard.messages(inbox, all()).await.unwrap().iter().zip(&cases) {
                let what = format!("a header of {} octets and a body of {}", header.len(), body.len());
                let message = &found.message;
                assert_eq!(message.size, (11 + header.len() + body.len()) as u64, "{what}");
                // Block records are 256 KB: a record holds no more than a frame of the header and a body's.
                assert!(message.location.len < 1_400_000, "{what}: {} bytes", message.location.len);
                let whole = shard.read_message(message, inbox, Part::Whole).await.unwrap();
                assert!((&whole.header[..], &whole.body[..]) == (header.as_bytes(), &body[..]), "{what}");
                let before = shard.stats().record_read_bytes;
                let head = shard.read_message(message, inbox, Part::Header).await.unwrap();
                assert!((&head.header[..], head.body.len()) == (header.as_bytes(), 0), "{what}");
                assert_eq!(&head.prefix[..], b"Prefix: p\r\n", "{what}");
                let read = shard.stats().record_read_bytes - before;
                assert!(read < header.len() as u64 * 2 + 300_000, "{what}: {read} bytes read");
                let digest = shard.read_message(message, inbox, Part::Digest).await.unwrap();
                assert_eq!(&digest.digest[..], b"digest", "{what}");
            }
        });
    });
}

#[test]
fn a_copy_that_no_batch_could_hold_is_refused() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let shard = &node.shard;
            let inbox = shard.inbox(node.account).await.unwrap();
            node.deliver().await;
            let everything = UidSet::range(1..=1_000_000);
            for _ in 0..19 {
                shard.copy(inbox, everything.clone(), inbox).await.unwrap();
            }
            let messages = 1 << 19;
            let is_refused = |result: Option<EngineError>| {
                let Some(EngineError::Refused(refusal)) = result else { return false };
                refusal == Refusal::TooManyMessages { messages, limit: 500_000 }
            };
            assert!(is_refused(shard.copy(inbox, everything.clone(), inbox).await.err()));
            assert!(is_refused(shard.move_messages(inbox, everything, inbox).await.err()));
            assert!(is_refused(shard.rename_mailbox(node.account, "INBOX", "Old").await.err()));
            assert_eq!(shard.status(inbox).unwrap().exists as u64, messages);
            let part = UidSet::range(1..=500_000);
            assert_eq!(shard.copy(inbox, part, inbox).await.unwrap().pairs.len(), 500_000);
        });
    });
}

#[test]
fn an_account_made_again_gets_no_uid_validity_twice_wherever_that_crashes() {
    near_and_far(|| {
        let mut without_inbox = 0;
        // It takes some six operations; what a crash leaves of them is for the seed to say.
        for seed in 0..80 {
            let crash_after = 1 + seed % 16;
            let sim = Sim::new(seed);
            let (io, machine) = (sim.io(), sim.clone());
            sim.run(async move {
                let workers = start_two(&io).await;
                let account = add_account(&workers[0]).await;
                let shard = workers[1].local(account.shard).unwrap();
                shard.create_mailbox(account.account, "Other", 0).await.unwrap();
                workers[0].delete_account(NAME_IN_SECOND_SHARD).await.unwrap();
                machine.crash_after(Some(crash_after));
                add_account(&workers[0]).await;
            });
            sim.crash_after(None);
            sim.crash_now();
            let io = sim.io();
            let had_inbox = sim.run(async move {
                let workers = start_two(&io).await;
                let account = workers[0].cluster().directory().find(NAME_IN_SECOND_SHARD)?;
                let shard = workers[1].local(account.shard).unwrap();
                let had_inbox = shard.mailbox(account.account, "INBOX").is_some();
                let inbox = shard.inbox(account.account).await.unwrap();
                let uid_validity = shard.status(inbox).unwrap().uid_validity;
                assert!(uid_validity > 2, "UIDVALIDITY {uid_validity} after a crash at operation {crash_after}");
                Some(had_inbox)
            });
            without_inbox += u32::from(had_inbox.unwrap() == Some(false));
        }
        assert!(without_inbox > 0, "no crash came between the account and its INBOX");
    });
}

#[test]
fn an_account_is_deleted_with_all_its_mail_or_not_at_all_wherever_that_crashes() {
    near_and_far(|| {
        let (mut lived, mut was_deleted) = (0, 0);
        // The first operations decide; what a crash keeps of them is chance.
        for (seed, crash_after) in (0..30).map(|seed| (seed, 1 + seed % 3)).chain((1..60).map(|after| (after, after))) {
            let sim = Sim::new(seed);
            let (io, machine) = (sim.io(), sim.clone());
            let id = Rc::new(Cell::new(AccountId(0)));
            let made = Rc::clone(&id);
            sim.run(async move {
                let workers = start_two(&io).await;
                let account = add_account(&workers[0]).await;
                made.set(account.account);
                let shard = workers[1].local(account.shard).unwrap();
                shard.create_mailbox(account.account, "Other", 0).await.unwrap();
                machine.crash_after(Some(crash_after));
                workers[0].delete_account(NAME_IN_SECOND_SHARD).await.unwrap();
            });
            sim.crash_after(None);
            sim.crash_now();
            let io = sim.io();
            let lives = sim.run(async move {
                let workers = start_two(&io).await;
                let shard = workers[1].local(ShardId(1)).unwrap();
                // What is left of a deleted account goes soon.
                io.sleep(Duration::from_secs(1)).await;
                let lives = workers[0].cluster().directory().find(NAME_IN_SECOND_SHARD).is_some();
                let mailboxes = shard.mailboxes(id.get()).len();
                assert_eq!(mailboxes, if lives { 2 } else { 0 }, "after a crash at operation {crash_after}");
                lives
            });
            *(if lives.unwrap() { &mut lived } else { &mut was_deleted }) += 1;
        }
        assert!(lived > 0 && was_deleted > 0, "{lived} lived, {was_deleted} were deleted");
    });
}

#[test]
fn an_account_that_there_was_no_room_to_delete_lives_on() {
    near_and_far(|| {
        let sim = Sim::new(1);
        let io = sim.io();
        let made = sim.run(async move {
            let workers = start_two(&io).await;
            let account = add_account(&workers[0]).await;
            for worker in &workers {
                worker.stop().await.unwrap();
            }
            account.account
        });
        let (io, machine, id) = (sim.io(), sim.clone(), made.unwrap());
        sim.run(async move {
            let workers = start_two(&io).await;
            let shard = workers[1].local(ShardId(1)).unwrap();
            // No log has a segment yet that could take a record.
            machine.set_faults(FaultRates { no_space: 1 << 16, ..FaultRates::default() });
            let full = workers[0].delete_account(NAME_IN_SECOND_SHARD).await;
            assert!(matches!(full, Err(EngineError::Full)), "{full:?}");
            machine.set_faults(FaultRates::default());
            assert!(workers[0].cluster().directory().find(NAME_IN_SECOND_SHARD).is_some());
            shard.create_mailbox(id, "Other", 0).await.unwrap();
            assert_eq!(shard.mailboxes(id).len(), 2);
            workers[0].delete_account(NAME_IN_SECOND_SHARD).await.unwrap();
            assert!(workers[0].cluster().directory().find(NAME_IN_SECOND_SHARD).is_none());
            assert_eq!(shard.mailboxes(id).len(), 0);
        })
        .unwrap();
    });
}

#[test]
fn a_late_deletion_leaves_an_account_alone_that_has_got_the_name_meanwhile() {
    near_and_far(|| {
        let sim = Sim::new(1);
        let io = sim.io();
        sim.run(async move {
            let workers = start_two(&io).await;
            add_account(&workers[0]).await;
            // The first step is another worker's.
            let mut late = pin!(workers[0].delete_account(NAME_IN_SECOND_SHARD));
            begin(late.as_mut());
            workers[0].delete_account(NAME_IN_SECOND_SHARD).await.unwrap();
            let again = add_account(&workers[0]).await;
            let refused = late.await;
            assert!(matches!(refused, Err(EngineError::Refused(Refusal::NoSuchAccount))), "{refused:?}");
            let living = workers[0].cluster().directory().find(NAME_IN_SECOND_SHARD).unwrap();
            assert_eq!(living.account, again.account);
        })
        .unwrap();
    });
}

#[test]
fn a_full_mailbox_takes_no_more_until_something_is_expunged() {
    near_and_far(|| {
        let shard = ShardConfig { mailbox_messages_max: 5, ..ShardConfig::default() };
        on_a_node_with(1, shard, async |node| {
            for _ in 0..5 {
                node.deliver().await;
            }
            let inbox = node.shard.inbox(node.account).await.unwrap();
            let full = |result: Result<(), EngineError>| {
                assert!(matches!(result, Err(EngineError::Refused(Refusal::MailboxFull(5)))), "{result:?}");
            };
            assert!(node.shard.is_inbox_full(node.account));
            full(node.append(TargetMailbox::Inbox, Vec::new()).await.map(drop));
            full(node.shard.copy(inbox, UidSet::range(1..=1), inbox).await.map(drop));
            let deleted = vec![FlagName::Deleted];
            node.shard.store_flags(inbox, UidSet::range(1..=1), FlagOp::Add, deleted, None).await.unwrap();
            node.shard.expunge(inbox, None).await.unwrap();
            assert!(!node.shard.is_inbox_full(node.account));
            node.deliver().await;
            full(node.shard.copy(inbox, UidSet::range(2..=2), inbox).await.map(drop));
        });
    });
}

/// A server asks whenever a recipient is named.
#[test]
fn asking_whether_a_mailbox_is_full_leaves_it_at_rest() {
    near_and_far(|| {
        let sim = Sim::new(1);
        let io = sim.io();
        sim.run(async move {
            let config = || ShardConfig { mailbox_messages_max: 2, ..ShardConfig::default() };
            for delivered in 1..=2 {
                let node = start(&io, config()).await;
                node.deliver().await;
                node.worker.stop().await.unwrap();
                let node = start(&io, config()).await;
                assert_eq!(node.shard.stats().mailboxes_in_use, 0);
                assert_eq!(node.shard.is_inbox_full(node.account), delivered == 2);
                assert_eq!(node.shard.stats().mailboxes_in_use, 0);
                node.worker.stop().await.unwrap();
            }
        })
        .unwrap();
    });
}

#[test]
fn subscriptions_have_a_limit() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            for number in 0..SUBSCRIPTIONS_MAX {
                node.shard.subscribe(node.account, &format!("list {number}"), true).await.unwrap();
            }
            let refused = node.shard.subscribe(node.account, "one more", true).await;
            assert!(matches!(refused, Err(EngineError::Refused(Refusal::TooManySubscriptions(_)))), "{refused:?}");
            // What is there can be repeated and removed.
            node.shard.subscribe(node.account, "list 7", true).await.unwrap();
            node.shard.subscribe(node.account, "list 7", false).await.unwrap();
            node.shard.subscribe(node.account, "one more", true).await.unwrap();
        });
    });
}

/// However mailboxes come about: by name, as levels above one, or by a change of name.
#[test]
fn mailboxes_have_a_limit() {
    near_and_far(|| {
        on_a_node(1, async |node| {
            let deep = |number: usize, levels: usize| {
                let names: Vec<String> = (0..levels).map(|level| format!("{number}.{level}")).collect();
                names.join("/")
            };
            // INBOX is one of them.
            let mut left = MAILBOXES_MAX - 1;
            let mut number = 0;
            while left > 0 {
                let levels = left.min(NAME_LEVELS_MAX);
                node.shard.create_mailbox(node.account, &deep(number, levels), 0).await.unwrap();
                (left, number) = (left - levels, number + 1);
            }
            let refused = |result: Result<(), EngineError>| {
                assert!(matches!(result, Err(EngineError::Refused(Refusal::TooManyMailboxes(_)))), "{result:?}");
            };
            refused(node.shard.create_mailbox(node.account, "one more", 0).await.map(drop));
            refused(node.shard.rename_mailbox(node.account, &deep(0, 3), "above/moved").await);
            refused(node.shard.rename_mailbox(node.account, "INBOX", "moved").await);
            // A new name alone is no new mailbox.
            node.shard.rename_mailbox(node.account, &deep(0, 3), "moved").await.unwrap();
        });
    });
}

/// What was taken although its client had to be told otherwise stays known: over crashes, checkpoints and stops, for its time.
#[test]
fn receipts_last_for_their_time() {
    const LASTING: Duration = Duration::from_secs(1800);
    let key = |content| ReceiptKey { content, recipient: 1 };
    near_and_far(|| {
        let sim = Sim::new(1);
        let life = |with: fn(Node, ReceiptKey, ReceiptKey, SimIo) -> Pin<Box<dyn Future<Output = ()>>>| {
            let io = sim.io();
            let _ = sim.run(async move {
                let node = start(&io, ShardConfig::default()).await;
                with(node, key(1), key(2), io).await;
            });
        };
        life(|node, lasting, short, io| {
            Box::pin(async move {
                assert!(!node.shard.has_receipts() && !node.shard.is_received(lasting));
                node.shard.remember_received(&[lasting], LASTING).await.unwrap();
                node.shard.remember_received(&[short], Duration::from_secs(60)).await.unwrap();
                assert!(node.shard.is_received(lasting) && node.shard.is_received(short));
                node.deliver().await;
                node.shard.checkpoint().await.unwrap();
                io.sleep(Duration::from_secs(61)).await;
                assert!(!node.shard.is_received(short));
            })
        });
        sim.crash_now();
        life(|node, lasting, short, _| {
            Box::pin(async move {
                assert!(node.shard.is_received(lasting) && !node.shard.is_received(short));
                node.shard.checkpoint().await.unwrap();
                node.shard.checkpoint().await.unwrap();
                node.worker.stop().await.unwrap();
            })
        });
        life(|node, lasting, _, _| {
            Box::pin(async move {
                assert!(node.shard.is_received(lasting));
                node.worker.stop().await.unwrap();
            })
        });
        sim.crash_now();
        life(|node, lasting, _, io| {
            Box::pin(async move {
                assert!(node.shard.is_received(lasting));
                io.sleep(LASTING).await;
                assert!(!node.shard.is_received(lasting));
                node.shard.checkpoint().await.unwrap();
                assert!(!node.shard.has_receipts(), "what has expired is forgotten");
                node.worker.stop().await.unwrap();
            })
        });
    });
}

/// A receipt that has served does not come back with the next checkpoint.
#[test]
fn receipts_that_have_served_are_forgotten() {
    let key = |content| ReceiptKey { content, recipient: 1 };
    let sim = Sim::new(1);
    let io = sim.io();
    let ran = sim.run(async move {
        let node = start(&io, ShardConfig::default()).await;
        node.shard.remember_received(&[key(1), key(2)], Duration::from_secs(1800)).await.unwrap();
        node.shard.forget_received(&[key(1), key(3)]);
        assert!(!node.shard.is_received(key(1)) && node.shard.is_received(key(2)));
        node.deliver().await;
        node.shard.checkpoint().await.unwrap();
        node.worker.stop().await.unwrap();
    });
    ran.expect("no crash is planned");
    let io = sim.io();
    sim.run(async move {
        let node = start(&io, ShardConfig::default()).await;
        assert!(!node.shard.is_received(key(1)) && node.shard.is_received(key(2)));
        node.worker.stop().await.unwrap();
    })
    .expect("no crash is planned");
}
