//! Header fields (RFC 5322, 2.2) and the structured values of MIME fields (RFC 2045, 5.1).

use memchr::memchr;

/// The fields that a digest is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Known {
    Date,
    Subject,
    From,
    Sender,
    ReplyTo,
    To,
    Cc,
    Bcc,
    InReplyTo,
    MessageId,
    ContentType,
    ContentTransferEncoding,
    ContentId,
    ContentDescription,
    ContentDisposition,
    ContentMd5,
    ContentLanguage,
    ContentLocation,
}

const KNOWN_COUNT: usize = Known::ContentLocation as usize + 1;

/// Where the values of the known fields are, each with its folding, without the line end. Of a repeated field the first
/// counts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FieldIndex([Option<(u32, u32)>; KNOWN_COUNT]);

impl FieldIndex {
    pub fn value<'m>(&self, message: &'m [u8], field: Known) -> Option<&'m [u8]> {
        let (start, end) = self.0[field as usize]?;
        message.get(start as usize..end as usize)
    }

    fn note(&mut self, name: &[u8], start: usize, end: usize) {
        let Some(known) = known(name) else { return };
        let slot = &mut self.0[known as usize];
        if slot.is_none()
            && let (Ok(start), Ok(end)) = (u32::try_from(start), u32::try_from(end))
        {
            *slot = Some((start, end));
        }
    }
}

fn known(name: &[u8]) -> Option<Known> {
    use Known as K;
    let candidates: &[(&[u8], Known)] = match name.len() {
        2 => &[(b"to", K::To), (b"cc", K::Cc)],
        3 => &[(b"bcc", K::Bcc)],
        4 => &[(b"date", K::Date), (b"from", K::From)],
        6 => &[(b"sender", K::Sender)],
        7 => &[(b"subject", K::Subject)],
        8 => &[(b"reply-to", K::ReplyTo)],
        10 => &[(b"message-id", K::MessageId), (b"content-id", K::ContentId)],
        11 => &[(b"in-reply-to", K::InReplyTo), (b"content-md5", K::ContentMd5)],
        12 => &[(b"content-type", K::ContentType)],
        16 => &[(b"content-language", K::ContentLanguage), (b"content-location", K::ContentLocation)],
        19 => &[(b"content-description", K::ContentDescription), (b"content-disposition", K::ContentDisposition)],
        25 => &[(b"content-transfer-encoding", K::ContentTransferEncoding)],
        _ => return None,
    };
    candidates.iter().find(|(n, _)| name.eq_ignore_ascii_case(n)).map(|(_, known)| *known)
}

/// A header that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub body_offset: usize,
    pub fields: FieldIndex,
    /// It ended at a delimiter line instead of a blank one.
    pub ended_by_delimiter: bool,
}

/// Reads a header that begins at `start`. It ends after a blank line, at the end of the message, or before a line for which
/// `is_delimiter` says so; the line end before that one is not part of it then.
pub fn scan_header(message: &[u8], start: usize, is_delimiter: impl Fn(usize) -> bool) -> Header {
    let mut fields = FieldIndex::default();
    let mut at = start;
    while at < message.len() {
        match message[at] {
            b'\n' => return Header { body_offset: at + 1, fields, ended_by_delimiter: false },
            b'\r' if message.get(at + 1) == Some(&b'\n') => {
                return Header { body_offset: at + 2, fields, ended_by_delimiter: false };
            }
            b'-' if is_delimiter(at) => {
                let body_offset = start + without_line_end(&message[start..at]).len();
                return Header { body_offset, fields, ended_by_delimiter: true };
            }
            _ => {}
        }
        let end = field_end(message, at);
        let field = &message[at..end];
        if let Some(colon) = memchr(b':', &field[..field.len().min(80)]) {
            fields.note(
                field[..colon].trim_ascii_end(),
                at + colon + 1,
                at + field.trim_ascii_end().len().max(colon + 1),
            );
        }
        at = end;
    }
    Header { body_offset: at, fields, ended_by_delimiter: false }
}

/// `text` without one CRLF or LF at its end.
pub(crate) fn without_line_end(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\r\n").or_else(|| text.strip_suffix(b"\n")).unwrap_or(text)
}

