//! Putting a mailbox's index together from the log alone, when its pages cannot be read.

use std::collections::BTreeSet;

use crate::error::EngineError;
use crate::format::record::{FOLDED, Record, RecordHeader};
use crate::ids::{Location, Lsn, MailboxId, MessageId};
use crate::index::MailboxIndex;
use crate::recovery::{FoundSegment, SegmentSource, replay_key, scan_segment};
use crate::shard::Shard;
use crate::slots::{Meta, Slot};
use crate::state::{Relocated, State};
use crate::storage::{SegmentName, Storage, StorageError};

impl<S: Storage> Shard<S> {
    /// The index of a mailbox with every change up to `as_of`, which a checkpoint has made its page of. Reads the whole
    /// log, a segment at a time, and lets other tasks run in between. What the log has lost to damage is missing.
    ///
    /// # Errors
    /// Storage that fails.
    pub(crate) async fn rebuild_index(&self, mailbox: MailboxId, as_of: Lsn) -> Result<MailboxIndex, EngineError> {
        let inner = &self.0;
        let mut state = State { shard: inner.id, ..State::default() };
        let meta = Meta { mailbox, ..Meta::default() };
        state.slots.insert(mailbox, Slot::new(meta));
        let mut found = Vec::new();
        let segments = self.segments_now().await;
        self.visit(&segments, |segment| take_in(&mut found, mailbox, as_of, segment)).await?;
        let copies: BTreeSet<MessageId> = found.iter().flat_map(|(_, record, _)| copies_of(record)).collect();
        if !copies.is_empty() {
            // Their records may have been moved since they were copied.
            state.segments.extend(segments.iter().map(|(name, ..)| name.segment));
            let compacted: Vec<_> = segments.into_iter().filter(|(name, ..)| name.segment.is_compacted()).collect();
            self.visit(&compacted, |segment| find_moved(&mut state, &copies, segment)).await?;
        }
        found.sort_by_key(|(header, record, _)| replay_key(header, record));
        for (header, record, location) in found {
            if header.flags & FOLDED != 0 {
                state.apply_folded(header.lsn, record, location);
            } else {
                state.apply(header.lsn, header.transaction, record, location);
            }
        }
        let mut delta = state.slots.remove(&mailbox).map(|slot| slot.delta).unwrap_or_default();
        delta.retain(|(lsn, _)| *lsn <= as_of);
        Ok(MailboxIndex::of_changes(&delta))
    }

    /// Scans segments one after another.
    async fn visit(
        &self,
        segments: &[(SegmentName, bool, u64)],
        mut visit: impl FnMut(FoundSegment),
    ) -> Result<(), EngineError> {
        let inner = &self.0;
        for &(name, sealed, data_end) in segments {
            let source = SegmentSource::<S>::new(&inner.wal, &inner.blobs, name, sealed).pausing(&inner.storage);
            match scan_segment(&source, 0, data_end).await {
                // What it had is lost to all.
                Err(StorageError::NotFound(_)) => {}
                segment => visit(segment?),
            }
            inner.storage.yield_now().await;
        }
        Ok(())
    }

    /// The segments of the log with the ends of their data, in order.
    async fn segments_now(&self) -> Vec<(SegmentName, bool, u64)> {
        let inner = &self.0;
        loop {
            {
                let log = inner.log.borrow();
                let mut segments: Vec<_> = log
                    .manifest
                    .segments
                    .iter()
                    .filter(|entry| !entry.is_retired())
                    .map(|entry| (SegmentName { segment: entry.segment, epoch: entry.epoch }, true, entry.data_end))
                    .collect();
                if let Some(active) = &log.active {
                    segments.push((active.name, false, log.position.offset));
                    return segments;
                }
                let is_listed = log.manifest.segments.iter().any(|entry| entry.segment == log.position.segment);
                // A fresh log has not begun its first segment.
                if is_listed || log.position.offset == 0 {
                    return segments;
                }
                if log.poisoned.is_some() {
                    // Sealing it has failed; it can be read all the same.
                    let name = SegmentName { segment: log.position.segment, epoch: inner.epoch };
                    segments.push((name, false, log.position.offset));
                    return segments;
                }
            }
            // It is being sealed right now.
            inner.storage.yield_now().await;
        }
    }
}

/// Collects what a segment has of a mailbox.
fn take_in(found: &mut Vec<(RecordHeader, Record, Location)>, mailbox: MailboxId, as_of: Lsn, segment: FoundSegment) {
    visit_records(segment, |header, record, location| {
        // Records of a transaction count together: all of them are needed to know whether it is whole.
        let mut counts = matches!(record, Record::Commit(_)) || header.transaction != 0;
        // A base record is newer than what it tells of, all of which is in the page.
        let is_in_time = matches!(record, Record::Base(_)) || header.lsn <= as_of;
        record.touches(&mut |touched, _, _| counts |= touched == mailbox && is_in_time);
        if counts {
            found.push((header, record, location));
        }
    });
}

/// Notes where message records lie that compaction has moved.
fn find_moved(state: &mut State, wanted: &BTreeSet<MessageId>, segment: FoundSegment) {
    visit_records(segment, |header, record, location| {
        let Record::Message(head) = record else { return };
        if wanted.contains(&head.id) {
            let relocated = Relocated::new(header.generation, location, &head);
            state.relocated.entry(head.id).or_default().push(relocated);
        }
    });
}

/// The messages that a record places by reference.
fn copies_of(record: &Record) -> Vec<MessageId> {
    match record {
        Record::Placements(placements) => placements.items.iter().map(|item| item.message).collect(),
        Record::Base(base) => base.placed.iter().map(|(_, item)| item.message).collect(),
        _ => Vec::new(),
    }
}

fn visit_records(segment: FoundSegment, mut visit: impl FnMut(RecordHeader, Record, Location)) {
    let id = segment.name.segment;
    let records = segment.batches.into_iter().flat_map(|batch| batch.records);
    for (ordinal, found) in records.enumerate() {
        let Some(record) = found.record else { continue };
        let location =
            Location { segment: id, offset_units: (found.offset / 8) as u32, len: found.len, ordinal: ordinal as u32 };
        visit(found.header, record, location);
    }
}
