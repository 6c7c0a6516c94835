//! The keys of a SEARCH as a tree of tests, which may be undecided.

use std::rc::Rc;

use posthaste_engine::index::Message;
use posthaste_imap::types::DateTime;
use posthaste_mime::date::SentDate;
use roaring::RoaringBitmap;

/// A key with its sets resolved.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Test {
    /// True if empty.
    And(Vec<Test>),
    Or(Vec<Test>),
    Not(Box<Test>),
    /// Is one of these UIDs, which have a flag.
    Set(Rc<RoaringBitmap>),
    /// Is in one of these runs of UIDs, which ascend.
    Runs(Vec<(u32, u32)>),
    Each(Each),
    /// Day of the Date field, from and before.
    Sent(i64, i64),
    /// Has a string, by its number.
    Text(usize),
}

/// What the index knows of a single message.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Each {
    /// Day of arrival, from and before.
    Days(i64, i64),
    /// Time of arrival, from and before.
    Seconds(i64, i64),
    Larger(u64),
    Smaller(u64),
    ModSeq(u64),
    EmailId(String),
}

impl Each {
    fn matches(&self, message: &Message) -> bool {
        match self {
            Self::Days(from, before) => {
                let date = DateTime { unix_seconds: message.internal_date, offset_minutes: message.zone_minutes };
                (*from..*before).contains(&date.local_days())
            }
            Self::Seconds(from, before) => (*from..*before).contains(&message.internal_date),
            Self::Larger(octets) => message.size > *octets,
            Self::Smaller(octets) => message.size < *octets,
            Self::ModSeq(modseq) => message.modseq.0 >= *modseq,
            Self::EmailId(id) => message.id.to_string() == *id,
        }
    }
}

/// What is known of one message.
pub(super) trait Known {
    fn message(&self) -> &Message;
    /// The Date field, once it has been read.
    fn sent(&self) -> Option<Option<SentDate>>;
    /// Whether it has a string, once that has been looked for.
    fn has(&self, string: usize) -> Option<bool>;
}

impl Test {
    /// Passed by no message.
    pub fn nothing() -> Self {
        Self::Runs(Vec::new())
    }

    /// What is cheap comes first in ANDs and ORs: it leaves less to what is not.
    pub fn ordered(self) -> Self {
        let order = |tests: Vec<Test>| {
            let mut tests: Vec<Test> = tests.into_iter().map(Test::ordered).collect();
            tests.sort_by_cached_key(Test::cost);
            tests
        };
        match self {
            Self::And(tests) => Self::And(order(tests)),
            Self::Or(tests) => Self::Or(order(tests)),
            Self::Not(test) => Self::Not(Box::new(test.ordered())),
            test => test,
        }
    }

    fn cost(&self) -> u8 {
        match self {
            Self::And(tests) | Self::Or(tests) => tests.iter().map(Test::cost).max().unwrap_or(0),
            Self::Not(test) => test.cost(),
            Self::Set(_) | Self::Runs(_) => 0,
            Self::Each(_) => 1,
            Self::Sent(..) => 2,
            Self::Text(_) => 3,
        }
    }

    /// How many tests look at single messages in the index.
    pub fn tests_each(&self) -> usize {
        self.count(|test| matches!(test, Self::Each(_)))
    }

    /// How many tests there are, of all kinds; at least 1.
    pub fn nodes(&self) -> usize {
        match self {
            Self::And(tests) | Self::Or(tests) => 1 + tests.iter().map(Test::nodes).sum::<usize>(),
            Self::Not(test) => 1 + test.nodes(),
            _ => 1,
        }
    }

    pub fn asks_sent(&self) -> bool {
        self.count(|test| matches!(test, Self::Sent(..))) > 0
    }

    fn count(&self, what: fn(&Test) -> bool) -> usize {
        match self {
            Self::And(tests) | Self::Or(tests) => tests.iter().map(|test| test.count(what)).sum(),
            Self::Not(test) => test.count(what),
            test => usize::from(what(test)),
        }
    }

    /// Which UIDs of `universe` pass, and which are undecided as far as the index knows. `messages` are those of `universe`, in
    /// order, if any test needs them.
    pub fn decide(&self, universe: &RoaringBitmap, messages: &[Message]) -> (RoaringBitmap, RoaringBitmap) {
        match self {
            Self::And(tests) => {
                let (mut yes, mut open) = (universe.clone(), RoaringBitmap::new());
                for test in tests {
                    let alive = &yes | &open;
                    if alive.is_empty() {
                        break;
                    }
                    let (now_yes, now_open) = test.decide(&alive, messages);
                    let still = alive & (&now_yes | &now_open);
                    yes &= now_yes;
                    open = still - &yes;
                }
                (yes, open)
            }
            Self::Or(tests) => {
                let (mut yes, mut open) = (RoaringBitmap::new(), RoaringBitmap::new());
                for test in tests {
                    let (now_yes, now_open) = test.decide(&(universe - &yes), messages);
                    yes |= now_yes;
                    open |= now_open;
                }
                open -= &yes;
                (yes, open)
            }
            Self::Not(test) => {
                let (yes, open) = test.decide(universe, messages);
                (universe - yes - &open, open)
            }
            Self::Set(uids) => (universe & &**uids, RoaringBitmap::new()),
            Self::Runs(runs) => {
                let (low, high) = (universe.min().unwrap_or(0), universe.max().unwrap_or(0));
                let mut uids = RoaringBitmap::new();
                for &(first, last) in runs {
                    uids.insert_range(first.max(low)..=last.min(high));
                }
                (universe & uids, RoaringBitmap::new())
            }
            Self::Each(each) => {
                let passes = messages.iter().filter(|message| each.matches(message)).map(|message| message.uid.0);
                (passes.collect::<RoaringBitmap>() & universe, RoaringBitmap::new())
            }
            Self::Sent(..) | Self::Text(_) => (RoaringBitmap::new(), universe.clone()),
        }
    }

