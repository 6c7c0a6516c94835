//! Compression dictionaries: what messages of a store have in common, so that each need not say it again.
//!
//! There is one for digests, one for headers, one for bodies. A segment embeds those that its frames name, so that it can
//! be read without any other file.

use std::fmt;
use std::sync::{Arc, OnceLock};

use zstd::dict::{DecoderDictionary, EncoderDictionary};

use super::checksum;

/// What a dictionary is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DictionaryKind {
    Digest,
    Header,
    Body,
}

impl DictionaryKind {
    pub const ALL: [Self; 3] = [Self::Digest, Self::Header, Self::Body];

    /// How segments name it.
    pub fn number(self) -> u32 {
        match self {
            Self::Digest => 1,
            Self::Header => 2,
            Self::Body => 3,
        }
    }

    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }
}

/// The largest dictionary that is written or read.
pub const DICTIONARY_BYTES_MAX: usize = 256 << 10;

/// The level at which messages are compressed before the log.
pub const LOG_LEVEL: i32 = 1;

/// A dictionary with what compression and decompression prepare from it, made when first needed.
pub struct Dictionary {
    pub id: u32,
    pub kind: DictionaryKind,
    /// How many times dictionaries had been trained in this store, this time included.
    pub generation: u32,
    bytes: Box<[u8]>,
    encoder: OnceLock<EncoderDictionary<'static>>,
    decoder: OnceLock<DecoderDictionary<'static>>,
}

impl Dictionary {
    /// A dictionary of bytes in the format of zstd, or of any bytes. Its id is derived from them.
    pub fn new(kind: DictionaryKind, generation: u32, bytes: Vec<u8>) -> Self {
        // 0 stands for no dictionary.
        let id = u32::from_le_bytes(blake3_prefix(&bytes)).max(1);
        Self::with_id(id, kind, generation, bytes)
    }

    pub(crate) fn with_id(id: u32, kind: DictionaryKind, generation: u32, bytes: Vec<u8>) -> Self {
        let (bytes, encoder, decoder) = (bytes.into(), OnceLock::new(), OnceLock::new());
        Self { id, kind, generation, bytes, encoder, decoder }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn checksum(&self) -> u32 {
        checksum(&self.bytes)
    }

    pub(crate) fn encoder(&self) -> &EncoderDictionary<'static> {
        self.encoder.get_or_init(|| EncoderDictionary::copy(&self.bytes, LOG_LEVEL))
    }

    pub(crate) fn decoder(&self) -> &DecoderDictionary<'static> {
        self.decoder.get_or_init(|| DecoderDictionary::copy(&self.bytes))
    }
}

fn blake3_prefix(bytes: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(bytes);
    let mut prefix = [0; 4];
    prefix.copy_from_slice(&hash.as_bytes()[..4]);
    prefix
}

impl PartialEq for Dictionary {
    fn eq(&self, other: &Self) -> bool {
        (self.id, self.kind, self.generation) == (other.id, other.kind, other.generation) && self.bytes == other.bytes
    }
}

impl Eq for Dictionary {}

impl fmt::Debug for Dictionary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, kind, generation, bytes, .. } = self;
        write!(formatter, "{kind:?} dictionary {id:08x} of generation {generation}, {} bytes", bytes.len())
    }
}

/// Dictionaries that were trained together, one of a kind; some kinds may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DictionarySet {
    dictionaries: Vec<Arc<Dictionary>>,
}

impl DictionarySet {
    /// The newest generation among these.
    pub fn newest_of(dictionaries: &[Arc<Dictionary>]) -> Option<Self> {
        let generation = dictionaries.iter().map(|dictionary| dictionary.generation).max()?;
        let newest = dictionaries.iter().filter(|dictionary| dictionary.generation == generation);
        Some(Self { dictionaries: newest.cloned().collect() })
    }

    pub fn generation(&self) -> u32 {
        self.dictionaries.first().map_or(0, |dictionary| dictionary.generation)
    }

    pub fn of_kind(&self, kind: DictionaryKind) -> Option<&Arc<Dictionary>> {
        self.dictionaries.iter().find(|dictionary| dictionary.kind == kind)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Dictionary>> {
        self.dictionaries.iter()
    }
}
