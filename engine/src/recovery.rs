//! Opening a shard: restore the index from its checkpoint, replay the log's tail, and make the verdict durable before
//! any session sees it.
//!
//! A bad batch at or above every position that anything recorded as durable is a torn tail: nobody was told of it, and it
//! is dropped. A bad batch below such a position is damage: what can still be read of it counts, the rest is named, and
//! replay goes on.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Damage, EngineError, Finding, RecoveryReport};
use crate::format::batch::{
    BATCH_HEADER_BYTES, BatchHeader, TOUCH_ENTRY_BYTES, Touch, decode_touches, end_of, records, touch_table_is_at,
    touches_len,
};
use crate::format::manifest::{IndexEntry, Manifest, Quarantine, SegmentEntry};
use crate::format::record::{FOLDED, MailboxChange, Record, RecordHeader};
use crate::format::segment::{Footer, FooterEntry, SegmentHeader};
use crate::format::{BLOCK_BYTES, FormatError};
use crate::ids::{Epoch, Location, Lsn, MailboxId, Position, SegmentId, ShardId};
use crate::planted::{self, Bug};
use crate::restore::{ListedRecords, restore_index};
use crate::shard::{BATCH_BYTES_GATHERED, Recovered, Shard, ShardConfig, ShardEvent};
use crate::state::{Relocated, State};
use crate::storage::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError, Wal};

/// Segments are read in pieces of this size.
const READ_BYTES: usize = 4 << 20;

/// Touch tables in one run of damaged blocks are read up to this.
const TABLE_BYTES_MAX: usize = 64 << 20;
/// What a segment of unknown length may have held: one of the default size.
const SEGMENT_BYTES_ASSUMED: u64 = 256 << 20;

/// A record found in the log.
#[derive(Clone, Debug)]
pub struct FoundRecord {
    pub header: RecordHeader,
    /// `None` for a kind that is unknown and may be skipped.
    pub record: Option<Record>,
    /// Offset in the segment.
    pub offset: u64,
    pub len: u32,
}

/// A batch, or a run of blocks where one should be.
#[derive(Clone, Debug)]
pub struct FoundBatch {
    pub position: Position,
    /// Where the next one begins.
    pub end: u64,
    pub header: Option<BatchHeader>,
    pub touches: Vec<Touch>,
    /// Good touch tables: one in a good batch, any number in a run of blocks.
    pub tables: u64,
    pub records: Vec<FoundRecord>,
    /// Offsets in the segment, and what is wrong there. Empty for a good batch.
    pub errors: Vec<(u64, FormatError)>,
    /// Records may have been lost that no touch table names.
    pub lost_unnamed: bool,
}

/// What a segment holds, good and bad, in the order of offsets.
#[derive(Clone, Debug)]
pub struct FoundSegment {
    pub name: SegmentName,
    pub sealed: bool,
    /// Its file is not there.
    pub gone: bool,
    /// Without its dictionaries: those of a whole log are many.
    pub header: Result<SegmentHeader, FormatError>,
    /// What is wrong with its dictionaries.
    pub dictionary_errors: Vec<FormatError>,
    /// Where the scan began.
    pub begun: u64,
    pub batches: Vec<FoundBatch>,
}

/// Where the bytes of a segment come from.
pub(crate) struct SegmentSource<'a, S: Storage> {
    wal: &'a S::Wal,
    blobs: &'a S::Blobs,
    name: SegmentName,
    sealed: bool,
    /// Lets other tasks run between batches.
    pause: Option<&'a S>,
}

impl<'a, S: Storage> SegmentSource<'a, S> {
    pub(crate) fn new(wal: &'a S::Wal, blobs: &'a S::Blobs, name: SegmentName, sealed: bool) -> Self {
        Self { wal, blobs, name, sealed, pause: None }
    }

    /// For a scan beside sessions: other tasks run after every batch.
    pub(crate) fn pausing(self, runtime: &'a S) -> Self {
        Self { pause: Some(runtime), ..self }
    }

    async fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        if self.sealed {
            self.blobs.get(BlobName::Segment(self.name), offset, len).await
        } else {
            self.wal.read(self.name, offset, len).await
        }
    }

    /// The next offset from `offset` on at which something may have been written.
    async fn next_data(&self, offset: u64) -> Result<u64, StorageError> {
        if self.sealed { Ok(offset) } else { self.wal.next_data(self.name, offset).await }
    }
}

/// A window on a segment that is read front to back.
struct Window<'a, S: Storage> {
    source: &'a SegmentSource<'a, S>,
    start: u64,
    bytes: Vec<u8>,
    limit: u64,
}

impl<S: Storage> Window<'_, S> {
    /// Whether the block at `offset` has been read already.
    fn has(&self, offset: u64) -> bool {
        offset >= self.start && offset < self.start + self.bytes.len() as u64
    }

    /// Bytes from `offset`: at least `len` unless the limit comes first.
    async fn at(&mut self, offset: u64, len: usize) -> Result<&[u8], StorageError> {
        let len = len.min(self.limit.saturating_sub(offset) as usize);
        let end = offset + len as u64;
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let want = len.max(READ_BYTES.min(self.limit.saturating_sub(offset) as usize));
            self.bytes = self.source.read(offset, want).await?;
            self.start = offset;
        }
        let from = ((offset - self.start) as usize).min(self.bytes.len());
        Ok(&self.bytes[from..])
    }
}

