//! What the machine can do, in a few seconds: disk, loopback and CPU. Two machines' reports can then be compared as ratios.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write, stdout};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::time::{ClockId, clock_gettime};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use serde::Serialize;

use crate::corpus::{Corpus, Fill};
use crate::drive::{latencies, record};
use crate::report::append_line;

/// How long each of the five parts takes.
const PART: Duration = Duration::from_millis(500);
/// What is written before each sync.
const DISK_BLOCKS: [usize; 2] = [4 << 10, 64 << 10];
/// Octets of one write to the loopback interface.
const LOOPBACK_BLOCK: usize = 64 << 10;
/// The text that the CPU compresses, and how hard. Figures of programs in which these differ are not to be compared.
const TEXT_OCTETS: usize = 256 << 10;
const ZSTD_LEVEL: i32 = 3;

#[derive(Clone, Debug, Serialize)]
pub struct Calibration {
    /// Where the disk was measured.
    pub directory: PathBuf,
    /// 4 KB appended to a file, then fdatasync.
    pub disk_4k: Disk,
    /// 64 KB.
    pub disk_64k: Disk,
    pub loopback: Loopback,
    /// Text compressed and decompressed again in a second of CPU time, by one thread.
    pub cpu_megabytes_per_s: f64,
}

/// Writes that were synced one after another.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Disk {
    pub syncs_per_s: f64,
    pub p50_us: u64,
    pub p99_us: u64,
}

/// TCP to 127.0.0.1 between two threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Loopback {
    /// One octet there and back.
    pub round_trips_per_s: f64,
    pub megabytes_per_s: f64,
}

impl Calibration {
    /// # Errors
    /// No file can be written in `directory`, or there is no loopback interface.
    pub fn measure(directory: &Path) -> Result<Self, Box<dyn Error>> {
        let named = |error: io::Error| format!("cannot measure the disk in {}: {error}", directory.display());
        Ok(Self {
            directory: directory.to_owned(),
            disk_4k: disk(directory, DISK_BLOCKS[0]).map_err(named)?,
            disk_64k: disk(directory, DISK_BLOCKS[1]).map_err(named)?,
            loopback: Loopback { round_trips_per_s: round_trips()?, megabytes_per_s: throughput()? },
            cpu_megabytes_per_s: cpu()?,
        })
    }

    fn table(&self) -> String {
        let disk = |name: &str, disk: &Disk| {
            format!("{name:>16}  {:.0} syncs/s, p50 {}, p99 {} us\n", disk.syncs_per_s, disk.p50_us, disk.p99_us)
        };
        let loopback = &self.loopback;
        format!(
            "{}{}{:>16}  {:.0} round trips/s, {:.0} MB/s\n{:>16}  {:.0} MB/s of one core (zstd)\n",
            disk("disk, 4 KB", &self.disk_4k),
            disk("disk, 64 KB", &self.disk_64k),
            "loopback",
            loopback.round_trips_per_s,
            loopback.megabytes_per_s,
            "CPU",
            self.cpu_megabytes_per_s
        )
    }
}

/// Appends blocks to a file and syncs each.
fn disk(directory: &Path, block: usize) -> io::Result<Disk> {
    let mut file: File = tempfile::tempfile_in(directory)?;
    // Not compressible, for devices that compress.
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut bytes = vec![0; block];
    let mut syncs = Vec::new();
    let start = Instant::now();
    while start.elapsed() < PART {
        random.fill_bytes(&mut bytes);
        let began = Instant::now();
        file.write_all(&bytes)?;
        file.sync_data()?;
        syncs.push(began.elapsed());
    }
    Ok(Disk::of(&syncs))
}

impl Disk {
    /// From how long each write took until it was synced.
    fn of(syncs: &[Duration]) -> Self {
        let mut micros = latencies();
        syncs.iter().for_each(|&sync| record(&mut micros, sync));
        Self {
            syncs_per_s: syncs.len() as f64 / syncs.iter().sum::<Duration>().as_secs_f64(),
            p50_us: micros.value_at_quantile(0.5),
            p99_us: micros.value_at_quantile(0.99),
        }
    }
}

/// Serves one connection by `serve` while `act` uses it.
fn loopback<T>(
    serve: impl FnOnce(TcpStream) -> io::Result<()> + Send + 'static,
    act: impl FnOnce(TcpStream) -> io::Result<T>,
) -> io::Result<T> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let server = thread::Builder::new().name("loopback".to_owned()).spawn(move || {
        let (stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        serve(stream)
    })?;
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let result = act(stream);
    let served = server.join().map_err(|_| io::Error::other("the loopback server panicked"))?;
    let value = result?;
    served?;
    Ok(value)
}

