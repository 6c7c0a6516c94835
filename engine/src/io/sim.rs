//! The simulator: a seeded executor and a disk that behaves as badly as a disk may.
//!
//! One seed decides a run: the order in which ready tasks run, how long each operation takes, which blocks survive a
//! crash. All workers of a simulated node run on this one executor (`RULES`: spawn, yield, timers, randomness and the
//! channels between workers are all inside the seam), and time is virtual: it jumps to the next event.
//!
//! The disk keeps, per file, what is durable and what is only in the page cache. A crash keeps any subset of the blocks
//! written since the last sync, tears blocks at sector boundaries, and forgets names that no directory sync covered.
//! A failed sync drops the dirty state without making it durable, as Linux does.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::{File, Io, OpenMode, Runtime};

/// The page of the simulated page cache: what a crash keeps or loses as one.
const BLOCK_BYTES: usize = 4096;
/// The unit that a device writes atomically.
const SECTOR_BYTES: usize = 512;

/// A run that takes longer, in virtual time, is stuck.
const LONGEST_RUN: Duration = Duration::from_secs(3600);

/// How often operations fail, in parts of 65,536.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRates {
    pub read_errors: u32,
    pub write_errors: u32,
    pub sync_errors: u32,
    pub no_space: u32,
    /// Writes that take a part of what they are given. The rest may succeed or fail.
    pub short_writes: u32,
    /// Reads that never return.
    pub hung_reads: u32,
    /// Operations that take 100 ms.
    pub slow: u32,
}

/// How long a slow operation takes.
const SLOW: Duration = Duration::from_millis(100);

/// What a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Open,
    Create,
    Read,
    Write,
    Sync,
    Allocate,
    Truncate,
    Rename,
    Link,
    Remove,
    SyncDirectory,
    FreeBytes,
    List,
}

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device reports an error. Some of a write may have happened.
    Error,
    /// There is no space. Some of a write may have happened.
    NoSpace,
    /// A write takes only a part of what it is given; other operations succeed.
    Short,
    Slow,
    /// It never returns.
    Hang,
}

/// A fault that strikes certain operations.
#[derive(Clone, Debug)]
pub struct Aim {
    pub operation: Operation,
    /// On files whose paths contain this, as they were opened.
    pub files: String,
    /// So many of them are spared first.
    pub spared: u32,
    /// So many of them are struck then.
    pub struck_max: u32,
    pub fault: Fault,
}

struct Aimed {
    aim: Aim,
    seen: u32,
    struck: u32,
}

/// SplitMix64: every draw of a run comes from here.
#[derive(Clone, Debug)]
pub struct SeededRandom(u64);

impl SeededRandom {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next_u64() % bound
    }

    pub fn chance(&mut self, parts_of_65536: u32) -> bool {
        (self.next_u64() & 0xffff) < u64::from(parts_of_65536)
    }
}

#[derive(Default)]
struct Inode {
    durable: Vec<u8>,
    current: Vec<u8>,
    dirty_blocks: BTreeSet<usize>,
    length_is_dirty: bool,
}

/// A change of names that no directory sync has covered yet.
#[derive(Clone)]
enum NameChange {
    Put { path: String, inode: usize },
    Remove { path: String },
    Rename { from: String, to: String, inode: usize },
}

impl NameChange {
    fn is_in(&self, directory: &str) -> bool {
        let path = match self {
            Self::Put { path, .. } | Self::Remove { path } => path,
            Self::Rename { to, .. } => to,
        };
        parent(path) == directory
    }

    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Self::Put { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            Self::Remove { path } => {
                names.remove(path);
            }
            Self::Rename { from, to, inode } => {
                names.insert(to.clone(), *inode);
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
            }
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory)
}

#[derive(Default)]
struct Disk {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    unsynced_names: Vec<NameChange>,
    directories: BTreeSet<String>,
}

impl Disk {
    fn used_bytes(&self) -> u64 {
        let linked: BTreeSet<usize> = self.names.values().copied().collect();
        linked
            .into_iter()
            .map(|inode| self.inodes[inode].current.len().div_ceil(BLOCK_BYTES) * BLOCK_BYTES)
            .sum::<usize>() as u64
    }

