//! The real server on a device that fails: what each protocol answers, and that there is service again. How the store takes
//! each fault is in `faults.rs`.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::time::{Duration, Instant};

use posthaste_tests::clients::{Imap, Lmtp, Pop3, Status};
use posthaste_tests::failing_device::FailingDevice;
use posthaste_tests::server::{Server, Store};

const USER: &str = "a@example.org";
const PASSWORD: &str = "secret";
/// What is delivered before anything fails.
const MESSAGES: u32 = 5;
/// What does not wait for the device takes less.
const AT_ONCE: Duration = Duration::from_secs(2);
const READ_TIMEOUT: Duration = Duration::from_secs(4);

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn message(number: u32) -> Vec<u8> {
    let mut message = format!("Subject: message {number}\r\n\r\n").into_bytes();
    let mut state = u64::from(number) + 1;
    for _ in 0..100 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        message.extend_from_slice(format!("{state:016x}{:016x}\r\n", state.rotate_left(7)).as_bytes());
    }
    message
}

struct Setting {
    device: FailingDevice,
    store: Store,
}

impl Setting {
    fn new() -> Self {
        let device = FailingDevice::new().unwrap();
        // One shard, nothing in memory, and nothing in the background.
        let settings = [
            "store.shards=1",
            "store.message_cache_bytes=0",
            "store.index_cache_bytes=0",
            "store.read_timeout_s=4",
            "store.scrub_bytes_per_s=0",
            "store.compaction=false",
            "store.segment_size_bytes=4194304",
            "store.reserve_bytes=4194304",
        ];
        let serve = ["--plaintext-auth", "--io", "epoll", "--listen", "smtp=127.0.0.1:0"];
        let store = Store::new(&settings, &serve).unwrap().with_environment(device.environment());
        store.add_users(&[USER.to_owned()], PASSWORD).unwrap();
        Self { device, store }
    }

    /// A server that has been started on a store with messages: nothing of them is in its memory.
    fn start(&self) -> Server {
        let server = self.store.start().unwrap();
        let mut imap = imap(&server);
        for number in 0..MESSAGES {
            assert_eq!(deliver(&server, number).0, 250);
        }
        imap.command("CREATE Other").unwrap().ok().unwrap();
        server.stop().unwrap();
        self.store.start().unwrap()
    }
}

fn deliver(server: &Server, number: u32) -> (u16, String) {
    let mut lmtp = Lmtp::connect(server.lmtp()).unwrap();
    lmtp.deliver(&[USER], &message(number)).unwrap().remove(0)
}

fn deliver_smtp(server: &Server, number: u32) -> (u16, String) {
    let mut smtp = Lmtp::connect_smtp(server.address("smtp")).unwrap();
    smtp.deliver(&[USER], &message(number)).unwrap().remove(0)
}

fn imap(server: &Server) -> Imap {
    let mut imap = Imap::connect(server.imap()).unwrap();
    imap.login(USER, PASSWORD).unwrap();
    imap
}

/// What a command is told, which has to be NO.
fn refused(imap: &mut Imap, command: &str) -> String {
    let done = imap.command(command).unwrap();
    assert_eq!(done.status, Status::No, "{command}: {}", done.text);
    done.text
}

fn assert_starts(text: &str, start: &str, what: &str) {
    assert!(text.starts_with(start), "{what}: {text}");
}

/// The bodies in INBOX by UID.
fn bodies(server: &Server) -> Vec<(u32, Vec<u8>)> {
    let mut imap = imap(server);
    imap.select("INBOX").unwrap();
    let fetched = imap.uid_fetch("1:*", "BODY.PEEK[TEXT]").unwrap();
    fetched.into_iter().map(|fetched| (fetched.uid, fetched.body)).collect()
}

fn body(number: u32) -> Vec<u8> {
    let message = message(number);
    let header = format!("Subject: message {number}\r\n\r\n").len();
    message[header..].to_vec()
}

fn assert_bodies(server: &Server, numbers: &[u32]) {
    let bodies: Vec<Vec<u8>> = bodies(server).into_iter().map(|(_, body)| body).collect();
    assert!(bodies == numbers.iter().map(|&number| body(number)).collect::<Vec<_>>(), "{} messages", bodies.len());
}

fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let begun = Instant::now();
    let value = what();
    (begun.elapsed(), value)
}

/// Commands that change something.
const CHANGES: [&str; 9] = [
    "STORE 1 +FLAGS (\\Flagged)",
    "UID STORE 1 +FLAGS.SILENT ($keyword)",
    "COPY 1 Other",
    "MOVE 1 Other",
    "CREATE New",
    "RENAME Other Another",
    "DELETE Other",
    "SUBSCRIBE Other",
    "UID EXPUNGE 1",
];

/// All that was acknowledged is in INBOX, and of what was refused at most what was being written then.
fn assert_bodies_and_one_in_doubt(server: &Server, acknowledged: &[u32], in_doubt: u32) {
    let mut found: Vec<Vec<u8>> = bodies(server).into_iter().map(|(_, body)| body).collect();
    found.retain(|found| *found != body(in_doubt));
    assert!(found == acknowledged.iter().map(|&number| body(number)).collect::<Vec<_>>(), "{} messages", found.len());
}

#[test]
fn a_log_that_cannot_be_written_or_synced_stops_changes_until_a_start() {
    // Also for want of space: what a failed sync leaves behind is in doubt, whatever the reason.
    for fault in [format!("write /wal/ {EIO}"), format!("sync /wal/ {EIO}"), format!("sync /wal/ {ENOSPC}")] {
        let setting = Setting::new();
        let server = setting.start();
        let mut imap = imap(&server);
        imap.select("INBOX").unwrap();
        // The log has a segment: if one cannot be begun for want of space, nothing is in doubt.
        imap.command("STORE 1 +FLAGS.SILENT (\\Deleted)").unwrap().ok().unwrap();
        let mut pop3 = Pop3::connect(server.pop3()).unwrap();
        pop3.login(USER, PASSWORD).unwrap();
        setting.device.fails(&fault).unwrap();
        for is_failing in [true, false] {
            assert_starts(&deliver(&server, 50).1, "451 4.3.0 ", &fault);
            assert_starts(&deliver_smtp(&server, 51).1, "451 4.3.0 ", &fault);
            for command in CHANGES {
                assert_starts(&refused(&mut imap, command), "[UNAVAILABLE] ", command);
            }
            let appended = imap.append("INBOX", "", &message(52)).unwrap();
            assert_eq!(appended.status, Status::No);
            assert_starts(&appended.text, "[UNAVAILABLE] ", "APPEND");
            // Reading goes on, and shows nothing of it.
            assert_bodies(&server, &[0, 1, 2, 3, 4]);
            imap.command("NOOP").unwrap().ok().unwrap();
            if is_failing {
                let (_, retrieved) = pop3.multi_line("RETR 1").unwrap();
                assert!(retrieved.ends_with(&body(0)), "{fault}");
                // What failed is not made good by the device working again.
                setting.device.works().unwrap();
            }
        }
        pop3.ok("DELE 1").unwrap();
        let quit = pop3.command("QUIT").unwrap().unwrap_err();
        assert_starts(&quit, "[SYS/TEMP] ", "QUIT");
        assert!(server.log().contains("the shard takes no changes"), "{}", server.log());
        server.kill().unwrap();
        let server = setting.store.start().unwrap();
        assert_bodies_and_one_in_doubt(&server, &[0, 1, 2, 3, 4], 50);
        assert_eq!(deliver(&server, 5).0, 250);
        self::imap(&server).append("INBOX", "", &message(6)).unwrap().ok().unwrap();
        assert_bodies_and_one_in_doubt(&server, &[0, 1, 2, 3, 4, 5, 6], 50);
        server.stop().unwrap();
        setting.store.run(&["check"]).unwrap();
    }
}

