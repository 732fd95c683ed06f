//! The bundle endpoint: serves the roots of the CA's trust domain to other trust domains (SPIFFE Federation §5). Callers are
//! not authenticated, as the specification demands: roots are public.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use auth_federation::Bundle;
use auth_mesh::{SpiffeId, TrustDomain};
use auth_support::{
    connection_limit::{ConnectionLimit, ConnectionPermit, source_of},
    http_server::answer_one,
};
use axum::{
    Router,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::NoServerSessionStorage,
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    authority::Leader,
    config::{BundleEndpoint, EndpointCertificate},
    server_tls::{self, CurrentTls},
};

/// Path of the SPIFFE ID in the CA's own X.509-SVID. No service account has one like it.
const ID_PATH: &str = "/auth-daemon/bundle-endpoint";
const MAX_CONNECTIONS: usize = 256;
const MAX_CONNECTIONS_PER_SOURCE: usize = 16;
/// From TCP to the end of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How often the certificate's files are read.
const READ_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after a failed accept, which usually means a shortage of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The bound server of the endpoint.
pub struct BundleServer {
    listener: TcpListener,
    certificate: Certificate,
    refresh_hint: Duration,
    leader: Leader,
}

enum Certificate {
    Svid(SpiffeId),
    Files(Files),
}

impl BundleServer {
    /// Binds the address of `endpoint`. Fails if that or a certificate from files cannot be used.
    pub async fn bind(
        endpoint: &BundleEndpoint,
        trust_domain: &TrustDomain,
        leader: Leader,
    ) -> anyhow::Result<Self> {
        let address = endpoint.listen;
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("bundleEndpoint.listen: cannot listen on {address}"))?;
        let certificate = match &endpoint.certificate {
            EndpointCertificate::Svid => {
                let id = SpiffeId::new(trust_domain, ID_PATH)?;
                tracing::info!(%address, spiffe_id = id.as_str(), "bundle endpoint opened, profile https_spiffe");
                Certificate::Svid(id)
            }
            EndpointCertificate::Files { certificate, key } => {
                let files = Files::read(certificate, key).context("bundleEndpoint")?;
                files.config().context("bundleEndpoint.certificateFile")?;
                tracing::info!(%address, "bundle endpoint opened, profile https_web");
                Certificate::Files(files)
            }
        };
        Ok(Self {
            listener,
            certificate,
            refresh_hint: endpoint.refresh_hint,
            leader,
        })
    }

    /// Serves forever. While this replica is not the leader, it has no bundle.
    pub async fn run(self) {
        let tls = CurrentTls::default();
        let routes = routes(self.leader.clone(), self.refresh_hint);
        let serve = accept(self.listener, &tls, &routes);
        match self.certificate {
            Certificate::Svid(id) => {
                let renewal = server_tls::renew(self.leader, &tls, |leader, _| {
                    let (key, due) = leader.server_svid(&id).map_err(|error| error.to_string())?;
                    let config = config(key).map_err(|error| error.to_string())?;
                    Ok((config, due))
                });
                tokio::select! {
                    // First, so that the first caller finds a certificate.
                    biased;
                    never = renewal => match never {},
                    () = serve => {}
                }
            }
            Certificate::Files(files) => {
                tokio::join!(files.keep_current(&tls), serve);
            }
        }
    }
}

fn routes(leader: Leader, refresh_hint: Duration) -> Router {
    let bundle = move || std::future::ready(bundle(&leader, refresh_hint));
    Router::new().route("/", get(bundle))
}

