//! Responses about mailboxes: LIST, LSUB, STATUS, FLAGS, SEARCH, ESEARCH, NAMESPACE, VANISHED.

use super::text::{write_astring, write_number, write_sequence_set, write_string};
use crate::types::MailboxName;

/// Attributes of a LIST response (RFC 9051, 7.3.1; RFC 6154, 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListAttribute {
    NonExistent,
    NoInferiors,
    NoSelect,
    HasChildren,
    HasNoChildren,
    Marked,
    Unmarked,
    Subscribed,
    Remote,
    All,
    Archive,
    Drafts,
    Flagged,
    Important,
    Junk,
    Sent,
    Trash,
}

impl ListAttribute {
    pub fn name(self) -> &'static str {
        match self {
            ListAttribute::NonExistent => "\\NonExistent",
            ListAttribute::NoInferiors => "\\Noinferiors",
            ListAttribute::NoSelect => "\\Noselect",
            ListAttribute::HasChildren => "\\HasChildren",
            ListAttribute::HasNoChildren => "\\HasNoChildren",
            ListAttribute::Marked => "\\Marked",
            ListAttribute::Unmarked => "\\Unmarked",
            ListAttribute::Subscribed => "\\Subscribed",
            ListAttribute::Remote => "\\Remote",
            ListAttribute::All => "\\All",
            ListAttribute::Archive => "\\Archive",
            ListAttribute::Drafts => "\\Drafts",
            ListAttribute::Flagged => "\\Flagged",
            ListAttribute::Important => "\\Important",
            ListAttribute::Junk => "\\Junk",
            ListAttribute::Sent => "\\Sent",
            ListAttribute::Trash => "\\Trash",
        }
    }
}

/// `"LIST" SP mailbox-list`. `utf8` after ENABLE IMAP4rev2 or UTF8=ACCEPT.
pub fn write_list(
    out: &mut Vec<u8>,
    attributes: &[ListAttribute],
    delimiter: Option<char>,
    name: &MailboxName,
    utf8: bool,
) {
    write_mailbox_list(out, b"* LIST (", attributes, delimiter, name, utf8);
}

/// `"LSUB" SP mailbox-list` (RFC 3501, 7.2.3).
pub fn write_lsub(
    out: &mut Vec<u8>,
    attributes: &[ListAttribute],
    delimiter: Option<char>,
    name: &MailboxName,
    utf8: bool,
) {
    write_mailbox_list(out, b"* LSUB (", attributes, delimiter, name, utf8);
}

/// `mailbox-list = "(" [mbx-list-flags] ")" SP (DQUOTE QUOTED-CHAR DQUOTE / nil) SP mailbox`
fn write_mailbox_list(
    out: &mut Vec<u8>,
    start: &[u8],
    attributes: &[ListAttribute],
    delimiter: Option<char>,
    name: &MailboxName,
    utf8: bool,
) {
    out.extend_from_slice(start);
    for (i, attribute) in attributes.iter().enumerate() {
        if i > 0 {
            out.push(b' ');
        }
        out.extend_from_slice(attribute.name().as_bytes());
    }
    out.extend_from_slice(b") ");
    write_delimiter(out, delimiter);
    out.push(b' ');
    write_mailbox(out, name, utf8);
    out.extend_from_slice(b"\r\n");
}

fn write_delimiter(out: &mut Vec<u8>, delimiter: Option<char>) {
    match delimiter {
        Some(delimiter) => write_string(out, delimiter.encode_utf8(&mut [0; 4]).as_bytes()),
        None => out.extend_from_slice(b"NIL"),
    }
}

/// `mailbox = "INBOX" / astring`: modified UTF-7 (RFC 3501, 5.1.3), or UTF-8 in quotes (RFC 9051, 5.1).
pub(super) fn write_mailbox(out: &mut Vec<u8>, name: &MailboxName, utf8: bool) {
    if !utf8 {
        return write_astring(out, name.to_utf7().as_bytes());
    }
    if name.as_str().is_ascii() {
        return write_astring(out, name.as_str().as_bytes());
    }
    out.push(b'"');
    for &b in name.as_str().as_bytes() {
        if matches!(b, b'"' | b'\\') {
            out.push(b'\\');
        }
        out.push(b); // a name holds no control characters
    }
    out.push(b'"');
}

