use proptest::prelude::*;

use super::*;
use crate::Code;

const BOTH: Security = Security { passwords: true, starttls: false };

/// Three messages; the last has no body and no line end.
const MESSAGES: [(&str, &str); 3] = [
    ("Subject: one\r\n\r\n", ".first\r\nsecond\r\n.\r\n"),
    ("Subject: two\r\n\r\n", "only\r\n"),
    ("Subject: three", ""),
];

fn octets(number: usize) -> u64 {
    let (header, body) = MESSAGES[number];
    let text = [header, body].concat();
    text.len() as u64 + crate::line_end_octets(text.ends_with("\r\n"))
}

fn maildrop() -> Maildrop {
    let mut maildrop = Maildrop::default();
    for (number, uid) in [3, 4, 9].into_iter().enumerate() {
        maildrop.push(Message { uid, octets: octets(number) });
    }
    maildrop.complete(0xabc)
}

/// Plays the server: the password is "secret", all else succeeds. Messages are written in pieces of one octet.
struct Server {
    session: Session,
    output: Vec<u8>,
    events: Vec<Event>,
    closed: bool,
}

impl Server {
    fn new(security: Security) -> Self {
        let mut output = Vec::new();
        let mut config = Config::new("store.example");
        config.errors_max = 5;
        let session = Session::new(Arc::new(config), security, &mut output);
        Self { session, output, events: Vec::new(), closed: false }
    }

    fn logged_in() -> Self {
        let mut server = Self::new(BOTH);
        server.say("USER ann\r\nPASS secret\r\n");
        server.output.clear();
        server.events.clear();
        server
    }

    fn say(&mut self, input: &str) -> String {
        self.take(input.as_bytes());
        String::from_utf8(std::mem::take(&mut self.output)).unwrap()
    }

    fn take(&mut self, input: &[u8]) {
        let mut at = 0;
        while !self.closed {
            let mut output = std::mem::take(&mut self.output);
            let (taken, event) = self.session.step(&input[at..], &mut output);
            at += taken;
            match &event {
                Event::NeedInput => {
                    assert_eq!(at, input.len());
                    self.output = output;
                    return;
                }
                Event::Flush => assert!(output.len() >= OUTPUT_BYTES),
                Event::LogIn(Credentials::Password { password, .. }) if password.0 == "secret" => {
                    self.session.open(maildrop(), &mut output);
                }
                Event::LogIn(Credentials::SaslPlain(response)) if response == b"AGFubgBzZWNyZXQ=" => {
                    self.session.open(maildrop(), &mut output);
                }
                Event::LogIn(_) => self.session.refuse(&Refusal::coded(Code::Auth, "Wrong"), &mut output),
                Event::StartTls => {
                    self.session.start_tls(&mut output);
                    self.session.tls_started();
                    at = input.len();
                }
                Event::Retrieve(wanted) => {
                    let number = [3, 4, 9].iter().position(|uid| *uid == wanted.uid).unwrap();
                    let (header, body) = MESSAGES[number];
                    self.session.begin_message(&mut output);
                    header.as_bytes().chunks(1).for_each(|piece| self.session.write_header(piece, &mut output));
                    if self.session.wants_body() {
                        let _ = body.as_bytes().chunks(1).all(|piece| self.session.write_body(piece, &mut output));
                    }
                    self.session.end_message(&mut output);
                }
                Event::Update(_) => self.session.updated(Ok(()), &mut output),
                Event::AnswerOwed => panic!("everything is answered"),
                Event::Close => self.closed = true,
            }
            self.output = output;
            self.events.push(event);
        }
    }
}

