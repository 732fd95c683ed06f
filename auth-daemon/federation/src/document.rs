//! The SPIFFE bundle document: a JWK Set with the roots of a trust domain, and the keys that verify its JWT-SVIDs (SPIFFE Trust
//! Domain and Bundle §4, X509-SVID §6, JWT-SVID §6).

use std::time::Duration;

use auth_jwt::{JwtKeys, KEY_USE as JWT_SVID};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::Deserialize;
use serde_json::{Map, Value, json, value::RawValue};
use x509_parser::{
    certificate::X509Certificate, prelude::FromDer, public_key::PublicKey,
    x509::SubjectPublicKeyInfo,
};

/// Largest document that is read, in bytes.
pub const MAX_BYTES: usize = 1 << 20;
/// Maximum number of roots in a document.
const MAX_ROOTS: usize = 64;
/// Value of a key's `use` that marks a root of X.509-SVIDs.
const X509_SVID: &str = "x509-svid";

/// The bundle of a trust domain. The document does not name the trust domain: its reader knows which it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bundle {
    /// Increases with each change of the bundle. `None` if its publisher does not count.
    pub sequence: Option<u64>,
    /// How often to look for another bundle.
    pub refresh_hint: Option<Duration>,
    /// Roots of X.509-SVIDs, DER, each once. If there are none, no certificate of the trust domain is to be trusted.
    pub roots: Vec<CertificateDer<'static>>,
    /// Keys that verify JWT-SVIDs.
    pub jwt_keys: JwtKeys,
}

/// Why a document is not a bundle.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a SPIFFE bundle: {0}")]
pub struct InvalidBundle(String);

/// Fields that other specifications add are ignored. A field that is there twice is an error: readers would disagree.
#[derive(Deserialize)]
struct Document {
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
    keys: Vec<Box<RawValue>>,
}

/// A key of any kind. What its kind does not have is ignored.
#[derive(Deserialize)]
struct Key {
    kty: Option<Value>,
    #[serde(rename = "use")]
    purpose: Option<Value>,
    x5c: Option<Value>,
}

impl Bundle {
    /// Reads a document. Keys for unknown uses are ignored, as the specification has it, and so are keys of JWT-SVIDs that
    /// cannot be used ([`JwtKeys::add`]). Of those for X.509-SVIDs, all must be usable roots, because a part could be the wrong
    /// part.
    pub fn parse(document: &[u8]) -> Result<Self, InvalidBundle> {
        if document.len() > MAX_BYTES {
            let bytes = document.len();
            return Err(InvalidBundle(format!(
                "it has {bytes} bytes, at most {MAX_BYTES} are read"
            )));
        }
        let document: Document =
            serde_json::from_slice(document).map_err(|error| InvalidBundle(error.to_string()))?;
        let mut bundle = Self {
            sequence: document.spiffe_sequence,
            refresh_hint: document.spiffe_refresh_hint.map(Duration::from_secs),
            ..Self::default()
        };
        for (index, raw) in document.keys.into_iter().enumerate() {
            let invalid = |what: &str| InvalidBundle(format!("keys[{index}]{what}"));
            let key: Key =
                serde_json::from_str(raw.get()).map_err(|error| invalid(&format!(": {error}")))?;
            let is_for = |what: &str| key.purpose.as_ref().is_some_and(|purpose| purpose == what);
            if is_for(JWT_SVID) {
                bundle.jwt_keys.add(raw.get());
            }
            if !is_for(X509_SVID) || !key.kty.is_some_and(|kind| kind.is_string()) {
                continue;
            }
            let first = match key.x5c {
                None => continue,
                Some(Value::Array(chain)) => chain.into_iter().next(),
                Some(_) => return Err(invalid(".x5c: is not a list")),
            };
            let root = match first {
                None => continue,
                Some(Value::String(text)) => STANDARD
                    .decode(text)
                    .map_err(|_| invalid(".x5c[0]: is not base64"))?,
                Some(_) => return Err(invalid(".x5c[0]: is not a string")),
            };
            bundle
                .add(root.into())
                .map_err(|what| invalid(&format!(".x5c[0]: {what}")))?;
        }
        Ok(bundle)
    }

    /// Reads a file: a document, or certificates in PEM, which have neither sequence nor refresh hint.
    pub fn of_file(content: &[u8]) -> Result<Self, InvalidBundle> {
        if content.trim_ascii_start().starts_with(b"{") {
            return Self::parse(content);
        }
        let mut bundle = Self::default();
        for (index, root) in CertificateDer::pem_slice_iter(content).enumerate() {
            let invalid = |what: &str| InvalidBundle(format!("certificate {index}: {what}"));
            let root = root.map_err(|error| invalid(&error.to_string()))?;
            bundle.add(root).map_err(|what| invalid(&what))?;
        }
        match bundle.roots.is_empty() {
            true => Err(InvalidBundle(
                "it is neither a JWK Set nor a certificate in PEM".into(),
            )),
            false => Ok(bundle),
        }
    }

