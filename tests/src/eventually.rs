//! Waiting for something to become true, never for a time to pass.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

/// How long the library's own waits last before they fail, unless told otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Asks `probe` every 10 ms until it gives a value, and fails when `deadline` has passed without one.
///
/// `what` names what is waited for; the error says it.
pub fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T> {
    eventually_ok(deadline, what, || probe().ok_or_else(|| anyhow!("not yet")))
}

/// Like [`eventually`], for a probe that says why it is not there yet; the error carries its last reason.
pub fn eventually_ok<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<T>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(why) if start.elapsed() >= deadline => {
                return Err(why.context(format!("waited {deadline:?} in vain for {what}")));
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

const POLL: Duration = Duration::from_millis(10);
