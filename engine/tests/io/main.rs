//! The seam on the real system: every test runs on each kind of runtime where that makes sense.

mod files;
mod hanging;
mod probe;
mod ring;
mod sockets;

use std::cell::RefCell;
use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use posthaste_engine::io::real::{IoKind, RealIo, run_worker};

/// The kinds to test. io_uring must work, unless the environment says `POSTHASTE_IO=epoll`.
fn kinds() -> Vec<IoKind> {
    if std::env::var("POSTHASTE_IO").is_ok_and(|kind| kind == "epoll") {
        println!("skipped 1 of 2 kinds: POSTHASTE_IO=epoll");
        vec![IoKind::Epoll]
    } else {
        vec![IoKind::Uring, IoKind::Epoll]
    }
}

/// Runs the test on a worker of each kind, each with an empty root directory.
fn on_each_kind(test: impl AsyncFn(RealIo)) {
    for kind in kinds() {
        println!("on {kind:?}");
        on_kind(kind, &test);
    }
}

fn on_kind<T>(kind: IoKind, test: impl AsyncFnOnce(RealIo) -> T) -> T {
    let root = tempfile::tempdir().expect("temporary directory");
    run_worker(kind, root.path().to_owned(), None, async |io| within(test(io)).await).expect("worker")
}

/// Fails the test when what it waits for does not happen.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("happens in time")
}

/// Starts a future, gives it up unless it is ready at once.
async fn start_and_drop<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Runs two futures at the same time and returns both results.
async fn both<A, B>(first: impl Future<Output = A>, second: impl Future<Output = B>) -> (A, B) {
    let (mut first, mut second) = (pin!(first), pin!(second));
    let results = RefCell::new((None, None));
    std::future::poll_fn(|context| {
        let mut results = results.borrow_mut();
        if results.0.is_none()
            && let Poll::Ready(value) = first.as_mut().poll(context)
        {
            results.0 = Some(value);
        }
        if results.1.is_none()
            && let Poll::Ready(value) = second.as_mut().poll(context)
        {
            results.1 = Some(value);
        }
        match (results.0.take(), results.1.take()) {
            (Some(first), Some(second)) => Poll::Ready((first, second)),
            rest => {
                *results = rest;
                Poll::Pending
            }
        }
    })
    .await
}
