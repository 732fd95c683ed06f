//! What the thread of the checks reports while it runs them.

use std::sync::mpsc::Sender;

use anyhow::Result;

/// What happens on the thread that runs the checks.
pub(super) enum Event {
    /// Something begins: a check or, without a name, a part of the set-up.
    Begins(Option<&'static str>, &'static str),
    Saw(String),
    Ends(Result<()>),
}

/// Where a check tells what it sees.
pub(super) struct Evidence(pub(super) Sender<Event>);

impl Evidence {
    pub(super) fn saw(&self, what: impl Into<String>) {
        // Nobody listens any more after Ctrl-C.
        let _ = self.0.send(Event::Saw(what.into()));
    }
}
