//! What a case is made of, and how cases are made up.

use std::collections::BTreeSet;

use posthaste_engine::flags::UidSet;
use posthaste_engine::ids::Uid;
use posthaste_tests::model::How;
use proptest::prelude::*;

use crate::{ACCOUNTS, SESSIONS};

/// Past every UID, and past what one container of a bitmap holds.
pub const FAR: u32 = 70_000;

pub const NAMES: [&str; 16] = [
    "Work",
    "Work/Old",
    "Work/Old/2024",
    "Archive",
    "Lists",
    "Lists/a/b",
    "Lists/a/b/Old",
    "A/B/C/D/E",
    "Entwürfe/Ü",
    "INBOX",
    "inbox",
    "Inbox/Sub",
    "INBOX/sub/Old",
    "Trash",
    "Sent",
    "Inboxes",
];

/// A name by number; the last ones are bad, or become so by a rename.
pub fn name(number: u8) -> String {
    match usize::from(number) {
        16 => format!("deep{}", "/x".repeat(48)),
        17 => "y".repeat(995),
        18 => String::new(),
        19 => "a//b".to_owned(),
        20 => "/a".to_owned(),
        21 => "a/".to_owned(),
        22 => "a\nb".to_owned(),
        23 => "z".repeat(1001),
        24 => format!("deep{}", "/x".repeat(50)),
        number => NAMES[number % NAMES.len()].to_owned(),
    }
}

pub const FLAGS: [&str; 12] = [
    "\\Seen",
    "\\Answered",
    "\\Flagged",
    "\\Deleted",
    "\\Draft",
    "$k0",
    "$K0",
    "$k1",
    "$k2",
    "$Forwarded",
    "NonJunk",
    "nonjunk",
];

pub fn flag_names(numbers: &[u8]) -> Vec<String> {
    numbers.iter().map(|&number| FLAGS[usize::from(number)].to_owned()).collect()
}

/// A mailbox: of those an account has, in the order of their names; now and then one that has been deleted.
#[derive(Clone, Copy, Debug)]
pub struct Pick {
    pub account: u8,
    pub mailbox: u8,
    pub is_gone: bool,
}

/// UIDs: by their last six bits, or all there are and many that are not.
#[derive(Clone, Copy, Debug)]
pub struct Uids(pub u64);

impl Uids {
    pub fn set(self, uid_next: u32) -> BTreeSet<u32> {
        (1..uid_next + 3).filter(|uid| self.0 >> (uid % 64) & 1 == 1).collect()
    }

    pub fn uid_set(self, uid_next: u32) -> UidSet {
        if self.0 == u64::MAX {
            return UidSet::range(1..=FAR);
        }
        self.set(uid_next).into_iter().map(Uid).collect()
    }
}

#[derive(Clone, Debug)]
pub struct Recipient {
    pub mailbox: Pick,
    pub flags: Vec<u8>,
    pub date: Option<(i64, i16)>,
}

#[derive(Clone, Debug)]
pub enum Op {
    /// One message for all recipients. `twice`: the first of them gets it once more.
    Deliver {
        recipients: Vec<Recipient>,
        twice: bool,
        lines: u16,
    },
    Store {
        mailbox: Pick,
        uids: Uids,
        how: How,
        flags: Vec<u8>,
        unchanged_since: Option<u8>,
    },
    /// New keywords, which may be more than there is room for.
    ManyKeywords {
        mailbox: Pick,
        uids: Uids,
        count: u8,
    },
    Expunge {
        mailbox: Pick,
        mark: Option<Uids>,
        among: Option<Uids>,
    },
    /// What QUIT of POP3 does.
    Remove {
        mailbox: Pick,
        uids: Uids,
    },
    Transfer {
        from: Pick,
        uids: Uids,
        to: Pick,
        is_move: bool,
    },
    Create {
        account: u8,
        name: u8,
    },
    Rename {
        account: u8,
        from: u8,
        to: u8,
    },
    Delete {
        account: u8,
        name: u8,
    },
    Subscribe {
        account: u8,
        name: u8,
        subscribed: bool,
    },
    Select {
        session: u8,
        mailbox: Pick,
        claim_recent: bool,
    },
    Sync {
        session: u8,
        allow_expunge: bool,
    },
    /// STORE of a session that does not want to hear of its own change.
    StoreSilently {
        session: u8,
        uids: Uids,
        how: How,
        flags: Vec<u8>,
    },
    Checkpoint {
        account: u8,
    },
    Compact {
        account: u8,
        all: bool,
    },
    Reopen {
        stop: bool,
        workers: u8,
        crash_while_opening: Option<u8>,
    },
}

/// A case.
#[derive(Clone, Debug)]
pub struct Script {
    pub seed: u64,
    pub segment_kb: u64,
    pub checkpoint_kb: u64,
    pub ops: Vec<Op>,
}

