//! Frames: compressed or raw runs of bytes, each with its own checksum.
//!
//! The codec stands in the frame's info, never in the bytes, so that stored mail that looks like a compressed frame is
//! just bytes.

use std::sync::Arc;

use zstd::zstd_safe::{CCtx, CParameter, DCtx, SafeResult, compress_bound};

use super::codec::wire_struct;
use super::dictionary::{COMPACTION_LEVEL, Dictionary, DictionaryKind, DictionarySet, LOG_LEVEL};
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
            codec_id::ZSTD | codec_id::ZSTD_DICTIONARY => {
                let Unpacker { zstd, dictionaries } = unpacker;
                let dictionary = match self.needs_dictionary() {
                    Some(id) => {
                        let known = dictionaries.iter().find(|dictionary| dictionary.id == id);
                        let known = known.ok_or(FormatError::NoDictionary { what, id })?;
                        Some(known.decoder().ok_or(FormatError::Decompress { what })?)
                    }
                    None => None,
                };
                let start = out.len();
                let result = append(self.raw_len as usize, out, |spare| match dictionary {
                    Some(dictionary) => zstd.decompress_using_ddict(spare, stored, dictionary),
                    None => zstd.decompress(spare, stored),
                });
                if result.ok() != Some(self.raw_len as usize) {
                    out.truncate(start);
                    return Err(FormatError::Decompress { what });
                }
            }
            _ => return Err(FormatError::Decompress { what }),
        }
        Ok(())
    }

    /// The id of the dictionary without which this cannot be unpacked.
    pub fn needs_dictionary(&self) -> Option<u32> {
        (self.codec == codec_id::ZSTD_DICTIONARY).then_some(self.dictionary)
    }
}

/// Lets `write` write up to `room` bytes behind those of `out`.
fn append(
    room: usize,
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut std::io::Cursor<Vec<u8>>) -> SafeResult,
) -> SafeResult {
    out.reserve(room);
    let mut spare = std::io::Cursor::new(std::mem::take(out));
    spare.set_position(spare.get_ref().len() as u64);
    let result = write(&mut spare);
    *out = spare.into_inner();
    result
}

/// Dictionaries that an unpacker keeps; a store has three of each time that it was trained and not compacted since.
const DICTIONARIES_KEPT: usize = 64;

/// A reusable decompression context, with the dictionaries that have been met.
pub struct Unpacker {
    zstd: DCtx<'static>,
    /// The newest last.
    dictionaries: Vec<Arc<Dictionary>>,
}

impl Default for Unpacker {
    fn default() -> Self {
        let zstd = DCtx::try_create().expect("memory for a decompression context");
        Self { zstd, dictionaries: Vec::new() }
    }
}

impl Unpacker {
    pub fn knows_dictionary(&self, id: u32) -> bool {
        self.dictionaries.iter().any(|dictionary| dictionary.id == id)
    }

    pub(crate) fn dictionary(&self, id: u32) -> Option<Arc<Dictionary>> {
        self.dictionaries.iter().find(|dictionary| dictionary.id == id).cloned()
    }

    /// Decompresses a frame that needs no dictionary, and whose bytes have been verified, to `out`, which it fills.
    pub(crate) fn unpack_exactly(
        &mut self,
        what: &'static str,
        stored: &[u8],
        out: &mut [u8],
    ) -> Result<(), FormatError> {
        let len = self.zstd.decompress(out, stored);
        if len.ok() == Some(out.len()) { Ok(()) } else { Err(FormatError::Decompress { what }) }
    }

    /// Keeps a dictionary, unless it is known.
    pub fn add_dictionary(&mut self, dictionary: Arc<Dictionary>) {
        if self.knows_dictionary(dictionary.id) {
            return;
        }
        if self.dictionaries.len() == DICTIONARIES_KEPT {
            self.dictionaries.remove(0);
        }
        self.dictionaries.push(dictionary);
    }
}

/// A reusable compression context, level 1 before the log.
pub struct Packer {
    zstd: CCtx<'static>,
    dictionaries: Option<Arc<DictionarySet>>,
    /// Dictionaries are used at the level of compaction.
    is_thorough: bool,
}

/// Below this a frame is stored raw without trying.
const COMPRESS_FROM_BYTES: usize = 128;
/// The same where a dictionary may know what is in it.
const COMPRESS_FROM_BYTES_WITH_DICTIONARY: usize = 32;

impl Default for Packer {
    fn default() -> Self {
        Self::new(LOG_LEVEL)
    }
}

impl Packer {
    pub fn new(level: i32) -> Self {
        let mut zstd = CCtx::try_create().expect("memory for a compression context");
        zstd.set_parameter(CParameter::CompressionLevel(level)).expect("a level of zstd");
        Self { zstd, dictionaries: None, is_thorough: false }
    }

    /// One for what is written anew when there is time for it.
    pub(crate) fn for_compaction() -> Self {
        Self { is_thorough: true, ..Self::new(COMPACTION_LEVEL) }
    }

    /// Uses these for what is packed from now on; `None` for none.
    pub fn use_dictionaries(&mut self, dictionaries: Option<Arc<DictionarySet>>) {
        self.dictionaries = dictionaries;
    }

    pub(crate) fn dictionaries(&self) -> Option<&Arc<DictionarySet>> {
        self.dictionaries.as_ref()
    }

    /// Appends `raw` to `out` as a frame: compressed where that saves a tenth, else raw.
    pub fn pack(&mut self, raw: &[u8], out: &mut Vec<u8>) -> FrameInfo {
        self.pack_with(None, raw, out)
    }

