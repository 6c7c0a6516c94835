//! Sessions that stay: they wait in IDLE, do what is asked of them one thing after another, and hear of what is delivered.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::operations::{LOGINS_MAX, inbox};
use super::schedule::{Kind, Ranks};
use super::settings::Profile;
use super::{Failure, Message};
use crate::drive::Tally;
use crate::fetch_data::FetchData;
use crate::imap::{Client, ImapError, Response};
use crate::moves::gone;
use crate::search::search_with;
use crate::session::{Login, limited};
use crate::stream::Connector;

/// The newest messages of a mailbox, whose flags are changed.
const NEWEST: u64 = 20;
/// Messages that are left in a mailbox, so that sessions of one account do not meet at the same message.
const MESSAGES_KEPT: u32 = 2 * NEWEST as u32;

pub struct Fleet {
    sessions: Vec<mpsc::UnboundedSender<Job>>,
    /// Sessions of users that do much come first, and get more to do.
    ranks: Option<Ranks>,
    pushes: Rc<Pushes>,
}

/// One thing to do.
struct Job {
    kind: Kind,
    number: u64,
    message: Arc<Message>,
    limit: Duration,
    begun: oneshot::Sender<()>,
    done: oneshot::Sender<Result<u64, Failure>>,
}

impl Fleet {
    /// Opens sessions of accounts, which are taken in turn.
    ///
    /// # Errors
    /// One could not be opened.
    pub async fn open(
        login: &Login,
        accounts: &[usize],
        count: usize,
        profile: &Profile,
    ) -> Result<Self, Box<dyn Error>> {
        let count = if accounts.is_empty() { 0 } else { count };
        let (connector, login) = (login.connector()?, Rc::new(login.clone()));
        let bar = ProgressBar::new(count as u64);
        let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos} of {len} in IDLE")?;
        bar.set_style(style.progress_chars("=> "));
        let pushes = Rc::new(Pushes::default());
        let (permits, mut opening) = (Rc::new(Semaphore::new(LOGINS_MAX)), JoinSet::new());
        let mut sessions = Vec::with_capacity(count);
        for index in 0..count {
            let (sender, jobs) = mpsc::unbounded_channel();
            sessions.push(sender);
            let account = accounts[index % accounts.len()];
            // One session of an account is enough to tell how soon it hears.
            let push = (index < accounts.len()).then(|| pushes.of(account));
            let (permits, pushes, bar) = (Rc::clone(&permits), Rc::clone(&pushes), bar.clone());
            let mut session = Session {
                login: Rc::clone(&login),
                connector: connector.of_own(),
                account,
                search_line: format!("SEARCH {}", profile.imap.search_keys),
                push,
                pushes,
                opened: None,
            };
            opening.spawn_local(async move {
                let permit = permits.acquire().await.expect("the semaphore is not closed");
                session.open().await?;
                drop(permit);
                bar.inc(1);
                tokio::task::spawn_local(session.serve(jobs));
                Ok::<_, ImapError>(())
            });
        }
        while let Some(opened) = opening.join_next().await {
            opened?.map_err(|error| format!("a session of the fleet could not be opened: {error}"))?;
        }
        bar.finish_and_clear();
        Ok(Self { ranks: Ranks::new(sessions.len(), profile.users.zipf_exponent), sessions, pushes })
    }

    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Does something in a session that is drawn. `begun` is called when it is this one's turn.
    ///
    /// # Errors
    /// It failed, or the session could not be opened again after it had broken.
    pub async fn operate(
        &self,
        kind: Kind,
        number: u64,
        message: Arc<Message>,
        limit: Duration,
        begun: impl FnOnce(),
    ) -> Result<u64, Failure> {
        let lost = || Failure::new("session lost", "the session's task has ended");
        let (begun_sender, begun_receiver) = oneshot::channel();
        let (done, result) = oneshot::channel();
        let job = Job { kind, number, message, limit, begun: begun_sender, done };
        let sent = match &self.ranks {
            Some(ranks) => self.sessions[ranks.draw(number)].send(job).is_ok(),
            None => false,
        };
        if sent {
            // If it is not sent, the next tells.
            let _ = begun_receiver.await;
        }
        begun();
        if sent { result.await.unwrap_or_else(|_| Err(lost())) } else { Err(lost()) }
    }

    /// A delivery to an account has been acknowledged.
    pub fn delivered(&self, account: usize) {
        let push = self.pushes.by_account.borrow().get(&account).cloned();
        if let Some(push) = push {
            let mut push = push.borrow_mut();
            if !push.broken {
                push.acknowledged.push_back(Instant::now());
                self.pushes.pair(&mut push);
            }
        }
    }

    /// How soon after their acknowledgement deliveries were heard of. Waits until all are, up to a limit.
    pub async fn take_push(&self, limit: Duration) -> Tally {
        let all_heard = async {
            loop {
                let heard = self.pushes.heard.notified();
                if self.pushes.unheard() == 0 {
                    return;
                }
                heard.await;
            }
        };
        let _ = timeout(limit, all_heard).await;
        let mut tally = self.pushes.tally.take();
        for _ in 0..self.pushes.unheard() {
            tally.count_error("not heard of".to_owned(), || format!("no EXISTS within {limit:?} after the run"));
        }
        for push in self.pushes.by_account.borrow().values() {
            // What comes from here on is not measured.
            push.borrow_mut().give_up();
        }
        tally
    }
}