    fn change_names(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.unsynced_names.push(change);
    }

    fn sync_directory(&mut self, directory: &str) {
        let changes = std::mem::take(&mut self.unsynced_names);
        for change in changes {
            if change.is_in(directory) {
                change.apply(&mut self.durable_names);
            } else {
                self.unsynced_names.push(change);
            }
        }
    }

    fn crash(&mut self, random: &mut SeededRandom) {
        // Either the journal's order holds up to some point, or any subset of the changes happened.
        let changes = std::mem::take(&mut self.unsynced_names);
        let in_order = random.chance(0x8000);
        let keep = if in_order { random.below(changes.len() as u64 + 1) as usize } else { 0 };
        for (index, change) in changes.iter().enumerate() {
            if if in_order { index < keep } else { random.chance(0x8000) } {
                change.apply(&mut self.durable_names);
            }
        }
        self.names = self.durable_names.clone();
        for inode in &mut self.inodes {
            if inode.length_is_dirty && random.chance(0x8000) {
                inode.durable.resize(inode.current.len(), 0);
            }
            for &block in &inode.dirty_blocks {
                let start = block * BLOCK_BYTES;
                let end = (start + BLOCK_BYTES).min(inode.durable.len()).min(inode.current.len());
                if start >= end {
                    continue;
                }
                let kept = match random.below(3) {
                    0 => start,
                    1 => end,
                    _ => end.min(start + SECTOR_BYTES * random.below((BLOCK_BYTES / SECTOR_BYTES) as u64 + 1) as usize),
                };
                inode.durable[start..kept].copy_from_slice(&inode.current[start..kept]);
            }
            inode.current = inode.durable.clone();
            inode.dirty_blocks.clear();
            inode.length_is_dirty = false;
        }
    }
}

/// The ready queue, shared with the wakers, which the standard library wants to be `Send`.
type ReadyQueue = Arc<Mutex<Vec<u64>>>;

struct TaskWaker {
    task: u64,
    ready: ReadyQueue,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !ready.contains(&self.task) {
            ready.push(self.task);
        }
    }
}

struct Timer {
    due: Duration,
    sequence: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.due, self.sequence) == (other.due, other.sequence)
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    /// Reversed: the heap yields the earliest.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.due, other.sequence).cmp(&(self.due, self.sequence))
    }
}

struct World {
    random: RefCell<SeededRandom>,
    disk: RefCell<Disk>,
    faults: Cell<FaultRates>,
    aimed: RefCell<Vec<Aimed>>,
    /// Bytes that all files together may have.
    capacity: Cell<Option<u64>>,
    /// Writes, syncs and name changes so far; the crash points.
    operations: Cell<u64>,
    crash_at: Cell<Option<u64>>,
    crashed: Cell<bool>,
    now: Cell<Duration>,
    timers: RefCell<BinaryHeap<Timer>>,
    next_timer: Cell<u64>,
    ready: ReadyQueue,
    tasks: RefCell<BTreeMap<u64, Option<Pin<Box<dyn Future<Output = ()>>>>>>,
    next_task: Cell<u64>,
}

/// A simulated machine: its disk outlives crashes, its tasks do not.
#[derive(Clone)]
pub struct Sim {
    world: Rc<World>,
}

impl Sim {
    pub fn new(seed: u64) -> Self {
        let mut disk = Disk::default();
        disk.directories.insert(String::new());
        Self {
            world: Rc::new(World {
                random: RefCell::new(SeededRandom::new(seed)),
                disk: RefCell::new(disk),
                faults: Cell::new(FaultRates::default()),
                aimed: RefCell::default(),
                capacity: Cell::new(None),
                operations: Cell::new(0),
                crash_at: Cell::new(None),
                crashed: Cell::new(false),
                now: Cell::new(Duration::from_secs(1)),
                timers: RefCell::default(),
                next_timer: Cell::new(0),
                ready: Arc::default(),
                tasks: RefCell::default(),
                next_task: Cell::new(0),
            }),
        }
    }

