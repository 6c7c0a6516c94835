//! What the store reads back: no octets, whatever their checksums say, panic, take memory out of proportion, or come back as
//! something else than they were written.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use posthaste_engine::format::batch::{BatchHeader, decode_touches};
use posthaste_engine::format::checksum;
use posthaste_engine::format::dictionary::{Dictionary, DictionaryKind};
use posthaste_engine::format::frame::{FrameInfo, Unpacker, codec_id};
use posthaste_engine::format::manifest::Manifest;
use posthaste_engine::format::page::open_directory_page;
use posthaste_engine::format::record::{Record, RecordHeader};
use posthaste_engine::format::segment::{SegmentHeader, Trailer};
use posthaste_engine::ids::{Epoch, Position};
use posthaste_engine::messages::Messages;
use posthaste_mime::digest::DigestBytes;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    match kind % 32 {
        20 => drop(BatchHeader::decode(data, Position::default(), Epoch::default())),
        21 => drop(decode_touches(data)),
        22 => drop(Manifest::from_bytes(data)),
        23 => drop(open_directory_page(data, &mut Unpacker::default())),
        24 => drop(RecordHeader::decode(data)),
        25 => drop(SegmentHeader::decode_some(data)),
        26 => drop(Trailer::decode(data, data.len() as u64)),
        27 => drop(DigestBytes::from_storage(data).map(|bytes| bytes.digest().map(|digest| digest.parts().len()))),
        28 => drop(Record::decode(0x8010, data)),
        29 => unpack(data),
        30 => {
            if let Ok(messages) = Messages::decode(data) {
                assert_eq!(messages.iter().count(), messages.len());
                assert!(Messages::decode(&messages.encode()) == Ok(messages));
            }
        }
        kind => {
            if let Ok(Some(record)) = Record::decode(kind.into(), data) {
                let mut payload = Vec::new();
                record.put_payload(&mut payload);
                let again = Record::decode(kind.into(), &payload).expect("what was written").expect("a known kind");
                assert_eq!(format!("{again:?}"), format!("{record:?}"));
            }
        }
    }
});

/// A frame and the dictionary that it names, both with good checksums.
fn unpack(data: &[u8]) {
    let Some((lengths, data)) = data.split_at_checked(4) else { return };
    let (dictionary, stored) = data.split_at(data.len().min(usize::from(lengths[0]) * 16));
    let dictionary = Arc::new(Dictionary::new(DictionaryKind::Body, 1, dictionary.to_vec()));
    let info = FrameInfo {
        codec: codec_id::ZSTD_DICTIONARY,
        dictionary: dictionary.id,
        stored_len: stored.len() as u32,
        raw_len: u32::from(u16::from_le_bytes([lengths[1], lengths[2]])),
        checksum: checksum(stored),
    };
    let (mut unpacker, mut out) = (Unpacker::default(), vec![1]);
    unpacker.add_dictionary(dictionary);
    let unpacked = info.unpack("frame", stored, &mut unpacker, &mut out);
    assert_eq!(out.len(), 1 + unpacked.map_or(0, |()| info.raw_len as usize));
}
