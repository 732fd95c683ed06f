//! Pods of one node: two clients and a server with a service in front of it.

use std::net::SocketAddr;

use mesh_tests::{
    Daemon, DaemonOptions, Mesh, MeshBuilder, Place, Pod, PodSpec, Result, ServiceSpec, TIMEOUT,
    eventually,
};
use serde_json::Value;

/// Fields are dropped in this order: the daemon, then the mesh.
pub(crate) struct Neighbours {
    pub(crate) daemon: Daemon,
    pub(crate) client: Pod,
    /// A client with another service account.
    pub(crate) other: Pod,
    pub(crate) web: Pod,
    pub(crate) mesh: Mesh,
}

/// The service in front of `web`, port 80 to 8080.
pub(crate) const SERVICES: [&str; 2] = ["10.96.0.7:80", "[fd96::7]:80"];

impl Neighbours {
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(&DaemonOptions::default(), |builder| builder)
    }

    pub(crate) fn start_with(
        options: &DaemonOptions,
        more: impl FnOnce(MeshBuilder) -> MeshBuilder,
    ) -> Result<Self> {
        Self::on(more(builder()).start()?, options)
    }

    /// Starts the daemon of the mesh, which [`builder`] or [`bridged`] describes.
    pub(crate) fn on(mesh: Mesh, options: &DaemonOptions) -> Result<Self> {
        let daemon = mesh.start_daemons_with(options)?.remove(0);
        Ok(Self {
            daemon,
            client: mesh.pod("client"),
            other: mesh.pod("other"),
            web: mesh.pod("web"),
            mesh,
        })
    }

    /// The addresses of `web`: its own and its service's, in both families.
    pub(crate) fn ways(&self) -> [SocketAddr; 4] {
        let [v4, v6] = SERVICES.map(|service| service.parse().expect("an address"));
        [self.web.at(8080), self.web.at6(8080), v4, v6]
    }

    /// Makes the daemon decide on connections from `client` to `to`, where an `echo-server` listens.
    pub(crate) fn decide(&self, to: SocketAddr) -> Result<()> {
        self.decide_from(&self.client, to)
    }

    pub(crate) fn decide_from(&self, client: &Place, to: SocketAddr) -> Result<()> {
        let before = self.verdicts()?;
        let start = self.daemon.log_position();
        echo(client, to)?;
        self.lines(start, to, 2)?;
        assert_eq!(self.verdicts()?, before + 1, "no verdict on {to}");
        Ok(())
    }

    /// The number of valid verdicts.
    pub(crate) fn verdicts(&self) -> Result<u64> {
        verdicts(&self.daemon)
    }

    /// Waits for this many access log lines about `to` after a position, and returns them sorted by direction.
    pub(crate) fn lines(&self, start: u64, to: SocketAddr, count: usize) -> Result<Vec<Value>> {
        let mut lines = Vec::new();
        self.daemon.wait_for_log_after(
            start,
            &format!("{count} lines about {to}"),
            TIMEOUT,
            |line| {
                if line["target"] == "access" && line["destination"] == to.to_string() {
                    lines.push(line.clone());
                }
                lines.len() == count
            },
        )?;
        lines.sort_by_key(|line| line["direction"].as_str() == Some("outbound"));
        Ok(lines)
    }
}

/// The mesh without a daemon. Its node routes between the pods, so that the kernel may carry their connections.
pub(crate) fn builder() -> MeshBuilder {
    bridged().routed()
}

/// The mesh without a daemon, with the pods on a bridge.
pub(crate) fn bridged() -> MeshBuilder {
    let pod = |name: &str| PodSpec::new(name).on("a").service_account(name);
    Mesh::builder()
        .node("a")
        .pod(pod("client"))
        .pod(pod("other"))
        .pod(pod("web").label("app", "web"))
        .service(
            ServiceSpec::new("web")
                .selector("app", "web")
                .address("10.96.0.7")
                .address("fd96::7")
                .port(80, 8080),
        )
}

/// The number of a daemon's verdicts that are valid.
pub(crate) fn verdicts(daemon: &Daemon) -> Result<u64> {
    Ok(daemon.status_json()?["sameNode"]["verdicts"]
        .as_u64()
        .unwrap_or(u64::MAX))
}

/// Waits until this many verdicts are valid.
pub(crate) fn wait_for_verdicts(daemon: &Daemon, count: u64) -> Result<()> {
    eventually(TIMEOUT, &format!("{count} verdicts"), || {
        (verdicts(daemon).ok()? == count).then_some(())
    })
}

/// Sends text to an `echo-server` and reads it back. Returns the last event.
pub(crate) fn echo(from: &Place, to: SocketAddr) -> Result<Value> {
    let client = format!("connect --to {to} --send {MESSAGE} --shutdown --read");
    let answer = from.app(&client)?.success(TIMEOUT)?;
    assert_eq!(answer["text"], MESSAGE, "{answer}");
    Ok(answer)
}

/// Like [`echo`], but must be refused. Returns the last event.
pub(crate) fn refused(from: &Place, to: SocketAddr) -> Result<Value> {
    let client = format!("connect --to {to} --send {MESSAGE} --shutdown --read");
    let answer = from.app(&client)?.failure(TIMEOUT)?;
    assert!(
        answer["errno"] == "ECONNREFUSED" || answer["errno"] == "ECONNRESET",
        "{answer}"
    );
    Ok(answer)
}

/// Whether a connection from the pod's application to `to` stays in the kernel instead of going to the daemon's
/// listener.
pub(crate) fn is_direct(pod: &Pod, local: &Value) -> Result<bool> {
    let local: SocketAddr = local.as_str().unwrap_or_default().parse()?;
    let sockets = pod.endpoints()?;
    // The daemon's own connection has the same source address and port.
    let captured = sockets
        .iter()
        .any(|socket| socket.remote.port() == 15001 && socket.local.port() == local.port());
    let own = sockets
        .iter()
        .any(|socket| socket.local == local && socket.remote.port() != 0);
    assert!(captured || own, "{local}: {sockets:?}");
    Ok(!captured)
}

pub(crate) const MESSAGE: &str = "what-neighbours-say";
