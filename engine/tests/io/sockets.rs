use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::io::Runtime;
use posthaste_engine::io::net::{Chunk, SharedBytes, Shutdown, Socket};
use posthaste_engine::io::real::RealIo;

use crate::{both, kinds, on_each_kind, on_kind, start_and_drop};

/// A connection over TCP: one end for the worker, one blocking (but not for ever) for the test.
fn connection() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    client.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    (listener.accept().expect("accept").0.into(), client)
}

fn pair(io: &RealIo) -> (Socket, TcpStream) {
    let (server, client) = connection();
    (io.socket(server).expect("socket"), client)
}

async fn receive(socket: &Socket, length: usize) -> Vec<u8> {
    let mut buffer = Vec::with_capacity(length);
    while buffer.len() < length {
        let (result, returned) = socket.receive(buffer).await;
        buffer = returned;
        assert_ne!(result.expect("receive"), 0, "end of stream");
    }
    buffer
}

fn canceled<T>(result: std::io::Result<T>) -> bool {
    result.err().and_then(|error| error.raw_os_error()) == Some(libc::ECANCELED)
}

#[test]
fn bytes_go_both_ways_until_the_end() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        client.write_all(b"hello").expect("send");
        assert_eq!(receive(&socket, 5).await, b"hello");
        let (result, buffer) = socket.send_all(b"world".to_vec()).await;
        result.expect("send");
        assert_eq!(buffer, b"world");
        let mut answer = [0; 5];
        client.read_exact(&mut answer).expect("receive");
        assert_eq!(&answer, b"world");
        client.write_all(b"and more").expect("send");
        client.shutdown(std::net::Shutdown::Write).expect("shutdown");
        assert_eq!(receive(&socket, 3).await, b"and", "no more than there is room for");
        assert_eq!(receive(&socket, 5).await, b" more");
        socket.readable().await.expect("an end is readable");
        assert_eq!(socket.receive(Vec::with_capacity(1)).await.0.expect("end of stream"), 0);
        socket.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(client.read(&mut answer).expect("end of stream"), 0);
    });
}

/// More than the socket takes at once, against a slow reader, both plain and gathered.
#[test]
fn long_sends_go_out_whole() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        let body: Vec<u8> = (0..8_000_000_u32).map(|index| (index / 7) as u8).collect();
        let shared = Arc::new(body.clone());
        let mut chunks = vec![Chunk::Static(b"* 1 FETCH"), b" (BODY {8000000}".to_vec().into(), Chunk::Static(b"")];
        for start in (0..body.len()).step_by(2000) {
            chunks.push(Chunk::Shared(SharedBytes::new(Arc::clone(&shared), start..start + 2000)));
        }
        chunks.push(b")".to_vec().into());
        let expected = [&b"* 1 FETCH (BODY {8000000}"[..], &body, b")", &body].concat();
        let received = io.offload(move || {
            let mut received = vec![0; expected.len()];
            client.read_exact(&mut received).expect("receive");
            received == expected
        });
        let send = async {
            let (result, returned) = socket.send_vectored(chunks).await;
            result.expect("gathered send");
            assert_eq!(returned.len(), 4004);
            let (result, returned) = socket.send_all(body).await;
            result.expect("send");
            assert_eq!(returned.len(), 8_000_000);
        };
        assert!(both(received, send).await.0, "every byte in its place");
    });
}

#[test]
fn sending_to_a_closed_peer_is_an_error() {
    on_each_kind(async |io| {
        let (socket, client) = pair(&io);
        drop(client);
        let mut buffer = vec![7; 1000];
        let error = loop {
            let (result, returned) = socket.send_all(buffer).await;
            buffer = returned;
            if let Err(error) = result {
                break error;
            }
            io.yield_now().await;
        };
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
        let (result, _) = socket.send_vectored(vec![Chunk::Static(b"x")]).await;
        assert!(result.is_err());
    });
}

/// Sends on the ring leave when the thread parks, which it does not do while tasks are ready.
#[test]
fn a_reply_does_not_wait_for_a_long_round() {
    const TASKS: u32 = 300;
    const WORK: Duration = Duration::from_micros(100);
    on_each_kind(async |io| {
        let (first, mut client) = pair(&io);
        let others: Vec<_> = (0..TASKS).map(|_| pair(&io)).collect();
        let begun = std::time::Instant::now();
        let arrival = io.offload(move || {
            client.read_exact(&mut [0; 1]).expect("the reply");
            begun.elapsed()
        });
        let (sender, mut done) = tokio::sync::mpsc::unbounded_channel();
        io.spawn(async move { drop(first.send_all(b"x".to_vec()).await) });
        for (other, client) in others {
            let sender = sender.clone();
            io.spawn(async move {
                let begun = std::time::Instant::now();
                while begun.elapsed() < WORK {}
                let _ = other.send_all(b"x".to_vec()).await;
                drop(client);
                let _ = sender.send(());
            });
        }
        drop(sender);
        while done.recv().await.is_some() {}
        let (arrival, all) = (arrival.await, begun.elapsed());
        println!("the reply took {arrival:?} of {all:?}");
        assert!(arrival < all / 2, "{arrival:?} of {all:?}");
    });
}

#[test]
fn no_byte_is_lost_when_a_wait_is_given_up() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        for _ in 0..3 {
            assert!(start_and_drop(socket.readable()).await.is_none(), "nothing has been sent");
            io.yield_now().await;
        }
        client.write_all(b"AAAA").expect("send");
        client.write_all(b"BBBB").expect("send");
        assert_eq!(receive(&socket, 8).await, b"AAAABBBB");
    });
}

