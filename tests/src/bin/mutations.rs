//! Plants one bug after another in the engine and counts the seeds until the simulation notices.
//!
//! A bug counts as caught only if an acknowledgement or a view was contradicted; an assertion inside the engine does not
//! count.

use std::panic::{AssertUnwindSafe, catch_unwind};

use clap::Parser;
use posthaste_engine::planted::{Bug, plant};
use posthaste_tests::mutations::{BUGS, plan};
use posthaste_tests::simulation::run;

/// Measures how many seeds the simulation needs to catch each planted bug.
#[derive(Parser)]
struct Options {
    /// Runs of each bug, with seeds of their own; the worst is reported.
    #[arg(long, default_value_t = 20)]
    runs: u64,
    /// Only bugs whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Give up a run after so many seeds.
    #[arg(long, default_value_t = 400)]
    seeds: u64,
}

fn caught(bug: Bug, seed: u64) -> Option<String> {
    plant(Some(bug));
    let result = catch_unwind(AssertUnwindSafe(|| run(plan(bug, seed))));
    plant(None);
    match result {
        Ok(Err(violation)) => Some(violation.0),
        Ok(Ok(_)) | Err(_) => None,
    }
}

fn main() -> std::process::ExitCode {
    let options = Options::parse();
    std::panic::set_hook(Box::new(|_| {}));
    let mut all_caught = true;
    println!("{:<24} {:>6} {:>6} {:>6}   an example of what was noticed", "bug", "best", "median", "worst");
    for &(bug, bound) in BUGS.iter().filter(|(bug, _)| format!("{bug:?}").contains(&options.only)) {
        let mut needed = Vec::new();
        let mut example = String::new();
        for number in 0..options.runs {
            let first = number * 1_000_000;
            let found = (0..options.seeds).find_map(|offset| Some((offset + 1, caught(bug, first + offset)?)));
            match found {
                Some((seeds, what)) => {
                    needed.push(seeds);
                    example = what;
                }
                None => needed.push(u64::MAX),
            }
        }
        needed.sort_unstable();
        let worst = needed.last().copied().unwrap_or(0);
        let median = needed.get(needed.len() / 2).copied().unwrap_or(0);
        let show = |seeds: u64| if seeds == u64::MAX { "-".to_owned() } else { seeds.to_string() };
        let name = format!("{bug:?}");
        println!("{name:<24} {:>6} {:>6} {:>6}   {example}", show(needed[0]), show(median), show(worst));
        all_caught &= worst <= bound;
    }
    if all_caught { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}
