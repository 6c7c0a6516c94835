//! The index of one mailbox: its messages in the order of their UIDs, flag bitmaps, and expunge history.
//!
//! The index is a base page and the changes since. [`MailboxIndex::apply`] is the only thing that changes it, whether
//! the change has just been committed or comes from replay.

use std::collections::BTreeMap;

use rkyv::util::AlignedVec;
use roaring::RoaringBitmap;

use crate::flags::{Flags, UidSet};
use crate::format::FormatError;
use crate::format::codec::{DecodeError, Input, Wire, wire_struct};
use crate::format::page::{
    MailboxPage, MailboxRowsPage, PageHeader, PageKind, PageMessage, join_mailbox, restore, split_mailbox,
};
use crate::format::record::{Base, Expunge, FlagChange, PlacedMessage};
use crate::ids::{Location, Lsn, MessageId, ModSeq, SegmentId, ShardId, Uid};
use crate::messages::Messages;
use crate::numbering::append_run;

/// Expunges that a mailbox remembers; older ones fall below the horizon.
pub const EXPUNGE_HISTORY_MAX: usize = 1000;

/// Messages of one mailbox: more would not fit into an index page.
pub const MESSAGES_MAX: u32 = 10_000_000;

/// A message in a mailbox.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Message {
    pub uid: Uid,
    /// Which placement of the record has this one's prefix bytes.
    pub prefix_of: u16,
    pub zone_minutes: i16,
    pub modseq: ModSeq,
    pub id: MessageId,
    pub location: Location,
    /// Bytes of the record up to the end of its header frame.
    pub head_bytes: u32,
    /// RFC822.SIZE: octets of prefix, header and body.
    pub size: u64,
    pub internal_date: i64,
    pub save_date: i64,
}
wire_struct!(Message {
    uid: Uid,
    prefix_of: u16,
    zone_minutes: i16,
    modseq: ModSeq,
    id: MessageId,
    location: Location,
    head_bytes: u32,
    size: u64,
    internal_date: i64,
    save_date: i64,
});

/// A message whose record compaction has moved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moved {
    pub uid: Uid,
    /// Where it was: segment, and offset in units of 8 bytes.
    pub from: SegmentId,
    pub from_units: u32,
    pub to: Location,
    pub head_bytes: u32,
}
wire_struct!(Moved { uid: Uid, from: SegmentId, from_units: u32, to: Location, head_bytes: u32 });

/// One change of a mailbox's index.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Place {
        message: Message,
        flags: Flags,
    },
    Flags(FlagChange),
    Expunge(Expunge),
    Keyword {
        number: u16,
        name: String,
    },
    /// Ascending by UID.
    Relocate(Vec<Moved>),
    /// A message as a folded record has it, with all changes up to then: it replaces what is known of the UID.
    Fold {
        message: Message,
        flags: Flags,
    },
    /// What a base record says of the messages up to then.
    Base(Box<Base>),
}

impl PlacedMessage {
    pub(crate) fn to_message(&self, modseq: ModSeq) -> Message {
        Message {
            uid: self.uid,
            prefix_of: self.prefix_of,
            zone_minutes: self.zone_minutes,
            modseq,
            id: self.message,
            location: self.location,
            head_bytes: self.head_bytes,
            size: self.size,
            internal_date: self.internal_date,
            save_date: self.save_date,
        }
    }

    pub(crate) fn of_message(message: &Message, flags: Flags) -> Self {
        Self {
            uid: message.uid,
            message: message.id,
            location: message.location,
            prefix_of: message.prefix_of,
            head_bytes: message.head_bytes,
            size: message.size,
            flags,
            internal_date: message.internal_date,
            zone_minutes: message.zone_minutes,
            save_date: message.save_date,
        }
    }
}

