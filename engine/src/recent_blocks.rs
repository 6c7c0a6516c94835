//! Contents that were written to the active segment shortly before, so that the next message that has one names it.
//!
//! Only what is in memory is compared, byte by byte: a delivery reads nothing. Only the active segment counts: it is not
//! compacted, nor is it later as long as a delivery is under way that began while it was active.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use crate::format::frame::FrameInfo;
use crate::ids::{Location, Lsn};

/// What a shard keeps of stored contents, with what each takes besides.
const BYTES_MAX: usize = 4 << 20;
/// What a content takes besides, about: its lines in two tables, and its place.
const OVERHEAD_BYTES: usize = 256;
/// Smaller ones are soon written again.
const STORED_BYTES_MIN: usize = 4 << 10;

/// Where a record lies; unknown until its batch is committed, and for good if that fails.
pub(crate) type RecordPlace = Rc<Cell<Option<Location>>>;

/// What tells frames apart quickly: their checksum and their length.
type Key = (u32, u32);

struct Recent {
    info: FrameInfo,
    stored: Arc<[u8]>,
    lsn: Lsn,
    place: RecordPlace,
}

/// The contents of one shard, the oldest first to go.
#[derive(Default)]
pub(crate) struct RecentBlocks {
    blocks: BTreeMap<Key, Recent>,
    order: VecDeque<Key>,
    bytes: usize,
}

impl RecentBlocks {
    /// The record that has the very same frame.
    pub(crate) fn find(&self, info: &FrameInfo, stored: &[u8]) -> Option<(Lsn, RecordPlace)> {
        let recent = self.blocks.get(&(info.checksum, info.stored_len))?;
        let is_same = recent.info == *info && *recent.stored == *stored;
        is_same.then(|| (recent.lsn, Rc::clone(&recent.place)))
    }

    pub(crate) fn keep(&mut self, info: FrameInfo, stored: &Arc<[u8]>, lsn: Lsn, place: &RecordPlace) {
        if stored.len() < STORED_BYTES_MIN {
            return;
        }
        let key = (info.checksum, info.stored_len);
        let recent = Recent { info, stored: Arc::clone(stored), lsn, place: Rc::clone(place) };
        match self.blocks.insert(key, recent) {
            // As long as the new one, by its key.
            Some(_) => {}
            None => {
                self.order.push_back(key);
                self.bytes += stored.len() + OVERHEAD_BYTES;
            }
        }
        while self.bytes > BYTES_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.blocks.remove(&oldest).map_or(0, |oldest| oldest.stored.len() + OVERHEAD_BYTES);
        }
    }

    /// Forgets all of them: another segment is to be the active one, or what was written may not be there.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::checksum;
    use crate::ids::Epoch;

    fn frame(number: u8, octets: usize) -> (FrameInfo, Arc<[u8]>) {
        let stored: Arc<[u8]> = vec![number; octets].into();
        let len = octets as u32;
        (FrameInfo { stored_len: len, raw_len: len, checksum: checksum(&stored), ..FrameInfo::NONE }, stored)
    }

    #[test]
    fn the_same_bytes_are_found_and_nothing_else_is() {
        let (mut recent, place) = (RecentBlocks::default(), RecordPlace::default());
        let ((info, stored), lsn) = (frame(1, 4096), Lsn::new(Epoch(1), 7));
        recent.keep(info, &stored, lsn, &place);
        place.set(Some(Location::default()));
        let (found, found_place) = recent.find(&info, &stored).expect("it was kept");
        assert_eq!((found, found_place.get()), (lsn, Some(Location::default())));
        // Other bytes of the same checksum, and another meaning of the same bytes.
        assert!(recent.find(&info, &[2; 4096]).is_none());
        assert!(recent.find(&FrameInfo { codec: 1, ..info }, &stored).is_none());
        recent.clear();
        assert!(recent.find(&info, &stored).is_none());
    }

    #[test]
    fn the_oldest_go_where_there_is_no_room() {
        let mut recent = RecentBlocks::default();
        let frames: Vec<_> = (0..40).map(|number| frame(number, 200 << 10)).collect();
        for (info, stored) in frames.iter().chain(&frames[39..]) {
            recent.keep(*info, stored, Lsn::default(), &RecordPlace::default());
            assert!(recent.bytes <= BYTES_MAX);
        }
        let known: Vec<bool> = frames.iter().map(|(info, stored)| recent.find(info, stored).is_some()).collect();
        assert_eq!(known.iter().filter(|&&known| known).count(), BYTES_MAX / (200 << 10));
        assert!(known[39] && !known[0] && known.is_sorted());
    }

    #[test]
    fn small_contents_are_not_kept() {
        let mut recent = RecentBlocks::default();
        let (info, stored) = frame(1, STORED_BYTES_MIN - 1);
        recent.keep(info, &stored, Lsn::default(), &RecordPlace::default());
        assert!(recent.find(&info, &stored).is_none());
        assert_eq!(recent.bytes, 0);
    }
}
