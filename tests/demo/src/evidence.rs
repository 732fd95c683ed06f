//! Events that the thread of the checks reports.

use std::sync::mpsc::Sender;

use anyhow::Result;

/// An event from the thread that runs the checks.
pub(super) enum Event {
    /// A check begins or, without a name, a part of the setup.
    Begins(Option<&'static str>, &'static str),
    Saw(String),
    Ends(Result<()>),
}

impl xtask_support::supervise::Event for Event {
    fn begins(&self) -> Option<&str> {
        match self {
            Self::Begins(name, claim) => Some(name.unwrap_or(claim)),
            _ => None,
        }
    }
}

/// Where a check reports its evidence.
pub(super) struct Evidence(pub(super) Sender<Event>);

impl Evidence {
    pub(super) fn saw(&self, what: impl Into<String>) {
        // The receiver is gone after Ctrl-C.
        let _ = self.0.send(Event::Saw(what.into()));
    }
}
