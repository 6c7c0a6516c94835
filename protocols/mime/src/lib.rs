//! The structure of a message: where its header, its parts and their bodies are, and what IMAP needs to know of them.
//!
//! [`structure::scan`] finds the parts of a raw message in one pass; [`digest`] keeps what ENVELOPE, BODYSTRUCTURE and
//! PREVIEW need, so that none of them reads the message again, and BODY[1.2] is arithmetic. [`words`], [`charset`] and
//! [`transfer`] make text of what is encoded, and [`search`] looks for strings in it.
//!
//! Mail is hostile: nothing here recurses, and depth, number of parts, parameters and addresses are bounded. Nothing is
//! ever refused either: what cannot be understood is a plain part.
#![forbid(unsafe_code)]

pub mod address;
pub mod charset;
pub mod date;
pub mod digest;
pub mod header;
mod preview;
pub mod search;
pub mod structure;
pub mod transfer;
pub mod words;

pub use digest::{ArchivedDigest, Digest, DigestError};