impl Wire for Change {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Place { message, flags } => {
                1_u8.put(out);
                message.put(out);
                flags.put(out);
            }
            Self::Flags(change) => {
                2_u8.put(out);
                change.put(out);
            }
            Self::Expunge(expunge) => {
                3_u8.put(out);
                expunge.put(out);
            }
            Self::Keyword { number, name } => {
                4_u8.put(out);
                number.put(out);
                name.put(out);
            }
            Self::Relocate(moved) => {
                5_u8.put(out);
                moved.put(out);
            }
            Self::Fold { message, flags } => {
                6_u8.put(out);
                message.put(out);
                flags.put(out);
            }
            Self::Base(base) => {
                7_u8.put(out);
                base.put(out);
            }
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        Ok(match u8::take(input)? {
            1 => Self::Place { message: Wire::take(input)?, flags: Wire::take(input)? },
            2 => Self::Flags(Wire::take(input)?),
            3 => Self::Expunge(Wire::take(input)?),
            4 => Self::Keyword { number: Wire::take(input)?, name: Wire::take(input)? },
            5 => Self::Relocate(Wire::take(input)?),
            6 => Self::Fold { message: Wire::take(input)?, flags: Wire::take(input)? },
            7 => Self::Base(Box::new(Wire::take(input)?)),
            value => return Err(DecodeError::Value { field: "index change", value: value.into() }),
        })
    }
}

/// A loaded index. Everything in it is published state.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MailboxIndex {
    pub messages: Messages,
    /// UIDs by flag bit; no empty bitmaps.
    flags: BTreeMap<u8, RoaringBitmap>,
    /// Ascending by mod-sequence.
    pub expunged: Vec<(ModSeq, UidSet)>,
    /// Expunges at or below this may be missing from the history.
    pub history_horizon: ModSeq,
    /// A keyword's number is its place.
    pub keywords: Vec<String>,
}

impl MailboxIndex {
    /// Where a UID stands, or would.
    pub fn position(&self, uid: Uid) -> Result<usize, usize> {
        self.messages.position(uid)
    }

    pub fn message(&self, uid: Uid) -> Option<Message> {
        self.position(uid).ok().map(|at| self.messages.get(at))
    }

    pub fn contains(&self, uid: Uid) -> bool {
        self.position(uid).is_ok()
    }

    pub fn flags_of(&self, uid: Uid) -> Flags {
        let mut flags = Flags::NONE;
        for (&bit, uids) in &self.flags {
            if uids.contains(uid.0) {
                flags.0 |= 1 << bit;
            }
        }
        flags
    }

    /// The UIDs that have a flag.
    pub fn with_flag(&self, bit: u8) -> Option<&RoaringBitmap> {
        self.flags.get(&bit)
    }

    /// All UIDs.
    pub fn uids(&self) -> UidSet {
        UidSet(self.uids_between(0, u32::MAX))
    }

    /// Those from `first` to `last`.
    pub fn uids_between(&self, first: u32, last: u32) -> RoaringBitmap {
        let mut uids = RoaringBitmap::new();
        self.messages.visit_runs(first, last, |first, last| append_run(&mut uids, first, last));
        uids
    }

    /// Those of the UIDs that there are.
    pub fn existing(&self, uids: &UidSet) -> RoaringBitmap {
        /// UIDs that are looked at in the time that it takes to find one.
        const RUN_COST: usize = 16;
        let (Some(first), Some(last)) = (uids.first(), uids.last()) else { return RoaringBitmap::new() };
        let runs = uids.runs_up_to(self.messages.len() / RUN_COST);
        let Some(runs) = runs else { return self.uids_between(first.0, last.0) & &uids.0 };
        let mut existing = RoaringBitmap::new();
        for (first, last) in runs {
            self.messages.visit_runs(first, last, |first, last| append_run(&mut existing, first, last));
        }
        existing
    }

    /// The number of a keyword; keywords are compared without regard to ASCII case (RFC 3501, 9: `flag-keyword`).
    pub fn keyword_number(&self, name: &str) -> Option<usize> {
        self.keywords.iter().position(|keyword| keyword.eq_ignore_ascii_case(name))
    }

