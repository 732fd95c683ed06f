//! Sessions that must not be resumed: the account has changed, the certificate has expired, or the server is another.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, SystemTime};

use crate::common::early::{self, Ledger, echo, line_of, script, spoken};
use crate::common::hostile::{
    ALPN, Authority, CONNECT, CONNECTED, DATA, END, Faults, Peer, Presented, client_config,
    connect_frame, dial, frame, lines_of, server_config, spiffe,
};
use crate::common::pair::Pair;
use crate::common::resumption::handshakes;
use mesh_tests::{
    Capture, Context, Daemon, InProcess, Mesh, Pod, PodSpec, Result, TIMEOUT, eventually_ok,
    slowdown,
};
use rcgen::{CertificateParams, date_time_ymd};
use rustls::server::ServerSessionMemoryCache;
use rustls::{Connection, HandshakeKind};

const PORT: u16 = 7000;
/// Life of a certificate in seconds, in which a few connections are made with it.
const LIFE: u64 = 8;

/// A server that accepts its old session, although the client's node knows that the pod has another account now.
#[test]
fn resumed_server_must_still_pass_secure_naming() -> Result<()> {
    let scene = Resuming::start(|stolen| stolen.mint("web"))?;
    scene.call("one", true)?;
    assert_eq!(scene.resumed(), [false]);
    let account = |name: &'static str| {
        let edit =
            move |pod: &mut serde_json::Value| pod["spec"]["serviceAccountName"] = name.into();
        scene.mesh.manifests().edit("Pod", "default", "web", edit)
    };
    account("other")?;
    // Until the daemon learns of it, it uses the pooled tunnel.
    let line = eventually_ok(TIMEOUT, "a refusal", || {
        let line = scene.call_any("two")?;
        anyhow::ensure!(line["result"] == "refused", "{line}");
        Ok(line)
    })?;
    let reason = line["reason"].as_str().unwrap_or_default();
    assert!(
        reason.contains("secure naming") && reason.contains("sa/web"),
        "{line}"
    );
    assert!(scene.resumed().contains(&true), "no session was resumed");
    let got = scene.ledger.all().len();
    for number in 0..3 {
        let line = scene.call_any(&format!("three{number}"))?;
        assert_eq!(line["result"], "refused", "{line}");
    }
    assert_eq!(
        scene.ledger.all().len(),
        got,
        "the other account's bytes went to web"
    );
    account("web")?;
    eventually_ok(TIMEOUT, "web to be web again", || {
        let line = scene.call_any("four")?;
        anyhow::ensure!(line["result"] == "ok", "{line}");
        anyhow::ensure!(line["server_identity"] == spiffe("web"), "{line}");
        Ok(())
    })
}

