//! `posthaste rebuild` and `posthaste repair`: mending a store that no server works on.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use indicatif::ProgressBar;
use posthaste_engine::check::{Difference, ShardCheck};
use posthaste_engine::flags::UidSet;
use posthaste_engine::ids::{MailboxId, ShardId};
use posthaste_engine::io::real::run_worker;
use posthaste_engine::repair::{LostMessage, Repair};
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::Local;
use posthaste_imap::response::write_internal_date;
use posthaste_imap::types::DateTime;
use posthaste_mime::header::{Known, scan_header};
use posthaste_mime::words::decoded;

use crate::check::{Checked, lock_existing};
use crate::config::Config;
use crate::serve::store_config;

/// Puts the index of the store in `data` together from the log alone.
///
/// # Errors
/// The index knows what the log has lost, and `yes` does not say that it is to go; or the store cannot be read.
pub fn rebuild(data: &Path, config: &Config, yes: bool) -> Result<(), Box<dyn Error>> {
    let _lock = lock_existing(data)?;
    let checked = Checked::look(data, config.server.io.into())?;
    let mut out = std::io::stdout().lock();
    checked.print(&mut out)?;
    let mut would_go = 0;
    for (shard, check) in &checked.shards {
        if check.has_no_manifest {
            return Err(no_manifest(*shard).into());
        }
        for (mailbox, difference) in &check.differences {
            would_go += difference.only_in_index.len() + difference.changed.len();
            writeln!(out, "{}", describe_difference(&checked, check, *mailbox, difference))?;
        }
    }
    let is_log_damaged = checked.shards.iter().any(|(_, check)| check.has_lost_records);
    if is_log_damaged && would_go > 0 && !yes {
        let why = "the log is damaged, and the index knows more than it: the messages above would be gone, or be as they were \
                   before. `posthaste repair` mends the index without that; `posthaste rebuild --yes` rebuilds it all the same";
        return Err(why.into());
    }
    for (shard, check) in &checked.shards {
        let config = alone(config, checked.superblock.shards);
        let store = checked.superblock.store;
        let spinner = spinner(format!("rebuilding the index of shard {shard}"));
        let report = run_worker(config.1, data.to_owned(), None, async |io| {
            Shard::rebuild(Local::new(io), *shard, store, config.0).await
        })??;
        spinner.finish_and_clear();
        let mailboxes = check.mailboxes.len();
        writeln!(
            out,
            "shard {shard}: rebuilt the index of {mailboxes} mailboxes from {} records, {} bytes of log",
            report.records, report.bytes
        )?;
    }
    writeln!(out, "every UID, UIDVALIDITY and mod-sequence is as it was, but for what is named above")?;
    Ok(())
}

/// Mends what can be mended of the store in `data`, and names what is lost.
///
/// # Errors
/// Something is damaged still; or the store cannot be read or written.
pub fn repair(data: &Path, config: &Config, expunge_lost: bool) -> Result<(), Box<dyn Error>> {
    let _lock = lock_existing(data)?;
    let mut out = std::io::stdout().lock();
    let checked = Checked::look(data, config.server.io.into())?;
    let found = checked.print(&mut out)?;
    if found == 0 {
        return Ok(writeln!(out, "no damage found: there is nothing to mend")?);
    }
    let mut lost: Vec<LostMessage> = Vec::new();
    let mut gone = 0;
    for (shard, check) in checked.shards.iter().filter(|(_, check)| !check.findings.is_empty()) {
        if check.has_no_manifest {
            writeln!(out, "{}", no_manifest(*shard))?;
            continue;
        }
        let (config, io) = alone(config, checked.superblock.shards);
        let store = checked.superblock.store;
        let spinner = spinner(format!("repairing shard {shard}"));
        let repaired = run_worker(io, data.to_owned(), None, async |io| {
            Shard::repair(Local::new(io), *shard, store, config, check, expunge_lost).await
        })??;
        spinner.finish_and_clear();
        print_repair(&mut out, *shard, &repaired, &checked, check)?;
        gone += repaired.gone.len();
        lost.extend(repaired.lost);
    }
    for message in &lost {
        writeln!(out, "{}", describe_lost(message, &checked))?;
    }
    let after = Checked::look(data, config.server.io.into())?;
    let left = after.print(&mut out)?;
    if left == 0 {
        return Ok(writeln!(out, "all of it is mended")?);
    }
    let mut messages = match (lost.len(), expunge_lost) {
        (0, _) => "no message is lost".to_owned(),
        (lost, true) => format!("{lost} messages are lost, and have been expunged"),
        (lost, false) => format!("{lost} messages are lost, and have been left in place; --expunge-lost removes them"),
    };
    if gone > 0 {
        messages.push_str(&format!(", but {gone} are gone with the index that knew of them"));
    }
    Err(format!("{left} pieces of damage are left, which nothing can mend: {messages}").into())
}

