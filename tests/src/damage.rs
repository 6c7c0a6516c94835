//! A store with every structure of the format in it, and ways to damage each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crate::dictionaries::invented;
use posthaste_engine::changes::FlagOp;
use posthaste_engine::check::{ShardCheck, check_shard};
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{FlagName, Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, Finding};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::base64_lines::put_lines;
use posthaste_engine::format::batch::{BATCH_HEADER_BYTES, BatchHeader, records};
use posthaste_engine::format::checksum;
use posthaste_engine::format::codec::Wire;
use posthaste_engine::format::frame::{Packer, Unpacker};
use posthaste_engine::format::manifest::Manifest;
use posthaste_engine::format::message::{Extent, MessageHead};
use posthaste_engine::format::page::{DirectoryPage, DirectoryPart, PageLocation, open_directory_page, restore};
use posthaste_engine::format::record::{RECORD_HEADER_BYTES, Record, kind};
use posthaste_engine::format::segment::{SegmentHeader, TRAILER_BYTES, Trailer};
use posthaste_engine::ids::{AccountId, Epoch, MailboxId, Position, SegmentId, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::{SeededRandom, Sim, SimIo};
use posthaste_engine::mailboxes::Status;
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Superblock, Worker, open_superblock};
use posthaste_engine::read::Part;
use posthaste_engine::repair::Repair;
use posthaste_engine::shard::{Shard, ShardConfig};
use posthaste_engine::storage::local::{Local, parse_segment_file};
use posthaste_engine::storage::{Storage, StorageError};

/// A file and an offset in it.
type Place = (String, u64);

/// What becomes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// The bits of one byte change.
    Flip(u64),
    /// So many bytes become zeroes.
    Zero(u64, u64),
    /// What is from here on is gone.
    Truncate(u64),
}

impl Damage {
    /// Whether anything changes by it.
    fn apply(self, bytes: &mut Vec<u8>) -> bool {
        let len = bytes.len() as u64;
        match self {
            Self::Flip(offset) if offset < len => bytes[offset as usize] ^= 0x41,
            Self::Zero(offset, count) if offset < len => {
                let range = offset as usize..(offset + count).min(len) as usize;
                if bytes[range.clone()].iter().all(|&byte| byte == 0) {
                    return false;
                }
                bytes[range].fill(0);
            }
            Self::Truncate(offset) if offset < len => bytes.truncate(offset as usize),
            _ => return false,
        }
        true
    }
}

/// A table of the format's description: fields by offset and length.
#[derive(Clone, Debug)]
pub struct Layout {
    pub structure: String,
    pub fields: Vec<(u64, u64, String)>,
}

/// Reads the tables with the columns offset, bytes and field.
pub fn layout(document: &str) -> Vec<Layout> {
    let mut layouts: Vec<Layout> = Vec::new();
    let (mut heading, mut in_table) = (String::new(), false);
    for line in document.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            heading = name.to_owned();
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if cells.starts_with(&["offset", "bytes", "field"]) {
            in_table = true;
            layouts.push(Layout { structure: heading.clone(), fields: Vec::new() });
        } else if !line.starts_with('|') {
            in_table = false;
        } else if in_table
            && let (Ok(offset), Ok(bytes)) = (cells[0].parse(), cells[1].parse())
            && let Some(layout) = layouts.last_mut()
        {
            layout.fields.push((offset, bytes, cells[2].to_owned()));
        }
    }
    layouts
}

/// The structures of the format that have a fixed layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Structure {
    Superblock,
    SegmentHeader,
    DictionaryEntry,
    BatchHeader,
    TouchTable,
    RecordHeader,
    MessageHead,
    Base64Extent,
    FrameInfo,
    FooterEntry,
    Trailer,
    Manifest,
    PageHeader,
}

impl Structure {
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "Superblock" => Self::Superblock,
            "Segment header" => Self::SegmentHeader,
            "Dictionary entry" => Self::DictionaryEntry,
            "Batch header" => Self::BatchHeader,
            "Touch table" => Self::TouchTable,
            "Record header" => Self::RecordHeader,
            "Message head" => Self::MessageHead,
            "Base64 extent" => Self::Base64Extent,
            "Frame info" => Self::FrameInfo,
            "Footer entry" => Self::FooterEntry,
            "Trailer" => Self::Trailer,
            "Manifest" => Self::Manifest,
            "Page header" => Self::PageHeader,
            _ => return None,
        })
    }
}

/// A store that was left as a killed process leaves it, and where its structures lie.
pub struct DamagedStore {
    files: BTreeMap<String, Vec<u8>>,
    /// The newest manifest's file.
    manifest: String,
    accounts: Vec<AccountId>,
    /// What the store shows as long as nothing is damaged.
    shown: ShownStore,
    places: BTreeMap<Structure, Vec<Place>>,
    payloads: Vec<(String, u64, u64, u16, Option<MailboxId>)>,
    used: BTreeMap<String, Vec<(u64, u64)>>,
}

/// Bytes that no checksum covers, because nothing is there.
pub struct Unchecked<'a>(&'a DamagedStore);

