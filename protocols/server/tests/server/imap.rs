//! IMAP transcripts.

use crate::harness::{PASSWORD, Store};

const ANN: &str = "ann@example.org";

/// Users whose accounts lie in both shards, so that logins move.
const USERS: [&str; 6] =
    [ANN, "bob@example.org", "cid@example.org", "dan@example.org", "eve@example.org", "fay@example.org"];

#[test]
fn a_login_moves_with_what_was_pipelined() {
    let store = Store::with(&USERS);
    let server = store.serve();
    server.deliver(&USERS, "Subject: hi\r\n\r\nx");
    for user in USERS {
        // Several connections each: the kernel spreads them over the workers.
        for _ in 0..4 {
            let mut client = server.imap();
            client.send(&format!("a LOGIN {user} {PASSWORD}\r\nb EXAMINE INBOX\r\nc FETCH 1 UID\r\nd LOGOUT\r\n"));
            assert!(client.until("a")[0].starts_with("a OK [CAPABILITY IMAP4rev1 "));
            assert!(client.until("b").last().unwrap().starts_with("b OK [READ-ONLY]"));
            assert_eq!(client.until("c"), ["* 1 FETCH (UID 1)", "c OK Fetched"]);
            assert_eq!(client.until("d").len(), 2);
            assert!(client.ended());
        }
    }
    server.stop();
}

#[test]
fn passwords_need_tls_unless_allowed() {
    let store = Store::with(&[ANN]);
    let server = store.serve_with(&[]);
    let mut client = server.imap();
    let capability = client.ok("CAPABILITY").remove(0);
    assert!(capability.contains(" LOGINDISABLED") && !capability.contains("AUTH="), "{capability}");
    assert!(client.answer(&format!("LOGIN {ANN} {PASSWORD}")).starts_with("NO [PRIVACYREQUIRED]"));
    assert!(client.answer("AUTHENTICATE PLAIN").starts_with("NO [PRIVACYREQUIRED]"));
    server.stop();
}

#[test]
fn sasl_plain() {
    let store = Store::with(&[ANN, "bob@example.org"]);
    let server = store.serve();
    // NUL ann@example.org NUL secret
    const RESPONSE: &str = "AGFubkBleGFtcGxlLm9yZwBzZWNyZXQ=";
    let mut client = server.imap();
    client.ok(&format!("AUTHENTICATE PLAIN {RESPONSE}"));
    assert!(client.answer("LOGIN a b").starts_with("BAD "));
    let mut client = server.imap();
    client.send("a AUTHENTICATE PLAIN\r\n");
    assert_eq!(client.line(), "+ ");
    client.send("*\r\n");
    assert!(client.line().starts_with("a BAD "));
    client.send("b AUTHENTICATE PLAIN\r\n");
    assert_eq!(client.line(), "+ ");
    client.send(&format!("{RESPONSE}\r\nc SELECT INBOX\r\n"));
    assert!(client.line().starts_with("b OK "));
    assert!(client.until("c").last().unwrap().starts_with("c OK [READ-WRITE]"));
    // Trap 8: bob@example.org NUL ann@example.org NUL secret
    let mut client = server.imap();
    let answer = client.answer("AUTHENTICATE PLAIN Ym9iQGV4YW1wbGUub3JnAGFubkBleGFtcGxlLm9yZwBzZWNyZXQ=");
    assert!(answer.starts_with("NO [AUTHORIZATIONFAILED]"), "{answer}");
    assert!(client.answer("AUTHENTICATE CRAM-MD5").starts_with("NO "));
    server.stop();
}

#[test]
fn failed_logins_are_counted() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.imap();
    for _ in 0..4 {
        assert!(client.answer("LOGIN ann@example.org wrong").starts_with("NO [AUTHENTICATIONFAILED]"));
    }
    let last = client.command("LOGIN nobody@example.org wrong");
    assert!(last[0].starts_with("* BYE ") && last[1].starts_with("NO [AUTHENTICATIONFAILED]"), "{last:?}");
    assert!(client.ended());
    server.stop();
}

