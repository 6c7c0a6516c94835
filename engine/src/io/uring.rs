//! The io_uring half of the seam, and the only file that names `tokio_uring` and `io_uring`.
//!
//! tokio-uring 0.5 supplies the runtime, the ring and the bookkeeping of operations; what it lacks is built on its
//! `UnsubmittedOneshot`, which takes any operation that completes once. Five of its traps are dealt with here:
//!
//! - **Submission starves.** The crate submits only when the thread parks, and tokio does not park while any task is
//!   ready. So [`kick`] enters the ring by hand: at once for file operations, for sends once [`SENDS_QUEUED_MAX`] wait
//!   or the oldest has waited for [`SEND_WAIT_MAX`], and around every [`yield_now`] for everything else.
//! - **A dropped operation goes on.** Its buffer and its descriptor belong to the operation ([`Held`]) until the kernel
//!   is done with them, so a dropped future is sound. It is not harmless: a dropped receive takes bytes along.
//!   `net` sees to that.
//! - **Dropping the runtime frees the buffers of dropped operations before the kernel is done with them.** While a
//!   runtime is being dropped, [`Held`] leaks its buffer instead.
//! - **Dropping the runtime waits for all operations.** Those of sockets are cancelled; those of files cannot be, and on a device
//!   that never answers they never end. So they are counted ([`InFile`]), and a runtime that still has one after
//!   [`FILES_WAIT_MAX`] is left behind with all that it owns.
//! - **More than one completion per operation panics.** No multishot and no zero-copy operation is built here.
//!
//! Needs Linux 6.0 (IORING_SETUP_SINGLE_ISSUER).
#![expect(
    unsafe_code,
    reason = "operations hand the kernel pointers that outlive the call; `start` states the contract"
)]

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, squeue, types};
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

use super::net::Chunk;
use super::sys::{LENGTH_MAX, SLICES_MAX};

/// Places in the submission queue; a full queue is submitted at once, so this bounds only the size of a batch.
const SUBMISSIONS: u32 = 256;
/// Places in the completion queue; the kernel keeps what does not fit.
const COMPLETIONS: u32 = 1024;

/// So many sends share one submission while tasks stay ready.
const SENDS_QUEUED_MAX: u64 = 16;
/// After so long, the next operation of a socket submits the sends that are queued.
const SEND_WAIT_MAX: Duration = Duration::from_micros(50);

/// A runtime that ends waits so long for the operations on files that are in flight then.
const FILES_WAIT_MAX: Duration = Duration::from_secs(2);

thread_local! {
    /// Operations on files in flight on this thread, by the order in which they were begun, and how many ever were.
    static IN_FILES: RefCell<(BTreeSet<u64>, u64)> = const { RefCell::new((BTreeSet::new(), 0)) };
    /// Sends queued on this thread so far, and the last of them that is known to have been submitted.
    static SENDS: Cell<(u64, u64)> = const { Cell::new((0, 0)) };
    /// When the oldest of the others was queued.
    static OLDEST_SEND: Cell<Option<Instant>> = const { Cell::new(None) };
    /// The ring of the runtime that this thread is running.
    static RING: Cell<Option<RawFd>> = const { Cell::new(None) };
    /// Whether an operation may have been queued since the last kick.
    static QUEUED: Cell<bool> = const { Cell::new(false) };
    static TEARDOWN: Cell<Teardown> = const { Cell::new(Teardown::No) };
}

/// What becomes of the memory and the descriptors of operations in flight when [`Held`] is dropped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Teardown {
    /// The kernel is done with the operation: drop both.
    No,
    /// The kernel may still use the buffer: leak it. It holds its own reference to the file.
    LeakBuffers,
    /// Operations may not even have been submitted: leak the descriptor as well, lest they find another file there.
    LeakAll,
}

