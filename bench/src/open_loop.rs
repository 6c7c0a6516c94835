//! Arrivals of an open loop: operations are due at moments that do not depend on the server's answers.
//!
//! The gaps between arrivals are exponential, so that arrivals are a Poisson process, and they come from a seed, so that a run
//! can be repeated. An arrival goes to the connection that has been free for the longest. While all are busy, arrivals wait in
//! their order; an arrival that finds [`WAITING_MAX`] before it is not sent. Latency counts from the moment an operation is
//! due: what a server makes wait while it stalls is then seen by every operation that was due in that time.

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Arrivals that may wait for a free connection.
pub const WAITING_MAX: usize = 100_000;
/// The longest that arrivals which were due before the end of a run are still sent after it. It is less where an operation
/// may take less.
pub const DRAIN_MAX: Duration = Duration::from_secs(5);
/// The least rate, one arrival in about a day: less is a mistake.
const RATE_MIN: f64 = 1e-5;
/// The greatest rate: an arrival each 100 ns is more than any client sends.
const RATE_MAX: f64 = 1e7;

/// The moments of arrivals, counted from the start.
#[derive(Clone, Debug)]
pub struct Arrivals {
    random: Xoshiro256PlusPlus,
    rate: f64,
    seconds: f64,
}

impl Arrivals {
    /// `rate` is arrivals a second in the mean.
    pub fn new(seed: u64, rate: f64) -> Self {
        Self { random: Xoshiro256PlusPlus::seed_from_u64(seed), rate, seconds: 0.0 }
    }

    /// Reads a rate from the command line.
    ///
    /// # Errors
    /// It is no number or out of range.
    pub fn parse_rate(text: &str) -> Result<f64, String> {
        let rate: f64 = text.parse().map_err(|_| "a rate is a number of operations a second".to_owned())?;
        if (RATE_MIN..=RATE_MAX).contains(&rate) {
            Ok(rate)
        } else {
            Err(format!("a rate is between {RATE_MIN} and {RATE_MAX} operations a second"))
        }
    }

    /// The moment of the next arrival.
    pub fn following(&mut self) -> Duration {
        // 1 - u is never 0, so that the logarithm is finite.
        self.seconds -= (1.0 - self.random.random::<f64>()).ln() / self.rate;
        Duration::from_secs_f64(self.seconds)
    }
}

/// An operation to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Counts from 0.
    pub number: u64,
    /// From the start.
    pub due: Duration,
}

/// Arrivals that nobody has taken. It has no clock: the time is passed in, and must not go back.
#[derive(Clone, Debug)]
pub struct Queue {
    arrivals: Arrivals,
    next: Option<Arrival>,
    waiting: VecDeque<Arrival>,
    waiting_max: usize,
    /// Arrivals there may be.
    limit: Option<u64>,
    /// When arrivals end, and how long what waits is sent after that.
    end: Option<(Duration, Duration)>,
    arrived: u64,
    waited: u64,
    longest: usize,
    turned_away: u64,
    uncounted: u64,
}

/// What became of arrivals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub arrived: u64,
    /// Those that found all connections busy, and were sent later.
    pub waited: u64,
    /// The most that waited together.
    pub longest: u64,
    /// Those that were not sent, because too many waited.
    pub turned_away: u64,
    /// Those that were not sent, because the run was over.
    pub left: u64,
}

impl Queue {
    /// Arrivals end after `limit` or at `end`, whatever is first. With `end` comes how long what waits is sent after that.
    pub fn new(arrivals: Arrivals, waiting_max: usize, limit: Option<u64>, end: Option<(Duration, Duration)>) -> Self {
        let mut queue = Self {
            arrivals,
            next: None,
            waiting: VecDeque::new(),
            waiting_max,
            limit,
            end,
            arrived: 0,
            waited: 0,
            longest: 0,
            turned_away: 0,
            uncounted: 0,
        };
        queue.prepare(0);
        queue
    }

    /// The arrival that a free connection takes: the first that waits, or the next that will come. `None` when there will be
    /// no more, or when it is too late to send what is left.
    pub fn take(&mut self, now: Duration) -> Option<Arrival> {
        if self.end.is_some_and(|(end, drain)| now > end + drain) {
            return None;
        }
        self.arrive(now);
        if let Some(arrival) = self.waiting.pop_front() {
            self.waited += 1;
            return Some(arrival);
        }
        let arrival = self.next?;
        self.arrived += 1;
        self.prepare(arrival.number + 1);
        Some(arrival)
    }

    /// Arrivals that were turned away since this was asked last.
    pub fn take_turned_away(&mut self) -> u64 {
        std::mem::take(&mut self.uncounted)
    }

    /// Ends it. What waits, or was due by `now`, is not sent any more.
    pub fn close(&mut self, now: Duration) -> Counts {
        self.arrive(now);
        Counts {
            arrived: self.arrived,
            waited: self.waited,
            longest: self.longest as u64,
            turned_away: self.turned_away,
            left: self.waiting.len() as u64,
        }
    }

    /// Lets come what is due. Nothing is taken between two calls, so that what finds the queue full found it full when it was due.
    fn arrive(&mut self, now: Duration) {
        while let Some(arrival) = self.next.filter(|next| next.due <= now) {
            self.arrived += 1;
            if self.waiting.len() < self.waiting_max {
                self.waiting.push_back(arrival);
                self.longest = self.longest.max(self.waiting.len());
            } else {
                self.turned_away += 1;
                self.uncounted += 1;
            }
            self.prepare(arrival.number + 1);
        }
    }

    fn prepare(&mut self, number: u64) {
        let due = self.arrivals.following();
        let allowed = self.limit.is_none_or(|limit| number < limit) && self.end.is_none_or(|(end, _)| due < end);
        self.next = allowed.then_some(Arrival { number, due });
    }
}

