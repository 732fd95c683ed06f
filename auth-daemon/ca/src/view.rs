//! What follows from the state, for readers: signers ready to sign, what is revoked, and what is published.

use std::{collections::BTreeMap, sync::Arc};

use auth_mesh::Identity;
use auth_tunnel::tls::{
    rfc3339,
    svid::Svid,
    trust::{Reason, Revocations, Revoked},
};
use rustls::pki_types::CertificateDer;

use crate::{
    crl,
    intermediate::Intermediate,
    rotation::{Phase, Rotation},
    signer::{self, SignError, Signer, hex},
    state::{CaState, Serial},
    status::{RevokedEntry, RevokedStatus, RootStatus},
};

/// What everybody may know: sent to the daemons at each change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Published {
    /// Grows with each change, also over restarts.
    pub version: u64,
    /// Root certificates, DER.
    pub roots: Vec<CertificateDer<'static>>,
    /// Revocation lists, one for each signing certificate, DER.
    pub crls: Vec<Vec<u8>>,
    /// The certificates between the lists' signer and the roots, that signer first, DER. Empty for a root.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// Revoked identities.
    pub identities: Vec<(Identity, Reason)>,
    /// Revoked nodes.
    pub nodes: Vec<(String, Reason)>,
    /// The phase of the root's rotation, for people.
    pub phase: String,
}

/// A read-only view of one [`CaState`].
pub(crate) struct CaView {
    pub(crate) version: u64,
    pub(crate) rotation: Rotation,
    pub(crate) revocations: Revocations,
    signers: BTreeMap<u32, Arc<Signer>>,
    signing: Arc<Signer>,
    /// All trusted roots: at least one, that of new certificates first.
    roots: Vec<CertificateDer<'static>>,
}

impl CaView {
    /// Derives the view of `state`. Signers of `previous` that are still trusted are reused.
    pub(crate) fn new(
        state: &CaState,
        previous: Option<&Self>,
        intermediate: Option<&Intermediate>,
    ) -> Result<Self, String> {
        let mut signers = BTreeMap::new();
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
            signers.insert(number, signer);
        }
        let roots = match intermediate {
            Some(intermediate) => intermediate.roots.clone(),
            None => state
                .rotation
                .trusted()
                .filter_map(|number| signers.get(&number))
                .map(|signer| signer.certificate().clone())
                .collect(),
        };
        let signing = signers
            .get(&state.rotation.signing)
            .ok_or("there is no signer")?
            .clone();
        Ok(Self {
            version: state.version,
            rotation: state.rotation,
            revocations: state.revocations(),
            signers,
            signing,
            roots,
        })
    }

    /// The signer of new certificates.
    pub(crate) fn signing(&self) -> &Signer {
        &self.signing
    }

    /// All trusted roots: at least one, that of new certificates first.
    pub(crate) fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
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

    /// Fails for revoked certificates.
    pub(crate) fn check(&self, svid: &Svid) -> Result<(), Revoked> {
        self.revocations.check(svid)
    }

    /// Signs the revocation lists of `state`, which this is the view of, and collects what is published.
    pub(crate) fn publish(&self, state: &CaState, now: u64) -> Result<Published, SignError> {
        let crls = self
            .rotation
            .trusted()
            .filter_map(|number| self.signers.get(&number))
            .map(|signer| crl::write(state, signer, now))
            .collect::<Result<_, _>>()?;
        let (identities, nodes) = (state.revoked.identities.iter(), state.revoked.nodes.iter());
        Ok(Published {
            version: self.version,
            roots: self.roots.clone(),
            crls,
            intermediates: self.signing.intermediates().to_vec(),
            identities: identities
                .map(|(identity, revoked)| (identity.0.clone(), revoked.reason))
                .collect(),
            nodes: nodes
                .map(|(node, revoked)| (node.clone(), revoked.reason))
                .collect(),
            phase: describe(self.rotation),
        })
    }

    pub(crate) fn phase_name(&self) -> &'static str {
        match self.rotation.phase {
            Phase::Steady => "steady",
            Phase::Spreading { .. } => "spreading",
            Phase::Retiring { .. } => "retiring",
        }
    }

    pub(crate) fn revoked_status(&self) -> RevokedStatus {
        fn list<K: ToString>(revoked: impl IntoIterator<Item = (K, Reason)>) -> Vec<RevokedEntry> {
            let entry = |(name, reason): (K, Reason)| RevokedEntry {
                name: name.to_string(),
                reason: reason.to_string(),
            };
            let mut entries: Vec<_> = revoked.into_iter().map(entry).collect();
            entries.sort_by(|a, b| a.name.cmp(&b.name));
            entries
        }
        let Revocations {
            serials,
            identities,
            nodes,
        } = &self.revocations;
        RevokedStatus {
            serials: list(serials.iter().map(|(serial, reason)| (serial, *reason))),
            identities: list(identities.iter().map(|(i, reason)| (i.as_str(), *reason))),
            nodes: list(nodes.iter().map(|(node, reason)| (node, *reason))),
        }
    }

    pub(crate) fn roots_status(&self) -> Vec<RootStatus> {
        let root = |(index, root): (usize, &CertificateDer<'_>)| {
            let parsed = signer::parse(root).ok()?;
            let life = signer::life(&parsed);
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, root);
            Some(RootStatus {
                serial: hex(parsed.raw_serial()),
                sha256: hex(digest.as_ref()),
                subject: parsed.subject().to_string(),
                not_before: rfc3339(life.begin),
                not_after: rfc3339(life.end),
                signs: index == 0,
            })
        };
        self.roots.iter().enumerate().filter_map(root).collect()
    }
}

/// The phase of a rotation, for people.
pub(crate) fn describe(rotation: Rotation) -> String {
    match rotation.phase {
        Phase::Steady => "steady".into(),
        Phase::Spreading { until, .. } => {
            format!("spreading: the new root signs from {}", rfc3339(until))
        }
        Phase::Retiring { after, .. } => {
            format!("retiring: the old root is removed at {}", rfc3339(after))
        }
    }
}
