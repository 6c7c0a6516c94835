//! Checkpoints: index pages of what has changed, so that a restart replays only the log's tail.
//!
//! A checkpoint is fuzzy: each mailbox's page is its published state at the moment it was written, with the LSN of that
//! moment, and replay ignores what a page already has. The log is replayed from where it stood when the checkpoint began.

use std::time::Duration;

use crate::error::{Damage, EngineError};
use crate::format::codec::Wire;
use crate::format::manifest::IndexEntry;
use crate::format::page::{
    AccountEntry, DeltaChange, DeltaPage, DirectoryAccount, DirectoryEntry, DirectoryPage, MailboxPage, PageKind,
    PageLocation, archive, open_page, put_page, restore,
};
use crate::format::{BLOCK_BYTES, FormatError, round_up_to_block};
use crate::ids::{AccountId, Epoch, Lsn, MailboxId};
use crate::index::{Change, MailboxIndex};
use crate::planted::{self, Bug};
use crate::shard::{Shard, ShardEvent};
use crate::state::Slot;
use crate::storage::{BlobName, BlobStore, Storage, StorageError};

/// A delta page larger than this and than an eighth of its mailbox's page makes room for a new page.
const DELTA_BYTES_MAX: usize = 4096;
/// After so many blobs the next checkpoint writes a full directory.
const DIRECTORIES_MAX: usize = 8;
/// Blobs that pages may be spread over before the oldest one's pages are rewritten.
const BLOBS_MAX: usize = 32;
/// Entries of one directory page.
const ENTRIES_PER_PAGE: usize = 512;
/// A directory page of accounts is closed at this size.
const ACCOUNTS_PAGE_BYTES: usize = 256 << 10;
/// A checkpoint lets other tasks run after so many mailboxes, at least and at most.
const MAILBOXES_MIN: usize = 16;
const MAILBOXES_MAX: usize = 1024;

/// The most recently used indexes, which are never dropped.
pub(crate) const INDEXES_KEPT: usize = 8;

/// Pages being put together in parts.
struct Pages {
    parts: Vec<Vec<u8>>,
    offset: u64,
}

const PART_BYTES: usize = 4 << 20;

impl Pages {
    fn new() -> Self {
        Self { parts: vec![Vec::new()], offset: 0 }
    }

    /// Appends bytes; a page that would straddle a block boundary without need begins at the next.
    fn push(&mut self, page: &[u8]) -> u64 {
        let room = round_up_to_block(self.offset) - self.offset;
        let padding = if (page.len() as u64) > room && (page.len() as u64) <= BLOCK_BYTES { room as usize } else { 0 };
        let part = self.parts.last_mut().expect("never empty");
        part.resize(part.len() + padding, 0);
        part.extend_from_slice(page);
        let at = self.offset + padding as u64;
        self.offset = at + page.len() as u64;
        if part.len() >= PART_BYTES {
            self.parts.push(Vec::new());
        }
        at
    }
}

/// How far a checkpoint goes before it lets other tasks run.
struct Turn {
    left: usize,
    mailboxes: usize,
    begun: Duration,
}

/// A mailbox's page in the new blob, to be taken over once the manifest is committed.
struct Written {
    mailbox: MailboxId,
    as_of: Lsn,
    /// Changes of the delta that are in the page.
    changes: usize,
    page: PageLocation,
    delta: PageLocation,
    /// The page has been written, and has everything.
    whole: bool,
}

impl<S: Storage> Shard<S> {
    /// Writes what has changed since the last checkpoint and commits it, after one that is under way. On return a
    /// restart replays only what is committed after the call began.
    ///
    /// # Errors
    /// Storage that fails. The old checkpoint stays in force.
    pub async fn checkpoint(&self) -> Result<(), EngineError> {
        let _one_at_a_time = self.0.checkpoint_lock.lock().await;
        self.checkpoint_alone().await
    }

    /// As [`Shard::checkpoint`], for who has its lock.
    pub(crate) async fn checkpoint_alone(&self) -> Result<(), EngineError> {
        match self.checkpoint_now().await {
            Err(EngineError::Full) if self.use_reserve().await? => self.checkpoint_now().await,
            result => result,
        }
    }

