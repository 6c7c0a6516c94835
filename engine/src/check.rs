//! The check of a whole shard: every record, frame, footer and page against its checksum, the index against the log, and
//! every placement against the record it names. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{EngineError, Finding};
use crate::flags::UidSet;
use crate::format::codec::Wire;
use crate::format::frame::{FrameInfo, Unpacker};
use crate::format::manifest::{Manifest, SegmentEntry};
use crate::format::page::{DeltaPage, PageKind, PageLocation, open_page, restore};
use crate::format::record::{Record, kind};
use crate::format::segment::{Footer, SegmentHeader, TRAILER_BYTES, Trailer};
use crate::format::{BLOCK_BYTES, FormatError};
use crate::ids::{AccountId, Epoch, Location, MailboxId, MessageId, Position, SegmentId, ShardId, Uid};
use crate::index::{Change, MailboxIndex, Moved};
use crate::read::open_block;
use crate::recovery::{
    FoundBatch, FoundSegment, dropped_transactions, footer_entry, judge, judge_compacted, replay, scan_compacted,
    scan_log,
};
use crate::restore::restore_index;
use crate::slots::Meta;
use crate::state::State;
use crate::storage::local::{index_file, segment_file, shard_directory};
use crate::storage::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError, Wal};
use crate::verify::{
    Broken, Concerned, Place, Received, add_findings, block_frame, missing_block, open_message, verify_block,
};

/// What a check of one shard found.
#[derive(Clone, Debug, Default)]
pub struct ShardCheck {
    pub findings: Vec<Finding>,
    /// An unacknowledged tail that the next start drops: no error.
    pub torn_tail: Option<String>,
    /// The mailboxes of the shard, with account and name, to name findings by.
    pub mailboxes: BTreeMap<MailboxId, (AccountId, String)>,
    /// The accounts of the store; shard 0 only.
    pub accounts: BTreeMap<AccountId, String>,
    pub records: u64,
    pub messages: u64,
    pub log_bytes: u64,
    /// Segments in which something is damaged that messages may need.
    pub damaged_segments: BTreeSet<SegmentId>,
    /// Records have been lost to damage: the index may know more than the log.
    pub has_lost_records: bool,
    /// The manifest is damaged: nothing else has been looked at.
    pub has_no_manifest: bool,
    pub damaged_footers: Vec<DamagedFooter>,
    /// A directory of the index is damaged: a start puts the index together from the log.
    pub has_damaged_directory: bool,
    /// Mailboxes of which a page is damaged.
    pub damaged_pages: Vec<MailboxId>,
    /// Where index and log disagree about a mailbox.
    pub differences: BTreeMap<MailboxId, Difference>,
    /// They disagree about accounts, names or counters.
    pub differs_otherwise: bool,
}

/// A footer that can be written again: all records of its segment are there.
#[derive(Clone, Debug)]
pub struct DamagedFooter {
    pub name: SegmentName,
    pub footer: Footer,
}

/// What index and log disagree about in a mailbox.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Difference {
    pub only_in_index: UidSet,
    pub only_in_log: UidSet,
    /// Messages that both have, with other flags, mod-sequences or places.
    pub changed: UidSet,
}

impl Difference {
    /// Every message that they disagree about.
    pub fn all(&self) -> UidSet {
        UidSet(&(&self.only_in_index.0 | &self.only_in_log.0) | &self.changed.0)
    }

    fn between(index: &MailboxIndex, rebuilt: &MailboxIndex) -> Self {
        let (have, should) = (index.uids().0, rebuilt.uids().0);
        let is_changed = |uid: &u32| {
            let uid = Uid(*uid);
            index.message(uid) != rebuilt.message(uid) || index.flags_of(uid) != rebuilt.flags_of(uid)
        };
        Self {
            only_in_index: UidSet(&have - &should),
            only_in_log: UidSet(&should - &have),
            changed: UidSet((&have & &should).iter().filter(is_changed).collect()),
        }
    }
}

