//! How soon a client in IDLE hears of a message after whoever delivered it knows that it is stored.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use tokio::runtime::Builder;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::calibrate::Calibration;
use crate::corpus::{Corpus, Fill};
use crate::drive::{Load, Ran, Tally};
use crate::idle::Idlers;
use crate::imap;
use crate::lmtp::{self, Data, LmtpError};
use crate::observe::{Cost, Watch};
use crate::open_loop::{Alarm, Arrivals};
use crate::report::Report;
use crate::stream::{Address, Connector};

#[derive(Clone, Debug, Args)]
pub struct Push {
    /// Where to deliver: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    lmtp: Address,
    #[command(flatten)]
    idlers: Idlers,
    /// The size of the message that is delivered
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    size: usize,
    /// --connections are those in IDLE, which must have users of their own; all is done by one thread. With --rate,
    /// deliveries begin when they are due or when the last has its reply, whether or not it was heard of; without it, when the
    /// last was heard of. --seed decides which connections get mail, too
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

/// What a connection in IDLE has heard.
#[derive(Default)]
struct Ear {
    /// Numbers of EXISTS, and when they were read.
    heard: RefCell<Vec<(u32, Instant)>>,
    more: Notify,
}

impl Ear {
    /// When the mailbox was first said to have so many messages.
    async fn hears(&self, count: u32) -> Instant {
        loop {
            // Before it is looked, so that nothing is missed in between.
            let more = self.more.notified();
            if let Some(at) = first(&self.heard.borrow(), count) {
                return at;
            }
            more.await;
        }
    }
}

fn first(heard: &[(u32, Instant)], count: u32) -> Option<Instant> {
    heard.iter().find(|(exists, _)| *exists >= count).map(|(_, at)| *at)
}

impl Push {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        if self.load.connections > self.idlers.users.user_count {
            return Err("each connection needs a user of its own: --user-count is less than --connections".into());
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, measure(self))
    }
}

async fn measure(plan: Push) -> Result<bool, Box<dyn Error>> {
    let idlers = Arc::new(plan.idlers.clone());
    let (clients, errors) = Arc::clone(&idlers).open(plan.load.connections.max(1)).await?;
    if let Some(error) = errors.first() {
        return Err(format!("{} connections could not be brought to IDLE, the first: {error}", errors.len()).into());
    }
    let (mut ears, mut counts) = (Vec::with_capacity(clients.len()), Vec::with_capacity(clients.len()));
    for (client, exists) in clients {
        let ear = Rc::new(Ear::default());
        tokio::task::spawn_local(listen(client, Rc::clone(&ear)));
        ears.push(ear);
        counts.push(exists);
    }
    let connector = Connector::new(&plan.lmtp, None)?;
    let mut deliverer = lmtp::Client::connect(&connector, true).await.map_err(|error| error.to_string())?;
    let corpus = Corpus::synthetic(plan.size, Fill::Words);
    let data = Data::new(&corpus.mail[0].bytes);
    let names = idlers.users.names();

    let limit = plan.load.operation_timeout();
    let tally = Rc::new(RefCell::new(Tally::default()));
    let mut arrivals = plan.load.rate.map(|rate| (Arrivals::new(plan.load.seed, rate), Alarm::default()));
    let mut waiting = Vec::new();
    let mut random = plan.load.seed;
    let calibration = plan.load.calibrate.as_deref().map(Calibration::measure).transpose()?;
    let before = plan.watch.snapshot_before()?;
    let following = plan.watch.follow()?;
    let start = Instant::now();
    let mut delivered = 0;
    while plan.load.goes_on(delivered, start.elapsed()) {
        let mut due = Instant::now();
        if let Some((arrivals, alarm)) = &mut arrivals {
            due = start + arrivals.following();
            if plan.load.duration().is_some_and(|duration| due >= start + duration) {
                break;
            }
            alarm.wait_until(due).await?;
        }
        delivered += 1;
        let chosen = (next_random(&mut random) % ears.len() as u64) as usize;
        let outcome = timeout(limit, deliverer.deliver(&[&names[chosen]], &data, || {})).await;
        let acknowledged = Instant::now();
        let outcome = outcome.unwrap_or(Err(LmtpError::Io(std::io::ErrorKind::TimedOut)));
        let refusal = match outcome {
            Ok(outcome) => outcome.refused.into_iter().next(),
            Err(error) => {
                // The connection is of no use any more.
                tally.borrow_mut().count_error(error.kind(), || error.to_string());
                break;
            }
        };
        if let Some(error) = refusal {
            tally.borrow_mut().count_error(error.kind(), || error.to_string());
            continue;
        }
        counts[chosen] += 1;
        tally.borrow_mut().count_second(acknowledged - due);
        let (ear, tally, count) = (Rc::clone(&ears[chosen]), Rc::clone(&tally), counts[chosen]);
        let octets = data.octets() as u64;
        let waits = tokio::task::spawn_local(async move {
            match timeout(limit, ear.hears(count)).await {
                Ok(heard) => {
                    let mut tally = tally.borrow_mut();
                    tally.count(octets, heard.saturating_duration_since(acknowledged));
                    *tally.counts.entry("heard before").or_default() += u64::from(heard < acknowledged);
                }
                Err(_) => {
                    let what = || format!("no EXISTS for message {count} of connection {chosen}");
                    tally.borrow_mut().count_error("not heard of".to_owned(), what);
                }
            }
        });
        if arrivals.is_some() {
            waiting.push(waits);
        } else {
            waits.await?;
        }
    }
    for waits in waiting {
        waits.await?;
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(following);
    let cost = Cost::between(&before, &plan.watch.snapshot()?);
    let client_cpu_share = cost.client_cpu_s / seconds;
    let ran = Ran { seconds, tally: tally.take(), cost, client_cpu_share, arrivals: None, calibration };
    let mut parameters = BTreeMap::new();
    parameters.insert("server", idlers.imap.to_string().into());
    parameters.insert("lmtp", plan.lmtp.to_string().into());
    parameters.insert("tls", idlers.tls.tls.into());
    parameters.insert("users", idlers.users.pattern.as_str().into());
    parameters.insert("user_count", idlers.users.user_count.into());
    parameters.insert("mailbox", idlers.mailbox.as_str().into());
    parameters.insert("size", plan.size.into());
    Report::new("push", "EXISTS heard of", Some("the delivery"), &plan.load, parameters, ran).print(plan.load.json)
}

/// Reads what the server pushes until the connection ends, which those who wait for more then find out.
async fn listen(mut client: imap::Client, ear: Rc<Ear>) {
    while let Ok(response) = client.response().await {
        if let Some((exists, _)) = response.numbered("EXISTS") {
            ear.heard.borrow_mut().push((exists, Instant::now()));
            ear.more.notify_waiters();
        }
    }
}

/// SplitMix64: the same connections in each run, in no order.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_exists_may_tell_of_several_messages() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let heard = [(3, at(1)), (5, at(2)), (6, at(3))];
        assert_eq!(first(&heard, 3), Some(at(1)));
        assert_eq!(first(&heard, 4), Some(at(2)));
        assert_eq!(first(&heard, 5), Some(at(2)));
        assert_eq!(first(&heard, 7), None);
    }
}
