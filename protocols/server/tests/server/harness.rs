//! Starts servers and speaks to them.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion};
use tempfile::TempDir;

/// Longer than anything here takes, so that a test that waits in vain fails and does not hang.
const PATIENCE: Duration = Duration::from_secs(20);
pub const PASSWORD: &str = "secret";

/// A data directory and the ways to work on it.
pub struct Store {
    directory: TempDir,
    set: Vec<String>,
}

impl Store {
    /// With two shards, so that two workers have one each. Accounts have an INBOX and nothing else.
    pub fn new() -> Self {
        Self::as_it_comes().set("store.shards=2").set("accounts.mailboxes=[]")
    }

    /// With nothing configured.
    pub fn as_it_comes() -> Self {
        Self { directory: tempfile::tempdir().expect("temporary directory"), set: Vec::new() }
    }

    pub fn with(users: &[&str]) -> Self {
        let store = Self::new();
        store.import(users);
        store
    }

    pub fn set(mut self, assignment: &str) -> Self {
        self.set.push(assignment.to_owned());
        self
    }

    /// Longer than the address of a Unix socket may be.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("d".repeat(100)).join("data")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_posthaste"));
        command.arg("--data").arg(self.data());
        for assignment in &self.set {
            command.args(["--set", assignment]);
        }
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command to its end with `input` as its standard input.
    pub fn run_with(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self.command(arguments).spawn().expect("starts");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("takes its input");
        child.wait_with_output().expect("ends")
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.run_with(arguments, "")
    }

    /// Runs a command that must succeed, and gives what it printed.
    pub fn done(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a command that must fail, and gives what it complained of.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?} succeeded: {}", text(&output.stdout));
        text(&output.stderr)
    }

    /// Makes accounts, all with [`PASSWORD`]. It is hashed once for all tests.
    pub fn import(&self, users: &[&str]) {
        static HASH: OnceLock<String> = OnceLock::new();
        let hash = HASH.get_or_init(|| {
            use argon2::password_hash::{PasswordHasher, SaltString};
            let salt = SaltString::encode_b64(b"salt of the test").expect("a salt");
            // Weak on purpose: logins in tests take no time.
            let params = argon2::Params::new(64, 1, 1, None).expect("parameters");
            let argon2 = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
            argon2.hash_password(PASSWORD.as_bytes(), &salt).expect("a hash").to_string()
        });
        let lines: String = users.iter().map(|user| format!("{user}:{hash}\n")).collect();
        let output = self.run_with(&["user", "import", "-"], &lines);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }

    pub fn serve(&self) -> Server {
        self.serve_with(&["--plaintext-auth"])
    }

    pub fn serve_with(&self, options: &[&str]) -> Server {
        let io = std::env::var("POSTHASTE_IO").unwrap_or_else(|_| "uring".to_owned());
        let mut arguments = ["serve", "--io", &io, "--workers", "2"].map(str::to_owned).to_vec();
        for listen in ["imap", "imaps", "pop3", "pop3s", "lmtp", "smtp", "smtps"] {
            arguments.extend(["--listen".to_owned(), format!("{listen}=127.0.0.1:0")]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut child = self.command(&arguments).args(options).stdin(Stdio::null()).spawn().expect("starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut ports = HashMap::new();
        loop {
            match lines.next() {
                Some(Ok(line)) if line == "ready" => break,
                Some(Ok(line)) => {
                    let (service, place) =
                        line.strip_prefix("listening ").and_then(|rest| rest.split_once(' ')).expect("a listener");
                    if let Some(port) = place.strip_prefix("127.0.0.1:") {
                        ports.insert(service.to_owned(), port.parse().expect("a port"));
                    }
                }
                _ => {
                    let output = child.wait_with_output().expect("ends");
                    panic!("the server did not start: {}", text(&output.stderr));
                }
            }
        }
        Server { child: Some(child), ports, certificate: self.data().join("tls/certificate.pem") }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub struct Server {
    child: Option<Child>,
    ports: HashMap<String, u16>,
    certificate: PathBuf,
}

impl Server {
    /// The port of a service, by its name.
    pub fn port(&self, service: &str) -> u16 {
        self.ports[service]
    }

    /// What a client needs that trusts this server's certificate, and no other.
    pub fn client_config(&self) -> ClientConfig {
        self.client_config_with(rustls::DEFAULT_VERSIONS)
    }

    pub fn client_config_with(&self, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
        let certificate = CertificateDer::from_pem_file(&self.certificate).expect("the server's certificate");
        let mut roots = RootCertStore::empty();
        roots.add(certificate).expect("a certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions);
        builder.expect("versions").with_root_certificates(roots).with_no_client_auth()
    }

    /// A connection to a service with implicit TLS.
    pub fn tls(&self, service: &str) -> Client {
        Client::new(self.port(service)).into_tls(self.client_config()).expect("a handshake")
    }

    pub fn imap(&self) -> Client {
        let mut client = Client::new(self.port("imap"));
        assert!(client.line().starts_with("* OK [CAPABILITY IMAP4rev1 "));
        client
    }

    /// A session that is logged in.
    pub fn login(&self, user: &str) -> Client {
        let mut client = self.imap();
        client.ok(&format!("LOGIN {user} {PASSWORD}"));
        client
    }

    /// A session with INBOX selected.
    pub fn inbox(&self, user: &str) -> Client {
        let mut client = self.login(user);
        client.ok("SELECT INBOX");
        client
    }

    pub fn lmtp(&self) -> Client {
        let mut client = Client::new(self.port("lmtp"));
        assert!(client.line().starts_with("220 "));
        client
    }

    /// An SMTP session that has said EHLO.
    pub fn smtp(&self) -> Client {
        let mut client = Client::new(self.port("smtp"));
        assert!(client.line().starts_with("220 "));
        client.send("EHLO client.example\r\n");
        client.reply();
        client
    }

    /// Delivers a message, which must be taken for every recipient.
    pub fn deliver(&self, recipients: &[&str], message: &str) {
        let mut client = self.lmtp();
        client.send("LHLO client.example\r\n");
        client.reply();
        let rcpt: String = recipients.iter().map(|recipient| format!("RCPT TO:<{recipient}>\r\n")).collect();
        client.send(&format!("MAIL FROM:<sender@example.net>\r\n{rcpt}DATA\r\n"));
        for _ in 0..=recipients.len() {
            assert!(client.reply().starts_with("250 "));
        }
        assert!(client.reply().starts_with("354 "));
        client.send(&format!("{message}\r\n.\r\n"));
        for _ in recipients {
            assert_eq!(client.reply(), "250 2.0.0 Stored");
        }
    }

    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("runs").id()
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.id().to_string()]).status().expect("kill runs");
        assert!(status.success());
    }

    /// Waits for the end; what it said goes with its status.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let output = self.child.take().expect("runs").wait_with_output().expect("ends");
        (output.status, text(&output.stderr))
    }

    /// Stops it as an operator would.
    pub fn stop(self) {
        self.signal("-TERM");
        let (status, log) = self.wait();
        assert!(status.success(), "{status}: {log}");
    }

    pub fn kill(self) {
        self.signal("-KILL");
        self.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let output = child.wait_with_output();
            if std::thread::panicking()
                && let Ok(output) = output
            {
                eprintln!("the server said:\n{}", text(&output.stderr));
            }
        }
    }
}

