//! Mailboxes: names, hierarchy, LIST and LSUB, subscriptions.

use crate::wire::{Client, Running};

fn list(client: &mut Client, arguments: &str) -> Vec<String> {
    let mut found = client.ok(format!("LIST {arguments}"));
    found.iter_mut().for_each(|line| *line = line.strip_prefix("* LIST ").expect("LIST").to_owned());
    found
}

/// RFC 3501, 6.3.8; RFC 3348: the attributes of children are always right.
#[test]
fn list_and_its_attributes() {
    let running = Running::new();
    let mut client = running.login();
    client.ok("CREATE a/b/c");
    client.ok("CREATE \"with space\"");
    client.ok("CREATE Sent (USE (\\Sent))");
    client.ok("CREATE Entw&APw-rfe");
    assert_eq!(list(&mut client, "\"\" \"\""), ["(\\Noselect) \"/\" \"\""]);
    assert_eq!(list(&mut client, "a/ \"\""), ["(\\Noselect) \"/\" \"\""]);
    let top = [
        "(\\HasNoChildren) \"/\" Entw&APw-rfe",
        "(\\HasNoChildren) \"/\" INBOX",
        "(\\HasNoChildren \\Sent) \"/\" Sent",
        "(\\HasChildren) \"/\" a",
        "(\\HasNoChildren) \"/\" \"with space\"",
    ];
    assert_eq!(list(&mut client, "\"\" %"), top);
    assert_eq!(list(&mut client, "\"\" *").len(), 7);
    assert_eq!(list(&mut client, "\"\" %/%"), ["(\\HasChildren) \"/\" a/b"]);
    assert_eq!(list(&mut client, "a/ %"), ["(\\HasChildren) \"/\" a/b"]);
    assert_eq!(list(&mut client, "a *c"), ["(\\HasNoChildren) \"/\" a/b/c"]);
    assert_eq!(list(&mut client, "\"\" inBOX"), ["(\\HasNoChildren) \"/\" INBOX"]);
    assert_eq!(list(&mut client, "\"\" \"*/*/*/*\""), [""; 0]);
    assert_eq!(list(&mut client, "\"\" \"with*\""), ["(\\HasNoChildren) \"/\" \"with space\""]);
    // A mailbox with others below it goes, and its name stays (6.3.4).
    client.ok("DELETE a/b");
    assert_eq!(list(&mut client, "\"\" a/%"), ["(\\Noselect \\HasChildren) \"/\" a/b"]);
    assert!(client.answer("DELETE a/b").starts_with("NO [HASCHILDREN] "));
    assert!(client.answer("SELECT a/b").starts_with("NO "));
    assert!(client.answer("CREATE a/b/c").starts_with("NO [ALREADYEXISTS] "));
    // The level takes along what is below it, and a mailbox may be made of it.
    client.ok("RENAME a/b x/y");
    assert_eq!(
        list(&mut client, "\"\" x*"),
        ["(\\HasChildren) \"/\" x", "(\\Noselect \\HasChildren) \"/\" x/y", "(\\HasNoChildren) \"/\" x/y/c"]
    );
    client.ok("CREATE x/y");
    assert_eq!(list(&mut client, "\"\" x/y"), ["(\\HasChildren) \"/\" x/y"]);
    client.ok("DELETE x/y/c");
    assert_eq!(list(&mut client, "\"\" x/y"), ["(\\HasNoChildren) \"/\" x/y"]);
    assert_eq!(list(&mut client, "\"\" a"), ["(\\HasNoChildren) \"/\" a"]);
    for (command, code) in [
        ("CREATE INBOX", "ALREADYEXISTS"),
        ("CREATE a", "ALREADYEXISTS"),
        ("DELETE INBOX", "CANNOT"),
        ("DELETE none", "NONEXISTENT"),
        ("RENAME none other", "NONEXISTENT"),
        ("RENAME a Sent", "ALREADYEXISTS"),
        ("RENAME a a/b", "CANNOT"),
        ("CREATE a//b", "CANNOT"),
        ("CREATE \"\"", "CANNOT"),
        ("CREATE b&r", "CANNOT"),
        ("CREATE z (USE (\\None))", "USEATTR"),
        ("SELECT none", "NONEXISTENT"),
        ("STATUS none (MESSAGES)", "NONEXISTENT"),
    ] {
        assert!(client.answer(command).starts_with(&format!("NO [{code}] ")), "{command}");
    }
    // RFC 3501, 6.3.3: a name that ends with the delimiter.
    client.ok("CREATE later/");
    assert_eq!(list(&mut client, "\"\" later"), ["(\\HasNoChildren) \"/\" later"]);
    running.stop();
}

