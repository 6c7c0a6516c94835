//! FETCH (RFC 3501, 6.4.5; RFC 7162, 3.1.4).
//!
//! Responses stream: some hundred messages are asked of the engine at a time, and the output is sent whenever 64 KB have
//! come together. Of a message over 1 MB only what is asked for is read, and a block of it at a time is in memory. Where fetching a
//! body sets \Seen, the body goes out at once; the FLAGS response and the tagged OK wait until the flag is durable.

use std::ops::Range;
use std::rc::Rc;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::FlagName;
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::ids::MailboxId;
use posthaste_engine::index::Message;
use posthaste_engine::io::Runtime;
use posthaste_engine::read::{MessageBytes, MessageInfo, Part};
use posthaste_engine::reading::{Piece, Shape, WHOLE_OCTETS_MAX};
use posthaste_imap::command::fetch::{Fetch, FetchItem, SectionText};
use posthaste_imap::response::{Code, FetchWriter, write_body, write_body_structure, write_envelope, write_nstring};
use posthaste_imap::section::{Extent, extent, header_fields, partial_range};
use posthaste_imap::types::DateTime;
use posthaste_mime::digest::DigestBytes;
use posthaste_mime::{ArchivedDigest, Digest};
use roaring::RoaringBitmap;

use super::select::Selected;
use super::{Answer, BUSY, Failure, Outcome, Session, damaged};
use crate::connection::End;
use crate::limits;
use crate::node::{Context, Counters, Reservation, Shard};

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

/// The digest of a message. One that was stored without, with one that leaves parts out, or with one of another version, gets
/// it now. `whole` is the message, if it has been read.
pub(super) async fn digest_of(
    context: &Context,
    shard: &Shard,
    mailbox: MailboxId,
    message: &Message,
    whole: Option<&MessageBytes>,
) -> Result<Option<DigestBytes>, Failure> {
    let stored = shard.read_message(message, mailbox, Part::Digest).await?.digest;
    if let Ok(digest) = DigestBytes::from_storage(&stored)
        && !digest.digest().is_none_or(|digest| digest.overflow)
    {
        return Ok(Some(digest));
    }
    let _room = room_to_read(context, message.size)?;
    let whole = match whole {
        Some(whole) => whole.clone(),
        None => shard.read_message(message, mailbox, Part::Whole).await?,
    };
    let make = move || {
        let (small, whole) = Digest::of(&[&whole.header[..], &whole.body].concat()).archives();
        DigestBytes::from_aligned(whole.unwrap_or(small)).ok()
    };
    let is_large = message.size > limits::OFFLOAD_BYTES as u64;
    Ok(if is_large { context.io.offload(make).await } else { make() })
}

/// Takes room for octets that are read into memory, where they are many.
pub(super) fn room_to_read(context: &Context, octets: u64) -> Result<Option<Reservation>, Answer> {
    if octets <= limits::READ_UNRESERVED_BYTES {
        return Ok(None);
    }
    context.node.reserve(octets).map(Some).ok_or_else(busy)
}

/// Which octets of a message an item is made of. They count from the prefix on.
enum Wanted<'i> {
    /// There is no such part.
    Nil,
    Octets(Range<u64>),
    /// Those that a field list leaves of the header in these octets.
    Fields {
        header: Range<u64>,
        names: &'i [String],
        not: bool,
    },
}

/// Where the text of an item is. `None` if it is no text of the message.
fn wanted<'i>(item: &'i FetchItem, shape: Shape, digest: Option<&ArchivedDigest>) -> Option<Wanted<'i>> {
    let header_end = shape.prefix + shape.header;
    let section = match item {
        FetchItem::Rfc822 => return Some(Wanted::Octets(0..shape.octets())),
        FetchItem::Rfc822Header => return Some(Wanted::Octets(0..header_end)),
        FetchItem::Rfc822Text => return Some(Wanted::Octets(header_end..shape.octets())),
        FetchItem::BodySection(section) => &section.section,
        _ => return None,
    };
    let fields = |header| match &section.text {
        SectionText::HeaderFields { not, names } => Wanted::Fields { header, names, not: *not },
        _ => Wanted::Nil,
    };
    if !section.part.is_empty() {
        // Offsets in the digest are those of the message without its trace fields.
        let from_start = |octets: Range<u64>| octets.start + shape.prefix..octets.end + shape.prefix;
        return Some(match digest.and_then(|digest| extent(section, digest)) {
            None => Wanted::Nil,
            Some(Extent::Octets(octets)) => Wanted::Octets(from_start(octets)),
            Some(Extent::HeaderFields(octets)) => fields(from_start(octets)),
        });
    }
    Some(match section.text {
        SectionText::Whole => Wanted::Octets(0..shape.octets()),
        SectionText::Header => Wanted::Octets(0..header_end),
        SectionText::Text => Wanted::Octets(header_end..shape.octets()),
        SectionText::HeaderFields { .. } => fields(0..header_end),
        SectionText::Mime => Wanted::Nil,
    })
}