#[test]
fn a_bad_command_costs_one_bad() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.imap();
    for line in ["", "x", "x y z", "SELECT INBOX", "LOGIN {99999999999999}", "LOGIN \"a", "FETCH 1 FLAGS"] {
        assert!(client.answer(line).starts_with("BAD "), "{line}");
    }
    client.ok(&format!("LOGIN {ANN} {PASSWORD}"));
    client.send("no-command\r\n");
    assert!(client.line().starts_with("* BAD "));
    for line in ["FETCH 1 FLAGS", "SELECT INBOX (QRESYNC (1 1))", "STORE 1 FLAGS (\\Foo)", "NOOP x"] {
        assert!(client.answer(line).starts_with("BAD "), "{line}");
    }
    client.ok("SELECT INBOX");
    assert!(client.answer("FETCH 1 FLAGS").starts_with("BAD "), "there is no message 1");
    client.ok("UID FETCH 1 FLAGS");
    assert!(client.answer("FETCH 1 ENVELOPE").starts_with("BAD "));
    client.ok("NOOP");
    for _ in 0..100 {
        client.send("x y\r\n");
    }
    let mut last = client.line();
    while last.starts_with("x BAD ") {
        last = client.line();
    }
    assert!(last.starts_with("* BYE "), "{last}");
    server.stop();
}

#[test]
fn two_sessions_see_each_other() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    server.deliver(&[ANN], "Subject: one\r\n\r\nx");
    server.deliver(&[ANN], "Subject: two\r\n\r\nx");
    server.deliver(&[ANN], "Subject: three\r\n\r\nx");
    let mut first = server.inbox(ANN);
    let mut second = server.inbox(ANN);
    assert_eq!(
        first.ok("STORE 1 +FLAGS (\\Flagged hello)"),
        [
            "* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft hello)",
            "* OK [PERMANENTFLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft hello \\*)] Flags that are kept",
            "* 1 FETCH (UID 1 FLAGS (\\Flagged hello \\Recent))",
        ]
    );
    let told = second.ok("NOOP");
    assert_eq!(
        told.last().unwrap(),
        "* 1 FETCH (UID 1 FLAGS (\\Flagged hello))",
        "trap 29: only one session has \\Recent"
    );
    // A change that changes nothing is told all the same; a silent one is not.
    assert_eq!(first.ok("STORE 1 +FLAGS (\\Flagged)"), ["* 1 FETCH (UID 1 FLAGS (\\Flagged hello \\Recent))"]);
    assert!(first.ok("STORE 2 +FLAGS.SILENT (\\Deleted)").is_empty());
    assert_eq!(second.ok("NOOP"), ["* 2 FETCH (UID 2 FLAGS (\\Deleted))"]);
    assert_eq!(first.ok("EXPUNGE"), ["* 2 EXPUNGE"]);
    // Trap 20: no EXPUNGE while the client speaks in sequence numbers.
    assert_eq!(second.ok("FETCH 3 UID"), ["* 3 FETCH (UID 3)"]);
    let answer = second.command("FETCH 2 UID");
    assert_eq!(answer, ["OK [EXPUNGEISSUED] Some of them are expunged"]);
    assert_eq!(second.ok("SEARCH ALL"), ["* SEARCH 1 3"]);
    assert_eq!(second.ok("STORE 3 +FLAGS (\\Answered)"), ["* 3 FETCH (UID 3 FLAGS (\\Answered))"]);
    assert_eq!(second.ok("NOOP"), ["* 2 EXPUNGE"]);
    assert_eq!(second.ok("FETCH 2 UID"), ["* 2 FETCH (UID 3)"]);
    server.deliver(&[ANN], "Subject: four\r\n\r\nx");
    assert_eq!(second.ok("NOOP"), ["* 3 EXISTS", "* 1 RECENT"]);
    assert_eq!(first.ok("NOOP"), ["* 2 FETCH (UID 3 FLAGS (\\Answered \\Recent))", "* 3 EXISTS", "* 2 RECENT"]);
    server.stop();
}

