//! An IMAP client (RFC 9051, RFC 3501): responses without a socket, and a client on one.

use std::fmt;
use std::io;
use std::ops::Range;

use crate::stream::{Connector, Input, Stream};

/// One response with its literals, without its last line end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response<'a> {
    pub bytes: &'a [u8],
    /// Where the contents of literals are in `bytes`.
    pub literals: &'a [Range<usize>],
}

impl<'a> Response<'a> {
    /// The rest of a response that begins so, without regard to case.
    pub fn after(&self, start: &str) -> Option<&'a [u8]> {
        let (head, rest) = self.bytes.split_at_checked(start.len())?;
        head.eq_ignore_ascii_case(start.as_bytes()).then_some(rest)
    }

    /// The number of an untagged response `* NUMBER NAME`, and what follows NAME and a space.
    pub fn numbered(&self, name: &str) -> Option<(u32, &'a [u8])> {
        let rest = self.bytes.strip_prefix(b"* ")?;
        let digits = rest.iter().take_while(|octet| octet.is_ascii_digit()).count();
        let number = str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        let rest = rest[digits..].strip_prefix(b" ")?;
        let (found, rest) = rest.split_at_checked(name.len())?;
        if !found.eq_ignore_ascii_case(name.as_bytes()) {
            return None;
        }
        match rest.split_first() {
            None => Some((number, rest)),
            Some((b' ', rest)) => Some((number, rest)),
            Some(_) => None,
        }
    }

    /// The text for people.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(200)]).into_owned()
    }
}

/// Finds one response at the start of `input`: its length with the last line end. `None` if more is needed. `progress`
/// and `literals` must be empty at first and are kept between calls for the same response.
///
/// # Errors
/// What is there is no response.
pub fn parse_response(
    input: &[u8],
    progress: &mut usize,
    literals: &mut Vec<Range<usize>>,
) -> Result<Option<usize>, String> {
    const LINE_OCTETS_MAX: usize = 8 << 20;
    loop {
        let line_start = *progress;
        let Some(line) = input.get(line_start..) else { return Ok(None) };
        let Some(end) = memchr::memchr(b'\n', line) else {
            return if line.len() > LINE_OCTETS_MAX { Err("a response without an end".to_owned()) } else { Ok(None) };
        };
        let bad = |what| format!("{what}: {:?}", String::from_utf8_lossy(&line[..(end + 1).min(200)]));
        let line = &line[..=end];
        let text = line.strip_suffix(b"\r\n").ok_or_else(|| bad("a line that ends without CR"))?;
        if memchr::memchr2(b'\r', 0, text).is_some() {
            return Err(bad("CR or NUL in a line"));
        }
        let literal = if line_start == 0 && is_text(text) { None } else { literal_octets(text) };
        match literal {
            None => return Ok(Some(line_start + end + 1)),
            Some(octets) => {
                let start = line_start + end + 1;
                *progress = start + octets;
                literals.push(start..*progress);
            }
        }
    }
}

/// Whether a response is free text at its end, in which braces mean nothing.
fn is_text(line: &[u8]) -> bool {
    let rest = line.strip_prefix(b"* ");
    let Some(rest) = rest else { return true };
    let word = rest.split(|&octet| octet == b' ').next().unwrap_or_default();
    [&b"OK"[..], b"NO", b"BAD", b"BYE", b"PREAUTH"].iter().any(|status| word.eq_ignore_ascii_case(status))
}

fn literal_octets(line: &[u8]) -> Option<usize> {
    let inner = line.strip_suffix(b"}")?;
    let open = memchr::memrchr(b'{', inner)?;
    let digits = str::from_utf8(&inner[open + 1..]).ok()?;
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse().ok().filter(|&octets| octets <= 1 << 31)
}

/// Checks that the data of a FETCH response is one well-formed parenthesised list, and returns the octets of strings.
///
/// # Errors
/// What is wrong with it.
pub fn check_fetch(response: &Response<'_>, list: &[u8]) -> Result<usize, String> {
    let base = response.bytes.len() - list.len();
    let (mut at, mut depth, mut octets) = (0, 0_u32, 0);
    let mut literals = response.literals.iter();
    while at < list.len() {
        match list[at] {
            b'(' => depth += 1,
            b')' => {
                depth = depth.checked_sub(1).ok_or("a parenthesis closes that was not open")?;
                if depth == 0 && at + 1 != list.len() {
                    return Err(format!("something follows the list: {:?}", response.text()));
                }
            }
            b'"' => {
                let start = at + 1;
                at = start;
                loop {
                    match list.get(at) {
                        Some(b'\\') => at += 2,
                        Some(b'"') => break,
                        Some(b'\r' | b'\n' | 0) | None => return Err("a quoted string has no end".to_owned()),
                        Some(_) => at += 1,
                    }
                }
                octets += at - start;
            }
            b'{' => {
                let literal = literals.next().ok_or("a brace that is no literal")?;
                octets += literal.len();
                at = literal.end - base;
                continue;
            }
            b'\r' | b'\n' | 0 => return Err(format!("a control character in {:?}", response.text())),
            _ => {}
        }
        if depth == 0 && at + 1 != list.len() {
            return Err(format!("the data is no list: {:?}", response.text()));
        }
        at += 1;
    }
    if depth == 0 && !list.is_empty() { Ok(octets) } else { Err(format!("a list has no end: {:?}", response.text())) }
}

