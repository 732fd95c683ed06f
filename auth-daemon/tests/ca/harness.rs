//! A CA in this process, and callers that speak to it over TLS.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use auth_ca::{
    attest::{Attestor, jwks::Jwks, people::People, static_token::StaticTokens},
    authority::Authority,
    config::CaConfig,
    quotas::{Limits, Rate},
    server::Server,
    status::CaStatus,
    store::directory::DirectoryStore,
};
use auth_ca_api::{
    IMPERSONATED_IDENTITY,
    auth::{
        StatusRequest, operator_client::OperatorClient, trust_service_client::TrustServiceClient,
    },
    istio::{
        IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
    },
    pem,
};
use auth_daemon::config::{CaServer, Proof};
use auth_mesh::{Identity, Inventory, ObjectName, Registry, Snapshot, TrustDomain, Workload};
use auth_tunnel::tls::provider;
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header, jwk::Jwk};
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    net::{TcpSocket, UnixStream},
    sync::{Mutex, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Request, Status,
    codegen::http::Uri,
    transport::{Channel, Endpoint},
};

pub(crate) const DOMAIN: &str = "cluster.local";
pub(crate) const NAME: &str = "ca.test";
pub(crate) const ISSUER: &str = "https://issuer.example";
pub(crate) const LOGIN: &str = "https://login.example";
pub(crate) const AUDIENCE: &str = "auth-daemon-ca";

/// Held by tests that keep all processors busy for seconds, so that they do not measure one another.
pub(crate) static BUSY: Mutex<()> = Mutex::const_new(());

pub(crate) fn domain() -> TrustDomain {
    DOMAIN.parse().unwrap()
}

pub(crate) fn identity(account: &str) -> Identity {
    domain().identity("default", account).unwrap()
}

/// The token of a node.
pub(crate) fn token(node: &str) -> String {
    format!("token-of-node-{node}-{}", "x".repeat(32))
}

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `condition` holds, and fails after half a minute.
pub(crate) async fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    for _ in 0..3000 {
        if let Some(value) = condition() {
            return value;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}: not within half a minute");
}

/// An OIDC issuer.
pub(crate) struct Issuer {
    key: EncodingKey,
    jwk: Value,
}

impl Issuer {
    pub(crate) fn new() -> Self {
        let key = EncodingKey::from_ec_der(&KeyPair::generate().unwrap().serialize_der());
        let mut jwk = Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap();
        jwk.common.key_id = Some("one".into());
        Self {
            key,
            jwk: serde_json::to_value(jwk).unwrap(),
        }
    }

    /// Publishes the issuer's key in `folder`. Returns the lines by which [`write_config`] makes the CA trust it, for
    /// service accounts as [`ISSUER`] and for people as [`LOGIN`].
    pub(crate) fn trusted(&self, folder: &Path) -> String {
        let jwks = folder.join("jwks");
        fs::write(&jwks, json!({ "keys": [self.jwk] }).to_string()).unwrap();
        format!(
            "  jwks: {{issuer: '{ISSUER}', audience: {AUDIENCE}, jwksFile: {jwks}}}\n\
             \x20 people: {{issuer: '{LOGIN}', audience: {AUDIENCE}, jwksFile: {jwks}, nameClaim: email, \
             accounts: [{{account: default/web, groups: [oncall]}}]}}\n",
            jwks = jwks.display(),
        )
    }

    /// A token of a person in the group `oncall`, who may act as `web`.
    pub(crate) fn person(&self, email: &str) -> String {
        self.token("", "", |claims| {
            *claims = json!({
                "iss": LOGIN, "aud": AUDIENCE, "exp": claims["exp"], "sub": "u1", "email": email,
                "groups": ["oncall"],
            });
        })
    }

    /// A token of a pod of `account` on `node`, changed.
    pub(crate) fn token(
        &self,
        account: &str,
        node: &str,
        change: impl FnOnce(&mut Value),
    ) -> String {
        let mut claims = json!({
            "iss": ISSUER, "aud": [AUDIENCE], "exp": jsonwebtoken::get_current_timestamp() + 600,
            "sub": format!("system:serviceaccount:default:{account}"),
            "kubernetes.io": {
                "namespace": "default", "serviceaccount": {"name": account}, "node": {"name": node},
            },
        });
        change(&mut claims);
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("one".into());
        jsonwebtoken::encode(&header, &claims, &self.key).unwrap()
    }
}

/// A running CA.
pub(crate) struct Ca {
    pub(crate) folder: Arc<tempfile::TempDir>,
    pub(crate) config: CaConfig,
    pub(crate) address: SocketAddr,
    pub(crate) authority: Arc<Authority>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) issuer: Arc<Issuer>,
    pub(crate) lead: watch::Sender<Option<Arc<Authority>>>,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
    work: JoinHandle<()>,
}

