//! POP3 under TLS, and its limits. What it does with mail is tested beside IMAP in the tests of the whole.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::harness::{Client, PASSWORD, Server, Store};

const ANN: &str = "ann@example.org";
/// Users whose accounts lie in both shards, so that logins move.
const USERS: [&str; 4] = [ANN, "bob@example.org", "cid@example.org", "dan@example.org"];

fn pop3(server: &Server) -> Client {
    let mut client = Client::new(server.port("pop3"));
    assert!(client.line().starts_with("+OK "));
    client
}

/// The answer to a command.
fn say(client: &mut Client, command: &str) -> String {
    client.send(&format!("{command}\r\n"));
    client.line()
}

/// The lines of a multi-line answer after the first.
fn rest(client: &mut Client) -> Vec<String> {
    std::iter::repeat_with(|| client.line()).take_while(|line| line != ".").collect()
}

fn capabilities(client: &mut Client) -> Vec<String> {
    assert!(say(client, "CAPA").starts_with("+OK"));
    rest(client)
}

fn has(capabilities: &[String], name: &str) -> bool {
    capabilities.iter().any(|line| line == name)
}

fn log_in(client: &mut Client, user: &str) {
    assert!(say(client, &format!("USER {user}")).starts_with("+OK"));
    let answer = say(client, &format!("PASS {PASSWORD}"));
    assert!(answer.starts_with("+OK"), "{answer}");
}

/// Traps 1, 2 and 31: what was said before TLS is forgotten, whatever it is, and capabilities are others afterwards.
#[test]
fn trap_01_nothing_said_before_stls_survives_it() {
    let store = Store::with(&USERS);
    let server = store.serve_with(&[]);
    for injected in ["", "NOOP\r\n", &format!("USER {ANN}\r\nPASS {PASSWORD}\r\nDELE 1\r\nQUIT\r\n"), "USER x"] {
        let mut client = pop3(&server);
        let before = capabilities(&mut client);
        assert!(has(&before, "STLS") && !has(&before, "USER") && !has(&before, "SASL PLAIN"), "{before:?}");
        assert!(say(&mut client, &format!("USER {ANN}")).starts_with("-ERR No passwords without TLS: say STLS"));
        client.send(&format!("STLS\r\n{injected}"));
        assert!(client.line().starts_with("+OK Begin TLS"));
        let mut client = client.into_tls(server.client_config()).unwrap();
        let after = capabilities(&mut client);
        assert!(has(&after, "USER") && has(&after, "SASL PLAIN") && !has(&after, "STLS"), "{injected:?}: {after:?}");
        assert!(say(&mut client, &format!("PASS {PASSWORD}")).starts_with("-ERR Say USER"), "{injected:?}");
        assert!(say(&mut client, "STLS").starts_with("-ERR"));
        log_in(&mut client, ANN);
        assert!(say(&mut client, "STLS").starts_with("-ERR"));
        assert_eq!(capabilities(&mut client), after, "RFC 2449, 5");
        assert!(say(&mut client, "QUIT").starts_with("+OK"));
        assert!(client.ended());
    }
    server.stop();
}

/// Trap 3: a client that was led here while it believes to speak another protocol.
#[test]
fn trap_03_another_protocol_is_refused() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    for (protocol, welcome) in [("pop3", true), ("imap", false), ("http/1.1", false)] {
        let mut config = server.client_config();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let client = Client::new(server.port("pop3s")).into_tls(config);
        assert_eq!(client.is_ok(), welcome, "{protocol}");
    }
    server.stop();
}

#[test]
fn a_session_moves_under_tls_with_what_was_sent_ahead() {
    let store = Store::with(&USERS);
    let server = store.serve_with(&[]);
    server.deliver(&USERS, "Subject: hi\r\n\r\n..x");
    for user in USERS {
        // Several connections each: the kernel spreads them over the workers.
        for _ in 0..4 {
            let mut client = server.tls("pop3s");
            assert!(client.line().starts_with("+OK "));
            client.send(&format!("USER {user}\r\nPASS {PASSWORD}\r\nSTAT\r\nRETR 1\r\nQUIT\r\n"));
            assert!(client.line().starts_with("+OK Send"));
            assert!(client.line().starts_with("+OK The maildrop has 1 messages"));
            assert!(client.line().starts_with("+OK 1 "));
            assert!(client.line().ends_with(" octets"));
            let message = rest(&mut client);
            assert_eq!(message.last().map(String::as_str), Some("..x"), "{message:?}");
            assert_eq!(client.line(), "+OK Bye");
            assert!(client.ended());
        }
    }
    server.stop();
}

