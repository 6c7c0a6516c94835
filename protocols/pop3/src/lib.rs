//! POP3 (RFC 1939, 2449, 5034): bytes in, events and reply bytes out.
//!
//! The crate owns no socket, clock or store. A server reads bytes into a buffer of its own and drives a [`Session`], which
//! answers what it can by itself and hands over what is not the protocol's: whether a login is right, TLS, the text of a
//! message, and the removal of what was deleted.
//!
//! ```
//! use posthaste_pop3::{Config, Credentials, Event, Maildrop, Message, Security, Session};
//! use std::sync::Arc;
//!
//! // What the server shares; one session per connection.
//! let config = Arc::new(Config::new("store.example"));
//! let mut output = Vec::new();
//! let security = Security { passwords: true, starttls: false };
//! let mut session = Session::new(config, security, &mut output);
//! let mut input = b"USER ann\r\nPASS secret\r\nRETR 1\r\nDELE 1\r\nQUIT\r\n".to_vec();
//! let mut at = 0;
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
//!         Event::Flush => {} // there is much of it: send `output` and clear it
//!         Event::LogIn(Credentials::Password { user, password }) => {
//!             assert_eq!((&*user, &*password.0), ("ann", "secret"));
//!             let mut maildrop = Maildrop::default();
//!             maildrop.push(Message { uid: 5, octets: 15 });
//!             session.open(maildrop.complete(1), &mut output);
//!         }
//!         Event::LogIn(Credentials::SaslPlain(_)) => unreachable!("the client does not use it"),
//!         Event::StartTls => unreachable!("it is not offered"),
//!         Event::Retrieve(wanted) => {
//!             assert_eq!(wanted.uid, 5);
//!             session.begin_message(&mut output);
//!             session.write_header(b"A: b\r\n\r\n", &mut output);
//!             // In as many pieces as one likes, sending the output between.
//!             session.write_body(b".text\r\n", &mut output);
//!             session.end_message(&mut output);
//!         }
//!         Event::Update(update) => {
//!             assert!(update.deleted.contains(5)); // durable from here on
//!             session.updated(Ok(()), &mut output);
//!         }
//!         Event::AnswerOwed => unreachable!("every event is answered above"),
//!         Event::Close => break, // send `output`, then close
//!     }
//! }
//! let output = String::from_utf8(output).unwrap();
//! assert!(output.contains("+OK 15 octets\r\nA: b\r\n\r\n..text\r\n.\r\n"));
//! assert!(output.ends_with("+OK Bye\r\n"));
//! ```
//!
//! Rules that hold everywhere here:
//!
//! * A bad line costs one reply, never the connection, until there are too many of them or one does not end.
//! * Replies come in the order of the commands (RFC 2449, 6.6). Nothing but the bytes decides what they are: not how they
//!   were cut on their way.
//! * Nothing is removed but after QUIT (RFC 1939, 6).
//! * What the client sent never comes back in a reply.
#![forbid(unsafe_code)]

mod command;
mod line;
mod maildrop;
mod reply;
mod session;
mod stuffing;

pub use command::{COMMAND_LINE_BYTES_MAX, SASL_LINE_BYTES_MAX};
pub use line::ENDLESS_LINE_BYTES;
pub use maildrop::{Maildrop, Message};
pub use reply::{Code, Refusal};
pub use session::{Config, Credentials, Event, Retrieve, Secret, Security, Session, Update};
pub use stuffing::{Stuffer, line_end_octets};
