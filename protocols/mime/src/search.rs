//! Looking for strings in messages, as SEARCH does (RFC 3501, 6.4.4).
//!
//! A string matches where it is part of the *text*: header fields unfolded, with their encoded words and parameters decoded;
//! bodies with their transfer encoding and charset decoded. Letters match in either case: each character is compared by its
//! simple upper case, and that by its simple lower case, as far as these are one character. No characters are composed or
//! decomposed.
//!
//! * A field of addresses is matched address by address, each as `Name <local@domain>`.
//! * The body is the texts of text and message parts and the headers of messages within. Preambles, and parts of other types,
//!   are not searched. HTML is searched as it stands, tags and all.
//! * Header and body together are these, the message's own header, and the MIME headers of its parts.
//!
//! A match lies within one header field or one part. All strings of a [`Query`] are looked for in one pass. A pass is made of
//! steps of as many octets as the caller likes, so that no message, however large, keeps a thread for longer than a step.

use std::ops::Range;

use memchr::memmem;

use crate::address::{Entry, for_each_entry};
use crate::charset::{Charset, Decoder};
use crate::digest::ArchivedDigest;
use crate::header::{Known, Tokens, field_end, for_each_parameter};
use crate::structure::{self, Kind};
use crate::transfer::{TransferDecoder, TransferEncoding};
use crate::words::{decoded_parameters, push_decoded};

/// Where a string is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In the fields of this name. The empty string asks whether there is one.
    Field(String),
    /// In the addresses of the fields of this name.
    Addresses(String),
    Body,
    /// In header and body.
    Text,
}

#[derive(Debug)]
struct Needle {
    place: Place,
    is_empty: bool,
    octets: usize,
    finder: memmem::Finder<'static>,
}

/// The strings to look for. The answers of a scan are numbered like these.
#[derive(Debug)]
pub struct Query {
    needles: Vec<Needle>,
    /// Field names in lower case, sorted, with the needles that look there.
    fields: Vec<(Vec<u8>, Vec<usize>)>,
    /// Those that look in bodies.
    in_body: Vec<usize>,
    /// Octets of the longest of those.
    longest: usize,
}

impl Query {
    pub fn new(strings: impl IntoIterator<Item = (Place, String)>) -> Self {
        let needles: Vec<Needle> = strings
            .into_iter()
            .map(|(place, string)| {
                let mut folded = Vec::with_capacity(string.len());
                push_folded(&string, &mut folded);
                let finder = memmem::Finder::new(&folded).into_owned();
                Needle { place, is_empty: folded.is_empty(), octets: folded.len(), finder }
            })
            .collect();
        let mut fields: std::collections::BTreeMap<Vec<u8>, Vec<usize>> = std::collections::BTreeMap::new();
        let mut in_body = Vec::new();
        for (number, needle) in needles.iter().enumerate() {
            match &needle.place {
                Place::Field(name) | Place::Addresses(name) => {
                    fields.entry(name.to_ascii_lowercase().into_bytes()).or_default().push(number);
                }
                Place::Body | Place::Text => in_body.push(number),
            }
        }
        let longest = in_body.iter().map(|&number| needles[number].octets).max().unwrap_or(0);
        Self { needles, fields: fields.into_iter().collect(), in_body, longest }
    }

    pub fn len(&self) -> usize {
        self.needles.len()
    }

    pub fn is_empty(&self) -> bool {
        self.needles.is_empty()
    }

    /// Whether the message's own header has to be searched for any of the strings.
    pub fn asks_header(&self) -> bool {
        self.needles.iter().any(|needle| needle.place != Place::Body)
    }

    /// Whether a string is decided by the message's own header alone.
    pub fn is_in_header(&self, number: usize) -> bool {
        matches!(self.needles[number].place, Place::Field(_) | Place::Addresses(_))
    }
}

