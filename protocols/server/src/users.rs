//! What `posthaste user` reads: passwords from a terminal or a pipe, and files of users.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};

use crate::control::User;
use crate::password::{Given, Hasher, PasswordError, parse_given};
use crate::{accounts, limits};

#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    #[error("cannot read {path}: {error}")]
    Read { path: String, error: io::Error },
    #[error("{path}, line {line}: {problem}")]
    Line { path: String, line: usize, problem: String },
    #[error("cannot read the password: {0}")]
    Password(io::Error),
    #[error("the passwords differ")]
    Differ,
    #[error(transparent)]
    Given(#[from] PasswordError),
    #[error("there is no terminal to ask for the password: give it with --password-stdin")]
    NoTerminal,
}

/// Reads a password: the first line of standard input, or twice from the terminal.
pub fn read_password(name: &str, from_stdin: bool) -> Result<String, UsersError> {
    let password = if from_stdin {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map_err(UsersError::Password)?;
        line.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).unwrap_or(&line).to_owned()
    } else {
        if !io::stdin().is_terminal() {
            return Err(UsersError::NoTerminal);
        }
        let terminal = File::options().read(true).write(true).open("/dev/tty").map_err(|_| UsersError::NoTerminal)?;
        let [first, second] = without_echo(&terminal, || {
            let mut lines = BufReader::new(&terminal);
            Ok([ask(&mut lines, &format!("Password for {name}: "))?, ask(&mut lines, "Again: ")?])
        })
        .map_err(UsersError::Password)?;
        if first != second {
            return Err(UsersError::Differ);
        }
        first
    };
    if password.is_empty() {
        return Err(PasswordError::Empty.into());
    }
    if password.len() > limits::PASSWORD_BYTES {
        return Err(PasswordError::TooLong.into());
    }
    Ok(password)
}

fn ask(terminal: &mut BufReader<&File>, prompt: &str) -> io::Result<String> {
    terminal.get_mut().write_all(prompt.as_bytes())?;
    let mut line = String::new();
    let read = terminal.read_line(&mut line);
    terminal.get_mut().write_all(b"\n")?; // the one that was typed is not shown
    if read? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.strip_suffix('\n').unwrap_or(&line).to_owned())
}

/// Runs `ask` while the terminal reads lines and does not show them. It is as before afterwards, also when a signal such as
/// that of Ctrl-C ends the program.
fn without_echo<T>(terminal: &File, ask: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM};
    let before = tcgetattr(terminal)?;
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGQUIT, SIGTERM])?;
    let (own, restored) = (terminal.try_clone()?, before.clone());
    // Left to run until the program ends: a signal does no harm to a terminal that is restored already.
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _ = tcsetattr(&own, OptionalActions::Now, &restored);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    })?;
    let mut silent = before.clone();
    silent.local_modes.remove(LocalModes::ECHO | LocalModes::ECHONL);
    silent.local_modes.insert(LocalModes::ICANON | LocalModes::ISIG);
    silent.input_modes.insert(InputModes::ICRNL);
    silent.special_codes[SpecialCodeIndex::VSUSP] = 0; // not every shell would hide the rest again
    tcsetattr(terminal, OptionalActions::Now, &silent)?;
    let asked = ask();
    tcsetattr(terminal, OptionalActions::Now, &before)?;
    asked
}

/// Reads a file of `name:password` lines and hashes on all cores what is not hashed yet. Empty lines and those that begin
/// with `#` are passed over.
///
/// # Errors
/// The first line that is not good, by its number. Nothing has happened then.
pub fn read_import(path: &Path) -> Result<Vec<User>, UsersError> {
    let name = path.display().to_string();
    let text = if name == "-" { io::read_to_string(io::stdin()) } else { std::fs::read_to_string(path) };
    let text = text.map_err(|error| UsersError::Read { path: name.clone(), error })?;
    let mut users = Vec::new();
    let mut plain = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let problem = |problem: String| UsersError::Line { path: name.clone(), line: index + 1, problem };
        let (user, password) = line.split_once(':').ok_or_else(|| problem("name:password expected".to_owned()))?;
        let user = accounts::normalise(user).map_err(|error| problem(error.to_string()))?;
        let hash = match parse_given(password).map_err(|error| problem(error.to_string()))? {
            Given::Hash(hash) => hash.to_owned(),
            Given::Plain(password) => {
                plain.push((users.len(), password));
                String::new()
            }
        };
        users.push(User { name: user, password_hash: hash });
    }
    for ((index, _), hash) in plain.iter().zip(hash_all(&plain)) {
        users[*index].password_hash = hash;
    }
    Ok(users)
}

/// The hashes of the passwords, in their order.
fn hash_all(passwords: &[(usize, &str)]) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let hashes = Mutex::new(vec![String::new(); passwords.len()]);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(passwords.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut hasher = Hasher::new();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some((_, password)) = passwords.get(index) else { break };
                    let hash = hasher.hash(password);
                    hashes.lock().unwrap_or_else(PoisonError::into_inner)[index] = hash;
                }
            });
        }
    });
    hashes.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(text: &str) -> Result<Vec<User>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("users");
        std::fs::write(&path, text).unwrap();
        read_import(&path).map_err(|error| error.to_string().replace(&path.display().to_string(), "users"))
    }

    #[test]
    fn an_import_keeps_hashes_and_hashes_the_rest() {
        let hash = Hasher::new().hash("x");
        let users =
            import(&format!("# users\nAnn@X:secret\r\n\nbob@x:{{ARGON2ID}}{hash}\ncid@x:{{PLAIN}}a:b\n")).unwrap();
        assert_eq!(users.iter().map(|user| user.name.as_str()).collect::<Vec<_>>(), ["ann@x", "bob@x", "cid@x"]);
        assert_eq!(users[1].password_hash, hash);
        let passwords = crate::password::Passwords::new();
        assert!(passwords.verify(Some((1, &users[0].password_hash)), "secret"));
        assert!(passwords.verify(Some((1, &users[2].password_hash)), "a:b"));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(import("a@x:p\nb@x\n").unwrap_err(), "users, line 2: name:password expected");
        assert!(import("a@x:{CRYPT}abc\n").unwrap_err().starts_with("users, line 1: the password scheme {CRYPT}"));
        assert!(import("\n\na b:p\n").unwrap_err().starts_with("users, line 3: "));
    }
}
