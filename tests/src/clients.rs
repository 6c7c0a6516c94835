//! Small blocking clients of IMAP, POP3 and LMTP that are strict about framing. All errors are `io::Error`s: `InvalidData` is
//! a server that breaks its protocol, other kinds a connection that ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::Duration;

use posthaste_bench::imap::{self, Response, parse_response, quote};
use posthaste_bench::lmtp::{Data, parse_reply};
use posthaste_bench::stream::Input;

/// A server that says nothing for so long has hung.
const TIMEOUT: Duration = Duration::from_secs(120);

fn broken(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

struct Connection {
    stream: TcpStream,
    input: Input,
}

impl Connection {
    fn open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self { stream, input: Input::default() })
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; 32 << 10];
        match self.stream.read(&mut chunk)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.input.space().extend_from_slice(&chunk[..count]);
                Ok(())
            }
        }
    }
}

/// An LMTP session.
pub struct Lmtp(Connection);

/// A reply: its code and its lines.
pub type Reply = (u16, String);

impl Lmtp {
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        Self::connect_with(address, "LHLO")
    }

    /// A session of SMTP, in which one reply goes for all recipients.
    pub fn connect_smtp(address: SocketAddr) -> io::Result<Self> {
        Self::connect_with(address, "EHLO")
    }

    fn connect_with(address: SocketAddr, hello: &str) -> io::Result<Self> {
        let mut lmtp = Self(Connection::open(address)?);
        lmtp.expect(220)?;
        lmtp.send(format!("{hello} test.example\r\n").as_bytes())?;
        lmtp.expect(250)?;
        Ok(lmtp)
    }

    /// Delivers a message in CRLF form. One reply for each recipient: its RCPT's if that was refused.
    pub fn deliver(&mut self, recipients: &[&str], message: &[u8]) -> io::Result<Vec<Reply>> {
        self.send(b"MAIL FROM:<sender@example.net> BODY=8BITMIME\r\n")?;
        self.expect(250)?;
        let mut replies: Vec<Option<Reply>> = Vec::new();
        for recipient in recipients {
            self.send(format!("RCPT TO:<{recipient}>\r\n").as_bytes())?;
            let reply = self.reply()?;
            replies.push((reply.0 != 250).then_some(reply));
        }
        if replies.iter().any(Option::is_none) {
            self.send(b"DATA\r\n")?;
            self.expect(354)?;
            self.send(Data::new(message).wire())?;
        } else {
            self.send(b"RSET\r\n")?;
            self.expect(250)?;
        }
        replies.into_iter().map(|refused| refused.map_or_else(|| self.reply(), Ok)).collect()
    }

    pub fn quit(mut self) -> io::Result<()> {
        self.send(b"QUIT\r\n")?;
        self.expect(221)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.stream.write_all(bytes)
    }

    fn expect(&mut self, code: u16) -> io::Result<()> {
        let reply = self.reply()?;
        if reply.0 == code { Ok(()) } else { Err(broken(format!("{reply:?} where {code} was expected"))) }
    }

    fn reply(&mut self) -> io::Result<Reply> {
        loop {
            match parse_reply(self.0.input.unused()).map_err(broken)? {
                Some((code, length)) => {
                    self.0.input.consume(length);
                    let text = String::from_utf8_lossy(self.0.input.last_used(length)).into_owned();
                    return Ok((code, text));
                }
                None => self.0.fill()?,
            }
        }
    }
}

/// A POP3 session.
pub struct Pop3(Connection);

