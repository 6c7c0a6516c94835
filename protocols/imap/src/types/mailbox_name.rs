//! Mailbox names: UTF-8 inside, modified UTF-7 (RFC 3501, 5.1.3) or UTF-8 (RFC 9051, 5.1) on the wire.

/// The name of a mailbox in UTF-8, without control characters. INBOX, however a client spells it, is `INBOX`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MailboxName(String);

/// Why a name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MailboxNameError {
    #[error("Mailbox name is not valid modified UTF-7")]
    Utf7,
    #[error("Mailbox name is not valid UTF-8")]
    Utf8,
    #[error("Mailbox name holds control characters")]
    Control,
    #[error("Mailbox name is too long")]
    TooLong,
}

/// In UTF-8 octets. Bounds the work of LIST and the size of the index.
const NAME_BYTES_MAX: usize = 1000;

impl MailboxName {
    /// A name known to be good: our own.
    pub fn from_utf8(name: &str) -> Self {
        Self(if name.eq_ignore_ascii_case("INBOX") { "INBOX".to_owned() } else { name.to_owned() })
    }

    /// A name from the wire. `utf8` after ENABLE IMAP4rev2 or UTF8=ACCEPT; without it the name is modified UTF-7, and
    /// raw UTF-8, which many clients send, is taken for what it is.
    ///
    /// # Errors
    /// What is wrong with the name; the server answers NO [CANNOT].
    pub fn parse(wire: &[u8], utf8: bool) -> Result<Self, MailboxNameError> {
        let text = std::str::from_utf8(wire).map_err(|_| MailboxNameError::Utf8)?;
        let name = if utf8 || !text.contains('&') { text.to_owned() } else { decode_utf7(text)? };
        if name.len() > NAME_BYTES_MAX {
            return Err(MailboxNameError::TooLong);
        }
        if name.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')) {
            return Err(MailboxNameError::Control);
        }
        Ok(Self::from_utf8(&name))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn is_inbox(&self) -> bool {
        self.0 == "INBOX"
    }

    /// The name in modified UTF-7.
    pub fn to_utf7(&self) -> std::borrow::Cow<'_, str> {
        if self.0.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'&') {
            return std::borrow::Cow::Borrowed(&self.0);
        }
        std::borrow::Cow::Owned(encode_utf7(&self.0))
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+,";

fn encode_utf7(name: &str) -> String {
    let mut out = String::with_capacity(name.len() * 2);
    let (mut bits, mut bit_count, mut shifted) = (0u32, 0u32, false);
    let end_shift = |out: &mut String, bits: &mut u32, bit_count: &mut u32, shifted: &mut bool| {
        if *bit_count > 0 {
            out.push(char::from(ALPHABET[(*bits << (6 - *bit_count) & 63) as usize]));
        }
        if std::mem::take(shifted) {
            out.push('-');
        }
        (*bits, *bit_count) = (0, 0);
    };
    for c in name.chars() {
        if matches!(c, ' '..='~') {
            end_shift(&mut out, &mut bits, &mut bit_count, &mut shifted);
            out.push(c);
            if c == '&' {
                out.push('-');
            }
            continue;
        }
        if !std::mem::replace(&mut shifted, true) {
            out.push('&');
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            bits = (bits << 16) | u32::from(*unit);
            bit_count += 16;
            while bit_count >= 6 {
                bit_count -= 6;
                out.push(char::from(ALPHABET[(bits >> bit_count & 63) as usize]));
            }
            bits &= (1 << bit_count) - 1;
        }
    }
    end_shift(&mut out, &mut bits, &mut bit_count, &mut shifted);
    out
}

/// Decodes, and refuses every form but the one that `encode_utf7` gives: superfluous shifts, encoded printable ASCII,
/// unfinished shifts. Two spellings of one name would be two mailboxes to some clients and one to others.
fn decode_utf7(text: &str) -> Result<String, MailboxNameError> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('&') {
        out.push_str(&rest[..start]);
        let inner = &rest[start + 1..];
        let end = inner.find('-').ok_or(MailboxNameError::Utf7)?;
        if end == 0 {
            out.push('&');
        } else {
            decode_base64_units(&inner.as_bytes()[..end], &mut out)?;
        }
        rest = &inner[end + 1..];
    }
    out.push_str(rest);
    // Raw UTF-8 beside shifts is in no form that could be given back.
    if encode_utf7(&out) == text { Ok(out) } else { Err(MailboxNameError::Utf7) }
}