/// Reads a segment's batches in `[from, limit)`; `from` 0 stands for its first batch.
pub(crate) async fn scan_segment<S: Storage>(
    source: &SegmentSource<'_, S>,
    from: u64,
    limit: u64,
) -> Result<FoundSegment, StorageError> {
    let name = source.name;
    let first = source.read(0, BLOCK_BYTES as usize).await?;
    let header = match SegmentHeader::length(&first) {
        Ok(len) if len > first.len() => {
            let bytes = match source.read(0, len).await {
                // Its dictionaries cannot be read, which is for those to find who need them.
                Err(StorageError::Failed { .. }) => first,
                bytes => bytes?,
            };
            SegmentHeader::decode_some(&bytes).map(|decoded| (decoded, len))
        }
        Ok(len) => SegmentHeader::decode_some(&first).map(|decoded| (decoded, len)),
        Err(error) => Err(error),
    };
    let header = header.and_then(|((header, errors), len)| {
        if header.segment == name.segment && header.epoch == name.epoch {
            return Ok((SegmentHeader { dictionaries: Vec::new(), ..header }, errors, len as u64));
        }
        let detail = format!("segment {}, epoch {}", header.segment, header.epoch);
        Err(FormatError::Misplaced { what: "segment header", detail })
    });
    let (header, dictionary_errors, first_batch) = match header {
        Ok((header, errors, len)) => (Ok(header), errors, len),
        // Its dictionaries, if it has any, are blocks that are no batch.
        Err(error) => (Err(error), Vec::new(), BLOCK_BYTES),
    };
    let mut found = FoundSegment {
        name,
        sealed: source.sealed,
        gone: false,
        header,
        dictionary_errors,
        begun: from.max(first_batch),
        batches: Vec::new(),
    };
    let mut window = Window { source, start: 0, bytes: Vec::new(), limit };
    let mut offset = from.max(first_batch);
    // A run of blocks that are no batch: whether it matters depends on what follows.
    let mut gap: Option<Gap> = None;
    while offset < limit {
        let position = Position { segment: name.segment, offset };
        let bytes = window.at(offset, BLOCK_BYTES as usize).await?;
        let block = &bytes[..bytes.len().min(BLOCK_BYTES as usize)];
        match BatchHeader::decode(block, position, name.epoch) {
            Ok(header) => {
                found.batches.extend(gap.take().map(|gap| gap.into_batch(name.segment, offset)));
                let total = header.total_bytes();
                let bytes = window.at(offset, total as usize).await?;
                let mut batch = open_batch(header, &bytes[..bytes.len().min(total as usize)]);
                batch.end = batch.end.min(limit);
                found.batches.push(batch);
                offset += total;
                if let Some(runtime) = source.pause {
                    runtime.yield_now().await;
                }
            }
            Err(error) => {
                let is_zero = block.iter().all(|&byte| byte == 0);
                let table = block.get(BATCH_HEADER_BYTES..).filter(|bytes| touch_table_is_at(bytes)).map(touches_len);
                let gap = gap.get_or_insert_with(|| Gap::new(offset, error));
                // Mail may look like a table: what is spent on it is bounded, and its numbers must be of this epoch.
                if let Some(len) = table
                    && len <= gap.table_bytes_left
                {
                    gap.table_bytes_left -= len;
                    let bytes = window.at(offset, BATCH_HEADER_BYTES + len).await?;
                    let is_of_this = |touch: &Touch| {
                        let epoch = touch.lsn.epoch();
                        if name.segment.is_compacted() { epoch <= name.epoch } else { epoch == name.epoch }
                    };
                    if let Ok(touches) = decode_touches(bytes.get(BATCH_HEADER_BYTES..).unwrap_or_default())
                        && touches.iter().all(is_of_this)
                    {
                        gap.tables += 1;
                        gap.touches.extend(touches);
                    }
                }
                offset += BLOCK_BYTES;
                if !is_zero {
                    gap.data_end = offset;
                }
                if is_zero && offset < limit && !window.has(offset) {
                    // Space that was set aside and never written need not be read.
                    offset = source.next_data(offset).await?.min(limit) / BLOCK_BYTES * BLOCK_BYTES;
                }
            }
        }
    }
    // An unsealed segment has space after its data; a sealed one has none.
    if let Some(gap) = gap {
        let end = if source.sealed { limit } else { gap.data_end.min(limit) };
        if gap.start < end {
            found.batches.push(gap.into_batch(name.segment, end));
        }
    }
    Ok(found)
}

/// Blocks where a batch should be, with what their touch tables still say.
struct Gap {
    start: u64,
    error: FormatError,
    /// After the last block that is not all zeroes.
    data_end: u64,
    /// How much more of supposed touch tables is looked at.
    table_bytes_left: usize,
    tables: u64,
    touches: Vec<Touch>,
}

impl Gap {
    fn new(start: u64, error: FormatError) -> Self {
        Self { start, error, data_end: start, table_bytes_left: TABLE_BYTES_MAX, tables: 0, touches: Vec::new() }
    }

    fn into_batch(self, segment: SegmentId, end: u64) -> FoundBatch {
        FoundBatch {
            position: Position { segment, offset: self.start },
            end,
            header: None,
            touches: self.touches,
            tables: self.tables,
            records: Vec::new(),
            errors: vec![(self.start, self.error)],
            lost_unnamed: false,
        }
    }
}

/// Verifies the touch table and records of a batch.
pub(crate) fn open_batch(header: BatchHeader, bytes: &[u8]) -> FoundBatch {
    let position = header.position;
    let mut found = FoundBatch {
        position,
        end: end_of(&header).offset,
        header: Some(header),
        touches: Vec::new(),
        tables: 0,
        records: Vec::new(),
        errors: Vec::new(),
        lost_unnamed: false,
    };
    match decode_touches(bytes.get(BATCH_HEADER_BYTES..).unwrap_or_default()) {
        Ok(touches) => (found.touches, found.tables) = (touches, 1),
        Err(error) => found.errors.push((position.offset + BATCH_HEADER_BYTES as u64, error)),
    }
    let start = header.records_offset();
    let record_bytes = bytes.get((start - position.offset) as usize..).unwrap_or_default();
    for result in records(&header, record_bytes) {
        match result {
            Ok(record) => {
                let offset = start + u64::from(record.offset);
                match Record::decode(record.header.kind, record.payload) {
                    Ok(decoded) => found.records.push(FoundRecord {
                        header: record.header,
                        record: decoded,
                        offset,
                        len: record.len,
                    }),
                    Err(error) => found.errors.push((offset, error)),
                }
            }
            Err((offset, error)) => found.errors.push((start + u64::from(offset), error)),
        }
    }
    found.lost_unnamed = found.tables == 0 && found.records.len() < header.record_count as usize;
    found
}

