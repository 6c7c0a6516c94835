//! What the workers share ([`Node`]), and what belongs to one of them ([`Context`]).

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use posthaste_engine::format::frame::Packer;
use posthaste_engine::ids::{AccountId, MessageId};
use posthaste_engine::io::real::{IoKind, RealIo};
use posthaste_engine::node::{Cluster as EngineCluster, Worker as EngineWorker};
use posthaste_engine::shard::Shard as EngineShard;
use posthaste_engine::storage::local::Local;
use posthaste_engine::view::View as EngineView;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};

use crate::config::Config;
use crate::connection::Connection;
use crate::limits;
use crate::listen::Protocol;
use crate::password::Passwords;
use crate::tls::TlsServer;
use crate::usage::{self, Usage, Usages};

pub type Storage = Local<RealIo>;
pub type Cluster = EngineCluster<Storage>;
pub type Worker = EngineWorker<Storage>;
pub type Shard = EngineShard<Storage>;
pub type View = EngineView<Storage>;

/// zstd level of what is delivered: 1 is what a core can do at the rate of a disk.
const COMPRESSION_LEVEL: i32 = 1;

/// What the server is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Phase {
    /// Not all workers have opened their shards.
    Starting,
    Serving,
    /// No new connections; what is in hand is finished.
    Draining,
    /// No worker has a connection any more: shards are stopped.
    Stopping,
}

/// Counters of the server, since its start.
#[derive(Debug, Default)]
pub struct Counters {
    pub accepted: AtomicU64,
    pub refused: AtomicU64,
    pub tls_handshakes: AtomicU64,
    pub tls_resumptions: AtomicU64,
    pub tls_failures: AtomicU64,
    pub logins: AtomicU64,
    pub failed_logins: AtomicU64,
    pub messages_received: AtomicU64,
    pub deliveries: AtomicU64,
    pub octets_received: AtomicU64,
    pub messages_fetched: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// What all workers share.
pub struct Node {
    pub config: Config,
    io: IoKind,
    lmtp: Arc<posthaste_smtp::Config>,
    smtp: Arc<posthaste_smtp::Config>,
    pub pop3: Arc<posthaste_pop3::Config>,
    pub cluster: Arc<Cluster>,
    pub passwords: Passwords,
    pub tls: TlsServer,
    pub counters: Counters,
    /// Some shard may have receipts.
    pub has_receipts: AtomicBool,
    pub started: Instant,
    pub phase: watch::Sender<Phase>,
    /// Workers without connections, while draining.
    pub drained: AtomicUsize,
    connections: AtomicUsize,
    /// Connections of each address but the loopback ones.
    addresses: Mutex<HashMap<IpAddr, usize>>,
    /// Connections of each account that has logged in.
    users: Mutex<HashMap<u64, usize>>,
    /// Passwords that are checked or wait for it, and whose turn it is by address.
    passwords_waiting: AtomicUsize,
    password_turns: Mutex<HashMap<IpAddr, Arc<Semaphore>>>,
    in_flight_bytes: AtomicU64,
    transactions: AtomicU64,
    connections_ever: AtomicU64,
}

impl Node {
    pub fn new(config: Config, io: IoKind, cluster: Arc<Cluster>, tls: TlsServer) -> Arc<Self> {
        let lmtp = posthaste_smtp::Config {
            message_bytes_max: config.limits.message_bytes,
            recipients_max: config.lmtp.recipients,
            errors_max: limits::LMTP_ERRORS_MAX,
            starttls: true,
            ..posthaste_smtp::Config::lmtp(config.server.host_name.clone())
        };
        let smtp = posthaste_smtp::Config {
            protocol: posthaste_smtp::Protocol::Smtp,
            recipients_max: config.smtp.recipients,
            recipients_refused_max: Some(limits::RECIPIENTS_REFUSED_MAX),
            ..lmtp.clone()
        };
        let pop3 = posthaste_pop3::Config {
            errors_max: limits::POP3_ERRORS_MAX,
            ..posthaste_pop3::Config::new(config.server.host_name.clone())
        };
        Arc::new(Self {
            lmtp: Arc::new(lmtp),
            smtp: Arc::new(smtp),
            pop3: Arc::new(pop3),
            config,
            io,
            cluster,
            passwords: Passwords::new(),
            tls,
            counters: Counters::default(),
            has_receipts: AtomicBool::new(false),
            started: Instant::now(),
            phase: watch::Sender::new(Phase::Starting),
            drained: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            addresses: Mutex::default(),
            users: Mutex::default(),
            passwords_waiting: AtomicUsize::new(0),
            password_turns: Mutex::default(),
            in_flight_bytes: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
            connections_ever: AtomicU64::new(0),
        })
    }

