//! Proof that nothing a server acknowledged was lost, doubled or altered.
//!
//! Each message begins with a header of its own, `X-Bench-Id: RUN.NUMBER`. A ledger keeps, for each message and mailbox, a hash
//! of what follows that line, what the server answered, and how often the message was found: some 60 octets each. After the run
//! every mailbox that was sent to is read whole. A server may put trace headers before the first line; all else must be as it
//! was sent, octet for octet.
//!
//! What the server refused may be there all the same: between storing a message and saying so, either side may fail, and
//! neither then knows (RFC 1047). Such messages are counted apart. A mailbox that cannot be read proves nothing, and neither does
//! a run in which nothing was acknowledged: both fail.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::error::Error;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::runtime::Builder;
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::imap::{self, ImapError};
use crate::pop3::{self, Pop3Error};
use crate::stream::{Address, Connector};
use crate::tls::Tls;

/// The header that each message begins with.
const ID_HEADER: &str = "X-Bench-Id";
/// Headers that a server may put before a message: RFC 5321, 4.4, and what delivery agents add by custom.
const TRACE_HEADERS: [&str; 3] = ["Return-Path", "Received", "Delivered-To"];
/// Mailboxes that are read at the same time.
const READERS: usize = 8;
/// Messages of one FETCH.
const FETCH_MESSAGES: u32 = 50;
/// Findings that are told in full.
const FINDINGS_MAX: usize = 10;

/// Whether, and how, to look afterwards.
#[derive(Clone, Debug, Default, Args)]
pub struct VerifyOptions {
    /// After the run, read every mailbox that was sent to, and fail unless all that was acknowledged is there, once and
    /// unaltered. Each message gets a header X-Bench-Id. Exit code 3 if not, 4 if that could not be found out
    #[arg(long, requires = "verify_from")]
    pub verify: bool,
    /// Where to read the mailboxes over IMAP: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR", group = "verify_from", requires = "verify")]
    pub verify_imap: Option<Address>,
    /// Where to read them over POP3
    #[arg(long, value_name = "ADDR", group = "verify_from", requires = "verify")]
    pub verify_pop3: Option<Address>,
    /// Read them with TLS from the first octet. The certificate is not verified
    #[arg(long, requires = "verify")]
    pub verify_tls: bool,
    /// A header that the server may put before a message, besides Return-Path, Received and Delivered-To; may be repeated
    #[arg(long, value_name = "HEADER", requires = "verify")]
    pub verify_header: Vec<String>,
}

impl VerifyOptions {
    /// Reads `mailbox` of `users` with one password; `None` if nobody asked for it. Over POP3 a mailbox is the INBOX.
    ///
    /// # Errors
    /// There is no password, or TLS is wanted on a Unix socket.
    pub fn verifier(
        &self,
        users: Vec<String>,
        mailbox: &str,
        password: Option<&str>,
        timeout: Duration,
    ) -> Result<Option<Verifier>, String> {
        let source = match (&self.verify_imap, &self.verify_pop3) {
            (Some(address), _) => Source::Imap(self.connector(address)?),
            (None, Some(address)) => Source::Pop3(self.connector(address)?),
            (None, None) => return Ok(None),
        };
        let password = password.ok_or("--verify needs --password, to read the mailboxes")?.to_owned();
        let headers = TRACE_HEADERS.iter().map(|header| (*header).to_owned());
        let allowed = headers.chain(self.verify_header.iter().cloned()).collect();
        Ok(Some(Verifier { source, users, mailbox: mailbox.to_owned(), password, timeout, allowed }))
    }

    fn connector(&self, address: &Address) -> Result<Connector, String> {
        Connector::new(address, self.verify_tls.then(|| Tls::new(false)))
    }
}

/// A hash of what follows the line with the message's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash([u8; 16]);

impl ContentHash {
    /// Of a message without the header [`Ledger::header`].
    pub fn of(message: &[u8]) -> Self {
        let mut hash = [0; 16];
        hash.copy_from_slice(&blake3::hash(message).as_bytes()[..16]);
        Self(hash)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// The connection ended, or the time was up, before there was one.
    None,
    Acknowledged,
    Refused,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    content: ContentHash,
    answer: Answer,
    found: u32,
}

/// What was sent to whom. Mailboxes have numbers, which are those of their users.
#[derive(Debug)]
pub struct Ledger {
    run: String,
    entries: Mutex<HashMap<(u64, u32), Entry>>,
}

impl Default for Ledger {
    fn default() -> Self {
        // Another for each run, so that mail of earlier runs is not taken for this one's.
        Self { run: format!("{:016x}", RandomState::new().build_hasher().finish()), entries: Mutex::default() }
    }
}

impl Ledger {
    /// The line that a message begins with.
    pub fn header(&self, number: u64) -> String {
        format!("{ID_HEADER}: {}.{number}\r\n", self.run)
    }

