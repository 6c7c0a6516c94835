//! SMTP, and what LMTP shares with it.

use crate::harness::{Client, PASSWORD, Server, Store};

const ANN: &str = "ann@example.org";
/// In another shard than Ann.
const BOB: &str = "bob@example.org";
const MAIL: &str = "MAIL FROM:<sender@example.net>";

fn rcpt(address: &str) -> String {
    format!("RCPT TO:<{address}>")
}

/// The number of messages in a user's INBOX.
fn exists(server: &Server, user: &str) -> usize {
    let responses = server.login(user).ok("EXAMINE INBOX");
    let exists = responses.iter().find_map(|line| line.strip_prefix("* ")?.strip_suffix(" EXISTS")?.parse().ok());
    exists.expect("a number")
}

fn message(server: &Server, user: &str) -> String {
    let mut client = server.login(user);
    client.ok("EXAMINE INBOX");
    client.ok("FETCH * BODY.PEEK[]").remove(0)
}

#[test]
fn a_message_comes_to_all_its_recipients() {
    let store = Store::with(&[ANN, BOB]).set("server.host_name=mx.example");
    let server = store.serve();
    let mut client = server.smtp();
    let (ann, bob) = (rcpt("ann+lists@example.org"), rcpt("BOB@Example.Org"));
    let relay = rcpt("someone@elsewhere.example");
    assert_eq!(client.codes(&[MAIL, &ann, &relay, &bob, "DATA"]), ["250", "250", "550", "250", "354"]);
    client.send("Subject: hi\r\n\r\n..\r\n.\r\n");
    assert_eq!(client.reply(), "250 2.0.0 Stored");
    let stored = message(&server, ANN);
    let lines: Vec<&str> = stored.split("\r\n").collect();
    assert_eq!(lines[1], "Return-Path: <sender@example.net>");
    assert_eq!(lines[2], "Received: from client.example ([127.0.0.1])");
    assert!(lines[3].starts_with("\tby mx.example with ESMTP id "), "{stored}");
    assert_eq!(lines[4], "\tfor <ann+lists@example.org>;");
    assert!(stored.ends_with("Subject: hi\r\n\r\n.\r\n)"), "{stored}");
    assert!(message(&server, BOB).contains("for <BOB@Example.Org>"));

    // An old client: no extensions, and said so.
    let mut client = Client::new(server.port("smtp"));
    client.line();
    assert_eq!(client.codes(&["HELO old.example", MAIL, &ann, "DATA"]), ["250", "250", "250", "354"]);
    client.send("x\r\n.\r\n");
    client.reply();
    assert!(message(&server, ANN).contains(" with SMTP id "));
    server.stop();
}

/// RFC 5321, 4.5.1.
#[test]
fn the_postmaster_is_reachable() {
    let store = Store::with(&[ANN]).set("server.host_name=mx.example");
    let server = store.serve();
    assert_eq!(server.smtp().codes(&[MAIL, "RCPT TO:<Postmaster>"]), ["250", "550"]);
    server.stop();
    let store = store.set("delivery.postmaster=Ann@example.org");
    let server = store.serve();
    let mut client = server.smtp();
    let recipients = ["Postmaster", "postmaster@EXAMPLE.org", "postmaster@mx.example"].map(rcpt);
    assert_eq!(client.codes(&[MAIL, &recipients[0], &recipients[1], &recipients[2]]), ["250"; 4]);
    assert_eq!(client.codes(&["RCPT TO:<postmaster@other.example>", "DATA"]), ["550", "354"]);
    client.send("x\r\n.\r\n");
    client.reply();
    assert_eq!(exists(&server, ANN), 1, "one account, one copy");
    server.stop();
}

/// RFC 5321, 6.3.
#[test]
fn a_message_in_a_loop_is_refused() {
    let store = Store::with(&[ANN, BOB]);
    let server = store.serve();
    let header = |hops| "Received: from a by b; Tue, 24 Nov 2026 10:00:00 +0000\r\n".repeat(hops);
    let mut smtp = server.smtp();
    let mut lmtp = server.lmtp();
    lmtp.codes(&["LHLO x"]);
    for (hops, code) in [(100, "250"), (101, "554")] {
        smtp.codes(&[MAIL, &rcpt(ANN), "DATA"]);
        smtp.send(&format!("{}\r\nx\r\n.\r\n", header(hops)));
        assert_eq!(&smtp.reply()[..3], code);
        lmtp.codes(&[MAIL, &rcpt(ANN), &rcpt(BOB), "DATA"]);
        lmtp.send(&format!("{}\r\nx\r\n.\r\n", header(hops)));
        assert_eq!([&lmtp.reply()[..3], &lmtp.reply()[..3]], [code; 2]);
    }
    server.stop();
}

