//! What an operator decides on, and whether the state that was kept goes with it.

use std::time::Duration;

use super::{
    authority::{Refusal, UnusableCa},
    plugged::PluggedIn,
    rotation::{self, Rotation},
    signer,
    state::{Core, Stored},
};
use crate::mesh::TrustDomain;

/// Shortest life that a certificate is issued for, in seconds.
const SHORTEST: u64 = 10;
/// Whence the CA has its signing key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// It makes a root of its own.
    SelfSigned {
        /// Of new keys.
        algorithm: KeyAlgorithm,
        /// Of new roots.
        lifetime: Duration,
        /// How long a new root is only published before it signs.
        spread: Duration,
    },
    /// An intermediate CA in Istio's layout (ca-cert.pem, ca-key.pem, root-cert.pem, cert-chain.pem).
    PluggedIn {
        /// The folder.
        directory: std::path::PathBuf,
    },
}

/// Kinds of keys that the CA makes for itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// ECDSA on P-256.
    #[default]
    P256,
    /// ECDSA on P-384.
    P384,
    /// Ed25519.
    Ed25519,
}

/// What an operator decides on.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whose CA this is.
    pub trust_domain: TrustDomain,
    /// Whence the signing key.
    pub root: Root,
    /// Longest life of a certificate.
    pub max_lifetime: Duration,
}

impl Settings {
    /// Refuses what cannot work, all of it at once.
    pub(super) fn check(&self) -> Result<(), UnusableCa> {
        let mut faults = Vec::new();
        if self.max_lifetime.as_secs() < SHORTEST {
            faults.push(format!(
                "the longest life of a certificate is {:?}; it is at least {SHORTEST} s",
                self.max_lifetime
            ));
        }
        if let Root::SelfSigned {
            lifetime, spread, ..
        } = &self.root
        {
            let least = 2 * rotation::least_left(spread.as_secs(), self.max_lifetime.as_secs());
            if lifetime.as_secs() < least {
                faults.push(format!(
                    "a root's life of {} s is too short to replace it in time: with certificates of {} s and a spread \
                     of {} s it is at least {least} s",
                    lifetime.as_secs(),
                    self.max_lifetime.as_secs(),
                    spread.as_secs()
                ));
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        Err(UnusableCa(faults.join("\n")))
    }

    /// The seconds that a certificate lives for which `wanted` is asked.
    pub(super) fn lifetime(&self, wanted: Duration) -> Result<u64, Refusal> {
        let most = self.max_lifetime.as_secs();
        match wanted.as_secs() {
            _ if wanted.is_zero() => Ok(most),
            seconds @ SHORTEST.. => Ok(seconds.min(most)),
            _ => Err(Refusal::Request(format!(
                "a certificate of {wanted:?} is asked for; it lives for at least {SHORTEST} s"
            ))),
        }
    }

    /// The state of a CA that begins.
    pub(super) fn new_core(
        &self,
        plugged: Option<&PluggedIn>,
        now: u64,
    ) -> Result<Core, UnusableCa> {
        match (&self.root, plugged) {
            (
                Root::SelfSigned {
                    algorithm,
                    lifetime,
                    ..
                },
                _,
            ) => {
                let root =
                    signer::make_root(&self.trust_domain, *algorithm, lifetime.as_secs(), now)
                        .map_err(|error| UnusableCa(error.to_string()))?;
                Core::of_root(&self.trust_domain, root).map_err(UnusableCa)
            }
            (Root::PluggedIn { .. }, Some(plugged)) => Ok(Core::of_plugged_in(
                &self.trust_domain,
                plugged.signer.certificate().clone(),
            )),
            (Root::PluggedIn { .. }, None) => {
                Err(UnusableCa("no certificate is plugged in".into()))
            }
        }
    }

    /// Checks that the state that was kept is of these settings, and makes what is plugged in now the signer.
    pub(super) fn take_up(
        &self,
        mut core: Core,
        plugged: Option<&PluggedIn>,
    ) -> Result<Core, UnusableCa> {
        if core.trust_domain != self.trust_domain {
            return Err(UnusableCa(format!(
                "the CA's state is of trust domain {}, but trustDomain is {}: each needs a place of its own",
                core.trust_domain, self.trust_domain
            )));
        }
        let own = core.signers.values().any(|signer| signer.key.is_some());
        match (own, plugged) {
            (true, Some(_)) => Err(UnusableCa(
                "the CA's state has a root of its own, but a certificate is to be plugged in: use a new place for the \
                 state, and put the old root beside the new one into root-cert.pem until no certificate of it is left"
                    .into(),
            )),
            (false, None) => Err(UnusableCa(
                "the CA's state is of a certificate that was plugged in, but none is configured: configure it, or use \
                 a new place for the state"
                    .into(),
            )),
            (true, None) => Ok(core),
            (false, Some(plugged)) => {
                let certificate = plugged.signer.certificate();
                let known = &core.signers[&core.rotation.signing].certificate;
                if known != certificate {
                    let number = core.add_signer(Stored {
                        certificate: certificate.clone(),
                        key: None,
                    });
                    core.rotate(Rotation::steady(number));
                    tracing::info!("another certificate is plugged in");
                }
                Ok(core)
            }
        }
    }
}
