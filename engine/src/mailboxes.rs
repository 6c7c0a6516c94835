//! Mailboxes as a whole: create, rename, delete, subscribe, list.
//!
//! Changes of one account's structure go one after another, each waiting for the commit of the one before: they are rare,
//! and names then need no pending tip.

use std::sync::Arc;

use crate::accounts::AccountRef;
use crate::changes::check_transfer;
use crate::error::{EngineError, Refusal};
use crate::flags::UidSet;
use crate::format::record::{Expunge, Keyword, MailboxChange, PlacedMessage, Placements, Record, Subscription};
use crate::ids::{AccountId, MailboxId, ModSeq, Uid};
use crate::node::SharedDirectory;
use crate::shard::{Log, Shard};
use crate::slots::Slot;
use crate::state::State;
use crate::storage::Storage;

pub const INBOX: &str = "INBOX";
/// Between the levels of a name.
pub const SEPARATOR: char = '/';
/// Octets of a mailbox name, UTF-8.
pub const NAME_BYTES_MAX: usize = 1000;
/// Names that an account can be subscribed to.
pub const SUBSCRIPTIONS_MAX: usize = 10_000;
/// Mailboxes of an account, whose names a LIST goes through.
pub const MAILBOXES_MAX: usize = 10_000;
/// Levels of a mailbox name.
pub const NAME_LEVELS_MAX: usize = 50;

/// What STATUS answers, without a read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub exists: u32,
    pub unseen: u32,
    pub recent: u32,
    pub uid_next: u32,
    pub uid_validity: u32,
    pub highest_modseq: u64,
    /// Octets of all messages.
    pub size: u64,
}

/// A mailbox in a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailboxInfo {
    pub mailbox: MailboxId,
    pub name: String,
    pub special_use: u16,
    pub subscribed: bool,
    pub status: Status,
}

/// A mailbox that a new account has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMailbox {
    /// As [`normalise_name`] gives it; the levels above it come before it in the list.
    pub name: String,
    /// Bits that the protocols give a meaning to.
    pub special_use: u16,
}