pub enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

/// A client that speaks lines.
pub struct Client {
    stream: BufReader<Stream>,
    tags: u32,
}

impl Client {
    pub fn new(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self { stream: BufReader::new(Stream::Plain(stream)), tags: 0 }
    }

    /// Begins TLS. What was received in the clear must have been taken.
    pub fn into_tls(self, config: ClientConfig) -> io::Result<Self> {
        assert!(self.stream.buffer().is_empty(), "the server said something before TLS");
        let Stream::Plain(mut stream) = self.stream.into_inner() else { panic!("TLS within TLS") };
        let name = ServerName::try_from("localhost").expect("a name");
        let mut session = ClientConnection::new(Arc::new(config), name).expect("a session");
        while session.is_handshaking() {
            session.complete_io(&mut stream)?;
        }
        let stream = Stream::Tls(Box::new(StreamOwned::new(session, stream)));
        Ok(Self { stream: BufReader::new(stream), ..self })
    }

    /// The TLS session.
    pub fn session(&mut self) -> &mut ClientConnection {
        match self.stream.get_mut() {
            Stream::Tls(stream) => &mut stream.conn,
            Stream::Plain(_) => panic!("no TLS"),
        }
    }

    /// The socket below whatever is spoken.
    pub fn socket(&self) -> TcpStream {
        let socket = match self.stream.get_ref() {
            Stream::Plain(socket) => socket,
            Stream::Tls(stream) => &stream.sock,
        };
        socket.try_clone().expect("a descriptor")
    }

    pub fn send(&mut self, text: &str) {
        let stream = self.stream.get_mut();
        stream.write_all(text.as_bytes()).and_then(|()| stream.flush()).expect("sends");
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

    /// An SMTP reply; of several lines the last.
    pub fn reply(&mut self) -> String {
        loop {
            let line = self.line();
            if line.as_bytes().get(3) != Some(&b'-') {
                return line;
            }
        }
    }

    /// Sends SMTP commands at once; the codes of the replies.
    pub fn codes(&mut self, commands: &[&str]) -> Vec<String> {
        self.send(&commands.iter().map(|command| format!("{command}\r\n")).collect::<String>());
        commands.iter().map(|_| self.reply()[..3].to_owned()).collect()
    }

    /// A response: a line with its literals, which stand in it as they came.
    pub fn response(&mut self) -> String {
        let mut response = self.line();
        while let Some(len) = response.strip_suffix('}').and_then(|rest| rest.rsplit_once('{')?.1.parse().ok()) {
            let mut literal = vec![0; len];
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

    /// A command and its responses.
    pub fn command(&mut self, command: &str) -> Vec<String> {
        self.tags += 1;
        let tag = format!("t{}", self.tags);
        self.send(&format!("{tag} {command}\r\n"));
        let mut responses = self.until(&tag);
        if let Some(last) = responses.last_mut() {
            *last = last[tag.len() + 1..].to_owned();
        }
        responses
    }

    /// The responses to a command that must succeed, without the tagged one.
    pub fn ok(&mut self, command: &str) -> Vec<String> {
        let mut responses = self.command(command);
        let last = responses.pop().expect("a tagged response");
        assert!(last.starts_with("OK "), "{command}: {last}");
        responses
    }

    /// The tagged response to a command.
    pub fn answer(&mut self, command: &str) -> String {
        self.command(command).pop().expect("a tagged response")
    }

    /// How many octets come before the end of the connection.
    pub fn octets_to_end(&mut self) -> usize {
        let mut octets = Vec::new();
        self.stream.read_to_end(&mut octets).expect("the end");
        octets.len()
    }

    /// Whether the server has ended the connection.
    pub fn ended(&mut self) -> bool {
        self.stream.fill_buf().expect("the end").is_empty()
    }
}

/// The files of the data directory, for tests that look at them.
pub fn exists(data: &Path, name: &str) -> bool {
    data.join(name).exists()
}
