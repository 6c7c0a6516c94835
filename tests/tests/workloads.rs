//! The load generator's workloads over IMAP and SMTP against the real server: as many operations as were asked for, no errors,
//! and the way that the server's capabilities allow.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::path::PathBuf;
use std::process::Command;

use posthaste_tests::server::{Server, Store, program};

const USERS: usize = 4;
const PASSWORD: &str = "secret";

fn bench() -> Command {
    let bench: PathBuf = program().unwrap().with_file_name("posthaste-bench");
    assert!(bench.is_file(), "no load generator beside the server: run `cargo build -p posthaste-bench`");
    Command::new(bench)
}

/// A server with users, each with some messages.
struct Loaded {
    _store: Store,
    server: Server,
}

impl Loaded {
    fn start() -> Self {
        let serve =
            ["--plaintext-auth", "--workers", "2", "--listen", "smtp=127.0.0.1:0", "--listen", "smtps=127.0.0.1:0"];
        let store = Store::new(&["store.shards=2"], &serve).unwrap();
        let users: Vec<String> = (1..=USERS).map(|number| format!("user{number}@example.org")).collect();
        store.add_users(&users, PASSWORD).unwrap();
        let server = store.start().unwrap();
        let loaded = Self { _store: store, server };
        loaded.run("deliver", &["--lmtp", &loaded.address("lmtp"), "--messages", "48", "--generate", "12"]);
        loaded
    }

    fn address(&self, service: &str) -> String {
        self.server.address(service).to_string()
    }

    /// Runs a workload with 4 users and 4 connections, which must succeed; its report.
    fn run(&self, workload: &str, options: &[&str]) -> String {
        let common = ["--json", "--user-count", "4", "--connections", "4", "--timeout", "20"];
        let output = bench().arg(workload).args(common).args(options).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{workload} {options:?}: {out}{err}");
        out.into_owned()
    }

    fn imap(&self, workload: &str, options: &[&str]) -> String {
        let address = self.address("imap");
        self.run(workload, &[&["--imap", &address, "--password", PASSWORD], options].concat())
    }
}

/// A number in a report.
fn number(report: &str, name: &str) -> u64 {
    let found = report.split_once(&format!("\"{name}\":")).map(|(_, rest)| {
        let end = rest.find([',', '}']).unwrap_or(rest.len());
        rest[..end].trim().parse().unwrap()
    });
    found.unwrap_or_else(|| panic!("no {name} in {report}"))
}

#[test]
fn mail_is_delivered_by_smtp() {
    let loaded = Loaded::start();
    let (smtp, smtps) = (loaded.address("smtp"), loaded.address("smtps"));
    for options in [
        &["--smtp", &smtp][..],
        &["--smtp", &smtp, "--no-pipelining"],
        &["--smtp", &smtp, "--one-per-connection"],
        &["--smtp", &smtps, "--tls"],
    ] {
        assert_eq!(number(&loaded.run("deliver", &[options, &["--messages", "20"]].concat()), "operations"), 20);
    }
    let report = loaded.run("deliver", &["--smtp", &smtp, "--messages", "20", "--recipients", "3", "--size", "2000"]);
    assert_eq!((number(&report, "operations"), number(&report, "bytes")), (60, 60 * 2000));
    // 48 were there, 80 and 60 came.
    let report = loaded.imap("sync", &["--messages", "4"]);
    assert_eq!((number(&report, "operations"), number(&report, "messages synced")), (4, 48 + 80 + 60));
    loaded.server.stop().unwrap();
}

#[test]
fn mailboxes_are_synced_and_searched() {
    let loaded = Loaded::start();
    for preset in ["bodies", "headers", "list", "envelope", "structure", "sync", "flags"] {
        let report = loaded.imap("fetch", &["--messages", "40", "--batch", "4", "--preset", preset]);
        assert_eq!(number(&report, "operations"), 40, "{preset}: {report}");
        let report = loaded.imap("sync", &["--messages", "8", "--batch", "5", "--preset", preset]);
        assert_eq!((number(&report, "operations"), number(&report, "messages synced")), (8, 96), "{preset}: {report}");
    }
    for kind in ["flags", "date", "size", "header", "text", "body"] {
        let report = loaded.imap("search", &["--messages", "20", "--kind", kind]);
        assert_eq!(
            (number(&report, "operations"), number(&report, "messages searched")),
            (20, 240),
            "{kind}: {report}"
        );
        assert_eq!(number(&report, "by numbers"), 20);
    }
    let report = loaded.imap("search", &["--messages", "4", "--keys", "ALL"]);
    assert_eq!(number(&report, "messages found"), 48);
    loaded.server.stop().unwrap();
}

#[test]
fn clients_come_back() {
    let loaded = Loaded::start();
    let with_modseqs = loaded.imap("resync", &["--messages", "20", "--changes", "3", "--without", "QRESYNC"]);
    assert_eq!((number(&with_modseqs, "operations"), number(&with_modseqs, "by CONDSTORE")), (20, 20));
    assert_eq!(number(&with_modseqs, "flags received"), 60);
    let without = ["--messages", "20", "--changes", "3", "--without", "CONDSTORE", "--without", "QRESYNC"];
    let plain = loaded.imap("resync", &without);
    assert_eq!((number(&plain, "by plain FETCH"), number(&plain, "flags received")), (20, 20 * 12));
    loaded.server.stop().unwrap();
}