impl Unchecked<'_> {
    pub fn contains(&self, file: &str, damage: Damage) -> bool {
        let used = self.0.used.get(file).map(Vec::as_slice).unwrap_or_default();
        let overlaps = |from: u64, to: u64| used.iter().any(|&(start, end)| from < end && to > start);
        match damage {
            Damage::Flip(offset) => !overlaps(offset, offset + 1),
            Damage::Truncate(offset) => !overlaps(offset, u64::MAX),
            Damage::Zero(offset, count) => {
                let bytes = &self.0.files[file];
                let ends = (offset + count).min(bytes.len() as u64);
                // What is zero already stays as it was.
                !(offset..ends).any(|at| bytes[at as usize] != 0 && overlaps(at, at + 1))
            }
        }
    }
}

const SHARD: ShardId = ShardId(0);
/// Places of one structure that are damaged; more would only take longer.
const PLACES_MAX: usize = 6;

/// The files of a store in which every record kind that the engine writes is present; see [`store_with_everything`].
///
/// # Panics
/// If the engine refuses any of it.
pub fn files_with_everything(seed: u64, stopped: bool) -> BTreeMap<String, Vec<u8>> {
    let sim = Sim::new(seed);
    let io = sim.io();
    sim.run(async move {
        let worker = fill(io).await.expect("the disk is good");
        if stopped {
            worker.stop().await.expect("the disk is good");
        }
    });
    let files = sim.files("").into_iter().map(|(path, _)| {
        let bytes = sim.contents(&path).expect("it was listed");
        (path, bytes)
    });
    files.collect()
}

fn disk_with(files: &BTreeMap<String, Vec<u8>>) -> Sim {
    let sim = Sim::new(1);
    for (path, bytes) in files {
        sim.put_file(path, bytes.clone());
    }
    sim
}

/// Everything that a store shows of itself, as text.
///
/// # Errors
/// The first thing that cannot be opened or read.
pub fn dump(files: &BTreeMap<String, Vec<u8>>) -> Result<String, EngineError> {
    let sim = disk_with(files);
    let io = sim.io();
    sim.run(async move { dump_store(&io).await }).expect("no crash is planned")
}

/// What opening and checking a store says, a line each: the error, or the findings.
pub fn report_of(files: &BTreeMap<String, Vec<u8>>) -> String {
    let sim = disk_with(files);
    let io = sim.io();
    let checked = sim.run(async move {
        let storage = Local::new(io.clone());
        let superblock = open_superblock(&storage, 1).await?;
        let mut report = String::new();
        let check = check_shard(&storage, SHARD, superblock.store, |_, _| ()).await?;
        for finding in check.findings {
            report.push_str(&format!("{} at offset {}: {}\n", finding.file, finding.offset, finding.what));
        }
        drop(open(&io).await?);
        Ok::<_, EngineError>(report)
    });
    checked.expect("no crash is planned").unwrap_or_else(|error| error.to_string())
}

async fn dump_store(io: &SimIo) -> Result<String, EngineError> {
    use std::fmt::Write;
    let worker = open(io).await?;
    let shard = worker.local(SHARD).expect("there is one worker");
    let mut accounts: Vec<_> = worker.cluster().directory().iter().collect();
    accounts.sort_by_key(|account| account.account);
    let mut out = String::new();
    for account in accounts {
        let subscribed = shard.subscriptions(account.account).join(", ");
        writeln!(out, "account {} subscribed to [{subscribed}]", account.name).expect("memory");
        for info in shard.mailboxes(account.account) {
            let status = info.status;
            writeln!(
                out,
                "  {} UIDVALIDITY {} UIDNEXT {} HIGHESTMODSEQ {} EXISTS {} UNSEEN {} keywords {:?}",
                info.name,
                status.uid_validity,
                status.uid_next,
                status.highest_modseq,
                status.exists,
                status.unseen,
                shard.keywords(info.mailbox).await?
            )
            .expect("memory");
            for found in shard.messages(info.mailbox, UidSet::range(1..=1000)).await? {
                let message = found.message;
                let bytes = shard.read_message(&message, info.mailbox, Part::Whole).await?;
                let all = [&bytes.prefix[..], &bytes.header, &bytes.body].concat();
                writeln!(
                    out,
                    "    {} MODSEQ {} flags {:x} {} octets, CRC {:08x}, date {} {:+}, EMAILID {}",
                    message.uid,
                    message.modseq,
                    found.flags.0,
                    message.size,
                    posthaste_engine::format::checksum(&all),
                    message.internal_date,
                    message.zone_minutes,
                    message.id
                )
                .expect("memory");
                assert_eq!(all.len() as u64, message.size);
            }
        }
    }
    Ok(out)
}

