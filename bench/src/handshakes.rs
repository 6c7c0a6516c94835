//! Connections that do nothing but begin: the TLS handshake and the greeting, of any protocol whose server speaks first.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use tokio::time::timeout;

use crate::drive::{self, Load, Seat};
use crate::observe::Watch;
use crate::report::Report;
use crate::stream::{Address, Connector, Input, Stream};
use crate::tls::Tls;

/// A greeting is a line; what is longer is none.
const GREETING_OCTETS_MAX: usize = 64 << 10;

#[derive(Clone, Debug, Args)]
pub struct Handshakes {
    /// A service that begins with TLS (imaps, pop3s, smtps): HOST:PORT. Its certificate is not verified
    #[arg(long, value_name = "ADDR")]
    server: Address,
    /// Resume sessions; each connection only those that it has had itself
    #[arg(long)]
    tls_resume: bool,
    /// Without TLS, to see what a connection costs by itself
    #[arg(long, conflicts_with = "tls_resume")]
    plain: bool,
    /// --messages counts handshakes
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    watch: Watch,
}

impl Handshakes {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.server.to_string().into());
        parameters.insert("tls", (!self.plain).into());
        parameters.insert("tls_resume", self.tls_resume.into());
        let connector = Connector::new(&self.server, (!self.plain).then(|| Tls::new(self.tls_resume)))?;
        let plan = Arc::new(self);
        let shared = Arc::clone(&plan);
        let ran =
            drive::run(&plan.load, &plan.watch, move |seat| connection(seat, Arc::clone(&shared), connector.of_own()))?;
        let report = Report::new("handshakes", "handshakes", Some("the greeting"), &plan.load, parameters, ran);
        report.print(plan.load.json)
    }
}

async fn connection(seat: Seat, plan: Arc<Handshakes>, connector: Connector) {
    let limit = plan.load.operation_timeout();
    seat.ready().await;
    while let Some(turn) = seat.turn().await {
        match timeout(limit, begin(&connector, &seat)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
            Ok(()) => seat.count(1, 0, turn.due.elapsed()),
            Err(error) => seat.count_error(error.kind().to_string(), || error.to_string()),
        }
    }
}

async fn begin(connector: &Connector, seat: &Seat) -> io::Result<()> {
    let mut stream = Stream::connect(connector).await?;
    let shaken = Instant::now();
    let mut input = Input::default();
    while !input.unused().ends_with(b"\n") {
        if input.unused().len() > GREETING_OCTETS_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a greeting without an end"));
        }
        stream.read_into(&mut input).await?;
    }
    seat.count_second(shaken.elapsed());
    seat.count_also("resumed", u64::from(stream.is_resumed()));
    stream.close().await
}
