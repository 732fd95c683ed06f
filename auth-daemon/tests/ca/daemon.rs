//! The daemon's issuer against the CA, against a CA like istiod, and against one that means harm.

use std::{
    fs,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use auth_ca::{authority::Target, quotas::Limits};
use auth_ca_api::{
    auth::{
        Denial, Trust, WatchRequest,
        trust_service_server::{TrustService, TrustServiceServer},
    },
    istio::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{
            IstioCertificateService, IstioCertificateServiceServer,
        },
    },
    pem,
};
use auth_daemon::{
    config::{CaServer, Proof},
    issuer::CaClient,
    issuer::Issuer as _,
};
use auth_jwt::Audience;
use auth_tunnel::tls::{provider, svid::Svid, trust::Reason};
use futures_util::{StreamExt as _, stream};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair};
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{net::TcpListener, sync::watch};
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status, service::Routes};

use crate::harness::*;

const LIFETIME: Duration = Duration::from_secs(3600);
const CLUSTER: &str = "network-1/cluster-1";
/// Until a daemon knows a revocation. It is two seconds at most, and more only on a busy machine. A daemon that reads instead
/// of watching takes ten seconds.
const SOON: Duration = Duration::from_secs(8);

fn issuer(ca: &Ca, node: &str) -> CaClient {
    CaClient::start(ca.server(node), domain(), LIFETIME).unwrap()
}

