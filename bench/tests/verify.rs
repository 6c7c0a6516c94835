//! The verifier against servers that lose, double, alter, misplace and refuse on purpose: each must be caught.
#![expect(clippy::unwrap_used, reason = "a helper that panics fails its test")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What a server does wrong, with every tenth message if it is about messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// Adds Return-Path, Delivered-To and Received before each message, which it may.
    Traces,
    Loses,
    Doubles,
    /// Changes the last letter of the body.
    AltersBody,
    /// Changes a letter of the header.
    AltersHeader,
    CutsOff,
    /// Ends lines with LF.
    LineEnds,
    AddsHeader,
    /// Gives it to another user.
    Misplaces,
    /// Refuses after the dot and keeps the message.
    KeepsRefused,
    /// Refuses after the dot.
    RefusesSome,
    RefusesRecipients,
    RefusesAll,
    RefusesLogins,
    /// Refuses one user's login.
    RefusesOneLogin,
    /// Says that there are messages and does not give them.
    HidesMessages,
    /// Ends the connection instead of answering, and keeps the message.
    NeverAnswers,
}

#[derive(Default)]
struct Store {
    mailboxes: Mutex<BTreeMap<String, Vec<Vec<u8>>>>,
    messages: AtomicU64,
}

type Stream = BufReader<TcpStream>;

fn listen(serve: impl Fn(Stream) -> Option<()> + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = Arc::new(serve);
    let accept = move || {
        for stream in listener.incoming() {
            let (serve, stream) = (Arc::clone(&serve), stream.unwrap());
            stream.set_nodelay(true).unwrap();
            thread::Builder::new().spawn(move || serve(BufReader::new(stream))).unwrap();
        }
    };
    thread::Builder::new().spawn(accept).unwrap();
    address
}

/// `None` at the end of the connection.
fn line(stream: &mut Stream) -> Option<String> {
    let mut line = String::new();
    (stream.read_line(&mut line).ok()? > 0).then_some(line)
}

fn say(stream: &mut Stream, text: impl AsRef<[u8]>) -> Option<()> {
    stream.get_mut().write_all(text.as_ref()).ok()
}

fn lmtp(stream: &mut Stream, store: &Store, fault: Fault) -> Option<()> {
    say(stream, "220 x\r\n")?;
    let mut recipients = Vec::new();
    loop {
        let command = line(stream)?;
        match command.get(..4)? {
            "LHLO" | "EHLO" => say(stream, "250-x\r\n250 PIPELINING\r\n")?,
            "RCPT" => {
                let user = command.trim().strip_prefix("RCPT TO:<")?.strip_suffix('>')?;
                if fault == Fault::RefusesAll || (fault == Fault::RefusesRecipients && user.starts_with("user2@")) {
                    say(stream, "550 5.1.1 no\r\n")?;
                } else {
                    recipients.push(user.to_owned());
                    say(stream, "250 x\r\n")?;
                }
            }
            "DATA" if recipients.is_empty() => say(stream, "503 no\r\n")?,
            "DATA" => {
                say(stream, "354 x\r\n")?;
                let mut message = Vec::new();
                loop {
                    let text = line(stream)?;
                    if text == ".\r\n" {
                        break;
                    }
                    message.extend_from_slice(text.strip_prefix('.').unwrap_or(&text).as_bytes());
                }
                for user in recipients.drain(..) {
                    let reply = take(store, fault, &user, &message)?;
                    say(stream, reply)?;
                }
            }
            "QUIT" => return say(stream, "221 x\r\n"),
            _ => say(stream, "250 x\r\n")?,
        }
    }
}

/// Keeps a message, or does with it what is wrong; the reply, or `None` to end the connection.
fn take(store: &Store, fault: Fault, user: &str, message: &[u8]) -> Option<&'static str> {
    if store.messages.fetch_add(1, Ordering::SeqCst) % 10 == 3 {
        return keep_badly(store, fault, user, message);
    }
    keep(store, user, with_traces(fault, message));
    Some("250 x\r\n")
}

fn with_traces(fault: Fault, message: &[u8]) -> Vec<u8> {
    if fault != Fault::Traces {
        return message.to_vec();
    }
    let traces = "Return-Path: <a@b>\r\nDelivered-To: x\r\nReceived: from a\r\n\tby b;\r\n Tue\r\n";
    [traces.as_bytes(), message].concat()
}

fn keep(store: &Store, user: &str, message: Vec<u8>) {
    store.mailboxes.lock().unwrap().entry(user.to_owned()).or_default().push(message);
}

