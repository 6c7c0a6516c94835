//! Taking in the directories of a shard's index blobs at a start: all of them at once, in the order of mailboxes, so that each
//! mailbox is packed once, as the newest of them has it, and put after those before it.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::ops::Range;
use std::sync::Arc;

use crate::accounts::{self, Accounts};
use crate::format::FormatError;
use crate::format::frame::Unpacker;
use crate::format::manifest::IndexEntry;
use crate::format::page::{
    ArchivedDirectoryAccount, ArchivedDirectoryEntry, DirectoryPage, DirectoryPart, PAGE_HEADER_BYTES, PageLocation,
    RecordsPage, claimed_page_len, open_directory_page, view,
};
use crate::format::record::AccountRecord;
use crate::format::segment::FooterEntry;
use crate::ids::{AccountId, Lsn, MailboxId, ShardId};
use crate::packed::Reader;
use crate::slots::{self, put_name, take_name};
use crate::state::State;
use crate::storage::{BlobName, BlobStore, SegmentName, Storage, StorageError};

/// Directories are read in pieces of this size.
const READ_BYTES: usize = 1 << 20;

/// Why a directory cannot be used.
enum Unusable {
    Storage(StorageError),
    Format(FormatError),
}

impl From<StorageError> for Unusable {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl From<FormatError> for Unusable {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

/// A mailbox of a directory, its slot packed.
struct Entry {
    mailbox: MailboxId,
    account: AccountId,
    as_of: Lsn,
    uid_validity: u32,
    pages: (PageLocation, PageLocation),
    name: Range<usize>,
    slot: Range<usize>,
}

/// One directory, read page by page.
struct Directory<'a, S: Storage> {
    blobs: &'a S::Blobs,
    entry: &'a IndexEntry,
    /// What comes next of it in `bytes`, and where these end in the directory.
    read: usize,
    bytes: Vec<u8>,
    bytes_end: u64,
    /// The mailboxes of the page that was opened last, and how many of them have been taken.
    mailboxes: Vec<Entry>,
    taken: usize,
    packed: Vec<u8>,
    last: Option<MailboxId>,
}

/// What stands in directories besides mailboxes that are there.
#[derive(Default)]
struct Others {
    deleted: Vec<(MailboxId, Lsn)>,
    accounts: Vec<Account>,
    /// What directories say of accounts, packed.
    packed: Vec<u8>,
    records: Vec<(AccountId, Reverse<usize>, Lsn, Arc<AccountRecord>)>,
    listed: Vec<(usize, RecordsPage)>,
}

/// What a directory says of an account besides its mailboxes.
struct Account {
    account: AccountId,
    newness: Reverse<usize>,
    packed: Range<usize>,
}

/// A mailbox of an account.
struct Link {
    account: AccountId,
    mailbox: MailboxId,
    as_of: Lsn,
    uid_validity: u32,
    /// Where its name stands among the names.
    name: u32,
}

impl<'a, S: Storage> Directory<'a, S> {
    fn new(blobs: &'a S::Blobs, entry: &'a IndexEntry) -> Self {
        Self {
            blobs,
            entry,
            read: 0,
            bytes: Vec::new(),
            bytes_end: 0,
            mailboxes: Vec::new(),
            taken: 0,
            packed: Vec::new(),
            last: None,
        }
    }

    /// Lets `bytes` have `len` more bytes of the directory, if there are any.
    async fn fill(&mut self, len: usize) -> Result<(), Unusable> {
        let entry = self.entry;
        if self.bytes.len() - self.read >= len || self.bytes_end == entry.directory_len {
            return Ok(());
        }
        self.bytes.drain(..self.read);
        self.read = 0;
        let left = entry.directory_len - self.bytes_end;
        let want = READ_BYTES.max(len - self.bytes.len()).min(usize::try_from(left).unwrap_or(usize::MAX));
        let name = BlobName::Index { blob: entry.blob, epoch: entry.epoch };
        let more = match self.blobs.get(name, entry.directory_offset + self.bytes_end, want).await {
            Err(StorageError::NotFound(_)) => Vec::new(),
            more => more?,
        };
        self.bytes_end += more.len() as u64;
        if more.len() != want {
            let (needed, available) = (entry.directory_len, self.bytes_end);
            return Err(FormatError::Short { what: "index directory", needed, available }.into());
        }
        self.bytes.extend_from_slice(&more);
        Ok(())
    }

