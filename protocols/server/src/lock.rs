//! One process per data directory.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Held for as long as the process works on the directory. The system lets go of it when the process ends, however it
/// ends.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("the data directory {path} is in use by another process ({owner})")]
    InUse { path: PathBuf, owner: String },
    #[error("cannot use the data directory {path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

/// Locks a data directory, which is created if it does not exist.
///
/// # Errors
/// Another process has it, which is named; or it cannot be created or written.
pub fn lock(data: &Path) -> Result<DataLock, LockError> {
    let failed = |error| LockError::Io { path: data.to_owned(), error };
    DirBuilder::new().recursive(true).mode(0o700).create(data).map_err(failed)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(data.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            // The text is only a hint.
            let _ = file.take(100).read_to_string(&mut owner);
            return Err(LockError::InUse { path: data.to_owned(), owner: owner.trim().to_owned() });
        }
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    let owner = format!("process {}\n", std::process::id());
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        file.write_all(owner.as_bytes())
    };
    write(&mut file).map_err(failed)?;
    Ok(DataLock { _file: file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("new/data");
        let held = lock(&data).unwrap();
        let error = lock(&data).unwrap_err();
        assert!(matches!(error, LockError::InUse { .. }));
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        drop(held);
        lock(&data).unwrap();
    }
}