/// Waits until a moment, to some microseconds. A runtime's own timers are exact to a millisecond, which is more than many an
/// operation takes.
#[derive(Debug, Default)]
pub struct Alarm(OnceCell<AsyncFd<Timer>>);

#[derive(Debug)]
struct Timer(TimerFd);

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Alarm {
    /// Returns at `moment`, at once if that is past. One caller at a time.
    ///
    /// # Errors
    /// The system has no more timers.
    pub async fn wait_until(&self, moment: Instant) -> io::Result<()> {
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let timer = match self.0.get() {
            Some(timer) => timer,
            None => {
                let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
                #[expect(
                    deprecated,
                    reason = "the other constructor is unsafe; a Timer has the same descriptor all its life"
                )]
                let timer = AsyncFd::with_interest(Timer(timer), Interest::READABLE)?;
                self.0.get_or_init(|| timer)
            }
        };
        // Setting it forgets an earlier expiration that nobody waited for.
        let once = Expiration::OneShot(TimeSpec::from_duration(left));
        timer.get_ref().0.set(once, TimerSetTimeFlags::empty())?;
        loop {
            let mut ready = timer.readable().await?;
            if let Ok(waited) = ready.try_io(|timer| Ok(timer.get_ref().0.wait()?)) {
                return waited;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn queue(waiting_max: usize, limit: Option<u64>, end: Option<Duration>) -> Queue {
        Queue::new(Arrivals::new(7, 1000.0), waiting_max, limit, end.map(|end| (end, DRAIN_MAX)))
    }

    #[test]
    fn gaps_are_exponential() {
        let mut arrivals = Arrivals::new(3, 500.0);
        let count = 200_000;
        let mut last = Duration::ZERO;
        let gaps: Vec<f64> = (0..count)
            .map(|_| {
                let next = arrivals.following();
                let gap = (next - last).as_secs_f64();
                last = next;
                gap
            })
            .collect();
        let mean = gaps.iter().sum::<f64>() / f64::from(count);
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / f64::from(count);
        assert!((mean * 500.0 - 1.0).abs() < 0.01, "the mean gap is {mean} s");
        // The deviation of an exponential distribution is its mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.02, "the deviation is {} s", variance.sqrt());
        for (times, share) in [(0.1, 0.0952), (1.0, 0.6321), (3.0, 0.9502)] {
            let found = gaps.iter().filter(|gap| **gap * 500.0 <= times).count() as f64 / f64::from(count);
            assert!((found - share).abs() < 0.005, "{found} of the gaps are at most {times} means");
        }
    }

    #[test]
    fn a_seed_gives_the_same_arrivals() {
        let moments = |seed| {
            let mut arrivals = Arrivals::new(seed, 10.0);
            (0..100).map(|_| arrivals.following()).collect::<Vec<_>>()
        };
        assert_eq!(moments(1), moments(1));
        assert_ne!(moments(1), moments(2));
    }

    #[test]
    fn arrivals_wait_in_their_order() {
        let mut queue = queue(100_000, None, None);
        let first = queue.take(Duration::ZERO).unwrap();
        assert_eq!(first.number, 0);
        let mut last = first;
        for number in 1..900 {
            let arrival = queue.take(SECOND).unwrap();
            assert_eq!(arrival.number, number);
            assert!(arrival.due > last.due && arrival.due <= SECOND);
            last = arrival;
        }
        while last.due <= SECOND {
            last = queue.take(SECOND).unwrap();
        }
        // The one that is not due yet did not wait.
        let counts = queue.close(SECOND);
        assert_eq!((counts.arrived, counts.waited), (last.number + 1, last.number - 1));
        assert_eq!((counts.turned_away, counts.left), (0, 0));
        assert_eq!(counts.longest, last.number - 1);
    }

    #[test]
    fn what_finds_the_queue_full_is_turned_away() {
        let mut queue = queue(50, None, None);
        assert_eq!(queue.take(SECOND).unwrap().number, 0);
        let turned_away = queue.take_turned_away();
        assert!((800..1200).contains(&turned_away), "{turned_away}");
        assert_eq!(queue.take_turned_away(), 0);
        for number in 1..50 {
            assert_eq!(queue.take(SECOND).unwrap().number, number);
        }
        assert_eq!(queue.take(SECOND).unwrap().number, 50 + turned_away);
        assert_eq!(queue.close(SECOND).turned_away, turned_away);
    }

    #[test]
    fn arrivals_end() {
        let mut limited = queue(100, Some(3), None);
        let numbers: Vec<_> =
            std::iter::from_fn(|| limited.take(Duration::ZERO)).map(|arrival| arrival.number).collect();
        assert_eq!(numbers, [0, 1, 2]);
        let mut timed = queue(100_000, None, Some(SECOND));
        let taken = std::iter::from_fn(|| timed.take(SECOND + DRAIN_MAX)).count();
        assert!((850..1150).contains(&taken), "{taken}");
        let mut late = queue(100_000, None, Some(SECOND));
        assert_eq!(late.take(SECOND + DRAIN_MAX + Duration::from_nanos(1)), None);
        assert_eq!(late.close(SECOND).left, taken as u64);
    }

    #[test]
    fn rates_are_checked() {
        assert_eq!(Arrivals::parse_rate("2.5"), Ok(2.5));
        for wrong in ["0", "-1", "NaN", "inf", "1e9", "x"] {
            assert!(Arrivals::parse_rate(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn the_alarm_does_not_come_early() {
        let alarm = Alarm::default();
        for micros in [0, 50, 700, 3000] {
            let moment = Instant::now() + Duration::from_micros(micros);
            alarm.wait_until(moment).await.unwrap();
            assert!(Instant::now() >= moment);
        }
    }
}
