//! Tokens of an OIDC issuer, verified with its published keys.

use jsonwebtoken::{
    Algorithm, Validation, dangerous,
    errors::{Error, ErrorKind},
};
use serde::{Deserialize, de::DeserializeOwned};

use super::{Unattested, keys::Keys};
use crate::config::OidcIssuer;

/// Signature algorithms that are accepted: none with a shared secret.
const ALGORITHMS: [Algorithm; 4] = [
    Algorithm::RS256,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];
/// Verifies the tokens of one issuer.
#[derive(Debug)]
pub(super) struct Tokens {
    issuer: OidcIssuer,
    keys: Keys,
    /// Tolerated difference of the issuer's clock, in seconds.
    leeway: u64,
}

/// The only claim that is read before the signature is verified.
#[derive(Deserialize)]
struct Unverified {
    iss: String,
}

impl Tokens {
    /// Accepts tokens of `issuer`, whose clock may differ by `leeway` seconds. Fails if the file with the issuer's keys cannot
    /// be used.
    pub(super) fn open(issuer: OidcIssuer, leeway: u64) -> Result<Self, String> {
        let keys = Keys::open(issuer.source.clone())?;
        Ok(Self {
            issuer,
            keys,
            leeway,
        })
    }

    /// Returns the claims of `token`, or `None` if it is not of this issuer.
    pub(super) async fn verify<C: DeserializeOwned>(
        &self,
        token: &str,
    ) -> Option<Result<C, Unattested>> {
        let unverified: Unverified = dangerous::insecure_decode_claims(token).ok()?;
        if unverified.iss != self.issuer.issuer {
            return None;
        }
        Some(self.claims(token).await)
    }

    async fn claims<C: DeserializeOwned>(&self, token: &str) -> Result<C, Unattested> {
        let refused = |why: String| Unattested(why);
        let header = jsonwebtoken::decode_header(token)
            .ok()
            .filter(|header| ALGORITHMS.contains(&header.alg))
            .ok_or_else(|| {
                refused("the token is not signed with RS256, ES256, ES384 or EdDSA".into())
            })?;
        // None of the extensions that could be listed here is supported (RFC 7515 §4.1.11).
        if header.crit.is_some() {
            return Err(refused(
                "the token has an unsupported critical header".into(),
            ));
        }
        let key = self
            .keys
            .find(header.kid.as_deref(), header.alg)
            .await
            .ok_or_else(|| {
                refused(format!(
                    "the token is signed with a key that {} does not publish",
                    self.issuer.issuer
                ))
            })?;
        let mut validation = Validation::new(header.alg);
        validation.set_issuer(&[&self.issuer.issuer]);
        validation.set_audience(&[&self.issuer.audience]);
        validation.set_required_spec_claims(&["aud", "exp", "iss"]);
        validation.validate_nbf = true;
        validation.leeway = self.leeway;
        jsonwebtoken::decode::<C>(token, &key, &validation)
            .map(|token| token.claims)
            .map_err(|error| refused(self.explain(&error)))
    }

    /// Explains `error` without any part of the token.
    fn explain(&self, error: &Error) -> String {
        let OidcIssuer {
            issuer, audience, ..
        } = &self.issuer;
        match error.kind() {
            ErrorKind::ExpiredSignature => "the token has expired".into(),
            ErrorKind::ImmatureSignature => {
                "the token is not valid yet: check the clocks of the issuer and the CA (NTP)".into()
            }
            ErrorKind::InvalidAudience => {
                format!("the token is for another audience than {audience}")
            }
            ErrorKind::InvalidIssuer => format!("the token's issuer is not {issuer}"),
            ErrorKind::InvalidSignature => format!("the token's signature is not that of {issuer}"),
            ErrorKind::MissingRequiredClaim(claim) => format!("the token has no {claim}"),
            _ => "the token cannot be read".into(),
        }
    }
}
