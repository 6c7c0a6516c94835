//! The server as a whole: worker threads, accepting, and how it stops.

use std::error::Error;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use posthaste_engine::dictionaries::DictionaryConfig;
use posthaste_engine::error::{EngineError, RecoveryReport};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::net::Acceptor;
use posthaste_engine::io::real::{IoKind, RealIo, probe, run_worker};
use posthaste_engine::node::{StoreConfig, WorkerSeat, open_superblock};
use posthaste_engine::shard::{Shard, ShardConfig, ShardEvent};
use posthaste_engine::storage::local::{Local, READ_TIMEOUT};

use crate::config::{Config, Level, Log, LogFormat};
use crate::connection::Connection;
use crate::control::{self, Request, Response};
use crate::listen::{Listen, Place, Protocol, Service, bind};
use crate::node::{Cluster, Context, Counters, Node, Phase, Storage, Worker};
use crate::tls::TlsServer;
use crate::{imap, inbound, limits, lock, pop3};

/// Serves until told to stop.
pub fn serve(data: &Path, mut config: Config) -> Result<(), Box<dyn Error>> {
    start_log(&config.log);
    abort_on_panic();
    let lock = lock::lock(data)?;
    let cores: Vec<usize> = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect();
    let workers = if config.server.workers == 0 { cores.len().max(1) } else { config.server.workers };
    config.server.workers = workers;
    limit_connections(&mut config);
    let kind = match (IoKind::from(config.server.io), probe()) {
        (IoKind::Auto, Ok(())) => IoKind::Uring,
        (IoKind::Auto, Err(error)) => {
            tracing::info!(%error, "io_uring is not available here: using epoll");
            IoKind::Epoll
        }
        (IoKind::Uring, Err(error)) => return Err(format!("io_uring is not available here: {error}").into()),
        (kind, _) => kind,
    };
    let mut sockets: Vec<Vec<(Service, OwnedFd)>> = (0..workers).map(|_| Vec::new()).collect();
    let mut listening = Vec::new();
    for listen in &config.server.listen {
        let bound = bind(listen, workers)?;
        for (worker, socket) in bound.sockets.into_iter().enumerate() {
            sockets[worker].push((bound.listen.service, socket));
        }
        listening.push(bound.listen);
    }
    let tls = TlsServer::load(data, &config.tls, &config.server.host_name)?;
    let superblock = run_worker(kind, data.to_owned(), None, async |io| {
        open_superblock(&storage(io, &config), shards_at_creation(&config, &cores)).await
    })??;
    let (cluster, seats) = Cluster::that_trains(superblock, workers, dictionary_config(&config));
    let store = store_config(&config, superblock.shards);
    let node = Node::new(config, kind, Arc::clone(&cluster), tls);
    let (opened, opening) = mpsc::channel();
    let (ended, ending) = mpsc::channel();
    for (index, (seat, sockets)) in seats.into_iter().zip(sockets).enumerate() {
        let (node, store, opened, data) = (Arc::clone(&node), store.clone(), opened.clone(), data.to_owned());
        // More workers than cores share them as the system sees fit.
        let core = if workers <= cores.len() { Some(cores[index]) } else { None };
        let thread = std::thread::Builder::new().name(format!("worker-{index}"));
        let ended = ended.clone();
        thread.spawn(move || {
            let main = async |io| run(io, node, seat, store, sockets, &opened).await;
            let result = run_worker(kind, data, core, main).unwrap_or_else(|error| {
                let _ = opened.send(Err(format!("worker {index} cannot start: {error}")));
                Ok(())
            });
            // Nobody waits where the server did not start.
            let _ = ended.send(result);
        })?;
    }
    drop((opened, ended));
    for _ in 0..workers {
        report(&opening.recv().map_err(|_| "a worker ended early")??);
    }
    control::serve(data, Arc::clone(&node)).map_err(|error| format!("cannot open the control socket: {error}"))?;
    stop_on_signals(Arc::clone(&node))?;
    node.enter(Phase::Serving);
    announce(&listening)?;
    let mut result = Ok(());
    for _ in 0..workers {
        // What they say, and not that they are gone: the kernel may keep a thread that has asked a device which never answers, until
        // the process ends.
        result = result.and(ending.recv().map_err(|_| "a worker ended early")?);
    }
    for listen in &listening {
        if let Place::Unix(path) = &listen.place {
            let _ = std::fs::remove_file(path);
        }
    }
    let _ = std::fs::remove_file(data.join(control::SOCKET));
    drop(lock);
    tracing::info!("stopped");
    Ok(result?)
}

