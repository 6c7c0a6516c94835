//! The digest of a message: what ENVELOPE, BODY, BODYSTRUCTURE, PREVIEW and part fetches need, as an rkyv archive.
//!
//! All strings lie in one pool and everything else are flat lists that refer to it and to each other by position, so that
//! making, checking and reading an archive are a few passes over a few kilobytes. An archive is checked (bytecheck) before
//! it is used; positions in it are checked at each use, so that a wrong one gives an empty value and never a panic.
//!
//! An archive is at most [`ARCHIVE_BYTES_MAX`] long. A message whose structure needs more gets a reduced digest with the
//! `overflow` mark, and the whole one is kept elsewhere.

use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::address::{Entry, for_each_entry};
use crate::header::{FieldIndex, Known, Tokens, for_each_parameter, push_unfolded};
use crate::preview::{TextPart, preview};
use crate::structure::{self, Kind};

/// The largest archive that is stored with a message.
pub const ARCHIVE_BYTES_MAX: usize = 64 * 1024;

/// Layout version: raised with every change of the types below.
pub const VERSION: u8 = 1;

/// A string in the pool, or nothing (NIL).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Text {
    start: u32,
    /// [`NOTHING`] for no string at all.
    len: u32,
}

/// A run of entries in one of the lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Archive, Serialize, Deserialize)]
pub struct Run {
    start: u32,
    len: u32,
}

const NOTHING: u32 = u32::MAX;
const NIL: Text = Text { start: 0, len: NOTHING };

/// One member of an address list: four strings as RFC 3501, 7.4.2 has them. Group starts have no host, group ends neither
/// mailbox nor host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Address {
    pub name: Text,
    pub route: Text,
    pub mailbox: Text,
    pub host: Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Envelope {
    pub date: Text,
    pub subject: Text,
    pub from: Run,
    pub sender: Run,
    pub reply_to: Run,
    pub to: Run,
    pub cc: Run,
    pub bcc: Run,
    pub in_reply_to: Text,
    pub message_id: Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Parameter {
    pub name: Text,
    pub value: Text,
}

/// One part, with offsets into the raw message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Part {
    /// 0 leaf, 1 multipart, 2 message.
    kind: u8,
    pub header_offset: u32,
    pub body_offset: u32,
    pub body_bytes: u32,
    pub lines: u32,
    /// The index after the last part within this one.
    subtree_end: u32,
    pub media_type: Text,
    pub subtype: Text,
    pub parameters: Run,
    pub id: Text,
    pub description: Text,
    pub encoding: Text,
    pub md5: Text,
    pub disposition: Text,
    pub disposition_parameters: Run,
    /// As in the header: tags separated by commas.
    pub language: Text,
    pub location: Text,
    /// The index of the envelope of a message part's message; [`NOTHING`] for others.
    envelope: u32,
}

/// See the head of the module.
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Digest {
    pub version: u8,
    /// Parts or addresses were left out to keep the archive small.
    pub overflow: bool,
    pub message_bytes: u32,
    /// The first is the message's own; those of messages within follow.
    envelopes: Vec<Envelope>,
    addresses: Vec<Address>,
    parts: Vec<Part>,
    parameters: Vec<Parameter>,
    preview: Text,
    text: Vec<u8>,
}

/// Why an archive could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DigestError {
    #[error("digest archive is damaged: {0}")]
    Damaged(rkyv::rancor::Error),
    #[error("digest version {0} is unknown")]
    Version(u8),
}

impl Digest {
    /// Reads a whole message. Bytes past 4 GB are not looked at; no message is that large.
    pub fn of(message: &[u8]) -> Self {
        let message = &message[..message.len().min(u32::MAX as usize - 1)];
        Builder::new(message).build(&structure::scan(message))
    }

    /// The archive to be stored with the message, and the whole one apart where that had to be reduced.
    pub fn archives(&self) -> (AlignedVec, Option<AlignedVec>) {
        let whole = self.archive();
        if whole.len() <= ARCHIVE_BYTES_MAX { (whole, None) } else { (self.reduced().archive(), Some(whole)) }
    }

    fn archive(&self) -> AlignedVec {
        // The serializer writes to memory that grows, and nothing in these types is shared: it has no way to fail.
        rkyv::to_bytes::<rkyv::rancor::Panic>(self).unwrap_or_else(|never| match never {})
    }