/// Makes a store in which every record kind that the engine writes is present, in sealed and unsealed segments, with
/// pages, delta pages and directories.
///
/// # Panics
/// If the engine refuses any of it.
pub fn store_with_everything(seed: u64) -> DamagedStore {
    let files = files_with_everything(seed, false);
    let manifest = files.keys().filter(|file| file.contains("/manifest/")).max().expect("a manifest").clone();
    let sim = Sim::new(1);
    for (path, bytes) in &files {
        sim.put_file(path, bytes.clone());
    }
    let io = sim.io();
    let shown = sim.run(async move {
        let worker = open(&io).await?;
        let accounts: Vec<AccountId> = worker.cluster().directory().iter().map(|account| account.account).collect();
        let shown = look(&worker, &accounts).await?;
        Ok::<_, EngineError>((accounts, shown))
    });
    let (accounts, shown) = shown.expect("no crash is planned").expect("nothing is damaged yet");
    let (places, used) = (BTreeMap::new(), BTreeMap::new());
    let mut store = DamagedStore { files, manifest, accounts, shown, places, payloads: Vec::new(), used };
    store.survey();
    store
}

fn config() -> StoreConfig {
    StoreConfig {
        shard: ShardConfig { segment_size_bytes: 96 << 10, checkpoint_bytes: 1 << 30, ..ShardConfig::default() },
    }
}

async fn open(io: &SimIo) -> Result<Worker<Local<SimIo>>, EngineError> {
    let storage = Local::new(io.clone());
    let superblock = open_superblock(&storage, 1).await?;
    let (cluster, mut seats) = Cluster::new(superblock, 1);
    Ok(Worker::open(storage, cluster, seats.remove(0), config()).await?.0)
}

/// A prefix that all recipients of a message have.
fn prefix_of(number: u64) -> &'static [u8] {
    if number % 3 == 2 { b"Delivered-To: all@example.org\r\n" } else { b"" }
}

fn message(packer: &mut Packer, number: u64, lines: u64) -> Arc<Prepared> {
    let header = format!("Subject: message {number}\r\nFrom: a@example.org\r\n\r\n");
    let mut bytes = header.clone().into_bytes();
    for line in 0..lines {
        bytes.extend_from_slice(format!("line {line} {}\r\n", line.wrapping_mul(number * 2_654_435_761)).as_bytes());
    }
    // Some lie in the record, with a frame of their own, those of the largest message in blocks.
    if number % 4 < 2 || lines > 1000 {
        let content: Vec<u8> = (0..4000_u32).map(|octet| (octet.wrapping_mul(2_654_435_761) >> 21) as u8).collect();
        put_lines(&content, 76, usize::MAX / 2, &mut bytes);
        bytes.extend_from_slice(b"--\r\n");
    }
    let digest = b"digest bytes".repeat(3);
    Arc::new(Prepared::with_prefix(packer, prefix_of(number), &bytes, header.len(), &digest, 1_790_000_000_000))
}

async fn fill(io: SimIo) -> Result<Worker<Local<SimIo>>, EngineError> {
    let worker = open(&io).await?;
    let names = ["a@example.org", "b@example.org"];
    let accounts = names.map(|name| NewAccount { name: name.to_owned(), password: "$x$".to_owned() });
    worker.add_accounts(accounts.to_vec()).await?;
    let directory = worker.cluster().directory();
    let [a, b] = names.map(|name| directory.find(name).expect("just made").account);
    let shard = worker.local(SHARD).expect("there is one worker");
    let target = |number, account, mailbox, flags| Target {
        account,
        mailbox,
        prefix: if prefix_of(number).is_empty() { b"Return-Path: <x@example.org>\r\n".to_vec() } else { Vec::new() },
        flags,
        internal_date: Some((1_700_000_000, 60)),
    };
    let mut packer = Packer::default();
    for round in 0..3_u32 {
        // The first messages have no dictionary, later ones two generations of them.
        if round > 0 {
            worker.cluster().dictionaries().offer(invented(round));
            packer.use_dictionaries(worker.cluster().dictionaries().current());
        }
        let work = shard.create_mailbox(a, &format!("Work {round}"), 0).await?;
        let inbox = shard.inbox(a).await?;
        for number in 0..12 {
            let lines = if number == 5 { 12_000 } else { 5 + number };
            let keyword = vec![FlagName::Keyword(format!("$k{round}")), FlagName::Seen];
            let targets = vec![
                target(number + 1, a, TargetMailbox::Inbox, keyword),
                target(number + 1, b, TargetMailbox::Inbox, Vec::new()),
                target(number + 1, a, TargetMailbox::Id(work), Vec::new()),
            ];
            for result in shard.deliver(message(&mut packer, number + 1, lines), targets).await {
                result?;
            }
        }
        let uids = |first, last| UidSet::range(first + 12 * round..=last + 12 * round);
        shard.store_flags(inbox, uids(1, 4), FlagOp::Add, vec![FlagName::Flagged], None).await?;
        shard.store_flags(inbox, uids(2, 3), FlagOp::Replace, vec![FlagName::Deleted], None).await?;
        shard.expunge(inbox, None).await?;
        shard.copy(inbox, uids(5, 6), work).await?;
        shard.move_messages(inbox, uids(7, 8), work).await?;
        shard.subscribe(a, &format!("Work {round}"), true).await?;
        shard.rename_mailbox(a, &format!("Work {round}"), &format!("Old/{round}")).await?;
        shard.create_mailbox(b, "Gone", 0).await?;
        shard.delete_mailbox(b, "Gone").await?;
        drop(shard.select(inbox, true).await?);
        // The claim of \Recent goes with the next commit.
        shard.subscribe(a, "Elsewhere", false).await?;
        if round < 2 {
            shard.checkpoint().await?;
        }
        if round == 1 {
            // What the first rounds have written is folded, what the last writes is in the log.
            shard.compact(Choice::All).await?;
        }
    }
    // Idle: the last batch is recorded as durable.
    io.sleep(Duration::from_secs(1)).await;
    Ok(worker)
}

