//! Issuance of JWT-SVIDs.

use std::time::Duration;

use auth_jwt::Audience;
use auth_mesh::Identity;

use super::{Authority, Holder, Refusal, check_signing};

/// Lifetime of a token. It is short because a token cannot be revoked; only daemons refuse those of a revoked identity.
const LIFETIME: Duration = Duration::from_secs(5 * 60);

/// What [`Authority::issue_jwt`] returns.
#[derive(Debug)]
pub(crate) struct IssuedJwt {
    /// The token, in compact form.
    pub(crate) token: String,
    /// When it expires, in seconds since the Unix epoch.
    pub(crate) expires: u64,
}

impl Authority {
    /// Signs a JWT-SVID that proves `identity`, which runs on `node`, to `audience`. The token is valid for five minutes, or for
    /// the longest lifetime of a certificate if that is shorter.
    pub(crate) fn issue_jwt(
        &self,
        identity: &Identity,
        audience: &Audience,
        node: &str,
    ) -> Result<IssuedJwt, Refusal> {
        self.check_trust_domain(identity)?;
        let (view, holder) = (self.view.load_full(), Holder::Node(node));
        view.check(identity, holder)?;
        let now = self.clock.now();
        let expires = now + LIFETIME.min(self.settings.max_lifetime).as_secs();
        let token = view.jwt.sign(identity, audience, now, expires);
        let token = token.map_err(|error| Refusal::State(error.to_string()))?;
        // The state may have changed meanwhile.
        let current = self.view.load();
        current.check(identity, holder)?;
        check_signing(&view, &current)?;
        Ok(IssuedJwt { token, expires })
    }
}
