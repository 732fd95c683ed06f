//! Detects threads of the data path that are stuck.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Interval at which a thread records that it is alive, by an atomic store without a lock.
pub(super) const BEAT: Duration = Duration::from_secs(1);
/// Time without a heartbeat after which a thread counts as stuck, not only busy.
const STUCK: Duration = Duration::from_secs(20);

/// The last heartbeat of each thread.
#[derive(Clone, Debug)]
pub struct Pulse {
    threads: Vec<Beats>,
}

/// The heartbeat of one thread.
#[derive(Clone, Debug)]
pub(super) struct Beats {
    start: Instant,
    /// Last heartbeat, in milliseconds after `start`.
    last: Arc<AtomicU64>,
}

impl Beats {
    /// Creates a heartbeat that is recorded as of now.
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            last: Arc::default(),
        }
    }

    pub(super) fn beat(&self) {
        self.last
            .store(self.after(Instant::now()), Ordering::Relaxed);
    }

    fn after(&self, now: Instant) -> u64 {
        let after = now.saturating_duration_since(self.start);
        u64::try_from(after.as_millis()).unwrap_or(u64::MAX)
    }

    fn silence(&self, now: Instant) -> Duration {
        let last = self.last.load(Ordering::Relaxed);
        Duration::from_millis(self.after(now).saturating_sub(last))
    }
}

impl Pulse {
    pub(super) fn of(threads: impl Iterator<Item = Beats>) -> Self {
        Self {
            threads: threads.collect(),
        }
    }

    /// Returns the number of the first thread that is stuck at `now`, and the time since its last heartbeat.
    pub fn stuck(&self, now: Instant) -> Option<(usize, Duration)> {
        let silences = self.threads.iter().map(|beats| beats.silence(now));
        silences.enumerate().find(|(_, silence)| *silence > STUCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_silent_for_long_is_stuck() {
        let (one, other) = (Beats::new(), Beats::new());
        let pulse = Pulse::of([one.clone(), other.clone()].into_iter());
        assert_eq!(pulse.stuck(Instant::now()), None);
        let late = other.start + STUCK + BEAT;
        one.last.store(one.after(late), Ordering::Relaxed);
        let (thread, silence) = pulse.stuck(late).unwrap();
        assert!(thread == 1 && silence > STUCK, "{thread} {silence:?}");
        other.last.store(other.after(late), Ordering::Relaxed);
        assert_eq!(pulse.stuck(late), None);
    }
}
