//! The tunnel over real sockets, end to end and against rustls' own record layer.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::SocketAddr,
    path::Path,
    sync::{Arc, LazyLock, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use auth_ca::embedded::EmbeddedCa;
use auth_daemon::{issuer::Certificates, issuer::Current};
use auth_mesh::TrustDomain;
use auth_tunnel::{
    self, ALPN, Channel, Counters, Ending, Made, Pool, Taken,
    frame::{self, Connect, Event, Reset, ResetCode},
    handshake, relay,
};
use rustls::HandshakeKind;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const DOMAIN: &str = "cluster.local";
static OWN: LazyLock<TrustDomain> = LazyLock::new(TrustDomain::default);

/// A trust domain in a folder of its own.
struct Domain {
    _folder: tempfile::TempDir,
    certificates: Certificates,
}

impl Domain {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = open_ca(folder.path());
        Self {
            _folder: folder,
            certificates: Certificates::new(Arc::new(ca)),
        }
    }

    async fn current(&self, account: &str) -> Arc<Current> {
        let domain: TrustDomain = DOMAIN.parse().unwrap();
        let identity = domain.identity("default", account).unwrap();
        let certificate = self.certificates.acquire(&identity);
        certificate.obtain(Duration::from_secs(10)).await.unwrap()
    }
}

fn open_ca(folder: &Path) -> EmbeddedCa {
    EmbeddedCa::open(folder, &DOMAIN.parse().unwrap(), Duration::from_secs(3600)).unwrap()
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

async fn tunnel_pair(domain: &Domain) -> (Channel, Channel) {
    let (client, server) = (domain.current("client").await, domain.current("web").await);
    let (near, far) = tcp_pair().await;
    let (near, far) = tokio::join!(
        handshake::connect(near, client.configs.client.clone(), &OWN),
        handshake::accept(far, server.configs.server.clone(), &OWN)
    );
    (near.unwrap(), far.unwrap())
}

fn connect() -> Connect {
    Connect {
        dialled: "10.96.0.7:80".parse().unwrap(),
        client: "10.1.0.2:40000".parse().unwrap(),
    }
}

/// A tunnel with both ends past CONNECT, and an app's connection at each end: (client app, server app).
struct Carried {
    client_app: TcpStream,
    server_app: TcpStream,
    client: tokio::task::JoinHandle<(Ending, Channel)>,
    server: tokio::task::JoinHandle<(Ending, Channel)>,
}

async fn carry(mut near: Channel, mut far: Channel) -> Carried {
    let (established, _) = tokio::join!(
        async {
            near.send_connect(&connect(), b"").await.unwrap();
            near.receive_control().await.unwrap()
        },
        async {
            let event = far.receive_control().await.unwrap();
            assert_eq!(event, Some(Event::Connect(connect())));
            far.send_connected().await.unwrap();
        }
    );
    assert_eq!(established, Some(Event::Connected));
    let (client_app, mut client_side) = tcp_pair().await;
    let (server_app, mut server_side) = tcp_pair().await;
    Carried {
        client_app,
        server_app,
        client: tokio::spawn(async move {
            let ending = relay(&mut client_side, &mut near, &Counters::default()).await;
            reset_unless_clean(&ending, client_side);
            (ending, near)
        }),
        server: tokio::spawn(async move {
            let ending = relay(&mut server_side, &mut far, &Counters::default()).await;
            reset_unless_clean(&ending, server_side);
            (ending, far)
        }),
    }
}

/// As the proxy does.
fn reset_unless_clean(ending: &Ending, app: TcpStream) {
    if !matches!(ending, Ending::Clean) {
        let zero = Some(Duration::ZERO);
        socket2::SockRef::from(&app).set_linger(zero).unwrap();
    }
}

#[tokio::test]
async fn both_ends_know_each_other() {
    let domain = Domain::new();
    let (near, far) = tunnel_pair(&domain).await;
    assert_eq!(near.peer().identity.service_account(), "web");
    assert_eq!(far.peer().identity.service_account(), "client");
}

#[tokio::test]
async fn megabytes_cross_both_ways_and_the_tunnel_carries_the_next_connection() {
    let domain = Domain::new();
    let (near, far) = tunnel_pair(&domain).await;
    let mut channels = (near, far);
    for round in 0..3_u8 {
        let carried = carry(channels.0, channels.1).await;
        let there: Vec<u8> = (0..5_000_000_u32).map(|i| (i / 7) as u8 ^ round).collect();
        let back: Vec<u8> = (0..3_000_000_u32).map(|i| (i / 11) as u8 ^ round).collect();
        let exchange = |mut app: TcpStream, send: Vec<u8>| async move {
            let (mut read, mut write) = app.split();
            let mut received = Vec::new();
            let (sent, got) = tokio::join!(
                async {
                    write.write_all(&send).await?;
                    write.shutdown().await
                },
                read.read_to_end(&mut received)
            );
            sent.unwrap();
            got.unwrap();
            received
        };
        let (at_client, at_server) = tokio::join!(
            exchange(carried.client_app, back.clone()),
            exchange(carried.server_app, there.clone())
        );
        assert!(at_client == there && at_server == back, "round {round}");
        let (ending, near) = carried.client.await.unwrap();
        assert!(matches!(ending, Ending::Clean), "{ending:?}");
        let (ending, far) = carried.server.await.unwrap();
        assert!(matches!(ending, Ending::Clean), "{ending:?}");
        channels = (near, far);
    }
}

#[tokio::test]
async fn half_a_connection_goes_on() {
    let domain = Domain::new();
    let (near, far) = tunnel_pair(&domain).await;
    let mut carried = carry(near, far).await;
    carried.client_app.write_all(b"question").await.unwrap();
    carried.client_app.shutdown().await.unwrap();
    let mut question = Vec::new();
    carried.server_app.read_to_end(&mut question).await.unwrap();
    assert_eq!(question, b"question");
    carried.server_app.write_all(b"answer").await.unwrap();
    drop(carried.server_app);
    let mut answer = Vec::new();
    carried.client_app.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"answer");
    assert!(matches!(carried.client.await.unwrap().0, Ending::Clean));
    assert!(matches!(carried.server.await.unwrap().0, Ending::Clean));
}

