//! The state of one connection: what may come next, and what the caller has to decide.

use std::sync::Arc;

use memchr::memchr;

use crate::address::{Mailbox, ReversePath};
use crate::command::{self, COMMAND_LINE_BYTES_MAX, Command, Hello, MailParams};
use crate::data::{Data, Verdict};
use crate::reply::Reply;

/// Which of the two protocols is spoken on a port (RFC 2033, 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Lmtp,
}

/// What all sessions of a listener share.
#[derive(Debug, Clone)]
pub struct Config {
    pub protocol: Protocol,
    /// Our name in the greeting: a domain.
    pub host_name: String,
    /// Largest message taken, in octets as RFC 1870, 5 counts them.
    pub message_bytes_max: u64,
    /// Recipients of one transaction; at least 100 (RFC 5321, 4.5.3.1.8).
    pub recipients_max: usize,
    /// Bad commands that a connection may send before it is closed.
    pub errors_max: u32,
}

impl Config {
    pub fn lmtp(host_name: impl Into<String>) -> Self {
        Self {
            protocol: Protocol::Lmtp,
            host_name: host_name.into(),
            message_bytes_max: 50 * 1024 * 1024,
            recipients_max: 1000,
            errors_max: 20,
        }
    }
}

/// One accepted recipient, with what the caller's directory found for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipient<T> {
    pub mailbox: Mailbox,
    pub account: T,
}

/// A complete message with its envelope.
#[derive(Debug)]
pub struct Message<T> {
    pub sender: ReversePath,
    pub params: MailParams,
    /// In the order of their RCPT commands; never empty.
    pub recipients: Vec<Recipient<T>>,
    /// In CRLF form, dots unstuffed, as sent otherwise. Empty, or ends with CRLF.
    pub body: Vec<u8>,
}

/// What [`Session::step`] stopped for.
#[derive(Debug)]
pub enum Event<T> {
    /// All input was taken. Send the output, then read more.
    NeedInput,
    /// Is this recipient ours? Answer with [`Session::accept_recipient`] or [`Session::refuse`].
    Recipient(Mailbox),
    /// May a message be taken now? Answer with [`Session::accept_data`] or [`Session::refuse`].
    Data {
        /// The size that the client declared, at most the configured maximum.
        declared_bytes: Option<u64>,
    },
    /// Store it, then answer each recipient in order with [`Session::answer_recipient`].
    Message(Box<Message<T>>),
    /// The caller has not answered the last event.
    AnswerOwed,
    /// Send the output and close the connection.
    Close,
}

#[derive(Debug)]
enum Phase {
    Command,
    RecipientAsked(Mailbox),
    DataAsked,
    Data(Data),
    /// Recipients that have no reply yet to the message handed over.
    AnswersOwed(usize),
    Closed,
}

#[derive(Debug)]
struct Transaction<T> {
    sender: ReversePath,
    params: MailParams,
    recipients: Vec<Recipient<T>>,
}

/// One connection.
///
/// ```text
/// loop { step(input, output) -> consumed, event;  answer the event;  on NeedInput: send output, read input }
/// ```
///
/// Input that was not consumed is given again at the next step. Where the caller needs time to answer it may send the
/// output first; replies stay in order. `T` is what the caller keeps per accepted recipient.
#[derive(Debug)]
pub struct Session<T> {
    config: Arc<Config>,
    phase: Phase,
    /// The beginning of a command line whose end has not come yet. Never longer than a command line may be.
    line: Vec<u8>,
    /// The current line is too long; the rest of it is dropped.
    line_too_long: bool,
    hello: Option<Box<str>>,
    transaction: Option<Transaction<T>>,
    errors: u32,
}

impl<T> Session<T> {
    /// Begins a session and appends its greeting.
    pub fn new(config: Arc<Config>, output: &mut Vec<u8>) -> Self {
        Reply::plain(220, format!("{} LMTP server ready", config.host_name)).write(output);
        Self {
            config,
            phase: Phase::Command,
            line: Vec::new(),
            line_too_long: false,
            hello: None,
            transaction: None,
            errors: 0,
        }
    }

