//! Certificate signing requests (PKCS #10, RFC 2986): a key, and the proof that the sender holds it. Everything else in
//! one is the sender's wish, and is not even parsed.

use rcgen::{PublicKeyData, SignatureAlgorithm, SubjectPublicKeyInfo};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject};
use x509_parser::{
    asn1_rs::{BitString, Oid, oid},
    prelude::FromDer as _,
    verify::verify_signature,
    x509,
};

use super::der::{self, BIT_STRING, INTEGER, SEQUENCE};

/// Longest request that is looked at, in bytes of DER.
const MAX_BYTES: usize = 64 * 1024;
/// The same as PEM: a third more, and room for lines and labels.
const MAX_PEM_BYTES: usize = 96 * 1024;
/// Sizes of RSA keys that are signed, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;

const EC_PUBLIC_KEY: Oid<'static> = oid!(1.2.840.10045.2.1);
const RSA_ENCRYPTION: Oid<'static> = oid!(1.2.840.113549.1.1.1);
const RSA_PSS: Oid<'static> = oid!(1.2.840.113549.1.1.10);
const DSA: Oid<'static> = oid!(1.2.840.10040.4.1);
const ED25519: Oid<'static> = oid!(1.3.101.112);
const ED448: Oid<'static> = oid!(1.3.101.113);
const P256: Oid<'static> = oid!(1.2.840.10045.3.1.7);
const P384: Oid<'static> = oid!(1.3.132.0.34);
const OTHER_CURVES: [(Oid<'static>, &str); 5] = [
    (oid!(1.2.840.10045.3.1.1), "P-192"),
    (oid!(1.3.132.0.33), "P-224"),
    (oid!(1.3.132.0.35), "P-521"),
    (oid!(1.3.132.0.10), "secp256k1"),
    (oid!(1.3.36.3.3.2.8.1.1.7), "brainpoolP256r1"),
];
const SHA1_SIGNATURES: [Oid<'static>; 3] = [
    oid!(1.2.840.113549.1.1.5),
    oid!(1.3.14.3.2.29),
    oid!(1.2.840.10045.4.1),
];

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    /// More than is looked at.
    #[error("the CSR is {0} bytes long; at most {1} are read")]
    TooLong(usize, usize),
    /// Not one PEM block of the right label.
    #[error("the CSR is not one PEM block of type CERTIFICATE REQUEST")]
    Pem,
    /// Not DER, or not of RFC 2986's form.
    #[error("the CSR cannot be parsed: {0}")]
    Malformed(&'static str),
    /// A kind of key, or a size, that is not signed here.
    #[error("the CSR's key is {0}; P-256, P-384, Ed25519 and RSA of 2048 to 4096 bits are signed")]
    Key(String),
    /// The signature is not by the key in it.
    #[error("the CSR is not signed by the key in it, or with an algorithm that is not read here")]
    Signature,
}

/// The public key of a request whose signature holds.
#[derive(Clone, Debug)]
pub struct RequestedKey(SubjectPublicKeyInfo);

impl RequestedKey {
    /// Takes the key out of `csr` (DER), once it is known to be the sender's and of a kind that is signed.
    pub fn from_csr(csr: &[u8]) -> Result<Self, InvalidCsr> {
        if csr.len() > MAX_BYTES {
            return Err(InvalidCsr::TooLong(csr.len(), MAX_BYTES));
        }
        // CertificationRequest ::= SEQUENCE { info, signatureAlgorithm, signature } (RFC 2986 §4.2)
        let malformed = InvalidCsr::Malformed;
        let request = der::only(SEQUENCE, csr).ok_or(malformed("it is not one DER sequence"))?;
        let mut rest = request.content;
        let parts = (|| {
            let info = der::take_tag(SEQUENCE, &mut rest)?;
            let algorithm = der::take_tag(SEQUENCE, &mut rest)?;
            let signature = der::take_tag(BIT_STRING, &mut rest)?;
            // CertificationRequestInfo ::= SEQUENCE { version, subject, subjectPKInfo, attributes } (§4.1)
            let mut fields = info.content;
            der::take_tag(INTEGER, &mut fields).filter(|version| version.content == [0])?;
            der::take_tag(SEQUENCE, &mut fields)?;
            let key = der::take_tag(SEQUENCE, &mut fields)?;
            rest.is_empty().then_some((info, algorithm, signature, key))
        })();
        let (info, algorithm, signature, key) =
            parts.ok_or(malformed("it is no certification request"))?;

        let (_, key) = x509::SubjectPublicKeyInfo::from_der(key.whole)
            .map_err(|_| malformed("its public key"))?;
        check_key(&key)?;
        let (_, algorithm) = x509::AlgorithmIdentifier::from_der(algorithm.whole)
            .map_err(|_| malformed("its signature algorithm"))?;
        let (_, signature) =
            BitString::from_der(signature.whole).map_err(|_| malformed("its signature"))?;
        if SHA1_SIGNATURES.contains(&algorithm.algorithm) || signature.unused_bits != 0 {
            return Err(InvalidCsr::Signature);
        }
        verify_signature(&key, &algorithm, &signature, info.whole)
            .map_err(|_| InvalidCsr::Signature)?;
        SubjectPublicKeyInfo::from_der(key.raw)
            .map(Self)
            .map_err(|_| malformed("the parameters of its public key"))
    }

    /// The SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.0.algorithm()
    }
}