/// Does what is wrong, and the reply; `None` ends the connection.
fn keep_badly(store: &Store, fault: Fault, user: &str, message: &[u8]) -> Option<&'static str> {
    let mut changed = with_traces(fault, message);
    let length = changed.len();
    match fault {
        Fault::Loses => return Some("250 x\r\n"),
        Fault::RefusesSome => return Some("452 full\r\n"),
        Fault::Doubles => keep(store, user, message.to_vec()),
        Fault::AltersBody => changed[length - 3] ^= 1,
        Fault::AltersHeader => {
            let at = message.windows(9).position(|window| window == b"Subject: ").unwrap();
            changed[at + 9] ^= 0x20;
        }
        Fault::CutsOff => changed.truncate(length / 2),
        Fault::LineEnds => changed.retain(|octet| *octet != b'\r'),
        Fault::AddsHeader => changed = [b"X-Spam: no\r\n", message].concat(),
        Fault::Misplaces => {
            let other =
                if user.starts_with("user1@") { user.replacen('1', "2", 1) } else { user.replacen('2', "1", 1) };
            keep(store, &other, changed);
            return Some("250 x\r\n");
        }
        _ => {}
    }
    keep(store, user, changed);
    match fault {
        Fault::KeepsRefused => Some("451 perhaps\r\n"),
        Fault::NeverAnswers => None,
        _ => Some("250 x\r\n"),
    }
}

fn may_log_in(fault: Fault, user: &str) -> bool {
    match fault {
        Fault::RefusesLogins => false,
        Fault::RefusesOneLogin => !user.starts_with("user2@"),
        _ => true,
    }
}

fn imap(stream: &mut Stream, store: &Store, fault: Fault) -> Option<()> {
    say(stream, "* OK x\r\n")?;
    let (mut mail, mut name) = (Vec::new(), String::new());
    loop {
        let command = line(stream)?;
        let words: Vec<&str> = command.split_ascii_whitespace().collect();
        let (tag, mut result) = (*words.first()?, "OK");
        match *words.get(1)? {
            "LOGIN" => {
                let user = words.get(2)?.trim_matches('"');
                user.clone_into(&mut name);
                if may_log_in(fault, user) {
                    mail = store.mailboxes.lock().unwrap().get(user).cloned().unwrap_or_default();
                } else {
                    result = "NO";
                }
            }
            "CAPABILITY" => say(stream, "* CAPABILITY IMAP4rev1\r\n")?,
            "LIST" => say(stream, "* LIST () \"/\" INBOX\r\n")?,
            "APPEND" => {
                let octets = command.trim().strip_suffix('}')?.rsplit_once('{')?.1.parse().ok()?;
                say(stream, "+ x\r\n")?;
                let mut message = vec![0; octets];
                stream.read_exact(&mut message).ok()?;
                line(stream)?;
                if !take(store, fault, &name, &message)?.starts_with("250") {
                    result = "NO";
                }
            }
            "EXAMINE" => say(stream, format!("* {} EXISTS\r\n", mail.len()))?,
            "FETCH" => {
                let (first, last) = words.get(2)?.split_once(':')?;
                for number in first.parse::<usize>().ok()?..=last.parse().ok()? {
                    if fault == Fault::HidesMessages && number == 2 {
                        continue;
                    }
                    let message: &Vec<u8> = mail.get(number - 1)?;
                    say(stream, format!("* {number} FETCH (FLAGS () BODY[] {{{}}}\r\n", message.len()))?;
                    say(stream, message)?;
                    say(stream, ")\r\n")?;
                }
            }
            "LOGOUT" => say(stream, "* BYE x\r\n")?,
            _ => result = "BAD",
        }
        say(stream, format!("{tag} {result} x\r\n"))?;
    }
}