/// Acknowledged deliveries to one account, and what a session of it heard, both in order.
#[derive(Default)]
struct Push {
    acknowledged: VecDeque<Instant>,
    heard: VecDeque<Instant>,
    broken: bool,
}

impl Push {
    fn give_up(&mut self) {
        *self = Self { broken: true, ..Self::default() };
    }
}

#[derive(Default)]
struct Pushes {
    by_account: RefCell<HashMap<usize, Rc<RefCell<Push>>>>,
    tally: RefCell<Tally>,
    heard: Notify,
}

impl Pushes {
    fn of(&self, account: usize) -> Rc<RefCell<Push>> {
        Rc::clone(self.by_account.borrow_mut().entry(account).or_default())
    }

    fn unheard(&self) -> usize {
        self.by_account.borrow().values().map(|push| push.borrow().acknowledged.len()).sum()
    }

    /// The n-th that was heard of is the n-th that was acknowledged, as nothing else comes to the mailbox.
    fn pair(&self, push: &mut Push) {
        while let (Some(acknowledged), Some(heard)) = (push.acknowledged.front(), push.heard.front()) {
            let mut tally = self.tally.borrow_mut();
            tally.count(0, heard.saturating_duration_since(*acknowledged));
            *tally.counts.entry("heard before").or_default() += u64::from(heard < acknowledged);
            push.acknowledged.pop_front();
            push.heard.pop_front();
        }
        self.heard.notify_waiters();
    }
}

struct Session {
    login: Rc<Login>,
    connector: Connector,
    account: usize,
    search_line: String,
    push: Option<Rc<RefCell<Push>>>,
    pushes: Rc<Pushes>,
    opened: Option<Opened>,
}

struct Opened {
    client: Client,
    idles: bool,
    view: View,
}

/// What the session has been told of its mailbox.
struct View {
    exists: u32,
    push: Option<Rc<RefCell<Push>>>,
    pushes: Rc<Pushes>,
}

impl View {
    fn take(&mut self, response: &Response<'_>) -> Result<(), String> {
        if let Some((exists, _)) = response.numbered("EXISTS") {
            if exists < self.exists {
                return Err(format!("EXISTS went from {} to {exists} without EXPUNGE", self.exists));
            }
            if let Some(push) = &self.push {
                let mut push = push.borrow_mut();
                if !push.broken {
                    push.heard.extend((self.exists..exists).map(|_| Instant::now()));
                    self.pushes.pair(&mut push);
                }
            }
            self.exists = exists;
        } else {
            let gone = gone(response)?;
            if gone > u64::from(self.exists) {
                return Err(format!("{:?} with {} messages", response.text(), self.exists));
            }
            self.exists -= gone as u32;
        }
        Ok(())
    }
}

impl Session {
    async fn open(&mut self) -> Result<(), ImapError> {
        let (mut client, exists) = inbox(&self.login, &self.connector, self.account).await?;
        let idles = client.capabilities().await?.has("IDLE");
        let push = self.push.clone().filter(|_| idles);
        let mut view = View { exists, push, pushes: Rc::clone(&self.pushes) };
        if idles {
            client.idle_with(|response| view.take(response)).await?;
        } else if let Some(push) = &self.push {
            push.borrow_mut().give_up();
        }
        self.opened = Some(Opened { client, idles, view });
        Ok(())
    }

