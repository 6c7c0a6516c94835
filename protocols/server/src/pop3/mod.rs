//! POP3 sessions.
//!
//! A session runs on the worker that owns the account's shard; at login it moves there, and only there its maildrop is
//! locked, so that one lock table serves all sessions of an account. What the maildrop holds is fixed at login: messages
//! that others expunge keep their numbers and sizes, and cannot be had any more. Nothing of the store is changed but at
//! QUIT.
//!
//! **The lock is released before the last reply goes out**, and whenever the session ends in another way: a client that has
//! read the reply may log in again at once.

mod retrieve;

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use posthaste_engine::changes::FlagOp;
use posthaste_engine::deliver::FlagName;
use posthaste_engine::error::{EngineError, Refusal as EngineRefusal};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{AccountId, MailboxId};
use posthaste_engine::io::Runtime;
use posthaste_engine::join::join_all;
use posthaste_imap::{decode_base64, decode_sasl_plain};
use posthaste_pop3::{Code, Credentials, Event, Maildrop, Message, Refusal, Security, Session, Update};

use crate::connection::{Connection, End, Moving};
use crate::limits;
use crate::listen::Protocol;
use crate::login::{LogIn, log_in};
use crate::node::{Context, Shard};
use crate::usage::metered;

/// Starts the session of a new connection.
pub fn start(context: &Rc<Context>, connection: Rc<Connection>) {
    let mut output = Vec::with_capacity(128);
    // RFC 5034, 4: no passwords in the clear unless the operator wants them.
    let security = Security { passwords: connection.allows_passwords(), starttls: !connection.is_tls() };
    let session = Session::new(Arc::clone(&context.node.pop3), security, &mut output);
    let parked = Parked { session, login_failures: 0, input: Vec::new() };
    context.io.spawn(metered(context, Pop3::new(Rc::clone(context), connection, parked, output).run(None)));
}

/// A session on its way to another worker.
struct Parked {
    session: Session,
    login_failures: u8,
    /// What the client has sent ahead.
    input: Vec<u8>,
}

/// Who has logged in.
struct User {
    shard: Shard,
    inbox: MailboxId,
    _lock: MaildropLock,
}

/// The right to be the only POP3 session of an account (RFC 1939, 4), until dropped.
struct MaildropLock {
    context: Rc<Context>,
    account: AccountId,
}

impl MaildropLock {
    /// `None` if another session has it.
    fn take(context: &Rc<Context>, account: AccountId) -> Option<Self> {
        let free = context.maildrops_locked.borrow_mut().insert(account);
        free.then(|| Self { context: Rc::clone(context), account })
    }
}

impl Drop for MaildropLock {
    fn drop(&mut self) {
        self.context.maildrops_locked.borrow_mut().remove(&self.account);
    }
}

struct Pop3 {
    context: Rc<Context>,
    connection: Rc<Connection>,
    session: Session,
    input: Vec<u8>,
    /// How much of the input has been taken.
    taken: usize,
    output: Vec<u8>,
    user: Option<Box<User>>,
    login_failures: u8,
}

/// Why a session ends here.
enum Stop {
    End(End),
    /// All has been said.
    Over,
    /// What has been said must not be ended properly.
    Broken,
    /// The account's shard belongs to another worker.
    Move(Arc<AccountRecord>),
}

impl From<End> for Stop {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

impl Pop3 {
    fn new(context: Rc<Context>, connection: Rc<Connection>, parked: Parked, output: Vec<u8>) -> Self {
        let Parked { session, login_failures, input } = parked;
        Self { context, connection, session, input, taken: 0, output, user: None, login_failures }
    }

    /// Goes on with a session whose login was right on another worker.
    fn resume(context: Rc<Context>, moving: Moving, account: Arc<AccountRecord>, parked: Parked) {
        let Ok(connection) = Connection::arrive(&context, moving) else { return };
        let (of_task, io) = (Rc::clone(&context), context.io.clone());
        io.spawn(metered(&of_task, Self::new(context, connection, parked, Vec::new()).run(Some(account))));
    }

    /// The session to its end, or to another worker. `account` has logged in already.
    async fn run(mut self, account: Option<Arc<AccountRecord>>) {
        let mut result = Ok(());
        if let Some(account) = account {
            result = Box::pin(self.enter(account)).await;
        }
        let stop = loop {
            match result {
                Ok(()) => result = self.step().await,
                Err(stop) => break stop,
            }
        };
        match stop {
            // RFC 1939, 3: at an autologout nothing is said, and nothing removed.
            Stop::End(End::Closed | End::TimedOut) | Stop::Broken => return,
            Stop::End(End::Stopping) => {
                self.session.close(&Refusal::coded(Code::SysTemp, "Server is stopping"), &mut self.output);
            }
            Stop::Over => {}
            Stop::Move(account) => return Box::pin(self.depart(account)).await,
        }
        // What the session held is not needed for the goodbye, above all not the lock.
        let Self { connection, output, .. } = self;
        Box::pin(connection.finish(output)).await;
    }