impl Pop3 {
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let mut pop3 = Self(Connection::open(address)?);
        pop3.reply()?.map_err(broken)?;
        Ok(pop3)
    }

    /// # Errors
    /// `PermissionDenied` with the server's words if they are -ERR.
    pub fn login(&mut self, user: &str, password: &str) -> io::Result<()> {
        self.ok(&format!("USER {user}"))?;
        self.ok(&format!("PASS {password}")).map(drop)
    }

    /// What follows +OK, or else what follows -ERR.
    pub fn command(&mut self, line: &str) -> io::Result<Result<String, String>> {
        self.send(format!("{line}\r\n").as_bytes())?;
        self.reply()
    }

    /// A command that must succeed.
    ///
    /// # Errors
    /// `PermissionDenied` with what follows -ERR.
    pub fn ok(&mut self, line: &str) -> io::Result<String> {
        let denied = |text| io::Error::new(io::ErrorKind::PermissionDenied, text);
        self.command(line)?.map_err(denied)
    }

    /// A command with a multi-line response: its first line and the rest, unstuffed.
    pub fn multi_line(&mut self, line: &str) -> io::Result<(String, Vec<u8>)> {
        let first = self.ok(line)?;
        Ok((first, self.rest()?))
    }

    /// The lines of a multi-line response.
    pub fn lines(&mut self, line: &str) -> io::Result<Vec<String>> {
        let (_, rest) = self.multi_line(line)?;
        Ok(String::from_utf8_lossy(&rest).lines().map(str::to_owned).collect())
    }

    pub fn quit(mut self) -> io::Result<String> {
        let text = self.ok("QUIT")?;
        match self.0.fill() {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(text),
            other => Err(broken(format!("the connection goes on after QUIT: {other:?}"))),
        }
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.stream.write_all(bytes)
    }

    /// Says that no more will be sent.
    pub fn end_of_input(&mut self) -> io::Result<()> {
        self.0.stream.shutdown(std::net::Shutdown::Write)
    }

    /// All that the server says until it closes.
    pub fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.0.fill() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(self.0.input.unused().to_vec());
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub fn reply(&mut self) -> io::Result<Result<String, String>> {
        let line = self.line()?;
        let text = line.strip_suffix(b"\r\n").ok_or_else(|| broken("a reply that does not end with CRLF"))?;
        let text = String::from_utf8_lossy(text).into_owned();
        let after = |status: &str| Some(text.strip_prefix(status)?.trim_start_matches(' ').to_owned());
        match (after("+OK"), after("-ERR")) {
            (Some(rest), _) => Ok(Ok(rest)),
            (_, Some(rest)) => Ok(Err(rest)),
            _ => Err(broken(format!("{text:?} is no reply"))),
        }
    }

    /// The lines after the first of a multi-line response, as a usual client reads them: a line ends with LF.
    fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        loop {
            let line = self.line()?;
            if line == b".\r\n" {
                return Ok(rest);
            }
            rest.extend_from_slice(line.strip_prefix(b".").unwrap_or(&line));
        }
    }

    fn line(&mut self) -> io::Result<Vec<u8>> {
        let mut searched = 0;
        loop {
            let unused = self.0.input.unused();
            if let Some(at) = unused[searched..].iter().position(|&octet| octet == b'\n') {
                let length = searched + at + 1;
                self.0.input.consume(length);
                return Ok(self.0.input.last_used(length).to_vec());
            }
            searched = unused.len();
            self.0.fill()?;
        }
    }
}

/// An IMAP session.
pub struct Imap {
    connection: Connection,
    next_tag: u32,
}

/// What a command's tagged response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    No,
    Bad,
}

/// A command's end.
#[derive(Clone, Debug)]
pub struct Done {
    pub status: Status,
    /// What follows OK, NO or BAD.
    pub text: String,
    pub untagged: Vec<Untagged>,
}

/// An untagged response with its literals.
#[derive(Clone, Debug)]
pub struct Untagged {
    bytes: Vec<u8>,
    literals: Vec<Range<usize>>,
}

impl Untagged {
    pub fn response(&self) -> Response<'_> {
        Response { bytes: &self.bytes, literals: &self.literals }
    }
}

/// A mailbox as SELECT shows it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selected {
    pub exists: u32,
    pub uid_validity: u32,
    pub uid_next: u32,
}

/// A message as FETCH shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    pub sequence: u32,
    pub uid: u32,
    /// In lower case, without `\Recent`.
    pub flags: BTreeSet<String>,
    /// The last string of the response.
    pub body: Vec<u8>,
}

impl Done {
    /// The end of a command that must succeed.
    ///
    /// # Errors
    /// `InvalidData` if it did not.
    pub fn ok(self) -> io::Result<Self> {
        if self.status == Status::Ok { Ok(self) } else { Err(broken(format!("{:?} {}", self.status, self.text))) }
    }

    /// The words of a response code, `APPENDUID 1 2`, of the tagged response or an untagged OK.
    pub fn code(&self, name: &str) -> Option<Vec<String>> {
        let untagged = self.untagged.iter().filter_map(|untagged| {
            let rest = untagged.response().after("* OK ")?;
            Some(String::from_utf8_lossy(rest).into_owned())
        });
        untagged.chain([self.text.clone()]).find_map(|text| {
            let words = text.strip_prefix('[')?.split_once(']')?.0.to_owned();
            let mut words = words.split(' ').map(str::to_owned);
            words.next().filter(|word| word.eq_ignore_ascii_case(name))?;
            Some(words.collect())
        })
    }
}

