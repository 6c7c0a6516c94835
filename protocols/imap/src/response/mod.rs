//! Responses, appended to a `Vec<u8>` (RFC 3501, 7; RFC 9051, 7).
//!
//! Whatever a value holds, what goes out is one well-formed response: texts lose their line ends, and strings that do not
//! fit into quotes go out as literals.

mod fetch;
mod mailbox;
mod structure;
mod text;

pub use fetch::{FetchWriter, Paused, write_internal_date};
pub use mailbox::{
    ListAttribute, NamespaceEntry, SearchReturn, StatusItem, write_esearch, write_flags, write_list, write_lsub,
    write_namespace, write_search_end, write_search_numbers, write_search_start, write_status, write_vanished,
};

pub use structure::{write_body, write_body_structure, write_envelope};
pub use text::{write_astring, write_literal, write_nstring, write_number, write_sequence_set, write_string};

use std::borrow::Cow;

/// The condition of a status response (RFC 3501, 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    No,
    Bad,
    Bye,
    PreAuth,
}

impl Status {
    fn name(self) -> &'static [u8] {
        match self {
            Status::Ok => b"OK",
            Status::No => b"NO",
            Status::Bad => b"BAD",
            Status::Bye => b"BYE",
            Status::PreAuth => b"PREAUTH",
        }
    }
}

