//! A profile: what users do in a day, as a planner writes it down.

use std::fmt;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::generator::Sizes;

const HOURS: usize = 24;
/// Two names are similar from here on (Jaro-Winkler).
const SIMILARITY_MIN: f64 = 0.7;

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// What the report calls it.
    pub name: String,
    pub users: Users,
    pub mail: Mail,
    pub imap: Imap,
    pub pop3: Pop3,
    pub day: Day,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Users {
    /// Users whose load it is.
    pub count: f64,
    /// 0 to 1, in the busiest hour.
    pub active_share: f64,
    /// 0: all users do as much.
    pub zipf_exponent: f64,
    /// 0 to 1; with `pop3_share` 1.
    pub imap_share: f64,
    pub pop3_share: f64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Mail {
    /// Messages by user and day.
    pub received_per_day: f64,
    pub sent_per_day: f64,
    pub size_median_bytes: u64,
    pub size_mean_bytes: u64,
    pub size_max_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Imap {
    pub connections_per_active_user: f64,
    /// 0 to 1: connections that wait in IDLE; the others come and go.
    pub idle_share: f64,
    /// By connection that is not in IDLE.
    pub polls_per_hour: f64,
    /// By message that is received.
    pub reads_per_delivery: f64,
    pub flag_changes_per_delivery: f64,
    pub deletions_per_delivery: f64,
    /// By user and day.
    pub searches_per_day: f64,
    /// As IMAP writes it.
    pub search_keys: String,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pop3 {
    /// By active user.
    pub polls_per_hour: f64,
    /// Whether what was retrieved is deleted.
    pub deletes: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Day {
    /// How busy each hour is beside the others, from 0 to 23.
    pub factors: Vec<f64>,
}

/// Why a profile cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct ProfileError {
    place: String,
    what: String,
}

impl fmt::Display for ProfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

impl std::error::Error for ProfileError {}

impl Profile {
    /// # Errors
    /// It cannot be read; there is a key that is not known, with its line and the nearest that is known; one is missing or out of
    /// range.
    pub fn load(path: &Path) -> Result<Self, ProfileError> {
        let place = path.display().to_string();
        let failed = |error: std::io::Error| ProfileError { place: place.clone(), what: error.to_string() };
        Self::parse(&fs::read_to_string(path).map_err(failed)?, &place)
    }

    fn parse(text: &str, file: &str) -> Result<Self, ProfileError> {
        let profile: Self = toml::from_str(text).map_err(|error| {
            let line = |at: usize| text[..at].matches('\n').count() + 1;
            let place = error.span().map_or(file.to_owned(), |span| format!("{file}, line {}", line(span.start)));
            ProfileError { place, what: explain(error.message()) }
        })?;
        profile.check().map_err(|what| ProfileError { place: file.to_owned(), what })?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), String> {
        let Self { users, mail, imap, pop3, day, .. } = self;
        for (key, share) in [
            ("users.active_share", users.active_share),
            ("users.imap_share", users.imap_share),
            ("users.pop3_share", users.pop3_share),
            ("imap.idle_share", imap.idle_share),
        ] {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("{key} is a share from 0 to 1, and is {share}"));
            }
        }
        if (users.imap_share + users.pop3_share - 1.0).abs() > 1e-6 {
            return Err("users.imap_share and users.pop3_share are 1 together".to_owned());
        }
        for (key, number) in [
            ("users.count", users.count),
            ("users.zipf_exponent", users.zipf_exponent),
            ("mail.received_per_day", mail.received_per_day),
            ("mail.sent_per_day", mail.sent_per_day),
            ("imap.connections_per_active_user", imap.connections_per_active_user),
            ("imap.polls_per_hour", imap.polls_per_hour),
            ("imap.reads_per_delivery", imap.reads_per_delivery),
            ("imap.flag_changes_per_delivery", imap.flag_changes_per_delivery),
            ("imap.deletions_per_delivery", imap.deletions_per_delivery),
            ("imap.searches_per_day", imap.searches_per_day),
            ("pop3.polls_per_hour", pop3.polls_per_hour),
        ] {
            if !number.is_finite() || number < 0.0 {
                return Err(format!("{key} is a number from 0 on, and is {number}"));
            }
        }
        let good = day.factors.iter().all(|factor| factor.is_finite() && *factor >= 0.0);
        if day.factors.len() != HOURS || !good || self.busiest() <= 0.0 {
            return Err("day.factors are 24 numbers from 0 on, of which one is more".to_owned());
        }
        Ok(())
    }

    pub fn sizes(&self) -> Sizes {
        let Mail { size_median_bytes, size_mean_bytes, size_max_bytes, .. } = self.mail;
        Sizes { median: size_median_bytes, mean: size_mean_bytes, max: size_max_bytes }
    }

    fn busiest(&self) -> f64 {
        self.day.factors.iter().copied().fold(0.0, f64::max)
    }

    /// The first hour that is as busy as any.
    pub fn busiest_hour(&self) -> usize {
        let busiest = self.busiest();
        self.day.factors.iter().position(|factor| *factor >= busiest).unwrap_or(0)
    }

    /// The part of a day's operations that comes in an hour.
    pub fn share_of_day(&self, hour: usize) -> f64 {
        self.day.factors[hour % HOURS] / self.day.factors.iter().sum::<f64>()
    }

    /// How busy an hour is beside the busiest.
    pub fn share_of_peak(&self, hour: usize) -> f64 {
        self.day.factors[hour % HOURS] / self.busiest()
    }
}

/// The parser's message, with the nearest known key for one that is not known.
fn explain(message: &str) -> String {
    let parts = message.strip_prefix("unknown field `").and_then(|rest| rest.split_once("`, "));
    let Some((unknown, expected)) = parts else { return message.to_owned() };
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let similarity = |key: &&&str| strsim::jaro_winkler(unknown, key);
    let nearest = known.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    let known = known.join(", ");
    match nearest.filter(|key| similarity(key) > SIMILARITY_MIN) {
        Some(nearest) => format!("there is no key `{unknown}`; did you mean `{nearest}`? Known here: {known}"),
        None => format!("there is no key `{unknown}`. Known here: {known}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profiles() -> Vec<(String, String)> {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| (path.display().to_string(), fs::read_to_string(&path).unwrap())).collect()
    }

    #[test]
    fn the_profiles_can_be_read() {
        let profiles = profiles();
        assert_eq!(profiles.len(), 3);
        for (name, text) in profiles {
            let profile = Profile::parse(&text, &name).unwrap();
            assert!((0..24).all(|hour| profile.share_of_peak(hour) <= profile.share_of_peak(profile.busiest_hour())));
            assert!(((0..24).map(|hour| profile.share_of_day(hour)).sum::<f64>() - 1.0).abs() < 1e-9);
            // A planner who edits it finds a comment above each key.
            let mut before = "";
            for line in text.lines() {
                if line.contains(" = ") && !line.starts_with('#') {
                    assert!(before.starts_with('#'), "{name}: no comment above {line}");
                }
                before = line;
            }
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line_and_the_nearest() {
        let (_, text) = profiles().remove(0);
        let misspelt = text.replace("active_share =", "active_shared =");
        let line = misspelt.lines().position(|line| line.starts_with("active_shared")).unwrap() + 1;
        let error = Profile::parse(&misspelt, "p.toml").unwrap_err().to_string();
        assert!(error.starts_with(&format!("p.toml, line {line}: there is no key `active_shared`; ")), "{error}");
        assert!(error.contains("did you mean `active_share`?"), "{error}");
        let error = Profile::parse(&format!("weather = 1\n{text}"), "p.toml").unwrap_err().to_string();
        assert!(error.starts_with("p.toml, line 1: there is no key `weather`. Known here: name, users"), "{error}");
    }

    #[test]
    fn what_is_missing_or_out_of_range_is_refused() {
        let (_, text) = profiles().remove(0);
        let without = |start: &str| {
            let kept: Vec<_> = text.lines().filter(|line| !line.starts_with(start)).collect();
            Profile::parse(&kept.join("\n"), "p.toml").unwrap_err().to_string()
        };
        assert!(without("polls_per_hour").contains("missing field `polls_per_hour`"));
        assert!(without("factors").contains("factors"));
        let profile = Profile::parse(&text, "p.toml").unwrap();
        let refused = |change: fn(&mut Profile)| {
            let mut changed = profile.clone();
            change(&mut changed);
            changed.check().unwrap_err()
        };
        assert!(refused(|profile| profile.users.active_share = 1.1).contains("users.active_share"));
        assert!(refused(|profile| profile.users.imap_share /= 2.0).contains("1 together"));
        assert!(refused(|profile| profile.mail.received_per_day = -1.0).contains("mail.received_per_day"));
        assert!(refused(|profile| profile.day.factors[3] = f64::NAN).contains("day.factors"));
        assert!(refused(|profile| profile.day.factors = vec![0.0; 24]).contains("day.factors"));
        assert!(refused(|profile| profile.day.factors = vec![1.0; 23]).contains("day.factors"));
    }
}
