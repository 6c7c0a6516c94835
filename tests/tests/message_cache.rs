//! What the cache of decompressed messages gives, and what it leaves to be read.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::sync::Arc;

use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{MailboxId, ShardId};
use posthaste_engine::io::sim::{Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::{MessageBytes, Part};
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;

const NAMES: [&str; 3] = ["a@example.org", "b@example.org", "c@example.org"];

/// One shard with an INBOX for each name; all have the same messages, each under a prefix of its own.
struct Store {
    worker: Worker<Local<SimIo>>,
    shard: Shard<Local<SimIo>>,
    inboxes: Vec<MailboxId>,
}

async fn open(io: &SimIo, message_cache_bytes: usize) -> Store {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let config = StoreConfig {
        shard: ShardConfig { message_cache_bytes, segment_size_bytes: 8 << 20, ..ShardConfig::default() },
    };
    let (worker, _) = Worker::open(storage, cluster, seats.remove(0), config).await.unwrap();
    if worker.cluster().directory().is_empty() {
        let accounts = NAMES.map(|name| NewAccount { name: name.to_owned(), password: String::new() });
        worker.add_accounts(accounts.into()).await.unwrap();
    }
    let shard = worker.local(ShardId(0)).unwrap();
    let mut inboxes = Vec::new();
    for name in NAMES {
        let account = worker.cluster().directory().find(name).unwrap().account;
        inboxes.push(shard.mailbox(account, "INBOX").unwrap());
    }
    Store { worker, shard, inboxes }
}

impl Store {
    async fn deliver(&self, body_octets: usize) {
        let bytes = ["Subject: x\r\n\r\n", &"0123456789abcde\n".repeat(body_octets / 16)].concat();
        let prepared = Arc::new(Prepared::new(&mut Packer::default(), bytes.as_bytes(), 14, b"digest", 1));
        let mut targets = Vec::new();
        for name in NAMES {
            targets.push(Target {
                account: self.worker.cluster().directory().find(name).unwrap().account,
                mailbox: TargetMailbox::Inbox,
                prefix: format!("Delivered-To: {name}\r\n").into_bytes(),
                flags: Vec::new(),
                internal_date: None,
            });
        }
        for delivered in self.shard.deliver(prepared, targets).await {
            delivered.unwrap();
        }
    }

    /// All messages of an INBOX, and the records that were read for them.
    async fn read(&self, number: usize, part: Part) -> (Vec<MessageBytes>, u64) {
        let inbox = self.inboxes[number];
        let found = self.shard.messages(inbox, UidSet::range(1..=1000)).await.unwrap();
        let before = self.shard.stats().record_reads;
        let mut read = Vec::new();
        for found in found {
            read.push(self.shard.read_message(&found.message, inbox, part).await.unwrap());
        }
        (read, self.shard.stats().record_reads - before)
    }
}

fn on_a_machine(message_cache_bytes: usize, test: impl AsyncFnOnce(Store, Sim) + 'static) {
    let sim = Sim::new(1);
    let (io, of_test) = (sim.io(), sim.clone());
    let ran = sim.run(async move { test(open(&io, message_cache_bytes).await, of_test).await });
    ran.expect("no crash is planned");
}

#[test]
fn a_message_read_before_is_the_same_and_reads_nothing() {
    on_a_machine(1 << 20, async |store, _| {
        store.deliver(5000).await;
        let (first, reads) = store.read(0, Part::Whole).await;
        assert_eq!(reads, 1);
        assert_eq!(first[0].prefix, "Delivered-To: a@example.org\r\n");
        assert_eq!((first[0].header.len(), first[0].body.len()), (14, 4992));
        assert_eq!(store.read(0, Part::Whole).await, (first.clone(), 0));
        // The other recipients share it, but for the prefix.
        let (others, reads) = store.read(2, Part::Whole).await;
        assert_eq!(reads, 0);
        assert_eq!(others[0].prefix, "Delivered-To: c@example.org\r\n");
        assert_eq!((&others[0].header, &others[0].body), (&first[0].header, &first[0].body));
        let (headers, reads) = store.read(1, Part::Header).await;
        assert_eq!((reads, headers[0].body.len()), (0, 0));
        assert_eq!(headers[0].prefix, "Delivered-To: b@example.org\r\n");
        assert_eq!(headers[0].header, first[0].header);
        let stats = store.shard.stats();
        assert_eq!((stats.message_cache_hits, stats.message_cache_misses), (3, 1));
        assert!(stats.message_cache_bytes >= 5000, "{}", stats.message_cache_bytes);
    });
}

#[test]
fn what_is_read_once_is_the_same_and_is_not_kept() {
    on_a_machine(1 << 20, async |store, _| {
        store.deliver(5000).await;
        let inbox = store.inboxes[1];
        let message = store.shard.messages(inbox, UidSet::range(1..=1000)).await.unwrap()[0].message;
        for part in [Part::Digest, Part::Header, Part::Whole] {
            let held = store.shard.stats().message_cache_bytes;
            let once = store.shard.read_message_once(&message, inbox, part).await.unwrap();
            assert_eq!(store.shard.stats().message_cache_bytes, held, "{part:?}");
            assert_eq!(once.rest, [&once.header[..], &once.body].concat());
            assert!(part == Part::Digest || once.prefix == "Delivered-To: b@example.org\r\n");
            let kept = store.shard.read_message(&message, inbox, part).await.unwrap();
            assert_eq!(once, kept);
            assert!(store.shard.stats().message_cache_bytes > held);
            let reads = store.shard.stats().record_reads;
            assert_eq!(store.shard.read_message_once(&message, inbox, part).await.unwrap(), kept);
            assert_eq!(store.shard.stats().record_reads, reads, "what is there is taken");
        }
    });
}

#[test]
fn headers_and_digests_are_kept_for_all_recipients() {
    on_a_machine(1 << 20, async |store, _| {
        store.deliver(5000).await;
        for part in [Part::Header, Part::Digest] {
            let (first, reads) = store.read(0, part).await;
            assert_eq!(reads, 1, "{part:?}");
            assert_eq!(store.read(0, part).await, (first.clone(), 0));
            let (others, reads) = store.read(2, part).await;
            assert_eq!((reads, &others[0].header, &others[0].digest), (0, &first[0].header, &first[0].digest));
            let prefix = if part == Part::Header { "Delivered-To: c@example.org\r\n" } else { "" };
            assert_eq!(others[0].prefix, prefix);
        }
        assert_eq!(store.shard.stats().body_frames_unpacked, 0);
        let (whole, reads) = store.read(1, Part::Whole).await;
        assert_eq!((reads, whole[0].body.len()), (1, 4992), "what is kept of a message is not taken for all of it");
    });
}

#[test]
fn headers_and_digests_unpack_no_body() {
    on_a_machine(0, async |store, _| {
        store.deliver(5000).await;
        store.deliver(3 << 20).await;
        for part in [Part::Header, Part::Digest] {
            assert_eq!(store.read(0, part).await.1, 2);
            assert_eq!(store.shard.stats().body_frames_unpacked, 0, "{part:?}");
        }
        store.read(0, Part::Whole).await;
        assert!(store.shard.stats().body_frames_unpacked > 2);
    });
}

#[test]
fn the_bound_is_held() {
    on_a_machine(64 << 10, async |store, _| {
        for _ in 0..20 {
            store.deliver(10_000).await;
        }
        assert_eq!(store.read(0, Part::Whole).await.1, 20);
        let held = store.shard.stats().message_cache_bytes;
        assert!((10_000..=64 << 10).contains(&held), "{held}");
    });
}

#[test]
fn what_is_over_a_megabyte_is_read_each_time() {
    on_a_machine(64 << 20, async |store, _| {
        store.deliver(3 << 20).await;
        let (first, reads) = store.read(1, Part::Whole).await;
        assert_eq!(first[0].prefix, "Delivered-To: b@example.org\r\n");
        assert_eq!((first[0].body.len(), store.shard.stats().message_cache_bytes), (3 << 20, 0));
        assert_eq!(store.read(1, Part::Whole).await, (first, reads));
    });
}

#[test]
fn a_cache_of_nothing_is_off() {
    on_a_machine(0, async |store, _| {
        store.deliver(5000).await;
        let (first, _) = store.read(1, Part::Whole).await;
        assert_eq!(store.read(1, Part::Whole).await, (first, 1));
        let stats = store.shard.stats();
        assert_eq!((stats.message_cache_bytes, stats.message_cache_hits, stats.message_cache_misses), (0, 0, 0));
    });
}

#[test]
fn damage_gets_into_no_cache() {
    on_a_machine(1 << 20, async |store, sim| {
        store.deliver(5000).await;
        let file = sim.files("shard-0000/wal/").into_iter().map(|(file, _)| file).max().unwrap();
        let last = sim.contents(&file).unwrap().iter().rposition(|&byte| byte != 0).unwrap();
        let flip = |sim: &Sim| sim.damage(&file, |bytes| bytes[4096..=last].iter_mut().for_each(|byte| *byte ^= 1));
        flip(&sim);
        let inbox = store.inboxes[0];
        let found = store.shard.messages(inbox, UidSet::range(1..=1)).await.unwrap()[0];
        for _ in 0..2 {
            store.shard.read_message(&found.message, inbox, Part::Whole).await.expect_err("every record is damaged");
        }
        assert_eq!(store.shard.stats().message_cache_bytes, 0);
        flip(&sim);
        assert_eq!(store.read(0, Part::Whole).await.1, 1);
    });
}
