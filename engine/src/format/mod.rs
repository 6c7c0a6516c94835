//! Bytes on disk: encoders and decoders side by side. `docs/format.md` is the description; this is its code.

pub mod base64_lines;
pub mod batch;
pub mod codec;
pub mod dictionary;
pub mod frame;
pub mod manifest;
pub mod message;
pub mod page;
pub mod record;
pub mod segment;

/// The version of the format that this code writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Batches, segment data and pages start at multiples of this, so that no acknowledged sector is written again and
/// reading can find the next start after damage.
pub const BLOCK_BYTES: u64 = 4096;

/// Rounds up to the next block.
pub const fn round_up_to_block(offset: u64) -> u64 {
    offset.div_ceil(BLOCK_BYTES) * BLOCK_BYTES
}

/// What is wrong with bytes that were read back. The file and offset are added by who read them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    #[error("no {0} here: wrong magic number")]
    Magic(&'static str),
    #[error("the {what} has format version {found}; this program reads version {FORMAT_VERSION}: use a newer program")]
    Version { what: &'static str, found: u32 },
    #[error("checksum of the {what} is {found:08x}, expected {expected:08x}")]
    Checksum { what: &'static str, expected: u32, found: u32 },
    #[error("the {what} is cut short: {needed} bytes needed, {available} there")]
    Short { what: &'static str, needed: u64, available: u64 },
    #[error("the {what} says it belongs elsewhere: {detail}")]
    Misplaced { what: &'static str, detail: String },
    #[error("the {what} does not decode: {source}")]
    Decode { what: &'static str, source: codec::DecodeError },
    #[error("record kind {kind} is unknown and may not be skipped: use a newer program")]
    UnknownRecord { kind: u16 },
    #[error("the {what} has {len} bytes; no more than {limit} can be read back")]
    TooLong { what: &'static str, len: u64, limit: u64 },
    #[error(
        "the {what} needs dictionary {id:08x}, which its segment does not have: it is damaged, or the segment's header is"
    )]
    NoDictionary { what: &'static str, id: u32 },
    #[error("the {what} does not decompress")]
    Decompress { what: &'static str },
}

/// Compares a stored checksum with the one of `bytes`.
pub fn verify_checksum(what: &'static str, expected: u32, bytes: &[u8]) -> Result<(), FormatError> {
    let found = checksum(bytes);
    if found == expected { Ok(()) } else { Err(FormatError::Checksum { what, expected, found }) }
}

/// The checksum of two runs of bytes with a gap between them.
pub fn checksum_around(before: &[u8], after: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(before);
    hasher.update(after);
    if crate::planted::is_on(crate::planted::Bug::SkipChecksum) { 0 } else { hasher.finalize() }
}

/// A checksum of bytes that come piece by piece.
#[derive(Clone, Debug, Default)]
pub struct PiecewiseChecksum(crc32fast::Hasher);

impl PiecewiseChecksum {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The same that [`checksum`] gives of all pieces together.
    pub fn finish(self) -> u32 {
        if crate::planted::is_on(crate::planted::Bug::SkipChecksum) { 0 } else { self.0.finalize() }
    }

    /// As [`verify_checksum`], of all pieces together.
    pub fn verify(self, what: &'static str, expected: u32) -> Result<(), FormatError> {
        let found = self.finish();
        if found == expected { Ok(()) } else { Err(FormatError::Checksum { what, expected, found }) }
    }
}

/// The checksum of every record, frame, header and page: CRC-32 (IEEE).
pub fn checksum(bytes: &[u8]) -> u32 {
    if crate::planted::is_on(crate::planted::Bug::SkipChecksum) {
        return 0;
    }
    crc32fast::hash(bytes)
}
