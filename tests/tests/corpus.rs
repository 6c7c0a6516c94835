//! Real mail from end to end: what goes in by LMTP or APPEND comes out of IMAP byte for byte, none lost and none twice,
//! also after a restart and after SIGKILL.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use posthaste_bench::corpus::{Corpus, Mail};
use posthaste_tests::clients::{Imap, Lmtp};
use posthaste_tests::server::{self, Server, Store};

const USERS: usize = 200;
const CONNECTIONS: usize = 16;
const PASSWORD: &str = "secret";
/// Trace headers are shorter.
const TRACE_OCTETS_MAX: usize = 1024;

fn user(number: usize) -> String {
    format!("user{number}@example.org")
}

/// Runs `work` for each of `0..count` on as many threads as there are connections. The first error counts.
fn each(count: usize, work: impl Fn(&mut dyn Iterator<Item = usize>) -> Result<(), String> + Sync) {
    let next = AtomicUsize::new(0);
    let first_error = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS {
            scope.spawn(|| {
                let mut numbers =
                    std::iter::from_fn(|| Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&number| number < count));
                if let Err(error) = work(&mut numbers) {
                    first_error.lock().expect("no thread panics with it").get_or_insert(error);
                }
            });
        }
    });
    assert_eq!(first_error.into_inner().expect("no thread panics with it"), None);
}

fn deliver(server: &Server, mail: &[Mail]) {
    each(mail.len(), |numbers| {
        let mut lmtp = Lmtp::connect(server.lmtp()).map_err(|error| error.to_string())?;
        for number in numbers {
            let mail = &mail[number];
            let replies = lmtp.deliver(&[&user(number % USERS)], &mail.bytes);
            let replies = replies.map_err(|error| format!("{}: {error}", mail.name))?;
            if replies[0].0 != 250 {
                return Err(format!("{}: {}", mail.name, replies[0].1));
            }
        }
        lmtp.quit().map_err(|error| error.to_string())
    });
}

/// Each user's INBOX holds exactly their mail.
fn compare(server: &Server, mail: &[Mail], appended: &[Mail]) {
    each(USERS, |numbers| {
        for number in numbers {
            let fetched = inbox(server, number).map_err(|error| format!("{}: {error}", user(number)))?;
            let mut expected: Vec<&Mail> = mail.iter().skip(number).step_by(USERS).collect();
            for bytes in &fetched {
                let found = expected.iter().position(|mail| is_delivered(bytes, &mail.bytes));
                let found = found.ok_or_else(|| {
                    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(600)]).into_owned();
                    format!("{} has what was not delivered, or twice: {start}", user(number))
                })?;
                expected.swap_remove(found);
            }
            if let Some(lost) = expected.first() {
                return Err(format!("{} lost {} and {} more", user(number), lost.name, expected.len() - 1));
            }
        }
        Ok(())
    });
    let mut imap = Imap::connect(server.imap()).expect("the server listens");
    imap.login(&user(0), PASSWORD).expect("the password is right");
    imap.select("Odd").expect("it was made");
    let fetched: Vec<Vec<u8>> =
        imap.uid_fetch("1:*", "BODY.PEEK[]").expect("it can be read").into_iter().map(|message| message.body).collect();
    assert_eq!(fetched, appended.iter().map(|mail| mail.bytes.clone()).collect::<Vec<_>>());
}

fn inbox(server: &Server, number: usize) -> std::io::Result<Vec<Vec<u8>>> {
    let mut imap = Imap::connect(server.imap())?;
    imap.login(&user(number), PASSWORD)?;
    imap.select("INBOX")?;
    let fetched = imap.uid_fetch("1:*", "BODY.PEEK[]")?;
    imap.logout()?;
    Ok(fetched.into_iter().map(|message| message.body).collect())
}

/// Whether `bytes` are trace headers and then `original`.
fn is_delivered(bytes: &[u8], original: &[u8]) -> bool {
    let Some(trace) = bytes.strip_suffix(original) else { return false };
    let text = String::from_utf8_lossy(trace);
    trace.len() <= TRACE_OCTETS_MAX
        && text.starts_with("Return-Path: <sender@example.net>\r\n")
        && text.contains("\r\nReceived: ")
        && text.ends_with("\r\n")
}

#[test]
fn real_mail_comes_back_as_it_went_in() {
    let Some(path) = server::corpus() else { return };
    let corpus = Corpus::load(&path.join("ordinary.tar.zst")).expect("the corpus can be read");
    assert_eq!(corpus.bare_cr.len(), 6, "messages with bare CRs");
    let long = |mail: &&Mail| mail.bytes.split(|&octet| octet == b'\n').any(|line| line.len() > 999);
    let sources = corpus.mail.iter().fold(BTreeMap::new(), |mut sources: BTreeMap<&str, u32>, mail| {
        *sources.entry(mail.name.split('/').nth(1).unwrap_or("")).or_default() += 1;
        sources
    });
    let with_long_lines = corpus.mail.iter().filter(long).count();
    println!("{} messages, {with_long_lines} with lines over 998 octets: {sources:?}", corpus.mail.len());
    assert!(with_long_lines > 0);

    let store = Store::new(&["store.shards=5"], &["--plaintext-auth"]).expect("a directory can be made");
    store.add_users(&(0..USERS).map(user).collect::<Vec<_>>(), PASSWORD).expect("users can be added");
    let server = store.start().expect("the server starts");
    deliver(&server, &corpus.mail);

    let mut lmtp = Lmtp::connect(server.lmtp()).expect("the server listens");
    let mut imap = Imap::connect(server.imap()).expect("the server listens");
    imap.login(&user(0), PASSWORD).expect("the password is right");
    imap.command("CREATE Odd").and_then(|done| done.ok()).expect("a mailbox can be made");
    for mail in &corpus.bare_cr {
        let replies = lmtp.deliver(&[&user(0)], &mail.bytes).expect("the session goes on");
        let (code, text) = &replies[0];
        assert!((500..600).contains(code) && text.len() > 10, "{}: {text}", mail.name);
        imap.append("Odd", "", &mail.bytes).and_then(|done| done.ok()).expect("APPEND takes it");
    }
    drop((lmtp, imap));

    compare(&server, &corpus.mail, &corpus.bare_cr);
    server.stop().expect("the server stops");
    let server = store.start().expect("the server starts again");
    compare(&server, &corpus.mail, &corpus.bare_cr);
    server.kill().expect("the server was there");
    let server = store.start().expect("the server starts after SIGKILL");
    compare(&server, &corpus.mail, &corpus.bare_cr);
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}
