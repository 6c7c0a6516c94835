//! Storage in files below one directory. `docs/format.md` lists them.
//!
//! Whatever is put once is written under a temporary name, synced, linked to its name (which fails if the name is
//! taken), and its directory synced.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use super::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError, Wal};
use crate::ids::{Epoch, Position, SegmentId, ShardId};
use crate::io::{File, Io, OpenMode, Runtime};
use crate::planted::{self, Bug};

const SUPERBLOCK: &str = "store";
/// Ends the names of files that are being written.
const TEMPORARY: &str = ".tmp";
/// The directory for what a repair has replaced. Nothing reads it.
const LOST_AND_FOUND: &str = "lost+found";
/// Files are copied in pieces of this size.
const COPY_BYTES: usize = 1 << 20;
/// The file that keeps space in reserve.
const RESERVE: &str = "reserve";

/// A read is given up after so long, unless configured: longer than a disk takes that has to try again and again.
pub const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Storage in local files.
#[derive(Clone)]
pub struct Local<I: Io> {
    io: I,
    read_timeout: Duration,
    shards: Rc<RefCell<BTreeMap<ShardId, LocalShard<I>>>>,
}

/// The files of one shard: its log, blobs and manifests.
pub struct LocalShard<I: Io> {
    io: I,
    read_timeout: Duration,
    directory: Rc<str>,
    /// Open segments and index blobs. A sealed segment stays under its name: the file is the same.
    open: Rc<RefCell<BTreeMap<BlobName, I::File>>>,
}

impl<I: Io> Clone for LocalShard<I> {
    fn clone(&self) -> Self {
        Self {
            io: self.io.clone(),
            read_timeout: self.read_timeout,
            directory: Rc::clone(&self.directory),
            open: Rc::clone(&self.open),
        }
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> StorageError {
    move |source| {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::NotFound => StorageError::NotFound(what),
            io::ErrorKind::AlreadyExists => StorageError::AlreadyExists(what),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StorageError::NoSpace(what),
            _ => StorageError::Failed { what, source },
        }
    }
}

impl<I: Io> Local<I> {
    pub fn new(io: I) -> Self {
        Self::with_read_timeout(io, READ_TIMEOUT)
    }

    /// Gives reads up after another time than [`READ_TIMEOUT`].
    pub fn with_read_timeout(io: I, read_timeout: Duration) -> Self {
        Self { io, read_timeout, shards: Rc::default() }
    }

