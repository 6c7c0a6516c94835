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
