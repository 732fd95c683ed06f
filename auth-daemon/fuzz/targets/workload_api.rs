//! What an app sends to the SPIFFE Workload API, HTTP/2 and all, at the node's socket: never a panic, and an end foreverything.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, LazyLock},
};

use auth_ca::embedded::EmbeddedCa;
use auth_daemon::issuer::Certificates;
use auth_mesh::TrustDomain;
use auth_support::connection_limit::ConnectionLimit;
use auth_workload_api::{Attested, Served};
use tokio::{
    net::TcpListener,
    runtime::Runtime,
    sync::{mpsc, watch},
};

use super::LONG;

/// How an HTTP/2 connection begins (RFC 9113 §3.4), and an empty frame of settings.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

struct Server {
    attest: mpsc::Sender<Attested>,
    places: Arc<ConnectionLimit<u64>>,
    runtime: Runtime,
}

static SERVER: LazyLock<Server> = LazyLock::new(|| {
    let runtime = Runtime::new().expect("a runtime");
    let listener = runtime
        .block_on(TcpListener::bind("127.0.0.1:0"))
        .expect("a listener");
    let (attest, attested) = mpsc::channel(1);
    let folder = tempfile::tempdir().expect("a folder");
    let trust_domain = TrustDomain::default();
    let ca = EmbeddedCa::open(folder.path(), &trust_domain, LONG).expect("a CA");
    let identity = trust_domain
        .identity("default", "web")
        .expect("an identity");
    // Without a certificate, streams end.
    let (_, svid) = watch::channel(None);
    let served = {
        let _runtime = runtime.enter();
        let app = Certificates::new(Arc::new(ca)).for_app(&identity, LONG);
        Served {
            svid,
            ..app.served.clone()
        }
    };
    runtime.spawn(auth_workload_api::serve(listener, attested, served));
    Server {
        attest,
        places: Arc::new(ConnectionLimit::new(usize::MAX, usize::MAX)),
        runtime,
    }
});

pub(super) fn run(bytes: &[u8]) {
    let (mut app, accepted) = UnixStream::pair().expect("a connection");
    accepted.set_nonblocking(true).expect("a mode");
    let connection = {
        let _runtime = SERVER.runtime.enter();
        accepted.try_into().expect("within the runtime")
    };
    let permit = SERVER.places.admit(0).expect("no limit");
    let attested = Attested { connection, permit };
    SERVER.attest.blocking_send(attested).expect("a server");
    app.set_read_timeout(Some(LONG)).expect("a timeout");
    // The server may have closed the connection already.
    let _ = app.write_all(&[PREFACE, bytes].concat());
    let _ = app.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    if let Err(error) = app.read_to_end(&mut answer) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no end");
    }
}
