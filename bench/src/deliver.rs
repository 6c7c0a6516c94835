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
use crate::session::{FAILURES_MAX, Parameters, limited};
use crate::stream::{Address, Connector};
use crate::tls::TlsOptions;
use crate::users::{UserOrder, Users};
use crate::verify::{ContentHash, Ledger, VerifyOptions};

#[derive(Clone, Debug, Args)]
pub struct Deliver {
    #[command(flatten)]
    server: MailServer,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    users: Users,
    #[command(flatten)]
    order: UserOrder,
    /// Recipients of each message; each takes the users in turn
    #[arg(long, value_name = "N", default_value_t = 1)]
    recipients: usize,
    #[command(flatten)]
    load: Load,
    #[command(flatten)]
    mail: MailOptions,
    /// Give each message a Message-ID of its own, in a header before all others
    #[arg(long)]
    distinct: bool,
    /// Make a connection for each message
    #[arg(long)]
    one_per_connection: bool,
    /// Wait for the reply to each command, also where the server announces PIPELINING
    #[arg(long)]
    no_pipelining: bool,
    #[command(flatten)]
    watch: Watch,
    #[command(flatten)]
    verify: VerifyOptions,
    /// The password of all users, with which --verify reads their mailboxes
    #[arg(long, value_name = "PASSWORD")]
    password: Option<String>,
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

    /// Adds to a report where mail was delivered to, and how.
    pub fn describe(&self, parameters: &mut Parameters) {
        parameters.insert("delivery_server", self.address().to_string().into());
        parameters.insert("protocol", format!("{:?}", self.protocol()).to_uppercase().into());
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
    order: UserOrder,
    distinct: bool,
    users: Vec<String>,
    data: Vec<Data>,
    record: Option<Record>,
}

/// What --verify compares with.
struct Record {
    ledger: Ledger,
    /// Of the messages, in their order.
    contents: Vec<ContentHash>,
}

impl Deliver {
    /// Runs the workload and prints its report.
    ///
    /// # Errors
    /// It could not be run.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        self.measure()?.print_and_judge(self.load.json)
    }

    fn measure(&self) -> Result<Report, Box<dyn Error>> {
        let corpus = self.mail.load()?;
        let (users, limit) = (self.users.names(), self.load.operation_timeout());
        let verifier = self.verify.verifier(users, "INBOX", self.password.as_deref(), limit)?;
        if verifier.is_some() && self.recipients > self.users.user_count.max(1) {
            return Err("to verify, a message must not have the same recipient twice: --recipients is more than \
                        --user-count"
                .into());
        }
        let record = || Record {
            ledger: Ledger::default(),
            contents: corpus.mail.iter().map(|mail| ContentHash::of(&mail.bytes)).collect(),
        };
        let plan = Arc::new(Plan {
            protocol: self.server.protocol(),
            connector: Connector::new(self.server.address(), self.tls.client())?,
            pipelining: !self.no_pipelining,
            one_per_connection: self.one_per_connection,
            timeout: self.load.operation_timeout(),
            recipients: self.recipients.max(1),
            order: self.order,
            distinct: self.distinct,
            users: self.users.names(),
            data: corpus.mail.iter().map(|mail| Data::new(&mail.bytes)).collect(),
            record: verifier.is_some().then(record),
        });
        let mut parameters = BTreeMap::new();
        parameters.insert("server", self.server.address().to_string().into());
        parameters.insert("protocol", format!("{:?}", plan.protocol).to_uppercase().into());
        parameters.insert("tls", self.tls.tls.into());
        parameters.insert("tls_resume", self.tls.tls_resume.into());
        parameters.insert("users", self.users.pattern.as_str().into());
        parameters.insert("user_count", self.users.user_count.into());
        parameters.insert("user_order", self.order.name().into());
        parameters.insert("distinct", self.distinct.into());
        parameters.insert("recipients", self.recipients.into());
        self.mail.describe(&corpus, &mut parameters);
        parameters.insert("one_per_connection", self.one_per_connection.into());
        parameters.insert("pipelining", plan.pipelining.into());
        parameters.insert("verify", verifier.is_some().into());
        let shared = Arc::clone(&plan);
        let ran = drive::run(&self.load, &self.watch, move |seat| connection(seat, Arc::clone(&shared)))?;
        let mut report = Report::new("deliver", "deliveries", Some("after the dot"), &self.load, parameters, ran);
        if let (Some(verifier), Some(record)) = (verifier, &plan.record) {
            report.verdict = Some(verifier.verify(&record.ledger)?);
        }
        Ok(report)
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
        && let Some(turn) = seat.turn().await
    {
        if client.is_none() {
            client = connect(&seat, &plan, &connector).await;
        }
        let Some(mut connected) = client.take() else {
            failures += 1;
            continue;
        };
        failures = 0;
        match transaction(&mut connected, &seat, &plan, turn.number).await {
            Ok((outcome, octets)) => {
                if outcome.accepted > 0 {
                    let accepted = outcome.accepted as u64;
                    seat.count(accepted, octets * accepted, turn.due.elapsed());
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
    let message = (number % plan.data.len() as u64) as usize;
    let first = plan.order.user_of(number, plan.users.len()) * plan.recipients;
    let user = |offset: usize| (first + offset) % plan.users.len();
    let mut data = &plan.data[message];
    let (with_id, with_number);
    if plan.distinct {
        with_id = data.with_header(&format!("Message-ID: <{number}.{}@bench.example>\r\n", std::process::id()));
        data = &with_id;
    }
    if let Some(record) = &plan.record {
        with_number = data.with_header(&record.ledger.header(number));
        data = &with_number;
        for offset in 0..plan.recipients {
            record.ledger.sent(number, user(offset), record.contents[message]);
        }
    }
    let mut sent = None;
    let result = if plan.recipients == 1 {
        limited(plan.timeout, client.deliver(&[&plan.users[user(0)]], data, || sent = Some(Instant::now()))).await
    } else {
        let recipients: Vec<&str> = (0..plan.recipients).map(|offset| plan.users[user(offset)].as_str()).collect();
        limited(plan.timeout, client.deliver(&recipients, data, || sent = Some(Instant::now()))).await
    };
    if let Some(record) = &plan.record {
        // Also when the connection then failed: what was acknowledged is.
        for offset in 0..plan.recipients {
            if client.acknowledged().contains(&offset) {
                record.ledger.acknowledged(number, user(offset));
            } else if result.is_ok() {
                record.ledger.refused(number, user(offset));
            }
        }
    }
    let outcome = result?;
    if let Some(sent) = sent {
        seat.count_second(sent.elapsed());
    }
    Ok((outcome, data.octets() as u64))
}