    /// The message's own envelope, with its texts and address lists cut, and its first part alone.
    fn reduced(&self) -> Self {
        const ADDRESSES_MAX: u32 = 100;
        const TEXT_BYTES_MAX: u32 = 1000;
        let mut small = Digest { overflow: true, parameters: Vec::new(), addresses: Vec::new(), ..self.empty() };
        let cut = |small: &mut Digest, text: Text| {
            let Some(bytes) = self.bytes(text) else { return NIL };
            let bytes = &bytes[..bytes.len().min(TEXT_BYTES_MAX as usize)];
            small.push_text(bytes)
        };
        small.envelopes = self.envelopes[..1].to_vec();
        let mut envelope = self.envelopes[0];
        for text in [&mut envelope.date, &mut envelope.subject, &mut envelope.in_reply_to, &mut envelope.message_id] {
            *text = cut(&mut small, *text);
        }
        let lists = [
            &mut envelope.from,
            &mut envelope.sender,
            &mut envelope.reply_to,
            &mut envelope.to,
            &mut envelope.cc,
            &mut envelope.bcc,
        ];
        for list in lists {
            let start = small.addresses.len() as u32;
            let from = &self.addresses[list.start as usize..(list.start + list.len.min(ADDRESSES_MAX)) as usize];
            for address in from {
                let entry = Address {
                    name: cut(&mut small, address.name),
                    route: NIL,
                    mailbox: cut(&mut small, address.mailbox),
                    host: cut(&mut small, address.host),
                };
                // A bound on all of it, whatever the lengths.
                if small.text.len() > ARCHIVE_BYTES_MAX / 4 {
                    break;
                }
                small.addresses.push(entry);
            }
            *list = Run { start, len: small.addresses.len() as u32 - start };
        }
        small.envelopes = vec![envelope];
        let root = self.parts[0];
        small.parts = vec![Part {
            subtree_end: 1,
            media_type: cut(&mut small, root.media_type),
            subtype: cut(&mut small, root.subtype),
            parameters: Run::default(),
            id: NIL,
            description: NIL,
            encoding: cut(&mut small, root.encoding),
            md5: NIL,
            disposition: NIL,
            disposition_parameters: Run::default(),
            language: NIL,
            location: NIL,
            envelope: NOTHING,
            ..root
        }];
        small.preview = cut(&mut small, self.preview);
        small
    }

    fn empty(&self) -> Self {
        Self {
            version: VERSION,
            overflow: false,
            message_bytes: self.message_bytes,
            envelopes: Vec::new(),
            addresses: Vec::new(),
            parts: Vec::new(),
            parameters: Vec::new(),
            preview: NIL,
            text: Vec::new(),
        }
    }

    fn bytes(&self, text: Text) -> Option<&[u8]> {
        (text.len != NOTHING).then(|| &self.text[text.start as usize..][..text.len as usize])
    }

    fn push_text(&mut self, bytes: &[u8]) -> Text {
        let start = self.text.len() as u32;
        self.text.extend_from_slice(bytes);
        Text { start, len: bytes.len() as u32 }
    }
}

/// A checked archive, whole or reduced.
#[derive(Debug)]
pub struct DigestBytes(AlignedVec);

impl DigestBytes {
    /// Checks an archive read from storage, whatever its alignment there.
    ///
    /// # Errors
    /// The bytes are no archive, or one of another version.
    pub fn from_storage(bytes: &[u8]) -> Result<Self, DigestError> {
        let mut aligned = AlignedVec::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        Self::from_aligned(aligned)
    }

    /// Checks an archive that is aligned already.
    ///
    /// # Errors
    /// As [`DigestBytes::from_storage`].
    pub fn from_aligned(bytes: AlignedVec) -> Result<Self, DigestError> {
        let digest = rkyv::access::<ArchivedDigest, rkyv::rancor::Error>(&bytes).map_err(DigestError::Damaged)?;
        if digest.version != VERSION {
            return Err(DigestError::Version(digest.version));
        }
        Ok(Self(bytes))
    }

