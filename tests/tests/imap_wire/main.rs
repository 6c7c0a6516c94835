//! IMAP on the wire, against the real server: what RFC 3501 and its extensions say, and what servers get wrong.

mod condstore;
mod mailboxes;
mod mime;
mod numbers;
mod search;
mod sessions;
mod traps;
mod wire;
