//! ENVELOPE, BODY and BODYSTRUCTURE (RFC 3501, 7.4.2; RFC 9051, 7.5.2), from the digest of a message.
//!
//! Header text with 8-bit octets never goes out as it is, unless the client has asked for UTF-8 (RFC 6855): it becomes
//! encoded words (RFC 2047), with the charset `unknown-8bit` (RFC 1428) where it is no UTF-8.

use posthaste_mime::digest::{ArchivedEnvelope, ArchivedPart, ArchivedRun, ArchivedText};
use posthaste_mime::{ArchivedDigest, structure::DEPTH_MAX};

use super::text::{write_nstring, write_number, write_string};

/// Appends `envelope` of the message itself. `utf8` after ENABLE UTF8=ACCEPT or IMAP4rev2.
pub fn write_envelope(out: &mut Vec<u8>, digest: &ArchivedDigest, utf8: bool) {
    Writer { out, digest, utf8, extended: false }.envelope(digest.envelope());
}

/// Appends `body` without extension data: the item BODY.
pub fn write_body(out: &mut Vec<u8>, digest: &ArchivedDigest, utf8: bool) {
    Writer { out, digest, utf8, extended: false }.part(0, 0);
}

/// Appends `body` with extension data: the item BODYSTRUCTURE.
pub fn write_body_structure(out: &mut Vec<u8>, digest: &ArchivedDigest, utf8: bool) {
    Writer { out, digest, utf8, extended: true }.part(0, 0);
}

struct Writer<'a> {
    out: &'a mut Vec<u8>,
    digest: &'a ArchivedDigest,
    utf8: bool,
    extended: bool,
}

/// What stands for a part that is not there, which is after damage only.
const EMPTY_PART: &[u8] = b"(\"text\" \"plain\" NIL NIL NIL \"7bit\" 0 0)";

