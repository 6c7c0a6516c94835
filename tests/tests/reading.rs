//! What POP3 asks of the store: sizes without reading, messages in pieces, and an expunge by UIDs.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{MailboxId, ShardId, Uid};
use posthaste_engine::io::sim::{FaultRates, Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::reading::Piece;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;

const NAME: &str = "a@example.org";

struct Store {
    worker: Worker<Local<SimIo>>,
    shard: Shard<Local<SimIo>>,
    inbox: MailboxId,
}

async fn open(io: SimIo) -> Store {
    let storage = Local::new(io);
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let shard = ShardConfig { message_cache_bytes: 0, segment_size_bytes: 8 << 20, ..ShardConfig::default() };
    let (worker, _) =
        Worker::open(storage, Arc::clone(&cluster), seats.remove(0), StoreConfig { shard }).await.unwrap();
    let shard = worker.local(ShardId(0)).unwrap();
    if cluster.directory().find(NAME).is_none() {
        let account = NewAccount { name: NAME.to_owned(), password: String::new() };
        worker.add_accounts(vec![account]).await.unwrap();
    }
    let account = cluster.directory().find(NAME).unwrap();
    let inbox = shard.inbox(account.account).await.unwrap();
    Store { worker, shard, inbox }
}

impl Store {
    async fn deliver(&self, prefix: &[u8], message: &[u8]) {
        let header = message.windows(4).position(|end| end == b"\r\n\r\n").map_or(message.len(), |at| at + 4);
        let prepared = Arc::new(Prepared::new(&mut Packer::new(1), message, header, b"digest", 0));
        let account = self.worker.cluster().directory().find(NAME).unwrap().account;
        let target = Target {
            account,
            mailbox: TargetMailbox::Inbox,
            prefix: prefix.to_vec(),
            flags: Vec::new(),
            internal_date: None,
        };
        self.shard.deliver(prepared, vec![target]).await.remove(0).unwrap();
    }

    async fn sizes(&self) -> Vec<(u32, u64)> {
        let mut sizes = Vec::new();
        self.shard.visit_sizes(self.inbox, |uid, octets| sizes.push((uid.0, octets))).await.unwrap();
        sizes
    }

    /// Reads each message in pieces: header and body, and the longest piece.
    async fn read(&self) -> Vec<(Vec<u8>, Vec<u8>, usize)> {
        let mut all = Vec::new();
        for info in self.shard.messages(self.inbox, UidSet::range(1..=u32::MAX)).await.unwrap() {
            let whole = self.shard.read_message(&info.message, self.inbox, Part::Whole).await.unwrap();
            let (mut header, mut body, mut longest) = (Vec::new(), Vec::new(), 0);
            let mut reading = self.shard.open_message(&info.message, self.inbox).await.unwrap();
            while let Some(piece) = reading.next().await.unwrap() {
                let (part, octets) = match piece {
                    Piece::Header(octets) => (&mut header, octets),
                    Piece::Body(octets) => (&mut body, octets),
                };
                part.extend_from_slice(&octets);
                longest = longest.max(octets.len());
            }
            assert_eq!(header, [&whole.prefix[..], &whole.header].concat());
            assert_eq!(body, whole.body);
            all.push((header, body, longest));
        }
        all
    }
}

fn simulate(test: impl AsyncFnOnce(Sim) + 'static) {
    let sim = Sim::new(1);
    let of_test = sim.clone();
    sim.run(async move { test(of_test).await }).expect("no crash is planned");
}

fn message(header_octets: usize, body_octets: usize, end: &str) -> Vec<u8> {
    let field = |number: usize| format!("X-{number:07}: {}\r\n", number.wrapping_mul(2_654_435_761));
    let header: String = (0..header_octets / 24).map(field).collect();
    let body: String = (0..body_octets / 24).map(field).collect();
    format!("{header}\r\n{body}{end}").into_bytes()
}

#[test]
fn a_message_comes_in_pieces_of_bounded_size() {
    simulate(async |sim| {
        let store = open(sim.io()).await;
        for (header, body, end) in [
            (0, 0, ""),
            (100, 0, ""),
            (100, 1000, "x"),
            (100, 900_000, "\r\n"),
            (100, 4 << 20, "."),
            (3 << 20, 1000, ""),
        ] {
            store.deliver(b"A: prefix\r\n", &message(header, body, end)).await;
        }
        store.deliver(b"", b"").await;
        let read = store.read().await;
        assert_eq!(read.len(), 7);
        for (header, body, longest) in &read {
            assert!(*longest <= 1 << 20, "{longest} octets of {} and {}", header.len(), body.len());
        }
        assert!(read[4].2 <= 256 << 10, "a body comes by its blocks");
        assert_eq!(read[6], (Vec::new(), Vec::new(), 0));
    });
}

/// A client that fetches a large attachment in parts pays for each part.
#[test]
fn a_range_reads_only_the_blocks_that_have_it() {
    simulate(async |sim| {
        let store = open(sim.io()).await;
        let (small, large) = (message(100, 5000, "."), message(3 << 20, 4 << 20, "."));
        let prefix = b"A: prefix\r\n";
        store.deliver(prefix, &small).await;
        store.deliver(prefix, &large).await;
        let infos = store.shard.messages(store.inbox, UidSet::range(1..=2)).await.unwrap();
        for (info, message) in infos.iter().zip([small, large]) {
            let whole = [&prefix[..], &message].concat();
            let len = whole.len() as u64;
            let block = 256 << 10;
            let starts = [0, 1, 10, 11, 12, 100, block, len / 2, len.saturating_sub(block), len - 1, len, len + 1];
            for start in starts {
                for octets in [0, 1, 11, 1000, block, len] {
                    let reads = store.shard.stats().record_reads;
                    let reading = store.shard.open_message(&info.message, store.inbox).await.unwrap();
                    assert_eq!(reading.shape().octets(), len);
                    let mut reading = reading.only(start..start + octets);
                    let mut found = Vec::new();
                    while let Some(Piece::Header(piece) | Piece::Body(piece)) = reading.next().await.unwrap() {
                        found.extend_from_slice(&piece);
                    }
                    let wanted = &whole[start.min(len) as usize..(start + octets).min(len) as usize];
                    assert!(found == wanted, "{octets} octets from {start} of {len}");
                    let reads = store.shard.stats().record_reads - reads;
                    assert!(reads <= 3 + wanted.len() as u64 / block, "{reads} reads for {}", wanted.len());
                }
            }
        }
    });
}

/// Trap 48: sizes are known without reading, with the line end that a message lacks.
#[test]
fn trap_48_sizes_outlive_whatever_happens() {
    simulate(async |sim| {
        let messages: [&[u8]; 5] = [b"A: b\r\n\r\nx\r\n", b"A: b\r\n\r\nx", b"", b"A: b", b"A: b\r\n\r\nx\n"];
        let prefix = b"A: prefix\r\n";
        let expected: Vec<u64> =
            [11, 9 + 2, 0, 4 + 2, 10 + 2].iter().map(|octets| octets + prefix.len() as u64).collect();
        let first: Vec<(u32, u64)> = (1..).zip(expected.iter().copied()).collect();
        let store = open(sim.io()).await;
        for message in messages {
            store.deliver(prefix, message).await;
        }
        assert_eq!(store.sizes().await, first);
        let reads = store.shard.stats().record_reads;
        let all = UidSet::range(1..=5);
        for op in [FlagOp::Replace, FlagOp::Remove, FlagOp::Add] {
            let flags = vec![FlagName::Seen, FlagName::Keyword("x".to_owned())];
            let stored = store.shard.store_flags(store.inbox, all.clone(), op, flags, None).await.unwrap();
            assert_eq!(stored.changed.len(), 5, "{op:?}");
        }
        let stored =
            store.shard.store_flags(store.inbox, all.clone(), FlagOp::Replace, Vec::new(), None).await.unwrap();
        assert_eq!(stored.changed.len(), 5);
        let infos = store.shard.messages(store.inbox, all.clone()).await.unwrap();
        assert!(infos.iter().all(|info| info.flags == Flags::NONE), "no flag of a client's is left");
        store.shard.copy(store.inbox, all, store.inbox).await.unwrap();
        let both: Vec<(u32, u64)> = (1..).zip([&expected[..], &expected].concat()).collect();
        assert_eq!(store.sizes().await, both);
        assert_eq!(store.shard.stats().record_reads, reads, "no record was read for it");
        store.worker.stop().await.unwrap();
        let store = open(sim.io()).await;
        assert_eq!(store.sizes().await, both);
        store.worker.stop().await.unwrap();
        for (index, _) in sim.files("shard-0000/idx/") {
            sim.remove_file(&index);
        }
        let store = open(sim.io()).await;
        assert_eq!(store.sizes().await, both, "rebuilt from the log");
        store.worker.stop().await.unwrap();
    });
}

#[test]
fn an_expunge_by_uids_asks_for_no_flag_and_takes_no_other() {
    simulate(async |sim| {
        let store = open(sim.io()).await;
        for _ in 0..6 {
            store.deliver(b"", b"A: b\r\n\r\n").await;
        }
        let uids = |uids: &[u32]| uids.iter().copied().map(Uid).collect::<UidSet>();
        let deleted = vec![FlagName::Deleted];
        store.shard.store_flags(store.inbox, uids(&[1, 2]), FlagOp::Add, deleted, None).await.unwrap();
        let gone = store.shard.expunge_messages(store.inbox, uids(&[2, 4, 5, 77])).await.unwrap();
        assert_eq!(gone, uids(&[2, 4, 5]));
        let again = store.shard.expunge_messages(store.inbox, uids(&[4])).await.unwrap();
        assert_eq!(again, uids(&[]), "it is gone already");
        let left = |sizes: Vec<(u32, u64)>| sizes.into_iter().map(|(uid, _)| uid).collect::<Vec<_>>();
        assert_eq!(left(store.sizes().await), [1, 3, 6]);
        store.worker.stop().await.unwrap();
        assert_eq!(left(open(sim.io()).await.sizes().await), [1, 3, 6]);
    });
}

/// What QUIT asks for is done or it is not, whenever the machine crashes or its device fails; done where it was said so.
#[test]
fn an_expunge_by_uids_is_whole_or_not_at_all() {
    let (mut done, mut not_done) = (0, 0);
    for seed in 0..60 {
        let sim = Sim::new(seed);
        let of_test = sim.clone();
        let acknowledged = sim.run(async move {
            let store = open(of_test.io()).await;
            for _ in 0..8 {
                store.deliver(b"", b"A: b\r\n\r\n").await;
            }
            if seed % 3 == 0 {
                of_test.set_faults(FaultRates { sync_errors: 65_536, ..FaultRates::default() });
            } else {
                of_test.crash_after(Some(1 + seed % 4));
            }
            let uids = [1, 3, 4, 8].map(Uid).into_iter().collect::<UidSet>();
            let result = store.shard.expunge_messages(store.inbox, uids).await;
            assert!(result.is_ok() || seed % 3 == 0);
            result.is_ok()
        });
        sim.crash_after(None);
        sim.set_faults(FaultRates::default());
        sim.crash_now();
        let of_test = sim.clone();
        let left = sim.run(async move {
            let store = open(of_test.io()).await;
            let left: Vec<u32> = store.sizes().await.into_iter().map(|(uid, _)| uid).collect();
            store.worker.stop().await.unwrap();
            left
        });
        match left.expect("no crash is planned")[..] {
            [2, 5, 6, 7] => done += 1,
            [1, 2, 3, 4, 5, 6, 7, 8] if acknowledged != Some(true) => not_done += 1,
            ref left => panic!("seed {seed}: {left:?} are left, and the answer was {acknowledged:?}"),
        }
    }
    assert!(done > 0 && not_done > 0, "{done} done, {not_done} not");
}
