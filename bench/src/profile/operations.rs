//! Operations over connections that are made for them: deliveries (whose connections stay), polls, POP3 sessions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use super::settings::Profile;
use super::{Failure, Message, ProfileRun, plain};
use crate::corpus::Corpus;
use crate::fetch_data::{FetchData, Numbers};
use crate::imap::{Client, ImapError, quote};
use crate::lmtp::{self, Data, Protocol};
use crate::pop3::{self, Pop3Error};
use crate::session::{Login, limited};
use crate::stream::Connector;

/// Connections that log in at the same time before the run.
pub const LOGINS_MAX: usize = 16;
/// Messages that a POP3 session retrieves at most, so that a full maildrop does not hold it for long.
const RETRIEVED_MAX: u64 = 20;
/// New messages whose envelopes a poll fetches at most.
const LOOKED_AT_MAX: u32 = 50;

pub struct Operations {
    login: Login,
    imap: Connector,
    delivery: Connector,
    protocol: Protocol,
    pop3: Option<Connector>,
    pop3_deletes: bool,
    status_mailboxes: usize,
    names: Vec<String>,
    messages: Vec<Arc<Message>>,
    /// Connections for deliveries that have nothing to do.
    deliverers: RefCell<Vec<lmtp::Client>>,
    /// What the client of an account has seen last.
    seen: RefCell<HashMap<usize, Seen>>,
    /// A maildrop is locked while a session has it (RFC 1939, 4).
    maildrops: RefCell<HashMap<usize, Rc<Mutex<()>>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    uid_validity: u32,
    uid_next: u32,
    modseq: Option<u64>,
}

impl Operations {
    /// # Errors
    /// An address cannot be used.
    pub fn new(plan: &ProfileRun, profile: &Profile, corpus: &Corpus) -> Result<Self, String> {
        let message =
            |mail: &crate::corpus::Mail| Arc::new(Message { data: Data::new(&mail.bytes), bytes: mail.bytes.clone() });
        let tls = || plan.login.tls.client();
        Ok(Self {
            login: plan.login.clone(),
            imap: plan.login.connector()?,
            delivery: plain(plan.server.address())?,
            protocol: plan.server.protocol(),
            pop3: plan.pop3.as_ref().map(|address| Connector::new(address, tls())).transpose()?,
            pop3_deletes: profile.pop3.deletes,
            status_mailboxes: plan.status_mailboxes,
            names: plan.login.users.names(),
            messages: corpus.mail.iter().map(message).collect(),
            deliverers: RefCell::default(),
            seen: RefCell::default(),
            maildrops: RefCell::default(),
        })
    }

    pub fn message(&self, number: u64) -> Arc<Message> {
        // The low bits choose the user.
        Arc::clone(&self.messages[((number >> 20) % self.messages.len() as u64) as usize])
    }

    /// Delivers a message to an account; its octets.
    pub async fn deliver(&self, account: usize, number: u64, limit: Duration) -> Result<u64, Failure> {
        let message = self.message(number);
        let free = self.deliverers.borrow_mut().pop();
        let mut client = match free {
            Some(client) => client,
            None => limited(limit, lmtp::Client::connect_by(self.protocol, &self.delivery, true)).await?,
        };
        let recipients = [self.names[account].as_str()];
        let mut outcome = limited(limit, client.deliver(&recipients, &message.data, || {})).await?;
        self.deliverers.borrow_mut().push(client);
        match outcome.refused.pop() {
            Some(error) => Err(error.into()),
            None => Ok(message.data.octets() as u64),
        }
    }

