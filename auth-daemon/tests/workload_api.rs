//! The SPIFFE Workload API as its clients see it, also those that keep no rules. A scenario has SPIFFE's own client.

#[path = "workload_api/jwt.rs"]
mod jwt;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use auth_ca::embedded::EmbeddedCa;
use auth_daemon::issuer::{AppCertificate, Certificates};
use auth_mesh::{Identity, TrustDomain};
use auth_support::connection_limit::ConnectionLimit;
use auth_tunnel::tls::{
    svid::Svid,
    trust::{ForeignBundles, Reason, Trust, TrustBundle},
};
use auth_workload_api::{
    Attested, Served,
    api::{
        X509BundlesRequest, X509svidRequest, X509svidResponse,
        spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
    refuse, serve,
};
use futures_util::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::mpsc,
    task::AbortHandle,
    time::timeout,
};
use tonic::{Code, Request, Status, Streaming, transport::Channel};

const PATIENCE: Duration = Duration::from_secs(20);
/// Of the tunnels' certificates, and long enough for what a test does with one of an app's.
const LIFETIME: Duration = Duration::from_secs(3600);

/// The API of one workload, with a CA of its own.
struct Stage {
    _folder: TempDir,
    ca: Arc<EmbeddedCa>,
    certificates: Certificates,
    certificate: Option<AppCertificate>,
    address: SocketAddr,
    /// For connections from elsewhere.
    attest: mpsc::Sender<Attested>,
    serving: AbortHandle,
}

impl Stage {
    async fn set(lifetime: Duration) -> Self {
        Self::set_with(lifetime, |_| {}).await
    }

    /// The same, but for a change of what is served.
    async fn set_with(lifetime: Duration, change: impl FnOnce(&mut Served)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = EmbeddedCa::open(folder.path(), &TrustDomain::default(), LIFETIME);
        let ca = Arc::new(ca.unwrap());
        let certificates = Certificates::new(ca.clone());
        let certificate = certificates.for_app(&identity(), lifetime);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (attest, attested) = mpsc::channel(32);
        let mut served = certificate.served.clone();
        change(&mut served);
        let serving = tokio::spawn(serve(listener, attested, served));
        Self {
            _folder: folder,
            ca,
            certificates,
            certificate: Some(certificate),
            address,
            attest,
            serving: serving.abort_handle(),
        }
    }

    /// A client.
    async fn client(&self) -> SpiffeWorkloadApiClient<Channel> {
        let endpoint = Channel::from_shared(format!("http://{}", self.address));
        SpiffeWorkloadApiClient::new(endpoint.unwrap().connect().await.unwrap())
    }

