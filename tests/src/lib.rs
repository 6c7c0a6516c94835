//! The proofs: a simulated node under random load and crashes, watched by an oracle that knows only what was
//! acknowledged and what sessions were shown.

pub mod clients;
pub mod damage;
pub mod dictionaries;
pub mod failing_device;
pub mod far;
pub mod imap_grammar;
pub mod kill;
pub mod model;
pub mod mutations;
pub mod oracle;
pub mod server;
pub mod simulation;
