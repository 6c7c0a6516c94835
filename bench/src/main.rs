use std::process::ExitCode;

use clap::{Parser, Subcommand};
use posthaste_bench::{deliver, fetch, idle, sink, users};

/// Loads a mail store server over LMTP and IMAP and reports what it did and what that cost
#[derive(Debug, Parser)]
#[command(name = "posthaste-bench", version)]
struct Cli {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Deliver messages over LMTP, each connection one after another
    Deliver(deliver::Deliver),
    /// Fetch messages over IMAP, each connection one after another
    Fetch(fetch::Fetch),
    /// Hold IMAP connections in IDLE and report the server's memory per connection
    Idle(idle::Idle),
    /// Serve LMTP and throw the mail away, to find out what the load generator itself can do
    Sink(sink::Sink),
    /// Print name:password lines of the users that the other workloads use
    Users(users::PrintUsers),
}

fn main() -> ExitCode {
    let result = match Cli::parse().workload {
        Workload::Deliver(deliver) => deliver.run(),
        Workload::Fetch(fetch) => fetch.run(),
        Workload::Idle(idle) => idle.run(),
        Workload::Sink(sink) => sink.run(),
        Workload::Users(users) => users.run(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // It ran, but there were errors, which the report counts.
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("posthaste-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
