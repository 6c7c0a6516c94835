//! FETCH responses (RFC 3501, 7.4.2).

use super::text::{write_astring, write_literal, write_literal_start, write_number, write_string};
use crate::command::fetch::{BodySection, Section, SectionText};
use crate::types::DateTime;

/// Writes one `* n FETCH (...)` response, item by item.
///
/// ```text
/// let mut fetch = FetchWriter::new(out, 12);
/// fetch.uid(345);
/// fetch.flags("\\Seen");
/// fetch.finish();
/// ```
#[derive(Debug)]
#[must_use = "a response ends with `finish`"]
pub struct FetchWriter<'o> {
    out: &'o mut Vec<u8>,
    first: bool,
}

/// A response that has begun and is to go on.
#[derive(Debug)]
#[must_use = "a response ends with `finish`"]
pub struct Paused {
    first: bool,
}

impl Paused {
    pub fn go_on(self, out: &mut Vec<u8>) -> FetchWriter<'_> {
        FetchWriter { out, first: self.first }
    }
}

impl<'o> FetchWriter<'o> {
    pub fn new(out: &'o mut Vec<u8>, sequence_number: u32) -> Self {
        out.extend_from_slice(b"* ");
        write_number(out, u64::from(sequence_number));
        out.extend_from_slice(b" FETCH (");
        Self { out, first: true }
    }

    pub fn finish(self) {
        self.out.extend_from_slice(b")\r\n");
    }

    /// Octets that wait to be sent.
    pub fn written(&self) -> usize {
        self.out.len()
    }

    /// Gives the output back between two items, so that it can be sent.
    pub fn pause(self) -> Paused {
        Paused { first: self.first }
    }

    /// Begins an item; the caller appends its value to what it gets.
    pub fn item(&mut self, name: &str) -> &mut Vec<u8> {
        if !self.first {
            self.out.push(b' ');
        }
        self.first = false;
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(b' ');
        self.out
    }

    pub fn uid(&mut self, uid: u32) {
        write_number(self.item("UID"), u64::from(uid));
    }

    /// `flags` are separated by spaces.
    pub fn flags(&mut self, flags: &str) {
        let out = self.item("FLAGS");
        out.push(b'(');
        out.extend_from_slice(flags.as_bytes());
        out.push(b')');
    }

    pub fn rfc822_size(&mut self, bytes: u64) {
        write_number(self.item("RFC822.SIZE"), bytes);
    }

    pub fn internal_date(&mut self, date: DateTime) {
        write_internal_date(self.item("INTERNALDATE"), date);
    }

    /// `"MODSEQ" SP "(" permsg-modsequence ")"` (RFC 7162, 7).
    pub fn mod_seq(&mut self, mod_seq: u64) {
        let out = self.item("MODSEQ");
        out.push(b'(');
        write_number(out, mod_seq);
        out.push(b')');
    }

    /// `"EMAILID" SP "(" objectid ")"` (RFC 8474, 5.1).
    pub fn email_id(&mut self, id: &str) {
        let out = self.item("EMAILID");
        out.push(b'(');
        out.extend_from_slice(id.as_bytes());
        out.push(b')');
    }

    /// RFC822, RFC822.HEADER and RFC822.TEXT: announces a literal of `len` octets, as
    /// [`FetchWriter::body_section_streamed`].
    pub fn rfc822_streamed(&mut self, name: &str, len: u64) {
        write_literal_start(self.item(name), len);
    }

    /// `"BODY" section ["<" number ">"] SP nstring`. `bytes` is what the section and its partial cut out.
    pub fn body_section(&mut self, section: &BodySection, bytes: &[u8]) {
        self.body_section_name(section);
        if bytes.is_empty() { write_string(self.out, bytes) } else { write_literal(self.out, bytes) }
    }

    /// The part does not exist: NIL.
    pub fn body_section_nil(&mut self, section: &BodySection) {
        self.body_section_name(section);
        self.out.extend_from_slice(b"NIL");
    }

    /// Announces a literal of `len` octets which the caller appends, before anything else, in whatever pieces it has.
    pub fn body_section_streamed(&mut self, section: &BodySection, len: u64) {
        self.body_section_name(section);
        write_literal_start(self.out, len);
    }

    /// Appends octets of a literal that was announced.
    pub fn append(&mut self, pieces: &[&[u8]]) {
        self.out.reserve(pieces.iter().map(|piece| piece.len()).sum::<usize>() + 64);
        pieces.iter().for_each(|piece| self.out.extend_from_slice(piece));
    }

    fn body_section_name(&mut self, section: &BodySection) {
        if !self.first {
            self.out.push(b' ');
        }
        self.first = false;
        self.out.extend_from_slice(b"BODY[");
        write_section(self.out, &section.section);
        self.out.push(b']');
        if let Some(partial) = section.partial {
            self.out.push(b'<');
            write_number(self.out, partial.offset);
            self.out.push(b'>');
        }
        self.out.push(b' ');
    }
}

