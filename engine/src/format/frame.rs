//! Frames: compressed or raw runs of bytes, each with its own checksum.
//!
//! The codec stands in the frame's info, never in the bytes, so that stored mail that looks like a compressed frame is
//! just bytes.

use super::codec::wire_struct;
use super::{FormatError, checksum, verify_checksum};

/// How a frame's bytes are stored.
pub mod codec_id {
    pub const RAW: u8 = 0;
    pub const ZSTD: u8 = 1;
    /// zstd with the dictionary that the frame's info names; it is embedded in the segment.
    pub const ZSTD_DICTIONARY: u8 = 2;
}

/// The largest raw length of a frame that holds a body or a block of one.
pub const BLOCK_RAW_BYTES: usize = 256 << 10;
/// The largest raw length of a header frame that is written.
pub const HEADER_RAW_BYTES: usize = 1 << 20;
/// The largest raw length of any frame; a larger claim is damage.
pub const FRAME_RAW_BYTES_MAX: usize = 64 << 20;

/// A frame's description: where it lies is given by what precedes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameInfo {
    pub codec: u8,
    pub dictionary: u32,
    pub stored_len: u32,
    pub raw_len: u32,
    /// Of the stored bytes.
    pub checksum: u32,
}
wire_struct!(FrameInfo { codec: u8, dictionary: u32, stored_len: u32, raw_len: u32, checksum: u32 });

impl FrameInfo {
    /// An absent frame.
    pub const NONE: Self = Self { codec: 0, dictionary: 0, stored_len: 0, raw_len: 0, checksum: 0 };

    /// Verifies the stored bytes and appends the raw ones to `out`.
    pub fn unpack(
        &self,
        what: &'static str,
        stored: &[u8],
        unpacker: &mut Unpacker,
        out: &mut Vec<u8>,
    ) -> Result<(), FormatError> {
        self.unpack_at_most(FRAME_RAW_BYTES_MAX, what, stored, unpacker, out)
    }

    /// Like [`FrameInfo::unpack`], with a limit of its own for the raw bytes.
    pub fn unpack_at_most(
        &self,
        limit: usize,
        what: &'static str,
        stored: &[u8],
        unpacker: &mut Unpacker,
        out: &mut Vec<u8>,
    ) -> Result<(), FormatError> {
        if stored.len() != self.stored_len as usize {
            let (needed, available) = (u64::from(self.stored_len), stored.len() as u64);
            return Err(FormatError::Short { what, needed, available });
        }
        verify_checksum(what, self.checksum, stored)?;
        if self.raw_len as usize > limit {
            return Err(FormatError::Decompress { what });
        }
        match self.codec {
            codec_id::RAW if self.raw_len == self.stored_len => out.extend_from_slice(stored),
            codec_id::ZSTD => {
                let start = out.len();
                out.reserve(self.raw_len as usize);
                let mut spare = std::io::Cursor::new(std::mem::take(out));
                spare.set_position(start as u64);
                let result = unpacker.zstd.decompress_to_buffer(stored, &mut spare);
                *out = spare.into_inner();
                if result.ok() != Some(self.raw_len as usize) {
                    out.truncate(start);
                    return Err(FormatError::Decompress { what });
                }
            }
            _ => return Err(FormatError::Decompress { what }),
        }
        Ok(())
    }
}

/// A reusable decompression context.
pub struct Unpacker {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self { zstd: zstd::bulk::Decompressor::new().expect("memory for a decompression context") }
    }
}

/// A reusable compression context, level 1 before the log.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
}

/// Below this a frame is stored raw without trying.
const COMPRESS_FROM_BYTES: usize = 128;

impl Default for Packer {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Packer {
    pub fn new(level: i32) -> Self {
        Self { zstd: zstd::bulk::Compressor::new(level).expect("memory for a compression context") }
    }

    /// Appends `raw` to `out` as a frame: compressed where that saves a tenth, else raw.
    pub fn pack(&mut self, raw: &[u8], out: &mut Vec<u8>) -> FrameInfo {
        let raw_len = u32::try_from(raw.len()).expect("frames are bounded");
        let start = out.len();
        let mut codec = codec_id::RAW;
        if raw.len() >= COMPRESS_FROM_BYTES {
            out.reserve(zstd::zstd_safe::compress_bound(raw.len()));
            let mut spare = std::io::Cursor::new(std::mem::take(out));
            spare.set_position(start as u64);
            let packed = self.zstd.compress_to_buffer(raw, &mut spare);
            *out = spare.into_inner();
            match packed {
                Ok(len) if len < raw.len() - raw.len() / 10 => {
                    out.truncate(start + len);
                    codec = codec_id::ZSTD;
                }
                _ => out.truncate(start),
            }
        }
        if codec == codec_id::RAW {
            out.extend_from_slice(raw);
        }
        let stored = &out[start..];
        FrameInfo { codec, dictionary: 0, stored_len: stored.len() as u32, raw_len, checksum: checksum(stored) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_after_other_bytes() {
        let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
        let noise: Vec<u8> = (0..5000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for raw in [Vec::new(), b"short".to_vec(), vec![b'x'; 100_000], noise] {
            let mut out = b"before".to_vec();
            let info = packer.pack(&raw, &mut out);
            assert!(out.starts_with(b"before"));
            let mut back = b"there".to_vec();
            info.unpack("frame", &out[6..], &mut unpacker, &mut back).unwrap();
            assert_eq!(&back[5..], raw);
        }
    }

    #[test]
    fn a_frame_that_looks_compressed_stays_bytes() {
        let mut packer = Packer::default();
        let mut inner = Vec::new();
        packer.pack(&[b'y'; 1000], &mut inner);
        let mut out = Vec::new();
        let info = packer.pack(&inner, &mut out);
        let mut back = Vec::new();
        info.unpack("frame", &out, &mut Unpacker::default(), &mut back).unwrap();
        assert_eq!(back, inner);
    }

    #[test]
    fn a_lying_raw_length_is_an_error_and_leaves_nothing_behind() {
        let mut out = Vec::new();
        let mut info = Packer::default().pack(&[b'z'; 10_000], &mut out);
        for raw_len in [9_999, 10_001, u32::MAX] {
            info.raw_len = raw_len;
            let mut back = vec![1];
            assert!(info.unpack("frame", &out, &mut Unpacker::default(), &mut back).is_err());
            assert_eq!(back, [1]);
        }
    }
}