/// Appends the text in the form in which it is compared, as UTF-8.
pub fn push_folded(text: &str, out: &mut Vec<u8>) {
    if text.is_ascii() {
        let start = out.len();
        out.extend_from_slice(text.as_bytes());
        out[start..].make_ascii_lowercase();
        return;
    }
    let mut buffer = [0; 4];
    for c in text.chars() {
        out.extend_from_slice(folded(c).encode_utf8(&mut buffer).as_bytes());
    }
}

fn folded(c: char) -> char {
    fn only(mut mapped: impl Iterator<Item = char>, otherwise: char) -> char {
        match (mapped.next(), mapped.next()) {
            (Some(one), None) => one,
            _ => otherwise,
        }
    }
    if c.is_ascii() {
        return c.to_ascii_lowercase();
    }
    let upper = only(c.to_uppercase(), c);
    only(upper.to_lowercase(), upper)
}

/// A stretch of a message that is searched.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stretch {
    /// Header fields. They count for the body where they are those of a message within.
    Header {
        octets: Range<usize>,
        in_body: bool,
    },
    Text {
        octets: Range<usize>,
        encoding: TransferEncoding,
        charset: Charset,
    },
}

impl Stretch {
    /// A multipart without parts is text.
    fn all_of(octets: Range<usize>) -> Self {
        Self::Text { octets, encoding: TransferEncoding::default(), charset: Charset::default() }
    }
}

/// What is to be searched of a message for strings in its body or text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stretches(Vec<Stretch>);

impl Stretches {
    /// Finds the parts of a message that is at hand. This looks at all of it.
    pub fn of_message(message: &[u8]) -> Self {
        let parts = structure::scan(message);
        let mut stretches = Vec::with_capacity(2 * parts.len());
        for (index, part) in parts.iter().enumerate() {
            // The header before the root's body is the caller's, with what was put before it.
            if index > 0 {
                let in_body = parts[index - 1].kind == Kind::Message;
                stretches.push(Stretch::Header { octets: part.header_offset..part.body_offset, in_body });
            }
            if part.kind == Kind::Multipart && part.subtree_end == index + 1 {
                stretches.push(Stretch::all_of(part.body_offset..part.body_end));
            }
            if part.kind != Kind::Leaf {
                continue;
            }
            let value = part.fields.value(message, Known::ContentType).unwrap_or_default();
            let mut tokens = Tokens::new(value);
            let media_type = tokens.token();
            let subtype = if tokens.eat(b'/') { tokens.token() } else { b"" };
            let mut charset = Vec::new();
            // As the digest has it: what has no type is text, and what is not looked into is not read either.
            let is_opaque = part.is_cut || structure::is_message(media_type, subtype);
            if !is_opaque && (subtype.is_empty() || is_searched(media_type)) {
                for_each_parameter(&mut tokens, |name, tokens| {
                    if charset.is_empty() && name.eq_ignore_ascii_case(b"charset") {
                        tokens.push_parameter_value(&mut charset);
                    }
                });
                let encoding = part.fields.value(message, Known::ContentTransferEncoding).unwrap_or_default();
                stretches.push(Stretch::Text {
                    octets: part.body_offset..part.body_end,
                    encoding: TransferEncoding::named(Tokens::new(encoding).token()),
                    charset: Charset::named(&charset).unwrap_or_default(),
                });
            }
        }
        Self(stretches)
    }

