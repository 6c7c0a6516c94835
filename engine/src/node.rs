//! A node: workers, each with its shards, and what they share.
//!
//! Workers share no state but channels and the account directory, an immutable snapshot. An operation on a shard runs on
//! its owner: directly, or as a message that takes and gives owned values.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::hash::{Hash, Hasher};
use std::rc::Rc;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot};

use crate::dictionaries::{DictionaryConfig, SharedDictionaries};
use crate::error::{Damage, EngineError, RecoveryReport, Refusal};
use crate::format::codec::{Input, Wire};
use crate::format::record::{AccountRecord, Record};
use crate::format::{FORMAT_VERSION, FormatError, checksum, verify_checksum};
use crate::ids::{AccountId, ShardId};
use crate::mailboxes::NewMailbox;
use crate::shard::{Shard, ShardConfig};
use crate::storage::{Storage, StorageError};

/// Shards that a store can have.
pub const SHARDS_MAX: u32 = 1024;
/// The shard whose system space holds the account records.
pub(crate) const SYSTEM_SHARD: ShardId = ShardId(0);
const SUPERBLOCK_MAGIC: [u8; 8] = *b"PHSTORE1";

/// Configuration of the store.
#[derive(Clone, Debug, Default)]
pub struct StoreConfig {
    pub shard: ShardConfig,
}

/// What a store says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub store: u128,
    pub shards: u32,
}

impl Superblock {
    /// Magic, version, checksum, store id, shards.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = SUPERBLOCK_MAGIC.to_vec();
        FORMAT_VERSION.put(&mut out);
        0_u32.put(&mut out);
        self.store.put(&mut out);
        self.shards.put(&mut out);
        let crc = checksum(&out[16..]);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "store file";
        if bytes.len() != 36 {
            return Err(FormatError::Short { what: WHAT, needed: 36, available: bytes.len() as u64 });
        }
        if bytes[..8] != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic(WHAT));
        }
        let decode = |source| FormatError::Decode { what: WHAT, source };
        let mut input = Input(&bytes[8..]);
        let version = u32::take(&mut input).map_err(decode)?;
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { what: WHAT, found: version });
        }
        verify_checksum(WHAT, u32::take(&mut input).map_err(decode)?, &bytes[16..])?;
        let store = u128::take(&mut input).map_err(decode)?;
        let shards = u32::take(&mut input).map_err(decode)?;
        if shards == 0 || shards > SHARDS_MAX {
            return Err(FormatError::Misplaced { what: WHAT, detail: format!("{shards} shards") });
        }
        Ok(Self { store, shards })
    }
}

/// Reads the store's description, or creates a store with `shards_at_creation` shards. Durable on return.
///
/// # Errors
/// Storage that fails; a description that is damaged or of another version.
pub async fn open_superblock<S: Storage>(storage: &S, shards_at_creation: u32) -> Result<Superblock, EngineError> {
    if let Some(bytes) = storage.read_superblock().await? {
        return Superblock::decode(&bytes).map_err(|error| Damage { place: "store".to_owned(), error }.into());
    }
    let store = u128::from(storage.random()) << 64 | u128::from(storage.random());
    let superblock = Superblock { store, shards: shards_at_creation.clamp(1, SHARDS_MAX) };
    match storage.create_superblock(superblock.encode()).await {
        Ok(()) => Ok(superblock),
        Err(StorageError::AlreadyExists(_)) => Box::pin(open_superblock(storage, shards_at_creation)).await,
        Err(error) => Err(error.into()),
    }
}

/// Accounts that are made in one commit: a batch has a limit.
const ACCOUNTS_PER_COMMIT: usize = 10_000;
const BUCKETS: usize = 256;
type Bucket = Arc<HashSet<ByName>>;

/// An account record that is found by its name.
#[derive(Clone, Debug)]
struct ByName(Arc<AccountRecord>);

impl std::borrow::Borrow<str> for ByName {
    fn borrow(&self) -> &str {
        &self.0.name
    }
}

