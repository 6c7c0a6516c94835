//! The half of the seam for systems that forbid io_uring: a plain tokio runtime, sockets by epoll, and threads for what
//! files make wait: one that writes and syncs, in order, and four that read.
#![expect(unsafe_code, reason = "tokio asks for a promise that a registered descriptor stays open")]

use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use tokio::io::unix::AsyncFd;

use super::net::Descriptor;
use super::pool::{Pool, Priority};
use super::sys;

const READ_THREADS: usize = 4;

/// Runs `main` to its end on a new runtime on this thread. Tasks that are then still there are dropped.
pub(super) fn block_on<T>(main: impl Future<Output = T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(tokio::task::LocalSet::new().block_on(&runtime, main))
}

/// The threads of one worker.
pub(super) struct Threads {
    commit: Pool,
    read: Pool,
}

impl Threads {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            commit: Pool::new("commit", 1, Priority::Normal)?,
            read: Pool::new("read", READ_THREADS, Priority::Normal)?.that_may_hang(),
        })
    }

    /// Appends up to `max` bytes at `offset` to the buffer's spare capacity; 0 is the end of the file.
    pub(super) async fn read(
        &self,
        file: &Arc<File>,
        mut buffer: Vec<u8>,
        max: usize,
        offset: u64,
    ) -> (io::Result<usize>, Vec<u8>) {
        let file = Arc::clone(file);
        let job = move || {
            let result = sys::read(file.as_fd(), &mut buffer, max, offset);
            (result, buffer)
        };
        self.read.run(job).await
    }

    /// Writes all of the buffer from `offset` on.
    pub(super) async fn write(&self, file: &Arc<File>, buffer: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
        let file = Arc::clone(file);
        let job = move || (file.write_all_at(&buffer, offset), buffer);
        self.commit.run(job).await
    }

    /// Makes the file's contents and length durable (for a directory: its names).
    pub(super) async fn sync_data(&self, file: &Arc<File>) -> io::Result<()> {
        let file = Arc::clone(file);
        self.commit.run(move || file.sync_data()).await
    }

    /// Gives the file at least `len` bytes, with blocks behind them.
    pub(super) async fn allocate(&self, file: &Arc<File>, len: u64) -> io::Result<()> {
        let file = Arc::clone(file);
        self.commit.run(move || sys::allocate(file.as_fd(), len)).await
    }
}

#[derive(Clone, Copy)]
pub(super) enum Direction {
    Read,
    Write,
}

/// A descriptor that epoll watches. At most one task waits in each direction.
pub(super) struct Polled {
    fd: AsyncFd<Rc<Descriptor>>,
    /// How often everything was cancelled.
    cancellations: Cell<u32>,
    reader: Cell<Option<Waker>>,
    writer: Cell<Option<Waker>>,
}

impl Polled {
    pub(super) fn new(descriptor: Rc<Descriptor>) -> io::Result<Self> {
        Ok(Self {
            // SAFETY: a `Descriptor` owns one open descriptor and never changes it; the `Rc` keeps it open.
            fd: unsafe { AsyncFd::register(descriptor) }?,
            cancellations: Cell::new(0),
            reader: Cell::new(None),
            writer: Cell::new(None),
        })
    }

    /// Makes the call whenever the descriptor may be ready, until it returns something else than `None`. `drained`
    /// tells of a result that it has left nothing behind, which spares the next call.
    pub(super) async fn attempt<R>(
        &self,
        direction: Direction,
        mut call: impl FnMut() -> io::Result<Option<R>>,
        drained: impl Fn(&R) -> bool,
    ) -> io::Result<R> {
        let cancellations = self.cancellations.get();
        loop {
            let mut guard = std::future::poll_fn(|context| {
                if self.cancellations.get() != cancellations {
                    return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ECANCELED)));
                }
                let (waker, ready) = match direction {
                    Direction::Read => (&self.reader, self.fd.poll_read_ready(context)),
                    Direction::Write => (&self.writer, self.fd.poll_write_ready(context)),
                };
                if ready.is_pending() {
                    waker.set(Some(context.waker().clone()));
                }
                ready
            })
            .await?;
            match call() {
                Ok(Some(result)) => {
                    // An end of stream that has already been seen by epoll stays on.
                    if drained(&result) {
                        guard.clear_ready();
                    }
                    return Ok(result);
                }
                Ok(None) => guard.clear_ready(),
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends every wait with ECANCELED.
    pub(super) fn cancel_all(&self) {
        self.cancellations.set(self.cancellations.get().wrapping_add(1));
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}