/// Headers, of the message and of messages within, in which fields are looked for, by their octets.
#[derive(Default)]
struct Headers {
    found: Vec<(Range<u64>, Vec<u8>)>,
    room: Option<Reservation>,
}

impl Headers {
    fn has(&self, octets: &Range<u64>) -> bool {
        self.found.iter().any(|(known, _)| known == octets)
    }

    fn find(&self, octets: &Range<u64>) -> &[u8] {
        self.found.iter().find(|(known, _)| known == octets).map_or(&[], |(_, header)| header)
    }

    /// Takes room for one more, where they are large.
    fn take_room(&mut self, context: &Context, octets: u64) -> Result<(), Answer> {
        let held: usize = self.found.iter().map(|(_, header)| header.len()).sum();
        let octets = octets + held as u64;
        match &mut self.room {
            Some(room) => {
                if !room.grow_to(octets) {
                    return Err(busy());
                }
            }
            None => self.room = room_to_read(context, octets)?,
        }
        Ok(())
    }
}

fn busy() -> Answer {
    Answer::no(Some(Code::Unavailable), BUSY)
}

/// What a partial leaves of octets.
fn narrow(octets: &Range<u64>, item: &FetchItem) -> Range<u64> {
    let partial = if let FetchItem::BodySection(section) = item { section.partial } else { None };
    let range = partial_range(partial, octets.end.saturating_sub(octets.start));
    octets.start + range.start..octets.start + range.end
}

/// Announces the text of an item, which the caller appends.
fn announce(fetch: &mut FetchWriter<'_>, item: &FetchItem, len: u64) {
    match item {
        FetchItem::Rfc822 => fetch.rfc822_streamed("RFC822", len),
        FetchItem::Rfc822Header => fetch.rfc822_streamed("RFC822.HEADER", len),
        FetchItem::Rfc822Text => fetch.rfc822_streamed("RFC822.TEXT", len),
        FetchItem::BodySection(section) if len == 0 => fetch.body_section(section, b""),
        FetchItem::BodySection(section) => fetch.body_section_streamed(section, len),
        _ => {}
    }
}

/// Where the octets of a message come from.
enum Source {
    /// All that the items need.
    Loaded(MessageBytes),
    /// The store, in pieces.
    Pieces(Shape),
}

