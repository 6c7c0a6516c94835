//! Which mail a workload sends: a corpus, an mbox file, messages made by a generator, or one of a given size.

use std::error::Error;
use std::path::PathBuf;

use clap::Args;

use crate::corpus::{Corpus, Fill};
use crate::generator::{Generator, Sizes};
use crate::session::Parameters;

/// Which mail to send.
#[derive(Clone, Debug, Args)]
pub struct MailOptions {
    /// Take the messages in turn from a directory of .eml files, or an archive of one (.tar, .tar.zst)
    #[arg(long, value_name = "DIR", conflicts_with_all = ["size", "mbox", "generate"])]
    corpus: Option<PathBuf>,
    /// Take the messages in turn from an mbox file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["size", "generate"])]
    mbox: Option<PathBuf>,
    /// Take so many messages in turn from a generator: log-normal sizes, headers, text and attachments as real mail has them, the
    /// same in each run
    #[arg(long, value_name = "N", conflicts_with = "size")]
    generate: Option<usize>,
    #[command(flatten)]
    sizes: Sizes,
    /// What the generator's choices depend on
    #[arg(long, value_name = "N", default_value_t = 1)]
    mail_seed: u64,
    /// Send one made up message of this size
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    size: usize,
    /// What the made up message of --size consists of
    #[arg(long, value_enum, default_value = "words")]
    fill: Fill,
}

impl MailOptions {
    /// Reads or makes the messages, and says on standard error which cannot be sent.
    ///
    /// # Errors
    /// They cannot be read, or there are none; the sizes make no distribution.
    pub fn load(&self) -> Result<Corpus, Box<dyn Error>> {
        let corpus = if let Some(path) = &self.corpus {
            Corpus::load(path)?
        } else if let Some(path) = &self.mbox {
            Corpus::load_mbox(path)?
        } else if let Some(count) = self.generate {
            Generator::new(&self.sizes, self.mail_seed)?.corpus(count.max(1))
        } else {
            Corpus::synthetic(self.size, self.fill)
        };
        for mail in &corpus.bare_cr {
            eprintln!("left out, because it has a CR without LF: {}", mail.name);
        }
        Ok(corpus)
    }

    /// Adds to a report what the mail was.
    pub fn describe(&self, corpus: &Corpus, parameters: &mut Parameters) {
        let source = if let Some(path) = self.corpus.as_ref().or(self.mbox.as_ref()) {
            path.display().to_string()
        } else if self.generate.is_some() {
            parameters.insert("mail_seed", self.mail_seed.into());
            format!("generated, {}", self.sizes)
        } else {
            parameters.insert("fill", format!("{:?}", self.fill).to_lowercase().into());
            "made up".to_owned()
        };
        parameters.insert("mail", source.into());
        parameters.insert("mail_messages", corpus.mail.len().into());
        parameters.insert("mail_bytes", corpus.octets().into());
        parameters.insert("mail_bytes_median", corpus.median_octets().into());
        parameters.insert("mail_left_out", corpus.bare_cr.len().into());
    }
}
