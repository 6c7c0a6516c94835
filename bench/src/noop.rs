//! Simple IMAP commands, one after another or several at once: what a command costs by itself.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use crate::drive::{self, Load, Seat};
use crate::imap::{Client, ImapError};
use crate::observe::Watch;
use crate::report::Report;
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::Users;

#[derive(Clone, Debug, Args)]
pub struct Noop {
    /// The server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    imap: Address,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    users: Users,
    /// The password of all users
    #[arg(long, value_name = "PASSWORD")]
    password: String,
    /// Select this mailbox first [default: none]
    #[arg(long, value_name = "NAME")]
    mailbox: Option<String>,
    /// The command, without its tag; it must not have a literal
    #[arg(long, value_name = "TEXT", default_value = "NOOP")]
    command: String,
    /// Commands that are sent together; latency is until the last is answered
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    batch: u32,
    /// --messages counts commands; --rate counts what is sent together
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Noop {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.imap.to_string().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("mailbox", self.mailbox.as_deref().into());
        parameters.insert("command", self.command.as_str().into());
        parameters.insert("batch", self.batch.into());
        let mut load = self.load.clone();
        // The driver counts what is sent together.
        load.messages = load.messages.map(|messages| messages.div_ceil(self.batch.into()));
        let connector = Connector::new(&self.imap, self.tls.client())?;
        let (watch, plan) = (self.watch.clone(), Arc::new(self));
        let shared = Arc::clone(&plan);
        let ran = drive::run(&load, &watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("noop", "commands", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Noop>, connector: Connector) {
    let limit = plan.load.operation_timeout();
    // As many passwords may be slow to check as there are connections.
    let opened = limited(limit * plan.load.connections as u32, open(seat.index, &plan, &connector)).await;
    seat.ready().await;
    let mut client = match opened {
        Ok(client) => client,
        Err(error) => return seat.count_error(format!("setting up: {}", error.kind()), || error.to_string()),
    };
    while let Some(turn) = seat.turn().await {
        match limited(limit, client.commands("the command", &plan.command, plan.batch)).await {
            Ok(octets) => seat.count(plan.batch.into(), octets, turn.due.elapsed()),
            Err(error) => return seat.count_error(error.kind(), || error.to_string()),
        }
    }
    // All is counted; what the server says to LOGOUT changes nothing.
    let _ = limited(limit, client.logout()).await;
}

async fn open(index: usize, plan: &Noop, connector: &Connector) -> Result<Client, ImapError> {
    let mut client = Client::connect(connector).await?;
    client.login(&plan.users.name(index % plan.users.user_count.max(1)), &plan.password).await?;
    if let Some(mailbox) = &plan.mailbox {
        client.select(mailbox, false).await?;
    }
    Ok(client)
}

async fn limited<T>(limit: Duration, operation: impl Future<Output = Result<T, ImapError>>) -> Result<T, ImapError> {
    timeout(limit, operation).await.unwrap_or(Err(ImapError::Io(std::io::ErrorKind::TimedOut)))
}
