//! Messages for those who send them in one go: the sizes of a whole mailbox, and the octets of a message piece by piece.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;

use crate::compaction::Held;
use crate::error::{EngineError, Refusal};
use crate::flags::Flags;
use crate::format::FormatError;
use crate::format::message::{BlockReference, MessageReader};
use crate::format::record::{RecordHeader, kind};
use crate::ids::{Location, MailboxId, Uid};
use crate::index::Message;
use crate::read::Part;
use crate::shard::Shard;
use crate::storage::Storage;

/// Larger messages are not read at once. The cache does not keep them either.
pub const WHOLE_OCTETS_MAX: u64 = 1 << 20;
/// Messages of an index that are visited before others have their turn: about 100 us.
const SLICE: usize = 8192;

/// Octets of a message, as many as come together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Of the header, which ends with an empty line.
    Header(Bytes),
    Body(Bytes),
}

/// A message that is being read. However large it is, this takes at most some 3 MB of memory, and mostly one block of 256 KB.
pub struct Reading<S: Storage> {
    shard: Shard<S>,
    /// What it is, for the report of damage.
    what: String,
    location: Location,
    ready: VecDeque<Piece>,
    blocks: std::vec::IntoIter<BlockReference>,
    /// Octets of the header, and of all, that have not been read.
    header_left: usize,
    left: u64,
    shape: Shape,
    /// Octets before the first piece that is ready.
    at: u64,
    wanted: Range<u64>,
    /// The segments of the blocks stay until they have been read.
    held: Option<Held<S>>,
}

/// How many octets a message has of what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Before the header, for this recipient only.
    pub prefix: u64,
    /// The header with the empty line that ends it, without the prefix.
    pub header: u64,
    pub body: u64,
}

impl Shape {
    pub fn octets(&self) -> u64 {
        self.prefix + self.header + self.body
    }
}

impl<S: Storage> Shard<S> {
    /// Visits the UID and the size of each message of a mailbox, ascending, and gives its UIDVALIDITY. Sizes have a line end
    /// more where the message does not end with one. Bodies are not read.
    ///
    /// What changes meanwhile may be visited or not.
    pub async fn visit_sizes(&self, mailbox: MailboxId, mut visit: impl FnMut(Uid, u64)) -> Result<u32, EngineError> {
        let mut next = Uid(1);
        loop {
            self.load_index(mailbox).await?;
            {
                let state = self.0.state.borrow();
                let slot = state.slots.get(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
                let Some(index) = &slot.index else { continue };
                let open_ended = index.with_flag(Flags::OPEN_ENDED_BIT);
                let start = index.position(next).unwrap_or_else(|at| at);
                let mut visited = 0;
                for (uid, octets) in index.messages.uids_and_sizes_from(start).take(SLICE) {
                    let line_end = if open_ended.is_some_and(|open_ended| open_ended.contains(uid)) { 2 } else { 0 };
                    visit(Uid(uid), octets + line_end);
                    next = Uid(uid.saturating_add(1));
                    visited += 1;
                }
                if visited < SLICE {
                    return Ok(slot.meta.uid_validity);
                }
            }
            self.0.storage.yield_now().await;
        }
    }

    /// Begins to read a message.
    ///
    /// # Errors
    /// As [`Shard::read_message`].
    pub async fn open_message(&self, message: &Message, mailbox: MailboxId) -> Result<Reading<S>, EngineError> {
        let mut reading = Reading {
            shard: self.clone(),
            what: format!("mailbox {mailbox} UID {}", message.uid),
            location: message.location,
            ready: VecDeque::new(),
            blocks: Vec::new().into_iter(),
            header_left: 0,
            left: 0,
            shape: Shape::default(),
            at: 0,
            wanted: 0..u64::MAX,
            held: None,
        };
        if message.size <= WHOLE_OCTETS_MAX {
            let whole = self.read_message(message, mailbox, Part::Whole).await?;
            reading.shape = whole.shape();
            reading.ready = [Piece::Header(whole.prefix), Piece::Header(whole.header), Piece::Body(whole.body)].into();
            return Ok(reading);
        }
        let (message, record) = self.hold_record(message, mailbox, &mut reading).await?;
        let message = &message;
        let segment = message.location.segment;
        let damaged = |error| self.damaged(message.location, &reading.what, error);
        let reader = open_record(&record, message).map_err(damaged)?;
        self.have_dictionaries(segment, &[reader.head.header, reader.head.body]).await?;
        let (prefix, start) = self.unpack_start(&reader, message).map_err(damaged)?;
        let (header, rest) = (u64::from(reader.head.header_octets), reader.head.rest_octets);
        reading.shape = Shape { prefix: prefix.len() as u64, header, body: rest - header };
        reading.ready.push_back(Piece::Header(prefix.into()));
        reading.header_left = header as usize;
        reading.left = rest;
        reading.blocks = reader.head.blocks.into_iter();
        reading.add(start.into())?;
        Ok(reading)
    }

    /// The record of a message where it is now, and its blocks kept where they are.
    async fn hold_record(
        &self,
        message: &Message,
        mailbox: MailboxId,
        reading: &mut Reading<S>,
    ) -> Result<(Message, Vec<u8>), EngineError> {
        let mut message = self.where_now(message, mailbox).await?;
        loop {
            let location = message.location;
            reading.location = location;
            reading.held = Some(self.hold(std::iter::once(location.segment)));
            let record = self.read_segment(location.segment, location.offset(), location.len as usize).await?;
            let damaged = |error| self.damaged(location, &reading.what, error);
            let blocks = open_record(&record, &message).map_err(damaged)?.head.blocks;
            reading.held = Some(self.hold(blocks.iter().map(|block| block.location.segment)));
            if blocks.iter().any(|block| self.0.compaction.is_retired(block.location.segment)) {
                let now =
                    self.look(mailbox, |index| index.message(message.uid)).await?.ok_or(Refusal::NoSuchMessage)?;
                if now.location != location {
                    message = now;
                    continue;
                }
            }
            return Ok((message, record));
        }
    }

    /// The prefix of a message, and what its record has of the rest.
    fn unpack_start(&self, reader: &MessageReader<'_>, message: &Message) -> Result<(Vec<u8>, Vec<u8>), FormatError> {
        let mut start = Vec::new();
        let mut unpacker = self.0.unpacker.borrow_mut();
        reader.header_frame(&mut unpacker, &mut start)?;
        let prefix = reader.head.placements.get(usize::from(message.prefix_of));
        let prefix = prefix.map(|placement| placement.prefix.of(&start).to_vec()).unwrap_or_default();
        start.drain(..reader.head.prefix_in_frame());
        if reader.head.body.raw_len > 0 {
            self.count(|stats| stats.body_frames_unpacked += 1);
        }
        reader.body(&mut unpacker, &mut start)?;
        Ok((prefix, start))
    }
}

/// Verifies the record of a message.
fn open_record<'a>(record: &'a [u8], message: &Message) -> Result<MessageReader<'a>, FormatError> {
    let (header, payload) = RecordHeader::decode(record)?;
    let reader = MessageReader::new(payload)?;
    if header.kind != kind::MESSAGE || reader.head.id != message.id {
        let detail = format!("kind {} of message {}", header.kind, reader.head.id);
        return Err(FormatError::Misplaced { what: "message record", detail });
    }
    Ok(reader)
}