/// Carries out a request on a store that no server works on. The caller holds its lock.
pub fn execute_alone(data: &Path, config: &Config, request: Request) -> Result<Response, Box<dyn Error>> {
    let cores = core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).collect::<Vec<_>>();
    let response = run_worker(config.server.io.into(), data.to_owned(), None, async |io| {
        let storage = storage(io, config);
        let superblock = open_superblock(&storage, shards_at_creation(config, &cores)).await?;
        let (cluster, mut seats) = Cluster::new(superblock, 1);
        let Some(seat) = seats.pop() else { unreachable!("one worker has one seat") };
        let mut store = store_config(config, superblock.shards);
        // There is nobody who could be disturbed, and nobody to come back to.
        (store.shard.compacts_by_itself, store.shard.compaction_bytes_per_s) = (false, 0);
        store.shard.scrub_bytes_per_s = 0;
        let (worker, reports) = Worker::open(storage, cluster, seat, store).await?;
        reports.iter().flat_map(|report| &report.damage).for_each(|finding| eprintln!("damage: {finding:?}"));
        let response = control::execute(&worker, config, None, request).await;
        worker.stop().await?;
        Ok::<_, EngineError>(response)
    })??;
    Ok(response)
}

fn storage(io: RealIo, config: &Config) -> Storage {
    let read_timeout = config.store.read_timeout_s.map_or(READ_TIMEOUT, Duration::from_secs);
    Local::with_read_timeout(io, read_timeout)
}

fn shards_at_creation(config: &Config, cores: &[usize]) -> u32 {
    config.store.shards.unwrap_or(cores.len().max(1) as u32)
}

/// Space in reserve, per shard, unless configured.
const RESERVE_BYTES: u64 = 64 << 20;

/// What a restart has to replay at most, over all shards, unless configured.
const TAIL_BYTES: u64 = 512 << 20;

/// What compaction writes in a second on each shard, unless configured.
const COMPACTION_BYTES_PER_S: u64 = 4 << 20;

pub fn store_config(config: &Config, shards: u32) -> StoreConfig {
    let default = ShardConfig::default();
    let checkpoint_bytes = default.checkpoint_bytes.min(TAIL_BYTES / u64::from(shards.max(1))).max(1 << 20);
    let store = &config.store;
    let shard = ShardConfig {
        segment_size_bytes: store.segment_size_bytes.unwrap_or(default.segment_size_bytes),
        checkpoint_bytes: store.checkpoint_bytes.unwrap_or(checkpoint_bytes),
        index_cache_bytes: store.index_cache_bytes.unwrap_or(default.index_cache_bytes),
        message_cache_bytes: store.message_cache_bytes.unwrap_or(default.message_cache_bytes),
        gather_us_max: store.gather_us.unwrap_or(default.gather_us_max),
        message_octets_max: config.limits.message_bytes,
        mailbox_messages_max: config.limits.mailbox_messages,
        reserve_bytes: store.reserve_bytes.unwrap_or(RESERVE_BYTES),
        compacts_by_itself: store.compaction.unwrap_or(true),
        compaction_run_bytes: store.compaction_run_bytes.unwrap_or(default.compaction_run_bytes),
        compaction_bytes_per_s: store.compaction_bytes_per_s.unwrap_or(COMPACTION_BYTES_PER_S),
        scrub_bytes_per_s: store.scrub_bytes_per_s.unwrap_or(limits::SCRUB_BYTES_PER_S),
        scrub_interval: Duration::from_secs(store.scrub_interval_s.unwrap_or(limits::SCRUB_INTERVAL_S)),
    };
    StoreConfig { shard }
}