    /// Finds the parts by a digest. `None` if not all of them are in it.
    pub fn of_digest(digest: &ArchivedDigest) -> Option<Self> {
        if digest.overflow {
            return None;
        }
        let parts = digest.parts();
        let mut stretches = Vec::with_capacity(2 * parts.len());
        let octets = |range: Range<u64>| range.start as usize..range.end as usize;
        for (index, part) in parts.iter().enumerate() {
            if index > 0 {
                let in_body = parts[index - 1].is_message();
                stretches.push(Stretch::Header { octets: octets(part.header_range()), in_body });
            }
            if part.is_multipart() && digest.children(index).next().is_none() {
                stretches.push(Stretch::all_of(octets(part.body_range())));
            }
            if part.is_multipart() || part.is_message() || !is_searched(digest.text(&part.media_type)?) {
                continue;
            }
            let parameters = digest.parameters(&part.parameters).iter();
            let charset = parameters
                .filter(|parameter| digest.text(&parameter.name).is_some_and(|n| n.eq_ignore_ascii_case(b"charset")))
                .find_map(|parameter| digest.text(&parameter.value));
            stretches.push(Stretch::Text {
                octets: octets(part.body_range()),
                encoding: TransferEncoding::named(digest.text(&part.encoding).unwrap_or_default()),
                charset: Charset::named(charset.unwrap_or_default()).unwrap_or_default(),
            });
        }
        Some(Self(stretches))
    }
}

/// Texts, and reports of delivery and the like. A multipart that was not looked into is text that somebody can read.
fn is_searched(media_type: &[u8]) -> bool {
    [&b"text"[..], b"message", b"multipart"].iter().any(|searched| media_type.eq_ignore_ascii_case(searched))
}

/// Longer fields are decoded in pieces of about so many octets, cut where they are folded.
const FIELD_PIECE_OCTETS: usize = 16 * 1024;

/// One message being searched.
pub struct Scan<'q> {
    query: &'q Query,
    found: Vec<bool>,
    text: String,
    /// Folded text of the current field or part: what is new, after as much of what came before as a match may begin in.
    window: Vec<u8>,
    octets: Vec<u8>,
}

/// The memory of a scan that has ended, for the next.
#[derive(Default)]
pub struct Buffers {
    found: Vec<bool>,
    text: String,
    window: Vec<u8>,
    octets: Vec<u8>,
}

/// How far a pass has come.
#[derive(Default)]
pub struct Progress {
    stretch: usize,
    at: usize,
    /// Within a long field.
    field: Option<Field>,
    decoders: Option<(TransferDecoder, Decoder)>,
}

/// A field of which a piece has been searched: where it ends, and its name.
struct Field {
    end: usize,
    name: Range<usize>,
}

impl<'q> Scan<'q> {
    /// Begins with a message.
    pub fn new(query: &'q Query, buffers: Buffers) -> Self {
        let Buffers { mut found, text, mut window, octets } = buffers;
        window.clear();
        found.clear();
        found.resize(query.len(), false);
        // The empty string is in every body.
        for &number in &query.in_body {
            found[number] = query.needles[number].is_empty;
        }
        Self { query, found, text, window, octets }
    }

    pub fn into_buffers(self) -> Buffers {
        let Self { found, text, window, octets, .. } = self;
        Buffers { found, text, window, octets }
    }

    pub fn found(&self, number: usize) -> bool {
        self.found[number]
    }

    /// Searches the message's own header, or a piece of it that begins with a field, for the strings that are looked for
    /// there: some `octets_max` octets of it. False once all has been searched.
    pub fn step_header(&mut self, header: &[u8], progress: &mut Progress, octets_max: usize) -> bool {
        self.step_fields(header, progress, octets_max, true, false)
    }

