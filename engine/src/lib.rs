//! The Posthaste message store: a log-structured, checksummed store of mailboxes, one log and one index per shard.
//!
//! This crate knows mailboxes, UIDs, flags, mod-sequences and segments. It knows no protocol and opens no socket.
//! The format on disk is described in `docs/format.md`, what an acknowledgement means in `docs/durability.md`.

pub mod accounts;
mod bodies;
pub mod changes;
pub mod check;
mod checkpoint;
pub mod compaction;
pub mod deliver;
pub mod dictionaries;
pub mod error;
pub mod flags;
pub mod format;
pub mod ids;
pub mod index;
mod indexes;
pub mod io;
pub mod join;
pub mod mailboxes;
mod message_cache;
pub mod messages;
pub mod node;
mod numbering;
mod packed;
pub mod planted;
pub mod read;
pub mod reading;
mod rebuild;
pub mod receipts;
mod recent_blocks;
pub mod recovery;
pub mod repair;
mod restore;
pub mod scrub;
pub mod shard;
pub mod slots;
pub mod state;
pub mod storage;
mod training;
mod verify;
pub mod view;