    /// The digest. Checks it once more, which takes less than a microsecond; no unsafe code has to trust the first check.
    pub fn digest(&self) -> Option<&ArchivedDigest> {
        rkyv::access::<ArchivedDigest, rkyv::rancor::Error>(&self.0).ok()
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl ArchivedDigest {
    /// The string, or nothing.
    pub fn text(&self, text: &ArchivedText) -> Option<&[u8]> {
        let (start, len) = (text.start.to_native() as usize, text.len.to_native());
        if len == NOTHING { None } else { Some(self.text.get(start..)?.get(..len as usize).unwrap_or_default()) }
    }

    /// The envelope of the message itself.
    pub fn envelope(&self) -> Option<&ArchivedEnvelope> {
        self.envelopes.first()
    }

    /// The envelope of the message in a message part.
    pub fn envelope_of(&self, part: &ArchivedPart) -> Option<&ArchivedEnvelope> {
        self.envelopes.get(part.envelope.to_native() as usize)
    }

    pub fn addresses(&self, run: &ArchivedRun) -> &[ArchivedAddress] {
        slice(&self.addresses, run)
    }

    pub fn parameters(&self, run: &ArchivedRun) -> &[ArchivedParameter] {
        slice(&self.parameters, run)
    }

    pub fn preview(&self) -> &str {
        self.text(&self.preview).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// All parts, parents first; the message is the first.
    pub fn parts(&self) -> &[ArchivedPart] {
        &self.parts
    }

    /// The indexes of the parts directly within a part.
    pub fn children(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let end = self.parts.get(index).map_or(0, |part| part.subtree_end.to_native() as usize).min(self.parts.len());
        let mut next = index + 1;
        std::iter::from_fn(move || {
            let child = next;
            // In a damaged archive the end might not advance.
            next = self.parts.get(child)?.subtree_end.to_native() as usize;
            (child < end && next > child).then_some(child)
        })
    }

    /// The part that IMAP numbers name (RFC 3501, 6.4.5): empty for the message itself. A message that is no multipart has
    /// one part, 1, which is its body; and so has a message within.
    pub fn part(&self, numbers: &[u32]) -> Option<(usize, &ArchivedPart)> {
        let mut index = 0;
        for (depth, &number) in numbers.iter().enumerate() {
            let mut part = self.parts.get(index)?;
            // Numbers after a message part name the parts of the message inside.
            let enters_message = depth == 0 || part.is_message();
            if depth > 0 && part.is_message() {
                index = self.children(index).next()?;
                part = self.parts.get(index)?;
            }
            if part.is_multipart() {
                index = self.children(index).nth((number as usize).checked_sub(1)?)?;
            } else if !(enters_message && number == 1) {
                return None;
            }
        }
        Some((index, self.parts.get(index)?))
    }

    /// For `numbers.HEADER`, `.TEXT` and `.HEADER.FIELDS`: the message in that part (RFC 3501, 6.4.5).
    pub fn message_in(&self, numbers: &[u32]) -> Option<&ArchivedPart> {
        if numbers.is_empty() {
            return self.parts.first();
        }
        let (index, part) = self.part(numbers)?;
        if part.is_message() { self.parts.get(index + 1) } else { None }
    }
}

fn slice<'a, T>(list: &'a [T], run: &ArchivedRun) -> &'a [T] {
    let (start, len) = (run.start.to_native() as usize, run.len.to_native() as usize);
    list.get(start..).and_then(|rest| rest.get(..len)).unwrap_or_default()
}

impl ArchivedPart {
    pub fn is_multipart(&self) -> bool {
        self.kind == 1
    }

    pub fn is_message(&self) -> bool {
        self.kind == 2
    }

    /// Where the header is in the raw message, its blank line included.
    pub fn header_range(&self) -> std::ops::Range<u64> {
        u64::from(self.header_offset.to_native())..u64::from(self.body_offset.to_native())
    }

    /// Where the body is in the raw message.
    pub fn body_range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.body_offset.to_native());
        start..start + u64::from(self.body_bytes.to_native())
    }
}

struct Builder<'m> {
    message: &'m [u8],
    digest: Digest,
}

impl<'m> Builder<'m> {
    fn new(message: &'m [u8]) -> Self {
        let digest = Digest {
            version: VERSION,
            overflow: false,
            message_bytes: message.len() as u32,
            envelopes: Vec::with_capacity(1),
            addresses: Vec::with_capacity(8),
            parts: Vec::new(),
            parameters: Vec::with_capacity(4),
            preview: NIL,
            text: Vec::with_capacity(1024),
        };
        Self { message, digest }
    }

