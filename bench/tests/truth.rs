//! Workloads over IMAP against servers that follow a script: what a server of few or many capabilities is asked, and that answers
//! which cannot be true are counted as errors by their kind.
#![expect(clippy::unwrap_used, reason = "a helper that panics fails its test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

/// What a script says to a command: untagged lines, and the text after the tag.
type Answer = (String, &'static str);

fn ok(untagged: impl Into<String>) -> Answer {
    (untagged.into(), "OK done")
}

/// A server that gives each command to a script, and remembers them.
struct Scripted {
    address: String,
    commands: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    fn start(capabilities: &'static str, script: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let commands = Arc::new(Mutex::new(Vec::new()));
        let (heard, script) = (Arc::clone(&commands), Arc::new(script));
        let accept = move || {
            for stream in listener.incoming() {
                let (heard, script) = (Arc::clone(&heard), Arc::clone(&script));
                let serve = move || serve(BufReader::new(stream.unwrap()), capabilities, &heard, &*script);
                thread::Builder::new().spawn(serve).unwrap();
            }
        };
        thread::Builder::new().spawn(accept).unwrap();
        Self { address, commands }
    }

    /// Runs a workload with one connection: its report.
    fn run(&self, workload: &str, options: &[&str]) -> serde_json::Value {
        let common = ["--json", "--timeout", "5", "--password", "p", "--imap", &self.address];
        let command = [&[workload], &common[..], options].concat();
        let output = Command::new(env!("CARGO_BIN_EXE_posthaste-bench")).args(command).output().unwrap();
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| panic!("{workload}: {}", String::from_utf8_lossy(&output.stderr)))
    }

    /// Whether a command that begins so has come.
    fn heard(&self, start: &str) -> bool {
        self.commands.lock().unwrap().iter().any(|command| command.starts_with(start))
    }
}

fn serve(
    mut stream: BufReader<TcpStream>,
    capabilities: &str,
    heard: &Mutex<Vec<String>>,
    script: &impl Fn(&str) -> Answer,
) {
    stream.get_mut().write_all(b"* OK ready\r\n").unwrap();
    let mut line = String::new();
    while let Ok(1..) = stream.read_line(&mut line) {
        let (tag, command) = line.trim_end().split_once(' ').unwrap();
        let (tag, command) = (tag.to_owned(), command.to_owned());
        line.clear();
        if let Some((_, literal)) = command.strip_suffix('}').and_then(|rest| rest.rsplit_once('{')) {
            let octets: usize = literal.trim_end_matches('+').parse().unwrap();
            if !literal.ends_with('+') {
                stream.get_mut().write_all(b"+ go on\r\n").unwrap();
            }
            let mut message = vec![0; octets + 2];
            stream.read_exact(&mut message).unwrap();
        }
        let (untagged, text) = match command.split(' ').next().unwrap() {
            "CAPABILITY" => ok(format!("* CAPABILITY IMAP4rev1 {capabilities}\r\n")),
            "LOGIN" | "ENABLE" | "CREATE" | "LIST" | "NOOP" => ok(""),
            "LOGOUT" => ok("* BYE\r\n"),
            _ => script(&command),
        };
        heard.lock().unwrap().push(command);
        // A client that has seen enough may have gone.
        if stream.get_mut().write_all(format!("{untagged}{tag} {text}\r\n").as_bytes()).is_err() {
            return;
        }
    }
}

/// Errors of one kind, once or more, and of no other.
#[track_caller]
fn assert_error(report: &serde_json::Value, kind: &str) {
    let errors = report["errors"].as_object().unwrap();
    assert_eq!(errors.keys().collect::<Vec<_>>(), [kind], "{report}");
}

/// A mailbox of three messages whose HIGHESTMODSEQ was 10.
const SELECTED: &str = "* 3 EXISTS\r\n* OK [UIDVALIDITY 7] \r\n* OK [UIDNEXT 9] \r\n* OK [HIGHESTMODSEQ 10] \r\n";
const STATUS: &str = "(MESSAGES 0 UNSEEN 0 UIDNEXT 1 UIDVALIDITY 3 HIGHESTMODSEQ 1)";

