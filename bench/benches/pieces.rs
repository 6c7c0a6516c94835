//! Parsers, encoders, digests, frames and the index of a mailbox: what every command and message passes through, without I/O.
//! `cargo bench` measures; `cargo test --benches` runs everything once with tiny input.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use posthaste_bench::generator::{Generator, Sizes};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::format::frame::{FrameInfo, Packer, Unpacker};
use posthaste_engine::format::record::FlagChange;
use posthaste_engine::ids::{Location, Lsn, MailboxId, MessageId, ModSeq, SegmentId, ShardId, Uid};
use posthaste_engine::index::{Change, MailboxIndex, Message};
use posthaste_imap::command::{ParseOptions, parse};
use posthaste_imap::frame::{Event, Expect, Framer, Limits};
use posthaste_imap::response::{FetchWriter, write_body_structure, write_envelope};
use posthaste_imap::types::DateTime;
use posthaste_mime::digest::DigestBytes;
use posthaste_mime::header::scan_header;
use posthaste_mime::{Digest, structure};
use posthaste_smtp::{Config, Event as SmtpEvent, Reply, Session};

/// The median of real mail; and one with an attachment.
const TEXT_OCTETS: u64 = 6700;
const ATTACHMENT_OCTETS: u64 = 200_000;
const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Messages of the mailbox whose index is tried.
const MESSAGES: u32 = 100_000;

/// Whether to measure, and not just to run.
fn measures() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// As many as stated where it measures, few otherwise.
fn scaled(count: u32) -> u32 {
    if measures() { count } else { count.min(100) }
}

/// Messages of about one size with the headers, parts and text of mail.
fn messages(octets: u64) -> Vec<Vec<u8>> {
    let sizes = Sizes { median: octets, mean: octets, max: octets };
    let mut generator = Generator::new(&sizes, 1).expect("one size is a distribution");
    (0..16).map(|_| generator.message()).collect()
}

/// Framing and parsing of commands as clients send them.
fn imap_command(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("imap_command");
    group.throughput(Throughput::Elements(1));
    for (name, line) in [
        ("login", "a1 LOGIN \"user17@example.org\" \"secret\"\r\n"),
        ("select", "a2 SELECT INBOX (CONDSTORE)\r\n"),
        ("status", "a3 STATUS \"Archive/2026\" (MESSAGES UNSEEN UIDNEXT UIDVALIDITY HIGHESTMODSEQ)\r\n"),
        ("fetch flags", "a4 UID FETCH 1:* (FLAGS) (CHANGEDSINCE 12345)\r\n"),
        (
            "fetch list",
            "a5 UID FETCH 1:50,60,70:99 (UID FLAGS INTERNALDATE RFC822.SIZE ENVELOPE BODYSTRUCTURE \
             BODY.PEEK[HEADER.FIELDS (REFERENCES LIST-ID)])\r\n",
        ),
        ("store", "a6 UID STORE 1:5,9 +FLAGS.SILENT (\\Seen $Forwarded)\r\n"),
        ("search", "a7 UID SEARCH UNSEEN OR FROM \"someone\" SUBJECT \"patch\" SINCE 1-Jan-2026 NOT DELETED\r\n"),
        ("append", "a8 APPEND Sent (\\Seen) \"24-Nov-2026 06:00:00 +0000\" {11+}\r\nSubject: x\n\r\n"),
    ] {
        let mut framer = Framer::new(Limits::authenticated(APPEND_BYTES_MAX));
        let mut output = Vec::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let (_, event) = framer.step(black_box(line.as_bytes()), Expect::Command, &mut output);
                let Event::Command(frame) = event else { panic!("{name}: {event:?}") };
                parse(frame, ParseOptions::default()).expect("a command that is understood")
            });
        });
    }
}

