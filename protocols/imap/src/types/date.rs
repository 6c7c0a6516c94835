//! Dates of SEARCH and APPEND, and INTERNALDATE (RFC 3501, 9: date, date-time).

pub(crate) const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// A day that exists in the Gregorian calendar, without a time zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Date {
    year: u16,
    month: u8,
    day: u8,
}

impl Date {
    /// `None` for a day that does not exist.
    pub fn new(year: u16, month: u8, day: u8) -> Option<Self> {
        let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let days = match month {
            1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
            4 | 6 | 9 | 11 => 30,
            2 if leap => 29,
            2 => 28,
            _ => return None,
        };
        ((1..=days).contains(&day) && year <= 9999).then_some(Self { year, month, day })
    }

    pub fn year(self) -> u16 {
        self.year
    }

    pub fn month(self) -> u8 {
        self.month
    }

    pub fn day(self) -> u8 {
        self.day
    }

    /// Days since 1970-01-01. The internal date in days of its own zone compares with this: SEARCH disregards time and
    /// zone (RFC 3501, 6.4.4).
    pub fn days_since_epoch(self) -> i64 {
        // Years that begin on 1 March, in eras of 400.
        let (year, month) = (i64::from(self.year), i64::from(self.month));
        let year = if month <= 2 { year - 1 } else { year };
        let month_from_march = (month + 9) % 12;
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        era * 146_097 + day_of_era - 719_468
    }

    fn from_days(days: i64) -> (i64, u8, u8) {
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u8;
        (year_of_era + era * 400 + i64::from(month <= 2), month, day)
    }
}

/// A moment, and the zone it was given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DateTime {
    pub unix_seconds: i64,
    /// East of UTC.
    pub offset_minutes: i16,
}

impl DateTime {
    /// `None` for a time of day or a zone that does not exist. A leap second counts as the second after it.
    pub fn new(date: Date, hour: u8, minute: u8, second: u8, offset_minutes: i16) -> Option<Self> {
        let ok = hour < 24 && minute < 60 && second <= 60 && offset_minutes.unsigned_abs() < 24 * 60;
        let local =
            date.days_since_epoch() * 86_400 + i64::from(hour) * 3600 + i64::from(minute) * 60 + i64::from(second);
        ok.then_some(Self { unix_seconds: local - i64::from(offset_minutes) * 60, offset_minutes })
    }

    /// Days since 1970-01-01 in the zone of this moment.
    pub fn local_days(self) -> i64 {
        self.local_seconds().div_euclid(86_400)
    }

    /// Year, month, day and second of the day in the zone of this moment, clamped to the years 0 to 9999, which is what
    /// four digits hold.
    pub(crate) fn local_parts(self) -> (i64, u8, u8, u32) {
        let seconds = self.local_seconds();
        let (year, month, day) = Date::from_days(seconds.div_euclid(86_400));
        (year, month, day, seconds.rem_euclid(86_400) as u32)
    }

    fn local_seconds(self) -> i64 {
        const YEAR_0: i64 = -62_167_219_200;
        const YEAR_10000: i64 = 253_402_300_800;
        self.unix_seconds.saturating_add(i64::from(self.offset_minutes) * 60).clamp(YEAR_0, YEAR_10000 - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn days_that_do_not_exist() {
        for (year, month, day) in
            [(2023, 2, 29), (1900, 2, 29), (2024, 4, 31), (2024, 0, 1), (2024, 13, 1), (2024, 1, 0)]
        {
            assert_eq!(Date::new(year, month, day), None);
        }
        assert!(Date::new(2000, 2, 29).is_some() && Date::new(2024, 2, 29).is_some());
        let date = Date::new(2024, 1, 1).unwrap();
        assert_eq!(DateTime::new(date, 24, 0, 0, 0), None);
        assert_eq!(DateTime::new(date, 0, 60, 0, 0), None);
        assert_eq!(DateTime::new(date, 0, 0, 61, 0), None);
        assert_eq!(DateTime::new(date, 0, 0, 0, 1440), None);
    }

    #[test]
    fn known_days() {
        assert_eq!(Date::new(1970, 1, 1).unwrap().days_since_epoch(), 0);
        assert_eq!(Date::new(2000, 3, 1).unwrap().days_since_epoch(), 11_017);
        let date = Date::new(1996, 7, 17).unwrap();
        assert_eq!(DateTime::new(date, 2, 44, 25, -420).unwrap().unix_seconds, 837_596_665);
    }

    proptest! {
        #[test]
        fn round_trip(days in -719_000i64..2_900_000, seconds in 0u32..86_400, offset in -1439i16..1440) {
            let (year, month, day) = Date::from_days(days);
            let date = Date::new(year as u16, month, day).unwrap();
            prop_assert_eq!(date.days_since_epoch(), days);
            let (hour, minute, second) = ((seconds / 3600) as u8, (seconds / 60 % 60) as u8, (seconds % 60) as u8);
            let time = DateTime::new(date, hour, minute, second, offset).unwrap();
            prop_assert_eq!(time.local_parts(), (year, month, day, seconds));
            prop_assert_eq!(time.local_days(), days);
        }

        /// Trap 55: no time overflows.
        #[test]
        fn trap_55_any_time(unix_seconds in any::<i64>(), offset_minutes in any::<i16>()) {
            DateTime { unix_seconds, offset_minutes }.local_parts();
        }
    }
}
