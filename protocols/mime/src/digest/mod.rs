//! The digest of a message: what ENVELOPE, BODY, BODYSTRUCTURE, PREVIEW and part fetches need, as an rkyv archive.
//!
//! All strings lie in one pool and everything else are flat lists that refer to it and to each other by position, so that
//! making, checking and reading an archive are a few passes over a few kilobytes. An archive is checked (bytecheck) before
//! it is used; positions in it are checked at each use, so that a wrong one gives an empty value and never a panic.
//!
//! An archive is at most [`ARCHIVE_BYTES_MAX`] long. A message whose structure needs more gets a reduced digest with the
//! `overflow` mark, and the whole one is kept elsewhere.

mod build;
mod view;

pub use view::DigestBytes;

use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::structure;

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

const NO_DATE: i64 = i64::MIN;
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
    /// The Date field, in Unix seconds; [`NO_DATE`] where there is none.
    sent_unix_seconds: i64,
    /// The day of the Date field in its own zone, in days since 1970-01-01.
    sent_local_day: i32,
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
        build::Builder::new(message).build(&structure::scan(message))
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
            sent_unix_seconds: self.sent_unix_seconds,
            sent_local_day: self.sent_local_day,
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

#[cfg(test)]
mod tests;
