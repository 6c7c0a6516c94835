//! The parts of a message (RFC 2046, 5.1), by offsets into it.
//!
//! One pass from the top: a header is read, and by its Content-Type the body is a multipart, a message, or a leaf. What
//! is open is a stack, not a call stack; delimiter lines of any open multipart close what is above it. So every byte is
//! looked at a fixed number of times, whatever the nesting. Line ends may be CRLF or LF.

use memchr::memmem;

use crate::header::{FieldIndex, Header, Known, Tokens, for_each_parameter, scan_header, without_line_end};
use crate::words::push_percent_decoded;

/// Deeper parts are leaves.
pub const DEPTH_MAX: usize = 100;
/// Further parts are text of the last one.
pub const PARTS_MAX: usize = 10_000;
/// A multipart with a longer boundary is a leaf. RFC 2046, 5.1.1 allows 70; each line of the body may have to be compared with it.
pub const BOUNDARY_BYTES_MAX: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Leaf,
    Multipart,
    /// message/rfc822 or message/global: its one child is the message inside.
    Message,
}

/// One part. The message itself is the first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub kind: Kind,
    pub header_offset: usize,
    pub body_offset: usize,
    /// Where the body ends: before the line end that belongs to the next delimiter.
    pub body_end: usize,
    /// Line ends in the body.
    pub lines: usize,
    /// The index after the last part within this one: parts are in the order of the message, parents first.
    pub subtree_end: usize,
    pub fields: FieldIndex,
    /// In a multipart/digest, where the default type is message/rfc822 (RFC 2046, 5.1.5).
    pub in_digest: bool,
    /// Not looked into, though its Content-Type says that there is more: nested too deeply, or without a body.
    pub is_cut: bool,
}

#[derive(Debug)]
struct Open {
    part: usize,
    /// Empty for messages, and for multiparts whose close delimiter was seen.
    boundary: Vec<u8>,
    is_digest: bool,
}

/// What a delimiter line says.
#[derive(Debug, Clone, Copy)]
struct Delimiter {
    /// Index in the stack of the multipart that it belongs to.
    level: usize,
    line_start: usize,
    line_end: usize,
    is_close: bool,
}

/// The parts of a message, in order; never empty.
pub fn scan(message: &[u8]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut stack: Vec<Open> = Vec::new();
    let finder = memmem::Finder::new(b"\n--");
    let mut at = 0; // where the next part begins
    loop {
        at = open_part(message, at, &mut parts, &mut stack);
        // Look for the next part: after a delimiter of an open multipart, or at the start of a message within.
        if let Some(open) = stack.last()
            && parts[open.part].kind == Kind::Message
            && open.part + 1 == parts.len()
        {
            continue;
        }
        let next = loop {
            let Some(delimiter) = next_delimiter(message, at, &stack, &finder) else { break None };
            let may_add = parts.len() < PARTS_MAX;
            at = delimiter.line_end;
            if !may_add && !delimiter.is_close {
                continue;
            }
            // The line end before a delimiter belongs to it.
            let end = without_line_end(&message[..delimiter.line_start]).len();
            close_above(message, delimiter.level + 1, end, &mut parts, &mut stack);
            if !delimiter.is_close {
                break Some(at);
            }
            stack[delimiter.level].boundary.clear(); // what follows is its epilogue
        };
        match next {
            Some(start) => at = start,
            None => break,
        }
    }
    close_above(message, 0, message.len(), &mut parts, &mut stack);
    parts
}

/// Reads the header of a part at `start` and opens what is in it. Gives where its content begins.
fn open_part(message: &[u8], start: usize, parts: &mut Vec<Part>, stack: &mut Vec<Open>) -> usize {
    let Header { body_offset, fields, ended_by_delimiter } =
        scan_header(message, start, |at| delimiter_at(message, at, stack).is_some());
    let in_digest = stack.last().is_some_and(|open| open.is_digest);
    let (kind, boundary, is_digest) = kind_of(message, &fields, in_digest);
    // Where the header has no end, there is nothing inside.
    let is_cut = kind != Kind::Leaf && (stack.len() >= DEPTH_MAX || parts.len() >= PARTS_MAX || ended_by_delimiter);
    let (kind, boundary) = if is_cut { (Kind::Leaf, Vec::new()) } else { (kind, boundary) };
    let part = parts.len();
    parts.push(Part {
        kind,
        header_offset: start,
        body_offset,
        body_end: usize::MAX, // set when it is closed
        lines: 0,
        subtree_end: 0,
        fields,
        in_digest,
        is_cut,
    });
    // Leaves are on the stack too, so that closing is one thing.
    stack.push(Open { part, boundary, is_digest });
    body_offset
}

