//! What the CA must not forget, but for what it issued: its keys, where a rotation stands, and what is revoked. Pure,
//! and one JSON document.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Serialize};

use super::{
    rotation::Rotation,
    signer::{self, NewRoot, hex},
};
use crate::{
    mesh::{Identity, TrustDomain},
    tunnel::trust::{Reason, Revocations},
};

/// Of the document. A CA refuses others, rather than lose what it does not know.
const FORMAT: u64 = 1;

/// The CA's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Core {
    pub(super) trust_domain: TrustDomain,
    /// Of what is published.
    pub(super) version: u64,
    /// Of the revocation lists last signed (RFC 5280 §5.2.3).
    pub(super) crl_number: u64,
    /// The highest number that a signer ever had.
    pub(super) last_signer: u32,
    pub(super) rotation: Rotation,
    pub(super) signers: BTreeMap<u32, Stored>,
    pub(super) serials: BTreeMap<[u8; 16], RevokedSerial>,
    pub(super) identities: BTreeMap<Identity, Since>,
    pub(super) nodes: BTreeMap<String, Since>,
}

/// A signing certificate.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) certificate: CertificateDer<'static>,
    /// PKCS #8, PEM; none of a certificate that is plugged in.
    pub(super) key: Option<String>,
}

/// When and why something was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Since {
    pub(super) reason: Reason,
    pub(super) at: u64,
}

/// A revoked certificate. One that was not issued here (by what is still known) has no end and no signer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RevokedSerial {
    pub(super) since: Since,
    pub(super) not_after: Option<u64>,
    pub(super) signer: Option<u32>,
}

impl fmt::Debug for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stored")
            .field("own", &self.key.is_some())
            .finish_non_exhaustive()
    }
}

impl Core {
    /// A CA that begins with a root of its own.
    pub(super) fn of_root(trust_domain: &TrustDomain, root: NewRoot) -> Result<Self, String> {
        Ok(Self::new(trust_domain, Stored::root(root)?))
    }

    /// A CA that begins with a certificate that is plugged in.
    pub(super) fn of_plugged_in(
        trust_domain: &TrustDomain,
        certificate: CertificateDer<'static>,
    ) -> Self {
        let key = None;
        Self::new(trust_domain, Stored { certificate, key })
    }