/// Whether io_uring with what is needed here is available.
///
/// # Errors
/// Whatever setting up a ring gives: `PermissionDenied` under the seccomp profiles of Docker and containerd and with
/// `kernel.io_uring_disabled`, `InvalidInput` on an old kernel, `Unsupported` without io_uring.
pub(super) fn probe() -> io::Result<()> {
    let ring = ring_builder().build(SUBMISSIONS)?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::Recv::CODE,
        opcode::Send::CODE,
        opcode::SendMsg::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel2::CODE,
    ];
    if needed.iter().all(|code| probe.is_supported(*code)) { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

fn ring_builder() -> io_uring::Builder {
    let mut builder = tokio_uring::uring_builder();
    // SUBMIT_ALL: an operation the kernel refuses must not hold up those queued behind it.
    builder.setup_coop_taskrun().setup_single_issuer().setup_submit_all().setup_cqsize(COMPLETIONS);
    builder
}

/// Runs `main` to its end on a new runtime on this thread. Tasks that are then still there are dropped.
pub(super) fn block_on<T>(main: impl Future<Output = T>) -> io::Result<T> {
    let others = rings_of_this_thread()?;
    let mut builder = tokio_uring::builder();
    builder.entries(SUBMISSIONS).uring_builder(&ring_builder());
    let runtime = tokio_uring::Runtime::new(&builder)?;
    let mut rings = rings_of_this_thread()?;
    rings.retain(|ring| !others.contains(ring));
    let [ring] = rings[..] else {
        return Err(io::Error::other("cannot tell which descriptor is the ring"));
    };
    RING.set(Some(ring));
    QUEUED.set(false);
    let running = Running { runtime: ManuallyDrop::new(runtime) };
    Ok(running.runtime.block_on(main))
}

/// Takes the runtime down as the rules at the head of the file ask for, also when `main` panics.
struct Running {
    runtime: ManuallyDrop<tokio_uring::Runtime>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // With every operation submitted, the kernel holds the files it works on, and descriptors may be closed.
        let submitted = (0..1000).any(|_| kick().is_ok());
        let is_done = std::thread::panicking() || self.runtime.block_on(files_are_done());
        RING.set(None);
        if !is_done {
            return;
        }
        TEARDOWN.set(if submitted { Teardown::LeakBuffers } else { Teardown::LeakAll });
        // SAFETY: the field is not used again.
        unsafe { ManuallyDrop::drop(&mut self.runtime) };
        TEARDOWN.set(Teardown::No);
    }
}

