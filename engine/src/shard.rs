//! A shard: one log, one state, one owner.
//!
//! Commands validate and allot against the pending tip, append records to the batch being built, and wait. One task, the
//! committer, takes the batch whenever the device is idle, writes and syncs it, publishes its records to the state that
//! sessions read, and only then answers. Nothing between validation and append awaits, so the order of LSNs is the order
//! of validation.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Mutex, Notify, oneshot};

use crate::compaction::{Compaction, CompactionReport};
use crate::dictionaries::SharedDictionaries;
use crate::error::{EngineError, Finding, Refusal};
use crate::format::BLOCK_BYTES;
use crate::format::batch::{BATCH_BYTES_MAX, BatchBuilder, Touch, move_batch};
use crate::format::dictionary::{Dictionary, DictionarySet};
use crate::format::frame::{FrameInfo, Packer, Unpacker};
use crate::format::manifest::{Manifest, SegmentEntry};
use crate::format::record::{Commit, Record, RecordHeader};
use crate::format::segment::{DICTIONARIES_MAX, Footer, FooterEntry, SegmentHeader};
use crate::ids::{AccountId, Epoch, Location, Lsn, MailboxId, MessageId, Position, SegmentId, ShardId};
use crate::join::first_of;
use crate::message_cache::MessageCache;
use crate::node::SharedDirectory;
use crate::planted::{self, Bug};
use crate::recent_blocks::{RecentBlocks, RecordPlace};
use crate::scrub::{Scrub, ScrubReport};
use crate::state::State;
use crate::storage::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError, Wal};

/// How a shard is to work. `docs/configuration.md` gives the ranges.
#[derive(Clone, Debug)]
pub struct ShardConfig {
    /// A segment is sealed before it would grow past this. 1 MB - 16 GB.
    pub segment_size_bytes: u64,
    /// A checkpoint is taken after so much log. 1 MB - 1 GB.
    pub checkpoint_bytes: u64,
    /// Loaded mailbox indexes are dropped, least recently used first, past this.
    pub index_cache_bytes: usize,
    /// Decompressed messages are kept up to this; 0: none.
    pub message_cache_bytes: usize,
    /// How long the committer may gather further deliveries while they keep coming.
    pub gather_us_max: u64,
    /// A message may have so many octets.
    pub message_octets_max: u64,
    /// A mailbox may have so many messages; at most [`crate::index::MESSAGES_MAX`].
    pub mailbox_messages_max: u32,
    /// Space that is kept in reserve, so that on a full device expunging, checkpoints and a restart still work. 0 for none.
    pub reserve_bytes: u64,
    /// Compact where it pays, whenever that is so.
    pub compacts_by_itself: bool,
    /// A run of compaction takes segments of so many octets together. More of them cluster better and take more memory: some
    /// 300 octets for each message that lives in them.
    pub compaction_run_bytes: u64,
    /// Compaction writes so many octets in a second at most; 0: as many as it can.
    pub compaction_bytes_per_s: u64,
    /// Look for damage by itself, reading so many octets in a second at most; 0: only when told to.
    pub scrub_bytes_per_s: u64,
    /// A scrub begins so long after the last one has come to its end.
    pub scrub_interval: Duration,
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            segment_size_bytes: 256 << 20,
            checkpoint_bytes: 64 << 20,
            index_cache_bytes: 16 << 20,
            message_cache_bytes: 64 << 20,
            gather_us_max: 2000,
            message_octets_max: 100 << 20,
            mailbox_messages_max: crate::index::MESSAGES_MAX,
            reserve_bytes: 0,
            compacts_by_itself: false,
            compaction_run_bytes: 1 << 30,
            compaction_bytes_per_s: 0,
            scrub_bytes_per_s: 0,
            scrub_interval: Duration::from_secs(7 * 24 * 60 * 60),
        }
    }
}

/// Submitters wait while the batch being built is larger than this.
const BUILDING_BYTES_MAX: usize = 8 << 20;
/// What one batch has of large bodies, about. Everybody whose changes are in it or wait for it waits for these, too.
const BULK_BYTES_MAX: usize = 512 << 10;
/// A batch stops gathering at this size: larger ones add latency and no rate.
pub(crate) const BATCH_BYTES_GATHERED: usize = 1 << 20;
/// How often a shard that has used its reserve looks whether there is space again.
const SPACE_LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// After so long without a commit, an empty batch records that the last one is durable.
const IDLE_MARK_AFTER: Duration = Duration::from_millis(200);

/// Segments that a start asks for dictionaries, the newest first.
const SEGMENTS_ASKED: usize = 4;

/// So many events are kept for whoever listens; older ones are dropped.
const EVENTS_MAX: usize = 100;

/// What an operator should know.
#[derive(Clone, Debug)]
pub enum ShardEvent {
    /// The shard takes no changes until it is opened again.
    Poisoned(Arc<str>),
    /// The old checkpoint stays in force, and the log's tail grows.
    CheckpointFailed(EngineError),
    /// The device is full: the reserve is in use, and the shard takes no new messages.
    SpaceLow,
    /// There is space again, and a reserve.
    SpaceBack,
    /// The index of a mailbox could not be read and was put together from the log again.
    IndexRebuilt(MailboxId, EngineError),
    /// Compaction has left a segment as it is, since it is damaged.
    SegmentDamaged(SegmentId, EngineError),
    /// Compaction has left out a segment that could not be read. It will be tried again.
    SegmentUnreadable(SegmentId, EngineError),
    /// A run of compaction has come to nothing; everything is as it was before.
    CompactionFailed(EngineError),
    /// A run of compaction has come to its end.
    Compacted(CompactionReport),
    /// The scrub has found something.
    DamageFound(Finding),
    /// A pass of the scrub has come to its end.
    Scrubbed(ScrubReport),
}

/// Counters since the shard was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardStats {
    /// Runs of compaction that came to their end, the segments that they replaced, the octets of these and of what was
    /// written in their place.
    pub compactions: u64,
    pub segments_compacted: u64,
    pub compacted_bytes_read: u64,
    pub compacted_bytes_written: u64,
    pub batches: u64,
    pub records: u64,
    pub log_bytes: u64,
    pub segments_sealed: u64,
    pub checkpoints: u64,
    pub checkpoints_failed: u64,
    /// Times that a mailbox's index was wanted and not in memory, and that it was there.
    pub index_loads: u64,
    pub index_cache_hits: u64,
    /// Octets of the indexes that are in memory now.
    pub index_cache_bytes: u64,
    /// Mailboxes that somebody uses or has changed since the last checkpoint, and the others, with the octets of memory that
    /// those and their accounts take.
    pub mailboxes_in_use: u64,
    pub mailboxes_at_rest: u64,
    pub at_rest_bytes: u64,
    /// Mailbox indexes put together from the log because their pages were damaged.
    pub indexes_rebuilt: u64,
    pub record_reads: u64,
    pub record_read_bytes: u64,
    /// Frames of bodies, and blocks of large messages, that were unpacked. What needs only headers and digests adds none.
    pub body_frames_unpacked: u64,
    /// Messages and headers that the cache of decompressed messages had, and had not.
    pub message_cache_hits: u64,
    pub message_cache_misses: u64,
    /// What it holds now.
    pub message_cache_bytes: u64,
    /// Passes of the scrub that came to their end, when the last one did in milliseconds since 1970 (0: none has), the octets
    /// that it has read and the damage that it has found, in all passes.
    pub scrub_passes: u64,
    pub scrub_finished_ms: u64,
    pub scrub_bytes: u64,
    pub scrub_findings: u64,
}

