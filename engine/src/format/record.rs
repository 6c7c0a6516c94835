//! Records: the units of change. Each has a header with its own checksum over header and payload, its LSN, and the
//! transaction it belongs to.
//!
//! A record says what the change *is*, never what it depends on: replay applies it without looking anything up.

use super::codec::{DecodeError, Input, Wire, wire_struct};
use super::message::{MessageHead, Placement};
use super::{FormatError, checksum, verify_checksum};
use crate::flags::{Flags, UidSet};
use crate::ids::{AccountId, Location, Lsn, MailboxId, MessageId, ModSeq, ShardId, Uid};

pub const RECORD_HEADER_BYTES: usize = 32;
/// Bit of a kind: a reader that does not know it may skip the record.
pub const OPTIONAL: u16 = 0x8000;
/// Flag of a record that carries state as of an LSN in its payload, into which compaction has folded older changes.
pub const FOLDED: u16 = 1;

/// The kinds of version 1. Unknown kinds with [`OPTIONAL`] are skipped, others refused.
pub mod kind {
    use super::OPTIONAL;

    pub const MESSAGE: u16 = 1;
    pub const BLOCK: u16 = 2;
    pub const CONTENT: u16 = 3;
    pub const PLACEMENTS: u16 = 4;
    pub const FLAGS: u16 = 5;
    pub const EXPUNGE: u16 = 6;
    pub const MAILBOX: u16 = 7;
    pub const KEYWORD: u16 = 8;
    pub const RECENT: u16 = 9;
    pub const SUBSCRIPTION: u16 = 10;
    pub const ACCOUNT: u16 = 11;
    pub const COMMIT: u16 = 12;
    pub const BASE: u16 = 13;
    pub const ACCOUNT_BASE: u16 = 14;
    pub const ATTRIBUTE: u16 = 15;
    pub const RECEIPT: u16 = OPTIONAL | 16;
}

/// The header of a record, without checksum and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    pub kind: u16,
    pub flags: u16,
    /// 0 as written first; of two copies of one LSN the higher generation wins.
    pub generation: u32,
    pub lsn: Lsn,
    /// The transaction whose commit record makes this one count, or 0 for none.
    pub transaction: u64,
}
wire_struct!(RecordHeader { kind: u16, flags: u16, generation: u32, lsn: Lsn, transaction: u64 });

impl RecordHeader {
    /// Writes the header into the first bytes of a record whose payload is in place.
    pub(crate) fn seal(&self, record: &mut [u8]) {
        let payload_len = (record.len() - RECORD_HEADER_BYTES) as u32;
        let mut fields = Vec::with_capacity(RECORD_HEADER_BYTES);
        payload_len.put(&mut fields);
        Wire::put(self, &mut fields);
        record[4..4 + fields.len()].copy_from_slice(&fields);
        let crc = checksum(&record[4..]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
    }

    /// Decodes and verifies the record that starts with `bytes`; returns header and payload.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), FormatError> {
        const WHAT: &str = "record";
        let short =
            |needed: usize| FormatError::Short { what: WHAT, needed: needed as u64, available: bytes.len() as u64 };
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = Input(bytes.get(..RECORD_HEADER_BYTES).ok_or_else(|| short(RECORD_HEADER_BYTES))?);
        let expected = u32::take(&mut input).map_err(decode)?;
        let payload_len = u32::take(&mut input).map_err(decode)? as usize;
        let end = RECORD_HEADER_BYTES + payload_len;
        let record = bytes.get(..end).ok_or_else(|| short(end))?;
        verify_checksum(WHAT, expected, &record[4..])?;
        let header = <Self as Wire>::take(&mut input).map_err(decode)?;
        if header.kind == 0 {
            return Err(FormatError::UnknownRecord { kind: 0 });
        }
        Ok((header, &record[RECORD_HEADER_BYTES..]))
    }

    /// The whole length that a record claims, verified or not.
    pub fn claimed_len(bytes: &[u8]) -> Option<usize> {
        let len = bytes.get(4..8)?;
        Some(RECORD_HEADER_BYTES + u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize)
    }
}

