//! Small values by ascending 64-bit keys, as a handful of bytes each: what stays in memory of what nobody uses.
//!
//! Entries stand one after another in chunks of some kilobytes, each as the distance from the key before, a length, and the
//! value. A lookup goes through one chunk; a change writes one anew.

use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Deref;

/// A chunk that would grow past this is divided.
const CHUNK_BYTES_MAX: usize = 1024;

#[derive(Debug, Default)]
pub(crate) struct Packed {
    /// By the first key that each has had, which may be gone.
    chunks: BTreeMap<u64, Vec<u8>>,
    /// The greatest key.
    last: Option<u64>,
}

/// Appends a number in groups of seven bits, the least significant first.
pub(crate) fn put_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends the distance of a number from another, which may be the greater one.
pub(crate) fn put_distance(number: u64, from: u64, out: &mut Vec<u8>) {
    let distance = number.wrapping_sub(from).cast_signed();
    put_number((distance << 1 ^ distance >> 63).cast_unsigned(), out);
}

/// Takes apart what this module's functions have put together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn number(&mut self) -> u64 {
        let (mut number, mut shift) = (0, 0);
        loop {
            let (&byte, rest) = self.0.split_first().expect("packed values are whole");
            self.0 = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return number;
            }
            shift += 7;
        }
    }

    /// A number that was put as 32 bits or fewer.
    pub fn small(&mut self) -> u32 {
        self.number() as u32
    }

    pub fn distance(&mut self, from: u64) -> u64 {
        let folded = self.number();
        from.wrapping_add(folded >> 1 ^ (folded & 1).wrapping_neg())
    }

    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    pub fn text(&mut self) -> &'a str {
        let len = self.number() as usize;
        str::from_utf8(self.bytes(len)).expect("packed from a string")
    }
}

pub(crate) fn put_text(text: &str, out: &mut Vec<u8>) {
    put_number(text.len() as u64, out);
    out.extend_from_slice(text.as_bytes());
}

/// The entries of a chunk.
struct Entries<'a> {
    key: u64,
    rest: Reader<'a>,
}

impl<'a> Entries<'a> {
    fn of(first: u64, chunk: &'a [u8]) -> Self {
        Self { key: first, rest: Reader(chunk) }
    }
}

/// Appends entries that come after `key`, the first of which is told its distance from `before`.
fn put_rest(key: u64, before: u64, entries: &[u8], out: &mut Vec<u8>) {
    if !entries.is_empty() {
        let mut rest = Reader(entries);
        let next = before + rest.number();
        put_number(next - key, out);
        out.extend_from_slice(rest.0);
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.0.is_empty() {
            return None;
        }
        self.key += self.rest.number();
        let len = self.rest.number() as usize;
        Some((self.key, self.rest.bytes(len)))
    }
}

fn put_entry(distance: u64, value: &[u8], out: &mut Vec<u8>) {
    put_number(distance, out);
    put_number(value.len() as u64, out);
    out.extend_from_slice(value);
}

/// Where a key stands in a chunk, or would.
struct Place {
    /// The key before it, or the chunk's first.
    before: u64,
    start: usize,
    /// Of the entry, if it is there.
    end: Option<usize>,
}

impl Place {
    fn of(key: u64, first: u64, chunk: &[u8]) -> Self {
        let mut entries = Entries::of(first, chunk);
        loop {
            let (before, start) = (entries.key, chunk.len() - entries.rest.0.len());
            match entries.next() {
                Some((at, _)) if at < key => {}
                Some((at, _)) if at == key => {
                    return Self { before, start, end: Some(chunk.len() - entries.rest.0.len()) };
                }
                _ => return Self { before, start, end: None },
            }
        }
    }
}

impl Packed {
    /// The chunk where a key is, if it is anywhere.
    fn chunk(&self, key: u64) -> Option<(u64, &[u8])> {
        self.chunks.range(..=key).next_back().map(|(&first, chunk)| (first, &chunk[..]))
    }

    pub fn get(&self, key: u64) -> Option<&[u8]> {
        if self.last.is_none_or(|last| key > last) {
            return None;
        }
        let (first, chunk) = self.chunk(key)?;
        let found = Entries::of(first, chunk).find(|(at, _)| *at >= key);
        found.filter(|(at, _)| *at == key).map(|(_, value)| value)
    }

    /// Puts a value in place of the one there may be.
    pub fn put(&mut self, key: u64, value: &[u8]) {
        if self.last.is_none_or(|last| key > last) {
            self.append(key, value);
            return;
        }
        let Some((first, chunk)) = self.chunk(key) else {
            let mut chunk = Vec::with_capacity(value.len() + 3);
            put_entry(0, value, &mut chunk);
            self.chunks.insert(key, chunk);
            return;
        };
        let place = Place::of(key, first, chunk);
        let mut changed = Vec::with_capacity(chunk.len() + value.len() + 12);
        changed.extend_from_slice(&chunk[..place.start]);
        put_entry(key - place.before, value, &mut changed);
        match place.end {
            Some(end) => changed.extend_from_slice(&chunk[end..]),
            None => put_rest(key, place.before, &chunk[place.start..], &mut changed),
        }
        self.put_chunk(first, changed);
    }

    /// Puts an entry after all others. Keys that ascend leave full chunks behind.
    fn append(&mut self, key: u64, value: &[u8]) {
        let newest = self.chunks.last_entry().filter(|newest| newest.get().len() + value.len() < CHUNK_BYTES_MAX);
        match (newest, self.last) {
            (Some(mut newest), Some(last)) => put_entry(key - last, value, newest.get_mut()),
            _ => {
                if let Some(mut full) = self.chunks.last_entry() {
                    full.get_mut().shrink_to_fit();
                }
                let mut chunk = Vec::new();
                put_entry(0, value, &mut chunk);
                self.chunks.insert(key, chunk);
            }
        }
        self.last = Some(key);
    }

