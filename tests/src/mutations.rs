//! The planted bugs, and within how many seeds each must be caught.

use posthaste_engine::planted::Bug;

use crate::simulation::Plan;

/// Each bug with the number of seeds within which the simulation must notice it. The bounds are above the worst of 20
/// runs with seeds of their own (`cargo run --release -p posthaste-tests --features planted-bugs --bin mutations`).
pub const BUGS: &[(Bug, u64)] = &[
    (Bug::SkipSync, 20),
    (Bug::PublishBeforeSync, 60),
    (Bug::SkipChecksum, 200),
    (Bug::ReplayByFileOrder, 20),
    (Bug::SkipDirectorySync, 20),
    (Bug::ReissueUid, 10),
    (Bug::TrustPageCache, 150),
    (Bug::SkipTailRewrite, 200),
    (Bug::IgnoreFailedSync, 100),
    (Bug::ReplayTooLate, 20),
    (Bug::ForgetExpungeModSeq, 10),
    (Bug::CheckpointPendingTip, 10),
    (Bug::LoseMoveTarget, 10),
    (Bug::RemoveBeforeCommit, 100),
    (Bug::SkipCompactionSync, 20),
    (Bug::ForgetPendingCopies, 20),
    (Bug::FoldWithoutLive, 60),
    (Bug::FoldWithoutStates, 80),
    (Bug::ForgetDeletions, 200),
    (Bug::WaitForEver, 100),
    (Bug::TakeShortWrite, 100),
    (Bug::SyncAgain, 60),
];

/// The run that is meant to catch a bug.
pub fn plan(bug: Bug, seed: u64) -> Plan {
    // Only a crash that tears a batch between good header and good records shows a missing checksum.
    let rounds = match bug {
        Bug::SkipChecksum | Bug::SkipTailRewrite => 12,
        // It takes a device that fails a sync, and then a crash.
        Bug::IgnoreFailedSync | Bug::SyncAgain => 12,
        // The crash has to come between two steps of a run.
        Bug::RemoveBeforeCommit => 10,
        // They show when the index is lost after something has been folded.
        Bug::FoldWithoutLive | Bug::FoldWithoutStates | Bug::ForgetDeletions => 10,
        _ => 4,
    };
    let faults = matches!(
        bug,
        Bug::IgnoreFailedSync | Bug::SkipTailRewrite | Bug::WaitForEver | Bug::TakeShortWrite | Bug::SyncAgain
    );
    Plan { seed, rounds, faults, remote: false, check: false }
}