    /// Takes input until the caller has to do something. Gives how many bytes were taken, and what to do.
    pub fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> (usize, Event<T>) {
        let mut at = 0;
        loop {
            match &mut self.phase {
                Phase::Command => {
                    let Some(distance) = memchr(b'\n', &input[at..]) else {
                        self.keep_partial_line(&input[at..]);
                        return (input.len(), Event::NeedInput);
                    };
                    let line = &input[at..at + distance + 1];
                    at += line.len();
                    if let Some(event) = self.take_line(line, output) {
                        return (at, event);
                    }
                }
                Phase::Data(data) => {
                    let (taken, ended) = data.feed(&input[at..]);
                    at += taken;
                    if !ended {
                        return (at, Event::NeedInput);
                    }
                    if let Some(event) = self.end_of_data(output) {
                        return (at, event);
                    }
                }
                Phase::RecipientAsked(_) | Phase::DataAsked | Phase::AnswersOwed(_) => return (at, Event::AnswerOwed),
                Phase::Closed => return (input.len(), Event::Close),
            }
        }
    }

    /// The answer yes to [`Event::Recipient`].
    pub fn accept_recipient(&mut self, account: T, output: &mut Vec<u8>) {
        match (std::mem::replace(&mut self.phase, Phase::Command), &mut self.transaction) {
            (Phase::RecipientAsked(mailbox), Some(transaction)) => {
                transaction.recipients.push(Recipient { mailbox, account });
                const { &Reply::new(250, 1, 5, "Recipient ok") }.write(output);
            }
            (other, _) => self.phase = other,
        }
    }

    /// The answer yes to [`Event::Data`].
    pub fn accept_data(&mut self, output: &mut Vec<u8>) {
        if let (Phase::DataAsked, Some(transaction)) = (&self.phase, &self.transaction) {
            self.phase =
                Phase::Data(Data::new(self.config.message_bytes_max, transaction.params.size.unwrap_or(16 * 1024)));
            output.extend_from_slice(b"354 Start mail input; end with <CRLF>.<CRLF>\r\n");
        }
    }

    /// The answer no to [`Event::Recipient`] or [`Event::Data`]: a 4yz or 5yz reply. The transaction goes on.
    pub fn refuse(&mut self, reply: &Reply, output: &mut Vec<u8>) {
        debug_assert!(matches!(reply.code(), 400..=599), "{reply:?}");
        if matches!(self.phase, Phase::RecipientAsked(_) | Phase::DataAsked) {
            self.phase = Phase::Command;
            reply.write(output);
        }
    }

    /// The answer to [`Event::Message`] for the next recipient in order. Gives whether more answers are owed.
    ///
    /// A positive reply says that the message is durable for this recipient (RFC 2033, 4.2). Replies may be sent one by
    /// one, as soon as each is known (RFC 2033, 5).
    pub fn answer_recipient(&mut self, reply: &Reply, output: &mut Vec<u8>) -> bool {
        let Phase::AnswersOwed(owed) = &mut self.phase else { return false };
        reply.write(output);
        *owed -= 1;
        let more = *owed > 0;
        if !more {
            self.phase = Phase::Command;
        }
        more
    }

    /// Gives up the message that is being received, because memory is short: what is held is freed at once, the rest is
    /// dropped as it comes, and at its end each recipient gets 452 4.3.1.
    pub fn abandon_data(&mut self) {
        if let Phase::Data(data) = &mut self.phase {
            data.refuse(Verdict::Abandoned);
        }
    }

    /// Says 421 4.`subject`.`detail` and ends the session: shutdown or a timeout (RFC 5321, 3.8).
    pub fn close(&mut self, subject: u16, detail: u16, text: &'static str, output: &mut Vec<u8>) {
        if !matches!(self.phase, Phase::Closed) {
            Reply::new(421, subject, detail, text).write(output);
            self.phase = Phase::Closed;
            self.transaction = None;
            self.line = Vec::new();
        }
    }

