//! Compression dictionaries: what messages of a store have in common, so that each need not say it again.
//!
//! There is one for digests, one for headers, one for bodies. A segment embeds those that its frames name, so that it can
//! be read without any other file.

use std::fmt;
use std::sync::{Arc, OnceLock};

use zstd::zstd_safe::{CDict, DDict};

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

/// The level at which compaction writes them anew.
pub const COMPACTION_LEVEL: i32 = 6;

/// A dictionary with what compression and decompression prepare from it, made when first needed.
pub struct Dictionary {
    pub id: u32,
    pub kind: DictionaryKind,
    /// How many times dictionaries had been trained in this store, this time included.
    pub generation: u32,
    bytes: Box<[u8]>,
    /// `None`: zstd cannot use it, though its checksum is good.
    encoder: OnceLock<Option<CDict<'static>>>,
    thorough_encoder: OnceLock<Option<CDict<'static>>>,
    decoder: OnceLock<Option<DDict<'static>>>,
}

impl Dictionary {
    /// A dictionary of bytes in the format of zstd, or of any bytes. Its id is derived from them.
    pub fn new(kind: DictionaryKind, generation: u32, bytes: Vec<u8>) -> Self {
        let id = Self::id_of(&bytes);
        let (encoder, thorough_encoder, decoder) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self { id, kind, generation, bytes: bytes.into(), encoder, thorough_encoder, decoder }
    }

    /// The id of a dictionary of these bytes. 0 stands for no dictionary.
    pub fn id_of(bytes: &[u8]) -> u32 {
        let mut prefix = [0; 4];
        prefix.copy_from_slice(&blake3::hash(bytes).as_bytes()[..4]);
        u32::from_le_bytes(prefix).max(1)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn checksum(&self) -> u32 {
        checksum(&self.bytes)
    }

    /// Makes what compression and decompression need: some milliseconds for a large one.
    pub(crate) fn prepare(&self) {
        self.encoder();
        self.decoder();
    }

    pub(crate) fn encoder(&self) -> Option<&CDict<'static>> {
        self.encoder.get_or_init(|| CDict::try_create(&self.bytes, LOG_LEVEL)).as_ref()
    }

    pub(crate) fn thorough_encoder(&self) -> Option<&CDict<'static>> {
        self.thorough_encoder.get_or_init(|| CDict::try_create(&self.bytes, COMPACTION_LEVEL)).as_ref()
    }

    pub(crate) fn decoder(&self) -> Option<&DDict<'static>> {
        self.decoder.get_or_init(|| DDict::try_create(&self.bytes)).as_ref()
    }
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

    /// These, and those of kinds that only the other set of the same generation has.
    pub(crate) fn completed_by(&self, other: &Self) -> Self {
        let missing = other.iter().filter(|dictionary| self.of_kind(dictionary.kind).is_none());
        Self { dictionaries: self.dictionaries.iter().chain(missing).cloned().collect() }
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