impl FoundBatch {
    pub fn is_good(&self) -> bool {
        self.header.is_some() && self.errors.is_empty()
    }

    /// What of the touch table is not among the good records.
    fn lost(&self) -> impl Iterator<Item = &Touch> {
        let good: BTreeSet<Lsn> = self.records.iter().map(|record| record.header.lsn).collect();
        self.touches.iter().filter(move |touch| touch.mailbox != MailboxId(0) && !good.contains(&touch.lsn))
    }

    /// The mailboxes and UIDs of what is lost.
    fn lost_uids(&self) -> Vec<(MailboxId, u32, u32)> {
        self.lost().map(named).collect()
    }

    /// The error of a record that only a newer program can apply. Its checksum was good: it is not damage.
    fn needs_newer_program(&self) -> Option<&(u64, FormatError)> {
        self.errors.iter().find(|(_, error)| matches!(error, FormatError::UnknownRecord { .. }))
    }
}

/// A touch as findings have it.
fn named(touch: &Touch) -> (MailboxId, u32, u32) {
    let (first, last) = touch.uids().unwrap_or_default();
    (touch.mailbox, first, last)
}

/// Says which transactions damage has made incomplete, and whom they would have touched.
pub(crate) fn dropped_transactions(
    state: &mut State,
    shard: ShardId,
    file_of: impl Fn(SegmentId) -> String,
) -> Vec<Finding> {
    let dropped = std::mem::take(&mut state.dropped);
    let findings = dropped.into_iter().map(|dropped| Finding {
        shard,
        file: file_of(dropped.place.segment),
        offset: dropped.place.offset(),
        what: format!(
            "a transaction has lost records: the {} that could be read do not count either, as if it had not happened",
            dropped.records
        ),
        touches: dropped.touches.iter().filter(|touch| touch.mailbox != MailboxId(0)).map(named).collect(),
    });
    findings.collect()
}

/// The end of the log and what counts of it.
pub(crate) struct Verdict {
    pub log_end: Position,
    /// Everything before was known durable by whoever wrote the log. What counts after it is there by luck so far.
    pub durable: Position,
    pub next_sequence: u64,
    pub torn: Option<(Position, String)>,
    pub damage: Vec<Finding>,
    pub quarantined: Vec<Quarantine>,
    /// The batches that count, in order.
    pub batches: Vec<FoundBatch>,
}

/// Decides what of the scanned segments counts. `proven` is a position before which everything must be there, whatever
/// the batches say; `sequence` is the one that the first batch should carry, if known.
pub(crate) fn judge(
    shard: ShardId,
    segments: Vec<FoundSegment>,
    proven: Position,
    sequence: Option<u64>,
    start: Position,
) -> Verdict {
    let mut durable = proven;
    for (index, segment) in segments.iter().enumerate() {
        for batch in &segment.batches {
            if let Some(header) = &batch.header {
                durable = durable.max(header.durable);
            }
        }
        // A segment is ended and synced before its successor begins.
        let succeeded = segments[index + 1..].iter().any(|later| later.header.is_ok());
        if segment.sealed || succeeded {
            let end = segment.batches.last().map_or(0, |batch| batch.end);
            durable = durable.max(Position { segment: segment.name.segment, offset: end });
        }
    }
    let mut verdict = Verdict {
        log_end: start,
        durable,
        next_sequence: sequence.unwrap_or(1),
        torn: None,
        damage: Vec::new(),
        quarantined: Vec::new(),
        batches: Vec::new(),
    };
    let mut expected = sequence;
    let mut previous: Option<SegmentId> = None;
    // Runs of blocks since the last batch header, by their place among the batches.
    let mut gaps: Vec<usize> = Vec::new();
    'log: for segment in segments {
        let file = crate::storage::local::segment_file(segment.name);
        let directory = if segment.sealed { "seg" } else { "wal" };
        let file = format!("{}/{directory}/{file}", crate::storage::local::shard_directory(shard));
        let finding = |offset, what: String, touches| Finding { shard, file: file.clone(), offset, what, touches };
        let segment_start = Position { segment: segment.name.segment, offset: 0 };
        let id = segment.name.segment;
        if previous.map_or(id != start.segment, |previous| previous.0 + 1 != id.0) {
            // Compaction has taken out what was before.
            expected = segment.header.as_ref().ok().map(|header| header.first_batch);
            gaps.iter().for_each(|&gap| verdict.batches[gap].lost_unnamed = true);
            gaps.clear();
        }
        previous = Some(id);
        let damaged = segment.header.as_ref().err().into_iter().chain(&segment.dictionary_errors);
        let mut damaged = damaged.map(|error| finding(0, error.to_string(), Vec::new())).peekable();
        let is_used = segment.batches.iter().any(|batch| batch.header.is_some());
        if let Some(unsynced) = damaged.peek().filter(|_| segment_start >= durable && !is_used) {
            // It was begun and never used.
            if segment.batches.is_empty() {
                continue;
            }
            verdict.torn = Some((segment_start, format!("{file}: {}", unsynced.what)));
            break 'log;
        }
        verdict.damage.extend(damaged);
        for batch in segment.batches {
            let at = batch.position;
            if !batch.is_good() {
                let (offset, error) = batch.errors.first().cloned().unwrap_or((at.offset, FormatError::Magic("batch")));
                if at >= durable {
                    let what = format!("{file} at offset {offset}: {error}");
                    verdict.torn = Some((at, what));
                    break 'log;
                }
                verdict.damage.push(finding(offset, error.to_string(), batch.lost_uids()));
                verdict.quarantined.push(Quarantine { from: at, len: batch.end - at.offset });
            }
            if let Some(header) = &batch.header {
                let skipped = expected.map(|expected| header.sequence.wrapping_sub(expected));
                if gaps.is_empty() {
                    if let Some(expected) = expected.filter(|&expected| header.sequence != expected) {
                        let what = format!("batch {} stands where batch {expected} should", header.sequence);
                        verdict.damage.push(finding(at.offset, what, Vec::new()));
                        // Batches that left no trace may have given any numbers.
                        let bytes =
                            header.sequence.saturating_sub(expected).saturating_mul(BATCH_BYTES_GATHERED as u64);
                        let error = FormatError::Magic("batch");
                        let mut lost = Gap::new(0, error).into_batch(at.segment, bytes.min(SEGMENT_BYTES_ASSUMED));
                        lost.lost_unnamed = true;
                        verdict.batches.push(lost);
                    }
                } else if skipped != Some(gaps.iter().map(|&gap| verdict.batches[gap].tables).sum()) {
                    gaps.iter().for_each(|&gap| verdict.batches[gap].lost_unnamed = true);
                }
                gaps.clear();
                expected = Some(header.sequence + 1);
                verdict.next_sequence = header.sequence + 1;
            } else {
                // How many batches stood here the next one will say: at most one in each block.
                gaps.push(verdict.batches.len());
                verdict.next_sequence += (batch.end - at.offset) / BLOCK_BYTES + 1;
            }
            verdict.log_end = Position { segment: at.segment, offset: batch.end };
            verdict.batches.push(batch);
        }
        // Zeroes are no batch, but something was proven to stand here.
        let is_last = verdict.log_end.segment == segment.name.segment;
        let end = if is_last { verdict.log_end.offset.max(segment.begun) } else { segment.begun };
        if proven.segment == segment.name.segment && end < proven.offset {
            let error = FormatError::Short { what: "log", needed: proven.offset, available: end };
            verdict.damage.push(finding(end, error.to_string(), Vec::new()));
            gaps.push(verdict.batches.len());
            verdict.next_sequence += (proven.offset - end) / BLOCK_BYTES + 1;
            verdict.batches.push(Gap::new(end, error).into_batch(segment.name.segment, proven.offset));
            verdict.log_end = proven;
        }
    }
    gaps.iter().for_each(|&gap| verdict.batches[gap].lost_unnamed = true);
    verdict
}

