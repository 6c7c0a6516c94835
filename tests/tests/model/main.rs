//! Random operations of several sessions against a plain map, on a node that is stopped and crashed at random. After each
//! operation and each start the whole store must be what the map is.
//!
//! `PROPTEST_CASES` sets the number of cases, `POSTHASTE_SEED` the seed they come from.

mod mirror;
mod node;
mod ops;
mod words;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use posthaste_engine::io::sim::{Sim, SimIo};
use posthaste_engine::node::{StoreConfig, Worker};
use posthaste_engine::shard::{ShardConfig, ShardStats};
use posthaste_tests::far::{Store, set_far};
use posthaste_tests::model::{Account, How, Model};
use posthaste_tests::simulation::check_everything;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use node::{Run, open};
use ops::{Op, Pick, Recipient, Script, Uids, script};
use words::{Outcome, expect, said};

const SHARDS: u32 = 5;
/// The first two share a shard.
const ACCOUNTS: [&str; 4] = ["a@example.org", "g@example.org", "b@example.org", "d@example.org"];
const SESSIONS: usize = 4;
const SEEDS_OF_A_REDUCTION: u64 = 30;

thread_local! {
    /// What all cases together made the engine do.
    static TOTALS: Cell<ShardStats> = Cell::default();
}

/// Runs a script.
fn play(script: Script) -> Outcome<()> {
    let sim = Sim::new(script.seed);
    set_far(script.seed.is_multiple_of(4));
    let config = StoreConfig {
        shard: ShardConfig {
            segment_size_bytes: script.segment_kb << 10,
            checkpoint_bytes: script.checkpoint_kb << 10,
            index_cache_bytes: 1024,
            ..ShardConfig::default()
        },
    };
    let model = Model { accounts: vec![Account::default(); ACCOUNTS.len()], origins: 0 };
    let mut run = Run {
        model,
        ids: BTreeMap::new(),
        deleted: Vec::new(),
        origins: BTreeMap::new(),
        next_op: 0,
        stats: ShardStats::default(),
    };
    let script = Rc::new(script);
    let mut start = Start { workers: 2, was_stopped: false };
    loop {
        let (io, its_config, its_script) = (sim.io(), config.clone(), Rc::clone(&script));
        let ended = sim.run(async move {
            let result = live(&io, &its_config, &its_script, start, &mut run).await;
            (run, result)
        });
        let result;
        (run, result) = ended.expect("no crash is planned while operations run");
        let number = run.next_op.saturating_sub(1);
        let next = result.map_err(|what| format!("operation {number}, {:?}: {what}", script.ops.get(number)))?;
        let Some(Op::Reopen { stop, workers, crash_while_opening }) = next else { break };
        if !stop {
            sim.crash_now();
        }
        check_everything(&sim).map_err(|violation| violation.0)?;
        start = Start { workers: usize::from(workers), was_stopped: stop };
        if let Some(after) = crash_while_opening {
            sim.crash_after(Some(u64::from(after)));
            let (io, its_config) = (sim.io(), config.clone());
            let opened = sim.run(async move { open(&io, &its_config, start.workers).await.map(|_| ()) });
            opened.unwrap_or(Ok(())).map_err(said)?;
            sim.crash_now();
            start.was_stopped = false;
        }
    }
    TOTALS.set(sum(TOTALS.get(), run.stats));
    Ok(())
}

#[derive(Clone, Copy)]
struct Start {
    workers: usize,
    was_stopped: bool,
}