fn round_trips() -> io::Result<f64> {
    let echo = |mut stream: TcpStream| {
        let mut octet = [0];
        while stream.read(&mut octet)? > 0 {
            stream.write_all(&octet)?;
        }
        Ok(())
    };
    loopback(echo, |mut stream| {
        let (mut count, start) = (0_u64, Instant::now());
        while start.elapsed() < PART {
            let mut octet = [1];
            stream.write_all(&octet)?;
            stream.read_exact(&mut octet)?;
            count += 1;
        }
        Ok(count as f64 / start.elapsed().as_secs_f64())
    })
}

fn throughput() -> io::Result<f64> {
    let count = |mut stream: TcpStream| {
        let (mut buffer, mut octets) = (vec![0; LOOPBACK_BLOCK], 0_u64);
        loop {
            match stream.read(&mut buffer)? {
                // The other side has said that it is done, and waits to hear how much arrived.
                0 => return stream.write_all(&octets.to_le_bytes()),
                read => octets += read as u64,
            }
        }
    };
    loopback(count, |mut stream| {
        let (block, start) = (vec![7; LOOPBACK_BLOCK], Instant::now());
        while start.elapsed() < PART {
            stream.write_all(&block)?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut octets = [0; 8];
        stream.read_exact(&mut octets)?;
        Ok(u64::from_le_bytes(octets) as f64 / 1e6 / start.elapsed().as_secs_f64())
    })
}

/// Always the same text, so that the work is the same everywhere. CPU time, so that other programs do not count.
fn cpu() -> io::Result<f64> {
    let corpus = Corpus::synthetic(TEXT_OCTETS, Fill::Words);
    let text = &corpus.mail[0].bytes;
    let (start, mut octets) = (thread_cpu()?, 0);
    loop {
        let compressed = zstd::bulk::compress(text, ZSTD_LEVEL)?;
        let again = zstd::bulk::decompress(&compressed, text.len())?;
        if again != *text {
            return Err(io::Error::other("zstd does not give back what it was given"));
        }
        octets += text.len();
        let used = thread_cpu()? - start;
        if used >= PART {
            return Ok(octets as f64 / 1e6 / used.as_secs_f64());
        }
    }
}

fn thread_cpu() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// Measures the machine and nothing else.
#[derive(Clone, Debug, Args)]
pub struct Calibrate {
    /// A directory on the disk to be measured
    #[arg(long, value_name = "DIR", default_value = ".")]
    directory: PathBuf,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Append the result as one line of JSON to this file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Calibrate {
    /// Measures and prints.
    ///
    /// # Errors
    /// It could not be measured, or what was measured could not be written.
    pub fn run(self) -> Result<bool, Box<dyn Error>> {
        let calibration = Calibration::measure(&self.directory)?;
        if let Some(path) = &self.output {
            append_line(path, &calibration)?;
        }
        let text = if self.json { serde_json::to_string(&calibration)? + "\n" } else { calibration.table() };
        stdout().write_all(text.as_bytes())?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_syncs_count_for_what_they_took() {
        let mut syncs = vec![Duration::from_millis(1); 90];
        syncs.extend([Duration::from_millis(91); 10]);
        let disk = Disk::of(&syncs);
        // 100 syncs in 90 ms and 910 ms.
        assert!((disk.syncs_per_s - 100.0).abs() < 0.01, "{disk:?}");
        assert_eq!(disk.p50_us, 1_000);
        assert!((91_000..91_100).contains(&disk.p99_us), "{disk:?}");
    }

    #[test]
    fn a_machine_is_measured() {
        let directory = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let calibration = Calibration::measure(directory.path()).unwrap();
        assert!(start.elapsed() >= PART * 4);
        for disk in [calibration.disk_4k, calibration.disk_64k] {
            assert!(disk.syncs_per_s > 0.0 && disk.p50_us <= disk.p99_us, "{disk:?}");
        }
        assert!(calibration.loopback.round_trips_per_s > 100.0, "{:?}", calibration.loopback);
        assert!(calibration.loopback.megabytes_per_s > 10.0, "{:?}", calibration.loopback);
        assert!(calibration.cpu_megabytes_per_s > 0.1);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
        assert!(Calibration::measure(Path::new("/nowhere")).unwrap_err().to_string().contains("/nowhere"));
    }
}
