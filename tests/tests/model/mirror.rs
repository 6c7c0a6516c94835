//! A session that knows its mailbox from what its view has told it.

use std::collections::BTreeSet;

use posthaste_engine::flags::UidSet;
use posthaste_engine::ids::Uid;
use posthaste_engine::view::View;
use posthaste_tests::model::{Flags, Key, Model};

use crate::Store;
use crate::words::{Outcome, expect, said, to_model, uid_set};

/// What a client that only listens knows of its mailbox.
pub struct Mirror {
    pub view: View<Store>,
    pub mailbox: Key,
    pub messages: Vec<Known>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub uid: u32,
    pub flags: Flags,
    pub modseq: u64,
}

impl Mirror {
    /// FETCH of UID, FLAGS and MODSEQ.
    pub async fn fetch(&mut self, uids: UidSet) -> Outcome<()> {
        let (shard, mailbox) = (self.view.shard(), self.view.mailbox());
        let keywords = shard.keywords(mailbox).await.map_err(said)?;
        let found = shard.messages(mailbox, uids).await.map_err(said)?;
        self.messages.extend(found.iter().map(|found| Known {
            uid: found.message.uid.0,
            flags: to_model(found.flags, &keywords),
            modseq: found.message.modseq.0,
        }));
        Ok(())
    }

    pub fn must_be_up_to_date(&self, model: &mut Model) -> Outcome<()> {
        let mailbox = model.mailbox(self.mailbox).ok_or("a mirror of nothing")?;
        let now = mailbox.messages.iter();
        let now: Vec<Known> =
            now.map(|(&uid, message)| Known { uid, flags: message.flags.clone(), modseq: message.modseq }).collect();
        expect("what a session knows", &self.messages, &now)
    }

    /// Brings the mirror up to date by what the view says, and by a FETCH of what it says is new.
    pub async fn sync(&mut self, model: &mut Model, allow_expunge: bool) -> Outcome<()> {
        let changes = self.view.sync(allow_expunge).await.map_err(said)?;
        expect("whether the mailbox is gone", changes.gone, model.mailbox(self.mailbox).is_none())?;
        if changes.gone {
            return Ok(());
        }
        expect("expunges in silence", allow_expunge || changes.expunged.is_empty(), true)?;
        let mut expunged = BTreeSet::new();
        for &sequence in &changes.expunged {
            if sequence == 0 || sequence as usize > self.messages.len() {
                return Err(format!("EXPUNGE of number {sequence} among {} messages", self.messages.len()));
            }
            expunged.insert(self.messages.remove(sequence as usize - 1).uid);
        }
        expect("the UIDs of what is expunged", uid_set(&changes.expunged_uids), expunged)?;
        let keywords = self.view.shard().keywords(self.view.mailbox()).await.map_err(said)?;
        for (sequence, uid, flags, modseq) in &changes.flags {
            let known = sequence.checked_sub(1).and_then(|at| self.messages.get_mut(at as usize));
            let known = known.ok_or_else(|| format!("FETCH of number {sequence}"))?;
            expect("the UID in a FETCH", uid.0, known.uid)?;
            (known.flags, known.modseq) = (to_model(*flags, &keywords), modseq.0);
        }
        let shown: BTreeSet<u32> = self.messages.iter().map(|known| known.uid).collect();
        let new = uid_set(&self.view.uids()).difference(&shown).map(|&uid| Uid(uid)).collect();
        self.fetch(new).await?;
        let exists = changes.exists.unwrap_or(shown.len() as u32);
        expect("EXISTS", exists as usize, self.messages.len())?;
        expect("UIDs of the view", uid_set(&self.view.uids()), self.messages.iter().map(|known| known.uid).collect())?;
        if allow_expunge {
            return self.must_be_up_to_date(model);
        }
        // What is expunged stays until the next time; all else is up to date.
        let mailbox = model.mailbox(self.mailbox).ok_or("a mirror of nothing")?;
        let lost = mailbox.messages.keys().find(|uid| !self.messages.iter().any(|known| known.uid == **uid));
        expect("a message that a session does not know of", lost, None)?;
        for known in &self.messages {
            if let Some(message) = mailbox.messages.get(&known.uid) {
                expect("flags in a session", &known.flags, &message.flags)?;
                expect("MODSEQ in a session", known.modseq, message.modseq)?;
            } else {
                expect("a message of a session that never was", known.uid < mailbox.uid_next, true)?;
            }
        }
        Ok(())
    }
}