impl PartialEq for ByName {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for ByName {}

impl Hash for ByName {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.0.name.hash(hasher);
    }
}

/// The accounts of the store by name: an immutable snapshot. A change copies one bucket.
#[derive(Clone, Debug)]
pub struct Directory {
    buckets: Vec<Bucket>,
    /// Of accounts whose name an account had before.
    uid_validity_floors: Arc<HashMap<AccountId, u32>>,
}

impl Default for Directory {
    fn default() -> Self {
        Self { buckets: vec![Bucket::default(); BUCKETS], uid_validity_floors: Arc::default() }
    }
}

/// Where workers and shards find the newest directory. It is complete before any session starts.
pub(crate) type SharedDirectory = Arc<ArcSwap<Directory>>;

impl Directory {
    /// Bucket after bucket, each at its size from the beginning.
    fn of<'a>(records: impl Iterator<Item = &'a Arc<AccountRecord>>) -> Self {
        let mut by_bucket: Vec<Vec<&Arc<AccountRecord>>> = vec![Vec::new(); BUCKETS];
        for record in records {
            by_bucket[Self::bucket_of(&record.name)].push(record);
        }
        let mut directory = Self::default();
        for (bucket, records) in directory.buckets.iter_mut().zip(&by_bucket) {
            Arc::make_mut(bucket).reserve(records.len());
        }
        by_bucket.into_iter().flatten().for_each(|record| directory.put(Arc::clone(record)));
        directory
    }

    fn bucket_of(name: &str) -> usize {
        crc32fast::hash(name.as_bytes()) as usize % BUCKETS
    }

    /// The living account of a name.
    pub fn find(&self, name: &str) -> Option<Arc<AccountRecord>> {
        self.find_any(name).filter(|account| !account.deleted)
    }

    /// The living account of a name, if it is this one.
    fn find_id(&self, name: &str, account: AccountId) -> Option<Arc<AccountRecord>> {
        self.find(name).filter(|record| record.account == account)
    }

    /// The record of a name, deleted or not.
    fn find_any(&self, name: &str) -> Option<Arc<AccountRecord>> {
        self.buckets[Self::bucket_of(name)].get(name).map(|account| Arc::clone(&account.0))
    }

    /// The living accounts, in no order.
    pub fn iter(&self) -> impl Iterator<Item = Arc<AccountRecord>> + '_ {
        let all = self.buckets.iter().flat_map(|bucket| bucket.iter());
        all.filter(|account| !account.0.deleted).map(|account| Arc::clone(&account.0))
    }

    pub fn len(&self) -> usize {
        self.iter().count()
    }

    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// Every UIDVALIDITY that an account gets is at least this.
    pub(crate) fn uid_validity_floor(&self, account: AccountId) -> u32 {
        self.uid_validity_floors.get(&account).copied().unwrap_or(1)
    }

    fn put(&mut self, record: Arc<AccountRecord>) {
        if record.uid_validity_floor > 1 && !record.deleted {
            Arc::make_mut(&mut self.uid_validity_floors).insert(record.account, record.uid_validity_floor);
        } else if self.uid_validity_floors.contains_key(&record.account) {
            Arc::make_mut(&mut self.uid_validity_floors).remove(&record.account);
        }
        let bucket = Arc::make_mut(&mut self.buckets[Self::bucket_of(&record.name)]);
        // An account that was made again: the deleted one's record has an older id.
        if bucket.get(record.name.as_str()).is_none_or(|old| old.0.account <= record.account) {
            bucket.replace(ByName(record));
        }
    }
}

/// A message to a worker.
pub type Job<S> = Box<dyn FnOnce(&Worker<S>) + Send>;

/// What the workers of a node share.
pub struct Cluster<S: Storage> {
    pub superblock: Superblock,
    workers: Vec<mpsc::UnboundedSender<Job<S>>>,
    directory: SharedDirectory,
    dictionaries: Arc<SharedDictionaries>,
}

