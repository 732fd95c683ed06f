//! What follows from the state, for those who only read it: signers ready to sign, what is revoked, what is published.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};

use super::{
    authority::{IssuedRecord, Published},
    live::Live,
    plugged::PluggedIn,
    revocation,
    rotation::{Phase, Rotation},
    signer::{self, SignError, Signer, hex},
    state::{Core, integer_hex},
};
use crate::tunnel::{
    tls::rfc3339,
    trust::{Revocations, Revoked},
};

pub(super) struct Active {
    version: u64,
    pub(super) rotation: Rotation,
    pub(super) revocations: Revocations,
    /// With their SubjectPublicKeyInfo.
    signers: BTreeMap<u32, Entry>,
    signing: Arc<Signer>,
    roots: Vec<CertificateDer<'static>>,
}

struct Entry {
    signer: Arc<Signer>,
    spki: Vec<u8>,
    serial: Vec<u8>,
}

impl Active {
    /// What follows from `core`. Signers of `previous` that are still there are used on.
    pub(super) fn new(
        core: &Core,
        previous: Option<&Self>,
        plugged: Option<&PluggedIn>,
    ) -> Result<Self, String> {
        let mut signers = BTreeMap::new();
        for number in core.rotation.believed() {
            let stored = core
                .signers
                .get(&number)
                .ok_or_else(|| format!("there is no signer {number}"))?;
            let known = previous.and_then(|previous| previous.signers.get(&number));
            let signer = match (known, &stored.key, plugged) {
                (Some(known), _, _) => known.signer.clone(),
                (None, Some(key), _) => Arc::new(
                    signer::key_from_pem(key)
                        .and_then(|key| Signer::root(key, stored.certificate.clone()))
                        .map_err(|what| format!("root {number} of the CA's state: {what}"))?,
                ),
                (None, None, Some(plugged)) => plugged.signer.clone(),
                (None, None, None) => return Err(format!("signer {number} has no key")),
            };
            let entry = Entry {
                spki: signer.spki(),
                serial: signer::parse(signer.certificate())?.raw_serial().to_vec(),
                signer,
            };
            signers.insert(number, entry);
        }
        let roots = match plugged {
            Some(plugged) => plugged.roots.clone(),
            None => core
                .rotation
                .believed()
                .filter_map(|number| signers.get(&number))
                .map(|entry| entry.signer.certificate().clone())
                .collect(),
        };
        let signing = signers
            .get(&core.rotation.signing)
            .ok_or("nobody signs")?
            .signer
            .clone();
        Ok(Self {
            version: core.version,
            rotation: core.rotation,
            revocations: core.revocations(),
            signers,
            signing,
            roots,
        })
    }

    /// Who signs.
    pub(super) fn signing(&self) -> &Signer {
        &self.signing
    }

    /// Whether `spki` is a key of the CA.
    pub(super) fn owns(&self, spki: &[u8]) -> bool {
        self.signers.values().any(|entry| entry.spki == spki)
    }

    pub(super) fn is_own_serial(&self, serial: &[u8; 16]) -> bool {
        let serial = integer_hex(serial);
        self.signers
            .values()
            .any(|entry| hex(&entry.serial) == serial)
    }

    /// Whether what a signer has signed is still believed.
    pub(super) fn believes(&self, signer: u32) -> bool {
        self.signers.contains_key(&signer)
    }

    pub(super) fn check(&self, record: &IssuedRecord) -> Result<(), Revoked> {
        self.revocations.check_identity(&record.identity)?;
        if let Some(node) = &record.node {
            self.revocations.check_node(node)?;
        }
        if self.revocations.serials.is_empty() {
            return Ok(());
        }
        let serial = integer_hex(&record.serial);
        match self.revocations.serials.get(&*serial) {
            Some(&reason) => Err(Revoked::Certificate {
                serial: serial.into(),
                identity: record.identity.clone(),
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Signs the lists of `core`, which this was made of, and puts together what all may know.
    pub(super) fn publish(
        &self,
        core: &Core,
        live: &Mutex<Live>,
        now: u64,
    ) -> Result<Published, SignError> {
        // Signing can take a while; certificates are issued meanwhile.
        let (entries, phase) = {
            let live = live.lock().unwrap_or_else(PoisonError::into_inner);
            let phase = Self::phase(self.rotation, |signer| live.last_end(signer));
            (revocation::entries(core, &live, now), phase)
        };
        let crls = self
            .rotation
            .believed()
            .filter_map(|number| Some((number, self.signers.get(&number)?)))
            .map(|(number, entry)| revocation::write(core, &entries, number, &entry.signer, now))
            .collect::<Result<_, _>>()?;
        let named = |name: &String, since: &super::state::Since| (name.clone(), since.reason);
        Ok(Published {
            version: core.version,
            roots: self.roots.clone(),
            crls,
            intermediates: self.signing.above().to_vec(),
            identities: core
                .identities
                .iter()
                .map(|(identity, since)| (identity.clone(), since.reason))
                .collect(),
            nodes: core.nodes.iter().map(|(n, s)| named(n, s)).collect(),
            phase,
        })
    }

    /// Where a rotation stands, in words.
    pub(super) fn phase(rotation: Rotation, last_end: impl Fn(u32) -> u64) -> String {
        let due = rotation.due(last_end).map(rfc3339).unwrap_or_default();
        match rotation.phase {
            Phase::Steady => "steady".into(),
            Phase::Spreading { .. } => format!("spreading: the new root signs at {due}"),
            Phase::Retiring { .. } => format!("retiring: the old root leaves at {due}"),
        }
    }

    /// The part of the status that is known here.
    pub(super) fn status(&self) -> Value {
        let roots: Vec<_> = self
            .roots
            .iter()
            .map(|root| self.root_status(root))
            .collect();
        let revoked = |names: Vec<(String, String)>| {
            let mut names = names;
            names.sort();
            names
                .into_iter()
                .map(|(name, reason)| json!({ "name": name, "reason": reason }))
                .collect::<Value>()
        };
        let Revocations {
            serials,
            identities,
            nodes,
        } = &self.revocations;
        json!({
            "phase": match self.rotation.phase {
                Phase::Steady => "steady",
                Phase::Spreading { .. } => "spreading",
                Phase::Retiring { .. } => "retiring",
            },
            "version": self.version,
            "algorithm": self.signing.algorithm(),
            "roots": roots,
            "revoked": {
                "serials": revoked(serials.iter().map(|(s, r)| (s.to_string(), r.to_string())).collect()),
                "identities": revoked(identities.iter().map(|(i, r)| (i.to_string(), r.to_string())).collect()),
                "nodes": revoked(nodes.iter().map(|(n, r)| (n.clone(), r.to_string())).collect()),
            },
        })
    }

    fn root_status(&self, root: &CertificateDer<'_>) -> Value {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, root);
        let Ok(parsed) = signer::parse(root) else {
            return Value::Null;
        };
        let life = signer::life(&parsed);
        // What signs is under the first root: of its own that is the key itself, of a plugged-in chain the top of it.
        json!({
            "serial": hex(parsed.raw_serial()),
            "sha256": hex(digest.as_ref()),
            "subject": parsed.subject().to_string(),
            "notBefore": rfc3339(life.begin),
            "notAfter": rfc3339(life.end),
            "signs": self.roots.first() == Some(root),
        })
    }
}
