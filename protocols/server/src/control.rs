//! Administration: what the commands of the command line ask for, on a running server through its control socket, on a
//! stopped one by opening the store.
//!
//! The socket speaks one JSON request and one JSON response per line. Only the server's own user can open it (mode 0600),
//! and passwords go over it as hashes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Duration;

use posthaste_engine::compaction::Choice;
use posthaste_engine::error::{EngineError, Finding, Refusal};
use posthaste_engine::ids::{AccountId, MailboxId, ShardId};
use posthaste_engine::io::Runtime;
use posthaste_engine::node::{Directory, NewAccount};
use posthaste_engine::shard::Shard;
use posthaste_engine::storage::Storage;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::check::describe;
use crate::config::Config;
use crate::limits;
use crate::node::{Context, Node, Worker};

/// In the data directory.
pub const SOCKET: &str = "control.sock";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    pub password_hash: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum Request {
    AddUsers {
        users: Vec<User>,
    },
    SetPassword {
        user: User,
    },
    DeleteUser {
        name: String,
    },
    ListUsers,
    Stats {
        /// How many users to name.
        #[serde(default)]
        users: usize,
    },
    Compact {
        wait: bool,
    },
    /// Begins a pass, which is over when each shard has as many of them as the answer says.
    Scrub {
        bytes_per_s: Option<u64>,
    },
    ScrubStatus {
        findings: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
pub enum Response {
    Done,
    /// The names that were there already, and were left as they are.
    Added {
        existing: Vec<String>,
    },
    Users {
        names: Vec<String>,
    },
    Stats(Box<Stats>),
    /// Of all shards together.
    Compacted {
        segments: u64,
        bytes_before: u64,
        bytes_after: u64,
    },
    /// For each shard, how far it is and what it has found.
    Scrub {
        shards: Vec<Scrub>,
    },
    Error {
        message: String,
    },
}

/// The scrub of a shard.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Scrub {
    pub is_running: bool,
    pub passes: u64,
    pub log_bytes_done: u64,
    pub log_bytes: u64,
    /// Lines for people, of the pass under way or the last one.
    pub findings: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    pub accounts: u64,
    /// How many times dictionaries had been trained when those were made that are in use; 0: there are none.
    #[serde(default)]
    pub dictionary_generation: u32,
    /// When this was, in milliseconds since 1970.
    #[serde(default)]
    pub now_ms: u64,
    /// Only of a running server.
    pub server: Option<ServerStats>,
    pub shards: Vec<ShardStats>,
    /// Of a running server those who have taken most CPU time, the first before all.
    #[serde(default)]
    pub users: Vec<UserStats>,
}

/// What the sessions of a user have taken since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserStats {
    pub name: String,
    pub cpu_us: u64,
    pub octets_received: u64,
    pub octets_sent: u64,
    /// From the store, caches not counted.
    pub octets_read: u64,
    /// What they hold in memory for large messages now.
    pub octets_held: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerStats {
    pub uptime_s: u64,
    pub workers: u64,
    pub io: String,
    pub connections: u64,
    pub accepted: u64,
    pub refused: u64,
    pub logins: u64,
    pub failed_logins: u64,
    pub messages_received: u64,
    pub deliveries: u64,
    pub octets_received: u64,
    pub messages_fetched: u64,
    pub in_flight_bytes: u64,
}

/// Of one shard, since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ShardStats {
    pub shard: u32,
    pub batches: u64,
    pub records: u64,
    pub log_bytes: u64,
    pub segments_sealed: u64,
    pub checkpoints: u64,
    pub index_loads: u64,
    #[serde(default)]
    pub index_cache_hits: u64,
    #[serde(default)]
    pub index_cache_bytes: u64,
    #[serde(default)]
    pub mailboxes_in_use: u64,
    #[serde(default)]
    pub mailboxes_at_rest: u64,
    #[serde(default)]
    pub at_rest_bytes: u64,
    pub record_reads: u64,
    pub record_read_bytes: u64,
    pub body_frames_unpacked: u64,
    pub message_cache_hits: u64,
    pub message_cache_misses: u64,
    pub message_cache_bytes: u64,
    #[serde(default)]
    pub compactions: u64,
    #[serde(default)]
    pub segments_compacted: u64,
    #[serde(default)]
    pub compacted_bytes_read: u64,
    #[serde(default)]
    pub compacted_bytes_written: u64,
    #[serde(default)]
    pub scrub_passes: u64,
    /// Milliseconds since 1970; 0: none has come to its end.
    #[serde(default)]
    pub scrub_finished_ms: u64,
    #[serde(default)]
    pub scrub_bytes: u64,
    #[serde(default)]
    pub scrub_findings: u64,
}

