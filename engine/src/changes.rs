//! Changes of messages: flags, expunge, copy, move. Each validates against the pending tip and returns durable.

use roaring::RoaringBitmap;

use crate::deliver::FlagName;
use crate::error::{EngineError, Refusal};
use crate::flags::{Flags, UidSet};
use crate::format::record::{Expunge, FlagChange, PlacedMessage, Placements, Record};
use crate::ids::{MailboxId, ModSeq, Uid};
use crate::index::MailboxIndex;
use crate::shard::{Log, Shard, Ticket};
use crate::slots::{Slot, Tip};
use crate::state::State;
use crate::storage::Storage;

/// COPY, MOVE and a rename of INBOX take at most so many messages: each is one transaction that must be published in one
/// step, so it is part of one batch, where a message takes up to 81 bytes.
const TRANSFER_MESSAGES_MAX: u64 = 500_000;

/// The bit of [`Flags::DELETED`].
const DELETED_BIT: u8 = 3;

/// # Errors
/// There are too many to be copied or moved in one transaction.
pub(crate) fn check_transfer(messages: u64) -> Result<(), Refusal> {
    let limit = TRANSFER_MESSAGES_MAX;
    if messages > limit { Err(Refusal::TooManyMessages { messages, limit }) } else { Ok(()) }
}

/// How STORE combines flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlagOp {
    Add,
    Remove,
    Replace,
}

/// What STORE did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    /// The mod-sequence of the change; `None` if nothing changed.
    pub modseq: Option<ModSeq>,
    pub changed: UidSet,
    /// Messages that have changed since `unchanged_since` (RFC 7162, 3.1.3).
    pub refused: UidSet,
    /// Those of `changed` that had changed before, after what the caller knew of.
    pub news: UidSet,
}

/// What COPY or MOVE did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    pub uid_validity: u32,
    /// UIDs at the source and at the target, ascending.
    pub pairs: Vec<(Uid, Uid)>,
}

/// The UIDs among `uids` that have a flag at the tip.
fn having(index: &MailboxIndex, tip: &Tip, bit: u8, uids: &RoaringBitmap) -> RoaringBitmap {
    let mut having = index.with_flag(bit).map(|with| with & uids).unwrap_or_default();
    if let Some((on, off)) = tip.flags.get(&bit) {
        having -= off;
        having |= on & uids;
    }
    having
}

/// The UIDs of `uids` that exist at the tip.
fn existing(index: &MailboxIndex, tip: &Tip, uids: &UidSet) -> RoaringBitmap {
    let mut existing = index.existing(uids);
    existing -= &tip.expunged;
    existing
}

/// The UIDs of `uids` that have changed after a mod-sequence, at the tip.
fn changed_since(index: &MailboxIndex, tip: &Tip, uids: &RoaringBitmap, since: ModSeq) -> UidSet {
    if since.0 >= tip.highest_modseq {
        return UidSet::default();
    }
    let changed = uids.iter().map(Uid).filter(|&uid| {
        let published = index.message(uid).map_or(ModSeq(0), |message| message.modseq);
        tip.modseq_of(uid, published) > since
    });
    changed.collect()
}

impl<S: Storage> Shard<S> {
    /// Runs `submit` in one turn with the index of `mailbox` loaded, and waits for its commit if it made one.
    async fn change<T>(
        &self,
        mailboxes: &[MailboxId],
        mut submit: impl FnMut(&mut State, &mut Log) -> Result<(T, Option<Ticket>), EngineError>,
    ) -> Result<T, EngineError> {
        let (value, ticket) = loop {
            for &mailbox in mailboxes {
                self.load_index(mailbox).await?;
            }
            self.admit().await?;
            let mut state = self.0.state.borrow_mut();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let mut loaded = true;
            for mailbox in mailboxes {
                let slot = state.slots.get_mut(mailbox).ok_or(Refusal::NoSuchMailbox)?;
                if slot.tip().deleted {
                    return Err(Refusal::NoSuchMailbox.into());
                }
                loaded &= slot.index.is_some();
                drop_idle_tip(slot);
            }
            if loaded {
                break submit(&mut state, &mut log)?;
            }
        };
        if let Some(ticket) = ticket {
            ticket.committed().await?;
        }
        Ok(value)
    }

