//! A run: writing what lives, letting the state say where it is now, and committing that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::time::Duration;

use super::fold::{Live, Place, Reference, Sample, Victims};
use super::output::Output;
use super::repack::{Content, Part, Repacked, Repacker};
use super::{CompactionReport, MESSAGES_PER_TURN, Pending};
use crate::error::EngineError;
use crate::format::FormatError;
use crate::format::frame::FrameInfo;
use crate::format::manifest::SegmentEntry;
use crate::format::message::{BlockForm, BlockReference, MessageHead, MessageReader, Placement, Prefix};
use crate::format::record::{FOLDED, RECORD_HEADER_BYTES, Record, RecordHeader, kind};
use crate::ids::{Location, Lsn, MailboxId, Position, SegmentId, Uid};
use crate::index::{Change, Moved};
use crate::read::{BLOCK, open_block};
use crate::shard::Shard;
use crate::state::{Forwarding, NewReference, head_bytes};
use crate::storage::{Storage, StorageError};

/// So many octets of records are compressed in one go, off the worker.
const CHUNK_BYTES: usize = 512 << 10;

/// Records that are read, or put into a batch, before others have their turn.
const RECORDS_PER_TURN: usize = 8;
/// Attachments of larger messages are not looked for: all of a message is in memory then.
const CONTENTS_OCTETS_MAX: u64 = 32 << 20;
/// What a part takes beside its frame: header, frame info, a reference in the message's head, its lines in two tables.
const PART_OVERHEAD_OCTETS: u64 = 256;
/// So many contents of a segment are known, so that others need not store them again.
const CONTENTS_KNOWN_MAX: usize = 1 << 16;

/// A record that is to be written.
struct Work {
    place: Place,
    lsn: Lsn,
    bytes: Vec<u8>,
    /// The records of a message's blocks, if it is to be looked at as a whole.
    blocks: Vec<Vec<u8>>,
}

/// Where a part of a body is.
enum PartPlace {
    Known(BlockReference),
    /// Its LSN, and its number in the batch.
    InBatch(Lsn, usize, BlockForm),
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
    /// The segment that was being written when last a part of a body was, and its contents.
    contents_of: Option<SegmentId>,
    contents: HashMap<[u8; 32], (Lsn, Location)>,
    /// Contents of the batch that is being put together: LSN, number in the batch, bytes.
    fresh: HashMap<[u8; 32], (Lsn, usize, Vec<u8>)>,
    /// Blocks that were copied as they are, and where to: what several messages name is copied once into a segment.
    blocks: HashMap<Place, Location>,
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
        let bytes_before: u64 = victims.segments.values().map(|entry| entry.data_end).sum();
        let as_of = self.published_up_to();
        let dictionaries = self.0.dictionaries.get().and_then(|shared| shared.current());
        let embedded = dictionaries.iter().flat_map(|set| set.iter()).cloned().collect();
        let mut output = Output::new(self.clone(), victims.generation, as_of, embedded, bytes_before);
        // What is copied from now on is seen although its mailbox has been looked into before.
        self.0.state.borrow_mut().watched = Some((ids.clone(), Vec::new()));
        let mut key = [0; 32];
        key.chunks_mut(8).for_each(|word| word.copy_from_slice(&self.0.storage.random().to_le_bytes()));
        let repacker = Repacker::new(&victims.dictionaries, dictionaries, key);
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
        self.write_carried(victims, output).await?;
        let sample = self.sample(victims, output).await?;
        output.flush().await?;
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
            contents_of: None,
            contents: HashMap::new(),
            fresh: HashMap::new(),
            blocks: HashMap::new(),
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
                    // What cannot be read cannot be read anywhere else.
                    let blocks = self.blocks_of(&new.message, new.mailbox).await.unwrap_or_default();
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