    fn shard(&self, shard: ShardId) -> LocalShard<I> {
        let mut shards = self.shards.borrow_mut();
        let entry = shards.entry(shard).or_insert_with(|| LocalShard {
            io: self.io.clone(),
            read_timeout: self.read_timeout,
            directory: shard_directory(shard).into(),
            open: Rc::default(),
        });
        entry.clone()
    }
}

/// The directory of a shard.
pub fn shard_directory(shard: ShardId) -> String {
    format!("shard-{:04}", shard.0)
}

/// The file name of a segment in `wal` or `seg`.
pub fn segment_file(name: SegmentName) -> String {
    format!("{:010}-{:08}", name.segment.0, name.epoch.0)
}

/// The file name of an index blob in `idx`.
pub fn index_file(blob: u32, epoch: Epoch) -> String {
    format!("{blob:010}-{:08}", epoch.0)
}

fn parse_two(file: &str) -> Option<(u32, u32)> {
    let (first, second) = file.split_once('-')?;
    (first.len() == 10 && second.len() == 8).then_some(())?;
    Some((first.parse().ok()?, second.parse().ok()?))
}

/// Reads a file name made by [`segment_file`].
pub fn parse_segment_file(file: &str) -> Option<SegmentName> {
    parse_two(file).map(|(segment, epoch)| SegmentName { segment: SegmentId(segment), epoch: Epoch(epoch) })
}

fn manifest_file(epoch: Epoch, number: u64) -> String {
    format!("{:08}-{number:020}", epoch.0)
}

fn parse_manifest_file(file: &str) -> Option<(Epoch, u64)> {
    let (epoch, number) = file.split_once('-')?;
    Some((Epoch(epoch.parse().ok()?), number.parse().ok()?))
}

/// Waits for a read no longer than `limit`. Its file may be on a device that never answers; the operation then stays behind,
/// unobserved.
async fn in_time<I: Io, T>(
    io: &I,
    limit: Duration,
    what: impl FnOnce() -> String,
    read: impl Future<Output = Result<T, StorageError>>,
) -> Result<T, StorageError> {
    let mut read = pin!(read);
    // What is in memory is there at once, and needs no clock.
    if let Poll::Ready(result) = std::future::poll_fn(|context| Poll::Ready(read.as_mut().poll(context))).await {
        return result;
    }
    let mut clock = pin!(io.sleep(limit));
    let in_time = std::future::poll_fn(|context| {
        if let Poll::Ready(result) = read.as_mut().poll(context) {
            return Poll::Ready(Some(result));
        }
        if planted::is_on(Bug::WaitForEver) {
            return Poll::Pending;
        }
        clock.as_mut().poll(context).map(|()| None)
    });
    in_time.await.unwrap_or_else(|| Err(StorageError::NoAnswer { what: what(), limit }))
}

/// Removes a file that may not be there.
async fn remove_if_there<I: Io>(io: &I, path: &str) -> io::Result<()> {
    match io.remove(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes a new file under `path`, all of it durable on return, or not at all.
async fn put_new<I: Io>(io: &I, directory: &str, file: &str, parts: Vec<Vec<u8>>) -> Result<(), StorageError> {
    let path = format!("{directory}/{file}");
    let temporary = format!("{directory}/{file}{TEMPORARY}");
    // A crash may have left one behind; nothing refers to it.
    remove_if_there(io, &temporary).await.map_err(failed(&temporary))?;
    let written = async {
        let file = io.open(&temporary, OpenMode::CreateNew).await?;
        let mut offset = 0;
        for part in parts {
            let len = part.len() as u64;
            file.write_at(part, offset).await.0?;
            offset += len;
        }
        file.sync_data().await?;
        io.link(&temporary, &path).await
    }
    .await;
    if let Err(error) = written {
        // Where space ran out, it must not keep any. That this fails too is no news.
        let _ = remove_if_there(io, &temporary).await;
        return Err(failed(path)(error));
    }
    // From here on it may be there after a crash, whatever happens.
    let named = async {
        io.remove(&temporary).await?;
        io.sync_dir(directory).await
    };
    named.await.map_err(|source| StorageError::Ambiguous { what: path, source })
}

impl<I: Io> LocalShard<I> {
    fn path(&self, name: BlobName, sealed: bool) -> String {
        let directory = &self.directory;
        match name {
            BlobName::Segment(name) if sealed => format!("{directory}/seg/{}", segment_file(name)),
            BlobName::Segment(name) => format!("{directory}/wal/{}", segment_file(name)),
            BlobName::Index { blob, epoch } => format!("{directory}/idx/{}", index_file(blob, epoch)),
        }
    }

    async fn file(&self, name: BlobName, sealed: bool) -> Result<I::File, StorageError> {
        if let Some(file) = self.open.borrow().get(&name) {
            return Ok(file.clone());
        }
        let path = self.path(name, sealed);
        let mode = match name {
            BlobName::Index { .. } => OpenMode::ReadPieces,
            BlobName::Segment(_) if sealed => OpenMode::Read,
            BlobName::Segment(_) => OpenMode::ReadWrite,
        };
        let file = self.io.open(&path, mode).await.map_err(failed(path))?;
        self.open.borrow_mut().insert(name, file.clone());
        Ok(file)
    }

    /// The files of a directory. A backup may lack directories that were empty.
    async fn list_files(&self, directory: String) -> Result<Vec<String>, StorageError> {
        let list = async {
            match self.io.list(&directory).await {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
                other => other.map_err(failed(&directory)),
            }
        };
        in_time(&self.io, self.read_timeout, || directory.clone(), list).await
    }

    /// Bytes of a segment or blob.
    async fn read_file(&self, name: BlobName, sealed: bool, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        let read = async {
            let file = self.file(name, sealed).await?;
            file.read_at(offset, len).await.map_err(|error| failed(self.path(name, sealed))(error))
        };
        in_time(&self.io, self.read_timeout, || self.path(name, sealed), read).await
    }

    fn sub(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }
}

impl<I: Io> Wal for LocalShard<I> {
    async fn begin(&self, name: SegmentName, header: Vec<u8>, reserve_bytes: u64) -> Result<(), StorageError> {
        let blob = BlobName::Segment(name);
        let path = self.path(blob, false);
        let result = async {
            let file = self.io.open(&path, OpenMode::CreateNew).await?;
            file.allocate(reserve_bytes.max(header.len() as u64)).await?;
            file.write_at(header, 0).await.0?;
            file.sync_data().await?;
            if !planted::is_on(Bug::SkipDirectorySync) {
                self.io.sync_dir(&self.sub("wal")).await?;
            }
            Ok(file)
        }
        .await;
        match result {
            Ok(file) => {
                self.open.borrow_mut().insert(blob, file);
                Ok(())
            }
            Err(error) => {
                let error = failed(&path)(error);
                if matches!(error, StorageError::NoSpace(_)) {
                    remove_if_there(&self.io, &path).await.map_err(failed(path))?;
                }
                Err(error)
            }
        }
    }

    async fn append(
        &self,
        name: SegmentName,
        offset: u64,
        batch: Vec<u8>,
        durable: bool,
    ) -> (Result<(), StorageError>, Vec<u8>) {
        let what = || format!("writing {} at offset {offset}", self.path(BlobName::Segment(name), false));
        let file = match self.file(BlobName::Segment(name), false).await {
            Ok(file) => file,
            Err(error) => return (Err(error), batch),
        };
        let (written, batch) = file.write_at(batch, offset).await;
        if let Err(source) = written {
            return (Err(failed(what())(source)), batch);
        }
        if durable
            && !planted::is_on(Bug::SkipSync)
            && !(name.segment.is_compacted() && planted::is_on(Bug::SkipCompactionSync))
            && let Err(source) = file.sync_data().await
            && !(planted::is_on(Bug::SyncAgain) && file.sync_data().await.is_ok())
        {
            return (Err(StorageError::Ambiguous { what: what(), source }), batch);
        }
        (Ok(()), batch)
    }

    async fn sync(&self, name: SegmentName) -> Result<(), StorageError> {
        let file = self.file(BlobName::Segment(name), false).await?;
        let path = self.path(BlobName::Segment(name), false);
        if !planted::is_on(Bug::TrustPageCache) {
            file.sync_data().await.map_err(failed(&path))?;
            self.io.sync_dir(&self.sub("wal")).await.map_err(failed(path))?;
        }
        Ok(())
    }

    async fn seal(&self, name: SegmentName, data_end: u64, footer: Vec<u8>) -> Result<(), StorageError> {
        let blob = BlobName::Segment(name);
        let (unsealed, sealed) = (self.path(blob, false), self.path(blob, true));
        // Also for want of space: what a failed sync leaves behind is not to be had by another.
        let unknown = |source| StorageError::Ambiguous { what: sealed.clone(), source };
        let file = match self.file(blob, false).await {
            Ok(file) => file,
            // A crash came after the rename.
            Err(StorageError::NotFound(_)) => {
                self.io.open(&sealed, OpenMode::Read).await.map_err(failed(&sealed))?;
                return self.io.sync_dir(&self.sub("seg")).await.map_err(unknown);
            }
            Err(error) => return Err(error),
        };
        let len = data_end + footer.len() as u64;
        file.write_at(footer, data_end).await.0.map_err(failed(&sealed))?;
        file.truncate(len).await.map_err(failed(&sealed))?;
        if !(name.segment.is_compacted() && planted::is_on(Bug::SkipCompactionSync)) {
            file.sync_data().await.map_err(unknown)?;
        }
        self.io.rename(&unsealed, &sealed).await.map_err(failed(&sealed))?;
        self.io.sync_dir(&self.sub("seg")).await.map_err(unknown)?;
        self.io.sync_dir(&self.sub("wal")).await.map_err(unknown)
    }

    async fn adopt(&self, name: SegmentName) -> Result<(), StorageError> {
        let result = async {
            self.io.sync_dir(&self.sub("seg")).await?;
            self.io.sync_dir(&self.sub("wal")).await
        };
        result.await.map_err(failed(self.path(BlobName::Segment(name), true)))
    }

    async fn list(&self) -> Result<Vec<SegmentName>, StorageError> {
        let directory = self.sub("wal");
        let files = self.list_files(directory).await?;
        Ok(files.iter().filter_map(|file| parse_segment_file(file)).collect())
    }

    async fn len(&self, name: SegmentName) -> Result<u64, StorageError> {
        let what = || self.path(BlobName::Segment(name), false);
        let len = async {
            let file = self.file(BlobName::Segment(name), false).await?;
            file.len().await.map_err(failed(what()))
        };
        in_time(&self.io, self.read_timeout, what, len).await
    }

    async fn next_data(&self, name: SegmentName, offset: u64) -> Result<u64, StorageError> {
        let what = || self.path(BlobName::Segment(name), false);
        let next = async {
            let file = self.file(BlobName::Segment(name), false).await?;
            file.next_data(offset).await.map_err(failed(what()))
        };
        in_time(&self.io, self.read_timeout, what, next).await
    }

    async fn read(&self, name: SegmentName, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.read_file(BlobName::Segment(name), false, offset, len).await
    }

    async fn free_bytes(&self) -> Result<u64, StorageError> {
        let what = || self.directory.to_string();
        let free = async { self.io.free_bytes().await.map_err(failed(what())) };
        in_time(&self.io, self.read_timeout, what, free).await
    }

    async fn set_aside(&self, bytes: u64) -> Result<(), StorageError> {
        let path = self.sub(RESERVE);
        let result = async {
            let file = match self.io.open(&path, OpenMode::CreateNew).await {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    self.io.open(&path, OpenMode::ReadWrite).await?
                }
                other => other?,
            };
            file.allocate(bytes).await?;
            // A crash must not forget it: the next start may need it.
            file.sync_data().await?;
            self.io.sync_dir(&self.directory).await
        };
        if let Err(error) = result.await {
            let error = failed(&path)(error);
            remove_if_there(&self.io, &path).await.map_err(failed(path))?;
            return Err(error);
        }
        Ok(())
    }

    async fn release(&self) -> Result<(), StorageError> {
        let path = self.sub(RESERVE);
        remove_if_there(&self.io, &path).await.map_err(failed(path))
    }

    async fn discard(&self, name: SegmentName) -> Result<(), StorageError> {
        let blob = BlobName::Segment(name);
        self.open.borrow_mut().remove(&blob);
        let path = self.path(blob, false);
        self.io.remove(&path).await.map_err(failed(path))
    }
}

impl<I: Io> BlobStore for LocalShard<I> {
    async fn put(&self, name: BlobName, parts: Vec<Vec<u8>>) -> Result<(), StorageError> {
        let path = self.path(name, true);
        let (directory, file) = path.rsplit_once('/').expect("blobs lie in directories");
        put_new(&self.io, directory, file, parts).await
    }

    async fn get(&self, name: BlobName, offset: u64, len: usize) -> Result<Vec<u8>, StorageError> {
        self.read_file(name, true, offset, len).await
    }

    async fn get_suffix(&self, name: BlobName, len: usize) -> Result<(Vec<u8>, u64), StorageError> {
        let read = async {
            let file = self.file(name, true).await?;
            let path = self.path(name, true);
            let file_len = file.len().await.map_err(failed(&path))?;
            let offset = file_len.saturating_sub(len as u64);
            let bytes = file.read_at(offset, len).await.map_err(failed(path))?;
            Ok((bytes, file_len))
        };
        in_time(&self.io, self.read_timeout, || self.path(name, true), read).await
    }

    async fn list(&self) -> Result<Vec<BlobName>, StorageError> {
        let mut names = Vec::new();
        let directory = self.sub("seg");
        let files = self.list_files(directory).await?;
        names.extend(files.iter().filter_map(|file| parse_segment_file(file)).map(BlobName::Segment));
        let directory = self.sub("idx");
        let files = self.list_files(directory).await?;
        let parsed = files.iter().filter_map(|file| parse_two(file));
        names.extend(parsed.map(|(blob, epoch)| BlobName::Index { blob, epoch: Epoch(epoch) }));
        Ok(names)
    }

    fn close(&self, name: BlobName) {
        self.open.borrow_mut().remove(&name);
    }

    async fn keep(&self, name: BlobName) -> Result<String, StorageError> {
        let (path, directory) = (self.path(name, true), self.sub(LOST_AND_FOUND));
        let file = path[self.directory.len() + 1..].replace('/', "-");
        let result = async {
            self.io.create_dir_all(&directory).await?;
            for number in 1.. {
                let kept = format!("{directory}/{file}.{number}");
                match self.io.link(&path, &kept).await {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    linked => {
                        linked?;
                        self.io.sync_dir(&directory).await?;
                        self.io.sync_dir(&self.directory).await?;
                        return Ok(kept);
                    }
                }
            }
            unreachable!("some number is free")
        };
        result.await.map_err(failed(path))
    }

    async fn replace_footer(&self, name: SegmentName, data_end: u64, footer: Vec<u8>) -> Result<(), StorageError> {
        let blob = BlobName::Segment(name);
        let path = self.path(blob, true);
        let temporary = format!("{path}{TEMPORARY}");
        let old = self.file(blob, true).await?;
        let result = async {
            remove_if_there(&self.io, &temporary).await?;
            let file = self.io.open(&temporary, OpenMode::CreateNew).await?;
            let mut offset = 0;
            while offset < data_end {
                let bytes = old.read_at(offset, COPY_BYTES.min((data_end - offset) as usize)).await?;
                if bytes.is_empty() {
                    // It was cut off in the zeroes behind the last batch: writing behind them makes them again.
                    break;
                }
                let len = bytes.len() as u64;
                file.write_at(bytes, offset).await.0?;
                offset += len;
            }
            file.write_at(footer, data_end).await.0?;
            file.sync_data().await?;
            self.io.rename(&temporary, &path).await?;
            self.open.borrow_mut().remove(&blob);
            self.io.sync_dir(&self.sub("seg")).await
        };
        result.await.map_err(failed(&path))
    }

    async fn delete(&self, name: BlobName) -> Result<(), StorageError> {
        self.open.borrow_mut().remove(&name);
        let path = self.path(name, true);
        let removed = self.io.remove(&path).await;
        // Somebody may have been about to open it.
        self.open.borrow_mut().remove(&name);
        removed.map_err(failed(path))
    }
}

impl<I: Io> ManifestStore for LocalShard<I> {
    async fn claim(&self) -> Result<Epoch, StorageError> {
        let directory = self.sub("epoch");
        let files = self.list_files(directory.clone()).await?;
        let highest = files.iter().filter_map(|file| file.parse().ok()).max().unwrap_or(0_u32);
        // A claim that a crash forgot may have written a manifest or segments under its epoch only after it was
        // durable, so the names of claims are enough.
        let epoch = Epoch(highest + 1);
        put_new(&self.io, &directory, &format!("{:08}", epoch.0), vec![b"claimed\n".to_vec()]).await?;
        Ok(epoch)
    }

    async fn commit(&self, epoch: Epoch, number: u64, bytes: Vec<u8>) -> Result<(), StorageError> {
        put_new(&self.io, &self.sub("manifest"), &manifest_file(epoch, number), vec![bytes]).await
    }

    async fn latest(&self) -> Result<Option<(Epoch, u64, Vec<u8>)>, StorageError> {
        let directory = self.sub("manifest");
        let files = self.list_files(directory.clone()).await?;
        let Some((epoch, number)) = files.iter().filter_map(|file| parse_manifest_file(file)).max() else {
            return Ok(None);
        };
        let path = format!("{directory}/{}", manifest_file(epoch, number));
        // The name may be there by grace of the page cache only.
        self.io.sync_dir(&directory).await.map_err(failed(&path))?;
        let read = async {
            let file = self.io.open(&path, OpenMode::Read).await.map_err(failed(&path))?;
            let bytes = async { file.read_at(0, file.len().await? as usize).await };
            bytes.await.map_err(failed(&path))
        };
        let bytes = in_time(&self.io, self.read_timeout, || path.clone(), read).await?;
        Ok(Some((epoch, number, bytes)))
    }

    async fn tidy(&self, epoch: Epoch, number: u64) -> Result<(), StorageError> {
        let directory = self.sub("manifest");
        let files = self.list_files(directory.clone()).await?;
        let mut older: Vec<_> = files.iter().filter_map(|file| parse_manifest_file(file)).collect();
        older.retain(|&name| name < (epoch, number));
        older.sort_unstable();
        older.pop();
        for (epoch, number) in older {
            let path = format!("{directory}/{}", manifest_file(epoch, number));
            self.io.remove(&path).await.map_err(failed(path))?;
        }
        let directory = self.sub("epoch");
        let files = self.list_files(directory.clone()).await?;
        for claim in files.iter().filter_map(|file| file.parse::<u32>().ok()).filter(|&claim| claim < epoch.0) {
            let path = format!("{directory}/{claim:08}");
            self.io.remove(&path).await.map_err(failed(path))?;
        }
        Ok(())
    }
}

impl<I: Io> Runtime for Local<I> {
    fn now(&self) -> Duration {
        self.io.now()
    }

    fn wall_clock_ms(&self) -> u64 {
        self.io.wall_clock_ms()
    }

    fn random(&self) -> u64 {
        self.io.random()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.io.spawn(task);
    }

    async fn yield_now(&self) {
        self.io.yield_now().await;
    }

    async fn sleep(&self, duration: Duration) {
        self.io.sleep(duration).await;
    }

    async fn offload<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.io.offload(job).await
    }

    async fn background<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.io.background(job).await
    }
}

