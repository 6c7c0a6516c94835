//! Finds the bounds of a command: its lines and literals (RFC 3501, 2.2.1 and 4.3; RFC 7888).
//!
//! A line that ends with `{n}`, `{n+}`, `~{n}` or `~{n+}` is followed by n octets and another line of the same command.
//! Nothing else needs to be understood to find the end of a command, so nothing else is looked at here. Everything is
//! capped, and tighter before the client has authenticated: the line length, the number of literals, the size of each and
//! of all together. What breaks a cap is answered once, dropped to its end, and the connection lives on; only a
//! non-synchronizing literal too large to be worth reading ends it (RFC 7888, 4).
//!
//! A large literal goes from the input into a buffer of its own, which the parsed command then owns.

use memchr::memchr;

use crate::response::{Code, Refusal, Status, write_continuation};

/// What a client may send. Sizes in octets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// All lines of one command together, literals left out.
    pub line_bytes_max: usize,
    pub literals_max: usize,
    /// Any literal but the ones of APPEND.
    pub literal_bytes_max: u64,
    /// One literal of APPEND; 0 where there is no APPEND.
    pub append_bytes_max: u64,
    /// All literals of one command together.
    pub command_bytes_max: u64,
    /// A literal with which those of its command are larger than this together is the caller's decision: see
    /// [`Event::Literal`].
    pub ask_above_bytes: u64,
    /// A non-synchronizing literal that is refused is read and dropped up to this size; a larger one ends the connection.
    pub drop_bytes_max: u64,
    /// LITERAL-: non-synchronizing literals over 4096 octets are refused (RFC 7888, 5).
    pub literal_minus: bool,
}

impl Limits {
    /// Before authentication: nothing that a client may send then is long.
    pub const fn not_authenticated() -> Self {
        Self {
            line_bytes_max: 8 * 1024,
            literals_max: 4,
            literal_bytes_max: 1024,
            append_bytes_max: 0,
            command_bytes_max: 4 * 1024,
            ask_above_bytes: u64::MAX,
            drop_bytes_max: 64 * 1024,
            literal_minus: false,
        }
    }

    /// After authentication, for messages of up to `append_bytes_max`.
    pub const fn authenticated(append_bytes_max: u64) -> Self {
        Self {
            line_bytes_max: 64 * 1024,
            literals_max: 256,
            literal_bytes_max: 64 * 1024,
            append_bytes_max,
            command_bytes_max: append_bytes_max.saturating_add(64 * 1024),
            ask_above_bytes: 64 * 1024,
            drop_bytes_max: append_bytes_max.saturating_mul(4),
            literal_minus: false,
        }
    }
}

/// Octets in pieces: what comes in slowly and may be large is never moved for want of room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Octets {
    pieces: Vec<Vec<u8>>,
    len: usize,
}

impl Octets {
    /// A literal's size is the client's claim. It is believed as far as a modest first piece; what is larger comes in more of these.
    const FIRST_BYTES_MAX: usize = 64 * 1024;
    const PIECE_BYTES: usize = 256 * 1024;

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The octets one after another. Those of more than one piece are copied.
    pub fn into_vec(mut self) -> Vec<u8> {
        if self.pieces.len() <= 1 {
            return self.pieces.pop().unwrap_or_default();
        }
        let mut all = Vec::with_capacity(self.len);
        // Each goes as soon as it has been copied.
        self.pieces.into_iter().for_each(|piece| all.extend_from_slice(&piece));
        all
    }

    fn held_bytes(&self) -> usize {
        self.pieces.iter().map(Vec::capacity).sum()
    }

    /// Appends octets, after which so many more are expected at most.
    fn extend(&mut self, mut octets: &[u8], mut expected: u64) {
        expected += octets.len() as u64;
        while !octets.is_empty() {
            let room = self.pieces.last().map_or(0, |piece| piece.capacity() - piece.len());
            if room == 0 {
                let most = if self.pieces.is_empty() { Self::FIRST_BYTES_MAX } else { Self::PIECE_BYTES };
                self.pieces.push(Vec::with_capacity(usize::try_from(expected).unwrap_or(usize::MAX).min(most)));
                continue;
            }
            let (now, rest) = octets.split_at(room.min(octets.len()));
            if let Some(piece) = self.pieces.last_mut() {
                piece.extend_from_slice(now);
            }
            self.len += now.len();
            expected -= now.len() as u64;
            octets = rest;
        }
    }
}

