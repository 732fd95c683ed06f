//! How the CA's own server speaks TLS: with a certificate of its own, renewed in time, and to callers who may show one.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwapOption;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    pki_types::{CertificateDer, UnixTime},
    server::{
        NoServerSessionStorage, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::{authority::Authority, server::Leader};
use crate::{
    mesh::TrustDomain,
    tunnel::{svid::Svid, tls::provider},
};

const RETRY: Duration = Duration::from_secs(1);
/// A clock that is set changes when a certificate is due: look again at least this often.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// What handshakes are made with. None before the first leader of this process.
pub(super) type Current = Arc<ArcSwapOption<ServerConfig>>;

/// TLS 1.3 and HTTP/2 as the holder of `key`. A client may stay without a certificate; one that shows a certificate
/// must hold an SVID of the trust domain that leads to one of `roots`.
pub(super) fn config(
    key: Arc<CertifiedKey>,
    roots: &[CertificateDer<'static>],
    trust_domain: &TrustDomain,
) -> Result<ServerConfig, Error> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone())?;
    }
    let provider = Arc::new(provider());
    let webpki = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider.clone())
        .allow_unauthenticated()
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| Error::General(error.to_string()))?;
    let verifier = Arc::new(WorkloadsOnly {
        trust_domain: trust_domain.clone(),
        webpki,
    });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would not show its certificate again; and callers come seldom.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Makes `current` anew, and says when to do so again.
pub(super) fn renew(
    leader: &Authority,
    roots: &[CertificateDer<'static>],
    names: &[String],
    trust_domain: &TrustDomain,
    current: &Current,
) -> Duration {
    let made = leader
        .serving_certificate(names)
        .map_err(|error| error.to_string())
        .and_then(|(key, due)| {
            let config = config(key, roots, trust_domain).map_err(|error| error.to_string())?;
            Ok((config, due))
        });
    match made {
        Ok((config, due)) => {
            current.store(Some(Arc::new(config)));
            let wait = due.duration_since(SystemTime::now()).unwrap_or_default();
            tracing::debug!(
                renew_in_seconds = wait.as_secs(),
                "the CA's own certificate is new"
            );
            wait.max(RETRY)
        }
        Err(error) => {
            tracing::error!(%error, "the CA's own certificate cannot be renewed; trying again");
            RETRY
        }
    }
}

/// Keeps `current` in step with the authority: at a new leader, at new roots, and when the certificate is due.
pub(super) async fn keep_current(
    mut authority: Leader,
    names: Vec<String>,
    trust_domain: TrustDomain,
    current: Current,
) {
    loop {
        let leader = authority.borrow_and_update().clone();
        // Who was the leader goes on with its last certificate, to say that it no longer is.
        let Some(leader) = leader else {
            if authority.changed().await.is_err() {
                return;
            }
            continue;
        };
        let mut published = leader.published();
        let roots = published.borrow_and_update().roots.clone();
        let wait = renew(&leader, &roots, &names, &trust_domain, &current);
        let new_roots = async {
            while published.changed().await.is_ok() {
                if published.borrow_and_update().roots != roots {
                    return;
                }
            }
            std::future::pending().await
        };
        tokio::select! {
            changed = authority.changed() => if changed.is_err() { return },
            () = new_roots => {}
            () = tokio::time::sleep(wait.min(LOOK_AGAIN)) => {}
        }
    }
}

/// Lets in callers without a certificate, and those with a workload's.
#[derive(Debug)]
struct WorkloadsOnly {
    trust_domain: TrustDomain,
    webpki: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for WorkloadsOnly {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Svid::parse(end_entity, self.trust_domain.as_str())
            .map_err(|error| CertificateError::Other(OtherError(Arc::new(error))))?;
        self.webpki
            .verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}