impl Imap {
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let mut imap = Self { connection: Connection::open(address)?, next_tag: 1 };
        let greeting = imap.read()?;
        match greeting.response().after("* OK") {
            Some(_) => Ok(imap),
            None => Err(broken(format!("the greeting is {:?}", greeting.response().text()))),
        }
    }

    pub fn login(&mut self, user: &str, password: &str) -> io::Result<()> {
        self.command(&format!("LOGIN {} {}", quote(user), quote(password)))?.ok().map(drop)
    }

    pub fn select(&mut self, mailbox: &str) -> io::Result<Selected> {
        let done = self.command(&format!("SELECT {}", quote(mailbox)))?.ok()?;
        let number = |name: &str| {
            let found = done.code(name).and_then(|words| words.first()?.parse::<u32>().ok());
            found.ok_or_else(|| broken(format!("SELECT without {name}")))
        };
        let exists = done.untagged.iter().find_map(|untagged| untagged.response().numbered("EXISTS"));
        let exists = exists.ok_or_else(|| broken("SELECT without EXISTS"))?.0;
        Ok(Selected { exists, uid_validity: number("UIDVALIDITY")?, uid_next: number("UIDNEXT")? })
    }

    /// UID, flags and one string item, such as `BODY.PEEK[]`, of messages.
    pub fn uid_fetch(&mut self, uids: &str, item: &str) -> io::Result<Vec<Fetched>> {
        let done = self.command(&format!("UID FETCH {uids} (UID FLAGS {item})"))?.ok()?;
        let mut fetched = Vec::new();
        for untagged in &done.untagged {
            let response = untagged.response();
            if let Some((sequence, list)) = response.numbered("FETCH") {
                let message = parse_fetched(&response, sequence, list).map_err(broken)?;
                // FLAGS of others may come unasked, with their UID but without the item.
                if message.uid == 0 {
                    return Err(broken(format!("no UID in {:?}", response.text())));
                }
                fetched.push(message);
            }
        }
        Ok(fetched)
    }

    /// Names of all mailboxes.
    pub fn list(&mut self) -> io::Result<Vec<String>> {
        let done = self.command("LIST \"\" *")?.ok()?;
        let lists = done.untagged.iter().filter_map(|untagged| untagged.response().after("* LIST ("));
        lists
            .map(|rest| {
                let text = String::from_utf8_lossy(rest);
                let name = text.split_once(") \"/\" ").map(|(_, name)| name.trim_matches('"').to_owned());
                name.ok_or_else(|| broken(format!("LIST {text:?}")))
            })
            .collect()
    }

    pub fn append(&mut self, mailbox: &str, flags: &str, message: &[u8]) -> io::Result<Done> {
        let tag = self.send(&format!("APPEND {} ({flags}) {{{}}}", quote(mailbox), message.len()))?;
        let mut untagged = Vec::new();
        loop {
            let response = self.read()?;
            if response.bytes.starts_with(b"+") {
                break;
            }
            if let Some(done) = self.end(&tag, response, &mut untagged)? {
                return Ok(done);
            }
        }
        self.connection.stream.write_all(message)?;
        self.connection.stream.write_all(b"\r\n")?;
        self.finish(&tag, untagged)
    }

    pub fn command(&mut self, line: &str) -> io::Result<Done> {
        let tag = self.send(line)?;
        self.finish(&tag, Vec::new())
    }

    pub fn logout(mut self) -> io::Result<()> {
        self.command("LOGOUT")?.ok().map(drop)
    }

    fn send(&mut self, line: &str) -> io::Result<String> {
        let tag = format!("t{}", self.next_tag);
        self.next_tag += 1;
        self.connection.stream.write_all(format!("{tag} {line}\r\n").as_bytes())?;
        Ok(tag)
    }

    fn finish(&mut self, tag: &str, mut untagged: Vec<Untagged>) -> io::Result<Done> {
        loop {
            let response = self.read()?;
            if let Some(done) = self.end(tag, response, &mut untagged)? {
                return Ok(done);
            }
        }
    }

    fn end(&self, tag: &str, response: Untagged, untagged: &mut Vec<Untagged>) -> io::Result<Option<Done>> {
        if response.bytes.starts_with(b"* ") {
            if let Some((_, list)) = response.response().numbered("FETCH") {
                imap::check_fetch(&response.response(), list).map_err(broken)?;
            }
            untagged.push(response);
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&response.bytes).into_owned();
        let rest = text.strip_prefix(tag).and_then(|rest| rest.strip_prefix(' '));
        let (word, rest) = rest.and_then(|rest| rest.split_once(' ')).ok_or_else(|| broken(format!("{text:?}")))?;
        let status = match word {
            "OK" => Status::Ok,
            "NO" => Status::No,
            "BAD" => Status::Bad,
            _ => return Err(broken(format!("{text:?}"))),
        };
        Ok(Some(Done { status, text: rest.to_owned(), untagged: std::mem::take(untagged) }))
    }

    fn read(&mut self) -> io::Result<Untagged> {
        let (mut progress, mut literals) = (0, Vec::new());
        loop {
            match parse_response(self.connection.input.unused(), &mut progress, &mut literals).map_err(broken)? {
                Some(length) => {
                    self.connection.input.consume(length);
                    let bytes = self.connection.input.last_used(length)[..length - 2].to_vec();
                    return Ok(Untagged { bytes, literals });
                }
                None => self.connection.fill()?,
            }
        }
    }
}