impl From<Vec<u8>> for Octets {
    fn from(octets: Vec<u8>) -> Self {
        Self { len: octets.len(), pieces: vec![octets] }
    }
}

/// A literal: its octets, apart from the line that announced it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Literal {
    pub bytes: Octets,
    /// `~{n}`: NUL is allowed in it (RFC 3516, 4.3).
    pub is_literal8: bool,
    /// There is a NUL in it, which is looked for as the octets come.
    pub has_nul: bool,
}

/// A complete command, not yet understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    /// The lines. Each but the last keeps its CRLF, so a literal stands here as `{n}` CRLF.
    pub text: Vec<u8>,
    /// The literals, in order of appearance.
    pub literals: Vec<Literal>,
}

/// What [`Framer::step`] stopped for.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// All input was taken. Send the output, then read more.
    NeedInput,
    Command(Frame),
    /// A literal is announced that is within the other limits, and with which the command's go over
    /// [`Limits::ask_above_bytes`]: answer with [`Framer::accept_literal`] or [`Framer::refuse_literal`].
    Literal {
        /// Of all literals of the command so far and of this one.
        command_bytes: u64,
    },
    /// Answer with this; the bad command is dropped.
    Refused(Refusal),
    /// Answer with BYE and this text, then close.
    Fatal(Refusal),
    /// The caller has not answered [`Event::Literal`].
    AnswerOwed,
}

/// What the client is expected to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    Command,
    /// A single line: a SASL response, or DONE. It announces no literals.
    Line,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Announced {
    bytes: u64,
    synchronizing: bool,
    is_literal8: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Line,
    Asked(Announced),
    Literal {
        missing: u64,
    },
    /// The command was answered already: skip to the end of its current line.
    DropLine,
    DropLiteral {
        missing: u64,
    },
    Closed,
}

/// Cuts the input into commands.
#[derive(Debug)]
pub struct Framer {
    limits: Limits,
    state: State,
    frame: Frame,
    literal_bytes: u64,
    /// The end of a line that is being dropped: as much as the announcement of a literal takes.
    tail: Vec<u8>,
}

/// The longest announcement that matters: `~{18446744073709551615+}` CRLF, and room for leading zeros.
const TAIL_BYTES_MAX: usize = 64;
/// Longer tags are not repeated.
const TAG_BYTES_MAX: usize = 256;