/// Carries out a request. What it changes is durable when this returns.
pub async fn execute(worker: &Worker, config: &Config, node: Option<&Node>, request: Request) -> Response {
    match try_execute(worker, config, node, request).await {
        Ok(response) => response,
        Err(error) => Response::Error { message: error.to_string() },
    }
}

async fn try_execute(
    worker: &Worker,
    config: &Config,
    node: Option<&Node>,
    request: Request,
) -> Result<Response, EngineError> {
    match request {
        Request::AddUsers { users } => {
            let names: Vec<String> = users.iter().map(|user| user.name.clone()).collect();
            let accounts =
                users.into_iter().map(|user| NewAccount { name: user.name, password: user.password_hash }).collect();
            let mailboxes = config.accounts.mailboxes.iter().map(|first| first.0.clone()).collect();
            let results = worker.add_accounts_with(accounts, Arc::new(mailboxes)).await?;
            let mut existing = Vec::new();
            for (name, result) in names.into_iter().zip(results) {
                match result {
                    Ok(_) => {}
                    Err(Refusal::AccountExists) => existing.push(name),
                    Err(refusal) => return Err(refusal.into()),
                }
            }
            Ok(Response::Added { existing })
        }
        Request::SetPassword { user } => {
            worker.set_password(&user.name, user.password_hash).await?;
            Ok(Response::Done)
        }
        Request::DeleteUser { name } => {
            worker.delete_account(&name).await?;
            Ok(Response::Done)
        }
        Request::ListUsers => {
            let directory = worker.cluster().directory();
            let mut names: Vec<String> = directory.iter().map(|account| account.name.clone()).collect();
            names.sort_unstable();
            Ok(Response::Users { names })
        }
        Request::Scrub { bytes_per_s } if node.is_some() => {
            let configured = config.store.scrub_bytes_per_s.filter(|&configured| configured > 0);
            scrub(worker, bytes_per_s.or(configured).unwrap_or(limits::SCRUB_BYTES_PER_S)).await
        }
        Request::Scrub { .. } => {
            let message = "no server runs on this store: `posthaste check` looks at all of it".to_owned();
            Ok(Response::Error { message })
        }
        Request::ScrubStatus { findings } => scrub_status(worker, findings).await,
        Request::Stats { users } => stats(worker, node, users).await.map(|stats| Response::Stats(Box::new(stats))),
        Request::Compact { wait } if wait || node.is_none() => compact(worker).await,
        Request::Compact { .. } => {
            let worker = worker.clone();
            worker.clone().storage().spawn(async move {
                // What fails is told by the shard's events.
                let _ = compact(&worker).await;
            });
            Ok(Response::Done)
        }
    }
}

/// Begins a pass on every shard.
async fn scrub(worker: &Worker, bytes_per_s: u64) -> Result<Response, EngineError> {
    let mut shards = Vec::new();
    for shard in (0..worker.cluster().superblock.shards).map(ShardId) {
        let passes = worker.call(shard, |shard| async move { shard.stats().scrub_passes }).await?;
        shards.push(Scrub { is_running: true, passes: passes + 1, ..Scrub::default() });
        let worker = worker.clone();
        worker.clone().storage().spawn(async move {
            // What it finds is told by the shard's events.
            let _ = worker.call(shard, move |shard| async move { shard.scrub(bytes_per_s).await }).await;
        });
    }
    Ok(Response::Scrub { shards })
}

async fn scrub_status(worker: &Worker, findings: bool) -> Result<Response, EngineError> {
    let mut shards = Vec::new();
    for shard in (0..worker.cluster().superblock.shards).map(ShardId) {
        let look = move |shard: Shard<_>| async move {
            let status = shard.scrub_status();
            let mailboxes = if findings { mailboxes_of(&shard, &status.findings) } else { BTreeMap::new() };
            (status, mailboxes)
        };
        let (status, mailboxes) = worker.call(shard, look).await?;
        let mut scrub = Scrub {
            is_running: status.is_running,
            passes: status.passes,
            log_bytes_done: status.log_bytes_done,
            log_bytes: status.log_bytes,
            findings: Vec::new(),
        };
        if findings {
            scrub.findings = describe_all(&worker.cluster().directory(), &status.findings, &mailboxes);
        }
        shards.push(scrub);
    }
    Ok(Response::Scrub { shards })
}

