//! SEARCH over what the index and the digests know: flags, UIDs, sequence numbers, dates, sizes, mod-sequences, ids. Keys
//! that need the text of messages are refused: there is no decoding of it yet.

use posthaste_engine::flags::Flags;
use posthaste_engine::io::Runtime;
use posthaste_engine::read::MessageInfo;
use posthaste_imap::command::search::{Search, SearchKey};
use posthaste_imap::response::{Code, SearchReturn, write_esearch, write_search};
use posthaste_imap::types::{DateTime, coalesce};
use posthaste_mime::date::SentDate;
use posthaste_mime::digest::DigestBytes;
use roaring::RoaringBitmap;

use super::fetch::{chunks, digest_of};
use super::select::Selected;
use super::{Answer, Failure, Outcome, Session};
use crate::limits;

/// A key with its sets resolved to UIDs and its keywords to bits.
enum Test {
    All,
    None,
    And(Vec<Test>),
    Or(Box<(Test, Test)>),
    Not(Box<Test>),
    Uids(RoaringBitmap),
    Flags(Flags),
    Recent,
    /// Day of arrival, from and before.
    Days(i64, i64),
    /// Day of the Date field, from and before.
    Sent(i64, i64),
    /// Time of arrival, from and before.
    Seconds(i64, i64),
    Larger(u64),
    Smaller(u64),
    ModSeq(u64),
    EmailId(String),
}

impl Test {
    fn matches(&self, selected: &Selected, info: &MessageInfo, sent: Option<SentDate>) -> bool {
        let message = &info.message;
        match self {
            Self::All => true,
            Self::None => false,
            Self::And(tests) => tests.iter().all(|test| test.matches(selected, info, sent)),
            Self::Or(tests) => tests.0.matches(selected, info, sent) || tests.1.matches(selected, info, sent),
            Self::Not(test) => !test.matches(selected, info, sent),
            Self::Uids(uids) => uids.contains(message.uid.0),
            Self::Flags(flags) => info.flags.contains(*flags),
            Self::Recent => selected.view.is_recent(message.uid),
            Self::Days(from, before) => {
                let date = DateTime { unix_seconds: message.internal_date, offset_minutes: message.zone_minutes };
                (*from..*before).contains(&date.local_days())
            }
            Self::Sent(from, before) => sent.is_some_and(|sent| (*from..*before).contains(&i64::from(sent.local_day))),
            Self::Seconds(from, before) => (*from..*before).contains(&message.internal_date),
            Self::Larger(octets) => message.size > *octets,
            Self::Smaller(octets) => message.size < *octets,
            Self::ModSeq(modseq) => message.modseq.0 >= *modseq,
            Self::EmailId(id) => message.id.to_string() == *id,
        }
    }
}

impl Session {
    pub(super) async fn search(&mut self, tag: &str, search: Search) -> Outcome {
        if search.returns.is_some_and(|returns| returns.save) {
            return Ok(Answer::bad("SAVE is not supported"));
        }
        let asks_modseq = mentions(&search.key, |key| matches!(key, SearchKey::ModSeq(_)));
        if mentions(&search.key, |key| matches!(key, SearchKey::Keyword(_))) {
            self.learn_keywords(Flags::ALL).await?;
        }
        self.condstore |= asks_modseq;
        let asks_sent = mentions(&search.key, |key| {
            matches!(key, SearchKey::SentBefore(_) | SearchKey::SentOn(_) | SearchKey::SentSince(_))
        });
        let now = i64::try_from(self.context.io.wall_clock_ms() / 1000).unwrap_or(i64::MAX);
        let test = self.test_of(&search.key, now)?;
        let view = &self.selected()?.view;
        let (shard, mailbox, uids) = (view.shard().clone(), view.mailbox(), view.uids());
        let mut found: Vec<u32> = Vec::new();
        let mut modseq = 0;
        for chunk in chunks(&uids, limits::FETCH_CHUNK) {
            let infos = shard.messages(mailbox, chunk).await?;
            for info in infos {
                let digest = if asks_sent { digest_of(&shard, mailbox, &info.message).await? } else { None };
                let sent = digest.as_ref().and_then(DigestBytes::digest).and_then(|digest| digest.sent_date());
                let selected = self.selected()?;
                if !test.matches(selected, &info, sent) {
                    continue;
                }
                let uid = info.message.uid;
                found.extend(if search.uid { Some(uid.0) } else { selected.view.sequence_of(uid) });
                modseq = modseq.max(info.message.modseq.0);
            }
            // One user's search must not keep the others waiting.
            self.context.io.yield_now().await;
        }
        let modseq = Some(modseq).filter(|&modseq| asks_modseq && modseq > 0);
        match search.returns {
            None => write_search(&mut self.output, found, modseq),
            Some(returns) => {
                let mut runs: Vec<(u32, u32)> = found.iter().map(|&number| (number, number)).collect();
                coalesce(&mut runs);
                let mut data = Vec::new();
                data.extend(found.first().filter(|_| returns.min).map(|&number| SearchReturn::Min(number)));
                data.extend(found.last().filter(|_| returns.max).map(|&number| SearchReturn::Max(number)));
                if returns.all && !runs.is_empty() {
                    data.push(SearchReturn::All(&runs));
                }
                if returns.count {
                    data.push(SearchReturn::Count(found.len() as u32));
                }
                data.extend(modseq.map(SearchReturn::ModSeq));
                write_esearch(&mut self.output, tag, search.uid, &data);
            }
        }
        Ok(Answer::ok("Searched"))
    }

