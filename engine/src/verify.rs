//! What makes stored bytes good, and whom it touches where they are not: shared by all who look for damage.

use std::collections::BTreeMap;

use crate::error::Finding;
use crate::format::codec::{Input, Wire};
use crate::format::frame::{BLOCK_RAW_BYTES, FrameInfo, Unpacker};
use crate::format::message::{BlockReference, MessageHead, MessageReader};
use crate::format::record::{RECORD_HEADER_BYTES, RecordHeader};
use crate::format::{FormatError, PiecewiseChecksum};
use crate::ids::{MailboxId, SegmentId, ShardId};
use crate::index::Message;
use crate::read::{BLOCK, open_block, unpack_block};

/// Where a record lies, without its length and number.
pub(crate) type Place = (SegmentId, u64);

/// What errors call a block whose segment is not there.
pub(crate) const MISSING_BLOCK: &str = "block of the message";

/// What is wrong with a record.
#[derive(Clone, Debug)]
pub(crate) struct Broken {
    pub what: String,
    /// Something that it names is not there.
    pub is_missing: bool,
}

impl From<FormatError> for Broken {
    fn from(error: FormatError) -> Self {
        let is_missing = matches!(error, FormatError::Misplaced { what: MISSING_BLOCK, .. });
        Self { what: error.to_string(), is_missing }
    }
}

/// What a message says of a block that is not there.
pub(crate) fn missing_block(segment: SegmentId) -> FormatError {
    let detail = format!("in segment {segment}, which is not there");
    FormatError::Misplaced { what: MISSING_BLOCK, detail }
}

/// Opens a message record, all of it.
pub(crate) fn open_message(record: &[u8]) -> Result<MessageReader<'_>, FormatError> {
    let (_, payload) = RecordHeader::decode(record)?;
    MessageReader::new(payload)
}

/// The frame of a block record, whatever message it belongs to.
pub(crate) fn block_frame(record: &[u8]) -> Result<(FrameInfo, &[u8]), FormatError> {
    let mut input = Input(record.get(RECORD_HEADER_BYTES..).unwrap_or_default());
    let info = FrameInfo::take(&mut input);
    let info = info.map_err(|source| FormatError::Decode { what: "block record", source })?;
    Ok((info, input.0))
}

/// Verifies the frame of a block.
pub(crate) fn verify_block(
    info: &FrameInfo,
    stored: &[u8],
    unpacker: &mut Unpacker,
    scratch: &mut Vec<u8>,
) -> Result<(), FormatError> {
    scratch.clear();
    info.unpack_at_most(BLOCK_RAW_BYTES, BLOCK, stored, unpacker, scratch)
}

/// A message that is unpacked piece by piece, to be compared with what was received. One piece at a time is in memory.
#[derive(Default)]
pub(crate) struct Received {
    octets: u64,
    checksum: PiecewiseChecksum,
    piece: Vec<u8>,
}

impl Received {
    /// Verifies the frames of a record, and takes in what they have of the message.
    pub fn of_frames(reader: &MessageReader<'_>, unpacker: &mut Unpacker) -> Result<Self, FormatError> {
        let mut received = Self::default();
        reader.digest(unpacker, &mut received.piece)?;
        received.piece.clear();
        reader.header(unpacker, &mut received.piece)?;
        reader.body(unpacker, &mut received.piece)?;
        received.take_in();
        Ok(received)
    }

    /// Takes in a block, of which this is the record.
    pub fn add_block(
        &mut self,
        block: &BlockReference,
        record: &[u8],
        unpacker: &mut Unpacker,
    ) -> Result<(), FormatError> {
        let (info, stored) = open_block(record, block.lsn)?;
        unpack_block(block, &info, stored, unpacker, &mut self.piece)?;
        self.take_in();
        Ok(())
    }

    fn take_in(&mut self) {
        self.octets += self.piece.len() as u64;
        self.checksum.update(&self.piece);
        self.piece.clear();
    }

    /// Compares the whole message with what was received.
    pub fn compare(self, head: &MessageHead) -> Result<(), FormatError> {
        if self.octets != head.rest_octets {
            return Err(FormatError::Short { what: "message", needed: head.rest_octets, available: self.octets });
        }
        self.checksum.verify("message as received", head.rest_checksum)
    }
}

/// Adds findings about records; where there is one about the same place, it is told whom it touches, too.
pub(crate) fn add_findings(findings: &mut Vec<Finding>, more: Vec<Finding>) {
    let known = findings.iter().enumerate().map(|(number, it)| ((it.file.clone(), it.offset), number));
    let known: BTreeMap<(String, u64), usize> = known.collect();
    for finding in more {
        match known.get(&(finding.file.clone(), finding.offset)) {
            Some(&number) => {
                let touches = &mut findings[number].touches;
                let new: Vec<_> = finding.touches.into_iter().filter(|touch| !touches.contains(touch)).collect();
                touches.extend(new);
            }
            None => findings.push(finding),
        }
    }
}

/// Finds out whose messages have records that cannot be read, or are not there.
pub(crate) struct Concerned<'a> {
    broken: &'a BTreeMap<Place, Broken>,
    touched: BTreeMap<Place, Vec<(MailboxId, u32, u32)>>,
    dangling: BTreeMap<Place, Vec<(MailboxId, u32, u32)>>,
}

impl<'a> Concerned<'a> {
    pub fn new(broken: &'a BTreeMap<Place, Broken>) -> Self {
        Self { broken, touched: BTreeMap::new(), dangling: BTreeMap::new() }
    }

    /// Looks at a message; `is_there` tells whether there is a record at its place.
    pub fn look_at(&mut self, mailbox: MailboxId, message: &Message, is_there: impl FnOnce(Place) -> bool) {
        let place = (message.location.segment, message.location.offset());
        let touch = (mailbox, message.uid.0, message.uid.0);
        if self.broken.contains_key(&place) {
            self.touched.entry(place).or_default().push(touch);
        } else if !is_there(place) {
            self.dangling.entry(place).or_default().push(touch);
        }
    }

    /// One finding for each record. `file_of` names the file of a segment.
    pub fn findings(mut self, shard: ShardId, file_of: impl Fn(SegmentId) -> String) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |(segment, offset): Place, what: String, touches| {
            findings.push(Finding { shard, file: file_of(segment), offset, what, touches });
        };
        for (place, Broken { what, is_missing }) in self.broken {
            let touches = self.touched.remove(place).unwrap_or_default();
            // The blocks of a dead message go with the segments that they are in.
            if !is_missing || !touches.is_empty() {
                find(*place, what.clone(), touches);
            }
        }
        for (place, touches) in self.dangling {
            find(place, "the message's record is not there".to_owned(), touches);
        }
        findings
    }
}