/// `resp-text-code` (RFC 9051, 9; RFC 5530; RFC 4315, 4; RFC 7162, 7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Code<'a> {
    Alert,
    AlreadyExists,
    AppendUid {
        uid_validity: u32,
        uids: Cow<'a, [(u32, u32)]>,
    },
    AuthenticationFailed,
    AuthorizationFailed,
    /// Lists the two charsets that are understood.
    BadCharset,
    Cannot,
    /// The capabilities, separated by spaces.
    Capability(Cow<'a, str>),
    ClientBug,
    Closed,
    ContactAdmin,
    /// Source and destination UIDs, as runs in the order of copying.
    CopyUid {
        uid_validity: u32,
        source: Cow<'a, [(u32, u32)]>,
        destination: Cow<'a, [(u32, u32)]>,
    },
    Corruption,
    Expired,
    ExpungeIssued,
    HasChildren,
    HighestModSeq(u64),
    InUse,
    Limit,
    /// `MAILBOXID` (RFC 8474, 4).
    MailboxId(Cow<'a, str>),
    /// Messages that failed UNCHANGEDSINCE: sequence numbers or UIDs, as the command had them.
    Modified(Cow<'a, [(u32, u32)]>),
    NoModSeq,
    NonExistent,
    NoPerm,
    NotSaved,
    OverQuota,
    Parse,
    /// Flags, separated by spaces.
    PermanentFlags(Cow<'a, str>),
    PrivacyRequired,
    ReadOnly,
    ReadWrite,
    ServerBug,
    TooBig,
    TryCreate,
    UidNext(u32),
    UidNotSticky,
    UidValidity(u32),
    Unavailable,
    UnknownCte,
    Unseen(u32),
    UseAttr,
}

impl Code<'_> {
    /// Appends the code without its brackets.
    pub fn write(&self, out: &mut Vec<u8>) {
        let number = |out: &mut Vec<u8>, name: &str, n: u64| {
            out.extend_from_slice(name.as_bytes());
            write_number(out, n);
        };
        let name = match self {
            Code::Alert => "ALERT",
            Code::AlreadyExists => "ALREADYEXISTS",
            Code::AuthenticationFailed => "AUTHENTICATIONFAILED",
            Code::AuthorizationFailed => "AUTHORIZATIONFAILED",
            Code::BadCharset => "BADCHARSET (US-ASCII UTF-8)",
            Code::Cannot => "CANNOT",
            Code::ClientBug => "CLIENTBUG",
            Code::Closed => "CLOSED",
            Code::ContactAdmin => "CONTACTADMIN",
            Code::Corruption => "CORRUPTION",
            Code::Expired => "EXPIRED",
            Code::ExpungeIssued => "EXPUNGEISSUED",
            Code::HasChildren => "HASCHILDREN",
            Code::InUse => "INUSE",
            Code::Limit => "LIMIT",
            Code::NoModSeq => "NOMODSEQ",
            Code::NonExistent => "NONEXISTENT",
            Code::NoPerm => "NOPERM",
            Code::NotSaved => "NOTSAVED",
            Code::OverQuota => "OVERQUOTA",
            Code::Parse => "PARSE",
            Code::PrivacyRequired => "PRIVACYREQUIRED",
            Code::ReadOnly => "READ-ONLY",
            Code::ReadWrite => "READ-WRITE",
            Code::ServerBug => "SERVERBUG",
            Code::TooBig => "TOOBIG",
            Code::TryCreate => "TRYCREATE",
            Code::UidNotSticky => "UIDNOTSTICKY",
            Code::Unavailable => "UNAVAILABLE",
            Code::UnknownCte => "UNKNOWN-CTE",
            Code::UseAttr => "USEATTR",
            Code::UidNext(n) => return number(out, "UIDNEXT ", u64::from(*n)),
            Code::UidValidity(n) => return number(out, "UIDVALIDITY ", u64::from(*n)),
            Code::Unseen(n) => return number(out, "UNSEEN ", u64::from(*n)),
            Code::HighestModSeq(n) => return number(out, "HIGHESTMODSEQ ", *n),
            Code::AppendUid { uid_validity, uids } => {
                number(out, "APPENDUID ", u64::from(*uid_validity));
                out.push(b' ');
                return write_sequence_set(out, uids.iter().copied());
            }
            Code::CopyUid { uid_validity, source, destination } => {
                number(out, "COPYUID ", u64::from(*uid_validity));
                out.push(b' ');
                write_sequence_set(out, source.iter().copied());
                out.push(b' ');
                return write_sequence_set(out, destination.iter().copied());
            }
            Code::Modified(set) => {
                out.extend_from_slice(b"MODIFIED ");
                return write_sequence_set(out, set.iter().copied());
            }
            Code::Capability(list) => return text::write_code_text(out, "CAPABILITY ", list),
            Code::MailboxId(id) => {
                text::write_code_text(out, "MAILBOXID (", id);
                out.push(b')');
                return;
            }
            Code::PermanentFlags(flags) => {
                text::write_code_text(out, "PERMANENTFLAGS (", flags);
                out.push(b')');
                return;
            }
        };
        out.extend_from_slice(name.as_bytes());
    }
}

/// A negative answer that a parser gives: the caller only has to send it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `None` where the command had no tag that could be repeated: the response is untagged then.
    pub tag: Option<String>,
    pub status: Status,
    pub code: Option<Code<'static>>,
    pub text: Cow<'static, str>,
}

impl Refusal {
    pub fn bad(tag: Option<String>, text: impl Into<Cow<'static, str>>) -> Self {
        Self { tag, status: Status::Bad, code: None, text: text.into() }
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        match &self.tag {
            Some(tag) => write_tagged(out, tag, self.status, self.code.as_ref(), &self.text),
            None => write_untagged(out, self.status, self.code.as_ref(), &self.text),
        }
    }
}

/// `response-tagged = tag SP resp-cond-state CRLF`
pub fn write_tagged(out: &mut Vec<u8>, tag: &str, status: Status, code: Option<&Code<'_>>, text: &str) {
    out.extend_from_slice(tag.as_bytes());
    out.push(b' ');
    write_condition(out, status, code, text);
}

/// `"*" SP (resp-cond-state / resp-cond-bye / resp-cond-auth) CRLF`
pub fn write_untagged(out: &mut Vec<u8>, status: Status, code: Option<&Code<'_>>, text: &str) {
    out.extend_from_slice(b"* ");
    write_condition(out, status, code, text);
}

/// `continue-req = "+" SP (resp-text / base64) CRLF`
pub fn write_continuation(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(b"+ ");
    if !text.is_empty() {
        text::write_text(out, text); // an empty SASL challenge is the space alone
    }
    out.extend_from_slice(b"\r\n");
}

/// `* CAPABILITY ...`, `* ENABLED ...`, or whatever else is a name and atoms: `* NAME` SP text.
pub fn write_untagged_text(out: &mut Vec<u8>, name: &str, text: &str) {
    out.extend_from_slice(b"* ");
    out.extend_from_slice(name.as_bytes());
    if !text.is_empty() {
        out.push(b' ');
        text::write_text(out, text);
    }
    out.extend_from_slice(b"\r\n");
}

/// `* n EXPUNGE`. There may be a million of them, so it is put together before it is appended.
pub fn write_expunge(out: &mut Vec<u8>, n: u32) {
    let mut response = *b"* xxxxxxxxxx EXPUNGE\r\n";
    let mut at = b"* xxxxxxxxxx".len();
    let mut left = n;
    loop {
        at -= 1;
        response[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    at -= 2;
    response[at..at + 2].copy_from_slice(b"* ");
    out.extend_from_slice(&response[at..]);
}

/// `* n EXISTS`, `* n RECENT`.
pub fn write_numbered(out: &mut Vec<u8>, n: u32, name: &str) {
    out.extend_from_slice(b"* ");
    write_number(out, u64::from(n));
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// `id_response ::= "ID" SPACE id_params_list` (RFC 2971, 4).
pub fn write_id(out: &mut Vec<u8>, fields: &[(&str, &str)]) {
    out.extend_from_slice(b"* ID ");
    if fields.is_empty() {
        out.extend_from_slice(b"NIL\r\n");
        return;
    }
    for (i, (name, value)) in fields.iter().enumerate() {
        out.push(if i == 0 { b'(' } else { b' ' });
        write_string(out, name.as_bytes());
        out.push(b' ');
        write_string(out, value.as_bytes());
    }
    out.extend_from_slice(b")\r\n");
}

/// `resp-cond-state = ("OK" / "NO" / "BAD") SP resp-text`, `resp-text = ["[" resp-text-code "]" SP] text`
fn write_condition(out: &mut Vec<u8>, status: Status, code: Option<&Code<'_>>, text: &str) {
    out.extend_from_slice(status.name());
    out.push(b' ');
    if let Some(code) = code {
        out.push(b'[');
        code.write(out);
        out.extend_from_slice(b"] ");
    }
    text::write_text(out, text);
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(code: Code<'_>) -> String {
        let mut out = Vec::new();
        write_tagged(&mut out, "a1", Status::Ok, Some(&code), "done");
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn codes() {
        assert_eq!(tagged(Code::ReadWrite), "a1 OK [READ-WRITE] done\r\n");
        assert_eq!(tagged(Code::UidNext(u32::MAX)), "a1 OK [UIDNEXT 4294967295] done\r\n");
        assert_eq!(
            tagged(Code::CopyUid {
                uid_validity: 38505,
                source: Cow::Borrowed(&[(304, 304), (319, 320)]),
                destination: Cow::Borrowed(&[(3956, 3958)])
            }),
            "a1 OK [COPYUID 38505 304,319:320 3956:3958] done\r\n"
        );
        assert_eq!(tagged(Code::PermanentFlags("\\Seen \\*".into())), "a1 OK [PERMANENTFLAGS (\\Seen \\*)] done\r\n");
        assert_eq!(tagged(Code::Modified(Cow::Borrowed(&[(7, 7), (9, 9)]))), "a1 OK [MODIFIED 7,9] done\r\n");
    }

    #[test]
    fn numbered() {
        let mut out = Vec::new();
        write_numbered(&mut out, 0, "EXISTS");
        [1, 90, u32::MAX].into_iter().for_each(|n| write_expunge(&mut out, n));
        assert_eq!(out, b"* 0 EXISTS\r\n* 1 EXPUNGE\r\n* 90 EXPUNGE\r\n* 4294967295 EXPUNGE\r\n");
    }

    #[test]
    fn text_cannot_forge_a_response() {
        let mut out = Vec::new();
        write_untagged(&mut out, Status::No, None, "a\r\nb1 OK [X] é");
        assert_eq!(out, b"* NO a  b1 OK [X] ??\r\n");
        out.clear();
        write_untagged(&mut out, Status::Ok, None, "");
        assert_eq!(out, b"* OK -\r\n", "text is at least one character");
        out.clear();
        write_continuation(&mut out, "");
        assert_eq!(out, b"+ \r\n");
    }

    #[test]
    fn id() {
        let mut out = Vec::new();
        write_id(&mut out, &[]);
        write_id(&mut out, &[("name", "Posthaste"), ("version", "\"1\"")]);
        assert_eq!(out, b"* ID NIL\r\n* ID (\"name\" \"Posthaste\" \"version\" \"\\\"1\\\"\")\r\n");
    }
}