    pub fn io(&self) -> SimIo {
        SimIo { world: Rc::clone(&self.world) }
    }

    /// Sets the rates of injected errors from here on.
    pub fn set_faults(&self, faults: FaultRates) {
        self.world.faults.set(faults);
    }

    /// Aims a fault, or none, from here on.
    pub fn aim(&self, aim: Option<Aim>) {
        self.aim_all(aim.into_iter().collect());
    }

    /// Aims several faults from here on, in place of those before.
    pub fn aim_all(&self, aims: Vec<Aim>) {
        *self.world.aimed.borrow_mut() = aims.into_iter().map(|aim| Aimed { aim, seen: 0, struck: 0 }).collect();
    }

    /// How often the faults that are aimed have struck.
    pub fn struck(&self) -> u32 {
        self.world.aimed.borrow().iter().map(|aimed| aimed.struck).sum()
    }

    /// Makes the device so large that its files can have `bytes` together, in whole blocks; without end if `None`.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.world.capacity.set(bytes);
    }

    /// Bytes of all files together, in whole blocks.
    pub fn used_bytes(&self) -> u64 {
        self.world.disk.borrow().used_bytes()
    }

    /// Crashes the machine at the n-th write, sync or name change from now.
    pub fn crash_after(&self, operations: Option<u64>) {
        self.world.crash_at.set(operations.map(|count| self.world.operations.get() + count));
    }

    /// Writes, syncs and name changes so far.
    pub fn operations(&self) -> u64 {
        self.world.operations.get()
    }

    /// A draw from the run's seed, for the test's own decisions.
    pub fn below(&self, bound: u64) -> u64 {
        self.world.random.borrow_mut().below(bound)
    }

    /// Runs `main` and everything it spawns until `main` ends. `None` if the machine crashed first; the disk is then
    /// in its state after the crash and the next `run` is the machine's next start.
    ///
    /// # Panics
    /// If nothing can run any more although `main` has not ended, or an hour of virtual time passes: a lost wake-up.
    pub fn run<T: 'static>(&self, main: impl Future<Output = T> + 'static) -> Option<T> {
        let result: Rc<RefCell<Option<T>>> = Rc::default();
        let slot = Rc::clone(&result);
        let world = &self.world;
        let deadline = world.now.get() + LONGEST_RUN;
        world.crashed.set(false);
        self.io().spawn(async move {
            let value = main.await;
            *slot.borrow_mut() = Some(value);
        });
        loop {
            if world.crashed.get() {
                self.power_off();
                let mut random = world.random.borrow_mut();
                world.disk.borrow_mut().crash(&mut random);
                return None;
            }
            if result.borrow().is_some() {
                self.power_off();
                return result.borrow_mut().take();
            }
            let task = {
                let mut ready = world.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if ready.is_empty() {
                    None
                } else {
                    let index = world.random.borrow_mut().below(ready.len() as u64) as usize;
                    Some(ready.swap_remove(index))
                }
            };
            match task {
                Some(task) => self.poll(task),
                None => {
                    let timer = world.timers.borrow_mut().pop();
                    let timer = timer.expect("the simulated machine is stuck: no task is ready and no timer is set");
                    world.now.set(world.now.get().max(timer.due));
                    assert!(world.now.get() < deadline, "the simulated machine gets nowhere: an hour has passed");
                    timer.waker.wake();
                }
            }
        }
    }

    /// Pulls the plug without a crash point: what was not synced may be lost.
    pub fn crash_now(&self) {
        self.power_off();
        let mut random = self.world.random.borrow_mut();
        self.world.disk.borrow_mut().crash(&mut random);
    }

    fn poll(&self, task: u64) {
        let Some(mut future) = self.world.tasks.borrow_mut().get_mut(&task).and_then(Option::take) else { return };
        let waker = Waker::from(Arc::new(TaskWaker { task, ready: Arc::clone(&self.world.ready) }));
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => {
                self.world.tasks.borrow_mut().remove(&task);
            }
            Poll::Pending => {
                if let Some(slot) = self.world.tasks.borrow_mut().get_mut(&task) {
                    *slot = Some(future);
                }
            }
        }
    }

    fn power_off(&self) {
        // Dropping a task may wake or spawn others; keep dropping until none is left.
        loop {
            let tasks = std::mem::take(&mut *self.world.tasks.borrow_mut());
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        self.world.timers.borrow_mut().clear();
        self.world.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        self.world.crash_at.set(None);
        self.world.crashed.set(false);
    }

    /// The files with a given prefix, in order, with their lengths.
    pub fn files(&self, prefix: &str) -> Vec<(String, u64)> {
        let disk = self.world.disk.borrow();
        disk.names
            .iter()
            .filter(|(path, _)| path.starts_with(prefix))
            .map(|(path, &inode)| (path.clone(), disk.inodes[inode].current.len() as u64))
            .collect()
    }

    /// Gives the test a file's bytes to damage, as a failing medium would.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn damage(&self, path: &str, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.world.disk.borrow_mut();
        let inode = *disk.names.get(path).expect("a file to damage");
        let inode = &mut disk.inodes[inode];
        edit(&mut inode.current);
        inode.durable = inode.current.clone();
    }

    /// Puts a file on the disk, durable, with the directories it needs.
    pub fn put_file(&self, path: &str, bytes: Vec<u8>) {
        let mut disk = self.world.disk.borrow_mut();
        for (end, _) in path.match_indices('/') {
            disk.directories.insert(path[..end].to_owned());
        }
        disk.inodes.push(Inode { durable: bytes.clone(), current: bytes, ..Inode::default() });
        let inode = disk.inodes.len() - 1;
        disk.names.insert(path.to_owned(), inode);
        disk.durable_names.insert(path.to_owned(), inode);
    }

    /// Takes a file off the disk, durably.
    pub fn remove_file(&self, path: &str) {
        let mut disk = self.world.disk.borrow_mut();
        disk.names.remove(path);
        disk.durable_names.remove(path);
    }

    /// A copy of a file's bytes.
    pub fn contents(&self, path: &str) -> Option<Vec<u8>> {
        let disk = self.world.disk.borrow();
        disk.names.get(path).map(|&inode| disk.inodes[inode].current.clone())
    }
}

