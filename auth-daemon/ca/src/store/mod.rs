//! Where the CA keeps its state: one document, replaced by compare-and-swap.

pub mod directory;
pub mod secret;

use std::fmt;

use rustls::pki_types::CertificateDer;

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
#[tonic::async_trait]
pub trait Store: Send + Sync {
    /// Reads the state, and becomes its writer.
    async fn load(&self) -> Result<Stored, StoreError>;

    /// Replaces the state that this writer read or wrote last. When this returns, the new state survives a crash; when
    /// it fails or never returns, either the old or the new one is there as a whole.
    async fn replace(&self, state: &[u8]) -> Result<(), StoreError>;

    /// Writes the published roots and revocation lists (DER) for people and programs, if this store is a place where
    /// they look. The CA continues if that fails.
    async fn publish(
        &self,
        _roots: &[CertificateDer<'static>],
        _crls: &[Vec<u8>],
    ) -> Result<(), StoreError> {
        Ok(())
    }
}
