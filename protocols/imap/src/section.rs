//! Cuts header fields and partials out of a message (RFC 3501, 6.4.5).

use std::ops::Range;

use memchr::memchr;
use posthaste_mime::ArchivedDigest;

use crate::command::fetch::{Partial, Section, SectionText};

/// Where the text of a section is in the raw message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// These octets. A partial applies to them directly.
    Octets(Range<u64>),
    /// What [`header_fields`] leaves of the header in these octets; a partial applies to what is left.
    HeaderFields(Range<u64>),
}

/// Finds a section by the digest alone (RFC 3501, 6.4.5). `None` where the message has no such part: the value is NIL.
///
/// In a message whose digest is marked `overflow`, only sections without part numbers can be found by the short archive.
pub fn extent(section: &Section, digest: &ArchivedDigest) -> Option<Extent> {
    let numbers = &section.part[..];
    if let Some(multipart) = digest.empty_multipart(numbers) {
        let text = multipart.body_range();
        return match &section.text {
            SectionText::Whole => Some(Extent::Octets(text)),
            SectionText::Mime => Some(Extent::Octets(text.start..text.start)),
            _ => None,
        };
    }
    Some(match &section.text {
        SectionText::Whole if numbers.is_empty() => Extent::Octets(0..u64::from(digest.message_bytes.to_native())),
        SectionText::Whole => Extent::Octets(digest.part(numbers)?.1.body_range()),
        SectionText::Mime => Extent::Octets(digest.part(numbers)?.1.header_range()),
        SectionText::Header => Extent::Octets(digest.message_in(numbers)?.header_range()),
        SectionText::HeaderFields { .. } => Extent::HeaderFields(digest.message_in(numbers)?.header_range()),
        SectionText::Text => Extent::Octets(digest.message_in(numbers)?.body_range()),
    })
}

/// The range of a text of `len` octets that a partial means: empty beyond the end, cut at the end.
pub fn partial_range(partial: Option<Partial>, len: u64) -> Range<u64> {
    let Some(Partial { offset, length }) = partial else { return 0..len };
    let start = offset.min(len);
    start..start.saturating_add(length).min(len)
}

/// The fields of `header` that are named, or those that are not, each with its continuation lines, and the blank line if
/// there is one. Names match in any case, "but otherwise exact". The names are sorted first, so that many names over many
/// short fields cost no product of the two.
pub fn header_fields(header: &[u8], names: &[String], not: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(header.len().min(4096));
    let mut wanted: Vec<Vec<u8>> = names.iter().map(|name| name.to_ascii_lowercase().into_bytes()).collect();
    wanted.sort_unstable();
    let longest = wanted.iter().map(Vec::len).max().unwrap_or(0);
    let mut lower = Vec::with_capacity(longest);
    let mut at = 0;
    while at < header.len() {
        if header[at..].starts_with(b"\r\n") || header[at] == b'\n' {
            out.extend_from_slice(if header[at] == b'\n' { b"\n" } else { b"\r\n" });
            break;
        }
        let end = field_end(header, at);
        let field = &header[at..end];
        let name_end = memchr(b':', field).unwrap_or(0);
        let name = field[..name_end].trim_ascii_end(); // obs-fields allow white space before the colon (RFC 5322, 4.5)
        lower.clear();
        lower.extend(name.iter().take(longest + 1).map(u8::to_ascii_lowercase));
        let named = !name.is_empty() && wanted.binary_search(&lower).is_ok();
        if named != not {
            out.extend_from_slice(field);
        }
        at = end;
    }
    out
}

