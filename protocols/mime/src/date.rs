//! The Date field (RFC 5322, 3.3 and 4.3), for SEARCH SENTSINCE and its like, and for sorting.

use crate::header::Tokens;

/// When a message says that it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentDate {
    pub unix_seconds: i64,
    /// Days since 1970-01-01 in the zone of the field: SEARCH disregards time and zone (RFC 3501, 6.4.4).
    pub local_day: i32,
}

/// `date-time = [ day-of-week "," ] date time [CFWS]`, the obsolete forms included. A time or zone that is missing or broken
/// counts as midnight or UTC, because the day is what is searched for.
pub fn parse_date(value: &[u8]) -> Option<SentDate> {
    let mut tokens = Tokens::new(value);
    let mut word = next_word(&mut tokens);
    if !word.first()?.is_ascii_digit() {
        tokens.eat(b',');
        word = next_word(&mut tokens);
    }
    let day = number(word, 2)?;
    let month = month(next_word(&mut tokens))?;
    let year = year(next_word(&mut tokens))?;
    let last_day = match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if !(1..=last_day).contains(&day) {
        return None;
    }
    let local_day = days_since_epoch(year, month, day);
    let seconds = time_of_day(&mut tokens).unwrap_or(0);
    let zone_minutes = zone(next_word(&mut tokens)).unwrap_or(0);
    let unix_seconds = local_day * 86_400 + seconds - zone_minutes * 60;
    Some(SentDate { unix_seconds, local_day: i32::try_from(local_day).ok()? })
}

fn next_word<'a>(tokens: &mut Tokens<'a>) -> &'a [u8] {
    // Some software writes 17-Jul-1996.
    tokens.skip_cfws();
    tokens.take_while(|b| b.is_ascii_alphanumeric() || b == b'+', b'-')
}

fn number(word: &[u8], digits_max: usize) -> Option<i64> {
    let ok = (1..=digits_max).contains(&word.len()) && word.iter().all(u8::is_ascii_digit);
    ok.then(|| word.iter().fold(0, |n, d| n * 10 + i64::from(d - b'0')))
}

fn month(word: &[u8]) -> Option<i64> {
    const MONTHS: [&[u8]; 12] =
        [b"jan", b"feb", b"mar", b"apr", b"may", b"jun", b"jul", b"aug", b"sep", b"oct", b"nov", b"dec"];
    let start = word.get(..3)?;
    MONTHS.iter().position(|month| month.eq_ignore_ascii_case(start)).map(|i| i as i64 + 1)
}

/// `obs-year`: two digits below 50 are of this century, other years of two or three digits are from 1900 on.
fn year(word: &[u8]) -> Option<i64> {
    let year = number(word, 4)?;
    Some(match word.len() {
        2 if year < 50 => year + 2000,
        2 | 3 => year + 1900,
        4 => year,
        _ => return None,
    })
}

/// `time-of-day = hour ":" minute [ ":" second ]`
fn time_of_day(tokens: &mut Tokens<'_>) -> Option<i64> {
    let hour = number(next_word(tokens), 2).filter(|n| *n < 24)?;
    let minute = if tokens.eat(b':') { number(next_word(tokens), 2).filter(|n| *n < 60)? } else { 0 };
    let second = if tokens.eat(b':') { number(next_word(tokens), 2).filter(|n| *n <= 60)? } else { 0 };
    Some(hour * 3600 + minute * 60 + second)
}

/// `zone = (FWS ( "+" / "-" ) 4DIGIT) / obs-zone`, in minutes east of UTC.
fn zone(word: &[u8]) -> Option<i64> {
    let hours = match word {
        [sign @ (b'+' | b'-'), digits @ ..] => {
            let hhmm = number(digits, 4).filter(|n| digits.len() == 4 && n % 100 < 60)?;
            let minutes = hhmm / 100 * 60 + hhmm % 100;
            return Some(if *sign == b'-' { -minutes } else { minutes });
        }
        b"EDT" => -4,
        b"EST" | b"CDT" => -5,
        b"CST" | b"MDT" => -6,
        b"MST" | b"PDT" => -7,
        b"PST" => -8,
        _ => return None,
    };
    Some(hours * 60)
}

/// Years that begin on 1 March, in eras of 400.
fn days_since_epoch(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(text: &str) -> Option<(i64, i32)> {
        parse_date(text.as_bytes()).map(|date| (date.unix_seconds, date.local_day))
    }

    #[test]
    fn forms() {
        let expected = Some((837_595_405, 9694));
        assert_eq!(at("Wed, 17 Jul 1996 02:23:25 -0700 (PDT)"), expected);
        assert_eq!(at("17 jul 96 02:23:25 PDT"), expected);
        assert_eq!(at(" Wed ,\r\n\t17 (c) July 1996 02 : 23:25 -0700"), expected);
        assert_eq!(at("Wed, 17-Jul-1996 02:23:25 -0700"), expected);
        assert_eq!(at("Wed Jul 17 1996"), None);
        assert_eq!(at("1 Jan 1970 00:00 GMT"), Some((0, 0)));
        assert_eq!(at("1 Jan 1970"), Some((0, 0)));
        assert_eq!(at("29 Feb 2024 23:59:60 +2359"), Some((1_709_164_860, 19_782)));
        for bad in ["", "x", "31 Feb 2024 00:00:00 +0000", "0 Jan 2024", "1 Foo 2024", "1 Jan 20245", "1 Jan"] {
            assert_eq!(at(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[0-9A-Za-z:,+() -]{0,40}") {
            at(&text);
        }
    }
}