/// Checks a shard that nobody has open. `progress` is told bytes of the log, done and in all.
///
/// # Errors
/// Storage that cannot be read at all. What is damaged is a finding, not an error.
pub async fn check_shard<S: Storage>(
    storage: &S,
    id: ShardId,
    store: u128,
    progress: impl Fn(u64, u64),
) -> Result<ShardCheck, EngineError> {
    let mut check = Check::<S> {
        id,
        wal: storage.wal(id),
        blobs: storage.blobs(id),
        report: ShardCheck::default(),
        unpacker: Unpacker::default(),
        lost_dictionaries: BTreeSet::new(),
        moved: BTreeMap::new(),
        names: BTreeMap::new(),
    };
    let Some((epoch, number, bytes)) = storage.manifests(id).latest().await? else {
        return Ok(check.report);
    };
    let manifest = match Manifest::from_bytes(&bytes) {
        Ok(manifest) if manifest.store == store && manifest.shard == id => manifest,
        Ok(manifest) => {
            let what = format!("manifest of store {:032x}, shard {}", manifest.store, manifest.shard);
            check.report.has_no_manifest = true;
            check.find(format!("manifest/{:08}-{number:020}", epoch.0), 0, what, Vec::new());
            return Ok(check.report);
        }
        Err(error) => {
            check.report.has_no_manifest = true;
            check.find(format!("manifest/{:08}-{number:020}", epoch.0), 0, error.to_string(), Vec::new());
            return Ok(check.report);
        }
    };
    check.run(&manifest, progress).await?;
    Ok(check.report)
}

struct Check<S: Storage> {
    id: ShardId,
    wal: S::Wal,
    blobs: S::Blobs,
    report: ShardCheck,
    unpacker: Unpacker,
    /// Ids of dictionaries that no segment has.
    lost_dictionaries: BTreeSet<u32>,
    /// The messages that records are of, by where these lie, where some lie twice.
    moved: BTreeMap<Place, MessageId>,
    /// The segments there are, and whether they are sealed.
    names: BTreeMap<SegmentId, (SegmentName, bool)>,
}

impl<S: Storage> Check<S> {
    fn find(&mut self, file: String, offset: u64, what: String, touches: Vec<(MailboxId, u32, u32)>) {
        let file = format!("{}/{file}", shard_directory(self.id));
        self.report.findings.push(Finding { shard: self.id, file, offset, what, touches });
    }