/// Trap 46, trap 15: the lock is one for all ways in, and a wrong password has nothing to do with it.
#[test]
fn trap_46_the_lock_is_one_for_all_ways_in() {
    let store = Store::with(&USERS);
    let server = store.serve();
    for user in USERS {
        let mut first = server.tls("pop3s");
        first.line();
        log_in(&mut first, user);
        let mut others: Vec<Client> = (0..4).map(|_| pop3(&server)).collect();
        for other in &mut others {
            say(other, &format!("USER {user}"));
            assert_eq!(say(other, "PASS wrong"), "-ERR [AUTH] Wrong user name or password");
            say(other, &format!("USER {user}"));
            assert!(say(other, &format!("PASS {PASSWORD}")).starts_with("-ERR [IN-USE] "));
            assert!(say(other, "STAT").starts_with("-ERR Log in"));
        }
        assert!(say(&mut first, "STAT").starts_with("+OK 0 0"));
        assert!(say(&mut first, "QUIT").starts_with("+OK"));
        log_in(&mut others[0], user);
        say(&mut others[1], &format!("USER {user}"));
        assert!(say(&mut others[1], &format!("PASS {PASSWORD}")).starts_with("-ERR [IN-USE] "));
    }
    server.stop();
}

#[test]
fn a_login_in_vain_ends_in_time() {
    let store = Store::with(&[ANN]).set("pop3.login_timeout_s=1");
    let server = store.serve();
    let mut client = pop3(&server);
    // RFC 1939, 3: nothing is said at the end.
    assert!(client.ended());
    // Being busy is not logging in, not even for one that never pauses.
    let mut busy = TcpStream::connect(("127.0.0.1", server.port("pop3"))).unwrap();
    let (begun, mut buffer) = (Instant::now(), [0; 4096]);
    while busy.write_all(b"AUTH\r\n").is_ok() && busy.read(&mut buffer).is_ok_and(|octets| octets > 0) {
        assert!(begun.elapsed() < Duration::from_secs(10), "it goes on");
    }
    let mut client = pop3(&server);
    log_in(&mut client, ANN);
    assert!(say(&mut client, "NOOP").starts_with("+OK"));
    server.stop();
}

/// Trap 47: what is too much is told as what passes, so that nobody drops a password for it.
#[test]
fn trap_47_too_many_connections_of_a_user_are_told_so() {
    let store = Store::with(&[ANN]).set("limits.connections_per_user=1");
    let server = store.serve();
    let mut imap = server.login(ANN);
    let mut client = pop3(&server);
    say(&mut client, &format!("USER {ANN}"));
    let answer = say(&mut client, &format!("PASS {PASSWORD}"));
    assert!(answer.starts_with("-ERR [SYS/TEMP] Too many connections"), "{answer}");
    imap.ok("LOGOUT");
    server.stop();
}

/// Trap 5: bytes before a login are bounded.
#[test]
fn trap_05_what_comes_before_a_login_is_bounded() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = pop3(&server);
    assert!(say(&mut client, &format!("USER {}", "a".repeat(300))).starts_with("-ERR The line is too long"));
    assert!(say(&mut client, "AUTH PLAIN").starts_with("+ "));
    assert!(say(&mut client, &"A".repeat(13_000)).starts_with("-ERR The line is too long"));
    assert!(say(&mut client, &format!("USER {ANN}\0")).starts_with("-ERR"));
    log_in(&mut client, ANN);
    let mut client = pop3(&server);
    client.send(&"x".repeat(70_000));
    assert!(client.line().starts_with("-ERR A line does not end"));
    assert!(client.ended());
    let mut client = pop3(&server);
    client.send(&"GET / HTTP/1.1\r\n".repeat(60));
    for _ in 0..49 {
        assert_eq!(client.line(), "-ERR Unknown command");
    }
    assert!(client.line().starts_with("-ERR Too many bad commands"));
    assert!(client.ended());
    server.stop();
}
