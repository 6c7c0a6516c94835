//! A node on which operations are played, each on the model, too.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use posthaste_engine::changes::Stored as FlagsStored;
use posthaste_engine::compaction::Choice;
use posthaste_engine::deliver::{Prepared, Target, TargetMailbox};
use posthaste_engine::error::{EngineError, RecoveryReport};
use posthaste_engine::flags::UidSet;
use posthaste_engine::format::frame::Packer;
use posthaste_engine::format::record::AccountRecord;
use posthaste_engine::ids::{MailboxId, MessageId, ModSeq, ShardId, Uid};
use posthaste_engine::io::Runtime;
use posthaste_engine::io::sim::SimIo;
use posthaste_engine::node::{Cluster, NewAccount, StoreConfig, Worker, open_superblock};
use posthaste_engine::read::{MessageInfo, Part};
use posthaste_engine::shard::{Shard, ShardStats};
use posthaste_tests::dictionaries::invented;
use posthaste_tests::far::storage;
use posthaste_tests::model::{DELETED, How, INBOX, Key, Model, Refused, Stored};

use crate::mirror::Mirror;
use crate::ops::{FAR, Op, Pick, Recipient, Uids, flag_names, name};
use crate::words::{HEADER, Outcome, agree, expect, flag_op, refusal, rest_of, said, to_engine, to_model, uid_set};
use crate::{ACCOUNTS, SESSIONS, SHARDS, Store};

const NO_MAILBOX: MailboxId = MailboxId(u64::MAX);

/// What does not end with a start of the node.
pub struct Run {
    pub model: Model,
    /// The engine's names of mailboxes: they stay when the names that people see change.
    pub ids: BTreeMap<Key, MailboxId>,
    pub deleted: Vec<(usize, MailboxId)>,
    /// A delivery is one message per shard.
    pub origins: BTreeMap<(ShardId, MessageId), u64>,
    pub next_op: usize,
    pub stats: ShardStats,
}

/// A started node.
pub struct Node {
    pub io: SimIo,
    pub workers: Vec<Worker<Store>>,
    pub accounts: Vec<Arc<AccountRecord>>,
    pub sessions: [Option<Mirror>; SESSIONS],
}

pub async fn open(
    io: &SimIo,
    config: &StoreConfig,
    workers: usize,
) -> Result<(Node, Vec<RecoveryReport>), EngineError> {
    let storage = storage(io);
    let superblock = open_superblock(&storage, SHARDS).await?;
    let (cluster, seats) = Cluster::new(superblock, workers);
    let mut opening = Vec::new();
    for seat in seats {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let opened = Worker::open(storage.clone(), Arc::clone(&cluster), seat, config.clone());
        io.spawn(async move {
            let _ = sender.send(opened.await);
        });
        opening.push(receiver);
    }
    let (mut workers, mut reports) = (Vec::new(), Vec::new());
    for receiver in opening {
        let (worker, found) = receiver.await.expect("workers open or fail")?;
        workers.push(worker);
        reports.extend(found);
    }
    // Each start goes on with what it finds, or with another generation.
    let dictionaries = cluster.dictionaries();
    let generation = dictionaries.current().map_or(0, |set| set.generation());
    if io.random().is_multiple_of(2) {
        dictionaries.offer(invented(generation + 1));
    }
    let node = Node { io: io.clone(), workers, accounts: Vec::new(), sessions: Default::default() };
    Ok((node, reports))
}

fn expect_stored(stored: Result<FlagsStored, EngineError>, expected: &Result<Stored, Refused>) -> Outcome<()> {
    let found = refusal(stored)?
        .map(|stored| (stored.modseq.map(|modseq| modseq.0), uid_set(&stored.changed), uid_set(&stored.refused)));
    let told = expected.clone().map(|stored| (stored.modseq, stored.changed, stored.refused));
    expect("STORE", found, told)
}

impl Node {
    /// Finds the accounts, which a crash while the first of all starts may have prevented.
    pub async fn find_accounts(&mut self) -> Result<(), EngineError> {
        let cluster = Arc::clone(self.workers[0].cluster());
        if cluster.directory().is_empty() {
            let new = ACCOUNTS.map(|name| NewAccount { name: name.to_owned(), password: String::new() });
            self.workers[0].add_accounts(new.to_vec()).await?;
        }
        let found = ACCOUNTS.map(|name| cluster.directory().find(name).expect("accounts stay"));
        assert_eq!(found[0].shard, found[1].shard, "messages are copied between accounts of one shard");
        self.accounts = found.to_vec();
        Ok(())
    }

