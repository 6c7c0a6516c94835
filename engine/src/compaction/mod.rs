//! Compaction: what lives of some segments is written anew, and they go.
//!
//! A run takes a number of sealed segments, its victims. It looks into every mailbox for messages whose records lie in them,
//! writes these records once more, by account, mailbox and UID, compressed harder, with their flags as they are, and folds
//! whatever else the victims said - changes of flags, expunges, names - into base records (`docs/format.md`). From then on
//! the log without the victims says the same as before.
//!
//! What a run has written is named by a manifest before anybody is told of it; the victims are named until a later one has
//! index pages that say where all messages lie now. In between both copies of a record are good, and a crash leaves both:
//! then one of them is dead, and a later run finds that. A crash before leaves files that nothing names, which a start removes.

mod copy;
mod fold;
mod output;
mod repack;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use roaring::RoaringBitmap;
use tokio::sync::Mutex;

use crate::error::{EngineError, Refusal};
use crate::format::frame::BLOCK_RAW_BYTES;
use crate::format::manifest::{Manifest, SegmentEntry};
use crate::format::record::kind;
use crate::format::segment::{Footer, TRAILER_BYTES, Trailer};
use crate::ids::{AccountId, Location, Lsn, MailboxId, SegmentId};
use crate::index::{MailboxIndex, Message};
use crate::planted::{self, Bug};
use crate::shard::{Shard, ShardEvent};
use crate::slots::{SLOTS_AT_ONCE, Slot};
use crate::storage::{BlobName, BlobStore, SegmentName, Storage};

/// A segment of which so many hundredths live, or fewer, is worth being compacted.
const WORTH_LIVE_PERCENT: u64 = 75;
/// So many segments of the log are left to age: what is expunged soon need not be written again.
const LOG_SEGMENTS_LEFT: usize = 2;
/// A look at all mailboxes reads all their pages. It is taken for new segments of the log when these are one part of so many of the
/// store, or more.
const LOG_PARTS: u64 = 8;
/// How often there is a look whether it pays to compact.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// It may pay when one part of so many of what lives has been deleted since the last look.
const DELETED_PARTS: u64 = 8;
/// Messages that are looked at before others have their turn, and records of which the head is read.
const MESSAGES_PER_TURN: usize = 4096;
const HEADS_PER_TURN: usize = 32;

/// Which segments to compact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Those of which much is dead, and those of the log that have never been compacted but the newest.
    WherePays,
    /// All that there are, also the one that is being written.
    All,
}

/// What compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactionReport {
    /// Segments that are gone.
    pub segments: u64,
    /// Their octets, and those of what was written in their place.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// Message records that live on.
    pub records: u64,
}

impl CompactionReport {
    fn add(&mut self, other: Self) {
        self.segments += other.segments;
        self.bytes_before += other.bytes_before;
        self.bytes_after += other.bytes_after;
        self.records += other.records;
    }
}

/// Segments that nothing in the state of the shard refers to any more, as soon as the index pages say so.
pub(crate) struct Pending {
    victims: BTreeSet<SegmentId>,
}

impl Pending {
    /// Lets a manifest not name the victims any more.
    pub(crate) fn edit(&self, manifest: &mut Manifest) {
        let epoch = manifest.epoch;
        let segments = &mut manifest.segments;
        // The log segments of the epoch under way are counted at the next start: none may be missing there.
        let stays = |entry: &SegmentEntry| entry.epoch == epoch && !entry.segment.is_compacted();
        segments.retain(|entry| !self.victims.contains(&entry.segment) || stays(entry));
        for entry in segments.iter_mut().filter(|entry| self.victims.contains(&entry.segment)) {
            *entry = entry.retired();
        }
        manifest.quarantined.retain(|quarantine| !self.victims.contains(&quarantine.from.segment));
    }
}

/// What a shard keeps in mind of compaction.
#[derive(Default)]
pub(crate) struct Compaction {
    /// Runs go one after another.
    lock: Mutex<()>,
    pending: RefCell<Option<Rc<Pending>>>,
    /// Segments that are not part of the log any more; some may still be read.
    retired: RefCell<BTreeSet<SegmentId>>,
    /// Retired segments whose files are still there.
    doomed: RefCell<BTreeSet<SegmentId>>,
    /// Segments that somebody reads at length, and how many do.
    held: RefCell<BTreeMap<SegmentId, u32>>,
    /// Segments from which on there may be blocks of messages that are still being delivered, and how many of these.
    delivering: RefCell<BTreeMap<SegmentId, u32>>,
    /// When there was last a look for what is dead: segments sealed and octets deleted by then.
    looked: Cell<(Option<u64>, u64)>,
    /// Segments that could not be read as they should: they stay as they are until the next start.
    unfit: RefCell<BTreeSet<SegmentId>>,
}

