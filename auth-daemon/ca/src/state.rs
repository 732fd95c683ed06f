//! The CA's state: its keys, the phase of a rotation, and what is revoked. Pure, and one JSON document, which the
//! [`Store`](crate::store::Store) replaces as a whole.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    str::FromStr,
};

use auth_ca_api::pem;
use auth_mesh::{Identity, TrustDomain};
use auth_tunnel::tls::trust::{Reason, Revocations};
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    config::MAX_LIFETIME,
    join::Joins,
    rotation::{CLOCK_SKEW, Rotation},
    signer::{self, SignError, Signer},
};

/// Version of the document. The CA refuses newer ones, because it would lose what it does not know.
const FORMAT: u64 = 3;
/// The same document without keys for JWT-SVIDs.
const WITHOUT_JWT_KEYS: u64 = 2;

/// The CA's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct CaState {
    format: u64,
    #[serde(with = "text")]
    pub(crate) trust_domain: TrustDomain,
    /// Version of what is published. Grows with each change.
    pub(crate) version: u64,
    /// Number of the revocation lists signed last (RFC 5280 §5.2.3).
    pub(crate) crl_number: u64,
    /// The highest number that a signer ever had.
    last_signer: u32,
    pub(crate) rotation: Rotation,
    pub(crate) signers: BTreeMap<u32, StoredSigner>,
    pub(crate) revoked: Revoked,
    /// Left out while it is empty. Earlier versions did not have it.
    #[serde(default, skip_serializing_if = "Joins::is_empty")]
    pub(crate) joins: Joins,
}

/// A signing certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct StoredSigner {
    #[serde(with = "certificate_pem")]
    pub(crate) certificate: CertificateDer<'static>,
    /// PKCS #8, PEM. An intermediate's key is not stored here.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) key: Option<String>,
    /// The key that signs JWT-SVIDs while this signer signs certificates, so that both rotate together: P-256, PKCS #8, PEM.
    /// Missing in documents of earlier versions, and where an operator removed it, so that the CA makes a new one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(crate) jwt_key: Option<String>,
    /// Longest lifetime, in seconds, of the certificates that it may have signed.
    pub(crate) max_lifetime: u64,
}

/// Everything that is revoked, with the time of the revocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Revoked {
    /// Certificates.
    pub(crate) serials: BTreeMap<Text<Serial>, Revocation>,
    /// Identities: every certificate issued to them before, and none is issued until the revocation is withdrawn.
    pub(crate) identities: BTreeMap<Text<Identity>, Revocation>,
    /// Nodes by name, likewise.
    pub(crate) nodes: BTreeMap<String, Revocation>,
}

/// Why and when something was revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Revocation {
    #[serde(with = "text")]
    pub(crate) reason: Reason,
    /// Seconds since the Unix epoch.
    pub(crate) at: u64,
}

impl CaState {
    /// The state of a CA that takes over the embedded CA's root: key and certificate in one PEM file.
    pub(crate) fn with_embedded_root(pem: &str) -> Result<Self, String> {
        let (trust_domain, root) = signer::read_root(pem)?;
        // The embedded CA may have signed for as long as any CA does.
        let signer = StoredSigner::root(&root, MAX_LIFETIME.as_secs());
        Ok(Self::new(&trust_domain, signer))
    }

    /// A new CA with this signer.
    pub(crate) fn new(trust_domain: &TrustDomain, signer: StoredSigner) -> Self {
        Self {
            format: FORMAT,
            trust_domain: trust_domain.clone(),
            version: 0,
            crl_number: 0,
            last_signer: 1,
            rotation: Rotation::steady(1),
            signers: BTreeMap::from([(1, signer)]),
            revoked: Revoked::default(),
            joins: Joins::default(),
        }
    }

    /// Adds `signer` under the next number.
    pub(crate) fn add_signer(&mut self, signer: StoredSigner) -> u32 {
        self.last_signer += 1;
        self.signers.insert(self.last_signer, signer);
        self.last_signer
    }

