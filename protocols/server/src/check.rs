//! `posthaste check`: reads all of a store that no server works on, and names what is damaged.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use posthaste_engine::check::check_shard;
use posthaste_engine::error::{EngineError, Finding};
use posthaste_engine::ids::{AccountId, MailboxId, ShardId};
use posthaste_engine::io::real::{IoKind, run_worker};
use posthaste_engine::node::Superblock;
use posthaste_engine::storage::Storage;
use posthaste_engine::storage::local::Local;

use crate::lock;

/// Checks the store in `data` and says on standard output what it found.
///
/// # Errors
/// Damage; or the store cannot be read, or is in use.
pub fn check(data: &Path, io: IoKind) -> Result<(), Box<dyn Error>> {
    if !data.is_dir() {
        return Err(format!("there is no data directory {}", data.display()).into());
    }
    let _lock = lock::lock(data)?;
    let checks = run_worker(io, data.to_owned(), None, async |io| {
        let storage = Local::new(io);
        let Some(bytes) = storage.read_superblock().await? else { return Ok(None) };
        let superblock = match Superblock::decode(&bytes) {
            Ok(superblock) => superblock,
            Err(error) => return Ok(Some(Err(error))),
        };
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes} {msg}") {
            bar.set_style(style);
        }
        let mut checks = Vec::new();
        for shard in (0..superblock.shards).map(ShardId) {
            bar.set_message(format!("of shard {shard}"));
            let progress = |done, all| {
                bar.set_length(all);
                bar.set_position(done);
            };
            checks.push((shard, check_shard(&storage, shard, superblock.store, progress).await?));
        }
        bar.finish_and_clear();
        Ok::<_, EngineError>(Some(Ok(checks)))
    })??;
    let checks = checks.ok_or_else(|| format!("there is no store in {}", data.display()))??;
    let accounts: BTreeMap<AccountId, String> = checks.iter().flat_map(|(_, check)| check.accounts.clone()).collect();
    let mut out = std::io::stdout().lock();
    let (mut records, mut messages, mut bytes, mut found) = (0, 0, 0, 0);
    for (shard, check) in &checks {
        records += check.records;
        messages += check.messages;
        bytes += check.log_bytes;
        found += check.findings.len();
        if let Some(tail) = &check.torn_tail {
            writeln!(out, "shard {shard}: an unfinished tail, which the next start drops: {tail}")?;
        }
        for finding in &check.findings {
            let whose = |mailbox| {
                let (account, name) = check.mailboxes.get(&mailbox)?;
                Some((accounts.get(account).cloned(), name.clone()))
            };
            writeln!(out, "{}", describe(finding, whose))?;
        }
    }
    writeln!(out, "checked {} shards, {records} records, {messages} messages, {bytes} bytes of log", checks.len())?;
    match found {
        0 => Ok(writeln!(out, "no damage found")?),
        found => Err(format!("{found} pieces of damage found").into()),
    }
}

/// One line: where, what, and whose. `whose` tells the account of a mailbox, if that is known, and its name.
pub fn describe(finding: &Finding, whose: impl Fn(MailboxId) -> Option<(Option<String>, String)>) -> String {
    let mut line = format!("damage: {} at offset {}: {}", finding.file, finding.offset, finding.what);
    for (mailbox, first, last) in &finding.touches {
        let (account, name) = whose(*mailbox).unwrap_or_else(|| (None, "unknown mailbox".to_owned()));
        let account = account.unwrap_or_else(|| "unknown account".to_owned());
        // Writing to a string cannot fail.
        let _ = write!(line, "; touches {account}, {name}");
        let _ = match (*first, *last) {
            (0, _) => Ok(()),
            (first, last) if first == last => write!(line, ", UID {first}"),
            (first, last) => write!(line, ", UIDs {first} to {last}"),
        };
    }
    line
}
