//! Messages as multi-line responses (RFC 1939, 3), in pieces cut anywhere.
//!
//! A dot at the beginning of a line gets another before it. A line begins after CRLF, and here also after a bare LF:
//! most clients read lines that end with LF, whatever comes before it, and take the second dot away there. Without it, such a client
//! would lose a dot, and at LF "." LF would take the message for ended and what follows in it for replies. A client that
//! knows CRLF only sees one dot too many there, in a message that should not have a bare LF. After a bare CR hardly any
//! client begins a line, so nothing is added.

use memchr::{memchr, memmem};

/// Writes the octets of one message.
#[derive(Debug)]
pub struct Stuffer {
    empty: bool,
    last: u8,
    ends_with_crlf: bool,
}

impl Stuffer {
    #[expect(clippy::new_without_default, reason = "a message begins, it is no value")]
    pub fn new() -> Self {
        Self { empty: true, last: b'\n', ends_with_crlf: true }
    }

    pub fn write(&mut self, piece: &[u8], out: &mut Vec<u8>) {
        let Some(&last) = piece.last() else { return };
        out.reserve(piece.len() + 8);
        if self.last == b'\n' && piece[0] == b'.' {
            out.push(b'.');
        }
        let mut from = 0;
        for at in memmem::find_iter(piece, b"\n.") {
            out.extend_from_slice(&piece[from..=at]);
            out.push(b'.');
            from = at + 1;
        }
        out.extend_from_slice(&piece[from..]);
        let before_last = if piece.len() > 1 { piece[piece.len() - 2] } else { self.last };
        self.ends_with_crlf = before_last == b'\r' && last == b'\n';
        self.last = last;
        self.empty = false;
    }

    /// Ends a line that has not ended, and then the message.
    pub fn finish(self, out: &mut Vec<u8>) {
        if !self.ends_with_crlf {
            out.extend_from_slice(b"\r\n");
        }
        out.extend_from_slice(b".\r\n");
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.empty
    }
}

/// What `finish` adds to a message so that its last line ends. The announced size has these octets, because they are sent
/// and a client cannot tell them from the message's own.
pub fn line_end_octets(message_ends_with_crlf: bool) -> u64 {
    if message_ends_with_crlf { 0 } else { 2 }
}

/// The first lines of a body (TOP).
#[derive(Debug, Clone, Copy)]
pub struct BodyLines {
    left: u32,
}

impl BodyLines {
    pub fn new(lines: u32) -> Self {
        Self { left: lines }
    }

    /// What of a piece belongs to them. A line ends with LF.
    pub fn take<'a>(&mut self, piece: &'a [u8]) -> &'a [u8] {
        let mut at = 0;
        while self.left > 0 {
            let Some(distance) = memchr(b'\n', &piece[at..]) else { return piece };
            at += distance + 1;
            self.left -= 1;
        }
        &piece[..at]
    }

    pub fn is_done(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stuff<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut out = Vec::new();
        let mut stuffer = Stuffer::new();
        pieces.into_iter().for_each(|piece| stuffer.write(piece, &mut out));
        stuffer.finish(&mut out);
        out
    }

    /// As most clients do: lines end with LF. Gives the message and what follows its end.
    fn unstuff(bytes: &[u8]) -> (Vec<u8>, &[u8]) {
        let mut message = Vec::new();
        let mut rest = bytes;
        loop {
            let end = memchr(b'\n', rest).expect("the end comes first") + 1;
            let (line, after) = rest.split_at(end);
            rest = after;
            match line {
                b".\n" | b".\r\n" => return (message, rest),
                _ => message.extend_from_slice(line.strip_prefix(b".").unwrap_or(line)),
            }
        }
    }

    #[test]
    fn trap_46_dots_at_the_beginning_of_lines_are_doubled() {
        for (message, sent) in [
            (&b""[..], &b".\r\n"[..]),
            (b"a\r\n", b"a\r\n.\r\n"),
            (b"a", b"a\r\n.\r\n"),
            (b".", b"..\r\n.\r\n"),
            (b".\r\n.\r\n", b"..\r\n..\r\n.\r\n"),
            (b"a\r\n.\r\nb\r\n", b"a\r\n..\r\nb\r\n.\r\n"),
            (b"a\r\n..b\r\n", b"a\r\n...b\r\n.\r\n"),
            (b"a.\r\n", b"a.\r\n.\r\n"),
            (b"a\r", b"a\r\r\n.\r\n"),
            (b"a\n", b"a\n\r\n.\r\n"),
            (b"a\n.\nb\r\n", b"a\n..\nb\r\n.\r\n"),
            (b"a\r.\r\n", b"a\r.\r\n.\r\n"),
        ] {
            assert_eq!(stuff([message]), sent, "{:?}", message.escape_ascii().to_string());
            let bytewise = stuff(message.chunks(1));
            assert_eq!(bytewise, sent, "{:?}", message.escape_ascii().to_string());
        }
    }

    #[test]
    fn the_first_lines() {
        let top = |lines: u32, pieces: &[&[u8]]| {
            let mut body = BodyLines::new(lines);
            let taken: Vec<&[u8]> = pieces.iter().map(|piece| body.take(piece)).collect();
            (String::from_utf8(taken.concat()).unwrap(), body.is_done())
        };
        assert_eq!(top(0, &[b"a\r\n"]), (String::new(), true));
        assert_eq!(top(1, &[b"a\r\nb\r\n"]), ("a\r\n".into(), true));
        assert_eq!(top(2, &[b"a\r", b"\nb", b"\r\nc\r\n"]), ("a\r\nb\r\n".into(), true));
        assert_eq!(top(2, &[b"a\nb"]), ("a\nb".into(), false));
        assert_eq!(top(u32::MAX, &[b"a\n", b"b\n"]), ("a\nb\n".into(), false));
    }

    proptest! {
        #[test]
        fn what_is_stuffed_can_be_read_back_however_it_is_cut(
            message in proptest::collection::vec(prop::sample::select(b"ab.\r\n".to_vec()), 0..60),
            cuts in proptest::collection::vec(0..61_usize, 0..6),
        ) {
            let whole = stuff([&message[..]]);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(message.len())).collect();
            cuts.sort_unstable();
            let ends = cuts.iter().copied().chain([message.len()]);
            let starts = [0].into_iter().chain(cuts.iter().copied());
            let pieces: Vec<&[u8]> = starts.zip(ends).map(|(start, end)| &message[start..end]).collect();
            prop_assert_eq!(&stuff(pieces), &whole);

            let followed = [&whole[..], b"+OK"].concat();
            let (read, rest) = unstuff(&followed);
            prop_assert_eq!(rest, b"+OK");
            let added = if message.is_empty() || message.ends_with(b"\r\n") { &b""[..] } else { b"\r\n" };
            prop_assert_eq!(&read, &[&message[..], added].concat());
            let announced = message.len() as u64 + line_end_octets(message.is_empty() || message.ends_with(b"\r\n"));
            prop_assert_eq!(read.len() as u64, announced);
            prop_assert!(whole.ends_with(b"\r\n.\r\n") || whole == b".\r\n");
        }
    }
}