/// Where in a message record's payload its first extent of base64 begins: before the others, and the count of contents.
fn base64_extent_of(head: &MessageHead) -> Option<u64> {
    let first = head.extents.iter().position(|extent| matches!(extent, Extent::Base64 { .. }))?;
    let after: usize = head.extents[first..].iter().map(|extent| extent.encode().len()).sum();
    Some((head.sealed_bytes() - head.contents.encode().len() - after) as u64)
}

impl DamagedStore {
    fn note(&mut self, structure: Structure, file: &str, offset: u64) {
        self.places.entry(structure).or_default().push((file.to_owned(), offset));
    }

    fn uses(&mut self, file: &str, start: u64, end: u64) {
        self.used.entry(file.to_owned()).or_default().push((start, end));
    }

    /// Finds every structure.
    fn survey(&mut self) {
        let files = self.files.clone();
        self.note(Structure::Superblock, "store", 0);
        self.uses("store", 0, files["store"].len() as u64);
        for (file, bytes) in &files {
            if file.contains("/wal/") || file.contains("/seg/") {
                self.survey_segment(file, bytes);
            }
        }
        let newest = self.manifest.clone();
        self.note(Structure::Manifest, &newest, 0);
        self.uses(&newest, 0, files[&newest].len() as u64);
        let manifest = Manifest::from_bytes(&files[&newest]).expect("nothing is damaged yet");
        self.survey_indexes(&manifest);
    }

    fn survey_segment(&mut self, file: &str, bytes: &[u8]) {
        let (_, base) = file.rsplit_once('/').expect("segments lie in directories");
        let name = parse_segment_file(base).expect("the name of a segment");
        let header = SegmentHeader::decode(bytes).expect("nothing is damaged yet");
        let mut offset = header.encode().len() as u64;
        self.note(Structure::SegmentHeader, file, 0);
        let mut used = 88;
        for number in 0..header.dictionaries.len() as u64 {
            self.note(Structure::DictionaryEntry, file, used + 24 * number);
        }
        used += header.dictionaries.iter().map(|dictionary| 24 + dictionary.bytes().len() as u64).sum::<u64>();
        self.uses(file, 0, used);
        let sealed = file.contains("/seg/");
        while let Some(rest) = bytes.get(offset as usize..) {
            let position = Position { segment: name.segment, offset };
            let Ok(batch) = BatchHeader::decode(rest, position, name.epoch) else { break };
            let end = offset + batch.total_bytes();
            let next = Position { segment: name.segment, offset: end };
            // The very last batch cannot be told from a torn tail.
            let is_last = !sealed
                && bytes.get(end as usize..).is_none_or(|rest| BatchHeader::decode(rest, next, name.epoch).is_err());
            if !is_last {
                self.survey_batch(file, bytes, &batch);
            }
            offset = end;
        }
        if sealed {
            let len = bytes.len() as u64;
            let at = len - TRAILER_BYTES as u64;
            let trailer = Trailer::decode(&bytes[at as usize..], len).expect("nothing is damaged yet");
            self.note(Structure::Trailer, file, at);
            if trailer.count > 0 {
                self.note(Structure::FooterEntry, file, trailer.data_end);
            }
            self.uses(file, trailer.data_end, len);
        }
    }

    fn survey_batch(&mut self, file: &str, bytes: &[u8], batch: &BatchHeader) {
        let start = batch.position.offset;
        self.note(Structure::BatchHeader, file, start);
        let table = start + BATCH_HEADER_BYTES as u64;
        if batch.record_count > 0 {
            self.note(Structure::TouchTable, file, table);
        }
        self.uses(file, start, batch.records_offset());
        let first = batch.records_offset();
        for record in records(batch, &bytes[first as usize..]) {
            let record = record.expect("nothing is damaged yet");
            let at = first + u64::from(record.offset);
            let payload = at + RECORD_HEADER_BYTES as u64;
            self.uses(file, at, at + u64::from(record.len));
            self.note(Structure::RecordHeader, file, at);
            let mut touched = None;
            let decoded = Record::decode(record.header.kind, record.payload).expect("nothing is damaged yet");
            if let Some(decoded) = &decoded {
                decoded.touches(&mut |mailbox, _, _| touched = (mailbox != MailboxId(0)).then_some(mailbox));
            }
            match record.header.kind {
                kind::MESSAGE => {
                    self.note(Structure::MessageHead, file, payload);
                    self.note(Structure::FrameInfo, file, payload + 103);
                    if let Some(Record::Message(head)) = &decoded
                        && let Some(extent) = base64_extent_of(head)
                    {
                        self.note(Structure::Base64Extent, file, payload + extent);
                    }
                }
                kind::BLOCK => self.note(Structure::FrameInfo, file, payload),
                _ => {}
            }
            let len = u64::from(record.len) - RECORD_HEADER_BYTES as u64;
            self.payloads.push((file.to_owned(), payload, len, record.header.kind, touched));
        }
    }

