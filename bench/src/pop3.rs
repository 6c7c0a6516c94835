//! A POP3 client (RFC 1939): replies without a socket, and a client on one.

use std::fmt;
use std::io;

use crate::stream::{Connector, Input, Stream};

/// Why something over POP3 failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pop3Error {
    Io(io::ErrorKind),
    /// The server does not speak POP3.
    Protocol(String),
    /// -ERR: the command, and the line.
    Refused(&'static str, String),
}

impl Pop3Error {
    /// A short name to count by.
    pub fn kind(&self) -> String {
        match self {
            Self::Io(kind) => kind.to_string(),
            Self::Protocol(_) => "protocol violation".to_owned(),
            Self::Refused(command, _) => format!("{command} refused"),
        }
    }
}

impl fmt::Display for Pop3Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(kind) => write!(f, "{kind}"),
            Self::Protocol(what) => f.write_str(what),
            Self::Refused(command, line) => write!(f, "{line:?} after {command}"),
        }
    }
}

impl From<io::Error> for Pop3Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error.kind())
    }
}

/// Finds one line at the start of `input`: its length with its end. `None` if more is needed.
///
/// # Errors
/// It is too long (RFC 1939, 3 allows 512 octets) or does not end with CRLF.
pub fn parse_line(input: &[u8]) -> Result<Option<usize>, String> {
    const LINE_OCTETS_MAX: usize = 4096;
    match memchr::memchr(b'\n', &input[..input.len().min(LINE_OCTETS_MAX)]) {
        Some(end) if end > 0 && input[end - 1] == b'\r' => Ok(Some(end + 1)),
        Some(end) => Err(format!("a line that ends without CR: {:?}", String::from_utf8_lossy(&input[..=end]))),
        None if input.len() >= LINE_OCTETS_MAX => Err("a line without an end".to_owned()),
        None => Ok(None),
    }
}

/// Finds the end of a multi-line reply's data at the start of `input`: its length with the line of a dot. `None` if more is
/// needed; then the first `searched` octets need not be looked at again.
pub fn find_end(input: &[u8], searched: &mut usize) -> Option<usize> {
    const END: &[u8] = b"\r\n.\r\n";
    if input.starts_with(b".\r\n") {
        return Some(3);
    }
    let from = searched.saturating_sub(END.len() - 1);
    let found = memchr::memmem::find(&input[from..], END);
    *searched = input.len();
    found.map(|at| from + at + END.len())
}

fn without_doubled_dots(data: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(data.len());
    for line in data.split_inclusive(|&octet| octet == b'\n') {
        message.extend_from_slice(line.strip_prefix(b".").unwrap_or(line));
    }
    message
}

/// A connection.
pub struct Client {
    stream: Stream,
    input: Input,
    output: Vec<u8>,
}

