//! Several sessions on one mailbox (RFC 3501, 5.2, 5.5 and 7; RFC 2180).

use crate::wire::Running;

/// No EXPUNGE during FETCH, STORE and SEARCH; but during NOOP and the UID commands (RFC 3501, 5.5 and 7.4.1).
#[test]
fn trap_20_expunges_wait_for_their_time() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 5);
    one.ok("SELECT INBOX");
    let mut two = running.select("INBOX");
    one.ok("STORE 2 +FLAGS.SILENT (\\Deleted)");
    assert_eq!(one.ok("EXPUNGE"), ["* 2 EXPUNGE"]);
    // The second session's numbers stay; what is gone is not there (RFC 2180, 4.1 and 4.2).
    assert_eq!(two.ok("FETCH 3 UID"), ["* 3 FETCH (UID 3)"]);
    let said = two.command("FETCH 1:3 UID");
    assert_eq!(said[..2], ["* 1 FETCH (UID 1)", "* 3 FETCH (UID 3)"]);
    assert!(said[2].starts_with("OK [EXPUNGEISSUED] "), "{said:?}");
    assert_eq!(two.search("ALL"), [1, 3, 4, 5]);
    assert_eq!(two.search("NOT SEEN"), [1, 3, 4, 5]);
    assert_eq!(two.search("2"), [0_u32; 0]);
    assert!(two.answer("STORE 2 +FLAGS (\\Seen)").starts_with("NO [EXPUNGEISSUED] "));
    assert!(two.answer("STORE 2 +FLAGS.SILENT (\\Seen)").starts_with("OK [EXPUNGEISSUED] "));
    let said = two.command("STORE 2:3 +FLAGS (\\Seen)");
    assert_eq!(said[0], "* 3 FETCH (UID 3 FLAGS (\\Seen))");
    assert!(said[1].starts_with("OK [EXPUNGEISSUED] "), "{said:?}");
    one.ok("CREATE Copies");
    assert_eq!(two.ok("FETCH 5 UID"), ["* 5 FETCH (UID 5)"], "after all this still");
    // Then they come, before the answer of a UID command.
    assert_eq!(two.ok("UID FETCH 5 UID"), ["* 5 FETCH (UID 5)", "* 2 EXPUNGE"]);
    assert_eq!(two.ok("FETCH 4 UID"), ["* 4 FETCH (UID 5)"]);
    for (command, said) in [("NOOP", "* 1 EXPUNGE"), ("UID SEARCH ALL", "* 1 EXPUNGE"), ("CHECK", "* 1 EXPUNGE")] {
        one.ok("STORE 1 +FLAGS.SILENT (\\Deleted)");
        one.ok("EXPUNGE");
        assert!(two.ok(command).contains(&said.to_owned()), "{command}");
    }
    running.stop();
}

/// RFC 2180, 4.4.1: a COPY of what another session has expunged copies nothing.
#[test]
fn trap_32_a_copy_is_all_or_nothing() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 3);
    one.ok("CREATE Copies");
    one.ok("SELECT INBOX");
    let mut two = running.select("INBOX");
    one.ok("STORE 2 +FLAGS.SILENT (\\Deleted)");
    one.ok("EXPUNGE");
    let said = two.command("COPY 1:3 Copies");
    assert_eq!(said[0], "* 2 EXPUNGE");
    assert!(said[1].starts_with("NO [EXPUNGEISSUED] "), "{said:?}");
    assert_eq!(two.ok("STATUS Copies (MESSAGES)"), ["* STATUS Copies (MESSAGES 0)"]);
    // UIDs that do not exist are passed over (RFC 3501, 6.4.8).
    assert!(two.answer("UID COPY 1:3 Copies").starts_with("OK [COPYUID 2 1,3 1:2] "));
    assert!(two.answer("COPY 1 None").starts_with("NO [TRYCREATE] "));
    assert!(two.answer("UID MOVE 1 None").starts_with("NO [TRYCREATE] "));
    assert!(two.append("None", "", "x").starts_with("NO [TRYCREATE] "));
    assert_eq!(two.ok("UID COPY 77 Copies"), [""; 0]);
    running.stop();
}