/// Trap 18: wildcards take linear time.
#[test]
fn trap_18_wildcards_on_the_wire() {
    let running = Running::new();
    let mut client = running.login();
    let name = vec!["a".repeat(19); 49].join("/");
    client.ok(format!("CREATE {name}"));
    let start = std::time::Instant::now();
    for pattern in ["*a".repeat(400) + "b", "%a%/".repeat(200), "*/%".repeat(300), "*".repeat(1000) + "b"] {
        client.ok(format!("LIST \"\" \"{pattern}\""));
        client.ok(format!("LSUB \"\" \"{pattern}\""));
    }
    assert!(start.elapsed() < std::time::Duration::from_secs(5), "{:?}", start.elapsed());
    running.stop();
}

/// RFC 3501, 6.3.6 and 6.3.9: subscriptions are of names, which need not exist.
#[test]
fn trap_30_subscriptions_survive() {
    let running = Running::new();
    let mut client = running.login();
    client.ok("CREATE foo/bar");
    client.ok("SUBSCRIBE foo/bar");
    client.ok("SUBSCRIBE never/made");
    client.ok("SUBSCRIBE inbox");
    client.ok("DELETE foo/bar");
    client.ok("DELETE foo");
    assert_eq!(
        client.ok("LSUB \"\" *"),
        ["* LSUB () \"/\" INBOX", "* LSUB () \"/\" foo/bar", "* LSUB () \"/\" never/made"]
    );
    // "If foo/bar is subscribed and foo is not, LSUB "" % must return foo with \Noselect."
    let levels = ["* LSUB () \"/\" INBOX", "* LSUB (\\Noselect) \"/\" foo", "* LSUB (\\Noselect) \"/\" never"];
    assert_eq!(client.ok("LSUB \"\" %"), levels);
    assert_eq!(client.ok("LSUB foo/ %"), ["* LSUB () \"/\" foo/bar"]);
    client.ok("SUBSCRIBE foo");
    assert_eq!(client.ok("LSUB \"\" foo%"), ["* LSUB () \"/\" foo"]);
    assert_eq!(client.ok("LIST \"\" f*"), [""; 0], "they do not exist");
    for name in ["foo", "foo/bar", "never/made", "not/subscribed"] {
        client.ok(format!("UNSUBSCRIBE {name}"));
    }
    assert_eq!(client.ok("LSUB \"\" *"), ["* LSUB () \"/\" INBOX"]);
    running.stop();
}

/// RFC 3501, 6.3.5: the messages of INBOX go, INBOX and what is below it stay.
#[test]
fn trap_30_rename() {
    let running = Running::new();
    let mut client = running.login();
    client.ok("CREATE INBOX/below");
    assert_eq!(list(&mut client, "\"\" inbox/%"), ["(\\HasNoChildren) \"/\" INBOX/below"]);
    client.fill("INBOX", 3);
    client.ok("SELECT INBOX");
    client.ok("STORE 2 +FLAGS.SILENT (\\Flagged work)");
    let mut other = running.select("INBOX");
    client.ok("UNSELECT");
    client.ok("RENAME INBOX Old/Mail");
    assert_eq!(
        other.ok("NOOP"),
        ["* 1 EXPUNGE", "* 1 EXPUNGE", "* 1 EXPUNGE", "* 0 RECENT"].map(str::to_owned)[..3].to_vec()
    );
    let all = ["INBOX", "INBOX/below", "Old", "Old/Mail"];
    let listed = client.ok("LIST \"\" *");
    assert_eq!(listed.iter().map(|line| line.rsplit(' ').next().expect("a name")).collect::<Vec<_>>(), all);
    assert_eq!(client.ok("STATUS INBOX (MESSAGES UIDNEXT)"), ["* STATUS INBOX (MESSAGES 0 UIDNEXT 4)"]);
    client.ok("SELECT Old/Mail");
    assert_eq!(client.search("FLAGGED KEYWORD work"), [2]);
    assert_eq!(client.search("ALL"), [1, 2, 3]);
    client.fill("INBOX", 1);
    assert_eq!(other.ok("NOOP")[..1], ["* 1 EXISTS"]);
    assert_eq!(other.ok("FETCH 1 UID"), ["* 1 FETCH (UID 4)"], "no UID is used twice");
    // What is selected keeps its messages under its new name.
    client.ok("RENAME Old New");
    assert_eq!(client.search("ALL"), [1, 2, 3]);
    client.ok("SELECT New/Mail");
    assert_eq!(client.search("ALL"), [1, 2, 3]);
    running.stop();
}

