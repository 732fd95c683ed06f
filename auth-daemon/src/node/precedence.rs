//! The precedence of the threads for quiet listeners over others.
//!
//! A connection that began while its listener was quiet stays on such a thread when the listener becomes busy. With
//! precedence, the thread would interrupt the apps for each request, instead of finding several when its turn comes: 32 kept
//! connections took 1.5 times as much of two cores. And a busy pod would have precedence over its neighbours' apps. So a
//! thread that spends much of its time on busy listeners has none until that is over.

use std::{
    cell::RefCell,
    io,
    time::{Duration, Instant},
};

use auth_datapath::threads;

/// Period over which a thread's work for busy listeners is measured.
const PERIOD: Duration = Duration::from_millis(100);
/// Work for busy listeners in one such period from which a thread has no precedence.
const MUCH: Duration = Duration::from_millis(10);

thread_local! {
    /// `None` on threads that never have precedence.
    static PRECEDENCE: RefCell<Option<Precedence>> = const { RefCell::new(None) };
}

/// Gives the calling thread precedence for as long as it mostly serves quiet listeners.
///
/// # Errors
/// As [`threads::set_preferred`]. The thread then never has precedence.
pub(super) fn begin() -> io::Result<()> {
    threads::set_preferred(true)?;
    PRECEDENCE.set(Some(Precedence::new(Instant::now())));
    Ok(())
}

/// Notes that the calling thread has worked for a listener, which is busy or not, in a turn that ended at `now`, and changes
/// the thread's precedence if that is due.
pub(super) fn turn_ended(work: Duration, is_busy: bool, now: Instant) {
    PRECEDENCE.with_borrow_mut(|precedence| {
        let Some(precedence) = precedence else { return };
        let change = precedence.turn_ended(work, is_busy, now);
        if let Some(Err(error)) = change.map(threads::set_preferred) {
            tracing::warn!(%error, "cannot change the precedence of a thread for quiet pods");
        }
    });
}

/// Decides whether a thread has precedence.
#[derive(Debug)]
struct Precedence {
    is_preferred: bool,
    period_began: Instant,
    /// Work for busy listeners in the current period.
    for_busy: Duration,
}

impl Precedence {
    /// That of a thread that has it, at `now`.
    fn new(now: Instant) -> Self {
        Self {
            is_preferred: true,
            period_began: now,
            for_busy: Duration::ZERO,
        }
    }

    /// Notes a turn. Returns whether the thread is to have precedence, if that changes.
    fn turn_ended(&mut self, work: Duration, is_busy: bool, now: Instant) -> Option<bool> {
        if is_busy {
            self.for_busy += work;
        }
        let deserves_it = if now.duration_since(self.period_began) < PERIOD {
            // Lost at once, and won back at the end of a period.
            self.is_preferred && self.for_busy < MUCH
        } else {
            let was_much = self.for_busy >= MUCH;
            self.period_began = now;
            self.for_busy = Duration::ZERO;
            !was_much
        };
        let changes = deserves_it != self.is_preferred;
        self.is_preferred = deserves_it;
        changes.then_some(deserves_it)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_loses_precedence_while_it_serves_a_busy_listener() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let turn = Duration::from_millis(1);
        let mut precedence = Precedence::new(start);
        for milliseconds in 0..50 {
            assert_eq!(precedence.turn_ended(turn, false, at(milliseconds)), None);
        }
        for milliseconds in 50..59 {
            assert_eq!(precedence.turn_ended(turn, true, at(milliseconds)), None);
        }
        assert_eq!(precedence.turn_ended(turn, true, at(59)), Some(false));
        for milliseconds in 60..300 {
            assert_eq!(precedence.turn_ended(turn, true, at(milliseconds)), None);
        }
        assert_eq!(
            precedence.turn_ended(turn, false, at(300)),
            None,
            "a busy period"
        );
        assert_eq!(precedence.turn_ended(turn, false, at(399)), None);
        assert_eq!(precedence.turn_ended(turn, false, at(400)), Some(true));
    }

    #[test]
    fn a_thread_that_had_nothing_to_do_wins_precedence_back() {
        let start = Instant::now();
        let mut precedence = Precedence::new(start);
        assert_eq!(precedence.turn_ended(MUCH, true, start), Some(false));
        let later = start + 5 * PERIOD;
        precedence.turn_ended(Duration::ZERO, false, later);
        let back = precedence.turn_ended(Duration::ZERO, false, later + PERIOD);
        assert_eq!(back, Some(true));
    }
}
