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

/// Trap 16: before the login nothing is long, and what is too long costs one BAD.
#[test]
fn trap_16_commands_before_the_login() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.imap();
    assert!(client.answer(&format!("LOGIN {ANN} {}", "x".repeat(9_000))).starts_with("BAD Command line too long"));
    client.send("a LOGIN {1025}\r\n");
    assert_eq!(client.line(), "a BAD Literal too large");
    client.send(&format!("b LOGIN {{2000+}}\r\n{} x\r\n", "y".repeat(2000)));
    assert_eq!(client.line(), "b BAD Literal too large");
    client.send(&format!("c ID ({})\r\n", "{1+}\r\na ".repeat(5)));
    assert_eq!(client.line(), "c BAD Too many literals in one command");
    client.send(&format!("d ID ({} {{1024}}\r\n", format!("{{1024+}}\r\n{} ", "a".repeat(1024)).repeat(3)));
    assert!(client.line().starts_with("+ "), "4 KB in all");
    client.send(&format!("{})\r\n", "a".repeat(1024)));
    assert!(client.line().starts_with("d BAD "));
    client.send("e APPEND INBOX {10}\r\n");
    assert_eq!(client.line(), "e NO [TOOBIG] Literal too large");
    client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    // What is too large to be read in vain ends the connection.
    let mut client = server.imap();
    client.send("f LOGIN {70000+}\r\n");
    assert!(client.line().starts_with("* BYE [TOOBIG]"));
    assert!(client.ended());
    server.stop();
}

#[test]
fn trap_16_commands_after_the_login() {
    let store = Store::with(&[ANN]).set("limits.message_bytes=65536");
    let server = store.serve();
    let mut client = server.inbox(ANN);
    assert!(client.answer(&format!("SEARCH SUBJECT {}", "x".repeat(66_000))).starts_with("BAD Command line too long"));
    client.send("a SEARCH SUBJECT {65537}\r\n");
    assert_eq!(client.line(), "a BAD Literal too large");
    client.send(&format!("b SEARCH{}\r\n", " SUBJECT {1+}\r\na".repeat(257)));
    assert_eq!(client.line(), "b BAD Too many literals in one command");
    // Each is small enough, but not all of them.
    client.send(&format!("c SEARCH{}\r\n", format!(" SUBJECT {{50000+}}\r\n{}", "a".repeat(50_000)).repeat(3)));
    assert_eq!(client.line(), "c BAD Literal too large");
    // A message that is too large, announced and sent at once: the connection lives on either way.
    client.send("d APPEND INBOX {65537}\r\n");
    assert_eq!(client.line(), "d NO [TOOBIG] Literal too large");
    client.send(&format!("e APPEND INBOX {{65537+}}\r\n{}\r\n", "x".repeat(65_537)));
    assert_eq!(client.line(), "e NO [TOOBIG] Literal too large");
    client.send(&format!("f APPEND INBOX {{65536+}}\r\n{}\r\n", "x".repeat(65_536)));
    assert!(client.until("f").pop().expect("an answer").starts_with("f OK "));
    client.send("g APPEND INBOX {999999+}\r\n");
    assert!(client.line().starts_with("* BYE [TOOBIG]"));
    assert!(client.ended());
    server.stop();
}