/// Whose the mailboxes are that findings touch, and their names.
pub fn mailboxes_of<'a, S: Storage>(
    shard: &Shard<S>,
    findings: impl IntoIterator<Item = &'a Finding>,
) -> BTreeMap<MailboxId, (AccountId, String)> {
    let touched: BTreeSet<MailboxId> =
        findings.into_iter().flat_map(|finding| &finding.touches).map(|touch| touch.0).collect();
    touched.into_iter().filter_map(|mailbox| Some((mailbox, shard.mailbox_name(mailbox)?))).collect()
}

/// Findings as lines for people.
pub fn describe_all<'a>(
    directory: &Directory,
    findings: impl IntoIterator<Item = &'a Finding>,
    mailboxes: &BTreeMap<MailboxId, (AccountId, String)>,
) -> Vec<String> {
    let wanted: BTreeSet<AccountId> = mailboxes.values().map(|(account, _)| *account).collect();
    let mut accounts: BTreeMap<AccountId, String> = BTreeMap::new();
    if !wanted.is_empty() {
        let found = directory.iter().filter(|account| wanted.contains(&account.account));
        accounts.extend(found.map(|account| (account.account, account.name.clone())));
    }
    let whose = |mailbox| {
        let (account, name): &(AccountId, String) = mailboxes.get(&mailbox)?;
        Some((accounts.get(account).cloned(), name.clone()))
    };
    findings.into_iter().map(|finding| describe(finding, whose)).collect()
}

async fn compact(worker: &Worker) -> Result<Response, EngineError> {
    let (mut segments, mut bytes_before, mut bytes_after) = (0, 0, 0);
    for shard in 0..worker.cluster().superblock.shards {
        let compact = |shard: Shard<_>| async move { shard.compact(Choice::All).await };
        let report = worker.call(ShardId(shard), compact).await??;
        segments += report.segments;
        bytes_before += report.bytes_before;
        bytes_after += report.bytes_after;
    }
    Ok(Response::Compacted { segments, bytes_before, bytes_after })
}

/// The users of all workers who have taken most time.
async fn top_users(worker: &Worker, count: usize) -> Vec<UserStats> {
    let cluster = worker.cluster();
    let mut by_name: BTreeMap<String, UserStats> = BTreeMap::new();
    for index in 0..cluster.workers() {
        let (sender, receiver) = oneshot::channel();
        let job = move |_: &Worker| {
            // Whoever asked may have gone.
            let _ = sender.send(Context::current().map(|context| context.usages.top(count)));
        };
        cluster.send(index, Box::new(job));
        for user in receiver.await.ok().flatten().unwrap_or_default() {
            let sum = by_name.entry(user.name.clone()).or_default();
            sum.name = user.name;
            sum.cpu_us += user.cpu_us;
            sum.octets_received += user.octets_received;
            sum.octets_sent += user.octets_sent;
            sum.octets_read += user.octets_read;
            sum.octets_held += user.octets_held;
        }
    }
    let mut users: Vec<UserStats> = by_name.into_values().collect();
    users.sort_by_key(|user| std::cmp::Reverse(user.cpu_us));
    users.truncate(count);
    users
}

