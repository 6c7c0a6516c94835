//! Compaction as its users see it: space comes back, and nothing else changes.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::check::check_shard;
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::base64_lines::put_lines;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MailboxId, ModSeq, ShardId, Uid};
use posthaste_engine::io::sim::{Sim, SimIo};
use posthaste_engine::mailboxes::MailboxInfo;
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::{MessageInfo, Part};
use posthaste_engine::reading::Piece;
use posthaste_engine::shard::{Shard, ShardConfig, ShardEvent};
use posthaste_engine::storage::local::Local;

type Store = Local<SimIo>;

const SEGMENT_BYTES: u64 = 1 << 20;

async fn open(io: &SimIo) -> Worker<Store> {
    open_with(io, SEGMENT_BYTES).await
}

async fn open_with(io: &SimIo, segment_size_bytes: u64) -> Worker<Store> {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let shard = ShardConfig { segment_size_bytes, message_cache_bytes: 0, ..ShardConfig::default() };
    Worker::open(storage, cluster, seats.remove(0), StoreConfig { shard }).await.unwrap().0
}

/// A store with one account, and its INBOX.
async fn start(io: &SimIo) -> (Worker<Store>, Shard<Store>, AccountId, MailboxId) {
    start_with(io, SEGMENT_BYTES).await
}

async fn start_with(io: &SimIo, segment_size_bytes: u64) -> (Worker<Store>, Shard<Store>, AccountId, MailboxId) {
    let worker = open_with(io, segment_size_bytes).await;
    let account = NewAccount { name: "a@example.org".to_owned(), password: String::new() };
    let account = worker.add_accounts(vec![account]).await.unwrap().remove(0).unwrap().account;
    let shard = worker.local(ShardId(0)).unwrap();
    let inbox = shard.inbox(account).await.unwrap();
    (worker, shard, account, inbox)
}

/// Lines that do not compress well.
fn body(number: u64, octets: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut body = Vec::with_capacity(octets + 80);
    while body.len() < octets {
        for _ in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            body.extend_from_slice(format!("{:08x} ", state >> 32).as_bytes());
        }
        body.extend_from_slice(b"\r\n");
    }
    body
}

async fn deliver(shard: &Shard<Store>, account: AccountId, number: u64, octets: usize) -> Uid {
    let header = format!("Subject: message {number}\r\n\r\n");
    let message = [header.as_bytes(), &body(number, octets)].concat();
    let prepared = Prepared::new(&mut Packer::default(), &message, header.len(), &number.to_le_bytes(), 1);
    let prefix = format!("Delivered-To: {number}\r\n").into_bytes();
    let target = Target { account, mailbox: TargetMailbox::Inbox, prefix, flags: Vec::new(), internal_date: None };
    shard.deliver(Arc::new(prepared), vec![target]).await.remove(0).unwrap().uid
}

/// Everything that can be seen of a mailbox, but where its records lie.
#[derive(Debug, PartialEq)]
struct Seen {
    info: MailboxInfo,
    keywords: Vec<String>,
    messages: BTreeMap<u32, (MessageInfo, Vec<u8>, Vec<u8>)>,
    expunged: Option<UidSet>,
}

async fn look(shard: &Shard<Store>, account: AccountId) -> BTreeMap<String, Seen> {
    let mut all = BTreeMap::new();
    for info in shard.mailboxes(account) {
        let mut messages = BTreeMap::new();
        for mut found in shard.messages(info.mailbox, UidSet::range(1..=1_000_000)).await.unwrap() {
            let whole = shard.read_message(&found.message, info.mailbox, Part::Whole).await.unwrap();
            let digest = shard.read_message(&found.message, info.mailbox, Part::Digest).await.unwrap();
            let octets = [&whole.prefix[..], &whole.header, &whole.body].concat();
            assert_eq!(octets.len() as u64, found.message.size);
            found.message.location = Default::default();
            found.message.head_bytes = 0;
            messages.insert(found.message.uid.0, (found, octets, digest.digest.to_vec()));
        }
        let keywords = shard.keywords(info.mailbox).await.unwrap();
        let expunged = shard.look(info.mailbox, |index| index.expunged_since(ModSeq(0))).await.unwrap();
        all.insert(info.name.clone(), Seen { info, keywords, messages, expunged });
    }
    all
}