    fn survey_indexes(&mut self, manifest: &Manifest) {
        let mut unpacker = Unpacker::default();
        let mut pages: BTreeMap<u64, (PageLocation, PageLocation)> = BTreeMap::new();
        let path = |blob: u32, epoch: Epoch| format!("shard-0000/idx/{blob:010}-{:08}", epoch.0);
        let first = manifest.indexes.iter().rposition(|entry| entry.full).unwrap_or(0);
        for entry in &manifest.indexes[first..] {
            let file = path(entry.blob, entry.epoch);
            let (mut at, end) = (entry.directory_offset, entry.directory_offset + entry.directory_len);
            self.uses(&file, at, end);
            while at < end {
                let bytes = self.files[&file][at as usize..].to_vec();
                let (part, len) = open_directory_page(&bytes, &mut unpacker).expect("nothing is damaged yet");
                self.note(Structure::PageHeader, &file, at);
                if let DirectoryPart::Entries(archive) = part {
                    for mailbox in restore::<DirectoryPage>(&archive).expect("nothing is damaged yet").mailboxes {
                        pages.insert(mailbox.mailbox, (mailbox.page, mailbox.delta));
                    }
                }
                at += len as u64;
            }
        }
        let mut deltas = 0;
        for (page, delta) in pages.into_values() {
            deltas += usize::from(!delta.is_none());
            for page in [page, delta].into_iter().filter(|page| !page.is_none()) {
                let file = path(page.blob, Epoch(page.epoch));
                self.note(Structure::PageHeader, &file, page.offset);
                self.uses(&file, page.offset, page.offset + u64::from(page.len));
            }
        }
        assert!(deltas > 0, "the test store has no delta page");
    }

    /// Some places of a structure, spread over all of them.
    pub fn places(&self, structure: Structure) -> Vec<Place> {
        let all = self.places.get(&structure).map(Vec::as_slice).unwrap_or_default();
        let step = all.len().div_ceil(PLACES_MAX).max(1);
        all.iter().step_by(step).cloned().collect()
    }

    /// The first and last payloads of each kind: file, offset, length, kind, and a mailbox that the record touches.
    pub fn payloads(&self) -> Vec<(String, u64, u64, u16, Option<MailboxId>)> {
        let mut by_kind: BTreeMap<u16, Vec<_>> = BTreeMap::new();
        for payload in &self.payloads {
            by_kind.entry(payload.3).or_default().push(payload);
        }
        // The last ones matter most: nothing after them says what they said.
        let few = |all: Vec<_>| {
            let last = all.len().saturating_sub(3);
            let chosen = all.into_iter().enumerate().filter(move |(number, _)| *number < 2 || *number >= last);
            chosen.map(|(_, payload)| payload)
        };
        by_kind.into_values().flat_map(few).cloned().collect()
    }

