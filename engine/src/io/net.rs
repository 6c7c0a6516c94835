//! The network twin of the file operations. The engine opens no socket: the server hands descriptors in.
//!
//! Rules for callers:
//! - **A receive is awaited to its end.** Never put [`Socket::receive`] inside `select!` or a timeout: on io_uring the
//!   receive goes on and takes bytes along. A task that waits for "input or event" selects on [`Socket::readable`],
//!   which takes nothing, and receives afterwards.
//! - **Deadlines act on the socket**, not on the future: [`Socket::set_deadline`] ends the read side, and the waiting
//!   receive returns `TimedOut`. So do [`Socket::cancel_all`] and [`Socket::shutdown`].
//! - **A send is awaited to its end** too; after a dropped one it is unknown how much was sent.
//! - One task receives and one sends at any time; they may be two tasks.
//! - A connection that waits needs no buffer: wait in [`Socket::readable`], then take one. Receiving at once costs a
//!   tenth less than waiting first, so do that while requests keep coming.
//!
//! On io_uring every receive and send goes through the ring. A queued send leaves when the thread parks, and that can be
//! long after the reply was made if many tasks are ready. So the ring is entered by hand once a few sends are queued or
//! the oldest is late, and [`RealIo::submit_sends`] does the same before a stretch of computing.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::Runtime;
use super::epoll::{Direction, Polled};
use super::real::{IoKind, RealIo};
pub use super::sys::Shutdown;
use super::{sys, uring};

/// How often a worker looks for sockets past their deadline; deadlines are late by up to this much.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// After the read side was ended, how long the goodbye may take.
const GRACE: Duration = Duration::from_secs(10);
/// After so many operations in a row that did not have to wait, let other tasks run.
const UNINTERRUPTED_MAX: u8 = 32;

/// A piece of a gathered send.
#[derive(Clone, Debug)]
pub enum Chunk {
    Owned(Vec<u8>),
    Static(&'static [u8]),
    Shared(SharedBytes),
}

/// A range of bytes that others may hold, too.
#[derive(Clone, Debug)]
pub struct SharedBytes {
    bytes: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl SharedBytes {
    /// # Panics
    /// If the range is not within the bytes.
    #[must_use]
    pub fn new(bytes: Arc<Vec<u8>>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= bytes.len(), "range of shared bytes");
        Self { bytes, range }
    }
}

impl From<Vec<u8>> for Chunk {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Owned(bytes)
    }
}

impl AsRef<[u8]> for Chunk {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Owned(bytes) => bytes,
            Self::Static(bytes) => bytes,
            Self::Shared(shared) => &shared.bytes[shared.range.clone()],
        }
    }
}

/// What is left of the chunks after the first `skip` bytes, without empty slices.
pub(super) fn slices_from(chunks: &[Chunk], mut skip: usize) -> impl Iterator<Item = &[u8]> {
    chunks.iter().filter_map(move |chunk| {
        let bytes = chunk.as_ref();
        let skipped = skip.min(bytes.len());
        skip -= skipped;
        Some(&bytes[skipped..]).filter(|rest| !rest.is_empty())
    })
}

/// The descriptor, shared with the operations in flight on it, and what the sweeper must know.
pub(super) struct Descriptor {
    fd: OwnedFd,
    /// On the clock of the worker, in milliseconds; 0 is none.
    deadline_ms: Cell<u64>,
    /// The sweeper has this in its list.
    watched: Cell<bool>,
    /// The deadline has passed: the read side is shut down.
    expired: Cell<bool>,
    /// A send is under way.
    sending: Cell<bool>,
    /// It was to end: what is left is not to be sent.
    send_cancelled: Cell<bool>,
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// A connected socket on one worker.
pub struct Socket {
    descriptor: Rc<Descriptor>,
    backend: Backend,
    io: RealIo,
    /// A receive probably need not wait.
    ready: Cell<bool>,
    /// The descriptor is being given back: dropping this must leave it alone.
    given_back: bool,
}

enum Backend {
    Uring {
        /// The wait for input outlives the future that started it: the next call goes on with it.
        wait: RefCell<Option<uring::Readable<Rc<Descriptor>>>>,
        /// Bytes were received since the wait began, so its end may be old news.
        stale: Cell<bool>,
    },
    Epoll(Polled),
}

impl RealIo {
    /// Takes a connected stream socket.
    ///
    /// # Errors
    /// The descriptor is not one that can be waited for.
    pub fn socket(&self, fd: OwnedFd) -> io::Result<Socket> {
        // On a non-blocking descriptor, io_uring gives EAGAIN instead of waiting.
        sys::set_nonblocking(fd.as_fd(), self.kind() == IoKind::Epoll)?;
        self.wrap(fd)
    }

