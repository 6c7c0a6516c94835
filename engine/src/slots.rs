//! The mailboxes of a shard in memory: as a [`Slot`] each while they are used, packed into some fifty bytes while nobody does.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Weak;

use roaring::RoaringBitmap;
use tokio::sync::Notify;

use crate::flags::{Flags, UidSet};
use crate::format::page::{ArchivedDirectoryEntry, DirectoryEntry, PageLocation};
use crate::ids::{AccountId, Lsn, MailboxId, ModSeq, Uid};
use crate::index::{Change, MailboxIndex};
use crate::packed::{Look, Merged, Packed, Reader, put_distance, put_number};
use crate::planted::{self, Bug};

/// What stays in memory of every mailbox: published state that needs no index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    pub mailbox: MailboxId,
    pub account: AccountId,
    /// Every change of this mailbox up to here is in.
    pub as_of: Lsn,
    pub special_use: u16,
    pub name: String,
    pub uid_validity: u32,
    pub uid_next: u32,
    pub exists: u32,
    pub unseen: u32,
    /// UIDs from here on have been claimed as `\Recent` by no session.
    pub recent_below: u32,
    pub highest_modseq: u64,
    /// Octets of all messages.
    pub size: u64,
}

/// What has been promised but is not durable yet. New commands are checked against this.
#[derive(Debug, Default)]
pub struct Tip {
    /// Operations between submission and publication.
    pub pending: u32,
    pub uid_next: u32,
    pub highest_modseq: u64,
    pub deleted: bool,
    pub expunged: RoaringBitmap,
    /// By flag bit: UIDs that will have it, and UIDs that will not.
    pub flags: BTreeMap<u8, (RoaringBitmap, RoaringBitmap)>,
    /// Pending mod-sequences, ascending.
    pub modified: Vec<(ModSeq, UidSet)>,
    /// Keywords that will exist, after those of the index.
    pub keywords: Vec<(u16, String)>,
}

impl Tip {
    /// Notes flags that `uids` will have and lose.
    pub fn change_flags(&mut self, uids: &UidSet, set: Flags, clear: Flags) {
        for (flags, becomes) in [(clear.without(set), false), (set, true)] {
            for bit in flags.bits() {
                let (on, off) = self.flags.entry(bit as u8).or_default();
                if becomes {
                    *on |= &uids.0;
                    *off -= &uids.0;
                } else {
                    *off |= &uids.0;
                    *on -= &uids.0;
                }
            }
        }
    }

    /// A message's flags at the tip, from its published ones.
    pub fn flags_of(&self, uid: Uid, published: Flags) -> Flags {
        let mut flags = published;
        for (&bit, (on, off)) in &self.flags {
            if on.contains(uid.0) {
                flags.0 |= 1 << bit;
            } else if off.contains(uid.0) {
                flags.0 &= !(1 << bit);
            }
        }
        flags
    }

    /// A message's mod-sequence at the tip.
    pub fn modseq_of(&self, uid: Uid, published: ModSeq) -> ModSeq {
        let newest = self.modified.iter().rev().find(|(_, uids)| uids.contains(uid));
        newest.map_or(published, |(modseq, _)| *modseq)
    }
}

/// Told when a mailbox's published state has changed.
#[derive(Debug, Default)]
pub struct Watcher {
    pub changed: Cell<bool>,
    pub notify: Notify,
}

impl Watcher {
    fn wake(&self) {
        self.changed.set(true);
        self.notify.notify_one();
    }
}

/// A mailbox in memory.
#[derive(Debug, Default)]
pub struct Slot {
    pub meta: Meta,
    page: PageLocation,
    delta_page: PageLocation,
    /// What the pages have: every change up to here.
    pub page_as_of: Lsn,
    /// Changes since the pages.
    pub delta: Vec<(Lsn, Change)>,
    /// Pages and delta, put together; may be dropped at any time.
    pub index: Option<Box<MailboxIndex>>,
    pub tip: Option<Box<Tip>>,
    pub watchers: Vec<Weak<Watcher>>,
    /// The checkpoint does not have this state.
    pub dirty: bool,
    /// The pages are damaged: the index is kept in memory until the next checkpoint writes it anew.
    pub rewrite: bool,
    /// Its pages are in a blob that should go: the next checkpoint writes them anew.
    pub moves: bool,
    /// While there is an index: no flags have been changed after this mod-sequence.
    pub flags_modseq: u64,
    /// When it was last used, for eviction of the index.
    pub used: u64,
    /// UIDs below this are claimed as `\Recent` by some session of this start, durably or not.
    pub recent_claimed: u32,
}

