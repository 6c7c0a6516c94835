//! Mail that comes in, by LMTP or SMTP: from the socket to the shards of the recipients.
//!
//! A session stays on the worker that accepted it. A message is compressed once, here, and each shard that has recipients
//! writes it once, whatever their number; the shards work at the same time, and a recipient is answered when its shard has
//! made the message durable (RFC 2033, 4.2). What has been handed to a shard is always awaited, never given up.
//!
//! SMTP has one answer for all recipients. If only some of them have the message, the client has to repeat it; the shards that
//! have it keep receipts, and swallow the repetition.

use std::collections::HashMap;
use std::fmt::Write;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use memchr::memmem;
use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, Refusal};
use posthaste_engine::format::frame::{FRAME_RAW_BYTES_MAX, Packer};
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{AccountId, ShardId};
use posthaste_engine::io::Runtime;
use posthaste_engine::join::join_all;
use posthaste_engine::receipts::ReceiptKey;
use posthaste_engine::shard::ExpectedDelivery;
use posthaste_mime::Digest;
use posthaste_smtp::{Event, Mailbox, Message, Received, Reply, Session, With, write_received, write_return_path};

use crate::config::FullMailbox;
use crate::connection::{Connection, End};
use crate::listen::Protocol;
use crate::node::{Context, Counters, Reservation, Shard, Storage};
use crate::usage::metered;
use crate::{accounts, limits};

/// Starts the session of a new connection.
pub fn start(context: &Rc<Context>, protocol: Protocol, connection: Rc<Connection>) {
    let of_task = Rc::clone(context);
    context.io.spawn(metered(context, async move {
        of_task.usages.enter_deliveries();
        Inbound::new(of_task, protocol, connection).run().await;
    }));
}

struct Inbound {
    context: Rc<Context>,
    connection: Rc<Connection>,
    protocol: Protocol,
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
    /// When that message began to come.
    data_begun: Duration,
}

impl Inbound {
    fn new(context: Rc<Context>, protocol: Protocol, connection: Rc<Connection>) -> Self {
        let mut output = Vec::with_capacity(128);
        let mut session = Session::new(Arc::clone(context.node.inbound(protocol)), &mut output);
        if connection.is_tls() {
            session.tls_begun();
        }
        Self {
            context,
            connection,
            protocol,
            session,
            input: Vec::new(),
            taken: 0,
            output,
            shards: Vec::new(),
            expected: Vec::new(),
            reservation: None,
            data_begun: Duration::ZERO,
        }
    }

