//! Searching.

use std::error::Error;
use std::sync::Arc;

use clap::{Args, ValueEnum};

use crate::drive::{self, Load, Seat};
use crate::fetch_data::set_len;
use crate::imap::{Client, ImapError, Response};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Search {
    #[command(flatten)]
    login: Login,
    /// The mailbox that each connection examines
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    /// What is searched for
    #[arg(long, value_enum, default_value = "flags")]
    kind: Kind,
    /// What is searched for in place of --kind, as IMAP writes it
    #[arg(long, value_name = "KEYS")]
    keys: Option<String>,
    /// Ask for the number of messages alone, RETURN (COUNT), if the server announces ESEARCH
    #[arg(long)]
    count: bool,
    /// --messages counts searches
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

/// What must be looked at for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Flags: UNSEEN UNFLAGGED
    Flags,
    /// The internal date: SINCE 1-Jan-2026
    Date,
    /// Sizes: LARGER 10000
    Size,
    /// A header field: SUBJECT "patch"
    Header,
    /// Header and body: TEXT "patch"
    Text,
    /// The body: BODY "patch"
    Body,
}

impl Kind {
    fn keys(self) -> &'static str {
        match self {
            Self::Flags => "UNSEEN UNFLAGGED",
            Self::Date => "SINCE 1-Jan-2026",
            Self::Size => "LARGER 10000",
            Self::Header => "SUBJECT \"patch\"",
            Self::Text => "TEXT \"patch\"",
            Self::Body => "BODY \"patch\"",
        }
    }
}

impl Search {
    fn keys(&self) -> &str {
        self.keys.as_deref().unwrap_or(self.kind.keys())
    }

    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("keys", self.keys().into());
        parameters.insert("count", self.count.into());
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("search", "searches", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

struct Opened {
    client: Client,
    line: String,
    exists: u32,
    expected: u64,
}

async fn connection(seat: Seat, plan: Arc<Search>, connector: Connector) {
    let open = async || {
        let mut client = plan.login.client(&connector, seat.index).await?;
        let by_count = plan.count && client.capabilities().await?.has("ESEARCH");
        let exists = client.select(&plan.mailbox, true).await?;
        let returns = if by_count { "RETURN (COUNT) " } else { "" };
        let keys = plan.keys();
        let line = format!("SEARCH {returns}{keys}");
        // What is found and what is not are all.
        let expected = search(&mut client, &line, exists).await?;
        let others = search(&mut client, &format!("SEARCH {returns}NOT ({keys})"), exists).await?;
        if expected + others != u64::from(exists) {
            let what = format!("{expected} found and {others} not, of {exists}");
            return Err(ImapError::Wrong("a search and its opposite are not all", what));
        }
        Ok(Opened { client, line, exists, expected })
    };
    let operation = async |opened: &mut Opened, _| {
        let found = search(&mut opened.client, &opened.line, opened.exists).await?;
        if found != opened.expected {
            let what = format!("{found} messages, {} before the run", opened.expected);
            return Err(ImapError::Wrong("a search found other messages", what));
        }
        let way = if opened.line.starts_with("SEARCH RETURN") { "by RETURN (COUNT)" } else { "by numbers" };
        Ok(Done::one(0).also("messages found", found).also(way, 1).also("messages searched", opened.exists.into()))
    };
    if let Some(opened) = repeat(&seat, &plan.load, open, operation).await {
        close(&plan.load, opened.client).await;
    }
}

/// How many messages are found.
///
/// # Errors
/// The connection; what the server says; or numbers that no message has or that come twice.
async fn search(client: &mut Client, line: &str, exists: u32) -> Result<u64, ImapError> {
    match answer(client, line, |_| Ok(())).await? {
        Answer::Count(count) if count > u64::from(exists) => {
            Err(ImapError::Wrong("more found than there are", format!("{count} of {exists}")))
        }
        Answer::Count(count) => Ok(count),
        Answer::Numbers(mut numbers) => {
            numbers.sort_unstable();
            let twice = numbers.windows(2).any(|pair| pair[0] == pair[1]);
            if twice || numbers.last().is_some_and(|&last| last > exists) {
                return Err(ImapError::Wrong("numbers of SEARCH that cannot be", format!("{line}, {exists} messages")));
            }
            Ok(numbers.len() as u64)
        }
    }
}

/// How many messages are found; other responses go to `untagged`.
///
/// # Errors
/// The connection; what the server says; or what `untagged` finds.
pub async fn search_with(
    client: &mut Client,
    line: &str,
    untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
) -> Result<u64, ImapError> {
    Ok(match answer(client, line, untagged).await? {
        Answer::Count(count) => count,
        Answer::Numbers(numbers) => numbers.len() as u64,
    })
}

async fn answer(
    client: &mut Client,
    line: &str,
    mut untagged: impl FnMut(&Response<'_>) -> Result<(), String>,
) -> Result<Answer, ImapError> {
    let mut found = None;
    client
        .command("SEARCH", line, |response| match numbers(response)? {
            None => untagged(response),
            answer => {
                found = answer;
                Ok(())
            }
        })
        .await?;
    found.ok_or_else(|| ImapError::Wrong("no SEARCH response", line.to_owned()))
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Count(u64),
    Numbers(Vec<u32>),
}

/// What a SEARCH (RFC 3501, 7.2.5) or ESEARCH (RFC 4731, 3.1) response says; `None` if it is neither.
fn numbers(response: &Response<'_>) -> Result<Option<Answer>, String> {
    let bad = || format!("{:?} is no answer to a search", response.text());
    let text = |bytes| str::from_utf8(bytes).map_err(|_| bad());
    if let Some(rest) = response.after("* ESEARCH") {
        let mut words = text(rest)?.split(' ');
        while let Some(word) = words.next() {
            if word.eq_ignore_ascii_case("COUNT") {
                let count = words.next().and_then(|digits| digits.parse().ok()).ok_or_else(bad)?;
                return Ok(Some(Answer::Count(count)));
            }
            if word.eq_ignore_ascii_case("ALL") {
                return Ok(Some(Answer::Count(set_len(words.next().unwrap_or_default())?)));
            }
        }
        return Err(bad());
    }
    let Some(rest) = response.after("* SEARCH") else { return Ok(None) };
    let words = text(rest)?.split_ascii_whitespace().take_while(|word| !word.starts_with('('));
    let numbers = words.map(|word| word.parse().ok().filter(|&number: &u32| number > 0).ok_or_else(bad));
    Ok(Some(Answer::Numbers(numbers.collect::<Result<_, _>>()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let read = |line: &str| numbers(&Response { bytes: line.as_bytes(), literals: &[] });
        assert_eq!(read("* SEARCH 2 5 3"), Ok(Some(Answer::Numbers(vec![2, 5, 3]))));
        assert_eq!(read("* SEARCH"), Ok(Some(Answer::Numbers(vec![]))));
        assert_eq!(read("* SEARCH 2 (MODSEQ 917)"), Ok(Some(Answer::Numbers(vec![2]))));
        assert_eq!(read("* ESEARCH (TAG \"b1\") COUNT 17"), Ok(Some(Answer::Count(17))));
        assert_eq!(read("* ESEARCH (TAG \"b1\") ALL 1:3,7"), Ok(Some(Answer::Count(4))));
        assert_eq!(read("* 3 EXISTS"), Ok(None));
        for line in ["* SEARCH 0", "* SEARCH x", "* ESEARCH (TAG \"b1\")", "* ESEARCH COUNT x"] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