#[test]
fn idle_pushes() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut idling = server.inbox(ANN);
    let mut other = server.inbox(ANN);
    for round in 1..=3 {
        idling.send("i IDLE\r\n");
        assert!(idling.line().starts_with("+ "));
        server.deliver(&[ANN], "Subject: x\r\n\r\nx");
        assert_eq!(idling.line(), format!("* {round} EXISTS"));
        assert!(idling.line().ends_with(" RECENT"));
        other.ok("NOOP");
        other.ok(&format!("STORE {round} +FLAGS (\\Seen)"));
        assert!(idling.line().starts_with(&format!("* {round} FETCH (UID {round} FLAGS (\\Seen")));
        idling.send("DONE\r\n");
        assert_eq!(idling.line(), "i OK Idled");
    }
    idling.send("i IDLE\r\n");
    assert!(idling.line().starts_with("+ "));
    other.ok("STORE 1:2 +FLAGS.SILENT (\\Deleted)");
    assert!(idling.line().starts_with("* 1 FETCH ") && idling.line().starts_with("* 2 FETCH "));
    other.ok("EXPUNGE");
    assert_eq!((idling.line(), idling.line()), ("* 1 EXPUNGE".into(), "* 1 EXPUNGE".into()));
    // Trap 26: garbage ends the IDLE, not the connection.
    idling.send("garbage\r\n");
    assert!(idling.line().starts_with("i BAD "));
    idling.send("i IDLE\r\nDONE\r\nj NOOP\r\n");
    assert!(idling.line().starts_with("+ "));
    assert_eq!((idling.line(), idling.line()), ("i OK Idled".into(), "j OK Nothing to do".into()));
    // Without a mailbox there is nothing to tell, but it is legal.
    let mut client = server.login(ANN);
    client.send("i IDLE\r\n");
    assert!(client.line().starts_with("+ "));
    client.send("DONE\r\n");
    assert_eq!(client.line(), "i OK Idled");
    server.stop();
}

/// Trap 20: what is pipelined is done in order.
#[test]
fn trap_20_pipelined_commands_keep_their_order() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    for subject in 1..=3 {
        server.deliver(&[ANN], &format!("Subject: {subject}\r\n\r\nx"));
    }
    let mut client = server.inbox(ANN);
    client.send(
        "a STORE 1 +FLAGS.SILENT (\\Deleted)\r\nb EXPUNGE\r\nc FETCH 1 UID\r\nd STORE 1 FLAGS (\\Seen)\r\n\
         e FETCH 1:* FLAGS\r\nf APPEND INBOX {6+}\r\nA: b\r\n\r\ng SEARCH ALL\r\n",
    );
    let all: Vec<String> = client.until("g");
    assert_eq!(
        all,
        [
            "a OK Stored",
            "* 1 EXPUNGE",
            "b OK Expunged",
            "* 1 FETCH (UID 2)",
            "c OK Fetched",
            "* 1 FETCH (UID 2 FLAGS (\\Seen \\Recent))",
            "d OK Stored",
            "* 1 FETCH (FLAGS (\\Seen \\Recent))",
            "* 2 FETCH (FLAGS (\\Recent))",
            "e OK Fetched",
            "* 3 EXISTS",
            "* 3 RECENT",
            "f OK [APPENDUID 1 4] Appended",
            "* SEARCH 1 2 3",
            "g OK Searched",
        ]
    );
    server.stop();
}

