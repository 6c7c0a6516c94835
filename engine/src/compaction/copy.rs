//! A run: writing what lives, letting the state say where it is now, and committing that.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use super::fold::{Live, Place, Sample, Victims};
use super::output::Output;
use super::repack::{Repacked, Repacker};
use super::{CompactionReport, Pending};
use crate::error::EngineError;
use crate::format::FormatError;
use crate::format::manifest::SegmentEntry;
use crate::format::message::{BlockReference, MessageHead, MessageReader, Placement};
use crate::format::record::{FOLDED, RECORD_HEADER_BYTES, Record, RecordHeader};
use crate::ids::{Location, Lsn, MailboxId, Position, SegmentId};
use crate::index::{Change, Moved};
use crate::shard::{BATCH_BYTES_GATHERED, Shard};
use crate::state::{Forwarding, NewReference, head_bytes};
use crate::storage::Storage;

/// So many octets of records are compressed in one go, off the worker.
const CHUNK_BYTES: usize = 512 << 10;
/// Mailboxes that are told where their messages lie before others have their turn.
const MAILBOXES_PER_TURN: usize = 64;

/// A record that is to be written.
struct Work {
    place: Place,
    lsn: Lsn,
    bytes: Vec<u8>,
}

/// What a run has written.
struct Copied {
    sample: Sample,
    moved: Rc<Forwarding>,
    /// Placed by reference meanwhile.
    references: Vec<NewReference>,
    records: u64,
}

/// A run's way through its messages.
struct Copying<'a, S: Storage> {
    shard: &'a Shard<S>,
    victims: &'a Victims,
    sample: &'a Sample,
    as_of: Lsn,
    output: &'a mut Output<S>,
    repacker: Option<Repacker>,
    /// Records that wait to be compressed.
    work: Vec<Work>,
    work_bytes: usize,
    /// Message records in the batch: what they were, number in the batch, octets up to the end of the header frame.
    in_batch: Vec<(Place, usize, u32)>,
    moved: Forwarding,
    /// Prefixes that nobody seemed to need when a record was written.
    dropped: BTreeSet<(Place, u16)>,
    records: u64,
}

impl<S: Storage> Shard<S> {
    /// One run.
    pub(super) async fn compact_segments(&self, entries: Vec<SegmentEntry>) -> Result<CompactionReport, EngineError> {
        let victims = self.read_victims(entries).await?;
        if victims.segments.is_empty() {
            return Ok(CompactionReport::default());
        }
        let ids: BTreeSet<SegmentId> = victims.segments.keys().copied().collect();
        let bytes_before = victims.segments.values().map(|entry| entry.data_end).sum();
        let as_of = self.0.state.borrow().as_of;
        let dictionaries = self.0.dictionaries.get().and_then(|shared| shared.current());
        let embedded = dictionaries.iter().flat_map(|set| set.iter()).cloned().collect();
        let mut output = Output::new(self.clone(), victims.generation, as_of, embedded, 0);
        // What is copied from now on is seen although its mailbox has been looked into before.
        self.0.state.borrow_mut().watched = Some((ids.clone(), Vec::new()));
        let repacker = Repacker::new(&victims.dictionaries, dictionaries);
        let copied = self.write_living(&victims, as_of, repacker, &mut output).await;
        let Copied { sample, moved, references, records } = match copied {
            Ok(copied) => copied,
            Err(error) => {
                self.0.state.borrow_mut().watched = None;
                output.give_up().await;
                return Err(error);
            }
        };
        let bytes_after = output.bytes;
        self.take_effect(&ids, sample, moved, references).await?;
        self.count(|stats| {
            stats.compactions += 1;
            stats.segments_compacted += ids.len() as u64;
            stats.compacted_bytes_read += bytes_before;
            stats.compacted_bytes_written += bytes_after;
        });
        self.remove_doomed().await;
        Ok(CompactionReport { segments: ids.len() as u64, bytes_before, bytes_after, records })
    }