impl Framer {
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: State::Line, frame: Frame::default(), literal_bytes: 0, tail: Vec::new() }
    }

    /// Between commands only, as after a login.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Whether nothing of a next command has come yet.
    pub fn is_idle(&self) -> bool {
        self.state == State::Line && self.frame.text.is_empty()
    }

    /// Octets of the client's held in memory.
    pub fn held_bytes(&self) -> usize {
        self.frame.text.capacity() + self.frame.literals.iter().map(|l| l.bytes.held_bytes()).sum::<usize>()
    }

    /// The lines of the command so far: what a caller that is asked about a literal may look at.
    pub fn text(&self) -> &[u8] {
        &self.frame.text
    }

    /// Takes input until the caller has to do something: gives how many octets were taken, and what to do. Continuation
    /// requests for literals are appended to `output`. Input that was not taken is given again at the next step.
    pub fn step(&mut self, input: &[u8], expect: Expect, output: &mut Vec<u8>) -> (usize, Event) {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            match self.state {
                State::Line => {
                    let (taken, event) = self.take_line(rest, expect, output);
                    at += taken;
                    if let Some(event) = event {
                        return (at, event);
                    }
                }
                State::Literal { missing } => {
                    let taken = rest.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
                    if let Some(literal) = self.frame.literals.last_mut() {
                        literal.bytes.extend(&rest[..taken], missing - taken as u64);
                        literal.has_nul |= memchr(0, &rest[..taken]).is_some();
                    }
                    at += taken;
                    let missing = missing - taken as u64;
                    if missing > 0 {
                        self.state = State::Literal { missing };
                        return (at, Event::NeedInput);
                    }
                    self.state = State::Line;
                }
                State::DropLine => {
                    let taken = memchr(b'\n', rest).map_or(rest.len(), |i| i + 1);
                    at += taken;
                    self.keep_tail(&rest[..taken]);
                    if self.tail.last() != Some(&b'\n') {
                        return (at, Event::NeedInput);
                    }
                    let tail = std::mem::take(&mut self.tail);
                    let announced = tail.strip_suffix(b"\r\n").and_then(announced_literal);
                    if let Some(event) = self.drop_what_follows(announced) {
                        return (at, event);
                    }
                }
                State::DropLiteral { missing } => {
                    let taken = rest.len().min(usize::try_from(missing).unwrap_or(usize::MAX));
                    at += taken;
                    let missing = missing - taken as u64;
                    if missing > 0 {
                        self.state = State::DropLiteral { missing };
                        return (at, Event::NeedInput);
                    }
                    self.state = State::DropLine;
                }
                State::Asked(_) => return (at, Event::AnswerOwed),
                State::Closed => return (input.len(), Event::NeedInput),
            }
        }
    }

    /// The answer yes to [`Event::Literal`].
    pub fn accept_literal(&mut self, output: &mut Vec<u8>) {
        let State::Asked(announced) = self.state else { return };
        let bytes = Octets::default();
        self.frame.literals.push(Literal { bytes, is_literal8: announced.is_literal8, has_nul: false });
        self.literal_bytes += announced.bytes;
        self.state = State::Literal { missing: announced.bytes };
        if announced.synchronizing {
            write_continuation(output, "Ready for literal data");
        }
    }

    /// The answer no to [`Event::Literal`]: the command is answered with NO, `code` and `text`, and dropped. Gives the
    /// response, or a fatal one where too much would have to be read in vain.
    pub fn refuse_literal(&mut self, code: Option<Code<'static>>, text: &'static str) -> Event {
        let State::Asked(announced) = self.state else { return Event::AnswerOwed };
        let refusal = Refusal { tag: self.tag(), status: Status::No, code, text: text.into() };
        self.refuse(announced, refusal)
    }

    /// Gives up a literal that is coming in, and its command: it is answered with NO, `code` and `text`, and what is still to come
    /// of it is read and dropped. Gives the response, or a fatal one where that is too much. Between [`Event::NeedInput`] and the
    /// next step.
    pub fn abandon_literal(&mut self, code: Option<Code<'static>>, text: &'static str) -> Event {
        let refusal = Refusal { tag: self.tag(), status: Status::No, code, text: text.into() };
        let state = self.state;
        match state {
            State::Literal { missing } => {
                self.reset();
                // Whether it waited for a continuation or not, it has been told to send.
                let announced = Announced { bytes: missing, synchronizing: false, is_literal8: false };
                self.drop_what_follows(Some(announced)).unwrap_or(Event::Refused(refusal))
            }
            State::Line if !self.frame.literals.is_empty() => {
                self.reset();
                self.state = State::DropLine;
                Event::Refused(refusal)
            }
            _ => Event::NeedInput,
        }
    }

    /// Takes a line, or the beginning of one.
    fn take_line(&mut self, input: &[u8], expect: Expect, output: &mut Vec<u8>) -> (usize, Option<Event>) {
        let (taken, complete) = memchr(b'\n', input).map_or((input.len(), false), |i| (i + 1, true));
        let line = &input[..taken];
        if self.frame.text.len() + taken > self.limits.line_bytes_max {
            let mut start = std::mem::take(&mut self.frame.text);
            self.keep_tail(&start);
            start.extend_from_slice(&line[..line.len().min(TAG_BYTES_MAX)]);
            self.reset();
            self.state = State::DropLine; // from here on: nothing of `line` is taken yet
            return (0, Some(Event::Refused(Refusal::bad(tag_of(&start), "Command line too long"))));
        }
        self.frame.text.extend_from_slice(line);
        if !complete {
            return (taken, Some(Event::NeedInput));
        }
        let Some(text) = self.frame.text.strip_suffix(b"\r\n") else {
            let refusal = Refusal::bad(self.tag(), "Line must end with CRLF");
            self.reset();
            return (taken, Some(Event::Refused(refusal)));
        };
        let announced = if expect == Expect::Command { announced_literal(text) } else { None };
        let Some(announced) = announced else {
            let end = text.len();
            self.frame.text.truncate(end);
            let frame = std::mem::take(&mut self.frame);
            self.reset();
            return (taken, Some(Event::Command(frame)));
        };
        (taken, self.announce(announced, output))
    }

    /// Accepts a literal, asks the caller, or refuses it.
    fn announce(&mut self, announced: Announced, output: &mut Vec<u8>) -> Option<Event> {
        const LITERAL_MINUS_BYTES_MAX: u64 = 4096;
        let bytes = announced.bytes;
        let is_append = self.is_append();
        let limit = if is_append { self.limits.append_bytes_max } else { self.limits.literal_bytes_max };
        let too_big = bytes > limit || self.literal_bytes.saturating_add(bytes) > self.limits.command_bytes_max;
        let not_minus = self.limits.literal_minus && !announced.synchronizing && bytes > LITERAL_MINUS_BYTES_MAX;
        if self.frame.literals.len() >= self.limits.literals_max {
            let refusal = Refusal::bad(self.tag(), "Too many literals in one command");
            return Some(self.refuse(announced, refusal));
        }
        if not_minus || too_big {
            // TOOBIG belongs to APPEND (RFC 4469, 4.2; RFC 7889, 4); BAD only where RFC 7888, 5 asks for it.
            let status = if is_append && !not_minus { Status::No } else { Status::Bad };
            let code = is_append.then_some(Code::TooBig);
            let text = if not_minus { "Non-synchronizing literal over 4096 octets" } else { "Literal too large" };
            let refusal = Refusal { tag: self.tag(), status, code, text: text.into() };
            return Some(self.refuse(announced, refusal));
        }
        self.state = State::Asked(announced);
        let command_bytes = self.literal_bytes + bytes;
        if command_bytes > self.limits.ask_above_bytes {
            return Some(Event::Literal { command_bytes });
        }
        self.accept_literal(output);
        None
    }

    fn refuse(&mut self, announced: Announced, refusal: Refusal) -> Event {
        self.reset();
        if announced.synchronizing {
            return Event::Refused(refusal); // the client will not send it
        }
        self.drop_what_follows(Some(announced)).unwrap_or(Event::Refused(refusal))
    }

    /// Decides what still has to be dropped after a line of a command that was answered already.
    fn drop_what_follows(&mut self, announced: Option<Announced>) -> Option<Event> {
        self.state = match announced {
            Some(Announced { synchronizing: false, bytes, .. }) if bytes > self.limits.drop_bytes_max => {
                self.state = State::Closed;
                let code = Some(Code::TooBig);
                let text = "Literal too large".into();
                return Some(Event::Fatal(Refusal { tag: None, status: Status::Bye, code, text }));
            }
            Some(Announced { synchronizing: false, bytes, .. }) => State::DropLiteral { missing: bytes },
            // A client that waits for a continuation reads the tagged response instead: the command is over.
            _ => State::Line,
        };
        None
    }

    fn keep_tail(&mut self, line: &[u8]) {
        self.tail.extend_from_slice(&line[line.len().saturating_sub(TAIL_BYTES_MAX)..]);
        let excess = self.tail.len().saturating_sub(TAIL_BYTES_MAX);
        self.tail.drain(..excess);
    }

    fn reset(&mut self) {
        self.state = State::Line;
        self.frame.text.clear();
        self.frame.literals.clear();
        self.literal_bytes = 0;
    }

    fn tag(&self) -> Option<String> {
        tag_of(&self.frame.text)
    }

    fn is_append(&self) -> bool {
        let mut words = self.frame.text.split(|&b| b == b' ');
        words.nth(1).is_some_and(|word| word.eq_ignore_ascii_case(b"APPEND"))
    }
}

