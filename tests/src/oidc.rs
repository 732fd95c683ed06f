//! An OIDC issuer: it signs tokens and publishes its key.

use anyhow::{Context, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

/// An OIDC issuer with a P-256 key.
pub struct OidcIssuer {
    /// Its name, the `iss` of its tokens.
    pub name: String,
    key: EcdsaKeyPair,
}

impl OidcIssuer {
    /// Makes a key.
    pub fn new(name: &str) -> Result<Self> {
        let key = rcgen::KeyPair::generate().context("making a key")?;
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der())
            .context("reading the key")?;
        Ok(Self {
            name: name.to_owned(),
            key,
        })
    }

    /// Its published keys (RFC 7517 §5).
    pub fn keys(&self) -> Value {
        // An uncompressed point (SEC 1 §2.3.3): 4, then both coordinates.
        let point = self.key.public_key().as_ref();
        let (x, y) = point[1..].split_at(32);
        json!({"keys": [{
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "one",
            "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y),
        }]})
    }

    /// Signs a token with these claims, and the issuer's own name as `iss` (RFC 7515 §3.1).
    pub fn token(&self, claims: &Value) -> Result<String> {
        let mut claims = claims.clone();
        claims["iss"] = self.name.as_str().into();
        let header = json!({"alg": "ES256", "typ": "JWT", "kid": "one"});
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self
            .key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .context("signing a token")?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}