    /// Makes the keys for JWT-SVIDs that are missing.
    pub(crate) fn make_jwt_keys(&mut self) -> Result<(), SignError> {
        for signer in self.signers.values_mut() {
            if signer.jwt_key.is_none() {
                signer.jwt_key = Some(KeyPair::generate()?.serialize_pem());
            }
        }
        Ok(())
    }

    /// Continues with `rotation`, and deletes keys that are no longer trusted.
    pub(crate) fn rotate(&mut self, rotation: Rotation) {
        self.rotation = rotation;
        self.signers
            .retain(|number, _| rotation.trusted().any(|trusted| trusted == *number));
    }

    /// The longest lifetime, in seconds, of what the signing root may have signed.
    pub(crate) fn longest_lifetime(&self) -> u64 {
        let signer = self.signers.get(&self.rotation.signing);
        signer.map_or(MAX_LIFETIME.as_secs(), |signer| signer.max_lifetime)
    }

    /// Counts a change at `now`, and removes revoked serial numbers from the list (RFC 5280 §3.3) once every
    /// certificate issued before the revocation has expired. An intermediate's key may have signed certificates of any
    /// lifetime elsewhere, so with one they stay.
    pub(crate) fn changed(&mut self, now: u64) {
        self.version = self.version.saturating_add(1);
        self.crl_number = self.crl_number.saturating_add(1);
        if self.signers.values().all(|signer| signer.key.is_some()) {
            let serials = &mut self.revoked.serials;
            serials.retain(|_, revoked| revoked.certificates_expire() >= now);
        }
    }

    /// What is revoked, as verifiers use it.
    pub(crate) fn revocations(&self) -> Revocations {
        let Revoked {
            serials,
            identities,
            nodes,
        } = &self.revoked;
        Revocations {
            serials: serials
                .iter()
                .map(|(serial, revoked)| (serial.0.der_hex().into(), revoked.reason))
                .collect(),
            identities: identities
                .iter()
                .map(|(identity, revoked)| (identity.0.clone(), revoked.reason))
                .collect(),
            nodes: nodes
                .iter()
                .map(|(node, revoked)| (node.clone(), revoked.reason))
                .collect(),
        }
    }

    /// The document. It contains keys.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        // A document of strings and numbers always has a form in JSON.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a document of this format or of an earlier one, at `now`. Errors contain no part of a key.
    pub(crate) fn from_json(json: &[u8], now: u64) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Head {
            format: u64,
        }
        // serde_json's own messages may quote a value: only the position is reported.
        let at = |error: serde_json::Error| {
            format!("at line {} column {}", error.line(), error.column())
        };
        let head: Head = serde_json::from_slice(json)
            .map_err(|error| format!("is not the state of this CA ({})", at(error)))?;
        let damaged = |what: String| format!("is damaged: {what}");
        let state = match head.format {
            FORMAT | WITHOUT_JWT_KEYS => Self {
                format: FORMAT,
                ..serde_json::from_slice(json).map_err(|error| damaged(at(error)))?
            },
            1 => {
                let old: format1::State =
                    serde_json::from_slice(json).map_err(|error| damaged(at(error)))?;
                old.migrate(now)?
            }
            other => {
                return Err(format!(
                    "has format {other}, but this version reads formats 1 to {FORMAT}: run the version that wrote it, or \
                     a newer one"
                ));
            }
        };
        for number in state.rotation.trusted() {
            if !state.signers.contains_key(&number) || number > state.last_signer {
                return Err(damaged(format!("there is no signer {number}")));
            }
        }
        Ok(state)
    }
}

impl StoredSigner {
    /// A root of the CA's own. `max_lifetime` is that of its certificates, in seconds.
    pub(crate) fn root(root: &Signer, max_lifetime: u64) -> Self {
        Self {
            key: Some(root.key_pem()),
            ..Self::intermediate(root, max_lifetime)
        }
    }