    /// Whether one message passes, as far as is known.
    pub fn of(&self, known: &impl Known) -> Option<bool> {
        match self {
            Self::And(tests) => all(tests, known, false),
            Self::Or(tests) => all(tests, known, true),
            Self::Not(test) => test.of(known).map(|passes| !passes),
            Self::Set(uids) => Some(uids.contains(known.message().uid.0)),
            Self::Runs(runs) => {
                let uid = known.message().uid.0;
                let at = runs.partition_point(|&(_, last)| last < uid);
                Some(runs.get(at).is_some_and(|&(first, _)| first <= uid))
            }
            Self::Each(each) => Some(each.matches(known.message())),
            Self::Sent(from, before) => {
                let sent = known.sent()?;
                Some(sent.is_some_and(|sent| (*from..*before).contains(&i64::from(sent.local_day))))
            }
            Self::Text(string) => known.has(*string),
        }
    }
}

/// `settles` if any test gives that; undecided if any is, and else not.
fn all(tests: &[Test], known: &impl Known, settles: bool) -> Option<bool> {
    let mut result = Some(!settles);
    for test in tests {
        match test.of(known) {
            Some(passes) if passes == settles => return Some(settles),
            Some(_) => {}
            None => result = None,
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use posthaste_engine::ids::{Location, MessageId, ModSeq, Uid};
    use proptest::prelude::*;

    fn set(uids: &[u32]) -> Test {
        Test::Set(Rc::new(uids.iter().copied().collect()))
    }

    fn message(uid: u32, size: u64) -> Message {
        Message {
            uid: Uid(uid),
            prefix_of: 0,
            zone_minutes: 0,
            modseq: ModSeq(1),
            id: MessageId::default(),
            location: Location::default(),
            head_bytes: 0,
            size,
            internal_date: 0,
            save_date: 0,
        }
    }

    struct All(Message, [Option<bool>; 3]);

    impl Known for All {
        fn message(&self) -> &Message {
            &self.0
        }
        fn sent(&self) -> Option<Option<SentDate>> {
            self.1[2].map(|known| known.then_some(SentDate { unix_seconds: 0, local_day: 5 }))
        }
        fn has(&self, string: usize) -> Option<bool> {
            self.1[string]
        }
    }

    #[test]
    fn what_is_cheap_comes_first() {
        let test = Test::And(vec![Test::Text(0), Test::Sent(0, 1), Test::Or(vec![Test::Text(1), set(&[])]), set(&[1])]);
        let ordered =
            Test::And(vec![set(&[1]), Test::Sent(0, 1), Test::Text(0), Test::Or(vec![set(&[]), Test::Text(1)])]);
        assert_eq!(test.ordered(), ordered);
    }

    fn tests() -> impl Strategy<Value = Test> {
        let leaf = prop_oneof![
            prop::collection::vec(1..6_u32, 0..4).prop_map(|uids| set(&uids)),
            (1..6_u32, 0..3_u32).prop_map(|(first, more)| Test::Runs(vec![(first, first + more)])),
            (0..6_u64).prop_map(|size| Test::Each(Each::Larger(size))),
            (0..2_usize).prop_map(Test::Text),
            Just(Test::Sent(5, 6)),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Test::And),
                prop::collection::vec(inner.clone(), 2..3).prop_map(Test::Or),
                inner.prop_map(|test| Test::Not(Box::new(test))),
            ]
        })
    }

    proptest! {
        /// The set at once, and one message after another, come to the same; and what is decided with less known stays so.
        #[test]
        fn both_ways_agree(test in tests(), known in prop::collection::vec(any::<[bool; 3]>(), 5..6)) {
            let messages: Vec<Message> = (1..6).map(|uid| message(uid, u64::from(uid))).collect();
            let ordered = test.clone().ordered();
            let (yes, open) = ordered.decide(&(1..6).collect(), &messages);
            for (message, known) in messages.iter().zip(known) {
                let all = All(*message, known.map(Some));
                let passes = test.of(&all).expect("all is known");
                prop_assert_eq!(ordered.of(&all), Some(passes));
                let nothing = All(*message, [None; 3]);
                let first = ordered.of(&nothing);
                prop_assert!(first.is_none_or(|first| first == passes));
                prop_assert_eq!(first == Some(true), yes.contains(message.uid.0));
                prop_assert_eq!(first.is_none(), open.contains(message.uid.0));
            }
        }
    }
}