/// `section-spec = section-msgtext / (section-part ["." section-text])`
fn write_section(out: &mut Vec<u8>, section: &Section) {
    for (i, number) in section.part.iter().enumerate() {
        if i > 0 {
            out.push(b'.');
        }
        write_number(out, u64::from(*number));
    }
    if !section.part.is_empty() && section.text != SectionText::Whole {
        out.push(b'.');
    }
    match &section.text {
        SectionText::Whole => {}
        SectionText::Header => out.extend_from_slice(b"HEADER"),
        SectionText::Text => out.extend_from_slice(b"TEXT"),
        SectionText::Mime => out.extend_from_slice(b"MIME"),
        SectionText::HeaderFields { not, names } => {
            out.extend_from_slice(if *not { b"HEADER.FIELDS.NOT (" } else { b"HEADER.FIELDS (" });
            for (i, name) in names.iter().enumerate() {
                if i > 0 {
                    out.push(b' ');
                }
                write_astring(out, name.as_bytes());
            }
            out.push(b')');
        }
    }
}

/// `date-time = DQUOTE date-day-fixed "-" date-month "-" date-year SP time SP zone DQUOTE`
pub fn write_internal_date(out: &mut Vec<u8>, date: DateTime) {
    use std::io::Write;
    let (year, month, day, seconds) = date.local_parts();
    let sign = if date.offset_minutes < 0 { '-' } else { '+' };
    let offset = date.offset_minutes.unsigned_abs();
    // Writing to a Vec cannot fail.
    let _ = write!(
        out,
        "\"{day:2}-{}-{year:04} {:02}:{:02}:{:02} {sign}{:02}{:02}\"",
        crate::types::MONTHS[month as usize - 1],
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        offset / 60,
        offset % 60
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::fetch::Partial;
    use proptest::prelude::*;

    #[test]
    fn a_whole_response() {
        let mut out = Vec::new();
        let mut fetch = FetchWriter::new(&mut out, 23);
        fetch.flags("\\Seen");
        fetch.uid(4_294_967_295);
        fetch.rfc822_size(44827);
        fetch.mod_seq(624_140_003);
        fetch.email_id("M1");
        fetch.internal_date(DateTime { unix_seconds: 837_595_122, offset_minutes: -420 });
        fetch.body_section(
            &BodySection {
                peek: true,
                section: Section {
                    part: vec![1, 2],
                    text: SectionText::HeaderFields { not: true, names: vec!["DATE".into(), "X (".into()] },
                },
                partial: Some(Partial { offset: 0, length: 10 }),
            },
            b"Date: x\r\n",
        );
        fetch.body_section_nil(&BodySection {
            peek: false,
            section: Section { part: vec![3], text: SectionText::Whole },
            partial: None,
        });
        fetch.rfc822_streamed("RFC822.HEADER", 0);
        fetch.finish();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "* 23 FETCH (FLAGS (\\Seen) UID 4294967295 RFC822.SIZE 44827 MODSEQ (624140003) EMAILID (M1) \
             INTERNALDATE \"17-Jul-1996 02:18:42 -0700\" BODY[1.2.HEADER.FIELDS.NOT (DATE \"X (\")]<0> {9}\r\nDate: x\r\n \
             BODY[3] NIL RFC822.HEADER {0}\r\n)\r\n"
        );
    }

    proptest! {
        /// What a client asks for is what it is told it gets.
        #[test]
        fn section_round_trip(
            part in prop::collection::vec(1u32.., 0..4), kind in 0u8..6, names in prop::collection::vec("[!-~ ]{0,6}", 1..4),
            partial in prop::option::of((0u64..1 << 40, 1u64..1 << 40)))
        {
            let text = match kind {
                0 => SectionText::Header,
                1 => SectionText::Text,
                2 if !part.is_empty() => SectionText::Mime,
                3 | 4 => SectionText::HeaderFields { not: kind == 4, names },
                _ => SectionText::Whole,
            };
            let partial = partial.map(|(offset, length)| Partial { offset, length });
            let section = BodySection { peek: true, section: Section { part, text }, partial };
            let mut line = b"FETCH 1 BODY.PEEK[".to_vec();
            write_section(&mut line, &section.section);
            line.push(b']');
            if let Some(Partial { offset, length }) = partial {
                line.extend_from_slice(format!("<{offset}.{length}>").as_bytes());
            }
            let parsed = crate::command::tests::parse_line(std::str::from_utf8(&line).unwrap());
            let Ok(crate::command::Command::Fetch(fetch)) = parsed else { panic!("{parsed:?}") };
            prop_assert_eq!(&fetch.items[..], &[crate::command::fetch::FetchItem::BodySection(section)]);
        }
    }
}