    /// Takes the next thing out of the input, or waits for more.
    async fn step(&mut self) -> Result<(), Stop> {
        let (taken, event) = self.session.step(&self.input[self.taken..], &mut self.output);
        self.taken += taken;
        // What is rare or large has a future of its own, so that waiting sessions do not have room for it.
        match event {
            Event::NeedInput => self.receive().await,
            Event::Flush => self.flush().await,
            Event::LogIn(credentials) => Box::pin(self.log_in(credentials)).await,
            Event::StartTls => Box::pin(self.start_tls()).await,
            Event::Retrieve(wanted) => {
                self.context.usages.turn_of_command(&self.context.io).await;
                Box::pin(self.retrieve(wanted)).await
            }
            Event::Update(update) => {
                Box::pin(self.update(update)).await;
                Ok(())
            }
            Event::AnswerOwed => unreachable!("every event is answered above"),
            Event::Close => Err(Stop::Over),
        }
    }

    /// Sends what there is to say, and receives more.
    async fn receive(&mut self) -> Result<(), Stop> {
        self.input.clear();
        self.taken = 0;
        self.flush().await?;
        let at_rest = self.session.is_idle();
        if at_rest {
            self.output.shrink_to(0);
        }
        let timeout = self.timeout()?;
        Ok(self.connection.input(&mut self.input, timeout, at_rest).await?)
    }

    async fn flush(&mut self) -> Result<(), Stop> {
        if self.user.is_some() {
            return Ok(self.connection.send(&mut self.output).await?);
        }
        let timeout = self.timeout()?;
        Ok(self.connection.send_by(&mut self.output, timeout).await?)
    }

    fn timeout(&self) -> Result<Duration, End> {
        let config = &self.context.node.config.pop3;
        if self.user.is_some() {
            return Ok(Duration::from_secs(config.idle_timeout_s));
        }
        self.connection.time_left(Duration::from_secs(config.login_timeout_s))
    }

    /// STLS (RFC 2595, 4). Trap 1: what came in the clear after it is forgotten.
    async fn start_tls(&mut self) -> Result<(), Stop> {
        self.session.start_tls(&mut self.output);
        self.flush().await?;
        self.input.clear();
        self.taken = 0;
        self.connection.start_tls(Protocol::Pop3).await?;
        self.session.tls_started();
        Ok(())
    }

    async fn log_in(&mut self, credentials: Credentials) -> Result<(), Stop> {
        let result = match credentials {
            Credentials::Password { user, password } => {
                log_in(&self.context, &self.connection, &user, &user, password.0).await
            }
            Credentials::SaslPlain(response) => {
                let Some(message) = decode_base64(&response) else {
                    return self.log_in_failed(Refusal::new("The response is not base64"));
                };
                let Some((authorize, user, password)) = decode_sasl_plain(&message) else {
                    return self.log_in_failed(Refusal::new("The response is not one of PLAIN"));
                };
                let authorize = if authorize.is_empty() { user } else { authorize };
                log_in(&self.context, &self.connection, authorize, user, password.to_owned()).await
            }
        };
        match result {
            LogIn::Yes(account) => self.enter(account).await,
            LogIn::Refused(why) => {
                self.session.refuse(&Refusal::coded(Code::SysTemp, why), &mut self.output);
                Ok(())
            }
            LogIn::Wrong => self.log_in_failed(Refusal::coded(Code::Auth, "Wrong user name or password")),
            LogIn::NotAs => self.log_in_failed(Refusal::coded(Code::Auth, "You cannot act as that user")),
        }
    }

    fn log_in_failed(&mut self, refusal: Refusal) -> Result<(), Stop> {
        self.session.refuse(&refusal, &mut self.output);
        self.login_failures += 1;
        if self.login_failures >= limits::LOGIN_FAILURES_MAX { Err(Stop::Over) } else { Ok(()) }
    }

    /// Locks and opens the maildrop of an account, on the worker that has it.
    async fn enter(&mut self, account: Arc<AccountRecord>) -> Result<(), Stop> {
        let Some(shard) = self.context.worker.local(account.shard) else { return Err(Stop::Move(account)) };
        let Some(lock) = MaildropLock::take(&self.context, account.account) else {
            self.connection.dismiss_user();
            let text = "The maildrop is in use by another session, try again later";
            self.session.refuse(&Refusal::coded(Code::InUse, text), &mut self.output);
            return Ok(());
        };
        self.context.usages.enter(&account);
        match open(&shard, account.account).await {
            Ok((inbox, maildrop)) => {
                self.user = Some(Box::new(User { shard, inbox, _lock: lock }));
                self.session.open(maildrop, &mut self.output);
            }
            Err(error) => self.session.refuse(&refusal_for(&error), &mut self.output),
        }
        Ok(())
    }

