//! Rounds of SIGKILL against the real server on real files: what was acknowledged is there, once, with its flags, under
//! its UID, and nothing else is.
//!
//! SIGKILL leaves the page cache, so this proves recovery and acknowledgement order, not that anything was synced: the
//! simulation does that.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use posthaste_engine::io::sim::SeededRandom;

use crate::clients::{Done, Fetched, Imap, Lmtp, Status};
use crate::server::{Server, Store};

const PASSWORD: &str = "secret";
/// Above this, a mailbox is made smaller.
const MESSAGES_MAX: usize = 120;
const NAMES: [&str; 4] = ["INBOX", "Work", "Archive", "Lists"];
const FLAGS: [&str; 6] = ["\\seen", "\\flagged", "\\answered", "\\draft", "$k1", "$k2"];

/// How rounds are made up.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    pub rounds: u32,
    /// Each with an IMAP connection of its own.
    pub users: usize,
    pub lmtp_connections: usize,
    /// Acknowledged operations after which the server is killed.
    pub operations: u64,
}

/// What has been done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    pub acknowledged: u64,
    /// Operations that were on their way when the server was killed: done and not done.
    pub undecided_done: u64,
    pub undecided_not_done: u64,
    pub messages: u64,
}

type Token = u64;

/// A message as a client knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Message {
    token: Token,
    flags: BTreeSet<String>,
}

/// A mailbox as a client knows it.
#[derive(Clone, Debug, Default)]
struct Mailbox {
    uid_validity: u32,
    /// Every UID below has been seen or will never be.
    uid_next: u32,
    messages: BTreeMap<u32, Message>,
    expunged: BTreeSet<u32>,
}

/// What was sent and not acknowledged.
#[derive(Clone, Debug)]
enum Pending {
    Store { mailbox: String, uids: BTreeSet<u32>, flags: BTreeSet<String> },
    Expunge { mailbox: String, uids: BTreeSet<u32> },
    Transfer { from: String, to: String, uids: BTreeSet<u32>, is_move: bool },
    Append { token: Token },
    Create { mailbox: String },
    Delete { mailbox: String },
}

/// All that is known of a user.
#[derive(Debug, Default)]
struct User {
    number: usize,
    mailboxes: BTreeMap<String, Mailbox>,
    pending: Option<Pending>,
    /// Tokens of messages that were seen in this round, wherever.
    learned: BTreeSet<Token>,
    /// UIDVALIDITY of mailboxes that were deleted.
    deleted: BTreeMap<String, u32>,
}

/// Messages for users: acknowledged, or on their way when the server was killed.
#[derive(Debug, Default)]
struct Delivered {
    acknowledged: Vec<(usize, Token)>,
    undecided: Vec<(usize, Token)>,
}

fn user_name(number: usize) -> String {
    format!("user{number}@example.org")
}

/// A message that tells its token and whose every octet depends on it. Mostly a few KB that do not compress well, now
/// and then more than one block of the store.
fn message_of(token: Token) -> Vec<u8> {
    let mut random = SeededRandom::new(token);
    let lines = match token % 100 {
        0 => 6000,
        1..10 => 500,
        _ => 20 + random.below(120),
    };
    let mut message =
        format!("From: a@example.net\r\nX-Token: {token}\r\nSubject: message {token}\r\n\r\n").into_bytes();
    for _ in 0..lines {
        for _ in 0..4 {
            message.extend_from_slice(format!("{:016x}", random.next_u64()).as_bytes());
        }
        message.extend_from_slice(b"\r\n");
    }
    message
}

fn token_of(header: &[u8]) -> Option<Token> {
    let text = String::from_utf8_lossy(header);
    let line = text.lines().find_map(|line| line.strip_prefix("X-Token: "))?;
    line.trim().parse().ok()
}

/// Whether a whole message is that of its token, perhaps with trace headers before it.
fn whole_token_of(bytes: &[u8]) -> Option<Token> {
    let token = token_of(bytes)?;
    let trace = bytes.strip_suffix(message_of(token).as_slice())?;
    (trace.is_empty() || trace.starts_with(b"Return-Path: <sender@example.net>\r\n")).then_some(token)
}