#[test]
fn rejects_resumed_server_whose_certificate_expired() -> Result<()> {
    let mut until = SystemTime::UNIX_EPOCH;
    let scene = Resuming::start(|stolen| {
        until = in_seconds(LIFE * u64::from(slowdown()));
        stolen.mint_with(&[&spiffe("web")], |params| expire(params, until))
    })?;
    scene.call("one", true)?;
    while SystemTime::now() <= until {
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_secs(1));
    for number in 0..2 {
        let line = scene.call(&format!("two{number}"), false)?;
        let reason = line["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("has expired"), "{line}");
    }
    assert_eq!(scene.resumed()[..2], [false, true]);
    assert!(scene.ledger.takers("two0").is_empty() && scene.ledger.takers("two1").is_empty());
    Ok(())
}

#[test]
fn rejects_resumed_client_that_expired_or_calls_another_server() -> Result<()> {
    let pair = Pair::start_with(&Default::default(), |builder| {
        builder.pod(PodSpec::new("second").on("b").service_account("second"))
    })?;
    let (web, second) = (pair.web.clone(), pair.mesh.pod("second"));
    let ledger = Ledger::default();
    let _apps = [
        echo(&web, web.at(PORT), "web", &ledger)?,
        echo(&second, second.at(PORT), "second", &ledger)?,
    ];
    let mut faults = Faults::default();
    let stolen = Authority::stolen(&pair.mesh.node("a").ca_folder())?;
    let until = in_seconds(LIFE * u64::from(slowdown()));
    let presented = stolen.mint_with(&[&spiffe("outsider")], |params| expire(params, until))?;
    // One session store for all callers.
    let config = client_config(Some(&presented), &[ALPN])?;
    let call = |pod: &Pod, name: &str| -> Result<(HandshakeKind, bool, SocketAddr)> {
        let tcp = dial(pair.mesh.outside(), pod.at(PORT))?;
        // Sessions are stored by name; this offers one pod's session to another.
        let mut peer = Peer::client_of(tcp, config.clone(), web.at(PORT).ip())?;
        let local = peer.local();
        let client = SocketAddr::new(local.ip(), local.port() + 20_000);
        let data = frame(DATA, &early::piece(name, 0, 50));
        let connect = connect_frame(pod.at(PORT), client);
        let sent = peer.send(&[connect, data, frame(END, b"")].concat());
        let kind = match &peer.tls {
            Connection::Client(tls) => tls.handshake_kind().context("no handshake")?,
            Connection::Server(_) => unreachable!("it called"),
        };
        let served = sent.is_ok() && matches!(peer.frame(), Ok(Some((CONNECTED, _))));
        Ok((kind, served, if served { client } else { local }))
    };
    let first = call(&web, "first")?;
    faults.check((first.0, first.1) == (HandshakeKind::Full, true), || {
        format!("{first:?}")
    });
    let again = call(&web, "again")?;
    faults.check((again.0, again.1) == (HandshakeKind::Resumed, true), || {
        format!("{again:?}")
    });
    let other = call(&second, "other")?;
    faults.check((other.0, other.1) == (HandshakeKind::Full, true), || {
        format!("{other:?}")
    });
    let line = lines_of(&pair.far, other.2)?.remove(0);
    faults.check(line["server_identity"] == spiffe("second"), || {
        format!("{line}")
    });
    let back = call(&web, "back")?;
    faults.check(back.1, || format!("{back:?}"));
    while SystemTime::now() <= until {
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_secs(1));
    for name in ["late0", "late1"] {
        // The server may already refuse in the handshake.
        match call(&web, name) {
            Err(error) => println!("{name}: {error:#}"),
            Ok((kind, served, local)) => {
                println!("{name}: {kind:?}");
                faults.check(!served, || format!("{name}: {kind:?} was served"));
                faults.expect_line(name, &pair.far, local, ("refused", "has expired"));
            }
        }
        faults.check(ledger.takers(name).is_empty(), || {
            format!("{name} reached the app")
        });
    }
    faults.finish();
    Ok(())
}

/// A client with a daemon, and a server of the test that resumes every session.
struct Resuming {
    ledger: Ledger,
    capture: Capture,
    _server: InProcess,
    near: Daemon,
    mesh: Mesh,
}

impl Resuming {
    fn start(mint: impl FnOnce(&Authority) -> Result<Presented>) -> Result<Self> {
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .pod(PodSpec::new("client").on("a").service_account("client"))
            .pod(PodSpec::new("web").on("b").service_account("web"))
            .start()?;
        let near = mesh.node("a").start_daemon()?;
        near.wait_enrolled(&["default/client"])?;
        let stolen = Authority::stolen(&mesh.node("a").ca_folder())?;
        let mut config = server_config(&mint(&stolen)?, &[ALPN])?;
        config.session_storage = ServerSessionMemoryCache::new(100);
        config.send_tls13_tickets = 2;
        let ledger = Ledger::default();
        let web = mesh.pod("web");
        let server = InProcess::start(&web, web.at(PORT), {
            let ledger = ledger.clone();
            move |tcp, from| {
                let Ok(mut peer) = Peer::server(tcp, config.clone()) else {
                    return;
                };
                while let Ok(Some((CONNECT, _))) = peer.frame() {
                    let entry = ledger.open("web", from);
                    if peer.send(&frame(CONNECTED, b"")).is_err() {
                        return;
                    }
                    while let Ok(Some((DATA, bytes))) = peer.frame() {
                        ledger.add(entry, &bytes);
                        let _ = peer.send(&frame(DATA, &bytes));
                    }
                    let _ = peer.send(&frame(END, b""));
                }
            }
        })?;
        Ok(Self {
            ledger,
            capture: mesh.wire().capture()?,
            _server: server,
            near,
            mesh,
        })
    }

    /// Returns which handshakes resumed a session.
    fn resumed(&self) -> Vec<bool> {
        let seen = handshakes(&self.capture.so_far(), self.mesh.pod("web").at(PORT));
        seen.into_iter().map(|seen| seen.resumed).collect()
    }

    /// Opens a connection of the app. Returns its result.
    fn call_any(&self, name: &str) -> Result<serde_json::Value> {
        let to = self.mesh.pod("web").at(PORT);
        let app = script(&self.mesh.pod("client"), to, name, "send:100,end,rest")?;
        let spokes = spoken(app)?;
        let line = line_of(&self.near, &spokes[0])?;
        assert_eq!(
            spokes[0].was_echoed(),
            line["result"] == "ok",
            "{line}: {}",
            spokes[0].0
        );
        Ok(line)
    }

    fn call(&self, name: &str, well: bool) -> Result<serde_json::Value> {
        let line = self.call_any(name)?;
        let result = if well { "ok" } else { "refused" };
        assert_eq!(line["result"], result, "{name}: {line}");
        Ok(line)
    }
}

/// Returns a time in whole seconds, as in certificates.
fn in_seconds(seconds: u64) -> SystemTime {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    SystemTime::UNIX_EPOCH + Duration::from_secs(now.expect("after 1970").as_secs() + seconds)
}

fn expire(params: &mut CertificateParams, time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH);
    params.not_after = date_time_ymd(1970, 1, 1) + since.expect("after 1970");
}
