//! An IMAP client (RFC 9051, RFC 3501): responses without a socket, and a client on one.

use std::fmt;
use std::io::{self, Write};
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
    /// What the server said is well formed and cannot be true: what is wrong, in a few words to count by, and the details.
    Wrong(&'static str, String),
}

impl ImapError {
    /// A short name to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Io(kind) => kind.to_string(),
            Self::Protocol(_) => "protocol violation".to_owned(),
            Self::Refused(command, _) => format!("{command} refused"),
            Self::Wrong(what, _) => (*what).to_owned(),
        }
    }

    /// Whether the connection can be used further.
    pub fn leaves_connection(&self) -> bool {
        match self {
            Self::Refused(_, line) => !line.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("* BYE")),
            Self::Wrong(..) => true,
            Self::Io(_) | Self::Protocol(_) => false,
        }
    }
}

impl fmt::Display for ImapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(kind) => write!(f, "{kind}"),
            Self::Protocol(what) => f.write_str(what),
            Self::Refused(command, line) => write!(f, "{line:?} after {command}"),
            Self::Wrong(what, details) => write!(f, "{what}: {details}"),
        }
    }
}

impl From<io::Error> for ImapError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind())
    }
}

/// What a server says that it can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// In capitals, with spaces between them.
    names: String,
}

impl Capabilities {
    /// Reads the names that stand after CAPABILITY and a space.
    pub fn parse(names: &[u8]) -> Self {
        let mut names = String::from_utf8_lossy(names).into_owned();
        names.make_ascii_uppercase();
        Self { names }
    }

    fn remove(&mut self, name: &str) {
        let others = self.names.split_ascii_whitespace().filter(|other| !other.eq_ignore_ascii_case(name));
        self.names = others.collect::<Vec<_>>().join(" ");
    }

    /// Whether it has a capability, whose name is in capitals.
    pub fn has(&self, name: &str) -> bool {
        self.names.split_ascii_whitespace().any(|other| other == name)
    }
}

/// What a mailbox was like when it was selected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selected {
    pub exists: u32,
    pub uid_validity: Option<u32>,
    pub uid_next: Option<u32>,
    /// Without it the mailbox keeps no mod-sequences (RFC 7162, 3.1.2.2).
    pub highest_modseq: Option<u64>,
}

impl Selected {
    /// Takes what an untagged response to SELECT tells.
    fn take(&mut self, response: &Response<'_>, exists: &mut Option<u32>) {
        if let Some((number, _)) = response.numbered("EXISTS") {
            *exists = Some(number);
        } else if let Some(code) = response.after("* OK [") {
            let code = code.split(|&octet| octet == b']').next().unwrap_or_default();
            let mut words = code.split(|&octet| octet == b' ');
            let (Some(name), Some(number)) = (words.next(), words.next()) else { return };
            let number = str::from_utf8(number).ok().and_then(|digits| digits.parse::<u64>().ok());
            let small = number.and_then(|number| u32::try_from(number).ok());
            if name.eq_ignore_ascii_case(b"UIDVALIDITY") {
                self.uid_validity = small;
            } else if name.eq_ignore_ascii_case(b"UIDNEXT") {
                self.uid_next = small;
            } else if name.eq_ignore_ascii_case(b"HIGHESTMODSEQ") {
                self.highest_modseq = number;
            }
        }
    }
}

/// How the octets of a literal may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LiteralKind {
    Waiting,
    NotWaiting,
}

/// A connection.
pub struct Client {
    stream: Stream,
    input: Input,
    literals: Vec<Range<usize>>,
    output: Vec<u8>,
    next_tag: u32,
    /// As the server has told them since the login.
    capabilities: Option<Capabilities>,
    /// Capabilities of which it makes no use.
    without: Vec<String>,
}