/// Shows that something goes on.
fn spinner(what: String) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(Duration::from_millis(200));
    spinner
}

fn no_manifest(shard: ShardId) -> String {
    format!(
        "shard {shard}: its manifest is damaged, and nothing can be mended without it: put back a copy of the shard"
    )
}

/// How a store is opened to be mended, and on what.
fn alone(config: &Config, shards: u32) -> (ShardConfig, posthaste_engine::io::real::IoKind) {
    let mut shard = store_config(config, shards).shard;
    // There is nobody who could be disturbed, and nobody to come back to.
    (shard.compacts_by_itself, shard.scrub_bytes_per_s) = (false, 0);
    (shard, config.server.io.into())
}

fn print_repair(
    out: &mut impl Write,
    shard: ShardId,
    repaired: &Repair,
    checked: &Checked,
    check: &ShardCheck,
) -> std::io::Result<()> {
    for footer in &repaired.footers {
        writeln!(out, "mended: the footer of {footer} is written again")?;
    }
    for mailbox in &repaired.pages {
        writeln!(out, "mended: the index of {} is put together from the log", name_of(checked, check, *mailbox))?;
    }
    if repaired.is_index_rebuilt {
        writeln!(out, "mended: the whole index of shard {shard} is put together from the log")?;
    }
    for (mailbox, uid) in &repaired.gone {
        let whose = name_of(checked, check, *mailbox);
        writeln!(out, "gone: {whose}, UID {uid}: its record is damaged, and so was the index that knew of it")?;
    }
    repaired.kept.iter().try_for_each(|kept| writeln!(out, "kept what it was before: {kept}"))
}

fn name_of(checked: &Checked, check: &ShardCheck, mailbox: MailboxId) -> String {
    let (account, name) = checked.whose(check, mailbox).unwrap_or_else(|| (None, "unknown mailbox".to_owned()));
    format!("{}, {name}", account.unwrap_or_else(|| "unknown account".to_owned()))
}

fn describe_difference(checked: &Checked, check: &ShardCheck, mailbox: MailboxId, difference: &Difference) -> String {
    let mut line = name_of(checked, check, mailbox);
    for (what, uids) in [
        ("only the index has", &difference.only_in_index),
        ("only the log has", &difference.only_in_log),
        ("the log has other flags, mod-sequences or places of", &difference.changed),
    ] {
        if !uids.is_empty() {
            line.push_str(&format!("; {what} {}", describe_uids(uids)));
        }
    }
    line
}

/// UIDs as IMAP writes them.
fn describe_uids(uids: &UidSet) -> String {
    let run = |(first, last): (u32, u32)| if first == last { first.to_string() } else { format!("{first}:{last}") };
    format!("UID {}", uids.runs().into_iter().map(run).collect::<Vec<String>>().join(","))
}

/// One line: whose, which, and what of it can still be read.
fn describe_lost(message: &LostMessage, checked: &Checked) -> String {
    let account = checked.accounts.get(&message.account).map_or("unknown account", String::as_str);
    let LostMessage { mailbox_name, uid, octets, why, .. } = message;
    let mut date = Vec::new();
    let (unix_seconds, offset_minutes) = (message.internal_date, message.zone_minutes);
    write_internal_date(&mut date, DateTime { unix_seconds, offset_minutes });
    let date = String::from_utf8_lossy(&date);
    let date = date.trim_matches('"').trim();
    let done = if message.is_expunged { "expunged" } else { "left in place" };
    let subject = message.header.as_deref().map(|header| {
        let fields = scan_header(header, 0, |_| false).fields;
        fields.value(header, Known::Subject).map_or_else(|| "none".to_owned(), decoded)
    });
    let subject = subject.map_or_else(|| "its header is damaged".to_owned(), |subject| format!("subject {subject:?}"));
    format!("lost: {account}, {mailbox_name}, UID {uid}: {octets} octets, received {date}, {subject}; {done}; {why}")
}