    /// Puts a chunk in place of what it was, or two, if it is too large by now.
    fn put_chunk(&mut self, first: u64, mut chunk: Vec<u8>) {
        if chunk.len() > CHUNK_BYTES_MAX {
            let mut entries = Entries::of(first, &chunk);
            let end_of = |entries: &Entries<'_>| chunk.len() - entries.rest.0.len();
            entries.next();
            let (mut before, mut middle) = (entries.key, end_of(&entries));
            // Before the entry that reaches over the middle, which may be as large as all others; after the first at least.
            let mut upper_key = None;
            while let Some((key, _)) = entries.next() {
                upper_key = Some(key);
                let end = end_of(&entries);
                if end > chunk.len() / 2 {
                    break;
                }
                (before, middle) = (key, end);
            }
            if let Some(key) = upper_key {
                let mut upper = Vec::with_capacity(chunk.len() - middle);
                put_rest(key, before, &chunk[middle..], &mut upper);
                upper.shrink_to_fit();
                self.chunks.insert(key, upper);
                chunk.truncate(middle);
            }
        }
        chunk.shrink_to_fit();
        self.chunks.insert(first, chunk);
    }

    /// Whether it was there.
    pub fn remove(&mut self, key: u64) -> bool {
        let Some((first, chunk)) = self.chunk(key) else { return false };
        let place = Place::of(key, first, chunk);
        let Some(end) = place.end else { return false };
        let mut changed = Vec::with_capacity(chunk.len());
        changed.extend_from_slice(&chunk[..place.start]);
        put_rest(place.before, key, &chunk[end..], &mut changed);
        if changed.is_empty() {
            self.chunks.remove(&first);
        } else {
            changed.shrink_to_fit();
            self.chunks.insert(first, changed);
        }
        if self.last == Some(key) {
            let newest = self.chunks.last_key_value();
            self.last = newest.and_then(|(&first, chunk)| Entries::of(first, chunk).last()).map(|(key, _)| key);
        }
        true
    }

    /// Entries from a key on, ascending.
    pub fn iter_from(&self, from: u64) -> impl Iterator<Item = (u64, &[u8])> {
        let first = self.chunks.range(..=from).next_back().map_or(from, |(&first, _)| first);
        let chunks = self.chunks.range(first..);
        chunks.flat_map(|(&first, chunk)| Entries::of(first, chunk)).skip_while(move |(key, _)| *key < from)
    }

    /// The memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        self.chunks.values().map(|chunk| chunk.capacity() + 48).sum()
    }
}

/// Something to look at: as it is in memory, or unpacked for the purpose.
pub enum Look<'a, T> {
    InUse(&'a T),
    Unpacked(Box<T>),
}

impl<T> Deref for Look<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::InUse(value) => value,
            Self::Unpacked(value) => value,
        }
    }
}

/// Two ascending sequences as one; the first has the newer of what both have.
pub(crate) struct Merged<A: Iterator, B: Iterator> {
    in_use: Peekable<A>,
    at_rest: Peekable<B>,
}

impl<A: Iterator, B: Iterator> Merged<A, B> {
    pub fn of(in_use: A, at_rest: B) -> Self {
        Self { in_use: in_use.peekable(), at_rest: at_rest.peekable() }
    }
}

impl<K: Ord, V, A: Iterator<Item = (K, V)>, B: Iterator<Item = (K, V)>> Iterator for Merged<A, B> {
    type Item = (K, V);

    fn next(&mut self) -> Option<(K, V)> {
        let Some((older, _)) = self.at_rest.peek() else { return self.in_use.next() };
        let Some((newer, _)) = self.in_use.peek() else { return self.at_rest.next() };
        match newer.cmp(older) {
            std::cmp::Ordering::Greater => return self.at_rest.next(),
            std::cmp::Ordering::Equal => _ = self.at_rest.next(),
            std::cmp::Ordering::Less => {}
        }
        self.in_use.next()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn packed_is_a_map(steps in prop::collection::vec((0..400_u64, 0..5_u8, 0..300_usize), 1..600), from in 0..500_u64) {
            let mut packed = Packed::default();
            let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
            for (key, kind, len) in steps {
                // Close together and far apart.
                let key = if key % 2 == 0 { key } else { key << 40 };
                if kind == 0 {
                    prop_assert_eq!(packed.remove(key), model.remove(&key).is_some());
                } else {
                    let value = vec![kind; len];
                    packed.put(key, &value);
                    model.insert(key, value);
                }
                prop_assert_eq!(packed.get(key), model.get(&key).map(Vec::as_slice));
            }
            let found: Vec<_> = packed.iter_from(from).map(|(key, value)| (key, value.to_vec())).collect();
            let expected: Vec<_> = model.range(from..).map(|(key, value)| (*key, value.clone())).collect();
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn numbers_come_back(numbers in prop::collection::vec(any::<(u64, u64)>(), 1..50)) {
            let mut bytes = Vec::new();
            for &(number, from) in &numbers {
                put_number(number, &mut bytes);
                put_distance(number, from, &mut bytes);
            }
            let mut reader = Reader(&bytes);
            for (number, from) in numbers {
                prop_assert_eq!(reader.number(), number);
                prop_assert_eq!(reader.distance(from), number);
            }
            prop_assert!(reader.0.is_empty());
        }
    }

    #[test]
    fn ascending_keys_fill_chunks() {
        let mut packed = Packed::default();
        (0..10_000).for_each(|key| packed.put(key, &[7; 40]));
        assert!(packed.memory_bytes() < 10_000 * 45, "{} bytes", packed.memory_bytes());
    }
}
