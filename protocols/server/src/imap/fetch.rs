//! FETCH (RFC 3501, 6.4.5; RFC 7162, 3.1.4).
//!
//! Responses stream: some hundred messages are asked of the engine at a time, and the output is sent whenever 64 KB have
//! come together. Where fetching a body sets \Seen, the body goes out at once; the FLAGS response and the tagged OK wait
//! until the flag is durable.

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::FlagName;
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::read::{MessageBytes, MessageInfo, Part};
use posthaste_imap::command::fetch::{BodySection, Fetch, FetchItem, SectionText};
use posthaste_imap::response::{Code, FetchWriter};
use posthaste_imap::section::{header_fields, partial_range};
use posthaste_imap::types::DateTime;
use roaring::RoaringBitmap;

use super::{Answer, Failure, Outcome, Session, refusal};
use crate::limits;
use crate::node::Counters;

/// The set in pieces of at most `size`.
pub(super) fn chunks(uids: &UidSet, size: u64) -> impl Iterator<Item = UidSet> + '_ {
    let mut rest = uids.0.iter();
    std::iter::from_fn(move || {
        let chunk: RoaringBitmap = rest.by_ref().take(size as usize).collect();
        (!chunk.is_empty()).then_some(UidSet(chunk))
    })
}

/// What has to be read for the items; `None` if the index has it all. An error names what is not built yet.
fn part_for(items: &[FetchItem]) -> Result<Option<Part>, Failure> {
    let later = |what: &'static str| Failure::Answer(Answer::no(Some(Code::Cannot), what));
    let mut part = None;
    for item in items {
        let needed = match item {
            FetchItem::Flags
            | FetchItem::Uid
            | FetchItem::InternalDate
            | FetchItem::Rfc822Size
            | FetchItem::ModSeq
            | FetchItem::EmailId
            | FetchItem::ThreadId => continue,
            FetchItem::Rfc822 | FetchItem::Rfc822Text => Part::Whole,
            FetchItem::Rfc822Header => Part::Header,
            FetchItem::BodySection(section) if !section.section.part.is_empty() => {
                return Err(later("Body parts are not supported yet"));
            }
            FetchItem::BodySection(section) => match section.section.text {
                SectionText::Header | SectionText::HeaderFields { .. } => Part::Header,
                SectionText::Whole | SectionText::Text => Part::Whole,
                SectionText::Mime => return Err(later("Body parts are not supported yet")),
            },
            FetchItem::Envelope => return Err(later("ENVELOPE is not supported yet")),
            FetchItem::Body | FetchItem::BodyStructure => return Err(later("BODYSTRUCTURE is not supported yet")),
            FetchItem::Preview { .. } => return Err(later("PREVIEW is not supported yet")),
        };
        if part != Some(Part::Whole) {
            part = Some(needed);
        }
    }
    Ok(part)
}

/// Appends what a range of the joined pieces holds.
fn append_range(out: &mut Vec<u8>, pieces: &[&[u8]], range: std::ops::Range<u64>) {
    let mut at = 0;
    for piece in pieces {
        let end = at + piece.len() as u64;
        let (from, to) = (range.start.clamp(at, end), range.end.clamp(at, end));
        out.extend_from_slice(&piece[(from - at) as usize..(to - at) as usize]);
        at = end;
    }
}

fn write_pieces(fetch: &mut FetchWriter<'_>, section: &BodySection, pieces: &[&[u8]]) {
    let len = pieces.iter().map(|piece| piece.len() as u64).sum();
    let range = partial_range(section.partial, len);
    if range.is_empty() {
        return fetch.body_section(section, b"");
    }
    let out = fetch.body_section_streamed(section, range.end - range.start);
    append_range(out, pieces, range);
}

impl Session {
    pub(super) async fn fetch(&mut self, fetch: Fetch) -> Outcome {
        if fetch.vanished {
            return Ok(Answer::bad("QRESYNC is not enabled"));
        }
        let uids = self.resolve(&fetch.set, fetch.uid)?;
        let part = part_for(&fetch.items)?;
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
                let bytes = match part {
                    None => MessageBytes::default(),
                    Some(part) => match shard.read_message(&info.message, mailbox, part).await {
                        Ok(bytes) => bytes,
                        // Damage costs the messages that it touches, not the others.
                        Err(error @ EngineError::Damaged(_)) => {
                            damaged = Some(refusal(&error));
                            continue;
                        }
                        Err(error) => return Err(error.into()),
                    },
                };
                let marks = sets_seen && !info.flags.contains(Flags::SEEN);
                if marks {
                    newly_seen.insert(info.message.uid);
                }
                self.write_message(&fetch.items, &info, &bytes, marks)?;
                self.flush_if_full().await?;
            }
        }
        if part.is_some() {
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
        marks: bool,
    ) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref() else { return Ok(()) };
        let message = &info.message;
        let Some(sequence) = selected.view.sequence_of(message.uid) else { return Ok(()) };
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
                // `part_for` has refused them.
                FetchItem::Envelope | FetchItem::Body | FetchItem::BodyStructure | FetchItem::Preview { .. } => {}
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
        let range = |from, to| {
            let mut out = Vec::new();
            append_range(&mut out, &[b"abc", b"", b"defg"], from..to);
            String::from_utf8(out).unwrap()
        };
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
