//! The scrub beside everything else: it keeps to its budget, finds nothing where nothing is, and mends what it can.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MailboxId, ShardId};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{FaultRates, Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::scrub::PORTION_BYTES;
use posthaste_engine::shard::{Shard, ShardConfig, ShardEvent};
use posthaste_engine::storage::local::Local;

type Store = Local<SimIo>;

async fn start(io: &SimIo, config: ShardConfig) -> (Worker<Store>, Shard<Store>, AccountId, MailboxId) {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let worker = Worker::open(storage, cluster, seats.remove(0), StoreConfig { shard: config }).await.unwrap().0;
    let shard = worker.local(ShardId(0)).unwrap();
    let account = NewAccount { name: "a@example.org".to_owned(), password: String::new() };
    let account = match worker.add_accounts(vec![account]).await.unwrap().remove(0) {
        Ok(account) => account.account,
        Err(_) => worker.cluster().directory().find("a@example.org").unwrap().account,
    };
    let inbox = shard.inbox(account).await.unwrap();
    (worker, shard, account, inbox)
}

fn config() -> ShardConfig {
    ShardConfig { segment_size_bytes: 1 << 20, message_cache_bytes: 0, ..ShardConfig::default() }
}

/// Bytes that do not compress.
fn noise(number: u64, octets: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8 | 0x80
    };
    (0..octets).map(next).collect()
}

async fn deliver(shard: &Shard<Store>, account: AccountId, number: u64, octets: usize) {
    let header = format!("Subject: message {number}\r\n\r\n");
    let message = [header.as_bytes(), &noise(number, octets)].concat();
    let prepared = Prepared::new(&mut Packer::default(), &message, header.len(), &number.to_le_bytes(), 1);
    let (prefix, mailbox) = (Vec::new(), TargetMailbox::Inbox);
    let target = Target { account, mailbox, prefix, flags: Vec::new(), internal_date: None };
    shard.deliver(Arc::new(prepared), vec![target]).await.remove(0).unwrap();
}

