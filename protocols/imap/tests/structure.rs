//! ENVELOPE, BODY and BODYSTRUCTURE as a strict client reads them: of random messages, and of real mail where a corpus of it
//! lies beside the checkout (`../shared/corpus`) or at `POSTHASTE_CORPUS`.

use std::path::{Path, PathBuf};

use posthaste_imap::response::{write_body, write_body_structure, write_envelope};
use posthaste_mime::Digest;
use posthaste_mime::digest::DigestBytes;
use proptest::prelude::*;

/// The three items of a message.
fn items(message: &[u8]) -> [Vec<u8>; 3] {
    let (small, whole) = Digest::of(message).archives();
    let bytes = DigestBytes::from_aligned(whole.unwrap_or(small)).expect("valid");
    let digest = bytes.digest().expect("valid");
    let mut out = [Vec::new(), Vec::new(), Vec::new()];
    write_envelope(&mut out[0], digest, false);
    write_body(&mut out[1], digest, false);
    write_body_structure(&mut out[2], digest, false);
    out
}

/// A parenthesized list of lists, strings, numbers and NIL.
#[derive(Debug, PartialEq)]
enum Value {
    Nil,
    Number,
    String,
    List(Vec<Value>),
}

/// Reads a value without recursion, and without any leniency.
fn read(text: &[u8]) -> Option<Value> {
    let mut open: Vec<Vec<Value>> = vec![Vec::new()];
    let mut at = 0;
    while at < text.len() {
        let value = match text[at] {
            b'(' => {
                open.push(Vec::new());
                at += 1;
                continue;
            }
            b')' => {
                at += 1;
                Value::List(open.pop()?)
            }
            b'"' => {
                at += 1;
                loop {
                    match text.get(at)? {
                        b'"' => break,
                        b'\\' if matches!(text.get(at + 1)?, b'"' | b'\\') => at += 2,
                        b'\\' | 0 | b'\r' | b'\n' | 0x80.. => return None,
                        _ => at += 1,
                    }
                }
                at += 1;
                Value::String
            }
            b'{' => {
                let digits = text[at + 1..].iter().take_while(|b| b.is_ascii_digit()).count();
                let count: usize = std::str::from_utf8(&text[at + 1..][..digits]).ok()?.parse().ok()?;
                let rest = text[at + 1 + digits..].strip_prefix(b"}\r\n")?;
                rest.get(..count).filter(|octets| octets.is_ascii() && !octets.contains(&0))?;
                at += 4 + digits + count;
                Value::String
            }
            b'0'..=b'9' => {
                at += text[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                Value::Number
            }
            _ => {
                text[at..].strip_prefix(b"NIL")?;
                at += 3;
                Value::Nil
            }
        };
        let is_list = matches!(value, Value::List(_));
        let list = open.last_mut()?;
        list.push(value);
        // One space between values; none between lists of addresses and bodies, and none at the end.
        match text.get(at) {
            None | Some(b')') => {}
            Some(b' ') => at += 1,
            Some(b'(') if is_list => {}
            Some(_) => return None,
        }
    }
    let values = open.pop()?;
    (open.is_empty() && values.len() == 1).then(|| values.into_iter().next())?
}

fn check(message: &[u8], name: &str) {
    let [envelope, body, body_structure] = items(message);
    match read(&envelope) {
        Some(Value::List(fields)) => assert_eq!(fields.len(), 10, "{name}"),
        other => panic!("{name}: {other:?} {}", String::from_utf8_lossy(&envelope)),
    }
    for text in [body, body_structure] {
        assert!(matches!(read(&text), Some(Value::List(_))), "{name}: {}", String::from_utf8_lossy(&text));
    }
}

fn messages(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("readable") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            messages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "eml") {
            found.push(path);
        }
    }
}

#[test]
fn real_messages() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus/hard");
    let corpus = std::env::var_os("POSTHASTE_CORPUS").map_or(beside, PathBuf::from);
    if !corpus.is_dir() {
        println!("skipped: no corpus at {}", corpus.display());
        return;
    }
    let mut found = Vec::new();
    messages(&corpus, &mut found);
    for path in &found {
        check(&std::fs::read(path).expect("readable"), &path.display().to_string());
    }
    println!("{} messages", found.len());
}

/// A figure, not a check: `cargo test --release -p posthaste-imap --test structure speed -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn speed() {
    let message = b"Date: Wed, 17 Jul 1996 02:23:25 -0700\r\nFrom: Terry Gray <gray@cac.washington.edu>\r\nSubject: a subject\r\n\
        To: imap@cac.washington.edu, John Klensin <KLENSIN@MIT.EDU>\r\nMessage-Id: <B27397-0100000@cac.washington.edu>\r\n\
        In-Reply-To: <B27397-0100000@cac.washington.edu>\r\nContent-Type: multipart/alternative; boundary=b\r\n\r\n--b\r\n\
        Content-Type: text/plain; charset=utf-8\r\n\r\nx\r\n--b\r\nContent-Type: text/html; charset=utf-8\r\n\r\ny\r\n--b--\r\n";
    let bytes = DigestBytes::from_aligned(Digest::of(message).archives().0).expect("valid");
    let (rounds, mut out) = (200_000, Vec::new());
    for (name, write) in
        [("ENVELOPE", write_envelope as fn(&mut Vec<u8>, &_, bool)), ("BODYSTRUCTURE", write_body_structure)]
    {
        let start = std::time::Instant::now();
        for _ in 0..rounds {
            out.clear();
            write(&mut out, bytes.digest().expect("valid"), false);
            std::hint::black_box(&out);
        }
        println!("{name}: {:?}, {} bytes", start.elapsed() / rounds, out.len());
    }
}

proptest! {
    #[test]
    fn random_messages(pieces in prop::collection::vec(prop::sample::select(vec![
        "Content-Type: multipart/mixed; boundary=b\r\n", "Content-Type: message/rfc822\r\n", "--b\r\n", "--b--\r\n", "\r\n",
        "From: \"a\\\"\u{e9} <b@c>\r\n", "To: x:;\r\n", "Content-Type: text/html; a=\"(\"\r\n", "Content-Type: multipart/x\r\n",
        "Content-Disposition: a\\b; c=d\r\n", "Subject: )(\"\\\0\r\n", "text\r\n", "Content-Language: ,\r\n",
        "Content-ID: (\u{e9}\r\n", "Cc: a \r\n b <@x:c\0@d>, \"\r\n", "Content-Language: a, \u{e9}\r\n"]), 0..30))
    {
        check(pieces.concat().as_bytes(), "random");
    }
}