/// Reads `(NAME VALUE NAME VALUE ...)`.
fn parse_fetched(response: &Response<'_>, sequence: u32, list: &[u8]) -> Result<Fetched, String> {
    imap::check_fetch(response, list)?;
    let mut fetched = Fetched { sequence, ..Fetched::default() };
    let base = response.bytes.len() - list.len();
    let bad = || format!("FETCH {:?}", response.text());
    let (mut at, mut names) = (1, BTreeMap::new());
    while list[at] != b')' {
        let rest = &list[at..];
        // A section may have spaces: BODY[HEADER.FIELDS (SUBJECT)].
        let section = rest.iter().position(|octet| matches!(octet, b'[' | b' ')).filter(|&at| rest[at] == b'[');
        let section_end = rest.iter().position(|&octet| octet == b']').filter(|_| section.is_some()).unwrap_or(0);
        let name_end = rest[section_end..].iter().position(|&octet| octet == b' ').ok_or_else(bad)? + section_end;
        let name = String::from_utf8_lossy(&rest[..name_end]).to_uppercase();
        if names.insert(name.clone(), ()).is_some() {
            return Err(format!("{name} twice in {:?}", response.text()));
        }
        at += name_end + 1;
        let value_start = at;
        let value: &[u8] = match list[at] {
            b'{' => {
                let absolute = base + at;
                let literal = response.literals.iter().find(|literal| literal.start > absolute).ok_or_else(bad)?;
                at = literal.end - base;
                &response.bytes[literal.clone()]
            }
            b'(' => {
                at += list[at..].iter().position(|&octet| octet == b')').ok_or_else(bad)? + 1;
                &list[value_start + 1..at - 1]
            }
            b'"' => {
                at += 2 + list[at + 1..].iter().position(|&octet| octet == b'"').ok_or_else(bad)?;
                &list[value_start + 1..at - 1]
            }
            _ => {
                at += list[at..].iter().position(|octet| matches!(octet, b' ' | b')')).ok_or_else(bad)?;
                &list[value_start..at]
            }
        };
        match name.as_str() {
            "UID" => fetched.uid = str::from_utf8(value).ok().and_then(|value| value.parse().ok()).ok_or_else(bad)?,
            "FLAGS" => {
                let flags = String::from_utf8_lossy(value).to_lowercase();
                let flags = flags.split(' ').filter(|flag| !flag.is_empty() && *flag != "\\recent");
                fetched.flags = flags.map(str::to_owned).collect();
            }
            "MODSEQ" => {}
            _ => fetched.body = value.to_vec(),
        }
        if list[at] == b' ' {
            at += 1;
        }
    }
    Ok(fetched)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetch_responses_are_read() {
        let fetched = |item: &str| {
            let line = format!("* 7 FETCH (UID 3 FLAGS (\\Seen $A \\Recent) {item} {{4}}\r\nab\r\n MODSEQ (5))\r\n");
            let (mut progress, mut literals) = (0, Vec::new());
            let length = parse_response(line.as_bytes(), &mut progress, &mut literals).unwrap().unwrap();
            let response = Response { bytes: &line.as_bytes()[..length - 2], literals: &literals };
            let (sequence, list) = response.numbered("FETCH").unwrap();
            parse_fetched(&response, sequence, list).unwrap()
        };
        for item in ["BODY[]", "BODY[HEADER.FIELDS (X Y)]", "BODY[]<0>", "RFC822"] {
            let flags = ["\\seen", "$a"].map(str::to_owned).into();
            assert_eq!(fetched(item), Fetched { sequence: 7, uid: 3, flags, body: b"ab\r\n".to_vec() }, "{item}");
        }
    }
}
