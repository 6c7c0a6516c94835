//! Commands: a line in, a [`Command`] or the text of a refusal out.
//!
//! More is taken than the grammar of RFC 2449, 3 has: spaces too many around numbers do no harm. A number that is too
//! large for any maildrop is a number all the same, so it is answered as one that no message has.

/// A command line may have so many octets, with its end (RFC 2449, 4).
pub const COMMAND_LINE_BYTES_MAX: usize = 255;

/// A line of a SASL exchange may be longer (RFC 5034, 4): PLAIN with the longest names and passwords needs less than 3 KB.
pub const SASL_LINE_BYTES_MAX: usize = 12 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command<'a> {
    User(&'a str),
    Pass(&'a str),
    /// `None` asks which there are.
    Auth(Option<Mechanism<'a>>),
    Capa,
    Stls,
    Stat,
    List(Option<u32>),
    Uidl(Option<u32>),
    Retr(u32),
    Top {
        number: u32,
        lines: u32,
    },
    Dele(u32),
    Rset,
    Noop,
    Quit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mechanism<'a> {
    pub name: &'a str,
    /// In base64.
    pub initial_response: Option<&'a str>,
}

/// Reads a line without its end.
///
/// # Errors
/// The text of the answer to what is no command.
pub fn parse(line: &[u8]) -> Result<Command<'_>, &'static str> {
    if line.iter().any(|&octet| octet == 0 || octet == b'\r') {
        return Err("A command cannot have NUL or a bare CR in it");
    }
    let line = str::from_utf8(line).map_err(|_| "A command must be UTF-8")?;
    let (keyword, rest) = line.split_once(' ').map_or((line, None), |(keyword, rest)| (keyword, Some(rest)));
    let mut upper = [0; 4];
    let Some(upper) = upper.get_mut(..keyword.len()) else { return Err("Unknown command") };
    upper.copy_from_slice(keyword.as_bytes());
    upper.make_ascii_uppercase();
    let arguments = || rest.unwrap_or_default().split(' ').filter(|argument| !argument.is_empty());
    let none = |command| if arguments().next().is_none() { Ok(command) } else { Err("No arguments expected") };
    let optional = || -> Result<Option<u32>, &'static str> {
        let mut arguments = arguments();
        match (arguments.next(), arguments.next()) {
            (number, None) => number.map(self::number).transpose(),
            _ => Err("At most one message number expected"),
        }
    };
    let required = || optional()?.ok_or("A message number expected");
    match &*upper {
        // The rest of the line is the name, or the password with all its spaces (RFC 1939, 7).
        b"USER" => rest.filter(|name| !name.trim().is_empty()).map(Command::User).ok_or("A name expected"),
        b"PASS" => rest.filter(|password| !password.is_empty()).map(Command::Pass).ok_or("A password expected"),
        b"AUTH" => {
            let mut arguments = arguments();
            let (name, initial_response) = (arguments.next(), arguments.next());
            match arguments.next() {
                Some(_) => Err("A mechanism and an initial response expected"),
                None => Ok(Command::Auth(name.map(|name| Mechanism { name, initial_response }))),
            }
        }
        b"CAPA" => none(Command::Capa),
        b"STLS" => none(Command::Stls),
        b"STAT" => none(Command::Stat),
        b"LIST" => optional().map(Command::List),
        b"UIDL" => optional().map(Command::Uidl),
        b"RETR" => required().map(Command::Retr),
        b"DELE" => required().map(Command::Dele),
        b"TOP" => {
            let mut arguments = arguments();
            match (arguments.next(), arguments.next(), arguments.next()) {
                (Some(number), Some(lines), None) => {
                    Ok(Command::Top { number: self::number(number)?, lines: self::number(lines)? })
                }
                _ => Err("A message number and a number of lines expected"),
            }
        }
        b"RSET" => none(Command::Rset),
        b"NOOP" => none(Command::Noop),
        b"QUIT" => none(Command::Quit),
        _ => Err("Unknown command"),
    }
}

/// A number, or `u32::MAX` where it is too large.
fn number(digits: &str) -> Result<u32, &'static str> {
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err("A number expected");
    }
    // Nothing but too large a number is left to be wrong.
    Ok(digits.parse().unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        let auth = |name, initial_response| Command::Auth(Some(Mechanism { name, initial_response }));
        for (line, command) in [
            ("USER ann@example.org", Command::User("ann@example.org")),
            ("user Ann Other", Command::User("Ann Other")),
            ("PASS  two  spaces ", Command::Pass(" two  spaces ")),
            ("PASS ä", Command::Pass("ä")),
            ("AUTH", Command::Auth(None)),
            ("AUTH ", Command::Auth(None)),
            ("auth plain", auth("plain", None)),
            ("AUTH PLAIN =", auth("PLAIN", Some("="))),
            ("cApA", Command::Capa),
            ("STLS", Command::Stls),
            ("STAT ", Command::Stat),
            ("LIST", Command::List(None)),
            ("LIST 1", Command::List(Some(1))),
            ("LIST  007 ", Command::List(Some(7))),
            ("UIDL", Command::Uidl(None)),
            ("UIDL 2", Command::Uidl(Some(2))),
            ("RETR 0", Command::Retr(0)),
            ("RETR 4294967295", Command::Retr(u32::MAX)),
            ("RETR 4294967296", Command::Retr(u32::MAX)),
            ("DELE 99999999999999999999999", Command::Dele(u32::MAX)),
            ("TOP 1 0", Command::Top { number: 1, lines: 0 }),
            ("top 1 4294967296", Command::Top { number: 1, lines: u32::MAX }),
            ("RSET", Command::Rset),
            ("NOOP", Command::Noop),
            ("QUIT", Command::Quit),
        ] {
            assert_eq!(parse(line.as_bytes()), Ok(command), "{line:?}");
        }
    }

    #[test]
    fn what_is_no_command() {
        for line in [
            "",
            " ",
            "X",
            "QUITE",
            "RETRIEVE 1",
            "XTND XMIT",
            "APOP a b",
            "UTF8",
            "LANG *",
            "USER",
            "USER ",
            "USER  ",
            "PASS",
            "PASS ",
            "AUTH PLAIN a b",
            "CAPA 1",
            "STAT 1",
            "LIST 1 2",
            "LIST -1",
            "LIST +1",
            "LIST x",
            "UIDL 1x",
            "RETR",
            "RETR 1 2",
            "RETR 1.0",
            "RETR\t1",
            "DELE",
            "DELE 1:2",
            "TOP 1",
            "TOP",
            "TOP 1 2 3",
            "TOP 1 -1",
            "NOOP x",
            "QUIT x",
            " STAT",
        ] {
            let error = parse(line.as_bytes()).expect_err(line);
            assert!(!error.starts_with('['), "that would be a response code (RFC 2449, 8)");
        }
        for line in [&b"NOOP\0"[..], b"PASS a\0b", b"US\rER", b"NOOP\r", b"\xff", b"PASS \xff"] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }
}