    async fn checkpoint_now(&self) -> Result<(), EngineError> {
        let inner = &self.0;
        let (replay_from, replay_sequence, as_of, blob, log_bytes) = {
            let mut log = inner.log.borrow_mut();
            let state = inner.state.borrow();
            if state.has_open_transaction() {
                return Ok(());
            }
            let blob = log.next_index_blob;
            log.next_index_blob += 1;
            // An idle mark after the last batch is not durable: the log may yet lose it.
            let (from, sequence) = if log.durable.segment == log.position.segment {
                (log.durable, log.durable_sequence)
            } else {
                (log.position, log.next_sequence)
            };
            (from, sequence, state.as_of, blob, log.bytes_since_checkpoint)
        };
        if self.has_receipts() {
            if inner.log.borrow().stopping {
                // Nothing can be written any more, and before it stopped it has written a checkpoint.
                return Ok(());
            }
            self.carry_receipts_over().await?;
        }
        let full = {
            let log = inner.log.borrow();
            let since_full = log.manifest.indexes.iter().rev().take_while(|entry| !entry.full).count();
            log.manifest.indexes.is_empty() || since_full >= DIRECTORIES_MAX
        };
        let (dirty, accounts, directory) = {
            let state = inner.state.borrow();
            let dirty: Vec<MailboxId> =
                state.slots.iter().filter(|(_, slot)| slot.dirty).map(|(&mailbox, _)| mailbox).collect();
            let accounts: Vec<AccountId> = state
                .accounts
                .iter()
                .filter(|(_, account)| account.dirty || full)
                .map(|(&account, _)| account)
                .collect();
            let directory: Vec<AccountId> = if full {
                state.directory.keys().copied().collect()
            } else {
                state.directory_changed.iter().copied().collect()
            };
            (dirty, accounts, directory)
        };
        let mut pages = Pages::new();
        let mut written: Vec<Written> = Vec::new();
        let mut turn = Turn { left: 0, mailboxes: MAILBOXES_MIN, begun: inner.storage.now() };
        for mailbox in dirty {
            if turn.left == 0 {
                self.next_turn(&mut turn).await;
            }
            turn.left -= 1;
            if let Some(page) = self.write_mailbox(mailbox, blob, &mut pages).await? {
                written.push(page);
            }
        }
        let directory_offset = pages.offset;
        let entries = self.directory_entries(full, &written);
        let known = inner.state.borrow().as_of;
        self.write_directory(&mut pages, as_of, &entries, &accounts, &directory)?;
        let directory_len = pages.offset - directory_offset;
        let epoch = inner.epoch;
        let name = BlobName::Index { blob, epoch };
        inner.blobs.put(name, std::mem::take(&mut pages.parts)).await?;

        let entry = IndexEntry { blob, epoch, directory_offset, directory_len, full };
        let mut unused = Vec::new();
        let used = self.blobs_in_use(&written, blob);
        // Pages may already say where compaction has moved records.
        let compacted = inner.compaction.to_commit();
        let committed = self.commit_manifest(|manifest| {
            if let Some(compacted) = &compacted {
                compacted.edit(manifest);
            }
            manifest.indexes.push(entry);
            let first = manifest.indexes.iter().rposition(|entry| entry.full).unwrap_or(0);
            let mut place = 0;
            manifest.indexes.retain(|entry| {
                place += 1;
                let keep = place > first || used.contains(&entry.blob);
                if !keep {
                    unused.push(BlobName::Index { blob: entry.blob, epoch: entry.epoch });
                }
                keep
            });
            manifest.replay_from = replay_from;
            manifest.replay_sequence = replay_sequence;
            manifest.as_of = as_of;
        });
        if let Err(error) = committed.await {
            if matches!(error, EngineError::Full) {
                // Nothing refers to it, and it takes space. Failing that, the next start removes it.
                let _ = inner.blobs.delete(name).await;
            }
            return Err(error);
        }
        if compacted.is_some() {
            inner.compaction.committed();
        }
        self.take_over(written, full, known, &accounts, &directory);
        // Indexes have grown since they were loaded, some of them for the checkpoint alone.
        let loaded =
            inner.state.borrow().slots.values().filter_map(|slot| slot.index.as_ref()).map(|i| i.memory_bytes()).sum();
        inner.cached_index_bytes.set(loaded);
        self.evict_indexes();
        {
            let mut log = inner.log.borrow_mut();
            log.bytes_since_checkpoint = log.bytes_since_checkpoint.saturating_sub(log_bytes);
        }
        self.count(|stats| stats.checkpoints += 1);
        for name in unused {
            inner.blobs.delete(name).await?;
        }
        if inner.compaction.has_doomed() {
            self.remove_doomed().await;
        }
        Ok(())
    }

