//! What may not be exceeded, in one place. What an operator may want to change is in [`crate::config`] and begins with
//! these defaults; the rest is fixed.

use std::time::Duration;

/// Largest message taken, in octets. Providers allow 25 to 50 MB; base64 makes that a third more.
pub const MESSAGE_BYTES: u64 = 50 << 20;
/// Bytes of clients' messages held in memory by the whole node.
pub const IN_FLIGHT_BYTES: u64 = 512 << 20;
/// Open connections of the node. Each needs a descriptor and a few KB.
pub const CONNECTIONS: usize = 100_000;
/// Open connections of one address, loopback left out. Large enough for an office behind one address.
pub const CONNECTIONS_PER_ADDRESS: usize = 1_000;
/// Recipients of one LMTP or SMTP transaction; RFC 5321, 4.5.3.1.8 asks for at least 100.
pub const RECIPIENTS: usize = 1_000;
/// Received fields past which a message is in a loop; RFC 5321, 6.3 asks for at least 100.
pub const HOPS_MAX: usize = 100;
/// How long a message that its client was told to repeat is remembered for those who have it. Postfix tries again after at most 67
/// minutes, other servers after some hours; each repetition counts anew.
pub const RECEIPT: Duration = Duration::from_secs(6 * 3600);
/// RFC 9051, 5.4: at least 30 minutes.
pub const IMAP_IDLE_S: u64 = 30 * 60;
/// RFC 5321, 4.5.3.2.7: at least 5 minutes. For SMTP, too.
pub const LMTP_IDLE_S: u64 = 5 * 60;
/// RFC 1939, 3: at least 10 minutes.
pub const POP3_IDLE_S: u64 = 10 * 60;
/// How long a client may take to log in, from its first moment on.
pub const LOGIN_S: u64 = 60;
/// A client that takes nothing of what it asked for is closed after so long.
pub const SEND_S: u64 = 300;
/// How long the handshake of TLS may take.
pub const TLS_HANDSHAKE: Duration = Duration::from_secs(30);
/// Connections of one account that have logged in. Mail clients open some five each.
pub const CONNECTIONS_PER_USER: usize = 100;

/// What the scrub of each shard reads in a second: little beside what a disk can do, and 100 GB in a bit more than a day.
pub const SCRUB_BYTES_PER_S: u64 = 1 << 20;
/// A scrub begins so long after the last one has come to its end.
pub const SCRUB_INTERVAL_S: u64 = 7 * 24 * 3600;
/// Bad commands after which an IMAP connection is closed: what sends so many is no mail client.
pub const BAD_COMMANDS_MAX: u8 = 50;
/// Bad commands after which a POP3 connection is closed.
pub const POP3_ERRORS_MAX: u32 = 50;
/// Failed logins after which a connection is closed.
pub const LOGIN_FAILURES_MAX: u8 = 5;
/// Recipients without an account after which an SMTP connection is closed.
pub const RECIPIENTS_REFUSED_MAX: u32 = 100;
/// The longest that a message may take to come in. Slower than 15 KB a second, the largest does not get through.
pub const TRANSFER: Duration = Duration::from_secs(3600);
/// How long the last words of a connection may take, with what the client still has to say.
pub const FAREWELL: Duration = Duration::from_secs(5);
/// Passwords of one address that are checked at a time; its others wait, and those of other addresses do not.
pub const PASSWORDS_AT_ONCE: usize = 2;
/// Passwords that wait to be checked; past this, a login is refused for now.
pub const PASSWORDS_WAITING: usize = 1_000;
/// Bad LMTP commands after which a connection is closed.
pub const LMTP_ERRORS_MAX: u32 = 20;

/// Room for one receive.
pub const INPUT_BYTES: usize = 16 * 1024;
/// Room for one receive while message text comes in.
pub const INPUT_DATA_BYTES: usize = 64 * 1024;
/// Replies are gathered up to this and then sent.
pub const OUTPUT_BYTES: usize = 64 * 1024;
/// Receive buffers that waiting connections of one worker may hold on to; the others wait without one.
pub const INPUT_BUFFERS_HELD: usize = 256;
/// Users whose usage a worker knows. Of more it forgets those who have taken least.
pub const USERS_METERED: usize = 10_000;
/// A user who has had more than an equal share of a worker in such a period lets all others run before.
pub const FAIR_PERIOD: Duration = Duration::from_millis(10);
/// Messages asked of the engine at once.
pub const FETCH_CHUNK: u64 = 256;
/// Octets that a SEARCH decodes and compares before others have their turn: some 100 us.
pub const SEARCH_STEP_OCTETS: usize = 32 * 1024;
/// Tests of messages by what the index knows before others have their turn: as long.
pub const SEARCH_STEP_TESTS: usize = 16 * 1024;
/// Octets of names times octets of patterns that a LIST compares before others have their turn: some 200 us.
pub const LIST_STEP_COMPARISONS: usize = 512 * 1024;
/// Octets of headers that a FETCH looks through for fields before others have their turn: some 200 us.
pub const FIELDS_STEP_OCTETS: usize = 512 * 1024;
/// What reads more than this into memory, such as a SEARCH in a large message, takes room for it as a delivery does.
pub const READ_UNRESERVED_BYTES: u64 = 256 * 1024;
/// Messages that are remembered to be damaged, per worker, so that a client is told before it is promised octets of them.
pub const DAMAGED_REMEMBERED: usize = 10_000;
/// Larger messages are compressed off the worker.
pub const OFFLOAD_BYTES: usize = 256 * 1024;

/// Verified passwords remembered by the node.
pub const PASSWORDS_CACHED: usize = 65_536;
/// The longest password; hashing costs time in proportion.
pub const PASSWORD_BYTES: usize = 1_024;
/// The longest account name: an address of RFC 5321, 4.5.3.1.3.
pub const NAME_BYTES: usize = 256;

/// Pause after an accept that failed for want of descriptors or memory.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What is in hand when the server is told to stop may take so long.
pub const DRAIN: Duration = Duration::from_secs(10);
/// The longest request on the control socket: an import of a million users.
pub const CONTROL_REQUEST_BYTES: u64 = 256 << 20;
