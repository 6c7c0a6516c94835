//! What a client does that was there before: it asks what has changed since, over a new connection.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::fetch_data::{FetchData, Numbers};
use crate::imap::{Capabilities, Client, ImapError, Selected, quote};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, each, limited};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Resync {
    /// Each session takes the next of its connection's users
    #[command(flatten)]
    login: Login,
    #[command(flatten)]
    changes: Changes,
    /// --messages counts sessions
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

/// What there is to find out in a session.
#[derive(Clone, Debug, Args)]
pub struct Changes {
    /// The mailbox that is selected
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    pub mailbox: String,
    /// Messages whose flags have changed since the client was there; they are changed once, before the run, and each session asks for
    /// what has changed since before that
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub changes: u32,
    /// Other mailboxes that are asked for their STATUS; they are made if they are not there
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub status_mailboxes: usize,
}

/// How a client finds out what has changed: the best that the server announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// SELECT says what has changed and what is gone (RFC 7162, 3.2)
    Qresync,
    /// FETCH of the flags that have changed (RFC 7162, 3.1)
    Condstore,
    /// FETCH of all flags (RFC 3501)
    Plain,
}

impl Mode {
    fn of(capabilities: &Capabilities) -> Self {
        match (capabilities.has("QRESYNC"), capabilities.has("CONDSTORE")) {
            (true, _) => Self::Qresync,
            (false, true) => Self::Condstore,
            (false, false) => Self::Plain,
        }
    }

    fn counted(self) -> &'static str {
        match self {
            Self::Qresync => "by QRESYNC",
            Self::Condstore => "by CONDSTORE",
            Self::Plain => "by plain FETCH",
        }
    }
}

/// What a client remembers of a mailbox.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    uid_validity: u32,
    /// Of the time before the changes; 0 if the mailbox keeps none.
    modseq: u64,
    exists: u32,
    changed: u32,
}