impl<S: Storage> Shard<S> {
    /// Opens a shard: claims the next epoch, recovers, and starts. When this returns, everything that sessions can see
    /// is durable.
    ///
    /// # Errors
    /// Storage that fails, a manifest that is damaged or of another version, records of unknown mandatory kinds.
    pub async fn open(
        storage: S,
        id: ShardId,
        store: u128,
        config: ShardConfig,
    ) -> Result<(Self, RecoveryReport), EngineError> {
        Self::open_with(storage, id, store, config, Index::AsItIs).await
    }

    pub(crate) async fn open_with(
        storage: S,
        id: ShardId,
        store: u128,
        config: ShardConfig,
        index: Index,
    ) -> Result<(Self, RecoveryReport), EngineError> {
        storage.prepare(id).await?;
        let wal = storage.wal(id);
        let (epoch, mut recovered, report) = match try_open(&storage, id, store, index).await {
            Err(EngineError::Full) => {
                // A start takes little, and the reserve is for that.
                wal.release().await?;
                try_open(&storage, id, store, index).await?
            }
            opened => opened?,
        };
        if config.reserve_bytes == 0 {
            wal.release().await?;
        } else {
            match wal.set_aside(config.reserve_bytes).await {
                Err(StorageError::NoSpace(_)) => recovered.low_space = true,
                set_aside => set_aside?,
            }
        }
        let low_space = recovered.low_space;
        let shard = Self::start(storage, id, store, epoch, config, recovered);
        if low_space {
            shard.tell(ShardEvent::SpaceLow);
        }
        Ok((shard, report))
    }
}

/// What a start makes of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Index {
    AsItIs,
    /// The log alone counts. The old index stays in force until a checkpoint has written another.
    Anew,
}

async fn try_open<S: Storage>(
    storage: &S,
    id: ShardId,
    store: u128,
    index: Index,
) -> Result<(Epoch, Recovered, RecoveryReport), EngineError> {
    let manifests = storage.manifests(id);
    let old = match manifests.latest().await? {
        Some((_, _, bytes)) => Some(read_manifest(id, store, &bytes)?),
        None => None,
    };
    let epoch = manifests.claim().await?;
    let mut report = RecoveryReport::default();
    let recovered = recover(storage, id, store, epoch, old, index, &mut report).await?;
    Ok((epoch, recovered, report))
}

fn read_manifest(id: ShardId, store: u128, bytes: &[u8]) -> Result<Manifest, EngineError> {
    let manifest = Manifest::from_bytes(bytes);
    let manifest = manifest.and_then(|manifest| {
        if manifest.store == store && manifest.shard == id {
            return Ok(manifest);
        }
        let detail = format!("store {:032x}, shard {}", manifest.store, manifest.shard);
        Err(FormatError::Misplaced { what: "manifest", detail })
    });
    manifest.map_err(|error| {
        let place = format!("{}/manifest", crate::storage::local::shard_directory(id));
        Damage { place, error }.into()
    })
}

/// A segment that belongs to the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LogSegment {
    pub name: SegmentName,
    pub state: SegmentState,
    /// Of sealed ones that the manifest knows.
    data_end: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentState {
    Unsealed,
    Sealed,
    /// It was there: one that follows it is, or the manifest refers to it.
    Gone,
}

