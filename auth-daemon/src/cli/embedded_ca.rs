//! The embedded CA as the daemon's issuer.

use std::sync::Arc;

use crate::issuer::{IssueError, IssueFuture, Issued, Issuer};
use auth_ca::embedded::EmbeddedCa;
use auth_mesh::Identity;
use auth_tunnel::tls::trust::TrustStore;

impl Issuer for EmbeddedCa {
    fn issue<'a>(&'a self, identity: &'a Identity, csr: &'a [u8]) -> IssueFuture<'a> {
        let issued = EmbeddedCa::issue(self, identity, csr);
        let issued = issued
            .map(|chain| Issued { chain })
            .map_err(IssueError::from);
        Box::pin(std::future::ready(issued))
    }

    fn trust(&self) -> &Arc<TrustStore> {
        EmbeddedCa::trust(self)
    }
}