async fn stats(worker: &Worker, node: Option<&Node>, users: usize) -> Result<Stats, EngineError> {
    let cluster = worker.cluster();
    let mut stats = Stats {
        accounts: cluster.directory().len() as u64,
        now_ms: worker.storage().wall_clock_ms(),
        dictionary_generation: cluster.dictionaries().current().map_or(0, |set| set.generation()),
        ..Stats::default()
    };
    for shard in 0..cluster.superblock.shards {
        let of_shard = worker.call(ShardId(shard), |shard| async move { shard.stats() }).await?;
        stats.shards.push(ShardStats {
            shard,
            batches: of_shard.batches,
            records: of_shard.records,
            log_bytes: of_shard.log_bytes,
            segments_sealed: of_shard.segments_sealed,
            checkpoints: of_shard.checkpoints,
            index_loads: of_shard.index_loads,
            index_cache_hits: of_shard.index_cache_hits,
            index_cache_bytes: of_shard.index_cache_bytes,
            mailboxes_in_use: of_shard.mailboxes_in_use,
            mailboxes_at_rest: of_shard.mailboxes_at_rest,
            at_rest_bytes: of_shard.at_rest_bytes,
            record_reads: of_shard.record_reads,
            record_read_bytes: of_shard.record_read_bytes,
            body_frames_unpacked: of_shard.body_frames_unpacked,
            message_cache_hits: of_shard.message_cache_hits,
            message_cache_misses: of_shard.message_cache_misses,
            message_cache_bytes: of_shard.message_cache_bytes,
            compactions: of_shard.compactions,
            segments_compacted: of_shard.segments_compacted,
            compacted_bytes_read: of_shard.compacted_bytes_read,
            compacted_bytes_written: of_shard.compacted_bytes_written,
            scrub_passes: of_shard.scrub_passes,
            scrub_finished_ms: of_shard.scrub_finished_ms,
            scrub_bytes: of_shard.scrub_bytes,
            scrub_findings: of_shard.scrub_findings,
        });
    }
    if node.is_some() {
        stats.users = top_users(worker, users).await;
    }
    stats.server = node.map(|node| {
        let counters = &node.counters;
        ServerStats {
            uptime_s: node.started.elapsed().as_secs(),
            workers: cluster.workers() as u64,
            io: node.io_name().to_owned(),
            connections: node.connections() as u64,
            accepted: counters.accepted.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed),
            logins: counters.logins.load(Ordering::Relaxed),
            failed_logins: counters.failed_logins.load(Ordering::Relaxed),
            messages_received: counters.messages_received.load(Ordering::Relaxed),
            deliveries: counters.deliveries.load(Ordering::Relaxed),
            octets_received: counters.octets_received.load(Ordering::Relaxed),
            messages_fetched: counters.messages_fetched.load(Ordering::Relaxed),
            in_flight_bytes: node.in_flight_bytes(),
        }
    });
    Ok(stats)
}

/// A way to the socket that is short enough for a socket address (108 bytes), however long the one to the data directory
/// is. It holds while the file is open.
fn short_path(data: &Path) -> io::Result<(File, PathBuf)> {
    let directory = File::open(data)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
    Ok((directory, path.into()))
}

/// How long a client of the socket may take.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves the control socket on a thread of its own, until the process ends.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(data: &Path, node: Arc<Node>) -> io::Result<()> {
    let (_directory, path) = short_path(data)?;
    // The data directory is locked, so whoever left this is gone.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    std::thread::Builder::new().name("control".to_owned()).spawn(move || {
        for client in listener.incoming() {
            // Compaction may take an hour, and others have questions meanwhile.
            let node = Arc::clone(&node);
            let thread = std::thread::Builder::new().name("control-client".to_owned()).spawn(move || {
                let result = client.and_then(|client| {
                    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
                    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
                    serve_client(&client, &node)
                });
                if let Err(error) = result {
                    tracing::debug!(%error, "a client of the control socket");
                }
            });
            if let Err(error) = thread {
                tracing::warn!(%error, "no thread for a client of the control socket");
            }
        }
    })?;
    Ok(())
}

fn serve_client(client: &UnixStream, node: &Arc<Node>) -> io::Result<()> {
    let mut reader = BufReader::new(client.take(limits::CONTROL_REQUEST_BYTES));
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let response = match serde_json::from_str(&line) {
            Ok(request) => execute_on_worker(node, request),
            Err(error) => Response::Error { message: format!("not understood: {error}") },
        };
        write_line(client, &response)?;
        line.clear();
    }
    Ok(())
}

fn execute_on_worker(node: &Arc<Node>, request: Request) -> Response {
    let (sender, receiver) = mpsc::channel();
    let of_job = Arc::clone(node);
    let job = move |worker: &Worker| {
        let of_task = worker.clone();
        worker.storage().spawn(async move {
            // Whoever asked may have gone.
            let _ = sender.send(execute(&of_task, &of_job.config, Some(&of_job), request).await);
        });
    };
    node.cluster.send(0, Box::new(job));
    receiver.recv().unwrap_or_else(|_| Response::Error { message: "the server is stopping".to_owned() })
}

fn write_line(mut client: &UnixStream, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    client.write_all(&text)
}

/// Asks a running server.
///
/// # Errors
/// No server answers there.
pub fn ask(data: &Path, request: &Request) -> io::Result<Response> {
    let (_directory, path) = short_path(data)?;
    let client = UnixStream::connect(path)?;
    write_line(&client, request)?;
    let mut line = String::new();
    BufReader::new(&client).read_line(&mut line)?;
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_str(&line)?)
}
