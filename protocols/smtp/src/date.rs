//! The date-time of trace headers (RFC 5322, 3.3), from a time the caller gives.

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// Appends `date-time = [ day-of-week "," ] date time` for a Unix time, shown at `offset_minutes` east of UTC.
///
/// Times outside the years 0 to 9999 are clamped, because the form has four digits for the year.
pub(crate) fn write_date_time(out: &mut Vec<u8>, unix_seconds: i64, offset_minutes: i16) {
    const YEAR_0: i64 = -62_167_219_200;
    const YEAR_10000: i64 = 253_402_300_800;
    let offset_minutes = offset_minutes.clamp(-23 * 60 - 59, 23 * 60 + 59);
    let local = unix_seconds.saturating_add(i64::from(offset_minutes) * 60).clamp(YEAR_0, YEAR_10000 - 1);
    let (days, second_of_day) = (local.div_euclid(86_400), local.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(days);
    let sign = if offset_minutes < 0 { '-' } else { '+' };
    let offset = offset_minutes.unsigned_abs();
    use std::io::Write;
    // Writing to a Vec cannot fail.
    let _ = write!(
        out,
        "{}, {} {} {:04} {:02}:{:02}:{:02} {}{:02}{:02}",
        DAYS[days.rem_euclid(7) as usize],
        day,
        MONTHS[month as usize - 1],
        year,
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
        sign,
        offset / 60,
        offset % 60
    );
}

/// The Gregorian date of a day counted from 1970-01-01: eras of 400 years that begin on 1 March, so that the leap
/// day is the last of its year.
fn civil_from_days(days: i64) -> (i64, u32, u32) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u32;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(unix_seconds: i64, offset_minutes: i16) -> String {
        let mut out = Vec::new();
        write_date_time(&mut out, unix_seconds, offset_minutes);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn known_dates() {
        assert_eq!(at(0, 0), "Thu, 1 Jan 1970 00:00:00 +0000");
        assert_eq!(at(1_709_164_800, 0), "Thu, 29 Feb 2024 00:00:00 +0000");
        assert_eq!(at(951_782_399, 330), "Tue, 29 Feb 2000 05:29:59 +0530");
        assert_eq!(at(1_700_000_000, -480), "Tue, 14 Nov 2023 14:13:20 -0800");
        assert_eq!(at(-1, 0), "Wed, 31 Dec 1969 23:59:59 +0000");
    }

    /// Trap 55: no counter overflows at its limits.
    #[test]
    fn trap_55_extremes_are_clamped() {
        assert_eq!(at(i64::MAX, i16::MAX), "Fri, 31 Dec 9999 23:59:59 +2359");
        assert_eq!(at(i64::MIN, i16::MIN), "Sat, 1 Jan 0000 00:00:00 -2359");
    }
}
