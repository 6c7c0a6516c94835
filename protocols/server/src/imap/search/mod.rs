//! SEARCH (RFC 3501, 6.4.4; RFC 7162, 3.1.5).
//!
//! What the index knows comes first, for all messages at once: it decides most of them. Only the messages that are still
//! undecided are read: their digest where the Date field is asked for, then their header, then all of them. Nothing of this
//! holds the worker for longer than some 200 us.

mod text;
mod tree;

use std::collections::BTreeMap;
use std::rc::Rc;

use posthaste_engine::error::EngineError;
use posthaste_engine::flags::{Flags, UidSet};
use posthaste_engine::ids::{MailboxId, Uid};
use posthaste_engine::index::{MailboxIndex, Message};
use posthaste_engine::io::Runtime;
use posthaste_imap::command::search::{Search, SearchKey, SearchReturnOptions};
use posthaste_imap::response::{
    SearchReturn, write_esearch, write_search_end, write_search_numbers, write_search_start,
};
use posthaste_imap::types::coalesce;
use posthaste_mime::search::Place;
use roaring::RoaringBitmap;

use super::{Answer, Failure, Outcome, Session, those_left};
use crate::limits;
use crate::node::{Shard, View};
use text::Reader;
use tree::{Each, Test};

/// Asked of the index at once, so that no copy is large.
const CHUNK_MESSAGES_MAX: usize = 2048;

impl Session {
    pub(super) async fn search(&mut self, tag: &str, search: Search) -> Outcome {
        if search.returns.is_some_and(|returns| returns.save) {
            return Ok(Answer::bad("SAVE is not supported"));
        }
        let asks_modseq = mentions(&search.key, |key| matches!(key, SearchKey::ModSeq(_)));
        if mentions(&search.key, |key| matches!(key, SearchKey::Keyword(_))) {
            self.learn_keywords(Flags::ALL).await?;
        }
        if asks_modseq {
            self.enable_condstore();
        }
        let mut resolved = Resolved::default();
        let test = self.test_of(&search.key, &mut resolved).await?.ordered();
        let view = &self.selected()?.view;
        let (shard, mailbox, mut uids) = (view.shard().clone(), view.mailbox(), view.uids().0);
        uids = shard.look(mailbox, |index| those_left(index, &uids)).await?;
        let tests_each = test.tests_each();
        let mut reader = Reader::new(&self.context, shard.clone(), mailbox, &test, resolved.strings);
        let (mut found, mut modseq) = (RoaringBitmap::new(), 0);
        // A set is combined with others some hundred times as fast as messages are looked at one by one, and nothing is copied
        // for it.
        let by_sets = limits::SEARCH_STEP_TESTS * 128 / test.nodes();
        let size = match tests_each {
            0 => by_sets as u64,
            tests => (limits::SEARCH_STEP_TESTS / tests).min(by_sets).clamp(16, CHUNK_MESSAGES_MAX) as u64,
        };
        for chunk in pieces(&uids, size) {
            let messages =
                if tests_each > 0 { messages_of(&shard, mailbox, &UidSet(chunk.clone())).await? } else { Vec::new() };
            let (mut yes, open) = test.decide(&chunk, &messages);
            for uid in open {
                if reader.decide(&test, Uid(uid)).await? {
                    yes.insert(uid);
                }
            }
            if asks_modseq {
                let of = messages.iter().filter(|message| yes.contains(message.uid.0)).map(|message| message.modseq.0);
                modseq = of.fold(modseq, u64::max);
            }
            found |= yes;
            // One user's search must not keep the others waiting.
            self.context.turn().await;
        }
        let ends_only = |returns: SearchReturnOptions| (returns.min || returns.max) && !returns.all && !returns.count;
        if let Some(returns) = search.returns.filter(|&returns| asks_modseq && ends_only(returns)) {
            // RFC 7162, 3.1.10: the mod-sequence of what is returned, where that is not all.
            let ends = [found.min().filter(|_| returns.min), found.max().filter(|_| returns.max)];
            let modseq_of = |index: &MailboxIndex| {
                let messages = ends.iter().flatten().filter_map(|&uid| index.message(Uid(uid)));
                messages.map(|message| message.modseq.0).max().unwrap_or(0)
            };
            modseq = shard.look(mailbox, modseq_of).await?;
        }
        let is_damaged = reader.is_damaged();
        let modseq = Some(modseq).filter(|&modseq| asks_modseq && modseq > 0);
        self.write_found(tag, &search, found, modseq).await?;
        Ok(Answer::ok(if is_damaged { "Searched, but some that are damaged" } else { "Searched" }))
    }