/// Closes all that is open from `level` up: it ends at `end`.
fn close_above(message: &[u8], level: usize, end: usize, parts: &mut [Part], stack: &mut Vec<Open>) {
    let count = parts.len();
    let mut within = None;
    for open in &stack[level..] {
        let part = &mut parts[open.part];
        // A part that is closed together with the one that holds it ends with that. Its blank line, or the line end after
        // the delimiter before it, may be the very line end that belongs to the closing delimiter.
        let limit = within.unwrap_or(usize::MAX);
        part.header_offset = part.header_offset.min(limit);
        part.body_offset = part.body_offset.min(limit);
        part.body_end = end.max(part.body_offset);
        part.subtree_end = count;
        within = Some(part.body_end);
    }
    for open in stack.drain(level..).rev() {
        parts[open.part].lines = count_lines(message, parts, open.part);
    }
}

/// The line ends in a body: those of its children, which are closed already, and those between them, so that no byte is
/// counted once per level.
fn count_lines(message: &[u8], parts: &[Part], part: usize) -> usize {
    let count = |start: usize, end: usize| memchr::memchr_iter(b'\n', &message[start..end.max(start)]).count();
    let (mut lines, mut from, mut child) = (0, parts[part].body_offset, part + 1);
    while child < parts[part].subtree_end {
        let inner = &parts[child];
        lines += count(from, inner.body_offset) + inner.lines;
        (from, child) = (inner.body_end, inner.subtree_end);
    }
    lines + count(from, parts[part].body_end)
}

/// Whether a type is that of a whole message (RFC 2046, 5.2.1; RFC 6532, 3.7).
pub(crate) fn is_message(media_type: &[u8], subtype: &[u8]) -> bool {
    media_type.eq_ignore_ascii_case(b"message")
        && (subtype.eq_ignore_ascii_case(b"rfc822") || subtype.eq_ignore_ascii_case(b"global"))
}

/// What the Content-Type makes of a part, and the boundary and digest mark of a multipart.
fn kind_of(message: &[u8], fields: &FieldIndex, in_digest: bool) -> (Kind, Vec<u8>, bool) {
    let leaf = (Kind::Leaf, Vec::new(), false);
    let Some(value) = fields.value(message, Known::ContentType) else {
        return if in_digest { (Kind::Message, Vec::new(), false) } else { leaf };
    };
    let mut tokens = Tokens::new(value);
    let media_type = tokens.token();
    if !tokens.eat(b'/') {
        return leaf;
    }
    let subtype = tokens.token();
    if is_message(media_type, subtype) {
        // No encoding but the identities is allowed for these (RFC 2046, 5.2.1). Where there is one all the same, there is
        // no message to be seen.
        let encoding = fields.value(message, Known::ContentTransferEncoding).unwrap_or_default().trim_ascii();
        let encoded = encoding.eq_ignore_ascii_case(b"base64") || encoding.eq_ignore_ascii_case(b"quoted-printable");
        return if encoded { leaf } else { (Kind::Message, Vec::new(), false) };
    }
    if !media_type.eq_ignore_ascii_case(b"multipart") {
        return leaf;
    }
    let mut boundary = None;
    for_each_parameter(&mut tokens, |name, tokens| {
        let plain = name.eq_ignore_ascii_case(b"boundary");
        if boundary.is_none() && (plain || name.eq_ignore_ascii_case(b"boundary*")) {
            let mut value = Vec::new();
            tokens.push_parameter_value(&mut value);
            if !plain {
                value = decode_extended(&value);
            }
            value.truncate(value.trim_ascii_end().len());
            boundary = Some(value);
        }
    });
    match boundary {
        Some(boundary) if is_boundary(&boundary) => {
            (Kind::Multipart, boundary, subtype.eq_ignore_ascii_case(b"digest"))
        }
        _ => leaf,
    }
}