/// A record waiting for its commit.
struct PendingRecord {
    lsn: Lsn,
    transaction: u64,
    record: Record,
    /// Offset from the batch's first record, and length.
    offset: u32,
    len: u32,
}

/// Where a committed batch put its records.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Committed {
    segment: SegmentId,
    records_offset: u64,
    first_ordinal: u32,
}

/// A record's place in the batch being built; its location once that is committed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlaceInBatch {
    offset: u32,
    len: u32,
    index: u32,
}

impl Committed {
    pub(crate) fn location(&self, place: PlaceInBatch) -> Location {
        Location {
            segment: self.segment,
            offset_units: u32::try_from((self.records_offset + u64::from(place.offset)) / 8)
                .expect("segments are at most 32 GB"),
            len: place.len,
            ordinal: self.first_ordinal + place.index,
        }
    }
}

type Waiter = oneshot::Sender<Result<Committed, EngineError>>;

/// The batch being built.
#[derive(Default)]
struct Building {
    batch: BatchBuilder,
    records: Vec<PendingRecord>,
    /// Mailboxes whose tip counts an operation of this batch, once for each.
    touched: Vec<MailboxId>,
    waiters: Vec<Waiter>,
    /// Who wants to know where a record is, beside those who wait.
    placed: Vec<(RecordPlace, PlaceInBatch)>,
    /// What frames of the records name, in sets: almost always one.
    dictionaries: Vec<Arc<DictionarySet>>,
    /// Bytes of large bodies.
    bulk_bytes: usize,
    /// Somebody waits, or the records must not stay in memory: commit now.
    wanted: bool,
}

/// Locks of accounts whose structure somebody changes, and of some that nobody does.
#[derive(Default)]
pub(crate) struct AccountLocks {
    by_account: BTreeMap<AccountId, Rc<Mutex<()>>>,
    /// How many were held when the others were last let go.
    kept: usize,
}

/// The unsealed segment.
pub(crate) struct ActiveSegment {
    pub name: SegmentName,
    /// Bytes that were set aside for it, its footer included. 0 once it is to take no more.
    pub capacity: u64,
    pub entries: Vec<FooterEntry>,
    /// The ids of the dictionaries that it embeds.
    dictionaries: Vec<u32>,
}

/// The log's side of a shard.
pub(crate) struct Log {
    building: Building,
    next_counter: u64,
    pub next_sequence: u64,
    pub active: Option<ActiveSegment>,
    pub next_segment: SegmentId,
    /// Where the next batch goes.
    pub position: Position,
    /// Everything before is durable.
    pub durable: Position,
    /// The sequence of the batch at `durable`.
    pub durable_sequence: u64,
    pub poisoned: Option<Arc<str>>,
    pub(crate) stopping: bool,
    /// The last durable batch is not yet recorded as such by a later one.
    unmarked: bool,
    pub bytes_since_checkpoint: u64,
    /// How many records of a segment the checkpoint's pages list.
    pub checkpointed_records: (SegmentId, usize),
    /// The reserve is in use: no new messages until there is space again.
    low_space: bool,
    /// When there was last a look for space.
    looked_for_space: Duration,
    pub manifest: Manifest,
    pub next_index_blob: u32,
    /// The next segment that compaction writes.
    pub next_compacted: SegmentId,
    /// Wait for the active segment to be sealed.
    seals: Vec<oneshot::Sender<Result<(), EngineError>>>,
}

pub(crate) struct Inner<S: Storage> {
    pub storage: S,
    pub wal: S::Wal,
    pub blobs: S::Blobs,
    pub manifests: S::Manifests,
    pub id: ShardId,
    pub store: u128,
    pub epoch: Epoch,
    pub config: ShardConfig,
    pub state: RefCell<State>,
    pub log: RefCell<Log>,
    /// Sealed segments by id; the active one is in `log`.
    pub sealed: RefCell<BTreeMap<SegmentId, SegmentName>>,
    pub packer: RefCell<Packer>,
    pub unpacker: RefCell<Unpacker>,
    /// Messages that were read shortly before.
    pub messages: RefCell<MessageCache>,
    /// Contents of the active segment.
    pub recent_blocks: RefCell<RecentBlocks>,
    /// Structure changes of an account go one after another.
    pub account_locks: RefCell<AccountLocks>,
    /// Ids of dictionaries that no segment has: they are not looked for again.
    pub lost_dictionaries: RefCell<BTreeSet<u32>>,
    /// What messages of the store are compressed with; unset in a shard that no worker has.
    pub dictionaries: OnceCell<Arc<SharedDictionaries>>,
    /// The accounts of the store; unset in a shard that no worker has.
    pub directory: OnceCell<SharedDirectory>,
    /// Accounts are created, changed and deleted one after another (shard 0).
    pub directory_lock: Mutex<()>,
    /// Commits of the manifest go one after another.
    pub manifest_lock: Mutex<()>,
    work: Notify,
    room: Notify,
    /// Those who write large bodies take turns, block by block.
    pub bulk_turn: Mutex<()>,
    ended: Notify,
    committer_ended: Cell<bool>,
    /// The reserve is given up and set aside by one at a time.
    space_lock: Mutex<()>,
    /// Checkpoints go one after another.
    pub checkpoint_lock: Mutex<()>,
    /// So do rebuilds of damaged mailbox indexes: each reads the whole log.
    pub rebuild_lock: Mutex<()>,
    checkpoint_scheduled: Cell<bool>,
    /// What compaction needs to know.
    pub compaction: Compaction,
    pub scrub: Scrub,
    /// The next checkpoint writes a full directory: one of those there are is damaged, or all pages are new.
    pub full_directory: Cell<bool>,
    /// What the operator should know, the newest last.
    events: RefCell<VecDeque<ShardEvent>>,
    event: Notify,
    pub stats: Cell<ShardStats>,
    pub clock: Cell<u64>,
    pub cached_index_bytes: Cell<usize>,
    /// Deliveries that are on their way here; the committer gathers only while there are others.
    pub expected: Cell<u32>,
}

