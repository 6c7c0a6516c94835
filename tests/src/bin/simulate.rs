//! Runs seeds through the simulator until one breaks a promise or the time is over.

use std::io::Write;
use std::time::{Duration, Instant};

use clap::Parser;
use posthaste_tests::simulation::{Outcome, Plan, run};

/// Simulates nodes that crash, one seed after another, and stops at the first broken promise.
#[derive(Parser)]
struct Options {
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds; without end if absent.
    #[arg(long)]
    seeds: Option<u64>,
    /// Stop after so many seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Starts of the node per seed.
    #[arg(long, default_value_t = 4)]
    rounds: u32,
    /// Let the device fail now and then.
    #[arg(long)]
    faults: bool,
}

fn main() -> std::process::ExitCode {
    let options = Options::parse();
    let begun = Instant::now();
    let mut total = Outcome::default();
    let mut runs = 0;
    for seed in options.seed.. {
        if options.seeds.is_some_and(|seeds| runs >= seeds) || begun.elapsed() > Duration::from_secs(options.seconds) {
            break;
        }
        match run(Plan {
            seed,
            rounds: options.rounds,
            faults: options.faults || seed % 4 == 3,
            remote: seed % 5 == 4,
            check: true,
        }) {
            Ok(outcome) => {
                total.acknowledged += outcome.acknowledged;
                total.shown += outcome.shown;
                total.crashes += outcome.crashes;
                total.torn_tails += outcome.torn_tails;
            }
            Err(violation) => {
                println!("seed {seed}: {}", violation.0);
                return std::process::ExitCode::FAILURE;
            }
        }
        runs += 1;
        if runs % 50 == 0 {
            print!("\r{runs} seeds, {} crashes, {:.0} s", total.crashes, begun.elapsed().as_secs_f64());
            let _ = std::io::stdout().flush();
        }
    }
    println!(
        "\r{runs} seeds: {} acknowledged, {} shown, {} crashes, {} torn tails, no promise broken",
        total.acknowledged, total.shown, total.crashes, total.torn_tails
    );
    std::process::ExitCode::SUCCESS
}