impl<I: Io> Storage for Local<I> {
    type Wal = LocalShard<I>;
    type Blobs = LocalShard<I>;
    type Manifests = LocalShard<I>;

    async fn prepare(&self, shard: ShardId) -> Result<(), StorageError> {
        let directory = shard_directory(shard);
        for sub in ["wal", "seg", "idx", "manifest", "epoch"] {
            let path = format!("{directory}/{sub}");
            self.io.create_dir_all(&path).await.map_err(failed(&path))?;
            let list = async { self.io.list(&path).await.map_err(failed(&path)) };
            for file in in_time(&self.io, self.read_timeout, || path.clone(), list).await? {
                if file.ends_with(TEMPORARY) {
                    let path = format!("{path}/{file}");
                    self.io.remove(&path).await.map_err(failed(path))?;
                }
            }
        }
        self.io.sync_dir(&directory).await.map_err(failed(directory))?;
        self.io.sync_dir("").await.map_err(failed("the data directory"))
    }

    fn wal(&self, shard: ShardId) -> Self::Wal {
        self.shard(shard)
    }

    fn blobs(&self, shard: ShardId) -> Self::Blobs {
        self.shard(shard)
    }

    fn manifests(&self, shard: ShardId) -> Self::Manifests {
        self.shard(shard)
    }

