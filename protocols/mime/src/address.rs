//! Address lists (RFC 5322, 3.4 and 4.4), as ENVELOPE gives them (RFC 3501, 7.4.2).
//!
//! Nothing is refused: what is no address still shows as something. The scan is one pass, without recursion.

use crate::header::Tokens;

/// One member of an address list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    Mailbox {
        /// The phrase, or the comment after an address without one, unquoted. Encoded words are left as they are.
        name: Option<&'a [u8]>,
        /// The source route.
        route: Option<&'a [u8]>,
        /// Unquoted.
        local_part: &'a [u8],
        /// Empty where there is none.
        domain: &'a [u8],
    },
    GroupStart(&'a [u8]),
    GroupEnd,
}

/// More entries of one field are passed over.
pub const ENTRIES_MAX: usize = 10_000;

/// The words read so far: of a phrase or of an address, which of them shows later.
#[derive(Default)]
struct Words {
    text: Vec<u8>,
    /// Where the last `@` outside of quotes is.
    at_sign: Option<usize>,
    space: bool,
    comment: Vec<u8>,
}

impl Words {
    fn clear(&mut self) {
        self.text.clear();
        self.comment.clear();
        (self.at_sign, self.space) = (None, false);
    }

    /// Puts one space between words that had space between them.
    fn begin_word(&mut self) {
        if std::mem::take(&mut self.space) && !self.text.is_empty() {
            self.text.push(b' ');
        }
    }
}

/// Calls `f` with each member of the list.
pub fn for_each_entry(value: &[u8], mut f: impl FnMut(Entry<'_>)) {
    let mut tokens = Tokens::new(value);
    let mut words = Words::default();
    let mut in_group = false;
    let mut count = 0;
    let mut emit = |entry: Entry<'_>| {
        count += 1;
        f(entry);
        count < ENTRIES_MAX
    };
    loop {
        let next = tokens.peek();
        match next {
            None | Some(b',' | b';') => {
                tokens.bump();
                if !words.text.is_empty() && !emit_address(&mut words, &mut emit) {
                    return;
                }
                words.clear();
                if in_group && next != Some(b',') {
                    in_group = false;
                    emit(Entry::GroupEnd);
                }
                if next.is_none() {
                    return;
                }
            }
            Some(b' ' | b'\t' | b'\r' | b'\n') => {
                tokens.bump();
                words.space = true;
            }
            Some(b'(') => {
                words.comment.clear();
                tokens.skip_comment(Some(&mut words.comment));
                words.space = true;
            }
            Some(b'"') => {
                words.begin_word();
                tokens.push_quoted(&mut words.text);
            }
            Some(b':') if !in_group && words.at_sign.is_none() => {
                tokens.bump();
                in_group = true;
                if !emit(Entry::GroupStart(&words.text)) {
                    return;
                }
                words.clear();
            }
            Some(b'<') => {
                tokens.bump();
                if !emit_angle_address(&mut tokens, &words, &mut emit) {
                    return;
                }
                words.clear();
                skip_to_separator(&mut tokens);
            }
            Some(b) => {
                tokens.bump();
                words.begin_word();
                if b == b'@' {
                    words.at_sign = Some(words.text.len());
                }
                words.text.push(b);
            }
        }
    }
}

/// `addr-spec`, and the old form with the name in a comment: `a@b (Name)`.
fn emit_address(words: &mut Words, emit: &mut impl FnMut(Entry<'_>) -> bool) -> bool {
    let (local_part, domain) = match words.at_sign {
        Some(at) => (words.text[..at].trim_ascii(), &words.text[at + 1..]),
        None => (&words.text[..], &b""[..]),
    };
    let name = (!words.comment.is_empty()).then(|| words.comment.trim_ascii());
    emit(Entry::Mailbox { name, route: None, local_part, domain: domain.trim_ascii() })
}

/// `angle-addr = [CFWS] "<" addr-spec ">" [CFWS]`, `obs-angle-addr = [CFWS] "<" obs-route addr-spec ">" [CFWS]`
fn emit_angle_address(tokens: &mut Tokens<'_>, phrase: &Words, emit: &mut impl FnMut(Entry<'_>) -> bool) -> bool {
    let mut text = Vec::new();
    let (mut at_sign, mut route_end) = (None, None);
    while let Some(b) = tokens.peek() {
        match b {
            b'>' => {
                tokens.bump();
                break;
            }
            b' ' | b'\t' | b'\r' | b'\n' => tokens.bump(),
            b'(' => tokens.skip_comment(None),
            b'"' => tokens.push_quoted(&mut text),
            b => {
                tokens.bump();
                // A route ends with a colon and begins with @.
                if b == b':' && route_end.is_none() && text.first() == Some(&b'@') {
                    route_end = Some(text.len());
                    at_sign = None;
                    continue;
                }
                if b == b'@' {
                    at_sign = Some(text.len());
                }
                text.push(b);
            }
        }
    }
    let start = route_end.unwrap_or(0);
    let (local_part, domain) = match at_sign {
        Some(at) => (&text[start..at], &text[at + 1..]),
        None => (&text[start..], &b""[..]),
    };
    let name = if phrase.text.is_empty() { &phrase.comment } else { &phrase.text };
    let name = (!name.is_empty()).then_some(&name[..]);
    emit(Entry::Mailbox { name, route: route_end.map(|end| &text[..end]), local_part, domain })
}

