//! Changes of flags.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::fetch_data::{FetchData, Numbers};
use crate::imap::{Client, ImapError};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Flags {
    #[command(flatten)]
    login: Login,
    /// The mailbox that each connection selects
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    /// Change the flag of all messages with each command, 1:*, and not of one after another
    #[arg(long)]
    all: bool,
    /// Use FLAGS.SILENT: no answer for each message
    #[arg(long)]
    silent: bool,
    /// The flag or keyword that is added to all messages and then removed from all, over and over
    #[arg(long, value_name = "FLAG", default_value = "\\Flagged")]
    flag: String,
    /// --messages counts STORE commands
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Flags {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        // Another connection's changes could not be told from one's own.
        self.login.one_user_each(&self.load)?;
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("all", self.all.into());
        parameters.insert("silent", self.silent.into());
        parameters.insert("flag", self.flag.as_str().into());
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("flags", "STORE commands", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

/// A selected mailbox, and which change is next.
struct Opened {
    client: Client,
    exists: u32,
    next: u32,
    adds: bool,
}

async fn connection(seat: Seat, plan: Arc<Flags>, connector: Connector) {
    let open = async || {
        let mut client = plan.login.client(&connector, seat.index).await?;
        let exists = client.select(&plan.mailbox, false).await?;
        if exists == 0 {
            return Err(ImapError::Refused("SELECT", "the mailbox is empty: deliver to it first".to_owned()));
        }
        // So that each change changes something.
        client.command("STORE", &format!("STORE 1:* -FLAGS.SILENT ({})", plan.flag), |_| Ok(())).await?;
        Ok(Opened { client, exists, next: 1, adds: true })
    };
    let operation = async |opened: &mut Opened, _| {
        let messages = if plan.all { 1..=opened.exists } else { opened.next..=opened.next };
        let adds = opened.adds;
        opened.next = if *messages.end() == opened.exists { 1 } else { opened.next + 1 };
        opened.adds ^= opened.next == 1;
        let set = if plan.all { "1:*".to_owned() } else { messages.start().to_string() };
        let sign = if adds { '+' } else { '-' };
        let silent = if plan.silent { ".SILENT" } else { "" };
        store(&mut opened.client, &set, messages, &format!("{sign}FLAGS{silent}"), &plan.flag, adds).await
    };
    if let Some(opened) = repeat(&seat, &plan.load, open, operation).await {
        close(&plan.load, opened.client).await;
    }
}

/// One STORE; without SILENT each message has to come with the flag as it is now.
async fn store(
    client: &mut Client,
    set: &str,
    messages: std::ops::RangeInclusive<u32>,
    item: &str,
    flag: &str,
    adds: bool,
) -> Result<Done, ImapError> {
    let (mut numbers, mut wrong, mut bytes) = (Numbers::with_updates(), None, 0);
    client
        .command("STORE", &format!("STORE {set} {item} ({flag})"), |response| {
            if let Some((number, list)) = response.numbered("FETCH") {
                let data = FetchData::parse(response, list)?;
                bytes += response.bytes.len() as u64;
                // Keywords and flags are unasked where they come without FLAGS, as the MODSEQ of a silent change does.
                if data.flags.is_some() && messages.contains(&number) {
                    numbers.take(number, number);
                    if data.has_flag(flag) != adds {
                        wrong = Some(response.text());
                    }
                }
            }
            Ok(())
        })
        .await?;
    let changed = u64::from(messages.end() - messages.start() + 1);
    let silent = item.ends_with(".SILENT");
    let told = numbers.check(messages)?.len() as u64;
    if !silent && told != changed {
        return Err(ImapError::Wrong("FETCH responses missing", format!("{told} after STORE {set} of {changed}")));
    }
    if let Some(response) = wrong {
        return Err(ImapError::Wrong("a flag is not as it was set", format!("{response:?} after {item} ({flag})")));
    }
    Ok(Done::one(bytes).also("messages changed", changed).also("FETCH responses", told))
}
