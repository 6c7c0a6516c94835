//! Delivery over LMTP or SMTP.

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;

use crate::drive::{self, Load, Seat};
use crate::lmtp::{Client, Data, LmtpError, Outcome, Protocol};
use crate::mail::MailOptions;
use crate::observe::Watch;
use crate::report::Report;
use crate::session::{FAILURES_MAX, limited};
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::Users;

#[derive(Clone, Debug, Args)]
pub struct Deliver {
    #[command(flatten)]
    server: MailServer,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    users: Users,
    /// Recipients of each message; each takes the users in turn
    #[arg(long, value_name = "N", default_value_t = 1)]
    recipients: usize,
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    mail: MailOptions,
    /// Make a connection for each message
    #[arg(long)]
    one_per_connection: bool,
    /// Wait for the reply to each command, also where the server announces PIPELINING
    #[arg(long)]
    no_pipelining: bool,
    #[command(flatten)]
    watch: Watch,
}

/// Where mail is delivered to.
#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false, id = "mail_server")]
pub struct MailServer {
    /// Deliver by LMTP to this server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    lmtp: Option<Address>,
    /// Deliver by SMTP to this server: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    smtp: Option<Address>,
}

impl MailServer {
    pub fn protocol(&self) -> Protocol {
        if self.lmtp.is_some() { Protocol::Lmtp } else { Protocol::Smtp }
    }

    /// # Panics
    /// If the command line had neither, which it cannot.
    pub fn address(&self) -> &Address {
        self.lmtp.as_ref().or(self.smtp.as_ref()).expect("the command line has one of both")
    }
}

/// What the connections share.
struct Plan {
    protocol: Protocol,
    connector: Connector,
    pipelining: bool,
    one_per_connection: bool,
    timeout: Duration,
    recipients: usize,
    users: Vec<String>,
    data: Vec<Data>,
}

impl Deliver {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let report = self.measure()?;
        report.print(self.load.json)
    }

    fn measure(&self) -> Result<Report, Box<dyn Error>> {
        let corpus = self.mail.load()?;
        let plan = Arc::new(Plan {
            protocol: self.server.protocol(),
            connector: Connector::new(self.server.address(), self.tls.client())?,
            pipelining: !self.no_pipelining,
            one_per_connection: self.one_per_connection,
            timeout: self.load.operation_timeout(),
            recipients: self.recipients.max(1),
            users: self.users.names(),
            data: corpus.mail.iter().map(|mail| Data::new(&mail.bytes)).collect(),
        });
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.server.address().to_string().into());
        parameters.insert("protocol", format!("{:?}", plan.protocol).to_uppercase().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("tls_resume", self.tls.tls_resume.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("recipients", self.recipients.into());
        self.mail.describe(&corpus, &mut parameters);
        parameters.insert("one_per_connection", self.one_per_connection.into());
        parameters.insert("pipelining", plan.pipelining.into());
        let ran = drive::run(&self.load, &self.watch, move |seat| connection(seat, Arc::clone(&plan)))?;
        Ok(Report::new("deliver", "deliveries", Some("after the dot"), &self.load, parameters, ran))
    }
}

async fn connection(seat: Seat, plan: Arc<Plan>) {
    let connector = plan.connector.of_own();
    let mut client = None;
    if !plan.one_per_connection {
        client = connect(&seat, &plan, &connector).await;
    }
    seat.ready().await;
    let mut failures = 0;
    while failures < FAILURES_MAX
        && let Some(number) = seat.next()
    {
        let start = Instant::now();
        if client.is_none() {
            client = connect(&seat, &plan, &connector).await;
        }
        let Some(mut connected) = client.take() else {
            failures += 1;
            continue;
        };
        failures = 0;
        match transaction(&mut connected, &seat, &plan, number).await {
            Ok((outcome, octets)) => {
                if outcome.accepted > 0 {
                    let accepted = outcome.accepted as u64;
                    seat.count(accepted, octets * accepted, start.elapsed());
                }
                for error in outcome.refused {
                    seat.count_error(error.kind(), || error.to_string());
                }
                if plan.one_per_connection {
                    quit(connected, &plan).await;
                } else {
                    client = Some(connected);
                }
            }
            Err(error) => seat.count_error(error.kind(), || error.to_string()),
        }
    }
    if let Some(client) = client {
        quit(client, &plan).await;
    }
}

async fn connect(seat: &Seat, plan: &Plan, connector: &Connector) -> Option<Client> {
    let connected = limited(plan.timeout, Client::connect_by(plan.protocol, connector, plan.pipelining)).await;
    connected.inspect_err(|error| seat.count_error(format!("connecting: {}", error.kind()), || error.to_string())).ok()
}

async fn quit(client: Client, plan: &Plan) {
    // All is counted; what the server says to QUIT changes nothing.
    let _ = limited(plan.timeout, client.quit()).await;
}

async fn transaction(client: &mut Client, seat: &Seat, plan: &Plan, number: u64) -> Result<(Outcome, u64), LmtpError> {
    let data = &plan.data[(number % plan.data.len() as u64) as usize];
    let first = (number % plan.users.len() as u64) as usize * plan.recipients;
    let user = |offset: usize| plan.users[(first + offset) % plan.users.len()].as_str();
    let mut sent = None;
    let outcome = if plan.recipients == 1 {
        limited(plan.timeout, client.deliver(&[user(0)], data, || sent = Some(Instant::now()))).await?
    } else {
        let recipients: Vec<&str> = (0..plan.recipients).map(user).collect();
        limited(plan.timeout, client.deliver(&recipients, data, || sent = Some(Instant::now()))).await?
    };
    if let Some(sent) = sent {
        seat.count_second(sent.elapsed());
    }
    Ok((outcome, data.octets() as u64))
}
