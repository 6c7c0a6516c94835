//! Charsets: from octets to text, in pieces of any size.
//!
//! What is said to be US-ASCII or UTF-8, and what is said to be nothing or something unknown, is read as UTF-8, and octets that
//! are not UTF-8 as Windows-1252: mail says wrong things of itself, and these two are what it is.

use encoding_rs::{CoderResult, ISO_2022_JP, REPLACEMENT, UTF_8};

/// How octets become characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Charset {
    /// UTF-8, and Windows-1252 where it is none.
    #[default]
    Utf8,
    /// RFC 2152.
    Utf7,
    Other(&'static encoding_rs::Encoding),
}

/// Windows-1252 from 0x80 to 0x9f. All above are those of Unicode.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’',
    '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// Names beside those that `encoding_rs` knows (the WHATWG's, which have most of IANA's).
const ALIASES: [(&str, &str); 8] = [
    ("utf7", "utf-7"),
    ("unicode-1-1-utf-7", "utf-7"),
    ("csutf7", "utf-7"),
    ("cp932", "shift_jis"),
    ("cp936", "gbk"),
    ("cp949", "euc-kr"),
    ("cp950", "big5"),
    ("cp874", "windows-874"),
];

impl Charset {
    /// The charset of a name, if it is known. No name is US-ASCII (RFC 2045, 5.2).
    pub fn named(name: &[u8]) -> Option<Self> {
        let name = name.trim_ascii().to_ascii_lowercase();
        let alias = ALIASES.iter().find(|(alias, _)| alias.as_bytes() == name);
        let name = alias.map_or(&name[..], |(_, name)| name.as_bytes());
        if matches!(name, b"" | b"us-ascii" | b"ascii") {
            return Some(Self::Utf8);
        }
        if name == b"utf-7" {
            return Some(Self::Utf7);
        }
        match encoding_rs::Encoding::for_label(name)? {
            encoding if encoding == UTF_8 => Some(Self::Utf8),
            // Stands for charsets that browsers refuse to read.
            encoding if encoding == REPLACEMENT => None,
            encoding => Some(Self::Other(encoding)),
        }
    }

    /// Whether ASCII in it is ASCII, so that the atoms of a protocol have one meaning in it.
    pub fn keeps_ascii(self) -> bool {
        match self {
            Self::Utf8 => true,
            Self::Utf7 => false,
            Self::Other(encoding) => encoding.is_ascii_compatible() || encoding == ISO_2022_JP,
        }
    }

    /// All of `bytes` as text; `None` if they are not of this charset.
    pub fn decode_strictly(self, bytes: &[u8]) -> Option<String> {
        match self {
            Self::Utf8 => std::str::from_utf8(bytes).ok().map(str::to_owned),
            Self::Utf7 => Some(self.decode(bytes)),
            Self::Other(encoding) => {
                let (text, malformed) = encoding.decode_without_bom_handling(bytes);
                (!malformed).then(|| text.into_owned())
            }
        }
    }

    /// All of `bytes` as text, whatever they are.
    pub fn decode(self, bytes: &[u8]) -> String {
        let mut out = String::with_capacity(bytes.len());
        self.decoder().decode(bytes, true, &mut out);
        out
    }

    pub fn decoder(self) -> Decoder {
        match self {
            Self::Utf8 => Decoder::Utf8 { pending: [0; 4], len: 0 },
            Self::Utf7 => Decoder::Utf7(Utf7::default()),
            Self::Other(encoding) => Decoder::Other(encoding.new_decoder()),
        }
    }
}

/// Decodes a text that comes in pieces.
pub enum Decoder {
    /// The beginning of a character that the last piece ended within.
    Utf8 {
        pending: [u8; 4],
        len: usize,
    },
    Utf7(Utf7),
    Other(encoding_rs::Decoder),
}

impl Decoder {
    /// Whether ASCII may be taken as it is: nothing is pending, and the charset has no shifts.
    pub fn passes_ascii(&self) -> bool {
        matches!(self, Self::Utf8 { len: 0, .. })
    }