impl Slot {
    pub fn new(meta: Meta) -> Self {
        Self { meta, ..Self::default() }
    }

    /// Where its page lies, and the delta page that goes with it.
    pub fn pages(&self) -> (PageLocation, PageLocation) {
        (self.page, self.delta_page)
    }

    /// Notes a change that the pages do not have.
    pub fn push_change(&mut self, lsn: Lsn, change: Change) {
        if self.delta.is_empty() {
            // Most mailboxes see one delivery between two checkpoints.
            self.delta.reserve_exact(1);
        }
        self.delta.push((lsn, change));
    }

    /// Whether there is nothing of it that packing would lose.
    fn is_at_rest(&mut self) -> bool {
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        // A tip of nothing pending says what is published.
        let is_settled = self.tip.as_ref().is_none_or(|tip| tip.pending == 0);
        let is_idle = self.index.is_none() && is_settled && self.watchers.is_empty();
        is_idle && !self.dirty && !self.rewrite && !self.moves && self.delta.is_empty()
    }

    /// The tip, made from published state if nothing is pending.
    pub fn tip(&mut self) -> &mut Tip {
        let meta = &self.meta;
        self.tip.get_or_insert_with(|| {
            Box::new(Tip { uid_next: meta.uid_next, highest_modseq: meta.highest_modseq, ..Tip::default() })
        })
    }

    pub fn to_entry(&self) -> DirectoryEntry {
        let meta = &self.meta;
        DirectoryEntry {
            mailbox: meta.mailbox.0,
            account: meta.account.0,
            as_of: meta.as_of.0,
            page_as_of: self.page_as_of.0,
            deleted: false,
            special_use: meta.special_use,
            name: meta.name.clone(),
            uid_validity: meta.uid_validity,
            uid_next: meta.uid_next,
            exists: meta.exists,
            unseen: meta.unseen,
            recent_below: meta.recent_below,
            highest_modseq: meta.highest_modseq,
            size: meta.size,
            page: self.page,
            delta: self.delta_page,
        }
    }

    /// Counts the messages of the index: what was counted one by one may include some that damage has taken.
    pub fn recount(&mut self, index: &MailboxIndex) {
        let seen = index.with_flag(0).map_or(0, RoaringBitmap::len) as u32;
        self.meta.exists = index.messages.len() as u32;
        self.meta.unseen = self.meta.exists.saturating_sub(seen);
        self.meta.size = index.messages.uids_and_sizes_from(0).map(|(_, size)| size).sum();
    }

    /// Wakes whoever watches, and forgets who no longer does.
    pub fn wake_watchers(&mut self) {
        self.watchers.retain(|watcher| match watcher.upgrade() {
            Some(watcher) => {
                watcher.wake();
                true
            }
            None => false,
        });
    }

    /// Counts a change that the counters do not have yet.
    pub fn count(&mut self, change: &Change) {
        let meta = &mut self.meta;
        match change {
            Change::Place { message, flags } => {
                meta.uid_next = meta.uid_next.max(message.uid.0.saturating_add(1));
                meta.highest_modseq = meta.highest_modseq.max(message.modseq.0);
                meta.exists += 1;
                meta.size += message.size;
                meta.unseen += u32::from(!flags.contains(Flags::SEEN));
            }
            Change::Flags(change) => {
                meta.highest_modseq = meta.highest_modseq.max(change.modseq.0);
                meta.unseen = meta.unseen.saturating_add_signed(change.unseen_change);
            }
            Change::Expunge(expunge) => {
                if !planted::is_on(Bug::ForgetExpungeModSeq) {
                    meta.highest_modseq = meta.highest_modseq.max(expunge.modseq.0);
                }
                meta.exists = meta.exists.saturating_sub(expunge.uids.len() as u32);
                meta.unseen = meta.unseen.saturating_sub(expunge.unseen);
                meta.size = meta.size.saturating_sub(expunge.size);
                if planted::is_on(Bug::ReissueUid)
                    && let Some(last) = expunge.uids.last()
                    && last.0 + 1 == meta.uid_next
                {
                    meta.uid_next = last.0;
                }
            }
            Change::Keyword { .. } | Change::Relocate(_) | Change::Fold { .. } | Change::Base(_) => {}
        }
    }
}

