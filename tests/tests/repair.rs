//! Rebuild and repair as an operator sees them: they may be interrupted anywhere, and keep what they replace.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::collections::BTreeMap;

use posthaste_engine::check::check_shard;
use posthaste_engine::error::EngineError;
use posthaste_engine::ids::{MailboxId, ShardId};
use posthaste_engine::io::sim::Sim;
use posthaste_engine::node::open_superblock;
use posthaste_engine::repair::Repair;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;
use posthaste_tests::damage::{dump, files_with_everything};

const SHARD: ShardId = ShardId(0);

type Files = BTreeMap<String, Vec<u8>>;

fn disk_with(files: &Files, seed: u64) -> Sim {
    let sim = Sim::new(seed);
    files.iter().for_each(|(path, bytes)| sim.put_file(path, bytes.clone()));
    sim
}

fn files_of(sim: &Sim) -> Files {
    sim.files("").into_iter().map(|(path, _)| (path.clone(), sim.contents(&path).unwrap())).collect()
}

/// Rebuilds, or checks and repairs; `None` if a crash came first.
fn mend(sim: &Sim, is_rebuild: bool) -> Option<Result<Vec<String>, EngineError>> {
    let io = sim.io();
    sim.run(async move {
        let storage = Local::new(io);
        let store = open_superblock(&storage, 1).await?.store;
        let config = ShardConfig { segment_size_bytes: 96 << 10, ..ShardConfig::default() };
        if is_rebuild {
            Shard::rebuild(storage, SHARD, store, config).await?;
            return Ok(Vec::new());
        }
        let check = check_shard(&storage, SHARD, store, |_, _| ()).await?;
        Ok(Shard::repair(storage, SHARD, store, config, &check, false).await?.kept)
    })
}

fn repaired(sim: &Sim) -> Repair {
    let io = sim.io();
    let repaired = sim.run(async move {
        let storage = Local::new(io);
        let store = open_superblock(&storage, 1).await?.store;
        let check = check_shard(&storage, SHARD, store, |_, _| ()).await?;
        Shard::repair(storage, SHARD, store, ShardConfig::default(), &check, false).await
    });
    repaired.unwrap().unwrap()
}

fn findings(sim: &Sim) -> Vec<String> {
    let io = sim.io();
    let checked = sim.run(async move {
        let storage = Local::new(io);
        let store = open_superblock(&storage, 1).await?.store;
        let findings = check_shard(&storage, SHARD, store, |_, _| ()).await?.findings.into_iter();
        Ok::<_, EngineError>(findings.map(|it| format!("{} at {}: {}", it.file, it.offset, it.what)).collect())
    });
    checked.unwrap().unwrap()
}

#[test]
fn a_crash_anywhere_in_a_rebuild_or_repair_loses_nothing() {
    let files = files_with_everything(11, true);
    let before = dump(&files).unwrap();
    // One footer and one index page; the pages of a blob come before its directory.
    let mut damaged = files.clone();
    let footer = damaged.keys().find(|path| path.contains("/seg/")).unwrap().clone();
    *damaged.get_mut(&footer).unwrap().last_mut().unwrap() ^= 1;
    let blob = damaged.keys().rfind(|path| path.contains("/idx/")).unwrap().clone();
    damaged.get_mut(&blob).unwrap()[60] ^= 1;
    let found = findings(&disk_with(&damaged, 1));
    assert_eq!(found.len(), 2, "{found:?}");
    for (is_rebuild, files) in [(true, &files), (false, &damaged)] {
        let (mut crashes, mut operations) = (0, 1);
        loop {
            let sim = disk_with(files, operations);
            sim.crash_after(Some(operations));
            let mended = mend(&sim, is_rebuild);
            sim.crash_after(None);
            assert_eq!(dump(&files_of(&sim)).unwrap(), before, "a crash after {operations}, rebuild: {is_rebuild}");
            if let Some(mended) = mended {
                mended.unwrap();
                assert_eq!(findings(&sim), Vec::<String>::new());
                break;
            }
            // Whoever was interrupted begins again.
            mend(&sim, is_rebuild).unwrap().unwrap();
            assert_eq!(findings(&sim), Vec::<String>::new(), "a crash after {operations}, rebuild: {is_rebuild}");
            assert_eq!(dump(&files_of(&sim)).unwrap(), before, "a crash after {operations}, rebuild: {is_rebuild}");
            crashes += 1;
            operations += 1 + operations / 12;
        }
        assert!(crashes > 10, "{crashes} crashes");
    }
}

