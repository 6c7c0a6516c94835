//! What the workloads over IMAP share: where the server is and as whom, the loop of operations, and the limits of time.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::Value;
use tokio::time::timeout;

use crate::drive::{Load, Seat};
use crate::imap::{Client, ImapError};
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::Users;

/// Connections that could not be made one after another before one gives up.
pub const FAILURES_MAX: u32 = 5;

/// The parameters of a run, defaults included, as the report has them.
pub type Parameters = BTreeMap<&'static str, Value>;

/// Where the IMAP server is, and as whom to log in.
#[derive(Clone, Debug, Args)]
pub struct Login {
    /// The server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pub imap: Address,
    #[command(flatten)]
    pub tls: TlsOptions,
    #[command(flatten)]
    pub users: Users,
    /// The password of all users
    #[arg(long, value_name = "PASSWORD")]
    pub password: String,
    /// Do as if the server did not announce a capability, for example MOVE; may be repeated
    #[arg(long, value_name = "CAPABILITY")]
    pub without: Vec<String>,
}

impl Login {
    pub fn parameters(&self) -> Parameters {
        BTreeMap::from([
            ("server", self.imap.to_string().into()),
            ("tls", self.tls.tls.into()),
            ("tls_resume", self.tls.tls_resume.into()),
            ("users", self.users.pattern.as_str().into()),
            ("user_count", self.users.user_count.into()),
            ("without", self.without.clone().into()),
        ])
    }

    /// # Errors
    /// TLS is wanted on a Unix socket.
    pub fn connector(&self) -> Result<Connector, String> {
        Connector::new(&self.imap, self.tls.client())
    }

    /// The name of a connection's user: connections take the users in turn.
    pub fn user(&self, index: usize) -> String {
        self.users.name(index % self.users.user_count.max(1))
    }

    /// A connection that has logged in as a connection's user.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn client(&self, connector: &Connector, index: usize) -> Result<Client, ImapError> {
        let mut client = Client::connect(connector).await?;
        client.login(&self.user(index), &self.password).await?;
        client.do_without(&self.without);
        Ok(client)
    }

    /// # Errors
    /// There are fewer users than connections.
    pub fn one_user_each(&self, load: &Load) -> Result<(), Box<dyn Error>> {
        if load.connections > self.users.user_count {
            return Err("each connection needs a user of its own: --user-count is less than --connections".into());
        }
        Ok(())
    }
}

/// What an operation came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub operations: u64,
    pub bytes: u64,
    /// How long it took; without it, all the time that was spent.
    pub latency: Option<Duration>,
    /// How long the part of it took that the report names.
    pub part: Option<Duration>,
    /// What else there is to count.
    pub counts: Vec<(&'static str, u64)>,
}

impl Done {
    /// One operation.
    pub fn one(bytes: u64) -> Self {
        Self { operations: 1, bytes, ..Self::default() }
    }

    pub fn also(mut self, name: &'static str, count: u64) -> Self {
        self.counts.push((name, count));
        self
    }
}

/// Opens a session, waits for the start and repeats an operation in it until the run is over. A session that has broken is opened
/// again. Returns the session for its end, if it still stands.
pub async fn repeat<S>(
    seat: &Seat,
    load: &Load,
    mut open: impl AsyncFnMut() -> Result<S, ImapError>,
    mut operation: impl AsyncFnMut(&mut S, u64) -> Result<Done, ImapError>,
) -> Option<S> {
    let limit = load.operation_timeout();
    // As many passwords may be slow to check as there are connections.
    let opened = limited(limit * load.connections.max(1) as u32, open()).await;
    seat.ready().await;
    let mut session = match opened {
        Ok(session) => session,
        Err(error) => {
            seat.count_error(format!("setting up: {}", error.kind()), || error.to_string());
            return None;
        }
    };
    while let Some(turn) = seat.turn().await {
        if measured(seat, limit, turn.due, operation(&mut session, turn.number)).await {
            continue;
        }
        // A server may serve few connections of a user, so the broken one ends first.
        drop(session);
        session = reopened(seat, limit, &mut open).await?;
    }
    Some(session)
}

/// Opens a session again after it broke.
async fn reopened<S>(seat: &Seat, limit: Duration, mut open: impl AsyncFnMut() -> Result<S, ImapError>) -> Option<S> {
    for _ in 0..FAILURES_MAX {
        match limited(limit, open()).await {
            Ok(session) => return Some(session),
            Err(error) => seat.count_error(format!("connecting: {}", error.kind()), || error.to_string()),
        }
    }
    None
}

/// Repeats an operation that makes connections of its own until the run is over. The start must have been waited for.
pub async fn each(seat: &Seat, load: &Load, mut operation: impl AsyncFnMut(u64) -> Result<Done, ImapError>) {
    let limit = load.operation_timeout();
    while let Some(turn) = seat.turn().await {
        measured(seat, limit, turn.due, operation(turn.number)).await;
    }
}

/// Does one operation, which was due before or is due now, and counts it; whether the connection can be used further.
async fn measured(
    seat: &Seat,
    limit: Duration,
    due: Instant,
    operation: impl Future<Output = Result<Done, ImapError>>,
) -> bool {
    let start = Instant::now();
    let late = start.saturating_duration_since(due);
    match limited(limit, operation).await {
        Ok(done) => {
            seat.count(done.operations, done.bytes, late + done.latency.unwrap_or_else(|| start.elapsed()));
            if let Some(part) = done.part {
                seat.count_second(part);
            }
            for (name, count) in done.counts {
                seat.count_also(name, count);
            }
            true
        }
        Err(error) => {
            seat.count_error(error.kind(), || error.to_string());
            error.leaves_connection()
        }
    }
}

/// Ends a session. All is counted; what the server says to LOGOUT changes nothing.
pub async fn close(load: &Load, client: Client) {
    let _ = limited(load.operation_timeout(), client.logout()).await;
}

/// Gives up on what takes too long.
///
/// # Errors
/// Those of `operation`, and `TimedOut`.
pub async fn limited<T, E: From<io::Error>>(
    limit: Duration,
    operation: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(limit, operation).await.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}
