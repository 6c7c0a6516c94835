//! Dictionaries from their training to their loss, on a simulated disk.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::check::check_shard;
use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::dictionaries::DictionaryConfig;
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::dictionary::DictionaryKind;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::format::segment::SegmentHeader;
use posthaste_engine::ids::ShardId;
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Superblock, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::shard::ShardConfig;
use posthaste_engine::storage::Storage;
use posthaste_tests::dictionaries::invented;
use posthaste_tests::far::{Store, near_and_far, storage};

const USERS: u64 = 20;
const SHARDS: u32 = 2;

/// One worker with two shards, whose messages are not kept in memory.
async fn start(io: &SimIo) -> Worker<Store> {
    let storage = storage(io);
    let superblock = open_superblock(&storage, SHARDS).await.unwrap();
    let dictionaries = DictionaryConfig { train_after_octets: 100_000, ..DictionaryConfig::default() };
    let (cluster, mut seats) = Cluster::that_trains(superblock, 1, dictionaries);
    let shard = ShardConfig { message_cache_bytes: 0, segment_size_bytes: 8 << 20, ..ShardConfig::default() };
    let (worker, _) = Worker::open(storage, cluster, seats.remove(0), StoreConfig { shard }).await.unwrap();
    let names = (0..USERS).map(|user| format!("user{user}@example.org"));
    let missing = names.filter(|name| worker.cluster().directory().find(name).is_none());
    let accounts = missing.map(|name| NewAccount { name, password: String::new() }).collect();
    worker.add_accounts(accounts).await.unwrap();
    worker
}

/// A letter of a bank to many, and what it says to one.
fn letter(number: u64) -> (String, String) {
    let header = format!(
        "From: Example Savings Bank <statements@bank.example.org>\r\nSubject: Your statement of account {number}\r\n\
         Message-ID: <{:x}@bank.example.org>\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n",
        number.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    );
    let own: String =
        (0..20).map(|word| format!("{:x} ", (number * 20 + word).wrapping_mul(0xff51_afd7_ed55_8ccd))).collect();
    let body = format!(
        "Dear customer,\r\nyour statement of account is ready. Log in to see your transactions.\r\n{own}\r\n\
         Kind regards,\r\nExample Savings Bank, 1 Market Square, Exampletown. Do not reply to this message.\r\n"
    );
    (header, body)
}

/// The octets that the letter's frames take.
async fn deliver(worker: &Worker<Store>, packer: &mut Packer, number: u64) -> usize {
    let (header, body) = letter(number);
    let prepared = Prepared::new(packer, format!("{header}{body}").as_bytes(), header.len(), body.as_bytes(), 1);
    let stored = prepared.stored_bytes();
    let account = worker.cluster().directory().find(&format!("user{}@example.org", number % USERS)).unwrap();
    let (prefix, flags) = (Vec::new(), Vec::new());
    let target = Target { account: account.account, mailbox: TargetMailbox::Inbox, prefix, flags, internal_date: None };
    let shard = worker.local(account.shard).unwrap();
    shard.deliver(Arc::new(prepared), vec![target]).await.remove(0).unwrap();
    stored
}

/// Messages as they should be, and those that cannot be read.
async fn read_all(worker: &Worker<Store>) -> (u64, u64) {
    let (mut good, mut damaged) = (0, 0);
    for account in worker.cluster().directory().iter() {
        let shard = worker.local(account.shard).unwrap();
        let inbox = shard.inbox(account.account).await.unwrap();
        for found in shard.messages(inbox, UidSet::range(1..=10_000)).await.unwrap() {
            match shard.read_message(&found.message, inbox, Part::Whole).await {
                Ok(bytes) => {
                    let subject = str::from_utf8(&bytes.header).unwrap().lines().nth(1).unwrap().to_owned();
                    let number = subject.rsplit(' ').next().unwrap().parse().unwrap();
                    let (header, body) = letter(number);
                    assert_eq!((&bytes.header[..], &bytes.body[..]), (header.as_bytes(), body.as_bytes()));
                    let digest = shard.read_message(&found.message, inbox, Part::Digest).await.unwrap().digest;
                    assert_eq!(&digest[..], body.as_bytes());
                    good += 1;
                }
                Err(EngineError::Damaged(_)) => damaged += 1,
                Err(error) => panic!("{error}"),
            }
        }
    }
    (good, damaged)
}