/// Adds placements of messages that the log already holds: COPY, and the target side of MOVE.
#[derive(Clone, Debug, PartialEq)]
pub struct Placements {
    pub mailbox: MailboxId,
    pub modseq: ModSeq,
    pub items: Vec<PlacedMessage>,
}

/// One message placed by reference.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacedMessage {
    pub uid: Uid,
    pub message: MessageId,
    pub location: Location,
    /// Which placement of the message record has this one's prefix bytes.
    pub prefix_of: u16,
    pub head_bytes: u32,
    pub size: u64,
    pub flags: Flags,
    pub internal_date: i64,
    pub zone_minutes: i16,
    pub save_date: i64,
}
wire_struct!(Placements { mailbox: MailboxId, modseq: ModSeq, items: Vec<PlacedMessage> });
wire_struct!(PlacedMessage {
    uid: Uid,
    message: MessageId,
    location: Location,
    prefix_of: u16,
    head_bytes: u32,
    size: u64,
    flags: Flags,
    internal_date: i64,
    zone_minutes: i16,
    save_date: i64,
});

/// Changes flags: new = (old without `clear`) with `set`, for every message of `uids`, all of which exist.
#[derive(Clone, Debug, PartialEq)]
pub struct FlagChange {
    pub mailbox: MailboxId,
    pub modseq: ModSeq,
    pub uids: UidSet,
    pub set: Flags,
    pub clear: Flags,
    /// By how much the number of unseen messages changes, so that STATUS of a mailbox needs no index.
    pub unseen_change: i32,
}
wire_struct!(FlagChange {
    mailbox: MailboxId,
    modseq: ModSeq,
    uids: UidSet,
    set: Flags,
    clear: Flags,
    unseen_change: i32,
});

/// Removes messages; all of `uids` exist.
#[derive(Clone, Debug, PartialEq)]
pub struct Expunge {
    pub mailbox: MailboxId,
    pub modseq: ModSeq,
    pub uids: UidSet,
    /// How many of them were unseen.
    pub unseen: u32,
    /// How many octets they had.
    pub size: u64,
}
wire_struct!(Expunge { mailbox: MailboxId, modseq: ModSeq, uids: UidSet, unseen: u32, size: u64 });

/// What happens to a mailbox as a whole.
#[derive(Clone, Debug, PartialEq)]
pub enum MailboxChange {
    Create { mailbox: MailboxId, account: AccountId, name: String, uid_validity: u32, special_use: u16 },
    Rename { mailbox: MailboxId, name: String },
    Delete { mailbox: MailboxId },
}

impl MailboxChange {
    pub fn mailbox(&self) -> MailboxId {
        match self {
            Self::Create { mailbox, .. } | Self::Rename { mailbox, .. } | Self::Delete { mailbox } => *mailbox,
        }
    }
}

impl Wire for MailboxChange {
    const MIN_BYTES: usize = 9;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Create { mailbox, account, name, uid_validity, special_use } => {
                1_u8.put(out);
                mailbox.put(out);
                account.put(out);
                name.put(out);
                uid_validity.put(out);
                special_use.put(out);
            }
            Self::Rename { mailbox, name } => {
                2_u8.put(out);
                mailbox.put(out);
                name.put(out);
            }
            Self::Delete { mailbox } => {
                3_u8.put(out);
                mailbox.put(out);
            }
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let tag = u8::take(input)?;
        let mailbox = MailboxId::take(input)?;
        Ok(match tag {
            1 => Self::Create {
                mailbox,
                account: Wire::take(input)?,
                name: Wire::take(input)?,
                uid_validity: Wire::take(input)?,
                special_use: Wire::take(input)?,
            },
            2 => Self::Rename { mailbox, name: Wire::take(input)? },
            3 => Self::Delete { mailbox },
            value => return Err(DecodeError::Value { field: "mailbox change", value: value.into() }),
        })
    }
}

/// Gives a keyword the next number of its mailbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyword {
    pub mailbox: MailboxId,
    pub number: u16,
    pub name: String,
}
wire_struct!(Keyword { mailbox: MailboxId, number: u16, name: String });

