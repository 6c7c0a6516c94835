//! Content-Transfer-Encodings (RFC 2045, 6), decoded in pieces of any size. What is not of the encoding is passed over in base64
//! and stays as it is in quoted-printable (RFC 2045, 6.7 and 6.8).

use memchr::memchr;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TransferEncoding {
    /// 7bit, 8bit, binary, and whatever is not known.
    #[default]
    Identity,
    Base64,
    QuotedPrintable,
}

impl TransferEncoding {
    pub fn named(name: &[u8]) -> Self {
        if name.eq_ignore_ascii_case(b"base64") {
            Self::Base64
        } else if name.eq_ignore_ascii_case(b"quoted-printable") {
            Self::QuotedPrintable
        } else {
            Self::Identity
        }
    }

    pub fn decoder(self) -> TransferDecoder {
        match self {
            Self::Identity => TransferDecoder::Identity,
            Self::Base64 => TransferDecoder::Base64 { bits: 0, bit_count: 0 },
            Self::QuotedPrintable => TransferDecoder::QuotedPrintable(Escape::None),
        }
    }
}

#[derive(Debug)]
pub enum TransferDecoder {
    Identity,
    Base64 { bits: u32, bit_count: u32 },
    QuotedPrintable(Escape),
}

/// What has come of an escape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Escape {
    None,
    /// `=`
    Equals,
    /// `=` and the first digit.
    Digit(u8),
    /// `=` and white space, which a gateway may have added before the line end.
    Space,
    /// `=`, perhaps white space, and CR.
    Return,
}

impl TransferDecoder {
    pub fn decode(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        match self {
            Self::Identity => out.extend_from_slice(bytes),
            Self::Base64 { bits, bit_count } => {
                for &b in bytes {
                    let value = match b {
                        b'A'..=b'Z' => b - b'A',
                        b'a'..=b'z' => b - b'a' + 26,
                        b'0'..=b'9' => b - b'0' + 52,
                        b'+' => 62,
                        b'/' => 63,
                        // Another text may follow: some software joins what it has encoded.
                        b'=' => {
                            (*bits, *bit_count) = (0, 0);
                            continue;
                        }
                        _ => continue,
                    };
                    *bits = (*bits << 6 | u32::from(value)) & 0xffff;
                    *bit_count += 6;
                    if *bit_count >= 8 {
                        *bit_count -= 8;
                        out.push((*bits >> *bit_count) as u8);
                    }
                }
            }
            Self::QuotedPrintable(escape) => decode_quoted_printable(escape, bytes, out),
        }
    }
}

fn decode_quoted_printable(escape: &mut Escape, bytes: &[u8], out: &mut Vec<u8>) {
    let hex = |b: u8| char::from(b).to_digit(16).map(|digit| digit as u8);
    let mut rest = bytes;
    while let Some(&b) = rest.first() {
        let (next, taken) = match (*escape, b) {
            (Escape::None, b'=') => (Escape::Equals, 1),
            (Escape::None, _) => {
                let end = memchr(b'=', rest).unwrap_or(rest.len());
                out.extend_from_slice(&rest[..end]);
                (Escape::None, end)
            }
            (Escape::Digit(first), b) => match (hex(first), hex(b)) {
                (Some(high), Some(low)) => {
                    out.push(high << 4 | low);
                    (Escape::None, 1)
                }
                _ => {
                    out.extend_from_slice(&[b'=', first]);
                    (Escape::None, 0)
                }
            },
            (Escape::Equals | Escape::Space | Escape::Return, b'\n') => (Escape::None, 1),
            (Escape::Equals | Escape::Space, b'\r') => (Escape::Return, 1),
            (Escape::Equals | Escape::Space, b' ' | b'\t') => (Escape::Space, 1),
            (Escape::Equals, b) if hex(b).is_some() => (Escape::Digit(b), 1),
            (Escape::Equals, _) => {
                out.push(b'=');
                (Escape::None, 0)
            }
            (Escape::Space | Escape::Return, _) => {
                out.extend_from_slice(b"= ");
                (Escape::None, 0)
            }
        };
        *escape = next;
        rest = &rest[taken..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decoded(encoding: &str, text: &str) -> String {
        let mut out = Vec::new();
        TransferEncoding::named(encoding.as_bytes()).decoder().decode(text.as_bytes(), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn encodings() {
        assert_eq!(decoded("8bit", "a=3D"), "a=3D");
        assert_eq!(decoded("BASE64", "SGVs\r\nbG8=\r\nSGVsbG8="), "HelloHello");
        assert_eq!(decoded("Quoted-Printable", "a=3Db=\r\nc= \t\r\nd=\ne=c3=A9=zz= x"), "a=bcdeé=zz= x");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[=A-F0-9 a\r\n\t+/]{0,40}", base64 in any::<bool>(), at in any::<prop::sample::Index>()) {
            let encoding = if base64 { TransferEncoding::Base64 } else { TransferEncoding::QuotedPrintable };
            let at = at.index(text.len() + 1);
            let (mut whole, mut pieces) = (Vec::new(), Vec::new());
            encoding.decoder().decode(text.as_bytes(), &mut whole);
            let mut decoder = encoding.decoder();
            decoder.decode(&text.as_bytes()[..at], &mut pieces);
            decoder.decode(&text.as_bytes()[at..], &mut pieces);
            prop_assert_eq!(whole, pieces);
        }
    }
}