    /// Takes a listening socket.
    ///
    /// # Errors
    /// The descriptor is not one that can be waited for.
    pub fn acceptor(&self, listener: OwnedFd) -> io::Result<Acceptor> {
        sys::set_nonblocking(listener.as_fd(), true)?;
        Ok(Acceptor { listener: self.wrap(listener)?, stopped: Cell::new(false), waiting: Cell::new(None) })
    }

    /// Hands the kernel what is queued for sending. To be called before computing for more than some 20 us, so that the
    /// replies of other connections do not wait for it.
    pub fn submit_sends(&self) {
        uring::submit_sends();
    }

    fn wrap(&self, fd: OwnedFd) -> io::Result<Socket> {
        let descriptor = Rc::new(Descriptor {
            fd,
            deadline_ms: Cell::new(0),
            watched: Cell::new(false),
            expired: Cell::new(false),
            sending: Cell::new(false),
            send_cancelled: Cell::new(false),
        });
        let backend = match self.kind() {
            IoKind::Epoll => Backend::Epoll(Polled::new(Rc::clone(&descriptor))?),
            IoKind::Uring | IoKind::Auto => Backend::Uring { wait: RefCell::new(None), stale: Cell::new(false) },
        };
        Ok(Socket { descriptor, backend, io: self.clone(), ready: Cell::new(false), given_back: false })
    }
}

impl Socket {
    /// Waits until a receive would return at once. Takes no bytes, so the future may be dropped at any time.
    ///
    /// # Errors
    /// `TimedOut` after the deadline, ECANCELED after [`Socket::cancel_all`]. An error or end of the connection is left
    /// to the receive that follows.
    pub async fn readable(&self) -> io::Result<()> {
        let result = match &self.backend {
            Backend::Uring { wait, stale } => {
                std::future::poll_fn(|context| {
                    loop {
                        let mut wait = wait.borrow_mut();
                        let operation = wait.get_or_insert_with(|| {
                            stale.set(false);
                            uring::Readable::start(Rc::clone(&self.descriptor))
                        });
                        let Poll::Ready(result) = operation.poll(context) else {
                            return Poll::Pending;
                        };
                        *wait = None;
                        if result.is_err() || !stale.get() || sys::is_readable(self.descriptor.as_fd()) {
                            return Poll::Ready(result);
                        }
                    }
                })
                .await
            }
            Backend::Epoll(polled) => {
                let is_readable = || Ok(sys::is_readable(self.descriptor.as_fd()).then_some(()));
                polled.attempt(Direction::Read, is_readable, |()| false).await
            }
        };
        if self.descriptor.expired.get() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        result?;
        self.ready.set(true);
        Ok(())
    }

    /// Receives into the spare capacity of the buffer, as much as is there but at least one byte; 0 is the end of the
    /// stream. To be awaited to its end.
    ///
    /// # Errors
    /// `TimedOut` after the deadline, ECANCELED after [`Socket::cancel_all`], else the connection's error. The buffer
    /// is then as it was.
    ///
    /// # Panics
    /// If the buffer has no spare capacity.
    pub async fn receive(&self, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        let spare = buffer.capacity() - buffer.len();
        assert!(spare > 0, "a receive needs room");
        if self.descriptor.expired.get() {
            return (Err(io::ErrorKind::TimedOut.into()), buffer);
        }
        let mut result = Ok(None);
        if self.ready.take() && matches!(self.backend, Backend::Epoll(_)) {
            result = sys::receive(self.descriptor.as_fd(), &mut buffer);
        }
        let waited = matches!(result, Ok(None));
        let result = match result {
            Ok(Some(count)) => Ok(count),
            Err(error) => Err(error),
            Ok(None) => match &self.backend {
                Backend::Uring { .. } => {
                    let (result, returned) = uring::receive(&self.descriptor, buffer).await;
                    buffer = returned;
                    result
                }
                Backend::Epoll(polled) => {
                    let receive = || sys::receive(self.descriptor.as_fd(), &mut buffer);
                    polled.attempt(Direction::Read, receive, |count| *count < spare).await
                }
            },
        };
        if let Backend::Uring { wait, stale } = &self.backend {
            stale.set(wait.borrow().is_some());
        }
        // More may have come than there was room for.
        self.ready.set(matches!(result, Ok(count) if count == spare));
        if !waited {
            self.let_others_run().await;
        }
        match result {
            Ok(0) | Err(_) if self.descriptor.expired.get() => (Err(io::ErrorKind::TimedOut.into()), buffer),
            result => (result, buffer),
        }
    }

