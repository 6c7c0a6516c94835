//! TLS: the certificate, what each protocol offers, and the state of one connection ([`Tls`]).
//!
//! A connection keeps no buffers of its own here: what comes from the network is decrypted straight out of a pooled receive
//! buffer, and what goes out is encrypted into a pooled one. Sessions are resumed by tickets, so that a returning client
//! finds its session whichever worker it meets.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{HandshakeKind, ServerConfig, ServerConnection, SupportedProtocolVersion};

use crate::config;
use crate::listen::Protocol;

/// Where the server keeps the certificate that it makes for itself, within the data directory.
const DIRECTORY: &str = "tls";
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";
/// How long a certificate of our own is valid.
const SELF_SIGNED_YEARS: i32 = 10;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("tls.certificate and tls.key belong together: set both, or neither for a certificate of the server's own")]
    Half,
    #[error("cannot read the TLS {what} {path}: {error}")]
    Read { what: &'static str, path: PathBuf, error: rustls::pki_types::pem::Error },
    #[error("the TLS certificate {0} holds no certificate: it must be PEM, the server's own first, then its issuers")]
    NoCertificate(PathBuf),
    #[error("the TLS key {key} cannot be used with the certificate {certificate}: {error}")]
    Unusable { key: PathBuf, certificate: PathBuf, error: rustls::Error },
    #[error("cannot make a certificate: {0}")]
    Make(rcgen::Error),
    #[error("cannot write the certificate of the server's own to {path}: {error}")]
    Write { path: PathBuf, error: io::Error },
    #[error("cannot set up TLS: {0}")]
    Setup(rustls::Error),
}

/// What the server offers to clients that begin TLS.
pub struct TlsServer {
    imap: Arc<ServerConfig>,
    pop3: Arc<ServerConfig>,
    lmtp: Arc<ServerConfig>,
    smtp: Arc<ServerConfig>,
}

impl TlsServer {
    /// Reads the configured certificate and key; makes its own in the data directory at the first start if none is configured.
    ///
    /// # Errors
    /// What is missing or does not fit, with the file.
    pub fn load(data: &Path, config: &config::Tls, host_name: &str) -> Result<Self, TlsError> {
        let (certificate, key) = match (&config.certificate, &config.key) {
            (Some(certificate), Some(key)) => (certificate.clone(), key.clone()),
            (None, None) => own_certificate(&data.join(DIRECTORY), host_name)?,
            _ => return Err(TlsError::Half),
        };
        let chain = CertificateDer::pem_file_iter(&certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| TlsError::Read { what: "certificate", path: certificate.clone(), error })?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate(certificate));
        }
        let secret = PrivateKeyDer::from_pem_file(&key).map_err(|error| TlsError::Read {
            what: "key",
            path: key.clone(),
            error,
        })?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let base = builder(&provider, config.minimum_version)?
            .with_no_client_auth()
            .with_single_cert(chain, secret)
            .map_err(|error| TlsError::Unusable { key, certificate, error })?;
        let ticketer = rustls::crypto::ring::Ticketer::new().map_err(TlsError::Setup)?;
        let offer = |protocol: Protocol| {
            let mut config = base.clone();
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.ticketer = Arc::clone(&ticketer);
            // A client that names another protocol has been led here by somebody (ALPACA): it is refused.
            config.alpn_protocols = vec![protocol.name().as_bytes().to_vec()];
            Arc::new(config)
        };
        Ok(Self {
            imap: offer(Protocol::Imap),
            pop3: offer(Protocol::Pop3),
            lmtp: offer(Protocol::Lmtp),
            smtp: offer(Protocol::Smtp),
        })
    }

    /// The state of a connection that is about to begin TLS.
    ///
    /// # Errors
    /// None is known; the library may find one.
    pub fn accept(&self, protocol: Protocol) -> Result<Tls, rustls::Error> {
        let config = match protocol {
            Protocol::Imap => &self.imap,
            Protocol::Pop3 => &self.pop3,
            Protocol::Lmtp => &self.lmtp,
            Protocol::Smtp => &self.smtp,
        };
        let mut session = ServerConnection::new(Arc::clone(config))?;
        // The callers bound what they hand over: it is encrypted at once, and sent.
        session.set_buffer_limit(None);
        Ok(Tls { session: Box::new(session), early: Vec::new() })
    }
}