fn packer(worker: &Worker<Store>) -> Packer {
    let mut packer = Packer::default();
    packer.use_dictionaries(worker.cluster().dictionaries().current());
    packer
}

/// The segments with the ids of their dictionaries.
fn segments(sim: &Sim) -> Vec<(String, BTreeSet<u32>)> {
    let files = sim.files("").into_iter().map(|(path, _)| path);
    let segments = files.filter(|path| path.contains("/seg/") || path.contains("/wal/"));
    let with_ids = segments.map(|path| {
        let header = SegmentHeader::decode(&sim.contents(&path).unwrap()).unwrap();
        let ids = header.dictionaries.iter().map(|dictionary| dictionary.id).collect();
        (path, ids)
    });
    with_ids.collect()
}

async fn findings(storage: &impl Storage) -> Vec<String> {
    let superblock = Superblock::decode(&storage.read_superblock().await.unwrap().unwrap()).unwrap();
    let mut found = Vec::new();
    for shard in (0..SHARDS).map(ShardId) {
        let check = check_shard(storage, shard, superblock.store, |_, _| ()).await.unwrap();
        found.extend(check.findings.into_iter().map(|finding| format!("{}: {}", finding.file, finding.what)));
    }
    found
}

/// Mail that comes in trains dictionaries; what comes later takes less room, in segments that embed them; a start goes on
/// with them, and everything reads back.
#[test]
fn mail_trains_dictionaries_that_outlive_a_restart() {
    near_and_far(|| {
        let sim = Sim::new(11);
        let io = sim.io();
        let first = sim.run(async move {
            let worker = start(&io).await;
            let before = 100;
            let mut plain = 0;
            for number in 0..before {
                plain += deliver(&worker, &mut packer(&worker), number).await;
            }
            assert!(worker.cluster().dictionaries().current().is_none(), "that was too little to train on");
            let mut number = before;
            while worker.cluster().dictionaries().current().is_none() {
                assert!(number < 2000, "no training after {number} messages");
                deliver(&worker, &mut packer(&worker), number).await;
                io.sleep(Duration::from_millis(1)).await;
                number += 1;
            }
            let set = worker.cluster().dictionaries().current().unwrap();
            assert_eq!(set.generation(), 1);
            assert!(set.of_kind(DictionaryKind::Header).is_some() && set.of_kind(DictionaryKind::Body).is_some());
            let mut packed = 0;
            for number in number..number + before {
                packed += deliver(&worker, &mut packer(&worker), number).await;
            }
            assert!(packed * 10 < plain * 6, "{packed} octets with dictionaries, {plain} without");
            assert_eq!(read_all(&worker).await, (number + before, 0));
            worker.stop().await.unwrap();
            number + before
        });
        let delivered = first.unwrap();
        let ids: BTreeSet<u32> = segments(&sim).into_iter().flat_map(|(_, ids)| ids).collect();
        assert!((2..=3).contains(&ids.len()), "{ids:?}");
        let io = sim.io();
        let second = sim.run(async move {
            assert_eq!(findings(&storage(&io)).await, Vec::<String>::new());
            let worker = start(&io).await;
            let set = worker.cluster().dictionaries().current().expect("a start goes on with them");
            assert_eq!((set.generation(), set.iter().map(|it| it.id).collect::<BTreeSet<_>>()), (1, ids));
            deliver(&worker, &mut packer(&worker), delivered).await;
            assert_eq!(read_all(&worker).await, (delivered + 1, 0));
        });
        second.unwrap();
    });
}

/// A message that was compressed with a set before another one came, or two, goes to a segment that has what it needs.
#[test]
fn a_message_on_its_way_while_dictionaries_change_can_be_read() {
    let sim = Sim::new(3);
    let io = sim.io();
    let ran = sim.run(async move {
        let worker = start(&io).await;
        let dictionaries = worker.cluster().dictionaries();
        let mut packers = vec![packer(&worker)];
        for generation in 1..=4 {
            dictionaries.offer(invented(generation));
            packers.push(packer(&worker));
            for (number, packer) in packers.iter_mut().enumerate() {
                deliver(&worker, packer, u64::from(generation) * 100 + number as u64).await;
            }
        }
        assert_eq!(read_all(&worker).await, (2 + 3 + 4 + 5, 0));
        worker.stop().await.unwrap();
    });
    ran.unwrap();
    let io = sim.io();
    let again = sim.run(async move {
        assert_eq!(findings(&storage(&io)).await, Vec::<String>::new());
        let worker = start(&io).await;
        assert_eq!(worker.cluster().dictionaries().current().unwrap().generation(), 4);
        assert_eq!(read_all(&worker).await, (14, 0));
    });
    again.unwrap();
}