impl Source {
    fn shape(&self) -> Shape {
        match self {
            Self::Loaded(bytes) => bytes.shape(),
            Self::Pieces(shape) => *shape,
        }
    }
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
        if fetch.changed_since.is_some() || fetch.items.contains(&FetchItem::ModSeq) {
            self.enable_condstore();
        }
        let selected = self.selected()?;
        let (shard, mailbox) = (selected.view.shard().clone(), selected.view.mailbox());
        let sets_seen = !selected.read_only && fetch.items.iter().any(FetchItem::sets_seen);
        let (mut found, mut newly_seen, mut unreadable) = (0, UidSet::default(), None);
        for chunk in chunks(&uids, limits::FETCH_CHUNK) {
            for info in shard.messages(mailbox, chunk).await? {
                found += 1;
                if fetch.changed_since.is_some_and(|since| info.message.modseq.0 <= since) {
                    continue;
                }
                self.learn_keywords(info.flags).await?;
                let (source, digest, headers) =
                    match self.read(&shard, mailbox, &info.message, needs, &fetch.items).await {
                        Ok(read) => read,
                        // Damage costs the messages that it touches, not the others.
                        Err(Failure::Answer(answer)) if answer.code == Some(Code::Corruption) => {
                            unreadable = Some(answer);
                            continue;
                        }
                        Err(failure) => return Err(failure),
                    };
                let marks = sets_seen && !info.flags.contains(Flags::SEEN);
                if marks {
                    newly_seen.insert(info.message.uid);
                }
                self.write_message(&fetch.items, &info, &source, digest.as_ref(), &headers, marks).await?;
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
        if let Some(answer) = unreadable {
            return Ok(answer);
        }
        if found < uids.len() {
            return Ok(Answer::ok("Some of them are expunged").with(Code::ExpungeIssued));
        }
        Ok(Answer::ok("Fetched"))
    }

    /// Reads what the items need, before anything of the response is written: after that, no answer can be given.
    async fn read(
        &self,
        shard: &Shard,
        mailbox: MailboxId,
        message: &Message,
        needs: Needs,
        items: &[FetchItem],
    ) -> Result<(Source, Option<DigestBytes>, Headers), Failure> {
        if needs.part == Some(Part::Whole) && self.context.is_damaged(message.id) {
            return Err(damaged().into());
        }
        let source = match needs.part {
            None => Source::Loaded(MessageBytes::default()),
            Some(_) if message.size > WHOLE_OCTETS_MAX => {
                Source::Pieces(shard.open_message(message, mailbox).await?.shape())
            }
            Some(part) => Source::Loaded(shard.read_message(message, mailbox, part).await?),
        };
        let digest = if needs.digest {
            let whole = match &source {
                Source::Loaded(bytes) if needs.part == Some(Part::Whole) => Some(bytes),
                _ => None,
            };
            digest_of(&self.context, shard, mailbox, message, whole).await?
        } else {
            None
        };
        let mut headers = Headers::default();
        for item in items {
            let digest = digest.as_ref().and_then(DigestBytes::digest);
            let Some(Wanted::Fields { header: octets, .. }) = wanted(item, source.shape(), digest) else { continue };
            if headers.has(&octets) {
                continue;
            }
            let header = match &source {
                Source::Loaded(bytes) => cut([&bytes.prefix, &bytes.header, &bytes.body], octets.clone()).concat(),
                Source::Pieces(_) => {
                    headers.take_room(&self.context, octets.end - octets.start)?;
                    let mut reading = shard.open_message(message, mailbox).await?.only(octets.clone());
                    let mut header = Vec::new();
                    while let Some(Piece::Header(piece) | Piece::Body(piece)) = reading.next().await? {
                        header.extend_from_slice(&piece);
                    }
                    header
                }
            };
            headers.found.push((octets, header));
        }
        Ok((source, digest, headers))
    }

    /// One FETCH response. With `marks`, \Seen is about to be set: flags come later.
    async fn write_message(
        &mut self,
        items: &[FetchItem],
        info: &MessageInfo,
        source: &Source,
        digest: Option<&DigestBytes>,
        headers: &Headers,
        marks: bool,
    ) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref() else { return Ok(()) };
        let Some(sequence) = selected.view.sequence_of(info.message.uid) else { return Ok(()) };
        let digest = digest.and_then(DigestBytes::digest);
        let shape = source.shape();
        let mut fetch = FetchWriter::new(&mut self.output, sequence);
        let (mut empty, mut looked_through) = (true, 0);
        for item in items {
            empty &= marks && matches!(item, FetchItem::Flags | FetchItem::ModSeq);
            match wanted(item, shape, digest) {
                None => {
                    let Some(selected) = self.selected.as_deref() else { return Ok(()) };
                    write_item(&mut fetch, item, selected, info, digest, marks);
                }
                Some(Wanted::Nil) => {
                    if let FetchItem::BodySection(section) = item {
                        fetch.body_section_nil(section);
                    }
                }
                Some(Wanted::Fields { header, names, not }) => {
                    let header = headers.find(&header);
                    let fields = header_fields(header, names, not);
                    let octets = narrow(&(0..fields.len() as u64), item);
                    announce(&mut fetch, item, octets.end - octets.start);
                    fetch.append(&[&fields[octets.start as usize..octets.end as usize]]);
                    looked_through += header.len();
                    if looked_through >= limits::FIELDS_STEP_OCTETS {
                        looked_through = 0;
                        self.context.turn().await;
                    }
                }
                Some(Wanted::Octets(octets)) => {
                    let octets = narrow(&octets, item);
                    announce(&mut fetch, item, octets.end - octets.start);
                    match source {
                        Source::Loaded(bytes) if octets.end - octets.start <= limits::OUTPUT_BYTES as u64 => {
                            fetch.append(&cut([&bytes.prefix, &bytes.header, &bytes.body], octets));
                        }
                        Source::Loaded(bytes) => {
                            let paused = fetch.pause();
                            for piece in cut([&bytes.prefix, &bytes.header, &bytes.body], octets) {
                                for piece in piece.chunks(limits::OUTPUT_BYTES) {
                                    self.output.extend_from_slice(piece);
                                    self.flush_if_full().await?;
                                }
                            }
                            fetch = paused.go_on(&mut self.output);
                        }
                        Source::Pieces(_) => {
                            let paused = fetch.pause();
                            Box::pin(self.stream(&info.message, octets)).await?;
                            fetch = paused.go_on(&mut self.output);
                        }
                    }
                }
            }
            // Nothing forbids to ask for much a hundred times.
            if fetch.written() >= limits::OUTPUT_BYTES {
                let paused = fetch.pause();
                self.flush().await?;
                fetch = paused.go_on(&mut self.output);
            }
        }
        debug_assert!(!empty, "an item that marks is never left out");
        fetch.finish();
        Ok(())
    }

