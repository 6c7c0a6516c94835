//! Writes the golden store of the current format version: its files, and the text that it must show for good.

use std::path::PathBuf;

use clap::Parser;
use posthaste_tests::damage::{dump, files_with_everything};

/// Writes a golden store below a directory that does not exist yet.
#[derive(Parser)]
struct Options {
    directory: PathBuf,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Options { directory } = Options::parse();
    let files = files_with_everything(2026, true);
    for (path, bytes) in &files {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().ok_or("files lie in the directory")?)?;
        std::fs::write(path, bytes)?;
    }
    std::fs::write(directory.join("expected.txt"), dump(&files)?)?;
    Ok(())
}
