//! Taking messages in: one record for any number of recipients of a shard.

use std::sync::Arc;

use crate::bodies::{Cut, Piece, pack_in_record};
use crate::error::{EngineError, Refusal};
use crate::flags::{Flags, KEYWORDS_MAX};
use crate::format::checksum;
use crate::format::dictionary::{DictionaryKind, DictionarySet};
use crate::format::frame::{BLOCK_RAW_BYTES, FrameInfo, HEADER_RAW_BYTES, Packer};
use crate::format::message::{
    BlockForm, BlockReference, Extent, MessageHead, PLACEMENTS_MAX, PREFIX_BYTES_MAX, Placement, Prefix,
};
use crate::format::record::{Keyword, Record};
use crate::ids::{AccountId, Lsn, MailboxId, ModSeq, Uid};
use crate::index::MESSAGES_MAX;
use crate::indexes::INDEXES_KEPT;
use crate::mailboxes::INBOX;
use crate::recent_blocks::RecordPlace;
use crate::shard::{Log, Shard};
use crate::slots::Slot;
use crate::storage::Storage;

/// A digest larger than this continues in an overflow frame.
const DIGEST_BYTES_MAX: usize = 64 << 10;

/// Blocks that are put into the log, or found there, before others have their turn.
const BLOCKS_PER_TURN: usize = 16;

/// A message parsed and compressed once, ready for any number of recipients in any shards.
pub struct Prepared {
    received_ms: u64,
    rest_octets: u64,
    rest_checksum: u32,
    /// See [`Flags::OPEN_ENDED`].
    open_ended: bool,
    header_octets: u32,
    /// Of the prefix that the header's frame begins with.
    prefix_octets: u16,
    digest: FrameInfo,
    digest_overflow: FrameInfo,
    header: FrameInfo,
    body: FrameInfo,
    /// What the body's frame and those of contents say.
    extents: Vec<Extent>,
    /// The stored bytes of all frames, one after another.
    frames: Vec<u8>,
    /// A body of more than 256 KB, with what comes before it of a header of more than 1 MB, in blocks.
    blocks: Vec<Block>,
    /// Those that frames or blocks name; the segment that they go to has to embed them.
    dictionaries: Option<Arc<DictionarySet>>,
}

/// A part of a body that gets a record of its own.
struct Block {
    form: BlockForm,
    /// What base64 says: other messages may have it, too.
    is_content: bool,
    info: FrameInfo,
    stored: Arc<[u8]>,
}

impl Block {
    fn pack(packer: &mut Packer, piece: &Piece<'_>, form: BlockForm) -> Self {
        let mut stored = Vec::new();
        let (info, is_content) = match piece {
            Piece::AsItIs(octets) => (packer.pack_as(DictionaryKind::Body, octets, &mut stored), false),
            Piece::Content(content) => (packer.pack(content, &mut stored), true),
        };
        Self { form, is_content, info, stored: stored.into() }
    }
}

impl Prepared {
    /// Compresses a message. `rest` is the message without the trace headers of any recipient, in CRLF form; its first
    /// `header_octets` are its header with the empty line that ends it; `digest` is stored as it is.
    ///
    /// This costs about 3 us per KB: run messages over 256 KB through [`Runtime::offload`].
    ///
    /// # Panics
    /// If `header_octets` is past the end of the message, or 4 GB or more.
    pub fn new(packer: &mut Packer, rest: &[u8], header_octets: usize, digest: &[u8], received_ms: u64) -> Self {
        Self::with_prefix(packer, b"", rest, header_octets, digest, received_ms)
    }

