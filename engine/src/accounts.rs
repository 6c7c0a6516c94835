//! What the accounts of a shard have besides mailboxes: names, subscriptions, annotations. Like slots, packed while nobody
//! changes them.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::page::{AccountEntry, ArchivedAccountEntry};
use crate::ids::{AccountId, Lsn, MailboxId};
use crate::packed::{Look, Merged, Packed, Reader, put_distance, put_number, put_text};
use crate::slots::{put_name, take_name};

/// What an account has in its shard.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AccountState {
    pub as_of: Lsn,
    pub mailboxes: BTreeMap<String, MailboxId>,
    pub subscriptions: BTreeSet<String>,
    /// The next UIDVALIDITY; outlives every mailbox.
    pub uid_validity_next: u32,
    pub attributes: BTreeMap<(MailboxId, String), Vec<u8>>,
    pub dirty: bool,
    /// The account is being deleted: it makes no more mailboxes. Not stored: its record says whether it has been.
    pub closed: bool,
}

impl AccountState {
    /// What a checkpoint says of the account.
    pub fn to_entry(&self, id: AccountId) -> AccountEntry {
        let attributes = self.attributes.iter();
        AccountEntry {
            account: id.0,
            as_of: self.as_of.0,
            uid_validity_next: self.uid_validity_next,
            subscriptions: self.subscriptions.iter().cloned().collect(),
            attributes: attributes.map(|((mailbox, name), value)| (mailbox.0, name.clone(), value.clone())).collect(),
        }
    }
}

fn pack(id: AccountId, account: &AccountState, out: &mut Vec<u8>) {
    put_number(account.mailboxes.len() as u64, out);
    let mut before = id.0;
    for (name, mailbox) in &account.mailboxes {
        put_name(name, out);
        put_distance(mailbox.0, before, out);
        out.push(account.subscriptions.contains(name).into());
        before = mailbox.0;
    }
    put_distance(account.as_of.0, id.0, out);
    put_number(u64::from(account.uid_validity_next) << 1 | u64::from(account.closed), out);
    let others = || account.subscriptions.iter().filter(|name| !account.mailboxes.contains_key(*name));
    put_number(others().count() as u64, out);
    others().for_each(|name| put_name(name, out));
    for ((mailbox, name), value) in &account.attributes {
        put_number(mailbox.0, out);
        put_text(name, out);
        put_number(value.len() as u64, out);
        out.extend_from_slice(value);
    }
}

/// Packs what a checkpoint says of an account, as [`pack`] does one without mailboxes.
pub(crate) fn pack_entry(entry: &ArchivedAccountEntry, out: &mut Vec<u8>) {
    put_number(0, out);
    put_distance(entry.as_of.to_native(), entry.account.to_native(), out);
    put_number(u64::from(entry.uid_validity_next.to_native()) << 1, out);
    put_number(entry.subscriptions.len() as u64, out);
    entry.subscriptions.iter().for_each(|name| put_name(name, out));
    for attribute in entry.attributes.iter() {
        put_number(attribute.0.to_native(), out);
        put_text(&attribute.1, out);
        put_number(attribute.2.len() as u64, out);
        out.extend_from_slice(&attribute.2);
    }
}

/// The mailboxes of a packed account, by name, and whether it is subscribed to each.
struct Mailboxes<'a> {
    left: u64,
    before: u64,
    rest: Reader<'a>,
}

impl<'a> Mailboxes<'a> {
    fn of(id: AccountId, bytes: &'a [u8]) -> Self {
        let mut rest = Reader(bytes);
        Self { left: rest.number(), before: id.0, rest }
    }
}

impl<'a> Iterator for Mailboxes<'a> {
    type Item = (&'a str, MailboxId, bool);

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let name = take_name(&mut self.rest);
        self.before = self.rest.distance(self.before);
        Some((name, MailboxId(self.before), self.rest.number() != 0))
    }
}

fn unpack(id: AccountId, bytes: &[u8]) -> AccountState {
    let mut account = AccountState::default();
    let mut mailboxes = Mailboxes::of(id, bytes);
    for (name, mailbox, is_subscribed) in mailboxes.by_ref() {
        account.mailboxes.insert(name.to_owned(), mailbox);
        if is_subscribed {
            account.subscriptions.insert(name.to_owned());
        }
    }
    let mut reader = mailboxes.rest;
    account.as_of = Lsn(reader.distance(id.0));
    let number = reader.number();
    (account.uid_validity_next, account.closed) = ((number >> 1) as u32, number & 1 == 1);
    for _ in 0..reader.number() {
        account.subscriptions.insert(take_name(&mut reader).to_owned());
    }
    while !reader.0.is_empty() {
        let mailbox = MailboxId(reader.number());
        let name = reader.text().to_owned();
        let len = reader.number() as usize;
        account.attributes.insert((mailbox, name), reader.bytes(len).to_vec());
    }
    account
}

