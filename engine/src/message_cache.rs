//! Messages that were read shortly before, decompressed and verified: whole, or the header or the digest of each.
//!
//! One entry serves all recipients of a message: it holds what they share once, and the prefix of each. Whether a message
//! is still to be seen is for the index to say before anybody asks here; what lies in a record never changes, and a record
//! that has been moved is another one.
//!
//! Eviction resists scans: a client that reads its whole mailbox once does not displace what is read again and again.

use std::hash::{BuildHasherDefault, DefaultHasher};

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::unsync::{Cache, DefaultLifecycle};

use crate::format::message::MessageHead;
use crate::ids::{Location, MessageId};
use crate::index::Message;
use crate::read::{MessageBytes, Part};

/// Larger messages are not kept: reading them costs little beside sending them.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// What an entry takes beside its bytes.
const ENTRY_BYTES: usize = 160;
/// For the size of the history that says what was evicted too early.
const MESSAGE_BYTES_USUAL: usize = 8 << 10;

/// A message, or a part of one, as it lies in its record.
pub(crate) struct StoredPart {
    location: Location,
    part: Part,
    /// The prefixes in the order of the placements, header, body; or the digest.
    bytes: Bytes,
    prefix_ends: Box<[u32]>,
    header_octets: u32,
}

impl StoredPart {
    pub(crate) fn digest(location: Location, bytes: Bytes) -> Self {
        Self { location, part: Part::Digest, bytes, prefix_ends: Box::default(), header_octets: 0 }
    }

    /// A message, or what comes before its body.
    /// `prefixes` has the lengths of what `bytes` begins with, by placement.
    pub(crate) fn new(
        location: Location,
        part: Part,
        bytes: Bytes,
        prefixes: impl Iterator<Item = usize>,
        header: usize,
    ) -> Self {
        let mut end = 0;
        let ends = prefixes.map(|octets| {
            end += octets;
            end as u32
        });
        Self { location, part, bytes, prefix_ends: ends.collect(), header_octets: header as u32 }
    }

    /// What the recipient of a placement sees.
    pub(crate) fn of_placement(&self, placement: u16, part: Part) -> MessageBytes {
        if part == Part::Digest {
            return MessageBytes { digest: self.bytes.clone(), ..MessageBytes::default() };
        }
        let end_of = |number: usize| self.prefix_ends.get(number).map_or(0, |&end| end as usize);
        let number = usize::from(placement);
        let (start, end) = (number.checked_sub(1).map_or(0, end_of), end_of(number));
        let header = self.prefix_ends.last().map_or(0, |&end| end as usize);
        let body = header + self.header_octets as usize;
        let is_whole = part == Part::Whole;
        MessageBytes {
            prefix: self.bytes.slice(start..end.max(start)),
            header: self.bytes.slice(header..body),
            body: if is_whole { self.bytes.slice(body..) } else { Bytes::new() },
            rest: self.bytes.slice(header..if is_whole { self.bytes.len() } else { body }),
            digest: Bytes::new(),
        }
    }
}

struct WeighBytes;

impl Weighter<(MessageId, Part), StoredPart> for WeighBytes {
    fn weight(&self, _: &(MessageId, Part), message: &StoredPart) -> u64 {
        (ENTRY_BYTES + message.bytes.len() + message.prefix_ends.len() * size_of::<u32>()) as u64
    }
}

/// Hashed without a secret: nobody outside chooses the ids, and the same run evicts the same.
type Messages = Cache<(MessageId, Part), StoredPart, WeighBytes, BuildHasherDefault<DefaultHasher>>;

/// The cache of one shard.
pub(crate) struct MessageCache {
    /// `None`: off.
    messages: Option<Messages>,
    pub hits: u64,
    pub misses: u64,
}

impl MessageCache {
    pub(crate) fn new(bytes_max: usize) -> Self {
        let messages = (bytes_max > 0).then(|| {
            let usual = bytes_max.div_ceil(MESSAGE_BYTES_USUAL);
            Cache::with(usual, bytes_max as u64, WeighBytes, BuildHasherDefault::default(), DefaultLifecycle::default())
        });
        Self { messages, hits: 0, misses: 0 }
    }

    /// The message or its part, if it was read from the same record before.
    pub(crate) fn find(&mut self, message: &Message, part: Part) -> Option<MessageBytes> {
        let messages = self.messages.as_ref()?;
        let get = |kept| messages.get(&(message.id, kept)).filter(|cached| cached.location == message.location);
        let cached = get(part).or_else(|| if part == Part::Header { get(Part::Whole) } else { None });
        let found = cached.map(|cached| cached.of_placement(message.prefix_of, part));
        *(if found.is_some() { &mut self.hits } else { &mut self.misses }) += 1;
        found
    }

    /// Whether a message, or its header, would be kept with the prefixes of all its placements.
    pub(crate) fn takes(&self, head: &MessageHead, part: Part) -> bool {
        let Some(messages) = &self.messages else { return false };
        let prefixes: usize = head.placements.iter().map(|placement| placement.prefix.octets()).sum();
        let shared = if part == Part::Whole { head.rest_octets } else { head.header_octets.into() };
        let octets = shared.saturating_add(prefixes as u64);
        octets <= (MESSAGE_BYTES_MAX as u64).min(messages.capacity())
    }

