//! Marking messages as deleted, and expunging them.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::fill::{fill, refill};
use crate::imap::{Client, ImapError};
use crate::moves::gone;
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Expunge {
    #[command(flatten)]
    login: Login,
    /// Messages of each connection's mailbox; they are made before the run, and again when they are used up, which is in no latency
    /// but in the server's CPU
    #[arg(long, value_name = "N", default_value_t = 2000)]
    mailbox_messages: u32,
    /// Messages that are marked and expunged together
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// The size of the messages
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    size: usize,
    /// --messages counts expunges, each of --batch messages
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Expunge {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.batch = self.batch.max(1);
        self.mailbox_messages = self.mailbox_messages.max(1);
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox_messages", self.mailbox_messages.into());
        parameters.insert("batch", self.batch.into());
        parameters.insert("size", self.size.into());
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("expunge", "expunges", Some("the marking"), &plan.load, parameters, ran).print(plan.load.json)
    }
}

struct Opened {
    client: Client,
    mailbox: String,
    left: u32,
}

async fn connection(seat: Seat, plan: Arc<Expunge>, connector: Connector) {
    let open = async || {
        let mut client = plan.login.client(&connector, seat.index).await?;
        let mailbox = format!("bench-expunge-{}", seat.index);
        fill(&mut client, &mailbox, plan.mailbox_messages, plan.size).await?;
        Ok(Opened { client, mailbox, left: plan.mailbox_messages })
    };
    let operation = async |opened: &mut Opened, _| {
        let mut refills = 0;
        if opened.left == 0 {
            refill(&mut opened.client, &opened.mailbox, plan.mailbox_messages, plan.size).await?;
            opened.left = plan.mailbox_messages;
            refills = 1;
        }
        let batch = plan.batch.min(opened.left);
        opened.left -= batch;
        let done = expunge(&mut opened.client, opened.left, batch).await?;
        Ok(done.also("refills", refills))
    };
    if let Some(opened) = repeat(&seat, &plan.load, open, operation).await {
        close(&plan.load, opened.client).await;
    }
}

/// Expunges the last `batch` messages, of which `left` are before them.
async fn expunge(client: &mut Client, left: u32, batch: u32) -> Result<Done, ImapError> {
    let start = Instant::now();
    let set = format!("{}:{}", left + 1, left + batch);
    client.command("STORE", &format!("STORE {set} +FLAGS.SILENT (\\Deleted)"), |_| Ok(())).await?;
    let marked = start.elapsed();
    let mut expunged = 0;
    client
        .command("EXPUNGE", "EXPUNGE", |response| {
            expunged += gone(response)?;
            Ok(())
        })
        .await?;
    if expunged != u64::from(batch) {
        return Err(ImapError::Wrong("EXPUNGE responses missing", format!("{expunged} for {batch} messages")));
    }
    let latency = Some(start.elapsed());
    Ok(Done { latency, part: Some(marked), ..Done::one(0) }.also("messages expunged", batch.into()))
}
