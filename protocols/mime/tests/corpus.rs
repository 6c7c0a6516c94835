//! The digest of real mail, where a corpus of it lies beside the checkout (`../shared/corpus`) or at `POSTHASTE_CORPUS`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use posthaste_mime::digest::{ARCHIVE_BYTES_MAX, DigestBytes};
use posthaste_mime::{ArchivedDigest, Digest};

fn corpus() -> Option<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let found = std::env::var_os("POSTHASTE_CORPUS").map_or(beside, PathBuf::from);
    if found.is_dir() {
        return Some(found);
    }
    println!("skipped: no corpus at {}", found.display());
    None
}

fn messages(directory: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(directory).expect("readable").map(|entry| entry.expect("readable").path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            messages(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "eml") {
            let bytes = std::fs::read(&path).expect("readable");
            found.push((path, bytes));
        }
    }
}

fn with_crlf(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.len() + message.len() / 40);
    for (i, &b) in message.iter().enumerate() {
        if b == b'\n' && (i == 0 || message[i - 1] != b'\r') {
            out.push(b'\r');
        }
        out.push(b);
    }
    out
}

/// Offsets add up, parts lie within their parents, and every part that has a number is found by it.
fn check(path: &Path, message: &[u8], digest: &ArchivedDigest) {
    let name = path.display();
    let root = &digest.parts()[0];
    assert_eq!(root.header_range().start, 0, "{name}");
    assert_eq!(root.header_range().end, root.body_range().start, "{name}");
    assert_eq!(root.body_range().end, message.len() as u64, "{name}");
    let mut found = 1;
    let mut open = vec![(0, Vec::new(), true)];
    while let Some((index, numbers, is_whole_message)) = open.pop() {
        let parent = &digest.parts()[index];
        let mut from = parent.body_range().start;
        for (i, child) in digest.children(index).enumerate() {
            let part = &digest.parts()[child];
            assert!(part.header_range().start >= from && part.body_range().end <= parent.body_range().end, "{name}");
            from = part.body_range().end;
            found += 1;
            let mut inner = numbers.clone();
            if parent.is_multipart() {
                inner.push(i as u32 + 1);
                assert_eq!(digest.part(&inner).map(|(found, _)| found), Some(child), "{name} {inner:?}");
            } else {
                // Part 1 of a message that is a message part itself is the message inside.
                inner.extend(is_whole_message.then_some(1));
                assert!(std::ptr::eq(digest.message_in(&inner).expect("named"), part), "{name} {inner:?}");
            }
            open.push((child, inner, parent.is_message()));
        }
    }
    assert_eq!(found, digest.parts().len(), "{name}");
}

#[test]
fn hard_messages() {
    let Some(corpus) = corpus() else { return };
    let mut found = Vec::new();
    messages(&corpus.join("hard"), &mut found);
    for (path, raw) in &found {
        for message in [raw.clone(), with_crlf(raw)] {
            let (small, whole) = Digest::of(&message).archives();
            assert!(small.len() <= ARCHIVE_BYTES_MAX);
            let bytes = DigestBytes::from_aligned(whole.unwrap_or(small)).expect("valid");
            check(path, &message, bytes.digest().expect("valid"));
        }
    }
    println!("{} messages", found.len());
}

/// A figure, not a check: `cargo test --release -p posthaste-mime --test corpus speed -- --ignored --nocapture` with
/// ordinary mail unpacked in `POSTHASTE_CORPUS`.
#[test]
#[ignore = "measures"]
fn speed() {
    let Some(corpus) = corpus() else { return };
    let mut found = Vec::new();
    messages(&corpus, &mut found);
    let all: Vec<Vec<u8>> = found.iter().map(|(_, raw)| with_crlf(raw)).collect();
    for (label, range) in [("6-8 KB", 6_000..8_000), ("all", 0..usize::MAX)] {
        let some: Vec<&Vec<u8>> = all.iter().filter(|m| range.contains(&m.len())).collect();
        let (mut scan, mut build, mut archive, mut check, mut archived) = (0, 0, 0, 0, 0);
        for message in &some {
            std::hint::black_box(message.iter().map(|b| u64::from(*b)).sum::<u64>()); // it has just been received: warm
            let start = Instant::now();
            std::hint::black_box(posthaste_mime::structure::scan(message));
            scan += start.elapsed().as_nanos();
            let start = Instant::now();
            let digest = std::hint::black_box(Digest::of(message));
            build += start.elapsed().as_nanos();
            let start = Instant::now();
            let (bytes, _) = std::hint::black_box(digest.archives());
            archive += start.elapsed().as_nanos();
            archived += bytes.len() as u128;
            let bytes = DigestBytes::from_aligned(bytes).expect("valid");
            let start = Instant::now();
            std::hint::black_box(bytes.digest());
            check += start.elapsed().as_nanos();
        }
        let count = some.len().max(1) as u128;
        let [scan, build, archive, check] = [scan, build, archive, check].map(|nanos| nanos / count);
        println!(
            "{label}: {count} messages, {scan} ns of {build} ns scan, {archive} ns archive, {check} ns check, {} bytes",
            archived / count
        );
    }
}

/// Trap 33: time is bounded too: a nest of multiparts over a body that is all dashes at line starts.
#[test]
fn trap_33_hostile_nesting_takes_bounded_time() {
    let mut message = String::new();
    for i in 0..200 {
        message.push_str(&format!(
            "Content-Type: multipart/mixed; boundary=\"-{}{i}\"\r\n\r\n---{}{i}\r\n",
            "-".repeat(60),
            "-".repeat(60)
        ));
    }
    message.push_str(&"--------------------------------------------------------------------\n".repeat(100_000));
    let start = Instant::now();
    let digest = Digest::of(message.as_bytes());
    let (small, _) = digest.archives();
    println!("{} bytes, {:?}", message.len(), start.elapsed());
    assert!(small.len() <= ARCHIVE_BYTES_MAX);
    assert!(start.elapsed().as_secs() < 10);
}