fn builder(
    provider: &Arc<CryptoProvider>,
    minimum: config::TlsVersion,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, TlsError> {
    const ALL: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13, &rustls::version::TLS12];
    const NEWEST: &[&SupportedProtocolVersion] = &[&rustls::version::TLS13];
    let versions = match minimum {
        config::TlsVersion::Tls12 => ALL,
        config::TlsVersion::Tls13 => NEWEST,
    };
    ServerConfig::builder_with_provider(Arc::clone(provider)).with_protocol_versions(versions).map_err(TlsError::Setup)
}

/// The files of the server's own certificate, which are made if they are not there.
fn own_certificate(directory: &Path, host_name: &str) -> Result<(PathBuf, PathBuf), TlsError> {
    let (certificate, key) = (directory.join(CERTIFICATE), directory.join(KEY));
    // The certificate is written last: where it is, the key is.
    if certificate.exists() {
        return Ok((certificate, key));
    }
    let mut names = vec!["localhost".to_owned()];
    if host_name != "localhost" {
        names.insert(0, host_name.to_owned());
    }
    let mut parameters = rcgen::CertificateParams::new(names).map_err(TlsError::Make)?;
    let mut subject = rcgen::DistinguishedName::new();
    subject.push(rcgen::DnType::CommonName, host_name);
    parameters.distinguished_name = subject;
    let year = this_year();
    // A day early, for clients whose clock is behind.
    parameters.not_before = rcgen::date_time_ymd(year - 1, 12, 31);
    parameters.not_after = rcgen::date_time_ymd(year + SELF_SIGNED_YEARS, 12, 31);
    let secret = rcgen::KeyPair::generate().map_err(TlsError::Make)?;
    let signed = parameters.self_signed(&secret).map_err(TlsError::Make)?;
    write_private(directory, &key, &secret.serialize_pem())?;
    write_private(directory, &certificate, &signed.pem())?;
    tracing::warn!(
        certificate = %certificate.display(),
        "made a self-signed certificate: clients will ask whether to trust it; set tls.certificate and tls.key to use another"
    );
    Ok((certificate, key))
}

fn this_year() -> i32 {
    const SECONDS_OF_YEAR: u64 = 31_556_952;
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    1970 + (now.as_secs() / SECONDS_OF_YEAR) as i32
}

/// Writes a file that nobody else may read, whole or not at all.
fn write_private(directory: &Path, path: &Path, text: &str) -> Result<(), TlsError> {
    let write = || {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let unfinished = path.with_extension("tmp");
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        fs::File::open(directory)?.sync_all()
    };
    write().map_err(|error| TlsError::Write { path: path.to_owned(), error })
}

/// The TLS state of one connection. It can go to another thread between any two calls.
pub struct Tls {
    session: Box<ServerConnection>,
    /// What the client said together with the end of its handshake, decrypted.
    early: Vec<u8>,
}

/// How the client's side of the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Open,
    /// It has said that no more comes.
    Closed,
}

impl Tls {
    /// Takes what came from the network, and appends what it says to `plaintext`. [`Tls::write_to`] has to follow, also after an
    /// error: it may have something to tell the client.
    ///
    /// # Errors
    /// The client breaks the protocol, or someone between: the connection cannot go on.
    pub fn take(&mut self, mut ciphertext: &[u8], plaintext: &mut Vec<u8>) -> Result<Peer, rustls::Error> {
        let mut peer = Peer::Open;
        while !ciphertext.is_empty() {
            // Reading from memory fails only when plaintext has been left lying, which it is not.
            let read =
                self.session.read_tls(&mut ciphertext).map_err(|error| rustls::Error::General(error.to_string()))?;
            let state = self.session.process_new_packets()?;
            if state.plaintext_bytes_to_read() > 0 {
                let start = plaintext.len();
                plaintext.resize(start + state.plaintext_bytes_to_read(), 0);
                let read = self.session.reader().read(&mut plaintext[start..]).unwrap_or(0);
                plaintext.truncate(start + read);
            }
            if state.peer_has_closed() {
                peer = Peer::Closed;
            }
            if read == 0 {
                break;
            }
        }
        Ok(peer)
    }