fn set_of(uids: &BTreeSet<u32>) -> String {
    uids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// What all connections of a round share.
struct Round {
    acknowledged: AtomicU64,
    limit: u64,
    enough: Sender<()>,
    next_token: AtomicU64,
    users: usize,
}

impl Round {
    /// Counts an acknowledged operation, and has the server killed when there are enough.
    fn count(&self) {
        if self.acknowledged.fetch_add(1, Ordering::SeqCst) + 1 == self.limit {
            // If nobody waits, somebody else had the server killed.
            let _ = self.enough.send(());
        }
    }

    fn token(&self) -> Token {
        self.next_token.fetch_add(1, Ordering::Relaxed)
    }
}

/// How a connection's work ended.
#[derive(Debug)]
enum End {
    /// The server is gone.
    Killed,
    Wrong(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Self::Wrong(error.to_string())
            }
            _ => Self::Killed,
        }
    }
}

/// Runs a plan. `report` is told of each round.
///
/// # Errors
/// The first broken promise, with the directory of the store, which is kept.
pub fn run(plan: Plan, mut report: impl FnMut(u32, &Outcome)) -> Result<Outcome, String> {
    let settings = ["store.segment_size_bytes=4194304", "store.checkpoint_bytes=8388608", "store.shards=3"];
    let store = Store::new(&settings, &["--plaintext-auth", "--workers", "2"])?;
    store.add_users(&(0..plan.users).map(user_name).collect::<Vec<_>>(), PASSWORD)?;
    let mut users: Vec<User> = (0..plan.users).map(|number| User { number, ..User::default() }).collect();
    let (mut outcome, mut next_token) = (Outcome::default(), 1);
    for round in 0..plan.rounds {
        match run_round(&store, plan, round, &mut users, &mut next_token, &mut outcome) {
            Ok(()) => report(round, &outcome),
            Err(error) => {
                let kept = store.keep();
                return Err(format!("seed {}, round {round}: {error}; the store is in {}", plan.seed, kept.display()));
            }
        }
    }
    let server = store.start()?;
    server.stop()?;
    store.run(&["check"])?;
    Ok(outcome)
}

fn run_round(
    store: &Store,
    plan: Plan,
    round: u32,
    users: &mut Vec<User>,
    next_token: &mut Token,
    outcome: &mut Outcome,
) -> Result<(), String> {
    let mut random = SeededRandom::new(plan.seed ^ u64::from(round) << 32);
    let server = store.start()?;
    if round == 0 {
        for user in &mut *users {
            look(&server, user.number).and_then(|seen| adopt(user, seen))?;
        }
    }
    let (sender, receiver) = channel();
    let shared = Round {
        acknowledged: AtomicU64::new(0),
        limit: plan.operations + random.below(plan.operations / 2 + 1),
        enough: sender,
        next_token: AtomicU64::new(*next_token),
        users: users.len(),
    };
    let (imap, lmtp) = (server.imap(), server.lmtp());
    let mut delivered: Vec<Delivered> = (0..plan.lmtp_connections).map(|_| Delivered::default()).collect();
    let (killed, ends) = thread::scope(|scope| {
        let mut connections = Vec::new();
        for user in &mut *users {
            let (shared, random) = (&shared, SeededRandom::new(random.next_u64()));
            connections.push(scope.spawn(move || work_imap(imap, user, shared, random)));
        }
        for delivered in &mut delivered {
            let (shared, random) = (&shared, SeededRandom::new(random.next_u64()));
            connections.push(scope.spawn(move || work_lmtp(lmtp, delivered, shared, random)));
        }
        let killed = wait_and_kill(server, &receiver);
        let ends: Vec<_> = connections.into_iter().map(thread::ScopedJoinHandle::join).collect();
        (killed, ends)
    });
    for end in ends {
        match end {
            Ok(End::Killed) => {}
            Ok(End::Wrong(what)) => return Err(what),
            Err(_) => return Err("a connection's thread panicked".to_owned()),
        }
    }
    killed?;
    if shared.acknowledged.load(Ordering::SeqCst) < shared.limit {
        return Err("the server closed a connection".to_owned());
    }
    outcome.acknowledged += shared.acknowledged.load(Ordering::SeqCst);
    *next_token = shared.next_token.into_inner();

    store.run(&["check"]).map_err(|error| format!("after SIGKILL: {error}"))?;
    let server = store.start()?;
    outcome.messages = 0;
    for user in users {
        let seen = look(&server, user.number)?;
        verify(user, &seen, &delivered, outcome).map_err(|error| format!("{}: {error}", user_name(user.number)))?;
        outcome.messages += seen.values().map(|mailbox| mailbox.messages.len() as u64).sum::<u64>();
        adopt(user, seen)?;
    }
    server.stop()
}

