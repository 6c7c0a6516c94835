//! The I/O seam: about ten operations on files, and the runtime services (tasks, time, randomness) that decide the
//! order of events. The store above it is the same code on every implementation:
//!
//! - [`real`]: `uring` (tokio-uring, one ring per worker) and `epoll` (tokio with a commit thread and read threads),
//! - [`sim`]: a seeded executor over a disk that loses what was not synced, for crash tests.
//!
//! Rules that every implementation keeps:
//! - Buffers are owned; they come back with the result where the caller can use them again.
//! - A future of a *file* operation may be dropped: the operation then runs to its end unobserved.
//! - Nothing is durable before [`File::sync_data`] (file contents and size) or [`Io::sync_dir`] (names) has returned.

mod epoll;
pub mod net;
mod pool;
pub mod real;
pub mod sim;
mod sys;
mod uring;

use std::future::Future;
use std::io;
use std::time::Duration;

use crate::planted::{self, Bug};

/// Tasks, time and randomness. All tasks of one runtime run on one thread.
pub trait Runtime: Clone + 'static {
    /// Monotonic time since an arbitrary start.
    fn now(&self) -> Duration;

    /// Milliseconds since the Unix epoch, UTC.
    fn wall_clock_ms(&self) -> u64;

    /// A random number; in simulation drawn from the seed.
    fn random(&self) -> u64;

    /// Starts a task on this thread. It runs until it ends or the runtime is dropped.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Lets every other ready task run once, and submits what has been queued for the ring.
    /// The only yield the project may use.
    fn yield_now(&self) -> impl Future<Output = ()>;

    /// Returns after at least `duration`.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()>;

    /// Runs a CPU-heavy job off this thread, at low priority, and returns its result.
    fn offload<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T>;

    /// As [`Runtime::offload`] for a job that nobody waits for, and that may take seconds: it keeps no other off its thread.
    fn background<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
        self.offload(job)
    }
}

/// How [`Io::open`] treats an existing or missing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// The file must exist; it is opened for reading.
    Read,
    /// As `Read`, for a file of which pieces are read here and there: what lies around them is not read ahead.
    ReadPieces,
    /// The file must exist; it is opened for reading and writing.
    ReadWrite,
    /// The file must not exist; it is created for reading and writing, with mode 0600.
    CreateNew,
}

/// File operations below one root directory. Paths are relative to the root, with `/` between components.
pub trait Io: Runtime {
    type File: File;

    /// Opens or creates a file.
    ///
    /// # Errors
    /// `NotFound` and `AlreadyExists` according to `mode`; anything else is a failure of the device or its rights.
    fn open(&self, path: &str, mode: OpenMode) -> impl Future<Output = io::Result<Self::File>>;

    /// Renames a file, replacing `to` if it exists. Durable after [`Io::sync_dir`] of both directories.
    fn rename(&self, from: &str, to: &str) -> impl Future<Output = io::Result<()>>;

    /// Gives the file `from` the additional name `to`: put-if-absent on a file system.
    ///
    /// # Errors
    /// `AlreadyExists` if `to` exists, whatever it is.
    fn link(&self, from: &str, to: &str) -> impl Future<Output = io::Result<()>>;

    /// Removes a name. The contents live on while a [`File`] of them is open.
    fn remove(&self, path: &str) -> impl Future<Output = io::Result<()>>;

    /// Creates a directory and its parents, mode 0700; existing ones are fine.
    fn create_dir_all(&self, path: &str) -> impl Future<Output = io::Result<()>>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &str) -> impl Future<Output = io::Result<()>>;

    /// Bytes that can still be written below the root.
    fn free_bytes(&self) -> impl Future<Output = io::Result<u64>>;

    /// The names of the files (not directories) in a directory, in no particular order.
    /// A missing directory is an error of kind `NotFound`.
    fn list(&self, path: &str) -> impl Future<Output = io::Result<Vec<String>>>;
}

/// An open file. Clones share the open file.
#[expect(clippy::len_without_is_empty, reason = "nobody asks a file whether it is empty")]
pub trait File: Clone + 'static {
    /// Reads `len` bytes at `offset`; fewer only where the file ends.
    fn read_at(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Vec<u8>>>;

    /// Writes all of `buffer` at `offset` and gives the buffer back. Not durable before [`File::sync_data`].
    ///
    /// # Errors
    /// After an error any part of the buffer may have been written.
    fn write_at(&self, buffer: Vec<u8>, offset: u64) -> impl Future<Output = (io::Result<()>, Vec<u8>)>;

    /// Makes the file's contents and length durable.
    ///
    /// # Errors
    /// After an error nothing written since the last successful sync may be assumed on the device, and a later
    /// successful sync does not change that.
    fn sync_data(&self) -> impl Future<Output = io::Result<()>>;

    /// Reserves space so that the file has at least `len` bytes; new bytes read as zeroes.
    fn allocate(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// Sets the file's length.
    fn truncate(&self, len: u64) -> impl Future<Output = io::Result<()>>;

    /// The first offset at or after `offset` that is not known to read as zero; the file's length if there is none.
    fn next_data(&self, offset: u64) -> impl Future<Output = io::Result<u64>>;

    /// The file's length in bytes.
    fn len(&self) -> impl Future<Output = io::Result<u64>>;
}

/// Writes all of a buffer by writes that may take less than they are given: `write_some` gets the buffer, how much of it has
/// been written, and where in the file the rest goes; it says how much it has taken.
async fn write_all(
    mut buffer: Vec<u8>,
    offset: u64,
    write_some: impl AsyncFn(Vec<u8>, usize, u64) -> (io::Result<usize>, Vec<u8>),
) -> (io::Result<()>, Vec<u8>) {
    let mut written = 0;
    while written < buffer.len() {
        let (result, returned) = write_some(buffer, written, offset + written as u64).await;
        buffer = returned;
        match result {
            Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buffer),
            Ok(_) if planted::is_on(Bug::TakeShortWrite) => break,
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (Err(error), buffer),
        }
    }
    (Ok(()), buffer)
}
