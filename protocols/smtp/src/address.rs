//! Paths and mailboxes of the envelope (RFC 5321, 4.1.2 and 4.1.3; RFC 6531, 3.3).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Longest local part of a recipient (RFC 5321, 4.5.3.1.1).
const LOCAL_PART_BYTES_MAX: usize = 64;
/// Longest domain (RFC 5321, 4.5.3.1.2).
const DOMAIN_BYTES_MAX: usize = 255;
/// Longest path with its punctuation (RFC 5321, 4.5.3.1.3), the source route left out.
const PATH_BYTES_MAX: usize = 256;

/// A mailbox of the envelope, local part unquoted.
///
/// All quoted forms of a local part are one mailbox (RFC 5321, 4.1.2), so only the unquoted form is kept; `Display`
/// quotes again where that is needed. No control character is ever in it, and it is valid UTF-8.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Mailbox {
    /// Local part and domain, one after the other: one allocation per recipient.
    text: Box<str>,
    local_bytes: u16,
}

/// `Reverse-path = Path / "<>"`: `None` is the null sender of a delivery status notification.
pub type ReversePath = Option<Mailbox>;

/// Why a path was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("path must begin with <")]
    NoOpeningBracket,
    #[error("path must end with >")]
    NoClosingBracket,
    #[error("empty path")]
    Empty,
    #[error("bad local part")]
    LocalPart,
    #[error("domain missing")]
    DomainMissing,
    #[error("bad domain")]
    Domain,
    #[error("bad address literal")]
    AddressLiteral,
    #[error("bad source route")]
    SourceRoute,
    #[error("path too long")]
    TooLong,
}

/// Whose path it is decides what is allowed in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathKind {
    /// MAIL FROM: `<>` is allowed. The local part may fill the path: signed bounce addresses exceed 64 octets in
    /// real traffic, and RFC 5321, 4.5.3.1 asks to impose no limit where that is possible.
    Reverse,
    /// RCPT TO: a local part alone is allowed, because delivery agents hand over plain mailbox names, and
    /// `<Postmaster>` must be (RFC 5321, 4.1.1.3). Whether such a name exists is for the directory to say.
    Forward,
}

impl Mailbox {
    /// The local part, unquoted. May be empty, and may hold any printable character and spaces.
    pub fn local_part(&self) -> &str {
        &self.text[..usize::from(self.local_bytes)]
    }

    /// The domain or address literal as the client wrote it; empty if it gave a local part alone.
    pub fn domain(&self) -> &str {
        &self.text[usize::from(self.local_bytes)..]
    }

    pub fn is_ascii(&self) -> bool {
        self.text.is_ascii()
    }

    /// Parses `Mailbox = Local-part "@" ( Domain / address-literal )`, or a local part alone, without brackets.
    ///
    /// # Errors
    /// The first part of it that is not well formed.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let (mailbox, rest) = parse_mailbox(text, PathKind::Forward)?;
        if rest.is_empty() { Ok(mailbox) } else { Err(PathError::LocalPart) }
    }
}

impl fmt::Display for Mailbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let local = self.local_part();
        if is_dot_string(local) {
            f.write_str(local)?;
        } else {
            f.write_str("\"")?;
            for c in local.chars() {
                if matches!(c, '"' | '\\') {
                    f.write_str("\\")?;
                }
                write!(f, "{c}")?;
            }
            f.write_str("\"")?;
        }
        if self.domain().is_empty() { Ok(()) } else { write!(f, "@{}", self.domain()) }
    }
}

/// `Path = "<" [ A-d-l ":" ] Mailbox ">"`. Gives the mailbox, `None` for `<>`, and what follows the path.
///
/// The caller has made sure that `input` holds no control characters.
pub(crate) fn parse_path(input: &str, kind: PathKind) -> Result<(Option<Mailbox>, &str), PathError> {
    let inner = input.strip_prefix('<').ok_or(PathError::NoOpeningBracket)?;
    if let Some(rest) = inner.strip_prefix('>') {
        return match kind {
            PathKind::Reverse => Ok((None, rest)),
            PathKind::Forward => Err(PathError::Empty),
        };
    }
    let inner = skip_source_route(inner)?;
    let (mailbox, rest) = parse_mailbox(inner, kind)?;
    if kind == PathKind::Reverse && mailbox.domain().is_empty() {
        return Err(PathError::DomainMissing);
    }
    let after = rest.strip_prefix('>').ok_or(PathError::NoClosingBracket)?;
    if 2 + inner.len() - rest.len() > PATH_BYTES_MAX {
        return Err(PathError::TooLong);
    }
    Ok((Some(mailbox), after))
}

/// `A-d-l = At-domain *( "," At-domain )`: must be accepted and should be ignored (RFC 5321, 4.1.2).
fn skip_source_route(mut input: &str) -> Result<&str, PathError> {
    while let Some(rest) = input.strip_prefix('@') {
        let end = rest.find([',', ':']).ok_or(PathError::SourceRoute)?;
        check_domain(&rest[..end]).map_err(|_| PathError::SourceRoute)?;
        input = &rest[end + 1..];
        let more = rest.as_bytes()[end] == b',';
        if !more {
            // A second route after the colon is no path.
            return if input.starts_with('@') { Err(PathError::SourceRoute) } else { Ok(input) };
        }
        if !input.starts_with('@') {
            return Err(PathError::SourceRoute);
        }
    }
    Ok(input)
}