/// The octets that clients have on their way are one account, of messages and of whatever else is long; who gives up gives back.
#[test]
fn octets_on_their_way() {
    let store = Store::with(&[ANN, BOB]).set("limits.in_flight_bytes=1048576").set("limits.message_bytes=983040");
    let server = store.serve();
    let begin = |octets: usize| {
        let mut client = server.inbox(ANN);
        client.send(&format!("a APPEND INBOX {{{octets}}}\r\n"));
        let answer = client.line();
        (client, answer)
    };
    let in_flight = || {
        let stats: serde_json::Value = serde_json::from_str(&store.done(&["stats", "--json"])).expect("JSON");
        stats["server"]["in_flight_bytes"].as_u64().expect("a number")
    };
    let (mut first, answer) = begin(700_000);
    assert!(answer.starts_with("+ "), "{answer}");
    // Announcing takes no room: that is taken by what has come.
    let (mut late, answer) = begin(700_000);
    assert!(answer.starts_with("+ "), "{answer}");
    assert!(in_flight() < 600_000, "{}", in_flight());
    first.send(&"x".repeat(690_000));
    wait_for(&in_flight, 690_000);
    // Neither another message, nor many strings of a SEARCH, have room beside it.
    let (mut second, answer) = begin(700_000);
    assert_eq!(answer, "a NO [UNAVAILABLE] Too many messages in progress, try again later");
    let string = format!(" SUBJECT {{60000+}}\r\n{}", "a".repeat(60_000));
    second.send(&format!("b SEARCH{}\r\n", string.repeat(7)));
    assert_eq!(second.line(), "b NO [UNAVAILABLE] Too many messages in progress, try again later");
    second.send(&format!("c SEARCH{}\r\n", string.repeat(2)));
    assert!(second.until("c").pop().expect("an answer").starts_with("c OK "));
    assert_eq!(server.login(BOB).ok("STATUS INBOX (MESSAGES)"), ["* STATUS INBOX (MESSAGES 0)"], "nobody else notices");
    // One that was let in and finds no room is told once, and what it sends is dropped.
    late.send(&("x".repeat(700_000) + "\r\nb NOOP\r\n"));
    assert_eq!(late.line(), "a NO [UNAVAILABLE] Too many messages in progress, try again later");
    assert!(late.until("b").pop().expect("an answer").starts_with("b OK "));
    // It ends, and its room is free; so is that of a command that was wrong, and of a client that has gone.
    first.send(&format!("{}\r\n", "x".repeat(10_000)));
    assert!(first.until("a").pop().expect("an answer").starts_with("a OK "));
    second.send("d NONSENSE {400000}\r\n");
    assert_eq!(second.line(), "d BAD Literal too large");
    second.send(&format!("e SEARCH{} NONSENSE\r\n", string.repeat(10)));
    assert!(second.until("e").pop().expect("an answer").starts_with("e BAD "));
    second.ok("NOOP");
    assert_eq!(in_flight(), 0);
    let (mut gone, answer) = begin(700_000);
    assert!(answer.starts_with("+ "), "{answer}");
    gone.send(&"x".repeat(600_000));
    wait_for(&in_flight, 600_000);
    drop(gone);
    let begun = Instant::now();
    while in_flight() > 0 {
        assert!(begun.elapsed() < SOON);
    }
    server.stop();
}

/// A client that says nothing is told so and closed, on every protocol, also in the middle of something.
#[test]
fn silent_clients_are_closed() {
    let store = Store::with(&[ANN]);
    let store = ["imap", "pop3", "lmtp", "smtp"]
        .iter()
        .fold(store, |store, service| store.set(&format!("{service}.idle_timeout_s=1")));
    let server = store.serve();
    let silent = |mut client: Client, goodbye: &str| {
        let line = client.line();
        assert!(line.starts_with(goodbye), "{line}");
        assert!(client.ended());
    };
    let mut idling = server.inbox(ANN);
    idling.send("a IDLE\r\n");
    assert!(idling.line().starts_with("+ "));
    let mut appending = server.inbox(ANN);
    appending.send("a APPEND INBOX {10}\r\n");
    assert!(appending.line().starts_with("+ "));
    appending.send("x");
    silent(idling, "* BYE [UNAVAILABLE] Idle for too long");
    silent(appending, "* BYE [UNAVAILABLE] Idle for too long");
    silent(server.inbox(ANN), "* BYE [UNAVAILABLE] Idle for too long");
    let mut pop3 = Client::new(server.port("pop3"));
    assert!(pop3.line().starts_with("+OK"));
    pop3.send(&format!("USER {ANN}\r\nPASS {PASSWORD}\r\n"));
    assert!(pop3.line().starts_with("+OK") && pop3.line().starts_with("+OK"));
    // RFC 1939, 3: no answer to what was not asked.
    assert!(pop3.ended() || pop3.line().is_empty());
    silent(server.lmtp(), "421 4.4.2 Timeout");
    let mut within = server.smtp();
    within.send(&format!("MAIL FROM:<a@b>\r\nRCPT TO:<{ANN}>\r\nDATA\r\nSubject: x\r\n"));
    for code in ["250 ", "250 ", "354 "] {
        assert!(within.reply().starts_with(code));
    }
    silent(within, "421 4.4.2 Timeout");
    server.stop();
}

