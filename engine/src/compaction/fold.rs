//! What a run has to know before it writes: what its victims say, and which of that still holds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use roaring::RoaringBitmap;

use super::output::Output;
use super::{HEADS_PER_TURN, MESSAGES_PER_TURN, may_have_blocks};
use crate::accounts::AccountState;
use crate::error::{Damage, EngineError};
use crate::flags::{Flags, UidSet};
use crate::format::FormatError;
use crate::format::codec::{Input, Wire};
use crate::format::dictionary::Dictionary;
use crate::format::manifest::SegmentEntry;
use crate::format::message::{BlockReference, MessageReader};
use crate::format::record::{
    AccountBase, Base, MailboxChange, MessageStates, NamedValue, PlacedMessage, RECORD_HEADER_BYTES, Record,
    RecordHeader,
};
use crate::format::segment::{Footer, FooterEntry, SegmentHeader, TRAILER_BYTES, Trailer};
use crate::ids::{AccountId, Lsn, MailboxId, MessageId, ModSeq, Position, SegmentId, Uid};
use crate::index::{MailboxIndex, Message};
use crate::planted::{self, Bug};
use crate::recovery::{FoundSegment, SegmentSource, scan_segment};
use crate::shard::{Shard, ShardEvent};
use crate::slots::Meta;
use crate::storage::{BlobName, BlobStore, SegmentName, Storage, StorageError};

/// Messages, and sets of messages, that one base record speaks of: a batch has room for them.
const BASE_ITEMS_MAX: usize = 500_000;

/// Where a record lies: segment, and offset in units of 8 bytes.
pub(super) type Place = (SegmentId, u32);

/// What the victims say of a mailbox.
#[derive(Default)]
struct Touched {
    /// A record speaks of it that is not one of a message.
    needs_base: bool,
    /// UIDs that their own message records place, that are placed by reference, and whose flags were changed.
    placed: RoaringBitmap,
    copied: RoaringBitmap,
    flagged: RoaringBitmap,
}

/// A record that may have to be kept as it is.
pub(super) struct Carried {
    pub segment: SegmentId,
    pub offset: u64,
    pub len: u32,
    pub header: RecordHeader,
    what: Kept,
}

/// Until when a record is kept.
enum Kept {
    /// Until no older segment may have the mailbox.
    Deletion(MailboxId),
    /// Until a newer one says otherwise.
    Account(AccountId),
    UntilMs(u64),
    /// A newer program's.
    Always,
}

/// What the victims say.
pub(super) struct Victims {
    pub segments: BTreeMap<SegmentId, SegmentEntry>,
    /// Above those of all victims.
    pub generation: u32,
    /// All that their frames name.
    pub dictionaries: Vec<Arc<Dictionary>>,
    pub carried: Vec<Carried>,
    mailboxes: BTreeMap<MailboxId, Touched>,
    accounts: BTreeSet<AccountId>,
}

/// A message of a mailbox whose record is to be moved.
pub(super) struct Reference {
    pub mailbox: MailboxId,
    pub uid: Uid,
    pub flags: Flags,
    pub modseq: ModSeq,
    pub prefix_of: u16,
}

/// A message record that lives.
pub(super) struct Live {
    pub id: MessageId,
    pub len: u32,
    pub references: Vec<Reference>,
}

/// What lives of the victims.
#[derive(Default)]
pub(super) struct Sample {
    pub live: BTreeMap<Place, Live>,
    /// The same in the order in which they are to be written.
    pub order: Vec<Place>,
}

impl Sample {
    fn add(&mut self, message: &Message, reference: Reference) {
        let place = (message.location.segment, message.location.offset_units);
        let live = self.live.entry(place).or_insert_with(|| {
            self.order.push(place);
            Live { id: message.id, len: message.location.len, references: Vec::new() }
        });
        live.references.push(reference);
    }
}