fn sum(a: ShardStats, b: ShardStats) -> ShardStats {
    ShardStats {
        compactions: a.compactions + b.compactions,
        segments_compacted: a.segments_compacted + b.segments_compacted,
        compacted_bytes_read: a.compacted_bytes_read + b.compacted_bytes_read,
        compacted_bytes_written: a.compacted_bytes_written + b.compacted_bytes_written,
        batches: a.batches + b.batches,
        records: a.records + b.records,
        log_bytes: a.log_bytes + b.log_bytes,
        segments_sealed: a.segments_sealed + b.segments_sealed,
        checkpoints: a.checkpoints + b.checkpoints,
        checkpoints_failed: a.checkpoints_failed + b.checkpoints_failed,
        index_loads: a.index_loads + b.index_loads,
        index_cache_hits: a.index_cache_hits + b.index_cache_hits,
        index_cache_bytes: a.index_cache_bytes + b.index_cache_bytes,
        mailboxes_in_use: a.mailboxes_in_use + b.mailboxes_in_use,
        mailboxes_at_rest: a.mailboxes_at_rest + b.mailboxes_at_rest,
        at_rest_bytes: a.at_rest_bytes + b.at_rest_bytes,
        indexes_rebuilt: a.indexes_rebuilt + b.indexes_rebuilt,
        record_reads: a.record_reads + b.record_reads,
        record_read_bytes: a.record_read_bytes + b.record_read_bytes,
        body_frames_unpacked: a.body_frames_unpacked + b.body_frames_unpacked,
        message_cache_hits: a.message_cache_hits + b.message_cache_hits,
        message_cache_misses: a.message_cache_misses + b.message_cache_misses,
        message_cache_bytes: a.message_cache_bytes + b.message_cache_bytes,
        scrub_passes: a.scrub_passes + b.scrub_passes,
        scrub_finished_ms: a.scrub_finished_ms.max(b.scrub_finished_ms),
        scrub_bytes: a.scrub_bytes + b.scrub_bytes,
        scrub_findings: a.scrub_findings + b.scrub_findings,
    }
}

