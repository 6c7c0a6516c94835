//! The real server as a process, for tests from end to end.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Recovery of a large store is included.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// The server's program: `POSTHASTE_BIN`, or the one that was built beside this test.
///
/// # Errors
/// There is none.
pub fn program() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("POSTHASTE_BIN") {
        return Ok(path.into());
    }
    let test = std::env::current_exe().map_err(|error| error.to_string())?;
    let candidates = test.ancestors().skip(1).take(2).map(|directory| directory.join("posthaste"));
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        format!("no server beside {}: run `cargo build -p posthaste`, or set POSTHASTE_BIN", test.display())
    })
}

/// A store's directory, and how the server is run on it.
#[derive(Debug)]
pub struct Store {
    directory: tempfile::TempDir,
    settings: Vec<String>,
    serve: Vec<String>,
    environment: Vec<(String, OsString)>,
}

impl Store {
    /// A store that does not exist yet, with settings of the form `store.shards=4` for every command, and options of
    /// `serve`.
    ///
    /// # Errors
    /// No directory can be made.
    pub fn new(settings: &[&str], serve: &[&str]) -> Result<Self, String> {
        let owned = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect();
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        Ok(Self { directory, settings: owned(settings), serve: owned(serve), environment: Vec::new() })
    }

    /// Lets servers have more in their environment.
    #[must_use]
    pub fn with_environment(self, environment: Vec<(String, OsString)>) -> Self {
        Self { environment, ..self }
    }

    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Keeps the directory, for a look at what is wrong in it.
    pub fn keep(self) -> PathBuf {
        self.directory.keep()
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Command, String> {
        let mut command = Command::new(program()?);
        command.args(arguments).arg("--data").arg(self.data());
        for setting in &self.settings {
            command.arg("--set").arg(setting);
        }
        Ok(command)
    }

    /// Runs a command to its end and returns what it printed.
    ///
    /// # Errors
    /// It fails.
    pub fn run(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self.command(arguments)?.output().map_err(|error| error.to_string())?;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{arguments:?}: {out}{err}")) }
    }

    /// Adds users, each with `password`.
    ///
    /// # Errors
    /// The command fails.
    pub fn add_users(&self, names: &[String], password: &str) -> Result<(), String> {
        let file = self.directory.path().join("users");
        let lines: String = names.iter().map(|name| format!("{name}:{password}\n")).collect();
        fs::write(&file, lines).map_err(|error| error.to_string())?;
        self.run(&["user", "import", &file.display().to_string()]).map(drop)
    }

    /// Starts the server and waits until it is ready.
    ///
    /// # Errors
    /// It does not become ready; what it logged is in the message.
    pub fn start(&self) -> Result<Server, String> {
        let log = self.directory.path().join("log");
        let failed = |error: std::io::Error| error.to_string();
        let mut command = self.command(["serve"])?;
        for service in ["imap", "imaps", "pop3", "pop3s", "lmtp"] {
            command.arg("--listen").arg(format!("{service}=127.0.0.1:0"));
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.args(&self.serve).stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(&log).map_err(failed)?);
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().ok_or("no standard output")?;
        let (sender, receiver) = mpsc::channel();
        let read = move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                // Whoever waited has what it needs.
                let _ = sender.send(line);
            }
        };
        thread::Builder::new().name("server output".to_owned()).spawn(read).map_err(failed)?;
        let mut server = Server { child, addresses: BTreeMap::new(), log };
        loop {
            let Ok(line) = receiver.recv_timeout(READY_TIMEOUT) else {
                return Err(format!("the server did not become ready: {}", server.log()));
            };
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["listening", service, address] => {
                    let address = address.parse().map_err(|_| format!("the server printed {line:?}"))?;
                    server.addresses.insert(service.to_owned(), address);
                }
                ["ready"] => return Ok(server),
                _ => return Err(format!("the server printed {line:?}")),
            }
        }
    }
}

/// A server that runs. It is killed when this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Of each service, by its name.
    addresses: BTreeMap<String, SocketAddr>,
    log: PathBuf,
}

impl Server {
    /// Where a service is.
    ///
    /// # Panics
    /// If the server did not say it.
    pub fn address(&self, service: &str) -> SocketAddr {
        self.addresses[service]
    }

    /// # Panics
    /// If the server did not say it.
    pub fn imap(&self) -> SocketAddr {
        self.address("imap")
    }

    /// # Panics
    /// If the server did not say it.
    pub fn pop3(&self) -> SocketAddr {
        self.address("pop3")
    }

    /// # Panics
    /// If the server did not say it.
    pub fn lmtp(&self) -> SocketAddr {
        self.address("lmtp")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        read(&self.log)
    }

    /// Ends it as an operator does.
    ///
    /// # Errors
    /// It does not exit with 0.
    pub fn stop(mut self) -> Result<(), String> {
        let signalled = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        signalled.map_err(|error| error.to_string())?;
        let status = self.child.wait().map_err(|error| error.to_string())?;
        if status.success() { Ok(()) } else { Err(format!("{status} after SIGTERM: {}", self.log())) }
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// It had ended before, by itself.
    pub fn kill(mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(format!("the server has ended: {status}: {}", self.log())),
            Ok(None) => self.end().map(drop),
            Err(error) => Err(error.to_string()),
        }
    }

    fn end(&mut self) -> Result<ExitStatus, String> {
        self.child.kill().and_then(|()| self.child.wait()).map_err(|error| error.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.end();
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Where the mail corpus is: `POSTHASTE_CORPUS`, or `shared/corpus` beside the checkout. `None` if it is not there,
/// which is printed.
pub fn corpus() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/corpus");
    let path = std::env::var_os("POSTHASTE_CORPUS").map_or_else(beside, PathBuf::from);
    if path.exists() {
        return Some(path);
    }
    let mut err = std::io::stderr().lock();
    // Nothing can be done if the message cannot be printed.
    let _ = writeln!(err, "skipped: there is no corpus {}", path.display());
    None
}
