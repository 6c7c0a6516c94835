//! The state of a shard: what its log amounts to. [`State::apply`] takes records in the order of their LSNs, from a
//! commit or from replay alike, and ignores what it already knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;
use std::sync::Arc;

use crate::accounts::Accounts;
use crate::format::batch::Touch;
use crate::format::message::MessageHead;
use crate::format::page::DirectoryAccount;
use crate::format::record::{AccountBase, AccountRecord, Base, MailboxChange, PlacedMessage, Record, kind};
use crate::ids::{AccountId, Location, Lsn, MailboxId, MessageId, ModSeq, SegmentId, ShardId};
use crate::index::{Change, MailboxIndex, Message};
use crate::planted::{self, Bug};
use crate::receipts::Receipts;
use crate::slots::{Meta, Slot, SlotRef, Slots};

/// UIDs that one batch can give: each takes more than 32 bytes of it.
const UIDS_PER_BATCH_MAX: u32 = (crate::format::batch::BATCH_BYTES_MAX / 32) as u32;

/// A transaction that does not count, because damage has taken some of its records.
#[derive(Debug)]
pub struct DroppedTransaction {
    /// Of its first record that could be read.
    pub place: Location,
    pub records: usize,
    pub touches: Vec<Touch>,
}

/// The published state of a shard.
#[derive(Debug, Default)]
pub struct State {
    pub shard: ShardId,
    /// Everything up to here is published.
    pub as_of: Lsn,
    pub slots: Slots,
    pub accounts: Accounts,
    /// Mailboxes deleted since the last checkpoint's full directory: entries that say so must follow older ones.
    pub deleted: BTreeMap<MailboxId, Lsn>,
    /// Shard 0 only: account records.
    pub directory: BTreeMap<AccountId, (Lsn, Arc<AccountRecord>)>,
    /// Account records that the checkpoint does not have.
    pub directory_changed: BTreeSet<AccountId>,
    /// Records of transactions that have not been closed.
    pub(crate) open: BTreeMap<u64, Vec<(Lsn, Record, Location)>>,
    /// Transactions that damage has made incomplete.
    pub dropped: Vec<DroppedTransaction>,
    pub receipts: Receipts,
    /// Octets of messages that have been expunged or deleted with their mailboxes since the start.
    pub deleted_octets: u64,
    /// Where compaction has just moved message records: what was copied from where they were lies where they are.
    pub forwarding: Option<Rc<Forwarding>>,
    /// Segments that compaction is about to replace, and the messages that were placed by reference to them meanwhile.
    pub watched: Option<(BTreeSet<SegmentId>, Vec<NewReference>)>,
    /// While a whole log is replayed: where the records lie that compaction has moved.
    pub relocated: BTreeMap<MessageId, Vec<Relocated>>,
    /// While a whole log is replayed: its segments.
    pub segments: BTreeSet<SegmentId>,
    /// Mailboxes whose changes are not all there, since compaction has folded some: their counters are to be counted anew.
    pub(crate) folded: BTreeSet<MailboxId>,
}

/// A message that has been placed by reference while its record was about to be moved.
#[derive(Clone, Copy, Debug)]
pub struct NewReference {
    pub mailbox: MailboxId,
    pub message: Message,
}

impl NewReference {
    /// Segment, and offset in units of 8 bytes.
    pub fn place(&self) -> (SegmentId, u32) {
        (self.message.location.segment, self.message.location.offset_units)
    }
}

/// A message record that compaction has written.
#[derive(Clone, Debug)]
pub struct Relocated {
    generation: u32,
    location: Location,
    head_bytes: u32,
    /// Numbers of prefixes that it does not have any more.
    lost: Vec<u16>,
}

impl Relocated {
    pub fn new(generation: u32, location: Location, head: &MessageHead) -> Self {
        let numbered = (0_u16..).zip(&head.placements);
        let lost = numbered.filter(|(_, placement)| placement.has_lost_prefix()).map(|(number, _)| number);
        Self { generation, location, head_bytes: head_bytes(head), lost: lost.collect() }
    }
}

/// By segment and offset, in units of 8 bytes, where records lie now, and how long each is up to the end of its header frame.
pub type Forwarding = HashMap<(SegmentId, u32), (Location, u32)>;

impl State {
    /// Whether a transaction is open, so that no checkpoint may be taken.
    pub fn has_open_transaction(&self) -> bool {
        !self.open.is_empty()
    }

