//! IMAP sessions.
//!
//! A session takes one command after another: what is pipelined keeps its order, and nothing of the mailbox moves for the
//! client but where a response says so (RFC 3501, 5.2 and 7.4.1). It runs on the worker that owns the account's shard; at
//! login it moves there.
//!
//! **A session that waits is small.** There may be a hundred thousand of them. So the receive buffer goes back, what a
//! command needs lives in a future of its own that is boxed while it runs, and the view of the mailbox is runs of UIDs.

mod fetch;
mod login;
mod mailboxes;
mod messages;
mod search;
mod select;

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::error::{EngineError, Refusal};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{ModSeq, Uid};
use posthaste_engine::index::MailboxIndex;
use posthaste_engine::io::Runtime;
use posthaste_engine::join::first_of;
use posthaste_imap::command::{self, Command, ParseOptions, Tagged};
use posthaste_imap::frame::{Event, Expect, Frame, Framer, Limits};
use posthaste_imap::response::{
    Code, FetchWriter, Status, write_expunge, write_numbered, write_tagged, write_untagged,
};
use posthaste_imap::session::State;
use posthaste_imap::types::SequenceSet;
use roaring::RoaringBitmap;

use crate::connection::{Connection, End, Moving};
use crate::limits;
use crate::node::{Context, Reservation, Shard};
use crate::usage::metered;
use select::Selected;

/// Starts the session of a new connection.
pub fn start(context: &Rc<Context>, connection: Rc<Connection>) {
    let mut session = Session::new(Rc::clone(context), connection);
    session.greet();
    context.io.spawn(metered(context, session.run()));
}

/// Who has logged in.
struct User {
    account: Arc<AccountRecord>,
    shard: Shard,
}

/// A line that the client owes.
enum Owed {
    /// DONE, to the IDLE of this tag.
    Done(Box<str>),
    /// The response to a SASL challenge.
    Sasl(Box<str>),
}

struct Session {
    context: Rc<Context>,
    connection: Rc<Connection>,
    framer: Framer,
    input: Vec<u8>,
    /// How much of the input has been taken.
    taken: usize,
    output: Vec<u8>,
    user: Option<Box<User>>,
    selected: Option<Box<Selected>>,
    owed: Option<Owed>,
    /// Room for large literals that are coming in, and since when they are.
    reservation: Option<Reservation>,
    transfer_begun: Duration,
    /// CONDSTORE is enabled (RFC 7162, 3.1).
    condstore: bool,
    bad_commands: u8,
    login_failures: u8,
}

const BUSY: &str = "Too many messages in progress, try again later";

/// Why a session ends here.
enum Stop {
    End(End),
    /// All has been said, but for the answer to the last command.
    Over(Option<Answer>),
    /// The account's shard belongs to another worker.
    Move(Arc<AccountRecord>),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

/// How a command ends.
struct Answer {
    status: Status,
    code: Option<Code<'static>>,
    text: Cow<'static, str>,
}

impl Answer {
    fn ok(text: &'static str) -> Self {
        Self { status: Status::Ok, code: None, text: text.into() }
    }

    fn no(code: Option<Code<'static>>, text: &'static str) -> Self {
        Self { status: Status::No, code, text: text.into() }
    }

    fn bad(text: &'static str) -> Self {
        Self { status: Status::Bad, code: None, text: text.into() }
    }

