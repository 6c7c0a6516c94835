//! A client's connection on one worker: its socket, its deadline, and how it ends when the server stops.

use std::cell::Cell;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use posthaste_engine::io::net::{Shutdown, Socket};

use crate::limits;
use crate::node::{Admission, Context};

/// Why no more input comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client has gone.
    Closed,
    /// The client was silent for too long. A goodbye can be sent.
    TimedOut,
    /// The server stops. A goodbye can be sent.
    Stopping,
}

pub struct Connection {
    socket: Socket,
    context: Rc<Context>,
    /// Moves with the connection.
    admission: Admission,
    peer: Option<IpAddr>,
    _listed: Listed,
    /// It waits for a new command: it can be closed without harm.
    at_rest: Cell<bool>,
    /// It must end now, whatever it does.
    cut: Cell<bool>,
}

/// A connection on its way to another worker.
pub struct Moving {
    fd: OwnedFd,
    admission: Admission,
    peer: Option<IpAddr>,
}

impl Connection {
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn new(context: &Rc<Context>, fd: OwnedFd, admission: Admission, peer: Option<IpAddr>) -> io::Result<Rc<Self>> {
        Self::arrive(context, Moving { fd, admission, peer })
    }

    /// Takes a connection that comes from another worker.
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn arrive(context: &Rc<Context>, moving: Moving) -> io::Result<Rc<Self>> {
        let Moving { fd, admission, peer } = moving;
        let socket = context.io.socket(fd)?;
        Ok(Rc::new_cyclic(|connection| Self {
            socket,
            context: Rc::clone(context),
            admission,
            peer,
            _listed: Listed { number: context.register(connection.clone()), context: Rc::clone(context) },
            at_rest: Cell::new(false),
            cut: Cell::new(false),
        }))
    }

    /// Takes the connection off this worker. `None` if it ended meanwhile, or others hold on to it.
    pub async fn depart(self: Rc<Self>) -> Option<Moving> {
        let connection = Rc::into_inner(self)?;
        let Self { socket, admission, peer, .. } = connection;
        let fd = socket.into_fd().await.ok()?;
        Some(Moving { fd, admission, peer })
    }

    pub fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Waits for input. It takes no bytes and may be dropped.
    ///
    /// `at_rest`: nothing has begun, so that a server that stops need not wait for this client.
    pub async fn readable(&self, timeout: Duration, at_rest: bool) -> Result<(), End> {
        self.begin_wait(timeout, at_rest)?;
        let result = self.socket.readable().await;
        self.at_rest.set(false);
        result.map_err(|error| self.end_of(&error))
    }

    /// Receives into the buffer's spare room, which must be there. To be awaited to its end.
    pub async fn receive(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<(), End> {
        self.begin_wait(timeout, at_rest)?;
        let (result, returned) = self.socket.receive(std::mem::take(buffer)).await;
        *buffer = returned;
        self.at_rest.set(false);
        match result {
            Ok(0) => Err(End::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(self.end_of(&error)),
        }
    }

    /// Waits for input and receives it. A client at rest keeps its buffer only while few do; the others wait without one.
    pub async fn input(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<(), End> {
        let held = &self.context.buffers_held;
        if at_rest && buffer.is_empty() && held.get() >= limits::INPUT_BUFFERS_HELD {
            self.context.give_buffer(std::mem::take(buffer));
            self.readable(timeout, true).await?;
        }
        if buffer.capacity() == 0 {
            *buffer = self.context.take_buffer();
        }
        if buffer.capacity() == buffer.len() {
            buffer.reserve(limits::INPUT_BYTES);
        }
        held.set(held.get() + 1);
        let result = self.receive(buffer, timeout, at_rest).await;
        held.set(held.get() - 1);
        result
    }

    /// Sends all of the buffer and leaves it empty, with its memory.
    ///
    /// # Errors
    /// The client has gone, or takes nothing.
    pub async fn send(&self, buffer: &mut Vec<u8>, timeout: Duration) -> Result<(), End> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.socket.set_deadline(timeout);
        let (result, mut returned) = self.socket.send_all(std::mem::take(buffer)).await;
        returned.clear();
        *buffer = returned;
        result.map_err(|_| End::Closed)
    }

    /// Says the last words, and closes. A client that has sent more than was read would lose them to the reset that closing
    /// causes then, so for a moment its input is read and dropped.
    pub async fn finish(&self, mut output: Vec<u8>) {
        const PATIENCE: Duration = Duration::from_secs(2);
        const DROPPED_BYTES_MAX: usize = 1 << 20;
        if self.send(&mut output, PATIENCE).await.is_err() || self.socket.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let mut buffer = self.context.take_buffer();
        let mut dropped = 0;
        while dropped < DROPPED_BYTES_MAX && self.receive(&mut buffer, PATIENCE, true).await.is_ok() {
            dropped += buffer.len();
            buffer.clear();
        }
        self.context.give_buffer(buffer);
    }

    /// Ends a wait for the next command, because the server stops.
    pub fn interrupt(&self) {
        if self.at_rest.get() {
            self.socket.cancel_all();
        }
    }

    /// Ends whatever goes on.
    pub fn cut(&self) {
        self.cut.set(true);
        self.socket.cancel_all();
    }

    fn begin_wait(&self, timeout: Duration, at_rest: bool) -> Result<(), End> {
        if (at_rest && self.context.draining.get()) || self.cut.get() {
            return Err(End::Stopping);
        }
        self.socket.set_deadline(timeout);
        self.at_rest.set(at_rest);
        Ok(())
    }

    fn end_of(&self, error: &io::Error) -> End {
        match error.kind() {
            io::ErrorKind::TimedOut => End::TimedOut,
            _ if error.raw_os_error() == Some(libc::ECANCELED) && self.context.draining.get() => End::Stopping,
            _ => End::Closed,
        }
    }
}

/// A connection's place in its worker's list.
struct Listed {
    context: Rc<Context>,
    number: u32,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.context.unregister(self.number);
    }
}

/// Waits for either future; true if it was the first.
pub async fn first_of(first: impl Future<Output = ()>, second: impl Future<Output = ()>) -> bool {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    std::future::poll_fn(|context| {
        if first.as_mut().poll(context).is_ready() {
            return Poll::Ready(true);
        }
        second.as_mut().poll(context).map(|()| false)
    })
    .await
}

/// Runs futures at the same time and gives their results in order.
pub async fn join_all<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut waiting: Vec<_> = futures.map(Box::pin).collect();
    if waiting.len() == 1
        && let Some(only) = waiting.pop()
    {
        return vec![only.await];
    }
    let mut results: Vec<Option<F::Output>> = waiting.iter().map(|_| None).collect();
    std::future::poll_fn(move |context| {
        let mut pending = false;
        for (future, result) in waiting.iter_mut().zip(&mut results) {
            if result.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(value) => *result = Some(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(results.drain(..).flatten().collect()) }
    })
    .await
}
