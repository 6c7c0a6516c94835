//! When which operation of which user comes: Poisson arrivals whose rate follows the day, and users by Zipf's law.

use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Exp, Zipf};
use serde::Serialize;

use super::settings::Profile;

const SECONDS_PER_HOUR: f64 = 3600.0;

/// What users do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A message is delivered.
    Deliver,
    /// A message that was sent is appended to the mailbox of sent mail.
    Append,
    /// A client that is not in IDLE connects, asks for what is new and leaves.
    Poll,
    /// A POP3 session.
    Pop3,
    /// The newest message is fetched.
    Read,
    /// A flag of a message is changed.
    Flags,
    Search,
    /// The oldest message is marked and expunged.
    Delete,
}

impl Kind {
    pub const ALL: [Self; 8] =
        [Self::Deliver, Self::Append, Self::Poll, Self::Pop3, Self::Read, Self::Flags, Self::Search, Self::Delete];

    pub fn name(self) -> &'static str {
        match self {
            Self::Deliver => "deliver",
            Self::Append => "append",
            Self::Poll => "poll",
            Self::Pop3 => "pop3",
            Self::Read => "read",
            Self::Flags => "flags",
            Self::Search => "search",
            Self::Delete => "delete",
        }
    }
}

/// How much of a profile there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Users whose load it is.
    pub users: f64,
    /// Seconds of the profile in one of the run.
    pub speed: f64,
}

/// Operations of a kind in a second of the run, in an hour of the profile's day.
pub fn rate(profile: &Profile, scale: Scale, kind: Kind, hour: usize) -> f64 {
    let (mail, imap) = (&profile.mail, &profile.imap);
    let per_user_and_day = |count: f64| count * scale.users * profile.share_of_day(hour) / SECONDS_PER_HOUR;
    let (by_imap, by_pop3) = (profile.users.imap_share, profile.users.pop3_share);
    let received = per_user_and_day(mail.received_per_day);
    let active = scale.users * profile.users.active_share * profile.share_of_peak(hour);
    let rate = match kind {
        Kind::Deliver => received,
        Kind::Append => per_user_and_day(mail.sent_per_day) * by_imap,
        Kind::Poll => {
            let polling = active * by_imap * imap.connections_per_active_user * (1.0 - imap.idle_share);
            polling * imap.polls_per_hour / SECONDS_PER_HOUR
        }
        Kind::Pop3 => active * by_pop3 * profile.pop3.polls_per_hour / SECONDS_PER_HOUR,
        Kind::Read => received * by_imap * imap.reads_per_delivery,
        Kind::Flags => received * by_imap * imap.flag_changes_per_delivery,
        Kind::Search => per_user_and_day(imap.searches_per_day) * by_imap,
        Kind::Delete => received * by_imap * imap.deletions_per_delivery,
    };
    rate * scale.speed
}

/// Connections in IDLE in an hour.
pub fn idle_connections(profile: &Profile, users: f64, hour: usize) -> usize {
    let active = users * profile.users.active_share * profile.share_of_peak(hour) * profile.users.imap_share;
    (active * profile.imap.connections_per_active_user * profile.imap.idle_share).round() as usize
}

/// Which hours a run goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hours {
    /// The same all the time.
    One(usize),
    /// All of them, from the first on.
    Day,
}

/// An operation that is to come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    /// From the start of the run.
    pub at: Duration,
    pub kind: Kind,
    /// What the user, the message and other choices are drawn from.
    pub number: u64,
}

/// Arrivals one after another. Each kind is a Poisson process of its own; together they are one whose rate is the sum.
#[derive(Debug)]
pub struct Schedule {
    random: Xoshiro256PlusPlus,
    /// Rates of the kinds by hour.
    rates: Vec<Vec<(Kind, f64)>>,
    hours: Hours,
    speed: f64,
    /// The largest sum of rates of any hour.
    rate_max: f64,
    /// Seconds.
    now: f64,
}

impl Schedule {
    /// Arrivals of some kinds. The same seed gives the same.
    pub fn new(profile: &Profile, scale: Scale, hours: Hours, kinds: &[Kind], seed: u64) -> Self {
        let of_hour = |hour| kinds.iter().map(|&kind| (kind, rate(profile, scale, kind, hour))).collect();
        let rates: Vec<Vec<(Kind, f64)>> = match hours {
            Hours::One(hour) => vec![of_hour(hour)],
            Hours::Day => (0..24).map(of_hour).collect(),
        };
        let sum = |rates: &Vec<(Kind, f64)>| rates.iter().map(|(_, rate)| rate).sum::<f64>();
        let rate_max = rates.iter().map(sum).fold(0.0, f64::max);
        let random = Xoshiro256PlusPlus::seed_from_u64(seed);
        Self { random, rates, hours, speed: scale.speed, rate_max, now: 0.0 }
    }
}

