//! Checkpoints: index pages of what has changed, so that a restart replays only the log's tail.
//!
//! A checkpoint is fuzzy: each mailbox's page is its published state at the moment it was written, with the LSN of that
//! moment, and replay ignores what a page already has. The log is replayed from where it stood when the checkpoint began.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rkyv::util::AlignedVec;

use crate::accounts::AccountState;
use crate::error::{Damage, EngineError, Refusal};
use crate::format::codec::Wire;
use crate::format::frame::Packer;
use crate::format::manifest::IndexEntry;
use crate::format::page::{
    DeltaChange, DeltaPage, DirectoryEntry, DirectoryPage, PageKind, PageLocation, RecordsPage, archive, put_page,
};
use crate::format::segment::FooterEntry;
use crate::format::{BLOCK_BYTES, FormatError, round_up_to_block};
use crate::ids::{AccountId, Lsn, MailboxId, Position, SegmentId};
use crate::index::{Change, MailboxIndex};
use crate::indexes::is_damage;
use crate::join::join_all;
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
/// Slots and accounts that take over new pages at once.
const SLOTS_TAKEN_OVER: usize = 256;
/// Entries of one directory page.
const ENTRIES_PER_PAGE: usize = 512;
/// Records of one page.
const RECORDS_PER_PAGE: usize = 8192;
/// A directory page of accounts is closed at this size.
const ACCOUNTS_PAGE_BYTES: usize = 256 << 10;
/// A checkpoint lets other tasks run after so many steps, at least and at most. A step is what the page of a small mailbox takes,
/// some 15 us.
const STEPS_MIN: usize = 16;
const STEPS_MAX: usize = 1024;
/// What larger pieces of work take: 512 entries of a directory, 256 slots that take over their pages, 1,024 that are looked at.
const PIECE_STEPS: usize = 16;
/// Bytes of contents that take another step to put together and to compress.
const CONTENTS_PER_STEP: usize = 4 << 10;
/// Pages with more contents are compressed off the worker.
const CONTENTS_PACKED_HERE: usize = 256 << 10;
/// Mailboxes whose pages are read at the same time, at most, and the bytes of these pages, unless one alone has more.
const READS_MAX: usize = 128;
const READ_BYTES_MAX: usize = 1 << 20;
/// The least and the most that a checkpoint takes of the worker while others want it, in eighths of what they get.
const EIGHTHS_MIN: u64 = 1;
const EIGHTHS_MAX: u64 = 8;

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
struct Pace {
    /// Steps that are left of this turn.
    left: usize,
    steps: usize,
    begun: Duration,
}

impl Pace {
    /// How many steps the next turn has, after one that took so long and so long a time that the others had. Never more than twice
    /// as many: few steps say little of how long one takes.
    fn next_steps(&self, took: Duration, away: Duration, eighths: u64) -> usize {
        let done = self.steps.saturating_sub(self.left) as u128;
        let share = done * away.as_micros() * u128::from(eighths) / (8 * took.as_micros().max(1));
        let share = usize::try_from(share).unwrap_or(STEPS_MAX);
        share.clamp(STEPS_MIN, STEPS_MAX.min(2 * self.steps))
    }
}

/// A checkpoint being written.
struct Writing {
    blob: u32,
    as_of: Lsn,
    pages: Pages,
    pace: Pace,
    written: Vec<Written>,
    /// How the pages that are written change the number of those in use, by blob.
    in_use: BTreeMap<u32, i32>,
}

/// What is to be written of a mailbox.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// What stands in the directory.
    Entry,
    Delta,
    Page,
}

/// What was read of a mailbox for that.
struct Basis {
    pages: (PageLocation, PageLocation),
    read: Read,
}

enum Read {
    Nothing,
    Delta(Vec<DeltaChange>),
    Index(Box<MailboxIndex>),
}

/// A mailbox has changed so that something else must be read first.
struct Changed;

/// What a page is to hold; nothing if only what stands in the directory has changed.
type Contents = Option<(PageKind, AlignedVec)>;

/// A mailbox's page in the new blob, to be taken over once the manifest is committed.
struct Written {
    mailbox: MailboxId,
    as_of: Lsn,
    /// The pages that these replace.
    replaced: [PageLocation; 2],
    /// Changes of the delta that are in the page.
    changes: usize,
    page: PageLocation,
    delta: PageLocation,
    /// The page has been written, and has everything.
    whole: bool,
}

impl Default for Basis {
    fn default() -> Self {
        Self { pages: Default::default(), read: Read::Nothing }
    }
}

