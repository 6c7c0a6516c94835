//! Accounts, configuration, start and stop.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use crate::harness::{Client, PASSWORD, Server, Store, exists, text};

#[test]
fn accounts_on_a_stopped_and_on_a_running_server() {
    let store = Store::new();
    let add = |name: &str, password: &str| store.run_with(&["user", "add", name, "--password-stdin"], password);
    assert!(add("Ann@Example.org", "first\n").status.success(), "the store is made");
    assert_eq!(store.done(&["user", "list"]), "ann@example.org\n");
    let again = add("ann@example.org", "other\n");
    assert!(!again.status.success());
    assert!(text(&again.stderr).contains("ann@example.org exists already"));

    let server = store.serve();
    let mode = std::fs::metadata(store.data().join("control.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(add("bob@example.org", "second").status.success());
    server.deliver(&["bob@example.org"], "Subject: at once\r\n\r\nx");
    assert_eq!(store.done(&["user", "list"]), "ann@example.org\nbob@example.org\n");
    let mut client = server.imap();
    assert!(client.answer("LOGIN bob@example.org wrong").starts_with("NO [AUTHENTICATIONFAILED]"));
    assert!(client.answer("LOGIN BOB@example.org second").starts_with("OK [CAPABILITY "));
    assert!(store.run_with(&["user", "passwd", "bob@example.org", "--password-stdin"], "third\n").status.success());
    let mut client = server.imap();
    assert!(client.answer("LOGIN bob@example.org second").starts_with("NO "), "it was remembered, and counts no more");
    client.ok("LOGIN bob@example.org third");
    assert!(store.refused(&["user", "delete", "nobody@example.org"]).contains("no such account"));
    store.done(&["user", "delete", "bob@example.org"]);
    assert_eq!(store.done(&["user", "list"]), "ann@example.org\n");
    let mut client = server.imap();
    assert!(client.answer("LOGIN bob@example.org third").starts_with("NO "));
    let stats = store.done(&["stats", "--json"]);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["accounts"], 1);
    assert_eq!(stats["server"]["deliveries"], 1);
    assert_eq!(stats["server"]["logins"], 2);
    assert_eq!(stats["shards"].as_array().unwrap().len(), 2);
    assert!(store.done(&["stats"]).contains("deliveries            1\n"));
    server.stop();

    assert!(!exists(&store.data(), "control.sock"));
    assert_eq!(store.done(&["user", "list"]), "ann@example.org\n");
    let stats: serde_json::Value = serde_json::from_str(&store.done(&["stats", "--json"])).unwrap();
    assert_eq!((&stats["accounts"], &stats["server"]), (&1.into(), &serde_json::Value::Null));
}

/// Hashing is spread over all cores, so that this is done in seconds.
#[test]
fn an_import_of_300_users() {
    let store = Store::new();
    let lines: String = (0..300).map(|user| format!("user{user}@example.org:password{user}\n")).collect();
    let file = store.path("users");
    std::fs::write(&file, lines).unwrap();
    let begun = std::time::Instant::now();
    let said = store.done(&["user", "import", file.to_str().unwrap()]);
    println!("an import of 300 users took {:?}", begun.elapsed());
    assert_eq!(said, "300 accounts added, 0 existed already\n");
    std::fs::write(&file, "new@example.org:x\nuser7@example.org:changed\n").unwrap();
    let server = store.serve();
    let said = store.done(&["user", "import", file.to_str().unwrap()]);
    assert_eq!(said, "1 accounts added, 1 existed already\nleft as it was: user7@example.org\n");
    server.imap().ok("LOGIN user7@example.org password7");
    std::fs::write(&file, "other@example.org:x\nthird@example.org:{CRYPT}y\n").unwrap();
    let error = store.refused(&["user", "import", file.to_str().unwrap()]);
    assert!(error.contains("line 2") && error.contains("{CRYPT}"), "{error}");
    assert!(!store.done(&["user", "list"]).contains("other@"), "all or nothing");
    server.stop();
}

#[test]
fn a_check_finds_damage_and_names_it() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    assert!(Store::new().refused(&["check"]).contains("no data directory"));
    let server = store.serve();
    server.deliver(&["ann@example.org", "bob@example.org"], "Subject: x\r\n\r\nFINDME");
    assert!(store.refused(&["check"]).contains("in use"));
    server.stop();
    assert!(store.done(&["check"]).contains("2 messages"));
    assert_ne!(damage(&store, b"FINDME"), 0, "a short body is stored as it is");
    let output = store.run(&["check"]);
    assert_eq!(output.status.code(), Some(1));
    let found = text(&output.stdout);
    assert!(found.contains("damage: ") && found.contains("@example.org, INBOX, UID 1"), "{found}");
}