    async fn run(mut self) {
        let end = loop {
            let (taken, event) = self.session.step(&self.input[self.taken..], &mut self.output);
            self.taken += taken;
            let result = match event {
                Event::NeedInput => self.receive().await,
                Event::Recipient(mailbox) => {
                    // Large futures only while they are needed.
                    if self.protocol == Protocol::Smtp && self.is_full(&mailbox).await {
                        let reply = full_mailbox(self.context.node.config.delivery.full_mailbox);
                        self.session.refuse(&reply, &mut self.output);
                    } else {
                        self.take_recipient(&mailbox);
                    }
                    Ok(())
                }
                Event::Data { declared_bytes } => {
                    self.begin_data(declared_bytes.unwrap_or(limits::INPUT_BYTES as u64));
                    Ok(())
                }
                Event::Message(message) => {
                    Box::pin(self.take_message(*message)).await;
                    self.reservation = None;
                    Ok(())
                }
                Event::StartTls => Box::pin(self.start_tls()).await,
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
        let config = &self.context.node.config;
        let timeout = Duration::from_secs(match self.protocol {
            Protocol::Smtp => config.smtp.idle_timeout_s,
            _ => config.lmtp.idle_timeout_s,
        });
        self.input.clear();
        self.taken = 0;
        if let Some(reservation) = &mut self.reservation
            && !reservation.grow_to(self.session.held_bytes() as u64)
        {
            self.session.abandon_data();
            self.reservation = None;
            self.expected.clear();
        }
        if self.reservation.is_some() && self.context.io.now().saturating_sub(self.data_begun) > limits::TRANSFER {
            return Err(End::TimedOut);
        }
        self.connection.send(&mut self.output).await?;
        let at_rest = self.session.is_idle();
        if at_rest {
            self.output.shrink_to(512);
            // Of a message that was refused or given up: its room is free, and no commit gathers for it.
            self.reservation = None;
            self.expected.clear();
        }
        self.connection.input(&mut self.input, timeout, at_rest).await
    }

    /// TLS begins, and nothing that was said before counts (RFC 3207, 4.2).
    async fn start_tls(&mut self) -> Result<(), End> {
        self.connection.send(&mut self.output).await?;
        self.input.clear();
        self.taken = 0;
        self.shards.clear();
        self.connection.start_tls(self.protocol).await?;
        self.session.tls_begun();
        Ok(())
    }

    fn find_account(&self, mailbox: &Mailbox) -> Option<Arc<AccountRecord>> {
        let node = &self.context.node;
        let directory = node.cluster.directory();
        accounts::find_recipient(mailbox, |name| directory.find(name)).or_else(|| {
            let postmaster = node.config.delivery.postmaster.as_deref()?;
            let ours = accounts::is_postmaster(mailbox, &node.config.server.host_name, postmaster);
            if ours { directory.find(postmaster) } else { None }
        })
    }

    fn take_recipient(&mut self, mailbox: &Mailbox) {
        match self.find_account(mailbox) {
            Some(account) => {
                if !self.shards.contains(&account.shard) {
                    self.shards.push(account.shard);
                }
                self.session.accept_recipient(account, &mut self.output);
            }
            None => self.session.refuse(&Reply::no_such_user(), &mut self.output),
        }
    }

    /// Whether a recipient's mailbox takes nothing more. SMTP asks before the message comes: afterwards one full mailbox would
    /// have all recipients' client try again.
    async fn is_full(&self, mailbox: &Mailbox) -> bool {
        let Some(account) = self.find_account(mailbox) else { return false };
        let worker = &self.context.worker;
        let id = account.account;
        match worker.local(account.shard) {
            Some(shard) => shard.is_inbox_full(id),
            None => Box::pin(worker.call(account.shard, move |shard| async move { shard.is_inbox_full(id) }))
                .await
                .unwrap_or(false),
        }
    }

    /// The answer to DATA: takes the message if there is room for it.
    fn begin_data(&mut self, bytes: u64) {
        // Nobody takes room by announcing: it is taken as the message comes.
        let node = &self.context.node;
        self.reservation = node.reserve(0).filter(|_| node.has_room(bytes));
        if self.reservation.is_none() {
            return self.session.refuse(&Reply::busy(), &mut self.output);
        }
        self.data_begun = self.context.io.now();
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

    /// Stores a message for its recipients, and answers.
    async fn take_message(&mut self, message: Message<Arc<AccountRecord>>) {
        let recipients = message.recipients.len();
        let replies = if hops(&message.body) > limits::HOPS_MAX {
            // RFC 5321, 6.3.
            vec![Reply::new(554, 4, 6, "Too many Received fields: the message goes in circles"); recipients]
        } else {
            self.deliver(message).await
        };
        if self.protocol == Protocol::Smtp {
            return self.session.answer(&one_for_all(&replies), &mut self.output);
        }
        for reply in replies {
            self.session.answer_recipient(&reply, &mut self.output);
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
            with: With {
                spoken: self.session.spoken(),
                smtputf8: params.smtputf8,
                tls: self.connection.is_tls(),
                authenticated: false,
            },
            id: &id,
            recipient: None,
            unix_seconds: (received_ms / 1000) as i64,
            offset_minutes: 0,
        };
        let content = self.wants_receipts(recipients.len()).then(|| content_hash(sender.as_ref(), &body));
        // By shard: the targets, and of each recipient which of them it is. Someone named twice gets one copy.
        let mut groups: Vec<Group> = Vec::new();
        let mut places = Vec::with_capacity(recipients.len());
        let mut known_targets: HashMap<AccountId, usize> = HashMap::new();
        for recipient in &recipients {
            let account = &recipient.account;
            let known = groups.iter().position(|group| group.shard == account.shard);
            let group = known.unwrap_or_else(|| {
                groups.push(Group { shard: account.shard, targets: Vec::new(), receipts: Vec::new() });
                groups.len() - 1
            });
            let Group { targets, receipts, .. } = &mut groups[group];
            let known = if recipients.len() == 1 { None } else { known_targets.get(&account.account).copied() };
            let target = known.unwrap_or_else(|| {
                if recipients.len() > 1 {
                    known_targets.insert(account.account, targets.len());
                }
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
                if let Some(content) = content {
                    receipts.push(ReceiptKey { content, recipient: account.account.0.into() });
                }
                targets.len() - 1
            });
            places.push((group, target));
        }

        // The trace headers of one recipient alone go with the header.
        let prefix = match &mut groups[..] {
            [Group { targets, .. }] if targets.len() == 1 => std::mem::take(&mut targets[0].prefix),
            _ => Vec::new(),
        };
        let prepared = prepare(&context, prefix, body.len(), move || body, received_ms).await;
        self.expected.clear();
        let receipts: Vec<(ShardId, Vec<ReceiptKey>)> = match content {
            Some(_) => groups.iter().map(|group| (group.shard, group.receipts.clone())).collect(),
            None => Vec::new(),
        };
        let worker = &context.worker;
        let deliveries = groups.into_iter().map(|group| {
            let prepared = Arc::clone(&prepared);
            async move {
                let Group { shard, targets, receipts } = group;
                let count = targets.len();
                let delivered = match worker.local(shard) {
                    Some(shard) => Ok(deliver_to(shard, prepared, targets, receipts).await),
                    None => worker.call(shard, move |shard| deliver_to(shard, prepared, targets, receipts)).await,
                };
                delivered.unwrap_or_else(|error| vec![Err(error); count])
            }
        });
        let results: Vec<Vec<Result<(), EngineError>>> = join_all(deliveries).await;
        if content.is_some() {
            let all_have_it = results.iter().flatten().all(Result::is_ok);
            settle_receipts(&context, receipts, &results, all_have_it).await;
        }
        let answers = places.into_iter().map(|(group, target)| match &results[group][target] {
            Ok(()) => {
                Counters::add(&counters.deliveries, 1);
                Reply::stored()
            }
            Err(error) => {
                tracing::warn!(session = self.connection.id(), id, %error, "a delivery failed");
                reply_to(error, context.node.config.delivery.full_mailbox)
            }
        });
        answers.collect()
    }

    /// Whether a message may have receipts, or come to need them.
    fn wants_receipts(&self, recipients: usize) -> bool {
        self.protocol == Protocol::Smtp && (recipients > 1 || self.context.node.has_receipts.load(Ordering::Relaxed))
    }
}

/// What one shard gets of a message.
struct Group {
    shard: ShardId,
    targets: Vec<Target>,
    /// One for each target, or none at all.
    receipts: Vec<ReceiptKey>,
}

/// Delivers to those of the targets that do not have the message already.
async fn deliver_to(
    shard: Shard,
    prepared: Arc<Prepared>,
    mut targets: Vec<Target>,
    receipts: Vec<ReceiptKey>,
) -> Vec<Result<(), EngineError>> {
    let known: Vec<bool> = if receipts.is_empty() || !shard.has_receipts() {
        Vec::new()
    } else {
        receipts.iter().map(|&key| shard.is_received(key)).collect()
    };
    if !known.contains(&true) {
        return shard.deliver(prepared, targets).await.into_iter().map(|result| result.map(drop)).collect();
    }
    let mut each = known.iter();
    targets.retain(|_| !each.next().copied().unwrap_or(false));
    if targets.is_empty() {
        return known.into_iter().map(|_| Ok(())).collect();
    }
    let mut delivered = shard.deliver(prepared, targets).await.into_iter();
    let result = |known| if known { Ok(()) } else { delivered.next().map_or(Ok(()), |result| result.map(drop)) };
    known.into_iter().map(result).collect()
}

/// If not everybody could be served, those who were must not get the message again when its client repeats it. Once all have it, the
/// next of the same content is another message.
async fn settle_receipts(
    context: &Context,
    receipts: Vec<(ShardId, Vec<ReceiptKey>)>,
    results: &[Vec<Result<(), EngineError>>],
    all_have_it: bool,
) {
    let worker = &context.worker;
    if all_have_it {
        if context.node.has_receipts.load(Ordering::Relaxed) {
            let settled = receipts
                .into_iter()
                .map(|(shard, keys)| worker.call(shard, move |shard| async move { shard.forget_received(&keys) }));
            // A shard that stops forgets nothing, which costs nothing but a receipt.
            join_all(settled).await;
        }
        return;
    }
    let remembering = receipts.into_iter().zip(results).map(|((shard, keys), results)| async move {
        let done = keys.into_iter().zip(results).filter_map(|(key, result)| result.is_ok().then_some(key));
        let done: Vec<ReceiptKey> = done.collect();
        if done.is_empty() {
            return;
        }
        context.node.has_receipts.store(true, Ordering::Relaxed);
        let remembered =
            worker.call(shard, |shard| async move { shard.remember_received(&done, limits::RECEIPT).await });
        if let Err(error) = remembered.await.and_then(|result| result) {
            tracing::warn!(%shard, %error, "a message that is tried again will come twice to some recipients");
        }
    });
    join_all(remembering).await;
}

/// What tells a repetition of a message from another message.
fn content_hash(sender: Option<&Mailbox>, body: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(sender.map(Mailbox::to_string).unwrap_or_default().as_bytes());
    hasher.update(&[0]);
    hasher.update(body);
    let mut hash = [0; 16];
    hasher.finalize_xof().fill(&mut hash);
    u128::from_le_bytes(hash)
}

/// The answer of SMTP: final only if it holds for all recipients. Whoever cannot be served for good is refused at RCPT when the message
/// comes again, and the client knows whom it concerns.
fn one_for_all(replies: &[Reply]) -> Reply {
    let mut failed = replies.iter().filter(|reply| !reply.is_positive());
    match failed.next() {
        None => Reply::stored(),
        Some(reply)
            if replies.iter().all(|other| other.code() == reply.code() || other.code().min(reply.code()) >= 500) =>
        {
            reply.clone()
        }
        Some(_) => Reply::new(451, 3, 0, "Not all recipients could be served, try again later"),
    }
}

/// The Received fields of a message: how many servers it has passed.
fn hops(message: &[u8]) -> usize {
    const NAME: &[u8] = b"Received:";
    let mut hops = 0;
    let mut at = 0;
    loop {
        let line = &message[at..];
        if line.starts_with(b"\r\n") || line.is_empty() {
            return hops;
        }
        hops += usize::from(line.get(..NAME.len()).is_some_and(|start| start.eq_ignore_ascii_case(NAME)));
        match memchr::memchr(b'\n', line) {
            Some(end) => at += end + 1,
            None => return hops,
        }
    }
}

/// Parses and compresses a message, with the prefix of all that it is for: here, or elsewhere if it is large.
pub async fn prepare(
    context: &Context,
    prefix: Vec<u8>,
    octets: usize,
    message: impl FnOnce() -> Vec<u8> + Send + 'static,
    received_ms: u64,
) -> Arc<Prepared> {
    let dictionaries = context.worker.cluster().dictionaries().current();
    if octets > limits::OFFLOAD_BYTES {
        let prepare = move || {
            let mut packer = Context::packer();
            packer.use_dictionaries(dictionaries);
            prepare_here(&mut packer, &prefix, &message(), received_ms)
        };
        return Arc::new(context.io.offload(prepare).await);
    }
    // What follows takes some 3 us per KB: others' replies do not wait for it.
    context.io.submit_sends();
    let mut packer = context.packer.borrow_mut();
    packer.use_dictionaries(dictionaries);
    Arc::new(prepare_here(&mut packer, &prefix, &message(), received_ms))
}

fn prepare_here(packer: &mut Packer, prefix: &[u8], message: &[u8], received_ms: u64) -> Prepared {
    let (small, whole) = Digest::of(message).archives();
    // The store keeps what does not fit beside the header in a frame of its own, up to the size of a frame.
    let digest = whole.filter(|whole| whole.len() <= FRAME_RAW_BYTES_MAX).unwrap_or(small);
    Prepared::with_prefix(packer, prefix, message, header_octets(message), &digest, received_ms)
}

/// The length of a message's header, with the empty line that ends it. A message without one is all header.
pub fn header_octets(message: &[u8]) -> usize {
    if message.starts_with(b"\r\n") {
        return 2;
    }
    memmem::find(message, b"\r\n\r\n").map_or(message.len(), |at| at + 4)
}

fn full_mailbox(policy: FullMailbox) -> Reply {
    match policy {
        FullMailbox::Defer => Reply::over_quota_for_now(),
        FullMailbox::Reject => Reply::over_quota(),
    }
}

fn reply_to(error: &EngineError, policy: FullMailbox) -> Reply {
    match error {
        EngineError::Full => Reply::new(452, 3, 1, "No room in the store, try again later"),
        EngineError::Refused(Refusal::TooLarge { .. }) => Reply::new(552, 3, 4, "Message exceeds the maximum size"),
        // The account went away after RCPT.
        EngineError::Refused(Refusal::NoSuchAccount | Refusal::NoSuchMailbox) => Reply::no_such_user(),
        EngineError::Refused(Refusal::UidsExhausted) => Reply::over_quota(),
        EngineError::Refused(Refusal::MailboxFull(_)) => full_mailbox(policy),
        EngineError::Stopping(_) => Reply::new(451, 3, 2, "Server is stopping, try again later"),
        _ => Reply::local_error(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_are_counted_in_the_header_only() {
        assert_eq!(hops(b"Received: a\r\n by b\r\nRECEIVED: c\r\nX-Received: d\r\n\r\nReceived: e\r\n"), 2);
        assert_eq!(hops(b"received:"), 1);
        assert_eq!(hops(b""), 0);
        assert_eq!(hops(b"\r\nReceived: e\r\n"), 0);
    }

    #[test]
    fn one_answer_for_all() {
        let code = |replies: &[Reply]| one_for_all(replies).code();
        assert_eq!(code(&[Reply::stored(), Reply::stored()]), 250);
        assert_eq!(code(&[Reply::stored(), Reply::busy()]), 451);
        assert_eq!(code(&[Reply::over_quota(), Reply::busy()]), 451);
        assert_eq!(code(&[Reply::stored(), Reply::over_quota()]), 451, "at RCPT it will be known whom it concerns");
        assert_eq!(code(&[Reply::over_quota(), Reply::no_such_user()]), 552);
        assert_eq!(code(&[Reply::busy()]), 452);
    }

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
        let code = |error: EngineError| reply_to(&error, FullMailbox::Defer).code();
        assert_eq!(code(Refusal::MailboxFull(1).into()), 452);
        assert_eq!(reply_to(&Refusal::MailboxFull(1).into(), FullMailbox::Reject).code(), 552);
        assert_eq!(code(EngineError::Full), 452);
        let reason = "a failed sync".into();
        assert_eq!(code(EngineError::Poisoned { shard: ShardId(0), reason }), 451);
        assert_eq!(code(EngineError::Stopping(ShardId(0))), 451);
        assert_eq!(code(Refusal::TooLarge { octets: 2, limit: 1 }.into()), 552);
        assert_eq!(code(Refusal::NoSuchAccount.into()), 550);
    }
}
