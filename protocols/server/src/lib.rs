//! What the `posthaste` program does: command line, configuration, listeners, sessions.
//!
//! It is a library so that tests can run a server within their own process.
#![forbid(unsafe_code)]

mod accounts;
mod check;
mod cli;
mod config;
mod connection;
mod control;
mod imap;
mod inbound;
mod limits;
mod listen;
mod lock;
mod login;
mod node;
mod password;
mod pop3;
mod repair;
mod scrub;
mod serve;
mod special_use;
mod tls;
mod usage;
mod users;

use std::error::Error;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{CommandFactory, Parser};

use cli::{Cli, Command, Common};
use config::Config;
use control::{Request, Response, Stats, User, UserStats};
use lock::LockError;
use password::Hasher;

/// The program, with the arguments of this process.
pub fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("posthaste: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Carries out a command line, of which the first word is the name of the program.
///
/// # Errors
/// What the program would print before it exits with 1.
pub fn run(arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    execute(Cli::try_parse_from(arguments)?)
}

fn execute(cli: Cli) -> Result<(), Box<dyn Error>> {
    let mut config = config::load(cli.common.config.as_deref(), &cli.common.set)?;
    match cli.command {
        Command::Serve(options) => {
            if !options.listen.is_empty() {
                config.server.listen = options.listen;
            }
            config.server.workers = options.workers.unwrap_or(config.server.workers);
            config.server.io = options.io.unwrap_or(config.server.io);
            config.server.plaintext_auth |= options.plaintext_auth;
            serve::serve(&cli.common.data, config)
        }
        Command::User { command } => user(command, &cli.common, &config),
        Command::Stats { json, users } => match administer(&cli.common, &config, Request::Stats { users })? {
            Response::Stats(stats) => Ok(print_stats(&stats, json)?),
            other => Err(unexpected(&other)),
        },
        Command::Scrub { wait, bytes_per_s } => scrub::scrub(&cli.common.data, wait, bytes_per_s),
        Command::Rebuild { yes } => repair::rebuild(&cli.common.data, &config, yes),
        Command::Repair { expunge_lost } => repair::repair(&cli.common.data, &config, expunge_lost),
        Command::Check => check::check(&cli.common.data, config.server.io.into()),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "posthaste", &mut std::io::stdout());
            Ok(())
        }
        Command::Man { directory: Some(directory) } => {
            std::fs::create_dir_all(&directory)?;
            Ok(clap_mangen::generate_to(Cli::command(), directory)?)
        }
        Command::Man { directory: None } => Ok(clap_mangen::Man::new(Cli::command()).render(&mut std::io::stdout())?),
        Command::Compact { wait } => match administer(&cli.common, &config, Request::Compact { wait })? {
            Response::Compacted { segments, bytes_before, bytes_after } => {
                let mut out = std::io::stdout().lock();
                Ok(writeln!(out, "{segments} segments of {bytes_before} octets became {bytes_after} octets")?)
            }
            Response::Done => Ok(()),
            other => Err(unexpected(&other)),
        },
    }
}