/// The simulated machine as the store sees it.
#[derive(Clone)]
pub struct SimIo {
    world: Rc<World>,
}

/// An open file of the simulated disk.
#[derive(Clone)]
pub struct SimFile {
    world: Rc<World>,
    inode: usize,
    /// As it was opened: it may have another name now.
    path: Rc<str>,
}

/// Completes when virtual time has come; registers its timer once.
struct SleepUntil {
    world: Rc<World>,
    due: Duration,
    registered: bool,
}

impl Future for SleepUntil {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.world.now.get() >= self.due {
            return Poll::Ready(());
        }
        if !self.registered {
            self.registered = true;
            let sequence = self.world.next_timer.get();
            self.world.next_timer.set(sequence + 1);
            let timer = Timer { due: self.due, sequence, waker: context.waker().clone() };
            self.world.timers.borrow_mut().push(timer);
        }
        Poll::Pending
    }
}

impl World {
    /// Time passes for an operation.
    async fn delay(self: &Rc<Self>, at_most_us: u64) {
        let us = 1 + self.random.borrow_mut().below(at_most_us);
        self.sleep(Duration::from_micros(us)).await;
    }

    async fn sleep(self: &Rc<Self>, duration: Duration) {
        SleepUntil { world: Rc::clone(self), due: self.now.get() + duration, registered: false }.await;
    }

