//! What the store reads back: no octets, whatever their checksums say, panic, take memory out of proportion, or come back as
//! something else than they were written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posthaste_engine::format::batch::{BatchHeader, decode_touches};
use posthaste_engine::format::frame::Unpacker;
use posthaste_engine::format::manifest::Manifest;
use posthaste_engine::format::page::open_page_at;
use posthaste_engine::format::record::{Record, RecordHeader};
use posthaste_engine::format::segment::{SegmentHeader, Trailer};
use posthaste_engine::ids::{Epoch, Position};
use posthaste_mime::digest::DigestBytes;

fuzz_target!(|data: &[u8]| {
    let Some((&kind, data)) = data.split_first() else { return };
    match kind % 32 {
        20 => drop(BatchHeader::decode(data, Position::default(), Epoch::default())),
        21 => drop(decode_touches(data)),
        22 => drop(Manifest::from_bytes(data)),
        23 => drop(open_page_at(data, &mut Unpacker::default())),
        24 => drop(RecordHeader::decode(data)),
        25 => drop(SegmentHeader::decode(data)),
        26 => drop(Trailer::decode(data, data.len() as u64)),
        27 => drop(DigestBytes::from_storage(data).map(|bytes| bytes.digest().map(|digest| digest.parts().len()))),
        28 => drop(Record::decode(0x8010, data)),
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