    /// Applies the next record of the log.
    pub fn apply(&mut self, lsn: Lsn, transaction: u64, record: Record, location: Location) {
        if let Record::Commit(commit) = &record {
            let transaction = commit.transaction;
            let held = self.open.remove(&transaction).unwrap_or_default();
            // Damage may have taken some of its records: then none of it counts, or half a MOVE would lose messages.
            if held.len() == commit.records as usize {
                for (lsn, record, location) in held {
                    self.apply_now(lsn, record, location);
                }
            } else {
                self.drop_transaction(held);
            }
        } else if transaction != 0 {
            self.open.entry(transaction).or_default().push((lsn, record, location));
            return;
        } else {
            self.apply_now(lsn, record, location);
        }
        self.as_of = self.as_of.max(lsn);
    }

    /// Gives up transactions whose commit record is not there.
    pub fn drop_open_transactions(&mut self) {
        for held in std::mem::take(&mut self.open).into_values() {
            self.drop_transaction(held);
        }
    }

    /// Its records do not count although they could be read.
    fn drop_transaction(&mut self, held: Vec<(Lsn, Record, Location)>) {
        let Some(&(_, _, place)) = held.first() else { return };
        let mut dropped = DroppedTransaction { place, records: held.len(), touches: Vec::new() };
        for (lsn, record, _) in held {
            let kind = record.kind();
            record.touches(&mut |mailbox, first, last| {
                let touch = Touch { mailbox, first, last, lsn, kind };
                self.lose(&touch);
                dropped.touches.push(touch);
            });
            self.raise(&record);
        }
        self.dropped.push(dropped);
    }

    /// Moves the counters of a mailbox past what a record has given, whether or not it counts.
    fn raise(&mut self, record: &Record) {
        let (mailbox, modseq, uid_next) = match record {
            Record::Placements(placements) => {
                let last = placements.items.last().map_or(0, |item| item.uid.0);
                (placements.mailbox, placements.modseq, last.saturating_add(1))
            }
            Record::Flags(change) => (change.mailbox, change.modseq, 0),
            Record::Expunge(expunge) => (expunge.mailbox, expunge.modseq, 0),
            _ => return,
        };
        if let Some(slot) = self.slots.get_mut(&mailbox) {
            slot.meta.highest_modseq = slot.meta.highest_modseq.max(modseq.0);
            slot.meta.uid_next = slot.meta.uid_next.max(uid_next);
            slot.dirty = true;
        }
    }

    /// Damage has taken a record. What it gave - UIDs, a mod-sequence, a UIDVALIDITY - is never given again, and messages
    /// of a mailbox that it made stay within reach.
    pub fn lose(&mut self, touch: &Touch) {
        if let Some(account) = touch.account() {
            self.recover_mailbox(touch, account);
        }
        let Some(slot) = self.slots.get_mut(&touch.mailbox) else { return };
        if touch.lsn <= slot.meta.as_of {
            return;
        }
        if matches!(touch.kind, kind::MESSAGE | kind::PLACEMENTS)
            && let Some((_, last)) = touch.uids()
        {
            // No batch gives more; a table that says so is mail that looks like one.
            let most = slot.meta.uid_next.saturating_add(UIDS_PER_BATCH_MAX);
            slot.meta.uid_next = slot.meta.uid_next.max(last.saturating_add(1).min(most));
        }
        slot.meta.highest_modseq += 1;
        slot.dirty = true;
    }

    /// Damage has taken at most `records` records that nothing names.
    pub fn lose_unnamed(&mut self, records: u64) {
        let records = u32::try_from(records).unwrap_or(u32::MAX);
        for (_, slot) in self.slots.all_mut() {
            slot.meta.uid_next = slot.meta.uid_next.saturating_add(records);
            slot.meta.highest_modseq += u64::from(records);
            slot.dirty = true;
        }
        for account in self.accounts.all_mut() {
            account.uid_validity_next = account.uid_validity_next.saturating_add(records);
            account.dirty = true;
        }
    }