impl Wanted {
    fn of(slot: &Slot) -> Self {
        if slot.rewrite || slot.moves {
            return Self::Page;
        }
        if slot.delta.is_empty() {
            return Self::Entry;
        }
        let (page, delta_page) = slot.pages();
        let new_bytes: usize = slot.delta.iter().map(|(_, change)| delta_bytes(change)).sum();
        let outgrown = new_bytes + delta_page.len as usize > DELTA_BYTES_MAX.max(page.len as usize / 8);
        if page.is_none() || outgrown { Self::Page } else { Self::Delta }
    }
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
    /// Those that the checkpoint does not list yet, or all. None if the segment is not the active one: then it is being sealed, and
    /// its footer lists them, unless a start has to read it.
    fn before(from: Position, all: bool, log: &Log) -> Option<Self> {
        let active = log.active.as_ref().filter(|active| active.name.segment == from.segment)?;
        let entries = &active.entries[..];
        let end = entries.partition_point(|entry| u64::from(entry.offset_units) * 8 < from.offset);
        let (segment, listed) = log.checkpointed_records;
        let first = if all || segment != from.segment { 0 } else { listed.min(end) };
        Some(Self { first, entries: entries[first..end].to_vec() })
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
        let mut writing = Writing {
            blob,
            as_of,
            pages: Pages::new(),
            pace: Pace { left: STEPS_MIN, steps: STEPS_MIN, begun: inner.storage.now() },
            written: Vec::new(),
            in_use: BTreeMap::new(),
        };
        self.move_some_pages(&mut writing.pace).await;
        self.write_mailboxes(&mut writing).await?;
        let directory_offset = writing.pages.offset;
        let directory = self.write_directory(&mut writing, full).await?;
        if let Some(records) = &records {
            self.write_records(&mut writing, replay_from, records).await?;
        }
        let directory_len = writing.pages.offset - directory_offset;
        let epoch = inner.epoch;
        let name = BlobName::Index { blob, epoch };
        inner.blobs.put(name, std::mem::take(&mut writing.pages.parts)).await?;

        let entry = IndexEntry { blob, epoch, directory_offset, directory_len, full };
        let mut unused = Vec::new();
        let used = self.blobs_in_use(&writing);
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
        self.take_over(&mut writing, full, directory).await;
        // Indexes have grown since they were loaded.
        self.count_indexes();
        self.evict_indexes();
        {
            let mut log = inner.log.borrow_mut();
            log.bytes_since_checkpoint = log.bytes_since_checkpoint.saturating_sub(log_bytes);
            log.checkpointed_records = match records {
                Some(records) => (replay_from.segment, records.first + records.entries.len()),
                None => (SegmentId(0), 0),
            };
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

    /// Waits for `event` and lets other tasks run, and decides how much is to be done before that happens again: for an eighth of
    /// the time that the others took, or a busy shard's checkpoint would never end; for as much as they took when the log has
    /// outgrown `checkpoint_bytes` by far, since a start replays it.
    async fn next_turn<T>(&self, pace: &mut Pace, event: impl Future<Output = T>) -> T {
        let storage = &self.0.storage;
        if pace.left == pace.steps {
            // The others have just had theirs.
            let result = event.await;
            pace.begun = storage.now();
            return result;
        }
        let ended = storage.now();
        storage.yield_now().await;
        let result = event.await;
        let begun = storage.now();
        let eighths = eighths(self.0.log.borrow().bytes_since_checkpoint, self.0.config.checkpoint_bytes);
        pace.steps = pace.next_steps(ended - pace.begun, begun - ended, eighths);
        (pace.left, pace.begun) = (pace.steps, begun);
        result
    }

    /// Notes steps that have been made, and lets other tasks run if it is time to.
    async fn made(&self, steps: usize, pace: &mut Pace) {
        pace.left = pace.left.saturating_sub(steps);
        if pace.left == 0 {
            self.next_turn(pace, std::future::ready(())).await;
        }
    }

    /// Writes the pages of all mailboxes that have changed.
    async fn write_mailboxes(&self, writing: &mut Writing) -> Result<(), EngineError> {
        let mut dirty: Vec<MailboxId> = Vec::new();
        let mut next = Some(MailboxId(0));
        while let Some(from) = next {
            {
                let state = self.0.state.borrow();
                let mut slots = state.slots.in_use_from(from);
                let some = slots.by_ref().take(SLOTS_AT_ONCE).filter(|(_, slot)| slot.dirty);
                dirty.extend(some.map(|(mailbox, _)| mailbox));
                next = slots.next().map(|(mailbox, _)| mailbox);
            }
            self.made(PIECE_STEPS, &mut writing.pace).await;
        }
        let mut dirty = &dirty[..];
        while !dirty.is_empty() {
            let (some, rest) = dirty.split_at(self.readable_at_once(dirty, writing.pace.steps.min(READS_MAX)));
            dirty = rest;
            let reads = join_all(some.iter().map(|mailbox| self.read_basis(*mailbox)));
            let bases = self.next_turn(&mut writing.pace, reads).await;
            for (mailbox, basis) in some.iter().zip(bases) {
                self.write_mailbox(*mailbox, basis?, writing).await?;
            }
        }
        Ok(())
    }

    /// How many of the next mailboxes may be read at the same time.
    fn readable_at_once(&self, mailboxes: &[MailboxId], most: usize) -> usize {
        let state = self.0.state.borrow();
        let mut bytes = 0;
        let fits = mailboxes.iter().take(most).take_while(|mailbox| {
            let pages = state.slots.get(mailbox).filter(|slot| slot.index.is_none()).map(|slot| slot.pages());
            bytes += pages.map_or(0, |(page, delta_page)| page.len as usize + delta_page.len as usize);
            bytes <= READ_BYTES_MAX
        });
        fits.count().max(1)
    }

    /// Reads what the page or delta page of a mailbox needs that is not in memory.
    async fn read_basis(&self, mailbox: MailboxId) -> Result<Basis, EngineError> {
        loop {
            let (wanted, pages, has_index) = {
                let state = self.0.state.borrow();
                let Some(slot) = state.slots.get(&mailbox) else { return Ok(Basis::default()) };
                (Wanted::of(&slot), slot.pages(), slot.index.is_some())
            };
            let read = match wanted {
                Wanted::Page if !has_index => match self.assemble_index(mailbox, pages).await {
                    Err(error) if is_damage(&error) => {
                        match self.load_index(mailbox).await {
                            Err(EngineError::Refused(Refusal::NoSuchMailbox)) => {}
                            loaded => loaded?,
                        }
                        Read::Nothing
                    }
                    index => Read::Index(Box::new(index?)),
                },
                Wanted::Delta => match self.read_delta(mailbox, pages.1).await {
                    Err(error) if is_damage(&error) => {
                        if let Some(slot) = self.0.state.borrow_mut().slots.get_mut(&mailbox) {
                            slot.rewrite = true;
                        }
                        continue;
                    }
                    older => Read::Delta(older?),
                },
                Wanted::Page | Wanted::Entry => Read::Nothing,
            };
            return Ok(Basis { pages, read });
        }
    }

    /// Writes the page or delta page of one mailbox, if it still exists.
    async fn write_mailbox(
        &self,
        mailbox: MailboxId,
        mut basis: Basis,
        writing: &mut Writing,
    ) -> Result<(), EngineError> {
        let (mut written, contents) = loop {
            match self.look_at_mailbox(mailbox, basis) {
                Ok(Some(found)) => break found,
                Ok(None) => return Ok(()),
                Err(Changed) => basis = self.read_basis(mailbox).await?,
            }
        };
        let contents_len = contents.as_ref().map_or(0, |(_, contents)| contents.len());
        if let Some((kind, contents)) = contents {
            let bytes = self.pack_page(kind, written.as_of, mailbox, contents).await?;
            let offset = writing.pages.push(&bytes);
            let place = PageLocation { blob: writing.blob, epoch: self.0.epoch.0, offset, len: bytes.len() as u32 };
            let [page, _] = written.replaced;
            (written.page, written.delta) =
                if written.whole { (place, PageLocation::default()) } else { (page, place) };
        }
        let replaced = written.replaced.into_iter().map(|page| (page, -1));
        let new = [written.page, written.delta].into_iter().map(|page| (page, 1));
        for (page, by) in replaced.chain(new).filter(|(page, _)| !page.is_none()) {
            *writing.in_use.entry(page.blob).or_default() += by;
        }
        writing.written.push(written);
        self.made(1 + contents_len / CONTENTS_PER_STEP, &mut writing.pace).await;
        Ok(())
    }

    /// What is to be written of a mailbox, if it still exists. Contents, LSN and number of changes belong together.
    fn look_at_mailbox(&self, mailbox: MailboxId, basis: Basis) -> Result<Option<(Written, Contents)>, Changed> {
        let state = self.0.state.borrow();
        let Some(slot) = state.slots.get(&mailbox) else { return Ok(None) };
        let (page, delta) = slot.pages();
        let is_current = basis.pages == slot.pages();
        let contents = match (Wanted::of(&slot), basis.read) {
            (Wanted::Entry, _) => None,
            (Wanted::Page, read) => match (&slot.index, read) {
                (Some(index), _) => Some((PageKind::Mailbox, index.to_page())),
                (None, Read::Index(mut index)) if is_current => {
                    slot.delta.iter().for_each(|(_, change)| index.apply(change));
                    Some((PageKind::Mailbox, index.to_page()))
                }
                _ => return Err(Changed),
            },
            (Wanted::Delta, Read::Delta(mut changes)) if is_current => {
                let newer = slot.delta.iter();
                changes.extend(newer.map(|(lsn, change)| DeltaChange { lsn: lsn.0, payload: change.encode() }));
                Some((PageKind::MailboxDelta, archive(&DeltaPage { changes })))
            }
            (Wanted::Delta, _) => return Err(Changed),
        };
        let mut as_of = slot.meta.as_of;
        if planted::is_on(Bug::CheckpointPendingTip) && slot.tip.is_some() && contents.is_some() {
            as_of = Lsn(as_of.0 + 64);
        }
        let whole = matches!(contents, Some((PageKind::Mailbox, _)));
        let changes = slot.delta.len();
        let written = Written { mailbox, as_of, replaced: [page, delta], changes, page, delta, whole };
        Ok(Some((written, contents)))
    }

    /// The bytes of a mailbox's page, compressed off the worker if there is much of it.
    async fn pack_page(
        &self,
        kind: PageKind,
        as_of: Lsn,
        mailbox: MailboxId,
        contents: AlignedVec,
    ) -> Result<Vec<u8>, EngineError> {
        let len = contents.len();
        let pack = move |packer: &mut Packer| {
            let mut bytes = Vec::new();
            put_page(kind, as_of, mailbox.0, &contents, packer, &mut bytes).map(|_| bytes)
        };
        let packed = if len <= CONTENTS_PACKED_HERE {
            pack(&mut self.0.packer.borrow_mut())
        } else {
            self.0.storage.offload(move || pack(&mut Packer::default())).await
        };
        packed.map_err(|error| self.unwritable(mailbox, error))
    }

    /// Appends the directory: of all mailboxes and accounts, or of those that have changed. Other tasks run between its pages,
    /// each of which is as of when it was written, like all pages.
    async fn write_directory(&self, writing: &mut Writing, full: bool) -> Result<Directory, EngineError> {
        let inner = &self.0;
        let written = std::mem::take(&mut writing.written);
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
            self.put_directory(writing, page).await?;
        }
        for chunk in written.chunks(ENTRIES_PER_PAGE).take_while(|_| !full) {
            let mut page = DirectoryPage::default();
            {
                let state = inner.state.borrow();
                let entry_of = |written: &Written| Some(written.to_entry(&*state.slots.get(&written.mailbox)?));
                page.mailboxes = chunk.iter().filter_map(entry_of).collect();
                add_accounts(&mut page, &state, &mut with_mailboxes, full);
            }
            self.put_directory(writing, page).await?;
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
            self.put_directory(writing, DirectoryPage { mailboxes, ..DirectoryPage::default() }).await?;
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
            self.write_accounts(writing, &others).await?;
            self.made(PIECE_STEPS, &mut writing.pace).await;
        }
        if !full {
            let others: Vec<AccountId> = {
                let state = inner.state.borrow();
                let dirty = state.accounts.in_use().filter(|(_, account)| account.dirty).map(|(account, _)| account);
                dirty.filter(|account| !with_mailboxes.contains(account)).collect()
            };
            self.write_accounts(writing, &others).await?;
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
                self.write_account_records(writing, &some).await?;
            }
        } else {
            self.write_account_records(writing, &changed).await?;
        }
        writing.written = written;
        Ok(Directory { known, changed })
    }