#[tokio::test]
async fn a_reset_is_seen_while_nothing_flows_even_after_a_half_close() {
    for half_close in [false, true] {
        let domain = Domain::new();
        let (near, far) = tunnel_pair(&domain).await;
        let mut carried = carry(near, far).await;
        if half_close {
            carried.client_app.shutdown().await.unwrap();
            let mut nothing = Vec::new();
            carried.server_app.read_to_end(&mut nothing).await.unwrap();
        }
        let zero = Some(Duration::ZERO);
        socket2::SockRef::from(&carried.client_app)
            .set_linger(zero)
            .unwrap();
        drop(carried.client_app);
        let (ending, mut near) = carried.client.await.unwrap();
        assert!(matches!(ending, Ending::App(_)), "{half_close}: {ending:?}");
        let reset = Reset {
            code: ResetCode::App,
            reason: "gone".into(),
        };
        let sending = tokio::spawn(async move { near.send_reset(&reset).await });
        let (ending, far) = carried.server.await.unwrap();
        assert!(
            matches!(
                ending,
                Ending::Peer(Reset {
                    code: ResetCode::App,
                    ..
                })
            ),
            "{ending:?}"
        );
        drop(far);
        sending.await.unwrap().unwrap();
        let error = carried.server_app.read_u8().await.unwrap_err();
        let expected = if half_close {
            // The end was read before; only the next write tells.
            std::io::ErrorKind::UnexpectedEof
        } else {
            std::io::ErrorKind::ConnectionReset
        };
        assert!(
            [expected, std::io::ErrorKind::ConnectionReset].contains(&error.kind()),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_tunnel_that_breaks_is_no_end_of_data() {
    let domain = Domain::new();
    let (near, far) = tunnel_pair(&domain).await;
    let mut carried = carry(near, far).await;
    carried.server.abort();
    let _ = carried.server.await;
    let error = carried.client_app.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(matches!(carried.client.await.unwrap().0, Ending::Tunnel(_)));
}

/// rustls' own client, with its own record layer, talks to ours: what we make is TLS, and key updates work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interoperates_with_rustls_through_key_updates() {
    let domain = Domain::new();
    let (client, server) = (domain.current("client").await, domain.current("web").await);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let plain_client = tokio::task::spawn_blocking(move || rustls_client(address, &client));
    let (tcp, _) = listener.accept().await.unwrap();
    let mut channel = handshake::accept(tcp, server.configs.server.clone(), &OWN)
        .await
        .unwrap();
    let event = channel.receive_control().await.unwrap();
    assert_eq!(event, Some(Event::Connect(connect())));
    channel.send_connected().await.unwrap();
    let (mut app, mut side) = tcp_pair().await;
    let counters = Arc::new(Counters::default());
    let counted = counters.clone();
    let relaying = tokio::spawn(async move { relay(&mut side, &mut channel, &counted).await });
    let mut received = Vec::new();
    app.write_all(b"hello from the app").await.unwrap();
    app.shutdown().await.unwrap();
    app.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, b"beforeafter");
    assert!(matches!(relaying.await.unwrap(), Ending::Clean));
    plain_client.await.unwrap();
    assert_eq!(counters.up.load(Ordering::Relaxed), 18);
    assert_eq!(counters.down.load(Ordering::Relaxed), 11);
}

fn rustls_client(address: SocketAddr, current: &Current) {
    let mut tcp = std::net::TcpStream::connect(address).unwrap();
    let name = address.ip().into();
    let config = current.configs.client.clone();
    let mut tls =
        rustls::ClientConnection::new(config, rustls::pki_types::ServerName::IpAddress(name))
            .unwrap();
    let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
    let mut bytes = Vec::new();
    frame::encode_connect(&connect(), &mut bytes);
    bytes.extend_from_slice(&frame::data_header(6));
    bytes.extend_from_slice(b"before");
    stream.write_all(&bytes).unwrap();
    assert_eq!(stream.conn.alpn_protocol(), Some(ALPN));
    let suite = stream.conn.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    let group = stream.conn.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    // Ours answers this with its own key update before its next record.
    stream.conn.refresh_traffic_keys().unwrap();
    let mut bytes = frame::data_header(5).to_vec();
    bytes.extend_from_slice(b"after");
    frame::encode_end(&mut bytes);
    stream.write_all(&bytes).unwrap();
    let mut expected = Vec::new();
    frame::encode_connected(&mut expected);
    expected.extend_from_slice(&frame::data_header(18));
    expected.extend_from_slice(b"hello from the app");
    frame::encode_end(&mut expected);
    let mut answer = vec![0; expected.len()];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, expected);
}

