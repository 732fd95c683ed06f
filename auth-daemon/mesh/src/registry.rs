//! Published state: written by discovery, read without a lock.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
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
    /// Creates a value that holds `first` until the first [`Published::publish`].
    pub fn holding(first: T) -> Self {
        Self {
            current: ArcSwap::from_pointee(first),
            changed: watch::Sender::new(0),
        }
    }

    /// Returns the current value.
    pub fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Returns the current value without counting the reader, which costs less than [`Published::current`] where many
    /// threads read it. Only for a moment: do not hold it across an await.
    pub fn load(&self) -> Guard<Arc<T>> {
        self.current.load()
    }

    /// Replaces the value and wakes tasks that wait for a change.
    pub fn publish(&self, next: T) {
        self.current.store(Arc::new(next));
        self.changed.send_modify(|version| *version += 1);
    }

    /// Returns a receiver of the number of publications, which is 0 before the first.
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
    /// Creates a registry that is empty until the first [`Published::publish`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the current snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current()
    }
}