    /// The next mailbox, after pages that have none.
    async fn next(
        &mut self,
        newness: usize,
        unpacker: &mut Unpacker,
        others: &mut Others,
    ) -> Result<Option<MailboxId>, Unusable> {
        while self.taken == self.mailboxes.len() {
            self.fill(PAGE_HEADER_BYTES).await?;
            if self.bytes.len() == self.read {
                return Ok(None);
            }
            let len = claimed_page_len(&self.bytes[self.read..]).unwrap_or_default();
            self.fill(len.max(PAGE_HEADER_BYTES)).await?;
            self.open_page(newness, unpacker, others)?;
        }
        Ok(Some(self.mailboxes[self.taken].mailbox))
    }

    fn open_page(&mut self, newness: usize, unpacker: &mut Unpacker, others: &mut Others) -> Result<(), FormatError> {
        let (part, len) = open_directory_page(&self.bytes[self.read..], unpacker)?;
        self.read += len;
        self.mailboxes.clear();
        self.packed.clear();
        self.taken = 0;
        let archive = match part {
            DirectoryPart::Entries(archive) => archive,
            DirectoryPart::Records(page) => {
                others.listed.push((newness, page));
                return Ok(());
            }
        };
        let page = view::<DirectoryPage>(&archive)?;
        for entry in page.mailboxes.iter() {
            let mailbox = MailboxId(entry.mailbox.to_native());
            if entry.deleted {
                others.deleted.push((mailbox, Lsn(entry.as_of.to_native())));
                continue;
            }
            if self.last.is_some_and(|last| last >= mailbox) {
                let detail = format!("mailbox {mailbox} in the directory, which should ascend");
                return Err(FormatError::Misplaced { what: "index page", detail });
            }
            self.last = Some(mailbox);
            self.push_mailbox(mailbox, entry);
        }
        for entry in page.accounts.iter() {
            let start = others.packed.len();
            accounts::pack_entry(entry, &mut others.packed);
            let (account, packed) = (AccountId(entry.account.to_native()), start..others.packed.len());
            others.accounts.push(Account { account, newness: Reverse(newness), packed });
        }
        let records = page.directory.iter().map(|entry| {
            let record = to_record(entry);
            (record.account, Reverse(newness), Lsn(entry.as_of.to_native()), Arc::new(record))
        });
        others.records.extend(records);
        Ok(())
    }

