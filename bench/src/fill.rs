//! Mailboxes of a connection's own, filled with copies of a message.

use crate::corpus::{Corpus, Fill};
use crate::imap::{Client, ImapError};

/// Makes a mailbox if it is not there, selects it and brings it to `count` messages: what is there already is expunged.
///
/// # Errors
/// The connection, or what the server says.
pub async fn fill(client: &mut Client, mailbox: &str, count: u32, size: usize) -> Result<(), ImapError> {
    client.create(mailbox).await?;
    if client.select(mailbox, false).await? > 0 {
        client.command("STORE", "STORE 1:* +FLAGS.SILENT (\\Deleted)", |_| Ok(())).await?;
        client.command("EXPUNGE", "EXPUNGE", |_| Ok(())).await?;
    }
    refill(client, mailbox, count, size).await
}

/// Brings the selected mailbox, which must be empty, to `count` messages: one is appended, and all are copied until there are
/// enough.
///
/// # Errors
/// The connection, or what the server says.
pub async fn refill(client: &mut Client, mailbox: &str, count: u32, size: usize) -> Result<(), ImapError> {
    if count == 0 {
        return Ok(());
    }
    let message = Corpus::synthetic(size, Fill::Words).mail.remove(0);
    client.append(mailbox, "", &message.bytes, |_| Ok(())).await?;
    let mut exists = client.select(mailbox, false).await?;
    if exists != 1 {
        return Err(ImapError::Wrong(
            "a mailbox has other messages",
            format!("{exists} in {mailbox}, there should be 1"),
        ));
    }
    let name = crate::imap::quote(mailbox);
    while exists < count {
        let copied = exists.min(count - exists);
        client.command("COPY", &format!("COPY 1:{copied} {name}"), |_| Ok(())).await?;
        // A server need not say at once that they are there.
        let before = exists;
        exists = client.select(mailbox, false).await?;
        if exists != before + copied {
            let what = format!("{exists} messages after {copied} were copied to {before}");
            return Err(ImapError::Wrong("copies missing", what));
        }
    }
    Ok(())
}
