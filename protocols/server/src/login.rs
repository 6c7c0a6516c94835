//! Whether somebody may log in, whatever the protocol.

use std::sync::Arc;

use posthaste_engine::format::record::AccountRecord;

use crate::accounts;
use crate::connection::Connection;
use crate::node::{Context, Counters};

/// What comes of a user name and a password.
pub enum LogIn {
    Yes(Arc<AccountRecord>),
    /// There is no such user, or the password is another: which of them is not told.
    Wrong,
    /// The password is right, and the user may not act as the other.
    NotAs,
    /// The password is right, and a limit would be exceeded: this one.
    Refused(&'static str),
}

/// Checks the password of `user`, who wants to act as `authorize`. A password that was not right before costs some 20 ms,
/// also of a user that does not exist; not on the worker.
pub async fn log_in(
    context: &Context,
    connection: &Connection,
    authorize: &str,
    user: &str,
    password: String,
) -> LogIn {
    let node = Arc::clone(&context.node);
    let name = accounts::login_key(user);
    let account = node.cluster.directory().find(&name);
    let remembered = account
        .as_ref()
        .is_some_and(|account| node.passwords.is_remembered(account.account.0, &account.password, &password));
    let right = remembered || {
        let Some(_turn) = node.password_turn(connection.peer()).await else {
            return LogIn::Refused("Too many logins at once, try again later");
        };
        let (node, account) = (Arc::clone(&node), account.clone());
        let verify = move || {
            let known = account.as_ref().map(|account| (account.account.0, account.password.as_str()));
            node.passwords.verify(known, &password)
        };
        context.io.offload_password(verify).await
    };
    let (session, peer) = (connection.id(), connection.peer());
    match account.filter(|_| right) {
        // Trap 8: nobody may act as somebody else yet.
        Some(account) if accounts::login_key(authorize) == account.name => {
            if let Err(why) = connection.admit_user(account.account.0) {
                tracing::info!(session, user = name, ?peer, why, "refused a login");
                return LogIn::Refused(why);
            }
            Counters::add(&node.counters.logins, 1);
            tracing::debug!(session, user = name, ?peer, "logged in");
            LogIn::Yes(account)
        }
        Some(_) => LogIn::NotAs,
        None => {
            Counters::add(&node.counters.failed_logins, 1);
            tracing::info!(session, user = name, ?peer, "a login failed");
            LogIn::Wrong
        }
    }
}
