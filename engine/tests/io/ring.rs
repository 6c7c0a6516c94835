//! The traps of submitting only when the thread parks.

use std::cell::Cell;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use posthaste_engine::io::real::RealIo;
use posthaste_engine::io::{File, Io, OpenMode, Runtime};

use crate::on_each_kind;

const TRIES: usize = 51;

/// The median time of an operation while another task is always ready, working `slice` at a time.
async fn median_beside_a_busy_task(io: &RealIo, slice: Duration, mut operation: impl AsyncFnMut()) -> Duration {
    let stop = Rc::new(Cell::new(false));
    let stopped = Rc::new(Cell::new(false));
    io.spawn({
        let (io, stop, stopped) = (io.clone(), Rc::clone(&stop), Rc::clone(&stopped));
        async move {
            while !stop.get() {
                let start = Instant::now();
                while start.elapsed() < slice {}
                io.yield_now().await;
            }
            stopped.set(true);
        }
    });
    let mut times = Vec::new();
    for _ in 0..TRIES {
        io.yield_now().await;
        let start = Instant::now();
        operation().await;
        times.push(start.elapsed());
    }
    stop.set(true);
    while !stopped.get() {
        io.yield_now().await;
    }
    times.sort();
    times[TRIES / 2]
}

#[test]
fn submission_beside_a_task_that_always_yields_takes_under_1_ms() {
    on_each_kind(async |io| {
        let file = io.open("data", OpenMode::CreateNew).await.expect("create");
        let (here, mut there) = UnixStream::pair().expect("sockets");
        let socket = io.socket(here.into()).expect("socket");
        for slice in [Duration::ZERO, Duration::from_micros(100)] {
            let write = median_beside_a_busy_task(&io, slice, async || {
                file.write_at(b"x".to_vec(), 0).await.0.expect("write");
            });
            let write = write.await;
            let receive = median_beside_a_busy_task(&io, slice, async || {
                there.write_all(b"x").expect("send");
                let (result, _) = socket.receive(Vec::with_capacity(10)).await;
                assert_eq!(result.expect("receive"), 1);
            });
            let receive = receive.await;
            let wait = median_beside_a_busy_task(&io, slice, async || {
                there.write_all(b"x").expect("send");
                socket.readable().await.expect("wait");
                let (result, _) = socket.receive(Vec::with_capacity(10)).await;
                assert_eq!(result.expect("receive"), 1);
            });
            let wait = wait.await;
            println!("slice {slice:?}: write {write:?}, receive {receive:?}, wait {wait:?}");
            for (name, time) in [("write", write), ("receive", receive), ("wait", wait)] {
                assert!(time < Duration::from_millis(1), "{name} beside {slice:?} took {time:?}");
            }
        }
    });
}
