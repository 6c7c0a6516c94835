//! The scrub: reads all that lies on storage of a shard that is open, slowly, and names what is damaged before somebody
//! needs it.
//!
//! It looks at the manifest, at the pages of the index and at every sealed segment, with the tests of `check`. What it
//! reads goes by no cache of the shard, comes in portions, and is verified off the worker. A segment is held while it is
//! looked at; one that compaction has taken out of the log meanwhile needs no looking at. What can be mended at once is:
//! pages are put together from the log, directories and manifests are written again.
//!
//! A pass looks at the index first, then at the segments, from a random one on and round to it again: so a node that is
//! restarted before a pass has come to its end gets round to everything in the end.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Mutex;

use crate::error::{EngineError, Finding};
use crate::format::batch::BatchHeader;
use crate::format::frame::{FrameInfo, Unpacker};
use crate::format::manifest::{IndexEntry, Manifest, SegmentEntry};
use crate::format::message::MessageHead;
use crate::format::page::{
    PAGE_HEADER_BYTES, PageKind, PageLocation, claimed_page_len, open_directory_page, open_page,
};
use crate::format::record::kind;
use crate::format::segment::{FOOTER_ENTRY_BYTES, SegmentHeader, TRAILER_BYTES, Trailer};
use crate::format::{BLOCK_BYTES, FormatError, PiecewiseChecksum};
use crate::ids::{AccountId, Epoch, Location, MailboxId, Position, SegmentId};
use crate::index::Message;
use crate::node::{SYSTEM_SHARD, Superblock};
use crate::read::open_block;
use crate::recovery::{SegmentSource, gone_segment, judge_alone, open_batch, scan_segment};
use crate::shard::{Shard, ShardEvent};
use crate::storage::local::{index_file, segment_file, shard_directory};
use crate::storage::{BlobName, BlobStore, ManifestStore, SegmentName, Storage, StorageError};
use crate::verify::{
    Broken, Concerned, Place, Received, add_findings, block_frame, missing_block, open_message, verify_block,
};

/// Bytes that are read at a time.
pub const PORTION_BYTES: usize = 256 << 10;
/// Findings that are kept to be shown; all are told as they are found.
pub const FINDINGS_KEPT: usize = 1000;
/// Mailboxes whose pages one pass puts together from the log: each takes a reading of all of it. The others are when
/// somebody needs them.
pub const PAGES_MENDED_MAX: u64 = 64;
/// How long a shard is open before its first pass begins by itself.
const FIRST_PASS_AFTER: Duration = Duration::from_secs(60);
/// A pass that sleeps looks so often whether it is still wanted.
const NAP_MAX: Duration = Duration::from_secs(1);
/// Pages up to this are verified on the worker: that takes less than handing them over and back.
const PAGE_BYTES_HERE: usize = 16 << 10;
/// A directory page is no longer.
const DIRECTORY_PAGE_BYTES_MAX: usize = 64 << 20;
/// Mailboxes that are taken from the state at a time.
const MAILBOXES_PER_TURN: usize = 256;
/// Messages that are looked at before others have their turn.
const MESSAGES_PER_TURN: usize = 4096;

/// What a pass has done.
#[derive(Clone, Debug, Default)]
pub struct ScrubReport {
    /// Read from storage.
    pub bytes: u64,
    pub segments: u64,
    pub pages: u64,
    /// How much was found, and how much of that has been mended.
    pub findings: u64,
    pub mended: u64,
}

/// How far the scrub of a shard is.
#[derive(Clone, Debug, Default)]
pub struct ScrubStatus {
    pub is_running: bool,
    /// Octets of the log that the pass under way has looked at, or the last one, and how many there are.
    pub log_bytes_done: u64,
    pub log_bytes: u64,
    /// Passes that have come to their end since the shard was opened.
    pub passes: u64,
    /// What the pass under way has found, or the last one: the newest last, and no more than [`FINDINGS_KEPT`].
    pub findings: VecDeque<Finding>,
}

/// What a shard keeps in mind of its scrub.
#[derive(Default)]
pub(crate) struct Scrub {
    /// Passes go one after another.
    lock: Mutex<()>,
    /// Whoever asks for a pass takes the next number: a pass with an older one gives up.
    turn: Cell<u64>,
    status: RefCell<ScrubStatus>,
}