    fn describe(&self, shard: ShardId, name: SegmentName, position: Position) -> String {
        format!("{}/seg/{} at offset {}", shard_directory(shard), segment_file(name), position.offset)
    }

    async fn read_superblock(&self) -> Result<Option<Vec<u8>>, StorageError> {
        let read = async {
            match self.io.open(SUPERBLOCK, OpenMode::Read).await {
                Ok(file) => {
                    let read = async { file.read_at(0, file.len().await? as usize).await };
                    read.await.map(Some).map_err(failed(SUPERBLOCK))
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(failed(SUPERBLOCK)(error)),
            }
        };
        in_time(&self.io, self.read_timeout, || SUPERBLOCK.to_owned(), read).await
    }

    async fn create_superblock(&self, bytes: Vec<u8>) -> Result<(), StorageError> {
        let temporary = format!("{SUPERBLOCK}{TEMPORARY}");
        let result = async {
            remove_if_there(&self.io, &temporary).await?;
            let file = self.io.open(&temporary, OpenMode::CreateNew).await?;
            file.write_at(bytes, 0).await.0?;
            file.sync_data().await?;
            self.io.link(&temporary, SUPERBLOCK).await?;
            self.io.remove(&temporary).await?;
            self.io.sync_dir("").await
        };
        result.await.map_err(failed(SUPERBLOCK))
    }
}