fn parse_mailbox(input: &str, kind: PathKind) -> Result<(Mailbox, &str), PathError> {
    let (mut text, rest) = parse_local_part(input)?;
    let local_bytes = input.len() - rest.len();
    if local_bytes > PATH_BYTES_MAX || (kind == PathKind::Forward && local_bytes > LOCAL_PART_BYTES_MAX) {
        return Err(PathError::TooLong);
    }
    let local_bytes = text.len() as u16; // at most PATH_BYTES_MAX
    let Some(rest) = rest.strip_prefix('@') else {
        return Ok((Mailbox { text: text.into_boxed_str(), local_bytes }, rest));
    };
    let end = if rest.starts_with('[') {
        let end = rest.find(']').ok_or(PathError::AddressLiteral)? + 1;
        check_address_literal(&rest[1..end - 1])?;
        end
    } else {
        let end = rest.find('>').unwrap_or(rest.len());
        check_domain(&rest[..end])?;
        end
    };
    text.push_str(&rest[..end]);
    Ok((Mailbox { text: text.into_boxed_str(), local_bytes }, &rest[end..]))
}

/// `Local-part = Dot-string / Quoted-string`. Gives it unquoted, with room for a domain.
fn parse_local_part(input: &str) -> Result<(String, &str), PathError> {
    let mut text = String::with_capacity(input.len().min(PATH_BYTES_MAX));
    let Some(quoted) = input.strip_prefix('"') else {
        let end = input.find(['@', '>']).unwrap_or(input.len());
        if !is_dot_string(&input[..end]) {
            return Err(PathError::LocalPart);
        }
        text.push_str(&input[..end]);
        return Ok((text, &input[end..]));
    };
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((text, &quoted[at + 1..])),
            // quoted-pairSMTP = %d92 %d32-126
            '\\' => match chars.next() {
                Some((_, pair @ ' '..='~')) => text.push(pair),
                _ => return Err(PathError::LocalPart),
            },
            c if c.is_control() => return Err(PathError::LocalPart),
            c => text.push(c),
        }
    }
    Err(PathError::LocalPart)
}

/// `Dot-string = Atom *("." Atom)`, with UTF8-non-ascii as atext (RFC 6531, 3.3).
pub(crate) fn is_dot_string(text: &str) -> bool {
    text.split('.').all(|atom| {
        !atom.is_empty()
            && atom.chars().all(|c| match c {
                'a'..='z' | 'A'..='Z' | '0'..='9' => true,
                '!' | '#' | '$' | '%' | '&' | '\'' | '*' | '+' | '-' | '/' | '=' | '?' | '^' | '_' | '`' | '{'
                | '|' | '}' | '~' => true,
                // C1 controls are no graphics; nothing that displays needs them.
                c => !c.is_ascii() && !c.is_control(),
            })
    })
}

/// `Domain = sub-domain *("." sub-domain)`, `sub-domain = Let-dig [Ldh-str] / U-label`.
pub(crate) fn check_domain(domain: &str) -> Result<(), PathError> {
    if domain.len() > DOMAIN_BYTES_MAX {
        return Err(PathError::TooLong);
    }
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || is_u_label_char(c))
    };
    if domain.split('.').all(is_label) { Ok(()) } else { Err(PathError::Domain) }
}

/// U-labels hold letters, marks and joiners of all scripts (RFC 5892); whether one can be registered is not decided here.
fn is_u_label_char(c: char) -> bool {
    !c.is_ascii() && !c.is_control() && !c.is_whitespace()
}

