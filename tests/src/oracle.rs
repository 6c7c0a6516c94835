//! The oracle: what has been acknowledged, attempted and shown, and what must therefore hold.
//!
//! It knows nothing of the engine's inside. Every fact comes from an answer or from a view.

use std::collections::{BTreeMap, BTreeSet};

use posthaste_engine::flags::Flags;
use posthaste_engine::ids::{AccountId, MailboxId, MessageId};
use posthaste_engine::mailboxes::Status;

/// A broken promise, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation(pub String);

/// What is known of one UID.
#[derive(Clone, Debug, Default)]
struct UidFact {
    message: Option<MessageId>,
    token: Option<u64>,
    /// It was acknowledged or shown, so it must be there unless its removal has been attempted.
    must_exist: bool,
    removal_attempted: bool,
    /// Its removal was acknowledged or shown.
    removed: bool,
}

/// What is known of a mailbox.
#[derive(Clone, Debug, Default)]
struct MailboxFact {
    account: AccountId,
    uid_validity: u32,
    uids: BTreeMap<u32, UidFact>,
    uid_next: u32,
    highest_modseq: u64,
    /// Flags shown or acknowledged at a mod-sequence.
    flags: BTreeMap<(u32, u64), u128>,
    /// The last mod-sequence shown or acknowledged for a message.
    modseqs: BTreeMap<u32, u64>,
    deletion_attempted: bool,
    deleted: bool,
    created: bool,
}

/// What is known of a message's journey, by the token in its bytes.
#[derive(Clone, Debug, Default)]
pub struct TokenFact {
    pub account: AccountId,
    pub acknowledged: bool,
    pub copied: bool,
    /// Expunged, or its mailbox deleted, as far as was attempted.
    pub may_be_gone: bool,
}

/// All facts of a run.
#[derive(Debug, Default)]
pub struct Oracle {
    mailboxes: BTreeMap<MailboxId, MailboxFact>,
    pub tokens: BTreeMap<u64, TokenFact>,
    /// UIDVALIDITY values of an account, each used once.
    uid_validities: BTreeMap<(AccountId, u32), MailboxId>,
    /// Deletions of mailboxes by name, per account: under way, and ever begun. Which mailbox has a name may change until
    /// a deletion runs, so each may hit any mailbox that was there while it was under way.
    deletions: BTreeMap<AccountId, (u32, u64)>,
    /// Tokens that were ever on their way to a mailbox: they may be there although nobody was told so.
    bound_for: BTreeMap<MailboxId, BTreeSet<u64>>,
    pub acknowledged: u64,
    pub shown: u64,
    pub violation: Option<Violation>,
}

/// A message as a view or a final check shows it.
#[derive(Clone, Copy, Debug)]
pub struct Shown {
    pub uid: u32,
    pub message: MessageId,
    pub modseq: u64,
    pub flags: u128,
}

impl Oracle {
    pub fn fail(&mut self, what: String) {
        self.violation.get_or_insert(Violation(what));
    }

    fn mailbox(&mut self, mailbox: MailboxId) -> &mut MailboxFact {
        self.mailboxes.entry(mailbox).or_default()
    }

    /// A mailbox exists, by an answer or a list.
    pub fn mailbox_exists(&mut self, mailbox: MailboxId, account: AccountId, uid_validity: u32) {
        let fact = self.mailbox(mailbox);
        fact.created = true;
        fact.account = account;
        if fact.uid_validity != 0 && fact.uid_validity != uid_validity {
            let what = format!("UIDVALIDITY of mailbox {mailbox} went from {} to {uid_validity}", fact.uid_validity);
            self.fail(what);
            return;
        }
        fact.uid_validity = uid_validity;
        if fact.deleted {
            self.fail(format!("deleted mailbox {mailbox} is back"));
        }
        let owner = *self.uid_validities.entry((account, uid_validity)).or_insert(mailbox);
        if owner != mailbox {
            self.fail(format!("UIDVALIDITY {uid_validity} was given to mailboxes {owner} and {mailbox}"));
        }
    }

    pub fn deletion_begins(&mut self, account: AccountId) {
        let (active, begun) = self.deletions.entry(account).or_default();
        *active += 1;
        *begun += 1;
    }

    /// The node has died, and its sessions with it.
    pub fn sessions_end(&mut self) {
        for (active, _) in self.deletions.values_mut() {
            *active = 0;
        }
    }

    pub fn deletion_ends(&mut self, account: AccountId) {
        self.deletions.entry(account).or_default().0 -= 1;
    }

    /// To be given to [`Oracle::deletion_overlaps`] when an answer has come.
    pub fn deletions_so_far(&self, account: AccountId) -> (u32, u64) {
        self.deletions.get(&account).copied().unwrap_or_default()
    }