    /// Sends all of the buffer and gives it back. To be awaited to its end.
    ///
    /// # Errors
    /// `TimedOut` after the deadline, ECANCELED after [`Socket::cancel_all`], else the connection's error. Any part of
    /// the buffer may have been sent.
    pub async fn send_all(&self, buffer: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        self.send_while_taken(buffer, None).await
    }

    /// As [`Socket::send_all`], with a deadline that moves on whenever the peer has taken something: `patience` is how long it
    /// may take nothing.
    ///
    /// # Errors
    /// As [`Socket::send_all`].
    pub async fn send_all_patiently(&self, buffer: Vec<u8>, patience: Duration) -> (io::Result<()>, Vec<u8>) {
        self.send_while_taken(buffer, Some(patience)).await
    }

    async fn send_while_taken(&self, mut buffer: Vec<u8>, patience: Option<Duration>) -> (io::Result<()>, Vec<u8>) {
        let sending = Sending::new(&self.descriptor);
        let mut sent = 0;
        while sent < buffer.len() {
            if let Some(patience) = patience {
                self.set_deadline(patience);
            }
            let result = match &self.backend {
                Backend::Uring { .. } => {
                    let (result, returned) = uring::send(&self.descriptor, buffer, sent).await;
                    buffer = returned;
                    result
                }
                Backend::Epoll(polled) => {
                    let send = || sys::send(self.descriptor.as_fd(), &buffer[sent..]);
                    attempt_now(polled, send).await
                }
            };
            match sending.progress(result, buffer.len() - sent) {
                Ok(count) => sent += count,
                Err(error) => return (Err(error), buffer),
            }
        }
        self.let_others_run_after_send().await;
        (Ok(()), buffer)
    }

    /// Sends all of the chunks, gathered into as few system calls as possible, and gives them back. To be awaited to
    /// its end.
    ///
    /// # Errors
    /// As [`Socket::send_all`].
    pub async fn send_vectored(&self, mut chunks: Vec<Chunk>) -> (io::Result<()>, Vec<Chunk>) {
        let sending = Sending::new(&self.descriptor);
        let total: usize = chunks.iter().map(|chunk| chunk.as_ref().len()).sum();
        let mut sent = 0;
        while sent < total {
            let send = |chunks: &[Chunk]| {
                let slices: Vec<IoSlice<'_>> = slices_from(chunks, sent).map(IoSlice::new).collect();
                sys::send_vectored(self.descriptor.as_fd(), &slices)
            };
            let result = match &self.backend {
                Backend::Uring { .. } => {
                    let (result, returned) = uring::send_vectored(&self.descriptor, chunks, sent).await;
                    chunks = returned;
                    result
                }
                Backend::Epoll(polled) => attempt_now(polled, || send(&chunks)).await,
            };
            match sending.progress(result, total - sent) {
                Ok(count) => sent += count,
                Err(error) => return (Err(error), chunks),
            }
        }
        self.let_others_run_after_send().await;
        (Ok(()), chunks)
    }

    /// Ends one or both directions of the connection, now.
    ///
    /// # Errors
    /// `NotConnected`, mostly after the peer has reset the connection.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        sys::shutdown(self.descriptor.as_fd(), how)
    }

    /// Ends every operation in flight on this socket: each returns its result or ECANCELED.
    pub fn cancel_all(&self) {
        self.descriptor.send_cancelled.set(true);
        match &self.backend {
            Backend::Uring { .. } => drop(uring::cancel_all(Rc::clone(&self.descriptor))),
            Backend::Epoll(polled) => polled.cancel_all(),
        }
    }

