//! TLS: as the connection begins, and when the client asks for it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::client::Resumption;
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, SupportedProtocolVersion};

use crate::harness::{Client, PASSWORD, Server, Store, text};

const ANN: &str = "ann@example.org";

/// Users whose accounts lie in both shards, so that logins move.
const USERS: [&str; 4] = [ANN, "bob@example.org", "cid@example.org", "dan@example.org"];

fn imaps(server: &Server) -> Client {
    let mut client = server.tls("imaps");
    let greeting = client.line();
    assert!(greeting.contains(" AUTH=PLAIN]") && !greeting.contains("STARTTLS"), "{greeting}");
    client
}

/// A client that has asked for STARTTLS and been told to begin.
fn told_to_begin(server: &Server, more: &str) -> Client {
    let mut client = server.imap();
    client.send(&format!("s STARTTLS\r\n{more}"));
    assert!(client.line().starts_with("s OK "));
    client
}

#[test]
fn a_live_connection_moves_between_workers() {
    let store = Store::with(&USERS);
    let server = store.serve_with(&[]);
    server.deliver(&USERS, "Subject: hi\r\n\r\nx");
    for user in USERS {
        // Several connections each: the kernel spreads them over the workers.
        for _ in 0..4 {
            let mut client = imaps(&server);
            client.send(&format!("a LOGIN {user} {PASSWORD}\r\nb EXAMINE INBOX\r\nc FETCH 1 UID\r\nd LOGOUT\r\n"));
            client.until("a");
            assert!(client.until("b").last().unwrap().starts_with("b OK [READ-ONLY]"));
            assert_eq!(client.until("c"), ["* 1 FETCH (UID 1)", "c OK Fetched"]);
            client.until("d");
            assert!(client.ended());
        }
    }
    server.stop();
}

/// Many at once, each with more in flight than a buffer holds, before and after the move.
#[test]
fn connections_move_under_load() {
    const CONNECTIONS: usize = 160;
    const THREADS: usize = 8;
    let store = Store::with(&USERS);
    let server = store.serve_with(&[]);
    let body: String =
        (0..3000).map(|line| format!("line {line} of a message that fills several records\r\n")).collect();
    server.deliver(&USERS, &format!("Subject: large\r\n\r\n{body}"));
    let config = server.client_config();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let number @ 0..CONNECTIONS = next.fetch_add(1, Ordering::Relaxed) {
                    let mut client = Client::new(server.port("imaps")).into_tls(config.clone()).expect("a handshake");
                    client.line();
                    let user = USERS[number % USERS.len()];
                    let noops: String = (0..200).map(|n| format!("n{n} NOOP\r\n")).collect();
                    client.send(&format!(
                        "{noops}a LOGIN {user} {PASSWORD}\r\n{noops}b EXAMINE INBOX\r\nc FETCH 1 BODY.PEEK[TEXT]\r\nd LOGOUT\r\n"
                    ));
                    client.until("b");
                    let fetched = client.until("c");
                    assert!(fetched[0].contains(&body), "a body is not what it was");
                    client.until("d");
                }
            });
        }
    });
    assert!(next.load(Ordering::Relaxed) >= CONNECTIONS);
    server.stop();
}

/// Trap 1, trap 31: what was said before TLS is forgotten, and capabilities are others afterwards.
#[test]
fn trap_1_nothing_said_before_starttls_survives_it() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    let mut client = server.imap();
    let capability = client.ok("CAPABILITY").remove(0);
    assert!(capability.contains(" STARTTLS") && capability.contains(" LOGINDISABLED"), "{capability}");

    let injected = format!("i LOGIN {ANN} {PASSWORD}\r\nj NOOP\r\nk LOGIN {{5}}\r\n");
    let mut client = told_to_begin(&server, &injected).into_tls(server.client_config()).unwrap();
    client.send("a CAPABILITY\r\n");
    let responses = client.until("a");
    assert_eq!(responses.len(), 2, "{responses:?}");
    assert!(responses[0].contains(" AUTH=PLAIN"), "{responses:?}");
    assert!(!responses[0].contains("STARTTLS") && !responses[0].contains("LOGINDISABLED"), "{responses:?}");
    assert!(client.answer("STARTTLS").starts_with("BAD "));
    client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    assert!(client.answer("STARTTLS").starts_with("BAD "));
    client.ok("SELECT INBOX");
    server.stop();
}

