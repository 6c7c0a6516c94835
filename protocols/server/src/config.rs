//! The configuration: one TOML file, with single keys set on the command line.
//!
//! Every key is described in `docs/configuration.md`. Unknown keys are errors, because a misspelt limit is no limit.

use std::path::{Path, PathBuf};

use posthaste_engine::io::real::IoKind;
use posthaste_engine::mailboxes::SEPARATOR;
use posthaste_engine::node::SHARDS_MAX;
use serde::Deserialize;

use crate::limits;
use crate::listen::Listen;
use crate::special_use::FirstMailbox;

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    pub server: Server,
    pub limits: Limits,
    pub imap: Imap,
    pub pop3: Pop3,
    pub lmtp: Lmtp,
    pub smtp: Smtp,
    pub delivery: Delivery,
    pub accounts: Accounts,
    pub store: Store,
    pub tls: Tls,
    pub log: Log,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Server {
    /// The name in greetings and Received fields.
    pub host_name: String,
    pub listen: Vec<Listen>,
    /// 0: one per core.
    pub workers: usize,
    pub io: Io,
    pub plaintext_auth: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// io_uring where the system allows it, else epoll.
    #[default]
    Auto,
    Uring,
    Epoll,
}

impl From<Io> for IoKind {
    fn from(io: Io) -> Self {
        match io {
            Io::Auto => Self::Auto,
            Io::Uring => Self::Uring,
            Io::Epoll => Self::Epoll,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub message_bytes: u64,
    pub mailbox_messages: u32,
    pub in_flight_bytes: u64,
    pub connections: usize,
    pub connections_per_address: usize,
    pub connections_per_user: usize,
    pub send_timeout_s: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Imap {
    pub idle_timeout_s: u64,
    pub login_timeout_s: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pop3 {
    pub idle_timeout_s: u64,
    pub login_timeout_s: u64,
    /// At QUIT, what was retrieved gets \Seen.
    pub marks_seen: bool,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lmtp {
    pub idle_timeout_s: u64,
    pub recipients: usize,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Smtp {
    pub idle_timeout_s: u64,
    pub recipients: usize,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Accounts {
    /// What a new account has beside INBOX.
    pub mailboxes: Vec<FirstMailbox>,
}

/// How mail is taken in, by whatever protocol.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Delivery {
    /// The account that gets mail to the postmaster (RFC 5321, 4.5.1) of a domain that has no such account.
    pub postmaster: Option<String>,
    pub full_mailbox: FullMailbox,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FullMailbox {
    /// 452: the client tries again for some days.
    #[default]
    Defer,
    /// 552: the sender is told at once.
    Reject,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Store {
    /// Counts when the store is created; one per core if not given.
    pub shards: Option<u32>,
    pub segment_size_bytes: Option<u64>,
    pub checkpoint_bytes: Option<u64>,
    pub index_cache_bytes: Option<usize>,
    pub message_cache_bytes: Option<usize>,
    pub gather_us: Option<u64>,
    pub reserve_bytes: Option<u64>,
    pub train_after_bytes: Option<u64>,
    pub compaction: Option<bool>,
    pub compaction_run_bytes: Option<u64>,
    pub compaction_bytes_per_s: Option<u64>,
    pub scrub_bytes_per_s: Option<u64>,
    pub scrub_interval_s: Option<u64>,
    pub read_timeout_s: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// PEM: the server's certificate, then its issuers.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub minimum_version: TlsVersion,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum TlsVersion {
    #[default]
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    pub level: Level,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Default for Server {
    fn default() -> Self {
        let listen = ["imap=127.0.0.1:1143", "imaps=127.0.0.1:1993", "lmtp=127.0.0.1:1024"];
        Self {
            host_name: host_name(),
            listen: listen.iter().map(|text| text.parse().expect("a listener of our own")).collect(),
            workers: 0,
            io: Io::Auto,
            plaintext_auth: false,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: limits::MESSAGE_BYTES,
            mailbox_messages: posthaste_engine::index::MESSAGES_MAX,
            in_flight_bytes: limits::IN_FLIGHT_BYTES,
            connections: limits::CONNECTIONS,
            connections_per_address: limits::CONNECTIONS_PER_ADDRESS,
            connections_per_user: limits::CONNECTIONS_PER_USER,
            send_timeout_s: limits::SEND_S,
        }
    }
}

impl Default for Imap {
    fn default() -> Self {
        Self { idle_timeout_s: limits::IMAP_IDLE_S, login_timeout_s: limits::LOGIN_S }
    }
}

impl Default for Pop3 {
    fn default() -> Self {
        Self { idle_timeout_s: limits::POP3_IDLE_S, login_timeout_s: limits::LOGIN_S, marks_seen: true }
    }
}

impl Default for Lmtp {
    fn default() -> Self {
        Self { idle_timeout_s: limits::LMTP_IDLE_S, recipients: limits::RECIPIENTS }
    }
}

impl Default for Smtp {
    fn default() -> Self {
        Self { idle_timeout_s: limits::LMTP_IDLE_S, recipients: limits::RECIPIENTS }
    }
}

impl Default for Accounts {
    fn default() -> Self {
        let mailboxes = ["Drafts=drafts", "Sent=sent", "Junk=junk", "Trash=trash", "Archive=archive"];
        Self { mailboxes: mailboxes.iter().map(|text| text.parse().expect("a mailbox of our own")).collect() }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: Level::Info, format: LogFormat::Text }
    }
}

/// The system's name; what cannot be a domain would make bad greetings.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    let ok = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
    if ok { name.to_owned() } else { "localhost".to_owned() }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration {path}: {error}")]
    Read { path: String, error: std::io::Error },
    /// A key or value that is wrong, and where.
    #[error("{place}: {what}")]
    Key { place: String, what: String },
    #[error("--set takes KEY=VALUE, for example store.shards=4, and not {0:?}")]
    Set(String),
    #[error("accounts.mailboxes has {name:?}, but not {above:?} before it")]
    Level { name: String, above: String },
    #[error("delivery.postmaster names an account: {0}")]
    Postmaster(crate::accounts::NameError),
    #[error(
        "limits.in_flight_bytes is {in_flight}, and must be at least limits.message_bytes and 64 KB, {needed}: else the largest message \
         could never come in"
    )]
    InFlight { in_flight: u64, needed: u64 },
    #[error("the configuration key {key} is {value}, but must be {range}")]
    Range { key: &'static str, value: u64, range: &'static str },
}

/// Reads the file, if one is named, and sets the keys given as `KEY=VALUE`.
///
/// # Errors
/// The first key that is unknown, of the wrong type or out of its range, and where it stands.
pub fn load(file: Option<&Path>, set: &[String]) -> Result<Config, ConfigError> {
    let mut table = toml::Table::new();
    if let Some(path) = file {
        let place = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: place.clone(), error })?;
        let wrong = |error| wrong_key(&place, &text, &error);
        // For the errors: with their lines, which a table does not know any more.
        toml::from_str::<Config>(&text).map_err(wrong)?;
        table = toml::from_str(&text).map_err(wrong)?;
    }
    for assignment in set {
        let (key, value) = assignment.split_once('=').ok_or_else(|| ConfigError::Set(assignment.clone()))?;
        let (key, value) = (key.trim(), parse_value(value.trim()));
        let not_so = || ConfigError::Set(assignment.clone());
        let mut alone = toml::Table::new();
        insert(&mut alone, key, value.clone()).ok_or_else(not_so)?;
        let wrong = |error| wrong_key(&format!("--set {assignment}"), "", &error);
        alone.try_into::<Config>().map_err(wrong)?;
        insert(&mut table, key, value).ok_or_else(not_so)?;
    }
    let mut config: Config = table.try_into().map_err(|error| wrong_key("the configuration", "", &error))?;
    config.check()?;
    for (number, FirstMailbox(mailbox)) in config.accounts.mailboxes.iter().enumerate() {
        if let Some((above, _)) = mailbox.name.rsplit_once(SEPARATOR)
            && !config.accounts.mailboxes[..number].iter().any(|FirstMailbox(before)| before.name == above)
        {
            return Err(ConfigError::Level { name: mailbox.name.clone(), above: above.to_owned() });
        }
    }
    if let Some(postmaster) = &mut config.delivery.postmaster {
        *postmaster = crate::accounts::normalise(postmaster).map_err(ConfigError::Postmaster)?;
    }
    Ok(config)
}

/// Says what is wrong as people say it: the place with its line, and of an unknown key what it probably means.
fn wrong_key(place: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let line = error.span().and_then(|span| text.get(..span.start)).map(|before| before.matches('\n').count() + 1);
    let place = match line {
        Some(line) if !text.is_empty() => format!("{place}, line {line}"),
        _ => place.to_owned(),
    };
    ConfigError::Key { place, what: explain(error.message()).unwrap_or_else(|| error.message().to_owned()) }
}

/// The message of the parser about a field that it does not know, in our words.
fn explain(message: &str) -> Option<String> {
    let (unknown, expected) = message.strip_prefix("unknown field `")?.split_once("`, ")?;
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let nearest =
        known.iter().max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    let others = known.join(", ");
    Some(match nearest {
        Some(nearest) if strsim::jaro_winkler(unknown, nearest) > 0.7 => {
            format!("there is no key `{unknown}`; did you mean `{nearest}`? Known here: {others}")
        }
        _ => format!("there is no key `{unknown}`. Known here: {others}"),
    })
}

/// What is no TOML value is a string: `--set server.host_name=mail.example`.
fn parse_value(text: &str) -> toml::Value {
    let table: Result<toml::Table, _> = toml::from_str(&format!("value = {text}"));
    table.ok().and_then(|mut table| table.remove("value")).unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

fn insert(table: &mut toml::Table, key: &str, value: toml::Value) -> Option<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Some(())
        }
        Some((section, rest)) => {
            let section = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            insert(section.as_table_mut()?, rest, value)
        }
    }
}

impl Config {
    fn check(&self) -> Result<(), ConfigError> {
        const MB: u64 = 1 << 20;
        let checks: [(&'static str, Option<u64>, std::ops::RangeInclusive<u64>, &'static str); 27] = [
            ("limits.message_bytes", Some(self.limits.message_bytes), 64 << 10..=1 << 30, "64 KB to 1 GB"),
            (
                "limits.mailbox_messages",
                Some(self.limits.mailbox_messages.into()),
                1..=posthaste_engine::index::MESSAGES_MAX.into(),
                "1 to 10,000,000",
            ),
            ("limits.in_flight_bytes", Some(self.limits.in_flight_bytes), MB..=1 << 40, "1 MB to 1 TB"),
            ("limits.connections", Some(self.limits.connections as u64), 1..=10_000_000, "1 to 10,000,000"),
            (
                "limits.connections_per_address",
                Some(self.limits.connections_per_address as u64),
                1..=10_000_000,
                "1 to 10,000,000",
            ),
            (
                "limits.connections_per_user",
                Some(self.limits.connections_per_user as u64),
                1..=10_000_000,
                "1 to 10,000,000",
            ),
            ("limits.send_timeout_s", Some(self.limits.send_timeout_s), 1..=86_400, "1 s to a day"),
            ("imap.idle_timeout_s", Some(self.imap.idle_timeout_s), 1..=86_400, "1 s to a day"),
            ("imap.login_timeout_s", Some(self.imap.login_timeout_s), 1..=3_600, "1 s to an hour"),
            ("pop3.idle_timeout_s", Some(self.pop3.idle_timeout_s), 1..=86_400, "1 s to a day"),
            ("pop3.login_timeout_s", Some(self.pop3.login_timeout_s), 1..=3_600, "1 s to an hour"),
            ("lmtp.idle_timeout_s", Some(self.lmtp.idle_timeout_s), 1..=86_400, "1 s to a day"),
            ("lmtp.recipients", Some(self.lmtp.recipients as u64), 100..=100_000, "100 to 100,000"),
            ("smtp.idle_timeout_s", Some(self.smtp.idle_timeout_s), 1..=86_400, "1 s to a day"),
            ("smtp.recipients", Some(self.smtp.recipients as u64), 100..=100_000, "100 to 100,000"),
            ("server.workers", Some(self.server.workers as u64), 0..=1024, "0 (one per core) to 1024"),
            ("store.shards", self.store.shards.map(u64::from), 1..=SHARDS_MAX.into(), "1 to 1024"),
            ("store.segment_size_bytes", self.store.segment_size_bytes, MB..=16 << 30, "1 MB to 16 GB"),
            ("store.gather_us", self.store.gather_us, 0..=100_000, "0 to 100,000"),
            ("store.reserve_bytes", self.store.reserve_bytes, 0..=1 << 30, "0 (none) to 1 GB"),
            ("store.checkpoint_bytes", self.store.checkpoint_bytes, MB..=1 << 30, "1 MB to 1 GB"),
            ("store.train_after_bytes", self.store.train_after_bytes, 0..=1 << 40, "0 (never) to 1 TB"),
            ("store.compaction_run_bytes", self.store.compaction_run_bytes, MB..=16 << 30, "1 MB to 16 GB"),
            ("store.compaction_bytes_per_s", self.store.compaction_bytes_per_s, 0..=1 << 40, "0 (no limit) to 1 TB"),
            ("store.scrub_bytes_per_s", self.store.scrub_bytes_per_s, 0..=1 << 40, "0 (off) to 1 TB"),
            ("store.scrub_interval_s", self.store.scrub_interval_s, 60..=366 * 86_400, "a minute to a year"),
            ("store.read_timeout_s", self.store.read_timeout_s, 1..=3_600, "1 s to an hour"),
        ];
        for (key, value, range, text) in checks {
            if let Some(value) = value
                && !range.contains(&value)
            {
                return Err(ConfigError::Range { key, value, range: text });
            }
        }
        let (in_flight, needed) = (self.limits.in_flight_bytes, self.limits.message_bytes + (64 << 10));
        if in_flight < needed {
            return Err(ConfigError::InFlight { in_flight, needed });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(keys: &[&str]) -> Result<Config, String> {
        let keys: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
        load(None, &keys).map_err(|error| error.to_string())
    }

    #[test]
    fn single_keys_can_be_set() {
        let config = set(&["store.shards=4", "server.host_name=mail.example", "server.io = \"epoll\""]).unwrap();
        assert_eq!(config.store.shards, Some(4));
        assert_eq!(config.server.host_name, "mail.example");
        assert_eq!(config.server.io, Io::Epoll);
        let config = set(&["server.listen=[\"imap=127.0.0.1:0\"]"]).unwrap();
        assert_eq!(config.server.listen, ["imap=127.0.0.1:0".parse().unwrap()]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (keys, name) in [
            (["store.shard=4"], "no key `shard`; did you mean `shards`?"),
            (["storage.shards=4"], "no key `storage`; did you mean `store`?"),
            (["limits.zzz=4"], "no key `zzz`. Known here: message_bytes, "),
            (["store.shards=0"], "store.shards"),
            (["store.shards=many"], "string \"many\""),
            (["limits.message_bytes=1"], "limits.message_bytes"),
            (["store.shards.x=4"], "store.shards"),
            (["nothing"], "KEY=VALUE"),
            (["accounts.mailboxes=[\"a/b\"]"], "not \"a\" before it"),
            (["server.listen=[\"gopher=127.0.0.1:70\"]"], "gopher"),
        ] {
            let error = set(&keys).expect_err(keys[0]);
            assert!(error.contains(name), "{keys:?}: {error}");
        }
    }

    #[test]
    fn the_line_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("posthaste.toml");
        let error = |text: &str| {
            std::fs::write(&path, text).unwrap();
            load(Some(&path), &[]).map_err(|error| error.to_string()).unwrap_err()
        };
        let wrong = error("[server]\nworkers = 1\nhostname = \"x\"\n");
        assert!(
            wrong.contains("posthaste.toml, line 3: there is no key `hostname`; did you mean `host_name`?"),
            "{wrong}"
        );
        let wrong = error("[limits]\nmessage_bytes = \"many\"\n");
        assert!(wrong.contains("posthaste.toml, line 2: invalid type"), "{wrong}");
        let wrong = error("[limits\n");
        assert!(wrong.contains("posthaste.toml, line 1: "), "{wrong}");
        assert!(
            error("[limits]\nmessage_bytes = 1\n").contains("limits.message_bytes is 1, but must be 64 KB to 1 GB")
        );
    }

    #[test]
    fn every_key_is_documented() {
        let document = include_str!("../../../docs/configuration.md");
        for key in [
            "server.host_name",
            "server.listen",
            "server.workers",
            "server.io",
            "server.plaintext_auth",
            "limits.message_bytes",
            "limits.in_flight_bytes",
            "limits.mailbox_messages",
            "limits.connections",
            "limits.connections_per_address",
            "limits.connections_per_user",
            "limits.send_timeout_s",
            "imap.idle_timeout_s",
            "imap.login_timeout_s",
            "pop3.idle_timeout_s",
            "pop3.login_timeout_s",
            "pop3.marks_seen",
            "lmtp.idle_timeout_s",
            "lmtp.recipients",
            "smtp.idle_timeout_s",
            "smtp.recipients",
            "delivery.postmaster",
            "delivery.full_mailbox",
            "accounts.mailboxes",
            "store.shards",
            "store.segment_size_bytes",
            "store.checkpoint_bytes",
            "store.index_cache_bytes",
            "store.message_cache_bytes",
            "store.gather_us",
            "store.reserve_bytes",
            "store.train_after_bytes",
            "store.compaction",
            "store.compaction_run_bytes",
            "store.compaction_bytes_per_s",
            "store.scrub_bytes_per_s",
            "store.scrub_interval_s",
            "store.read_timeout_s",
            "tls.certificate",
            "tls.key",
            "tls.minimum_version",
            "log.level",
            "log.format",
        ] {
            assert!(document.contains(&format!("`{key}`")), "{key}");
        }
    }
}
