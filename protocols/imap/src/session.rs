//! The state of a session, and its view of a mailbox's UIDs.

/// `State` decides which commands are legal (RFC 9051, 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    #[default]
    NotAuthenticated,
    Authenticated,
    Selected,
    Logout,
}

/// UIDs `first..=last`, and how many UIDs come before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    last: u32,
    before: u32,
}

/// The UIDs that a session knows, in order: the number of a UID in it is its sequence number.
///
/// A session keeps this as its own, because sequence numbers change for it only when it has sent EXPUNGE responses
/// (RFC 3501, 7.4.1). Runs of UIDs without gaps take 12 bytes each, however long they are, so a mailbox that nobody has
/// expunged from is one run. Looking up either way is a binary search over the runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UidRuns {
    /// Ascending, with gaps between them.
    runs: Vec<Run>,
}

impl UidRuns {
    /// From runs `(first, last)` that ascend and do not overlap.
    pub fn from_runs(runs: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let mut uids = Self::default();
        for (first, last) in runs {
            uids.append(first, last);
        }
        uids
    }

    /// The number of messages: EXISTS.
    pub fn len(&self) -> u32 {
        self.runs.last().map_or(0, |run| run.before + (run.last - run.first) + 1)
    }

    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The UID of the last message; 0 if there is none.
    pub fn last_uid(&self) -> u32 {
        self.runs.last().map_or(0, |run| run.last)
    }

    /// The runs as `(first, last)`.
    pub fn runs(&self) -> impl DoubleEndedIterator<Item = (u32, u32)> + '_ {
        self.runs.iter().map(|run| (run.first, run.last))
    }

    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.runs().flat_map(|(first, last)| first..=last)
    }

    /// Adds the UIDs `first..=last`, all of them above the last one known; others are passed over.
    pub fn append(&mut self, first: u32, last: u32) {
        let first = first.max(self.last_uid().saturating_add(1));
        if first > last || last <= self.last_uid() {
            return;
        }
        match self.runs.last_mut() {
            Some(run) if run.last + 1 == first => run.last = last,
            _ => {
                let before = self.len();
                self.runs.push(Run { first, last, before });
            }
        }
    }

    /// The UID of a sequence number.
    pub fn uid(&self, sequence_number: u32) -> Option<u32> {
        let index = sequence_number.checked_sub(1)?;
        let after = self.runs.partition_point(|run| run.before <= index);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let uid = u64::from(run.first) + u64::from(index - run.before);
        u32::try_from(uid).ok().filter(|&uid| uid <= run.last)
    }

    /// The sequence number of a UID.
    pub fn sequence_number(&self, uid: u32) -> Option<u32> {
        let run = self.runs.get(self.runs.partition_point(|run| run.last < uid))?;
        (run.first <= uid).then(|| run.before + (uid - run.first) + 1)
    }

    /// How many UIDs are below `uid`.
    fn rank(&self, uid: u32) -> u32 {
        match self.runs.get(self.runs.partition_point(|run| run.last < uid)) {
            Some(run) => run.before + uid.saturating_sub(run.first),
            None => self.len(),
        }
    }

    /// Those of the given ascending UIDs that exist, as runs.
    pub fn intersect(&self, wanted: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        for &(first, last) in wanted {
            let start = self.runs.partition_point(|run| run.last < first);
            for run in self.runs[start..].iter().take_while(|run| run.first <= last) {
                found.push((run.first.max(first), run.last.min(last)));
            }
        }
        found
    }

    /// The UIDs of ascending runs of sequence numbers; numbers above the last are passed over.
    pub fn uids_of(&self, sequence_numbers: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        for &(first, last) in sequence_numbers {
            let last = last.min(self.len());
            if let (Some(first), Some(last)) = (self.uid(first.max(1)), self.uid(last))
                && first <= last
            {
                found.extend(self.intersect(&[(first, last)]));
            }
        }
        crate::types::coalesce(&mut found);
        found
    }

    /// The sequence numbers of ascending runs of UIDs, as runs.
    pub fn sequence_numbers_of(&self, uids: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let mut found: Vec<(u32, u32)> = uids
            .iter()
            .filter(|(first, last)| first <= last)
            .map(|&(first, last)| {
                let below = self.rank(first);
                let up_to = self.rank(last) + u32::from(self.sequence_number(last).is_some());
                (below + 1, up_to)
            })
            .filter(|(first, last)| first <= last)
            .collect();
        crate::types::coalesce(&mut found);
        found
    }

    /// Removes the UIDs of runs that ascend; those that do not exist are passed over. Gives the sequence numbers that they
    /// had, as ascending runs. [`expunge_numbers`] makes the numbers of EXPUNGE responses of them.
    pub fn remove(&mut self, uids: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let removed = self.sequence_numbers_of(uids);
        if removed.is_empty() {
            return removed;
        }
        let old = std::mem::take(&mut self.runs);
        let mut wanted = uids.iter().copied().filter(|(first, last)| first <= last).peekable();
        for run in old {
            let mut first = u64::from(run.first);
            while let Some(&(from, to)) = wanted.peek() {
                if u64::from(to) < first {
                    wanted.next();
                    continue;
                }
                if from > run.last {
                    break;
                }
                if u64::from(from) > first {
                    self.append(first as u32, from - 1);
                }
                first = first.max(u64::from(to) + 1);
                if to >= run.last {
                    break; // it may reach into the next run
                }
                wanted.next();
            }
            if first <= u64::from(run.last) {
                self.append(first as u32, run.last);
            }
        }
        removed
    }
}