#[test]
fn without_space_mail_is_deferred_until_there_is_some() {
    let setting = Setting::new();
    let server = setting.start();
    let mut imap = imap(&server);
    imap.select("INBOX").unwrap();
    imap.command("STORE 1:2 +FLAGS.SILENT (\\Deleted)").unwrap().ok().unwrap();
    // What was set aside is no help on a file system that copies on write. Segments that are begun have no space either.
    setting.device.fails(&format!("write /wal/ {ENOSPC}\nallocate /wal/ {ENOSPC}")).unwrap();
    assert_starts(&deliver(&server, 50).1, "452 4.3.1 ", "LMTP");
    assert_starts(&deliver_smtp(&server, 51).1, "452 4.3.1 ", "SMTP");
    let appended = imap.append("INBOX", "", &message(52)).unwrap();
    assert_eq!(appended.status, Status::No);
    assert_starts(&appended.text, "[OVERQUOTA] ", "APPEND");
    for command in CHANGES {
        assert_starts(&refused(&mut imap, command), "[OVERQUOTA] ", command);
    }
    let mut pop3 = Pop3::connect(server.pop3()).unwrap();
    pop3.login(USER, PASSWORD).unwrap();
    pop3.ok("DELE 5").unwrap();
    let quit = pop3.command("QUIT").unwrap().unwrap_err();
    assert_starts(&quit, "[SYS/TEMP] ", "QUIT");
    assert_bodies(&server, &[0, 1, 2, 3, 4]);
    // Expunging is what makes room: it needs little, and gets that first.
    setting.device.fails(&format!("allocate /reserve {ENOSPC}")).unwrap();
    imap.command("EXPUNGE").unwrap().ok().unwrap();
    assert_starts(&deliver(&server, 53).1, "452 4.3.1 ", "LMTP without a reserve");
    setting.device.works().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while deliver(&server, 5).0 != 250 {
        assert!(Instant::now() < deadline, "there is space again: {}", server.log());
    }
    assert!(server.log().contains("there is space again"), "{}", server.log());
    assert_bodies(&server, &[2, 3, 4, 5]);
    server.kill().unwrap();
    let server = setting.store.start().unwrap();
    assert_bodies(&server, &[2, 3, 4, 5]);
    server.stop().unwrap();
    setting.store.run(&["check"]).unwrap();
}

#[test]
fn what_cannot_be_read_is_not_to_be_had_until_it_can() {
    let setting = Setting::new();
    let server = setting.start();
    setting.device.fails(&format!("read /seg/ {EIO}\nread /idx/ {EIO}")).unwrap();
    // The index is not in memory yet.
    let mut imap = imap(&server);
    assert_starts(&refused(&mut imap, "SELECT INBOX"), "[UNAVAILABLE] ", "SELECT");
    imap.command("STATUS INBOX (MESSAGES UIDNEXT)").unwrap().ok().unwrap();
    let mut pop3 = Pop3::connect(server.pop3()).unwrap();
    pop3.ok(&format!("USER {USER}")).unwrap();
    let login = pop3.command(&format!("PASS {PASSWORD}")).unwrap().unwrap_err();
    assert_starts(&login, "[SYS/TEMP] ", "PASS");
    assert_eq!(deliver(&server, 5).0, 250);
    setting.device.fails(&format!("read /seg/ {EIO}")).unwrap();
    assert_eq!(imap.select("INBOX").unwrap().exists, MESSAGES + 1);
    imap.command("FETCH 1:* (UID FLAGS INTERNALDATE RFC822.SIZE)").unwrap().ok().unwrap();
    for command in ["FETCH 1 BODY.PEEK[]", "FETCH 1 ENVELOPE", "FETCH 1 BODYSTRUCTURE", "SEARCH BODY x"] {
        assert_starts(&refused(&mut imap, command), "[UNAVAILABLE] ", command);
    }
    // The log's last segment can be read.
    assert_eq!(imap.uid_fetch("6", "BODY.PEEK[TEXT]").unwrap()[0].body, body(5));
    imap.command("STORE 1 +FLAGS (\\Flagged)").unwrap().ok().unwrap();
    let mut pop3 = Pop3::connect(server.pop3()).unwrap();
    pop3.login(USER, PASSWORD).unwrap();
    for command in ["RETR 1", "TOP 1 0"] {
        let refusal = pop3.command(command).unwrap().unwrap_err();
        assert_starts(&refusal, "[SYS/TEMP] ", command);
    }
    pop3.multi_line("RETR 6").unwrap();
    setting.device.works().unwrap();
    pop3.multi_line("RETR 1").unwrap();
    assert_bodies(&server, &[0, 1, 2, 3, 4, 5]);
    server.stop().unwrap();
    setting.store.run(&["check"]).unwrap();
}