/// One LMTP transaction of a message: commands, DATA, and the answers.
fn smtp_transaction(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("smtp_transaction");
    for octets in [0, TEXT_OCTETS, ATTACHMENT_OCTETS] {
        let message = if octets == 0 { b"\r\n".to_vec() } else { messages(octets).swap_remove(0) };
        let data = posthaste_bench::lmtp::Data::new(&message);
        let mut input =
            b"MAIL FROM:<someone@example.net> SIZE=7000\r\nRCPT TO:<user17@example.org>\r\nDATA\r\n".to_vec();
        input.extend_from_slice(data.wire());
        let mut output = Vec::new();
        let mut session = Session::<u64>::new(Arc::new(Config::lmtp("store.example")), &mut output);
        session.step(b"LHLO mx.example\r\n", &mut output);
        group.throughput(Throughput::Bytes(input.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(message.len()), |bencher| {
            bencher.iter(|| {
                output.clear();
                let mut at = 0;
                let mut taken = 0;
                loop {
                    let (used, event) = session.step(black_box(&input[at..]), &mut output);
                    at += used;
                    match event {
                        SmtpEvent::NeedInput => break,
                        SmtpEvent::Recipient(_) => session.accept_recipient(17, &mut output),
                        SmtpEvent::Data { .. } => session.accept_data(&mut output),
                        SmtpEvent::Message(message) => {
                            taken = message.body.len();
                            session.answer_recipient(&Reply::stored(), &mut output);
                        }
                        event => panic!("{event:?}"),
                    }
                }
                assert_eq!(taken, message.len());
            });
        });
    }
}

/// Reading a message's header and parts.
fn mime(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mime");
    for octets in [TEXT_OCTETS, ATTACHMENT_OCTETS] {
        let messages = messages(octets);
        group.throughput(Throughput::Bytes(octets));
        for_each(&mut group, "header", octets, &messages, |message| scan_header(message, 0, |_| false).body_offset);
        for_each(&mut group, "structure", octets, &messages, |message| structure::scan(message).len());
    }
}

/// Building a digest, and reading it for a client.
fn digest(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("digest");
    for octets in [TEXT_OCTETS, ATTACHMENT_OCTETS] {
        let messages = messages(octets);
        group.throughput(Throughput::Elements(1));
        for_each(&mut group, "build", octets, &messages, |message| Digest::of(message).archives().0.len());
        let digests: Vec<Vec<u8>> = messages.iter().map(|message| Digest::of(message).archives().0.to_vec()).collect();
        for_each(&mut group, "check", octets, &digests, |bytes| {
            DigestBytes::from_storage(bytes).expect("a digest").as_bytes().len()
        });
        type Write = fn(&mut Vec<u8>, &posthaste_mime::ArchivedDigest, bool);
        for (name, write) in [("envelope", write_envelope as Write), ("bodystructure", write_body_structure as Write)] {
            let checked: Vec<DigestBytes> =
                digests.iter().map(|bytes| DigestBytes::from_storage(bytes).expect("a digest")).collect();
            let mut out = Vec::new();
            for_each(&mut group, name, octets, &checked, |digest| {
                out.clear();
                write(&mut out, digest.digest().expect("it was checked"), false);
                out.len()
            });
        }
    }
}

/// FETCH responses without what is read from messages.
fn fetch_response(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("fetch_response");
    group.throughput(Throughput::Elements(1));
    let mut out = Vec::new();
    group.bench_function("flags", |bencher| {
        bencher.iter(|| {
            out.clear();
            let mut fetch = FetchWriter::new(&mut out, black_box(12_345));
            fetch.uid(black_box(67_890));
            fetch.flags(black_box("\\Seen \\Answered $Forwarded"));
            fetch.mod_seq(black_box(1_234_567));
            fetch.finish();
        });
    });
    group.bench_function("size and date", |bencher| {
        bencher.iter(|| {
            out.clear();
            let mut fetch = FetchWriter::new(&mut out, black_box(12_345));
            fetch.uid(black_box(67_890));
            fetch.rfc822_size(black_box(6700));
            fetch.internal_date(black_box(DateTime { unix_seconds: 1_795_500_000, offset_minutes: 60 }));
            fetch.finish();
        });
    });
}

/// Frames as they are put into the log and read from it.
fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    for (name, octets, header) in
        [("header", TEXT_OCTETS, true), ("text", TEXT_OCTETS, false), ("attachment", ATTACHMENT_OCTETS, false)]
    {
        let parts: Vec<Vec<u8>> = messages(octets)
            .iter()
            .map(|message| {
                let (head, body) = message.split_at(scan_header(message, 0, |_| false).body_offset);
                if header { head.to_vec() } else { body.to_vec() }
            })
            .collect();
        let mean = parts.iter().map(Vec::len).sum::<usize>() / parts.len();
        group.throughput(Throughput::Bytes(mean as u64));
        let (mut packer, mut out) = (Packer::default(), Vec::new());
        for_each(&mut group, "pack", name, &parts, |raw| {
            out.clear();
            packer.pack(raw, &mut out).stored_len as usize
        });
        let frames: Vec<(FrameInfo, Vec<u8>)> = parts
            .iter()
            .map(|raw| {
                let mut stored = Vec::new();
                (packer.pack(raw, &mut stored), stored)
            })
            .collect();
        let mut unpacker = Unpacker::default();
        for_each(&mut group, "unpack", name, &frames, |(info, stored)| {
            out.clear();
            info.unpack("frame", stored, &mut unpacker, &mut out).expect("a frame");
            out.len()
        });
    }
}