    /// A message is about to be sent. The same number must not be sent to the same mailbox again.
    pub fn sent(&self, number: u64, mailbox: usize, content: ContentHash) {
        let entry = Entry { content, answer: Answer::None, found: 0 };
        let before = self.entries().insert((number, mailbox as u32), entry);
        assert!(before.is_none(), "message {number} was sent to mailbox {mailbox} twice");
    }

    /// The server has said that it has the message.
    pub fn acknowledged(&self, number: u64, mailbox: usize) {
        self.answered(number, mailbox, Answer::Acknowledged);
    }

    /// The server has said that it has not.
    pub fn refused(&self, number: u64, mailbox: usize) {
        self.answered(number, mailbox, Answer::Refused);
    }

    fn answered(&self, number: u64, mailbox: usize, answer: Answer) {
        let mut entries = self.entries();
        let entry = entries.get_mut(&(number, mailbox as u32)).expect("what is answered was sent");
        entry.answer = answer;
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<(u64, u32), Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Mailboxes that were sent to.
    pub mailboxes: u64,
    /// Those that could not be read.
    pub mailboxes_unread: u64,
    /// Messages sent, once for each mailbox.
    pub sent: u64,
    pub acknowledged: u64,
    /// Acknowledged, and there once and unaltered.
    pub proven: u64,
    /// Acknowledged, and not there.
    pub lost: u64,
    /// There more than once.
    pub doubled: u64,
    /// There with another content.
    pub altered: u64,
    /// In a mailbox that they were not sent to.
    pub strayed: u64,
    pub refused: u64,
    /// Refused and there all the same, which a server may do.
    pub present_though_refused: u64,
    /// Without an answer, because the connection ended or the time was up.
    pub unanswered: u64,
    pub present_though_unanswered: u64,
    /// Sent to mailboxes that could not be read: nothing is known.
    pub unread: u64,
    /// Other mail in these mailboxes.
    pub others: u64,
    /// Some of what is wrong, in words.
    pub findings: Vec<String>,
}

/// Why nothing is proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The server has lost, doubled, altered or misplaced mail.
    Wrong(String),
    /// It could not be found out.
    Unknown(String),
}

impl Failure {
    /// What the program exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Wrong(_) => 3,
            Self::Unknown(_) => 4,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(what) => write!(f, "verification failed: {what}"),
            Self::Unknown(what) => write!(f, "verification was not possible, nothing is proven: {what}"),
        }
    }
}

impl Error for Failure {}

impl Verdict {
    /// # Errors
    /// Something is wrong, or it could not be found out.
    pub fn judge(&self) -> Result<(), Failure> {
        let Self { lost, doubled, altered, strayed, mailboxes, mailboxes_unread, .. } = self;
        let first = self.findings.first().map_or(String::new(), |finding| format!("; {finding}"));
        if lost + doubled + altered + strayed > 0 {
            let counts = format!("{lost} lost, {doubled} doubled, {altered} altered, {strayed} in a wrong mailbox");
            return Err(Failure::Wrong(counts + &first));
        }
        if *mailboxes_unread > 0 {
            let counts = format!("{mailboxes_unread} of {mailboxes} mailboxes could not be read");
            return Err(Failure::Unknown(counts + &first));
        }
        if self.acknowledged == 0 {
            return Err(Failure::Unknown("the server has not acknowledged a single message".to_owned()));
        }
        assert_eq!(self.proven, self.acknowledged, "every message that was acknowledged is accounted for");
        Ok(())
    }