fn dictionary_config(config: &Config) -> DictionaryConfig {
    let default = DictionaryConfig::default();
    let train_after_octets = config.store.train_after_bytes.unwrap_or(default.train_after_octets);
    DictionaryConfig { train_after_octets, ..default }
}

fn start_log(config: &Log) {
    let level = match config.level {
        Level::Error => tracing::Level::ERROR,
        Level::Warn => tracing::Level::WARN,
        Level::Info => tracing::Level::INFO,
        Level::Debug => tracing::Level::DEBUG,
    };
    // Standard output is for those who wait for "ready".
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).with_ansi(false);
    let _ = match config.format {
        LogFormat::Text => log.try_init(),
        LogFormat::Json => log.json().flatten_event(true).try_init(),
    };
}

/// What a panicking worker left half done must not be built on. The log makes a restart safe.
fn abort_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default(panic);
        std::process::abort();
    }));
}

/// Raises the limit of descriptors, and lowers that of connections to what is left of them: a client that is refused knows
/// why, and the store's files can always be opened.
fn limit_connections(config: &mut Config) {
    /// Segments, listeners, rings, and the connections being refused.
    const OTHERS: u64 = 512;
    let descriptors = raise_descriptor_limit();
    let room = usize::try_from(descriptors.saturating_sub(OTHERS).max(64)).unwrap_or(usize::MAX);
    if room < config.limits.connections {
        tracing::info!(
            descriptors,
            connections = room,
            "the descriptor limit allows fewer connections than configured"
        );
        config.limits.connections = room;
    }
}

/// As many descriptors as the system allows this process; how many that is.
fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let now = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    now.unwrap_or(u64::MAX)
}

fn stop_on_signals(node: Arc<Node>) -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut signals = signals.forever();
        if let Some(signal) = signals.next() {
            tracing::info!(signal, "stopping: finishing what is in hand");
            node.enter(Phase::Draining);
        }
        if signals.next().is_some() {
            tracing::warn!("stopping at once: told so twice");
            std::process::exit(1);
        }
    })?;
    Ok(())
}

fn announce(listening: &[Listen]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for listen in listening {
        writeln!(out, "listening {listen}")?;
    }
    writeln!(out, "ready")?;
    out.flush()
}

fn report(reports: &[RecoveryReport]) {
    for report in reports {
        tracing::debug!(batches = report.batches, records = report.records, bytes = report.bytes, "replayed");
        if let Some((position, why)) = &report.torn_tail {
            tracing::info!(%position, %why, "dropped an unfinished tail of the log: nothing in it was acknowledged");
        }
        for finding in &report.damage {
            tracing::error!(shard = %finding.shard, file = finding.file, offset = finding.offset, touches = ?finding.touches, "damage: {}", finding.what);
        }
    }
}

type Opened = mpsc::Sender<Result<Vec<RecoveryReport>, String>>;