    /// Writes everything that lives. On return the manifest names it, and the state tells of what is copied where it lies now.
    async fn write_living(
        &self,
        victims: &Victims,
        as_of: Lsn,
        repacker: Repacker,
        output: &mut Output<S>,
    ) -> Result<Copied, EngineError> {
        let sample = self.sample(victims).await?;
        output.expect(sample.bytes);
        self.write_others(victims, &sample, output).await?;
        let mut copying = Copying {
            shard: self,
            victims,
            sample: &sample,
            as_of,
            output: &mut *output,
            repacker: Some(repacker),
            work: Vec::new(),
            work_bytes: 0,
            in_batch: Vec::new(),
            moved: Forwarding::default(),
            dropped: BTreeSet::new(),
            records: 0,
        };
        for &place in &sample.order {
            copying.add(place, sample.live[&place].len).await?;
        }
        copying.flush().await?;
        // Large messages that were copied meanwhile and have no block in a victim.
        let mut unconcerned: BTreeSet<Place> = BTreeSet::new();
        loop {
            // Messages may have been copied out of a mailbox that had not been looked into to one that had.
            let late: Vec<NewReference> = {
                let mut state = self.0.state.borrow_mut();
                let references = state.watched.iter().flat_map(|(_, references)| references);
                let missing = references.filter(|new| {
                    let place = new.place();
                    let is_whole = !copying.dropped.contains(&(place, new.message.prefix_of));
                    let is_known = copying.moved.contains_key(&place) && is_whole;
                    !is_known && !unconcerned.contains(&place)
                });
                let late: Vec<NewReference> = missing.copied().collect();
                if late.is_empty() && copying.output.is_named() {
                    // From this turn on what is published is told at once where it lies.
                    let references = state.watched.take().map(|(_, references)| references).unwrap_or_default();
                    let moved = Rc::new(copying.moved);
                    state.forwarding = Some(Rc::clone(&moved));
                    let records = copying.records;
                    return Ok(Copied { sample, moved, references, records });
                }
                late
            };
            for new in &late {
                let place = new.place();
                let is_concerned = victims.segments.contains_key(&place.0) || copying.moved.contains_key(&place) || {
                    let blocks = self.blocks_of(&new.message, new.mailbox).await?;
                    blocks.iter().any(|block| victims.segments.contains_key(&block.location.segment))
                };
                let is_new =
                    !copying.moved.contains_key(&place) || copying.dropped.contains(&(place, new.message.prefix_of));
                if !is_concerned {
                    unconcerned.insert(place);
                } else if is_new {
                    copying.dropped.retain(|(dropped, _)| *dropped != place);
                    copying.add(place, new.message.location.len).await?;
                    copying.flush().await?;
                }
            }
            if late.is_empty() {
                // That takes its time: then there is another look.
                copying.output.name().await?;
            }
        }
    }

    /// Writes what is no message: records that are kept as they are, and those into which others have been folded.
    async fn write_others(
        &self,
        victims: &Victims,
        sample: &Sample,
        output: &mut Output<S>,
    ) -> Result<(), EngineError> {
        let generation = victims.generation;
        let oldest = self.oldest_elsewhere(victims).await?;
        for carried in &victims.carried {
            if !self.is_kept(carried, oldest) {
                continue;
            }
            let bytes = self.read_segment(carried.segment, carried.offset, carried.len as usize).await?;
            let position = Position { segment: carried.segment, offset: carried.offset };
            let (header, payload) = RecordHeader::decode(&bytes).map_err(|error| self.unfit(position, error))?;
            // Its transaction is known to count.
            let header = RecordHeader { generation, transaction: 0, ..header };
            match Record::decode(header.kind, payload).map_err(|error| self.unfit(position, error))? {
                Some(record) => _ = output.push(header, &record, &[]),
                None => _ = output.push_bytes(header, |out| out.extend_from_slice(payload)),
            }
            self.write_if_full(output).await?;
        }
        for base in &sample.bases {
            let lsn = {
                let mut log = self.0.log.borrow_mut();
                log.check_open(self.0.id)?;
                log.next_lsn(self.0.epoch)
            };
            let header = RecordHeader { kind: base.kind(), flags: FOLDED, generation, lsn, transaction: 0 };
            output.push(header, base, &[]);
            self.write_if_full(output).await?;
        }
        output.flush().await?;
        Ok(())
    }

    async fn write_if_full(&self, output: &mut Output<S>) -> Result<(), EngineError> {
        if output.is_full() {
            output.flush().await?;
            self.pace(BATCH_BYTES_GATHERED).await;
        }
        Ok(())
    }

    /// Lets others have their turn, and takes no more of the device than is allowed for `bytes` that were written.
    pub(super) async fn pace(&self, bytes: usize) {
        let limit = self.0.config.compaction_bytes_per_s;
        if limit > 0 && bytes > 0 {
            self.0.storage.sleep(Duration::from_secs_f64(bytes as f64 / limit as f64)).await;
        } else {
            self.0.storage.yield_now().await;
        }
    }

    /// Leaves a segment out of all further runs because of a record that is damaged.
    pub(super) fn unfit(&self, position: Position, error: FormatError) -> EngineError {
        let location =
            Location { segment: position.segment, offset_units: (position.offset / 8) as u32, ..Location::default() };
        let error = self.damaged(location, "compaction", error);
        self.leave_alone(position.segment, error.clone());
        error
    }

