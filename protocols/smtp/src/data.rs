//! The message after DATA: dot-unstuffing, and the one true end (RFC 5321, 4.1.1.4 and 4.5.2); or in chunks (RFC 3030).
//!
//! Software that takes `LF . LF` or `CR . CR` for the end of a message lets a sender smuggle a second one past the
//! server before it. So only CRLF "." CRLF ends a message here; after a CR or LF that stands alone the message is
//! still read to that end, kept no longer, and refused (RFC 5321, 2.3.8).

use memchr::memchr2;

/// Where in a line the last byte seen was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// After CRLF. So is the start: the CRLF of the DATA line counts (RFC 5321, 4.1.1.4).
    LineStart,
    /// After a dot at the start of a line. It is not part of the message.
    Dot,
    /// After such a dot and a CR.
    DotCr,
    /// Within a line.
    Line,
    /// After a CR that ought to be followed by LF.
    Cr,
}

/// What became of the message so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Good,
    /// A CR or LF stood alone.
    BareLineEnd,
    /// Longer than the limit.
    TooBig,
    /// The caller gave it up.
    Abandoned,
}

/// Collects one message. What it holds never exceeds the limit; past it, and after anything else that makes the
/// message unacceptable, bytes are counted but dropped.
#[derive(Debug)]
pub(crate) struct Data {
    state: State,
    verdict: Verdict,
    bytes: Vec<u8>,
    limit_bytes: u64,
}

impl Data {
    /// `expected_bytes` is the declared size; it is believed only as far as a modest first allocation.
    pub fn new(limit_bytes: u64, expected_bytes: u64) -> Self {
        const FIRST_ALLOCATION_BYTES_MAX: u64 = 64 * 1024;
        let capacity = expected_bytes.min(limit_bytes).min(FIRST_ALLOCATION_BYTES_MAX) as usize;
        Self { state: State::LineStart, verdict: Verdict::Good, bytes: Vec::with_capacity(capacity), limit_bytes }
    }

    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    pub fn held_bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// The message, in CRLF form, dots unstuffed.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Drops what is held and whatever is still to come. The first reason stays.
    pub fn refuse(&mut self, verdict: Verdict) {
        if self.verdict == Verdict::Good {
            self.verdict = verdict;
            self.bytes = Vec::new();
        }
    }

    /// Takes bytes up to the end of the message or of the input. Gives how many were taken, and whether the message
    /// ended with them.
    pub fn feed(&mut self, input: &[u8]) -> (usize, bool) {
        let mut at = 0; // the next byte to look at
        let mut run = 0; // bytes from here to `at` belong to the message and are not yet kept
        while let Some(&byte) = input.get(at) {
            match self.state {
                State::Line => match memchr2(b'\r', b'\n', &input[at..]) {
                    None => at = input.len(),
                    Some(distance) => {
                        at += distance + 1;
                        if input[at - 1] == b'\r' {
                            // The common case in one go: CRLF and a line that begins with no dot.
                            if let Some(&[b'\n', next]) = input.get(at..at + 2)
                                && next != b'.'
                            {
                                at += 1;
                            } else {
                                self.state = State::Cr;
                            }
                        } else {
                            self.refuse_line_end(&input[run..at]);
                            run = at;
                        }
                    }
                },
                State::Cr => {
                    if byte == b'\n' {
                        at += 1;
                        self.state = State::LineStart;
                    } else {
                        self.refuse_line_end(&input[run..at]);
                        run = at;
                        self.state = State::Line;
                    }
                }
                State::LineStart => {
                    self.state = State::Line;
                    if byte == b'.' {
                        self.keep(&input[run..at]);
                        at += 1;
                        run = at;
                        self.state = State::Dot;
                    }
                }
                State::Dot => {
                    self.state = State::Line;
                    if byte == b'\r' {
                        at += 1;
                        run = at;
                        self.state = State::DotCr;
                    }
                }
                State::DotCr => {
                    if byte == b'\n' {
                        return (at + 1, true);
                    }
                    self.refuse_line_end(&input[run..at]);
                    run = at;
                    self.state = State::Line;
                }
            }
        }
        self.keep(&input[run..]);
        (input.len(), false)
    }

    /// Takes a piece of a chunk (RFC 3030): nothing in it has a meaning of its own, but without BINARYMIME, which is not offered,
    /// it is made of lines all the same.
    pub fn take(&mut self, piece: &[u8]) {
        let mut at = 0;
        while at < piece.len() {
            if self.state == State::Cr {
                if piece[at] != b'\n' {
                    return self.refuse_line_end(&piece[..at]);
                }
                self.state = State::Line;
                at += 1;
                continue;
            }
            let Some(distance) = memchr2(b'\r', b'\n', &piece[at..]) else { break };
            at += distance + 1;
            if piece[at - 1] == b'\n' {
                return self.refuse_line_end(&piece[..at]);
            }
            self.state = State::Cr;
        }
        self.keep(piece);
    }