impl<S: Storage> Shard<S> {
    /// Looks at everything once, reading no more than so many octets in a second, or as fast as it can with 0. A pass
    /// that is under way gives up for this one. What is found is told by events.
    ///
    /// # Errors
    /// The shard is stopping, or somebody else has asked for a pass meanwhile. What cannot be read is a finding.
    pub async fn scrub(&self, bytes_per_s: u64) -> Result<ScrubReport, EngineError> {
        let scrub = &self.0.scrub;
        let turn = scrub.turn.get() + 1;
        scrub.turn.set(turn);
        let _one_at_a_time = scrub.lock.lock().await;
        {
            let mut status = scrub.status.borrow_mut();
            (status.is_running, status.log_bytes_done) = (true, 0);
            status.findings.clear();
        }
        let mut pass = Pass { shard: self.clone(), turn, bytes_per_s, report: ScrubReport::default() };
        let result = pass.run().await;
        let report = pass.report;
        let mut status = scrub.status.borrow_mut();
        status.is_running = false;
        result?;
        status.passes += 1;
        drop(status);
        self.count(|stats| {
            stats.scrub_passes += 1;
            stats.scrub_finished_ms = self.0.storage.wall_clock_ms();
        });
        self.tell(ShardEvent::Scrubbed(report.clone()));
        Ok(report)
    }

    pub fn scrub_status(&self) -> ScrubStatus {
        self.0.scrub.status.borrow().clone()
    }

    /// Scrubs by itself, again and again, as long as the shard takes changes.
    pub(crate) fn scrub_from_time_to_time(&self) {
        let (shard, storage) = (Rc::downgrade(&self.0), self.0.storage.clone());
        let (bytes_per_s, interval) = (self.0.config.scrub_bytes_per_s, self.0.config.scrub_interval);
        self.0.storage.spawn(async move {
            let mut pause = FIRST_PASS_AFTER;
            loop {
                storage.sleep(pause).await;
                pause = interval;
                let Some(shard) = shard.upgrade().map(Self) else { break };
                if shard.0.log.borrow().stopping {
                    break;
                }
                // It fails only where the shard stops, or for another pass.
                let _ = shard.scrub(bytes_per_s).await;
            }
        });
    }

    /// Whose a mailbox is, and its name.
    pub fn mailbox_name(&self, mailbox: MailboxId) -> Option<(AccountId, String)> {
        let state = self.0.state.borrow();
        state.slots.get(&mailbox).map(|slot| (slot.meta.account, slot.meta.name.clone()))
    }

    /// Some mailboxes with ids above one, ascending.
    pub(crate) fn mailboxes_after(&self, after: MailboxId) -> Vec<MailboxId> {
        let state = self.0.state.borrow();
        let later = state.slots.keys_from(MailboxId(after.0 + 1));
        later.take(MAILBOXES_PER_TURN).collect()
    }

    /// Lets `look` see every message of every mailbox, without keeping any index in memory.
    pub(crate) async fn visit_messages(&self, mut look: impl FnMut(MailboxId, &Message)) -> Result<(), EngineError> {
        let (mut after, mut seen) = (MailboxId(0), 0);
        loop {
            let mailboxes = self.mailboxes_after(after);
            let Some(&last) = mailboxes.last() else { return Ok(()) };
            after = last;
            for mailbox in mailboxes {
                let looked = self.inspect(mailbox, |_, index| {
                    index.messages.iter().for_each(|message| look(mailbox, &message));
                    index.messages.len()
                });
                seen += looked.await?.unwrap_or(0) + 16;
                if seen >= MESSAGES_PER_TURN {
                    seen = 0;
                    self.0.storage.yield_now().await;
                }
            }
        }
    }
}

/// A look at everything.
struct Pass<S: Storage> {
    shard: Shard<S>,
    turn: u64,
    bytes_per_s: u64,
    report: ScrubReport,
}

/// Bytes of a file that are read front to back.
struct Stream {
    name: BlobName,
    /// Where `bytes` begin in the file.
    start: u64,
    bytes: Vec<u8>,
    limit: u64,
}

impl Stream {
    fn new(name: BlobName, start: u64, limit: u64) -> Self {
        Self { name, start, bytes: Vec::new(), limit }
    }

    /// Takes out the next `len` bytes, or what there is, without a copy of them.
    fn take(&mut self, len: usize) -> Vec<u8> {
        let rest = self.bytes.split_off(len.min(self.bytes.len()));
        let taken = std::mem::replace(&mut self.bytes, rest);
        self.start += taken.len() as u64;
        taken
    }

    /// Gives up what comes before an offset.
    fn skip_to(&mut self, offset: u64) {
        let ahead = (offset - self.start) as usize;
        self.bytes.drain(..ahead.min(self.bytes.len()));
        self.start = offset;
    }
}

/// What a batch turned out to be.
struct Examined {
    unpacker: Unpacker,
    bytes: Vec<u8>,
    is_good: bool,
    /// Offsets of the records that could be read.
    offsets: Vec<u64>,
    /// Messages and blocks that could not be unpacked.
    broken: Vec<(u64, FormatError)>,
    /// Messages of which parts lie in blocks.
    parted: Vec<(u64, MessageHead, Received)>,
    /// Frames whose dictionaries are not known.
    unknown: Vec<FrameInfo>,
}