/// Our client comes back to a stock server with the ticket that it got, and shows its certificate only once.
#[tokio::test]
async fn a_client_resumes_its_session() {
    let domain = Domain::new();
    let (client, server) = (domain.current("client").await, domain.current("web").await);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut config = (*server.configs.server).clone();
    // As stock servers do, unless told not to.
    config.send_tls13_tickets = 2;
    let config = Arc::new(config);
    let stock_server = tokio::task::spawn_blocking(move || {
        [(), (), ()].map(|()| {
            let (mut tcp, _) = listener.accept().unwrap();
            let mut tls = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
            let mut expected = Vec::new();
            frame::encode_connect(&connect(), &mut expected);
            let mut asked = vec![0; expected.len()];
            stream.read_exact(&mut asked).unwrap();
            assert_eq!(asked, expected);
            let mut answer = Vec::new();
            frame::encode_connected(&mut answer);
            stream.write_all(&answer).unwrap();
            stream.flush().unwrap();
            tls.handshake_kind().unwrap()
        })
    });
    for _ in 0..3 {
        let tcp = TcpStream::connect(address).await.unwrap();
        let mut channel = handshake::connect(tcp, client.configs.client.clone(), &OWN)
            .await
            .unwrap();
        channel.send_connect(&connect(), b"").await.unwrap();
        let answer = channel.receive_control().await.unwrap();
        assert_eq!(answer, Some(Event::Connected));
        assert_eq!(channel.peer().identity, server.svid.identity);
    }
    assert_eq!(
        stock_server.await.unwrap(),
        [
            HandshakeKind::Full,
            HandshakeKind::Resumed,
            HandshakeKind::Resumed
        ]
    );
}

/// Our server takes its ticket back, from the client that it gave it to, and knows who that is.
#[tokio::test]
async fn a_server_resumes_a_session() {
    let domain = Domain::new();
    let (client, server) = (domain.current("client").await, domain.current("web").await);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = client.configs.client.clone();
    let stock_client = tokio::task::spawn_blocking(move || {
        [(), ()].map(|()| {
            let mut tcp = std::net::TcpStream::connect(address).unwrap();
            let name = rustls::pki_types::ServerName::IpAddress(address.ip().into());
            let mut tls = rustls::ClientConnection::new(config.clone(), name).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
            let mut bytes = Vec::new();
            frame::encode_connect(&connect(), &mut bytes);
            stream.write_all(&bytes).unwrap();
            let mut answer = [0; frame::HEADER_BYTES];
            stream.read_exact(&mut answer).unwrap();
            tls.handshake_kind().unwrap()
        })
    });
    for _ in 0..2 {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut channel = handshake::accept(tcp, server.configs.server.clone(), &OWN)
            .await
            .unwrap();
        assert_eq!(channel.peer().identity, client.svid.identity);
        let event = channel.receive_control().await.unwrap();
        assert_eq!(event, Some(Event::Connect(connect())));
        channel.send_connected().await.unwrap();
    }
    assert_eq!(
        stock_client.await.unwrap(),
        [HandshakeKind::Full, HandshakeKind::Resumed]
    );
}