/// A worker's end of the cluster, to be opened on its thread.
pub struct WorkerSeat<S: Storage> {
    index: usize,
    jobs: mpsc::UnboundedReceiver<Job<S>>,
}

impl<S: Storage> Cluster<S> {
    /// Seats for `workers` workers. Shard n belongs to worker n modulo their number.
    /// Messages are compressed with the dictionaries that the store has, and no others are trained.
    pub fn new(superblock: Superblock, workers: usize) -> (Arc<Self>, Vec<WorkerSeat<S>>) {
        Self::that_trains(
            superblock,
            workers,
            DictionaryConfig { train_after_octets: 0, ..DictionaryConfig::default() },
        )
    }

    /// As [`Cluster::new`]; dictionaries are trained when there is mail to train them on.
    pub fn that_trains(
        superblock: Superblock,
        workers: usize,
        dictionaries: DictionaryConfig,
    ) -> (Arc<Self>, Vec<WorkerSeat<S>>) {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..workers.max(1)).map(|_| mpsc::unbounded_channel()).unzip();
        let seats = receivers.into_iter().enumerate().map(|(index, jobs)| WorkerSeat { index, jobs }).collect();
        let dictionaries = Arc::new(SharedDictionaries::new(dictionaries));
        (Arc::new(Self { superblock, workers: senders, directory: SharedDirectory::default(), dictionaries }), seats)
    }

    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// The worker that owns a shard.
    pub fn owner(&self, shard: ShardId) -> usize {
        shard.0 as usize % self.workers.len()
    }

    /// What messages are compressed with.
    pub fn dictionaries(&self) -> &SharedDictionaries {
        &self.dictionaries
    }

    pub fn directory(&self) -> Arc<Directory> {
        self.directory.load_full()
    }

    /// Sends a worker something to do. It is dropped if the worker has ended.
    pub fn send(&self, worker: usize, job: Job<S>) {
        let _ = self.workers[worker].send(job);
    }

    /// The shard for a new account.
    fn shard_for(&self, name: &str) -> ShardId {
        ShardId(crc32fast::hash(name.as_bytes()) % self.superblock.shards)
    }
}

impl<S: Storage> WorkerSeat<S> {
    pub fn index(&self) -> usize {
        self.index
    }
}

struct WorkerInner<S: Storage> {
    storage: S,
    cluster: Arc<Cluster<S>>,
    index: usize,
    shards: RefCell<BTreeMap<ShardId, Shard<S>>>,
}

/// A worker on its own thread.
pub struct Worker<S: Storage>(Rc<WorkerInner<S>>);

impl<S: Storage> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// An account to be made.
#[derive(Clone, Debug)]
pub struct NewAccount {
    /// An address in its one spelling.
    pub name: String,
    /// A password hash in its own text form, or empty for none.
    pub password: String,
}

