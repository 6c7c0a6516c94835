//! Messages: any octets have a structure, whose parts lie within them, and an ENVELOPE and BODYSTRUCTURE without 8-bit text or
//! bare line ends; a search ends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posthaste_imap::response::{write_body, write_body_structure, write_envelope};
use posthaste_imap::section::header_fields;
use posthaste_mime::digest::DigestBytes;
use posthaste_mime::search::{Buffers, Place, Progress, Query, Scan, Stretches};
use posthaste_mime::{Digest, words};

/// What stands outside literals is TEXT-CHAR (RFC 3501, 9): ASCII without NUL and line ends.
fn check_response(response: &[u8]) {
    let mut rest = response;
    while let Some(&byte) = rest.first() {
        if byte == b'{'
            && let Some(end) = rest.iter().position(|&b| b == b'}')
            && let Some(len) = std::str::from_utf8(&rest[1..end]).ok().and_then(|digits| digits.parse::<usize>().ok())
            && rest[end..].starts_with(b"}\r\n")
        {
            rest = &rest[end + 3 + len..];
            continue;
        }
        assert!(byte != 0 && byte < 0x80 && !b"\r\n".contains(&byte), "octet {byte} in {}", String::from_utf8_lossy(response));
        rest = &rest[1..];
    }
}

fuzz_target!(|message: &[u8]| {
    let digest = Digest::of(message);
    let (small, whole) = digest.archives();
    for archive in std::iter::once(small).chain(whole) {
        let again = DigestBytes::from_storage(&archive).expect("what was archived");
        assert_eq!(again.as_bytes(), &archive[..]);
        let digest = again.digest().expect("an archive");
        for part in digest.parts() {
            assert!(part.header_range().end <= message.len() as u64 && part.body_range().end <= message.len() as u64);
        }
        for write in [write_envelope, write_body, write_body_structure] {
            let mut out = Vec::new();
            write(&mut out, digest, false);
            check_response(&out);
        }
    }
    let names = ["subject".to_owned(), "from".to_owned()];
    header_fields(message, &names, false);
    let mut text = String::new();
    words::push_decoded(&mut text, message);
    words::decoded_parameters(message);

    let query = Query::new([
        (Place::Body, "a".to_owned()),
        (Place::Text, "Ω".to_owned()),
        (Place::Field("subject".to_owned()), "x".to_owned()),
        (Place::Addresses("from".to_owned()), "@".to_owned()),
    ]);
    let found = |step: usize| {
        let header_len = message.windows(4).position(|w| w == b"\r\n\r\n").map_or(message.len(), |at| at + 4);
        let (header, body) = message.split_at(header_len);
        let stretches = Stretches::of_message(message);
        let mut scan = Scan::new(&query, Buffers::default());
        let mut progress = Progress::default();
        let mut steps = 0;
        while scan.step_header(header, &mut progress, step) {
            steps += 1;
            assert!(steps <= message.len() + 16, "a step that goes nowhere");
        }
        let mut progress = Progress::default();
        while scan.step_body([header, body], &stretches, &mut progress, step) {
            steps += 1;
            assert!(steps <= 20 * message.len() + 200, "a step that goes nowhere");
        }
        (0..query.len()).map(|number| scan.found(number)).collect::<Vec<_>>()
    };
    assert_eq!(found(7), found(1 << 20), "the answer depends on the steps");
});
