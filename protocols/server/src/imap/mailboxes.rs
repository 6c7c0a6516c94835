//! Commands about mailboxes: LIST, LSUB, CREATE, DELETE, RENAME, SUBSCRIBE, STATUS, NAMESPACE.

use std::collections::BTreeMap;

use posthaste_engine::flags::Flags;
use posthaste_engine::ids::MailboxId;
use posthaste_engine::mailboxes::{MailboxInfo, SEPARATOR};
use posthaste_imap::command::{List, StatusAttribute};
use posthaste_imap::response::{
    Code, ListAttribute, NamespaceEntry, StatusItem, write_list, write_lsub, write_namespace, write_status,
};
use posthaste_imap::types::{MailboxName, Pattern};

use super::select::mailbox_id;
use super::{Answer, Failure, Outcome, Session};
use crate::limits;
use crate::special_use::{self, SPECIAL_USES};

const DELIMITER: Option<char> = Some(SEPARATOR);

/// A name in a list: a mailbox, or only a level above one.
#[derive(Default)]
struct Listed {
    info: Option<MailboxInfo>,
    has_children: bool,
    subscribed: bool,
}

/// The levels above a name.
fn levels_above(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices(SEPARATOR).map(|(at, _)| &name[..at])
}

impl Session {
    /// The mailbox of a name.
    pub(super) fn mailbox(&self, name: &MailboxName) -> Result<MailboxId, Failure> {
        let user = self.user()?;
        let mailbox = user.shard.mailbox(user.account.account, name.as_str());
        mailbox.ok_or_else(|| Answer::no(Some(Code::NonExistent), "There is no such mailbox").into())
    }

    /// The mailbox of a name that messages go to (RFC 3501, 6.3.11 and 6.4.7: TRYCREATE).
    pub(super) fn target(&self, name: &MailboxName) -> Result<MailboxId, Failure> {
        self.mailbox(name).map_err(|_| Answer::no(Some(Code::TryCreate), "There is no such mailbox").into())
    }

    pub(super) async fn create(&mut self, name: &MailboxName, special_use: &[String]) -> Outcome {
        let mut bits = 0;
        for name in special_use {
            match special_use::bit_of(name) {
                Some(bit) => bits |= bit,
                None => return Ok(Answer::no(Some(Code::UseAttr), "There is no such special use")),
            }
        }
        let user = self.user()?;
        // RFC 3501, 6.3.3: a trailing delimiter announces mailboxes below.
        let name = name.as_str();
        let name = name.strip_suffix(SEPARATOR).unwrap_or(name);
        let mailbox = user.shard.create_mailbox(user.account.account, name, bits).await?;
        Ok(Answer::ok("Created").with(Code::MailboxId(mailbox_id(mailbox).into())))
    }

    pub(super) async fn delete(&mut self, name: &MailboxName) -> Outcome {
        let user = self.user()?;
        let (shard, account) = (user.shard.clone(), user.account.account);
        let mailbox = shard.mailbox(account, name.as_str());
        if mailbox.is_none() && self.names()?.get(name.as_str()).is_some_and(|listed| listed.has_children) {
            // RFC 3501, 6.3.4: "It is an error to attempt to delete" a \Noselect name with names below it.
            return Ok(Answer::no(Some(Code::HasChildren), "Only the mailboxes below it are left: delete them first"));
        }
        shard.delete_mailbox(account, name.as_str()).await?;
        // Whoever deletes what it has selected knows that it is gone.
        if mailbox.is_some() && self.selected.as_ref().map(|selected| selected.view.mailbox()) == mailbox {
            self.selected = None;
        }
        Ok(Answer::ok("Deleted"))
    }

    pub(super) async fn rename(&mut self, from: &MailboxName, to: &MailboxName) -> Outcome {
        let user = self.user()?;
        user.shard.rename_mailbox(user.account.account, from.as_str(), to.as_str()).await?;
        Ok(Answer::ok("Renamed"))
    }

    pub(super) async fn subscribe(&mut self, name: &MailboxName, subscribed: bool) -> Outcome {
        let user = self.user()?;
        user.shard.subscribe(user.account.account, name.as_str(), subscribed).await?;
        Ok(Answer::ok(if subscribed { "Subscribed" } else { "Unsubscribed" }))
    }

    pub(super) fn namespace(&mut self) -> Answer {
        let personal = [NamespaceEntry { prefix: "", delimiter: DELIMITER }];
        write_namespace(&mut self.output, [&personal, &[], &[]]);
        Answer::ok("There is one namespace")
    }

    /// All names that there are: mailboxes, levels above them, subscriptions.
    fn names(&self) -> Result<BTreeMap<String, Listed>, Failure> {
        let user = self.user()?;
        let mut names: BTreeMap<String, Listed> = BTreeMap::new();
        for info in user.shard.mailboxes(user.account.account) {
            for level in levels_above(&info.name) {
                names.entry(level.to_owned()).or_default().has_children = true;
            }
            let listed = names.entry(info.name.clone()).or_default();
            listed.subscribed = info.subscribed;
            listed.info = Some(info);
        }
        Ok(names)
    }