/// Changes one letter of a text wherever it is in a store's files; in how many of them that was.
fn damage(store: &Store, text: &[u8]) -> usize {
    use std::os::unix::fs::FileExt;
    let inside = |paths: Vec<std::path::PathBuf>| -> Vec<std::path::PathBuf> {
        let entries = paths
            .into_iter()
            .filter(|path| path.is_dir())
            .flat_map(|path| std::fs::read_dir(path).expect("a directory"));
        entries.map(|entry| entry.expect("an entry").path()).collect()
    };
    let mut damaged = 0;
    for file in inside(inside(inside(vec![store.data()]))) {
        let bytes = std::fs::read(&file).expect("a file");
        if let Some(at) = bytes.windows(text.len()).position(|window| window == text) {
            let file = std::fs::OpenOptions::new().write(true).open(file).expect("a file");
            file.write_all_at(&[text[0] ^ 0x20], at as u64).expect("can be written");
            damaged += 1;
        }
    }
    damaged
}

#[test]
fn a_scrub_of_a_running_server_finds_damage_and_names_it() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    assert!(store.refused(&["scrub"]).contains("no server runs"));
    let server = store.serve();
    server.deliver(&["ann@example.org", "bob@example.org"], "Subject: x\r\n\r\nFINDME");
    // What is being written to is left out.
    store.done(&["compact", "--wait"]);
    assert!(store.done(&["scrub", "--wait"]).contains("no damage found"));
    assert_ne!(damage(&store, b"FINDME"), 0, "a short body is stored as it is");
    let output = store.run(&["scrub", "--wait", "--bytes-per-s", "0"]);
    assert_eq!(output.status.code(), Some(1));
    let found = text(&output.stdout);
    assert!(found.contains("damage: ") && found.contains("@example.org, INBOX, UID 1"), "{found}");
    let stats: serde_json::Value = serde_json::from_str(&store.done(&["stats", "--json"])).unwrap();
    let sum = |key: &str| -> u64 {
        stats["shards"].as_array().unwrap().iter().map(|shard| shard[key].as_u64().unwrap()).sum()
    };
    let shards = stats["shards"].as_array().unwrap().len() as u64;
    assert_eq!(sum("scrub_passes"), 2 * shards);
    assert!(sum("scrub_findings") > 0 && sum("scrub_bytes") > 0);
    server.signal("-TERM");
    let (status, log) = server.wait();
    assert!(status.success());
    assert!(log.contains("the scrub has found damage: "), "{log}");
}

#[test]
fn a_rebuild_takes_the_log_alone_and_changes_nothing() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    let server = store.serve();
    server.deliver(&["ann@example.org", "bob@example.org"], "Subject: x\r\n\r\none");
    server.deliver(&["ann@example.org"], "Subject: y\r\n\r\ntwo");
    let look = |server: &Server| {
        let mut client = server.inbox("ann@example.org");
        let status = client.ok("STATUS Work (UIDVALIDITY UIDNEXT HIGHESTMODSEQ)");
        let fetched = client.ok("FETCH 1:* (UID FLAGS MODSEQ BODY.PEEK[])");
        // The tag is not the same.
        (status[0].clone(), fetched[..fetched.len() - 1].to_vec())
    };
    let mut client = server.inbox("ann@example.org");
    client.ok("STORE 1 +FLAGS (\\Flagged)");
    client.ok("CREATE Work");
    client.ok("COPY 1:2 Work");
    drop(client);
    let before = look(&server);
    assert!(store.refused(&["rebuild"]).contains("in use"));
    server.stop();
    let said = store.done(&["rebuild"]);
    assert!(said.contains("rebuilt the index of") && said.contains("every UID"), "{said}");
    assert!(store.done(&["check"]).contains("no damage found"));
    let server = store.serve();
    assert_eq!(look(&server), before);
    server.stop();
}

