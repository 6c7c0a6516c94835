//! Newtypes for what must not be mixed up. `docs/format.md` gives their encodings.

use std::fmt;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, formatter)
            }
        }
    };
}

newtype! {
    /// A shard: one log, one index, one owner at a time. Dense from 0.
    ShardId(u32)
}
newtype! {
    /// A term of ownership of a shard. Each start claims the next; 24 bits are used (see [`Lsn`]).
    Epoch(u32)
}
newtype! {
    /// A segment of a shard. Those of the log are dense and never reused; those that compaction has written are numbered
    /// from [`SegmentId::FIRST_COMPACTED`] on.
    SegmentId(u32)
}

impl SegmentId {
    pub const FIRST_COMPACTED: Self = Self(1 << 31);

    /// Whether compaction has written it: it is no part of the log's order.
    pub fn is_compacted(self) -> bool {
        self >= Self::FIRST_COMPACTED
    }
}
newtype! {
    /// RFC 3501, 2.3.1.1: never 0, ascending in a mailbox, never reused.
    Uid(u32)
}
newtype! {
    /// RFC 7162, 3.1: never 0, below 2^63.
    ModSeq(u64)
}
newtype! {
    /// A mailbox, named by the log sequence number of the record that made it.
    MailboxId(u64)
}
newtype! {
    /// An account, named by the log sequence number (in shard 0) of the record that made it.
    AccountId(u64)
}

/// A log sequence number: the epoch in the upper 24 bits, a counter that starts at 1 in each epoch in the lower 40.
/// It orders all records of a shard and survives relocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    pub const COUNTER_BITS: u32 = 40;
    /// Restarts that a shard can live through.
    pub const EPOCH_MAX: u32 = (1 << 24) - 1;

    /// # Panics
    /// If the epoch or the counter is past its limit: 16 million starts, or a trillion records in one of them.
    pub fn new(epoch: Epoch, counter: u64) -> Self {
        assert!(epoch.0 <= Self::EPOCH_MAX, "epoch {epoch} is past the limit of the format");
        assert!(counter < 1 << Self::COUNTER_BITS, "record counter {counter} is past the limit of the format");
        Self(u64::from(epoch.0) << Self::COUNTER_BITS | counter)
    }

    pub fn epoch(self) -> Epoch {
        Epoch((self.0 >> Self::COUNTER_BITS) as u32)
    }

    pub fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.epoch(), self.counter())
    }
}

/// A message's identity for its whole life, in every mailbox and shard (EMAILID, RFC 8474).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// The shard that took the message in.
    pub origin: ShardId,
    pub lsn: Lsn,
}

impl fmt::Display for MessageId {
    /// The form of RFC 8474, 4: letters, digits, `-` and `_` only.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "M{:x}-{:x}", self.origin.0, self.lsn.0)
    }
}

/// A place in the log of a shard: a byte offset in a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub segment: SegmentId,
    pub offset: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "segment {} offset {}", self.segment, self.offset)
    }
}

/// Where a record lies: its segment, offset and whole length, header included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    pub segment: SegmentId,
    /// Offset in units of 8 bytes, since records are 8-byte aligned: 32 GB of segment at most.
    pub offset_units: u32,
    pub len: u32,
    /// The record's number in its segment.
    pub ordinal: u32,
}

impl Location {
    pub fn offset(self) -> u64 {
        u64::from(self.offset_units) * 8
    }
}
