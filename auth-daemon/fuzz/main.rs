//! Fuzzes the target that the environment variable TARGET names.
#![no_main]

mod targets;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

use targets::{TARGETS, Target};

static RUN: LazyLock<Target> = LazyLock::new(|| {
    // SAFETY: no handler runs, and no other thread is started yet. Rust does the same before `main`, which libFuzzer has: a
    // target that writes to a closed socket would end the process.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let wanted = std::env::var("TARGET").expect("TARGET names a target");
    let found = TARGETS.iter().find(|(name, _)| *name == wanted);
    found.expect("TARGET is one of the targets").1
});

fuzz_target!(|input: &[u8]| RUN(input));