    fn change_trust(&self, change: impl FnOnce(&mut Trust)) {
        let mut trust = (*self.ca.trust().current()).clone();
        change(&mut trust);
        self.ca.trust().publish(trust);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn identity() -> Identity {
    TrustDomain::default().identity("shop", "web").unwrap()
}

fn with_metadata<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("workload.spiffe.io", "true".parse().unwrap());
    request
}

/// The next item of a stream.
async fn next<T>(stream: &mut (impl Stream<Item = T> + Unpin)) -> T {
    timeout(PATIENCE, stream.next()).await.unwrap().unwrap()
}

async fn open(
    client: &mut SpiffeWorkloadApiClient<Channel>,
) -> Result<Streaming<X509svidResponse>, Status> {
    let opened = client.fetch_x509svid(with_metadata(X509svidRequest {}));
    Ok(timeout(PATIENCE, opened).await.unwrap()?.into_inner())
}

/// The certificate and the roots in an answer, after checking that the key belongs to the certificate.
fn parse(answer: Result<X509svidResponse, Status>) -> (Svid, Vec<u8>) {
    let [svid] = &answer.unwrap().svids[..] else {
        panic!("not one certificate");
    };
    assert_eq!(svid.spiffe_id, identity().as_str());
    let certificate = CertificateDer::from(svid.x509_svid.clone());
    let key = PrivatePkcs8KeyDer::from(svid.x509_svid_key.clone());
    let provider = aws_lc_rs::default_provider();
    let key = CertifiedKey::from_der(vec![certificate], PrivateKeyDer::from(key), &provider);
    let key = key.unwrap();
    key.keys_match().unwrap();
    let parsed = Svid::parse(&key.cert[0], &TrustDomain::default()).unwrap();
    assert_eq!(parsed.identity, identity());
    (parsed, svid.bundle.clone())
}

#[tokio::test]
async fn streams_follow_renewals() {
    let stage = Stage::set(Duration::from_secs(4)).await;
    let mut answers = open(&mut stage.client().await).await.unwrap();
    let mut serials = Vec::new();
    for _ in 0..3 {
        let (svid, bundle) = parse(next(&mut answers).await);
        assert_eq!(bundle, *stage.ca.trust().current().bundle.roots[0]);
        serials.push(svid.serial);
    }
    serials.dedup();
    assert_eq!(serials.len(), 3);
}

#[tokio::test]
async fn an_app_never_gets_the_key_of_the_tunnels() {
    let stage = Stage::set(LIFETIME).await;
    let tunnels = stage.certificates.acquire(&identity());
    let tunnels = tunnels.obtain(PATIENCE).await.unwrap();
    let mut answers = open(&mut stage.client().await).await.unwrap();
    let (first, _) = parse(next(&mut answers).await);
    assert_ne!(first.serial, tunnels.svid.serial);
    // Another request gets the same certificate: asking costs the CA nothing.
    let mut answers = open(&mut stage.client().await).await.unwrap();
    let (again, _) = parse(next(&mut answers).await);
    assert_eq!(again.serial, first.serial);
}

#[tokio::test]
async fn streams_follow_new_roots() {
    let stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let mut answers = open(&mut client).await.unwrap();
    let bundles = client.fetch_x509_bundles(with_metadata(X509BundlesRequest {}));
    let mut bundles = bundles.await.unwrap().into_inner();
    let (first, _) = parse(next(&mut answers).await);
    next(&mut bundles).await.unwrap();
    let other = Stage::set(LIFETIME).await;
    let root = other.ca.trust().current().bundle.roots[0].clone();
    stage.change_trust(|trust| trust.bundle.roots.push(root));
    let roots = &stage.ca.trust().current().bundle.roots;
    let both = [&roots[0][..], &roots[1][..]].concat();
    let (second, bundle) = parse(next(&mut answers).await);
    assert_eq!(bundle, both);
    assert_eq!(second.serial, first.serial);
    let bundles = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(bundles["spiffe://cluster.local"], both);
}

#[tokio::test]
async fn streams_follow_the_bundles_of_foreign_trust_domains() {
    let stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let mut answers = open(&mut client).await.unwrap();
    assert!(
        next(&mut answers)
            .await
            .unwrap()
            .federated_bundles
            .is_empty()
    );
    let bundles = client.fetch_x509_bundles(with_metadata(X509BundlesRequest {}));
    let mut bundles = bundles.await.unwrap().into_inner();
    assert_eq!(next(&mut bundles).await.unwrap().bundles.len(), 1);
    let own = stage.ca.trust().current().bundle.roots[0].to_vec();
    let root = CertificateDer::from(vec![1, 2, 3]);
    let mut foreign = ForeignBundles::default();
    foreign.insert(TrustBundle::of_roots(
        "far.example".parse().unwrap(),
        vec![root.clone(), root],
    ));
    stage.ca.trust().publish_foreign(foreign);
    let far = ("spiffe://far.example".to_owned(), vec![1, 2, 3, 1, 2, 3]);
    let answer = next(&mut answers).await.unwrap();
    assert_eq!(answer.federated_bundles, [far.clone()].into());
    assert_eq!(answer.svids[0].bundle, own);
    let all = next(&mut bundles).await.unwrap().bundles;
    assert_eq!(
        all,
        [far, ("spiffe://cluster.local".to_owned(), own)].into()
    );
    stage.ca.trust().publish_foreign(ForeignBundles::default());
    assert!(
        next(&mut answers)
            .await
            .unwrap()
            .federated_bundles
            .is_empty()
    );
    assert_eq!(next(&mut bundles).await.unwrap().bundles.len(), 1);
}

#[tokio::test]
async fn a_revoked_certificate_is_replaced_and_a_revoked_identity_gets_none() {
    let stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let mut answers = open(&mut client).await.unwrap();
    let (first, _) = parse(next(&mut answers).await);
    stage.change_trust(|trust| {
        let serial = (*first.serial).into();
        trust.revoked.serials.insert(serial, Reason::KeyCompromise);
    });
    let (second, _) = parse(next(&mut answers).await);
    assert_ne!(second.serial, first.serial);
    stage.change_trust(|trust| {
        let identities = &mut trust.revoked.identities;
        identities.insert(identity(), Reason::KeyCompromise);
    });
    let ended = next(&mut answers).await.unwrap_err();
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    let refused = open(&mut client).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
}

#[tokio::test]
async fn requests_need_the_metadata() {
    let stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let bare = client.fetch_x509svid(X509svidRequest {}).await.unwrap_err();
    assert_eq!(bare.code(), Code::InvalidArgument, "{bare}");
    let mut other = Request::new(X509BundlesRequest {});
    let metadata = other.metadata_mut();
    metadata.insert("workload.spiffe.io", "True".parse().unwrap());
    let other = client.fetch_x509_bundles(other).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument, "{other}");
}