/// DER of a CSR.
fn request() -> Vec<u8> {
    let key = KeyPair::generate().unwrap();
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .unwrap();
    csr.der().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_come_with_their_trust() {
    let ca = Ca::start().await;
    let issuer = issuer(&ca, "a");
    let issued = issuer.issue(&identity("web"), &request()).await.unwrap();
    assert_eq!(
        Svid::parse(&issued.chain[0], &domain()).unwrap().identity,
        identity("web")
    );
    assert!(!issued.chain.contains(&ca.roots()[0]), "without the root");
    let trust = issuer.trust().current();
    assert_eq!(trust.bundle.roots, ca.roots());
    assert!(trust.version > 0, "from the CA, not from the file");
    let error = issuer
        .issue(&identity("api"), &request())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("run on node a"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn learns_revocations_soon() {
    let ca = Ca::start().await;
    let issuer = issuer(&ca, "a");
    let issued = issuer.issue(&identity("web"), &request()).await.unwrap();
    let svid = Svid::parse(&issued.chain[0], &domain()).unwrap();
    let serial = svid.serial.parse().unwrap();
    let revoked = || issuer.trust().current().revoked.clone();
    for (target, know) in [
        (
            Target::Serial(serial),
            &(|| revoked().check(&svid).is_err()) as &dyn Fn() -> bool,
        ),
        (Target::Identity(identity("api")), &|| {
            revoked().check_identity(&identity("api")).is_err()
        }),
        (Target::Node("b".into()), &|| {
            revoked().check_node("b").is_err()
        }),
    ] {
        assert!(!know());
        let start = Instant::now();
        ca.authority
            .revoke(target.clone(), Reason::KeyCompromise)
            .await
            .unwrap();
        eventually("revoked", || know().then_some(())).await;
        assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
        ca.authority.unrevoke(target).await.unwrap();
        eventually("not revoked", || (!know()).then_some(())).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconnects_to_a_restarted_ca_that_withdraws_nothing() {
    let ca = Ca::start().await;
    let issuer = issuer(&ca, "a");
    issuer.issue(&identity("web"), &request()).await.unwrap();
    ca.authority
        .revoke(Target::Node("b".into()), Reason::Unspecified)
        .await
        .unwrap();
    let revoked = || issuer.trust().current().revoked.check_node("b").is_err();
    eventually("revoked", || revoked().then_some(())).await;
    let (folder, keys, address) = ca.stop().await;
    assert!(issuer.issue(&identity("web"), &request()).await.is_err());
    assert!(revoked(), "a CA that is down withdraws nothing");
    let ca = Ca::start_in(folder, keys, &address.to_string(), Limits::default()).await;
    ca.authority
        .revoke(Target::Identity(identity("api")), Reason::Unspecified)
        .await
        .unwrap();
    let start = Instant::now();
    let known = || {
        issuer
            .trust()
            .current()
            .revoked
            .check_identity(&identity("api"))
            .is_err()
    };
    eventually("learned", || known().then_some(())).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert!(revoked());
    issuer.issue(&identity("web"), &request()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn learns_a_new_root_before_it_signs() {
    let ca = Ca::start().await;
    let issuer = issuer(&ca, "a");
    issuer.issue(&identity("web"), &request()).await.unwrap();
    let old = ca.roots();
    ca.authority.rotate_root().await.unwrap();
    let roots = || issuer.trust().current().bundle.roots.clone();
    eventually("two roots", || (roots().len() == 2).then_some(())).await;
    // The root file has only the old root. The learned one is used for new connections, too.
    eventually("the new root signs", || {
        (ca.roots()[0] != old[0]).then_some(())
    })
    .await;
    let another = CaClient::start(ca.server("a"), domain(), LIFETIME).unwrap();
    another.issue(&identity("web"), &request()).await.unwrap();
    issuer.issue(&identity("web"), &request()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_thousands_of_certificates() {
    const COUNT: usize = 5000;
    // As many as one daemon has in progress: a request's deadline starts when it is sent.
    const IN_PROGRESS: usize = 64;
    let _busy = BUSY.lock().await;
    let ca = Ca::start_with(unlimited()).await;
    let accounts: Vec<_> = (0..COUNT)
        .map(|number| format!("account-{number}"))
        .collect();
    ca.run_pods(accounts.iter().map(|account| pod(account, "a")));
    let issuer = issuer(&ca, "a");
    let csr = request();
    let issued = stream::iter(&accounts)
        .map(async |account| {
            let identity = identity(account);
            let issued = issuer.issue(&identity, &csr).await.unwrap();
            let svid = Svid::parse(&issued.chain[0], &domain()).unwrap();
            assert_eq!(svid.identity, identity);
        })
        .buffer_unordered(IN_PROGRESS)
        .count()
        .await;
    assert_eq!(issued, COUNT);
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_bad_files_at_the_start() {
    let ca = Ca::start().await;
    let good = ca.server("a");
    let start = |change: fn(&mut CaServer)| {
        let mut server = good.clone();
        change(&mut server);
        CaClient::start(server, domain(), LIFETIME)
            .unwrap_err()
            .to_string()
    };
    let error = start(|server| server.proof = Proof::Token("/nonexistent/token".into()));
    assert!(
        error.contains("ca.tokenFile: /nonexistent/token"),
        "{error}"
    );
    let error = start(|server| server.root_file = server.proof.file().to_owned());
    assert!(error.contains("ca.rootFile"), "{error}");
}

/// Another CA, with the answers of a test.
#[derive(Clone)]
struct Other {
    answer: Arc<Mutex<Vec<String>>>,
    trust: watch::Receiver<Trust>,
}

#[tonic::async_trait]
impl IstioCertificateService for Other {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        // As istiod, which asks the API server of that cluster about the token.
        let cluster = request.metadata().get("clusterid");
        if cluster.is_none_or(|cluster| cluster != CLUSTER) {
            return Err(Status::unauthenticated("no node authorizer for cluster"));
        }
        let cert_chain = self.answer.lock().unwrap().clone();
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

#[tonic::async_trait]
impl TrustService for Other {
    type WatchStream =
        std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<Trust, Status>> + Send>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut trust = self.trust.clone();
        trust.mark_changed();
        let trusts = futures_util::stream::unfold(trust, |mut trust| async move {
            trust.changed().await.ok()?;
            let now = trust.borrow_and_update().clone();
            Some((Ok(now), trust))
        });
        Ok(Response::new(Box::pin(trusts)))
    }
}

/// Such a CA, running.
struct Others {
    folder: tempfile::TempDir,
    address: SocketAddr,
    root: CertificateDer<'static>,
    issuer: rcgen::Issuer<'static, KeyPair>,
    answer: Arc<Mutex<Vec<String>>>,
    trust: watch::Sender<Trust>,
}

impl Others {
    async fn start(with_trust: bool) -> Self {
        let root_key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.distinguished_name.push(DnType::CommonName, "other");
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let root_der = root.self_signed(&root_key).unwrap().der().clone();
        let issuer = rcgen::Issuer::new(root, root_key);
        let key = KeyPair::generate().unwrap();
        let own = CertificateParams::new(vec![NAME.into()]).unwrap();
        let own = own.signed_by(&key, &issuer).unwrap();
        let mut tls = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.der().clone()], private_key(&key))
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = Arc::new(Mutex::new(Vec::new()));
        let (trust, trusts) = watch::channel(Trust {
            version: 1,
            roots: vec![root_der.to_vec()],
            ..Default::default()
        });
        let other = Other {
            answer: answer.clone(),
            trust: trusts,
        };
        let mut routes = Routes::new(IstioCertificateServiceServer::new(other.clone()));
        if with_trust {
            routes = routes.add_service(TrustServiceServer::new(other));
        }
        let service = TowerToHyperService::new(routes.prepare());
        tokio::spawn(async move {
            let tls = TlsAcceptor::from(Arc::new(tls));
            while let Ok((tcp, _)) = listener.accept().await {
                if let Ok(stream) = tls.accept(tcp).await {
                    let service = service.clone();
                    tokio::spawn(async move {
                        let server = auto::Builder::new(TokioExecutor::new());
                        let _ = server.serve_connection(TokioIo::new(stream), service).await;
                    });
                }
            }
        });
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("roots"), pem::certificate(&root_der)).unwrap();
        fs::write(folder.path().join("token"), token("a")).unwrap();
        Self {
            folder,
            address,
            root: root_der,
            issuer,
            answer,
            trust,
        }
    }

    fn daemon(&self) -> CaClient {
        let server = CaServer {
            section: "ca",
            address: self.address.to_string(),
            server_name: NAME.into(),
            root_file: self.folder.path().join("roots"),
            proof: Proof::Token(self.folder.path().join("token")),
            cluster_id: CLUSTER.into(),
        };
        CaClient::start(server, domain(), LIFETIME).unwrap()
    }

    fn certificate(&self, account: &str) -> String {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(
            identity(account).as_str().try_into().unwrap(),
        )];
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, &self.issuer).unwrap().pem()
    }

    async fn ask(&self, daemon: &CaClient, answer: Vec<String>) -> Result<usize, String> {
        *self.answer.lock().unwrap() = answer;
        let issued = daemon.issue(&identity("web"), &request()).await;
        issued
            .map(|issued| issued.chain.len())
            .map_err(|error| error.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uses_a_ca_without_a_watch_like_istiod() {
    let other = Others::start(false).await;
    let daemon = other.daemon();
    let root = pem::certificate(&other.root);
    assert_eq!(
        other
            .ask(&daemon, vec![other.certificate("web"), root])
            .await,
        Ok(1)
    );
    let trust = daemon.trust().current();
    assert_eq!(
        (trust.version, &trust.bundle.roots),
        (0, &vec![other.root.clone()])
    );
    let audience = Audience::try_from(vec!["db".to_owned()]).unwrap();
    let refused = daemon.issue_jwt(&identity("web"), &audience).await;
    let refused = refused.unwrap_err();
    assert!(
        refused.code == tonic::Code::Unimplemented && refused.why.contains("istiod"),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_harmful_answers() {
    let other = Others::start(true).await;
    let daemon = other.daemon();
    let good = || vec![other.certificate("web"), pem::certificate(&other.root)];
    assert_eq!(other.ask(&daemon, good()).await, Ok(1));
    for (answer, expected) in [
        (vec![], "without a certificate"),
        (vec!["x".repeat(1 << 20)], "too large"),
        (vec![pem::certificate(&[0x30, 0x82])], "unusable"),
        (vec![other.certificate("api")], "sa/api"),
    ] {
        let error = other.ask(&daemon, answer).await.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    // A trust bundle is applied as a whole or not at all.
    let known = Trust {
        version: 5,
        roots: vec![other.root.to_vec()],
        denied_nodes: vec![Denial {
            name: "b".into(),
            reason: "keyCompromise".into(),
        }],
        ..Default::default()
    };
    other.trust.send_replace(known.clone());
    let revoked = || daemon.trust().current().revoked.check_node("b").is_err();
    eventually("revoked", || revoked().then_some(())).await;
    let old = Trust {
        version: 4,
        denied_nodes: vec![],
        ..known.clone()
    };
    let rootless = Trust {
        version: 6,
        roots: vec![],
        denied_nodes: vec![],
        ..known.clone()
    };
    let rubbish = Trust {
        crls: vec![vec![0x30, 0x80]],
        ..rootless.clone()
    };
    for bad in [old, rootless, rubbish] {
        let seen = other.trust.receiver_count();
        other.trust.send_replace(bad);
        // A refused message ends the watch. It has been read when the next watch begins.
        eventually("read", || {
            (other.trust.receiver_count() != seen).then_some(())
        })
        .await;
        assert!(revoked());
    }
    other.trust.send_replace(Trust {
        version: 7,
        denied_nodes: vec![],
        ..known
    });
    eventually("withdrawn", || (!revoked()).then_some(())).await;
}
