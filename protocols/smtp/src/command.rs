//! Command lines (RFC 5321, 4.1.1; RFC 2033, 4).

use crate::address::{Mailbox, PathError, PathKind, ReversePath, parse_path};
use crate::reply::Reply;

/// Longest command line with its CRLF: 512 octets (RFC 5321, 4.5.3.1.4) and what the extensions add to MAIL:
/// SIZE 26 (RFC 1870, 3), BODY 17 (RFC 6152, 2), SMTPUTF8 10 (RFC 6531, 3.1).
pub const COMMAND_LINE_BYTES_MAX: usize = 512 + 26 + 17 + 10;

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command<'a> {
    Hello(Hello, &'a str),
    Mail(ReversePath, MailParams),
    Rcpt(Mailbox),
    Data,
    Bdat(Chunk),
    StartTls,
    Rset,
    Noop,
    Vrfy,
    Expn,
    Help,
    Quit,
    /// A verb of HTTP: a browser was made to talk to this port.
    Http,
}

/// What follows a BDAT command (RFC 3030, 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub octets: u64,
    pub last: bool,
}

/// Which greeting the client used: it tells SMTP and LMTP apart (RFC 2033, 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hello {
    Helo,
    Ehlo,
    Lhlo,
}

/// Parameters of MAIL.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MailParams {
    /// The declared message size in octets (RFC 1870, 6).
    pub size: Option<u64>,
    pub body: BodyType,
    pub smtputf8: bool,
}

/// `body-value` (RFC 6152, 2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BodyType {
    #[default]
    SevenBit,
    EightBitMime,
}

/// Parses one line without its CRLF.
///
/// # Errors
/// The reply that the line deserves.
pub fn parse(line: &[u8]) -> Result<Command<'_>, Reply> {
    // Control characters have no place in any command (RFC 5321, 4.1.2). Refused here, they cannot get into a
    // trace header or a reply.
    if line.iter().any(|&b| b < b' ' || b == 0x7f) {
        return Err(Reply::new(500, 5, 2, "Syntax error, control character in command"));
    }
    let Ok(line) = std::str::from_utf8(line) else {
        return Err(Reply::new(500, 5, 2, "Syntax error, command is not UTF-8"));
    };
    // Trailing white space is to be tolerated (RFC 5321, 4.1.1).
    let line = line.trim_end_matches(' ');
    let (verb, argument) = line.split_once(' ').unwrap_or((line, ""));
    let is = |name: &str| verb.eq_ignore_ascii_case(name);
    if is("RCPT") {
        parse_rcpt(argument)
    } else if is("MAIL") {
        parse_mail(argument)
    } else if is("DATA") {
        without_argument(argument, Command::Data)
    } else if is("BDAT") {
        parse_bdat(argument)
    } else if is("STARTTLS") {
        without_argument(argument, Command::StartTls)
    } else if is("RSET") {
        without_argument(argument, Command::Rset)
    } else if is("QUIT") {
        without_argument(argument, Command::Quit)
    } else if is("LHLO") {
        parse_hello(Hello::Lhlo, argument)
    } else if is("EHLO") {
        parse_hello(Hello::Ehlo, argument)
    } else if is("HELO") {
        parse_hello(Hello::Helo, argument)
    } else if is("NOOP") {
        // The argument of NOOP and HELP is ignored (RFC 5321, 4.1.1.9).
        Ok(Command::Noop)
    } else if is("HELP") {
        Ok(Command::Help)
    } else if is("VRFY") {
        Ok(Command::Vrfy)
    } else if is("EXPN") {
        Ok(Command::Expn)
    } else if ["GET", "POST", "PUT", "HEAD", "CONNECT", "OPTIONS", "DELETE", "PATCH", "TRACE"].contains(&verb) {
        Ok(Command::Http)
    } else {
        Err(Reply::new(500, 5, 1, "Command not recognized"))
    }
}

fn without_argument<'a>(argument: &str, command: Command<'a>) -> Result<Command<'a>, Reply> {
    if argument.is_empty() { Ok(command) } else { Err(Reply::new(501, 5, 4, "No argument allowed")) }
}

/// `bdat-cmd ::= "BDAT" SP chunk-size [ SP end-marker ] CR LF`. A bad one ends the session: what follows cannot be told from
/// commands.
fn parse_bdat(argument: &str) -> Result<Command<'_>, Reply> {
    let (octets, rest) = argument.split_once(' ').unwrap_or((argument, ""));
    let digits = (1..=20).contains(&octets.len()) && octets.bytes().all(|b| b.is_ascii_digit());
    let last = rest.trim_start_matches(' ');
    match octets.parse() {
        Ok(octets) if digits && last.is_empty() => Ok(Command::Bdat(Chunk { octets, last: false })),
        Ok(octets) if digits && last.eq_ignore_ascii_case("LAST") => Ok(Command::Bdat(Chunk { octets, last: true })),
        _ => Err(Reply::new(421, 5, 4, "Syntax: BDAT octets [LAST]; closing, as what follows cannot be read")),
    }
}