#[test]
fn a_session_from_greeting_to_quit() {
    let mut server = Server::new(BOTH);
    assert_eq!(server.say(""), "+OK store.example POP3 server ready\r\n");
    assert_eq!(server.say("USER ann\r\n"), "+OK Send the password\r\n");
    assert_eq!(server.say("PASS secret\r\n"), "+OK The maildrop has 3 messages (73 octets)\r\n");
    assert_eq!(server.say("STAT\r\n"), "+OK 3 73\r\n");
    assert_eq!(server.say("LIST\r\n"), "+OK 3 messages (73 octets)\r\n1 35\r\n2 22\r\n3 16\r\n.\r\n");
    assert_eq!(server.say("LIST 2\r\n"), "+OK 2 22\r\n");
    assert_eq!(
        server.say("UIDL\r\n"),
        "+OK Unique-ids follow\r\n1 0000000300000abc\r\n2 0000000400000abc\r\n3 0000000900000abc\r\n.\r\n"
    );
    assert_eq!(server.say("UIDL 3\r\n"), "+OK 3 0000000900000abc\r\n");
    assert_eq!(server.say("RETR 1\r\n"), "+OK 35 octets\r\nSubject: one\r\n\r\n..first\r\nsecond\r\n..\r\n.\r\n");
    assert_eq!(server.say("RETR 2\r\n"), "+OK 22 octets\r\nSubject: two\r\n\r\nonly\r\n.\r\n");
    assert_eq!(server.say("RETR 3\r\n"), "+OK 16 octets\r\nSubject: three\r\n.\r\n");
    assert_eq!(server.say("DELE 2\r\n"), "+OK Marked to be deleted at QUIT\r\n");
    assert_eq!(server.say("STAT\r\n"), "+OK 2 51\r\n");
    assert_eq!(server.say("LIST\r\n"), "+OK 2 messages (51 octets)\r\n1 35\r\n3 16\r\n.\r\n");
    for command in ["LIST 2", "UIDL 2", "RETR 2", "TOP 2 1", "DELE 2", "LIST 0", "RETR 4", "RETR 4294967296"] {
        assert_eq!(server.say(&format!("{command}\r\n")), "-ERR There is no such message\r\n", "{command}");
    }
    assert_eq!(server.say("NOOP\r\n"), "+OK Nothing done\r\n");
    server.events.clear();
    assert_eq!(server.say("QUIT\r\n"), "+OK Bye\r\n");
    let update = Update { deleted: [4].into(), retrieved: [3, 9].into() };
    assert_eq!(server.events, [Event::Update(update), Event::Close]);
}

#[test]
fn rset_unmarks_all() {
    let mut server = Server::logged_in();
    server.say("DELE 1\r\nDELE 3\r\n");
    assert_eq!(server.say("STAT\r\n"), "+OK 1 22\r\n");
    assert_eq!(server.say("RSET\r\n"), "+OK The maildrop has 3 messages (73 octets)\r\n");
    assert_eq!(server.say("STAT\r\n"), "+OK 3 73\r\n");
    server.say("QUIT\r\n");
    assert_eq!(server.events, [Event::Update(Update::default()), Event::Close]);
}

#[test]
fn top_has_the_header_the_empty_line_and_some_of_the_body() {
    let mut server = Server::logged_in();
    const OK: &str = "+OK The top of the message follows\r\n";
    for (command, text) in [
        ("TOP 1 0", "Subject: one\r\n\r\n.\r\n"),
        ("TOP 1 1", "Subject: one\r\n\r\n..first\r\n.\r\n"),
        ("TOP 1 3", "Subject: one\r\n\r\n..first\r\nsecond\r\n..\r\n.\r\n"),
        ("TOP 1 4294967295", "Subject: one\r\n\r\n..first\r\nsecond\r\n..\r\n.\r\n"),
        ("TOP 3 1", "Subject: three\r\n\r\n.\r\n"),
    ] {
        assert_eq!(server.say(&format!("{command}\r\n")), format!("{OK}{text}"), "{command}");
    }
    server.events.clear();
    server.say("QUIT\r\n");
    assert_eq!(server.events[0], Event::Update(Update::default()), "TOP is not a reading");
}