    /// Keeps a message that has been verified.
    pub(crate) fn keep(&mut self, id: MessageId, message: StoredPart) {
        if let Some(messages) = &mut self.messages {
            messages.insert((id, message.part), message);
        }
    }

    /// What the entries take.
    pub(crate) fn bytes(&self) -> u64 {
        self.messages.as_ref().map_or(0, Cache::weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Lsn, ShardId, Uid};

    fn id(number: u64) -> MessageId {
        MessageId { origin: ShardId(0), lsn: Lsn(number) }
    }

    fn message(number: u64, prefix_of: u16) -> Message {
        Message { id: id(number), prefix_of, uid: Uid(1), ..Message::default() }
    }

    fn whole(octets: usize) -> StoredPart {
        let bytes = [&b"onetwo!"[..], b"head", &vec![b'b'; octets]].concat();
        StoredPart::new(Location::default(), Part::Whole, bytes.into(), [3, 0, 4].into_iter(), 4)
    }

    #[test]
    fn parts_are_kept_beside_each_other() {
        let mut cache = MessageCache::new(1 << 20);
        let header = |placement: usize| [&b"one"[..], b"", b"two!"][placement];
        let bytes = Bytes::from_static(b"onetwo!head");
        cache.keep(id(1), StoredPart::new(Location::default(), Part::Header, bytes, [3, 0, 4].into_iter(), 4));
        assert_eq!(cache.find(&message(1, 0), Part::Whole), None, "a header is not the message");
        assert_eq!(cache.find(&message(1, 0), Part::Digest), None);
        cache.keep(id(1), StoredPart::digest(Location::default(), Bytes::from_static(b"digest")));
        for placement in 0..3 {
            let found = cache.find(&message(1, placement), Part::Header).expect("it was kept");
            assert_eq!((&found.prefix[..], &found.header[..]), (header(placement.into()), &b"head"[..]));
            assert!(found.body.is_empty());
            assert_eq!(&cache.find(&message(1, placement), Part::Digest).expect("it was kept").digest[..], b"digest");
        }
        let moved = Message { location: Location { offset_units: 1, ..Location::default() }, ..message(1, 0) };
        assert_eq!(cache.find(&moved, Part::Digest), None);
        cache.keep(id(2), whole(5));
        assert_eq!(cache.find(&message(2, 0), Part::Digest), None, "a message is not its digest");
    }

    #[test]
    fn each_placement_has_its_prefix() {
        let mut cache = MessageCache::new(1 << 20);
        cache.keep(id(1), whole(5));
        for (placement, prefix) in [(0, "one"), (1, ""), (2, "two!"), (3, ""), (9, "")] {
            let found = cache.find(&message(1, placement), Part::Whole).expect("it was kept");
            assert_eq!((&found.prefix[..], &found.header[..]), (prefix.as_bytes(), &b"head"[..]));
            assert_eq!(&found.body[..], b"bbbbb");
        }
        let found = cache.find(&message(1, 2), Part::Whole).expect("it was kept");
        assert_eq!(&found.rest[..], b"headbbbbb");
        let found = cache.find(&message(1, 0), Part::Header).expect("it was kept");
        assert_eq!((&found.header[..], found.body.len(), &found.rest[..]), (&b"head"[..], 0, &b"head"[..]));
        assert_eq!((cache.hits, cache.misses), (7, 0));
    }

    #[test]
    fn another_record_of_a_message_is_a_miss() {
        let mut cache = MessageCache::new(1 << 20);
        cache.keep(id(1), whole(5));
        let moved = Message { location: Location { offset_units: 1, ..Location::default() }, ..message(1, 0) };
        assert_eq!(cache.find(&moved, Part::Whole), None);
        assert_eq!(cache.find(&message(2, 0), Part::Whole), None);
        assert_eq!((cache.hits, cache.misses), (0, 2));
    }

    #[test]
    fn the_bound_is_held_and_a_scan_leaves_what_is_used() {
        let mut cache = MessageCache::new(1 << 20);
        for number in 0..50 {
            cache.keep(id(number), whole(10_000));
        }
        for scanned in 1000..3000 {
            cache.keep(id(scanned), whole(10_000));
            assert!(cache.bytes() <= 1 << 20, "{}", cache.bytes());
            cache.find(&message(scanned % 50, 0), Part::Whole);
        }
        let left = (0..50).filter(|&number| cache.find(&message(number, 0), Part::Whole).is_some()).count();
        assert!(left >= 45, "{left} of 50 are left");
        cache.keep(id(9999), whole(2 << 20));
        assert!(cache.bytes() <= 1 << 20);
    }

    #[test]
    fn a_cache_of_nothing_keeps_nothing() {
        let mut cache = MessageCache::new(0);
        cache.keep(id(1), whole(5));
        assert_eq!(cache.find(&message(1, 0), Part::Whole), None);
        assert_eq!((cache.bytes(), cache.hits, cache.misses), (0, 0, 0));
    }
}