/// The DER in `pem`: exactly one block, of type `CERTIFICATE REQUEST` or, as older tools say, `NEW CERTIFICATE REQUEST`.
pub fn from_pem(pem: &str) -> Result<Vec<u8>, InvalidCsr> {
    if pem.len() > MAX_PEM_BYTES {
        return Err(InvalidCsr::TooLong(pem.len(), MAX_PEM_BYTES));
    }
    if pem.matches("-----BEGIN ").count() != 1 {
        return Err(InvalidCsr::Pem);
    }
    let renamed;
    let pem = if pem.contains("-----BEGIN NEW CERTIFICATE REQUEST-----") {
        renamed = pem.replace(" NEW CERTIFICATE REQUEST-----", " CERTIFICATE REQUEST-----");
        &renamed
    } else {
        pem
    };
    CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map(|der| der.as_ref().to_vec())
        .map_err(|_| InvalidCsr::Pem)
}

/// Refuses keys that are weak, or of kinds that the mesh's TLS does not speak.
fn check_key(key: &x509::SubjectPublicKeyInfo<'_>) -> Result<(), InvalidCsr> {
    let bytes = &key.subject_public_key.data;
    let refused = |what: String| Err(InvalidCsr::Key(what));
    let algorithm = &key.algorithm.algorithm;
    if key.subject_public_key.unused_bits != 0 {
        return Err(InvalidCsr::Malformed("its public key"));
    }
    if *algorithm == EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref();
        let Some(curve) = curve.and_then(|curve| curve.as_oid().ok()) else {
            return refused("on an elliptic curve without a name".into());
        };
        let length = match &curve {
            curve if *curve == P256 => 65,
            curve if *curve == P384 => 97,
            curve => {
                let named = OTHER_CURVES.into_iter().find(|(oid, _)| oid == curve);
                return refused(match named {
                    Some((_, name)) => format!("on the curve {name}"),
                    None => format!("on the curve {curve}"),
                });
            }
        };
        // Uncompressed (SEC 1 §2.3.3). Whether the point is on the curve, the signature's check finds out.
        if bytes.len() != length || bytes[0] != 4 {
            return Err(InvalidCsr::Malformed("the point of its public key"));
        }
        Ok(())
    } else if *algorithm == ED25519 {
        match bytes.len() {
            32 => Ok(()),
            _ => Err(InvalidCsr::Malformed("its public key")),
        }
    } else if *algorithm == RSA_ENCRYPTION {
        check_rsa(bytes)
    } else if *algorithm == RSA_PSS {
        refused("an RSA key for PSS alone".into())
    } else if *algorithm == DSA {
        refused("a DSA key".into())
    } else if *algorithm == ED448 {
        refused("an Ed448 key".into())
    } else {
        refused(format!("of the kind {algorithm}"))
    }
}

