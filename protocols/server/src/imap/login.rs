//! Before and at login: CAPABILITY, LOGIN, AUTHENTICATE, ENABLE, ID.

use std::sync::Arc;

use posthaste_imap::command::Secret;
use posthaste_imap::response::{Code, Status, write_continuation, write_id, write_untagged, write_untagged_text};
use posthaste_imap::{decode_base64, decode_sasl_plain};

use super::{Answer, Failure, Outcome, Owed, Session, Stop};
use crate::limits;
use crate::listen::Protocol;
use crate::login::{LogIn, log_in};

impl Session {
    pub(super) fn greet(&mut self) {
        let code = Code::Capability(self.capabilities(false).into());
        write_untagged(&mut self.output, Status::Ok, Some(&code), "Posthaste is ready");
    }

    /// Only what is whole: a client must be able to build on what it is told.
    fn capabilities(&self, logged_in: bool) -> String {
        if !logged_in {
            let tls = if self.connection.is_tls() { "" } else { " STARTTLS" };
            let auth = if self.connection.allows_passwords() { "AUTH=PLAIN" } else { "LOGINDISABLED" };
            return format!("IMAP4rev1 LITERAL+ SASL-IR ID ENABLE{tls} {auth}");
        }
        format!(
            "IMAP4rev1 LITERAL+ SASL-IR ID ENABLE IDLE NAMESPACE CHILDREN UNSELECT UIDPLUS MOVE CONDSTORE STATUS=SIZE \
             SPECIAL-USE CREATE-SPECIAL-USE OBJECTID PREVIEW APPENDLIMIT={}",
            self.context.node.config.limits.message_bytes
        )
    }

    pub(super) fn write_capabilities(&mut self) {
        let capabilities = self.capabilities(self.user.is_some());
        write_untagged_text(&mut self.output, "CAPABILITY", &capabilities);
    }

    pub(super) fn identify(&mut self) -> Answer {
        write_id(&mut self.output, &[("name", "Posthaste")]);
        Answer::ok("Pleased to meet you")
    }

    /// ENABLE (RFC 5161): what is not known is passed over.
    pub(super) fn enable(&mut self, names: &[String]) -> Answer {
        let condstore = names.iter().any(|name| name == "CONDSTORE");
        write_untagged_text(&mut self.output, "ENABLED", if condstore { "CONDSTORE" } else { "" });
        if condstore {
            self.enable_condstore();
        }
        Answer::ok("Enabled")
    }

    /// STARTTLS (RFC 3501, 6.2.1). Trap 1: what came in the clear after it is forgotten.
    pub(super) async fn start_tls(&mut self, tag: &str) -> Result<(), Stop> {
        if self.user.is_some() || self.connection.is_tls() {
            self.answer(tag, &Answer::bad("TLS can begin only once, and before the login"));
            return self.count_bad(Status::Bad);
        }
        self.answer(tag, &Answer::ok("Begin TLS now"));
        self.flush().await?;
        self.input.clear();
        self.taken = 0;
        Ok(self.connection.start_tls(Protocol::Imap).await?)
    }

    pub(super) async fn authenticate(&mut self, tag: &str, mechanism: &str, initial: Option<Vec<u8>>) -> Outcome {
        if mechanism != "PLAIN" {
            return Ok(Answer::no(Some(Code::Cannot), "There is PLAIN only"));
        }
        self.check_plaintext()?;
        match initial {
            Some(message) => self.take_sasl_plain(&message).await,
            None => {
                write_continuation(&mut self.output, "");
                self.owed = Some(Owed::Sasl(tag.into()));
                Ok(Answer::ok(""))
            }
        }
    }

    pub(super) async fn take_sasl_response(&mut self, line: &[u8]) -> Outcome {
        if line == b"*" {
            return Ok(Answer::bad("Cancelled"));
        }
        match decode_base64(line) {
            Some(message) => self.take_sasl_plain(&message).await,
            None => Ok(Answer::bad("Response is not base64")),
        }
    }

    async fn take_sasl_plain(&mut self, message: &[u8]) -> Outcome {
        let Some((authorize, user, password)) = decode_sasl_plain(message) else {
            return Ok(Answer::bad("Response is not that of PLAIN"));
        };
        let authorize = if authorize.is_empty() { user } else { authorize };
        let password = Secret(password.to_owned());
        self.log_in(authorize, user, password).await
    }

    /// RFC 9051, 6.2.3: no passwords in the clear unless the operator wants them.
    fn check_plaintext(&self) -> Result<(), Failure> {
        if self.connection.allows_passwords() {
            return Ok(());
        }
        Err(Answer::no(Some(Code::PrivacyRequired), "No passwords without TLS: use STARTTLS first").into())
    }

    /// Logs `user` in, to act as `authorize`.
    pub(super) async fn log_in(&mut self, authorize: &str, user: &str, password: Secret) -> Outcome {
        self.check_plaintext()?;
        let account = match log_in(&self.context, &self.connection, authorize, user, password.0).await {
            LogIn::Yes(account) => account,
            LogIn::Refused(why) => return Ok(Answer::no(Some(Code::Limit), why)),
            LogIn::NotAs => return Ok(Answer::no(Some(Code::AuthorizationFailed), "You cannot act as that user")),
            LogIn::Wrong => {
                let wrong = Answer::no(Some(Code::AuthenticationFailed), "Wrong user name or password");
                self.login_failures += 1;
                if self.login_failures >= limits::LOGIN_FAILURES_MAX {
                    self.bye(None, "Too many failed logins");
                    return Err(Failure::Stop(Stop::Over(Some(wrong))));
                }
                return Ok(wrong);
            }
        };
        if !self.enter(Arc::clone(&account)) {
            return Err(Failure::Stop(Stop::Move(account)));
        }
        Ok(self.logged_in())
    }

    /// The answer to a login, also to one that goes on at another worker.
    pub(super) fn logged_in(&self) -> Answer {
        Answer::ok("Logged in").with(Code::Capability(self.capabilities(true).into()))
    }
}
