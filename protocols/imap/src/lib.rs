//! IMAP4rev1 and IMAP4rev2 without a socket: bytes in, commands out; values in, response bytes out.
//!
//! A command goes through two steps. [`frame`] finds its bounds: its lines and literals, under caps of count and size,
//! before anything is understood. [`command`] then parses the whole of it into a [`command::Command`]. So a bad command
//! costs one BAD response and the connection lives on.
//!
//! * [`types`] holds what commands and responses share: sequence sets, mailbox names, flags, dates.
//! * [`response`] appends responses to a `Vec<u8>`.
//! * [`section`] cuts header fields and partial bodies out of a message.
//! * [`session`] knows which command is legal when, and which UID has which sequence number.
//!
//! ```
//! use posthaste_imap::command::{Command, ParseOptions, fetch::FetchItem, parse};
//! use posthaste_imap::frame::{Event, Expect, Framer, Limits};
//! use posthaste_imap::response::{FetchWriter, Refusal, Status, write_tagged};
//! use posthaste_imap::session::{State, UidRuns};
//!
//! let mut framer = Framer::new(Limits::authenticated(50 << 20));
//! let state = State::Selected;
//! let uids = UidRuns::from_runs([(10, 12), (20, 20)]);
//! let (input, mut at, mut output) = (b"a1 UID FETCH 12:* (FLAGS)\r\na2 CHECKING\r\n", 0, Vec::new());
//! loop {
//!     let (taken, event) = framer.step(&input[at..], Expect::Command, &mut output);
//!     at += taken;
//!     let frame = match event {
//!         Event::NeedInput => break, // send `output`, receive more
//!         Event::Literal { .. } => {
//!             framer.accept_literal(&mut output); // or refuse_literal, when too many bytes are in flight
//!             continue;
//!         }
//!         Event::Refused(refusal) => {
//!             refusal.write(&mut output);
//!             continue;
//!         }
//!         Event::Fatal(bye) => {
//!             bye.write(&mut output);
//!             break; // send `output`, then close
//!         }
//!         Event::AnswerOwed => unreachable!("literals are answered above"),
//!         Event::Command(frame) => frame,
//!     };
//!     let tagged = match parse(frame, ParseOptions::default()) {
//!         Ok(tagged) => tagged,
//!         Err(refusal) => {
//!             refusal.write(&mut output);
//!             continue;
//!         }
//!     };
//!     if let Err(text) = tagged.command.check_state(state) {
//!         Refusal::bad(Some(tagged.tag), text).write(&mut output);
//!         continue;
//!     }
//!     match tagged.command {
//!         Command::Fetch(fetch) if fetch.uid => {
//!             let wanted = fetch.set.resolve_uids(uids.last_uid()).unwrap_or_default();
//!             for uid in uids.intersect(&wanted).into_iter().flat_map(|(first, last)| first..=last) {
//!                 let mut response = FetchWriter::new(&mut output, uids.sequence_number(uid).unwrap_or(0));
//!                 for item in &fetch.items {
//!                     match item {
//!                         FetchItem::Uid => response.uid(uid),
//!                         FetchItem::Flags => response.flags("\\Seen"),
//!                         _ => {}
//!                     }
//!                 }
//!                 response.finish();
//!             }
//!             write_tagged(&mut output, &tagged.tag, Status::Ok, None, "FETCH completed");
//!         }
//!         other => write_tagged(&mut output, &tagged.tag, Status::No, None, other.name()),
//!     }
//! }
//! assert_eq!(
//!     String::from_utf8_lossy(&output),
//!     "* 3 FETCH (UID 12 FLAGS (\\Seen))\r\n* 4 FETCH (UID 20 FLAGS (\\Seen))\r\na1 OK FETCH completed\r\na2 BAD Unknown command\r\n"
//! );
//! ```
//!
//! Nothing here knows a mailbox: what a command does is the server's business.
#![forbid(unsafe_code)]

mod base64;
pub mod command;
pub mod frame;
pub mod response;
pub mod section;
pub mod session;
pub mod types;

pub use base64::{decode_base64, decode_sasl_plain};
