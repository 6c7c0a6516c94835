//! Mending a shard that nobody has open: its index put together from the log alone, footers and pages written again, and
//! the messages named that are lost.
//!
//! Nothing goes before what replaces it is durable and in force, and what is replaced because it was damaged is kept
//! (`lost+found` in the directory of the shard).

use std::collections::{BTreeMap, BTreeSet};

use crate::check::{DamagedFooter, ShardCheck};
use crate::error::{EngineError, RecoveryReport};
use crate::flags::UidSet;
use crate::format::frame::BLOCK_RAW_BYTES;
use crate::format::manifest::Manifest;
use crate::ids::{AccountId, MailboxId, ShardId, Uid};
use crate::index::Message;
use crate::read::Part;
use crate::recovery::Index;
use crate::shard::{Shard, ShardConfig};
use crate::storage::local::{segment_file, shard_directory};
use crate::storage::{BlobName, BlobStore, ManifestStore, Storage, StorageError};

/// With more pages damaged than this the whole index is put together from the log: each alone takes a reading of all of it.
const PAGES_ONE_BY_ONE_MAX: usize = 8;
/// So much of the header of a lost message is given, if it can still be read.
const HEADER_OCTETS_MAX: usize = 16 << 10;

/// A message that cannot be read any more, whatever is tried.
#[derive(Clone, Debug)]
pub struct LostMessage {
    pub shard: ShardId,
    pub account: AccountId,
    pub mailbox: MailboxId,
    pub mailbox_name: String,
    pub uid: Uid,
    pub octets: u64,
    /// Seconds since 1970, and the zone in which that is shown.
    pub internal_date: i64,
    pub zone_minutes: i16,
    /// The beginning of its header, if that can be read.
    pub header: Option<Vec<u8>>,
    /// What is wrong with it.
    pub why: String,
    /// It has been expunged now.
    pub is_expunged: bool,
}

/// What a repair has done.
#[derive(Clone, Debug, Default)]
pub struct Repair {
    /// Files of which the footer has been written again.
    pub footers: Vec<String>,
    /// Mailboxes whose pages have been put together from the log.
    pub pages: Vec<MailboxId>,
    pub is_index_rebuilt: bool,
    /// Where what has been replaced is kept.
    pub kept: Vec<String>,
    pub lost: Vec<LostMessage>,
    /// Messages that were in mailboxes whose pages are damaged and whose own records are, too, so that nothing else knows of them.
    /// Some may have been expunged before.
    pub gone: Vec<(MailboxId, u32)>,
}

impl<S: Storage> Shard<S> {
    /// Puts the index of a shard together from the log alone. The old one is in force until the new one is: a crash before
    /// leaves everything as it was. What the old one says of names, UIDVALIDITY, UIDNEXT and HIGHESTMODSEQ stands where the
    /// log has lost it.
    ///
    /// # Errors
    /// As [`Shard::open`].
    pub async fn rebuild(
        storage: S,
        id: ShardId,
        store: u128,
        config: ShardConfig,
    ) -> Result<RecoveryReport, EngineError> {
        let (shard, report) = Self::open_with(storage, id, store, config, Index::Anew).await?;
        shard.0.full_directory.set(true);
        shard.checkpoint().await?;
        // More than one, where the log was long enough for a checkpoint that nobody asked for.
        let is_new = shard.0.log.borrow().manifest.indexes.iter().all(|entry| entry.epoch == shard.0.epoch);
        assert!(is_new, "the old index is no part of the new one");
        shard.stop().await?;
        Ok(report)
    }

    /// Mends what a check has found, as far as that goes: pages and footers are written again, an index that disagrees
    /// with a whole log is put together anew. Names the messages that are lost; with `expunge_lost` they are expunged, as
    /// a client would have done it.
    ///
    /// # Errors
    /// Storage that fails, or as [`Shard::open`]. What has been mended by then stays mended.
    pub async fn repair(
        storage: S,
        id: ShardId,
        store: u128,
        config: ShardConfig,
        check: &ShardCheck,
        expunge_lost: bool,
    ) -> Result<Repair, EngineError> {
        let mut repair = Repair::default();
        // A start would do so: temporary files of an earlier repair are in the way.
        storage.prepare(id).await?;
        for DamagedFooter { name, footer } in &check.damaged_footers {
            let blobs = storage.blobs(id);
            repair.kept.push(blobs.keep(BlobName::Segment(*name)).await?);
            blobs.replace_footer(*name, footer.data_end, footer.encode()).await?;
            repair.footers.push(format!("{}/seg/{}", shard_directory(id), segment_file(*name)));
        }
        let differs = !check.differences.is_empty() || check.differs_otherwise;
        let is_many = check.damaged_pages.len() > PAGES_ONE_BY_ONE_MAX;
        // Where the log has lost something the index may know more.
        let is_index_wrong = (differs || is_many) && !check.has_lost_records;
        if is_index_wrong || check.has_damaged_directory || !check.damaged_pages.is_empty() {
            repair.kept.extend(keep_index(&storage, id).await?);
        }
        if is_index_wrong {
            Self::rebuild(storage.clone(), id, store, config.clone()).await?;
        }
        let (shard, _) = Self::open(storage, id, store, config).await?;
        repair.is_index_rebuilt = is_index_wrong || check.has_damaged_directory;
        if !repair.is_index_rebuilt {
            for &mailbox in &check.damaged_pages {
                if shard.rewrite_pages(mailbox).await? {
                    repair.pages.push(mailbox);
                }
            }
        }
        shard.checkpoint().await?;
        repair.gone = shard.gone_messages(check).await?;
        repair.lost = shard.lost_messages(check).await?;
        if expunge_lost {
            shard.expunge_lost(&mut repair.lost).await?;
        }
        shard.stop().await?;
        Ok(repair)
    }

