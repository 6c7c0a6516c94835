//! Making a digest.

use super::{Address, Digest, Envelope, NIL, NO_DATE, NOTHING, Parameter, Part, Run, Text, VERSION};
use crate::address::{Entry, for_each_entry};
use crate::date::parse_date;
use crate::header::{FieldIndex, Known, Tokens, for_each_parameter, push_unfolded};
use crate::preview::{TextPart, preview};
use crate::structure::{self, Kind};

pub(super) struct Builder<'m> {
    message: &'m [u8],
    digest: Digest,
}

impl<'m> Builder<'m> {
    pub fn new(message: &'m [u8]) -> Self {
        let digest = Digest {
            version: VERSION,
            overflow: false,
            message_bytes: message.len() as u32,
            sent_unix_seconds: NO_DATE,
            sent_local_day: 0,
            envelopes: Vec::with_capacity(1),
            addresses: Vec::with_capacity(8),
            parts: Vec::new(),
            parameters: Vec::with_capacity(4),
            preview: NIL,
            text: Vec::with_capacity(1024),
        };
        Self { message, digest }
    }

    pub fn build(mut self, parts: &[structure::Part]) -> Digest {
        self.digest.parts.reserve_exact(parts.len());
        self.push_envelope(&parts[0].fields);
        if let Some(date) = parts[0].fields.value(self.message, Known::Date).and_then(parse_date) {
            (self.digest.sent_unix_seconds, self.digest.sent_local_day) = (date.unix_seconds, date.local_day);
        }
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
    /// type promises parts that were not looked for is given as octets, so that BODYSTRUCTURE stays well formed; but a
    /// multipart without a boundary is text that somebody can read.
    fn push_content_type(&mut self, part: &structure::Part) -> (Text, Text, Run) {
        let value = part.fields.value(self.message, Known::ContentType).unwrap_or_default();
        let mut tokens = Tokens::new(value);
        let media_type = tokens.token();
        let subtype = if tokens.eat(b'/') { tokens.token() } else { b"" };
        let is_leaf = part.kind == Kind::Leaf;
        let no_boundary = is_leaf && !part.is_cut && media_type.eq_ignore_ascii_case(b"multipart");
        let encoded_message = structure::is_message(media_type, subtype);
        if is_leaf && (encoded_message || part.is_cut) {
            let digest = &mut self.digest;
            return (digest.push_text(b"application"), digest.push_text(b"octet-stream"), Run::default());
        }
        if media_type.is_empty() || subtype.is_empty() || no_boundary {
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
