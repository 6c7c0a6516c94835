//! The engine's public face on real files, one operation at a time. `cargo bench` measures; `cargo test --benches` runs
//! everything once with tiny input.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use posthaste_bench::corpus::{Corpus, Fill};
use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MailboxId};
use posthaste_engine::io::real::{IoKind, RealIo, run_worker};
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;
use tempfile::TempDir;

type Store = Local<RealIo>;

/// The median of real mail.
const MESSAGE_OCTETS: usize = 6700;
const USER: &str = "user@example.org";

/// Whether to measure, and not just to run.
fn measures() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// As many as stated where it measures, few otherwise.
fn scaled(count: u32) -> u32 {
    if measures() { count } else { count.min(20) }
}

fn message(octets: usize) -> Vec<u8> {
    Corpus::synthetic(octets, Fill::Words).mail.remove(0).bytes
}

fn prepare(packer: &mut Packer, message: &[u8]) -> Prepared {
    let header = message.windows(4).position(|window| window == b"\r\n\r\n").map_or(message.len(), |at| at + 4);
    Prepared::new(packer, message, header, &[7; 300], 1_800_000_000_000)
}

fn target(account: AccountId) -> Target {
    Target {
        account,
        mailbox: TargetMailbox::Inbox,
        prefix: b"Return-Path: <sender@example.net>\r\n".to_vec(),
        flags: Vec::new(),
        internal_date: None,
    }
}

/// An open store of one shard and one account.
struct Open {
    // Its shards end with it.
    _worker: Worker<Store>,
    shard: Shard<Store>,
    account: AccountId,
    inbox: MailboxId,
}

async fn open(io: RealIo) -> Open {
    // No checkpoint comes between.
    let config = StoreConfig { shard: ShardConfig { checkpoint_bytes: 1 << 30, ..ShardConfig::default() } };
    let storage = Local::new(io);
    let superblock = open_superblock(&storage, 1).await.expect("the store opens");
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    let seat = seats.remove(0);
    let (worker, _) = Worker::open(storage, Arc::clone(&cluster), seat, config).await.expect("the shard opens");
    if cluster.directory().find(USER).is_none() {
        let account = NewAccount { name: USER.to_owned(), password: String::new() };
        worker.add_accounts(vec![account]).await.expect("an account can be made");
    }
    let account = cluster.directory().find(USER).expect("it was made");
    let shard = worker.local(account.shard).expect("there is one worker");
    let inbox = shard.inbox(account.account).await.expect("the account has an INBOX");
    Open { _worker: worker, shard, account: account.account, inbox }
}

/// Runs `work` on a worker with the store in `root`.
fn on_worker<T>(root: &Path, work: impl AsyncFnOnce(Open) -> T) -> T {
    let main = async |io| work(open(io).await).await;
    run_worker(IoKind::Auto, root.to_owned(), None, main).expect("a worker can run")
}

/// Delivers `count` messages, `in_flight` at a time.
async fn deliver(store: &Open, message: &[u8], count: u64, in_flight: u64) {
    let mut tasks = Vec::new();
    for task in 0..in_flight {
        let (shard, account, message) = (store.shard.clone(), store.account, message.to_vec());
        let share = count / in_flight + u64::from(task < count % in_flight);
        tasks.push(tokio::task::spawn_local(async move {
            let mut packer = Packer::default();
            for _ in 0..share {
                let prepared = Arc::new(prepare(&mut packer, &message));
                let results = shard.deliver(prepared, vec![target(account)]).await;
                assert!(results[0].is_ok(), "{results:?}");
            }
        }));
    }
    for task in tasks {
        task.await.expect("no delivery panics");
    }
}

/// A directory with a store of `count` messages that was not stopped.
fn filled(count: u32) -> TempDir {
    let directory = tempfile::tempdir().expect("a directory can be made");
    on_worker(directory.path(), async |store| deliver(&store, &message(MESSAGE_OCTETS), count.into(), 64).await);
    directory
}

