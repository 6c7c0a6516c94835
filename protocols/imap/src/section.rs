//! Cuts header fields and partials out of a message (RFC 3501, 6.4.5).

use std::ops::Range;

use memchr::memchr;

use crate::command::fetch::Partial;

/// The range of a text of `len` octets that a partial means: empty beyond the end, cut at the end.
pub fn partial_range(partial: Option<Partial>, len: u64) -> Range<u64> {
    let Some(Partial { offset, length }) = partial else { return 0..len };
    let start = offset.min(len);
    start..start.saturating_add(length).min(len)
}

/// The fields of `header` that are named, or those that are not, each with its continuation lines, and the blank line if
/// there is one. Names match in any case, "but otherwise exact". The time is one pass over the header, plus the names once
/// per field.
pub fn header_fields(header: &[u8], names: &[String], not: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(header.len().min(4096));
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
        let named = !name.is_empty() && names.iter().any(|n| n.as_bytes().eq_ignore_ascii_case(name));
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

    #[test]
    fn header_without_blank_line() {
        assert_eq!(header_fields(b"A: b\r\nC: d", &["C".into()], false), b"C: d");
        assert_eq!(header_fields(b"", &["C".into()], true), b"");
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
