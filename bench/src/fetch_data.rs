//! What FETCH responses say (RFC 9051, 7.5.2), as far as workloads look at it, and whether it can be true.

use std::ops::RangeInclusive;

use crate::imap::{ImapError, Response, check_fetch};

/// The items of one FETCH response that workloads look at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FetchData<'a> {
    pub uid: Option<u32>,
    /// RFC822.SIZE.
    pub size: Option<u64>,
    pub modseq: Option<u64>,
    /// Without the parentheses.
    pub flags: Option<&'a [u8]>,
    /// Octets of BODY[], when the whole message was fetched.
    pub message_octets: Option<u64>,
    /// How many items there are.
    pub items: usize,
    /// Octets of all strings.
    pub octets: u64,
}

impl<'a> FetchData<'a> {
    /// Reads the list of a FETCH response.
    ///
    /// # Errors
    /// It is not well formed, or an item has a value that it cannot have.
    pub fn parse(response: &Response<'a>, list: &'a [u8]) -> Result<Self, String> {
        let octets = check_fetch(response, list)? as u64;
        let mut data = Self { octets, ..Self::default() };
        let base = response.bytes.len() - list.len();
        let mut literals = response.literals.iter();
        // The list is well formed, so that its parentheses are where they belong.
        let mut at = 1;
        let end = list.len() - 1;
        while at < end {
            let name_end = end_of_name(list, at, end);
            let name = &list[at..name_end];
            if name.is_empty() || list.get(name_end) != Some(&b' ') {
                return Err(format!("an item without a value in {:?}", response.text()));
            }
            let start = name_end + 1;
            let value_end = end_of_value(list, start, end, base, &mut literals);
            data.take(name, &list[start..value_end]).ok_or_else(|| {
                let shown = String::from_utf8_lossy(&list[start..value_end.min(start + 40)]);
                format!("{} cannot be {shown:?}", String::from_utf8_lossy(name))
            })?;
            data.items += 1;
            at = value_end;
            if at < end {
                if list[at] != b' ' {
                    return Err(format!("no space between items in {:?}", response.text()));
                }
                at += 1;
            }
        }
        Ok(data)
    }

    /// `None` if the item cannot have the value.
    fn take(&mut self, name: &[u8], value: &'a [u8]) -> Option<()> {
        let is = |other: &str| name.eq_ignore_ascii_case(other.as_bytes());
        if is("UID") {
            self.uid = Some(number(value).and_then(|uid| u32::try_from(uid).ok()).filter(|&uid| uid > 0)?);
        } else if is("RFC822.SIZE") {
            self.size = Some(number(value)?);
        } else if is("MODSEQ") {
            self.modseq = Some(number(value.strip_prefix(b"(")?.strip_suffix(b")")?).filter(|&modseq| modseq > 0)?);
        } else if is("FLAGS") {
            self.flags = Some(value.strip_prefix(b"(")?.strip_suffix(b")")?);
        } else if is("BODY[]") {
            self.message_octets = match value.first()? {
                b'{' => Some((value.len() - memchr::memchr(b'\n', value)? - 1) as u64),
                b'"' => Some((value.len() - 2) as u64),
                // NIL: the message is not there any more.
                _ => None,
            };
        }
        Some(())
    }

    /// Whether it is what a server sends unasked when flags have changed.
    pub fn is_update(&self) -> bool {
        let known = [self.flags.is_some(), self.uid.is_some(), self.modseq.is_some()];
        self.flags.is_some() && self.items == known.iter().filter(|&&is| is).count()
    }

    /// Whether a flag is set; its name with the backslash.
    pub fn has_flag(&self, flag: &str) -> bool {
        let Some(flags) = self.flags else { return false };
        flags.split(|&octet| octet == b' ').any(|found| found.eq_ignore_ascii_case(flag.as_bytes()))
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    // parse() takes a plus sign.
    if !digits.first()?.is_ascii_digit() {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

/// Names may have a section in brackets, and that a list: `BODY[HEADER.FIELDS (TO)]<0>`.
fn end_of_name(list: &[u8], mut at: usize, end: usize) -> usize {
    let mut brackets = 0_u32;
    while at < end {
        match list[at] {
            b'[' => brackets += 1,
            b']' => brackets = brackets.saturating_sub(1),
            b' ' if brackets == 0 => break,
            _ => {}
        }
        at += 1;
    }
    at
}

fn end_of_value<'r>(
    list: &[u8],
    mut at: usize,
    end: usize,
    base: usize,
    literals: &mut impl Iterator<Item = &'r std::ops::Range<usize>>,
) -> usize {
    let mut depth = 0_u32;
    while at < end {
        match list[at] {
            b'(' => depth += 1,
            b')' => depth -= 1,
            b'"' => {
                at += 1;
                while list[at] != b'"' {
                    at += if list[at] == b'\\' { 2 } else { 1 };
                }
            }
            b'{' => {
                // A brace in a well-formed list begins a literal.
                at = literals.next().map_or(end, |literal| literal.end - base);
                if depth == 0 {
                    return at;
                }
                continue;
            }
            b' ' if depth == 0 => return at,
            _ => {}
        }
        at += 1;
    }
    at
}

/// Checks the sequence numbers and UIDs of one answer: each message comes once, is one of those there are, and UIDs ascend
/// as sequence numbers do (RFC 9051, 2.3.1).
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    found: Vec<(u32, u32)>,
    updates: bool,
}

impl Numbers {
    /// Messages may come again, because their flags have changed.
    pub fn with_updates() -> Self {
        Self { updates: true, ..Self::default() }
    }

    pub fn take(&mut self, number: u32, uid: u32) {
        self.found.push((number, uid));
    }