/// `lhlo = "LHLO" SP ( Domain / address-literal ) CRLF`.
///
/// Names that are no domains are common in the wild (underscores) and do no harm, so only the characters are checked.
fn parse_hello(hello: Hello, argument: &str) -> Result<Command<'_>, Reply> {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b);
    if argument.is_empty() || argument.len() > 255 || !argument.bytes().all(ok) {
        return Err(Reply::new(501, 5, 4, "Domain name or address literal required"));
    }
    Ok(Command::Hello(hello, argument))
}

/// `mail = "MAIL FROM:" Reverse-path [SP Mail-parameters] CRLF`
fn parse_mail(argument: &str) -> Result<Command<'_>, Reply> {
    let path = strip_keyword(argument, "FROM:")
        .ok_or(const { Reply::new(501, 5, 4, "Syntax: MAIL FROM:<address> [parameters]") })?;
    let (sender, rest) = parse_path(path, PathKind::Reverse).map_err(|e| path_reply(e, 7))?;
    let mut params = MailParams::default();
    let mut seen = [false; 3];
    let mut once = |which: usize| match std::mem::replace(&mut seen[which], true) {
        false => Ok(()),
        true => Err(Reply::new(501, 5, 4, "Parameter given twice")),
    };
    for (keyword, value) in parameters(rest)? {
        if keyword.eq_ignore_ascii_case("SIZE") {
            once(0)?;
            // size-value = 1*20DIGIT (RFC 1870, 3). A value past u64 is past every limit.
            let digits = value.filter(|v| (1..=20).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_digit()));
            let digits = digits.ok_or(const { Reply::new(501, 5, 4, "SIZE must be a number of octets") })?;
            params.size = Some(digits.parse().unwrap_or(u64::MAX));
        } else if keyword.eq_ignore_ascii_case("BODY") {
            once(1)?;
            params.body = match value {
                Some(v) if v.eq_ignore_ascii_case("7BIT") => BodyType::SevenBit,
                Some(v) if v.eq_ignore_ascii_case("8BITMIME") => BodyType::EightBitMime,
                _ => return Err(Reply::new(501, 5, 4, "BODY must be 7BIT or 8BITMIME")),
            };
        } else if keyword.eq_ignore_ascii_case("SMTPUTF8") {
            once(2)?;
            if value.is_some() {
                return Err(Reply::new(501, 5, 4, "SMTPUTF8 takes no value"));
            }
            params.smtputf8 = true;
        } else {
            return Err(unknown_parameter());
        }
    }
    if !params.smtputf8 && sender.as_ref().is_some_and(|s| !s.is_ascii()) {
        return Err(Reply::new(550, 6, 7, "Non-ASCII sender needs SMTPUTF8")); // RFC 6531, 3.5
    }
    Ok(Command::Mail(sender, params))
}

/// `rcpt = "RCPT TO:" ( "<Postmaster@" Domain ">" / "<Postmaster>" / Forward-path ) [SP Rcpt-parameters] CRLF`
fn parse_rcpt(argument: &str) -> Result<Command<'_>, Reply> {
    let path = strip_keyword(argument, "TO:").ok_or(const { Reply::new(501, 5, 4, "Syntax: RCPT TO:<address>") })?;
    let (recipient, rest) = parse_path(path, PathKind::Forward).map_err(|e| path_reply(e, 3))?;
    let recipient = recipient.ok_or(const { Reply::new(501, 1, 3, "empty path") })?;
    if parameters(rest)?.next().is_some() {
        return Err(unknown_parameter());
    }
    Ok(Command::Rcpt(recipient))
}

/// Spaces after the colon are not permitted (RFC 5321, 3.3) but sent by so much software that they are accepted.
fn strip_keyword<'a>(argument: &'a str, keyword: &str) -> Option<&'a str> {
    let head = argument.get(..keyword.len())?;
    head.eq_ignore_ascii_case(keyword).then(|| argument[keyword.len()..].trim_start_matches(' '))
}

/// `Mail-parameters = esmtp-param *(SP esmtp-param)`, `esmtp-param = esmtp-keyword ["=" esmtp-value]`
fn parameters(rest: &str) -> Result<impl Iterator<Item = (&str, Option<&str>)>, Reply> {
    if !rest.is_empty() && !rest.starts_with(' ') {
        return Err(Reply::new(501, 5, 4, "Space required after the path"));
    }
    let split = |parameter| match str::split_once(parameter, '=') {
        Some((keyword, value)) => (keyword, Some(value)),
        None => (parameter, None),
    };
    Ok(rest.split(' ').filter(|p| !p.is_empty()).map(split))
}

fn unknown_parameter() -> Reply {
    Reply::new(555, 5, 4, "Parameter not recognized") // RFC 5321, 4.1.1.11
}