/// The header of a segment.
struct OpenedHeader {
    is_good: bool,
    /// Where batches begin.
    len: u64,
    /// Of the first batch.
    sequence: Option<u64>,
    /// One that knows the dictionaries.
    unpacker: Unpacker,
}

/// What is wrong with a segment.
#[derive(Default)]
struct Walked {
    /// Header, batches or records are damaged: a scan names them.
    is_damaged: bool,
    /// From where on a portion could not be read, and why.
    unreadable: Option<(u64, String)>,
    broken: BTreeMap<Place, Broken>,
    /// The offsets of all records, in their order.
    records: u32,
    offsets: PiecewiseChecksum,
}

impl<S: Storage> Pass<S> {
    async fn run(&mut self) -> Result<(), EngineError> {
        let mut segments: VecDeque<SegmentEntry> = {
            let log = self.shard.0.log.borrow();
            log.manifest.segments.iter().filter(|entry| !entry.is_retired()).cloned().collect()
        };
        self.shard.0.scrub.status.borrow_mut().log_bytes = segments.iter().map(|entry| entry.data_end).sum();
        if self.shard.id() == SYSTEM_SHARD {
            self.look_at_superblock().await?;
        }
        self.look_at_manifest().await?;
        self.look_at_directories().await?;
        self.look_at_pages().await?;
        if !segments.is_empty() {
            segments.rotate_left((self.shard.0.storage.random() % segments.len() as u64) as usize);
        }
        for entry in segments {
            self.look_at_segment(&entry).await?;
            self.report.segments += 1;
            self.shard.0.scrub.status.borrow_mut().log_bytes_done += entry.data_end;
        }
        Ok(())
    }

    /// Whether this pass is to go on.
    fn check_turn(&self) -> Result<(), EngineError> {
        let inner = &self.shard.0;
        let goes_on = inner.scrub.turn.get() == self.turn && !inner.log.borrow().stopping;
        if goes_on { Ok(()) } else { Err(EngineError::Stopping(inner.id)) }
    }

    /// Takes no more of the device than is allowed.
    async fn pace(&mut self, bytes: u64) {
        self.report.bytes += bytes;
        self.shard.count(|stats| stats.scrub_bytes += bytes);
        let storage = &self.shard.0.storage;
        if self.bytes_per_s == 0 || bytes == 0 {
            return storage.yield_now().await;
        }
        let mut left = Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        // Whoever takes over the turn does not wait for the end of a long sleep.
        while !left.is_zero() && self.check_turn().is_ok() {
            let nap = left.min(NAP_MAX);
            storage.sleep(nap).await;
            left -= nap;
        }
    }

    /// Reads at most a portion. The caller bounds `len`.
    async fn read(&mut self, name: BlobName, offset: u64, len: usize) -> Result<Vec<u8>, EngineError> {
        self.check_turn()?;
        let bytes = self.shard.0.blobs.get(name, offset, len).await?;
        self.pace(bytes.len() as u64).await;
        Ok(bytes)
    }

    /// Lets a stream have at least `len` bytes, unless it ends before.
    async fn fill(&mut self, stream: &mut Stream, len: usize) -> Result<(), EngineError> {
        while stream.bytes.len() < len {
            let end = stream.start + stream.bytes.len() as u64;
            let portion = stream.limit.saturating_sub(end).min(PORTION_BYTES as u64) as usize;
            if portion == 0 {
                return Ok(());
            }
            let bytes = self.read(stream.name, end, portion).await?;
            if bytes.is_empty() {
                return Ok(());
            }
            stream.bytes.extend_from_slice(&bytes);
        }
        Ok(())
    }

    fn find(&mut self, file: &str, offset: u64, what: String, touches: Vec<(MailboxId, u32, u32)>) {
        let shard = self.shard.id();
        let file = format!("{}/{file}", shard_directory(shard));
        self.tell(Finding { shard, file, offset, what, touches });
    }

    fn tell(&mut self, finding: Finding) {
        self.report.findings += 1;
        self.shard.count(|stats| stats.scrub_findings += 1);
        let mut status = self.shard.0.scrub.status.borrow_mut();
        if status.findings.len() == FINDINGS_KEPT {
            status.findings.pop_front();
        }
        status.findings.push_back(finding.clone());
        drop(status);
        self.shard.tell(ShardEvent::DamageFound(finding));
    }

    async fn look_at_superblock(&mut self) -> Result<(), EngineError> {
        let what = match self.shard.0.storage.read_superblock().await {
            Ok(Some(bytes)) => match Superblock::decode(&bytes) {
                Ok(superblock) if superblock.store == self.shard.0.store => return Ok(()),
                Ok(superblock) => format!("this is the superblock of store {:032x}", superblock.store),
                Err(error) => error.to_string(),
            },
            Ok(None) => "the superblock is not there".to_owned(),
            Err(error) => error.to_string(),
        };
        let what = format!("{what}: the store will not open again until a copy of this file is put back");
        let finding =
            Finding { shard: self.shard.id(), file: "store".to_owned(), offset: 0, what, touches: Vec::new() };
        self.tell(finding);
        Ok(())
    }

