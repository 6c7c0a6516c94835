//! Segment files: a header with embedded dictionaries, batches, and after the seal a footer with a table of records.

use std::sync::Arc;

use super::codec::{DecodeError, Wire, wire_struct};
use super::dictionary::{self, Dictionary, DictionaryKind};
use super::{BLOCK_BYTES, FORMAT_VERSION, FormatError, checksum, checksum_around, round_up_to_block, verify_checksum};
use crate::ids::{Epoch, Lsn, SegmentId, ShardId};

const HEADER_MAGIC: [u8; 8] = *b"PHSEGMT1";
const FOOTER_MAGIC: [u8; 8] = *b"PHFOOTR1";
/// Magic, version, header length, checksum, fixed fields.
const HEADER_FIXED_BYTES: usize = 88;
/// Dictionaries of a segment: their table has room in the header's first block. A batch is of two sets of three at most, but where
/// messages wait while dictionaries are trained again and again.
pub const DICTIONARIES_MAX: usize = 64;
/// The trailer stands at the very end of a sealed segment.
pub const TRAILER_BYTES: usize = 64;

/// What a segment says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    pub store: u128,
    pub shard: ShardId,
    pub epoch: Epoch,
    pub segment: SegmentId,
    /// 0 for a log segment; a segment that compaction wrote has the generation of its records.
    pub generation: u32,
    /// The sequence that the first batch will carry.
    pub first_batch: u64,
    /// Of a segment that compaction wrote: whatever had been deleted up to here is not in it.
    pub as_of: Lsn,
    /// Those that frames of this segment name.
    pub dictionaries: Vec<Arc<Dictionary>>,
}

struct DictionaryEntry {
    id: u32,
    kind: u32,
    generation: u32,
    offset: u32,
    len: u32,
    checksum: u32,
}
wire_struct!(DictionaryEntry { id: u32, kind: u32, generation: u32, offset: u32, len: u32, checksum: u32 });
const DICTIONARY_ENTRY_BYTES: usize = 24;

impl SegmentHeader {
    /// The header's bytes, a multiple of a block long.
    pub fn encode(&self) -> Vec<u8> {
        let mut fixed = Vec::with_capacity(BLOCK_BYTES as usize);
        fixed.extend_from_slice(&HEADER_MAGIC);
        FORMAT_VERSION.put(&mut fixed);
        assert!(self.dictionaries.len() <= DICTIONARIES_MAX, "a table that fits into a block");
        let table_bytes = self.dictionaries.len() * DICTIONARY_ENTRY_BYTES;
        let mut offset = HEADER_FIXED_BYTES + table_bytes;
        let total: usize = offset + self.dictionaries.iter().map(|dictionary| dictionary.bytes().len()).sum::<usize>();
        let header_len = round_up_to_block(total as u64) as u32;
        header_len.put(&mut fixed);
        0_u32.put(&mut fixed); // the checksum, set below
        0_u32.put(&mut fixed);
        self.store.put(&mut fixed);
        self.shard.put(&mut fixed);
        self.epoch.put(&mut fixed);
        self.segment.put(&mut fixed);
        self.generation.put(&mut fixed);
        self.first_batch.put(&mut fixed);
        (self.dictionaries.len() as u32).put(&mut fixed);
        self.as_of.put(&mut fixed);
        fixed.resize(HEADER_FIXED_BYTES, 0);
        for dictionary in &self.dictionaries {
            let entry = DictionaryEntry {
                id: dictionary.id,
                kind: dictionary.kind.number(),
                generation: dictionary.generation,
                offset: offset as u32,
                len: dictionary.bytes().len() as u32,
                checksum: dictionary.checksum(),
            };
            entry.put(&mut fixed);
            offset += dictionary.bytes().len();
        }
        let crc = checksum_around(&fixed[..16], &fixed[20..]);
        fixed[16..20].copy_from_slice(&crc.to_le_bytes());
        for dictionary in &self.dictionaries {
            fixed.extend_from_slice(dictionary.bytes());
        }
        fixed.resize(header_len as usize, 0);
        fixed
    }

    /// The length of the header that starts with `block`, so that the rest of it can be read.
    pub fn length(block: &[u8]) -> Result<usize, FormatError> {
        const WHAT: &str = "segment header";
        if block.len() < HEADER_FIXED_BYTES {
            let (needed, available) = (HEADER_FIXED_BYTES as u64, block.len() as u64);
            return Err(FormatError::Short { what: WHAT, needed, available });
        }
        if block[..8] != HEADER_MAGIC {
            return Err(FormatError::Magic(WHAT));
        }
        let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        if word(8) != FORMAT_VERSION {
            return Err(FormatError::Version { what: WHAT, found: word(8) });
        }
        let len = word(12) as usize;
        let longest = DICTIONARIES_MAX * dictionary::DICTIONARY_BYTES_MAX + BLOCK_BYTES as usize;
        if len < BLOCK_BYTES as usize || len > longest || !len.is_multiple_of(BLOCK_BYTES as usize) {
            let detail = format!("a length of {len} bytes");
            return Err(FormatError::Misplaced { what: WHAT, detail });
        }
        Ok(len)
    }