    /// Lets every mailbox know where its messages lie, and commits that: then the victims are not needed any more.
    async fn take_effect(
        &self,
        victims: &BTreeSet<SegmentId>,
        sample: Sample,
        moved: Rc<Forwarding>,
        references: Vec<NewReference>,
    ) -> Result<(), EngineError> {
        let inner = &self.0;
        let mut by_mailbox: BTreeMap<MailboxId, Vec<Moved>> = BTreeMap::new();
        let mut tell = |mailbox, uid, place: Place| {
            if let Some(&(to, head_bytes)) = moved.get(&place) {
                let moved = Moved { uid, from: place.0, from_units: place.1, to, head_bytes };
                by_mailbox.entry(mailbox).or_default().push(moved);
            }
        };
        for (place, live) in &sample.live {
            live.references.iter().for_each(|reference| tell(reference.mailbox, reference.uid, *place));
        }
        references.iter().for_each(|new| tell(new.mailbox, new.message.uid, new.place()));
        for (number, (mailbox, mut moved)) in by_mailbox.into_iter().enumerate() {
            if number % MAILBOXES_PER_TURN == MAILBOXES_PER_TURN - 1 {
                inner.storage.yield_now().await;
            }
            moved.sort_unstable_by_key(|moved| moved.uid);
            moved.dedup_by_key(|moved| moved.uid);
            inner.state.borrow_mut().relocate(mailbox, Change::Relocate(moved));
        }
        // What was copied before everybody knew is published by now, or soon, and in the log: replay begins after it.
        self.settle().await;
        inner.state.borrow_mut().forwarding = None;
        if let Some(reason) = self.poisoned() {
            // A batch that failed may be in the log all the same, and name the old places.
            return Err(EngineError::Poisoned { shard: inner.id, reason });
        }
        let _one_at_a_time = inner.checkpoint_lock.lock().await;
        *inner.compaction.pending.borrow_mut() = Some(Rc::new(Pending { victims: victims.clone() }));
        self.remove_too_early(victims).await;
        self.checkpoint_alone().await?;
        match inner.compaction.to_commit() {
            None => Ok(()),
            Some(_) => Err(EngineError::Stopping(inner.id)),
        }
    }
}

