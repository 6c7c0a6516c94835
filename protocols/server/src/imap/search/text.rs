//! Reads messages that the index does not decide.

use std::rc::Rc;

use posthaste_engine::error::EngineError;
use posthaste_engine::ids::{MailboxId, Uid};
use posthaste_engine::index::Message;
use posthaste_engine::read::{MessageBytes, Part};
use posthaste_imap::response::Code;
use posthaste_mime::date::SentDate;
use posthaste_mime::digest::DigestBytes;
use posthaste_mime::search::{Buffers, Place, Progress, Query, Scan, Stretches};

use super::super::fetch::{digest_of, room_to_read};
use super::super::{Failure, refusal};
use super::tree::{Known, Test};
use crate::limits;
use crate::node::{Context, Shard};

/// Reads what a search needs, one message after another.
pub(super) struct Reader {
    context: Rc<Context>,
    shard: Shard,
    mailbox: MailboxId,
    query: Query,
    asks_sent: bool,
    /// Whether any string is looked for in header fields alone.
    asks_header: bool,
    is_damaged: bool,
    buffers: Buffers,
    /// Octets read and compared since others had their turn.
    spent: usize,
}

/// What has been read of a message.
struct Open<'s> {
    message: Message,
    sent: Option<Option<SentDate>>,
    header_done: bool,
    body_done: bool,
    query: &'s Query,
    scan: Scan<'s>,
}

impl Known for Open<'_> {
    fn message(&self) -> &Message {
        &self.message
    }

    fn sent(&self) -> Option<Option<SentDate>> {
        self.sent
    }

    fn has(&self, string: usize) -> Option<bool> {
        if self.scan.found(string) {
            return Some(true);
        }
        let done = if self.query.is_in_header(string) { self.header_done } else { self.body_done };
        done.then_some(false)
    }
}

impl Reader {
    pub fn new(
        context: &Rc<Context>,
        shard: Shard,
        mailbox: MailboxId,
        test: &Test,
        strings: Vec<(Place, String)>,
    ) -> Self {
        let query = Query::new(strings);
        let asks_header = (0..query.len()).any(|string| query.is_in_header(string));
        let context = Rc::clone(context);
        Self {
            context,
            shard,
            mailbox,
            query,
            asks_sent: test.asks_sent(),
            asks_header,
            is_damaged: false,
            buffers: Buffers::default(),
            spent: 0,
        }
    }

    /// Whether any message could not be read.
    pub fn is_damaged(&self) -> bool {
        self.is_damaged
    }

    /// Whether a message passes. One that is gone, or that cannot be read, does not.
    pub async fn decide(&mut self, test: &Test, uid: Uid) -> Result<bool, Failure> {
        let Some(message) = self.shard.look(self.mailbox, |index| index.message(uid)).await? else { return Ok(false) };
        let (mut spent, mut buffers) = (self.spent, std::mem::take(&mut self.buffers));
        let decided = self.read(test, message, &mut spent, &mut buffers).await;
        (self.spent, self.buffers) = (spent, buffers);
        match decided {
            // Damage costs the messages that it touches, not the others. This logs it.
            Err(Failure::Answer(answer)) if answer.code == Some(Code::Corruption) => {
                self.is_damaged = true;
                Ok(false)
            }
            decided => decided,
        }
    }

    async fn read(
        &self,
        test: &Test,
        message: Message,
        spent: &mut usize,
        buffers: &mut Buffers,
    ) -> Result<bool, Failure> {
        let scan = Scan::new(&self.query, std::mem::take(buffers));
        let mut open = Open { message, sent: None, header_done: false, body_done: false, query: &self.query, scan };
        let decided = self.look(test, &mut open, spent).await;
        *buffers = open.scan.into_buffers();
        decided
    }

    /// Reads as much of the message as it takes to know whether it passes.
    async fn look(&self, test: &Test, open: &mut Open<'_>, spent: &mut usize) -> Result<bool, Failure> {
        let message = open.message;
        if self.asks_sent {
            let digest = digest_of(&self.context, &self.shard, self.mailbox, &message, None).await?;
            open.sent = Some(digest.as_ref().and_then(DigestBytes::digest).and_then(|digest| digest.sent_date()));
            self.spend(spent, 4096).await;
            if let Some(passes) = test.of(open) {
                return Ok(passes);
            }
        }
        if self.asks_header {
            let bytes = self.bytes(&message, Part::Header).await?;
            self.scan_header(open, &bytes, spent).await;
            if let Some(passes) = test.of(open) {
                return Ok(passes);
            }
        }
        let _room = room_to_read(&self.context, message.size)?;
        let bytes = self.bytes(&message, Part::Whole).await?;
        self.spend(spent, message.size as usize).await;
        if !open.header_done && self.query.asks_header() {
            self.scan_header(open, &bytes, spent).await;
            if let Some(passes) = test.of(open) {
                return Ok(passes);
            }
        }
        let stretches = self.stretches_of(&message, &bytes).await?;
        let (pieces, mut progress) = ([&bytes.header[..], &bytes.body], Progress::default());
        while open.scan.step_body(pieces, &stretches, &mut progress, limits::SEARCH_STEP_OCTETS) {
            *spent = 0;
            self.context.turn().await;
        }
        self.spend(spent, bytes.body.len().min(limits::SEARCH_STEP_OCTETS)).await;
        open.body_done = true;
        // With everything known nothing is undecided.
        Ok(test.of(open).unwrap_or(false))
    }

    async fn bytes(&self, message: &Message, part: Part) -> Result<MessageBytes, Failure> {
        self.shard.read_message(message, self.mailbox, part).await.map_err(damage)
    }

    async fn scan_header(&self, open: &mut Open<'_>, bytes: &MessageBytes, spent: &mut usize) {
        for header in [&bytes.prefix, &bytes.header] {
            let mut progress = Progress::default();
            while open.scan.step_header(header, &mut progress, limits::SEARCH_STEP_OCTETS / 2) {
                *spent = 0;
                self.context.turn().await;
            }
        }
        self.spend(spent, 2 * bytes.header.len().min(limits::SEARCH_STEP_OCTETS)).await;
        open.header_done = true;
    }

    /// Where the parts are: of a small message by looking at it, of a large one by its digest.
    async fn stretches_of(&self, message: &Message, bytes: &MessageBytes) -> Result<Stretches, Failure> {
        if bytes.header.len() + bytes.body.len() <= limits::SEARCH_STEP_OCTETS {
            return Ok(Stretches::of_message(&bytes.rest));
        }
        let digest = digest_of(&self.context, &self.shard, self.mailbox, message, None).await?;
        let stretches = digest.as_ref().and_then(DigestBytes::digest).and_then(Stretches::of_digest);
        Ok(stretches.unwrap_or_default())
    }

    /// Lets others have their turn once enough has been done.
    async fn spend(&self, spent: &mut usize, octets: usize) {
        *spent += octets;
        if *spent >= limits::SEARCH_STEP_OCTETS {
            *spent = 0;
            self.context.turn().await;
        }
    }
}

fn damage(error: EngineError) -> Failure {
    Failure::Answer(refusal(&error))
}