    /// The answer, which may be long.
    async fn write_found(
        &mut self,
        tag: &str,
        search: &Search,
        found: RoaringBitmap,
        modseq: Option<u64>,
    ) -> Result<(), Failure> {
        let Some(returns) = search.returns else {
            write_search_start(&mut self.output);
            let mut uids = found.iter();
            loop {
                let view = &self.selected()?.view;
                let chunk = uids.by_ref().take(CHUNK_MESSAGES_MAX).filter_map(|uid| number_of(view, search.uid, uid));
                let numbers: Vec<u32> = chunk.collect();
                if numbers.is_empty() {
                    break;
                }
                write_search_numbers(&mut self.output, numbers);
                self.flush_if_full().await?;
                self.context.turn().await;
            }
            write_search_end(&mut self.output, modseq);
            return Ok(());
        };
        let runs = if returns.all { self.runs_of(search.uid, &found).await? } else { Vec::new() };
        let view = &self.selected()?.view;
        let (first, last) = (found.min().filter(|_| returns.min), found.max().filter(|_| returns.max));
        let mut data = Vec::new();
        data.extend(first.and_then(|uid| number_of(view, search.uid, uid)).map(SearchReturn::Min));
        data.extend(last.and_then(|uid| number_of(view, search.uid, uid)).map(SearchReturn::Max));
        if returns.all && !runs.is_empty() {
            data.push(SearchReturn::All(&runs));
        }
        if returns.count {
            data.push(SearchReturn::Count(found.len() as u32));
        }
        data.extend(modseq.map(SearchReturn::ModSeq));
        write_esearch(&mut self.output, tag, search.uid, &data);
        Ok(())
    }

    /// What was found as runs of the numbers that the client speaks in.
    async fn runs_of(&self, uid: bool, found: &RoaringBitmap) -> Result<Vec<(u32, u32)>, Failure> {
        let mut runs: Vec<(u32, u32)> = Vec::new();
        let mut uids = found.iter();
        loop {
            let view = &self.selected()?.view;
            let chunk = uids.by_ref().take(CHUNK_MESSAGES_MAX).filter_map(|found| number_of(view, uid, found));
            let mut new: Vec<(u32, u32)> = chunk.map(|number| (number, number)).collect();
            if new.is_empty() {
                return Ok(runs);
            }
            // Only the last run before can go on.
            new.extend(runs.pop());
            coalesce(&mut new);
            runs.append(&mut new);
            self.context.turn().await;
        }
    }

