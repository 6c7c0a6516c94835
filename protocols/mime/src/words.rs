//! Header text as people read it: encoded words (RFC 2047) and parameters with charsets and continuations (RFC 2231).

use memchr::memmem;

use crate::charset::Charset;
use crate::header::{Tokens, for_each_parameter};
use crate::transfer::TransferEncoding;

/// An encoded word, or several of one charset one after another: a character may be cut between them.
struct Words {
    charset: Charset,
    bytes: Vec<u8>,
}

impl Words {
    fn flush(&mut self, out: &mut String) {
        if !self.bytes.is_empty() {
            out.push_str(&self.charset.decode(&self.bytes));
            self.bytes.clear();
        }
    }
}

/// Appends a field's value as text: unfolded, with its encoded words decoded wherever they stand, also where RFC 2047, 5 does
/// not want them, as within quotes. White space between encoded words is dropped (RFC 2047, 6.2). One pass, whatever comes.
pub fn push_decoded(out: &mut String, value: &[u8]) {
    // Most fields have no encoded words, and one octet tells.
    if memchr::memchr(b'=', value).is_none() {
        return push_plain(out, value);
    }
    let mut words = Words { charset: Charset::Utf8, bytes: Vec::new() };
    let (mut rest, mut after_word) = (value, false);
    let finder = memmem::Finder::new(b"=?");
    // Where no word can end there is none; asked once, so that a text full of beginnings takes no longer.
    let last_end = memmem::rfind(value, b"?=").unwrap_or(0);
    let mut plain_from = 0; // in `rest`: looked at already
    while let Some(distance) = finder.find(&rest[plain_from..]) {
        let start = plain_from + distance;
        if value.len() - rest.len() + start >= last_end {
            break;
        }
        let Some((charset, encoding, encoded, end)) = encoded_word(&rest[start..]) else {
            plain_from = start + 2;
            continue;
        };
        let before = &rest[..start];
        let is_gap = after_word && before.iter().all(|b| matches!(b, b' ' | b'\t' | b'\r' | b'\n'));
        if !is_gap || charset != words.charset {
            words.flush(out);
        }
        if !is_gap {
            push_plain(out, before);
        }
        words.charset = charset;
        decode_word(encoding, encoded, &mut words.bytes);
        rest = &rest[start + end..];
        (after_word, plain_from) = (true, 0);
    }
    words.flush(out);
    push_plain(out, rest);
}

/// Text without encoded words, unfolded. It should be ASCII, and is UTF-8 in good mail (RFC 6532).
fn push_plain(out: &mut String, text: &[u8]) {
    if memchr::memchr2(b'\r', b'\n', text).is_none() {
        return Charset::Utf8.decoder().decode(text, true, out);
    }
    let mut decoder = Charset::Utf8.decoder();
    for piece in text.split(|b| matches!(b, b'\r' | b'\n')) {
        decoder.decode(piece, false, out);
    }
    decoder.decode(b"", true, out);
}

/// `encoded-word = "=?" charset ["*" language] "?" encoding "?" encoded-text "?="` at the start of `text`: the charset, the
/// encoding, the text, and the length of all.
fn encoded_word(text: &[u8]) -> Option<(Charset, u8, &[u8], usize)> {
    const CHARSET_BYTES_MAX: usize = 80;
    let inner = text.strip_prefix(b"=?")?;
    let charset_end = memchr::memchr(b'?', &inner[..inner.len().min(CHARSET_BYTES_MAX)])?;
    let charset = inner[..charset_end].split(|&b| b == b'*').next().unwrap_or_default();
    if charset.iter().any(|b| !b.is_ascii_graphic()) {
        return None;
    }
    let [encoding @ (b'b' | b'B' | b'q' | b'Q'), b'?', encoded @ ..] = &inner[charset_end + 1..] else { return None };
    let end = memmem::find(encoded, b"?=")?;
    let length = text.len() - encoded.len() + end + 2;
    Some((Charset::named(charset).unwrap_or_default(), encoding.to_ascii_lowercase(), &encoded[..end], length))
}

