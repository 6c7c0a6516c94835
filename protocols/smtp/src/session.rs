//! The state of one connection: what may come next, and what the caller has to decide.

use std::sync::Arc;

use memchr::memchr;

use crate::address::{Mailbox, ReversePath};
use crate::command::{self, COMMAND_LINE_BYTES_MAX, Chunk, Command, Hello, MailParams};
use crate::data::{Data, Verdict};
use crate::reply::Reply;
use crate::trace::Spoken;

/// Which of the two protocols is spoken on a port (RFC 2033, 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// One answer to a message, for all its recipients.
    Smtp,
    /// An answer for each recipient.
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
    /// So many recipients that were refused for good end the connection: nobody is to find out by trying who has an account. `None`
    /// where the client is trusted.
    pub recipients_refused_max: Option<u32>,
    /// STARTTLS is offered (RFC 3207).
    pub starttls: bool,
}

impl Config {
    pub fn lmtp(host_name: impl Into<String>) -> Self {
        Self {
            protocol: Protocol::Lmtp,
            host_name: host_name.into(),
            message_bytes_max: 50 * 1024 * 1024,
            recipients_max: 1000,
            errors_max: 20,
            recipients_refused_max: None,
            starttls: false,
        }
    }

    pub fn smtp(host_name: impl Into<String>) -> Self {
        Self { protocol: Protocol::Smtp, ..Self::lmtp(host_name) }
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
    /// In CRLF form, dots unstuffed, as sent otherwise. After DATA it is empty or ends with CRLF; what came in chunks need not.
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
    /// Store it, then answer: LMTP for each recipient in order, with [`Session::answer_recipient`], SMTP once for all, with
    /// [`Session::answer`].
    Message(Box<Message<T>>),
    /// Send the output, forget all input that is left, begin TLS, and say so with [`Session::tls_begun`].
    StartTls,
    /// The caller has not answered the last event.
    AnswerOwed,
    /// Send the output and close the connection.
    Close,
}

#[derive(Debug)]
enum Phase {
    Command,
    RecipientAsked(Mailbox),
    /// For DATA, or for the first chunk.
    DataAsked(Option<Chunk>),
    Data(Data),
    /// What is left of a chunk. The transaction has the message, unless it is refused.
    Chunk(Chunk),
    /// Replies that the message handed over has not had yet.
    AnswersOwed(usize),
    /// Waits for TLS.
    TlsOwed,
    Closed,
}

#[derive(Debug)]
struct Transaction<T> {
    sender: ReversePath,
    params: MailParams,
    recipients: Vec<Recipient<T>>,
    /// The message so far, while it comes in chunks.
    chunks: Option<Data>,
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
    spoken: Spoken,
    is_tls: bool,
    transaction: Option<Transaction<T>>,
    /// Why the chunks of the message that is under way do not count: only RSET and a new greeting end that (RFC 3030, 2).
    chunk_refusal: Option<Reply>,
    errors: u32,
    recipients_refused: u32,
}

impl<T> Session<T> {
    /// Begins a session and appends its greeting.
    pub fn new(config: Arc<Config>, output: &mut Vec<u8>) -> Self {
        let (name, spoken) = match config.protocol {
            Protocol::Smtp => ("ESMTP", Spoken::Esmtp),
            Protocol::Lmtp => ("LMTP", Spoken::Lmtp),
        };
        Reply::plain(220, format!("{} {name} server ready", config.host_name)).write(output);
        Self {
            config,
            phase: Phase::Command,
            line: Vec::new(),
            line_too_long: false,
            hello: None,
            spoken,
            is_tls: false,
            transaction: None,
            chunk_refusal: None,
            errors: 0,
            recipients_refused: 0,
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
                Phase::Chunk(chunk) => {
                    let piece = &input[at..];
                    let piece = &piece[..piece.len().min(usize::try_from(chunk.octets).unwrap_or(usize::MAX))];
                    at += piece.len();
                    chunk.octets -= piece.len() as u64;
                    if let Some(data) = self.transaction.as_mut().and_then(|transaction| transaction.chunks.as_mut()) {
                        data.take(piece);
                    }
                    if chunk.octets > 0 {
                        return (at, Event::NeedInput);
                    }
                    let last = chunk.last;
                    if let Some(event) = self.end_of_chunk(last, output) {
                        return (at, event);
                    }
                }
                Phase::RecipientAsked(_) | Phase::DataAsked(_) | Phase::AnswersOwed(_) | Phase::TlsOwed => {
                    return (at, Event::AnswerOwed);
                }
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
        let (Phase::DataAsked(chunk), Some(transaction)) = (&self.phase, &mut self.transaction) else { return };
        let expected = transaction.params.size.unwrap_or(16 * 1024);
        let data = Data::new(self.config.message_bytes_max, expected);
        match *chunk {
            None => {
                self.phase = Phase::Data(data);
                output.extend_from_slice(b"354 Start mail input; end with <CRLF>.<CRLF>\r\n");
            }
            Some(chunk) => {
                transaction.chunks = Some(data);
                self.phase = Phase::Chunk(chunk);
            }
        }
    }

    /// The answer no to [`Event::Recipient`] or [`Event::Data`]: a 4yz or 5yz reply. The transaction goes on.
    pub fn refuse(&mut self, reply: &Reply, output: &mut Vec<u8>) {
        debug_assert!(matches!(reply.code(), 400..=599), "{reply:?}");
        match self.phase {
            Phase::RecipientAsked(_) => {
                self.phase = Phase::Command;
                reply.write(output);
                self.recipients_refused += u32::from(reply.code() >= 500);
                if self.config.recipients_refused_max.is_some_and(|limit| self.recipients_refused >= limit) {
                    self.close(7, 0, "Too many recipients that do not exist", output);
                }
            }
            Phase::DataAsked(None) => {
                self.phase = Phase::Command;
                reply.write(output);
            }
            // The chunk comes all the same, and is answered when it has come.
            Phase::DataAsked(Some(chunk)) => {
                self.chunk_refusal = Some(reply.clone());
                self.phase = Phase::Chunk(chunk);
            }
            _ => {}
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

    /// The answer to [`Event::Message`] of SMTP, for all recipients: a positive one says that the message is durable for each of
    /// them (RFC 5321, 4.2.5).
    pub fn answer(&mut self, reply: &Reply, output: &mut Vec<u8>) {
        debug_assert_eq!(self.config.protocol, Protocol::Smtp);
        self.answer_recipient(reply, output);
    }

    /// TLS has begun: the client starts anew (RFC 3207, 4.2).
    pub fn tls_begun(&mut self) {
        self.is_tls = true;
        self.hello = None;
        self.transaction = None;
        self.chunk_refusal = None;
        if matches!(self.phase, Phase::TlsOwed) {
            self.phase = Phase::Command;
        }
    }

    /// What the client speaks.
    pub fn spoken(&self) -> Spoken {
        self.spoken
    }

    /// Gives up the message that is being received, because memory is short: what is held is freed at once, the rest is
    /// dropped as it comes, and at its end each recipient gets 452 4.3.1.
    pub fn abandon_data(&mut self) {
        match (&mut self.phase, &mut self.transaction) {
            (Phase::Data(data), _) | (_, Some(Transaction { chunks: Some(data), .. })) => {
                data.refuse(Verdict::Abandoned)
            }
            _ => {}
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
        let data = match (&self.phase, &self.transaction) {
            (Phase::Data(data), _) | (_, Some(Transaction { chunks: Some(data), .. })) => data.held_bytes(),
            _ => 0,
        };
        data + self.line.capacity()
    }

    /// The name in the client's HELO, EHLO or LHLO, for the Received field.
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
            Err(reply) if reply.code() == 421 => {
                reply.write(output);
                self.phase = Phase::Closed;
                self.reset();
                Some(Event::Close)
            }
            Err(reply) => self.bad_command(&reply, output),
        }
    }

    fn take_command(&mut self, command: Command<'_>, output: &mut Vec<u8>) -> Option<Event<T>> {
        const NO_MAIL: &Reply = &Reply::new(503, 5, 1, "MAIL first");
        match command {
            Command::Hello(hello, name) => {
                self.spoken = match (self.config.protocol, hello) {
                    (Protocol::Lmtp, Hello::Lhlo) => Spoken::Lmtp,
                    (Protocol::Smtp, Hello::Ehlo) => Spoken::Esmtp,
                    (Protocol::Smtp, Hello::Helo) => Spoken::Smtp,
                    // RFC 2033, 4.1: 500 is recommended.
                    (Protocol::Lmtp, _) => {
                        return self.bad_command(&const { Reply::new(500, 5, 1, "This is LMTP, say LHLO") }, output);
                    }
                    (Protocol::Smtp, _) => {
                        return self.bad_command(&const { Reply::new(500, 5, 1, "This is SMTP, say EHLO") }, output);
                    }
                };
                self.hello = Some(name.into());
                self.reset(); // RFC 5321, 4.1.4
                self.write_extensions(output);
            }
            Command::Mail(..) if self.hello.is_none() => {
                let lmtp = self.config.protocol == Protocol::Lmtp;
                let reply = Reply::new(503, 5, 1, if lmtp { "LHLO first" } else { "EHLO first" });
                return self.bad_command(&reply, output);
            }
            Command::Mail(..) if self.transaction.is_some() => {
                return self.bad_command(&const { Reply::new(503, 5, 1, "Sender already given") }, output);
            }
            Command::Mail(_, params) if params.size.is_some_and(|size| size > self.config.message_bytes_max) => {
                TOO_BIG.write(output); // RFC 1870, 6.1
            }
            Command::Mail(sender, params) => {
                self.chunk_refusal = None;
                self.transaction = Some(Transaction { sender, params, recipients: Vec::new(), chunks: None });
                const { &Reply::new(250, 1, 0, "Sender ok") }.write(output);
            }
            Command::Rcpt(mailbox) => {
                let Some(transaction) = &self.transaction else { return self.bad_command(NO_MAIL, output) };
                if transaction.chunks.is_some() || self.chunk_refusal.is_some() {
                    return self.bad_command(CHUNKS_BEGUN, output);
                }
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
                Some(transaction) if transaction.chunks.is_some() || self.chunk_refusal.is_some() => {
                    return self.bad_command(CHUNKS_BEGUN, output);
                }
                // It is not counted as an error: a pipelining client cannot know.
                Some(transaction) if transaction.recipients.is_empty() => self.no_recipients().write(output),
                Some(transaction) => {
                    let declared_bytes = transaction.params.size;
                    self.phase = Phase::DataAsked(None);
                    return Some(Event::Data { declared_bytes });
                }
            },
            Command::Bdat(chunk) => return self.begin_chunk(chunk),
            Command::StartTls if !self.config.starttls => {
                return self.bad_command(&const { Reply::new(502, 5, 1, "STARTTLS is not offered") }, output);
            }
            Command::StartTls if self.is_tls => {
                return self.bad_command(&const { Reply::new(503, 5, 1, "TLS has begun already") }, output);
            }
            Command::StartTls => {
                const { &Reply::new(220, 0, 0, "Begin TLS now") }.write(output);
                self.phase = Phase::TlsOwed;
                return Some(Event::StartTls);
            }
            Command::Rset => {
                self.reset();
                const { &Reply::new(250, 0, 0, "Reset") }.write(output);
            }
            Command::Noop => const { &Reply::new(250, 0, 0, "Nothing done") }.write(output),
            Command::Help => {
                let text = match self.config.protocol {
                    Protocol::Lmtp => "LHLO MAIL RCPT DATA BDAT STARTTLS RSET NOOP VRFY QUIT HELP; see RFC 2033",
                    Protocol::Smtp => "EHLO HELO MAIL RCPT DATA BDAT STARTTLS RSET NOOP VRFY QUIT HELP; see RFC 5321",
                };
                Reply::new(214, 0, 0, text).write(output);
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
        if self.spoken == Spoken::Smtp {
            return Reply::plain(250, self.config.host_name.clone()).write(output);
        }
        let starttls = if self.config.starttls && !self.is_tls { "\nSTARTTLS" } else { "" };
        let text = format!(
            "{}\nPIPELINING\nSIZE {}\n8BITMIME\nENHANCEDSTATUSCODES\nSMTPUTF8\nCHUNKING{starttls}",
            self.config.host_name, self.config.message_bytes_max
        );
        Reply::plain(250, text).write(output);
    }

    fn reset(&mut self) {
        self.transaction = None;
        self.chunk_refusal = None;
    }

    fn no_recipients(&self) -> Reply {
        // RFC 2033, 4.2: this very code. RFC 5321, 3.3: 554.
        let code = if self.config.protocol == Protocol::Lmtp { 503 } else { 554 };
        Reply::new(code, 5, 1, "No valid recipients")
    }

    /// Whatever is wrong with a chunk, it comes, and is answered when it has come (RFC 3030, 2).
    fn begin_chunk(&mut self, chunk: Chunk) -> Option<Event<T>> {
        self.phase = Phase::Chunk(chunk);
        let refusal = match &self.transaction {
            Some(_) if self.chunk_refusal.is_some() => return None,
            Some(transaction) if transaction.chunks.is_some() => return None,
            Some(transaction) if !transaction.recipients.is_empty() => {
                let declared_bytes = Some(transaction.params.size.unwrap_or(0).max(chunk.octets));
                self.phase = Phase::DataAsked(Some(chunk));
                let limit = self.config.message_bytes_max;
                return Some(Event::Data { declared_bytes: declared_bytes.map(|bytes| bytes.min(limit)) });
            }
            Some(_) => self.no_recipients(),
            None => {
                self.errors += 1;
                const { Reply::new(503, 5, 1, "MAIL first") }
            }
        };
        self.chunk_refusal = Some(refusal);
        None
    }

    fn end_of_chunk(&mut self, last: bool, output: &mut Vec<u8>) -> Option<Event<T>> {
        self.phase = Phase::Command;
        if let Some(refusal) = &self.chunk_refusal {
            refusal.write_times(self.replies_to(last), output);
            if last {
                self.reset();
            }
            if self.errors > self.config.errors_max {
                self.close(7, 0, "Too many errors", output);
                return Some(Event::Close);
            }
            return None;
        }
        let transaction = self.transaction.as_mut()?;
        let data = transaction.chunks.as_mut()?;
        if last {
            data.end_of_chunks();
            let data = transaction.chunks.take()?;
            return self.hand_over(data, output);
        }
        match refusal_of(data.verdict()) {
            None => const { &Reply::new(250, 0, 0, "Chunk taken") }.write(output),
            Some(refusal) => {
                refusal.write(output);
                transaction.chunks = None;
                self.chunk_refusal = Some(refusal);
            }
        }
        None
    }

    /// How many replies a message's end gets, accepted or not: RFC 2033, 4.2.
    fn replies_to(&self, last: bool) -> usize {
        match &self.transaction {
            Some(transaction) if last && self.config.protocol == Protocol::Lmtp => transaction.recipients.len().max(1),
            _ => 1,
        }
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

    fn end_of_data(&mut self, output: &mut Vec<u8>) -> Option<Event<T>> {
        match std::mem::replace(&mut self.phase, Phase::Command) {
            Phase::Data(data) => self.hand_over(data, output),
            _ => None,
        }
    }

    /// The message is complete: hands it over, or refuses it.
    fn hand_over(&mut self, data: Data, output: &mut Vec<u8>) -> Option<Event<T>> {
        let replies = self.replies_to(true);
        let Transaction { sender, params, recipients, .. } = self.transaction.take()?;
        if let Some(refusal) = refusal_of(data.verdict()) {
            refusal.write_times(replies, output);
            return None;
        }
        self.phase = Phase::AnswersOwed(replies);
        Some(Event::Message(Box::new(Message { sender, params, recipients, body: data.into_bytes() })))
    }
}

fn refusal_of(verdict: Verdict) -> Option<Reply> {
    match verdict {
        Verdict::Good => None,
        Verdict::BareLineEnd => Some(Reply::new(550, 6, 0, "Message contains a bare CR or LF")),
        Verdict::TooBig => Some(TOO_BIG.clone()),
        Verdict::Abandoned => Some(Reply::busy()),
    }
}

const CHUNKS_BEGUN: &Reply = &Reply::new(503, 5, 1, "The message comes in chunks: BDAT or RSET");
const TOO_BIG: &Reply = &Reply::new(552, 3, 4, "Message exceeds the maximum size");

#[cfg(test)]
mod tests;
