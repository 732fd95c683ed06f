//! Configuration files: never a panic, and never a refusal without a reason.
#![no_main]

use auth_daemon::config::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(faults) = Config::parse(text) {
        assert!(!faults.is_empty());
    }
});