fn pop3(stream: &mut Stream, store: &Store, fault: Fault) -> Option<()> {
    say(stream, "+OK x\r\n")?;
    let (mut user, mut mail) = (String::new(), Vec::new());
    loop {
        let command = line(stream)?;
        let (name, argument) = command.trim().split_once(' ').unwrap_or((command.trim(), ""));
        match name {
            "USER" => {
                user = argument.to_owned();
                say(stream, "+OK\r\n")?;
            }
            "PASS" if may_log_in(fault, &user) => {
                mail = store.mailboxes.lock().unwrap().get(&user).cloned().unwrap_or_default();
                say(stream, "+OK\r\n")?;
            }
            "STAT" => say(stream, format!("+OK {} 1\r\n", mail.len()))?,
            "RETR" => {
                let number: usize = argument.parse().ok()?;
                if fault == Fault::HidesMessages && number == 2 {
                    say(stream, "-ERR gone\r\n")?;
                    continue;
                }
                say(stream, "+OK\r\n")?;
                let message: &Vec<u8> = mail.get(number - 1)?;
                for line in message.split_inclusive(|octet| *octet == b'\n') {
                    if line.starts_with(b".") {
                        say(stream, ".")?;
                    }
                    say(stream, line)?;
                }
                // POP3 cannot tell of a message whose last line has no end.
                say(stream, if message.ends_with(b"\r\n") { ".\r\n" } else { "\r\n.\r\n" })?;
            }
            "QUIT" => return say(stream, "+OK\r\n"),
            _ => say(stream, "-ERR\r\n")?,
        }
    }
}

/// Delivers 40 messages to two users and verifies; what the program exits with, its report and what it said.
fn verify(fault: Fault, protocol: &str, options: &[&str]) -> (Option<i32>, serde_json::Value, String) {
    verify_by("--lmtp", fault, protocol, options)
}

