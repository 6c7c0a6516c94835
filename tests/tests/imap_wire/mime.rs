//! Messages at the bounds of what is looked into: what is said of them stays right, whole and quick.

use std::time::{Duration, Instant};

use posthaste_tests::imap_grammar::{Body, Item, parse_fetch};

use crate::wire::{Client, Running};

/// The items of the last message. A message that takes longer than a few seconds, in a debug build, does not take linear time.
fn fetch(client: &mut Client, items: &str) -> Vec<Item> {
    let start = Instant::now();
    let said = client.ok(format!("FETCH * ({items})"));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert_eq!(said.len(), 1);
    parse_fetch(said[0].as_bytes()).expect("it keeps to the syntax").1
}

fn structure(items: &[Item]) -> &Body {
    let found = items.iter().find_map(|item| if let Item::BodyStructure(body) = item { Some(body) } else { None });
    found.expect("a structure")
}

fn put(client: &mut Client, message: &str) {
    let start = Instant::now();
    assert!(client.append("INBOX", "", message).starts_with("OK "));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

/// Trap 33: 10,000 parts are all there, though their digest is too large to be stored.
#[test]
fn trap_33_ten_thousand_parts() {
    let running = Running::new();
    let mut client = running.select("INBOX");
    let parts: String = (1..=12_000).map(|number| format!("--b\r\nX: {number}\r\n\r\npart {number}\r\n")).collect();
    put(&mut client, &format!("Content-Type: multipart/mixed; boundary=b\r\n\r\n{parts}--b--\r\n"));
    let items = fetch(&mut client, "ENVELOPE BODYSTRUCTURE BODY.PEEK[9998] BODY.PEEK[9998.MIME] BODY.PEEK[10000]");
    assert_eq!(structure(&items).parts().len(), 9_999, "the message itself is one");
    assert!(items.contains(&Item::Section("9998".into(), Some(b"part 9998".to_vec()))));
    assert!(items.contains(&Item::Section("9998.MIME".into(), Some(b"X: 9998\r\n\r\n".to_vec()))));
    assert!(items.contains(&Item::Section("10000".into(), None)));
    assert_eq!(client.search("BODY \"part 11999\""), [1], "the text of further parts is that of the last one");
    running.stop();
}

/// Trap 33 and 34: what is nested deeper than 100 levels is not looked into.
#[test]
fn trap_33_a_hundred_levels() {
    let running = Running::new();
    let mut client = running.select("INBOX");
    put(&mut client, &format!("{}Subject: deepest\r\n\r\ntext", "Content-Type: message/rfc822\r\n\r\n".repeat(500)));
    let items = fetch(&mut client, "BODY BODYSTRUCTURE");
    let parts = structure(&items).parts();
    assert_eq!(parts.len(), 101, "a message that is one has one part more than levels");
    let deepest = &parts.last().expect("a part").number;
    let items = fetch(&mut client, &format!("BODY.PEEK[{}]", &deepest[2..]));
    assert!(matches!(&items[0], Item::Section(_, Some(text)) if text.ends_with(b"text")));
    let multiparts: String = (0..500)
        .map(|level| format!("Content-Type: multipart/mixed; boundary=b{level}\r\n\r\n--b{level}\r\n"))
        .collect();
    put(&mut client, &format!("{multiparts}\r\ntext"));
    let parts = structure(&fetch(&mut client, "BODYSTRUCTURE")).parts();
    assert_eq!(parts.len(), 100);
    put(&mut client, &"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n".repeat(1000));
    assert!(structure(&fetch(&mut client, "BODYSTRUCTURE")).parts().len() >= 100);
    running.stop();
}

/// Trap 33: a header of 10 MB, many addresses, many parameters.
#[test]
fn trap_33_large_headers() {
    let running = Running::new();
    let mut client = running.select("INBOX");
    let fields = "X-Filler: some text that goes on for a while, as those of filters do\r\n".repeat(150_000);
    put(&mut client, &format!("{fields}Subject: last\r\n\r\ntext"));
    let items = fetch(&mut client, "ENVELOPE BODY.PEEK[HEADER.FIELDS (SUBJECT)]");
    assert!(matches!(&items[0], Item::Envelope(envelope) if envelope.subject.as_deref() == Some(b"last")));
    assert_eq!(client.search("SUBJECT last"), [1]);
    let addresses = "=?utf-8?q?A=2C?= \"B\" <a@example.org>,\r\n ".repeat(20_000);
    put(&mut client, &format!("To: {addresses}\r\nCc: {}\r\n\r\n", "(".repeat(1_000_000)));
    let items = fetch(&mut client, "ENVELOPE");
    assert!(matches!(&items[0], Item::Envelope(envelope) if envelope.addresses[3].len() == 10_000));
    put(&mut client, &format!("Content-Type: text/plain{}\r\n\r\n", "; a*0*=''%41".repeat(100_000)));
    let items = fetch(&mut client, "BODYSTRUCTURE");
    assert!(matches!(structure(&items), Body::Single(single) if single.parameters.len() == 100));
    put(&mut client, &format!("Subject: {}\r\n\r\n", "=?utf-8?q?".repeat(200_000)));
    fetch(&mut client, "ENVELOPE");
    assert_eq!(client.search("SUBJECT nothing"), [0_u32; 0]);
    running.stop();
}
