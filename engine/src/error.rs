//! Errors of the engine, by what the caller can do about them.

use std::sync::Arc;

use crate::format::FormatError;
use crate::ids::{MailboxId, Position, ShardId};
use crate::storage::StorageError;

/// The caller asked for something that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such mailbox")]
    NoSuchMailbox,
    #[error("the mailbox exists already")]
    MailboxExists,
    #[error("no such account")]
    NoSuchAccount,
    #[error("the account exists already")]
    AccountExists,
    #[error("INBOX cannot be deleted or replaced")]
    InboxStays,
    #[error("no more than {0} keywords in one mailbox: remove some, or use another mailbox")]
    TooManyKeywords(usize),
    #[error("the message has {octets} octets, more than the limit of {limit}")]
    TooLarge { octets: u64, limit: u64 },
    #[error("{messages} messages are more than the {limit} that can be copied or moved at once: take them in parts")]
    TooManyMessages { messages: u64, limit: u64 },
    #[error("the mailbox is full: it has as many messages as the limit of {0} allows")]
    MailboxFull(u32),
    #[error("the account has {0} mailboxes, as many as it may have")]
    TooManyMailboxes(usize),
    #[error("no more than {0} subscriptions: remove some")]
    TooManySubscriptions(usize),
    #[error("the mailbox has used up its UIDs: create another")]
    UidsExhausted,
    #[error("the mailbox name is not allowed: {0}")]
    BadName(&'static str),
    #[error("the mailbox would become its own child")]
    IntoItself,
    #[error("this message does not exist (any more)")]
    NoSuchMessage,
}

/// Stored bytes are not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("damage in {place}: {error}")]
pub struct Damage {
    /// File and offset.
    pub place: String,
    pub error: FormatError,
}

/// What an operation of the engine may end with.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The device is full; reading and expunging go on.
    #[error("the store is full: free space on its device, or expunge and compact")]
    Full,
    /// The shard takes no changes until it is opened again.
    #[error("shard {shard} takes no changes until it is reopened: {reason}")]
    Poisoned { shard: ShardId, reason: Arc<str> },
    /// A read failed; it may be tried again.
    #[error("storage failed: {0}")]
    Storage(Arc<StorageError>),
    /// The shard is stopping.
    #[error("shard {0} is stopping")]
    Stopping(ShardId),
}

impl From<StorageError> for EngineError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::NoSpace(_) => Self::Full,
            error => Self::Storage(Arc::new(error)),
        }
    }
}

/// Something that recovery or a check found, with all that can be said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub shard: ShardId,
    /// The file, below the data directory.
    pub file: String,
    pub offset: u64,
    pub what: String,
    /// The mailboxes and UIDs (first, last; 0 for none) that it touches, as far as they are known.
    pub touches: Vec<(MailboxId, u32, u32)>,
}

/// What opening a shard found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Batches replayed.
    pub batches: u64,
    pub records: u64,
    pub bytes: u64,
    /// Records before those that were read for the footer of their segment, which the checkpoint does not list.
    pub unlisted_records: u64,
    /// Where an unacknowledged tail was dropped, and how many bytes it had at least.
    pub torn_tail: Option<(Position, String)>,
    pub damage: Vec<Finding>,
}