fn wait_and_kill(server: Server, enough: &Receiver<()>) -> Result<(), String> {
    // A connection that found something wrong says so too. The sender outlives all of them.
    enough.recv().map_err(|error| error.to_string())?;
    server.kill()
}

/// Delivers until the server is gone.
fn work_lmtp(address: std::net::SocketAddr, delivered: &mut Delivered, round: &Round, mut random: SeededRandom) -> End {
    let mut work = || -> Result<(), End> {
        let mut lmtp = Lmtp::connect(address)?;
        loop {
            let first = random.below(round.users as u64) as usize;
            let count = 1 + random.below(3) as usize % round.users;
            let users: Vec<usize> = (0..count).map(|offset| (first + offset) % round.users).collect();
            let token = round.token();
            delivered.undecided = users.iter().map(|&user| (user, token)).collect();
            let names: Vec<String> = users.iter().map(|&user| user_name(user)).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let replies = lmtp.deliver(&names, &message_of(token))?;
            delivered.undecided.clear();
            for (user, (code, text)) in users.into_iter().zip(replies) {
                if code != 250 {
                    return Err(End::Wrong(format!("delivery: {text}")));
                }
                delivered.acknowledged.push((user, token));
                round.count();
            }
        }
    };
    finish(work(), round)
}

/// Changes a user's mailboxes until the server is gone.
fn work_imap(address: std::net::SocketAddr, user: &mut User, round: &Round, random: SeededRandom) -> End {
    let work = || -> Result<(), End> {
        let mut session = Session { imap: Imap::connect(address)?, user, round, random, selected: String::new() };
        session.imap.login(&user_name(session.user.number), PASSWORD)?;
        for name in &NAMES[1..] {
            if !session.user.mailboxes.contains_key(*name) {
                session.create(name)?;
            }
        }
        loop {
            session.step()?;
        }
    };
    finish(work(), round)
}

fn finish(result: Result<(), End>, round: &Round) -> End {
    // Whatever ended it, the round is over; the receiver may have heard of it before.
    let _ = round.enough.send(());
    result.err().unwrap_or(End::Killed)
}

struct Session<'a> {
    imap: Imap,
    user: &'a mut User,
    round: &'a Round,
    random: SeededRandom,
    selected: String,
}