    fn build(mut self, parts: &[structure::Part]) -> Digest {
        self.digest.parts.reserve_exact(parts.len());
        self.push_envelope(&parts[0].fields);
        let mut text_part = None;
        for (index, part) in parts.iter().enumerate() {
            let envelope = match part.kind {
                Kind::Message => self.push_envelope(&parts[index + 1].fields),
                _ => NOTHING,
            };
            let pushed = self.push_part(part, envelope);
            self.consider_for_preview(&pushed, &mut text_part);
            self.digest.parts.push(pushed);
        }
        if let Some((part, is_html)) = text_part {
            self.push_preview(&part, is_html);
        }
        self.digest
    }

    fn push_envelope(&mut self, fields: &FieldIndex) -> u32 {
        let from = self.push_addresses(fields, Known::From);
        // RFC 3501, 7.4.2: where they are absent or empty, these are the same as From.
        let or_from = |run: Run| if run.len == 0 { from } else { run };
        let envelope = Envelope {
            date: self.push_value(fields, Known::Date),
            subject: self.push_value(fields, Known::Subject),
            from,
            sender: or_from(self.push_addresses(fields, Known::Sender)),
            reply_to: or_from(self.push_addresses(fields, Known::ReplyTo)),
            to: self.push_addresses(fields, Known::To),
            cc: self.push_addresses(fields, Known::Cc),
            bcc: self.push_addresses(fields, Known::Bcc),
            in_reply_to: self.push_value(fields, Known::InReplyTo),
            message_id: self.push_value(fields, Known::MessageId),
        };
        self.digest.envelopes.push(envelope);
        self.digest.envelopes.len() as u32 - 1
    }

    fn push_value(&mut self, fields: &FieldIndex, field: Known) -> Text {
        let Some(value) = fields.value(self.message, field) else { return NIL };
        let start = self.digest.text.len() as u32;
        push_unfolded(&mut self.digest.text, value);
        Text { start, len: self.digest.text.len() as u32 - start }
    }

    fn push_addresses(&mut self, fields: &FieldIndex, field: Known) -> Run {
        let start = self.digest.addresses.len() as u32;
        let digest = &mut self.digest;
        if let Some(value) = fields.value(self.message, field) {
            for_each_entry(value, |entry| {
                let address = match entry {
                    Entry::GroupStart(name) => {
                        Address { name: NIL, route: NIL, mailbox: digest.push_text(name), host: NIL }
                    }
                    Entry::GroupEnd => Address { name: NIL, route: NIL, mailbox: NIL, host: NIL },
                    Entry::Mailbox { name, route, local_part, domain } => Address {
                        name: name.map_or(NIL, |text| digest.push_text(text)),
                        route: route.map_or(NIL, |text| digest.push_text(text)),
                        mailbox: digest.push_text(local_part),
                        host: digest.push_text(domain),
                    },
                };
                digest.addresses.push(address);
            });
        }
        Run { start, len: self.digest.addresses.len() as u32 - start }
    }

    fn push_part(&mut self, part: &structure::Part, envelope: u32) -> Part {
        let (media_type, subtype, parameters) = self.push_content_type(part);
        let (disposition, disposition_parameters) = self.push_disposition(part);
        let encoding = match part.fields.value(self.message, Known::ContentTransferEncoding) {
            Some(value) => {
                let token = Tokens::new(value).token();
                if token.is_empty() { NIL } else { self.digest.push_text(token) }
            }
            None => NIL,
        };
        Part {
            kind: match part.kind {
                Kind::Leaf => 0,
                Kind::Multipart => 1,
                Kind::Message => 2,
            },
            header_offset: part.header_offset as u32,
            body_offset: part.body_offset as u32,
            body_bytes: (part.body_end - part.body_offset) as u32,
            lines: part.lines as u32,
            subtree_end: part.subtree_end as u32,
            media_type,
            subtype,
            parameters,
            id: self.push_value(&part.fields, Known::ContentId),
            description: self.push_value(&part.fields, Known::ContentDescription),
            encoding,
            md5: self.push_value(&part.fields, Known::ContentMd5),
            disposition,
            disposition_parameters,
            language: self.push_value(&part.fields, Known::ContentLanguage),
            location: self.push_value(&part.fields, Known::ContentLocation),
            envelope,
        }
    }

