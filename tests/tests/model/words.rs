//! The words of the engine in those of the model, and the other way round.

use std::collections::BTreeSet;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::FlagName;
use posthaste_engine::error::{EngineError, Refusal};
use posthaste_engine::flags::{Flags as FlagBits, UidSet};
use posthaste_tests::model::{Flags, How, Reasons, Refused};

use crate::ops::FLAGS;

pub type Outcome<T> = Result<T, String>;

pub fn said(error: EngineError) -> String {
    format!("the engine failed: {error}")
}

pub fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Outcome<()> {
    if found == expected { Ok(()) } else { Err(format!("{what}: found {found:?}, expected {expected:?}")) }
}

/// Takes a refusal for a value.
pub fn refusal<T>(result: Result<T, EngineError>) -> Outcome<Result<T, Refused>> {
    let refusal = match result {
        Ok(value) => return Ok(Ok(value)),
        Err(EngineError::Refused(refusal)) => refusal,
        Err(error) => return Err(said(error)),
    };
    Ok(Err(match refusal {
        Refusal::BadName(_) => Refused::BadName,
        Refusal::MailboxExists => Refused::MailboxExists,
        Refusal::NoSuchMailbox => Refused::NoSuchMailbox,
        Refusal::InboxStays => Refused::InboxStays,
        Refusal::IntoItself => Refused::IntoItself,
        Refusal::TooManyKeywords(_) => Refused::TooManyKeywords,
        other => return Err(format!("refused for a reason that nobody gave: {other}")),
    }))
}

pub fn agree<T>(what: &str, result: Result<T, EngineError>, reasons: &Reasons) -> Outcome<()> {
    match refusal(result)? {
        Ok(_) => expect(what, &Reasons::new(), reasons),
        Err(reason) if reasons.contains(&reason) => Ok(()),
        Err(reason) => Err(format!("{what}: refused for {reason:?}, expected {reasons:?}")),
    }
}

pub fn to_engine(names: &[String]) -> Vec<FlagName> {
    let name = |name: &String| match name.as_str() {
        "\\Seen" => FlagName::Seen,
        "\\Answered" => FlagName::Answered,
        "\\Flagged" => FlagName::Flagged,
        "\\Deleted" => FlagName::Deleted,
        "\\Draft" => FlagName::Draft,
        keyword => FlagName::Keyword(keyword.to_owned()),
    };
    names.iter().map(name).collect()
}

pub fn to_model(bits: FlagBits, keywords: &[String]) -> Flags {
    let name = |bit| match bit {
        0..5 => FLAGS[bit].to_owned(),
        _ => keywords.get(bit - 8).cloned().unwrap_or_else(|| format!("keyword {} without a name", bit - 8)),
    };
    bits.bits().map(name).collect()
}

pub fn flag_op(how: How) -> FlagOp {
    match how {
        How::Add => FlagOp::Add,
        How::Remove => FlagOp::Remove,
        How::Replace => FlagOp::Replace,
    }
}

pub fn uid_set(uids: &UidSet) -> BTreeSet<u32> {
    uids.iter().map(|uid| uid.0).collect()
}

pub const HEADER: &str = "From: a@example.org\r\nSubject: a message\r\n\r\n";

/// Everything but the prefix.
pub fn rest_of(token: u64, lines: u16) -> Vec<u8> {
    let mut rest = format!("{HEADER}token {token}\r\n").into_bytes();
    for line in 0..u64::from(lines) {
        rest.extend_from_slice(format!("{line} {}\r\n", line.wrapping_mul(token)).as_bytes());
    }
    rest
}
