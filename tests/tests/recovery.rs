//! What recovery makes of particular damage and particular failures, each on a simulated disk.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, RecoveryReport};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::batch::{BatchBuilder, BatchHeader, Touch, records};
use posthaste_engine::format::frame::Packer;
use posthaste_engine::format::record::{RECORD_HEADER_BYTES, RecordHeader, kind};
use posthaste_engine::ids::{AccountId, Epoch, Lsn, MailboxId, Position, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{Aim, Fault, FaultRates, Operation, Sim, SimIo};
use posthaste_engine::mailboxes::Status;
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::shard::{Shard, ShardConfig, ShardEvent};
use posthaste_engine::storage::Storage;
use posthaste_engine::storage::faulty::{Faulty, Policy, SharedPolicy};
use posthaste_engine::storage::local::{Local, parse_segment_file};
use posthaste_tests::far::{Store, near_and_far, storage};
use posthaste_tests::simulation::check_everything;

const NAME: &str = "a@example.org";
const SHARD: ShardId = ShardId(0);

/// A node with one worker, one shard and one account.
struct Node<S: Storage = Store> {
    worker: Worker<S>,
    shard: Shard<S>,
    account: AccountId,
    report: RecoveryReport,
}

async fn start<S: Storage>(storage: S) -> Result<Node<S>, EngineError> {
    start_with(
        storage,
        ShardConfig { segment_size_bytes: 1 << 20, checkpoint_bytes: 1 << 30, ..ShardConfig::default() },
    )
    .await
}

async fn start_with<S: Storage>(storage: S, shard: ShardConfig) -> Result<Node<S>, EngineError> {
    let superblock = open_superblock(&storage, 1).await?;
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let (worker, mut reports) = Worker::open(storage, cluster, seats.remove(0), StoreConfig { shard }).await?;
    if worker.cluster().directory().is_empty() {
        worker.add_accounts(vec![NewAccount { name: NAME.to_owned(), password: String::new() }]).await?;
    }
    let account = worker.cluster().directory().find(NAME).expect("it exists now").account;
    let shard = worker.local(SHARD).expect("there is one worker");
    Ok(Node { worker, shard, account, report: reports.remove(0) })
}

async fn node(io: &SimIo) -> Node {
    start(storage(io)).await.unwrap()
}

fn message(number: u64) -> Arc<Prepared> {
    let header = format!("Subject: message {number}\r\n\r\n");
    let bytes = format!("{header}body {number}\r\n");
    Arc::new(Prepared::new(&mut Packer::default(), bytes.as_bytes(), header.len(), b"digest", 1))
}

impl<S: Storage> Node<S> {
    async fn try_deliver(&self, number: u64) -> Result<Uid, EngineError> {
        let mailbox = TargetMailbox::Inbox;
        let target =
            Target { account: self.account, mailbox, prefix: Vec::new(), flags: Vec::new(), internal_date: None };
        self.shard.deliver(message(number), vec![target]).await.remove(0).map(|delivered| delivered.uid)
    }

    async fn deliver(&self, number: u64) -> Uid {
        self.try_deliver(number).await.unwrap()
    }

    fn status(&self, name: &str) -> Status {
        let mailbox = self.shard.mailbox(self.account, name).unwrap();
        self.shard.status(mailbox).unwrap()
    }

    /// The bodies that can be read in a mailbox, by UID.
    async fn bodies(&self, mailbox: MailboxId) -> Vec<(u32, String)> {
        let mut bodies = Vec::new();
        for found in self.shard.messages(mailbox, UidSet::range(1..=20_000_000)).await.unwrap() {
            if let Ok(bytes) = self.shard.read_message(&found.message, mailbox, Part::Whole).await {
                bodies.push((found.message.uid.0, String::from_utf8(bytes.body.to_vec()).unwrap()));
            }
        }
        bodies
    }
}

/// The active segment's file.
fn active_segment(sim: &Sim) -> String {
    sim.files("shard-0000/wal/").into_iter().map(|(file, _)| file).max().unwrap()
}

/// The batches of a segment file.
fn batches(sim: &Sim, file: &str) -> Vec<BatchHeader> {
    let bytes = sim.contents(file).unwrap();
    let name = parse_segment_file(file.rsplit_once('/').unwrap().1).unwrap();
    let mut found = Vec::new();
    let mut offset = 4096;
    while let Some(rest) = bytes.get(offset as usize..) {
        let position = Position { segment: name.segment, offset };
        let Ok(batch) = BatchHeader::decode(rest, position, name.epoch) else { break };
        offset += batch.total_bytes();
        found.push(batch);
    }
    found
}

/// The records of a segment file: offset, header.
fn records_of(sim: &Sim, file: &str) -> Vec<(u64, RecordHeader)> {
    let bytes = sim.contents(file).unwrap();
    let mut found = Vec::new();
    for batch in batches(sim, file) {
        let first = batch.records_offset();
        for record in records(&batch, &bytes[first as usize..]) {
            let record = record.unwrap();
            found.push((first + u64::from(record.offset), record.header));
        }
    }
    found
}

/// Damages the last record of each kind in the active segment.
fn damage_last(sim: &Sim, kinds: &[u16]) {
    let file = active_segment(sim);
    let records = records_of(sim, &file);
    for &kind in kinds {
        let (offset, _) = records.iter().rfind(|(_, header)| header.kind == kind).unwrap();
        sim.damage(&file, |bytes| bytes[*offset as usize + RECORD_HEADER_BYTES] ^= 1);
    }
}

/// Runs `first` on a new machine until the log is idle.
fn machine<T: 'static>(seed: u64, first: impl AsyncFnOnce(Node) -> T + 'static) -> Sim {
    let sim = Sim::new(seed);
    let io = sim.io();
    sim.run(async move {
        let node = node(&io).await;
        first(node).await;
        io.sleep(Duration::from_secs(1)).await;
    });
    sim
}