    /// Whether a deletion may have hit what an answer speaks of.
    pub fn deletion_overlaps(&self, account: AccountId, before: (u32, u64)) -> bool {
        before.0 > 0 || self.deletions_so_far(account).1 != before.1
    }

    pub fn attempt_deletion(&mut self, mailbox: MailboxId) {
        let fact = self.mailbox(mailbox);
        fact.deletion_attempted = true;
        let tokens: Vec<u64> = fact.uids.values().filter_map(|uid| uid.token).collect();
        let unseen = self.bound_for.get(&mailbox).cloned().unwrap_or_default();
        for token in tokens.into_iter().chain(unseen) {
            self.token(token).may_be_gone = true;
        }
    }

    /// A message is on its way to a mailbox; whether it gets there may never be told.
    pub fn on_its_way(&mut self, token: u64, mailbox: MailboxId) {
        self.bound_for.entry(mailbox).or_default().insert(token);
        if self.is_doomed(mailbox) {
            self.token(token).may_be_gone = true;
        }
    }

    pub fn deleted(&mut self, mailbox: MailboxId) {
        self.mailbox(mailbox).deleted = true;
    }

    /// Whether tokens that land there may vanish with it.
    pub fn is_doomed(&self, mailbox: MailboxId) -> bool {
        self.mailboxes.get(&mailbox).is_some_and(|fact| fact.deletion_attempted)
    }

    pub fn token(&mut self, token: u64) -> &mut TokenFact {
        self.tokens.entry(token).or_default()
    }

    /// A delivery, append, copy or move has been acknowledged.
    pub fn placed(&mut self, mailbox: MailboxId, uid: u32, token: Option<u64>) {
        self.acknowledged += 1;
        let fact = self.mailbox(mailbox);
        let doomed = fact.deletion_attempted;
        let entry = fact.uids.entry(uid).or_default();
        if entry.removed {
            self.fail(format!("mailbox {mailbox}: UID {uid} was given again after its removal"));
            return;
        }
        if let (Some(old), Some(new)) = (entry.token, token)
            && old != new
        {
            self.fail(format!("mailbox {mailbox}: UID {uid} was given to messages {old} and {new}"));
            return;
        }
        entry.token = token.or(entry.token);
        entry.must_exist = true;
        // It may have been seen, and its removal attempted, before this answer came.
        let doomed = doomed || entry.removal_attempted;
        if let Some(token) = token
            && doomed
        {
            self.token(token).may_be_gone = true;
        }
    }

    pub fn attempt_removal(&mut self, mailbox: MailboxId, uids: &BTreeSet<u32>, is_move: bool) {
        let mut tokens = Vec::new();
        let fact = self.mailbox(mailbox);
        let mut some_unknown = false;
        for &uid in uids {
            let entry = fact.uids.entry(uid).or_default();
            entry.removal_attempted = true;
            some_unknown |= entry.token.is_none();
            tokens.extend(entry.token);
        }
        if some_unknown {
            tokens.extend(self.bound_for.get(&mailbox).into_iter().flatten());
        }
        if !is_move {
            for token in tokens {
                self.token(token).may_be_gone = true;
            }
        }
    }

    /// A removal has been acknowledged or shown.
    pub fn removed(&mut self, mailbox: MailboxId, uids: impl IntoIterator<Item = u32>) {
        for uid in uids {
            let entry = self.mailbox(mailbox).uids.entry(uid).or_default();
            if !entry.removal_attempted {
                self.fail(format!("mailbox {mailbox}: UID {uid} was removed although nobody had asked for it"));
                return;
            }
            entry.removed = true;
        }
    }

    /// Flags have been acknowledged at a mod-sequence.
    pub fn modseq_acknowledged(&mut self, mailbox: MailboxId, uids: impl IntoIterator<Item = u32>, modseq: u64) {
        self.acknowledged += 1;
        let fact = self.mailbox(mailbox);
        fact.highest_modseq = fact.highest_modseq.max(modseq);
        for uid in uids {
            let known = fact.modseqs.entry(uid).or_default();
            *known = (*known).max(modseq);
        }
    }

    /// The counters of a mailbox have been shown.
    pub fn counters_shown(&mut self, mailbox: MailboxId, uid_next: u32, highest_modseq: u64) {
        let fact = self.mailbox(mailbox);
        if uid_next < fact.uid_next {
            let what = format!("mailbox {mailbox}: UIDNEXT went from {} back to {uid_next}", fact.uid_next);
            return self.fail(what);
        }
        if highest_modseq < fact.highest_modseq {
            let what =
                format!("mailbox {mailbox}: HIGHESTMODSEQ went from {} back to {highest_modseq}", fact.highest_modseq);
            return self.fail(what);
        }
        fact.uid_next = uid_next;
        fact.highest_modseq = highest_modseq;
    }