impl Client {
    /// Connects and waits for the greeting.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn connect(connector: &Connector) -> Result<Self, Pop3Error> {
        let stream = Stream::connect(connector).await?;
        let mut client = Self { stream, input: Input::default(), output: Vec::new() };
        client.status("connecting").await?;
        Ok(client)
    }

    /// Whether its TLS session was resumed.
    pub fn is_resumed(&self) -> bool {
        self.stream.is_resumed()
    }

    /// # Errors
    /// The connection, or what the server says.
    pub async fn login(&mut self, user: &str, password: &str) -> Result<(), Pop3Error> {
        self.command("USER", &format!("USER {user}")).await?;
        self.command("PASS", &format!("PASS {password}")).await
    }

    /// The number of messages and their octets.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn stat(&mut self) -> Result<(u64, u64), Pop3Error> {
        self.send("STAT\r\n").await?;
        let line = self.status("STAT").await?;
        let mut numbers = line.split_ascii_whitespace().skip(1).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(messages)), Some(Ok(octets))) => Ok((messages, octets)),
            _ => Err(Pop3Error::Protocol(format!("no numbers in {line:?}"))),
        }
    }

    /// The number of messages that LIST tells of.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn list(&mut self) -> Result<u64, Pop3Error> {
        self.send("LIST\r\n").await?;
        self.status("LIST").await?;
        let data = self.data().await?;
        // Without the line of the dot.
        Ok(memchr::memchr_iter(b'\n', data).count() as u64 - 1)
    }

    /// Sends RETR for messages in one go (RFC 2449, 6.6) and gives the octets of each, as they are on the wire without the last
    /// line, to `received`.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn retrieve(
        &mut self,
        messages: std::ops::RangeInclusive<u64>,
        mut received: impl FnMut(u64),
    ) -> Result<(), Pop3Error> {
        let lines: String = messages.clone().map(|number| format!("RETR {number}\r\n")).collect();
        self.send(&lines).await?;
        for _ in messages {
            self.status("RETR").await?;
            let octets = self.data().await?.len() - 3;
            received(octets as u64);
        }
        Ok(())
    }

    /// One message as it was before dots were doubled for the wire (RFC 1939, 3).
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn retrieve_message(&mut self, number: u64) -> Result<Vec<u8>, Pop3Error> {
        self.send(&format!("RETR {number}\r\n")).await?;
        self.status("RETR").await?;
        let data = self.data().await?;
        Ok(without_doubled_dots(&data[..data.len() - 3]))
    }

    /// Marks messages to be deleted, in one go.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn delete(&mut self, messages: std::ops::RangeInclusive<u64>) -> Result<(), Pop3Error> {
        let lines: String = messages.clone().map(|number| format!("DELE {number}\r\n")).collect();
        self.send(&lines).await?;
        for _ in messages {
            self.status("DELE").await?;
        }
        Ok(())
    }

    /// Ends the connection as the protocol wants it; what was marked is deleted when this returns.
    ///
    /// # Errors
    /// The connection, or what the server says.
    pub async fn quit(mut self) -> Result<(), Pop3Error> {
        self.command("QUIT", "QUIT").await
    }

    async fn command(&mut self, name: &'static str, line: &str) -> Result<(), Pop3Error> {
        self.send(&format!("{line}\r\n")).await?;
        self.status(name).await.map(drop)
    }

    async fn send(&mut self, lines: &str) -> Result<(), Pop3Error> {
        self.output.clear();
        self.output.extend_from_slice(lines.as_bytes());
        Ok(self.stream.write_all(&self.output).await?)
    }

    /// The line of a reply that must be positive, without its end.
    async fn status(&mut self, command: &'static str) -> Result<String, Pop3Error> {
        loop {
            match parse_line(self.input.unused()).map_err(Pop3Error::Protocol)? {
                Some(length) => {
                    self.input.consume(length);
                    let line = String::from_utf8_lossy(self.input.last_used(length)).trim_end().to_owned();
                    return match line.split(' ').next() {
                        Some("+OK") => Ok(line),
                        Some("-ERR") => Err(Pop3Error::Refused(command, line)),
                        _ => Err(Pop3Error::Protocol(format!("no reply: {line:?}"))),
                    };
                }
                None => self.stream.read_into(&mut self.input).await?,
            }
        }
    }

    /// What follows the line of a multi-line reply, with the line of a dot.
    async fn data(&mut self) -> Result<&[u8], Pop3Error> {
        let mut searched = 0;
        loop {
            match find_end(self.input.unused(), &mut searched) {
                Some(length) => {
                    self.input.consume(length);
                    return Ok(self.input.last_used(length));
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
    fn lines_are_found() {
        assert_eq!(parse_line(b"+OK\r"), Ok(None));
        assert_eq!(parse_line(b"+OK 2 3\r\n1 2\r\n"), Ok(Some(9)));
        assert!(parse_line(b"+OK\n").is_err());
        assert!(parse_line(b"\n").is_err());
        assert!(parse_line(&[b'+'; 5000]).is_err());
    }

    #[test]
    fn dots_are_single_again() {
        assert_eq!(without_doubled_dots(b"..a\r\nb.\r\n...\r\n"), b".a\r\nb.\r\n..\r\n");
        assert_eq!(without_doubled_dots(b""), b"");
    }

    #[test]
    fn data_ends_with_a_line_of_a_dot() {
        for (input, end) in [
            (&b".\r\n+OK"[..], Some(3)),
            (b"a\r\n.\r\n+OK", Some(6)),
            (b"a\r\n..\r\n.\r\n", Some(10)),
            (b"a\r\n.\r", None),
            (b"a.\r\n", None),
        ] {
            assert_eq!(find_end(input, &mut 0), end, "{input:?}");
            // Octet by octet must come to the same.
            let mut searched = 0;
            let found = (0..=input.len()).find_map(|length| find_end(&input[..length], &mut searched));
            assert_eq!(found, end, "{input:?}");
        }
    }
}
