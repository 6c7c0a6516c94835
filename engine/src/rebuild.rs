//! Putting a mailbox's index together from the log alone, when its pages cannot be read.

use crate::error::EngineError;
use crate::format::record::Record;
use crate::ids::{Location, Lsn, MailboxId, SegmentId};
use crate::index::MailboxIndex;
use crate::recovery::{FoundSegment, SegmentSource, scan_segment};
use crate::shard::Shard;
use crate::state::{Meta, Slot, State};
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
        state.slots.insert(mailbox, Slot { meta, ..Slot::default() });
        for (name, sealed, data_end) in self.segments_now().await {
            let source = SegmentSource::<S>::new(&inner.wal, &inner.blobs, name, sealed).pausing(&inner.storage);
            match scan_segment(&source, 0, data_end).await {
                // What it had is lost to all.
                Err(StorageError::NotFound(_)) => {}
                segment => take_in(&mut state, mailbox, as_of, segment?),
            }
            inner.storage.yield_now().await;
        }
        let mut index = MailboxIndex::default();
        if let Some(slot) = state.slots.remove(&mailbox) {
            slot.delta.iter().filter(|(lsn, _)| *lsn <= as_of).for_each(|(_, change)| index.apply(change));
        }
        Ok(index)
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
                    .map(|entry| (SegmentName { segment: entry.segment, epoch: entry.epoch }, true, entry.data_end))
                    .collect();
                if let Some(active) = &log.active {
                    segments.push((active.name, false, log.position.offset));
                    return segments;
                }
                let is_listed = segments.last().is_some_and(|(name, ..)| name.segment == log.position.segment);
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

/// Takes in what a segment has of a mailbox, in the order of the log.
fn take_in(state: &mut State, mailbox: MailboxId, as_of: Lsn, segment: FoundSegment) {
    let id: SegmentId = segment.name.segment;
    let records = segment.batches.into_iter().flat_map(|batch| batch.records);
    for (ordinal, found) in records.enumerate() {
        let Some(record) = found.record else { continue };
        // Records of a transaction count together: all of them are needed to know whether it is whole.
        let mut counts = matches!(record, Record::Commit(_)) || found.header.transaction != 0;
        record.touches(&mut |touched, _, _| counts |= touched == mailbox && found.header.lsn <= as_of);
        if !counts {
            continue;
        }
        let location =
            Location { segment: id, offset_units: (found.offset / 8) as u32, len: found.len, ordinal: ordinal as u32 };
        state.apply(found.header.lsn, found.header.transaction, record, location);
    }
}