    /// Lets a client of each account look once, so that it has mailboxes to ask for and something to come back to.
    ///
    /// # Errors
    /// One could not.
    pub async fn prepare(self: Rc<Self>, accounts: &[usize], limit: Duration) -> Result<(), Box<dyn Error>> {
        let bar = ProgressBar::new(accounts.len() as u64);
        bar.set_style(
            ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos} of {len} accounts")?.progress_chars("=> "),
        );
        let (permits, mut looking) = (Rc::new(Semaphore::new(LOGINS_MAX)), JoinSet::new());
        for &account in accounts {
            let (operations, permits, bar) = (Rc::clone(&self), Rc::clone(&permits), bar.clone());
            looking.spawn_local(async move {
                let _permit = permits.acquire().await.expect("the semaphore is not closed");
                bar.inc(1);
                operations.poll(account, limit).await
            });
        }
        while let Some(looked) = looking.join_next().await {
            looked?.map_err(|Failure { message, .. }| format!("an account cannot be used: {message}"))?;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// A client connects, asks for what is new since it was there last, and leaves; the octets that it was sent.
    pub async fn poll(&self, account: usize, limit: Duration) -> Result<u64, Failure> {
        Ok(limited(limit, self.look(account)).await?)
    }

    async fn look(&self, account: usize) -> Result<u64, ImapError> {
        let mut client = self.login.client(&self.imap, account).await?;
        let capabilities = client.capabilities().await?;
        let (qresync, condstore) = (capabilities.has("QRESYNC"), capabilities.has("CONDSTORE"));
        let before = self.seen.borrow().get(&account).copied();
        let mut bytes = 0;
        let mut count = |response: &crate::imap::Response<'_>| {
            bytes += response.bytes.len() as u64;
            Ok(())
        };
        let known = before.and_then(|seen| Some((seen.uid_validity, seen.modseq?)));
        let parameters = match known {
            Some((uid_validity, modseq)) if qresync => {
                client.command("ENABLE", "ENABLE QRESYNC", |_| Ok(())).await?;
                format!("(QRESYNC ({uid_validity} {modseq}))")
            }
            _ if condstore => "(CONDSTORE)".to_owned(),
            _ => String::new(),
        };
        let selected = client.open("SELECT", "INBOX", &parameters, &mut count).await?;
        let lines: Vec<String> =
            self.status_names().map(|name| format!("STATUS {name} (MESSAGES UNSEEN UIDNEXT)")).collect();
        let mut told = 0;
        let status = client.run_together("STATUS", &lines, |response| {
            told += usize::from(response.after("* STATUS ").is_some());
            count(response)
        });
        match status.await {
            Ok(()) if told == lines.len() => {}
            Ok(()) => return Err(ImapError::Wrong("STATUS incomplete", format!("{told} of {}", lines.len()))),
            // The mailboxes are made by the first poll of an account.
            Err(ImapError::Refused(..)) if before.is_none() => {
                for number in 1..=self.status_mailboxes {
                    client.create(&format!("bench-status-{number}")).await?;
                }
            }
            Err(error) => return Err(error),
        }
        match (known, before) {
            _ if selected.exists == 0 => {}
            (Some(_), _) if qresync => {}
            (Some((_, modseq)), _) => {
                let line = format!("UID FETCH 1:* (FLAGS) (CHANGEDSINCE {modseq})");
                client.command("UID FETCH", &line, &mut count).await?;
            }
            (None, Some(_)) => client.command("UID FETCH", "UID FETCH 1:* (FLAGS)", &mut count).await?,
            (None, None) => {}
        }
        let uid_next = selected.uid_next.unwrap_or(0);
        if let Some(before) = before
            && before.uid_next < uid_next
            && selected.exists > 0
        {
            let first = before.uid_next.max(uid_next.saturating_sub(LOOKED_AT_MAX));
            let mut numbers = Numbers::default();
            let line = format!("UID FETCH {first}:{} (ENVELOPE RFC822.SIZE)", uid_next - 1);
            client
                .command("UID FETCH", &line, |response| {
                    if let Some((number, list)) = response.numbered("FETCH") {
                        let data = FetchData::parse(response, list)?;
                        if !data.is_update() {
                            numbers.take(number, data.uid.ok_or("a FETCH response without UID")?);
                        }
                    }
                    count(response)
                })
                .await?;
            numbers.check(1..=u32::MAX)?;
        }
        client.logout().await?;
        if let Some(uid_validity) = selected.uid_validity {
            let seen =
                Seen { uid_validity, uid_next, modseq: selected.highest_modseq.filter(|_| condstore || qresync) };
            self.seen.borrow_mut().insert(account, seen);
        }
        Ok(bytes)
    }

    fn status_names(&self) -> impl Iterator<Item = String> {
        (1..=self.status_mailboxes).map(|number| quote(&format!("bench-status-{number}")))
    }

    /// A session that retrieves what there is, but not too much; the octets of the messages.
    pub async fn pop3(&self, account: usize, limit: Duration) -> Result<u64, Failure> {
        let Some(connector) = &self.pop3 else { return Ok(0) };
        let maildrop = Rc::clone(self.maildrops.borrow_mut().entry(account).or_default());
        // A client does not look for mail while it looks for mail.
        let _own = maildrop.lock().await;
        Ok(limited(limit, self.retrieve(connector, account)).await?)
    }

    async fn retrieve(&self, connector: &Connector, account: usize) -> Result<u64, Pop3Error> {
        let mut client = pop3::Client::connect(connector).await?;
        client.login(&self.names[account], &self.login.password).await?;
        let (messages, _) = client.stat().await?;
        let listed = client.list().await?;
        if listed != messages {
            return Err(Pop3Error::Protocol(format!("STAT tells of {messages} messages, LIST of {listed}")));
        }
        let mut octets = 0;
        if messages > 0 {
            // Those that have been there longest, where they are deleted; the newest otherwise.
            let count = messages.min(RETRIEVED_MAX);
            let wanted = if self.pop3_deletes { 1..=count } else { messages - count + 1..=messages };
            client.retrieve(wanted.clone(), |received| octets += received).await?;
            if self.pop3_deletes {
                client.delete(wanted).await?;
            }
        }
        client.quit().await?;
        Ok(octets)
    }
}

/// A client that has logged in and selected the INBOX.
///
/// # Errors
/// The connection, or what the server says.
pub async fn inbox(login: &Login, connector: &Connector, account: usize) -> Result<(Client, u32), ImapError> {
    let mut client = login.client(connector, account).await?;
    client.create("Sent").await?;
    let exists = client.select("INBOX", false).await?;
    Ok((client, exists))
}
