//! Reading messages: the index tells where a record lies, the record holds the bytes, and every byte that goes out has
//! been checked against its checksum.

use bytes::Bytes;
use std::cell::Cell;

use crate::error::{Damage, EngineError, Refusal};
use crate::flags::{Flags, UidSet};
use crate::format::FormatError;
use crate::format::codec::{Input, Wire};
use crate::format::frame::{BLOCK_RAW_BYTES, FrameInfo, Unpacker};
use crate::format::message::{BlockForm, BlockReference, MessageReader, put_part};
use crate::format::record::{RECORD_HEADER_BYTES, RecordHeader, kind};
use crate::ids::{Location, MailboxId, Position, Uid};
use crate::index::{MailboxIndex, Message};
use crate::message_cache::StoredPart;
use crate::reading::{Shape, WHOLE_OCTETS_MAX};
use crate::shard::Shard;
use crate::storage::{Storage, StorageError};

/// What to read of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Prefix and header; the body is not touched, but for a block of it where the header is larger than its frame.
    Header,
    /// Prefix, header and body.
    Whole,
    /// The digest only.
    Digest,
}

/// The bytes of a message, perhaps shared with others who read it. BODY[] is prefix, header and body, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MessageBytes {
    pub prefix: Bytes,
    pub header: Bytes,
    pub body: Bytes,
    /// Header and body together: the same octets.
    pub rest: Bytes,
    pub digest: Bytes,
}

impl MessageBytes {
    pub fn shape(&self) -> Shape {
        let [prefix, header, body] = [&self.prefix, &self.header, &self.body].map(|octets| octets.len() as u64);
        Shape { prefix, header, body }
    }
}

/// A message with its flags.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MessageInfo {
    pub message: Message,
    pub flags: Flags,
}

thread_local! {
    static OCTETS_READ: Cell<u64> = const { Cell::new(0) };
}

/// Octets of segments that this thread has asked for so far: the difference over a poll is what the polled task has.
pub fn octets_read_by_thread() -> u64 {
    OCTETS_READ.get()
}

pub(crate) fn count_octets_read(octets: usize) {
    OCTETS_READ.set(OCTETS_READ.get() + octets as u64);
}