/// Whether `watcher` has anything to look at, and clears it.
pub fn take_change(watcher: &Watcher) -> bool {
    watcher.changed.replace(false)
}

/// Names that most mailboxes have; they are packed into a byte.
const COMMON_NAMES: [&str; 15] = [
    "INBOX",
    "Drafts",
    "Sent",
    "Trash",
    "Junk",
    "Archive",
    "Spam",
    "Notes",
    "Templates",
    "Outbox",
    "Sent Items",
    "Sent Messages",
    "Deleted Items",
    "Deleted Messages",
    "Junk E-mail",
];

pub(crate) fn put_name(name: &str, out: &mut Vec<u8>) {
    match COMMON_NAMES.iter().position(|common| *common == name) {
        Some(number) => put_number((number as u64) << 1 | 1, out),
        None => {
            put_number((name.len() as u64) << 1, out);
            out.extend_from_slice(name.as_bytes());
        }
    }
}

pub(crate) fn take_name<'a>(reader: &mut Reader<'a>) -> &'a str {
    let number = reader.number();
    if number & 1 == 1 {
        return COMMON_NAMES[(number >> 1) as usize];
    }
    str::from_utf8(reader.bytes((number >> 1) as usize)).expect("packed from a string")
}

/// What a packed slot has besides.
mod part {
    pub const PAGE: u8 = 1;
    pub const DELTA_PAGE: u8 = 1 << 1;
    pub const PAGE_IS_OLDER: u8 = 1 << 2;
    pub const SPECIAL_USE: u8 = 1 << 3;
    pub const RECENT_CLAIMED: u8 = 1 << 4;
}

fn put_page(page: PageLocation, out: &mut Vec<u8>) {
    put_number(page.blob.into(), out);
    put_number(page.epoch.into(), out);
    put_number(page.offset, out);
    put_number(page.len.into(), out);
}

fn take_page(reader: &mut Reader<'_>) -> PageLocation {
    PageLocation { blob: reader.small(), epoch: reader.small(), offset: reader.number(), len: reader.small() }
}

/// What is packed of a slot.
struct Fields<'a> {
    mailbox: u64,
    account: u64,
    as_of: u64,
    page_as_of: u64,
    special_use: u16,
    recent_claimed: u32,
    name: &'a str,
    /// UIDVALIDITY, next UID, messages, unseen messages, and the UID from which on messages are recent.
    numbers: [u32; 5],
    highest_modseq: u64,
    size: u64,
    page: PageLocation,
    delta_page: PageLocation,
}

fn pack(slot: &Slot, out: &mut Vec<u8>) {
    let meta = &slot.meta;
    let fields = Fields {
        mailbox: meta.mailbox.0,
        account: meta.account.0,
        as_of: meta.as_of.0,
        page_as_of: slot.page_as_of.0,
        special_use: meta.special_use,
        recent_claimed: slot.recent_claimed,
        name: &meta.name,
        numbers: [meta.uid_validity, meta.uid_next, meta.exists, meta.unseen, meta.recent_below],
        highest_modseq: meta.highest_modseq,
        size: meta.size,
        page: slot.page,
        delta_page: slot.delta_page,
    };
    fields.pack(out);
}

/// Packs a mailbox as a checkpoint has it.
pub(crate) fn pack_entry(entry: &ArchivedDirectoryEntry, out: &mut Vec<u8>) {
    let numbers = [&entry.uid_validity, &entry.uid_next, &entry.exists, &entry.unseen, &entry.recent_below];
    let fields = Fields {
        mailbox: entry.mailbox.to_native(),
        account: entry.account.to_native(),
        as_of: entry.as_of.to_native(),
        page_as_of: entry.page_as_of.to_native(),
        special_use: entry.special_use.to_native(),
        recent_claimed: 0,
        name: &entry.name,
        numbers: numbers.map(|number| number.to_native()),
        highest_modseq: entry.highest_modseq.to_native(),
        size: entry.size.to_native(),
        page: (&entry.page).into(),
        delta_page: (&entry.delta).into(),
    };
    fields.pack(out);
}