/// A shard that this thread owns. Clones are the same shard.
pub struct Shard<S: Storage>(pub(crate) Rc<Inner<S>>);

impl<S: Storage> Clone for Shard<S> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

/// What recovery hands to a shard that starts.
pub(crate) struct Recovered {
    pub state: State,
    pub manifest: Manifest,
    pub next_sequence: u64,
    pub next_segment: SegmentId,
    pub next_index_blob: u32,
    pub sealed: BTreeMap<SegmentId, SegmentName>,
    pub tail_bytes: u64,
    /// There is no space for the reserve.
    pub low_space: bool,
}

/// An operation's wait for its commit.
#[must_use]
pub(crate) struct Ticket(oneshot::Receiver<Result<Committed, EngineError>>, ShardId);

impl Ticket {
    /// Durable and published on return.
    pub(crate) async fn committed(self) -> Result<Committed, EngineError> {
        self.0.await.unwrap_or(Err(EngineError::Stopping(self.1)))
    }
}

impl Log {
    /// Whether changes are taken.
    pub(crate) fn check_open(&self, shard: ShardId) -> Result<(), EngineError> {
        if let Some(reason) = &self.poisoned {
            return Err(EngineError::Poisoned { shard, reason: Arc::clone(reason) });
        }
        if self.stopping { Err(EngineError::Stopping(shard)) } else { Ok(()) }
    }

    pub(crate) fn next_lsn(&mut self, epoch: Epoch) -> Lsn {
        let lsn = Lsn::new(epoch, self.next_counter);
        self.next_counter += 1;
        lsn
    }

    /// Notes that frames of the next record name dictionaries of this set.
    pub(crate) fn need(&mut self, set: Option<&Arc<DictionarySet>>) {
        let needed = &mut self.building.dictionaries;
        if let Some(set) = set
            && !needed.iter().any(|known| Arc::ptr_eq(known, set))
        {
            needed.push(Arc::clone(set));
        }
    }

    /// Appends a record, with the bytes of its frames if it has any.
    pub(crate) fn push(&mut self, lsn: Lsn, transaction: u64, record: Record, frames: &[&[u8]]) -> PlaceInBatch {
        let header = RecordHeader { kind: record.kind(), flags: 0, generation: 0, lsn, transaction };
        let building = &mut self.building;
        let (offset, len) = building.batch.push(header, |out| {
            record.put_payload(out);
            for frame in frames {
                out.extend_from_slice(frame);
            }
        });
        let batch = &mut building.batch;
        let kind = record.kind();
        record.touches(&mut |mailbox, first, last| batch.touch(Touch { mailbox, first, last, lsn, kind }));
        let index = building.records.len() as u32;
        building.records.push(PendingRecord { lsn, transaction, record, offset, len });
        PlaceInBatch { offset, len, index }
    }

    /// Notes that a record of the batch is part of a large body.
    pub(crate) fn note_bulk(&mut self, record: PlaceInBatch) {
        self.building.bulk_bytes += record.len as usize;
    }

    /// Lets `known` say where a record of the batch lies as soon as that is committed, before any ticket says so.
    pub(crate) fn tell_place(&mut self, place: PlaceInBatch, known: &RecordPlace) {
        self.building.placed.push((Rc::clone(known), place));
    }

    /// Closes a transaction that began with the record of LSN `transaction`.
    pub(crate) fn push_commit(&mut self, epoch: Epoch, transaction: u64, records: u32) {
        let lsn = self.next_lsn(epoch);
        self.push(lsn, 0, Record::Commit(Commit { transaction, records }), &[]);
    }

    /// Notes that a mailbox's tip counts one more operation of this batch.
    pub(crate) fn touched(&mut self, mailbox: MailboxId) {
        self.building.touched.push(mailbox);
    }
}

impl<S: Storage> Shard<S> {
    /// Starts the committer on what recovery found.
    pub(crate) fn start(
        storage: S,
        id: ShardId,
        store: u128,
        epoch: Epoch,
        config: ShardConfig,
        from: Recovered,
    ) -> Self {
        let log = Log {
            building: Building::default(),
            next_counter: 1,
            next_sequence: from.next_sequence,
            active: None,
            next_segment: from.next_segment,
            position: Position { segment: from.next_segment, offset: 0 },
            durable: from.manifest.log_end,
            durable_sequence: from.next_sequence,
            poisoned: None,
            stopping: false,
            unmarked: false,
            bytes_since_checkpoint: from.tail_bytes,
            checkpointed_records: (SegmentId(0), 0),
            low_space: from.low_space,
            looked_for_space: Duration::ZERO,
            next_compacted: from
                .manifest
                .segments
                .iter()
                .map(|entry| SegmentId(entry.segment.0 + 1))
                .fold(SegmentId::FIRST_COMPACTED, SegmentId::max),
            seals: Vec::new(),
            manifest: from.manifest,
            next_index_blob: from.next_index_blob,
        };
        let inner = Inner {
            wal: storage.wal(id),
            blobs: storage.blobs(id),
            manifests: storage.manifests(id),
            storage,
            id,
            store,
            epoch,
            messages: RefCell::new(MessageCache::new(config.message_cache_bytes)),
            config,
            state: RefCell::new(from.state),
            log: RefCell::new(log),
            sealed: RefCell::new(from.sealed),
            packer: RefCell::default(),
            unpacker: RefCell::default(),
            recent_blocks: RefCell::default(),
            account_locks: RefCell::default(),
            lost_dictionaries: RefCell::default(),
            dictionaries: OnceCell::new(),
            directory: OnceCell::new(),
            directory_lock: Mutex::new(()),
            manifest_lock: Mutex::new(()),
            work: Notify::new(),
            room: Notify::new(),
            bulk_turn: Mutex::new(()),
            ended: Notify::new(),
            committer_ended: Cell::new(false),
            space_lock: Mutex::new(()),
            checkpoint_lock: Mutex::new(()),
            rebuild_lock: Mutex::new(()),
            checkpoint_scheduled: Cell::new(false),
            compaction: Compaction::default(),
            scrub: Scrub::default(),
            full_directory: Cell::new(false),
            events: RefCell::default(),
            event: Notify::new(),
            stats: Cell::default(),
            clock: Cell::new(0),
            cached_index_bytes: Cell::new(0),
            expected: Cell::new(0),
        };
        let shard = Self(Rc::new(inner));
        let committer = shard.clone();
        shard.0.storage.spawn(async move { committer.run_committer().await });
        shard
    }

    pub fn id(&self) -> ShardId {
        self.0.id
    }

