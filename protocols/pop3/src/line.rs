//! Lines out of bytes that come in pieces.
//!
//! A line ends with LF, and a CR before that belongs to the end. RFC 1939, 3 asks for CRLF; a bare LF is taken too,
//! for the sake of people and scripts that talk to a server by hand. Nothing can be smuggled by it as in SMTP, because a
//! client of POP3 sends commands only and never a message.

use std::borrow::Cow;

use memchr::memchr;

/// A line that goes on for so long is not one.
pub const ENDLESS_LINE_BYTES: usize = 64 * 1024;

#[derive(Debug, PartialEq, Eq)]
pub enum Taken<'a> {
    /// All input was taken, and no line has ended.
    NeedInput,
    /// Without its end.
    Line(Cow<'a, [u8]>),
    /// A line that was too long has ended.
    TooLong,
    /// A line does not end.
    Endless,
}

#[derive(Debug, Default)]
pub struct Lines {
    /// The beginning of a line whose end has not come yet. Always shorter than a line may be.
    partial: Vec<u8>,
    /// Bytes of a line that was too long, which are dropped. 0: it is not.
    dropped: usize,
}

impl Lines {
    /// Takes a line of at most `bytes_max`, with its end. Gives also how many bytes were taken.
    pub fn take<'a>(&mut self, input: &'a [u8], bytes_max: usize) -> (usize, Taken<'a>) {
        let end = memchr(b'\n', input);
        let taken = end.map_or(input.len(), |at| at + 1);
        let before = self.partial.len() + self.dropped;
        let len = before + taken;
        if len > ENDLESS_LINE_BYTES {
            self.reset();
            return (taken, Taken::Endless);
        }
        // Where the end has not come, at least one byte will.
        let too_long = self.dropped > 0 || len > bytes_max - usize::from(end.is_none());
        let Some(end) = end else {
            if too_long {
                self.partial = Vec::new();
                self.dropped = len;
            } else {
                self.partial.extend_from_slice(input);
            }
            return (taken, Taken::NeedInput);
        };
        if too_long {
            self.reset();
            return (taken, Taken::TooLong);
        }
        let line = if self.partial.is_empty() {
            let line = &input[..end];
            Cow::Borrowed(line.strip_suffix(b"\r").unwrap_or(line))
        } else {
            let mut line = std::mem::take(&mut self.partial);
            line.extend_from_slice(&input[..end]);
            line.pop_if(|last| *last == b'\r');
            Cow::Owned(line)
        };
        (taken, Taken::Line(line))
    }

    /// Forgets the beginning of a line.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether no line has begun.
    pub fn is_empty(&self) -> bool {
        self.partial.is_empty() && self.dropped == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 10;

    /// All that comes out of pieces.
    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            while !rest.is_empty() {
                let (taken, line) = lines.take(rest, MAX);
                rest = &rest[taken..];
                match line {
                    Taken::NeedInput => assert!(rest.is_empty()),
                    Taken::Line(line) => all.push(String::from_utf8(line.into_owned()).unwrap()),
                    other => all.push(format!("{other:?}")),
                }
            }
        }
        all
    }

    #[test]
    fn lines_end_with_crlf_or_lf() {
        assert_eq!(lines(&[b"a\r\nb\nc\r\r\n\n\r\nd"]), ["a", "b", "c\r", "", ""]);
    }

    #[test]
    fn a_line_may_have_exactly_its_limit() {
        assert_eq!(lines(&[b"12345678\r\n"]), ["12345678"]);
        assert_eq!(lines(&[b"123456789\n"]), ["123456789"]);
        assert_eq!(lines(&[b"123456789\r\nx\n"]), ["TooLong", "x"]);
        assert_eq!(lines(&[b"12345678", b"\r", b"\n"]), ["12345678"]);
        assert_eq!(lines(&[b"1234567890", b"\nx\n"]), ["TooLong", "x"]);
        assert_eq!(lines(&[b"123456789", b"\r", b"\n", b"x\n"]), ["TooLong", "x"]);
    }

    /// Trap 5: what comes before a login takes bounded memory, whatever it is.
    #[test]
    fn trap_05_a_line_without_end_is_dropped_and_then_refused() {
        let mut lines = Lines::default();
        let mut taken = 0;
        let piece = [b'x'; 1000];
        loop {
            let (count, line) = lines.take(&piece, MAX);
            taken += count;
            assert!(lines.partial.capacity() <= 1000);
            match line {
                Taken::NeedInput => {}
                line => break assert_eq!(line, Taken::Endless),
            }
        }
        assert_eq!(taken, ENDLESS_LINE_BYTES.next_multiple_of(1000));
        let mut whole = vec![b'x'; ENDLESS_LINE_BYTES];
        whole.push(b'\n');
        assert_eq!(Lines::default().take(&whole, MAX).1, Taken::Endless, "also in one piece");
        assert_eq!(Lines::default().take(&whole[1..], MAX).1, Taken::TooLong);
    }
}
