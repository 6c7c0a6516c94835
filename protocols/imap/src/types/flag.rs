//! Flags and keywords (RFC 9051, 2.3.2).

/// A flag that a client can set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flag {
    Answered,
    Flagged,
    Deleted,
    Seen,
    Draft,
    /// An atom, as the client spelt it. Keywords that differ in case only are one keyword; the mailbox keeps the first
    /// spelling.
    Keyword(String),
}

impl Flag {
    pub fn name(&self) -> &str {
        match self {
            Flag::Answered => "\\Answered",
            Flag::Flagged => "\\Flagged",
            Flag::Deleted => "\\Deleted",
            Flag::Seen => "\\Seen",
            Flag::Draft => "\\Draft",
            Flag::Keyword(name) => name,
        }
    }

    /// A system flag by its name without the backslash.
    pub(crate) fn system(name: &[u8]) -> Option<Self> {
        let all = [Flag::Answered, Flag::Flagged, Flag::Deleted, Flag::Seen, Flag::Draft];
        all.into_iter().find(|flag| flag.name().as_bytes()[1..].eq_ignore_ascii_case(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(Flag::system(b"sEEN"), Some(Flag::Seen));
        assert_eq!(Flag::system(b"Recent"), None);
        assert_eq!(Flag::Keyword("$Junk".into()).name(), "$Junk");
    }
}