/// A session has claimed `\Recent` for all UIDs below `below`. Appended without forcing a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    pub mailbox: MailboxId,
    pub below: Uid,
}
wire_struct!(Recent { mailbox: MailboxId, below: Uid });

/// Subscribes an account to a name, or unsubscribes it; the name need not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subscription {
    pub account: AccountId,
    pub name: String,
    pub subscribed: bool,
}
wire_struct!(Subscription { account: AccountId, name: String, subscribed: bool });

/// An account's whole state, in shard 0 only. A deleted account stays as a tombstone, so that its UIDVALIDITY counter
/// outlives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountRecord {
    pub account: AccountId,
    pub name: String,
    pub shard: ShardId,
    /// A password hash in its own text form, or empty for none.
    pub password: String,
    pub deleted: bool,
    /// Every UIDVALIDITY of the account is at least this.
    pub uid_validity_floor: u32,
}
wire_struct!(AccountRecord {
    account: AccountId,
    name: String,
    shard: ShardId,
    password: String,
    deleted: bool,
    uid_validity_floor: u32,
});

/// Makes the records of a transaction count, all at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Commit {
    pub transaction: u64,
    pub records: u32,
}
wire_struct!(Commit { transaction: u64, records: u32 });

/// A mailbox's state as of an LSN without most of its messages; what compaction folds older records into.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Base {
    pub mailbox: MailboxId,
    /// Every change of the mailbox up to here is in.
    pub as_of: Lsn,
    pub account: AccountId,
    pub name: String,
    pub special_use: u16,
    pub uid_validity: u32,
    pub uid_next: Uid,
    pub highest_modseq: ModSeq,
    pub recent_below: Uid,
    pub keywords: Vec<String>,
    /// The messages that live as of then: no other placement at or below `as_of` counts.
    pub live: UidSet,
    /// Expunge history, ascending by mod-sequence.
    pub expunged: Vec<(ModSeq, UidSet)>,
    /// Below this mod-sequence the history is not complete (RFC 7162, 3.2.5.2).
    pub history_horizon: ModSeq,
    /// Messages that live as of then and were placed by records that are gone.
    pub placed: Vec<(ModSeq, PlacedMessage)>,
    /// What messages that live as of then, and whose own records are elsewhere, owe to changes that are gone.
    pub states: Vec<MessageStates>,
}
wire_struct!(Base {
    mailbox: MailboxId,
    as_of: Lsn,
    account: AccountId,
    name: String,
    special_use: u16,
    uid_validity: u32,
    uid_next: Uid,
    highest_modseq: ModSeq,
    recent_below: Uid,
    keywords: Vec<String>,
    live: UidSet,
    expunged: Vec<(ModSeq, UidSet)>,
    history_horizon: ModSeq,
    placed: Vec<(ModSeq, PlacedMessage)>,
    states: Vec<MessageStates>,
});

/// Messages that have the same flags since the same change.
#[derive(Clone, Debug, PartialEq)]
pub struct MessageStates {
    pub flags: Flags,
    pub modseq: ModSeq,
    pub uids: UidSet,
}
wire_struct!(MessageStates { flags: Flags, modseq: ModSeq, uids: UidSet });

/// What an account has in its shard besides mailboxes, as of an LSN.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccountBase {
    pub account: AccountId,
    /// Every change of the account up to here is in.
    pub as_of: Lsn,
    pub uid_validity_next: u32,
    pub subscriptions: Vec<String>,
    pub attributes: Vec<NamedValue>,
}
wire_struct!(AccountBase {
    account: AccountId,
    as_of: Lsn,
    uid_validity_next: u32,
    subscriptions: Vec<String>,
    attributes: Vec<NamedValue>,
});

/// An attribute in an account's base record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedValue {
    pub mailbox: MailboxId,
    pub name: String,
    pub value: Vec<u8>,
}
wire_struct!(NamedValue { mailbox: MailboxId, name: String, value: Vec<u8> });

/// A named value of an account or mailbox: metadata, ACL entries, scripts, quota. An empty value removes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    pub account: AccountId,
    /// 0 for an attribute of the account itself.
    pub mailbox: MailboxId,
    pub name: String,
    pub value: Vec<u8>,
}
wire_struct!(Attribute { account: AccountId, mailbox: MailboxId, name: String, value: Vec<u8> });

