//! Certificate signing requests (PKCS #10, RFC 2986). The CA takes the public key, and the proof that the sender holds
//! its private key. A request for a name that the sender does not get is refused; everything else in it is ignored.

use rcgen::{PublicKeyData, SignatureAlgorithm, SubjectPublicKeyInfo};
use x509_parser::{
    asn1_rs::{Oid, oid},
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension},
    oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME,
    prelude::FromDer as _,
    public_key::{PublicKey, RSAPublicKey},
    x509,
};

/// Largest request that is read, in bytes of DER.
const MAX_BYTES: usize = 64 * 1024;
/// Sizes of RSA keys that the CA signs, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=4096;

const EC_PUBLIC_KEY: Oid<'static> = oid!(1.2.840.10045.2.1);
const RSA_ENCRYPTION: Oid<'static> = oid!(1.2.840.113549.1.1.1);
const ED25519: Oid<'static> = oid!(1.3.101.112);
const P256: Oid<'static> = oid!(1.2.840.10045.3.1.7);
const P384: Oid<'static> = oid!(1.3.132.0.34);
/// Names of kinds and curves for errors.
const REFUSED: [(Oid<'static>, &str); 8] = [
    (oid!(1.2.840.113549.1.1.10), "an RSA key for PSS only"),
    (oid!(1.2.840.10040.4.1), "a DSA key"),
    (oid!(1.3.101.113), "an Ed448 key"),
    (oid!(1.2.840.10045.3.1.1), "on the curve P-192"),
    (oid!(1.3.132.0.33), "on the curve P-224"),
    (oid!(1.3.132.0.35), "on the curve P-521"),
    (oid!(1.3.132.0.10), "on the curve secp256k1"),
    (oid!(1.3.36.3.3.2.8.1.1.7), "on the curve brainpoolP256r1"),
];
const SHA1_SIGNATURES: [Oid<'static>; 3] = [
    oid!(1.2.840.113549.1.1.5),
    oid!(1.3.14.3.2.29),
    oid!(1.2.840.10045.4.1),
];

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCsr {
    /// Larger than the CA reads.
    #[error("the CSR is {0} bytes long; at most {1} are read")]
    TooLong(usize, usize),
    /// Not DER, or not of RFC 2986's form.
    #[error("the CSR cannot be parsed: {0}")]
    Malformed(&'static str),
    /// A kind or size of key that the CA does not sign.
    #[error("the CSR's key is {0}; P-256, P-384, Ed25519 and RSA of 2048 to 4096 bits are signed")]
    Key(String),
    /// The signature is not by the key in the request.
    #[error("the CSR is not signed by the key in it, or with an unsupported algorithm")]
    Signature,
    /// It asks for a subject alternative name that the certificate would not have.
    #[error("the CSR asks for the name {0}: leave names out, or ask for {1} alone")]
    Name(String, String),
}

/// The public key of a request with a valid signature.
#[derive(Clone, Debug)]
pub struct RequestedKey {
    key: SubjectPublicKeyInfo,
    /// The subject alternative names that are asked for: URIs as they are, others for people.
    names: Vec<String>,
}

impl RequestedKey {
    /// Takes the key out of `csr` (DER), if its kind is supported and the sender holds its private key.
    pub fn from_csr(csr: &[u8]) -> Result<Self, InvalidCsr> {
        if csr.len() > MAX_BYTES {
            return Err(InvalidCsr::TooLong(csr.len(), MAX_BYTES));
        }
        let malformed = InvalidCsr::Malformed;
        let Ok(([], request)) = X509CertificationRequest::from_der(csr) else {
            return Err(malformed("it is not a certification request"));
        };
        let key = &request.certification_request_info.subject_pki;
        check_key(key)?;
        if SHA1_SIGNATURES.contains(&request.signature_algorithm.algorithm)
            || request.signature_value.unused_bits != 0
        {
            return Err(InvalidCsr::Signature);
        }
        request
            .verify_signature()
            .map_err(|_| InvalidCsr::Signature)?;
        let names = names(&request).ok_or(malformed("its subject alternative names"))?;
        let key = SubjectPublicKeyInfo::from_der(key.raw)
            .map_err(|_| malformed("the parameters of its public key"))?;
        Ok(Self { key, names })
    }

    /// Fails if the request asks for a name besides `id`, a SPIFFE ID. Istio's clients ask for that one, and this project's
    /// daemon for none, except for its node's own certificate.
    pub fn check_names(&self, id: &str) -> Result<(), InvalidCsr> {
        match self.names.iter().find(|name| *name != id) {
            None => Ok(()),
            Some(other) => {
                let other = other.chars().take(256).collect();
                Err(InvalidCsr::Name(other, id.to_owned()))
            }
        }
    }

    /// The SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> Vec<u8> {
        self.key.subject_public_key_info()
    }
}

impl PublicKeyData for RequestedKey {
    fn der_bytes(&self) -> &[u8] {
        self.key.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.key.algorithm()
    }
}

/// All subject alternative names that are asked for; `None` if they cannot be read.
fn names(request: &X509CertificationRequest<'_>) -> Option<Vec<String>> {
    let mut names = Vec::new();
    for attribute in request.certification_request_info.iter_attributes() {
        let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else {
            continue;
        };
        for extension in &requested.extensions {
            match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(asked) => {
                    names.extend(asked.general_names.iter().map(|name| match name {
                        GeneralName::URI(uri) => (*uri).to_owned(),
                        other => other.to_string(),
                    }));
                }
                _ if extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME => return None,
                _ => {}
            }
        }
    }
    Some(names)
}