fn resync(
    capabilities: &'static str,
    selected_by_qresync: &'static str,
    fetched: &'static str,
    status: &'static str,
) -> Scripted {
    Scripted::start(capabilities, move |command| {
        let words: Vec<_> = command.split(' ').collect();
        match words[0] {
            "SELECT" if command.contains("QRESYNC") => ok(selected_by_qresync),
            "SELECT" => ok(SELECTED),
            "UID" => ok(fetched),
            "STATUS" => ok(format!("* STATUS {} {status}\r\n", words[1])),
            _ => ok(""),
        }
    })
}

#[test]
fn a_client_comes_back_as_the_server_allows() {
    let options = ["--messages", "2", "--changes", "2"];
    let changed = "* 1 FETCH (UID 2 FLAGS () MODSEQ (11))\r\n* 2 FETCH (UID 3 FLAGS () MODSEQ (12))\r\n";
    let with_changes = Box::leak(format!("{SELECTED}* VANISHED (EARLIER) 5:6\r\n{changed}").into_boxed_str());
    let server = resync("QRESYNC CONDSTORE", with_changes, "", STATUS);
    let report = server.run("resync", &options);
    assert_eq!((&report["operations"], &report["counts"]["by QRESYNC"]), (&2.into(), &2.into()), "{report}");
    assert_eq!(report["counts"]["flags received"], 4);
    assert!(server.heard("SELECT \"INBOX\" (QRESYNC (7 10))") && !server.heard("UID FETCH"));

    let server = resync("CONDSTORE", "", changed, STATUS);
    assert_eq!(server.run("resync", &options)["counts"]["by CONDSTORE"], 2);
    assert!(server.heard("UID FETCH 1:* (FLAGS) (CHANGEDSINCE 10)"));

    let all = "* 1 FETCH (UID 2 FLAGS ())\r\n* 2 FETCH (UID 3 FLAGS ())\r\n* 3 FETCH (UID 4 FLAGS ())\r\n";
    let server = resync("", "", all, "(MESSAGES 0 UNSEEN 0 UIDNEXT 1 UIDVALIDITY 3)");
    assert_eq!(server.run("resync", &options)["counts"]["by plain FETCH"], 2);
    assert!(!server.heard("ENABLE") && server.heard("CAPABILITY"));
}

#[test]
fn wrong_changes_are_errors() {
    for (fetched, kind) in [
        ("* 1 FETCH (UID 2 FLAGS () MODSEQ (11))\r\n", "changes missing"),
        (
            "* 1 FETCH (UID 2 FLAGS () MODSEQ (11))\r\n* 2 FETCH (UID 3 FLAGS () MODSEQ (9))\r\n",
            "a change that is too old",
        ),
        ("* 1 FETCH (UID 3 FLAGS () MODSEQ (11))\r\n* 2 FETCH (UID 3 FLAGS () MODSEQ (12))\r\n", "UIDs do not ascend"),
        (
            "* 1 FETCH (UID 2 FLAGS () MODSEQ (11))\r\n* 4 FETCH (UID 3 FLAGS () MODSEQ (12))\r\n",
            "no such sequence number",
        ),
        ("* 1 FETCH (UID 2 FLAGS ()\r\n", "protocol violation"),
    ] {
        let report = resync("CONDSTORE", "", fetched, STATUS).run("resync", &["--messages", "1", "--changes", "2"]);
        assert_error(&report, kind);
    }
    let changed = "* 1 FETCH (UID 2 FLAGS () MODSEQ (11))\r\n";
    let report = resync("CONDSTORE", "", changed, "(MESSAGES 0)").run("resync", &["--messages", "1", "--changes", "1"]);
    assert_error(&report, "STATUS incomplete");
    let other = "* 3 EXISTS\r\n* OK [UIDVALIDITY 8] \r\n* OK [HIGHESTMODSEQ 10] \r\n";
    let report = resync("QRESYNC", other, "", STATUS).run("resync", &["--messages", "1", "--changes", "1"]);
    assert_error(&report, "UIDVALIDITY has changed");
}

