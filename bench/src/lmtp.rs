//! An LMTP (RFC 2033) and SMTP (RFC 5321) client: replies without a socket, and a client on one.

use std::fmt;
use std::io;

use crate::stream::{Connector, Input, Stream};

/// A reply of all its lines (RFC 5321, 4.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    pub code: u16,
    /// All lines with their codes and line ends.
    pub text: &'a [u8],
}

impl Reply<'_> {
    /// The last line without its end.
    pub fn last_line(&self) -> String {
        let text = String::from_utf8_lossy(self.text);
        text.trim_end().lines().last().unwrap_or_default().to_owned()
    }

    /// The text after the code, of each line.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.text.split_inclusive(|&octet| octet == b'\n').map(|line| line[4..].trim_ascii_end())
    }
}

/// Finds one reply at the start of `input`: its code and length. `None` if more is needed.
///
/// # Errors
/// What is there is no reply.
pub fn parse_reply(input: &[u8]) -> Result<Option<(u16, usize)>, String> {
    const LINE_OCTETS_MAX: usize = 4096;
    let mut at = 0;
    let mut code = None;
    loop {
        let line = &input[at..];
        let Some(end) = memchr::memchr(b'\n', line) else {
            return if line.len() > LINE_OCTETS_MAX { Err("a reply line without an end".to_owned()) } else { Ok(None) };
        };
        let bad = || format!("no reply line: {:?}", String::from_utf8_lossy(&line[..=end]));
        if end < 4 || line[end - 1] != b'\r' || line[..end - 1].contains(&b'\r') {
            return Err(bad());
        }
        let digits = str::from_utf8(&line[..3]).ok().filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
        let this: u16 = digits.and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
        if *code.get_or_insert(this) != this || !(200..600).contains(&this) {
            return Err(bad());
        }
        at += end + 1;
        match line[3] {
            b' ' => return Ok(Some((this, at))),
            b'-' => {}
            b'\r' if end == 4 => return Ok(Some((this, at))),
            _ => return Err(bad()),
        }
    }
}

/// What is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// An answer for each recipient.
    Lmtp,
    /// One answer for all recipients.
    Smtp,
}

/// Why something over LMTP or SMTP failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LmtpError {
    Io(io::ErrorKind),
    /// The server does not speak the protocol.
    Protocol(String),
    /// A reply that is not what it must be: the command, and the reply's last line.
    Reply(&'static str, String),
}

impl LmtpError {
    /// A short name to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Io(kind) => kind.to_string(),
            Self::Protocol(_) => "protocol violation".to_owned(),
            Self::Reply(command, line) => format!("{} after {command}", line.get(..3).unwrap_or_default()),
        }
    }
}

impl fmt::Display for LmtpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(kind) => write!(f, "{kind}"),
            Self::Protocol(what) => f.write_str(what),
            Self::Reply(command, line) => write!(f, "{line:?} after {command}"),
        }
    }
}

impl From<io::Error> for LmtpError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind())
    }
}

/// A message's data as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    /// With dots doubled and the final dot.
    wire: Vec<u8>,
    octets: usize,
    eight_bit: bool,
}

impl Data {
    /// Encodes a message in CRLF form (RFC 5321, 4.5.2).
    ///
    /// # Panics
    /// If the message does not end with CRLF.
    pub fn new(message: &[u8]) -> Self {
        assert!(message.is_empty() || message.ends_with(b"\r\n"), "a message over LMTP ends with CRLF");
        let mut wire = Vec::with_capacity(message.len() + 64);
        for line in message.split_inclusive(|&octet| octet == b'\n') {
            if line[0] == b'.' {
                wire.push(b'.');
            }
            wire.extend_from_slice(line);
        }
        wire.extend_from_slice(b".\r\n");
        Self { wire, octets: message.len(), eight_bit: !message.is_ascii() }
    }

    /// The same with a header before it, which must be lines that end with CRLF and do not begin with a dot.
    pub fn with_header(&self, header: &str) -> Self {
        assert!(header.ends_with("\r\n") && !header.starts_with('.'), "a header is lines");
        let mut wire = Vec::with_capacity(header.len() + self.wire.len());
        wire.extend_from_slice(header.as_bytes());
        wire.extend_from_slice(&self.wire);
        Self { wire, octets: header.len() + self.octets, eight_bit: self.eight_bit }
    }