impl<S: Storage> Reading<S> {
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Gives only these octets of the message, of which the prefix is the first. Blocks that have none of them are not read.
    pub fn only(self, octets: Range<u64>) -> Self {
        Self { wanted: octets, ..self }
    }

    /// The next piece, verified; `None` at the end. The pieces together are the message.
    ///
    /// # Errors
    /// [`EngineError::Damaged`] also after pieces have been given: then the message is not whole.
    pub async fn next(&mut self) -> Result<Option<Piece>, EngineError> {
        loop {
            if self.at >= self.wanted.end {
                return Ok(None);
            }
            if let Some(piece) = self.ready.pop_front() {
                if let Some(piece) = self.cut(piece) {
                    return Ok(Some(piece));
                }
                continue;
            }
            let Some(block) = self.blocks.next() else { break };
            let len = u64::from(block.form.octets);
            if self.at + len <= self.wanted.start {
                self.at += len;
                self.left = self.left.checked_sub(len).ok_or_else(|| self.wrong_length(len))?;
                self.header_left = self.header_left.saturating_sub(len as usize);
                continue;
            }
            let mut octets = Vec::with_capacity(block.form.octets as usize);
            self.shard.read_block(&block, &self.what, &mut octets).await?;
            self.add(octets.into())?;
        }
        if self.left > 0 {
            return Err(self.wrong_length(0));
        }
        Ok(None)
    }

    /// What is wanted of a piece, if there is any of it.
    fn cut(&mut self, piece: Piece) -> Option<Piece> {
        let (octets, make): (_, fn(Bytes) -> Piece) = match piece {
            Piece::Header(octets) => (octets, Piece::Header),
            Piece::Body(octets) => (octets, Piece::Body),
        };
        let (start, end) = (self.at, self.at + octets.len() as u64);
        self.at = end;
        let from = self.wanted.start.clamp(start, end) - start;
        let to = self.wanted.end.clamp(start, end) - start;
        (from < to).then(|| make(octets.slice(from as usize..to as usize)))
    }

    /// Takes what was read, which belongs to the header first.
    fn add(&mut self, mut octets: Bytes) -> Result<(), EngineError> {
        let len = octets.len() as u64;
        self.left = self.left.checked_sub(len).ok_or_else(|| self.wrong_length(len))?;
        let header = octets.split_to(self.header_left.min(octets.len()));
        self.header_left -= header.len();
        if !header.is_empty() {
            self.ready.push_back(Piece::Header(header));
        }
        if !octets.is_empty() {
            self.ready.push_back(Piece::Body(octets));
        }
        Ok(())
    }

    fn wrong_length(&self, available: u64) -> EngineError {
        let error = FormatError::Short { what: "rest of the message", needed: self.left, available };
        self.shard.damaged(self.location, &self.what, error)
    }
}
