//! Sequence sets, partials, dates and other values at their edges, and what is no command at all.

use crate::wire::Running;

/// RFC 3501, 9 (`seq-number`): a sequence number past the last message is BAD, "This includes `*` if the selected mailbox is
/// empty"; UIDs that do not exist are passed over (6.4.8).
#[test]
fn sets_in_an_empty_mailbox() {
    let running = Running::new();
    let mut client = running.select("INBOX");
    client.ok("CREATE Other");
    for set in ["*", "1", "1:*", "*:4", "4:*"] {
        for command in ["FETCH # FLAGS", "STORE # +FLAGS (\\Seen)", "COPY # Other", "MOVE # Other"] {
            let command = command.replace('#', set);
            assert!(client.answer(&command).starts_with("BAD "), "{command}");
            assert_eq!(client.ok(format!("UID {command}")), [""; 0], "{command}");
        }
        // Clients search in ranges without asking how many there are.
        assert_eq!(client.search(set), [0_u32; 0], "{set}");
        assert_eq!(client.search(format!("UID {set}")), [0_u32; 0], "{set}");
        assert_eq!(client.ok(format!("UID EXPUNGE {set}")), [""; 0], "{set}");
    }
    running.stop();
}

#[test]
fn sets_in_both_directions() {
    let running = Running::new();
    let mut client = running.login();
    client.fill("INBOX", 3);
    client.ok("SELECT INBOX");
    for (set, found) in [("*", &[3][..]), ("3:*", &[3]), ("*:2", &[2, 3]), ("3:1,2", &[1, 2, 3]), ("1,1,1:1", &[1])] {
        let fetched: Vec<String> = found.iter().map(|n| format!("* {n} FETCH (UID {n})")).collect();
        assert_eq!(client.ok(format!("FETCH {set} UID")), fetched, "{set}");
        assert_eq!(client.ok(format!("UID FETCH {set} (UID)")), fetched, "{set}");
        assert_eq!(client.search(set), found, "{set}");
    }
    // RFC 3501, 6.4.8: "a UID range ... always includes the UID of the last message".
    for set in ["4:*", "*:4", "4294967295:*", "100:*"] {
        assert_eq!(client.ok(format!("UID FETCH {set} UID")), ["* 3 FETCH (UID 3)"], "{set}");
        assert!(client.answer(format!("FETCH {set} UID")).starts_with("BAD "), "{set}");
    }
    assert_eq!(client.ok("UID FETCH 4294967295 UID"), [""; 0]);
    assert_eq!(client.search("2:9"), [2, 3]);
    assert_eq!(client.search("UID 4294967295"), [0_u32; 0]);
    for bad in [
        "0",
        "0:1",
        "1:0",
        "4294967296",
        "99999999999999999999",
        "-1",
        "1:",
        ":1",
        "1,",
        ",1",
        "1:2:3",
        "a",
        "1;2",
        "",
        "1 ",
        "$",
    ] {
        assert!(client.answer(format!("FETCH {bad} UID")).starts_with("BAD "), "{bad:?}");
        assert!(client.answer(format!("UID SEARCH UID {bad}")).starts_with("BAD "), "{bad:?}");
    }
    running.stop();
}

/// RFC 3501, 6.4.5: a partial past the end is empty, and its origin is echoed.
#[test]
fn partials() {
    let running = Running::new();
    let mut client = running.login();
    let message = "Subject: x\r\n\r\n0123456789";
    assert!(client.append("INBOX", "", message).starts_with("OK "));
    client.ok("SELECT INBOX");
    for (item, value) in [
        ("BODY[]<0.4>", "{4}\r\nSubj"),
        ("BODY[TEXT]<8.100>", "{2}\r\n89"),
        ("BODY[TEXT]<10.1>", "\"\""),
        ("BODY[TEXT]<11.1>", "\"\""),
        ("BODY[TEXT]<4294967295.4294967295>", "\"\""),
        ("BODY[1]<2.3>", "{3}\r\n234"),
        ("BODY[HEADER]<9.100>", "{5}\r\nx\r\n\r\n"),
        ("BODY[HEADER.FIELDS (SUBJECT)]<1.3>", "{3}\r\nubj"),
        ("BODY[2]<0.1>", "NIL"),
    ] {
        let name = format!("{}>", item.split('.').take(item.matches('.').count()).collect::<Vec<_>>().join("."));
        assert_eq!(
            client.ok(format!("FETCH 1 {}", item.replace("BODY[", "BODY.PEEK["))),
            [format!("* 1 FETCH ({name} {value})")]
        );
    }
    for bad in ["<0.0>", "<1>", "<1.>", "<.1>", "<1.2", "<-1.2>", "<1.2>3", "<9223372036854775808.1>"] {
        assert!(client.answer(format!("FETCH 1 BODY.PEEK[]{bad}")).starts_with("BAD "), "{bad}");
    }
    assert_eq!(client.search("SEEN"), [0_u32; 0], "peeking");
    running.stop();
}

