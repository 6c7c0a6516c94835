//! An open loop against a server that stalls on purpose: the report must show the stall for all that was due in it.
#![expect(clippy::unwrap_used, reason = "a helper that panics fails its test")]

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// How long after its first message the server stalls, and for how long.
const BEFORE: Duration = Duration::from_millis(300);
const STALL: Duration = Duration::from_millis(600);

/// An LMTP server that accepts all. `wait` is called with the time since its first message before it answers a message.
fn server(wait: impl Fn(Duration) + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (first, wait) = (Arc::new(OnceLock::new()), Arc::new(wait));
    let accept = move || {
        for stream in listener.incoming() {
            let (first, wait) = (Arc::clone(&first), Arc::clone(&wait));
            let serve = move || serve(BufReader::new(stream.unwrap()), &first, &*wait);
            thread::Builder::new().spawn(serve).unwrap();
        }
    };
    thread::Builder::new().spawn(accept).unwrap();
    address
}

/// Ends when the client does.
fn serve(mut stream: BufReader<TcpStream>, first: &OnceLock<Instant>, wait: &dyn Fn(Duration)) -> Option<()> {
    stream.get_ref().set_nodelay(true).ok()?;
    let say = |stream: &mut BufReader<TcpStream>, text: &str| stream.get_mut().write_all(text.as_bytes()).ok();
    say(&mut stream, "220 x\r\n")?;
    let mut line = String::new();
    let mut in_data = false;
    loop {
        line.clear();
        if stream.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match (in_data, line.get(..4)) {
            (true, _) if line == ".\r\n" => {
                in_data = false;
                wait(first.get_or_init(Instant::now).elapsed());
                say(&mut stream, "250 x\r\n")?;
            }
            (true, _) => {}
            (false, Some("LHLO")) => say(&mut stream, "250-x\r\n250 PIPELINING\r\n")?,
            (false, Some("DATA")) => {
                in_data = true;
                say(&mut stream, "354 x\r\n")?;
            }
            (false, Some("QUIT")) => return say(&mut stream, "221 x\r\n"),
            (false, _) => say(&mut stream, "250 x\r\n")?,
        }
    }
}

fn stalling_server() -> String {
    server(|now| {
        if now >= BEFORE {
            thread::sleep((BEFORE + STALL).saturating_sub(now));
        }
    })
}

fn deliver(address: &str, options: &[&str]) -> (Output, serde_json::Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
        .args(["deliver", "--json", "--size", "500", "--lmtp", address])
        .args(options)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_str(&text).unwrap();
    (output, report)
}

fn latency(report: &serde_json::Value, name: &str) -> Duration {
    Duration::from_micros(report["latency_us"][name].as_u64().unwrap())
}

#[test]
fn a_stall_is_seen_by_all_that_was_due() {
    let options = ["--rate", "400", "--seconds", "1.5", "--connections", "4", "--seed", "5"];
    let (output, report) = deliver(&stalling_server(), &options);
    assert!(output.status.success(), "{report}");
    assert_eq!(report["seed"], 5);
    let open = &report["open_loop"];
    // 600 are due, give or take four deviations of a Poisson distribution, and all are sent.
    let arrived = open["arrived"].as_u64().unwrap();
    assert!((500..700).contains(&arrived), "{report}");
    assert_eq!(report["operations"], arrived);
    // 240 of them are due while nothing is answered, and wait for 600 ms to 0 ms, evenly.
    assert!(open["waited"].as_u64().unwrap() >= 150, "{report}");
    assert!(latency(&report, "max") >= STALL * 9 / 10, "{report}");
    assert!(latency(&report, "p99") >= STALL * 8 / 10, "{report}");
    assert!(latency(&report, "p90") >= STALL * 5 / 10, "{report}");
    assert!(latency(&report, "p50") < STALL * 5 / 10, "{report}");
}

#[test]
fn a_closed_loop_hides_the_stall() {
    let (output, report) = deliver(&stalling_server(), &["--seconds", "1.5", "--connections", "4"]);
    assert!(output.status.success(), "{report}");
    assert!(report.get("open_loop").is_none());
    // Only the four that were on their way have seen it.
    assert!(latency(&report, "max") >= STALL * 9 / 10, "{report}");
    assert!(latency(&report, "p99") < STALL * 5 / 10, "{report}");
}

#[test]
fn what_a_server_does_not_take_is_not_sent() {
    // It never answers a message, so that each of the connections is busy until the time is up.
    let address = server(|_| thread::sleep(Duration::from_secs(3600)));
    let options = ["--rate", "400000", "--seconds", "0.5", "--connections", "2", "--timeout", "0.4"];
    let (output, report) = deliver(&address, &options);
    assert_eq!(output.status.code(), Some(2));
    let open = &report["open_loop"];
    let count = |name: &str| open[name].as_u64().unwrap();
    assert_eq!(report["errors"]["not sent: all connections busy"], count("turned_away"), "{report}");
    assert_eq!(report["errors"]["not sent: the run was over"], count("left"), "{report}");
    let sent = report["errors"]["timed out"].as_u64().unwrap();
    // Nothing is forgotten.
    assert_eq!(count("arrived"), sent + count("turned_away") + count("left"), "{report}");
    assert!(count("turned_away") > 50_000 && count("left") > 90_000, "{report}");
    assert_eq!(report["operations"], 0);
}

#[test]
fn a_rate_must_be_one() {
    for wrong in ["0", "-1", "many"] {
        let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench"))
            .args(["deliver", "--lmtp", "127.0.0.1:1", &format!("--rate={wrong}")])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("rate"));
    }
}