    /// From `after` on (rounded up to a second) the socket is timed out: its read side is shut down, and [`readable`],
    /// [`receive`] and what waits in them return `TimedOut`. A goodbye can still be sent. A send that is then under way,
    /// or a goodbye that takes longer than 10 s, fails with `TimedOut`, as both directions are shut down.
    ///
    /// Calling it again moves the deadline, at the price of reading the clock.
    ///
    /// [`readable`]: Socket::readable
    /// [`receive`]: Socket::receive
    pub fn set_deadline(&self, after: Duration) {
        let descriptor = &self.descriptor;
        if descriptor.expired.get() {
            return;
        }
        descriptor.deadline_ms.set(milliseconds(self.io.now() + after));
        if !descriptor.watched.replace(true) {
            self.io.network().watch(&self.io, Rc::downgrade(descriptor));
        }
    }

    /// Takes the deadline back, unless it has passed.
    pub fn clear_deadline(&self) {
        if !self.descriptor.expired.get() {
            self.descriptor.deadline_ms.set(0);
        }
    }

    /// Whether the deadline has passed.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        self.descriptor.expired.get()
    }

    /// Gives the descriptor back, to be closed or moved to another worker. Bytes that were not received yet stay in the
    /// kernel and go with it; a deadline does not.
    ///
    /// # Errors
    /// The socket, if a receive or send is in flight on it, i.e. was dropped before its end.
    pub async fn into_fd(mut self) -> Result<OwnedFd, Self> {
        if let Backend::Uring { wait, .. } = &self.backend {
            let wait = wait.take();
            if Rc::strong_count(&self.descriptor) > 1 + usize::from(wait.is_some()) {
                if let Backend::Uring { wait: place, .. } = &self.backend {
                    place.replace(wait);
                }
                return Err(self);
            }
            if let Some(mut wait) = wait {
                if let Some(cancel) = uring::cancel_all(Rc::clone(&self.descriptor)) {
                    cancel.await;
                }
                // Cancelled or not, it has let go of the descriptor.
                let _ = std::future::poll_fn(|context| wait.poll(context)).await;
            }
        }
        self.given_back = true;
        let descriptor = Rc::clone(&self.descriptor);
        drop(self);
        let descriptor = Rc::try_unwrap(descriptor).ok();
        Ok(descriptor.expect("nothing is in flight").fd)
    }

    /// A send on the ring has been to the scheduler.
    async fn let_others_run_after_send(&self) {
        if matches!(self.backend, Backend::Epoll(_)) {
            self.let_others_run().await;
        }
    }

    /// Operations that need not wait never return to the scheduler by themselves.
    async fn let_others_run(&self) {
        if self.io.network().count_uninterrupted() {
            self.io.yield_now().await;
        }
    }
}

impl Drop for Socket {
    /// What is still in flight holds the descriptor open: end it, so that the connection closes.
    fn drop(&mut self) {
        if let Backend::Uring { wait, .. } = &self.backend
            && !self.given_back
        {
            let in_flight = Rc::strong_count(&self.descriptor) > 1;
            drop(wait.take());
            if in_flight {
                // Outside a running runtime there is nothing to do: the runtime ends everything as it is dropped.
                drop(uring::cancel_all(Rc::clone(&self.descriptor)));
            }
        }
    }
}

/// Makes the call at once: there is room nearly always. Waits for room where there is none.
async fn attempt_now<R>(polled: &Polled, mut call: impl FnMut() -> io::Result<Option<R>>) -> io::Result<R> {
    match call() {
        Ok(Some(result)) => Ok(result),
        Ok(None) => polled.attempt(Direction::Write, call, |_| false).await,
        Err(error) => Err(error),
    }
}

/// Marks a descriptor as being sent on, until dropped.
struct Sending<'a>(&'a Descriptor);

impl<'a> Sending<'a> {
    fn new(descriptor: &'a Descriptor) -> Self {
        descriptor.sending.set(true);
        descriptor.send_cancelled.set(false);
        Self(descriptor)
    }

    /// What was sent of `rest` bytes. A send on the ring that is cancelled half-way gives the number of bytes it sent.
    fn progress(&self, result: io::Result<usize>, rest: usize) -> io::Result<usize> {
        match result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) if count < rest && self.0.expired.get() => Err(io::ErrorKind::TimedOut.into()),
            Ok(count) if count < rest && self.0.send_cancelled.get() => {
                Err(io::Error::from_raw_os_error(libc::ECANCELED))
            }
            Err(_) if self.0.expired.get() => Err(io::ErrorKind::TimedOut.into()),
            result => result,
        }
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.0.sending.set(false);
    }
}

/// A listening socket on one worker. Connections are accepted by a wait and an `accept4` that does not wait, never by
/// an operation in flight, so no accepted connection can get lost, however futures are dropped.
pub struct Acceptor {
    listener: Socket,
    stopped: Cell<bool>,
    waiting: Cell<Option<Waker>>,
}

