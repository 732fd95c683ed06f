//! What a Secret with key and certificate needs. No I/O, no clock.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use auth_mesh::Identity;
use auth_tunnel::tls::svid::Svid;
use k8s_openapi::{ByteString, api::core::v1::Secret};
use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use crate::signer::BACKDATE;

/// On Secrets that this controller created, with value `true`: it changes and removes no others.
pub(super) const DISTRIBUTED_LABEL: &str = "auth-daemon.io/ca-secret";
/// Istio's type.
pub(super) const SECRET_TYPE: &str = "istio.io/key-and-cert";
/// The certificate and its intermediates.
pub(super) const CHAIN: &str = "cert-chain.pem";
/// The private key.
pub(super) const KEY: &str = "key.pem";
/// The trusted roots.
pub(super) const ROOTS: &str = "root-cert.pem";

/// What a Secret needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not created by this controller: it is not changed.
    Foreign,
    /// Nothing until this time.
    Keep(SystemTime),
    /// New roots.
    Roots,
    /// A new key and certificate.
    Issue(&'static str),
}

/// Whether this controller created `secret`, and so may change or remove it.
pub(super) fn is_ours(secret: &Secret) -> bool {
    let labels = secret.metadata.labels.as_ref();
    secret.type_.as_deref() == Some(SECRET_TYPE)
        && labels.is_some_and(|labels| labels.get(DISTRIBUTED_LABEL).is_some_and(|v| v == "true"))
}

