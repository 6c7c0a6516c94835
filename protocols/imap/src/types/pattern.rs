//! Matching of mailbox names against LIST patterns, `*` and `%` (RFC 3501, 6.3.8).
//!
//! All positions that the pattern can be in advance together, one bit each, so the time is the length of the name times
//! the length of the pattern over 64, whatever the pattern. Nothing is ever tried again.

/// A compiled LIST pattern.
#[derive(Debug, Clone)]
pub struct Pattern {
    /// Words of 64 positions.
    words: usize,
    /// For each octet, the positions that it matches and leaves: `words` words per octet.
    steps: Box<[u64]>,
    /// Positions at `*`, which any octet matches and stays at.
    stars: Box<[u64]>,
    /// Positions at `%`, which any octet but those of the delimiter matches and stays at.
    percents: Box<[u64]>,
    /// The position after the last.
    end: usize,
}

/// Longer patterns match nothing: no name is that long.
const PATTERN_BYTES_MAX: usize = 2048;

impl Pattern {
    /// Compiles a pattern in UTF-8. `reference` is put before it as it stands.
    pub fn new(reference: &str, pattern: &str) -> Self {
        let mut bytes: Vec<u8> = Vec::with_capacity(reference.len() + pattern.len());
        for b in reference.bytes().chain(pattern.bytes()) {
            // A run of wildcards is one of them: the strongest.
            match (b, bytes.last_mut()) {
                (b'*', Some(last @ (b'*' | b'%'))) => *last = b'*',
                (b'%', Some(b'*' | b'%')) => {}
                _ => bytes.push(b),
            }
        }
        let too_long = bytes.len() > PATTERN_BYTES_MAX;
        if too_long {
            bytes.clear();
        }
        let words = bytes.len() / 64 + 1;
        let mut steps = vec![0; 256 * words];
        let (mut stars, mut percents) = (vec![0; words], vec![0; words]);
        for (position, &b) in bytes.iter().enumerate() {
            let (word, bit) = (position / 64, 1 << (position % 64));
            match b {
                b'*' => stars[word] |= bit,
                b'%' => percents[word] |= bit,
                b => steps[usize::from(b) * words + word] |= bit,
            }
        }
        let end = if too_long { usize::MAX } else { bytes.len() };
        Self { words, steps: steps.into(), stars: stars.into(), percents: percents.into(), end }
    }

    /// Whether the whole name matches. INBOX does so in any case of its letters, also where it is the first level of a name.
    pub fn matches(&self, name: &str, delimiter: Option<char>) -> bool {
        if self.end == usize::MAX {
            return false;
        }
        let below_inbox = name.strip_prefix("INBOX");
        let in_inbox = below_inbox.is_some_and(|rest| rest.is_empty() || rest.chars().next() == delimiter);
        let inbox_end = if in_inbox { "INBOX".len() } else { 0 };
        let mut delimiter_bytes = [0; 4];
        let delimiter: &[u8] = match delimiter {
            Some(c) => c.encode_utf8(&mut delimiter_bytes).as_bytes(),
            None => b"",
        };
        let mut now = vec![0u64; self.words];
        now[0] = 1;
        self.skip_wildcards(&mut now);
        let bytes = name.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            let at_delimiter = !delimiter.is_empty() && bytes[at..].starts_with(delimiter);
            // A delimiter of several octets is passed octet by octet, and `%` passes none of them.
            let octets = if at_delimiter { delimiter.len() } else { 1 };
            for &b in &bytes[at..at + octets] {
                self.advance(&mut now, b, at < inbox_end, at_delimiter);
            }
            at += octets;
        }
        now[self.end / 64] >> (self.end % 64) & 1 == 1
    }

    fn advance(&self, now: &mut [u64], b: u8, is_inbox: bool, at_delimiter: bool) {
        let mut carry = 0;
        for (word, now) in now.iter_mut().enumerate() {
            let mut step = self.steps[usize::from(b) * self.words + word];
            if is_inbox {
                step |= self.steps[usize::from(b.to_ascii_lowercase()) * self.words + word];
            }
            let stay = self.stars[word] | if at_delimiter { 0 } else { self.percents[word] };
            let left = *now & step;
            *now = (left << 1) | carry | (*now & stay);
            carry = left >> 63;
        }
        self.skip_wildcards(now);
    }

    /// A wildcard also matches nothing. No two of them are neighbours, so one pass is enough.
    fn skip_wildcards(&self, now: &mut [u64]) {
        let mut carry = 0;
        for (word, now) in now.iter_mut().enumerate() {
            let wild = *now & (self.stars[word] | self.percents[word]);
            *now |= (wild << 1) | carry;
            carry = wild >> 63;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(pattern: &str, name: &str) -> bool {
        Pattern::new("", pattern).matches(name, Some('/'))
    }

    #[test]
    fn wildcards() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "a/b", true),
            ("%", "a", true),
            ("%", "a/b", false),
            ("%/%", "a/b", true),
            ("%/%", "a/b/c", false),
            ("a*c", "abc", true),
            ("a*c", "abcd", false),
            ("*b*", "abc", true),
            ("a/%", "a", false),
            ("%*", "a/b", true),
            ("*%", "a/b", true),
            ("a", "A", false),
            ("", "", true),
            ("", "a", false),
            ("inbox", "INBOX", true),
            ("iN%", "INBOX", true),
            ("inbox", "INBOXES", false),
            ("INBOX", "INBOX", true),
            ("inbox/%", "INBOX/Below", true),
            ("inbox/below", "INBOX/Below", false),
            ("inboxes/%", "INBOXES/Below", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        assert!(Pattern::new("a/", "%").matches("a/b", Some('/')));
        assert!(Pattern::new("", "%").matches("a/b", None), "flat names have no hierarchy");
        assert!(!Pattern::new("", "%").matches("a·b", Some('·')));
    }

    /// Trap 18: patterns that make a backtracking matcher exponential.
    #[test]
    fn trap_18_wildcard_bombs_are_linear() {
        let pattern = "*a%".repeat(600);
        let name = "a".repeat(999);
        let start = std::time::Instant::now();
        for _ in 0..100 {
            assert!(Pattern::new("", &pattern).matches(&name, Some('/')));
            assert!(!Pattern::new("", &format!("{pattern}b")).matches(&name, Some('/')));
        }
        assert!(start.elapsed().as_secs() < 5);
        assert!(!Pattern::new("", &"a".repeat(3000)).matches("a", None));
    }

    fn reference(pattern: &[u8], name: &[u8]) -> bool {
        match pattern.split_first() {
            None => name.is_empty(),
            Some((wild @ (b'*' | b'%'), rest)) => (0..=name.len())
                .take_while(|&n| *wild == b'*' || !name[..n].contains(&b'/'))
                .any(|n| reference(rest, &name[n..])),
            Some((b, rest)) => name.first() == Some(b) && reference(rest, &name[1..]),
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(pattern in "[ab/*%]{0,9}", name in "[ab/]{0,9}", pad in 0usize..70) {
            let expected = reference(pattern.as_bytes(), name.as_bytes());
            prop_assert_eq!(matches(&pattern, &name), expected);
            let pad = "x".repeat(pad);
            prop_assert_eq!(matches(&format!("{pad}{pattern}"), &format!("{pad}{name}")), expected);
        }
    }
}
