//! The seam on the real system: a runtime per worker thread, on io_uring where it is allowed and on epoll and threads
//! elsewhere. The same methods work on both.

use std::fs::{DirBuilder, File as SystemFile, OpenOptions};
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::net::Network;
use super::{File, Io, OpenMode, Runtime};
use super::{epoll, pool, sys, uring};

/// Which runtime a worker runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// io_uring where [`probe`] finds it, else epoll.
    Auto,
    Uring,
    Epoll,
}

/// Whether io_uring is available here.
///
/// # Errors
/// Why it is not: `PermissionDenied` where a seccomp profile or `kernel.io_uring_disabled` forbids it, `InvalidInput`
/// on kernels before Linux 6.0, `Unsupported` on kernels without it.
pub fn probe() -> io::Result<()> {
    uring::probe()
}

/// Makes the current thread a worker: builds its runtime, pins it to `core` if one is given, runs `main` to its end and
/// returns its value. Tasks that `main` leaves behind are dropped.
///
/// Paths of the [`Io`] operations are below `root`, which need not exist yet. `core` counts as in
/// `core_affinity::get_core_ids`.
///
/// # Errors
/// The runtime could not be built (for `IoKind::Uring` see [`probe`]), or the thread could not be pinned.
pub fn run_worker<T>(
    kind: IoKind,
    root: PathBuf,
    core: Option<usize>,
    main: impl AsyncFnOnce(RealIo) -> T,
) -> io::Result<T> {
    // Threads inherit the set of cores they may run on, so all of them start before this one is pinned.
    let shared = pool::shared()?;
    let on_ring = match kind {
        IoKind::Auto => probe().is_ok(),
        IoKind::Uring => true,
        IoKind::Epoll => false,
    };
    let threads = if on_ring { None } else { Some(epoll::Threads::new()?) };
    if let Some(id) = core
        && !core_affinity::set_for_current(core_affinity::CoreId { id })
    {
        return Err(io::Error::other(format!("cannot run on core {id}")));
    }
    let io = RealIo(Rc::new(Worker { root, start: Instant::now(), shared, threads, network: Network::default() }));
    // `main` starts inside the runtime, where it may spawn.
    let main = async move { main(io).await };
    if on_ring { uring::block_on(main) } else { epoll::block_on(main) }
}

/// The handle of one worker's runtime; it stays on the worker's thread.
#[derive(Clone)]
pub struct RealIo(Rc<Worker>);

struct Worker {
    root: PathBuf,
    start: Instant,
    shared: &'static pool::Shared,
    /// On epoll only: the threads that files wait in.
    threads: Option<epoll::Threads>,
    network: Network,
}

impl RealIo {
    /// [`Runtime::offload`] for the checking of passwords, on threads of its own: what strangers make the server compute must not hold
    /// up anything else.
    pub fn offload_password<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = T> {
        self.0.shared.passwords.run(job)
    }

    /// `IoKind::Uring` or `IoKind::Epoll`.
    #[must_use]
    pub fn kind(&self) -> IoKind {
        if self.0.threads.is_none() { IoKind::Uring } else { IoKind::Epoll }
    }

    pub(super) fn network(&self) -> &Network {
        &self.0.network
    }

    fn path(&self, path: &str) -> PathBuf {
        let path = Path::new(path);
        assert!(path.is_relative(), "paths are below the root: {}", path.display());
        self.0.root.join(path)
    }

    /// Runs an operation on names or lengths off the worker.
    fn metadata<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + 'static {
        self.0.shared.metadata.run(job)
    }

    /// The same for one that only looks.
    fn lookup<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + 'static {
        self.0.shared.lookups.run(job)
    }

    fn file(&self, file: SystemFile) -> RealFile {
        RealFile { file: Arc::new(file), io: self.clone() }
    }
}

impl Runtime for RealIo {
    fn now(&self) -> Duration {
        self.0.start.elapsed()
    }

    #[expect(clippy::disallowed_methods, reason = "this is the method that others are pointed to")]
    fn wall_clock_ms(&self) -> u64 {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    }

    fn random(&self) -> u64 {
        sys::random()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        drop(tokio::task::spawn_local(task));
    }

    async fn yield_now(&self) {
        uring::yield_now().await;
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// A panic of the job continues in the caller. The job runs even if the future is dropped.
    fn offload<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
        self.0.shared.offload.run(job)
    }