impl Compaction {
    /// What the next commit of index pages has to do with the list of segments.
    pub(crate) fn to_commit(&self) -> Option<Rc<Pending>> {
        self.pending.borrow().clone()
    }

    /// That has been done, durably.
    pub(crate) fn committed(&self) {
        if let Some(pending) = self.pending.borrow_mut().take() {
            self.retired.borrow_mut().extend(&pending.victims);
            self.doomed.borrow_mut().extend(&pending.victims);
        }
    }

    /// Whether a segment is not part of the log any more.
    pub(crate) fn is_retired(&self, segment: SegmentId) -> bool {
        let retired = self.retired.borrow();
        !retired.is_empty() && retired.contains(&segment)
    }

    pub(crate) fn has_doomed(&self) -> bool {
        !self.doomed.borrow().is_empty()
    }
}

/// Keeps compaction from the log from a segment on, while blocks are in it that no message names yet.
pub(crate) struct Delivering<S: Storage> {
    shard: Shard<S>,
    from: SegmentId,
}

impl<S: Storage> Drop for Delivering<S> {
    fn drop(&mut self) {
        let mut delivering = self.shard.0.compaction.delivering.borrow_mut();
        if let Some(count) = delivering.get_mut(&self.from) {
            *count -= 1;
            if *count == 0 {
                delivering.remove(&self.from);
            }
        }
    }
}

/// Keeps the files of segments while somebody reads them piece by piece.
pub(crate) struct Held<S: Storage> {
    shard: Shard<S>,
    segments: Vec<SegmentId>,
}

impl<S: Storage> Drop for Held<S> {
    fn drop(&mut self) {
        let compaction = &self.shard.0.compaction;
        for segment in &self.segments {
            let mut held = compaction.held.borrow_mut();
            if let Some(count) = held.get_mut(segment) {
                *count -= 1;
                if *count == 0 {
                    held.remove(segment);
                }
            }
        }
        if compaction.has_doomed() {
            let shard = self.shard.clone();
            self.shard.0.storage.spawn(async move { shard.remove_doomed().await });
        }
    }
}

impl<S: Storage> Shard<S> {
    /// Keeps the blocks that are written from now on, until the guard is dropped: then a message must have been published that
    /// names them.
    pub(crate) fn delivering(&self) -> Delivering<S> {
        let from = self.0.log.borrow().position.segment;
        *self.0.compaction.delivering.borrow_mut().entry(from).or_default() += 1;
        Delivering { shard: self.clone(), from }
    }

    /// Keeps the files of segments until the guard is dropped.
    pub(crate) fn hold(&self, segments: impl Iterator<Item = SegmentId>) -> Held<S> {
        let segments: BTreeSet<SegmentId> = segments.collect();
        let mut held = self.0.compaction.held.borrow_mut();
        segments.iter().for_each(|segment| *held.entry(*segment).or_default() += 1);
        Held { shard: self.clone(), segments: segments.into_iter().collect() }
    }

    /// The message where its record is now.
    ///
    /// # Errors
    /// Its old record is gone, and it has been expunged.
    pub(crate) async fn where_now(&self, message: &Message, mailbox: MailboxId) -> Result<Message, EngineError> {
        if !self.0.compaction.is_retired(message.location.segment) {
            return Ok(*message);
        }
        let found = self.look(mailbox, |index| index.message(message.uid)).await?;
        Ok(found.ok_or(Refusal::NoSuchMessage)?)
    }

    /// Compacts segments. Messages, flags and numbers stay as they are, and so does all else that anybody can see. On return
    /// the space of what was dead is free, but where it is still being read.
    ///
    /// # Errors
    /// Storage that fails, or has no room for what has to be written: then everything is as it was before the run that met
    /// it. Damaged segments are no error, they are left as they are.
    pub async fn compact(&self, choice: Choice) -> Result<CompactionReport, EngineError> {
        let _one_at_a_time = self.0.compaction.lock.lock().await;
        let result = self.compact_alone(choice).await;
        if let Err(error) = &result
            && !matches!(error, EngineError::Stopping(_))
        {
            self.tell(ShardEvent::CompactionFailed(error.clone()));
        }
        result
    }