/// Whether the operations on files that are in flight now come to their end.
async fn files_are_done() -> bool {
    let (in_flight, begun) = IN_FILES.with_borrow(|(in_flight, _)| (in_flight.last().copied(), Instant::now()));
    let Some(last) = in_flight else { return true };
    while IN_FILES.with_borrow(|(in_flight, _)| in_flight.first().is_some_and(|&first| first <= last)) {
        if begun.elapsed() > FILES_WAIT_MAX {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    true
}

/// Holds the file of an operation open, and counts the operation.
struct InFile<K> {
    _keep: K,
    number: u64,
}

impl<K> InFile<K> {
    fn new(keep: K) -> Self {
        let number = IN_FILES.with_borrow_mut(|(in_flight, ever)| {
            *ever += 1;
            in_flight.insert(*ever);
            *ever
        });
        Self { _keep: keep, number }
    }
}

impl<K> Drop for InFile<K> {
    fn drop(&mut self) {
        // Threads that end need not count any more.
        let _ = IN_FILES.try_with(|files| files.borrow_mut().0.remove(&self.number));
    }
}

/// The rings that take submissions from this thread. A ring made for a single issuer refuses all other threads, so
/// the rings of other workers do not count, and rings may come and go elsewhere while this looks.
fn rings_of_this_thread() -> io::Result<Vec<RawFd>> {
    let mut rings = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        // Descriptors that are gone by now are not ours.
        let is_ring = std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[io_uring]");
        let fd = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let Some(fd) = fd.filter(|_| is_ring)
            && enter(fd, 1).is_ok()
        {
            rings.push(fd);
        }
    }
    Ok(rings)
}

/// Submits up to `count` queued operations.
///
/// tokio-uring publishes the tail of the queue with every push and recomputes its length from the head that the kernel
/// moves, so operations that were submitted from here are simply gone from its queue.
fn enter(ring: RawFd, count: u32) -> io::Result<()> {
    // SAFETY: no signal mask is passed; the kernel checks that the descriptor is a ring. The entries it reads were
    // complete before the tail was published.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_enter, ring, count, 0, 0, std::ptr::null::<u8>(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Submits everything queued on this thread's ring; on other threads does nothing.
///
/// # Errors
/// None that matters to a running worker: what could not be submitted stays queued, and the next kick or park submits
/// it.
pub(super) fn kick() -> io::Result<()> {
    QUEUED.set(false);
    RING.get().map_or(Ok(()), |ring| enter(ring, SUBMISSIONS))?;
    SENDS.set((SENDS.get().0, SENDS.get().0));
    Ok(())
}

/// Submits the sends that are queued, if there may be any.
pub(super) fn submit_sends() {
    let (queued, submitted) = SENDS.get();
    if queued != submitted {
        kick_if_queued();
    }
}

/// Counts a send that was queued, and submits what has become too much or too late. Gives the number to tell
/// [`send_completed`].
fn send_queued() -> u64 {
    let (queued, submitted) = SENDS.get();
    let number = queued + 1;
    SENDS.set((number, submitted));
    if queued == submitted {
        OLDEST_SEND.set(Some(Instant::now()));
    } else if number - submitted >= SENDS_QUEUED_MAX {
        kick_if_queued();
    } else {
        submit_late_sends();
    }
    number
}

/// A send that has completed was submitted, and so were those before it.
fn send_completed(number: u64) {
    let (queued, submitted) = SENDS.get();
    SENDS.set((queued, submitted.max(number)));
}

/// Submits sends that have waited for too long. Those that parking has submitted meanwhile may cause a needless submission.
fn submit_late_sends() {
    let (queued, submitted) = SENDS.get();
    if queued != submitted && OLDEST_SEND.get().is_some_and(|oldest| oldest.elapsed() > SEND_WAIT_MAX) {
        kick_if_queued();
    }
}

fn kick_if_queued() {
    if QUEUED.get() && kick().is_err() {
        QUEUED.set(true);
    }
}

/// Lets every other ready task run, polls for completed I/O, and submits what is queued on the ring before and after.
/// Without a ring on this thread it does the same for epoll.
pub(super) async fn yield_now() {
    kick_if_queued();
    #[expect(clippy::disallowed_methods, reason = "this is the one place that kicks around it")]
    tokio::task::yield_now().await;
    // The runtime has polled for I/O and woken this task last but one: before the tasks whose operations completed.
    let mut behind = false;
    std::future::poll_fn(|context| {
        if behind {
            return Poll::Ready(());
        }
        behind = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
    kick_if_queued();
}

/// What an operation in flight owns: `keep` holds its descriptor open, `buffer` owns the memory it works on.
struct Held<K, B> {
    keep: ManuallyDrop<K>,
    buffer: ManuallyDrop<B>,
}

impl<K, B> Held<K, B> {
    fn into_buffer(self) -> B {
        let mut held = ManuallyDrop::new(self);
        // SAFETY: `held` is neither used nor dropped after this; both fields are taken exactly once.
        unsafe {
            ManuallyDrop::drop(&mut held.keep);
            ManuallyDrop::take(&mut held.buffer)
        }
    }
}

impl<K, B> Drop for Held<K, B> {
    fn drop(&mut self) {
        let teardown = TEARDOWN.get();
        // SAFETY: each field is dropped at most once, here, and not used again.
        unsafe {
            if teardown == Teardown::No {
                ManuallyDrop::drop(&mut self.buffer);
            }
            if teardown != Teardown::LeakAll {
                ManuallyDrop::drop(&mut self.keep);
            }
        }
    }
}

/// Gives back the kernel's result and the buffer.
struct Finish<K, B>(PhantomData<(K, B)>);

impl<K: Unpin + 'static, B: Unpin + 'static> OneshotOutputTransform for Finish<K, B> {
    type Output = (io::Result<usize>, B);
    type StoredData = Held<K, B>;

    fn transform_oneshot_output(self, data: Self::StoredData, cqe: cqueue::Entry) -> Self::Output {
        let result = usize::try_from(cqe.result()).map_err(|_| io::Error::from_raw_os_error(-cqe.result()));
        (result, data.into_buffer())
    }
}

/// An operation that the kernel has or is about to get. Dropping it leaves the operation running.
type InFlight<K, B> = InFlightOneshot<Held<K, B>, Finish<K, B>>;

/// Queues an operation for the ring.
///
/// # Safety
/// Every pointer in `entry` must point to static memory or to heap memory that `buffer` owns and that stays in place
/// when `buffer` moves; while `buffer` lives, nothing else may touch that memory (for an operation that writes to it)
/// or change it (for one that reads from it). The descriptor in `entry` must stay open while `keep` lives. The
/// operation must complete exactly once.
unsafe fn start<K, B>(keep: K, buffer: B, entry: squeue::Entry) -> InFlight<K, B>
where
    K: Unpin + 'static,
    B: Unpin + 'static,
{
    QUEUED.set(true);
    let held = Held { keep: ManuallyDrop::new(keep), buffer: ManuallyDrop::new(buffer) };
    UnsubmittedOneshot::new(held, Finish(PhantomData), entry).submit()
}

/// Something that holds a descriptor open: a clone of the owner's `Rc` or `Arc`.
pub(super) trait KeepsOpen: AsFd + Unpin + 'static {}
impl<T: AsFd + Unpin + 'static> KeepsOpen for T {}

fn target(keep: &impl AsFd) -> types::Fd {
    types::Fd(keep.as_fd().as_raw_fd())
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes.min(LENGTH_MAX)).expect("LENGTH_MAX fits")
}

/// Whether the operation must be submitted again as it was.
fn interrupted(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::Interrupted)
}

/// Marks `count` more bytes of a buffer as filled.
///
/// # Safety
/// The kernel must have stored that many bytes right behind the buffer's length.
unsafe fn grow(buffer: &mut Vec<u8>, count: usize) {
    assert!(count <= buffer.capacity() - buffer.len(), "the kernel stored more than was asked for");
    // SAFETY: within the capacity, and initialised according to the caller.
    unsafe { buffer.set_len(buffer.len() + count) };
}

/// Appends up to `max` bytes of the file at `offset` to the buffer's spare capacity; 0 is the end of the file.
pub(super) async fn read<K: KeepsOpen + Clone>(
    keep: &K,
    mut buffer: Vec<u8>,
    max: usize,
    offset: u64,
) -> (io::Result<usize>, Vec<u8>) {
    loop {
        let spare = buffer.spare_capacity_mut();
        let entry = opcode::Read::new(target(keep), spare.as_mut_ptr().cast(), length(spare.len().min(max)))
            .offset(offset)
            .build();
        // SAFETY: the pointer is to the heap memory of `buffer`, within its capacity.
        let operation = unsafe { start(InFile::new(keep.clone()), buffer, entry) };
        kick_if_queued();
        let (result, returned) = operation.await;
        buffer = returned;
        if interrupted(&result) {
            continue;
        }
        if let Ok(count) = result {
            // SAFETY: the kernel reports that it stored `count` bytes at the pointer given to it.
            unsafe { grow(&mut buffer, count) };
        }
        return (result, buffer);
    }
}

/// Writes all of the buffer from `offset` on.
pub(super) async fn write<K: KeepsOpen + Clone>(keep: &K, buffer: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
    let write_some = async |buffer: Vec<u8>, from: usize, offset| {
        let rest = &buffer[from..];
        let entry = opcode::Write::new(target(keep), rest.as_ptr(), length(rest.len())).offset(offset).build();
        // SAFETY: the pointer is to the heap memory of `buffer`, within its length.
        let operation = unsafe { start(InFile::new(keep.clone()), buffer, entry) };
        kick_if_queued();
        operation.await
    };
    super::write_all(buffer, offset, write_some).await
}

/// Makes the file's contents and length durable (for a directory: its names).
pub(super) async fn sync_data<K: KeepsOpen + Clone>(keep: &K) -> io::Result<()> {
    // No retry when interrupted: nothing may be assumed after a failed sync.
    let entry = opcode::Fsync::new(target(keep)).flags(types::FsyncFlags::DATASYNC).build();
    without_buffer(keep, entry).await.map(drop)
}

/// Gives the file at least `len` bytes, with blocks behind them.
pub(super) async fn allocate<K: KeepsOpen + Clone>(keep: &K, len: u64) -> io::Result<()> {
    loop {
        let entry = opcode::Fallocate::new(target(keep), len).build();
        let result = without_buffer(keep, entry).await;
        if !interrupted(&result) {
            return result.map(drop);
        }
    }
}

/// Runs an operation on a file without pointers and submits it at once.
async fn without_buffer<K: KeepsOpen + Clone>(keep: &K, entry: squeue::Entry) -> io::Result<usize> {
    // SAFETY: only called with operations that carry no pointer.
    let operation = unsafe { start(InFile::new(keep.clone()), (), entry) };
    kick_if_queued();
    operation.await.0
}

/// Receives into the buffer's spare capacity; 0 is the end of the stream. Dropping the future loses bytes.
pub(super) async fn receive<K: KeepsOpen + Clone>(keep: &K, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
    submit_late_sends();
    loop {
        let spare = buffer.spare_capacity_mut();
        let entry = opcode::Recv::new(target(keep), spare.as_mut_ptr().cast(), length(spare.len())).build();
        // SAFETY: the pointer is to the heap memory of `buffer`, within its capacity.
        let (result, returned) = unsafe { start(keep.clone(), buffer, entry) }.await;
        buffer = returned;
        if interrupted(&result) {
            continue;
        }
        if let Ok(count) = result {
            // SAFETY: the kernel reports that it stored `count` bytes at the pointer given to it.
            unsafe { grow(&mut buffer, count) };
        }
        return (result, buffer);
    }
}

/// Sends the buffer from byte `from` on, waiting for room; returns how much was taken.
pub(super) async fn send<K: KeepsOpen + Clone>(keep: &K, buffer: Vec<u8>, from: usize) -> (io::Result<usize>, Vec<u8>) {
    let rest = &buffer[from..];
    let entry = opcode::Send::new(target(keep), rest.as_ptr(), length(rest.len()))
        .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
        .build();
    // SAFETY: the pointer is to the heap memory of `buffer`, within its length.
    let operation = unsafe { start(keep.clone(), buffer, entry) };
    let number = send_queued();
    let output = operation.await;
    send_completed(number);
    output
}

/// The chunks of a gathered send and what the kernel needs to find them.
struct Gathered {
    chunks: Vec<Chunk>,
    /// Point into the memory of the chunks; read by the kernel.
    _slices: Vec<libc::iovec>,
    _message: Box<libc::msghdr>,
}

/// Sends the chunks from byte `from` on, waiting for room; returns how much was taken.
pub(super) async fn send_vectored<K: KeepsOpen + Clone>(
    keep: &K,
    chunks: Vec<Chunk>,
    from: usize,
) -> (io::Result<usize>, Vec<Chunk>) {
    let operation = {
        let mut slices: Vec<libc::iovec> = super::net::slices_from(&chunks, from)
            .take(SLICES_MAX)
            .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast_mut().cast(), iov_len: slice.len() })
            .collect();
        // SAFETY: all zeroes is a valid msghdr: no address, no slices, no control data.
        let mut message: Box<libc::msghdr> = Box::new(unsafe { std::mem::zeroed() });
        message.msg_iov = slices.as_mut_ptr();
        message.msg_iovlen = slices.len() as _;
        let entry = opcode::SendMsg::new(target(keep), &raw const *message)
            .flags((libc::MSG_NOSIGNAL | libc::MSG_WAITALL).cast_unsigned())
            .build();
        let gathered = Gathered { chunks, _slices: slices, _message: message };
        // SAFETY: the message, its slices and the bytes of every kind of chunk are heap or static memory that stays in
        // place when its owner moves; nobody changes them, as shared bytes are immutable.
        unsafe { start(keep.clone(), gathered, entry) }
    };
    let number = send_queued();
    let (result, gathered) = operation.await;
    send_completed(number);
    (result, gathered.chunks)
}