    /// Searches bodies and the headers in them: some `octets_max` octets. `message` is in two pieces. False once all has
    /// been searched, or everything found.
    pub fn step_body(
        &mut self,
        message: [&[u8]; 2],
        stretches: &Stretches,
        progress: &mut Progress,
        octets_max: usize,
    ) -> bool {
        let mut left = octets_max as isize;
        while let Some(stretch) = stretches.0.get(progress.stretch) {
            if left <= 0 {
                return self.query.in_body.iter().any(|&number| !self.found[number]);
            }
            match stretch {
                Stretch::Header { octets, in_body } => {
                    // A blank line ends both pieces' headers, so none is in both.
                    let header =
                        cut(message, octets.clone()).into_iter().max_by_key(|slice| slice.len()).unwrap_or(b"");
                    let before = progress.at;
                    let more = self.step_fields(header, progress, left as usize, false, *in_body);
                    left -= (progress.at - before) as isize + 16;
                    if more {
                        continue;
                    }
                }
                Stretch::Text { octets, encoding, charset } => {
                    let end =
                        octets.end.min(octets.start + progress.at + left as usize).max(octets.start + progress.at);
                    let from = octets.start + progress.at;
                    let is_last = end >= octets.end;
                    let (mut transfer, mut charset) =
                        progress.decoders.take().unwrap_or_else(|| (encoding.decoder(), charset.decoder()));
                    for slice in cut(message, from..end) {
                        self.push_text(slice, &mut transfer, &mut charset, false);
                    }
                    left -= (end - from) as isize + 16;
                    progress.at += end - from;
                    if !is_last {
                        progress.decoders = Some((transfer, charset));
                        continue;
                    }
                    self.push_text(b"", &mut transfer, &mut charset, true);
                    self.window.clear();
                }
            }
            *progress = Progress { stretch: progress.stretch + 1, ..Progress::default() };
        }
        false
    }

    fn push_text(&mut self, slice: &[u8], transfer: &mut TransferDecoder, charset: &mut Decoder, is_last: bool) {
        let start = self.window.len();
        if matches!(transfer, TransferDecoder::Identity) && charset.passes_ascii() && slice.is_ascii() {
            self.window.extend_from_slice(slice);
            self.window[start..].make_ascii_lowercase();
        } else {
            self.octets.clear();
            transfer.decode(slice, &mut self.octets);
            self.text.clear();
            charset.decode(&self.octets, is_last, &mut self.text);
            push_folded(&self.text, &mut self.window);
        }
        if self.window.len() > start {
            self.look(true);
            // What a match may begin in stays.
            let keep = self.query.longest.saturating_sub(1);
            let gone = self.window.len().saturating_sub(keep);
            self.window.drain(..gone);
        }
    }

    /// Looks for the strings of body and text in the window.
    fn look(&mut self, in_body: bool) {
        for &number in &self.query.in_body {
            let needle = &self.query.needles[number];
            if !self.found[number] && (in_body || needle.place == Place::Text) {
                self.found[number] = needle.finder.find(&self.window).is_some();
            }
        }
    }

    /// Searches header fields: `by_name` for the strings that are looked for in fields, and in any case for those of the
    /// text.
    fn step_fields(
        &mut self,
        header: &[u8],
        progress: &mut Progress,
        octets_max: usize,
        by_name: bool,
        in_body: bool,
    ) -> bool {
        let stop = progress.at.saturating_add(octets_max);
        while progress.at < header.len() {
            if progress.at >= stop {
                return true;
            }
            let field = match progress.field.take() {
                Some(field) => field,
                None => {
                    let start = progress.at;
                    let end = field_end(header, start);
                    let colon = memchr::memchr(b':', &header[start..end]).map_or(end, |at| start + at);
                    progress.at = (colon + 1).min(end);
                    Field { end, name: start..colon }
                }
            };
            let name = header[field.name.clone()].trim_ascii_end();
            let end = piece_end(header, progress.at, field.end);
            self.search_field(name, &header[progress.at..end], by_name, in_body);
            progress.at = end;
            if end < field.end {
                progress.field = Some(field);
            }
        }
        false
    }