impl Iterator for Schedule {
    type Item = Arrival;

    /// `None` if nothing ever comes.
    fn next(&mut self) -> Option<Arrival> {
        let gap = Exp::new(self.rate_max).ok().filter(|_| self.rate_max > 0.0)?;
        loop {
            self.now += gap.sample(&mut self.random);
            let hour = match self.hours {
                Hours::One(_) => 0,
                Hours::Day => (self.now * self.speed / SECONDS_PER_HOUR) as usize % 24,
            };
            // Thinning: of arrivals at the largest rate as many are kept as the hour has.
            let mut drawn = self.random.random_range(0.0..self.rate_max);
            for &(kind, rate) in &self.rates[hour] {
                if drawn < rate {
                    let at = Duration::from_secs_f64(self.now);
                    return Some(Arrival { at, kind, number: self.random.random() });
                }
                drawn -= rate;
            }
        }
    }
}

/// Draws users so that the n-th does 1 / n^exponent as much as the first.
#[derive(Clone, Copy, Debug)]
pub struct Ranks {
    zipf: Zipf<f64>,
}

impl Ranks {
    /// `None` if there is nobody.
    pub fn new(count: usize, exponent: f64) -> Option<Self> {
        if count == 0 {
            return None;
        }
        Zipf::new(count as f64, exponent).ok().map(|zipf| Self { zipf })
    }

    /// A rank from 0 on, which depends on `number` alone.
    pub fn draw(&self, number: u64) -> usize {
        self.zipf.sample(&mut Xoshiro256PlusPlus::seed_from_u64(number)) as usize - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles/business.toml");
        Profile::load(&path).unwrap()
    }

    /// Chi-square over its degrees of freedom, of counts against expectations.
    fn chi_square(found: &[u64], expected: &[f64]) -> f64 {
        let sum: f64 =
            found.iter().zip(expected).map(|(&found, expected)| (found as f64 - expected).powi(2) / expected).sum();
        sum / (found.len() - 1) as f64
    }

    /// How far users drawn by one exponent are from those that another has.
    fn zipf_against(drawn_by: f64, expected_by: f64) -> f64 {
        const USERS: usize = 200;
        const DRAWS: u64 = 200_000;
        let ranks = Ranks::new(USERS, drawn_by).unwrap();
        let mut found = vec![0; USERS];
        (0..DRAWS).for_each(|number| found[ranks.draw(number)] += 1);
        let weights: Vec<f64> = (1..=USERS).map(|rank| (rank as f64).powf(-expected_by)).collect();
        let sum: f64 = weights.iter().sum();
        chi_square(&found, &weights.iter().map(|weight| weight / sum * DRAWS as f64).collect::<Vec<_>>())
    }

    /// With 199 degrees of freedom the quotient has mean 1 and standard deviation 0.1.
    #[test]
    fn users_follow_zipfs_law() {
        for exponent in [0.0, 0.5, 0.8, 1.0, 1.2] {
            let right = zipf_against(exponent, exponent);
            assert!((0.5..1.5).contains(&right), "{exponent}: {right}");
            for wrong in [exponent + 0.05, exponent - 0.05] {
                let wrong_one = zipf_against(exponent, wrong);
                assert!(wrong_one > 3.0, "{exponent} passes for {wrong}: {wrong_one}");
            }
        }
        assert!(Ranks::new(0, 1.0).is_none());
        assert_eq!(Ranks::new(1, 1.0).unwrap().draw(7), 0);
    }

    fn arrivals(seed: u64, count: usize) -> Vec<Arrival> {
        let scale = Scale { users: 10_000.0, speed: 1.0 };
        Schedule::new(&profile(), scale, Hours::One(9), &Kind::ALL, seed).take(count).collect()
    }

