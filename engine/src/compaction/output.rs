//! The segments that compaction writes.

use std::sync::Arc;

use crate::error::EngineError;
use crate::format::batch::{BatchBuilder, Touch};
use crate::format::dictionary::Dictionary;
use crate::format::manifest::SegmentEntry;
use crate::format::record::{Record, RecordHeader};
use crate::format::segment::{Footer, FooterEntry, SegmentHeader};
use crate::ids::{Location, Lsn, Position, SegmentId};
use crate::shard::{BATCH_BYTES_GATHERED, Shard};
use crate::storage::{BlobName, BlobStore, SegmentName, Storage, StorageError, Wal};

/// For heads, placements and padding of what goes to one segment.
const RESERVE_SLACK_OCTETS: u64 = 128 << 10;

/// So much is written in one go.
const SYNC_OCTETS: usize = 256 << 10;

/// A segment that is being written.
struct Open {
    name: SegmentName,
    capacity: u64,
    offset: u64,
    sequence: u64,
    entries: Vec<FooterEntry>,
}

/// Writes records into new segments, batch by batch, and seals them.
pub(super) struct Output<S: Storage> {
    shard: Shard<S>,
    generation: u32,
    as_of: Lsn,
    dictionaries: Vec<Arc<Dictionary>>,
    /// About so much is still to come.
    expected: u64,
    open: Option<Open>,
    /// No other segment may be begun, even if this one outgrows what was set aside for it.
    stays: bool,
    batch: BatchBuilder,
    /// What is in the batch: header, offset, length.
    records: Vec<(RecordHeader, u32, u32)>,
    sealed: Vec<(SegmentName, SegmentEntry)>,
    pub(super) bytes: u64,
    paced: u64,
}

impl<S: Storage> Output<S> {
    pub(super) fn new(
        shard: Shard<S>,
        generation: u32,
        as_of: Lsn,
        dictionaries: Vec<Arc<Dictionary>>,
        expected: u64,
    ) -> Self {
        Self {
            shard,
            generation,
            as_of,
            dictionaries,
            expected,
            open: None,
            stays: false,
            batch: BatchBuilder::default(),
            records: Vec::new(),
            sealed: Vec::new(),
            bytes: 0,
            paced: 0,
        }
    }

    /// What was written since this was last asked.
    pub(super) fn take_unpaced(&mut self) -> u64 {
        let unpaced = self.bytes - self.paced;
        self.paced = self.bytes;
        unpaced
    }

    /// Whether everything is in segments that a manifest names.
    pub(super) fn is_named(&self) -> bool {
        self.batch.is_empty() && self.open.is_none() && self.sealed.is_empty()
    }

    /// Lets the manifest name all that was written. Durable on return.
    pub(super) async fn name(&mut self) -> Result<(), EngineError> {
        self.seal_open().await?;
        let sealed = std::mem::take(&mut self.sealed);
        if sealed.is_empty() {
            return Ok(());
        }
        let entries: Vec<SegmentEntry> = sealed.iter().map(|(_, entry)| entry.clone()).collect();
        match self.shard.commit_manifest(|manifest| manifest.segments.extend(entries)).await {
            Ok(()) => {
                self.shard.0.sealed.borrow_mut().extend(sealed.iter().map(|(name, _)| (name.segment, *name)));
                Ok(())
            }
            Err(EngineError::Full) => {
                self.sealed = sealed;
                Err(EngineError::Full)
            }
            // They may be named or not: the next start knows.
            Err(error) => Err(error),
        }
    }

    /// From now on everything is written to one segment, until [`Output::release`]: that which is open if it has room for
    /// `here`, else another, with room for `elsewhere`. Whether that is so; the batch is empty.
    pub(super) async fn reserve(&mut self, here: u64, elsewhere: u64) -> Result<bool, EngineError> {
        self.stays = true;
        let with_slack = |octets: u64| octets + octets / 16 + RESERVE_SLACK_OCTETS;
        let fits = self
            .open
            .as_ref()
            .is_some_and(|open| open.offset + with_slack(here) + Footer::len_of(open.entries.len()) <= open.capacity);
        if fits {
            return Ok(false);
        }
        let needed = with_slack(elsewhere);
        self.seal_open().await?;
        self.begin(needed, 0).await?;
        Ok(true)
    }

    /// Another segment may be begun again.
    pub(super) fn release(&mut self) {
        self.stays = false;
    }

    /// The segment that is open.
    pub(super) fn segment(&self) -> Option<SegmentId> {
        self.open.as_ref().map(|open| open.name.segment)
    }

    /// A record that has been written to the segment that is open.
    pub(super) async fn read(&self, location: Location) -> Result<Vec<u8>, EngineError> {
        let Some(open) = &self.open else { return Ok(Vec::new()) };
        Ok(self.shard.0.wal.read(open.name, location.offset(), location.len as usize).await?)
    }

    /// Whether the batch is large enough to be written.
    pub(super) fn is_full(&self) -> bool {
        self.batch.record_bytes() >= BATCH_BYTES_GATHERED
    }

    /// Adds a record to the batch, with its frames; its number in the batch.
    pub(super) fn push(&mut self, header: RecordHeader, record: &Record, frames: &[u8]) -> usize {
        let RecordHeader { kind, lsn, .. } = header;
        let batch = &mut self.batch;
        record.touches(&mut |mailbox, first, last| batch.touch(Touch { mailbox, first, last, lsn, kind }));
        self.push_bytes(header, |out| {
            record.put_payload(out);
            out.extend_from_slice(frames);
        })
    }

