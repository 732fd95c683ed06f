//! A service with an honest endpoint and one or more that the test controls, which the client's daemon tries first.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use mesh_tests::{App, Context, Daemon, InProcess, Mesh, PodSpec, Result, ServiceSpec, TIMEOUT};
use socket2::SockRef;

use super::early::{Ledger, echo, script};
use super::hostile::{
    ALPN, Authority, CONNECT, CONNECTED, DATA, END, Peer, RESET, frame, server_config,
};

pub(crate) const SERVICE: &str = "10.96.0.7:80";
const PORT: u16 = 8080;

/// Fields are dropped in this order: applications and servers, daemons, the mesh.
pub(crate) struct TwoEndpoints {
    pub(crate) ledger: Ledger,
    _hold: App,
    _honest: InProcess,
    hostile: Vec<InProcess>,
    pub(crate) near: Daemon,
    pub(crate) far: Daemon,
    pub(crate) mesh: Mesh,
}

/// What an endpoint does with the connection whose CONNECT has come, the tunnel's `number`th: whether another may follow.
pub(crate) type Serve = fn(&mut Peer, SocketAddr, usize, &Ledger) -> io::Result<bool>;

impl TwoEndpoints {
    /// A client on node a; behind one service `honest` on node c and, on node b, which has no daemon, the others. The
    /// client's daemon has far more connections to the honest one, and so tries the others first.
    pub(crate) fn start(others: &[(&str, Serve)]) -> Result<Self> {
        let server = |name: &str, node: &str| {
            let pod = PodSpec::new(name).on(node).service_account("web");
            pod.label("app", "web")
        };
        let mut builder = Mesh::builder().node("a").node("b").node("c");
        for (name, _) in others {
            builder = builder.pod(server(name, "b"));
        }
        let service = ServiceSpec::new("web").selector("app", "web");
        let mesh = builder
            .pod(PodSpec::new("client").on("a").service_account("client"))
            .pod(server("honest", "c"))
            .service(service.address("10.96.0.7").port(80, PORT))
            .start()?;
        let near = mesh.node("a").start_daemon()?;
        near.wait_enrolled(&["default/client"])?;
        let far = mesh.node("c").start_daemon()?;
        far.wait_enrolled(&["default/honest"])?;
        let ledger = Ledger::default();
        let authority = Authority::stolen(&mesh.node("a").ca_folder())?;
        let mut hostile = Vec::new();
        for (name, serve) in others {
            let (pod, presented) = (mesh.pod(name), authority.mint("web")?);
            let (serve, ledger) = (*serve, ledger.clone());
            hostile.push(InProcess::start(&pod, pod.at(PORT), move |tcp, from| {
                let Ok(config) = server_config(&presented, &[ALPN]) else {
                    return;
                };
                let Ok(mut peer) = Peer::server(tcp, config) else {
                    return;
                };
                let mut number = 0;
                while let Ok(Some((CONNECT, _))) = peer.frame() {
                    number += 1;
                    if !serve(&mut peer, from, number, &ledger).unwrap_or(false) {
                        return;
                    }
                }
            })?);
        }
        let pod = mesh.pod("honest");
        let honest = echo(&pod, pod.at(PORT), "honest", &ledger)?;
        let mut hold = mesh.pod("client").app(&format!(
            "many --to {} --connections 40 --hold 600000",
            pod.at(PORT)
        ))?;
        hold.event("open", TIMEOUT)
            .context("the connections that keep the honest endpoint busy")?;
        Ok(Self {
            ledger,
            _hold: hold,
            _honest: honest,
            hostile,
            near,
            far,
            mesh,
        })
    }

    /// Starts a script of the client, which connects to the service first.
    pub(crate) fn script(&self, name: &str, steps: &str) -> Result<App> {
        let to = SERVICE.parse().expect("an address");
        script(&self.mesh.pod("client"), to, name, steps)
    }

    /// The address that an endpoint listens on.
    pub(crate) fn at(&self, pod: &str) -> SocketAddr {
        self.mesh.pod(pod).at(PORT)
    }
}

/// Returns the bytes that arrive after a CONNECT within the time limit.
pub(crate) fn behind(peer: &mut Peer, time: Duration) -> io::Result<Option<Vec<u8>>> {
    peer.tcp.set_read_timeout(Some(time))?;
    let came = peer.frame();
    peer.tcp.set_read_timeout(Some(super::hostile::PATIENCE))?;
    match came {
        Ok(Some((DATA, bytes))) => Ok(Some(bytes)),
        Ok(other) => Err(io::Error::other(format!("{other:?} behind a CONNECT"))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Accepts, and echoes what arrives until both sides have ended. Calls `note` with what arrives after the first bytes.
pub(crate) fn serve_well(
    peer: &mut Peer,
    first: &[u8],
    mut note: impl FnMut(&[u8]),
) -> io::Result<()> {
    peer.send(&frame(CONNECTED, b""))?;
    if !first.is_empty() {
        peer.send(&frame(DATA, first))?;
    }
    loop {
        match peer.frame()? {
            Some((DATA, bytes)) => {
                note(&bytes);
                peer.send(&frame(DATA, &bytes))?;
            }
            Some((END, _)) => return peer.send(&frame(END, b"")),
            other => return Err(io::Error::other(format!("{other:?}"))),
        }
    }
}

/// Refuses, as a daemon does, and waits until the client has closed.
pub(crate) fn refuse(peer: &mut Peer, code: u8) -> io::Result<bool> {
    peer.send(&frame(RESET, &[&[code][..], b"not here"].concat()))?;
    hold(&peer.tcp)
}

/// Closes the connection with a RST.
pub(crate) fn rst(tcp: &TcpStream) -> io::Result<bool> {
    SockRef::from(tcp).set_linger(Some(Duration::ZERO))?;
    Ok(false)
}

/// Sends nothing more until the client has closed.
pub(crate) fn hold(mut tcp: &TcpStream) -> io::Result<bool> {
    let mut buffer = [0; 4096];
    while tcp.read(&mut buffer)? > 0 {}
    Ok(false)
}
