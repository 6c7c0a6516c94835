//! Kills the real server again and again and looks for what it had acknowledged.

use std::process::ExitCode;

use clap::Parser;
use posthaste_tests::kill::{self, Plan};

/// Rounds of SIGKILL against the real server on real files
#[derive(Debug, Parser)]
struct Cli {
    #[arg(long, default_value_t = 100)]
    rounds: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Acknowledged operations of a round, at least
    #[arg(long, default_value_t = 1000)]
    operations: u64,
    #[arg(long, default_value_t = 8)]
    users: usize,
    #[arg(long, default_value_t = 4)]
    lmtp_connections: usize,
}

fn main() -> ExitCode {
    let Cli { rounds, seed, operations, users, lmtp_connections } = Cli::parse();
    let plan = Plan { seed, rounds, users, lmtp_connections, operations };
    let outcome = kill::run(plan, |round, outcome| {
        let kill::Outcome { acknowledged, undecided_done, undecided_not_done, messages } = outcome;
        println!(
            "round {}: {acknowledged} acknowledged so far, undecided {undecided_done} done and {undecided_not_done} not, \
             {messages} messages",
            round + 1
        );
    });
    match outcome {
        Ok(_) => {
            println!("{rounds} rounds: nothing lost, nothing doubled");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("kill-rounds: {error}");
            ExitCode::FAILURE
        }
    }
}