/// A session is the identity's that made it: with another pod's certificate there is nothing to come back with, and a
/// server with another key cannot read the ticket.
#[tokio::test]
async fn a_session_is_of_two_identities() {
    let domain = Domain::new();
    let (client, other) = (
        domain.current("client").await,
        domain.current("other").await,
    );
    let (web, imposter) = (
        domain.current("web").await,
        domain.current("imposter").await,
    );
    // All at one address, one after the other.
    for (client, server) in [
        (&client, &web),
        (&other, &web),
        (&client, &imposter),
        (&client, &web),
    ] {
        let (near, far) = tcp_pair().await;
        let (near, far) = tokio::join!(
            handshake::connect(near, client.configs.client.clone(), &OWN),
            handshake::accept(far, server.configs.server.clone(), &OWN)
        );
        let (mut near, mut far) = (near.unwrap(), far.unwrap());
        near.send_connect(&connect(), b"").await.unwrap();
        far.receive_control().await.unwrap();
        far.send_connected().await.unwrap();
        near.receive_control().await.unwrap();
        assert_eq!(near.peer().identity, server.svid.identity);
        assert_eq!(far.peer().identity, client.svid.identity);
    }
}

#[tokio::test]
async fn another_trust_domain_is_refused_by_both_ends() {
    let (ours, theirs) = (Domain::new(), Domain::new());
    let (client, server) = (theirs.current("client").await, ours.current("web").await);
    let (near, far) = tcp_pair().await;
    let (near, far) = tokio::join!(
        handshake::connect(near, client.configs.client.clone(), &OWN),
        handshake::accept(far, server.configs.server.clone(), &OWN)
    );
    let refused = near.unwrap_err().to_string();
    assert!(
        refused.contains("not issued by its trust domain's CA"),
        "{refused}"
    );
    let error = far.unwrap_err().to_string();
    assert!(
        error.contains("the peer refuses our certificate"),
        "{error}"
    );
}

async fn use_once(near: &mut Channel, far: &mut Channel) {
    near.send_connect(&connect(), b"").await.unwrap();
    assert!(matches!(
        far.receive_control().await,
        Ok(Some(Event::Connect(_)))
    ));
    far.send_connected().await.unwrap();
    assert_eq!(
        near.receive_control().await.unwrap(),
        Some(Event::Connected)
    );
}

#[tokio::test]
async fn the_pool_gives_back_what_is_alive_and_allowed() {
    let domain = Domain::new();
    let endpoint: SocketAddr = "10.0.0.1:80".parse().unwrap();
    let pool = Pool::default();
    let web = BTreeSet::from([format!("spiffe://{DOMAIN}/ns/default/sa/web")
        .parse()
        .unwrap()]);
    let api = BTreeSet::from([format!("spiffe://{DOMAIN}/ns/default/sa/api")
        .parse()
        .unwrap()]);

    let (near, far) = tunnel_pair(&domain).await;
    pool.put(endpoint, near, made_now(), Some(()));
    assert_eq!(pool.idle(), 1);
    assert!(
        pool.take(endpoint, &api).is_none(),
        "not one that may run it"
    );
    assert_eq!(pool.idle(), 0, "and it is not kept");
    drop(far);

    let (mut near, mut far) = tunnel_pair(&domain).await;
    use_once(&mut near, &mut far).await;
    pool.put(endpoint, near, made_now(), Some(()));
    let Taken {
        channel: mut near,
        made,
        ..
    } = pool.take(endpoint, &web).unwrap();
    use_once(&mut near, &mut far).await;

    pool.put(endpoint, near, made, Some(()));
    far.close();
    wait_until(|| {
        pool.sweep();
        pool.idle() == 0
    })
    .await;
}

#[tokio::test]
async fn certificates_are_shared_renewed_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(
        folder.path(),
        &DOMAIN.parse().unwrap(),
        Duration::from_secs(3),
    )
    .unwrap();
    let certificates = Certificates::new(Arc::new(ca));
    let identity = format!("spiffe://{DOMAIN}/ns/default/sa/web")
        .parse()
        .unwrap();
    let (one, two) = (
        certificates.acquire(&identity),
        certificates.acquire(&identity),
    );
    assert!(Arc::ptr_eq(&one, &two));
    // On a busy machine, one may expire before it is seen here.
    let mut serials = BTreeSet::new();
    wait_until(|| {
        serials.extend(one.current().map(|current| current.svid.serial.clone()));
        serials.len() > 1
    })
    .await;
    certificates.release(&identity);
    assert_eq!(certificates.list().len(), 1);
    certificates.release(&identity);
    assert!(certificates.list().is_empty());
}

fn made_now() -> Made {
    Made {
        at: Instant::now(),
        valid_until: SystemTime::now() + Duration::from_secs(60),
    }
}

async fn wait_until(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The future of a connection is what an idle one costs beside its sockets.
#[tokio::test]
async fn an_idle_relay_is_small() {
    let domain = Domain::new();
    let (mut near, _far) = tunnel_pair(&domain).await;
    let (_app, mut side) = tcp_pair().await;
    let counters = Counters::default();
    let size = size_of_val(&relay(&mut side, &mut near, &counters)) + size_of::<Channel>();
    assert!(size < 4096, "{size} bytes");
}
