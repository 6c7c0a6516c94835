//! Storage that is slow, fails, and gives ambiguous results, around any other. The engine's tests run on it as well: what
//! holds on local files must hold on storage that is far away.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError, Wal};
use crate::ids::{Epoch, Position, ShardId};
use crate::io::Runtime;

/// How bad the storage is; rates are in parts of 65,536 of the calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Every call takes up to this much longer.
    pub delay_max: Duration,
    /// Appends that fail without having happened.
    pub failed_appends: u32,
    /// Appends that happen and yet report an unknown outcome.
    pub ambiguous_appends: u32,
    /// Blobs that are not put.
    pub failed_puts: u32,
    /// Blobs that are put while the caller is told otherwise.
    pub ambiguous_puts: u32,
    /// Reads that fail and would succeed if tried again.
    pub failed_reads: u32,
}

/// A policy that can be changed while the storage is in use.
#[derive(Clone, Debug, Default)]
pub struct SharedPolicy(Rc<Cell<Policy>>);

impl SharedPolicy {
    pub fn set(&self, policy: Policy) {
        self.0.set(policy);
    }
}

/// Bad storage.
#[derive(Clone)]
pub struct Faulty<S: Storage> {
    inner: S,
    policy: SharedPolicy,
}

/// A part of bad storage.
#[derive(Clone)]
pub struct FaultyPart<S: Storage, P: Clone> {
    part: P,
    storage: Faulty<S>,
}

impl<S: Storage> Faulty<S> {
    pub fn new(inner: S, policy: SharedPolicy) -> Self {
        Self { inner, policy }
    }

    async fn delay(&self) {
        let longest = self.policy.0.get().delay_max.as_micros() as u64;
        if longest > 0 {
            self.inner.sleep(Duration::from_micros(self.inner.random() % longest)).await;
        }
    }

    fn strikes(&self, rate: impl FnOnce(Policy) -> u32) -> bool {
        let rate = rate(self.policy.0.get());
        rate > 0 && (self.inner.random() & 0xffff) < u64::from(rate)
    }

    fn part<P: Clone>(&self, part: P) -> FaultyPart<S, P> {
        FaultyPart { part, storage: self.clone() }
    }
}

fn failed(what: &str) -> StorageError {
    StorageError::Failed { what: what.to_owned(), source: io::Error::other("injected failure") }
}

fn ambiguous(what: &str) -> StorageError {
    StorageError::Ambiguous { what: what.to_owned(), source: io::Error::from(io::ErrorKind::TimedOut) }
}

impl<S: Storage, P: Wal> Wal for FaultyPart<S, P> {
    async fn begin(&self, name: SegmentName, header: Vec<u8>, reserve_bytes: u64) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.begin(name, header, reserve_bytes).await
    }

    async fn append(
        &self,
        name: SegmentName,
        offset: u64,
        batch: Vec<u8>,
        durable: bool,
    ) -> (Result<(), StorageError>, Vec<u8>) {
        self.storage.delay().await;
        if self.storage.strikes(|policy| policy.failed_appends) {
            return (Err(failed("append")), batch);
        }
        let (result, batch) = self.part.append(name, offset, batch, durable).await;
        self.storage.delay().await;
        if result.is_ok() && self.storage.strikes(|policy| policy.ambiguous_appends) {
            return (Err(ambiguous("append")), batch);
        }
        (result, batch)
    }

    async fn sync(&self, name: SegmentName) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.sync(name).await
    }

    async fn seal(&self, name: SegmentName, data_end: u64, footer: Vec<u8>) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.seal(name, data_end, footer).await
    }

    async fn adopt(&self, name: SegmentName) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.adopt(name).await
    }

    async fn list(&self) -> Result<Vec<SegmentName>, StorageError> {
        self.storage.delay().await;
        self.part.list().await
    }

    async fn len(&self, name: SegmentName) -> Result<u64, StorageError> {
        self.storage.delay().await;
        self.part.len(name).await
    }

    async fn next_data(&self, name: SegmentName, offset: u64) -> Result<u64, StorageError> {
        self.storage.delay().await;
        self.part.next_data(name, offset).await
    }

    async fn read(&self, name: SegmentName, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.storage.delay().await;
        if self.storage.strikes(|policy| policy.failed_reads) {
            return Err(failed("read"));
        }
        self.part.read(name, offset, len).await
    }

    async fn free_bytes(&self) -> Result<u64, StorageError> {
        self.storage.delay().await;
        self.part.free_bytes().await
    }

    async fn set_aside(&self, bytes: u64) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.set_aside(bytes).await
    }

    async fn release(&self) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.release().await
    }

    async fn discard(&self, name: SegmentName) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.discard(name).await
    }
}

