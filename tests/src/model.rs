//! The model: a plain map that does what the documents and the RFCs say a store does, and nothing to make it fast.
//!
//! It has no type of the engine's in it. Flags are names; a UID, a mod-sequence, a UIDVALIDITY is a number. An operation
//! that is refused changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Flags and keywords by name; system flags begin with a backslash.
pub type Flags = BTreeSet<String>;

/// Keywords of one mailbox.
pub const KEYWORDS_MAX: usize = 120;
const NAME_OCTETS_MAX: usize = 1000;
const NAME_LEVELS_MAX: usize = 50;
pub const INBOX: &str = "INBOX";
pub const SEEN: &str = "\\Seen";
pub const DELETED: &str = "\\Deleted";

/// Why an operation is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    BadName,
    MailboxExists,
    NoSuchMailbox,
    InboxStays,
    IntoItself,
    TooManyKeywords,
}

/// A message in a mailbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which delivery it comes from: its copies are the same message.
    pub origin: u64,
    pub content: Rc<Vec<u8>>,
    pub flags: Flags,
    pub modseq: u64,
    /// Seconds since the Unix epoch, and the zone in minutes.
    pub internal_date: (i64, i16),
}

/// How STORE combines flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Add,
    Remove,
    Replace,
}

impl How {
    /// What a message's flags become.
    pub fn apply(self, old: &Flags, given: &Flags) -> Flags {
        match self {
            Self::Add => old | given,
            Self::Remove => old - given,
            Self::Replace => given.clone(),
        }
    }
}

/// What STORE answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stored {
    pub modseq: Option<u64>,
    pub changed: BTreeSet<u32>,
    pub refused: BTreeSet<u32>,
    /// The flags as the mailbox spells them.
    pub flags: Flags,
}

/// A mailbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mailbox {
    pub uid_validity: u32,
    pub uid_next: u32,
    pub highest_modseq: u64,
    pub keywords: Vec<String>,
    pub messages: BTreeMap<u32, Message>,
}

impl Mailbox {
    fn new(uid_validity: u32) -> Self {
        Self { uid_validity, uid_next: 1, highest_modseq: 1, keywords: Vec::new(), messages: BTreeMap::new() }
    }

    pub fn unseen(&self) -> usize {
        self.messages.values().filter(|message| !message.flags.contains(SEEN)).count()
    }

    pub fn octets(&self) -> u64 {
        self.messages.values().map(|message| message.content.len() as u64).sum()
    }

    pub fn first_unseen(&self) -> Option<u32> {
        let first = self.messages.values().position(|message| !message.flags.contains(SEEN));
        first.map(|at| at as u32 + 1)
    }

    pub fn spelling(&self, name: &str) -> Option<&String> {
        self.keywords.iter().find(|keyword| keyword.eq_ignore_ascii_case(name))
    }

    /// Flags as this mailbox spells them: keywords are compared without regard to case, and keep the case in which they
    /// came first. Those that are new become known, unless they are only to be removed.
    fn spell<'a>(&mut self, names: impl IntoIterator<Item = &'a String>, allot: bool) -> Result<Flags, Refused> {
        let known = self.keywords.len();
        let mut flags = Flags::new();
        for name in names {
            if name.starts_with('\\') {
                flags.insert(name.clone());
            } else if let Some(spelling) = self.spelling(name) {
                flags.insert(spelling.clone());
            } else if allot && self.keywords.len() == KEYWORDS_MAX {
                self.keywords.truncate(known);
                return Err(Refused::TooManyKeywords);
            } else if allot {
                self.keywords.push(name.clone());
                flags.insert(name.clone());
            }
        }
        Ok(flags)
    }

    /// Delivery or APPEND of one message.
    pub fn place(
        &mut self,
        origin: u64,
        content: Rc<Vec<u8>>,
        flags: &[String],
        internal_date: (i64, i16),
    ) -> Result<u32, Refused> {
        let flags = self.spell(flags, true)?;
        self.highest_modseq += 1;
        let message = Message { origin, content, flags, modseq: self.highest_modseq, internal_date };
        Ok(self.put(message))
    }

    fn put(&mut self, message: Message) -> u32 {
        let uid = self.uid_next;
        self.uid_next += 1;
        self.messages.insert(uid, message);
        uid
    }

    /// STORE, with UNCHANGEDSINCE (RFC 7162, 3.1.3). Messages that have the flags already keep their mod-sequence.
    pub fn store(
        &mut self,
        uids: &BTreeSet<u32>,
        how: How,
        names: &[String],
        unchanged_since: Option<u64>,
    ) -> Result<Stored, Refused> {
        let flags = self.spell(names, how != How::Remove)?;
        let modseq = self.highest_modseq + 1;
        let mut stored = Stored { flags: flags.clone(), ..Stored::default() };
        for (&uid, message) in self.messages.iter_mut().filter(|(uid, _)| uids.contains(uid)) {
            if unchanged_since.is_some_and(|since| message.modseq > since) {
                stored.refused.insert(uid);
                continue;
            }
            let new = how.apply(&message.flags, &flags);
            if new != message.flags {
                message.flags = new;
                message.modseq = modseq;
                stored.changed.insert(uid);
            }
        }
        if !stored.changed.is_empty() {
            self.highest_modseq = modseq;
            stored.modseq = Some(modseq);
        }
        Ok(stored)
    }

    /// EXPUNGE, or UID EXPUNGE (RFC 4315, 2.1).
    pub fn expunge(&mut self, among: Option<&BTreeSet<u32>>) -> BTreeSet<u32> {
        let gone: BTreeSet<u32> = self
            .messages
            .iter()
            .filter(|(uid, message)| message.flags.contains(DELETED) && among.is_none_or(|among| among.contains(uid)))
            .map(|(&uid, _)| uid)
            .collect();
        self.remove(&gone);
        gone
    }

    /// Expunges without regard to flags.
    pub fn expunge_messages(&mut self, uids: &BTreeSet<u32>) -> BTreeSet<u32> {
        let gone: BTreeSet<u32> = self.messages.keys().filter(|uid| uids.contains(uid)).copied().collect();
        self.remove(&gone);
        gone
    }

    fn remove(&mut self, gone: &BTreeSet<u32>) {
        if !gone.is_empty() {
            self.messages.retain(|uid, _| !gone.contains(uid));
            self.highest_modseq += 1;
        }
    }
}