/// What `secret` needs at `now` to hold a certificate of `identity`, and `roots`. `valid` says whether the CA issued a
/// certificate (DER) and has not revoked it.
pub(super) fn verdict(
    secret: &Secret,
    identity: &Identity,
    roots: &str,
    now: SystemTime,
    valid: impl FnOnce(&CertificateDer<'_>) -> bool,
) -> Verdict {
    if !is_ours(secret) {
        return Verdict::Foreign;
    }
    let empty = BTreeMap::new();
    let data = secret.data.as_ref().unwrap_or(&empty);
    let (Some(chain), Some(key)) = (data.get(CHAIN), data.get(KEY)) else {
        return Verdict::Issue("it is incomplete");
    };
    let Some((svid, leaf)) = certificate(chain, key, identity) else {
        return Verdict::Issue("key and certificate do not belong to this service account");
    };
    if !valid(&leaf) {
        return Verdict::Issue("the certificate is revoked, expired, or not of this CA");
    }
    let renew = renewal(&svid);
    if now >= renew {
        return Verdict::Issue("half of its life has passed");
    }
    if data
        .get(ROOTS)
        .is_none_or(|held| held.0 != roots.as_bytes())
    {
        return Verdict::Roots;
    }
    Verdict::Keep(renew)
}

/// The leaf, if it is for `identity` and the key belongs to it.
fn certificate(
    chain: &ByteString,
    key: &ByteString,
    identity: &Identity,
) -> Option<(Svid, CertificateDer<'static>)> {
    let leaf = CertificateDer::from_pem_slice(&chain.0).ok()?;
    let svid = Svid::parse(&leaf, &identity.trust_domain().parse().ok()?).ok()?;
    let spki = X509Certificate::from_der(&leaf)
        .ok()?
        .1
        .public_key()
        .raw
        .to_vec();
    let key = KeyPair::from_pem(std::str::from_utf8(&key.0).ok()?).ok()?;
    let fits = spki == key.subject_public_key_info();
    (fits && svid.identity == *identity).then_some((svid, leaf))
}

/// At half of the life, or up to a tenth of the life earlier, so that not all are renewed together.
fn renewal(svid: &Svid) -> SystemTime {
    let issued = svid.not_before + Duration::from_secs(BACKDATE);
    let life = svid.not_after.duration_since(issued).unwrap_or_default();
    issued + life / 2 - life / 10 * spread(&svid.serial) / 256
}

/// A number below 256 that differs between certificates.
fn spread(serial: &str) -> u32 {
    let digits = serial.len().saturating_sub(2);
    u32::from_str_radix(&serial[digits..], 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use auth_ca_api::pem;
    use kube::api::ObjectMeta;
    use rcgen::{CertificateParams, KeyUsagePurpose, SanType, SerialNumber};

    use super::*;

    const WEB: &str = "spiffe://cluster.local/ns/default/sa/web";
    const HOUR: Duration = Duration::from_secs(3600);

    fn begin() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000)
    }

    fn secret(change: impl FnOnce(&mut Secret)) -> Secret {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(WEB.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.not_before = (begin() - Duration::from_secs(BACKDATE)).into();
        params.not_after = (begin() + 24 * HOUR).into();
        params.serial_number = Some(SerialNumber::from_slice(&[0x51; 16]));
        let leaf = params.self_signed(&key).unwrap();
        let data = [
            (CHAIN, pem::certificate(leaf.der())),
            (KEY, key.serialize_pem()),
            (ROOTS, "roots".to_owned()),
        ];
        let mut secret = Secret {
            type_: Some(SECRET_TYPE.into()),
            metadata: ObjectMeta {
                labels: Some([(DISTRIBUTED_LABEL.to_owned(), "true".to_owned())].into()),
                ..ObjectMeta::default()
            },
            data: Some(
                data.map(|(key, value)| (key.to_owned(), ByteString(value.into_bytes())))
                    .into(),
            ),
            ..Secret::default()
        };
        change(&mut secret);
        secret
    }

    fn judge(secret: &Secret, hours: u32) -> Verdict {
        let identity = WEB.parse().unwrap();
        verdict(secret, &identity, "roots", begin() + HOUR * hours, |_| true)
    }

    #[test]
    fn keeps_a_good_secret_until_about_half_of_its_life() {
        let secret = secret(|_| {});
        let Verdict::Keep(until) = judge(&secret, 0) else {
            panic!("{:?}", judge(&secret, 0));
        };
        let after = until.duration_since(begin()).unwrap();
        assert!(after > 9 * HOUR && after <= 12 * HOUR, "{after:?}");
        assert_eq!(
            judge(&secret, 12),
            Verdict::Issue("half of its life has passed")
        );
    }

    #[test]
    fn leaves_secrets_of_others_alone() {
        let unlabelled = secret(|secret| secret.metadata.labels = None);
        assert_eq!(judge(&unlabelled, 20), Verdict::Foreign);
        let opaque = secret(|secret| secret.type_ = Some("Opaque".into()));
        assert_eq!(judge(&opaque, 20), Verdict::Foreign);
    }

    #[test]
    fn replaces_damaged_and_revoked_certificates() {
        let data = |secret: &mut Secret, key: &str, value: &[u8]| {
            let bytes = ByteString(value.to_vec());
            secret
                .data
                .get_or_insert_default()
                .insert(key.into(), bytes);
        };
        let other_key = KeyPair::generate().unwrap().serialize_pem();
        for broken in [
            secret(|s| s.data = None),
            secret(|s| data(s, CHAIN, b"rubbish")),
            secret(|s| data(s, KEY, b"rubbish")),
            secret(|s| data(s, KEY, other_key.as_bytes())),
        ] {
            assert!(matches!(judge(&broken, 0), Verdict::Issue(_)));
        }
        let good = secret(|_| {});
        let identity = WEB.parse().unwrap();
        let revoked = verdict(&good, &identity, "roots", begin(), |_| false);
        assert!(matches!(revoked, Verdict::Issue(why) if why.contains("revoked")));
        let api = "spiffe://cluster.local/ns/default/sa/api".parse().unwrap();
        assert!(matches!(
            verdict(&good, &api, "roots", begin(), |_| true),
            Verdict::Issue(_)
        ));
        assert_eq!(
            verdict(&good, &identity, "new", begin(), |_| true),
            Verdict::Roots
        );
    }
}