    /// The type as the header has it, or the default where there is none or a broken one (RFC 2045, 5.2). A part whose
    /// type promises parts that were not looked for is given as octets, so that BODYSTRUCTURE stays well formed.
    fn push_content_type(&mut self, part: &structure::Part) -> (Text, Text, Run) {
        let value = part.fields.value(self.message, Known::ContentType).unwrap_or_default();
        let mut tokens = Tokens::new(value);
        let media_type = tokens.token();
        let subtype = if tokens.eat(b'/') { tokens.token() } else { b"" };
        let promises_parts = media_type.eq_ignore_ascii_case(b"multipart")
            || (media_type.eq_ignore_ascii_case(b"message")
                && (subtype.eq_ignore_ascii_case(b"rfc822") || subtype.eq_ignore_ascii_case(b"global")));
        if part.kind == Kind::Leaf && (promises_parts || part.is_cut) {
            let digest = &mut self.digest;
            return (digest.push_text(b"application"), digest.push_text(b"octet-stream"), Run::default());
        }
        if media_type.is_empty() || subtype.is_empty() {
            if part.kind == Kind::Message {
                return (self.digest.push_text(b"message"), self.digest.push_text(b"rfc822"), Run::default());
            }
            let start = self.digest.parameters.len() as u32;
            let charset =
                Parameter { name: self.digest.push_text(b"charset"), value: self.digest.push_text(b"us-ascii") };
            self.digest.parameters.push(charset);
            let parameters = Run { start, len: 1 };
            return (self.digest.push_text(b"text"), self.digest.push_text(b"plain"), parameters);
        }
        let types = (self.digest.push_text(media_type), self.digest.push_text(subtype));
        (types.0, types.1, self.push_parameters(&mut tokens))
    }

    fn push_disposition(&mut self, part: &structure::Part) -> (Text, Run) {
        let Some(value) = part.fields.value(self.message, Known::ContentDisposition) else {
            return (NIL, Run::default());
        };
        let mut tokens = Tokens::new(value);
        let disposition = tokens.token();
        if disposition.is_empty() {
            return (NIL, Run::default());
        }
        let disposition = self.digest.push_text(disposition);
        (disposition, self.push_parameters(&mut tokens))
    }

    fn push_parameters(&mut self, tokens: &mut Tokens<'_>) -> Run {
        let start = self.digest.parameters.len() as u32;
        let digest = &mut self.digest;
        for_each_parameter(tokens, |name, tokens| {
            let name = digest.push_text(name);
            let value_start = digest.text.len() as u32;
            tokens.push_parameter_value(&mut digest.text);
            let value = Text { start: value_start, len: digest.text.len() as u32 - value_start };
            digest.parameters.push(Parameter { name, value });
        });
        Run { start, len: self.digest.parameters.len() as u32 - start }
    }

    /// The first text/plain part that is no attachment, or else the first text/html one.
    fn consider_for_preview(&self, part: &Part, found: &mut Option<(Part, bool)>) {
        let is = |text: Text, name: &[u8]| self.digest.bytes(text).is_some_and(|t| t.eq_ignore_ascii_case(name));
        if part.kind != 0 || !is(part.media_type, b"text") || is(part.disposition, b"attachment") {
            return;
        }
        let (plain, html) = (is(part.subtype, b"plain"), is(part.subtype, b"html"));
        let better = match found {
            None => plain || html,
            Some((_, was_html)) => plain && *was_html,
        };
        if better {
            *found = Some((*part, html));
        }
    }

    fn push_preview(&mut self, part: &Part, is_html: bool) {
        let body = &self.message[part.body_offset as usize..][..part.body_bytes as usize];
        let run = part.parameters;
        let parameters = &self.digest.parameters[run.start as usize..][..run.len as usize];
        let is_charset = |p: &&Parameter| self.digest.bytes(p.name).is_some_and(|n| n.eq_ignore_ascii_case(b"charset"));
        let charset = parameters.iter().find(is_charset).and_then(|p| self.digest.bytes(p.value)).unwrap_or_default();
        let encoding = self.digest.bytes(part.encoding).unwrap_or_default();
        let text = preview(TextPart { body, encoding, charset, is_html });
        self.digest.preview = self.digest.push_text(text.as_bytes());
    }
}

#[cfg(test)]
mod tests;