/// Starts the node of a machine again.
fn again<T: 'static>(sim: &Sim, then: impl AsyncFnOnce(Node) -> T + 'static) -> T {
    let io = sim.io();
    sim.run(async move { then(node(&io).await).await }).expect("no crash is planned")
}

#[test]
fn batches_behind_a_damaged_segment_header_are_kept() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=5 {
                node.deliver(number).await;
            }
        });
        let file = active_segment(&sim);
        sim.damage(&file, |bytes| bytes[70] ^= 1);
        for _ in 0..2 {
            let (damage, bodies) = again(&sim, async |node: Node| {
                let inbox = node.shard.inbox(node.account).await.unwrap();
                (node.report.damage.clone(), node.bodies(inbox).await)
            });
            assert_eq!(bodies.len(), 5, "{damage:?}");
        }
    });
}

#[test]
fn half_a_move_never_counts_and_stops_no_checkpoint() {
    near_and_far(|| {
        for lost in [kind::PLACEMENTS, kind::EXPUNGE, kind::COMMIT] {
            let sim = machine(1, async |node: Node| {
                for number in 1..=5 {
                    node.deliver(number).await;
                }
                let inbox = node.shard.inbox(node.account).await.unwrap();
                let target = node.shard.create_mailbox(node.account, "Target", 0).await.unwrap();
                node.shard.move_messages(inbox, UidSet::range(1..=5), target).await.unwrap();
                node.deliver(6).await;
            });
            damage_last(&sim, &[lost]);
            again(&sim, async move |node: Node| {
                assert!(!node.report.damage.is_empty());
                // The messages are where they were, and the UIDs of the move are not given again.
                assert_eq!((node.status("INBOX").exists, node.status("Target").exists), (6, 0), "kind {lost}");
                assert_eq!(node.status("Target").uid_next, 6, "kind {lost}");
                node.deliver(7).await;
                node.shard.checkpoint().await.unwrap();
                assert_eq!(node.shard.stats().checkpoints, 1);
                node.worker.stop().await.unwrap();
            });
            again(&sim, async move |node: Node| {
                assert_eq!((node.report.batches, node.status("INBOX").exists), (0, 7), "kind {lost}");
                assert_eq!(node.status("Target").uid_next, 6);
            });
        }
    });
}

#[test]
fn what_damage_has_taken_is_not_given_again() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=5 {
                node.deliver(number).await;
            }
            let inbox = node.shard.inbox(node.account).await.unwrap();
            let seen = vec![FlagName::Seen];
            node.shard.store_flags(inbox, UidSet::range(1..=1), FlagOp::Add, seen, None).await.unwrap();
            assert_eq!((node.status("INBOX").uid_next, node.status("INBOX").highest_modseq), (6, 7));
        });
        damage_last(&sim, &[kind::MESSAGE, kind::FLAGS]);
        again(&sim, async |node: Node| {
            let status = node.status("INBOX");
            assert_eq!((status.exists, status.uid_next, status.highest_modseq), (4, 6, 7));
            assert_eq!(node.deliver(6).await, Uid(6));
            node.worker.stop().await.unwrap();
        });
        again(&sim, async |node: Node| assert_eq!(node.deliver(7).await, Uid(7)));
    });
}