/// The segments of the log in order: those the manifest knows, then what its epoch wrote after it. Not those that compaction
/// has written.
pub(crate) async fn log_segments<S: Storage>(
    wal: &S::Wal,
    blobs: &S::Blobs,
    manifest: &Manifest,
) -> Result<Vec<LogSegment>, StorageError> {
    let mut segments: BTreeMap<SegmentId, LogSegment> = BTreeMap::new();
    let mut retired: BTreeSet<SegmentId> = BTreeSet::new();
    for entry in manifest.segments.iter().filter(|entry| !entry.segment.is_compacted()) {
        if entry.is_retired() {
            retired.insert(entry.segment);
            continue;
        }
        let name = SegmentName { segment: entry.segment, epoch: entry.epoch };
        let data_end = Some(entry.data_end);
        segments.insert(entry.segment, LogSegment { name, state: SegmentState::Sealed, data_end });
    }
    let new = |name, state| LogSegment { name, state, data_end: None };
    let is_new = |name: &SegmentName| {
        let is_of_log = !name.segment.is_compacted() && !retired.contains(&name.segment);
        is_of_log && name.epoch == manifest.epoch && name.segment >= manifest.first_segment
    };
    for name in wal.list().await?.into_iter().filter(is_new) {
        segments.entry(name.segment).or_insert(new(name, SegmentState::Unsealed));
    }
    for blob in blobs.list().await? {
        if let BlobName::Segment(name) = blob
            && is_new(&name)
        {
            segments.entry(name.segment).or_insert(new(name, SegmentState::Sealed));
        }
    }
    // An epoch's segments are dense.
    let newest = segments.keys().chain(&retired).max().copied().unwrap_or_default();
    let referred = if manifest.replay_from.offset > 0 { manifest.replay_from.segment } else { SegmentId(0) };
    let dense = (manifest.first_segment.0.max(1)..=newest.max(referred).0).map(SegmentId);
    for segment in dense.filter(|segment| !retired.contains(segment)) {
        let name = SegmentName { segment, epoch: manifest.epoch };
        segments.entry(segment).or_insert(new(name, SegmentState::Gone));
    }
    Ok(segments.into_values().collect())
}

/// Scans what compaction has written: it belongs to the whole log, and to no tail of it.
pub(crate) async fn scan_compacted<S: Storage>(
    wal: &S::Wal,
    blobs: &S::Blobs,
    manifest: &Manifest,
) -> Result<Vec<FoundSegment>, StorageError> {
    let mut found = Vec::new();
    for entry in manifest.segments.iter().filter(|entry| entry.segment.is_compacted()) {
        let name = SegmentName { segment: entry.segment, epoch: entry.epoch };
        let source = SegmentSource::<S>::new(wal, blobs, name, true);
        found.push(match scan_segment(&source, 0, entry.data_end).await {
            Err(StorageError::NotFound(_)) => gone_segment(name, 0, entry.data_end),
            scanned => scanned?,
        });
    }
    Ok(found)
}

/// Decides what of the segments that compaction has written counts, each by itself, and adds it to the verdict on the log.
pub(crate) fn judge_compacted(shard: ShardId, segments: Vec<FoundSegment>, verdict: &mut Verdict) {
    for segment in segments {
        let found = judge_alone(shard, segment);
        verdict.damage.extend(found.damage);
        verdict.quarantined.extend(found.quarantined);
        verdict.batches.extend(found.batches);
    }
}

/// Decides what counts of one sealed segment, whatever the others say.
pub(crate) fn judge_alone(shard: ShardId, segment: FoundSegment) -> Verdict {
    let id = segment.name.segment;
    let end = segment.batches.last().map_or(0, |batch| batch.end);
    let first = segment.header.as_ref().ok().map(|header| header.first_batch);
    let proven = Position { segment: id, offset: end };
    judge(shard, vec![segment], proven, first, Position { segment: id, offset: 0 })
}

/// Scans the log from `replay_from`, or all of it.
pub(crate) async fn scan_log<S: Storage>(
    wal: &S::Wal,
    blobs: &S::Blobs,
    manifest: &Manifest,
    from: Position,
) -> Result<Vec<FoundSegment>, StorageError> {
    let mut found = Vec::new();
    for LogSegment { name, state, data_end } in log_segments::<S>(wal, blobs, manifest).await? {
        if name.segment < from.segment {
            continue;
        }
        let start = if name.segment == from.segment { from.offset } else { 0 };
        let limit = match (state, data_end) {
            (_, Some(data_end)) => data_end,
            (SegmentState::Unsealed, None) => wal.len(name).await?,
            (SegmentState::Sealed, None) => sealed_data_end::<S>(blobs, name).await?,
            (SegmentState::Gone, None) => start + SEGMENT_BYTES_ASSUMED,
        };
        let source = SegmentSource::<S>::new(wal, blobs, name, state == SegmentState::Sealed);
        let scanned = match state {
            SegmentState::Gone => Err(StorageError::NotFound(String::new())),
            _ => scan_segment(&source, start, limit).await,
        };
        found.push(match scanned {
            // The others can still be read.
            Err(StorageError::NotFound(_)) => gone_segment(name, start, limit),
            scanned => scanned?,
        });
    }
    Ok(found)
}

/// A segment whose file is not there, as if all of it from `start` were damaged.
pub(crate) fn gone_segment(name: SegmentName, start: u64, limit: u64) -> FoundSegment {
    let error = FormatError::Short { what: "segment", needed: limit, available: 0 };
    let lost = (start < limit).then(|| Gap::new(start, error.clone()).into_batch(name.segment, limit));
    FoundSegment {
        name,
        sealed: true,
        gone: true,
        header: Err(error),
        dictionary_errors: Vec::new(),
        begun: start,
        batches: lost.into_iter().collect(),
    }
}

/// Where a sealed segment's batches end, by its trailer; by its length if the trailer is damaged.
async fn sealed_data_end<S: Storage>(blobs: &S::Blobs, name: SegmentName) -> Result<u64, StorageError> {
    let (suffix, len) = blobs.get_suffix(BlobName::Segment(name), crate::format::segment::TRAILER_BYTES).await?;
    Ok(crate::format::segment::Trailer::decode(&suffix, len).map_or(len, |trailer| trailer.data_end))
}

/// Something that replay takes in.
enum Replayed {
    Record(RecordHeader, Record, Location),
    /// A record that damage has taken; its touch table has outlived it.
    Lost(Touch),
    /// Damage of so many bytes has taken records that nothing names.
    LostUnnamed(u64),
}