    async fn run(&mut self, manifest: &Manifest, progress: impl Fn(u64, u64)) -> Result<(), EngineError> {
        // The log alone.
        let segments = scan_log::<S>(&self.wal, &self.blobs, manifest, Position::default()).await?;
        let compacted = scan_compacted::<S>(&self.wal, &self.blobs, manifest).await?;
        let all = || segments.iter().chain(&compacted);
        let names: BTreeMap<SegmentId, (SegmentName, bool)> =
            all().map(|segment| (segment.name.segment, (segment.name, segment.sealed))).collect();
        self.names.clone_from(&names);
        let total: u64 =
            all().flat_map(|segment| &segment.batches).map(|batch| batch.end - batch.position.offset).sum();
        self.report.log_bytes = total;
        progress(0, total);
        let is_damaged = |segment: &&FoundSegment| segment.header.is_err() || !segment.dictionary_errors.is_empty();
        let damaged_headers: Vec<SegmentId> = all().filter(is_damaged).map(|segment| segment.name.segment).collect();
        let proven = manifest.replay_from.max(manifest.log_end);
        let mut verdict = judge(self.id, segments, proven, None, Position::default());
        judge_compacted(self.id, compacted, &mut verdict);
        self.report.damaged_segments.extend(damaged_headers);
        self.report.torn_tail = verdict.torn.map(|(_, what)| what);
        self.report.findings.extend(verdict.damage);
        let batches = verdict.batches;
        let mut ordinals: BTreeMap<SegmentId, Vec<u64>> = BTreeMap::new();
        for batch in &batches {
            let offsets = ordinals.entry(batch.position.segment).or_default();
            offsets.extend(batch.records.iter().map(|record| record.offset));
        }
        // Frames are read in the order of the log, and so are the dictionaries that they name.
        let broken = self.check_frames(&batches, &names, total, &progress).await?;
        let damaged: BTreeSet<SegmentId> =
            batches.iter().filter(|batch| !batch.is_good()).map(|batch| batch.position.segment).collect();
        self.report.has_lost_records =
            batches.iter().any(|batch| !batch.is_good() || batch.lost_unnamed) || !verdict.quarantined.is_empty();
        self.report.damaged_segments.extend(&damaged);
        self.report.damaged_segments.extend(broken.keys().map(|(segment, _)| *segment));
        self.check_footers(&batches, &names, &damaged, manifest).await?;
        if batches.iter().any(|batch| batch.position.segment.is_compacted()) {
            for batch in &batches {
                for found in &batch.records {
                    if let Some(Record::Message(head)) = &found.record {
                        self.moved.insert((batch.position.segment, found.offset), head.id);
                    }
                }
            }
        }
        // Without an index the whole log is its tail.
        let is_all = manifest.replay_from == Position::default();
        let is_of_tail = |batch: &&FoundBatch| {
            is_all || (!batch.position.segment.is_compacted() && batch.position >= manifest.replay_from)
        };
        let tail: Vec<FoundBatch> = batches.iter().filter(is_of_tail).cloned().collect();
        let mut from_log = State { shard: self.id, ..State::default() };
        self.report.records = replay(&mut from_log, batches, &ordinals);
        let directory = shard_directory(self.id);
        let dropped =
            dropped_transactions(&mut from_log, self.id, |segment| format!("{directory}/{}", self.file_of(segment)));
        self.report.has_lost_records |= !dropped.is_empty();
        self.report.findings.extend(dropped);
        for (mailbox, slot) in from_log.slots.iter() {
            self.report.mailboxes.insert(mailbox, (slot.meta.account, slot.meta.name.clone()));
        }
        for (account, (_, record)) in &from_log.directory {
            self.report.accounts.insert(*account, record.name.clone());
        }

        // The index, and the tail on top of it.
        let mut from_index = State { shard: self.id, ..State::default() };
        if let Err((entry, error)) = restore_index::<S>(&self.blobs, &manifest.indexes, &mut from_index).await? {
            let file = format!("idx/{}", index_file(entry.blob, entry.epoch));
            self.report.has_damaged_directory = true;
            self.find(file, entry.directory_offset, format!("{error}; a start rebuilds the index"), Vec::new());
            return self.check_placements(&mut from_log, &ordinals, &broken);
        }
        replay(&mut from_index, tail, &ordinals);
        self.compare(&from_log, &from_index, &damaged).await?;
        self.check_placements(&mut from_log, &ordinals, &broken)
    }

    /// Verifies the frames of every message and block; returns the places of those that are damaged.
    async fn check_frames(
        &mut self,
        batches: &[FoundBatch],
        names: &BTreeMap<SegmentId, (SegmentName, bool)>,
        total: u64,
        progress: &impl Fn(u64, u64),
    ) -> Result<BTreeMap<Place, Broken>, EngineError> {
        let mut broken = BTreeMap::new();
        let mut done = 0;
        for batch in batches {
            for record in &batch.records {
                if !matches!(record.header.kind, kind::MESSAGE | kind::BLOCK) {
                    continue;
                }
                let segment = batch.position.segment;
                let Some(&(name, sealed)) = names.get(&segment) else { continue };
                let bytes = self.read(name, sealed, record.offset, record.len as usize).await?;
                let result = match record.header.kind {
                    kind::MESSAGE => self.check_message(&bytes, segment, names).await?,
                    _ => self.check_block(&bytes, segment).await?,
                };
                if let Err(error) = result {
                    broken.insert((segment, record.offset), error.into());
                }
            }
            done += batch.end - batch.position.offset;
            progress(done, total);
        }
        Ok(broken)
    }

    async fn read(&self, name: SegmentName, sealed: bool, offset: u64, len: usize) -> Result<Vec<u8>, EngineError> {
        Ok(if sealed {
            self.blobs.get(BlobName::Segment(name), offset, len).await?
        } else {
            self.wal.read(name, offset, len).await?
        })
    }