    /// The end of the last chunk.
    pub fn end_of_chunks(&mut self) {
        if self.state == State::Cr {
            self.refuse(Verdict::BareLineEnd);
        }
    }

    /// A CR or LF stands alone at the end of `run`. That it was too long before counts first, however the input is cut.
    fn refuse_line_end(&mut self, run: &[u8]) {
        self.keep(run);
        self.refuse(Verdict::BareLineEnd);
    }

    fn keep(&mut self, run: &[u8]) {
        if self.verdict != Verdict::Good {
            return;
        }
        if (self.bytes.len() + run.len()) as u64 > self.limit_bytes {
            self.refuse(Verdict::TooBig);
        } else {
            self.make_room(run.len());
            self.bytes.extend_from_slice(run);
        }
    }

    /// Grows by an eighth, not to the double: what is held counts, and must fit where the message does.
    fn make_room(&mut self, more: usize) {
        const STEP_BYTES: usize = 64 * 1024;
        let (len, capacity) = (self.bytes.len(), self.bytes.capacity());
        if capacity - len < more {
            let wanted = len + more.max(len / 8).max(STEP_BYTES);
            let limit = usize::try_from(self.limit_bytes).unwrap_or(usize::MAX);
            self.bytes.reserve_exact(wanted.min(limit).max(len + more) - len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The message, or the reason against it, and what was left of the input.
    fn read(input: &[u8], limit_bytes: u64) -> Option<(Result<Vec<u8>, Verdict>, &[u8])> {
        let mut data = Data::new(limit_bytes, 0);
        let (taken, ended) = data.feed(input);
        let verdict = data.verdict();
        let result = if verdict == Verdict::Good { Ok(data.into_bytes()) } else { Err(verdict) };
        ended.then_some((result, &input[taken..]))
    }

    fn good(input: &[u8]) -> Vec<u8> {
        let (message, rest) = read(input, 1000).expect("it ends");
        assert_eq!(rest, b"");
        message.unwrap()
    }

    #[test]
    fn dots() {
        assert_eq!(good(b".\r\n"), b"");
        assert_eq!(good(b"\r\n.\r\n"), b"\r\n");
        assert_eq!(good(b"..\r\n...\r\n.a\r\na.\r\n.\r\n"), b".\r\n..\r\na\r\na.\r\n");
        assert_eq!(good(b"a\r\n..\r\n.\r\n"), b"a\r\n.\r\n");
        assert_eq!(read(b"a\r\n.\r\nQUIT\r\n", 1000), Some((Ok(b"a\r\n".to_vec()), &b"QUIT\r\n"[..])));
        assert_eq!(read(b"a\r\n.\r", 1000), None);
    }

    /// RFC 5321, 4.5.2: all 128 ASCII characters are delivered, NUL among them; RFC 6152, 3: and all 8-bit octets.
    /// A line longer than 998 octets is not torn apart.
    #[test]
    fn any_octet_and_any_line_length() {
        let mut message: Vec<u8> = (0..=255).filter(|b| !b"\r\n".contains(b)).collect();
        message.extend(vec![b'x'; 5000]);
        message.extend_from_slice(b"\r\n");
        let (result, _) = read(&[&message[..], b".\r\n"].concat(), 100_000).unwrap();
        assert_eq!(result, Ok(message));
    }

    /// Trap 41: nothing but CRLF.CRLF ends a message, and a message with a bare CR or LF is refused at its proper end.
    #[test]
    fn trap_41_smuggling() {
        for end in
            ["\n.\n", "\n.\r\n", "\r.\r", "\r.\r\n", "\r\n.\n", "\r\n.\r", "\r\n.\r\r\n", "\n\n.\r\n", "\r\r\n\n.\n"]
        {
            let input = format!("Subject: a\r\n\r\nx{end}MAIL FROM:<evil@x>\r\nz\r\n.\r\nQUIT\r\n");
            let (result, rest) = read(input.as_bytes(), 1000).expect(end);
            assert_eq!(result, Err(Verdict::BareLineEnd), "{end:?}");
            assert_eq!(rest, b"QUIT\r\n", "{end:?}");
        }
    }

    /// Found by fuzzing: of two reasons the one that comes first is told, wherever the input was cut.
    #[test]
    fn the_first_reason_counts_however_the_input_is_cut() {
        for (input, reason) in [
            (&b"12345678901\n\r\n.\r\n"[..], Verdict::TooBig),
            (b"12345678901\rx\r\n.\r\n", Verdict::TooBig),
            (b"123456\n8901\r\n.\r\n", Verdict::BareLineEnd),
            (b"123456\rx8901\r\n.\r\n", Verdict::BareLineEnd),
            (b"123456\r\n.\rx234\r\n.\r\n", Verdict::BareLineEnd),
        ] {
            for cut in 0..input.len() {
                let (mut whole, mut chunks) = (Data::new(10, 0), Data::new(10, 0));
                let (first, second) = input.split_at(cut);
                let mut ended = whole.feed(first).1;
                ended |= whole.feed(second).1;
                assert!(ended, "{cut}");
                chunks.take(first);
                chunks.take(second);
                let input = String::from_utf8_lossy(input);
                assert_eq!((whole.verdict(), chunks.verdict()), (reason, reason), "{input:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn limit_is_exact_and_memory_is_bounded() {
        assert_eq!(read(b"12345678\r\n.\r\n", 10).unwrap().0, Ok(b"12345678\r\n".to_vec()));
        assert_eq!(read(b"123456789\r\n.\r\n", 10).unwrap().0, Err(Verdict::TooBig));
        let mut data = Data::new(1000, 1 << 60);
        for _ in 0..1000 {
            assert_eq!(data.feed(&[b'x'; 100]), (100, false));
            assert!(data.held_bytes() <= 2000);
        }
        assert_eq!((data.verdict(), data.held_bytes()), (Verdict::TooBig, 0));
        assert_eq!(data.feed(b"\r\n.\r\n"), (5, true));
    }

    /// What the specification says, written as plainly as possible.
    fn reference(input: &[u8]) -> Option<(Result<Vec<u8>, Verdict>, usize)> {
        let with_crlf = [b"\r\n", input].concat();
        let end = with_crlf.windows(5).position(|w| w == b"\r\n.\r\n")?;
        let stuffed = &with_crlf[2..(end + 2).max(2)];
        let bare = (0..stuffed.len()).any(|i| match stuffed[i] {
            b'\r' => stuffed.get(i + 1) != Some(&b'\n'),
            b'\n' => i == 0 || stuffed[i - 1] != b'\r',
            _ => false,
        });
        let mut message = Vec::new();
        for line in stuffed.split_inclusive(|&b| b == b'\n') {
            message.extend_from_slice(line.strip_prefix(b".").unwrap_or(line));
        }
        Some((if bare { Err(Verdict::BareLineEnd) } else { Ok(message) }, end + 3))
    }

    fn soup() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            4 => Just(&b"\r\n"[..]), 2 => Just(&b"."[..]), 1 => Just(&b"\r"[..]), 1 => Just(&b"\n"[..]),
            4 => Just(&b"a"[..]), 2 => Just(&b"\r\n.\r\n"[..]), 1 => Just(&b"longer text"[..])];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    /// A figure, not a check: `cargo test --release -p posthaste-smtp feed_speed -- --ignored --nocapture`.
    #[test]
    #[ignore = "measures"]
    fn feed_speed() {
        let mut input: Vec<u8> = (0..100).flat_map(|_| [&[b'x'; 70][..], b"\r\n"].concat()).collect();
        input.extend_from_slice(b".\r\n");
        let rounds = 100_000;
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            let mut data = Data::new(1 << 20, 16 * 1024);
            assert_eq!(data.feed(&input), (input.len(), true));
            std::hint::black_box(data.into_bytes());
        }
        let each = start.elapsed() / rounds;
        println!("{} bytes: {each:?}, {:.1} GB/s", input.len(), input.len() as f64 / each.as_secs_f64() / 1e9);
    }

    proptest! {
        #[test]
        fn agrees_with_the_reference(input in soup()) {
            let found = read(&input, 1000).map(|(result, rest)| (result, input.len() - rest.len()));
            prop_assert_eq!(found, reference(&input));
        }

        #[test]
        fn every_split_gives_the_same(input in soup()) {
            let whole = read(&input, 1000).map(|(result, rest)| (result, input.len() - rest.len()));
            for split in 0..=input.len() {
                let mut data = Data::new(1000, 0);
                let (mut taken, mut ended) = data.feed(&input[..split]);
                if !ended {
                    let (more, end) = data.feed(&input[split..]);
                    (taken, ended) = (taken + more, end);
                }
                let verdict = data.verdict();
                let result = if verdict == Verdict::Good { Ok(data.into_bytes()) } else { Err(verdict) };
                prop_assert_eq!(ended.then_some((result, taken)), whole.clone());
            }
        }
    }
}
