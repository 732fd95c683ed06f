//! What was in force when.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::world::State;

/// The states of a run, each with the time at which its event began.
#[derive(Debug, Default)]
pub(crate) struct History(Vec<(u64, State)>);

impl History {
    /// Adds a state that begins to take effect now.
    pub(crate) fn push(&mut self, state: State) {
        self.0.push((now(), state));
    }

    /// When the first state began.
    pub(crate) fn start(&self) -> u64 {
        self.0.first().map_or(0, |(start, _)| *start)
    }

    pub(crate) fn last(&self) -> &State {
        let (_, state) = self
            .0
            .last()
            .expect("the first state is there from the start");
        state
    }

    /// The states that may have been in force at some time from `start` to `end`: a state is until the next one has had
    /// the time to take effect.
    pub(crate) fn in_force(&self, start: u64, end: u64) -> Vec<&State> {
        let ends = self
            .0
            .iter()
            .skip(1)
            .map(|(next, _)| next + GRACE.as_nanos() as u64);
        self.0
            .iter()
            .zip(ends.chain([u64::MAX]))
            .filter(|((begins, _), ends)| *begins <= end && start <= *ends)
            .map(|((_, state), _)| state)
            .collect()
    }
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock exists");
    Duration::from(time).as_nanos() as u64
}

/// The time in which a change takes effect, also on connections that are open.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
