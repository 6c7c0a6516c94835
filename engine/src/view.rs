//! A session's view of a mailbox: what it has been shown, and how to bring that up to date.
//!
//! A view is small: the UIDs as runs and patterns, and the mod-sequences up to which it has been brought. The published state is
//! shared by all sessions; nothing in a view moves until [`View::sync`].

use std::rc::Rc;

use crate::changes::{FlagOp, Stored};
use crate::deliver::FlagName;
use crate::error::{EngineError, Refusal};
use crate::flags::{Flags, UidSet};
use crate::format::record::{Recent, Record};
use crate::ids::{MailboxId, ModSeq, Uid};
use crate::numbering::Numbering;
use crate::shard::Shard;
use crate::slots::{Watcher, take_change};
use crate::storage::Storage;

/// What has changed since a view was last brought up to date.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes {
    /// Sequence numbers for EXPUNGE responses, in the order to send them: each is right after those before it.
    pub expunged: Vec<u32>,
    /// The UIDs of the same.
    pub expunged_uids: UidSet,
    /// The number of messages, if new ones came.
    pub exists: Option<u32>,
    pub recent: Option<u32>,
    /// Messages shown before whose flags have changed.
    pub flags: Vec<(u32, Uid, Flags, ModSeq)>,
    /// The mailbox has been deleted.
    pub gone: bool,
}

/// What a session has been shown of a mailbox.
pub struct View<S: Storage> {
    shard: Shard<S>,
    mailbox: MailboxId,
    watcher: Rc<Watcher>,
    uids: Numbering,
    uid_validity: u32,
    uid_next: u32,
    /// Flag changes up to here have been shown.
    modseq: ModSeq,
    /// Expunges up to here have been shown.
    expunge_modseq: ModSeq,
    /// UIDs that are `\Recent` in this session.
    recent: Numbering,
    claims_recent: bool,
    first_unseen: Option<u32>,
    /// The session's last change that it knows of without being told, and the messages of which something else is new.
    own: (ModSeq, UidSet),
}

impl<S: Storage> Shard<S> {
    /// Opens a view of a mailbox as it is published now. With `claim_recent` (SELECT, not EXAMINE) the session takes
    /// `\Recent` of the messages that no other has; that is logged but not waited for.
    ///
    /// # Errors
    /// No such mailbox, or an index that cannot be read.
    pub async fn select(&self, mailbox: MailboxId, claim_recent: bool) -> Result<View<S>, EngineError> {
        loop {
            self.load_index(mailbox).await?;
            let mut state = self.0.state.borrow_mut();
            let slot = state.slots.get_mut(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
            let Some(index) = &slot.index else { continue };
            let uids = index.messages.numbering_from(0);
            let first_unseen = match index.with_flag(0) {
                Some(seen) => uids.first_not_in(seen),
                None => (uids.len() > 0).then_some(1),
            };
            let watcher = Rc::new(Watcher::default());
            slot.watchers.retain(|watcher| watcher.strong_count() > 0);
            slot.watchers.push(Rc::downgrade(&watcher));
            let modseq = ModSeq(slot.meta.highest_modseq);
            let view = View {
                shard: self.clone(),
                mailbox,
                watcher,
                uids,
                uid_validity: slot.meta.uid_validity,
                uid_next: slot.meta.uid_next,
                modseq,
                expunge_modseq: modseq,
                recent: index.messages.numbering_from(slot.meta.recent_below.max(slot.recent_claimed)),
                claims_recent: claim_recent,
                first_unseen,
                own: Default::default(),
            };
            if claim_recent {
                self.claim_recent(slot);
            }
            return Ok(view);
        }
    }

    /// Notes that everything so far has been shown to a session as `\Recent`.
    fn claim_recent(&self, slot: &mut crate::slots::Slot) {
        let below = slot.meta.uid_next;
        if below <= slot.meta.recent_below.max(slot.recent_claimed) {
            return;
        }
        slot.recent_claimed = below;
        let mut log = self.0.log.borrow_mut();
        if log.check_open(self.0.id).is_err() {
            return;
        }
        let lsn = log.next_lsn(self.0.epoch);
        let recent = Recent { mailbox: slot.meta.mailbox, below: Uid(below) };
        // Nobody waits: the claim goes with the next batch.
        log.push(lsn, 0, Record::Recent(recent), &[]);
    }
}

impl<S: Storage> View<S> {
    pub fn mailbox(&self) -> MailboxId {
        self.mailbox
    }

    pub fn shard(&self) -> &Shard<S> {
        &self.shard
    }

    /// The number of messages that the session knows of.
    pub fn exists(&self) -> u32 {
        self.uids.len()
    }

    pub fn uid_validity(&self) -> u32 {
        self.uid_validity
    }

    pub fn uid_next(&self) -> u32 {
        self.uid_next
    }

    pub fn highest_modseq(&self) -> ModSeq {
        self.modseq
    }

    pub fn is_recent(&self, uid: Uid) -> bool {
        self.recent.sequence_of(uid.0).is_some()
    }

    pub fn recent(&self) -> u32 {
        self.recent.len()
    }

    /// The UIDs that are `\Recent` in this session.
    pub fn recent_uids(&self) -> UidSet {
        UidSet(self.recent.to_bitmap())
    }