    fn with(self, code: Code<'static>) -> Self {
        Self { code: Some(code), ..self }
    }
}

/// What a command that did not succeed ends with.
enum Failure {
    Answer(Answer),
    Stop(Stop),
}

impl From<Answer> for Failure {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

impl From<End> for Failure {
    fn from(end: End) -> Self {
        Self::Stop(end.into())
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::Answer(refusal(&error))
    }
}

type Outcome = Result<Answer, Failure>;

/// The answer to what the store did not do. What is damaged or broken is in the log, and named there.
fn refusal(error: &EngineError) -> Answer {
    match error {
        EngineError::Refused(refusal) => {
            let code = match refusal {
                Refusal::NoSuchMailbox | Refusal::NoSuchAccount | Refusal::NoSuchMessage => Code::NonExistent,
                Refusal::MailboxExists | Refusal::AccountExists => Code::AlreadyExists,
                Refusal::InboxStays | Refusal::BadName(_) | Refusal::IntoItself => Code::Cannot,
                Refusal::TooManyKeywords(_)
                | Refusal::TooManyMessages { .. }
                | Refusal::TooManySubscriptions(_)
                | Refusal::TooManyMailboxes(_)
                | Refusal::UidsExhausted => Code::Limit,
                Refusal::MailboxFull(_) => Code::OverQuota,
                Refusal::TooLarge { .. } => Code::TooBig,
            };
            Answer { status: Status::No, code: Some(code), text: refusal.to_string().into() }
        }
        EngineError::Full => Answer::no(Some(Code::OverQuota), "The store is full: expunge, or try again later"),
        EngineError::Damaged(damage) => {
            tracing::error!(%damage, "a session met damage");
            damaged()
        }
        error => {
            tracing::error!(%error, "a session met an error of the store");
            Answer::no(Some(Code::Unavailable), "The store cannot do this now, try again later")
        }
    }
}

fn damaged() -> Answer {
    Answer::no(Some(Code::Corruption), "This is damaged in the store; the server's log names it")
}

/// Those of `mine`, UIDs that a session knows of, that nobody has expunged.
fn those_left(index: &MailboxIndex, mine: &RoaringBitmap) -> RoaringBitmap {
    const FEW: u64 = 1024;
    if mine.len() <= FEW {
        return mine.iter().filter(|&uid| index.contains(Uid(uid))).collect();
    }
    // Mostly it is all of them. New messages have higher UIDs, so with the same last one as many are the same.
    let len = index.messages.len();
    let last = len.checked_sub(1).map(|at| index.messages.get(at).uid.0);
    if len as u64 == mine.len() && last == mine.max() { mine.clone() } else { index.uids().0 & mine }
}

impl Session {
    fn new(context: Rc<Context>, connection: Rc<Connection>) -> Self {
        Self {
            context,
            connection,
            framer: Framer::new(Limits::not_authenticated()),
            input: Vec::new(),
            taken: 0,
            output: Vec::new(),
            user: None,
            selected: None,
            owed: None,
            reservation: None,
            transfer_begun: Duration::ZERO,
            condstore: false,
            bad_commands: 0,
            login_failures: 0,
        }
    }

    /// Goes on with a session that has logged in on another worker.
    fn resume(context: Rc<Context>, moving: Moving, account: Arc<AccountRecord>, input: Vec<u8>) {
        let Ok(connection) = Connection::arrive(&context, moving) else { return };
        let (of_task, io) = (Rc::clone(&context), context.io.clone());
        let mut session = Self::new(context, connection);
        session.input = input;
        io.spawn(metered(&of_task, async move {
            if session.enter(account) {
                session.run().await;
            }
        }));
    }

    /// Makes this the session of an account. False if its shard is not here.
    fn enter(&mut self, account: Arc<AccountRecord>) -> bool {
        let Some(shard) = self.context.worker.local(account.shard) else { return false };
        self.context.usages.enter(&account);
        self.user = Some(Box::new(User { account, shard }));
        self.framer.set_limits(Limits::authenticated(self.context.node.config.limits.message_bytes));
        true
    }

    fn state(&self) -> State {
        match (&self.user, &self.selected) {
            (None, _) => State::NotAuthenticated,
            (Some(_), None) => State::Authenticated,
            (Some(_), Some(_)) => State::Selected,
        }
    }

    async fn run(mut self) {
        let stop = loop {
            if let Err(stop) = self.step().await {
                break stop;
            }
        };
        match stop {
            Stop::End(End::Closed) => return,
            Stop::End(End::TimedOut) => self.bye(Some(&Code::Unavailable), "Idle for too long"),
            Stop::End(End::Stopping) => self.bye(Some(&Code::Unavailable), "Server is stopping"),
            Stop::Over(_) => {}
            Stop::Move(account) => return Box::pin(self.depart(account)).await,
        }
        // What the session held is not needed for the goodbye.
        let Self { connection, output, .. } = self;
        Box::pin(connection.finish(output)).await;
    }