/// The tag at the beginning of a command, if there is one that can be repeated.
pub(crate) fn tag_of(text: &[u8]) -> Option<String> {
    let end = text.iter().take(TAG_BYTES_MAX).position(|&b| b == b' ' || b == b'\r')?;
    let tag = &text[..end];
    let ok = !tag.is_empty() && tag.iter().all(|&b| crate::command::is_astring_char(b) && b != b'+');
    ok.then(|| String::from_utf8_lossy(tag).into_owned())
}

/// The literal that a line, without its CRLF, announces at its end.
/// `literal = "{" number64 ["+"] "}" CRLF *CHAR8`, `literal8 = "~{" number ["+"] "}" CRLF *OCTET`
fn announced_literal(line: &[u8]) -> Option<Announced> {
    let inner = line.strip_suffix(b"}")?;
    let (inner, synchronizing) = match inner.strip_suffix(b"+") {
        Some(inner) => (inner, false),
        None => (inner, true),
    };
    let digits = inner.iter().rev().take_while(|b| b.is_ascii_digit()).count();
    let (before, digits) = inner.split_at(inner.len() - digits);
    let before = before.strip_suffix(b"{")?;
    if digits.is_empty() {
        return None;
    }
    // A number past u64 is past every limit, and its octets may follow all the same.
    let bytes = digits.iter().fold(0u64, |n, d| n.saturating_mul(10).saturating_add(u64::from(d - b'0')));
    Some(Announced { bytes, synchronizing, is_literal8: before.ends_with(b"~") })
}

#[cfg(test)]
mod tests;