/// Compressing a message into a record, without any I/O.
fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("append");
    for octets in [MESSAGE_OCTETS, 100_000] {
        let (message, mut packer) = (message(octets), Packer::default());
        group.throughput(Throughput::Bytes(octets as u64));
        group.bench_function(BenchmarkId::from_parameter(octets), |bencher| {
            bencher.iter(|| prepare(&mut packer, black_box(&message)));
        });
    }
}

/// Durable deliveries, compression included.
fn commit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("commit");
    group.sample_size(10).throughput(Throughput::Elements(1));
    let message = message(MESSAGE_OCTETS);
    for in_flight in [1, 16, 128] {
        let directory = tempfile::tempdir().expect("a directory can be made");
        group.bench_function(BenchmarkId::new("in flight", in_flight), |bencher| {
            bencher.iter_custom(|count| {
                on_worker(directory.path(), async |store| {
                    let start = Instant::now();
                    deliver(&store, &message, count, in_flight).await;
                    start.elapsed()
                })
            });
        });
    }
}

/// Opening a store whose log has to be replayed.
fn replay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("replay");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    for records in [1000, 10_000] {
        let source = filled(scaled(records));
        group.throughput(Throughput::Elements(scaled(records).into()));
        group.bench_function(BenchmarkId::new("records", records), |bencher| {
            bencher.iter_custom(|count| (0..count).map(|_| replay_once(source.path())).sum());
        });
    }
}

fn replay_once(source: &Path) -> Duration {
    let directory = tempfile::tempdir().expect("a directory can be made");
    copy(source, directory.path()).expect("a store can be copied");
    let start = Instant::now();
    on_worker(directory.path(), async |store| {
        assert!(store.shard.status(store.inbox).is_some_and(|status| status.exists > 0));
        start.elapsed()
    })
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
            // Recovery syncs what it replays, and must not pay for the copy.
            fs::File::open(target)?.sync_all()?;
        }
    }
    Ok(())
}

/// Reading messages that the page cache has.
fn fetch(criterion: &mut Criterion) {
    let messages = scaled(1000);
    let directory = filled(messages);
    let mut group = criterion.benchmark_group("fetch");
    for (name, part) in [("whole", Part::Whole), ("header", Part::Header), ("digest", Part::Digest)] {
        group.throughput(Throughput::Elements(1));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                on_worker(directory.path(), async |store| {
                    let all = store.shard.messages(store.inbox, UidSet::range(1..=messages)).await;
                    let all = all.expect("the mailbox can be read");
                    let start = Instant::now();
                    for found in all.iter().cycle().take(count as usize) {
                        let bytes = store.shard.read_message(&found.message, store.inbox, part).await;
                        black_box(bytes.expect("the message can be read"));
                    }
                    start.elapsed()
                })
            });
        });
    }
}

/// STORE, durable: one message, and all of a mailbox.
fn flags(criterion: &mut Criterion) {
    let messages = scaled(1000);
    let directory = filled(messages);
    let mut group = criterion.benchmark_group("flags");
    group.sample_size(10);
    for (name, last) in [("one", 1), ("all", messages)] {
        group.throughput(Throughput::Elements(last.into()));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|count| {
                on_worker(directory.path(), async |store| {
                    let start = Instant::now();
                    for turn in 0..count {
                        // Every time something changes.
                        let op = if turn % 2 == 0 { FlagOp::Add } else { FlagOp::Remove };
                        let (uids, flags) = (UidSet::range(1..=last), vec![FlagName::Flagged]);
                        let stored = store.shard.store_flags(store.inbox, uids, op, flags, None).await;
                        black_box(stored.expect("flags can be stored"));
                    }
                    start.elapsed()
                })
            });
        });
    }
}

criterion_group!(benches, append, commit, replay, fetch, flags);
criterion_main!(benches);