#[test]
fn mailboxes_are_changed() {
    let loaded = Loaded::start();
    for (options, changed, told) in
        [(&[][..], 40, 40), (&["--silent"], 40, 0), (&["--all"], 480, 480), (&["--all", "--silent"], 480, 0)]
    {
        let report = loaded.imap("flags", &[options, &["--messages", "40"]].concat());
        assert_eq!((number(&report, "operations"), number(&report, "messages changed")), (40, changed), "{report}");
        assert_eq!(number(&report, "FETCH responses"), told, "{report}");
    }
    for without in [&[][..], &["--without", "LITERAL+"], &["--without", "UIDPLUS"]] {
        let report = loaded.imap("append", &[without, &["--messages", "20", "--generate", "3"]].concat());
        assert_eq!(number(&report, "operations"), 20);
    }
    for (without, way) in [(&[][..], "by MOVE"), (&["--without", "MOVE"], "by COPY, STORE and EXPUNGE")] {
        let options = ["--messages", "40", "--mailbox-messages", "6", "--batch", "2"];
        let report = loaded.imap("move", &[without, &options].concat());
        assert_eq!((number(&report, "operations"), number(&report, way)), (40, 40), "{report}");
        assert_eq!(number(&report, "messages moved"), 80);
        assert!(number(&report, "turns, with SELECT") > 4);
    }
    let options = ["--messages", "40", "--mailbox-messages", "7", "--batch", "2"];
    let report = loaded.imap("expunge", &options);
    assert_eq!(number(&report, "operations"), 40);
    assert!(number(&report, "refills") > 0);
    // No message but those that were appended is left in the INBOX. Each sync takes the next user; a search may take one twice.
    let report = loaded.imap("sync", &["--messages", "4"]);
    assert_eq!(number(&report, "messages synced"), 48 + 60, "{report}");
    loaded.server.stop().unwrap();
}

#[test]
fn a_hot_mailbox_looks_the_same_to_all() {
    let loaded = Loaded::start();
    let lmtp = loaded.address("lmtp");
    // The last --connections counts.
    let options = ["--lmtp", &lmtp, "--connections", "9", "--messages", "200", "--deliverers", "2", "--storers", "3"];
    let options = [&options[..], &["--pollers", "2", "--user-count", "1"]].concat();
    let address = loaded.address("imap");
    let common = ["hot", "--json", "--timeout", "20", "--imap", &address, "--password", PASSWORD];
    let output = bench().args(common).args(options).output().unwrap();
    let report = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{report}{}", String::from_utf8_lossy(&output.stderr));
    let parts = ["deliveries", "STORE commands", "NOOP commands"].map(|name| number(&report, name));
    assert_eq!((number(&report, "operations"), parts.iter().sum()), (200, 200_u64), "{report}");
    assert!(parts.iter().all(|&count| count > 0), "{report}");
    assert_eq!(number(&report, "sessions compared"), 7);
    assert!(number(&report, "responses pushed") > 0);
    loaded.server.stop().unwrap();
}

#[test]
fn several_senders_push() {
    let loaded = Loaded::start();
    let lmtp = loaded.address("lmtp");
    let report = loaded.imap("push", &["--lmtp", &lmtp, "--messages", "60", "--senders", "3"]);
    assert_eq!(number(&report, "operations"), 60);
    loaded.server.stop().unwrap();
}

#[test]
fn a_profile_is_what_its_users_do() {
    let loaded = Loaded::start();
    let profile = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/profiles/business.toml");
    let (imap, smtp, pop3) = (loaded.address("imap"), loaded.address("smtp"), loaded.address("pop3"));
    let options = ["--imap", &imap, "--smtp", &smtp, "--pop3", &pop3, "--password", PASSWORD, "--user-count", "4"];
    let load =
        ["--as-users", "20", "--speed", "1000", "--seconds", "2", "--messages", "20", "--timeout", "20", "--seed", "3"];
    let run = || {
        let output = bench().args(["profile", profile, "--json"]).args(options).args(load).output().unwrap();
        let report = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "seed 3: {report}{}", String::from_utf8_lossy(&output.stderr));
        report
    };
    // Each kind has its object, from its name on.
    let of_kind = |report: &str, kind: &str| {
        let (_, rest) = report
            .split_once(&format!("\"{kind}\":{{\"operations\""))
            .unwrap_or_else(|| panic!("no {kind} in {report}"));
        number(&format!("\"operations\"{rest}"), "operations")
    };
    let kinds = ["deliver", "append", "poll", "read", "flags", "search", "delete"];
    let first = run();
    let counts = kinds.map(|kind| of_kind(&first, kind));
    assert!(counts.iter().all(|&count| count > 0), "seed 3: {counts:?}");
    // 20 users, 3 in 5 of them active, with three connections each, of which two thirds are in IDLE.
    assert_eq!(number(&first, "sessions_in_idle"), 24);
    assert!(of_kind(&first, "push") > 0, "{first}");
    // The same comes again.
    let second = run();
    assert_eq!(kinds.map(|kind| of_kind(&second, kind)), counts, "seed 3");
    loaded.server.stop().unwrap();
}
