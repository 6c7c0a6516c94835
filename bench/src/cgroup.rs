//! A control group: what the kernel counts for all its processes, also those that have ended.
//!
//! Version 2 has all in one directory. Version 1 has one for each controller; both may be mounted together.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where the kernel counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    cpu: CpuFile,
    /// The file of all its memory, page cache included.
    memory: Option<PathBuf>,
    /// A directory whose `cgroup.procs`, and those below, name its processes.
    processes: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum CpuFile {
    /// `cpuacct.usage`: nanoseconds.
    V1(PathBuf),
    /// `cpu.stat`: microseconds after `usage_usec`.
    V2(PathBuf),
}

/// A place where control groups are mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    at: PathBuf,
    /// Of version 1; none for version 2.
    controllers: Option<Vec<String>>,
}

fn parse_mounts(mounts: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (at, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let controllers = match kind {
            "cgroup" => Some(options.split(',').map(str::to_owned).collect()),
            "cgroup2" => None,
            _ => return None,
        };
        Some(Mount { at: at.into(), controllers })
    };
    mounts.lines().filter_map(mount).collect()
}

impl Cgroup {
    /// `path` is the group's directory below any mount of control groups, or its name, such as `/system.slice/dovecot.service`.
    ///
    /// # Errors
    /// There is no such group, or nothing counts its CPU time.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::find(&parse_mounts(&fs::read_to_string("/proc/self/mounts")?), path)
    }

    /// The group of a systemd unit.
    ///
    /// # Errors
    /// There is no systemd, no such unit, or it is not running.
    pub fn of_unit(unit: &str) -> io::Result<Self> {
        let failed = |what: &str| io::Error::other(format!("cannot watch the unit {unit}: {what}"));
        let output = Command::new("systemctl")
            .args(["show", "--property=ControlGroup", "--value", "--", unit])
            .output()
            .map_err(|error| failed(&format!("systemctl cannot be run: {error}")))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).trim()));
        }
        let name = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if name.is_empty() {
            return Err(failed("it has no control group; is it running?"));
        }
        Self::open(Path::new(&name))
    }

    fn find(mounts: &[Mount], path: &Path) -> io::Result<Self> {
        let name = mounts.iter().find_map(|mount| path.strip_prefix(&mount.at).ok());
        let name = name.unwrap_or_else(|| path.strip_prefix("/").unwrap_or(path));
        let of_v1 = |controller: &str, file: &str| {
            let has = |mount: &&Mount| mount.controllers.iter().flatten().any(|name| name == controller);
            mounts.iter().filter(has).map(|mount| mount.at.join(name).join(file)).find(|file| file.is_file())
        };
        let of_v2 = |file: &str| {
            let mut directories = mounts.iter().filter(|mount| mount.controllers.is_none());
            directories.find_map(|mount| Some(mount.at.join(name).join(file)).filter(|file| file.is_file()))
        };
        let none = || {
            let text = format!(
                "no control group {}: neither cpu.stat (version 2) nor cpuacct.usage (version 1) is there",
                path.display()
            );
            io::Error::new(io::ErrorKind::NotFound, text)
        };
        // With both versions mounted, a group of this name may have its processes in either; version 1 has the controllers.
        let cpu = of_v1("cpuacct", "cpuacct.usage").map(CpuFile::V1).or_else(|| of_v2("cpu.stat").map(CpuFile::V2));
        let cpu = cpu.ok_or_else(none)?;
        let (CpuFile::V1(file) | CpuFile::V2(file)) = &cpu;
        let processes = file.parent().unwrap_or(Path::new("/")).to_owned();
        let memory = of_v1("memory", "memory.usage_in_bytes").or_else(|| of_v2("memory.current"));
        Ok(Self { cpu, memory, processes })
    }

    /// CPU time of all its processes, ended ones too, and of the groups below it.
    ///
    /// # Errors
    /// The group is gone.
    pub fn cpu(&self) -> io::Result<Duration> {
        let (path, used) = match &self.cpu {
            CpuFile::V1(path) => (path, read(path)?.trim().parse().ok().map(Duration::from_nanos)),
            CpuFile::V2(path) => {
                let text = read(path)?;
                let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
                (path, micros.and_then(|micros| micros.trim().parse().ok()).map(Duration::from_micros))
            }
        };
        used.ok_or_else(|| io::Error::other(format!("{} is not understood", path.display())))
    }

    /// Its memory as the kernel charges it, page cache included. `None` if nothing counts it.
    pub fn memory_bytes(&self) -> Option<u64> {
        read(self.memory.as_ref()?).ok()?.trim().parse().ok()
    }

    /// Its processes now, and those of the groups below it.
    pub fn pids(&self) -> Vec<u32> {
        let (mut pids, mut directories) = (Vec::new(), vec![self.processes.clone()]);
        while let Some(directory) = directories.pop() {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.trim().parse::<u32>().ok()));
            let below = fs::read_dir(&directory).into_iter().flatten().filter_map(Result::ok);
            directories.extend(below.map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        pids
    }
}

