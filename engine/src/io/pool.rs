//! Threads for work that waits or computes, so that a worker does neither.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use super::sys;

type Job = Box<dyn FnOnce() + Send>;

/// A queue and the threads that serve it. Dropping the pool finishes what is queued and joins the threads, unless they are
/// left behind.
pub(super) struct Pool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Priority {
    Normal,
    /// Gives way to the workers.
    Low,
    /// Runs when nothing else does.
    Idle,
}

impl Pool {
    /// Starts `count` threads. They inherit the caller's set of cores, so make pools before pinning a worker.
    pub(super) fn new(name: &str, count: usize, priority: Priority) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let mut pool = Self { queue, threads: Vec::with_capacity(count) };
        for _ in 0..count {
            let queue = Arc::clone(&pool.queue);
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                match priority {
                    Priority::Normal => {}
                    Priority::Low => sys::lower_priority(),
                    Priority::Idle => sys::run_when_idle(),
                }
                while let Some(job) = queue.next() {
                    job();
                }
            })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Lets the threads end by themselves: dropping the pool waits for none, since a job may never come to its end.
    pub(super) fn that_may_hang(mut self) -> Self {
        self.threads.clear();
        self
    }

    /// Runs a job on one of the threads. It runs even if the future is dropped. A panic of the job continues in the
    /// caller.
    pub(super) fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> + 'static {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.queue.push(Box::new(move || {
            // Nobody waits for the result if the future was dropped.
            let _ = sender.send(catch_unwind(AssertUnwindSafe(job)));
        }));
        async move {
            match receiver.await.expect("a queued job always runs") {
                Ok(value) => value,
                Err(panic) => resume_unwind(panic),
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            // The threads catch the panics of their jobs.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, job: Job) {
        self.lock().jobs.push_back(job);
        self.changed.notify_one();
    }

    /// The next job; `None` once the pool is closed and the queue empty.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The pools that all workers of the process share.
pub(super) struct Shared {
    /// CPU-heavy jobs, at low priority: as many threads as cores.
    pub(super) offload: Pool,
    /// Those that nobody waits for: compaction and training.
    pub(super) background: Pool,
    /// The same for passwords, which strangers can ask for as often as they like.
    pub(super) passwords: Pool,
    /// Operations on names and lengths: rare, and too slow (a journal commit) for a worker.
    pub(super) metadata: Pool,
    /// Those that only look, such as opening for reading: on a device that does not answer they never end, and what makes
    /// files must not wait for them.
    pub(super) lookups: Pool,
}

/// The process-wide pools, started at the first call.
pub(super) fn shared() -> io::Result<&'static Shared> {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    if let Some(shared) = SHARED.get() {
        return Ok(shared);
    }
    let cores = std::thread::available_parallelism()?.get();
    let shared = Shared {
        offload: Pool::new("offload", cores, Priority::Low)?,
        background: Pool::new("background", cores.div_ceil(4), Priority::Idle)?,
        passwords: Pool::new("passwords", cores, Priority::Low)?,
        metadata: Pool::new("metadata", 2, Priority::Normal)?,
        lookups: Pool::new("lookups", 4, Priority::Normal)?,
    };
    // Another thread may have been faster; its pools stay, and ours end.
    Ok(SHARED.get_or_init(|| shared))
}