    /// Bytes of the client's that this session holds in memory: for the node's limit on bytes in flight.
    pub fn held_bytes(&self) -> usize {
        let data = if let Phase::Data(data) = &self.phase { data.held_bytes() } else { 0 };
        data + self.line.capacity()
    }

    /// The name in the client's LHLO, for the Received field.
    pub fn hello_name(&self) -> Option<&str> {
        self.hello.as_deref()
    }

    /// Whether a transaction is open; a session without one may be closed at shutdown without harm.
    pub fn is_idle(&self) -> bool {
        self.transaction.is_none() && matches!(self.phase, Phase::Command) && self.line.is_empty()
    }

    fn keep_partial_line(&mut self, part: &[u8]) {
        if self.line.len() + part.len() > COMMAND_LINE_BYTES_MAX {
            self.line_too_long = true;
            self.line.clear();
        }
        if !self.line_too_long {
            self.line.extend_from_slice(part);
        }
    }

    /// Takes the end of a line, LF included.
    fn take_line(&mut self, end: &[u8], output: &mut Vec<u8>) -> Option<Event<T>> {
        let earlier = std::mem::take(&mut self.line);
        if std::mem::take(&mut self.line_too_long) || earlier.len() + end.len() > COMMAND_LINE_BYTES_MAX {
            return self.bad_command(&const { Reply::new(500, 5, 2, "Line too long") }, output);
        }
        if earlier.is_empty() {
            return self.take_command_line(end, output);
        }
        let mut line = earlier;
        line.extend_from_slice(end);
        let event = self.take_command_line(&line, output);
        line.clear();
        self.line = line; // its memory serves the next partial line
        event
    }

    fn take_command_line(&mut self, line: &[u8], output: &mut Vec<u8>) -> Option<Event<T>> {
        let Some(line) = line.strip_suffix(b"\r\n") else {
            return self.bad_command(&const { Reply::new(500, 5, 2, "Line must end with CRLF") }, output);
        };
        match command::parse(line) {
            Ok(command) => self.take_command(command, output),
            Err(reply) => self.bad_command(&reply, output),
        }
    }