/// Why something over IMAP failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImapError {
    Io(io::ErrorKind),
    Protocol(String),
    /// NO, BAD or BYE: the command, and the response.
    Refused(&'static str, String),
}

impl ImapError {
    /// A short name to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Io(kind) => kind.to_string(),
            Self::Protocol(_) => "protocol violation".to_owned(),
            Self::Refused(command, _) => format!("{command} refused"),
        }
    }
}

impl fmt::Display for ImapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(kind) => write!(f, "{kind}"),
            Self::Protocol(what) => f.write_str(what),
            Self::Refused(command, line) => write!(f, "{line:?} after {command}"),
        }
    }
}

impl From<io::Error> for ImapError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind())
    }
}

/// A connection.
pub struct Client {
    stream: Stream,
    input: Input,
    literals: Vec<Range<usize>>,
    output: Vec<u8>,
    next_tag: u32,
}

impl Client {
    /// Connects and waits for the greeting.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn connect(connector: &Connector) -> Result<Self, ImapError> {
        let stream = Stream::connect(connector).await?;
        let mut client =
            Self { stream, input: Input::default(), literals: Vec::new(), output: Vec::new(), next_tag: 1 };
        let greeting = client.response().await?;
        if greeting.after("* OK").is_none() {
            return Err(ImapError::Refused("connecting", greeting.text()));
        }
        Ok(client)
    }

    /// # Errors
    /// The connection, or what the server says.
    pub async fn login(&mut self, user: &str, password: &str) -> Result<(), ImapError> {
        let line = format!("LOGIN {} {}", quote(user), quote(password));
        self.command("LOGIN", &line, |_| Ok(())).await
    }

    /// Selects a mailbox and returns the number of its messages.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn select(&mut self, mailbox: &str, read_only: bool) -> Result<u32, ImapError> {
        let mut exists = None;
        let name = if read_only { "EXAMINE" } else { "SELECT" };
        self.command(name, &format!("{name} {}", quote(mailbox)), |response| {
            exists = response.numbered("EXISTS").map(|(number, _)| number).or(exists);
            Ok(())
        })
        .await?;
        exists.ok_or_else(|| ImapError::Protocol("no EXISTS after SELECT".to_owned()))
    }

    /// Sends a command and gives its untagged responses to `untagged`, until its tagged one.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn command(
        &mut self,
        name: &'static str,
        line: &str,
        mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<(), ImapError> {
        let tag = self.send(line).await?;
        loop {
            let response = self.response().await?;
            if response.bytes.starts_with(b"* ") {
                if response.after("* BYE").is_some() && name != "LOGOUT" {
                    return Err(ImapError::Refused(name, response.text()));
                }
                untagged(&response).map_err(ImapError::Protocol)?;
                continue;
            }
            return match response.after(&format!("{tag} ")) {
                Some(rest) if rest.get(..3).is_some_and(|word| word.eq_ignore_ascii_case(b"OK ")) => Ok(()),
                Some(_) => Err(ImapError::Refused(name, response.text())),
                None => Err(ImapError::Protocol(format!("unexpected {:?}", response.text()))),
            };
        }
    }

    /// Sends a command so many times at once, and waits until each is answered with OK. Returns the octets of the answers.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn commands(&mut self, name: &'static str, line: &str, count: u32) -> Result<u64, ImapError> {
        use std::io::Write as _;
        let first = self.next_tag;
        self.next_tag += count;
        self.output.clear();
        for tag in first..self.next_tag {
            write!(self.output, "b{tag} {line}\r\n")?;
        }
        self.stream.write_all(&self.output).await?;
        let (mut octets, mut tag) = (0, String::new());
        for number in first..first + count {
            tag.clear();
            let _ = fmt::Write::write_fmt(&mut tag, format_args!("b{number} "));
            loop {
                let response = self.response().await?;
                octets += response.bytes.len() as u64 + 2;
                match response.after(&tag) {
                    Some(rest) if rest.get(..3).is_some_and(|word| word.eq_ignore_ascii_case(b"OK ")) => break,
                    Some(_) => return Err(ImapError::Refused(name, response.text())),
                    None if response.after("* BYE").is_some() => {
                        return Err(ImapError::Refused(name, response.text()));
                    }
                    None if response.bytes.starts_with(b"* ") => {}
                    None => return Err(ImapError::Protocol(format!("unexpected {:?}", response.text()))),
                }
            }
        }
        Ok(octets)
    }

    /// Sends IDLE and waits for the continuation.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn idle(&mut self) -> Result<(), ImapError> {
        self.send("IDLE").await?;
        loop {
            let response = self.response().await?;
            if response.bytes.starts_with(b"+") {
                return Ok(());
            }
            if !response.bytes.starts_with(b"* ") {
                return Err(ImapError::Refused("IDLE", response.text()));
            }
        }
    }

    /// Ends IDLE.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn done(&mut self) -> Result<(), ImapError> {
        self.stream.write_all(b"DONE\r\n").await?;
        loop {
            let response = self.response().await?;
            if !response.bytes.starts_with(b"* ") {
                return Ok(());
            }
        }
    }

    /// Ends the connection as the protocol wants it.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn logout(mut self) -> Result<(), ImapError> {
        self.command("LOGOUT", "LOGOUT", |_| Ok(())).await
    }

    async fn send(&mut self, line: &str) -> Result<String, ImapError> {
        let tag = format!("b{}", self.next_tag);
        self.next_tag += 1;
        self.output.clear();
        for part in [&tag, " ", line, "\r\n"] {
            self.output.extend_from_slice(part.as_bytes());
        }
        self.stream.write_all(&self.output).await?;
        Ok(tag)
    }

    /// Whether its TLS session was resumed.
    pub fn is_resumed(&self) -> bool {
        self.stream.is_resumed()
    }

    /// Waits for the next response.
    ///
    /// # Errors
    /// The connection, or what comes is no response.
    pub async fn response(&mut self) -> Result<Response<'_>, ImapError> {
        let mut progress = 0;
        self.literals.clear();
        loop {
            let found = parse_response(self.input.unused(), &mut progress, &mut self.literals);
            match found.map_err(ImapError::Protocol)? {
                Some(length) => {
                    self.input.consume(length);
                    let bytes = self.input.last_used(length);
                    return Ok(Response { bytes: &bytes[..length - 2], literals: &self.literals });
                }
                None => self.stream.read_into(&mut self.input).await?,
            }
        }
    }
}