#[test]
fn what_an_unreadable_batch_may_have_given_is_not_given_again() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=5 {
                node.deliver(number).await;
            }
        });
        let file = active_segment(&sim);
        let lost = batches(&sim, &file).into_iter().rfind(|batch| batch.record_count > 0).unwrap();
        sim.damage(&file, |bytes| bytes[lost.position.offset as usize..][..4096].fill(0xff));
        again(&sim, async |node: Node| {
            assert_eq!(node.report.damage.len(), 1, "{:?}", node.report.damage);
            let status = node.status("INBOX");
            assert_eq!(status.exists, 4);
            assert!(status.uid_next > 5 && status.highest_modseq > 5, "{status:?}");
            node.shard.create_mailbox(node.account, "Other", 0).await.unwrap();
            assert!(node.status("Other").uid_validity > status.uid_validity + 1);
        });
    });
}

#[test]
fn messages_of_a_mailbox_whose_creation_is_lost_stay_within_reach() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=5 {
                node.deliver(number).await;
            }
        });
        damage_last(&sim, &[kind::MAILBOX]);
        let names = |node: &Node| -> Vec<String> {
            node.shard.mailboxes(node.account).into_iter().map(|mailbox| mailbox.name).collect()
        };
        for _ in 0..2 {
            again(&sim, async move |node: Node| {
                let names = names(&node);
                let recovered = names.iter().find(|name| name.starts_with("Recovered ")).expect("a mailbox for them");
                let mailbox = node.shard.mailbox(node.account, recovered).unwrap();
                assert_eq!(node.bodies(mailbox).await.len(), 5);
                assert!(node.deliver(6).await > Uid(0));
                assert_ne!(node.status("INBOX").uid_validity, node.status(recovered).uid_validity);
                node.worker.stop().await.unwrap();
            });
        }
    });
}

#[test]
fn a_record_of_a_newer_program_keeps_the_store_closed_and_as_it_is() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| node.deliver(1).await);
        let file = active_segment(&sim);
        let name = parse_segment_file(file.rsplit_once('/').unwrap().1).unwrap();
        let last = batches(&sim, &file).pop().unwrap();
        let newest = records_of(&sim, &file).pop().unwrap().1.lsn;
        let offset = last.position.offset + last.total_bytes();
        sim.damage(&file, |bytes| {
            let mut batch = BatchBuilder::default();
            let lsn = Lsn(newest.0 + 1);
            let header = RecordHeader { kind: 99, flags: 0, generation: 0, lsn, transaction: 0 };
            batch.push(header, |out| out.extend_from_slice(b"from a newer program"));
            let position = Position { segment: name.segment, offset };
            let batch = batch.finish(last.sequence + 1, name.epoch, position, position);
            bytes[offset as usize..][..batch.len()].copy_from_slice(&batch);
        });
        let before = sim.contents(&file);
        let io = sim.io();
        let error = sim.run(async move { start(storage(&io)).await.map(|_| ()) }).unwrap().unwrap_err();
        let text = error.to_string();
        assert!(text.contains("record kind 99") && text.contains("newer program") && text.contains(&file), "{text}");
        assert_eq!(sim.contents(&file), before);
    });
}

#[test]
fn what_a_failed_sync_left_in_the_page_cache_survives_a_later_power_loss() {
    near_and_far(|| {
        for seed in 0..30 {
            let sim = Sim::new(seed);
            let (io, faults) = (sim.io(), sim.clone());
            sim.run(async move {
                let node = node(&io).await;
                node.deliver(1).await;
                faults.set_faults(FaultRates { sync_errors: 65_536, ..FaultRates::default() });
                node.try_deliver(2).await.unwrap_err();
            });
            sim.set_faults(FaultRates::default());
            // The process is started again; the machine is not, and its power fails only later.
            let shown = again(&sim, async |node: Node| node.status("INBOX"));
            sim.crash_now();
            again(&sim, async move |node: Node| {
                let status = node.status("INBOX");
                assert_eq!((status.exists, status.uid_next), (shown.exists, shown.uid_next), "seed {seed}");
                assert_eq!(node.report.damage, [], "seed {seed}");
                let inbox = node.shard.inbox(node.account).await.unwrap();
                assert_eq!(node.bodies(inbox).await.len() as u32, shown.exists, "seed {seed}");
            });
        }
    });
}