pub fn account() -> impl Strategy<Value = u8> {
    prop_oneof![6 => Just(0_u8), 2 => Just(1_u8), 1 => 0..ACCOUNTS.len() as u8]
}

pub fn pick() -> impl Strategy<Value = Pick> {
    let gone = prop_oneof![30 => Just(false), 1 => Just(true)];
    let mailbox = prop_oneof![2 => 0_u8..3, 1 => any::<u8>()];
    (account(), mailbox, gone).prop_map(|(account, mailbox, is_gone)| Pick { account, mailbox, is_gone })
}

pub fn uids() -> impl Strategy<Value = Uids> {
    prop_oneof![Just(u64::MAX), any::<u64>(), (0_u32..64).prop_map(|bit| 1 << bit)].prop_map(Uids)
}

pub fn flags() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(0..FLAGS.len() as u8, 0..4)
}

pub fn how() -> impl Strategy<Value = How> {
    prop_oneof![Just(How::Add), Just(How::Remove), Just(How::Replace)]
}

pub fn some_name() -> impl Strategy<Value = u8> {
    prop_oneof![12 => 0_u8..16, 1 => 16_u8..25]
}

pub fn op() -> impl Strategy<Value = Op> {
    let date = prop::option::of((-2_000_000_000_i64..8_000_000_000, -840_i16..=840));
    let recipient = (pick(), flags(), date).prop_map(|(mailbox, flags, date)| Recipient { mailbox, flags, date });
    let lines = prop_oneof![60 => 0_u16..60, 6 => 60_u16..800, 1 => 14_000_u16..16_000];
    let session = 0..SESSIONS as u8;
    prop_oneof![
        24 => (prop::collection::vec(recipient, 1..4), any::<bool>(), lines)
            .prop_map(|(recipients, twice, lines)| Op::Deliver { recipients, twice, lines }),
        14 => (pick(), uids(), how(), flags(), prop::option::weighted(0.3, 0_u8..40)).prop_map(
            |(mailbox, uids, how, flags, unchanged_since)| Op::Store { mailbox, uids, how, flags, unchanged_since }
        ),
        1 => (pick(), uids(), prop_oneof![Just(120), 1_u8..121])
            .prop_map(|(mailbox, uids, count)| Op::ManyKeywords { mailbox, uids, count }),
        8 => (pick(), prop::option::weighted(0.8, uids()), prop::option::of(uids()))
            .prop_map(|(mailbox, mark, among)| Op::Expunge { mailbox, mark, among }),
        2 => (pick(), uids()).prop_map(|(mailbox, uids)| Op::Remove { mailbox, uids }),
        10 => (pick(), uids(), pick(), any::<bool>())
            .prop_map(|(from, uids, to, is_move)| Op::Transfer { from, uids, to, is_move }),
        8 => (account(), some_name()).prop_map(|(account, name)| Op::Create { account, name }),
        6 => (account(), some_name(), some_name()).prop_map(|(account, from, to)| Op::Rename { account, from, to }),
        3 => (account(), some_name()).prop_map(|(account, name)| Op::Delete { account, name }),
        2 => (account(), some_name(), any::<bool>())
            .prop_map(|(account, name, subscribed)| Op::Subscribe { account, name, subscribed }),
        6 => (session.clone(), pick(), any::<bool>())
            .prop_map(|(session, mailbox, claim_recent)| Op::Select { session, mailbox, claim_recent }),
        14 => (session.clone(), any::<bool>())
            .prop_map(|(session, allow_expunge)| Op::Sync { session, allow_expunge }),
        6 => (session, uids(), how(), flags())
            .prop_map(|(session, uids, how, flags)| Op::StoreSilently { session, uids, how, flags }),
        3 => account().prop_map(|account| Op::Checkpoint { account }),
        2 => (account(), any::<bool>()).prop_map(|(account, all)| Op::Compact { account, all }),
        5 => (any::<bool>(), 1_u8..4, prop::option::weighted(0.3, 1_u8..80)).prop_map(
            |(stop, workers, crash_while_opening)| Op::Reopen { stop, workers, crash_while_opening }
        ),
    ]
}

pub fn script() -> impl Strategy<Value = Script> {
    // A long script meets more, a short one is quick: most are short.
    let ops = prop_oneof![
        3 => prop::collection::vec(op(), 1..40),
        1 => prop::collection::vec(op(), 40..250),
    ];
    (any::<u64>().no_shrink(), 32_u64..65, 4_u64..33, ops).prop_map(|(seed, segment_kb, checkpoint_kb, ops)| Script {
        seed,
        segment_kb,
        checkpoint_kb,
        ops,
    })
}