    /// Counts a crash point; if it is the chosen one, the machine dies here and this never returns.
    async fn crash_point(&self) {
        let operations = self.operations.get() + 1;
        self.operations.set(operations);
        if self.crash_at.get().is_some_and(|at| operations >= at) {
            self.crashed.set(true);
        }
        if self.crashed.get() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the device has room for a file to grow.
    fn has_room(&self, inode: usize, len: usize) -> bool {
        let Some(capacity) = self.capacity.get() else { return true };
        let disk = self.disk.borrow();
        let blocks = |len: usize| len.div_ceil(BLOCK_BYTES) as u64 * BLOCK_BYTES as u64;
        let old = blocks(disk.inodes[inode].current.len());
        disk.used_bytes() + blocks(len).saturating_sub(old) <= capacity
    }

    fn fails(&self, rate: u32) -> bool {
        rate != 0 && self.random.borrow_mut().chance(rate)
    }

    /// What an operation meets: the fault that is aimed at it, or one of those that come by chance, each with its rate. Those
    /// that only take time have passed on return.
    async fn meets(self: &Rc<Self>, operation: Operation, path: &str, rates: &[(u32, Fault)]) -> Option<Fault> {
        let aimed = self.aimed.borrow_mut().iter_mut().find_map(|aimed| aimed.strike(operation, path));
        let by_chance = || rates.iter().find(|(rate, _)| self.fails(*rate)).map(|(_, fault)| *fault);
        let fault = aimed.or_else(by_chance);
        if fault == Some(Fault::Slow) || self.fails(self.faults.get().slow) {
            self.sleep(SLOW).await;
        }
        match fault {
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Slow) => None,
            fault => fault,
        }
    }

    /// As [`World::meets`], for operations that have no rates of their own and cannot be short.
    async fn fails_at(self: &Rc<Self>, operation: Operation, path: &str) -> io::Result<()> {
        self.meets(operation, path, &[]).await.map_or(Ok(()), |fault| fault.result(operation))
    }
}

impl Fault {
    fn result(self, operation: Operation) -> io::Result<()> {
        match self {
            Self::Error => Err(eio(operation)),
            Self::NoSpace => Err(io::Error::from(io::ErrorKind::StorageFull)),
            Self::Short | Self::Slow | Self::Hang => Ok(()),
        }
    }
}

impl Aimed {
    fn strike(&mut self, operation: Operation, path: &str) -> Option<Fault> {
        let aim = &self.aim;
        if operation != aim.operation || !path.contains(&aim.files) {
            return None;
        }
        self.seen += 1;
        let strikes = self.seen > aim.spared && self.struck < aim.struck_max;
        self.struck += u32::from(strikes);
        strikes.then_some(aim.fault)
    }
}

fn eio(what: Operation) -> io::Error {
    io::Error::other(format!("simulated I/O error: {what:?}"))
}

impl Runtime for SimIo {
    fn now(&self) -> Duration {
        self.world.now.get()
    }

    fn wall_clock_ms(&self) -> u64 {
        1_790_000_000_000 + self.world.now.get().as_millis() as u64
    }

    fn random(&self) -> u64 {
        self.world.random.borrow_mut().next_u64()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let id = self.world.next_task.get();
        self.world.next_task.set(id + 1);
        self.world.tasks.borrow_mut().insert(id, Some(Box::pin(task)));
        self.world.ready.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(id);
    }

    async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|context| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    async fn sleep(&self, duration: Duration) {
        self.world.sleep(duration).await;
    }

    async fn offload<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.world.delay(500).await;
        let value = job();
        self.world.delay(100).await;
        value
    }
}

impl Io for SimIo {
    type File = SimFile;

    async fn open(&self, path: &str, mode: OpenMode) -> io::Result<SimFile> {
        self.world.delay(50).await;
        if mode == OpenMode::CreateNew {
            self.world.crash_point().await;
            let rates = [(self.world.faults.get().no_space, Fault::NoSpace)];
            let fault = self.world.meets(Operation::Create, path, &rates).await;
            fault.map_or(Ok(()), |fault| fault.result(Operation::Create))?;
        } else {
            self.world.fails_at(Operation::Open, path).await?;
        }
        let mut disk = self.world.disk.borrow_mut();
        let inode = match (disk.names.get(path), mode) {
            (Some(_), OpenMode::CreateNew) => return Err(io::Error::from(io::ErrorKind::AlreadyExists)),
            (Some(&inode), _) => inode,
            (None, OpenMode::CreateNew) => {
                if !disk.directories.contains(parent(path)) {
                    return Err(io::Error::from(io::ErrorKind::NotFound));
                }
                disk.inodes.push(Inode::default());
                let inode = disk.inodes.len() - 1;
                disk.change_names(NameChange::Put { path: path.to_owned(), inode });
                inode
            }
            (None, _) => return Err(io::Error::from(io::ErrorKind::NotFound)),
        };
        drop(disk);
        Ok(SimFile { world: Rc::clone(&self.world), inode, path: path.into() })
    }

