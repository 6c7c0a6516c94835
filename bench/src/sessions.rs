//! Whole IMAP sessions, each over a connection of its own: what a client does that looks in and goes.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use crate::drive::{self, Load, Seat};
use crate::imap::{Client, ImapError, check_fetch};
use crate::observe::Watch;
use crate::report::Report;
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::Users;

#[derive(Clone, Debug, Args)]
pub struct Sessions {
    /// The server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    imap: Address,
    #[command(flatten)]
    tls: TlsOptions,
    /// Each session takes the next user
    #[command(flatten)]
    users: Users,
    /// The password of all users
    #[arg(long, value_name = "PASSWORD")]
    password: String,
    /// The mailbox that each session selects
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    /// What each session fetches of all messages
    #[arg(long, value_name = "ITEM", default_value = "FLAGS")]
    item: String,
    /// --messages counts sessions
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Sessions {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.imap.to_string().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("tls_resume", self.tls.tls_resume.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("item", self.item.as_str().into());
        let connector = Connector::new(&self.imap, self.tls.client())?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("sessions", "sessions", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Sessions>, connector: Connector) {
    let limit = plan.load.operation_timeout();
    let names = plan.users.names();
    seat.ready().await;
    while let Some(turn) = seat.turn().await {
        let user = &names[(turn.number % names.len() as u64) as usize];
        match limited(limit, session(&connector, user, &plan)).await {
            Ok(ended) => {
                seat.count(1, ended.bytes, turn.due.elapsed());
                seat.count_also("messages listed", ended.messages);
                seat.count_also("TLS resumed", u64::from(ended.resumed));
            }
            Err(error) => seat.count_error(error.kind(), || error.to_string()),
        }
    }
}

/// What a session had.
struct Ended {
    messages: u64,
    bytes: u64,
    resumed: bool,
}

async fn session(connector: &Connector, user: &str, plan: &Sessions) -> Result<Ended, ImapError> {
    let mut client = Client::connect(connector).await?;
    let resumed = client.is_resumed();
    client.login(user, &plan.password).await?;
    let exists = client.select(&plan.mailbox, false).await?;
    let (mut messages, mut bytes) = (0, 0);
    // A sequence set of an empty mailbox names messages that are not there (RFC 9051, 9: seq-number).
    if exists > 0 {
        client
            .command("FETCH", &format!("FETCH 1:* ({})", plan.item), |response| {
                if let Some((_, list)) = response.numbered("FETCH") {
                    bytes += check_fetch(response, list)? as u64;
                    messages += 1;
                }
                Ok(())
            })
            .await?;
    }
    if messages < u64::from(exists) {
        return Err(ImapError::Protocol(format!("{messages} FETCH responses for {exists} messages")));
    }
    client.logout().await?;
    Ok(Ended { messages, bytes, resumed })
}

async fn limited<T>(limit: Duration, operation: impl Future<Output = Result<T, ImapError>>) -> Result<T, ImapError> {
    timeout(limit, operation).await.unwrap_or(Err(ImapError::Io(std::io::ErrorKind::TimedOut)))
}