    pub fn stats(&self) -> ShardStats {
        let messages = self.0.messages.borrow();
        let state = self.0.state.borrow();
        let slots = state.slots.sizes();
        ShardStats {
            index_cache_bytes: self.0.cached_index_bytes.get() as u64,
            mailboxes_in_use: slots.in_use as u64,
            mailboxes_at_rest: slots.at_rest as u64,
            at_rest_bytes: (slots.at_rest_bytes + state.accounts.at_rest_bytes()) as u64,
            message_cache_hits: messages.hits,
            message_cache_misses: messages.misses,
            message_cache_bytes: messages.bytes(),
            ..self.0.stats.get()
        }
    }

    pub(crate) fn count(&self, edit: impl FnOnce(&mut ShardStats)) {
        let mut stats = self.0.stats.get();
        edit(&mut stats);
        self.0.stats.set(stats);
    }

    /// A failed checkpoint harms nobody at once: the log's tail grows until one succeeds. It is tried again after as much
    /// log as usual.
    fn note_failed_checkpoint(&self, error: &EngineError) {
        self.tell(ShardEvent::CheckpointFailed(error.clone()));
        self.0.log.borrow_mut().bytes_since_checkpoint = 0;
        self.count(|stats| stats.checkpoints_failed += 1);
    }

    /// Waits for the next event that an operator should know of. One task at a time; may be dropped at any time.
    pub async fn next_event(&self) -> ShardEvent {
        loop {
            if let Some(event) = self.0.events.borrow_mut().pop_front() {
                return event;
            }
            self.0.event.notified().await;
        }
    }

    pub(crate) fn tell(&self, event: ShardEvent) {
        let mut events = self.0.events.borrow_mut();
        if events.len() == EVENTS_MAX {
            events.pop_front();
        }
        events.push_back(event);
        self.0.event.notify_one();
    }

    /// Why the shard takes no changes, if so.
    pub fn poisoned(&self) -> Option<Arc<str>> {
        self.0.log.borrow().poisoned.clone()
    }

    /// Says that a delivery is on its way, so that a commit may wait for it a little; drop the guard when it is
    /// submitted or given up.
    pub fn expect_delivery(&self) -> ExpectedDelivery<S> {
        self.0.expected.set(self.0.expected.get() + 1);
        ExpectedDelivery(self.clone())
    }

    /// Waits until the batch being built has room, and checks that changes are taken. To be called right before the turn
    /// that appends: whoever waits for anything else in between finds the room taken by others.
    pub(crate) async fn admit(&self) -> Result<(), EngineError> {
        self.admit_with(|building| building.batch.record_bytes() < BUILDING_BYTES_MAX).await
    }

    /// As [`Shard::admit`], for a part of a large body.
    pub(crate) async fn admit_bulk(&self) -> Result<(), EngineError> {
        let has_room = |building: &Building| {
            building.batch.record_bytes() < BUILDING_BYTES_MAX && building.bulk_bytes < BULK_BYTES_MAX
        };
        self.admit_with(has_room).await
    }

    async fn admit_with(&self, has_room: impl Fn(&Building) -> bool) -> Result<(), EngineError> {
        loop {
            let room = self.0.room.notified();
            {
                let log = self.0.log.borrow();
                log.check_open(self.0.id)?;
                if has_room(&log.building) {
                    return Ok(());
                }
            }
            room.await;
        }
    }

    /// Checks that there is space for new messages: on a full device only what frees space or takes little goes on.
    pub(crate) async fn check_space(&self) -> Result<(), EngineError> {
        let inner = &self.0;
        {
            let mut log = inner.log.borrow_mut();
            if !log.low_space {
                return Ok(());
            }
            let now = inner.storage.now();
            if now.saturating_sub(log.looked_for_space) < SPACE_LOOK_INTERVAL {
                return Err(EngineError::Full);
            }
            log.looked_for_space = now;
        }
        let _one_at_a_time = inner.space_lock.lock().await;
        // There must be more than the reserve, or the next segment takes it at once.
        let wanted = inner.config.reserve_bytes.saturating_add(2 * self.small_segment_bytes());
        if inner.wal.free_bytes().await? < wanted {
            return Err(EngineError::Full);
        }
        inner.wal.set_aside(inner.config.reserve_bytes).await?;
        if std::mem::take(&mut inner.log.borrow_mut().low_space) {
            self.tell(ShardEvent::SpaceBack);
        }
        Ok(())
    }

    /// Gives up the reserve, so that what needs a little space can be tried again. Whether it has been given up since the
    /// call, by this caller or another.
    pub(crate) async fn use_reserve(&self) -> Result<bool, StorageError> {
        let inner = &self.0;
        if inner.config.reserve_bytes == 0 {
            return Ok(false);
        }
        let was_low = inner.log.borrow().low_space;
        let _one_at_a_time = inner.space_lock.lock().await;
        {
            let mut log = inner.log.borrow_mut();
            if std::mem::replace(&mut log.low_space, true) {
                return Ok(!was_low);
            }
            log.looked_for_space = inner.storage.now();
        }
        self.tell(ShardEvent::SpaceLow);
        if let Err(error) = inner.wal.release().await {
            // It is still there, to be given up when that is tried again.
            inner.log.borrow_mut().low_space = false;
            return Err(error);
        }
        Ok(true)
    }

    /// What a segment gets where there is no space for a whole one.
    fn small_segment_bytes(&self) -> u64 {
        let config = &self.0.config;
        config.segment_size_bytes.min(config.reserve_bytes / 4)
    }

    /// Ends a submission: the caller waits for the commit of everything pushed so far.
    pub(crate) fn ticket(&self, log: &mut Log) -> Ticket {
        let (sender, receiver) = oneshot::channel();
        log.building.waiters.push(sender);
        log.building.wanted = true;
        self.0.work.notify_one();
        Ticket(receiver, self.0.id)
    }

    async fn run_committer(self) {
        loop {
            loop {
                let (wanted, stopping, unmarked) = {
                    let log = self.0.log.borrow();
                    let wanted = log.building.wanted || !log.seals.is_empty();
                    (wanted, log.stopping, log.unmarked && log.poisoned.is_none())
                };
                if wanted || stopping {
                    break;
                }
                if unmarked {
                    let sleep = self.0.storage.sleep(IDLE_MARK_AFTER);
                    // A wake-up may be left over from a batch that is long committed.
                    let is_idle = !first_of(self.0.work.notified(), sleep).await;
                    if is_idle && !self.0.log.borrow().building.wanted && !self.0.log.borrow().stopping {
                        self.mark_durable().await;
                    }
                } else {
                    self.0.work.notified().await;
                }
            }
            let seals = std::mem::take(&mut self.0.log.borrow_mut().seals);
            if !self.0.log.borrow().building.batch.is_empty() {
                self.gather().await;
                self.commit().await;
            } else if self.0.log.borrow().stopping {
                self.answer_barriers();
                break;
            } else {
                self.answer_barriers();
            }
            if !seals.is_empty() {
                self.seal_for(seals).await;
            }
            let due = self.0.log.borrow().bytes_since_checkpoint >= self.0.config.checkpoint_bytes;
            if due && !self.0.checkpoint_scheduled.replace(true) {
                let shard = self.clone();
                self.0.storage.spawn(async move {
                    if let Err(error) = shard.checkpoint().await {
                        shard.note_failed_checkpoint(&error);
                    }
                    shard.0.checkpoint_scheduled.set(false);
                });
            }
        }
        self.0.committer_ended.set(true);
        self.0.ended.notify_waiters();
    }