/// Some recipients have a message and one does not: the client has to repeat it, and nobody gets it twice, over a crash either.
#[test]
fn a_repetition_is_swallowed_where_it_is_known() {
    let store = Store::with(&[ANN, BOB, "cid@example.org"]).set("limits.mailbox_messages=2");
    let mut server = store.serve();
    let cid = rcpt("cid@example.org");
    let text = "Subject: once\r\n\r\nx\r\n.\r\n";
    for round in 0..3 {
        let mut bob = server.inbox(BOB);
        bob.ok("UID STORE 1:* +FLAGS (\\Deleted)");
        bob.ok("EXPUNGE");
        let mut client = server.smtp();
        assert_eq!(client.codes(&[MAIL, &rcpt(ANN), &rcpt(BOB), &cid, "DATA"]), ["250", "250", "250", "250", "354"]);
        if round < 2 {
            // Only now is Bob's INBOX full.
            server.deliver(&[BOB], "Subject: first\r\n\r\nx");
            server.deliver(&[BOB], "Subject: second\r\n\r\nx");
        }
        client.send(text);
        let reply = client.reply();
        assert!(reply.starts_with(if round < 2 { "451 4.3.0 Not all" } else { "250 " }), "round {round}: {reply}");
        let now = [exists(&server, ANN), exists(&server, BOB), exists(&server, "cid@example.org")];
        assert_eq!(now, [1, if round < 2 { 2 } else { 1 }, 1], "round {round}");
        if round == 0 {
            server.kill();
            server = store.serve();
        }
    }
    // Who is full before the message comes is refused alone.
    server.deliver(&[BOB], "Subject: full\r\n\r\nx");
    assert_eq!(server.smtp().codes(&[MAIL, &rcpt(ANN), &rcpt(BOB)]), ["250", "250", "452"]);
    server.stop();
    let store = store.set("delivery.full_mailbox=reject");
    let server = store.serve();
    assert_eq!(server.smtp().codes(&[MAIL, &rcpt(BOB)]), ["250", "552"]);
    server.stop();
}

/// RFC 3030, on both protocols.
#[test]
fn chunks_are_stored_as_they_came() {
    let store = Store::with(&[ANN, BOB]);
    let server = store.serve();
    let mut smtp = server.smtp();
    smtp.codes(&[MAIL, &rcpt(ANN), &rcpt(BOB)]);
    smtp.send("BDAT 13\r\nSubject: a\r\n\nBDAT 9 LAST\r\n\r\n.\r\n..\r\n");
    assert_eq!([&smtp.reply()[..3], &smtp.reply()[..3]], ["550", "550"], "a bare LF");
    let body = "x".repeat(60_000);
    let half = format!("Subject: b\r\n\r\n.\r\n{body}\r\n");
    smtp.codes(&[MAIL, &rcpt(ANN), &rcpt(BOB)]);
    smtp.send(&format!("BDAT {0}\r\n{half}BDAT {0}\r\n{half}BDAT 0 LAST\r\nNOOP\r\n", half.len()));
    assert_eq!([(); 4].map(|()| smtp.reply()[..3].to_owned()), ["250"; 4]);
    assert!(message(&server, BOB).contains(&format!("{half}{half}")));

    let mut lmtp = server.lmtp();
    lmtp.codes(&["LHLO x", MAIL, &rcpt(ANN), &rcpt(BOB)]);
    lmtp.send(&format!("BDAT {} LAST\r\n{half}QUIT\r\n", half.len()));
    assert_eq!([(); 3].map(|()| lmtp.reply()[..3].to_owned()), ["250", "250", "221"]);
    assert_eq!([exists(&server, ANN), exists(&server, BOB)], [2, 2]);
    server.stop();
}

/// Trap 1: STARTTLS forgets what was said before it, and what was sent with it.
#[test]
fn trap_1_starttls_and_implicit_tls() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    for (service, hello) in [("smtp", "EHLO x"), ("lmtp", "LHLO x")] {
        let mut client = Client::new(server.port(service));
        client.line();
        client.send(&format!("{hello}\r\n"));
        assert_eq!(client.reply(), "250 STARTTLS");
        client.send(&format!("{MAIL}\r\n{}\r\nSTARTTLS\r\nDATA\r\n{MAIL}\r\n", rcpt(ANN)));
        assert_eq!([(); 3].map(|()| client.reply()[..3].to_owned()), ["250", "250", "220"]);
        let mut client = client.into_tls(server.client_config()).unwrap();
        assert_eq!(client.codes(&[MAIL]), ["503"], "it has to greet again");
        client.send(&format!("{hello}\r\n"));
        assert_eq!(client.reply(), "250 CHUNKING");
        assert_eq!(client.codes(&["DATA", MAIL, &rcpt(ANN), "STARTTLS", "DATA"]), ["503", "250", "250", "503", "354"]);
        client.send("x\r\n.\r\n");
        assert!(client.reply().starts_with("250 "));
    }
    let mut client = server.tls("smtps");
    client.line();
    assert_eq!(client.codes(&["EHLO x", MAIL, &rcpt(ANN), "DATA"]), ["250", "250", "250", "354"]);
    client.send("x\r\n.\r\n");
    client.reply();
    let mut imap = server.tls("imaps");
    imap.line();
    imap.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    imap.ok("SELECT INBOX");
    let all = imap.ok("FETCH 1:* BODY.PEEK[HEADER.FIELDS (Received)]").join("\n");
    for with in ["with ESMTPS id", "with LMTPS id", "with ESMTPS id"] {
        assert!(all.contains(with), "{all}");
    }
    server.stop();
}
