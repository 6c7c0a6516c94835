//! System calls that never wait, and the few others the standard library lacks, behind safe functions.
#![expect(unsafe_code, reason = "raw system calls; each function checks the lengths it passes on")]

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// No operation asks the kernel for more than this at once; it fits every length field on the way.
pub(super) const LENGTH_MAX: usize = 1 << 30;

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Turns "would block" into `None`, and tries again when a signal interrupted.
fn unless_blocked(mut call: impl FnMut() -> isize) -> io::Result<Option<usize>> {
    loop {
        match check(call()) {
            Ok(count) => return Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Appends what `fill(pointer, length)` stores into at most `max` bytes of the buffer's spare capacity.
fn append(buffer: &mut Vec<u8>, max: usize, fill: impl Fn(*mut u8, usize) -> isize) -> io::Result<Option<usize>> {
    let spare = buffer.spare_capacity_mut();
    let length = spare.len().min(max).min(LENGTH_MAX);
    let pointer = spare.as_mut_ptr().cast::<u8>();
    let count = unless_blocked(|| fill(pointer, length))?;
    if let Some(count) = count {
        assert!(count <= length, "the kernel stored more than was asked for");
        // SAFETY: the kernel has initialised `count` bytes right after the current length, within the capacity.
        unsafe { buffer.set_len(buffer.len() + count) };
    }
    Ok(count)
}

/// Appends up to `max` bytes of the file at `offset`, if they are in the page cache; 0 is the end of the file.
/// `None`: the data must come from the device, or the file system cannot tell.
pub(super) fn read_cached(
    fd: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    max: usize,
    offset: u64,
) -> io::Result<Option<usize>> {
    let result = append(buffer, max, |pointer, length| {
        let slice = libc::iovec { iov_base: pointer.cast(), iov_len: length };
        // SAFETY: the iovec names spare capacity of `buffer`, which outlives the call.
        unsafe { libc::preadv2(fd.as_raw_fd(), &raw const slice, 1, offset.cast_signed(), libc::RWF_NOWAIT) }
    });
    match result {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(None),
        other => other,
    }
}

/// Appends up to `max` bytes of the file at `offset`, waiting for the device; 0 is the end of the file.
pub(super) fn read(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>, max: usize, offset: u64) -> io::Result<usize> {
    let count = append(buffer, max, |pointer, length| {
        // SAFETY: pointer and length name spare capacity of `buffer`, which outlives the call.
        unsafe { libc::pread(fd.as_raw_fd(), pointer.cast(), length, offset.cast_signed()) }
    })?;
    count.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

/// Bytes that this process may still write to the file system of a descriptor.
pub(super) fn free_bytes(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut found = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the pointer is that of a live structure of the right type.
    if unsafe { libc::fstatvfs(fd.as_raw_fd(), found.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has succeeded, so it has filled the structure.
    let found = unsafe { found.assume_init() };
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// The first offset at or after `offset` that the file system knows to hold data; the file's length if there is none.
pub(super) fn next_data(fd: BorrowedFd<'_>, offset: u64) -> io::Result<u64> {
    // The position of the descriptor, which this moves, is used by nobody: all reads and writes give their own.
    // SAFETY: the call takes no pointers.
    let found = unsafe { libc::lseek(fd.as_raw_fd(), offset.cast_signed(), libc::SEEK_DATA) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(found);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // SAFETY: as above.
        Some(libc::ENXIO) => u64::try_from(unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) })
            .map_err(|_| io::Error::last_os_error()),
        // The file system cannot tell: everything may be data.
        Some(libc::EINVAL | libc::EOPNOTSUPP) => Ok(offset),
        _ => Err(error),
    }
}

/// Appends what has arrived on a socket to the spare capacity; 0 is the end of the stream, `None` nothing yet.
pub(super) fn receive(fd: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
    append(buffer, LENGTH_MAX, |pointer, length| {
        // SAFETY: pointer and length name spare capacity of `buffer`, which outlives the call.
        unsafe { libc::recv(fd.as_raw_fd(), pointer.cast(), length, libc::MSG_DONTWAIT) }
    })
}

/// Sends as much as the socket takes without waiting; `None` if that is nothing.
pub(super) fn send(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<Option<usize>> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are those of a live slice.
    unless_blocked(|| unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// As [`send`], gathered from several slices.
pub(super) fn send_vectored(fd: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    // SAFETY: all zeroes is a valid msghdr: no address, no slices, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // `IoSlice` has the layout of iovec (documented), and sendmsg only reads through the pointer.
    message.msg_iov = slices.as_ptr().cast_mut().cast();
    message.msg_iovlen = slices.len().min(SLICES_MAX) as _;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message points to live slices of live bytes.
    unless_blocked(|| unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// IOV_MAX on Linux.
pub(super) const SLICES_MAX: usize = 1024;

/// Whether a read of the descriptor would return at once: data, end of stream, an error or a waiting connection.
pub(super) fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, as the count says; the timeout of zero makes the call return at once.
    unsafe { libc::poll(&raw mut poll, 1, 0) != 0 }
}

/// Accepts a waiting connection; `None` if there is none. The listener must be non-blocking.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let null = std::ptr::null_mut();
    let fd = unless_blocked(|| {
        // SAFETY: null asks for no peer address.
        unsafe { libc::accept4(listener.as_raw_fd(), null, null.cast(), libc::SOCK_CLOEXEC) as isize }
    })?;
    // SAFETY: the kernel has just given us this descriptor; nothing else owns it.
    Ok(fd.map(|fd| unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("descriptors are ints")) }))
}

/// Which directions of a connection to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// What arrives from now on is lost; a waiting read sees the end of the stream.
    Read,
    /// The peer sees the end of the stream after what was sent.
    Write,
    Both,
}

pub(super) fn shutdown(fd: BorrowedFd<'_>, how: Shutdown) -> io::Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: no pointers.
    check(unsafe { libc::shutdown(fd.as_raw_fd(), how) } as isize).map(drop)
}

pub(super) fn set_nonblocking(fd: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    // SAFETY: no pointers.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } as isize)?;
    let flags = i32::try_from(flags).expect("flags are an int");
    let wanted = if nonblocking { flags | libc::O_NONBLOCK } else { flags & !libc::O_NONBLOCK };
    if wanted != flags {
        // SAFETY: no pointers.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, wanted) } as isize)?;
    }
    Ok(())
}

/// Gives the file at least `len` bytes, with blocks behind them.
pub(super) fn allocate(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    loop {
        // SAFETY: no pointers.
        match check(unsafe { libc::fallocate(fd.as_raw_fd(), 0, 0, len.cast_signed()) } as isize) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result.map(drop),
        }
    }
}

/// Tells the kernel not to read ahead. Failing to is harmless.
pub(super) fn expect_random_reads(fd: BorrowedFd<'_>) {
    // SAFETY: no pointers.
    unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) };
}

/// Lets the calling thread run when no other wants to: whoever wakes takes its core at once. Failing to is harmless.
pub(super) fn run_when_idle() {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter is read before the call returns, and 0 stands for the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &none) };
}

/// Lets the calling thread give way to others: nice 10. Failing to is harmless.
pub(super) fn lower_priority() {
    // SAFETY: no pointers; on Linux "process 0" is the calling thread only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
}

/// 64 bits from the kernel's generator.
pub(super) fn random() -> u64 {
    let mut bytes = [0_u8; 8];
    // SAFETY: pointer and length are those of the array.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(count, 8, "getrandom gives up to 256 bytes whole");
    u64::from_ne_bytes(bytes)
}

/// Gives memory that has been freed back to the system.
pub(super) fn trim_memory() {
    // SAFETY: malloc_trim takes no pointers and may be called at any time from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
