//! Strings, numbers and sequence sets, as responses have them.

/// Appends decimal digits: on every FETCH response several times, so without the formatting machinery.
pub fn write_number(out: &mut Vec<u8>, mut n: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// `string = quoted / literal`: quoted where it is short and 7-bit without CR, LF or NUL.
pub fn write_string(out: &mut Vec<u8>, bytes: &[u8]) {
    const QUOTED_BYTES_MAX: usize = 1024;
    // Both are found in one pass without branches: most strings are short and need neither.
    let (needs_literal, needs_escape) = bytes.iter().fold((false, false), |(literal, escape), &b| {
        (literal | (b == 0) | (b == b'\r') | (b == b'\n') | (b >= 0x80), escape | (b == b'"') | (b == b'\\'))
    });
    if needs_literal || bytes.len() > QUOTED_BYTES_MAX {
        return write_literal(out, bytes);
    }
    out.reserve(bytes.len() + 2);
    out.push(b'"');
    if needs_escape {
        for &b in bytes {
            if matches!(b, b'"' | b'\\') {
                out.push(b'\\');
            }
            out.push(b);
        }
    } else {
        out.extend_from_slice(bytes);
    }
    out.push(b'"');
}

/// `literal = "{" number64 "}" CRLF *CHAR8`
///
/// A NUL is no CHAR8. It is sent all the same: a message is given as it is stored, and its size must be the one that
/// was announced; clients that fetch such a message read on by the count.
pub fn write_literal(out: &mut Vec<u8>, bytes: &[u8]) {
    out.reserve(bytes.len() + 24);
    write_literal_start(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// What comes before the octets of a literal.
pub(super) fn write_literal_start(out: &mut Vec<u8>, len: u64) {
    out.push(b'{');
    write_number(out, len);
    out.extend_from_slice(b"}\r\n");
}

/// `nstring = string / nil`
pub fn write_nstring(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => write_string(out, bytes),
        None => out.extend_from_slice(b"NIL"),
    }
}

/// `astring = 1*ASTRING-CHAR / string`. NIL is quoted, because some clients take the atom for nothing.
pub fn write_astring(out: &mut Vec<u8>, bytes: &[u8]) {
    let plain = !bytes.is_empty()
        && bytes.iter().all(|&b| crate::command::is_astring_char(b))
        && !bytes.eq_ignore_ascii_case(b"NIL");
    if plain { out.extend_from_slice(bytes) } else { write_string(out, bytes) }
}

/// `uid-set`: runs, each written as a number or a range. The caller gives them coalesced.
pub fn write_sequence_set(out: &mut Vec<u8>, runs: impl IntoIterator<Item = (u32, u32)>) {
    for (i, (first, last)) in runs.into_iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        write_number(out, u64::from(first));
        if last != first {
            out.push(b':');
            write_number(out, u64::from(last));
        }
    }
}

/// `text = 1*TEXT-CHAR`: other characters are replaced, and nothing becomes a dash.
pub(super) fn write_text(out: &mut Vec<u8>, text: &str) {
    if text.is_empty() {
        out.push(b'-');
    }
    out.extend(text.bytes().map(|b| match b {
        b' '..=b'~' => b,
        b if b.is_ascii() => b' ',
        _ => b'?',
    }));
}

/// The text of a response code, in which `]` has no place.
pub(super) fn write_code_text(out: &mut Vec<u8>, name: &str, text: &str) {
    out.extend_from_slice(name.as_bytes());
    out.extend(text.bytes().map(|b| if matches!(b, b' '..=b'~') && b != b']' { b } else { b'?' }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(write: impl Fn(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn strings() {
        assert_eq!(written(|o| write_string(o, b"")), "\"\"");
        assert_eq!(written(|o| write_string(o, b"a\"\\b")), "\"a\\\"\\\\b\"");
        assert_eq!(written(|o| write_string(o, b"a\r\nb")), "{4}\r\na\r\nb");
        assert_eq!(written(|o| write_string(o, "é".as_bytes())), "{2}\r\né");
        assert_eq!(written(|o| write_string(o, b"\0")), "{1}\r\n\0");
        assert_eq!(written(|o| write_nstring(o, None)), "NIL");
    }

    #[test]
    fn astrings() {
        assert_eq!(written(|o| write_astring(o, b"INBOX")), "INBOX");
        assert_eq!(written(|o| write_astring(o, b"a]")), "a]");
        for quoted in ["", "a b", "a(b", "nil", "a%", "a*"] {
            assert_eq!(written(|o| write_astring(o, quoted.as_bytes())), format!("\"{quoted}\""));
        }
    }

    #[test]
    fn numbers_and_sets() {
        assert_eq!(written(|o| write_number(o, 0)), "0");
        assert_eq!(written(|o| write_number(o, u64::MAX)), u64::MAX.to_string());
        assert_eq!(written(|o| write_sequence_set(o, [(1, 1), (3, 5), (9, u32::MAX)])), "1,3:5,9:4294967295");
    }
}
