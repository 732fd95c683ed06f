//! How much of the data path's time the connections of one listener take.
//!
//! The data path has two threads for each core. One of them serves listeners that have little to do, the other one those
//! that are busy. So a pod whose connections keep a thread busy, be it a flood or a legitimate load, competes with other
//! pods' connections as threads do, and the kernel prefers the threads of quiet listeners. In one thread, each of a
//! connection's steps would wait for a turn of the busy listener, and for the thread.
//!
//! A listener moves as a whole when it becomes busy or quiet: the thread that accepts a connection is of the same kind as the
//! one that serves it. A connection stays on the thread on which it began, and so does a tunnel with all the connections
//! that it carries. A thread loses its precedence while it serves such connections of a busy listener (`node::precedence`).

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Period over which a listener's work is measured.
const PERIOD: Duration = Duration::from_millis(100);
/// Work in one such period from which a listener is busy: a quarter of one thread's time.
const BUSY: Duration = Duration::from_millis(25);
/// The most that one turn counts for: about the longest step of a handshake. In a turn that takes longer, the kernel ran other
/// threads. That is no work of the listener, and must not move a quiet pod's to where busy ones are served.
const LONGEST: Duration = Duration::from_millis(1);
/// How long a listener stays busy after such a period, so that it does not move to and fro.
const CALM_AFTER: Duration = Duration::from_secs(2);

/// The work of one listener's connections, on all threads. Without a lock: all threads add to it at each turn. What two
/// threads add while a period begins may count for the wrong one, or not at all.
#[derive(Debug)]
pub(crate) struct Work {
    began: Instant,
    /// Number of the current period since `began`.
    period: AtomicU64,
    /// Work in the current period, in nanoseconds.
    work: AtomicU64,
    /// Until when the listener is busy, in nanoseconds since `began`.
    busy_until: AtomicU64,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            period: AtomicU64::new(0),
            work: AtomicU64::new(0),
            busy_until: AtomicU64::new(0),
        }
    }
}

impl Work {
    /// Adds what a thread has done for the listener in a turn that began at `start` and ends at `now`. Returns how long that
    /// was, without interruptions.
    pub(crate) fn add(&self, start: Instant, now: Instant) -> Duration {
        let work = now.duration_since(start).min(LONGEST);
        self.add_at(work, now);
        work
    }

    /// Whether the listener is busy, so that it and its new connections belong on the threads for busy ones.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy_at(Instant::now())
    }

    fn add_at(&self, work: Duration, now: Instant) {
        let now = now.duration_since(self.began);
        let period = nanoseconds(now) / nanoseconds(PERIOD);
        if self.period.load(Ordering::Relaxed) != period {
            self.period.store(period, Ordering::Relaxed);
            self.work.store(0, Ordering::Relaxed);
        }
        let work = nanoseconds(work);
        let before = self.work.fetch_add(work, Ordering::Relaxed);
        if before + work >= nanoseconds(BUSY) {
            let until = nanoseconds(now + CALM_AFTER);
            self.busy_until.store(until, Ordering::Relaxed);
        }
    }

    /// As [`Work::is_busy`], at `now`.
    pub(crate) fn is_busy_at(&self, now: Instant) -> bool {
        let now = nanoseconds(now.duration_since(self.began));
        now < self.busy_until.load(Ordering::Relaxed)
    }
}

/// Enough for 584 years.
fn nanoseconds(duration: Duration) -> u64 {
    duration.as_nanos() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_the_kernel_interrupts_makes_no_listener_busy() {
        let work = Work::default();
        let Some(long_ago) = Instant::now().checked_sub(PERIOD) else {
            return;
        };
        for _ in 0..10 {
            work.add(long_ago, Instant::now());
        }
        assert!(!work.is_busy());
    }

    #[test]
    fn is_busy_while_it_takes_a_quarter_of_a_thread() {
        let work = Work::default();
        let at = |milliseconds| work.began + Duration::from_millis(milliseconds);
        for step in 0..20 {
            work.add_at(Duration::from_millis(2), at(step * 10));
        }
        assert!(!work.is_busy_at(at(199)), "20 of 100 ms, twice");
        for step in 0..10 {
            work.add_at(Duration::from_millis(3), at(200 + step * 10));
        }
        assert!(work.is_busy_at(at(299)), "30 of 100 ms");
        assert!(work.is_busy_at(at(2000)), "not long ago");
        assert!(!work.is_busy_at(at(2400)), "not since");
    }
}