impl Victims {
    fn take_in(&mut self, entry: SegmentEntry, found: FoundSegment) {
        for found in found.batches.into_iter().flat_map(|batch| batch.records) {
            let mut carry = |what| {
                let (offset, len, header) = (found.offset, found.len, found.header);
                self.carried.push(Carried { segment: entry.segment, offset, len, header, what });
            };
            let mailboxes = &mut self.mailboxes;
            match found.record {
                None => carry(Kept::Always),
                Some(Record::Message(head)) => {
                    for placement in head.placements.iter().filter(|placement| !placement.is_gone()) {
                        mailboxes.entry(placement.mailbox).or_default().placed.insert(placement.uid.0);
                    }
                }
                Some(Record::Placements(placements)) => {
                    touch(mailboxes, placements.mailbox).copied.extend(placements.items.iter().map(|item| item.uid.0));
                }
                Some(Record::Flags(change)) => touch(mailboxes, change.mailbox).flagged |= change.uids.0,
                Some(Record::Expunge(expunge)) => _ = touch(mailboxes, expunge.mailbox),
                Some(Record::Keyword(keyword)) => _ = touch(mailboxes, keyword.mailbox),
                Some(Record::Recent(recent)) => _ = touch(mailboxes, recent.mailbox),
                Some(Record::Base(base)) => {
                    let touched = touch(mailboxes, base.mailbox);
                    touched.copied.extend(base.placed.iter().map(|(_, item)| item.uid.0));
                    base.states.into_iter().for_each(|states| touched.flagged |= states.uids.0);
                }
                Some(Record::Mailbox(MailboxChange::Create { mailbox, account, .. })) => {
                    _ = touch(mailboxes, mailbox);
                    self.accounts.insert(account);
                }
                Some(Record::Mailbox(MailboxChange::Rename { mailbox, .. })) => _ = touch(mailboxes, mailbox),
                Some(Record::Mailbox(MailboxChange::Delete { mailbox })) => carry(Kept::Deletion(mailbox)),
                Some(Record::Subscription(subscription)) => _ = self.accounts.insert(subscription.account),
                Some(Record::Attribute(attribute)) => _ = self.accounts.insert(attribute.account),
                Some(Record::AccountBase(base)) => _ = self.accounts.insert(base.account),
                Some(Record::Account(account)) => carry(Kept::Account(account.account)),
                Some(Record::Receipt(receipt)) => carry(Kept::UntilMs(receipt.expires_ms)),
                // Blocks live with their messages; what a transaction did is known by what there is now.
                Some(Record::Block(_) | Record::Content(_) | Record::Commit(_)) => {}
            }
        }
        self.generation = self.generation.max(entry.generation + 1);
        self.segments.insert(entry.segment, entry);
    }
}

/// Notes that a record speaks of a mailbox that is not one of a message.
fn touch(mailboxes: &mut BTreeMap<MailboxId, Touched>, mailbox: MailboxId) -> &mut Touched {
    let touched = mailboxes.entry(mailbox).or_default();
    touched.needs_base = true;
    touched
}

