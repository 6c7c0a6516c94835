//! Simulated storage that is near or far away: what holds on local files must hold on storage of another machine.

use std::cell::Cell;
use std::time::Duration;

use posthaste_engine::io::sim::SimIo;
use posthaste_engine::storage::faulty::{Faulty, Policy, SharedPolicy};
use posthaste_engine::storage::local::Local;

pub type Store = Faulty<Local<SimIo>>;

thread_local! {
    static IS_FAR: Cell<bool> = const { Cell::new(false) };
}

/// Whether storage opened by this thread from here on is far away: then every call takes up to 100 ms longer.
pub fn set_far(is_far: bool) {
    IS_FAR.set(is_far);
}

/// Runs a test on local files and on storage that is far away.
pub fn near_and_far(test: impl Fn()) {
    for is_far in [false, true] {
        set_far(is_far);
        println!("storage is {}", if is_far { "far away" } else { "near" });
        test();
    }
}

pub fn storage(io: &SimIo) -> Store {
    let policy = SharedPolicy::default();
    if IS_FAR.get() {
        policy.set(Policy { delay_max: Duration::from_millis(100), ..Policy::default() });
    }
    Faulty::new(Local::new(io.clone()), policy)
}