#[test]
fn lines_recipients_and_mistakes_of_mail_that_comes_in() {
    let store = Store::with(&[ANN]).set("lmtp.recipients=100").set("smtp.recipients=100");
    let server = store.serve();
    for (service, hello) in [("lmtp", "LHLO x"), ("smtp", "EHLO x")] {
        let mut client = Client::new(server.port(service));
        client.send(&format!("{hello}\r\n"));
        (0..2).for_each(|_| _ = client.reply());
        client.send(&format!("NOOP {}\r\nNOOP\r\n", "x".repeat(100_000)));
        assert_eq!(client.reply(), "500 5.5.2 Line too long", "{service}");
        assert!(client.reply().starts_with("250 "));
        client.send(&format!("MAIL FROM:<{}@example.org>\r\n", "a".repeat(300)));
        let reply = client.reply();
        assert!(reply.starts_with("501 5.1."), "{service}: {reply}");
        client.send("MAIL FROM:<>\r\n");
        client.send(&format!("RCPT TO:<{ANN}>\r\n").repeat(101));
        assert!(client.reply().starts_with("250 "));
        for _ in 0..100 {
            assert!(client.reply().starts_with("250 "), "{service}");
        }
        let answer = client.reply();
        assert!(answer.starts_with("452 4.5.3"), "{service}: RFC 5321, 4.5.3.1.10: {answer}");
        client.send("RSET\r\n");
        assert!(client.reply().starts_with("250 "));
        client.send(&"NONSENSE\r\n".repeat(20));
        let last = (0..20).map(|_| client.reply()).find(|reply| reply.starts_with("421 "));
        assert!(last.is_some(), "{service}");
        assert!(client.ended());
    }
    server.stop();
}

/// The limit of descriptors is raised as far as it goes, and there are no more connections than it allows.
#[test]
fn descriptors() {
    let store = Store::with(&[ANN]);
    let mut shell = std::process::Command::new("sh");
    let server = store.command(&["serve", "--listen", "imap=127.0.0.1:0", "--workers", "1"]);
    shell.args(["-c", "ulimit -Sn 100; ulimit -Hn 700; exec \"$0\" \"$@\""]).arg(server.get_program());
    shell.args(server.get_args()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = shell.spawn().expect("sh runs");
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().expect("piped")));
    let listening = lines.next().expect("a line").expect("text");
    let port = listening.rsplit(':').next().expect("a port").parse().expect("a number");
    assert_eq!(lines.next().expect("a line").expect("text"), "ready");
    let mut clients: Vec<Client> = (0..189).map(|_| Client::new(port)).collect();
    let greetings: Vec<String> = clients.iter_mut().map(Client::line).collect();
    let (welcome, refused) = greetings.split_at(188);
    assert!(welcome.iter().all(|line| line.starts_with("* OK ")), "{greetings:?}");
    assert!(refused[0].starts_with("* BYE [UNAVAILABLE] Too many connections"), "{refused:?}");
    assert!(store.done(&["stats"]).contains("188"));
    child.kill().expect("it runs");
    let said = crate::harness::text(&child.wait_with_output().expect("it ends").stderr);
    assert!(said.contains("the descriptor limit allows fewer connections than configured"), "{said}");
}

/// A text that is asked for a hundred times, and a large message: none of them is gathered before it is sent.
#[test]
fn what_is_asked_for_is_sent_in_pieces() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let line = "x".repeat(900);
    let body: String = (0..20_000).map(|number| format!("{number:08}{line}\r\n")).collect();
    server.deliver(&[ANN], &format!("Subject: 18 megabytes\r\nX: y\r\n\r\n{body}"));
    server.deliver(&[ANN], &format!("Subject: one\r\n\r\n{}", &body[..900_000]));
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a line");
        line.split_whitespace().nth(1).expect("a number").parse::<u64>().expect("a number") * 1024
    };
    let mut client = server.inbox(ANN);
    let before = memory();
    let whole = client.ok("FETCH 1 BODY.PEEK[]");
    assert!(whole[0].contains(&body), "byte for byte");
    let text = client.ok("FETCH 1 (BODY.PEEK[TEXT]<9000000.3000000> BODY.PEEK[HEADER.FIELDS (X)] UID)");
    assert!(text[0].contains(&body[9_000_000..12_000_000]) && text[0].ends_with("{8}\r\nX: y\r\n\r\n UID 1)"));
    let header = client.ok("FETCH 1 (BODY.PEEK[HEADER] RFC822.SIZE)");
    assert!(header[0].contains("Subject: 18 megabytes\r\nX: y\r\n\r\n RFC822.SIZE"), "{}", header[0].len());
    // 300 MB in one response.
    let items: Vec<String> = (0..300).map(|start| format!("BODY.PEEK[]<{start}.1000000>")).collect();
    let many = client.ok(&format!("FETCH 2 ({})", items.join(" ")));
    assert!(many[0].len() > 299 * 900_000);
    let grown = memory().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} octets");
    server.stop();
}