    /// Lets the next checkpoint write the pages of a mailbox again, from the log if they are damaged. Whether there is such a
    /// mailbox.
    pub(crate) async fn rewrite_pages(&self, mailbox: MailboxId) -> Result<bool, EngineError> {
        // What is in memory has everything; what is not is put together as it is loaded.
        match self.load_index(mailbox).await {
            Err(EngineError::Refused(_)) => return Ok(false),
            loaded => loaded?,
        }
        let mut state = self.0.state.borrow_mut();
        let Some(slot) = state.slots.get_mut(&mailbox) else { return Ok(false) };
        (slot.rewrite, slot.dirty) = (true, true);
        Ok(true)
    }

    /// The messages that cannot be read, of those that damage may concern.
    async fn lost_messages(&self, check: &ShardCheck) -> Result<Vec<LostMessage>, EngineError> {
        let mut suspects: Vec<(MailboxId, Message)> = Vec::new();
        if !check.damaged_segments.is_empty() {
            let named: BTreeSet<(MailboxId, u32)> = named_messages(check);
            let look = |mailbox, message: &Message| {
                let is_there = check.damaged_segments.contains(&message.location.segment);
                // Its blocks may lie anywhere.
                let may_have_blocks = message.size > BLOCK_RAW_BYTES as u64;
                if is_there || may_have_blocks || named.contains(&(mailbox, message.uid.0)) {
                    suspects.push((mailbox, *message));
                }
            };
            self.visit_messages(look).await?;
        }
        let mut lost = Vec::new();
        for (mailbox, message) in suspects {
            let why = match self.read_message_once(&message, mailbox, Part::Whole).await {
                Err(EngineError::Damaged(damage)) => damage.to_string(),
                Err(EngineError::Storage(error)) if matches!(*error, StorageError::NotFound(_)) => error.to_string(),
                read => {
                    read?;
                    continue;
                }
            };
            let header = self.read_message_once(&message, mailbox, Part::Header).await.ok();
            let header = header.map(|bytes| bytes.header[..bytes.header.len().min(HEADER_OCTETS_MAX)].to_vec());
            let (account, mailbox_name) = self.mailbox_name(mailbox).unwrap_or_default();
            lost.push(LostMessage {
                shard: self.id(),
                account,
                mailbox,
                mailbox_name,
                uid: message.uid,
                octets: message.size,
                internal_date: message.internal_date,
                zone_minutes: message.zone_minutes,
                header,
                why,
                is_expunged: false,
            });
        }
        Ok(lost)
    }

    /// The messages that findings name and that are in no index any more, of mailboxes whose pages are damaged.
    async fn gone_messages(&self, check: &ShardCheck) -> Result<Vec<(MailboxId, u32)>, EngineError> {
        let damaged: BTreeSet<MailboxId> = check.damaged_pages.iter().copied().collect();
        let mut gone = Vec::new();
        for (mailbox, uid) in named_messages(check).into_iter().filter(|(mailbox, _)| damaged.contains(mailbox)) {
            let is_there = self.inspect(mailbox, |_, index| index.contains(Uid(uid))).await?;
            if is_there == Some(false) {
                gone.push((mailbox, uid));
            }
        }
        Ok(gone)
    }

    async fn expunge_lost(&self, lost: &mut [LostMessage]) -> Result<(), EngineError> {
        let mut by_mailbox: BTreeMap<MailboxId, UidSet> = BTreeMap::new();
        for message in lost.iter() {
            by_mailbox.entry(message.mailbox).or_default().insert(message.uid);
        }
        for (mailbox, uids) in by_mailbox {
            self.expunge_messages(mailbox, uids).await?;
        }
        lost.iter_mut().for_each(|message| message.is_expunged = true);
        Ok(())
    }
}

/// The messages that findings name one by one.
fn named_messages(check: &ShardCheck) -> BTreeSet<(MailboxId, u32)> {
    let touches = check.findings.iter().flat_map(|finding| &finding.touches);
    touches.filter(|(_, first, last)| first == last && *first > 0).map(|(mailbox, uid, _)| (*mailbox, *uid)).collect()
}

/// Keeps the blobs of the index that are in force.
async fn keep_index<S: Storage>(storage: &S, id: ShardId) -> Result<Vec<String>, EngineError> {
    let Some((_, _, bytes)) = storage.manifests(id).latest().await? else { return Ok(Vec::new()) };
    let Ok(manifest) = Manifest::from_bytes(&bytes) else { return Ok(Vec::new()) };
    let mut kept = Vec::new();
    for entry in &manifest.indexes {
        match storage.blobs(id).keep(BlobName::Index { blob: entry.blob, epoch: entry.epoch }).await {
            Err(StorageError::NotFound(_)) => {}
            name => kept.push(name?),
        }
    }
    Ok(kept)
}