/// What is part of a line, and not too long. One that held line ends could match from line to line.
fn is_boundary(boundary: &[u8]) -> bool {
    (1..=BOUNDARY_BYTES_MAX).contains(&boundary.len())
        && !boundary.iter().any(|octet| matches!(octet, b'\r' | b'\n' | 0))
}

/// `extended-value = charset "'" language "'" *( ext-octet / attribute-char )` (RFC 2231, 7). A boundary is ASCII, so the
/// charset does not matter.
fn decode_extended(value: &[u8]) -> Vec<u8> {
    let value = value.splitn(3, |b| *b == b'\'').nth(2).unwrap_or(value);
    let mut out = Vec::with_capacity(value.len());
    push_percent_decoded(value, &mut out);
    out
}

/// The next delimiter line of an open multipart at or after `from`.
fn next_delimiter(message: &[u8], from: usize, stack: &[Open], finder: &memmem::Finder<'_>) -> Option<Delimiter> {
    if stack.iter().all(|open| open.boundary.is_empty()) {
        return None;
    }
    let is_line_start = from == 0 || message[from - 1] == b'\n';
    if is_line_start && let Some(delimiter) = delimiter_at(message, from, stack) {
        return Some(delimiter);
    }
    finder.find_iter(&message[from..]).find_map(|distance| delimiter_at(message, from + distance + 1, stack))
}

/// `delimiter := CRLF "--" boundary`, `close-delimiter := delimiter "--"`, each with transport padding: the line that
/// begins at `at`, if it is one. The innermost multipart comes first.
fn delimiter_at(message: &[u8], at: usize, stack: &[Open]) -> Option<Delimiter> {
    let text = message.get(at..)?.strip_prefix(b"--")?;
    for (level, open) in stack.iter().enumerate().rev() {
        if open.boundary.is_empty() || !text.starts_with(&open.boundary) {
            continue;
        }
        let rest = &text[open.boundary.len()..];
        let (rest, is_close) = match rest.strip_prefix(b"--") {
            Some(rest) => (rest, true),
            None => (rest, false),
        };
        let padding = rest.iter().position(|b| !matches!(b, b' ' | b'\t' | b'\r')).unwrap_or(rest.len());
        let line_end = match rest.get(padding) {
            None => message.len(),
            Some(b'\n') => message.len() - rest.len() + padding + 1,
            // A close delimiter may be followed by anything on its line in real mail; a longer boundary is another one.
            Some(_) => continue,
        };
        return Some(Delimiter { level, line_start: at, line_end, is_close });
    }
    None
}

