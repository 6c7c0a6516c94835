//! SEARCH (RFC 9051, 6.4.4; RFC 3501, 6.4.4; RFC 4731; RFC 5032; RFC 5182; RFC 7162, 3.1.5; RFC 8474, 6).

use super::append::month;
use posthaste_mime::charset::Charset;

use super::cursor::{Cursor, Fault, Parse};
use crate::response::Code;
use crate::types::{Date, SequenceSet};

#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    pub uid: bool,
    /// RETURN was given: the answer is an ESEARCH response.
    pub returns: Option<SearchReturnOptions>,
    /// Its strings are decoded from the charset that the client gave.
    pub key: SearchKey,
}

/// `search-return-opt`; none of them means ALL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SearchReturnOptions {
    pub min: bool,
    pub max: bool,
    pub all: bool,
    pub count: bool,
    pub save: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SearchKey {
    All,
    And(Vec<SearchKey>),
    Or(Box<(SearchKey, SearchKey)>),
    Not(Box<SearchKey>),
    SequenceNumbers(SequenceSet),
    Uids(SequenceSet),
    Answered,
    Deleted,
    Draft,
    Flagged,
    Seen,
    Recent,
    /// RECENT and not SEEN.
    New,
    Keyword(String),
    /// The internal date, disregarding time and zone.
    Before(Date),
    On(Date),
    Since(Date),
    /// The Date header field, disregarding time and zone.
    SentBefore(Date),
    SentOn(Date),
    SentSince(Date),
    /// Internal date within the last so many seconds, or not (RFC 5032).
    Younger(u64),
    Older(u64),
    Larger(u64),
    Smaller(u64),
    /// FROM, TO, CC and BCC: a field of the envelope with addresses.
    Address {
        name: String,
        value: String,
    },
    /// SUBJECT is one too. An empty value asks whether the field is there.
    Header {
        name: String,
        value: String,
    },
    Body(String),
    /// Header or body.
    Text(String),
    ModSeq(u64),
    EmailId(String),
    ThreadId(String),
}

/// NOT, OR and parentheses within each other.
const DEPTH_MAX: usize = 50;
/// Keys of one command: each costs time on every message.
const KEYS_MAX: usize = 1000;

/// What holds for all keys of a command.
struct Keys {
    charset: Charset,
    /// So many more are allowed.
    left: usize,
}

/// `search = "SEARCH" [search-return-opts] SP search-program`,
/// `search-program = ["CHARSET" SP charset SP] search-key *(SP search-key)`
pub(super) fn parse(c: &mut Cursor<'_>, uid: bool) -> Parse<Search> {
    c.sp()?;
    let mut returns = None;
    let mut keys = Keys { charset: Charset::default(), left: KEYS_MAX };
    if c.eat_word(b"RETURN") {
        c.sp()?;
        returns = Some(parse_returns(c)?);
        c.sp()?;
    }
    if c.eat_word(b"CHARSET") {
        c.sp()?;
        let charset = c.astring("Charset expected")?;
        // In others, as UTF-16, the keys themselves would have two meanings.
        keys.charset = Charset::named(&charset)
            .filter(|charset| charset.keeps_ascii())
            .ok_or(Fault::no(Code::BadCharset, "Charset is not known"))?;
        c.sp()?;
    }
    let mut list = vec![keys.parse(c, 0)?];
    while c.eat(b' ') {
        list.push(keys.parse(c, 0)?);
    }
    Ok(Search { uid, returns, key: and(list) })
}

/// `search-return-opts = SP "RETURN" SP "(" [search-return-opt *(SP search-return-opt)] ")"`
fn parse_returns(c: &mut Cursor<'_>) -> Parse<SearchReturnOptions> {
    let mut returns = SearchReturnOptions::default();
    c.list(true, |c| {
        let name = c.keyword();
        let option = [
            (&b"MIN"[..], &mut returns.min),
            (b"MAX", &mut returns.max),
            (b"ALL", &mut returns.all),
            (b"COUNT", &mut returns.count),
            (b"SAVE", &mut returns.save),
        ]
        .into_iter()
        .find(|(option, _)| name.eq_ignore_ascii_case(option));
        let (_, option) = option.ok_or(Fault::bad("Unknown SEARCH return option"))?;
        *option = true;
        Ok(())
    })?;
    // RFC 4731, 3.1: an empty list is ALL. SAVE alone returns nothing (RFC 5182, 2.1).
    if returns == SearchReturnOptions::default() {
        returns.all = true;
    }
    Ok(returns)
}