/// A wait for something to read. It takes no bytes, but holds the descriptor open until it completes.
pub(super) struct Readable<K: KeepsOpen>(InFlight<K, ()>);

impl<K: KeepsOpen> Readable<K> {
    pub(super) fn start(keep: K) -> Self {
        let events = (libc::POLLIN | libc::POLLRDHUP).cast_unsigned();
        let entry = opcode::PollAdd::new(target(&keep), u32::from(events)).build();
        // SAFETY: the operation carries no pointer.
        Self(unsafe { start(keep, (), entry) })
    }

    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll(context).map(|(result, ())| result.map(drop))
    }
}

/// Ends every operation in flight on the descriptor; each returns its result or ECANCELED. Submitted at once.
/// The returned future ends when that has been asked for, and may be dropped. `None` outside a running runtime.
pub(super) fn cancel_all<K: KeepsOpen>(keep: K) -> Option<impl Future<Output = ()>> {
    RING.get()?;
    let builder = types::CancelBuilder::fd(target(&keep)).all();
    let entry = opcode::AsyncCancel2::new(builder).build();
    // SAFETY: the operation carries no pointer.
    let operation = unsafe { start(keep, (), entry) };
    kick_if_queued();
    // The count of operations found, or an error if there were none.
    Some(async { drop(operation.await) })
}