    async fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.world.delay(50).await;
        self.world.crash_point().await;
        self.world.fails_at(Operation::Rename, to).await?;
        let mut disk = self.world.disk.borrow_mut();
        let inode = *disk.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        disk.change_names(NameChange::Rename { from: from.to_owned(), to: to.to_owned(), inode });
        Ok(())
    }

    async fn link(&self, from: &str, to: &str) -> io::Result<()> {
        self.world.delay(50).await;
        self.world.crash_point().await;
        self.world.fails_at(Operation::Link, to).await?;
        let mut disk = self.world.disk.borrow_mut();
        let inode = *disk.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        if disk.names.contains_key(to) {
            return Err(io::Error::from(io::ErrorKind::AlreadyExists));
        }
        disk.change_names(NameChange::Put { path: to.to_owned(), inode });
        Ok(())
    }

    async fn remove(&self, path: &str) -> io::Result<()> {
        self.world.delay(50).await;
        self.world.crash_point().await;
        self.world.fails_at(Operation::Remove, path).await?;
        let mut disk = self.world.disk.borrow_mut();
        if !disk.names.contains_key(path) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        disk.change_names(NameChange::Remove { path: path.to_owned() });
        Ok(())
    }

    async fn create_dir_all(&self, path: &str) -> io::Result<()> {
        self.world.delay(50).await;
        let mut disk = self.world.disk.borrow_mut();
        let mut end = 0;
        while end < path.len() {
            end = path[end + 1..].find('/').map_or(path.len(), |at| end + 1 + at);
            disk.directories.insert(path[..end].to_owned());
        }
        Ok(())
    }

    async fn sync_dir(&self, path: &str) -> io::Result<()> {
        self.world.delay(500).await;
        self.world.crash_point().await;
        let rates = [(self.world.faults.get().sync_errors, Fault::Error)];
        if let Some(fault) = self.world.meets(Operation::SyncDirectory, path, &rates).await {
            fault.result(Operation::SyncDirectory)?;
        }
        self.world.disk.borrow_mut().sync_directory(path);
        Ok(())
    }

    async fn free_bytes(&self) -> io::Result<u64> {
        self.world.delay(50).await;
        self.world.fails_at(Operation::FreeBytes, "").await?;
        let used = self.world.disk.borrow().used_bytes();
        Ok(self.world.capacity.get().map_or(u64::MAX, |capacity| capacity.saturating_sub(used)))
    }

    async fn list(&self, path: &str) -> io::Result<Vec<String>> {
        self.world.delay(50).await;
        self.world.fails_at(Operation::List, path).await?;
        let disk = self.world.disk.borrow();
        if !disk.directories.contains(path) {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Ok(disk
            .names
            .keys()
            .filter(|name| parent(name) == path)
            .map(|name| name[path.len()..].trim_start_matches('/').to_owned())
            .collect())
    }
}

