//! What messages are compressed with: dictionaries trained on the store's own mail, shared by all its shards.
//!
//! A message is compressed once, for recipients in any shards, so the dictionaries in use are the store's. Each segment
//! embeds those that its frames name (`docs/format.md`), which is also where a start finds them again.
//!
//! A dictionary is made of strings that many users have received, and of nothing else: whoever could read it would learn
//! only what is in everybody's mail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use tokio::sync::Notify;

use crate::format::dictionary::DictionarySet;

/// When and how dictionaries are trained. `docs/configuration.md` gives the ranges.
#[derive(Clone, Debug)]
pub struct DictionaryConfig {
    /// Octets of mail that come in before the first training. Later there are looks whether dictionaries still fit, each
    /// after four times as much, and twice that after each training. 0: never.
    pub train_after_octets: u64,
    /// A string must have been received by so many users.
    pub users_min: usize,
    /// Messages that are looked at.
    pub samples_max: usize,
    /// The largest dictionary.
    pub bytes_max: usize,
}

impl Default for DictionaryConfig {
    fn default() -> Self {
        Self { train_after_octets: 256 << 20, users_min: 8, samples_max: 2500, bytes_max: 64 << 10 }
    }
}

/// Dictionaries are trained again when mail takes so many hundredths of the room that it took after the last training.
const WORSE_PERCENT: u64 = 110;
/// After the first training it takes so many times as much mail until there is a look at what mail takes: kinds of mail come
/// and go.
const LATER_LOOKS: u64 = 4;
/// The time between looks doubles with each training, so often at most.
const DOUBLINGS_MAX: u32 = 10;

/// What is in use: at most two sets, because messages that were compressed with the one before may still be on their way.
struct InUse {
    current: Arc<DictionarySet>,
    previous: Option<Arc<DictionarySet>>,
}

/// The dictionaries of a store, for all its workers.
pub struct SharedDictionaries {
    config: DictionaryConfig,
    in_use: ArcSwapOption<InUse>,
    /// Octets of mail since the last look, and what they took.
    raw: AtomicU64,
    stored: AtomicU64,
    /// What mail took after the last training, in millionths; 0 until that has been measured.
    ratio: AtomicU64,
    /// Octets of mail from one look to the next.
    due: AtomicU64,
    is_training: AtomicBool,
    wanted: Notify,
}

impl SharedDictionaries {
    pub(crate) fn new(config: DictionaryConfig) -> Self {
        Self {
            due: AtomicU64::new(config.train_after_octets),
            config,
            in_use: ArcSwapOption::empty(),
            raw: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            ratio: AtomicU64::new(0),
            is_training: AtomicBool::new(false),
            wanted: Notify::new(),
        }
    }

    pub(crate) fn config(&self) -> &DictionaryConfig {
        &self.config
    }

    /// What messages are to be compressed with now.
    pub fn current(&self) -> Option<Arc<DictionarySet>> {
        self.in_use.load().as_ref().map(|in_use| Arc::clone(&in_use.current))
    }

    /// What a new segment embeds.
    pub(crate) fn in_use(&self) -> Vec<Arc<DictionarySet>> {
        let in_use = self.in_use.load();
        in_use.iter().flat_map(|sets| [Some(&sets.current), sets.previous.as_ref()]).flatten().cloned().collect()
    }

    /// Uses a set, unless a later one is in use. One of the same generation is completed by what it lacks.
    pub fn offer(&self, set: DictionarySet) {
        let set = Arc::new(set);
        let doublings = set.generation().saturating_sub(1).min(DOUBLINGS_MAX);
        let due = self.config.train_after_octets.saturating_mul(LATER_LOOKS << doublings);
        self.due.fetch_max(due, Ordering::Relaxed);
        self.in_use.rcu(|in_use| match in_use {
            Some(sets) if sets.current.generation() > set.generation() => Some(Arc::clone(sets)),
            Some(sets) if sets.current.generation() == set.generation() => Some(Arc::new(InUse {
                current: Arc::new(sets.current.completed_by(&set)),
                previous: sets.previous.clone(),
            })),
            sets => Some(Arc::new(InUse {
                current: Arc::clone(&set),
                previous: sets.as_ref().map(|sets| Arc::clone(&sets.current)),
            })),
        });
    }