    /// Seals the active segment, so that compaction can have it, and answers those who asked for that.
    async fn seal_for(&self, waiting: Vec<oneshot::Sender<Result<(), EngineError>>>) {
        let sealed = match self.poisoned() {
            Some(reason) => Err(EngineError::Poisoned { shard: self.0.id, reason }),
            None => self.seal_active().await.map_err(|error| {
                self.poison_unless_full(&error);
                error.into()
            }),
        };
        for waiter in waiting {
            // Whoever has gone away does not need it any more.
            let _ = waiter.send(sealed.clone());
        }
    }

    /// Lets the active segment be sealed although it is not full.
    pub(crate) async fn seal(&self) -> Result<(), EngineError> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            log.seals.push(sender);
        }
        self.0.work.notify_one();
        receiver.await.unwrap_or(Err(EngineError::Stopping(self.0.id)))
    }

    /// Waits until everything that was pushed before is published or has failed, also where the shard is stopping.
    pub(crate) async fn settle(&self) {
        let ticket = {
            let mut log = self.0.log.borrow_mut();
            if self.0.committer_ended.get() { return } else { self.ticket(&mut log) }
        };
        // Whatever has failed is settled, too.
        let _ = ticket.committed().await;
    }

    /// Answers those who wait for nothing but what went before.
    fn answer_barriers(&self) {
        let (waiters, committed) = {
            let mut log = self.0.log.borrow_mut();
            log.building.wanted = false;
            let committed =
                Committed { segment: log.position.segment, records_offset: log.position.offset, first_ordinal: 0 };
            (std::mem::take(&mut log.building.waiters), committed)
        };
        for waiter in waiters {
            let _ = waiter.send(Ok(committed));
        }
    }

    /// Lets further deliveries join the batch: as long as each round of the other tasks brings some, and not for long.
    async fn gather(&self) {
        let inner = &self.0;
        let begun = inner.storage.now();
        let mut waiters = 0;
        loop {
            {
                let log = inner.log.borrow();
                let now_waiting = log.building.waiters.len();
                let enough = log.building.batch.record_bytes() >= BATCH_BYTES_GATHERED;
                if enough || log.stopping || inner.expected.get() == 0 || now_waiting == waiters {
                    break;
                }
                waiters = now_waiting;
            }
            if inner.storage.now().saturating_sub(begun) >= Duration::from_micros(inner.config.gather_us_max) {
                break;
            }
            inner.storage.yield_now().await;
        }
    }

    /// Writes, syncs and publishes the batch that has been built.
    async fn commit(&self) {
        let inner = &self.0;
        let building = std::mem::take(&mut inner.log.borrow_mut().building);
        inner.room.notify_waiters();
        if let Some(reason) = self.poisoned() {
            return self.fail(building, EngineError::Poisoned { shard: inner.id, reason });
        }
        let batch_bytes = building.batch.total_bytes();
        if batch_bytes > BATCH_BYTES_MAX {
            // Every submission has a bound of its own, so this is a bug; those who submitted are the ones to know.
            let refusal = Refusal::TooLarge { octets: batch_bytes, limit: BATCH_BYTES_MAX };
            return self.fail(building, refusal.into());
        }
        if let Err(error) = self.make_room(batch_bytes, building.records.len(), &building.dictionaries).await {
            return self.fail(building, error);
        }
        let records_start = building.batch.records_start();
        let Building { batch, records, touched, waiters, placed, dictionaries, .. } = building;
        // Where the log goes on: that is where the batch was written.
        let committed = || {
            let log = inner.log.borrow();
            Committed {
                segment: log.position.segment,
                records_offset: log.position.offset + records_start,
                first_ordinal: log.active.as_ref().map_or(0, |active| active.entries.len() as u32),
            }
        };
        let bytes = {
            let log = inner.log.borrow();
            batch.finish(log.next_sequence, inner.epoch, log.position, log.durable)
        };
        let mut rest = Some((records, touched, waiters, placed));
        if planted::is_on(Bug::PublishBeforeSync) {
            let (records, touched, waiters, placed) = rest.take().expect("just made");
            let committed = committed();
            placed.iter().for_each(|(known, place)| known.set(Some(committed.location(*place))));
            self.publish(committed, batch_bytes, records, touched, waiters);
        }
        let records_count = rest.as_ref().map_or(0, |(records, ..)| records.len());
        let result = self.write_batch(bytes, records_count, &dictionaries).await;
        let Some((records, touched, waiters, placed)) = rest else { return };
        match result {
            Err(error) => {
                let building = Building { records, touched, waiters, ..Building::default() };
                self.fail(building, error);
            }
            Ok(()) => {
                let committed = committed();
                placed.iter().for_each(|(known, place)| known.set(Some(committed.location(*place))));
                self.publish(committed, batch_bytes, records, touched, waiters);
            }
        }
    }

    /// Writes a batch where the log goes on. Durable on return. Some file systems have no space although it was set aside; then
    /// the segment ends here, and the batch goes to another, if there is space for that.
    ///
    /// # Errors
    /// [`EngineError::Full`]: the log goes on without it. Any other: it takes no more.
    async fn write_batch(
        &self,
        mut bytes: Vec<u8>,
        records: usize,
        dictionaries: &[Arc<DictionarySet>],
    ) -> Result<(), EngineError> {
        let inner = &self.0;
        let mut is_second = false;
        loop {
            let (name, position) = {
                let log = inner.log.borrow();
                (log.active.as_ref().expect("make_room began a segment").name, log.position)
            };
            let (written, returned) = inner.wal.append(name, position.offset, bytes, true).await;
            bytes = returned;
            let Err(error) = written else { return Ok(()) };
            if !matches!(error, StorageError::NoSpace(_)) {
                if planted::is_on(Bug::IgnoreFailedSync) {
                    return Ok(());
                }
                self.poison(&error);
                return Err(EngineError::Storage(Arc::new(error)));
            }
            self.end_active_here();
            if std::mem::replace(&mut is_second, true) {
                return Err(EngineError::Full);
            }
            self.make_room(bytes.len() as u64, records, dictionaries).await?;
            let log = inner.log.borrow();
            move_batch(&mut bytes, position, inner.epoch, log.position, log.durable);
        }
    }

    /// Lets the active segment take no more. It is sealed before the next batch.
    fn end_active_here(&self) {
        if let Some(active) = &mut self.0.log.borrow_mut().active {
            active.capacity = 0;
        }
    }

    /// Publishes a batch in one step, without an await, and answers its waiters.
    fn publish(
        &self,
        committed: Committed,
        batch_bytes: u64,
        records: Vec<PendingRecord>,
        touched: Vec<MailboxId>,
        waiters: Vec<Waiter>,
    ) {
        let inner = &self.0;
        let mut log = inner.log.borrow_mut();
        let mut state = inner.state.borrow_mut();
        self.count(|stats| {
            stats.batches += 1;
            stats.records += records.len() as u64;
            stats.log_bytes += batch_bytes;
        });
        let active = log.active.as_mut().expect("the batch was written to it");
        for (index, pending) in records.into_iter().enumerate() {
            let PendingRecord { lsn, transaction, record, offset, len } = pending;
            let location = committed.location(PlaceInBatch { offset, len, index: index as u32 });
            active.entries.push(FooterEntry {
                offset_units: location.offset_units,
                len,
                kind: record.kind(),
                flags: 0,
                generation: 0,
                lsn,
            });
            state.apply(lsn, transaction, record, location);
        }
        for mailbox in touched {
            if let Some(slot) = state.slots.get_mut(&mailbox)
                && let Some(tip) = &mut slot.tip
            {
                tip.pending -= 1;
                if tip.pending == 0 {
                    slot.tip = None;
                } else {
                    // A mailbox that is never at rest keeps its tip: what is published now needs no room in it.
                    let published = slot.meta.highest_modseq;
                    tip.modified.drain(..tip.modified.partition_point(|(modseq, _)| modseq.0 <= published));
                }
            }
        }
        log.position.offset += batch_bytes;
        log.durable = log.position;
        log.next_sequence += 1;
        log.durable_sequence = log.next_sequence;
        log.unmarked = true;
        log.bytes_since_checkpoint += batch_bytes;
        drop(state);
        drop(log);
        for waiter in waiters {
            // A caller that has gone away does not undo its change.
            let _ = waiter.send(Ok(committed));
        }
    }

    /// Fails a batch, everything queued behind it, and the tip they stand on.
    fn fail(&self, building: Building, error: EngineError) {
        let queued = std::mem::take(&mut self.0.log.borrow_mut().building);
        self.0.recent_blocks.borrow_mut().clear();
        self.0.state.borrow_mut().discard_tips();
        for waiter in building.waiters.into_iter().chain(queued.waiters) {
            let _ = waiter.send(Err(error.clone()));
        }
        self.0.room.notify_waiters();
    }

    /// Takes no more changes until the shard is opened again.
    pub(crate) fn poison(&self, error: &StorageError) {
        let mut log = self.0.log.borrow_mut();
        if log.poisoned.is_none() {
            let reason: Arc<str> = error.to_string().into();
            log.poisoned = Some(Arc::clone(&reason));
            self.tell(ShardEvent::Poisoned(reason));
        }
    }

    /// As [`Shard::poison`], but for want of space, which harms nothing.
    fn poison_unless_full(&self, error: &StorageError) {
        if !matches!(error, StorageError::NoSpace(_)) {
            self.poison(error);
        }
    }

    /// Makes sure that the active segment can take a batch and has the dictionaries that it needs, sealing it and beginning
    /// the next where that is not so.
    async fn make_room(
        &self,
        batch_bytes: u64,
        records: usize,
        needed: &[Arc<DictionarySet>],
    ) -> Result<(), EngineError> {
        let (fits, has_active) = {
            let log = self.0.log.borrow();
            let fits = log.active.as_ref().is_some_and(|active| {
                // The footer must not need space of its own when the time comes.
                let footer = Footer::len_of(active.entries.len() + records);
                let has_room = log.position.offset + batch_bytes + footer <= active.capacity;
                has_room && needed.iter().flat_map(|set| set.iter()).all(|it| active.dictionaries.contains(&it.id))
            });
            (fits, log.active.is_some())
        };
        if fits {
            return Ok(());
        }
        if has_active && let Err(error) = self.seal_active().await {
            self.poison_unless_full(&error);
            return Err(error.into());
        }
        let dictionaries = self.dictionaries_to_embed(needed);
        let needed = batch_bytes + Footer::len_of(records);
        let (size, small) = (self.0.config.segment_size_bytes, self.small_segment_bytes());
        // On a device that is nearly full: a part of a segment, first beside the reserve, then out of it.
        let size = if self.0.log.borrow().low_space { small } else { size };
        let mut begun = self.begin_segment(needed, size, &dictionaries).await;
        if matches!(begun, Err(StorageError::NoSpace(_))) && small < size {
            begun = self.begin_segment(needed, small, &dictionaries).await;
        }
        if matches!(begun, Err(StorageError::NoSpace(_))) && self.use_reserve().await? {
            begun = self.begin_segment(needed, small, &dictionaries).await;
        }
        begun.map_err(|error| {
            self.poison_unless_full(&error);
            error.into()
        })
    }

    /// Seals the active segment. Its batches are all durable. If there is no space for that, it stays the active one, and takes
    /// no more.
    pub(crate) async fn seal_active(&self) -> Result<(), StorageError> {
        let inner = &self.0;
        inner.recent_blocks.borrow_mut().clear();
        let (active, data_end) = {
            let mut log = inner.log.borrow_mut();
            let data_end = log.position.offset;
            match log.active.take() {
                Some(active) => (active, data_end),
                None => return Ok(()),
            }
        };
        let records = active.entries.len() as u32;
        // Until the seal is done readers find the segment in the log; after it, under the same name in the blobs.
        let footer = Footer { data_end, entries: active.entries };
        let mut result = inner.wal.seal(active.name, data_end, footer.encode()).await;
        if matches!(result, Err(StorageError::NoSpace(_))) {
            // Its new name may need room in a directory. Whatever becomes of the reserve, the segment must not be forgotten.
            match self.use_reserve().await {
                Ok(true) => result = inner.wal.seal(active.name, data_end, footer.encode()).await,
                Ok(false) => {}
                Err(error) => result = Err(error),
            }
        }
        if matches!(result, Err(StorageError::NoSpace(_))) {
            inner.log.borrow_mut().active = Some(ActiveSegment { capacity: 0, entries: footer.entries, ..active });
            return result;
        }
        inner.sealed.borrow_mut().insert(active.name.segment, active.name);
        result?;
        let entry = SegmentEntry { segment: active.name.segment, epoch: inner.epoch, generation: 0, data_end, records };
        {
            let mut log = inner.log.borrow_mut();
            log.manifest.segments.push(entry);
            log.manifest.segments.sort_by_key(|entry| entry.segment);
        }
        self.count(|stats| stats.segments_sealed += 1);
        Ok(())
    }

    /// What the next segment embeds: what the batch needs that begins it, and what messages are compressed with now and were
    /// before, so that those on their way find it. On a full device there are none on their way, and each octet counts.
    fn dictionaries_to_embed(&self, needed: &[Arc<DictionarySet>]) -> Vec<Arc<Dictionary>> {
        let is_full = self.0.log.borrow().low_space;
        let shared = self.0.dictionaries.get().filter(|_| !is_full).map(|shared| shared.in_use()).unwrap_or_default();
        let mut embedded: Vec<Arc<Dictionary>> = Vec::new();
        for dictionary in needed.iter().chain(&shared).flat_map(|set| set.iter()) {
            if embedded.len() < DICTIONARIES_MAX && !embedded.iter().any(|known| known.id == dictionary.id) {
                embedded.push(Arc::clone(dictionary));
            }
        }
        let has = |id| embedded.iter().any(|known| known.id == id);
        assert!(
            needed.iter().flat_map(|set| set.iter()).all(|it| has(it.id)),
            "a batch of more sets than a header has room for"
        );
        embedded
    }

    async fn begin_segment(
        &self,
        needed_bytes: u64,
        size: u64,
        dictionaries: &[Arc<Dictionary>],
    ) -> Result<(), StorageError> {
        let inner = &self.0;
        let (segment, first_batch) = {
            let log = inner.log.borrow();
            (log.next_segment, log.next_sequence)
        };
        let name = SegmentName { segment, epoch: inner.epoch };
        let header = SegmentHeader {
            store: inner.store,
            shard: inner.id,
            epoch: inner.epoch,
            segment,
            generation: 0,
            first_batch,
            as_of: Lsn::default(),
            dictionaries: dictionaries.to_vec(),
        };
        let header = header.encode();
        let header_len = header.len() as u64;
        let capacity = size.max(header_len + needed_bytes);
        inner.wal.begin(name, header, capacity).await?;
        let mut log = inner.log.borrow_mut();
        let dictionaries = dictionaries.iter().map(|dictionary| dictionary.id).collect();
        log.active = Some(ActiveSegment { name, capacity, entries: Vec::new(), dictionaries });
        log.next_segment = SegmentId(segment.0 + 1);
        log.position = Position { segment, offset: header_len };
        log.durable = log.position;
        log.durable_sequence = log.next_sequence;
        Ok(())
    }

    /// Appends an empty batch that says the last one is durable, without a sync of its own.
    async fn mark_durable(&self) {
        let inner = &self.0;
        let (name, position, bytes) = {
            let mut log = inner.log.borrow_mut();
            log.unmarked = false;
            let Some(active) = &log.active else { return };
            let batch = BatchBuilder::default();
            let footer = Footer::len_of(active.entries.len());
            if log.position.offset + batch.total_bytes() + footer > active.capacity {
                return;
            }
            (active.name, log.position, batch.finish(log.next_sequence, inner.epoch, log.position, log.durable))
        };
        let len = bytes.len() as u64;
        match inner.wal.append(name, position.offset, bytes, false).await.0 {
            Ok(()) => {
                let mut log = inner.log.borrow_mut();
                log.position.offset += len;
                log.next_sequence += 1;
            }
            // Nothing was lost but a mark. Some of it may be there.
            Err(StorageError::NoSpace(_)) => self.end_active_here(),
            Err(error) => self.poison(&error),
        }
    }

    /// Stops taking changes, finishes those in hand, takes a checkpoint and seals the log. What was acknowledged is
    /// durable with or without this; a shard that was stopped starts without replay.
    ///
    /// # Errors
    /// The log was poisoned, or fails now. Nothing acknowledged is lost by that.
    pub async fn stop(&self) -> Result<(), EngineError> {
        let inner = &self.0;
        if self.has_receipts() && inner.log.borrow().poisoned.is_none() {
            self.checkpoint().await?;
        }
        inner.log.borrow_mut().stopping = true;
        inner.work.notify_one();
        inner.room.notify_waiters();
        while !inner.committer_ended.get() {
            let ended = inner.ended.notified();
            if inner.committer_ended.get() {
                break;
            }
            ended.await;
        }
        if let Some(reason) = &inner.log.borrow().poisoned {
            return Err(EngineError::Poisoned { shard: inner.id, reason: Arc::clone(reason) });
        }
        self.checkpoint().await?;
        self.seal_active().await?;
        let (durable, end, sequence) = {
            let log = inner.log.borrow();
            (log.durable, log.position, log.next_sequence)
        };
        let passes_over_marks = |manifest: &mut Manifest| {
            // Behind what is durable there were marks of an idle log alone, and the seal has made these durable as well.
            if manifest.replay_from == durable {
                (manifest.replay_from, manifest.replay_sequence) = (end, sequence);
            }
        };
        self.commit_manifest(passes_over_marks).await?;
        Ok(())
    }

    /// Commits the next manifest of this epoch, edited. Durable on return.
    pub(crate) async fn commit_manifest(&self, edit: impl FnOnce(&mut Manifest)) -> Result<(), EngineError> {
        let inner = &self.0;
        let _one_at_a_time = inner.manifest_lock.lock().await;
        let mut manifest = inner.log.borrow().manifest.clone();
        let known: BTreeSet<SegmentId> = manifest.segments.iter().map(|entry| entry.segment).collect();
        edit(&mut manifest);
        manifest.number += 1;
        let bytes = manifest.to_bytes();
        let mut committed = inner.manifests.commit(inner.epoch, manifest.number, bytes.clone()).await;
        if matches!(committed, Err(StorageError::NoSpace(_))) && self.use_reserve().await? {
            committed = inner.manifests.commit(inner.epoch, manifest.number, bytes).await;
        }
        match committed {
            Ok(()) => {}
            Err(error @ StorageError::NoSpace(_)) => return Err(error.into()),
            Err(error) => {
                // Whether it counts is unknown: this epoch can commit nothing more.
                self.poison(&error);
                return Err(error.into());
            }
        }
        {
            // Segments may have been sealed meanwhile.
            let mut log = inner.log.borrow_mut();
            let newer = log.manifest.segments.iter().filter(|entry| !known.contains(&entry.segment));
            manifest.segments.extend(newer.cloned());
            manifest.segments.sort_by_key(|entry| entry.segment);
            log.manifest = manifest.clone();
        }
        // The commit counts, whatever becomes of this: what is left behind goes next time.
        let _ = inner.manifests.tidy(inner.epoch, manifest.number).await;
        Ok(())
    }

    /// The id of a message whose record has this LSN.
    pub(crate) fn message_id(&self, lsn: Lsn) -> MessageId {
        MessageId { origin: self.0.id, lsn }
    }

    /// Reads bytes of a record; fewer only if the segment ends.
    pub(crate) async fn read_segment(
        &self,
        segment: SegmentId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, EngineError> {
        self.count(|stats| {
            stats.record_reads += 1;
            stats.record_read_bytes += len as u64;
        });
        crate::read::count_octets_read(len);
        self.read_uncounted(segment, offset, len).await
    }

    /// As [`Shard::read_segment`] for who reads on nobody's behalf.
    pub(crate) async fn read_uncounted(
        &self,
        segment: SegmentId,
        offset: u64,
        len: usize,
    ) -> Result<Vec<u8>, EngineError> {
        let inner = &self.0;
        let active = inner.log.borrow().active.as_ref().map(|active| active.name);
        if let Some(name) = active
            && name.segment == segment
        {
            return Ok(inner.wal.read(name, offset, len).await?);
        }
        let name = inner.sealed.borrow().get(&segment).copied();
        match name {
            Some(name) => Ok(inner.blobs.get(BlobName::Segment(name), offset, len).await?),
            None => {
                // It is being sealed right now.
                let name = SegmentName { segment, epoch: inner.epoch };
                Ok(inner.wal.read(name, offset, len).await?)
            }
        }
    }

    /// Sees to it that the unpacker knows the dictionaries that frames of a segment name. Where that of the segment is
    /// damaged, one that is in use or another segment's will do; if there is none, it is missed when the frame is unpacked.
    ///
    /// # Errors
    /// It was not found, and some of where it may be could not be read.
    pub(crate) async fn have_dictionaries(&self, segment: SegmentId, frames: &[FrameInfo]) -> Result<(), EngineError> {
        let unpacker = &self.0.unpacker;
        let missing = || {
            let needed = frames.iter().filter_map(FrameInfo::needs_dictionary);
            needed.filter(|&id| !unpacker.borrow().knows_dictionary(id)).collect::<Vec<u32>>()
        };
        if missing().is_empty() {
            return Ok(());
        }
        let in_use = self.0.dictionaries.get().map(|shared| shared.in_use()).unwrap_or_default();
        let learn = |dictionary: &Arc<Dictionary>| unpacker.borrow_mut().add_dictionary(Arc::clone(dictionary));
        in_use.iter().flat_map(|set| set.iter()).for_each(learn);
        let is_lost = |id: &u32| self.0.lost_dictionaries.borrow().contains(id);
        if missing().iter().all(is_lost) {
            return Ok(());
        }
        let mut segments: BTreeSet<SegmentId> = self.0.sealed.borrow().keys().copied().collect();
        segments.extend([segment, self.0.log.borrow().position.segment]);
        let mut segments: Vec<SegmentId> = segments.into_iter().collect();
        segments.sort_by_key(|other| other.0.abs_diff(segment.0));
        let mut failure = None;
        for segment in segments {
            match self.dictionaries_of(segment).await {
                Ok(dictionaries) => dictionaries.iter().for_each(learn),
                // Nor would the others answer, each of them after a long time.
                Err(EngineError::Storage(error)) if matches!(*error, StorageError::NoAnswer { .. }) => {
                    return Err(EngineError::Storage(error));
                }
                Err(error) => failure = Some(error),
            }
            if missing().iter().all(is_lost) {
                return Ok(());
            }
            self.0.storage.yield_now().await;
        }
        match failure {
            // It may be there the next time.
            Some(error) => Err(error),
            None => {
                self.0.lost_dictionaries.borrow_mut().extend(missing());
                Ok(())
            }
        }
    }

    /// Shares the store's dictionaries with this shard, and offers those that its newest segment has. Without them mail takes
    /// more room and is no less safe: what cannot be read here keeps no store closed.
    pub(crate) async fn share_dictionaries(&self, shared: &Arc<SharedDictionaries>) {
        // More than one, because some may be damaged, or have been begun without for lack of space.
        let newest: Vec<SegmentId> = {
            let sealed = self.0.sealed.borrow();
            let newest_first = || sealed.keys().rev().copied();
            let of_log = newest_first().filter(|segment| !segment.is_compacted()).take(SEGMENTS_ASKED);
            of_log.chain(newest_first().take(SEGMENTS_ASKED)).collect()
        };
        for segment in newest {
            let dictionaries = self.dictionaries_of(segment).await.unwrap_or_default();
            DictionarySet::newest_of(&dictionaries).into_iter().for_each(|set| shared.offer(set));
        }
        // Nobody has set it before: a shard is opened once.
        let _ = self.0.dictionaries.set(Arc::clone(shared));
    }

    /// The dictionaries that a segment embeds, without those that are damaged. A segment that is gone has none.
    pub(crate) async fn dictionaries_of(&self, segment: SegmentId) -> Result<Vec<Arc<Dictionary>>, EngineError> {
        let read = async |len| match self.read_segment(segment, 0, len).await {
            Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => Ok(Vec::new()),
            bytes => bytes,
        };
        let first = read(BLOCK_BYTES as usize).await?;
        let Ok(len) = SegmentHeader::length(&first) else { return Ok(Vec::new()) };
        let header = if len > first.len() { read(len).await? } else { first };
        Ok(SegmentHeader::decode_some(&header).map(|(header, _)| header.dictionaries).unwrap_or_default())
    }

    /// Names a position for people.
    pub(crate) fn describe(&self, position: Position) -> String {
        let name = self.0.sealed.borrow().get(&position.segment).copied();
        let name = name.unwrap_or(SegmentName { segment: position.segment, epoch: self.0.epoch });
        self.0.storage.describe(self.0.id, name, position)
    }

    /// The lock of an account's structure.
    pub(crate) fn account_lock(&self, account: AccountId) -> Rc<Mutex<()>> {
        let AccountLocks { by_account, kept } = &mut *self.0.account_locks.borrow_mut();
        // As many may be held as there are accounts in an import.
        if by_account.len() > 1024.max(2 * *kept) {
            by_account.retain(|_, lock| Rc::strong_count(lock) > 1);
            *kept = by_account.len();
        }
        Rc::clone(by_account.entry(account).or_default())
    }
}

/// See [`Shard::expect_delivery`].
pub struct ExpectedDelivery<S: Storage>(Shard<S>);

impl<S: Storage> Drop for ExpectedDelivery<S> {
    fn drop(&mut self) {
        let expected = &self.0.0.expected;
        expected.set(expected.get() - 1);
    }
}