#[test]
fn it_keeps_to_its_budget() {
    let sim = Sim::new(1);
    let io = sim.io();
    sim.run(async move {
        const BYTES_PER_S: u64 = 400_000;
        let (worker, shard, account, _) = start(&io, config()).await;
        for number in 0..120 {
            // Some of them lie in blocks.
            deliver(&shard, account, number, if number % 20 == 3 { 700_000 } else { 30_000 }).await;
        }
        shard.checkpoint().await.unwrap();
        let (begun, done) = (io.now(), Rc::new(Cell::new(false)));
        let (watched, is_done, clock) = (shard.clone(), Rc::clone(&done), io.clone());
        io.spawn(async move {
            let mut before = (clock.now(), watched.stats().scrub_bytes);
            while !is_done.get() {
                clock.sleep(Duration::from_millis(250)).await;
                let now = (clock.now(), watched.stats().scrub_bytes);
                let allowed = ((now.0 - before.0).as_secs_f64() * BYTES_PER_S as f64) as u64 + 2 * PORTION_BYTES as u64;
                assert!(now.1 - before.1 <= allowed, "{} octets where {allowed} were allowed", now.1 - before.1);
                before = now;
            }
        });
        let report = shard.scrub(BYTES_PER_S).await.unwrap();
        done.set(true);
        let took = (io.now() - begun).as_secs_f64();
        let least = report.bytes as f64 / BYTES_PER_S as f64;
        assert!(report.bytes > 5_000_000 && report.segments > 5 && report.pages > 0, "{report:?}");
        assert!(took >= least, "{} octets in {took} s", report.bytes);
        // The rest is what the disk takes: a budget is there to be used.
        assert!(took < least * 1.2, "{} octets took {took} s", report.bytes);
        assert_eq!((report.findings, shard.stats().scrub_passes), (0, 1));
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn it_begins_by_itself_and_again() {
    let sim = Sim::new(2);
    let io = sim.io();
    sim.run(async move {
        let interval = Duration::from_secs(600);
        let config = ShardConfig { scrub_bytes_per_s: 1 << 20, scrub_interval: interval, ..config() };
        let (worker, shard, account, _) = start(&io, config).await;
        deliver(&shard, account, 1, 10_000).await;
        let opened = io.now();
        for pass in 1..=3 {
            while !matches!(shard.next_event().await, ShardEvent::Scrubbed(_)) {}
            assert_eq!(shard.stats().scrub_passes, pass);
            let since = io.now() - opened;
            let earliest = Duration::from_secs(50) + interval * (pass as u32 - 1);
            assert!((earliest..earliest + Duration::from_secs(60)).contains(&since), "pass {pass} after {since:?}");
        }
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn segments_that_go_meanwhile_are_no_damage() {
    let sim = Sim::new(3);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start(&io, config()).await;
        for number in 0..120 {
            deliver(&shard, account, number, if number % 20 == 3 { 700_000 } else { 30_000 }).await;
        }
        let scrubbing = shard.clone();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        io.spawn(async move {
            let _ = sender.send(scrubbing.scrub(1 << 20).await);
        });
        // While it is at it, all that it wanted to look at is written anew, more than once.
        for round in 0..3_u64 {
            io.sleep(Duration::from_millis(700)).await;
            let first = 1 + 20 * round as u32;
            shard.expunge_messages(inbox, UidSet::range(first..=first + 10)).await.unwrap();
            shard.compact(Choice::All).await.unwrap();
            deliver(&shard, account, 200 + round, 30_000).await;
        }
        let report = receiver.await.unwrap().unwrap();
        assert_eq!((report.findings, shard.scrub_status().findings.len()), (0, 0));
        // What was held for it is gone now.
        io.sleep(Duration::from_secs(1)).await;
        let files = disk.files("shard-0000/seg").len();
        shard.compact(Choice::All).await.unwrap();
        assert!(disk.files("shard-0000/seg").len() <= files);
        let again = shard.scrub(0).await.unwrap();
        assert_eq!(again.findings, 0);
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_pass_that_is_asked_for_takes_the_turn_of_a_slow_one() {
    let sim = Sim::new(4);
    let io = sim.io();
    sim.run(async move {
        let (worker, shard, account, _) = start(&io, config()).await;
        for number in 0..60 {
            deliver(&shard, account, number, 30_000).await;
        }
        let slow = shard.clone();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        io.spawn(async move {
            let _ = sender.send(slow.scrub(1000).await);
        });
        io.sleep(Duration::from_secs(1)).await;
        assert!(shard.scrub_status().is_running);
        let begun = io.now();
        shard.scrub(0).await.unwrap();
        assert!(io.now() - begun < Duration::from_secs(5));
        assert!(matches!(receiver.await.unwrap(), Err(EngineError::Stopping(_))));
        assert_eq!(shard.stats().scrub_passes, 1);
        // A stop does not wait for one either.
        let slow = shard.clone();
        io.spawn(async move {
            let _ = slow.scrub(1000).await;
        });
        io.sleep(Duration::from_secs(1)).await;
        let begun = io.now();
        worker.stop().await.unwrap();
        assert!(io.now() - begun < Duration::from_secs(1));
    })
    .unwrap();
}

#[test]
fn what_cannot_be_read_is_named_and_crashes_nothing() {
    let sim = Sim::new(5);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start(&io, config()).await;
        for number in 0..120 {
            deliver(&shard, account, number, 30_000).await;
        }
        shard.checkpoint().await.unwrap();
        disk.set_faults(FaultRates { read_errors: 20_000, ..FaultRates::default() });
        let report = shard.scrub(0).await.unwrap();
        disk.set_faults(FaultRates::default());
        assert!(report.findings > 0, "{report:?}");
        // The medium has recovered: there is no damage.
        assert_eq!(shard.scrub(0).await.unwrap().findings, 0);
        assert_eq!(shard.messages(inbox, UidSet::range(1..=1000)).await.unwrap().len(), 120);
        worker.stop().await.unwrap();
    })
    .unwrap();
}
