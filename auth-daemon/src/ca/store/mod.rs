//! Where the CA keeps what it must not forget.

pub mod directory;
pub(super) mod disk;
mod journal;
mod record;
pub mod secret;

use std::{fmt, future::Future, pin::Pin};

use super::authority::{IssuedRecord, Published};

/// What [`Store`]'s operations return.
pub type Stored<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why the CA's state could not be read or kept. Names the file or object, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// Everything that was kept.
#[derive(Clone)]
pub struct Kept {
    /// The small part, as [`Store::keep`] got it last.
    pub core: Vec<u8>,
    /// What [`Store::record`] got, in any order. Expired ones may be missing.
    pub issued: Vec<IssuedRecord>,
}

impl fmt::Debug for Kept {
    /// There are keys in the small part.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept")
            .field("issued", &self.issued.len())
            .finish_non_exhaustive()
    }
}

/// Keeps the CA's state over restarts and crashes. Only one CA writes at a time: the implementation sees to that, and
/// fails where somebody else has written.
pub trait Store: Send + Sync + fmt::Debug {
    /// What was kept; `None` in a place where no CA has been yet.
    fn load(&self) -> Stored<'_, Option<Kept>>;

    /// Replaces the small part (roots with their keys, rotation, revocations). When this returns, it survives a crash;
    /// when it fails or never returns, either the old or the new part does, whole.
    fn keep<'a>(&'a self, core: &'a [u8]) -> Stored<'a, ()>;

    /// Adds to what was issued. When this returns, the records survive a crash.
    fn record<'a>(&'a self, issued: &'a [IssuedRecord]) -> Stored<'a, ()>;

    /// Forgets records of certificates that ended before `now` (seconds since the Unix epoch), at the implementation's
    /// leisure.
    fn prune(&self, now: u64) -> Stored<'_, ()>;

    /// Shows people and programs what is published now, where the place of this store is also one to look: at each
    /// change. The CA goes on if that fails.
    fn publish<'a>(&'a self, _published: &'a Published) -> Stored<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
