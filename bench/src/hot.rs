//! One hot mailbox: many sessions on it, of which some change flags, some ask for news and some wait for them, while mail comes in.
//!
//! At the end all sessions are asked what is in the mailbox, and have to agree.

use std::cell::RefCell;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use tokio::sync::{Barrier, watch};

use crate::deliver::MailServer;
use crate::drive::{self, Load, Seat};
use crate::fetch_data::FetchData;
use crate::imap::{Client, ImapError, Response};
use crate::lmtp::{self, Data};
use crate::mail::MailOptions;
use crate::moves::gone;
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, FAILURES_MAX, Login, close, each, limited};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Hot {
    /// All sessions are of the first user
    #[command(flatten)]
    login: Login,
    /// The mailbox that all select
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    #[command(flatten)]
    server: MailServer,
    #[command(flatten)]
    mail: MailOptions,
    /// How many of the connections deliver to the mailbox
    #[arg(long, value_name = "N", default_value_t = 1)]
    deliverers: usize,
    /// How many change the flags of one message after another
    #[arg(long, value_name = "N", default_value_t = 2)]
    storers: usize,
    /// How many send NOOP again and again
    #[arg(long, value_name = "N", default_value_t = 2)]
    pollers: usize,
    /// --connections are all of them: those that have nothing else to do wait in IDLE. --messages counts deliveries, STORE and
    /// NOOP commands
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

/// What a connection does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Deliverer,
    Storer,
    Poller,
    Idler,
}

/// What the connections share.
struct Plan {
    options: Hot,
    imap: Connector,
    delivery: Connector,
    data: Vec<Data>,
    /// Deliverers, storers and pollers that are still at it.
    at_work: watch::Sender<usize>,
    /// All connections have ended their work.
    worked: Barrier,
    /// What the first session says to be in the mailbox at the end.
    agreed: Mutex<Option<View>>,
}

/// What a session sees: the UIDs and the flags of all messages.
type View = Vec<(u32, Vec<String>)>;

impl Hot {
    fn role(&self, index: usize) -> Role {
        let (storers, pollers) = (self.deliverers + self.storers, self.deliverers + self.storers + self.pollers);
        match index {
            _ if index < self.deliverers => Role::Deliverer,
            _ if index < storers => Role::Storer,
            _ if index < pollers => Role::Poller,
            _ => Role::Idler,
        }
    }

    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let working = self.deliverers + self.storers + self.pollers;
        if working == 0 || working > self.load.connections {
            let what = "--deliverers, --storers and --pollers are part of --connections, and one of them is needed";
            return Err(format!("{what}: they are {working}, the connections {}", self.load.connections).into());
        }
        let corpus = self.mail.load()?;
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        self.server.describe(&mut parameters);
        parameters.insert("deliverers", self.deliverers.into());
        parameters.insert("storers", self.storers.into());
        parameters.insert("pollers", self.pollers.into());
        parameters.insert("idlers", (self.load.connections - working).into());
        self.mail.describe(&corpus, &mut parameters);
        let plan = Arc::new(Plan {
            imap: self.login.connector()?,
            delivery: Connector::new(self.server.address(), None)?,
            data: corpus.mail.iter().map(|mail| Data::new(&mail.bytes)).collect(),
            at_work: watch::Sender::new(working),
            worked: Barrier::new(self.load.connections),
            agreed: Mutex::new(None),
            options: self,
        });
        let (shared, load) = (Arc::clone(&plan), &plan.options.load);
        let ran = drive::run(load, &plan.options.watch, move |seat| connection(seat, Arc::clone(&shared)))?;
        Report::new("hot", "operations", None, load, parameters, ran).print(load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Plan>) {
    let role = plan.options.role(seat.index);
    let client = match role {
        Role::Deliverer => {
            seat.ready().await;
            deliver(&seat, &plan).await;
            None
        }
        Role::Storer | Role::Poller | Role::Idler => session(&seat, &plan, role).await,
    };
    if role != Role::Idler {
        plan.at_work.send_modify(|at_work| *at_work -= 1);
    }
    plan.worked.wait().await;
    let Some(mut client) = client else { return };
    match limited(plan.options.load.operation_timeout(), view(&mut client)).await {
        Ok(view) => {
            if let Err(what) = agree(&plan, view) {
                seat.count_error("sessions disagree".to_owned(), || what);
            }
            seat.count_also("sessions compared", 1);
            close(&plan.options.load, client).await;
        }
        Err(error) => seat.count_error(format!("at the end: {}", error.kind()), || error.to_string()),
    }
}

/// Compares what a session sees with what the first one sees.
fn agree(plan: &Plan, view: View) -> Result<(), String> {
    let mut agreed = plan.agreed.lock().unwrap_or_else(PoisonError::into_inner);
    let first = agreed.get_or_insert_with(|| view.clone());
    if *first == view {
        return Ok(());
    }
    let differs = first.iter().zip(&view).find(|(a, b)| a != b);
    Err(format!("{} messages against {}; the first that differs: {differs:?}", first.len(), view.len()))
}

async fn deliver(seat: &Seat, plan: &Plan) {
    let limit = plan.options.load.operation_timeout();
    let user = plan.options.login.user(0);
    let (mut client, mut failures) = (None, 0);
    while failures < FAILURES_MAX
        && let Some(turn) = seat.turn().await
    {
        let data = &plan.data[(turn.number % plan.data.len() as u64) as usize];
        let mut connected = match client.take() {
            Some(connected) => connected,
            None => {
                let connecting = lmtp::Client::connect_by(plan.options.server.protocol(), &plan.delivery, true);
                match limited(limit, connecting).await {
                    Ok(connected) => connected,
                    Err(error) => {
                        seat.count_error(format!("connecting: {}", error.kind()), || error.to_string());
                        failures += 1;
                        continue;
                    }
                }
            }
        };
        failures = 0;
        match limited(limit, connected.deliver(&[&user], data, || {})).await {
            Ok(outcome) => {
                if outcome.accepted > 0 {
                    seat.count(1, data.octets() as u64, turn.due.elapsed());
                    seat.count_also("deliveries", 1);
                }
                for error in outcome.refused {
                    seat.count_error(error.kind(), || error.to_string());
                }
                client = Some(connected);
            }
            Err(error) => seat.count_error(error.kind(), || error.to_string()),
        }
    }
}

/// A session until all work is done; it is returned as it is still to be compared.
async fn session(seat: &Seat, plan: &Plan, role: Role) -> Option<Client> {
    let limit = plan.options.load.operation_timeout() * plan.options.load.connections as u32;
    let open = async {
        let mut client = plan.options.login.client(&plan.imap, 0).await?;
        let exists = client.select(&plan.options.mailbox, false).await?;
        if role == Role::Storer && exists == 0 {
            return Err(ImapError::Refused("SELECT", "the mailbox is empty: deliver to it first".to_owned()));
        }
        Ok((client, exists))
    };
    let opened = limited(limit, open).await;
    seat.ready().await;
    let (mut client, exists) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            seat.count_error(format!("setting up: {}", error.kind()), || error.to_string());
            return None;
        }
    };
    let count = RefCell::new(Count { exists, pushed: 0 });
    if role == Role::Idler {
        let idled = idle(&mut client, plan, &count).await;
        seat.count_also("responses pushed", count.borrow().pushed);
        return idled.inspect_err(|error| seat.count_error(error.kind(), || error.to_string())).ok().map(|()| client);
    }
    each(seat, &plan.options.load, async |number| {
        let (line, name, what) = match role {
            Role::Storer => {
                // Messages at the front stay where they are, as nobody expunges.
                let message = number as u32 % exists + 1;
                let sign = if (number as u32 / exists).is_multiple_of(2) { '+' } else { '-' };
                (format!("STORE {message} {sign}FLAGS (\\Flagged)"), "STORE", "STORE commands")
            }
            _ => ("NOOP".to_owned(), "NOOP", "NOOP commands"),
        };
        client.command(name, &line, |response| count.borrow_mut().take(response)).await?;
        Ok(Done::one(0).also(what, 1))
    })
    .await;
    seat.count_also("responses pushed", count.borrow().pushed);
    Some(client)
}