impl<S: Storage> Worker<S> {
    /// Opens this worker's shards and begins to take jobs. Wait for all workers before sessions start.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub async fn open(
        storage: S,
        cluster: Arc<Cluster<S>>,
        mut seat: WorkerSeat<S>,
        config: StoreConfig,
    ) -> Result<(Self, Vec<RecoveryReport>), EngineError> {
        let worker = Self(Rc::new(WorkerInner {
            storage: storage.clone(),
            cluster: Arc::clone(&cluster),
            index: seat.index,
            shards: RefCell::default(),
        }));
        let mut reports = Vec::new();
        for shard in (0..cluster.superblock.shards).map(ShardId).filter(|&shard| cluster.owner(shard) == seat.index) {
            let (opened, report) =
                Shard::open(storage.clone(), shard, cluster.superblock.store, config.shard.clone()).await?;
            opened.share_directory(&cluster.directory);
            opened.share_dictionaries(&cluster.dictionaries).await;
            reports.push(report);
            worker.0.shards.borrow_mut().insert(shard, opened);
        }
        if let Some(system) = worker.local(SYSTEM_SHARD) {
            let directory = Directory::of(system.0.state.borrow().directory.values().map(|(_, record)| record));
            cluster.directory.store(Arc::new(directory));
            worker.empty_deleted_accounts(&system);
        }
        if seat.index == 0 {
            worker.train_when_wanted();
        }
        if config.shard.compacts_by_itself {
            worker.shards().iter().for_each(Shard::compact_from_time_to_time);
        }
        if config.shard.scrub_bytes_per_s > 0 {
            worker.shards().iter().for_each(Shard::scrub_from_time_to_time);
        }
        let jobs_worker = Rc::downgrade(&worker.0);
        storage.spawn(async move {
            while let Some(job) = seat.jobs.recv().await {
                let Some(worker) = jobs_worker.upgrade() else { break };
                job(&Self(worker));
            }
        });
        Ok((worker, reports))
    }

    /// Trains dictionaries whenever that is due.
    fn train_when_wanted(&self) {
        let (worker, shared) = (Rc::downgrade(&self.0), Arc::clone(&self.0.cluster.dictionaries));
        self.0.storage.spawn(async move {
            loop {
                shared.wanted().await;
                let Some(worker) = worker.upgrade() else { break };
                // A store that is being stopped needs none.
                let trained = Self(worker).train_dictionaries(&shared).await.unwrap_or_default();
                shared.trained(trained);
            }
        });
    }

    pub fn storage(&self) -> &S {
        &self.0.storage
    }

    pub fn index(&self) -> usize {
        self.0.index
    }

    pub fn cluster(&self) -> &Arc<Cluster<S>> {
        &self.0.cluster
    }

    /// A shard of this worker.
    pub fn local(&self, shard: ShardId) -> Option<Shard<S>> {
        self.0.shards.borrow().get(&shard).cloned()
    }

    /// The shards of this worker.
    pub fn shards(&self) -> Vec<Shard<S>> {
        self.0.shards.borrow().values().cloned().collect()
    }

    /// Runs an operation on a shard's owner. If this future is dropped the operation still runs to its end.
    ///
    /// # Errors
    /// The owner is stopping; whether the operation has run is then unknown.
    pub async fn call<T, F>(
        &self,
        shard: ShardId,
        operation: impl FnOnce(Shard<S>) -> F + Send + 'static,
    ) -> Result<T, EngineError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        if let Some(local) = self.local(shard) {
            return Ok(operation(local).await);
        }
        let (sender, receiver) = oneshot::channel();
        let job: Job<S> = Box::new(move |worker| {
            let Some(local) = worker.local(shard) else { return };
            let running = operation(local);
            worker.0.storage.spawn(async move {
                // Whoever asked may have gone.
                let _ = sender.send(running.await);
            });
        });
        self.0.cluster.send(self.0.cluster.owner(shard), job);
        receiver.await.map_err(|_| EngineError::Stopping(shard))
    }

    /// Stops this worker's shards: see [`Shard::stop`].
    pub async fn stop(&self) -> Result<(), EngineError> {
        let mut result = Ok(());
        for shard in self.shards() {
            result = result.and(shard.stop().await);
        }
        self.0.shards.borrow_mut().clear();
        result
    }

    /// Makes accounts, up to 10,000 in one commit, each with an INBOX: they can receive when this returns.
    ///
    /// # Errors
    /// Per account, [`Refusal::AccountExists`]; or storage that fails: some of the accounts may then exist.
    pub async fn add_accounts(
        &self,
        accounts: Vec<NewAccount>,
    ) -> Result<Vec<Result<AccountRecord, Refusal>>, EngineError> {
        self.add_accounts_with(accounts, Arc::default()).await
    }

    /// As [`Worker::add_accounts`], with more mailboxes than INBOX, which are subscribed to.
    ///
    /// # Errors
    /// As [`Worker::add_accounts`].
    pub async fn add_accounts_with(
        &self,
        mut accounts: Vec<NewAccount>,
        mailboxes: Arc<Vec<NewMailbox>>,
    ) -> Result<Vec<Result<AccountRecord, Refusal>>, EngineError> {
        let mut results = Vec::with_capacity(accounts.len());
        while !accounts.is_empty() {
            let later = accounts.split_off(accounts.len().min(ACCOUNTS_PER_COMMIT));
            results.extend(self.add_some_accounts(accounts, &mailboxes).await?);
            accounts = later;
        }
        Ok(results)
    }

    async fn add_some_accounts(
        &self,
        accounts: Vec<NewAccount>,
        mailboxes: &Arc<Vec<NewMailbox>>,
    ) -> Result<Vec<Result<AccountRecord, Refusal>>, EngineError> {
        let cluster = Arc::clone(&self.0.cluster);
        let results = self
            .call(SYSTEM_SHARD, move |system| async move { system.put_accounts(&cluster, accounts).await })
            .await??;
        // Mailboxes are made at once where they can be, so that a client's first LIST shows them.
        let mut by_shard: BTreeMap<ShardId, Vec<AccountId>> = BTreeMap::new();
        for account in results.iter().flatten() {
            by_shard.entry(account.shard).or_default().push(account.account);
        }
        for (shard, accounts) in by_shard {
            let mailboxes = Arc::clone(mailboxes);
            self.call(shard, move |shard| async move { shard.make_mailboxes(accounts, mailboxes).await }).await??;
        }
        Ok(results)
    }

    /// Replaces the stored hash of an account's password. Durable on return.
    pub async fn set_password(&self, name: &str, password: String) -> Result<(), EngineError> {
        let account = self.0.cluster.directory().find(name).ok_or(Refusal::NoSuchAccount)?;
        self.change_account(account, move |record| record.password = password).await
    }

    /// Deletes an account with its mail. Its name can be used again; UIDVALIDITY goes on from where it was. Durable on
    /// return. The account's record decides: before it says so all mail is there, after it nobody finds any, and what a
    /// crash leaves of it goes at the next start.
    ///
    /// # Errors
    /// No such account, or storage that fails. [`EngineError::Full`]: the account lives as before, unless only its
    /// mailboxes could not be deleted. After any other failure a start decides; until then it makes no mailboxes.
    pub async fn delete_account(&self, name: &str) -> Result<(), EngineError> {
        let account = self.0.cluster.directory().find(name).ok_or(Refusal::NoSuchAccount)?;
        let (id, shard) = (account.account, account.shard);
        // The floor is one as long as no mailbox is made.
        let floor = self.call(shard, move |shard| async move { shard.close_account(id).await }).await?;
        let deleted = self.change_account(account, move |record| {
            record.deleted = true;
            record.uid_validity_floor = record.uid_validity_floor.max(floor);
        });
        let deleted = deleted.await;
        let lives_on = || self.0.cluster.directory().find_id(name, id).is_some();
        // Of all other failures it is unknown what they have done.
        if matches!(deleted, Err(EngineError::Full)) && lives_on() {
            self.call(shard, move |shard| async move { shard.reopen_account(id) }).await?;
        }
        deleted?;
        self.call(shard, move |shard| async move { shard.empty_account(id).await }).await?
    }

    async fn change_account(
        &self,
        account: Arc<AccountRecord>,
        edit: impl FnOnce(&mut AccountRecord) + Send + 'static,
    ) -> Result<(), EngineError> {
        let cluster = Arc::clone(&self.0.cluster);
        let edit = move |system: Shard<S>| async move { system.edit_account(&cluster, &account, edit).await };
        self.call(SYSTEM_SHARD, edit).await?
    }

    /// Lets the shards of deleted accounts delete what a crash has left of them.
    fn empty_deleted_accounts(&self, system: &Shard<S>) {
        let mut by_shard: BTreeMap<ShardId, Vec<AccountId>> = BTreeMap::new();
        for record in
            system.0.state.borrow().directory.values().map(|(_, record)| record).filter(|record| record.deleted)
        {
            by_shard.entry(record.shard).or_default().push(record.account);
        }
        for (shard, accounts) in by_shard {
            let job: Job<S> = Box::new(move |worker| {
                let Some(shard) = worker.local(shard) else { return };
                worker.0.storage.spawn(async move {
                    for account in accounts {
                        // The next start tries again.
                        let _ = shard.empty_account(account).await;
                    }
                });
            });
            // A worker that has not opened yet takes it when it has.
            self.0.cluster.send(self.0.cluster.owner(shard), job);
        }
    }
}