#[test]
fn a_read_that_hangs_is_given_up_and_holds_up_nobody() {
    let setting = Setting::new();
    let server = setting.start();
    let mut other = imap(&server);
    other.select("INBOX").unwrap();
    setting.device.fails("read /seg/ hang").unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (1..=2)
            .map(|number| {
                let server = &server;
                scope.spawn(move || {
                    let mut imap = imap(server);
                    imap.select("INBOX").unwrap();
                    let (took, text) = timed(|| refused(&mut imap, &format!("FETCH {number} BODY.PEEK[]")));
                    assert_starts(&text, "[UNAVAILABLE] ", "FETCH");
                    assert!((READ_TIMEOUT..READ_TIMEOUT * 2).contains(&took), "FETCH took {took:?}");
                    // The session goes on.
                    imap.command("NOOP").unwrap().ok().unwrap();
                })
            })
            .collect();
        let popping = scope.spawn(|| {
            let mut pop3 = Pop3::connect(server.pop3()).unwrap();
            pop3.login(USER, PASSWORD).unwrap();
            let (took, refusal) = timed(|| pop3.command("RETR 3").unwrap().unwrap_err());
            assert_starts(&refusal, "[SYS/TEMP] ", "RETR");
            assert!((READ_TIMEOUT..READ_TIMEOUT * 2).contains(&took), "RETR took {took:?}");
        });
        let mut number = 5;
        while !readers.iter().all(|reader| reader.is_finished()) || !popping.is_finished() {
            let (took, (code, text)) = timed(|| deliver(&server, number));
            assert_eq!(code, 250, "{text}");
            assert!(took < AT_ONCE, "a delivery took {took:?}");
            let (took, done) = timed(|| other.command(&format!("STORE {} +FLAGS (\\Seen)", number - 4)).unwrap());
            done.ok().unwrap();
            assert!(took < AT_ONCE, "STORE took {took:?}");
            number += 1;
        }
        assert!(number > 6, "something was done meanwhile");
    });
    // A session still waits, as the device does, when the server is stopped.
    std::thread::scope(|scope| {
        let mut imap = imap(&server);
        imap.select("INBOX").unwrap();
        // It may be told so, or cut off.
        scope.spawn(move || drop(imap.command("FETCH 1 BODY.PEEK[]")));
        let (took, stopped) = timed(|| server.stop());
        stopped.unwrap();
        assert!(took < Duration::from_secs(20), "a stop took {took:?}");
    });
    setting.device.works().unwrap();
    let server = setting.store.start().unwrap();
    assert!(bodies(&server).len() > 6);
    server.stop().unwrap();
    setting.store.run(&["check"]).unwrap();
}

#[test]
fn short_writes_and_a_slow_device_are_nothing_that_clients_notice() {
    let setting = Setting::new();
    let server = setting.start();
    setting.device.fails("write /shard short\nsync /shard slow\nread /shard slow").unwrap();
    let mut imap = imap(&server);
    imap.select("INBOX").unwrap();
    let (took, (code, _)) = timed(|| deliver(&server, 5));
    assert_eq!(code, 250);
    assert!(took >= Duration::from_millis(100), "it was answered before its sync: {took:?}");
    imap.append("INBOX", "", &message(6)).unwrap().ok().unwrap();
    imap.command("STORE 1 +FLAGS.SILENT (\\Deleted)").unwrap().ok().unwrap();
    imap.command("EXPUNGE").unwrap().ok().unwrap();
    assert_bodies(&server, &[1, 2, 3, 4, 5, 6]);
    server.kill().unwrap();
    setting.device.works().unwrap();
    let server = setting.store.start().unwrap();
    assert_bodies(&server, &[1, 2, 3, 4, 5, 6]);
    server.stop().unwrap();
    setting.store.run(&["check"]).unwrap();
}
