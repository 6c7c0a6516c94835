//! POP3 from end to end, beside LMTP and IMAP, on the real server.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use posthaste_bench::corpus::{Corpus, Mail};
use posthaste_tests::clients::{Imap, Lmtp, Pop3};
use posthaste_tests::server::{self, Server, Store};

const PASSWORD: &str = "secret";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// They are in several shards, so that some connections move to another worker.
const USERS: usize = 8;

fn user(number: usize) -> String {
    format!("user{number}@example.org")
}

fn store(settings: &[&str]) -> Store {
    let store = Store::new(&[&["store.shards=4"], settings].concat(), &["--plaintext-auth", "--workers", "2"]);
    let store = store.expect("a directory can be made");
    store.add_users(&(0..USERS).map(user).collect::<Vec<_>>(), PASSWORD).expect("users can be added");
    store
}

fn deliver(server: &Server, number: usize, messages: &[&[u8]]) {
    let mut lmtp = Lmtp::connect(server.lmtp()).expect("the server listens");
    for message in messages {
        let replies = lmtp.deliver(&[&user(number)], message).expect("the session goes on");
        assert_eq!(replies[0].0, 250, "{}", replies[0].1);
    }
}

fn append(server: &Server, number: usize, messages: &[&[u8]]) {
    let mut imap = imap(server, number);
    for message in messages {
        imap.append("INBOX", "", message).and_then(|done| done.ok()).expect("APPEND takes it");
    }
}

fn imap(server: &Server, number: usize) -> Imap {
    let mut imap = Imap::connect(server.imap()).expect("the server listens");
    imap.login(&user(number), PASSWORD).expect("the password is right");
    imap.select("INBOX").expect("it is there");
    imap
}

fn connect(server: &Server) -> Pop3 {
    Pop3::connect(server.pop3()).expect("the server listens")
}

fn log_in(server: &Server, number: usize) -> Pop3 {
    let mut pop3 = connect(server);
    pop3.login(&user(number), PASSWORD).expect("the password is right");
    pop3
}

