//! Moving messages to and fro between two mailboxes.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::fetch_data::set_len;
use crate::fill::fill;
use crate::imap::{Client, ImapError, code_after, quote};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Move {
    #[command(flatten)]
    login: Login,
    /// Messages that each connection moves from one of its mailboxes to the other and back; they are made before the run
    #[arg(long, value_name = "N", default_value_t = 500)]
    mailbox_messages: u32,
    /// Messages of one command
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// The size of the messages
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    size: usize,
    /// --messages counts moves, each of --batch messages
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Move {
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
        Report::new("move", "moves", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

/// A connection with its two mailboxes, of which the first is selected.
struct Opened {
    client: Client,
    mailboxes: [String; 2],
    /// In the selected mailbox.
    left: u32,
}

async fn connection(seat: Seat, plan: Arc<Move>, connector: Connector) {
    let open = async || {
        let mut client = plan.login.client(&connector, seat.index).await?;
        let mailboxes = ["a", "b"].map(|side| format!("bench-move-{}-{side}", seat.index));
        fill(&mut client, &mailboxes[1], 0, plan.size).await?;
        fill(&mut client, &mailboxes[0], plan.mailbox_messages, plan.size).await?;
        Ok(Opened { client, mailboxes, left: plan.mailbox_messages })
    };
    let operation = async |opened: &mut Opened, _| {
        let mut turned = 0;
        if opened.left == 0 {
            opened.mailboxes.swap(0, 1);
            opened.left = opened.client.select(&opened.mailboxes[0], false).await?;
            if opened.left != plan.mailbox_messages {
                let what = format!("{} of {} messages are there", opened.left, plan.mailbox_messages);
                return Err(ImapError::Wrong("messages lost or doubled", what));
            }
            turned = 1;
        }
        let batch = plan.batch.min(opened.left);
        opened.left -= batch;
        let client = &mut opened.client;
        let by_move = client.capabilities().await?.has("MOVE");
        let to = quote(&opened.mailboxes[1]);
        if by_move {
            move_first(client, batch, &to).await?
        } else {
            copy_and_expunge(client, batch, &to).await?
        }
        let way = if by_move { "by MOVE" } else { "by COPY, STORE and EXPUNGE" };
        Ok(Done::one(0).also("messages moved", batch.into()).also(way, 1).also("turns, with SELECT", turned))
    };
    if let Some(opened) = repeat(&seat, &plan.load, open, operation).await {
        close(&plan.load, opened.client).await;
    }
}

/// MOVE of the first messages (RFC 6851).
async fn move_first(client: &mut Client, batch: u32, to: &str) -> Result<(), ImapError> {
    let (mut expunged, mut copied) = (0, None);
    let code = client
        .run("MOVE", &format!("MOVE {} {to}", first(batch)), |response| {
            expunged += gone(response)?;
            if let Some(code) = response.after("* OK [") {
                let code = String::from_utf8_lossy(code);
                copied = code
                    .split_once(']')
                    .map(|(code, _)| code.to_owned())
                    .filter(|code| is_copyuid(code))
                    .or(copied.take());
            }
            Ok(())
        })
        .await?;
    let copied = code.filter(|code| is_copyuid(code)).or(copied);
    check_moved(client, batch, expunged, copied.as_deref()).await
}

/// What MOVE does, in three commands.
async fn copy_and_expunge(client: &mut Client, batch: u32, to: &str) -> Result<(), ImapError> {
    let set = first(batch);
    let code = client.run("COPY", &format!("COPY {set} {to}"), |_| Ok(())).await?;
    client.command("STORE", &format!("STORE {set} +FLAGS.SILENT (\\Deleted)"), |_| Ok(())).await?;
    let mut expunged = 0;
    client
        .command("EXPUNGE", "EXPUNGE", |response| {
            expunged += gone(response)?;
            Ok(())
        })
        .await?;
    check_moved(client, batch, expunged, code.as_deref()).await
}

fn first(batch: u32) -> String {
    if batch == 1 { "1".to_owned() } else { format!("1:{batch}") }
}

fn is_copyuid(code: &str) -> bool {
    code_after(code, "COPYUID").is_some()
}

/// How many messages a response says to be gone.
///
/// # Errors
/// It is no well-formed VANISHED.
pub fn gone(response: &crate::imap::Response<'_>) -> Result<u64, String> {
    if response.numbered("EXPUNGE").is_some() {
        return Ok(1);
    }
    match response.after("* VANISHED ") {
        Some(set) => set_len(&String::from_utf8_lossy(set)),
        None => Ok(0),
    }
}

/// Checks that as many messages are gone and have got UIDs as were moved (RFC 4315, 3: COPYUID).
async fn check_moved(client: &mut Client, batch: u32, expunged: u64, copied: Option<&str>) -> Result<(), ImapError> {
    if expunged != u64::from(batch) {
        return Err(ImapError::Wrong("EXPUNGE responses missing", format!("{expunged} for {batch} messages")));
    }
    if !client.capabilities().await?.has("UIDPLUS") {
        return Ok(());
    }
    let sets = copied.and_then(|code| {
        let mut sets = code_after(code, "COPYUID")?.split(' ').skip(1).map(set_len);
        Some((sets.next()?.ok()?, sets.next()?.ok()?))
    });
    if sets == Some((batch.into(), batch.into())) {
        Ok(())
    } else {
        Err(ImapError::Wrong("COPYUID missing or wrong", format!("{copied:?} for {batch} messages")))
    }
}