fn verify_by(
    delivery: &str,
    fault: Fault,
    protocol: &str,
    options: &[&str],
) -> (Option<i32>, serde_json::Value, String) {
    let store = Arc::new(Store::default());
    let (of_lmtp, of_reader) = (Arc::clone(&store), store);
    let address = listen(move |mut stream| lmtp(&mut stream, &of_lmtp, fault));
    let reader = match protocol {
        "imap" => listen(move |mut stream| imap(&mut stream, &of_reader, fault)),
        _ => listen(move |mut stream| pop3(&mut stream, &of_reader, fault)),
    };
    let output: Output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
        .args(["deliver", "--json", "--timeout", "5", "--messages", "40", "--user-count", "2", "--size", "900"])
        .args([delivery, &address, "--verify", &format!("--verify-{protocol}"), &reader, "--password", "p"])
        .args(options)
        .output()
        .unwrap();
    let (mut text, mut errors) = (String::new(), String::new());
    output.stdout.as_slice().read_to_string(&mut text).unwrap();
    output.stderr.as_slice().read_to_string(&mut errors).unwrap();
    assert!(!text.is_empty(), "{fault:?}: {errors}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    (output.status.code(), report["verdict"].clone(), errors)
}

#[test]
fn delivery_by_smtp_is_verified() {
    for (fault, expected) in [(Fault::None, 0), (Fault::Loses, 3), (Fault::KeepsRefused, 2), (Fault::RefusesAll, 4)] {
        let (code, verdict, errors) = verify_by("--smtp", fault, "imap", &[]);
        assert_eq!(code, Some(expected), "{fault:?}: {errors} {verdict}");
    }
}

#[test]
fn appended_messages_are_verified() {
    for (fault, expected, what, count) in [
        (Fault::None, 0, "proven", 40),
        (Fault::Loses, 3, "lost", 4),
        (Fault::Doubles, 3, "doubled", 4),
        (Fault::AltersBody, 3, "altered", 4),
        (Fault::Misplaces, 3, "strayed", 4),
        (Fault::RefusesSome, 2, "refused", 4),
        (Fault::KeepsRefused, 2, "present_though_refused", 4),
        (Fault::NeverAnswers, 2, "present_though_unanswered", 4),
        (Fault::HidesMessages, 4, "mailboxes_unread", 2),
    ] {
        let store = Arc::new(Store::default());
        let address = listen(move |mut stream| imap(&mut stream, &store, fault));
        let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
            .args(["append", "--json", "--timeout", "5", "--messages", "40", "--user-count", "2", "--connections", "2"])
            .args(["--imap", &address, "--password", "p", "--verify", "--verify-imap", &address])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(!text.is_empty(), "{fault:?}: {}", String::from_utf8_lossy(&output.stderr));
        let report: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(output.status.code(), Some(expected), "{fault:?}: {report}");
        assert_eq!(report["verdict"][what], count, "{fault:?}: {report}");
    }
}

#[test]
fn honest_servers_are_proven() {
    for protocol in ["imap", "pop3"] {
        for fault in [Fault::None, Fault::Traces] {
            for options in [&[][..], &["--connections", "4"], &["--recipients", "2"], &["--no-pipelining"]] {
                let (code, verdict, errors) = verify(fault, protocol, options);
                assert_eq!(code, Some(0), "{fault:?} {protocol}: {errors} {verdict}");
                let sent = if options.contains(&"2") { 80 } else { 40 };
                assert_eq!((&verdict["proven"], &verdict["acknowledged"]), (&sent.into(), &sent.into()), "{verdict}");
                assert_eq!(verdict["mailboxes"], 2);
            }
        }
    }
}

#[test]
fn what_is_wrong_is_caught() {
    for protocol in ["imap", "pop3"] {
        for (fault, what) in [
            (Fault::Loses, "lost"),
            (Fault::Doubles, "doubled"),
            (Fault::AltersBody, "altered"),
            (Fault::AltersHeader, "altered"),
            (Fault::CutsOff, "altered"),
            (Fault::LineEnds, "altered"),
            (Fault::AddsHeader, "altered"),
            (Fault::Misplaces, "strayed"),
        ] {
            let (code, verdict, errors) = verify(fault, protocol, &[]);
            assert_eq!(code, Some(3), "{fault:?} {protocol}: {errors} {verdict}");
            assert_eq!(verdict[what], 4, "{fault:?} {protocol}: {verdict}");
            assert!(errors.contains("verification failed"), "{errors}");
            assert!(!verdict["findings"].as_array().unwrap().is_empty(), "{verdict}");
        }
    }
    let (_, verdict, _) = verify(Fault::Misplaces, "imap", &[]);
    assert_eq!(verdict["lost"], 4, "it is also missing where it should be: {verdict}");
}

#[test]
fn a_header_can_be_allowed() {
    let (code, verdict, errors) = verify(Fault::AddsHeader, "imap", &["--verify-header", "X-Spam"]);
    assert_eq!(code, Some(0), "{errors} {verdict}");
}

#[test]
fn what_was_refused_is_no_loss() {
    for protocol in ["imap", "pop3"] {
        for (fault, refused, present) in
            [(Fault::RefusesSome, 4, 0), (Fault::KeepsRefused, 4, 4), (Fault::RefusesRecipients, 20, 0)]
        {
            for options in [&[][..], &["--no-pipelining"]] {
                let (code, verdict, errors) = verify(fault, protocol, options);
                // The refusals themselves are errors of the run.
                assert_eq!(code, Some(2), "{fault:?} {protocol}: {errors} {verdict}");
                assert_eq!(verdict["refused"], refused, "{fault:?}: {verdict}");
                assert_eq!(verdict["present_though_refused"], present, "{fault:?}: {verdict}");
                assert_eq!(verdict["proven"], 40 - refused, "{fault:?}: {verdict}");
            }
        }
    }
}

#[test]
fn what_was_not_answered_is_no_loss() {
    let (code, verdict, errors) = verify(Fault::NeverAnswers, "imap", &[]);
    assert_eq!(code, Some(2), "{errors} {verdict}");
    assert_eq!((&verdict["unanswered"], &verdict["present_though_unanswered"]), (&4.into(), &4.into()), "{verdict}");
    assert_eq!(verdict["proven"], 36);
}

#[test]
fn not_to_have_looked_is_a_failure() {
    for protocol in ["imap", "pop3"] {
        for (fault, unread) in
            [(Fault::RefusesLogins, 2), (Fault::RefusesOneLogin, 1), (Fault::HidesMessages, 2), (Fault::RefusesAll, 0)]
        {
            let (code, verdict, errors) = verify(fault, protocol, &[]);
            assert_eq!(code, Some(4), "{fault:?} {protocol}: {errors} {verdict}");
            assert_eq!(verdict["mailboxes_unread"], unread, "{fault:?}: {verdict}");
            assert!(errors.contains("nothing is proven"), "{errors}");
        }
    }
}

#[test]
fn a_reader_that_is_not_there_is_a_failure() {
    let store = Arc::new(Store::default());
    let address = listen(move |mut stream| lmtp(&mut stream, &store, Fault::None));
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let arguments = ["--messages", "3", "--verify", "--verify-imap", &nobody, "--password", "p"];
    let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
        .args(["deliver", "--lmtp", &address])
        .args(arguments)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
}

#[test]
fn to_verify_one_must_be_able_to_read() {
    for options in [&["--verify"][..], &["--verify", "--verify-imap", "127.0.0.1:1"], &["--verify-imap", "127.0.0.1:1"]]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
            .args(["deliver", "--lmtp", "127.0.0.1:1"])
            .args(options)
            .output()
            .unwrap();
        assert!(!output.status.success(), "{options:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--"), "{options:?}");
    }
}
