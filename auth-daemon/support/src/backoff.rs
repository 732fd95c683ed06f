//! Exponential backoff with jitter. Pure: the caller supplies the random number.

use std::time::Duration;

/// Returns the pause after a failure that follows `earlier` consecutive failures. It starts at `first`, doubles with
/// each failure, and is at most `most`. Half of it is jitter, scaled by `chance`, a random number between 0 and 1.
pub fn pause(first: Duration, most: Duration, earlier: u32, chance: f64) -> Duration {
    first
        .saturating_mul(1 << earlier.min(16))
        .min(most)
        .mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}
