//! The public keys of JWT-SVIDs, as bundles have them (SPIFFE JWT-SVID §6).

use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{
        AlgorithmParameters, CommonParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm,
        PublicKeyUse,
    },
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::SigningKey;

/// Value of a key's `use` that marks a key of JWT-SVIDs.
pub const KEY_USE: &str = "jwt-svid";
/// Maximum number of keys of a trust domain.
const MAX_KEYS: usize = 64;
/// Maximum length of a key's ID, in bytes.
const MAX_ID: usize = 256;
/// Algorithms of JWT-SVIDs (JWT-SVID §2.1) that are supported: none with a shared secret, and not `none`.
const ALGORITHMS: [Algorithm; 8] = [
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// The public keys of a trust domain that verify its JWT-SVIDs, each with an ID of its own. Without keys, none of its
/// tokens is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JwtKeys(Vec<Jwk>);

/// Why a document is no set of keys.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeys {
    /// It is not a JSON Web Key Set.
    #[error("is not a JSON Web Key Set: {0}")]
    Syntax(String),
    /// It has too many keys.
    #[error("has more than {MAX_KEYS} keys of JWT-SVIDs")]
    TooMany,
}

impl JwtKeys {
    /// Reads a JWK Set (RFC 7517 §5) of keys of JWT-SVIDs.
    pub fn parse(set: &str) -> Result<Self, InvalidKeys> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Box<RawValue>>,
        }
        let set: Set =
            serde_json::from_str(set).map_err(|error| InvalidKeys::Syntax(error.to_string()))?;
        let mut keys = Self::default();
        for key in set.keys {
            keys.add(key.get())?;
        }
        Ok(keys)
    }

    /// Adds a key, which is JSON. One that cannot be used is ignored (JWT-SVID §6.2), and so is another one with an ID that
    /// is taken: a trust domain may have keys of kinds that this version does not know.
    pub fn add(&mut self, key: &str) -> Result<(), InvalidKeys> {
        let Some(key) = usable(key) else {
            return Ok(());
        };
        if self
            .0
            .iter()
            .any(|known| known.common.key_id == key.common.key_id)
        {
            return Ok(());
        }
        if self.0.len() == MAX_KEYS {
            return Err(InvalidKeys::TooMany);
        }
        self.0.push(key);
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the keys, each as JSON.
    pub fn to_values(&self) -> Vec<serde_json::Value> {
        // Text only, which JSON has a form for.
        let keys = self.0.iter().flat_map(serde_json::to_value);
        keys.collect()
    }

    /// Writes the JWK Set.
    pub fn to_json(&self) -> String {
        let keys = self.0.clone();
        serde_json::to_string(&JwkSet { keys }).unwrap_or_default()
    }

    /// The key with this ID, if tokens with `algorithm` can be signed with it: the key determines the algorithm, not the
    /// token.
    pub(crate) fn find(&self, id: &str, algorithm: Algorithm) -> Option<DecodingKey> {
        let mut keys = self.0.iter();
        let key = keys.find(|key| key.common.key_id.as_deref() == Some(id))?;
        signs(key, algorithm).then(|| DecodingKey::from_jwk(key).ok())?
    }
}

impl<'a> FromIterator<&'a SigningKey> for JwtKeys {
    fn from_iter<I: IntoIterator<Item = &'a SigningKey>>(keys: I) -> Self {
        Self(keys.into_iter().map(|key| key.public().clone()).collect())
    }
}

/// The key in its usual form, without what is not needed.
pub(crate) fn published(id: &str, key: Jwk) -> Jwk {
    Jwk {
        common: CommonParameters {
            public_key_use: Some(PublicKeyUse::Other(KEY_USE.into())),
            key_id: Some(id.to_owned()),
            key_algorithm: key.common.key_algorithm,
            ..CommonParameters::default()
        },
        algorithm: key.algorithm,
    }
}

fn usable(key: &str) -> Option<Jwk> {
    let key: Jwk = serde_json::from_str(key).ok()?;
    let id = key.common.key_id.clone()?;
    let named = (1..=MAX_ID).contains(&id.len()) && !id.chars().any(char::is_control);
    let can_sign = ALGORITHMS.iter().any(|algorithm| signs(&key, *algorithm));
    (named && can_sign && DecodingKey::from_jwk(&key).is_ok()).then(|| published(&id, key))
}

