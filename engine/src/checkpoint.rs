//! Checkpoints: index pages of what has changed, so that a restart replays only the log's tail.
//!
//! A checkpoint is fuzzy: each mailbox's page is its published state at the moment it was written, with the LSN of that
//! moment, and replay ignores what a page already has. The log is replayed from where it stood when the checkpoint began.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::accounts::AccountState;
use crate::error::{Damage, EngineError};
use crate::format::codec::Wire;
use crate::format::manifest::IndexEntry;
use crate::format::page::{
    DeltaChange, DeltaPage, DirectoryEntry, DirectoryPage, PageKind, PageLocation, RecordsPage, archive, put_page,
};
use crate::format::segment::FooterEntry;
use crate::format::{BLOCK_BYTES, FormatError, round_up_to_block};
use crate::ids::{AccountId, Lsn, MailboxId, Position};
use crate::index::Change;
use crate::indexes::is_damage;
use crate::planted::{self, Bug};
use crate::shard::{Log, Shard};
use crate::slots::{SLOTS_AT_ONCE, Slot, SlotRef};
use crate::state::State;
use crate::storage::{BlobName, BlobStore, Storage, StorageError};

/// A delta page larger than this and than an eighth of its mailbox's page makes room for a new page.
const DELTA_BYTES_MAX: usize = 4096;
/// A directory of what has changed is written so many times, at least and at most, before a checkpoint writes one of everything:
/// in between, as soon as those together are as large.
const DIRECTORIES_MIN: usize = 8;
const DIRECTORIES_MAX: usize = 32;
/// Blobs that pages may be spread over before those of the one that has fewest are written anew, for so many mailboxes by each
/// checkpoint, about.
const BLOBS_MAX: usize = 32;
const MAILBOXES_MOVED_MAX: usize = 1 << 16;
/// Slots and accounts that take over new pages in one turn.
const SLOTS_TAKEN_OVER: usize = 256;
/// Entries of one directory page.
const ENTRIES_PER_PAGE: usize = 512;
/// Records of one page.
const RECORDS_PER_PAGE: usize = 8192;
/// A directory page of accounts is closed at this size.
const ACCOUNTS_PAGE_BYTES: usize = 256 << 10;
/// A checkpoint lets other tasks run after so many mailboxes, at least and at most.
const MAILBOXES_MIN: usize = 16;
const MAILBOXES_MAX: usize = 1024;

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
        let at = self.offset + padding as u64;
        self.offset = at;
        self.append(page);
        at
    }

    /// Appends bytes where the last ones end.
    fn append(&mut self, bytes: &[u8]) {
        let part = self.parts.last_mut().expect("never empty");
        part.extend_from_slice(bytes);
        self.offset += bytes.len() as u64;
        if part.len() >= PART_BYTES {
            self.parts.push(Vec::new());
        }
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

impl Written {
    /// The directory's entry: counters as they are now, and the new pages.
    fn to_entry(&self, slot: &Slot) -> DirectoryEntry {
        DirectoryEntry { page: self.page, delta: self.delta, page_as_of: self.as_of.0, ..slot.to_entry() }
    }
}

/// A directory that has been written.
struct Directory {
    /// Everything up to here is in it.
    known: Lsn,
    /// The account records that were not in any before.
    changed: Vec<AccountId>,
}

/// Records of the segment in which replay is to begin, before where it does.
struct NewRecords {
    first: usize,
    entries: Vec<FooterEntry>,
}

impl NewRecords {
    /// Those that the checkpoint does not list yet, or all.
    fn before(from: Position, all: bool, log: &Log) -> Self {
        let active = log.active.as_ref().filter(|active| active.name.segment == from.segment);
        let entries = active.map(|active| &active.entries[..]).unwrap_or_default();
        let end = entries.partition_point(|entry| u64::from(entry.offset_units) * 8 < from.offset);
        let (segment, listed) = log.checkpointed_records;
        let first = if all || segment != from.segment { 0 } else { listed.min(end) };
        Self { first, entries: entries[first..end].to_vec() }
    }
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
        let full = wants_full_directory(&inner.log.borrow().manifest.indexes) || inner.full_directory.get();
        let (replay_from, replay_sequence, as_of, blob, log_bytes, records) = {
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
            let records = NewRecords::before(from, full, &log);
            (from, sequence, state.as_of, blob, log.bytes_since_checkpoint, records)
        };
        if self.has_receipts() {
            if inner.log.borrow().stopping {
                // Nothing can be written any more, and before it stopped it has written a checkpoint.
                return Ok(());
            }
            self.carry_receipts_over().await?;
        }
        self.move_some_pages().await;
        let dirty: Vec<MailboxId> = {
            let state = inner.state.borrow();
            state.slots.in_use().filter(|(_, slot)| slot.dirty).map(|(mailbox, _)| mailbox).collect()
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
        let directory = self.write_directory(&mut pages, as_of, full, &written).await?;
        self.write_records(&mut pages, as_of, replay_from, &records).await?;
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
        self.take_over(written, full, directory).await;
        // Indexes have grown since they were loaded, some of them for the checkpoint alone.
        self.count_indexes();
        self.evict_indexes();
        {
            let mut log = inner.log.borrow_mut();
            log.bytes_since_checkpoint = log.bytes_since_checkpoint.saturating_sub(log_bytes);
            log.checkpointed_records = (replay_from.segment, records.first + records.entries.len());
        }
        self.count(|stats| stats.checkpoints += 1);
        for name in unused {
            match inner.blobs.delete(name).await {
                // It was lost before.
                Err(StorageError::NotFound(_)) => {}
                deleted => deleted?,
            }
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
                let (page, delta_page) = slot.pages();
                let delta_bytes = new_bytes + delta_page.len as usize;
                let rewrite = slot.rewrite || slot.moves;
                (page, delta_page, slot.delta.is_empty() && !rewrite, rewrite, delta_bytes)
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
                let (page, delta) = slot.pages();
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
                if kind == PageKind::Mailbox { (place, PageLocation::default()) } else { (page, place) };
            let whole = kind == PageKind::Mailbox;
            return Ok(Some(Written { mailbox, as_of, changes: slot.delta.len(), page, delta, whole }));
        }
    }

    /// Appends the directory: of all mailboxes and accounts, or of those that have changed. Other tasks run between its pages,
    /// each of which is as of when it was written, like all pages.
    async fn write_directory(
        &self,
        pages: &mut Pages,
        as_of: Lsn,
        full: bool,
        written: &[Written],
    ) -> Result<Directory, EngineError> {
        let inner = &self.0;
        let known = inner.state.borrow().as_of;
        let mut next = Some(MailboxId(0)).filter(|_| full);
        let mut with_mailboxes: BTreeSet<AccountId> = BTreeSet::new();
        while let Some(from) = next {
            let mut page = DirectoryPage::default();
            {
                let state = inner.state.borrow();
                let mut slots = state.slots.iter_from(from);
                let some = slots.by_ref().take(ENTRIES_PER_PAGE);
                let entry_of = |(mailbox, slot): (MailboxId, SlotRef<'_>)| {
                    let place = written.binary_search_by_key(&mailbox, |written| written.mailbox);
                    place.map_or_else(|_| slot.to_entry(), |place| written[place].to_entry(&slot))
                };
                page.mailboxes = some.map(entry_of).collect();
                next = slots.next().map(|(mailbox, _)| mailbox);
                add_accounts(&mut page, &state, &mut with_mailboxes, full);
            }
            self.put_directory(pages, as_of, page).await?;
        }
        for chunk in written.chunks(ENTRIES_PER_PAGE).take_while(|_| !full) {
            let mut page = DirectoryPage::default();
            {
                let state = inner.state.borrow();
                let entry_of = |written: &Written| Some(written.to_entry(&*state.slots.get(&written.mailbox)?));
                page.mailboxes = chunk.iter().filter_map(entry_of).collect();
                add_accounts(&mut page, &state, &mut with_mailboxes, full);
            }
            self.put_directory(pages, as_of, page).await?;
        }
        // Deletions come after whatever was said of the mailboxes before.
        let deleted: Vec<(MailboxId, Lsn)> =
            inner.state.borrow().deleted.iter().map(|(mailbox, lsn)| (*mailbox, *lsn)).collect();
        for chunk in deleted.chunks(ENTRIES_PER_PAGE) {
            let entry_of = |&(mailbox, lsn): &(MailboxId, Lsn)| DirectoryEntry {
                mailbox: mailbox.0,
                as_of: lsn.0,
                deleted: true,
                ..DirectoryEntry::default()
            };
            let mailboxes = chunk.iter().map(entry_of).collect();
            self.put_directory(pages, as_of, DirectoryPage { mailboxes, ..DirectoryPage::default() }).await?;
        }
        let mut next = Some(AccountId(0)).filter(|_| full);
        while let Some(from) = next {
            let others: Vec<AccountId> = {
                let state = inner.state.borrow();
                let mut accounts = state.accounts.keys_from(from);
                let some: Vec<AccountId> = accounts.by_ref().take(ENTRIES_PER_PAGE).collect();
                next = accounts.next();
                some.into_iter().filter(|account| !with_mailboxes.contains(account)).collect()
            };
            self.write_accounts(pages, as_of, &others).await?;
            inner.storage.yield_now().await;
        }
        if !full {
            let others: Vec<AccountId> = {
                let state = inner.state.borrow();
                let dirty = state.accounts.in_use().filter(|(_, account)| account.dirty).map(|(account, _)| account);
                dirty.filter(|account| !with_mailboxes.contains(account)).collect()
            };
            self.write_accounts(pages, as_of, &others).await?;
        }
        let changed: Vec<AccountId> = inner.state.borrow().directory_changed.iter().copied().collect();
        if full {
            let mut next = Some(AccountId(0));
            while let Some(from) = next {
                let some: Vec<AccountId> = {
                    let state = inner.state.borrow();
                    let mut records = state.directory.range(from..).map(|(account, _)| *account);
                    let some = records.by_ref().take(ENTRIES_PER_PAGE).collect();
                    next = records.next();
                    some
                };
                self.write_account_records(pages, as_of, &some).await?;
            }
        } else {
            self.write_account_records(pages, as_of, &changed).await?;
        }
        Ok(Directory { known, changed })
    }

    async fn write_accounts(&self, pages: &mut Pages, as_of: Lsn, accounts: &[AccountId]) -> Result<(), EngineError> {
        let mut accounts = accounts.iter().peekable();
        while accounts.peek().is_some() {
            let mut page = DirectoryPage::default();
            // Accounts differ in size much more than mailboxes do.
            let mut bytes = 0;
            while bytes < ACCOUNTS_PAGE_BYTES
                && let Some(id) = accounts.next()
            {
                let state = self.0.state.borrow();
                let Some(account) = state.accounts.get(id) else { continue };
                bytes += bytes_of(&account);
                page.accounts.push(account.to_entry(*id));
            }
            self.put_directory(pages, as_of, page).await?;
        }
        Ok(())
    }

    async fn write_account_records(
        &self,
        pages: &mut Pages,
        as_of: Lsn,
        records: &[AccountId],
    ) -> Result<(), EngineError> {
        for chunk in records.chunks(ENTRIES_PER_PAGE) {
            let directory = {
                let state = self.0.state.borrow();
                chunk.iter().filter_map(|id| state.directory_entry(*id)).collect()
            };
            self.put_directory(pages, as_of, DirectoryPage { directory, ..DirectoryPage::default() }).await?;
        }
        Ok(())
    }

    /// Appends a page of the directory, and lets other tasks run.
    async fn put_directory(&self, pages: &mut Pages, as_of: Lsn, page: DirectoryPage) -> Result<(), EngineError> {
        let inner = &self.0;
        let mut bytes = Vec::new();
        put_page(PageKind::Directory, as_of, 0, &archive(&page), &mut inner.packer.borrow_mut(), &mut bytes)
            .map_err(|error| self.unwritable(MailboxId(0), error))?;
        pages.append(&bytes);
        inner.storage.yield_now().await;
        Ok(())
    }

    /// Appends the records of the segment in which replay begins to the directory, so that a start need not read what is before
    /// that for the segment's footer.
    async fn write_records(
        &self,
        pages: &mut Pages,
        as_of: Lsn,
        replay_from: Position,
        records: &NewRecords,
    ) -> Result<(), EngineError> {
        let inner = &self.0;
        let mut first = records.first as u32;
        let mut chunks = records.entries.chunks(RECORDS_PER_PAGE).peekable();
        loop {
            let entries = chunks.next().unwrap_or_default().to_vec();
            let end = chunks.peek().map_or(replay_from.offset, |next| u64::from(next[0].offset_units) * 8);
            let count = entries.len() as u32;
            let page = RecordsPage { segment: replay_from.segment, epoch: inner.epoch, first, end, entries };
            let mut bytes = Vec::new();
            put_page(PageKind::Records, as_of, 0, &page.encode(), &mut inner.packer.borrow_mut(), &mut bytes)
                .map_err(|error| self.unwritable(MailboxId(0), error))?;
            pages.append(&bytes);
            inner.storage.yield_now().await;
            first += count;
            if chunks.peek().is_none() {
                return Ok(());
            }
        }
    }

    fn unwritable(&self, mailbox: MailboxId, error: FormatError) -> EngineError {
        let place = format!("{}, mailbox {mailbox}", crate::storage::local::shard_directory(self.0.id));
        Damage { place, error }.into()
    }

    /// The blobs whose pages are in use once `written` is taken over.
    fn blobs_in_use(&self, written: &[Written], blob: u32) -> BTreeSet<u32> {
        let state = self.0.state.borrow();
        let mut counts = state.slots.pages_by_blob().clone();
        let mut count = |page: PageLocation, by: i32| {
            if !page.is_none() {
                let count = counts.entry(page.blob).or_default();
                *count = count.wrapping_add_signed(by);
            }
        };
        for written in written {
            let Some(slot) = state.slots.get(&written.mailbox) else { continue };
            let (page, delta_page) = slot.pages();
            [page, delta_page].into_iter().for_each(|page| count(page, -1));
            [written.page, written.delta].into_iter().for_each(|page| count(page, 1));
        }
        counts.retain(|_, count| *count > 0);
        counts.into_keys().chain([blob]).collect()
    }

    /// Where pages are spread over too many blobs, lets the checkpoint write those of the emptiest anew, or some of them: what it
    /// writes takes memory meanwhile.
    async fn move_some_pages(&self) {
        let inner = &self.0;
        let emptiest = {
            let state = inner.state.borrow();
            let blobs = state.slots.pages_by_blob();
            let fewest = blobs.iter().min_by_key(|&(_, pages)| *pages).map(|(blob, _)| *blob);
            fewest.filter(|_| blobs.len() >= BLOBS_MAX)
        };
        let Some(emptiest) = emptiest else { return };
        let (mut marked, mut next) = (0, Some(MailboxId(0)));
        while let Some(from) = next {
            let (more, after) = inner.state.borrow_mut().slots.move_pages_of(emptiest, from, SLOTS_AT_ONCE);
            marked += more;
            next = after.filter(|_| marked < MAILBOXES_MOVED_MAX);
            inner.storage.yield_now().await;
        }
    }

    /// Lets the slots refer to the pages that are committed now, and drops the changes that these contain. Other tasks run
    /// meanwhile: until its turn comes a slot refers to what it did, which is still there.
    async fn take_over(&self, written: Vec<Written>, full: bool, directory: Directory) {
        let inner = &self.0;
        for chunk in written.chunks(SLOTS_TAKEN_OVER) {
            self.take_over_some(chunk);
            inner.storage.yield_now().await;
        }
        let known = directory.known;
        let accounts: Vec<AccountId> = inner.state.borrow().accounts.in_use().map(|(account, _)| account).collect();
        for chunk in accounts.chunks(SLOTS_TAKEN_OVER) {
            inner.state.borrow_mut().accounts.rest_after(chunk, known);
            inner.storage.yield_now().await;
        }
        let state = &mut *inner.state.borrow_mut();
        for account in &directory.changed {
            if state.directory.get(account).is_none_or(|(as_of, _)| *as_of <= known) {
                state.directory_changed.remove(account);
            }
        }
        if full {
            self.0.full_directory.set(false);
            // Deletions before a full directory need not be repeated.
            state.deleted.retain(|_, &mut lsn| lsn > known);
        }
    }

    fn take_over_some(&self, written: &[Written]) {
        let slots = &mut self.0.state.borrow_mut().slots;
        for written in written {
            let mailbox = written.mailbox;
            slots.set_pages(&mailbox, written.page, written.delta, written.as_of);
            let Some(slot) = slots.get_mut(&mailbox) else { continue };
            // A page that was damaged is behind it once a whole one has been written.
            slot.rewrite &= !written.whole;
            slot.moves &= !written.whole;
            slot.delta.drain(..written.changes);
            slot.delta.shrink_to_fit();
            slot.dirty = slot.meta.as_of != written.as_of || !slot.delta.is_empty() || slot.rewrite || slot.moves;
            slots.rest(mailbox);
        }
    }
}

/// Adds the accounts of a page's mailboxes, all of them or those that have changed, to the page: a start puts an account together in
/// one go if everything of it stands close together.
fn add_accounts(page: &mut DirectoryPage, state: &State, added: &mut BTreeSet<AccountId>, all: bool) {
    let mut bytes = 0;
    for id in page.mailboxes.iter().map(|entry| AccountId(entry.account)) {
        if bytes >= ACCOUNTS_PAGE_BYTES || added.contains(&id) {
            continue;
        }
        // One that has changed is in use.
        let entry = if all {
            state.accounts.get(&id).map(|account| (bytes_of(&account), account.to_entry(id)))
        } else {
            let changed = state.accounts.get_in_use(id).filter(|account| account.dirty);
            changed.map(|account| (bytes_of(account), account.to_entry(id)))
        };
        if let Some((more, entry)) = entry {
            added.insert(id);
            bytes += more;
            page.accounts.push(entry);
        }
    }
}

/// What an account takes in a directory, roughly.
fn bytes_of(account: &AccountState) -> usize {
    let names = account.subscriptions.iter().map(String::len).sum::<usize>();
    let values = account.attributes.iter().map(|((_, name), value)| name.len() + value.len()).sum::<usize>();
    64 + names + values
}

/// Whether the next checkpoint is to write all of the directory, so that starts need not read the parts that others have
/// written since.
fn wants_full_directory(indexes: &[IndexEntry]) -> bool {
    let Some(last) = indexes.iter().rposition(|entry| entry.full) else { return true };
    let parts = &indexes[last + 1..];
    let parts_len: u64 = parts.iter().map(|entry| entry.directory_len).sum();
    parts.len() >= DIRECTORIES_MIN && (parts.len() >= DIRECTORIES_MAX || parts_len >= indexes[last].directory_len)
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