    /// The UPDATE state (RFC 1939, 6): what is deleted goes in one step, durable before the reply.
    async fn update(&mut self, update: Update) {
        let Some(user) = self.user.take() else { return };
        let User { shard, inbox, .. } = &*user;
        let Update { deleted, retrieved } = update;
        let marks_seen = self.context.node.config.pop3.marks_seen;
        let expunge = async {
            if !deleted.is_empty() {
                shard.expunge_messages(*inbox, UidSet(deleted)).await?;
            }
            Ok(())
        };
        let mark = async {
            if marks_seen && !retrieved.is_empty() {
                shard.store_flags(*inbox, UidSet(retrieved), FlagOp::Add, vec![FlagName::Seen], None).await?;
            }
            Ok(())
        };
        // At the same time, so that they share a sync.
        let changes: [Pin<Box<dyn Future<Output = Result<(), EngineError>> + '_>>; 2] =
            [Box::pin(expunge), Box::pin(mark)];
        let mut results = join_all(changes.into_iter()).await.into_iter();
        let expunged = results.next().unwrap_or(Ok(()));
        if let Some(Err(error)) = results.next() {
            // The client has not asked for it.
            tracing::warn!(%error, "messages retrieved by POP3 could not be marked as seen");
        }
        drop(user);
        let result = expunged.map_err(|error| match refusal_for(&error) {
            // It may be done all the same if the device failed half-way.
            refusal @ Refusal { code: Some(Code::SysTemp), .. } => {
                Refusal { text: "Deleting failed and may not have happened: log in again and see", ..refusal }
            }
            refusal => refusal,
        });
        self.session.updated(result, &mut self.output);
    }

    /// Moves to the worker that owns the account's shard, with the bytes that the client has sent ahead.
    async fn depart(mut self, account: Arc<AccountRecord>) {
        if self.flush().await.is_err() {
            return;
        }
        let input = self.input.split_off(self.taken);
        let Self { context, connection, session, login_failures, .. } = self;
        let Some(moving) = connection.depart().await else { return };
        let parked = Parked { session, login_failures, input };
        let cluster = Arc::clone(&context.node.cluster);
        let owner = cluster.owner(account.shard);
        let job = move |_: &crate::node::Worker| {
            if let Some(context) = Context::current() {
                Pop3::resume(context, moving, account, parked);
            }
        };
        cluster.send(owner, Box::new(job));
    }
}

/// The INBOX of an account as it is now. Sizes come from the index; no message is read.
async fn open(shard: &Shard, account: AccountId) -> Result<(MailboxId, Maildrop), EngineError> {
    let inbox = shard.inbox(account).await?;
    let mut maildrop = Maildrop::default();
    let uid_validity = shard.visit_sizes(inbox, |uid, octets| maildrop.push(Message { uid: uid.0, octets })).await?;
    Ok((inbox, maildrop.complete(uid_validity)))
}

/// The answer to what the store did not do. What is damaged or broken is in the log, and named there. Never [AUTH], and
/// temporary where it may pass: clients drop credentials for less.
fn refusal_for(error: &EngineError) -> Refusal {
    match error {
        EngineError::Refused(EngineRefusal::NoSuchMailbox | EngineRefusal::NoSuchAccount) => {
            Refusal::coded(Code::SysPerm, "The maildrop has been deleted")
        }
        EngineError::Full => Refusal::coded(Code::SysTemp, "The store is full, try again later"),
        EngineError::Damaged(damage) => {
            tracing::error!(%damage, "a session met damage");
            damaged()
        }
        error => {
            tracing::error!(%error, "a session met an error of the store");
            Refusal::coded(Code::SysTemp, "The store cannot do this now, try again later")
        }
    }
}

fn damaged() -> Refusal {
    Refusal::coded(Code::SysPerm, "This is damaged in the store: tell the operator, whose log names it")
}

#[cfg(test)]
mod tests {
    use posthaste_engine::ids::ShardId;

    use super::*;

    fn size_of_future<F: Future>(_: impl Fn(Pop3, Option<Arc<AccountRecord>>) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_waiting_session_is_small() {
        let size = size_of_future(Pop3::run);
        println!("the future of a session has {size} bytes, of which the session {}", size_of::<Pop3>());
        assert!(size <= 1536, "{size}");
    }

    /// Trap 47: what is not the credentials' fault is never answered as if it were.
    #[test]
    fn trap_47_failures_of_the_store_are_not_taken_for_wrong_passwords() {
        let code = |error: EngineError| refusal_for(&error).code;
        assert_eq!(code(EngineError::Full), Some(Code::SysTemp));
        assert_eq!(code(EngineError::Stopping(ShardId(0))), Some(Code::SysTemp));
        let reason = "a failed sync".into();
        assert_eq!(code(EngineError::Poisoned { shard: ShardId(0), reason }), Some(Code::SysTemp));
        assert_eq!(code(EngineRefusal::NoSuchAccount.into()), Some(Code::SysPerm));
    }
}
