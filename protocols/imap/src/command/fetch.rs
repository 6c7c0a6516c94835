//! FETCH (RFC 9051, 6.4.5; RFC 3501, 6.4.5; RFC 7162, 3.1.4; RFC 8474, 5; RFC 8970).

use super::cursor::{Cursor, Fault, Parse};
use crate::types::SequenceSet;

#[derive(Debug, Clone, PartialEq)]
pub struct Fetch {
    pub uid: bool,
    pub set: SequenceSet,
    /// In the order asked for, macros replaced by what they stand for. Never empty.
    pub items: Vec<FetchItem>,
    /// CHANGEDSINCE: only messages with a higher mod-sequence.
    pub changed_since: Option<u64>,
    /// VANISHED: only with CHANGEDSINCE, and only in UID FETCH.
    pub vanished: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FetchItem {
    Flags,
    Uid,
    InternalDate,
    Rfc822Size,
    Envelope,
    /// BODY without section: BODYSTRUCTURE without extension data.
    Body,
    BodyStructure,
    Rfc822,
    Rfc822Header,
    Rfc822Text,
    BodySection(BodySection),
    ModSeq,
    EmailId,
    ThreadId,
    Preview {
        lazy: bool,
    },
}

/// `"BODY" [".PEEK"] section [partial]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BodySection {
    /// BODY.PEEK: \Seen stays as it is.
    pub peek: bool,
    pub section: Section,
    pub partial: Option<Partial>,
}

/// `section = "[" [section-spec] "]"`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Part numbers; empty for the message itself.
    pub part: Vec<u32>,
    pub text: SectionText,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SectionText {
    /// All of the message, or the body of the part.
    Whole,
    Header,
    /// Field names in the order and case that the client gave.
    HeaderFields {
        not: bool,
        names: Vec<String>,
    },
    Text,
    /// The MIME header of the part; only after part numbers.
    Mime,
}

/// `partial = "<" number64 "." nz-number64 ">"`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    pub offset: u64,
    pub length: u64,
}

/// No message has parts nested deeper.
const PART_NUMBERS_MAX: usize = 100;
const ITEMS_MAX: usize = 500;
const FIELD_NAMES_MAX: usize = 500;

impl FetchItem {
    /// Whether fetching it sets \Seen.
    pub fn sets_seen(&self) -> bool {
        match self {
            FetchItem::BodySection(section) => !section.peek,
            FetchItem::Rfc822 | FetchItem::Rfc822Text => true,
            _ => false,
        }
    }
}

/// `fetch = "FETCH" SP sequence-set SP ("ALL" / "FULL" / "FAST" / fetch-att / "(" fetch-att *(SP fetch-att) ")")
/// [fetch-modifiers]`
pub(super) fn parse(c: &mut Cursor<'_>, uid: bool) -> Parse<Fetch> {
    use FetchItem as I;
    c.sp()?;
    let set = c.sequence_set()?;
    c.sp()?;
    let mut items = Vec::new();
    if c.peek() == Some(b'(') {
        c.list(false, |c| {
            let item = parse_item(c)?;
            // Once is enough, and bounds what one response can be.
            if !items.contains(&item) {
                items.push(item);
            }
            if items.len() > ITEMS_MAX { Err(Fault::bad("Too many items")) } else { Ok(()) }
        })?;
    } else if c.eat_word(b"ALL") {
        items = vec![I::Flags, I::InternalDate, I::Rfc822Size, I::Envelope];
    } else if c.eat_word(b"FAST") {
        items = vec![I::Flags, I::InternalDate, I::Rfc822Size];
    } else if c.eat_word(b"FULL") {
        items = vec![I::Flags, I::InternalDate, I::Rfc822Size, I::Envelope, I::Body];
    } else {
        items.push(parse_item(c)?);
    }
    let mut fetch = Fetch { uid, set, items, changed_since: None, vanished: false };
    if c.eat(b' ') {
        parse_modifiers(c, &mut fetch)?;
    }
    // RFC 7162, 3.1.4.1: CHANGEDSINCE implies MODSEQ; RFC 3501, 6.4.8: UID FETCH implies UID.
    if fetch.changed_since.is_some() && !fetch.items.contains(&I::ModSeq) {
        fetch.items.push(I::ModSeq);
    }
    if uid && !fetch.items.contains(&I::Uid) {
        fetch.items.insert(0, I::Uid);
    }
    Ok(fetch)
}

