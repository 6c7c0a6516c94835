//! The first words of a message (RFC 8970): bounded in what is read and in what is kept.

/// Characters of a preview (RFC 8970, 3.1 asks for at most 256, and 200 as a rule).
const PREVIEW_CHARS_MAX: usize = 200;
/// Octets of the encoded body that are looked at: the second number only where the first did not fill the preview, because
/// text may begin with quotes, and HTML begins with much that is no text.
const READ_PLAIN_BYTES: [usize; 2] = [512, 4 * 1024];
const READ_HTML_BYTES: [usize; 2] = [2 * 1024, 16 * 1024];

/// How a text part is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextPart<'a> {
    pub body: &'a [u8],
    pub encoding: &'a [u8],
    pub charset: &'a [u8],
    pub is_html: bool,
}

/// The preview of a text: one line, quotes left out. Charsets other than UTF-8 and ISO 8859-1 give what is ASCII in them.
pub(crate) fn preview(text: TextPart<'_>) -> String {
    let [first, last] = if text.is_html { READ_HTML_BYTES } else { READ_PLAIN_BYTES };
    let squeezer = squeezed(text, first);
    if squeezer.is_full() || text.body.len() <= first { squeezer.out } else { squeezed(text, last).out }
}

fn squeezed(text: TextPart<'_>, read_bytes: usize) -> Squeezer {
    let body = &text.body[..text.body.len().min(read_bytes)];
    let decoded = if text.encoding.eq_ignore_ascii_case(b"base64") {
        decode_base64(body)
    } else if text.encoding.eq_ignore_ascii_case(b"quoted-printable") {
        decode_quoted_printable(body)
    } else {
        std::borrow::Cow::Borrowed(body)
    };
    let characters = to_utf8(&decoded, text.charset);
    let mut squeezer = Squeezer::default();
    // Both stop as soon as the preview is full.
    if text.is_html {
        push_without_tags(&mut squeezer, &characters);
    } else {
        push_without_quotes(&mut squeezer, &characters);
    }
    squeezer
}

fn to_utf8<'a>(bytes: &'a [u8], charset: &[u8]) -> std::borrow::Cow<'a, str> {
    let latin = [&b"iso-8859-1"[..], b"windows-1252", b"iso-8859-15"].iter().any(|c| charset.eq_ignore_ascii_case(c));
    if latin {
        return bytes.iter().map(|&b| char::from(b)).collect::<String>().into();
    }
    let unknown = [&b"utf-8"[..], b"us-ascii", b""].iter().all(|c| !charset.eq_ignore_ascii_case(c));
    if unknown && !bytes.is_ascii() {
        return bytes.iter().filter(|b| b.is_ascii()).map(|&b| char::from(b)).collect::<String>().into();
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        // Cut within a character, by us or by the sender.
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or_default().into()
        }
        Err(_) => String::from_utf8_lossy(bytes),
    }
}

fn decode_base64(body: &[u8]) -> std::borrow::Cow<'static, [u8]> {
    let mut out = Vec::with_capacity(body.len() / 4 * 3);
    let (mut bits, mut bit_count) = (0u32, 0);
    for &b in body {
        let value = match b {
            b'A'..=b'Z' => b - b'A',
            b'a'..=b'z' => b - b'a' + 26,
            b'0'..=b'9' => b - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => break,
            _ => continue,
        };
        bits = (bits << 6 | u32::from(value)) & 0xffff;
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            out.push((bits >> bit_count) as u8);
        }
    }
    out.into()
}

fn decode_quoted_printable(body: &[u8]) -> std::borrow::Cow<'static, [u8]> {
    let mut out = Vec::with_capacity(body.len());
    let mut rest = body;
    let hex = |b: u8| char::from(b).to_digit(16).map(|d| d as u8);
    while let Some(at) = memchr::memchr(b'=', rest) {
        out.extend_from_slice(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(b"\r\n").or(rest.strip_prefix(b"\n")) {
            rest = after;
        } else if let [high, low, after @ ..] = rest
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            out.push(high << 4 | low);
            rest = after;
        } else {
            out.push(b'=');
        }
    }
    out.extend_from_slice(rest);
    out.into()
}

/// Leaves out lines that quote, and what follows a signature mark. `None` once the preview is full.
fn push_without_quotes(out: &mut Squeezer, text: &str) -> Option<()> {
    let mut rest = text;
    while !rest.is_empty() {
        let end = memchr::memchr(b'\n', rest.as_bytes()).map_or(rest.len(), |end| end + 1);
        let (line, after) = rest.split_at(end);
        rest = after;
        if line.trim_end_matches(['\r', '\n']) == "-- " {
            break;
        }
        if !line.starts_with('>') {
            out.push(line)?;
        }
    }
    Some(())
}