impl Fields<'_> {
    fn pack(&self, out: &mut Vec<u8>) {
        let parts = [
            (part::PAGE, !self.page.is_none()),
            (part::DELTA_PAGE, !self.delta_page.is_none()),
            (part::PAGE_IS_OLDER, self.page_as_of != self.as_of),
            (part::SPECIAL_USE, self.special_use != 0),
            (part::RECENT_CLAIMED, self.recent_claimed != 0),
        ];
        let present = parts.iter().filter(|(_, is_there)| *is_there).fold(0, |parts, (part, _)| parts | part);
        out.push(present);
        if present & part::PAGE != 0 {
            put_page(self.page, out);
        }
        if present & part::DELTA_PAGE != 0 {
            put_page(self.delta_page, out);
        }
        put_distance(self.account, self.mailbox, out);
        put_distance(self.as_of, self.mailbox, out);
        if present & part::PAGE_IS_OLDER != 0 {
            put_distance(self.page_as_of, self.as_of, out);
        }
        if present & part::SPECIAL_USE != 0 {
            put_number(self.special_use.into(), out);
        }
        if present & part::RECENT_CLAIMED != 0 {
            put_number(self.recent_claimed.into(), out);
        }
        put_name(self.name, out);
        self.numbers.iter().for_each(|&number| put_number(number.into(), out));
        put_number(self.highest_modseq, out);
        put_number(self.size, out);
    }
}

/// The pages of a packed slot.
fn pages_of(bytes: &[u8]) -> (PageLocation, PageLocation) {
    let mut reader = Reader(&bytes[1..]);
    let mut page = |part| if bytes[0] & part == 0 { PageLocation::default() } else { take_page(&mut reader) };
    (page(part::PAGE), page(part::DELTA_PAGE))
}

fn unpack(mailbox: MailboxId, bytes: &[u8]) -> Box<Slot> {
    let present = bytes[0];
    let mut reader = Reader(&bytes[1..]);
    let has = |part| present & part != 0;
    let page = if has(part::PAGE) { take_page(&mut reader) } else { PageLocation::default() };
    let delta_page = if has(part::DELTA_PAGE) { take_page(&mut reader) } else { PageLocation::default() };
    let account = AccountId(reader.distance(mailbox.0));
    let as_of = Lsn(reader.distance(mailbox.0));
    let page_as_of = if has(part::PAGE_IS_OLDER) { Lsn(reader.distance(as_of.0)) } else { as_of };
    let special_use = if has(part::SPECIAL_USE) { reader.small() as u16 } else { 0 };
    let recent_claimed = if has(part::RECENT_CLAIMED) { reader.small() } else { 0 };
    let meta = Meta {
        mailbox,
        account,
        as_of,
        special_use,
        name: take_name(&mut reader).to_owned(),
        uid_validity: reader.small(),
        uid_next: reader.small(),
        exists: reader.small(),
        unseen: reader.small(),
        recent_below: reader.small(),
        highest_modseq: reader.number(),
        size: reader.number(),
    };
    Box::new(Slot { meta, page, delta_page, page_as_of, recent_claimed, ..Slot::default() })
}

/// A slot to look at.
pub type SlotRef<'a> = Look<'a, Slot>;

/// Slots that are looked through before others have their turn: some 100 us.
pub(crate) const SLOTS_AT_ONCE: usize = 1024;

/// All slots of a shard.
#[derive(Debug, Default)]
pub struct Slots {
    in_use: BTreeMap<MailboxId, Box<Slot>>,
    /// Also what some of those in use were like before.
    at_rest: Packed,
    len: usize,
    /// How many pages that slots refer to each index blob has.
    pages: BTreeMap<u32, u32>,
    /// Those whose index was put together; it may have been dropped since.
    indexed: BTreeSet<MailboxId>,
    /// Where [`Slots::rest_some`] goes on.
    looked_at: MailboxId,
    scratch: Vec<u8>,
}