#[test]
fn a_repair_names_what_is_lost_and_expunges_it_when_told_to() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    let server = store.serve();
    server.deliver(&["ann@example.org"], "Subject: =?utf-8?Q?gr=C3=BCn?=\r\n\r\nFINDME");
    server.deliver(&["ann@example.org"], "Subject: y\r\n\r\ntwo");
    server.stop();
    assert!(store.done(&["repair"]).contains("nothing to mend"));
    assert_ne!(damage(&store, b"FINDME"), 0, "a short body is stored as it is");
    // The log has lost what the index still has: that is not thrown away without being asked for.
    let output = store.run(&["rebuild"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("ann@example.org, INBOX; only the index has UID 1"));
    assert!(text(&output.stderr).contains("posthaste rebuild --yes"));
    let output = store.run(&["repair"]);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stdout);
    let lost = "lost: ann@example.org, INBOX, UID 1: ";
    assert!(said.contains(lost) && said.contains(", subject \"grün\"") && said.contains("left in place"), "{said}");
    let output = store.run(&["repair", "--expunge-lost"]);
    let said = text(&output.stdout);
    assert!(said.contains(lost) && said.contains("; expunged; "), "{said}");
    assert!(text(&output.stderr).contains("1 messages are lost, and have been expunged"));
    let server = store.serve();
    let mut client = server.inbox("ann@example.org");
    assert_eq!(client.ok("UID SEARCH ALL")[0], "* SEARCH 2");
    drop(client);
    server.stop();
    assert!(store.done(&["rebuild", "--yes"]).contains("rebuilt the index"));
    let server = store.serve();
    server.deliver(&["ann@example.org"], "Subject: z\r\n\r\nthree");
    let mut client = server.inbox("ann@example.org");
    assert_eq!(client.ok("UID SEARCH ALL")[0], "* SEARCH 2 3");
    drop(client);
    server.stop();
}

#[test]
fn a_second_process_is_refused() {
    let store = Store::with(&["ann@example.org"]);
    let server = store.serve();
    let error = store.refused(&["serve", "--listen", "imap=127.0.0.1:0"]);
    assert!(error.contains("in use") && error.contains(&format!("process {}", server.id())), "{error}");
    server.imap().ok("NOOP");
    // Nor does another store get the same port.
    let other = Store::new();
    let error = other.refused(&["serve", "--listen", &format!("imap=127.0.0.1:{}", server.port("imap"))]);
    assert!(error.contains("cannot listen for imap 127.0.0.1:"), "{error}");
    server.stop();
}

#[test]
fn a_restart_keeps_mail_however_the_server_ended() {
    let store = Store::with(&["ann@example.org", "bob@example.org"]);
    for round in 1..=4 {
        let server = store.serve();
        let users = ["ann@example.org", "bob@example.org"];
        server.deliver(&users, &format!("Subject: {round}\r\n\r\nx"));
        for user in users {
            let mut client = server.inbox(user);
            let found = client.ok("UID FETCH 1:* BODY.PEEK[HEADER.FIELDS (SUBJECT)]");
            assert_eq!(found.len(), round, "{found:?}");
            for (number, response) in found.iter().enumerate() {
                let number = number + 1;
                assert!(response.starts_with(&format!("* {number} FETCH (UID {number} ")), "{response}");
                assert!(response.contains(&format!("Subject: {number}\r\n")), "{response}");
            }
            let flags = client.ok("FETCH 1:* FLAGS");
            assert_eq!(flags.iter().filter(|line| line.contains("\\Flagged")).count(), round - 1, "{flags:?}");
            client.ok(&format!("STORE {round} +FLAGS.SILENT (\\Flagged)"));
        }
        if round % 2 == 0 { server.stop() } else { server.kill() }
    }
}

