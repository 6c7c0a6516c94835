//! The position in a command, and the productions that all commands use.

use std::borrow::Cow;

use super::ParseOptions;
use crate::frame::Literal;
use crate::response::{Code, Status};
use crate::types::{Flag, MailboxName, SequenceSet};

/// What is wrong with a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub status: Status,
    pub code: Option<Code<'static>>,
    pub text: Cow<'static, str>,
}

impl Fault {
    pub fn bad(text: impl Into<Cow<'static, str>>) -> Self {
        Self { status: Status::Bad, code: None, text: text.into() }
    }

    pub fn no(code: Code<'static>, text: impl Into<Cow<'static, str>>) -> Self {
        Self { status: Status::No, code: Some(code), text: text.into() }
    }
}

pub(crate) type Parse<T> = Result<T, Fault>;

/// `ATOM-CHAR = <any CHAR except atom-specials>`
pub(crate) fn is_atom_char(b: u8) -> bool {
    matches!(b, 0x21..=0x7e) && !matches!(b, b'(' | b')' | b'{' | b'%' | b'*' | b'"' | b'\\' | b']')
}

/// `ASTRING-CHAR = ATOM-CHAR / resp-specials`
pub(crate) fn is_astring_char(b: u8) -> bool {
    is_atom_char(b) || b == b']'
}

/// `list-char = ATOM-CHAR / list-wildcards / resp-specials`
fn is_list_char(b: u8) -> bool {
    is_astring_char(b) || matches!(b, b'%' | b'*')
}

pub(crate) struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
    literals: std::slice::IterMut<'a, Literal>,
    options: ParseOptions,
}

impl<'a> Cursor<'a> {
    pub fn new(text: &'a [u8], literals: &'a mut [Literal], options: ParseOptions) -> Self {
        Self { text, at: 0, literals: literals.iter_mut(), options }
    }

    pub fn skip(&mut self, n: usize) {
        self.at = (self.at + n).min(self.text.len());
    }