    /// Octets of the message itself.
    pub fn octets(&self) -> usize {
        self.octets
    }

    /// What goes over the wire after 354.
    pub fn wire(&self) -> &[u8] {
        &self.wire
    }
}

/// What became of one transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Recipients that have the message.
    pub accepted: usize,
    /// Why others have not.
    pub refused: Vec<LmtpError>,
}

/// A connection after LHLO or EHLO.
pub struct Client {
    protocol: Protocol,
    stream: Stream,
    input: Input,
    output: Vec<u8>,
    pipelining: bool,
    size: bool,
    eight_bit_mime: bool,
    /// Recipients of the last message whom the server takes mail for.
    valid: Vec<usize>,
    acknowledged: Vec<usize>,
}

impl Client {
    /// Connects and says LHLO. Commands are sent in groups if `pipelining` and the server allows it (RFC 2920).
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn connect(connector: &Connector, pipelining: bool) -> Result<Self, LmtpError> {
        Self::connect_by(Protocol::Lmtp, connector, pipelining).await
    }

    /// As [`Client::connect`], with the protocol's own greeting.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn connect_by(protocol: Protocol, connector: &Connector, pipelining: bool) -> Result<Self, LmtpError> {
        let stream = Stream::connect(connector).await?;
        let mut client = Self {
            protocol,
            stream,
            input: Input::default(),
            output: Vec::new(),
            pipelining: false,
            size: false,
            eight_bit_mime: false,
            valid: Vec::new(),
            acknowledged: Vec::new(),
        };
        client.expect("connecting", 220).await?;
        let hello = match protocol {
            Protocol::Lmtp => "LHLO",
            Protocol::Smtp => "EHLO",
        };
        client.stream.write_all(format!("{hello} bench.example\r\n").as_bytes()).await?;
        let reply = client.reply().await?;
        if reply.code != 250 {
            return Err(LmtpError::Reply(hello, reply.last_line()));
        }
        let (mut can_pipeline, mut size, mut eight_bit_mime) = (false, false, false);
        for line in reply.lines().skip(1) {
            let keyword = line.split(|&octet| octet == b' ').next().unwrap_or_default();
            can_pipeline |= keyword.eq_ignore_ascii_case(b"PIPELINING");
            size |= keyword.eq_ignore_ascii_case(b"SIZE");
            eight_bit_mime |= keyword.eq_ignore_ascii_case(b"8BITMIME");
        }
        Ok(Self { pipelining: pipelining && can_pipeline, size, eight_bit_mime, ..client })
    }

    /// Delivers a message to recipients. `sent` is called when the final dot has gone out.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub async fn deliver(
        &mut self,
        recipients: &[&str],
        data: &Data,
        sent: impl FnOnce(),
    ) -> Result<Outcome, LmtpError> {
        let mut outcome = Outcome::default();
        self.valid.clear();
        self.acknowledged.clear();
        self.put_mail(data);
        if !self.pipelining {
            self.flush().await?;
            self.expect("MAIL", 250).await?;
        }
        for (index, recipient) in recipients.iter().enumerate() {
            self.output.extend_from_slice(b"RCPT TO:<");
            self.output.extend_from_slice(recipient.as_bytes());
            self.output.extend_from_slice(b">\r\n");
            if !self.pipelining {
                self.flush().await?;
                self.recipient_reply(index, &mut outcome).await?;
            }
        }
        if !self.pipelining && self.valid.is_empty() {
            self.reset().await?;
            return Ok(outcome);
        }
        self.output.extend_from_slice(b"DATA\r\n");
        self.flush().await?;
        if self.pipelining {
            let mail = self.reply().await?;
            let mail = (mail.code != 250).then(|| LmtpError::Reply("MAIL", mail.last_line()));
            for index in 0..recipients.len() {
                self.recipient_reply(index, &mut outcome).await?;
            }
            if let Some(error) = mail {
                outcome.refused = vec![error; recipients.len()];
            }
        }
        let reply = self.reply().await?;
        if reply.code != 354 {
            let error = LmtpError::Reply("DATA", reply.last_line());
            outcome.refused.resize(recipients.len(), error);
            return Ok(outcome);
        }
        if self.valid.is_empty() {
            // RFC 2920, 3.1: 354 came although no recipient is left; nothing is sent.
            self.stream.write_all(b".\r\n").await?;
            self.reply().await?;
            return Ok(outcome);
        }
        self.stream.write_all(&data.wire).await?;
        sent();
        // Over SMTP one reply is for all.
        let (replies, recipients_each) = match self.protocol {
            Protocol::Lmtp => (self.valid.len(), 1),
            Protocol::Smtp => (1, self.valid.len()),
        };
        for position in 0..replies {
            let reply = self.reply().await?;
            if reply.code == 250 {
                outcome.accepted += recipients_each;
                self.acknowledged.extend_from_slice(&self.valid[position..position + recipients_each]);
            } else {
                let error = LmtpError::Reply("the message", reply.last_line());
                outcome.refused.extend(std::iter::repeat_n(error, recipients_each));
            }
        }
        Ok(outcome)
    }

    /// Which recipients of the last message have it, by their place in the list; also if the connection then failed.
    pub fn acknowledged(&self) -> &[usize] {
        &self.acknowledged
    }

    /// Ends the connection as the protocol wants it.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn quit(mut self) -> Result<(), LmtpError> {
        self.stream.write_all(b"QUIT\r\n").await?;
        self.expect("QUIT", 221).await
    }

    fn put_mail(&mut self, data: &Data) {
        self.output.extend_from_slice(b"MAIL FROM:<bench@example.net>");
        if self.size {
            self.output.extend_from_slice(format!(" SIZE={}", data.octets).as_bytes());
        }
        if self.eight_bit_mime && data.eight_bit {
            self.output.extend_from_slice(b" BODY=8BITMIME");
        }
        self.output.extend_from_slice(b"\r\n");
    }

    async fn recipient_reply(&mut self, index: usize, outcome: &mut Outcome) -> Result<(), LmtpError> {
        let reply = self.reply().await?;
        if matches!(reply.code, 250 | 251) {
            self.valid.push(index);
        } else {
            outcome.refused.push(LmtpError::Reply("RCPT", reply.last_line()));
        }
        Ok(())
    }

    async fn reset(&mut self) -> Result<(), LmtpError> {
        self.stream.write_all(b"RSET\r\n").await?;
        self.expect("RSET", 250).await
    }

    async fn flush(&mut self) -> Result<(), LmtpError> {
        self.stream.write_all(&self.output).await?;
        self.output.clear();
        Ok(())
    }

    async fn expect(&mut self, command: &'static str, code: u16) -> Result<(), LmtpError> {
        let reply = self.reply().await?;
        if reply.code == code { Ok(()) } else { Err(LmtpError::Reply(command, reply.last_line())) }
    }

    async fn reply(&mut self) -> Result<Reply<'_>, LmtpError> {
        loop {
            match parse_reply(self.input.unused()).map_err(LmtpError::Protocol)? {
                Some((code, length)) => {
                    self.input.consume(length);
                    return Ok(Reply { code, text: self.input.last_used(length) });
                }
                None => self.stream.read_into(&mut self.input).await?,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_found() {
        assert_eq!(parse_reply(b""), Ok(None));
        assert_eq!(parse_reply(b"250 2.0.0 ok\r"), Ok(None));
        assert_eq!(parse_reply(b"250-a\r\n250-b\r\n"), Ok(None));
        assert_eq!(parse_reply(b"250 ok\r\n354 go\r\n"), Ok(Some((250, 8))));
        assert_eq!(parse_reply(b"250-a\r\n250 b\r\nrest"), Ok(Some((250, 14))));
        assert_eq!(parse_reply(b"250\r\n"), Ok(Some((250, 5))));
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        for input in ["250 ok\n", "25 ok\r\n", "abc ok\r\n", "250_ok\r\n", "250-a\r\n354 b\r\n", "250 a\rb\r\n", "\r\n"]
        {
            assert!(parse_reply(input.as_bytes()).is_err(), "{input:?}");
        }
        assert!(parse_reply(&[b'2'; 5000]).is_err());
    }

    #[test]
    fn dots_are_doubled() {
        let data = Data::new(b".a\r\nb.\r\n..\r\n");
        assert_eq!(data.wire, b"..a\r\nb.\r\n...\r\n.\r\n");
        assert_eq!(data.octets(), 12);
        assert_eq!(Data::new(b"").wire, b".\r\n");
        let with_header = data.with_header("A: b\r\n");
        assert_eq!(with_header, Data::new(b"A: b\r\n.a\r\nb.\r\n..\r\n"));
    }
}