    /// Gives mailboxes whose name another has taken one of their own: damage has taken the record that renamed them.
    pub fn name_the_nameless(&mut self) {
        let slots = self.slots.iter();
        let is_nameless = |(mailbox, slot): &(MailboxId, SlotRef<'_>)| {
            self.accounts.mailbox(slot.meta.account, &slot.meta.name) != Some(*mailbox)
        };
        let nameless: Vec<MailboxId> = slots.filter(is_nameless).map(|(mailbox, _)| mailbox).collect();
        for mailbox in nameless {
            let Some(slot) = self.slots.get_mut(&mailbox) else { continue };
            slot.meta.name = recovered_name(mailbox);
            slot.dirty = true;
            let account = self.accounts.get_or_default(slot.meta.account);
            account.mailboxes.insert(slot.meta.name.clone(), mailbox);
        }
    }

    /// Makes a mailbox whose creation was lost, under a name of its own.
    fn recover_mailbox(&mut self, touch: &Touch, account: AccountId) {
        let mailbox = touch.mailbox;
        let uid_validity = self.accounts.get(&account).map_or(1, |account| account.uid_validity_next.max(1));
        let name = recovered_name(mailbox);
        let create = MailboxChange::Create { mailbox, account, name, uid_validity, special_use: 0 };
        self.change_structure(touch.lsn, create);
    }

    fn apply_now(&mut self, lsn: Lsn, record: Record, location: Location) {
        match record {
            Record::Message(head) => self.place_message(lsn, &head, location),
            Record::Placements(placements) => {
                if planted::is_on(Bug::LoseMoveTarget) && placements.items.len() == 1 {
                    return;
                }
                let mut items = placements.items;
                self.note_references(placements.mailbox, &items);
                items.iter_mut().for_each(|item| self.forward(item));
                let changes = items
                    .iter()
                    .map(|item| Change::Place { message: item.to_message(placements.modseq), flags: item.flags });
                self.change_mailbox(lsn, placements.mailbox, changes);
            }
            Record::Flags(change) => self.change_mailbox(lsn, change.mailbox, [Change::Flags(change)]),
            Record::Expunge(expunge) => {
                self.deleted_octets += expunge.size;
                self.change_mailbox(lsn, expunge.mailbox, [Change::Expunge(expunge)]);
            }
            Record::Keyword(keyword) => {
                let change = Change::Keyword { number: keyword.number, name: keyword.name };
                self.change_mailbox(lsn, keyword.mailbox, [change]);
            }
            Record::Recent(recent) => {
                if let Some(slot) = self.slots.get_mut(&recent.mailbox)
                    && lsn > slot.meta.as_of
                {
                    slot.meta.recent_below = slot.meta.recent_below.max(recent.below.0);
                    slot.meta.as_of = lsn;
                    slot.dirty = true;
                }
            }
            Record::Mailbox(change) => self.change_structure(lsn, change),
            Record::Subscription(subscription) => {
                let account = self.accounts.get_or_default(subscription.account);
                if lsn > account.as_of {
                    if subscription.subscribed {
                        account.subscriptions.insert(subscription.name);
                    } else {
                        account.subscriptions.remove(&subscription.name);
                    }
                    account.as_of = lsn;
                    account.dirty = true;
                }
            }
            Record::Attribute(attribute) => {
                let account = self.accounts.get_or_default(attribute.account);
                if lsn > account.as_of {
                    let key = (attribute.mailbox, attribute.name);
                    if attribute.value.is_empty() {
                        account.attributes.remove(&key);
                    } else {
                        account.attributes.insert(key, attribute.value);
                    }
                    account.as_of = lsn;
                    account.dirty = true;
                }
            }
            Record::Account(record) => {
                if self.directory.get(&record.account).is_none_or(|(as_of, _)| lsn > *as_of) {
                    self.directory_changed.insert(record.account);
                    self.directory.insert(record.account, (lsn, Arc::new(record)));
                }
            }
            Record::Receipt(receipt) => self.receipts.insert(receipt),
            // Blocks and contents are found through what refers to them.
            Record::Block(_) | Record::Content(_) | Record::Commit(_) => {}
            Record::Base(base) => self.apply_base(base),
            Record::AccountBase(base) => self.apply_account_base(base),
        }
    }

    fn note_references(&mut self, mailbox: MailboxId, items: &[PlacedMessage]) {
        let Some((segments, references)) = &mut self.watched else { return };
        if planted::is_on(Bug::ForgetPendingCopies) {
            return;
        }
        // Large messages may have blocks there.
        let concerns = |item: &&PlacedMessage| {
            segments.contains(&item.location.segment) || item.size > crate::format::frame::BLOCK_RAW_BYTES as u64
        };
        references.extend(items.iter().filter(concerns).map(|item| {
            let message = item.to_message(ModSeq(0));
            NewReference { mailbox, message }
        }));
    }

