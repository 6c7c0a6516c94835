//! Listeners: what is served where.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use socket2::{Domain, SockAddr, Socket, Type};

/// What is spoken. Its name is also that of ALPN (RFC 7301), for those that have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Imap,
    Pop3,
    Lmtp,
    Smtp,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Self::Imap => "imap",
            Self::Pop3 => "pop3",
            Self::Lmtp => "lmtp",
            Self::Smtp => "smtp",
        }
    }
}

/// A protocol, and whether TLS begins with the connection (RFC 8314, 3) or when the client asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Service {
    pub protocol: Protocol,
    pub implicit_tls: bool,
}

impl Service {
    pub fn name(self) -> &'static str {
        match (self.protocol, self.implicit_tls) {
            (Protocol::Imap, true) => "imaps",
            (Protocol::Pop3, true) => "pop3s",
            (Protocol::Smtp, true) => "smtps",
            (protocol, _) => protocol.name(),
        }
    }
}

impl FromStr for Service {
    type Err = ListenError;

    fn from_str(name: &str) -> Result<Self, ListenError> {
        let (protocol, implicit_tls) = match name {
            "imap" => (Protocol::Imap, false),
            "imaps" => (Protocol::Imap, true),
            "pop3" => (Protocol::Pop3, false),
            "pop3s" => (Protocol::Pop3, true),
            "lmtp" => (Protocol::Lmtp, false),
            "smtp" => (Protocol::Smtp, false),
            "smtps" => (Protocol::Smtp, true),
            _ => return Err(ListenError::Service(name.to_owned())),
        };
        Ok(Self { protocol, implicit_tls })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// `SERVICE=ADDR:PORT` or `SERVICE=unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Listen {
    pub service: Service,
    pub place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListenError {
    #[error("a listener is SERVICE=ADDR:PORT or SERVICE=unix:PATH, for example imap=127.0.0.1:1143, and not {0:?}")]
    Form(String),
    #[error("{0:?} is no service: there are imap, imaps, pop3, pop3s, lmtp, smtp and smtps")]
    Service(String),
    #[error("{0:?} is no address with a port, such as 127.0.0.1:1143 or [::1]:1143")]
    Address(String),
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let (service, place) = text.split_once('=').ok_or_else(|| ListenError::Form(text.to_owned()))?;
        let service = service.parse()?;
        let place = match place.strip_prefix("unix:") {
            Some("") => return Err(ListenError::Form(text.to_owned())),
            Some(path) => Place::Unix(path.into()),
            None => Place::Tcp(place.parse().map_err(|_| ListenError::Address(place.to_owned()))?),
        };
        Ok(Self { service, place })
    }
}

impl TryFrom<String> for Listen {
    type Error = ListenError;

    fn try_from(text: String) -> Result<Self, ListenError> {
        text.parse()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp(address) => write!(formatter, "{} {address}", self.service.name()),
            Place::Unix(path) => write!(formatter, "{} unix:{}", self.service.name(), path.display()),
        }
    }
}

/// A listener that is bound, and on which workers its sockets are.
pub struct Bound {
    /// With the port that it really has.
    pub listen: Listen,
    /// One for each worker in turn; fewer for a Unix socket.
    pub sockets: Vec<OwnedFd>,
}

/// Connections that wait to be accepted. The kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// Opens the sockets of a listener: one per worker, among which the kernel spreads connections (SO_REUSEPORT).
///
/// # Errors
/// The address cannot be had, with what and where in the text.
pub fn bind(listen: &Listen, workers: usize) -> io::Result<Bound> {
    let describe = |error: io::Error| io::Error::new(error.kind(), format!("cannot listen for {listen}: {error}"));
    match &listen.place {
        Place::Tcp(address) => bind_tcp(listen.service, *address, workers).map_err(describe),
        Place::Unix(path) => {
            let socket = bind_unix(path).map_err(describe)?;
            Ok(Bound { listen: listen.clone(), sockets: vec![socket] })
        }
    }
}

fn bind_tcp(service: Service, address: SocketAddr, workers: usize) -> io::Result<Bound> {
    // Sharing a port is meant for our own workers: without this, two servers would share it by mistake.
    if address.port() != 0 {
        tcp_socket(address, false)?.bind(&address.into())?;
    }
    let mut address = address;
    let mut sockets = Vec::with_capacity(workers);
    for _ in 0..workers {
        let socket = tcp_socket(address, true)?;
        socket.bind(&address.into())?;
        address = socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("no address"))?;
        socket.listen(BACKLOG)?;
        sockets.push(socket.into());
    }
    Ok(Bound { listen: Listen { service, place: Place::Tcp(address) }, sockets })
}

fn tcp_socket(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    // What a server that died has left behind. Whoever answers is alive.
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket())
        && std::os::unix::net::UnixStream::connect(path).is_err()
    {
        std::fs::remove_file(path)?;
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    // As open as the same service on the loopback address; the directory can restrict it.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners() {
        let listen: Listen = "imap=127.0.0.1:1143".parse().unwrap();
        assert_eq!(listen.to_string(), "imap 127.0.0.1:1143");
        let listen: Listen = "lmtp=unix:/run/posthaste/lmtp".parse().unwrap();
        assert_eq!(listen.to_string(), "lmtp unix:/run/posthaste/lmtp");
        assert_eq!("lmtp=[::1]:24".parse::<Listen>().unwrap().to_string(), "lmtp [::1]:24");
    }

    #[test]
    fn every_service_has_one_name() {
        for name in ["imap", "imaps", "pop3", "pop3s", "lmtp", "smtp", "smtps"] {
            assert_eq!(name.parse::<Service>().unwrap().name(), name);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |text: &str| text.parse::<Listen>().unwrap_err().to_string();
        assert!(error("gopher=127.0.0.1:70").contains("no service"));
        assert!(error("imap=here").contains("no address"));
        assert!(error("imap").contains("SERVICE=ADDR:PORT"));
        assert!(error("imap=unix:").contains("SERVICE=ADDR:PORT"));
    }

    #[test]
    fn workers_share_a_port_and_nobody_else_does() {
        let bound = bind(&"imap=127.0.0.1:0".parse().unwrap(), 3).unwrap();
        assert_eq!(bound.sockets.len(), 3);
        let Place::Tcp(address) = bound.listen.place else { panic!() };
        assert_ne!(address.port(), 0);
        let again = bind(&format!("imap={address}").parse().unwrap(), 1).err().unwrap();
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        assert!(again.to_string().contains("imap"), "{again}");
    }

    #[test]
    fn a_unix_socket_that_was_left_behind_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let listen = Listen { service: "lmtp".parse().unwrap(), place: Place::Unix(directory.path().join("lmtp")) };
        let bound = bind(&listen, 2).unwrap();
        assert_eq!(bound.sockets.len(), 1);
        assert_eq!(bind(&listen, 2).err().unwrap().kind(), io::ErrorKind::AddrInUse, "someone is there");
        drop(bound);
        bind(&listen, 2).unwrap();
    }
}
