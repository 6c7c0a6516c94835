//! A load generator for mail store servers: delivers over LMTP, reads over IMAP, and reports rates, latencies and what
//! the server and the device spent. It knows nothing of one server.
//!
//! One file per workload; what they share is in `drive` (connections, clock, progress), `observe` (the server's process
//! and the device) and `report`.

pub mod corpus;
pub mod deliver;
pub mod drive;
pub mod fetch;
pub mod idle;
pub mod imap;
pub mod lmtp;
pub mod observe;
pub mod report;
pub mod sink;
pub mod stream;
pub mod users;
