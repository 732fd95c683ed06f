//! What was in force when.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::world::State;

/// The states of a run.
#[derive(Debug, Default)]
pub(crate) struct History(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    /// When its event began.
    begins: u64,
    /// When the daemons knew of it.
    known: u64,
    state: State,
}

impl History {
    /// Adds a state that begins to take effect now.
    pub(crate) fn push(&mut self, state: State) {
        let begins = now();
        self.0.push(Entry {
            begins,
            known: begins,
            state,
        });
    }

    /// Notes that the daemons know of the last state now.
    pub(crate) fn note_known(&mut self) {
        if let Some(last) = self.0.last_mut() {
            last.known = now();
        }
    }

    /// When the first state began.
    pub(crate) fn start(&self) -> u64 {
        self.0.first().map_or(0, |first| first.begins)
    }

    pub(crate) fn last(&self) -> &State {
        let last = self.0.last();
        &last.expect("the first state is there from the start").state
    }

    /// The states that may have been in force at some time from `start` to `end`: a state is until the next one has had
    /// the time to take effect.
    pub(crate) fn in_force(&self, start: u64, end: u64) -> Vec<&State> {
        let next = self.0.iter().skip(1);
        let ends = next.map(|next| next.known + GRACE.as_nanos() as u64);
        self.0
            .iter()
            .zip(ends.chain([u64::MAX]))
            .filter(|(entry, ends)| entry.begins <= end && start <= *ends)
            .map(|(entry, _)| &entry.state)
            .collect()
    }
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock exists");
    Duration::from(time).as_nanos() as u64
}

/// The time in which a change that the daemons know takes effect, also on connections that are open.
pub(crate) const GRACE: Duration = Duration::from_secs(2);