/// When a record's turn comes: a folded one's after all others up to the LSN as of which it is.
pub(crate) fn replay_key(header: &RecordHeader, record: &Record) -> (Lsn, bool, u32) {
    let folded = if header.flags & FOLDED == 0 { None } else { record.folded_as_of() };
    (folded.unwrap_or(header.lsn), folded.is_some(), header.generation)
}

fn location_of(segment: SegmentId, record: &FoundRecord, ordinals: &BTreeMap<SegmentId, Vec<u64>>) -> Location {
    let ordinal = ordinals.get(&segment).and_then(|offsets| offsets.binary_search(&record.offset).ok());
    Location {
        segment,
        offset_units: (record.offset / 8) as u32,
        len: record.len,
        ordinal: ordinal.map_or(u32::MAX, |ordinal| ordinal as u32),
    }
}

/// Tells the state what folded records must have known before any record has its turn: the mailboxes that base records speak
/// of, and where records lie that have been moved since others have named them.
fn prepare_folded(state: &mut State, batches: &[FoundBatch], ordinals: &BTreeMap<SegmentId, Vec<u64>>) {
    state.segments.extend(batches.iter().map(|batch| batch.position.segment));
    for batch in batches.iter().filter(|batch| batch.position.segment.is_compacted()) {
        for found in &batch.records {
            match &found.record {
                Some(Record::Base(base)) => state.expect_base(base),
                Some(Record::Message(head)) => {
                    let location = location_of(batch.position.segment, found, ordinals);
                    let relocated = Relocated::new(found.header.generation, location, head);
                    state.relocated.entry(head.id).or_default().push(relocated);
                }
                _ => {}
            }
        }
    }
}

/// Applies the records of batches that count, in the order of their LSNs.
pub(crate) fn replay(state: &mut State, batches: Vec<FoundBatch>, ordinals: &BTreeMap<SegmentId, Vec<u64>>) -> u64 {
    let mut found: Vec<((Lsn, bool, u32), Position, Replayed)> = Vec::new();
    prepare_folded(state, &batches, ordinals);
    let mut newest = Lsn::default();
    let mut count = 0;
    let is_damaged = batches.iter().any(|batch| !batch.is_good() || batch.lost_unnamed);
    for batch in batches {
        let position = batch.position;
        if batch.lost_unnamed {
            let lost = Replayed::LostUnnamed(batch.end - position.offset);
            found.push(((newest, false, u32::MAX), position, lost));
        }
        if !batch.is_good() {
            found.extend(batch.lost().map(|touch| ((touch.lsn, false, 0), position, Replayed::Lost(*touch))));
        }
        for record in batch.records {
            let location = location_of(position.segment, &record, ordinals);
            if !position.segment.is_compacted() {
                newest = newest.max(record.header.lsn);
            }
            if let Some(decoded) = record.record {
                let at = Position { segment: position.segment, offset: record.offset };
                let key = replay_key(&record.header, &decoded);
                found.push((key, at, Replayed::Record(record.header, decoded, location)));
                count += 1;
            }
        }
    }
    if planted::is_on(Bug::ReplayByFileOrder) {
        found.sort_by_key(|&(_, at, _)| (std::cmp::Reverse(at.segment), at.offset));
    } else {
        found.sort_by_key(|&(key, ..)| key);
    }
    for (_, _, item) in found {
        match item {
            Replayed::Record(header, record, location) if header.flags & FOLDED != 0 => {
                state.apply_folded(header.lsn, record, location);
            }
            Replayed::Record(header, record, location) => {
                state.apply(header.lsn, header.transaction, record, location);
            }
            Replayed::Lost(touch) => state.lose(&touch),
            Replayed::LostUnnamed(bytes) => state.lose_unnamed(bytes / TOUCH_ENTRY_BYTES as u64),
        }
    }
    // What damage has left without its commit record never counts.
    state.drop_open_transactions();
    state.count_folded();
    state.relocated.clear();
    state.segments.clear();
    if is_damaged || !state.dropped.is_empty() {
        state.name_the_nameless();
    }
    count
}

/// Records that only a newer program can apply are not for this one to drop.
fn refuse_newer_records(id: ShardId, segments: &[FoundSegment]) -> Result<(), EngineError> {
    for segment in segments {
        if let Some((offset, error)) = segment.batches.iter().find_map(FoundBatch::needs_newer_program) {
            let directory = crate::storage::local::shard_directory(id);
            let file = crate::storage::local::segment_file(segment.name);
            let sub = if segment.sealed { "seg" } else { "wal" };
            let place = format!("{directory}/{sub}/{file} at offset {offset}");
            return Err(Damage { place, error: error.clone() }.into());
        }
    }
    Ok(())
}

/// Writes again what was read of an unsealed segment from `from` to `end`. It may be in the page cache only, marked
/// clean by a sync that failed, and then no sync would ever write it.
async fn rewrite<W: Wal>(wal: &W, name: SegmentName, from: u64, end: u64) -> Result<(), StorageError> {
    let mut offset = from;
    while offset < end {
        let bytes = wal.read(name, offset, READ_BYTES.min((end - offset) as usize)).await?;
        let len = bytes.len() as u64;
        if len == 0 {
            break;
        }
        wal.append(name, offset, bytes, false).await.0?;
        offset += len;
    }
    Ok(())
}

