//! The real server on a small file system that fills up. Needs root, `mkfs.ext4` and a loop device; prints that it
//! skipped where it may not mount one.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use posthaste_tests::clients::{Imap, Lmtp};
use posthaste_tests::server::{Server, Store};

const USERS: [&str; 2] = ["a@example.org", "b@example.org"];
const PASSWORD: &str = "secret";
const DEVICE_BYTES: u64 = 96 << 20;
/// Something else on the device, which is removed in the end.
const BALLAST_BYTES: usize = 24 << 20;

/// An ext4 file system in a file, mounted until this is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(image: &Path, at: &Path) -> Result<Self, String> {
        let run = |program: &str, arguments: &[&Path]| {
            let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
            let output = output.map_err(|error| format!("{program}: {error}"))?;
            let text = String::from_utf8_lossy(&output.stderr);
            if output.status.success() { Ok(()) } else { Err(format!("{program}: {}", text.trim())) }
        };
        let file = File::create(image).and_then(|file| file.set_len(DEVICE_BYTES));
        file.map_err(|error| error.to_string())?;
        run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), "-m".as_ref(), "0".as_ref(), image])?;
        fs::create_dir_all(at).map_err(|error| error.to_string())?;
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, at])?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A failure leaves a mount behind, which whoever runs the test can see.
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A message of some 60 KB that does not compress to less than half.
fn message(number: u64) -> Vec<u8> {
    let mut message = format!("Subject: message {number}\r\n\r\n").into_bytes();
    let mut state = number + 1;
    for _ in 0..800 {
        for _ in 0..18 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            message.extend_from_slice(format!("{:04x}", state >> 48).as_bytes());
        }
        message.extend_from_slice(b"\r\n");
    }
    message
}

fn deliver(server: &Server, user: &str, number: u64) -> u16 {
    let mut lmtp = Lmtp::connect(server.lmtp()).unwrap();
    lmtp.deliver(&[user], &message(number)).unwrap().remove(0).0
}

fn inbox(server: &Server, user: &str) -> (Imap, u32) {
    let mut imap = Imap::connect(server.imap()).unwrap();
    imap.login(user, PASSWORD).unwrap();
    let exists = imap.select("INBOX").unwrap().exists;
    (imap, exists)
}

#[test]
fn a_full_disk_costs_nothing_that_was_acknowledged() {
    let settings = ["store.shards=2", "store.segment_size_bytes=4194304", "store.checkpoint_bytes=4194304"];
    let store = Store::new(&[&settings[..], &["store.reserve_bytes=4194304"]].concat(), &["--plaintext-auth"]).unwrap();
    let image = tempfile::NamedTempFile::new().unwrap();
    let disk = match SmallDisk::mount(image.path(), &store.data()) {
        Ok(disk) => disk,
        Err(why) => {
            println!("skipped: no small file system can be mounted here: {why}");
            return;
        }
    };
    let ballast = store.data().join("ballast");
    fs::write(&ballast, vec![1; BALLAST_BYTES]).unwrap();
    store.add_users(&USERS.map(str::to_owned), PASSWORD).unwrap();
    let server = store.start().unwrap();
    let (mut delivered, mut refused) = ([0; 2], [false; 2]);
    while refused != [true; 2] {
        for (number, user) in USERS.iter().enumerate() {
            let code = deliver(&server, user, u64::from(delivered[number]));
            assert!(matches!(code, 250 | 452), "{code} after {delivered:?} deliveries");
            delivered[number] += u32::from(code == 250);
            refused[number] |= code == 452;
        }
    }
    println!("{delivered:?} messages fitted");
    // The disk is full for everybody, and clients can still make room.
    for (user, count) in USERS.iter().zip(&mut delivered) {
        let (mut imap, exists) = inbox(&server, user);
        assert_eq!(exists, *count);
        let refused = imap.append("INBOX", "", &message(1)).unwrap().ok().unwrap_err().to_string();
        assert!(refused.contains("OVERQUOTA"), "{refused}");
        imap.command("STORE 1:5 +FLAGS.SILENT (\\Deleted)").unwrap().ok().unwrap();
        imap.command("EXPUNGE").unwrap().ok().unwrap();
        *count -= 5;
    }
    server.kill().unwrap();
    let server = store.start().unwrap();
    for (user, count) in USERS.iter().zip(delivered) {
        let (mut imap, exists) = inbox(&server, user);
        assert_eq!(exists, count);
        let bodies = imap.uid_fetch("1:*", "BODY.PEEK[TEXT]").unwrap();
        assert_eq!(bodies.len() as u32, count);
    }
    fs::remove_file(&ballast).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    for user in USERS {
        while deliver(&server, user, 1) != 250 {
            assert!(Instant::now() < deadline, "there is space again: {}", server.log());
        }
    }
    server.stop().unwrap();
    store.run(&["check"]).unwrap();
    drop(disk);
}