fn user(command: cli::User, common: &Common, config: &Config) -> Result<(), Box<dyn Error>> {
    let request = match command {
        cli::User::Add { name, password_stdin } => {
            let name = accounts::normalise(&name)?;
            let password = users::read_password(&name, password_stdin)?;
            let user = User { name, password_hash: Hasher::new().hash(&password) };
            return match administer(common, config, Request::AddUsers { users: vec![user] })? {
                Response::Added { existing } if existing.is_empty() => Ok(()),
                Response::Added { existing } => {
                    Err(format!("the account {} exists already", existing.join(", ")).into())
                }
                other => Err(unexpected(&other)),
            };
        }
        cli::User::Import { file } => {
            let users = users::read_import(&file)?;
            let count = users.len();
            return match administer(common, config, Request::AddUsers { users })? {
                Response::Added { existing } => {
                    let mut out = std::io::stdout().lock();
                    writeln!(out, "{} accounts added, {} existed already", count - existing.len(), existing.len())?;
                    existing.iter().try_for_each(|name| writeln!(out, "left as it was: {name}"))?;
                    Ok(())
                }
                other => Err(unexpected(&other)),
            };
        }
        cli::User::Passwd { name, password_stdin } => {
            let name = accounts::normalise(&name)?;
            let password = users::read_password(&name, password_stdin)?;
            Request::SetPassword { user: User { name, password_hash: Hasher::new().hash(&password) } }
        }
        cli::User::Delete { name } => Request::DeleteUser { name: accounts::normalise(&name)? },
        cli::User::List => Request::ListUsers,
    };
    match administer(common, config, request)? {
        Response::Done => Ok(()),
        Response::Users { names } => {
            let mut out = std::io::stdout().lock();
            names.iter().try_for_each(|name| writeln!(out, "{name}"))?;
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

fn unexpected(response: &Response) -> Box<dyn Error> {
    match response {
        Response::Error { message } => message.clone().into(),
        other => format!("an answer that does not fit: {other:?}").into(),
    }
}

/// Has a request carried out: by the server that works on the data directory, else here.
fn administer(common: &Common, config: &Config, request: Request) -> Result<Response, Box<dyn Error>> {
    /// A server may just be starting or stopping.
    const PATIENCE: Duration = Duration::from_secs(5);
    let begun = Instant::now();
    loop {
        let in_use = match lock::lock(&common.data) {
            Ok(_lock) => return serve::execute_alone(&common.data, config, request),
            Err(error @ LockError::InUse { .. }) => error,
            Err(error) => return Err(error.into()),
        };
        match control::ask(&common.data, &request) {
            Ok(response) => return Ok(response),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                if begun.elapsed() > PATIENCE {
                    return Err(format!("{in_use}, which does not answer on its control socket: {error}").into());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(format!("the server did not answer: {error}").into()),
        }
    }
}

fn print_stats(stats: &Stats, json: bool) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        return writeln!(out, "{}", serde_json::to_string_pretty(stats)?);
    }
    writeln!(out, "accounts              {}", stats.accounts)?;
    match &stats.server {
        None => writeln!(out, "server                not running")?,
        Some(server) => {
            writeln!(
                out,
                "server                up {} s, {} workers on {}",
                server.uptime_s, server.workers, server.io
            )?;
            writeln!(
                out,
                "connections           {} open, {} accepted, {} refused",
                server.connections, server.accepted, server.refused
            )?;
            writeln!(out, "logins                {}, {} failed", server.logins, server.failed_logins)?;
            writeln!(out, "messages received     {} ({} octets)", server.messages_received, server.octets_received)?;
            writeln!(out, "deliveries            {}", server.deliveries)?;
            writeln!(out, "messages fetched      {}", server.messages_fetched)?;
            match stats.dictionary_generation {
                0 => writeln!(out, "dictionaries          none")?,
                generation => writeln!(out, "dictionaries          generation {generation}")?,
            }
        }
    }
    if !stats.users.is_empty() {
        writeln!(out, "   CPU ms   received       sent  read from store  in memory  user")?;
    }
    for user in &stats.users {
        let UserStats { name, cpu_us, octets_received, octets_sent, octets_read, octets_held } = user;
        let cpu_ms = cpu_us / 1000;
        writeln!(out, "{cpu_ms:9} {octets_received:10} {octets_sent:10} {octets_read:16} {octets_held:10}  {name}")?;
    }
    writeln!(
        out,
        "shard     batches     records   log bytes     sealed checkpoints record reads  body frames   cache hits cache misses \
         cached bytes"
    )?;
    for shard in &stats.shards {
        writeln!(
            out,
            "{:5} {:11} {:11} {:11} {:10} {:11} {:12} {:12} {:12} {:12} {:12}",
            shard.shard,
            shard.batches,
            shard.records,
            shard.log_bytes,
            shard.segments_sealed,
            shard.checkpoints,
            shard.record_reads,
            shard.body_frames_unpacked,
            shard.message_cache_hits,
            shard.message_cache_misses,
            shard.message_cache_bytes
        )?;
    }
    writeln!(out, "shard    in use    at rest bytes at rest index loads   index hits  index bytes")?;
    for shard in &stats.shards {
        writeln!(
            out,
            "{:5} {:9} {:10} {:13} {:11} {:12} {:12}",
            shard.shard,
            shard.mailboxes_in_use,
            shard.mailboxes_at_rest,
            shard.at_rest_bytes,
            shard.index_loads,
            shard.index_cache_hits,
            shard.index_cache_bytes
        )?;
    }
    writeln!(out, "shard compactions     segments   bytes read bytes written")?;
    for shard in &stats.shards {
        writeln!(
            out,
            "{:5} {:11} {:12} {:12} {:13}",
            shard.shard,
            shard.compactions,
            shard.segments_compacted,
            shard.compacted_bytes_read,
            shard.compacted_bytes_written
        )?;
    }
    writeln!(out, "shard     scrubs     findings   bytes read last finished")?;
    for shard in &stats.shards {
        let finished = match shard.scrub_finished_ms {
            0 => "not since the start".to_owned(),
            finished => format!("{} s ago", stats.now_ms.saturating_sub(finished) / 1000),
        };
        writeln!(
            out,
            "{:5} {:10} {:12} {:12} {finished}",
            shard.shard, shard.scrub_passes, shard.scrub_findings, shard.scrub_bytes
        )?;
    }
    Ok(())
}