impl Writer<'_> {
    /// `envelope = "(" env-date SP env-subject SP env-from SP env-sender SP env-reply-to SP env-to SP env-cc SP env-bcc SP
    /// env-in-reply-to SP env-message-id ")"`
    fn envelope(&mut self, envelope: Option<&ArchivedEnvelope>) {
        let Some(envelope) = envelope else {
            return self.raw("(NIL NIL NIL NIL NIL NIL NIL NIL NIL NIL)");
        };
        self.raw("(");
        self.nstring(&envelope.date);
        self.raw(" ");
        self.nstring(&envelope.subject);
        let lists = [&envelope.from, &envelope.sender, &envelope.reply_to, &envelope.to, &envelope.cc, &envelope.bcc];
        for list in lists {
            self.raw(" ");
            self.addresses(list);
        }
        self.raw(" ");
        self.nstring(&envelope.in_reply_to);
        self.raw(" ");
        self.nstring(&envelope.message_id);
        self.raw(")");
    }

    /// `env-from = "(" 1*address ")" / nil`, `address = "(" addr-name SP addr-adl SP addr-mailbox SP addr-host ")"`
    fn addresses(&mut self, list: &ArchivedRun) {
        let addresses = self.digest.addresses(list);
        if addresses.is_empty() {
            return self.raw("NIL");
        }
        self.raw("(");
        for address in addresses {
            self.raw("(");
            self.nstring(&address.name);
            self.raw(" ");
            self.nstring(&address.route);
            self.raw(" ");
            self.nstring(&address.mailbox);
            self.raw(" ");
            self.nstring(&address.host);
            self.raw(")");
        }
        self.raw(")");
    }

    /// `body = "(" (body-type-1part / body-type-mpart) ")"`. The depth of parts is bounded when a digest is made; a damaged
    /// one must not make this recurse deeper.
    fn part(&mut self, index: usize, depth: usize) {
        let part = match self.digest.parts().get(index) {
            Some(part) if depth <= DEPTH_MAX => part,
            _ => return self.out.extend_from_slice(EMPTY_PART),
        };
        self.raw("(");
        if part.is_multipart() {
            let mut children = self.digest.children(index).peekable();
            if children.peek().is_none() {
                // `body-type-mpart` has at least one. This is the one that `section::extent` finds.
                self.raw("(\"text\" \"plain\" NIL NIL NIL \"8bit\" ");
                write_number(self.out, u64::from(part.body_bytes.to_native()));
                self.raw(" ");
                write_number(self.out, u64::from(part.lines.to_native()));
                self.raw(")");
            }
            for child in children {
                self.part(child, depth + 1);
            }
            self.raw(" ");
            self.string(&part.subtype, "mixed");
            if self.extended {
                self.raw(" ");
                self.parameters(&part.parameters);
                self.extension(part);
            }
        } else {
            self.single_part(part, index, depth);
        }
        self.raw(")");
    }

    /// `body-type-1part = (body-type-basic / body-type-msg / body-type-text) [SP body-ext-1part]`
    fn single_part(&mut self, part: &ArchivedPart, index: usize, depth: usize) {
        self.string(&part.media_type, "application");
        self.raw(" ");
        self.string(&part.subtype, "octet-stream");
        // body-fields = body-fld-param SP body-fld-id SP body-fld-desc SP body-fld-enc SP body-fld-octets
        self.raw(" ");
        self.parameters(&part.parameters);
        self.raw(" ");
        self.nstring(&part.id);
        self.raw(" ");
        self.nstring(&part.description);
        self.raw(" ");
        self.string(&part.encoding, "7bit");
        self.raw(" ");
        write_number(self.out, u64::from(part.body_bytes.to_native()));
        let is =
            |text: &ArchivedText, name: &[u8]| self.digest.text(text).is_some_and(|t| t.eq_ignore_ascii_case(name));
        let is_text = is(&part.media_type, b"text");
        // message/global has the fields of a message in RFC 9051 only; in RFC 3501 it is a type like any other, and a client would
        // take the envelope for extension data.
        let is_message = part.is_message() && (self.utf8 || is(&part.subtype, b"rfc822"));
        if is_message {
            self.raw(" ");
            self.envelope(self.digest.envelope_of(part));
            self.raw(" ");
            match self.digest.children(index).next() {
                Some(child) => self.part(child, depth + 1),
                None => self.out.extend_from_slice(EMPTY_PART),
            }
        }
        if is_text || is_message {
            self.raw(" ");
            write_number(self.out, u64::from(part.lines.to_native()));
        }
        if self.extended {
            self.raw(" ");
            self.nstring(&part.md5);
            self.extension(part);
        }
    }

    /// `body-fld-dsp SP body-fld-lang SP body-fld-loc`, with the space before them.
    fn extension(&mut self, part: &ArchivedPart) {
        match self.digest.text(&part.disposition) {
            Some(_) => {
                self.raw(" (");
                self.string(&part.disposition, "");
                self.raw(" ");
                self.parameters(&part.disposition_parameters);
                self.raw(") ");
            }
            None => self.raw(" NIL "),
        }
        self.language(&part.language);
        self.raw(" ");
        self.nstring(&part.location);
    }

    /// `body-fld-lang = nstring / "(" string *(SP string) ")"`
    fn language(&mut self, language: &ArchivedText) {
        let Some(tags) = self.digest.text(language) else { return self.raw("NIL") };
        let tags: Vec<&[u8]> =
            tags.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|tag| !tag.is_empty()).collect();
        match &tags[..] {
            [] => self.raw("NIL"),
            [tag] => self.text(tag),
            tags => {
                for (i, tag) in tags.iter().enumerate() {
                    self.raw(if i == 0 { "(" } else { " " });
                    self.text(tag);
                }
                self.raw(")");
            }
        }
    }

    /// `body-fld-param = "(" string SP string *(SP string SP string) ")" / nil`
    fn parameters(&mut self, run: &ArchivedRun) {
        let parameters = self.digest.parameters(run);
        if parameters.is_empty() {
            return self.raw("NIL");
        }
        for (i, parameter) in parameters.iter().enumerate() {
            self.raw(if i == 0 { "(" } else { " " });
            self.string(&parameter.name, "");
            self.raw(" ");
            self.string(&parameter.value, "");
        }
        self.raw(")");
    }

    fn raw(&mut self, text: &str) {
        self.out.extend_from_slice(text.as_bytes());
    }

    fn nstring(&mut self, text: &ArchivedText) {
        match self.digest.text(text) {
            Some(text) => self.text(text),
            None => write_nstring(self.out, None),
        }
    }

    fn string(&mut self, text: &ArchivedText, default: &str) {
        self.text(self.digest.text(text).unwrap_or(default.as_bytes()));
    }

    /// A string of a header: 7-bit, unless the client takes UTF-8.
    fn text(&mut self, text: &[u8]) {
        if text.is_ascii() {
            if memchr::memchr(0, text).is_some() {
                // NUL is in no string (RFC 3501, 9), and in no header of a sane message.
                return write_string(self.out, &text.iter().copied().filter(|b| *b != 0).collect::<Vec<u8>>());
            }
            return write_string(self.out, text);
        }
        match std::str::from_utf8(text) {
            Ok(text) if self.utf8 => write_utf8_quoted(self.out, text),
            Ok(text) => write_encoded_words(self.out, "UTF-8", text.as_bytes(), |at| text.is_char_boundary(at)),
            Err(_) => write_encoded_words(self.out, "unknown-8bit", text, |_| true),
        }
    }
}