/// Logs in once another session's lock is free, which is some time after its connection was closed.
fn log_in_when_free(server: &Server, number: usize) -> Pop3 {
    let begun = Instant::now();
    loop {
        let mut pop3 = connect(server);
        match pop3.login(&user(number), PASSWORD) {
            Ok(()) => return pop3,
            Err(error) if error.to_string().starts_with("[IN-USE] ") => {
                assert!(begun.elapsed() < PATIENCE, "the lock is never freed");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn message(number: usize) -> Vec<u8> {
    format!("Subject: {number}\r\nFrom: a@example.net\r\n\r\n.one\r\ntwo {number}\r\n..\r\nend\r\n").into_bytes()
}

/// `1 120` of LIST, or the same of UIDL.
fn pairs(lines: &[String]) -> BTreeMap<u32, String> {
    let pair = |line: &String| {
        let (number, value) = line.split_once(' ').expect("two words");
        (number.parse().expect("a number"), value.to_owned())
    };
    lines.iter().map(pair).collect()
}

fn list(pop3: &mut Pop3) -> BTreeMap<u32, String> {
    pairs(&pop3.lines("LIST").expect("LIST"))
}

fn unique_ids(pop3: &mut Pop3) -> BTreeMap<u32, String> {
    pairs(&pop3.lines("UIDL").expect("UIDL"))
}

#[test]
fn a_session_from_login_to_quit() {
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    for number in 0..USERS {
        let sent: Vec<Vec<u8>> = (0..3).map(message).collect();
        deliver(&server, number, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut pop3 = connect(&server);
        let mut capabilities: HashSet<String> = pop3.lines("CAPA").expect("CAPA").into_iter().collect();
        for expected in
            ["TOP", "UIDL", "USER", "SASL PLAIN", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER"]
        {
            assert!(capabilities.contains(expected), "{expected} of {capabilities:?}");
        }
        assert!(capabilities.remove("STLS"), "RFC 2595, 4: before a login only");
        pop3.login(&user(number), PASSWORD).expect("the password is right");
        let after: HashSet<String> = pop3.lines("CAPA").expect("CAPA").into_iter().collect();
        assert_eq!(after, capabilities, "RFC 2449, 5");

        let sizes = list(&mut pop3);
        let total: u64 = sizes.values().map(|size| size.parse::<u64>().expect("a size")).sum();
        assert_eq!(pop3.ok("STAT").expect("STAT"), format!("3 {total}"));
        let ids = unique_ids(&mut pop3);
        assert_eq!(ids.len(), 3);
        for (index, original) in (1..).zip(&sent) {
            let (first, text) = pop3.multi_line(&format!("RETR {index}")).expect("RETR");
            assert_eq!(first, format!("{} octets", sizes[&index]));
            assert_eq!(text.len().to_string(), sizes[&index]);
            assert!(text.ends_with(original) && text.starts_with(b"Return-Path: "), "{}", text.escape_ascii());
            assert_eq!(pop3.ok(&format!("LIST {index}")).expect("LIST"), format!("{index} {}", sizes[&index]));
            assert_eq!(pop3.ok(&format!("UIDL {index}")).expect("UIDL"), format!("{index} {}", ids[&index]));
            let header_octets = text.windows(4).position(|end| end == b"\r\n\r\n").expect("an empty line") + 4;
            for (lines, body) in [(0, &b""[..]), (1, b".one\r\n"), (1000, &text[header_octets..])] {
                let (_, top) = pop3.multi_line(&format!("TOP {index} {lines}")).expect("TOP");
                assert_eq!(top, [&text[..header_octets], body].concat(), "TOP {index} {lines}");
            }
        }
        pop3.ok("DELE 2").expect("DELE");
        for command in
            ["DELE 2", "RETR 2", "TOP 2 1", "LIST 2", "UIDL 2", "RETR 0", "RETR 4", "RETR x", "LIST 4294967297"]
        {
            assert!(pop3.command(command).expect("an answer").is_err(), "{command}");
        }
        assert_eq!(list(&mut pop3).keys().copied().collect::<Vec<_>>(), [1, 3]);
        pop3.ok("RSET").expect("RSET");
        assert_eq!(list(&mut pop3), sizes);
        pop3.ok("DELE 1").expect("DELE");
        pop3.ok("NOOP").expect("NOOP");
        pop3.quit().expect("QUIT");

        // The lock is free at once, and what is left is what it was.
        let mut pop3 = log_in(&server, number);
        let left = unique_ids(&mut pop3);
        assert_eq!(left.into_values().collect::<Vec<_>>(), [ids[&2].clone(), ids[&3].clone()]);
        pop3.quit().expect("QUIT");
    }
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}

/// Trap 47: only what is wrong with the credentials is answered with [AUTH].
#[test]
fn trap_47_logins_that_fail_say_why() {
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    let mut pop3 = connect(&server);
    let mut refused = |commands: &[&str]| {
        let answers: Vec<_> = commands.iter().map(|line| pop3.command(line).expect("an answer")).collect();
        answers.last().cloned().expect("an answer").expect_err("not logged in")
    };
    assert_eq!(refused(&["USER user0@example.org", "PASS wrong"]), "[AUTH] Wrong user name or password");
    assert_eq!(refused(&["USER nobody@example.org", "PASS secret"]), "[AUTH] Wrong user name or password");
    assert!(refused(&["PASS secret"]).starts_with("Say USER"));
    assert!(refused(&["AUTH PLAIN !"]).contains("base64"));
    assert!(refused(&["STAT"]).starts_with("Log in"));
    // user1 for user0: "user0@example.org\0user1@example.org\0secret"
    let other = "dXNlcjBAZXhhbXBsZS5vcmcAdXNlcjFAZXhhbXBsZS5vcmcAc2VjcmV0";
    assert!(refused(&[&format!("AUTH PLAIN {other}")]).starts_with("[AUTH] You cannot act"));
    // The fifth that failed was the last that was taken.
    assert!(refused(&["USER user0@example.org", "PASS wrong"]).starts_with("[AUTH]"));
    assert!(pop3.read_to_end().expect("it is closed").is_empty());

    // "\0user1@example.org\0secret"
    let own = "AHVzZXIxQGV4YW1wbGUub3JnAHNlY3JldA==";
    let mut pop3 = connect(&server);
    pop3.ok(&format!("auth plain {own}")).expect("the password is right");
    assert!(pop3.command("AUTH PLAIN").expect("an answer").is_err(), "RFC 5034, 4: once only");
    pop3.quit().expect("QUIT");
    let mut pop3 = connect(&server);
    pop3.send(format!("AUTH PLAIN\r\n*\r\nAUTH PLAIN\r\n{own}\r\nSTAT\r\nQUIT\r\n").as_bytes()).expect("it is sent");
    let said = String::from_utf8(pop3.read_to_end().expect("it is closed")).expect("text");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["+ ", "-ERR Cancelled", "+ "]);
    assert_eq!(lines[4..], ["+OK 0 0", "+OK Bye"], "{said}");
}

#[test]
fn passwords_are_not_taken_in_the_clear() {
    let store = Store::new(&["store.shards=1"], &[]).expect("a directory can be made");
    store.add_users(&[user(0)], PASSWORD).expect("users can be added");
    let server = store.start().expect("the server starts");
    let mut pop3 = connect(&server);
    let capabilities = pop3.lines("CAPA").expect("CAPA");
    assert!(!capabilities.iter().any(|line| line.starts_with("USER") || line.starts_with("SASL")), "{capabilities:?}");
    for command in [&format!("USER {}", user(0)), "AUTH PLAIN", "AUTH PLAIN AHVzZXIxQGV4YW1wbGUub3JnAHNlY3JldA=="] {
        let answer = pop3.command(command).expect("an answer").expect_err("no TLS");
        assert_eq!(answer, "No passwords without TLS: say STLS first", "{command}");
    }
    pop3.quit().expect("QUIT");
}

#[test]
fn trap_46_one_session_has_the_maildrop() {
    let store = store(&["pop3.idle_timeout_s=2"]);
    let server = store.start().expect("the server starts");
    for number in 0..USERS {
        let first = log_in(&server, number);
        let mut second = connect(&server);
        let error = second.login(&user(number), PASSWORD).expect_err("it is locked");
        assert!(error.to_string().starts_with("[IN-USE] "), "{error}");
        // Others are not concerned, and the session is not lost.
        log_in(&server, (number + 1) % USERS).quit().expect("QUIT");
        first.quit().expect("QUIT");
        second.login(&user(number), PASSWORD).expect("QUIT has freed it");
        drop(second);
        let third = log_in_when_free(&server, number);
        // A session that is broken off while it sends.
        drop(third);
        log_in_when_free(&server, number).quit().expect("QUIT");
    }
    // RFC 1939, 3: at the autologout nothing is said. The lock goes with the session.
    let mut silent = log_in(&server, 0);
    assert!(silent.read_to_end().expect("it is closed").is_empty());
    log_in_when_free(&server, 0).quit().expect("QUIT");
    server.stop().expect("the server stops");
}

#[test]
fn trap_46_nothing_is_deleted_without_quit() {
    let store = store(&["pop3.idle_timeout_s=2"]);
    let server = store.start().expect("the server starts");
    let sent: Vec<Vec<u8>> = (0..3).map(message).collect();
    deliver(&server, 1, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut pop3 = log_in(&server, 1);
    let ids = unique_ids(&mut pop3);
    let delete = |pop3: &mut Pop3| (1..=3).for_each(|number| drop(pop3.ok(&format!("DELE {number}")).expect("DELE")));
    // The client has gone.
    delete(&mut pop3);
    drop(pop3);
    // The client is silent for too long.
    let mut pop3 = log_in_when_free(&server, 1);
    assert_eq!(unique_ids(&mut pop3), ids);
    delete(&mut pop3);
    assert!(pop3.read_to_end().expect("it is closed").is_empty());
    // The client has said half of QUIT.
    let mut pop3 = log_in_when_free(&server, 1);
    assert_eq!(unique_ids(&mut pop3), ids);
    delete(&mut pop3);
    pop3.send(b"QUIT").expect("it is sent");
    pop3.end_of_input().expect("it can be said");
    assert!(pop3.read_to_end().expect("it is closed").is_empty());
    // The server stops.
    let mut pop3 = log_in_when_free(&server, 1);
    assert_eq!(unique_ids(&mut pop3), ids);
    delete(&mut pop3);
    server.stop().expect("the server stops");
    let said = String::from_utf8(pop3.read_to_end().expect("it is closed")).expect("text");
    assert_eq!(said, "-ERR [SYS/TEMP] Server is stopping\r\n");
    let server = store.start().expect("the server starts");
    assert_eq!(unique_ids(&mut log_in(&server, 1)), ids);
}

#[test]
fn all_of_it_in_one_packet() {
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    for number in 0..USERS {
        append(&server, number, &[b"A: b\r\n\r\n.c\r\n", b"D: e\r\n\r\nf\r\n"]);
        let mut pop3 = connect(&server);
        let user = user(number);
        let commands = format!(
            "CAPA\r\nUSER {user}\r\nPASS wrong\r\nUSER {user}\r\nPASS {PASSWORD}\r\nSTAT\r\nLIST\r\nUIDL\r\nRETR 1\r\n\
             TOP 2 0\r\nDELE 1\r\nSTAT\r\nNOOP\r\nBAD\r\nQUIT\r\nNOOP\r\n"
        );
        pop3.send(commands.as_bytes()).expect("it is sent");
        let said = String::from_utf8(pop3.read_to_end().expect("it is closed")).expect("text");
        let (_, said) = said.split_once("IMPLEMENTATION Posthaste\r\n.\r\n").expect("the capabilities");
        let (before, after) = said.split_once("+OK Unique-ids follow\r\n").expect("UIDL");
        let (_, after) = after.split_once(".\r\n").expect("the end of UIDL");
        assert_eq!(
            before,
            "+OK Send the password\r\n-ERR [AUTH] Wrong user name or password\r\n+OK Send the password\r\n\
             +OK The maildrop has 2 messages (23 octets)\r\n+OK 2 23\r\n+OK 2 messages (23 octets)\r\n1 12\r\n2 11\r\n.\r\n"
        );
        assert_eq!(
            after,
            "+OK 12 octets\r\nA: b\r\n\r\n..c\r\n.\r\n+OK The top of the message follows\r\nD: e\r\n\r\n.\r\n\
             +OK Marked to be deleted at QUIT\r\n+OK 1 11\r\n+OK Nothing done\r\n-ERR Unknown command\r\n+OK Bye\r\n"
        );
        let mut imap = imap(&server, number);
        let left = imap.uid_fetch("1:*", "BODY.PEEK[]").expect("FETCH");
        assert_eq!(left.iter().map(|message| &message.body[..]).collect::<Vec<_>>(), [b"D: e\r\n\r\nf\r\n"]);
    }
}

/// Removes the index pages of all shards of a store that no server runs on.
fn remove_indexes(store: &Store) {
    let mut removed = 0;
    for shard in std::fs::read_dir(store.data()).expect("the data directory") {
        let Ok(pages) = std::fs::read_dir(shard.expect("an entry").path().join("idx")) else { continue };
        for page in pages {
            std::fs::remove_file(page.expect("an entry").path()).expect("it can be removed");
            removed += 1;
        }
    }
    assert!(removed > 0, "a stop writes a checkpoint");
}

#[test]
fn trap_46_unique_ids_outlive_restarts_crashes_and_rebuilds() {
    let store = store(&[]);
    let mut server = store.start().expect("the server starts");
    let all = |server: &Server| {
        let maildrops = (0..USERS).map(|number| {
            let mut pop3 = log_in(server, number);
            let seen = (unique_ids(&mut pop3), list(&mut pop3));
            pop3.quit().expect("QUIT");
            seen
        });
        maildrops.collect::<Vec<_>>()
    };
    for number in 0..USERS {
        let sent: Vec<Vec<u8>> = (0..3 + number).map(message).collect();
        deliver(&server, number, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        append(&server, number, &[b"A: b\r\n\r\nno end of line"]);
        let mut pop3 = log_in(&server, number);
        pop3.ok("DELE 2").expect("DELE");
        pop3.quit().expect("QUIT");
    }
    let before = all(&server);
    for (ids, sizes) in &before {
        let different: HashSet<&String> = ids.values().collect();
        assert_eq!((different.len(), sizes.len()), (ids.len(), ids.len()));
        let allowed =
            |id: &String| (1..=70).contains(&id.len()) && id.bytes().all(|octet| (0x21..=0x7e).contains(&octet));
        assert!(ids.values().all(allowed), "RFC 1939, 7: {ids:?}");
        assert_eq!(sizes.last_key_value().map(|(_, size)| &size[..]), Some("24"), "with its line end");
    }
    server.stop().expect("the server stops");
    server = store.start().expect("the server starts");
    assert_eq!(all(&server), before, "after a restart");
    server.kill().expect("the server was there");
    server = store.start().expect("the server starts");
    assert_eq!(all(&server), before, "after SIGKILL");
    server.stop().expect("the server stops");
    remove_indexes(&store);
    server = store.start().expect("the server starts");
    assert_eq!(all(&server), before, "after a rebuild");
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}

/// Compares what is announced with what is sent, and that with what IMAP has. Gives the number of messages.
fn compare_with_imap(server: &Server, number: usize) -> io::Result<usize> {
    let bodies = imap(server, number).uid_fetch("1:*", "BODY.PEEK[]")?;
    let mut pop3 = log_in(server, number);
    let sizes = list(&mut pop3);
    assert_eq!(sizes.len(), bodies.len());
    for ((index, size), stored) in sizes.iter().zip(&bodies) {
        let (first, text) = pop3.multi_line(&format!("RETR {index}"))?;
        assert_eq!(first, format!("{size} octets"));
        assert_eq!(text.len().to_string(), *size, "message {index} of {}", user(number));
        let line_end = if stored.body.ends_with(b"\r\n") { &b""[..] } else { b"\r\n" };
        assert!(text == [&stored.body, line_end].concat(), "message {index} of {}", user(number));
        let (_, top) = pop3.multi_line(&format!("TOP {index} {}", u32::MAX))?;
        assert!(top.starts_with(&text), "message {index} of {}", user(number));
    }
    pop3.quit()?;
    Ok(bodies.len())
}

#[test]
fn trap_48_sizes_are_the_octets_that_are_sent() {
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    let large = |octets: usize, end: &str| {
        let lines = (0..octets / 40).map(|line| format!("{}{line:037}\r\n", if line % 3 == 0 { "." } else { "x" }));
        format!("Subject: large\r\n\r\n{}{end}", lines.collect::<String>()).into_bytes()
    };
    let large_header = |octets: usize| {
        let fields = (0..octets / 40).map(|line| format!("X-{line:08}: {}\r\n", ".".repeat(26)));
        format!("{}\r\n.body", fields.collect::<String>()).into_bytes()
    };
    let odd: Vec<Vec<u8>> = vec![
        b"A: b\r\n\r\nno line end".to_vec(),
        b"A: b\r\n\r\nends with CR\r".to_vec(),
        b"A: b\r\n\r\nends with LF\n".to_vec(),
        b"A: b\r\n\r\n".to_vec(),
        b"A: b\r\n".to_vec(),
        b"A: b".to_vec(),
        b"\r\n.".to_vec(),
        b".".to_vec(),
        b"\r\n".to_vec(),
        b"A: b\r\n\r\n.\r\n..\r\n...\r\n.a\r\n".to_vec(),
        b"A: b\r\n\r\n\r\n.\r\n.\r\n".to_vec(),
        b"A: b\n\n.bare\n.\n..\n\r.\r.\r\n".to_vec(),
        b"A: b\r\n\r\nbare CR\r.\rin it\r\n".to_vec(),
        large(300 << 10, ""),
        large((1 << 20) - 40, "."),
        large(3 << 20, "\r\n."),
        large(3 << 20, ".\r\n"),
        large_header(2 << 20),
    ];
    let odd: Vec<&[u8]> = odd.iter().map(Vec::as_slice).collect();
    append(&server, 0, &odd);
    assert_eq!(compare_with_imap(&server, 0).expect("all can be read"), odd.len());
    // What a client makes of flags, and copies, change nothing of it.
    let mut client = imap(&server, 0);
    for command in ["STORE 1:* FLAGS (\\Flagged)", "STORE 1:* FLAGS ()", "COPY 1:* INBOX"] {
        client.command(command).and_then(|done| done.ok()).expect(command);
    }
    let flags = client.uid_fetch("1:*", "BODY.PEEK[]<0.1>").expect("FETCH");
    assert!(flags.iter().all(|message| message.flags.is_empty()), "no flag comes of it");
    assert_eq!(compare_with_imap(&server, 0).expect("all can be read"), 2 * odd.len());
    client.command("RENAME INBOX Old").and_then(|done| done.ok()).expect("RENAME");
    client.select("Old").expect("it is there");
    client.command("MOVE 1:* INBOX").and_then(|done| done.ok()).expect("MOVE");
    assert_eq!(compare_with_imap(&server, 0).expect("all can be read"), 2 * odd.len());
    server.stop().expect("the server stops");
    remove_indexes(&store);
    let server = store.start().expect("the server starts");
    assert_eq!(compare_with_imap(&server, 0).expect("all can be read"), 2 * odd.len());
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}

fn hard_cases(directory: &Path) -> Vec<Vec<u8>> {
    let mut cases = Vec::new();
    for entry in std::fs::read_dir(directory).expect("it can be read") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            cases.extend(hard_cases(&path));
        } else {
            cases.push(std::fs::read(&path).expect("it can be read"));
        }
    }
    // APPEND takes neither an empty message nor NUL (RFC 3501, 9: CHAR8).
    cases.retain(|case| !case.is_empty() && !case.contains(&0));
    cases
}

#[test]
fn trap_48_real_mail_has_the_announced_sizes() {
    let Some(path) = server::corpus() else { return };
    let corpus = Corpus::load(&path.join("ordinary.tar.zst")).expect("the corpus can be read");
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    let bytes = |mail: &Mail| mail.bytes.clone();
    for number in 0..USERS {
        let sent: Vec<Vec<u8>> = corpus.mail.iter().skip(number).step_by(USERS).map(bytes).collect();
        deliver(&server, number, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }
    append(&server, 0, &corpus.bare_cr.iter().map(|mail| &mail.bytes[..]).collect::<Vec<_>>());
    // Hard cases as they lie in their files: most have bare LFs, many no line end.
    let hard = hard_cases(&path.join("hard"));
    append(&server, 1, &hard.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let compared: usize = (0..USERS).map(|number| compare_with_imap(&server, number).expect("all can be read")).sum();
    println!("{compared} messages of the corpus compared, {} of them hard cases", hard.len());
    assert_eq!(compared, corpus.mail.len() + corpus.bare_cr.len() + hard.len());
    assert!(hard.len() > 100);
}

#[test]
fn imap_and_pop3_see_each_others_expunges() {
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    for number in 0..2 {
        let sent: Vec<Vec<u8>> = (0..5).map(message).collect();
        deliver(&server, number, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut client = imap(&server, number);
        let mut pop3 = log_in(&server, number);
        let (sizes, ids) = (list(&mut pop3), unique_ids(&mut pop3));
        let stat = pop3.ok("STAT").expect("STAT");
        // What IMAP expunges keeps its number and its size here, and cannot be had any more. What comes is not there.
        client.command("STORE 2 FLAGS (\\Deleted)").and_then(|done| done.ok()).expect("STORE");
        client.command("EXPUNGE").and_then(|done| done.ok()).expect("EXPUNGE");
        deliver(&server, number, &[&message(9)]);
        assert_eq!((list(&mut pop3), unique_ids(&mut pop3), pop3.ok("STAT").expect("STAT")), (sizes, ids, stat));
        for command in ["RETR 2", "TOP 2 0", "TOP 2 1"] {
            let answer = pop3.command(command).expect("an answer").expect_err("it is gone");
            assert!(answer.contains("expunged"), "{answer}");
        }
        // To delete what is gone already is no failure.
        pop3.multi_line("RETR 1").expect("RETR");
        pop3.multi_line("RETR 4").expect("RETR");
        for command in ["DELE 2", "DELE 4", "DELE 5"] {
            pop3.ok(command).expect(command);
        }
        pop3.multi_line("TOP 3 1").expect("TOP");
        assert!(client.uid_fetch("1", "BODY.PEEK[]").expect("FETCH")[0].flags.is_empty(), "nothing is changed yet");
        pop3.quit().expect("QUIT");
        let done = client.command("NOOP").and_then(|done| done.ok()).expect("NOOP");
        let told: Vec<u32> =
            done.untagged.iter().filter_map(|line| Some(line.response().numbered("EXPUNGE")?.0)).collect();
        assert_eq!(told, [3, 3], "4 and 5, which are 3 and 4 to this client");
        let left = client.uid_fetch("1:*", "BODY.PEEK[]").expect("FETCH");
        let left: Vec<(u32, bool)> =
            left.iter().map(|message| (message.uid, message.flags.contains("\\seen"))).collect();
        assert_eq!(left, [(1, true), (3, false), (6, false)]);
    }
}

#[test]
fn what_was_retrieved_is_not_marked_unless_wanted() {
    let store = store(&["pop3.marks_seen=false"]);
    let server = store.start().expect("the server starts");
    deliver(&server, 0, &[&message(0)]);
    let mut pop3 = log_in(&server, 0);
    pop3.multi_line("RETR 1").expect("RETR");
    pop3.quit().expect("QUIT");
    assert!(imap(&server, 0).uid_fetch("1", "BODY.PEEK[]").expect("FETCH")[0].flags.is_empty());
}

/// What is acknowledged at QUIT is durable.
#[test]
fn what_quit_has_deleted_stays_deleted_after_sigkill() {
    let store = store(&[]);
    let mut server = store.start().expect("the server starts");
    let sent: Vec<Vec<u8>> = (0..20).map(message).collect();
    deliver(&server, 3, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let mut left = 20;
    while left > 0 {
        let mut pop3 = log_in(&server, 3);
        assert_eq!(list(&mut pop3).len(), left);
        for number in 1..=5 {
            pop3.ok(&format!("DELE {number}")).expect("DELE");
        }
        pop3.quit().expect("QUIT");
        left -= 5;
        server.kill().expect("the server was there");
        server = store.start().expect("the server starts after SIGKILL");
    }
    assert!(list(&mut log_in(&server, 3)).is_empty());
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}

#[test]
fn a_maildrop_of_100_000_messages() {
    const COUNT: usize = 100_000;
    let store = store(&[]);
    let server = store.start().expect("the server starts");
    append(&server, 2, &[b"A: b\r\n\r\none\r\n", b"A: b\r\n\r\nwithout an end"]);
    let mut client = imap(&server, 2);
    let mut have = 2;
    while have < COUNT {
        let more = have.min(COUNT - have);
        client.command(&format!("COPY 1:{more} INBOX")).and_then(|done| done.ok()).expect("COPY");
        have += more;
    }
    drop(client);
    let timed = |what: &str, begun: Instant| println!("{what}: {:?}", begun.elapsed());
    let begun = Instant::now();
    let mut pop3 = log_in(&server, 2);
    timed("login", begun);
    let begun = Instant::now();
    let stat = pop3.ok("STAT").expect("STAT");
    assert_eq!(stat, format!("{COUNT} {}", COUNT / 2 * (13 + 24)));
    timed("STAT", begun);
    let begun = Instant::now();
    let sizes = list(&mut pop3);
    assert_eq!(sizes.len(), COUNT);
    assert!(sizes.values().all(|size| size == "13" || size == "24"));
    timed("LIST", begun);
    let begun = Instant::now();
    let ids = unique_ids(&mut pop3);
    assert_eq!(ids.values().collect::<HashSet<_>>().len(), COUNT);
    timed("UIDL", begun);
    // All but the first and the last, pipelined by somebody who reads the answers meanwhile.
    let begun = Instant::now();
    for chunk in (2..COUNT).collect::<Vec<_>>().chunks(1000) {
        let commands: String = chunk.iter().map(|number| format!("DELE {number}\r\n")).collect();
        pop3.send(commands.as_bytes()).expect("it is sent");
        chunk.iter().for_each(|_| _ = pop3.reply().expect("an answer").expect("DELE"));
    }
    timed("DELE", begun);
    assert_eq!(list(&mut pop3).keys().copied().collect::<Vec<_>>(), [1, COUNT as u32]);
    let begun = Instant::now();
    pop3.quit().expect("QUIT");
    timed("QUIT", begun);
    assert_eq!(
        unique_ids(&mut log_in(&server, 2)).into_values().collect::<Vec<_>>(),
        [ids[&1].clone(), ids[&(COUNT as u32)].clone()]
    );
    server.stop().expect("the server stops");
    store.run(&["check"]).expect("the store is sound");
}