#[test]
fn syncs_are_checked() {
    let sync = |listed: &'static str, fetched: &'static str| {
        let script = move |command: &str| match command {
            "UID FETCH 1:* (FLAGS RFC822.SIZE)" => ok(listed),
            _ if command.starts_with("UID FETCH") => ok(fetched),
            _ => ok("* 2 EXISTS\r\n"),
        };
        Scripted::start("", script).run("sync", &["--messages", "1"])
    };
    let listed = "* 1 FETCH (UID 4 FLAGS () RFC822.SIZE 3)\r\n* 2 FETCH (UID 6 FLAGS () RFC822.SIZE 4)\r\n";
    let good = "* 1 FETCH (UID 4 BODY[] {3}\r\nabc)\r\n* 2 FETCH (UID 6 BODY[] \"abcd\")\r\n";
    let report = sync(listed, good);
    assert_eq!((&report["operations"], &report["bytes"]), (&1.into(), &7.into()), "{report}");
    assert_error(&sync(listed, "* 1 FETCH (UID 4 BODY[] {3}\r\nabc)\r\n"), "messages missing");
    let longer = "* 1 FETCH (UID 4 BODY[] {4}\r\nabcd)\r\n* 2 FETCH (UID 6 BODY[] \"abcd\")\r\n";
    assert_error(&sync(listed, longer), "RFC822.SIZE differs");
    assert_error(&sync("* 1 FETCH (UID 4 FLAGS () RFC822.SIZE 3)\r\n", good), "FETCH responses missing");
    let falling = "* 1 FETCH (UID 6 FLAGS () RFC822.SIZE 3)\r\n* 2 FETCH (UID 4 FLAGS () RFC822.SIZE 4)\r\n";
    assert_error(&sync(falling, good), "UIDs do not ascend");
}

#[test]
fn changes_of_flags_are_checked() {
    let flags = |answer: &'static str, options: &[&str]| {
        let script = move |command: &str| match command {
            _ if command.contains("SILENT") => ok(""),
            _ if command.starts_with("STORE") => ok(answer),
            _ => ok("* 2 EXISTS\r\n"),
        };
        Scripted::start("", script).run("flags", &[&["--messages", "1"], options].concat())
    };
    let report = flags("* 1 FETCH (FLAGS (\\Seen \\Flagged))\r\n", &[]);
    assert_eq!((&report["operations"], &report["errors"]), (&1.into(), &serde_json::json!({})), "{report}");
    assert_error(&flags("* 1 FETCH (FLAGS (\\Seen))\r\n", &[]), "a flag is not as it was set");
    assert_error(&flags("* 1 FETCH (FLAGS (\\Flagged))\r\n", &["--all"]), "FETCH responses missing");
    assert_eq!(flags("", &["--all", "--silent"])["operations"], 1);
}

/// A server on which a mailbox is filled and emptied as the client wants it.
fn filled(capabilities: &'static str, expunge: &'static str, code: &'static str) -> Scripted {
    let exists = Mutex::new(0_u32);
    Scripted::start(capabilities, move |command| {
        let mut exists = exists.lock().unwrap();
        match command.split(' ').next().unwrap() {
            "APPEND" => *exists = 1,
            "COPY" if code.is_empty() => *exists *= 2,
            "COPY" => return (String::new(), code),
            "MOVE" => return (expunge.to_owned(), code),
            "EXPUNGE" => return ok(expunge),
            _ => {}
        }
        ok(format!("* {exists} EXISTS\r\n"))
    })
}

