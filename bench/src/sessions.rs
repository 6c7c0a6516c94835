//! Whole IMAP sessions, each over a connection of its own: what a client does that looks in and goes.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::imap::{ImapError, check_fetch};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, each};
use crate::stream::Connector;
use crate::users::UserOrder;

#[derive(Clone, Debug, Args)]
pub struct Sessions {
    #[command(flatten)]
    login: Login,
    #[command(flatten)]
    order: UserOrder,
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
        let mut parameters = self.login.parameters();
        parameters.insert("user_order", self.order.name().into());
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("item", self.item.as_str().into());
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("sessions", "sessions", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Sessions>, connector: Connector) {
    seat.ready().await;
    each(&seat, &plan.load, async |number| session(&connector, number, &plan).await).await;
}

async fn session(connector: &Connector, number: u64, plan: &Sessions) -> Result<Done, ImapError> {
    let mut client = plan.login.client(connector, plan.order.user_of(number, plan.login.users.user_count)).await?;
    let resumed = client.is_resumed();
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
        return Err(ImapError::Wrong(
            "FETCH responses missing",
            format!("{messages} FETCH responses for {exists} messages"),
        ));
    }
    client.logout().await?;
    Ok(Done::one(bytes).also("messages listed", messages).also("TLS resumed", u64::from(resumed)))
}