/// `fetch-modifiers = SP "(" fetch-modifier *(SP fetch-modifier) ")"`
fn parse_modifiers(c: &mut Cursor<'_>, fetch: &mut Fetch) -> Parse<()> {
    c.list(false, |c| {
        if c.eat_word(b"CHANGEDSINCE") && fetch.changed_since.is_none() {
            c.sp()?;
            fetch.changed_since = Some(c.nz_number64()?);
            Ok(())
        } else if c.eat_word(b"VANISHED") {
            fetch.vanished = true;
            Ok(())
        } else {
            Err(Fault::bad("Unknown or repeated FETCH modifier"))
        }
    })?;
    // RFC 7162, 3.2.6
    if fetch.vanished && !(fetch.uid && fetch.changed_since.is_some()) {
        return Err(Fault::bad("VANISHED needs UID FETCH and CHANGEDSINCE"));
    }
    Ok(())
}

/// `fetch-att`
fn parse_item(c: &mut Cursor<'_>) -> Parse<FetchItem> {
    let name = c.keyword();
    let is = |word: &str| name.eq_ignore_ascii_case(word.as_bytes());
    if c.peek() == Some(b'[') {
        if !is("BODY") && !is("BODY.PEEK") {
            return Err(Fault::bad("Unknown FETCH item"));
        }
        let section = parse_section(c)?;
        let partial = if c.eat(b'<') { Some(parse_partial(c)?) } else { None };
        return Ok(FetchItem::BodySection(BodySection { peek: is("BODY.PEEK"), section, partial }));
    }
    Ok(if is("FLAGS") {
        FetchItem::Flags
    } else if is("UID") {
        FetchItem::Uid
    } else if is("INTERNALDATE") {
        FetchItem::InternalDate
    } else if is("RFC822.SIZE") {
        FetchItem::Rfc822Size
    } else if is("ENVELOPE") {
        FetchItem::Envelope
    } else if is("BODYSTRUCTURE") {
        FetchItem::BodyStructure
    } else if is("BODY") {
        FetchItem::Body
    } else if is("MODSEQ") {
        FetchItem::ModSeq
    } else if is("RFC822") {
        FetchItem::Rfc822
    } else if is("RFC822.HEADER") {
        FetchItem::Rfc822Header
    } else if is("RFC822.TEXT") {
        FetchItem::Rfc822Text
    } else if is("EMAILID") {
        FetchItem::EmailId
    } else if is("THREADID") {
        FetchItem::ThreadId
    } else if is("PREVIEW") {
        let lazy = c.eat_sp_and(b'(');
        if lazy && !(c.eat_word(b"LAZY") && c.eat(b')')) {
            return Err(Fault::bad("(LAZY) expected"));
        }
        FetchItem::Preview { lazy }
    } else {
        return Err(Fault::bad("Unknown FETCH item"));
    })
}

/// `section-spec = section-msgtext / (section-part ["." section-text])`,
/// `section-part = nz-number *("." nz-number)`, `section-text = section-msgtext / "MIME"`
fn parse_section(c: &mut Cursor<'_>) -> Parse<Section> {
    c.expect(b'[', "[ expected")?;
    let mut part = Vec::new();
    let whole = |part| Ok(Section { part, text: SectionText::Whole });
    if c.eat(b']') {
        return whole(part);
    }
    while c.peek().is_some_and(|b| b.is_ascii_digit()) {
        part.push(c.nz_number()?);
        if part.len() > PART_NUMBERS_MAX {
            return Err(Fault::bad("Part nested too deeply"));
        }
        if c.eat(b']') {
            return whole(part);
        }
        c.expect(b'.', ". or ] expected")?;
    }
    let name = c.keyword();
    let is = |word: &str| name.eq_ignore_ascii_case(word.as_bytes());
    let text = if is("HEADER") {
        SectionText::Header
    } else if is("TEXT") {
        SectionText::Text
    } else if is("MIME") && !part.is_empty() {
        SectionText::Mime
    } else if is("HEADER.FIELDS") || is("HEADER.FIELDS.NOT") {
        c.sp()?;
        SectionText::HeaderFields { not: is("HEADER.FIELDS.NOT"), names: parse_field_names(c)? }
    } else {
        return Err(Fault::bad("Unknown section"));
    };
    c.expect(b']', "] expected")?;
    Ok(Section { part, text })
}

/// `header-list = "(" header-fld-name *(SP header-fld-name) ")"`
fn parse_field_names(c: &mut Cursor<'_>) -> Parse<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    c.list(false, |c| {
        let name = c.astring_utf8("Header field name expected")?;
        if names.len() >= FIELD_NAMES_MAX {
            return Err(Fault::bad("Too many header field names"));
        }
        names.push(name);
        Ok(())
    })?;
    Ok(names)
}

