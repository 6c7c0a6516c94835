//! The flags and keywords of a message as bits, and sets of UIDs.

use std::ops::RangeInclusive;

use roaring::RoaringBitmap;

use crate::format::codec::{DecodeError, Input, Wire, put_len};
use crate::ids::Uid;

/// Keywords that one mailbox can hold. A keyword's number is its place in the mailbox's keyword table.
pub const KEYWORDS_MAX: usize = 120;

/// System flags in bits 0-4, [`Flags::OPEN_ENDED`] in bit 7, keyword number k of the mailbox in bit 8 + k. `\Recent` is no
/// stored flag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(pub u128);

impl Flags {
    pub const NONE: Self = Self(0);
    pub const SEEN: Self = Self(1);
    pub const ANSWERED: Self = Self(1 << 1);
    pub const FLAGGED: Self = Self(1 << 2);
    pub const DELETED: Self = Self(1 << 3);
    pub const DRAFT: Self = Self(1 << 4);
    /// No flag of a client's, and not shown to any: the message does not end with CRLF. It is set when the message is stored
    /// and goes with it, so that who has to end the last line knows the size of what is sent without reading it.
    pub(crate) const OPEN_ENDED: Self = Self(1 << 7);
    pub(crate) const OPEN_ENDED_BIT: u8 = 7;
    pub const ALL: Self = Self(u128::MAX);
    pub const BITS: u32 = 128;
    const FIRST_KEYWORD_BIT: u32 = 8;

    /// The bit of a keyword by its number in the mailbox's table.
    pub fn keyword(number: usize) -> Self {
        debug_assert!(number < KEYWORDS_MAX);
        Self(1 << (Self::FIRST_KEYWORD_BIT + number as u32))
    }

    /// The numbers of the keywords that are set.
    pub fn keywords(self) -> impl Iterator<Item = usize> {
        let mut bits = self.0 >> Self::FIRST_KEYWORD_BIT;
        std::iter::from_fn(move || {
            if bits == 0 {
                return None;
            }
            let number = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            Some(number)
        })
    }

    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Without what is not a client's.
    pub(crate) fn shown(self) -> Self {
        self.without(Self::OPEN_ENDED)
    }

    /// The numbers of the bits that are set.
    pub fn bits(self) -> impl Iterator<Item = usize> {
        let mut bits = self.0;
        std::iter::from_fn(move || {
            if bits == 0 {
                return None;
            }
            let number = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            Some(number)
        })
    }
}

/// One length byte, then the bytes up to the highest that is not zero.
impl Wire for Flags {
    const MIN_BYTES: usize = 1;

    fn put(&self, out: &mut Vec<u8>) {
        let len = (u128::BITS - self.0.leading_zeros()).div_ceil(8) as usize;
        out.push(len as u8);
        out.extend_from_slice(&self.0.to_le_bytes()[..len]);
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        let len = u8::take(input)?;
        if len > 16 {
            return Err(DecodeError::Value { field: "flag bytes", value: len.into() });
        }
        let mut bytes = [0; 16];
        bytes[..len as usize].copy_from_slice(input.bytes(len as usize)?);
        Ok(Self(u128::from_le_bytes(bytes)))
    }
}

/// A set of UIDs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UidSet(pub RoaringBitmap);

impl UidSet {
    pub fn one(uid: Uid) -> Self {
        Self(RoaringBitmap::from_iter([uid.0]))
    }

    pub fn range(range: RangeInclusive<u32>) -> Self {
        let mut set = RoaringBitmap::new();
        set.insert_range(range);
        Self(set)
    }