    /// Decodes a whole header, dictionaries verified.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (header, damaged) = Self::decode_some(bytes)?;
        damaged.into_iter().next().map_or(Ok(header), Err)
    }

    /// As [`SegmentHeader::decode`], without those of the dictionaries that are damaged, and what is wrong with them.
    pub fn decode_some(bytes: &[u8]) -> Result<(Self, Vec<FormatError>), FormatError> {
        const WHAT: &str = "segment header";
        let len = Self::length(bytes)?;
        let bytes = &bytes[..bytes.len().min(len)];
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = super::codec::Input(&bytes[16..HEADER_FIXED_BYTES]);
        let expected = u32::take(&mut input).map_err(decode)?;
        u32::take(&mut input).map_err(decode)?;
        let store = u128::take(&mut input).map_err(decode)?;
        let shard = ShardId::take(&mut input).map_err(decode)?;
        let epoch = Epoch::take(&mut input).map_err(decode)?;
        let segment = SegmentId::take(&mut input).map_err(decode)?;
        let generation = u32::take(&mut input).map_err(decode)?;
        let first_batch = u64::take(&mut input).map_err(decode)?;
        let count = u32::take(&mut input).map_err(decode)? as usize;
        let as_of = Lsn::take(&mut input).map_err(decode)?;
        let table_end = HEADER_FIXED_BYTES + count.saturating_mul(DICTIONARY_ENTRY_BYTES);
        if table_end > bytes.len() || count > DICTIONARIES_MAX {
            return Err(FormatError::Short { what: WHAT, needed: table_end as u64, available: bytes.len() as u64 });
        }
        let found = checksum_around(&bytes[..16], &bytes[20..table_end]);
        if found != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, found });
        }
        let mut input = super::codec::Input(&bytes[HEADER_FIXED_BYTES..table_end]);
        let (mut dictionaries, mut damaged) = (Vec::with_capacity(count), Vec::new());
        for _ in 0..count {
            match DictionaryEntry::take(&mut input).map_err(decode)?.open(bytes) {
                Ok(dictionary) => dictionaries.push(Arc::new(dictionary)),
                Err(error) => damaged.push(error),
            }
        }
        Ok((Self { store, shard, epoch, segment, generation, first_batch, as_of, dictionaries }, damaged))
    }
}

impl DictionaryEntry {
    /// The dictionary among the bytes of the header.
    fn open(&self, header: &[u8]) -> Result<Dictionary, FormatError> {
        const WHAT: &str = "dictionary";
        let value = |field, value: u32| {
            let source = DecodeError::Value { field, value: value.into() };
            FormatError::Decode { what: WHAT, source }
        };
        let kind = DictionaryKind::from_number(self.kind).ok_or_else(|| value("kind", self.kind))?;
        if self.len as usize > dictionary::DICTIONARY_BYTES_MAX {
            return Err(value("length", self.len));
        }
        let end = self.offset as usize + self.len as usize;
        let bytes = header.get(self.offset as usize..end).ok_or(FormatError::Short {
            what: WHAT,
            needed: end as u64,
            available: header.len() as u64,
        })?;
        verify_checksum(WHAT, self.checksum, bytes)?;
        // A wrong id would let frames be unpacked with another dictionary than theirs.
        if self.id != Dictionary::id_of(bytes) {
            return Err(value("id", self.id));
        }
        Ok(Dictionary::new(kind, self.generation, bytes.to_vec()))
    }
}

/// One record in the footer's table; its place in the table is the record's ordinal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FooterEntry {
    pub offset_units: u32,
    pub len: u32,
    pub kind: u16,
    pub flags: u16,
    pub generation: u32,
    pub lsn: Lsn,
}
wire_struct!(FooterEntry { offset_units: u32, len: u32, kind: u16, flags: u16, generation: u32, lsn: Lsn });
pub const FOOTER_ENTRY_BYTES: u64 = 24;

/// The table of a sealed segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footer {
    /// Where the last batch ends: the footer starts at this offset.
    pub data_end: u64,
    pub entries: Vec<FooterEntry>,
}

/// The last bytes of a sealed segment: where to find the footer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub data_end: u64,
    pub count: u32,
    pub table_checksum: u32,
}

impl Footer {
    /// The length of a footer that lists so many records.
    pub fn len_of(records: usize) -> u64 {
        records as u64 * FOOTER_ENTRY_BYTES + TRAILER_BYTES as u64
    }