    /// Appends what `bytes` mean. `is_last` with the last piece.
    pub fn decode(&mut self, mut bytes: &[u8], is_last: bool, out: &mut String) {
        match self {
            Self::Utf8 { pending, len } => {
                // A character across pieces is put together octet by octet.
                while *len > 0 {
                    let unfinished = match std::str::from_utf8(&pending[..*len]) {
                        Ok(text) => {
                            out.push_str(text);
                            *len = 0;
                            break;
                        }
                        Err(error) => error.error_len().is_none(),
                    };
                    match bytes.split_first() {
                        Some((&first, rest)) if unfinished => {
                            pending[*len] = first;
                            *len += 1;
                            bytes = rest;
                        }
                        None if unfinished && !is_last => return,
                        _ => {
                            // The first octet stands for itself; those after it are looked at again.
                            out.push(single(pending[0]));
                            pending.copy_within(1.., 0);
                            *len -= 1;
                        }
                    }
                }
                loop {
                    let error = match std::str::from_utf8(bytes) {
                        Ok(text) => return out.push_str(text),
                        Err(error) => error,
                    };
                    let (valid, rest) = bytes.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    match error.error_len() {
                        None if !is_last => {
                            pending[..rest.len()].copy_from_slice(rest);
                            *len = rest.len();
                            return;
                        }
                        bad => {
                            let (bad, rest) = rest.split_at(bad.unwrap_or(rest.len()));
                            out.extend(bad.iter().map(|&b| single(b)));
                            bytes = rest;
                        }
                    }
                }
            }
            Self::Utf7(utf7) => utf7.decode(bytes, is_last, out),
            Self::Other(decoder) => {
                out.reserve(decoder.max_utf8_buffer_length(bytes.len()).unwrap_or(bytes.len()));
                loop {
                    let (result, read, _) = decoder.decode_to_string(bytes, out, is_last);
                    bytes = &bytes[read..];
                    match result {
                        CoderResult::InputEmpty => return,
                        CoderResult::OutputFull => out.reserve(bytes.len() + 64),
                    }
                }
            }
        }
    }
}

fn single(octet: u8) -> char {
    match octet {
        0x80..=0x9f => WINDOWS_1252[usize::from(octet - 0x80)],
        octet => char::from(octet),
    }
}

/// The state of a UTF-7 text: outside of a shift, or bits of UTF-16 that are not whole.
#[derive(Default)]
pub struct Utf7 {
    shifted: bool,
    /// Nothing has come since the shift began.
    fresh: bool,
    bits: u32,
    bit_count: u32,
    high_surrogate: Option<u16>,
}

impl Utf7 {
    fn decode(&mut self, bytes: &[u8], is_last: bool, out: &mut String) {
        for &b in bytes {
            if !self.shifted {
                if b == b'+' {
                    *self = Self { shifted: true, fresh: true, ..Self::default() };
                } else {
                    out.push(single(b));
                }
                continue;
            }
            let digit = match b {
                b'A'..=b'Z' => b - b'A',
                b'a'..=b'z' => b - b'a' + 26,
                b'0'..=b'9' => b - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => {
                    self.end_shift(out);
                    match b {
                        b'-' if self.fresh => out.push('+'),
                        b'-' => {}
                        b => out.push(single(b)),
                    }
                    continue;
                }
            };
            self.fresh = false;
            self.bits = (self.bits << 6) | u32::from(digit);
            self.bit_count += 6;
            if self.bit_count >= 16 {
                self.bit_count -= 16;
                let unit = (self.bits >> self.bit_count) as u16;
                self.bits &= (1 << self.bit_count) - 1;
                self.push_unit(unit, out);
            }
        }
        if is_last {
            self.end_shift(out);
        }
    }

