//! Commands that change messages: STORE, EXPUNGE, COPY, MOVE, APPEND.

use posthaste_engine::changes::{Copied, FlagOp};
use posthaste_engine::deliver::{FlagName, Target, TargetMailbox};
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::ids::{ModSeq, Uid};
use posthaste_engine::index::MailboxIndex;
use posthaste_engine::io::Runtime;
use posthaste_imap::command::{Append, Store, StoreAction};
use posthaste_imap::response::{Code, Status, write_untagged};
use posthaste_imap::types::{Flag, MailboxName, SequenceSet, coalesce};

use super::fetch::chunks;
use super::{Answer, Failure, Outcome, Session, those_left};
use crate::inbound::prepare;
use crate::limits;
use crate::node::Counters;

fn flag_name(flag: &Flag) -> FlagName {
    match flag {
        Flag::Answered => FlagName::Answered,
        Flag::Flagged => FlagName::Flagged,
        Flag::Deleted => FlagName::Deleted,
        Flag::Seen => FlagName::Seen,
        Flag::Draft => FlagName::Draft,
        Flag::Keyword(name) => FlagName::Keyword(name.clone()),
    }
}

impl Session {
    /// STORE (RFC 3501, 6.4.6; RFC 7162, 3.1.3).
    pub(super) async fn store(&mut self, store: Store) -> Outcome {
        self.writable()?;
        let uids = self.resolve(&store.set, store.uid)?;
        let op = match store.action {
            StoreAction::Replace => FlagOp::Replace,
            StoreAction::Add => FlagOp::Add,
            StoreAction::Remove => FlagOp::Remove,
        };
        let names = store.flags.iter().map(flag_name).collect();
        if store.unchanged_since.is_some() {
            self.enable_condstore();
        }
        let since = store.unchanged_since.map(ModSeq);
        // The client knows its own change. With CONDSTORE it is told the new mod-sequences all the same (RFC 7162, 3.1.3).
        let silently = store.silent && !self.condstore;
        let view = &mut self.selected_mut()?.view;
        let (shard, mailbox) = (view.shard().clone(), view.mailbox());
        let stored = match silently {
            true => view.store_silently(uids.clone(), op, names, since).await?,
            false => shard.store_flags(mailbox, uids.clone(), op, names, since).await?,
        };
        if store.flags.iter().any(|flag| matches!(flag, Flag::Keyword(_))) {
            self.learn_keywords(Flags::ALL).await?;
        }
        self.sync(store.uid).await?;
        if !store.silent {
            // What others would have made of it already was not a change.
            let rest = UidSet(&uids.0 - &stored.changed.0 - &stored.refused.0);
            for chunk in chunks(&rest, limits::FETCH_CHUNK) {
                for info in shard.messages(mailbox, chunk).await? {
                    let uid = info.message.uid;
                    let Some(sequence) = self.selected()?.view.sequence_of(uid) else { continue };
                    self.learn_keywords(info.flags).await?;
                    self.write_flags_of(sequence, uid, info.flags, info.message.modseq)?;
                    self.flush_if_full().await?;
                }
            }
        }
        if stored.refused.is_empty() {
            let left = shard.look(mailbox, |index| those_left(index, &uids.0).len()).await?;
            return Ok(match left == uids.len() {
                true => Answer::ok("Stored"),
                // RFC 2180, 4.2: somebody else has expunged them, and this session may not be told now.
                false if left == 0 && !store.silent => {
                    Answer::no(Some(Code::ExpungeIssued), "The messages have been expunged")
                }
                false => Answer::ok("Stored in those that are left").with(Code::ExpungeIssued),
            });
        }
        let view = &self.selected()?.view;
        let mut refused: Vec<(u32, u32)> = match store.uid {
            true => stored.refused.runs(),
            false => stored.refused.iter().filter_map(|uid| view.sequence_of(uid)).map(|n| (n, n)).collect(),
        };
        coalesce(&mut refused);
        Ok(Answer::ok("Some have been changed by others").with(Code::Modified(refused.into())))
    }

    pub(super) async fn expunge(&mut self, among: Option<UidSet>) -> Outcome {
        let selected = self.writable()?;
        selected.view.shard().clone().expunge(selected.view.mailbox(), among).await?;
        Ok(Answer::ok("Expunged"))
    }

