//! The invariant, as a property of generated meshes: no byte between pods of the mesh is readable on a wire, and no
//! server reads a byte that policy denies, whatever happens meanwhile.
//!
//! A seed determines a mesh, a sequence of events and connections between random places. Each connection carries
//! markers of its own both ways. Captures on all links and the servers themselves tell where a marker was readable; a
//! plain table and the oracle of the policies, which share no code with the daemon, tell where it may be.
//!
//! `INVARIANT_SEED` repeats a plan, `INVARIANT_CONNECTS` sets the number of connections (a long run: 1000000), and
//! `INVARIANT_WORLDS` the number of meshes that run at the same time.

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
use std::thread;
use std::time::Instant;

use judge::Judged;

#[test]
fn nothing_private_is_readable_and_nothing_denied_is_delivered() {
    let seed = setting("INVARIANT_SEED").unwrap_or_else(history::now);
    let connects = setting("INVARIANT_CONNECTS").unwrap_or(CONNECTS) as usize;
    let worlds = setting("INVARIANT_WORLDS").unwrap_or(WORLDS);
    println!("INVARIANT_SEED={seed} INVARIANT_WORLDS={worlds} INVARIANT_CONNECTS={connects}");
    let start = Instant::now();
    let each = connects.div_ceil(worlds as usize);
    let one = |seed: u64| -> Result<Judged, String> {
        let outcome = run::run(seed, each).map_err(|error| format!("seed {seed}: {error:#}"))?;
        judge::judge(&outcome)
    };
    let results: Vec<Result<Judged, String>> = thread::scope(|scope| {
        let runs: Vec<_> = (0..worlds)
            .map(|number| scope.spawn(move || one(seed.wrapping_add(number))))
            .collect();
        runs.into_iter()
            .map(|run| {
                run.join()
                    .unwrap_or_else(|_| Err("a run panicked".to_owned()))
            })
            .collect()
    });
    let mut judged = Judged::default();
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(one) => judged += one,
            Err(failure) => failures.push(failure),
        }
    }
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

fn setting(name: &str) -> Option<u64> {
    let value = env::var(name).ok()?;
    let number = value.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={value} is no number")))
}

const CONNECTS: u64 = 10_000;
/// A world waits most of the time: a change has two seconds to take effect.
const WORLDS: u64 = 6;
