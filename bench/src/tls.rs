//! TLS of the load generator: rustls on a socket of tokio.
//!
//! Certificates are not verified, nor the server's signatures: what is measured is the server, which in a benchmark has a
//! certificate that nobody has signed.

use std::cell::RefCell;
use std::io::{self, Write};
use std::sync::Arc;

use clap::Args;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, SignatureScheme};
use tokio::net::TcpStream;

/// Octets that are taken from the socket at a time, several records.
const READ_BYTES: usize = 64 << 10;
/// Sessions that a client remembers.
const SESSIONS_MAX: usize = 8;

thread_local! {
    /// What comes from a socket stays here only until it is decrypted, so that idle connections need no buffers.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// Whether to use TLS.
#[derive(Clone, Debug, Default, Args)]
pub struct TlsOptions {
    /// Begin each connection with TLS, as imaps, pop3s and smtps want it. The certificate is not verified
    #[arg(long)]
    pub tls: bool,
    /// Resume TLS sessions; each connection only those that it has had itself
    #[arg(long)]
    pub tls_resume: bool,
}

impl TlsOptions {
    pub fn client(&self) -> Option<Tls> {
        self.tls.then(|| Tls::new(self.tls_resume))
    }
}

/// A TLS client's configuration.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ClientConfig>,
    resume: bool,
}

impl Tls {
    pub fn new(resume: bool) -> Self {
        let provider = Arc::new(ring::default_provider());
        let verifier = Arc::new(Unverified(Arc::clone(&provider)));
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.expect("the provider has cipher suites of both versions");
        let mut config = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
        config.resumption = sessions(resume);
        Self { config: Arc::new(config), resume }
    }

    /// The same with a memory of its own.
    pub fn of_own(&self) -> Self {
        let mut config = ClientConfig::clone(&self.config);
        config.resumption = sessions(self.resume);
        Self { config: Arc::new(config), resume: self.resume }
    }
}

fn sessions(resume: bool) -> Resumption {
    if resume { Resumption::in_memory_sessions(SESSIONS_MAX) } else { Resumption::disabled() }
}

/// A connection that has shaken hands.
pub struct TlsStream {
    socket: TcpStream,
    session: ClientConnection,
    /// What came together with the end of the handshake: with TLS 1.3 a server may speak before the client has answered.
    early: Vec<u8>,
}

impl TlsStream {
    /// Shakes hands with a server at `address`, which is `HOST:PORT`.
    ///
    /// # Errors
    /// As the system says; `InvalidData` if the other side does not speak TLS as it should.
    pub async fn connect(socket: TcpStream, tls: &Tls, address: &str) -> io::Result<Self> {
        let session = ClientConnection::new(Arc::clone(&tls.config), server_name(address)).map_err(invalid)?;
        let mut stream = Self { socket, session, early: Vec::new() };
        let mut early = Vec::new();
        while stream.session.is_handshaking() {
            stream.flush().await?;
            if stream.session.is_handshaking() && stream.receive(&mut early).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        stream.early = early;
        stream.flush().await?;
        Ok(stream)
    }

    pub fn is_resumed(&self) -> bool {
        self.session.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// # Errors
    /// As the system says.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // The session takes as much as its buffer has room for.
            let taken = self.session.writer().write(bytes)?;
            bytes = &bytes[taken..];
            self.flush().await?;
        }
        Ok(())
    }

    /// Reads what there is, at least one octet; 0 at the end of the stream.
    ///
    /// # Errors
    /// As the system says; `InvalidData` if the other side does not speak TLS as it should.
    pub async fn read_buf(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        if !self.early.is_empty() {
            let count = self.early.len();
            buffer.append(&mut std::mem::take(&mut self.early));
            return Ok(count);
        }
        let before = buffer.len();
        loop {
            let octets = self.receive(buffer).await?;
            if self.session.wants_write() {
                self.flush().await?;
            }
            // Tickets and new keys are no data.
            if octets == 0 || buffer.len() > before {
                return Ok(buffer.len() - before);
            }
        }
    }

    /// # Errors
    /// As the system says.
    pub async fn close(&mut self) -> io::Result<()> {
        self.session.send_close_notify();
        self.flush().await
    }

    /// Takes from the socket once and decrypts all of it; the octets taken, 0 at the end.
    async fn receive(&mut self, out: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let taken = SCRATCH.with_borrow_mut(|scratch| {
                let octets = self.socket.try_read(scratch)?;
                self.decrypt(&scratch[..octets], out)?;
                Ok::<usize, io::Error>(octets)
            });
            match taken {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.readable().await?,
                taken => return taken,
            }
        }
    }

    fn decrypt(&mut self, mut records: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !records.is_empty() {
            // The session holds only some records at a time.
            let before = records.len();
            self.session.read_tls(&mut records)?;
            let state = self.session.process_new_packets().map_err(invalid)?;
            let mut octets = state.plaintext_bytes_to_read();
            while octets > 0 {
                let chunk = self.session.reader().into_first_chunk()?;
                let count = chunk.len();
                out.extend_from_slice(chunk);
                io::BufRead::consume(&mut self.session.reader(), count);
                octets -= count;
            }
            if records.len() == before {
                // After close_notify nothing is taken any more.
                return Ok(());
            }
        }
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Socket(&self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What the server is called, for a server of several names. An IP address is a name too, which is not sent.
fn server_name(address: &str) -> ServerName<'static> {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned()).unwrap_or_else(|_| ServerName::try_from("localhost").expect("this is a name"))
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Writes without waiting.
struct Socket<'a>(&'a TcpStream);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes every certificate.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_named_by_their_hosts() {
        let name = |address| server_name(address).to_str().into_owned();
        assert_eq!(name("mail.example.org:993"), "mail.example.org");
        assert_eq!(name("127.0.0.1:993"), "127.0.0.1");
        assert_eq!(name("[::1]:993"), "::1");
        assert_eq!(name("no name:993"), "localhost");
    }
}
