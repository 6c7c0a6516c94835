//! The state of one connection: what may come next, and what the caller has to decide.

use std::fmt;
use std::sync::Arc;

use roaring::RoaringBitmap;

use crate::command::{self, COMMAND_LINE_BYTES_MAX, Command, Mechanism, SASL_LINE_BYTES_MAX};
use crate::line::{Lines, Taken};
use crate::maildrop::{Maildrop, Message};
use crate::reply::{Refusal, write_number, write_ok};
use crate::stuffing::{BodyLines, Stuffer};

/// Replies are gathered up to this; then they are to be sent before there are more.
const OUTPUT_BYTES: usize = 64 * 1024;

const NO_SUCH_MESSAGE: Refusal = Refusal::new("There is no such message");

/// What all sessions of a listener share.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our name in the greeting: a domain.
    pub host_name: String,
    /// Bad commands that a connection may send before it is closed.
    pub errors_max: u32,
}

impl Config {
    pub fn new(host_name: impl Into<String>) -> Self {
        Self { host_name: host_name.into(), errors_max: 50 }
    }
}

/// What a connection may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Security {
    /// Passwords may be sent: nobody else can read them, or the operator does not mind.
    pub passwords: bool,
    /// TLS can be begun.
    pub starttls: bool,
}

/// A password. It is not shown by mistake.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret")
    }
}

/// What a client logs in with.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    Password {
        user: String,
        password: Secret,
    },
    /// The response of the mechanism PLAIN (RFC 4616), in base64. Not validated.
    SaslPlain(Vec<u8>),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Credentials")
    }
}

/// A message that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retrieve {
    pub uid: u32,
    /// How many lines of its body; `None` is all of the message.
    pub lines: Option<u32>,
}

/// What has to be done at QUIT, by UIDs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Update {
    pub deleted: RoaringBitmap,
    /// Those that were sent whole and are not deleted.
    pub retrieved: RoaringBitmap,
}

/// What [`Session::step`] stopped for.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// All input was taken. Send the output, then read more.
    NeedInput,
    /// Much output has come together. Send it, then go on.
    Flush,
    /// Answer with [`Session::open`] or [`Session::refuse`].
    LogIn(Credentials),
    /// Answer with [`Session::start_tls`] or [`Session::refuse`].
    StartTls,
    /// Answer with [`Session::begin_message`] and what follows it, or [`Session::refuse`].
    Retrieve(Retrieve),
    /// Answer with [`Session::updated`]. The maildrop has been given back: its lock can be released before the answer is sent.
    Update(Update),
    /// The caller has not answered the last event.
    AnswerOwed,
    /// Send the output and close the connection.
    Close,
}

#[derive(Debug)]
enum Phase {
    Command,
    /// The client owes the response of PLAIN.
    Sasl,
    LogInAsked,
    TlsAsked,
    /// TLS is being begun.
    Tls,
    MessageAsked(Wanted),
    Message(Wanted, Transfer),
    /// A list from this number on.
    Listing(Listing, u32),
    UpdateAsked,
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    Sizes,
    UniqueIds,
}

/// A message, and how much of its body is wanted.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    message: Message,
    lines: Option<u32>,
}

/// A message on its way.
#[derive(Debug)]
struct Transfer {
    stuffer: Stuffer,
    /// `None`: all of it.
    lines: Option<BodyLines>,
    header: HeaderEnd,
}

/// What the header written so far ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeaderEnd {
    /// In a line; whether a CR is all that it has, or nothing.
    Line { empty: bool },
    /// With an empty line.
    EmptyLine,
}

impl Transfer {
    fn new(lines: Option<u32>) -> Self {
        Self { stuffer: Stuffer::new(), lines: lines.map(BodyLines::new), header: HeaderEnd::Line { empty: true } }
    }

    fn write_header(&mut self, piece: &[u8], output: &mut Vec<u8>) {
        self.stuffer.write(piece, output);
        if self.lines.is_some() {
            for &octet in piece {
                self.header = match (octet, self.header) {
                    (b'\n', HeaderEnd::Line { empty: true }) => HeaderEnd::EmptyLine,
                    (b'\n', _) | (b'\r', HeaderEnd::Line { empty: true } | HeaderEnd::EmptyLine) => {
                        HeaderEnd::Line { empty: true }
                    }
                    _ => HeaderEnd::Line { empty: false },
                };
            }
        }
    }

