//! Compressing once more what was compressed in haste, and taking attachments out of their base64.

use std::collections::HashSet;
use std::sync::Arc;

use crate::bodies::{Cut, Piece, pack_in_record};
use crate::format::dictionary::{Dictionary, DictionaryKind, DictionarySet};
use crate::format::frame::{BLOCK_RAW_BYTES, FrameInfo, Packer, Unpacker};
use crate::format::message::{BlockForm, MessageHead, MessageReader};
use crate::format::record::{RecordHeader, kind};
use crate::format::{FormatError, verify_checksum};
use crate::ids::Lsn;
use crate::read::{BLOCK, open_block, unpack_block};

/// A record whose frames have been compressed anew.
pub(super) enum Repacked {
    /// With `parts`, these take the place of the blocks that the head names.
    Message {
        header: RecordHeader,
        head: Box<MessageHead>,
        frames: Vec<u8>,
        parts: Vec<Part>,
    },
    Block {
        header: RecordHeader,
        packed: Packed,
    },
}

/// A frame.
pub(super) struct Packed {
    pub info: FrameInfo,
    pub stored: Vec<u8>,
}

/// A part of a body that becomes a block.
pub(super) struct Part {
    pub form: BlockForm,
    /// What base64 says, which other messages may have, too.
    pub content: Option<Content>,
    /// `None`: the content has been packed before.
    pub packed: Option<Packed>,
}

/// An attachment, or up to 240 KB of one.
pub(super) struct Content {
    /// Under a key of this run.
    pub hash: [u8; 32],
    pub bytes: Vec<u8>,
}

/// Takes records apart, verifies all of them, and compresses their frames again. It works off the worker.
pub(super) struct Repacker {
    unpacker: Unpacker,
    packer: Packer,
    key: [u8; 32],
    /// Contents that have been packed for the segment that is being written.
    known: HashSet<[u8; 32]>,
}

impl Repacker {
    /// `known` are the dictionaries that frames may name, `used` those to compress with.
    pub(super) fn new(known: &[Arc<Dictionary>], used: Option<Arc<DictionarySet>>, key: [u8; 32]) -> Self {
        let mut unpacker = Unpacker::default();
        known.iter().for_each(|dictionary| unpacker.add_dictionary(Arc::clone(dictionary)));
        let mut packer = Packer::for_compaction();
        packer.use_dictionaries(used);
        Self { unpacker, packer, key, known: HashSet::new() }
    }

    pub(super) fn knows_dictionary(&self, id: u32) -> bool {
        self.unpacker.knows_dictionary(id)
    }

    pub(super) fn learn(&mut self, dictionary: Arc<Dictionary>) {
        self.unpacker.add_dictionary(dictionary);
    }

    /// Forgets which contents have been packed: another segment begins.
    pub(super) fn forget_contents(&mut self) {
        self.known.clear();
    }

    pub(super) fn pack_content(&mut self, content: &[u8]) -> Packed {
        let mut stored = Vec::new();
        Packed { info: self.packer.pack(content, &mut stored), stored }
    }

    fn pack_part(&mut self, raw: &[u8]) -> Packed {
        let mut stored = Vec::new();
        Packed { info: self.packer.pack_as(DictionaryKind::Body, raw, &mut stored), stored }
    }

    /// `blocks` are the records of a message's blocks; without them these stay as they are.
    pub(super) fn repack(&mut self, record: &[u8], blocks: &[Vec<u8>], lsn: Lsn) -> Result<Repacked, FormatError> {
        let (header, payload) = RecordHeader::decode(record)?;
        if header.lsn != lsn {
            let detail = format!("LSN {}", header.lsn);
            return Err(FormatError::Misplaced { what: "record", detail });
        }
        if header.kind == kind::BLOCK {
            let (info, stored) = open_block(record, lsn)?;
            let mut raw = Vec::new();
            info.unpack_at_most(BLOCK_RAW_BYTES, BLOCK, stored, &mut self.unpacker, &mut raw)?;
            return Ok(Repacked::Block { header, packed: self.pack_part(&raw) });
        }
        let reader = MessageReader::new(payload)?;
        let head = &reader.head;
        let (mut digest, mut rest) = (Vec::new(), Vec::new());
        reader.digest(&mut self.unpacker, &mut digest)?;
        let (small, overflow) = digest.split_at(head.digest.raw_len as usize);
        let mut packed_prefix = Vec::new();
        reader.header_frame(&mut self.unpacker, &mut packed_prefix)?;
        rest.extend_from_slice(&packed_prefix[head.prefix_in_frame()..]);
        packed_prefix.truncate(head.prefix_in_frame());
        reader.body(&mut self.unpacker, &mut rest)?;
        let in_record = rest.len();
        for (reference, record) in head.blocks.iter().zip(blocks) {
            let (info, stored) = open_block(record, reference.lsn)?;
            unpack_block(reference, &info, stored, &mut self.unpacker, &mut rest)?;
        }
        let is_all_there = head.blocks.len() == blocks.len();
        if is_all_there {
            verify_checksum("message as received", head.rest_checksum, &rest)?;
        }
        let (header_bytes, body) = rest.split_at(head.header_in_frame());
        let has_whole_header = header_bytes.len() == head.header_octets as usize;
        let cut = (is_all_there && has_whole_header).then(|| Cut::at_base64(body)).filter(Cut::has_base64);
        let mut frames = Vec::with_capacity(payload.len());
        let mut head = head.clone();
        head.digest = self.packer.pack_as(DictionaryKind::Digest, small, &mut frames);
        head.digest_overflow = self.packer.pack(overflow, &mut frames);
        head.header = match &packed_prefix[..] {
            [] => self.packer.pack_as(DictionaryKind::Header, header_bytes, &mut frames),
            prefix => self.packer.pack_as(DictionaryKind::Header, &[prefix, header_bytes].concat(), &mut frames),
        };
        // A small message that lies in parts of which none is needed any more goes back into its record.
        let is_made_whole = cut.is_none() && is_all_there && rest.len() <= BLOCK_RAW_BYTES;
        if is_made_whole {
            head.blocks.clear();
        }
        let first = match &cut {
            Some(cut) => cut.in_record(),
            None if is_made_whole => body,
            None => &body[..in_record - header_bytes.len()],
        };
        (head.body, head.extents) = match first {
            [] => (FrameInfo::NONE, Vec::new()),
            first => pack_in_record(&mut self.packer, first, &mut frames),
        };
        let mut parts = Vec::new();
        if let Some(cut) = cut {
            cut.each_piece(|piece, form| parts.push(self.pack_piece(piece, form)));
        }
        Ok(Repacked::Message { header, head: Box::new(head), frames, parts })
    }

    fn pack_piece(&mut self, piece: Piece<'_>, form: BlockForm) -> Part {
        match piece {
            Piece::AsItIs(octets) => Part { form, content: None, packed: Some(self.pack_part(octets)) },
            Piece::Content(bytes) => {
                let hash = *blake3::keyed_hash(&self.key, &bytes).as_bytes();
                let packed = self.known.insert(hash).then(|| self.pack_content(&bytes));
                Part { form, content: Some(Content { hash, bytes }), packed }
            }
        }
    }
}