    pub fn io_name(&self) -> &'static str {
        if self.io == IoKind::Uring { "uring" } else { "epoll" }
    }

    /// What sessions of mail that comes in share.
    pub fn inbound(&self, protocol: Protocol) -> &Arc<posthaste_smtp::Config> {
        if protocol == Protocol::Smtp { &self.smtp } else { &self.lmtp }
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes.load(Ordering::Relaxed)
    }

    /// A name for a transaction, for its Received fields and the log.
    pub fn next_transaction(&self) -> u64 {
        self.transactions.fetch_add(1, Ordering::Relaxed)
    }

    /// A name for a connection in the log.
    pub fn next_connection(&self) -> u64 {
        self.connections_ever.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Moves on to a phase, never back.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|current| {
            let later = phase > *current;
            if later {
                *current = phase;
            }
            later
        });
    }

    /// Counts a new connection.
    ///
    /// # Errors
    /// Which limit it would exceed.
    pub fn admit(self: &Arc<Self>, peer: Option<IpAddr>) -> Result<Admission, &'static str> {
        let counted = peer.and_then(counted_as);
        let open = self.connections.fetch_add(1, Ordering::Relaxed);
        let mut admission = Admission { node: Arc::clone(self), peer: None, user: Cell::new(None) };
        if open >= self.config.limits.connections {
            return Err("Too many connections to this server, try again later");
        }
        if let Some(address) = counted {
            if !count(&self.addresses, address, self.config.limits.connections_per_address) {
                return Err("Too many connections from your address");
            }
            admission.peer = Some(address);
        }
        Ok(admission)
    }

    /// Waits for the turn to have a password checked: an address that guesses keeps only itself waiting. Clients of this machine
    /// are many, and do not wait for each other. `None` if too many wait.
    pub async fn password_turn(self: &Arc<Self>, peer: Option<IpAddr>) -> Option<PasswordTurn> {
        let mut turn = PasswordTurn { node: Arc::clone(self), address: None, permit: None };
        if self.passwords_waiting.fetch_add(1, Ordering::Relaxed) >= limits::PASSWORDS_WAITING {
            return None;
        }
        if let Some(address) = peer.and_then(counted_as) {
            let turns = {
                let mut turns = self.password_turns.lock().unwrap_or_else(PoisonError::into_inner);
                let of_address = turns.entry(address);
                Arc::clone(of_address.or_insert_with(|| Arc::new(Semaphore::new(limits::PASSWORDS_AT_ONCE))))
            };
            turn.address = Some(address);
            turn.permit = turns.acquire_owned().await.ok();
        }
        Some(turn)
    }

    /// Whether there is room for so much now. It is not taken.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.in_flight_bytes().saturating_add(bytes) <= self.config.limits.in_flight_bytes
    }

    /// Takes room for a client's message; `None` if there is none now.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let mut reservation = Reservation { node: Arc::clone(self), bytes: 0, holder: usage::current() };
        reservation.grow_to(bytes).then_some(reservation)
    }
}

/// What a client's address counts as: an IPv6 network of 64 bits is one client (RFC 6177, 2), who has all its addresses. `None`
/// for those of this machine: a load balancer or a mail transfer agent is many clients.
fn counted_as(address: IpAddr) -> Option<IpAddr> {
    const HOST_BITS: u128 = u64::MAX as u128;
    let counted = match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !HOST_BITS))
        }
        address => address,
    };
    (!counted.is_loopback()).then_some(counted)
}

/// Counts one more, unless there are `limit` already.
fn count<K: Eq + Hash>(counts: &Mutex<HashMap<K, usize>>, key: K, limit: usize) -> bool {
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let count = counts.entry(key).or_insert(0);
    let room = *count < limit;
    *count += usize::from(room);
    room
}