#[test]
fn fetching_a_body_sets_seen() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    server.deliver(&[ANN], "Subject: hi\r\n\r\nbody");
    server.deliver(&[ANN], "Subject: ho\r\n\r\nbody");
    let mut reader = server.login(ANN);
    reader.ok("EXAMINE INBOX");
    assert_eq!(reader.ok("FETCH 1 (FLAGS BODY[TEXT])"), ["* 1 FETCH (FLAGS (\\Recent) BODY[TEXT] {6}\r\nbody\r\n)"]);
    assert!(reader.answer("STORE 1 +FLAGS (\\Seen)").starts_with("NO [READ-ONLY]"));
    let mut client = server.inbox(ANN);
    assert_eq!(client.ok("FETCH 1 BODY.PEEK[TEXT]"), ["* 1 FETCH (BODY[TEXT] {6}\r\nbody\r\n)"]);
    assert_eq!(
        client.ok("FETCH 1 (FLAGS BODY[TEXT])"),
        ["* 1 FETCH (BODY[TEXT] {6}\r\nbody\r\n)", "* 1 FETCH (UID 1 FLAGS (\\Seen \\Recent))"]
    );
    assert_eq!(
        client.ok("FETCH 1 (FLAGS BODY[TEXT])"),
        ["* 1 FETCH (FLAGS (\\Seen \\Recent) BODY[TEXT] {6}\r\nbody\r\n)"]
    );
    assert_eq!(
        client.ok("UID FETCH 2 RFC822.TEXT"),
        ["* 2 FETCH (UID 2 RFC822.TEXT {6}\r\nbody\r\n)", "* 2 FETCH (UID 2 FLAGS (\\Seen \\Recent))"]
    );
    assert_eq!(client.ok("SEARCH UNSEEN"), ["* SEARCH"]);
    server.stop();
}

#[test]
fn structure_and_parts() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let message = "From: Ann <ann@example.org>\r\nSubject: parts\r\nDate: Wed, 17 Jul 1996 02:23:25 -0700\r\n\
        MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\n\
        first\r\n--b\r\nContent-Type: text/html\r\nX-A: b\r\n\r\n<p>second\r\n--b--";
    // The trace fields of a delivery do not shift the parts; an appended message has none.
    server.deliver(&[ANN], message);
    let mut client = server.login(ANN);
    client.ok(&format!("APPEND INBOX {{{}+}}\r\n{message}", message.len()));
    client.ok("SELECT INBOX");
    for number in 1..=2 {
        let fetch =
            |client: &mut crate::harness::Client, items: &str| client.ok(&format!("FETCH {number} {items}")).remove(0);
        let response = fetch(&mut client, "(BODY.PEEK[1] BODY.PEEK[2]<3.4> BODY.PEEK[2.MIME] BODY.PEEK[3])");
        assert_eq!(
            response,
            format!(
                "* {number} FETCH (BODY[1] {{5}}\r\nfirst BODY[2]<3> {{4}}\r\nseco BODY[2.MIME] {{35}}\r\n\
                 Content-Type: text/html\r\nX-A: b\r\n\r\n BODY[3] NIL)"
            )
        );
        let response = fetch(&mut client, "ENVELOPE");
        assert!(response.contains("\"parts\" ((\"Ann\" NIL \"ann\" \"example.org\"))"), "{response}");
        let response = fetch(&mut client, "BODYSTRUCTURE");
        assert!(response.contains("(\"text\" \"plain\" "), "{response}");
        assert!(response.contains("\"mixed\" (\"boundary\" \"b\")"), "{response}");
        assert!(fetch(&mut client, "PREVIEW").contains("first"));
    }
    assert_eq!(client.ok("SEARCH SENTON 17-Jul-1996"), ["* SEARCH 1 2"]);
    assert_eq!(client.ok("SEARCH SENTSINCE 18-Jul-1996"), ["* SEARCH"]);
    server.stop();
}