    pub fn len(&self) -> usize {
        self.found.len()
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// UIDs in ascending order.
    ///
    /// # Errors
    /// What cannot be true.
    pub fn check(mut self, allowed: RangeInclusive<u32>) -> Result<Vec<u32>, ImapError> {
        self.found.sort_unstable();
        if self.updates {
            self.found.dedup();
        }
        for &(number, _) in &self.found {
            if !allowed.contains(&number) {
                return Err(ImapError::Wrong("no such sequence number", format!("{number} is not in {allowed:?}")));
            }
        }
        for pair in self.found.windows(2) {
            let [(number, uid), (next, uid_of_next)] = [pair[0], pair[1]];
            if number == next {
                return Err(ImapError::Wrong("a message comes twice", format!("message {number}")));
            }
            if uid >= uid_of_next {
                let what = format!("message {number} has UID {uid}, message {next} has {uid_of_next}");
                return Err(ImapError::Wrong("UIDs do not ascend", what));
            }
        }
        Ok(self.found.into_iter().map(|(_, uid)| uid).collect())
    }
}

/// How many numbers a sequence set without `*` names (RFC 9051, 9: sequence-set).
///
/// # Errors
/// It is no such set.
pub fn set_len(set: &str) -> Result<u64, String> {
    let bad = || format!("{set:?} is no set of numbers");
    let mut count = 0;
    for range in set.split(',') {
        let (first, last) = range.split_once(':').unwrap_or((range, range));
        let number = |digits: &str| digits.parse::<u32>().ok().filter(|&number| number > 0).ok_or_else(bad);
        let (first, last) = (number(first)?, number(last)?);
        count += u64::from(first.abs_diff(last)) + 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imap::parse_response;

    fn with<T>(text: &[u8], look: impl FnOnce(Result<FetchData<'_>, String>) -> T) -> T {
        let (mut progress, mut literals) = (0, Vec::new());
        let length = parse_response(text, &mut progress, &mut literals).unwrap().unwrap();
        let response = Response { bytes: &text[..length - 2], literals: &literals };
        let (_, list) = response.numbered("FETCH").unwrap();
        look(FetchData::parse(&response, list))
    }

    #[test]
    fn items_are_read() {
        let text = b"* 3 FETCH (UID 7 FLAGS (\\Seen x) MODSEQ (12) BODY[HEADER.FIELDS (TO \"a b\")] {5}\r\n) (\r\n \
                     RFC822.SIZE 30 ENVELOPE (NIL \"(\\\"\" ((NIL {1}\r\n)))) BODY[] {4}\r\n)  ()\r\n";
        with(text, |data| {
            let data = data.unwrap();
            assert_eq!((data.uid, data.size, data.modseq), (Some(7), Some(30), Some(12)));
            assert_eq!((data.message_octets, data.items), (Some(4), 7));
            assert_eq!(data.octets, 3 + 5 + 3 + 1 + 4);
            assert!(data.has_flag("\\seen") && data.has_flag("x") && !data.has_flag("\\Deleted"));
        });
        with(b"* 3 FETCH (FLAGS () UID 3)\r\n", |data| assert!(data.unwrap().is_update()));
        with(b"* 3 FETCH (FLAGS () UID 3 INTERNALDATE \"\")\r\n", |data| assert!(!data.unwrap().is_update()));
        with(b"* 3 FETCH (UID 3)\r\n", |data| assert!(!data.unwrap().is_update()));
        with(b"* 3 FETCH (BODY[] \"abc\")\r\n", |data| assert_eq!(data.unwrap().message_octets, Some(3)));
        with(b"* 3 FETCH (BODY[] NIL UID 1)\r\n", |data| assert_eq!(data.unwrap().message_octets, None));
    }

    #[test]
    fn values_that_cannot_be_are_errors() {
        for text in [
            &b"* 1 FETCH (UID 0)\r\n"[..],
            b"* 1 FETCH (UID +1)\r\n",
            b"* 1 FETCH (UID 4294967296)\r\n",
            b"* 1 FETCH (UID)\r\n",
            b"* 1 FETCH (UID 1  FLAGS ())\r\n",
            b"* 1 FETCH (FLAGS \\Seen)\r\n",
            b"* 1 FETCH (MODSEQ 3)\r\n",
            b"* 1 FETCH (RFC822.SIZE x)\r\n",
        ] {
            with(text, |data| assert!(data.is_err(), "{data:?}"));
        }
    }

    #[test]
    fn numbers_are_checked() {
        let check = |found: &[(u32, u32)]| {
            let mut numbers = Numbers::default();
            found.iter().for_each(|&(number, uid)| numbers.take(number, uid));
            numbers.check(1..=3).map_err(|error| error.kind())
        };
        assert_eq!(check(&[(1, 5), (3, 9), (2, 6)]), Ok(vec![5, 6, 9]));
        assert_eq!(check(&[(1, 5), (4, 9)]), Err("no such sequence number".to_owned()));
        assert_eq!(check(&[(1, 5), (1, 5)]), Err("a message comes twice".to_owned()));
        assert_eq!(check(&[(1, 5), (2, 5)]), Err("UIDs do not ascend".to_owned()));
        let mut numbers = Numbers::with_updates();
        [(1, 5), (2, 6), (1, 5)].into_iter().for_each(|(number, uid)| numbers.take(number, uid));
        assert_eq!(numbers.check(1..=3), Ok(vec![5, 6]));
        assert_eq!(set_len("3"), Ok(1));
        assert_eq!(set_len("1:3,9,20:11"), Ok(14));
        assert!(set_len("1:*").is_err() && set_len("").is_err() && set_len("0").is_err());
    }
}