    /// Reads the newest manifest back; one that is not what was committed is committed again, as the next.
    async fn look_at_manifest(&mut self) -> Result<(), EngineError> {
        let mut is_second_look = false;
        let (file, what) = loop {
            let inner = &self.shard.0;
            let number = inner.log.borrow().manifest.number;
            let (file, what) = match inner.manifests.latest().await {
                Ok(Some((epoch, found, bytes))) => {
                    let file = format!("manifest/{:08}-{found:020}", epoch.0);
                    let is_ours =
                        |it: &Manifest| (it.store, it.shard, it.epoch) == (inner.store, inner.id, inner.epoch);
                    match Manifest::from_bytes(&bytes) {
                        Ok(manifest) if is_ours(&manifest) && found >= number => return Ok(()),
                        Ok(manifest) => (file, format!("the newest manifest is {} of epoch {}", found, manifest.epoch)),
                        Err(error) => (file, error.to_string()),
                    }
                }
                Ok(None) => ("manifest".to_owned(), "no manifest is there".to_owned()),
                Err(error) => ("manifest".to_owned(), error.to_string()),
            };
            // The next commit may have been removing it.
            if std::mem::replace(&mut is_second_look, true) {
                break (file, what);
            }
        };
        let committed = self.shard.commit_manifest(|_| {}).await;
        self.report.mended += u64::from(committed.is_ok());
        let what = match committed {
            Ok(()) => format!("{what}; it has been written again"),
            Err(error) => format!("{what}; it could not be written again: {error}"),
        };
        self.find(&file, 0, what, Vec::new());
        Ok(())
    }

    async fn look_at_directories(&mut self) -> Result<(), EngineError> {
        let entries: Vec<IndexEntry> = {
            let log = self.shard.0.log.borrow();
            let indexes = &log.manifest.indexes;
            let first = indexes.iter().rposition(|entry| entry.full).unwrap_or(0);
            indexes.get(first..).unwrap_or_default().to_vec()
        };
        let mut is_damaged = false;
        for entry in entries {
            if let Some((offset, what, is_lost)) = self.look_at_directory(&entry).await? {
                // A checkpoint may have replaced it meanwhile.
                if !self.shard.0.log.borrow().manifest.indexes.contains(&entry) {
                    continue;
                }
                is_damaged |= is_lost;
                let what = if is_lost { format!("{what}; the directory is written again") } else { what };
                self.find(&format!("idx/{}", index_file(entry.blob, entry.epoch)), offset, what, Vec::new());
                self.report.mended += u64::from(is_lost);
            }
        }
        if is_damaged {
            self.shard.0.full_directory.set(true);
            self.checkpoint().await;
        }
        Ok(())
    }

