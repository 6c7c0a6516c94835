//! Training dictionaries on the store's own mail.
//!
//! What is learnt must be common knowledge. In the samples each run of [`WINDOW`] octets that fewer than
//! [`DictionaryConfig::users_min`] users have received is broken up, before they are trained on: its characters are replaced by
//! others of the same kind from anywhere in the same sample, so that the statistics stay those of mail and nothing that
//! somebody wrote to few is left in its order. White space stays where it is.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use crate::bodies::without_base64;
use crate::dictionaries::{DictionaryConfig, SharedDictionaries};
use crate::error::EngineError;
use crate::format::dictionary::{Dictionary, DictionaryKind, DictionarySet};
use crate::format::frame::Packer;
use crate::ids::MailboxId;
use crate::node::Worker;
use crate::read::Part;
use crate::shard::Shard;
use crate::slots::SLOTS_AT_ONCE;
use crate::storage::Storage;

/// Octets that are looked for as one in the mail of others.
const WINDOW: usize = 12;
/// So much of a part is looked at.
const PART_BYTES_MAX: usize = 8 << 10;
/// Larger messages are left out: most of what they have is theirs alone.
const MESSAGE_OCTETS_MAX: u64 = 256 << 10;
/// Slots of the first, inexact count of windows: half as many as there are windows at most, so that few slots are shared by
/// windows of many.
const SLOTS: usize = 1 << 21;
/// One sample in so many is not trained on: whether a dictionary is worth having is judged by these.
const JUDGED_EVERY: usize = 5;
/// A dictionary has to save so many hundredths of what its kind of frame takes without it.
const SAVED_PERCENT_MIN: usize = 3;
/// Fewer are no sample of anything.
const SAMPLES_MIN: usize = 50;

/// What a message has for each kind of dictionary.
pub(crate) struct Sample {
    account: u64,
    parts: [Vec<u8>; DictionaryKind::ALL.len()],
}

impl<S: Storage> Shard<S> {
    /// Recent messages of many mailboxes, at most `count`. What cannot be read is left out.
    async fn samples(&self, count: usize, random: u64) -> Vec<Sample> {
        let mailboxes = self.some_mailboxes(count, random).await;
        let mut samples = Vec::new();
        for (number, &(mailbox, account)) in mailboxes.iter().enumerate() {
            let wanted = (count - samples.len()).div_ceil(mailboxes.len() - number);
            let newest = self.look(mailbox, |index| {
                let start = index.messages.len().saturating_sub(wanted);
                index.messages.iter_from(start).collect::<Vec<_>>()
            });
            for message in newest.await.unwrap_or_default() {
                if message.size > MESSAGE_OCTETS_MAX {
                    continue;
                }
                let digest = self.read_message_once(&message, mailbox, Part::Digest).await;
                let whole = self.read_message_once(&message, mailbox, Part::Whole).await;
                let (Ok(digest), Ok(whole)) = (digest, whole) else { continue };
                let part = |bytes: &[u8]| bytes[..bytes.len().min(PART_BYTES_MAX)].to_vec();
                // What base64 says is stored apart from the rest, without a dictionary.
                let parts = [
                    part(&digest.digest),
                    part(&[&whole.prefix[..], &whole.header].concat()),
                    part(&without_base64(&whole.body)),
                ];
                samples.push(Sample { account, parts });
                self.0.storage.yield_now().await;
            }
        }
        samples
    }

    /// At most `count` mailboxes with messages, and their accounts: each with the same chance.
    async fn some_mailboxes(&self, count: usize, mut random: u64) -> Vec<(MailboxId, u64)> {
        let (mut chosen, mut seen, mut next) = (Vec::new(), 0, Some(MailboxId(0)));
        while let Some(from) = next.take() {
            {
                let state = self.0.state.borrow();
                let mut slots = state.slots.iter_from(from);
                for (mailbox, slot) in slots.by_ref().take(SLOTS_AT_ONCE) {
                    if slot.meta.exists == 0 {
                        continue;
                    }
                    seen += 1;
                    let found = (mailbox, slot.meta.account.0);
                    if chosen.len() < count {
                        chosen.push(found);
                    } else if let Some(place) = chosen.get_mut(next_below(&mut random, seen)) {
                        *place = found;
                    }
                }
                next = slots.next().map(|(mailbox, _)| mailbox);
            }
            self.0.storage.yield_now().await;
        }
        chosen
    }
}