    /// Above the numbers of all keywords. Damage may have taken a name whose flags are still there.
    pub fn keywords_end(&self) -> usize {
        let in_use = self.flags.keys().filter_map(|&bit| Flags(1 << bit).keywords().next()).max();
        self.keywords.len().max(in_use.map_or(0, |number| number + 1))
    }

    /// Roughly the memory that the index takes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.messages.memory_bytes()
            + self.flags.values().map(RoaringBitmap::serialized_size).sum::<usize>()
            + self.expunged.len() * 64
    }

    /// The index that changes amount to, which may be those that are left of a log.
    pub(crate) fn of_changes(changes: &[(Lsn, Change)]) -> Self {
        let mut index = Self::default();
        changes.iter().for_each(|(_, change)| index.apply(change));
        index.forget_stray_flags();
        index
    }

    /// Applies a change that is newer than everything applied so far.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Place { message, flags } => {
                self.messages.put(message);
                for bit in flags.bits() {
                    self.flags.entry(bit as u8).or_default().insert(message.uid.0);
                }
            }
            Change::Flags(change) => {
                for (bit, set) in [(change.set, true), (change.clear.without(change.set), false)] {
                    for bit in bit.bits() {
                        let bit = bit as u8;
                        if set {
                            *self.flags.entry(bit).or_default() |= &change.uids.0;
                        } else if let Some(uids) = self.flags.get_mut(&bit) {
                            *uids -= &change.uids.0;
                            if uids.is_empty() {
                                self.flags.remove(&bit);
                            }
                        }
                    }
                }
                self.messages.set_modseq(&change.uids.0, change.modseq);
            }
            Change::Expunge(expunge) => {
                let gone = &expunge.uids.0;
                self.messages.remove(gone);
                self.flags.retain(|_, uids| {
                    *uids -= gone;
                    !uids.is_empty()
                });
                // A base record may have known of it.
                if self.expunged.last().is_none_or(|(last, _)| *last < expunge.modseq) {
                    self.expunged.push((expunge.modseq, expunge.uids.clone()));
                }
                if self.expunged.len() > EXPUNGE_HISTORY_MAX {
                    let forgotten = self.expunged.len() - EXPUNGE_HISTORY_MAX;
                    self.history_horizon = self.expunged[forgotten - 1].0;
                    self.expunged.drain(..forgotten);
                }
            }
            Change::Keyword { number, name } => {
                let number = *number as usize;
                if self.keywords.len() <= number {
                    self.keywords.resize(number + 1, String::new());
                }
                self.keywords[number].clone_from(name);
            }
            Change::Relocate(moved) => self.messages.relocate(moved),
            Change::Fold { message, flags } => {
                self.messages.put(message);
                self.set_flags(&RoaringBitmap::from_iter([message.uid.0]), *flags);
            }
            Change::Base(base) => self.apply_base(base),
        }
    }

    fn apply_base(&mut self, base: &Base) {
        for (modseq, placed) in &base.placed {
            self.messages.put(&placed.to_message(*modseq));
            self.set_flags(&RoaringBitmap::from_iter([placed.uid.0]), placed.flags);
        }
        let dead = self.uids().0 - &base.live.0;
        self.messages.remove(&dead);
        for states in &base.states {
            let uids = UidSet(&states.uids.0 & self.uids().0);
            self.set_flags(&uids.0, states.flags);
            self.messages.set_modseq(&uids.0, states.modseq);
        }
        self.flags.retain(|_, uids| {
            *uids &= &base.live.0;
            !uids.is_empty()
        });
        self.keywords.clone_from(&base.keywords);
        self.expunged.clone_from(&base.expunged);
        self.history_horizon = base.history_horizon;
    }

    /// Gives messages exactly these flags.
    fn set_flags(&mut self, uids: &RoaringBitmap, flags: Flags) {
        self.flags.retain(|_, having| {
            *having -= uids;
            !having.is_empty()
        });
        for bit in flags.bits() {
            *self.flags.entry(bit as u8).or_default() |= uids;
        }
    }

    /// Forgets flags of messages that are not there: what is put together from parts of a log may have some.
    pub(crate) fn forget_stray_flags(&mut self) {
        let uids = self.uids().0;
        self.flags.retain(|_, having| {
            *having &= &uids;
            !having.is_empty()
        });
    }

    /// The UIDs expunged after a mod-sequence. `None` if the history does not reach back so far.
    pub fn expunged_since(&self, modseq: ModSeq) -> Option<UidSet> {
        if modseq < self.history_horizon {
            return None;
        }
        let start = self.expunged.partition_point(|(at, _)| *at <= modseq);
        let mut uids = RoaringBitmap::new();
        for (_, gone) in &self.expunged[start..] {
            uids |= &gone.0;
        }
        Some(UidSet(uids))
    }

    /// The contents of its page.
    pub fn to_page(&self) -> AlignedVec {
        let flags = self.flags.iter().map(|(&bit, uids)| {
            let mut bytes = Vec::with_capacity(uids.serialized_size());
            uids.serialize_into(&mut bytes).expect("writing to memory");
            (bit, bytes)
        });
        let page = MailboxPage {
            flags: flags.collect(),
            expunged: self.expunged.iter().map(|(modseq, uids)| (modseq.0, uids.encode())).collect(),
            history_horizon: self.history_horizon.0,
            keywords: self.keywords.clone(),
        };
        join_mailbox(&page, &self.messages.encode())
    }

    /// The index that a page has.
    ///
    /// # Errors
    /// If its archive, a bitmap or messages are not what the checksum says was written.
    pub fn from_page(header: &PageHeader, contents: &AlignedVec) -> Result<Self, FormatError> {
        if header.kind == PageKind::MailboxRows {
            return Self::from_rows(&restore::<MailboxRowsPage>(contents)?);
        }
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let (page, messages) = split_mailbox(contents)?;
        let mut index = Self { history_horizon: ModSeq(page.history_horizon.to_native()), ..Self::default() };
        index.messages = Messages::decode(messages).map_err(decode)?;
        for flag in page.flags.iter() {
            index.flags.insert(flag.0, from_bitmap(&flag.1)?);
        }
        for expunge in page.expunged.iter() {
            let uids = UidSet::decode(&expunge.1).map_err(decode)?;
            index.expunged.push((ModSeq(expunge.0.to_native()), uids));
        }
        index.keywords = page.keywords.iter().map(|keyword| keyword.as_str().to_owned()).collect();
        Ok(index)
    }

    /// The index that a page of older stores has.
    fn from_rows(page: &MailboxRowsPage) -> Result<Self, FormatError> {
        let mut index = Self { history_horizon: ModSeq(page.history_horizon), ..Self::default() };
        if !page.messages.is_sorted_by(|a, b| a.uid < b.uid) {
            return Err(FormatError::Misplaced { what: WHAT, detail: "UIDs do not ascend".to_owned() });
        }
        index.messages = page.messages.iter().map(from_page_message).collect();
        for (bit, bytes) in &page.flags {
            index.flags.insert(*bit, from_bitmap(bytes)?);
        }
        for expunge in &page.expunged {
            let mut uids = RoaringBitmap::new();
            for &(first, last) in &expunge.runs {
                uids.insert_range(first..=last);
            }
            index.expunged.push((ModSeq(expunge.modseq), UidSet(uids)));
        }
        index.keywords.clone_from(&page.keywords);
        Ok(index)
    }
}

