//! LMTP sessions: from the socket to the shards of the recipients.
//!
//! A session stays on the worker that accepted it. A message is compressed once, here, and each shard that has recipients
//! writes it once, whatever their number; the shards work at the same time, and a recipient is answered when its shard has
//! made the message durable (RFC 2033, 4.2). What has been handed to a shard is always awaited, never given up.

use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use memchr::memmem;
use posthaste_engine::deliver::{Delivered, Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, Refusal};
use posthaste_engine::format::frame::{FRAME_RAW_BYTES_MAX, Packer};
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::ShardId;
use posthaste_engine::io::Runtime;
use posthaste_engine::shard::ExpectedDelivery;
use posthaste_mime::Digest;
use posthaste_smtp::{Event, Message, Received, Reply, Session, With, write_received, write_return_path};

use crate::connection::{Connection, End, join_all};
use crate::node::{Context, Counters, Reservation, Storage};
use crate::{accounts, limits};

/// Starts the session of a new connection.
pub fn start(context: &Rc<Context>, connection: Rc<Connection>) {
    let of_task = Rc::clone(context);
    context.io.spawn(async move { Lmtp::new(of_task, connection).run().await });
}

struct Lmtp {
    context: Rc<Context>,
    connection: Rc<Connection>,
    session: Session<Arc<AccountRecord>>,
    input: Vec<u8>,
    /// How much of the input has been taken.
    taken: usize,
    output: Vec<u8>,
    /// The shards of this worker that have accepted recipients since the last message. May have some too many after RSET.
    shards: Vec<ShardId>,
    /// The shards of this worker to which a message is on its way.
    expected: Vec<ExpectedDelivery<Storage>>,
    /// Room for the message that is coming in.
    reservation: Option<Reservation>,
}

impl Lmtp {
    fn new(context: Rc<Context>, connection: Rc<Connection>) -> Self {
        let mut output = Vec::with_capacity(128);
        let session = Session::new(Arc::clone(&context.node.lmtp), &mut output);
        Self {
            context,
            connection,
            session,
            input: Vec::new(),
            taken: 0,
            output,
            shards: Vec::new(),
            expected: Vec::new(),
            reservation: None,
        }
    }

    async fn run(mut self) {
        let end = loop {
            let (taken, event) = self.session.step(&self.input[self.taken..], &mut self.output);
            self.taken += taken;
            let result = match event {
                Event::NeedInput => self.receive().await,
                Event::Recipient(mailbox) => {
                    let directory = self.context.node.cluster.directory();
                    match accounts::find_recipient(&mailbox, |name| directory.find(name)) {
                        Some(account) => {
                            if !self.shards.contains(&account.shard) {
                                self.shards.push(account.shard);
                            }
                            self.session.accept_recipient(account, &mut self.output);
                        }
                        None => self.session.refuse(&Reply::no_such_user(), &mut self.output),
                    }
                    Ok(())
                }
                Event::Data { declared_bytes } => {
                    self.begin_data(declared_bytes.unwrap_or(limits::INPUT_BYTES as u64));
                    Ok(())
                }
                Event::Message(message) => {
                    // Large futures only while they are needed.
                    let answers = Box::pin(self.deliver(*message)).await;
                    for answer in answers {
                        self.session.answer_recipient(&answer, &mut self.output);
                    }
                    self.reservation = None;
                    Ok(())
                }
                Event::AnswerOwed => unreachable!("every event is answered above"),
                Event::Close => Err(End::Closed),
            };
            if let Err(end) = result {
                break end;
            }
        };
        match end {
            End::Closed if self.output.is_empty() => return,
            End::Closed => {}
            End::TimedOut => self.session.close(4, 2, "Timeout, closing connection", &mut self.output),
            End::Stopping => self.session.close(3, 2, "Server is stopping, try again later", &mut self.output),
        }
        self.connection.finish(self.output).await;
    }