impl<S: Storage> Shard<S> {
    /// Reads what segments say. Those that are damaged are left out, and not taken again; those that cannot be read now are left
    /// out of this run.
    ///
    /// # Errors
    /// Storage does not answer, and would not for the others.
    pub(super) async fn read_victims(&self, entries: Vec<SegmentEntry>) -> Result<Victims, EngineError> {
        let inner = &self.0;
        let mut victims = Victims {
            segments: BTreeMap::new(),
            generation: 1,
            dictionaries: Vec::new(),
            carried: Vec::new(),
            mailboxes: BTreeMap::new(),
            accounts: BTreeSet::new(),
        };
        for entry in entries {
            let name = SegmentName { segment: entry.segment, epoch: entry.epoch };
            let source = SegmentSource::<S>::new(&inner.wal, &inner.blobs, name, true).pausing(&inner.storage);
            let found = match scan_segment(&source, 0, entry.data_end).await {
                Ok(found) => found,
                Err(error @ StorageError::NotFound(_)) => {
                    self.leave_alone(entry.segment, error.into());
                    continue;
                }
                Err(error @ StorageError::NoAnswer { .. }) => return Err(error.into()),
                Err(error) => {
                    self.tell(ShardEvent::SegmentUnreadable(entry.segment, error.into()));
                    continue;
                }
            };
            if let Some(error) = damage_of(&found, &entry) {
                let position = Position { segment: entry.segment, offset: 0 };
                self.leave_alone(entry.segment, Damage { place: self.describe(position), error }.into());
                continue;
            }
            let dictionaries = self.dictionaries_of(entry.segment).await?;
            let is_new = |dictionary: &&Arc<Dictionary>| !victims.dictionaries.iter().any(|it| it.id == dictionary.id);
            let new: Vec<_> = dictionaries.iter().filter(is_new).cloned().collect();
            if victims.dictionaries.len() + new.len() > crate::format::segment::DICTIONARIES_MAX {
                // An unpacker keeps no more of them: its turn comes with the next run.
                continue;
            }
            victims.dictionaries.extend(new);
            victims.take_in(entry, found);
            self.pace(0).await;
        }
        Ok(victims)
    }

    /// Notes that a segment is damaged.
    pub(super) fn leave_alone(&self, segment: SegmentId, error: EngineError) {
        self.0.compaction.unfit.borrow_mut().insert(segment);
        self.tell(ShardEvent::SegmentDamaged(segment, error));
    }

    /// Looks into all mailboxes for what lives of the victims.
    ///
    /// Writes the base records of those of which the victims say more than which messages they have.
    pub(super) async fn sample(&self, victims: &Victims, output: &mut Output<S>) -> Result<Sample, EngineError> {
        let mut sample = Sample::default();
        let mut large: Vec<(Message, Reference)> = Vec::new();
        let untouched = Touched::default();
        let mut seen = 0;
        for (_, mailbox) in self.mailboxes_in_order().await {
            let touched = victims.mailboxes.get(&mailbox).unwrap_or(&untouched);
            // In one turn, so that mailbox and base record belong together.
            let looked = self.inspect(mailbox, |slot, index| {
                let mut found = Vec::new();
                for message in index.messages.iter() {
                    let is_in_victim = victims.segments.contains_key(&message.location.segment);
                    if is_in_victim || may_have_blocks(&message) {
                        let Message { uid, modseq, prefix_of, .. } = message;
                        let reference = Reference { mailbox, uid, flags: index.flags_of(uid), modseq, prefix_of };
                        found.push((message, reference, is_in_victim));
                    }
                }
                let dead = &touched.placed - index.uids().0;
                let as_of = self.published_up_to();
                let needs_base = touched.needs_base || !dead.is_empty();
                let bases = needs_base.then(|| bases_of(as_of, &slot.meta, index, touched, victims));
                (found, bases.unwrap_or_default(), index.messages.len())
            });
            let Some((found, bases, messages)) = looked.await? else { continue };
            for base in bases {
                self.write_base(&Record::Base(Box::new(base)), victims.generation, output).await?;
            }
            for (message, reference, is_in_victim) in found {
                if is_in_victim {
                    sample.add(&message, reference);
                } else {
                    large.push((message, reference));
                }
            }
            seen += messages + 16;
            if seen >= MESSAGES_PER_TURN {
                seen = 0;
                self.pace(0).await;
            }
        }
        // A message whose block has to move moves with it, since its record names the block.
        let mut moves: BTreeMap<Place, bool> = BTreeMap::new();
        for (number, (message, reference)) in large.into_iter().enumerate() {
            if number % HEADS_PER_TURN == HEADS_PER_TURN - 1 {
                self.pace(0).await;
            }
            let place = (message.location.segment, message.location.offset_units);
            let must_move = match moves.get(&place) {
                Some(&known) => known,
                None => {
                    let blocks = match self.blocks_of(&message, reference.mailbox).await {
                        Ok(blocks) => blocks,
                        // It cannot be read wherever its blocks are.
                        Err(EngineError::Damaged(_)) => Vec::new(),
                        Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => Vec::new(),
                        Err(error) => return Err(error),
                    };
                    let any = blocks.iter().any(|block| victims.segments.contains_key(&block.location.segment));
                    moves.insert(place, any);
                    any
                }
            };
            if must_move {
                sample.add(&message, reference);
            }
        }
        for account in &victims.accounts {
            let as_of = self.published_up_to();
            let known =
                self.0.state.borrow().accounts.get(account).map(|known| account_base_of(*account, as_of, &known));
            if let Some(base) = known {
                self.write_base(&Record::AccountBase(base), victims.generation, output).await?;
            }
        }
        Ok(sample)
    }