    /// Table and trailer, to be written at `data_end`.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() * FOOTER_ENTRY_BYTES as usize + TRAILER_BYTES);
        for entry in &self.entries {
            entry.put(&mut out);
        }
        let table_checksum = checksum(&out);
        let start = out.len();
        out.extend_from_slice(&FOOTER_MAGIC);
        FORMAT_VERSION.put(&mut out);
        (self.entries.len() as u32).put(&mut out);
        self.data_end.put(&mut out);
        table_checksum.put(&mut out);
        out.resize(start + TRAILER_BYTES - 4, 0);
        checksum(&out[start..]).put(&mut out);
        out
    }

    /// Decodes the table that the trailer describes.
    pub fn decode(trailer: &Trailer, table: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "segment footer";
        let needed = u64::from(trailer.count) * FOOTER_ENTRY_BYTES;
        if table.len() as u64 != needed {
            return Err(FormatError::Short { what: WHAT, needed, available: table.len() as u64 });
        }
        verify_checksum(WHAT, trailer.table_checksum, table)?;
        let mut input = super::codec::Input(table);
        let mut entries = Vec::with_capacity(trailer.count as usize);
        for _ in 0..trailer.count {
            let entry = FooterEntry::take(&mut input);
            entries.push(entry.map_err(|source| FormatError::Decode { what: WHAT, source })?);
        }
        Ok(Self { data_end: trailer.data_end, entries })
    }
}

impl Trailer {
    /// Decodes the last [`TRAILER_BYTES`] of a file that is `file_len` bytes long.
    pub fn decode(bytes: &[u8], file_len: u64) -> Result<Self, FormatError> {
        const WHAT: &str = "segment trailer";
        if bytes.len() != TRAILER_BYTES {
            let (needed, available) = (TRAILER_BYTES as u64, bytes.len() as u64);
            return Err(FormatError::Short { what: WHAT, needed, available });
        }
        if bytes[..8] != FOOTER_MAGIC {
            return Err(FormatError::Magic(WHAT));
        }
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = super::codec::Input(&bytes[8..]);
        let version = u32::take(&mut input).map_err(decode)?;
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { what: WHAT, found: version });
        }
        let count = u32::take(&mut input).map_err(decode)?;
        let data_end = u64::take(&mut input).map_err(decode)?;
        let table_checksum = u32::take(&mut input).map_err(decode)?;
        let mut tail = super::codec::Input(&bytes[TRAILER_BYTES - 4..]);
        verify_checksum(WHAT, u32::take(&mut tail).map_err(decode)?, &bytes[..TRAILER_BYTES - 4])?;
        let trailer = Self { data_end, count, table_checksum };
        if trailer.data_end.checked_add(trailer.table_bytes() + TRAILER_BYTES as u64) != Some(file_len) {
            let detail = format!("data end {data_end} and {count} records do not add up to {file_len} bytes");
            return Err(FormatError::Misplaced { what: WHAT, detail });
        }
        Ok(trailer)
    }

    pub fn table_bytes(&self) -> u64 {
        u64::from(self.count) * FOOTER_ENTRY_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> SegmentHeader {
        SegmentHeader {
            store: 7,
            shard: ShardId(1),
            epoch: Epoch(2),
            segment: SegmentId(3),
            generation: 0,
            first_batch: 9,
            as_of: Lsn(77),
            dictionaries: vec![
                Arc::new(Dictionary::new(DictionaryKind::Header, 4, vec![1; 5000])),
                Arc::new(Dictionary::new(DictionaryKind::Body, 4, vec![2; 10])),
            ],
        }
    }

    #[test]
    fn a_header_comes_back_and_every_flipped_bit_is_noticed() {
        let bytes = header().encode();
        assert_eq!(SegmentHeader::decode(&bytes), Ok(header()));
        let used = HEADER_FIXED_BYTES + 2 * DICTIONARY_ENTRY_BYTES + 5010;
        for at in 0..used {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(SegmentHeader::decode(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_damaged_dictionary_costs_itself_only() {
        let mut bytes = header().encode();
        bytes[HEADER_FIXED_BYTES + 2 * DICTIONARY_ENTRY_BYTES + 100] ^= 1;
        let (opened, damaged) = SegmentHeader::decode_some(&bytes).unwrap();
        assert_eq!(opened.dictionaries, header().dictionaries[1..]);
        assert!(matches!(damaged[..], [FormatError::Checksum { what: "dictionary", .. }]), "{damaged:?}");
        // Only the first block has been read.
        let (opened, damaged) = SegmentHeader::decode_some(&bytes[..BLOCK_BYTES as usize]).unwrap();
        assert_eq!((opened.dictionaries.len(), damaged.len()), (0, 2));
    }

    #[test]
    fn a_footer_comes_back_and_every_flipped_bit_is_noticed() {
        let entry = |number: u32| FooterEntry {
            offset_units: number * 512,
            len: 4096,
            kind: 1,
            flags: 0,
            generation: 0,
            lsn: Lsn::new(Epoch(1), number.into()),
        };
        let footer = Footer { data_end: 81_920, entries: (1..20).map(entry).collect() };
        let bytes = footer.encode();
        let file_len = footer.data_end + bytes.len() as u64;
        let open = |bytes: &[u8]| {
            let (table, trailer) = bytes.split_at(bytes.len() - TRAILER_BYTES);
            Footer::decode(&Trailer::decode(trailer, file_len)?, table)
        };
        assert_eq!(open(&bytes), Ok(footer));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(open(&damaged).is_err(), "byte {at}");
        }
    }
}