    fn write_body(&mut self, piece: &[u8], output: &mut Vec<u8>) -> bool {
        let Some(lines) = &mut self.lines else {
            self.stuffer.write(piece, output);
            return true;
        };
        let wanted = lines.take(piece);
        self.stuffer.write(wanted, output);
        if !wanted.is_empty() {
            self.header = HeaderEnd::EmptyLine;
        }
        !lines.is_done()
    }

    /// A header without a body may lack the empty line, which is the client's to expect after TOP (RFC 1939, 7).
    fn finish(mut self, output: &mut Vec<u8>) {
        if self.lines.is_some() && self.header != HeaderEnd::EmptyLine {
            if self.header == (HeaderEnd::Line { empty: false }) {
                self.stuffer.write(b"\r\n", output);
            }
            self.stuffer.write(b"\r\n", output);
        }
        self.stuffer.finish(output);
    }
}

/// The maildrop, and what has been done with it.
#[derive(Debug)]
struct Open {
    maildrop: Maildrop,
    /// By UID.
    deleted: RoaringBitmap,
    deleted_octets: u64,
    retrieved: RoaringBitmap,
}

impl Open {
    /// The message of a number, unless it is deleted (RFC 1939, 5, DELE).
    fn get(&self, number: u32) -> Option<Message> {
        self.maildrop.get(number).filter(|message| !self.deleted.contains(message.uid))
    }

    fn count(&self) -> u64 {
        u64::from(self.maildrop.count()) - self.deleted.len()
    }

    fn octets(&self) -> u64 {
        self.maildrop.octets() - self.deleted_octets
    }
}

/// One connection.
///
/// ```text
/// loop { step(input, output) -> consumed, event;  answer the event;  on NeedInput: send output, read input }
/// ```
///
/// Input that was not consumed is given again at the next step. Where the caller needs time to answer it may send the
/// output first; replies stay in order.
#[derive(Debug)]
pub struct Session {
    config: Arc<Config>,
    security: Security,
    phase: Phase,
    lines: Lines,
    /// Given by USER.
    user: Option<Box<str>>,
    open: Option<Box<Open>>,
    errors: u32,
}

impl Session {
    /// Begins a session and appends its greeting. It has no timestamp in angle brackets, which would announce APOP.
    pub fn new(config: Arc<Config>, security: Security, output: &mut Vec<u8>) -> Self {
        write_ok(output, &format!("{} POP3 server ready", config.host_name));
        Self { config, security, phase: Phase::Command, lines: Lines::default(), user: None, open: None, errors: 0 }
    }