/// Quotas that no test uses up.
pub(crate) fn unlimited() -> Limits {
    Limits {
        node: Rate::new(1_000_000, 1_000_000),
        concurrent: 10_000,
        identity: Rate::new(1_000_000, 1_000_000),
        identities: 10_000,
        ..Limits::default()
    }
}

/// The configuration of a CA with all of its files in `folder`.
pub(crate) fn write_config(folder: &Path, listen: &str, more: &str) -> PathBuf {
    let at = |name: &str| folder.join(name).display().to_string();
    for node in ["a", "b"] {
        fs::write(at(node), token(node)).unwrap();
    }
    fs::create_dir_all(at("manifests")).unwrap();
    let config = format!(
        "trustDomain: {DOMAIN}\nlisten: {listen}\nserverNames: [{NAME}, 127.0.0.1]\ndirectory: {}\n\
         operatorSocket: {}\nrotationSpread: 1s\ndiscovery: {{files: {}}}\nattestation:\n\
         \x20 tokens: [{{node: a, tokenFile: {}}}, {{node: b, tokenFile: {}}}]\n{more}",
        at("state"),
        at("run/operator.sock"),
        at("manifests"),
        at("a"),
        at("b"),
    );
    let path = folder.join("ca.yaml");
    fs::write(&path, config).unwrap();
    path
}

impl Ca {
    /// Pods of `web` run on node a, of `api` on node b.
    pub(crate) async fn start() -> Self {
        Self::start_with(Limits::default()).await
    }

    /// The same, with other quotas.
    pub(crate) async fn start_with(limits: Limits) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        Self::start_in(folder, Arc::new(Issuer::new()), "127.0.0.1:0", limits).await
    }

    pub(crate) async fn start_in(
        folder: Arc<tempfile::TempDir>,
        issuer: Arc<Issuer>,
        listen: &str,
        limits: Limits,
    ) -> Self {
        let more = issuer.trusted(folder.path());
        let config = CaConfig::load(&write_config(folder.path(), listen, &more)).unwrap();
        let registry = Arc::new(Registry::new());
        registry.publish(snapshot([pod("web", "a"), pod("api", "b")]));
        let attestation = &config.attestation;
        let (jwks, people) = (attestation.jwks.clone(), attestation.people.clone());
        let attestors: Vec<Arc<dyn Attestor>> = vec![
            Arc::new(StaticTokens::open(&attestation.tokens).unwrap()),
            Arc::new(Jwks::open(jwks.unwrap(), domain(), registry.clone()).unwrap()),
            Arc::new(People::open(people.unwrap(), domain()).unwrap()),
        ];
        let store = Arc::new(DirectoryStore::open(&folder.path().join("state")).unwrap());
        let authority = Authority::open(store, config.settings()).await.unwrap();
        let (lead, leader) = watch::channel(Some(authority.clone()));
        let server = Server::bind(&config, attestors, registry.clone(), leader, limits)
            .await
            .unwrap();
        let address = server.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let work = authority.clone();
        Self {
            folder,
            config,
            address,
            authority,
            registry,
            issuer,
            lead,
            stop,
            server: tokio::spawn(server.run(stopped)),
            work: tokio::spawn(async move { work.run().await }),
        }
    }

    /// Stops it as SIGTERM does, and waits until it has stopped.
    pub(crate) async fn stop(self) -> (Arc<tempfile::TempDir>, Arc<Issuer>, SocketAddr) {
        self.stop.send_replace(true);
        self.server.await.unwrap();
        self.work.abort();
        let _ = self.work.await;
        (self.folder, self.issuer, self.address)
    }

    /// From now on, these pods run, and no others.
    pub(crate) fn run_pods(&self, pods: impl IntoIterator<Item = Workload>) {
        self.registry.publish(snapshot(pods));
    }

    pub(crate) fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.authority.published().borrow().roots.clone()
    }

    /// Waits until the first request of `node` has been counted: it is in progress, or has been answered.
    pub(crate) async fn until_asked(&self, node: &str) {
        let socket = self.config.operator_socket.clone();
        let channel = Endpoint::from_static("http://operator")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let stream = UnixStream::connect(socket.clone());
                async move { stream.await.map(TokioIo::new) }
            }))
            .await;
        let mut operator = OperatorClient::new(channel.unwrap());
        let asked = async {
            loop {
                let answer = operator.status(StatusRequest {}).await.unwrap();
                let status: CaStatus = serde_json::from_str(&answer.into_inner().json).unwrap();
                if status.server.nodes.iter().any(|found| found.node == node) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, asked).await.expect("no request");
    }

    /// A daemon's configuration for this CA.
    pub(crate) fn server(&self, node: &str) -> CaServer {
        let roots: String = self
            .roots()
            .iter()
            .map(|root| pem::certificate(root))
            .collect();
        let root_file = self.folder.path().join("roots.pem");
        fs::write(&root_file, roots).unwrap();
        CaServer {
            section: "ca",
            address: self.address.to_string(),
            server_name: NAME.into(),
            root_file,
            proof: Proof::Token(self.folder.path().join(node)),
            cluster_id: "Kubernetes".into(),
        }
    }

    /// A caller without a certificate.
    pub(crate) async fn caller(&self) -> Channel {
        connect(self.address, self.roots(), None).await.unwrap()
    }
}