/// After an address in brackets nothing but a separator makes sense; what is there otherwise is dropped.
fn skip_to_separator(tokens: &mut Tokens<'_>) {
    loop {
        match tokens.peek() {
            None | Some(b',' | b';') => return,
            Some(b'(') => tokens.skip_comment(None),
            Some(b'"') => tokens.push_quoted(&mut Vec::new()),
            Some(_) => tokens.bump(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries(value: &str) -> Vec<String> {
        let mut found = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        for_each_entry(value.as_bytes(), |entry| {
            found.push(match entry {
                Entry::GroupStart(name) => format!("{}:", text(name)),
                Entry::GroupEnd => ";".into(),
                Entry::Mailbox { name, route, local_part, domain } => {
                    let name = name.map_or("-".into(), text);
                    let route = route.map_or(String::new(), |r| format!(" [{}]", text(r)));
                    format!("{name}{route} <{}|{}>", text(local_part), text(domain))
                }
            });
        });
        found
    }

    #[test]
    fn usual_forms() {
        assert_eq!(entries("a@b.c"), ["- <a|b.c>"]);
        assert_eq!(entries("A B <a@b.c>, \"D, E\" <d@e>"), ["A B <a|b.c>", "D, E <d|e>"]);
        assert_eq!(entries("<a@b>"), ["- <a|b>"]);
        assert_eq!(entries("a@b (Tom (x) \\) T)"), ["Tom x ) T <a|b>"]);
        assert_eq!(entries("\"a \\\" b\"@c"), ["- <a \" b|c>"]);
        assert_eq!(entries("=?utf-8?q?x=2C?= y <a@[1.2.3.4]>"), ["=?utf-8?q?x=2C?= y <a|[1.2.3.4]>"]);
        assert_eq!(entries("A\r\n  B <a@b>"), ["A B <a|b>"]);
        assert_eq!(entries("Joe Q. Public <j@x>"), ["Joe Q. Public <j|x>"]);
        assert_eq!(entries("X <@r,@s:a@b>"), ["X [@r,@s] <a|b>"]);
    }

    /// Trap 27: groups are marked by a start and an end.
    #[test]
    fn trap_27_groups() {
        assert_eq!(entries("undisclosed-recipients:;"), ["undisclosed-recipients:", ";"]);
        assert_eq!(entries("A Group: a@b, C <c@d>; e@f"), ["A Group:", "- <a|b>", "C <c|d>", ";", "- <e|f>"]);
        assert_eq!(entries("g: a@b"), ["g:", "- <a|b>", ";"], "an open group is closed");
    }

    #[test]
    fn broken_forms() {
        assert_eq!(entries(""), [""; 0]);
        assert_eq!(entries(",, ,"), [""; 0]);
        assert_eq!(entries("nobody"), ["- <nobody|>"]);
        assert_eq!(entries("a@b <a@b>"), ["a@b <a|b>"]);
        assert_eq!(entries("<a@b"), ["- <a|b>"]);
        assert_eq!(entries("\"open <a@b>"), ["- <open <a@b>|>"]);
        assert_eq!(entries("<>"), ["- <|>"]);
        assert_eq!(entries("a@b> x"), ["- <a|b> x>"]);
    }

    /// Trap 33: the number of addresses is bounded.
    #[test]
    fn trap_33_addresses_are_capped() {
        assert_eq!(entries(&"a@b,".repeat(20_000)).len(), ENTRIES_MAX);
    }

    proptest! {
        #[test]
        fn never_panics(value in "[a@<>,;:()\"\\\\ .\r\n\\[\\]]{0,40}") {
            entries(&value);
        }
    }
}