fn decode_word(encoding: u8, encoded: &[u8], out: &mut Vec<u8>) {
    if encoding == b'b' {
        return TransferEncoding::Base64.decoder().decode(encoded, out);
    }
    // Q is quoted-printable, with `_` for a space (RFC 2047, 4.2): an `_` itself is written `=5F`.
    let spaced: Vec<u8> = encoded.iter().map(|&b| if b == b'_' { b' ' } else { b }).collect();
    TransferEncoding::QuotedPrintable.decoder().decode(&spaced, out);
}

/// A value as text.
pub fn decoded(value: &[u8]) -> String {
    let mut out = String::with_capacity(value.len());
    push_decoded(&mut out, value.trim_ascii());
    out
}

/// One piece of a parameter that may come in several.
struct Section {
    name: Vec<u8>,
    number: u32,
    is_extended: bool,
    value: Vec<u8>,
}

/// The parameters of a Content-Type or Content-Disposition as text: continuations joined, charsets and encoded words decoded
/// (RFC 2231, 3 and 4).
pub fn decoded_parameters(value: &[u8]) -> Vec<(String, String)> {
    let mut sections: Vec<Section> = Vec::new();
    for_each_parameter(&mut Tokens::new(value), |name, tokens| {
        let mut value = Vec::new();
        tokens.push_parameter_value(&mut value);
        let (name, is_extended) = match name.strip_suffix(b"*") {
            Some(name) => (name, true),
            None => (name, false),
        };
        let star = memchr::memchr(b'*', name);
        let number = star.and_then(|star| std::str::from_utf8(&name[star + 1..]).ok()?.parse::<u32>().ok());
        let (name, number) = match (star, number) {
            (Some(star), Some(number)) => (&name[..star], number),
            _ => (name, 0),
        };
        sections.push(Section { name: name.to_ascii_lowercase(), number, is_extended, value });
    });
    sections.sort_by(|a, b| (&a.name, a.number).cmp(&(&b.name, b.number)));
    let mut found = Vec::new();
    for sections in sections.chunk_by(|a, b| a.name == b.name) {
        let (mut charset, mut bytes, mut any_extended) = (Charset::Utf8, Vec::new(), false);
        for (position, section) in sections.iter().enumerate() {
            let mut value = &section.value[..];
            if section.is_extended && position == 0 {
                let mut pieces = value.splitn(3, |&b| b == b'\'');
                if let (Some(name), Some(_), Some(text)) = (pieces.next(), pieces.next(), pieces.next()) {
                    (charset, value) = (Charset::named(name).unwrap_or_default(), text);
                }
            }
            any_extended |= section.is_extended;
            if section.is_extended { push_percent_decoded(value, &mut bytes) } else { bytes.extend_from_slice(value) }
        }
        let name = String::from_utf8_lossy(&sections[0].name).into_owned();
        found.push((name, if any_extended { charset.decode(&bytes) } else { decoded(&bytes) }));
    }
    found
}

