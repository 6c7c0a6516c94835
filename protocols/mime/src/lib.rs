//! The structure of a message: where its header, its parts and their bodies are, and what IMAP needs to know of them.
//!
//! [`structure::scan`] finds the parts of a raw message in one pass; [`digest`] keeps what ENVELOPE, BODYSTRUCTURE and
//! PREVIEW need, so that none of them reads the message again, and BODY[1.2] is arithmetic.
//!
//! Mail is hostile: nothing here recurses, and depth, number of parts, parameters and addresses are bounded. Nothing is
//! ever refused either: what cannot be understood is a plain part.
#![forbid(unsafe_code)]

pub mod address;
pub mod date;
pub mod digest;
pub mod header;
mod preview;
pub mod structure;

pub use digest::{ArchivedDigest, Digest, DigestError};
