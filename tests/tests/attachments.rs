//! Bodies with base64 in them, through delivery, restart and compaction: they come back byte for byte, and take less.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::check::check_shard;
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::base64_lines::put_lines;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MailboxId, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{SeededRandom, Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::reading::Piece;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;

type Disk = Local<SimIo>;

const NAME: &str = "a@example.org";
const HEADER: &[u8] = b"Subject: attachments\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n";
const PREFIX: &[u8] = b"X: 1\r\n";

struct Store {
    worker: Worker<Disk>,
    shard: Shard<Disk>,
    account: AccountId,
    inbox: MailboxId,
}

async fn open(io: &SimIo, segment_size_bytes: u64) -> Store {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let shard = ShardConfig { segment_size_bytes, message_cache_bytes: 0, ..ShardConfig::default() };
    let opened = Worker::open(storage, Arc::clone(&cluster), seats.remove(0), StoreConfig { shard }).await;
    let worker = opened.unwrap().0;
    if cluster.directory().find(NAME).is_none() {
        let account = NewAccount { name: NAME.to_owned(), password: String::new() };
        worker.add_accounts(vec![account]).await.unwrap();
    }
    let account = cluster.directory().find(NAME).unwrap().account;
    let shard = worker.local(ShardId(0)).unwrap();
    let inbox = shard.inbox(account).await.unwrap();
    Store { worker, shard, account, inbox }
}

impl Store {
    async fn deliver(&self, body: &[u8]) -> Uid {
        let message = [HEADER, body].concat();
        // One half has its prefix in the header's frame, one in the head.
        let (with_header, in_head) = if body.len().is_multiple_of(2) { (PREFIX, &b""[..]) } else { (&b""[..], PREFIX) };
        let mut packer = Packer::default();
        let prepared = Prepared::with_prefix(&mut packer, with_header, &message, HEADER.len(), b"digest", 1);
        let prepared = Arc::new(prepared);
        let target = Target {
            account: self.account,
            mailbox: TargetMailbox::Inbox,
            prefix: in_head.to_vec(),
            flags: Vec::new(),
            internal_date: None,
        };
        self.shard.deliver(prepared, vec![target]).await.remove(0).unwrap().uid
    }

    /// The messages that are there are these bodies, read at once and by ranges.
    async fn expect(&self, bodies: &[Vec<u8>], random: &mut SeededRandom, when: &str) {
        for info in self.shard.messages(self.inbox, UidSet::range(1..=10_000)).await.unwrap() {
            let (uid, body) = (info.message.uid, &bodies[info.message.uid.0 as usize - 1]);
            let start = self.shard.read_message(&info.message, self.inbox, Part::Header).await.unwrap();
            assert!(start.prefix == PREFIX && start.header == HEADER, "{when}, UID {uid}: another header");
            let whole = self.shard.read_message(&info.message, self.inbox, Part::Whole).await.unwrap();
            assert!(whole.body == *body, "{when}, UID {uid}: another body");
            assert!(whole.prefix == PREFIX && whole.header == HEADER, "{when}, UID {uid}: another header");
            let all = [PREFIX, HEADER, body].concat();
            assert_eq!(info.message.size, all.len() as u64);
            let from = random.below(all.len() as u64);
            let to = from + random.below(all.len() as u64 / 2);
            let reading = self.shard.open_message(&info.message, self.inbox).await.unwrap();
            let mut reading = reading.only(from..to);
            let mut octets = Vec::new();
            while let Some(Piece::Header(piece) | Piece::Body(piece)) = reading.next().await.unwrap() {
                octets.extend_from_slice(&piece);
            }
            let expected = &all[from as usize..all.len().min(to as usize)];
            // What is small comes with its surroundings.
            let is_there = if octets.len() == expected.len() { octets == expected } else { octets == all };
            assert!(is_there, "{when}, UID {uid}: other octets from {from} to {to}");
        }
    }

    async fn expect_no_findings(&self, io: &SimIo, when: &str) {
        let store = self.worker.cluster().superblock.store;
        let check = check_shard(&Local::new(io.clone()), ShardId(0), store, |_, _| ()).await.unwrap();
        let findings: Vec<String> = check.findings.into_iter().map(|finding| finding.what).collect();
        assert_eq!(findings, Vec::<String>::new(), "{when}");
    }
}

fn noise(random: &mut SeededRandom, octets: u64) -> Vec<u8> {
    (0..octets).map(|_| random.below(256) as u8).collect()
}

fn text(content: &[u8], line_octets: usize) -> Vec<u8> {
    let mut text = Vec::new();
    put_lines(content, line_octets, usize::MAX, &mut text);
    text
}

/// A piece of a body: base64 of some length, and what is nearly that.
fn piece(random: &mut SeededRandom) -> Vec<u8> {
    let line_octets = [76, 76, 76, 72, 64, 60, 40, 36, 1020, 4][random.below(10) as usize];
    let octets = match random.below(8) {
        // About the least that is looked for.
        0 | 1 => 2950 + random.below(100),
        2 => random.below(300),
        3 => 50_000 + random.below(200_000),
        // As much as a block has.
        4 => 246_238 + random.below(5),
        _ => random.below(12_000),
    };
    let mut piece = text(&noise(random, octets), line_octets);
    match random.below(10) {
        // The last line has no end, or half of one.
        0 => piece.truncate(piece.len().saturating_sub(2)),
        1 => piece.truncate(piece.len().saturating_sub(1)),
        // Ends in the middle of a line.
        2 => piece.truncate(piece.len() - random.below(piece.len() as u64 + 1) as usize),
        3 if !piece.is_empty() => {
            let at = random.below(piece.len() as u64) as usize;
            piece[at] = b"=-\r\n /A"[random.below(7) as usize];
        }
        4 => piece.retain(|&octet| octet != b'\r'),
        // Padding that is wrong, or says something.
        5 => piece
            .extend_from_slice([&b"QR==\r\n"[..], b"QQ=\r\n", b"====\r\n", b"QQ==QQ==\r\n"][random.below(4) as usize]),
        // Lines of another length go on.
        6 => piece.extend(text(&noise(random, 5000), 72)),
        _ => {}
    }
    piece
}

fn odd_body(random: &mut SeededRandom) -> Vec<u8> {
    let mut body = Vec::new();
    for _ in 0..random.below(6) {
        match random.below(3) {
            0 => body.extend_from_slice(b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n"),
            1 => (0..random.below(200)).for_each(|line| body.extend_from_slice(format!("line {line}\r\n").as_bytes())),
            _ => {}
        }
        body.extend(piece(random));
    }
    if random.below(6) == 0 {
        // Right at the size from which on there are blocks.
        let octets = (256 << 10) - 2 + random.below(5) as usize;
        body.resize(octets, b'x');
    }
    body
}

#[test]
fn bodies_of_odd_shapes_come_back_after_delivery_restart_and_compaction() {
    let seed = std::env::var("POSTHASTE_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in seed.map_or(1..=6, |seed: u64| seed..=seed) {
        println!("seed {seed}");
        let mut random = SeededRandom::new(seed);
        let bodies: Rc<Vec<Vec<u8>>> = Rc::new((0..40).map(|_| odd_body(&mut random)).collect());
        let sim = Sim::new(seed);
        let (io, given) = (sim.io(), Rc::clone(&bodies));
        sim.run(async move {
            let store = open(&io, 2 << 20).await;
            for body in given.iter() {
                store.deliver(body).await;
            }
            let mut random = SeededRandom::new(seed + 1);
            store.expect(&given, &mut random, "delivered").await;
            store.expect_no_findings(&io, "delivered").await;
            store.worker.stop().await.unwrap();
        })
        .unwrap();
        for (path, _) in sim.files("shard-0000/idx") {
            sim.remove_file(&path);
        }
        let io = sim.io();
        sim.run(async move {
            let mut random = SeededRandom::new(seed + 2);
            let store = open(&io, 2 << 20).await;
            store.expect(&bodies, &mut random, "from the log alone").await;
            for round in 0..2 {
                store.shard.compact(Choice::All).await.unwrap();
                store.expect(&bodies, &mut random, &format!("compacted, round {round}")).await;
                store.expect_no_findings(&io, "compacted").await;
            }
            store.worker.stop().await.unwrap();
        })
        .unwrap();
    }
}

/// A body of several attachments: more than lies in a message's record.
fn letter(number: usize, contents: &[Vec<u8>]) -> Vec<u8> {
    let mut body = format!("This is letter {number}.\r\n").into_bytes();
    for content in contents {
        body.extend_from_slice(b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n");
        body.extend(text(content, 76));
    }
    body.extend_from_slice(b"--b--\r\n");
    body
}

fn contents() -> Vec<Vec<u8>> {
    let mut random = SeededRandom::new(7);
    [150_000, 90_000, 300_000].map(|octets| noise(&mut random, octets)).to_vec()
}

const CONTENTS_OCTETS: u64 = 540_000;

/// Delivers letters at once, and says how much the log has grown.
async fn deliver_at_once(io: &SimIo, store: &Rc<Store>, bodies: &[Vec<u8>]) -> u64 {
    let before = store.shard.stats().log_bytes;
    let delivered = Rc::new(Cell::new(0));
    for body in bodies {
        let (store, body, delivered) = (Rc::clone(store), body.clone(), Rc::clone(&delivered));
        io.spawn(async move {
            store.deliver(&body).await;
            delivered.set(delivered.get() + 1);
        });
    }
    while delivered.get() < bodies.len() {
        io.sleep(Duration::from_millis(1)).await;
    }
    store.shard.stats().log_bytes - before
}

#[test]
fn what_the_segment_has_is_not_written_again() {
    for seed in 1..=4 {
        let sim = Sim::new(seed);
        let io = sim.io();
        sim.run(async move {
            let store = Rc::new(open(&io, 64 << 20).await);
            // They differ in their text, so that no two messages are the same.
            let letters: Vec<Vec<u8>> = (0..12).map(|_| letter(0, &contents())).collect();
            let grown = deliver_at_once(&io, &store, &letters[..6]).await;
            assert!(grown < CONTENTS_OCTETS * 11 / 10, "seed {seed}: {grown} octets for six at once");
            let before = store.shard.stats().log_bytes;
            for letter in &letters[6..] {
                store.deliver(letter).await;
            }
            let grown = store.shard.stats().log_bytes - before;
            assert!(grown < CONTENTS_OCTETS / 10, "seed {seed}: {grown} octets for six more");
            let mut random = SeededRandom::new(seed);
            store.expect(&letters, &mut random, "delivered").await;
            // The one that brought the contents goes, and the others keep them.
            store.shard.expunge_messages(store.inbox, UidSet::range(1..=6)).await.unwrap();
            store.shard.compact(Choice::All).await.unwrap();
            store.expect(&letters, &mut random, "compacted").await;
            store.expect_no_findings(&io, "compacted").await;
            assert_eq!(store.shard.status(store.inbox).unwrap().exists, 6);
            // What compaction has taken away is not named any more.
            let grown = deliver_at_once(&io, &store, &letters[..2]).await;
            assert!(grown > CONTENTS_OCTETS, "seed {seed}: {grown} octets for two in another segment");
            let bodies: Vec<Vec<u8>> = letters.iter().chain(&letters[..2]).cloned().collect();
            store.expect(&bodies, &mut random, "after compaction").await;
            store.worker.stop().await.unwrap();
        })
        .unwrap();
    }
}

/// Segments are sealed and compacted while letters arrive that have contents in common.
#[test]
fn letters_that_arrive_while_segments_go_keep_their_contents() {
    for seed in 1..=8 {
        println!("seed {seed}");
        let sim = Sim::new(seed);
        let (io, random_io) = (sim.io(), sim.clone());
        let bodies: Rc<Vec<Vec<u8>>> =
            Rc::new((0..36).map(|number| letter(number, &contents()[..2 + number % 2])).collect());
        let given = Rc::clone(&bodies);
        sim.run(async move {
            let store = Rc::new(open(&io, 1 << 20).await);
            let delivered = Rc::new(Cell::new(0));
            let got: Rc<RefCell<BTreeMap<Uid, Vec<u8>>>> = Rc::default();
            for sender in 0..3 {
                let (store, given, io) = (Rc::clone(&store), Rc::clone(&given), io.clone());
                let (delivered, got) = (Rc::clone(&delivered), Rc::clone(&got));
                io.clone().spawn(async move {
                    for body in given.iter().skip(sender).step_by(3) {
                        let uid = store.deliver(body).await;
                        got.borrow_mut().insert(uid, body.clone());
                        delivered.set(delivered.get() + 1);
                        io.sleep(Duration::from_micros(300)).await;
                    }
                });
            }
            while delivered.get() < given.len() {
                io.sleep(Duration::from_micros(random_io.below(3000))).await;
                store.shard.compact(Choice::All).await.unwrap();
            }
            store.shard.compact(Choice::All).await.unwrap();
            let mut random = SeededRandom::new(seed);
            let bodies: Vec<Vec<u8>> = got.take().into_values().collect();
            assert_eq!(bodies.len(), given.len());
            store.expect(&bodies, &mut random, "compacted meanwhile").await;
            store.expect_no_findings(&io, "compacted meanwhile").await;
            store.worker.stop().await.unwrap();
        })
        .unwrap();
    }
}

/// Attachments of more than 32 MB are not looked at by compaction: their blocks are copied, each once.
#[test]
fn blocks_that_a_large_message_names_again_are_copied_once() {
    let sim = Sim::new(1);
    let io = sim.io();
    sim.run(async move {
        let store = open(&io, 64 << 20).await;
        // As much as a block has, again and again.
        let content = noise(&mut SeededRandom::new(5), 246_240).repeat(103);
        let bodies = [1, 2].map(|number| letter(number, std::slice::from_ref(&content)));
        assert!(bodies[0].len() > 32 << 20);
        let before = store.shard.stats().log_bytes;
        for body in &bodies {
            store.deliver(body).await;
        }
        let grown = store.shard.stats().log_bytes - before;
        assert!(grown < 600_000, "{grown} octets written");
        let mut random = SeededRandom::new(6);
        store.expect(&bodies, &mut random, "delivered").await;
        for _ in 0..2 {
            let report = store.shard.compact(Choice::All).await.unwrap();
            assert!(report.bytes_after < 600_000, "{} octets copied", report.bytes_after);
            store.expect(&bodies, &mut random, "compacted").await;
            store.expect_no_findings(&io, "compacted").await;
        }
        store.worker.stop().await.unwrap();
    })
    .unwrap();
}

/// A message that brings nothing new waits for a commit of blocks all the same.
#[test]
fn what_is_known_takes_as_many_commits() {
    let sim = Sim::new(1);
    let io = sim.io();
    sim.run(async move {
        let store = open(&io, 64 << 20).await;
        // Nothing but base64, so that all of its blocks can be known.
        let body = text(&noise(&mut SeededRandom::new(8), 500_000), 76);
        let mut commits = Vec::new();
        for _ in 0..3 {
            let before = store.shard.stats().batches;
            store.deliver(&body).await;
            commits.push(store.shard.stats().batches - before);
        }
        assert_eq!(commits[1..], [2, 2], "{commits:?}");
        let mut random = SeededRandom::new(9);
        store.expect(&vec![body; 3], &mut random, "delivered").await;
        store.worker.stop().await.unwrap();
    })
    .unwrap();
}

/// What comes after the first megabyte of a header lies with the body: base64 in it is no attachment.
#[test]
fn a_header_that_ends_among_the_blocks_comes_back() {
    let sim = Sim::new(1);
    let io = sim.io();
    sim.run(async move {
        let store = open(&io, 8 << 20).await;
        let mut random = SeededRandom::new(3);
        let field = "X-Field: some value of this field\r\n".repeat(40_000);
        let header = [field.as_bytes(), &text(&noise(&mut random, 9000), 76), b"X: last\r\n\r\n"].concat();
        let body = letter(1, &[noise(&mut random, 10_000), noise(&mut random, 250_000)]);
        let message = [&header[..], &body].concat();
        let mut packer = Packer::default();
        let prepared = Arc::new(Prepared::with_prefix(&mut packer, PREFIX, &message, header.len(), b"digest", 1));
        let prefix = Vec::new();
        let (account, mailbox) = (store.account, TargetMailbox::Inbox);
        let target = Target { account, mailbox, prefix, flags: Vec::new(), internal_date: None };
        store.shard.deliver(prepared, vec![target]).await.remove(0).unwrap();
        for _ in 0..2 {
            let found = store.shard.messages(store.inbox, UidSet::one(Uid(1))).await.unwrap()[0];
            for part in [Part::Header, Part::Whole] {
                let read = store.shard.read_message(&found.message, store.inbox, part).await.unwrap();
                assert!(read.prefix == PREFIX && read.header == header);
                assert!(part == Part::Header || read.body == body);
            }
            store.shard.compact(Choice::All).await.unwrap();
        }
        store.worker.stop().await.unwrap();
    })
    .unwrap();
}