fn uncount<K: Eq + Hash>(counts: &Mutex<HashMap<K, usize>>, key: &K) {
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// A connection that counts for the limits, until dropped.
pub struct Admission {
    node: Arc<Node>,
    /// Only where connections of an address are counted.
    peer: Option<IpAddr>,
    /// The account that has logged in.
    user: Cell<Option<u64>>,
}

impl Admission {
    /// Counts it among the connections of an account, once.
    ///
    /// # Errors
    /// Which limit it would exceed.
    pub fn admit_user(&self, account: u64) -> Result<(), &'static str> {
        if self.user.get() == Some(account) {
            return Ok(());
        }
        self.dismiss_user();
        if !count(&self.node.users, account, self.node.config.limits.connections_per_user) {
            return Err("Too many connections of this user");
        }
        self.user.set(Some(account));
        Ok(())
    }
}

impl Admission {
    /// It is the connection of nobody any more.
    pub fn dismiss_user(&self) {
        if let Some(user) = self.user.take() {
            uncount(&self.node.users, &user);
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.node.connections.fetch_sub(1, Ordering::Relaxed);
        if let Some(peer) = self.peer {
            uncount(&self.node.addresses, &peer);
        }
        self.dismiss_user();
    }
}

/// The turn of a login, until dropped.
pub struct PasswordTurn {
    node: Arc<Node>,
    address: Option<IpAddr>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for PasswordTurn {
    fn drop(&mut self) {
        self.node.passwords_waiting.fetch_sub(1, Ordering::Relaxed);
        drop(self.permit.take());
        if let Some(address) = self.address {
            let mut turns = self.node.password_turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever waits or has a turn holds on to it.
            if turns.get(&address).is_some_and(|turns| Arc::strong_count(turns) == 1) {
                turns.remove(&address);
            }
        }
    }
}

/// Room for a client's bytes, given back when dropped.
pub struct Reservation {
    node: Arc<Node>,
    bytes: u64,
    /// Whose session it is.
    holder: Option<Rc<Usage>>,
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes this at least so large. False if there is no room.
    pub fn grow_to(&mut self, bytes: u64) -> bool {
        let Some(more) = bytes.checked_sub(self.bytes).filter(|&more| more > 0) else { return true };
        let before = self.node.in_flight_bytes.fetch_add(more, Ordering::Relaxed);
        if before + more > self.node.config.limits.in_flight_bytes {
            self.node.in_flight_bytes.fetch_sub(more, Ordering::Relaxed);
            return false;
        }
        self.bytes = bytes;
        self.holder.iter().for_each(|holder| holder.hold(more));
        true
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.node.in_flight_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.holder.iter().for_each(|holder| holder.release(self.bytes));
    }
}

thread_local! {
    static CONTEXT: RefCell<Option<Rc<Context>>> = const { RefCell::new(None) };
}

/// What the sessions of one worker share.
pub struct Context {
    pub node: Arc<Node>,
    pub worker: Worker,
    pub io: RealIo,
    pub packer: RefCell<Packer>,
    /// No new work is begun.
    pub draining: Cell<bool>,
    /// Told when a connection has ended.
    pub ended: Notify,
    /// Receive buffers at rest.
    buffers: RefCell<Vec<Vec<u8>>>,
    /// Receive buffers that waiting connections hold.
    pub buffers_held: Cell<usize>,
    /// Accounts of this worker's shards whose maildrop a POP3 session has.
    pub maildrops_locked: RefCell<HashSet<AccountId>>,
    /// Large messages whose damage was met when a part of them had been sent.
    damaged: RefCell<HashSet<MessageId>>,
    connections: RefCell<Connections>,
    /// What each user takes of this worker.
    pub usages: Usages,
}

#[derive(Default)]
struct Connections {
    /// By their number in this worker.
    places: Vec<Weak<Connection>>,
    free: Vec<u32>,
    open: usize,
}

impl Context {
    /// Makes this thread's context, to be found by [`Context::current`].
    pub fn install(node: Arc<Node>, worker: Worker, io: RealIo) -> Rc<Self> {
        let context = Rc::new(Self {
            node,
            worker,
            io,
            packer: RefCell::new(Packer::new(COMPRESSION_LEVEL)),
            draining: Cell::new(false),
            ended: Notify::new(),
            buffers: RefCell::default(),
            buffers_held: Cell::new(0),
            maildrops_locked: RefCell::default(),
            damaged: RefCell::default(),
            connections: RefCell::default(),
            usages: Usages::default(),
        });
        CONTEXT.set(Some(Rc::clone(&context)));
        context
    }