    /// As [`Packer::pack`], with the dictionary of this kind if there is one.
    pub fn pack_as(&mut self, kind: DictionaryKind, raw: &[u8], out: &mut Vec<u8>) -> FrameInfo {
        let dictionary = self.dictionaries.as_ref().and_then(|set| set.of_kind(kind)).cloned();
        self.pack_with(dictionary.as_deref(), raw, out)
    }

    fn pack_with(&mut self, dictionary: Option<&Dictionary>, raw: &[u8], out: &mut Vec<u8>) -> FrameInfo {
        let raw_len = u32::try_from(raw.len()).expect("frames are bounded");
        let start = out.len();
        let mut info = FrameInfo { codec: codec_id::RAW, raw_len, ..FrameInfo::NONE };
        let id = dictionary.map_or(0, |dictionary| dictionary.id);
        let dictionary = dictionary
            .and_then(|dictionary| if self.is_thorough { dictionary.thorough_encoder() } else { dictionary.encoder() });
        let from = if dictionary.is_some() { COMPRESS_FROM_BYTES_WITH_DICTIONARY } else { COMPRESS_FROM_BYTES };
        if raw.len() >= from {
            let zstd = &mut self.zstd;
            let packed = append(compress_bound(raw.len()), out, |spare| match dictionary {
                Some(dictionary) => zstd.compress_using_cdict(spare, raw, dictionary),
                None => zstd.compress2(spare, raw),
            });
            match packed {
                Ok(len) if len < raw.len() - raw.len() / 10 => {
                    out.truncate(start + len);
                    (info.codec, info.dictionary) =
                        if dictionary.is_some() { (codec_id::ZSTD_DICTIONARY, id) } else { (codec_id::ZSTD, 0) };
                }
                _ => out.truncate(start),
            }
        }
        if info.codec == codec_id::RAW {
            out.extend_from_slice(raw);
        }
        let stored = &out[start..];
        FrameInfo { stored_len: stored.len() as u32, checksum: checksum(stored), ..info }
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
    fn a_dictionary_saves_what_it_knows_and_is_needed_again() {
        let known: Vec<u8> = (0..400_u32).flat_map(|n| format!("X-Field-{n}: {}; ", n * 7919).into_bytes()).collect();
        let dictionary = Arc::new(Dictionary::new(DictionaryKind::Header, 3, known.clone()));
        let set = DictionarySet::newest_of(&[Arc::clone(&dictionary)]).expect("a set of one");
        assert_eq!((set.generation(), set.of_kind(DictionaryKind::Body)), (3, None));
        let mut packer = Packer::default();
        packer.use_dictionaries(Some(Arc::new(set)));
        let raw = &known[1000..1500];
        let mut out = Vec::new();
        let plain = packer.pack(raw, &mut out);
        assert_eq!(packer.pack_as(DictionaryKind::Body, raw, &mut out), plain, "there is none for bodies");
        let start = out.len();
        let info = packer.pack_as(DictionaryKind::Header, raw, &mut out);
        assert_eq!((info.codec, info.dictionary), (codec_id::ZSTD_DICTIONARY, dictionary.id));
        assert!(info.stored_len < plain.stored_len / 4, "{} and {} bytes", info.stored_len, plain.stored_len);
        let (mut unpacker, mut back) = (Unpacker::default(), b"there".to_vec());
        let missing = info.unpack("frame", &out[start..], &mut unpacker, &mut back);
        assert_eq!(missing, Err(FormatError::NoDictionary { what: "frame", id: dictionary.id }));
        unpacker.add_dictionary(dictionary);
        info.unpack("frame", &out[start..], &mut unpacker, &mut back).unwrap();
        assert_eq!(&back[5..], raw);
        // What needs none is not disturbed by it.
        back.clear();
        plain.unpack("frame", &out[..plain.stored_len as usize], &mut unpacker, &mut back).unwrap();
        assert_eq!(back, raw);
    }

    #[test]
    fn so_many_dictionaries_are_kept_and_the_oldest_go() {
        let mut unpacker = Unpacker::default();
        let dictionary =
            |number: u32| Arc::new(Dictionary::new(DictionaryKind::Body, 1, number.to_le_bytes().to_vec()));
        let known = |unpacker: &Unpacker, number| unpacker.knows_dictionary(dictionary(number).id);
        for number in 0..=DICTIONARIES_KEPT as u32 {
            unpacker.add_dictionary(dictionary(number));
            unpacker.add_dictionary(dictionary(number));
        }
        assert!(!known(&unpacker, 0) && known(&unpacker, 1) && known(&unpacker, DICTIONARIES_KEPT as u32));
    }

    /// Bytes that say they are a dictionary with tables and have none: a checksum does not make them one.
    #[test]
    fn a_dictionary_that_zstd_cannot_use_is_none() {
        let bytes = [&[0x37, 0xa4, 0x30, 0xec][..], &[0xff; 200]].concat();
        let dictionary = Arc::new(Dictionary::new(DictionaryKind::Body, 1, bytes));
        let mut packer = Packer::default();
        packer.use_dictionaries(DictionarySet::newest_of(&[Arc::clone(&dictionary)]).map(Arc::new));
        let (mut out, mut back) = (Vec::new(), Vec::new());
        let info = packer.pack_as(DictionaryKind::Body, &[b'z'; 1000], &mut out);
        assert_eq!((info.codec, info.needs_dictionary()), (codec_id::ZSTD, None));
        let mut unpacker = Unpacker::default();
        let (id, what) = (dictionary.id, "frame");
        unpacker.add_dictionary(dictionary);
        let info = FrameInfo { codec: codec_id::ZSTD_DICTIONARY, dictionary: id, ..info };
        assert_eq!(info.unpack(what, &out, &mut unpacker, &mut back), Err(FormatError::Decompress { what }));
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
