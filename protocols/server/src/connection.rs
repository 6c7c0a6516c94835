//! A client's connection on one worker: its socket, TLS, its deadlines, and how it ends when the server stops.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use posthaste_engine::io::Runtime;
use posthaste_engine::io::net::{Shutdown, Socket};

use crate::limits;
use crate::listen::Protocol;
use crate::node::{Admission, Context, Counters};
use crate::tls::{Peer, Tls};
use crate::usage;

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

/// How long a client may take for what is sent to it.
#[derive(Clone, Copy)]
enum Patience {
    /// So long for each piece that it takes.
    WhileTaken(Duration),
    /// Until then, on the worker's clock.
    InAll(Duration),
}

pub struct Connection {
    socket: Socket,
    context: Rc<Context>,
    identity: Identity,
    tls: RefCell<Option<Tls>>,
    is_tls: Cell<bool>,
    /// When it came to this worker, on the worker's clock, and how old it was then.
    begun: Duration,
    age: Duration,
    _listed: Listed,
    /// It waits for a new command: it can be closed without harm.
    at_rest: Cell<bool>,
    /// It must end now, whatever it does.
    cut: Cell<bool>,
}

/// What a connection keeps wherever it goes.
struct Identity {
    admission: Admission,
    peer: Option<IpAddr>,
    /// Names it in the log.
    id: u64,
}

/// A connection on its way to another worker.
pub struct Moving {
    fd: OwnedFd,
    identity: Identity,
    tls: Option<Tls>,
    age: Duration,
}

impl Connection {
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn new(context: &Rc<Context>, fd: OwnedFd, admission: Admission, peer: Option<IpAddr>) -> io::Result<Rc<Self>> {
        let identity = Identity { admission, peer, id: context.node.next_connection() };
        Self::arrive(context, Moving { fd, identity, tls: None, age: Duration::ZERO })
    }

    /// Takes a connection that comes from another worker.
    ///
    /// # Errors
    /// The descriptor cannot be waited for.
    pub fn arrive(context: &Rc<Context>, moving: Moving) -> io::Result<Rc<Self>> {
        let Moving { fd, identity, tls, age } = moving;
        let socket = context.io.socket(fd)?;
        Ok(Rc::new_cyclic(|connection| Self {
            socket,
            context: Rc::clone(context),
            identity,
            is_tls: Cell::new(tls.is_some()),
            tls: RefCell::new(tls),
            begun: context.io.now(),
            age,
            _listed: Listed { number: context.register(connection.clone()), context: Rc::clone(context) },
            at_rest: Cell::new(false),
            cut: Cell::new(false),
        }))
    }

    /// Takes the connection off this worker. `None` if it ended meanwhile, or others hold on to it.
    pub async fn depart(self: Rc<Self>) -> Option<Moving> {
        let connection = Rc::into_inner(self)?;
        let age = connection.age();
        let Self { socket, identity, tls, .. } = connection;
        let fd = socket.into_fd().await.ok()?;
        Some(Moving { fd, identity, tls: tls.into_inner(), age })
    }

    pub fn peer(&self) -> Option<IpAddr> {
        self.identity.peer
    }

    /// Names this connection in the log, over its moves.
    pub fn id(&self) -> u64 {
        self.identity.id
    }

    pub fn is_tls(&self) -> bool {
        self.is_tls.get()
    }

    /// Whether a password may be asked for: nobody else can read it, or the operator has decided so (RFC 9051, 6.2.3).
    pub fn allows_passwords(&self) -> bool {
        self.is_tls() || self.context.node.config.server.plaintext_auth
    }

