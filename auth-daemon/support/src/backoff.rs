//! How long to wait after failures. Pure: chance comes from the caller.

use std::time::Duration;

/// The wait after a failure that `earlier` others came before, in a row: `first`, twice as long each time, at most
/// `most`; half of it by `chance`, which is between 0 and 1.
pub fn pause(first: Duration, most: Duration, earlier: u32, chance: f64) -> Duration {
    first
        .saturating_mul(1 << earlier.min(16))
        .min(most)
        .mul_f64(0.5 + 0.5 * chance.clamp(0.0, 1.0))
}
