//! What may not be exceeded, before and after the login, and that nobody else notices.

use std::time::{Duration, Instant};

use crate::harness::{Client, PASSWORD, Store};

const ANN: &str = "ann@example.org";
const BOB: &str = "bob@example.org";

/// What a deadline of a second may take on a busy machine. Deadlines are rounded up to a second, too.
const SOON: Duration = Duration::from_secs(15);

#[test]
fn connections_of_one_user() {
    let store = Store::with(&[ANN, BOB]).set("limits.connections_per_user=2");
    let server = store.serve();
    let first = server.login(ANN);
    let mut second = server.login(ANN);
    let mut third = server.imap();
    let answer = third.answer(&format!("LOGIN {ANN} {PASSWORD}"));
    assert!(answer.starts_with("NO [LIMIT] Too many connections of this user"), "{answer}");
    server.login(BOB).ok("SELECT INBOX");
    // One that ends makes room; its end comes to the server in its own time.
    drop(first);
    let begun = Instant::now();
    while !third.answer(&format!("LOGIN {ANN} {PASSWORD}")).starts_with("OK ") {
        assert!(begun.elapsed() < SOON);
        third = server.imap();
    }
    second.ok("NOOP");
    server.stop();
}

/// Being busy is not logging in.
#[test]
fn a_login_has_to_come_in_time() {
    let store = Store::with(&[ANN]).set("imap.login_timeout_s=1");
    let server = store.serve();
    let begun = Instant::now();
    let mut busy = server.imap();
    let mut silent = server.imap();
    let mut shaking_hands = Client::new(server.port("imaps"));
    shaking_hands.send("\u{16}\u{3}");
    let mut last = String::new();
    while begun.elapsed() < SOON && !last.starts_with("* BYE ") {
        busy.send("a NOOP\r\n");
        last = busy.line();
    }
    assert!(last.starts_with("* BYE [UNAVAILABLE]"), "{last}");
    assert!(silent.line().starts_with("* BYE [UNAVAILABLE]"));
    // Who is logged in has all the time in the world.
    let mut client = server.login(ANN);
    let mut later = server.imap();
    assert!(
        later.line().starts_with("* BYE [UNAVAILABLE]"),
        "its time is over, and so would be that of who came before"
    );
    client.ok("NOOP");
    server.stop();
}

/// A client that asks for much and reads nothing is let go, and what it asked for is not kept.
#[test]
fn a_client_that_takes_nothing_is_closed() {
    let store = Store::with(&[ANN, BOB]).set("limits.send_timeout_s=1");
    let server = store.serve();
    let line = "x".repeat(900);
    let body: String = (0..1100).map(|_| format!("{line}\r\n")).collect();
    server.deliver(&[ANN], &format!("Subject: a megabyte\r\n\r\n{body}"));
    for service in ["imap", "imaps"] {
        let mut client = if service == "imaps" { server.tls(service) } else { Client::new(server.port(service)) };
        client.line();
        client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
        client.ok("SELECT INBOX");
        client.send(&"a FETCH 1 BODY.PEEK[]\r\n".repeat(60));
        let begun = Instant::now();
        let open = || {
            let stats = store.done(&["stats", "--json"]);
            let stats: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
            stats["server"]["connections"].as_u64().expect("a number")
        };
        while open() > 0 {
            assert!(begun.elapsed() < SOON, "{service}");
        }
        server.login(BOB).ok("SELECT INBOX");
    }
    server.stop();
}