/// RFC 3501, 6.3.1, 6.3.2, 7.1: what SELECT and EXAMINE say.
#[test]
fn select_and_examine() {
    let running = Running::new();
    let mut client = running.login();
    client.fill("INBOX", 2);
    let said = client.command("SELECT INBOX");
    for part in [
        "* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft)",
        "* 2 EXISTS",
        "* 2 RECENT",
        "* OK [UNSEEN 1] ",
        "* OK [PERMANENTFLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft \\*)] ",
        "* OK [UIDVALIDITY 1] ",
        "* OK [UIDNEXT 3] ",
        "* OK [HIGHESTMODSEQ ",
        "OK [READ-WRITE] ",
    ] {
        assert_eq!(said.iter().filter(|line| line.starts_with(part)).count(), 1, "{part}: {said:?}");
    }
    let said = client.command("EXAMINE INBOX");
    assert!(said.iter().any(|line| line.starts_with("* OK [PERMANENTFLAGS ()] ")), "{said:?}");
    assert!(said.iter().any(|line| line == "* 0 RECENT"), "{said:?}");
    assert!(said.last().expect("an answer").starts_with("OK [READ-ONLY] "));
    // Nothing of an examined mailbox can be changed, and \Seen is not set.
    client.ok("CREATE Other");
    for refused in ["STORE 1 +FLAGS (\\Seen)", "UID STORE 1 FLAGS ()", "MOVE 1 Other", "EXPUNGE", "UID EXPUNGE 1"] {
        assert!(client.answer(refused).starts_with("NO [READ-ONLY] "), "{refused}");
    }
    client.ok("FETCH 1:2 BODY[]");
    client.ok("COPY 1 Other");
    client.ok("CHECK");
    client.ok("CLOSE");
    client.ok("SELECT INBOX");
    assert_eq!(client.search("UNSEEN"), [1, 2]);
    // A SELECT that fails leaves nothing selected.
    assert!(client.answer("SELECT none").starts_with("NO "));
    assert!(client.answer("FETCH 1 UID").starts_with("BAD "));
    assert_eq!(client.ok("NAMESPACE"), ["* NAMESPACE ((\"\" \"/\")) NIL NIL"]);
    running.stop();
}

/// RFC 3501, 2.3.2: `\*` and keywords, which have one spelling and a number.
#[test]
fn keywords() {
    let running = Running::new();
    let mut client = running.login();
    client.fill("INBOX", 1);
    client.ok("SELECT INBOX");
    let said = client.ok("STORE 1 +FLAGS ($Label1 work)");
    assert_eq!(said[0], "* FLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft $Label1 work)");
    assert!(
        said[1].starts_with("* OK [PERMANENTFLAGS (\\Answered \\Flagged \\Deleted \\Seen \\Draft $Label1 work \\*)] ")
    );
    assert_eq!(said[2], "* 1 FETCH (UID 1 FLAGS ($Label1 work \\Recent))");
    assert_eq!(client.ok("STORE 1 +FLAGS (WORK)"), ["* 1 FETCH (UID 1 FLAGS ($Label1 work \\Recent))"]);
    assert_eq!(client.search("KEYWORD WoRk"), [1]);
    assert_eq!(client.search("KEYWORD none"), [0_u32; 0]);
    assert_eq!(client.search("UNKEYWORD none"), [1]);
    assert!(client.answer("STORE 1 +FLAGS (\\None)").starts_with("BAD "));
    // Too many are refused, and nothing is lost.
    let many: Vec<String> = (0..300).map(|number| format!("k{number}")).collect();
    assert!(client.answer(format!("STORE 1 +FLAGS ({})", many.join(" "))).starts_with("NO [LIMIT] "));
    assert!(client.answer(format!("STORE 1 +FLAGS ({})", "k".repeat(101))).starts_with("NO [LIMIT] "));
    assert_eq!(client.ok("FETCH 1 FLAGS"), ["* 1 FETCH (FLAGS ($Label1 work \\Recent))"]);
    running.stop();
}