    pub fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.text[self.at..]
    }

    /// Takes `b` if it is next.
    pub fn eat(&mut self, b: u8) -> bool {
        let found = self.peek() == Some(b);
        self.at += usize::from(found);
        found
    }

    /// Takes SP and `b` if they are next.
    pub fn eat_sp_and(&mut self, b: u8) -> bool {
        let found = self.rest().starts_with(&[b' ', b]);
        self.at += if found { 2 } else { 0 };
        found
    }

    /// Takes `word`, in any case, if it is next and no atom goes on after it.
    pub fn eat_word(&mut self, word: &[u8]) -> bool {
        let rest = self.rest();
        let found = rest.get(..word.len()).is_some_and(|head| head.eq_ignore_ascii_case(word))
            && !rest.get(word.len()).is_some_and(|&b| is_atom_char(b));
        self.at += if found { word.len() } else { 0 };
        found
    }

    pub fn expect(&mut self, b: u8, what: &'static str) -> Parse<()> {
        if self.eat(b) { Ok(()) } else { Err(Fault::bad(what)) }
    }

    pub fn sp(&mut self) -> Parse<()> {
        self.expect(b' ', "Space expected")
    }

    pub fn end(&self) -> Parse<()> {
        if self.rest().is_empty() { Ok(()) } else { Err(Fault::bad("Unexpected text after the command")) }
    }

    fn take_while(&mut self, accept: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = self.rest();
        let end = rest.iter().position(|&b| !accept(b)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// `atom = 1*ATOM-CHAR`
    pub fn atom(&mut self, what: &'static str) -> Parse<&'a [u8]> {
        let atom = self.take_while(is_atom_char);
        if atom.is_empty() { Err(Fault::bad(what)) } else { Ok(atom) }
    }

    pub fn atom_string(&mut self, what: &'static str) -> Parse<String> {
        Ok(String::from_utf8_lossy(self.atom(what)?).into_owned()) // atoms are ASCII
    }

    /// A keyword of a grammar: letters, digits, `.`, `-`, `_`. Stops before brackets and the like.
    pub fn keyword(&mut self) -> &'a [u8] {
        self.take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
    }

    /// `number64 = 1*DIGIT`, below 2^63 (RFC 9051, 9).
    pub fn number64(&mut self) -> Parse<u64> {
        let digits = self.take_while(|b| b.is_ascii_digit());
        let in_range = !digits.is_empty() && digits.len() <= 19;
        let n = digits.iter().take(19).fold(0u64, |n, d| n * 10 + u64::from(d - b'0'));
        if in_range && n <= i64::MAX as u64 { Ok(n) } else { Err(Fault::bad("Number expected, or out of range")) }
    }

    /// `nz-number64`
    pub fn nz_number64(&mut self) -> Parse<u64> {
        match self.number64()? {
            0 => Err(Fault::bad("Number must not be zero")),
            n => Ok(n),
        }
    }

    /// `nz-number`, below 2^32.
    pub fn nz_number(&mut self) -> Parse<u32> {
        u32::try_from(self.nz_number64()?).map_err(|_| Fault::bad("Number out of range"))
    }

    pub fn sequence_set(&mut self) -> Parse<SequenceSet> {
        let text = self.take_while(|b| b.is_ascii_digit() || matches!(b, b':' | b',' | b'*' | b'$'));
        SequenceSet::parse(text).ok_or(Fault::bad("Invalid sequence set"))
    }

    /// `quoted = DQUOTE *QUOTED-CHAR DQUOTE`, with 8-bit octets, which many clients send, left as they are.
    fn quoted(&mut self) -> Parse<Cow<'a, [u8]>> {
        self.expect(b'"', "String expected")?;
        let start = self.at;
        let plain = self.take_while(|b| !matches!(b, b'"' | b'\\' | 0 | b'\r' | b'\n'));
        if self.eat(b'"') {
            return Ok(Cow::Borrowed(plain));
        }
        self.at = start;
        let mut out = Vec::new();
        loop {
            out.extend_from_slice(self.take_while(|b| !matches!(b, b'"' | b'\\' | 0 | b'\r' | b'\n')));
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(out));
                }
                Some(b'\\') => match self.text.get(self.at + 1) {
                    Some(&b @ (b'"' | b'\\')) => {
                        out.push(b);
                        self.at += 2;
                    }
                    _ => return Err(Fault::bad("Bad escape in quoted string")),
                },
                Some(0) => return Err(Fault::bad("NUL in quoted string")),
                _ => return Err(Fault::bad("Quoted string without end")),
            }
        }
    }

    pub fn is_at_literal(&self) -> bool {
        matches!(self.rest(), [b'{', ..] | [b'~', b'{', ..])
    }

    /// `literal / literal8`: takes the octets out of the frame.
    pub fn literal(&mut self) -> Parse<Literal> {
        let rest = self.rest();
        let end = memchr::memchr(b'\n', rest).filter(|&end| self.is_at_literal() && rest[..end].ends_with(b"}\r"));
        let (Some(end), Some(literal)) = (end, self.literals.next()) else {
            return Err(Fault::bad("Literal expected"));
        };
        self.at += end + 1;
        Ok(std::mem::take(literal))
    }

    /// `string = quoted / literal`
    pub fn string(&mut self, what: &'static str) -> Parse<Cow<'a, [u8]>> {
        match self.peek() {
            Some(b'"') => self.quoted(),
            Some(b'{') => {
                let literal = self.literal()?;
                // CHAR8 excludes NUL.
                if literal.has_nul {
                    return Err(Fault::bad("NUL in literal"));
                }
                Ok(Cow::Owned(literal.bytes.into_vec()))
            }
            _ => Err(Fault::bad(what)),
        }
    }

    /// `astring = 1*ASTRING-CHAR / string`
    pub fn astring(&mut self, what: &'static str) -> Parse<Cow<'a, [u8]>> {
        let atom = self.take_while(is_astring_char);
        if atom.is_empty() { self.string(what) } else { Ok(Cow::Borrowed(atom)) }
    }

    /// An astring that must be UTF-8.
    pub fn astring_utf8(&mut self, what: &'static str) -> Parse<String> {
        String::from_utf8(self.astring(what)?.into_owned()).map_err(|_| Fault::bad("String is not UTF-8"))
    }

    /// `nstring = string / nil`
    pub fn nstring(&mut self, what: &'static str) -> Parse<Option<Cow<'a, [u8]>>> {
        if self.eat_word(b"NIL") { Ok(None) } else { self.string(what).map(Some) }
    }

    /// `mailbox = "INBOX" / astring`
    pub fn mailbox(&mut self) -> Parse<MailboxName> {
        let name = self.astring("Mailbox name expected")?;
        MailboxName::parse(&name, self.options.utf8).map_err(|e| Fault::no(Code::Cannot, e.to_string()))
    }

    pub fn sp_mailbox(&mut self) -> Parse<MailboxName> {
        self.sp()?;
        self.mailbox()
    }

    /// `list-mailbox = 1*list-char / string`, as UTF-8. A pattern that is no name, as half of a shift is, stays as it is:
    /// it matches nothing.
    pub fn list_mailbox(&mut self) -> Parse<String> {
        let atom = self.take_while(is_list_char);
        let text = if atom.is_empty() { self.string("Mailbox pattern expected")? } else { Cow::Borrowed(atom) };
        self.pattern(&text)
    }

    /// The reference of LIST: a mailbox name, but INBOX has no special meaning in it.
    pub fn reference(&mut self) -> Parse<String> {
        let text = self.astring("Reference name expected")?;
        self.pattern(&text)
    }

    fn pattern(&self, text: &[u8]) -> Parse<String> {
        match MailboxName::parse(text, self.options.utf8) {
            // Not `INBOX` in capitals if the client wrote otherwise: a reference of `inbox` is a prefix of names.
            Ok(name) if !name.is_inbox() => Ok(name.as_str().to_owned()),
            _ => String::from_utf8(text.to_vec()).map_err(|_| Fault::bad("Mailbox pattern is not UTF-8")),
        }
    }

    /// `"(" [item *(SP item)] ")"`, or with at least one item.
    pub fn list(&mut self, allow_empty: bool, mut item: impl FnMut(&mut Self) -> Parse<()>) -> Parse<()> {
        self.expect(b'(', "( expected")?;
        if allow_empty && self.eat(b')') {
            return Ok(());
        }
        loop {
            item(self)?;
            if self.eat(b')') {
                return Ok(());
            }
            self.expect(b' ', "Space or ) expected")?;
        }
    }

    /// `flag = "\Answered" / ... / flag-keyword / flag-extension`. `None` for `\Recent`, which clients repeat from FETCH
    /// responses and which nobody can set: it is passed over.
    pub fn flag(&mut self) -> Parse<Option<Flag>> {
        const KEYWORD_BYTES_MAX: usize = 100;
        if self.eat(b'\\') {
            let name = self.atom("Flag name expected")?;
            if name.eq_ignore_ascii_case(b"Recent") {
                return Ok(None);
            }
            return Flag::system(name).map(Some).ok_or(Fault::bad("Unknown system flag"));
        }
        let name = self.atom_string("Flag expected")?;
        if name.len() > KEYWORD_BYTES_MAX {
            return Err(Fault::no(Code::Limit, "Keyword too long"));
        }
        Ok(Some(Flag::Keyword(name)))
    }

    /// `flag-list = "(" [flag *(SP flag)] ")"`, each flag once.
    pub fn flag_list(&mut self) -> Parse<Vec<Flag>> {
        let mut flags = Vec::new();
        self.list(true, |c| {
            flags.extend(c.flag()?);
            Ok(())
        })?;
        flags.sort_unstable();
        flags.dedup();
        Ok(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with<T>(text: &str, parse: impl Fn(&mut Cursor<'_>) -> Parse<T>) -> Parse<T> {
        let mut cursor = Cursor::new(text.as_bytes(), &mut [], ParseOptions::default());
        parse(&mut cursor).and_then(|value| cursor.end().map(|()| value))
    }

    #[test]
    fn strings() {
        let string = |text: &str| with(text, |c| c.astring("no").map(|s| String::from_utf8(s.into_owned()).unwrap()));
        assert_eq!(string("abc]"), Ok("abc]".into()));
        assert_eq!(string("\"\""), Ok("".into()));
        assert_eq!(string("\"a\\\"b\\\\\""), Ok("a\"b\\".into()));
        assert_eq!(string("\"é\""), Ok("é".into()));
        for bad in ["", "\"", "\"a", "\"a\\", "\"a\\n\"", "\"a\r\n\"", "é", "a b", "{3}\r\n", "{3}"] {
            assert!(string(bad).is_err(), "{bad:?}");
        }
    }

    /// Trap 17: NUL in quoted strings.
    #[test]
    fn trap_17_nul_in_strings() {
        assert_eq!(with("\"a\0b\"", |c| c.string("no").map(|_| ())), Err(Fault::bad("NUL in quoted string")));
        let mut literals = [Literal { bytes: b"a\0".to_vec().into(), is_literal8: false, has_nul: true }];
        let mut cursor = Cursor::new(b"{2}\r\n", &mut literals, ParseOptions::default());
        assert_eq!(cursor.string("no"), Err(Fault::bad("NUL in literal")));
    }

    /// Trap 55: numbers at their limits.
    #[test]
    fn trap_55_numbers() {
        let nz = |text: &str| with(text, |c| c.nz_number()).ok();
        assert_eq!(nz("4294967295"), Some(u32::MAX));
        assert_eq!(nz("4294967296"), None);
        assert_eq!(nz("0"), None);
        let long = |text: &str| with(text, |c| c.number64()).ok();
        assert_eq!(long("9223372036854775807"), Some(i64::MAX as u64));
        assert_eq!(long("9223372036854775808"), None);
        assert_eq!(long("99999999999999999999999999"), None);
        assert_eq!(long(""), None);
    }

    proptest! {
        /// Whatever string the encoder writes, as an atom, in quotes or as a literal, reads back.
        #[test]
        fn strings_round_trip(bytes in prop::collection::vec(1u8.., 0..30), pad in 0usize..2) {
            use crate::frame::{Event, Expect, Framer, Limits};
            let bytes = [bytes, vec![b'x'; pad * 1100]].concat();
            let mut line = b"t ".to_vec();
            crate::response::write_astring(&mut line, &bytes);
            line.extend_from_slice(b"\r\n");
            let (taken, event) =
                Framer::new(Limits::authenticated(10_000)).step(&line, Expect::Command, &mut Vec::new());
            let Event::Command(mut frame) = event else { panic!("{event:?}") };
            prop_assert_eq!(taken, line.len());
            let mut cursor = Cursor::new(&frame.text, &mut frame.literals, ParseOptions::default());
            cursor.skip(2);
            prop_assert_eq!(cursor.astring("no").map(|s| s.into_owned()), Ok(bytes));
            prop_assert_eq!(cursor.end(), Ok(()));
        }
    }

    #[test]
    fn flags() {
        let flags = |text: &str| with(text, |c| c.flag_list());
        assert_eq!(flags("()"), Ok(vec![]));
        assert_eq!(flags("(\\seen $Junk \\Recent \\Seen)"), Ok(vec![Flag::Seen, Flag::Keyword("$Junk".into())]));
        for bad in ["(", "( )", "(\\)", "(\\Foo)", "(a  b)", "(a", "(\\*)", "(a(b))"] {
            assert!(flags(bad).is_err(), "{bad}");
        }
    }
}