    /// The test that a key means. The sets of flags are shared, and those of UIDs are as long as the command: so a search takes
    /// no more memory than its command and the flags of the mailbox.
    async fn test_of(&self, key: &SearchKey, resolved: &mut Resolved) -> Result<Test, Failure> {
        let selected = self.selected()?;
        let view = &selected.view;
        let days = |from, before| Test::Each(Each::Days(from, before));
        let seconds = |from, before| Test::Each(Each::Seconds(from, before));
        let now = i64::try_from(self.context.io.wall_clock_ms() / 1000).unwrap_or(i64::MAX);
        let ago = |seconds: u64| now.saturating_sub(i64::try_from(seconds).unwrap_or(i64::MAX));
        Ok(match key {
            SearchKey::All => Test::And(Vec::new()),
            SearchKey::And(keys) => {
                let mut tests = Vec::with_capacity(keys.len());
                for key in keys {
                    tests.push(Box::pin(self.test_of(key, resolved)).await?);
                }
                Test::And(tests)
            }
            SearchKey::Or(keys) => {
                let first = Box::pin(self.test_of(&keys.0, resolved)).await?;
                Test::Or(vec![first, Box::pin(self.test_of(&keys.1, resolved)).await?])
            }
            SearchKey::Not(key) => Test::Not(Box::new(Box::pin(self.test_of(key, resolved)).await?)),
            SearchKey::SequenceNumbers(set) => {
                let runs = set.resolve_uids(view.exists()).ok_or_else(no_saved_result)?;
                // RFC 3501, 9 wants BAD for numbers past the last message. Here they find nothing, because clients search all of a
                // mailbox in ranges without asking how many messages there are.
                let uid_run = |&(first, last): &(u32, u32)| {
                    Some((view.uid_of(first)?.0, view.uid_of(last.min(view.exists()))?.0))
                };
                Test::Runs(runs.iter().filter_map(uid_run).collect())
            }
            SearchKey::Uids(set) => {
                let last = view.last_uid().map_or(0, |uid| uid.0);
                Test::Runs(set.resolve_uids(last).ok_or_else(no_saved_result)?)
            }
            SearchKey::Answered => Test::Set(resolved.with_flag(view, Flags::ANSWERED).await?),
            SearchKey::Deleted => Test::Set(resolved.with_flag(view, Flags::DELETED).await?),
            SearchKey::Draft => Test::Set(resolved.with_flag(view, Flags::DRAFT).await?),
            SearchKey::Flagged => Test::Set(resolved.with_flag(view, Flags::FLAGGED).await?),
            SearchKey::Seen => Test::Set(resolved.with_flag(view, Flags::SEEN).await?),
            SearchKey::Recent => Test::Set(resolved.recent(view)),
            SearchKey::New => {
                let seen = Test::Set(resolved.with_flag(view, Flags::SEEN).await?);
                Test::And(vec![Test::Set(resolved.recent(view)), Test::Not(Box::new(seen))])
            }
            SearchKey::Keyword(name) => {
                match selected.keywords.iter().position(|known| known.eq_ignore_ascii_case(name)) {
                    Some(number) => Test::Set(resolved.with_flag(view, Flags::keyword(number)).await?),
                    None => Test::nothing(),
                }
            }
            SearchKey::Before(date) => days(i64::MIN, date.days_since_epoch()),
            SearchKey::On(date) => days(date.days_since_epoch(), date.days_since_epoch() + 1),
            SearchKey::Since(date) => days(date.days_since_epoch(), i64::MAX),
            SearchKey::Younger(age) => seconds(ago(*age), i64::MAX),
            SearchKey::Older(age) => seconds(i64::MIN, ago(*age).saturating_add(1)),
            SearchKey::Larger(octets) => Test::Each(Each::Larger(*octets)),
            SearchKey::Smaller(octets) => Test::Each(Each::Smaller(*octets)),
            SearchKey::ModSeq(modseq) => Test::Each(Each::ModSeq(*modseq)),
            SearchKey::EmailId(id) => Test::Each(Each::EmailId(id.clone())),
            SearchKey::ThreadId(_) => Test::nothing(),
            SearchKey::SentBefore(date) => Test::Sent(i64::MIN, date.days_since_epoch()),
            SearchKey::SentOn(date) => Test::Sent(date.days_since_epoch(), date.days_since_epoch() + 1),
            SearchKey::SentSince(date) => Test::Sent(date.days_since_epoch(), i64::MAX),
            SearchKey::Address { name, value } => resolved.text(Place::Addresses(name.clone()), value),
            SearchKey::Header { name, value } => resolved.text(Place::Field(name.clone()), value),
            SearchKey::Body(value) => resolved.text(Place::Body, value),
            SearchKey::Text(value) => resolved.text(Place::Text, value),
        })
    }
}