#[test]
fn a_segment_that_is_gone_costs_its_own_messages_only() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            node.deliver(1).await;
            node.worker.stop().await.unwrap();
        });
        again(&sim, async |node: Node| {
            node.deliver(2).await;
            node.worker.stop().await.unwrap();
        });
        let oldest = sim.files("shard-0000/seg/").remove(0).0;
        sim.remove_file(&oldest);
        assert!(check_everything(&sim).is_err(), "the check misses a whole segment");
        again(&sim, async |node: Node| {
            let inbox = node.shard.inbox(node.account).await.unwrap();
            assert_eq!(node.status("INBOX").exists, 2);
            assert_eq!(node.bodies(inbox).await, [(2, "body 2\r\n".to_owned())]);
            assert_eq!(node.deliver(3).await, Uid(3));
        });
    });
}

#[test]
fn a_mailbox_whose_pages_are_damaged_is_rebuilt_from_the_log() {
    near_and_far(|| {
        for file_gone in [false, true] {
            let sim = machine(1, async |node: Node| {
                for number in 1..=5 {
                    node.deliver(number).await;
                }
                let inbox = node.shard.inbox(node.account).await.unwrap();
                let target = node.shard.create_mailbox(node.account, "Target", 0).await.unwrap();
                let keyword = vec![FlagName::Keyword("$Work".to_owned()), FlagName::Seen];
                node.shard.store_flags(inbox, UidSet::range(1..=3), FlagOp::Add, keyword, None).await.unwrap();
                node.shard.move_messages(inbox, UidSet::range(2..=2), target).await.unwrap();
                node.worker.stop().await.unwrap();
            });
            let look = async |node: &Node, name: &str| {
                let mailbox = node.shard.mailbox(node.account, name).unwrap();
                let messages = node.shard.messages(mailbox, UidSet::range(1..=1000)).await.unwrap();
                (messages, node.shard.keywords(mailbox).await.unwrap(), node.bodies(mailbox).await)
            };
            let before = again(&sim, async move |node: Node| {
                let before = (look(&node, "INBOX").await, look(&node, "Target").await);
                node.worker.stop().await.unwrap();
                before
            });
            // The start above was a clean one: both pages are in the first blob still.
            let index = sim.files("shard-0000/idx/").remove(0).0;
            if file_gone {
                sim.remove_file(&index);
            } else {
                sim.damage(&index, |bytes| bytes[60] ^= 1);
            }
            again(&sim, async move |node: Node| {
                assert_eq!(node.deliver(6).await, Uid(6));
                let inbox = look(&node, "INBOX").await;
                assert_eq!(inbox.0[..4], before.0.0);
                assert_eq!(inbox.1, before.0.1);
                assert_eq!(inbox.2.len(), 5);
                assert_eq!(look(&node, "Target").await, before.1);
                let rebuilt = node.shard.stats().indexes_rebuilt;
                if file_gone {
                    // The directory was in it, so the start has rebuilt all of the index.
                    assert_eq!((rebuilt, node.report.damage.len()), (0, 1));
                } else {
                    assert_eq!((rebuilt, node.report.damage.len()), (1, 0));
                    assert!(matches!(node.shard.next_event().await, ShardEvent::IndexRebuilt(..)));
                }
                node.shard.checkpoint().await.unwrap();
                assert_eq!(node.shard.stats().checkpoints, 1);
                node.worker.stop().await.unwrap();
            });
            check_everything(&sim).unwrap_or_else(|found| panic!("{}", found.0));
            again(&sim, async move |node: Node| {
                look(&node, "INBOX").await;
                assert_eq!(node.shard.stats().indexes_rebuilt, 0, "the checkpoint has written it anew");
            });
        }
    });
}

#[test]
fn a_checkpoint_goes_on_over_a_damaged_delta_page() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=300 {
                node.deliver(number).await;
            }
            node.shard.checkpoint().await.unwrap();
            node.deliver(301).await;
            node.worker.stop().await.unwrap();
        });
        let delta = sim.files("shard-0000/idx/").pop().unwrap().0;
        sim.damage(&delta, |bytes| bytes[60] ^= 1);
        again(&sim, async |node: Node| {
            assert_eq!(node.deliver(302).await, Uid(302));
            node.shard.checkpoint().await.unwrap();
            assert_eq!(node.shard.stats().indexes_rebuilt, 1);
            let inbox = node.shard.inbox(node.account).await.unwrap();
            assert_eq!(node.bodies(inbox).await.len(), 302);
            node.worker.stop().await.unwrap();
        });
        check_everything(&sim).unwrap_or_else(|found| panic!("{}", found.0));
    });
}