impl Session<'_> {
    /// Selects some mailbox, learns what is new in it, and changes something.
    fn step(&mut self) -> Result<(), End> {
        let name = self.some_name();
        self.select(&name)?;
        for _ in 0..1 + self.random.below(6) {
            self.learn()?;
            let large = self.mailbox().messages.len() > MESSAGES_MAX;
            match self.random.below(16) {
                _ if large => self.expunge(true)?,
                0..=4 => self.store()?,
                5 | 6 => self.expunge(false)?,
                7..=9 => self.transfer(true)?,
                10 => self.transfer(false)?,
                11..=14 => self.append()?,
                _ => self.make_and_delete()?,
            }
        }
        Ok(())
    }

    fn mailbox(&mut self) -> &mut Mailbox {
        self.user.mailboxes.entry(self.selected.clone()).or_default()
    }

    fn some_name(&mut self) -> String {
        // Most mail comes to INBOX.
        let at = self.random.below(NAMES.len() as u64 + 2) as usize;
        NAMES.get(at).unwrap_or(&NAMES[0]).to_string()
    }

    fn some_uids(&mut self) -> BTreeSet<u32> {
        let uids: Vec<u32> = self.mailbox().messages.keys().copied().collect();
        let chance = 1 + self.random.below(4);
        let mut some = BTreeSet::new();
        for uid in uids {
            if self.random.below(12) < chance {
                some.insert(uid);
            }
        }
        some
    }

    fn select(&mut self, name: &str) -> Result<(), End> {
        let selected = self.imap.select(name)?;
        name.clone_into(&mut self.selected);
        let mailbox = self.mailbox();
        if mailbox.uid_validity != 0 && mailbox.uid_validity != selected.uid_validity {
            return Err(End::Wrong(format!("UIDVALIDITY of {name} became {}", selected.uid_validity)));
        }
        mailbox.uid_validity = selected.uid_validity;
        Ok(())
    }

    /// Learns of new messages.
    fn learn(&mut self) -> Result<(), End> {
        let from = self.mailbox().uid_next.max(1);
        let new = self.imap.uid_fetch(&format!("{from}:*"), "BODY.PEEK[HEADER.FIELDS (X-TOKEN)]")?;
        for message in new {
            // `*` is the last message, also where it is below `from`.
            if message.uid >= from {
                let token = token_of(&message.body).ok_or_else(|| End::Wrong(format!("no token: {message:?}")))?;
                self.place(&self.selected.clone(), message.uid, Message { token, flags: message.flags })?;
                let mailbox = self.mailbox();
                mailbox.uid_next = mailbox.uid_next.max(message.uid + 1);
            }
        }
        Ok(())
    }

    /// Takes note of a message.
    fn place(&mut self, name: &str, uid: u32, message: Message) -> Result<(), End> {
        self.user.learned.insert(message.token);
        let mailbox = self.user.mailboxes.entry(name.to_owned()).or_default();
        if mailbox.expunged.contains(&uid) {
            return Err(End::Wrong(format!("UID {uid} of {name} came back as {message:?}")));
        }
        match mailbox.messages.get(&uid) {
            Some(known) if *known != message => {
                Err(End::Wrong(format!("UID {uid} of {name} is {message:?} and was {known:?}")))
            }
            _ => {
                mailbox.messages.insert(uid, message);
                Ok(())
            }
        }
    }

    /// Sends a command whose effect stands in `pending` until it is acknowledged.
    fn change(&mut self, pending: Pending, command: &str) -> Result<Done, End> {
        self.user.pending = Some(pending);
        let done = self.imap.command(command)?;
        if done.status != Status::Ok {
            return Err(End::Wrong(format!("{command}: {:?} {}", done.status, done.text)));
        }
        self.user.pending = None;
        self.round.count();
        Ok(done)
    }

    fn store(&mut self) -> Result<(), End> {
        let uids = self.some_uids();
        if uids.is_empty() {
            return Ok(());
        }
        let flags: BTreeSet<String> =
            FLAGS.iter().filter(|_| self.random.below(3) == 0).map(|flag| (*flag).to_owned()).collect();
        let list = flags.iter().cloned().collect::<Vec<_>>().join(" ");
        let command = format!("UID STORE {} FLAGS.SILENT ({list})", set_of(&uids));
        let mailbox = self.selected.clone();
        self.change(Pending::Store { mailbox, uids: uids.clone(), flags: flags.clone() }, &command)?;
        for message in self.mailbox().messages.iter_mut().filter(|(uid, _)| uids.contains(uid)) {
            message.1.flags.clone_from(&flags);
        }
        Ok(())
    }

    fn expunge(&mut self, most: bool) -> Result<(), End> {
        let mut uids = self.some_uids();
        if most {
            let keep = MESSAGES_MAX / 2;
            uids = self.mailbox().messages.keys().copied().rev().skip(keep).collect();
        }
        if uids.is_empty() {
            return Ok(());
        }
        let set = set_of(&uids);
        let deleted: BTreeSet<String> = BTreeSet::from(["\\deleted".to_owned()]);
        let store = Pending::Store { mailbox: self.selected.clone(), uids: uids.clone(), flags: deleted.clone() };
        self.change(store, &format!("UID STORE {set} FLAGS.SILENT (\\Deleted)"))?;
        for message in self.mailbox().messages.iter_mut().filter(|(uid, _)| uids.contains(uid)) {
            message.1.flags.clone_from(&deleted);
        }
        let expunge = Pending::Expunge { mailbox: self.selected.clone(), uids: uids.clone() };
        self.change(expunge, &format!("UID EXPUNGE {set}"))?;
        self.remove(&self.selected.clone(), &uids);
        Ok(())
    }

    fn remove(&mut self, name: &str, uids: &BTreeSet<u32>) {
        let mailbox = self.user.mailboxes.entry(name.to_owned()).or_default();
        mailbox.messages.retain(|uid, _| !uids.contains(uid));
        mailbox.expunged.extend(uids);
    }

    fn transfer(&mut self, is_move: bool) -> Result<(), End> {
        let (uids, to, from) = (self.some_uids(), self.some_name(), self.selected.clone());
        if uids.is_empty() || to == from {
            return Ok(());
        }
        let name = if is_move { "MOVE" } else { "COPY" };
        let pending = Pending::Transfer { from: from.clone(), to: to.clone(), uids: uids.clone(), is_move };
        let done = self.change(pending, &format!("UID {name} {} {to}", set_of(&uids)))?;
        let code = done.code("COPYUID").ok_or_else(|| End::Wrong(format!("{name} without COPYUID: {}", done.text)))?;
        let wrong = || End::Wrong(format!("COPYUID {code:?} for {uids:?}"));
        let [validity, sources, targets] = &code[..] else { return Err(wrong()) };
        let (sources, targets) = (numbers(sources).ok_or_else(wrong)?, numbers(targets).ok_or_else(wrong)?);
        let expected = self.user.mailboxes.get(&to).map_or(0, |mailbox| mailbox.uid_validity);
        let validity_is_right = expected == 0 || validity.parse() == Ok(expected);
        if sources != uids.iter().copied().collect::<Vec<_>>() || targets.len() != sources.len() || !validity_is_right {
            return Err(wrong());
        }
        for (source, target) in sources.into_iter().zip(targets) {
            let message = self.mailbox().messages[&source].clone();
            self.place(&to, target, message)?;
        }
        if is_move {
            self.remove(&from, &uids);
        }
        Ok(())
    }

    fn append(&mut self) -> Result<(), End> {
        let (token, to) = (self.round.token(), self.some_name());
        let flags: BTreeSet<String> =
            FLAGS.iter().filter(|_| self.random.below(4) == 0).map(|flag| (*flag).to_owned()).collect();
        self.user.pending = Some(Pending::Append { token });
        let list = flags.iter().cloned().collect::<Vec<_>>().join(" ");
        let done = self.imap.append(&to, &list, &message_of(token))?;
        self.user.pending = None;
        let uid = done.code("APPENDUID").and_then(|words| words.get(1)?.parse().ok());
        let uid = uid.ok_or_else(|| End::Wrong(format!("APPEND: {:?} {}", done.status, done.text)))?;
        self.round.count();
        self.place(&to, uid, Message { token, flags })
    }

    fn create(&mut self, name: &str) -> Result<(), End> {
        self.change(Pending::Create { mailbox: name.to_owned() }, &format!("CREATE {name}"))?;
        self.user.mailboxes.insert(name.to_owned(), Mailbox::default());
        Ok(())
    }

    /// A mailbox with a few messages comes, or the one that is there goes.
    fn make_and_delete(&mut self) -> Result<(), End> {
        const NAME: &str = "Temporary";
        if !self.user.mailboxes.contains_key(NAME) {
            self.create(NAME)?;
            let selected = mem::take(&mut self.selected);
            self.select(NAME)?;
            let deleted = self.user.deleted.get(NAME).copied().unwrap_or(0);
            if self.mailbox().uid_validity <= deleted {
                return Err(End::Wrong(format!("UIDVALIDITY {} again", self.mailbox().uid_validity)));
            }
            self.select(&selected)?;
            let uids = self.some_uids();
            if uids.is_empty() {
                return Ok(());
            }
            let pending = Pending::Transfer { from: selected, to: NAME.to_owned(), uids: uids.clone(), is_move: false };
            let done = self.change(pending, &format!("UID COPY {} {NAME}", set_of(&uids)))?;
            let targets = done.code("COPYUID").and_then(|code| numbers(code.get(2)?));
            let targets = targets.ok_or_else(|| End::Wrong(format!("COPY: {}", done.text)))?;
            for (source, target) in uids.into_iter().zip(targets) {
                let message = self.mailbox().messages[&source].clone();
                self.place(NAME, target, message)?;
            }
            return Ok(());
        }
        self.change(Pending::Delete { mailbox: NAME.to_owned() }, &format!("DELETE {NAME}"))?;
        if let Some(mailbox) = self.user.mailboxes.remove(NAME) {
            self.user.deleted.insert(NAME.to_owned(), mailbox.uid_validity);
        }
        Ok(())
    }
}

