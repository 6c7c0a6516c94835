//! Profiles against a server that stalls: what was due meanwhile is timed from when it was due.
#![expect(clippy::unwrap_used, reason = "a helper that panics fails its test")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

const STALL: Duration = Duration::from_secs(1);

/// An LMTP server that answers no message until a time after the first has come, and all at once from then on.
fn stalling_server() -> String {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accept = move || {
        for stream in listener.incoming() {
            let serve = move || serve(BufReader::new(stream.unwrap()), &FIRST);
            thread::Builder::new().spawn(serve).unwrap();
        }
    };
    thread::Builder::new().spawn(accept).unwrap();
    address
}

fn serve(mut stream: BufReader<TcpStream>, first: &OnceLock<Instant>) {
    let mut line = String::new();
    let mut in_data = false;
    stream.get_mut().write_all(b"220 x\r\n").unwrap();
    while let Ok(1..) = stream.read_line(&mut line) {
        let reply: &[u8] = match (in_data, line.trim_end()) {
            (true, ".") => {
                in_data = false;
                let end = *first.get_or_init(Instant::now) + STALL;
                thread::sleep(end.saturating_duration_since(Instant::now()));
                b"250 x\r\n"
            }
            (true, _) => b"",
            (false, "DATA") => {
                in_data = true;
                b"354 x\r\n"
            }
            (false, "QUIT") => return,
            (false, _) => b"250 x\r\n",
        };
        stream.get_mut().write_all(reply).unwrap();
        line.clear();
    }
}

fn profile(directory: &std::path::Path, changes: &[(&str, &str)], options: &[&str]) -> Output {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles/isp.toml");
    let mut text = std::fs::read_to_string(path).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    let file = directory.join("p.toml");
    std::fs::write(&file, text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"));
    command.arg("profile").arg(file).args(["--json", "--imap", "127.0.0.1:1", "--password", "p"]).args(options);
    command.output().unwrap()
}

/// With a closed loop of four connections only four deliveries would tell of the stall.
#[test]
fn a_stall_is_in_the_latency_of_all_that_was_due() {
    let directory = tempfile::tempdir().unwrap();
    // Nobody but those who deliver.
    let changes = [
        ("imap_share = 0.85", "imap_share = 0.0"),
        ("pop3_share = 0.15", "pop3_share = 1.0"),
        ("polls_per_hour = 4.0", "polls_per_hour = 0.0"),
        ("received_per_day = 3.0", "received_per_day = 864.0"),
        ("size_mean_bytes = 75000", "size_mean_bytes = 12000"),
    ];
    let address = stalling_server();
    let options = ["--lmtp", &address, "--pop3", "127.0.0.1:1", "--as-users", "10000", "--seconds", "2"];
    let options = [&options[..], &["--hour", "5", "--concurrency", "4", "--messages", "5"]].concat();
    let output = profile(directory.path(), &changes, &options);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    assert!(output.status.success(), "{report}");
    let deliveries = &report["kinds"]["deliver"];
    let count = deliveries["operations"].as_u64().unwrap();
    let due = 2.0 * deliveries["rate_intended"].as_f64().unwrap();
    assert!((due - 5.0 * due.sqrt()..due + 5.0 * due.sqrt()).contains(&(count as f64)), "{count} for {due}, seed 1");
    // Half of them were due during the stall, evenly, and waited for half of it.
    let latency = |name: &str| deliveries["latency_us"][name].as_u64().unwrap();
    assert!(latency("p90") > 600_000, "{report}");
    assert!(latency("max") > 900_000, "{report}");
    assert!(report["waiting_max"].as_u64().unwrap() > count / 4, "{report}");
}

#[test]
fn a_misspelt_key_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = profile(directory.path(), &[("zipf_exponent =", "zipf_exponents =")], &["--lmtp", "127.0.0.1:1"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty());
    assert!(error.contains("line 14: there is no key `zipf_exponents`; did you mean `zipf_exponent`?"), "{error}");
}
