//! TLS of the CA's server: a certificate of its own, renewed in time, and callers with or without a client certificate.

use std::{
    convert::Infallible,
    future::pending,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use auth_mesh::TrustDomain;
use auth_tunnel::tls::{
    Verifier, provider,
    trust::{Trust, TrustBundle, TrustStore},
};
use rustls::{
    Error, ServerConfig,
    pki_types::CertificateDer,
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use tokio::time::sleep;

use crate::authority::{Authority, Leader};

const RETRY: Duration = Duration::from_secs(1);
/// How often the clock is read at least, because it may be set.
const CHECK: Duration = Duration::from_secs(600);

/// The configuration of new handshakes; `None` before this process was the leader for the first time.
pub(crate) type CurrentTls = Arc<ArcSwapOption<ServerConfig>>;

/// TLS 1.3 and HTTP/2 as the holder of `key`. A client may stay without a certificate; one that shows a certificate
/// must hold an SVID of the trust domain that leads to one of `roots`.
fn config(
    key: Arc<CertifiedKey>,
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
) -> Result<ServerConfig, Error> {
    let provider = Arc::new(provider());
    // Revocations are checked for each request, because they change while a connection is open.
    let trust = TrustStore::new(Trust::fixed(TrustBundle::of_roots(
        trust_domain.clone(),
        roots.to_vec(),
    )));
    let verifier = Verifier::new(Arc::new(trust), provider.clone())?.of_ca();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would not present its certificate again, and callers connect rarely.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Keeps `current` the configuration for callers, with a certificate for `names`, forever.
pub(crate) async fn keep_current(
    authority: Leader,
    names: &[String],
    trust_domain: &TrustDomain,
    current: &CurrentTls,
) -> Infallible {
    let make = |leader: &Authority, roots: &[_]| make(leader, roots, names, trust_domain);
    renew(authority, current, make).await
}

/// Renews `current` when this replica becomes the leader, when the roots change, and when the certificate is due, forever.
/// `make` returns a configuration with a new certificate, and when to renew it.
pub(crate) async fn renew(
    mut authority: Leader,
    current: &CurrentTls,
    make: impl Fn(&Authority, &[CertificateDer<'static>]) -> Result<(ServerConfig, SystemTime), String>,
) -> Infallible {
    loop {
        // A former leader keeps its last certificate, so that it can tell callers that it is no longer the leader.
        let Ok(Some(leader)) = authority
            .wait_for(Option::is_some)
            .await
            .map(|leader| leader.clone())
        else {
            return pending().await;
        };
        let mut published = leader.published();
        let roots = published.borrow_and_update().roots.clone();
        let wait = match make(&leader, &roots) {
            Ok((config, due)) => {
                current.store(Some(Arc::new(config)));
                let wait = due.duration_since(SystemTime::now()).unwrap_or_default();
                tracing::debug!(
                    renew_in_seconds = wait.as_secs(),
                    "server certificate renewed"
                );
                wait.max(RETRY)
            }
            Err(error) => {
                tracing::error!(error, "server certificate cannot be renewed; retrying");
                RETRY
            }
        };
        let new_roots = async {
            drop(published.wait_for(|now| now.roots != roots).await);
        };
        tokio::select! {
            changed = authority.changed() => if changed.is_err() { return pending().await },
            () = new_roots => {}
            () = sleep(wait.min(CHECK)) => {}
        }
    }
}

/// A configuration with a new certificate, and when to renew it.
fn make(
    leader: &Authority,
    roots: &[CertificateDer<'static>],
    names: &[String],
    trust_domain: &TrustDomain,
) -> Result<(ServerConfig, SystemTime), String> {
    let certificate = leader.server_certificate(names);
    let (key, due) = certificate.map_err(|error| error.to_string())?;
    let config = config(key, roots, trust_domain).map_err(|error| error.to_string())?;
    Ok((config, due))
}