/// Checks a name and gives its one spelling: INBOX is not case-sensitive (RFC 3501, 5.1).
pub fn normalise_name(name: &str) -> Result<String, Refusal> {
    if name.is_empty() {
        return Err(Refusal::BadName("it is empty"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Refusal::BadName("it is longer than 1,000 octets"));
    }
    if name.chars().any(char::is_control) {
        return Err(Refusal::BadName("it has control characters"));
    }
    let mut levels = 0;
    for level in name.split(SEPARATOR) {
        levels += 1;
        if level.is_empty() {
            return Err(Refusal::BadName("a level of it is empty"));
        }
    }
    if levels > NAME_LEVELS_MAX {
        return Err(Refusal::BadName("it has more than 50 levels"));
    }
    let (first, rest) = name.split_once(SEPARATOR).map_or((name, None), |(first, rest)| (first, Some(rest)));
    if first.eq_ignore_ascii_case(INBOX) {
        return Ok(rest.map_or_else(|| INBOX.to_owned(), |rest| format!("{INBOX}/{rest}")));
    }
    Ok(name.to_owned())
}

/// # Errors
/// An account would have too many mailboxes.
fn check_number(mailboxes: usize) -> Result<(), Refusal> {
    let limit = MAILBOXES_MAX;
    if mailboxes > limit { Err(Refusal::TooManyMailboxes(limit)) } else { Ok(()) }
}

impl<S: Storage> Shard<S> {
    /// The mailbox of a name, which need not be normalised.
    pub fn mailbox(&self, account: AccountId, name: &str) -> Option<MailboxId> {
        let state = self.0.state.borrow();
        let as_spelt = state.accounts.mailbox(account, name);
        as_spelt.or_else(|| state.accounts.mailbox(account, &normalise_name(name).ok()?))
    }

    /// All mailboxes of an account, by name.
    pub fn mailboxes(&self, account: AccountId) -> Vec<MailboxInfo> {
        let state = self.0.state.borrow();
        let Some(account) = state.accounts.get(&account) else { return Vec::new() };
        let infos = account.mailboxes.iter().filter_map(|(name, mailbox)| {
            let slot = state.slots.get(mailbox)?;
            Some(MailboxInfo {
                mailbox: *mailbox,
                name: name.clone(),
                special_use: slot.meta.special_use,
                subscribed: account.subscriptions.contains(name),
                status: status_of(&slot),
            })
        });
        infos.collect()
    }

    /// The names an account is subscribed to; they need not exist.
    pub fn subscriptions(&self, account: AccountId) -> Vec<String> {
        let state = self.0.state.borrow();
        state.accounts.get(&account).map(|account| account.subscriptions.iter().cloned().collect()).unwrap_or_default()
    }

    /// `None` if the mailbox is gone.
    pub fn status(&self, mailbox: MailboxId) -> Option<Status> {
        self.0.state.borrow().slots.get(&mailbox).map(|slot| status_of(&slot))
    }

    /// Creates a mailbox, and the levels above it that do not exist. Durable on return.
    pub async fn create_mailbox(
        &self,
        account: AccountId,
        name: &str,
        special_use: u16,
    ) -> Result<MailboxId, EngineError> {
        let name = normalise_name(name)?;
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        let (mailbox, ticket) = {
            let state = self.0.state.borrow();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let known = state.accounts.get(&account);
            if known.as_ref().is_some_and(|account| account.closed) {
                return Err(Refusal::NoSuchAccount.into());
            }
            let existing = known.as_ref().map(|account| &account.mailboxes);
            let exists = |name: &str| existing.is_some_and(|mailboxes| mailboxes.contains_key(name));
            if exists(&name) {
                return Err(Refusal::MailboxExists.into());
            }
            let above = name.match_indices(SEPARATOR).map(|(at, _)| &name[..at]).filter(|level| !exists(level));
            let mut levels: Vec<(&str, u16)> = above.map(|level| (level, 0)).collect();
            levels.push((&name, special_use));
            check_number(existing.map_or(0, |mailboxes| mailboxes.len()) + levels.len())?;
            let first_uid_validity = self.uid_validity_next(&state, account);
            let mailbox = self.push_creations(&mut log, account, &levels, first_uid_validity);
            (mailbox, self.ticket(&mut log))
        };
        ticket.committed().await?;
        Ok(mailbox)
    }

    /// Creates a new account's mailboxes, INBOX before all, and subscribes to them. Those that exist stay as they are. Durable on
    /// return.
    pub(crate) async fn create_first_mailboxes(
        &self,
        account: AccountId,
        mailboxes: &[NewMailbox],
    ) -> Result<(), EngineError> {
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        self.admit().await?;
        let ticket = {
            let state = self.0.state.borrow();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let known = state.accounts.get(&account);
            if known.as_ref().is_some_and(|account| account.closed) {
                return Err(Refusal::NoSuchAccount.into());
            }
            let existing = known.as_ref().map(|account| &account.mailboxes);
            let all = std::iter::once((INBOX, 0)).chain(mailboxes.iter().map(|new| (&*new.name, new.special_use)));
            let exists = |name: &str| existing.is_some_and(|mailboxes| mailboxes.contains_key(name));
            let missing: Vec<(&str, u16)> = all.filter(|(name, _)| !exists(name)).collect();
            let first_uid_validity = self.uid_validity_next(&state, account);
            self.push_creations(&mut log, account, &missing, first_uid_validity);
            for &(name, _) in missing.iter().filter(|_| !mailboxes.is_empty()) {
                let lsn = log.next_lsn(self.0.epoch);
                let subscription = Subscription { account, name: name.to_owned(), subscribed: true };
                log.push(lsn, 0, Record::Subscription(subscription), &[]);
            }
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        Ok(())
    }

    /// Records for new mailboxes with their special uses, in one transaction; the last mailbox is returned.
    fn push_creations(
        &self,
        log: &mut Log,
        account: AccountId,
        names: &[(&str, u16)],
        first_uid_validity: u32,
    ) -> MailboxId {
        let mut mailbox = MailboxId::default();
        let mut transaction = 0;
        for (number, &(name, special_use)) in names.iter().enumerate() {
            let lsn = log.next_lsn(self.0.epoch);
            if names.len() > 1 && transaction == 0 {
                transaction = lsn.0;
            }
            mailbox = MailboxId(lsn.0);
            let change = MailboxChange::Create {
                mailbox,
                account,
                name: name.to_owned(),
                uid_validity: first_uid_validity.saturating_add(number as u32),
                special_use,
            };
            log.push(lsn, transaction, Record::Mailbox(change), &[]);
        }
        if transaction != 0 {
            log.push_commit(self.0.epoch, transaction, names.len() as u32);
        }
        mailbox
    }

    /// Renames a mailbox and those below it, in one transaction. Renaming INBOX moves its messages to a new mailbox and
    /// leaves it empty (RFC 3501, 6.3.5). Durable on return.
    pub async fn rename_mailbox(&self, account: AccountId, from: &str, to: &str) -> Result<(), EngineError> {
        let (from, to) = (normalise_name(from)?, normalise_name(to)?);
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        if from == INBOX {
            return self.rename_inbox(account, &to).await;
        }
        if to.strip_prefix(&from).is_some_and(|rest| rest.starts_with(SEPARATOR)) {
            return Err(Refusal::IntoItself.into());
        }
        let ticket = {
            let state = self.0.state.borrow();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let account_state = open_account(&state, account)?;
            let mailboxes = &account_state.mailboxes;
            let below = format!("{from}{SEPARATOR}");
            let moved: Vec<(MailboxId, String)> = mailboxes
                .iter()
                .filter(|(name, _)| **name == from || name.starts_with(&below))
                .map(|(name, mailbox)| (*mailbox, format!("{to}{}", &name[from.len()..])))
                .collect();
            // A name may be nothing but a level above others, which it takes along.
            if moved.is_empty() {
                return Err(Refusal::NoSuchMailbox.into());
            }
            if mailboxes.contains_key(&to) {
                return Err(Refusal::MailboxExists.into());
            }
            for (_, name) in &moved {
                let name = normalise_name(name)?;
                if mailboxes.contains_key(&name) {
                    return Err(Refusal::MailboxExists.into());
                }
            }
            let parents: Vec<&str> = to
                .match_indices(SEPARATOR)
                .map(|(at, _)| &to[..at])
                .filter(|level| !mailboxes.contains_key(*level))
                .collect();
            check_number(mailboxes.len() + parents.len())?;
            let mut transaction = 0;
            let mut count = 0;
            let mut push = |log: &mut Log, change: &mut dyn FnMut(u64) -> MailboxChange| {
                let lsn = log.next_lsn(self.0.epoch);
                if transaction == 0 {
                    transaction = lsn.0;
                }
                count += 1;
                log.push(lsn, transaction, Record::Mailbox(change(lsn.0)), &[]);
            };
            let first_uid_validity = self.uid_validity_next(&state, account);
            for (number, parent) in parents.iter().enumerate() {
                push(&mut log, &mut |lsn| MailboxChange::Create {
                    mailbox: MailboxId(lsn),
                    account,
                    name: (*parent).to_owned(),
                    uid_validity: first_uid_validity.saturating_add(number as u32),
                    special_use: 0,
                });
            }
            for (mailbox, name) in &moved {
                push(&mut log, &mut |_| MailboxChange::Rename { mailbox: *mailbox, name: name.clone() });
            }
            log.push_commit(self.0.epoch, transaction, count);
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        Ok(())
    }

    async fn rename_inbox(&self, account: AccountId, to: &str) -> Result<(), EngineError> {
        let inbox = self.mailbox(account, INBOX).ok_or(Refusal::NoSuchMailbox)?;
        let ticket = loop {
            self.load_index(inbox).await?;
            self.admit().await?;
            let mut state = self.0.state.borrow_mut();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let account_state = open_account(&state, account)?;
            if account_state.mailboxes.contains_key(to) {
                return Err(Refusal::MailboxExists.into());
            }
            let first_uid_validity = self.uid_validity_next(&state, account);
            let mut levels: Vec<&str> = to
                .match_indices(SEPARATOR)
                .map(|(at, _)| &to[..at])
                .filter(|level| !account_state.mailboxes.contains_key(*level))
                .collect();
            levels.push(to);
            check_number(account_state.mailboxes.len() + levels.len())?;
            let slot = state.slots.get_mut(&inbox).ok_or(Refusal::NoSuchMailbox)?;
            if slot.index.is_none() {
                continue;
            }
            slot.tip();
            let (Some(index), Some(tip)) = (&slot.index, &slot.tip) else { continue };
            let moved: Vec<_> = index.messages.iter().filter(|message| !tip.expunged.contains(message.uid.0)).collect();
            check_transfer(moved.len() as u64)?;
            let mut transaction = 0;
            let mut target = MailboxId::default();
            for (number, level) in levels.iter().enumerate() {
                let lsn = log.next_lsn(self.0.epoch);
                transaction = if transaction == 0 { lsn.0 } else { transaction };
                target = MailboxId(lsn.0);
                let change = MailboxChange::Create {
                    mailbox: target,
                    account,
                    name: (*level).to_owned(),
                    uid_validity: first_uid_validity.saturating_add(number as u32),
                    special_use: 0,
                };
                log.push(lsn, transaction, Record::Mailbox(change), &[]);
            }
            let mut records = levels.len() as u32;
            let known = (0..).zip(&index.keywords);
            // A keyword is pending as long as anything is, also when the index has it.
            let pending = tip.keywords.iter().filter(|(number, _)| *number as usize >= index.keywords.len());
            for (number, name) in known.chain(pending.map(|(number, name)| (*number, name))) {
                let lsn = log.next_lsn(self.0.epoch);
                let keyword = Keyword { mailbox: target, number, name: name.clone() };
                log.push(lsn, transaction, Record::Keyword(keyword), &[]);
                records += 1;
            }
            let uids: UidSet = moved.iter().map(|message| message.uid).collect();
            let size = moved.iter().map(|message| message.size).sum();
            let mut unseen = 0;
            let now_s = (self.0.storage.wall_clock_ms() / 1000) as i64;
            let items: Vec<PlacedMessage> = moved
                .iter()
                .enumerate()
                .map(|(number, message)| {
                    let flags = tip.flags_of(message.uid, index.flags_of(message.uid));
                    unseen += u32::from(!flags.contains(crate::flags::Flags::SEEN));
                    let (uid, save_date) = (Uid(number as u32 + 1), now_s);
                    PlacedMessage { uid, save_date, ..PlacedMessage::of_message(message, flags) }
                })
                .collect();
            if !items.is_empty() {
                let lsn = log.next_lsn(self.0.epoch);
                let placements = Placements { mailbox: target, modseq: ModSeq(2), items };
                log.push(lsn, transaction, Record::Placements(placements), &[]);
                let tip = slot.tip();
                tip.highest_modseq += 1;
                tip.pending += 1;
                tip.expunged |= &uids.0;
                let modseq = ModSeq(tip.highest_modseq);
                let lsn = log.next_lsn(self.0.epoch);
                let expunge = Expunge { mailbox: inbox, modseq, uids, unseen, size };
                log.push(lsn, transaction, Record::Expunge(expunge), &[]);
                log.touched(inbox);
                records += 2;
            }
            log.push_commit(self.0.epoch, transaction, records);
            break self.ticket(&mut log);
        };
        ticket.committed().await?;
        Ok(())
    }

    /// Deletes a mailbox and its messages; mailboxes below it stay. Durable on return.
    pub async fn delete_mailbox(&self, account: AccountId, name: &str) -> Result<(), EngineError> {
        let name = normalise_name(name)?;
        if name == INBOX {
            return Err(Refusal::InboxStays.into());
        }
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        let mailbox = self.mailbox(account, &name).ok_or(Refusal::NoSuchMailbox)?;
        self.delete_mailboxes(&[mailbox]).await
    }

    /// Deletes mailboxes in one transaction. The account's lock is held.
    async fn delete_mailboxes(&self, mailboxes: &[MailboxId]) -> Result<(), EngineError> {
        if mailboxes.is_empty() {
            return Ok(());
        }
        let ticket = {
            let mut state = self.0.state.borrow_mut();
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let mut transaction = 0;
            for &mailbox in mailboxes {
                let slot = state.slots.get_mut(&mailbox).ok_or(Refusal::NoSuchMailbox)?;
                let tip = slot.tip();
                tip.deleted = true;
                tip.pending += 1;
                log.touched(mailbox);
                let lsn = log.next_lsn(self.0.epoch);
                transaction = if transaction == 0 { lsn.0 } else { transaction };
                log.push(lsn, transaction, Record::Mailbox(MailboxChange::Delete { mailbox }), &[]);
            }
            log.push_commit(self.0.epoch, transaction, mailboxes.len() as u32);
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        Ok(())
    }

    /// Lets an account make no more mailboxes; returns a UIDVALIDITY above all it ever had.
    pub(crate) async fn close_account(&self, account: AccountId) -> u32 {
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        let mut state = self.0.state.borrow_mut();
        state.accounts.get_or_default(account).closed = true;
        self.uid_validity_next(&state, account)
    }

    /// Undoes [`Shard::close_account`].
    pub(crate) fn reopen_account(&self, account: AccountId) {
        if let Some(account) = self.0.state.borrow_mut().accounts.get_mut(&account) {
            account.closed = false;
        }
    }

    /// Deletes all mailboxes of an account that has been deleted itself, and lets it make no more.
    pub(crate) async fn empty_account(&self, account: AccountId) -> Result<(), EngineError> {
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        let mailboxes: Vec<MailboxId> = {
            let mut state = self.0.state.borrow_mut();
            let Some(account) = state.accounts.get_mut(&account) else { return Ok(()) };
            account.closed = true;
            account.mailboxes.values().copied().collect()
        };
        self.delete_mailboxes(&mailboxes).await
    }

    /// Subscribes an account to a name, or unsubscribes it; the name need not exist. Durable on return.
    pub async fn subscribe(&self, account: AccountId, name: &str, subscribed: bool) -> Result<(), EngineError> {
        let name = normalise_name(name)?;
        let lock = self.account_lock(account);
        let _one_at_a_time = lock.lock().await;
        self.admit().await?;
        let ticket = {
            let state = self.0.state.borrow();
            let known = state.accounts.get(&account);
            let known = known.as_ref().map(|account| &account.subscriptions);
            if subscribed && known.is_some_and(|known| known.len() >= SUBSCRIPTIONS_MAX && !known.contains(&name)) {
                return Err(Refusal::TooManySubscriptions(SUBSCRIPTIONS_MAX).into());
            }
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let lsn = log.next_lsn(self.0.epoch);
            log.push(lsn, 0, Record::Subscription(Subscription { account, name, subscribed }), &[]);
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        Ok(())
    }

    /// The UIDVALIDITY of an account's next mailbox: above that of any other mailbox that an account of its name ever had.
    fn uid_validity_next(&self, state: &State, account: AccountId) -> u32 {
        let floor = self.0.directory.get().map_or(1, |directory| directory.load().uid_validity_floor(account));
        state.accounts.get(&account).map_or(1, |account| account.uid_validity_next).max(floor)
    }

    /// Lets the shard know the accounts. To be called once, by its worker.
    pub(crate) fn share_directory(&self, directory: &SharedDirectory) {
        assert!(self.0.directory.set(Arc::clone(directory)).is_ok(), "a shard has one worker");
    }
}

/// An account that may make mailboxes.
fn open_account(state: &State, account: AccountId) -> Result<AccountRef<'_>, Refusal> {
    let account = state.accounts.get(&account).ok_or(Refusal::NoSuchMailbox)?;
    if account.closed { Err(Refusal::NoSuchAccount) } else { Ok(account) }
}

fn status_of(slot: &Slot) -> Status {
    let meta = &slot.meta;
    // What a session has been shown as `\Recent` is not any more, also before the claim is in the log.
    let recent_below = meta.recent_below.max(slot.recent_claimed);
    Status {
        exists: meta.exists,
        unseen: meta.unseen,
        recent: match &slot.index {
            Some(index) => {
                let first = index.position(Uid(recent_below)).unwrap_or_else(|at| at);
                (index.messages.len() - first) as u32
            }
            // Without a read: those of them that are expunged count, too.
            None => meta.uid_next.saturating_sub(recent_below).min(meta.exists),
        },
        uid_next: meta.uid_next,
        uid_validity: meta.uid_validity,
        highest_modseq: meta.highest_modseq,
        size: meta.size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_spelling_and_bad_ones_are_refused() {
        assert_eq!(normalise_name("inBox").as_deref(), Ok("INBOX"));
        assert_eq!(normalise_name("inbox/Work").as_deref(), Ok("INBOX/Work"));
        assert_eq!(normalise_name("Inboxes").as_deref(), Ok("Inboxes"));
        for bad in ["", "/", "a//b", "/a", "a/", "a\0b", "a\nb", &"x".repeat(1001), &"x/".repeat(60)] {
            assert!(matches!(normalise_name(bad), Err(Refusal::BadName(_))), "{bad:?}");
        }
    }
}