fn snapshot(pods: impl IntoIterator<Item = Workload>) -> Snapshot {
    Snapshot::new(Inventory {
        workloads: pods.into_iter().collect(),
        services: vec![],
    })
}

pub(crate) fn pod(account: &str, node: &str) -> Workload {
    Workload {
        node: node.into(),
        ..Workload::new(
            ObjectName {
                namespace: "default".into(),
                name: format!("{account}-{node}"),
            },
            identity(account),
        )
    }
}

/// A chain and its key.
pub(crate) type Certified = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// HTTP/2 over TLS to the CA at `address`.
pub(crate) async fn connect(
    address: SocketAddr,
    roots: Vec<CertificateDer<'static>>,
    certificate: Option<Certified>,
) -> Result<Channel, tonic::transport::Error> {
    connect_from(Ipv4Addr::LOCALHOST, address, roots, certificate).await
}

/// The same, from an address of this machine.
pub(crate) async fn connect_from(
    own: Ipv4Addr,
    address: SocketAddr,
    roots: Vec<CertificateDer<'static>>,
    certificate: Option<Certified>,
) -> Result<Channel, tonic::transport::Error> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(roots);
    let config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(store);
    let mut config = match certificate {
        None => config.with_no_client_auth(),
        Some((chain, key)) => config.with_client_auth_cert(chain, key).unwrap(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tls = TlsConnector::from(Arc::new(config));
    Endpoint::from_static("https://ca.test")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let tls = tls.clone();
            async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind((own, 0).into())?;
                let tcp = socket.connect(address).await?;
                tcp.set_nodelay(true)?;
                let stream = tls
                    .connect(ServerName::try_from(NAME).unwrap(), tcp)
                    .await?;
                std::io::Result::Ok(TokioIo::new(stream))
            }
        }))
        .await
}

/// A key and a CSR of it.
pub(crate) fn csr(change: impl FnOnce(&mut CertificateParams)) -> (KeyPair, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    change(&mut params);
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    (key, csr)
}

/// A CSR that openssl(1) makes.
pub(crate) fn openssl_csr(arguments: &[&str]) -> String {
    let output = Command::new("openssl")
        .args([
            "req",
            "-new",
            "-nodes",
            "-subj",
            "/CN=x",
            "-keyout",
            "/dev/null",
        ])
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// One request for a certificate.
pub(crate) struct Ask {
    pub(crate) csr: String,
    pub(crate) bearer: Option<String>,
    pub(crate) identity: Option<String>,
    pub(crate) seconds: i64,
}

impl Ask {
    /// As node a for `web`, with a CSR as it should be.
    pub(crate) fn good() -> Self {
        Self {
            csr: csr(|_| {}).1,
            bearer: Some(token("a")),
            identity: Some(identity("web").to_string()),
            seconds: 3600,
        }
    }

    pub(crate) fn but(change: impl FnOnce(&mut Self)) -> Self {
        let mut ask = Self::good();
        change(&mut ask);
        ask
    }

    /// For the caller itself, who is known by a token or by the connection's certificate.
    pub(crate) fn for_itself(bearer: Option<String>) -> Self {
        Self {
            bearer,
            identity: None,
            ..Self::good()
        }
    }

    /// Sends it, and returns all certificates in the answer.
    pub(crate) async fn send(
        self,
        channel: &Channel,
    ) -> Result<Vec<CertificateDer<'static>>, Status> {
        let all = self.send_plainly(channel).await?.concat();
        let chain = CertificateDer::pem_slice_iter(all.as_bytes());
        Ok(chain.map(Result::unwrap).collect())
    }

    /// Sends it with the generated client of Istio's protocol, and returns the answer's `cert_chain`.
    pub(crate) async fn send_plainly(self, channel: &Channel) -> Result<Vec<String>, Status> {
        let fields = self.identity.map(|identity| {
            let value = prost_types::Value {
                kind: Some(prost_types::value::Kind::StringValue(identity)),
            };
            (IMPERSONATED_IDENTITY.to_owned(), value)
        });
        let mut request = Request::new(IstioCertificateRequest {
            csr: self.csr,
            validity_duration: self.seconds,
            metadata: Some(prost_types::Struct {
                fields: fields.into_iter().collect(),
            }),
        });
        if let Some(bearer) = self.bearer {
            let value = format!("Bearer {bearer}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        let answer = IstioCertificateServiceClient::new(channel.clone())
            .create_certificate(request)
            .await?;
        Ok(answer.into_inner().cert_chain)
    }
}

pub(crate) fn private_key(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.serialize_der()).into()
}

pub(crate) fn watches(channel: &Channel) -> TrustServiceClient<Channel> {
    TrustServiceClient::new(channel.clone())
}
