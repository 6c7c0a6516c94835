//! LMTP transcripts (RFC 2033).

use crate::harness::Store;

#[test]
fn a_transaction_is_answered_per_recipient_and_in_order() {
    let store = Store::with(&["ann@example.org", "bob@example.org", "cid@example.org", "dan@example.org"]);
    let server = store.serve();
    let mut client = server.lmtp();
    client.send("LHLO client.example\r\n");
    let mut lines = Vec::new();
    while !lines.last().is_some_and(|line: &String| line.starts_with("250 ")) {
        lines.push(client.line());
    }
    for extension in
        ["PIPELINING", "SIZE 52428800", "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8", "CHUNKING", "STARTTLS"]
    {
        assert!(lines.iter().any(|line| line.ends_with(extension)), "{extension}: {lines:?}");
    }
    // The whole transaction in one go.
    client.send(
        "MAIL FROM:<sender@example.net>\r\nRCPT TO:<ann@example.org>\r\nRCPT TO:<nobody@example.org>\r\n\
         RCPT TO:<Bob+lists@Example.ORG>\r\nRCPT TO:<cid@example.org>\r\nRCPT TO:<dan@example.org>\r\n\
         RCPT TO:<ann@example.org>\r\nDATA\r\nSubject: all\r\n\r\n..dots\r\n.\r\nQUIT\r\n",
    );
    let replies: Vec<String> = (0..14).map(|_| client.reply()).collect();
    let codes: Vec<&str> = replies.iter().map(|reply| &reply[..9]).collect();
    assert_eq!(
        codes,
        [
            "250 2.1.0",
            "250 2.1.5",
            "550 5.1.1",
            "250 2.1.5",
            "250 2.1.5",
            "250 2.1.5",
            "250 2.1.5",
            "354 Start",
            "250 2.0.0",
            "250 2.0.0",
            "250 2.0.0",
            "250 2.0.0",
            "250 2.0.0",
            "221 2.0.0"
        ]
    );
    assert!(client.ended());
    for user in ["ann", "bob", "cid", "dan"] {
        let mut imap = server.inbox(&format!("{user}@example.org"));
        let fetched = imap.ok("FETCH 1:* BODY.PEEK[TEXT]");
        assert_eq!(fetched, ["* 1 FETCH (BODY[TEXT] {7}\r\n.dots\r\n)"], "{user} has it once");
    }
    server.stop();
}