impl Slots {
    pub fn get(&self, mailbox: &MailboxId) -> Option<SlotRef<'_>> {
        if let Some(slot) = self.in_use.get(mailbox) {
            return Some(Look::InUse(slot));
        }
        self.at_rest.get(mailbox.0).map(|bytes| Look::Unpacked(unpack(*mailbox, bytes)))
    }

    /// A slot that is in use from now on, until it is told to rest.
    pub fn get_mut(&mut self, mailbox: &MailboxId) -> Option<&mut Slot> {
        if !self.in_use.contains_key(mailbox) {
            let bytes = self.at_rest.get(mailbox.0)?;
            self.in_use.insert(*mailbox, unpack(*mailbox, bytes));
        }
        self.in_use.get_mut(mailbox).map(Box::as_mut)
    }

    pub fn contains_key(&self, mailbox: &MailboxId) -> bool {
        self.in_use.contains_key(mailbox) || self.at_rest.get(mailbox.0).is_some()
    }

    /// Puts a slot in place of the one there may be.
    pub fn insert(&mut self, mailbox: MailboxId, slot: Slot) {
        let old = self.in_use.get(&mailbox).map(|old| old.pages());
        match old.or_else(|| self.at_rest.get(mailbox.0).map(pages_of)) {
            Some(pages) => self.count_pages(pages, false),
            None => self.len += 1,
        }
        self.count_pages(slot.pages(), true);
        self.in_use.insert(mailbox, Box::new(slot));
    }

    /// Puts a slot that nobody uses where there is none, packed by [`pack_entry`]. Those that ascend are soonest put.
    pub(crate) fn put_packed(&mut self, mailbox: MailboxId, packed: &[u8], pages: (PageLocation, PageLocation)) {
        self.at_rest.put(mailbox.0, packed);
        self.len += 1;
        self.count_pages(pages, true);
    }

    fn pack(&mut self, mailbox: MailboxId, slot: &Slot) {
        self.scratch.clear();
        pack(slot, &mut self.scratch);
        self.at_rest.put(mailbox.0, &self.scratch);
    }

    pub fn remove(&mut self, mailbox: &MailboxId) -> Option<Box<Slot>> {
        let in_use = self.in_use.remove(mailbox);
        let slot = in_use.or_else(|| self.at_rest.get(mailbox.0).map(|bytes| unpack(*mailbox, bytes)))?;
        self.at_rest.remove(mailbox.0);
        self.len -= 1;
        self.count_pages(slot.pages(), false);
        Some(slot)
    }

    /// Lets a slot refer to other pages, which have everything up to `as_of`.
    pub fn set_pages(&mut self, mailbox: &MailboxId, page: PageLocation, delta_page: PageLocation, as_of: Lsn) {
        let Some(slot) = self.get_mut(mailbox) else { return };
        let old = slot.pages();
        (slot.page, slot.delta_page, slot.page_as_of) = (page, delta_page, as_of);
        self.count_pages(old, false);
        self.count_pages((page, delta_page), true);
    }

    fn count_pages(&mut self, (page, delta_page): (PageLocation, PageLocation), is_new: bool) {
        for page in [page, delta_page].into_iter().filter(|page| !page.is_none()) {
            let count = self.pages.entry(page.blob).or_default();
            *count = if is_new { *count + 1 } else { *count - 1 };
            if *count == 0 {
                self.pages.remove(&page.blob);
            }
        }
    }

    /// How many pages that slots refer to each index blob has; none has none.
    pub fn pages_by_blob(&self) -> &BTreeMap<u32, u32> {
        &self.pages
    }

    /// All slots.
    pub fn iter(&self) -> impl Iterator<Item = (MailboxId, SlotRef<'_>)> {
        self.iter_from(MailboxId(0))
    }

    pub fn keys(&self) -> impl Iterator<Item = MailboxId> {
        self.keys_from(MailboxId(0))
    }

    /// The mailboxes from one on, ascending.
    pub fn keys_from(&self, from: MailboxId) -> impl Iterator<Item = MailboxId> {
        self.merged_from(from).map(|(mailbox, _)| mailbox)
    }

    /// The slots from a mailbox on, ascending.
    pub fn iter_from(&self, from: MailboxId) -> impl Iterator<Item = (MailboxId, SlotRef<'_>)> {
        self.merged_from(from).map(|(mailbox, found)| match found {
            Found::InUse(slot) => (mailbox, Look::InUse(slot)),
            Found::AtRest(bytes) => (mailbox, Look::Unpacked(unpack(mailbox, bytes))),
        })
    }

    fn merged_from(&self, from: MailboxId) -> impl Iterator<Item = (MailboxId, Found<'_>)> {
        let in_use = self.in_use.range(from..).map(|(mailbox, slot)| (*mailbox, Found::InUse(slot)));
        let at_rest = self.at_rest.iter_from(from.0).map(|(mailbox, bytes)| (MailboxId(mailbox), Found::AtRest(bytes)));
        Merged::of(in_use, at_rest)
    }

    /// Marks those of the next `count` mailboxes from `from` on that have pages in a blob, for the next checkpoint to write
    /// these anew; returns how many it has marked, and the mailbox after them.
    pub fn move_pages_of(&mut self, blob: u32, from: MailboxId, count: usize) -> (usize, Option<MailboxId>) {
        let mut all = self.merged_from(from);
        let some = all.by_ref().take(count);
        let is_there = |page: PageLocation| !page.is_none() && page.blob == blob;
        let concerned = some.filter(|(_, found)| {
            let (page, delta_page) = match found {
                Found::InUse(slot) => slot.pages(),
                Found::AtRest(bytes) => pages_of(bytes),
            };
            is_there(page) || is_there(delta_page)
        });
        let concerned: Vec<MailboxId> = concerned.map(|(mailbox, _)| mailbox).collect();
        let next = all.next().map(|(mailbox, _)| mailbox);
        drop(all);
        let marked = concerned.len();
        for mailbox in concerned {
            let Some(slot) = self.get_mut(&mailbox) else { continue };
            slot.dirty = true;
            slot.moves = true;
        }
        (marked, next)
    }

    /// Those that are in use. All others are at rest: published, and just as the checkpoint has them.
    pub fn in_use(&self) -> impl Iterator<Item = (MailboxId, &Slot)> {
        self.in_use.iter().map(|(mailbox, slot)| (*mailbox, &**slot))
    }

    /// Those in use from a mailbox on, ascending.
    pub fn in_use_from(&self, from: MailboxId) -> impl Iterator<Item = (MailboxId, &Slot)> {
        self.in_use.range(from..).map(|(mailbox, slot)| (*mailbox, &**slot))
    }

    pub fn in_use_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.in_use.values_mut().map(Box::as_mut)
    }

    /// Every slot, all of them in use afterwards.
    pub fn all_mut(&mut self) -> impl Iterator<Item = (MailboxId, &mut Slot)> {
        for (mailbox, bytes) in self.at_rest.iter_from(0) {
            let mailbox = MailboxId(mailbox);
            self.in_use.entry(mailbox).or_insert_with(|| unpack(mailbox, bytes));
        }
        self.in_use.iter_mut().map(|(mailbox, slot)| (*mailbox, &mut **slot))
    }

    /// Packs a slot if nobody uses it.
    pub fn rest(&mut self, mailbox: MailboxId) {
        let Some(slot) = self.in_use.get_mut(&mailbox) else { return };
        if !slot.is_at_rest() {
            return;
        }
        if let Some(slot) = self.in_use.remove(&mailbox) {
            self.pack(mailbox, &slot);
        }
    }

    /// Packs those of the next `count` slots that nobody uses any more. Called now and then it comes round to all.
    pub fn rest_some(&mut self, count: usize) {
        let next: Vec<MailboxId> =
            self.in_use.range(self.looked_at..).take(count).map(|(mailbox, _)| *mailbox).collect();
        self.looked_at = if next.len() < count { MailboxId(0) } else { MailboxId(next[count - 1].0 + 1) };
        next.into_iter().for_each(|mailbox| self.rest(mailbox));
    }

    /// Notes that a mailbox has an index in memory.
    pub fn note_index(&mut self, mailbox: MailboxId) {
        self.indexed.insert(mailbox);
    }

    /// The mailboxes that have an index in memory.
    pub fn with_index(&mut self) -> Vec<(MailboxId, &Slot)> {
        let in_use = &self.in_use;
        self.indexed.retain(|mailbox| in_use.get(mailbox).is_some_and(|slot| slot.index.is_some()));
        self.indexed.iter().map(|mailbox| (*mailbox, &*in_use[mailbox])).collect()
    }

    pub fn sizes(&self) -> Sizes {
        let in_use = self.in_use.len();
        Sizes { in_use, at_rest: self.len - in_use, at_rest_bytes: self.at_rest.memory_bytes() }
    }
}

