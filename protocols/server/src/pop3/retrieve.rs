//! RETR and TOP: a message goes out in pieces as it is read, so that a large one and a slow client cost little memory.

use bytes::Bytes;
use posthaste_engine::error::EngineError;
use posthaste_engine::flags::UidSet;
use posthaste_engine::ids::Uid;
use posthaste_engine::index::Message;
use posthaste_engine::read::Part;
use posthaste_engine::reading::{Piece, WHOLE_OCTETS_MAX};
use posthaste_pop3::{Code, Refusal, Retrieve};

use super::{Pop3, Stop, damaged, refusal_for};
use crate::limits;
use crate::node::Counters;

impl Pop3 {
    pub(super) async fn retrieve(&mut self, wanted: Retrieve) -> Result<(), Stop> {
        let message = match self.find(Uid(wanted.uid)).await {
            Ok(Some(message)) => message,
            Ok(None) => {
                self.session.refuse(&Refusal::new("Another session has expunged the message"), &mut self.output);
                return Ok(());
            }
            Err(error) => {
                self.session.refuse(&refusal_for(&error), &mut self.output);
                return Ok(());
            }
        };
        Counters::add(&self.context.node.counters.messages_fetched, 1);
        if wanted.lines != Some(0) && self.context.is_damaged(message.id) {
            self.session.refuse(&damaged(), &mut self.output);
            return Ok(());
        }
        match wanted.lines {
            Some(0) if message.size <= WHOLE_OCTETS_MAX => self.send_header(&message).await,
            _ => self.send_message(&message, wanted.lines == Some(0)).await,
        }
    }

    /// A message of the maildrop, if it is still there.
    async fn find(&self, uid: Uid) -> Result<Option<Message>, EngineError> {
        let Some(user) = &self.user else { return Ok(None) };
        let found = user.shard.messages(user.inbox, UidSet::one(uid)).await?;
        Ok(found.first().map(|found| found.message))
    }

    /// TOP n 0, for which no body is read.
    async fn send_header(&mut self, message: &Message) -> Result<(), Stop> {
        let Some(user) = &self.user else { return Ok(()) };
        match user.shard.read_message(message, user.inbox, Part::Header).await {
            Ok(read) => {
                self.session.begin_message(&mut self.output);
                self.send_piece(Piece::Header(read.prefix)).await?;
                self.send_piece(Piece::Header(read.header)).await?;
                self.session.end_message(&mut self.output);
            }
            Err(error) => self.session.refuse(&refusal_for(&error), &mut self.output),
        }
        Ok(())
    }

    async fn send_message(&mut self, message: &Message, only_header: bool) -> Result<(), Stop> {
        let Some(user) = &self.user else { return Ok(()) };
        let mut reading = match user.shard.open_message(message, user.inbox).await {
            Ok(reading) => reading,
            Err(error) => {
                self.session.refuse(&refusal_for(&error), &mut self.output);
                return Ok(());
            }
        };
        if only_header {
            let shape = reading.shape();
            reading = reading.only(0..shape.prefix + shape.header);
        }
        self.session.begin_message(&mut self.output);
        loop {
            match reading.next().await {
                Ok(Some(piece)) => {
                    if !self.send_piece(piece).await? {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    // The client has a part of it: without an end, it does not take that for the whole. Of damage, next time it is
                    // known beforehand.
                    let _ = refusal_for(&error);
                    if matches!(error, EngineError::Damaged(_)) {
                        self.context.note_damaged(message.id);
                    }
                    let refusal = Refusal::coded(Code::SysTemp, "The message breaks off");
                    self.session.close(&refusal, &mut self.output);
                    return Err(Stop::Broken);
                }
            }
        }
        self.session.end_message(&mut self.output);
        Ok(())
    }

    /// Sends a piece as far as it is wanted. False if no more is.
    async fn send_piece(&mut self, piece: Piece) -> Result<bool, Stop> {
        let (octets, is_body): (Bytes, bool) = match piece {
            Piece::Header(octets) => (octets, false),
            Piece::Body(octets) => (octets, true),
        };
        for part in octets.chunks(limits::OUTPUT_BYTES) {
            if is_body {
                if !self.session.write_body(part, &mut self.output) {
                    return Ok(false);
                }
            } else {
                self.session.write_header(part, &mut self.output);
            }
            if self.output.len() >= limits::OUTPUT_BYTES {
                self.flush().await?;
            }
        }
        Ok(true)
    }
}