fn parse_partial(c: &mut Cursor<'_>) -> Parse<Partial> {
    let offset = c.number64()?;
    c.expect(b'.', ". expected")?;
    let length = c.nz_number64()?;
    c.expect(b'>', "> expected")?;
    Ok(Partial { offset, length })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::command::tests::parse_line;

    fn fetch(line: &str) -> Fetch {
        match parse_line(line) {
            Ok(Command::Fetch(fetch)) => fetch,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn items(text: &str) -> Vec<FetchItem> {
        fetch(&format!("FETCH 1 {text}")).items
    }

    fn section(text: &str) -> BodySection {
        match &items(text)[..] {
            [FetchItem::BodySection(section)] => section.clone(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn items_and_macros() {
        use FetchItem as I;
        assert_eq!(items("ALL"), [I::Flags, I::InternalDate, I::Rfc822Size, I::Envelope]);
        assert_eq!(items("fast"), [I::Flags, I::InternalDate, I::Rfc822Size]);
        assert_eq!(items("FULL"), [I::Flags, I::InternalDate, I::Rfc822Size, I::Envelope, I::Body]);
        assert_eq!(
            items("(UID RFC822 RFC822.HEADER RFC822.TEXT RFC822.SIZE BODY BODYSTRUCTURE MODSEQ EMAILID THREADID)"),
            [
                I::Uid,
                I::Rfc822,
                I::Rfc822Header,
                I::Rfc822Text,
                I::Rfc822Size,
                I::Body,
                I::BodyStructure,
                I::ModSeq,
                I::EmailId,
                I::ThreadId
            ]
        );
        assert_eq!(items("(PREVIEW (LAZY) PREVIEW)"), [I::Preview { lazy: true }, I::Preview { lazy: false }]);
        assert_eq!(fetch("UID FETCH 1:* FLAGS").items, [I::Uid, I::Flags], "UID is implied");
    }

    #[test]
    fn sections() {
        let whole = |part: &[u32]| Section { part: part.to_vec(), text: SectionText::Whole };
        assert_eq!(section("BODY[]"), BodySection { peek: false, section: whole(&[]), partial: None });
        assert_eq!(
            section("body.peek[1.2.3]<5.4294967296>"),
            BodySection {
                peek: true,
                section: whole(&[1, 2, 3]),
                partial: Some(Partial { offset: 5, length: 4_294_967_296 })
            }
        );
        assert_eq!(section("BODY[HEADER]").section.text, SectionText::Header);
        assert_eq!(section("BODY[1.TEXT]").section, Section { part: vec![1], text: SectionText::Text });
        assert_eq!(section("BODY[4.1.MIME]").section, Section { part: vec![4, 1], text: SectionText::Mime });
        let names = vec!["DATE".to_owned(), "From".to_owned()];
        assert_eq!(
            section("BODY[HEADER.FIELDS (DATE \"From\")]").section.text,
            SectionText::HeaderFields { not: false, names: names.clone() }
        );
        assert_eq!(
            section("BODY.PEEK[2.HEADER.FIELDS.NOT (DATE {4+}\r\nFrom)]").section,
            Section { part: vec![2], text: SectionText::HeaderFields { not: true, names } }
        );
    }

    #[test]
    fn refused() {
        for bad in [
            "ALL FLAGS",
            "(ALL)",
            "()",
            "(FLAGS",
            "(FLAGS  UID)",
            "FOO",
            "FLAGS[]",
            "BODY[",
            "BODY[0]",
            "BODY[1.]",
            "BODY[1..2]",
            "BODY[MIME]",
            "BODY[HEADER.FIELDS]",
            "BODY[HEADER.FIELDS ()]",
            "BODY[FOO]",
            "BODY[TEXT.1]",
            "BODY[]<0>",
            "BODY[]<0.0>",
            "BODY[]<1.2",
            "BODY[]<99999999999999999999.1>",
            "BODY.PEEK",
            "FLAGS (CHANGEDSINCE 0)",
            "FLAGS (VANISHED)",
            "FLAGS (FOO)",
        ] {
            assert!(parse_line(&format!("FETCH 1 {bad}")).is_err(), "{bad}");
        }
        assert!(parse_line(&format!("FETCH 1 BODY[{}]", ["1"; 101].join("."))).is_err());
        assert!(parse_line("FETCH 1 FLAGS (CHANGEDSINCE 5 VANISHED)").is_err(), "not with sequence numbers");
    }

    #[test]
    fn modifiers() {
        let found = fetch("UID FETCH 300:500 (FLAGS) (CHANGEDSINCE 12345 VANISHED)");
        assert_eq!((found.changed_since, found.vanished), (Some(12345), true));
        assert_eq!(found.items, [FetchItem::Uid, FetchItem::Flags, FetchItem::ModSeq]);
    }

    #[test]
    fn what_sets_seen() {
        let seen = |text: &str| items(text)[0].sets_seen();
        assert!(seen("BODY[1]") && seen("RFC822") && seen("RFC822.TEXT"));
        assert!(!seen("BODY.PEEK[1]") && !seen("RFC822.HEADER") && !seen("BODY"));
    }
}