fn and(mut keys: Vec<SearchKey>) -> SearchKey {
    match keys.len() {
        1 => keys.remove(0),
        _ => SearchKey::And(keys),
    }
}

fn not(key: SearchKey) -> SearchKey {
    SearchKey::Not(Box::new(key))
}

impl Keys {
    /// `search-key`
    fn parse(&mut self, c: &mut Cursor<'_>, depth: usize) -> Parse<SearchKey> {
        use SearchKey as K;
        if depth > DEPTH_MAX {
            return Err(Fault::bad("Search keys nested too deeply"));
        }
        self.left = self.left.checked_sub(1).ok_or(Fault::no(Code::Limit, "Too many search keys in one command"))?;
        match c.peek() {
            Some(b'0'..=b'9' | b'*' | b'$') => return Ok(K::SequenceNumbers(c.sequence_set()?)),
            Some(b'(') => {
                let mut keys = Vec::new();
                c.list(false, |c| {
                    keys.push(self.parse(c, depth + 1)?);
                    Ok(())
                })?;
                return Ok(and(keys));
            }
            _ => {}
        }
        let mut buffer = [0u8; 16];
        let name = super::upper(c.keyword(), &mut buffer);
        Ok(match name {
            b"ALL" => K::All,
            b"ANSWERED" => K::Answered,
            b"DELETED" => K::Deleted,
            b"DRAFT" => K::Draft,
            b"FLAGGED" => K::Flagged,
            b"SEEN" => K::Seen,
            b"RECENT" => K::Recent,
            b"NEW" => K::New,
            b"OLD" => not(K::Recent),
            b"UNANSWERED" => not(K::Answered),
            b"UNDELETED" => not(K::Deleted),
            b"UNDRAFT" => not(K::Draft),
            b"UNFLAGGED" => not(K::Flagged),
            b"UNSEEN" => not(K::Seen),
            b"KEYWORD" => keyword(c)?,
            b"UNKEYWORD" => not(keyword(c)?),
            b"BEFORE" => K::Before(sp_date(c)?),
            b"ON" => K::On(sp_date(c)?),
            b"SINCE" => K::Since(sp_date(c)?),
            b"SENTBEFORE" => K::SentBefore(sp_date(c)?),
            b"SENTON" => K::SentOn(sp_date(c)?),
            b"SENTSINCE" => K::SentSince(sp_date(c)?),
            b"YOUNGER" => K::Younger(sp_nz_number(c)?),
            b"OLDER" => K::Older(sp_nz_number(c)?),
            b"LARGER" => K::Larger(sp_number(c)?),
            b"SMALLER" => K::Smaller(sp_number(c)?),
            b"FROM" | b"TO" | b"CC" | b"BCC" => {
                let name = String::from_utf8_lossy(name).into_owned();
                K::Address { name, value: self.sp_text(c)? }
            }
            b"SUBJECT" => K::Header { name: "SUBJECT".to_owned(), value: self.sp_text(c)? },
            b"HEADER" => {
                c.sp()?;
                let name = c.astring_utf8("Header field name expected")?;
                K::Header { name, value: self.sp_text(c)? }
            }
            b"BODY" => K::Body(self.sp_text(c)?),
            b"TEXT" => K::Text(self.sp_text(c)?),
            b"UID" => {
                c.sp()?;
                K::Uids(c.sequence_set()?)
            }
            b"NOT" => {
                c.sp()?;
                not(self.parse(c, depth + 1)?)
            }
            b"OR" => {
                c.sp()?;
                let first = self.parse(c, depth + 1)?;
                c.sp()?;
                K::Or(Box::new((first, self.parse(c, depth + 1)?)))
            }
            b"MODSEQ" => {
                c.sp()?;
                // search-modseq-ext = SP entry-name SP entry-type-req: all flags share one mod-sequence, so it changes nothing
                // (RFC 7162, 3.1.5).
                if c.peek() == Some(b'"') {
                    c.string("Entry name expected")?;
                    c.sp()?;
                    c.atom("Entry type expected")?;
                    c.sp()?;
                }
                K::ModSeq(c.number64()?)
            }
            b"EMAILID" => K::EmailId(object_id(c)?),
            b"THREADID" => K::ThreadId(object_id(c)?),
            _ => return Err(Fault::bad("Unknown search key")),
        })
    }

