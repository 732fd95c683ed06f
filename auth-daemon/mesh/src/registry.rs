//! What is in force: published by discovery, read by everyone without a lock.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::Snapshot;

/// A value that is replaced as a whole.
#[derive(Debug)]
pub struct Published<T> {
    current: ArcSwap<T>,
    changed: watch::Sender<u64>,
}

/// The current [`Snapshot`].
pub type Registry = Published<Snapshot>;

impl<T> Published<T> {
    /// Holds `first` until the first [`Published::publish`].
    pub fn holding(first: T) -> Self {
        Self {
            current: ArcSwap::from_pointee(first),
            changed: watch::Sender::new(0),
        }
    }

    /// The newest one.
    pub fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Replaces it and wakes those who wait for a change.
    pub fn publish(&self, next: T) {
        self.current.store(Arc::new(next));
        self.changed.send_modify(|version| *version += 1);
    }

    /// Counts publications: 0 before the first.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

impl<T: Default> Default for Published<T> {
    fn default() -> Self {
        Self::holding(T::default())
    }
}

impl Registry {
    /// Empty until the first [`Published::publish`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The newest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current()
    }
}