/// An account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    pub mailboxes: BTreeMap<String, Mailbox>,
    pub subscriptions: BTreeSet<String>,
    uid_validity_next: u32,
}

impl Default for Account {
    /// A new account has an INBOX.
    fn default() -> Self {
        let mailboxes = BTreeMap::from([(INBOX.to_owned(), Mailbox::new(1))]);
        Self { mailboxes, subscriptions: BTreeSet::new(), uid_validity_next: 2 }
    }
}

/// A name in its one spelling.
fn normal(name: &str) -> Option<String> {
    let levels: Vec<&str> = name.split('/').collect();
    let is_good = name.len() <= NAME_OCTETS_MAX
        && levels.len() <= NAME_LEVELS_MAX
        && levels.iter().all(|level| !level.is_empty())
        && !name.chars().any(char::is_control);
    let mut name = name.to_owned();
    if levels[0].eq_ignore_ascii_case(INBOX) {
        name.replace_range(..INBOX.len(), INBOX);
    }
    is_good.then_some(name)
}

/// The names above a name.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('/').map(|(at, _)| &name[..at])
}

fn is_below(name: &str, parent: &str) -> bool {
    name.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/'))
}

/// The reasons why an operation may be refused; none if it must succeed. Where there are several, any will do.
pub type Reasons = BTreeSet<Refused>;

impl Account {
    pub fn by_uid_validity(&mut self, uid_validity: u32) -> Option<&mut Mailbox> {
        self.mailboxes.values_mut().find(|mailbox| mailbox.uid_validity == uid_validity)
    }

    fn make(&mut self, name: &str) {
        if !self.mailboxes.contains_key(name) {
            self.mailboxes.insert(name.to_owned(), Mailbox::new(self.uid_validity_next));
            self.uid_validity_next += 1;
        }
    }

    /// CREATE makes the levels above, too (RFC 3501, 6.3.3), and no UIDVALIDITY twice.
    pub fn create(&mut self, name: &str) -> Reasons {
        let Some(name) = normal(name) else { return Reasons::from([Refused::BadName]) };
        if self.mailboxes.contains_key(&name) {
            return Reasons::from([Refused::MailboxExists]);
        }
        parents(&name).for_each(|parent| self.make(parent));
        self.make(&name);
        Reasons::new()
    }