    /// Lets other tasks run, and takes an eighth of their time for the next mailboxes: less, and a busy shard's checkpoint
    /// would never end.
    async fn next_turn(&self, turn: &mut Turn) {
        let storage = &self.0.storage;
        let ended = storage.now();
        storage.yield_now().await;
        let begun = storage.now();
        let (took, away) = ((ended - turn.begun).as_micros().max(1), (begun - ended).as_micros());
        let share = turn.mailboxes as u128 * away / (8 * took);
        turn.mailboxes = (share as usize).clamp(MAILBOXES_MIN, MAILBOXES_MAX);
        (turn.left, turn.begun) = (turn.mailboxes, begun);
    }

    /// Writes the page or delta page of one mailbox, if it still exists.
    async fn write_mailbox(
        &self,
        mailbox: MailboxId,
        blob: u32,
        pages: &mut Pages,
    ) -> Result<Option<Written>, EngineError> {
        let inner = &self.0;
        loop {
            let (page, delta_page, unchanged, rewrite, delta_bytes) = {
                let state = inner.state.borrow();
                let Some(slot) = state.slots.get(&mailbox) else { return Ok(None) };
                let new_bytes: usize = slot.delta.iter().map(|(_, change)| delta_bytes(change)).sum();
                let delta_bytes = new_bytes + slot.delta_page.len as usize;
                let rewrite = slot.rewrite || slot.moves;
                (slot.page, slot.delta_page, slot.delta.is_empty() && !rewrite, rewrite, delta_bytes)
            };
            let outgrown = page.is_none() || delta_bytes > DELTA_BYTES_MAX.max(page.len as usize / 8);
            let wants_page = rewrite || (!unchanged && outgrown);
            let mut older = Vec::new();
            if wants_page {
                self.load_index(mailbox).await?;
            } else if !unchanged {
                older = match self.read_delta(mailbox, delta_page).await {
                    Err(error) if is_damage(&error) => {
                        if let Some(slot) = inner.state.borrow_mut().slots.get_mut(&mailbox) {
                            slot.rewrite = true;
                        }
                        continue;
                    }
                    older => older?,
                };
            }
            // From here to the end of the turn nothing awaits: page, LSN and number of changes belong together.
            let state = inner.state.borrow();
            let Some(slot) = state.slots.get(&mailbox) else { return Ok(None) };
            if unchanged && slot.delta.is_empty() && !slot.rewrite && !slot.moves {
                // Only what stands in the directory has changed.
                let (page, delta) = (slot.page, slot.delta_page);
                return Ok(Some(Written { mailbox, as_of: slot.meta.as_of, changes: 0, page, delta, whole: false }));
            }
            if unchanged || (wants_page && slot.index.is_none()) {
                continue;
            }
            let mut as_of = slot.meta.as_of;
            if planted::is_on(Bug::CheckpointPendingTip) && slot.tip.is_some() {
                as_of = Lsn(as_of.0 + 64);
            }
            let mut bytes = Vec::new();
            let mut packer = inner.packer.borrow_mut();
            let kind = if let Some(index) = slot.index.as_ref().filter(|_| wants_page) {
                let page = archive(&index.to_page());
                put_page(PageKind::Mailbox, as_of, mailbox.0, &page, &mut packer, &mut bytes)
                    .map_err(|error| self.unwritable(mailbox, error))?;
                PageKind::Mailbox
            } else {
                let newer = slot.delta.iter();
                older.extend(newer.map(|(lsn, change)| DeltaChange { lsn: lsn.0, payload: change.encode() }));
                let delta = archive(&DeltaPage { changes: older });
                put_page(PageKind::MailboxDelta, as_of, mailbox.0, &delta, &mut packer, &mut bytes)
                    .map_err(|error| self.unwritable(mailbox, error))?;
                PageKind::MailboxDelta
            };
            let offset = pages.push(&bytes);
            let place = PageLocation { blob, epoch: inner.epoch.0, offset, len: bytes.len() as u32 };
            let (page, delta) =
                if kind == PageKind::Mailbox { (place, PageLocation::default()) } else { (slot.page, place) };
            let whole = kind == PageKind::Mailbox;
            return Ok(Some(Written { mailbox, as_of, changes: slot.delta.len(), page, delta, whole }));
        }
    }