/// A quoted string with UTF-8 in it (RFC 6855, 3). Control characters are left out.
fn write_utf8_quoted(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    for &b in text.as_bytes() {
        if matches!(b, b'"' | b'\\') {
            out.push(b'\\');
        }
        if b >= b' ' && b != 0x7f {
            out.push(b);
        }
    }
    out.push(b'"');
}

/// `encoded-word = "=?" charset "?" encoding "?" encoded-text "?="`, each of at most 75 characters, separated by spaces, which
/// a reader removes between them (RFC 2047, 2 and 6.2).
fn write_encoded_words(out: &mut Vec<u8>, charset: &str, text: &[u8], may_split_at: impl Fn(usize) -> bool) {
    const CHUNK_BYTES_MAX: usize = 39;
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    out.push(b'"');
    let mut at = 0;
    while at < text.len() {
        let mut end = (at + CHUNK_BYTES_MAX).min(text.len());
        while !may_split_at(end) {
            end -= 1;
        }
        if at > 0 {
            out.push(b' ');
        }
        out.extend_from_slice(b"=?");
        out.extend_from_slice(charset.as_bytes());
        out.extend_from_slice(b"?B?");
        for group in text[at..end].chunks(3) {
            let bits = group.iter().fold(0u32, |bits, b| bits << 8 | u32::from(*b)) << (8 * (3 - group.len()));
            for i in 0..4 {
                let digit = ALPHABET[(bits >> (18 - 6 * i) & 63) as usize];
                out.push(if i <= group.len() { digit } else { b'=' });
            }
        }
        out.extend_from_slice(b"?=");
        at = end;
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use posthaste_mime::Digest;
    use posthaste_mime::digest::DigestBytes;

    fn written(message: &str, write: impl Fn(&mut Vec<u8>, &ArchivedDigest)) -> String {
        let (small, whole) = Digest::of(message.as_bytes()).archives();
        let bytes = DigestBytes::from_aligned(whole.unwrap_or(small)).unwrap();
        let mut out = Vec::new();
        write(&mut out, bytes.digest().unwrap());
        String::from_utf8(out).unwrap()
    }

    fn envelope(message: &str) -> String {
        written(message, |out, digest| write_envelope(out, digest, false))
    }

    fn body(message: &str) -> String {
        written(message, |out, digest| write_body(out, digest, false))
    }

    fn body_structure(message: &str) -> String {
        written(message, |out, digest| write_body_structure(out, digest, false))
    }

    /// RFC 3501, 8: the sample connection.
    #[test]
    fn rfc_3501_sample() {
        let header = "Date: Wed, 17 Jul 1996 02:23:25 -0700 (PDT)\r\nFrom: Terry Gray <gray@cac.washington.edu>\r\n\
            Subject: IMAP4rev1 WG mtg summary and minutes\r\nTo: imap@cac.washington.edu\r\n\
            cc: minutes@CNRI.Reston.VA.US, John Klensin <KLENSIN@MIT.EDU>\r\n\
            Message-Id: <B27397-0100000@cac.washington.edu>\r\nMIME-Version: 1.0\r\n\
            Content-Type: TEXT/PLAIN; CHARSET=US-ASCII\r\n\r\n";
        let message = format!("{header}{}", "x\r\n".repeat(92));
        assert_eq!(
            envelope(&message),
            "(\"Wed, 17 Jul 1996 02:23:25 -0700 (PDT)\" \"IMAP4rev1 WG mtg summary and minutes\" \
             ((\"Terry Gray\" NIL \"gray\" \"cac.washington.edu\")) ((\"Terry Gray\" NIL \"gray\" \"cac.washington.edu\")) \
             ((\"Terry Gray\" NIL \"gray\" \"cac.washington.edu\")) ((NIL NIL \"imap\" \"cac.washington.edu\")) \
             ((NIL NIL \"minutes\" \"CNRI.Reston.VA.US\")(\"John Klensin\" NIL \"KLENSIN\" \"MIT.EDU\")) NIL NIL \
             \"<B27397-0100000@cac.washington.edu>\")"
        );
        assert_eq!(body(&message), "(\"TEXT\" \"PLAIN\" (\"CHARSET\" \"US-ASCII\") NIL NIL \"7bit\" 276 92)");
    }

    #[test]
    fn multipart_with_extension_data() {
        let message = "Content-Type: multipart/mixed; boundary=b\r\nContent-Language: de, en\r\n\r\n--b\r\n\r\nx\r\n\r\n--b\r\n\
            Content-Type: image/png; name=\"a b\"\r\nContent-Transfer-Encoding: BASE64\r\nContent-ID: <1@x>\r\n\
            Content-Description: pic\r\nContent-Disposition: attachment; filename=a\r\nContent-MD5: abc==\r\n\
            Content-Language: de\r\nContent-Location: http://x/\r\n\r\nAAAA\r\n--b--\r\n";
        assert_eq!(
            body_structure(message),
            "((\"text\" \"plain\" (\"charset\" \"us-ascii\") NIL NIL \"7bit\" 3 1 NIL NIL NIL NIL)\
             (\"image\" \"png\" (\"name\" \"a b\") \"<1@x>\" \"pic\" \"BASE64\" 4 \"abc==\" (\"attachment\" (\"filename\" \"a\")) \
             \"de\" \"http://x/\") \"mixed\" (\"boundary\" \"b\") NIL (\"de\" \"en\") NIL)"
        );
        assert_eq!(
            body(message),
            "((\"text\" \"plain\" (\"charset\" \"us-ascii\") NIL NIL \"7bit\" 3 1)\
             (\"image\" \"png\" (\"name\" \"a b\") \"<1@x>\" \"pic\" \"BASE64\" 4) \"mixed\")"
        );
        assert_eq!(
            body("Content-Type: multipart/mixed; boundary=b\r\n\r\nnothing"),
            "((\"text\" \"plain\" NIL NIL NIL \"8bit\" 7 0) \"mixed\")"
        );
    }

    #[test]
    fn message_within() {
        let message = "Content-Type: message/rfc822\r\n\r\nSubject: in\r\n\r\nx\r\n";
        assert_eq!(
            body(message),
            "(\"message\" \"rfc822\" NIL NIL NIL \"7bit\" 18 (NIL \"in\" NIL NIL NIL NIL NIL NIL NIL NIL) \
             (\"text\" \"plain\" (\"charset\" \"us-ascii\") NIL NIL \"7bit\" 3 1) 3)"
        );
    }

    /// RFC 3501 knows no message/global; RFC 9051 does.
    #[test]
    fn message_global() {
        let message = "Content-Type: message/global\r\n\r\nSubject: in\r\n\r\nx\r\n";
        assert_eq!(body(message), "(\"message\" \"global\" NIL NIL NIL \"7bit\" 18)");
        let utf8 = written(message, |out, digest| write_body(out, digest, true));
        assert!(utf8.starts_with("(\"message\" \"global\" NIL NIL NIL \"7bit\" 18 (NIL \"in\" "), "{utf8}");
    }

    /// Trap 27: no raw 8-bit; NIL and "" are different; groups have their marks.
    #[test]
    fn trap_27_envelope_is_7_bit() {
        let message = "Subject: Grüße \"x\"\r\nTo: undisclosed: a@b;\r\nIn-Reply-To:\r\n\r\n";
        assert_eq!(
            envelope(message),
            "(NIL \"=?UTF-8?B?R3LDvMOfZSAieCI=?=\" NIL NIL NIL \
             ((NIL NIL \"undisclosed\" NIL)(NIL NIL \"a\" \"b\")(NIL NIL NIL NIL)) NIL NIL \"\" NIL)"
        );
        let utf8 = written(message, |out, digest| write_envelope(out, digest, true));
        assert!(utf8.starts_with("(NIL \"Grüße \\\"x\\\"\" NIL"), "{utf8}");
        let mut out = Vec::new();
        write_encoded_words(&mut out, "unknown-8bit", b"caf\xe9", |_| true);
        assert_eq!(out, b"\"=?unknown-8bit?B?Y2Fm6Q==?=\"");
        out.clear();
        let long = "é".repeat(50);
        write_encoded_words(&mut out, "UTF-8", long.as_bytes(), |at| long.is_char_boundary(at));
        let text = String::from_utf8(out).unwrap();
        assert!(text.trim_matches('"').split(' ').all(|word| word.len() <= 75), "{text}");
    }
}
