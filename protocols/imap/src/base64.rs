//! Base64 of SASL exchanges (RFC 4648, 4) and the PLAIN message (RFC 4616, 2).

/// Decodes `base64 = *(4base64-char) [base64-terminal]`: no white space, no missing padding, no stray bits. What is not
/// in the one canonical form is `None`, because two readings of the same credentials are one too many.
pub fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let padding = text.iter().rev().take_while(|&&b| b == b'=').count();
    if padding > 2 {
        return None;
    }
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut bit_count) = (0u32, 0);
    for &b in &text[..text.len() - padding] {
        bits = bits << 6 | u32::from(value(b)?);
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            out.push((bits >> bit_count) as u8);
            bits &= (1 << bit_count) - 1;
        }
    }
    (bits == 0).then_some(out)
}

fn value(b: u8) -> Option<u8> {
    Some(match b {
        b'A'..=b'Z' => b - b'A',
        b'a'..=b'z' => b - b'a' + 26,
        b'0'..=b'9' => b - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

/// `message = [authzid] UTF8NUL authcid UTF8NUL passwd`: the three of them. An authzid that differs from the authcid
/// asks to act as someone else, and the caller must check that right.
pub fn decode_sasl_plain(message: &[u8]) -> Option<(&str, &str, &str)> {
    let mut fields = std::str::from_utf8(message).ok()?.split('\0');
    let (authzid, authcid, password) = (fields.next()?, fields.next()?, fields.next()?);
    let ok = fields.next().is_none() && !authcid.is_empty() && !password.is_empty();
    ok.then_some((authzid, authcid, password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_4648_vectors() {
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")] {
            assert_eq!(decode_base64(text.as_bytes()).as_deref(), Some(bytes.as_bytes()));
        }
    }

    /// Traps 6 and 9: broken or padded-out base64 is no credential, and no panic.
    #[test]
    fn trap_6_and_9_only_the_canonical_form() {
        for bad in
            ["Zg", "Zg=", "Zh==", "Zm9=", "=", "====", "Z===", "Zm9v\t", "Zm 9v", "Zg==Zg==", "Zm9v\n\n\n\n", "\u{e9}a"]
        {
            assert_eq!(decode_base64(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn plain_messages() {
        assert_eq!(decode_sasl_plain(b"\0tim\0tanstaaf"), Some(("", "tim", "tanstaaf")));
        assert_eq!(decode_sasl_plain(b"Ursel\0Kurt\0xipj3"), Some(("Ursel", "Kurt", "xipj3")));
        for bad in [&b""[..], b"tim", b"\0tim", b"\0\0x", b"\0tim\0", b"\0a\0b\0c", b"\0\xff\0x"] {
            assert_eq!(decode_sasl_plain(bad), None);
        }
    }
}
