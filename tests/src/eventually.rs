//! Waiting for a condition, never for a fixed time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::vm::slowdown;

/// Default timeout of the library's own waits.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Calls `probe` every 10 ms until it returns a value. Fails if `deadline`, multiplied by [`slowdown`], passes without one.
///
/// `what` names what is waited for, for the error message.
pub fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T> {
    eventually_ok(deadline, what, || probe().ok_or_else(|| anyhow!("not yet")))
}

/// Like [`eventually`], for a probe that returns the reason why it is not ready yet. The error contains the last
/// reason.
pub fn eventually_ok<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl FnMut() -> Result<T>,
) -> Result<T> {
    let deadline = deadline * slowdown();
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