/// Leaves out tags and what is within style and script. Entities of a few kinds become their characters. `None` once the
/// preview is full.
fn push_without_tags(out: &mut Squeezer, html: &str) -> Option<()> {
    let mut rest = html;
    while let Some(start) = memchr::memchr(b'<', rest.as_bytes()) {
        push_text(out, &rest[..start])?;
        rest = &rest[start..];
        let opens = |name: &str| rest.get(1..=name.len()).is_some_and(|tag| tag.eq_ignore_ascii_case(name));
        let end = if rest.starts_with("<!--") {
            rest.find("-->").map(|end| end + 3)
        } else if matches!(rest.as_bytes().get(1), Some(b's' | b'S' | b't' | b'T' | b'h' | b'H'))
            && let Some(name) = ["style", "script", "title", "head"].into_iter().find(|name| opens(name))
        {
            find_end_tag(rest, name)
        } else {
            memchr::memchr(b'>', rest.as_bytes()).map(|end| end + 1)
        };
        out.push(" ")?;
        rest = &rest[end.unwrap_or(rest.len())..];
    }
    push_text(out, rest)
}

/// The end of `</name ...>` in `html`.
fn find_end_tag(html: &str, name: &str) -> Option<usize> {
    let mut at = 0;
    while let Some(distance) = html[at..].find("</") {
        at += distance + 2;
        if html.get(at..at + name.len()).is_some_and(|tag| tag.eq_ignore_ascii_case(name)) {
            return html[at..].find('>').map(|end| at + end + 1);
        }
    }
    None
}

fn push_text(out: &mut Squeezer, text: &str) -> Option<()> {
    const ENTITIES: [(&str, &str); 7] =
        [("nbsp;", " "), ("amp;", "&"), ("lt;", "<"), ("gt;", ">"), ("quot;", "\""), ("#39;", "'"), ("zwnj;", "")];
    let mut rest = text;
    while let Some(start) = memchr::memchr(b'&', rest.as_bytes()) {
        out.push(&rest[..start])?;
        rest = &rest[start + 1..];
        match ENTITIES.iter().find(|(name, _)| rest.starts_with(name)) {
            Some((name, value)) => {
                out.push(value)?;
                rest = &rest[name.len()..];
            }
            None => out.push("&")?,
        }
    }
    out.push(rest)
}

/// One space between words, no control characters, and at most the length of a preview.
#[derive(Default)]
struct Squeezer {
    out: String,
    count: usize,
    space: bool,
}

impl Squeezer {
    fn is_full(&self) -> bool {
        self.count >= PREVIEW_CHARS_MAX - 1 // a space that would be the last character is not pushed
    }

    /// `None` once the preview is full.
    fn push(&mut self, text: &str) -> Option<()> {
        for c in text.chars() {
            match c {
                '!'..='~' => {}
                ' ' => {
                    self.space = true;
                    continue;
                }
                c if c.is_whitespace() || c.is_control() => {
                    self.space = true;
                    continue;
                }
                // Characters that pad the previews of bulk mail.
                '\u{200b}'..='\u{200f}' | '\u{feff}' | '\u{34f}' | '\u{ad}' => continue,
                _ => {}
            }
            let space = std::mem::take(&mut self.space) && self.count > 0;
            if self.count + usize::from(space) >= PREVIEW_CHARS_MAX {
                return None;
            }
            if space {
                self.out.push(' ');
                self.count += 1;
            }
            self.out.push(c);
            self.count += 1;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(body: &[u8], encoding: &str, charset: &str, is_html: bool) -> String {
        preview(TextPart { body, encoding: encoding.as_bytes(), charset: charset.as_bytes(), is_html })
    }

    #[test]
    fn plain_text() {
        assert_eq!(of(b"Hello,\r\n\r\n> quoted\r\n\tworld\x07!\r\n-- \r\nsig", "7bit", "", false), "Hello, world !");
        assert_eq!(of(b"caf=C3=A9 a=\r\nb =zz", "Quoted-Printable", "utf-8", false), "café ab =zz");
        assert_eq!(of(b"SGVs\r\nbG8=", "BASE64", "us-ascii", false), "Hello");
        assert_eq!(of(b"caf\xe9", "8bit", "ISO-8859-1", false), "café");
        assert_eq!(of(b"caf\xe9", "8bit", "koi8-r", false), "caf");
    }

    #[test]
    fn html() {
        let html =
            b"<html><head><title>t</title></head><style>p{}</style><!-- <b> --><p>A&nbsp;&amp;B<br>C &unknown;<b";
        assert_eq!(of(html, "7bit", "", true), "A &B C &unknown;");
    }

    /// Trap 35: short and truncated texts, and the bound.
    #[test]
    fn trap_35_bounded_and_truncated() {
        assert_eq!(of(b"", "base64", "utf-8", true), "");
        assert_eq!(of(b"a\xc3", "8bit", "utf-8", false), "a");
        assert_eq!(of(b"a\xc3b", "8bit", "utf-8", false), "a\u{fffd}b");
        assert_eq!(of("é".repeat(100_000).as_bytes(), "8bit", "utf-8", false).chars().count(), PREVIEW_CHARS_MAX);
        assert_eq!(of("<".repeat(1_000_000).as_bytes(), "8bit", "utf-8", true), "");
        of("</style<style".repeat(100_000).as_bytes(), "8bit", "utf-8", true);
    }

    proptest! {
        #[test]
        fn never_panics(body in prop::collection::vec(any::<u8>(), 0..300), pick in 0usize..3, is_html in any::<bool>()) {
            let text = of(&body, ["base64", "quoted-printable", "8bit"][pick], ["utf-8", "iso-8859-1", "x"][pick], is_html);
            prop_assert!(text.chars().count() <= PREVIEW_CHARS_MAX);
        }
    }
}