const WHAT: &str = "index page";

fn from_bitmap(bytes: &[u8]) -> Result<RoaringBitmap, FormatError> {
    let bitmap = RoaringBitmap::deserialize_from(bytes);
    bitmap.map_err(|_| FormatError::Decode { what: WHAT, source: DecodeError::Bitmap })
}

fn from_page_message(message: &PageMessage) -> Message {
    Message {
        uid: Uid(message.uid),
        prefix_of: message.prefix_of,
        zone_minutes: message.zone_minutes,
        modseq: ModSeq(message.modseq),
        id: MessageId { origin: ShardId(message.origin), lsn: Lsn(message.message) },
        location: Location {
            segment: SegmentId(message.segment),
            offset_units: message.offset_units,
            len: message.len,
            ordinal: message.ordinal,
        },
        head_bytes: message.head_bytes,
        size: message.size,
        internal_date: message.internal_date,
        save_date: message.save_date,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::frame::{Packer, Unpacker};
    use crate::format::page::{PageExpunges, archive, open_page, put_page};

    fn read_back(kind: PageKind, contents: &[u8]) -> Result<MailboxIndex, FormatError> {
        let mut bytes = Vec::new();
        put_page(kind, Lsn(5), 77, contents, &mut Packer::default(), &mut bytes)?;
        let (header, contents) = open_page(PageKind::Mailbox, 77, &bytes, &mut Unpacker::default())?;
        MailboxIndex::from_page(&header, &contents)
    }

    fn index() -> MailboxIndex {
        let mut index = MailboxIndex::default();
        for uid in 1..=1000 {
            let message =
                Message { uid: Uid(uid), modseq: ModSeq(uid.into()), size: u64::from(uid) << 20, ..Message::default() };
            index.apply(&Change::Place { message, flags: if uid % 3 == 0 { Flags::SEEN } else { Flags::NONE } });
        }
        let uids = UidSet((2..=1000).step_by(2).collect());
        index.apply(&Change::Expunge(Expunge {
            mailbox: Default::default(),
            modseq: ModSeq(1001),
            uids,
            unseen: 0,
            size: 0,
        }));
        index.apply(&Change::Keyword { number: 0, name: "$Junk".to_owned() });
        index.history_horizon = ModSeq(9);
        index
    }

    #[test]
    fn an_index_comes_back_from_its_page() {
        let index = index();
        assert!(read_back(PageKind::Mailbox, &index.to_page()) == Ok(index));
        let empty = MailboxIndex::default();
        assert!(read_back(PageKind::Mailbox, &empty.to_page()) == Ok(empty));
    }

    #[test]
    fn an_index_comes_back_from_the_page_of_an_older_store() {
        let index = index();
        let to_row = |message: Message| PageMessage {
            uid: message.uid.0,
            prefix_of: message.prefix_of,
            zone_minutes: message.zone_minutes,
            modseq: message.modseq.0,
            origin: message.id.origin.0,
            message: message.id.lsn.0,
            segment: message.location.segment.0,
            offset_units: message.location.offset_units,
            len: message.location.len,
            ordinal: message.location.ordinal,
            head_bytes: message.head_bytes,
            size: message.size,
            internal_date: message.internal_date,
            save_date: message.save_date,
        };
        let mut seen = Vec::new();
        index.with_flag(0).expect("some are seen").serialize_into(&mut seen).expect("writing to memory");
        let expunged = index.expunged.iter();
        let mut page = MailboxRowsPage {
            messages: index.messages.iter().map(to_row).collect(),
            flags: vec![(0, seen)],
            expunged: expunged.map(|(modseq, uids)| PageExpunges { modseq: modseq.0, runs: uids.runs() }).collect(),
            history_horizon: 9,
            keywords: index.keywords.clone(),
        };
        assert!(read_back(PageKind::MailboxRows, &archive(&page)) == Ok(index));
        page.messages.swap(3, 4);
        let refused = read_back(PageKind::MailboxRows, &archive(&page)).err();
        assert!(matches!(refused, Some(FormatError::Misplaced { .. })), "{refused:?}");
    }

    #[test]
    fn those_that_exist_are_the_same_however_many_runs_are_asked_for() {
        let index = index();
        for step in [1, 2, 3, 499] {
            let wanted = UidSet((1..1200).step_by(step).collect());
            let expected: RoaringBitmap = wanted.0.iter().filter(|&uid| index.contains(Uid(uid))).collect();
            assert_eq!(index.existing(&wanted), expected, "every {step}");
        }
        assert!(index.existing(&UidSet::default()).is_empty());
    }
}
