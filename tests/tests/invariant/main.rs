//! The invariant, as a property of generated meshes: no byte between pods of the mesh is readable on a wire, and no
//! server reads a byte that policy denies, whatever happens meanwhile.
//!
//! A seed determines a mesh, a sequence of events and connections between random places. Each connection carries
//! markers of its own both ways. Captures on all links and the servers themselves show where a marker was readable; a
//! plain table and the oracle of the policies, which share no code with the daemon, say where it may be.
//!
//! `INVARIANT_SEED` repeats a plan, and `INVARIANT_CONNECTS` sets the number of connections. A long run:
//!
//! ```console
//! # INVARIANT_CONNECTS=1000000 cargo test --release -p mesh-tests --test invariant
//! ```

mod events;
mod history;
mod judge;
mod observer;
/// The test oracle of the policies, which uses nothing of the crate that it tests.
#[path = "../../../auth-daemon/mesh/src/policy/naive.rs"]
#[allow(dead_code, reason = "its own crate compares more than the verdict")]
mod oracle;
mod plan;
mod policies;
mod random;
mod run;
mod table;
mod world;

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use judge::Judged;

#[test]
fn nothing_private_is_readable_and_nothing_denied_is_delivered() {
    let seed = setting("INVARIANT_SEED").unwrap_or_else(history::now);
    let connects = setting("INVARIANT_CONNECTS").unwrap_or(CONNECTS);
    println!("INVARIANT_SEED={seed} INVARIANT_CONNECTS={connects}");
    let start = Instant::now();
    let worlds = connects.div_ceil(CONNECTS_OF_WORLD);
    let next = AtomicU64::new(0);
    let results = Mutex::new((Judged::default(), Vec::new()));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            // The rest would only repeat what is violated.
            if number >= worlds || !lock(&results).1.is_empty() {
                return;
            }
            let connects = CONNECTS_OF_WORLD.min(connects - number * CONNECTS_OF_WORLD);
            let result = one_world(seed.wrapping_add(number), connects as usize);
            let (judged, failures) = &mut *lock(&results);
            match result {
                Ok(one) => *judged += one,
                Err(failure) => failures.push(failure),
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..WORLDS {
            scope.spawn(work);
        }
    });
    let (judged, failures) = results.into_inner().expect("no run panics");
    println!("{judged:?} in {:?}", start.elapsed());
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    // Each kind must occur often enough to count as tested.
    let least = judged.connections / 20;
    for (what, count) in [
        ("passed", judged.passed),
        ("refused", judged.refused),
        ("private", judged.private),
        ("plain", judged.plain),
    ] {
        assert!(count > least, "{what}: {judged:?}");
    }
}

fn one_world(seed: u64, connects: usize) -> Result<Judged, String> {
    let outcome = run::run(seed, connects).map_err(|error| format!("seed {seed}: {error:#}"))?;
    judge::judge(&outcome)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no run panics")
}

fn setting(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

const CONNECTS: u64 = 10_000;
/// A world keeps what it captures until its end.
const CONNECTS_OF_WORLD: u64 = 1_680;
/// How many run at the same time. A world waits most of the time: a change has two seconds to take effect.
const WORLDS: usize = 6;
