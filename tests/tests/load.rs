//! The load generator against the real server: every workload does what it says, in the clear and under TLS.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::process::Command;

use posthaste_tests::server::{Server, Store, program};

const USERS: usize = 4;
const PASSWORD: &str = "secret";

/// Runs a workload with 4 users and 4 connections; its report.
fn run(workload: &str, options: &[&str]) -> String {
    let bench = program().unwrap().with_file_name("posthaste-bench");
    assert!(bench.is_file(), "no load generator beside the server: run `cargo build -p posthaste-bench`");
    let mut command = Command::new(bench);
    command.args([workload, "--json", "--connections", "4"]).args(options);
    if workload != "idle" {
        command.args(["--timeout", "20"]);
    }
    let output = command.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{workload} {options:?}: {out}{err}");
    out.into_owned()
}

/// A number in a report.
fn number(report: &str, name: &str) -> Option<f64> {
    let rest = report.split_once(&format!("\"{name}\":"))?.1;
    let end = rest.find([',', '}']).unwrap_or(rest.len());
    rest[..end].trim().parse().ok()
}

fn server() -> (Store, Server) {
    let store = Store::new(&["store.shards=2"], &["--plaintext-auth", "--workers", "2"]).unwrap();
    let users: Vec<String> = (1..=USERS).map(|number| format!("user{number}@example.org")).collect();
    store.add_users(&users, PASSWORD).unwrap();
    let server = store.start().unwrap();
    (store, server)
}

#[test]
fn workloads_run_against_the_real_server() {
    let (store, server) = server();
    let address = |service: &str| server.address(service).to_string();
    let users = ["--user-count", "4"];
    let with =
        |options: &[&str]| -> Vec<String> { users.iter().chain(options).map(|&option| option.to_owned()).collect() };
    let run = |workload: &str, options: &[&str]| {
        let options = with(options);
        run(workload, &options.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let (lmtp, imap, imaps, pop3, pop3s) =
        (address("lmtp"), address("imap"), address("imaps"), address("pop3"), address("pop3s"));
    run("deliver", &["--lmtp", &lmtp, "--messages", "40", "--size", "3000"]);

    let stats = format!("{} stats --json --data {}", program().unwrap().display(), store.data().display());
    let report = run(
        "fetch",
        &["--imap", &imap, "--password", PASSWORD, "--item", "ENVELOPE", "--messages", "40", "--server-stats", &stats],
    );
    assert_eq!(number(&report, "shards.body_frames_unpacked"), Some(0.0), "{report}");
    let body = ["--password", PASSWORD, "--item", "BODY.PEEK[]", "--messages", "40", "--server-stats", &stats];
    let report = run("fetch", &[&["--imap", &imaps, "--tls"], &body[..]].concat());
    assert!(number(&report, "shards.body_frames_unpacked") > Some(0.0), "{report}");

    let pid = server.pid().to_string();
    for (imap, pop3, tls) in [(&imap, &pop3, None), (&imaps, &pop3s, Some("--tls"))] {
        let tls = tls.as_slice();
        run("sessions", &[&["--imap", imap, "--password", PASSWORD, "--messages", "40"], tls].concat());
        run("pop3", &[&["--pop3", pop3, "--password", PASSWORD, "--messages", "40"], tls].concat());
        run("push", &[&["--lmtp", &lmtp, "--imap", imap, "--password", PASSWORD, "--messages", "20"], tls].concat());
        run("idle", &[&["--imap", imap, "--password", PASSWORD, "--hold", "0", "--server-pid", &pid], tls].concat());
    }
    // After all else: the server then has the messages in its cache.
    for (option, address) in [("--verify-imap", &imap), ("--verify-pop3", &pop3)] {
        let verify = ["--verify", option, address, "--password", PASSWORD, "--recipients", "2"];
        let report = run("deliver", &[&["--lmtp", &lmtp, "--messages", "40"], &verify[..]].concat());
        assert_eq!(number(&report, "proven"), Some(80.0), "{report}");
    }
    server.stop().unwrap();
}

#[test]
fn sessions_of_tls_are_resumed_when_asked_for() {
    let (_store, server) = server();
    let imaps = server.address("imaps").to_string();
    let report = run("handshakes", &["--server", &imaps, "--messages", "40"]);
    assert_eq!(number(&report, "resumed"), Some(0.0), "{report}");
    let report = run("handshakes", &["--server", &imaps, "--messages", "40", "--tls-resume"]);
    assert!(number(&report, "resumed") > Some(20.0), "{report}");
    server.stop().unwrap();
}
