//! LMTP, on the structure that SMTP shares: bytes in, events and reply bytes out.
//!
//! The crate owns no socket, clock or directory. A server reads bytes into a buffer of its own and drives a
//! [`Session`], which answers what it can by itself and hands over the three questions that are not the
//! protocol's: is this recipient ours ([`Event::Recipient`]), may a message be taken now ([`Event::Data`]), and
//! was it stored ([`Event::Message`]).
//!
//! Rules that hold everywhere here:
//!
//! * A bad line costs one reply, never the connection, until there are too many of them.
//! * Replies come in the order of the commands (RFC 2920, 3.2) and carry an enhanced status code (RFC 2034, 4).
//! * Only CRLF "." CRLF ends a message. A message with a bare CR or LF is read to its proper end and refused.
//! * What the client sent never reaches a reply or a trace header with control characters in it.
#![forbid(unsafe_code)]

mod address;
mod command;
mod data;
mod date;
mod reply;
mod session;
mod trace;

pub use address::{Mailbox, PathError, ReversePath};
pub use command::{BodyType, COMMAND_LINE_BYTES_MAX, Command, Hello, MailParams};
pub use reply::{EnhancedCode, Reply};
pub use session::{Config, Event, Message, Protocol, Recipient, Session};
pub use trace::{Received, With, write_received, write_return_path};