/// Remembers that a message was taken for a recipient, so that its repetition can be swallowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receipt {
    pub content_hash: u128,
    pub recipient_hash: u128,
    pub expires_ms: u64,
}
wire_struct!(Receipt { content_hash: u128, recipient_hash: u128, expires_ms: u64 });

/// A content that messages share, or one block of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub id: MessageId,
    /// BLAKE3 under the store's key.
    pub keyed_hash: [u64; 4],
    pub raw_len: u64,
    /// Frames of at most 256 KB each.
    pub frames: Vec<super::frame::FrameInfo>,
}

impl Wire for [u64; 4] {
    const MIN_BYTES: usize = 32;

    fn put(&self, out: &mut Vec<u8>) {
        for word in self {
            word.put(out);
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok([u64::take(input)?, u64::take(input)?, u64::take(input)?, u64::take(input)?])
    }
}
wire_struct!(Content { id: MessageId, keyed_hash: [u64; 4], raw_len: u64, frames: Vec<super::frame::FrameInfo> });

/// A record's payload without the bytes of messages: what replay applies.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// The head of a message record; its frames stay where they are.
    Message(Box<MessageHead>),
    /// A block of a large body; the frame follows its info.
    Block(super::frame::FrameInfo),
    Content(Content),
    Placements(Placements),
    Flags(FlagChange),
    Expunge(Expunge),
    Mailbox(MailboxChange),
    Keyword(Keyword),
    Recent(Recent),
    Subscription(Subscription),
    Account(AccountRecord),
    Commit(Commit),
    Base(Box<Base>),
    AccountBase(AccountBase),
    Attribute(Attribute),
    Receipt(Receipt),
}

impl Record {
    pub fn kind(&self) -> u16 {
        match self {
            Self::Message(_) => kind::MESSAGE,
            Self::Block(_) => kind::BLOCK,
            Self::Content(_) => kind::CONTENT,
            Self::Placements(_) => kind::PLACEMENTS,
            Self::Flags(_) => kind::FLAGS,
            Self::Expunge(_) => kind::EXPUNGE,
            Self::Mailbox(_) => kind::MAILBOX,
            Self::Keyword(_) => kind::KEYWORD,
            Self::Recent(_) => kind::RECENT,
            Self::Subscription(_) => kind::SUBSCRIPTION,
            Self::Account(_) => kind::ACCOUNT,
            Self::Commit(_) => kind::COMMIT,
            Self::Base(_) => kind::BASE,
            Self::AccountBase(_) => kind::ACCOUNT_BASE,
            Self::Attribute(_) => kind::ATTRIBUTE,
            Self::Receipt(_) => kind::RECEIPT,
        }
    }

    /// Writes the payload. Messages, blocks and contents write their frames after it themselves.
    pub fn put_payload(&self, out: &mut Vec<u8>) {
        match self {
            Self::Message(head) => head.put_sealed(out),
            Self::Block(info) => info.put(out),
            Self::Content(content) => content.put(out),
            Self::Placements(placements) => placements.put(out),
            Self::Flags(change) => change.put(out),
            Self::Expunge(expunge) => expunge.put(out),
            Self::Mailbox(change) => change.put(out),
            Self::Keyword(keyword) => keyword.put(out),
            Self::Recent(recent) => recent.put(out),
            Self::Subscription(subscription) => subscription.put(out),
            Self::Account(account) => account.put(out),
            Self::Commit(commit) => commit.put(out),
            Self::Base(base) => base.put(out),
            Self::AccountBase(base) => base.put(out),
            Self::Attribute(attribute) => attribute.put(out),
            Self::Receipt(receipt) => receipt.put(out),
        }
    }