/// What keys refer to.
#[derive(Default)]
struct Resolved {
    strings: Vec<(Place, String)>,
    /// The UIDs that have a flag.
    flags: BTreeMap<u8, Rc<RoaringBitmap>>,
    recent: Option<Rc<RoaringBitmap>>,
}

impl Resolved {
    fn text(&mut self, place: Place, string: &str) -> Test {
        self.strings.push((place, string.to_owned()));
        Test::Text(self.strings.len() - 1)
    }

    async fn with_flag(&mut self, view: &View, flag: Flags) -> Result<Rc<RoaringBitmap>, EngineError> {
        let bit = flag.bits().next().unwrap_or_default() as u8;
        if let Some(known) = self.flags.get(&bit) {
            return Ok(Rc::clone(known));
        }
        let with = |index: &MailboxIndex| index.with_flag(bit).cloned().unwrap_or_default();
        let uids = Rc::new(view.shard().look(view.mailbox(), with).await?);
        self.flags.insert(bit, Rc::clone(&uids));
        Ok(uids)
    }

    fn recent(&mut self, view: &View) -> Rc<RoaringBitmap> {
        Rc::clone(self.recent.get_or_insert_with(|| Rc::new(view.recent_uids().0)))
    }
}

/// What a client that speaks in UIDs, or in sequence numbers, calls a message.
fn number_of(view: &View, in_uids: bool, uid: u32) -> Option<u32> {
    if in_uids { Some(uid) } else { view.sequence_of(Uid(uid)) }
}

fn no_saved_result() -> Failure {
    Answer::bad("There is no saved result").into()
}

/// The set in pieces of at most `size`, without looking at each of its members.
fn pieces(uids: &RoaringBitmap, size: u64) -> impl Iterator<Item = RoaringBitmap> + '_ {
    let mut from = 0;
    std::iter::from_fn(move || {
        // `size` is far below 2^32, as is any number of messages.
        let last = u32::try_from(uids.len().min(from + size).checked_sub(from + 1)? + from).ok()?;
        let range = uids.select(from as u32)?..=uids.select(last)?;
        from = u64::from(last) + 1;
        let mut piece = RoaringBitmap::new();
        piece.insert_range(range);
        Some(piece & uids)
    })
}

async fn messages_of(shard: &Shard, mailbox: MailboxId, uids: &UidSet) -> Result<Vec<Message>, EngineError> {
    let collect = |index: &MailboxIndex| {
        let mut messages = Vec::with_capacity(uids.len() as usize);
        for (first, last) in uids.runs() {
            let start = index.position(Uid(first)).unwrap_or_else(|at| at);
            messages.extend(index.messages.iter_from(start).take_while(|message| message.uid.0 <= last));
        }
        messages
    };
    shard.look(mailbox, collect).await
}

fn mentions(key: &SearchKey, what: fn(&SearchKey) -> bool) -> bool {
    match key {
        SearchKey::And(keys) => keys.iter().any(|key| mentions(key, what)),
        SearchKey::Or(keys) => mentions(&keys.0, what) || mentions(&keys.1, what),
        SearchKey::Not(key) => mentions(key, what),
        key => what(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole() {
        let uids: RoaringBitmap = (1..100).chain(200..1000).chain([5_000_000, u32::MAX - 1]).collect();
        for size in [1, 7, 99, 100, 1000, 1 << 40] {
            let pieces: Vec<RoaringBitmap> = pieces(&uids, size).collect();
            assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.len() <= size), "{size}");
            assert_eq!(pieces.len() as u64, uids.len().div_ceil(size));
            assert_eq!(pieces.into_iter().fold(RoaringBitmap::new(), |all, piece| all | piece), uids);
        }
        assert_eq!(pieces(&RoaringBitmap::new(), 5).count(), 0);
    }
}
