//! Receipts: what was delivered although its client was told to try again.
//!
//! SMTP has one answer for all recipients of a message. If some shards have stored it and one could not, the client repeats it
//! for all; a shard that has a receipt swallows the repetition. Receipts are rare, and written only when such an answer is
//! about to be given.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::error::EngineError;
use crate::format::record::{Receipt, Record};
use crate::shard::Shard;
use crate::storage::Storage;

/// Receipts of a shard. Past this, those that expire first are forgotten, at the price of doubled messages.
pub const RECEIPTS_MAX: usize = 10_000;

/// A message for a recipient, by hashes of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ReceiptKey {
    pub content: u128,
    pub recipient: u128,
}

/// The receipts of a shard, and when they expire, in milliseconds since the Unix epoch.
#[derive(Clone, Debug, Default)]
pub struct Receipts(BTreeMap<ReceiptKey, u64>);

impl Receipts {
    pub(crate) fn insert(&mut self, receipt: Receipt) {
        let key = ReceiptKey { content: receipt.content_hash, recipient: receipt.recipient_hash };
        let expires_ms = self.0.entry(key).or_insert(0);
        *expires_ms = receipt.expires_ms.max(*expires_ms);
        if self.0.len() > RECEIPTS_MAX
            && let Some((&first, _)) = self.0.iter().min_by_key(|(_, expires_ms)| **expires_ms)
        {
            self.0.remove(&first);
        }
    }

    fn forget_expired(&mut self, now_ms: u64) {
        self.0.retain(|_, expires_ms| *expires_ms > now_ms);
    }
}

impl<S: Storage> Shard<S> {
    /// Whether there are any; nearly always there are none.
    pub fn has_receipts(&self) -> bool {
        !self.0.state.borrow().receipts.0.is_empty()
    }

    /// Whether this message was delivered to this recipient not long ago.
    pub fn is_received(&self, key: ReceiptKey) -> bool {
        let now_ms = self.0.storage.wall_clock_ms();
        self.0.state.borrow().receipts.0.get(&key).is_some_and(|&expires_ms| expires_ms > now_ms)
    }

    /// Remembers that messages were delivered, for so long. Durable on return, over restarts and checkpoints.
    ///
    /// # Errors
    /// The shard cannot write.
    pub async fn remember_received(&self, keys: &[ReceiptKey], lasting: Duration) -> Result<(), EngineError> {
        let now_ms = self.0.storage.wall_clock_ms();
        self.0.state.borrow_mut().receipts.forget_expired(now_ms);
        let expires_ms = now_ms + u64::try_from(lasting.as_millis()).unwrap_or(u64::MAX / 2);
        self.write_receipts(keys.iter().map(|&key| (key, expires_ms)).collect()).await
    }

    /// Forgets receipts that have served. A crash before the next checkpoint brings them back, until they expire.
    pub fn forget_received(&self, keys: &[ReceiptKey]) {
        let mut state = self.0.state.borrow_mut();
        for key in keys {
            state.receipts.0.remove(key);
        }
    }

    /// Writes the receipts that still count into the log once more, so that a checkpoint whose replay begins before them need
    /// not keep what is older.
    pub(crate) async fn carry_receipts_over(&self) -> Result<(), EngineError> {
        let now_ms = self.0.storage.wall_clock_ms();
        let live = {
            let mut state = self.0.state.borrow_mut();
            state.receipts.forget_expired(now_ms);
            state.receipts.0.iter().map(|(&key, &expires_ms)| (key, expires_ms)).collect()
        };
        self.write_receipts(live).await
    }

    async fn write_receipts(&self, receipts: Vec<(ReceiptKey, u64)>) -> Result<(), EngineError> {
        if receipts.is_empty() {
            return Ok(());
        }
        self.admit().await?;
        let ticket = {
            let mut log = self.0.log.borrow_mut();
            log.check_open(self.0.id)?;
            for (key, expires_ms) in receipts {
                let lsn = log.next_lsn(self.0.epoch);
                let (content_hash, recipient_hash) = (key.content, key.recipient);
                log.push(lsn, 0, Record::Receipt(Receipt { content_hash, recipient_hash, expires_ms }), &[]);
            }
            self.ticket(&mut log)
        };
        ticket.committed().await?;
        Ok(())
    }
}