    fn add(&mut self, root: CertificateDer<'static>) -> Result<(), String> {
        let (rest, parsed) =
            X509Certificate::from_der(&root).map_err(|_| "is not a certificate".to_owned())?;
        if !rest.is_empty() {
            return Err("has something after the certificate".into());
        }
        if !parsed.is_ca() {
            return Err("is not a CA certificate".into());
        }
        RootCertStore::empty()
            .add(root.clone())
            .map_err(|error| format!("cannot be used as a root: {error}"))?;
        if !self.roots.contains(&root) {
            self.roots.push(root);
        }
        match self.roots.len() {
            ..=MAX_ROOTS => Ok(()),
            _ => Err(format!(
                "is one too many: at most {MAX_ROOTS} roots are read"
            )),
        }
    }

    /// Writes the document. Fails if a root has a key that JWKs have no form for.
    pub fn to_json(&self) -> Result<String, String> {
        let keys = self.roots.iter().map(key);
        let mut document = Map::new();
        let mut keys = keys.collect::<Result<Vec<_>, _>>()?;
        keys.extend(self.jwt_keys.to_values());
        document.insert("keys".into(), keys.into());
        if let Some(sequence) = self.sequence {
            document.insert("spiffe_sequence".into(), sequence.into());
        }
        if let Some(hint) = self.refresh_hint {
            document.insert("spiffe_refresh_hint".into(), hint.as_secs().into());
        }
        Ok(Value::from(document).to_string())
    }
}

/// A root as a JWK (RFC 7517 §4, RFC 7518 §6, RFC 8037 §2).
fn key(root: &CertificateDer<'_>) -> Result<Value, String> {
    let (_, parsed) = X509Certificate::from_der(root).map_err(|error| error.to_string())?;
    let mut key = public_key(parsed.public_key())?;
    key["use"] = X509_SVID.into();
    key["x5c"] = json!([STANDARD.encode(root)]);
    Ok(key)
}

