//! CONDSTORE (RFC 7162, 3.1), ENABLE (RFC 5161) and UIDPLUS (RFC 4315).

use crate::wire::{Client, Running};

fn highest_modseq(client: &mut Client) -> u64 {
    let said = client.ok("STATUS INBOX (HIGHESTMODSEQ)");
    let status = said.last().expect("a response");
    let number = status.strip_prefix("* STATUS INBOX (HIGHESTMODSEQ ").and_then(|rest| rest.strip_suffix(')'));
    number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{said:?}"))
}

#[test]
fn modseqs_are_told_and_obeyed() {
    let running = Running::new();
    let mut one = running.login();
    one.fill("INBOX", 3);
    let said = one.ok("ENABLE CONDSTORE X-UNKNOWN");
    assert_eq!(said, ["* ENABLED CONDSTORE"]);
    assert_eq!(one.ok("ENABLE X-UNKNOWN"), ["* ENABLED"]);
    let said = one.ok("SELECT INBOX (CONDSTORE)");
    assert!(said.iter().any(|line| line.starts_with("* OK [HIGHESTMODSEQ ")), "{said:?}");
    assert!(!said.iter().any(|line| line.contains("NOMODSEQ")), "{said:?}");
    let before = highest_modseq(&mut one);
    let mut two = running.select("INBOX");
    two.ok("STORE 2 +FLAGS.SILENT (\\Flagged)");
    let after = highest_modseq(&mut two);
    assert!(after > before);
    assert_eq!(one.ok("NOOP"), [format!("* 2 FETCH (UID 2 FLAGS (\\Flagged \\Recent) MODSEQ ({after}))")]);
    // UNCHANGEDSINCE: what has changed since is left alone, and named as the command names messages.
    let said = one.command(format!("STORE 1:3 (UNCHANGEDSINCE {before}) +FLAGS.SILENT (\\Seen)"));
    assert!(said.last().expect("an answer").starts_with("OK [MODIFIED 2] "), "{said:?}");
    let changed = highest_modseq(&mut one);
    for number in [1, 3] {
        let line = format!("* {number} FETCH (UID {number} FLAGS (\\Seen \\Recent) MODSEQ ({changed}))");
        assert!(said.contains(&line), "new mod-sequences are told, silent or not: {said:?}");
    }
    let said = one.command(format!("UID STORE 2 (UNCHANGEDSINCE {before}) FLAGS ()"));
    assert!(said.last().expect("an answer").starts_with("OK [MODIFIED 2] "), "{said:?}");
    assert_eq!(one.search("FLAGGED UNSEEN"), [2]);
    let said = one.command(format!("STORE 2 (UNCHANGEDSINCE {after}) +FLAGS (\\Answered)"));
    assert!(said.last().expect("an answer").starts_with("OK ") && !said.concat().contains("MODIFIED"), "{said:?}");
    assert!(one.answer("STORE 1:3 (UNCHANGEDSINCE 0) +FLAGS (\\Draft)").starts_with("OK [MODIFIED 1:3] "));
    // CHANGEDSINCE, which asks for MODSEQ by itself, and a search.
    let said = one.ok(format!("FETCH 1:* (FLAGS) (CHANGEDSINCE {after})"));
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said.iter().all(|line| line.contains(" MODSEQ (")), "{said:?}");
    let highest = highest_modseq(&mut one);
    assert_eq!(one.ok(format!("UID FETCH 1:* (UID) (CHANGEDSINCE {highest})")), [""; 0]);
    assert_eq!(one.ok(format!("SEARCH MODSEQ {changed}")), [format!("* SEARCH 1 2 3 (MODSEQ {highest})")]);
    assert_eq!(one.ok(format!("SEARCH MODSEQ {}", highest + 1)), ["* SEARCH"]);
    assert_eq!(
        one.ok(format!("SEARCH OR MODSEQ \"/flags/\\\\draft\" all {highest} 1")),
        [format!("* SEARCH 1 2 (MODSEQ {highest})")]
    );
    // RFC 7162, 3.1.10: of what is returned, where that is the first or the last alone.
    let first = one.ok("FETCH 1 MODSEQ")[0].replace("* 1 FETCH (MODSEQ (", "").replace("))", "");
    for (returns, found) in [
        ("MIN", format!("MIN 1 MODSEQ {first}")),
        ("MAX COUNT", format!("MAX 3 COUNT 3 MODSEQ {highest}")),
        ("ALL", format!("ALL 1:3 MODSEQ {highest}")),
    ] {
        one.send(format!("e SEARCH RETURN ({returns}) MODSEQ 1\r\n"));
        assert_eq!(one.until("e")[0], format!("* ESEARCH (TAG \"e\") {found}"));
    }
    for bad in [
        "STORE 1 (UNCHANGEDSINCE -1) FLAGS ()",
        "FETCH 1 UID (CHANGEDSINCE 0)",
        "FETCH 1 UID (CHANGEDSINCE x)",
        "SELECT INBOX (CONDSTORE",
    ] {
        assert!(one.answer(bad).starts_with("BAD "), "{bad}");
    }
    running.stop();
}