impl<S: Storage> Shard<S> {
    async fn put_accounts(
        &self,
        cluster: &Cluster<S>,
        accounts: Vec<NewAccount>,
    ) -> Result<Vec<Result<AccountRecord, Refusal>>, EngineError> {
        let _one_at_a_time = self.0.directory_lock.lock().await;
        self.admit().await?;
        let directory = cluster.directory();
        let mut results = Vec::with_capacity(accounts.len());
        let mut names = std::collections::BTreeSet::new();
        let ticket = {
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            for account in accounts {
                let old = directory.find_any(&account.name);
                if old.as_ref().is_some_and(|old| !old.deleted) || !names.insert(account.name.clone()) {
                    results.push(Err(Refusal::AccountExists));
                    continue;
                }
                let lsn = log.next_lsn(self.0.epoch);
                let record = AccountRecord {
                    account: AccountId(lsn.0),
                    shard: cluster.shard_for(&account.name),
                    name: account.name,
                    password: account.password,
                    deleted: false,
                    uid_validity_floor: old.map_or(1, |old| old.uid_validity_floor),
                };
                log.push(lsn, 0, Record::Account(record.clone()), &[]);
                results.push(Ok(record));
            }
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        self.publish_accounts(cluster, results.iter().flatten().map(|record| record.account));
        Ok(results)
    }

    /// Edits the record of an account that lives; another that has got its name meanwhile stays as it is.
    async fn edit_account(
        &self,
        cluster: &Cluster<S>,
        account: &AccountRecord,
        edit: impl FnOnce(&mut AccountRecord),
    ) -> Result<(), EngineError> {
        let _one_at_a_time = self.0.directory_lock.lock().await;
        self.admit().await?;
        let living = cluster.directory().find_id(&account.name, account.account);
        let mut record = AccountRecord::clone(&*living.ok_or(Refusal::NoSuchAccount)?);
        edit(&mut record);
        let ticket = {
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            let lsn = log.next_lsn(self.0.epoch);
            log.push(lsn, 0, Record::Account(record.clone()), &[]);
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        self.publish_accounts(cluster, [account.account]);
        Ok(())
    }

    /// Lets all workers know the accounts as this shard has them now.
    fn publish_accounts(&self, cluster: &Cluster<S>, accounts: impl IntoIterator<Item = AccountId>) {
        let mut directory = Directory::clone(&cluster.directory());
        let state = self.0.state.borrow();
        for (_, record) in accounts.into_iter().filter_map(|account| state.directory.get(&account)) {
            directory.put(Arc::clone(record));
        }
        cluster.directory.store(Arc::new(directory));
    }

    /// The mailboxes of new accounts, committed together.
    async fn make_mailboxes(
        &self,
        accounts: Vec<AccountId>,
        mailboxes: Arc<Vec<NewMailbox>>,
    ) -> Result<(), EngineError> {
        let mut waiting = Vec::with_capacity(accounts.len());
        for account in accounts {
            let (shard, mailboxes) = (self.clone(), Arc::clone(&mailboxes));
            let (sender, receiver) = oneshot::channel();
            self.0.storage.spawn(async move {
                let _ = sender.send(shard.create_first_mailboxes(account, &mailboxes).await);
            });
            waiting.push(receiver);
        }
        for receiver in waiting {
            receiver.await.map_err(|_| EngineError::Stopping(self.id()))??;
        }
        Ok(())
    }
}
