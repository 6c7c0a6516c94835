//! Reading over IMAP.

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
pub struct Fetch {
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
    /// The mailbox that each connection examines
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    /// What to fetch
    #[arg(long, value_name = "ITEM", default_value = "BODY.PEEK[]")]
    item: String,
    /// Messages of one command
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// --messages counts messages
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Fetch {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.batch = self.batch.max(1);
        let json = self.load.json;
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.imap.to_string().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("item", self.item.as_str().into());
        parameters.insert("batch", self.batch.into());
        let mut load = self.load.clone();
        // The driver counts commands.
        load.messages = load.messages.map(|messages| messages.div_ceil(self.batch.into()));
        let connector = Connector::new(&self.imap, self.tls.client())?;
        let (watch, plan) = (self.watch.clone(), Arc::new(self));
        let shared = Arc::clone(&plan);
        let ran = drive::run(&load, &watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("fetch", "messages fetched", None, &plan.load, parameters, ran).print(json)
    }
}

async fn connection(seat: Seat, plan: Arc<Fetch>, connector: Connector) {
    let limit = plan.load.operation_timeout();
    // As many passwords may be slow to check as there are connections.
    let opened = limited(limit * plan.load.connections as u32, open(seat.index, &plan, &connector)).await;
    seat.ready().await;
    let (mut client, exists) = match opened {
        Ok(opened) => opened,
        Err(error) => return seat.count_error(format!("setting up: {}", error.kind()), || error.to_string()),
    };
    let mut next = 1;
    while let Some(turn) = seat.turn().await {
        let last = (next + plan.batch - 1).min(exists);
        match limited(limit, fetch(&mut client, next, last, &plan.item)).await {
            Ok(bytes) => seat.count(u64::from(last - next + 1), bytes, turn.due.elapsed()),
            Err(error) => {
                seat.count_error(error.kind(), || error.to_string());
                if !matches!(error, ImapError::Refused(..)) {
                    return;
                }
            }
        }
        next = if last == exists { 1 } else { last + 1 };
    }
    // All is counted; what the server says to LOGOUT changes nothing.
    let _ = limited(limit, client.logout()).await;
}

async fn open(index: usize, plan: &Fetch, connector: &Connector) -> Result<(Client, u32), ImapError> {
    let mut client = Client::connect(connector).await?;
    client.login(&plan.users.name(index % plan.users.user_count.max(1)), &plan.password).await?;
    let exists = client.select(&plan.mailbox, true).await?;
    if exists == 0 {
        return Err(ImapError::Refused("EXAMINE", "the mailbox is empty".to_owned()));
    }
    Ok((client, exists))
}

async fn fetch(client: &mut Client, first: u32, last: u32, item: &str) -> Result<u64, ImapError> {
    let (mut bytes, mut found) = (0, 0);
    let line = if first == last { format!("FETCH {first} ({item})") } else { format!("FETCH {first}:{last} ({item})") };
    client
        .command("FETCH", &line, |response| {
            if let Some((number, list)) = response.numbered("FETCH")
                && (first..=last).contains(&number)
            {
                bytes += check_fetch(response, list)? as u64;
                found += 1;
            }
            Ok(())
        })
        .await?;
    if found == last - first + 1 {
        Ok(bytes)
    } else {
        Err(ImapError::Protocol(format!("{found} FETCH responses for messages {first} to {last}")))
    }
}

async fn limited<T>(limit: Duration, operation: impl Future<Output = Result<T, ImapError>>) -> Result<T, ImapError> {
    timeout(limit, operation).await.unwrap_or(Err(ImapError::Io(std::io::ErrorKind::TimedOut)))
}