    /// Takes over the embedded CA's root: key and certificate in one PEM file, of the trust domain that it names.
    pub(super) fn of_embedded(pem: &str) -> Result<Self, String> {
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| format!("has no certificate: {error}"))?;
        let parsed = signer::parse(&certificate)?;
        let uris = signer::uris(&parsed);
        let trust_domain = uris
            .first()
            .and_then(|uri| uri.strip_prefix("spiffe://"))
            .and_then(|name| name.parse().ok())
            .ok_or("is no root of a trust domain")?;
        let key = signer::key_from_pem(pem)?;
        let key_pem = key.serialize_pem();
        let certificate_pem = super::pem::certificate(&certificate);
        signer::Signer::root(key, certificate)?;
        Self::of_root(
            &trust_domain,
            NewRoot {
                key_pem,
                certificate_pem,
            },
        )
    }

    fn new(trust_domain: &TrustDomain, signer: Stored) -> Self {
        Self {
            trust_domain: trust_domain.clone(),
            version: 0,
            crl_number: 0,
            last_signer: 1,
            rotation: Rotation::steady(1),
            signers: BTreeMap::from([(1, signer)]),
            serials: BTreeMap::new(),
            identities: BTreeMap::new(),
            nodes: BTreeMap::new(),
        }
    }

    /// Gives `signer` the next number.
    pub(super) fn add_signer(&mut self, signer: Stored) -> u32 {
        self.last_signer += 1;
        self.signers.insert(self.last_signer, signer);
        self.last_signer
    }

    /// Goes on as `rotation` says; keys that are not believed any more are forgotten.
    pub(super) fn rotate(&mut self, rotation: Rotation) {
        self.rotation = rotation;
        self.signers
            .retain(|number, _| rotation.believed().any(|believed| believed == *number));
    }

    /// Counts a change at `now`.
    pub(super) fn changed(&mut self, now: u64) {
        self.version = self.version.saturating_add(1);
        self.crl_number = self.crl_number.saturating_add(1);
        self.forget(now);
    }

    /// Forgets revocations of certificates that have ended at `now` (RFC 5280 §3.3 lets them leave the list).
    fn forget(&mut self, now: u64) {
        self.serials
            .retain(|_, revoked| revoked.not_after.is_none_or(|end| end >= now));
    }

    /// What is revoked, as those who check it want it.
    pub(super) fn revocations(&self) -> Revocations {
        let reason = |since: &Since| since.reason;
        Revocations {
            serials: self
                .serials
                .iter()
                .map(|(serial, revoked)| (integer_hex(serial).into(), revoked.since.reason))
                .collect(),
            identities: self
                .identities
                .iter()
                .map(|(identity, since)| (identity.clone(), reason(since)))
                .collect(),
            nodes: self
                .nodes
                .iter()
                .map(|(node, since)| (node.clone(), reason(since)))
                .collect::<HashMap<_, _>>(),
        }
    }

    /// The document. There are keys in it.
    pub(super) fn to_json(&self) -> Vec<u8> {
        let since = |name: &dyn fmt::Display, since: &Since| {
            (name.to_string(), since.reason.to_string(), since.at)
        };
        let document = Document {
            format: FORMAT,
            trust_domain: self.trust_domain.to_string(),
            version: self.version,
            crl_number: self.crl_number,
            last_signer: self.last_signer,
            rotation: self.rotation,
            signers: self
                .signers
                .iter()
                .map(|(&number, signer)| StoredSigner {
                    number,
                    certificate: super::pem::certificate(&signer.certificate),
                    key: signer.key.clone(),
                })
                .collect(),
            revoked_serials: self
                .serials
                .iter()
                .map(|(serial, revoked)| {
                    (
                        hex(serial),
                        revoked.since.reason.to_string(),
                        revoked.since.at,
                        revoked.not_after,
                        revoked.signer,
                    )
                })
                .collect(),
            revoked_identities: self.identities.iter().map(|(i, s)| since(i, s)).collect(),
            revoked_nodes: self.nodes.iter().map(|(n, s)| since(n, s)).collect(),
        };
        // A document of strings and numbers always has a form in JSON.
        serde_json::to_vec(&document).unwrap_or_default()
    }

    /// Reads the document. Errors hold no part of a key.
    pub(super) fn from_json(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: u64,
        }
        // serde_json's messages name a line and a column, and of the content no more than numbers and field names.
        let head: Head = serde_json::from_slice(json)
            .map_err(|error| format!("is no state of this CA: {error}"))?;
        if head.format != FORMAT {
            return Err(format!(
                "is of format {}, but this version knows {FORMAT} only: run the version that wrote it, or a newer one",
                head.format
            ));
        }
        let document: Document = serde_json::from_slice(json).map_err(|error| {
            format!(
                "is damaged at line {} column {}",
                error.line(),
                error.column()
            )
        })?;
        document
            .read()
            .map_err(|what| format!("is damaged: {what}"))
    }
}

impl Stored {
    pub(super) fn root(root: NewRoot) -> Result<Self, String> {
        Ok(Self {
            certificate: CertificateDer::from_pem_slice(root.certificate_pem.as_bytes())
                .map_err(|error| format!("the root's certificate: {error}"))?,
            key: Some(root.key_pem),
        })
    }
}

/// A serial number in hexadecimal as a certificate has it: an INTEGER in DER, without zeros that are not needed.
pub(super) fn integer_hex(serial: &[u8; 16]) -> String {
    let zeros = serial.iter().take_while(|&&byte| byte == 0).count();
    let digits = &serial[zeros.min(15)..];
    match digits[0] & 0x80 {
        0 => hex(digits),
        _ => format!("00{}", hex(digits)),
    }
}

/// Serial number, reason, when, and of one that was issued here its end and its signer. There may be thousands: no names.
type StoredSerial = (String, String, u64, Option<u64>, Option<u32>);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    format: u64,
    trust_domain: String,
    version: u64,
    crl_number: u64,
    last_signer: u32,
    rotation: Rotation,
    signers: Vec<StoredSigner>,
    revoked_serials: Vec<StoredSerial>,
    /// Name, reason, when.
    revoked_identities: Vec<(String, String, u64)>,
    revoked_nodes: Vec<(String, String, u64)>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct StoredSigner {
    number: u32,
    certificate: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    key: Option<String>,
}