/// The end of the field at `start`: after its last line that no continuation line follows.
pub(crate) fn field_end(message: &[u8], start: usize) -> usize {
    let mut at = start;
    while let Some(distance) = memchr(b'\n', &message[at..]) {
        at += distance + 1;
        if !matches!(message.get(at), Some(b' ' | b'\t')) {
            return at;
        }
    }
    message.len()
}

/// Appends a value without its folding (RFC 5322, 2.2.3) and without white space at its ends.
pub fn push_unfolded(out: &mut Vec<u8>, value: &[u8]) {
    let value = value.trim_ascii();
    if memchr::memchr2(b'\r', b'\n', value).is_none() {
        out.extend_from_slice(value);
    } else {
        out.extend(value.iter().copied().filter(|b| !matches!(b, b'\r' | b'\n')));
    }
}

/// Reads tokens, quoted strings and comments of a structured value (RFC 5322, 3.2; RFC 2045, 5.1).
#[derive(Debug, Clone)]
pub(crate) struct Tokens<'a> {
    value: &'a [u8],
    at: usize,
}

impl<'a> Tokens<'a> {
    pub fn new(value: &'a [u8]) -> Self {
        Self { value, at: 0 }
    }

    pub fn peek(&self) -> Option<u8> {
        self.value.get(self.at).copied()
    }

    pub fn bump(&mut self) {
        self.at += 1;
    }

    /// Takes octets that `accept` likes, and a sign at the beginning. Passes over one `separator` that follows.
    pub fn take_while(&mut self, accept: impl Fn(u8) -> bool, separator: u8) -> &'a [u8] {
        let rest = &self.value[self.at..];
        let sign = usize::from(rest.first() == Some(&b'-'));
        let end = rest.iter().skip(sign).position(|&b| !accept(b)).map_or(rest.len(), |end| end + sign);
        self.at += end + usize::from(end > 0 && rest.get(end) == Some(&separator));
        &rest[..end]
    }

    /// Takes `b` and the space before it, if it is next.
    pub fn eat(&mut self, b: u8) -> bool {
        self.skip_cfws();
        let found = self.peek() == Some(b);
        self.at += usize::from(found);
        found
    }

    /// Skips white space and comments. Comments nest, and may lack their end.
    pub fn skip_cfws(&mut self) {
        while let Some(b) = self.peek() {
            match b {
                b' ' | b'\t' | b'\r' | b'\n' => self.at += 1,
                b'(' => self.skip_comment(None),
                _ => return,
            }
        }
    }

    /// Skips a comment; its text, without inner parentheses and escapes, goes to `out`.
    pub fn skip_comment(&mut self, mut out: Option<&mut Vec<u8>>) {
        let mut depth = 0usize;
        while let Some(b) = self.peek() {
            self.at += 1;
            let mut text = b;
            match b {
                b'(' => {
                    depth += 1;
                    continue;
                }
                b')' => {
                    depth -= 1;
                    if depth == 0 {
                        return;
                    }
                    continue;
                }
                b'\\' => match self.peek() {
                    Some(escaped) => {
                        self.at += 1;
                        text = escaped;
                    }
                    None => return,
                },
                _ => {}
            }
            if let Some(out) = out.as_deref_mut()
                && !matches!(text, b'\r' | b'\n')
            {
                out.push(text);
            }
        }
    }

    /// `token = 1*<any (US-ASCII) CHAR except SPACE, CTLs, or tspecials>`; 8-bit octets pass too.
    pub fn token(&mut self) -> &'a [u8] {
        self.skip_cfws();
        let rest = &self.value[self.at..];
        let is_end = |b: &u8| *b <= b' ' || b"()<>@,;:\\\"/[]?=".contains(b);
        let end = rest.iter().position(is_end).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Appends `value = token / quoted-string`. What is neither, as unquoted text with `/` or `=` is, goes up to the next
    /// semicolon or white space.
    pub fn push_parameter_value(&mut self, out: &mut Vec<u8>) {
        self.skip_cfws();
        if self.peek() == Some(b'"') {
            return self.push_quoted(out);
        }
        let rest = &self.value[self.at..];
        let end = rest.iter().position(|b| matches!(b, b';' | b' ' | b'\t' | b'\r' | b'\n')).unwrap_or(rest.len());
        self.at += end;
        out.extend_from_slice(&rest[..end]);
    }

    /// Appends the content of a quoted string, unescaped and unfolded. Its end may be missing.
    pub fn push_quoted(&mut self, out: &mut Vec<u8>) {
        self.at += 1;
        while let Some(b) = self.peek() {
            self.at += 1;
            match b {
                b'"' => return,
                b'\\' => {
                    if let Some(escaped) = self.peek() {
                        self.at += 1;
                        out.push(escaped);
                    }
                }
                b'\r' | b'\n' => {}
                b => out.push(b),
            }
        }
    }

    /// Skips to after the next semicolon. False at the end.
    pub fn next_parameter(&mut self) -> bool {
        loop {
            self.skip_cfws();
            match self.peek() {
                None => return false,
                Some(b';') => {
                    self.at += 1;
                    return true;
                }
                Some(b'"') => self.push_quoted(&mut Vec::new()),
                Some(_) => self.at += 1,
            }
        }
    }
}

