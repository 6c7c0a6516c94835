//! A device that fails on request below the real server: what it asks of the C library goes through `failing_device.c` first. The
//! server has to use epoll, since a ring does not go through there.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The device below a server. It works, until it is told to fail.
#[derive(Debug)]
pub struct FailingDevice {
    directory: tempfile::TempDir,
}

impl FailingDevice {
    /// Builds what goes before the C library, with `cc` or what `CC` names.
    ///
    /// # Errors
    /// It cannot be built.
    pub fn new() -> Result<Self, String> {
        let directory = tempfile::tempdir().map_err(|error| error.to_string())?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/failing_device.c");
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut command = Command::new(compiler);
        command.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(directory.path().join("device.so"));
        let output = command.arg(source).arg("-ldl").output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let device = Self { directory };
        device.works()?;
        Ok(device)
    }

    fn faults(&self) -> PathBuf {
        self.directory.path().join("faults")
    }

    /// What a server's environment must have.
    pub fn environment(&self) -> Vec<(String, OsString)> {
        let library = self.directory.path().join("device.so");
        vec![("LD_PRELOAD".to_owned(), library.into()), ("POSTHASTE_FAULTS".to_owned(), self.faults().into())]
    }

    /// Fails from here on: lines of OPERATION PART FAULT, see `failing_device.c`.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn fails(&self, faults: &str) -> Result<(), String> {
        // In one step: a server reads them at any time.
        let new = self.directory.path().join("new");
        fs::write(&new, faults).and_then(|()| fs::rename(new, self.faults())).map_err(|error| error.to_string())
    }

    /// Works from here on.
    ///
    /// # Errors
    /// As [`FailingDevice::fails`].
    pub fn works(&self) -> Result<(), String> {
        self.fails("")
    }
}