/// RSAPublicKey ::= SEQUENCE { modulus INTEGER, publicExponent INTEGER } (RFC 8017 §A.1.1)
fn check_rsa(key: &[u8]) -> Result<(), InvalidCsr> {
    let numbers = (|| {
        let mut fields = der::only(SEQUENCE, key)?.content;
        let modulus = unsigned(der::take_tag(INTEGER, &mut fields)?.content)?;
        let exponent = unsigned(der::take_tag(INTEGER, &mut fields)?.content)?;
        fields.is_empty().then_some((modulus, exponent))
    })();
    let (modulus, exponent) = numbers.ok_or(InvalidCsr::Malformed("its RSA key"))?;
    let bits = modulus.len() * 8 - modulus[0].leading_zeros() as usize;
    if !RSA_BITS.contains(&bits) {
        return Err(InvalidCsr::Key(format!("RSA of {bits} bits")));
    }
    let odd = exponent.last().is_some_and(|last| last & 1 == 1);
    if !odd || *exponent == [1] {
        return Err(InvalidCsr::Key(
            "RSA with an exponent that is even or 1".into(),
        ));
    }
    Ok(())
}

/// A positive INTEGER's digits to the base of 256, without a leading zero.
fn unsigned(content: &[u8]) -> Option<&[u8]> {
    match content {
        [0, digits @ ..] if digits.first()? & 0x80 != 0 => Some(digits),
        [1..0x80, ..] => Some(content),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair,
        PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519,
        PKCS_RSA_SHA256,
    };

    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        let params = CertificateParams::default();
        params.serialize_request(key).unwrap().der().to_vec()
    }

    /// A request as OpenSSL makes it, for kinds of keys that nothing else makes any more.
    fn openssl(new_key: &[&str]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        let made = Command::new("openssl")
            .arg(new_key[0])
            .arg("-out")
            .arg(&file)
            .args(&new_key[1..])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let request = Command::new("openssl")
            .args(["req", "-new", "-subj", "/CN=x", "-outform", "DER", "-key"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(request.status.success(), "{request:?}");
        request.stdout
    }

    #[test]
    fn takes_the_keys_that_tls_speaks() {
        for algorithm in [
            &PKCS_ECDSA_P256_SHA256,
            &PKCS_ECDSA_P384_SHA384,
            &PKCS_ED25519,
            &PKCS_RSA_SHA256,
        ] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let taken = RequestedKey::from_csr(&csr(&key)).unwrap();
            assert_eq!(taken.spki(), key.subject_public_key_info());
        }
        let rsa = openssl(&["genrsa", "4096"]);
        RequestedKey::from_csr(&rsa).unwrap();
    }

    #[test]
    fn refuses_other_keys_by_name() {
        let genpkey = |options: &[&'static str]| {
            let mut all = vec!["genpkey"];
            for option in options {
                all.extend(["-pkeyopt", option]);
            }
            all
        };
        let curve = |name| {
            let mut all = genpkey(&[name]);
            all.splice(1..1, ["-algorithm", "EC"]);
            openssl(&all)
        };
        let cases = [
            (openssl(&["genrsa", "1024"]), "RSA of 1024 bits"),
            (openssl(&["genrsa", "2047"]), "RSA of 2047 bits"),
            (openssl(&["genrsa", "4104"]), "RSA of 4104 bits"),
            (curve("ec_paramgen_curve:P-224"), "P-224"),
            (curve("ec_paramgen_curve:secp256k1"), "secp256k1"),
            (
                curve("ec_paramgen_curve:brainpoolP256r1"),
                "brainpoolP256r1",
            ),
            (openssl(&["genpkey", "-algorithm", "ED448"]), "Ed448"),
            (openssl(&["genpkey", "-algorithm", "RSA-PSS"]), "PSS"),
            (
                csr(&KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512).unwrap()),
                "P-521",
            ),
        ];
        for (csr, name) in cases {
            let error = RequestedKey::from_csr(&csr).unwrap_err();
            assert!(
                matches!(&error, InvalidCsr::Key(what) if what.contains(name)),
                "{name}: {error}"
            );
        }
        let rsa = |exponent: &[u8]| {
            let mut modulus = vec![0, 0xc1];
            modulus.resize(257, 0x55);
            der::element(
                SEQUENCE,
                &[
                    &der::element(INTEGER, &[&modulus]),
                    &der::element(INTEGER, &[exponent]),
                ],
            )
        };
        assert_eq!(check_rsa(&rsa(&[3])), Ok(()));
        assert_eq!(check_rsa(&rsa(&[1, 0, 1])), Ok(()));
        for bad in [&[1][..], &[4], &[0], &[0x81], &[]] {
            check_rsa(&rsa(bad)).unwrap_err();
        }
    }

    #[test]
    fn ignores_what_else_is_asked_for() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".into()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // An extension that nobody knows, and is not even DER.
        let unknown =
            CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![4, 1, 7]);
        params.custom_extensions = vec![unknown];
        let csr = params.serialize_request(&key).unwrap();
        let taken = RequestedKey::from_csr(csr.der()).unwrap();
        assert_eq!(taken.spki(), key.subject_public_key_info());
    }

    #[test]
    fn refuses_what_is_not_signed_by_its_key() {
        let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut forged = csr(&one);
        let key = one.subject_public_key_info();
        let at = forged
            .windows(key.len())
            .position(|part| part == key)
            .unwrap();
        forged[at..at + key.len()].copy_from_slice(&other.subject_public_key_info());
        assert_eq!(
            RequestedKey::from_csr(&forged).unwrap_err(),
            InvalidCsr::Signature
        );
        let mut longer = csr(&one);
        longer.push(0);
        assert!(matches!(
            RequestedKey::from_csr(&longer),
            Err(InvalidCsr::Malformed(_))
        ));
        let long = vec![0x30; MAX_BYTES + 1];
        assert!(matches!(
            RequestedKey::from_csr(&long),
            Err(InvalidCsr::TooLong(..))
        ));
        // A point that is on no curve.
        let mut off = csr(&one);
        off[at + key.len() - 1] ^= 1;
        assert_eq!(
            RequestedKey::from_csr(&off).unwrap_err(),
            InvalidCsr::Signature
        );
    }

    #[test]
    fn reads_one_block_of_pem() {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default()
            .serialize_request(&key)
            .unwrap();
        let pem = csr.pem().unwrap();
        assert_eq!(from_pem(&pem).unwrap(), csr.der().as_ref());
        let old = pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST");
        assert_eq!(from_pem(&old).unwrap(), csr.der().as_ref());
        for bad in [
            String::new(),
            "rubbish".into(),
            format!("{pem}{pem}"),
            pem.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            format!("{pem}{}", key.serialize_pem()),
            pem.replace("-----END", "-----"),
        ] {
            assert_eq!(from_pem(&bad), Err(InvalidCsr::Pem), "{bad}");
        }
        let long = format!("{pem}{}", "A".repeat(10 << 20));
        assert!(matches!(from_pem(&long), Err(InvalidCsr::TooLong(..))));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let _ = RequestedKey::from_csr(&bytes);
            let _ = from_pem(&String::from_utf8_lossy(&bytes));
            let key = KeyPair::generate().unwrap();
            let mut changed = csr(&key);
            let at = at.index(changed.len());
            changed[at] = to;
            // Whatever is changed: the key that comes out is the one that signed, or none does.
            if let Ok(taken) = RequestedKey::from_csr(&changed) {
                prop_assert_eq!(taken.spki(), key.subject_public_key_info());
            }
        }
    }
}