    pub fn shard(&self, account: usize) -> Shard<Store> {
        let shard = self.accounts[account].shard;
        self.workers[shard.0 as usize % self.workers.len()].local(shard).expect("its owner has it")
    }

    /// Runs an operation from some worker.
    pub async fn call<T, F>(
        &self,
        run: &Run,
        account: usize,
        op: impl FnOnce(Shard<Store>) -> F + Send + 'static,
    ) -> Outcome<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let worker = &self.workers[run.next_op % self.workers.len()];
        worker.call(self.accounts[account].shard, op).await.map_err(said)
    }

    /// A mailbox that exists, or one that is gone.
    pub fn resolve(&self, run: &Run, pick: Pick) -> (usize, Option<Key>, MailboxId) {
        let account = usize::from(pick.account);
        if pick.is_gone {
            let gone: Vec<MailboxId> =
                run.deleted.iter().filter(|(of, _)| *of == account).map(|&(_, mailbox)| mailbox).collect();
            let mailbox = gone.get(usize::from(pick.mailbox) % gone.len().max(1)).copied();
            return (account, None, mailbox.unwrap_or(NO_MAILBOX));
        }
        let mailboxes: Vec<u32> =
            run.model.accounts[account].mailboxes.values().map(|mailbox| mailbox.uid_validity).collect();
        let key = (account, mailboxes[usize::from(pick.mailbox) % mailboxes.len()]);
        (account, Some(key), run.ids[&key])
    }

    pub async fn apply(&mut self, run: &mut Run, op: &Op) -> Outcome<()> {
        match op {
            Op::Deliver { recipients, twice, lines } => {
                let mut recipients = recipients.clone();
                if *twice {
                    recipients.push(recipients[0].clone());
                }
                self.deliver(run, recipients, *lines).await
            }
            Op::Store { mailbox, uids, how, flags, unchanged_since } => {
                let (_, key, id) = self.resolve(run, *mailbox);
                self.store(run, mailbox.account, key, id, *uids, *how, flag_names(flags), *unchanged_since).await?;
                Ok(())
            }
            Op::ManyKeywords { mailbox, uids, count } => {
                let (_, key, id) = self.resolve(run, *mailbox);
                let mut names: Vec<String> = (0..250).map(|number| format!("many{number}")).collect();
                if let Some(mailbox) = key.and_then(|key| run.model.mailbox(key)) {
                    names.retain(|name| mailbox.spelling(name).is_none());
                }
                names.truncate(usize::from(*count));
                self.store(run, mailbox.account, key, id, *uids, How::Add, names, None).await?;
                Ok(())
            }
            Op::Expunge { mailbox, mark, among } => self.expunge(run, *mailbox, *mark, *among).await,
            Op::Remove { mailbox, uids } => self.remove(run, *mailbox, *uids).await,
            Op::Transfer { from, uids, to, is_move } => self.transfer(run, *from, *uids, *to, *is_move).await,
            Op::Create { account, name: number } => {
                let (account, name) = (usize::from(*account), name(*number));
                let reasons = run.model.accounts[account].create(&name);
                let id = self.accounts[account].account;
                let made =
                    self.call(run, account, move |shard| async move { shard.create_mailbox(id, &name, 0).await });
                agree("CREATE", made.await?, &reasons)
            }
            Op::Rename { account, from, to } => {
                let (account, from, to) = (usize::from(*account), name(*from), name(*to));
                let reasons = run.model.accounts[account].rename(&from, &to);
                let id = self.accounts[account].account;
                let renamed =
                    self.call(run, account, move |shard| async move { shard.rename_mailbox(id, &from, &to).await });
                agree("RENAME", renamed.await?, &reasons)
            }
            Op::Delete { account, name: number } => {
                let (account, name) = (usize::from(*account), name(*number));
                let reasons = run.model.accounts[account].delete(&name);
                let id = self.accounts[account].account;
                let deleted =
                    self.call(run, account, move |shard| async move { shard.delete_mailbox(id, &name).await });
                agree("DELETE", deleted.await?, &reasons)
            }
            Op::Subscribe { account, name: number, subscribed } => {
                let (account, name, subscribed) = (usize::from(*account), name(*number), *subscribed);
                let reasons = run.model.accounts[account].subscribe(&name, subscribed);
                let id = self.accounts[account].account;
                let done =
                    self.call(run, account, move |shard| async move { shard.subscribe(id, &name, subscribed).await });
                agree("SUBSCRIBE", done.await?, &reasons)
            }
            Op::Select { session, mailbox, claim_recent } => {
                self.select(run, usize::from(*session), *mailbox, *claim_recent).await
            }
            Op::Sync { session, allow_expunge } => match &mut self.sessions[usize::from(*session)] {
                Some(mirror) => mirror.sync(&mut run.model, *allow_expunge).await,
                None => Ok(()),
            },
            Op::StoreSilently { session, uids, how, flags } => {
                let mut mirror = self.sessions[usize::from(*session)].take();
                if let Some(mirror) = &mut mirror {
                    self.store_silently(run, mirror, *uids, *how, flag_names(flags)).await?;
                }
                self.sessions[usize::from(*session)] = mirror;
                Ok(())
            }
            Op::Checkpoint { account } => {
                let number = usize::from(*account);
                let (account, subscriptions) = (&self.accounts[number], &run.model.accounts[number].subscriptions);
                let (id, subscribed) = (account.account, subscriptions.contains("Elsewhere"));
                // A checkpoint right after an idle mark, which is not synced, makes the check see damage if a crash takes
                // the mark: each is played after a commit, here of what is so already.
                self.call(run, number, move |shard| async move {
                    shard.subscribe(id, "Elsewhere", subscribed).await?;
                    shard.checkpoint().await
                })
                .await?
                .map_err(said)
            }
            Op::Compact { account, all } => {
                let number = usize::from(*account);
                let (account, subscriptions) = (&self.accounts[number], &run.model.accounts[number].subscriptions);
                let (id, subscribed) = (account.account, subscriptions.contains("Elsewhere"));
                let choice = if *all { Choice::All } else { Choice::WherePays };
                // It ends with a checkpoint.
                self.call(run, number, move |shard| async move {
                    shard.subscribe(id, "Elsewhere", subscribed).await?;
                    shard.compact(choice).await
                })
                .await?
                .map_err(said)?;
                Ok(())
            }
            Op::Reopen { .. } => Ok(()),
        }
    }

    pub async fn deliver(&self, run: &mut Run, recipients: Vec<Recipient>, lines: u16) -> Outcome<()> {
        // A delivery goes to each shard on its own, as in the protocols.
        let mut by_shard: BTreeMap<ShardId, Vec<Recipient>> = BTreeMap::new();
        for recipient in recipients {
            let shard = self.accounts[usize::from(recipient.mailbox.account)].shard;
            by_shard.entry(shard).or_default().push(recipient);
        }
        let token = run.model.origins;
        let rest = rest_of(token, lines);
        let digest = token.to_le_bytes();
        let received_ms = self.io.wall_clock_ms();
        let mut packer = Packer::default();
        packer.use_dictionaries(self.workers[0].cluster().dictionaries().current());
        let prepared = Arc::new(Prepared::new(&mut packer, &rest, HEADER.len(), &digest, received_ms));
        for (_, recipients) in by_shard {
            run.model.origins += 1;
            let origin = run.model.origins;
            let mut targets = Vec::new();
            let mut resolved = Vec::new();
            for (number, recipient) in recipients.iter().enumerate() {
                let (account, key, id) = self.resolve(run, recipient.mailbox);
                let is_inbox =
                    key.is_some_and(|key| key == (account, run.model.accounts[account].mailboxes[INBOX].uid_validity));
                let prefix = format!("Delivered-To: {origin}.{number}\r\n").into_bytes();
                targets.push(Target {
                    account: self.accounts[account].account,
                    mailbox: if is_inbox && number == 0 { TargetMailbox::Inbox } else { TargetMailbox::Id(id) },
                    prefix: prefix.clone(),
                    flags: to_engine(&flag_names(&recipient.flags)),
                    internal_date: recipient.date,
                });
                resolved.push((key, Rc::new([prefix, rest.clone()].concat())));
            }
            let account = usize::from(recipients[0].mailbox.account);
            let message = Arc::clone(&prepared);
            let before_s = (self.io.wall_clock_ms() / 1000) as i64;
            let results =
                self.call(run, account, move |shard| async move { shard.deliver(message, targets).await }).await?;
            let after_s = (self.io.wall_clock_ms() / 1000) as i64;
            expect("answers to a delivery", results.len(), recipients.len())?;
            for ((result, recipient), (key, content)) in results.into_iter().zip(recipients).zip(resolved) {
                let found = refusal(result)?;
                let mut date = recipient.date.unwrap_or((before_s, 0));
                if recipient.date.is_none()
                    && before_s != after_s
                    && let Ok(delivered) = &found
                {
                    // The second turned meanwhile: only the engine knows which of them it was.
                    let infos = self.shard(account).messages(delivered.mailbox, UidSet::one(delivered.uid)).await;
                    date.0 = infos.map_err(said)?[0].message.internal_date.clamp(before_s, after_s);
                }
                let expected = match key.and_then(|key| run.model.mailbox(key)) {
                    None => Err(Refused::NoSuchMailbox),
                    Some(mailbox) => mailbox
                        .place(origin, content, &flag_names(&recipient.flags), date)
                        .map(|uid| (mailbox.uid_validity, uid)),
                };
                expect("delivery", found.map(|delivered| (delivered.uid_validity, delivered.uid.0)), expected)?;
            }
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "STORE has that many")]
    pub async fn store(
        &self,
        run: &mut Run,
        account: u8,
        key: Option<Key>,
        id: MailboxId,
        uids: Uids,
        how: How,
        names: Vec<String>,
        unchanged_since: Option<u8>,
    ) -> Outcome<Stored> {
        let mailbox = key.and_then(|key| run.model.mailbox(key));
        let uid_next = mailbox.as_ref().map_or(9, |mailbox| mailbox.uid_next);
        let since = unchanged_since.map(u64::from);
        let expected = mailbox
            .map_or(Err(Refused::NoSuchMailbox), |mailbox| mailbox.store(&uids.set(uid_next), how, &names, since));
        let (set, flags, since) = (uids.uid_set(uid_next), to_engine(&names), since.map(ModSeq));
        let stored = self
            .call(run, usize::from(account), move |shard| async move {
                shard.store_flags(id, set, flag_op(how), flags, since).await
            })
            .await?;
        expect_stored(stored, &expected)?;
        Ok(expected.unwrap_or_default())
    }

    pub async fn expunge(&self, run: &mut Run, mailbox: Pick, mark: Option<Uids>, among: Option<Uids>) -> Outcome<()> {
        let (account, key, id) = self.resolve(run, mailbox);
        if let Some(mark) = mark {
            self.store(run, mailbox.account, key, id, mark, How::Add, vec![DELETED.to_owned()], None).await?;
        }
        let mailbox = key.and_then(|key| run.model.mailbox(key));
        let uid_next = mailbox.as_ref().map_or(9, |mailbox| mailbox.uid_next);
        let expected = mailbox.map_or(Err(Refused::NoSuchMailbox), |mailbox| {
            Ok(mailbox.expunge(among.map(|among| among.set(uid_next)).as_ref()))
        });
        let among = among.map(|among| among.uid_set(uid_next));
        let gone = self.call(run, account, move |shard| async move { shard.expunge(id, among).await }).await?;
        expect("EXPUNGE", refusal(gone)?.map(|gone| uid_set(&gone)), expected)
    }

    pub async fn remove(&self, run: &mut Run, mailbox: Pick, uids: Uids) -> Outcome<()> {
        let (account, key, id) = self.resolve(run, mailbox);
        let mailbox = key.and_then(|key| run.model.mailbox(key));
        let uid_next = mailbox.as_ref().map_or(9, |mailbox| mailbox.uid_next);
        let expected =
            mailbox.map_or(Err(Refused::NoSuchMailbox), |mailbox| Ok(mailbox.expunge_messages(&uids.set(uid_next))));
        let uids = uids.uid_set(uid_next);
        let gone = self.call(run, account, move |shard| async move { shard.expunge_messages(id, uids).await }).await?;
        expect("an expunge by UIDs", refusal(gone)?.map(|gone| uid_set(&gone)), expected)
    }

    pub async fn transfer(&self, run: &mut Run, from: Pick, uids: Uids, mut to: Pick, is_move: bool) -> Outcome<()> {
        if self.accounts[usize::from(from.account)].shard != self.accounts[usize::from(to.account)].shard {
            // By reference a message goes to mailboxes of its shard only.
            to.account = from.account;
        }
        let (account, from_key, from) = self.resolve(run, from);
        let (_, to_key, to) = self.resolve(run, to);
        let source = from_key.and_then(|key| run.model.mailbox(key));
        let uid_next = source.map_or(9, |mailbox| mailbox.uid_next);
        let expected = match (from_key, to_key) {
            (Some(from), Some(to)) => {
                run.model.transfer(from, &uids.set(uid_next), to, is_move).map(|pairs| (to.1, pairs))
            }
            _ => Err(Refused::NoSuchMailbox),
        };
        let set = uids.uid_set(uid_next);
        let copied = self
            .call(run, account, move |shard| async move {
                if is_move { shard.move_messages(from, set, to).await } else { shard.copy(from, set, to).await }
            })
            .await?;
        let found = refusal(copied)?.map(|copied| {
            (copied.uid_validity, copied.pairs.iter().map(|(old, new)| (old.0, new.0)).collect::<Vec<_>>())
        });
        expect(if is_move { "MOVE" } else { "COPY" }, found, expected)
    }

    pub async fn select(&mut self, run: &mut Run, session: usize, pick: Pick, claim_recent: bool) -> Outcome<()> {
        let (account, key, id) = self.resolve(run, pick);
        let shard = self.shard(account);
        let selected = refusal(shard.select(id, claim_recent).await)?;
        let (Some(key), Ok(view)) = (key, &selected) else {
            return expect("SELECT", selected.map(|_| ()), Err(Refused::NoSuchMailbox));
        };
        let mailbox = run.model.mailbox(key).ok_or("the model has lost a mailbox")?;
        expect("UIDVALIDITY at SELECT", view.uid_validity(), mailbox.uid_validity)?;
        expect("UIDNEXT at SELECT", view.uid_next(), mailbox.uid_next)?;
        expect("HIGHESTMODSEQ at SELECT", view.highest_modseq().0, mailbox.highest_modseq)?;
        expect("UNSEEN at SELECT", view.first_unseen(), mailbox.first_unseen())?;
        expect("EXISTS at SELECT", view.exists() as usize, mailbox.messages.len())?;
        expect("the last UID", view.last_uid().map(|uid| uid.0), mailbox.messages.keys().last().copied())?;
        for (sequence, &uid) in (1..).zip(mailbox.messages.keys()) {
            expect("a UID by its number", view.uid_of(sequence), Some(Uid(uid)))?;
            expect("a number by its UID", view.sequence_of(Uid(uid)), Some(sequence))?;
        }
        let uids = view.uids();
        let view = selected.ok().ok_or("it was there")?;
        let mut mirror = Mirror { view, mailbox: key, messages: Vec::new() };
        mirror.fetch(uids).await?;
        mirror.must_be_up_to_date(&mut run.model)?;
        self.sessions[session] = Some(mirror);
        Ok(())
    }

    pub async fn store_silently(
        &self,
        run: &mut Run,
        mirror: &mut Mirror,
        uids: Uids,
        how: How,
        names: Vec<String>,
    ) -> Outcome<()> {
        let Some(mailbox) = run.model.mailbox(mirror.mailbox) else { return Ok(()) };
        let set = uids.uid_set(mailbox.uid_next);
        let expected = mailbox.store(&uids.set(mailbox.uid_next), how, &names, None);
        let stored = mirror.view.store_silently(set, flag_op(how), to_engine(&names), None).await;
        expect_stored(stored, &expected)?;
        let Ok(Stored { modseq: Some(modseq), changed, flags, .. }) = expected else { return Ok(()) };
        // What the session makes of it is right where nobody else has changed anything; else it is told.
        for known in mirror.messages.iter_mut().filter(|known| changed.contains(&known.uid)) {
            known.flags = how.apply(&known.flags, &flags);
            known.modseq = modseq;
        }
        Ok(())
    }

    /// Compares everything.
    pub async fn compare(&self, run: &mut Run) -> Outcome<()> {
        for (number, account) in self.accounts.iter().enumerate() {
            let shard = self.shard(number);
            expect(
                "subscriptions",
                shard.subscriptions(account.account),
                run.model.accounts[number].subscriptions.iter().cloned().collect(),
            )?;
            let infos = shard.mailboxes(account.account);
            let names: Vec<&String> = infos.iter().map(|info| &info.name).collect();
            expect("mailboxes", names, run.model.accounts[number].mailboxes.keys().collect())?;
            for info in &infos {
                let mailbox = &run.model.accounts[number].mailboxes[&info.name];
                let what = |what: &str| format!("{what} of {} in {}", info.name, account.name);
                expect(
                    &what("subscription"),
                    info.subscribed,
                    run.model.accounts[number].subscriptions.contains(&info.name),
                )?;
                let (uid_validity, status) = (mailbox.uid_validity, info.status);
                expect(&what("UIDVALIDITY"), status.uid_validity, uid_validity)?;
                expect(&what("UIDNEXT"), status.uid_next, mailbox.uid_next)?;
                expect(&what("HIGHESTMODSEQ"), status.highest_modseq, mailbox.highest_modseq)?;
                expect(&what("EXISTS"), status.exists as usize, mailbox.messages.len())?;
                expect(&what("UNSEEN"), status.unseen as usize, mailbox.unseen())?;
                expect(&what("SIZE"), status.size, mailbox.octets())?;
                expect(&what("RECENT"), status.recent <= status.exists, true)?;
                expect(&what("the mailbox by name"), shard.mailbox(account.account, &info.name), Some(info.mailbox))?;
                let id = *run.ids.entry((number, uid_validity)).or_insert(info.mailbox);
                expect(&what("the mailbox"), info.mailbox, id)?;
                let keywords = shard.keywords(id).await.map_err(said)?;
                let spellings: BTreeSet<&String> = keywords.iter().filter(|name| !name.is_empty()).collect();
                expect(&what("keywords"), spellings, mailbox.keywords.iter().collect())?;
                let found = shard.messages(id, UidSet::range(1..=FAR)).await.map_err(said)?;
                let uids: Vec<u32> = found.iter().map(|found| found.message.uid.0).collect();
                expect(&what("UIDs"), uids, mailbox.messages.keys().copied().collect())?;
                for (found, (uid, message)) in found.iter().zip(&mailbox.messages) {
                    let what = |what: &str| format!("{what} of UID {uid} of {} in {}", info.name, account.name);
                    let MessageInfo { message: stored, flags } = found;
                    expect(&what("flags"), &to_model(*flags, &keywords), &message.flags)?;
                    expect(&what("MODSEQ"), stored.modseq.0, message.modseq)?;
                    expect(&what("INTERNALDATE"), (stored.internal_date, stored.zone_minutes), message.internal_date)?;
                    expect(&what("RFC822.SIZE"), stored.size, message.content.len() as u64)?;
                    let origin = *run.origins.entry((account.shard, stored.id)).or_insert(message.origin);
                    expect(&what("EMAILID"), origin, message.origin)?;
                    let bytes = shard.read_message(stored, id, Part::Whole).await.map_err(said)?;
                    let found = [bytes.prefix, bytes.header, bytes.body].concat();
                    if found != *message.content {
                        return Err(what("the bytes"));
                    }
                }
            }
        }
        let living =
            |key: &Key| run.model.accounts[key.0].mailboxes.values().any(|mailbox| mailbox.uid_validity == key.1);
        let gone: Vec<Key> = run.ids.keys().copied().filter(|key| !living(key)).collect();
        for key in gone {
            run.deleted.extend(run.ids.remove(&key).map(|mailbox| (key.0, mailbox)));
        }
        for &(account, mailbox) in &run.deleted {
            expect("a deleted mailbox's status", self.shard(account).status(mailbox), None)?;
        }
        Ok(())
    }
}
