//! What a session knows of its maildrop: UIDs and sizes, fixed when it began (RFC 1939, 4), in some three bytes a message.
//!
//! Messages lie in groups; a group begins at a known place, and in it each message is two varints: by how much its UID
//! exceeds the one before, and its size. So a number is found in one short walk, and all of them are listed in one long one.

use std::fmt::Write;

/// Messages of one group.
const GROUP: u32 = 64;

/// A message of a maildrop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub uid: u32,
    /// As it is sent: dots once, and with the end of its last line.
    pub octets: u64,
}

#[derive(Debug, Clone, Copy)]
struct Group {
    /// Where it begins in the bytes.
    start: u32,
    /// The UID that the first of it exceeds.
    uid_before: u32,
}

/// The messages of a maildrop by their numbers, which begin at 1.
#[derive(Debug, Default)]
pub struct Maildrop {
    uid_validity: u32,
    count: u32,
    octets: u64,
    last_uid: u32,
    groups: Vec<Group>,
    bytes: Vec<u8>,
}

impl Maildrop {
    /// Appends a message, whose UID is above all before.
    pub fn push(&mut self, message: Message) {
        assert!(message.uid > self.last_uid, "UID {} after {}", message.uid, self.last_uid);
        if self.count.is_multiple_of(GROUP) {
            self.groups.push(Group { start: self.bytes.len() as u32, uid_before: self.last_uid });
        }
        put(&mut self.bytes, (message.uid - self.last_uid).into());
        put(&mut self.bytes, message.octets);
        self.last_uid = message.uid;
        self.count += 1;
        self.octets += message.octets;
    }

    /// The maildrop with all that was put into it. Gives back the room for more.
    pub fn complete(mut self, uid_validity: u32) -> Self {
        self.uid_validity = uid_validity;
        self.groups.shrink_to_fit();
        self.bytes.shrink_to_fit();
        self
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    pub fn octets(&self) -> u64 {
        self.octets
    }

    /// The message of a number.
    pub fn get(&self, number: u32) -> Option<Message> {
        self.iter_from(number).next().map(|(_, message)| message)
    }

    /// The messages from a number on, with their numbers. None if it is 0 or too large.
    pub fn iter_from(&self, number: u32) -> impl Iterator<Item = (u32, Message)> + '_ {
        let index = number.checked_sub(1).filter(|&index| index < self.count);
        let (first, skipped) = index.map_or((self.count, 0), |index| (index / GROUP * GROUP, index % GROUP));
        let group = self.groups.get((first / GROUP) as usize).filter(|_| index.is_some());
        let mut at = group.map_or(self.bytes.len(), |group| group.start as usize);
        let mut uid = group.map_or(0, |group| group.uid_before);
        let messages = (first..self.count).map(move |index| {
            uid += take(&self.bytes, &mut at) as u32;
            (index + 1, Message { uid, octets: take(&self.bytes, &mut at) })
        });
        messages.skip(skipped as usize)
    }

    /// The unique-id of a message (RFC 1939, 7, UIDL): its UID and the UIDVALIDITY of the mailbox, in hexadecimal. Neither
    /// ever changes for a message, and no two messages of a mailbox of one name ever have the same. Dovecot makes them so, too,
    /// unless told otherwise: whoever comes from there with UIDs and UIDVALIDITY does not download anything again.
    pub fn write_unique_id(&self, message: Message, out: &mut Vec<u8>) {
        let mut text = Text(out);
        // Appending to a vector does not fail.
        let _ = write!(text, "{:08x}{:08x}", message.uid, self.uid_validity);
    }

    /// The memory that it takes.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.groups.capacity() * size_of::<Group>() + self.bytes.capacity()
    }
}

struct Text<'a>(&'a mut Vec<u8>);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn put(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

fn take(bytes: &[u8], at: &mut usize) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[*at];
        *at += 1;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
        shift += 7;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn maildrop(messages: &[Message]) -> Maildrop {
        let mut maildrop = Maildrop::default();
        messages.iter().for_each(|&message| maildrop.push(message));
        maildrop.complete(7)
    }

    proptest! {
        #[test]
        fn messages_are_found_by_their_numbers(
            steps in proptest::collection::vec((1..5_u32, prop_oneof![0..70_000_u64, Just(u64::MAX >> 20)]), 0..300),
        ) {
            let mut uid = 0;
            let messages: Vec<Message> = steps
                .into_iter()
                .map(|(step, octets)| {
                    uid += step;
                    Message { uid, octets }
                })
                .collect();
            let maildrop = maildrop(&messages);
            prop_assert_eq!(maildrop.count() as usize, messages.len());
            prop_assert_eq!(maildrop.octets(), messages.iter().map(|message| message.octets).sum::<u64>());
            prop_assert_eq!(maildrop.get(0), None);
            for (number, message) in (1..).zip(&messages) {
                prop_assert_eq!(maildrop.get(number), Some(*message));
            }
            prop_assert_eq!(maildrop.get(messages.len() as u32 + 1), None);
            prop_assert_eq!(maildrop.get(u32::MAX), None);
            for from in [1, 2, 63, 64, 65, 128, 129, 300] {
                let expected = (1..).zip(messages.iter().copied()).skip(from as usize - 1);
                prop_assert!(maildrop.iter_from(from).eq(expected));
            }
        }
    }

    #[test]
    fn the_ends_of_the_ranges() {
        let messages = [Message { uid: 1, octets: u64::MAX >> 1 }, Message { uid: u32::MAX, octets: 0 }];
        let maildrop = maildrop(&messages);
        assert_eq!([maildrop.get(1), maildrop.get(2)], messages.map(Some));
    }

    #[test]
    fn trap_46_unique_ids_are_of_the_permitted_form() {
        let maildrop = maildrop(&[Message { uid: 10, octets: 1 }, Message { uid: u32::MAX, octets: 1 }]);
        let mut out = Vec::new();
        maildrop.iter_from(1).for_each(|(_, message)| maildrop.write_unique_id(message, &mut out));
        assert_eq!(String::from_utf8(out).unwrap(), "0000000a00000007ffffffff00000007");
    }

    /// A session that waits costs a few KB with a thousand messages.
    #[test]
    fn a_maildrop_takes_little_memory() {
        let messages: Vec<Message> =
            (1..=1000).map(|uid| Message { uid, octets: 3000 + u64::from(uid) * 37 % 90_000 }).collect();
        let bytes = maildrop(&messages).memory_bytes();
        assert!(bytes <= 4500, "{bytes}");
    }
}