/// Damage that is met when a part of a message is on its way ends the connection. The next time it costs only that message.
#[test]
fn damage_within_a_large_message() {
    use std::os::unix::fs::FileExt;
    let store = Store::with(&[ANN]);
    let server = store.serve();
    // Nothing that compression could hide a mark in.
    let mut state = 1_u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'!' + ((state >> 33) % 94) as u8)
    };
    let body: String = (0..40_000).map(|_| (0..70).map(|_| noise()).collect::<String>() + "\r\n").collect();
    server.deliver(&[ANN], "Subject: first\r\n\r\nx");
    server.deliver(&[ANN], &format!("Subject: large\r\n\r\n{}", body.replace("\r\n.", "\r\n!")));
    server.deliver(&[ANN], "Subject: third\r\n\r\nx");
    server.stop();
    let mut segments = Vec::new();
    let mut directories = vec![store.data()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).expect("it can be read") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                directories.push(path);
            } else if path.metadata().expect("a file").len() > 2 << 20 {
                segments.push(path);
            }
        }
    }
    // In the middle of what has been written: in one of the later blocks.
    for path in segments {
        let bytes = std::fs::read(&path).expect("it can be read");
        let end = bytes.iter().rposition(|&octet| octet != 0).unwrap_or(0);
        if end > 2 << 20 {
            let file = std::fs::OpenOptions::new().write(true).open(&path).expect("it can be written");
            file.write_all_at(&[bytes[end / 2] ^ 1], end as u64 / 2).expect("it is written");
        }
    }
    let server = store.serve();
    let mut client = server.inbox(ANN);
    client.send("a FETCH 1:* BODY.PEEK[]\r\n");
    let received = client.octets_to_end();
    assert!((100_000..2_700_000).contains(&received), "{received} octets");
    let mut client = server.inbox(ANN);
    let mut responses = client.command("FETCH 1:* BODY.PEEK[]");
    assert!(responses.pop().expect("an answer").contains("NO [CORRUPTION] "));
    let found: Vec<&str> = responses.iter().map(|response| &response[..10]).collect();
    assert_eq!(found, ["* 1 FETCH ", "* 3 FETCH "]);
    let header = client.ok("FETCH 2 (ENVELOPE FLAGS BODY.PEEK[HEADER.FIELDS (SUBJECT)])");
    assert!(header[0].contains("\"large\"") && header[0].contains("Subject: large\r\n"), "{header:?}");
    let mut pop3 = Client::new(server.port("pop3"));
    pop3.send(&format!("USER {ANN}\r\nPASS {PASSWORD}\r\nRETR 2\r\nRETR 3\r\nTOP 2 0\r\n"));
    for expected in ["+OK", "+OK", "+OK", "-ERR [SYS/PERM]", "+OK"] {
        let line = pop3.line();
        assert!(line.starts_with(expected), "{line}");
    }
    // The header is not damaged.
    while pop3.line() != "." {}
    assert!(pop3.line().starts_with("+OK"));
    let header: Vec<String> = std::iter::from_fn(|| Some(pop3.line()).filter(|line| line != ".")).collect();
    assert!(header.contains(&"Subject: large".to_owned()), "{header:?}");
    server.stop();
}

/// Whoever is slow on purpose does not stay: parts of a TLS record, a goodbye that does not end, answers that are not taken.
#[test]
fn drips_do_not_renew_a_deadline() {
    use std::io::{Read, Write};
    let store = Store::with(&[ANN]).set("imap.login_timeout_s=2").set("imap.idle_timeout_s=2");
    let server = store.serve();
    let drip = |mut socket: std::net::TcpStream, octets: &[u8]| {
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        let begun = Instant::now();
        let mut said = [0; 4096];
        for octet in octets.iter().cycle() {
            assert!(begun.elapsed() < SOON, "it is still open");
            // The end of what the server says is not yet the end of the connection.
            if socket.read(&mut said).is_ok_and(|octets| octets == 0) {
                std::thread::sleep(Duration::from_millis(300));
            }
            if socket.write_all(&[*octet]).is_err() {
                return;
            }
        }
    };
    // After QUIT in the middle of a word; and a word that does not end.
    let mut leaving = std::net::TcpStream::connect(("127.0.0.1", server.port("imap"))).expect("it listens");
    leaving.write_all(b"a LOGOUT\r\n").expect("it is sent");
    drip(leaving, b"x");
    drip(std::net::TcpStream::connect(("127.0.0.1", server.port("imap"))).expect("it listens"), b"x");
    // The beginning of a TLS record of 16 KB.
    let mut client = server.tls("imaps");
    client.line();
    let mut within = client.socket();
    within.write_all(b"\x17\x03\x03\x40\x00").expect("it is sent");
    drip(within, b"x");
    // In IDLE, what happens in the mailbox is no word of the client's.
    let mut client = server.inbox(ANN);
    client.send("a IDLE\r\n");
    assert!(client.line().starts_with("+ "));
    let begun = Instant::now();
    while begun.elapsed() < SOON {
        server.deliver(&[ANN], "x");
        let line = client.line();
        if line.starts_with("* BYE ") {
            server.stop();
            return;
        }
    }
    panic!("it is still open");
}