    /// Sees to it that the unpacker knows the dictionaries that frames of a segment name, from this segment or another.
    async fn have_dictionaries(&mut self, segment: SegmentId, frames: &[FrameInfo]) -> Result<(), EngineError> {
        let unknown = |info: &FrameInfo| info.needs_dictionary().is_some_and(|id| !self.unpacker.knows_dictionary(id));
        let missing: BTreeSet<u32> = frames.iter().filter(|info| unknown(info)).map(|info| info.dictionary).collect();
        if missing.is_subset(&self.lost_dictionaries) {
            return Ok(());
        }
        let mut segments: Vec<(SegmentId, (SegmentName, bool))> =
            self.names.iter().map(|(id, name)| (*id, *name)).collect();
        segments.sort_by_key(|(id, _)| id.0.abs_diff(segment.0));
        for (_, (name, sealed)) in segments {
            let first = self.read_if_there(name, sealed, 0, BLOCK_BYTES as usize).await?;
            let Ok(len) = SegmentHeader::length(&first) else { continue };
            let header = self.read_if_there(name, sealed, 0, len).await?;
            if let Ok((header, _)) = SegmentHeader::decode_some(&header) {
                header.dictionaries.into_iter().for_each(|dictionary| self.unpacker.add_dictionary(dictionary));
            }
            if missing.iter().all(|&id| self.unpacker.knows_dictionary(id)) {
                return Ok(());
            }
        }
        self.lost_dictionaries.extend(missing.iter().filter(|&&id| !self.unpacker.knows_dictionary(id)));
        Ok(())
    }