#[test]
fn mailboxes() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.login(ANN);
    assert_eq!(client.ok("LIST \"\" \"\""), ["* LIST (\\Noselect) \"/\" \"\""]);
    assert_eq!(client.ok("LIST \"\" *"), ["* LIST (\\HasNoChildren) \"/\" INBOX"]);
    assert_eq!(client.ok("NAMESPACE"), ["* NAMESPACE ((\"\" \"/\")) NIL NIL"]);
    client.ok("CREATE a/b/c");
    client.ok("CREATE \"&AOQ-/\"");
    client.ok("CREATE Sent (USE (\\Sent))");
    assert!(client.answer("CREATE a/b").starts_with("NO [ALREADYEXISTS]"));
    assert!(client.answer("CREATE inbox").starts_with("NO [ALREADYEXISTS]"));
    assert!(client.answer("CREATE a//b").starts_with("NO [CANNOT]"));
    assert_eq!(
        client.ok("LIST \"\" *"),
        [
            "* LIST (\\HasNoChildren) \"/\" INBOX",
            "* LIST (\\HasNoChildren \\Sent) \"/\" Sent",
            "* LIST (\\HasChildren) \"/\" a",
            "* LIST (\\HasChildren) \"/\" a/b",
            "* LIST (\\HasNoChildren) \"/\" a/b/c",
            "* LIST (\\HasNoChildren) \"/\" &AOQ-",
        ]
    );
    client.ok("SUBSCRIBE a/b/c");
    client.ok("SUBSCRIBE gone");
    assert_eq!(client.ok("LSUB \"\" *"), ["* LSUB () \"/\" a/b/c", "* LSUB () \"/\" gone"]);
    assert_eq!(client.ok("LSUB \"\" %"), ["* LSUB (\\Noselect) \"/\" a", "* LSUB () \"/\" gone"]);
    client.ok("UNSUBSCRIBE gone");
    // Trap 30: what is below moves along, and stays when what is above is deleted.
    client.ok("RENAME a x/y");
    client.ok("DELETE x/y/b");
    assert!(client.answer("DELETE x/y/b").starts_with("NO [HASCHILDREN]"));
    assert_eq!(
        client.ok("LIST x/ *"),
        [
            "* LIST (\\HasChildren) \"/\" x/y",
            "* LIST (\\Noselect \\HasChildren) \"/\" x/y/b",
            "* LIST (\\HasNoChildren) \"/\" x/y/b/c",
        ]
    );
    assert!(client.answer("DELETE INBOX").starts_with("NO [CANNOT]"));
    assert!(client.answer("SELECT nope").starts_with("NO [NONEXISTENT]"));
    assert!(client.answer("RENAME nope other").starts_with("NO [NONEXISTENT]"));
    assert!(client.answer("APPEND nope {1+}\r\nx").starts_with("NO [TRYCREATE]"));
    server.deliver(&[ANN], "Subject: x\r\n\r\nx");
    let status = client.ok("STATUS INBOX (MESSAGES RECENT UIDNEXT UIDVALIDITY UNSEEN DELETED HIGHESTMODSEQ)").remove(0);
    assert_eq!(
        status,
        "* STATUS INBOX (MESSAGES 1 RECENT 1 UIDNEXT 2 UIDVALIDITY 1 UNSEEN 1 DELETED 0 HIGHESTMODSEQ 2)"
    );
    // RFC 3501, 6.3.5: renaming INBOX moves its messages and leaves it empty.
    client.ok("RENAME INBOX old");
    assert_eq!(client.ok("STATUS old (MESSAGES)"), ["* STATUS old (MESSAGES 1)"]);
    assert_eq!(client.ok("STATUS INBOX (MESSAGES)"), ["* STATUS INBOX (MESSAGES 0)"]);
    // What is selected can be deleted, by oneself and by others.
    client.ok("SELECT old");
    let mut other = server.login(ANN);
    other.ok("SELECT old");
    client.ok("DELETE old");
    assert!(client.answer("FETCH 1 UID").starts_with("BAD "));
    other.send("x NOOP\r\n");
    assert!(other.line().starts_with("* BYE [NONEXISTENT]"));
    server.stop();
}

