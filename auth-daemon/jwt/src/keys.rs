//! The public keys that verify JWT-SVIDs, in the form in which bundles contain them (SPIFFE JWT-SVID §6).

use std::ops::RangeInclusive;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ParsedPublicKey};
use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    jwk::{
        AlgorithmParameters, CommonParameters, EllipticCurve, Jwk, JwkSet, KeyAlgorithm,
        PublicKeyUse,
    },
};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::SigningKey;

/// Value of `use` in a key that verifies JWT-SVIDs.
pub const KEY_USE: &str = "jwt-svid";
/// Maximum number of keys that are kept of a trust domain.
const MAX_KEYS: usize = 64;
/// Maximum length of a key's ID, in bytes.
const MAX_ID: usize = 256;
/// Sizes of RSA keys that verify, in bits.
const RSA_BITS: RangeInclusive<usize> = 2048..=8192;
/// Supported algorithms (JWT-SVID §2.1): all of those with a public key but ES512, so neither `none` nor any with a shared
/// secret.
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

/// The public keys that verify the JWT-SVIDs of a trust domain, each with an ID of its own. Without keys, none of its
/// tokens is trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JwtKeys(Vec<Jwk>);

/// A document is not a JSON Web Key Set. Contains the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not a JSON Web Key Set: {0}")]
pub struct InvalidKeys(String);

impl JwtKeys {
    /// Reads a JWK Set (RFC 7517 §5) whose keys all are for JWT-SVIDs. See [`Self::add`] for those that are ignored.
    pub fn parse(set: &str) -> Result<Self, InvalidKeys> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<Box<RawValue>>,
        }
        let set: Set = serde_json::from_str(set).map_err(|error| InvalidKeys(error.to_string()))?;
        let mut keys = Self::default();
        for key in set.keys {
            keys.add(key.get());
        }
        Ok(keys)
    }

    /// Adds a key, a JSON Web Key. A key that cannot be used is ignored (JWT-SVID §6.2), because a trust domain may have
    /// keys of kinds that this version does not know. So is a second key with the same ID, and every key after the 64th.
    pub fn add(&mut self, key: &str) {
        if self.len() == MAX_KEYS {
            return;
        }
        if let Some(key) = usable(key)
            && !self.has(&key.common.key_id)
        {
            self.0.push(key);
        }
    }

    fn has(&self, id: &Option<String>) -> bool {
        self.0.iter().any(|known| known.common.key_id == *id)
    }

    /// Returns the number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Reports whether there are no keys.
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

    /// Returns the key with this ID if it verifies signatures of `algorithm`: the key decides on the algorithm, not the token.
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

/// Returns the key with its ID and use, and without members that verification does not need.
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
    (named && can_sign && is_valid(&key)).then(|| published(&id, key))
}

/// Reports whether the public key itself is valid. Apps receive it together with the keys of all other trust domains, and
/// some of their libraries reject all of them because of one that is not.
fn is_valid(key: &Jwk) -> bool {
    let Ok(decoded) = DecodingKey::from_jwk(key) else {
        return false;
    };
    match (&key.algorithm, decoded.kind()) {
        (AlgorithmParameters::EllipticCurve(ec), DecodingKeyKind::SecretOrDer(point)) => {
            let algorithm = match ec.curve {
                EllipticCurve::P256 => &ECDSA_P256_SHA256_FIXED,
                _ => &ECDSA_P384_SHA384_FIXED,
            };
            ParsedPublicKey::new(algorithm, point).is_ok()
        }
        (AlgorithmParameters::RSA(_), DecodingKeyKind::RsaModulusExponent { n, e }) => {
            let is_odd = |number: &[u8]| number.last().is_some_and(|last| last % 2 == 1);
            // Common libraries have exponents of at most 31 bits.
            RSA_BITS.contains(&bits(n)) && (2..=31).contains(&bits(e)) && is_odd(n) && is_odd(e)
        }
        _ => false,
    }
}

/// Returns the length in bits of a big-endian number, or 0 if it starts with a zero byte, which RFC 7518 §6.3.1 forbids.
fn bits(number: &[u8]) -> usize {
    match number {
        [first, ..] if *first != 0 => 8 * number.len() - first.leading_zeros() as usize,
        _ => 0,
    }
}

/// Reports whether tokens with `algorithm` can be signed with a key of this kind.
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

    /// A modulus of as many bytes, all of them 0xff: a third of the bytes are left over.
    fn modulus(bytes: usize) -> String {
        assert_eq!(bytes % 3, 1);
        format!("{}w", "_".repeat(bytes / 3 * 4 + 1))
    }

    fn rsa(n: &str, e: &str) -> serde_json::Value {
        json!({"kty": "RSA", "kid": "r", "n": n, "e": e})
    }

    fn ec(id: &str) -> serde_json::Value {
        json!({"kty": "EC", "crv": "P-256", "kid": id, "x": X, "y": Y})
    }

    #[test]
    fn keys_are_read_as_they_are_written() {
        let rsa = rsa(&modulus(256), "AQAB");
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
            with("x", Y.into()), // Not on the curve.
            with("x", "A".repeat(43).into()),
            rsa("", ""),
            rsa(&modulus(256), ""),
            rsa(&modulus(256), "AQ"),                      // 1
            rsa(&modulus(256), "AQAA"),                    // Even.
            rsa(&modulus(256), "AAED"),                    // With a leading zero.
            rsa(&modulus(256), "_____w"),                  // 32 bits.
            rsa(&modulus(253), "AQAB"),                    // Short.
            rsa(&modulus(1027), "AQAB"),                   // Long.
            rsa(&format!("{}A", "_".repeat(341)), "AQAB"), // Even.
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
        let keys =
            JwtKeys::parse(&json!({"keys": [ec("r"), rsa(&modulus(256), "Aw")]}).to_string());
        let keys = keys.unwrap();
        assert_eq!((keys.len(), &keys.to_values()[0]["kty"]), (1, &json!("EC")));
        for bad in ["", "{}", "[]", "{\"keys\": {}}"] {
            assert!(JwtKeys::parse(bad).is_err(), "{bad}");
        }
        let many: Vec<_> = (0..=MAX_KEYS).map(|n| ec(&n.to_string())).collect();
        let keys = JwtKeys::parse(&json!({"keys": many}).to_string()).unwrap();
        assert_eq!(keys.len(), MAX_KEYS);
        assert_eq!(
            keys.to_values()[MAX_KEYS - 1]["kid"],
            "63",
            "the first ones"
        );
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