/// `ext-octet = "%" 2(DIGIT / "A" / "B" / "C" / "D" / "E" / "F")` (RFC 2231, 7)
pub(crate) fn push_percent_decoded(value: &[u8], out: &mut Vec<u8>) {
    let hex = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16)).map(|digit| digit as u8);
    let mut at = 0;
    while let Some(&b) = value.get(at) {
        match (b, hex(value.get(at + 1)), hex(value.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push(high << 4 | low);
                at += 3;
            }
            _ => {
                out.push(b);
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 2047, 8.
    #[test]
    fn rfc_2047_examples() {
        for (value, text) in [
            ("(=?ISO-8859-1?Q?a?=)", "(a)"),
            ("(=?ISO-8859-1?Q?a?= b)", "(a b)"),
            ("(=?ISO-8859-1?Q?a?= =?ISO-8859-1?Q?b?=)", "(ab)"),
            ("(=?ISO-8859-1?Q?a?=  =?ISO-8859-1?Q?b?=)", "(ab)"),
            ("(=?ISO-8859-1?Q?a?=\r\n    =?ISO-8859-1?Q?b?=)", "(ab)"),
            ("(=?ISO-8859-1?Q?a_b?=)", "(a b)"),
            ("(=?ISO-8859-1?Q?a?= =?ISO-8859-2?Q?_b?=)", "(a b)"),
            ("=?US-ASCII?Q?Keith_Moore?= <moore@cs.utk.edu>", "Keith Moore <moore@cs.utk.edu>"),
            ("=?ISO-8859-1?Q?Patrik_F=E4ltstr=F6m?= <paf@nada.kth.se>", "Patrik Fältström <paf@nada.kth.se>"),
            (
                "=?ISO-8859-1?B?SWYgeW91IGNhbiByZWFkIHRoaXMgeW8=?=\r\n =?ISO-8859-2?B?dSB1bmRlcnN0YW5kIHRoZSBleGFtcGxlLg==?=",
                "If you can read this you understand the example.",
            ),
            // RFC 2231, 5: the language.
            ("=?US-ASCII*EN?Q?Keith_Moore?=", "Keith Moore"),
        ] {
            assert_eq!(decoded(value.as_bytes()), text, "{value}");
        }
    }

    #[test]
    fn what_real_mail_does() {
        assert_eq!(decoded("=?utf-8?B?w6k=?= =?utf-8?B?w7w?=".as_bytes()), "éü");
        assert_eq!(decoded(b"=?utf-8?Q?=C3?= =?utf-8?Q?=A9?="), "é", "a character cut between words");
        assert_eq!(decoded("Grüße\r\n aus\tX".as_bytes()), "Grüße aus\tX");
        assert_eq!(decoded(b"caf\xe9"), "café");
        assert_eq!(decoded(b"=?x-unknown?Q?a=E9?="), "aé");
        assert_eq!(decoded(b"\"=?utf-8?Q?a,b?=\" <c@d>"), "\"a,b\" <c@d>");
        for plain in ["=?", "=?a?q", "=?a?x?b?=", "=??", "a =?utf-8?q?b", "=?a b?q?c?="] {
            assert_eq!(decoded(plain.as_bytes()), plain);
        }
    }

    /// RFC 2231, 3 to 4.1.
    #[test]
    fn rfc_2231_examples() {
        let of = |value: &str| decoded_parameters(value.as_bytes());
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            of(
                "message/external-body; access-type=URL;\r\n URL*0=\"ftp://\";\r\n URL*1=\"cs.utk.edu/pub/moore/x.tar\""
            ),
            [pair("access-type", "URL"), pair("url", "ftp://cs.utk.edu/pub/moore/x.tar")]
        );
        assert_eq!(
            of("application/x-stuff; title*=us-ascii'en-us'This%20is%20%2A%2A%2Afun%2A%2A%2A"),
            [pair("title", "This is ***fun***")]
        );
        assert_eq!(
            of("application/x-stuff; title*2=\"isn't it!\"; title*0*=us-ascii'en'This%20is%20even%20more%20; \
                title*1*=%2A%2A%2Afun%2A%2A%2A%20"),
            [pair("title", "This is even more ***fun*** isn't it!")]
        );
        assert_eq!(of("x/y; filename*=iso-8859-1''%A3"), [pair("filename", "£")]);
        assert_eq!(of("x/y; name=\"=?utf-8?Q?=C3=BC?=\""), [pair("name", "ü")]);
    }

    /// Trap 33: hostile words take linear time.
    #[test]
    fn trap_33_words_take_linear_time() {
        let start = std::time::Instant::now();
        for hostile in ["=?a?q?", "=?", "=?utf-8?q?a?= ", "=?a?q?b ?= =?", "=?=?=?"] {
            let value = hostile.repeat(2_000_000 / hostile.len());
            push_decoded(&mut String::new(), value.as_bytes());
            push_decoded(&mut String::new(), format!("{value}?=").as_bytes());
        }
        assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    }

    proptest! {
        #[test]
        fn never_panics(value in prop::collection::vec(prop::sample::select(b"=?qb*utf-8_ \r\n\xc3\xa9'%0;\"".to_vec()), 0..60)) {
            decoded(&value);
            decoded_parameters(&value);
        }
    }
}