/// Refuses weak keys, and kinds that the mesh's TLS does not support.
fn check_key(key: &x509::SubjectPublicKeyInfo<'_>) -> Result<(), InvalidCsr> {
    let bytes = &key.subject_public_key.data;
    let algorithm = &key.algorithm.algorithm;
    let malformed = Err(InvalidCsr::Malformed("its public key"));
    let refused = |oid: &Oid<'_>| {
        let known = REFUSED.into_iter().find(|(refused, _)| refused == oid);
        Err(InvalidCsr::Key(match known {
            Some((_, name)) => name.to_owned(),
            None => format!("of the kind {oid}"),
        }))
    };
    if key.subject_public_key.unused_bits != 0 {
        return malformed;
    }
    let length = if *algorithm == RSA_ENCRYPTION {
        return match key.parsed() {
            Ok(PublicKey::RSA(key)) => check_rsa(&key),
            _ => malformed,
        };
    } else if *algorithm == ED25519 {
        32
    } else if *algorithm == EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref();
        match curve.and_then(|curve| curve.as_oid().ok()) {
            Some(curve) if curve == P256 => 65,
            Some(curve) if curve == P384 => 97,
            Some(curve) => return refused(&curve),
            None => return Err(InvalidCsr::Key("on an unnamed elliptic curve".into())),
        }
    } else {
        return refused(algorithm);
    };
    // Points are uncompressed (SEC 1 §2.3.3). The signature check finds out whether one is on its curve.
    if bytes.len() != length || (*algorithm == EC_PUBLIC_KEY && bytes[0] != 4) {
        return malformed;
    }
    Ok(())
}

