//! A few rounds of SIGKILL; `kill-rounds` does more of them.

use posthaste_tests::kill::{self, Plan};

#[test]
fn what_was_acknowledged_outlives_sigkill() {
    let plan = Plan { seed: 20_261_124, rounds: 3, users: 8, lmtp_connections: 4, operations: 1000 };
    let outcome = kill::run(plan, |_, _| {}).expect("nothing is lost or doubled");
    assert!(outcome.acknowledged >= 3000 && outcome.messages > 0, "{outcome:?}");
}
