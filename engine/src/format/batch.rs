//! Batches: what one write and one sync make durable.
//!
//! A batch starts on a block boundary: header, touch table, records, zeroes up to the next boundary. The header carries
//! the last position known durable when it was written, so that recovery can tell a torn tail from damage.

use super::codec::{Input, Wire, wire_struct};
use super::record::{RECORD_HEADER_BYTES, RecordHeader, kind};
use super::{FormatError, checksum, round_up_to_block, verify_checksum};
use crate::ids::{AccountId, Epoch, Lsn, MailboxId, Position, SegmentId};

const MAGIC: u32 = u32::from_le_bytes(*b"PHB1");
const TOUCH_MAGIC: u32 = u32::from_le_bytes(*b"PHT1");
pub const BATCH_HEADER_BYTES: usize = 96;
const TOUCH_HEADER_BYTES: usize = 16;
pub const TOUCH_ENTRY_BYTES: usize = 32;
/// No batch is longer; a header that claims more is damaged.
pub const BATCH_BYTES_MAX: u64 = 256 << 20;

/// What a record changes, so that its loss can be named: which mailbox, which UIDs. A record that makes a mailbox has its
/// account in place of UIDs, lower half first, so that messages are not lost with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    pub mailbox: MailboxId,
    pub first: u32,
    pub last: u32,
    pub lsn: Lsn,
    pub kind: u16,
}

impl Touch {
    /// The first and last UID of the change; `None` for a change of the mailbox as a whole.
    pub fn uids(&self) -> Option<(u32, u32)> {
        (!self.is_of_mailbox() && self.last > 0).then_some((self.first, self.last))
    }

    /// The account of a mailbox that was made.
    pub fn account(&self) -> Option<AccountId> {
        let account = u64::from(self.last) << 32 | u64::from(self.first);
        (self.is_of_mailbox() && account > 0).then_some(AccountId(account))
    }

    fn is_of_mailbox(&self) -> bool {
        matches!(self.kind, kind::MAILBOX | kind::BASE)
    }

    fn put(&self, out: &mut Vec<u8>) {
        let start = out.len();
        self.mailbox.put(out);
        self.first.put(out);
        self.last.put(out);
        self.lsn.put(out);
        self.kind.put(out);
        out.resize(start + TOUCH_ENTRY_BYTES, 0);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, super::codec::DecodeError> {
        let mut entry = Input(input.bytes(TOUCH_ENTRY_BYTES)?);
        Ok(Self {
            mailbox: MailboxId::take(&mut entry)?,
            first: u32::take(&mut entry)?,
            last: u32::take(&mut entry)?,
            lsn: Lsn::take(&mut entry)?,
            kind: u16::take(&mut entry)?,
        })
    }
}

/// The fields of a batch header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Ascends by one over the whole life of the shard.
    pub sequence: u64,
    pub epoch: Epoch,
    pub record_count: u32,
    /// Where this batch itself lies.
    pub position: Position,
    /// Everything before this position is durable.
    pub durable: Position,
    pub touch_bytes: u32,
    pub record_bytes: u32,
}
wire_struct!(BatchHeader {
    sequence: u64,
    epoch: Epoch,
    record_count: u32,
    position: Position,
    durable: Position,
    touch_bytes: u32,
    record_bytes: u32,
});

impl BatchHeader {
    /// Header, touch table, records and padding.
    pub fn total_bytes(&self) -> u64 {
        round_up_to_block(BATCH_HEADER_BYTES as u64 + u64::from(self.touch_bytes) + u64::from(self.record_bytes))
    }

    /// The offset of the first record in the segment.
    pub fn records_offset(&self) -> u64 {
        self.position.offset + BATCH_HEADER_BYTES as u64 + u64::from(self.touch_bytes)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BATCH_HEADER_BYTES);
        MAGIC.put(&mut out);
        0_u32.put(&mut out);
        Wire::put(self, &mut out);
        out.resize(BATCH_HEADER_BYTES, 0);
        let crc = checksum(&out[8..]);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Whether a batch may start here at all: cheap test before [`BatchHeader::decode`].
    pub fn magic_is_at(bytes: &[u8]) -> bool {
        bytes.get(..4) == Some(&MAGIC.to_le_bytes())
    }

