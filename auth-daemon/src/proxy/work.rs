//! How much of the data path's time the connections of one listener take.
//!
//! The data path has two threads for each core. One of them serves listeners that have little to do, the other one those
//! that are busy. So a pod whose connections keep a thread busy, be it a flood or a legitimate load, competes with other
//! pods' connections as threads do: the kernel's scheduler runs a thread that was asleep before one that has been running.
//! In one thread, each of a connection's steps would wait for a turn of the busy listener, and for the thread.
//!
//! A connection stays on the thread on which it began, and so does a tunnel with all the connections that it carries.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Period over which a listener's work is measured.
const WINDOW: Duration = Duration::from_millis(100);
/// Work in one such period from which a listener is busy: a quarter of one thread's time.
const BUSY: Duration = Duration::from_millis(25);

/// The work of one listener's connections, on all threads.
#[derive(Debug, Default)]
pub(crate) struct Work(Mutex<Measured>);

#[derive(Debug, Default)]
struct Measured {
    /// When the current period began.
    began: Option<Instant>,
    /// Work in the current period.
    work: Duration,
    was_busy: bool,
}

impl Work {
    /// Adds what a thread has done for the listener just now.
    pub(crate) fn add(&self, work: Duration) {
        self.add_at(work, Instant::now());
    }

    /// Whether the listener is busy, so that its new connections belong on the threads for busy ones.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_busy_at(Instant::now())
    }

    fn add_at(&self, work: Duration, now: Instant) {
        let mut measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        measured.settle(now);
        measured.work += work;
    }

    fn is_busy_at(&self, now: Instant) -> bool {
        let mut measured = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        measured.settle(now);
        measured.was_busy || measured.work >= BUSY
    }
}

impl Measured {
    /// Begins a new period if the current one is over.
    fn settle(&mut self, now: Instant) {
        let age = self.began.map(|began| now.duration_since(began));
        if age.is_some_and(|age| age < WINDOW) {
            return;
        }
        // After a pause of a whole period, the one before this was quiet.
        self.was_busy = age.is_some_and(|age| age < 2 * WINDOW) && self.work >= BUSY;
        (self.began, self.work) = (Some(now), Duration::ZERO);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_busy_while_it_takes_a_quarter_of_a_thread() {
        let (work, start) = (Work::default(), Instant::now());
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        for step in 0..10 {
            work.add_at(Duration::from_millis(1), at(step * 10));
        }
        assert!(!work.is_busy_at(at(99)), "10 of 100 ms");
        for step in 0..10 {
            work.add_at(Duration::from_millis(3), at(100 + step * 10));
        }
        assert!(work.is_busy_at(at(199)), "30 of 100 ms");
        assert!(work.is_busy_at(at(250)), "in the period before");
        assert!(!work.is_busy_at(at(350)), "not since");
    }

    #[test]
    fn is_calm_again_after_a_pause() {
        let (work, start) = (Work::default(), Instant::now());
        work.add_at(WINDOW, start);
        assert!(work.is_busy_at(start + WINDOW));
        assert!(!work.is_busy_at(start + 10 * WINDOW));
    }
}
