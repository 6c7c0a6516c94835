//! Reading over IMAP.

use std::error::Error;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::drive::{self, Load, Seat};
use crate::fetch_data::{FetchData, Numbers};
use crate::imap::{Client, ImapError};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Fetch {
    #[command(flatten)]
    login: Login,
    /// The mailbox that each connection examines
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    #[command(flatten)]
    what: What,
    /// Messages of one command
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// --messages counts messages
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

/// What to fetch of each message.
#[derive(Clone, Debug, Args)]
pub struct What {
    /// What to fetch, as IMAP names it, without parentheses [default: BODY.PEEK[]]
    #[arg(long, value_name = "ITEMS", conflicts_with = "preset")]
    item: Option<String>,
    /// What to fetch, by what clients do
    #[arg(long, value_enum)]
    preset: Option<Preset>,
}

/// What clients fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// BODY.PEEK[]: whole messages
    Bodies,
    /// BODY.PEEK[HEADER]: whole headers
    Headers,
    /// What a list of messages shows: flags, date, size and some header fields
    List,
    /// ENVELOPE
    Envelope,
    /// BODYSTRUCTURE
    Structure,
    /// All that a client keeps of a message without its body: flags, date, size, ENVELOPE, BODYSTRUCTURE and some header fields
    Sync,
    /// FLAGS
    Flags,
}

impl What {
    pub fn items(&self) -> &str {
        match (&self.item, self.preset) {
            (Some(item), _) => item,
            (None, preset) => preset.unwrap_or(Preset::Bodies).items(),
        }
    }
}

impl Preset {
    pub fn items(self) -> &'static str {
        match self {
            Self::Bodies => "BODY.PEEK[]",
            Self::Headers => "BODY.PEEK[HEADER]",
            Self::List => {
                "FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[HEADER.FIELDS (FROM TO CC SUBJECT DATE MESSAGE-ID REFERENCES)]"
            }
            Self::Envelope => "ENVELOPE",
            Self::Structure => "BODYSTRUCTURE",
            Self::Sync => {
                "FLAGS INTERNALDATE RFC822.SIZE ENVELOPE BODYSTRUCTURE BODY.PEEK[HEADER.FIELDS (REFERENCES LIST-ID)]"
            }
            Self::Flags => "FLAGS",
        }
    }
}

impl Fetch {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.batch = self.batch.max(1);
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("item", self.what.items().into());
        parameters.insert("batch", self.batch.into());
        let mut load = self.load.clone();
        // The driver counts commands.
        load.messages = load.messages.map(|messages| messages.div_ceil(self.batch.into()));
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("fetch", "messages fetched", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

/// An examined mailbox, of which the messages are fetched in turn.
struct Opened {
    client: Client,
    exists: u32,
    next: u32,
}

async fn connection(seat: Seat, plan: Arc<Fetch>, connector: Connector) {
    let open = async || {
        let mut client = plan.login.client(&connector, seat.index).await?;
        match client.select(&plan.mailbox, true).await? {
            0 => Err(ImapError::Refused("EXAMINE", "the mailbox is empty: deliver to it first".to_owned())),
            exists => Ok(Opened { client, exists, next: 1 }),
        }
    };
    let operation = async |opened: &mut Opened, _| {
        let first = opened.next;
        let last = (first + plan.batch - 1).min(opened.exists);
        opened.next = if last == opened.exists { 1 } else { last + 1 };
        fetch(&mut opened.client, first, last, plan.what.items()).await
    };
    if let Some(opened) = repeat(&seat, &plan.load, open, operation).await {
        close(&plan.load, opened.client).await;
    }
}

/// Fetches items of messages by their sequence numbers.
async fn fetch(client: &mut Client, first: u32, last: u32, items: &str) -> Result<Done, ImapError> {
    let line =
        if first == last { format!("FETCH {first} ({items})") } else { format!("FETCH {first}:{last} ({items})") };
    let asked_for_update =
        items.split(' ').all(|item| ["FLAGS", "UID", "MODSEQ"].iter().any(|name| item.eq_ignore_ascii_case(name)));
    let mut found = if asked_for_update { Numbers::with_updates() } else { Numbers::default() };
    let mut bytes = 0;
    client
        .command("FETCH", &line, |response| {
            if let Some((number, list)) = response.numbered("FETCH")
                && (first..=last).contains(&number)
            {
                let data = FetchData::parse(response, list)?;
                bytes += data.octets;
                // What others change comes unasked.
                if !data.is_update() || asked_for_update {
                    found.take(number, number);
                }
            }
            Ok(())
        })
        .await?;
    let (wanted, found) = ((last - first + 1) as usize, found.check(first..=last)?.len());
    if found == wanted {
        Ok(Done { operations: wanted as u64, bytes, ..Done::default() })
    } else {
        Err(ImapError::Wrong(
            "FETCH responses missing",
            format!("{found} FETCH responses for messages {first} to {last}"),
        ))
    }
}
