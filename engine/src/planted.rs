//! Planted bugs: switches in the real code that the proofs must catch. Without the feature `planted-bugs`, which only
//! the proofs enable, every switch is the constant `false`.

/// Each is one way of getting durability or uniqueness wrong. `tests/` states within how many seeds each is caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bug {
    /// A batch is acknowledged without a sync of the log.
    SkipSync,
    /// Sessions see a batch, and are answered, before its sync returns.
    PublishBeforeSync,
    /// Checksums are computed as zero everywhere, so that torn records pass.
    SkipChecksum,
    /// Replay takes batches in the order of segment files as listed, not of LSNs.
    ReplayByFileOrder,
    /// A new segment's name is not made durable before its first batch is acknowledged.
    SkipDirectorySync,
    /// UIDNEXT is taken from the highest living message, so that an expunged UID is issued again.
    ReissueUid,
    /// Recovery trusts the page cache: it neither syncs what it replays nor records the log's end.
    TrustPageCache,
    /// Recovery syncs the tail it has read but does not write it again, so that what a failed sync left behind in the
    /// page cache is shown and then lost.
    SkipTailRewrite,
    /// After a failed sync the log goes on as if nothing had happened.
    IgnoreFailedSync,
    /// Replay begins one segment too late after a checkpoint.
    ReplayTooLate,
    /// The mod-sequence of an expunge is not remembered.
    ForgetExpungeModSeq,
    /// A checkpoint includes what is pending, not only what is published.
    CheckpointPendingTip,
    /// A move marks the source as expunged but forgets the copy when both fall into one batch with another change.
    LoseMoveTarget,
    /// Compaction removes segments before the manifest that no longer names them is durable.
    RemoveBeforeCommit,
    /// What compaction writes is named by a manifest without having been synced.
    SkipCompactionSync,
    /// A message that is copied while its record is moved keeps the old place.
    ForgetPendingCopies,
    /// Compaction drops records of expunges without saying who lives.
    FoldWithoutLive,
    /// Compaction folds the flags of messages that it moves, and forgets those of others.
    FoldWithoutStates,
    /// Compaction drops the record of a deletion while older segments still have the mailbox.
    ForgetDeletions,
    /// A read that never returns is waited for.
    WaitForEver,
    /// A write that took less than it was given is taken for a whole one.
    TakeShortWrite,
    /// After a failed sync the same file is synced again, and that is believed.
    SyncAgain,
}

#[cfg(feature = "planted-bugs")]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants one bug, or none, in this thread.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub fn is_on(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(feature = "planted-bugs")]
pub use switch::{is_on, plant};

#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is_on(_: Bug) -> bool {
    false
}