impl Resync {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.changes.mailbox.as_str().into());
        parameters.insert("changes", self.changes.changes.into());
        parameters.insert("status_mailboxes", self.changes.status_mailboxes.into());
        let connector = self.login.connector()?;
        self.login.one_user_each(&self.load)?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("resync", "sessions", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Resync>, connector: Connector) {
    // Each connection has users of its own, which it takes in turn.
    let own = (seat.index..plan.login.users.user_count).step_by(plan.load.connections.max(1));
    let limit = plan.load.operation_timeout() * plan.load.connections.max(1) as u32;
    let mut users = Vec::new();
    let mut failure = None;
    for index in own {
        match limited(limit, prepare(&connector, &plan.login, index, &plan.changes)).await {
            Ok(known) => users.push((index, known)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    seat.ready().await;
    if let Some(error) = failure {
        seat.count_error(format!("setting up: {}", error.kind()), || error.to_string());
        return;
    }
    let mut next = 0;
    each(&seat, &plan.load, async |_| {
        let (index, known) = &users[next];
        next = (next + 1) % users.len();
        session(&connector, &plan.login, *index, &plan.changes, known).await
    })
    .await;
}

/// Makes the mailboxes that are asked for, and the changes that sessions find.
///
/// # Errors
/// The connection, or what the server says.
pub async fn prepare(
    connector: &Connector,
    login: &Login,
    index: usize,
    changes: &Changes,
) -> Result<Known, ImapError> {
    let mut client = login.client(connector, index).await?;
    for number in 1..=changes.status_mailboxes {
        client.create(&status_mailbox(number)).await?;
    }
    let with_modseqs = Mode::of(client.capabilities().await?) != Mode::Plain;
    let parameters = if with_modseqs { "(CONDSTORE)" } else { "" };
    let selected = client.open("SELECT", &changes.mailbox, parameters, |_| Ok(())).await?;
    let changed = changes.changes.min(selected.exists);
    if changed > 0 {
        // Whatever the flag was before, this changes it.
        for sign in ["-", "+"] {
            client.command("STORE", &format!("STORE 1:{changed} {sign}FLAGS.SILENT (\\Flagged)"), |_| Ok(())).await?;
        }
    }
    client.logout().await?;
    let uid_validity = selected.uid_validity.ok_or_else(|| missing("UIDVALIDITY"))?;
    let modseq = if with_modseqs { selected.highest_modseq.ok_or_else(|| missing("HIGHESTMODSEQ"))? } else { 0 };
    Ok(Known { uid_validity, modseq, exists: selected.exists, changed })
}

fn missing(code: &str) -> ImapError {
    ImapError::Wrong("a response code of SELECT is missing", code.to_owned())
}

fn status_mailbox(number: usize) -> String {
    format!("bench-status-{number}")
}

/// One session: LOGIN, SELECT, STATUS of other mailboxes, the changes, LOGOUT.
///
/// # Errors
/// The connection; what the server says; or what cannot be true.
pub async fn session(
    connector: &Connector,
    login: &Login,
    index: usize,
    changes: &Changes,
    known: &Known,
) -> Result<Done, ImapError> {
    let mut client = login.client(connector, index).await?;
    let resumed = client.is_resumed();
    let mode = Mode::of(client.capabilities().await?);
    let mut found = Found::default();
    let selected = match mode {
        Mode::Qresync => {
            client.command("ENABLE", "ENABLE QRESYNC", |_| Ok(())).await?;
            let parameters = format!("(QRESYNC ({} {}))", known.uid_validity, known.modseq);
            client.open("SELECT", &changes.mailbox, &parameters, |response| found.take(response)).await?
        }
        Mode::Condstore => client.open("SELECT", &changes.mailbox, "(CONDSTORE)", |_| Ok(())).await?,
        Mode::Plain => client.open("SELECT", &changes.mailbox, "", |_| Ok(())).await?,
    };
    if selected.uid_validity != Some(known.uid_validity) {
        let what = format!("{:?}, was {}", selected.uid_validity, known.uid_validity);
        return Err(ImapError::Wrong("UIDVALIDITY has changed", what));
    }
    status(&mut client, changes.status_mailboxes, mode != Mode::Plain).await?;
    if selected.exists > 0 {
        let fetch = match mode {
            Mode::Qresync => None,
            Mode::Condstore => Some(format!("UID FETCH 1:* (FLAGS) (CHANGEDSINCE {})", known.modseq)),
            Mode::Plain => Some("UID FETCH 1:* (FLAGS)".to_owned()),
        };
        if let Some(line) = fetch {
            client.command("UID FETCH", &line, |response| found.take(response)).await?;
        }
    }
    client.logout().await?;
    let bytes = found.bytes;
    let messages = found.check(mode, &selected, known)?;
    Ok(Done::one(bytes)
        .also(mode.counted(), 1)
        .also("flags received", messages)
        .also("TLS resumed", u64::from(resumed)))
}

/// What a session was told about messages.
#[derive(Default)]
struct Found {
    numbers: Numbers,
    modseq_min: Option<u64>,
    bytes: u64,
}

impl Found {
    fn take(&mut self, response: &crate::imap::Response<'_>) -> Result<(), String> {
        if let Some((number, list)) = response.numbered("FETCH") {
            let data = FetchData::parse(response, list)?;
            let uid = data.uid.ok_or_else(|| format!("no UID in {:?}", response.text()))?;
            self.numbers.take(number, uid);
            self.modseq_min = match (self.modseq_min, data.modseq) {
                (Some(before), Some(modseq)) => Some(before.min(modseq)),
                (before, modseq) => before.or(modseq),
            };
            self.bytes += response.bytes.len() as u64;
        }
        Ok(())
    }

    /// How many messages there were.
    fn check(self, mode: Mode, selected: &Selected, known: &Known) -> Result<u64, ImapError> {
        let count = self.numbers.check(1..=selected.exists)?.len() as u64;
        // What is expunged meanwhile has no flags to tell, what arrives has.
        let gone = u64::from(known.exists.saturating_sub(selected.exists));
        let expected = match mode {
            Mode::Plain => u64::from(selected.exists),
            Mode::Qresync | Mode::Condstore => u64::from(known.changed).saturating_sub(gone),
        };
        if count < expected {
            let what = format!("flags of {count} messages, at least {expected} have changed");
            return Err(ImapError::Wrong("changes missing", what));
        }
        if selected.exists == known.exists && mode != Mode::Plain && count > expected {
            let what = format!("flags of {count} messages, {expected} have changed");
            return Err(ImapError::Wrong("more changes than there are", what));
        }
        match self.modseq_min {
            Some(modseq) if modseq <= known.modseq => {
                let what = format!("MODSEQ {modseq}, asked for those after {}", known.modseq);
                Err(ImapError::Wrong("a change that is too old", what))
            }
            _ => Ok(count),
        }
    }
}

/// Asks for the STATUS of mailboxes, of all together.
async fn status(client: &mut Client, mailboxes: usize, with_modseqs: bool) -> Result<(), ImapError> {
    let items = if with_modseqs { " HIGHESTMODSEQ" } else { "" };
    let line =
        |number| format!("STATUS {} (MESSAGES UNSEEN UIDNEXT UIDVALIDITY{items})", quote(&status_mailbox(number)));
    let lines: Vec<String> = (1..=mailboxes).map(line).collect();
    let (mut told, mut items_told) = (0, 0);
    client
        .run_together("STATUS", &lines, |response| {
            if let Some(rest) = response.after("* STATUS ") {
                told += 1;
                let list = memchr::memrchr(b'(', rest).map_or(&[][..], |at| &rest[at + 1..]);
                items_told += list.trim_ascii_end().split(|&octet| octet == b' ').count() / 2;
            }
            Ok(())
        })
        .await?;
    let expected = mailboxes * if with_modseqs { 5 } else { 4 };
    if told == mailboxes && items_told == expected {
        Ok(())
    } else {
        let what =
            format!("{told} STATUS responses with {items_told} items, {mailboxes} with {expected} were asked for");
        Err(ImapError::Wrong("STATUS incomplete", what))
    }
}
