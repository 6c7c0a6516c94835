use std::process::ExitCode;

use clap::{Parser, Subcommand};
use posthaste_bench::{append, expunge, flags, hot, moves, profile, resync, search, sync};
use posthaste_bench::{calibrate, compare, noop, verify};
use posthaste_bench::{deliver, fetch, handshakes, idle, maildrop, push, sessions, sink, users};

/// Loads a mail store server over LMTP, IMAP and POP3 and reports what it did and what that cost
#[derive(Debug, Parser)]
#[command(name = "posthaste-bench", version)]
struct Cli {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    /// Deliver messages over LMTP or SMTP, each connection one after another
    Deliver(deliver::Deliver),
    /// Fetch messages over IMAP, each connection one after another
    Fetch(fetch::Fetch),
    /// Log in over IMAP, select, fetch the flags of all messages and log out, over a new connection each time
    Sessions(sessions::Sessions),
    /// Send simple commands over IMAP, each connection one batch after another
    Noop(noop::Noop),
    /// Sync whole mailboxes over IMAP as a new client does: log in, select, flags and sizes, then all messages in batches
    Sync(sync::Sync),
    /// Come back over IMAP as a client does that was there: log in, select, STATUS of other mailboxes, what has changed, log out
    Resync(resync::Resync),
    /// Change flags over IMAP, of one message after another or of all
    Flags(flags::Flags),
    /// Append messages over IMAP
    Append(append::Append),
    /// Move messages over IMAP between two mailboxes, to and fro
    Move(moves::Move),
    /// Mark messages as deleted over IMAP and expunge them
    Expunge(expunge::Expunge),
    /// Search over IMAP, by what must be looked at: flags, date, size, header, text, body
    Search(search::Search),
    /// Load one mailbox with many IMAP sessions: deliveries, changes of flags, NOOP, IDLE; at the end all must see the same
    Hot(hot::Hot),
    /// Do what the users of a profile do: deliveries, IMAP and POP3 sessions, IDLE, when and as often as a file says
    Profile(profile::ProfileRun),
    /// Begin connections with TLS, wait for the greeting and close
    Handshakes(handshakes::Handshakes),
    /// Retrieve whole maildrops over POP3
    Pop3(maildrop::Maildrop),
    /// Deliver to connections in IDLE and report how long after the reply they hear of it
    Push(push::Push),
    /// Hold IMAP connections in IDLE and report the server's memory per connection
    Idle(idle::Idle),
    /// Serve LMTP and throw the mail away, or IMAP without mail, to find out what the load generator itself can do
    Sink(sink::Sink),
    /// Measure the machine: disk, loopback and CPU
    Calibrate(calibrate::Calibrate),
    /// Print ratios of the reports that --output has written to two files
    Compare(compare::Compare),
    /// Print name:password lines of the users that the other workloads use
    Users(users::PrintUsers),
}

fn main() -> ExitCode {
    let result = match Cli::parse().workload {
        Workload::Deliver(deliver) => deliver.run(),
        Workload::Fetch(fetch) => fetch.run(),
        Workload::Sessions(sessions) => sessions.run(),
        Workload::Noop(noop) => noop.run(),
        Workload::Sync(sync) => sync.run(),
        Workload::Resync(resync) => resync.run(),
        Workload::Flags(flags) => flags.run(),
        Workload::Append(append) => append.run(),
        Workload::Move(moves) => moves.run(),
        Workload::Expunge(expunge) => expunge.run(),
        Workload::Search(search) => search.run(),
        Workload::Hot(hot) => hot.run(),
        Workload::Profile(profile) => profile.run(),
        Workload::Handshakes(handshakes) => handshakes.run(),
        Workload::Pop3(maildrop) => maildrop.run(),
        Workload::Push(push) => push.run(),
        Workload::Idle(idle) => idle.run(),
        Workload::Sink(sink) => sink.run(),
        Workload::Calibrate(calibrate) => calibrate.run(),
        Workload::Compare(compare) => compare.run(),
        Workload::Users(users) => users.run(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // It ran, but there were errors, which the report counts.
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("posthaste-bench: {error}");
            match error.downcast_ref::<verify::Failure>() {
                Some(failure) => ExitCode::from(failure.exit_code()),
                None => ExitCode::FAILURE,
            }
        }
    }
}
