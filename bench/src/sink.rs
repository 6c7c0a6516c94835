//! Servers that do nothing: LMTP that throws mail away and IMAP without mail. They are the limit of what the load generator can do.

use std::error::Error;
use std::io;

use clap::Args;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::task::LocalSet;

use crate::null_imap::{self, Mailbox};
use crate::stream::{Input, Stream};

#[derive(Clone, Debug, Args)]
pub struct Sink {
    /// Where to listen
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:0")]
    lmtp: String,
    /// Where to listen for IMAP, too: every login succeeds, and every mailbox is the same
    #[arg(long, value_name = "HOST:PORT")]
    imap: Option<String>,
    /// Messages that every mailbox seems to have
    #[arg(long, value_name = "N", default_value_t = 10)]
    mailbox_messages: u32,
    /// How many of them seem to have changed whenever a client asks for that
    #[arg(long, value_name = "N", default_value_t = 5)]
    mailbox_changes: u32,
}

impl Sink {
    /// Prints `listening lmtp ADDRESS`, with `--imap` a line for that too, and serves until it is killed.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, async {
            let lmtp = TcpListener::bind(&self.lmtp).await?;
            let mut lines = format!("listening lmtp {}\n", lmtp.local_addr()?);
            let mailbox = Mailbox { messages: self.mailbox_messages, changed: self.mailbox_changes };
            if let Some(address) = &self.imap {
                let imap = TcpListener::bind(address).await?;
                lines += &format!("listening imap {}\n", imap.local_addr()?);
                tokio::task::spawn_local(accept(imap, move |stream| null_imap::connection(stream, mailbox)));
            }
            print!("{lines}");
            serve(lmtp).await?;
            Ok(true)
        })
    }
}

/// Serves connections; must run in a `LocalSet`.
///
/// # Errors
/// No connection can be accepted any more.
pub async fn serve(listener: TcpListener) -> io::Result<()> {
    accept(listener, connection).await
}

async fn accept<F: Future<Output = io::Result<()>> + 'static>(
    listener: TcpListener,
    connection: impl Fn(TcpStream) -> F + 'static,
) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // A client that goes away ends its connection, nothing else.
        let connection = connection(stream);
        tokio::task::spawn_local(async move { drop(connection.await) });
    }
}

async fn connection(stream: TcpStream) -> io::Result<()> {
    let mut stream = Stream::Tcp(stream);
    let (mut input, mut output) = (Input::default(), b"220 sink LMTP\r\n".to_vec());
    let mut session = Session::default();
    while !session.over {
        while let Some(used) = session.step(input.unused(), &mut output) {
            input.consume(used);
        }
        stream.write_all(&output).await?;
        output.clear();
        if !session.over {
            stream.read_into(&mut input).await?;
        }
    }
    Ok(())
}

#[derive(Default)]
struct Session {
    recipients: usize,
    in_data: bool,
    /// Octets of data that have been looked at and do not contain its end.
    looked_at: usize,
    over: bool,
}

impl Session {
    /// Takes one command or message from the start of `input` and returns its length.
    fn step(&mut self, input: &[u8], output: &mut Vec<u8>) -> Option<usize> {
        if self.over {
            return None;
        }
        if self.in_data {
            const END: &[u8] = b"\r\n.\r\n";
            let from = self.looked_at.saturating_sub(END.len());
            let end = if input.starts_with(&END[2..]) {
                END.len() - 2
            } else if let Some(at) = memchr::memmem::find(&input[from..], END) {
                from + at + END.len()
            } else {
                self.looked_at = input.len();
                return None;
            };
            for _ in 0..self.recipients {
                output.extend_from_slice(b"250 2.0.0 gone\r\n");
            }
            *self = Self::default();
            return Some(end);
        }
        let end = memchr::memchr(b'\n', input)?;
        let reply: &[u8] = match input.get(..4).unwrap_or_default().to_ascii_uppercase().as_slice() {
            b"LHLO" => b"250-sink\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 0\r\n",
            b"RCPT" => {
                self.recipients += 1;
                b"250 2.1.5 ok\r\n"
            }
            b"DATA" => {
                self.in_data = true;
                b"354 go\r\n"
            }
            b"QUIT" => {
                self.over = true;
                b"221 2.0.0 bye\r\n"
            }
            _ => b"250 2.0.0 ok\r\n",
        };
        output.extend_from_slice(reply);
        Some(end + 1)
    }
}
