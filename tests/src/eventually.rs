//! Waiting for a condition, never for a fixed time.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::vm::EMULATED;

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
                return Err(why.context(format!("waited {deadline:?} for {what}")));
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// An environment variable that the test runner sets for tests that run beside others.
const BESIDE_OTHERS: &str = "MESH_BESIDE_OTHERS";

/// How many times longer anything may take here than on a machine of its own: 6 if the processor is emulated, 3 beside
/// other tests. All waits of this library allow for it, and so should a test's own time limits.
#[must_use]
pub fn slowdown() -> u32 {
    if env::var_os(EMULATED).is_some() {
        EMULATED_SLOWDOWN
    } else if env::var_os(BESIDE_OTHERS).is_some() {
        BESIDE_SLOWDOWN
    } else {
        1
    }
}

/// The programs of a cluster start about ten times slower on an emulated processor, and the time limits for them allow
/// for a busy machine as they are.
const EMULATED_SLOWDOWN: u32 = 6;
const BESIDE_SLOWDOWN: u32 = 3;
const POLL: Duration = Duration::from_millis(10);
