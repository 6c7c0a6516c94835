//! An IMAP server without mail: it takes every login and gives the same answers to everybody, as cheaply as can be.
//!
//! It knows enough for the load generator's workloads to run against it, which then show what the generator itself can do. It is
//! no measure of a server.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use tokio::net::TcpStream;

use crate::stream::{Input, Stream};

/// A command that is longer is none.
const COMMAND_OCTETS_MAX: usize = 64 << 10;
/// More FETCH responses to one command are not given.
const RESPONSES_MAX: u32 = 100_000;
const CAPABILITIES: &str =
    "IMAP4rev1 LITERAL+ SASL-IR ENABLE IDLE CONDSTORE QRESYNC UIDPLUS MOVE ESEARCH NAMESPACE SPECIAL-USE";
const BODY: &str = "From: a@example.net\r\nSubject: nothing\r\n\r\nNothing.\r\n";

/// What every mailbox seems to be like.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mailbox {
    pub messages: u32,
    /// Messages, from the first on, that seem to have changed since whenever a client asks.
    pub changed: u32,
}

/// Serves one connection until it ends.
///
/// # Errors
/// The connection.
pub async fn connection(stream: TcpStream, mailbox: Mailbox) -> io::Result<()> {
    let mut stream = Stream::Tcp(stream);
    let mut input = Input::default();
    let mut output = format!("* OK [CAPABILITY {CAPABILITIES}] sink\r\n").into_bytes();
    let mut session = Session { mailbox, ..Session::default() };
    while !session.over {
        while let Some(used) = session.step(input.unused(), &mut output)? {
            input.consume(used);
        }
        stream.write_all(&output).await?;
        output.clear();
        if !session.over {
            stream.read_into(&mut input).await?;
        }
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Session {
    mailbox: Mailbox,
    /// Octets of a literal that are to come and do not matter.
    literal: usize,
    /// The first line of a command that goes on after a literal.
    begun: Option<Vec<u8>>,
    /// The tag of IDLE.
    idle: Option<Vec<u8>>,
    over: bool,
}

impl Session {
    /// Takes one line or a piece of a literal from the start of `input` and returns its length; `None` if more is needed.
    fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> io::Result<Option<usize>> {
        if self.over || input.is_empty() {
            return Ok(None);
        }
        if self.literal > 0 {
            let used = self.literal.min(input.len());
            self.literal -= used;
            return Ok(Some(used));
        }
        let Some(end) = memchr::memchr(b'\n', input) else {
            return if input.len() > COMMAND_OCTETS_MAX { Err(io::ErrorKind::InvalidData.into()) } else { Ok(None) };
        };
        let line = input[..end].trim_ascii_end();
        if let Some((octets, waits)) = literal(line) {
            if waits {
                output.extend_from_slice(b"+ go\r\n");
            }
            self.literal = octets;
            self.begun.get_or_insert_with(|| line.to_vec());
        } else if let Some(begun) = self.begun.take() {
            self.command(&begun, output);
        } else if let Some(tag) = self.idle.take_if(|_| line.eq_ignore_ascii_case(b"DONE")) {
            done(&tag, "OK", output);
        } else {
            self.command(line, output);
        }
        Ok(Some(end + 1))
    }

    fn command(&mut self, line: &[u8], output: &mut Vec<u8>) {
        let text = String::from_utf8_lossy(line);
        let (tag, rest) = first_word(&text);
        let (mut name, mut arguments) = first_word(rest);
        if name.eq_ignore_ascii_case("UID") {
            (name, arguments) = first_word(arguments);
        }
        let is = |command: &str| name.eq_ignore_ascii_case(command);
        let mut put = |text: &str| output.extend_from_slice(text.as_bytes());
        match () {
            // The most frequent first.
            () if is("NOOP") => {}
            () if is("LOGIN") => return done(tag.as_bytes(), &format!("OK [CAPABILITY {CAPABILITIES}]"), output),
            () if is("FETCH") => self.fetch(arguments, output),
            () if is("SELECT") || is("EXAMINE") => {
                let (count, next) = (self.mailbox.messages, self.mailbox.messages + 1);
                let text = format!(
                    "* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft)\r\n* {count} EXISTS\r\n* 0 RECENT\r\n\
                     * OK [PERMANENTFLAGS (\\*)] x\r\n* OK [UIDVALIDITY 1] x\r\n* OK [UIDNEXT {next}] x\r\n\
                     * OK [HIGHESTMODSEQ 1] x\r\n"
                );
                put(&text);
                if arguments.to_ascii_uppercase().contains("(QRESYNC ") {
                    self.changes(output);
                }
            }
            () if is("STATUS") => {
                let (mailbox, items) = arguments.rsplit_once(" (").unwrap_or((arguments, ""));
                let value = |item: &str| match item {
                    "MESSAGES" => self.mailbox.messages,
                    "UIDNEXT" => self.mailbox.messages + 1,
                    "UIDVALIDITY" | "HIGHESTMODSEQ" => 1,
                    _ => 0,
                };
                let items = items.trim_end_matches(')').split(' ');
                let told: Vec<String> = items.map(|item| format!("{item} {}", value(item))).collect();
                put(&format!("* STATUS {mailbox} ({})\r\n", told.join(" ")));
            }
            () if is("STORE") && !arguments.to_ascii_uppercase().contains(".SILENT") => {
                for number in self.set(arguments) {
                    // Writing to memory does not fail.
                    let _ = write!(output, "* {number} FETCH (UID {number} FLAGS (\\Seen) MODSEQ (1))\r\n");
                }
            }
            () if is("SEARCH") => put("* SEARCH 1\r\n"),
            () if is("CAPABILITY") => put(&format!("* CAPABILITY {CAPABILITIES}\r\n")),
            () if is("ENABLE") => put("* ENABLED CONDSTORE QRESYNC\r\n"),
            () if is("LIST") => put("* LIST () \"/\" INBOX\r\n"),
            () if is("NAMESPACE") => put("* NAMESPACE ((\"\" \"/\")) NIL NIL\r\n"),
            () if is("IDLE") => {
                put("+ idling\r\n");
                self.idle = Some(tag.as_bytes().to_vec());
                return;
            }
            () if is("LOGOUT") => {
                put("* BYE sink\r\n");
                self.over = true;
            }
            () => {}
        }
        let code = if is("APPEND") { "OK [APPENDUID 1 1]" } else { "OK" };
        done(tag.as_bytes(), code, output);
    }

    fn fetch(&self, arguments: &str, output: &mut Vec<u8>) {
        let items = arguments.to_ascii_uppercase();
        if items.contains("CHANGEDSINCE") {
            return self.changes(output);
        }
        let mut rest = String::from(" FLAGS () MODSEQ (1)");
        if items.contains("RFC822.SIZE") {
            let _ = write!(rest, " RFC822.SIZE {}", BODY.len());
        }
        if items.contains("BODY") || items.contains("RFC822 ") || items.contains("ENVELOPE") {
            let _ = write!(rest, " BODY[] {{{}}}\r\n{BODY}", BODY.len());
        }
        for number in self.set(arguments) {
            let _ = write!(output, "* {number} FETCH (UID {number}{rest})\r\n");
        }
    }

    /// What has changed, later than any client knows.
    fn changes(&self, output: &mut Vec<u8>) {
        for number in 1..=self.mailbox.changed.min(self.mailbox.messages) {
            let _ = write!(output, "* {number} FETCH (UID {number} FLAGS (\\Flagged) MODSEQ (2))\r\n");
        }
    }

    /// The messages of a set of one range, with which the arguments begin.
    fn set(&self, arguments: &str) -> std::ops::Range<u32> {
        let number = |text: &str| if text == "*" { Some(self.mailbox.messages) } else { text.parse().ok() };
        let set = arguments.split([' ', ',']).next().unwrap_or_default();
        let (first, last) = set.split_once(':').unwrap_or((set, set));
        match (number(first), number(last)) {
            (Some(first), Some(last)) => {
                let (first, last) = (first.min(last).max(1), first.max(last).min(self.mailbox.messages));
                first..(last + 1).min(first.saturating_add(RESPONSES_MAX)).max(first)
            }
            _ => 0..0,
        }
    }
}

fn first_word(text: &str) -> (&str, &str) {
    text.split_once(' ').unwrap_or((text, ""))
}

fn done(tag: &[u8], code: &str, output: &mut Vec<u8>) {
    for part in [tag, b" ", code.as_bytes(), b" done\r\n"] {
        output.extend_from_slice(part);
    }
}

/// The octets of a literal that a line announces, and whether the client waits to be told to go on (RFC 7888).
fn literal(line: &[u8]) -> Option<(usize, bool)> {
    let inner = line.strip_suffix(b"}")?;
    let (inner, waits) = inner.strip_suffix(b"+").map_or((inner, true), |inner| (inner, false));
    let open = memchr::memrchr(b'{', inner)?;
    Some((str::from_utf8(&inner[open + 1..]).ok()?.parse().ok()?, waits))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(input: &[u8], piece: usize) -> String {
        let mut session = Session { mailbox: Mailbox { messages: 3, changed: 2 }, ..Session::default() };
        let (mut all, mut output) = (Vec::new(), Vec::new());
        for piece in input.chunks(piece) {
            all.extend_from_slice(piece);
            while let Some(used) = session.step(&all, &mut output).unwrap() {
                all.drain(..used);
            }
        }
        assert!(all.is_empty() && session.over);
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn commands_are_answered() {
        let input = b"a LOGIN u p\r\nb select INBOX\r\nc UID FETCH 2:* (FLAGS)\r\nd APPEND x {5}\r\n\r\na b\r\n\
            e APPEND x {3+}\r\na\nb (\r\nf IDLE\r\nDONE\r\ng STATUS \"a b\" (MESSAGES)\r\nh LOGOUT\r\n";
        let output = talk(input, input.len());
        for piece in [1, 2, 7] {
            assert_eq!(talk(input, piece), output);
        }
        let tagged: Vec<_> =
            output.lines().filter(|line| !line.starts_with('*') && line.get(1..4) == Some(" OK")).collect();
        assert_eq!(tagged.len(), 8, "{output}");
        assert!(
            output.contains("* 3 EXISTS\r\n") && output.contains("* 2 FETCH (UID 2 ") && output.contains("* 3 FETCH")
        );
        assert!(!output.contains("* 1 FETCH") && !output.contains("* 4 FETCH"));
        assert!(output.contains("+ go\r\nd OK [APPENDUID 1 1]") && output.contains("+ idling\r\nf OK done\r\n"));
        assert!(output.contains("* STATUS \"a b\" (MESSAGES 3)\r\n"));
    }

    #[test]
    fn what_has_changed_is_told() {
        for command in ["SELECT x (QRESYNC (1 1))", "UID FETCH 1:* (FLAGS) (CHANGEDSINCE 1)"] {
            let output = talk(format!("a {command}\r\nb LOGOUT\r\n").as_bytes(), 1);
            assert_eq!(output.matches("MODSEQ (2)").count(), 2, "{output}");
        }
    }

    #[test]
    fn what_has_no_end_is_an_error() {
        let mut session = Session::default();
        assert!(session.step(&vec![b'a'; COMMAND_OCTETS_MAX + 1], &mut Vec::new()).is_err());
    }
}
