//! Small values by ascending 64-bit keys, as a handful of bytes each: what stays in memory of what nobody uses.
//!
//! Entries stand one after another in chunks of some kilobytes, each as the distance from the key before, a length, and the
//! value. A lookup goes through one chunk; a change writes one anew.

use std::collections::BTreeMap;

/// A chunk that would grow past this is divided.
const CHUNK_BYTES_MAX: usize = 2048;

#[derive(Debug, Default)]
pub(crate) struct Packed {
    /// By the first key that each has had; later ones may be gone.
    chunks: BTreeMap<u64, Box<[u8]>>,
    len: usize,
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

fn chunk_of(first: u64, entries: &[(u64, &[u8])]) -> Box<[u8]> {
    let mut bytes = Vec::with_capacity(CHUNK_BYTES_MAX);
    let mut before = first;
    for (key, value) in entries {
        put_number(key - before, &mut bytes);
        put_number(value.len() as u64, &mut bytes);
        bytes.extend_from_slice(value);
        before = *key;
    }
    bytes.into()
}

impl Packed {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn get(&self, key: u64) -> Option<&[u8]> {
        let (&first, chunk) = self.chunks.range(..=key).next_back()?;
        let found = Entries::of(first, chunk).find(|(at, _)| *at >= key);
        found.filter(|(at, _)| *at == key).map(|(_, value)| value)
    }

    /// Puts a value in place of the one there may be.
    pub fn put(&mut self, key: u64, value: &[u8]) {
        let Some((&first, chunk)) = self.chunks.range(..=key).next_back() else {
            self.chunks.insert(key, chunk_of(key, &[(key, value)]));
            self.len += 1;
            return;
        };
        let mut entries: Vec<(u64, &[u8])> = Entries::of(first, chunk).collect();
        let place = entries.partition_point(|(at, _)| *at < key);
        let is_new = entries.get(place).is_none_or(|(at, _)| *at != key);
        if is_new {
            entries.insert(place, (key, value));
        } else {
            entries[place].1 = value;
        }
        let bytes: usize = entries.iter().map(|(_, value)| value.len() + 3).sum();
        let divided = if bytes <= CHUNK_BYTES_MAX || entries.len() == 1 {
            entries.len()
        } else if is_new && place + 1 == entries.len() {
            // Keys that ascend leave full chunks behind.
            place
        } else {
            entries.len() / 2
        };
        let (left, right) = entries.split_at(divided);
        let right = right.first().map(|&(first, _)| (first, chunk_of(first, right)));
        let left = chunk_of(first, left);
        self.chunks.insert(first, left);
        self.chunks.extend(right);
        self.len += usize::from(is_new);
    }

    /// Whether it was there.
    pub fn remove(&mut self, key: u64) -> bool {
        let Some((&first, chunk)) = self.chunks.range(..=key).next_back() else { return false };
        let entries: Vec<(u64, &[u8])> = Entries::of(first, chunk).collect();
        let left: Vec<(u64, &[u8])> = entries.iter().copied().filter(|(at, _)| *at != key).collect();
        if left.len() == entries.len() {
            return false;
        }
        let left = (!left.is_empty()).then(|| chunk_of(first, &left));
        match left {
            Some(left) => _ = self.chunks.insert(first, left),
            None => _ = self.chunks.remove(&first),
        }
        self.len -= 1;
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
        self.chunks.values().map(|chunk| chunk.len() + 40).sum()
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
                prop_assert_eq!(packed.len(), model.len());
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
        assert!(packed.memory_bytes() < 10_000 * 44, "{} bytes", packed.memory_bytes());
    }
}