/// The end of the field that begins at `start`: after its last line that is followed by no continuation line.
fn field_end(header: &[u8], start: usize) -> usize {
    let mut at = start;
    while let Some(distance) = memchr(b'\n', &header[at..]) {
        at += distance + 1;
        if !matches!(header.get(at), Some(b' ' | b'\t')) {
            return at;
        }
    }
    header.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: &[u8] =
        b"Date: today\r\nfrom: a\r\n b\r\nTo: c\r\nX-From: d\r\nFROM : e\r\nno colon\r\nDate: again\r\n\r\n";

    fn fields(names: &[&str], not: bool) -> String {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        String::from_utf8(header_fields(HEADER, &names, not)).unwrap()
    }

    #[test]
    fn named_fields() {
        assert_eq!(fields(&["From"], false), "from: a\r\n b\r\nFROM : e\r\n\r\n");
        assert_eq!(fields(&["DATE", "none"], false), "Date: today\r\nDate: again\r\n\r\n");
        assert_eq!(fields(&[""], false), "\r\n");
        assert_eq!(fields(&["date", "FROM"], true), "To: c\r\nX-From: d\r\nno colon\r\n\r\n");
    }

    /// Trap 33: many names over many fields.
    #[test]
    fn trap_33_many_names_over_many_fields() {
        let names: Vec<String> = (0..500).map(|i| format!("x{i:03}")).collect();
        let header = "x999: y\r\n".repeat(300_000);
        let start = std::time::Instant::now();
        assert_eq!(header_fields(header.as_bytes(), &names, true).len(), header.len());
        assert!(start.elapsed().as_secs() < 5);
    }

    #[test]
    fn header_without_blank_line() {
        assert_eq!(header_fields(b"A: b\r\nC: d", &["C".into()], false), b"C: d");
        assert_eq!(header_fields(b"", &["C".into()], true), b"");
    }

    /// RFC 3501, 6.4.5: the sections of its complex message, in small.
    #[test]
    fn sections_by_digest() {
        use crate::command::Command;
        use crate::command::fetch::FetchItem;
        use posthaste_mime::{Digest, digest::DigestBytes};
        let message = "S: root\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nA: 1\r\n\r\none\r\n--b\r\n\
            Content-Type: message/rfc822\r\n\r\nS: in\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\ninner\r\n\
            --c--\r\n--b\r\nContent-Type: message/rfc822\r\n\r\nS: plain\r\n\r\ntext\r\n--b--\r\n";
        let bytes = DigestBytes::from_aligned(Digest::of(message.as_bytes()).archives().0).unwrap();
        let digest = bytes.digest().unwrap();
        let find = |text: &str| {
            let Ok(Command::Fetch(fetch)) = crate::command::tests::parse_line(&format!("FETCH 1 BODY[{text}]")) else {
                panic!("{text}")
            };
            let FetchItem::BodySection(section) = &fetch.items[0] else { panic!("{text}") };
            extent(&section.section, digest).map(|extent| {
                let (Extent::Octets(range) | Extent::HeaderFields(range)) = extent;
                &message[range.start as usize..range.end as usize]
            })
        };
        assert_eq!(find(""), Some(message));
        assert_eq!(find("HEADER"), Some("S: root\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n"));
        assert_eq!(find("HEADER.FIELDS (S)"), find("HEADER"));
        assert_eq!(find("TEXT").map(|t| &t[..9]), Some("--b\r\nA: 1"));
        assert_eq!(find("1"), Some("one"));
        assert_eq!(find("1.MIME"), Some("A: 1\r\n\r\n"));
        assert_eq!(find("1.HEADER"), None, "no message");
        assert_eq!(find("2.HEADER"), Some("S: in\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n"));
        assert_eq!(find("2.1"), Some("inner"));
        assert_eq!(find("2.1.MIME"), Some("\r\n"));
        assert_eq!(find("3.TEXT"), Some("text"));
        assert_eq!(find("3.1"), Some("text"));
        assert_eq!(find("3.2"), None);
        assert_eq!(find("4"), None);
    }

    /// BODYSTRUCTURE gives a multipart without parts one, which is all its text.
    #[test]
    fn parts_of_empty_multiparts() {
        use crate::command::fetch::Section;
        use posthaste_mime::{Digest, digest::DigestBytes};
        let empty = "Content-Type: multipart/mixed; boundary=b\r\n\r\nno parts";
        let find = |message: &str, part: &[u32], text| {
            let bytes = DigestBytes::from_aligned(Digest::of(message.as_bytes()).archives().0).unwrap();
            let found = extent(&Section { part: part.to_vec(), text }, bytes.digest().unwrap());
            found.map(|found| match found {
                Extent::Octets(octets) => message[octets.start as usize..octets.end as usize].to_owned(),
                Extent::HeaderFields(_) => panic!("{message}"),
            })
        };
        assert_eq!(find(empty, &[1], SectionText::Whole).as_deref(), Some("no parts"));
        assert_eq!(find(empty, &[1], SectionText::Mime).as_deref(), Some(""));
        assert_eq!(find(empty, &[1], SectionText::Header), None);
        assert_eq!(find(empty, &[2], SectionText::Whole), None);
        assert_eq!(find(empty, &[1, 1], SectionText::Whole), None);
        let within = format!("Content-Type: message/rfc822\r\n\r\n{empty}");
        assert_eq!(find(&within, &[1, 1], SectionText::Whole).as_deref(), Some("no parts"));
    }

    #[test]
    fn partials() {
        let range = |offset, length, len| partial_range(Some(Partial { offset, length }), len);
        assert_eq!(partial_range(None, 7), 0..7);
        assert_eq!(range(0, 2048, 1500), 0..1500);
        assert_eq!(range(10, 5, 12), 10..12);
        assert_eq!(range(12, 5, 12), 12..12);
        assert_eq!(range(u64::MAX, u64::MAX, 12), 12..12);
        assert_eq!(range(1, u64::MAX, 12), 1..12);
    }

    proptest! {
        /// The two halves of a header make up the whole.
        #[test]
        fn named_and_not_named_partition(header in "([A-C]: [a-z]{0,5}\r\n( [a-z]{1,3}\r\n)?){0,8}(\r\n)?", name in "[A-C]") {
            let names = [name];
            let some = header_fields(header.as_bytes(), &names, false);
            let rest = header_fields(header.as_bytes(), &names, true);
            let blank = if header.ends_with("\r\n\r\n") || header == "\r\n" { 2 } else { 0 };
            prop_assert_eq!(some.len() + rest.len(), header.len() + blank);
        }

        #[test]
        fn never_panics(header in prop::collection::vec(any::<u8>(), 0..100), not in any::<bool>()) {
            header_fields(&header, &["a".into()], not);
        }
    }
}