impl<S: Storage> Worker<S> {
    /// Trains dictionaries on mail of all shards: `None` if the mail of many users has too little in common.
    ///
    /// # Errors
    /// A shard's worker is stopping.
    pub(crate) async fn train_dictionaries(
        &self,
        shared: &SharedDictionaries,
    ) -> Result<Option<DictionarySet>, EngineError> {
        let config = shared.config().clone();
        let generation = shared.current().map_or(0, |set| set.generation()) + 1;
        let shards = self.cluster().superblock.shards;
        let count = config.samples_max.div_ceil(shards as usize);
        let mut samples = Vec::new();
        for shard in (0..shards).map(crate::ids::ShardId) {
            let random = self.storage().random();
            samples.extend(self.call(shard, move |shard| async move { shard.samples(count, random).await }).await?);
        }
        let key = self.storage().random();
        Ok(self.storage().background(move || train(samples, &config, generation, key)).await)
    }
}

/// Dictionaries of those kinds that gain by one.
pub(crate) fn train(
    mut samples: Vec<Sample>,
    config: &DictionaryConfig,
    generation: u32,
    key: u64,
) -> Option<DictionarySet> {
    samples.sort_by_key(|sample| sample.account);
    let dictionaries: Vec<Arc<Dictionary>> = DictionaryKind::ALL
        .into_iter()
        .zip(0..)
        .filter_map(|(kind, part)| {
            let parts: Vec<(u64, &[u8])> =
                samples.iter().map(|sample| (sample.account, &sample.parts[part as usize][..])).collect();
            let dictionary = Dictionary::new(kind, generation, train_kind(&parts, config, key)?);
            // Here, and not when a worker first needs it.
            dictionary.prepare();
            Some(Arc::new(dictionary))
        })
        .collect();
    DictionarySet::newest_of(&dictionaries)
}

/// A dictionary for parts of messages, which are in the order of their accounts.
fn train_kind(parts: &[(u64, &[u8])], config: &DictionaryConfig, key: u64) -> Option<Vec<u8>> {
    let common = CommonWindows::of(parts, config.users_min, key);
    let (mut judged, mut trained) = (Vec::new(), Vec::new());
    let mut random = key;
    for (number, (_, part)) in parts.iter().enumerate() {
        if part.len() < WINDOW {
            continue;
        }
        if number % JUDGED_EVERY == 0 {
            judged.push(*part);
        } else {
            trained.push(common.anonymous(part, &mut random));
        }
    }
    if trained.len() < SAMPLES_MIN {
        return None;
    }
    // The library advises a hundredth of the samples; but most of these is not to be learnt.
    let octets: usize = trained.iter().map(Vec::len).sum();
    let size = (octets / 50).clamp(1 << 10, config.bytes_max);
    let mut bytes = zstd::dict::from_samples(&trained, size).ok()?;
    drop(trained);
    // The id that zstd would repeat in each frame; frames here have one of their own.
    if let Some(id) = bytes.get_mut(4..8) {
        id.fill(0);
    }
    is_worth_having(&bytes, &judged).then_some(bytes)
}

fn is_worth_having(dictionary: &[u8], judged: &[&[u8]]) -> bool {
    let dictionary = Arc::new(Dictionary::new(DictionaryKind::Body, 1, dictionary.to_vec()));
    let mut packer = Packer::default();
    packer.use_dictionaries(DictionarySet::newest_of(&[dictionary]).map(Arc::new));
    let (mut without, mut with, mut out) = (0, 0, Vec::new());
    for part in judged {
        out.clear();
        without += packer.pack(part, &mut out).stored_len as usize;
        with += packer.pack_as(DictionaryKind::Body, part, &mut out).stored_len as usize;
    }
    with * 100 <= without * (100 - SAVED_PERCENT_MIN)
}

/// Takes keys as they are: they are keyed hashes.
#[derive(Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.0 = self.0.rotate_left(8) ^ u64::from(byte));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

/// The windows that many users have received.
struct CommonWindows {
    /// By their keyed hash: the last account that had it, and how many had.
    counts: HashMap<u64, (u64, usize), BuildHasherDefault<AsItIs>>,
    users_min: usize,
    key: u64,
}

impl CommonWindows {
    fn of(parts: &[(u64, &[u8])], users_min: usize, key: u64) -> Self {
        // First inexactly, since most windows are seen once and shall take no room: what shares a slot counts together.
        // Accounts come one after another, so that a number for each will do.
        let mut slots = vec![(0_u16, 0_u16); SLOTS];
        let (mut number, mut before) = (0_u16, None);
        for &(account, part) in parts {
            if before != Some(account) {
                (number, before) = (number % u16::MAX + 1, Some(account));
            }
            for hash in windows(part, key) {
                let (last, count) = &mut slots[hash as usize % SLOTS];
                if *last != number {
                    (*last, *count) = (number, count.saturating_add(1));
                }
            }
        }
        let mut counts: HashMap<u64, (u64, usize), _> = HashMap::default();
        for &(account, part) in parts {
            for hash in windows(part, key).filter(|&hash| usize::from(slots[hash as usize % SLOTS].1) >= users_min) {
                let (last, count) = counts.entry(hash).or_insert((u64::MAX, 0));
                if *last != account {
                    (*last, *count) = (account, *count + 1);
                }
            }
        }
        counts.retain(|_, (_, count)| *count >= users_min);
        Self { counts, users_min, key }
    }

