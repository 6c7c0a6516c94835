//! A server, and clients that speak lines to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use posthaste_tests::server::{Server, Store};

pub const PASSWORD: &str = "secret";
/// Longer than anything here takes, so that a test that waits in vain fails and does not hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server with one user, `ann`.
pub struct Running {
    server: Server,
    store: Store,
}

impl Running {
    pub fn new() -> Self {
        let store = Store::new(&["store.shards=2"], &["--plaintext-auth"]).expect("a directory can be made");
        store.add_users(&["ann@example.org".to_owned()], PASSWORD).expect("users can be added");
        let server = store.start().expect("the server starts");
        Self { server, store }
    }

    /// A connection that has been greeted.
    pub fn connect(&self) -> Client {
        let stream = TcpStream::connect(self.server.imap()).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut client = Client { stream: BufReader::new(stream), tags: 0 };
        assert!(client.line().starts_with("* OK [CAPABILITY IMAP4rev1 "));
        client
    }

    pub fn login(&self) -> Client {
        let mut client = self.connect();
        client.ok(format!("LOGIN ann@example.org {PASSWORD}"));
        client
    }

    pub fn select(&self, mailbox: &str) -> Client {
        let mut client = self.login();
        client.ok(format!("SELECT {mailbox}"));
        client
    }

    /// Kills the server and starts it again on the same store.
    pub fn restart(self) -> Self {
        let Self { server, store } = self;
        server.kill().expect("the server was there");
        let server = store.start().expect("the server starts again");
        Self { server, store }
    }

    /// Ends the server, which must not have met an error of its own.
    pub fn stop(self) {
        let log = self.server.log();
        assert!(!log.contains("panicked"), "{log}");
        self.server.stop().expect("the server stops");
    }
}

pub struct Client {
    stream: BufReader<TcpStream>,
    tags: u32,
}

impl Client {
    pub fn send(&mut self, octets: impl AsRef<[u8]>) {
        self.stream.get_mut().write_all(octets.as_ref()).expect("sends");
    }

    /// The next line, without its CRLF; empty at the end of the connection.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line).expect("a line");
        match line.strip_suffix(b"\r\n") {
            Some(line) => text(line),
            None => {
                assert_eq!(text(&line), "", "a line without CRLF");
                String::new()
            }
        }
    }

    /// A response: a line with its literals, which stand in it as they came.
    pub fn response(&mut self) -> String {
        let mut response = self.line();
        while let Some(octets) = response.strip_suffix('}').and_then(|rest| rest.rsplit_once('{')?.1.parse().ok()) {
            let mut literal = vec![0; octets];
            self.stream.read_exact(&mut literal).expect("a literal");
            response.push_str("\r\n");
            response.push_str(&text(&literal));
            response.push_str(&self.line());
        }
        response
    }

    /// All responses up to the tagged one, which is the last.
    pub fn until(&mut self, tag: &str) -> Vec<String> {
        let mut responses = Vec::new();
        loop {
            let response = self.response();
            assert!(!response.is_empty(), "the connection ended after {responses:?}");
            let tagged = response.starts_with(&format!("{tag} "));
            responses.push(response);
            if tagged {
                return responses;
            }
        }
    }

    /// A command and its responses; the tagged one comes last, without its tag.
    pub fn command(&mut self, command: impl AsRef<[u8]>) -> Vec<String> {
        self.tags += 1;
        let tag = format!("t{}", self.tags);
        self.send([tag.as_bytes(), b" ", command.as_ref(), b"\r\n"].concat());
        let mut responses = self.until(&tag);
        if let Some(last) = responses.last_mut() {
            *last = last[tag.len() + 1..].to_owned();
        }
        responses
    }

    /// The responses to a command that must succeed, without the tagged one.
    pub fn ok(&mut self, command: impl AsRef<[u8]>) -> Vec<String> {
        let name = text(command.as_ref());
        let mut responses = self.command(command);
        let last = responses.pop().expect("a tagged response");
        assert!(last.starts_with("OK "), "{name}: {last}");
        responses
    }

    /// The tagged response to a command.
    pub fn answer(&mut self, command: impl AsRef<[u8]>) -> String {
        self.command(command).pop().expect("a tagged response")
    }

    /// Appends a message, with flags and date before it as they stand.
    pub fn append(&mut self, mailbox: &str, before: &str, message: impl AsRef<[u8]>) -> String {
        let message = message.as_ref();
        let space = if before.is_empty() { "" } else { " " };
        let head = format!("APPEND {mailbox}{space}{before} {{{}+}}\r\n", message.len());
        self.answer([head.as_bytes(), message].concat())
    }

    /// Appends as many small messages.
    pub fn fill(&mut self, mailbox: &str, count: usize) {
        for number in 1..=count {
            let message = format!("From: a@example.org\r\nSubject: number {number}\r\n\r\nbody {number}\r\n");
            assert!(self.append(mailbox, "", message).starts_with("OK [APPENDUID "));
        }
    }

    /// The numbers that a SEARCH finds.
    pub fn search(&mut self, keys: impl AsRef<[u8]>) -> Vec<u32> {
        let responses = self.ok([b"SEARCH ", keys.as_ref()].concat());
        let found: Vec<&String> = responses.iter().filter(|line| line.starts_with("* SEARCH")).collect();
        assert_eq!(found.len(), 1, "{responses:?}");
        let numbers = found[0]["* SEARCH".len()..].split_whitespace();
        numbers.map(|number| number.parse().expect("a number")).collect()
    }

    /// Whether the server has ended the connection.
    pub fn ended(&mut self) -> bool {
        self.stream.fill_buf().expect("the end").is_empty()
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