    /// Counts a message that has come in, and asks for training when it is due.
    pub(crate) fn note(&self, raw: u64, stored: u64) {
        let due = self.due.load(Ordering::Relaxed);
        let stored = self.stored.fetch_add(stored, Ordering::Relaxed) + stored;
        let raw = self.raw.fetch_add(raw, Ordering::Relaxed) + raw;
        if due == 0 || raw < due || self.is_training.swap(true, Ordering::Relaxed) {
            return;
        }
        self.raw.store(0, Ordering::Relaxed);
        self.stored.store(0, Ordering::Relaxed);
        let ratio = (stored.saturating_mul(1_000_000) / raw).max(1);
        if self.is_worth_training(ratio) {
            self.wanted.notify_one();
        } else {
            self.is_training.store(false, Ordering::Relaxed);
        }
    }

    /// Whether mail takes more room than it did after the last training.
    fn is_worth_training(&self, ratio: u64) -> bool {
        if self.in_use.load().is_none() {
            return true;
        }
        let after_training = self.ratio.load(Ordering::Relaxed);
        if after_training == 0 || ratio < after_training {
            self.ratio.store(ratio, Ordering::Relaxed);
            return false;
        }
        ratio * 100 > after_training * WORSE_PERCENT
    }

    /// Waits until training is due. One task.
    pub(crate) async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Training has ended; without a set it goes on as before, and is tried again after twice as much mail.
    pub(crate) fn trained(&self, set: Option<DictionarySet>) {
        match set {
            Some(set) => self.offer(set),
            None => {
                let due = self.due.load(Ordering::Relaxed);
                self.due.store(due.saturating_mul(2), Ordering::Relaxed);
            }
        }
        self.ratio.store(0, Ordering::Relaxed);
        self.raw.store(0, Ordering::Relaxed);
        self.stored.store(0, Ordering::Relaxed);
        self.is_training.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::dictionary::{Dictionary, DictionaryKind};

    fn set(generation: u32) -> DictionarySet {
        let dictionary = Dictionary::new(DictionaryKind::Body, generation, vec![generation as u8; 100]);
        DictionarySet::newest_of(&[Arc::new(dictionary)]).expect("one")
    }

    #[test]
    fn a_later_generation_replaces_an_earlier_one_which_is_still_embedded() {
        let shared = SharedDictionaries::new(DictionaryConfig::default());
        assert!(shared.current().is_none() && shared.in_use().is_empty());
        for (offered, current, embedded) in
            [(2, 2, &[2][..]), (1, 2, &[2]), (3, 3, &[3, 2]), (3, 3, &[3, 2]), (9, 9, &[9, 3])]
        {
            shared.offer(set(offered));
            assert_eq!(shared.current().map(|set| set.generation()), Some(current));
            let generations: Vec<u32> = shared.in_use().iter().map(|set| set.generation()).collect();
            assert_eq!(generations, embedded);
        }
    }

    #[test]
    fn training_is_wanted_first_by_octets_and_then_when_mail_takes_more_room() {
        let shared =
            SharedDictionaries::new(DictionaryConfig { train_after_octets: 1000, ..DictionaryConfig::default() });
        let training = || shared.is_training.load(Ordering::Relaxed);
        shared.note(999, 500);
        assert!(!training());
        shared.note(1, 0);
        assert!(training());
        shared.note(5000, 5000);
        shared.trained(None);
        shared.note(1999, 500);
        assert!(!training(), "it waits for more the next time");
        shared.note(1, 0);
        assert!(training());
        shared.trained(Some(set(1)));
        assert!(!training(), "what came meanwhile does not count");
        for (stored, wanted) in [(1600, false), (1750, false), (1200, false), (1310, false), (1330, true)] {
            shared.note(3000, stored);
            assert!(!training());
            shared.note(1000, 0);
            assert_eq!(training(), wanted, "{stored}");
        }
        shared.trained(Some(set(2)));
        shared.note(7999, 8000);
        assert_eq!(shared.raw.load(Ordering::Relaxed), 7999, "twice as much until the next look");
        shared.note(1, 0);
        assert_eq!(shared.raw.load(Ordering::Relaxed), 0);
        let never = SharedDictionaries::new(DictionaryConfig { train_after_octets: 0, ..DictionaryConfig::default() });
        never.note(u64::MAX / 2, 1);
        assert!(!never.is_training.load(Ordering::Relaxed));
    }
}