    fn directory_entries(&self, full: bool, written: &[Written]) -> Vec<DirectoryEntry> {
        let state = self.0.state.borrow();
        let mut entries = Vec::new();
        let entry_of = |written: &Written| {
            let slot = state.slots.get(&written.mailbox)?;
            let mut entry = slot.to_entry();
            entry.page = written.page;
            entry.delta = written.delta;
            entry.page_as_of = written.as_of.0;
            Some(entry)
        };
        if full {
            let by_mailbox: std::collections::BTreeMap<MailboxId, &Written> =
                written.iter().map(|written| (written.mailbox, written)).collect();
            for (mailbox, slot) in &state.slots {
                match by_mailbox.get(mailbox) {
                    Some(written) => entries.extend(entry_of(written)),
                    None => entries.push(slot.to_entry()),
                }
            }
        } else {
            entries.extend(written.iter().filter_map(entry_of));
        }
        for (&mailbox, &lsn) in &state.deleted {
            entries.push(DirectoryEntry {
                mailbox: mailbox.0,
                as_of: lsn.0,
                deleted: true,
                ..DirectoryEntry::default()
            });
        }
        entries
    }

    fn write_directory(
        &self,
        pages: &mut Pages,
        as_of: Lsn,
        entries: &[DirectoryEntry],
        accounts: &[AccountId],
        directory: &[AccountId],
    ) -> Result<(), EngineError> {
        let inner = &self.0;
        let mut put = |page: DirectoryPage| {
            let mut bytes = Vec::new();
            put_page(PageKind::Directory, as_of, 0, &archive(&page), &mut inner.packer.borrow_mut(), &mut bytes)
                .map_err(|error| self.unwritable(MailboxId(0), error))?;
            let part = pages.parts.last_mut().expect("never empty");
            part.extend_from_slice(&bytes);
            pages.offset += bytes.len() as u64;
            Ok::<_, EngineError>(())
        };
        for chunk in entries.chunks(ENTRIES_PER_PAGE) {
            put(DirectoryPage { mailboxes: chunk.to_vec(), ..DirectoryPage::default() })?;
        }
        let state = inner.state.borrow();
        let mut page = DirectoryPage::default();
        let mut page_bytes = 0;
        for (id, account) in accounts.iter().filter_map(|id| Some((id, state.accounts.get(id)?))) {
            let names = account.subscriptions.iter().map(String::len).sum::<usize>();
            let values = account.attributes.iter().map(|((_, name), value)| name.len() + value.len()).sum::<usize>();
            page_bytes += 64 + names + values;
            page.accounts.push(AccountEntry {
                account: id.0,
                as_of: account.as_of.0,
                uid_validity_next: account.uid_validity_next,
                subscriptions: account.subscriptions.iter().cloned().collect(),
                attributes: account
                    .attributes
                    .iter()
                    .map(|((mailbox, name), value)| (mailbox.0, name.clone(), value.clone()))
                    .collect(),
            });
            // Accounts differ in size much more than mailboxes do.
            if page_bytes >= ACCOUNTS_PAGE_BYTES {
                put(std::mem::take(&mut page))?;
                page_bytes = 0;
            }
        }
        if !page.accounts.is_empty() {
            put(page)?;
        }
        for chunk in directory.chunks(ENTRIES_PER_PAGE) {
            let directory = chunk.iter().filter_map(|id| {
                let record = state.directory.get(id)?;
                Some(DirectoryAccount {
                    account: id.0,
                    as_of: state.directory_as_of.get(id).map_or(0, |lsn| lsn.0),
                    name: record.name.clone(),
                    shard: record.shard.0,
                    password: record.password.clone(),
                    deleted: record.deleted,
                    uid_validity_floor: record.uid_validity_floor,
                })
            });
            put(DirectoryPage { directory: directory.collect(), ..DirectoryPage::default() })?;
        }
        Ok(())
    }

    fn unwritable(&self, mailbox: MailboxId, error: FormatError) -> EngineError {
        let place = format!("{}, mailbox {mailbox}", crate::storage::local::shard_directory(self.0.id));
        Damage { place, error }.into()
    }

