//! Base64 text of attachments: what is stored of it is what it says, and the text comes back byte for byte.
//!
//! A text is lines of one length, each with CRLF, of characters of the alphabet; its last line may be shorter, may end with
//! padding, and may lack its CRLF. Such lines have one encoding only: what they say and the length of the lines give them back.

use std::ops::Range;
use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use memchr::{memchr, memrchr};

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
static WIDE: LazyLock<base64::engine::GeneralPurpose> = LazyLock::new(|| STANDARD);
/// Vector instructions where the processor has them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static WIDE: LazyLock<base64::engine::Simd> =
    LazyLock::new(|| base64::engine::Simd::standard(base64::engine::general_purpose::PAD));

/// Lines are between so many octets and [`LINE_OCTETS_MAX`], and full ones a multiple of four.
const LINE_OCTETS_MIN: usize = 40;
pub const LINE_OCTETS_MAX: usize = 1020;
/// Octets of content in a part: a multiple of what lines of the usual lengths (76, 72, 64, 60) hold, and below 256 KB.
const PART_OCTETS: usize = 246_240;

/// Base64 lines in a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base64Text {
    /// Where the text begins in the body, and how long it is, line ends included.
    pub start: usize,
    pub octets: usize,
    pub line_octets: usize,
}

impl Base64Text {
    pub fn end(&self) -> usize {
        self.start + self.octets
    }

    /// The text in parts that end with lines: each says less than 256 KB.
    pub fn parts(self) -> impl Iterator<Item = Self> {
        let lines = (PART_OCTETS / (self.line_octets / 4 * 3)).max(1);
        let step = lines * (self.line_octets + CRLF.len());
        (self.start..self.end()).step_by(step).map(move |start| Self {
            start,
            octets: step.min(self.end() - start),
            ..self
        })
    }

    /// What the text says; `None` if that would not come back as it is in `body`, in which it was found.
    pub fn content(&self, body: &[u8]) -> Option<Vec<u8>> {
        let text = &body[self.start..self.end()];
        let mut characters = Vec::with_capacity(self.octets);
        for line in text.chunks(self.line_octets + CRLF.len()) {
            characters.extend_from_slice(line.strip_suffix(CRLF).unwrap_or(line));
        }
        let content = WIDE.decode(&characters).ok()?;
        // By construction it comes back; but what is lost here is lost for good.
        characters.clear();
        put_lines(&content, self.line_octets, self.octets, &mut characters);
        (characters == text).then_some(content)
    }
}

const CRLF: &[u8] = b"\r\n";

/// Finds the texts of `octets_min` octets and more in a body that [`put_lines`] gives back byte for byte. Of one whose lines
/// are longer than half of that, or than [`LINE_OCTETS_MAX`], it is not said whether it is found.
///
/// Only some places are looked at, so close that each text has one of them in a full line: other bodies cost next to nothing.
pub fn find(body: &[u8], octets_min: usize) -> Vec<Base64Text> {
    let step = (octets_min / 2).max(1);
    let mut found = Vec::new();
    // A line begins here, and nothing before it is looked at again.
    let mut floor = 0;
    let mut at = 0;
    while at < body.len() {
        if let Some(line) = full_line_around(body, floor, at) {
            let start = first_line_like(body, floor, &line);
            let text = text_from(body, start, line.len());
            floor = text.end();
            if text.octets >= octets_min {
                found.push(text);
            }
        }
        at = (at + 1).max(floor).next_multiple_of(step);
    }
    found
}

/// The full line that an octet belongs to.
fn full_line_around(body: &[u8], floor: usize, at: usize) -> Option<Range<usize>> {
    let nearest = at.saturating_sub(LINE_OCTETS_MAX + CRLF.len()).max(floor);
    let start = match memrchr(b'\n', &body[nearest..at]) {
        Some(before) => nearest + before + 1,
        None if nearest == floor => floor,
        None => return None,
    };
    let furthest = body.len().min(start + LINE_OCTETS_MAX + CRLF.len());
    let end = start + memchr(b'\n', &body[start..furthest])?;
    let line = start..end.checked_sub(1).filter(|&end| end >= start && body[end] == b'\r')?;
    is_full(&body[line.clone()]).then_some(line)
}