/// The numbers to send in EXPUNGE responses for messages that had these ascending sequence numbers: from the last to
/// the first, because each EXPUNGE lowers the numbers above it and none below (RFC 3501, 7.4.1).
pub fn expunge_numbers(removed: &[(u32, u32)]) -> impl Iterator<Item = u32> + '_ {
    removed.iter().rev().flat_map(|&(first, last)| (first..=last).rev())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn contiguous_uids_are_one_run() {
        let mut uids = UidRuns::default();
        for uid in 1..=100_000 {
            uids.append(uid, uid);
        }
        assert_eq!(uids.runs.len(), 1);
        assert_eq!(
            (uids.len(), uids.uid(100_000), uids.uid(100_001), uids.uid(0)),
            (100_000, Some(100_000), None, None)
        );
    }

    #[test]
    fn removal_numbers_messages_as_they_were() {
        let mut uids = UidRuns::from_runs([(1, 5), (8, 8), (10, 12)]);
        let removed = uids.remove(&[(2, 3), (8, 10), (12, 40)]);
        assert_eq!(removed, [(2, 3), (6, 7), (9, 9)]);
        assert_eq!(expunge_numbers(&removed).collect::<Vec<_>>(), [9, 7, 6, 3, 2]);
        assert_eq!(uids.iter().collect::<Vec<_>>(), [1, 4, 5, 11]);
    }

    /// Trap 55: UIDs at their limit.
    #[test]
    fn trap_55_largest_uid() {
        let mut uids = UidRuns::from_runs([(u32::MAX - 1, u32::MAX)]);
        assert_eq!((uids.len(), uids.uid(2), uids.sequence_number(u32::MAX)), (2, Some(u32::MAX), Some(2)));
        uids.append(u32::MAX, u32::MAX);
        assert_eq!(uids.len(), 2);
        assert_eq!(uids.uid(u32::MAX), None);
        assert_eq!(uids.remove(&[(1, u32::MAX)]), [(1, 2)]);
        assert!(uids.is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Append(u32, u32),
        Remove(Vec<(u32, u32)>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0u32..8, 0u32..8).prop_map(|(gap, count)| Step::Append(gap, count)),
            prop::collection::vec((1u32..80, 0u32..10), 1..4).prop_map(|runs| {
                let mut runs = runs.into_iter().map(|(first, more)| (first, first + more)).collect();
                crate::types::coalesce(&mut runs);
                Step::Remove(runs)
            })
        ];
        prop::collection::vec(step, 0..20)
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(steps in steps()) {
            let (mut uids, mut model, mut next) = (UidRuns::default(), BTreeSet::new(), 1u32);
            for step in steps {
                match step {
                    Step::Append(gap, count) => {
                        let first = next + gap;
                        next = first + count;
                        if count > 0 {
                            uids.append(first, next - 1);
                        }
                        model.extend(first..next);
                    }
                    Step::Remove(runs) => {
                        let numbers: Vec<u32> = expunge_numbers(&uids.remove(&runs)).collect();
                        // A client that applies the responses one by one ends up with the same mailbox.
                        let mut client: Vec<u32> = model.iter().copied().collect();
                        for number in numbers {
                            client.remove(number as usize - 1);
                        }
                        model.retain(|uid| !runs.iter().any(|&(a, b)| (a..=b).contains(uid)));
                        prop_assert_eq!(&client, &model.iter().copied().collect::<Vec<_>>());
                    }
                }
                prop_assert_eq!(uids.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(uids.len() as usize, model.len());
                prop_assert!(uids.runs.windows(2).all(|w| w[0].last + 1 < w[1].first));
                for (i, &uid) in model.iter().enumerate() {
                    prop_assert_eq!(uids.uid(i as u32 + 1), Some(uid));
                    prop_assert_eq!(uids.sequence_number(uid), Some(i as u32 + 1));
                }
                for uid in 0..next + 2 {
                    prop_assert_eq!(uids.sequence_number(uid).is_some(), model.contains(&uid));
                }
                let wanted = [(3, 9), (12, 40)];
                let found: Vec<u32> = uids.intersect(&wanted).into_iter().flat_map(|(a, b)| a..=b).collect();
                let expected: Vec<u32> =
                    model.iter().copied().filter(|uid| wanted.iter().any(|&(a, b)| (a..=b).contains(uid))).collect();
                prop_assert_eq!(&found, &expected);
                let numbers = uids.sequence_numbers_of(&wanted);
                let back: Vec<u32> = uids.uids_of(&numbers).into_iter().flat_map(|(a, b)| a..=b).collect();
                prop_assert_eq!(back, expected);
            }
        }
    }
}