    /// Sends octets of a large message, which have been announced.
    async fn stream(&mut self, message: &Message, octets: Range<u64>) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref() else { return Ok(()) };
        let (shard, mailbox) = (selected.view.shard().clone(), selected.view.mailbox());
        let context = Rc::clone(&self.context);
        let broken = |error: EngineError| {
            // The client has been promised more octets, and nothing else can be said. Next time it is known beforehand.
            tracing::error!(%error, "a connection ends within a message");
            if matches!(error, EngineError::Damaged(_)) {
                context.note_damaged(message.id);
            }
            Failure::from(End::Closed)
        };
        let mut reading = shard.open_message(message, mailbox).await.map_err(broken)?.only(octets);
        while let Some(Piece::Header(piece) | Piece::Body(piece)) = reading.next().await.map_err(broken)? {
            self.output.extend_from_slice(&piece);
            self.flush_if_full().await?;
        }
        Ok(())
    }
}

/// Writes an item that is no text of the message.
fn write_item(
    fetch: &mut FetchWriter<'_>,
    item: &FetchItem,
    selected: &Selected,
    info: &MessageInfo,
    digest: Option<&ArchivedDigest>,
    marks: bool,
) {
    let message = &info.message;
    match item {
        FetchItem::Flags | FetchItem::ModSeq if marks => {}
        FetchItem::Flags => fetch.flags(&selected.flags_text(message.uid, info.flags)),
        FetchItem::ModSeq => fetch.mod_seq(message.modseq.0),
        FetchItem::Uid => fetch.uid(message.uid.0),
        FetchItem::InternalDate => {
            fetch.internal_date(DateTime { unix_seconds: message.internal_date, offset_minutes: message.zone_minutes })
        }
        FetchItem::Rfc822Size => fetch.rfc822_size(message.size),
        FetchItem::EmailId => fetch.email_id(&message.id.to_string()),
        FetchItem::ThreadId => fetch.item("THREADID").extend_from_slice(b"NIL"),
        FetchItem::Envelope => write_from(digest, fetch.item("ENVELOPE"), write_envelope),
        FetchItem::Body => write_from(digest, fetch.item("BODY"), write_body),
        FetchItem::BodyStructure => write_from(digest, fetch.item("BODYSTRUCTURE"), write_body_structure),
        FetchItem::Preview { .. } => {
            let out = fetch.item("PREVIEW");
            write_nstring(out, digest.map(|digest| digest.preview().as_bytes()));
        }
        FetchItem::Rfc822 | FetchItem::Rfc822Header | FetchItem::Rfc822Text | FetchItem::BodySection(_) => {}
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