    fn take_command(&mut self, command: Command<'_>, output: &mut Vec<u8>) -> Option<Event<T>> {
        const NO_HELLO: &Reply = &Reply::new(503, 5, 1, "LHLO first");
        const NO_MAIL: &Reply = &Reply::new(503, 5, 1, "MAIL first");
        match command {
            Command::Hello(Hello::Lhlo, name) => {
                self.hello = Some(name.into());
                self.transaction = None; // as RSET (RFC 5321, 4.1.4)
                self.write_extensions(output);
            }
            Command::Hello(..) => {
                // RFC 2033, 4.1: 500 is recommended.
                return self.bad_command(&const { Reply::new(500, 5, 1, "This is LMTP, say LHLO") }, output);
            }
            Command::Mail(..) if self.hello.is_none() => return self.bad_command(NO_HELLO, output),
            Command::Mail(..) if self.transaction.is_some() => {
                return self.bad_command(&const { Reply::new(503, 5, 1, "Sender already given") }, output);
            }
            Command::Mail(_, params) if params.size.is_some_and(|size| size > self.config.message_bytes_max) => {
                TOO_BIG.write(output); // RFC 1870, 6.1
            }
            Command::Mail(sender, params) => {
                self.transaction = Some(Transaction { sender, params, recipients: Vec::new() });
                const { &Reply::new(250, 1, 0, "Sender ok") }.write(output);
            }
            Command::Rcpt(mailbox) => {
                let Some(transaction) = &self.transaction else { return self.bad_command(NO_MAIL, output) };
                if !transaction.params.smtputf8 && !mailbox.is_ascii() {
                    // RFC 6531, 3.5
                    const { &Reply::new(553, 6, 7, "Non-ASCII recipient needs SMTPUTF8") }.write(output);
                } else if transaction.recipients.len() >= self.config.recipients_max {
                    // RFC 5321, 4.5.3.1.10
                    const { &Reply::new(452, 5, 3, "Too many recipients") }.write(output);
                } else {
                    self.phase = Phase::RecipientAsked(mailbox.clone());
                    return Some(Event::Recipient(mailbox));
                }
            }
            Command::Data => match &self.transaction {
                None => return self.bad_command(NO_MAIL, output),
                // RFC 2033, 4.2: this very code. It is not counted as an error: a pipelining client cannot know.
                Some(transaction) if transaction.recipients.is_empty() => {
                    const { &Reply::new(503, 5, 1, "No valid recipients") }.write(output);
                }
                Some(transaction) => {
                    let declared_bytes = transaction.params.size;
                    self.phase = Phase::DataAsked;
                    return Some(Event::Data { declared_bytes });
                }
            },
            Command::Rset => {
                self.transaction = None;
                const { &Reply::new(250, 0, 0, "Reset") }.write(output);
            }
            Command::Noop => const { &Reply::new(250, 0, 0, "Nothing done") }.write(output),
            Command::Help => {
                const { &Reply::new(214, 0, 0, "LHLO MAIL RCPT DATA RSET NOOP VRFY QUIT HELP; see RFC 2033") }
                    .write(output);
            }
            // RFC 5321, 3.5.3: 252 tells nothing about who exists.
            Command::Vrfy => const { &Reply::new(252, 5, 0, "Cannot verify, but will take mail") }.write(output),
            Command::Expn => {
                return self.bad_command(&const { Reply::new(502, 5, 1, "EXPN not implemented") }, output);
            }
            Command::Quit => {
                const { &Reply::new(221, 0, 0, "Closing connection") }.write(output);
                self.phase = Phase::Closed;
                self.transaction = None;
                return Some(Event::Close);
            }
            Command::Http => {
                self.close(7, 0, "This is not HTTP", output);
                return Some(Event::Close);
            }
        }
        None
    }

    fn write_extensions(&self, output: &mut Vec<u8>) {
        let text = format!(
            "{}\nPIPELINING\nSIZE {}\n8BITMIME\nENHANCEDSTATUSCODES\nSMTPUTF8",
            self.config.host_name, self.config.message_bytes_max
        );
        Reply::plain(250, text).write(output);
    }

    fn bad_command(&mut self, reply: &Reply, output: &mut Vec<u8>) -> Option<Event<T>> {
        reply.write(output);
        self.errors += 1;
        if self.errors > self.config.errors_max {
            self.close(7, 0, "Too many errors", output);
            return Some(Event::Close);
        }
        None
    }

    /// The message is complete: hands it over, or refuses it for each of its recipients.
    fn end_of_data(&mut self, output: &mut Vec<u8>) -> Option<Event<T>> {
        const BARE_LINE_END: &Reply = &Reply::new(550, 6, 0, "Message contains a bare CR or LF");
        let (Phase::Data(data), Some(Transaction { sender, params, recipients })) =
            (std::mem::replace(&mut self.phase, Phase::Command), self.transaction.take())
        else {
            return None;
        };
        let refusal = match data.verdict() {
            Verdict::Good => {
                self.phase = Phase::AnswersOwed(recipients.len());
                let body = data.into_bytes();
                return Some(Event::Message(Box::new(Message { sender, params, recipients, body })));
            }
            Verdict::BareLineEnd => BARE_LINE_END,
            Verdict::TooBig => TOO_BIG,
            Verdict::Abandoned => const { &Reply::busy() },
        };
        for _ in &recipients {
            refusal.write(output); // RFC 2033, 4.2: one for each, whatever happened
        }
        None
    }
}

const TOO_BIG: &Reply = &Reply::new(552, 3, 4, "Message exceeds the maximum size");

#[cfg(test)]
mod tests;
