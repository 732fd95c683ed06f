//! What follows from the state, for readers: signers ready to sign, and what is published.

use std::{collections::BTreeMap, sync::Arc};

use auth_jwt::{JwtKeys, SigningKey};
use auth_mesh::Identity;
use auth_tunnel::tls::trust::{Revocations, Revoked};
use rustls::pki_types::CertificateDer;

use crate::{
    crl,
    intermediate::Intermediate,
    join::Joins,
    rotation::Rotation,
    signer::{self, Holder, Signer, hex},
    state::{CaState, Serial},
};

/// What everybody may know: sent to the daemons at each change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Grows with each change, also over restarts.
    pub version: u64,
    /// Root certificates, DER: at least one, that of new certificates first.
    pub roots: Vec<CertificateDer<'static>>,
    /// Revocation lists, one for each signing certificate, DER.
    pub crls: Vec<Vec<u8>>,
    /// The certificates between the lists' signer and the roots, that signer first, DER. Empty for a root.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// What is revoked.
    pub revoked: Revocations,
    /// The phase of the root's rotation, for people.
    pub phase: String,
    /// Keys that verify JWT-SVIDs.
    pub jwt_keys: JwtKeys,
}

/// A read-only view of one [`CaState`].
pub(crate) struct CaView {
    pub(crate) rotation: Rotation,
    /// The signer of new certificates.
    pub(crate) signing: Arc<Signer>,
    /// The key that signs new JWT-SVIDs.
    pub(crate) jwt: SigningKey,
    pub(crate) published: Arc<Published>,
    /// When to sign the next revocation lists, in seconds since the Unix epoch.
    pub(crate) lists_due: u64,
    pub(crate) joins: Joins,
    signers: BTreeMap<u32, Arc<Signer>>,
}

impl CaView {
    /// Derives the view of `state`, and signs its revocation lists at `now`. Signers of `previous` that are still trusted
    /// are reused.
    pub(crate) fn new(
        state: &CaState,
        previous: Option<&Self>,
        intermediate: Option<&Intermediate>,
        now: u64,
    ) -> Result<Self, String> {
        let (mut signers, mut jwt) = (BTreeMap::new(), Vec::new());
        let (mut own_roots, mut crls) = (Vec::new(), Vec::new());
        for number in state.rotation.trusted() {
            let stored = state
                .signers
                .get(&number)
                .ok_or_else(|| format!("there is no signer {number}"))?;
            let known = previous.and_then(|previous| previous.signers.get(&number));
            let signer = match (known, &stored.key, intermediate) {
                (Some(known), _, _) => known.clone(),
                (None, Some(key), _) => Arc::new(
                    signer::key_from_pem(key)
                        .and_then(|key| Signer::root(key, stored.certificate.clone()))
                        .map_err(|what| format!("root {number} of the CA's state: {what}"))?,
                ),
                (None, None, Some(intermediate)) => intermediate.signer.clone(),
                (None, None, None) => return Err(format!("signer {number} has no key")),
            };
            let jwt_key = stored.jwt_key.as_deref().unwrap_or_default();
            let jwt_key = SigningKey::from_pem(jwt_key).map_err(|error| {
                format!("the JWT key of signer {number} in the CA's state {error}")
            })?;
            jwt.push(jwt_key);
            own_roots.push(signer.certificate().clone());
            let list = crl::write(state, &signer, now);
            crls.push(list.map_err(|error| format!("a revocation list cannot be made: {error}"))?);
            signers.insert(number, signer);
        }
        let signing = signers
            .get(&state.rotation.signing)
            .ok_or("there is no signer")?
            .clone();
        let published = Published {
            version: state.version,
            roots: intermediate.map_or(own_roots, |intermediate| intermediate.roots.clone()),
            crls,
            intermediates: signing.intermediates().to_vec(),
            revoked: state.revocations(),
            phase: state.rotation.to_string(),
            jwt_keys: jwt.iter().collect(),
        };
        // The signer that signs is the first of those that are trusted.
        let jwt = jwt.into_iter().next().ok_or("there is no JWT key")?;
        Ok(Self {
            rotation: state.rotation,
            signing,
            jwt,
            published: Arc::new(published),
            lists_due: now.saturating_add(crl::LIFETIME / 2),
            joins: state.joins.clone(),
            signers,
        })
    }

    /// Fails if `identity`, or the node that requests it, is revoked.
    pub(crate) fn check(&self, identity: &Identity, holder: Holder<'_>) -> Result<(), Revoked> {
        let revoked = &self.published.revoked;
        revoked.check_identity(identity)?;
        match holder {
            Holder::Node(node) => revoked.check_node(node),
            Holder::Person(_) => Ok(()),
        }
    }

    /// Whether `spki` is a key of the CA itself.
    pub(crate) fn owns_key(&self, spki: &[u8]) -> bool {
        self.signers.values().any(|signer| signer.spki() == spki)
    }

    /// Whether `serial` is that of a certificate of the CA itself.
    pub(crate) fn owns_serial(&self, serial: Serial) -> bool {
        self.signers.values().any(|signer| {
            signer::parse(signer.certificate())
                .is_ok_and(|parsed| hex(parsed.raw_serial()) == serial.der_hex())
        })
    }

    /// Whether one of the CA's trusted keys signed the certificate `der`.
    pub(crate) fn issued(&self, der: &[u8]) -> bool {
        let Ok(certificate) = signer::parse(der) else {
            return false;
        };
        self.signers.values().any(|signer| {
            signer::parse(signer.certificate()).is_ok_and(|issuer| {
                issuer.subject().as_raw() == certificate.issuer().as_raw()
                    && certificate
                        .verify_signature(Some(issuer.public_key()))
                        .is_ok()
            })
        })
    }
}