/// Trap 3: a client that was led here while it believes to speak another protocol.
#[test]
fn trap_3_another_protocol_is_refused() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    let with = |protocols: &[&str]| {
        let mut config = server.client_config();
        config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        Client::new(server.port("imaps")).into_tls(config)
    };
    let error = with(&["h2", "http/1.1"]).map(drop).unwrap_err();
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    let mut client = with(&["http/1.1", "imap"]).unwrap();
    assert_eq!(client.session().alpn_protocol(), Some(&b"imap"[..]));
    let error = {
        let mut config = server.client_config();
        config.alpn_protocols = vec![b"pop3".to_vec()];
        told_to_begin(&server, "").into_tls(config).map(drop).unwrap_err()
    };
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");

    // Nobody else notices what speaks no TLS at all.
    let mut bystander = imaps(&server);
    for nonsense in
        [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 3000], b"a LOGIN x y\r\n", &[0x16, 3, 1, 0xff, 0xff]]
    {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port("imaps"))).unwrap();
        stream.write_all(nonsense).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!text(&answer).contains("OK"));
    }
    bystander.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    server.stop();
}

#[test]
fn both_versions_are_spoken_and_the_older_can_be_forbidden() {
    let store = Store::with(&[ANN]);
    let connect = |server: &Server, version: &'static SupportedProtocolVersion| {
        Client::new(server.port("imaps")).into_tls(server.client_config_with(&[version]))
    };
    let server = store.serve_with(&[]);
    for version in [&TLS12, &TLS13] {
        let mut client = connect(&server, version).unwrap();
        assert_eq!(client.session().protocol_version(), Some(version.version));
        client.line();
        client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    }
    server.stop();
    let store = store.set("tls.minimum_version=\"1.3\"");
    let server = store.serve_with(&[]);
    assert!(connect(&server, &TLS12).is_err());
    assert!(connect(&server, &TLS13).is_ok());
    server.stop();
}

/// A session is resumed on whichever worker the client meets.
#[test]
fn sessions_are_resumed() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    let mut config = server.client_config();
    config.resumption = Resumption::in_memory_sessions(64);
    let mut kinds = Vec::new();
    for _ in 0..8 {
        let mut client = Client::new(server.port("imaps")).into_tls(config.clone()).unwrap();
        // The tickets of TLS 1.3 come with what follows the handshake.
        client.line();
        client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
        kinds.push(client.session().handshake_kind());
    }
    assert_eq!(kinds[0], Some(HandshakeKind::Full));
    assert!(kinds[1..].iter().all(|kind| *kind == Some(HandshakeKind::Resumed)), "{kinds:?}");
    server.stop();
}

/// New keys are no input: an idling client that asks for them hears of new mail all the same.
#[test]
fn idle_goes_on_through_a_change_of_keys() {
    let store = Store::with(&USERS);
    let server = store.serve_with(&[]);
    for user in USERS {
        let mut client = imaps(&server);
        client.ok(&format!("LOGIN {user} {PASSWORD}"));
        client.ok("SELECT INBOX");
        client.send("i IDLE\r\n");
        assert!(client.line().starts_with("+ "));
        client.session().refresh_traffic_keys().unwrap();
        client.send("");
        server.deliver(&[user], "Subject: hi\r\n\r\nx");
        assert_eq!(client.line(), "* 1 EXISTS");
        assert_eq!(client.line(), "* 1 RECENT");
        client.send("DONE\r\n");
        assert!(client.line().starts_with("i OK "));
    }
    server.stop();
}

/// A client that says goodbye in the middle of a session, and one that goes without a word.
#[test]
fn clients_that_leave() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    let mut client = imaps(&server);
    client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    client.session().send_close_notify();
    client.send("");
    assert!(client.ended());
    let mut client = imaps(&server);
    client.send("a LOGIN ");
    drop(client);
    imaps(&server).ok(&format!("LOGIN {ANN} {PASSWORD}"));
    server.stop();
}
