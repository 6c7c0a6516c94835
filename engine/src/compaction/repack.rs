//! Compressing once more what was compressed in haste.

use std::sync::Arc;

use crate::format::dictionary::{Dictionary, DictionaryKind, DictionarySet};
use crate::format::frame::{FrameInfo, Packer, Unpacker};
use crate::format::message::{MessageHead, MessageReader};
use crate::format::record::{RecordHeader, kind};
use crate::format::{FormatError, verify_checksum};
use crate::ids::Lsn;
use crate::read::{BLOCK, open_block};

/// A record whose frames have been compressed anew.
pub(super) enum Repacked {
    Message { header: RecordHeader, head: Box<MessageHead>, frames: Vec<u8> },
    Block { header: RecordHeader, info: FrameInfo, frame: Vec<u8> },
}

/// Takes records apart, verifies all of them, and compresses their frames again. It works off the worker.
pub(super) struct Repacker {
    unpacker: Unpacker,
    packer: Packer,
}

impl Repacker {
    /// `known` are the dictionaries that frames may name, `used` those to compress with.
    pub(super) fn new(known: &[Arc<Dictionary>], used: Option<Arc<DictionarySet>>) -> Self {
        let mut unpacker = Unpacker::default();
        known.iter().for_each(|dictionary| unpacker.add_dictionary(Arc::clone(dictionary)));
        let mut packer = Packer::for_compaction();
        packer.use_dictionaries(used);
        Self { unpacker, packer }
    }

    pub(super) fn repack(&mut self, record: &[u8], lsn: Lsn) -> Result<Repacked, FormatError> {
        let (header, payload) = RecordHeader::decode(record)?;
        if header.lsn != lsn {
            let detail = format!("LSN {}", header.lsn);
            return Err(FormatError::Misplaced { what: "record", detail });
        }
        if header.kind == kind::BLOCK {
            let (info, stored) = open_block(record, lsn)?;
            let mut raw = Vec::new();
            info.unpack(BLOCK, stored, &mut self.unpacker, &mut raw)?;
            let mut frame = Vec::new();
            let info = self.packer.pack_as(DictionaryKind::Body, &raw, &mut frame);
            return Ok(Repacked::Block { header, info, frame });
        }
        let reader = MessageReader::new(payload)?;
        let head = &reader.head;
        let (mut digest, mut rest) = (Vec::new(), Vec::new());
        reader.digest(&mut self.unpacker, &mut digest)?;
        let (small, overflow) = digest.split_at(head.digest.raw_len as usize);
        reader.header(&mut self.unpacker, &mut rest)?;
        reader.body(&mut self.unpacker, &mut rest)?;
        if head.blocks.is_empty() && head.extents.is_empty() {
            verify_checksum("message as received", head.rest_checksum, &rest)?;
        }
        let (header_bytes, body) = rest.split_at(head.header.raw_len as usize);
        let mut frames = Vec::with_capacity(payload.len());
        let mut head = head.clone();
        head.digest = self.packer.pack_as(DictionaryKind::Digest, small, &mut frames);
        head.digest_overflow = self.packer.pack(overflow, &mut frames);
        head.header = self.packer.pack_as(DictionaryKind::Header, header_bytes, &mut frames);
        head.body = if body.is_empty() {
            FrameInfo::NONE
        } else {
            self.packer.pack_as(DictionaryKind::Body, body, &mut frames)
        };
        Ok(Repacked::Message { header, head: Box::new(head), frames })
    }
}