#[test]
fn each_command_has_its_state() {
    for command in ["STAT", "LIST", "UIDL", "RETR 1", "TOP 1 1", "DELE 1", "RSET", "NOOP"] {
        let mut server = Server::new(BOTH);
        server.output.clear();
        assert_eq!(server.say(&format!("{command}\r\n")), "-ERR Log in first\r\n");
    }
    for command in ["USER ann", "PASS secret", "AUTH PLAIN", "AUTH", "STLS"] {
        let mut server = Server::logged_in();
        assert_eq!(server.say(&format!("{command}\r\n")), "-ERR You are logged in already\r\n", "{command}");
    }
    let mut server = Server::new(BOTH);
    server.say("");
    assert_eq!(server.say("PASS secret\r\n"), "-ERR Say USER first\r\n");
    assert_eq!(server.say("USER ann\r\nPASS wrong\r\n"), "+OK Send the password\r\n-ERR [AUTH] Wrong\r\n");
    assert_eq!(server.say("PASS secret\r\n"), "-ERR Say USER first\r\n", "it has to be said again");
    assert_eq!(server.say("QUIT\r\n"), "+OK Bye\r\n");
    assert!(server.closed);
    assert!(!server.events.iter().any(|event| matches!(event, Event::Update(_))), "nobody has logged in");
}

#[test]
fn auth_plain() {
    let mut server = Server::new(BOTH);
    server.say("");
    assert_eq!(server.say("AUTH\r\n"), "+OK Mechanisms follow\r\nPLAIN\r\n.\r\n");
    assert!(server.say("AUTH CRAM-MD5\r\n").starts_with("-ERR There is no such mechanism"));
    assert_eq!(server.say("AUTH PLAIN\r\n"), "+ \r\n");
    assert_eq!(server.say("*\r\n"), "-ERR Cancelled\r\n");
    assert_eq!(server.say("AUTH PLAIN =\r\n"), "-ERR [AUTH] Wrong\r\n");
    assert_eq!(server.events.pop(), Some(Event::LogIn(Credentials::SaslPlain(Vec::new()))));
    assert_eq!(server.say("AUTH PLAIN\r\n\r\n"), "+ \r\n-ERR [AUTH] Wrong\r\n");
    assert!(server.say("auth plain AGFubgBzZWNyZXQ=\r\n").starts_with("+OK The maildrop"));
    let mut server = Server::new(BOTH);
    server.say("");
    assert_eq!(
        server.say("AUTH PLAIN\r\nAGFubgBzZWNyZXQ=\r\nSTAT\r\n"),
        "+ \r\n+OK The maildrop has 3 messages (73 octets)\r\n+OK 3 73\r\n"
    );
    // A response may be longer than a command.
    let mut server = Server::new(BOTH);
    server.say("");
    let long = "A".repeat(SASL_LINE_BYTES_MAX - 2);
    assert_eq!(server.say(&format!("AUTH PLAIN\r\n{long}\r\n")), "+ \r\n-ERR [AUTH] Wrong\r\n");
    assert_eq!(server.say(&format!("AUTH PLAIN\r\n{long}A\r\n")), "+ \r\n-ERR The line is too long\r\n");
    assert_eq!(server.say(&format!("USER {}\r\n", "a".repeat(248))), "+OK Send the password\r\n");
    assert_eq!(server.say(&format!("USER {}\r\n", "a".repeat(249))), "-ERR The line is too long\r\n");
}

