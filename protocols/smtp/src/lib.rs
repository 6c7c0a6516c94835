//! SMTP (RFC 5321) as a server that takes mail in, and LMTP (RFC 2033): bytes in, events and reply bytes out.
//!
//! The crate owns no socket, clock or directory. A server reads bytes into a buffer of its own and drives a
//! [`Session`], which answers what it can by itself and hands over the three questions that are not the
//! protocol's: is this recipient ours ([`Event::Recipient`]), may a message be taken now ([`Event::Data`]), and
//! was it stored ([`Event::Message`]).
//!
//! ```
//! use posthaste_smtp::{Config, Event, Reply, Session};
//! use std::sync::Arc;
//!
//! // What the server shares; one session per connection, with what the directory finds per recipient (here a number).
//! let config = Arc::new(Config::lmtp("store.example"));
//! let mut output = Vec::new();
//! let mut session = Session::<u64>::new(config, &mut output);
//! let mut input = b"LHLO mx\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nDATA\r\nSubject: x\r\n\r\n..\r\n.\r\nQUIT\r\n".to_vec();
//! let mut at = 0;
//! let mut stored = Vec::new();
//! loop {
//!     let (taken, event) = session.step(&input[at..], &mut output);
//!     at += taken;
//!     match event {
//!         Event::NeedInput => {
//!             // Send `output` and clear it; keep what is after `at`; receive more into `input`. At its end: stop.
//!             input.drain(..at);
//!             at = 0;
//!             break;
//!         }
//!         Event::Recipient(mailbox) if mailbox.local_part() == "b" => session.accept_recipient(17, &mut output),
//!         Event::Recipient(_) => session.refuse(&Reply::no_such_user(), &mut output),
//!         Event::Data { declared_bytes: Some(n) } if n > 1_000_000 => session.refuse(&Reply::busy(), &mut output),
//!         Event::Data { .. } => session.accept_data(&mut output),
//!         Event::Message(message) => {
//!             for recipient in &message.recipients {
//!                 stored.push((recipient.account, message.body.clone())); // durable from here on
//!                 session.answer_recipient(&Reply::stored(), &mut output);
//!             }
//!         }
//!         Event::StartTls => unreachable!("it is not offered above"),
//!         Event::AnswerOwed => unreachable!("every event is answered above"),
//!         Event::Close => break, // send `output`, then close
//!     }
//! }
//! assert_eq!(stored, [(17, b"Subject: x\r\n\r\n.\r\n".to_vec())]);
//! assert!(output.ends_with(b"250 2.0.0 Stored\r\n221 2.0.0 Closing connection\r\n"));
//! ```
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
pub use command::{BodyType, COMMAND_LINE_BYTES_MAX, Chunk, Command, Hello, MailParams};
pub use reply::{EnhancedCode, Reply};
pub use session::{Config, Event, Message, Protocol, Recipient, Session};
pub use trace::{Received, Spoken, With, write_received, write_return_path};
