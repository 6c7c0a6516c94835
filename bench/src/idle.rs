//! Connections that wait in IDLE, and what each costs the server.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::runtime::Builder;
use tokio::sync::Semaphore;
use tokio::task::LocalSet;

use crate::imap::{Client, ImapError};
use crate::observe::{Machine, Watch};
use crate::report::{BUILD, Keep};
use crate::session::Login;
use crate::stream::Connector;

/// Which connections to hold in IDLE.
#[derive(Clone, Debug, Args)]
pub struct Idlers {
    #[command(flatten)]
    pub login: Login,
    /// The mailbox that each connection selects
    #[arg(long, value_name = "NAME", default_value = "INBOX")]
    pub mailbox: String,
    /// Connections that log in at the same time
    #[arg(long, value_name = "N", default_value_t = 16)]
    logins: usize,
}

/// Connections in IDLE with the numbers of their messages, and why others are not.
pub type Opened = (Vec<(Client, u32)>, Vec<ImapError>);

impl Idlers {
    /// Opens connections, which take the users in turn. Must run in a `LocalSet`.
    ///
    /// # Errors
    /// What was asked for cannot be.
    pub async fn open(self: Arc<Self>, connections: usize) -> Result<Opened, Box<dyn Error>> {
        let connector = self.login.connector()?;
        let bar = ProgressBar::new(connections as u64);
        let style = ProgressStyle::with_template("{elapsed:>4} [{bar:30}] {pos} of {len} in IDLE")?;
        bar.set_style(style.progress_chars("=> "));
        let permits = Arc::new(Semaphore::new(self.logins.max(1)));
        let opening: Vec<_> = (0..connections)
            .map(|index| {
                let (idlers, permits) = (Arc::clone(&self), Arc::clone(&permits));
                let (connector, bar) = (connector.clone(), bar.clone());
                tokio::task::spawn_local(async move {
                    let _permit = permits.acquire().await.expect("the semaphore is not closed");
                    let opened = idlers.open_one(&connector, index).await;
                    bar.inc(1);
                    opened
                })
            })
            .collect();
        let (mut clients, mut errors) = (Vec::with_capacity(connections), Vec::new());
        for task in opening {
            match task.await? {
                Ok(opened) => clients.push(opened),
                Err(error) => errors.push(error),
            }
        }
        bar.finish_and_clear();
        Ok((clients, errors))
    }

    async fn open_one(&self, connector: &Connector, index: usize) -> Result<(Client, u32), ImapError> {
        let mut client = self.login.client(connector, index).await?;
        let exists = client.select(&self.mailbox, false).await?;
        client.idle().await?;
        Ok((client, exists))
    }
}

#[derive(Clone, Debug, Args)]
pub struct Idle {
    #[command(flatten)]
    idlers: Idlers,
    /// Connections; each takes the users in turn
    #[arg(long, value_name = "N", default_value_t = 1000)]
    connections: usize,
    /// Measure so long with all in IDLE; the server's CPU in this time is reported
    #[arg(long, value_name = "S", default_value_t = 5.0)]
    hold: f64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    keep: Keep,
    #[command(flatten)]
    watch: Watch,
}

impl Idle {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, measure(self))
    }
}

async fn measure(plan: Idle) -> Result<bool, Box<dyn Error>> {
    if !plan.watch.has_server() {
        return Err("what is measured is the server: give --server-pid, --server-cgroup or --server-unit".into());
    }
    let calibration = plan.keep.calibration()?;
    let usage = || plan.watch.usage().map(|usage| usage.expect("there is a server to watch"));
    // One client comes and goes first, so that what the server makes once is not counted.
    let idlers = Arc::new(plan.idlers);
    let (mut first, errors) = Arc::clone(&idlers).open(1).await?;
    let Some((mut client, _)) = first.pop() else {
        return Err(format!("the first connection failed: {}", errors[0]).into());
    };
    client.done().await.and(client.logout().await).map_err(|error| error.to_string())?;
    let before = usage()?;
    let following = plan.watch.follow()?;
    let start = Instant::now();
    let (clients, errors) = Arc::clone(&idlers).open(plan.connections).await?;
    let messages: u64 = clients.iter().map(|(_, exists)| u64::from(*exists)).sum();
    let first_error = errors.first().map(ToString::to_string);
    let errors = errors.len();
    let opening_s = start.elapsed().as_secs_f64();
    let opened = usage()?;
    tokio::time::sleep(Duration::from_secs_f64(plan.hold)).await;
    drop(following);
    let after = usage()?;
    let count = clients.len().max(1) as f64;
    let each = |after: u64, before: u64| (after as f64 - before as f64) / count;
    let (was, is) = (before.memory, after.memory);
    let anon_each = each(is.rss_anon_bytes, was.rss_anon_bytes);
    let pss_each = is.pss_bytes.zip(was.pss_bytes).map(|(is, was)| each(is, was));
    let login_cpu_us = opened.cpu.saturating_sub(before.cpu).as_secs_f64() * 1e6 / count;
    let idle_cpu_share = after.cpu.saturating_sub(opened.cpu).as_secs_f64() / plan.hold;
    let report = json!({
        "workload": "idle",
        "version": env!("CARGO_PKG_VERSION"),
        "build": BUILD,
        "label": plan.keep.label,
        "calibration": calibration,
        "command": std::env::args().collect::<Vec<_>>(),
        "machine": Machine::this(),
        "parameters": {
            "server": idlers.login.imap.to_string(),
            "connections": plan.connections,
            "tls": idlers.login.tls.tls,
            "mailbox": idlers.mailbox,
            "user_count": idlers.login.users.user_count,
            "hold": plan.hold,
        },
        "connections": clients.len(),
        "tls": idlers.login.tls.tls,
        "messages_selected_each": messages as f64 / count,
        "rss_anon_bytes_before": was.rss_anon_bytes,
        "rss_anon_bytes_after": is.rss_anon_bytes,
        "rss_anon_bytes_per_connection": anon_each,
        "pss_bytes_per_connection": pss_each,
        "server_processes": is.processes,
        "server_bytes_max": after.bytes_max,
        "opening_s": opening_s,
        "server_cpu_us_per_login": login_cpu_us,
        "server_cores_while_idle": idle_cpu_share,
        "errors": errors,
        "first_error": first_error,
    });
    plan.keep.append(&report)?;
    if plan.json {
        println!("{report}");
    } else {
        println!("     connections  {} in IDLE, with {:.0} messages each", clients.len(), messages as f64 / count);
        let (before, after) = (was.rss_anon_bytes, is.rss_anon_bytes);
        println!("   server memory  {anon_each:.0} bytes each (RssAnon {before} before, {after} after)");
        if let Some(pss) = pss_each {
            println!("                  {pss:.0} bytes each by PSS, {} processes at the end", is.processes);
        }
        println!("         opening  {opening_s:.1} s, {login_cpu_us:.0} us of server CPU each");
        println!("            idle  {:.2} % of a core in {} s", idle_cpu_share * 100.0, plan.hold);
        println!("          errors  {errors} {}", first_error.unwrap_or_default());
    }
    Ok(errors == 0)
}