/// Where the first of the lines begins that come before a line, have its length and are full, too.
fn first_line_like(body: &[u8], floor: usize, line: &Range<usize>) -> usize {
    let step = line.len() + CRLF.len();
    let mut start = line.start;
    while let Some(before) = start.checked_sub(step).filter(|&before| before >= floor) {
        let begins_line = before == floor || body[before - 1] == b'\n';
        let text = &body[before..start];
        if !begins_line || !text.ends_with(CRLF) || !is_base64(&text[..line.len()]) {
            break;
        }
        start = before;
    }
    start
}

/// The text that begins with a full line.
fn text_from(body: &[u8], start: usize, line_octets: usize) -> Base64Text {
    let step = line_octets + CRLF.len();
    let mut end = start;
    while let Some(line) = body.get(end..end + step) {
        if !line.ends_with(CRLF) || !is_base64(&line[..line_octets]) {
            break;
        }
        end += step;
    }
    end += last_line(&body[end..], line_octets);
    Base64Text { start, octets: end - start, line_octets }
}

/// How long a line is, with its end, that ends a text of lines of this length; 0 if there is none.
fn last_line(rest: &[u8], line_octets: usize) -> usize {
    let near = &rest[..rest.len().min(line_octets + CRLF.len())];
    let (line, octets) = match memchr(b'\n', near) {
        Some(end) => match near[..end].strip_suffix(b"\r") {
            Some(line) => (line, end + 1),
            None => return 0,
        },
        None if near.len() == rest.len() => (rest, rest.len()),
        None => return 0,
    };
    let mut content = [0; LINE_OCTETS_MAX];
    // It says so also if there is padding that is too short, or bits that say nothing: those would not come back.
    let is_last = (1..=line_octets).contains(&line.len());
    let is_canonical = is_last && STANDARD.decode_slice(line, &mut content).is_ok();
    if is_canonical { octets } else { 0 }
}

fn is_full(line: &[u8]) -> bool {
    (LINE_OCTETS_MIN..=LINE_OCTETS_MAX).contains(&line.len()) && line.len().is_multiple_of(4) && is_base64(line)
}

/// Whether all octets are of the alphabet. Without a branch: this looks at many of them at once.
fn is_base64(octets: &[u8]) -> bool {
    let is_one = |octet: u8| {
        let is_letter = (octet | 0x20).wrapping_sub(b'a') < 26;
        // '/' comes right before '0'.
        let is_digit = octet.wrapping_sub(b'/') < 11;
        is_letter | is_digit | (octet == b'+')
    };
    octets.iter().fold(true, |all, &octet| all & is_one(octet))
}

/// Characters that are encoded at once, at least.
const ENCODED_OCTETS: usize = 4 << 10;