fn read(path: &Path) -> io::Result<String> {
    fs::read_to_string(path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Mounts with a group `mail/dovecot` in each.
    fn system(controllers: &[&str]) -> (tempfile::TempDir, Vec<Mount>) {
        let root = tempfile::tempdir().unwrap();
        let mut lines = String::new();
        for controller in controllers {
            let at = root.path().join(controller);
            fs::create_dir_all(at.join("mail/dovecot/below")).unwrap();
            let kind = if *controller == "unified" { "cgroup2" } else { "cgroup" };
            lines += &format!("{kind} {} {kind} rw,nosuid,{controller} 0 0\n", at.display());
        }
        (root, parse_mounts(&lines))
    }

    fn put(root: &tempfile::TempDir, file: &str, text: &str) {
        fs::write(root.path().join(file), text).unwrap();
    }

    #[test]
    fn version_1_is_read() {
        let (root, mounts) = system(&["cpuacct", "memory", "unified"]);
        put(&root, "cpuacct/mail/dovecot/cpuacct.usage", "1500000123\n");
        put(&root, "cpuacct/mail/dovecot/cgroup.procs", "12\n13\n");
        put(&root, "cpuacct/mail/dovecot/below/cgroup.procs", "14\n");
        put(&root, "memory/mail/dovecot/memory.usage_in_bytes", "4096\n");
        // Any mount's directory names the group, and so does its name.
        for path in [root.path().join("memory/mail/dovecot"), "/mail/dovecot".into(), "mail/dovecot".into()] {
            let cgroup = Cgroup::find(&mounts, &path).unwrap();
            assert_eq!(cgroup.cpu().unwrap(), Duration::from_nanos(1_500_000_123));
            assert_eq!(cgroup.memory_bytes(), Some(4096));
            assert_eq!(cgroup.pids(), [12, 13, 14]);
        }
    }

    #[test]
    fn version_2_is_read() {
        let (root, mounts) = system(&["unified"]);
        put(&root, "unified/mail/dovecot/cpu.stat", "usage_usec 2500\nuser_usec 2000\n");
        put(&root, "unified/mail/dovecot/cgroup.procs", "7\n");
        let cgroup = Cgroup::find(&mounts, Path::new("/mail/dovecot")).unwrap();
        assert_eq!(cgroup.cpu().unwrap(), Duration::from_micros(2500));
        assert_eq!((cgroup.memory_bytes(), cgroup.pids()), (None, vec![7]));
        put(&root, "unified/mail/dovecot/memory.current", "8192\n");
        assert_eq!(Cgroup::find(&mounts, Path::new("/mail/dovecot")).unwrap().memory_bytes(), Some(8192));
        put(&root, "unified/mail/dovecot/cpu.stat", "nothing\n");
        assert!(cgroup.cpu().is_err());
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let (_root, mounts) = system(&["cpuacct"]);
        let error = Cgroup::find(&mounts, Path::new("/mail/none")).unwrap_err();
        assert!(error.to_string().contains("/mail/none"), "{error}");
        assert!(Cgroup::of_unit("no such unit.service").is_err());
    }

    #[test]
    fn the_group_of_everything_is_there() {
        // Some machines have no control groups at all; then opening must say so.
        match Cgroup::open(Path::new("/")) {
            Ok(cgroup) => assert!(cgroup.cpu().unwrap() > Duration::ZERO),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::NotFound),
        }
    }
}
