//! The manifest of a shard: which segments and index blobs make it up, from where its log must be replayed, and how far
//! recovery found it to reach. A manifest is a file of its own, written once, named by epoch and number.

use super::codec::{Input, Wire, wire_struct};
use super::{FORMAT_VERSION, FormatError, checksum, verify_checksum};
use crate::ids::{Epoch, Lsn, Position, SegmentId, ShardId};

const MAGIC: [u8; 8] = *b"PHMANIF1";
const HEADER_BYTES: usize = 24;

/// A segment that belongs to the shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentEntry {
    pub segment: SegmentId,
    pub epoch: Epoch,
    pub generation: u32,
    /// Sealed segments only: where their batches end.
    pub data_end: u64,
    pub records: u32,
}

impl SegmentEntry {
    /// The generation of a segment that compaction has taken out of the log: it stays on the list as long as the epoch that
    /// wrote it, so that it is not missed.
    const RETIRED: u32 = u32::MAX;

    pub fn retired(&self) -> Self {
        Self { generation: Self::RETIRED, data_end: 0, records: 0, ..*self }
    }

    pub fn is_retired(&self) -> bool {
        self.generation == Self::RETIRED
    }
}
wire_struct!(SegmentEntry { segment: SegmentId, epoch: Epoch, generation: u32, data_end: u64, records: u32 });

/// An index blob: pages of mailboxes, and a directory of them at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    pub blob: u32,
    pub epoch: Epoch,
    /// Where the directory lies.
    pub directory_offset: u64,
    pub directory_len: u64,
    /// A full directory replaces those of all blobs before it.
    pub full: bool,
}
wire_struct!(IndexEntry { blob: u32, epoch: Epoch, directory_offset: u64, directory_len: u64, full: bool });

/// Bytes of the log that are damaged: known, named, and passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantine {
    pub from: Position,
    pub len: u64,
}
wire_struct!(Quarantine { from: Position, len: u64 });

/// What keeps old data alive: backups, undelete, legal hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    pub name: String,
    pub until_ms: u64,
    pub as_of: Lsn,
}
wire_struct!(Pin { name: String, until_ms: u64, as_of: Lsn });

/// The state of a shard's files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    pub store: u128,
    pub shard: ShardId,
    pub epoch: Epoch,
    /// Ascends by one within an epoch.
    pub number: u64,
    /// The first segment of this epoch; its log segments are dense from here.
    pub first_segment: SegmentId,
    /// Replay begins here: older changes are in the index.
    pub replay_from: Position,
    /// The sequence of the batch at `replay_from`.
    pub replay_sequence: u64,
    /// Where recovery found the log of the epochs before to end: its verdict. Nothing at or after it in older segments
    /// counts, whatever may be read there later.
    pub log_end: Position,
    /// All changes up to here are in the index.
    pub as_of: Lsn,
    /// In the order of their segments.
    pub segments: Vec<SegmentEntry>,
    /// In the order of their blobs; later directory entries win.
    pub indexes: Vec<IndexEntry>,
    pub quarantined: Vec<Quarantine>,
    pub pins: Vec<Pin>,
}
wire_struct!(Manifest {
    store: u128,
    shard: ShardId,
    epoch: Epoch,
    number: u64,
    first_segment: SegmentId,
    replay_from: Position,
    replay_sequence: u64,
    log_end: Position,
    as_of: Lsn,
    segments: Vec<SegmentEntry>,
    indexes: Vec<IndexEntry>,
    quarantined: Vec<Quarantine>,
    pins: Vec<Pin>,
});

impl Manifest {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        FORMAT_VERSION.put(&mut out);
        0_u32.put(&mut out);
        0_u64.put(&mut out);
        self.put(&mut out);
        let len = (out.len() - HEADER_BYTES) as u64;
        out[16..24].copy_from_slice(&len.to_le_bytes());
        let crc = checksum(&out[16..]);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "manifest";
        let header = bytes.get(..HEADER_BYTES).ok_or(FormatError::Short {
            what: WHAT,
            needed: HEADER_BYTES as u64,
            available: bytes.len() as u64,
        })?;
        if header[..8] != MAGIC {
            return Err(FormatError::Magic(WHAT));
        }
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = Input(&header[8..]);
        let version = u32::take(&mut input).map_err(decode)?;
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { what: WHAT, found: version });
        }
        let expected = u32::take(&mut input).map_err(decode)?;
        let len = u64::take(&mut input).map_err(decode)?;
        let needed = len.saturating_add(HEADER_BYTES as u64);
        if bytes.len() as u64 != needed {
            return Err(FormatError::Short { what: WHAT, needed, available: bytes.len() as u64 });
        }
        verify_checksum(WHAT, expected, &bytes[16..])?;
        Self::decode(&bytes[HEADER_BYTES..]).map_err(decode)
    }

    /// The quarantined range that covers a position, if any.
    pub fn quarantine_at(&self, position: Position) -> Option<&Quarantine> {
        self.quarantined.iter().find(|range| {
            range.from.segment == position.segment
                && (range.from.offset..range.from.offset + range.len).contains(&position.offset)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back_and_every_flipped_bit_is_noticed() {
        let manifest = Manifest {
            store: 1,
            shard: ShardId(4),
            epoch: Epoch(3),
            number: 7,
            segments: vec![SegmentEntry {
                segment: SegmentId(1),
                epoch: Epoch(2),
                generation: 0,
                data_end: 8192,
                records: 3,
            }],
            indexes: vec![IndexEntry {
                blob: 1,
                epoch: Epoch(3),
                directory_offset: 4096,
                directory_len: 80,
                full: true,
            }],
            quarantined: vec![Quarantine { from: Position { segment: SegmentId(1), offset: 4096 }, len: 4096 }],
            pins: vec![Pin { name: "backup".to_owned(), until_ms: 5, as_of: Lsn(9) }],
            ..Manifest::default()
        };
        let bytes = manifest.to_bytes();
        assert_eq!(Manifest::from_bytes(&bytes), Ok(manifest.clone()));
        assert!(manifest.quarantine_at(Position { segment: SegmentId(1), offset: 5000 }).is_some());
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Manifest::from_bytes(&damaged).is_err(), "byte {at}");
        }
        for len in 0..bytes.len() {
            assert!(Manifest::from_bytes(&bytes[..len]).is_err());
        }
    }
}