    /// As [`Shard::compact`], for who has its lock.
    async fn compact_alone(&self, choice: Choice) -> Result<CompactionReport, EngineError> {
        if self.0.compaction.to_commit().is_some() {
            // The run before could not be committed.
            self.checkpoint().await?;
        }
        if choice == Choice::All {
            self.seal().await?;
        }
        let (mut report, mut failed) = (CompactionReport::default(), None);
        for victims in self.choose(choice).await? {
            match self.compact_segments(victims).await {
                Ok(done) => {
                    report.add(done);
                    self.tell(ShardEvent::Compacted(done));
                }
                // Of damage the others know nothing.
                Err(error @ EngineError::Damaged(_)) => _ = failed.get_or_insert(error),
                Err(error) => return Err(error),
            }
        }
        failed.map_or(Ok(report), Err)
    }

    /// Compacts whenever it pays, as long as the shard takes changes.
    pub(crate) fn compact_from_time_to_time(&self) {
        let shard = Rc::downgrade(&self.0);
        let storage = self.0.storage.clone();
        self.0.storage.spawn(async move {
            loop {
                storage.sleep(LOOK_INTERVAL).await;
                let Some(shard) = shard.upgrade().map(Self) else { break };
                if shard.0.log.borrow().check_open(shard.id()).is_err() {
                    break;
                }
                if shard.is_compaction_due().await {
                    // What fails has been told, and there will be another look.
                    let _ = shard.compact(Choice::WherePays).await;
                }
            }
        });
    }

    /// Whether it may pay to look into all mailboxes for what lives: enough has been sealed, or been deleted.
    async fn is_compaction_due(&self) -> bool {
        let sealed = self.0.stats.get().segments_sealed;
        let deleted_octets = self.0.state.borrow().deleted_octets;
        let compaction = &self.0.compaction;
        let (sealed_then, deleted_then) = compaction.looked.get();
        let deleted = deleted_octets - deleted_then;
        // Also those that earlier starts have left, but each only once.
        let is_new = sealed_then != Some(sealed);
        let is_due = (is_new && self.has_much_log())
            || (deleted > self.0.config.segment_size_bytes && deleted * DELETED_PARTS > self.living_octets().await);
        if is_due {
            compaction.looked.set((Some(sealed), deleted_octets));
        }
        is_due
    }

    /// Whether so much of the store is log that it may pay to compact it.
    fn has_much_log(&self) -> bool {
        let log = self.0.log.borrow();
        let entries = || log.manifest.segments.iter().filter(|entry| !entry.is_retired());
        let of_log = || entries().filter(|entry| !entry.segment.is_compacted());
        let all_bytes: u64 = entries().map(|entry| entry.data_end).sum();
        let log_bytes: u64 = of_log().map(|entry| entry.data_end).sum();
        of_log().count() > 2 * LOG_SEGMENTS_LEFT && log_bytes * LOG_PARTS > all_bytes
    }

    /// Octets of all messages, each as often as mailboxes have it.
    async fn living_octets(&self) -> u64 {
        let mut octets = 0;
        self.visit_slots(|_, slot| octets += slot.meta.size).await;
        octets
    }

    /// Looks at every slot that is there all the while; other tasks run in between.
    async fn visit_slots(&self, mut look: impl FnMut(MailboxId, &Slot)) {
        let mut next = Some(MailboxId(0));
        while let Some(from) = next {
            {
                let state = self.0.state.borrow();
                let mut slots = state.slots.iter_from(from);
                slots.by_ref().take(SLOTS_AT_ONCE).for_each(|(mailbox, slot)| look(mailbox, &slot));
                next = slots.next().map(|(mailbox, _)| mailbox);
            }
            self.0.storage.yield_now().await;
        }
    }