/// Appends the text of a content: base64 in lines of `line_octets`, each with CRLF, of all of it the first `octets`.
pub fn put_lines(content: &[u8], line_octets: usize, octets: usize, out: &mut Vec<u8>) {
    let line_octets = (line_octets / 4 * 4).clamp(4, LINE_OCTETS_MAX);
    let at_once = (ENCODED_OCTETS / line_octets).max(1) * (line_octets / 4 * 3);
    let start = out.len();
    out.reserve(content.len().div_ceil(3) * 4 + CRLF.len() * content.len().div_ceil(line_octets / 4 * 3));
    let mut encoded = [0; ENCODED_OCTETS];
    for some in content.chunks(at_once) {
        let len = WIDE.encode_slice(some, &mut encoded).expect("room for the characters");
        for line in encoded[..len].chunks(line_octets) {
            out.extend_from_slice(line);
            out.extend_from_slice(CRLF);
        }
    }
    out.truncate(out.len().min(start.saturating_add(octets)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OCTETS_MIN: usize = 4 << 10;

    fn text(content: &[u8], line_octets: usize) -> Vec<u8> {
        let mut text = Vec::new();
        put_lines(content, line_octets, usize::MAX, &mut text);
        text
    }

    fn content(octets: usize) -> Vec<u8> {
        (0..octets as u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    /// Takes a body apart and puts it together again; how many octets of it were base64.
    fn there_and_back(body: &[u8], octets_min: usize) -> usize {
        let (mut back, mut encoded) = (Vec::new(), 0);
        for text in find(body, octets_min) {
            assert!(text.octets >= octets_min);
            let mut octets = 0;
            for part in text.parts() {
                assert_eq!(part.start, text.start + octets, "parts follow each other");
                assert!(part.start >= back.len(), "texts overlap");
                octets += part.octets;
                back.extend_from_slice(&body[back.len()..part.start]);
                let content = part.content(body).expect("it comes back");
                assert!(content.len() < 256 << 10);
                let before = back.len();
                put_lines(&content, part.line_octets, part.octets, &mut back);
                assert_eq!(back.len() - before, part.octets);
            }
            assert_eq!(octets, text.octets, "parts are the text");
            encoded += octets;
        }
        back.extend_from_slice(&body[back.len()..]);
        assert!(back == body);
        encoded
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
            text(&content(20_000), 1020),
            // A data URI in quoted-printable.
            text(&content(10_000), 76)
                .split(|&octet| octet == b'\n')
                .flat_map(|line| [&line[..line.len().saturating_sub(1)], b"=\r\n"].concat())
                .collect(),
            [&b"a".repeat(76)[..], b"\n"].concat().repeat(100),
            b"a".repeat(100_000),
        ];
        for (number, body) in cases.iter().enumerate() {
            let encoded = there_and_back(body, OCTETS_MIN);
            assert_eq!(encoded >= body.len() / 2, number < 8, "case {number}: {encoded} of {} octets", body.len());
        }
    }

    #[test]
    fn a_text_is_found_from_its_least_length_on_wherever_it_begins() {
        for line_octets in [40, 60, 64, 76, 1020] {
            let lines = OCTETS_MIN.div_ceil(line_octets + 2);
            let least = text(&content(lines * line_octets / 4 * 3), line_octets);
            let less = &least[..least.len() - line_octets - 2];
            for before in [0, 1, 2, 77, 2046, 2047, 2048, 2049, 4095, 5000] {
                let mut before = vec![b'-'; before];
                before.extend_from_slice(b"\r\n");
                let expected = Base64Text { start: before.len(), octets: least.len(), line_octets };
                let body = [&before[..], &least, b"\r\nfoot\r\n"].concat();
                assert_eq!(find(&body, OCTETS_MIN), [expected]);
                assert_eq!(find(&[&before[..], less, b"\r\nfoot\r\n"].concat(), OCTETS_MIN), []);
            }
        }
    }

    /// Pieces of which bodies are made up: base64, and what is nearly that.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let line_octets = prop_oneof![Just(76_usize), Just(72), Just(60), 4_usize..300, 1000_usize..1030];
        let base64 = (0_usize..9000, line_octets, any::<bool>()).prop_map(|(octets, line, has_whole_lines)| {
            let of_line = if has_whole_lines { (line / 4 * 3).max(3) } else { 1 };
            text(&content(octets / of_line * of_line), line)
        });
        let changed = (base64.clone(), any::<prop::sample::Index>(), prop::sample::select(&b"=-\r\n +/A\xff"[..]));
        let changed = changed.prop_map(|(mut text, at, octet)| {
            if !text.is_empty() {
                let at = at.index(text.len());
                text[at] = octet;
            }
            text
        });
        let cut = (base64.clone(), any::<prop::sample::Index>());
        let cut = cut.prop_map(|(text, at)| text[..at.index(text.len() + 1)].to_vec());
        let bare = base64.clone().prop_map(|text| text.into_iter().filter(|&octet| octet != b'\r').collect());
        let words = "[ -~\r\n]{0,200}".prop_map(String::into_bytes);
        let ends = prop::sample::select(vec![&b"\r\n"[..], b"\n", b"\r", b"==", b"=\r\n", b"QQ==\r\n", b"QR==\r\n"]);
        prop_oneof![3 => base64, 2 => changed, 2 => cut, 1 => bare, 2 => words, 2 => ends.prop_map(<[u8]>::to_vec)]
    }

    proptest! {
        #[test]
        fn bodies_of_odd_shapes_come_back(pieces in prop::collection::vec(piece(), 0..8), octets_min in 100_usize..5000) {
            let body = pieces.concat();
            there_and_back(&body, octets_min);
            // Looking at every line finds no less.
            let everywhere: usize = find(&body, 1).iter().filter(|text| text.octets >= octets_min).count();
            let long = |text: &&Base64Text| text.line_octets + 2 > octets_min / 2;
            let missed = find(&body, 1).iter().filter(long).count();
            prop_assert!(find(&body, octets_min).len() + missed >= everywhere);
        }
    }
}
