use super::*;
use proptest::prelude::*;

fn archived(message: &str) -> DigestBytes {
    let (bytes, whole) = Digest::of(message.as_bytes()).archives();
    assert!(whole.is_none());
    DigestBytes::from_aligned(bytes).expect("valid")
}

fn string(digest: &ArchivedDigest, text: &ArchivedText) -> Option<String> {
    digest.text(text).map(|t| String::from_utf8_lossy(t).into_owned())
}

const MESSAGE: &str = "Date: Wed, 17 Jul 1996 02:23:25 -0700\r\nFrom: Terry Gray <gray@cac.washington.edu>\r\n\
    Subject: IMAP4rev1 WG mtg\r\n summary\r\nTo: imap@cac.washington.edu, g: a@b;\r\n\
    Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain; charset=utf-8\r\n\
    Content-Transfer-Encoding: quoted-printable\r\n\r\nHello =\r\nworld\r\n--b\r\nContent-Type: message/rfc822\r\n\r\n\
    Subject: inner\r\nContent-Type: multipart/alternative; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c\r\n\
    Content-Disposition: attachment; filename=\"f (1)\"\r\n\r\ny\r\n--c--\r\n--b\r\nContent-Type: message/rfc822\r\n\r\n\
    Subject: plain inner\r\n\r\nin\r\n--b--\r\n";

#[test]
fn envelope_and_preview() {
    let bytes = archived(MESSAGE);
    let digest = bytes.digest().unwrap();
    let envelope = digest.envelope().unwrap();
    assert_eq!(string(digest, &envelope.subject).as_deref(), Some("IMAP4rev1 WG mtg summary"));
    assert_eq!(string(digest, &envelope.message_id), None);
    let names: Vec<_> =
        digest.addresses(&envelope.to).iter().map(|a| (string(digest, &a.mailbox), string(digest, &a.host))).collect();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(
        names,
        [(some("imap"), some("cac.washington.edu")), (some("g"), None), (some("a"), some("b")), (None, None)]
    );
    let sender = &digest.addresses(&envelope.sender)[0];
    assert_eq!(string(digest, &sender.mailbox).as_deref(), Some("gray"), "as From");
    assert_eq!(digest.preview(), "Hello world");
    assert_eq!(digest.sent_date().map(|date| (date.unix_seconds, date.local_day)), Some((837_595_405, 9694)));
}

#[test]
fn part_numbers() {
    let bytes = archived(MESSAGE);
    let digest = bytes.digest().unwrap();
    let body = |numbers: &[u32]| {
        digest.part(numbers).map(|(_, p)| &MESSAGE[p.body_range().start as usize..p.body_range().end as usize])
    };
    assert_eq!(body(&[1]), Some("Hello =\r\nworld"));
    assert_eq!(body(&[2, 1]), Some("x"));
    assert_eq!(body(&[2, 2]), Some("y"));
    assert_eq!(body(&[3]), Some("Subject: plain inner\r\n\r\nin"));
    assert_eq!(body(&[3, 1]), Some("in"));
    for missing in [&[0][..], &[4], &[1, 1], &[2, 3], &[3, 2], &[2, 1, 1], &[3, 1, 1]] {
        assert_eq!(body(missing), None, "{missing:?}");
    }
    let header = |numbers: &[u32]| {
        digest.message_in(numbers).map(|p| &MESSAGE[p.header_range().start as usize..p.header_range().end as usize])
    };
    assert_eq!(header(&[3]), Some("Subject: plain inner\r\n\r\n"));
    assert!(header(&[]).unwrap().ends_with("boundary=b\r\n\r\n"));
    assert_eq!(header(&[1]), None);
    let plain = archived("A: b\r\n\r\nbody");
    let plain = plain.digest().unwrap();
    assert_eq!(plain.part(&[1]).unwrap().1.body_range(), 8..12);
    assert!(plain.part(&[2]).is_none() && plain.part(&[1, 1]).is_none());
}

/// RULES 11: at most 64 KB, with a mark, whatever the message.
#[test]
fn large_digests_are_reduced() {
    let many = format!(
        "To: {}\r\nSubject: {}\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n{}",
        "\"Some Name\" <a@b.example>, ".repeat(3000),
        "s".repeat(100_000),
        "--b\r\n\r\nx\r\n".repeat(3000)
    );
    let (small, whole) = Digest::of(many.as_bytes()).archives();
    assert!(small.len() <= ARCHIVE_BYTES_MAX, "{}", small.len());
    let small = DigestBytes::from_aligned(small).unwrap();
    let small = small.digest().unwrap();
    assert!(small.overflow && small.parts().len() == 1);
    assert_eq!(small.addresses(&small.envelope().unwrap().to).len(), 100);
    let whole = DigestBytes::from_storage(&whole.unwrap()).unwrap();
    assert_eq!(whole.digest().unwrap().parts().len(), 3001);
}

#[test]
fn damage_is_an_error() {
    let bytes = archived(MESSAGE);
    let len = bytes.as_bytes().len();
    assert!(matches!(DigestBytes::from_storage(&bytes.as_bytes()[..len - 1]), Err(DigestError::Damaged(_))));
    assert!(matches!(DigestBytes::from_storage(b""), Err(DigestError::Damaged(_))));
}

proptest! {
    /// Whatever bytes pass the check, reading them never panics.
    #[test]
    fn damaged_archives_never_panic(position in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut bytes = archived(MESSAGE).as_bytes().to_vec();
        let position = position.index(bytes.len());
        bytes[position] = value;
        if let Ok(bytes) = DigestBytes::from_storage(&bytes) && let Some(digest) = bytes.digest() {
            for (index, part) in digest.parts().iter().enumerate() {
                digest.children(index).count();
                digest.envelope_of(part);
                digest.parameters(&part.parameters);
                digest.text(&part.subtype);
            }
            digest.part(&[2, 1]);
            digest.preview();
        }
    }

    #[test]
    fn random_messages_never_panic(pieces in prop::collection::vec(prop::sample::select(vec![
        "Content-Type: multipart/mixed; boundary=b\r\n", "Content-Type: message/rfc822\r\n", "--b\r\n", "--b--\r\n", "\r\n",
        "From: a <b@c>\r\n", "To: x:;\r\n", "Content-Type: text/html\r\n", "Content-Type: /;;=\r\n", "Content-Disposition: ;\r\n",
        "text\r\n", "\u{e9}", "Content-Transfer-Encoding: base64\r\n"]), 0..30)) {
        let message = pieces.concat();
        let bytes = archived(&message);
        prop_assert_eq!(bytes.digest().unwrap().message_bytes.to_native() as usize, message.len());
    }
}