#[test]
fn a_checkpoint_after_an_idle_mark_leaves_no_hole() {
    near_and_far(|| {
        for seed in 0..20 {
            let sim = machine(seed, async |node: Node| node.deliver(1).await);
            again(&sim, async |node: Node| node.deliver(2).await);
            let io = sim.io();
            sim.run(async move {
                let node = node(&io).await;
                node.deliver(3).await;
                io.sleep(Duration::from_millis(500)).await;
                node.shard.checkpoint().await.unwrap();
            });
            sim.crash_now();
            again(&sim, async |_: Node| ());
            check_everything(&sim).unwrap_or_else(|violation| panic!("seed {seed}: {}", violation.0));
        }
    });
}

#[test]
fn a_crash_at_any_point_of_a_stop_is_no_damage() {
    near_and_far(|| {
        for seed in 0..5 {
            for operations in 1..40 {
                let sim = Sim::new(seed);
                let (io, crash) = (sim.io(), sim.clone());
                let stopped = sim.run(async move {
                    let node = node(&io).await;
                    node.deliver(1).await;
                    io.sleep(Duration::from_secs(1)).await;
                    crash.crash_after(Some(operations));
                    node.worker.stop().await.unwrap();
                });
                again(&sim, async move |node: Node| {
                    assert_eq!(node.report.damage, [], "seed {seed}, crash at {operations}");
                    assert_eq!(node.status("INBOX").exists, 1);
                    node.worker.stop().await.unwrap();
                });
                check_everything(&sim)
                    .unwrap_or_else(|found| panic!("seed {seed}, crash at {operations}: {}", found.0));
                if stopped.is_some() {
                    break;
                }
            }
        }
    });
}

#[test]
fn one_client_without_pause_leaves_no_idle_marks() {
    near_and_far(|| {
        let sim = machine(9, async |node: Node| {
            for number in 0..50 {
                node.deliver(number).await;
            }
        });
        let empty = batches(&sim, &active_segment(&sim)).iter().filter(|batch| batch.record_count == 0).count();
        assert_eq!(empty, 1, "only the last pause was one");
    });
}

#[test]
fn a_start_reads_no_more_of_the_log_than_it_replays() {
    near_and_far(|| {
        let sim = machine(11, async |node: Node| {
            for round in 0..12 {
                for number in 0..=round {
                    node.deliver(round * 100 + number).await;
                }
                node.shard.checkpoint().await.unwrap();
            }
            for number in 0..5 {
                node.deliver(9000 + number).await;
            }
        });
        again(&sim, async |node: Node| {
            assert_eq!((node.report.unlisted_records, node.report.records), (0, 5));
            assert_eq!(node.bodies(node.shard.mailbox(node.account, "INBOX").unwrap()).await.len(), 78 + 5);
            node.worker.stop().await.unwrap();
        });
        check_everything(&sim).unwrap_or_else(|found| panic!("{}", found.0));
    });
}

#[test]
fn a_checkpoint_after_a_failed_seal_does_not_say_that_there_are_no_records() {
    near_and_far(|| {
        let sim = Sim::new(12);
        let (io, device) = (sim.io(), sim.clone());
        let struck = sim.run(async move {
            let node = node(&io).await;
            for number in 0..5 {
                node.deliver(number).await;
            }
            let aim = Aim {
                operation: Operation::Rename,
                files: "seg/0".to_owned(),
                spared: 0,
                struck_max: 1,
                fault: Fault::Error,
            };
            device.aim(Some(aim));
            node.worker.stop().await.unwrap_err();
            let struck = device.struck();
            device.aim(None);
            node.shard.checkpoint().await.unwrap();
            struck
        });
        assert_eq!(struck, Some(1), "the seal failed");
        again(&sim, async |node: Node| {
            assert_eq!(node.bodies(node.shard.mailbox(node.account, "INBOX").unwrap()).await.len(), 5);
            node.worker.stop().await.unwrap();
        });
        check_everything(&sim).unwrap_or_else(|found| panic!("{}", found.0));
    });
}

