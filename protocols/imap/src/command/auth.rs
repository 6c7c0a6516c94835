//! LOGIN, AUTHENTICATE, ENABLE, ID (RFC 9051, 6.2 and 6.3.1; RFC 4959; RFC 2971).

use std::fmt;

use super::Command;
use super::cursor::{Cursor, Fault, Parse};
use crate::base64::decode_base64;

/// A password: not shown by `Debug`, so that no log has it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// `login = "LOGIN" SP userid SP password`
pub(super) fn parse_login(c: &mut Cursor<'_>) -> Parse<Command> {
    c.sp()?;
    let user = c.astring_utf8("User name expected")?;
    c.sp()?;
    let password = Secret(c.astring_utf8("Password expected")?);
    Ok(Command::Login { user, password })
}

/// `authenticate = "AUTHENTICATE" SP auth-type [SP initial-resp]`, `initial-resp = (base64 / "=")`
pub(super) fn parse_authenticate(c: &mut Cursor<'_>) -> Parse<Command> {
    c.sp()?;
    let mut mechanism = c.atom_string("Mechanism expected")?;
    mechanism.make_ascii_uppercase();
    let mut initial_response = None;
    if c.eat(b' ') {
        let text = c.atom("Initial response expected")?;
        // "=" is the empty response (RFC 4959, 3).
        let decoded = if text == b"=" { Some(Vec::new()) } else { decode_base64(text) };
        initial_response = Some(decoded.ok_or(Fault::bad("Initial response is not base64"))?);
    }
    Ok(Command::Authenticate { mechanism, initial_response })
}

/// `enable = "ENABLE" 1*(SP capability)`
pub(super) fn parse_enable(c: &mut Cursor<'_>) -> Parse<Command> {
    let mut names = Vec::new();
    loop {
        c.sp()?;
        names.push(c.atom_string("Capability expected")?.to_ascii_uppercase());
        if c.peek().is_none() {
            return Ok(Command::Enable(names));
        }
    }
}

/// `id ::= "ID" SPACE id_params_list`, `id_params_list ::= "(" #(string SPACE nstring) ")" / nil`
///
/// At most 30 fields, names of 30 octets and values of 1024 (RFC 2971, 3.3).
pub(super) fn parse_id(c: &mut Cursor<'_>) -> Parse<Command> {
    const FIELDS_MAX: usize = 30;
    const NAME_BYTES_MAX: usize = 30;
    const VALUE_BYTES_MAX: usize = 1024;
    c.sp()?;
    let mut fields = Vec::new();
    if c.eat_word(b"NIL") {
        return Ok(Command::Id(fields));
    }
    c.list(true, |c| {
        let name = c.string("Field name expected")?;
        c.sp()?;
        let value = c.nstring("Field value expected")?;
        let too_long = name.len() > NAME_BYTES_MAX || value.as_ref().is_some_and(|v| v.len() > VALUE_BYTES_MAX);
        if too_long || fields.len() >= FIELDS_MAX {
            return Err(Fault::bad("Too many or too long ID fields"));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        fields.push((text(&name), value.map(|v| text(&v))));
        Ok(())
    })?;
    Ok(Command::Id(fields))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::parse_line;

    #[test]
    fn login() {
        let expected = || Ok(Command::Login { user: "fred foobar".into(), password: Secret("fat man".into()) });
        assert_eq!(parse_line("LOGIN {11+}\r\nfred foobar {7+}\r\nfat man"), expected());
        assert_eq!(parse_line("login \"fred foobar\" \"fat man\""), expected());
        assert_eq!(parse_line("LOGIN a"), Err("BAD Space expected".into()));
        assert_eq!(parse_line("LOGIN a b c"), Err("BAD Unexpected text after the command".into()));
        assert!(!format!("{:?}", expected()).contains("fat man"));
    }

    /// Trap 13: a user name that is no UTF-8 is refused, not crashed on.
    #[test]
    fn trap_13_user_name_is_utf8() {
        let frame = crate::frame::Frame { text: b"t LOGIN \"\xff\xfe\" x".to_vec(), literals: vec![] };
        assert_eq!(super::super::parse(frame, Default::default()).unwrap_err().text, "String is not UTF-8");
    }

    #[test]
    fn authenticate() {
        let command = |mechanism: &str, initial_response: Option<&[u8]>| {
            let initial_response = initial_response.map(<[u8]>::to_vec);
            Ok(Command::Authenticate { mechanism: mechanism.into(), initial_response })
        };
        assert_eq!(parse_line("AUTHENTICATE plain"), command("PLAIN", None));
        assert_eq!(parse_line("AUTHENTICATE PLAIN AHRlc3QAdGVzdA=="), command("PLAIN", Some(b"\0test\0test")));
        assert_eq!(parse_line("AUTHENTICATE EXTERNAL ="), command("EXTERNAL", Some(b"")));
        assert_eq!(parse_line("AUTHENTICATE PLAIN AHR"), Err("BAD Initial response is not base64".into()));
        assert_eq!(parse_line("AUTHENTICATE"), Err("BAD Space expected".into()));
    }

    #[test]
    fn enable() {
        assert_eq!(
            parse_line("ENABLE condstore X-GOOD"),
            Ok(Command::Enable(vec!["CONDSTORE".into(), "X-GOOD".into()]))
        );
        assert!(parse_line("ENABLE").is_err() && parse_line("ENABLE a  b").is_err());
    }

    /// Trap 5: ID with many parameters, and with long ones.
    #[test]
    fn trap_5_id() {
        assert_eq!(parse_line("ID NIL"), Ok(Command::Id(vec![])));
        assert_eq!(
            parse_line("ID (\"name\" \"x\" \"os\" NIL)"),
            Ok(Command::Id(vec![("name".into(), Some("x".into())), ("os".into(), None)]))
        );
        assert!(parse_line(&format!("ID ({})", ["\"a\" NIL"; 30].join(" "))).is_ok());
        let refused = Err("BAD Too many or too long ID fields".into());
        assert_eq!(parse_line(&format!("ID ({})", ["\"a\" NIL"; 31].join(" "))), refused);
        assert_eq!(parse_line(&format!("ID (\"{}\" NIL)", "a".repeat(31))), refused);
        assert!(parse_line("ID (\"a\")").is_err() && parse_line("ID ((\"a\" NIL))").is_err());
    }
}