/// RFC 6851, 3.3: a message is in one of the two mailboxes, whoever moves it.
#[test]
fn trap_32_two_moves_of_the_same_messages() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 40);
    one.ok("CREATE A");
    one.ok("CREATE B");
    one.ok("SELECT INBOX");
    let mut two = running.select("INBOX");
    one.send("m MOVE 1:40 A\r\n");
    two.send("m UID MOVE 1:40 B\r\n");
    let (first, second) = (one.until("m"), two.until("m"));
    for said in [&first, &second] {
        assert!(said.last().expect("an answer").starts_with("m OK "), "{said:?}");
        // COPYUID comes before the EXPUNGEs (RFC 6851, 4.3).
        let copied = said.iter().position(|line| line.contains("[COPYUID "));
        let expunged = said.iter().position(|line| line.ends_with(" EXPUNGE"));
        assert!(copied.is_none() || expunged.is_none() || copied < expunged, "{said:?}");
        assert_eq!(said.iter().filter(|line| line.ends_with(" EXPUNGE")).count(), 40, "{said:?}");
    }
    let count = |line: &str| line.rsplit(' ').next().and_then(|word| word.strip_suffix(')')?.parse::<u32>().ok());
    let mut total = 0;
    for mailbox in ["INBOX", "A", "B"] {
        let said = one.ok(format!("STATUS {mailbox} (MESSAGES)"));
        total += count(&said[0]).expect("a number");
    }
    assert_eq!(total, 40, "none is lost and none is doubled");
    running.stop();
}

/// RFC 3501, 2.3.2: one session is the first to be told of a message, and all agree on the numbers.
#[test]
fn trap_29_recent_across_sessions() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 2);
    assert_eq!(one.ok("STATUS INBOX (RECENT)"), ["* STATUS INBOX (RECENT 2)"]);
    let said = one.ok("EXAMINE INBOX");
    assert!(said.contains(&"* 2 RECENT".to_owned()), "{said:?}");
    let said = one.ok("SELECT INBOX");
    assert!(said.contains(&"* 2 RECENT".to_owned()), "EXAMINE takes nothing: {said:?}");
    assert_eq!(one.search("RECENT"), [1, 2]);
    assert_eq!(one.search("NEW"), [1, 2]);
    let mut two = running.login();
    let said = two.ok("SELECT INBOX");
    assert!(said.contains(&"* 0 RECENT".to_owned()), "{said:?}");
    assert_eq!(two.search("OLD"), [1, 2]);
    // The first to be told of a new one has it.
    two.fill("INBOX", 1);
    let (first, second) = (one.ok("NOOP"), two.ok("NOOP"));
    let holders = [&first, &second]
        .iter()
        .filter(|said| said.iter().any(|line| line.ends_with(" 3 RECENT") || line == "* 1 RECENT"))
        .count();
    assert!(holders <= 1, "{first:?} {second:?}");
    let recent = one.search("RECENT 3").len() + two.search("RECENT 3").len();
    assert_eq!(recent, 1, "one session has it");
    assert_eq!(one.ok("STATUS INBOX (RECENT MESSAGES UIDNEXT)"), ["* STATUS INBOX (RECENT 0 MESSAGES 3 UIDNEXT 4)"]);
    // Nobody can set it.
    two.ok("STORE 1 +FLAGS (\\Recent)");
    assert_eq!(two.search("RECENT 1"), [0_u32; 0]);
    running.stop();
}

/// RFC 3501, 7.4.2: flags that others change are told, also after a silent STORE of one's own to others.
#[test]
fn flags_are_told_to_others() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 2);
    one.ok("SELECT INBOX");
    let mut two = running.select("INBOX");
    assert_eq!(one.ok("STORE 1 +FLAGS.SILENT (\\Seen)"), [""; 0]);
    assert_eq!(two.ok("NOOP"), ["* 1 FETCH (UID 1 FLAGS (\\Seen))"]);
    assert_eq!(
        two.ok("STORE 1 FLAGS (\\Flagged $x)").last().map(String::as_str),
        Some("* 1 FETCH (UID 1 FLAGS (\\Flagged $x))")
    );
    let said = one.ok("NOOP");
    assert!(said[0].starts_with("* FLAGS (") && said[0].contains(" $x)"), "the keyword is told first: {said:?}");
    assert_eq!(said.last().map(String::as_str), Some("* 1 FETCH (UID 1 FLAGS (\\Flagged $x \\Recent))"));
    assert_eq!(
        two.ok("STORE 1:2 -FLAGS (\\Draft)"),
        ["* 1 FETCH (UID 1 FLAGS (\\Flagged $x))", "* 2 FETCH (UID 2 FLAGS ())"]
    );
    running.stop();
}

