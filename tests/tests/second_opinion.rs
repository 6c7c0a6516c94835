//! A second implementation reads the same mail: Python's email package derives what ENVELOPE and BODYSTRUCTURE should be.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;

use posthaste_bench::corpus::Corpus;
use posthaste_tests::clients::Imap;
use posthaste_tests::server::{self, Store};

const USER: &str = "second@example.org";
const PASSWORD: &str = "secret";
/// Delivering the mail is all that takes long.
const CONNECTIONS: usize = 16;

#[test]
fn python_says_the_same() {
    let Some(path) = server::corpus() else { return };
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        // Nothing can be done if the message cannot be printed.
        let _ = writeln!(std::io::stderr().lock(), "skipped: there is no python3");
        return;
    }
    let corpus = Corpus::load(&path.join("ordinary.tar.zst")).expect("the corpus can be read");
    let store = Store::new(&["store.shards=1"], &["--plaintext-auth"]).expect("a directory can be made");
    store.add_users(&[USER.to_owned()], PASSWORD).expect("users can be added");
    let server = store.start().expect("the server starts");
    thread::scope(|scope| {
        for connection in 0..CONNECTIONS {
            let (mail, address) = (&corpus.mail, server.imap());
            scope.spawn(move || {
                let mut imap = Imap::connect(address).expect("the server listens");
                imap.login(USER, PASSWORD).expect("the password is right");
                for mail in mail.iter().skip(connection).step_by(CONNECTIONS) {
                    imap.append("INBOX", "", &mail.bytes).and_then(|done| done.ok()).expect("it is taken");
                }
                imap.logout().expect("the session is sound");
            });
        }
    });
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/second_opinion.py");
    let port = server.imap().port().to_string();
    let output =
        Command::new("python3").arg(script).args([&port[..], USER, PASSWORD, "INBOX"]).output().expect("python3 runs");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}{complained}");
    server.stop().expect("the server stops");
}
