//! Configuration files: never a panic, and never a refusal without a reason.

use auth_daemon::config::Config;

pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    if let Err(faults) = Config::parse(text) {
        assert!(!faults.is_empty());
    }
}
