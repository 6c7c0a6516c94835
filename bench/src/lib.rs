//! A load generator for mail store servers: delivers over LMTP, reads over IMAP and POP3, with TLS or without, and reports rates, latencies and what
//! the server and the device spent. It knows nothing of one server.
//!
//! One file per workload; what they share is in `drive` (connections, clock, progress), `observe` (the server's process
//! and the device) and `report`.

pub mod append;
pub mod calibrate;
pub mod cgroup;
pub mod compare;
pub mod corpus;
pub mod deliver;
pub mod drive;
pub mod expunge;
pub mod fetch;
pub mod fetch_data;
pub mod fill;
pub mod flags;
pub mod generator;
pub mod handshakes;
pub mod hot;
pub mod idle;
pub mod imap;
pub mod lmtp;
pub mod mail;
pub mod maildrop;
pub mod moves;
pub mod noop;
pub mod null_imap;
pub mod observe;
pub mod open_loop;
pub mod pop3;
pub mod processes;
pub mod profile;
pub mod push;
pub mod report;
pub mod resync;
pub mod search;
pub mod session;
pub mod sessions;
pub mod sink;
pub mod stream;
pub mod sync;
pub mod tls;
pub mod users;
pub mod verify;