/// The wait that was given up ends when bytes come; the next wait must not take that for new ones.
#[test]
fn a_wait_does_not_end_for_bytes_that_are_gone() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        assert!(start_and_drop(socket.readable()).await.is_none());
        client.write_all(b"AAAA").expect("send");
        assert_eq!(receive(&socket, 4).await, b"AAAA");
        for _ in 0..20 {
            assert!(start_and_drop(socket.readable()).await.is_none(), "nothing new has been sent");
            io.sleep(Duration::from_micros(100)).await;
        }
        client.write_all(b"BBBB").expect("send");
        socket.readable().await.expect("wait");
        assert_eq!(receive(&socket, 4).await, b"BBBB");
    });
}

#[test]
fn an_abandoned_read_holds_no_socket_open() {
    on_each_kind(async |io| {
        for wait in [false, true] {
            let (socket, mut client) = pair(&io);
            if wait {
                assert!(start_and_drop(socket.readable()).await.is_none());
            } else {
                assert!(start_and_drop(socket.receive(Vec::with_capacity(100))).await.is_none());
            }
            io.yield_now().await;
            drop(socket);
            let end = io.offload(move || client.read(&mut [0; 1]).expect("end of stream, not a timeout"));
            assert_eq!(end.await, 0);
        }
    });
}

#[test]
fn everything_in_flight_can_be_cancelled() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        let socket = Rc::new(socket);
        let cancel = async {
            io.sleep(Duration::from_millis(1)).await;
            socket.cancel_all();
        };
        let ((result, buffer), ()) = both(socket.receive(Vec::with_capacity(100)), cancel).await;
        assert!(canceled(result));
        assert_eq!(buffer.capacity(), 100, "the buffer comes back");
        let cancel = async {
            io.sleep(Duration::from_millis(1)).await;
            socket.cancel_all();
        };
        assert!(canceled(both(socket.readable(), cancel).await.0));
        let cancel = async {
            io.sleep(Duration::from_millis(1)).await;
            socket.cancel_all();
        };
        assert!(both(socket.send_all(vec![0; 50_000_000]), cancel).await.0.0.is_err(), "the peer reads nothing");
        client.write_all(b"still there").expect("send");
        assert_eq!(receive(&socket, 11).await, b"still there");
    });
}

#[test]
fn a_connection_moves_to_another_worker_with_unread_bytes() {
    for kind in kinds() {
        let (server, mut client) = connection();
        let moved = on_kind(kind, async |io| {
            let socket = io.socket(server).expect("socket");
            client.write_all(b"LOGIN").expect("send");
            assert_eq!(receive(&socket, 5).await, b"LOGIN");
            assert!(start_and_drop(socket.readable()).await.is_none(), "leaves a wait behind");
            client.write_all(b"SELECT").expect("send");
            socket.into_fd().await.map_err(|_| "in flight").expect("nothing is in flight")
        });
        let thread = std::thread::Builder::new().spawn(move || {
            on_kind(kind, async |io| {
                let socket = io.socket(moved).expect("socket");
                assert_eq!(receive(&socket, 6).await, b"SELECT");
                socket.send_all(b"OK".to_vec()).await.0.expect("send");
            });
        });
        thread.expect("thread").join().expect("the other worker");
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).expect("the answer and the end");
        assert_eq!(answer, b"OK");
    }
}

#[test]
fn a_connection_that_may_lose_bytes_does_not_move() {
    for kind in kinds() {
        on_kind(kind, async |io| {
            let (socket, _client) = pair(&io);
            assert!(start_and_drop(socket.receive(Vec::with_capacity(100))).await.is_none());
            let moved = socket.into_fd().await;
            // With epoll a dropped receive is nothing.
            assert_eq!(moved.is_err(), kind == posthaste_engine::io::real::IoKind::Uring);
        });
    }
}

#[test]
fn a_deadline_ends_a_receive_and_leaves_room_for_a_goodbye() {
    on_each_kind(async |io| {
        for wait in [false, true] {
            let (socket, mut client) = pair(&io);
            socket.set_deadline(Duration::from_secs(600));
            socket.set_deadline(Duration::from_millis(1));
            let error = if wait {
                socket.readable().await.expect_err("time out")
            } else {
                socket.receive(Vec::with_capacity(10)).await.0.expect_err("time out")
            };
            assert_eq!(error.kind(), ErrorKind::TimedOut);
            assert!(socket.is_timed_out());
            socket.send_all(b"* BYE".to_vec()).await.0.expect("goodbye");
            drop(socket);
            let mut goodbye = Vec::new();
            client.read_to_end(&mut goodbye).expect("the goodbye and the end");
            assert_eq!(goodbye, b"* BYE");
        }
    });
}

#[test]
fn a_deadline_ends_a_send_that_nobody_takes() {
    on_each_kind(async |io| {
        let (socket, _client) = pair(&io);
        socket.set_deadline(Duration::from_millis(1));
        let (result, _) = socket.send_all(vec![0; 50_000_000]).await;
        assert_eq!(result.expect_err("time out").kind(), ErrorKind::TimedOut);
    });
}

#[test]
fn a_deadline_can_be_taken_back_and_set_again() {
    on_each_kind(async |io| {
        let (socket, mut client) = pair(&io);
        socket.set_deadline(Duration::from_millis(1));
        socket.clear_deadline();
        // Another socket shows that the sweeper has passed.
        let (other, _other_client) = pair(&io);
        other.set_deadline(Duration::from_millis(1));
        other.readable().await.expect_err("time out");
        assert!(!socket.is_timed_out());
        client.write_all(b"x").expect("send");
        assert_eq!(receive(&socket, 1).await, b"x");
        socket.set_deadline(Duration::from_millis(1));
        socket.readable().await.expect_err("time out");
    });
}