    /// As [`Prepared::new`], for a message that has one recipient: the trace headers, at most 8 KB, are compressed with the header, and
    /// no [`Target`] may have any.
    ///
    /// # Panics
    /// As [`Prepared::new`], and if the prefix is longer.
    pub fn with_prefix(
        packer: &mut Packer,
        prefix: &[u8],
        rest: &[u8],
        header_octets: usize,
        digest: &[u8],
        received_ms: u64,
    ) -> Self {
        assert!(prefix.len() <= PREFIX_BYTES_MAX, "a prefix of {} octets", prefix.len());
        let header_octets = u32::try_from(header_octets).expect("messages are shorter than 4 GB");
        // A record stays small also where the header is not: what its frame has no room for goes with the body.
        let (header_bytes, body_bytes) = rest.split_at(HEADER_RAW_BYTES.min(header_octets as usize));
        let mut frames = Vec::with_capacity(rest.len() / 2 + 256);
        let (small, overflow) = digest.split_at(digest.len().min(DIGEST_BYTES_MAX));
        let digest = packer.pack_as(DictionaryKind::Digest, small, &mut frames);
        let digest_overflow = packer.pack(overflow, &mut frames);
        let header = match prefix {
            [] => packer.pack_as(DictionaryKind::Header, header_bytes, &mut frames),
            prefix => packer.pack_as(DictionaryKind::Header, &[prefix, header_bytes].concat(), &mut frames),
        };
        let (mut body, mut extents, mut blocks) = (FrameInfo::NONE, Vec::new(), Vec::new());
        if body_bytes.len() <= BLOCK_RAW_BYTES {
            (body, extents) = pack_in_record(packer, body_bytes, &mut frames);
        } else {
            let has_whole_header = header_bytes.len() == header_octets as usize;
            let cut = if has_whole_header { Cut::at_base64(body_bytes) } else { Cut::anywhere(body_bytes) };
            if !cut.in_record().is_empty() {
                (body, extents) = pack_in_record(packer, cut.in_record(), &mut frames);
            }
            cut.each_piece(|piece, form| blocks.push(Block::pack(packer, &piece, form)));
        }
        let infos = [digest, header, body].into_iter().chain(blocks.iter().map(|block| block.info));
        let are_needed = infos.into_iter().any(|info| info.needs_dictionary().is_some());
        Self {
            dictionaries: packer.dictionaries().filter(|_| are_needed).cloned(),
            received_ms,
            rest_octets: rest.len() as u64,
            rest_checksum: checksum(rest),
            // Without any octet there is no line; a prefix ends its own.
            open_ended: !rest.is_empty() && !rest.ends_with(b"\r\n"),
            header_octets,
            prefix_octets: prefix.len() as u16,
            digest,
            digest_overflow,
            header,
            body,
            extents,
            frames,
            blocks,
        }
    }

    /// Octets without any prefix.
    pub fn octets(&self) -> u64 {
        self.rest_octets
    }

    /// Bytes that this takes in memory and, about, in the log.
    pub fn stored_bytes(&self) -> usize {
        self.frames.len() + self.blocks.iter().map(|block| block.stored.len()).sum::<usize>()
    }

    /// Octets, and what they take, by which one can tell whether dictionaries still fit: without a body that has attachments or
    /// blocks, since these need none, and may not have been written.
    fn octets_for_dictionaries(&self) -> (u64, u64) {
        if self.extents.is_empty() && self.blocks.is_empty() {
            return (self.rest_octets, self.frames.len() as u64);
        }
        let without_body = [self.digest, self.digest_overflow, self.header];
        let stored = without_body.iter().map(|info| u64::from(info.stored_len)).sum();
        (u64::from(self.header_octets).min(HEADER_RAW_BYTES as u64), stored)
    }
}

/// A flag by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlagName {
    Seen,
    Answered,
    Flagged,
    Deleted,
    Draft,
    Keyword(String),
}

/// Where a delivery goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetMailbox {
    /// The account's INBOX, created if it does not exist.
    Inbox,
    Id(MailboxId),
}

/// One recipient of a delivery.
#[derive(Clone, Debug)]
pub struct Target {
    pub account: AccountId,
    pub mailbox: TargetMailbox,
    /// Trace headers of this recipient, at most 8 KB; they stand before the message in this placement only.
    pub prefix: Vec<u8>,
    pub flags: Vec<FlagName>,
    /// Seconds since the Unix epoch, and the zone in minutes; now and UTC if absent.
    pub internal_date: Option<(i64, i16)>,
}

/// A message has become durable in a mailbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivered {
    pub mailbox: MailboxId,
    pub uid_validity: u32,
    pub uid: Uid,
}

impl<S: Storage> Shard<S> {
    /// Delivers one message to recipients of this shard. Durable and visible on return, for each `Ok`.
    ///
    /// # Errors
    /// Per recipient: no such mailbox, too many keywords, UIDs used up; or the shard cannot write, which goes for all.
    pub async fn deliver(&self, message: Arc<Prepared>, targets: Vec<Target>) -> Vec<Result<Delivered, EngineError>> {
        let mut results = Vec::with_capacity(targets.len());
        for group in groups_of(targets) {
            let count = group.len();
            match self.try_deliver(&message, group).await {
                Ok(delivered) => results.extend(delivered),
                Err(error) => results.extend(std::iter::repeat_n(Err(error), count)),
            }
        }
        results
    }

