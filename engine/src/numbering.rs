//! The UIDs that a session knows of, with their sequence numbers.
//!
//! Small where UIDs are dense, and where they are not but close together, as they are once every second message is gone.

use roaring::RoaringBitmap;

/// UIDs that one pattern has at most.
const PATTERN_UIDS: u32 = u64::BITS;

/// UIDs one after another, any number of them, or some of a few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    first: u32,
    /// How many UIDs come before.
    before: u32,
    /// Which of the 64 UIDs from `first` on there are. 0 if there is none left out of those up to the next piece's number.
    pattern: u64,
}

/// `count` ones, which is not 0, above so many zeroes.
fn ones(from: u32, count: u32) -> u64 {
    (u64::MAX >> (u64::BITS - count)) << from
}

/// Sequence numbers, which begin with 1, and their UIDs, which ascend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Numbering {
    pieces: Vec<Piece>,
    len: u32,
}

impl Numbering {
    pub fn len(&self) -> u32 {
        self.len
    }

    /// How many UIDs a piece has.
    fn count(&self, at: usize) -> u32 {
        self.pieces.get(at + 1).map_or(self.len, |next| next.before) - self.pieces[at].before
    }

    /// Appends the UIDs from `first` to `last`, above all others.
    #[inline]
    pub fn push(&mut self, first: u32, last: u32) {
        debug_assert!(first <= last && self.last().is_none_or(|highest| highest < first), "UIDs ascend");
        let before = self.len;
        let count = last - first + 1;
        self.len += count;
        if let Some(piece) = self.pieces.last_mut() {
            let (distance, fits) = (first - piece.first, last - piece.first < PATTERN_UIDS);
            if piece.pattern == 0 && distance == before - piece.before {
                return;
            }
            if piece.pattern == 0 && fits {
                piece.pattern = ones(0, before - piece.before);
            }
            if fits {
                piece.pattern |= ones(distance, count);
                return;
            }
        }
        self.pieces.push(Piece { first, before, pattern: 0 });
    }

    pub fn shrink_to_fit(&mut self) {
        self.pieces.shrink_to_fit();
    }

    pub fn uid_of(&self, sequence: u32) -> Option<u32> {
        let index = sequence.checked_sub(1).filter(|&index| index < self.len)?;
        let at = self.pieces.partition_point(|piece| piece.before <= index).checked_sub(1)?;
        let piece = self.pieces[at];
        let number = index - piece.before;
        if piece.pattern == 0 {
            return Some(piece.first + number);
        }
        let left = (0..number).fold(piece.pattern, |left, _| left & (left - 1));
        Some(piece.first + left.trailing_zeros())
    }

    pub fn sequence_of(&self, uid: u32) -> Option<u32> {
        let at = self.pieces.partition_point(|piece| piece.first <= uid).checked_sub(1)?;
        let piece = self.pieces[at];
        let distance = uid - piece.first;
        if piece.pattern == 0 {
            return (distance < self.count(at)).then(|| piece.before + distance + 1);
        }
        let is_there = distance < PATTERN_UIDS && piece.pattern >> distance & 1 == 1;
        is_there.then(|| piece.before + (piece.pattern & ones(0, distance + 1)).count_ones())
    }

    /// The lowest UID, and the highest.
    pub fn first(&self) -> Option<u32> {
        self.pieces.first().map(|piece| piece.first)
    }

    pub fn last(&self) -> Option<u32> {
        let at = self.pieces.len().checked_sub(1)?;
        Some(self.last_of(at))
    }

    fn last_of(&self, at: usize) -> u32 {
        let piece = self.pieces[at];
        piece.first + if piece.pattern == 0 { self.count(at) - 1 } else { 63 - piece.pattern.leading_zeros() }
    }