#[test]
fn a_segment_that_cannot_be_sealed_for_want_of_space_is_not_forgotten() {
    near_and_far(|| {
        let sim = Sim::new(13);
        let (io, device) = (sim.io(), sim.clone());
        let acknowledged = sim.run(async move {
            let node = start_with(storage(&io), small_segments()).await.unwrap();
            for number in 0..20 {
                node.deliver(number).await;
            }
            let aim = |operation, files: &str| {
                let (files, fault) = (files.to_owned(), Fault::NoSpace);
                Aim { operation, files, spared: 0, struck_max: u32::MAX, fault }
            };
            // On a file system that copies on write even giving up the reserve may need space.
            device.aim_all(vec![aim(Operation::Rename, "seg/0"), aim(Operation::Remove, "reserve")]);
            let mut acknowledged = 20;
            while node.try_deliver(acknowledged).await.is_ok() {
                acknowledged += 1;
                assert!(acknowledged < 1000, "the segment is never full");
            }
            assert!(device.struck() >= 2, "the seal and the reserve have failed");
            device.aim(None);
            io.sleep(Duration::from_secs(2)).await;
            for _ in 0..50 {
                node.deliver(acknowledged).await;
                acknowledged += 1;
            }
            node.worker.stop().await.unwrap();
            acknowledged
        });
        let acknowledged = acknowledged.expect("no crash is planned");
        again(&sim, async move |node: Node| {
            let bodies = node.bodies(node.shard.mailbox(node.account, "INBOX").unwrap()).await;
            assert_eq!(bodies.len() as u64, acknowledged);
            node.worker.stop().await.unwrap();
        });
        check_everything(&sim).unwrap_or_else(|found| panic!("{}", found.0));
    });
}

#[test]
fn a_poisoned_log_acknowledges_nothing() {
    near_and_far(|| {
        for seed in 0..60 {
            let sim = Sim::new(seed);
            let io = sim.io();
            sim.run(async move {
                let policy = SharedPolicy::default();
                let node = Rc::new(start(Faulty::new(Local::new(io.clone()), policy.clone())).await.unwrap());
                node.deliver(1).await;
                policy.set(Policy {
                    delay_max: Duration::from_millis(5),
                    ambiguous_appends: 8000,
                    failed_appends: 2000,
                    ..Policy::default()
                });
                let running = Rc::new(Cell::new(3));
                for client in 0..3_u64 {
                    let (node, io, running) = (Rc::clone(&node), io.clone(), Rc::clone(&running));
                    io.clone().spawn(async move {
                        for number in 0..30 {
                            io.sleep(Duration::from_millis(io.random() % 20)).await;
                            let was_poisoned = node.shard.poisoned().is_some();
                            let result = node.try_deliver(10 + number * 3 + client).await;
                            assert!(!(was_poisoned && result.is_ok()), "seed {seed}");
                        }
                        running.set(running.get() - 1);
                    });
                }
                while running.get() > 0 {
                    io.sleep(Duration::from_millis(10)).await;
                }
            });
        }
    });
}

#[test]
fn whoever_waits_for_somebody_elses_change_is_answered_at_a_stop() {
    near_and_far(|| {
        for seed in 0..100 {
            let sim = Sim::new(seed);
            let io = sim.io();
            sim.run(async move {
                let node = node(&io).await;
                node.deliver(1).await;
                let inbox = node.shard.inbox(node.account).await.unwrap();
                let answered = Rc::new(Cell::new(0));
                for _ in 0..2 {
                    let (shard, answered) = (node.shard.clone(), Rc::clone(&answered));
                    io.spawn(async move {
                        let seen = vec![FlagName::Seen];
                        let _ = shard.store_flags(inbox, UidSet::range(1..=1), FlagOp::Add, seen, None).await;
                        answered.set(answered.get() + 1);
                    });
                    io.sleep(Duration::from_micros(30)).await;
                }
                let _ = node.worker.stop().await;
                io.sleep(Duration::from_secs(60)).await;
                assert_eq!(answered.get(), 2, "seed {seed}");
            });
        }
    });
}

/// Delivers until the store is full.
async fn fill(node: &Node) -> u64 {
    for number in 1.. {
        match node.try_deliver(number).await {
            Ok(_) => {}
            Err(EngineError::Full) => return number - 1,
            Err(error) => panic!("delivery {number}: {error}"),
        }
    }
    unreachable!("the device is not endless")
}

fn small_segments() -> ShardConfig {
    ShardConfig {
        segment_size_bytes: 128 << 10,
        checkpoint_bytes: 256 << 10,
        reserve_bytes: 256 << 10,
        ..ShardConfig::default()
    }
}

