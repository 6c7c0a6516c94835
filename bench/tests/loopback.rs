//! The program against servers of its own: an LMTP sink, and IMAP and LMTP servers that misbehave.
#![expect(clippy::unwrap_used, reason = "a helper that panics fails its test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
}

/// Its process, and where it listens for LMTP and for IMAP.
struct Sink(Child, String, String);

impl Sink {
    fn start() -> Self {
        let mut child = bench().args(["sink", "--imap", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut address = |service: &str| {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            line.trim().strip_prefix(&format!("listening {service} ")).unwrap().to_owned()
        };
        let (lmtp, imap) = (address("lmtp"), address("imap"));
        Self(child, lmtp, imap)
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn deliver(address: &str, options: &[&str]) -> Output {
    bench().args(["deliver", "--json", "--timeout", "5", "--lmtp", address]).args(options).output().unwrap()
}

fn report(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap()
}

/// A server that gives each connection to `serve`.
fn server(serve: impl Fn(&mut BufReader<TcpStream>) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let accept = move || {
        for stream in listener.incoming() {
            serve(&mut BufReader::new(stream.unwrap()));
        }
    };
    thread::Builder::new().spawn(accept).unwrap();
    address
}

fn line(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    // A client that has seen enough resets the connection; what it sent is then no line.
    if stream.read_line(&mut line).is_err() {
        line.clear();
    }
    line
}

fn say(stream: &mut BufReader<TcpStream>, text: &str) {
    // A client that has seen enough may have gone, which the next line tells.
    let _ = stream.get_mut().write_all(text.as_bytes());
}

#[test]
fn deliveries_are_counted() {
    let sink = Sink::start();
    let pid = sink.0.id().to_string();
    for options in [&[][..], &["--no-pipelining"], &["--one-per-connection"], &["--threads", "2"]] {
        let load = ["--messages", "200", "--connections", "8", "--size", "5000", "--server-pid", &pid];
        let output = deliver(&sink.1, &[&load, options].concat());
        let report = report(&output);
        assert!(output.status.success(), "{report}");
        assert_eq!(report["operations"], 200);
        assert_eq!(report["bytes"], 200 * 5000);
        assert!(report["server_cpu_us_per_operation"].is_number());
        assert!(report["latency_us"]["p99.9"].as_u64().unwrap() > 0);
    }
    let output = deliver(&sink.1, &["--messages", "10", "--recipients", "7", "--user-count", "20"]);
    assert_eq!(report(&output)["operations"], 70);
}

#[test]
fn a_run_ends_in_time() {
    let sink = Sink::start();
    let output = deliver(&sink.1, &["--seconds", "0.2", "--connections", "2"]);
    let report = report(&output);
    assert!(report["operations"].as_u64().unwrap() > 10, "{report}");
    assert!(report["seconds"].as_f64().unwrap() < 2.0, "{report}");
}

#[test]
fn a_table_can_be_had() {
    let sink = Sink::start();
    let output = bench().args(["deliver", "--messages", "5", "--lmtp", &sink.1]).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("deliveries  5 in ") && table.contains("errors  0"), "{table}");
}

#[test]
fn refusals_are_counted_by_kind() {
    let address = server(|stream| {
        say(stream, "220 x\r\n");
        line(stream);
        say(stream, "250 x\r\n");
        loop {
            match line(stream).get(..4) {
                Some("RCPT") => say(stream, "452 4.2.2 full\r\n"),
                Some("QUIT") | None => return say(stream, "221 x\r\n"),
                Some(_) => say(stream, "250 x\r\n"),
            }
        }
    });
    let output = deliver(&address, &["--messages", "3"]);
    let report = report(&output);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(report["errors"]["452 after RCPT"], 3, "{report}");
    assert_eq!(report["first_error"], "\"452 4.2.2 full\" after RCPT");
}

#[test]
fn connections_that_end_are_made_again() {
    let address = server(|stream| {
        say(stream, "220 x\r\n");
        line(stream);
        say(stream, "250-x\r\n250 PIPELINING\r\n");
        // MAIL is answered, and then the connection ends.
        line(stream);
        say(stream, "250 x\r\n");
    });
    let output = deliver(&address, &["--messages", "4"]);
    let report = report(&output);
    assert_eq!(report["operations"], 0);
    let errors: u64 = report["errors"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum();
    assert_eq!(errors, 4, "{report}");
}

#[test]
fn nobody_there_is_an_error_and_no_hang() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let output = deliver(&address, &["--messages", "100", "--connections", "3"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(report(&output)["errors"]["connecting: connection refused"].as_u64().unwrap() >= 3);
}

/// An IMAP server with three messages of which each is `body`.
fn imap_server(body: &'static str) -> String {
    server(move |stream| {
        say(stream, "* OK ready\r\n");
        loop {
            let line = line(stream);
            let mut words = line.split_ascii_whitespace();
            let (Some(tag), Some(command)) = (words.next(), words.next()) else { return };
            match command {
                "EXAMINE" => say(stream, "* 3 EXISTS\r\n* OK [UIDVALIDITY 1] {5}\r\n"),
                "FETCH" => {
                    let (first, last) = words.next().unwrap().split_once(':').unwrap();
                    for number in first.parse::<u32>().unwrap()..=last.parse().unwrap() {
                        say(stream, &format!("* {number} FETCH {body}\r\n"));
                    }
                }
                "LOGOUT" => say(stream, "* BYE\r\n"),
                _ => {}
            }
            say(stream, &format!("{tag} OK done\r\n"));
        }
    })
}

fn fetch(address: &str) -> Output {
    let options = ["--messages", "6", "--batch", "3", "--password", "p", "--imap", address];
    bench().args(["fetch", "--json", "--timeout", "5"]).args(options).output().unwrap()
}

#[test]
fn fetches_are_counted_and_checked() {
    let output = fetch(&imap_server("(UID 1 BODY[] {6}\r\n(((\r\n\n)"));
    let report_of_good = report(&output);
    assert!(output.status.success(), "{report_of_good}");
    assert_eq!(report_of_good["operations"], 6);
    assert_eq!(report_of_good["bytes"], 36);
    for bad in ["(UID 1 BODY[] {5}\r\n(((\r\n\n)", "(UID 1", "UID 1"] {
        let output = fetch(&imap_server(bad));
        // Each of the two commands, over a connection of its own.
        assert_eq!(report(&output)["errors"]["protocol violation"], 2, "{bad}");
    }
}

#[test]
fn users_can_be_printed() {
    let options = ["users", "--users", "u{n}@x", "--user-count", "2", "--password", "a:b"];
    let output = bench().args(options).output().unwrap();
    let mut text = String::new();
    output.stdout.as_slice().read_to_string(&mut text).unwrap();
    assert_eq!(text, "u1@x:a:b\nu2@x:a:b\n");
}

#[test]
fn reports_are_kept_and_compared() {
    let sink = Sink::start();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (a, b) = (path("a.jsonl"), path("b.jsonl"));
    for (file, messages) in [(&a, "50"), (&a, "60"), (&b, "50")] {
        let options = ["--messages", messages, "--output", file, "--label", "sink", "--seed", "9"];
        assert!(deliver(&sink.1, &options).status.success());
    }
    let kept = std::fs::read_to_string(&a).unwrap();
    assert_eq!(kept.lines().count(), 2);
    let report: serde_json::Value = serde_json::from_str(kept.lines().next().unwrap()).unwrap();
    assert_eq!((&report["label"], &report["seed"], &report["operations"]), (&"sink".into(), &9.into(), &50.into()));
    assert_eq!(report["command"][1], "deliver");
    assert!(report["machine"]["kernel"].is_string() && report["version"].is_string());
    let compare =
        |files: [&str; 2], options: &[&str]| bench().arg("compare").args(files).args(options).output().unwrap();
    let output = compare([&a, &b], &["--json"]);
    let compared: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&compared[0]["figures"][0]["figure"], &compared[0]["figures"][0]["a"]["n"]),
        (&"rate, /s".into(), &2.into())
    );
    let table = String::from_utf8(compare([&a, &b], &[]).stdout).unwrap();
    assert!(table.contains("B / A") && table.contains("p99, us"), "{table}");
    // Nothing is like it, or nothing can be read.
    deliver(&sink.1, &["--messages", "5", "--connections", "2", "--output", &path("c.jsonl")]);
    let output = compare([&a, &path("c.jsonl")], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("differ in connections (1 and 2)"));
    std::fs::write(path("d.jsonl"), "{}\n").unwrap();
    for missing in ["d.jsonl", "e.jsonl"] {
        let output = compare([&a, &path(missing)], &[]);
        assert!(String::from_utf8_lossy(&output.stderr).contains(missing));
    }
}

#[test]
fn a_run_can_be_calibrated() {
    let sink = Sink::start();
    let directory = tempfile::tempdir().unwrap();
    let output = deliver(&sink.1, &["--messages", "5", "--calibrate", &directory.path().display().to_string()]);
    let report = report(&output);
    assert!(report["calibration"]["cpu_megabytes_per_s"].as_f64().unwrap() > 0.0, "{report}");
    assert!(report["calibration"]["disk_4k"]["p99_us"].is_u64(), "{report}");
    let output = bench().args(["calibrate", "--directory", "/nowhere"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn imap_workloads_run_against_the_sink() {
    let sink = Sink::start();
    let run = |workload: &str, options: &[&str]| {
        let output = bench()
            .args([workload, "--json", "--timeout", "5", "--imap", &sink.2, "--password", "p", "--connections", "3"])
            .args(options)
            .output()
            .unwrap();
        let report = report(&output);
        assert!(output.status.success(), "{workload}: {report}");
        report
    };
    let report = run("noop", &["--messages", "300", "--batch", "10", "--mailbox", "INBOX"]);
    assert_eq!(report["operations"], 300, "{report}");
    // Each answer is at least "b1 OK done" with its line end.
    assert!(report["bytes"].as_u64().unwrap() >= 300 * 12, "{report}");
    let report = run("sessions", &["--messages", "30", "--item", "BODY.PEEK[]"]);
    assert_eq!((&report["operations"], &report["counts"]["messages listed"]), (&30.into(), &300.into()), "{report}");
    let report = run("resync", &["--messages", "30", "--user-count", "3"]);
    assert_eq!((&report["counts"]["by QRESYNC"], &report["counts"]["flags received"]), (&30.into(), &150.into()));
    let report = run("resync", &["--messages", "30", "--user-count", "3", "--rate", "200", "--without", "QRESYNC"]);
    assert_eq!((&report["counts"]["by CONDSTORE"], &report["open_loop"]["arrived"]), (&30.into(), &30.into()));
    let report = run("fetch", &["--messages", "60", "--batch", "5"]);
    assert_eq!(report["operations"], 60, "{report}");
    let report = run("noop", &["--rate", "300", "--messages", "30", "--command", "STATUS INBOX (MESSAGES)"]);
    assert_eq!((&report["operations"], &report["open_loop"]["arrived"]), (&30.into(), &30.into()), "{report}");
}

#[test]
fn a_command_that_is_refused_ends_the_connection() {
    let address = server(|stream| {
        say(stream, "* OK x\r\n");
        line(stream);
        say(stream, "b1 OK x\r\n");
        line(stream);
        say(stream, "b2 BAD x\r\n");
    });
    let options = ["--messages", "5", "--timeout", "5", "--password", "p", "--imap", &address];
    let output = bench().args(["noop", "--json"]).args(options).output().unwrap();
    assert_eq!(report(&output)["errors"]["the command refused"], 1);
    assert_eq!(output.status.code(), Some(2));
}