    /// A part without what only few have received.
    fn anonymous(&self, part: &[u8], random: &mut u64) -> Vec<u8> {
        let mut like: [Vec<u8>; CHARACTER_KINDS] = Default::default();
        for &octet in part {
            if let Some(kind) = character_kind(octet) {
                like[kind].push(octet);
            }
        }
        let is_common = |hash| self.counts.get(&hash).is_some_and(|(_, count)| *count >= self.users_min);
        let common: Vec<bool> = windows(part, self.key).map(is_common).collect();
        let mut out = part.to_vec();
        // What is kept of a run of common windows that begins before the last one is past, or right behind it, is only what
        // comes after its first window: what bridges the two need not be common.
        let (mut kept_from, mut kept_until) = (0, 0);
        for (at, octet) in out.iter_mut().enumerate() {
            let begins = common.get(at).is_some_and(|&common| common) && !(at > 0 && common[at - 1]);
            if begins {
                kept_from = if at > 0 && at <= kept_until { at + WINDOW - 1 } else { at };
            }
            if common.get(at).is_some_and(|&common| common) {
                kept_until = at + WINDOW;
            }
            let is_kept = at < kept_until && at >= kept_from;
            if let Some(kind) = character_kind(*octet).filter(|_| !is_kept) {
                *octet = like[kind][next_below(random, like[kind].len())];
            }
        }
        // By chance, and where a sample has one character of a kind, what was replaced is what it was.
        for (at, &common) in common.iter().enumerate() {
            let window = at..at + WINDOW;
            if common || out[window.clone()] != part[window.clone()] {
                continue;
            }
            if let Some(last) = window.rev().find(|&at| character_kind(part[at]).is_some()) {
                out[last] = unlike(part[last]);
            }
        }
        out
    }
}

/// Another character of the same kind.
fn unlike(octet: u8) -> u8 {
    match octet {
        b'9' | b'z' | b'Z' | 0xff => octet - 1,
        0x7f => 0,
        0x1f => 1,
        b'/' | b'@' | b'`' | b'~' => b'.',
        other => other + 1,
    }
}

const CHARACTER_KINDS: usize = 6;

/// Characters of a kind can stand for each other; white space stands for itself.
fn character_kind(octet: u8) -> Option<usize> {
    Some(match octet {
        b' ' | b'\t' | b'\r' | b'\n' => return None,
        b'0'..=b'9' => 0,
        b'a'..=b'z' => 1,
        b'A'..=b'Z' => 2,
        0x80.. => 3,
        0..=0x1f | 0x7f => 4,
        _ => 5,
    })
}

/// A random number less than `end`.
fn next_below(random: &mut u64, end: usize) -> usize {
    *random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *random;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed ^= mixed >> 27;
    (mixed % end as u64) as usize
}