impl SimFile {
    /// One write: it takes all or a part of the bytes, or fails when it has taken some.
    async fn write_some(&self, bytes: &[u8], start: usize) -> io::Result<usize> {
        self.world.delay(100).await;
        let faults = self.world.faults.get();
        let has_room = self.world.has_room(self.inode, start + bytes.len());
        let fault = if has_room {
            let rates = [
                (faults.no_space, Fault::NoSpace),
                (faults.write_errors, Fault::Error),
                (faults.short_writes, Fault::Short),
            ];
            self.world.meets(Operation::Write, &self.path, &rates).await
        } else {
            Some(Fault::NoSpace)
        };
        let written = match fault {
            _ if !has_room => 0,
            Some(Fault::Short) => 1 + self.world.random.borrow_mut().below(bytes.len() as u64) as usize,
            Some(_) => self.world.random.borrow_mut().below(bytes.len() as u64 + 1) as usize,
            None => bytes.len(),
        };
        {
            let mut disk = self.world.disk.borrow_mut();
            let inode = &mut disk.inodes[self.inode];
            if inode.current.len() < start + written {
                inode.current.resize(start + written, 0);
                inode.length_is_dirty = true;
            }
            inode.current[start..start + written].copy_from_slice(&bytes[..written]);
            if written > 0 {
                inode.dirty_blocks.extend(start / BLOCK_BYTES..=(start + written - 1) / BLOCK_BYTES);
            }
        }
        self.world.crash_point().await;
        fault.map_or(Ok(()), |fault| fault.result(Operation::Write))?;
        Ok(written)
    }
}

impl File for SimFile {
    async fn read_at(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.world.delay(200).await;
        let faults = self.world.faults.get();
        let rates = [(faults.read_errors, Fault::Error), (faults.hung_reads, Fault::Hang)];
        if let Some(fault) = self.world.meets(Operation::Read, &self.path, &rates).await {
            fault.result(Operation::Read)?;
        }
        let disk = self.world.disk.borrow();
        let bytes = &disk.inodes[self.inode].current;
        let start = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
        Ok(bytes[start..start.saturating_add(len).min(bytes.len())].to_vec())
    }

    async fn write_at(&self, buffer: Vec<u8>, offset: u64) -> (io::Result<()>, Vec<u8>) {
        let write_some = async |buffer: Vec<u8>, from: usize, offset: u64| {
            let result = self.write_some(&buffer[from..], offset as usize).await;
            (result, buffer)
        };
        super::write_all(buffer, offset, write_some).await
    }