    /// Sends what there is to say, and receives more.
    async fn receive(&mut self) -> Result<(), End> {
        let timeout = Duration::from_secs(self.context.node.config.lmtp.idle_timeout_s);
        self.input.clear();
        self.taken = 0;
        if let Some(reservation) = &mut self.reservation
            && !reservation.grow_to(self.session.held_bytes() as u64)
        {
            self.session.abandon_data();
            self.reservation = None;
            self.expected.clear();
        }
        self.connection.send(&mut self.output).await?;
        let at_rest = self.session.is_idle();
        if at_rest {
            self.output.shrink_to(512);
        }
        self.connection.input(&mut self.input, timeout, at_rest).await
    }

    /// The answer to DATA: takes the message if there is room for it.
    fn begin_data(&mut self, bytes: u64) {
        self.reservation = self.context.node.reserve(bytes);
        if self.reservation.is_none() {
            return self.session.refuse(&Reply::busy(), &mut self.output);
        }
        // Shards of other workers see their deliveries coming in batches anyway.
        let worker = &self.context.worker;
        self.expected =
            self.shards.drain(..).filter_map(|shard| Some(worker.local(shard)?.expect_delivery())).collect();
        self.session.accept_data(&mut self.output);
        if self.input.capacity() < limits::INPUT_DATA_BYTES && self.taken == self.input.len() {
            self.input.clear();
            self.taken = 0;
            self.input.reserve_exact(limits::INPUT_DATA_BYTES);
        }
    }

    /// Hands a message to the shards of its recipients. One answer per recipient, in their order, when all is durable.
    async fn deliver(&mut self, message: Message<Arc<AccountRecord>>) -> Vec<Reply> {
        let context = Rc::clone(&self.context);
        let counters = &context.node.counters;
        let Message { sender, params, recipients, body } = message;
        let received_ms = context.io.wall_clock_ms();
        let octets = body.len() as u64;
        Counters::add(&counters.messages_received, 1);
        Counters::add(&counters.octets_received, octets);

        let mut id = String::with_capacity(24);
        let _ = write!(id, "{received_ms:x}.{:x}", context.node.next_transaction());
        let trace = Received {
            from: self.session.hello_name().unwrap_or_default(),
            peer: self.connection.peer(),
            by: &context.node.config.server.host_name,
            with: With { lmtp: true, smtputf8: params.smtputf8, tls: false, authenticated: false },
            id: &id,
            recipient: None,
            unix_seconds: (received_ms / 1000) as i64,
            offset_minutes: 0,
        };
        // By shard: the targets, and of each recipient which of them it is. Someone named twice gets one copy.
        let mut groups: Vec<(ShardId, Vec<Target>)> = Vec::new();
        let mut places = Vec::with_capacity(recipients.len());
        for recipient in &recipients {
            let account = &recipient.account;
            let known = groups.iter().position(|(shard, _)| *shard == account.shard);
            let group = known.unwrap_or_else(|| {
                groups.push((account.shard, Vec::new()));
                groups.len() - 1
            });
            let targets = &mut groups[group].1;
            let known = if recipients.len() == 1 { None } else { position_of(targets, account) };
            let target = known.unwrap_or_else(|| {
                let mut prefix = Vec::with_capacity(320);
                write_return_path(&mut prefix, sender.as_ref());
                write_received(&mut prefix, &Received { recipient: Some(&recipient.mailbox), ..trace });
                targets.push(Target {
                    account: account.account,
                    mailbox: TargetMailbox::Inbox,
                    prefix,
                    flags: Vec::new(),
                    internal_date: None,
                });
                targets.len() - 1
            });
            places.push((group, target));
        }

        let prepared = prepare(&context, body, received_ms).await;
        self.expected.clear();
        let worker = &context.worker;
        let deliveries = groups.into_iter().map(|(shard, targets)| {
            let prepared = Arc::clone(&prepared);
            async move {
                let count = targets.len();
                let delivered = match worker.local(shard) {
                    Some(shard) => Ok(shard.deliver(prepared, targets).await),
                    None => {
                        worker.call(shard, move |shard| async move { shard.deliver(prepared, targets).await }).await
                    }
                };
                delivered.unwrap_or_else(|error| vec![Err(error); count])
            }
        });
        let results: Vec<Vec<Result<Delivered, EngineError>>> = join_all(deliveries).await;
        let answers = places.into_iter().map(|(group, target)| match &results[group][target] {
            Ok(_) => {
                Counters::add(&counters.deliveries, 1);
                Reply::stored()
            }
            Err(error) => {
                tracing::warn!(id, %error, "a delivery failed");
                reply_to(error)
            }
        });
        answers.collect()
    }
}

