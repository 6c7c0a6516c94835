//! The message record: a head with everything that replay and FETCH need first, then the frames of digest, header and
//! body. A FETCH of the header reads the record only up to the end of the header frame.

use super::base64_lines::put_lines;
use super::codec::{Input, Wire, wire_struct};
use super::frame::{BLOCK_RAW_BYTES, FrameInfo, Unpacker};
use super::{FormatError, checksum, verify_checksum};
use crate::flags::Flags;
use crate::ids::{Location, Lsn, MailboxId, MessageId, ModSeq, Uid};

/// The prefix of one placement (trace headers of one recipient) is at most this long.
pub const PREFIX_BYTES_MAX: usize = 8 << 10;

/// Placements of one record: as many as an index can name by 16 bits.
pub const PLACEMENTS_MAX: usize = 1 << 16;

/// Bytes that stand before the shared header in one placement only, or in all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prefix {
    Here(Vec<u8>),
    /// The first so many octets of the header's frame, which are no part of the shared header.
    InFrame(u16),
}

/// Set in what would be the length of a prefix that is here.
const PREFIX_IN_FRAME: u32 = 1 << 31;

impl Prefix {
    pub fn octets(&self) -> usize {
        match self {
            Self::Here(bytes) => bytes.len(),
            Self::InFrame(octets) => usize::from(*octets),
        }
    }

    /// The prefix, from what the header's frame begins with.
    pub fn of<'a>(&'a self, frame: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Here(bytes) => bytes,
            Self::InFrame(octets) => &frame[..usize::from(*octets)],
        }
    }

    fn octets_in_frame(&self) -> usize {
        match self {
            Self::Here(_) => 0,
            Self::InFrame(octets) => usize::from(*octets),
        }
    }
}

impl Wire for Prefix {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Here(bytes) => bytes.put(out),
            Self::InFrame(octets) => (PREFIX_IN_FRAME | u32::from(*octets)).put(out),
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, super::codec::DecodeError> {
        let len = u32::take(&mut input.clone())?;
        if len & PREFIX_IN_FRAME == 0 {
            return Wire::take(input).map(Self::Here);
        }
        u32::take(input)?;
        let octets = len & !PREFIX_IN_FRAME;
        let value = super::codec::DecodeError::Value { field: "prefix", value: octets.into() };
        u16::try_from(octets).map(Self::InFrame).map_err(|_| value)
    }
}

/// A message in a mailbox.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    pub mailbox: MailboxId,
    pub uid: Uid,
    pub modseq: ModSeq,
    pub flags: Flags,
    /// INTERNALDATE: seconds since the Unix epoch, and the zone it is shown in.
    pub internal_date: i64,
    pub zone_minutes: i16,
    /// SAVEDATE (RFC 8514), seconds since the Unix epoch.
    pub save_date: i64,
    /// Trace headers of this recipient.
    pub prefix: Prefix,
}
wire_struct!(Placement {
    mailbox: MailboxId,
    uid: Uid,
    modseq: ModSeq,
    flags: Flags,
    internal_date: i64,
    zone_minutes: i16,
    save_date: i64,
    prefix: Prefix,
});

impl Placement {
    /// What compaction leaves of a placement whose message has been expunged: its number, and its prefix where a copy needs it.
    /// Where no copy does it says that the prefix has been dropped: a record of the same message may still have it.
    pub fn gone(prefix: Option<Prefix>) -> Self {
        let is_dropped = prefix.is_none();
        let prefix = prefix.unwrap_or(Prefix::Here(Vec::new()));
        Self {
            mailbox: MailboxId(0),
            uid: Uid(is_dropped.into()),
            modseq: ModSeq(0),
            flags: Flags::NONE,
            internal_date: 0,
            zone_minutes: 0,
            save_date: 0,
            prefix,
        }
    }

    pub fn is_gone(&self) -> bool {
        self.mailbox == MailboxId(0)
    }

