//! What is to be done about a Secret with key and certificate. No I/O, no clock.

use std::{collections::BTreeMap, time::SystemTime};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use rcgen::{KeyPair, PublicKeyData};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{CHAIN, DISTRIBUTED_LABEL, KEY, ROOTS, SECRET_TYPE};
use crate::{ca::BACKDATE, mesh::Identity, tunnel::svid::Svid};

/// What a Secret needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Somebody else's: it stays as it is.
    Foreign,
    /// Nothing until then.
    Keep(SystemTime),
    /// The roots have changed.
    Roots,
    /// A new key and certificate.
    Issue(&'static str),
}

/// Whether `secret` was made by this program, and so may be changed or removed by it.
pub(super) fn is_ours(secret: &Secret) -> bool {
    let labels = secret.metadata.labels.as_ref();
    secret.type_.as_deref() == Some(SECRET_TYPE)
        && labels.is_some_and(|labels| labels.get(DISTRIBUTED_LABEL).is_some_and(|v| v == "true"))
}

/// What `secret`, which should be for `identity` and hold `roots`, needs at `now`. `good` says whether the CA has issued
/// a serial number and not revoked it.
pub(super) fn verdict(
    secret: &Secret,
    identity: &Identity,
    roots: &str,
    now: SystemTime,
    good: impl FnOnce(&[u8; 16]) -> bool,
) -> Verdict {
    if !is_ours(secret) {
        return Verdict::Foreign;
    }
    let empty = BTreeMap::new();
    let data = secret.data.as_ref().unwrap_or(&empty);
    let (Some(chain), Some(key)) = (data.get(CHAIN), data.get(KEY)) else {
        return Verdict::Issue("it is incomplete");
    };
    let Some((svid, serial)) = certificate(chain, key, identity) else {
        return Verdict::Issue("key and certificate are none of this service account");
    };
    if !good(&serial) {
        return Verdict::Issue("the certificate is revoked, or not of this CA");
    }
    let renew = renewal(&svid, &serial);
    if now >= renew {
        return Verdict::Issue("half of its life is over");
    }
    if data
        .get(ROOTS)
        .is_none_or(|held| held.0 != roots.as_bytes())
    {
        return Verdict::Roots;
    }
    Verdict::Keep(renew)
}

/// The leaf, if it is for `identity` and its key is the one beside it.
fn certificate(
    chain: &ByteString,
    key: &ByteString,
    identity: &Identity,
) -> Option<(Svid, [u8; 16])> {
    let leaf = CertificateDer::from_pem_slice(&chain.0).ok()?;
    let svid = Svid::parse(&leaf, identity.trust_domain()).ok()?;
    let (_, certificate) = X509Certificate::from_der(&leaf).ok()?;
    let key = KeyPair::from_pem(std::str::from_utf8(&key.0).ok()?).ok()?;
    let fits = certificate.public_key().raw == key.subject_public_key_info();
    // DER writes a zero in front where the number would else be negative.
    let serial = certificate.raw_serial();
    let serial = serial
        .strip_prefix(&[0])
        .filter(|rest| rest.len() == 16)
        .unwrap_or(serial);
    let serial = serial.try_into().ok()?;
    (fits && svid.identity == *identity).then_some((svid, serial))
}

/// At half-life, or up to a tenth of the life earlier: those that were made together are not renewed together.
fn renewal(svid: &Svid, serial: &[u8; 16]) -> SystemTime {
    let issued = svid.not_before + BACKDATE;
    let life = svid.not_after.duration_since(issued).unwrap_or_default();
    issued + life / 2 - life / 10 * u32::from(serial[15]) / 256
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kube::api::ObjectMeta;
    use rcgen::{CertificateParams, KeyUsagePurpose, SanType, SerialNumber};

    use super::*;
    use crate::ca::pem;

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
        params.not_before = (begin() - BACKDATE).into();
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
        verdict(
            secret,
            &identity,
            "roots",
            begin() + HOUR * hours,
            |serial| *serial == [0x51; 16],
        )
    }

    #[test]
    fn a_good_one_is_kept_until_about_half_life() {
        let secret = secret(|_| {});
        let Verdict::Keep(until) = judge(&secret, 0) else {
            panic!("{:?}", judge(&secret, 0));
        };
        let after = until.duration_since(begin()).unwrap();
        assert!(after > 9 * HOUR && after <= 12 * HOUR, "{after:?}");
        assert_eq!(
            judge(&secret, 12),
            Verdict::Issue("half of its life is over")
        );
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let unlabelled = secret(|secret| secret.metadata.labels = None);
        assert_eq!(judge(&unlabelled, 20), Verdict::Foreign);
        let opaque = secret(|secret| secret.type_ = Some("Opaque".into()));
        assert_eq!(judge(&opaque, 20), Verdict::Foreign);
    }

    #[test]
    fn what_is_damaged_or_revoked_is_made_anew() {
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