/// RFC 2177, and CLOSE and UNSELECT beside it (RFC 3501, 6.4.2; RFC 3691).
#[test]
fn trap_26_idle_and_close() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 3);
    one.ok("SELECT INBOX");
    let mut idler = running.select("INBOX");
    idler.send("i IDLE\r\n");
    assert!(idler.line().starts_with("+ "));
    one.ok("STORE 2 +FLAGS.SILENT (\\Deleted)");
    assert_eq!(idler.line(), "* 2 FETCH (UID 2 FLAGS (\\Deleted))");
    one.ok("UNSELECT");
    one.ok("SELECT INBOX");
    assert_eq!(one.search("ALL"), [1, 2, 3], "UNSELECT expunges nothing");
    assert_eq!(one.ok("CLOSE"), [""; 0], "silently");
    assert_eq!(idler.line(), "* 2 EXPUNGE");
    one.fill("INBOX", 1);
    assert_eq!(idler.line(), "* 3 EXISTS");
    assert_eq!(idler.line(), "* 1 RECENT");
    idler.send("DONE\r\n");
    assert!(idler.line().starts_with("i OK "));
    idler.send("j IDLE\r\n");
    assert!(idler.line().starts_with("+ "));
    idler.send("NOOP\r\n");
    assert!(idler.line().starts_with("j BAD "));
    // Whatever comes instead of DONE costs one BAD; what follows is a command again.
    for garbage in [&b"\0\xff\0"[..], b"DONE x", b"{5}", b"x {5+}", b"((((", &b"x".repeat(100_000)] {
        idler.send("k IDLE\r\n");
        assert!(idler.line().starts_with("+ "));
        idler.send([garbage, b"\r\n"].concat());
        let answer = idler.line();
        assert!(answer.starts_with("k BAD "), "{answer}");
        idler.ok("NOOP");
    }
    // A mailbox that is deleted under a session ends it (RFC 2180, 3.3).
    one.ok("CREATE Gone");
    let mut lost = running.select("Gone");
    one.ok("DELETE Gone");
    lost.send("n NOOP\r\n");
    assert!(lost.line().starts_with("* BYE "));
    running.stop();
}

/// RFC 3501, 5.5: commands that come at once are answered in order, each with what the one before has done.
#[test]
fn trap_20_pipelines() {
    let running = Running::new();
    let mut client = running.login();
    let append = "APPEND Box (\\Seen \\Flagged) \" 7-Feb-1994 21:52:25 -0800\" {23+}\r\nSubject: x\r\n\r\nsome text";
    client.send(format!(
        "1 CREATE Box\r\n2 {append}\r\n3 {append}\r\n4 SELECT Box\r\n5 STORE 1 +FLAGS.SILENT (\\Deleted)\r\n6 EXPUNGE\r\n\
         7 FETCH 1 (UID FLAGS INTERNALDATE RFC822.SIZE)\r\n8 UID STORE 2 -FLAGS (\\Flagged)\r\n9 UID SEARCH UNFLAGGED\r\n\
         10 CLOSE\r\n11 DELETE Box\r\n12 SELECT Box\r\n"
    ));
    let said: Vec<String> = (1..=12).flat_map(|tag| client.until(&tag.to_string())).collect();
    let position =
        |line: &str| said.iter().position(|said| said.starts_with(line)).unwrap_or_else(|| panic!("{line}: {said:?}"));
    let order = [
        "1 OK ",
        "2 OK [APPENDUID 2 1] ",
        "3 OK [APPENDUID 2 2] ",
        "* 2 EXISTS",
        "4 OK [READ-WRITE] ",
        "5 OK ",
        "* 1 EXPUNGE",
        "6 OK ",
        "* 1 FETCH (UID 2 FLAGS (\\Flagged \\Seen \\Recent) INTERNALDATE \" 7-Feb-1994 21:52:25 -0800\" RFC822.SIZE 23)",
        "7 OK ",
        "* 1 FETCH (UID 2 FLAGS (\\Seen \\Recent))",
        "8 OK ",
        "* SEARCH 2",
        "9 OK ",
        "10 OK ",
        "11 OK ",
        "12 NO [NONEXISTENT] ",
    ];
    let positions: Vec<usize> = order.iter().map(|line| position(line)).collect();
    assert!(positions.is_sorted(), "{said:?}");
    running.stop();
}