    pub(super) async fn copy(&mut self, uid: bool, set: &SequenceSet, name: &MailboxName) -> Outcome {
        let uids = self.resolve(set, uid)?;
        let to = self.target(name)?;
        let selected = self.selected()?;
        if !uid {
            // RFC 2180, 4.4.1: a copy of some of them only is none. UIDs that do not exist are passed over (RFC 3501, 6.4.8).
            let all_left = |index: &MailboxIndex| those_left(index, &uids.0).len() == uids.len();
            if !selected.view.shard().look(selected.view.mailbox(), all_left).await? {
                let text = "Some of the messages have been expunged, nothing was copied";
                return Ok(Answer::no(Some(Code::ExpungeIssued), text));
            }
        }
        let copied = selected.view.shard().copy(selected.view.mailbox(), uids, to).await?;
        let answer = Answer::ok("Copied");
        Ok(match copy_uid(&copied) {
            Some(code) => answer.with(code),
            None => answer,
        })
    }

    /// MOVE (RFC 6851): COPYUID comes before the EXPUNGE responses, which follow as the command ends.
    pub(super) async fn move_messages(&mut self, uid: bool, set: &SequenceSet, name: &MailboxName) -> Outcome {
        self.writable()?;
        let uids = self.resolve(set, uid)?;
        let to = self.target(name)?;
        let selected = self.selected()?;
        if to == selected.view.mailbox() {
            return Ok(Answer::no(Some(Code::Cannot), "That is the mailbox they are in"));
        }
        let moved = selected.view.shard().move_messages(selected.view.mailbox(), uids.clone(), to).await?;
        if let Some(code) = copy_uid(&moved) {
            write_untagged(&mut self.output, Status::Ok, Some(&code), "Moved");
        }
        if (moved.pairs.len() as u64) < uids.len() {
            return Ok(Answer::ok("Moved those that are left").with(Code::ExpungeIssued));
        }
        Ok(Answer::ok("Moved"))
    }

    /// APPEND (RFC 3501, 6.3.11; RFC 4315, 3). The octets are kept as they are.
    pub(super) async fn append(&mut self, append: Append) -> Outcome {
        let mailbox = self.target(&append.mailbox)?;
        let mut messages = append.messages.into_iter();
        let (Some(message), None) = (messages.next(), messages.next()) else {
            return Ok(Answer::bad("One message at a time"));
        };
        if message.has_nul {
            // RFC 3501, 9: CHAR8 has no NUL, and a message that has one could not be fetched without breaking that.
            let text = "The message has a NUL octet, which IMAP cannot carry: encode it";
            return Ok(Answer::no(Some(Code::Cannot), text));
        }
        if message.bytes.is_empty() {
            return Ok(Answer::bad("The message is empty"));
        }
        let user = self.user()?;
        let (shard, account) = (user.shard.clone(), user.account.account);
        let received_ms = self.context.io.wall_clock_ms();
        Counters::add(&self.context.node.counters.octets_received, message.bytes.len() as u64);
        let target = Target {
            account,
            mailbox: TargetMailbox::Id(mailbox),
            prefix: Vec::new(),
            flags: message.flags.iter().map(flag_name).collect(),
            internal_date: message.date.map(|date| (date.unix_seconds, date.offset_minutes)),
        };
        let octets = message.bytes.len();
        let prepared = prepare(&self.context, Vec::new(), octets, || message.bytes.into_vec(), received_ms).await;
        let Some(result) = shard.deliver(prepared, vec![target]).await.pop() else {
            return Ok(Answer::no(Some(Code::ServerBug), "Nothing was appended"));
        };
        let delivered = result.map_err(|error| match Failure::from(error) {
            Failure::Answer(answer) if answer.code == Some(Code::NonExistent) => {
                Failure::Answer(answer.with(Code::TryCreate))
            }
            failure => failure,
        })?;
        let uids = vec![(delivered.uid.0, delivered.uid.0)].into();
        Ok(Answer::ok("Appended").with(Code::AppendUid { uid_validity: delivered.uid_validity, uids }))
    }
}

/// `None` where nothing was copied: the sets of COPYUID cannot be empty.
fn copy_uid(copied: &Copied) -> Option<Code<'static>> {
    if copied.pairs.is_empty() {
        return None;
    }
    let runs = |pick: fn(&(Uid, Uid)) -> Uid| {
        let mut runs: Vec<(u32, u32)> = copied.pairs.iter().map(|pair| (pick(pair).0, pick(pair).0)).collect();
        coalesce(&mut runs);
        runs.into()
    };
    Some(Code::CopyUid {
        uid_validity: copied.uid_validity,
        source: runs(|pair| pair.0),
        destination: runs(|pair| pair.1),
    })
}