    /// Writes records that are kept as they are.
    async fn write_carried(&self, victims: &Victims, output: &mut Output<S>) -> Result<(), EngineError> {
        let generation = victims.generation;
        let oldest = self.oldest_elsewhere(victims).await;
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
        Ok(())
    }

    /// Writes a record into which others have been folded.
    pub(super) async fn write_base(
        &self,
        base: &Record,
        generation: u32,
        output: &mut Output<S>,
    ) -> Result<(), EngineError> {
        let lsn = {
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            log.next_lsn(self.0.epoch)
        };
        let header = RecordHeader { kind: base.kind(), flags: FOLDED, generation, lsn, transaction: 0 };
        output.push(header, base, &[]);
        self.write_if_full(output).await
    }

    async fn write_if_full(&self, output: &mut Output<S>) -> Result<(), EngineError> {
        if output.is_full() {
            output.flush().await?;
            self.pace(output.take_unpaced()).await;
        }
        Ok(())
    }

    /// Lets others have their turn, and takes no more of the device than is allowed for `bytes` that were written.
    pub(super) async fn pace(&self, bytes: u64) {
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
        let mut told = 0;
        for (place, live) in &sample.live {
            live.references.iter().for_each(|reference| tell(reference.mailbox, reference.uid, *place));
            told += live.references.len();
            if told >= MESSAGES_PER_TURN {
                told = 0;
                inner.storage.yield_now().await;
            }
        }
        references.iter().for_each(|new| tell(new.mailbox, new.message.uid, new.place()));
        for (mailbox, mut moved) in by_mailbox {
            moved.sort_unstable_by_key(|moved| moved.uid);
            moved.dedup_by_key(|moved| moved.uid);
            for some in moved.chunks(MESSAGES_PER_TURN) {
                told += some.len() + 16;
                inner.state.borrow_mut().relocate(mailbox, Change::Relocate(some.to_vec()));
                if told >= MESSAGES_PER_TURN {
                    told = 0;
                    inner.storage.yield_now().await;
                }
            }
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

/// What parts take at most: all of them, or those that the segment does not have.
fn octets_of(parts: &[Part], all: bool) -> u64 {
    let octets = |part: &Part| match (&part.packed, &part.content) {
        (Some(packed), _) => packed.stored.len(),
        (None, Some(content)) if all => content.bytes.len(),
        (None, _) => 0,
    };
    parts.iter().map(|part| octets(part) as u64 + PART_OVERHEAD_OCTETS).sum()
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
        self.learn(segment, &head.frames().map(|(_, info)| info)).await?;
        if self.work.len() % RECORDS_PER_TURN == RECORDS_PER_TURN - 1 {
            // What the page cache has is read without a pause.
            self.shard.pace(0).await;
        }
        if !head.blocks.is_empty() {
            self.flush().await?;
            return self.add_with_blocks(place, header.lsn, bytes, &head).await;
        }
        self.work_bytes += (head.rest_octets / 4).max(bytes.len() as u64) as usize;
        self.work.push(Work { place, lsn: header.lsn, bytes, blocks: Vec::new() });
        if self.work_bytes >= CHUNK_BYTES { self.write_work(None).await } else { Ok(()) }
    }

    /// Sees to it that frames of a segment can be unpacked, which may be none of the victims.
    async fn learn(&mut self, segment: SegmentId, frames: &[FrameInfo]) -> Result<(), EngineError> {
        let Some(repacker) = &mut self.repacker else { return Ok(()) };
        if frames.iter().filter_map(FrameInfo::needs_dictionary).all(|id| repacker.knows_dictionary(id)) {
            return Ok(());
        }
        self.shard.have_dictionaries(segment, frames).await?;
        let unpacker = self.shard.0.unpacker.borrow();
        let needed = frames.iter().filter_map(FrameInfo::needs_dictionary);
        needed.filter_map(|id| unpacker.dictionary(id)).for_each(|dictionary| repacker.learn(dictionary));
        Ok(())
    }

    /// Writes a message of which a part lies in blocks.
    async fn add_with_blocks(
        &mut self,
        place: Place,
        lsn: Lsn,
        bytes: Vec<u8>,
        head: &MessageHead,
    ) -> Result<(), EngineError> {
        let mut blocks = Vec::new();
        if head.rest_octets <= CONTENTS_OCTETS_MAX {
            for block in &head.blocks {
                let Location { segment, len, .. } = block.location;
                let record = match self.shard.read_segment(segment, block.location.offset(), len as usize).await {
                    // The message cannot be read, and stays as it is.
                    Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => {
                        blocks.clear();
                        break;
                    }
                    record => record?,
                };
                if let Ok((info, _)) = open_block(&record, block.lsn) {
                    self.learn(segment, &[info]).await?;
                }
                blocks.push(record);
                self.shard.pace(0).await;
            }
        }
        self.work.push(Work { place, lsn, bytes, blocks });
        self.write_work(Some(head)).await
    }

    /// Writes the blocks of a message that lie in victims; where all of them are now.
    async fn copy_blocks(&mut self, head: &MessageHead) -> Result<Vec<BlockReference>, EngineError> {
        let mut blocks = head.blocks.clone();
        let mut numbers = Vec::new();
        // Where a block is first named, by where it was.
        let mut first: HashMap<Place, usize> = HashMap::new();
        for (number, block) in head.blocks.iter().enumerate() {
            let Location { segment, len, .. } = block.location;
            if self.victims.segments.contains_key(&segment) {
                let place = (segment, block.location.offset_units);
                if first.contains_key(&place) {
                    continue;
                }
                first.insert(place, number);
                let copy = self.blocks.get(&place).filter(|copy| Some(copy.segment) == self.output.segment());
                if let Some(&copy) = copy {
                    blocks[number].location = copy;
                    continue;
                }
                let bytes = self.shard.read_segment(segment, block.location.offset(), len as usize).await?;
                if let Ok((info, _)) = open_block(&bytes, block.lsn) {
                    self.learn(segment, &[info]).await?;
                }
                let repacked = self.repack(vec![Work { place, lsn: block.lsn, bytes, blocks: Vec::new() }]).await?;
                for (_, repacked) in repacked {
                    let Repacked::Block { header, packed } = repacked else { continue };
                    let header = RecordHeader { generation: self.victims.generation, transaction: 0, ..header };
                    let record = Record::Block(packed.info);
                    numbers.push((number, self.output.push(header, &record, &packed.stored)));
                }
                if self.output.is_full() {
                    self.place_blocks(&mut blocks, &mut numbers).await?;
                }
            }
        }
        self.place_blocks(&mut blocks, &mut numbers).await?;
        for (number, block) in head.blocks.iter().enumerate() {
            if let Some(&first) = first.get(&(block.location.segment, block.location.offset_units)) {
                blocks[number].location = blocks[first].location;
            }
        }
        if self.blocks.len() + first.len() > CONTENTS_KNOWN_MAX {
            self.blocks.clear();
        }
        self.blocks.extend(first.into_iter().map(|(place, first)| (place, blocks[first].location)));
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
        self.shard.pace(self.output.take_unpaced()).await;
        Ok(())
    }

    /// Compresses records anew, off the worker.
    async fn repack(&mut self, work: Vec<Work>) -> Result<Vec<(Place, Repacked)>, EngineError> {
        let mut repacker = self.repacker.take().ok_or(EngineError::Stopping(self.shard.0.id))?;
        let (repacker, results) = self
            .shard
            .0
            .storage
            .background(move || {
                let repack = |work: Work| (work.place, repacker.repack(&work.bytes, &work.blocks, work.lsn));
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

    /// Writes the records that wait; `with_blocks` is the head of the only one, if it has any.
    async fn write_work(&mut self, with_blocks: Option<&MessageHead>) -> Result<(), EngineError> {
        if self.shard.0.log.borrow().stopping {
            return Err(EngineError::Stopping(self.shard.0.id));
        }
        self.work_bytes = 0;
        let work = std::mem::take(&mut self.work);
        let mut messages = Vec::with_capacity(work.len());
        let repacked = self.repack(work).await;
        if let (Err(EngineError::Damaged(error)), Some(head)) = (&repacked, with_blocks) {
            // It has to stay, and so have its blocks.
            let segments = head.blocks.iter().map(|block| block.location.segment);
            let of_victims: BTreeSet<SegmentId> =
                segments.filter(|segment| self.victims.segments.contains_key(segment)).collect();
            of_victims.into_iter().for_each(|segment| self.shard.leave_alone(segment, error.clone().into()));
        }
        for (place, repacked) in repacked? {
            let Repacked::Message { header, head, frames, parts } = repacked else { continue };
            messages.push((place, header, head, frames, parts));
        }
        let mut places = Vec::new();
        let has_parts = messages.iter().any(|(.., parts)| !parts.is_empty());
        if has_parts {
            let others = messages
                .iter()
                .map(|(_, _, head, frames, _)| (head.sealed_bytes() + frames.len()) as u64 + PART_OVERHEAD_OCTETS);
            let others: u64 = others.sum();
            let of_parts = |all| messages.iter().map(|(.., parts)| octets_of(parts, all)).sum::<u64>();
            let (here, elsewhere) = (others + of_parts(false), others + of_parts(true));
            // Parts and messages go to one segment, so that no other segment is needed to read or to move them.
            self.write_batch().await?;
            let is_another = self.output.segment() != self.contents_of;
            if self.output.reserve(if is_another { elsewhere } else { here }, elsewhere).await? || is_another {
                self.contents.clear();
                self.contents_of = self.output.segment();
                self.repacker.iter_mut().for_each(Repacker::forget_contents);
            }
            for (.., parts) in &mut messages {
                places.push(self.write_parts(std::mem::take(parts)).await?);
            }
            let locations = self.output.flush().await?;
            for (hash, (lsn, number, _)) in self.fresh.drain() {
                self.contents.insert(hash, (lsn, locations[number]));
            }
            for (places, (_, _, head, ..)) in places.into_iter().zip(&mut messages) {
                if places.is_empty() {
                    continue;
                }
                let references = places.into_iter().map(|place| match place {
                    PartPlace::Known(reference) => reference,
                    PartPlace::InBatch(lsn, number, form) => BlockReference { lsn, location: locations[number], form },
                });
                head.blocks = references.collect();
            }
        }
        for (number, (place, header, mut head, frames, _)) in messages.into_iter().enumerate() {
            if number % RECORDS_PER_TURN == RECORDS_PER_TURN - 1 {
                self.shard.0.storage.yield_now().await;
            }
            if let Some(old) = with_blocks.filter(|old| old.blocks == head.blocks) {
                head.blocks = self.copy_blocks(old).await?;
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
        if has_parts {
            self.write_batch().await?;
            self.output.release();
        }
        Ok(())
    }

    /// Adds parts of a body to the batch, but for contents that the segment has already.
    async fn write_parts(&mut self, parts: Vec<Part>) -> Result<Vec<PartPlace>, EngineError> {
        let mut places = Vec::with_capacity(parts.len());
        for Part { form, content, packed } in parts {
            if let Some(content) = &content
                && let Some(known) = self.known_content(content).await?
            {
                places.push(match known {
                    PartPlace::Known(reference) => PartPlace::Known(BlockReference { form, ..reference }),
                    PartPlace::InBatch(lsn, number, _) => PartPlace::InBatch(lsn, number, form),
                });
                continue;
            }
            let packed = match (packed, &content, &mut self.repacker) {
                (None, Some(content), Some(repacker)) => {
                    self.shard.0.storage.yield_now().await;
                    repacker.pack_content(&content.bytes)
                }
                (Some(packed), ..) => packed,
                (None, ..) => return Err(EngineError::Stopping(self.shard.0.id)),
            };
            let lsn = {
                let mut log = self.shard.0.log.borrow_mut();
                log.check_open(self.shard.0.id)?;
                log.next_lsn(self.shard.0.epoch)
            };
            let generation = self.victims.generation;
            let header = RecordHeader { kind: kind::BLOCK, flags: 0, generation, lsn, transaction: 0 };
            let number = self.output.push(header, &Record::Block(packed.info), &packed.stored);
            if let Some(content) = content
                && self.contents.len() < CONTENTS_KNOWN_MAX
            {
                self.fresh.insert(content.hash, (lsn, number, content.bytes));
            }
            places.push(PartPlace::InBatch(lsn, number, form));
        }
        Ok(places)
    }

    /// Where the segment has a content already: the very same bytes.
    async fn known_content(&mut self, content: &Content) -> Result<Option<PartPlace>, EngineError> {
        let form = BlockForm::as_it_is(0);
        if let Some((lsn, number, bytes)) = self.fresh.get(&content.hash) {
            return Ok((*bytes == content.bytes).then_some(PartPlace::InBatch(*lsn, *number, form)));
        }
        let Some(&(lsn, location)) = self.contents.get(&content.hash) else { return Ok(None) };
        let position = Position { segment: location.segment, offset: location.offset() };
        let record = self.output.read(location).await?;
        let damaged = |error| self.shard.unfit(position, error);
        let (info, stored) = open_block(&record, lsn).map_err(damaged)?;
        let mut bytes = Vec::with_capacity(content.bytes.len());
        info.unpack(BLOCK, stored, &mut self.shard.0.unpacker.borrow_mut(), &mut bytes).map_err(damaged)?;
        Ok((bytes == content.bytes).then_some(PartPlace::Known(BlockReference { lsn, location, form })))
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
        self.shard.pace(self.output.take_unpaced()).await;
        Ok(())
    }

    /// Gives a head the placements that live, as they are now, at their old numbers: copies name prefixes by these.
    fn fold_placements(&mut self, place: Place, head: &mut MessageHead) {
        let none = Live { id: head.id, len: 0, references: Vec::new() };
        let live = self.sample.live.get(&place).unwrap_or(&none);
        // One that nobody had when the mailboxes were looked into is needed whole.
        let is_late = self.moved.contains_key(&place) || live.references.is_empty();
        let needed: BTreeSet<u16> = live.references.iter().map(|reference| reference.prefix_of).collect();
        let by_uid: BTreeMap<(MailboxId, Uid), &Reference> =
            live.references.iter().map(|reference| ((reference.mailbox, reference.uid), reference)).collect();
        for (number, placement) in head.placements.iter_mut().enumerate() {
            if let Some(reference) = by_uid.get(&(placement.mailbox, placement.uid)) {
                (placement.flags, placement.modseq) = (reference.flags, reference.modseq);
                continue;
            }
            if placement.has_lost_prefix() {
                continue;
            }
            let prefix = std::mem::replace(&mut placement.prefix, Prefix::Here(Vec::new()));
            // One that is in a frame has been written.
            let can_go = matches!(&prefix, Prefix::Here(bytes) if !bytes.is_empty());
            let is_dropped = can_go && !is_late && !needed.contains(&(number as u16));
            if is_dropped {
                self.dropped.insert((place, number as u16));
            }
            *placement = Placement::gone((!is_dropped).then_some(prefix));
        }
        let is_needed = |placement: &Placement| {
            !placement.is_gone() || placement.prefix.octets() > 0 || placement.has_lost_prefix()
        };
        let end = head.placements.iter().rposition(is_needed).map_or(0, |last| last + 1);
        head.placements.truncate(end);
    }
}