    /// Takes the next thing out of the input, or waits for more.
    async fn step(&mut self) -> Result<(), Stop> {
        let expect = if self.owed.is_some() { Expect::Line } else { Expect::Command };
        let (taken, event) = self.framer.step(&self.input[self.taken..], expect, &mut self.output);
        self.taken += taken;
        match event {
            Event::NeedInput => self.receive().await,
            // In a future of its own, so that waiting sessions do not have room for the largest command.
            Event::Command(frame) => Box::pin(self.take_frame(frame)).await,
            Event::Literal { command_bytes } => {
                // Nobody takes room by announcing: it is taken as the octets come.
                let node = &self.context.node;
                let held = self.reservation.as_ref().map_or(0, Reservation::bytes);
                if node.has_room(command_bytes.saturating_sub(held)) {
                    if self.reservation.is_none() {
                        self.reservation = node.reserve(0);
                        self.transfer_begun = self.context.io.now();
                    }
                    self.framer.accept_literal(&mut self.output);
                    return Ok(());
                }
                self.reservation = None;
                let event = self.framer.refuse_literal(Some(Code::Unavailable), BUSY);
                self.say_refusal(event)
            }
            Event::Refused(mut refusal) => {
                // A line that is no line ends the command that waited for one: the next is a command again.
                if let Some(Owed::Done(tag) | Owed::Sasl(tag)) = self.owed.take() {
                    refusal.tag = Some(tag.into_string());
                }
                refusal.write(&mut self.output);
                self.reservation = None;
                self.count_bad(refusal.status)
            }
            Event::Fatal(refusal) => {
                refusal.write(&mut self.output);
                Err(Stop::Over(None))
            }
            Event::AnswerOwed => unreachable!("literals are answered at once"),
        }
    }

