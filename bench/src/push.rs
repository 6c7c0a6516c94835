//! How soon a client in IDLE hears of a message after whoever delivered it knows that it is stored.

use std::cell::{Cell, RefCell};
use std::error::Error;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use tokio::runtime::Builder;
use tokio::sync::Notify;
use tokio::task::LocalSet;
use tokio::time::timeout;

use crate::corpus::{Corpus, Fill};
use crate::deliver::MailServer;
use crate::drive::{Load, Ran, Tally};
use crate::idle::Idlers;
use crate::imap;
use crate::lmtp::{self, Data, LmtpError};
use crate::observe::{Cost, Watch};
use crate::open_loop::{Alarm, Arrivals};
use crate::report::Report;
use crate::session::limited;
use crate::stream::Connector;

#[derive(Clone, Debug, Args)]
pub struct Push {
    #[command(flatten)]
    server: MailServer,
    #[command(flatten)]
    idlers: Idlers,
    /// Connections that deliver at the same time
    #[arg(long, value_name = "N", default_value_t = 1)]
    senders: usize,
    /// The size of the message that is delivered
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    size: usize,
    /// --connections are those in IDLE, which must have users of their own; all is done by one thread. With --rate,
    /// deliveries begin when they are due and a sender is free, whether or not the last was heard of; without it, when the
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
        self.idlers.login.one_user_each(&self.load)?;
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
    let connector = Connector::new(plan.server.address(), None)?;
    let mut deliverers = Vec::new();
    for _ in 0..plan.senders.max(1) {
        let connecting = lmtp::Client::connect_by(plan.server.protocol(), &connector, true);
        deliverers.push(connecting.await.map_err(|error| error.to_string())?);
    }
    let corpus = Corpus::synthetic(plan.size, Fill::Words);
    let arrivals = plan.load.rate.map(|rate| (Arrivals::new(plan.load.seed, rate), Alarm::default()));
    let calibration = plan.load.keep.calibration()?;
    let before = plan.watch.snapshot_before()?;
    let following = plan.watch.follow()?;
    let shared = Rc::new(Shared {
        ears,
        counts: RefCell::new(counts),
        names: idlers.login.users.names(),
        data: Data::new(&corpus.mail[0].bytes),
        load: plan.load.clone(),
        tally: RefCell::new(Tally::default()),
        arrivals: arrivals.map(tokio::sync::Mutex::new),
        random: Cell::new(plan.load.seed),
        delivered: Cell::new(0),
        start: Instant::now(),
    });
    let senders: Vec<_> =
        deliverers.into_iter().map(|deliverer| tokio::task::spawn_local(send(deliverer, Rc::clone(&shared)))).collect();
    for sender in senders {
        sender.await?;
    }
    let seconds = shared.start.elapsed().as_secs_f64();
    drop(following);
    let cost = Cost::between(&before, &plan.watch.snapshot()?);
    let client_cpu_share = cost.client_cpu_s / seconds;
    let ran = Ran { seconds, tally: shared.tally.take(), cost, client_cpu_share, arrivals: None, calibration };
    let mut parameters = idlers.login.parameters();
    plan.server.describe(&mut parameters);
    parameters.insert("senders", plan.senders.into());
    parameters.insert("mailbox", idlers.mailbox.as_str().into());
    parameters.insert("size", plan.size.into());
    Report::new("push", "EXISTS heard of", Some("the delivery"), &plan.load, parameters, ran).print(plan.load.json)
}

/// What those who deliver share.
struct Shared {
    ears: Vec<Rc<Ear>>,
    /// Messages that each connection's mailbox has.
    counts: RefCell<Vec<u32>>,
    names: Vec<String>,
    data: Data,
    load: Load,
    tally: RefCell<Tally>,
    /// When deliveries are due. Whoever has it waits for the next.
    arrivals: Option<tokio::sync::Mutex<(Arrivals, Alarm)>>,
    random: Cell<u64>,
    delivered: Cell<u64>,
    start: Instant,
}

/// Delivers one message after another until the run is over, and waits until the last is heard of.
async fn send(mut deliverer: lmtp::Client, shared: Rc<Shared>) {
    let limit = shared.load.operation_timeout();
    let mut waiting = Vec::new();
    while shared.load.goes_on(shared.delivered.get(), shared.start.elapsed()) {
        shared.delivered.set(shared.delivered.get() + 1);
        let mut due = Instant::now();
        if let Some(arrivals) = &shared.arrivals {
            let (arrivals, alarm) = &mut *arrivals.lock().await;
            due = shared.start + arrivals.following();
            if shared.load.duration().is_some_and(|duration| due >= shared.start + duration) {
                break;
            }
            alarm.wait_until(due).await.expect("the system has timers");
        }
        let mut random = shared.random.get();
        let chosen = (next_random(&mut random) % shared.ears.len() as u64) as usize;
        shared.random.set(random);
        let recipients = [shared.names[chosen].as_str()];
        let delivery = deliverer.deliver(&recipients, &shared.data, || {});
        let outcome: Result<_, LmtpError> = limited(limit, delivery).await;
        let acknowledged = Instant::now();
        let refusal = match outcome {
            Ok(outcome) => outcome.refused.into_iter().next(),
            Err(error) => {
                // The connection is of no use any more.
                shared.tally.borrow_mut().count_error(error.kind(), || error.to_string());
                break;
            }
        };
        if let Some(error) = refusal {
            shared.tally.borrow_mut().count_error(error.kind(), || error.to_string());
            continue;
        }
        // With several senders to one mailbox: as many must have been heard of as are acknowledged.
        shared.counts.borrow_mut()[chosen] += 1;
        let count = shared.counts.borrow()[chosen];
        shared.tally.borrow_mut().count_second(acknowledged - due);
        let waits = tokio::task::spawn_local(hear(Rc::clone(&shared), chosen, count, acknowledged));
        if shared.arrivals.is_some() {
            waiting.push(waits);
        } else {
            waits.await.expect("who waits does not panic");
        }
    }
    for waits in waiting {
        waits.await.expect("who waits does not panic");
    }
}

/// Waits until a connection has heard of so many messages.
async fn hear(shared: Rc<Shared>, chosen: usize, count: u32, acknowledged: Instant) {
    let heard = timeout(shared.load.operation_timeout(), shared.ears[chosen].hears(count)).await;
    let mut tally = shared.tally.borrow_mut();
    match heard {
        Ok(heard) => {
            tally.count(shared.data.octets() as u64, heard.saturating_duration_since(acknowledged));
            *tally.counts.entry("heard before").or_default() += u64::from(heard < acknowledged);
        }
        Err(_) => {
            let what = || format!("no EXISTS for message {count} of connection {chosen}");
            tally.count_error("not heard of".to_owned(), what);
        }
    }
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
