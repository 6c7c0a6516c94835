//! Dictionaries for stores whose mail is invented too.

use std::sync::Arc;

use posthaste_engine::format::dictionary::{Dictionary, DictionaryKind, DictionarySet};

/// Dictionaries of one generation: lines as invented messages have them, longer than a block.
///
/// # Panics
/// Never: there is one of each kind.
pub fn invented(generation: u32) -> DictionarySet {
    let digests = b"digest bytes".repeat(4);
    let headers = format!("From: a@example.org\r\nSubject: message {generation}\r\n\r\n").repeat(4).into_bytes();
    let lines = (0..200).map(|line| format!("line {line} {}\r\n", line * 2_654_435_761_u64));
    let dictionaries = DictionaryKind::ALL.into_iter().zip([digests, headers, lines.collect::<String>().into_bytes()]);
    let dictionaries: Vec<Arc<Dictionary>> =
        dictionaries.map(|(kind, bytes)| Arc::new(Dictionary::new(kind, generation, bytes))).collect();
    DictionarySet::newest_of(&dictionaries).expect("three of them")
}
