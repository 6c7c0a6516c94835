//! `posthaste scrub`: has a running server look for damage now.

use std::error::Error;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::control::{self, Request, Response, Scrub};

/// How often there is a look how far it is.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Begins a scrub of the store in `data`; with `wait`, says in the end what it has found.
///
/// # Errors
/// No server runs there; or, with `wait`, damage.
pub fn scrub(data: &Path, wait: bool, bytes_per_s: Option<u64>) -> Result<(), Box<dyn Error>> {
    let begun = ask(data, &Request::Scrub { bytes_per_s })?;
    if !wait {
        return Ok(());
    }
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes} of log, {bytes_per_sec}") {
        bar.set_style(style);
    }
    loop {
        let shards = ask(data, &Request::ScrubStatus { findings: false })?;
        bar.set_length(shards.iter().map(|shard| shard.log_bytes).sum());
        bar.set_position(shards.iter().map(|shard| shard.log_bytes_done).sum());
        if shards.iter().zip(&begun).all(|(shard, begun)| shard.passes >= begun.passes) {
            break;
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    bar.finish_and_clear();
    let shards = ask(data, &Request::ScrubStatus { findings: true })?;
    let mut out = std::io::stdout().lock();
    let findings = shards.iter().flat_map(|shard| &shard.findings);
    let found = findings.clone().count();
    findings.clone().try_for_each(|finding| writeln!(out, "{finding}"))?;
    let bytes: u64 = shards.iter().map(|shard| shard.log_bytes).sum();
    writeln!(out, "scrubbed {} shards, {bytes} bytes of log", shards.len())?;
    match found {
        0 => Ok(writeln!(out, "no damage found")?),
        found => Err(format!("{found} pieces of damage found").into()),
    }
}

fn ask(data: &Path, request: &Request) -> Result<Vec<Scrub>, Box<dyn Error>> {
    match control::ask(data, request) {
        Ok(Response::Scrub { shards }) => Ok(shards),
        Ok(Response::Error { message }) => Err(message.into()),
        Ok(other) => Err(format!("an answer that does not fit: {other:?}").into()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            let data = data.display();
            Err(format!("no server runs on {data}: `posthaste check` looks for damage in a stopped store").into())
        }
        Err(error) => Err(format!("the server did not answer: {error}").into()),
    }
}