/// The life of one worker.
async fn run(
    io: RealIo,
    node: Arc<Node>,
    seat: WorkerSeat<Storage>,
    store: StoreConfig,
    sockets: Vec<(Service, OwnedFd)>,
    opened: &Opened,
) -> Result<(), EngineError> {
    let index = seat.index();
    let worker = match Worker::open(storage(io.clone(), &node.config), Arc::clone(&node.cluster), seat, store).await {
        Ok((worker, reports)) => {
            let _ = opened.send(Ok(reports));
            worker
        }
        Err(error) => {
            let _ = opened.send(Err(format!("worker {index} cannot open its shards: {error}")));
            return Err(error);
        }
    };
    // Replay leaves a heap of freed memory behind.
    posthaste_engine::io::real::trim_memory();
    for shard in worker.shards() {
        if shard.has_receipts() {
            node.has_receipts.store(true, Ordering::Relaxed);
        }
        io.spawn(log_events(Arc::clone(&node.cluster), shard));
    }
    let context = Context::install(Arc::clone(&node), worker.clone(), io.clone());
    wait_for(&node, Phase::Serving).await;
    let mut acceptors = Vec::new();
    for (service, socket) in sockets {
        match io.acceptor(socket) {
            Ok(acceptor) => {
                let acceptor = Rc::new(acceptor);
                io.spawn(accept(Rc::clone(&context), service, Rc::clone(&acceptor)));
                acceptors.push(acceptor);
            }
            Err(error) => tracing::error!(%error, service = service.name(), "cannot accept"),
        }
    }
    wait_for(&node, Phase::Draining).await;
    acceptors.iter().for_each(|acceptor| acceptor.stop());
    drain(&context).await;
    if node.drained.fetch_add(1, Ordering::AcqRel) + 1 == node.config.server.workers {
        node.enter(Phase::Stopping);
    }
    // The sessions of other workers may still need the shards of this one.
    wait_for(&node, Phase::Stopping).await;
    Context::uninstall();
    worker.stop().await
}

/// Tells the operator what happens to a shard, as long as the worker lives.
async fn log_events(cluster: Arc<Cluster>, shard: Shard<Storage>) {
    let id = shard.id();
    loop {
        match shard.next_event().await {
            ShardEvent::Poisoned(reason) => {
                tracing::error!(shard = %id, %reason, "the shard takes no changes: find out what is wrong with its storage, then restart");
            }
            ShardEvent::CheckpointFailed(error) => {
                tracing::error!(shard = %id, %error, "a checkpoint failed: restarts take longer until one succeeds");
            }
            ShardEvent::SpaceLow => {
                tracing::error!(shard = %id, "the device is full: no new messages until there is space again; expunging goes on in the reserve");
            }
            ShardEvent::SpaceBack => tracing::info!(shard = %id, "there is space again"),
            ShardEvent::IndexRebuilt(mailbox, error) => {
                tracing::error!(shard = %id, %mailbox, %error, "a mailbox's index was damaged and has been rebuilt from the log");
            }
            ShardEvent::SegmentDamaged(segment, error) => {
                tracing::error!(shard = %id, %segment, %error, "compaction leaves a damaged segment as it is: `posthaste check` names what is lost");
            }
            ShardEvent::SegmentUnreadable(segment, error) => {
                tracing::error!(shard = %id, %segment, %error, "compaction leaves out a segment that cannot be read now");
            }
            ShardEvent::CompactionFailed(error) => {
                tracing::error!(shard = %id, %error, "compaction has come to nothing: it will be tried again");
            }
            ShardEvent::Compacted(report) => {
                tracing::info!(
                    shard = %id,
                    segments = report.segments,
                    bytes_before = report.bytes_before,
                    bytes_after = report.bytes_after,
                    "compacted"
                );
            }
            ShardEvent::DamageFound(finding) => {
                let mailboxes = control::mailboxes_of(&shard, [&finding]);
                for line in control::describe_all(&cluster.directory(), [&finding], &mailboxes) {
                    tracing::error!(shard = %id, "the scrub has found {line}");
                }
            }
            ShardEvent::Scrubbed(report) => {
                tracing::info!(
                    shard = %id,
                    bytes = report.bytes,
                    segments = report.segments,
                    pages = report.pages,
                    findings = report.findings,
                    mended = report.mended,
                    "scrubbed"
                );
            }
        }
    }
}

async fn wait_for(node: &Node, phase: Phase) {
    // The sender lives in the node.
    let _ = node.phase.subscribe().wait_for(|current| *current >= phase).await;
}

