//! Accepting counts the descriptors of the whole process, so this has a process of its own, and one test.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use posthaste_engine::io::Runtime;
use posthaste_engine::io::real::{IoKind, RealIo, run_worker};

/// The sockets and the descriptors of runtimes that are open. Threads of the C library open files for a moment.
fn descriptors() -> Vec<String> {
    let links = std::fs::read_dir("/proc/self/fd").expect("/proc").map(|entry| {
        let link = std::fs::read_link(entry.expect("entry").path()).unwrap_or_default();
        link.into_os_string().into_string().expect("UTF-8")
    });
    let mut links: Vec<String> =
        links.filter(|link| link.starts_with("socket:") || link.starts_with("anon_inode:")).collect();
    links.sort();
    links
}

fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connect");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    stream
}

async fn accept_and_stop(io: RealIo) {
    let before = descriptors();
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = listener.local_addr().expect("address");
    let acceptor = Rc::new(io.acceptor(listener.into()).expect("acceptor"));

    // Accepts that are given up lose nothing.
    let mut clients = Vec::new();
    for _ in 0..10 {
        for _ in 0..3 {
            let mut accept = Box::pin(acceptor.accept());
            let started =
                std::future::poll_fn(|context| std::task::Poll::Ready(accept.as_mut().poll(context).is_ready()));
            assert!(!started.await, "nobody has connected");
            io.yield_now().await;
        }
        clients.push(connect(address));
        let accepted = tokio::time::timeout(Duration::from_secs(20), acceptor.accept()).await;
        drop(accepted.expect("in time").expect("accept"));
    }
    for mut client in clients.drain(..) {
        assert_eq!(client.read(&mut [0; 1]).expect("the end of an accepted and closed connection"), 0);
    }

    // A waiting accept ends with the stop, and whoever comes then is closed with the listener.
    let (sender, receiver) = tokio::sync::oneshot::channel();
    io.spawn({
        let acceptor = Rc::clone(&acceptor);
        async move { drop(sender.send(acceptor.accept().await.map(drop))) }
    });
    io.yield_now().await;
    acceptor.stop();
    let error = receiver.await.expect("the task answers").expect_err("stopped");
    assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
    let mut late = connect(address);
    assert!(acceptor.accept().await.is_err(), "stopped for good");
    drop(Rc::into_inner(acceptor).expect("the task has ended"));
    let end = io.offload(move || late.read(&mut [0; 1]).map_err(|error| error.kind()));
    let end = end.await;
    assert!(matches!(end, Ok(0) | Err(std::io::ErrorKind::ConnectionReset)), "{end:?}");
    assert_eq!(descriptors(), before);
}

#[test]
fn a_stopped_accept_loop_leaks_no_fd() {
    let root = tempfile::tempdir().expect("temporary directory");
    let mut kinds = vec![IoKind::Epoll];
    if std::env::var("POSTHASTE_IO").is_ok_and(|kind| kind == "epoll") {
        println!("skipped 1 of 2 kinds: POSTHASTE_IO=epoll");
    } else {
        kinds.push(IoKind::Uring);
    }
    let before = descriptors();
    for kind in kinds {
        println!("on {kind:?}");
        run_worker(kind, root.path().to_owned(), None, accept_and_stop).expect("worker");
        // The thread that ran the last job may still be letting go of the runtime it woke.
        let deadline = Instant::now() + Duration::from_secs(20);
        while descriptors() != before && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(descriptors(), before, "with the worker gone");
    }
}