    /// The blobs whose pages are in use once `written` is taken over.
    fn blobs_in_use(&self, written: &[Written], blob: u32) -> std::collections::BTreeSet<u32> {
        let mut state = self.0.state.borrow_mut();
        let replaced: std::collections::BTreeMap<MailboxId, &Written> =
            written.iter().map(|written| (written.mailbox, written)).collect();
        let mut used: std::collections::BTreeSet<u32> = [blob].into();
        for (mailbox, slot) in &state.slots {
            let (page, delta) =
                replaced.get(mailbox).map_or((slot.page, slot.delta_page), |written| (written.page, written.delta));
            used.extend([page, delta].iter().filter(|page| !page.is_none()).map(|page| page.blob));
        }
        if used.len() > BLOBS_MAX
            && let Some(&oldest) = used.first()
        {
            for slot in state.slots.values_mut() {
                if slot.page.blob == oldest || slot.delta_page.blob == oldest {
                    slot.dirty = true;
                    slot.moves = true;
                }
            }
        }
        used
    }

    /// Lets the slots refer to the pages that are committed now, and drops the changes that these contain.
    fn take_over(
        &self,
        written: Vec<Written>,
        full: bool,
        known: Lsn,
        accounts: &[AccountId],
        directory: &[AccountId],
    ) {
        let mut state = self.0.state.borrow_mut();
        for written in written {
            let Some(slot) = state.slots.get_mut(&written.mailbox) else { continue };
            slot.page = written.page;
            slot.delta_page = written.delta;
            slot.page_as_of = written.as_of;
            // A page that was damaged is behind it once a whole one has been written.
            slot.rewrite &= !written.whole;
            slot.moves &= !written.whole;
            slot.delta.drain(..written.changes);
            slot.delta.shrink_to_fit();
            slot.dirty = slot.meta.as_of != written.as_of || !slot.delta.is_empty();
        }
        for account in accounts {
            if let Some(account) = state.accounts.get_mut(account) {
                account.dirty &= account.as_of > known;
            }
        }
        for account in directory {
            if state.directory_as_of.get(account).is_none_or(|&as_of| as_of <= known) {
                state.directory_changed.remove(account);
            }
        }
        if full {
            // Deletions before a full directory need not be repeated.
            state.deleted.retain(|_, &mut lsn| lsn > known);
        }
    }

    async fn read_page(
        &self,
        kind: PageKind,
        mailbox: MailboxId,
        page: PageLocation,
    ) -> Result<rkyv::util::AlignedVec, EngineError> {
        let inner = &self.0;
        let epoch = Epoch(page.epoch);
        let name = BlobName::Index { blob: page.blob, epoch };
        let bytes = inner.blobs.get(name, page.offset, page.len as usize).await?;
        let opened = open_page(kind, mailbox.0, &bytes, &mut inner.unpacker.borrow_mut());
        match opened {
            Ok((_, archive)) => Ok(archive),
            Err(error) => {
                let file = crate::storage::local::index_file(page.blob, epoch);
                let directory = crate::storage::local::shard_directory(inner.id);
                let place = format!("{directory}/idx/{file} at offset {}", page.offset);
                Err(Damage { place, error }.into())
            }
        }
    }

    async fn read_delta(&self, mailbox: MailboxId, page: PageLocation) -> Result<Vec<DeltaChange>, EngineError> {
        if page.is_none() {
            return Ok(Vec::new());
        }
        let archive = self.read_page(PageKind::MailboxDelta, mailbox, page).await?;
        let delta = restore::<DeltaPage>(&archive).map_err(|error| self.page_damage(page, error))?;
        Ok(delta.changes)
    }

    fn page_damage(&self, page: PageLocation, error: FormatError) -> EngineError {
        let directory = crate::storage::local::shard_directory(self.0.id);
        Damage { place: format!("{directory}/idx, blob {} at offset {}", page.blob, page.offset), error }.into()
    }

