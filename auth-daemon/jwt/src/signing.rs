//! Signing of tokens, by the CA.

use auth_mesh::Identity;
use jsonwebtoken::{
    Algorithm, EncodingKey, Header,
    jwk::{Jwk, ThumbprintHash},
};
use serde_json::json;

use crate::{Audience, keys::published};

/// A key that signs JWT-SVIDs with ES256.
pub struct SigningKey {
    key: EncodingKey,
    id: String,
    public: Jwk,
}

/// Why a key cannot sign. Contains no part of the key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsignable {
    /// It is not a P-256 key in PEM (PKCS #8).
    #[error("is not a P-256 key in PEM (PKCS #8)")]
    Key,
    /// Signing failed.
    #[error("a JWT-SVID cannot be signed: {0}")]
    Failed(String),
}

impl SigningKey {
    /// Reads a P-256 key in PEM (PKCS #8). The key's ID is its thumbprint (RFC 7638).
    pub fn from_pem(pem: &str) -> Result<Self, Unsignable> {
        let key = EncodingKey::from_ec_pem(pem.as_bytes()).map_err(|_| Unsignable::Key)?;
        let public = Jwk::from_encoding_key(&key, Algorithm::ES256);
        let public = public.map_err(|_| Unsignable::Key)?;
        let id = public.thumbprint(ThumbprintHash::SHA256);
        let id = id.map_err(|_| Unsignable::Key)?;
        Ok(Self {
            public: published(&id, public),
            key,
            id,
        })
    }

    /// The public key.
    pub(crate) fn public(&self) -> &Jwk {
        &self.public
    }

    /// Signs a token that proves `identity` to `audience`. `issued` and `expires` are in seconds since the Unix epoch.
    pub fn sign(
        &self,
        identity: &Identity,
        audience: &Audience,
        issued: u64,
        expires: u64,
    ) -> Result<String, Unsignable> {
        let header = Header {
            kid: Some(self.id.clone()),
            ..Header::new(Algorithm::ES256)
        };
        let claims = json!({
            "sub": identity.as_str(), "aud": audience.to_vec(), "iat": issued, "exp": expires,
        });
        jsonwebtoken::encode(&header, &claims, &self.key)
            .map_err(|error| Unsignable::Failed(error.to_string()))
    }
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