async fn recover<S: Storage>(
    storage: &S,
    id: ShardId,
    store: u128,
    epoch: Epoch,
    old: Option<Manifest>,
    index: Index,
    report: &mut RecoveryReport,
) -> Result<Recovered, EngineError> {
    let (wal, blobs, manifests) = (storage.wal(id), storage.blobs(id), storage.manifests(id));
    let mut state = State { shard: id, ..State::default() };
    let is_new = old.is_none();
    let mut manifest = old.unwrap_or(Manifest { store, shard: id, replay_sequence: 1, ..Manifest::default() });
    let old_index = (manifest.indexes.clone(), manifest.replay_from, manifest.replay_sequence);
    let mut remembered = State { shard: id, ..State::default() };
    let mut listed = ListedRecords::default();
    if index == Index::Anew {
        if restore_index::<S>(&blobs, &manifest.indexes, &mut remembered).await?.is_err() {
            remembered = State::default();
        }
        forget_index(&mut manifest);
    } else {
        match restore_index::<S>(&blobs, &manifest.indexes, &mut state).await? {
            Ok(known) => listed = known,
            Err((entry, error)) => {
                // The index is a cache of the log: begin again from the log alone.
                let directory = crate::storage::local::shard_directory(id);
                let file = crate::storage::local::index_file(entry.blob, entry.epoch);
                report.damage.push(Finding {
                    shard: id,
                    file: format!("{directory}/idx/{file}"),
                    offset: entry.directory_offset,
                    what: format!("{error}; the index is rebuilt from the log"),
                    touches: Vec::new(),
                });
                state = State { shard: id, ..State::default() };
                forget_index(&mut manifest);
            }
        }
    }
    let mut from = manifest.replay_from;
    if planted::is_on(Bug::ReplayTooLate) && from.segment.0 > 0 {
        from = Position { segment: SegmentId(from.segment.0 + 1), offset: 0 };
    }
    let segments = scan_log::<S>(&wal, &blobs, &manifest, from).await?;
    refuse_newer_records(id, &segments)?;
    let unsealed: Vec<SegmentName> =
        segments.iter().filter(|segment| !segment.sealed).map(|segment| segment.name).collect();
    let sealed_unknown: Vec<SegmentName> = segments
        .iter()
        .filter(|segment| {
            let is_known = manifest.segments.iter().any(|entry| entry.segment == segment.name.segment);
            segment.sealed && !segment.gone && !is_known
        })
        .map(|segment| segment.name)
        .collect();
    let highest = segments.iter().map(|segment| segment.name.segment.0).max();
    let next_segment = highest
        .into_iter()
        .chain([manifest.replay_from.segment.0, manifest.log_end.segment.0])
        .filter(|&segment| segment > 0)
        .chain(manifest.segments.iter().map(|entry| entry.segment.0).filter(|&id| !SegmentId(id).is_compacted()))
        .max()
        // Those that compaction has taken out count, too.
        .map_or(1, |highest| highest + 1)
        .max(manifest.first_segment.0);
    let sequence = (manifest.replay_sequence > 0).then_some(manifest.replay_sequence);
    let proven = manifest.replay_from.max(manifest.log_end);
    let mut verdict = judge(id, segments, proven, sequence, manifest.replay_from);
    let tail_bytes: u64 = verdict.batches.iter().map(|batch| batch.end - batch.position.offset).sum();
    if manifest.replay_from == Position::default() {
        let compacted = scan_compacted::<S>(&wal, &blobs, &manifest).await?;
        refuse_newer_records(id, &compacted)?;
        judge_compacted(id, compacted, &mut verdict);
    }

    // Footers of what is sealed now, and ordinals of the records for their locations.
    let mut footers: BTreeMap<SegmentId, Footer> = BTreeMap::new();
    for batch in &verdict.batches {
        let footer = footers.entry(batch.position.segment).or_default();
        footer.data_end = batch.end;
        footer.entries.extend(batch.records.iter().map(footer_entry));
    }
    // A segment that replay reads from its middle has records before that: count them too.
    let begun = manifest.replay_from;
    let known = log_segments::<S>(&wal, &blobs, &manifest).await?;
    if begun.offset > 0
        && let Some(segment) = known.into_iter().find(|segment| segment.name.segment == begun.segment)
        && (segment.state == SegmentState::Unsealed || footers.contains_key(&begun.segment))
    {
        let entries = match listed.before(segment.name, begun.offset) {
            Some(entries) => entries,
            None => {
                let is_sealed = segment.state == SegmentState::Sealed;
                let source = SegmentSource::<S>::new(&wal, &blobs, segment.name, is_sealed);
                let head = match scan_segment(&source, 0, begun.offset).await {
                    Err(StorageError::NotFound(_)) => gone_segment(segment.name, 0, 0),
                    head => head?,
                };
                let entries: Vec<FooterEntry> =
                    head.batches.iter().flat_map(|batch| &batch.records).map(footer_entry).collect();
                report.unlisted_records = entries.len() as u64;
                entries
            }
        };
        let footer = footers.entry(begun.segment).or_default();
        footer.data_end = footer.data_end.max(begun.offset);
        footer.entries.splice(0..0, entries);
    }
    let ordinals: BTreeMap<SegmentId, Vec<u64>> = footers
        .iter()
        .map(|(&segment, footer)| {
            (segment, footer.entries.iter().map(|entry| u64::from(entry.offset_units) * 8).collect())
        })
        .collect();

    // What replay has read may be page cache only: make it durable before anyone can see it.
    let mut sealed_now = Vec::new();
    for name in unsealed {
        let ends_here = name.segment == verdict.log_end.segment;
        let counts = footers.get(&name.segment).is_some_and(|footer| !footer.entries.is_empty())
            || (ends_here && verdict.log_end.offset > BLOCK_BYTES);
        // A damaged header says nothing against the batches behind it, nor does it that replay begins behind its last record.
        let has_old = name.segment == begun.segment && begun.offset > BLOCK_BYTES;
        if !counts && !has_old {
            wal.discard(name).await?;
            continue;
        }
        let mut footer = footers.get(&name.segment).cloned().unwrap_or_default();
        if footer.data_end == 0 {
            footer.data_end = verdict.log_end.offset;
        }
        if !planted::is_on(Bug::SkipTailRewrite) {
            let from = if verdict.durable.segment == name.segment { verdict.durable.offset } else { 0 };
            if verdict.durable.segment <= name.segment {
                rewrite(&wal, name, from, footer.data_end).await?;
            }
        }
        wal.sync(name).await?;
        wal.seal(name, footer.data_end, footer.encode()).await?;
        sealed_now.push((name, footer.data_end, footer.entries.len() as u32));
    }
    for name in sealed_unknown {
        // Its name may be there by grace of the page cache only.
        wal.adopt(name).await?;
        let data_end = sealed_data_end::<S>(&blobs, name).await?;
        let count = footers.get(&name.segment).map_or(0, |footer| footer.entries.len());
        sealed_now.push((name, data_end, count as u32));
    }
    for (name, data_end, records) in sealed_now {
        manifest.segments.push(SegmentEntry {
            segment: name.segment,
            epoch: name.epoch,
            generation: 0,
            data_end,
            records,
        });
    }
    manifest.segments.sort_by_key(|entry| entry.segment);

    report.batches = verdict.batches.len() as u64;
    report.bytes = tail_bytes;
    report.torn_tail = verdict.torn;
    report.damage.extend(verdict.damage);
    expect_mailboxes(&mut state, &remembered, &verdict.batches);
    report.records = replay(&mut state, verdict.batches, &ordinals);
    state.keep_what_was_given(remembered);
    // By now every segment that counts is sealed.
    report.damage.extend(dropped_transactions(&mut state, id, |segment| {
        let entry = manifest.segments.iter().find(|entry| entry.segment == segment);
        let name = SegmentName { segment, epoch: entry.map_or(epoch, |entry| entry.epoch) };
        let (directory, file) = (crate::storage::local::shard_directory(id), crate::storage::local::segment_file(name));
        format!("{directory}/seg/{file}")
    }));
    for quarantine in verdict.quarantined {
        if !manifest.quarantined.contains(&quarantine) {
            manifest.quarantined.push(quarantine);
        }
    }
    manifest.segments.retain(|entry| !entry.is_retired());
    manifest.epoch = epoch;
    manifest.number = 1;
    manifest.first_segment = SegmentId(next_segment);
    manifest.log_end = if is_new { Position::default() } else { verdict.log_end };
    if index == Index::Anew {
        (manifest.indexes, manifest.replay_from, manifest.replay_sequence) = old_index;
    }
    if !planted::is_on(Bug::TrustPageCache) || is_new {
        manifests.commit(epoch, 1, manifest.to_bytes()).await?;
        manifests.tidy(epoch, 1).await?;
    }

    let sealed = manifest
        .segments
        .iter()
        .map(|entry| (entry.segment, SegmentName { segment: entry.segment, epoch: entry.epoch }));
    let next_index_blob = next_index_blob::<S>(&blobs, &manifest).await?;
    sweep::<S>(&wal, &blobs, &manifest).await?;
    Ok(Recovered {
        state,
        next_sequence: verdict.next_sequence,
        next_segment: SegmentId(next_segment),
        next_index_blob,
        sealed: sealed.collect(),
        tail_bytes,
        low_space: false,
        manifest,
    })
}