/// What was sent is what is read, byte for byte; before it stand the trace fields.
#[test]
fn trap_39_messages_are_kept_byte_for_byte() {
    let store = Store::with(&["ann@example.org"]);
    let server = store.serve();
    let mut message = String::from("Subject:  odd\t spacing \r\nX-Long: ");
    message.push_str(&"x".repeat(900));
    message.push_str("\r\n folded\r\n\r\n");
    for line in 0..40_000 {
        message.push_str(&format!("line {line} \u{e9}\u{20ac} \t\r\n"));
    }
    message.push_str("last");
    assert!(message.len() > 600_000, "several blocks, compressed off the worker");
    server.deliver(&["ann@example.org"], &message);
    server.deliver(&["ann@example.org"], "no header field");
    let mut imap = server.inbox("ann@example.org");
    let fetched = imap.ok("FETCH 1 (RFC822.SIZE BODY.PEEK[])").remove(0);
    let (head, body) = fetched.split_once("}\r\n").unwrap();
    let body = body.strip_suffix(')').unwrap();
    let size: usize = head.split_once("RFC822.SIZE ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(size, body.len(), "trap 40: the size is that of what is sent");
    let (trace, rest) = body.split_at(body.find("Subject:").unwrap());
    assert_eq!(rest, format!("{message}\r\n"));
    assert!(
        trace.starts_with("Return-Path: <sender@example.net>\r\nReceived: from client.example ([127.0.0.1])\r\n\tby ")
    );
    assert!(trace.contains("with LMTP id ") && trace.contains("\r\n\tfor <ann@example.org>;\r\n"), "{trace}");
    // Partial fetches over the joints of trace, header and body.
    for (from, count) in
        [(0, 10), (trace.len() - 5, 20), (trace.len() + 880, 200), (body.len() - 3, 100), (body.len(), 1)]
    {
        let fetched = imap.ok(&format!("FETCH 1 BODY.PEEK[]<{from}.{count}>")).remove(0);
        let expected = &body.as_bytes()[from..body.len().min(from + count)];
        let expected = String::from_utf8_lossy(expected);
        assert!(fetched.ends_with(&format!("{expected})")) || expected.is_empty(), "{from}.{count}: {fetched}");
    }
    let header = imap.ok("FETCH 2 BODY.PEEK[HEADER]").remove(0);
    assert!(header.ends_with("no header field\r\n)"), "{header}");
    server.stop();
}

#[test]
fn what_is_wrong_costs_one_reply() {
    let store = Store::with(&["ann@example.org"]).set("limits.message_bytes=65536");
    let server = store.serve();
    let mut client = server.lmtp();
    for (line, code) in [
        ("HELO x", "500 5.5.1"),
        ("MAIL FROM:<a@b>", "503 5.5.1"),
        ("LHLO x", "250 START"),
        ("NONSENSE", "500 5.5."),
        ("MAIL FROM:<a@b> SIZE=65537", "552 5.3.4"),
        ("MAIL FROM:<>", "250 2.1.0"),
        ("RCPT TO:<\"\"@x>", "550 5.1.1"),
        ("DATA", "503 5.5.1"),
        ("RCPT TO:<ann@example.org>", "250 2.1.5"),
        ("DATA", "354 "),
    ] {
        client.send(&format!("{line}\r\n"));
        let reply = client.reply();
        assert!(reply.starts_with(code), "{line}: {reply}");
    }
    client.send(&format!("{}\r\n.\r\nNOOP\r\n", "x".repeat(70_000)));
    assert!(client.reply().starts_with("552 5.3.4"));
    assert!(client.reply().starts_with("250 2.0.0"), "the connection lives on");
    // Trap 41: a bare line feed ends no message.
    client.send("MAIL FROM:<a@b>\r\nRCPT TO:<ann@example.org>\r\nDATA\r\nx\n.\r\nMAIL FROM:<evil@x>\r\n.\r\nNOOP\r\n");
    let replies: Vec<String> = (0..5).map(|_| client.reply()).collect();
    assert!(replies[3].starts_with("550 5.6.0") && replies[4].starts_with("250 2.0.0"), "{replies:?}");
    assert_eq!(server.login("ann@example.org").ok("STATUS INBOX (MESSAGES)"), ["* STATUS INBOX (MESSAGES 0)"]);
    server.stop();
}

#[test]
fn messages_that_do_not_fit_in_memory_are_put_off() {
    let store =
        Store::with(&["ann@example.org"]).set("limits.in_flight_bytes=1048576").set("limits.message_bytes=983040");
    let server = store.serve();
    let open = |size: u32| {
        let mut client = server.lmtp();
        client.send(&format!("LHLO x\r\nMAIL FROM:<a@b> SIZE={size}\r\nRCPT TO:<ann@example.org>\r\nDATA\r\n"));
        (0..3).for_each(|_| _ = client.reply());
        let reply = client.reply();
        (client, reply)
    };
    let (mut first, reply) = open(900_000);
    assert!(reply.starts_with("354 "));
    // Announcing takes no room: that is taken by what has come.
    let (mut idle, reply) = open(900_000);
    assert!(reply.starts_with("354 "));
    let in_flight = || {
        let stats: serde_json::Value = serde_json::from_str(&store.done(&["stats", "--json"])).expect("JSON");
        stats["server"]["in_flight_bytes"].as_u64().expect("a number")
    };
    let line = "x".repeat(998) + "\r\n";
    first.send(&line.repeat(850));
    let begun = std::time::Instant::now();
    while in_flight() < 850_000 {
        assert!(begun.elapsed().as_secs() < 15, "{}", in_flight());
    }
    let (mut second, reply) = open(500_000);
    assert!(reply.starts_with("452 4.3.1"), "{reply}");
    // One that has been let in and finds no room is told at its end, and the connection lives on.
    idle.send(&(line.repeat(850) + ".\r\nNOOP\r\n"));
    assert!(idle.reply().starts_with("452 4.3.1"));
    assert!(idle.reply().starts_with("250 "));
    first.send("x\r\n.\r\n");
    assert!(first.reply().starts_with("250 2.0.0"));
    second.send("DATA\r\nx\r\n.\r\n");
    assert!(second.reply().starts_with("354 "), "the transaction goes on");
    assert!(second.reply().starts_with("250 2.0.0"));
    server.stop();
}

#[test]
fn many_connections_at_once() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    let server = store.serve();
    std::thread::scope(|scope| {
        for client in 0..16 {
            let server = &server;
            scope.spawn(move || {
                for message in 0..10 {
                    server.deliver(
                        &["ann@example.org", "bob@example.org"],
                        &format!("Subject: {client}.{message}\r\n\r\nx"),
                    );
                }
            });
        }
    });
    for user in ["ann@example.org", "bob@example.org"] {
        let mut imap = server.inbox(user);
        let mut subjects: Vec<String> = imap.ok("FETCH 1:* BODY.PEEK[HEADER.FIELDS (SUBJECT)]");
        assert_eq!(subjects.len(), 160);
        subjects.iter_mut().for_each(|line| *line = line.split_once("Subject: ").unwrap().1.to_owned());
        subjects.sort_unstable();
        subjects.dedup();
        assert_eq!(subjects.len(), 160);
    }
    server.stop();
}