/// Mod-sequences only rise, also with expunges (RFC 7162, 3.1.2.2), and a new message has one.
#[test]
fn every_change_has_a_higher_modseq() {
    let running = Running::new();
    let mut client = running.login();
    client.fill("INBOX", 1);
    client.ok("SELECT INBOX");
    let mut last = highest_modseq(&mut client);
    client.ok("CREATE Other");
    for command in [
        "STORE 1 +FLAGS (\\Seen)",
        "STORE 1 +FLAGS (work)",
        "STORE 1 -FLAGS (\\Seen)",
        "STORE 1 +FLAGS (\\Deleted)",
        "EXPUNGE",
    ] {
        client.ok(command);
        let now = highest_modseq(&mut client);
        assert!(now > last, "{command}");
        last = now;
    }
    client.fill("INBOX", 1);
    assert!(highest_modseq(&mut client) > last);
    let last = highest_modseq(&mut client);
    client.ok("STORE 1 -FLAGS (\\Seen)");
    assert_eq!(highest_modseq(&mut client), last, "nothing has changed");
    running.stop();
}

/// RFC 7162, 3.1: whichever command shows first that the client knows of mod-sequences, it is told the highest of the mailbox.
#[test]
fn enabling_tells_the_highest_modseq_once() {
    let running = Running::new();
    running.login().fill("INBOX", 2);
    for command in [
        "ENABLE CONDSTORE",
        "FETCH 1 (MODSEQ)",
        "FETCH 1 (FLAGS) (CHANGEDSINCE 1)",
        "STORE 1 (UNCHANGEDSINCE 1000) +FLAGS.SILENT (\\Seen)",
        "SEARCH MODSEQ 1",
        "STATUS INBOX (HIGHESTMODSEQ)",
    ] {
        let mut client = running.login();
        client.ok("SELECT INBOX");
        let told = |client: &mut Client| {
            let responses = client.ok(command);
            responses.iter().filter(|line| line.starts_with("* OK [HIGHESTMODSEQ ")).count()
        };
        assert_eq!(told(&mut client), 1, "{command}");
        assert_eq!(told(&mut client), 0, "{command} once more");
    }
    running.stop();
}

/// RFC 4315: APPENDUID, COPYUID, and UID EXPUNGE of some only.
#[test]
fn uidplus() {
    let running = Running::new();
    let mut client = running.login();
    client.ok("CREATE Other");
    assert!(client.append("Other", "", "first").starts_with("OK [APPENDUID 2 1] "));
    assert!(client.append("Other", "(\\Seen)", "second").starts_with("OK [APPENDUID 2 2] "));
    client.ok("SELECT Other");
    client.ok("CREATE Third");
    assert!(client.answer("COPY 2,1 Third").starts_with("OK [COPYUID 3 1:2 1:2] "));
    assert!(client.answer("COPY 1:2 Other").starts_with("OK [COPYUID 2 1:2 3:4] "));
    client.ok("STORE 1:4 +FLAGS.SILENT (\\Deleted)");
    assert_eq!(client.ok("UID EXPUNGE 2:3,9"), ["* 2 EXPUNGE", "* 2 EXPUNGE"]);
    assert_eq!(client.ok("UID SEARCH ALL"), ["* SEARCH 1 4"]);
    client.ok("STORE 1:* -FLAGS.SILENT (\\Deleted)");
    let said = client.command("UID MOVE 4 Third");
    assert!(said[0].starts_with("* OK [COPYUID 3 4 3] "), "{said:?}");
    assert_eq!(said[1], "* 2 EXPUNGE");
    running.stop();
}