fn check_rsa(key: &RSAPublicKey<'_>) -> Result<(), InvalidCsr> {
    // Positive INTEGERs, of which a leading zero is no digit.
    let digits = |number: &[u8]| match number {
        [0, rest @ ..] => rest.to_vec(),
        [0x80..=0xff, ..] => Vec::new(),
        number => number.to_vec(),
    };
    let (modulus, exponent) = (digits(key.modulus), digits(key.exponent));
    let bits = match modulus.first() {
        Some(first) => modulus.len() * 8 - first.leading_zeros() as usize,
        None => 0,
    };
    if !RSA_BITS.contains(&bits) {
        return Err(InvalidCsr::Key(format!("RSA of {bits} bits")));
    }
    let odd = exponent.last().is_some_and(|last| last & 1 == 1);
    if !odd || *exponent == [1] {
        return Err(InvalidCsr::Key("RSA with an even exponent, or 1".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, IsCa, KeyPair,
        PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ECDSA_P521_SHA512, PKCS_ED25519,
        PKCS_RSA_SHA256, SanType,
    };

    use super::*;

    fn csr(key: &KeyPair) -> Vec<u8> {
        let params = CertificateParams::default();
        params.serialize_request(key).unwrap().der().to_vec()
    }

    /// A request made by OpenSSL, for keys that rcgen does not make. `new_key` are the words of a command.
    fn openssl(new_key: &str) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let run = |arguments: &str| {
            let mut command = Command::new("openssl");
            command
                .args(arguments.split(' '))
                .current_dir(folder.path());
            let output = command.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            output.stdout
        };
        let (command, options) = new_key.split_once(' ').unwrap();
        run(&format!("{command} -out key.pem {options}"));
        run("req -new -subj /CN=x -outform DER -key key.pem")
    }

    #[test]
    fn accepts_the_keys_that_tls_supports() {
        for algorithm in [
            &PKCS_ECDSA_P256_SHA256,
            &PKCS_ECDSA_P384_SHA384,
            &PKCS_ED25519,
            &PKCS_RSA_SHA256,
        ] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let requested = RequestedKey::from_csr(&csr(&key)).unwrap();
            assert_eq!(requested.spki(), key.subject_public_key_info());
        }
        RequestedKey::from_csr(&openssl("genrsa 4096")).unwrap();
    }

    #[test]
    fn refuses_other_keys_by_name() {
        let curve = |name| {
            openssl(&format!(
                "genpkey -algorithm EC -pkeyopt ec_paramgen_curve:{name}"
            ))
        };
        let p521 = KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512).unwrap();
        for (csr, name) in [
            (openssl("genrsa 1024"), "RSA of 1024 bits"),
            (openssl("genrsa 2047"), "RSA of 2047 bits"),
            (openssl("genrsa 4104"), "RSA of 4104 bits"),
            (curve("P-224"), "P-224"),
            (curve("secp256k1"), "secp256k1"),
            (curve("brainpoolP256r1"), "brainpoolP256r1"),
            (openssl("genpkey -algorithm ED448"), "Ed448"),
            (openssl("genpkey -algorithm RSA-PSS"), "PSS"),
            (csr(&p521), "P-521"),
        ] {
            let error = RequestedKey::from_csr(&csr).unwrap_err();
            let named = matches!(&error, InvalidCsr::Key(what) if what.contains(name));
            assert!(named, "{name}: {error}");
        }
        let mut modulus = vec![0, 0xc1];
        modulus.resize(257, 0x55);
        let check = |exponent| {
            check_rsa(&RSAPublicKey {
                modulus: &modulus,
                exponent,
            })
        };
        assert_eq!(check(&[3]), Ok(()));
        assert_eq!(check(&[1, 0, 1]), Ok(()));
        for bad in [&[1][..], &[4], &[0], &[0x81], &[]] {
            check(bad).unwrap_err();
        }
    }

    #[test]
    fn ignores_everything_else_in_the_request() {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["evil.example".into()]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // An unknown extension that is not even DER.
        let unknown =
            CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99999, 1], vec![4, 1, 7]);
        params.custom_extensions = vec![unknown];
        let csr = params.serialize_request(&key).unwrap();
        let requested = RequestedKey::from_csr(csr.der()).unwrap();
        assert_eq!(requested.spki(), key.subject_public_key_info());
    }

    #[test]
    fn refuses_names_besides_the_identity() {
        let web = "spiffe://cluster.local/ns/default/sa/web";
        let uri = |text: &str| SanType::URI(text.try_into().unwrap());
        let other = "spiffe://cluster.local/ns/kube-system/sa/admin";
        let dns = SanType::DnsName("evil.example".try_into().unwrap());
        for (names, refused) in [
            (vec![], None),
            (vec![uri(web)], None),
            (vec![uri(other)], Some(other)),
            (vec![uri(web), uri(other)], Some(other)),
            (vec![uri(web), dns], Some("evil.example")),
            (
                vec![SanType::IpAddress([10, 0, 0, 1].into())],
                Some("IPAddress"),
            ),
        ] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = names;
            let csr = params.serialize_request(&key).unwrap();
            let checked = RequestedKey::from_csr(csr.der()).unwrap().check_names(web);
            match (checked, refused) {
                (Ok(()), None) => {}
                (Err(InvalidCsr::Name(name, _)), Some(refused)) if name.contains(refused) => {}
                (checked, refused) => panic!("{checked:?}, not {refused:?}"),
            }
        }
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.custom_extensions = vec![CustomExtension::from_oid_content(
            &[2, 5, 29, 17],
            vec![4, 1, 7],
        )];
        let csr = params.serialize_request(&key).unwrap();
        let refused = RequestedKey::from_csr(csr.der()).unwrap_err();
        assert!(matches!(refused, InvalidCsr::Malformed(_)), "{refused}");
    }

    #[test]
    fn refuses_requests_that_their_key_did_not_sign() {
        let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let key = one.subject_public_key_info();
        let mut forged = csr(&one);
        let mut found = forged.windows(key.len());
        let at = found.position(|part| part == key).unwrap();
        forged[at..at + key.len()].copy_from_slice(&other.subject_public_key_info());
        // A point that is on no curve.
        let mut off = csr(&one);
        off[at + key.len() - 1] ^= 1;
        for bad in [forged, off] {
            let refused = RequestedKey::from_csr(&bad).unwrap_err();
            assert_eq!(refused, InvalidCsr::Signature);
        }
        let longer = [csr(&one), vec![0]].concat();
        let refused = RequestedKey::from_csr(&longer);
        assert!(matches!(refused, Err(InvalidCsr::Malformed(_))));
        let refused = RequestedKey::from_csr(&vec![0x30; MAX_BYTES + 1]);
        assert!(matches!(refused, Err(InvalidCsr::TooLong(..))));
    }

    proptest! {
        #[test]
        fn never_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            to in any::<u8>(),
        ) {
            let _ = RequestedKey::from_csr(&bytes);
            let key = KeyPair::generate().unwrap();
            let mut changed = csr(&key);
            let at = at.index(changed.len());
            changed[at] = to;
            // Whatever is changed: the key that comes out is the one that signed, or none does.
            if let Ok(requested) = RequestedKey::from_csr(&changed) {
                prop_assert_eq!(requested.spki(), key.subject_public_key_info());
            }
        }
    }
}