    /// Changes flags. Durable on return, also where nothing changed because somebody else's change was on its way.
    pub async fn store_flags(
        &self,
        mailbox: MailboxId,
        uids: UidSet,
        op: FlagOp,
        flags: Vec<FlagName>,
        unchanged_since: Option<ModSeq>,
    ) -> Result<Stored, EngineError> {
        self.store_flags_knowing(mailbox, uids, op, flags, unchanged_since, ModSeq(u64::MAX)).await
    }

    /// [`Shard::store_flags`] for a caller that knows of the changes up to `known`.
    pub(crate) async fn store_flags_knowing(
        &self,
        mailbox: MailboxId,
        uids: UidSet,
        op: FlagOp,
        flags: Vec<FlagName>,
        unchanged_since: Option<ModSeq>,
        known: ModSeq,
    ) -> Result<Stored, EngineError> {
        self.change(&[mailbox], |state, log| {
            let slot = state.slots.get_mut(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            let bits = self.flag_bits(slot, log, &flags, op != FlagOp::Remove)?;
            slot.tip();
            let (Some(index), Some(tip)) = (&slot.index, &slot.tip) else {
                return Err(Refusal::NoSuchMailbox.into());
            };
            let mut uids = existing(index, tip, &uids);
            let mut refused = UidSet::default();
            if let Some(unchanged_since) = unchanged_since {
                refused = changed_since(index, tip, &uids, unchanged_since);
                uids -= &refused.0;
            }
            let in_use =
                (0..Flags::BITS as u8).filter(|bit| index.with_flag(*bit).is_some() || tip.flags.contains_key(bit));
            let in_use = in_use.fold(Flags::NONE, |flags, bit| flags.with(Flags(1 << bit)));
            let (set, clear) = match op {
                FlagOp::Add => (bits, Flags::NONE),
                FlagOp::Remove => (Flags::NONE, bits),
                FlagOp::Replace => (bits, in_use.without(bits).without(Flags::OPEN_ENDED)),
            };
            let mut changed = RoaringBitmap::new();
            for bit in set.bits() {
                changed |= &uids - having(index, tip, bit as u8, &uids);
            }
            for bit in clear.bits() {
                changed |= having(index, tip, bit as u8, &uids);
            }
            if changed.is_empty() {
                // What it would have changed may be pending: the answer waits for that.
                let ticket = (tip.pending > 0).then(|| self.ticket(log));
                drop_idle_tip(slot);
                return Ok((Stored { refused, ..Stored::default() }, ticket));
            }
            let seen = having(index, tip, 0, &changed).len() as i64;
            let unseen_change = if set.contains(Flags::SEEN) {
                seen - changed.len() as i64
            } else if clear.contains(Flags::SEEN) {
                seen
            } else {
                0
            };
            let news = changed_since(index, tip, &changed, known);
            let changed = UidSet(changed);
            let tip = slot.tip();
            tip.highest_modseq += 1;
            tip.pending += 1;
            let modseq = ModSeq(tip.highest_modseq);
            tip.change_flags(&changed, set, clear);
            tip.modified.push((modseq, changed.clone()));
            log.touched(mailbox);
            let lsn = log.next_lsn(self.0.epoch);
            let unseen_change = unseen_change as i32;
            let record = FlagChange { mailbox, modseq, uids: changed.clone(), set, clear, unseen_change };
            log.push(lsn, 0, Record::Flags(record), &[]);
            Ok((Stored { modseq: Some(modseq), changed, refused, news }, Some(self.ticket(log))))
        })
        .await
    }

    /// Expunges the messages that have `\Deleted`, of `among` if given. Durable on return.
    pub async fn expunge(&self, mailbox: MailboxId, among: Option<UidSet>) -> Result<UidSet, EngineError> {
        self.expunge_chosen(mailbox, |index, tip| {
            let candidates = match &among {
                Some(among) => existing(index, tip, among),
                None => {
                    let marked = index.with_flag(DELETED_BIT).cloned().unwrap_or_default();
                    let also = tip.flags.get(&DELETED_BIT).map(|(on, _)| on | &marked);
                    existing(index, tip, &UidSet(also.unwrap_or(marked)))
                }
            };
            having(index, tip, DELETED_BIT, &candidates)
        })
        .await
    }

    /// Expunges those of `uids` that exist, whatever their flags are: all of them in one step, or none. Durable on return,
    /// also where somebody else's expunge was on its way. Gives those that this expunged.
    pub async fn expunge_messages(&self, mailbox: MailboxId, uids: UidSet) -> Result<UidSet, EngineError> {
        self.expunge_chosen(mailbox, |index, tip| existing(index, tip, &uids)).await
    }

    async fn expunge_chosen(
        &self,
        mailbox: MailboxId,
        choose: impl Fn(&MailboxIndex, &Tip) -> RoaringBitmap,
    ) -> Result<UidSet, EngineError> {
        self.change(&[mailbox], |state, log| {
            let slot = state.slots.get_mut(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            slot.tip();
            let (Some(index), Some(tip)) = (&slot.index, &slot.tip) else {
                return Err(Refusal::NoSuchMailbox.into());
            };
            let gone = UidSet(choose(index, tip));
            if gone.is_empty() {
                let ticket = (tip.pending > 0).then(|| self.ticket(log));
                drop_idle_tip(slot);
                return Ok((gone, ticket));
            }
            self.push_expunge(slot, log, &gone, 0);
            Ok((gone, Some(self.ticket(log))))
        })
        .await
    }

    /// Appends the record that expunges `gone`, all of which exist at the tip.
    fn push_expunge(&self, slot: &mut Slot, log: &mut Log, gone: &UidSet, transaction: u64) {
        let mailbox = slot.meta.mailbox;
        let (mut unseen, mut size) = (0, 0);
        if let (Some(index), Some(tip)) = (&slot.index, &slot.tip) {
            unseen = (gone.len() - having(index, tip, 0, &gone.0).len()) as u32;
            size = index.messages.size_of(&gone.0);
        }
        let tip = slot.tip();
        tip.highest_modseq += 1;
        tip.pending += 1;
        tip.expunged |= &gone.0;
        let modseq = ModSeq(tip.highest_modseq);
        log.touched(mailbox);
        let lsn = log.next_lsn(self.0.epoch);
        let record = Expunge { mailbox, modseq, uids: gone.clone(), unseen, size };
        log.push(lsn, transaction, Record::Expunge(record), &[]);
    }

    /// Copies messages by reference to a mailbox of the same shard: those of `uids` that exist. Durable on return.
    pub async fn copy(&self, from: MailboxId, uids: UidSet, to: MailboxId) -> Result<Copied, EngineError> {
        self.transfer(from, uids, to, false).await
    }

    /// Moves messages to a mailbox of the same shard in one transaction: they appear there and vanish here in one step.
    /// Durable on return. Of two that move the same message one finds it gone.
    pub async fn move_messages(&self, from: MailboxId, uids: UidSet, to: MailboxId) -> Result<Copied, EngineError> {
        self.transfer(from, uids, to, true).await
    }

    async fn transfer(
        &self,
        from: MailboxId,
        uids: UidSet,
        to: MailboxId,
        expunge: bool,
    ) -> Result<Copied, EngineError> {
        let now_s = (self.0.storage.wall_clock_ms() / 1000) as i64;
        self.change(&[from, to], |state, log| {
            let slot = state.slots.get_mut(&from).ok_or(Refusal::NoSuchMailbox)?;
            slot.tip();
            let (Some(index), Some(tip)) = (&slot.index, &slot.tip) else {
                return Err(Refusal::NoSuchMailbox.into());
            };
            let uids = existing(index, tip, &uids);
            check_transfer(uids.len())?;
            let mut items: Vec<PlacedMessage> = Vec::with_capacity(uids.len() as usize);
            let mut sources = Vec::with_capacity(uids.len() as usize);
            let mut keywords = std::collections::BTreeSet::new();
            for message in uids.iter().filter_map(|uid| index.message(Uid(uid))) {
                let flags = tip.flags_of(message.uid, index.flags_of(message.uid));
                keywords.extend(flags.keywords());
                sources.push(message.uid);
                let (uid, save_date) = (Uid(0), now_s);
                items.push(PlacedMessage { uid, save_date, ..PlacedMessage::of_message(&message, flags) });
            }
            // Keyword numbers are each mailbox's own.
            let (numbers, names): (Vec<usize>, Vec<FlagName>) = keywords
                .into_iter()
                .filter_map(|number| {
                    let published = index.keywords.get(number).filter(|name| !name.is_empty()).cloned();
                    let pending =
                        || tip.keywords.iter().find(|(n, _)| *n as usize == number).map(|(_, name)| name.clone());
                    Some((number, FlagName::Keyword(published.or_else(pending)?)))
                })
                .unzip();
            let source_is_pending = tip.pending > 0;
            drop_idle_tip(slot);
            let target = state.slots.get_mut(&to).ok_or(Refusal::NoSuchMailbox)?;
            let uid_validity = target.meta.uid_validity;
            if items.is_empty() {
                // That somebody else has taken them may be pending: the answer waits for that.
                let ticket = source_is_pending.then(|| self.ticket(log));
                return Ok((Copied { uid_validity, pairs: Vec::new() }, ticket));
            }
            if u64::from(target.tip().uid_next) + items.len() as u64 > u64::from(u32::MAX) {
                drop_idle_tip(target);
                return Err(Refusal::UidsExhausted.into());
            }
            self.check_messages(target, items.len())?;
            let bits = self.bits_of(target, log, &names, true)?;
            let tip = target.tip();
            tip.highest_modseq += 1;
            tip.pending += 1;
            let modseq = ModSeq(tip.highest_modseq);
            let mut pairs = Vec::with_capacity(items.len());
            for (item, source) in items.iter_mut().zip(&sources) {
                item.uid = Uid(tip.uid_next);
                tip.uid_next += 1;
                let mut flags = Flags(item.flags.0 & 0xff);
                for (number, new) in numbers.iter().zip(&bits) {
                    if item.flags.contains(Flags::keyword(*number)) {
                        flags = flags.with(*new);
                    }
                }
                item.flags = flags;
                pairs.push((*source, item.uid));
            }
            log.touched(to);
            let lsn = log.next_lsn(self.0.epoch);
            let transaction = if expunge { lsn.0 } else { 0 };
            log.push(lsn, transaction, Record::Placements(Placements { mailbox: to, modseq, items }), &[]);
            if expunge {
                let gone: UidSet = sources.into_iter().collect();
                let slot = state.slots.get_mut(&from).ok_or(Refusal::NoSuchMailbox)?;
                slot.tip();
                self.push_expunge(slot, log, &gone, transaction);
                log.push_commit(self.0.epoch, transaction, 2);
            }
            Ok((Copied { uid_validity, pairs }, Some(self.ticket(log))))
        })
        .await
    }
}

/// Drops a tip that promises nothing.
fn drop_idle_tip(slot: &mut Slot) {
    if slot.tip.as_ref().is_some_and(|tip| tip.pending == 0) {
        slot.tip = None;
    }
}