/// The bundle that the leader publishes now.
fn bundle(leader: &Leader, refresh_hint: Duration) -> Response {
    let Some(authority) = leader.borrow().clone() else {
        let why = "this replica is not the leader: ask again\n";
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    };
    let published = authority.published().borrow().clone();
    let bundle = Bundle {
        sequence: Some(published.version),
        refresh_hint: Some(refresh_hint),
        roots: published.roots.clone(),
        jwt_keys: published.jwt_keys.clone(),
    };
    match bundle.to_json() {
        Ok(document) => ([(CONTENT_TYPE, "application/json")], document).into_response(),
        Err(error) => {
            tracing::error!(error, "bundle cannot be served");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Answers callers, forever. Connections are limited in total and for each source, and so are their times.
async fn accept(listener: TcpListener, tls: &CurrentTls, routes: &Router) {
    let connections = ConnectionLimit::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
    let connections = Arc::new(connections);
    loop {
        let (tcp, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a caller of the bundle endpoint");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let permit = admit(&connections, address);
        // A replica that was never the leader has no certificate.
        let (Some(permit), Some(tls)) = (permit, tls.load_full()) else {
            tracing::debug!(peer = %address, "caller of the bundle endpoint refused");
            continue;
        };
        let routes = routes.clone();
        tokio::spawn(async move {
            answer(tcp, tls, routes).await;
            drop(permit);
        });
    }
}

fn admit(connections: &Arc<ConnectionLimit>, caller: SocketAddr) -> Option<ConnectionPermit> {
    connections.admit(source_of(caller.ip()))
}

async fn answer(tcp: TcpStream, tls: Arc<ServerConfig>, routes: Router) {
    match timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(tcp)).await {
        Ok(Ok(stream)) => answer_one(stream, routes).await,
        Ok(Err(error)) => tracing::debug!(%error, "handshake at the bundle endpoint failed"),
        Err(_) => tracing::debug!("handshake at the bundle endpoint not finished in time"),
    }
}

/// A certificate and its key in files, in PEM.
struct Files {
    paths: [PathBuf; 2],
    content: [Vec<u8>; 2],
}

impl Files {
    fn read(certificate: &Path, key: &Path) -> anyhow::Result<Self> {
        let read = |path: &Path| fs::read(path).with_context(|| path.display().to_string());
        Ok(Self {
            content: [read(certificate)?, read(key)?],
            paths: [certificate.to_owned(), key.to_owned()],
        })
    }

    fn config(&self) -> anyhow::Result<ServerConfig> {
        let [certificate, key] = &self.content;
        let [certificate_path, key_path] = &self.paths;
        let named = |path: &Path| path.display().to_string();
        let chain = CertificateDer::pem_slice_iter(certificate)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| named(certificate_path))?;
        let key = PrivateKeyDer::from_pem_slice(key).with_context(|| named(key_path))?;
        let key = aws_lc_rs::default_provider()
            .key_provider
            .load_private_key(key)
            .with_context(|| named(key_path))?;
        let certified = CertifiedKey::new(chain, key);
        certified
            .keys_match()
            .with_context(|| format!("{} and {}", named(certificate_path), named(key_path)))?;
        Ok(config(Arc::new(certified))?)
    }

    /// Keeps `current` what the files say, forever.
    async fn keep_current(mut self, current: &CurrentTls) {
        // `bind` has checked it.
        current.store(self.config().ok().map(Arc::new));
        loop {
            sleep(READ_INTERVAL).await;
            let [certificate, key] = &self.paths;
            let read = Self::read(certificate, key);
            if read.as_ref().is_ok_and(|now| now.content == self.content) {
                continue;
            }
            match read.and_then(|now| Ok((now.config()?, now))) {
                Ok((config, now)) => {
                    current.store(Some(Arc::new(config)));
                    tracing::info!("certificate of the bundle endpoint replaced");
                    self = now;
                }
                // A certificate and its key are replaced one after the other.
                Err(error) => tracing::warn!(
                    error = format!("{error:#}"),
                    "certificate of the bundle endpoint cannot be replaced yet; keeping the one before"
                ),
            }
        }
    }
}

/// TLS 1.2 and 1.3, as web servers have it, without client certificates.
fn config(key: Arc<CertifiedKey>) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use auth_ca_api::pem;
    use auth_federation::{Endpoint, Profile, fetch};
    use rcgen::{CertificateParams, KeyPair};
    use tokio::sync::watch;

    use super::*;
    use crate::{
        authority::Authority,
        config::{Root, RootSettings, Settings},
        store::directory::DirectoryStore,
    };

    const HINT: Duration = Duration::from_secs(30);

    /// A CA, and its endpoint on the loopback.
    struct Served {
        _folder: tempfile::TempDir,
        ca: Arc<Authority>,
        lead: watch::Sender<Option<Arc<Authority>>>,
        address: SocketAddr,
    }

    impl Served {
        async fn new(certificate: EndpointCertificate) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Arc::new(DirectoryStore::open(folder.path()).unwrap());
            let settings = Settings {
                trust_domain: "far.example".parse().unwrap(),
                root: Root::SelfSigned(RootSettings::default()),
                max_lifetime: Duration::from_secs(3600),
                taken_nodes: None,
            };
            let ca = Authority::open(store, settings).await.unwrap();
            let (lead, leader) = watch::channel(Some(ca.clone()));
            let endpoint = BundleEndpoint {
                listen: "127.0.0.1:0".parse().unwrap(),
                certificate,
                refresh_hint: HINT,
            };
            let domain = "far.example".parse().unwrap();
            let server = BundleServer::bind(&endpoint, &domain, leader)
                .await
                .unwrap();
            let address = server.listener.local_addr().unwrap();
            tokio::spawn(server.run());
            Self {
                _folder: folder,
                ca,
                lead,
                address,
            }
        }

        async fn fetch(&self, profile: Profile) -> Result<Bundle, String> {
            let url = format!("https://{}/", self.address).parse().unwrap();
            let roots = self.ca.published().borrow().roots.clone();
            fetch(&Endpoint { url, profile }, |_| Some(roots)).await
        }
    }

    fn spiffe(id: &str) -> Profile {
        Profile::Spiffe {
            id: id.parse().unwrap(),
        }
    }

    #[test]
    fn one_ipv6_network_cannot_take_all_connections() {
        let limit = ConnectionLimit::new(MAX_CONNECTIONS, MAX_CONNECTIONS_PER_SOURCE);
        let limit = Arc::new(limit);
        let admit = |address: &str| admit(&limit, format!("[{address}]:1").parse().unwrap());
        let held = (0..MAX_CONNECTIONS).map_while(|n| admit(&format!("2001:db8::{n:x}")));
        let held: Vec<_> = held.collect();
        assert_eq!(held.len(), MAX_CONNECTIONS_PER_SOURCE);
        assert!(admit("2001:db8:0:1::1").is_some(), "another network");
    }

    #[tokio::test]
    async fn serves_with_an_svid_of_its_own() {
        let served = Served::new(EndpointCertificate::Svid).await;
        let right = || spiffe("spiffe://far.example/auth-daemon/bundle-endpoint");
        let bundle = served.fetch(right()).await.unwrap();
        let published = served.ca.published().borrow().clone();
        assert_eq!(bundle.roots, published.roots);
        assert_eq!(
            (&bundle.jwt_keys, bundle.jwt_keys.len()),
            (&published.jwt_keys, 1)
        );
        assert_eq!(bundle.sequence, Some(published.version));
        assert_eq!(bundle.refresh_hint, Some(HINT));

        let other = served.fetch(spiffe("spiffe://far.example/other")).await;
        let why = other.unwrap_err();
        assert!(why.contains("not of spiffe://far.example/other"), "{why}");
        let url = format!("https://{}/", served.address).parse().unwrap();
        let endpoint = Endpoint {
            url,
            profile: right(),
        };
        let why = fetch(&endpoint, |_| None).await.unwrap_err();
        assert!(why.contains("there is no bundle of far.example"), "{why}");
        let stranger = Served::new(EndpointCertificate::Svid).await;
        let roots = stranger.ca.published().borrow().roots.clone();
        let why = fetch(&endpoint, |_| Some(roots)).await.unwrap_err();
        assert!(why.contains("not issued by its trust domain's CA"), "{why}");

        served.ca.rotate_root().await.unwrap();
        let rotated = served.fetch(right()).await.unwrap();
        assert_eq!((rotated.roots.len(), rotated.jwt_keys.len()), (2, 2));
        assert!(rotated.sequence > bundle.sequence);
        served.lead.send_replace(None);
        let why = served.fetch(right()).await.unwrap_err();
        assert!(why.contains("answers 503"), "{why}");
    }

    #[tokio::test]
    async fn serves_with_a_certificate_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(path("certificate"), certificate.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        let served = Served::new(EndpointCertificate::Files {
            certificate: path("certificate"),
            key: path("key"),
        })
        .await;
        let web = |root: &str| Profile::Web {
            root_file: Some(path(root)),
        };
        let bundle = served.fetch(web("certificate")).await.unwrap();
        assert_eq!(bundle.roots, served.ca.published().borrow().roots);
        // The roots of a trust domain verify no web server.
        fs::write(path("roots"), pem::certificates(&bundle.roots)).unwrap();
        let why = served.fetch(web("roots")).await.unwrap_err();
        assert!(why.contains("certificate"), "{why}");

        fs::write(path("key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        let files = Files::read(&path("certificate"), &path("key")).unwrap();
        assert!(files.config().is_err(), "another key");
    }
}