    pub fn unchecked_bytes(&self) -> Unchecked<'_> {
        Unchecked(self)
    }

    /// Random damage in all files. In the tail of the log, which no index has seen yet, only single bytes change: where more of it
    /// is gone, nothing is left to name what was there.
    pub fn random_damages(&self, seed: u64, count: usize) -> Vec<(String, Damage)> {
        let mut random = SeededRandom::new(seed);
        let files: Vec<_> = self.files.iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
        let place = |_| {
            let (file, bytes) = files[random.below(files.len() as u64) as usize];
            let offset = random.below(bytes.len() as u64);
            let damage = match random.below(3) {
                0 if !self.is_tail(file) => Damage::Truncate(offset),
                1 if !self.is_tail(file) => Damage::Zero(offset, 1 << random.below(16)),
                _ => Damage::Flip(offset),
            };
            (file.clone(), damage)
        };
        (0..count).map(place).collect()
    }

    /// Whether a start replays the segment of a file.
    fn is_tail(&self, file: &str) -> bool {
        let manifest = Manifest::from_bytes(&self.files[&self.manifest]).expect("nothing is damaged yet");
        let name = file.rsplit_once('/').and_then(|(_, base)| parse_segment_file(base));
        let is_segment = file.contains("/wal/") || file.contains("/seg/");
        let replayed = |segment: SegmentId| !segment.is_compacted() && segment >= manifest.replay_from.segment;
        is_segment && name.is_some_and(|name| replayed(name.segment))
    }

    fn damaged(&self, file: &str, damage: Damage) -> Sim {
        let sim = Sim::new(1);
        for (path, bytes) in &self.files {
            sim.put_file(path, bytes.clone());
        }
        sim.damage(file, |bytes| _ = damage.apply(bytes));
        sim
    }

    /// What the check finds when a file is damaged. A superblock that does not decode is a finding too.
    pub fn check_with_damage(&self, file: &str, damage: Damage) -> Vec<Finding> {
        let sim = self.damaged(file, damage);
        let io = sim.io();
        let findings = sim.run(async move {
            let storage = Local::new(io);
            let bytes = storage.read_superblock().await?.unwrap_or_default();
            let superblock = match Superblock::decode(&bytes) {
                Ok(superblock) => superblock,
                Err(error) => {
                    let what = error.to_string();
                    let file = "store".to_owned();
                    return Ok(vec![Finding { shard: SHARD, file, offset: 0, what, touches: Vec::new() }]);
                }
            };
            let check = check_shard(&storage, SHARD, superblock.store, |_, _| ()).await?;
            Ok::<_, EngineError>(check.findings)
        });
        findings.expect("no crash is planned").unwrap_or_else(|error| panic!("{file}, {damage:?}: {error}"))
    }

    /// What a scrub of the open store finds when a file is damaged under it. A file that the start has sealed or replaced is
    /// damaged as it is then.
    ///
    /// # Panics
    /// If the store does not go on working; if a second pass finds again what the first one has mended; if a message is
    /// missing or altered that no finding names.
    pub fn scrub_with_damage(&self, file: &str, damage: Damage) -> Vec<Finding> {
        if !damage.apply(&mut self.files[file].clone()) {
            return Vec::new();
        }
        let sim = disk_with(&self.files);
        let (io, disk, accounts) = (sim.io(), sim.clone(), self.accounts.clone());
        let (file, is_manifest, place) = (file.to_owned(), file == self.manifest, format!("{file}, {damage:?}"));
        let is_mended = is_manifest || file.contains("/idx/");
        let scrubbed = sim.run(async move {
            let worker = open(&io).await?;
            let shard = worker.local(SHARD).expect("there is one worker");
            let file = if is_manifest {
                let files = disk.files("shard-0000/manifest/");
                files.into_iter().map(|(path, _)| path).max().expect("a manifest")
            } else {
                file
            };
            let file = if disk.contents(&file).is_none() { file.replace("/wal/", "/seg/") } else { file };
            let mut bytes = disk.contents(&file).unwrap_or_default();
            // Another manifest is of another length, and has no byte without a meaning.
            let damage = match damage {
                Damage::Flip(offset) | Damage::Zero(offset, _) if is_manifest => {
                    Damage::Flip(offset % bytes.len() as u64)
                }
                Damage::Truncate(offset) if is_manifest => Damage::Truncate(offset % bytes.len() as u64),
                damage => damage,
            };
            if !damage.apply(&mut bytes) {
                return Ok((Vec::new(), Vec::new(), None));
            }
            disk.damage(&file, |current| current.clone_from(&bytes));
            shard.scrub(0).await?;
            let first = findings_of(&shard);
            // What it has mended is behind it.
            let mut second = Vec::new();
            if is_mended {
                shard.scrub(0).await?;
                second = findings_of(&shard);
            }
            let mailbox = TargetMailbox::Inbox;
            let target =
                Target { account: accounts[0], mailbox, prefix: Vec::new(), flags: Vec::new(), internal_date: None };
            let shown = look(&worker, &accounts).await?;
            shard.deliver(message(&mut Packer::default(), 9, 3), vec![target]).await.remove(0)?;
            shard.checkpoint().await?;
            assert!(disk.contents(&file).is_none_or(|now| now == bytes), "{file} has been overwritten");
            Ok::<_, EngineError>((first, second, Some(shown)))
        });
        let (first, second, shown) =
            scrubbed.expect("no crash is planned").unwrap_or_else(|error| panic!("{place}: {error}"));
        assert!(second.is_empty(), "{place}: {second:?} is not mended; first there was {first:?}");
        if let Some(shown) = shown {
            self.shown.assert_survives(&shown, &first, &place);
        }
        first
    }

    /// Repairs the store with a damaged file, and puts the index of another such store together anew.
    ///
    /// # Panics
    /// If anything else is damaged afterwards than before; if the messages that are named as lost are not those that cannot be
    /// read; if what is left is not as it was, UIDs, UIDVALIDITY and mod-sequences included.
    pub fn mend_with_damage(&self, file: &str, damage: Damage) {
        let place = format!("{file}, {damage:?}");
        let sim = self.damaged(file, damage);
        let Some(before) = check_of(&sim).filter(|check| !check.has_no_manifest) else { return };
        let repair = self.repair(&sim, &before, false, &place);
        let left = check_of(&sim).unwrap_or_else(|| panic!("{place}: there is no store any more"));
        for finding in &left.findings {
            // What lies in a segment stays there, under the name that the segment has once it is sealed. Of what the log has
            // lost the index goes on to know more.
            let is_known = before.findings.iter().any(|known| {
                (known.file.replace("/wal/", "/seg/"), known.offset) == (finding.file.clone(), finding.offset)
            });
            let is_of_log = finding.file.contains("/seg/") || finding.file.contains("/idx") && before.has_lost_records;
            assert!(is_known && is_of_log, "{place}: {finding:?} is left or new; there was {:?}", before.findings);
        }
        let is_mended = left.damaged_footers.is_empty() && left.damaged_pages.is_empty() && !left.has_damaged_directory;
        assert!(is_mended, "{place}: {left:?}");
        let shown = self.look_at(&sim, &place);
        self.shown.assert_survives(&shown, &before.findings, &place);
        let unreadable = shown.unreadable();
        let named: BTreeSet<(MailboxId, u32)> =
            repair.lost.iter().map(|message| (message.mailbox, message.uid.0)).collect();
        assert_eq!(named, unreadable, "{place}: these are named as lost, and those cannot be read");
        if !unreadable.is_empty() {
            let again = check_of(&sim).expect("the store is there");
            self.repair(&sim, &again, true, &place);
            let cleared = self.look_at(&sim, &place);
            assert_eq!(cleared.readable(), shown.readable(), "{place}: what was not lost has changed");
            assert!(cleared.unreadable().is_empty(), "{place}: {:?}", cleared.unreadable());
        }
        self.rebuild(file, damage, &before, &place);
    }

    fn repair(&self, sim: &Sim, check: &ShardCheck, expunge_lost: bool, place: &str) -> Repair {
        let (io, check) = (sim.io(), check.clone());
        let repaired = sim.run(async move {
            let storage = Local::new(io);
            let superblock = open_superblock(&storage, 1).await?;
            Shard::repair(storage, SHARD, superblock.store, config().shard, &check, expunge_lost).await
        });
        repaired.expect("no crash is planned").unwrap_or_else(|error| panic!("{place}: the repair fails: {error}"))
    }

    fn rebuild(&self, file: &str, damage: Damage, check: &ShardCheck, place: &str) {
        let sim = self.damaged(file, damage);
        let shown_before = (!check.has_damaged_directory).then(|| self.look_at(&self.damaged(file, damage), place));
        let io = sim.io();
        let rebuilt = sim.run(async move {
            let storage = Local::new(io);
            let superblock = open_superblock(&storage, 1).await?;
            Shard::rebuild(storage, SHARD, superblock.store, config().shard).await
        });
        rebuilt.expect("no crash is planned").unwrap_or_else(|error| panic!("{place}: the rebuild fails: {error}"));
        let shown = self.look_at(&sim, place);
        if let Some(before) = shown_before.filter(|_| !check.has_lost_records) {
            assert_eq!(shown, before, "{place}: the rebuild has changed something");
        }
        // Where the log has lost something, what is left has the numbers that it had.
        for (mailbox, before) in &self.shown.0 {
            let found = shown.0.get(mailbox);
            let found = found.unwrap_or_else(|| panic!("{place}: mailbox {mailbox} is gone; {:?}", check.findings));
            let is_known = !check.has_damaged_directory;
            assert!(!is_known || found.uid_validity == before.uid_validity, "{place}: another UIDVALIDITY: {found:?}");
            assert!(found.uid_next >= before.uid_next && found.highest_modseq >= before.highest_modseq, "{place}");
            for (uid, (_, bytes)) in &found.messages {
                let Some((_, known)) = before.messages.get(uid) else { continue };
                assert!(bytes.is_none() || bytes == known, "{place}: mailbox {mailbox} UID {uid} is another message");
            }
        }
    }

    fn look_at(&self, sim: &Sim, place: &str) -> ShownStore {
        let (io, accounts) = (sim.io(), self.accounts.clone());
        let shown = sim.run(async move { look(&open(&io).await?, &accounts).await });
        shown.expect("no crash is planned").unwrap_or_else(|error| panic!("{place}: {error}"))
    }

    /// Opens the store with a damaged file, twice, with deliveries, a checkpoint and a stop in between.
    ///
    /// # Panics
    /// If the store does not open although superblock and manifest are whole; if a message is missing or altered that no
    /// finding of the check names; if a number is given again; if there is no checkpoint; if the second start shows
    /// anything else than the first.
    pub fn open_with_damage(&self, file: &str, damage: Damage, findings: &[Finding]) {
        let sim = self.damaged(file, damage);
        let (io, accounts) = (sim.io(), self.accounts.clone());
        let first = sim.run(async move {
            let worker = open(&io).await?;
            let shown = look(&worker, &accounts).await?;
            let shard = worker.local(SHARD).expect("there is one worker");
            let (mut delivered, mut packer) = (Vec::new(), Packer::default());
            packer.use_dictionaries(worker.cluster().dictionaries().current());
            for (&mailbox, found) in &shown.0 {
                let mailbox = TargetMailbox::Id(mailbox);
                let target = Target {
                    account: found.account,
                    mailbox,
                    prefix: Vec::new(),
                    flags: Vec::new(),
                    internal_date: None,
                };
                delivered.push(shard.deliver(message(&mut packer, 9, 3), vec![target]).await.remove(0)?);
            }
            shard.checkpoint().await?;
            assert_eq!(shard.stats().checkpoints, 1, "the checkpoint had to wait for something");
            let after = look(&worker, &accounts).await?;
            worker.stop().await?;
            Ok::<_, EngineError>((shown, delivered, after))
        });
        let place = format!("{file}, {damage:?}");
        let (shown, delivered, after) = match first.expect("no crash is planned") {
            Ok(first) => first,
            Err(error) => {
                assert!(file == "store" || file == self.manifest, "{place}: {error}");
                return;
            }
        };
        self.shown.assert_survives(&shown, findings, &place);
        for delivered in delivered {
            let next = self.shown.0.get(&delivered.mailbox).map_or(1, |mailbox| mailbox.uid_next);
            assert!(delivered.uid >= Uid(next), "{place}: UID {} is given again", delivered.uid);
        }
        let (io, accounts) = (sim.io(), self.accounts.clone());
        let second = sim.run(async move { look(&open(&io).await?, &accounts).await });
        match second.expect("no crash is planned") {
            Ok(second) => assert!(second == after, "{place}: the second start shows {second:?}, not {after:?}"),
            Err(error) => panic!("{place}: the second start fails: {error}"),
        }
    }
}