    /// An intermediate, whose key stays where it is.
    pub(crate) fn intermediate(signer: &Signer, max_lifetime: u64) -> Self {
        Self {
            certificate: signer.certificate().clone(),
            key: None,
            jwt_key: None,
            max_lifetime,
        }
    }
}

impl fmt::Debug for StoredSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredSigner")
            .field("has_key", &self.key.is_some())
            .finish_non_exhaustive()
    }
}

impl Revocation {
    /// When the last certificate issued before the revocation has expired.
    fn certificates_expire(self) -> u64 {
        self.at
            .saturating_add(MAX_LIFETIME.as_secs())
            .saturating_add(CLOCK_SKEW)
    }
}

/// A certificate's serial number, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serial(pub [u8; 16]);

impl Serial {
    /// As a certificate encodes it, in hexadecimal: a DER INTEGER without unneeded zeros.
    pub(crate) fn der_hex(self) -> String {
        let zeros = self.0.iter().take_while(|&&byte| byte == 0).count();
        let digits = &self.0[zeros.min(15)..];
        match digits[0] & 0x80 {
            0 => signer::hex(digits),
            _ => format!("00{}", signer::hex(digits)),
        }
    }
}

impl Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&signer::hex(&self.0))
    }
}

impl FromStr for Serial {
    type Err = &'static str;

    /// Accepts what people copy: colons, any case, with or without leading zeros.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = "is not a serial number in hexadecimal";
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        if !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(invalid);
        }
        let number = u128::from_str_radix(&digits, 16).map_err(|_| invalid)?;
        Ok(Self(number.to_be_bytes()))
    }
}

/// A value that the document holds as text.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Text<T>(pub(crate) T);

impl<T: Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        text::serialize(&self.0, serializer)
    }
}

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        text::deserialize(deserializer).map(Self)
    }
}

mod text {
    use super::*;