impl Document {
    fn read(self) -> Result<Core, String> {
        let since = |reason: &str, at| match reason.parse() {
            Ok(reason) => Ok(Since { reason, at }),
            Err(what) => Err(format!("reason {reason:?} {what}")),
        };
        let mut signers = BTreeMap::new();
        for signer in self.signers {
            let certificate = CertificateDer::from_pem_slice(signer.certificate.as_bytes())
                .map_err(|error| format!("certificate {}: {error}", signer.number))?;
            let key = signer.key;
            signers.insert(signer.number, Stored { certificate, key });
        }
        for number in self.rotation.believed() {
            if !signers.contains_key(&number) || number > self.last_signer {
                return Err(format!("there is no signer {number}"));
            }
        }
        let mut serials = BTreeMap::new();
        for (serial, reason, at, not_after, signer) in self.revoked_serials {
            let number = unhex(&serial).ok_or_else(|| format!("serial {serial:?}"))?;
            let since = since(&reason, at)?;
            serials.insert(
                number,
                RevokedSerial {
                    since,
                    not_after,
                    signer,
                },
            );
        }
        let mut identities = BTreeMap::new();
        for (name, reason, at) in self.revoked_identities {
            let identity = name
                .parse()
                .map_err(|error| format!("identity {name:?} {error}"))?;
            identities.insert(identity, since(&reason, at)?);
        }
        let mut nodes = BTreeMap::new();
        for (name, reason, at) in self.revoked_nodes {
            nodes.insert(name, since(&reason, at)?);
        }
        Ok(Core {
            trust_domain: self
                .trust_domain
                .parse()
                .map_err(|error| format!("{error}"))?,
            version: self.version,
            crl_number: self.crl_number,
            last_signer: self.last_signer,
            rotation: self.rotation,
            signers,
            serials,
            identities,
            nodes,
        })
    }
}

/// 32 hexadecimal digits.
fn unhex(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ca::authority::KeyAlgorithm;

    fn core() -> Core {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let root = signer::make_root(&domain, KeyAlgorithm::P256, 3600, 1_800_000_000).unwrap();
        Core::of_root(&domain, root).unwrap()
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let json = String::from_utf8(core().to_json()).unwrap();
        assert_eq!(
            Core::from_json(json.as_bytes()).unwrap().to_json(),
            json.as_bytes()
        );
        let refused = |json: String| Core::from_json(json.as_bytes()).unwrap_err();
        let newer = refused(json.replace("\"format\":1", "\"format\":2"));
        assert!(
            newer.contains("format 2") && newer.contains("newer"),
            "{newer}"
        );
        let unknown = refused(json.replace("\"version\"", "\"wersion\""));
        assert!(unknown.contains("damaged"), "{unknown}");
        let gone = refused(json.replace("\"signing\":1", "\"signing\":2"));
        assert!(gone.contains("no signer 2"), "{gone}");
        assert!(refused("{}".into()).contains("no state of this CA"));
        for cut in [1, json.len() / 2, json.len() - 1] {
            let error = Core::from_json(&json.as_bytes()[..cut]).unwrap_err();
            assert!(!error.contains("PRIVATE"), "{error}");
        }
        assert!(!format!("{:?}", core()).contains("PRIVATE"));
    }

    #[test]
    fn serials_are_written_as_integers() {
        let mut serial = [0; 16];
        assert_eq!(integer_hex(&serial), "00");
        serial[15] = 0x80;
        assert_eq!(integer_hex(&serial), "0080");
        serial[0] = 0x40;
        assert_eq!(integer_hex(&serial), "40000000000000000000000000000080");
    }

    proptest! {
        #[test]
        fn keeps_everything(
            serials in prop::collection::btree_map(any::<[u8; 16]>(), (0..8usize, any::<u64>(), any::<Option<u64>>(), any::<Option<u32>>()), 0..20),
            names in prop::collection::btree_map("[a-z]{1,20}", (0..8usize, any::<u64>()), 0..10),
            nodes in prop::collection::btree_map("\\PC{1,20}", (0..8usize, any::<u64>()), 0..10),
            version in any::<u64>(),
        ) {
            let mut core = core();
            let since = |reason: usize, at| Since { reason: Reason::ALL[reason], at };
            core.version = version;
            core.serials = serials.into_iter().map(|(serial, (reason, at, not_after, signer))| {
                (serial, RevokedSerial { since: since(reason, at), not_after, signer })
            }).collect();
            core.identities = names.into_iter().map(|(name, (reason, at))| {
                (core.trust_domain.identity("default", &name).unwrap(), since(reason, at))
            }).collect();
            core.nodes = nodes.into_iter().map(|(name, (reason, at))| (name, since(reason, at))).collect();
            let next = core.add_signer(core.signers[&1].clone());
            core.rotation = core.rotation.start(next, version, 5, u64::MAX).unwrap();
            prop_assert_eq!(&Core::from_json(&core.to_json()).unwrap(), &core);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Core::from_json(&bytes);
        }
    }
}