/// Checks what must hold of every scan: bodies follow headers, and children lie within their parent, in order.
#[cfg(test)]
pub(crate) fn check(message: &[u8], parts: &[Part]) {
    assert_eq!((parts[0].header_offset, parts[0].body_end), (0, message.len()));
    assert_eq!(parts[0].subtree_end, parts.len());
    for (i, part) in parts.iter().enumerate() {
        assert!(part.header_offset <= part.body_offset && part.body_offset <= part.body_end, "{i}: {part:?}");
        assert!(part.subtree_end > i && part.subtree_end <= parts.len(), "{i}: {part:?}");
        assert_eq!(part.lines, message[part.body_offset..part.body_end].iter().filter(|b| **b == b'\n').count());
        if part.kind == Kind::Leaf {
            assert_eq!(part.subtree_end, i + 1);
        }
        let mut child = i + 1;
        let mut from = part.body_offset;
        let mut count = 0;
        while child < part.subtree_end {
            assert!(parts[child].header_offset >= from && parts[child].body_end <= part.body_end, "{i} {child}");
            from = parts[child].body_end;
            child = parts[child].subtree_end;
            count += 1;
        }
        if part.kind == Kind::Message {
            assert_eq!((count, parts[i + 1].header_offset), (1, part.body_offset));
            assert_eq!(parts[i + 1].body_end, part.body_end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Each part as its depth, kind and body.
    fn tree(message: &str) -> Vec<String> {
        let parts = scan(message.as_bytes());
        check(message.as_bytes(), &parts);
        let depth = |i: usize| parts[..i].iter().filter(|p| p.subtree_end > i).count();
        let show = |(i, p): (usize, &Part)| {
            let body = if p.kind == Kind::Leaf { &message[p.body_offset..p.body_end] } else { "" };
            format!("{} {:?} {:?}", depth(i), p.kind, body)
        };
        parts.iter().enumerate().map(show).collect()
    }

    const MIXED: &str = "Content-Type: multipart/mixed; boundary=b\r\n\r\n";

    #[test]
    fn plain_message() {
        assert_eq!(tree("A: b\r\n\r\nx\r\ny\r\n"), ["0 Leaf \"x\\r\\ny\\r\\n\""]);
        assert_eq!(scan(b"A: b\r\n\r\nx\r\ny\r\n")[0].lines, 2);
        assert_eq!(tree(""), ["0 Leaf \"\""]);
        assert_eq!(tree("A: b"), ["0 Leaf \"\""]);
    }

    #[test]
    fn multipart() {
        assert_eq!(
            tree(&format!(
                "{MIXED}preamble\r\n--b\r\n\r\none\r\n--b  \r\nA: b\r\n\r\ntwo\r\n\r\n--b--\r\nepilogue\r\n--b\r\n\r\nno"
            )),
            ["0 Multipart \"\"", "1 Leaf \"one\"", "1 Leaf \"two\\r\\n\""]
        );
        assert_eq!(tree(&format!("{MIXED}--b\r\n\r\none")), ["0 Multipart \"\"", "1 Leaf \"one\""]);
        assert_eq!(tree(&format!("{MIXED}no parts")), ["0 Multipart \"\""]);
        assert_eq!(
            tree(&format!("{MIXED}--b\r\n--b\r\nA: b\r\n--b\r\n\r\n--b--")),
            ["0 Multipart \"\"", "1 Leaf \"\"", "1 Leaf \"\"", "1 Leaf \"\""]
        );
        assert_eq!(tree(&format!("{MIXED}--bc\r\n\r\nx\r\n--b--x\r\n")), ["0 Multipart \"\""], "other boundaries");
        assert_eq!(tree("Content-Type: multipart/mixed\r\n\r\n--\r\n"), ["0 Leaf \"--\\r\\n\""]);
        let lf = "Content-Type: multipart/mixed; boundary=\"b\"\n\n--b\n\none\n--b--\n";
        assert_eq!(tree(lf), ["0 Multipart \"\"", "1 Leaf \"one\""]);
    }

    #[test]
    fn extended_boundary() {
        let message =
            "Content-Type: multipart/mixed; boundary*=us-ascii'en'a%20b%\r\n\r\n--a b%\r\n\r\none\r\n--a b%--\r\n";
        assert_eq!(tree(message), ["0 Multipart \"\"", "1 Leaf \"one\""]);
    }

    #[test]
    fn nested() {
        let inner = "Content-Type: multipart/alternative; boundary=c\r\n\r\n--c\r\n\r\n1\r\n--c\r\n\r\n2\r\n--c--\r\n";
        assert_eq!(
            tree(&format!("{MIXED}--b\r\n{inner}--b\r\n\r\n3\r\n--b--\r\n")),
            ["0 Multipart \"\"", "1 Multipart \"\"", "2 Leaf \"1\"", "2 Leaf \"2\"", "1 Leaf \"3\""]
        );
        let unclosed = "Content-Type: multipart/alternative; boundary=c\r\n\r\n--c\r\n\r\n1\r\n";
        assert_eq!(
            tree(&format!("{MIXED}--b\r\n{unclosed}--b\r\n\r\n3\r\n--b--\r\n")),
            ["0 Multipart \"\"", "1 Multipart \"\"", "2 Leaf \"1\"", "1 Leaf \"3\""]
        );
    }

    #[test]
    fn messages() {
        let message = format!("{MIXED}--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: x\r\n\r\nin\r\n--b--\r\n");
        assert_eq!(tree(&message), ["0 Multipart \"\"", "1 Message \"\"", "2 Leaf \"in\""]);
        let digest = MIXED.replace("mixed", "digest");
        assert_eq!(
            tree(&format!(
                "{digest}--b\r\n\r\nSubject: x\r\n\r\nin\r\n--b\r\nContent-Type: text/plain\r\n\r\nt\r\n--b--\r\n"
            )),
            ["0 Multipart \"\"", "1 Message \"\"", "2 Leaf \"in\"", "1 Leaf \"t\""]
        );
        assert_eq!(tree("Content-Type: message/rfc822\r\n\r\n"), ["0 Message \"\"", "1 Leaf \"\""]);
        let encoded = "Content-Type: message/rfc822\r\nContent-Transfer-Encoding: base64\r\n\r\nQTogYg==";
        assert_eq!(tree(encoded), ["0 Leaf \"QTogYg==\""]);
    }

    /// Trap 33: nesting and the number of parts are bounded.
    #[test]
    fn trap_33_depth_and_parts() {
        let deep = "Content-Type: message/rfc822\r\n\r\n".repeat(5000);
        let parts = scan(deep.as_bytes());
        check(deep.as_bytes(), &parts);
        assert_eq!(parts.len(), DEPTH_MAX + 1);
        assert!(parts[DEPTH_MAX].is_cut);
        let deep: String =
            (0..5000).map(|i| format!("Content-Type: multipart/mixed; boundary=b{i}\r\n\r\n--b{i}\r\n")).collect();
        let parts = scan(deep.as_bytes());
        check(deep.as_bytes(), &parts);
        assert_eq!(parts.len(), DEPTH_MAX + 1);
        let many = format!("{MIXED}{}", "--b\r\n\r\nx\r\n".repeat(20_000));
        let parts = scan(many.as_bytes());
        check(many.as_bytes(), &parts);
        assert_eq!(parts.len(), PARTS_MAX);
    }

    /// Trap 33: a boundary that matches nearly to its end at every line, by line ends of its own or by its length.
    #[test]
    fn trap_33_boundaries_that_take_long_to_tell_apart() {
        let start = std::time::Instant::now();
        let over_lines = format!(
            "Content-Type: multipart/mixed; boundary*=x''{}x\r\n\r\n{}",
            "%0D%0A--".repeat(200_000),
            "--\r\n".repeat(500_000)
        );
        assert_eq!(scan(over_lines.as_bytes()).len(), 1);
        let long = "a".repeat(500_000);
        let too_long = format!("Content-Type: multipart/mixed; boundary={long}\r\n\r\n--{long}\r\n\r\nx");
        assert_eq!(scan(too_long.as_bytes()).len(), 1);
        let longest = "a".repeat(BOUNDARY_BYTES_MAX);
        let lines = format!("--{}\r\n", &longest[1..]).repeat(20_000);
        let message = format!("Content-Type: multipart/mixed; boundary={longest}\r\n\r\n{lines}--{longest}\r\n\r\nx");
        assert_eq!(scan(message.as_bytes()).len(), 2);
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    /// Trap 34: a multipart within itself, by the same boundary, ends.
    #[test]
    fn trap_34_self_nested() {
        let message = format!("--b\r\n{MIXED}").repeat(50);
        let parts = scan(format!("{MIXED}{message}").as_bytes());
        check(format!("{MIXED}{message}").as_bytes(), &parts);
        assert!(parts.len() <= 101, "{}", parts.len());
    }

    proptest! {
        #[test]
        fn soup_adds_up(pieces in prop::collection::vec(prop::sample::select(vec![
            "Content-Type: multipart/mixed; boundary=b\r\n", "Content-Type: multipart/digest; boundary=c\r\n",
            "Content-Type: message/rfc822\r\n", "--b\r\n", "--c\r\n", "--b--\r\n", "--c--\r\n", "\r\n", "\n", "text\r\n", "--", "b", " "]), 0..40)) {
            let message = pieces.concat();
            check(message.as_bytes(), &scan(message.as_bytes()));
        }
    }
}