#[test]
fn what_a_repair_replaces_is_kept() {
    let mut files = files_with_everything(12, true);
    let footer = files.keys().find(|path| path.contains("/seg/")).unwrap().clone();
    *files.get_mut(&footer).unwrap().last_mut().unwrap() ^= 1;
    let sim = disk_with(&files, 1);
    let kept = mend(&sim, false).unwrap().unwrap();
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(kept[0].starts_with("shard-0000/lost+found/seg-"), "{kept:?}");
    assert_eq!(sim.contents(&kept[0]).unwrap(), files[&footer]);
    assert_ne!(sim.contents(&footer).unwrap(), files[&footer]);
    // The same again has another name.
    sim.damage(&footer, |bytes| *bytes.last_mut().unwrap() ^= 1);
    let again = mend(&sim, false).unwrap().unwrap();
    assert_ne!(kept, again);
    assert_eq!(findings(&sim), Vec::<String>::new());
}

#[test]
fn an_index_whose_files_are_gone_is_rebuilt() {
    // Seeds 7050 and 7057 of the simulation.
    let files = files_with_everything(13, true);
    let before = dump(&files).unwrap();
    let sim = disk_with(&files, 1);
    for (path, _) in sim.files("shard-0000/idx/") {
        sim.remove_file(&path);
    }
    mend(&sim, true).unwrap().unwrap();
    assert_eq!(findings(&sim), Vec::<String>::new());
    assert_eq!(dump(&files_of(&sim)).unwrap(), before);
}

#[test]
fn a_message_that_is_lost_together_with_its_page_is_named() {
    let files = files_with_everything(14, true);
    let segment = files.keys().find(|path| path.contains("/seg/")).unwrap().clone();
    let damaged_at = |offset: usize| {
        let mut damaged = files.clone();
        damaged.get_mut(&segment).unwrap()[offset] ^= 1;
        damaged
    };
    // A record that damage takes, of messages that their mailboxes still have.
    let mut offsets = (4096..files[&segment].len()).step_by(61).map(|offset| (damaged_at(offset), offset));
    let (mut damaged, lost, offset) = offsets
        .find_map(|(damaged, offset)| {
            let sim = disk_with(&damaged, 1);
            let is_record = findings(&sim).iter().any(|found| found.contains("checksum of the record"));
            let lost = if is_record { repaired(&sim).lost } else { Vec::new() };
            let lost: Vec<(MailboxId, u32)> = lost.iter().map(|lost| (lost.mailbox, lost.uid.0)).collect();
            (!lost.is_empty()).then_some((damaged, lost, offset))
        })
        .unwrap();
    for (_, bytes) in damaged.iter_mut().filter(|(path, _)| path.contains("/idx/")) {
        // Pages and delta pages of mailboxes have kinds 5 and 2.
        let is_page = |at: &usize| bytes[*at..].starts_with(b"PHPG") && matches!(bytes[*at + 10], 2 | 5);
        let pages: Vec<usize> = (0..bytes.len().saturating_sub(60)).filter(is_page).collect();
        pages.into_iter().for_each(|at| bytes[at + 50] ^= 1);
    }
    let sim = disk_with(&damaged, 1);
    let repair = repaired(&sim);
    for message in &lost {
        assert!(repair.gone.contains(message), "{message:?} of {:?}, byte {offset}", repair.gone);
        let is_lost = repair.lost.iter().any(|lost| (lost.mailbox, lost.uid.0) == *message);
        assert!(!is_lost, "{message:?} is in no mailbox, byte {offset}");
    }
    // What is left is the record alone: mailboxes count what they have.
    let left = findings(&sim);
    assert!(left.iter().all(|found| !found.contains("/idx")), "{left:?}");
}
