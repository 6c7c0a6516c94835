//! Special uses of mailboxes (RFC 6154, 2; RFC 8457): what they are called, and their bits in the store.

use std::str::FromStr;

use posthaste_engine::mailboxes::{NewMailbox, normalise_name};
use posthaste_imap::response::ListAttribute;
use serde::Deserialize;

/// The bits are written to disk: never renumber them.
pub const SPECIAL_USES: [(u16, &str, ListAttribute); 8] = [
    (1, "All", ListAttribute::All),
    (2, "Archive", ListAttribute::Archive),
    (4, "Drafts", ListAttribute::Drafts),
    (8, "Flagged", ListAttribute::Flagged),
    (16, "Junk", ListAttribute::Junk),
    (32, "Sent", ListAttribute::Sent),
    (64, "Trash", ListAttribute::Trash),
    (128, "Important", ListAttribute::Important),
];

/// The bit of a special use, by its name in any case, without the backslash.
pub fn bit_of(name: &str) -> Option<u16> {
    SPECIAL_USES.iter().find(|(_, known, _)| known.eq_ignore_ascii_case(name)).map(|(bit, _, _)| *bit)
}

/// A mailbox of a new account: `NAME` or `NAME=USE`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct FirstMailbox(pub NewMailbox);

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FirstMailboxError {
    #[error("a mailbox of a new account is NAME or NAME=USE, for example Sent=sent; the name in {0:?} cannot be: {1}")]
    Name(String, String),
    #[error("{0:?} is no special use: there are all, archive, drafts, flagged, junk, sent, trash and important")]
    Use(String),
}

impl FromStr for FirstMailbox {
    type Err = FirstMailboxError;

    fn from_str(text: &str) -> Result<Self, FirstMailboxError> {
        let (name, special_use) = match text.rsplit_once('=') {
            None => (text, 0),
            Some((name, special_use)) => {
                let special_use = special_use.trim();
                (name, bit_of(special_use).ok_or_else(|| FirstMailboxError::Use(special_use.to_owned()))?)
            }
        };
        let name = normalise_name(name.trim())
            .map_err(|refusal| FirstMailboxError::Name(text.to_owned(), refusal.to_string()))?;
        Ok(Self(NewMailbox { name, special_use }))
    }
}

impl TryFrom<String> for FirstMailbox {
    type Error = FirstMailboxError;

    fn try_from(text: String) -> Result<Self, FirstMailboxError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_mailboxes() {
        let parse = |text: &str| text.parse::<FirstMailbox>().map(|first| (first.0.name, first.0.special_use));
        assert_eq!(parse("Sent=SENT"), Ok(("Sent".to_owned(), 32)));
        assert_eq!(parse("Archive/2026 = archive"), Ok(("Archive/2026".to_owned(), 2)));
        assert_eq!(parse("Notes"), Ok(("Notes".to_owned(), 0)));
        assert!(parse("Sent=out").is_err_and(|error| error.to_string().contains("no special use")));
        assert!(parse("=sent").is_err_and(|error| error.to_string().contains("empty")));
        assert!(parse("a//b").is_err());
    }
}
