//! Base64 text of attachments: what is stored of it is what it says, and the text comes back byte for byte.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memchr::memchr;

/// Shorter texts are left as they are.
const TEXT_OCTETS_MIN: usize = 4 << 10;
/// Lines are between so many octets and [`LINE_OCTETS_MAX`], and full ones a multiple of four.
const LINE_OCTETS_MIN: usize = 40;
pub const LINE_OCTETS_MAX: usize = 1020;
/// Octets of a part: a multiple of what lines of the usual lengths (76, 72, 64, 60) hold, and below 256 KB.
const PART_OCTETS: usize = 246_240;

/// A run of base64 lines in a body, or a part of one that ends with a line.
#[derive(Debug, PartialEq, Eq)]
pub struct Base64Text {
    /// Where the text begins in the body, and how long it is, line ends included.
    pub start: usize,
    pub octets: usize,
    pub line_octets: usize,
    /// What it says.
    pub content: Vec<u8>,
}

/// Finds the base64 in a body that comes back byte for byte from [`put_lines`].
pub fn find(body: &[u8]) -> Vec<Base64Text> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let line = line_at(body, at);
        if !is_full(line.text) {
            at = line.next;
            continue;
        }
        let (start, line_octets) = (at, line.text.len());
        let mut lines = Vec::new();
        while at < body.len() {
            let line = line_at(body, at);
            let is_whole = is_full(line.text) && line.text.len() == line_octets && line.has_end;
            let is_last = !is_whole && is_last(line.text, line_octets);
            if !is_whole && !is_last {
                break;
            }
            lines.push(at..at + line.text.len());
            at = line.next;
            if is_last {
                break;
            }
        }
        if at - start >= TEXT_OCTETS_MIN {
            found.extend(parts(body, start, at, line_octets, &lines));
        }
        // At least one line has been passed, or it was a full one without an end.
        at = at.max(line.next);
    }
    found
}

/// The parts of the text from `start` to `end`. What does not come back as it was - mostly a last line with stray bits - is left.
fn parts(
    body: &[u8],
    start: usize,
    end: usize,
    line_octets: usize,
    lines: &[std::ops::Range<usize>],
) -> Vec<Base64Text> {
    let of_line = line_octets / 4 * 3;
    let lines_per_part = (PART_OCTETS / of_line).max(1);
    let mut parts = Vec::new();
    let mut text = Vec::new();
    for (number, chunk) in lines.chunks(lines_per_part).enumerate() {
        text.clear();
        chunk.iter().for_each(|line| text.extend_from_slice(&body[line.clone()]));
        let Ok(content) = STANDARD.decode(&text) else { continue };
        let start = if number == 0 { start } else { chunk[0].start };
        let end = lines.get((number + 1) * lines_per_part).map_or(end, |next| next.start);
        let part = Base64Text { start, octets: end - start, line_octets, content };
        text.clear();
        put_lines(&part.content, line_octets, part.octets, &mut text);
        if text == body[start..end] {
            parts.push(part);
        }
    }
    parts
}

struct Line<'a> {
    text: &'a [u8],
    /// It ends with CRLF.
    has_end: bool,
    next: usize,
}

fn line_at(body: &[u8], at: usize) -> Line<'_> {
    let rest = &body[at..];
    match memchr(b'\n', rest) {
        Some(end) => match rest[..end].strip_suffix(b"\r") {
            Some(text) => Line { text, has_end: true, next: at + end + 1 },
            None => Line { text: &[], has_end: false, next: at + end + 1 },
        },
        None => Line { text: rest, has_end: false, next: body.len() },
    }
}

fn is_base64(octet: u8) -> bool {
    octet.is_ascii_alphanumeric() || matches!(octet, b'+' | b'/')
}

fn is_full(line: &[u8]) -> bool {
    (LINE_OCTETS_MIN..=LINE_OCTETS_MAX).contains(&line.len())
        && line.len().is_multiple_of(4)
        && line.iter().all(|&octet| is_base64(octet))
}

/// Whether a line may end a text of lines of this length.
fn is_last(line: &[u8], line_octets: usize) -> bool {
    let padding = line.iter().rev().take_while(|&&octet| octet == b'=').count();
    let is_short = !line.is_empty() && line.len() <= line_octets && line.len().is_multiple_of(4);
    is_short && padding <= 2 && line[..line.len() - padding].iter().all(|&octet| is_base64(octet))
}

/// Appends the text of a content: base64 in lines of `line_octets`, each with CRLF, of all of it the first `octets`.
pub fn put_lines(content: &[u8], line_octets: usize, octets: usize, out: &mut Vec<u8>) {
    let of_line = (line_octets / 4 * 3).max(3);
    let start = out.len();
    let lines = content.len().div_ceil(of_line);
    out.resize(start + content.len().div_ceil(3) * 4 + 2 * lines, 0);
    let mut at = start;
    for line in content.chunks(of_line) {
        at += STANDARD.encode_slice(line, &mut out[at..]).expect("room for the whole text");
        out[at..at + 2].copy_from_slice(b"\r\n");
        at += 2;
    }
    out.truncate(at.min(start + octets));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(content: &[u8], line_octets: usize) -> Vec<u8> {
        let mut text = Vec::new();
        put_lines(content, line_octets, usize::MAX - content.len() * 2, &mut text);
        text
    }

    fn content(octets: usize) -> Vec<u8> {
        (0..octets as u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn every_body_comes_back_from_its_parts() {
        let cases: Vec<Vec<u8>> = vec![
            text(&content(10_000), 76),
            [&b"--b\r\nContent-Transfer-Encoding: base64\r\n\r\n"[..], &text(&content(9_999), 72), b"--b--\r\n"]
                .concat(),
            [&text(&content(5_700), 76)[..], &text(&content(7_001), 60), b"text\r\n"].concat(),
            text(&content(700_000), 76),
            text(&content(700_001), 64),
            // The last line has no end.
            text(&content(10_001), 76).strip_suffix(b"\r\n").unwrap().to_vec(),
            // Bits that the last character has and says nothing with.
            [&text(&content(10_050), 76)[..], b"gh==\r\n"].concat(),
            // A data URI in quoted-printable.
            text(&content(10_000), 76)
                .split(|&octet| octet == b'\n')
                .flat_map(|line| [&line[..line.len().saturating_sub(1)], b"=\r\n"].concat())
                .collect(),
            [&b"a".repeat(76)[..], b"\n"].concat().repeat(100),
            b"a".repeat(100_000),
        ];
        for (number, body) in cases.iter().enumerate() {
            let found = find(body);
            let mut back = Vec::new();
            for part in &found {
                assert!(part.start >= back.len(), "case {number}: parts overlap");
                back.extend_from_slice(&body[back.len()..part.start]);
                let before = back.len();
                put_lines(&part.content, part.line_octets, part.octets, &mut back);
                assert_eq!(back.len() - before, part.octets, "case {number}");
            }
            back.extend_from_slice(&body[back.len()..]);
            assert!(back == *body, "case {number}");
            let encoded: usize = found.iter().map(|part| part.octets).sum();
            assert_eq!(encoded >= body.len() / 2, number < 7, "case {number}: {encoded} of {} octets", body.len());
        }
    }
}