    async fn try_deliver(
        &self,
        message: &Prepared,
        targets: Vec<Target>,
    ) -> Result<Vec<Result<Delivered, EngineError>>, EngineError> {
        let limit = self.0.config.message_octets_max;
        if message.rest_octets > limit {
            return Err(Refusal::TooLarge { octets: message.rest_octets, limit }.into());
        }
        self.check_space().await?;
        let mut resolved = Vec::with_capacity(targets.len());
        for target in targets {
            let mailbox = match target.mailbox {
                TargetMailbox::Id(mailbox) => Ok(mailbox),
                TargetMailbox::Inbox => self.inbox(target.account).await,
            };
            resolved.push((target, mailbox));
        }
        let _keeps_blocks = (!message.blocks.is_empty()).then(|| self.delivering());
        let blocks = self.write_blocks(message).await?;
        let now_s = (self.0.storage.wall_clock_ms() / 1000) as i64;
        let (results, ticket) = loop {
            for (target, mailbox) in &mut resolved {
                if let Ok(id) = *mailbox
                    && has_keyword(&target.flags)
                {
                    *mailbox = self.load_index(id).await.map(|()| id);
                }
            }
            self.admit().await?;
            let mut state = self.0.state.borrow_mut();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let is_evicted = |mailbox| state.slots.get(mailbox).is_some_and(|slot| slot.index.is_none());
            let mut with_keywords = resolved.iter().filter(|(target, _)| has_keyword(&target.flags));
            if with_keywords.any(|(_, mailbox)| mailbox.as_ref().is_ok_and(is_evicted)) {
                continue;
            }
            let mut placements = Vec::with_capacity(resolved.len());
            let mut results = Vec::with_capacity(resolved.len());
            for (target, mailbox) in resolved {
                let placed = mailbox.and_then(|mailbox| {
                    let slot = state.slots.get_mut(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
                    self.place(slot, &mut log, message, target, now_s)
                });
                results.push(placed.map(|placement| {
                    let slot = state.slots.get(&placement.mailbox).expect("it has just been placed there");
                    let delivered = Delivered {
                        mailbox: placement.mailbox,
                        uid_validity: slot.meta.uid_validity,
                        uid: placement.uid,
                    };
                    placements.push(placement);
                    delivered
                }));
            }
            if placements.is_empty() {
                return Ok(results);
            }
            let lsn = log.next_lsn(self.0.epoch);
            let head = MessageHead {
                id: self.message_id(lsn),
                as_of: Lsn::default(),
                received_ms: message.received_ms,
                rest_octets: message.rest_octets,
                rest_checksum: message.rest_checksum,
                header_octets: message.header_octets,
                digest: message.digest,
                digest_overflow: message.digest_overflow,
                header: message.header,
                body: message.body,
                placements,
                blocks,
                extents: message.extents.clone(),
                contents: Vec::new(),
            };
            log.need(message.dictionaries.as_ref());
            log.push(lsn, 0, Record::Message(Box::new(head)), &[&message.frames]);
            break (results, self.ticket(&mut log));
        };
        ticket.committed().await?;
        if let Some(dictionaries) = self.0.dictionaries.get() {
            let (raw, stored) = message.octets_for_dictionaries();
            dictionaries.note(raw, stored);
        }
        Ok(results)
    }

    /// Allots UID and mod-sequence to a message in a mailbox.
    fn place(
        &self,
        slot: &mut Slot,
        log: &mut Log,
        message: &Prepared,
        target: Target,
        now_s: i64,
    ) -> Result<Placement, EngineError> {
        let mailbox = slot.meta.mailbox;
        if target.prefix.len() > PREFIX_BYTES_MAX {
            let (octets, limit) = (target.prefix.len() as u64, PREFIX_BYTES_MAX as u64);
            return Err(Refusal::TooLarge { octets, limit }.into());
        }
        if slot.tip().deleted {
            return Err(Refusal::NoSuchMailbox.into());
        }
        if slot.tip().uid_next == u32::MAX {
            return Err(Refusal::UidsExhausted.into());
        }
        self.check_messages(slot, 1)?;
        let mut flags = self.flag_bits(slot, log, &target.flags, true)?;
        if message.open_ended {
            flags = flags.with(Flags::OPEN_ENDED);
        }
        let tip = slot.tip();
        let uid = Uid(tip.uid_next);
        tip.uid_next += 1;
        tip.highest_modseq += 1;
        tip.pending += 1;
        let modseq = ModSeq(tip.highest_modseq);
        log.touched(mailbox);
        let (internal_date, zone_minutes) = target.internal_date.unwrap_or((now_s, 0));
        let prefix = match message.prefix_octets {
            0 => Prefix::Here(target.prefix),
            octets => {
                assert!(target.prefix.is_empty(), "a message has a prefix of its own, or its targets have");
                Prefix::InFrame(octets)
            }
        };
        Ok(Placement { mailbox, uid, modseq, flags, internal_date, zone_minutes, save_date: now_s, prefix })
    }

    /// Checks that a mailbox can take so many more messages. What is pending counts, pending expunges do not.
    pub(crate) fn check_messages(&self, slot: &Slot, more: usize) -> Result<(), Refusal> {
        let limit = self.0.config.mailbox_messages_max.min(MESSAGES_MAX);
        let pending = slot.tip.as_ref().map_or(0, |tip| tip.uid_next - slot.meta.uid_next);
        let messages = u64::from(slot.meta.exists) + u64::from(pending) + more as u64;
        if messages > u64::from(limit) { Err(Refusal::MailboxFull(limit)) } else { Ok(()) }
    }

    /// The bits of flags together: see [`Shard::bits_of`].
    pub(crate) fn flag_bits(
        &self,
        slot: &mut Slot,
        log: &mut Log,
        names: &[FlagName],
        allot: bool,
    ) -> Result<Flags, EngineError> {
        Ok(self.bits_of(slot, log, names, allot)?.into_iter().fold(Flags::NONE, Flags::with))
    }

    /// The bit of each flag, giving numbers to keywords that the mailbox does not have yet if `allot` is set; without it
    /// they have no bit. The index must be loaded if there are keywords among them.
    ///
    /// # Errors
    /// Too many keywords; then none of them has been given a number.
    pub(crate) fn bits_of(
        &self,
        slot: &mut Slot,
        log: &mut Log,
        names: &[FlagName],
        allot: bool,
    ) -> Result<Vec<Flags>, EngineError> {
        let mut bits = Vec::with_capacity(names.len());
        let mut new = Vec::new();
        for name in names {
            bits.push(match name {
                FlagName::Seen => Flags::SEEN,
                FlagName::Answered => Flags::ANSWERED,
                FlagName::Flagged => Flags::FLAGGED,
                FlagName::Deleted => Flags::DELETED,
                FlagName::Draft => Flags::DRAFT,
                FlagName::Keyword(name) => keyword_bit(slot, &mut new, name, allot)?,
            });
        }
        let mailbox = slot.meta.mailbox;
        for (number, name) in new {
            let tip = slot.tip();
            tip.keywords.push((number, name.clone()));
            tip.pending += 1;
            log.touched(mailbox);
            let lsn = log.next_lsn(self.0.epoch);
            log.push(lsn, 0, Record::Keyword(Keyword { mailbox, number, name }), &[]);
        }
        Ok(bits)
    }

    /// The account's INBOX, made if it does not exist.
    pub async fn inbox(&self, account: AccountId) -> Result<MailboxId, EngineError> {
        if let Some(inbox) = self.mailbox(account, INBOX) {
            return Ok(inbox);
        }
        match self.create_mailbox(account, INBOX, 0).await {
            // Somebody else was faster.
            Err(EngineError::Refused(Refusal::MailboxExists)) => {
                self.mailbox(account, INBOX).ok_or(Refusal::NoSuchMailbox.into())
            }
            other => other,
        }
    }

    /// Whether the account's INBOX can take no more messages, as far as is known now. It stays at rest if it is.
    pub fn is_inbox_full(&self, account: AccountId) -> bool {
        let Some(inbox) = self.mailbox(account, INBOX) else { return false };
        let state = self.0.state.borrow();
        state.slots.get(&inbox).is_some_and(|slot| self.check_messages(&slot, 1).is_err())
    }

    /// Makes the blocks of a large body durable, so that the message record can name them. Contents that the active segment
    /// has already are not written again; [`Shard::delivering`] keeps them.
    async fn write_blocks(&self, message: &Prepared) -> Result<Vec<BlockReference>, EngineError> {
        let (mut places, mut tickets) = (Vec::with_capacity(message.blocks.len()), Vec::new());
        for (number, block) in message.blocks.iter().enumerate() {
            if number % BLOCKS_PER_TURN == BLOCKS_PER_TURN - 1 {
                self.0.storage.yield_now().await;
            }
            // The lock is given in the order of asking.
            let _turn = self.0.bulk_turn.lock().await;
            self.admit_bulk().await?;
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            // Of known ones alone the last is written again: the answer takes as many commits as if none were known, and
            // does not tell that others have had them.
            let is_silent = tickets.is_empty() && number + 1 == message.blocks.len();
            let known = if is_silent { None } else { self.known_block(&log, block) };
            let (lsn, place) = match known {
                Some(known) => known,
                None => self.push_block(&mut log, message, block),
            };
            if place.get().is_none() {
                // Its batch is this one, or that before it: if that fails, so does this.
                tickets.push(self.ticket(&mut log));
            }
            places.push((lsn, place, block.form));
        }
        for ticket in tickets {
            ticket.committed().await?;
        }
        let reference = |(lsn, place, form): (Lsn, RecordPlace, BlockForm)| {
            let location = place.get().expect("a batch tells places before its tickets");
            BlockReference { lsn, location, form }
        };
        Ok(places.into_iter().map(reference).collect())
    }

    /// A content that has been written to the active segment, or is about to be.
    fn known_block(&self, log: &Log, block: &Block) -> Option<(Lsn, RecordPlace)> {
        let active = log.active.as_ref().map(|active| active.name.segment);
        let recent = self.0.recent_blocks.borrow();
        let (lsn, place) = recent.find(&block.info, &block.stored).filter(|_| block.is_content)?;
        let is_active = place.get().is_none_or(|location| Some(location.segment) == active);
        is_active.then_some((lsn, place))
    }

    fn push_block(&self, log: &mut Log, message: &Prepared, block: &Block) -> (Lsn, RecordPlace) {
        let lsn = log.next_lsn(self.0.epoch);
        log.need(message.dictionaries.as_ref());
        let in_batch = log.push(lsn, 0, Record::Block(block.info), &[&block.stored]);
        let place = RecordPlace::default();
        log.note_bulk(in_batch);
        log.tell_place(in_batch, &place);
        if block.is_content {
            self.0.recent_blocks.borrow_mut().keep(block.info, &block.stored, lsn, &place);
        }
        (lsn, place)
    }
}

/// The bit of a keyword that the mailbox has, will have by its tip, or gets: then it is added to `new`.
fn keyword_bit(slot: &Slot, new: &mut Vec<(u16, String)>, name: &str, allot: bool) -> Result<Flags, EngineError> {
    let index = slot.index.as_ref().ok_or(Refusal::NoSuchMailbox)?;
    if let Some(number) = index.keyword_number(name) {
        return Ok(Flags::keyword(number));
    }
    let pending = slot.tip.iter().flat_map(|tip| &tip.keywords);
    let unpublished = || pending.clone().chain(new.iter());
    if let Some((number, _)) = unpublished().find(|(_, keyword)| keyword.eq_ignore_ascii_case(name)) {
        return Ok(Flags::keyword(*number as usize));
    }
    if !allot {
        return Ok(Flags::NONE);
    }
    let number = unpublished().map(|(number, _)| *number as usize + 1).max().unwrap_or(0).max(index.keywords_end());
    if number >= KEYWORDS_MAX {
        return Err(Refusal::TooManyKeywords(KEYWORDS_MAX).into());
    }
    new.push((number as u16, name.to_owned()));
    Ok(Flags::keyword(number))
}

/// Targets in groups whose keywords can be looked up together: almost always all of them. Each group takes a record.
fn groups_of(targets: Vec<Target>) -> Vec<Vec<Target>> {
    let mut groups = vec![Vec::new()];
    let mut indexes = 0;
    for target in targets {
        if has_keyword(&target.flags) {
            indexes += 1;
        }
        let is_full = groups.last().is_some_and(|group| group.len() >= PLACEMENTS_MAX);
        if indexes > INDEXES_KEPT || is_full {
            groups.push(Vec::new());
            indexes = usize::from(has_keyword(&target.flags));
        }
        if let Some(group) = groups.last_mut() {
            group.push(target);
        }
    }
    groups
}

fn has_keyword(flags: &[FlagName]) -> bool {
    flags.iter().any(|flag| matches!(flag, FlagName::Keyword(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An index names a placement of a record by 16 bits.
    #[test]
    fn a_record_has_no_more_placements_than_can_be_named() {
        let target = |number| Target {
            account: AccountId(number),
            mailbox: TargetMailbox::Inbox,
            prefix: Vec::new(),
            flags: Vec::new(),
            internal_date: None,
        };
        let groups = groups_of((0..70_000).map(target).collect());
        let sizes: Vec<usize> = groups.iter().map(Vec::len).collect();
        assert_eq!(sizes, [65_536, 4_464]);
        let accounts = groups.iter().flatten().map(|target| target.account.0);
        assert!(accounts.eq(0..70_000), "in order");
    }
}
