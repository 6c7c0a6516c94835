//! `posthaste check`: reads all of a store that no server works on, and names what is damaged.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};
use posthaste_engine::check::{ShardCheck, check_shard};
use posthaste_engine::error::{EngineError, Finding};
use posthaste_engine::ids::{AccountId, MailboxId, ShardId};
use posthaste_engine::io::real::{IoKind, run_worker};
use posthaste_engine::node::Superblock;
use posthaste_engine::storage::Storage;
use posthaste_engine::storage::local::Local;

use crate::lock::{self, DataLock};

/// Checks the store in `data` and says on standard output what it found.
///
/// # Errors
/// Damage; or the store cannot be read, or is in use.
pub fn check(data: &Path, io: IoKind) -> Result<(), Box<dyn Error>> {
    let _lock = lock_existing(data)?;
    let mut out = std::io::stdout().lock();
    match Checked::look(data, io)?.print(&mut out)? {
        0 => Ok(writeln!(out, "no damage found")?),
        found => Err(format!("{found} pieces of damage found").into()),
    }
}

/// Locks a data directory that must be there.
pub fn lock_existing(data: &Path) -> Result<DataLock, Box<dyn Error>> {
    if !data.is_dir() {
        return Err(format!("there is no data directory {}", data.display()).into());
    }
    Ok(lock::lock(data)?)
}

/// What a check of all shards has found.
pub struct Checked {
    pub superblock: Superblock,
    pub shards: Vec<(ShardId, ShardCheck)>,
    pub accounts: BTreeMap<AccountId, String>,
}

impl Checked {
    /// Checks a store. The caller holds its lock.
    ///
    /// # Errors
    /// There is no store, or it cannot be read at all.
    pub fn look(data: &Path, io: IoKind) -> Result<Self, Box<dyn Error>> {
        let checked = run_worker(io, data.to_owned(), None, async |io| {
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
            let mut shards = Vec::new();
            for shard in (0..superblock.shards).map(ShardId) {
                bar.set_message(format!("of shard {shard}"));
                let progress = |done, all| {
                    bar.set_length(all);
                    bar.set_position(done);
                };
                shards.push((shard, check_shard(&storage, shard, superblock.store, progress).await?));
            }
            bar.finish_and_clear();
            Ok::<_, EngineError>(Some(Ok((superblock, shards))))
        })??;
        let (superblock, shards) = checked.ok_or_else(|| format!("there is no store in {}", data.display()))??;
        let accounts = shards.iter().flat_map(|(_, check)| check.accounts.clone()).collect();
        Ok(Self { superblock, shards, accounts })
    }

    /// Says what has been found; how many pieces of damage that were.
    pub fn print(&self, out: &mut impl Write) -> io::Result<usize> {
        let (mut records, mut messages, mut bytes, mut found) = (0, 0, 0, 0);
        for (shard, check) in &self.shards {
            records += check.records;
            messages += check.messages;
            bytes += check.log_bytes;
            found += check.findings.len();
            if let Some(tail) = &check.torn_tail {
                writeln!(out, "shard {shard}: an unfinished tail, which the next start drops: {tail}")?;
            }
            for finding in &check.findings {
                writeln!(out, "{}", describe(finding, |mailbox| self.whose(check, mailbox)))?;
            }
        }
        let shards = self.shards.len();
        writeln!(out, "checked {shards} shards, {records} records, {messages} messages, {bytes} bytes of log")?;
        Ok(found)
    }

    /// The account of a mailbox, if that is known, and its name.
    pub fn whose(&self, check: &ShardCheck, mailbox: MailboxId) -> Option<(Option<String>, String)> {
        let (account, name) = check.mailboxes.get(&mailbox)?;
        Some((self.accounts.get(account).cloned(), name.clone()))
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