/// A quoted string (RFC 9051, 9).
pub fn quote(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(input: &[u8]) -> Result<Option<(usize, Vec<Range<usize>>)>, String> {
        let (mut progress, mut literals) = (0, Vec::new());
        // Octet by octet must come to the same.
        for end in 0..=input.len() {
            if let Some(length) = parse_response(&input[..end], &mut progress, &mut literals)? {
                return Ok(Some((length, literals)));
            }
        }
        Ok(None)
    }

    fn bounds(input: &[u8]) -> Result<Option<(usize, Vec<(usize, usize)>)>, String> {
        let found = parse(input)?;
        Ok(found.map(|(length, literals)| (length, literals.iter().map(|at| (at.start, at.end)).collect())))
    }

    #[test]
    fn responses_end_after_their_literals() {
        assert_eq!(bounds(b"* OK hello {3}\r\nabc"), Ok(Some((16, vec![]))));
        assert_eq!(bounds(b"* 1 FETCH (BODY[] {3}\r\na\r\n)\r\nrest"), Ok(Some((29, vec![(23, 26)]))));
        assert_eq!(bounds(b"* 1 FETCH (BODY[] {30}\r\na\r\n)\r\nrest"), Ok(None));
        assert_eq!(bounds(b"* 1 FETCH (A ~{0}\r\n B {1}\r\nx)\r\n"), Ok(Some((31, vec![(19, 19), (27, 28)]))));
        assert!(bounds(b"* 1 EXISTS\n").is_err());
        assert!(bounds(b"* 1 EX\rISTS\r\n").is_err());
    }

    #[test]
    fn fetch_data_is_checked() {
        let check = |text: &[u8]| {
            let (length, literals) = parse(text)?.ok_or("more")?;
            let response = Response { bytes: &text[..length - 2], literals: &literals };
            let (_, list) = response.numbered("FETCH").ok_or("no FETCH")?;
            check_fetch(&response, list)
        };
        assert_eq!(
            check(b"* 1 FETCH (UID 3 BODY[] {3}\r\n(((\r\n"),
            Err("a list has no end: \"* 1 FETCH (UID 3 BODY[] {3}\\r\\n(((\"".into())
        );
        assert_eq!(check(b"* 1 FETCH (UID 3 BODY[] {3}\r\n((()\r\n"), Ok(3));
        assert_eq!(check(b"* 1 FETCH (X \"a)\\\"\" Y (NIL))\r\n"), Ok(4));
        assert!(check(b"* 1 FETCH (UID 3) x\r\n").is_err());
        assert!(check(b"* 1 FETCH UID 3\r\n").is_err());
        assert!(check(b"* 1 FETCH (UID 3))\r\n").is_err());
        assert!(check(b"* 1 FETCH (X \"a)\r\n").is_err());
    }
}