#[test]
fn a_stop_finishes_what_is_in_hand() {
    let store = Store::with(&["ann@example.org"]);
    let server = store.serve();
    let mut resting = server.inbox("ann@example.org");
    let mut idling = server.inbox("ann@example.org");
    idling.send("i IDLE\r\n");
    assert!(idling.line().starts_with("+ "));
    let mut greeted = server.lmtp();
    let mut sending = server.lmtp();
    sending.send("LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<ann@example.org>\r\nDATA\r\nSubject: half\r\n");
    (0..3).for_each(|_| _ = sending.reply());
    assert!(sending.reply().starts_with("354 "));
    server.signal("-TERM");
    for client in [&mut resting, &mut idling] {
        assert!(client.line().starts_with("* BYE "));
        assert!(client.ended());
    }
    assert!(greeted.reply().starts_with("421 4.3.2 "));
    assert!(greeted.ended());
    sending.send("\r\nand the other half\r\n.\r\n");
    assert_eq!(sending.reply(), "250 2.0.0 Stored");
    assert!(sending.reply().starts_with("421 4.3.2 "));
    let (status, log) = server.wait();
    assert!(status.success(), "{log}");
    let server = store.serve();
    assert_eq!(server.login("ann@example.org").ok("STATUS INBOX (MESSAGES)"), ["* STATUS INBOX (MESSAGES 1)"]);
    server.signal("-INT");
    assert!(server.wait().0.success());
}