#[test]
fn a_full_device_refuses_mail_and_lets_clients_expunge() {
    near_and_far(|| {
        // Wherever exactly the space ends.
        for slack in 0..12_u64 {
            let sim = Sim::new(slack);
            sim.set_capacity(Some((2 << 20) + slack * 28_672));
            let (io, device) = (sim.io(), sim.clone());
            sim.run(async move {
                let node = start_with(storage(&io), small_segments()).await.unwrap();
                let delivered = fill(&node).await;
                assert!(matches!(node.shard.next_event().await, ShardEvent::SpaceLow), "slack {slack}");
                let inbox = node.shard.inbox(node.account).await.unwrap();
                let deleted = vec![FlagName::Deleted];
                for uid in 1..=20 {
                    let uids = UidSet::range(uid..=uid);
                    node.shard.store_flags(inbox, uids, FlagOp::Add, deleted.clone(), None).await.unwrap();
                    node.shard.expunge(inbox, None).await.unwrap();
                }
                node.shard.checkpoint().await.unwrap();
                assert_eq!(u64::from(node.status("INBOX").exists), delivered - 20);
                assert!(node.shard.poisoned().is_none());
                // Space returns.
                device.set_capacity(Some(8 << 20));
                io.sleep(Duration::from_secs(2)).await;
                assert!(node.deliver(5000).await > Uid(delivered as u32));
            });
        }
    });
}

#[test]
fn a_store_on_a_full_device_opens_again_after_a_crash() {
    near_and_far(|| {
        for slack in 0..12_u64 {
            let sim = Sim::new(100 + slack);
            sim.set_capacity(Some((2 << 20) + slack * 28_672));
            let io = sim.io();
            // Full to the last byte behind the store's back, or because of the store.
            let others = slack % 2 == 0;
            let delivered = sim.run(async move {
                let node = start_with(storage(&io), small_segments()).await.unwrap();
                if !others {
                    return fill(&node).await;
                }
                for number in 1..=20 {
                    node.deliver(number).await;
                }
                20
            });
            let mut delivered = delivered.unwrap();
            sim.crash_now();
            if others {
                sim.set_capacity(Some(sim.used_bytes()));
            }
            for _ in 0..3 {
                let io = sim.io();
                let more = sim.run(async move {
                    let node = start_with(storage(&io), small_segments()).await.unwrap();
                    assert_eq!(u64::from(node.status("INBOX").exists), delivered, "slack {slack}");
                    let more = fill(&node).await;
                    let inbox = node.shard.inbox(node.account).await.unwrap();
                    let seen = vec![FlagName::Seen];
                    node.shard.store_flags(inbox, UidSet::range(1..=5), FlagOp::Add, seen, None).await.unwrap();
                    more
                });
                delivered += more.unwrap();
                sim.crash_now();
            }
            sim.set_capacity(None);
            check_everything(&sim).unwrap_or_else(|found| panic!("slack {slack}: {}", found.0));
        }
    });
}

#[test]
fn what_nobody_refers_to_is_removed_at_a_start() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            node.deliver(1).await;
            node.worker.stop().await.unwrap();
        });
        let orphan = "shard-0000/idx/0000000999-00000001";
        for file in [orphan, "shard-0000/idx/0000000998-00000001.tmp", "shard-0000/manifest/half.tmp"] {
            sim.put_file(file, vec![7; 10_000]);
        }
        again(&sim, async |node: Node| assert_eq!(node.deliver(2).await, Uid(2)));
        let left: Vec<String> = sim.files("shard-0000/").into_iter().map(|(file, _)| file).collect();
        assert!(!left.iter().any(|file| file == orphan || file.ends_with(".tmp")), "{left:?}");
    });
}

#[test]
fn a_segment_that_is_gone_gives_no_number_again() {
    near_and_far(|| {
        for sealed in [false, true] {
            let sim = machine(1, async |node: Node| {
                node.deliver(1).await;
                node.shard.checkpoint().await.unwrap();
                assert_eq!(node.deliver(2).await, Uid(2));
            });
            let gone = if sealed {
                // The start seals it, and its replay begins in the middle of it the next time.
                again(&sim, async |_: Node| ());
                sim.files("shard-0000/seg/").remove(0).0
            } else {
                active_segment(&sim)
            };
            sim.remove_file(&gone);
            assert!(check_everything(&sim).is_err());
            again(&sim, async move |node: Node| {
                assert!(!node.report.damage.is_empty(), "sealed {sealed}");
                assert!(node.deliver(3).await > Uid(2), "sealed {sealed}");
                node.worker.stop().await.unwrap();
            });
            again(&sim, async move |node: Node| assert!(node.deliver(4).await > Uid(3)));
        }
    });
}