/// A message as a client sees it: flags, and a checksum of its bytes if they can be read.
type ShownMessage = (Flags, Option<u32>);

/// A mailbox as a client sees it.
#[derive(Clone, Debug, PartialEq)]
struct ShownMailbox {
    account: AccountId,
    uid_validity: u32,
    uid_next: u32,
    highest_modseq: u64,
    messages: BTreeMap<u32, ShownMessage>,
}

/// All that a store shows.
#[derive(Clone, Debug, Default, PartialEq)]
struct ShownStore(BTreeMap<MailboxId, ShownMailbox>);

/// What the last pass of the scrub has found, in the order of files: a pass begins anywhere.
fn findings_of(shard: &Shard<Local<SimIo>>) -> Vec<Finding> {
    let mut findings: Vec<Finding> = shard.scrub_status().findings.into();
    findings.sort_by(|a, b| (&a.file, a.offset, &a.what).cmp(&(&b.file, b.offset, &b.what)));
    findings
}

/// What a check says; `None` if there is no superblock that could be read.
fn check_of(sim: &Sim) -> Option<ShardCheck> {
    let io = sim.io();
    let checked = sim.run(async move {
        let storage = Local::new(io);
        let bytes = storage.read_superblock().await?.unwrap_or_default();
        let Ok(superblock) = Superblock::decode(&bytes) else { return Ok(None) };
        check_shard(&storage, SHARD, superblock.store, |_, _| ()).await.map(Some)
    });
    checked.expect("no crash is planned").expect("the device is good")
}