fn public_key(key: &SubjectPublicKeyInfo<'_>) -> Result<Value, String> {
    const ED25519: &str = "1.3.101.112";
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    match key.parsed().map_err(|error| error.to_string())? {
        PublicKey::RSA(rsa) => {
            let [n, e] = [rsa.modulus, rsa.exponent].map(|number| {
                let zeros = number.iter().take_while(|byte| **byte == 0).count();
                text(&number[zeros..])
            });
            Ok(json!({"kty": "RSA", "n": n, "e": e}))
        }
        // Uncompressed: 4, then x and y of the same length (SEC 1 §2.3.3).
        PublicKey::EC(point) if point.data().first() == Some(&4) => {
            let (x, y) = point.data()[1..].split_at(point.data().len() / 2);
            let curve = match x.len() {
                32 => "P-256",
                48 => "P-384",
                66 => "P-521",
                length => return Err(format!("a key has coordinates of {length} bytes")),
            };
            Ok(json!({"kty": "EC", "crv": curve, "x": text(x), "y": text(y)}))
        }
        _ if key.algorithm.algorithm.to_id_string() == ED25519 => Ok(json!({
            "kty": "OKP", "crv": "Ed25519", "x": text(&key.subject_public_key.data),
        })),
        _ => Err(format!(
            "a key has the algorithm {}",
            key.algorithm.algorithm
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, SignatureAlgorithm};

    use super::*;

    fn certificate(is_ca: IsCa, algorithm: &'static SignatureAlgorithm) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.is_ca = is_ca;
        let key = KeyPair::generate_for(algorithm).unwrap();
        params.self_signed(&key).unwrap().der().clone()
    }

    fn root() -> CertificateDer<'static> {
        let any = IsCa::Ca(BasicConstraints::Unconstrained);
        certificate(any, &rcgen::PKCS_ECDSA_P256_SHA256)
    }

    fn text(der: &[u8]) -> String {
        STANDARD.encode(der)
    }

    fn jwt_key(id: &str) -> Value {
        json!({
            "kty": "EC", "use": "jwt-svid", "kid": id, "crv": "P-256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        })
    }

    fn parse(document: &Value) -> Result<Bundle, String> {
        Bundle::parse(document.to_string().as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_what_it_writes() {
        let any = || IsCa::Ca(BasicConstraints::Unconstrained);
        let algorithms = [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "EC", Some("P-256"), 43),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "EC", Some("P-384"), 64),
            (&rcgen::PKCS_ED25519, "OKP", Some("Ed25519"), 43),
        ];
        for (algorithm, kind, curve, characters) in algorithms {
            let bundle = Bundle {
                sequence: Some(u64::MAX),
                refresh_hint: Some(Duration::from_secs(300)),
                roots: vec![certificate(any(), algorithm), root()],
                jwt_keys: JwtKeys::parse(&json!({"keys": [jwt_key("a")]}).to_string()).unwrap(),
            };
            let document = bundle.to_json().unwrap();
            assert_eq!(Bundle::parse(document.as_bytes()), Ok(bundle.clone()));
            assert_eq!(Bundle::of_file(document.as_bytes()), Ok(bundle));
            let read: Value = serde_json::from_str(&document).unwrap();
            let key = &read["keys"][0];
            assert_eq!(key["kty"], kind);
            assert_eq!(key["crv"].as_str(), curve);
            assert_eq!(key["x"].as_str().unwrap().len(), characters);
            assert!(key["kid"].is_null(), "X509-SVID §6.1");
            assert_eq!(read["keys"][2]["use"], JWT_SVID);
        }
        assert_eq!(Bundle::default().to_json().unwrap(), r#"{"keys":[]}"#);
    }

    #[test]
    fn ignores_what_the_specification_says_to_ignore() {
        let (one, two) = (root(), root());
        let bundle = parse(&json!({
            "spiffe_sequence": 12, "future": {"x": 1},
            "keys": [
                {"kty": "EC", "use": "x509-svid", "x5c": [text(&one), "all but the first"], "alg": "?"},
                {"kty": "EC", "use": "jwt-svid", "kid": "a", "x5c": 3},
                {"kty": "EC", "use": "X509-SVID", "x5c": [text(&two)]},
                {"kty": "EC", "x5c": [text(&two)]},
                {"use": "x509-svid", "x5c": [text(&two)]},
                {"kty": "EC", "use": "x509-svid"},
                {"kty": "EC", "use": "x509-svid", "x5c": []},
                {"kty": "EC", "use": "x509-svid", "x5c": [text(&one)]},
            ],
        }));
        let bundle = bundle.unwrap();
        assert_eq!((bundle.sequence, bundle.refresh_hint), (Some(12), None));
        assert_eq!(bundle.roots, [one]);
        assert!(bundle.jwt_keys.is_empty());
        let jwt_keys = (0..100).map(|id| jwt_key(&id.to_string()));
        let keys = jwt_keys.chain([json!({"kty": "EC", "use": "x509-svid", "x5c": [text(&two)]})]);
        let many = parse(&json!({"keys": keys.collect::<Vec<_>>()})).unwrap();
        assert_eq!((many.roots, many.jwt_keys.len()), (vec![two], 64));
        let empty = parse(&json!({"keys": []})).unwrap();
        assert_eq!(empty.roots, []);
    }

    #[test]
    fn refuses_a_document_of_which_it_cannot_use_a_root() {
        let leaf = certificate(IsCa::ExplicitNoCa, &rcgen::PKCS_ECDSA_P256_SHA256);
        let with = |x5c: Value| {
            let key = json!({"kty": "EC", "use": "x509-svid", "x5c": x5c});
            parse(
                &json!({"keys": [{"kty": "EC", "use": "x509-svid", "x5c": [text(&root())]}, key]}),
            )
        };
        for (x5c, expected) in [
            (json!("x"), "keys[1].x5c: is not a list"),
            (json!([7]), "keys[1].x5c[0]: is not a string"),
            (json!(["-_"]), "keys[1].x5c[0]: is not base64"),
            (json!([""]), "keys[1].x5c[0]: is not a certificate"),
            (json!([text(&[0x30, 0])]), "is not a certificate"),
            (json!([text(&leaf)]), "is not a CA certificate"),
            (
                json!([text(&[&root()[..], &[0]].concat())]),
                "has something after",
            ),
        ] {
            let error = with(x5c).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        for document in [
            "",
            "[]",
            "{}",
            r#"{"keys": {}}"#,
            r#"{"keys": [1]}"#,
            r#"{"keys": [], "keys": []}"#,
            r#"{"keys": [], "spiffe_sequence": -1}"#,
            r#"{"keys": [], "spiffe_sequence": 18446744073709551616}"#,
            r#"{"keys": [], "spiffe_sequence": 1.5}"#,
            r#"{"keys": [], "spiffe_refresh_hint": "5m"}"#,
        ] {
            let error = Bundle::parse(document.as_bytes()).unwrap_err().to_string();
            assert!(
                error.starts_with("is not a SPIFFE bundle: "),
                "{document}: {error}"
            );
        }
        let large = vec![b' '; MAX_BYTES + 1];
        assert!(
            Bundle::parse(&large)
                .unwrap_err()
                .to_string()
                .contains("at most")
        );
    }

    #[test]
    fn limits_the_number_of_roots() {
        let keys: Vec<_> = (0..=MAX_ROOTS)
            .map(|_| json!({"kty": "EC", "use": "x509-svid", "x5c": [text(&root())]}))
            .collect();
        assert_eq!(
            parse(&json!({"keys": keys[1..]})).unwrap().roots.len(),
            MAX_ROOTS
        );
        let error = parse(&json!({"keys": keys})).unwrap_err();
        assert!(error.contains("at most 64 roots"), "{error}");
    }

    #[test]
    fn a_file_may_be_pem() {
        let one = root();
        let pem = |der: &[u8]| {
            let body = text(der);
            format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
        };
        let bundle = Bundle::of_file(pem(&one).as_bytes()).unwrap();
        assert_eq!((bundle.roots, bundle.sequence), (vec![one], None));
        for bad in ["", "hello", &pem(b"x")] {
            assert!(Bundle::of_file(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..256), text in r#"\{"keys": \[\PC{0,64}\]\}"#) {
            let _ = Bundle::of_file(&bytes);
            let _ = Bundle::parse(text.as_bytes());
        }
    }
}