#[test]
fn capabilities_follow_what_is_possible() {
    let capabilities = |security, logged_in| {
        let mut server = if logged_in { Server::logged_in() } else { Server::new(security) };
        server.say("");
        let text = server.say("CAPA\r\n");
        let text = text.strip_prefix("+OK Capabilities follow\r\n").unwrap().strip_suffix(".\r\n").unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let always = ["TOP", "UIDL", "RESP-CODES", "AUTH-RESP-CODE", "PIPELINING", "EXPIRE NEVER"];
    let has = |list: &[String], name: &str| list.iter().any(|entry| entry == name);
    let (none, tls) = (Security { passwords: false, starttls: false }, Security { passwords: false, starttls: true });
    for (security, logged_in, more, less) in [
        (none, false, vec![], vec!["USER", "SASL PLAIN", "STLS"]),
        (tls, false, vec!["STLS"], vec!["USER", "SASL PLAIN"]),
        (BOTH, false, vec!["USER", "SASL PLAIN"], vec!["STLS"]),
        (BOTH, true, vec!["USER", "SASL PLAIN"], vec!["STLS"]),
    ] {
        let list = capabilities(security, logged_in);
        assert!(always.iter().chain(&more).all(|name| has(&list, name)), "{list:?}");
        assert!(!less.iter().any(|name| has(&list, name)), "{list:?}");
    }
}

#[test]
fn passwords_are_refused_before_they_are_sent() {
    let mut server = Server::new(Security { passwords: false, starttls: true });
    server.say("");
    for command in ["USER ann", "AUTH PLAIN", "AUTH PLAIN AGFubgBzZWNyZXQ="] {
        let answer = server.say(&format!("{command}\r\n"));
        // Trap 47: [AUTH] would make a client forget a password that is right.
        assert_eq!(answer, "-ERR No passwords without TLS: say STLS first\r\n", "{command}");
    }
    assert_eq!(server.say("AUTH\r\n"), "+OK Mechanisms follow\r\n.\r\n");
    assert_eq!(server.say("PASS secret\r\n"), "-ERR Say USER first\r\n");
    assert!(server.events.is_empty());
}

/// Traps 1, 2 and 31: what came before TLS counts no more, and other capabilities are announced after it.
#[test]
fn trap_01_nothing_said_before_tls_counts_after_it() {
    let mut server = Server::new(Security { passwords: true, starttls: true });
    server.say("");
    assert_eq!(server.say("STLS x\r\n"), "-ERR No arguments expected\r\n");
    assert_eq!(server.say("USER ann\r\nSTLS\r\nPASS secret\r\n"), "+OK Send the password\r\n+OK Begin TLS now\r\n");
    assert_eq!(server.say("PASS secret\r\n"), "-ERR Say USER first\r\n", "the name is forgotten");
    assert_eq!(server.say("STLS\r\n"), "-ERR TLS cannot be begun here\r\n");
    let capabilities = server.say("CAPA\r\n");
    assert!(capabilities.contains("\r\nUSER\r\n") && !capabilities.contains("STLS"), "{capabilities}");
}

/// A session between STLS and TLS takes nothing, so that a caller who forgets to drop input does not run it.
#[test]
fn trap_02_input_waits_for_tls() {
    let mut output = Vec::new();
    let security = Security { passwords: true, starttls: true };
    let mut session = Session::new(Arc::new(Config::new("x")), security, &mut output);
    let (taken, event) = session.step(b"STLS\r\nQUIT\r\n", &mut output);
    assert_eq!((taken, event), (6, Event::StartTls));
    session.start_tls(&mut output);
    assert_eq!(session.step(b"QUIT\r\n", &mut output), (0, Event::AnswerOwed));
}

#[test]
fn too_many_bad_commands_end_the_connection() {
    let mut server = Server::new(BOTH);
    server.say("");
    let answers = server.say(&"GET / HTTP/1.1\r\n".repeat(9));
    let last = "-ERR Too many bad commands, closing the connection\r\n";
    assert_eq!(answers, format!("{}{last}", "-ERR Unknown command\r\n".repeat(4)));
    assert!(server.closed);
}

/// Trap 5: also what never ends costs bounded memory and an answer.
#[test]
fn trap_05_a_line_without_end_closes_the_connection() {
    let mut server = Server::new(BOTH);
    server.say("");
    for _ in 0..100 {
        server.take(&[b'A'; 1000]);
    }
    assert!(server.closed);
    assert_eq!(server.say(""), "-ERR A line does not end, closing the connection\r\n");
}

/// Trap 6: whatever it is, it is answered.
#[test]
fn odd_lines_are_refused_one_by_one() {
    let mut server = Server::logged_in();
    server.take(b"NOOP\0\r\n\xff\xfe\r\nNOOP\r\r\n\r\nSTAT\n");
    let answers = server.say("");
    assert_eq!(answers.matches("-ERR").count(), 4, "{answers}");
    assert!(answers.ends_with("\r\n+OK 3 73\r\n"), "{answers}");
}

#[test]
fn a_message_that_breaks_off_is_not_ended() {
    let mut output = Vec::new();
    let mut session = Session::new(Arc::new(Config::new("x")), BOTH, &mut output);
    let input = b"USER a\r\nPASS b\r\nRETR 1\r\n";
    let (taken, _) = session.step(input, &mut output);
    session.open(maildrop(), &mut output);
    let (_, event) = session.step(&input[taken..], &mut output);
    assert_eq!(event, Event::Retrieve(Retrieve { uid: 3, lines: None }));
    session.begin_message(&mut output);
    session.write_header(b"Subject: one\r\n", &mut output);
    session.close(&Refusal::coded(Code::SysTemp, "Broken"), &mut output);
    assert!(output.ends_with(b"+OK 35 octets\r\nSubject: one\r\n"));
    assert_eq!(session.step(b"", &mut output).1, Event::Close);
}

#[test]
fn a_failed_update_says_so() {
    let mut output = Vec::new();
    let mut session = Session::new(Arc::new(Config::new("x")), BOTH, &mut output);
    let input = b"USER a\r\nPASS b\r\nDELE 1\r\nQUIT\r\n";
    let (taken, _) = session.step(input, &mut output);
    session.open(maildrop(), &mut output);
    assert!(matches!(session.step(&input[taken..], &mut output).1, Event::Update(_)));
    output.clear();
    session.updated(Err(Refusal::coded(Code::SysTemp, "Not deleted")), &mut output);
    assert_eq!(output, b"-ERR [SYS/TEMP] Not deleted\r\n");
    assert_eq!(session.step(b"NOOP\r\n", &mut output).1, Event::Close);
}

#[test]
fn long_lists_come_in_parts() {
    let mut output = Vec::new();
    let mut session = Session::new(Arc::new(Config::new("x")), BOTH, &mut output);
    let mut input: &[u8] = b"USER a\r\nPASS b\r\nUIDL\r\nNOOP\r\n";
    let mut all = Vec::new();
    loop {
        let (taken, event) = session.step(input, &mut output);
        input = &input[taken..];
        match event {
            Event::LogIn(_) => {
                let mut maildrop = Maildrop::default();
                (1..=100_000).for_each(|uid| maildrop.push(Message { uid, octets: 1000 }));
                session.open(maildrop.complete(1), &mut output);
            }
            Event::Flush => {
                assert!(output.len() < OUTPUT_BYTES + 100);
                all.append(&mut output);
            }
            event => break assert_eq!(event, Event::NeedInput),
        }
    }
    all.append(&mut output);
    let text = String::from_utf8(all).unwrap();
    assert_eq!(text.lines().count(), 3 + 1 + 100_000 + 1 + 1);
    assert!(text.ends_with("\r\n100000 000186a000000001\r\n.\r\n+OK Nothing done\r\n"));
}

proptest! {
    /// Replies do not depend on how the input was cut.
    #[test]
    fn the_input_may_be_cut_anywhere(
        commands in proptest::collection::vec(
            prop::sample::select(vec![
                "USER ann\r\n", "PASS secret\r\n", "PASS x\n", "AUTH PLAIN\r\n", "AGFubgBzZWNyZXQ=\r\n", "*\r\n", "CAPA\r\n",
                "STAT\r\n", "LIST\r\n", "UIDL\n", "RETR 1\r\n", "TOP 1 1\r\n", "DELE 1\r\n", "DELE 2\r\n", "RSET\r\n",
                "NOOP\r\n", "QUIT\r\n", "\r\n", "X\0\r\n", "\r\r\n", "LIST 9\r\n",
                "TOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONG\
                 TOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONG\
                 TOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONGTOOLONG\r\n",
            ]),
            0..30,
        ),
        cuts in proptest::collection::vec(1..40_usize, 1..40),
    ) {
        let input = commands.concat();
        let mut whole = Server::new(BOTH);
        whole.take(input.as_bytes());
        let mut cut = Server::new(BOTH);
        let mut rest = input.as_bytes();
        for &len in cuts.iter().cycle() {
            let (piece, after) = rest.split_at(len.min(rest.len()));
            cut.take(piece);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(String::from_utf8(cut.output), String::from_utf8(whole.output));
        prop_assert_eq!(cut.events, whole.events);
    }

    /// Nothing that a client sends is more than it can stand.
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let mut server = Server::logged_in();
        server.take(&bytes);
        prop_assert!(server.output.is_empty() || server.output.ends_with(b"\r\n"));
    }
}
