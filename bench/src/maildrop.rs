//! POP3 sessions that retrieve a whole maildrop.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use tokio::time::timeout;

use crate::drive::{self, Load, Seat};
use crate::observe::Watch;
use crate::pop3::{Client, Pop3Error};
use crate::report::Report;
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::Users;

#[derive(Clone, Debug, Args)]
pub struct Maildrop {
    /// The server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    pop3: Address,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    users: Users,
    /// The password of all users
    #[arg(long, value_name = "PASSWORD")]
    password: String,
    /// RETR commands that are sent together
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u64,
    /// Delete what was retrieved; a run then ends when a connection finds nothing more
    #[arg(long)]
    delete: bool,
    /// --messages counts messages; with --rate both count groups of --batch
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Maildrop {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.batch = self.batch.max(1);
        if self.load.connections > self.users.user_count {
            // RFC 1939, 4: a maildrop is locked while a session has it.
            return Err("each connection needs users of its own: --user-count is less than --connections".into());
        }
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.pop3.to_string().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("tls_resume", self.tls.tls_resume.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("batch", self.batch.into());
        parameters.insert("delete", self.delete.into());
        let connector = Connector::new(&self.pop3, self.tls.client())?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("pop3", "messages retrieved", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Maildrop>, connector: Connector) {
    seat.ready().await;
    // Each connection has users of its own, which it takes in turn.
    let own = (seat.index..plan.users.user_count).step_by(plan.load.connections.max(1));
    for user in own.cycle() {
        match session(&seat, &plan, &connector, &plan.users.name(user)).await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                seat.count_error(error.kind(), || error.to_string());
                return;
            }
        }
    }
}

/// One session; whether there may be another.
async fn session(seat: &Seat, plan: &Maildrop, connector: &Connector, user: &str) -> Result<bool, Pop3Error> {
    let limit = plan.load.operation_timeout();
    // Together, as STAT and LIST answer at once.
    let begin = async {
        let mut client = Client::connect(connector).await?;
        client.login(user, &plan.password).await?;
        let (messages, _) = client.stat().await?;
        let listed = client.list().await?;
        if listed == messages {
            Ok((client, messages))
        } else {
            Err(Pop3Error::Protocol(format!("STAT tells of {messages} messages, LIST of {listed}")))
        }
    };
    let (mut client, messages) = limited(limit, begin).await?;
    seat.count_also("sessions", 1);
    seat.count_also("TLS resumed", u64::from(client.is_resumed()));
    let mut next = 1;
    let mut over = messages == 0;
    while next <= messages && !over {
        let wanted = plan.batch.min(messages - next + 1);
        let Some(turn) = seat.turn().await else {
            over = true;
            break;
        };
        let allowed = 1 + (1..wanted).take_while(|_| seat.goes_along()).count() as u64;
        over = allowed < wanted;
        let last = next + allowed - 1;
        let mut octets = 0;
        limited(limit, client.retrieve(next..=last, |received| octets += received)).await?;
        seat.count(allowed, octets, turn.due.elapsed());
        if plan.delete {
            limited(limit, client.delete(next..=last)).await?;
        }
        next = last + 1;
    }
    limited(limit, client.quit()).await?;
    if messages == 0 && !plan.delete {
        return Err(Pop3Error::Refused("STAT", "the maildrop is empty".to_owned()));
    }
    Ok(!over)
}

async fn limited<T>(limit: Duration, operation: impl Future<Output = Result<T, Pop3Error>>) -> Result<T, Pop3Error> {
    timeout(limit, operation).await.unwrap_or(Err(Pop3Error::Io(std::io::ErrorKind::TimedOut)))
}