    pub fn iter(&self) -> impl Iterator<Item = Uid> + '_ {
        self.0.iter().map(Uid)
    }

    pub fn contains(&self, uid: Uid) -> bool {
        self.0.contains(uid.0)
    }

    pub fn insert(&mut self, uid: Uid) -> bool {
        self.0.insert(uid.0)
    }

    pub fn len(&self) -> u64 {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn first(&self) -> Option<Uid> {
        self.0.min().map(Uid)
    }

    pub fn last(&self) -> Option<Uid> {
        self.0.max().map(Uid)
    }

    /// The set as ascending runs, first and last included.
    pub fn runs(&self) -> Vec<(u32, u32)> {
        self.runs_up_to(usize::MAX).unwrap_or_default()
    }

    /// The same, if there are no more than `limit`.
    pub(crate) fn runs_up_to(&self, limit: usize) -> Option<Vec<(u32, u32)>> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut iterator = self.0.iter();
        // Ranges end at the bitmap's inner borders: join those that touch.
        while let Some(range) = iterator.next_range() {
            let (first, last) = range.into_inner();
            if let Some((_, end)) = runs.last_mut()
                && end.checked_add(1) == Some(first)
            {
                *end = last;
                continue;
            }
            if runs.len() == limit {
                return None;
            }
            runs.push((first, last));
        }
        Some(runs)
    }
}

impl FromIterator<Uid> for UidSet {
    fn from_iter<I: IntoIterator<Item = Uid>>(uids: I) -> Self {
        Self(uids.into_iter().map(|uid| uid.0).collect())
    }
}

const AS_RUNS: u8 = 0;
const AS_BITMAP: u8 = 1;

/// A tag, then runs of (first, last) or a portable roaring bitmap with its length, whichever is shorter.
impl Wire for UidSet {
    const MIN_BYTES: usize = 5;

    fn put(&self, out: &mut Vec<u8>) {
        if let Some(runs) = self.runs_up_to(self.0.serialized_size() / 8) {
            out.push(AS_RUNS);
            runs.put(out);
        } else {
            out.push(AS_BITMAP);
            put_len(self.0.serialized_size(), out);
            self.0.serialize_into(out).expect("writing to memory");
        }
    }

    fn take(input: &mut Input<'_>) -> Result<Self, DecodeError> {
        match u8::take(input)? {
            AS_RUNS => {
                let mut set = RoaringBitmap::new();
                for (first, last) in Vec::<(u32, u32)>::take(input)? {
                    if first > last || set.max().is_some_and(|max| max >= first) {
                        return Err(DecodeError::Value { field: "UID run", value: first.into() });
                    }
                    set.insert_range(first..=last);
                }
                Ok(Self(set))
            }
            AS_BITMAP => {
                let len = u32::take(input)? as usize;
                let bytes = input.bytes(len)?;
                RoaringBitmap::deserialize_from(bytes).map(Self).map_err(|_| DecodeError::Bitmap)
            }
            tag => Err(DecodeError::Value { field: "UID set tag", value: tag.into() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_round_trip_and_take_little_space() {
        for flags in [Flags::NONE, Flags::SEEN, Flags::keyword(0), Flags::keyword(KEYWORDS_MAX - 1), Flags::ALL] {
            assert_eq!(Flags::decode(&flags.encode()), Ok(flags));
        }
        assert_eq!(Flags::SEEN.encode().len(), 2);
        assert_eq!(Flags::keyword(3).with(Flags::keyword(119)).keywords().collect::<Vec<_>>(), [3, 119]);
    }

    #[test]
    fn uid_sets_round_trip_in_both_forms() {
        let runs = UidSet::range(1..=1_000_000);
        assert!(runs.encode().len() < 20);
        assert_eq!(UidSet::range(1..=u32::MAX).runs(), [(1, u32::MAX)]);
        let scattered = UidSet((0..100_000).map(|uid| uid * 2 + 1).collect());
        assert!(scattered.encode().len() < 30_000);
        for set in [UidSet::default(), UidSet::one(Uid(u32::MAX)), runs, scattered] {
            assert_eq!(UidSet::decode(&set.encode()), Ok(set));
        }
    }

    #[test]
    fn runs_out_of_order_are_refused() {
        let mut bytes = vec![AS_RUNS];
        vec![(5_u32, 9_u32), (7, 8)].put(&mut bytes);
        assert!(matches!(UidSet::decode(&bytes), Err(DecodeError::Value { .. })));
    }
}