#[test]
fn compaction_gives_space_back_with_and_without_a_server() {
    let store = Store::with(&["ann@example.org"]).set("store.shards=1").set("store.segment_size_bytes=1048576");
    let noise: String =
        (0..3000_u64).map(|line| format!("{:x}\r\n", (line + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect();
    let bytes = |told: &str| {
        let numbers = told.split(' ').filter_map(|word| word.parse::<u64>().ok()).collect::<Vec<_>>();
        (numbers[1], numbers[2])
    };
    let server = store.serve();
    for number in 0..40 {
        server.deliver(&["ann@example.org"], &format!("Subject: message {number}\r\n\r\n{noise}"));
    }
    let mut client = server.inbox("ann@example.org");
    client.ok("STORE 1:30 +FLAGS.SILENT (\\Deleted)");
    client.ok("EXPUNGE");
    let (before, after) = bytes(&store.done(&["compact", "--wait"]));
    assert!(after < before / 3, "{before} octets became {after}");
    let fetched = client.ok("UID FETCH 35 BODY.PEEK[TEXT]").concat();
    assert!(fetched.contains(&noise[..1000]), "{fetched}");
    assert!(store.done(&["stats"]).contains("compactions"));
    // Nobody waits, and it goes on all the same.
    assert_eq!(store.done(&["compact"]), "");
    server.stop();
    let (before, after) = bytes(&store.done(&["compact"]));
    assert!(before > 0 && after <= before + 8192, "{before} octets became {after}");
    assert!(store.done(&["check"]).contains("no damage"));
}

#[test]
fn what_is_misspelt_is_told_where() {
    let store = Store::new();
    assert!(store.refused(&["user", "list", "--set", "store.shard=3"]).contains("did you mean `shards`?"));
    let config = store.path("config.toml");
    std::fs::write(&config, "[server]\nworkers = 1\nlisten_on = []\n").unwrap();
    let error = store.refused(&["user", "list", "--config", config.to_str().unwrap()]);
    assert!(error.contains("line 3") && error.contains("listen_on"), "{error}");
}

#[test]
fn a_unix_socket_serves_lmtp() {
    use std::io::{BufRead, BufReader, Write};
    let store = Store::with(&["ann@example.org"]);
    let path = store.path("lmtp.sock");
    let listen = format!("lmtp=unix:{}", path.display());
    let server = store.serve_with(&["--plaintext-auth", "--listen", &listen]);
    let mut stream = BufReader::new(UnixStream::connect(&path).unwrap());
    let message = "LHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<ann@example.org>\r\nDATA\r\nx: y\r\n.\r\nQUIT\r\n";
    stream.get_mut().write_all(message.as_bytes()).unwrap();
    let last = stream.lines().map_while(Result::ok).filter(|line| line.starts_with("250 2.0.0")).count();
    assert_eq!(last, 1);
    let header = server.inbox("ann@example.org").ok("FETCH 1 BODY.PEEK[HEADER]").remove(0);
    assert!(header.contains("Return-Path: <>\r\nReceived: from x\r\n\tby "), "{header}");
    server.stop();
    assert!(!path.exists());
}

#[test]
fn too_many_connections_are_told_so() {
    let store = Store::with(&["ann@example.org"]).set("limits.connections=3");
    let server = store.serve();
    let clients: Vec<Client> = (0..3).map(|_| server.imap()).collect();
    let mut refused = Client::new(server.port("imap"));
    assert!(refused.line().starts_with("* BYE [UNAVAILABLE] Too many connections"));
    assert!(refused.ended());
    let mut refused = Client::new(server.port("lmtp"));
    assert!(refused.line().starts_with("421 4.3.2 Too many connections"));
    drop(clients);
    // The server notices the ends one after another.
    loop {
        let mut client = Client::new(server.port("imap"));
        if client.line().starts_with("* OK ") {
            client.ok(&format!("LOGIN ann@example.org {PASSWORD}"));
            break;
        }
    }
    server.stop();
}

/// What a client finds in a new account, by the uses that it looks for (RFC 6154).
#[test]
fn a_new_account_has_the_usual_mailboxes() {
    let store = Store::as_it_comes();
    store.import(&["ann@example.org"]);
    let server = store.serve();
    let mut client = server.login("ann@example.org");
    let usual = [
        "* LIST (\\HasNoChildren \\Archive) \"/\" Archive",
        "* LIST (\\HasNoChildren \\Drafts) \"/\" Drafts",
        "* LIST (\\HasNoChildren) \"/\" INBOX",
        "* LIST (\\HasNoChildren \\Junk) \"/\" Junk",
        "* LIST (\\HasNoChildren \\Sent) \"/\" Sent",
        "* LIST (\\HasNoChildren \\Trash) \"/\" Trash",
    ];
    assert_eq!(client.ok("LIST \"\" *"), usual);
    assert_eq!(client.ok("LSUB \"\" *").len(), 6, "all of them are subscribed to");
    server.stop();

    let store = store.set("accounts.mailboxes=[\"Lists\", \"Lists/rust=important\"]");
    store.import(&["bob@example.org"]);
    let server = store.serve();
    let listed = server.login("bob@example.org").ok("LIST \"\" *");
    assert!(listed[1].contains("\\HasChildren") && listed[2].contains("\\Important"), "{listed:?}");
    assert_eq!(server.login("ann@example.org").ok("LIST \"\" *"), usual);
    server.stop();
}

#[test]
fn the_manual_and_completions_come_from_the_command_line() {
    let store = Store::new();
    let page = store.done(&["man"]);
    assert!(page.contains(".TH posthaste") && page.contains("plaintext"), "{page}");
    let directory = store.path("man");
    store.done(&["man", directory.to_str().unwrap()]);
    assert!(exists(&directory, "posthaste.1") && exists(&directory, "posthaste-serve.1"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(store.done(&["completions", shell]).contains("plaintext-auth"));
    }
}

/// Each line is an object, and what concerns a connection names it.
#[test]
fn logs_as_json() {
    let store = Store::with(&["ann@example.org"]).set("log.format=json").set("log.level=debug");
    let server = store.serve();
    server.login("ann@example.org");
    server.imap().answer("LOGIN ann@example.org wrong");
    server.signal("-TERM");
    let (_, log) = server.wait();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let find = |message: &str| lines.iter().find(|line| line["message"] == message).expect(message);
    assert_eq!(find("logged in")["user"], "ann@example.org");
    assert!(find("logged in")["session"].is_u64());
    assert_eq!(find("a login failed")["level"], "INFO");
}
