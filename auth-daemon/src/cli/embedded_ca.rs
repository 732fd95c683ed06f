//! The embedded CA as the daemon's issuer.

use std::{sync::Arc, time::Duration};

use crate::issuer::{IssueError, IssueFuture, Issued, Issuer};
use auth_ca::embedded::EmbeddedCa;
use auth_mesh::Identity;
use auth_tunnel::tls::trust::TrustStore;

impl Issuer for EmbeddedCa {
    fn issue_for<'a>(
        &'a self,
        identity: &'a Identity,
        csr: &'a [u8],
        lifetime: Duration,
    ) -> IssueFuture<'a> {
        let issued = EmbeddedCa::issue(self, identity, csr, lifetime);
        let issued = issued
            .map(|chain| Issued { chain })
            .map_err(IssueError::from);
        Box::pin(std::future::ready(issued))
    }

    fn trust(&self) -> &Arc<TrustStore> {
        EmbeddedCa::trust(self)
    }
}