    /// Where a directory is damaged, how, and whether reading it again would not help.
    async fn look_at_directory(&mut self, entry: &IndexEntry) -> Result<Option<(u64, String, bool)>, EngineError> {
        let name = BlobName::Index { blob: entry.blob, epoch: entry.epoch };
        let end = entry.directory_offset + entry.directory_len;
        let mut stream = Stream::new(name, entry.directory_offset, end);
        while stream.start < end {
            let at = stream.start;
            match self.look_at_directory_page(&mut stream).await {
                Ok(Ok(len)) => stream.skip_to(at + len as u64),
                Ok(Err(error)) => return Ok(Some((at, error.to_string(), true))),
                Err(EngineError::Storage(error)) => {
                    let is_gone = matches!(*error, StorageError::NotFound(_));
                    return Ok(Some((at, error.to_string(), is_gone)));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    async fn look_at_directory_page(&mut self, stream: &mut Stream) -> Result<Result<usize, FormatError>, EngineError> {
        self.fill(stream, PAGE_HEADER_BYTES).await?;
        let len = claimed_page_len(&stream.bytes).unwrap_or(0).min(DIRECTORY_PAGE_BYTES_MAX);
        self.fill(stream, len).await?;
        let page = stream.bytes.get(..len).unwrap_or(&stream.bytes).to_vec();
        self.report.pages += 1;
        let open = |page: &[u8], unpacker: &mut Unpacker| open_directory_page(page, unpacker).map(|_| ());
        Ok(self.open_page(page, open).await.map(|()| len))
    }

    /// Verifies a page, off the worker if it is large.
    async fn open_page(
        &self,
        page: Vec<u8>,
        open: impl FnOnce(&[u8], &mut Unpacker) -> Result<(), FormatError> + Send + 'static,
    ) -> Result<(), FormatError> {
        if page.len() <= PAGE_BYTES_HERE {
            return open(&page, &mut self.shard.0.unpacker.borrow_mut());
        }
        self.shard.0.storage.background(move || open(&page, &mut Unpacker::default())).await
    }

    async fn look_at_pages(&mut self) -> Result<(), EngineError> {
        let (mut after, mended_before) = (MailboxId(0), self.report.mended);
        loop {
            let mailboxes = self.shard.mailboxes_after(after);
            let Some(&last) = mailboxes.last() else { break };
            after = last;
            for mailbox in mailboxes {
                self.look_at_pages_of(mailbox).await?;
            }
        }
        if self.report.mended > mended_before {
            self.checkpoint().await;
        }
        Ok(())
    }

    async fn look_at_pages_of(&mut self, mailbox: MailboxId) -> Result<(), EngineError> {
        for kind in [PageKind::Mailbox, PageKind::MailboxDelta] {
            // Nothing, if the mailbox is gone or will be written anew.
            let place_now = |shard: &Shard<S>| {
                let state = shard.0.state.borrow();
                let slot = state.slots.get(&mailbox).filter(|slot| !slot.rewrite);
                let pages = slot.map(|slot| slot.pages());
                pages.map(|(page, delta_page)| if kind == PageKind::Mailbox { page } else { delta_page })
            };
            let mut looked_at = PageLocation::default();
            while let Some(page) = place_now(&self.shard).filter(|&page| !page.is_none() && page != looked_at) {
                looked_at = page;
                let found = self.look_at_page(kind, mailbox, page).await?;
                if let Some((what, is_lost)) = found
                    && place_now(&self.shard) == Some(page)
                {
                    let file = format!("idx/{}", index_file(page.blob, Epoch(page.epoch)));
                    let what = self.mend_page(mailbox, what, is_lost).await?;
                    self.find(&file, page.offset, what, vec![(mailbox, 0, 0)]);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// What is wrong with a page, and whether reading it again would not help.
    async fn look_at_page(
        &mut self,
        kind: PageKind,
        mailbox: MailboxId,
        page: PageLocation,
    ) -> Result<Option<(String, bool)>, EngineError> {
        let name = BlobName::Index { blob: page.blob, epoch: Epoch(page.epoch) };
        let mut stream = Stream::new(name, page.offset, page.offset + u64::from(page.len));
        match self.fill(&mut stream, page.len as usize).await {
            Ok(()) => {}
            Err(EngineError::Storage(error)) => {
                let is_gone = matches!(*error, StorageError::NotFound(_));
                return Ok(Some((error.to_string(), is_gone)));
            }
            Err(error) => return Err(error),
        }
        self.report.pages += 1;
        let open = move |page: &[u8], unpacker: &mut Unpacker| open_page(kind, mailbox.0, page, unpacker).map(|_| ());
        let opened = self.open_page(stream.bytes, open).await;
        Ok(opened.err().map(|error| (error.to_string(), true)))
    }

    /// Puts the index of a mailbox together from the log, and lets the next checkpoint write it. Says so.
    async fn mend_page(&mut self, mailbox: MailboxId, what: String, is_lost: bool) -> Result<String, EngineError> {
        if !is_lost {
            return Ok(what);
        }
        if self.report.mended >= PAGES_MENDED_MAX {
            return Ok(format!("{what}; it is rebuilt from the log when it is next needed, or by `posthaste rebuild`"));
        }
        match self.shard.rewrite_pages(mailbox).await {
            Ok(true) => {}
            Ok(false) => return Ok(format!("{what}; the mailbox is gone")),
            Err(error) => return Ok(format!("{what}; it could not be rebuilt from the log: {error}")),
        }
        self.report.mended += 1;
        Ok(format!("{what}; it is rebuilt from the log"))
    }

    /// Writes what has been mended.
    async fn checkpoint(&self) {
        if let Err(error) = self.shard.checkpoint().await {
            self.shard.tell(ShardEvent::CheckpointFailed(error));
        }
    }

    /// Whether a segment is part of the log.
    fn is_listed(&self, entry: &SegmentEntry) -> bool {
        let inner = &self.shard.0;
        let log = inner.log.borrow();
        let is_it = |it: &SegmentEntry| (it.segment, it.epoch) == (entry.segment, entry.epoch) && !it.is_retired();
        !inner.compaction.is_retired(entry.segment) && log.manifest.segments.iter().any(is_it)
    }

    async fn look_at_segment(&mut self, entry: &SegmentEntry) -> Result<(), EngineError> {
        if !self.is_listed(entry) {
            return Ok(());
        }
        let held = self.shard.hold([entry.segment].into_iter());
        let name = SegmentName { segment: entry.segment, epoch: entry.epoch };
        let walked = self.walk(name, entry.data_end).await?;
        let findings = match self.name(name, entry.data_end, &walked).await {
            Ok(findings) => findings,
            Err(error @ EngineError::Stopping(_)) => return Err(error),
            Err(error) => {
                let what = format!("it is damaged; what that touches could not be found out: {error}");
                vec![self.finding_in(name, 0, what, Vec::new())]
            }
        };
        for finding in findings {
            if self.is_listed(entry) {
                self.tell(finding);
                // Whoever listens keeps up.
                self.pace(0).await;
            }
        }
        self.look_at_footer(name, (!walked.is_damaged).then_some((walked.records, walked.offsets)), entry).await?;
        drop(held);
        // A pass opens all there are, and descriptors are for clients.
        self.shard.0.blobs.close(BlobName::Segment(name));
        Ok(())
    }

    fn finding_in(&self, name: SegmentName, offset: u64, what: String, touches: Vec<(MailboxId, u32, u32)>) -> Finding {
        let shard = self.shard.id();
        let file = format!("{}/seg/{}", shard_directory(shard), segment_file(name));
        Finding { shard, file, offset, what, touches }
    }

    /// Says what a walk has met, and whom it touches.
    async fn name(&self, name: SegmentName, data_end: u64, walked: &Walked) -> Result<Vec<Finding>, EngineError> {
        if let Some((offset, why)) = &walked.unreadable {
            let what = format!("{why}; what follows in this segment has not been looked at");
            let touches = self.messages_in(name.segment, *offset..offset + PORTION_BYTES as u64).await?;
            return Ok(vec![self.finding_in(name, *offset, what, touches)]);
        }
        if walked.is_damaged || !walked.broken.is_empty() {
            return self.name_damage(name, data_end, &walked.broken).await;
        }
        Ok(Vec::new())
    }

    /// The messages whose records have something in a range of a segment.
    async fn messages_in(
        &self,
        segment: SegmentId,
        range: std::ops::Range<u64>,
    ) -> Result<Vec<(MailboxId, u32, u32)>, EngineError> {
        let mut touches = Vec::new();
        let look = |mailbox, message: &Message| {
            let at = message.location;
            let overlaps = at.offset() < range.end && at.offset() + u64::from(at.len) > range.start;
            if at.segment == segment && overlaps {
                touches.push((mailbox, message.uid.0, message.uid.0));
            }
        };
        self.shard.visit_messages(look).await?;
        Ok(touches)
    }

    /// Verifies header, batches, records and messages of a segment.
    async fn walk(&mut self, name: SegmentName, data_end: u64) -> Result<Walked, EngineError> {
        let mut walked = Walked::default();
        let mut stream = Stream::new(BlobName::Segment(name), 0, data_end);
        match self.walk_to_end(name, &mut stream, &mut walked).await {
            Ok(()) => {}
            Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => walked.is_damaged = true,
            Err(EngineError::Storage(error)) => {
                walked.unreadable = Some((stream.start + stream.bytes.len() as u64, error.to_string()));
                walked.is_damaged = true;
            }
            Err(error) => return Err(error),
        }
        Ok(walked)
    }

    async fn walk_to_end(
        &mut self,
        name: SegmentName,
        stream: &mut Stream,
        walked: &mut Walked,
    ) -> Result<(), EngineError> {
        self.fill(stream, BLOCK_BYTES as usize).await?;
        let OpenedHeader { is_good, len, mut sequence, mut unpacker } = self.open_header(name, stream).await?;
        walked.is_damaged |= !is_good;
        stream.skip_to(len);
        while stream.start < stream.limit {
            self.fill(stream, BLOCK_BYTES as usize).await?;
            let position = Position { segment: name.segment, offset: stream.start };
            let Ok(header) = BatchHeader::decode(&stream.bytes, position, name.epoch) else {
                walked.is_damaged = true;
                if stream.bytes.is_empty() {
                    return Ok(());
                }
                stream.skip_to(position.offset + BLOCK_BYTES);
                continue;
            };
            let total = header.total_bytes() as usize;
            self.fill(stream, total).await?;
            walked.is_damaged |= sequence != Some(header.sequence) || stream.bytes.len() < total;
            sequence = Some(header.sequence + 1);
            let examined = self.examine(header, stream.take(total), unpacker).await?;
            unpacker = examined.unpacker;
            walked.is_damaged |= !examined.is_good;
            walked.records += examined.offsets.len() as u32;
            examined.offsets.iter().for_each(|offset| walked.offsets.update(&((offset / 8) as u32).to_le_bytes()));
            for (offset, error) in examined.broken {
                walked.broken.insert((name.segment, offset), error.into());
            }
            for (offset, head, received) in examined.parted {
                if let Err(broken) = self.look_at_blocks(&head, received, &mut unpacker).await? {
                    walked.broken.insert((name.segment, offset), broken);
                }
            }
            stream.skip_to(position.offset + header.total_bytes());
        }
        Ok(())
    }

    /// Opens the header of a segment, off the worker: its dictionaries may be large.
    async fn open_header(&mut self, name: SegmentName, stream: &mut Stream) -> Result<OpenedHeader, EngineError> {
        // Its dictionaries, if it has any, are blocks that are no batch.
        let damaged =
            || OpenedHeader { is_good: false, len: BLOCK_BYTES, sequence: None, unpacker: Unpacker::default() };
        let Ok(len) = SegmentHeader::length(&stream.bytes) else { return Ok(damaged()) };
        self.fill(stream, len).await?;
        let bytes = stream.bytes[..len.min(stream.bytes.len())].to_vec();
        let open = move || {
            let (header, errors) = SegmentHeader::decode_some(&bytes).ok()?;
            let mut unpacker = Unpacker::default();
            header.dictionaries.into_iter().for_each(|dictionary| unpacker.add_dictionary(dictionary));
            let is_it = header.segment == name.segment && header.epoch == name.epoch;
            let (len, sequence) = (len as u64, Some(header.first_batch));
            is_it.then_some(OpenedHeader { is_good: errors.is_empty(), len, sequence, unpacker })
        };
        Ok(self.shard.0.storage.background(open).await.unwrap_or_else(damaged))
    }

    /// Verifies a batch off the worker.
    async fn examine(
        &mut self,
        header: BatchHeader,
        bytes: Vec<u8>,
        unpacker: Unpacker,
    ) -> Result<Examined, EngineError> {
        let storage = self.shard.0.storage.clone();
        let examined = storage.background(move || examine(header, bytes, unpacker)).await;
        if examined.unknown.is_empty() {
            return Ok(examined);
        }
        // Those of the segment are damaged: others may have them.
        let Examined { mut unpacker, bytes, unknown, .. } = examined;
        self.learn(header.position.segment, &unknown, &mut unpacker).await?;
        Ok(storage.background(move || examine(header, bytes, unpacker)).await)
    }

    async fn learn(
        &self,
        segment: SegmentId,
        frames: &[FrameInfo],
        unpacker: &mut Unpacker,
    ) -> Result<(), EngineError> {
        self.shard.have_dictionaries(segment, frames).await?;
        let known = self.shard.0.unpacker.borrow();
        let needed = frames.iter().filter_map(FrameInfo::needs_dictionary);
        needed.filter_map(|id| known.dictionary(id)).for_each(|dictionary| unpacker.add_dictionary(dictionary));
        Ok(())
    }

    /// Reads the blocks of a message, one after another, and compares all of it with what was received.
    async fn look_at_blocks(
        &mut self,
        head: &MessageHead,
        mut received: Received,
        unpacker: &mut Unpacker,
    ) -> Result<Result<(), Broken>, EngineError> {
        for &block in &head.blocks {
            self.check_turn()?;
            let Location { segment, len, .. } = block.location;
            let record = match self.shard.read_uncounted(segment, block.location.offset(), len as usize).await {
                Ok(record) => record,
                Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => {
                    return Ok(Err(missing_block(segment).into()));
                }
                Err(error) => return Ok(Err(Broken { what: error.to_string(), is_missing: false })),
            };
            self.pace(record.len() as u64).await;
            if let Ok((info, _)) = open_block(&record, block.lsn)
                && info.needs_dictionary().is_some_and(|id| !unpacker.knows_dictionary(id))
            {
                self.learn(segment, &[info], unpacker).await?;
            }
            let mut taken = std::mem::take(unpacker);
            let job = move || {
                let added = received.add_block(&block, &record, &mut taken);
                (added.map(|()| received), taken)
            };
            let (added, taken) = self.shard.0.storage.background(job).await;
            *unpacker = taken;
            received = match added {
                Ok(received) => received,
                Err(error) => return Ok(Err(error.into())),
            };
        }
        Ok(received.compare(head).map_err(Broken::from))
    }

    /// Scans a damaged segment as the check does, and finds out whom it touches.
    async fn name_damage(
        &self,
        name: SegmentName,
        data_end: u64,
        broken: &BTreeMap<Place, Broken>,
    ) -> Result<Vec<Finding>, EngineError> {
        let inner = &self.shard.0;
        let source = SegmentSource::<S>::new(&inner.wal, &inner.blobs, name, true).pausing(&inner.storage);
        let segment = match scan_segment(&source, 0, data_end).await {
            Err(StorageError::NotFound(_)) => gone_segment(name, 0, data_end),
            segment => segment?,
        };
        let records = segment.batches.iter().flat_map(|batch| &batch.records);
        let there: Vec<u64> = records.map(|record| record.offset).collect();
        let mut findings = judge_alone(inner.id, segment).damage;
        let mut concerned = Concerned::new(broken);
        let look = |mailbox, message: &Message| {
            if message.location.segment == name.segment {
                concerned.look_at(mailbox, message, |(_, offset)| there.binary_search(&offset).is_ok());
            }
        };
        self.shard.visit_messages(look).await?;
        let file = format!("{}/seg/{}", shard_directory(inner.id), segment_file(name));
        add_findings(&mut findings, concerned.findings(inner.id, |_| file.clone()));
        Ok(findings)
    }

    /// Verifies the footer of a segment, and compares it with the records, if all of them could be read.
    async fn look_at_footer(
        &mut self,
        name: SegmentName,
        there: Option<(u32, PiecewiseChecksum)>,
        entry: &SegmentEntry,
    ) -> Result<(), EngineError> {
        let found = match self.footer_damage(name, there).await {
            Ok(found) => found,
            // It is gone, which has been found already.
            Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => None,
            Err(EngineError::Storage(error)) => Some((entry.data_end, error.to_string())),
            Err(error) => return Err(error),
        };
        if let Some((offset, what)) = found
            && self.is_listed(entry)
        {
            let what = format!("{what}; no message is touched: `posthaste repair` or a compaction writes it again");
            self.find(&format!("seg/{}", segment_file(name)), offset, what, Vec::new());
        }
        Ok(())
    }

    async fn footer_damage(
        &mut self,
        name: SegmentName,
        there: Option<(u32, PiecewiseChecksum)>,
    ) -> Result<Option<(u64, String)>, EngineError> {
        self.check_turn()?;
        let blob = BlobName::Segment(name);
        let (suffix, len) = self.shard.0.blobs.get_suffix(blob, TRAILER_BYTES).await?;
        let trailer = match Trailer::decode(&suffix, len) {
            Ok(trailer) => trailer,
            Err(error) => return Ok(Some((len.saturating_sub(TRAILER_BYTES as u64), error.to_string()))),
        };
        let (mut table, mut listed) = (PiecewiseChecksum::default(), PiecewiseChecksum::default());
        let mut at = trailer.data_end;
        let end = trailer.data_end + trailer.table_bytes();
        while at < end {
            // Whole entries.
            let portion = (end - at).min(PORTION_BYTES as u64 / FOOTER_ENTRY_BYTES * FOOTER_ENTRY_BYTES) as usize;
            let bytes = self.read(blob, at, portion).await?;
            if bytes.is_empty() {
                break;
            }
            table.update(&bytes);
            bytes.chunks(FOOTER_ENTRY_BYTES as usize).for_each(|entry| listed.update(&entry[..entry.len().min(4)]));
            at += bytes.len() as u64;
        }
        if let Err(error) = table.verify("segment footer", trailer.table_checksum) {
            return Ok(Some((trailer.data_end, error.to_string())));
        }
        let differs = there.filter(|(records, offsets)| {
            *records != trailer.count || offsets.clone().finish() != listed.clone().finish()
        });
        Ok(differs.map(|(records, _)| {
            let what = format!("the footer lists {} records, the log has {records}", trailer.count);
            (trailer.data_end, what)
        }))
    }
}

/// Verifies a batch with everything in it but the blocks of messages, which lie elsewhere.
fn examine(header: BatchHeader, bytes: Vec<u8>, mut unpacker: Unpacker) -> Examined {
    let found = open_batch(header, &bytes);
    let (mut broken, mut parted, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    let (mut offsets, mut scratch) = (Vec::with_capacity(found.records.len()), Vec::new());
    for record in &found.records {
        offsets.push(record.offset);
        let at = (record.offset - header.position.offset) as usize;
        let record_bytes = bytes.get(at..at + record.len as usize).unwrap_or_default();
        let mut frames = Vec::new();
        let verified = match record.header.kind {
            kind::MESSAGE => open_message(record_bytes).and_then(|reader| {
                frames.extend(reader.head.frames().map(|(_, info)| info));
                let received = Received::of_frames(&reader, &mut unpacker)?;
                if reader.head.blocks.is_empty() {
                    return received.compare(&reader.head);
                }
                parted.push((record.offset, reader.head, received));
                Ok(())
            }),
            kind::BLOCK => block_frame(record_bytes).and_then(|(info, stored)| {
                frames.push(info);
                verify_block(&info, stored, &mut unpacker, &mut scratch)
            }),
            _ => Ok(()),
        };
        if let Err(error) = verified {
            if matches!(error, FormatError::NoDictionary { .. }) {
                unknown.extend(frames);
            }
            broken.push((record.offset, error));
        }
    }
    Examined { unpacker, is_good: found.is_good(), bytes, offsets, broken, parted, unknown }
}
