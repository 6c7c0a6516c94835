//! What the engine sees of storage: a log that appends batches, blobs that are written once, and manifests.
//!
//! No path, descriptor or map stands above these traits. Every call is async, may take 100 ms, may fail, and a write may
//! end with its outcome unknown. What only reads comes to an end in bounded time, if only with [`StorageError::NoAnswer`]:
//! who reads may hold what others wait for. What writes may take for ever, because giving it up would not end it. The local implementation is [`local::Local`]; an object store fits behind the same
//! traits, with put-if-absent as its only fence.

pub mod faulty;
pub mod local;

use std::future::Future;
use std::io;
use std::time::Duration;

use crate::ids::{Epoch, Position, SegmentId, ShardId};
use crate::io::Runtime;

/// A segment's name: ids are never reused in a shard, and the epoch keeps writers of different terms apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub segment: SegmentId,
    pub epoch: Epoch,
}

/// A blob's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BlobName {
    /// A sealed segment.
    Segment(SegmentName),
    /// Index pages, numbered like segments but on their own.
    Index { blob: u32, epoch: Epoch },
}

/// Why storage did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("{0} does not exist")]
    NotFound(String),
    #[error("{0} exists already")]
    AlreadyExists(String),
    /// There is no room; nothing of what was asked for counts.
    #[error("no space left for {0}: free space on the device, or expunge and compact")]
    NoSpace(String),
    /// It failed and may not be retried on the same log.
    #[error("{what}: {source}")]
    Failed { what: String, source: io::Error },
    /// A read did not come to its end in time. It changes nothing, and may be tried again.
    #[error("{what}: no answer within {} s", limit.as_secs_f32())]
    NoAnswer { what: String, limit: Duration },
    /// It may or may not have happened.
    #[error("{what}: the outcome is unknown: {source}")]
    Ambiguous { what: String, source: io::Error },
}

/// The log of a shard, written by one epoch at a time.
pub trait Wal: Clone + 'static {
    /// Begins a segment with its header. On return header and name are durable, and `reserve_bytes` are set aside.
    ///
    /// # Errors
    /// After [`StorageError::NoSpace`] the segment does not exist. After any other error it may.
    fn begin(
        &self,
        name: SegmentName,
        header: Vec<u8>,
        reserve_bytes: u64,
    ) -> impl Future<Output = Result<(), StorageError>>;

    /// Writes a batch at its place in an unsealed segment. On return it is durable if `durable` is set; the buffer comes
    /// back either way.
    ///
    /// # Errors
    /// Whatever the error, the batch may be there or not: the segment ends before it. After [`StorageError::NoSpace`] it can be
    /// sealed there; after any other nothing more may be written to it.
    fn append(
        &self,
        name: SegmentName,
        offset: u64,
        batch: Vec<u8>,
        durable: bool,
    ) -> impl Future<Output = (Result<(), StorageError>, Vec<u8>)>;

    /// Makes what can be read of an unsealed segment durable.
    fn sync(&self, name: SegmentName) -> impl Future<Output = Result<(), StorageError>>;

    /// Ends an unsealed segment at `data_end` with `footer` and adopts it as a blob, in place. Durable on return.
    /// Sealing again after a crash in the middle, or after [`StorageError::NoSpace`], gives the same result.
    fn seal(&self, name: SegmentName, data_end: u64, footer: Vec<u8>)
    -> impl Future<Output = Result<(), StorageError>>;

    /// Makes the name of a segment that somebody else has sealed durable.
    fn adopt(&self, name: SegmentName) -> impl Future<Output = Result<(), StorageError>>;

    /// The unsealed segments, in no order: a hint.
    fn list(&self) -> impl Future<Output = Result<Vec<SegmentName>, StorageError>>;

    /// The length of an unsealed segment, reserved space included.
    fn len(&self, name: SegmentName) -> impl Future<Output = Result<u64, StorageError>>;

    /// The first offset at or after `offset` that may hold anything but zeroes: space that was reserved and never written
    /// may be passed over. The segment's length if there is none.
    fn next_data(&self, name: SegmentName, offset: u64) -> impl Future<Output = Result<u64, StorageError>>;

    /// Bytes of an unsealed segment; fewer only at its end.
    fn read(&self, name: SegmentName, offset: u64, len: usize) -> impl Future<Output = Result<Vec<u8>, StorageError>>;

    /// Bytes that can still be written to where the log is.
    fn free_bytes(&self) -> impl Future<Output = Result<u64, StorageError>>;

    /// Keeps at least so many bytes of space in reserve for this shard, until [`Wal::release`].
    ///
    /// # Errors
    /// [`StorageError::NoSpace`] if there is not so much; nothing is in reserve then.
    fn set_aside(&self, bytes: u64) -> impl Future<Output = Result<(), StorageError>>;

    /// Gives the reserve up, so that its space can be used.
    fn release(&self) -> impl Future<Output = Result<(), StorageError>>;

    /// Removes an unsealed segment that does not count.
    fn discard(&self, name: SegmentName) -> impl Future<Output = Result<(), StorageError>>;
}