    /// Adds a record whose payload is not to be looked into.
    pub(super) fn push_bytes(&mut self, header: RecordHeader, payload: impl FnOnce(&mut Vec<u8>)) -> usize {
        let (offset, len) = self.batch.push(header, payload);
        self.records.push((header, offset, len));
        self.records.len() - 1
    }

    /// Writes the batch; where its records lie now.
    pub(super) async fn flush(&mut self) -> Result<Vec<Location>, EngineError> {
        if self.batch.is_empty() {
            return Ok(Vec::new());
        }
        let bytes = self.batch.total_bytes();
        self.make_room(bytes, self.records.len()).await?;
        let Some(open) = &mut self.open else { return Ok(Vec::new()) };
        let batch = std::mem::take(&mut self.batch);
        let position = Position { segment: open.name.segment, offset: open.offset };
        let records_offset = open.offset + batch.records_start();
        let batch = batch.finish(open.sequence, self.shard.0.epoch, position, position);
        // In small portions, each made durable: whoever commits meanwhile waits for no more than one of them.
        for (number, portion) in batch.chunks(SYNC_OCTETS).enumerate() {
            let offset = open.offset + (number * SYNC_OCTETS) as u64;
            self.shard.0.wal.append(open.name, offset, portion.to_vec(), true).await.0?;
            self.shard.pace(portion.len() as u64).await;
        }
        open.offset += bytes;
        open.sequence += 1;
        self.bytes += bytes;
        self.paced += bytes;
        self.expected = self.expected.saturating_sub(bytes);
        let mut locations = Vec::with_capacity(self.records.len());
        for (header, offset, len) in self.records.drain(..) {
            let offset_units =
                u32::try_from((records_offset + u64::from(offset)) / 8).expect("segments are at most 32 GB");
            let ordinal = open.entries.len() as u32;
            locations.push(Location { segment: open.name.segment, offset_units, len, ordinal });
            let RecordHeader { kind, flags, generation, lsn, .. } = header;
            open.entries.push(FooterEntry { offset_units, len, kind, flags, generation, lsn });
        }
        Ok(locations)
    }

    async fn make_room(&mut self, batch_bytes: u64, records: usize) -> Result<(), EngineError> {
        let fits = self.open.as_ref().is_some_and(|open| {
            open.offset + batch_bytes + Footer::len_of(open.entries.len() + records) <= open.capacity
        });
        if fits || (self.stays && self.open.is_some()) {
            return Ok(());
        }
        self.seal_open().await?;
        self.begin(batch_bytes, records).await
    }

    async fn begin(&mut self, batch_bytes: u64, records: usize) -> Result<(), EngineError> {
        let inner = &self.shard.0;
        let segment = {
            let mut log = inner.log.borrow_mut();
            let segment = log.next_compacted;
            log.next_compacted.0 += 1;
            segment
        };
        let name = SegmentName { segment, epoch: inner.epoch };
        let header = SegmentHeader {
            store: inner.store,
            shard: inner.id,
            epoch: inner.epoch,
            segment,
            generation: self.generation,
            first_batch: 1,
            as_of: self.as_of,
            dictionaries: self.dictionaries.clone(),
        };
        let header = header.encode();
        let offset = header.len() as u64;
        let needed = offset + batch_bytes + Footer::len_of(records);
        // Footer entries are counted with what is expected.
        let wanted = offset + self.expected + self.expected / 8 + 8 * RESERVE_SLACK_OCTETS;
        let capacity = wanted.min(inner.config.segment_size_bytes).max(needed);
        let mut capacity = capacity;
        let mut begun = inner.wal.begin(name, header.clone(), capacity).await;
        if matches!(begun, Err(StorageError::NoSpace(_))) {
            // Less may be written than could be.
            capacity = needed;
            begun = inner.wal.begin(name, header, capacity).await;
        }
        begun?;
        self.bytes += offset;
        self.open = Some(Open { name, capacity, offset, sequence: 1, entries: Vec::new() });
        Ok(())
    }

    /// Ends the last segment. All of them are durable on return.
    async fn seal_open(&mut self) -> Result<(), EngineError> {
        let Some(open) = &self.open else { return Ok(()) };
        let inner = &self.shard.0;
        let footer = Footer { data_end: open.offset, entries: open.entries.clone() };
        let entry = SegmentEntry {
            segment: open.name.segment,
            epoch: inner.epoch,
            generation: self.generation,
            data_end: open.offset,
            records: footer.entries.len() as u32,
        };
        let footer = footer.encode();
        let len = footer.len() as u64;
        inner.wal.seal(open.name, open.offset, footer).await?;
        self.bytes += len;
        self.sealed.push((open.name, entry));
        self.open = None;
        Ok(())
    }

    /// Removes what was written and is not named. What cannot be removed now the next start removes.
    pub(super) async fn give_up(mut self) {
        let inner = &self.shard.0;
        if let Some(open) = self.open.take() {
            let _ = inner.wal.discard(open.name).await;
            let _ = inner.blobs.delete(BlobName::Segment(open.name)).await;
        }
        for (name, _) in self.sealed {
            let _ = inner.blobs.delete(BlobName::Segment(name)).await;
        }
    }
}