    /// Lines of a table: names and values.
    pub fn rows(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![(
            "verified",
            format!("{} of {} acknowledged, in {} mailboxes", self.proven, self.acknowledged, self.mailboxes),
        )];
        let wrong = [
            ("lost", self.lost),
            ("doubled", self.doubled),
            ("altered", self.altered),
            ("strayed", self.strayed),
            ("unread", self.unread),
        ];
        let shown = wrong.iter().filter(|(_, count)| *count > 0);
        rows.extend(shown.map(|(name, count)| (*name, format!("{count} messages"))));
        if self.refused > 0 {
            rows.push(("refused", format!("{}, {} present though refused", self.refused, self.present_though_refused)));
        }
        if self.unanswered > 0 {
            let present = self.present_though_unanswered;
            rows.push(("unanswered", format!("{}, of which {present} are there", self.unanswered)));
        }
        rows.extend(self.findings.iter().map(|finding| ("", finding.clone())));
        rows
    }
}

/// Reads mailboxes.
#[derive(Clone, Debug)]
pub struct Verifier {
    source: Source,
    users: Vec<String>,
    mailbox: String,
    password: String,
    timeout: Duration,
    allowed: Vec<String>,
}

#[derive(Clone, Debug)]
enum Source {
    Imap(Connector),
    Pop3(Connector),
}