    /// Tells a mailbox where records of its messages lie now.
    pub fn relocate(&mut self, mailbox: MailboxId, change: Change) {
        let Some(slot) = self.slots.get_mut(&mailbox) else { return };
        if let Some(index) = &mut slot.index {
            index.apply(&change);
        }
        slot.push_change(slot.meta.as_of, change);
        slot.dirty = true;
    }

    /// Lets a message that is placed by reference lie where compaction has moved it.
    fn forward(&self, item: &mut PlacedMessage) {
        let place = (item.location.segment, item.location.offset_units);
        let moved = self.forwarding.as_ref().and_then(|forwarding| forwarding.get(&place));
        if let Some(&(location, head_bytes)) = moved.filter(|_| !planted::is_on(Bug::ForgetPendingCopies)) {
            (item.location, item.head_bytes) = (location, head_bytes);
        }
        let candidates = self.relocated.get(&item.message).into_iter().flatten();
        let best = candidates.max_by_key(|it| (!it.lost.contains(&item.prefix_of), it.generation));
        // A record that has been moved may be where it was, too, but its blocks need not be.
        if let Some(best) = best
            && (!best.lost.contains(&item.prefix_of) || !self.segments.contains(&item.location.segment))
        {
            (item.location, item.head_bytes) = (best.location, best.head_bytes);
        }
    }

    /// Applies a record into which compaction has folded the changes up to an LSN. Such records come after all others up to
    /// then, and only where a whole log is replayed.
    pub fn apply_folded(&mut self, lsn: Lsn, record: Record, location: Location) {
        match record {
            Record::Message(head) => self.fold_message(lsn, &head, location),
            record => self.apply_now(lsn, record, location),
        }
        self.as_of = self.as_of.max(lsn);
    }

    fn fold_message(&mut self, lsn: Lsn, head: &MessageHead, location: Location) {
        let head_bytes = head_bytes(head);
        for (number, placement) in head.placements.iter().enumerate() {
            let Some(slot) = self.slots.get_mut(&placement.mailbox) else { continue };
            let message = placed_message(head, number, location, head_bytes);
            slot.meta.uid_next = slot.meta.uid_next.max(message.uid.0.saturating_add(1));
            slot.meta.highest_modseq = slot.meta.highest_modseq.max(message.modseq.0);
            slot.push_change(lsn, Change::Fold { message, flags: placement.flags });
            slot.meta.as_of = slot.meta.as_of.max(lsn);
            slot.dirty = true;
            self.folded.insert(placement.mailbox);
        }
    }

    /// Makes the mailbox of a base record, as the record that made it may be gone: whatever else there is of it has its place
    /// then. To be called for all of them before a whole log is replayed.
    pub fn expect_base(&mut self, base: &Base) {
        let Base { mailbox, account, ref name, uid_validity, special_use, .. } = *base;
        let create = MailboxChange::Create { mailbox, account, name: name.clone(), uid_validity, special_use };
        self.change_structure(Lsn::default(), create);
    }

    /// As [`State::expect_base`], of what an old index says.
    pub(crate) fn expect_mailbox(&mut self, meta: &Meta) {
        let Meta { mailbox, account, ref name, uid_validity, special_use, .. } = *meta;
        let create = MailboxChange::Create { mailbox, account, name: name.clone(), uid_validity, special_use };
        self.change_structure(Lsn::default(), create);
    }