    /// Whether a record is still needed.
    pub(super) fn is_kept(&self, carried: &Carried, oldest: Lsn) -> bool {
        let state = self.0.state.borrow();
        match carried.what {
            Kept::Deletion(mailbox) => {
                let is_deleted = !state.slots.contains_key(&mailbox);
                is_deleted && oldest < carried.header.lsn && !planted::is_on(Bug::ForgetDeletions)
            }
            Kept::Account(account) => {
                state.directory.get(&account).is_some_and(|(as_of, _)| *as_of == carried.header.lsn)
            }
            Kept::UntilMs(until) => until > self.0.storage.wall_clock_ms(),
            Kept::Always => true,
        }
    }

    /// An LSN before which no segment but the victims has anything that may have been deleted.
    pub(super) async fn oldest_elsewhere(&self, victims: &Victims) -> Lsn {
        let inner = &self.0;
        let others: Vec<SegmentEntry> = {
            let log = inner.log.borrow();
            let entries = log.manifest.segments.iter().filter(|entry| !entry.is_retired());
            entries.filter(|entry| !victims.segments.contains_key(&entry.segment)).cloned().collect()
        };
        let mut oldest = Lsn(u64::MAX);
        for entry in others {
            let name = BlobName::Segment(SegmentName { segment: entry.segment, epoch: entry.epoch });
            // What cannot be read may be as old as can be.
            let since = self.oldest_in(name, entry.segment.is_compacted()).await.unwrap_or_default();
            oldest = oldest.min(since);
        }
        oldest
    }

    /// The LSN before which a segment has nothing that may have been deleted.
    async fn oldest_in(&self, name: BlobName, is_compacted: bool) -> Result<Lsn, EngineError> {
        let blobs = &self.0.blobs;
        if is_compacted {
            let header = blobs.get(name, 0, crate::format::BLOCK_BYTES as usize).await?;
            return Ok(SegmentHeader::decode_some(&header).map_or(Lsn::default(), |(header, _)| header.as_of));
        }
        let (suffix, len) = blobs.get_suffix(name, TRAILER_BYTES).await?;
        let Some(trailer) = Trailer::decode(&suffix, len).ok().filter(|trailer| trailer.count > 0) else {
            return Ok(Lsn::default());
        };
        let entry = blobs.get(name, trailer.data_end, Footer::len_of(1) as usize).await?;
        Ok(FooterEntry::take(&mut Input(&entry)).map_or(Lsn::default(), |entry| entry.lsn))
    }

    /// Where the blocks of a message lie.
    pub(super) async fn blocks_of(
        &self,
        message: &Message,
        mailbox: MailboxId,
    ) -> Result<Vec<BlockReference>, EngineError> {
        let location = message.location;
        let len = message.head_bytes.min(location.len) as usize;
        let bytes = self.read_segment(location.segment, location.offset(), len).await?;
        let reader = MessageReader::new(bytes.get(RECORD_HEADER_BYTES..).unwrap_or_default());
        let what = || format!("mailbox {mailbox} UID {}", message.uid);
        let reader = reader.map_err(|error| self.damaged(location, &what(), error))?;
        Ok(reader.head.blocks)
    }
}