/// The numbers of a sequence set without `*`.
fn numbers(set: &str) -> Option<Vec<u32>> {
    let mut numbers = Vec::new();
    for run in set.split(',') {
        let (first, last) = run.split_once(':').unwrap_or((run, run));
        numbers.extend(first.parse::<u32>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

/// All of a user's mailboxes with every message read whole.
fn look(server: &Server, number: usize) -> Result<BTreeMap<String, Mailbox>, String> {
    let look = || -> io::Result<Result<BTreeMap<String, Mailbox>, String>> {
        let mut imap = Imap::connect(server.imap())?;
        imap.login(&user_name(number), PASSWORD)?;
        let mut seen = BTreeMap::new();
        for name in imap.list()? {
            let selected = imap.select(&name)?;
            let fetched = if selected.exists == 0 { Vec::new() } else { imap.uid_fetch("1:*", "BODY.PEEK[]")? };
            let mut mailbox =
                Mailbox { uid_validity: selected.uid_validity, uid_next: selected.uid_next, ..Mailbox::default() };
            if fetched.len() != selected.exists as usize {
                return Ok(Err(format!("{name}: {} messages, EXISTS {}", fetched.len(), selected.exists)));
            }
            for Fetched { uid, flags, body, .. } in fetched {
                let Some(token) = whole_token_of(&body) else {
                    return Ok(Err(format!("{name}, UID {uid}: these bytes were never sent")));
                };
                if uid >= selected.uid_next || mailbox.messages.insert(uid, Message { token, flags }).is_some() {
                    return Ok(Err(format!("{name}: UID {uid} twice or not below UIDNEXT {}", selected.uid_next)));
                }
            }
            seen.insert(name, mailbox);
        }
        imap.logout()?;
        Ok(Ok(seen))
    };
    look().map_err(|error| format!("reading after the start: {error}: {}", server.log()))?
}

/// Makes what was seen what is known.
fn adopt(user: &mut User, seen: BTreeMap<String, Mailbox>) -> Result<(), String> {
    user.pending = None;
    user.learned.clear();
    let mut known = mem::take(&mut user.mailboxes);
    for (name, mut mailbox) in seen {
        let old = known.remove(&name).filter(|old| old.uid_validity == mailbox.uid_validity).unwrap_or_default();
        mailbox.expunged = old.expunged;
        let gone = old.messages.keys().filter(|uid| !mailbox.messages.contains_key(uid));
        mailbox.expunged.extend(gone);
        user.mailboxes.insert(name, mailbox);
    }
    // What is not there any more was being deleted.
    for (name, mailbox) in known {
        user.deleted.insert(name, mailbox.uid_validity);
    }
    Ok(())
}

/// Compares what is there with what was acknowledged, and with what was on its way.
fn verify(
    user: &User,
    seen: &BTreeMap<String, Mailbox>,
    delivered: &[Delivered],
    outcome: &mut Outcome,
) -> Result<(), String> {
    let mut expected = user.mailboxes.clone();
    let mut decided = |done: bool| if done { outcome.undecided_done += 1 } else { outcome.undecided_not_done += 1 };

    // What was on its way has happened as a whole or not at all.
    match &user.pending {
        None | Some(Pending::Append { .. }) => {}
        Some(Pending::Create { mailbox }) => {
            decided(seen.contains_key(mailbox));
            if seen.contains_key(mailbox) {
                expected.insert(mailbox.clone(), Mailbox::default());
            }
        }
        Some(Pending::Delete { mailbox }) => {
            decided(!seen.contains_key(mailbox));
            if !seen.contains_key(mailbox) {
                expected.remove(mailbox);
            }
        }
        Some(Pending::Store { mailbox, uids, flags }) => {
            let now = seen.get(mailbox).ok_or("a mailbox is lost")?;
            let change = |message: &mut Message| message.flags.clone_from(flags);
            let mut changed = expected[mailbox].messages.clone();
            changed.iter_mut().filter(|(uid, _)| uids.contains(uid)).for_each(|(_, message)| change(message));
            let done = uids.iter().all(|uid| now.messages.get(uid) == changed.get(uid));
            decided(done);
            if done {
                expected.entry(mailbox.clone()).or_default().messages = changed;
            }
        }
        Some(Pending::Expunge { mailbox, uids }) => {
            let now = seen.get(mailbox).ok_or("a mailbox is lost")?;
            let done = uids.iter().all(|uid| !now.messages.contains_key(uid));
            decided(done);
            if done {
                expected.entry(mailbox.clone()).or_default().messages.retain(|uid, _| !uids.contains(uid));
            }
        }
        Some(Pending::Transfer { from, to, uids, is_move }) => {
            let (source, target) = (&expected[from], &expected[to]);
            let moved: Vec<Message> = uids.iter().map(|uid| source.messages[uid].clone()).collect();
            // They came in one step, with UIDs one after another.
            let now = seen.get(to).ok_or("a mailbox is lost")?;
            let floor = target.messages.keys().last().map_or(0, |uid| uid + 1).max(target.uid_next);
            let new: Vec<(u32, Message)> = now.messages.range(floor..).map(|(uid, m)| (*uid, m.clone())).collect();
            let at = new.windows(moved.len()).find(|window| window.iter().map(|(_, message)| message).eq(&moved));
            decided(at.is_some());
            if let Some(window) = at {
                let window = window.to_vec();
                let target = expected.entry(to.clone()).or_default();
                target.messages.extend(window);
                if *is_move {
                    expected.entry(from.clone()).or_default().messages.retain(|uid, _| !uids.contains(uid));
                }
            }
        }
    }

    let names = |mailboxes: &BTreeMap<String, Mailbox>| mailboxes.keys().cloned().collect::<Vec<_>>();
    if names(&expected) != names(seen) {
        return Err(format!("mailboxes {:?} where {:?} were left", names(seen), names(&expected)));
    }
    // Beside what is known, deliveries that were not seen before the end: acknowledged ones must be there.
    let mine = |list: &[(usize, Token)]| -> Vec<Token> {
        let mine = list.iter().filter(|(owner, token)| *owner == user.number && !user.learned.contains(token));
        mine.map(|(_, token)| *token).collect()
    };
    let mut must: BTreeSet<Token> = delivered.iter().flat_map(|delivered| mine(&delivered.acknowledged)).collect();
    let mut may: BTreeSet<Token> = delivered.iter().flat_map(|delivered| mine(&delivered.undecided)).collect();
    if let Some(Pending::Append { token }) = user.pending {
        may.insert(token);
    }
    let on_their_way = may.len() as u64;
    for (name, mailbox) in seen {
        let before = &expected[name];
        if before.uid_validity != 0 && before.uid_validity != mailbox.uid_validity {
            return Err(format!("{name}: UIDVALIDITY {} became {}", before.uid_validity, mailbox.uid_validity));
        }
        if mailbox.uid_next < before.uid_next {
            return Err(format!("{name}: UIDNEXT {} became {}", before.uid_next, mailbox.uid_next));
        }
        for (uid, message) in &before.messages {
            match mailbox.messages.get(uid) {
                Some(now) if now == message => {}
                Some(now) => {
                    return Err(format!(
                        "{name}, UID {uid}: {now:?} where {message:?} was left; pending {:?}",
                        user.pending
                    ));
                }
                None => return Err(format!("{name}, UID {uid}: {message:?} is lost; pending {:?}", user.pending)),
            }
        }
        for (uid, message) in &mailbox.messages {
            if before.messages.contains_key(uid) {
                continue;
            }
            if before.expunged.contains(uid) || *uid < before.uid_next {
                return Err(format!("{name}, UID {uid}: {message:?} came back, or has an old UID"));
            }
            if !must.remove(&message.token) && !may.remove(&message.token) {
                return Err(format!("{name}, UID {uid}: {message:?} is there twice or was never sent"));
            }
        }
    }
    if let Some(token) = must.first() {
        return Err(format!("token {token} was acknowledged and is lost, and {} more", must.len() - 1));
    }
    outcome.undecided_done += on_their_way - may.len() as u64;
    outcome.undecided_not_done += may.len() as u64;
    Ok(())
}