    /// Takes over what an old index knows to have been given and the log has lost to damage: nothing is given again, and what
    /// clients know mailboxes by stays as it is. Where the log is whole this changes nothing.
    pub(crate) fn keep_what_was_given(&mut self, known: Self) {
        for (mailbox, old) in known.slots.iter() {
            let Some(slot) = self.slots.get_mut(&mailbox) else { continue };
            let (meta, old) = (&mut slot.meta, &old.meta);
            meta.uid_validity = old.uid_validity;
            meta.uid_next = meta.uid_next.max(old.uid_next);
            meta.highest_modseq = meta.highest_modseq.max(old.highest_modseq);
            meta.recent_below = meta.recent_below.max(old.recent_below);
            let Some(account) = self.accounts.get_mut(&meta.account) else { continue };
            let is_free = !account.mailboxes.contains_key(&old.name);
            if meta.name == recovered_name(mailbox) && is_free {
                account.mailboxes.remove(&meta.name);
                account.mailboxes.insert(old.name.clone(), mailbox);
                meta.name.clone_from(&old.name);
            }
        }
        for (id, old) in known.accounts.iter() {
            let account = self.accounts.get_or_default(id);
            account.uid_validity_next = account.uid_validity_next.max(old.uid_validity_next);
            if old.as_of > account.as_of {
                account.as_of = old.as_of;
                account.subscriptions.clone_from(&old.subscriptions);
                account.attributes.clone_from(&old.attributes);
            }
        }
        for (id, (as_of, record)) in known.directory {
            if self.directory.get(&id).is_none_or(|(newer, _)| as_of > *newer) {
                self.directory_changed.insert(id);
                self.directory.insert(id, (as_of, record));
            }
        }
    }

    fn apply_base(&mut self, mut base: Box<Base>) {
        base.placed.iter_mut().for_each(|(_, item)| self.forward(item));
        let Some(slot) = self.slots.get_mut(&base.mailbox) else { return };
        let account = self.accounts.get_or_default(base.account);
        account.uid_validity_next = account.uid_validity_next.max(base.uid_validity.saturating_add(1));
        account.dirty = true;
        if account.mailboxes.get(&slot.meta.name) == Some(&base.mailbox) {
            account.mailboxes.remove(&slot.meta.name);
        }
        account.mailboxes.insert(base.name.clone(), base.mailbox);
        let meta = &mut slot.meta;
        meta.name.clone_from(&base.name);
        (meta.account, meta.uid_validity, meta.special_use) = (base.account, base.uid_validity, base.special_use);
        meta.uid_next = meta.uid_next.max(base.uid_next.0);
        meta.highest_modseq = meta.highest_modseq.max(base.highest_modseq.0);
        meta.recent_below = meta.recent_below.max(base.recent_below.0);
        meta.as_of = meta.as_of.max(base.as_of);
        slot.dirty = true;
        self.folded.insert(base.mailbox);
        // It says no more than any page that is written after it.
        slot.push_change(Lsn::default(), Change::Base(base));
    }

    fn apply_account_base(&mut self, base: AccountBase) {
        let account = self.accounts.get_or_default(base.account);
        account.uid_validity_next = account.uid_validity_next.max(base.uid_validity_next);
        account.subscriptions = base.subscriptions.into_iter().collect();
        let attributes = base.attributes.into_iter().map(|named| ((named.mailbox, named.name), named.value));
        account.attributes = attributes.collect();
        account.as_of = account.as_of.max(base.as_of);
        account.dirty = true;
    }

    /// Counts the messages of mailboxes whose changes are not all there.
    pub fn count_folded(&mut self) {
        for mailbox in std::mem::take(&mut self.folded) {
            let Some(slot) = self.slots.get_mut(&mailbox) else { continue };
            let index = MailboxIndex::of_changes(&slot.delta);
            slot.recount(&index);
        }
    }

    fn place_message(&mut self, lsn: Lsn, head: &MessageHead, location: Location) {
        let head_bytes = head_bytes(head);
        let change_of = |number: usize| {
            let message = placed_message(head, number, location, head_bytes);
            Change::Place { message, flags: head.placements[number].flags }
        };
        // All changes that a record makes to one mailbox go together: they have one LSN.
        let mut order: Vec<usize> = (0..head.placements.len()).collect();
        order.sort_by_key(|&number| head.placements[number].mailbox);
        for group in order.chunk_by(|&a, &b| head.placements[a].mailbox == head.placements[b].mailbox) {
            let mailbox = head.placements[group[0]].mailbox;
            self.change_mailbox(lsn, mailbox, group.iter().map(|&number| change_of(number)));
        }
    }

    fn change_mailbox(&mut self, lsn: Lsn, mailbox: MailboxId, changes: impl IntoIterator<Item = Change>) {
        // A change of a mailbox that has been deleted since finds nothing to change.
        let Some(slot) = self.slots.get_mut(&mailbox) else { return };
        // A checkpoint's counters may be newer than its pages.
        let (counted, paged) = (lsn <= slot.meta.as_of, lsn <= slot.page_as_of);
        if counted && paged {
            return;
        }
        for change in changes {
            if !counted {
                slot.count(&change);
            }
            if let Change::Flags(change) = &change {
                slot.flags_modseq = slot.flags_modseq.max(change.modseq.0);
            }
            if !paged {
                if let Some(index) = &mut slot.index {
                    index.apply(&change);
                }
                slot.push_change(lsn, change);
            }
        }
        slot.meta.as_of = slot.meta.as_of.max(lsn);
        slot.dirty = true;
        slot.wake_watchers();
    }

