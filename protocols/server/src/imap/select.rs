//! SELECT and EXAMINE, CLOSE, and the flags of the selected mailbox.

use posthaste_engine::flags::Flags;
use posthaste_engine::ids::{MailboxId, Uid};
use posthaste_imap::command::Select;
use posthaste_imap::response::{Code, Status, write_flags, write_numbered, write_untagged};

use super::{Answer, Failure, Outcome, Session};
use crate::node::View;

/// The system flags by their bits, as they are listed.
pub(super) const SYSTEM_FLAGS: [(Flags, &str); 5] = [
    (Flags::ANSWERED, "\\Answered"),
    (Flags::FLAGGED, "\\Flagged"),
    (Flags::DELETED, "\\Deleted"),
    (Flags::SEEN, "\\Seen"),
    (Flags::DRAFT, "\\Draft"),
];

pub(super) struct Selected {
    pub view: View,
    pub read_only: bool,
    /// The keywords that the client has been told of, by their numbers.
    pub keywords: Vec<String>,
}

impl Selected {
    /// `\Seen $Junk`, with `\Recent` where it belongs.
    pub fn flags_text(&self, uid: Uid, flags: Flags) -> String {
        let mut text = String::new();
        let mut push = |name: &str| {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(name);
        };
        for (flag, name) in SYSTEM_FLAGS {
            if flags.contains(flag) {
                push(name);
            }
        }
        for number in flags.keywords() {
            if let Some(name) = self.keywords.get(number).filter(|name| !name.is_empty()) {
                push(name);
            }
        }
        if self.view.is_recent(uid) {
            push("\\Recent");
        }
        text
    }

    /// All flags of the mailbox, separated by spaces.
    fn all_flags(&self) -> String {
        let names: Vec<&str> = SYSTEM_FLAGS.iter().map(|(_, name)| *name).chain(self.keyword_names()).collect();
        names.join(" ")
    }

    pub fn keyword_names(&self) -> impl Iterator<Item = &str> {
        self.keywords.iter().map(String::as_str).filter(|name| !name.is_empty())
    }
}

/// The id of a mailbox (RFC 8474, 4): never reused, and kept when it is renamed.
pub(super) fn mailbox_id(mailbox: MailboxId) -> String {
    format!("F{:x}", mailbox.0)
}

impl Session {
    pub(super) async fn select(&mut self, select: Select) -> Outcome {
        // RFC 3501, 6.3.1: whatever comes of it, the mailbox selected before is not any more.
        if self.selected.take().is_some() {
            write_untagged(&mut self.output, Status::Ok, Some(&Code::Closed), "The mailbox before is closed");
        }
        if select.qresync.is_some() {
            return Ok(Answer::bad("QRESYNC is not enabled"));
        }
        self.condstore |= select.condstore;
        let user = self.user()?;
        let shard = user.shard.clone();
        let mailbox = self.mailbox(&select.mailbox)?;
        let view = shard.select(mailbox, !select.read_only).await?;
        let keywords = shard.keywords(mailbox).await?;
        let selected = Selected { view, read_only: select.read_only, keywords };
        let all = selected.all_flags();
        let out = &mut self.output;
        write_flags(out, &all);
        write_numbered(out, selected.view.exists(), "EXISTS");
        write_numbered(out, selected.view.recent(), "RECENT");
        let mut say = |code: Code<'_>, text: &str| write_untagged(out, Status::Ok, Some(&code), text);
        if let Some(sequence) = selected.view.first_unseen() {
            say(Code::Unseen(sequence), "The first message that is not seen");
        }
        let permanent = if select.read_only { String::new() } else { format!("{all} \\*") };
        say(Code::PermanentFlags(permanent.into()), "Flags that are kept");
        say(Code::UidValidity(selected.view.uid_validity()), "UIDs are valid");
        say(Code::UidNext(selected.view.uid_next()), "The next UID");
        say(Code::HighestModSeq(selected.view.highest_modseq().0), "The highest mod-sequence");
        say(Code::MailboxId(mailbox_id(mailbox).into()), "The id of the mailbox");
        self.selected = Some(Box::new(selected));
        Ok(match select.read_only {
            true => Answer::ok("Examined").with(Code::ReadOnly),
            false => Answer::ok("Selected").with(Code::ReadWrite),
        })
    }

    /// CLOSE expunges without telling (RFC 3501, 6.4.2).
    pub(super) async fn close(&mut self) -> Outcome {
        let Some(selected) = self.selected.take() else { return Ok(Answer::bad("No mailbox selected")) };
        if !selected.read_only {
            selected.view.shard().expunge(selected.view.mailbox(), None).await?;
        }
        Ok(Answer::ok("Closed"))
    }

    /// Tells the client of keywords that it has not seen yet, before flags that have them (RFC 3501, 7.2.6).
    pub(super) async fn learn_keywords(&mut self, flags: Flags) -> Result<(), Failure> {
        let Some(selected) = self.selected.as_deref_mut() else { return Ok(()) };
        let known = |number: usize| selected.keywords.get(number).is_some_and(|name| !name.is_empty());
        if flags.keywords().all(known) {
            return Ok(());
        }
        let keywords = selected.view.shard().keywords(selected.view.mailbox()).await?;
        if keywords == selected.keywords {
            return Ok(());
        }
        selected.keywords = keywords;
        let all = selected.all_flags();
        let permanent = Code::PermanentFlags(format!("{all} \\*").into());
        write_flags(&mut self.output, &all);
        if !selected.read_only {
            write_untagged(&mut self.output, Status::Ok, Some(&permanent), "Flags that are kept");
        }
        Ok(())
    }
}