    /// Counts it among those of an account. It counts once, whatever the number of calls.
    ///
    /// # Errors
    /// Which limit it would exceed.
    pub fn admit_user(&self, account: u64) -> Result<(), &'static str> {
        self.identity.admission.admit_user(account)
    }

    /// Takes it off the connections of its account.
    pub fn dismiss_user(&self) {
        self.identity.admission.dismiss_user();
    }

    fn age(&self) -> Duration {
        self.age + self.context.io.now().saturating_sub(self.begun)
    }

    /// What is left of `limit` since the connection came: the time of the last wait of those who do not get done.
    ///
    /// # Errors
    /// Nothing is left. A client that always says something at once would never be found to be late by waiting for it.
    pub fn time_left(&self, limit: Duration) -> Result<Duration, End> {
        let left = limit.saturating_sub(self.age());
        if left.is_zero() { Err(End::TimedOut) } else { Ok(left) }
    }

    /// Does the handshake of TLS. The caller has sent all it had to say in the clear, and forgets all that it has received:
    /// what a client has really said, it says again under TLS (RFC 3501, 6.2.1; RFC 3207, 4.2; RFC 2595, 4).
    ///
    /// # Errors
    /// The handshake failed, and the client has been told why; or it took too long.
    pub async fn start_tls(&self, protocol: Protocol) -> Result<(), End> {
        let node = &self.context.node;
        let result = Box::pin(self.shake_hands(protocol)).await;
        match &result {
            Ok(tls) => {
                Counters::add(&node.counters.tls_handshakes, 1);
                if tls.is_resumed() {
                    Counters::add(&node.counters.tls_resumptions, 1);
                }
                tracing::debug!(session = self.id(), peer = ?self.peer(), protocol = tls.describe(), "TLS begins");
            }
            Err(_) => Counters::add(&node.counters.tls_failures, 1),
        }
        self.tls.replace(Some(result?));
        self.is_tls.set(true);
        Ok(())
    }

    async fn shake_hands(&self, protocol: Protocol) -> Result<Tls, End> {
        let failed = |error: rustls::Error| {
            tracing::info!(session = self.id(), peer = ?self.peer(), %error, "a TLS handshake failed");
            End::Closed
        };
        let mut tls = self.context.node.tls.accept(protocol).map_err(failed)?;
        let begun = self.context.io.now();
        let mut buffer = self.context.take_buffer();
        let result = loop {
            buffer.clear();
            let left = limits::TLS_HANDSHAKE.saturating_sub(self.context.io.now() - begun);
            if left.is_zero() {
                break Err(End::TimedOut);
            }
            if let Err(end) = self.receive_raw(&mut buffer, left, true).await {
                break Err(end);
            }
            let progress = tls.shake_hands(&buffer);
            // Alerts as well as the next step.
            buffer.clear();
            tls.write_to(&mut buffer);
            let sent = self.send_raw(&mut buffer, Patience::InAll(begun + limits::TLS_HANDSHAKE)).await;
            match progress {
                Ok(false) if sent.is_ok() => {}
                Ok(true) => break sent,
                Ok(false) => break Err(End::Closed),
                Err(error) => break Err(failed(error)),
            }
        };
        self.context.give_buffer(buffer);
        result.map(|()| tls)
    }

    /// Waits for input. It takes no bytes and may be dropped. Under TLS, what comes then need not be anything that the client
    /// says: see [`Connection::input_once`].
    ///
    /// `at_rest`: nothing has begun, so that a server that stops need not wait for this client.
    pub async fn readable(&self, timeout: Duration, at_rest: bool) -> Result<(), End> {
        if self.tls.borrow().as_ref().is_some_and(Tls::has_early) {
            return Ok(());
        }
        self.begin_wait(timeout, at_rest)?;
        let result = self.socket.readable().await;
        self.at_rest.set(false);
        result.map_err(|error| self.end_of(&error))
    }

    /// Waits for input and receives it. A client at rest keeps its buffer only while few do; the others wait without one.
    pub async fn input(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<(), End> {
        let begun = self.context.io.now();
        let mut left = timeout;
        while !self.input_once(buffer, left, at_rest).await? {
            // Parts of a TLS record are no words.
            left = timeout.saturating_sub(self.context.io.now() - begun);
            if left.is_zero() {
                return Err(End::TimedOut);
            }
        }
        Ok(())
    }

    /// As [`Connection::input`], but returns, with false, also if something came that says nothing: a part of a TLS record, or a
    /// record of TLS itself.
    pub async fn input_once(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<bool, End> {
        let held = &self.context.buffers_held;
        if at_rest && buffer.is_empty() && held.get() >= limits::INPUT_BUFFERS_HELD {
            self.context.give_buffer(std::mem::take(buffer));
            self.readable(timeout, true).await?;
        }
        held.set(held.get() + 1);
        let result = if self.is_tls() {
            Box::pin(self.receive_tls(buffer, timeout, at_rest)).await
        } else {
            self.make_room(buffer);
            self.receive_raw(buffer, timeout, at_rest).await.map(|()| true)
        };
        held.set(held.get() - 1);
        result
    }

    fn make_room(&self, buffer: &mut Vec<u8>) {
        if buffer.capacity() == 0 {
            *buffer = self.context.take_buffer();
        }
        if buffer.capacity() == buffer.len() {
            buffer.reserve(limits::INPUT_BYTES);
        }
    }

    /// Receives into the buffer's spare room, which must be there. To be awaited to its end.
    async fn receive_raw(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<(), End> {
        self.begin_wait(timeout, at_rest)?;
        let (result, returned) = self.socket.receive(std::mem::take(buffer)).await;
        *buffer = returned;
        self.at_rest.set(false);
        match result {
            Ok(0) => Err(End::Closed),
            Ok(octets) => {
                usage::count_received(octets);
                Ok(())
            }
            Err(error) => Err(self.end_of(&error)),
        }
    }

    /// Receives once, and decrypts. Whether the client said anything. To be awaited to its end.
    async fn receive_tls(&self, buffer: &mut Vec<u8>, timeout: Duration, at_rest: bool) -> Result<bool, End> {
        let before = buffer.len();
        let mut ciphertext = Vec::new();
        let mut result = Ok(Peer::Open);
        if let Some(tls) = self.tls.borrow_mut().as_mut().filter(|tls| tls.has_early()) {
            tls.take_early(buffer);
            return Ok(true);
        }
        self.make_room(&mut ciphertext);
        let received = self.receive_raw(&mut ciphertext, timeout, at_rest).await;
        let mut answer = Vec::new();
        if let (Ok(()), Some(tls)) = (received, self.tls.borrow_mut().as_mut()) {
            if buffer.capacity() == 0 {
                *buffer = self.context.take_buffer();
            }
            result = tls.take(&ciphertext, buffer);
            if matches!(result, Ok(Peer::Closed)) && buffer.len() == before {
                tls.close(&mut answer);
            }
            tls.write_to(&mut answer);
        }
        self.context.give_buffer(ciphertext);
        received?;
        if !answer.is_empty() {
            self.send_raw(&mut answer, Patience::WhileTaken(timeout)).await?;
        }
        match result {
            _ if buffer.len() > before => Ok(true),
            Ok(Peer::Open) => Ok(false),
            Ok(Peer::Closed) => Err(End::Closed),
            Err(error) => {
                tracing::info!(session = self.id(), peer = ?self.peer(), %error, "TLS ends");
                Err(End::Closed)
            }
        }
    }

    /// Sends all of the buffer and leaves it empty, with its memory.
    ///
    /// # Errors
    /// The client has gone, or takes nothing.
    pub async fn send(&self, buffer: &mut Vec<u8>) -> Result<(), End> {
        let timeout = Duration::from_secs(self.context.node.config.limits.send_timeout_s);
        self.send_within(buffer, Patience::WhileTaken(timeout)).await
    }

    /// As [`Connection::send`], within so much time in all.
    pub async fn send_by(&self, buffer: &mut Vec<u8>, timeout: Duration) -> Result<(), End> {
        self.send_within(buffer, Patience::InAll(self.context.io.now() + timeout)).await
    }

    async fn send_within(&self, buffer: &mut Vec<u8>, patience: Patience) -> Result<(), End> {
        if buffer.is_empty() {
            return Ok(());
        }
        if self.is_tls() {
            return Box::pin(self.send_tls(buffer, patience)).await;
        }
        self.send_raw(buffer, patience).await
    }

    async fn send_tls(&self, buffer: &mut Vec<u8>, patience: Patience) -> Result<(), End> {
        let mut ciphertext = self.context.take_buffer();
        let mut result = Ok(());
        for piece in buffer.chunks(limits::OUTPUT_BYTES) {
            if let Some(tls) = self.tls.borrow_mut().as_mut() {
                tls.encrypt(piece, &mut ciphertext);
            }
            result = self.send_raw(&mut ciphertext, patience).await;
            if result.is_err() {
                break;
            }
        }
        self.context.give_buffer(ciphertext);
        buffer.clear();
        result
    }

    async fn send_raw(&self, buffer: &mut Vec<u8>, patience: Patience) -> Result<(), End> {
        let octets = std::mem::take(buffer);
        usage::count_sent(octets.len());
        let (result, mut returned) = match patience {
            Patience::WhileTaken(timeout) => self.socket.send_all_patiently(octets, timeout).await,
            Patience::InAll(end) => {
                self.socket.set_deadline(end.saturating_sub(self.context.io.now()));
                self.socket.send_all(octets).await
            }
        };
        returned.clear();
        *buffer = returned;
        result.map_err(|_| End::Closed)
    }

    /// Says the last words, and closes. A client that has sent more than was read would lose them to the reset that closing
    /// causes then, so for a moment its input is read and dropped.
    pub async fn finish(&self, mut output: Vec<u8>) {
        let begun = self.context.io.now();
        let left = || limits::FAREWELL.saturating_sub(self.context.io.now() - begun);
        const DROPPED_BYTES_MAX: usize = 1 << 20;
        let mut sent = self.send_by(&mut output, left()).await;
        let mut farewell = Vec::new();
        if let Some(tls) = self.tls.borrow_mut().as_mut() {
            tls.close(&mut farewell);
        }
        if sent.is_ok() && !farewell.is_empty() {
            sent = self.send_raw(&mut farewell, Patience::InAll(begun + limits::FAREWELL)).await;
        }
        if sent.is_err() || self.socket.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let mut buffer = self.context.take_buffer();
        let mut dropped = 0;
        while dropped < DROPPED_BYTES_MAX
            && !left().is_zero()
            && self.receive_raw(&mut buffer, left(), true).await.is_ok()
        {
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
