//! The users of a run.

use std::error::Error;
use std::io::{BufWriter, Write, stdout};

use clap::{Args, ValueEnum};

/// Which users a run has.
#[derive(Clone, Debug, Args)]
pub struct Users {
    /// Their names, with an n in braces for the number
    #[arg(long = "users", value_name = "PATTERN", default_value = "user{n}@example.org")]
    pub pattern: String,
    /// How many there are, numbered from 1
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub user_count: usize,
}

impl Users {
    /// The name of a user, counting from 0.
    pub fn name(&self, index: usize) -> String {
        self.pattern.replace("{n}", &(index + 1).to_string())
    }

    /// All names, in order.
    pub fn names(&self) -> Vec<String> {
        (0..self.user_count.max(1)).map(|index| self.name(index)).collect()
    }
}

/// In which order operations take the users.
#[derive(Clone, Copy, Debug, Args)]
pub struct UserOrder {
    /// Which user each operation takes
    #[arg(long, value_enum, default_value = "in-turn")]
    user_order: Order,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Order {
    /// The next one
    InTurn,
    /// Any, each with the same chance: no two that follow each other have anything in common
    Random,
}

impl UserOrder {
    /// The user of an operation, below `count`: the same in each run.
    pub fn user_of(self, number: u64, count: usize) -> usize {
        let number = match self.user_order {
            Order::InTurn => number,
            Order::Random => scattered(number),
        };
        (number % count.max(1) as u64) as usize
    }

    pub fn name(self) -> &'static str {
        match self.user_order {
            Order::InTurn => "in turn",
            Order::Random => "random",
        }
    }
}

/// Numbers that follow each other in no order: the finaliser of SplitMix64 (Steele, Lea, Flood, 2014).
fn scattered(number: u64) -> u64 {
    let mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

/// Prints lines for a server's import of users.
#[derive(Debug, Args)]
pub struct PrintUsers {
    #[command(flatten)]
    users: Users,
    /// Their password, or a hash of it in a form that the server knows
    #[arg(long, value_name = "PASSWORD")]
    password: String,
}

impl PrintUsers {
    /// # Errors
    /// Standard output cannot be written.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let mut out = BufWriter::new(stdout().lock());
        for index in 0..self.users.user_count {
            writeln!(out, "{}:{}", self.users.name(index), self.password)?;
        }
        out.flush()?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_order_takes_all_users_about_as_often() {
        let (users, turns) = (100, 100_000);
        for user_order in [Order::InTurn, Order::Random] {
            let mut taken = vec![0_u32; users];
            (0..turns).for_each(|number| taken[UserOrder { user_order }.user_of(number, users)] += 1);
            // The mean is 1,000, and five standard deviations are 158.
            assert!(taken.iter().all(|times| (840..1160).contains(times)), "{user_order:?}: {taken:?}");
        }
    }
}