    /// The sequence number of the first message without `\Seen`, as of SELECT.
    pub fn first_unseen(&self) -> Option<u32> {
        self.first_unseen
    }

    pub fn uid_of(&self, sequence: u32) -> Option<Uid> {
        self.uids.uid_of(sequence).map(Uid)
    }

    pub fn sequence_of(&self, uid: Uid) -> Option<u32> {
        self.uids.sequence_of(uid.0)
    }

    /// The UIDs that the session knows of.
    pub fn uids(&self) -> UidSet {
        UidSet(self.uids.to_bitmap())
    }

    /// The same between two UIDs, as first and last of each run.
    pub fn known_between(&self, first: Uid, last: Uid) -> impl Iterator<Item = (Uid, Uid)> + '_ {
        self.uids.between(first.0, last.0).map(|(first, last)| (Uid(first), Uid(last)))
    }

    /// The highest UID that the session knows of: `*`.
    pub fn last_uid(&self) -> Option<Uid> {
        self.uids.last().map(Uid)
    }

    pub fn has_changed(&self) -> bool {
        self.watcher.changed.get()
    }

    /// Returns when the published state has moved past the view. May be dropped at any time.
    pub async fn changed(&self) {
        while !self.watcher.changed.get() {
            self.watcher.notify.notified().await;
        }
    }

    /// STORE .SILENT: [`Shard::store_flags`] for a session that knows what it has changed. The next [`View::sync`] leaves
    /// out the messages that nobody else has changed, before or after; only those of the last change before it.
    pub async fn store_silently(
        &mut self,
        uids: UidSet,
        op: FlagOp,
        flags: Vec<FlagName>,
        unchanged_since: Option<ModSeq>,
    ) -> Result<Stored, EngineError> {
        let shard = &self.shard;
        let stored = shard.store_flags_knowing(self.mailbox, uids, op, flags, unchanged_since, self.modseq).await?;
        if let Some(modseq) = stored.modseq {
            self.own = (modseq, stored.news.clone());
        }
        Ok(stored)
    }

    /// Brings the view up to the published state. Without `allow_expunge` (RFC 3501, 7.4.1: during FETCH, STORE and
    /// SEARCH) expunges wait for the next call.
    ///
    /// # Errors
    /// An index that cannot be read. The view stays as it was.
    pub async fn sync(&mut self, allow_expunge: bool) -> Result<Changes, EngineError> {
        let mut changes = Changes::default();
        let expunges_wait = self.expunge_modseq < self.modseq;
        let nothing_waits = !(allow_expunge && expunges_wait);
        if nothing_waits && !self.watcher.changed.get() {
            return Ok(changes);
        }
        loop {
            match self.shard.load_index(self.mailbox).await {
                Err(EngineError::Refused(Refusal::NoSuchMailbox)) => {
                    changes.gone = true;
                    return Ok(changes);
                }
                other => other?,
            }
            let shard = self.shard.clone();
            let mut state = shard.0.state.borrow_mut();
            let Some(slot) = state.slots.get_mut(&self.mailbox) else { continue };
            let Some(index) = &slot.index else { continue };
            take_change(&self.watcher);
            let old_modseq = self.modseq;
            let modseq = ModSeq(slot.meta.highest_modseq);
            if allow_expunge {
                let gone = index.expunged_since(self.expunge_modseq);
                let mut gone = gone.unwrap_or_else(|| UidSet(self.uids.to_bitmap() - index.uids().0));
                changes.expunged = self.uids.remove(&mut gone.0);
                if !gone.is_empty() {
                    self.recent.remove(&mut gone.0.clone());
                }
                changes.expunged_uids = gone;
                self.expunge_modseq = modseq;
            }
            let known_below = self.uid_next;
            let start = index.position(Uid(known_below)).unwrap_or_else(|at| at);
            // Where messages have only come and gone, those that are known are as they were.
            if slot.flags_modseq > old_modseq.0 {
                let (own_modseq, news) = std::mem::take(&mut self.own);
                // Each change has a mod-sequence of its own: what has this one was changed by this session last.
                let known = news.is_empty().then_some(own_modseq);
                for (uid, modseq) in index.messages.modified(start, old_modseq, known) {
                    if modseq == own_modseq && !news.contains(Uid(uid)) {
                        continue;
                    }
                    if let Some(sequence) = self.uids.sequence_of(uid) {
                        changes.flags.push((sequence, Uid(uid), index.flags_of(Uid(uid)).shown(), modseq));
                    }
                }
            }
            let recent_from = slot.meta.recent_below.max(slot.recent_claimed);
            let (old_exists, old_recent) = (self.uids.len(), self.recent.len());
            for uid in index.messages.uids_from(start) {
                self.uids.push(uid, uid);
                if uid >= recent_from {
                    self.recent.push(uid, uid);
                }
            }
            self.uid_next = slot.meta.uid_next;
            self.modseq = modseq;
            if self.uids.len() != old_exists {
                changes.exists = Some(self.uids.len());
                if self.claims_recent {
                    shard.claim_recent(slot);
                }
            }
            if changes.exists.is_some() || self.recent.len() != old_recent {
                changes.recent = Some(self.recent.len());
            }
            return Ok(changes);
        }
    }
}