    /// RENAME takes those below along, except with INBOX, whose messages it moves (RFC 3501, 6.3.5).
    pub fn rename(&mut self, from: &str, to: &str) -> Reasons {
        let (Some(from), Some(to)) = (normal(from), normal(to)) else { return Reasons::from([Refused::BadName]) };
        let mut reasons = Reasons::new();
        // A level without a mailbox of its own can be renamed as long as there are some below it.
        if !self.mailboxes.keys().any(|name| *name == from || is_below(name, &from)) {
            reasons.insert(Refused::NoSuchMailbox);
        }
        if self.mailboxes.contains_key(&to) {
            reasons.insert(Refused::MailboxExists);
        }
        if from == INBOX {
            if reasons.is_empty() {
                self.rename_inbox(&to);
            }
            return reasons;
        }
        if is_below(&to, &from) {
            reasons.insert(Refused::IntoItself);
        }
        let names = self.mailboxes.keys().filter(|name| **name == from || is_below(name, &from));
        let moves: Vec<(String, String)> =
            names.map(|name| (name.clone(), format!("{to}{}", &name[from.len()..]))).collect();
        for (_, new) in &moves {
            if normal(new).is_none() {
                reasons.insert(Refused::BadName);
            }
            if self.mailboxes.contains_key(new) {
                reasons.insert(Refused::MailboxExists);
            }
        }
        if reasons.is_empty() {
            parents(&to).for_each(|parent| self.make(parent));
            for (old, new) in moves {
                let mailbox = self.mailboxes.remove(&old).expect("it was listed");
                self.mailboxes.insert(new, mailbox);
            }
        }
        reasons
    }

    fn rename_inbox(&mut self, to: &str) {
        parents(to).for_each(|parent| self.make(parent));
        self.make(to);
        let inbox = self.mailboxes.get_mut(INBOX).expect("INBOX stays");
        let keywords = inbox.keywords.clone();
        let moved = std::mem::take(&mut inbox.messages);
        inbox.highest_modseq += u64::from(!moved.is_empty());
        let target = self.mailboxes.get_mut(to).expect("just made");
        target.keywords = keywords;
        target.highest_modseq += u64::from(!moved.is_empty());
        for (_, message) in moved {
            let modseq = target.highest_modseq;
            target.put(Message { modseq, ..message });
        }
    }

    /// DELETE leaves those below, and the subscription (RFC 3501, 6.3.4 and 6.3.6).
    pub fn delete(&mut self, name: &str) -> Reasons {
        let Some(name) = normal(name) else { return Reasons::from([Refused::BadName]) };
        if name == INBOX {
            return Reasons::from([Refused::InboxStays]);
        }
        match self.mailboxes.remove(&name) {
            Some(_) => Reasons::new(),
            None => Reasons::from([Refused::NoSuchMailbox]),
        }
    }

    /// The name need not exist.
    pub fn subscribe(&mut self, name: &str, subscribed: bool) -> Reasons {
        let Some(name) = normal(name) else { return Reasons::from([Refused::BadName]) };
        if subscribed {
            self.subscriptions.insert(name);
        } else {
            self.subscriptions.remove(&name);
        }
        Reasons::new()
    }
}

/// A mailbox by its account and UIDVALIDITY, which outlive its names.
pub type Key = (usize, u32);

/// All accounts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    pub accounts: Vec<Account>,
    /// Deliveries so far.
    pub origins: u64,
}

impl Model {
    pub fn mailbox(&mut self, (account, uid_validity): Key) -> Option<&mut Mailbox> {
        self.accounts.get_mut(account)?.by_uid_validity(uid_validity)
    }

    /// COPY, and MOVE (RFC 6851) as COPY and removal in one. What is copied has one new mod-sequence, then the removal
    /// has the next of its mailbox. Gives UIDs at the source and at the target.
    pub fn transfer(
        &mut self,
        from: Key,
        uids: &BTreeSet<u32>,
        to: Key,
        is_move: bool,
    ) -> Result<Vec<(u32, u32)>, Refused> {
        self.mailbox(to).ok_or(Refused::NoSuchMailbox)?;
        let source = self.mailbox(from).ok_or(Refused::NoSuchMailbox)?;
        let taken: Vec<(u32, Message)> = source
            .messages
            .iter()
            .filter(|(uid, _)| uids.contains(uid))
            .map(|(&uid, message)| (uid, message.clone()))
            .collect();
        if taken.is_empty() {
            return Ok(Vec::new());
        }
        let target = self.mailbox(to).ok_or(Refused::NoSuchMailbox)?;
        target.spell(taken.iter().flat_map(|(_, message)| &message.flags), true)?;
        target.highest_modseq += 1;
        let modseq = target.highest_modseq;
        let mut pairs = Vec::new();
        for (uid, message) in taken {
            let flags = target.spell(&message.flags, true)?;
            pairs.push((uid, target.put(Message { flags, modseq, ..message })));
        }
        if is_move {
            let gone = pairs.iter().map(|&(uid, _)| uid).collect();
            self.mailbox(from).ok_or(Refused::NoSuchMailbox)?.remove(&gone);
        }
        Ok(pairs)
    }
}
