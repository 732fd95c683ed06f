//! Replays the seeds of the fuzz targets, and changed ones, so that each target compiles and holds without a fuzzer.
//! `cargo xtask fuzz` searches for more.

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use rand::{Rng, RngExt, SeedableRng, rngs::SmallRng};

/// Time for changed seeds of one target.
const TIME: Duration = Duration::from_secs(1);

#[test]
fn every_target_holds_for_its_seeds_and_for_changed_ones() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (name, run) in targets::TARGETS {
        let files = fs::read_dir(folder.join(name)).expect("the target has seeds");
        let seeds: Vec<_> = files
            .map(|file| fs::read(file.unwrap().path()).unwrap())
            .collect();
        assert!(!seeds.is_empty(), "{name} has no seed");
        seeds.iter().for_each(|seed| run(seed));
        // The same changes in each run, as far as the time allows.
        let mut random = SmallRng::seed_from_u64(7);
        let (began, mut runs) = (Instant::now(), 0);
        while began.elapsed() < TIME {
            run(&changed(&seeds, &mut random));
            runs += 1;
        }
        println!("{name}: {} seeds, {runs} changed ones", seeds.len());
    }
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