impl<S: Storage> Copying<'_, S> {
    /// Adds a message record, and its blocks before it.
    async fn add(&mut self, place: Place, len: u32) -> Result<(), EngineError> {
        let (segment, units) = place;
        let offset = u64::from(units) * 8;
        let bytes = self.shard.read_segment(segment, offset, len as usize).await?;
        let reader = MessageReader::new(bytes.get(RECORD_HEADER_BYTES..).unwrap_or_default());
        let damaged = |error| self.shard.unfit(Position { segment, offset }, error);
        let head = reader.map_err(damaged)?.head;
        let (header, _) = RecordHeader::decode(&bytes).map_err(damaged)?;
        let is_expected = self.sample.live.get(&place).is_none_or(|live| live.id == head.id);
        if !is_expected {
            let error = FormatError::Misplaced { what: "message record", detail: format!("message {}", head.id) };
            return Err(damaged(error));
        }
        if head.blocks.iter().any(|block| self.victims.segments.contains_key(&block.location.segment)) {
            self.flush().await?;
            let blocks = self.copy_blocks(&head).await?;
            self.work.push(Work { place, lsn: header.lsn, bytes });
            return self.write_work(Some(blocks)).await;
        }
        self.work_bytes += bytes.len();
        self.work.push(Work { place, lsn: header.lsn, bytes });
        if self.work_bytes >= CHUNK_BYTES { self.write_work(None).await } else { Ok(()) }
    }

    /// Writes the blocks of a message that lie in victims; where all of them are now.
    async fn copy_blocks(&mut self, head: &MessageHead) -> Result<Vec<BlockReference>, EngineError> {
        let mut blocks = head.blocks.clone();
        let mut numbers = Vec::new();
        for (number, block) in head.blocks.iter().enumerate() {
            let Location { segment, len, .. } = block.location;
            if self.victims.segments.contains_key(&segment) {
                let bytes = self.shard.read_segment(segment, block.location.offset(), len as usize).await?;
                let place = (segment, block.location.offset_units);
                let repacked = self.repack(vec![Work { place, lsn: block.lsn, bytes }]).await?;
                for (_, repacked) in repacked {
                    let Repacked::Block { header, info, frame } = repacked else { continue };
                    let header = RecordHeader { generation: self.victims.generation, transaction: 0, ..header };
                    numbers.push((number, self.output.push(header, &Record::Block(info), &frame)));
                }
                if self.output.is_full() {
                    self.place_blocks(&mut blocks, &mut numbers).await?;
                }
            }
        }
        self.place_blocks(&mut blocks, &mut numbers).await?;
        Ok(blocks)
    }

    async fn place_blocks(
        &mut self,
        blocks: &mut [BlockReference],
        numbers: &mut Vec<(usize, usize)>,
    ) -> Result<(), EngineError> {
        let locations = self.output.flush().await?;
        for (block, in_batch) in numbers.drain(..) {
            blocks[block].location = locations[in_batch];
        }
        self.shard.pace(BATCH_BYTES_GATHERED).await;
        Ok(())
    }

    /// Compresses records anew, off the worker.
    async fn repack(&mut self, work: Vec<Work>) -> Result<Vec<(Place, Repacked)>, EngineError> {
        let mut repacker = self.repacker.take().ok_or(EngineError::Stopping(self.shard.0.id))?;
        let (repacker, results) = self
            .shard
            .0
            .storage
            .offload(move || {
                let repack = |work: Work| (work.place, repacker.repack(&work.bytes, work.lsn));
                let results: Vec<_> = work.into_iter().map(repack).collect();
                (repacker, results)
            })
            .await;
        self.repacker = Some(repacker);
        let mut repacked = Vec::with_capacity(results.len());
        for ((segment, units), result) in results {
            let position = Position { segment, offset: u64::from(units) * 8 };
            repacked.push(((segment, units), result.map_err(|error| self.shard.unfit(position, error))?));
        }
        Ok(repacked)
    }

    /// Writes the records that wait; `blocks` are those of the only one, if it has any that moved.
    async fn write_work(&mut self, blocks: Option<Vec<BlockReference>>) -> Result<(), EngineError> {
        if self.shard.0.log.borrow().stopping {
            return Err(EngineError::Stopping(self.shard.0.id));
        }
        self.work_bytes = 0;
        let work = std::mem::take(&mut self.work);
        for (place, repacked) in self.repack(work).await? {
            let Repacked::Message { header, mut head, frames } = repacked else { continue };
            if let Some(blocks) = &blocks {
                head.blocks.clone_from(blocks);
            }
            self.fold_placements(place, &mut head);
            head.as_of = self.as_of;
            let header = RecordHeader { flags: FOLDED, generation: self.victims.generation, transaction: 0, ..header };
            let head_bytes = head_bytes(&head);
            let number = self.output.push(header, &Record::Message(head), &frames);
            self.in_batch.push((place, number, head_bytes));
            self.records += 1;
            if self.output.is_full() {
                self.write_batch().await?;
            }
        }
        Ok(())
    }

    /// Writes what waits, all of it.
    async fn flush(&mut self) -> Result<(), EngineError> {
        if !self.work.is_empty() {
            self.write_work(None).await?;
        }
        self.write_batch().await
    }

    async fn write_batch(&mut self) -> Result<(), EngineError> {
        let locations = self.output.flush().await?;
        for (place, number, head_bytes) in self.in_batch.drain(..) {
            self.moved.insert(place, (locations[number], head_bytes));
        }
        self.shard.pace(BATCH_BYTES_GATHERED).await;
        Ok(())
    }

    /// Gives a head the placements that live, as they are now, at their old numbers: copies name prefixes by these.
    fn fold_placements(&mut self, place: Place, head: &mut MessageHead) {
        let none = Live { id: head.id, len: 0, references: Vec::new() };
        let live = self.sample.live.get(&place).unwrap_or(&none);
        // One that nobody had when the mailboxes were looked into is needed whole.
        let is_late = self.moved.contains_key(&place) || live.references.is_empty();
        let needed: BTreeSet<u16> = live.references.iter().map(|reference| reference.prefix_of).collect();
        for (number, placement) in head.placements.iter_mut().enumerate() {
            let is_this = |reference: &&super::fold::Reference| {
                (reference.mailbox, reference.uid) == (placement.mailbox, placement.uid)
            };
            if let Some(reference) = live.references.iter().find(is_this) {
                (placement.flags, placement.modseq) = (reference.flags, reference.modseq);
                continue;
            }
            if placement.has_lost_prefix() {
                continue;
            }
            let prefix = std::mem::take(&mut placement.prefix);
            let is_dropped = !is_late && !needed.contains(&(number as u16)) && !prefix.is_empty();
            if is_dropped {
                self.dropped.insert((place, number as u16));
            }
            *placement = Placement::gone((!is_dropped).then_some(prefix));
        }
        let is_needed =
            |placement: &Placement| !placement.is_gone() || !placement.prefix.is_empty() || placement.has_lost_prefix();
        let end = head.placements.iter().rposition(is_needed).map_or(0, |last| last + 1);
        head.placements.truncate(end);
    }
}