/// An account to look at.
pub type AccountRef<'a> = Look<'a, AccountState>;

/// All accounts of a shard.
#[derive(Debug, Default)]
pub struct Accounts {
    in_use: BTreeMap<AccountId, Box<AccountState>>,
    /// Also what some of those in use were like before.
    at_rest: Packed,
    scratch: Vec<u8>,
}

impl Accounts {
    pub fn get(&self, account: &AccountId) -> Option<AccountRef<'_>> {
        if let Some(account) = self.in_use.get(account) {
            return Some(Look::InUse(account));
        }
        let bytes = self.at_rest.get(account.0)?;
        Some(Look::Unpacked(Box::new(unpack(*account, bytes))))
    }

    /// The mailbox of a name, as it is spelt.
    pub fn mailbox(&self, account: AccountId, name: &str) -> Option<MailboxId> {
        if let Some(account) = self.in_use.get(&account) {
            return account.mailboxes.get(name).copied();
        }
        let mut mailboxes = Mailboxes::of(account, self.at_rest.get(account.0)?);
        // They ascend.
        let found = mailboxes.find(|(found, ..)| *found >= name);
        found.filter(|(found, ..)| *found == name).map(|(_, mailbox, _)| mailbox)
    }

    /// An account that is in use from now on, until it is told to rest.
    pub fn get_mut(&mut self, account: &AccountId) -> Option<&mut AccountState> {
        if !self.in_use.contains_key(account) {
            let bytes = self.at_rest.get(account.0)?;
            self.in_use.insert(*account, Box::new(unpack(*account, bytes)));
        }
        self.in_use.get_mut(account).map(Box::as_mut)
    }

    /// As [`Accounts::get_mut`]; an account that is not there begins empty.
    pub fn get_or_default(&mut self, account: AccountId) -> &mut AccountState {
        let at_rest = &self.at_rest;
        let unpack = || at_rest.get(account.0).map(|bytes| unpack(account, bytes)).unwrap_or_default();
        self.in_use.entry(account).or_insert_with(|| Box::new(unpack()))
    }

    /// All accounts, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (AccountId, AccountRef<'_>)> {
        self.keys().filter_map(|account| Some((account, self.get(&account)?)))
    }

    pub fn keys(&self) -> impl Iterator<Item = AccountId> {
        self.keys_from(AccountId(0))
    }

    /// The accounts from one on, ascending.
    pub fn keys_from(&self, from: AccountId) -> impl Iterator<Item = AccountId> {
        let in_use = self.in_use.range(from..).map(|(account, _)| (*account, ()));
        let at_rest = self.at_rest.iter_from(from.0).map(|(account, _)| (AccountId(account), ()));
        Merged::of(in_use, at_rest).map(|(account, ())| account)
    }

    /// An account that is in use.
    pub fn get_in_use(&self, account: AccountId) -> Option<&AccountState> {
        self.in_use.get(&account).map(|account| &**account)
    }

    /// Those that are in use. All others are at rest: just as the checkpoint has them.
    pub fn in_use(&self) -> impl ExactSizeIterator<Item = (AccountId, &AccountState)> {
        self.in_use.iter().map(|(id, account)| (*id, &**account))
    }

    /// Every account, all of them in use afterwards.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut AccountState> {
        for (id, bytes) in self.at_rest.iter_from(0) {
            let id = AccountId(id);
            self.in_use.entry(id).or_insert_with(|| Box::new(unpack(id, bytes)));
        }
        self.in_use.values_mut().map(Box::as_mut)
    }

    /// Packs an account if the checkpoint has it as it is.
    pub fn rest(&mut self, id: AccountId) {
        let Some(account) = self.in_use.get(&id) else { return };
        if account.dirty {
            return;
        }
        self.scratch.clear();
        pack(id, account, &mut self.scratch);
        self.at_rest.put(id.0, &self.scratch);
        self.in_use.remove(&id);
    }

    /// Notes that a checkpoint has these accounts as of `known`, and packs those that are as it has them.
    pub fn rest_after(&mut self, accounts: &[AccountId], known: Lsn) {
        for id in accounts {
            let Some(account) = self.in_use.get_mut(id) else { continue };
            account.dirty &= account.as_of > known;
            self.rest(*id);
        }
    }

    /// Packs all accounts that the checkpoint has as they are.
    pub fn rest_all(&mut self) {
        let in_use: Vec<AccountId> = self.in_use.keys().copied().collect();
        in_use.into_iter().for_each(|account| self.rest(account));
    }

    /// Puts an account together at a start: from what directories say of it, the newest first, each as [`pack_entry`] packs it, and
    /// from its mailboxes by name. Its next UIDVALIDITY is at least `uid_validity_next`. Those that ascend are soonest put.
    pub(crate) fn put_restored<'a>(
        &mut self,
        id: AccountId,
        said: impl Iterator<Item = &'a [u8]>,
        mailboxes: &[(&str, Lsn, MailboxId)],
        mut uid_validity_next: u32,
    ) {
        let mut newest: Option<(Lsn, Reader<'_>)> = None;
        for bytes in said {
            let mut reader = Mailboxes::of(id, bytes).rest;
            let as_of = Lsn(reader.distance(id.0));
            uid_validity_next = uid_validity_next.max((reader.number() >> 1) as u32);
            newest.get_or_insert((as_of, reader));
        }
        let (as_of, mut rest) = newest.unwrap_or((Lsn::default(), Reader(&[0])));
        let mut subscriptions: Vec<&str> = (0..rest.number()).map(|_| take_name(&mut rest)).collect();
        subscriptions.sort_unstable();
        let out = &mut self.scratch;
        out.clear();
        put_number(mailboxes.len() as u64, out);
        let mut before = id.0;
        for &(name, _, mailbox) in mailboxes {
            put_name(name, out);
            put_distance(mailbox.0, before, out);
            let subscribed = subscriptions.binary_search(&name);
            out.push(subscribed.is_ok().into());
            if let Ok(place) = subscribed {
                subscriptions.remove(place);
            }
            before = mailbox.0;
        }
        put_distance(as_of.0, id.0, out);
        put_number(u64::from(uid_validity_next) << 1, out);
        put_number(subscriptions.len() as u64, out);
        subscriptions.iter().for_each(|name| put_name(name, out));
        // Attributes are packed alike.
        out.extend_from_slice(rest.0);
        self.at_rest.put(id.0, out);
    }

    /// The memory that those at rest take.
    pub fn at_rest_bytes(&self) -> usize {
        self.at_rest.memory_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn account() -> impl Strategy<Value = AccountState> {
        let name = || prop_oneof![Just("INBOX".to_owned()), Just("Junk".to_owned()), any::<String>()];
        let mailboxes = prop::collection::btree_map(name(), any::<u64>().prop_map(MailboxId), 0..9);
        let subscriptions = prop::collection::btree_set(name(), 0..5);
        let key = (any::<u64>().prop_map(MailboxId), any::<String>());
        let attributes = prop::collection::btree_map(key, any::<Vec<u8>>(), 0..4);
        let numbers = any::<(u64, u32)>();
        (mailboxes, subscriptions, attributes, numbers).prop_map(|(mailboxes, subscriptions, attributes, numbers)| {
            let (as_of, uid_validity_next) = (Lsn(numbers.0), numbers.1);
            let closed = numbers.1 % 2 == 0;
            let dirty = false;
            AccountState { as_of, mailboxes, subscriptions, uid_validity_next, attributes, dirty, closed }
        })
    }

    proptest! {
        #[test]
        fn accounts_are_the_same_at_rest(states in prop::collection::vec((0..50_u64, account()), 1..60)) {
            let mut accounts = Accounts::default();
            let mut model = BTreeMap::new();
            for (id, state) in states {
                let id = AccountId(id << 38 | id);
                *accounts.get_or_default(id) = state.clone();
                accounts.rest(id);
                for (name, mailbox) in &state.mailboxes {
                    prop_assert_eq!(accounts.mailbox(id, name), Some(*mailbox));
                }
                prop_assert_eq!(accounts.mailbox(id, "no such"), None);
                model.insert(id, state);
            }
            prop_assert_eq!(accounts.in_use().count(), 0);
            let found: Vec<_> = accounts.iter().map(|(id, state)| (id, state.clone())).collect();
            prop_assert_eq!(found, model.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_the_checkpoint_lacks_does_not_rest() {
        let mut accounts = Accounts::default();
        *accounts.get_or_default(AccountId(1)) = AccountState { dirty: true, as_of: Lsn(7), ..AccountState::default() };
        accounts.rest_after(&[AccountId(1)], Lsn(6));
        assert_eq!(accounts.in_use().count(), 1);
        accounts.rest_after(&[AccountId(1)], Lsn(7));
        assert_eq!(accounts.in_use().count(), 0);
    }
}