    fn push_mailbox(&mut self, mailbox: MailboxId, entry: &ArchivedDirectoryEntry) {
        let start = self.packed.len();
        put_name(&entry.name, &mut self.packed);
        let name_end = self.packed.len();
        slots::pack_entry(entry, &mut self.packed);
        self.mailboxes.push(Entry {
            mailbox,
            account: AccountId(entry.account.to_native()),
            as_of: Lsn(entry.as_of.to_native()),
            uid_validity: entry.uid_validity.to_native(),
            pages: ((&entry.page).into(), (&entry.delta).into()),
            name: start..name_end,
            slot: name_end..self.packed.len(),
        });
    }
}

fn to_record(entry: &ArchivedDirectoryAccount) -> AccountRecord {
    AccountRecord {
        account: AccountId(entry.account.to_native()),
        name: entry.name.as_str().to_owned(),
        shard: ShardId(entry.shard.to_native()),
        password: entry.password.as_str().to_owned(),
        deleted: entry.deleted,
        uid_validity_floor: entry.uid_validity_floor.to_native(),
    }
}

/// Records that directories list of the segment in which replay begins.
#[derive(Default)]
pub(crate) struct ListedRecords(Vec<RecordsPage>);

impl ListedRecords {
    /// All records of a segment before `end`, if those are known.
    pub fn before(self, segment: SegmentName, end: u64) -> Option<Vec<FooterEntry>> {
        let (mut entries, mut known) = (Vec::new(), 0);
        let is_of_segment = |page: &RecordsPage| (page.segment, page.epoch) == (segment.segment, segment.epoch);
        for page in self.0.into_iter().filter(is_of_segment) {
            if page.first == 0 {
                entries.clear();
            }
            if page.first as usize != entries.len() {
                return None;
            }
            entries.extend(page.entries);
            known = page.end;
        }
        (known == end).then_some(entries)
    }
}

/// Takes in the directories of a shard's index blobs. `state` is empty, and of no use if that fails.
pub(crate) async fn restore_index<S: Storage>(
    blobs: &S::Blobs,
    indexes: &[IndexEntry],
    state: &mut State,
) -> Result<Result<ListedRecords, (IndexEntry, FormatError)>, StorageError> {
    let first = indexes.iter().rposition(|entry| entry.full).unwrap_or(0);
    let mut directories: Vec<Directory<'_, S>> =
        indexes[first..].iter().map(|entry| Directory::new(blobs, entry)).collect();
    let mut unpacker = Unpacker::default();
    let mut others = Others::default();
    let (mut links, mut names) = (Vec::new(), Vec::new());
    // By mailbox, and the newest directory first.
    let mut next: BinaryHeap<Reverse<(MailboxId, Reverse<usize>)>> = BinaryHeap::new();
    let mut to_advance: Vec<usize> = (0..directories.len()).collect();
    loop {
        for newness in to_advance.drain(..) {
            let directory = &mut directories[newness];
            match directory.next(newness, &mut unpacker, &mut others).await {
                Ok(mailbox) => next.extend(mailbox.map(|mailbox| Reverse((mailbox, Reverse(newness))))),
                Err(Unusable::Storage(error)) => return Err(error),
                Err(Unusable::Format(error)) => return Ok(Err((directory.entry.clone(), error))),
            }
        }
        let Some(Reverse((mailbox, Reverse(newest)))) = next.pop() else { break };
        let directory = &mut directories[newest];
        let entry = &directory.mailboxes[directory.taken];
        state.slots.put_packed(mailbox, &directory.packed[entry.slot.clone()], entry.pages);
        let name = u32::try_from(names.len()).expect("no shard has 4 GiB of names");
        names.extend_from_slice(&directory.packed[entry.name.clone()]);
        let Entry { account, as_of, uid_validity, .. } = *entry;
        links.push(Link { account, mailbox, as_of, uid_validity, name });
        directory.taken += 1;
        to_advance.push(newest);
        while let Some(&Reverse((other, Reverse(older)))) = next.peek()
            && other == mailbox
        {
            next.pop();
            directories[older].taken += 1;
            to_advance.push(older);
        }
    }
    drop(directories);
    if !others.deleted.is_empty() {
        let deleted: BTreeSet<MailboxId> = others.deleted.iter().map(|(mailbox, _)| *mailbox).collect();
        deleted.iter().for_each(|mailbox| _ = state.slots.remove(mailbox));
        links.retain(|link| !deleted.contains(&link.mailbox));
    }
    state.deleted.extend(others.deleted);
    restore_accounts(&mut state.accounts, others.accounts, &others.packed, links, &names);
    // The newest of each comes first.
    others.records.sort_by_key(|&(account, newness, ..)| (account, newness));
    others.records.dedup_by_key(|(account, ..)| *account);
    state.directory =
        others.records.into_iter().map(|(account, _, as_of, record)| (account, (as_of, record))).collect();
    others.listed.sort_by_key(|(newness, _)| *newness);
    Ok(Ok(ListedRecords(others.listed.into_iter().map(|(_, page)| page).collect())))
}

/// Puts each account together from what directories say of it and of its mailboxes.
fn restore_accounts(
    accounts: &mut Accounts,
    mut entries: Vec<Account>,
    packed: &[u8],
    mut links: Vec<Link>,
    names: &[u8],
) {
    entries.sort_by_key(|entry| (entry.account, entry.newness));
    links.sort_by_key(|link| link.account);
    let (mut entries, mut links) = (&entries[..], &links[..]);
    let mut mailboxes: Vec<(&str, Lsn, MailboxId)> = Vec::new();
    while let Some(account) =
        entries.first().map(|it| it.account).into_iter().chain(links.first().map(|it| it.account)).min()
    {
        let of_account = entries.partition_point(|entry| entry.account == account);
        let (said, rest) = entries.split_at(of_account);
        entries = rest;
        let of_account = links.iter().take_while(|link| link.account == account).count();
        let (linked, rest) = links.split_at(of_account);
        links = rest;
        mailboxes.clear();
        mailboxes.extend(linked.iter().map(|link| {
            let name = take_name(&mut Reader(&names[link.name as usize..]));
            (name, link.as_of, link.mailbox)
        }));
        // While one mailbox takes the name of another, the directory may have it twice: the newer entry has it.
        mailboxes.sort_by_key(|&(name, as_of, _)| (name, Reverse(as_of)));
        mailboxes.dedup_by_key(|(name, ..)| *name);
        let uid_validity_next = linked.iter().map(|link| link.uid_validity.saturating_add(1)).max().unwrap_or(0);
        let said = said.iter().map(|entry| &packed[entry.packed.clone()]);
        accounts.put_restored(account, said, &mailboxes, uid_validity_next);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::format::codec::Wire;
    use crate::format::frame::Packer;
    use crate::format::page::{AccountEntry, DirectoryAccount, DirectoryEntry, PageKind, archive, put_page};
    use crate::ids::{Epoch, SegmentId};
    use crate::io::sim::{Sim, SimIo};
    use crate::storage::local::Local;

    const SEGMENT: SegmentName = SegmentName { segment: SegmentId(3), epoch: Epoch(1) };

    /// What a directory says: mailboxes, each with an account and the number of a name, those deleted, accounts with a
    /// UIDVALIDITY and the number of a subscription, and account records.
    #[derive(Clone, Debug)]
    struct Said {
        mailboxes: BTreeMap<u64, (u64, u8)>,
        deleted: Vec<u64>,
        accounts: BTreeMap<u64, (u32, u8)>,
        records: BTreeMap<u64, u8>,
        full: bool,
        entries_per_page: usize,
    }

    fn said() -> impl Strategy<Value = Said> {
        let mailboxes = prop::collection::btree_map(1..40_u64, (1..6_u64, 0..9_u8), 0..30);
        let deleted = prop::collection::vec(1..40_u64, 0..3);
        let accounts = prop::collection::btree_map(1..9_u64, (1..9_u32, 0..9_u8), 0..6);
        let records = prop::collection::btree_map(1..9_u64, any::<u8>(), 0..6);
        (mailboxes, deleted, accounts, records, prop::bool::weighted(0.2), 1..20_usize).prop_map(
            |(mailboxes, deleted, accounts, records, full, entries_per_page)| Said {
                mailboxes,
                deleted,
                accounts,
                records,
                full,
                entries_per_page,
            },
        )
    }

    fn name_of(number: u8) -> String {
        if number < 3 { ["INBOX", "Sent", "Junk"][usize::from(number)].to_owned() } else { format!("name {number}") }
    }

    fn entry_of(mailbox: u64, account: u64, name: u8, lsn: u64) -> DirectoryEntry {
        DirectoryEntry {
            mailbox,
            account,
            as_of: lsn * 100 + mailbox,
            page_as_of: lsn * 100,
            name: name_of(name),
            uid_validity: 7 + name as u32,
            uid_next: 9,
            page: PageLocation { blob: lsn as u32, epoch: 1, offset: mailbox, len: 5 },
            ..DirectoryEntry::default()
        }
    }

    impl Said {
        fn pages(&self, lsn: u64) -> Vec<u8> {
            let mailboxes =
                self.mailboxes.iter().map(|(&mailbox, &(account, name))| entry_of(mailbox, account, name, lsn));
            let mailboxes: Vec<DirectoryEntry> = mailboxes.collect();
            let mut pages: Vec<DirectoryPage> = mailboxes
                .chunks(self.entries_per_page)
                .map(|some| DirectoryPage { mailboxes: some.to_vec(), ..DirectoryPage::default() })
                .collect();
            let deleted = self.deleted.iter().map(|&mailbox| DirectoryEntry {
                mailbox,
                as_of: lsn,
                deleted: true,
                ..DirectoryEntry::default()
            });
            pages.push(DirectoryPage { mailboxes: deleted.collect(), ..DirectoryPage::default() });
            for (place, (&account, &(uid_validity_next, name))) in self.accounts.iter().enumerate() {
                let attributes = vec![(account, "note".to_owned(), vec![name; 3])];
                let subscriptions = vec![name_of(name)];
                let entry = AccountEntry { account, as_of: lsn, uid_validity_next, subscriptions, attributes };
                let page = place % pages.len();
                pages[page].accounts.push(entry);
            }
            let records = self.records.iter().map(|(&account, &name)| DirectoryAccount {
                account,
                as_of: lsn,
                name: name_of(name),
                ..DirectoryAccount::default()
            });
            pages.push(DirectoryPage { directory: records.collect(), ..DirectoryPage::default() });
            let mut bytes = Vec::new();
            let mut packer = Packer::default();
            for page in pages {
                put_page(PageKind::Directory, Lsn(lsn), 0, &archive(&page), &mut packer, &mut bytes).expect("small");
            }
            let (first, end) = if self.full { (0, lsn * 8) } else { (lsn as u32 - 1, lsn * 8) };
            let entries = (u64::from(first)..lsn).map(listed).collect();
            let page = RecordsPage { segment: SEGMENT.segment, epoch: SEGMENT.epoch, first, end, entries };
            put_page(PageKind::Records, Lsn(lsn), 0, &page.encode(), &mut packer, &mut bytes).expect("small");
            bytes
        }
    }

    fn listed(number: u64) -> FooterEntry {
        FooterEntry { offset_units: number as u32, len: 8, kind: 1, flags: 0, generation: 0, lsn: Lsn(number) }
    }

    /// Writes directories, each in a blob behind a page that is none of its, and takes them in.
    fn restored(said: &[Said], spoil: impl FnOnce(&mut Vec<Vec<u8>>)) -> (Result<ListedRecords, FormatError>, State) {
        let sim = Sim::new(1);
        let mut blobs: Vec<Vec<u8>> = (1..).zip(said).map(|(lsn, said)| said.pages(lsn)).collect();
        spoil(&mut blobs);
        let fulls: Vec<bool> = said.iter().map(|said| said.full).collect();
        let storage = Local::new(sim.io());
        sim.run(async move {
            storage.prepare(ShardId(0)).await.expect("no faults");
            let store = storage.blobs(ShardId(0));
            let mut indexes = Vec::new();
            for ((blob, bytes), full) in (1..).zip(blobs).zip(fulls) {
                let directory_len = bytes.len() as u64;
                let parts = vec![vec![0; 10], bytes];
                let epoch = Epoch(1);
                store.put(BlobName::Index { blob, epoch }, parts).await.expect("no faults");
                indexes.push(IndexEntry { blob, epoch, directory_offset: 10, directory_len, full });
            }
            let mut state = State::default();
            let result = restore_index::<Local<SimIo>>(&store, &indexes, &mut state).await.expect("no faults");
            (result.map_err(|(_, error)| error), state)
        })
        .expect("no crash")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_said_last_counts(said in prop::collection::vec(said(), 1..6)) {
            let (result, state) = restored(&said, |_| ());
            let listed_records = result.expect("good pages");
            let first = said.iter().rposition(|said| said.full).unwrap_or(0);
            let mut mailboxes = BTreeMap::new();
            let mut accounts: BTreeMap<u64, (u64, u32, u8)> = BTreeMap::new();
            let mut records = BTreeMap::new();
            let mut deleted = BTreeSet::new();
            for (lsn, said) in (1_u64..).zip(&said).skip(first) {
                for (&mailbox, &(account, name)) in &said.mailboxes {
                    mailboxes.insert(mailbox, entry_of(mailbox, account, name, lsn));
                }
                deleted.extend(said.deleted.iter().copied());
                for (&account, &(uid_validity, name)) in &said.accounts {
                    let most = accounts.get(&account).map_or(0, |known| known.1).max(uid_validity);
                    accounts.insert(account, (lsn, most, name));
                }
                records.extend(said.records.iter().map(|(&account, &name)| (account, (lsn, name))));
            }
            mailboxes.retain(|mailbox, _| !deleted.contains(mailbox));
            let found: Vec<DirectoryEntry> = state.slots.iter().map(|(_, slot)| slot.to_entry()).collect();
            prop_assert_eq!(found, mailboxes.values().cloned().collect::<Vec<_>>());
            prop_assert_eq!(state.slots.pages_by_blob().values().sum::<u32>() as usize, mailboxes.len());
            prop_assert_eq!(state.deleted.keys().map(|mailbox| mailbox.0).collect::<BTreeSet<_>>(), deleted);
            let owners = mailboxes.values().map(|entry| entry.account).chain(accounts.keys().copied());
            let owners: BTreeSet<u64> = owners.collect();
            prop_assert_eq!(state.accounts.keys().map(|account| account.0).collect::<BTreeSet<_>>(), owners.clone());
            for owner in owners {
                let account = state.accounts.get(&AccountId(owner)).expect("a key");
                let of_owner = || mailboxes.values().filter(|entry| entry.account == owner);
                let mut by_name: BTreeMap<String, (u64, u64)> = BTreeMap::new();
                for entry in of_owner() {
                    let best = by_name.entry(entry.name.clone()).or_default();
                    *best = (*best).max((entry.as_of, entry.mailbox));
                }
                let names = by_name.into_iter().map(|(name, (_, mailbox))| (name, MailboxId(mailbox))).collect();
                prop_assert_eq!(&account.mailboxes, &names);
                let least = of_owner().map(|entry| entry.uid_validity + 1).max().unwrap_or(0);
                let (as_of, uid_validity, said) = accounts.get(&owner).copied().unwrap_or_default();
                prop_assert_eq!((account.as_of, account.uid_validity_next), (Lsn(as_of), uid_validity.max(least)));
                let has_said = accounts.contains_key(&owner);
                prop_assert_eq!(account.subscriptions.iter().eq(has_said.then(|| name_of(said)).iter()), true);
                prop_assert_eq!(account.attributes.values().next().is_some(), has_said);
            }
            let found: BTreeMap<u64, (u64, String)> =
                state.directory.iter().map(|(id, (as_of, record))| (id.0, (as_of.0, record.name.clone()))).collect();
            let expected = records.into_iter().map(|(account, (lsn, name))| (account, (lsn, name_of(name)))).collect();
            prop_assert_eq!(found, expected);
            let count = said.len() as u64;
            let expected = Some((0..count).map(listed).collect::<Vec<_>>());
            prop_assert_eq!(listed_records.before(SEGMENT, count * 8), expected);
        }
    }

    fn some(mailboxes: std::ops::Range<u64>) -> Said {
        Said {
            mailboxes: mailboxes.map(|mailbox| (mailbox, (1, mailbox as u8))).collect(),
            deleted: Vec::new(),
            accounts: BTreeMap::new(),
            records: BTreeMap::new(),
            full: false,
            entries_per_page: 4,
        }
    }

    #[test]
    fn records_are_known_only_without_a_gap() {
        let listed_of = |said: &[Said]| restored(said, |_| ()).0.expect("good pages");
        let said = [some(1..3), some(2..5)];
        assert!(listed_of(&said).before(SEGMENT, 16).is_some());
        assert!(listed_of(&said).before(SEGMENT, 24).is_none(), "some of them are not listed");
        assert!(listed_of(&said).before(SegmentName { epoch: Epoch(2), ..SEGMENT }, 16).is_none());
        let pages = |numbers: &[u32]| {
            let page = |&number: &u32| RecordsPage {
                segment: SEGMENT.segment,
                epoch: SEGMENT.epoch,
                first: number,
                end: u64::from(number) * 8 + 8,
                entries: vec![listed(number.into())],
            };
            ListedRecords(numbers.iter().map(page).collect())
        };
        assert!(pages(&[0, 1, 2]).before(SEGMENT, 24).is_some());
        assert!(pages(&[0, 2]).before(SEGMENT, 24).is_none());
        assert!(pages(&[1, 2]).before(SEGMENT, 24).is_none());
        assert!(pages(&[0, 1, 0, 1, 2]).before(SEGMENT, 24).is_some());
    }

    #[test]
    fn damage_anywhere_in_a_directory_is_found() {
        let said = [some(1..9), some(3..6)];
        let lens: Vec<usize> = (1..).zip(&said).map(|(lsn, said)| said.pages(lsn).len()).collect();
        for (blob, len) in lens.into_iter().enumerate() {
            // Reserved bytes of page headers are not looked at for what they say, but count for the checksum.
            for at in (0..len).step_by(7) {
                let (result, _) = restored(&said, |blobs| blobs[blob][at] ^= 1);
                assert!(result.is_err(), "blob {blob}, byte {at}");
            }
            for end in (0..len).step_by(11) {
                let mut short = 0;
                let (result, _) = restored(&said, |blobs| {
                    blobs[blob].truncate(end);
                    short = blobs[blob].len();
                });
                // A directory may end between two pages; then its records do not reach to where replay begins.
                let ends_early = result.map_or(true, |listed| listed.before(SEGMENT, 16).is_none());
                assert!(ends_early || short == len, "blob {blob}, {end} bytes");
            }
        }
    }

    #[test]
    fn mailboxes_of_a_directory_ascend() {
        let (result, _) = restored(&[some(1..9)], |blobs| {
            let again = blobs[0].clone();
            blobs[0].extend(again);
        });
        assert!(matches!(result, Err(FormatError::Misplaced { .. })), "an older entry would count");
    }
}