    fn search_field(&mut self, name: &[u8], value: &[u8], by_name: bool, in_body: bool) {
        let value = value.trim_ascii();
        let query = self.query;
        if by_name {
            let lower = name[..name.len().min(1024)].to_ascii_lowercase();
            if let Ok(at) = query.fields.binary_search_by(|(name, _)| name[..].cmp(&lower)) {
                for &number in &query.fields[at].1 {
                    let needle = &query.needles[number];
                    if !self.found[number] {
                        self.found[number] = needle.is_empty
                            || match needle.place {
                                Place::Addresses(_) => self.is_in_addresses(value, needle),
                                _ => self.is_in_value(value, needle),
                            };
                    }
                }
            }
        }
        let looks = |number: &usize| !self.found[*number] && (in_body || query.needles[*number].place == Place::Text);
        if query.in_body.iter().any(looks) {
            self.text.clear();
            self.text.push_str(&String::from_utf8_lossy(name));
            self.text.push_str(": ");
            push_decoded(&mut self.text, value);
            if has_extended_parameters(value) {
                push_parameters(&mut self.text, value);
            }
            self.window.clear();
            push_folded(&self.text, &mut self.window);
            self.look(in_body);
            self.window.clear();
        }
    }

    fn is_in_value(&mut self, value: &[u8], needle: &Needle) -> bool {
        self.text.clear();
        push_decoded(&mut self.text, value);
        if has_extended_parameters(value) {
            push_parameters(&mut self.text, value);
        }
        self.octets.clear();
        push_folded(&self.text, &mut self.octets);
        needle.finder.find(&self.octets).is_some()
    }

    fn is_in_addresses(&mut self, value: &[u8], needle: &Needle) -> bool {
        let (text, folded) = (&mut self.text, &mut self.octets);
        let mut found = false;
        for_each_entry(value, |entry| {
            if found {
                return;
            }
            text.clear();
            match entry {
                Entry::GroupStart(name) => push_decoded(text, name),
                Entry::GroupEnd => {}
                Entry::Mailbox { name, local_part, domain, .. } => {
                    if let Some(name) = name {
                        push_decoded(text, name);
                        text.push(' ');
                    }
                    text.push('<');
                    push_decoded(text, local_part);
                    if !domain.is_empty() {
                        text.push('@');
                        push_decoded(text, domain);
                    }
                    text.push('>');
                }
            }
            folded.clear();
            push_folded(text, folded);
            found = needle.finder.find(folded).is_some();
        });
        found
    }
}

fn has_extended_parameters(value: &[u8]) -> bool {
    memchr::memchr(b'*', value).is_some() && memmem::find(value, b"*=").is_some()
}

/// Appends parameters on lines of their own, which nothing can match across.
fn push_parameters(text: &mut String, value: &[u8]) {
    for (name, value) in decoded_parameters(value) {
        text.push_str("\r\n");
        text.push_str(&name);
        text.push('=');
        text.push_str(&value);
    }
}

/// Where a piece of a field that goes on to `end` ends: where it is folded, if that comes soon.
fn piece_end(header: &[u8], start: usize, end: usize) -> usize {
    if end - start <= 2 * FIELD_PIECE_OCTETS {
        return end;
    }
    let from = start + FIELD_PIECE_OCTETS;
    match memchr::memchr(b'\n', &header[from..start + 2 * FIELD_PIECE_OCTETS]) {
        Some(distance) => from + distance + 1,
        None => start + 2 * FIELD_PIECE_OCTETS,
    }
}

