//! A mailbox of thousands of messages, of which some here and there are changed and expunged: what the index and the sessions make of
//! many at once is what a list makes of one after another.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;
use std::sync::Arc;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{MailboxId, ModSeq, ShardId, Uid};
use posthaste_engine::io::sim::{SeededRandom, Sim, SimIo};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;
use posthaste_engine::view::View;

const NAME: &str = "a@example.org";

/// By UID.
type Messages = BTreeMap<u32, (Flags, ModSeq)>;

struct Store {
    worker: Worker<Local<SimIo>>,
    shard: Shard<Local<SimIo>>,
    inbox: MailboxId,
}

async fn open(io: SimIo) -> Store {
    let storage = Local::new(io);
    let superblock = open_superblock(&storage, 1).await.unwrap();
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let shard = ShardConfig { segment_size_bytes: 8 << 20, ..ShardConfig::default() };
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
    async fn deliver(&self) {
        let prepared = Arc::new(Prepared::new(&mut Packer::new(1), b"A: b\r\n\r\n", 8, b"digest", 0));
        let account = self.worker.cluster().directory().find(NAME).unwrap().account;
        let mailbox = TargetMailbox::Inbox;
        let target = Target { account, mailbox, prefix: Vec::new(), flags: Vec::new(), internal_date: None };
        self.shard.deliver(prepared, vec![target]).await.remove(0).unwrap();
    }

    async fn deliver_and_note(&self, expected: &mut Messages) {
        self.deliver().await;
        let status = self.shard.status(self.inbox).unwrap();
        expected.insert(status.uid_next - 1, (Flags::NONE, ModSeq(status.highest_modseq)));
    }

    /// Copies some of the messages, at least one, behind the others.
    async fn copy(&self, uids: UidSet, expected: &mut Messages) {
        let copied = self.shard.copy(self.inbox, uids, self.inbox).await.unwrap();
        let modseq = ModSeq(self.shard.status(self.inbox).unwrap().highest_modseq);
        for (from, to) in copied.pairs {
            let (flags, _) = expected[&from.0];
            expected.insert(to.0, (flags, modseq));
        }
    }

    /// The flags and mod-sequences that the index has.
    async fn found(&self) -> Messages {
        let infos = self.shard.messages(self.inbox, UidSet::range(1..=u32::MAX)).await.unwrap();
        infos.into_iter().map(|info| (info.message.uid.0, (info.flags, info.message.modseq))).collect()
    }
}

/// The UIDs that a client knows of from responses.
struct Client {
    view: View<Local<SimIo>>,
    uids: Vec<u32>,
}

impl Client {
    async fn select(store: &Store, expected: &Messages) -> Self {
        let view = store.shard.select(store.inbox, true).await.unwrap();
        let unseen = expected.values().position(|(flags, _)| !flags.contains(Flags::SEEN));
        assert_eq!(view.first_unseen(), unseen.map(|at| at as u32 + 1), "the first unseen");
        let client = Self { view, uids: expected.keys().copied().collect() };
        client.assert_numbers();
        client
    }

    fn assert_numbers(&self) {
        assert_eq!(self.view.exists() as usize, self.uids.len());
        assert!(self.view.uids().iter().map(|uid| uid.0).eq(self.uids.iter().copied()));
        for (sequence, &uid) in (1..).zip(&self.uids) {
            assert_eq!(self.view.uid_of(sequence), Some(Uid(uid)));
            assert_eq!(self.view.sequence_of(Uid(uid)), Some(sequence));
        }
    }

    async fn sync(&mut self, expected: &Messages) {
        let known = self.uids.clone();
        let since = self.view.highest_modseq();
        let changes = self.view.sync(true).await.unwrap();
        let mut gone = Vec::new();
        for &sequence in &changes.expunged {
            gone.push(self.uids.remove(sequence as usize - 1));
        }
        assert!(changes.expunged_uids.iter().map(|uid| uid.0).eq(gone), "the UIDs of EXPUNGE responses");
        let changed = |(_, (_, modseq)): &(&u32, &(Flags, ModSeq))| *modseq > since;
        let changed = expected.iter().filter(|(uid, _)| known.binary_search(uid).is_ok()).filter(changed);
        let told = changes.flags.iter().map(|(_, uid, flags, modseq)| (uid.0, (*flags, *modseq)));
        assert!(told.eq(changed.map(|(uid, found)| (*uid, *found))), "changed flags");
        let last = known.last().copied().unwrap_or_default();
        self.uids.extend(expected.keys().copied().filter(|&uid| uid > last));
        assert!(self.uids.iter().eq(expected.keys()), "the client knows what there is");
        self.assert_numbers();
    }
}