/// One life of the node: up to the next reopening, which it returns, or the end of the script.
async fn live(io: &SimIo, config: &StoreConfig, script: &Script, start: Start, run: &mut Run) -> Outcome<Option<Op>> {
    let (mut node, reports) = open(io, config, start.workers).await.map_err(said)?;
    for report in &reports {
        expect("damage after a start", &report.damage, &Vec::new())?;
        if start.was_stopped {
            expect("what a start after a stop replays", report.records, 0)?;
        }
    }
    node.find_accounts().await.map_err(said)?;
    node.compare(run).await.map_err(|what| format!("after a start: {what}"))?;
    let mut next = None;
    while let Some(op) = script.ops.get(run.next_op) {
        run.next_op += 1;
        if matches!(op, Op::Reopen { .. }) {
            next = Some(op.clone());
            break;
        }
        node.apply(run, op).await?;
        node.compare(run).await?;
    }
    for shard in node.workers.iter().flat_map(Worker::shards) {
        expect("failed checkpoints", shard.stats().checkpoints_failed, 0)?;
        run.stats = sum(run.stats, shard.stats());
    }
    // Sessions end before the node does.
    node.sessions = Default::default();
    if matches!(next, Some(Op::Reopen { stop: true, .. })) {
        for worker in &node.workers {
            worker.stop().await.map_err(said)?;
        }
    }
    Ok(next)
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Leaves out operations that a failure does not need. What a crash leaves is up to the seed, and other operations draw
/// other numbers from it: a script without some of them gets several seeds.
fn reduce(mut script: Script) -> Script {
    let fails =
        |script: &Script| std::panic::catch_unwind(|| play(script.clone())).map_or(true, |played| played.is_err());
    let mut left_out = script.ops.len().div_ceil(2);
    while left_out > 0 {
        let before = script.ops.len();
        let mut end = script.ops.len();
        while end > 0 {
            let start = end.saturating_sub(left_out);
            let mut shorter = script.clone();
            shorter.ops.drain(start..end);
            let seeds = std::iter::once(script.seed).chain(0..SEEDS_OF_A_REDUCTION);
            if let Some(failing) = seeds.map(|seed| Script { seed, ..shorter.clone() }).find(|script| fails(script)) {
                script = failing;
            }
            end = start;
        }
        if script.ops.len() == before {
            left_out /= 2;
        }
    }
    script
}

#[test]
fn the_store_is_what_a_plain_map_is() {
    let seed = variable("POSTHASTE_SEED").unwrap_or(1);
    let cases = variable("PROPTEST_CASES").unwrap_or(300) as u32;
    println!("seed {seed}, {cases} cases");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 300, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let result = runner.run(&script(), |script| play(script).map_err(TestCaseError::fail));
    match result {
        Err(TestError::Fail(_, script)) => {
            let script = reduce(script);
            let what = play(script.clone()).err();
            panic!("seed {seed}: {what:?} after {script:?}");
        }
        result => result.unwrap_or_else(|error| panic!("seed {seed}: {error}")),
    }
    let totals = TOTALS.get();
    println!("{totals:?}");
    assert!(totals.segments_compacted > 0, "nothing has been compacted");
    assert!(totals.segments_sealed > 0 && totals.checkpoints > 0, "segments and checkpoints were too large to matter");
}

#[test]
fn a_view_hears_of_a_change_that_hides_among_arrivals() {
    let [seen, other] = [0, 1].map(|mailbox| Pick { account: 0, mailbox, is_gone: false });
    let deliver = |mailbox| {
        let recipient = Recipient { mailbox, flags: Vec::new(), date: Some((0, 0)) };
        Op::Deliver { recipients: vec![recipient], twice: false, lines: 0 }
    };
    let sync = || Op::Sync { session: 0, allow_expunge: true };
    let copy = || Op::Transfer { from: other, uids: Uids(u64::MAX), to: seen, is_move: false };
    // What is copied together has one mod-sequence; then one of these and an older message are changed at once.
    let store =
        |uids| Op::Store { mailbox: seen, uids: Uids(uids), how: How::Add, flags: vec![2], unchanged_since: None };
    let ops = vec![
        Op::Create { account: 0, name: 1 },
        deliver(seen),
        deliver(other),
        deliver(other),
        Op::Select { session: 0, mailbox: seen, claim_recent: false },
        sync(),
        copy(),
        store(1 << 1 | 1 << 3),
        sync(),
        copy(),
        Op::Expunge { mailbox: seen, mark: Some(Uids(1 << 2)), among: None },
        store(1 << 4 | 1 << 5),
        sync(),
        copy(),
        sync(),
    ];
    if let Err(what) = play(Script { seed: 1, segment_kb: 64, checkpoint_kb: 32, ops }) {
        panic!("{what}");
    }
}

/// The store remembers the last thousand expunges of a mailbox: a view that is further behind compares UIDs.
#[test]
fn a_view_catches_up_from_before_the_expunge_history() {
    let inbox = Pick { account: 0, mailbox: 0, is_gone: false };
    let recipient = || Recipient { mailbox: inbox, flags: Vec::new(), date: Some((0, 0)) };
    let deliver = |count| Op::Deliver { recipients: vec![recipient(); count], twice: false, lines: 0 };
    let mut ops = vec![deliver(3), Op::Select { session: 0, mailbox: inbox, claim_recent: true }];
    // UIDs 1, 65, 129 and so on: one of those that the view knows, and many that it never hears of.
    ops.push(Op::Expunge { mailbox: inbox, mark: Some(Uids(1 << 1)), among: None });
    for uid in 4..1060_u32 {
        ops.push(deliver(1));
        if uid % 64 != 2 && uid % 64 != 3 {
            ops.push(Op::Expunge { mailbox: inbox, mark: Some(Uids(1 << (uid % 64))), among: None });
        }
        if uid % 100 == 0 {
            ops.push(Op::Sync { session: 0, allow_expunge: false });
        }
    }
    ops.extend([Op::Checkpoint { account: 0 }, Op::Sync { session: 0, allow_expunge: true }]);
    if let Err(what) = play(Script { seed: 1, segment_kb: 64, checkpoint_kb: 32, ops }) {
        panic!("{what}");
    }
}
