//! Indexes of mailboxes in memory: put together from pages when somebody needs one, dropped when nobody does.

use crate::error::{Damage, EngineError};
use crate::format::FormatError;
use crate::format::codec::Wire;
use crate::format::frame::Unpacker;
use crate::format::page::{DeltaChange, DeltaPage, PageKind, PageLocation, claimed_contents_len, open_page, restore};
use crate::ids::{Epoch, MailboxId};
use crate::index::{Change, MailboxIndex};
use crate::shard::{Shard, ShardEvent};
use crate::slots::Slot;
use crate::storage::{BlobName, BlobStore, Storage, StorageError};

/// The most recently used indexes, which are never dropped: an operation on several mailboxes needs all of theirs at once.
pub(crate) const INDEXES_KEPT: usize = 8;
/// Pages with more contents are put together off the worker.
const CONTENTS_READ_HERE: usize = 512 << 10;
/// Whoever loads an index lets so many mailboxes rest that nobody uses any more.
const SLOTS_RESTED: usize = 4;

impl<S: Storage> Shard<S> {
    /// The bytes of a page, if there is one.
    async fn read_page(&self, page: PageLocation) -> Result<Option<Vec<u8>>, EngineError> {
        if page.is_none() {
            return Ok(None);
        }
        let name = BlobName::Index { blob: page.blob, epoch: Epoch(page.epoch) };
        Ok(Some(self.0.blobs.get(name, page.offset, page.len as usize).await?))
    }

    pub(crate) async fn read_delta(
        &self,
        mailbox: MailboxId,
        page: PageLocation,
    ) -> Result<Vec<DeltaChange>, EngineError> {
        let Some(bytes) = self.read_page(page).await? else { return Ok(Vec::new()) };
        let changes = open_delta(mailbox, &bytes, &mut self.0.unpacker.borrow_mut());
        changes.map_err(|error| self.page_damage(page, error))
    }

    fn page_damage(&self, page: PageLocation, error: FormatError) -> EngineError {
        let directory = crate::storage::local::shard_directory(self.0.id);
        let file = crate::storage::local::index_file(page.blob, Epoch(page.epoch));
        Damage { place: format!("{directory}/idx/{file} at offset {}", page.offset), error }.into()
    }

