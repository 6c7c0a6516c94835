//! Stream connections: TCP, Unix, or TLS over TCP.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::tls::{Tls, TlsStream};

/// Where a server listens: `HOST:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(String),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(text.to_owned())),
            _ => Err("an address is HOST:PORT or unix:PATH".to_owned()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Where connections go, and how they begin.
#[derive(Clone, Debug)]
pub struct Connector {
    address: Address,
    tls: Option<Tls>,
}

impl Connector {
    /// # Errors
    /// TLS is wanted on a Unix socket.
    pub fn new(address: &Address, tls: Option<Tls>) -> Result<Self, String> {
        match address {
            Address::Unix(_) if tls.is_some() => Err("TLS needs an address of the form HOST:PORT".to_owned()),
            _ => Ok(Self { address: address.clone(), tls }),
        }
    }

    /// For a client that resumes only its own sessions. A server's tickets are used once each and few are kept, so that clients
    /// that shared them would often find none.
    pub fn of_own(&self) -> Self {
        Self { address: self.address.clone(), tls: self.tls.as_ref().map(Tls::of_own) }
    }
}

/// A connection.
pub enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

impl Stream {
    /// Connects; with TLS it has shaken hands when this returns.
    ///
    /// # Errors
    /// As the system says; `InvalidData` if the other side does not speak TLS as it should.
    pub async fn connect(connector: &Connector) -> io::Result<Self> {
        match &connector.address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address.as_str()).await?;
                // A command must not wait for the acknowledgement of the one before it.
                stream.set_nodelay(true)?;
                match &connector.tls {
                    None => Ok(Self::Tcp(stream)),
                    Some(tls) => Ok(Self::Tls(Box::new(TlsStream::connect(stream, tls, address).await?))),
                }
            }
            Address::Unix(path) => Ok(Self::Unix(UnixStream::connect(path).await?)),
        }
    }

    /// Whether a TLS session was resumed.
    pub fn is_resumed(&self) -> bool {
        matches!(self, Self::Tls(stream) if stream.is_resumed())
    }

    /// # Errors
    /// As the system says.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.write_all(bytes).await,
            Self::Unix(stream) => stream.write_all(bytes).await,
            Self::Tls(stream) => stream.write_all(bytes).await,
        }
    }

    /// Reads what there is into `input`, at least one octet.
    ///
    /// # Errors
    /// As the system says; `UnexpectedEof` at the end of the stream.
    pub async fn read_into(&mut self, input: &mut Input) -> io::Result<()> {
        let buffer = input.space();
        let count = match self {
            Self::Tcp(stream) => stream.read_buf(buffer).await?,
            Self::Unix(stream) => stream.read_buf(buffer).await?,
            Self::Tls(stream) => stream.read_buf(buffer).await?,
        };
        if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Says that nothing more will be sent.
    ///
    /// # Errors
    /// As the system says.
    pub async fn close(mut self) -> io::Result<()> {
        match &mut self {
            Self::Tcp(stream) => stream.shutdown().await,
            Self::Unix(stream) => stream.shutdown().await,
            Self::Tls(stream) => stream.close().await,
        }
    }
}

/// Buffers of connections that have ended, for those that begin: a session may be shorter than it takes to find memory.
const SPARE_BUFFERS_MAX: usize = 64;
/// What is larger is given back.
const SPARE_BYTES_MAX: usize = 64 << 10;

thread_local! {
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes received and not used yet.
#[derive(Debug, Default)]
pub struct Input {
    buffer: Vec<u8>,
    used: usize,
}

impl Drop for Input {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        if (1..=SPARE_BYTES_MAX).contains(&buffer.capacity()) {
            buffer.clear();
            // At the end of a thread there is no place for it any more.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < SPARE_BUFFERS_MAX {
                    spare.push(buffer);
                }
            });
        }
    }
}

impl Input {
    /// What is unused.
    pub fn unused(&self) -> &[u8] {
        &self.buffer[self.used..]
    }

    /// Marks `count` octets as used. They stay where they are until the next [`Input::space`].
    pub fn consume(&mut self, count: usize) {
        self.used += count;
        assert!(self.used <= self.buffer.len(), "more was used than there is");
    }

    /// The octets before the unused ones, of which the last `count` are returned.
    pub fn last_used(&self, count: usize) -> &[u8] {
        &self.buffer[self.used - count..self.used]
    }

    /// The buffer, with room at its end to read into.
    pub fn space(&mut self) -> &mut Vec<u8> {
        const READ_BYTES_MIN: usize = 16 << 10;
        if self.buffer.capacity() == 0 {
            self.buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
        } else if self.used == self.buffer.len() {
            self.buffer.clear();
            self.used = 0;
        } else if self.used >= READ_BYTES_MIN {
            self.buffer.drain(..self.used);
            self.used = 0;
        }
        if self.buffer.capacity() - self.buffer.len() < READ_BYTES_MIN {
            // Doubles, so that a large literal is not copied for each read.
            self.buffer.reserve(READ_BYTES_MIN);
        }
        &mut self.buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert_eq!("127.0.0.1:24".parse(), Ok(Address::Tcp("127.0.0.1:24".to_owned())));
        assert_eq!("[::1]:24".parse(), Ok(Address::Tcp("[::1]:24".to_owned())));
        assert_eq!("unix:/run/lmtp".parse(), Ok(Address::Unix("/run/lmtp".into())));
        assert!("localhost".parse::<Address>().is_err());
        assert!(":24".parse::<Address>().is_err());
    }

    #[test]
    fn buffers_are_used_again() {
        let mut first = Input::default();
        first.space().extend_from_slice(b"abc");
        let place = first.buffer.as_ptr();
        drop(first);
        let mut second = Input::default();
        assert_eq!(second.space().as_ptr(), place);
        assert_eq!(second.unused(), b"");
    }

    #[test]
    fn input_keeps_what_is_unused() {
        let mut input = Input::default();
        input.space().extend_from_slice(b"abcdef");
        input.consume(4);
        assert_eq!(input.last_used(2), b"cd");
        input.space().extend_from_slice(b"gh");
        assert_eq!(input.unused(), b"efgh");
        input.consume(4);
        input.space();
        assert_eq!(input.unused(), b"");
    }
}