/// More parameters of one field are passed over.
pub(crate) const PARAMETERS_MAX: usize = 100;

/// The parameters that follow in a Content-Type or Content-Disposition: `f` gets each name, and appends the value with
/// [`Tokens::push_parameter_value`].
pub(crate) fn for_each_parameter(tokens: &mut Tokens<'_>, mut f: impl FnMut(&[u8], &mut Tokens<'_>)) {
    let mut count = 0;
    while count < PARAMETERS_MAX && tokens.next_parameter() {
        let name = tokens.token();
        if !name.is_empty() && tokens.eat(b'=') {
            f(name, tokens);
            count += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unfolded(value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        push_unfolded(&mut out, value);
        out
    }

    #[test]
    fn fields_and_body_offset() {
        let message = b"Subject: a\r\n b\r\nX: y\r\nsubject: c\r\nCC :\r\njunk\r\n\r\nbody";
        let Header { body_offset, fields, .. } = scan_header(message, 0, |_| false);
        assert_eq!(&message[body_offset..], b"body");
        assert_eq!(unfolded(fields.value(message, Known::Subject).unwrap()), b"a b");
        assert_eq!(fields.value(message, Known::Cc).map(unfolded), Some(vec![]));
        assert_eq!(fields.value(message, Known::To), None);
        let body_offset = |message: &[u8]| scan_header(message, 0, |_| false).body_offset;
        assert_eq!(body_offset(b""), 0);
        assert_eq!(body_offset(b"A: b"), 4);
        assert_eq!(body_offset(b"\r\nx"), 2);
        assert_eq!(body_offset(b"A: b\n\nx"), 6);
        assert_eq!(scan_header(b"A: b\r\n--b", 0, |_| true).body_offset, 4);
    }

    fn parameters(value: &[u8]) -> Vec<(String, String)> {
        let mut found = Vec::new();
        for_each_parameter(&mut Tokens::new(value), |name, tokens| {
            let mut out = Vec::new();
            tokens.push_parameter_value(&mut out);
            found.push((String::from_utf8_lossy(name).into(), String::from_utf8_lossy(&out).into()));
        });
        found
    }

    #[test]
    fn parameter_values() {
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(
            parameters(b"text/plain; charset=utf-8 (c); name=\"a;\\\"b\r\n c\" ;; x = y/z=;bad; q=\"open"),
            [pair("charset", "utf-8"), pair("name", "a;\"b c"), pair("x", "y/z="), pair("q", "open")]
        );
    }

    /// Trap 33: the number of parameters is bounded.
    #[test]
    fn trap_33_parameters_are_capped() {
        assert_eq!(parameters("; a=b".repeat(10_000).as_bytes()).len(), PARAMETERS_MAX);
    }

    /// Trap 34: a nested comment that ends in a backslash.
    #[test]
    fn trap_34_comment_without_end() {
        for value in [&b"a (b (c\\"[..], b"(((((", b"(\\", b"(a\\)", b"a; b=(x", b"\"a\\"] {
            parameters(value);
            Tokens::new(value).skip_cfws();
        }
    }

    proptest! {
        #[test]
        fn never_panics(value in prop::collection::vec(prop::sample::select(b"()\\\"; =/a\r\n\t@<>,".to_vec()), 0..60)) {
            parameters(&value);
            scan_header(&value, 0, |_| false);
        }
    }
}
