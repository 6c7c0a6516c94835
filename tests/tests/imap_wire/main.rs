//! IMAP on the wire, against the real server: what RFC 3501 and its extensions say, and what servers get wrong.

mod search;
mod wire;