    #[test]
    fn arrivals_are_poisson() {
        const SEED: u64 = 11;
        const COUNT: usize = 100_000;
        let arrivals = arrivals(SEED, COUNT);
        let scale = Scale { users: 10_000.0, speed: 1.0 };
        let rates = Kind::ALL.map(|kind| rate(&profile(), scale, kind, 9));
        let total: f64 = rates.iter().sum();
        // The gaps are exponential: their deciles are as full as each other, and their mean is 1 / rate.
        let mut deciles = [0; 10];
        let mut before = 0.0;
        for arrival in &arrivals {
            let at = arrival.at.as_secs_f64();
            let quantile = 1.0 - (-(at - before) * total).exp();
            deciles[((quantile * 10.0) as usize).min(9)] += 1;
            before = at;
        }
        let quotient = chi_square(&deciles, &[COUNT as f64 / 10.0; 10]);
        // With 9 degrees of freedom the standard deviation is 0.47.
        assert!(quotient < 3.5, "seed {SEED}: {quotient}, {deciles:?}");
        let counted = COUNT as f64 / before;
        assert!((counted / total - 1.0).abs() < 4.0 / (COUNT as f64).sqrt(), "seed {SEED}: {counted} for {total}");
        // Kinds come as often as they should.
        let found = Kind::ALL.map(|kind| arrivals.iter().filter(|arrival| arrival.kind == kind).count() as u64);
        let (found, expected): (Vec<u64>, Vec<f64>) = found
            .into_iter()
            .zip(rates)
            .filter(|(_, rate)| *rate > 0.0)
            .map(|(f, r)| (f, r / total * COUNT as f64))
            .unzip();
        let quotient = chi_square(&found, &expected);
        assert!(quotient < 3.5, "seed {SEED}: {quotient}, {found:?} for {expected:?}");
        // Counts in equal times vary as much as they are: a scheduler with even gaps would have less.
        let seconds = arrivals.iter().fold(vec![0_u64; before as usize + 1], |mut counts, arrival| {
            counts[arrival.at.as_secs() as usize] += 1;
            counts
        });
        let seconds = &seconds[..seconds.len() - 1];
        let mean = seconds.iter().sum::<u64>() as f64 / seconds.len() as f64;
        let variance = seconds.iter().map(|&count| (count as f64 - mean).powi(2)).sum::<f64>() / seconds.len() as f64;
        assert!((0.8..1.25).contains(&(variance / mean)), "seed {SEED}: variance {variance}, mean {mean}");
    }

    #[test]
    fn a_seed_gives_the_same_arrivals() {
        assert_eq!(arrivals(3, 50), arrivals(3, 50));
        assert_ne!(arrivals(3, 50), arrivals(4, 50));
    }

    #[test]
    fn a_day_follows_its_curve() {
        let profile = profile();
        // A day in 24 seconds.
        let scale = Scale { users: 1000.0, speed: 3600.0 };
        let schedule = Schedule::new(&profile, scale, Hours::Day, &[Kind::Deliver], 5);
        let mut found = [0_u64; 24];
        schedule.take_while(|arrival| arrival.at.as_secs() < 24).for_each(|at| found[at.at.as_secs() as usize] += 1);
        let in_a_day = 1000.0 * profile.mail.received_per_day;
        let expected: Vec<f64> = (0..24).map(|hour| profile.share_of_day(hour) * in_a_day).collect();
        // 23 degrees of freedom: the standard deviation is 0.3.
        let quotient = chi_square(&found, &expected);
        assert!(quotient < 2.5, "seed 5: {quotient}, {found:?} for {expected:?}");
    }

    #[test]
    fn nothing_comes_where_nothing_is_done() {
        let scale = Scale { users: 0.0, speed: 1.0 };
        assert_eq!(Schedule::new(&profile(), scale, Hours::One(9), &Kind::ALL, 1).next(), None);
    }

    #[test]
    fn rates_are_those_of_the_profile() {
        let profile = profile();
        let scale = Scale { users: 2.0, speed: 1.0 };
        let in_a_day = |kind| (0..24).map(|hour| rate(&profile, scale, kind, hour) * 3600.0).sum::<f64>();
        let received = in_a_day(Kind::Deliver);
        assert!((received - 2.0 * profile.mail.received_per_day).abs() < 1e-9);
        let flags = received * profile.users.imap_share * profile.imap.flag_changes_per_delivery;
        assert!((in_a_day(Kind::Flags) - flags).abs() < 1e-9);
        let hour = profile.busiest_hour();
        let idle = idle_connections(&profile, 1000.0, hour) as f64;
        let polls = rate(&profile, Scale { users: 1000.0, speed: 1.0 }, Kind::Poll, hour) * 3600.0;
        let all =
            1000.0 * profile.users.active_share * profile.users.imap_share * profile.imap.connections_per_active_user;
        assert!(
            (idle + polls / profile.imap.polls_per_hour - all).abs() < 1.0,
            "{idle} in IDLE, {polls} polls, {all} in all"
        );
    }
}