    async fn serve(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        loop {
            let job = match &mut self.opened {
                Some(Opened { client, idles: true, view }) => tokio::select! {
                    job = jobs.recv() => job,
                    response = client.response() => {
                        let taken = match response {
                            Ok(response) => view.take(&response).is_ok(),
                            Err(_) => false,
                        };
                        if !taken {
                            self.broke();
                        }
                        continue;
                    }
                },
                _ => jobs.recv().await,
            };
            let Some(job) = job else { return };
            // Whoever asked may have given up.
            let _ = job.begun.send(());
            let result = limited(job.limit, self.operate(job.kind, job.number, &job.message)).await;
            if result.as_ref().is_err_and(|error: &ImapError| !error.leaves_connection()) {
                self.broke();
            }
            let _ = job.done.send(result.map_err(Failure::from));
        }
    }

    /// What it was to hear of cannot be told from what it did hear any more.
    fn broke(&mut self) {
        self.opened = None;
        if let Some(push) = &self.push {
            push.borrow_mut().give_up();
        }
    }

    async fn operate(&mut self, kind: Kind, number: u64, message: &Message) -> Result<u64, ImapError> {
        if self.opened.is_none() {
            self.open().await?;
        }
        let Some(opened) = &mut self.opened else { return Ok(0) };
        let Opened { client, view, idles } = opened;
        if *idles {
            client.done_with(|response| view.take(response)).await?;
        }
        let result = match kind {
            Kind::Append => append(client, view, message).await,
            Kind::Read => read(client, view).await,
            Kind::Flags => flags(client, view, number).await,
            Kind::Delete => delete(client, view).await,
            _ => search_with(client, &self.search_line, |response| view.take(response)).await.map(|_| 0),
        };
        if *idles && result.as_ref().err().is_none_or(ImapError::leaves_connection) {
            client.idle_with(|response| view.take(response)).await?;
        }
        result
    }
}

async fn append(client: &mut Client, view: &mut View, message: &Message) -> Result<u64, ImapError> {
    client.append("Sent", "(\\Seen)", &message.bytes, |response| view.take(response)).await?;
    Ok(message.bytes.len() as u64)
}

/// Fetches the newest message, as a client does that was told of it.
async fn read(client: &mut Client, view: &mut View) -> Result<u64, ImapError> {
    let newest = view.exists;
    if newest == 0 {
        return Ok(0);
    }
    let mut octets = None;
    client
        .command("FETCH", &format!("FETCH {newest} (UID FLAGS ENVELOPE BODY.PEEK[])"), |response| {
            match response.numbered("FETCH") {
                Some((number, list)) if number == newest => {
                    octets = FetchData::parse(response, list)?.message_octets.or(octets);
                    Ok(())
                }
                _ => view.take(response),
            }
        })
        .await?;
    octets.ok_or_else(|| ImapError::Wrong("FETCH responses missing", format!("no BODY[] of message {newest}")))
}

/// Changes a flag of one of the newest messages.
async fn flags(client: &mut Client, view: &mut View, number: u64) -> Result<u64, ImapError> {
    if view.exists == 0 {
        return Ok(0);
    }
    let message = u64::from(view.exists) - (number >> 32) % NEWEST.min(view.exists.into());
    let change =
        ["+FLAGS (\\Seen)", "+FLAGS (\\Seen)", "+FLAGS (\\Flagged)", "-FLAGS (\\Flagged)"][(number >> 60) as usize % 4];
    client.command("STORE", &format!("STORE {message} {change}"), |response| view.take(response)).await?;
    Ok(0)
}

/// Expunges the oldest message, if there are many.
async fn delete(client: &mut Client, view: &mut View) -> Result<u64, ImapError> {
    if view.exists <= MESSAGES_KEPT {
        return Ok(0);
    }
    let marked = client.command("STORE", "STORE 1 +FLAGS.SILENT (\\Deleted)", |response| view.take(response)).await;
    match marked {
        // Another session of the account was first (RFC 2180, 4.2).
        Err(ImapError::Refused("STORE", _)) => {
            client.command("NOOP", "NOOP", |response| view.take(response)).await?;
            return Ok(0);
        }
        marked => marked?,
    }
    let mut expunged = 0;
    client
        .command("EXPUNGE", "EXPUNGE", |response| {
            expunged += gone(response)?;
            view.take(response)
        })
        .await?;
    if expunged == 0 {
        return Err(ImapError::Wrong("EXPUNGE responses missing", "none for a message that was marked".to_owned()));
    }
    Ok(0)
}