#[test]
fn a_mailbox_whose_renaming_is_lost_keeps_a_name() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            let work = node.shard.create_mailbox(node.account, "Work", 0).await.unwrap();
            node.deliver(1).await;
            let inbox = node.shard.inbox(node.account).await.unwrap();
            node.shard.move_messages(inbox, UidSet::range(1..=1), work).await.unwrap();
            node.shard.rename_mailbox(node.account, "Work", "Old").await.unwrap();
            node.shard.create_mailbox(node.account, "Work", 0).await.unwrap();
        });
        let file = active_segment(&sim);
        let records = records_of(&sim, &file);
        let (offset, _) = records.iter().rev().filter(|(_, header)| header.kind == kind::MAILBOX).nth(1).unwrap();
        sim.damage(&file, |bytes| bytes[*offset as usize + RECORD_HEADER_BYTES] ^= 1);
        for _ in 0..2 {
            again(&sim, async |node: Node| {
                let mailboxes = node.shard.mailboxes(node.account);
                let old = mailboxes.iter().find(|mailbox| mailbox.name.starts_with("Recovered ")).unwrap();
                assert_eq!((old.status.exists, node.status("Work").exists), (1, 0));
                assert_eq!(node.bodies(old.mailbox).await.len(), 1);
                node.worker.stop().await.unwrap();
            });
        }
    });
}

#[test]
fn mail_that_looks_like_a_touch_table_says_nothing() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            for number in 1..=5 {
                node.deliver(number).await;
            }
        });
        let file = active_segment(&sim);
        let lost = batches(&sim, &file).into_iter().rfind(|batch| batch.record_count > 0).unwrap();
        let records = records_of(&sim, &file);
        let newest = records.last().unwrap().1.lsn;
        let mut forged = BatchBuilder::default();
        let inbox = MailboxId(records.iter().find(|(_, header)| header.kind == kind::MAILBOX).unwrap().1.lsn.0);
        let lsn = Lsn(newest.0 + 1_000_000);
        forged.touch(Touch { mailbox: inbox, first: 1, last: u32::MAX, lsn, kind: kind::MESSAGE });
        let forged = forged.finish(1, Epoch(1), lost.position, lost.position);
        sim.damage(&file, |bytes| {
            let block = &mut bytes[lost.position.offset as usize..][..4096];
            block.copy_from_slice(&forged[..4096]);
            block[..8].fill(0xff);
        });
        again(&sim, async |node: Node| {
            assert!(!node.report.damage.is_empty());
            let first = node.deliver(6).await;
            assert!(first > Uid(4));
            assert_eq!(node.deliver(7).await, Uid(first.0 + 1));
            node.worker.stop().await.unwrap();
        });
        again(&sim, async |node: Node| {
            let inbox = node.shard.inbox(node.account).await.unwrap();
            let before = node.bodies(inbox).await;
            assert_eq!(before.len(), 6);
            let next = node.deliver(8).await;
            assert!(before.iter().all(|(uid, _)| *uid < next.0), "{next}");
        });
    });
}

#[test]
fn without_a_reserve_a_full_device_takes_mail_again_when_there_is_space() {
    near_and_far(|| {
        let sim = Sim::new(1);
        sim.set_capacity(Some(1 << 20));
        let (io, device) = (sim.io(), sim.clone());
        sim.run(async move {
            let config = ShardConfig { reserve_bytes: 0, ..small_segments() };
            let node = start_with(storage(&io), config).await.unwrap();
            fill(&node).await;
            device.set_capacity(Some(4 << 20));
            node.deliver(5000).await;
        });
    });
}

#[test]
fn a_nearly_full_device_is_used_up_before_the_reserve() {
    near_and_far(|| {
        let sim = Sim::new(1);
        let io = sim.io();
        let device = sim.clone();
        sim.run(async move {
            let node = start_with(storage(&io), small_segments()).await.unwrap();
            node.deliver(1).await;
            // There is space for a small segment, and not for a whole one.
            device.set_capacity(Some(device.used_bytes() + (96 << 10)));
            let fitted = fill(&node).await;
            assert!(matches!(node.shard.next_event().await, ShardEvent::SpaceLow));
            assert!(fitted > 40, "only {fitted} messages fitted");
            // The reserve goes on being there until there is more space than it takes.
            io.sleep(Duration::from_secs(2)).await;
            assert!(matches!(node.try_deliver(9000).await, Err(EngineError::Full)));
        });
    });
}

#[test]
fn a_start_without_space_for_the_reserve_says_so() {
    near_and_far(|| {
        let sim = machine(1, async |node: Node| {
            node.deliver(1).await;
            node.worker.stop().await.unwrap();
        });
        sim.set_capacity(Some(sim.used_bytes() + (64 << 10)));
        let io = sim.io();
        sim.run(async move {
            let node = start_with(storage(&io), small_segments()).await.unwrap();
            assert!(matches!(node.shard.next_event().await, ShardEvent::SpaceLow));
            assert!(matches!(node.try_deliver(2).await, Err(EngineError::Full)));
        });
    });
}