    /// Decodes a header that must lie at `position` in epoch `epoch`.
    pub fn decode(bytes: &[u8], position: Position, epoch: Epoch) -> Result<Self, FormatError> {
        const WHAT: &str = "batch header";
        let bytes = bytes.get(..BATCH_HEADER_BYTES).ok_or(FormatError::Short {
            what: WHAT,
            needed: BATCH_HEADER_BYTES as u64,
            available: bytes.len() as u64,
        })?;
        if !Self::magic_is_at(bytes) {
            return Err(FormatError::Magic(WHAT));
        }
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = Input(&bytes[4..]);
        verify_checksum(WHAT, u32::take(&mut input).map_err(decode)?, &bytes[8..])?;
        let header = <Self as Wire>::take(&mut input).map_err(decode)?;
        if header.position != position || header.epoch != epoch {
            let detail = format!("{}, epoch {}", header.position, header.epoch);
            return Err(FormatError::Misplaced { what: WHAT, detail });
        }
        if header.total_bytes() > BATCH_BYTES_MAX {
            let detail = format!("a length of {} bytes", header.total_bytes());
            return Err(FormatError::Misplaced { what: WHAT, detail });
        }
        Ok(header)
    }
}

/// Collects the records of the next batch.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    records: Vec<u8>,
    touches: Vec<Touch>,
    count: u32,
}

impl BatchBuilder {
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The bytes of the records so far.
    pub fn record_bytes(&self) -> usize {
        self.records.len()
    }

    pub fn record_count(&self) -> u32 {
        self.count
    }

    /// Appends a record whose payload is written by `payload`; returns its offset from the first record and its length.
    pub fn push(&mut self, header: RecordHeader, payload: impl FnOnce(&mut Vec<u8>)) -> (u32, u32) {
        let start = self.records.len();
        self.records.resize(start + RECORD_HEADER_BYTES, 0);
        payload(&mut self.records);
        let end = self.records.len();
        header.seal(&mut self.records[start..end]);
        self.records.resize(end.next_multiple_of(8), 0);
        self.count += 1;
        (start as u32, (end - start) as u32)
    }

    pub fn touch(&mut self, touch: Touch) {
        self.touches.push(touch);
    }

    /// The length that [`BatchBuilder::finish`] will give.
    pub fn total_bytes(&self) -> u64 {
        round_up_to_block((BATCH_HEADER_BYTES + self.touch_bytes() + self.records.len()) as u64)
    }

    fn touch_bytes(&self) -> usize {
        TOUCH_HEADER_BYTES + self.touches.len() * TOUCH_ENTRY_BYTES
    }

    /// The offset of the first record from the start of the batch.
    pub fn records_start(&self) -> u64 {
        (BATCH_HEADER_BYTES + self.touch_bytes()) as u64
    }

    /// The batch's bytes, to be written at `position`.
    pub fn finish(self, sequence: u64, epoch: Epoch, position: Position, durable: Position) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.total_bytes() as usize);
        let header = BatchHeader {
            sequence,
            epoch,
            record_count: self.count,
            position,
            durable,
            touch_bytes: self.touch_bytes() as u32,
            record_bytes: self.records.len() as u32,
        };
        out.extend_from_slice(&header.encode());

        TOUCH_MAGIC.put(&mut out);
        0_u32.put(&mut out);
        (self.touches.len() as u32).put(&mut out);
        0_u32.put(&mut out);
        for touch in &self.touches {
            touch.put(&mut out);
        }
        let crc = checksum(&out[BATCH_HEADER_BYTES + 8..]);
        out[BATCH_HEADER_BYTES + 4..BATCH_HEADER_BYTES + 8].copy_from_slice(&crc.to_le_bytes());

        out.extend_from_slice(&self.records);
        out.resize(round_up_to_block(out.len() as u64) as usize, 0);
        out
    }
}