#[test]
fn append_copy_and_move() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.login(ANN);
    client.ok("CREATE archive");
    client.ok("SELECT INBOX");
    client.send("a APPEND INBOX (\\Seen $Label) \"17-Jul-1996 02:44:25 -0700\" {14}\r\n");
    assert!(client.line().starts_with("+ "));
    client.send("A: b\r\n\r\nbody\r\n\r\n");
    let answer = client.until("a");
    assert_eq!(answer.last().unwrap(), "a OK [APPENDUID 1 1] Appended");
    let fetched = client.ok("FETCH 1 (FLAGS INTERNALDATE RFC822.SIZE BODY.PEEK[])");
    assert_eq!(
        fetched.last().unwrap(),
        "* 1 FETCH (FLAGS (\\Seen $Label \\Recent) INTERNALDATE \"17-Jul-1996 02:44:25 -0700\" RFC822.SIZE 14 \
         BODY[] {14}\r\nA: b\r\n\r\nbody\r\n)"
    );
    client.ok("APPEND INBOX {6+}\r\nX: y\r\n");
    assert!(client.answer("APPEND INBOX {0+}\r\n").starts_with("BAD "));
    assert_eq!(client.answer("COPY 1:2 archive"), "OK [COPYUID 2 1:2 1:2] Copied");
    assert!(client.answer("COPY 1 nope").starts_with("NO [TRYCREATE]"));
    let moved = client.command("UID MOVE 1 archive");
    assert_eq!(moved, ["* OK [COPYUID 2 1 3] Moved", "* 1 EXPUNGE", "OK Moved"], "trap 32");
    assert!(client.answer("MOVE 1 INBOX").starts_with("NO [CANNOT]"));
    assert_eq!(client.ok("UID MOVE 77 archive"), [""; 0]);
    client.ok("SELECT archive");
    assert_eq!(
        client.ok("UID FETCH 1:* FLAGS"),
        [
            "* 1 FETCH (UID 1 FLAGS (\\Seen $Label \\Recent))",
            "* 2 FETCH (UID 2 FLAGS (\\Recent))",
            "* 3 FETCH (UID 3 FLAGS (\\Seen $Label \\Recent))",
        ]
    );
    client.ok("STORE 1:3 +FLAGS.SILENT (\\Deleted)");
    assert_eq!(client.ok("UID EXPUNGE 2:9"), ["* 2 EXPUNGE", "* 2 EXPUNGE"]);
    client.ok("CLOSE");
    assert_eq!(client.ok("STATUS archive (MESSAGES)"), ["* STATUS archive (MESSAGES 0)"]);
    // A large literal, announced and sent at once, and one that is too large.
    let large = "x".repeat(300_000);
    assert!(client.answer(&format!("APPEND INBOX {{300000+}}\r\n{large}")).starts_with("OK [APPENDUID 1 3]"));
    client.send("z APPEND INBOX {99999999}\r\n");
    assert!(client.line().starts_with("z NO [TOOBIG]"));
    client.ok("NOOP");
    server.stop();
}

