//! Where the CA keeps its state: one document, replaced by compare-and-swap.

pub mod directory;
pub mod secret;

use std::{fmt, future::Future, pin::Pin};

use rustls::pki_types::CertificateDer;

/// What [`Store`]'s operations return.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// Why the CA's state could not be read or written. Names the file or object, and what to do.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);

/// What a store contains. It has keys in it.
#[derive(Clone, PartialEq, Eq)]
pub enum Stored {
    /// No CA has been here.
    Nothing,
    /// The document of the last [`Store::replace`].
    State(Vec<u8>),
    /// The root of an embedded CA: key and certificate, PEM.
    EmbeddedRoot(String),
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nothing => "Nothing",
            Self::State(_) => "State(..)",
            Self::EmbeddedRoot(_) => "EmbeddedRoot(..)",
        })
    }
}

/// Keeps the CA's state over restarts and crashes. Only one CA writes at a time: [`Store::load`] makes its caller the
/// writer, and writes of an earlier writer fail from then on.
pub trait Store: Send + Sync + fmt::Debug {
    /// Reads the state, and becomes its writer.
    fn load(&self) -> StoreFuture<'_, Stored>;

    /// Replaces the state that this writer read or wrote last. When this returns, the new state survives a crash; when
    /// it fails or never returns, either the old or the new one is there as a whole.
    fn replace<'a>(&'a self, state: &'a [u8]) -> StoreFuture<'a, ()>;

    /// Writes the published roots and revocation lists (DER) for people and programs, if this store is a place where
    /// they look. The CA continues if that fails.
    fn publish<'a>(
        &'a self,
        _roots: &'a [CertificateDer<'static>],
        _crls: &'a [Vec<u8>],
    ) -> StoreFuture<'a, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}
