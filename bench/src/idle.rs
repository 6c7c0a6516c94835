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
use crate::observe::{Machine, cpu_time, rss_anon_bytes};
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
    /// The server's process
    #[arg(long, value_name = "PID")]
    server_pid: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
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
    let pid = plan.server_pid;
    // One client comes and goes first, so that what the server makes once is not counted.
    let idlers = Arc::new(plan.idlers);
    let (mut first, errors) = Arc::clone(&idlers).open(1).await?;
    let Some((mut client, _)) = first.pop() else {
        return Err(format!("the first connection failed: {}", errors[0]).into());
    };
    client.done().await.and(client.logout().await).map_err(|error| error.to_string())?;
    let before = rss_anon_bytes(pid)?;
    let start = Instant::now();
    let cpu_before = cpu_time(pid)?;
    let (clients, errors) = Arc::clone(&idlers).open(plan.connections).await?;
    let messages: u64 = clients.iter().map(|(_, exists)| u64::from(*exists)).sum();
    let first_error = errors.first().map(ToString::to_string);
    let errors = errors.len();
    let opening_s = start.elapsed().as_secs_f64();
    let cpu_open = cpu_time(pid)?;
    tokio::time::sleep(Duration::from_secs_f64(plan.hold)).await;
    let (after, cpu_after) = (rss_anon_bytes(pid)?, cpu_time(pid)?);
    let count = clients.len().max(1) as f64;
    let per_connection = (after as f64 - before as f64) / count;
    let login_cpu_us = (cpu_open - cpu_before).as_secs_f64() * 1e6 / count;
    let idle_cpu_share = (cpu_after - cpu_open).as_secs_f64() / plan.hold;
    if plan.json {
        let report = json!({
            "workload": "idle",
            "version": env!("CARGO_PKG_VERSION"),
            "command": std::env::args().collect::<Vec<_>>(),
            "machine": Machine::this(),
            "connections": clients.len(),
            "tls": idlers.login.tls.tls,
            "messages_selected_each": messages as f64 / count,
            "rss_anon_bytes_before": before,
            "rss_anon_bytes_after": after,
            "rss_anon_bytes_per_connection": per_connection,
            "opening_s": opening_s,
            "server_cpu_us_per_login": login_cpu_us,
            "server_cores_while_idle": idle_cpu_share,
            "errors": errors,
            "first_error": first_error,
        });
        println!("{report}");
    } else {
        println!("     connections  {} in IDLE, with {:.0} messages each", clients.len(), messages as f64 / count);
        println!("   server memory  {per_connection:.0} bytes each (RssAnon {before} before, {after} after)");
        println!("         opening  {opening_s:.1} s, {login_cpu_us:.0} us of server CPU each");
        println!("            idle  {:.2} % of a core in {} s", idle_cpu_share * 100.0, plan.hold);
        println!("          errors  {errors} {}", first_error.unwrap_or_default());
    }
    Ok(errors == 0)
}