    /// The segments to be compacted, in the groups that are taken together.
    async fn choose(&self, choice: Choice) -> Result<Vec<Vec<SegmentEntry>>, EngineError> {
        let inner = &self.0;
        let candidates: Vec<SegmentEntry> = {
            let log = inner.log.borrow();
            let unfit = inner.compaction.unfit.borrow();
            let now_ms = inner.storage.wall_clock_ms();
            let is_pinned = log.manifest.pins.iter().any(|pin| pin.until_ms > now_ms);
            let entries = log.manifest.segments.iter().filter(|entry| !entry.is_retired());
            let delivering = inner.compaction.delivering.borrow().keys().next().copied();
            let is_in_use = |entry: &SegmentEntry| {
                !entry.segment.is_compacted() && delivering.is_some_and(|from| entry.segment >= from)
            };
            let fit = entries.filter(|entry| !is_pinned && !unfit.contains(&entry.segment) && !is_in_use(entry));
            fit.cloned().collect()
        };
        let mut chosen = candidates.clone();
        if choice == Choice::WherePays {
            let live = self.live_bytes().await?;
            let is_mostly_dead = |entry: &SegmentEntry| {
                let live = live.get(&entry.segment).copied().unwrap_or(0);
                live * 100 <= entry.data_end * WORTH_LIVE_PERCENT
            };
            let of_log = candidates.iter().filter(|entry| !entry.segment.is_compacted()).count();
            let aged = of_log.saturating_sub(LOG_SEGMENTS_LEFT);
            let mut number = 0;
            chosen.retain(|entry| {
                number += usize::from(!entry.segment.is_compacted());
                let is_aged = !entry.segment.is_compacted() && number <= aged && aged > LOG_SEGMENTS_LEFT;
                is_aged || is_mostly_dead(entry)
            });
        }
        let mut groups: Vec<Vec<SegmentEntry>> = Vec::new();
        let mut bytes = 0;
        for entry in chosen {
            bytes += entry.data_end;
            match groups.last_mut() {
                Some(group) if bytes <= inner.config.compaction_run_bytes => group.push(entry),
                _ => {
                    bytes = entry.data_end;
                    groups.push(vec![entry]);
                }
            }
        }
        Ok(groups)
    }

    /// How many octets of each segment are records of messages that somebody has.
    pub(crate) async fn live_bytes(&self) -> Result<BTreeMap<SegmentId, u64>, EngineError> {
        let mut live: BTreeMap<SegmentId, u64> = BTreeMap::new();
        let mut known: BTreeMap<SegmentId, RoaringBitmap> = BTreeMap::new();
        let mut seen = 0;
        for (_, mailbox) in self.mailboxes_in_order().await {
            let looked = self.inspect(mailbox, |_, index| {
                let mut large = Vec::new();
                for message in index.messages.iter() {
                    let location = message.location;
                    if known.entry(location.segment).or_default().insert(location.ordinal) {
                        *live.entry(location.segment).or_default() += u64::from(location.len);
                        // Those of compacted segments lie beside their messages.
                        if may_have_blocks(&message) && !location.segment.is_compacted() {
                            large.push(message);
                        }
                    }
                }
                (large, index.messages.len())
            });
            let Some((large, messages)) = looked.await? else { continue };
            for (number, message) in large.into_iter().enumerate() {
                if number % HEADS_PER_TURN == HEADS_PER_TURN - 1 {
                    self.0.storage.yield_now().await;
                }
                // What cannot be read is for those to find who need it.
                for block in self.blocks_of(&message, mailbox).await.unwrap_or_default() {
                    let Location { segment, len, ordinal, .. } = block.location;
                    // Messages may share it.
                    if known.entry(segment).or_default().insert(ordinal) {
                        *live.entry(segment).or_default() += u64::from(len);
                    }
                }
            }
            seen += messages + 16;
            if seen >= MESSAGES_PER_TURN {
                seen = 0;
                self.0.storage.yield_now().await;
            }
        }
        // Blocks of such a segment are as much alive as its messages; of other records it is not known.
        let compacted: Vec<SegmentEntry> = {
            let log = self.0.log.borrow();
            let entries = log.manifest.segments.iter();
            entries.filter(|entry| entry.segment.is_compacted() && !entry.is_retired()).cloned().collect()
        };
        for entry in compacted {
            let (messages, others) = self.octets_of_records(&entry).await.unwrap_or_default();
            let live = live.entry(entry.segment).or_default();
            let all = (messages + others).max(*live + others).max(1);
            *live = (u128::from(entry.data_end) * u128::from(*live + others) / u128::from(all)) as u64;
        }
        Ok(live)
    }