impl ShownStore {
    fn unreadable(&self) -> BTreeSet<(MailboxId, u32)> {
        let messages = self.0.iter().flat_map(|(mailbox, shown)| shown.messages.iter().map(move |it| (*mailbox, it)));
        messages.filter(|(_, (_, (_, bytes)))| bytes.is_none()).map(|(mailbox, (uid, _))| (mailbox, *uid)).collect()
    }

    /// What can be read of each mailbox, with its numbers but the mod-sequence.
    fn readable(&self) -> Self {
        let mut readable = self.clone();
        for mailbox in readable.0.values_mut() {
            mailbox.messages.retain(|_, (_, bytes)| bytes.is_some());
            mailbox.highest_modseq = 0;
        }
        readable
    }

    /// Every message is as it was or named, and no number is given again.
    fn assert_survives(&self, shown: &Self, findings: &[Finding], place: &str) {
        let excused = |mailbox, uid| {
            let touches = findings.iter().flat_map(|finding| &finding.touches);
            touches.into_iter().any(|&(touched, first, last)| touched == mailbox && (first..=last).contains(&uid))
        };
        for (mailbox, before) in &self.0 {
            let Some(found) = shown.0.get(mailbox) else {
                panic!("{place}: mailbox {mailbox} is gone; findings: {findings:?}");
            };
            for (uid, message) in &before.messages {
                let is_same = found.messages.get(uid) == Some(message);
                assert!(
                    is_same || excused(*mailbox, *uid),
                    "{place}: mailbox {mailbox} UID {uid} is {:?} and was {message:?}; findings: {findings:?}",
                    found.messages.get(uid)
                );
            }
            assert!(
                found.uid_next >= before.uid_next && found.highest_modseq >= before.highest_modseq,
                "{place}: mailbox {mailbox} would give numbers again: UIDNEXT {} after {}, HIGHESTMODSEQ {} after {}",
                found.uid_next,
                before.uid_next,
                found.highest_modseq,
                before.highest_modseq
            );
        }
    }
}

async fn look(worker: &Worker<Local<SimIo>>, accounts: &[AccountId]) -> Result<ShownStore, EngineError> {
    let shard = worker.local(SHARD).expect("there is one worker");
    let mut shown = ShownStore::default();
    for &account in accounts {
        for info in shard.mailboxes(account) {
            let mut messages = BTreeMap::new();
            for found in shard.messages(info.mailbox, UidSet::range(1..=1000)).await? {
                let bytes = match shard.read_message(&found.message, info.mailbox, Part::Whole).await {
                    Ok(bytes) => Some(checksum(&[&bytes.prefix[..], &bytes.header, &bytes.body].concat())),
                    Err(EngineError::Damaged(_)) => None,
                    // Damage has taken the record that says where compaction has moved it.
                    Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => None,
                    Err(error) => return Err(error),
                };
                messages.insert(found.message.uid.0, (found.flags, bytes));
            }
            let Status { uid_validity, uid_next, highest_modseq, .. } = info.status;
            let mailbox = ShownMailbox { account, uid_validity, uid_next, highest_modseq, messages };
            shown.0.insert(info.mailbox, mailbox);
        }
    }
    Ok(shown)
}