/// Trap 17, and RFC 3501, 9: no NUL anywhere but in literal8; and no command breaks the connection.
#[test]
fn trap_17_what_is_no_command_costs_one_bad() {
    let running = Running::new();
    let mut client = running.login();
    for bad in [
        &b"NO\0OP"[..],
        b"SELECT \"IN\0BOX\"",
        b"SELECT {3+}\r\na\0b",
        b"LIST \"\" \"\0\"",
        b"SELECT \"a",
        b"SELECT \xff",
        b"SELECT",
        b"SELECT INBOX extra",
        b"FETCH 1 UID",
        b"APPEND INBOX \"31-Feb-2024 00:00:00 +0000\" {1+}\r\na",
        b"APPEND INBOX \"01-Jan-2024 24:00:00 +0000\" {1+}\r\na",
        b"LOGIN a b",
        b"UID",
        b"UID NOOP",
        b"STATUS INBOX ()",
        b"STATUS INBOX (FOO)",
        b"STORE 1 FLAGS",
        b"ENABLE",
        b"(NOOP)",
    ] {
        let answer = client.answer(bad);
        assert!(answer.starts_with("BAD "), "{}: {answer}", String::from_utf8_lossy(bad));
    }
    let answer = client.answer(b"APPEND INBOX {3+}\r\na\0b");
    assert!(answer.starts_with("NO [CANNOT] ") && answer.contains("NUL"), "{answer}");
    assert!(client.answer(b"APPEND INBOX ~{3+}\r\na\0b").starts_with("NO [CANNOT] "), "BINARY is not offered");
    assert!(client.append("INBOX", "", "ab").starts_with("OK "));
    assert_eq!(client.ok("STATUS INBOX (MESSAGES)"), ["* STATUS INBOX (MESSAGES 1)"]);
    running.stop();
}

/// RFC 3501, 2.2.1 and 4.3; RFC 7888: literals of both kinds anywhere, and the limits before and after login.
#[test]
fn literals() {
    let running = Running::new();
    let mut client = running.connect();
    client.send("a LOGIN {15}\r\n");
    assert!(client.line().starts_with("+ "));
    client.send("ann@example.org {6+}\r\nsecret\r\n");
    let logged_in = client.until("a").pop().expect("an answer");
    assert!(logged_in.contains("LITERAL+"), "{logged_in}");
    client.send("b SELECT {5}\r\n");
    assert!(client.line().starts_with("+ "));
    client.send("InBoX\r\n");
    assert!(client.until("b").pop().expect("an answer").starts_with("b OK [READ-WRITE] "));
    assert_eq!(client.search("SUBJECT {0+}\r\n"), [0_u32; 0]);
    // Not announced with a continuation, not taken: the client may go on with the next command.
    client.send("c APPEND INBOX {99999999999}\r\n");
    assert!(client.line().starts_with("c NO [TOOBIG] "));
    client.ok("NOOP");
    // Trap 16: before login nothing that is long.
    let mut client = running.connect();
    client.send("a LOGIN {5000}\r\n");
    assert!(client.line().starts_with("a BAD "));
    client.send("b LOGIN {5000+}\r\n");
    client.send("x".repeat(5000) + "\r\n");
    assert!(client.line().starts_with("b BAD "));
    client.send("c ID (\"a\" {9+}\r\nsomething)\r\n");
    assert!(client.until("c").pop().expect("an answer").starts_with("c OK "));
    running.stop();
}

/// Trap 5: ID is bounded (RFC 2971, 3.3: at most 30 fields), before login.
#[test]
fn trap_5_id_is_bounded() {
    let running = Running::new();
    let mut client = running.connect();
    let fields = |count: usize| vec!["\"a\" \"b\""; count].join(" ");
    assert!(client.ok(format!("ID ({})", fields(30)))[0].starts_with("* ID (\"name\" "));
    assert!(client.answer(format!("ID ({})", fields(31))).starts_with("BAD "));
    assert!(client.answer(format!("ID (\"{}\" \"b\")", "a".repeat(31))).starts_with("BAD "));
    assert!(client.answer(format!("ID (\"a\" \"{}\")", "b".repeat(1025))).starts_with("BAD "));
    assert!(client.answer("ID (\"a\")").starts_with("BAD "));
    assert!(client.answer("ID ()").starts_with("OK ") && client.answer("ID NIL").starts_with("OK "));
    for opening in ["(", ")", "{", "[", "\"("] {
        assert!(client.answer(format!("ID {}", opening.repeat(3000))).starts_with("BAD "), "{opening}");
    }
    running.stop();
}

/// What sends nothing but rubbish is let go.
#[test]
fn too_many_bad_commands_end_the_connection() {
    let running = Running::new();
    let mut client = running.connect();
    (0..50).for_each(|_| client.send("x y\r\n"));
    let lines: Vec<String> = std::iter::from_fn(|| Some(client.line()).filter(|line| !line.is_empty())).collect();
    assert!(lines.iter().any(|line| line.starts_with("* BYE ")), "{lines:?}");
    assert!(client.ended());
    running.stop();
}