/// Lets a manifest say that there is no index, and that all of the log counts.
fn forget_index(manifest: &mut Manifest) {
    manifest.indexes.clear();
    manifest.replay_from = Position::default();
    manifest.replay_sequence = 0;
}

/// Makes the mailboxes that an old index knows and of which the log has lost the record that made them.
fn expect_mailboxes(state: &mut State, known: &State, batches: &[FoundBatch]) {
    if known.slots.keys().next().is_none() {
        return;
    }
    let mut made = BTreeSet::new();
    for batch in batches {
        made.extend(batch.touches.iter().filter(|touch| touch.account().is_some()).map(|touch| touch.mailbox));
        made.extend(batch.records.iter().filter_map(|found| match &found.record {
            Some(Record::Mailbox(MailboxChange::Create { mailbox, .. })) => Some(*mailbox),
            Some(Record::Base(base)) => Some(base.mailbox),
            _ => None,
        }));
    }
    for (_, slot) in known.slots.iter().filter(|(mailbox, _)| !made.contains(mailbox)) {
        state.expect_mailbox(&slot.meta);
    }
}

/// Removes what earlier epochs have left and no manifest names.
async fn sweep<S: Storage>(wal: &S::Wal, blobs: &S::Blobs, manifest: &Manifest) -> Result<(), StorageError> {
    let is_listed = |name: SegmentName| {
        let is_it = |entry: &SegmentEntry| (entry.segment, entry.epoch) == (name.segment, name.epoch);
        name.epoch >= manifest.epoch || manifest.segments.iter().any(is_it)
    };
    for name in blobs.list().await? {
        let is_used = match name {
            BlobName::Index { blob, epoch } => {
                let is_it = |entry: &IndexEntry| (entry.blob, entry.epoch) == (blob, epoch);
                epoch >= manifest.epoch || manifest.indexes.iter().any(is_it)
            }
            // Compaction has replaced it, or has not come to its end.
            BlobName::Segment(name) => is_listed(name),
        };
        if !is_used {
            blobs.delete(name).await?;
        }
    }
    for name in wal.list().await?.into_iter().filter(|&name| !is_listed(name)) {
        wal.discard(name).await?;
    }
    Ok(())
}

pub(crate) fn footer_entry(record: &FoundRecord) -> FooterEntry {
    FooterEntry {
        offset_units: (record.offset / 8) as u32,
        len: record.len,
        kind: record.header.kind,
        flags: record.header.flags,
        generation: record.header.generation,
        lsn: record.header.lsn,
    }
}

/// A number that no index blob has, committed or not, there or gone.
async fn next_index_blob<S: Storage>(blobs: &S::Blobs, manifest: &Manifest) -> Result<u32, StorageError> {
    let names = blobs.list().await?;
    let numbers = names.iter().filter_map(|name| match name {
        BlobName::Index { blob, .. } => Some(*blob),
        BlobName::Segment(_) => None,
    });
    let named = manifest.indexes.iter().map(|entry| entry.blob);
    Ok(numbers.chain(named).max().map_or(1, |highest| highest + 1))
}
