#![expect(unsafe_code, reason = "a seccomp filter, to forbid io_uring as containers do")]

use std::io::ErrorKind;

use posthaste_engine::io::real::{IoKind, RealIo, probe, run_worker};
use posthaste_engine::io::{File, Io, OpenMode};

/// Makes io_uring_setup fail with EPERM on this thread, and on no other.
fn forbid_io_uring() {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: u16::try_from(code).expect("a BPF code"),
        jt,
        jf,
        k,
    };
    let setup = u32::try_from(libc::SYS_io_uring_setup).expect("a system call number");
    let mut filter = [
        // The system call number is the first field of seccomp_data.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, setup, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(), 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: the program points to four live instructions; the kernel copies them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0, "no new privileges");
        let result = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program);
        assert_eq!(result, 0, "seccomp");
    }
}

#[test]
fn where_io_uring_is_forbidden_epoll_is_chosen() {
    let root = tempfile::tempdir().expect("temporary directory");
    let run = |kind| {
        run_worker(kind, root.path().to_owned(), None, async |io: RealIo| {
            let file = io.open("data", OpenMode::CreateNew).await.expect("create");
            file.write_at(b"x".to_vec(), 0).await.0.expect("write");
            io.kind()
        })
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            forbid_io_uring();
            assert_eq!(probe().expect_err("probe").kind(), ErrorKind::PermissionDenied);
            let error = run(IoKind::Uring).expect_err("io_uring is forbidden");
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            assert_eq!(run(IoKind::Auto).expect("worker"), IoKind::Epoll);
        });
        thread.join().expect("test thread");
    });
}

#[test]
fn auto_follows_the_probe() {
    let root = tempfile::tempdir().expect("temporary directory");
    let kind = run_worker(IoKind::Auto, root.path().to_owned(), None, async |io: RealIo| io.kind()).expect("worker");
    assert_eq!(kind == IoKind::Uring, probe().is_ok());
}
