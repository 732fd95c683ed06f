//! A value in parts, each with a lock of its own, so that threads that end connections seldom wait for each other.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Number of parts: several times as many as threads touch at the same moment.
const PARTS: usize = 32;

/// A value in parts. What belongs together has the same key, and so the same part.
#[derive(Debug, Default)]
pub(super) struct Sharded<T>([Part<T>; PARTS]);

/// On cache lines of its own, so that a thread that locks one part does not slow down others.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Part<T>(Mutex<T>);

impl<T> Sharded<T> {
    /// Locks the part with `key`.
    pub(super) fn of(&self, key: u64) -> MutexGuard<'_, T> {
        self.0[(key % PARTS as u64) as usize].lock()
    }

    /// Locks one part after the other.
    pub(super) fn each(&self) -> impl Iterator<Item = MutexGuard<'_, T>> {
        self.0.iter().map(Part::lock)
    }
}

impl<T> Part<T> {
    fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_always_has_the_same_part() {
        let sums = Sharded::<u64>::default();
        for key in 0..1000 {
            *sums.of(key) += key;
        }
        assert_eq!(sums.each().map(|sum| *sum).sum::<u64>(), 999 * 1000 / 2);
        *sums.of(PARTS as u64) = 0;
        assert_eq!(*sums.of(0), 0);
        assert_eq!(sums.each().count(), PARTS);
    }
}