    async fn write_accounts(&self, writing: &mut Writing, accounts: &[AccountId]) -> Result<(), EngineError> {
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
            self.put_directory(writing, page).await?;
        }
        Ok(())
    }

    async fn write_account_records(&self, writing: &mut Writing, records: &[AccountId]) -> Result<(), EngineError> {
        for chunk in records.chunks(ENTRIES_PER_PAGE) {
            let directory = {
                let state = self.0.state.borrow();
                chunk.iter().filter_map(|id| state.directory_entry(*id)).collect()
            };
            self.put_directory(writing, DirectoryPage { directory, ..DirectoryPage::default() }).await?;
        }
        Ok(())
    }

    /// Appends a page of the directory, and lets other tasks run.
    async fn put_directory(&self, writing: &mut Writing, page: DirectoryPage) -> Result<(), EngineError> {
        self.append_page(writing, PageKind::Directory, &archive(&page)).await
    }

    async fn append_page(&self, writing: &mut Writing, kind: PageKind, archive: &[u8]) -> Result<(), EngineError> {
        let mut bytes = Vec::new();
        put_page(kind, writing.as_of, 0, archive, &mut self.0.packer.borrow_mut(), &mut bytes)
            .map_err(|error| self.unwritable(MailboxId(0), error))?;
        writing.pages.append(&bytes);
        self.made(PIECE_STEPS, &mut writing.pace).await;
        Ok(())
    }

    /// Appends the records of the segment in which replay begins to the directory, so that a start need not read what is before
    /// that for the segment's footer.
    async fn write_records(
        &self,
        writing: &mut Writing,
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
            self.append_page(writing, PageKind::Records, &page.encode()).await?;
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

    /// The blobs whose pages are in use once what was written is taken over.
    fn blobs_in_use(&self, writing: &Writing) -> BTreeSet<u32> {
        let state = self.0.state.borrow();
        let mut counts = state.slots.pages_by_blob().clone();
        let mut count = |blob: u32, by: i32| {
            let count = counts.entry(blob).or_default();
            *count = count.wrapping_add_signed(by);
        };
        writing.in_use.iter().for_each(|(&blob, &by)| count(blob, by));
        // Mailboxes that have been deleted meanwhile replace nothing, and have no pages.
        for mailbox in state.deleted.keys() {
            let Ok(place) = writing.written.binary_search_by_key(mailbox, |written| written.mailbox) else { continue };
            let written = &writing.written[place];
            written.replaced.iter().filter(|page| !page.is_none()).for_each(|page| count(page.blob, 1));
            [written.page, written.delta].iter().filter(|page| !page.is_none()).for_each(|page| count(page.blob, -1));
        }
        counts.retain(|_, count| *count > 0);
        counts.into_keys().chain([writing.blob]).collect()
    }

    /// Where pages are spread over too many blobs, lets the checkpoint write those of the emptiest anew, or some of them: what it
    /// writes takes memory meanwhile.
    async fn move_some_pages(&self, pace: &mut Pace) {
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
            self.made(PIECE_STEPS, pace).await;
        }
    }

    /// Lets the slots refer to the pages that are committed now, and drops the changes that these contain. Other tasks run
    /// meanwhile: until its turn comes a slot refers to what it did, which is still there.
    async fn take_over(&self, writing: &mut Writing, full: bool, directory: Directory) {
        let inner = &self.0;
        for chunk in writing.written.chunks(SLOTS_TAKEN_OVER) {
            self.take_over_some(chunk);
            self.made(PIECE_STEPS, &mut writing.pace).await;
        }
        let known = directory.known;
        let accounts: Vec<AccountId> = inner.state.borrow().accounts.in_use().map(|(account, _)| account).collect();
        for chunk in accounts.chunks(SLOTS_TAKEN_OVER) {
            inner.state.borrow_mut().accounts.rest_after(chunk, known);
            self.made(PIECE_STEPS, &mut writing.pace).await;
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

/// How many eighths of the time that other tasks get a checkpoint takes: more with each quarter by which the log since the last
/// one has outgrown what lets it begin.
fn eighths(log_bytes: u64, checkpoint_bytes: u64) -> u64 {
    let quarter = (checkpoint_bytes / 4).max(1);
    (EIGHTHS_MIN + log_bytes.saturating_sub(checkpoint_bytes) / quarter).min(EIGHTHS_MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_as_long_as_the_others_time_allows_and_grows_little_by_little() {
        let (ms, us) = (Duration::from_millis, Duration::from_micros);
        let steps = |steps, left, took, away, eighths| {
            Pace { left, steps, begun: Duration::ZERO }.next_steps(took, away, eighths)
        };
        // 15 us a step; an eighth of 8 ms is some 66 of them, as much as these 1,024 at most.
        assert_eq!(steps(64, 0, us(960), ms(8), 1), 66);
        assert_eq!(steps(64, 0, us(960), ms(8), 8), 128);
        assert_eq!(steps(1024, 512, us(7680), ms(100), 8), STEPS_MAX);
        assert_eq!(steps(64, 0, us(960), us(10), 1), STEPS_MIN);
        // It took no time that the clock shows.
        assert_eq!(steps(16, 15, us(0), ms(8), 8), 32);
    }

    #[test]
    fn the_share_of_a_checkpoint_grows_with_the_tail() {
        let shares = [0, 64, 79, 80, 96, 128, 175, 176, 1000, u64::MAX].map(|log_bytes| eighths(log_bytes, 64));
        assert_eq!(shares, [1, 1, 1, 2, 3, 5, 7, 8, 8, 8]);
        assert_eq!(eighths(5, 0), 6);
    }
}