    /// Takes input until the caller has to do something. Gives how many bytes were taken, and what to do.
    pub fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Event) {
        let mut at = 0;
        loop {
            if output.len() >= OUTPUT_BYTES && !matches!(self.phase, Phase::Closed) {
                return (at, Event::Flush);
            }
            let event = match self.phase {
                Phase::Command | Phase::Sasl => {
                    let bytes_max = match self.phase {
                        Phase::Sasl => SASL_LINE_BYTES_MAX,
                        _ => COMMAND_LINE_BYTES_MAX,
                    };
                    let (taken, line) = self.lines.take(&input[at..], bytes_max);
                    at += taken;
                    match line {
                        Taken::NeedInput => return (at, Event::NeedInput),
                        Taken::Line(line) if matches!(self.phase, Phase::Sasl) => {
                            self.take_sasl_response(&line, output)
                        }
                        Taken::Line(line) => self.take_line(&line, output),
                        Taken::TooLong => {
                            self.phase = Phase::Command;
                            self.bad("The line is too long", output)
                        }
                        Taken::Endless => {
                            self.close(&Refusal::new("A line does not end, closing the connection"), output);
                            None
                        }
                    }
                }
                Phase::Listing(listing, from) => {
                    self.list(listing, from, output);
                    None
                }
                Phase::LogInAsked
                | Phase::TlsAsked
                | Phase::Tls
                | Phase::MessageAsked(_)
                | Phase::Message(..)
                | Phase::UpdateAsked => return (at, Event::AnswerOwed),
                Phase::Closed => return (input.len(), Event::Close),
            };
            if let Some(event) = event {
                return (at, event);
            }
        }
    }

    /// The answer yes to [`Event::LogIn`]: the session has the maildrop now.
    pub fn open(&mut self, maildrop: Maildrop, output: &mut Vec<u8>) {
        if matches!(self.phase, Phase::LogInAsked) {
            let (deleted, retrieved) = Default::default();
            self.open = Some(Box::new(Open { maildrop, deleted, deleted_octets: 0, retrieved }));
            self.phase = Phase::Command;
            self.write_contents(output);
        }
    }

    /// The answer no to what was asked. The session goes on.
    pub fn refuse(&mut self, refusal: &Refusal, output: &mut Vec<u8>) {
        if matches!(self.phase, Phase::LogInAsked | Phase::TlsAsked | Phase::MessageAsked(_)) {
            self.phase = Phase::Command;
            refusal.write(output);
        }
    }

    /// The answer yes to [`Event::StartTls`]. Send the output and drop all input that has been received: it came before TLS,
    /// so anybody may have sent it (RFC 2595, 4). Then begin TLS, and say so with [`Session::tls_started`].
    pub fn start_tls(&mut self, output: &mut Vec<u8>) {
        if matches!(self.phase, Phase::TlsAsked) {
            write_ok(output, "Begin TLS now");
            self.phase = Phase::Tls;
        }
    }

    /// TLS is there. What the client said before counts no more.
    pub fn tls_started(&mut self) {
        if matches!(self.phase, Phase::Tls) {
            self.phase = Phase::Command;
            self.security = Security { passwords: true, starttls: false };
            self.lines.reset();
            self.user = None;
        }
    }

    /// The answer yes to [`Event::Retrieve`]: the message follows, from [`Session::write_header`] to [`Session::end_message`].
    pub fn begin_message(&mut self, output: &mut Vec<u8>) {
        if let Phase::MessageAsked(wanted) = self.phase {
            match wanted.lines {
                None => {
                    output.extend_from_slice(b"+OK ");
                    write_number(output, wanted.message.octets);
                    output.extend_from_slice(b" octets\r\n");
                }
                Some(_) => write_ok(output, "The top of the message follows"),
            }
            self.phase = Phase::Message(wanted, Transfer::new(wanted.lines));
        }
    }

    /// A piece of the header, the empty line at its end included.
    pub fn write_header(&mut self, piece: &[u8], output: &mut Vec<u8>) {
        if let Phase::Message(_, transfer) = &mut self.phase {
            transfer.write_header(piece, output);
        }
    }

    /// A piece of the body. False if no more of it is wanted.
    pub fn write_body(&mut self, piece: &[u8], output: &mut Vec<u8>) -> bool {
        let Phase::Message(_, transfer) = &mut self.phase else { return false };
        transfer.write_body(piece, output)
    }

    /// Whether the body is wanted, as far as it has been written.
    pub fn wants_body(&self) -> bool {
        let Phase::Message(_, transfer) = &self.phase else { return false };
        !transfer.lines.is_some_and(|lines| lines.is_done())
    }

    pub fn end_message(&mut self, output: &mut Vec<u8>) {
        match (std::mem::replace(&mut self.phase, Phase::Command), &mut self.open) {
            (Phase::Message(wanted, transfer), Some(open)) => {
                transfer.finish(output);
                if wanted.lines.is_none() {
                    open.retrieved.insert(wanted.message.uid);
                }
            }
            (other, _) => self.phase = other,
        }
    }

    /// The answer to [`Event::Update`]. Yes says that all of it is durable.
    ///
    /// # Errors
    /// With a refusal, nothing or not all of it was done (RFC 1939, 6).
    pub fn updated(&mut self, result: Result<(), Refusal>, output: &mut Vec<u8>) {
        if matches!(self.phase, Phase::UpdateAsked) {
            self.phase = Phase::Closed;
            match result {
                Ok(()) => write_ok(output, "Bye"),
                Err(refusal) => refusal.write(output),
            }
        }
    }

    /// Ends the session without the UPDATE state: nothing is removed. A message on its way is left without its end, so
    /// that the client does not take a part of it for the whole.
    pub fn close(&mut self, refusal: &Refusal, output: &mut Vec<u8>) {
        if !matches!(self.phase, Phase::Closed | Phase::Message(..) | Phase::Listing(..)) {
            refusal.write(output);
        }
        self.phase = Phase::Closed;
        self.open = None;
        self.lines.reset();
    }

    /// Whether nothing has begun: such a session may be closed at a stop of the server without harm.
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Command | Phase::Sasl) && self.lines.is_empty()
    }

    pub fn is_logged_in(&self) -> bool {
        self.open.is_some()
    }

    fn bad(&mut self, text: &'static str, output: &mut Vec<u8>) -> Option<Event> {
        self.errors += 1;
        if self.errors < self.config.errors_max {
            Refusal::new(text).write(output);
        } else {
            self.close(&Refusal::new("Too many bad commands, closing the connection"), output);
        }
        None
    }

    fn take_line(&mut self, line: &[u8], output: &mut Vec<u8>) -> Option<Event> {
        match command::parse(line) {
            Ok(command) => self.take_command(command, output),
            Err(text) => self.bad(text, output),
        }
    }

    fn take_command(&mut self, command: Command<'_>, output: &mut Vec<u8>) -> Option<Event> {
        let refuse = |refusal: Refusal, output: &mut Vec<u8>| {
            refusal.write(output);
            None
        };
        match (command, &mut self.open) {
            (Command::Capa, _) => self.write_capabilities(output),
            (Command::Quit, _) => return self.quit(output),
            (Command::User(_) | Command::Pass(_) | Command::Auth(_) | Command::Stls, Some(_)) => {
                return self.bad("You are logged in already", output);
            }
            (Command::User(_), None) if !self.security.passwords => return refuse(self.no_passwords(), output),
            (Command::User(user), None) => {
                // Whether there is such a user is not told (RFC 1939, 13).
                self.user = Some(user.into());
                write_ok(output, "Send the password");
            }
            (Command::Pass(password), None) => {
                let Some(user) = self.user.take() else { return self.bad("Say USER first", output) };
                self.phase = Phase::LogInAsked;
                let password = Secret(password.to_owned());
                return Some(Event::LogIn(Credentials::Password { user: user.into_string(), password }));
            }
            (Command::Auth(mechanism), None) => return self.authenticate(mechanism, output),
            (Command::Stls, None) if self.security.starttls => {
                self.phase = Phase::TlsAsked;
                return Some(Event::StartTls);
            }
            (Command::Stls, None) => return refuse(Refusal::new("TLS cannot be begun here"), output),
            (_, None) => return self.bad("Log in first", output),
            (Command::Stat, Some(open)) => write_pair(output, open.count(), open.octets()),
            (Command::List(None), Some(open)) => {
                output.extend_from_slice(b"+OK ");
                write_number(output, open.count());
                output.extend_from_slice(b" messages (");
                write_number(output, open.octets());
                output.extend_from_slice(b" octets)\r\n");
                self.phase = Phase::Listing(Listing::Sizes, 1);
            }
            (Command::Uidl(None), Some(_)) => {
                write_ok(output, "Unique-ids follow");
                self.phase = Phase::Listing(Listing::UniqueIds, 1);
            }
            (Command::List(Some(number)), Some(open)) => {
                let Some(message) = open.get(number) else { return refuse(NO_SUCH_MESSAGE, output) };
                write_pair(output, number.into(), message.octets);
            }
            (Command::Uidl(Some(number)), Some(open)) => {
                let Some(message) = open.get(number) else { return refuse(NO_SUCH_MESSAGE, output) };
                output.extend_from_slice(b"+OK ");
                write_number(output, number.into());
                output.push(b' ');
                open.maildrop.write_unique_id(message, output);
                output.extend_from_slice(b"\r\n");
            }
            (Command::Retr(number), Some(open)) => {
                let Some(message) = open.get(number) else { return refuse(NO_SUCH_MESSAGE, output) };
                return Some(self.ask_for(Wanted { message, lines: None }));
            }
            (Command::Top { number, lines }, Some(open)) => {
                let Some(message) = open.get(number) else { return refuse(NO_SUCH_MESSAGE, output) };
                return Some(self.ask_for(Wanted { message, lines: Some(lines) }));
            }
            (Command::Dele(number), Some(open)) => {
                let Some(message) = open.get(number) else { return refuse(NO_SUCH_MESSAGE, output) };
                open.deleted.insert(message.uid);
                open.deleted_octets += message.octets;
                write_ok(output, "Marked to be deleted at QUIT");
            }
            (Command::Rset, Some(open)) => {
                open.deleted.clear();
                open.deleted_octets = 0;
                self.write_contents(output);
            }
            (Command::Noop, Some(_)) => write_ok(output, "Nothing done"),
        }
        None
    }

    fn ask_for(&mut self, wanted: Wanted) -> Event {
        self.phase = Phase::MessageAsked(wanted);
        Event::Retrieve(Retrieve { uid: wanted.message.uid, lines: wanted.lines })
    }

    fn quit(&mut self, output: &mut Vec<u8>) -> Option<Event> {
        // RFC 1939, 6: without a login there is nothing to update.
        let Some(open) = self.open.take() else {
            self.phase = Phase::Closed;
            write_ok(output, "Bye");
            return None;
        };
        self.phase = Phase::UpdateAsked;
        let Open { deleted, mut retrieved, .. } = *open;
        retrieved -= &deleted;
        Some(Event::Update(Update { deleted, retrieved }))
    }

    /// No [AUTH]: the credentials may well be right.
    fn no_passwords(&self) -> Refusal {
        Refusal::new(match self.security.starttls {
            true => "No passwords without TLS: say STLS first",
            false => "No passwords without TLS",
        })
    }

    fn authenticate(&mut self, mechanism: Option<Mechanism<'_>>, output: &mut Vec<u8>) -> Option<Event> {
        let Some(mechanism) = mechanism else {
            // Older than RFC 5034, and still asked by clients that do not know CAPA.
            write_ok(output, "Mechanisms follow");
            if self.security.passwords {
                output.extend_from_slice(b"PLAIN\r\n");
            }
            output.extend_from_slice(b".\r\n");
            return None;
        };
        if !mechanism.name.eq_ignore_ascii_case("PLAIN") {
            Refusal::new("There is no such mechanism: there is PLAIN").write(output);
            return None;
        }
        if !self.security.passwords {
            self.no_passwords().write(output);
            return None;
        }
        match mechanism.initial_response {
            // RFC 5034, 4: an empty response.
            Some("=") => Some(self.log_in_by_plain(b"")),
            Some(response) => Some(self.log_in_by_plain(response.as_bytes())),
            None => {
                // RFC 5034, 4: with its space.
                output.extend_from_slice(b"+ \r\n");
                self.phase = Phase::Sasl;
                None
            }
        }
    }

    fn log_in_by_plain(&mut self, response: &[u8]) -> Event {
        self.user = None;
        self.phase = Phase::LogInAsked;
        Event::LogIn(Credentials::SaslPlain(response.to_owned()))
    }

    fn take_sasl_response(&mut self, line: &[u8], output: &mut Vec<u8>) -> Option<Event> {
        if line == b"*" {
            self.phase = Phase::Command;
            Refusal::new("Cancelled").write(output);
            return None;
        }
        Some(self.log_in_by_plain(line))
    }

    /// What is announced before a login is announced after it (RFC 2449, 5), but STLS, which is for its state only
    /// (RFC 2595, 4).
    fn write_capabilities(&self, output: &mut Vec<u8>) {
        write_ok(output, "Capabilities follow");
        output.extend_from_slice(b"TOP\r\nUIDL\r\nRESP-CODES\r\nAUTH-RESP-CODE\r\nPIPELINING\r\nEXPIRE NEVER\r\n");
        if self.security.passwords {
            output.extend_from_slice(b"USER\r\nSASL PLAIN\r\n");
        }
        if self.security.starttls && self.open.is_none() {
            output.extend_from_slice(b"STLS\r\n");
        }
        output.extend_from_slice(b"IMPLEMENTATION Posthaste\r\n.\r\n");
    }

    fn write_contents(&self, output: &mut Vec<u8>) {
        let Some(open) = &self.open else { return };
        output.extend_from_slice(b"+OK The maildrop has ");
        write_number(output, open.count());
        output.extend_from_slice(b" messages (");
        write_number(output, open.octets());
        output.extend_from_slice(b" octets)\r\n");
    }

    /// Goes on with a list until there is much output.
    fn list(&mut self, listing: Listing, from: u32, output: &mut Vec<u8>) {
        let Some(open) = &self.open else { return };
        for (number, message) in open.maildrop.iter_from(from) {
            if output.len() >= OUTPUT_BYTES {
                self.phase = Phase::Listing(listing, number);
                return;
            }
            if open.deleted.contains(message.uid) {
                continue;
            }
            write_number(output, number.into());
            output.push(b' ');
            match listing {
                Listing::Sizes => write_number(output, message.octets),
                Listing::UniqueIds => open.maildrop.write_unique_id(message, output),
            }
            output.extend_from_slice(b"\r\n");
        }
        output.extend_from_slice(b".\r\n");
        self.phase = Phase::Command;
    }
}

fn write_pair(output: &mut Vec<u8>, first: u64, second: u64) {
    output.extend_from_slice(b"+OK ");
    write_number(output, first);
    output.push(b' ');
    write_number(output, second);
    output.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests;