/// Some UIDs here and there, or close together, or all of them.
fn some(random: &mut SeededRandom, last: u32) -> UidSet {
    let mut below = |limit: u32| random.below(limit.into()) as u32;
    let (first, step) = (below(last) + 1, below(5) as usize + 1);
    let len = [10, 300, last][below(3) as usize];
    (first..=last.min(first + len)).step_by(step).map(Uid).collect()
}

#[test]
fn many_at_once_come_to_the_same_as_one_after_another() {
    for seed in 0..24 {
        println!("seed {seed}");
        let sim = Sim::new(seed);
        let of_test = sim.clone();
        sim.run(async move {
            let mut random = SeededRandom::new(seed);
            let mut store = open(of_test.io()).await;
            store.deliver().await;
            let mut expected = store.found().await;
            while expected.len() < 2000 {
                store.copy(UidSet::range(1..=u32::MAX), &mut expected).await;
            }
            assert_eq!(store.found().await, expected);
            let mut clients = [Client::select(&store, &expected).await, Client::select(&store, &expected).await];
            for _ in 0..30 {
                let last = expected.keys().last().copied().unwrap_or(1);
                let uids = some(&mut random, last);
                let shard = &store.shard;
                match random.below(8) {
                    0..=2 => {
                        let (op, name, flag) = match random.below(4) {
                            0 => (FlagOp::Remove, FlagName::Seen, Flags::SEEN),
                            1 => (FlagOp::Add, FlagName::Flagged, Flags::FLAGGED),
                            _ => (FlagOp::Add, FlagName::Seen, Flags::SEEN),
                        };
                        let stored = shard.store_flags(store.inbox, uids.clone(), op, vec![name], None).await.unwrap();
                        for (uid, (flags, modseq)) in expected.iter_mut().filter(|(uid, _)| uids.contains(Uid(**uid))) {
                            let new = if op == FlagOp::Add { flags.with(flag) } else { flags.without(flag) };
                            assert_eq!(stored.changed.contains(Uid(*uid)), new != *flags, "UID {uid} is changed");
                            if new != *flags {
                                (*flags, *modseq) = (new, stored.modseq.unwrap());
                            }
                        }
                    }
                    3 => {
                        let gone = shard.expunge_messages(store.inbox, uids.clone()).await.unwrap();
                        assert!(gone.iter().eq(expected.keys().map(|&uid| Uid(uid)).filter(|&uid| uids.contains(uid))));
                        expected.retain(|&uid, _| !uids.contains(Uid(uid)));
                    }
                    4 => {
                        let deleted = vec![FlagName::Deleted];
                        shard.store_flags(store.inbox, uids.clone(), FlagOp::Add, deleted, None).await.unwrap();
                        shard.expunge(store.inbox, None).await.unwrap();
                        expected.retain(|&uid, _| !uids.contains(Uid(uid)));
                    }
                    5 if expected.len() < 3000 => store.copy(uids, &mut expected).await,
                    6 => shard.checkpoint().await.unwrap(),
                    7 => {
                        drop(clients);
                        store.worker.stop().await.unwrap();
                        store = open(of_test.io()).await;
                        clients = [Client::select(&store, &expected).await, Client::select(&store, &expected).await];
                    }
                    _ => store.deliver_and_note(&mut expected).await,
                }
                assert_eq!(store.found().await, expected);
                // One hears of everything at once, the other of much together.
                clients[0].sync(&expected).await;
                if random.below(4) == 0 {
                    clients[1].sync(&expected).await;
                }
            }
            store.worker.stop().await.unwrap();
        })
        .expect("no crash is planned");
    }
}