/// Neither the segment's own copy is needed nor a restart, as long as the dictionary is in use or in the segment being written.
#[test]
fn a_dictionary_that_rots_beside_a_running_server_is_found_elsewhere() {
    for changes_after in [false, true] {
        let sim = Sim::new(5);
        let (io, machine) = (sim.io(), sim.clone());
        let ran = sim.run(async move {
            let worker = start(&io).await;
            worker.cluster().dictionaries().offer(invented(1));
            for number in 0..40 {
                deliver(&worker, &mut packer(&worker), number).await;
            }
            worker.stop().await.unwrap();
            let worker = start(&io).await;
            for number in 40..80 {
                deliver(&worker, &mut packer(&worker), number).await;
            }
            if changes_after {
                // Twice, so that the first is in use no more.
                worker.cluster().dictionaries().offer(invented(2));
                worker.cluster().dictionaries().offer(invented(3));
            }
            let files = machine.files("").into_iter().map(|(path, _)| path);
            for path in files.filter(|path| path.contains("/seg/")) {
                machine.damage(&path, |bytes| bytes[60] ^= 1);
            }
            assert_eq!(read_all(&worker).await, (80, 0));
        });
        ran.unwrap();
    }
}

/// A damaged dictionary costs nothing as long as another segment has it, and then those messages that need it.
#[test]
fn a_damaged_dictionary_is_taken_from_another_segment() {
    let sim = Sim::new(4);
    let io = sim.io();
    let ran = sim.run(async move {
        for round in 0..3 {
            let worker = start(&io).await;
            worker.cluster().dictionaries().offer(invented(1));
            for number in 0..40 {
                deliver(&worker, &mut packer(&worker), round * 100 + number).await;
            }
            worker.stop().await.unwrap();
        }
    });
    ran.unwrap();
    let with: Vec<String> =
        segments(&sim).into_iter().filter(|(_, ids)| !ids.is_empty()).map(|(path, _)| path).collect();
    assert!(with.len() >= 4, "{with:?}");
    let mut of_first_shard = with.iter().filter(|path| path.starts_with("shard-0000"));
    let (spoilt, last) = (of_first_shard.next().unwrap().clone(), of_first_shard.next_back().unwrap().clone());
    for (number, path) in with.iter().enumerate() {
        if path.starts_with("shard-0000") && *path != last {
            // One has lost its table, the others a dictionary.
            sim.damage(path, |bytes| bytes[if *path == spoilt { 60 } else { 4000 + number }] ^= 1);
        }
    }
    let io = sim.io();
    let damaged = sim.run(async move {
        let found = findings(&storage(&io)).await;
        // Without its table, a segment's dictionaries look like batches that are none.
        let of_headers = ["checksum of the segment header", "checksum of the dictionary", "no batch header here"];
        assert!(found.iter().all(|what| of_headers.iter().any(|known| what.contains(known))), "{found:?}");
        assert_eq!(found.len(), 3, "{found:?}");
        let worker = start(&io).await;
        assert_eq!(read_all(&worker).await, (120, 0), "the last segment has it still");
    });
    damaged.unwrap();
    // The tables of all segments of the first shard: the second has what is in use.
    let spoil = |shard: &str| {
        for (path, _) in sim.files("").into_iter().filter(|(path, _)| path.starts_with(shard)) {
            if (path.contains("/seg/") || path.contains("/wal/")) && path != spoilt {
                sim.damage(&path, |bytes| bytes[60] ^= 1);
            }
        }
    };
    spoil("shard-0000");
    let io = sim.io();
    let in_use = sim.run(async move { read_all(&start(&io).await).await });
    assert_eq!(in_use.unwrap(), (120, 0));
    spoil("shard-");
    // That has given the first shard's back.
    spoil("shard-0000");
    let io = sim.io();
    let lost = sim.run(async move {
        let found = findings(&storage(&io)).await;
        let named = found.iter().filter(|what| what.contains("needs dictionary")).count() as u64;
        let (good, damaged) = read_all(&start(&io).await).await;
        assert!(damaged > 100 && good + damaged == 120, "{good} good, {damaged} damaged");
        assert_eq!(named, damaged, "{found:?}");
    });
    lost.unwrap();
}