/// What is wrong with a segment.
fn damage_of(found: &FoundSegment, entry: &SegmentEntry) -> Option<FormatError> {
    let header = found.header.as_ref().err().or(found.dictionary_errors.first());
    let mut batches = found.batches.iter().filter(|batch| !batch.is_good());
    let batch = batches.next().map(|batch| batch.errors.first().map_or(FormatError::Magic("batch"), |it| it.1.clone()));
    let end = found.batches.last().map_or(found.begun, |batch| batch.end);
    let short = FormatError::Short { what: "segment", needed: entry.data_end, available: end };
    header.cloned().or(batch).or((end < entry.data_end).then_some(short))
}

/// A mailbox's base records as of now: mostly one, more where it would not fit into a batch. Each has what all need.
fn bases_of(as_of: Lsn, meta: &Meta, index: &MailboxIndex, touched: &Touched, victims: &Victims) -> Vec<Base> {
    let live = index.uids();
    let of = |uid: u32| index.message(Uid(uid)).map(|message| (message, index.flags_of(Uid(uid))));
    let copied = &touched.copied & &live.0;
    let placed = copied.iter().filter_map(of);
    let placed = placed.map(|(message, flags)| (message.modseq, PlacedMessage::of_message(&message, flags)));
    // Those whose own records are written anew carry their flags themselves. One that a victim places may live in another copy.
    let carries_its_own = |message: &Message| {
        touched.placed.contains(message.uid.0) && victims.segments.contains_key(&message.location.segment)
    };
    let flagged = (&touched.flagged & &live.0) - &touched.copied;
    let mut states: BTreeMap<(ModSeq, u128), RoaringBitmap> = BTreeMap::new();
    for (message, flags) in flagged.iter().filter_map(of).filter(|(message, _)| !carries_its_own(message)) {
        states.entry((message.modseq, flags.0)).or_default().insert(message.uid.0);
    }
    if planted::is_on(Bug::FoldWithoutStates) {
        states.clear();
    }
    let states = states.into_iter().map(|((modseq, flags), uids)| MessageStates {
        flags: Flags(flags),
        modseq,
        uids: UidSet(uids),
    });
    let base = Base {
        mailbox: meta.mailbox,
        as_of,
        account: meta.account,
        name: meta.name.clone(),
        special_use: meta.special_use,
        uid_validity: meta.uid_validity,
        uid_next: Uid(meta.uid_next),
        highest_modseq: ModSeq(meta.highest_modseq),
        recent_below: Uid(meta.recent_below),
        keywords: index.keywords.clone(),
        placed: Vec::new(),
        states: Vec::new(),
        live: if planted::is_on(Bug::FoldWithoutLive) { UidSet::range(1..=meta.uid_next) } else { live },
        expunged: index.expunged.clone(),
        history_horizon: index.history_horizon,
    };
    let (placed, states): (Vec<_>, Vec<_>) = (placed.collect(), states.collect());
    let (mut placed, mut states) = (placed.chunks(BASE_ITEMS_MAX), states.chunks(BASE_ITEMS_MAX));
    let mut bases = Vec::new();
    loop {
        let (some, others) = (placed.next(), states.next());
        if some.is_none() && others.is_none() && !bases.is_empty() {
            return bases;
        }
        bases.push(Base {
            placed: some.map(<[_]>::to_vec).unwrap_or_default(),
            states: others.map(<[_]>::to_vec).unwrap_or_default(),
            ..base.clone()
        });
    }
}

fn account_base_of(account: AccountId, as_of: Lsn, known: &AccountState) -> AccountBase {
    let attributes = known.attributes.iter().map(|((mailbox, name), value)| NamedValue {
        mailbox: *mailbox,
        name: name.clone(),
        value: value.clone(),
    });
    AccountBase {
        account,
        as_of,
        uid_validity_next: known.uid_validity_next,
        subscriptions: known.subscriptions.iter().cloned().collect(),
        attributes: attributes.collect(),
    }
}