fn decode_base64_units(digits: &[u8], out: &mut String) -> Result<(), MailboxNameError> {
    let (mut bits, mut bit_count) = (0u32, 0);
    let mut units = Vec::with_capacity(digits.len() * 6 / 16);
    for &digit in digits {
        let value = ALPHABET.iter().position(|&a| a == digit).ok_or(MailboxNameError::Utf7)?;
        bits = bits << 6 | value as u32;
        bit_count += 6;
        if bit_count >= 16 {
            bit_count -= 16;
            units.push((bits >> bit_count) as u16);
            bits &= (1 << bit_count) - 1;
        }
    }
    for c in char::decode_utf16(units) {
        out.push(c.map_err(|_| MailboxNameError::Utf7)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(wire: &str) -> Result<String, MailboxNameError> {
        MailboxName::parse(wire.as_bytes(), false).map(|n| n.0)
    }

    #[test]
    fn rfc_3501_examples() {
        assert_eq!(parse("~peter/mail/&U,BTFw-/&ZeVnLIqe-"), Ok("~peter/mail/台北/日本語".into()));
        assert_eq!(MailboxName::from_utf8("~peter/mail/台北/日本語").to_utf7(), "~peter/mail/&U,BTFw-/&ZeVnLIqe-");
        assert_eq!(parse("&Jjo-!"), Ok("☺!".into()));
        assert_eq!(parse("&Jjo!"), Err(MailboxNameError::Utf7));
        assert_eq!(parse("&U,BTFw-&ZeVnLIqe-"), Err(MailboxNameError::Utf7), "superfluous shift");
        assert_eq!(parse("&U,BTF2XlZyyKng-"), Ok("台北日本語".into()));
    }

    #[test]
    fn names() {
        assert_eq!(parse("iNbOx"), Ok("INBOX".into()));
        assert_eq!(parse("a&-b"), Ok("a&b".into()));
        assert_eq!(parse("é"), Ok("é".into()));
        assert_eq!(parse("&AGE-"), Err(MailboxNameError::Utf7), "printable ASCII encoded");
        assert_eq!(parse("&2D0-"), Err(MailboxNameError::Utf7), "half a surrogate pair");
        assert_eq!(parse("&AAo-"), Err(MailboxNameError::Control));
        assert_eq!(parse("a\tb"), Err(MailboxNameError::Control));
        // RFC 6855, 3: neither line nor paragraph separators.
        assert_eq!(parse("a\u{2028}b"), Err(MailboxNameError::Control));
        assert_eq!(parse("&ICk-"), Err(MailboxNameError::Control));
        assert_eq!(parse("&"), Err(MailboxNameError::Utf7));
        assert_eq!(parse(&"a".repeat(1001)), Err(MailboxNameError::TooLong));
        assert_eq!(MailboxName::parse(b"\xff", true), Err(MailboxNameError::Utf8));
        assert_eq!(MailboxName::parse(b"a&b", true).unwrap().as_str(), "a&b");
    }

    proptest! {
        #[test]
        fn round_trip(name in "[^\\pC\\p{Zl}\\p{Zp}]{0,30}") {
            let name = MailboxName::from_utf8(&name);
            let wire = name.to_utf7();
            prop_assert!(wire.bytes().all(|b| matches!(b, b' '..=b'~')));
            prop_assert_eq!(MailboxName::parse(wire.as_bytes(), false).unwrap(), name);
        }

        #[test]
        fn never_panics(wire in prop::collection::vec(any::<u8>(), 0..40), text in "[&A-Za-z+,-]{0,20}") {
            let _ = MailboxName::parse(&wire, false);
            if let Ok(name) = MailboxName::parse(text.as_bytes(), false) {
                prop_assert_eq!(name.to_utf7(), if name.is_inbox() { "INBOX" } else { &text });
            }
        }
    }
}