    /// Takes what came from the network during the handshake. Whether it is complete.
    ///
    /// # Errors
    /// As [`Tls::take`].
    pub fn shake_hands(&mut self, ciphertext: &[u8]) -> Result<bool, rustls::Error> {
        let mut early = std::mem::take(&mut self.early);
        let result = self.take(ciphertext, &mut early);
        self.early = early;
        match result? {
            Peer::Open => Ok(!self.session.is_handshaking()),
            Peer::Closed => Err(rustls::Error::General("closed by the client".to_owned())),
        }
    }

    /// Whether [`Tls::take_early`] has something to give.
    pub fn has_early(&self) -> bool {
        !self.early.is_empty()
    }

    pub fn take_early(&mut self, plaintext: &mut Vec<u8>) {
        plaintext.append(&mut self.early);
        self.early = Vec::new();
    }

    /// Appends what is to be sent to the client to say `plaintext`, which should be at most some 64 KB.
    pub fn encrypt(&mut self, plaintext: &[u8], ciphertext: &mut Vec<u8>) {
        // Without a limit, and to memory, neither can fail.
        let _ = self.session.writer().write_all(plaintext);
        self.write_to(ciphertext);
    }

    /// Appends what is to be sent: parts of the handshake, alerts, answers of the protocol itself.
    pub fn write_to(&mut self, ciphertext: &mut Vec<u8>) {
        while self.session.wants_write() {
            if self.session.write_tls(ciphertext).is_err() {
                return;
            }
        }
    }

    /// The last thing to be said.
    pub fn close(&mut self, ciphertext: &mut Vec<u8>) {
        self.session.send_close_notify();
        self.write_to(ciphertext);
    }

    /// `TLSv1_3 TLS13_AES_128_GCM_SHA256`, for the log.
    pub fn describe(&self) -> String {
        let version = self.session.protocol_version();
        let suite = self.session.negotiated_cipher_suite().map(|suite| suite.suite());
        match (version, suite) {
            (Some(version), Some(suite)) => format!("{version:?} {suite:?}"),
            _ => String::new(),
        }
    }

    /// Whether the client came back with a ticket.
    pub fn is_resumed(&self) -> bool {
        self.session.handshake_kind() == Some(HandshakeKind::Resumed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_certificate_is_made_once_and_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let config = config::Tls::default();
        TlsServer::load(directory.path(), &config, "mail.example").map_err(|error| error.to_string()).unwrap();
        let path = directory.path().join(DIRECTORY).join(CERTIFICATE);
        let first = fs::read(&path).unwrap();
        TlsServer::load(directory.path(), &config, "mail.example").map_err(|error| error.to_string()).unwrap();
        assert_eq!(fs::read(&path).unwrap(), first);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory.path().join(DIRECTORY)), 0o700);
        assert_eq!(mode(&directory.path().join(DIRECTORY).join(KEY)), 0o600);
    }

    #[test]
    fn what_is_wrong_with_the_files_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (directory.path().join("one"), directory.path().join("other"));
        let own = |path: &Path| own_certificate(path, "mail.example").map_err(|error| error.to_string()).unwrap();
        let (certificate, key) = own(&one);
        let (_, other_key) = own(&other);
        let load = |certificate: Option<&Path>, key: Option<&Path>| {
            let (certificate, key) = (certificate.map(Path::to_owned), key.map(Path::to_owned));
            let config = config::Tls { certificate, key, ..config::Tls::default() };
            TlsServer::load(directory.path(), &config, "mail.example").map(drop).map_err(|error| error.to_string())
        };
        load(Some(&certificate), Some(&key)).unwrap();
        assert!(load(Some(&certificate), None).unwrap_err().contains("belong together"));
        assert!(load(Some(&certificate), Some(&other_key)).unwrap_err().contains("cannot be used with"));
        assert!(load(Some(&key), Some(&key)).unwrap_err().contains("holds no certificate"));
        assert!(load(Some(&certificate), Some(&certificate)).unwrap_err().contains("key"));
        assert!(load(Some(Path::new("/nowhere.pem")), Some(&key)).unwrap_err().contains("/nowhere.pem"));
    }
}