/// What a session has been told unasked.
struct Count {
    exists: u32,
    pushed: u64,
}

impl Count {
    /// Messages only come, and of those that are there flags may change.
    fn take(&mut self, response: &Response<'_>) -> Result<(), String> {
        if let Some((exists, _)) = response.numbered("EXISTS") {
            if exists < self.exists {
                return Err(format!("EXISTS went from {} to {exists}, and nothing was expunged", self.exists));
            }
            self.exists = exists;
            self.pushed += 1;
        } else if let Some((number, list)) = response.numbered("FETCH") {
            FetchData::parse(response, list)?;
            if number == 0 || number > self.exists {
                return Err(format!("FETCH of message {number}, and there are {}", self.exists));
            }
            self.pushed += 1;
        } else if gone(response)? > 0 {
            return Err(format!("{:?}, and nothing was expunged", response.text()));
        }
        Ok(())
    }
}

/// Waits in IDLE until nobody works any more.
async fn idle(client: &mut Client, plan: &Plan, count: &RefCell<Count>) -> Result<(), ImapError> {
    let mut at_work = plan.at_work.subscribe();
    client.idle().await?;
    loop {
        tokio::select! {
            response = client.response() => count.borrow_mut().take(&response?).map_err(ImapError::Protocol)?,
            _ = at_work.wait_for(|&at_work| at_work == 0) => break,
        }
    }
    limited(plan.options.load.operation_timeout(), client.done()).await
}

/// What is in the mailbox, as the session sees it after it was told of all changes.
async fn view(client: &mut Client) -> Result<View, ImapError> {
    client.command("NOOP", "NOOP", |_| Ok(())).await?;
    let mut view = View::new();
    client
        .command("UID FETCH", "UID FETCH 1:* (FLAGS)", |response| {
            if let Some((_, list)) = response.numbered("FETCH") {
                let data = FetchData::parse(response, list)?;
                let (Some(uid), Some(flags)) = (data.uid, data.flags) else {
                    return Err(format!("no UID or FLAGS in {:?}", response.text()));
                };
                // One session is told of \Recent alone (RFC 3501, 2.3.2).
                let told = |flag: &&[u8]| !flag.is_empty() && !flag.eq_ignore_ascii_case(b"\\Recent");
                let flags = flags.split(|&octet| octet == b' ').filter(told);
                let mut flags: Vec<String> = flags.map(|flag| String::from_utf8_lossy(flag).to_lowercase()).collect();
                flags.sort_unstable();
                view.push((uid, flags));
            }
            Ok(())
        })
        .await?;
    view.sort_unstable();
    Ok(view)
}