/// The keyed hashes of all windows, by where they begin.
fn windows(part: &[u8], key: u64) -> impl Iterator<Item = u64> {
    part.windows(WINDOW).map(move |window| {
        let (mut first, mut rest) = ([0; 8], [0; WINDOW - 8]);
        first.copy_from_slice(&window[..8]);
        rest.copy_from_slice(&window[8..]);
        let mut hash = (u64::from_le_bytes(first) ^ key).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 29;
        hash = (hash ^ u64::from(u32::from_le_bytes(rest))).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^ (hash >> 32)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "the combination is 48-15-16-23-42, Marlene";

    fn config() -> DictionaryConfig {
        DictionaryConfig { users_min: 8, ..DictionaryConfig::default() }
    }

    /// Bodies that have a letterhead in common and a number of words of their own.
    fn samples(users: u64, extra: impl Fn(u64) -> String) -> Vec<Sample> {
        let mut random = 7;
        let mut word =
            move || -> String { (0..9).map(|_| char::from(b'a' + next_below(&mut random, 26) as u8)).collect() };
        let mut body = |user: u64, mail: u64| {
            let head = "Dear customer of the Example Savings Bank,\r\nyour statement of account is ready for you.\r\n";
            let foot = "Kind regards\r\nExample Savings Bank, 1 Market Square, Exampletown. Do not reply to this.\r\n";
            let own: Vec<String> = (0..30).map(|_| word()).collect();
            format!("{head}{} {user}-{mail}\r\n{}{foot}", own.join(" "), extra(user)).into_bytes()
        };
        let mails = (0..users).flat_map(|user| (0..6).map(move |mail| (user, mail)));
        mails.map(|(user, mail)| Sample { account: user, parts: [Vec::new(), Vec::new(), body(user, mail)] }).collect()
    }

    fn has(dictionary: &Dictionary, text: &str) -> bool {
        memchr::memmem::find(dictionary.bytes(), text.as_bytes()).is_some()
    }

    #[test]
    fn what_all_have_received_is_learnt_and_what_one_has_is_not() {
        // One user receives the same private line again and again, and three users another.
        let extra = |user| match user {
            5 => format!("{SECRET}\r\n").repeat(20),
            7..=9 => "our meeting point is below the old bridge\r\n".repeat(20),
            _ => String::new(),
        };
        let set = train(samples(40, extra), &config(), 3, 0x1234_5678_9abc_def0).expect("there is much in common");
        let dictionary = set.of_kind(DictionaryKind::Body).expect("bodies were trained on");
        assert_eq!((set.generation(), set.iter().count()), (3, 1));
        assert!(has(dictionary, "statement of account") && has(dictionary, "Market Square"));
        for private in [SECRET, "our meeting point is below the old bridge"] {
            for window in private.as_bytes().windows(WINDOW) {
                let window = std::str::from_utf8(window).expect("ASCII");
                assert!(!has(dictionary, window), "{window}");
            }
        }
    }

    /// Two runs that many have received do not make what one has received common where they meet.
    #[test]
    fn what_bridges_common_runs_is_not_kept() {
        let letter = |first: &str, last: &str, code: u32| {
            let code = format!("Your code is {code}.\r\nThank you, 7777 7777 7777\r\n");
            format!("Newsletter of the club\r\n\r\nDear {first} {last},\r\n\r\n{code}it goes on.").into_bytes()
        };
        let name = |start: &str, number: u32| format!("{start}{}", char::from(b'a' + number as u8));
        let annas = (0..9).map(|number| letter("Anna", &name("Q", number), 4800 + number));
        let schmidts = (0..9).map(|number| letter(&name("Vw", number), "Schmidt", number * 100 + 15));
        let letters: Vec<Vec<u8>> = annas.chain(schmidts).chain([letter("Anna", "Schmidt", 4815)]).collect();
        let parts: Vec<(u64, &[u8])> = (0..).zip(letters.iter().map(|letter| &letter[..])).collect();
        let common = CommonWindows::of(&parts, 8, 77);
        let (mut random, mut kept) = (5, 0);
        for (_, part) in parts {
            let anonymous = common.anonymous(part, &mut random);
            assert_eq!(anonymous.len(), part.len());
            for (at, hash) in windows(part, 77).enumerate() {
                let (before, after) = (&part[at..at + WINDOW], &anonymous[at..at + WINDOW]);
                let is_common = common.counts.contains_key(&hash);
                assert!(before != after || is_common, "{:?}", String::from_utf8_lossy(before));
                kept += usize::from(before == after);
            }
        }
        assert!(kept > 19 * 20, "only {kept} windows are kept");
    }

    #[test]
    fn nothing_is_learnt_where_users_are_few_or_have_nothing_in_common() {
        assert!(train(samples(7, |_| String::new()), &config(), 1, 9).is_none_or(|set| {
            let dictionary = set.of_kind(DictionaryKind::Body).expect("of bodies");
            !has(dictionary, "Savings Bank")
        }));
        let mut random = 3;
        let mut noise = |user| {
            let body = (0..2000).map(|_| next_below(&mut random, 256) as u8).collect();
            Sample { account: user, parts: [Vec::new(), Vec::new(), body] }
        };
        assert_eq!(train((0..100).map(&mut noise).collect(), &config(), 1, 9), None);
        assert_eq!(train(Vec::new(), &config(), 1, 9), None);
    }

    #[test]
    fn a_dictionary_saves_much_of_mail_like_that_it_was_trained_on() {
        let set = train(samples(40, |_| String::new()), &config(), 1, 11).expect("there is much in common");
        let mut packer = Packer::default();
        packer.use_dictionaries(Some(Arc::new(set)));
        let (mut with, mut without) = (0, 0);
        for sample in samples(10, |user| format!("number {user}")) {
            let mut out = Vec::new();
            without += packer.pack(&sample.parts[2], &mut out).stored_len;
            with += packer.pack_as(DictionaryKind::Body, &sample.parts[2], &mut out).stored_len;
        }
        assert!(with * 4 < without * 3, "{with} octets with, {without} without");
    }

    #[test]
    fn the_same_samples_and_key_give_the_same_dictionaries() {
        let train = |key| train(samples(40, |_| String::new()), &config(), 1, key);
        assert_eq!(train(5), train(5));
    }
}