    /// Decodes a payload. `None` for a kind that is unknown and may be skipped.
    ///
    /// # Errors
    /// [`FormatError::UnknownRecord`] for a kind that may not be skipped.
    pub fn decode(kind: u16, payload: &[u8]) -> Result<Option<Self>, FormatError> {
        fn whole<T: Wire>(what: &'static str, payload: &[u8]) -> Result<T, FormatError> {
            T::decode(payload).map_err(|source| FormatError::Decode { what, source })
        }
        fn front<T: Wire>(what: &'static str, payload: &[u8]) -> Result<T, FormatError> {
            T::take(&mut Input(payload)).map_err(|source| FormatError::Decode { what, source })
        }
        Ok(Some(match kind {
            kind::MESSAGE => Self::Message(Box::new(MessageHead::decode_sealed(payload)?)),
            kind::BLOCK => Self::Block(front("block record", payload)?),
            kind::CONTENT => Self::Content(front("content record", payload)?),
            kind::PLACEMENTS => Self::Placements(whole("placements record", payload)?),
            kind::FLAGS => Self::Flags(whole("flags record", payload)?),
            kind::EXPUNGE => Self::Expunge(whole("expunge record", payload)?),
            kind::MAILBOX => Self::Mailbox(whole("mailbox record", payload)?),
            kind::KEYWORD => Self::Keyword(whole("keyword record", payload)?),
            kind::RECENT => Self::Recent(whole("recent record", payload)?),
            kind::SUBSCRIPTION => Self::Subscription(whole("subscription record", payload)?),
            kind::ACCOUNT => Self::Account(whole("account record", payload)?),
            kind::COMMIT => Self::Commit(whole("commit record", payload)?),
            kind::BASE => Self::Base(Box::new(whole("base record", payload)?)),
            kind::ACCOUNT_BASE => Self::AccountBase(whole("account base record", payload)?),
            kind::ATTRIBUTE => Self::Attribute(whole("attribute record", payload)?),
            kind::RECEIPT => Self::Receipt(whole("receipt record", payload)?),
            kind if kind & OPTIONAL != 0 => return Ok(None),
            kind => return Err(FormatError::UnknownRecord { kind }),
        }))
    }

    /// The LSN up to which a folded record has everything.
    pub fn folded_as_of(&self) -> Option<Lsn> {
        match self {
            Self::Message(head) => Some(head.as_of),
            Self::Base(base) => Some(base.as_of),
            Self::AccountBase(base) => Some(base.as_of),
            _ => None,
        }
    }

    /// What the record changes, for the touch table.
    pub fn touches(&self, out: &mut impl FnMut(MailboxId, u32, u32)) {
        let set = |uids: &UidSet| (uids.first().map_or(0, |uid| uid.0), uids.last().map_or(0, |uid| uid.0));
        match self {
            Self::Message(head) => {
                for Placement { mailbox, uid, .. } in head.placements.iter().filter(|placement| !placement.is_gone()) {
                    out(*mailbox, uid.0, uid.0);
                }
            }
            Self::Placements(placements) => {
                let first = placements.items.first().map_or(0, |item| item.uid.0);
                let last = placements.items.last().map_or(0, |item| item.uid.0);
                out(placements.mailbox, first, last);
            }
            Self::Flags(change) => {
                let (first, last) = set(&change.uids);
                out(change.mailbox, first, last);
            }
            Self::Expunge(expunge) => {
                let (first, last) = set(&expunge.uids);
                out(expunge.mailbox, first, last);
            }
            Self::Mailbox(MailboxChange::Create { mailbox, account, .. }) => {
                out(*mailbox, account.0 as u32, (account.0 >> 32) as u32);
            }
            Self::Mailbox(change) => out(change.mailbox(), 0, 0),
            Self::Keyword(keyword) => out(keyword.mailbox, 0, 0),
            Self::Recent(recent) => out(recent.mailbox, 0, 0),
            Self::Base(base) => {
                out(base.mailbox, base.account.0 as u32, (base.account.0 >> 32) as u32);
            }
            Self::Attribute(attribute) => out(attribute.mailbox, 0, 0),
            Self::Block(_)
            | Self::Content(_)
            | Self::Subscription(_)
            | Self::Account(_)
            | Self::Commit(_)
            | Self::AccountBase(_)
            | Self::Receipt(_) => out(MailboxId(0), 0, 0),
        }
    }
}