impl Verifier {
    /// Reads every mailbox that was sent to and compares it with the ledger. What cannot be read is in the verdict.
    ///
    /// # Errors
    /// The system.
    pub fn verify(&self, ledger: &Ledger) -> Result<Verdict, Box<dyn Error>> {
        let mailboxes: BTreeSet<u32> = ledger.entries().keys().map(|(_, mailbox)| *mailbox).collect();
        let bar = ProgressBar::new(mailboxes.len() as u64);
        let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos} of {len} mailboxes verified")?;
        bar.set_style(style.progress_chars("=> "));
        let findings = Rc::new(RefCell::new(Findings::default()));
        let left = Rc::new(RefCell::new(mailboxes.iter().copied().collect::<Vec<_>>()));
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let readers = (0..READERS).map(|_| {
            let (left, findings, bar) = (Rc::clone(&left), Rc::clone(&findings), bar.clone());
            async move {
                loop {
                    let Some(mailbox) = left.borrow_mut().pop() else { return };
                    let mut look = |message: &[u8]| findings.borrow_mut().look(self, ledger, mailbox, message);
                    if let Err(error) = self.read(&self.users[mailbox as usize], &mut look).await {
                        findings.borrow_mut().unreadable(self, mailbox, &error);
                    }
                    bar.inc(1);
                }
            }
        });
        LocalSet::new().block_on(&runtime, async {
            let mut readers: Vec<_> = readers.map(Box::pin).collect();
            // All are polled until all have ended.
            std::future::poll_fn(|context| {
                readers.retain_mut(|reader| reader.as_mut().poll(context).is_pending());
                if readers.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
            })
            .await;
        });
        bar.finish_and_clear();
        let mut findings = findings.borrow_mut();
        findings.verdict.mailboxes = mailboxes.len() as u64;
        Ok(std::mem::take(&mut *findings).conclude(self, ledger))
    }

    /// Gives each message of a mailbox to `look`.
    async fn read(&self, user: &str, look: &mut impl FnMut(&[u8])) -> Result<(), String> {
        match &self.source {
            Source::Imap(connector) => self.read_imap(connector, user, look).await.map_err(|error| error.to_string()),
            Source::Pop3(connector) => self.read_pop3(connector, user, look).await.map_err(|error| error.to_string()),
        }
    }

    async fn read_imap(
        &self,
        connector: &Connector,
        user: &str,
        look: &mut impl FnMut(&[u8]),
    ) -> Result<(), ImapError> {
        let late = |_| ImapError::Io(std::io::ErrorKind::TimedOut);
        let begin = async {
            let mut client = imap::Client::connect(connector).await?;
            client.login(user, &self.password).await?;
            let exists = client.select(&self.mailbox, true).await?;
            Ok::<_, ImapError>((client, exists))
        };
        // The other readers' passwords are checked at the same time.
        let (mut client, exists) = timeout(self.timeout * READERS as u32, begin).await.map_err(late)??;
        let mut first = 1;
        while first <= exists {
            let last = exists.min(first + FETCH_MESSAGES - 1);
            let mut seen = BTreeSet::new();
            let line = format!("FETCH {first}:{last} (BODY.PEEK[])");
            let fetch = client.command("FETCH", &line, |response| {
                let Some((number, list)) = response.numbered("FETCH") else { return Ok(()) };
                imap::check_fetch(response, list)?;
                // Without a body it tells of a change of flags.
                if let Some(body) = response.literals.last()
                    && seen.insert(number)
                {
                    look(&response.bytes[body.clone()]);
                }
                Ok(())
            });
            timeout(self.timeout, fetch).await.map_err(late)??;
            if !(first..=last).all(|number| seen.contains(&number)) {
                let text = format!("{} bodies for messages {first} to {last}", seen.len());
                return Err(ImapError::Protocol(text));
            }
            first = last + 1;
        }
        // All has been read; what the server says to LOGOUT changes nothing.
        let _ = timeout(self.timeout, client.logout()).await;
        Ok(())
    }

    async fn read_pop3(
        &self,
        connector: &Connector,
        user: &str,
        look: &mut impl FnMut(&[u8]),
    ) -> Result<(), Pop3Error> {
        let late = |_| Pop3Error::Io(std::io::ErrorKind::TimedOut);
        let begin = async {
            let mut client = pop3::Client::connect(connector).await?;
            client.login(user, &self.password).await?;
            let (messages, _) = client.stat().await?;
            Ok::<_, Pop3Error>((client, messages))
        };
        let (mut client, messages) = timeout(self.timeout * READERS as u32, begin).await.map_err(late)??;
        for number in 1..=messages {
            let message = timeout(self.timeout, client.retrieve_message(number)).await.map_err(late)??;
            look(&message);
        }
        let _ = timeout(self.timeout, client.quit()).await;
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Findings {
    verdict: Verdict,
    unreadable: BTreeSet<u32>,
}

impl Findings {
    fn tell(&mut self, what: impl FnOnce() -> String) {
        if self.verdict.findings.len() < FINDINGS_MAX {
            self.verdict.findings.push(what());
        }
    }

    fn unreadable(&mut self, verifier: &Verifier, mailbox: u32, error: &str) {
        self.unreadable.insert(mailbox);
        self.tell(|| format!("the mailbox of {} could not be read: {error}", verifier.users[mailbox as usize]));
    }

    fn look(&mut self, verifier: &Verifier, ledger: &Ledger, mailbox: u32, message: &[u8]) {
        let Some(found) = Found::parse(message).filter(|found| found.run == ledger.run.as_bytes()) else {
            self.verdict.others += 1;
            return;
        };
        let user = || &verifier.users[mailbox as usize];
        let number = found.number;
        let mut entries = ledger.entries();
        let Some(entry) = entries.get_mut(&(number, mailbox)) else {
            self.verdict.strayed += 1;
            return self.tell(|| format!("message {number} is in the mailbox of {}, to whom it was not sent", user()));
        };
        entry.found += 1;
        if entry.found == 2 {
            self.verdict.doubled += 1;
            self.tell(|| format!("message {number} is more than once in the mailbox of {}", user()));
        }
        if let Some(header) = found.unknown_header(&verifier.allowed) {
            self.verdict.altered += 1;
            let header = String::from_utf8_lossy(header).into_owned();
            self.tell(|| format!("message {number} of {} begins with a header that was not sent: {header:?}", user()));
        } else if ContentHash::of(found.rest) != entry.content {
            self.verdict.altered += 1;
            self.tell(|| format!("message {number} of {} has another content than was sent", user()));
        }
    }

    fn conclude(mut self, verifier: &Verifier, ledger: &Ledger) -> Verdict {
        self.verdict.mailboxes_unread = self.unreadable.len() as u64;
        let entries = ledger.entries();
        for ((number, mailbox), entry) in entries.iter() {
            self.verdict.sent += 1;
            let there = u64::from(entry.found > 0);
            match entry.answer {
                Answer::Acknowledged => self.verdict.acknowledged += 1,
                Answer::Refused => {
                    self.verdict.refused += 1;
                    self.verdict.present_though_refused += there;
                }
                Answer::None => {
                    self.verdict.unanswered += 1;
                    self.verdict.present_though_unanswered += there;
                }
            }
            if self.unreadable.contains(mailbox) {
                self.verdict.unread += 1;
            } else if entry.answer == Answer::Acknowledged {
                self.verdict.proven += there;
                self.verdict.lost += 1 - there;
                if there == 0 {
                    let user = &verifier.users[*mailbox as usize];
                    self.tell(|| format!("message {number} to {user} was acknowledged and is not there"));
                }
            }
        }
        self.verdict
    }
}

/// A message of a run, as it was found.
struct Found<'a> {
    /// What the server has put before it.
    before: &'a [u8],
    run: &'a [u8],
    number: u64,
    /// What follows the line with the number.
    rest: &'a [u8],
}