/// The index of a mailbox: look-ups, flag bitmaps, and changes of all flags.
fn index(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    let count = scaled(MESSAGES);
    let mut index = MailboxIndex::default();
    for uid in 1..=count {
        let flags = match uid % 4 {
            0 => Flags::NONE,
            1 => Flags::SEEN.with(Flags::FLAGGED),
            _ => Flags::SEEN,
        };
        index.apply(&Change::Place { message: message(uid), flags });
    }
    let mut uid = 0;
    let mut next = move || {
        // Far from the one before.
        uid = (uid + 7919) % count;
        Uid(uid + 1)
    };
    group.throughput(Throughput::Elements(1));
    group.bench_function("message by UID", |bencher| bencher.iter(|| index.message(next()).expect("it is there")));
    group.bench_function("flags by UID", |bencher| bencher.iter(|| index.flags_of(next())));
    let bits: BTreeMap<&str, u8> = [("seen", 0), ("flagged", 2)].into();
    group.bench_function("unseen and unflagged, count", |bencher| {
        bencher.iter(|| {
            let mut found = index.uids().0;
            for bit in bits.values() {
                found -= index.with_flag(*bit).expect("some have it");
            }
            assert_eq!(found.len(), u64::from(count / 4));
        });
    });
    group.bench_function("seen and flagged, count", |bencher| {
        bencher.iter(|| {
            let of = |name| index.with_flag(bits[name]).expect("some have it");
            of("seen").intersection_len(of("flagged"))
        });
    });
    group.throughput(Throughput::Elements(count.into()));
    group.bench_function("all UIDs and sizes", |bencher| {
        bencher.iter(|| index.messages.uids_and_sizes_from(0).map(|(_, size)| size).sum::<u64>());
    });
    for (name, uids) in
        [("change one flag", UidSet::one(Uid(count / 2))), ("change all flags", UidSet::range(1..=count))]
    {
        let change = Change::Flags(FlagChange {
            mailbox: MailboxId(1),
            modseq: ModSeq(u64::from(count) + 1),
            uids,
            set: Flags::ANSWERED,
            clear: Flags::SEEN,
            unseen_change: 0,
        });
        group.bench_function(name, |bencher| {
            // A change that is made again changes nothing; each is made to a copy, which is not timed.
            bencher.iter_batched_ref(|| index.clone(), |index| index.apply(&change), BatchSize::LargeInput);
        });
    }
}

fn message(uid: u32) -> Message {
    Message {
        uid: Uid(uid),
        modseq: ModSeq(uid.into()),
        id: MessageId { origin: ShardId(0), lsn: Lsn(uid.into()) },
        location: Location { segment: SegmentId(1), offset_units: uid * 600, len: 4000, ordinal: uid },
        head_bytes: 1500,
        size: 3000 + u64::from(uid % 5000),
        internal_date: 1_795_500_000 + i64::from(uid),
        save_date: 1_795_500_000 + i64::from(uid),
        ..Message::default()
    }
}

/// Times something for each of a few inputs in turn.
fn for_each<T>(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    name: &str,
    parameter: impl std::fmt::Display,
    inputs: &[T],
    mut work: impl FnMut(&T) -> usize,
) {
    let mut inputs = inputs.iter().cycle();
    group.bench_function(BenchmarkId::new(name, parameter), |bencher| {
        bencher.iter(|| work(black_box(inputs.next().expect("there are some"))));
    });
}

criterion_group!(benches, imap_command, smtp_transaction, mime, digest, fetch_response, codec, index);
criterion_main!(benches);