impl Client {
    /// Connects and waits for the greeting.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn connect(connector: &Connector) -> Result<Self, ImapError> {
        let stream = Stream::connect(connector).await?;
        let mut client = Self {
            stream,
            input: Input::default(),
            literals: Vec::new(),
            output: Vec::new(),
            next_tag: 1,
            capabilities: None,
            without: Vec::new(),
        };
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
        let mut told = None;
        let code = self
            .run("LOGIN", &line, |response| {
                told = response.after("* CAPABILITY ").map(Capabilities::parse).or(told.take());
                Ok(())
            })
            .await?;
        let in_code = code.as_deref().and_then(|code| code_after(code, "CAPABILITY"));
        self.told(in_code.map(|names| Capabilities::parse(names.as_bytes())).or(told));
        Ok(())
    }

    /// Does from now on as if the server did not have some capabilities.
    pub fn do_without(&mut self, names: &[String]) {
        self.without = names.to_vec();
        let told = self.capabilities.take();
        self.told(told);
    }

    fn told(&mut self, mut capabilities: Option<Capabilities>) {
        if let Some(capabilities) = &mut capabilities {
            self.without.iter().for_each(|name| capabilities.remove(name));
        }
        self.capabilities = capabilities;
    }

    /// What the server can do. If it did not say so at the login, it is asked.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn capabilities(&mut self) -> Result<&Capabilities, ImapError> {
        if self.capabilities.is_none() {
            let mut told = None;
            self.run("CAPABILITY", "CAPABILITY", |response| {
                told = response.after("* CAPABILITY ").map(Capabilities::parse).or(told.take());
                Ok(())
            })
            .await?;
            self.told(told);
        }
        self.capabilities.as_ref().ok_or_else(|| ImapError::Protocol("no CAPABILITY response".to_owned()))
    }

    /// Selects a mailbox and returns the number of its messages.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn select(&mut self, mailbox: &str, read_only: bool) -> Result<u32, ImapError> {
        let name = if read_only { "EXAMINE" } else { "SELECT" };
        Ok(self.open(name, mailbox, "", |_| Ok(())).await?.exists)
    }

    /// Selects a mailbox by SELECT or EXAMINE with parameters (a list in parentheses, or nothing), and gives responses other than
    /// those about the mailbox to `untagged`.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn open(
        &mut self,
        name: &'static str,
        mailbox: &str,
        parameters: &str,
        mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<Selected, ImapError> {
        let (mut selected, mut exists) = (Selected::default(), None);
        let space = if parameters.is_empty() { "" } else { " " };
        self.run(name, &format!("{name} {}{space}{parameters}", quote(mailbox)), |response| {
            selected.take(response, &mut exists);
            untagged(response)
        })
        .await?;
        selected.exists = exists.ok_or_else(|| ImapError::Protocol(format!("no EXISTS after {name}")))?;
        Ok(selected)
    }

    /// Makes a mailbox, if there is none of the name.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn create(&mut self, mailbox: &str) -> Result<(), ImapError> {
        if self.has(mailbox).await? {
            return Ok(());
        }
        match self.run("CREATE", &format!("CREATE {}", quote(mailbox)), |_| Ok(())).await {
            // Another connection may have made it meanwhile.
            Err(ImapError::Refused(..)) if self.has(mailbox).await? => Ok(()),
            result => result.map(drop),
        }
    }

    /// Whether there is a mailbox.
    async fn has(&mut self, mailbox: &str) -> Result<bool, ImapError> {
        let mut found = false;
        self.run("LIST", &format!("LIST \"\" {}", quote(mailbox)), |response| {
            found |= response.after("* LIST ").is_some();
            Ok(())
        })
        .await?;
        Ok(found)
    }

    /// Sends a command and gives its untagged responses to `untagged`, until its tagged one.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn command(
        &mut self,
        name: &'static str,
        line: &str,
        untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<(), ImapError> {
        self.run(name, line, untagged).await.map(drop)
    }

    /// As [`Client::command`]; returns the response code of the tagged OK without its brackets.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn run(
        &mut self,
        name: &'static str,
        line: &str,
        untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<Option<String>, ImapError> {
        let tag = self.put(line);
        self.flush().await?;
        self.completed(name, tag, untagged).await
    }

    /// Sends commands together and waits until all are completed. They must not depend on each other (RFC 3501, 5.5).
    ///
    /// # Errors
    /// The connection; what the server says to the first that fails, after all are completed; or what `untagged` finds.
    pub async fn run_together(
        &mut self,
        name: &'static str,
        lines: &[String],
        mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<(), ImapError> {
        let mut waiting: Vec<u32> = lines.iter().map(|line| self.put(line)).collect();
        self.flush().await?;
        let mut refused = None;
        while !waiting.is_empty() {
            let response = self.response().await?;
            match progress(name, &response)? {
                Progress::Untagged => untagged(&response).map_err(ImapError::Protocol)?,
                Progress::Tagged(tag, result) => {
                    let Some(at) = waiting.iter().position(|&waits| waits == tag) else {
                        return Err(ImapError::Protocol(format!("unexpected {:?}", response.text())));
                    };
                    waiting.remove(at);
                    refused = refused.or(result.err());
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Appends a message; `flags` are in parentheses, or nothing. Returns the response code without its brackets, which has the
    /// UID if the server has UIDPLUS. The literal waits for the server unless this announced LITERAL+ or LITERAL- (RFC 7888).
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn append(
        &mut self,
        mailbox: &str,
        flags: &str,
        message: &[u8],
        untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<Option<String>, ImapError> {
        /// RFC 7888, 5.
        const LITERAL_MINUS_OCTETS_MAX: usize = 4096;
        let capabilities = self.capabilities().await?;
        let small = message.len() <= LITERAL_MINUS_OCTETS_MAX;
        let kind = match capabilities.has("LITERAL+") || capabilities.has("LITERAL-") && small {
            true => LiteralKind::NotWaiting,
            false => LiteralKind::Waiting,
        };
        let space = if flags.is_empty() { "" } else { " " };
        let plus = if kind == LiteralKind::NotWaiting { "+" } else { "" };
        let octets = message.len();
        let tag = self.put(&format!("APPEND {}{space}{flags} {{{octets}{plus}}}", quote(mailbox)));
        if kind == LiteralKind::Waiting {
            self.flush().await?;
            loop {
                let response = self.response().await?;
                if response.bytes.starts_with(b"+") {
                    break;
                }
                match progress("APPEND", &response)? {
                    Progress::Untagged => {}
                    Progress::Tagged(_, Err(error)) => return Err(error),
                    Progress::Tagged(..) => {
                        return Err(ImapError::Protocol(format!("unexpected {:?}", response.text())));
                    }
                }
            }
        }
        self.output.extend_from_slice(message);
        self.output.extend_from_slice(b"\r\n");
        self.flush().await?;
        self.completed("APPEND", tag, untagged).await
    }

    /// Reads until a command is completed.
    async fn completed(
        &mut self,
        name: &'static str,
        tag: u32,
        mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<Option<String>, ImapError> {
        loop {
            let response = self.response().await?;
            match progress(name, &response)? {
                Progress::Untagged => untagged(&response).map_err(ImapError::Protocol)?,
                Progress::Tagged(found, result) if found == tag => return result,
                Progress::Tagged(..) => {
                    return Err(ImapError::Protocol(format!("unexpected {:?}", response.text())));
                }
            }
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
        self.idle_with(|_| Ok(())).await
    }

    /// As [`Client::idle`]; gives untagged responses to `untagged`.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn idle_with(
        &mut self,
        mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<(), ImapError> {
        self.put("IDLE");
        self.flush().await?;
        loop {
            let response = self.response().await?;
            if response.bytes.starts_with(b"+") {
                return Ok(());
            }
            if !response.bytes.starts_with(b"* ") {
                return Err(ImapError::Refused("IDLE", response.text()));
            }
            untagged(&response).map_err(ImapError::Protocol)?;
        }
    }

    /// Ends IDLE.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn done(&mut self) -> Result<(), ImapError> {
        self.done_with(|_| Ok(())).await
    }

    /// As [`Client::done`]; gives untagged responses to `untagged`.
    ///
    /// # Errors
    /// The connection; what the server says; or what `untagged` finds.
    pub async fn done_with(
        &mut self,
        untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
    ) -> Result<(), ImapError> {
        self.stream.write_all(b"DONE\r\n").await?;
        self.completed("IDLE", self.next_tag - 1, untagged).await.map(drop)
    }

    /// Ends the connection as the protocol wants it.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn logout(mut self) -> Result<(), ImapError> {
        self.command("LOGOUT", "LOGOUT", |_| Ok(())).await
    }

    /// Puts a command into the output; returns the number of its tag.
    fn put(&mut self, line: &str) -> u32 {
        let tag = self.next_tag;
        self.next_tag += 1;
        // Writing to memory does not fail.
        let _ = write!(self.output, "b{tag} ");
        self.output.extend_from_slice(line.as_bytes());
        self.output.extend_from_slice(b"\r\n");
        tag
    }

    async fn flush(&mut self) -> Result<(), ImapError> {
        const OUTPUT_BYTES_KEPT_MAX: usize = 64 << 10;
        let written = self.stream.write_all(&self.output).await;
        self.output.clear();
        self.output.shrink_to(OUTPUT_BYTES_KEPT_MAX);
        Ok(written?)
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

/// What a response is to whoever waits for a command.
enum Progress {
    Untagged,
    /// The tag's number, and the response code of OK.
    Tagged(u32, Result<Option<String>, ImapError>),
}

fn progress(name: &'static str, response: &Response<'_>) -> Result<Progress, ImapError> {
    if response.bytes.starts_with(b"* ") {
        if response.after("* BYE").is_some() && name != "LOGOUT" {
            return Err(ImapError::Refused(name, response.text()));
        }
        return Ok(Progress::Untagged);
    }
    let tagged = || {
        let rest = response.bytes.strip_prefix(b"b")?;
        let digits = rest.iter().take_while(|octet| octet.is_ascii_digit()).count();
        let tag = str::from_utf8(&rest[..digits]).ok()?.parse().ok()?;
        Some((tag, rest[digits..].strip_prefix(b" ")?))
    };
    let Some((tag, rest)) = tagged() else {
        return Err(ImapError::Protocol(format!("unexpected {:?}", response.text())));
    };
    let ok = rest.get(..3).is_some_and(|word| word.eq_ignore_ascii_case(b"OK "));
    let code = || {
        let (code, _) = str::from_utf8(&rest[3..]).ok()?.strip_prefix('[')?.split_once(']')?;
        Some(code.to_owned())
    };
    Ok(Progress::Tagged(tag, if ok { Ok(code()) } else { Err(ImapError::Refused(name, response.text())) }))
}

/// What follows the name of a response code.
pub fn code_after<'a>(code: &'a str, name: &str) -> Option<&'a str> {
    let (head, rest) = code.split_at_checked(name.len())?;
    head.eq_ignore_ascii_case(name).then(|| rest.strip_prefix(' ')).flatten()
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