/// The inside of `address-literal = "[" ( IPv4 / IPv6 / General ) "]"` (RFC 5321, 4.1.3).
pub(crate) fn check_address_literal(inner: &str) -> Result<(), PathError> {
    const IPV6_TAG: &str = "IPv6:";
    let ok = if inner.len() > DOMAIN_BYTES_MAX {
        return Err(PathError::TooLong);
    } else if inner.get(..IPV6_TAG.len()).is_some_and(|tag| tag.eq_ignore_ascii_case(IPV6_TAG)) {
        inner[IPV6_TAG.len()..].parse::<Ipv6Addr>().is_ok()
    } else if let Some((tag, content)) = inner.split_once(':') {
        // General-address-literal = Standardized-tag ":" 1*dcontent
        let ldh = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        let dcontent = |b: u8| matches!(b, 33..=90 | 94..=126);
        !tag.is_empty()
            && tag.bytes().all(ldh)
            && !tag.ends_with('-')
            && !content.is_empty()
            && content.bytes().all(dcontent)
    } else {
        inner.parse::<Ipv4Addr>().is_ok()
    };
    if ok { Ok(()) } else { Err(PathError::AddressLiteral) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn forward(input: &str) -> Result<String, PathError> {
        parse_path(input, PathKind::Forward).map(|(mailbox, rest)| format!("{}|{rest}", mailbox.unwrap()))
    }

    #[test]
    fn well_formed_paths() {
        assert_eq!(forward("<a@b.example>"), Ok("a@b.example|".into()));
        assert_eq!(forward("<a.b+c@b.example> X=1"), Ok("a.b+c@b.example| X=1".into()));
        assert_eq!(forward("<\"a b\\\"c\"@b>"), Ok("\"a b\\\"c\"@b|".into()));
        assert_eq!(forward("<\"a\\b\">"), Ok("ab|".into()), "quoting that was not needed goes away");
        assert_eq!(forward("<\"a>@b\"@c>"), Ok("\"a>@b\"@c|".into()));
        assert_eq!(forward("<Postmaster>"), Ok("Postmaster|".into()));
        assert_eq!(forward("<a@[127.0.0.1]>"), Ok("a@[127.0.0.1]|".into()));
        assert_eq!(forward("<a@[IPv6:::1]>"), Ok("a@[IPv6:::1]|".into()));
        assert_eq!(forward("<a@[x-tag:abc]>"), Ok("a@[x-tag:abc]|".into()));
        assert_eq!(forward("<用户@例子.测试>"), Ok("用户@例子.测试|".into()));
    }

    #[test]
    fn source_routes_are_dropped() {
        assert_eq!(forward("<@a.example,@b.example:c@d>"), Ok("c@d|".into()));
        for bad in ["<@a c@d>", "<@a,b:c@d>", "<@:c@d>", "<@a:@b:c@d>", "<@a"] {
            assert_eq!(forward(bad), Err(PathError::SourceRoute), "{bad}");
        }
    }

    #[test]
    fn ill_formed_paths() {
        use PathError as E;
        for (bad, error) in [
            ("a@b", E::NoOpeningBracket),
            ("<a@b", E::NoClosingBracket),
            ("<>", E::Empty),
            ("<a b@c>", E::LocalPart),
            ("<.a@c>", E::LocalPart),
            ("<a..b@c>", E::LocalPart),
            ("<\"a@c>", E::LocalPart),
            ("<\"a\\", E::LocalPart),
            ("<\"a\"b@c>", E::NoClosingBracket),
            ("<a@>", E::Domain),
            ("<a@-b>", E::Domain),
            ("<a@b_c>", E::Domain),
            ("<a@b.>", E::Domain),
            ("<a@b@c>", E::Domain),
            ("<a@[1.2.3]>", E::AddressLiteral),
            ("<a@[1.2.3.4>", E::AddressLiteral),
            ("<a@[IPv6:zz]>", E::AddressLiteral),
            ("<a@[1.2.3.4]x>", E::NoClosingBracket),
        ] {
            assert_eq!(forward(bad), Err(error), "{bad}");
        }
    }

    /// Trap 43: this very path crashed another LMTP server. It is well formed; no such user exists.
    #[test]
    fn trap_43_empty_quoted_local_part() {
        assert_eq!(forward("<\"\"@x>"), Ok("\"\"@x|".into()));
        let (mailbox, _) = parse_path("<\"\"@x>", PathKind::Forward).unwrap();
        assert_eq!(mailbox.unwrap().local_part(), "");
    }

    #[test]
    fn null_sender_only_in_mail() {
        assert_eq!(parse_path("<> A", PathKind::Reverse), Ok((None, " A")));
        assert_eq!(parse_path("<a>", PathKind::Reverse), Err(PathError::DomainMissing));
    }

    #[test]
    fn length_limits() {
        let local = |n: usize| format!("<{}@b>", "a".repeat(n));
        assert!(forward(&local(64)).is_ok());
        assert_eq!(forward(&local(65)), Err(PathError::TooLong));
        assert!(parse_path(&local(252), PathKind::Reverse).is_ok());
        assert_eq!(parse_path(&local(253), PathKind::Reverse), Err(PathError::TooLong));
        assert_eq!(forward(&format!("<a@{}>", "b".repeat(256))), Err(PathError::TooLong));
    }

    proptest! {
        #[test]
        fn never_panics(input in "\\PC{0,80}") {
            let _ = parse_path(&input, PathKind::Forward);
            let _ = parse_path(&format!("<{input}>"), PathKind::Reverse);
        }

        /// What is displayed parses to the same mailbox.
        #[test]
        fn display_round_trip(local in "[ -~é]{0,20}", domain in "[a-z]{1,8}(\\.[a-z0-9]{1,5}){0,3}") {
            let quoted: String = local.chars().flat_map(|c| {
                let escape = matches!(c, '"' | '\\').then_some('\\');
                escape.into_iter().chain([c])
            }).collect();
            let path = format!("<\"{quoted}\"@{domain}>");
            let (mailbox, rest) = parse_path(&path, PathKind::Forward).unwrap();
            let mailbox = mailbox.unwrap();
            prop_assert_eq!(rest, "");
            prop_assert_eq!(mailbox.local_part(), &local);
            prop_assert_eq!(mailbox.domain(), &domain);
            let again = parse_path(&format!("<{mailbox}>"), PathKind::Forward).unwrap().0.unwrap();
            prop_assert_eq!(again, mailbox);
        }
    }
}