impl<S: Storage, P: BlobStore> BlobStore for FaultyPart<S, P> {
    async fn put(&self, name: BlobName, parts: Vec<Vec<u8>>) -> Result<(), StorageError> {
        self.storage.delay().await;
        if self.storage.strikes(|policy| policy.failed_puts) {
            return Err(failed("put"));
        }
        self.part.put(name, parts).await?;
        if self.storage.strikes(|policy| policy.ambiguous_puts) {
            return Err(ambiguous("put"));
        }
        Ok(())
    }

    async fn get(&self, name: BlobName, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.storage.delay().await;
        if self.storage.strikes(|policy| policy.failed_reads) {
            return Err(failed("get"));
        }
        self.part.get(name, offset, len).await
    }

    async fn get_suffix(&self, name: BlobName, len: usize) -> Result<(Vec<u8>, u64), StorageError> {
        self.storage.delay().await;
        self.part.get_suffix(name, len).await
    }

    async fn list(&self) -> Result<Vec<BlobName>, StorageError> {
        self.storage.delay().await;
        self.part.list().await
    }

    fn close(&self, name: BlobName) {
        self.part.close(name);
    }

    async fn keep(&self, name: BlobName) -> Result<String, StorageError> {
        self.storage.delay().await;
        self.part.keep(name).await
    }

    async fn replace_footer(&self, name: SegmentName, data_end: u64, footer: Vec<u8>) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.replace_footer(name, data_end, footer).await
    }

    async fn delete(&self, name: BlobName) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.delete(name).await
    }
}

impl<S: Storage, P: ManifestStore> ManifestStore for FaultyPart<S, P> {
    async fn claim(&self) -> Result<Epoch, StorageError> {
        self.storage.delay().await;
        self.part.claim().await
    }

    async fn commit(&self, epoch: Epoch, number: u64, bytes: Vec<u8>) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.commit(epoch, number, bytes).await?;
        if self.storage.strikes(|policy| policy.ambiguous_puts) {
            return Err(ambiguous("commit"));
        }
        Ok(())
    }

    async fn latest(&self) -> Result<Option<(Epoch, u64, Vec<u8>)>, StorageError> {
        self.storage.delay().await;
        self.part.latest().await
    }

    async fn tidy(&self, epoch: Epoch, number: u64) -> Result<(), StorageError> {
        self.storage.delay().await;
        self.part.tidy(epoch, number).await
    }
}

impl<S: Storage> Runtime for Faulty<S> {
    fn now(&self) -> Duration {
        self.inner.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        self.inner.wall_clock_ms()
    }

    fn random(&self) -> u64 {
        self.inner.random()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.inner.spawn(task);
    }

    async fn yield_now(&self) {
        self.inner.yield_now().await;
    }

    async fn sleep(&self, duration: Duration) {
        self.inner.sleep(duration).await;
    }

    async fn offload<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.inner.offload(job).await
    }

    async fn background<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.inner.background(job).await
    }
}

impl<S: Storage> Storage for Faulty<S> {
    type Wal = FaultyPart<S, S::Wal>;
    type Blobs = FaultyPart<S, S::Blobs>;
    type Manifests = FaultyPart<S, S::Manifests>;

    async fn prepare(&self, shard: ShardId) -> Result<(), StorageError> {
        self.inner.prepare(shard).await
    }

    fn wal(&self, shard: ShardId) -> Self::Wal {
        self.part(self.inner.wal(shard))
    }

    fn blobs(&self, shard: ShardId) -> Self::Blobs {
        self.part(self.inner.blobs(shard))
    }

    fn manifests(&self, shard: ShardId) -> Self::Manifests {
        self.part(self.inner.manifests(shard))
    }

    fn describe(&self, shard: ShardId, name: SegmentName, position: Position) -> String {
        self.inner.describe(shard, name, position)
    }

    async fn read_superblock(&self) -> Result<Option<Vec<u8>>, StorageError> {
        self.inner.read_superblock().await
    }

    async fn create_superblock(&self, bytes: Vec<u8>) -> Result<(), StorageError> {
        self.inner.create_superblock(bytes).await
    }
}