    async fn sync_data(&self) -> io::Result<()> {
        self.world.delay(3000).await;
        self.world.crash_point().await;
        let rates = [(self.world.faults.get().sync_errors, Fault::Error)];
        let fault = self.world.meets(Operation::Sync, &self.path, &rates).await;
        let mut disk = self.world.disk.borrow_mut();
        let inode = &mut disk.inodes[self.inode];
        if let Some(Err(error)) = fault.map(|fault| fault.result(Operation::Sync)) {
            // The pages are clean now and yet not on the device: a later sync will not write them.
            inode.dirty_blocks.clear();
            return Err(error);
        }
        if inode.length_is_dirty {
            inode.durable.resize(inode.current.len(), 0);
            inode.length_is_dirty = false;
        }
        for block in std::mem::take(&mut inode.dirty_blocks) {
            let start = block * BLOCK_BYTES;
            let end = (start + BLOCK_BYTES).min(inode.current.len());
            if start < end {
                inode.durable[start..end].copy_from_slice(&inode.current[start..end]);
            }
        }
        Ok(())
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        if len == 0 {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        self.world.delay(50).await;
        self.world.crash_point().await;
        let rates = [(self.world.faults.get().no_space, Fault::NoSpace)];
        if let Some(fault) = self.world.meets(Operation::Allocate, &self.path, &rates).await {
            fault.result(Operation::Allocate)?;
        }
        if !self.world.has_room(self.inode, len as usize) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let mut disk = self.world.disk.borrow_mut();
        let inode = &mut disk.inodes[self.inode];
        if (inode.current.len() as u64) < len {
            inode.current.resize(len as usize, 0);
            inode.length_is_dirty = true;
        }
        Ok(())
    }

    async fn truncate(&self, len: u64) -> io::Result<()> {
        self.world.delay(50).await;
        self.world.crash_point().await;
        self.world.fails_at(Operation::Truncate, &self.path).await?;
        let mut disk = self.world.disk.borrow_mut();
        let inode = &mut disk.inodes[self.inode];
        let old_blocks = inode.current.len().div_ceil(BLOCK_BYTES);
        inode.current.resize(len as usize, 0);
        inode.length_is_dirty = true;
        // Blocks cut off must not come back if the file grows again before a sync.
        inode.dirty_blocks.extend(len as usize / BLOCK_BYTES..old_blocks);
        Ok(())
    }

    async fn next_data(&self, offset: u64) -> io::Result<u64> {
        self.world.delay(50).await;
        let disk = self.world.disk.borrow();
        let bytes = &disk.inodes[self.inode].current;
        let start = usize::try_from(offset).map_or(bytes.len(), |offset| offset.min(bytes.len()));
        let data = bytes[start..].iter().position(|&byte| byte != 0);
        Ok(data.map_or(bytes.len(), |zeroes| start + zeroes) as u64)
    }

    async fn len(&self) -> io::Result<u64> {
        Ok(self.world.disk.borrow().inodes[self.inode].current.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_decides_a_run() {
        let run = |seed| {
            let sim = Sim::new(seed);
            let io = sim.io();
            let order: Rc<RefCell<Vec<usize>>> = Rc::default();
            let seen = Rc::clone(&order);
            sim.run(async move {
                let done = Rc::new(Cell::new(0));
                for index in 0..20 {
                    let (io2, order, done) = (io.clone(), Rc::clone(&order), Rc::clone(&done));
                    io.spawn(async move {
                        io2.yield_now().await;
                        io2.sleep(Duration::from_micros(io2.random() % 50)).await;
                        order.borrow_mut().push(index);
                        done.set(done.get() + 1);
                    });
                }
                while done.get() < 20 {
                    io.sleep(Duration::from_micros(10)).await;
                }
            });
            seen.take()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn what_was_synced_survives_and_what_was_not_may_not() {
        let mut lost = 0;
        for seed in 0..50 {
            let sim = Sim::new(seed);
            let io = sim.io();
            sim.run(async move {
                let file = io.open("a", OpenMode::CreateNew).await.unwrap();
                file.write_at(vec![1; 10_000], 0).await.0.unwrap();
                file.sync_data().await.unwrap();
                io.sync_dir("").await.unwrap();
                file.write_at(vec![2; 10_000], 10_000).await.0.unwrap();
            });
            sim.crash_now();
            let bytes = sim.contents("a").unwrap();
            assert!(bytes[..10_000].iter().all(|&byte| byte == 1));
            lost += u32::from(bytes.len() < 20_000 || bytes[10_000..].contains(&0));
        }
        assert!(lost > 25, "an unsynced write hardly ever got lost: {lost} of 50");
    }

    #[test]
    fn an_unsynced_name_may_be_forgotten() {
        let mut lost = 0;
        for seed in 0..50 {
            let sim = Sim::new(seed);
            let io = sim.io();
            sim.run(async move {
                let file = io.open("a", OpenMode::CreateNew).await.unwrap();
                file.write_at(vec![1; 10], 0).await.0.unwrap();
                file.sync_data().await.unwrap();
            });
            sim.crash_now();
            lost += u32::from(sim.contents("a").is_none());
        }
        assert!((5..45).contains(&lost), "{lost} of 50");
    }

    #[test]
    fn a_failed_sync_is_never_made_good_by_a_later_one() {
        let sim = Sim::new(1);
        let io = sim.io();
        let handle = sim.clone();
        sim.run(async move {
            let file = io.open("a", OpenMode::CreateNew).await.unwrap();
            file.allocate(10).await.unwrap();
            file.sync_data().await.unwrap();
            io.sync_dir("").await.unwrap();
            file.write_at(vec![1; 10], 0).await.0.unwrap();
            handle.set_faults(FaultRates { sync_errors: 65_536, ..FaultRates::default() });
            assert!(file.sync_data().await.is_err());
            handle.set_faults(FaultRates::default());
            file.sync_data().await.unwrap();
        });
        sim.crash_now();
        assert_eq!(sim.contents("a").unwrap(), vec![0; 10]);
    }
}