    /// Whether the prefix is not there although there was one.
    pub fn has_lost_prefix(&self) -> bool {
        self.is_gone() && self.uid != Uid(0)
    }
}

/// A part of a body in a record of its own, in an earlier batch: up to 256 KB of it as they are, or what base64 lines say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockReference {
    pub lsn: Lsn,
    pub location: Location,
    pub form: BlockForm,
}
wire_struct!(BlockReference { lsn: Lsn, location: Location, form: BlockForm });

/// How a block's bytes become a part of the body. Packed into 32 bits: the lower 20 are the octets of the part, the upper 12 a
/// quarter of the octets of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockForm {
    /// Of the part of the body.
    pub octets: u32,
    /// 0: the bytes are the part. Else they are to be encoded in base64 lines of so many octets, each with CRLF, of which the
    /// first `octets` are the part.
    pub line_octets: u16,
}

const BLOCK_OCTETS_BITS: u32 = 20;

impl BlockForm {
    pub fn as_it_is(octets: u32) -> Self {
        Self { octets, line_octets: 0 }
    }
}

impl Wire for BlockForm {
    const MIN_BYTES: usize = 4;

    fn put(&self, out: &mut Vec<u8>) {
        (u32::from(self.line_octets / 4) << BLOCK_OCTETS_BITS | self.octets).put(out);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, super::codec::DecodeError> {
        let packed = u32::take(input)?;
        let octets = packed & ((1 << BLOCK_OCTETS_BITS) - 1);
        Ok(Self { octets, line_octets: (packed >> BLOCK_OCTETS_BITS) as u16 * 4 })
    }
}

/// A run of the original body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Octets of the body's frame.
    Literal { octets: u64 },
    /// Base64 lines of a shared content. Not written yet.
    Content { content: u32, start: u64, octets: u64, line_octets: u16, crlf: bool },
    /// Base64 of what a frame of its own holds, which follows in the record: the first `octets` of lines of `line_octets`, each
    /// with CRLF.
    Base64 { octets: u32, line_octets: u16, frame: FrameInfo },
}

impl Extent {
    /// What its encoding takes.
    fn encoded_bytes(&self) -> usize {
        match self {
            Self::Literal { .. } => 9,
            Self::Content { .. } => 24,
            Self::Base64 { .. } => 7 + FrameInfo::MIN_BYTES,
        }
    }
}

impl Wire for Extent {
    const MIN_BYTES: usize = 9;