/// `status-att-val` (RFC 9051, 9; RFC 7162, 7; RFC 8474, 4.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusItem<'a> {
    Messages(u32),
    Recent(u32),
    UidNext(u32),
    UidValidity(u32),
    Unseen(u32),
    Deleted(u32),
    Size(u64),
    HighestModSeq(u64),
    AppendLimit(u64),
    MailboxId(&'a str),
}

/// `"STATUS" SP mailbox SP "(" [status-att-list] ")"`
pub fn write_status(out: &mut Vec<u8>, name: &MailboxName, items: &[StatusItem<'_>], utf8: bool) {
    out.extend_from_slice(b"* STATUS ");
    write_mailbox(out, name, utf8);
    out.extend_from_slice(b" (");
    for (i, item) in items.iter().enumerate() {
        if i > 0 {
            out.push(b' ');
        }
        let (label, value) = match *item {
            StatusItem::Messages(n) => ("MESSAGES ", u64::from(n)),
            StatusItem::Recent(n) => ("RECENT ", u64::from(n)),
            StatusItem::UidNext(n) => ("UIDNEXT ", u64::from(n)),
            StatusItem::UidValidity(n) => ("UIDVALIDITY ", u64::from(n)),
            StatusItem::Unseen(n) => ("UNSEEN ", u64::from(n)),
            StatusItem::Deleted(n) => ("DELETED ", u64::from(n)),
            StatusItem::Size(n) => ("SIZE ", n),
            StatusItem::HighestModSeq(n) => ("HIGHESTMODSEQ ", n),
            StatusItem::AppendLimit(n) => ("APPENDLIMIT ", n),
            StatusItem::MailboxId(id) => {
                out.extend_from_slice(b"MAILBOXID (");
                out.extend_from_slice(id.as_bytes());
                out.push(b')');
                continue;
            }
        };
        out.extend_from_slice(label.as_bytes());
        write_number(out, value);
    }
    out.extend_from_slice(b")\r\n");
}

/// `"FLAGS" SP flag-list`; the flags separated by spaces.
pub fn write_flags(out: &mut Vec<u8>, flags: &str) {
    out.extend_from_slice(b"* FLAGS (");
    out.extend_from_slice(flags.as_bytes());
    out.extend_from_slice(b")\r\n");
}

/// `"SEARCH" *(SP nz-number) [SP search-sort-mod-seq]`, begun; any number of [`write_search_numbers`] follow, and
/// [`write_search_end`].
pub fn write_search_start(out: &mut Vec<u8>) {
    out.extend_from_slice(b"* SEARCH");
}

pub fn write_search_numbers(out: &mut Vec<u8>, found: impl IntoIterator<Item = u32>) {
    for n in found {
        out.push(b' ');
        write_number(out, u64::from(n));
    }
}

/// `mod_seq` if the search had MODSEQ and found something (RFC 7162, 3.1.5).
pub fn write_search_end(out: &mut Vec<u8>, mod_seq: Option<u64>) {
    if let Some(mod_seq) = mod_seq {
        out.extend_from_slice(b" (MODSEQ ");
        write_number(out, mod_seq);
        out.push(b')');
    }
    out.extend_from_slice(b"\r\n");
}

/// `search-return-data` (RFC 9051, 9; RFC 4731, 3.1; RFC 7162, 3.1.10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SearchReturn<'a> {
    Min(u32),
    Max(u32),
    Count(u32),
    /// Not for an empty result: ALL is left out then.
    All(&'a [(u32, u32)]),
    ModSeq(u64),
}

/// `esearch-response = "ESEARCH" [search-correlator] [SP "UID"] *(SP search-return-data)`
pub fn write_esearch(out: &mut Vec<u8>, tag: &str, uid: bool, data: &[SearchReturn<'_>]) {
    out.extend_from_slice(b"* ESEARCH (TAG ");
    write_string(out, tag.as_bytes());
    out.extend_from_slice(if uid { b") UID" } else { b")" });
    for item in data {
        let (label, value) = match *item {
            SearchReturn::Min(n) => (" MIN ", u64::from(n)),
            SearchReturn::Max(n) => (" MAX ", u64::from(n)),
            SearchReturn::Count(n) => (" COUNT ", u64::from(n)),
            SearchReturn::ModSeq(n) => (" MODSEQ ", n),
            SearchReturn::All([]) => continue,
            SearchReturn::All(runs) => {
                out.extend_from_slice(b" ALL ");
                write_sequence_set(out, runs.iter().copied());
                continue;
            }
        };
        out.extend_from_slice(label.as_bytes());
        write_number(out, value);
    }
    out.extend_from_slice(b"\r\n");
}

/// `Namespace-Descr = "(" string SP (DQUOTE QUOTED-CHAR DQUOTE / nil) ")"`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceEntry<'a> {
    pub prefix: &'a str,
    pub delimiter: Option<char>,
}

/// `Namespace-Response = "NAMESPACE" SP Namespace SP Namespace SP Namespace` (RFC 2342, 5): personal, other users',
/// shared.
pub fn write_namespace(out: &mut Vec<u8>, namespaces: [&[NamespaceEntry<'_>]; 3]) {
    out.extend_from_slice(b"* NAMESPACE");
    for entries in namespaces {
        out.push(b' ');
        if entries.is_empty() {
            out.extend_from_slice(b"NIL");
            continue;
        }
        out.push(b'(');
        for entry in entries {
            out.push(b'(');
            write_string(out, MailboxName::from_utf8(entry.prefix).to_utf7().as_bytes());
            out.push(b' ');
            write_delimiter(out, entry.delimiter);
            out.push(b')');
        }
        out.push(b')');
    }
    out.extend_from_slice(b"\r\n");
}

/// `expunged-resp = "VANISHED" [SP "(EARLIER)"] SP known-uids` (RFC 7162, 3.2.10). Nothing for no UIDs.
pub fn write_vanished(out: &mut Vec<u8>, earlier: bool, uids: &[(u32, u32)]) {
    if uids.is_empty() {
        return;
    }
    out.extend_from_slice(if earlier { b"* VANISHED (EARLIER) " } else { b"* VANISHED " });
    write_sequence_set(out, uids.iter().copied());
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl Fn(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lists() {
        let name = MailboxName::from_utf8("Entwürfe/a b");
        let attributes = [ListAttribute::HasNoChildren, ListAttribute::Drafts];
        assert_eq!(
            written(|o| write_list(o, &attributes, Some('/'), &name, false)),
            "* LIST (\\HasNoChildren \\Drafts) \"/\" \"Entw&APw-rfe/a b\"\r\n"
        );
        assert_eq!(written(|o| write_list(o, &[], None, &name, true)), "* LIST () NIL \"Entwürfe/a b\"\r\n");
        assert_eq!(
            written(|o| write_lsub(o, &[], Some('\\'), &MailboxName::from_utf8("inbox"), false)),
            "* LSUB () \"\\\\\" INBOX\r\n"
        );
    }

    #[test]
    fn status_and_search() {
        let items = [StatusItem::Messages(3), StatusItem::HighestModSeq(9), StatusItem::MailboxId("x1")];
        assert_eq!(
            written(|o| write_status(o, &MailboxName::from_utf8("a&b"), &items, false)),
            "* STATUS a&-b (MESSAGES 3 HIGHESTMODSEQ 9 MAILBOXID (x1))\r\n"
        );
        let search = |pieces: &[&[u32]], mod_seq| {
            written(|o| {
                write_search_start(o);
                pieces.iter().for_each(|piece| write_search_numbers(o, piece.iter().copied()));
                write_search_end(o, mod_seq);
            })
        };
        assert_eq!(search(&[], None), "* SEARCH\r\n");
        assert_eq!(search(&[&[2], &[5, 7]], Some(7)), "* SEARCH 2 5 7 (MODSEQ 7)\r\n");
        let data = [SearchReturn::Count(0), SearchReturn::All(&[])];
        assert_eq!(written(|o| write_esearch(o, "A1", true, &data)), "* ESEARCH (TAG \"A1\") UID COUNT 0\r\n");
        let data = [SearchReturn::Min(2), SearchReturn::All(&[(2, 2), (4, 9)])];
        assert_eq!(written(|o| write_esearch(o, "A1", false, &data)), "* ESEARCH (TAG \"A1\") MIN 2 ALL 2,4:9\r\n");
    }

    #[test]
    fn namespace_and_vanished() {
        let personal = [NamespaceEntry { prefix: "", delimiter: Some('/') }];
        assert_eq!(written(|o| write_namespace(o, [&personal, &[], &[]])), "* NAMESPACE ((\"\" \"/\")) NIL NIL\r\n");
        assert_eq!(written(|o| write_vanished(o, true, &[(1, 4), (9, 9)])), "* VANISHED (EARLIER) 1:4,9\r\n");
        assert_eq!(written(|o| write_vanished(o, false, &[])), "");
    }
}