    /// All UIDs as runs, first and last, of which one may begin right after another.
    pub fn runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.runs_from(0)
    }

    fn runs_from(&self, piece: usize) -> impl Iterator<Item = (u32, u32)> + '_ {
        (piece..self.pieces.len()).flat_map(|at| {
            let Piece { first, mut pattern, .. } = self.pieces[at];
            let mut all = (pattern == 0).then(|| (first, self.last_of(at)));
            std::iter::from_fn(move || {
                if pattern == 0 {
                    return all.take();
                }
                let from = pattern.trailing_zeros();
                let count = (pattern >> from).trailing_ones();
                pattern &= !ones(from, count);
                Some((first + from, first + from + count - 1))
            })
        })
    }

    /// The runs of what there is from `first` to `last`.
    pub fn between(&self, first: u32, last: u32) -> impl Iterator<Item = (u32, u32)> + '_ {
        let piece = self.pieces.partition_point(|piece| piece.first <= first).saturating_sub(1);
        let runs = self.runs_from(piece).skip_while(move |&(_, to)| to < first);
        runs.take_while(move |&(from, _)| from <= last).map(move |(from, to)| (from.max(first), to.min(last)))
    }

    pub fn to_bitmap(&self) -> RoaringBitmap {
        let mut bitmap = RoaringBitmap::new();
        self.runs().for_each(|(first, last)| append_run(&mut bitmap, first, last));
        bitmap
    }

    /// The sequence number of the first UID that is not in a set.
    pub fn first_not_in(&self, set: &RoaringBitmap) -> Option<u32> {
        /// So many UIDs are looked up one by one rather than together.
        const FEW: u32 = PATTERN_UIDS;
        let mut number = 0;
        let mut ascending = set.iter();
        let mut next = ascending.next();
        for (first, last) in self.runs() {
            let count = last - first + 1;
            if count > FEW {
                let below = first.checked_sub(1).map_or(0, |uid| set.rank(uid));
                let all_up_to = |distance: u32| set.rank(first + distance) - below > u64::from(distance);
                if !all_up_to(count - 1) {
                    let (mut low, mut high) = (0, count - 1);
                    while low < high {
                        let middle = low + (high - low) / 2;
                        if all_up_to(middle) { low = middle + 1 } else { high = middle }
                    }
                    return Some(number + low + 1);
                }
                ascending.advance_to(last);
                next = ascending.next();
            } else {
                for uid in first..=last {
                    while next.is_some_and(|next| next < uid) {
                        next = ascending.next();
                    }
                    if next != Some(uid) {
                        return Some(number + (uid - first) + 1);
                    }
                }
            }
            number += count;
        }
        None
    }

    /// Removes the UIDs of a set, and from the set what is not there. Gives the sequence number that each of them has once those
    /// before it have gone.
    pub fn remove(&mut self, gone: &mut RoaringBitmap) -> Vec<u32> {
        let (Some(lowest), Some(highest)) = (self.first(), self.last()) else {
            gone.clear();
            return Vec::new();
        };
        gone.remove_range(..lowest);
        if let Some(above) = highest.checked_add(1) {
            gone.remove_range(above..);
        }
        if gone.is_empty() {
            return Vec::new();
        }
        let mut numbers = Vec::with_capacity(gone.len() as usize);
        let mut strangers = Vec::new();
        let mut left = Self::default();
        let mut ascending = gone.iter();
        let mut next = ascending.next();
        for (first, last) in self.runs() {
            let mut from = Some(first);
            while let Some(uid) = next.filter(|&uid| uid <= last) {
                if uid < first {
                    strangers.push(uid);
                } else {
                    if let Some(from) = from.filter(|&from| from < uid) {
                        left.push(from, uid - 1);
                    }
                    numbers.push(left.len + 1);
                    from = uid.checked_add(1);
                }
                next = ascending.next();
            }
            if let Some(from) = from.filter(|&from| from <= last) {
                left.push(from, last);
            }
        }
        strangers.into_iter().for_each(|uid| _ = gone.remove(uid));
        left.shrink_to_fit();
        *self = left;
        numbers
    }
}