    pub(super) async fn list(&mut self, list: List) -> Outcome {
        if list.select.recursive_match || list.select.remote {
            return Ok(Answer::no(Some(Code::Cannot), "RECURSIVEMATCH and REMOTE are not supported"));
        }
        if !list.extended && list.patterns.iter().all(String::is_empty) {
            // RFC 3501, 6.3.8: asks for the delimiter.
            let root = MailboxName::from_utf8("");
            write_list(&mut self.output, &[ListAttribute::NoSelect], DELIMITER, &root, false);
            return Ok(Answer::ok("Listed"));
        }
        let patterns: Vec<Pattern> = list.patterns.iter().map(|text| Pattern::new(&list.reference, text)).collect();
        let mut names = self.names()?;
        if list.select.subscribed {
            let user = self.user()?;
            for name in user.shard.subscriptions(user.account.account) {
                names.entry(name).or_default().subscribed = true;
            }
        }
        let pattern_octets: usize = list.patterns.iter().map(|text| text.len() + list.reference.len() + 1).sum();
        let mut compared = 0;
        for (name, listed) in &names {
            // A pattern is compared with a name in time proportional to both.
            compared += pattern_octets * (name.len() + 1);
            if compared >= limits::LIST_STEP_COMPARISONS {
                compared = 0;
                self.context.turn().await;
            }
            if !patterns.iter().any(|pattern| pattern.matches(name, DELIMITER)) {
                continue;
            }
            let special_use = listed.info.as_ref().map_or(0, |info| info.special_use);
            if (list.select.subscribed && !listed.subscribed) || (list.select.special_use && special_use == 0) {
                continue;
            }
            let mut attributes = Vec::new();
            if listed.info.is_none() {
                let gone = listed.subscribed && !listed.has_children;
                attributes.push(if gone { ListAttribute::NonExistent } else { ListAttribute::NoSelect });
            }
            attributes.push(match listed.has_children {
                true => ListAttribute::HasChildren,
                false => ListAttribute::HasNoChildren,
            });
            if listed.subscribed && (list.select.subscribed || list.returns.subscribed) {
                attributes.push(ListAttribute::Subscribed);
            }
            let uses = SPECIAL_USES.iter().filter(|(bit, _, _)| special_use & bit != 0);
            attributes.extend(uses.map(|(_, _, attribute)| *attribute));
            let name = MailboxName::from_utf8(name);
            write_list(&mut self.output, &attributes, DELIMITER, &name, false);
            if let Some(info) = &listed.info
                && !list.returns.status.is_empty()
            {
                self.write_status_of(&name, info.mailbox, &list.returns.status).await?;
            }
            self.flush_if_full().await?;
        }
        Ok(Answer::ok("Listed"))
    }

    /// LSUB (RFC 3501, 6.3.9): where `%` ends at a level above a subscribed name, that level is given as \Noselect.
    pub(super) async fn list_subscribed(&mut self, reference: &str, text: &str) -> Outcome {
        let pattern = Pattern::new(reference, text);
        let user = self.user()?;
        let mut found: BTreeMap<String, bool> = BTreeMap::new();
        for name in user.shard.subscriptions(user.account.account) {
            if pattern.matches(&name, DELIMITER) {
                found.insert(name, true);
                continue;
            }
            if text.ends_with('%') {
                for level in levels_above(&name).filter(|level| pattern.matches(level, DELIMITER)) {
                    found.entry(level.to_owned()).or_insert(false);
                }
            }
        }
        for (name, subscribed) in found {
            let attributes: &[ListAttribute] = if subscribed { &[] } else { &[ListAttribute::NoSelect] };
            write_lsub(&mut self.output, attributes, DELIMITER, &MailboxName::from_utf8(&name), false);
            self.flush_if_full().await?;
        }
        Ok(Answer::ok("Listed"))
    }

    pub(super) async fn status(&mut self, name: &MailboxName, attributes: &[StatusAttribute]) -> Outcome {
        let mailbox = self.mailbox(name)?;
        self.write_status_of(name, mailbox, attributes).await?;
        Ok(Answer::ok("Told"))
    }

    async fn write_status_of(
        &mut self,
        name: &MailboxName,
        mailbox: MailboxId,
        attributes: &[StatusAttribute],
    ) -> Result<(), Failure> {
        let shard = self.shard()?;
        // One that went away meanwhile has no status.
        let Some(status) = shard.status(mailbox) else { return Ok(()) };
        let id = mailbox_id(mailbox);
        let mut items = Vec::with_capacity(attributes.len());
        for attribute in attributes {
            items.push(match attribute {
                StatusAttribute::Messages => StatusItem::Messages(status.exists),
                StatusAttribute::Recent => StatusItem::Recent(status.recent),
                StatusAttribute::UidNext => StatusItem::UidNext(status.uid_next),
                StatusAttribute::UidValidity => StatusItem::UidValidity(status.uid_validity),
                StatusAttribute::Unseen => StatusItem::Unseen(status.unseen),
                StatusAttribute::Size => StatusItem::Size(status.size),
                StatusAttribute::HighestModSeq => {
                    self.enable_condstore();
                    StatusItem::HighestModSeq(status.highest_modseq)
                }
                StatusAttribute::AppendLimit => StatusItem::AppendLimit(self.context.node.config.limits.message_bytes),
                StatusAttribute::MailboxId => StatusItem::MailboxId(&id),
                StatusAttribute::Deleted => StatusItem::Deleted(shard.count_with(mailbox, Flags::DELETED).await?),
            });
        }
        write_status(&mut self.output, name, &items, false);
        Ok(())
    }
}
