//! FETCH (RFC 3501, 6.4.5; RFC 7162, 3.1.4).
//!
//! Responses stream: some hundred messages are asked of the engine at a time, and the output is sent whenever 64 KB have
//! come together. Where fetching a body sets \Seen, the body goes out at once; the FLAGS response and the tagged OK wait
//! until the flag is durable.

use std::ops::Range;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::FlagName;
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::ids::MailboxId;
use posthaste_engine::index::Message;
use posthaste_engine::io::Runtime;
use posthaste_engine::io::real::RealIo;
use posthaste_engine::read::{MessageBytes, MessageInfo, Part};
use posthaste_imap::command::fetch::{BodySection, Fetch, FetchItem, SectionText};
use posthaste_imap::response::{Code, FetchWriter, write_body, write_body_structure, write_envelope, write_nstring};
use posthaste_imap::section::{Extent, extent, header_fields, partial_range};
use posthaste_imap::types::DateTime;
use posthaste_mime::digest::DigestBytes;
use posthaste_mime::{ArchivedDigest, Digest};
use roaring::RoaringBitmap;

use super::{Answer, Failure, Outcome, Session, refusal};
use crate::limits;
use crate::node::{Counters, Shard};

/// The set in pieces of at most `size`.
pub(super) fn chunks(uids: &UidSet, size: u64) -> impl Iterator<Item = UidSet> + '_ {
    let mut rest = uids.0.iter();
    std::iter::from_fn(move || {
        let chunk: RoaringBitmap = rest.by_ref().take(size as usize).collect();
        (!chunk.is_empty()).then_some(UidSet(chunk))
    })
}

/// What has to be read for the items of a FETCH: nothing where the index has it all.
#[derive(Clone, Copy, Default)]
struct Needs {
    part: Option<Part>,
    digest: bool,
}

impl Needs {
    fn of(items: &[FetchItem]) -> Self {
        let mut needs = Self::default();
        for item in items {
            let (part, digest) = match item {
                FetchItem::Flags
                | FetchItem::Uid
                | FetchItem::InternalDate
                | FetchItem::Rfc822Size
                | FetchItem::ModSeq
                | FetchItem::EmailId
                | FetchItem::ThreadId => continue,
                FetchItem::Envelope | FetchItem::Body | FetchItem::BodyStructure | FetchItem::Preview { .. } => {
                    (None, true)
                }
                FetchItem::Rfc822 | FetchItem::Rfc822Text => (Some(Part::Whole), false),
                FetchItem::Rfc822Header => (Some(Part::Header), false),
                FetchItem::BodySection(section) if !section.section.part.is_empty() => (Some(Part::Whole), true),
                FetchItem::BodySection(section) => match section.section.text {
                    SectionText::Header | SectionText::HeaderFields { .. } => (Some(Part::Header), false),
                    SectionText::Whole | SectionText::Text | SectionText::Mime => (Some(Part::Whole), false),
                },
            };
            if needs.part != Some(Part::Whole) && part.is_some() {
                needs.part = part;
            }
            needs.digest |= digest;
        }
        needs
    }
}

/// The digest of a message. One that was stored without, with a reduced one, or with one of another version, gets it now.
pub(super) async fn digest_of(
    io: &RealIo,
    shard: &Shard,
    mailbox: MailboxId,
    message: &Message,
) -> Result<Option<DigestBytes>, EngineError> {
    let needs = Needs { part: None, digest: true };
    Ok(read(io, shard, mailbox, message, needs).await?.1)
}

/// Reads what is needed. A message that was stored without a digest, with one that leaves parts out, or with one of another
/// version, gets it now.
async fn read(
    io: &RealIo,
    shard: &Shard,
    mailbox: MailboxId,
    message: &Message,
    needs: Needs,
) -> Result<(MessageBytes, Option<DigestBytes>), EngineError> {
    let bytes = match needs.part {
        Some(part) => shard.read_message(message, mailbox, part).await?,
        None => MessageBytes::default(),
    };
    if !needs.digest {
        return Ok((bytes, None));
    }
    let stored = shard.read_message(message, mailbox, Part::Digest).await?.digest;
    if let Ok(digest) = DigestBytes::from_storage(&stored)
        && !digest.digest().is_none_or(|digest| digest.overflow)
    {
        return Ok((bytes, Some(digest)));
    }
    let (header, body) = match needs.part {
        Some(Part::Whole) => (bytes.header.clone(), bytes.body.clone()),
        _ => {
            let whole = shard.read_message(message, mailbox, Part::Whole).await?;
            (whole.header, whole.body)
        }
    };
    let make = move || {
        let (small, whole) = Digest::of(&[&header[..], &body].concat()).archives();
        DigestBytes::from_aligned(whole.unwrap_or(small)).ok()
    };
    let is_large = message.size > limits::OFFLOAD_BYTES as u64;
    let digest = if is_large { io.offload(make).await } else { make() };
    Ok((bytes, digest))
}