    fn test_of(&self, key: &SearchKey, now: i64) -> Result<Test, Failure> {
        let selected = self.selected()?;
        let all = |keys: &[SearchKey]| keys.iter().map(|key| self.test_of(key, now)).collect::<Result<Vec<_>, _>>();
        Ok(match key {
            SearchKey::All => Test::All,
            SearchKey::And(keys) => Test::And(all(keys)?),
            SearchKey::Or(keys) => Test::Or(Box::new((self.test_of(&keys.0, now)?, self.test_of(&keys.1, now)?))),
            SearchKey::Not(key) => Test::Not(Box::new(self.test_of(key, now)?)),
            SearchKey::SequenceNumbers(set) => Test::Uids(self.resolve(set, false)?.0),
            SearchKey::Uids(set) => Test::Uids(self.resolve(set, true)?.0),
            SearchKey::Answered => Test::Flags(Flags::ANSWERED),
            SearchKey::Deleted => Test::Flags(Flags::DELETED),
            SearchKey::Draft => Test::Flags(Flags::DRAFT),
            SearchKey::Flagged => Test::Flags(Flags::FLAGGED),
            SearchKey::Seen => Test::Flags(Flags::SEEN),
            SearchKey::Recent => Test::Recent,
            SearchKey::New => Test::And(vec![Test::Recent, Test::Not(Box::new(Test::Flags(Flags::SEEN)))]),
            SearchKey::Keyword(name) => {
                match selected.keywords.iter().position(|known| known.eq_ignore_ascii_case(name)) {
                    Some(number) => Test::Flags(Flags::keyword(number)),
                    None => Test::None,
                }
            }
            SearchKey::Before(date) => Test::Days(i64::MIN, date.days_since_epoch()),
            SearchKey::On(date) => Test::Days(date.days_since_epoch(), date.days_since_epoch() + 1),
            SearchKey::Since(date) => Test::Days(date.days_since_epoch(), i64::MAX),
            SearchKey::Younger(seconds) => Test::Seconds(ago(now, *seconds), i64::MAX),
            SearchKey::Older(seconds) => Test::Seconds(i64::MIN, ago(now, *seconds).saturating_add(1)),
            SearchKey::Larger(octets) => Test::Larger(*octets),
            SearchKey::Smaller(octets) => Test::Smaller(*octets),
            SearchKey::ModSeq(modseq) => Test::ModSeq(*modseq),
            SearchKey::EmailId(id) => Test::EmailId(id.clone()),
            SearchKey::ThreadId(_) => Test::None,
            SearchKey::SentBefore(date) => Test::Sent(i64::MIN, date.days_since_epoch()),
            SearchKey::SentOn(date) => Test::Sent(date.days_since_epoch(), date.days_since_epoch() + 1),
            SearchKey::SentSince(date) => Test::Sent(date.days_since_epoch(), i64::MAX),
            SearchKey::Header { .. } | SearchKey::Body(_) | SearchKey::Text(_) => {
                return Err(
                    Answer::no(Some(Code::Cannot), "Search in the text of messages is not supported yet").into()
                );
            }
        })
    }
}

fn ago(now: i64, seconds: u64) -> i64 {
    now.saturating_sub(i64::try_from(seconds).unwrap_or(i64::MAX))
}

fn mentions(key: &SearchKey, what: fn(&SearchKey) -> bool) -> bool {
    match key {
        SearchKey::And(keys) => keys.iter().any(|key| mentions(key, what)),
        SearchKey::Or(keys) => mentions(&keys.0, what) || mentions(&keys.1, what),
        SearchKey::Not(key) => mentions(key, what),
        key => what(key),
    }
}