/// Lets every session end: those that wait at once, those at work when they are done, all of them in bounded time.
async fn drain(context: &Rc<Context>) {
    /// After being cut off.
    const LAST: Duration = Duration::from_secs(2);
    context.draining.set(true);
    context.connections().iter().for_each(|connection| connection.interrupt());
    wait_for_end(context, limits::DRAIN).await;
    let left = context.connections();
    if !left.is_empty() {
        tracing::warn!(connections = left.len(), "cutting off what takes too long");
        left.iter().for_each(|connection| connection.cut());
        drop(left);
        wait_for_end(context, LAST).await;
    }
}

async fn wait_for_end(context: &Rc<Context>, at_most: Duration) {
    let begun = context.io.now();
    while context.open_connections() > 0 {
        let left = at_most.saturating_sub(context.io.now() - begun);
        if left.is_zero() {
            break;
        }
        let ended = context.ended.notified();
        // A connection may have come to rest without ending, just before the interruption.
        posthaste_engine::join::first_of(ended, context.io.sleep(left.min(Duration::from_millis(100)))).await;
        context.connections().iter().for_each(|connection| connection.interrupt());
    }
}

/// Accepts until told to stop. Never dropped before, so no connection is lost.
async fn accept(context: Rc<Context>, service: Service, acceptor: Rc<Acceptor>) {
    let mut failing = false;
    loop {
        match acceptor.accept().await {
            Ok(fd) => {
                failing = false;
                accepted(&context, service, fd);
            }
            Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => break,
            Err(error) => {
                // Out of descriptors or memory: the connection waits in the backlog.
                if !failing {
                    tracing::warn!(%error, service = service.name(), "cannot accept; trying again");
                }
                failing = true;
                context.io.sleep(limits::ACCEPT_PAUSE).await;
            }
        }
    }
}

fn accepted(context: &Rc<Context>, service: Service, fd: OwnedFd) {
    let socket = socket2::SockRef::from(&fd);
    let peer: Option<IpAddr> =
        socket.peer_addr().ok().and_then(|address| address.as_socket()).map(|address| address.ip().to_canonical());
    if peer.is_some() {
        // Replies are gathered before they are sent: waiting for more only adds latency. A client that vanished is noticed
        // by keepalive. Neither failing matters.
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_keepalive(true);
    }
    let counters = &context.node.counters;
    let admission = match context.node.admit(peer) {
        Ok(admission) => admission,
        Err(why) => {
            Counters::add(&counters.refused, 1);
            tracing::debug!(?peer, why, "refused a connection");
            return refuse(context, service, fd, why);
        }
    };
    Counters::add(&counters.accepted, 1);
    match Connection::new(context, fd, admission, peer) {
        Ok(connection) if service.implicit_tls => {
            let of_task = Rc::clone(context);
            context.io.spawn(async move {
                if connection.start_tls(service.protocol).await.is_ok() {
                    begin(&of_task, service.protocol, connection);
                }
            });
        }
        Ok(connection) => begin(context, service.protocol, connection),
        Err(error) => tracing::warn!(%error, "cannot serve a connection"),
    }
}

fn begin(context: &Rc<Context>, protocol: Protocol, connection: Rc<Connection>) {
    match protocol {
        Protocol::Imap => imap::start(context, connection),
        Protocol::Pop3 => pop3::start(context, connection),
        Protocol::Lmtp | Protocol::Smtp => inbound::start(context, protocol, connection),
    }
}

/// Says why, as far as the client will listen: not to one that wants TLS first.
fn refuse(context: &Rc<Context>, service: Service, fd: OwnedFd, why: &'static str) {
    const PATIENCE: Duration = Duration::from_secs(5);
    if service.implicit_tls {
        return;
    }
    let text = match service.protocol {
        Protocol::Imap => format!("* BYE [UNAVAILABLE] {why}\r\n"),
        Protocol::Pop3 => format!("-ERR [SYS/TEMP] {why}\r\n"),
        Protocol::Lmtp | Protocol::Smtp => format!("421 4.3.2 {why}\r\n"),
    };
    if let Ok(socket) = context.io.socket(fd) {
        context.io.spawn(async move {
            socket.set_deadline(PATIENCE);
            let _ = socket.send_all(text.into_bytes()).await;
        });
    }
}