/// 501 5.1.7 for a sender, 5.1.3 for a recipient (RFC 3463, 3.2).
fn path_reply(error: PathError, detail: u16) -> Reply {
    Reply::with_text(501, 1, detail, format!("Bad address: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code(line: &str) -> u16 {
        parse(line.as_bytes()).map_or_else(|reply| reply.code(), |command| panic!("{line}: {command:?}"))
    }

    fn mail(line: &str) -> (Option<String>, MailParams) {
        match parse(line.as_bytes()) {
            Ok(Command::Mail(sender, params)) => (sender.map(|s| s.to_string()), params),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn mail_parameters() {
        let (sender, params) = mail("mail from:<a@b> size=1000 body=8bitmime SMTPUTF8");
        assert_eq!(sender.as_deref(), Some("a@b"));
        assert_eq!(params, MailParams { size: Some(1000), body: BodyType::EightBitMime, smtputf8: true });
        assert_eq!(mail("MAIL FROM:<>"), (None, MailParams::default()));
        assert_eq!(mail("MAIL FROM: <a@b>  ").0.as_deref(), Some("a@b"));
        assert_eq!(mail("MAIL FROM:<a@b> SIZE=99999999999999999999").1.size, Some(u64::MAX));
    }

    #[test]
    fn bad_mail_lines() {
        for line in [
            "MAIL",
            "MAIL FROM",
            "MAIL FROM:a@b",
            "MAIL FROM:<a@b>SIZE=1",
            "MAIL FROM:<a@b> SIZE",
            "MAIL FROM:<a@b> SIZE=",
            "MAIL FROM:<a@b> SIZE=-1",
            "MAIL FROM:<a@b> SIZE=999999999999999999999",
            "MAIL FROM:<a@b> SIZE=1 SIZE=2",
            "MAIL FROM:<a@b> BODY=BINARYMIME",
            "MAIL FROM:<a@b> SMTPUTF8=yes",
        ] {
            assert_eq!(code(line), 501, "{line}");
        }
        assert_eq!(code("MAIL FROM:<a@b> FOO=1"), 555);
        assert_eq!(code("MAIL FROM:<é@b>"), 550);
        assert_eq!(mail("MAIL FROM:<é@b> SMTPUTF8").0.as_deref(), Some("é@b"));
    }

    #[test]
    fn other_commands() {
        assert_eq!(parse(b"lhlo x.example"), Ok(Command::Hello(Hello::Lhlo, "x.example")));
        assert_eq!(parse(b"LHLO [127.0.0.1]"), Ok(Command::Hello(Hello::Lhlo, "[127.0.0.1]")));
        assert_eq!(parse(b"DATA "), Ok(Command::Data));
        assert_eq!(parse(b"NOOP whatever"), Ok(Command::Noop));
        assert_eq!(parse(b"bdat 0 last"), Ok(Command::Bdat(Chunk { octets: 0, last: true })));
        assert_eq!(parse(b"BDAT 1000"), Ok(Command::Bdat(Chunk { octets: 1000, last: false })));
        for line in ["BDAT", "BDAT x", "BDAT -1", "BDAT 1 FIRST", "BDAT 99999999999999999999", "BDAT 1 LAST LAST"] {
            assert_eq!(code(line), 421, "{line}");
        }
        assert_eq!(parse(b"STARTTLS"), Ok(Command::StartTls));
        assert_eq!(code("STARTTLS now"), 501);
        assert_eq!(code("DATA x"), 501);
        assert_eq!(code("LHLO"), 501);
        assert_eq!(code("LHLO a b"), 501);
        assert_eq!(code("RCPT TO:<>"), 501);
        assert_eq!(code("RCPT TO:<a@b> NOTIFY=NEVER"), 555);
        assert_eq!(code("XYZZY"), 500);
        assert_eq!(code(""), 500);
    }

    /// Trap 42: no newline or other control character gets past the parser, in whatever parameter.
    #[test]
    fn trap_42_control_characters_are_refused() {
        for line in ["MAIL FROM:<a@b>\rX", "RCPT TO:<\"a\nb\"@c>", "LHLO a\0b", "MAIL FROM:<a\tb@c>"] {
            assert_eq!(code(line), 500, "{line:?}");
        }
    }

    /// Trap 3: a browser that was led here is told nothing it could use.
    #[test]
    fn trap_3_http_verbs() {
        assert_eq!(parse(b"POST / HTTP/1.1"), Ok(Command::Http));
        assert_eq!(parse(b"GET / HTTP/1.1"), Ok(Command::Http));
    }

    proptest! {
        #[test]
        fn never_panics(line in prop::collection::vec(any::<u8>(), 0..200), verb in "(MAIL FROM:<|RCPT TO:<|LHLO )?") {
            let mut all = verb.into_bytes();
            all.extend(line);
            let _ = parse(&all);
        }
    }
}
