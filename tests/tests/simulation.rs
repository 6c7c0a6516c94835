//! Random seeds through the simulator. `cargo run -p posthaste-tests --bin simulate` runs more of them.

use posthaste_tests::simulation::{Plan, run};

fn seeds(count: u64) -> std::ops::Range<u64> {
    let first = std::env::var("POSTHASTE_SEED").ok().and_then(|seed| seed.parse().ok());
    first.map_or(0..count, |first| first..first + 1)
}

#[test]
fn no_promise_is_broken_across_crashes() {
    for seed in seeds(60) {
        let plan = Plan { seed, rounds: 4, faults: false, remote: false, check: true };
        if let Err(violation) = run(plan) {
            panic!("seed {seed}: {}", violation.0);
        }
    }
}

#[test]
fn no_promise_is_broken_on_a_failing_device() {
    for seed in seeds(40) {
        let plan = Plan { seed: 1_000_000 + seed, rounds: 4, faults: true, remote: false, check: true };
        if let Err(violation) = run(plan) {
            panic!("seed {seed}: {}", violation.0);
        }
    }
}

#[test]
fn no_promise_is_broken_on_storage_that_is_far_away() {
    for seed in seeds(30) {
        let plan = Plan { seed: 2_000_000 + seed, rounds: 4, faults: seed % 2 == 1, remote: true, check: true };
        if let Err(violation) = run(plan) {
            panic!("seed {seed}: {}", violation.0);
        }
    }
}