impl<S: Storage> Shard<S> {
    /// The messages of `uids` that exist, in order. Ask for some hundreds at a time: the answer is a copy.
    pub async fn messages(&self, mailbox: MailboxId, uids: UidSet) -> Result<Vec<MessageInfo>, EngineError> {
        loop {
            self.load_index(mailbox).await?;
            let state = self.0.state.borrow();
            let slot = state.slots.get(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            let Some(index) = &slot.index else { continue };
            let mut infos = Vec::new();
            for (first, last) in uids.runs() {
                let start = index.position(Uid(first)).unwrap_or_else(|at| at);
                let run = index.messages.iter_from(start).take_while(|message| message.uid.0 <= last);
                infos.extend(run.map(|message| MessageInfo { message, flags: index.flags_of(message.uid).shown() }));
            }
            return Ok(infos);
        }
    }

    /// Lets `look` see the published index of a mailbox, without a copy of it. It holds up everybody else on the worker, so it
    /// must be short.
    pub async fn look<T>(&self, mailbox: MailboxId, look: impl FnOnce(&MailboxIndex) -> T) -> Result<T, EngineError> {
        loop {
            self.load_index(mailbox).await?;
            let state = self.0.state.borrow();
            let slot = state.slots.get(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            if let Some(index) = &slot.index {
                return Ok(look(index));
            }
        }
    }

    /// How many messages of a mailbox have a flag.
    pub async fn count_with(&self, mailbox: MailboxId, flag: Flags) -> Result<u32, EngineError> {
        loop {
            self.load_index(mailbox).await?;
            let state = self.0.state.borrow();
            let slot = state.slots.get(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            let Some(index) = &slot.index else { continue };
            // After damage a bitmap may name messages that are lost.
            let with = flag.bits().filter_map(|bit| index.with_flag(bit as u8)).flatten();
            return Ok(with.filter(|&uid| index.contains(Uid(uid))).count() as u32);
        }
    }

    /// The keywords of a mailbox by their numbers; an empty name is a number that is not in use.
    pub async fn keywords(&self, mailbox: MailboxId) -> Result<Vec<String>, EngineError> {
        loop {
            self.load_index(mailbox).await?;
            let state = self.0.state.borrow();
            let slot = state.slots.get(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            if let Some(index) = &slot.index {
                return Ok(index.keywords.clone());
            }
        }
    }

    /// The damage at a record, named for people.
    pub(crate) fn damaged(&self, location: Location, what: &str, error: FormatError) -> EngineError {
        let position = Position { segment: location.segment, offset: location.offset() };
        Damage { place: format!("{} ({what})", self.describe(position)), error }.into()
    }

    /// Reads a message, or takes what was read before, and keeps it for whoever wants it next.
    ///
    /// # Errors
    /// [`EngineError::Damaged`] with file, offset, mailbox and UID where the bytes are not those that were written.
    pub async fn read_message(
        &self,
        message: &Message,
        mailbox: MailboxId,
        part: Part,
    ) -> Result<MessageBytes, EngineError> {
        self.read(message, mailbox, part, true).await
    }

    /// As [`Shard::read_message`] for one of many that nobody will want again: it is not kept, and displaces nothing. It takes
    /// no less time.
    ///
    /// # Errors
    /// As [`Shard::read_message`].
    pub async fn read_message_once(
        &self,
        message: &Message,
        mailbox: MailboxId,
        part: Part,
    ) -> Result<MessageBytes, EngineError> {
        self.read(message, mailbox, part, false).await
    }

    async fn read(
        &self,
        message: &Message,
        mailbox: MailboxId,
        part: Part,
        keep: bool,
    ) -> Result<MessageBytes, EngineError> {
        if let Some(found) = self.0.messages.borrow_mut().find(message, part) {
            return Ok(found);
        }
        let mut message = self.where_now(message, mailbox).await?;
        loop {
            match self.read_stored(&message, mailbox, part, keep).await {
                // Compaction has moved it meanwhile, or its blocks.
                Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => {
                    let now =
                        self.look(mailbox, |index| index.message(message.uid)).await?.ok_or(Refusal::NoSuchMessage)?;
                    if now.location == message.location {
                        return Err(EngineError::Storage(error));
                    }
                    message = now;
                }
                read => return read,
            }
        }
    }

    async fn read_stored(
        &self,
        message: &Message,
        mailbox: MailboxId,
        part: Part,
        keep: bool,
    ) -> Result<MessageBytes, EngineError> {
        let location = message.location;
        let what = || format!("mailbox {mailbox} UID {}", message.uid);
        let damaged = |error| self.damaged(location, &what(), error);
        let whole = part == Part::Whole;
        let len = if whole { location.len } else { message.head_bytes.min(location.len) };
        let bytes = self.read_segment(location.segment, location.offset(), len as usize).await?;
        let payload = if whole {
            let (header, payload) = RecordHeader::decode(&bytes).map_err(damaged)?;
            if header.kind != kind::MESSAGE {
                let detail = format!("a record of kind {}", header.kind);
                return Err(damaged(FormatError::Misplaced { what: "message record", detail }));
            }
            payload
        } else {
            // The checksums of head and frames guard what is read; the record's own would need all of it.
            bytes.get(RECORD_HEADER_BYTES..).ok_or_else(|| {
                damaged(FormatError::Short {
                    what: "message record",
                    needed: u64::from(len),
                    available: bytes.len() as u64,
                })
            })?
        };
        let reader = MessageReader::new(payload).map_err(damaged)?;
        if reader.head.id != message.id {
            let detail = format!("message {}", reader.head.id);
            return Err(damaged(FormatError::Misplaced { what: "message record", detail }));
        }
        let head = &reader.head;
        let frames = match part {
            Part::Digest => [head.digest, head.digest_overflow],
            Part::Header => [head.header, FrameInfo::NONE],
            Part::Whole => [head.header, head.body],
        };
        self.have_dictionaries(location.segment, &frames).await?;
        let mut out = Vec::new();
        if part == Part::Digest {
            reader.digest(&mut self.0.unpacker.borrow_mut(), &mut out).map_err(damaged)?;
            let digest = Bytes::from(out);
            if keep {
                self.0.messages.borrow_mut().keep(message.id, StoredPart::digest(location, digest.clone()));
            }
            return Ok(MessageBytes { digest, ..MessageBytes::default() });
        }
        let is_kept = keep && self.0.messages.borrow().takes(head, part);
        // What is not kept has the one prefix that was asked for.
        let mut start = Vec::new();
        reader.header_frame(&mut self.0.unpacker.borrow_mut(), &mut start).map_err(damaged)?;
        let prefixes = head.placements.iter().enumerate().map(|(number, placement)| {
            let wanted = is_kept || number == usize::from(message.prefix_of);
            if wanted { placement.prefix.of(&start) } else { &[] }
        });
        let prefixes_octets: usize = prefixes.clone().map(<[u8]>::len).sum();
        let shared = if whole { head.rest_octets } else { head.header_octets.into() };
        out.reserve_exact(prefixes_octets + shared.min(WHOLE_OCTETS_MAX) as usize);
        prefixes.clone().for_each(|prefix| out.extend_from_slice(prefix));
        out.extend_from_slice(&start[head.prefix_in_frame()..]);
        if whole {
            self.count(|stats| stats.body_frames_unpacked += 1);
            reader.body(&mut self.0.unpacker.borrow_mut(), &mut out).map_err(damaged)?;
        }
        // A header that is too large for its frame goes on before the body.
        let header_octets = head.header_octets as usize;
        if !whole && out.len() < prefixes_octets + header_octets && head.blocks.is_empty() {
            let whole = Box::pin(self.read(message, mailbox, Part::Whole, keep)).await?;
            return Ok(MessageBytes { body: Bytes::new(), rest: whole.header.clone(), ..whole });
        }
        let wanted = if whole { head.rest_octets } else { u64::from(head.header_octets) };
        for (number, block) in head.blocks.iter().enumerate() {
            if (out.len() - prefixes_octets) as u64 >= wanted {
                break;
            }
            if number > 0 {
                // A block takes some 200 us. What is in the page cache is read without a pause.
                self.0.storage.yield_now().await;
            }
            self.read_block(block, &what(), &mut out).await?;
        }
        let available = (out.len() - prefixes_octets) as u64;
        if available < wanted || (whole && available > wanted) {
            return Err(damaged(FormatError::Short { what: "message", needed: wanted, available }));
        }
        if !whole {
            out.truncate(prefixes_octets + header_octets);
        }
        let read = StoredPart::new(location, part, out.into(), prefixes.map(<[u8]>::len), header_octets);
        let bytes = read.of_placement(message.prefix_of, part);
        if is_kept {
            self.0.messages.borrow_mut().keep(message.id, read);
        }
        Ok(bytes)
    }

    /// Appends the part of a body that a block holds.
    pub(crate) async fn read_block(
        &self,
        block: &BlockReference,
        what: &str,
        out: &mut Vec<u8>,
    ) -> Result<(), EngineError> {
        let location = block.location;
        let damaged = |error| self.damaged(location, what, error);
        let bytes = self.read_segment(location.segment, location.offset(), location.len as usize).await?;
        self.count(|stats| stats.body_frames_unpacked += 1);
        let (info, stored) = open_block(&bytes, block.lsn).map_err(damaged)?;
        self.have_dictionaries(location.segment, &[info]).await?;
        unpack_block(block, &info, stored, &mut self.0.unpacker.borrow_mut(), out).map_err(damaged)
    }
}

/// Appends the part of a body that a block's frame holds.
pub(crate) fn unpack_block(
    block: &BlockReference,
    info: &FrameInfo,
    stored: &[u8],
    unpacker: &mut Unpacker,
    out: &mut Vec<u8>,
) -> Result<(), FormatError> {
    let BlockForm { octets, line_octets } = block.form;
    if line_octets == 0 {
        if info.raw_len != octets {
            let detail = format!("{} octets for a part of {octets}", info.raw_len);
            return Err(FormatError::Misplaced { what: BLOCK, detail });
        }
        return info.unpack_at_most(BLOCK_RAW_BYTES, BLOCK, stored, unpacker, out);
    }
    let mut content = Vec::new();
    info.unpack_at_most(BLOCK_RAW_BYTES, BLOCK, stored, unpacker, &mut content)?;
    put_part(&content, line_octets, octets, BLOCK, out)
}

/// What errors call the frame of a block.
pub(crate) const BLOCK: &str = "block";

/// Verifies a block record; its frame.
pub(crate) fn open_block(record: &[u8], lsn: crate::ids::Lsn) -> Result<(FrameInfo, &[u8]), FormatError> {
    const WHAT: &str = "block record";
    let (header, payload) = RecordHeader::decode(record)?;
    if header.kind != kind::BLOCK || header.lsn != lsn {
        let detail = format!("kind {} with LSN {}", header.kind, header.lsn);
        return Err(FormatError::Misplaced { what: WHAT, detail });
    }
    let mut input = Input(payload);
    let info = FrameInfo::take(&mut input).map_err(|source| FormatError::Decode { what: WHAT, source })?;
    Ok((info, input.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::frame::Packer;
    use crate::ids::Lsn;

    #[test]
    fn a_block_of_another_length_than_its_part_is_damage() {
        let unpack = |raw: &[u8], form| {
            let (mut stored, mut out) = (Vec::new(), Vec::new());
            let info = Packer::default().pack(raw, &mut stored);
            let block = BlockReference { lsn: Lsn::default(), location: Location::default(), form };
            unpack_block(&block, &info, &stored, &mut Unpacker::default(), &mut out).map(|()| out)
        };
        let raw = [b'x'; 3000];
        assert_eq!(unpack(&raw, BlockForm::as_it_is(3000)), Ok(raw.to_vec()));
        for octets in [0, 2999, 3001] {
            let detail = format!("3000 octets for a part of {octets}");
            let expected = FormatError::Misplaced { what: BLOCK, detail };
            assert_eq!(unpack(&raw, BlockForm::as_it_is(octets)), Err(expected));
        }
        // More than any block has is not unpacked at all.
        let raw = vec![0; BLOCK_RAW_BYTES + 1];
        for form in [BlockForm::as_it_is(raw.len() as u32), BlockForm { octets: 78, line_octets: 76 }] {
            assert_eq!(unpack(&raw, form), Err(FormatError::Decompress { what: BLOCK }));
        }
    }
}
