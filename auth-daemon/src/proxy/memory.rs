//! Asserts how much memory an idle connection takes.

use std::{sync::Arc, time::Duration};

use auth_ca::embedded::EmbeddedCa;
use auth_mesh::TrustDomain;
use auth_tunnel::{
    Channel, Made, Pool,
    frame::{Connect, Event},
    handshake,
};
use tokio::net::{TcpListener, TcpStream};

use super::{inbound, outbound};
use crate::{
    issuer::{Certificates, Current},
    observe::memory::held,
};

/// The most that the future of a connection takes, in bytes.
const MOST_OF_FUTURE: usize = 1536;
/// The most that an idle tunnel takes, without its keys.
const MOST_OF_TUNNEL: usize = 1280;
/// The most that its keys take, one a direction, where ring has the faster cipher. Those of aws-lc-rs are not counted: the
/// library in C allocates them.
const MOST_OF_KEYS: usize = 2 * 512;

#[test]
fn a_connections_future_has_no_room_for_its_establishment() {
    fn size<A, F: Future>(_: impl Fn(A) -> F) -> usize {
        size_of::<F>()
    }
    let outbound = size(|(node, pod, app, from)| outbound::serve(node, pod, app, from));
    let inbound = size(|(node, pod, tcp, from, place)| inbound::serve(node, pod, tcp, from, place));
    println!("outbound {outbound} bytes, inbound {inbound} bytes");
    assert!(outbound <= MOST_OF_FUTURE, "outbound: {outbound} bytes");
    assert!(inbound <= MOST_OF_FUTURE, "inbound: {inbound} bytes");
}

#[tokio::test]
async fn an_idle_tunnel_keeps_nothing_of_its_handshake() {
    const TUNNELS: usize = 32;
    let folder = tempfile::tempdir().unwrap();
    let domain = TrustDomain::default();
    let ca = EmbeddedCa::open(folder.path(), &domain, Duration::from_secs(3600)).unwrap();
    let certificates = Certificates::new(Arc::new(ca));
    let current = async |account| {
        let identity = domain.identity("default", account).unwrap();
        let certificate = certificates.acquire(&identity);
        certificate.obtain(Duration::from_secs(10)).await.unwrap()
    };
    let (client, server) = (current("client").await, current("web").await);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let pool = Pool::default();
    let fill = async || {
        for _ in 0..TUNNELS {
            let [near, _far] = tunnel(&listener, &client, &server, &domain).await;
            let made = Made::now(&client.svid, near.peer());
            pool.put(address, near, made, Some(()));
        }
    };
    // The first ones fill what all of them share, such as the store of session tickets.
    fill().await;
    let before = held();
    fill().await;
    assert_eq!(pool.idle(), 2 * TUNNELS);
    let each = (held() - before) / TUNNELS;
    println!("tunnel {each} bytes");
    assert!(each <= MOST_OF_TUNNEL + MOST_OF_KEYS, "{each} bytes");
}

/// Both ends of a tunnel that carries a connection.
async fn tunnel(
    listener: &TcpListener,
    client: &Current,
    server: &Current,
    domain: &TrustDomain,
) -> [Channel; 2] {
    let dialled = listener.local_addr().unwrap();
    let near = async {
        let tcp = TcpStream::connect(dialled).await.unwrap();
        let connect = Connect {
            dialled,
            client: tcp.local_addr().unwrap(),
        };
        let config = client.configs.client.clone();
        let mut near = handshake::connect(tcp, config, domain).await.unwrap();
        near.send_connect(&connect, b"").await.unwrap();
        assert_eq!(
            near.receive_control().await.unwrap(),
            Some(Event::Connected)
        );
        near
    };
    let far = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let config = server.configs.server.clone();
        let mut far = handshake::accept(tcp, config, domain).await.unwrap();
        let connect = far.receive_control().await.unwrap();
        assert!(matches!(connect, Some(Event::Connect(_))));
        far.send_connected().await.unwrap();
        far
    };
    tokio::join!(near, far).into()
}