    fn change_structure(&mut self, lsn: Lsn, change: MailboxChange) {
        match change {
            MailboxChange::Create { mailbox, account, name, uid_validity, special_use } => {
                let state = self.accounts.get_or_default(account);
                state.uid_validity_next = state.uid_validity_next.max(uid_validity.saturating_add(1));
                state.as_of = state.as_of.max(lsn);
                state.dirty = true;
                if self.slots.contains_key(&mailbox) || self.deleted.contains_key(&mailbox) {
                    return;
                }
                state.mailboxes.insert(name.clone(), mailbox);
                let meta = Meta {
                    mailbox,
                    account,
                    as_of: lsn,
                    special_use,
                    name,
                    uid_validity,
                    uid_next: 1,
                    recent_below: 1,
                    highest_modseq: 1,
                    ..Meta::default()
                };
                let mut slot = Slot::new(meta);
                slot.dirty = true;
                self.slots.insert(mailbox, slot);
            }
            MailboxChange::Rename { mailbox, name } => {
                let Some(slot) = self.slots.get_mut(&mailbox) else { return };
                if lsn <= slot.meta.as_of {
                    return;
                }
                if let Some(account) = self.accounts.get_mut(&slot.meta.account) {
                    if account.mailboxes.get(&slot.meta.name) == Some(&mailbox) {
                        account.mailboxes.remove(&slot.meta.name);
                    }
                    account.mailboxes.insert(name.clone(), mailbox);
                }
                slot.meta.name = name;
                slot.meta.as_of = lsn;
                slot.dirty = true;
            }
            MailboxChange::Delete { mailbox } => {
                let Some(mut slot) = self.slots.remove(&mailbox) else { return };
                slot.wake_watchers();
                self.deleted_octets += slot.meta.size;
                if let Some(account) = self.accounts.get_mut(&slot.meta.account)
                    && account.mailboxes.get(&slot.meta.name) == Some(&mailbox)
                {
                    account.mailboxes.remove(&slot.meta.name);
                    account.as_of = account.as_of.max(lsn);
                    account.dirty = true;
                }
                self.deleted.insert(mailbox, lsn);
            }
        }
    }

    /// What a checkpoint says of an account record.
    pub fn directory_entry(&self, account: AccountId) -> Option<DirectoryAccount> {
        let (as_of, record) = self.directory.get(&account)?;
        Some(DirectoryAccount {
            account: account.0,
            as_of: as_of.0,
            name: record.name.clone(),
            shard: record.shard.0,
            password: record.password.clone(),
            deleted: record.deleted,
            uid_validity_floor: record.uid_validity_floor,
        })
    }

    /// Forgets everything that was promised: the log failed before it became durable.
    pub fn discard_tips(&mut self) {
        for slot in self.slots.in_use_mut() {
            slot.tip = None;
        }
    }
}

/// The name of a mailbox whose own was lost.
fn recovered_name(mailbox: MailboxId) -> String {
    format!("Recovered {:x}", mailbox.0)
}

/// A message as a placement of its record has it.
fn placed_message(head: &MessageHead, number: usize, location: Location, head_bytes: u32) -> Message {
    let placement = &head.placements[number];
    Message {
        uid: placement.uid,
        prefix_of: u16::try_from(number).expect("a head has no more placements than 16 bits name"),
        zone_minutes: placement.zone_minutes,
        modseq: placement.modseq,
        id: head.id,
        location,
        head_bytes,
        size: placement.prefix.octets() as u64 + head.rest_octets,
        internal_date: placement.internal_date,
        save_date: placement.save_date,
    }
}

/// Bytes of a message record up to the end of its header frame.
pub fn head_bytes(head: &MessageHead) -> u32 {
    let frames = head.digest.stored_len + head.digest_overflow.stored_len + head.header.stored_len;
    (crate::format::record::RECORD_HEADER_BYTES + head.sealed_bytes()) as u32 + frames
}