#[test]
fn moves_and_expunges_are_checked() {
    let options = ["--messages", "1", "--mailbox-messages", "1"];
    let server = filled("MOVE UIDPLUS", "* 1 EXPUNGE\r\n", "OK [COPYUID 3 1 1] moved");
    let report = server.run("move", &options);
    assert_eq!((&report["operations"], &report["counts"]["by MOVE"]), (&1.into(), &1.into()), "{report}");
    assert_error(
        &filled("MOVE UIDPLUS", "* 1 EXPUNGE\r\n", "OK moved").run("move", &options),
        "COPYUID missing or wrong",
    );
    let server = filled("MOVE UIDPLUS", "* 1 EXPUNGE\r\n", "OK [COPYUID 3 1 1:2] moved");
    assert_error(&server.run("move", &options), "COPYUID missing or wrong");
    assert_error(&filled("MOVE", "", "OK moved").run("move", &options), "EXPUNGE responses missing");
    let server = filled("", "* 1 EXPUNGE\r\n", "OK copied");
    assert_eq!(server.run("move", &options)["counts"]["by COPY, STORE and EXPUNGE"], 1);
    assert!(!server.heard("MOVE"));
    assert_error(&filled("", "", "OK copied").run("expunge", &options), "EXPUNGE responses missing");
    assert_eq!(filled("", "* VANISHED 8\r\n", "OK copied").run("expunge", &options)["operations"], 1);
}

#[test]
fn appends_wait_where_they_must_and_uids_ascend() {
    let append = |capabilities, code| {
        let server = Scripted::start(capabilities, move |_| (String::new(), code));
        let report = server.run("append", &["--messages", "2"]);
        (report, server)
    };
    let (report, server) = append("", "OK done");
    assert_eq!(report["operations"], 2, "{report}");
    assert!(server.heard("APPEND \"INBOX\" (\\Seen) {4096}"));
    let (report, server) = append("LITERAL-", "OK done");
    assert_eq!(report["operations"], 2, "{report}");
    assert!(server.heard("APPEND \"INBOX\" (\\Seen) {4096+}"));
    let (report, _) = append("LITERAL+ UIDPLUS", "OK [APPENDUID 1 5] done");
    assert_error(&report, "UIDs do not ascend");
    let (report, _) = append("LITERAL+ UIDPLUS", "OK done");
    assert_error(&report, "APPENDUID missing");
}

#[test]
fn searches_are_checked() {
    let search = |capabilities, answers: [&'static str; 3], options: &[&str]| {
        let turn = Mutex::new(0);
        let script = move |command: &str| {
            if !command.starts_with("SEARCH") {
                return ok("* 3 EXISTS\r\n");
            }
            let mut turn = turn.lock().unwrap();
            *turn += 1;
            ok(answers[*turn - 1])
        };
        let server = Scripted::start(capabilities, script);
        (server.run("search", &[&["--messages", "1"], options].concat()), server)
    };
    let (report, _) = search("", ["* SEARCH 1 3\r\n", "* SEARCH 2\r\n", "* SEARCH 3 1\r\n"], &[]);
    assert_eq!((&report["operations"], &report["counts"]["messages found"]), (&1.into(), &2.into()), "{report}");
    let counts =
        ["* ESEARCH (TAG \"x\") COUNT 2\r\n", "* ESEARCH (TAG \"x\") COUNT 1\r\n", "* ESEARCH (TAG \"x\") COUNT 2\r\n"];
    let (report, server) = search("ESEARCH", counts, &["--count", "--keys", "SEEN"]);
    assert_eq!(report["counts"]["by RETURN (COUNT)"], 1, "{report}");
    assert!(server.heard("SEARCH RETURN (COUNT) NOT (SEEN)"));
    let (report, _) = search("", ["* SEARCH 1 3\r\n", "* SEARCH\r\n", ""], &[]);
    assert_error(&report, "setting up: a search and its opposite are not all");
    let (report, _) = search("", ["* SEARCH 1 3\r\n", "* SEARCH 2\r\n", "* SEARCH 1\r\n"], &[]);
    assert_error(&report, "a search found other messages");
    let (report, _) = search("", ["* SEARCH 1 3\r\n", "* SEARCH 2\r\n", "* SEARCH 1 4\r\n"], &[]);
    assert_error(&report, "numbers of SEARCH that cannot be");
    let (report, _) = search("", ["* SEARCH 1 3\r\n", "* SEARCH 2\r\n", ""], &[]);
    assert_error(&report, "no SEARCH response");
}