impl Acceptor {
    /// The next connection. The future may be dropped at any time.
    ///
    /// # Errors
    /// ECANCELED after [`Acceptor::stop`]. After any other error, such as EMFILE, a later call may succeed; sleep before
    /// it, as the connection is still waiting and the call returns at once.
    pub async fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            if self.stopped.get() {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
            match sys::accept(self.listener.descriptor.as_fd()) {
                Ok(Some(fd)) => {
                    self.listener.let_others_run().await;
                    return Ok(fd);
                }
                Ok(None) => self.wait().await?,
                // The connection was gone before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for a connection or for the stop.
    async fn wait(&self) -> io::Result<()> {
        let mut readable = std::pin::pin!(self.listener.readable());
        std::future::poll_fn(|context| {
            if self.stopped.get() {
                return Poll::Ready(Ok(()));
            }
            self.waiting.set(Some(context.waker().clone()));
            readable.as_mut().poll(context)
        })
        .await
    }

    /// Ends a waiting [`Acceptor::accept`] and refuses all later ones. The listener itself closes when this is dropped.
    pub fn stop(&self) {
        self.stopped.set(true);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// Gives the listener back, to be handed on; connections that were not accepted yet go with it.
    ///
    /// # Panics
    /// Never: nothing but the wait is ever in flight on a listener, and that is withdrawn.
    pub async fn into_fd(self) -> OwnedFd {
        match self.listener.into_fd().await {
            Ok(fd) => fd,
            Err(_) => unreachable!("only a wait can be in flight on a listener"),
        }
    }
}

/// What the sockets of one worker share.
#[derive(Default)]
pub(super) struct Network {
    /// The sockets that have had a deadline since the sweeper last looked.
    watched: RefCell<Vec<Weak<Descriptor>>>,
    sweeping: Cell<bool>,
    uninterrupted: Cell<u8>,
}

impl Network {
    /// Counts an operation that did not wait; true if it is time to let other tasks run.
    fn count_uninterrupted(&self) -> bool {
        let count = self.uninterrupted.get() + 1;
        let enough = count == UNINTERRUPTED_MAX;
        self.uninterrupted.set(if enough { 0 } else { count });
        enough
    }

    fn watch(&self, io: &RealIo, descriptor: Weak<Descriptor>) {
        self.watched.borrow_mut().push(descriptor);
        if !self.sweeping.replace(true) {
            let io = io.clone();
            io.clone().spawn(async move { io.network().sweep(&io).await });
        }
    }

    /// Looks at every watched socket once a second, for as long as there are any.
    async fn sweep(&self, io: &RealIo) {
        while !self.watched.borrow().is_empty() {
            io.sleep(SWEEP_INTERVAL).await;
            let now_ms = milliseconds(io.now());
            let mut end = self.watched.borrow().len();
            while end > 0 {
                end = self.sweep_slice(end, now_ms);
                io.yield_now().await;
            }
        }
        self.sweeping.set(false);
    }

    /// Looks at a slice of the watched sockets, those before place `end`, and returns where it starts. From the back,
    /// as what is removed is replaced by the last; what comes meanwhile is put at the end and is not yet due.
    fn sweep_slice(&self, end: usize, now_ms: u64) -> usize {
        const SLICE: usize = 4096;
        let start = end.saturating_sub(SLICE);
        let mut watched = self.watched.borrow_mut();
        for index in (start..end).rev() {
            let keep = watched[index].upgrade().is_some_and(|descriptor| descriptor.check(now_ms));
            if !keep {
                watched.swap_remove(index);
            }
        }
        start
    }
}

impl Descriptor {
    /// Ends what is past its deadline. False if there is nothing to watch any more.
    fn check(&self, now_ms: u64) -> bool {
        let deadline_ms = self.deadline_ms.get();
        if deadline_ms > now_ms {
            return true;
        }
        if deadline_ms == 0 {
            self.watched.set(false);
            return false;
        }
        let last = self.expired.replace(true) || self.sending.get();
        let how = if last { Shutdown::Both } else { Shutdown::Read };
        // Fails if the peer has reset the connection, which ends every wait as well.
        let _ = sys::shutdown(self.as_fd(), how);
        self.deadline_ms.set(if last { 0 } else { now_ms + milliseconds(GRACE) });
        true
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