    /// A message has been shown.
    pub fn message_shown(&mut self, mailbox: MailboxId, shown: Shown) {
        self.shown += 1;
        let Shown { uid, message, modseq, flags } = shown;
        let fact = self.mailbox(mailbox);
        let entry = fact.uids.entry(uid).or_default();
        if entry.removed {
            return self.fail(format!("mailbox {mailbox}: UID {uid} is back after its removal was told"));
        }
        if entry.message.is_some_and(|known| known != message) {
            return self.fail(format!("mailbox {mailbox}: UID {uid} is another message than it was"));
        }
        entry.message = Some(message);
        entry.must_exist = true;
        let known = fact.modseqs.entry(uid).or_default();
        if modseq < *known {
            let what = format!("mailbox {mailbox}: UID {uid} has MODSEQ {modseq} after {known} was told");
            return self.fail(what);
        }
        *known = modseq;
        let known_flags = *fact.flags.entry((uid, modseq)).or_insert(flags);
        if known_flags != flags {
            let what = format!("mailbox {mailbox}: UID {uid} has other flags at the same MODSEQ {modseq}");
            self.fail(what);
        }
    }

    /// The bytes of a message have been read and carry a token.
    pub fn token_read(&mut self, mailbox: MailboxId, uid: u32, token: u64) {
        let doomed = self.is_doomed(mailbox);
        let entry = self.mailbox(mailbox).uids.entry(uid).or_default();
        if let Some(known) = entry.token
            && known != token
        {
            let what = format!("mailbox {mailbox}: UID {uid} has the bytes of message {token}, not of {known}");
            return self.fail(what);
        }
        entry.token = Some(token);
        if doomed {
            self.token(token).may_be_gone = true;
        }
    }

    /// STATUS must agree with the messages that are there.
    pub fn status_shown(&mut self, mailbox: MailboxId, status: &Status, messages: &[Shown]) {
        if messages.len() != status.exists as usize {
            let what = format!("STATUS says {} messages, the index has {}", status.exists, messages.len());
            self.fail(format!("mailbox {mailbox}: {what}"));
        }
        let unseen = messages.iter().filter(|message| message.flags & Flags::SEEN.0 == 0).count();
        if unseen != status.unseen as usize {
            let what = format!("STATUS says {} unseen, the index has {unseen}", status.unseen);
            self.fail(format!("mailbox {mailbox}: {what}"));
        }
    }

    /// The whole contents of a mailbox, after a restart or at a quiet moment: nothing more and nothing less may be there.
    pub fn contents(&mut self, mailbox: MailboxId, shown: &[Shown]) {
        let present: BTreeSet<u32> = shown.iter().map(|message| message.uid).collect();
        for &message in shown {
            self.message_shown(mailbox, message);
        }
        let missing =
            self.mailbox(mailbox).uids.iter().find(|(uid, fact)| {
                fact.must_exist && !fact.removal_attempted && !fact.removed && !present.contains(uid)
            });
        if let Some((uid, fact)) = missing {
            let what = format!("mailbox {mailbox}: UID {uid} (message {:?}) is gone", fact.token);
            self.fail(what);
        }
    }

    /// All mailboxes there are, at a quiet moment.
    pub fn all_mailboxes(&mut self, present: &BTreeSet<MailboxId>) {
        let missing = self
            .mailboxes
            .iter()
            .find(|(mailbox, fact)| fact.created && !fact.deletion_attempted && !present.contains(mailbox));
        if let Some((mailbox, _)) = missing {
            let what = format!("mailbox {mailbox} is gone");
            return self.fail(what);
        }
        let back = self.mailboxes.iter().find(|(mailbox, fact)| fact.deleted && present.contains(mailbox));
        if let Some((mailbox, _)) = back {
            let what = format!("deleted mailbox {mailbox} is back");
            self.fail(what);
        }
    }

    /// How often each token was found in the whole store, at a quiet moment.
    pub fn all_tokens(&mut self, counts: &BTreeMap<u64, u32>) {
        let mut broken = None;
        for (token, fact) in &self.tokens {
            let count = counts.get(token).copied().unwrap_or(0);
            if fact.acknowledged && !fact.may_be_gone && count == 0 {
                broken = Some(format!("message {token} was acknowledged and is nowhere"));
            }
            if !fact.copied && count > 1 {
                broken = Some(format!("message {token} was never copied and is there {count} times"));
            }
        }
        if let Some(what) = broken {
            self.fail(what);
        }
    }
}
