//! The command line. Other tools rely on it: see `docs/configuration.md`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::Io;
use crate::listen::Listen;

/// A mail store server: takes mail in by LMTP and SMTP, keeps it in a log-structured store, and gives it out by IMAP
/// and POP3.
///
/// A first run:
///
///   posthaste user add me@example.org        makes an account (and the store, if there is none)
///   posthaste serve --plaintext-auth         serves IMAP on 127.0.0.1:1143 (with TLS on 1993)
///                                            and LMTP on 127.0.0.1:1024
///
/// Everything is kept in the data directory. Every configuration key can be given in a TOML file (--config) or alone
/// (--set); docs/configuration.md describes them.
#[derive(Debug, Parser)]
#[command(name = "posthaste", version, verbatim_doc_comment, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Args)]
pub struct Common {
    /// Where everything is kept; created if it does not exist
    #[arg(long, global = true, value_name = "DIR", default_value = "./posthaste-data")]
    pub data: PathBuf,
    /// Configuration file
    #[arg(long, global = true, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Sets one configuration key, for example store.shards=4; may be repeated
    #[arg(long = "set", global = true, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve until SIGTERM or SIGINT
    ///
    /// Prints "listening SERVICE ADDR:PORT" for each listener and then "ready". On SIGTERM or SIGINT it takes no new
    /// connections, finishes what is in hand and exits with 0.
    Serve(Serve),
    /// Manage accounts, on a running server as well as on a stopped one
    User {
        #[command(subcommand)]
        command: User,
    },
    /// Read the whole store and name what is damaged; no server may run on it
    ///
    /// Every record, frame and page is compared with its checksum, and the index with the log. It changes nothing. Exits
    /// with 1 if anything is damaged.
    Check,
    /// Throw the index away and put it together from the log; no server may run on the store
    ///
    /// The log alone always gives the whole store again: every UID, UIDVALIDITY, mod-sequence and flag is as it was. The old
    /// index is in force until the new one is complete, so that this can be interrupted. Where the log is damaged and the index
    /// knows more, that is named, and nothing is done without --yes.
    Rebuild {
        /// Rebuild although the log has lost what the index still knows
        #[arg(long)]
        yes: bool,
    },
    /// Mend what is damaged, as far as that goes, and name what is lost; no server may run on the store
    ///
    /// Checks the store; puts damaged pages of the index together from the log, all of it where it disagrees with a log that is
    /// whole; writes damaged footers again; names each message that is lost with user, mailbox, UID, size, date and subject;
    /// and checks again. What is replaced is kept in lost+found in the directory of its shard. Exits with 1 if damage is left.
    Repair {
        /// Expunge the messages that are lost, so that clients do not ask for them any more
        #[arg(long)]
        expunge_lost: bool,
    },
    /// Look for damage on a running server: begin a scrub of the whole store now
    ///
    /// Every segment of the log, every page of the index and the manifest is read back and compared with its checksums, and
    /// what is damaged is named in the server's log. A server does that by itself, slowly, again and again
    /// (store.scrub_bytes_per_s, store.scrub_interval_s). Index pages that are damaged are mended at once.
    Scrub {
        /// Show how far it is, return when it is done, and print what it has found; exits with 1 if there is any
        #[arg(long)]
        wait: bool,
        /// Octets that each shard reads in a second; 0 for as many as it can [default: store.scrub_bytes_per_s]
        #[arg(long, value_name = "OCTETS")]
        bytes_per_s: Option<u64>,
    },
    /// Show figures of the store, and of the server if it runs
    ///
    /// Of the users with sessions, or who had some since the start, it names those who have taken most CPU time: what their
    /// sessions took, the octets that these have received, sent and read from the store, and what they hold in memory for
    /// large messages now.
    Stats {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// How many users to name
        #[arg(long, value_name = "N", default_value_t = 10)]
        users: usize,
    },
    /// Print a shell's completions, for example: posthaste completions bash > /etc/bash_completion.d/posthaste
    Completions { shell: clap_complete::Shell },
    /// Print the manual page, or write those of all commands into a directory
    Man {
        /// Where to write them, as posthaste.1, posthaste-serve.1 and so on
        directory: Option<PathBuf>,
    },
    /// Give back the space of deleted mail, and compress harder what has been compressed in haste
    ///
    /// A running server does that by itself where it pays. This compacts the whole store, also where little is gained: it
    /// reads and writes all of it. On a running server it keeps to store.compaction_bytes_per_s.
    Compact {
        /// Return when it is done, and say what it has gained; without a running server that is always so
        #[arg(long)]
        wait: bool,
    },
}

#[derive(Debug, Args)]
pub struct Serve {
    /// SERVICE=ADDR:PORT or SERVICE=unix:PATH, in place of the configured listeners; may be repeated
    ///
    /// SERVICE is imap, imaps, pop3, pop3s, lmtp, smtp or smtps. Port 0 takes a free port, which
    /// is printed.
    #[arg(long, value_name = "SERVICE=WHERE")]
    pub listen: Vec<Listen>,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub workers: Option<usize>,
    /// What I/O runs on [default: auto, which is io_uring where the system allows it]
    #[arg(long, value_enum)]
    pub io: Option<Io>,
    /// Allow passwords on connections without TLS: for tests, and behind a proxy that does TLS
    #[arg(long)]
    pub plaintext_auth: bool,
}

#[derive(Debug, Subcommand)]
pub enum User {
    /// Add an account, which can receive mail at once
    Add {
        /// Its address
        name: String,
        /// Read the password from the first line of standard input instead of asking for it
        #[arg(long)]
        password_stdin: bool,
    },
    /// Add accounts from a file of name:password lines
    ///
    /// A password may be a hash, {ARGON2ID}$argon2id$... or $argon2id$..., which is kept, or plain, with or without
    /// {PLAIN} before it, which is hashed. Accounts that exist are left as they are. FILE may be - for standard input.
    Import { file: PathBuf },
    /// Change the password of an account
    Passwd {
        name: String,
        /// Read the password from the first line of standard input instead of asking for it
        #[arg(long)]
        password_stdin: bool,
    },
    /// List the accounts
    List,
    /// Delete an account and all its mail
    Delete { name: String },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn common_options_stand_anywhere() {
        for line in [
            "posthaste --data d user add a@x --set store.shards=2",
            "posthaste user --data d add a@x --set store.shards=2",
            "posthaste user add --data d --set store.shards=2 a@x",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.common.data, PathBuf::from("d"));
            assert_eq!(cli.common.set, ["store.shards=2"]);
        }
    }
}
