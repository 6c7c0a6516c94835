//! A device that never answers: a file system of one file, served by this test, which leaves reads of it unanswered. Needs the
//! right to mount; prints that it skipped where it has not.
#![expect(unsafe_code, reason = "mount, umount2 and poll")]

use std::ffi::CString;
use std::fs::{File as SystemFile, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use posthaste_engine::io::real::{RealIo, run_worker};
use posthaste_engine::io::{File, Io, OpenMode, Runtime};

use crate::{kinds, within};

/// Requests of the kernel, and how long its header is (linux/fuse.h).
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const HEADER_BYTES: usize = 40;

const ROOT: u64 = 1;
const FILE: u64 = 2;
const FILE_BYTES: u64 = 1 << 20;

/// The file system, until this is dropped: then what hangs fails.
struct Hanging {
    at: PathBuf,
    ends: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
    serving: Option<JoinHandle<()>>,
}

impl Hanging {
    fn mount(at: &Path) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let [source, target, kind, options] =
            ["hanging", at.to_str().expect("UTF-8"), "fuse", &options].map(|text| CString::new(text).expect("no NUL"));
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: all pointers are to strings that outlive the call.
        let mounted =
            unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
        if mounted != 0 {
            return Err(io::Error::last_os_error());
        }
        let (ends, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (told, counted) = (Arc::clone(&ends), Arc::clone(&reads));
        let serving = thread("serving", move || serve(device, &told, &counted));
        Ok(Self { at: at.to_owned(), ends, reads, serving: Some(serving) })
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        // Without its server, the file system fails whatever waits for it.
        self.ends.store(true, Ordering::Relaxed);
        drop(self.serving.take().map(JoinHandle::join));
        let at = CString::new(self.at.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: the pointer is to a string that outlives the call.
        unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) };
    }
}

fn serve(mut device: SystemFile, ends: &AtomicBool, reads: &AtomicUsize) {
    let mut request = vec![0; 256 << 10];
    while !ends.load(Ordering::Relaxed) {
        let mut poll = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, as the count says.
        if unsafe { libc::poll(&raw mut poll, 1, 20) } <= 0 {
            continue;
        }
        let Ok(length) = device.read(&mut request) else { continue };
        let header = &request[..length.min(HEADER_BYTES)];
        let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four"));
        let long = |at: usize| u64::from_ne_bytes(header[at..at + 8].try_into().expect("eight"));
        let (operation, unique, node) = (number(4), long(8), long(16));
        let mut answer = Vec::new();
        let mut error = 0_i32;
        match operation {
            READ => {
                reads.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            FORGET | BATCH_FORGET | INTERRUPT => continue,
            INIT => {
                // Version 7.31, reading ahead, reads side by side, requests at a time, bytes of a write; the rest is 0.
                [7_u32, 31, 4096, 1, 16 | 16 << 16, 4096, 1].iter().for_each(|field| put(&mut answer, *field));
                answer.resize(64, 0);
            }
            LOOKUP => {
                // The node, its generation, and for how long this holds.
                [FILE, 0, 1000, 1000].iter().for_each(|field| answer.extend(field.to_ne_bytes()));
                answer.resize(40, 0);
                put_attributes(&mut answer, FILE);
            }
            GETATTR => {
                answer.extend(1000_u64.to_ne_bytes());
                answer.resize(16, 0);
                put_attributes(&mut answer, node);
            }
            OPEN => answer.resize(16, 0),
            RELEASE | FLUSH => {}
            _ => error = -libc::ENOSYS,
        }
        let mut reply = Vec::new();
        put(&mut reply, (16 + answer.len()) as u32);
        reply.extend(error.to_ne_bytes());
        reply.extend(unique.to_ne_bytes());
        reply.extend(answer);
        // Whoever asked may have gone.
        let _ = device.write_all(&reply);
    }
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work).expect("a thread")
}

fn put(out: &mut Vec<u8>, field: u32) {
    out.extend(field.to_ne_bytes());
}

fn put_attributes(out: &mut Vec<u8>, node: u64) {
    let (mode, size) = if node == ROOT { (libc::S_IFDIR | 0o700, 0) } else { (libc::S_IFREG | 0o600, FILE_BYTES) };
    // Number, size, blocks, three times; three fractions, mode, links, owner, group, device, block size, flags.
    [node, size, size / 512, 0, 0, 0].iter().for_each(|field| out.extend(field.to_ne_bytes()));
    [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].iter().for_each(|field| put(out, *field));
}

/// Reads that wait, and one that was given up, keep a worker from nothing, and not from ending.
#[test]
fn a_worker_ends_although_reads_never_do() {
    for kind in kinds() {
        let root = tempfile::tempdir().expect("temporary directory");
        let at = root.path().join("hanging");
        std::fs::create_dir(&at).expect("a directory");
        let hanging = match Hanging::mount(&at) {
            Ok(hanging) => hanging,
            Err(error) => {
                println!("skipped: no file system can be mounted here: {error}");
                return;
            }
        };
        let reads = Arc::clone(&hanging.reads);
        let main = async move |io: RealIo| {
            let file = within(io.open("hanging/file", OpenMode::Read)).await.expect("open");
            for piece in 0..3_u64 {
                let file = file.clone();
                io.spawn(async move { drop(file.read_at(piece * (256 << 10), 4096).await) });
            }
            let given_up = tokio::time::timeout(Duration::from_millis(300), file.read_at(900 << 10, 4096)).await;
            assert!(given_up.is_err(), "it hangs");
            assert!(reads.load(Ordering::Relaxed) > 0, "the device was asked");
            let other = io.open("other", OpenMode::CreateNew).await.expect("create");
            within(other.write_at(b"bytes".to_vec(), 0)).await.0.expect("write");
            within(other.sync_data()).await.expect("sync");
            Instant::now()
        };
        let root = root.path().to_owned();
        let (ended, ending) = mpsc::channel();
        let worker = thread("worker", move || {
            let main_ended = run_worker(kind, root, None, main).expect("worker");
            ended.send(main_ended.elapsed()).expect("somebody waits");
        });
        let took = ending.recv_timeout(Duration::from_secs(20));
        // The kernel may keep the thread until nothing hangs any more.
        drop(hanging);
        worker.join().expect("no panic");
        let took = took.unwrap_or_else(|_| panic!("on {kind:?} the end of a worker waits for reads that never end"));
        println!("on {kind:?} it took {took:?}");
    }
}