async fn findings(io: &SimIo, worker: &Worker<Store>) -> Vec<String> {
    let storage = Local::new(io.clone());
    let store = worker.cluster().superblock.store;
    let check = check_shard(&storage, ShardId(0), store, |_, _| ()).await.unwrap();
    check.findings.into_iter().map(|finding| format!("{}: {}", finding.file, finding.what)).collect()
}

fn segment_bytes(sim: &Sim) -> u64 {
    let files = sim.files("").into_iter();
    files.filter(|(path, _)| path.contains("/seg/") || path.contains("/wal/")).map(|(_, len)| len).sum()
}

/// Does a bit of everything that changes a mailbox.
async fn live(shard: &Shard<Store>, account: AccountId, inbox: MailboxId, from: u64) {
    for number in from..from + 60 {
        deliver(shard, account, number, if number % 20 == 7 { 700_000 } else { 3000 }).await;
    }
    let name = format!("Work {from}");
    let work = shard.create_mailbox(account, &name, 0).await.unwrap();
    let first = shard.status(inbox).unwrap().uid_next - 60;
    let uids = |from: u32, to: u32| UidSet::range(first + from..=first + to);
    let keyword = vec![FlagName::Keyword(format!("$k{from}")), FlagName::Flagged];
    shard.store_flags(inbox, uids(0, 20), FlagOp::Add, keyword, None).await.unwrap();
    shard.store_flags(inbox, uids(10, 30), FlagOp::Add, vec![FlagName::Seen], None).await.unwrap();
    shard.store_flags(inbox, uids(15, 16), FlagOp::Remove, vec![FlagName::Flagged], None).await.unwrap();
    shard.copy(inbox, uids(5, 12), work).await.unwrap();
    shard.move_messages(inbox, uids(40, 49), work).await.unwrap();
    shard.expunge_messages(inbox, uids(0, 8)).await.unwrap();
    shard.store_flags(work, UidSet::range(3..=4), FlagOp::Add, vec![FlagName::Answered], None).await.unwrap();
    shard.subscribe(account, &name, true).await.unwrap();
    shard.rename_mailbox(account, &name, &format!("Old/{from}")).await.unwrap();
    shard.create_mailbox(account, "Gone", 0).await.unwrap();
    shard.delete_mailbox(account, "Gone").await.unwrap();
}

