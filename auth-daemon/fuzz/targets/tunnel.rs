//! What a peer sends on the tunnel's port, over a real connection: never a panic, no handshake without a certificate, and an
//! end foreverything. An even first byte: the bytes come instead of the handshake. An odd one: within TLS, from a peer of the
//! mesh, cut into records by it.

use std::{
    net::Ipv4Addr,
    sync::{Arc, LazyLock},
    time::Duration,
};

use auth_ca::embedded::EmbeddedCa;
use auth_daemon::issuer::{Certificates, Current};
use auth_mesh::TrustDomain;
use auth_tunnel::{Channel, Counters, Ending, frame::Event, handshake, relay};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::LONG;

struct Stage {
    runtime: Runtime,
    listener: TcpListener,
    domain: TrustDomain,
    client: Arc<Current>,
    server: Arc<Current>,
    _certificates: Certificates,
    _folder: tempfile::TempDir,
}

static STAGE: LazyLock<Stage> = LazyLock::new(|| {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let folder = tempfile::tempdir().expect("a folder");
    let domain = TrustDomain::default();
    let ca = EmbeddedCa::open(folder.path(), &domain, Duration::from_secs(3600)).expect("a CA");
    let (listener, client, server, certificates) = runtime.block_on(async {
        let certificates = Certificates::new(Arc::new(ca));
        let mut current = Vec::new();
        for account in ["client", "web"] {
            let identity = domain.identity("default", account).expect("an identity");
            let certificate = certificates.acquire(&identity);
            current.push(certificate.obtain(LONG).await.expect("a certificate"));
        }
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let server = current.remove(1);
        (listener, current.remove(0), server, certificates)
    });
    Stage {
        runtime,
        listener,
        domain,
        client,
        server,
        _certificates: certificates,
        _folder: folder,
    }
});

pub(super) fn run(input: &[u8]) {
    let Some((&how, bytes)) = input.split_first() else {
        return;
    };
    let exchange = async {
        let (near, far) = pair().await;
        let server = STAGE.server.configs.server.clone();
        let accept = handshake::accept(far, server, &STAGE.domain);
        if how % 2 == 0 {
            let (accepted, ()) = tokio::join!(accept, send(near, bytes));
            assert!(accepted.is_err(), "a handshake without a certificate");
        } else {
            let connector = TlsConnector::from(STAGE.client.configs.client.clone());
            let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
            let (near, far) = tokio::join!(connector.connect(name, near), accept);
            let (mut near, far) = (near.expect("a peer of the mesh"), far.expect("the same"));
            let peer = async move {
                let pieces = bytes.chunks(usize::from(how / 2).max(1));
                for piece in pieces {
                    // The daemon's end may be over already.
                    if near.write_all(piece).await.is_err() {
                        return;
                    }
                }
                let _ = near.shutdown().await;
                let _ = near.read_to_end(&mut Vec::new()).await;
            };
            tokio::join!(peer, serve(far));
        }
    };
    let exchange = async { timeout(LONG, exchange).await };
    STAGE.runtime.block_on(exchange).expect("an end");
}

/// Serves the tunnel as the daemon does, with an app that reads nothing and closes.
async fn serve(mut channel: Channel) {
    while let Ok(Some(Event::Connect(_))) = channel.receive_control().await {
        let (mut app, other) = pair().await;
        drop(other);
        if channel.answer_connected().await.is_err() {
            return;
        }
        let ending = relay(&mut app, &mut channel, &Counters::default()).await;
        if !matches!(ending, Ending::Clean) {
            return;
        }
    }
}

async fn send(mut near: TcpStream, bytes: &[u8]) {
    let _ = near.write_all(bytes).await;
    let _ = near.shutdown().await;
    let _ = near.read_to_end(&mut Vec::new()).await;
}

async fn pair() -> (TcpStream, TcpStream) {
    let address = STAGE.listener.local_addr().expect("bound");
    let (near, far) = tokio::join!(TcpStream::connect(address), STAGE.listener.accept());
    (near.expect("a connection"), far.expect("a connection").0)
}
