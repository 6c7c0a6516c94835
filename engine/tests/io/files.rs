#![expect(unsafe_code, reason = "posix_fadvise, to have something to read from the device")]

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use posthaste_engine::io::real::{IoKind, RealIo, run_worker};
use posthaste_engine::io::{File, Io, OpenMode, Runtime};

use crate::{kinds, on_each_kind, start_and_drop, within};

/// Bytes that tell where they belong.
fn pattern(length: usize, seed: u64) -> Vec<u8> {
    (0..length as u64).map(|index| ((index ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

/// Drops a synced file from the page cache.
fn evict(path: &Path) {
    let file = std::fs::File::open(path).expect("open");
    // SAFETY: no pointers.
    let result = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0, "posix_fadvise");
}

#[test]
fn what_was_written_is_read_warm_and_cold() {
    for kind in kinds() {
        let root = tempfile::tempdir_in(".").expect("a directory on a disk");
        let path = root.path().to_owned();
        run_worker(kind, path.clone(), None, async |io| {
            let file = io.open("data", OpenMode::CreateNew).await.expect("create");
            let data = pattern(3 << 20, 1);
            let (result, data) = file.write_at(data, 5).await;
            result.expect("write");
            file.sync_data().await.expect("sync");
            assert_eq!(file.len().await.expect("len"), data.len() as u64 + 5);
            for temperature in ["warm", "cold"] {
                if temperature == "cold" {
                    evict(&path.join("data"));
                }
                assert!(file.read_at(5, data.len()).await.expect("read") == data, "{temperature}");
                evict(&path.join("data"));
                let tail = file.read_at(data.len() as u64, 100).await.expect("read of the end");
                assert_eq!(tail, data[data.len() - 5..], "short only where the file ends");
                assert_eq!(file.read_at(1 << 40, 100).await.expect("read beyond"), []);
                assert_eq!(file.read_at(0, 7).await.expect("read of a hole"), [0, 0, 0, 0, 0, data[0], data[1]]);
                assert_eq!(file.read_at(0, 0).await.expect("read of nothing"), []);
            }
        })
        .expect("worker");
    }
}

#[test]
fn lengths_are_set_and_reserved() {
    on_each_kind(async |io| {
        let file = io.open("data", OpenMode::CreateNew).await.expect("create");
        file.allocate(1 << 20).await.expect("allocate");
        assert_eq!(file.len().await.expect("len"), 1 << 20);
        assert_eq!(file.read_at((1 << 20) - 3, 10).await.expect("read"), [0; 3]);
        file.allocate(10).await.expect("allocating less");
        assert_eq!(file.len().await.expect("len"), 1 << 20, "allocate does not shorten");
        file.truncate(3).await.expect("truncate");
        assert_eq!(file.len().await.expect("len"), 3);
        let (result, buffer) = file.write_at(Vec::new(), 100).await;
        result.expect("write of nothing");
        assert_eq!((buffer.len(), file.len().await.expect("len")), (0, 3));
    });
}

#[test]
fn open_modes_mean_what_they_say() {
    on_each_kind(async |io| {
        let kind = |result: std::io::Result<_>| result.err().map(|error: std::io::Error| error.kind());
        assert_eq!(kind(io.open("a", OpenMode::Read).await), Some(ErrorKind::NotFound));
        assert_eq!(kind(io.open("a", OpenMode::ReadWrite).await), Some(ErrorKind::NotFound));
        io.open("a", OpenMode::CreateNew).await.expect("create");
        assert_eq!(kind(io.open("a", OpenMode::CreateNew).await), Some(ErrorKind::AlreadyExists));
        let reader = io.open("a", OpenMode::Read).await.expect("open");
        let (result, buffer) = reader.write_at(b"x".to_vec(), 0).await;
        assert!(result.is_err(), "write to a file opened for reading");
        assert_eq!(buffer, b"x", "the buffer comes back with the error");
        let writer = io.open("a", OpenMode::ReadWrite).await.expect("open");
        writer.write_at(b"y".to_vec(), 0).await.0.expect("write");
        assert_eq!(reader.read_at(0, 9).await.expect("read"), b"y");
    });
}

#[test]
fn link_puts_only_if_absent() {
    on_each_kind(async |io| {
        for (name, contents) in [("one", "1"), ("two", "2")] {
            let file = io.open(name, OpenMode::CreateNew).await.expect("create");
            file.write_at(contents.into(), 0).await.0.expect("write");
        }
        io.link("one", "manifest").await.expect("the first link");
        let error = io.link("two", "manifest").await.expect_err("the second link");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        let file = io.open("manifest", OpenMode::Read).await.expect("open");
        assert_eq!(file.read_at(0, 10).await.expect("read"), b"1");
    });
}

#[test]
fn names_are_made_moved_listed_and_removed() {
    on_each_kind(async |io| {
        io.create_dir_all("shard/segments").await.expect("create directories");
        io.create_dir_all("shard/segments").await.expect("create directories that exist");
        let file = io.open("shard/segments/1.tmp", OpenMode::CreateNew).await.expect("create");
        file.write_at(b"first".to_vec(), 0).await.0.expect("write");
        io.open("shard/other", OpenMode::CreateNew).await.expect("create");
        io.rename("shard/segments/1.tmp", "shard/segments/1").await.expect("rename");
        io.rename("shard/other", "shard/segments/2").await.expect("rename between directories");
        io.rename("shard/segments/2", "shard/segments/1").await.expect("rename over a file");
        io.sync_dir("shard/segments").await.expect("sync");
        io.sync_dir("").await.expect("sync of the root");
        assert_eq!(io.list("shard/segments").await.expect("list"), ["1"]);
        assert_eq!(io.list("shard").await.expect("list"), [""; 0], "directories are not listed");
        assert_eq!(io.list("nowhere").await.expect_err("list").kind(), ErrorKind::NotFound);
        io.remove("shard/segments/1").await.expect("remove");
        assert_eq!(io.list("shard/segments").await.expect("list"), [""; 0]);
        let removed = io.remove("shard/segments/1").await.expect_err("remove twice");
        assert_eq!(removed.kind(), ErrorKind::NotFound);
        assert_eq!(file.read_at(0, 10).await.expect("read of a removed file"), b"first");
    });
}

/// What only looks may wait for a device that never answers; what makes files does not wait for it.
#[test]
fn opens_that_hang_keep_nobody_from_making_files() {
    const HANGING: usize = 10;
    for kind in kinds() {
        let root = tempfile::tempdir().expect("temporary directory");
        let pipe = root.path().join("pipe");
        // Nobody can open it for reading before somebody opens it for writing.
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
        assert!(made.success());
        let opened = Rc::new(std::cell::Cell::new(0));
        run_worker(kind, root.path().to_owned(), None, async |io: RealIo| {
            for _ in 0..HANGING {
                let (io, opened) = (io.clone(), Rc::clone(&opened));
                io.clone().spawn(async move {
                    io.open("pipe", OpenMode::Read).await.expect("open");
                    opened.set(opened.get() + 1);
                });
            }
            io.yield_now().await;
            let made = async {
                let file = io.open("file", OpenMode::CreateNew).await.expect("create");
                file.write_at(b"bytes".to_vec(), 0).await.0.expect("write");
                file.sync_data().await.expect("sync");
                file.truncate(2).await.expect("truncate");
                io.rename("file", "other").await.expect("rename");
                io.sync_dir("").await.expect("sync of a directory");
                io.remove("other").await.expect("remove");
            };
            within(made).await;
            assert_eq!(opened.get(), 0, "they hang");
            // Lets all of them go, one after another.
            let writing = std::fs::OpenOptions::new().read(true).write(true).open(&pipe).expect("open for writing");
            let all = async {
                while opened.get() < HANGING {
                    io.yield_now().await;
                }
            };
            within(all).await;
            drop(writing);
        })
        .expect("worker");
    }
}

/// Writes are given up in all states, with the memory they used soon reused, and arrive unharmed.
#[test]
fn dropping_a_file_operation_is_sound() {
    const LENGTH: usize = 256 << 10;
    const COUNT: u64 = 32;
    on_each_kind(async |io| {
        let file = io.open("data", OpenMode::CreateNew).await.expect("create");
        for index in 0..COUNT {
            let write = file.write_at(pattern(LENGTH, index), index * LENGTH as u64);
            drop(start_and_drop(write).await);
            drop(start_and_drop(file.sync_data()).await);
            drop(start_and_drop(file.read_at(index * 1000, LENGTH)).await);
            // Reuses the memory of the buffer if it was freed.
            drop(vec![0xEE_u8; LENGTH]);
        }
        for index in 0..COUNT {
            while file.read_at(index * LENGTH as u64, LENGTH).await.expect("read") != pattern(LENGTH, index) {
                io.yield_now().await;
            }
        }
    });
}

/// The same when the worker ends at once: nothing is freed or closed too early, and nothing hangs.
#[test]
fn ending_a_worker_with_operations_in_flight_is_sound() {
    for kind in kinds() {
        for _ in 0..20 {
            let root = tempfile::tempdir().expect("temporary directory");
            run_worker(kind, root.path().to_owned(), None, async |io: RealIo| {
                let file = io.open("data", OpenMode::CreateNew).await.expect("create");
                for index in 0..16 {
                    drop(start_and_drop(file.write_at(pattern(64 << 10, index), 0)).await);
                    let file = file.clone();
                    io.spawn(async move { drop(file.write_at(pattern(64 << 10, 99), 0).await) });
                }
                io.yield_now().await;
            })
            .expect("worker");
        }
    }
}

#[test]
fn jobs_run_off_the_worker() {
    on_each_kind(async |io| {
        let here = std::thread::current().id();
        let (sender, receiver) = std::sync::mpsc::channel();
        let job = io.offload(move || {
            receiver.recv().expect("the worker goes on while the job runs");
            (std::thread::current().id(), 42)
        });
        let ticked = Rc::new(std::cell::Cell::new(false));
        io.spawn({
            let (io, ticked) = (io.clone(), Rc::clone(&ticked));
            async move {
                io.sleep(Duration::from_millis(1)).await;
                ticked.set(true);
                sender.send(()).expect("the job waits");
            }
        });
        let (thread, value) = job.await;
        assert!(ticked.get());
        assert_ne!(thread, here);
        assert_eq!(value, 42);
        drop(io.offload(|| ()));
    });
}

#[test]
fn time_and_randomness_move() {
    on_each_kind(async |io| {
        let start = io.now();
        io.sleep(Duration::from_millis(2)).await;
        assert!(io.now() - start >= Duration::from_millis(2));
        assert!(io.wall_clock_ms() > 1_700_000_000_000);
        assert_ne!(io.random(), io.random());
    });
}

#[test]
fn a_worker_is_pinned_and_its_helpers_are_not() {
    let cores = std::thread::available_parallelism().expect("cores").get();
    for kind in kinds() {
        let root = tempfile::tempdir().expect("temporary directory");
        // On a thread of its own: a pinned thread stays pinned.
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                run_worker(kind, root.path().to_owned(), Some(0), async |io: RealIo| {
                    let here = std::thread::available_parallelism().expect("cores").get();
                    let there = io.offload(|| std::thread::available_parallelism().expect("cores").get()).await;
                    (here, there)
                })
            });
            assert_eq!(worker.join().expect("join").expect("worker"), (1, cores));
        });
    }
}

#[test]
fn two_workers_of_each_kind_run_side_by_side() {
    std::thread::scope(|scope| {
        for _ in 0..2 {
            for kind in kinds() {
                scope.spawn(move || {
                    for _ in 0..10 {
                        let root = tempfile::tempdir().expect("temporary directory");
                        let started = Instant::now();
                        run_worker(kind, root.path().to_owned(), None, async |io: RealIo| {
                            assert!(io.kind() == kind || kind == IoKind::Auto);
                            let file = io.open("data", OpenMode::CreateNew).await.expect("create");
                            within(file.write_at(pattern(1000, 7), 0)).await.0.expect("write");
                        })
                        .expect("worker");
                        assert!(started.elapsed() < Duration::from_secs(30));
                    }
                });
            }
        }
    });
}