#[test]
fn what_can_be_seen_is_the_same_before_and_after_and_from_the_log_alone() {
    let sim = Sim::new(1);
    let io = sim.io();
    let (account, before) = sim
        .run(async move {
            let (worker, shard, account, inbox) = start(&io).await;
            live(&shard, account, inbox, 1).await;
            live(&shard, account, inbox, 1001).await;
            let before = look(&shard, account).await;
            let report = shard.compact(Choice::All).await.unwrap();
            assert!(report.segments > 0 && report.bytes_after < report.bytes_before, "{report:?}");
            assert_eq!(look(&shard, account).await, before);
            assert_eq!(findings(&io, &worker).await, Vec::<String>::new());
            // What compaction has written is compacted again, together with what came since.
            live(&shard, account, inbox, 2001).await;
            let before = look(&shard, account).await;
            shard.compact(Choice::All).await.unwrap();
            assert_eq!(look(&shard, account).await, before);
            assert_eq!(findings(&io, &worker).await, Vec::<String>::new());
            worker.stop().await.unwrap();
            (account, before)
        })
        .unwrap();
    for (path, _) in sim.files("shard-0000/idx") {
        sim.remove_file(&path);
    }
    let io = sim.io();
    sim.run(async move {
        let worker = open(&io).await;
        assert_eq!(look(&worker.local(ShardId(0)).unwrap(), account).await, before);
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn the_space_of_what_is_expunged_comes_back() {
    let sim = Sim::new(2);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start(&io).await;
        for number in 0..200 {
            deliver(&shard, account, number, 30_000).await;
        }
        let full = segment_bytes(&disk);
        shard.expunge_messages(inbox, UidSet::range(1..=150)).await.unwrap();
        shard.compact(Choice::WherePays).await.unwrap();
        let compacted = segment_bytes(&disk);
        // A quarter lives; the segment that is being written has its space reserved.
        assert!(compacted < full * 2 / 5 + SEGMENT_BYTES, "{compacted} of {full} octets");
        shard.expunge_messages(inbox, UidSet::range(1..=200)).await.unwrap();
        shard.compact(Choice::All).await.unwrap();
        assert!(segment_bytes(&disk) < 100_000, "{} octets for no message", segment_bytes(&disk));
        assert_eq!(shard.status(inbox).unwrap().uid_next, 201);
        assert_eq!(findings(&io, &worker).await, Vec::<String>::new());
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn who_reads_while_records_move_reads_on() {
    let sim = Sim::new(3);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start(&io).await;
        for number in 0..10 {
            deliver(&shard, account, number, 2_000_000).await;
        }
        let old = shard.messages(inbox, UidSet::range(1..=10)).await.unwrap();
        let mut reading = shard.open_message(&old[4].message, inbox).await.unwrap();
        let mut octets = Vec::new();
        let mut take = |piece: Piece| {
            let (Piece::Header(bytes) | Piece::Body(bytes)) = piece;
            octets.extend_from_slice(&bytes);
        };
        take(reading.next().await.unwrap().unwrap());
        let files = |disk: &Sim| disk.files("shard-0000/seg").len();
        shard.compact(Choice::All).await.unwrap();
        let held = files(&disk);
        while let Some(piece) = reading.next().await.unwrap() {
            take(piece);
        }
        let end = body(4, 2_000_000);
        assert!(octets.ends_with(&end), "the octets are those of the message");
        drop(reading);
        io_turns(&io).await;
        assert!(files(&disk) < held, "the old segments go when nobody reads them any more");
        // Whoever knows a message by its old place finds it, unless it has been expunged.
        let whole = shard.read_message(&old[2].message, inbox, Part::Whole).await.unwrap();
        assert_eq!(&whole.body[..], &body(2, 2_000_000)[..]);
        shard.expunge_messages(inbox, UidSet::one(Uid(3))).await.unwrap();
        let gone = shard.read_message(&old[2].message, inbox, Part::Whole).await;
        assert!(matches!(gone, Err(EngineError::Refused(_))), "{gone:?}");
        worker.stop().await.unwrap();
    })
    .unwrap();
}

async fn io_turns(io: &SimIo) {
    use posthaste_engine::io::Runtime;
    io.sleep(std::time::Duration::from_millis(50)).await;
}

#[test]
fn a_damaged_segment_is_left_as_it_is_and_the_others_are_compacted() {
    let sim = Sim::new(4);
    let (io, disk) = (sim.io(), sim.clone());
    let account = sim
        .run(async move {
            let (worker, shard, account, _) = start(&io).await;
            for number in 0..220 {
                deliver(&shard, account, number, 30_000).await;
            }
            worker.stop().await.unwrap();
            account
        })
        .unwrap();
    let mut segments: Vec<String> = sim.files("shard-0000/seg").into_iter().map(|(path, _)| path).collect();
    segments.sort();
    assert!(segments.len() >= 3, "{segments:?}");
    sim.damage(&segments[1], |bytes| bytes[500_000] ^= 1);
    let io = sim.io();
    sim.run(async move {
        let worker = open(&io).await;
        let shard = worker.local(ShardId(0)).unwrap();
        let inbox = shard.inbox(account).await.unwrap();
        shard.compact(Choice::All).await.unwrap();
        let ShardEvent::SegmentDamaged(segment, _) = shard.next_event().await else { panic!("another event") };
        assert_eq!(segment.0, 2);
        let names: Vec<String> = disk.files("shard-0000/seg").into_iter().map(|(path, _)| path).collect();
        assert!(names.contains(&segments[1]) && !names.contains(&segments[0]), "{names:?}");
        let mut damaged = 0;
        for found in shard.messages(inbox, UidSet::range(1..=1000)).await.unwrap() {
            damaged += u32::from(shard.read_message(&found.message, inbox, Part::Whole).await.is_err());
        }
        assert_eq!(damaged, 1);
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn on_a_full_device_what_is_dead_makes_room() {
    let sim = Sim::new(5);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start(&io).await;
        for number in 0..150 {
            deliver(&shard, account, number, 30_000).await;
        }
        disk.set_capacity(Some(disk.used_bytes() + 300_000));
        shard.expunge_messages(inbox, UidSet::range(1..=140)).await.unwrap();
        shard.compact(Choice::WherePays).await.unwrap();
        for number in 150..200 {
            deliver(&shard, account, number, 30_000).await;
        }
        assert_eq!(findings(&io, &worker).await, Vec::<String>::new());
        worker.stop().await.unwrap();
    })
    .unwrap();
}

/// A message with an attachment, as mail clients send it.
fn with_attachment(number: u64, content: &[u8]) -> (String, Vec<u8>) {
    let header = format!("Subject: picture {number}\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n");
    let text =
        "--b\r\n\r\nSee the picture.\r\n--b\r\nContent-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n\r\n";
    let mut body = text.as_bytes().to_vec();
    put_lines(content, 76, usize::MAX / 2, &mut body);
    body.extend_from_slice(format!("--b--\r\nThis is number {number}.\r\n").as_bytes());
    (header, body)
}

#[test]
fn an_attachment_of_many_messages_is_stored_once_and_comes_back_byte_for_byte() {
    let sim = Sim::new(6);
    let (io, disk) = (sim.io(), sim.clone());
    sim.run(async move {
        let (worker, shard, account, inbox) = start_with(&io, 16 << 20).await;
        let small: Vec<u8> = body(77, 60_000).iter().map(|octet| octet.wrapping_mul(31)).collect();
        let large: Vec<u8> = body(78, 900_000).iter().map(|octet| octet.wrapping_mul(57)).collect();
        let messages: Vec<(String, Vec<u8>)> =
            (0..12).map(|number| with_attachment(number, if number % 3 == 0 { &large } else { &small })).collect();
        for (header, body) in &messages {
            let whole = [header.as_bytes(), body].concat();
            let prepared = Prepared::new(&mut Packer::default(), &whole, header.len(), b"", 1);
            let (prefix, mailbox) = (b"X: 1\r\n".to_vec(), TargetMailbox::Inbox);
            let target = Target { account, mailbox, prefix, flags: Vec::new(), internal_date: None };
            shard.deliver(Arc::new(prepared), vec![target]).await.remove(0).unwrap();
        }
        let before = look(&shard, account).await;
        for round in 0..2 {
            shard.compact(Choice::All).await.unwrap();
            let contents = (small.len() + large.len()) as u64;
            assert!(segment_bytes(&disk) < contents * 5 / 4, "round {round}: {} octets", segment_bytes(&disk));
            assert!(look(&shard, account).await == before, "round {round}");
        }
        // Any part of a message can be had without the rest of it.
        let found = shard.messages(inbox, UidSet::one(Uid(4))).await.unwrap()[0];
        let whole = [b"X: 1\r\n", messages[3].0.as_bytes(), &messages[3].1].concat();
        let unpacked = || shard.stats().body_frames_unpacked;
        for (from, to) in [(0, 10), (500, 900_000), (700_000, 700_001), (whole.len() - 40, whole.len() + 10)] {
            let before = unpacked();
            let reading = shard.open_message(&found.message, inbox).await.unwrap();
            let mut reading = reading.only(from as u64..to as u64);
            let mut octets = Vec::new();
            while let Some(Piece::Header(piece) | Piece::Body(piece)) = reading.next().await.unwrap() {
                octets.extend_from_slice(&piece);
            }
            assert!(octets == whole[from..to.min(whole.len())], "octets {from} to {to}");
            assert!(to - from > 1000 || unpacked() - before <= 3, "{} frames", unpacked() - before);
        }
        assert_eq!(findings(&io, &worker).await, Vec::<String>::new());
        worker.stop().await.unwrap();
    })
    .unwrap();
}

#[test]
fn a_store_that_was_stopped_is_folded_as_of_its_last_change() {
    let sim = Sim::new(7);
    let io = sim.io();
    let (account, before) = sim
        .run(async move {
            let (worker, shard, account, inbox) = start(&io).await;
            live(&shard, account, inbox, 1).await;
            let before = look(&shard, account).await;
            worker.stop().await.unwrap();
            (account, before)
        })
        .unwrap();
    let io = sim.io();
    sim.run(async move {
        let worker = open(&io).await;
        worker.local(ShardId(0)).unwrap().compact(Choice::All).await.unwrap();
        worker.stop().await.unwrap();
    })
    .unwrap();
    for (path, _) in sim.files("shard-0000/idx") {
        sim.remove_file(&path);
    }
    let io = sim.io();
    sim.run(async move {
        let worker = open(&io).await;
        assert!(look(&worker.local(ShardId(0)).unwrap(), account).await == before);
        worker.stop().await.unwrap();
    })
    .unwrap();
}
