//! Appending messages over IMAP.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::corpus::Mail;
use crate::drive::{self, Load, Seat};
use crate::imap::{Client, ImapError, code_after};
use crate::mail::MailOptions;
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, close, repeat};
use crate::stream::Connector;
use crate::verify::{ContentHash, Ledger, VerifyOptions};

#[derive(Clone, Debug, Args)]
pub struct Append {
    #[command(flatten)]
    login: Login,
    /// The mailbox that messages are appended to; it is made if it is not there
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    /// Flags of the messages, separated by spaces
    #[arg(long, value_name = "FLAGS", default_value = "\\Seen")]
    flags: String,
    #[command(flatten)]
    mail: MailOptions,
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    verify: VerifyOptions,
}

struct Plan {
    options: Append,
    mail: Vec<Mail>,
    flags: String,
    /// What --verify compares with, and the hashes of the messages in their order.
    record: Option<(Ledger, Vec<ContentHash>)>,
}

impl Append {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let corpus = self.mail.load()?;
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("flags", self.flags.as_str().into());
        self.mail.describe(&corpus, &mut parameters);
        parameters.insert("verify", self.verify.verify.into());
        let connector = self.login.connector()?;
        let (users, limit) = (self.login.users.names(), self.load.operation_timeout());
        let verifier = self.verify.verifier(users, &self.mailbox, Some(&self.login.password), limit)?;
        let record = || {
            let contents = corpus.mail.iter().map(|mail| ContentHash::of(&mail.bytes)).collect();
            (Ledger::default(), contents)
        };
        let record = verifier.is_some().then(record);
        let flags = if self.flags.is_empty() { String::new() } else { format!("({})", self.flags) };
        let plan = Arc::new(Plan { options: self, mail: corpus.mail, flags, record });
        let (shared, load) = (Arc::clone(&plan), &plan.options.load);
        let ran = drive::run(load, &plan.options.watch, move |seat| {
            connection(seat, Arc::clone(&shared), connector.of_own())
        })?;
        let mut report = Report::new("append", "messages appended", None, load, parameters, ran);
        if let (Some(verifier), Some((ledger, _))) = (verifier, &plan.record) {
            report.verdict = Some(verifier.verify(ledger)?);
        }
        report.print_and_judge(load.json)
    }
}

/// A connection and the UID of what it appended last.
struct Opened {
    client: Client,
    last_uid: u32,
}

async fn connection(seat: Seat, plan: Arc<Plan>, connector: Connector) {
    let open = async || {
        let mut client = plan.options.login.client(&connector, seat.index).await?;
        client.create(&plan.options.mailbox).await?;
        Ok(Opened { client, last_uid: 0 })
    };
    let operation = async |opened: &mut Opened, number: u64| {
        let message = (number % plan.mail.len() as u64) as usize;
        let mail = &plan.mail[message];
        let code = match &plan.record {
            None => opened.client.append(&plan.options.mailbox, &plan.flags, &mail.bytes, |_| Ok(())).await?,
            Some((ledger, contents)) => {
                let user = seat.index % plan.options.login.users.user_count.max(1);
                ledger.sent(number, user, contents[message]);
                let numbered = [ledger.header(number).as_bytes(), &mail.bytes].concat();
                let appended = opened.client.append(&plan.options.mailbox, &plan.flags, &numbered, |_| Ok(())).await;
                match &appended {
                    Ok(_) => ledger.acknowledged(number, user),
                    Err(ImapError::Refused(_, line)) if !line.starts_with("* ") => ledger.refused(number, user),
                    // Nobody knows.
                    Err(_) => {}
                }
                appended?
            }
        };
        if opened.client.capabilities().await?.has("UIDPLUS") {
            let uid = appended_uid(code.as_deref())?;
            if uid <= opened.last_uid {
                let what = format!("UID {uid} after {}", opened.last_uid);
                return Err(ImapError::Wrong("UIDs do not ascend", what));
            }
            opened.last_uid = uid;
        }
        Ok(Done::one(mail.bytes.len() as u64))
    };
    if let Some(opened) = repeat(&seat, &plan.options.load, open, operation).await {
        close(&plan.options.load, opened.client).await;
    }
}

/// The UID in an APPENDUID code (RFC 4315, 3).
fn appended_uid(code: Option<&str>) -> Result<u32, ImapError> {
    let uid = code.and_then(|code| code_after(code, "APPENDUID")?.split(' ').nth(1)?.parse().ok());
    uid.ok_or_else(|| ImapError::Wrong("APPENDUID missing", format!("{code:?} after APPEND, and UIDPLUS is announced")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_are_found() {
        assert_eq!(appended_uid(Some("appenduid 1 23")), Ok(23));
        for code in [None, Some("APPENDUID 1"), Some("READ-WRITE"), Some("APPENDUID 1 x")] {
            assert!(appended_uid(code).is_err(), "{code:?}");
        }
    }
}