    /// Makes a mailbox's index present in memory. It may be gone again after any await.
    ///
    /// # Errors
    /// No such mailbox, or pages that cannot be read.
    pub(crate) async fn load_index(&self, mailbox: MailboxId) -> Result<(), EngineError> {
        loop {
            let (pages, as_of) = {
                let mut state = self.0.state.borrow_mut();
                let slot = state.slots.get_mut(&mailbox).ok_or(crate::error::Refusal::NoSuchMailbox)?;
                self.0.clock.set(self.0.clock.get() + 1);
                slot.used = self.0.clock.get();
                if slot.index.is_some() {
                    drop(state);
                    self.count(|stats| stats.index_cache_hits += 1);
                    return Ok(());
                }
                (slot.pages(), slot.page_as_of)
            };
            let mut result = self.assemble_index(mailbox, pages).await;
            let mut rebuilt = None;
            if let Err(error) = &result
                && is_damage(error)
            {
                // The pages are a cache of the log. One at a time: the next one may find it done.
                let _one_at_a_time = self.0.rebuild_lock.lock().await;
                let is_as_it_was = |slot: &Slot| slot.index.is_none() && slot.pages() == pages;
                let found = self.0.state.borrow().slots.get(&mailbox).map(|slot| is_as_it_was(&slot));
                if !found.ok_or(crate::error::Refusal::NoSuchMailbox)? {
                    continue;
                }
                rebuilt = Some(error.clone());
                result = self.rebuild_index(mailbox, as_of).await;
            }
            let mut state = self.0.state.borrow_mut();
            let slot = state.slots.get_mut(&mailbox).ok_or(crate::error::Refusal::NoSuchMailbox)?;
            if slot.pages() != pages {
                // A checkpoint has moved the pages meanwhile.
                continue;
            }
            if slot.index.is_none() {
                let mut index = result?;
                for (_, change) in &slot.delta {
                    index.apply(change);
                }
                if rebuilt.is_some() {
                    slot.recount(&index);
                }
                self.0.cached_index_bytes.set(self.0.cached_index_bytes.get() + index.memory_bytes());
                // It may have been at rest meanwhile.
                slot.used = self.0.clock.get();
                slot.flags_modseq = slot.meta.highest_modseq;
                slot.index = Some(Box::new(index));
                self.count(|stats| stats.index_loads += 1);
                if let Some(error) = rebuilt {
                    slot.rewrite = true;
                    slot.dirty = true;
                    self.count(|stats| stats.indexes_rebuilt += 1);
                    self.tell(ShardEvent::IndexRebuilt(mailbox, error));
                }
                state.slots.note_index(mailbox);
                state.slots.rest_some(SLOTS_RESTED);
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
        (page, delta_page): (PageLocation, PageLocation),
    ) -> Result<MailboxIndex, EngineError> {
        let (bytes, delta_bytes) = (self.read_page(page).await?, self.read_page(delta_page).await?);
        let contents: usize =
            [&bytes, &delta_bytes].into_iter().flatten().filter_map(|page| claimed_contents_len(page)).sum();
        let job = move |unpacker: &mut Unpacker| assemble(mailbox, bytes.as_deref(), delta_bytes.as_deref(), unpacker);
        let assembled = if contents <= CONTENTS_READ_HERE {
            job(&mut self.0.unpacker.borrow_mut())
        } else {
            self.0.storage.offload(move || job(&mut Unpacker::default())).await
        };
        assembled.map_err(|(of_delta, error)| self.page_damage(if of_delta { delta_page } else { page }, error))
    }

    /// Drops indexes, least recently used first, while there are more than the configured bytes of them.
    pub(crate) fn evict_indexes(&self) {
        let limit = self.0.config.index_cache_bytes;
        if self.0.cached_index_bytes.get() <= limit {
            return;
        }
        let mut state = self.0.state.borrow_mut();
        let with_index = state.slots.with_index().into_iter();
        let mut loaded: Vec<(u64, MailboxId, usize)> = with_index
            .filter(|(_, slot)| !slot.rewrite)
            .filter_map(|(mailbox, slot)| Some((slot.used, mailbox, slot.index.as_ref()?.memory_bytes())))
            .collect();
        loaded.sort_unstable();
        let mut total: usize = loaded.iter().map(|(_, _, bytes)| bytes).sum();
        let evictable = loaded.len().saturating_sub(INDEXES_KEPT);
        for (_, mailbox, bytes) in loaded.into_iter().take(evictable) {
            // Down to three quarters, so that not every load has to look through all of them.
            if total <= limit - limit / 4 {
                break;
            }
            if let Some(slot) = state.slots.get_mut(&mailbox) {
                slot.index = None;
                total -= bytes;
                state.slots.rest(mailbox);
            }
        }
        self.0.cached_index_bytes.set(total);
    }

    /// Counts the memory of indexes anew: they grow as they are changed.
    pub(crate) fn count_indexes(&self) {
        let mut state = self.0.state.borrow_mut();
        let with_index = state.slots.with_index().into_iter();
        let bytes = with_index.filter_map(|(_, slot)| slot.index.as_ref()).map(|index| index.memory_bytes()).sum();
        self.0.cached_index_bytes.set(bytes);
    }
}

/// Puts an index together from the bytes of its page and of its delta page. An error says whether it is of the latter.
fn assemble(
    mailbox: MailboxId,
    page: Option<&[u8]>,
    delta_page: Option<&[u8]>,
    unpacker: &mut Unpacker,
) -> Result<MailboxIndex, (bool, FormatError)> {
    let mut index = MailboxIndex::default();
    if let Some(page) = page {
        let opened = open_page(PageKind::Mailbox, mailbox.0, page, unpacker);
        let read = opened.and_then(|(header, archive)| MailboxIndex::from_page(&header, &archive));
        index = read.map_err(|error| (false, error))?;
    }
    let changes = delta_page.map_or_else(|| Ok(Vec::new()), |page| open_delta(mailbox, page, unpacker));
    for change in changes.map_err(|error| (true, error))? {
        let change = Change::decode(&change.payload)
            .map_err(|source| (true, FormatError::Decode { what: "delta page", source }))?;
        index.apply(&change);
    }
    Ok(index)
}

fn open_delta(mailbox: MailboxId, page: &[u8], unpacker: &mut Unpacker) -> Result<Vec<DeltaChange>, FormatError> {
    let (_, archive) = open_page(PageKind::MailboxDelta, mailbox.0, page, unpacker)?;
    Ok(restore::<DeltaPage>(&archive)?.changes)
}

/// Whether pages cannot be read however often one tries.
pub(crate) fn is_damage(error: &EngineError) -> bool {
    match error {
        EngineError::Damaged(_) => true,
        EngineError::Storage(error) => matches!(**error, StorageError::NotFound(_)),
        _ => false,
    }
}
