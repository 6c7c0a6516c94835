//! Replies: a code, an enhanced status code and text.

use std::borrow::Cow;

/// An enhanced status code, `class.subject.detail` (RFC 3463, 2). The class is that of the reply code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnhancedCode {
    pub subject: u16,
    pub detail: u16,
}

/// One reply to one command.
///
/// The text may hold several lines, separated by `\n`. Whatever it holds, [`Reply::write`] puts out well-formed
/// reply lines: other control characters become spaces, so that text which quotes a client cannot forge a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    code: u16,
    enhanced: Option<EnhancedCode>,
    text: Cow<'static, str>,
}

/// Longest reply line with its CRLF (RFC 5321, 4.5.3.1.5).
const REPLY_LINE_BYTES_MAX: usize = 512;

impl Reply {
    /// A reply with the enhanced code `C.subject.detail`, where C is the first digit of `code` (RFC 2034, 4).
    pub const fn new(code: u16, subject: u16, detail: u16, text: &'static str) -> Self {
        Self { code, enhanced: Some(EnhancedCode { subject, detail }), text: Cow::Borrowed(text) }
    }

    /// A reply whose text was made at run time.
    pub fn with_text(code: u16, subject: u16, detail: u16, text: String) -> Self {
        Self { code, enhanced: Some(EnhancedCode { subject, detail }), text: Cow::Owned(text) }
    }

    /// A reply without enhanced code: the greeting, the answer to LHLO, and 3xx (RFC 2034, 4).
    pub fn plain(code: u16, text: impl Into<Cow<'static, str>>) -> Self {
        Self { code, enhanced: None, text: text.into() }
    }

    /// 250 2.0.0: the message was stored for this recipient, and will still be there after a crash.
    pub const fn stored() -> Self {
        Self::new(250, 0, 0, "Stored")
    }

    /// 452 4.3.1: no room for a message now; the client tries again later.
    pub const fn busy() -> Self {
        Self::new(452, 3, 1, "Too many messages in progress, try again later")
    }

    /// 550 5.1.1: no such mailbox.
    pub const fn no_such_user() -> Self {
        Self::new(550, 1, 1, "No such user here")
    }

    /// 451 4.3.0: something on our side failed; the client tries again later.
    pub const fn local_error() -> Self {
        Self::new(451, 3, 0, "Local error in processing, try again later")
    }

    /// 452 4.2.2: over quota, where the policy is to let the sender retry.
    pub const fn over_quota_for_now() -> Self {
        Self::new(452, 2, 2, "Mailbox is full, try again later")
    }

    /// 552 5.2.2: over quota, where the policy is to bounce.
    pub const fn over_quota() -> Self {
        Self::new(552, 2, 2, "Mailbox is full")
    }

    pub fn code(&self) -> u16 {
        self.code
    }

    /// Whether this is a Positive Completion reply (2yz).
    pub fn is_positive(&self) -> bool {
        self.code / 100 == 2
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Appends the reply so many times: one for each recipient (RFC 2033, 4.2).
    pub fn write_times(&self, times: usize, out: &mut Vec<u8>) {
        (0..times).for_each(|_| self.write(out));
    }

    /// Appends the reply line or lines with their CRLF.
    pub fn write(&self, out: &mut Vec<u8>) {
        let mut lines = self.text.split('\n').peekable();
        while let Some(line) = lines.next() {
            let start = out.len();
            push_decimal(out, self.code);
            out.push(if lines.peek().is_some() { b'-' } else { b' ' });
            if let Some(enhanced) = self.enhanced {
                // The same status code begins each line of a reply (RFC 2034, 4).
                push_decimal(out, self.code / 100);
                out.push(b'.');
                push_decimal(out, enhanced.subject);
                out.push(b'.');
                push_decimal(out, enhanced.detail);
                out.push(b' ');
            }
            let room = REPLY_LINE_BYTES_MAX - 2 - (out.len() - start);
            let mut end = line.len().min(room);
            while !line.is_char_boundary(end) {
                end -= 1;
            }
            out.extend(line.as_bytes()[..end].iter().map(|&b| if b < b' ' || b == 0x7f { b' ' } else { b }));
            out.extend_from_slice(b"\r\n");
        }
    }
}

fn push_decimal(out: &mut Vec<u8>, n: u16) {
    let mut digits = [0u8; 5];
    let mut at = digits.len();
    let mut n = n;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn written(reply: &Reply) -> String {
        let mut out = Vec::new();
        reply.write(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn one_line() {
        assert_eq!(written(&Reply::new(250, 1, 5, "Recipient ok")), "250 2.1.5 Recipient ok\r\n");
        assert_eq!(written(&Reply::plain(354, "go on")), "354 go on\r\n");
    }

    #[test]
    fn several_lines_repeat_both_codes() {
        let reply = Reply::with_text(551, 7, 1, "first\nsecond".into());
        assert_eq!(written(&reply), "551-5.7.1 first\r\n551 5.7.1 second\r\n");
    }

    /// Trap 42: what a client sent and a reply quotes must not forge a reply line.
    #[test]
    fn trap_42_no_control_characters_get_out() {
        let reply = Reply::with_text(550, 1, 1, "a\r250 2.0.0 ok\0\x7f".into());
        assert_eq!(written(&reply), "550 5.1.1 a 250 2.0.0 ok  \r\n");
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        let reply = Reply::with_text(550, 1, 1, "é".repeat(600));
        let line = written(&reply);
        assert!(line.len() <= REPLY_LINE_BYTES_MAX && line.ends_with("é\r\n"), "{}", line.len());
    }
}
