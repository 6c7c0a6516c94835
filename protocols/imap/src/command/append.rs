//! APPEND (RFC 9051, 6.3.12), with several messages (RFC 3502) and with NUL (RFC 3516, 4.4).

use super::cursor::{Cursor, Fault, Parse};
use crate::frame::Octets;
use crate::types::{Date, DateTime, Flag, MONTHS, MailboxName};

#[derive(Debug, PartialEq)]
pub struct Append {
    pub mailbox: MailboxName,
    /// Never empty; more than one with MULTIAPPEND.
    pub messages: Vec<AppendMessage>,
}

#[derive(Debug, PartialEq)]
pub struct AppendMessage {
    pub flags: Vec<Flag>,
    /// The internal date; the time of arrival if not given.
    pub date: Option<DateTime>,
    /// The octets as sent, moved out of the frame.
    pub bytes: Octets,
    /// Sent as literal8.
    pub is_binary: bool,
    /// There is a NUL in it, which only literal8 may have.
    pub has_nul: bool,
}

/// `append = "APPEND" SP mailbox 1*append-message`,
/// `append-message = [SP flag-list] [SP date-time] SP (literal / literal8)`
pub(super) fn parse(c: &mut Cursor<'_>) -> Parse<Append> {
    let mailbox = c.sp_mailbox()?;
    let mut messages = Vec::new();
    loop {
        c.sp()?;
        let mut flags = Vec::new();
        if c.peek() == Some(b'(') {
            flags = c.flag_list()?;
            c.sp()?;
        }
        let mut date = None;
        if c.peek() == Some(b'"') {
            date = Some(parse_date_time(c)?);
            c.sp()?;
        }
        if c.peek() == Some(b'U') || c.peek() == Some(b'C') {
            return Err(Fault::bad("UTF8 and CATENATE are not supported"));
        }
        let literal = c.literal()?;
        messages.push(AppendMessage {
            flags,
            date,
            bytes: literal.bytes,
            is_binary: literal.is_literal8,
            has_nul: literal.has_nul,
        });
        if c.peek().is_none() {
            return Ok(Append { mailbox, messages });
        }
    }
}

/// `date-time = DQUOTE date-day-fixed "-" date-month "-" date-year SP time SP zone DQUOTE`
fn parse_date_time(c: &mut Cursor<'_>) -> Parse<DateTime> {
    let text = c.string("Date expected")?;
    date_time(&text).ok_or(Fault::bad("Invalid date-time"))
}

fn date_time(text: &[u8]) -> Option<DateTime> {
    let &[
        d1,
        d2,
        b'-',
        m1,
        m2,
        m3,
        b'-',
        y1,
        y2,
        y3,
        y4,
        b' ',
        h1,
        h2,
        b':',
        n1,
        n2,
        b':',
        s1,
        s2,
        b' ',
        sign,
        z1,
        z2,
        z3,
        z4,
    ] = text
    else {
        return None;
    };
    let digit = |b: u8| b.is_ascii_digit().then(|| b - b'0');
    let two = |a: u8, b: u8| Some(digit(a)? * 10 + digit(b)?);
    // date-day-fixed = (SP DIGIT) / 2DIGIT
    let day = if d1 == b' ' { digit(d2)? } else { two(d1, d2)? };
    let year = u16::from(two(y1, y2)?) * 100 + u16::from(two(y3, y4)?);
    let date = Date::new(year, month(&[m1, m2, m3])?, day)?;
    let (zone_hours, zone_minutes) = (i16::from(two(z1, z2)?), i16::from(two(z3, z4)?));
    let zone = match sign {
        _ if zone_minutes >= 60 => return None,
        b'+' => zone_hours * 60 + zone_minutes,
        b'-' => -(zone_hours * 60 + zone_minutes),
        _ => return None,
    };
    DateTime::new(date, two(h1, h2)?, two(n1, n2)?, two(s1, s2)?, zone)
}

/// `date-month = "Jan" / ... / "Dec"`: 1 to 12.
pub(super) fn month(name: &[u8]) -> Option<u8> {
    MONTHS.iter().position(|m| m.as_bytes().eq_ignore_ascii_case(name)).map(|i| i as u8 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::command::tests::{mailbox, parse_line};
    use proptest::prelude::*;

    #[test]
    fn one_message() {
        let append = parse_line("APPEND saved-messages (\\Seen) \" 7-Feb-1994 21:52:25 -0800\" {5+}\r\nabc\r\n");
        let date = DateTime { unix_seconds: 760_686_745, offset_minutes: -480 };
        let message = AppendMessage {
            flags: vec![Flag::Seen],
            date: Some(date),
            bytes: b"abc\r\n".to_vec().into(),
            is_binary: false,
            has_nul: false,
        };
        assert_eq!(append, Ok(Command::Append(Append { mailbox: mailbox("saved-messages"), messages: vec![message] })));
    }

    #[test]
    fn several_messages_and_binary() {
        let Ok(Command::Append(append)) = parse_line("APPEND x {1+}\r\na () ~{2+}\r\n\0b (\\Draft) {0+}\r\n") else {
            panic!("well formed")
        };
        let found: Vec<_> =
            append.messages.iter().map(|m| (m.bytes.clone().into_vec(), m.is_binary, m.has_nul)).collect();
        assert_eq!(found, [(b"a".to_vec(), false, false), (b"\0b".to_vec(), true, true), (Vec::new(), false, false)]);
    }

    #[test]
    fn refused() {
        assert_eq!(parse_line("APPEND x"), Err("BAD Space expected".into()));
        assert_eq!(parse_line("APPEND x \"text\""), Err("BAD Invalid date-time".into()));
        assert_eq!(parse_line("APPEND x y"), Err("BAD Literal expected".into()));
        assert_eq!(parse_line("APPEND x {1+}\r\na "), Err("BAD Literal expected".into()));
        assert_eq!(
            parse_line("APPEND a&b {1+}\r\na"),
            Err("NO [CANNOT] Mailbox name is not valid modified UTF-7".into())
        );
        for date in [
            "31-Feb-2024 00:00:00 +0000",
            "01-Jan-2024 24:00:00 +0000",
            "01-Jan-2024 00:00:00 0000",
            "1-Jan-2024 00:00:00 +0000",
            "01-Foo-2024 00:00:00 +0000",
            "01-Jan-2024 00:00:00 +0060",
            "01-Jan-2024 00:00:00 +9900",
        ] {
            assert_eq!(
                parse_line(&format!("APPEND x \"{date}\" {{1+}}\r\na")),
                Err("BAD Invalid date-time".into()),
                "{date}"
            );
        }
    }

    proptest! {
        #[test]
        fn internal_date_round_trip(unix_seconds in -60_000_000_000i64..250_000_000_000, offset_minutes in -1439i16..1440) {
            let date = DateTime { unix_seconds, offset_minutes };
            let mut out = Vec::new();
            crate::response::write_internal_date(&mut out, date);
            prop_assert_eq!(date_time(&out[1..out.len() - 1]), Some(date));
        }
    }
}