    fn background<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> impl Future<Output = T> {
        self.0.shared.background.run(job)
    }
}

impl Io for RealIo {
    type File = RealFile;

    async fn open(&self, path: &str, mode: OpenMode) -> io::Result<RealFile> {
        let path = self.path(path);
        let open = move || {
            let mut options = OpenOptions::new();
            options.read(true);
            match mode {
                OpenMode::Read | OpenMode::ReadPieces => {}
                OpenMode::ReadWrite => _ = options.write(true),
                OpenMode::CreateNew => _ = options.write(true).create_new(true).mode(0o600),
            }
            let file = options.open(path)?;
            if mode == OpenMode::ReadPieces {
                sys::expect_random_reads(file.as_fd());
            }
            Ok(file)
        };
        let file = match mode {
            OpenMode::Read | OpenMode::ReadPieces => self.lookup(open).await,
            OpenMode::ReadWrite | OpenMode::CreateNew => self.metadata(open).await,
        };
        Ok(self.file(file?))
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.path(from), self.path(to));
        self.metadata(|| std::fs::rename(from, to)).await
    }

    async fn link(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (self.path(from), self.path(to));
        self.metadata(|| std::fs::hard_link(from, to)).await
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        let path = self.path(path);
        self.metadata(|| std::fs::remove_file(path)).await
    }

    async fn create_dir_all(&self, path: &str) -> io::Result<()> {
        let path = self.path(path);
        self.metadata(|| DirBuilder::new().recursive(true).mode(0o700).create(path)).await
    }

    async fn sync_dir(&self, path: &str) -> io::Result<()> {
        let path = self.path(path);
        let directory = self.metadata(|| OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path));
        self.file(directory.await?).sync_data().await
    }

    async fn free_bytes(&self) -> io::Result<u64> {
        let root = self.path("");
        self.lookup(move || sys::free_bytes(OpenOptions::new().read(true).open(root)?.as_fd())).await
    }

    /// Names that are not UTF-8 are left out: nothing here makes such names.
    async fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let path = self.path(path);
        let list = self.lookup(|| {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(path)? {
                let entry = entry?;
                if entry.file_type()?.is_file()
                    && let Ok(name) = entry.file_name().into_string()
                {
                    names.push(name);
                }
            }
            Ok(names)
        });
        list.await
    }
}

/// An open file of [`RealIo`].
#[derive(Clone)]
pub struct RealFile {
    /// Shared with the operations in flight, which keep it open.
    file: Arc<SystemFile>,
    io: RealIo,
}

impl File for RealFile {
    /// What the page cache has is read at once, without a trip through the ring or another thread.
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(len);
        while buffer.len() < len {
            let position = offset + buffer.len() as u64;
            let max = len - buffer.len();
            let count = match sys::read_cached(self.file.as_fd(), &mut buffer, max, position)? {
                Some(count) => count,
                None => {
                    let (result, returned) = match &self.io.0.threads {
                        None => uring::read(&self.file, buffer, max, position).await,
                        Some(threads) => threads.read(&self.file, buffer, max, position).await,
                    };
                    buffer = returned;
                    result?
                }
            };
            if count == 0 {
                break;
            }
        }
        Ok(buffer)
    }

    async fn write_at(&self, buffer: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
        match &self.io.0.threads {
            None => uring::write(&self.file, buffer, offset).await,
            Some(threads) => threads.write(&self.file, buffer, offset).await,
        }
    }

    async fn sync_data(&self) -> io::Result<()> {
        match &self.io.0.threads {
            None => uring::sync_data(&self.file).await,
            Some(threads) => threads.sync_data(&self.file).await,
        }
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        match &self.io.0.threads {
            None => uring::allocate(&self.file, len).await,
            Some(threads) => threads.allocate(&self.file, len).await,
        }
    }

    async fn truncate(&self, len: u64) -> io::Result<()> {
        let file = Arc::clone(&self.file);
        self.io.metadata(move || file.set_len(len)).await
    }

    async fn next_data(&self, offset: u64) -> io::Result<u64> {
        let file = Arc::clone(&self.file);
        self.io.metadata(move || sys::next_data(file.as_fd(), offset)).await
    }

    /// The kernel has the length in memory, so this does not wait.
    async fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }
}

/// Gives memory that has been freed back to the system: once after a start, when replay has left a heap of it. It takes
/// some milliseconds.
pub fn trim_memory() {
    sys::trim_memory();
}