    pub(super) fn serialize<T: Display, S: Serializer>(
        value: &T,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr<Err: Display>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<T, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

mod certificate_pem {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        certificate: &CertificateDer<'static>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&pem::certificate(certificate))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<CertificateDer<'static>, D::Error> {
        let text = String::deserialize(deserializer)?;
        CertificateDer::from_pem_slice(text.as_bytes()).map_err(D::Error::custom)
    }
}

/// The document of earlier versions, which kept a record of every issued certificate beside it.
mod format1 {
    use super::*;

    /// Serial number, reason, time of the revocation, and two fields of the record.
    type Serial1 = (Text<Serial>, Text<Reason>, u64, Option<u64>, Option<u32>);

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub(super) struct State {
        #[serde(with = "text")]
        trust_domain: TrustDomain,
        version: u64,
        crl_number: u64,
        last_signer: u32,
        rotation: Rotation,
        signers: Vec<StoredSigner1>,
        revoked_serials: Vec<Serial1>,
        revoked_identities: Vec<(Text<Identity>, Text<Reason>, u64)>,
        revoked_nodes: Vec<(String, Text<Reason>, u64)>,
    }

    #[derive(Deserialize)]
    struct StoredSigner1 {
        number: u32,
        #[serde(with = "certificate_pem")]
        certificate: CertificateDer<'static>,
        #[serde(default)]
        key: Option<String>,
    }

    impl State {
        /// Takes the state over. Certificates of earlier versions do not name their node: with a revoked node, the
        /// migration is refused until they have expired, because nothing here would keep them revoked.
        pub(super) fn migrate(self, now: u64) -> Result<CaState, String> {
            let revocation = |reason: Text<Reason>, at| Revocation {
                reason: reason.0,
                at,
            };
            let mut revoked = Revoked::default();
            for (node, reason, at) in self.revoked_nodes {
                let revocation = revocation(reason, at);
                let wait = revocation.certificates_expire().saturating_sub(now);
                if wait > 0 {
                    return Err(format!(
                        "is of an earlier version, and node {node} was revoked less than a day ago: this version \
                         cannot tell which certificates that node got. Run the earlier version for {wait} s more; \
                         then they have expired"
                    ));
                }
                revoked.nodes.insert(node, revocation);
            }
            for (serial, reason, at, ..) in self.revoked_serials {
                revoked.serials.insert(serial, revocation(reason, at));
            }
            for (identity, reason, at) in self.revoked_identities {
                revoked.identities.insert(identity, revocation(reason, at));
            }
            let signers = self.signers.into_iter().map(|signer| {
                let stored = StoredSigner {
                    certificate: signer.certificate,
                    key: signer.key,
                    jwt_key: None,
                    max_lifetime: MAX_LIFETIME.as_secs(),
                };
                (signer.number, stored)
            });
            Ok(CaState {
                format: FORMAT,
                trust_domain: self.trust_domain,
                version: self.version,
                crl_number: self.crl_number,
                last_signer: self.last_signer,
                rotation: self.rotation,
                signers: signers.collect(),
                revoked,
                joins: Joins::default(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::RootSettings;

    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 24 * 60 * 60;

    fn state() -> CaState {
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let root = signer::make_root(&domain, &RootSettings::default(), NOW).unwrap();
        let mut state = CaState::new(&domain, StoredSigner::root(&root, DAY));
        state.make_jwt_keys().unwrap();
        state
    }

    fn read(json: &[u8]) -> Result<CaState, String> {
        CaState::from_json(json, NOW)
    }

    #[test]
    fn refuses_unknown_formats_and_damage() {
        let json = String::from_utf8(state().to_json()).unwrap();
        assert_eq!(read(json.as_bytes()).unwrap().to_json(), json.as_bytes());
        let refused = |json: String| read(json.as_bytes()).unwrap_err();
        let newer = refused(json.replace("\"format\":3", "\"format\":4"));
        assert!(newer.contains("format 4") && newer.contains("newer"));
        let unknown = refused(json.replace("\"version\"", "\"wersion\""));
        assert!(unknown.contains("damaged"), "{unknown}");
        let gone = refused(json.replace("\"signing\":1", "\"signing\":2"));
        assert!(gone.contains("no signer 2"), "{gone}");
        assert!(refused("{}".into()).contains("is not the state of this CA"));
        for cut in [1, json.len() / 2, json.len() - 1] {
            let error = read(&json.as_bytes()[..cut]).unwrap_err();
            assert!(!error.contains("PRIVATE"), "{error}");
        }
        assert!(!format!("{:?}", state()).contains("PRIVATE"));
    }

    #[test]
    fn encodes_serials_as_der_integers() {
        let mut serial = [0; 16];
        assert_eq!(Serial(serial).der_hex(), "00");
        serial[15] = 0x80;
        assert_eq!(Serial(serial).der_hex(), "0080");
        serial[0] = 0x40;
        let hex = "40000000000000000000000000000080";
        assert_eq!(Serial(serial).der_hex(), hex);
        for text in [
            hex,
            &hex.to_uppercase(),
            "40:000000000000000000000000000080",
        ] {
            assert_eq!(text.parse(), Ok(Serial(serial)), "{text}");
        }
        for bad in ["", "+1", "xyz", &"1".repeat(33)] {
            assert!(bad.parse::<Serial>().is_err(), "{bad}");
        }
    }

    #[test]
    fn forgets_serials_when_what_was_issued_before_has_expired() {
        let mut state = state();
        let revocation = Revocation {
            reason: Reason::Superseded,
            at: NOW,
        };
        let serial = Text(Serial([0x41; 16]));
        state.revoked.serials.insert(serial, revocation);
        state.revoked.nodes.insert("a".into(), revocation);
        state.changed(NOW + DAY + CLOCK_SKEW);
        assert_eq!(state.revoked.serials.len(), 1);
        state.changed(NOW + DAY + CLOCK_SKEW + 1);
        assert!(state.revoked.serials.is_empty());
        assert_eq!(state.revoked.nodes.len(), 1, "stays until it is withdrawn");
    }

    /// The same state as a version before this one wrote it.
    fn format1(nodes: Value) -> Vec<u8> {
        let state = state();
        let signer = &state.signers[&1];
        let document = json!({
            "format": 1, "trustDomain": "cluster.local", "version": 7, "crlNumber": 8, "lastSigner": 1,
            "rotation": {"signing": 1, "phase": "steady"},
            "signers": [{"number": 1, "certificate": pem::certificate(&signer.certificate), "key": signer.key}],
            "revokedSerials": [["41".repeat(16), "superseded", NOW - 5, NOW + 60, 1]],
            "revokedIdentities": [["spiffe://cluster.local/ns/a/sa/b", "keyCompromise", NOW - 5]],
            "revokedNodes": nodes,
        });
        serde_json::to_vec(&document).unwrap()
    }

    #[test]
    fn reads_format_2_which_has_no_keys_for_jwts() {
        let mut old: Value = serde_json::from_slice(&state().to_json()).unwrap();
        old["format"] = 2.into();
        let signer = old["signers"]["1"].as_object_mut().unwrap();
        assert!(signer.remove("jwtKey").is_some());
        let mut state = read(old.to_string().as_bytes()).unwrap();
        assert!(state.signers[&1].jwt_key.is_none());
        state.make_jwt_keys().unwrap();
        assert!(state.signers[&1].jwt_key.is_some());
        assert_eq!(read(&state.to_json()), Ok(state), "written as format 3");
    }

    #[test]
    fn migrates_format_1() {
        let mut state = read(&format1(json!([["a", "unspecified", NOW - 2 * DAY]]))).unwrap();
        state.make_jwt_keys().unwrap();
        assert_eq!((state.version, state.crl_number), (7, 8));
        assert_eq!(state.longest_lifetime(), DAY);
        let revoked = state.revocations();
        assert_eq!(revoked.serials[&*"41".repeat(16)], Reason::Superseded);
        assert_eq!((revoked.identities.len(), revoked.nodes.len()), (1, 1));
        assert_eq!(read(&state.to_json()), Ok(state), "written as format 2");
    }

    #[test]
    fn refuses_format_1_while_a_revoked_node_may_hold_certificates() {
        let error = read(&format1(json!([["a", "unspecified", NOW - 100]]))).unwrap_err();
        assert!(
            error.contains("node a") && error.contains("86305 s"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn is_read_back_as_written(
            serials in prop::collection::btree_map(any::<[u8; 16]>(), (0..8usize, any::<u64>()), 0..20),
            names in prop::collection::btree_map("[a-z]{1,20}", (0..8usize, any::<u64>()), 0..10),
            nodes in prop::collection::btree_map("\\PC{1,20}", (0..8usize, any::<u64>()), 0..10),
            version in any::<u64>(),
        ) {
            let mut state = state();
            let revocation = |(reason, at)| Revocation { reason: Reason::ALL[reason], at };
            state.version = version;
            state.revoked = Revoked {
                serials: serials.into_iter().map(|(s, r)| (Text(Serial(s)), revocation(r))).collect(),
                identities: names.into_iter().map(|(name, r)| {
                    (Text(state.trust_domain.identity("default", &name).unwrap()), revocation(r))
                }).collect(),
                nodes: nodes.into_iter().map(|(name, r)| (name, revocation(r))).collect(),
            };
            let next = state.add_signer(state.signers[&1].clone());
            state.rotation = state.rotation.start(next, version, 5, u64::MAX).unwrap();
            prop_assert_eq!(&read(&state.to_json()).unwrap(), &state);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }
}
