//! Sets of sequence numbers or UIDs (RFC 9051, 9: sequence-set).

use std::num::NonZeroU32;

/// `seq-number = nz-number / "*"`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetBound {
    Number(NonZeroU32),
    /// The largest number in use.
    Largest,
}

/// `sequence-set = (seq-number / seq-range) *("," (seq-number / seq-range)) / "$"`, as the client wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SequenceSet {
    /// Single numbers have both bounds alike. Never empty.
    Ranges(Vec<(SetBound, SetBound)>),
    /// `$`: the result of the last SEARCH (RFC 5182).
    Saved,
}

/// A sequence number above the number of messages: BAD (RFC 9051, 9: seq-number).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Sequence number past the last message")]
pub struct OutOfRange;

impl SequenceSet {
    /// Parses without a cursor, for whatever holds nothing but a set.
    pub fn parse(text: &[u8]) -> Option<Self> {
        if text == b"$" {
            return Some(SequenceSet::Saved);
        }
        let mut ranges = Vec::new();
        for range in text.split(|&b| b == b',') {
            let mut bounds = range.splitn(2, |&b| b == b':');
            let first = parse_bound(bounds.next()?)?;
            let last = bounds.next().map_or(Some(first), parse_bound)?;
            ranges.push((first, last));
        }
        Some(SequenceSet::Ranges(ranges))
    }

    /// The runs of UIDs meant, ascending and coalesced. `largest` is the UID of the last message, 0 in an empty mailbox.
    /// A range `n:*` with n above `largest` means `largest` alone. `None` for `$`.
    pub fn resolve_uids(&self, largest: u32) -> Option<Vec<(u32, u32)>> {
        let SequenceSet::Ranges(ranges) = self else { return None };
        let number = |bound: SetBound| match bound {
            SetBound::Number(n) => n.get(),
            SetBound::Largest => largest,
        };
        let mut runs: Vec<(u32, u32)> = ranges
            .iter()
            .map(|&(a, b)| (number(a), number(b)))
            .map(|(a, b)| (a.min(b).max(1), a.max(b)))
            .filter(|(first, last)| first <= last)
            .collect();
        coalesce(&mut runs);
        Some(runs)
    }

    /// The runs of sequence numbers meant, ascending and coalesced, in a mailbox of `exists` messages. `None` for `$`.
    ///
    /// # Errors
    /// A number above `exists`, or `*` in an empty mailbox.
    pub fn resolve_sequence_numbers(&self, exists: u32) -> Option<Result<Vec<(u32, u32)>, OutOfRange>> {
        let runs = self.resolve_uids(exists)?;
        let ok = exists > 0 && runs.last().is_some_and(|&(_, last)| last <= exists);
        Some(if ok { Ok(runs) } else { Err(OutOfRange) })
    }

    /// Whether `*` or `$` is in it: the known UIDs of QRESYNC have neither (RFC 7162, 7).
    pub fn is_fixed(&self) -> bool {
        match self {
            SequenceSet::Saved => false,
            SequenceSet::Ranges(ranges) => {
                ranges.iter().all(|&(a, b)| a != SetBound::Largest && b != SetBound::Largest)
            }
        }
    }
}

/// `nz-number = digit-nz *DIGIT`, below 2^32.
fn parse_bound(text: &[u8]) -> Option<SetBound> {
    if text == b"*" {
        return Some(SetBound::Largest);
    }
    if !matches!(text, [b'1'..=b'9', ..]) || text.len() > 10 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let n = text.iter().fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
    u32::try_from(n).ok().and_then(NonZeroU32::new).map(SetBound::Number)
}

/// Sorts runs and joins those that overlap or touch.
pub fn coalesce(runs: &mut Vec<(u32, u32)>) {
    runs.sort_unstable();
    runs.dedup_by(|next, run| {
        let joins = next.0 <= run.1.saturating_add(1);
        if joins {
            run.1 = run.1.max(next.1);
        }
        joins
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uids(text: &str, largest: u32) -> Vec<(u32, u32)> {
        SequenceSet::parse(text.as_bytes()).expect(text).resolve_uids(largest).expect("no $")
    }

    #[test]
    fn examples() {
        assert_eq!(uids("2,4:7,9,12:*", 15), [(2, 2), (4, 7), (9, 9), (12, 15)]);
        assert_eq!(uids("*:4,5:7", 10), [(4, 10)]);
        assert_eq!(uids("3291:*", 5), [(5, 3291)], "what is above does not exist, but 5 is in it");
        assert_eq!(uids("1:*", 0), [(1, 1)], "there is no UID 1 in an empty mailbox");
        assert_eq!(uids("*", 0), []);
        assert_eq!(uids("4294967295", 1), [(u32::MAX, u32::MAX)]);
        assert_eq!(uids("4294967295,4294967294", 1), [(u32::MAX - 1, u32::MAX)]);
        assert_eq!(SequenceSet::parse(b"$"), Some(SequenceSet::Saved));
    }

    #[test]
    fn refused() {
        for bad in
            ["", "0", "01", "4294967296", "1:", ":1", "1,", ",1", "1:2:3", "a", "-1", "1 ", "$,1", "**", "99999999999"]
        {
            assert_eq!(SequenceSet::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn sequence_numbers_must_exist() {
        let resolve =
            |text: &str, exists| SequenceSet::parse(text.as_bytes()).unwrap().resolve_sequence_numbers(exists);
        assert_eq!(resolve("1:*", 3), Some(Ok(vec![(1, 3)])));
        assert_eq!(resolve("3", 3), Some(Ok(vec![(3, 3)])));
        assert_eq!(resolve("4", 3), Some(Err(OutOfRange)));
        assert_eq!(resolve("4:*", 3), Some(Err(OutOfRange)));
        assert_eq!(resolve("*", 0), Some(Err(OutOfRange)));
        assert_eq!(resolve("$", 3), None);
    }

    proptest! {
        #[test]
        fn runs_hold_the_same_numbers(ranges in prop::collection::vec((1u32..60, 1u32..60), 1..8)) {
            let text: Vec<String> = ranges.iter().map(|(a, b)| format!("{a}:{b}")).collect();
            let runs = uids(&text.join(","), 100);
            for n in 0..70 {
                let expected = ranges.iter().any(|&(a, b)| (a.min(b)..=a.max(b)).contains(&n));
                prop_assert_eq!(runs.iter().any(|&(a, b)| (a..=b).contains(&n)), expected);
            }
            prop_assert!(runs.windows(2).all(|w| w[0].1 + 1 < w[1].0));
            let mut written = Vec::new();
            crate::response::write_sequence_set(&mut written, runs.iter().copied());
            prop_assert_eq!(SequenceSet::parse(&written).unwrap().resolve_uids(100).unwrap(), runs);
        }

        #[test]
        fn never_panics(text in "[0-9*:,$]{0,30}", largest in any::<u32>()) {
            if let Some(set) = SequenceSet::parse(text.as_bytes()) {
                set.resolve_uids(largest);
                set.resolve_sequence_numbers(largest);
            }
        }
    }
}