/// Things that are written once and never changed.
pub trait BlobStore: Clone + 'static {
    /// Puts a new blob in parts, at most 8 MB each. It exists, durable and whole, when this returns.
    fn put(&self, name: BlobName, parts: Vec<Vec<u8>>) -> impl Future<Output = Result<(), StorageError>>;

    /// Bytes of a blob; fewer only at its end.
    fn get(&self, name: BlobName, offset: u64, len: usize) -> impl Future<Output = Result<Vec<u8>, StorageError>>;

    /// The last bytes of a blob and its whole length.
    fn get_suffix(&self, name: BlobName, len: usize) -> impl Future<Output = Result<(Vec<u8>, u64), StorageError>>;

    /// The blobs there are, in no order: a hint.
    fn list(&self) -> impl Future<Output = Result<Vec<BlobName>, StorageError>>;

    /// Lets go of what is kept open for reading a blob. The next read opens it again.
    fn close(&self, name: BlobName);

    /// Keeps a blob as it is, under another name that nobody will touch, which is given back. Durable on return.
    fn keep(&self, name: BlobName) -> impl Future<Output = Result<String, StorageError>>;

    /// Gives a segment another end: a copy of its first `data_end` bytes, zeroes where it has fewer, with `footer` behind them
    /// takes its name in one step.
    /// Durable on return; who had the old one open may read on.
    fn replace_footer(
        &self,
        name: SegmentName,
        data_end: u64,
        footer: Vec<u8>,
    ) -> impl Future<Output = Result<(), StorageError>>;

    /// Removes a blob that no manifest names any more. Readers that have it open can read on.
    fn delete(&self, name: BlobName) -> impl Future<Output = Result<(), StorageError>>;
}

/// The terms of ownership and the manifests of a shard.
pub trait ManifestStore: Clone + 'static {
    /// Claims the next epoch above every claimed one. Durable on return; nobody else has it.
    fn claim(&self) -> impl Future<Output = Result<Epoch, StorageError>>;

    /// Commits manifest `number` of an epoch, if nobody has. Durable on return.
    fn commit(&self, epoch: Epoch, number: u64, bytes: Vec<u8>) -> impl Future<Output = Result<(), StorageError>>;

    /// The highest manifest there is.
    fn latest(&self) -> impl Future<Output = Result<Option<(Epoch, u64, Vec<u8>)>, StorageError>>;

    /// Removes manifests and claims that a newer one has replaced, keeping the one before it.
    fn tidy(&self, epoch: Epoch, number: u64) -> impl Future<Output = Result<(), StorageError>>;
}

/// The storage of all shards: the engine's one type parameter.
pub trait Storage: Runtime {
    type Wal: Wal;
    type Blobs: BlobStore;
    type Manifests: ManifestStore;

    /// Makes the places of a shard, durably; they may exist. What puts that never finished have left is removed.
    fn prepare(&self, shard: ShardId) -> impl Future<Output = Result<(), StorageError>>;
    fn wal(&self, shard: ShardId) -> Self::Wal;
    fn blobs(&self, shard: ShardId) -> Self::Blobs;
    fn manifests(&self, shard: ShardId) -> Self::Manifests;

    /// How errors and reports name a position: a file below the data directory, or an object.
    fn describe(&self, shard: ShardId, name: SegmentName, position: Position) -> String;

    /// Reads the store's own description, if there is one.
    fn read_superblock(&self) -> impl Future<Output = Result<Option<Vec<u8>>, StorageError>>;

    /// Writes the store's own description, once.
    fn create_superblock(&self, bytes: Vec<u8>) -> impl Future<Output = Result<(), StorageError>>;
}
