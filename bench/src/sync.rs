//! The first sync of a client: a whole mailbox over a new connection.

use std::error::Error;
use std::sync::Arc;

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::fetch::What;
use crate::fetch_data::{FetchData, Numbers};
use crate::imap::{Client, ImapError};
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{Done, Login, each};
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Sync {
    /// Each sync takes the next user
    #[command(flatten)]
    login: Login,
    /// The mailbox that is synced
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    mailbox: String,
    #[command(flatten)]
    what: What,
    /// Messages of one command
    #[arg(long, value_name = "N", default_value_t = 50)]
    batch: usize,
    /// --messages counts syncs
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Sync {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(mut self) -> Result<bool, Box<dyn Error>> {
        self.batch = self.batch.max(1);
        let mut parameters = self.login.parameters();
        parameters.insert("mailbox", self.mailbox.as_str().into());
        parameters.insert("item", self.what.items().into());
        parameters.insert("batch", self.batch.into());
        let connector = self.login.connector()?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        Report::new("sync", "first syncs", None, &plan.load, parameters, ran).print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Sync>, connector: Connector) {
    seat.ready().await;
    each(&seat, &plan.load, async |number| sync(&connector, number as usize, &plan).await).await;
}

async fn sync(connector: &Connector, number: usize, plan: &Sync) -> Result<Done, ImapError> {
    let mut client = plan.login.client(connector, number).await?;
    let selected = client.open("SELECT", &plan.mailbox, "", |_| Ok(())).await?;
    let mut bytes = 0;
    let messages = if selected.exists == 0 { Vec::new() } else { list(&mut client, selected.exists).await? };
    for batch in messages.chunks(plan.batch) {
        bytes += fetch(&mut client, batch, plan.what.items()).await?;
    }
    client.logout().await?;
    Ok(Done::one(bytes).also("messages synced", messages.len() as u64))
}

/// The UIDs and sizes of all messages, in ascending order.
async fn list(client: &mut Client, exists: u32) -> Result<Vec<(u32, u64)>, ImapError> {
    let (mut numbers, mut sizes) = (Numbers::default(), Vec::with_capacity(exists as usize));
    client
        .command("UID FETCH", "UID FETCH 1:* (FLAGS RFC822.SIZE)", |response| {
            if let Some((number, list)) = response.numbered("FETCH") {
                let data = FetchData::parse(response, list)?;
                if data.is_update() {
                    return Ok(());
                }
                let (Some(uid), Some(size)) = (data.uid, data.size) else {
                    return Err(format!("no UID or RFC822.SIZE in {:?}", response.text()));
                };
                numbers.take(number, uid);
                sizes.push((uid, size));
            }
            Ok(())
        })
        .await?;
    // Messages may arrive meanwhile.
    if numbers.len() < exists as usize {
        let what = format!("{} FETCH responses for {exists} messages", numbers.len());
        return Err(ImapError::Wrong("FETCH responses missing", what));
    }
    numbers.check(1..=u32::MAX)?;
    sizes.sort_unstable();
    Ok(sizes)
}

/// Fetches one batch of messages and checks that they are all there, and whole messages as large as RFC822.SIZE says.
async fn fetch(client: &mut Client, batch: &[(u32, u64)], items: &str) -> Result<u64, ImapError> {
    let (first, last) = (batch[0].0, batch[batch.len() - 1].0);
    let (mut numbers, mut bytes, mut wrong_size) = (Numbers::default(), 0, None);
    client
        .command("UID FETCH", &format!("UID FETCH {first}:{last} ({items})"), |response| {
            if let Some((number, list)) = response.numbered("FETCH") {
                let data = FetchData::parse(response, list)?;
                let uid = data.uid.ok_or_else(|| format!("no UID in {:?}", response.text()))?;
                bytes += data.octets;
                if data.is_update() && items != "FLAGS" {
                    return Ok(());
                }
                numbers.take(number, uid);
                if let (Some(octets), Ok(at)) = (data.message_octets, batch.binary_search_by_key(&uid, |found| found.0))
                    && octets != batch[at].1
                {
                    wrong_size = Some(format!("UID {uid}: RFC822.SIZE {}, but {octets} octets came", batch[at].1));
                }
            }
            Ok(())
        })
        .await?;
    let uids = numbers.check(1..=u32::MAX)?;
    if !uids.iter().eq(batch.iter().map(|(uid, _)| uid)) {
        let what = format!("{} messages of the {} from UID {first} to {last}", uids.len(), batch.len());
        return Err(ImapError::Wrong("messages missing", what));
    }
    match wrong_size {
        Some(what) => Err(ImapError::Wrong("RFC822.SIZE differs", what)),
        None => Ok(bytes),
    }
}