    pub fn uninstall() {
        CONTEXT.set(None);
    }

    /// The context of this thread; `None` before its worker is ready, and after it has ended.
    pub fn current() -> Option<Rc<Self>> {
        CONTEXT.with_borrow(Clone::clone)
    }

    pub fn packer() -> Packer {
        Packer::new(COMPRESSION_LEVEL)
    }

    /// Remembers that a message cannot be read to its end, so that the next client is told so before it is promised its octets.
    pub fn note_damaged(&self, message: MessageId) {
        let mut damaged = self.damaged.borrow_mut();
        if damaged.len() < limits::DAMAGED_REMEMBERED {
            damaged.insert(message);
        }
    }

    pub fn is_damaged(&self, message: MessageId) -> bool {
        let damaged = self.damaged.borrow();
        !damaged.is_empty() && damaged.contains(&message)
    }

    /// Lets other sessions run, between two steps of something that takes long.
    pub async fn turn(&self) {
        self.usages.turn(&self.io).await;
    }

    /// An empty buffer with room for a receive.
    pub fn take_buffer(&self) -> Vec<u8> {
        self.buffers.borrow_mut().pop().unwrap_or_else(|| Vec::with_capacity(limits::INPUT_BYTES))
    }

    /// Gives a buffer back. One that has grown, or that nobody will need soon, is freed.
    pub fn give_buffer(&self, mut buffer: Vec<u8>) {
        const AT_REST: usize = 64;
        buffer.clear();
        let mut buffers = self.buffers.borrow_mut();
        let usual = (limits::INPUT_BYTES..=limits::INPUT_DATA_BYTES).contains(&buffer.capacity());
        if usual && buffers.len() < AT_REST {
            buffers.push(buffer);
        }
    }

    /// Lists a connection, and gives its number in the list.
    pub fn register(&self, connection: Weak<Connection>) -> u32 {
        let mut connections = self.connections.borrow_mut();
        connections.open += 1;
        match connections.free.pop() {
            Some(number) => {
                connections.places[number as usize] = connection;
                number
            }
            None => {
                connections.places.push(connection);
                connections.places.len() as u32 - 1
            }
        }
    }

    pub fn unregister(&self, number: u32) {
        let mut connections = self.connections.borrow_mut();
        connections.places[number as usize] = Weak::new();
        connections.free.push(number);
        connections.open -= 1;
        self.ended.notify_waiters();
    }

    pub fn open_connections(&self) -> usize {
        self.connections.borrow().open
    }

    /// The connections that are open now.
    pub fn connections(&self) -> Vec<Rc<Connection>> {
        self.connections.borrow().places.iter().filter_map(Weak::upgrade).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_addresses_count_as() {
        let counted =
            |address: &str| counted_as(address.parse().expect("an address")).map(|counted| counted.to_string());
        let is = |network: &str| Some(network.to_owned());
        for own in ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"] {
            assert_eq!(counted(own), None, "{own}");
        }
        assert_eq!(counted("192.0.2.1"), is("192.0.2.1"));
        assert_eq!(counted("::ffff:192.0.2.1"), is("192.0.2.1"));
        assert_eq!(counted("2001:db8:1:2:3:4:5:6"), is("2001:db8:1:2::"));
        assert_eq!(counted("2001:db8:1:2:ffff::"), is("2001:db8:1:2::"));
        assert_eq!(counted("2001:db8:1:3::1"), is("2001:db8:1:3::"));
    }

    #[test]
    fn counts_go_up_to_the_limit_and_back() {
        let counts = Mutex::default();
        assert!(count(&counts, "a", 2) && count(&counts, "a", 2));
        assert!(!count(&counts, "a", 2) && count(&counts, "b", 2));
        uncount(&counts, &"a");
        assert!(count(&counts, "a", 2) && !count(&counts, "a", 2));
        ["a", "a", "b"].iter().for_each(|key| uncount(&counts, key));
        assert!(counts.into_inner().expect("nobody panicked").is_empty(), "nothing is kept of who has gone");
    }
}
