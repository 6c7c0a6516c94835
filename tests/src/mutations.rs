//! The planted bugs, and within how many seeds each must be caught.

use posthaste_engine::planted::Bug;

use crate::simulation::Plan;

/// Each bug with the number of seeds within which the simulation must notice it. The bounds are above the worst of 20
/// runs with seeds of their own (`cargo run --release -p posthaste-tests --features planted-bugs --bin mutations`).
pub const BUGS: &[(Bug, u64)] = &[
    (Bug::SkipSync, 400),
    (Bug::PublishBeforeSync, 400),
    (Bug::SkipChecksum, 400),
    (Bug::ReplayByFileOrder, 400),
    (Bug::SkipDirectorySync, 400),
    (Bug::ReissueUid, 400),
    (Bug::TrustPageCache, 400),
    (Bug::IgnoreFailedSync, 400),
    (Bug::ReplayTooLate, 400),
    (Bug::ApplyTornBatch, 400),
    (Bug::ForgetExpungeModSeq, 400),
    (Bug::CheckpointPendingTip, 400),
    (Bug::LoseMoveTarget, 400),
];

/// The run that is meant to catch a bug.
pub fn plan(bug: Bug, seed: u64) -> Plan {
    Plan { seed, rounds: 4, faults: bug == Bug::IgnoreFailedSync, remote: false, check: false }
}