    /// Says that a command, or a part of it, is not taken.
    fn say_refusal(&mut self, event: Event) -> Result<(), Stop> {
        match event {
            Event::Fatal(refusal) => {
                refusal.write(&mut self.output);
                Err(Stop::Over(None))
            }
            Event::Refused(refusal) => {
                refusal.write(&mut self.output);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes the room that the literals of a command need by now.
    fn take_room(&mut self) -> Result<(), Stop> {
        let Some(reservation) = &mut self.reservation else { return Ok(()) };
        if self.context.io.now().saturating_sub(self.transfer_begun) > limits::TRANSFER {
            return Err(Stop::End(End::TimedOut));
        }
        if reservation.grow_to(self.framer.held_bytes() as u64) {
            return Ok(());
        }
        self.reservation = None;
        let event = self.framer.abandon_literal(Some(Code::Unavailable), BUSY);
        self.say_refusal(event)
    }

    /// Sends what there is to say, and receives more.
    async fn receive(&mut self) -> Result<(), Stop> {
        self.input.clear();
        self.taken = 0;
        self.take_room()?;
        self.flush().await?;
        let timeout = self.timeout()?;
        let at_rest = self.framer.is_idle();
        if at_rest && matches!(self.owed, Some(Owed::Done(_))) {
            self.context.give_buffer(std::mem::take(&mut self.input));
            self.output = Vec::new();
            return self.idle(timeout).await;
        }
        if at_rest {
            self.output.shrink_to(0);
        }
        Ok(self.connection.input(&mut self.input, timeout, at_rest).await?)
    }

    /// Tells of changes while the client idles (RFC 2177), until it says something, and receives that.
    async fn idle(&mut self, timeout: Duration) -> Result<(), Stop> {
        let begun = self.context.io.now();
        loop {
            // What happens in the mailbox is no word of the client's.
            let timeout = timeout.saturating_sub(self.context.io.now() - begun);
            if timeout.is_zero() {
                return Err(Stop::End(End::TimedOut));
            }
            let Some(selected) = &self.selected else {
                return Ok(self.connection.input(&mut self.input, timeout, true).await?);
            };
            let mut readable = Ok(());
            let input = async { readable = self.connection.readable(timeout, true).await };
            if first_of(input, selected.view.changed()).await {
                readable?;
                if self.connection.input_once(&mut self.input, timeout, true).await? {
                    return Ok(());
                }
                self.context.give_buffer(std::mem::take(&mut self.input));
                continue;
            }
            Box::pin(self.tell_changes()).await?;
            self.output = Vec::new();
        }
    }

    async fn tell_changes(&mut self) -> Result<(), Stop> {
        match self.sync(true).await {
            Ok(()) => {}
            Err(Failure::Stop(stop)) => return Err(stop),
            Err(Failure::Answer(answer)) => {
                self.bye(answer.code.as_ref(), &answer.text);
                return Err(Stop::Over(None));
            }
        }
        Ok(self.flush().await?)
    }

    fn timeout(&self) -> Result<Duration, End> {
        let config = &self.context.node.config.imap;
        if self.user.is_some() {
            return Ok(Duration::from_secs(config.idle_timeout_s));
        }
        self.connection.time_left(Duration::from_secs(config.login_timeout_s))
    }

    async fn flush(&mut self) -> Result<(), End> {
        if self.output.is_empty() {
            return Ok(());
        }
        if self.user.is_some() {
            self.connection.send(&mut self.output).await?;
        } else {
            let timeout = self.timeout()?;
            self.connection.send_by(&mut self.output, timeout).await?;
        }
        if self.output.capacity() > 2 * limits::OUTPUT_BYTES {
            self.output = Vec::new();
        }
        Ok(())
    }

    /// Sends the output once it is worth it. To be called after every response that may be one of many.
    async fn flush_if_full(&mut self) -> Result<(), End> {
        if self.output.len() >= limits::OUTPUT_BYTES { self.flush().await } else { Ok(()) }
    }

    fn bye(&mut self, code: Option<&Code<'_>>, text: &str) {
        write_untagged(&mut self.output, Status::Bye, code, text);
    }

    fn count_bad(&mut self, status: Status) -> Result<(), Stop> {
        if status == Status::Bad {
            self.bad_commands = self.bad_commands.saturating_add(1);
            if self.bad_commands >= limits::BAD_COMMANDS_MAX {
                self.bye(None, "Too many bad commands");
                return Err(Stop::Over(None));
            }
        }
        Ok(())
    }

    async fn take_frame(&mut self, frame: Frame) -> Result<(), Stop> {
        self.context.usages.turn_of_command(&self.context.io).await;
        // Given back however the command ends.
        let _room = self.reservation.take();
        let (tag, outcome) = match self.owed.take() {
            Some(Owed::Done(tag)) => {
                let done = frame.text.eq_ignore_ascii_case(b"DONE");
                let outcome = if done { Ok(Answer::ok("Idled")) } else { Err(Answer::bad("DONE expected").into()) };
                (tag.into_string(), outcome)
            }
            Some(Owed::Sasl(tag)) => {
                let outcome = self.take_sasl_response(&frame.text).await;
                (tag.into_string(), outcome)
            }
            None => match command::parse(frame, ParseOptions::default()) {
                Ok(Tagged { tag, command: Command::StartTls }) => return self.start_tls(&tag).await,
                Ok(Tagged { tag, command }) => {
                    let outcome = self.take_command(&tag, command).await;
                    (tag, outcome)
                }
                Err(refusal) => {
                    refusal.write(&mut self.output);
                    return self.count_bad(refusal.status);
                }
            },
        };
        match outcome {
            // The answer comes when the client has sent what it owes.
            Ok(_) if self.owed.is_some() => Ok(()),
            Ok(answer) | Err(Failure::Answer(answer)) => {
                self.answer(&tag, &answer);
                self.count_bad(answer.status)?;
                Ok(self.flush_if_full().await?)
            }
            Err(Failure::Stop(stop)) => {
                match &stop {
                    Stop::Over(Some(answer)) => self.answer(&tag, answer),
                    Stop::Move(_) => self.answer(&tag, &self.logged_in()),
                    _ => {}
                }
                Err(stop)
            }
        }
    }

    fn answer(&mut self, tag: &str, answer: &Answer) {
        write_tagged(&mut self.output, tag, answer.status, answer.code.as_ref(), &answer.text);
    }

    async fn take_command(&mut self, tag: &str, command: Command) -> Outcome {
        if let Err(text) = command.check_state(self.state()) {
            return Ok(Answer::bad(text));
        }
        let allows_expunge = command.allows_expunge();
        let outcome = self.dispatch(tag, command).await;
        let stops = matches!(outcome, Err(Failure::Stop(_)));
        if !stops && self.owed.is_none() && self.selected.is_some() {
            self.sync(allows_expunge).await?;
        }
        outcome
    }

    async fn dispatch(&mut self, tag: &str, command: Command) -> Outcome {
        match command {
            Command::Capability => {
                self.write_capabilities();
                Ok(Answer::ok("Capabilities listed"))
            }
            Command::Noop | Command::Check => Ok(Answer::ok("Nothing to do")),
            Command::Logout => {
                self.bye(None, "Logging out");
                Err(Failure::Stop(Stop::Over(Some(Answer::ok("Logged out")))))
            }
            Command::Id(_) => Ok(self.identify()),
            Command::StartTls => unreachable!("it has no other answer than its own"),
            Command::Login { user, password } => self.log_in(&user, &user, password).await,
            Command::Authenticate { mechanism, initial_response } => {
                self.authenticate(tag, &mechanism, initial_response).await
            }
            Command::Enable(names) => Ok(self.enable(&names)),
            Command::Select(select) => self.select(select).await,
            Command::Create { mailbox, special_use } => self.create(&mailbox, &special_use).await,
            Command::Delete(mailbox) => self.delete(&mailbox).await,
            Command::Rename { from, to } => self.rename(&from, &to).await,
            Command::Subscribe(mailbox) => self.subscribe(&mailbox, true).await,
            Command::Unsubscribe(mailbox) => self.subscribe(&mailbox, false).await,
            Command::List(list) => self.list(list).await,
            Command::Lsub { reference, pattern } => self.list_subscribed(&reference, &pattern).await,
            Command::Namespace => Ok(self.namespace()),
            Command::Status { mailbox, attributes } => self.status(&mailbox, &attributes).await,
            Command::Append(append) => self.append(append).await,
            Command::Idle => {
                self.sync(true).await?;
                self.owed = Some(Owed::Done(tag.into()));
                posthaste_imap::response::write_continuation(&mut self.output, "Idling");
                Ok(Answer::ok(""))
            }
            Command::Close => self.close().await,
            Command::Unselect => {
                self.selected = None;
                Ok(Answer::ok("Unselected"))
            }
            Command::Expunge => self.expunge(None).await,
            Command::UidExpunge(set) => {
                let uids = self.resolve(&set, true)?;
                self.expunge(Some(uids)).await
            }
            Command::Search(search) => self.search(tag, search).await,
            Command::Fetch(fetch) => self.fetch(fetch).await,
            Command::Store(store) => self.store(store).await,
            Command::Copy { uid, set, mailbox } => self.copy(uid, &set, &mailbox).await,
            Command::Move { uid, set, mailbox } => self.move_messages(uid, &set, &mailbox).await,
        }
    }

    fn user(&self) -> Result<&User, Failure> {
        self.user.as_deref().ok_or_else(|| Answer::bad("Log in first").into())
    }

    fn shard(&self) -> Result<Shard, Failure> {
        Ok(self.user()?.shard.clone())
    }

    fn selected(&self) -> Result<&Selected, Failure> {
        self.selected.as_deref().ok_or_else(|| Answer::bad("No mailbox selected").into())
    }

    fn selected_mut(&mut self) -> Result<&mut Selected, Failure> {
        self.selected.as_deref_mut().ok_or_else(|| Answer::bad("No mailbox selected").into())
    }

    /// The selected mailbox, if it may be changed.
    fn writable(&self) -> Result<&Selected, Failure> {
        let selected = self.selected()?;
        if selected.read_only {
            return Err(Answer::no(Some(Code::ReadOnly), "The mailbox was opened with EXAMINE").into());
        }
        Ok(selected)
    }

    /// The UIDs that a set means to this client. Of a set of UIDs, those that exist.
    fn resolve(&self, set: &SequenceSet, uid: bool) -> Result<UidSet, Failure> {
        let view = &self.selected()?.view;
        let saved = || Answer::bad("There is no saved result");
        let mut wanted = UidSet::default();
        let mut want = |first, last| {
            view.known_between(first, last).for_each(|(first, last)| _ = wanted.0.insert_range(first.0..=last.0));
        };
        if uid {
            let runs = set.resolve_uids(view.last_uid().map_or(0, |uid| uid.0)).ok_or_else(saved)?;
            runs.iter().for_each(|&(first, last)| want(Uid(first), Uid(last)));
        } else {
            let runs = set.resolve_sequence_numbers(view.exists()).ok_or_else(saved)?;
            let runs = runs.map_err(|_| Answer::bad("No message has that sequence number"))?;
            for (first, last) in runs {
                if let (Some(first), Some(last)) = (view.uid_of(first), view.uid_of(last)) {
                    want(first, last);
                }
            }
        }
        Ok(wanted)
    }

    /// The client shows that it knows of mod-sequences. The first time, it is told the highest of the selected mailbox (RFC 7162, 3.1).
    fn enable_condstore(&mut self) {
        if !std::mem::replace(&mut self.condstore, true)
            && let Some(selected) = &self.selected
        {
            let code = Code::HighestModSeq(selected.view.highest_modseq().0);
            write_untagged(&mut self.output, Status::Ok, Some(&code), "The highest mod-sequence");
        }
    }

    /// Brings the client's view up to date: EXPUNGE, FETCH, EXISTS, RECENT.
    async fn sync(&mut self, allow_expunge: bool) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref_mut() else { return Ok(()) };
        let changes = selected.view.sync(allow_expunge).await?;
        if changes.gone {
            // Nothing but a goodbye can follow.
            self.selected = None;
            self.bye(Some(&Code::NonExistent), "The mailbox has been deleted");
            return Err(Failure::Stop(Stop::Over(None)));
        }
        for sequence in changes.expunged {
            write_expunge(&mut self.output, sequence);
            self.flush_if_full().await?;
        }
        for (sequence, uid, flags, modseq) in changes.flags {
            self.learn_keywords(flags).await?;
            self.write_flags_of(sequence, uid, flags, modseq)?;
            self.flush_if_full().await?;
        }
        if let Some(exists) = changes.exists {
            write_numbered(&mut self.output, exists, "EXISTS");
        }
        if let Some(recent) = changes.recent {
            write_numbered(&mut self.output, recent, "RECENT");
        }
        Ok(())
    }

    /// `* n FETCH (UID u FLAGS (...))`, with the mod-sequence where the client knows of them.
    fn write_flags_of(&mut self, sequence: u32, uid: Uid, flags: Flags, modseq: ModSeq) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref() else { return Ok(()) };
        let text = selected.flags_text(uid, flags);
        let mut fetch = FetchWriter::new(&mut self.output, sequence);
        fetch.uid(uid.0);
        fetch.flags(&text);
        if self.condstore {
            fetch.mod_seq(modseq.0);
        }
        fetch.finish();
        Ok(())
    }

    /// Moves to the worker that owns the account's shard, with the bytes that the client has sent ahead.
    async fn depart(mut self, account: Arc<AccountRecord>) {
        if self.flush().await.is_err() {
            return;
        }
        let input = self.input.split_off(self.taken);
        let Self { context, connection, .. } = self;
        let Some(moving) = connection.depart().await else { return };
        let cluster = Arc::clone(&context.node.cluster);
        let owner = cluster.owner(account.shard);
        let job = move |_: &crate::node::Worker| {
            if let Some(context) = Context::current() {
                Session::resume(context, moving, account, input);
            }
        };
        cluster.send(owner, Box::new(job));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size_of_future<F: Future>(_: impl Fn(Session) -> F) -> usize {
        size_of::<F>()
    }

    /// A hundred thousand of these may wait at a time.
    #[test]
    fn a_waiting_session_is_small() {
        let size = size_of_future(Session::run);
        println!("the future of a session has {size} bytes, of which the session {}", size_of::<Session>());
        assert!(size <= 1536, "{size}");
    }
}
