//! What commands and responses share.

mod date;
mod flag;
mod mailbox_name;
mod pattern;
mod sequence_set;

pub(crate) use date::MONTHS;
pub use date::{Date, DateTime};
pub use flag::Flag;
pub use mailbox_name::{MailboxName, MailboxNameError};
pub use pattern::Pattern;
pub use sequence_set::{OutOfRange, SequenceSet, SetBound, coalesce};