/// How many mailboxes there are, and what memory those at rest take.
pub struct Sizes {
    pub in_use: usize,
    pub at_rest: usize,
    pub at_rest_bytes: usize,
}

enum Found<'a> {
    InUse(&'a Slot),
    AtRest(&'a [u8]),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page() -> impl Strategy<Value = PageLocation> {
        let there = (0..40_u32, 1..9_u32, any::<u64>(), 1..u32::MAX)
            .prop_map(|(blob, epoch, offset, len)| PageLocation { blob, epoch, offset, len });
        prop_oneof![Just(PageLocation::default()), there]
    }

    fn slot() -> impl Strategy<Value = Slot> {
        let name = prop_oneof![Just("INBOX".to_owned()), Just("Sent".to_owned()), any::<String>()];
        let counters = any::<(u32, u32, u32, u32, u32, u64, u64)>();
        let rest = (any::<u64>(), any::<u64>(), any::<u16>(), any::<u32>(), any::<bool>());
        (name, counters, rest, page(), page()).prop_map(|(name, counters, rest, page, delta_page)| {
            let (uid_validity, uid_next, exists, unseen, recent_below, highest_modseq, size) = counters;
            let (account, as_of, special_use, recent_claimed, is_older) = rest;
            let meta = Meta {
                mailbox: MailboxId(0),
                account: AccountId(account),
                as_of: Lsn(as_of),
                special_use: special_use % 3,
                name,
                uid_validity,
                uid_next,
                exists,
                unseen,
                recent_below,
                highest_modseq,
                size,
            };
            let page_as_of = Lsn(if is_older { as_of / 2 } else { as_of });
            Slot { meta, page, delta_page, page_as_of, recent_claimed: recent_claimed % 4, ..Slot::default() }
        })
    }

    /// What packing must keep.
    fn kept(slot: &Slot) -> (Meta, (PageLocation, PageLocation), Lsn, u32) {
        (slot.meta.clone(), slot.pages(), slot.page_as_of, slot.recent_claimed)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64, Slot),
        PutPacked(u64, Slot),
        Remove(u64),
        Change(u64, u32),
        SetPages(u64, PageLocation, PageLocation),
        Rest(u64),
        RestSome(usize),
        Move(u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        let id = || 1..30_u64;
        prop_oneof![
            (id(), slot()).prop_map(|(id, slot)| Step::Insert(id, slot)),
            (id(), slot()).prop_map(|(id, slot)| Step::PutPacked(id, slot)),
            id().prop_map(Step::Remove),
            (id(), any::<u32>()).prop_map(|(id, exists)| Step::Change(id, exists)),
            (id(), page(), page()).prop_map(|(id, page, delta)| Step::SetPages(id, page, delta)),
            id().prop_map(Step::Rest),
            (1..9_usize).prop_map(Step::RestSome),
            (0..40_u32).prop_map(Step::Move),
        ]
    }

    impl Clone for Slot {
        fn clone(&self) -> Self {
            let (meta, page, delta_page, page_as_of, recent_claimed) =
                (self.meta.clone(), self.page, self.delta_page, self.page_as_of, self.recent_claimed);
            Self { meta, page, delta_page, page_as_of, recent_claimed, ..Self::default() }
        }
    }

    fn put_packed(slots: &mut Slots, id: MailboxId, slot: &Slot) {
        let mut packed = Vec::new();
        pack(slot, &mut packed);
        slots.put_packed(id, &packed, slot.pages());
    }

    fn with_id(mut slot: Slot, id: u64) -> Slot {
        slot.meta.mailbox = MailboxId(id);
        slot
    }

    proptest! {
        #[test]
        fn slots_are_a_map_however_they_rest(steps in prop::collection::vec(step(), 1..200)) {
            let mut slots = Slots::default();
            let mut model: BTreeMap<MailboxId, Slot> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(id, slot) => {
                        let (id, slot) = (MailboxId(id), with_id(slot, id));
                        slots.insert(id, slot.clone());
                        model.insert(id, slot);
                    }
                    Step::PutPacked(id, slot) => {
                        let (id, slot) = (MailboxId(id), with_id(slot, id));
                        slots.remove(&id);
                        put_packed(&mut slots, id, &slot);
                        prop_assert!(slots.in_use().all(|(other, _)| other != id));
                        model.insert(id, slot);
                    }
                    Step::Remove(id) => {
                        let id = MailboxId(id);
                        let removed = slots.remove(&id).map(|slot| kept(&slot));
                        prop_assert_eq!(removed, model.remove(&id).map(|slot| kept(&slot)));
                    }
                    Step::Change(id, exists) => {
                        let id = MailboxId(id);
                        let there = slots.get_mut(&id).map(|slot| slot.meta.exists = exists).is_some();
                        prop_assert_eq!(there, model.get_mut(&id).map(|slot| slot.meta.exists = exists).is_some());
                    }
                    Step::SetPages(id, page, delta_page) => {
                        let id = MailboxId(id);
                        slots.set_pages(&id, page, delta_page, Lsn(id.0));
                        if let Some(slot) = model.get_mut(&id) {
                            (slot.page, slot.delta_page, slot.page_as_of) = (page, delta_page, Lsn(id.0));
                        }
                    }
                    Step::Rest(id) => slots.rest(MailboxId(id)),
                    Step::RestSome(count) => slots.rest_some(count),
                    Step::Move(blob) => {
                        let mut next = Some(MailboxId(0));
                        while let Some(from) = next {
                            next = slots.move_pages_of(blob, from, 3).1;
                        }
                        for (id, slot) in &model {
                            let concerned = [slot.page, slot.delta_page].iter().any(|it| !it.is_none() && it.blob == blob);
                            let moves = slots.in_use().any(|(other, slot)| other == *id && slot.moves && slot.dirty);
                            prop_assert!(moves || !concerned);
                        }
                    }
                }
                let found: Vec<_> = slots.iter().map(|(id, slot)| (id, kept(&slot))).collect();
                let expected: Vec<_> = model.iter().map(|(id, slot)| (*id, kept(slot))).collect();
                prop_assert_eq!(found, expected);
                let mut pages: BTreeMap<u32, u32> = BTreeMap::new();
                for page in model.values().flat_map(|slot| [slot.page, slot.delta_page]).filter(|page| !page.is_none()) {
                    *pages.entry(page.blob).or_default() += 1;
                }
                prop_assert_eq!(slots.pages_by_blob(), &pages);
                let sizes = slots.sizes();
                prop_assert_eq!(sizes.in_use + sizes.at_rest, model.len());
            }
            let all: Vec<MailboxId> = slots.keys().collect();
            prop_assert_eq!(all, model.keys().copied().collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_somebody_uses_does_not_rest() {
        let id = MailboxId(5);
        let mut slots = Slots::default();
        slots.insert(id, with_id(Slot::default(), 5));
        let is_in_use = |slots: &Slots| slots.in_use().next().is_some();
        let uses: [fn(&mut Slot); 6] = [
            |slot| slot.dirty = true,
            |slot| slot.rewrite = true,
            |slot| slot.moves = true,
            |slot| slot.index = Some(Box::default()),
            |slot| slot.tip().pending = 1,
            |slot| slot.push_change(Lsn(1), Change::Relocate(Vec::new())),
        ];
        for change in uses {
            change(slots.get_mut(&id).expect("there"));
            slots.rest(id);
            assert!(is_in_use(&slots));
            slots.remove(&id);
            put_packed(&mut slots, id, &with_id(Slot::default(), 5));
            assert!(!is_in_use(&slots));
        }
        let watcher = std::rc::Rc::new(Watcher::default());
        slots.get_mut(&id).expect("there").watchers.push(std::rc::Rc::downgrade(&watcher));
        slots.rest(id);
        assert!(is_in_use(&slots));
        drop(watcher);
        slots.rest(id);
        assert!(!is_in_use(&slots));
    }
}