impl<'a> Found<'a> {
    /// `None` if it has no number.
    fn parse(message: &'a [u8]) -> Option<Self> {
        let mut at = 0;
        for line in message.split_inclusive(|&octet| octet == b'\n') {
            if line.trim_ascii().is_empty() {
                return None;
            }
            let (name, value) = line.split_at_checked(ID_HEADER.len()).unwrap_or_default();
            if name.eq_ignore_ascii_case(ID_HEADER.as_bytes())
                && let Some(value) = value.strip_prefix(b":")
            {
                let value = value.trim_ascii();
                let dot = memchr::memrchr(b'.', value)?;
                let number = str::from_utf8(&value[dot + 1..]).ok()?.parse().ok()?;
                let (before, rest) = (&message[..at], &message[at + line.len()..]);
                return Some(Self { before, run: &value[..dot], number, rest });
            }
            at += line.len();
        }
        None
    }

    /// The first line before the message that is none of the headers a server may add.
    fn unknown_header(&self, allowed: &[String]) -> Option<&'a [u8]> {
        let is_allowed = |line: &[u8]| {
            let is = |header: &String| {
                let (name, rest) = line.split_at_checked(header.len()).unwrap_or_default();
                name.eq_ignore_ascii_case(header.as_bytes()) && rest.starts_with(b":")
            };
            allowed.iter().any(is)
        };
        let mut lines = self.before.split_inclusive(|&octet| octet == b'\n').enumerate();
        // A line that begins with white space goes on with the one before it.
        let unknown = |(index, line): &(usize, &[u8])| {
            let goes_on = *index > 0 && line.first().is_some_and(|octet| matches!(octet, b' ' | b'\t'));
            !goes_on && !is_allowed(line)
        };
        lines.find(unknown).map(|(_, line)| line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(message: &str) -> Option<(String, u64, String, Option<String>)> {
        let allowed = TRACE_HEADERS.map(str::to_owned);
        let found = Found::parse(message.as_bytes())?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Some((text(found.run), found.number, text(found.rest), found.unknown_header(&allowed).map(text)))
    }

    #[test]
    fn messages_are_known_by_their_header() {
        let expected = Some(("ab".to_owned(), 7, "Subject: x\r\n\r\nx\r\n".to_owned(), None));
        assert_eq!(found("X-Bench-Id: ab.7\r\nSubject: x\r\n\r\nx\r\n"), expected);
        let trace = "Return-Path: <a@b>\r\nDelivered-To: c\r\nReceived: from x\r\n\tby y;\r\n z\r\n";
        assert_eq!(found(&format!("{trace}x-bench-id: ab.7\r\nSubject: x\r\n\r\nx\r\n")), expected);
        assert_eq!(found("Subject: x\r\n\r\nX-Bench-Id: ab.7\r\n"), None);
        assert_eq!(found("X-Bench-Id: 7\r\n\r\n"), None);
        assert_eq!(found(""), None);
    }

    #[test]
    fn other_headers_before_a_message_are_seen() {
        for before in ["X-Virus: no\r\n", "ReceivedX: a\r\n", " folded\r\n", "Received: a\r\nX-Virus:\r\n\tno\r\n"] {
            let (.., unknown) = found(&format!("{before}X-Bench-Id: ab.7\r\n\r\n")).unwrap();
            assert!(unknown.is_some(), "{before:?}");
        }
    }

    #[test]
    fn a_verdict_is_judged() {
        let good = Verdict { mailboxes: 1, sent: 2, acknowledged: 2, proven: 2, ..Verdict::default() };
        assert_eq!(good.judge(), Ok(()));
        for (wrong, code) in [
            (Verdict { lost: 1, proven: 1, ..good.clone() }, 3),
            (Verdict { doubled: 1, ..good.clone() }, 3),
            (Verdict { altered: 1, ..good.clone() }, 3),
            (Verdict { strayed: 1, ..good.clone() }, 3),
            (Verdict { mailboxes_unread: 1, lost: 1, ..good.clone() }, 3),
            (Verdict { mailboxes_unread: 1, ..good.clone() }, 4),
            (Verdict::default(), 4),
        ] {
            assert_eq!(wrong.judge().map_err(|failure| failure.exit_code()), Err(code), "{wrong:?}");
        }
    }
}