#[test]
fn searching_what_the_index_knows() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.login(ANN);
    for (day, size) in [("1-Jan-2020", 10), ("2-Jan-2020", 2000), ("3-Jan-2020", 30)] {
        let message = "x".repeat(size);
        client
            .ok(&format!("APPEND INBOX \"{day:0>11} 12:00:00 +0000\" {{{size}+}}\r\n{message}").replace("\"0", "\" "));
    }
    client.ok("SELECT INBOX");
    client.ok("STORE 1 +FLAGS.SILENT (\\Seen work)");
    client.ok("STORE 2 +FLAGS.SILENT (\\Flagged)");
    for (keys, found) in [
        ("ALL", "1 2 3"),
        ("SEEN", "1"),
        ("UNSEEN", "2 3"),
        ("OR SEEN FLAGGED", "1 2"),
        ("NOT (OR SEEN FLAGGED)", "3"),
        ("KEYWORD work", "1"),
        ("UNKEYWORD other", "1 2 3"),
        ("2:*", "2 3"),
        ("UID 3", "3"),
        ("SINCE 2-Jan-2020", "2 3"),
        ("BEFORE 2-Jan-2020", "1"),
        ("ON 2-Jan-2020", "2"),
        ("LARGER 1000", "2"),
        ("SMALLER 20", "1"),
        ("OLDER 86400", "1 2 3"),
        ("YOUNGER 86400", ""),
        ("NEW", "2 3"),
    ] {
        let expected = format!("* SEARCH {found}");
        assert_eq!(client.ok(&format!("SEARCH {keys}")), [expected.trim_end()], "{keys}");
    }
    client.send("e SEARCH RETURN (MIN MAX COUNT ALL) UNSEEN\r\n");
    assert_eq!(client.until("e")[0], "* ESEARCH (TAG \"e\") MIN 2 MAX 3 ALL 2:3 COUNT 2");
    client.ok("STORE 1 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    assert_eq!(client.ok("SEARCH ALL"), ["* SEARCH 1 2"], "trap 21: sequence numbers");
    assert_eq!(client.ok("UID SEARCH ALL"), ["* SEARCH 2 3"]);
    server.stop();
}

#[test]
fn condstore() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    (0..3).for_each(|_| server.deliver(&[ANN], "Subject: x\r\n\r\nx"));
    let mut client = server.login(ANN);
    let selected = client.ok("SELECT INBOX (CONDSTORE)");
    assert!(selected.iter().any(|line| line.starts_with("* OK [HIGHESTMODSEQ 4]")), "{selected:?}");
    assert_eq!(
        client.ok("STORE 1 (UNCHANGEDSINCE 4) +FLAGS.SILENT (\\Flagged)"),
        ["* 1 FETCH (UID 1 FLAGS (\\Flagged \\Recent) MODSEQ (5))"]
    );
    let answer = client.command("STORE 1:2 (UNCHANGEDSINCE 4) +FLAGS (\\Seen)");
    assert_eq!(answer.last().unwrap(), "OK [MODIFIED 1] Some have been changed by others");
    assert_eq!(
        client.ok("FETCH 1:* (UID) (CHANGEDSINCE 4)"),
        ["* 1 FETCH (UID 1 MODSEQ (5))", "* 2 FETCH (UID 2 MODSEQ (6))"]
    );
    assert_eq!(client.ok("SEARCH MODSEQ 5"), ["* SEARCH 1 2 (MODSEQ 6)"]);
    assert_eq!(client.ok("STATUS INBOX (HIGHESTMODSEQ)"), ["* STATUS INBOX (HIGHESTMODSEQ 6)"]);
    server.stop();
}

/// Many messages: responses come in order, whatever they are gathered into.
#[test]
fn fetching_a_thousand_messages() {
    let store = Store::with(&[ANN]);
    let server = store.serve();
    let mut client = server.login(ANN);
    let message = format!("Subject: x\r\n\r\n{}\r\n", "line of the message\r\n".repeat(40));
    let mut all = String::new();
    for number in 0..1000 {
        all.push_str(&format!("a{number} APPEND INBOX {{{}+}}\r\n{message}\r\n", message.len()));
    }
    let mut writer = all.as_bytes();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !writer.is_empty() {
                let (now, later) = writer.split_at(writer.len().min(10_000));
                client.send(std::str::from_utf8(now).unwrap());
                writer = later;
            }
        });
    });
    client.until("a999");
    client.ok("SELECT INBOX");
    let fetched = client.ok("FETCH 1:* (UID BODY[])");
    assert_eq!(fetched.len(), 2000);
    for (number, response) in fetched[..1000].iter().enumerate() {
        let number = number + 1;
        let expected = format!("* {number} FETCH (UID {number} BODY[] {{{}}}\r\n{message})", message.len());
        assert_eq!(*response, expected);
    }
    assert!(fetched[1000..].iter().all(|response| response.contains("FLAGS (\\Seen \\Recent)")));
    server.stop();
}
