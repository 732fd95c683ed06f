//! Replays the corpus of the fuzz targets, and changes it at random, so that each target compiles and holds without a fuzzer.
//! `cargo xtask fuzz` searches for more.

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::{
    env, fs, panic,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};
use targets::{TARGETS, Target};

/// Whether any thread or task has panicked. A task of a server that a target runs does so unnoticed.
static PANICKED: AtomicBool = AtomicBool::new(false);

#[test]
fn every_target_holds_for_its_corpus_and_for_changes_of_it() {
    // Seconds for each target.
    let seconds = env::var("FUZZ_SECONDS").map_or(1, |text| text.parse().expect("a number"));
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        PANICKED.store(true, Ordering::Relaxed);
        print(info);
    }));
    thread::scope(|scope| {
        let work = || {
            while let Some((name, run)) = TARGETS.get(next.fetch_add(1, Ordering::Relaxed)) {
                hold(name, *run, Duration::from_secs(seconds));
            }
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker
                .join()
                .unwrap_or_else(|panic| panic::resume_unwind(panic));
        }
    });
}

fn hold(name: &str, run: Target, time: Duration) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let files = fs::read_dir(folder.join(name)).expect("the target has seeds");
    let seeds: Vec<_> = files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect();
    assert!(!seeds.is_empty(), "{name} has no seed");
    seeds.iter().for_each(|seed| run(seed));
    // The same changes in each run, as far as the time allows.
    let mut random = SmallRng::seed_from_u64(7);
    let (began, mut runs) = (Instant::now(), 0);
    while began.elapsed() < time {
        let input = changed(&seeds, &mut random);
        run(&input);
        let panicked = PANICKED.load(Ordering::Relaxed);
        assert!(!panicked, "a task panicked; {name} ran {input:?}");
        runs += 1;
    }
    println!("{name}: {} seeds, {runs} changed ones", seeds.len());
}

/// Returns a seed with some bytes overwritten, removed, repeated or cut off.
fn changed(seeds: &[Vec<u8>], random: &mut impl Rng) -> Vec<u8> {
    let mut bytes = seeds[random.random_range(0..seeds.len())].clone();
    for _ in 0..random.random_range(1..8) {
        let at = random.random_range(0..=bytes.len());
        let end = (at + random.random_range(0..16)).min(bytes.len());
        match random.random_range(0..4) {
            0 => random.fill_bytes(&mut bytes[at..end]),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes
}
