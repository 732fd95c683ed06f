//! Waiting until the test lets the program continue.

use std::path::Path;
use std::thread;
use std::time::Duration;

/// Waits until there is a file at the path.
pub(crate) fn wait_for_file(path: &Path) {
    while !path.exists() {
        thread::sleep(POLL);
    }
}

pub(crate) const POLL: Duration = Duration::from_millis(10);