    /// Makes a mailbox's index present in memory. It may be gone again after any await.
    ///
    /// # Errors
    /// No such mailbox, or pages that cannot be read.
    pub(crate) async fn load_index(&self, mailbox: MailboxId) -> Result<(), EngineError> {
        loop {
            let (page, delta_page, as_of) = {
                let mut state = self.0.state.borrow_mut();
                let slot = state.slots.get_mut(&mailbox).ok_or(crate::error::Refusal::NoSuchMailbox)?;
                self.0.clock.set(self.0.clock.get() + 1);
                slot.used = self.0.clock.get();
                if slot.index.is_some() {
                    return Ok(());
                }
                (slot.page, slot.delta_page, slot.page_as_of)
            };
            let mut result = self.assemble_index(mailbox, page, delta_page).await;
            let mut rebuilt = None;
            if let Err(error) = &result
                && is_damage(error)
            {
                // The pages are a cache of the log. One at a time: the next one may find it done.
                let _one_at_a_time = self.0.rebuild_lock.lock().await;
                let is_as_it_was =
                    |slot: &Slot| slot.index.is_none() && slot.page == page && slot.delta_page == delta_page;
                let found = self.0.state.borrow().slots.get(&mailbox).map(is_as_it_was);
                if !found.ok_or(crate::error::Refusal::NoSuchMailbox)? {
                    continue;
                }
                rebuilt = Some(error.clone());
                result = self.rebuild_index(mailbox, as_of).await;
            }
            let mut state = self.0.state.borrow_mut();
            let slot = state.slots.get_mut(&mailbox).ok_or(crate::error::Refusal::NoSuchMailbox)?;
            if slot.page != page || slot.delta_page != delta_page {
                // A checkpoint has moved the pages meanwhile.
                continue;
            }
            if slot.index.is_none() {
                let mut index = result?;
                for (_, change) in &slot.delta {
                    index.apply(change);
                }
                self.0.cached_index_bytes.set(self.0.cached_index_bytes.get() + index.memory_bytes());
                slot.index = Some(Box::new(index));
                self.count(|stats| stats.index_loads += 1);
                if let Some(error) = rebuilt {
                    slot.rewrite = true;
                    slot.dirty = true;
                    self.count(|stats| stats.indexes_rebuilt += 1);
                    self.tell(ShardEvent::IndexRebuilt(mailbox, error));
                }
                drop(state);
                self.evict_indexes();
            }
            return Ok(());
        }
    }

    /// Page and delta page, without the changes in memory.
    pub(crate) async fn assemble_index(
        &self,
        mailbox: MailboxId,
        page: PageLocation,
        delta_page: PageLocation,
    ) -> Result<MailboxIndex, EngineError> {
        let mut index = MailboxIndex::default();
        if !page.is_none() {
            let archive = self.read_page(PageKind::Mailbox, mailbox, page).await?;
            let restored = restore::<MailboxPage>(&archive).and_then(|page| MailboxIndex::from_page(&page));
            index = restored.map_err(|error| self.page_damage(page, error))?;
        }
        for change in self.read_delta(mailbox, delta_page).await? {
            let change = Change::decode(&change.payload)
                .map_err(|source| self.page_damage(delta_page, FormatError::Decode { what: "delta page", source }))?;
            index.apply(&change);
        }
        Ok(index)
    }

    /// Drops indexes, least recently used first, while there are more than the configured bytes of them.
    fn evict_indexes(&self) {
        let limit = self.0.config.index_cache_bytes;
        if self.0.cached_index_bytes.get() <= limit {
            return;
        }
        let mut state = self.0.state.borrow_mut();
        let mut loaded: Vec<(u64, MailboxId, usize)> = state
            .slots
            .iter()
            .filter(|(_, slot)| !slot.rewrite)
            .filter_map(|(&mailbox, slot)| Some((slot.used, mailbox, slot.index.as_ref()?.memory_bytes())))
            .collect();
        loaded.sort_unstable();
        let mut total: usize = loaded.iter().map(|(_, _, bytes)| bytes).sum();
        // An operation on several mailboxes needs all their indexes at once.
        let evictable = loaded.len().saturating_sub(INDEXES_KEPT);
        for (_, mailbox, bytes) in loaded.into_iter().take(evictable) {
            // Down to three quarters, so that not every load has to look through all slots.
            if total <= limit - limit / 4 {
                break;
            }
            if let Some(slot) = state.slots.get_mut(&mailbox) {
                slot.index = None;
                total -= bytes;
            }
        }
        self.0.cached_index_bytes.set(total);
    }
}

/// Whether pages cannot be read however often one tries.
fn is_damage(error: &EngineError) -> bool {
    match error {
        EngineError::Damaged(_) => true,
        EngineError::Storage(error) => matches!(**error, StorageError::NotFound(_)),
        _ => false,
    }
}

/// What a change takes in a delta page, roughly.
fn delta_bytes(change: &Change) -> usize {
    match change {
        Change::Place { .. } => 96,
        Change::Flags(change) => 48 + change.uids.0.serialized_size().min(change.uids.len() as usize * 8),
        Change::Expunge(expunge) => 48 + expunge.uids.0.serialized_size().min(expunge.uids.len() as usize * 8),
        Change::Keyword { name, .. } => 24 + name.len(),
        Change::Relocate(moved) => 24 + 32 * moved.len(),
        Change::Fold { .. } => 96,
        Change::Base(base) => 128 + 96 * (base.placed.len() + base.states.len()),
    }
}