#[tokio::test]
async fn a_workload_may_open_so_many_streams_and_connections() {
    let stage = Stage::set(LIFETIME).await;
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut client = stage.client().await;
        for _ in 0..8 {
            held.push(open(&mut client).await.unwrap());
        }
    }
    let refused = open(&mut stage.client().await).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    held.pop();
    // The server learns that a stream has ended when it reads the reset.
    let again = async {
        while open(&mut stage.client().await).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, again).await.unwrap();
    drop(held);

    let mut silent = Vec::new();
    let closed = async {
        // Of those above, some may still be open.
        for _ in 0..=16 {
            silent.push(TcpStream::connect(stage.address).await.unwrap());
        }
        silent.pop().unwrap().read(&mut [0; 16]).await
    };
    let closed = timeout(Duration::from_secs(4), closed).await.unwrap();
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed() {
    let stage = Stage::set(LIFETIME).await;
    let connected = Instant::now();
    let mut silent = TcpStream::connect(stage.address).await.unwrap();
    let mut received = Vec::new();
    let ended = timeout(PATIENCE, silent.read_to_end(&mut received)).await;
    assert!(ended.is_ok(), "it is still open");
    assert!(
        connected.elapsed() >= Duration::from_secs(5),
        "{received:?}"
    );
}

#[tokio::test]
async fn streams_end_with_the_workload() {
    let mut stage = Stage::set(LIFETIME).await;
    let mut client = stage.client().await;
    let mut answers = open(&mut client).await.unwrap();
    next(&mut answers).await.unwrap();
    drop(stage.certificate.take());
    let end = timeout(PATIENCE, answers.next()).await.unwrap();
    assert!(end.is_none(), "{end:?}");
}

/// A client on this connection.
async fn client_on(connection: UnixStream) -> SpiffeWorkloadApiClient<Channel> {
    let mut connection = Some(TokioIo::new(connection));
    let connector = tower::service_fn(move |_| {
        let connection = connection.take().ok_or(io::ErrorKind::NotConnected);
        async move { Ok::<_, io::Error>(connection?) }
    });
    let endpoint = Channel::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connector);
    SpiffeWorkloadApiClient::new(channel.await.unwrap())
}

#[tokio::test]
async fn connections_from_elsewhere_are_the_workloads() {
    let stage = Stage::set(LIFETIME).await;
    let places = Arc::new(ConnectionLimit::new(2, 1));
    let attest = async || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let attested = Attested {
            connection: theirs,
            permit: places.admit(7).unwrap(),
        };
        stage.attest.send(attested).await.unwrap();
        ours
    };
    let mut client = client_on(attest().await).await;
    let mut answers = open(&mut client).await.unwrap();
    let (svid, _) = parse(next(&mut answers).await);
    // It is the certificate that the workload gets at its own listener.
    let mut others = open(&mut stage.client().await).await.unwrap();
    assert_eq!(parse(next(&mut others).await).0.serial, svid.serial);
    assert_eq!(places.taken(), 1);
    drop((client, answers));
    let released = async {
        while places.taken() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, released).await.unwrap();

    // They count among the workload's connections, and end with its server.
    let mut silent = attest().await;
    let mut held = Vec::new();
    let refused = async {
        for _ in 0..=16 {
            held.push(TcpStream::connect(stage.address).await.unwrap());
        }
        held.pop().unwrap().read(&mut [0; 16]).await
    };
    let refused = timeout(Duration::from_secs(4), refused).await.unwrap();
    assert!(matches!(refused, Ok(0) | Err(_)), "{refused:?}");
    stage.serving.abort();
    let mut received = Vec::new();
    let ended = timeout(PATIENCE, silent.read_to_end(&mut received)).await;
    assert!(ended.is_ok(), "it is still open");
    assert_eq!(places.taken(), 0);
}

#[tokio::test]
async fn a_refused_caller_learns_why() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let refusing = tokio::spawn(refuse(theirs, Status::permission_denied("of no pod")));
    let mut client = client_on(ours).await;
    let refused = open(&mut client).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert_eq!(refused.message(), "of no pod");
    // Its connection is not kept.
    timeout(PATIENCE, refusing).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_path_as_authority_is_served() {
    let stage = Stage::set(LIFETIME).await;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let places = Arc::new(ConnectionLimit::new(1, 1));
    let attested = Attested {
        connection: theirs,
        permit: places.admit(7).unwrap(),
    };
    stage.attest.send(attested).await.unwrap();
    // As gRPC's clients for Python and C++ begin.
    let fields = b"\x83\x86\x40\x05:path\x20/SpiffeWorkloadAPI/FetchX509SVID\
        \x40\x0a:authority\x0erun%2Fapi.sock\x40\x0ccontent-type\x10application/grpc\
        \x40\x02te\x08trailers\x00\x12workload.spiffe.io\x04true";
    let headers = [0, 0, fields.len() as u8, 1, 4, 0, 0, 0, 1];
    let request = [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"[..],
        &headers[..],
        fields,
        b"\0\0\x05\0\x01\0\0\0\x01\0\0\0\0\0",
    ]
    .concat();
    ours.write_all(&request).await.unwrap();
    let mut received = Vec::new();
    let id = identity().to_string();
    let answered = async {
        while !String::from_utf8_lossy(&received).contains(&id) {
            assert_ne!(
                ours.read_buf(&mut received).await.unwrap(),
                0,
                "{received:?}"
            );
        }
    };
    timeout(PATIENCE, answered).await.unwrap();
}