/// A range of the joined pieces, as slices.
fn cut(message: [&[u8]; 2], range: Range<usize>) -> [&[u8]; 2] {
    let split = message[0].len();
    let first = &message[0][range.start.min(split)..range.end.min(split)];
    let (from, to) = (range.start.max(split) - split, range.end.max(split) - split);
    let len = message[1].len();
    [first, &message[1][from.min(len)..to.min(len)]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;
    use crate::digest::DigestBytes;
    use proptest::prelude::*;

    /// Which of the strings are in a message, in steps of so many octets.
    fn found_in_steps(message: &[u8], strings: &[(Place, &str)], octets: usize) -> Vec<bool> {
        let query = Query::new(strings.iter().map(|(place, string)| (place.clone(), (*string).to_owned())));
        let split = memmem::find(message, b"\r\n\r\n").map_or(message.len(), |at| at + 4);
        let (header, body) = message.split_at(split);
        let (small, whole) = Digest::of(message).archives();
        let digest = DigestBytes::from_aligned(whole.unwrap_or(small)).unwrap();
        let by_digest = Stretches::of_digest(digest.digest().unwrap()).unwrap();
        let stretches = Stretches::of_message(message);
        assert_eq!(stretches, by_digest);
        let mut scan = Scan::new(&query, Buffers::default());
        let mut progress = Progress::default();
        while scan.step_header(header, &mut progress, octets) {}
        let mut progress = Progress::default();
        while scan.step_body([header, body], &stretches, &mut progress, octets) {}
        (0..query.len()).map(|number| scan.found(number)).collect()
    }

    fn found(message: &[u8], place: Place, string: &str) -> bool {
        let at_once = found_in_steps(message, &[(place.clone(), string)], usize::MAX / 4);
        assert_eq!(at_once, found_in_steps(message, &[(place, string)], 7), "in small steps");
        at_once[0]
    }

    const MESSAGE: &str = "From: =?utf-8?Q?J=C3=BCrgen?= \"M. (x)\" <jm@Example.org>, Group: a@b;\r\nSubject: Uno =?iso-8859-1?Q?Dos_=C9?=\r\n \
        =?iso-8859-1?Q?t=E9?= folded\r\n  line\r\nX-Empty:\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\npreamble\r\n--b\r\n\
        Content-Type: text/plain; charset=koi8-r\r\nContent-Transfer-Encoding: base64\r\n\r\n8NLJ18XU\r\n--b\r\n\
        Content-Type: message/rfc822\r\n\r\nSubject: inner =?utf-8?B?w6k=?=\r\nContent-Type: text/html\r\n\
        Content-Transfer-Encoding: quoted-printable\r\n\r\nsoft=\r\nbreak =C3=A9t=C3=A9\r\n--b\r\n\
        Content-Type: application/octet-stream\r\nContent-Disposition: attachment;\r\n filename*=utf-8''%C3%BC.bin\r\n\r\nbinary\r\n--b--\r\n";

    #[test]
    fn fields_and_addresses() {
        let field = |name: &str, string: &str| found(MESSAGE.as_bytes(), Place::Field(name.into()), string);
        let from = |string: &str| found(MESSAGE.as_bytes(), Place::Addresses("FROM".into()), string);
        assert!(field("Subject", "dos été FOLDED  line") && field("SUBJECT", "DOS ÉTÉ") && field("x-empty", ""));
        assert!(
            !field("subject", "iso-8859-1")
                && !field("X-None", "")
                && !field("X-Empty", "a")
                && !field("Subject", "inner")
        );
        assert!(from("jürgen m.") && from("JM@example.ORG") && from("") && from("group") && from("<a@b>"));
        assert!(!from("utf-8") && !from("Jürgen <") && !from(">, "));
    }

    #[test]
    fn bodies_and_texts() {
        let body = |string: &str| found(MESSAGE.as_bytes(), Place::Body, string);
        let text = |string: &str| found(MESSAGE.as_bytes(), Place::Text, string);
        for both in ["привет", "ПРИВЕТ", "softbreak ÉTÉ", "inner é", "subject: inner"] {
            assert!(body(both) && text(both), "{both}");
        }
        for only_text in ["dos été folded", "ü.bin", "subject: uno", "koi8-r", "x-empty:"] {
            assert!(!body(only_text) && text(only_text), "{only_text}");
        }
        for neither in ["preamble", "binary", "8NLJ18XU", "привет\r\nsubject", "=?utf-8"] {
            assert!(!body(neither) && !text(neither), "{neither}");
        }
        assert!(body("") && text("") && found(b"", Place::Body, ""));
    }

    #[test]
    fn single_parts() {
        assert!(found(b"\r\nHello World", Place::Body, "hello WORLD"));
        assert!(found("\r\nGrüße".as_bytes(), Place::Text, "GRÜSSE") == "grüße".contains("grüsse"), "simple case only");
        assert!(found("\r\nGrüße".as_bytes(), Place::Text, "grÜẞe"));
        assert!(found("\r\nΣίσυφος".as_bytes(), Place::Body, "σίσυφοσ"), "final sigma");
        assert!(found(b"Content-Type: text/plain; charset=us-ascii\r\n\r\nna\xefve", Place::Body, "naïve"));
        assert!(found(b"Content-Type: text/plain; charset=utf-7\r\n\r\nA+ImIDkQ.", Place::Body, "a≢α"));
        assert!(!found(b"Content-Type: image/png\r\n\r\nx", Place::Body, "x"));
        assert!(found(b"A: b\n\nLF only", Place::Body, "lf"));
        assert!(found(b"Content-Type: multipart/mixed; boundary=b\r\n\r\nno parts", Place::Body, "no parts"));
    }

    #[test]
    fn long_fields_and_long_strings() {
        let value = format!("{}needle {}", "word\r\n ".repeat(20_000), "x".repeat(100_000));
        let message = format!("X: {value}\r\nTo: {}n@x\r\n\r\n{}", "a@b,\r\n ".repeat(9_000), "y".repeat(100_000));
        let strings = [
            (Place::Field("x".into()), "needle"),
            (Place::Addresses("to".into()), "n@x"),
            (Place::Text, "needle"),
            (Place::Body, &"y".repeat(60_000)[..]),
            (Place::Body, &"y".repeat(60_001).replace("yx", "")[1..]),
            (Place::Body, "needle"),
        ];
        assert_eq!(found_in_steps(message.as_bytes(), &strings, 32 << 10), [true, true, true, true, true, false]);
    }

    /// Trap 33: whatever comes, a step of a search takes bounded time, and all of it linear time.
    #[test]
    fn trap_33_searching_takes_linear_time() {
        let start = std::time::Instant::now();
        let nested: String =
            (0..200).map(|i| format!("Content-Type: multipart/mixed; boundary=b{i}\r\n\r\n--b{i}\r\n")).collect();
        for hostile in [
            format!("X: {}", "=?a?q?".repeat(100_000)),
            format!("From: {}", "(".repeat(500_000)),
            format!("From: {}", "a@b,".repeat(100_000)),
            format!("Content-Type: x/y{}", "; a*0*=''%41".repeat(20_000)),
            format!("Content-Type: text/plain\r\nContent-Transfer-Encoding: base64\r\n\r\n{}", "=".repeat(500_000)),
            format!("{nested}{}", "--b0\r\n\r\nx\r\n".repeat(20_000)),
            "A:b\r\n".repeat(100_000),
        ] {
            let strings =
                [(Place::Addresses("from".into()), "zz"), (Place::Field("x".into()), "zz"), (Place::Text, "zz")];
            assert_eq!(found_in_steps(hostile.as_bytes(), &strings, 32 << 10), [false; 3]);
        }
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }

    proptest! {
        #[test]
        fn steps_do_not_matter(pieces in prop::collection::vec(prop::sample::select(vec![
            "Content-Type: multipart/mixed; boundary=b\r\n", "Content-Type: message/rfc822\r\n", "From: ab <c@d>\r\n",
            "Content-Transfer-Encoding: base64\r\n", "--b\r\n", "--b--\r\n", "\r\n", "ab\r\n", " c", "=?utf-8?q?ab?="]), 0..30), octets in 1usize..40) {
            let message = pieces.concat();
            let strings = [(Place::Addresses("from".into()), "ab"), (Place::Field("from".into()), "c@"), (Place::Body, "ab"), (Place::Text, "b: c")];
            let at_once = found_in_steps(message.as_bytes(), &strings, usize::MAX / 4);
            prop_assert_eq!(at_once, found_in_steps(message.as_bytes(), &strings, octets));
        }
    }
}