    fn push_unit(&mut self, unit: u16, out: &mut String) {
        let high = self.high_surrogate.take();
        match unit {
            0xd800..=0xdbff => self.high_surrogate = Some(unit),
            _ => {
                let units = high.into_iter().chain([unit]);
                out.extend(char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)));
            }
        }
    }

    fn end_shift(&mut self, out: &mut String) {
        if self.high_surrogate.take().is_some() {
            out.push(char::REPLACEMENT_CHARACTER);
        }
        self.shifted = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(name: &str, bytes: &[u8]) -> String {
        Charset::named(name.as_bytes()).expect(name).decode(bytes)
    }

    #[test]
    fn names() {
        for name in ["", "US-ASCII", " utf8 ", "UTF-8"] {
            assert_eq!(Charset::named(name.as_bytes()), Some(Charset::Utf8), "{name}");
        }
        for name in ["iso-8859-1", "KOI8-R", "cp932", "windows-874", "gb18030", "EUC-KR", "utf-16le", "x-sjis"] {
            assert!(matches!(Charset::named(name.as_bytes()), Some(Charset::Other(_))), "{name}");
        }
        for name in ["unknown-8bit", "iso-2022-kr", "hz-gb-2312", "x", "\u{ff}"] {
            assert_eq!(Charset::named(name.as_bytes()), None, "{name}");
        }
        assert!(Charset::named(b"iso-2022-jp").is_some_and(Charset::keeps_ascii));
        assert!(!Charset::named(b"utf-16").is_some_and(Charset::keeps_ascii));
    }

    #[test]
    fn texts() {
        assert_eq!(decoded("us-ascii", "Grüße".as_bytes()), "Grüße");
        assert_eq!(decoded("utf-8", b"caf\xe9 \x80 \xe2\x82"), "café € â‚");
        assert_eq!(decoded("iso-8859-1", b"caf\xe9 \x80"), "café €", "Latin-1 is read as Windows-1252, as browsers do");
        assert_eq!(decoded("koi8-r", b"\xf0\xd2\xc9"), "При");
        assert_eq!(decoded("iso-2022-jp", b"\x1b$BF|K\\\x1b(B"), "日本");
        assert_eq!(decoded("gb2312", b"\xd6\xd0"), "中");
    }

    /// RFC 2152: its examples.
    #[test]
    fn utf_7() {
        assert_eq!(decoded("utf-7", b"A+ImIDkQ."), "A≢Α.");
        assert_eq!(decoded("utf-7", b"Hi Mom -+Jjo--!"), "Hi Mom -☺-!");
        assert_eq!(decoded("utf-7", b"+ZeVnLIqe-"), "日本語");
        assert_eq!(
            decoded("utf-7", b"1 +- 2 +2D3cAQ- +2D0-"),
            "1 + 2 🐁\u{0}".replace("🐁\u{0}", &decoded("utf-7", b"+2D3cAQ-")) + " \u{fffd}"
        );
    }

    #[test]
    fn strictly() {
        assert_eq!(Charset::Utf8.decode_strictly(b"\xe9"), None);
        assert_eq!(Charset::named(b"koi8-r").unwrap().decode_strictly(b"\xf0"), Some("П".into()));
        assert_eq!(Charset::named(b"iso-2022-jp").unwrap().decode_strictly(b"\xff"), None);
    }

    proptest! {
        /// Where the pieces end changes nothing.
        #[test]
        fn pieces_do_not_matter(
            bytes in prop::collection::vec(prop::sample::select(b"a+-/Z0\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\x1b$B(\xd6".to_vec()), 0..40),
            name in prop::sample::select(vec!["utf-8", "utf-7", "iso-2022-jp", "gb18030", "shift_jis"]),
            at in any::<prop::sample::Index>(),
        ) {
            let charset = Charset::named(name.as_bytes()).unwrap();
            let at = at.index(bytes.len() + 1);
            let mut decoder = charset.decoder();
            let mut out = String::new();
            decoder.decode(&bytes[..at], false, &mut out);
            decoder.decode(&bytes[at..], true, &mut out);
            prop_assert_eq!(out, charset.decode(&bytes));
        }
    }
}