    /// The octets of a segment's message records, and of those that are neither messages nor blocks, by its footer.
    async fn octets_of_records(&self, entry: &SegmentEntry) -> Result<(u64, u64), EngineError> {
        let name = BlobName::Segment(SegmentName { segment: entry.segment, epoch: entry.epoch });
        let (suffix, len) = self.0.blobs.get_suffix(name, TRAILER_BYTES).await?;
        let Ok(trailer) = Trailer::decode(&suffix, len) else { return Ok((0, 0)) };
        let table = self.0.blobs.get(name, trailer.data_end, trailer.table_bytes() as usize).await?;
        let Ok(footer) = Footer::decode(&trailer, &table) else { return Ok((0, 0)) };
        let (mut messages, mut others) = (0, 0);
        for entry in &footer.entries {
            match entry.kind {
                kind::MESSAGE => messages += u64::from(entry.len),
                kind::BLOCK => {}
                _ => others += u64::from(entry.len),
            }
        }
        Ok((messages, others))
    }

    /// Every record up to here is published, and every one after it is not. What earlier epochs have written is.
    fn published_up_to(&self) -> Lsn {
        self.0.state.borrow().as_of.max(Lsn::new(self.0.epoch, 0))
    }

    /// All mailboxes, those of one account together.
    async fn mailboxes_in_order(&self) -> Vec<(AccountId, MailboxId)> {
        let mut mailboxes = Vec::new();
        self.visit_slots(|mailbox, slot| mailboxes.push((slot.meta.account, mailbox))).await;
        mailboxes.sort_unstable();
        mailboxes
    }

    /// Lets `look` see a mailbox and its index without keeping that in memory. `None`: the mailbox is gone.
    pub(crate) async fn inspect<T>(
        &self,
        mailbox: MailboxId,
        mut look: impl FnMut(&Slot, &MailboxIndex) -> T,
    ) -> Result<Option<T>, EngineError> {
        loop {
            let pages = {
                let state = self.0.state.borrow();
                let Some(slot) = state.slots.get(&mailbox) else { return Ok(None) };
                if let Some(index) = &slot.index {
                    return Ok(Some(look(&slot, index)));
                }
                slot.pages()
            };
            match self.assemble_index(mailbox, pages).await {
                Ok(mut index) => {
                    let state = self.0.state.borrow();
                    let Some(slot) = state.slots.get(&mailbox) else { return Ok(None) };
                    if slot.pages() == pages {
                        slot.delta.iter().for_each(|(_, change)| index.apply(change));
                        return Ok(Some(look(&slot, &index)));
                    }
                }
                // Its pages may be damaged, or gone since a checkpoint has written others.
                Err(_) => match self.load_index(mailbox).await {
                    Err(EngineError::Refused(Refusal::NoSuchMailbox)) => return Ok(None),
                    loaded => loaded?,
                },
            }
        }
    }

    /// Removes the files of segments that are not part of the log any more, and that nobody reads.
    pub(crate) async fn remove_doomed(&self) {
        let inner = &self.0;
        // Whoever puts an index together from the log may be about to read them.
        let _no_rebuild = inner.rebuild_lock.lock().await;
        let compaction = &inner.compaction;
        let free: Vec<SegmentId> = {
            let held = compaction.held.borrow();
            compaction.doomed.borrow().iter().copied().filter(|segment| !held.contains_key(segment)).collect()
        };
        for segment in free {
            compaction.doomed.borrow_mut().remove(&segment);
            let name = inner.sealed.borrow_mut().remove(&segment);
            if let Some(name) = name {
                // What is left behind the next start removes.
                let _ = inner.blobs.delete(BlobName::Segment(name)).await;
            }
        }
    }

    fn segment_name(&self, segment: SegmentId) -> Option<SegmentName> {
        self.0.sealed.borrow().get(&segment).copied()
    }

    /// Removes what a run has replaced before it is committed, as a mutation.
    async fn remove_too_early(&self, victims: &BTreeSet<SegmentId>) {
        if planted::is_on(Bug::RemoveBeforeCommit) {
            for name in victims.iter().filter_map(|&segment| self.segment_name(segment)) {
                let _ = self.0.blobs.delete(BlobName::Segment(name)).await;
            }
        }
    }
}

/// Whether a message may have blocks: its index does not say so, but small ones have none.
fn may_have_blocks(message: &Message) -> bool {
    message.size > BLOCK_RAW_BYTES as u64
}