fn signs(key: &Jwk, algorithm: Algorithm) -> bool {
    let named = key.common.key_algorithm;
    let fits = match (&key.algorithm, algorithm) {
        // The characters of 32 and 48 bytes in base64url.
        (AlgorithmParameters::EllipticCurve(ec), Algorithm::ES256) => {
            ec.curve == EllipticCurve::P256 && (ec.x.len(), ec.y.len()) == (43, 43)
        }
        (AlgorithmParameters::EllipticCurve(ec), Algorithm::ES384) => {
            ec.curve == EllipticCurve::P384 && (ec.x.len(), ec.y.len()) == (64, 64)
        }
        (AlgorithmParameters::RSA(_), Algorithm::ES256 | Algorithm::ES384) => false,
        (AlgorithmParameters::RSA(_), algorithm) => ALGORITHMS.contains(&algorithm),
        _ => false,
    };
    fits && named.is_none_or(|named| named == KeyAlgorithm::from(algorithm))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
    const Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";

    fn ec(id: &str) -> serde_json::Value {
        json!({"kty": "EC", "crv": "P-256", "kid": id, "x": X, "y": Y})
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let rsa = json!({"kty": "RSA", "kid": "r", "n": X, "e": "AQAB"});
        let set = json!({"keys": [ec("a"), rsa], "spiffe_sequence": 3}).to_string();
        let keys = JwtKeys::parse(&set).unwrap();
        assert_eq!(JwtKeys::parse(&keys.to_json()), Ok(keys.clone()));
        let written = keys.to_values();
        assert_eq!(written[0]["use"], KEY_USE);
        assert_eq!(
            (&written[0]["kid"], &written[1]["kid"]),
            (&json!("a"), &json!("r"))
        );
        assert!(keys.find("a", Algorithm::ES256).is_some());
        for (id, algorithm) in [
            ("a", Algorithm::ES384),
            ("a", Algorithm::RS256),
            ("a", Algorithm::HS256),
            ("b", Algorithm::ES256),
            ("r", Algorithm::ES256),
            ("r", Algorithm::HS256),
            ("r", Algorithm::EdDSA),
        ] {
            assert!(keys.find(id, algorithm).is_none(), "{id} {algorithm:?}");
        }
        for algorithm in &ALGORITHMS[2..] {
            assert!(keys.find("r", *algorithm).is_some(), "{algorithm:?}");
        }
    }

    #[test]
    fn keys_that_cannot_be_used_are_ignored() {
        let with = |name: &str, value: serde_json::Value| {
            let mut key = ec("a");
            key[name] = value;
            key
        };
        for bad in [
            with("kid", "".into()),
            with("kid", json!(null)),
            with("kid", 7.into()),
            with("kid", "x".repeat(MAX_ID + 1).into()),
            with("crv", "P-521".into()),
            with("crv", "P-384".into()),
            with("alg", "HS256".into()),
            with("alg", "ES384".into()),
            with("x", "?".into()),
            json!({"kty": "oct", "kid": "a", "k": "c2VjcmV0", "alg": "HS256"}),
            json!({"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": X}),
            json!({"kty": "new", "kid": "a"}),
            json!(17),
        ] {
            let keys = JwtKeys::parse(&json!({"keys": [bad, ec("b")]}).to_string());
            let [kept] = &keys.unwrap().to_values()[..] else {
                panic!("{bad} is used");
            };
            assert_eq!(kept["kid"], "b");
        }
        let other = json!({"kty": "RSA", "kid": "a", "n": X, "e": "AQAB"});
        let keys = JwtKeys::parse(&json!({"keys": [ec("a"), other]}).to_string());
        assert_eq!(keys.unwrap().to_values()[0]["kty"], "EC", "the first");
        for bad in ["", "{}", "[]", "{\"keys\": {}}"] {
            let refused = JwtKeys::parse(bad).unwrap_err();
            assert!(matches!(refused, InvalidKeys::Syntax(_)), "{bad}");
        }
        let many: Vec<_> = (0..=MAX_KEYS).map(|n| ec(&n.to_string())).collect();
        let refused = JwtKeys::parse(&json!({"keys": many}).to_string());
        assert_eq!(refused, Err(InvalidKeys::TooMany));
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,128}", id in "\\PC{0,8}", x in "[A-Za-z0-9_-]{0,64}") {
            let _ = JwtKeys::parse(&text);
            let key = json!({"kty": "EC", "crv": "P-256", "kid": id, "x": x, "y": x});
            let keys = JwtKeys::parse(&json!({"keys": [key]}).to_string()).unwrap();
            prop_assert_eq!(JwtKeys::parse(&keys.to_json()), Ok(keys));
        }
    }
}