    /// A string in the charset of the command.
    fn sp_text(&self, c: &mut Cursor<'_>) -> Parse<String> {
        c.sp()?;
        let text = c.astring("String expected")?;
        self.charset.decode_strictly(&text).ok_or(Fault::bad("String is not in the charset of the search"))
    }
}

fn keyword(c: &mut Cursor<'_>) -> Parse<SearchKey> {
    c.sp()?;
    Ok(SearchKey::Keyword(c.atom_string("Keyword expected")?))
}

fn object_id(c: &mut Cursor<'_>) -> Parse<String> {
    c.sp()?;
    c.atom_string("Object id expected")
}

fn sp_number(c: &mut Cursor<'_>) -> Parse<u64> {
    c.sp()?;
    c.number64()
}

fn sp_nz_number(c: &mut Cursor<'_>) -> Parse<u64> {
    c.sp()?;
    c.nz_number64()
}

/// `date = date-text / DQUOTE date-text DQUOTE`, `date-text = date-day "-" date-month "-" date-year`
fn sp_date(c: &mut Cursor<'_>) -> Parse<Date> {
    c.sp()?;
    let text = c.astring("Date expected")?;
    date(&text).ok_or(Fault::bad("Invalid date"))
}

fn date(text: &[u8]) -> Option<Date> {
    let mut fields = text.split(|&b| b == b'-');
    let (day, month_name, year) = (fields.next()?, fields.next()?, fields.next()?);
    let digits = |text: &[u8]| text.iter().all(u8::is_ascii_digit);
    if fields.next().is_some() || !(1..=2).contains(&day.len()) || year.len() != 4 || !digits(day) || !digits(year) {
        return None;
    }
    let number = |text: &[u8]| text.iter().fold(0u16, |n, d| n * 10 + u16::from(d - b'0'));
    Date::new(number(year), month(month_name)?, number(day) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::command::tests::parse_line;
    use SearchKey as K;

    fn search(line: &str) -> Search {
        match parse_line(line) {
            Ok(Command::Search(search)) => search,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn key(text: &str) -> SearchKey {
        search(&format!("SEARCH {text}")).key
    }

    #[test]
    fn simple_keys() {
        assert_eq!(key("ALL"), K::All);
        assert_eq!(key("unseen"), K::Not(Box::new(K::Seen)));
        assert_eq!(key("OLD"), K::Not(Box::new(K::Recent)));
        assert_eq!(key("1:3,*"), K::SequenceNumbers(SequenceSet::parse(b"1:3,*").unwrap()));
        assert_eq!(key("UID $"), K::Uids(SequenceSet::Saved));
        assert_eq!(key("KEYWORD $Junk"), K::Keyword("$Junk".into()));
        assert_eq!(key("SINCE 1-Feb-1994"), K::Since(Date::new(1994, 2, 1).unwrap()));
        assert_eq!(key("SENTON \"29-feb-2024\""), K::SentOn(Date::new(2024, 2, 29).unwrap()));
        assert_eq!(key("LARGER 0"), K::Larger(0));
        assert_eq!(key("YOUNGER 259200"), K::Younger(259_200));
        assert_eq!(key("SUBJECT \"Smith\""), K::Header { name: "SUBJECT".into(), value: "Smith".into() });
        assert_eq!(key("FROM \"Smith\""), K::Address { name: "FROM".into(), value: "Smith".into() });
        assert_eq!(key("HEADER Message-ID \"\""), K::Header { name: "Message-ID".into(), value: String::new() });
        assert_eq!(key("TEXT {6+}\r\nпри"), K::Text("при".into()));
        assert_eq!(key("MODSEQ 620162338"), K::ModSeq(620_162_338));
        assert_eq!(key("MODSEQ \"/flags/\\\\draft\" all 620162338"), K::ModSeq(620_162_338));
        assert_eq!(key("EMAILID M6d"), K::EmailId("M6d".into()));
    }

    #[test]
    fn nested_keys() {
        assert_eq!(
            key("FLAGGED SINCE 1-Feb-1994 NOT FROM \"Smith\""),
            K::And(vec![
                K::Flagged,
                K::Since(Date::new(1994, 2, 1).unwrap()),
                K::Not(Box::new(K::Address { name: "FROM".into(), value: "Smith".into() }))
            ])
        );
        assert_eq!(
            key("OR (SEEN DRAFT) NOT (1)"),
            K::Or(Box::new((
                K::And(vec![K::Seen, K::Draft]),
                K::Not(Box::new(K::SequenceNumbers(SequenceSet::parse(b"1").unwrap())))
            )))
        );
    }

    #[test]
    fn return_options() {
        let all = SearchReturnOptions { all: true, ..Default::default() };
        assert_eq!(search("SEARCH ALL").returns, None);
        assert_eq!(search("UID SEARCH RETURN () ALL").returns, Some(all));
        assert_eq!(
            search("SEARCH RETURN (min COUNT SAVE) CHARSET UTF-8 ALL").returns,
            Some(SearchReturnOptions { min: true, count: true, save: true, ..Default::default() })
        );
    }

    #[test]
    fn charsets() {
        assert_eq!(key("CHARSET us-ascii TEXT a"), K::Text("a".into()));
        assert_eq!(key("CHARSET \"UTF-8\" TEXT {2+}\r\né"), K::Text("é".into()));
        assert_eq!(key("TEXT {2+}\r\né"), K::Text("é".into()), "as many clients send it");
        assert_eq!(key("CHARSET ISO-8859-1 TEXT {2+}\r\né"), K::Text("Ã©".into()));
        assert_eq!(key("CHARSET ISO-2022-JP BODY \"\u{1b}$BF|\u{1b}(B\""), K::Body("日".into()));
        for unknown in ["x-none", "UTF-16", "unknown-8bit", "{2+}\r\né"] {
            let bad = Err("NO [BADCHARSET (US-ASCII UTF-8)] Charset is not known".into());
            assert_eq!(parse_line(&format!("SEARCH CHARSET {unknown} ALL")), bad, "{unknown}");
        }
        let bad = Err("BAD String is not in the charset of the search".into());
        assert_eq!(parse_line("SEARCH CHARSET iso-2022-jp TEXT {2+}\r\né"), bad);
    }

    #[test]
    fn trap_5_keys_are_counted() {
        assert!(parse_line(&format!("SEARCH ALL{}", " ALL".repeat(999))).is_ok());
        let bad = Err("NO [LIMIT] Too many search keys in one command".into());
        assert_eq!(parse_line(&format!("SEARCH ALL{}", " ALL".repeat(1000))), bad);
    }

    #[test]
    fn refused() {
        for bad in [
            "",
            "FOO",
            "()",
            "(ALL",
            "NOT",
            "OR ALL",
            "SINCE 31-Feb-2024",
            "SINCE 1-2-2024",
            "SINCE 001-Feb-2024",
            "SINCE 1-Feb-24",
            "LARGER x",
            "YOUNGER 0",
            "UID 0",
            "ALL  ALL",
            "SUBJECT",
            "RETURN (FOO) ALL",
            "RETURN (MIN)",
            "TEXT {1+}\r\n\0",
        ] {
            assert!(parse_line(&format!("SEARCH {bad}")).is_err(), "{bad}");
        }
    }

    /// Trap 5: nesting is bounded, for each way to nest.
    #[test]
    fn trap_5_nesting_is_bounded() {
        for (open, close) in [("(", ")"), ("NOT ", ""), ("OR ALL ", ""), ("(NOT ", ")")] {
            let nested = |n: usize| parse_line(&format!("SEARCH {}ALL{}", open.repeat(n), close.repeat(n)));
            assert!(nested(20).is_ok(), "{open}");
            assert_eq!(nested(3000), Err("BAD Search keys nested too deeply".into()), "{open}");
        }
        for open in ["{", "[", "\"(", "<"] {
            assert!(parse_line(&format!("SEARCH {}", open.repeat(5000))).is_err(), "{open}");
        }
    }
}