    fn put(&self, out: &mut Vec<u8>) {
        match *self {
            Self::Literal { octets } => {
                0_u8.put(out);
                octets.put(out);
            }
            Self::Content { content, start, octets, line_octets, crlf } => {
                1_u8.put(out);
                octets.put(out);
                content.put(out);
                start.put(out);
                line_octets.put(out);
                crlf.put(out);
            }
            Self::Base64 { octets, line_octets, frame } => {
                2_u8.put(out);
                octets.put(out);
                line_octets.put(out);
                frame.put(out);
            }
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, super::codec::DecodeError> {
        Ok(match u8::take(input)? {
            0 => Self::Literal { octets: Wire::take(input)? },
            1 => Self::Content {
                octets: Wire::take(input)?,
                content: Wire::take(input)?,
                start: Wire::take(input)?,
                line_octets: Wire::take(input)?,
                crlf: Wire::take(input)?,
            },
            2 => {
                Self::Base64 { octets: Wire::take(input)?, line_octets: Wire::take(input)?, frame: Wire::take(input)? }
            }
            value => return Err(super::codec::DecodeError::Value { field: "extent", value: value.into() }),
        })
    }
}

/// Everything of a message record but the bytes of its frames.
#[derive(Clone, Debug, PartialEq)]
pub struct MessageHead {
    pub id: MessageId,
    /// For a folded record, the LSN up to which its placements are current; else 0.
    pub as_of: Lsn,
    /// When the message was taken in, milliseconds since the Unix epoch.
    pub received_ms: u64,
    /// Octets of the shared part: header and body without any prefix.
    pub rest_octets: u64,
    /// Of the shared part as it was received.
    pub rest_checksum: u32,
    /// Octets of the shared header, with the empty line that ends it. What its frame has no room for begins the body's
    /// frame or blocks.
    pub header_octets: u32,
    pub digest: FrameInfo,
    /// A digest too large for its own frame continues here.
    pub digest_overflow: FrameInfo,
    pub header: FrameInfo,
    /// The body, unless it lies in `blocks`.
    pub body: FrameInfo,
    pub placements: Vec<Placement>,
    pub blocks: Vec<BlockReference>,
    /// What the body's frame says, together with the frames that these name. Empty where it is the body as it is.
    pub extents: Vec<Extent>,
    /// The contents that the extents name by their place here.
    pub contents: Vec<MessageId>,
}
wire_struct!(MessageHead {
    id: MessageId,
    as_of: Lsn,
    received_ms: u64,
    rest_octets: u64,
    rest_checksum: u32,
    header_octets: u32,
    digest: FrameInfo,
    digest_overflow: FrameInfo,
    header: FrameInfo,
    body: FrameInfo,
    placements: Vec<Placement>,
    blocks: Vec<BlockReference>,
    extents: Vec<Extent>,
    contents: Vec<MessageId>,
});

/// Before the fields of a head: its length with this, and its checksum.
const HEAD_SEAL_BYTES: usize = 8;

impl MessageHead {
    /// Length, checksum, fields: verifiable without the frames that follow.
    pub fn put_sealed(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + HEAD_SEAL_BYTES, 0);
        self.put(out);
        let len = (out.len() - start) as u32;
        out[start..start + 4].copy_from_slice(&len.to_le_bytes());
        let crc = checksum(&out[start + HEAD_SEAL_BYTES..]);
        out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    }

    /// The length that [`MessageHead::put_sealed`] writes.
    pub fn sealed_bytes(&self) -> usize {
        let mut bytes = HEAD_SEAL_BYTES + Self::MIN_BYTES;
        for placement in &self.placements {
            let flag_bytes = (u128::BITS - placement.flags.0.leading_zeros()).div_ceil(8) as usize;
            let here = placement.prefix.octets() - placement.prefix.octets_in_frame();
            bytes += Placement::MIN_BYTES + flag_bytes + here;
        }
        bytes += self.blocks.len() * BlockReference::MIN_BYTES + self.contents.len() * MessageId::MIN_BYTES;
        bytes + self.extents.iter().map(Extent::encoded_bytes).sum::<usize>()
    }

    /// The length of the sealed head at the start of a payload.
    pub fn sealed_len(payload: &[u8]) -> Result<usize, FormatError> {
        const WHAT: &str = "message head";
        let mut input = Input(payload);
        let len = u32::take(&mut input).map_err(|source| FormatError::Decode { what: WHAT, source })? as usize;
        if len < HEAD_SEAL_BYTES {
            return Err(FormatError::Misplaced { what: WHAT, detail: format!("a length of {len} bytes") });
        }
        Ok(len)
    }

    pub fn decode_sealed(payload: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "message head";
        let len = Self::sealed_len(payload)?;
        let sealed = payload.get(..len).ok_or(FormatError::Short {
            what: WHAT,
            needed: len as u64,
            available: payload.len() as u64,
        })?;
        let mut crc = Input(&sealed[4..8]);
        let expected = u32::take(&mut crc).map_err(|source| FormatError::Decode { what: WHAT, source })?;
        verify_checksum(WHAT, expected, &sealed[HEAD_SEAL_BYTES..])?;
        let head =
            Self::decode(&sealed[HEAD_SEAL_BYTES..]).map_err(|source| FormatError::Decode { what: WHAT, source })?;
        if head.placements.len() > PLACEMENTS_MAX {
            let detail = format!("{} placements", head.placements.len());
            return Err(FormatError::Misplaced { what: WHAT, detail });
        }
        Ok(head)
    }

    /// What the header's frame begins with and is a prefix.
    pub fn prefix_in_frame(&self) -> usize {
        self.placements.iter().map(|placement| placement.prefix.octets_in_frame()).max().unwrap_or(0)
    }

    /// How much of the shared header its frame has.
    pub fn header_in_frame(&self) -> usize {
        (self.header.raw_len as usize).saturating_sub(self.prefix_in_frame())
    }

    /// Stored bytes of the frames in the record, in their order there.
    pub fn frames(&self) -> [(&'static str, FrameInfo); 4] {
        [
            ("digest frame", self.digest),
            ("digest overflow frame", self.digest_overflow),
            ("header frame", self.header),
            ("body frame", self.body),
        ]
    }
}

/// A message record that has been read, wholly or up to the end of some frame.
#[derive(Debug)]
pub struct MessageReader<'a> {
    pub head: MessageHead,
    /// The payload from the end of the head.
    frames: &'a [u8],
}

impl<'a> MessageReader<'a> {
    /// `payload` begins a message record's payload; frames not read yet may be missing at its end.
    pub fn new(payload: &'a [u8]) -> Result<Self, FormatError> {
        let head = MessageHead::decode_sealed(payload)?;
        let frames = &payload[MessageHead::sealed_len(payload)?..];
        let MessageHead { header_octets, rest_octets, header, .. } = &head;
        let (prefix, in_frame) = (head.prefix_in_frame(), head.header_in_frame());
        let is_possible = prefix <= header.raw_len as usize && in_frame <= *header_octets as usize;
        if !is_possible || u64::from(*header_octets) > *rest_octets {
            let detail = format!("{prefix} + {in_frame} octets of a header of {header_octets} in {rest_octets}");
            return Err(FormatError::Misplaced { what: "message head", detail });
        }
        Ok(Self { head, frames })
    }