/// What a range of the joined pieces holds of each.
fn cut<const N: usize>(pieces: [&[u8]; N], range: Range<u64>) -> [&[u8]; N] {
    let mut at = 0;
    pieces.map(|piece| {
        let end = at + piece.len() as u64;
        let (from, to) = (range.start.clamp(at, end) - at, range.end.clamp(at, end) - at);
        at = end;
        &piece[from as usize..(to as usize).max(from as usize)]
    })
}

fn write_pieces<const N: usize>(fetch: &mut FetchWriter<'_>, section: &BodySection, pieces: &[&[u8]; N]) {
    let len = pieces.iter().map(|piece| piece.len() as u64).sum();
    let range = partial_range(section.partial, len);
    if range.is_empty() {
        return fetch.body_section(section, b"");
    }
    let out = fetch.body_section_streamed(section, range.end - range.start);
    cut(*pieces, range).iter().for_each(|piece| out.extend_from_slice(piece));
}

/// NIL where there is no digest, which is after damage only.
fn write_from(
    digest: Option<&ArchivedDigest>,
    out: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>, &ArchivedDigest, bool),
) {
    match digest {
        Some(digest) => write(out, digest, false),
        None => out.extend_from_slice(b"NIL"),
    }
}

impl Session {
    pub(super) async fn fetch(&mut self, fetch: Fetch) -> Outcome {
        if fetch.vanished {
            return Ok(Answer::bad("QRESYNC is not enabled"));
        }
        let uids = self.resolve(&fetch.set, fetch.uid)?;
        let needs = Needs::of(&fetch.items);
        self.condstore |= fetch.changed_since.is_some() || fetch.items.contains(&FetchItem::ModSeq);
        let selected = self.selected()?;
        let (shard, mailbox) = (selected.view.shard().clone(), selected.view.mailbox());
        let sets_seen = !selected.read_only && fetch.items.iter().any(FetchItem::sets_seen);
        let (mut found, mut newly_seen, mut damaged) = (0, UidSet::default(), None);
        for chunk in chunks(&uids, limits::FETCH_CHUNK) {
            for info in shard.messages(mailbox, chunk).await? {
                found += 1;
                if fetch.changed_since.is_some_and(|since| info.message.modseq.0 <= since) {
                    continue;
                }
                self.learn_keywords(info.flags).await?;
                let (bytes, digest) = match read(&self.context.io, &shard, mailbox, &info.message, needs).await {
                    Ok(read) => read,
                    // Damage costs the messages that it touches, not the others.
                    Err(error @ EngineError::Damaged(_)) => {
                        damaged = Some(refusal(&error));
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                };
                let marks = sets_seen && !info.flags.contains(Flags::SEEN);
                if marks {
                    newly_seen.insert(info.message.uid);
                }
                self.write_message(&fetch.items, &info, &bytes, digest.as_ref(), marks)?;
                self.flush_if_full().await?;
            }
        }
        if needs.part.is_some() {
            Counters::add(&self.context.node.counters.messages_fetched, found);
        }
        if !newly_seen.is_empty() {
            self.flush().await?;
            shard.store_flags(mailbox, newly_seen, FlagOp::Add, vec![FlagName::Seen], None).await?;
            // The FLAGS responses are those of the changes that the command ends with.
        }
        if let Some(answer) = damaged {
            return Ok(answer);
        }
        if found < uids.len() {
            return Ok(Answer::ok("Some of them are expunged").with(Code::ExpungeIssued));
        }
        Ok(Answer::ok("Fetched"))
    }

    /// One FETCH response. With `marks`, \Seen is about to be set: flags come later.
    fn write_message(
        &mut self,
        items: &[FetchItem],
        info: &MessageInfo,
        bytes: &MessageBytes,
        digest: Option<&DigestBytes>,
        marks: bool,
    ) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref() else { return Ok(()) };
        let message = &info.message;
        let Some(sequence) = selected.view.sequence_of(message.uid) else { return Ok(()) };
        let digest = digest.and_then(DigestBytes::digest);
        let mut fetch = FetchWriter::new(&mut self.output, sequence);
        let mut empty = true;
        for item in items {
            empty &= marks && matches!(item, FetchItem::Flags | FetchItem::ModSeq);
            match item {
                FetchItem::Flags | FetchItem::ModSeq if marks => {}
                FetchItem::Flags => fetch.flags(&selected.flags_text(message.uid, info.flags)),
                FetchItem::ModSeq => fetch.mod_seq(message.modseq.0),
                FetchItem::Uid => fetch.uid(message.uid.0),
                FetchItem::InternalDate => fetch.internal_date(DateTime {
                    unix_seconds: message.internal_date,
                    offset_minutes: message.zone_minutes,
                }),
                FetchItem::Rfc822Size => fetch.rfc822_size(message.size),
                FetchItem::EmailId => fetch.email_id(&message.id.to_string()),
                FetchItem::ThreadId => fetch.item("THREADID").extend_from_slice(b"NIL"),
                FetchItem::Rfc822 => {
                    fetch.rfc822("RFC822", &[&bytes.prefix[..], &bytes.header, &bytes.body].concat());
                }
                FetchItem::Rfc822Header => {
                    fetch.rfc822("RFC822.HEADER", &[&bytes.prefix[..], &bytes.header].concat());
                }
                FetchItem::Rfc822Text => fetch.rfc822("RFC822.TEXT", &bytes.body),
                FetchItem::BodySection(section) if !section.section.part.is_empty() => {
                    // Offsets in the digest are those of the message without its trace fields.
                    let pieces: [&[u8]; 2] = [&bytes.header, &bytes.body];
                    match digest.and_then(|digest| extent(&section.section, digest)) {
                        None => fetch.body_section_nil(section),
                        Some(Extent::Octets(octets)) => write_pieces(&mut fetch, section, &cut(pieces, octets)),
                        Some(Extent::HeaderFields(octets)) => {
                            let header = cut(pieces, octets).concat();
                            let SectionText::HeaderFields { not, names } = &section.section.text else { continue };
                            write_pieces(&mut fetch, section, &[&header_fields(&header, names, *not)]);
                        }
                    }
                }
                FetchItem::BodySection(section) => match &section.section.text {
                    SectionText::Whole => {
                        write_pieces(&mut fetch, section, &[&bytes.prefix, &bytes.header, &bytes.body]);
                    }
                    SectionText::Header => write_pieces(&mut fetch, section, &[&bytes.prefix, &bytes.header]),
                    SectionText::Text => write_pieces(&mut fetch, section, &[&bytes.body]),
                    SectionText::HeaderFields { not, names } => {
                        let header = [&bytes.prefix[..], &bytes.header].concat();
                        write_pieces(&mut fetch, section, &[&header_fields(&header, names, *not)]);
                    }
                    SectionText::Mime => fetch.body_section_nil(section),
                },
                FetchItem::Envelope => write_from(digest, fetch.item("ENVELOPE"), write_envelope),
                FetchItem::Body => write_from(digest, fetch.item("BODY"), write_body),
                FetchItem::BodyStructure => write_from(digest, fetch.item("BODYSTRUCTURE"), write_body_structure),
                FetchItem::Preview { .. } => {
                    let out = fetch.item("PREVIEW");
                    write_nstring(out, digest.map(|digest| digest.preview().as_bytes()));
                }
            }
        }
        debug_assert!(!empty, "an item that marks is never left out");
        fetch.finish();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_cross_pieces() {
        let range = |from, to| String::from_utf8(cut([b"abc", b"", b"defg"], from..to).concat()).unwrap();
        assert_eq!(range(0, 7), "abcdefg");
        assert_eq!(range(2, 5), "cde");
        assert_eq!(range(3, 3), "");
        assert_eq!(range(6, 7), "g");
    }

    #[test]
    fn chunks_are_bounded() {
        let uids = UidSet::range(1..=600);
        let sizes: Vec<u64> = chunks(&uids, 256).map(|chunk| chunk.len()).collect();
        assert_eq!(sizes, [256, 256, 88]);
        assert_eq!(chunks(&UidSet::default(), 256).count(), 0);
    }
}
