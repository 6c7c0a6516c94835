//! The users of a run.

use std::error::Error;
use std::io::{BufWriter, Write, stdout};

use clap::Args;

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