    fn unpack(&self, wanted: usize, unpacker: &mut Unpacker, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let frames = self.head.frames();
        let (what, info) = frames[wanted];
        let offset = frames[..wanted].iter().map(|(_, before)| before.stored_len as usize).sum();
        info.unpack(what, self.stored(what, offset, &info)?, unpacker, out)
    }

    /// The stored bytes of a frame that begins so far behind the head.
    fn stored(&self, what: &'static str, offset: usize, info: &FrameInfo) -> Result<&'a [u8], FormatError> {
        let end = offset + info.stored_len as usize;
        let available = self.frames.len() as u64;
        self.frames.get(offset..end).ok_or(FormatError::Short { what, needed: end as u64, available })
    }

    pub fn digest(&self, unpacker: &mut Unpacker, out: &mut Vec<u8>) -> Result<(), FormatError> {
        self.unpack(0, unpacker, out)?;
        self.unpack(1, unpacker, out)
    }

    /// The header, as far as its frame has room for it.
    pub fn header(&self, unpacker: &mut Unpacker, out: &mut Vec<u8>) -> Result<(), FormatError> {
        let start = out.len();
        self.header_frame(unpacker, out)?;
        out.drain(start..start + self.head.prefix_in_frame());
        Ok(())
    }

    /// The same with the prefix before it that is in the frame, if one is.
    pub fn header_frame(&self, unpacker: &mut Unpacker, out: &mut Vec<u8>) -> Result<(), FormatError> {
        self.unpack(2, unpacker, out)
    }

    /// The body and what comes before it of the header, where they are in the record; blocks are read by who knows where they are.
    pub fn body(&self, unpacker: &mut Unpacker, out: &mut Vec<u8>) -> Result<(), FormatError> {
        if self.head.extents.is_empty() {
            return self.unpack(3, unpacker, out);
        }
        let mut literals = Vec::new();
        self.unpack(3, unpacker, &mut literals)?;
        let mut literals = &literals[..];
        let mut offset = self.head.frames().iter().map(|(_, info)| info.stored_len as usize).sum();
        let mut content = Vec::new();
        for extent in &self.head.extents {
            match *extent {
                Extent::Literal { octets } => {
                    let len = usize::try_from(octets).unwrap_or(usize::MAX);
                    let (literal, others) = literals.split_at_checked(len).ok_or(FormatError::Short {
                        what: "body frame",
                        needed: octets,
                        available: literals.len() as u64,
                    })?;
                    out.extend_from_slice(literal);
                    literals = others;
                }
                Extent::Base64 { octets, line_octets, frame } => {
                    const WHAT: &str = "content frame";
                    content.clear();
                    let stored = self.stored(WHAT, offset, &frame)?;
                    frame.unpack_at_most(BLOCK_RAW_BYTES, WHAT, stored, unpacker, &mut content)?;
                    offset += frame.stored_len as usize;
                    put_part(&content, line_octets, octets, WHAT, out)?;
                }
                Extent::Content { .. } => {
                    let source = super::codec::DecodeError::Value { field: "extent", value: 1 };
                    return Err(FormatError::Decode { what: "message head", source });
                }
            }
        }
        if literals.is_empty() {
            return Ok(());
        }
        let detail = format!("{} octets more than the extents of the body name", literals.len());
        Err(FormatError::Misplaced { what: "body frame", detail })
    }
}

/// Appends base64 lines of a content, so many octets of them.
pub(crate) fn put_part(
    content: &[u8],
    line_octets: u16,
    octets: u32,
    what: &'static str,
    out: &mut Vec<u8>,
) -> Result<(), FormatError> {
    let start = out.len();
    put_lines(content, line_octets.into(), octets as usize, out);
    let (needed, available) = (u64::from(octets), (out.len() - start) as u64);
    if available == needed { Ok(()) } else { Err(FormatError::Short { what, needed, available }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ShardId;

    #[test]
    fn a_head_comes_back_has_the_length_it_says_and_notices_every_flipped_bit() {
        let placement = |uid| Placement {
            mailbox: MailboxId(9),
            uid: Uid(uid),
            modseq: ModSeq(3),
            flags: Flags::SEEN.with(Flags::keyword(uid as usize)),
            internal_date: -5,
            zone_minutes: -90,
            save_date: 7,
            prefix: if uid == 7 { Prefix::InFrame(9) } else { Prefix::Here(vec![b'x'; uid as usize * 10]) },
        };
        let head = MessageHead {
            id: MessageId { origin: ShardId(1), lsn: Lsn(2) },
            as_of: Lsn(0),
            received_ms: 4,
            rest_octets: 100,
            rest_checksum: 5,
            header_octets: 50,
            digest: FrameInfo::NONE,
            digest_overflow: FrameInfo::NONE,
            header: FrameInfo { codec: 1, dictionary: 2, stored_len: 3, raw_len: 50, checksum: 9 },
            body: FrameInfo::NONE,
            placements: vec![placement(1), placement(7), placement(100)],
            blocks: vec![BlockReference {
                lsn: Lsn(1),
                location: Location::default(),
                form: BlockForm { octets: 300_000, line_octets: 76 },
            }],
            extents: vec![
                Extent::Literal { octets: 3 },
                Extent::Content { content: 0, start: 1, octets: 2, line_octets: 76, crlf: true },
                Extent::Base64 { octets: 4, line_octets: 76, frame: FrameInfo { raw_len: 3, ..FrameInfo::NONE } },
            ],
            contents: vec![MessageId::default()],
        };
        let mut bytes = Vec::new();
        head.put_sealed(&mut bytes);
        assert_eq!(bytes.len(), head.sealed_bytes());
        assert_eq!(MessageHead::decode_sealed(&bytes), Ok(head));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 2;
            assert!(MessageHead::decode_sealed(&damaged).is_err(), "byte {at}");
        }
    }
}