    async fn read_if_there(
        &self,
        name: SegmentName,
        sealed: bool,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, EngineError> {
        match self.read(name, sealed, offset, len).await {
            Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => Ok(Vec::new()),
            bytes => bytes,
        }
    }

    async fn check_block(&mut self, record: &[u8], segment: SegmentId) -> Result<Result<(), FormatError>, EngineError> {
        Ok(match block_frame(record) {
            Ok((info, stored)) => {
                self.have_dictionaries(segment, &[info]).await?;
                verify_block(&info, stored, &mut self.unpacker, &mut Vec::new())
            }
            Err(error) => Err(error),
        })
    }

    /// Unpacks a whole message and compares it with the checksum of what was received.
    async fn check_message(
        &mut self,
        record: &[u8],
        segment: SegmentId,
        names: &BTreeMap<SegmentId, (SegmentName, bool)>,
    ) -> Result<Result<(), FormatError>, EngineError> {
        let reader = match open_message(record) {
            Ok(reader) => reader,
            Err(error) => return Ok(Err(error)),
        };
        self.have_dictionaries(segment, &reader.head.frames().map(|(_, info)| info)).await?;
        let mut received = match Received::of_frames(&reader, &mut self.unpacker) {
            Ok(received) => received,
            Err(error) => return Ok(Err(error)),
        };
        for block in &reader.head.blocks {
            let Location { segment, len, .. } = block.location;
            let Some(&(name, sealed)) = names.get(&segment) else { return Ok(Err(missing_block(segment))) };
            // The unpacking of nothing says what is wrong.
            let bytes = self.read_if_there(name, sealed, block.location.offset(), len as usize).await?;
            if let Ok((info, _)) = open_block(&bytes, block.lsn) {
                self.have_dictionaries(segment, &[info]).await?;
            }
            let added = received.add_block(block, &bytes, &mut self.unpacker);
            if added.is_err() {
                return Ok(added);
            }
        }
        Ok(received.compare(&reader.head))
    }

    /// Compares the footers of sealed segments with the records that are there.
    async fn check_footers(
        &mut self,
        batches: &[FoundBatch],
        names: &BTreeMap<SegmentId, (SegmentName, bool)>,
        damaged: &BTreeSet<SegmentId>,
        manifest: &Manifest,
    ) -> Result<(), EngineError> {
        let mut found: BTreeMap<SegmentId, Vec<Place>> = BTreeMap::new();
        for batch in batches {
            let segment = batch.position.segment;
            let records = batch.records.iter().map(|record| (segment, record.offset));
            found.entry(segment).or_default().extend(records);
        }
        let mut unfit = Vec::new();
        for (segment, (name, _)) in names.iter().filter(|(_, (_, sealed))| *sealed) {
            let file = format!("seg/{}", segment_file(*name));
            let (suffix, len) = match self.blobs.get_suffix(BlobName::Segment(*name), TRAILER_BYTES).await {
                // The segment is gone, which has been found already.
                Err(StorageError::NotFound(_)) => continue,
                suffix => suffix?,
            };
            let trailer = match Trailer::decode(&suffix, len) {
                Ok(trailer) => trailer,
                Err(error) => {
                    unfit.push((*name, None));
                    self.find(file, len.saturating_sub(TRAILER_BYTES as u64), error.to_string(), Vec::new());
                    continue;
                }
            };
            let table = trailer.table_bytes() as usize;
            let bytes = self.blobs.get(BlobName::Segment(*name), trailer.data_end, table).await?;
            match Footer::decode(&trailer, &bytes) {
                Err(error) => {
                    unfit.push((*name, Some(trailer.data_end)));
                    self.find(file, trailer.data_end, error.to_string(), Vec::new());
                }
                Ok(footer) => {
                    let listed: Vec<Place> =
                        footer.entries.iter().map(|entry| (*segment, u64::from(entry.offset_units) * 8)).collect();
                    // A damaged batch has been found already; its records are in the table and not in the log.
                    let there = found.get(segment).map(Vec::as_slice).unwrap_or_default();
                    if listed != there && !damaged.contains(segment) {
                        let what = format!("the footer lists {} records, the log has {}", listed.len(), there.len());
                        unfit.push((*name, Some(trailer.data_end)));
                        self.find(file, trailer.data_end, what, Vec::new());
                    }
                }
            }
        }
        // Where nothing says where the batches end, or some of them are damaged, nobody knows what to write.
        for (name, of_trailer) in unfit.into_iter().filter(|(name, _)| !damaged.contains(&name.segment)) {
            let is_it = |entry: &&SegmentEntry| (entry.segment, entry.epoch) == (name.segment, name.epoch);
            let of_manifest = manifest.segments.iter().find(is_it).map(|entry| entry.data_end);
            let Some(data_end) = of_manifest.or(of_trailer) else { continue };
            let of_segment = batches.iter().filter(|batch| batch.position.segment == name.segment);
            if of_segment.clone().next_back().map(|batch| batch.end) != Some(data_end) {
                continue;
            }
            let entries = of_segment.flat_map(|batch| batch.records.iter().map(footer_entry)).collect();
            self.report.damaged_footers.push(DamagedFooter { name, footer: Footer { data_end, entries } });
        }
        Ok(())
    }

    /// Compares mailboxes, names and accounts of the index with those that the log alone gives. Records of a damaged
    /// segment cannot be counted, so their numbers in it are left out.
    async fn compare(
        &mut self,
        from_log: &State,
        from_index: &State,
        damaged: &BTreeSet<SegmentId>,
    ) -> Result<(), EngineError> {
        let uncount = |index: &mut MailboxIndex| {
            if damaged.is_empty() {
                return;
            }
            let uncounted = index.messages.iter().map(|mut message| {
                if damaged.contains(&message.location.segment) {
                    message.location.ordinal = 0;
                }
                message
            });
            index.messages = uncounted.collect();
        };
        let mut differences = Vec::new();
        for (mailbox, slot) in from_log.slots.iter() {
            let Some(indexed) = from_index.slots.get(&mailbox) else {
                let only_in_log = MailboxIndex::of_changes(&slot.delta).uids();
                let what = "the index does not have this mailbox".to_owned();
                self.differ(mailbox, what, Difference { only_in_log, ..Difference::default() });
                continue;
            };
            let mut meta = indexed.meta.clone();
            meta.as_of = slot.meta.as_of;
            if meta != slot.meta {
                differences.push((mailbox, differing_counters(&meta, &slot.meta)));
            }
            let mut rebuilt = MailboxIndex::of_changes(&slot.delta);
            match self.open_index(mailbox, indexed.pages()).await? {
                Err((page, error)) => {
                    let file = format!("idx/{}", index_file(page.blob, Epoch(page.epoch)));
                    let what = format!("{error}; a rebuild mends it");
                    self.report.damaged_pages.push(mailbox);
                    self.find(file, page.offset, what, vec![(mailbox, 0, 0)]);
                }
                Ok(mut index) => {
                    for (_, change) in &indexed.delta {
                        index.apply(change);
                    }
                    index.forget_stray_flags();
                    self.take_either_copy(&mut index, &rebuilt);
                    uncount(&mut index);
                    uncount(&mut rebuilt);
                    if index != rebuilt {
                        self.differ(mailbox, difference(&index, &rebuilt), Difference::between(&index, &rebuilt));
                    }
                }
            }
        }
        for (mailbox, slot) in from_index.slots.iter().filter(|(mailbox, _)| !from_log.slots.contains_key(mailbox)) {
            self.report.mailboxes.insert(mailbox, (slot.meta.account, slot.meta.name.clone()));
            let mut index = self.open_index(mailbox, slot.pages()).await?.unwrap_or_default();
            slot.delta.iter().for_each(|(_, change)| index.apply(change));
            let what = "the log does not have this mailbox".to_owned();
            self.differ(mailbox, what, Difference { only_in_index: index.uids(), ..Difference::default() });
        }
        for (account, state) in from_log.accounts.iter() {
            let indexed = from_index.accounts.get(&account);
            if indexed.is_none_or(|indexed| {
                indexed.mailboxes != state.mailboxes
                    || indexed.subscriptions != state.subscriptions
                    || indexed.attributes != state.attributes
                    || indexed.uid_validity_next != state.uid_validity_next
            }) {
                let what = format!("account {account}: the index has other names or subscriptions than the log gives");
                differences.push((MailboxId(0), what));
            }
        }
        if from_index.directory != from_log.directory {
            differences.push((MailboxId(0), "the index has other account records than the log gives".to_owned()));
        }
        self.report.differs_otherwise = !differences.is_empty();
        for (mailbox, what) in differences {
            let touches = if mailbox == MailboxId(0) { Vec::new() } else { vec![(mailbox, 0, 0)] };
            self.find("idx".to_owned(), 0, what, touches);
        }
        Ok(())
    }

    /// Notes that index and log disagree about a mailbox, and about which messages.
    fn differ(&mut self, mailbox: MailboxId, what: String, difference: Difference) {
        let mut touches: Vec<(MailboxId, u32, u32)> =
            difference.all().runs().into_iter().map(|(first, last)| (mailbox, first, last)).collect();
        if touches.is_empty() {
            touches.push((mailbox, 0, 0));
        }
        self.report.differences.insert(mailbox, difference);
        self.find("idx".to_owned(), 0, what, touches);
    }

    /// Where a record lies twice, because compaction did not come to its end, the index may name either.
    fn take_either_copy(&self, index: &mut MailboxIndex, rebuilt: &MailboxIndex) {
        let mut moved = Vec::new();
        for message in index.messages.iter() {
            let Some(other) = rebuilt.message(message.uid).filter(|other| other.location != message.location) else {
                continue;
            };
            let Location { segment, offset_units, .. } = message.location;
            if self.moved.get(&(segment, message.location.offset())) == Some(&other.id) {
                let (to, head_bytes) = (other.location, other.head_bytes);
                moved.push(Moved { uid: message.uid, from: segment, from_units: offset_units, to, head_bytes });
            }
        }
        index.messages.relocate(&moved);
    }

    async fn open_index(
        &mut self,
        mailbox: MailboxId,
        (page, delta): (PageLocation, PageLocation),
    ) -> Result<Result<MailboxIndex, (PageLocation, FormatError)>, EngineError> {
        let mut index = MailboxIndex::default();
        for (location, page_kind) in [(page, PageKind::Mailbox), (delta, PageKind::MailboxDelta)] {
            if location.is_none() {
                continue;
            }
            let name = BlobName::Index { blob: location.blob, epoch: Epoch(location.epoch) };
            let bytes = match self.blobs.get(name, location.offset, location.len as usize).await {
                Ok(bytes) => bytes,
                Err(StorageError::NotFound(_)) => Vec::new(),
                Err(error) => return Err(error.into()),
            };
            let opened = open_page(page_kind, mailbox.0, &bytes, &mut self.unpacker);
            let applied = opened.and_then(|(header, archive)| match page_kind {
                PageKind::Mailbox => {
                    index = MailboxIndex::from_page(&header, &archive)?;
                    Ok(())
                }
                _ => {
                    for change in restore::<DeltaPage>(&archive)?.changes {
                        let change = Change::decode(&change.payload)
                            .map_err(|source| FormatError::Decode { what: "delta page", source })?;
                        index.apply(&change);
                    }
                    Ok(())
                }
            });
            if let Err(error) = applied {
                return Ok(Err((location, error)));
            }
        }
        Ok(Ok(index))
    }

    /// Follows every placement to its record.
    fn check_placements(
        &mut self,
        from_log: &mut State,
        ordinals: &BTreeMap<SegmentId, Vec<u64>>,
        broken: &BTreeMap<Place, Broken>,
    ) -> Result<(), EngineError> {
        let mut concerned = Concerned::new(broken);
        for (mailbox, slot) in from_log.slots.iter() {
            let index = MailboxIndex::of_changes(&slot.delta);
            for message in index.messages.iter() {
                self.report.messages += 1;
                concerned.look_at(mailbox, &message, |(segment, offset)| {
                    ordinals.get(&segment).is_some_and(|offsets| offsets.binary_search(&offset).is_ok())
                });
            }
        }
        let directory = shard_directory(self.id);
        let findings = concerned.findings(self.id, |segment| format!("{directory}/{}", self.file_of(segment)));
        add_findings(&mut self.report.findings, findings);
        Ok(())
    }

    fn file_of(&self, segment: SegmentId) -> String {
        match self.names.get(&segment) {
            Some((name, true)) => format!("seg/{}", segment_file(*name)),
            Some((name, false)) => format!("wal/{}", segment_file(*name)),
            None => format!("seg/{:010}-*", segment.0),
        }
    }
}

/// How two indexes of a mailbox differ, in words.
/// What index and log say differently of a mailbox as a whole.
fn differing_counters(index: &Meta, log: &Meta) -> String {
    let named = |meta: &Meta| {
        [
            ("messages", u64::from(meta.exists)),
            ("unseen", meta.unseen.into()),
            ("octets", meta.size),
            ("UIDVALIDITY", meta.uid_validity.into()),
            ("UIDNEXT", meta.uid_next.into()),
            ("HIGHESTMODSEQ", meta.highest_modseq),
            ("first recent UID", meta.recent_below.into()),
            ("special use", meta.special_use.into()),
        ]
    };
    let both = named(index).into_iter().zip(named(log)).filter(|(index, log)| index != log);
    let mut parts: Vec<String> =
        both.map(|((name, index), (_, log))| format!("{name} {index} by the index, {log} by the log")).collect();
    if (&index.name, index.account) != (&log.name, log.account) {
        parts.push(format!("the name {:?} by the index, {:?} by the log", index.name, log.name));
    }
    parts.join("; ")
}

fn difference(index: &MailboxIndex, rebuilt: &MailboxIndex) -> String {
    let (have, should) = (index.uids(), rebuilt.uids());
    if have != should {
        let missing = &should.0 - &have.0;
        let extra = &have.0 - &should.0;
        return format!("the index lacks {} messages of the log and has {} others", missing.len(), extra.len());
    }
    let differing = rebuilt.messages.iter().find(|message| {
        index.message(message.uid) != Some(*message) || index.flags_of(message.uid) != rebuilt.flags_of(message.uid)
    });
    match differing {
        Some(message) => format!("the index and the log disagree about UID {}", message.uid),
        None => "the index and the log disagree about keywords or expunge history".to_owned(),
    }
}