fn position_of(targets: &[Target], account: &AccountRecord) -> Option<usize> {
    targets.iter().position(|target| target.account == account.account)
}

/// Parses and compresses a message: here, or elsewhere if it is large.
pub async fn prepare(context: &Context, message: Vec<u8>, received_ms: u64) -> Arc<Prepared> {
    if message.len() > limits::OFFLOAD_BYTES {
        let prepare = move || prepare_here(&mut Context::packer(), &message, received_ms);
        return Arc::new(context.io.offload(prepare).await);
    }
    // What follows takes some 3 us per KB: others' replies do not wait for it.
    context.io.submit_sends();
    Arc::new(prepare_here(&mut context.packer.borrow_mut(), &message, received_ms))
}

fn prepare_here(packer: &mut Packer, message: &[u8], received_ms: u64) -> Prepared {
    let (small, whole) = Digest::of(message).archives();
    // The store keeps what does not fit beside the header in a frame of its own, up to the size of a frame.
    let digest = whole.filter(|whole| whole.len() <= FRAME_RAW_BYTES_MAX).unwrap_or(small);
    Prepared::new(packer, message, header_octets(message), &digest, received_ms)
}

/// The length of a message's header, with the empty line that ends it. A message without one is all header.
pub fn header_octets(message: &[u8]) -> usize {
    if message.starts_with(b"\r\n") {
        return 2;
    }
    memmem::find(message, b"\r\n\r\n").map_or(message.len(), |at| at + 4)
}

fn reply_to(error: &EngineError) -> Reply {
    match error {
        EngineError::Full => Reply::new(452, 3, 1, "No room in the store, try again later"),
        EngineError::Refused(Refusal::TooLarge { .. }) => Reply::new(552, 3, 4, "Message exceeds the maximum size"),
        // The account went away after RCPT.
        EngineError::Refused(Refusal::NoSuchAccount | Refusal::NoSuchMailbox) => Reply::no_such_user(),
        EngineError::Refused(Refusal::UidsExhausted) => Reply::over_quota(),
        EngineError::Refused(Refusal::MailboxFull(_)) => Reply::over_quota_for_now(),
        EngineError::Stopping(_) => Reply::new(451, 3, 2, "Server is stopping, try again later"),
        _ => Reply::local_error(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_ends_with_its_empty_line() {
        assert_eq!(header_octets(b"A: b\r\n\r\nbody\r\n\r\n"), 8);
        assert_eq!(header_octets(b"\r\nbody"), 2);
        assert_eq!(header_octets(b"A: b\r\n"), 6);
        assert_eq!(header_octets(b""), 0);
    }

    /// Trap 43: what may pass is answered for now, what cannot for good.
    #[test]
    fn trap_43_failures_are_temporary_unless_they_are_not() {
        let code = |error: EngineError| reply_to(&error).code();
        assert_eq!(code(EngineError::Full), 452);
        let reason = "a failed sync".into();
        assert_eq!(code(EngineError::Poisoned { shard: ShardId(0), reason }), 451);
        assert_eq!(code(EngineError::Stopping(ShardId(0))), 451);
        assert_eq!(code(Refusal::TooLarge { octets: 2, limit: 1 }.into()), 552);
        assert_eq!(code(Refusal::NoSuchAccount.into()), 550);
    }
}