/// Makes a batch that was to be written at `from` one that is to be written at `position`.
///
/// # Panics
/// If it is not such a batch.
pub fn move_batch(batch: &mut [u8], from: Position, epoch: Epoch, position: Position, durable: Position) {
    let header = BatchHeader::decode(batch, from, epoch).expect("a batch that was just built");
    let header = BatchHeader { position, durable, ..header };
    batch[..BATCH_HEADER_BYTES].copy_from_slice(&header.encode());
}

/// Whether a touch table may start here at all: cheap test before [`decode_touches`].
pub fn touch_table_is_at(bytes: &[u8]) -> bool {
    bytes.get(..4) == Some(&TOUCH_MAGIC.to_le_bytes())
}

/// The length that a touch table says it has; more than fits into a batch is cut.
pub fn touches_len(bytes: &[u8]) -> usize {
    let count = bytes.get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes) as usize;
    (TOUCH_HEADER_BYTES + count.saturating_mul(TOUCH_ENTRY_BYTES)).min(BATCH_BYTES_MAX as usize)
}

/// Decodes the touch table that follows a batch header, also when that header is damaged. `bytes` start at the table.
pub fn decode_touches(bytes: &[u8]) -> Result<Vec<Touch>, FormatError> {
    const WHAT: &str = "touch table";
    let decode = |source| FormatError::Decode { what: WHAT, source };
    let mut input = Input(bytes);
    if u32::take(&mut input).map_err(decode)? != TOUCH_MAGIC {
        return Err(FormatError::Magic(WHAT));
    }
    let expected = u32::take(&mut input).map_err(decode)?;
    let count = u32::take(&mut input).map_err(decode)? as usize;
    let len = TOUCH_HEADER_BYTES.saturating_add(count.saturating_mul(TOUCH_ENTRY_BYTES));
    let table =
        bytes.get(..len).ok_or(FormatError::Short { what: WHAT, needed: len as u64, available: bytes.len() as u64 })?;
    verify_checksum(WHAT, expected, &table[8..])?;
    let mut input = Input(&table[TOUCH_HEADER_BYTES..]);
    (0..count).map(|_| Touch::take(&mut input).map_err(decode)).collect()
}

/// A record as it lies in a batch.
#[derive(Clone, Debug)]
pub struct RecordInBatch<'a> {
    pub header: RecordHeader,
    pub payload: &'a [u8],
    /// Offset from the first record.
    pub offset: u32,
    pub len: u32,
}

/// What became of one record of a batch.
pub type RecordResult<'a> = Result<RecordInBatch<'a>, (u32, FormatError)>;

/// The records of a batch, from the bytes that start at its first record. A damaged record is given as its offset and
/// error; where its length cannot be trusted either, it is the last item.
pub fn records<'a>(header: &BatchHeader, bytes: &'a [u8]) -> Vec<RecordResult<'a>> {
    let mut found = Vec::new();
    let mut offset = 0;
    for _ in 0..header.record_count {
        let Some(rest) = bytes.get(offset..) else {
            let error = FormatError::Short { what: "record", needed: offset as u64, available: bytes.len() as u64 };
            found.push(Err((offset as u32, error)));
            break;
        };
        match RecordHeader::decode(rest) {
            Ok((header, payload)) => {
                let len = RECORD_HEADER_BYTES + payload.len();
                found.push(Ok(RecordInBatch { header, payload, offset: offset as u32, len: len as u32 }));
                offset += len.next_multiple_of(8);
            }
            Err(error) => {
                found.push(Err((offset as u32, error)));
                // The length is covered by the checksum that failed: follow it only if a good record stands there.
                let Some(next) = RecordHeader::claimed_len(rest).map(|len| offset + len.next_multiple_of(8)) else {
                    break;
                };
                if bytes.get(next..).is_none_or(|rest| RecordHeader::decode(rest).is_err()) {
                    break;
                }
                offset = next;
            }
        }
    }
    found
}

/// The position that follows a batch.
pub fn end_of(header: &BatchHeader) -> Position {
    Position { segment: header.position.segment, offset: header.position.offset + header.total_bytes() }
}

/// The first position of a segment's batches.
pub fn first_position(segment: SegmentId, header_len: usize) -> Position {
    Position { segment, offset: header_len as u64 }
}