/// Adds a run of numbers above all others to a set.
pub(crate) fn append_run(set: &mut RoaringBitmap, first: u32, last: u32) {
    /// Up to so many are faster one by one.
    const FEW: u32 = 8;
    if last - first < FEW {
        (first..=last).for_each(|number| _ = set.try_push(number));
    } else {
        set.insert_range(first..=last);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn numbering_of(uids: impl IntoIterator<Item = u32>) -> Numbering {
        let mut numbering = Numbering::default();
        uids.into_iter().for_each(|uid| numbering.push(uid, uid));
        numbering
    }

    /// The same pushed as runs that are as long as can be.
    fn of_runs(uids: &BTreeSet<u32>) -> Numbering {
        let mut numbering = Numbering::default();
        let mut run: Option<(u32, u32)> = None;
        for &uid in uids {
            match &mut run {
                Some((_, last)) if last.checked_add(1) == Some(uid) => *last = uid,
                run => {
                    if let Some((first, last)) = run.replace((uid, uid)) {
                        numbering.push(first, last);
                    }
                }
            }
        }
        if let Some((first, last)) = run {
            numbering.push(first, last);
        }
        numbering
    }

    fn assert_same(numbering: &Numbering, expected: &BTreeSet<u32>) {
        assert_eq!(numbering.len() as usize, expected.len());
        assert_eq!((numbering.first(), numbering.last()), (expected.first().copied(), expected.last().copied()));
        assert!(numbering.runs().flat_map(|(first, last)| first..=last).eq(expected.iter().copied()));
        assert!(numbering.to_bitmap().iter().eq(expected.iter().copied()));
        for (sequence, &uid) in (1..).zip(expected) {
            assert_eq!((numbering.uid_of(sequence), numbering.sequence_of(uid)), (Some(uid), Some(sequence)));
            for other in [uid.wrapping_sub(1), uid.wrapping_add(1), uid.wrapping_add(64)] {
                assert_eq!(numbering.sequence_of(other).is_some(), expected.contains(&other), "UID {other}");
            }
        }
        assert_eq!((numbering.uid_of(0), numbering.uid_of(expected.len() as u32 + 1)), (None, None));
    }

    #[test]
    fn numbers_rank_and_find() {
        let mut numbering = numbering_of([1, 2, 3, 7, 8, 200]);
        assert_eq!((numbering.pieces.len(), numbering.len()), (2, 6));
        let by_sequence: Vec<_> = (0..=7).map(|sequence| numbering.uid_of(sequence)).collect();
        assert_eq!(by_sequence, [None, Some(1), Some(2), Some(3), Some(7), Some(8), Some(200), None]);
        let missing = [0, 4, 9, 199, 201].map(|uid| numbering.sequence_of(uid));
        assert_eq!(missing, [None; 5]);
        let between = |first, last| numbering.between(first, last).collect::<Vec<_>>();
        assert_eq!(between(0, u32::MAX), [(1, 3), (7, 8), (200, 200)]);
        assert_eq!(between(2, 7), [(2, 3), (7, 7)]);
        assert_eq!((between(4, 6), between(201, 300), between(8, 3)), (vec![], vec![], vec![]));
        let mut gone = RoaringBitmap::from_iter([2, 5, 200]);
        assert_eq!(numbering.remove(&mut gone), [2, 5]);
        assert_eq!(gone, RoaringBitmap::from_iter([2, 200]));
        assert_eq!(numbering.to_bitmap().iter().collect::<Vec<_>>(), [1, 3, 7, 8]);
        numbering.push(u32::MAX, u32::MAX);
        assert_eq!(numbering.uid_of(5), Some(u32::MAX));
    }

    #[test]
    fn every_second_of_a_million_takes_little() {
        let mut numbering = Numbering::default();
        numbering.push(1, 1_000_000);
        assert_eq!(numbering.pieces.len(), 1);
        let numbers = numbering.remove(&mut (2..=1_000_000).step_by(2).collect());
        assert!(numbers.into_iter().eq(2..=500_001));
        assert!(numbering.pieces.len() <= 1_000_000 / 64 + 1, "{} pieces", numbering.pieces.len());
    }

    #[test]
    fn whatever_is_pushed_and_removed_they_are_those_of_a_set() {
        for seed in 0..300_u64 {
            println!("seed {seed}");
            let mut random = seed;
            let mut below = |limit: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                ((random >> 33) % limit) as u32
            };
            let mut expected = BTreeSet::new();
            let mut numbering = Numbering::default();
            for _ in 0..12 {
                // Gaps and runs of all lengths about that of a pattern.
                for _ in 0..below(8) {
                    let gap = [1, 2, 3, 63, 64, 65, 1000][below(7) as usize];
                    let first = expected.last().map_or(0, |last| last + gap).max(1);
                    let last = first + [0, 0, 1, 5, 62, 63, 64, 300][below(8) as usize];
                    numbering.push(first, last);
                    expected.extend(first..=last);
                }
                let (from, every) = (below(1000), below(7) as usize + 1);
                let gone: RoaringBitmap = (from..from + below(500)).step_by(every).collect();
                let mut numbers = Vec::new();
                for uid in gone.iter().filter(|uid| expected.contains(uid)) {
                    numbers.push(expected.range(..uid).filter(|uid| !gone.contains(**uid)).count() as u32 + 1);
                }
                let mut removed = gone.clone();
                assert_eq!(numbering.remove(&mut removed), numbers);
                assert!(removed.iter().eq(gone.iter().filter(|uid| expected.contains(uid))));
                expected.retain(|&uid| !gone.contains(uid));
                assert_same(&numbering, &expected);
                assert_same(&of_runs(&expected), &expected);
                let (first, last) = (below(2000), below(2000));
                let between = numbering.between(first, last).flat_map(|(from, to)| from..=to);
                assert!(between.eq(expected.iter().copied().filter(|uid| (first..=last).contains(uid))));
                // Sets that lack one, or none, and have others besides.
                let lacking = expected.iter().nth(below(expected.len() as u64 + 1) as usize).copied();
                let mut set: RoaringBitmap = expected.iter().copied().filter(|&uid| Some(uid) != lacking).collect();
                (0..below(20)).for_each(|_| _ = set.insert(below(3000)));
                let first = expected.iter().position(|&uid| !set.contains(uid)).map(|at| at as u32 + 1);
                assert_eq!(numbering.first_not_in(&set), first);
            }
        }
    }
}