/// What cannot be answered any more is found out before the response begins; and what is asked for twice comes once.
#[test]
fn a_fetch_answers_whole_responses() {
    let store = Store::with(&[ANN]).set("limits.in_flight_bytes=2162688").set("limits.message_bytes=2097152");
    let server = store.serve();
    let header: String = (0..30_000).map(|number| format!("X-{number}: {}\r\n", "y".repeat(50))).collect();
    server.deliver(&[ANN], &format!("Subject: large\r\n{header}\r\nx"));
    let mut client = server.inbox(ANN);
    let found = client.ok("FETCH 1 (UID BODY.PEEK[HEADER.FIELDS (SUBJECT)] UID BODY.PEEK[HEADER.FIELDS (SUBJECT)])");
    assert_eq!(found, ["* 1 FETCH (UID 1 BODY[HEADER.FIELDS (SUBJECT)] {18}\r\nSubject: large\r\n\r\n)"]);
    // Another client's octets take the room that reading such a header takes.
    let mut other = server.inbox(ANN);
    other.send("a APPEND INBOX {1500000}\r\n");
    assert!(other.line().starts_with("+ "));
    other.send(&"x".repeat(1_490_000));
    let in_flight = || {
        let stats: serde_json::Value = serde_json::from_str(&store.done(&["stats", "--json"])).expect("JSON");
        stats["server"]["in_flight_bytes"].as_u64().expect("a number")
    };
    wait_for(&in_flight, 1_490_000);
    assert_eq!(
        client.command("FETCH 1 (UID BODY.PEEK[HEADER.FIELDS (SUBJECT)])"),
        ["NO [UNAVAILABLE] Too many messages in progress, try again later"]
    );
    client.ok("FETCH 1 (UID FLAGS)");
    server.stop();
}

#[test]
fn an_account_that_could_not_be_entered_holds_no_place() {
    let store = Store::with(&[ANN, BOB]).set("limits.connections_per_user=1");
    let server = store.serve();
    let say = |client: &mut Client, line: &str| {
        client.send(&format!("{line}\r\n"));
        client.line()
    };
    let greeted = || {
        let mut client = Client::new(server.port("pop3"));
        assert!(client.line().starts_with("+OK"));
        client
    };
    let log_in = |client: &mut Client, user: &str| {
        assert!(say(client, &format!("USER {user}")).starts_with("+OK"));
        say(client, &format!("PASS {PASSWORD}"))
    };
    let mut first = greeted();
    assert!(log_in(&mut first, ANN).starts_with("+OK"));
    let mut second = greeted();
    assert!(log_in(&mut second, ANN).starts_with("-ERR"));
    assert!(log_in(&mut second, BOB).starts_with("+OK"), "it counts for whom it is");
    let mut third = server.imap();
    assert!(third.answer(&format!("LOGIN {BOB} {PASSWORD}")).starts_with("NO [LIMIT]"));
    server.stop();
}

/// Nobody finds out by trying who has an account.
#[test]
fn recipients_that_do_not_exist() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.smtp();
    client.send("MAIL FROM:<>\r\n");
    assert!(client.reply().starts_with("250 "));
    client.send(&"RCPT TO:<nobody@example.org>\r\n".repeat(101));
    for _ in 0..100 {
        assert!(client.reply().starts_with("550 5.1.1"));
    }
    assert!(client.reply().starts_with("421 4.7.0"));
    assert!(client.ended());
    let mut client = server.smtp();
    client.send(&"BDAT 0\r\n".repeat(30));
    let closed = (0..30).map(|_| client.reply()).position(|reply| reply.starts_with("421 "));
    assert_eq!(closed, Some(21));
    server.stop();
}

/// Waits until so many octets are on their way.
fn wait_for(in_flight: &dyn Fn() -> u64, octets: u64) {
    let begun = Instant::now();
    while in_flight() < octets {
        assert!(begun.elapsed() < SOON, "{}", in_flight());
    }
}
