//! Certificates for apps themselves. Their keys leave the daemon, so they are never those of the tunnels.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
};

use super::{
    Certificates,
    keeper::{Holder, certified_key},
};
use auth_mesh::Identity;
use auth_tunnel::tls::svid::Svid;
use auth_workload_api::{Served, X509Svid};

/// A certificate for an app, with a key of its own. Requested when the app first asks for it, then renewed until this is
/// dropped.
#[derive(Debug)]
pub struct AppCertificate {
    /// What the workload API needs of it.
    pub served: Served,
    renewal: AbortHandle,
}

impl Certificates {
    /// Creates a certificate of `identity` for an app, to be issued for `lifetime`, or for the issuer's usual lifetime if that is
    /// shorter. Must be called within a tokio runtime, where renewals run.
    pub fn for_app(&self, identity: &Identity, lifetime: Duration) -> AppCertificate {
        let (sender, svid) = watch::channel(None);
        let served = Served {
            identity: identity.clone(),
            svid,
            wanted: Arc::new(Notify::new()),
            trust: self.trust().clone(),
            jwts: self.jwts.clone(),
        };
        let handed_over = Arc::new(HandedOver {
            identity: identity.clone(),
            lifetime,
            sender,
        });
        let (keeper, wanted) = (self.keeper.clone(), served.wanted.clone());
        let renewal = tokio::spawn(async move {
            wanted.notified().await;
            keeper.keep_current(handed_over).await;
        });
        AppCertificate {
            served,
            renewal: renewal.abort_handle(),
        }
    }
}

impl Drop for AppCertificate {
    fn drop(&mut self) {
        self.renewal.abort();
    }
}

/// The keeper's side.
struct HandedOver {
    identity: Identity,
    lifetime: Duration,
    sender: watch::Sender<Option<Arc<X509Svid>>>,
}

impl Holder for HandedOver {
    const PURPOSE: &'static str = "workload API";
    const WITHOUT: &'static str = "; the app gets none";

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn lifetime(&self) -> Duration {
        self.lifetime
    }

    fn held(&self) -> Option<Svid> {
        let held = self.sender.borrow();
        held.as_ref().map(|held| held.svid.clone())
    }

    fn hold(&self, issued: X509Svid) -> Result<(), rustls::Error> {
        certified_key(&issued)?;
        self.sender.send_replace(Some(Arc::new(issued)));
        Ok(())
    }
}
