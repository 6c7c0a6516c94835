//! The real binary, over the wire: every test starts a server of its own on free ports, with its own data directory.
//!
//! On io_uring, or on epoll with `POSTHASTE_IO=epoll`. Nothing here sleeps: tests wait for lines and for processes.

mod harness;
mod imap;
mod limits;
mod lmtp;
mod operation;
mod pop3;
mod smtp;
mod tls;
