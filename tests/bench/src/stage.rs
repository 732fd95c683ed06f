//! One mesh for each system: two nodes, a client, and servers on the other node, on the client's own node and outside.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use mesh_tests::{App, Iperf3, Mesh, Nginx, Place, PodSpec};

use super::proxies::Proxies;
use super::system::{System, Way};
use super::topology::{CLIENT, ECHO_PORT, IPERF3_PORT, NEAR, NGINX_PORT, NODE_A, NODE_B, WEB};

/// A mesh with a system's proxies and the servers. Fields are dropped from top to bottom: the programs first.
pub(super) struct Stage {
    pub(super) system: System,
    _servers: Vec<Servers>,
    pub(super) proxies: Proxies,
    pub(super) mesh: Mesh,
}

/// The servers in one place.
struct Servers {
    _nginx: Nginx,
    _iperf3: Iperf3,
    _echo: App,
}

impl Stage {
    /// Starts the mesh, and verifies by a capture that requests cross the wire in the way that is expected of the
    /// system.
    pub(super) fn set(system: System) -> Result<Self> {
        let pod = |name: &str, node: &str| {
            let pod = PodSpec::new(name)
                .on(node)
                .service_account(name)
                .ipv4_only();
            match system {
                System::Hbone => pod.annotation("ambient.istio.io/redirection", "enabled"),
                _ => pod,
            }
        };
        let mesh = Mesh::builder()
            .node(NODE_A)
            .node(NODE_B)
            // On a bridge, the daemon would use TLS on one node, too.
            .routed()
            .pod(pod(CLIENT, NODE_A))
            .pod(pod(NEAR, NODE_A))
            .pod(pod(WEB, NODE_B))
            .start()?;
        let (near, web) = (mesh.pod(NEAR), mesh.pod(WEB));
        let servers = [near.place(), web.place(), mesh.outside()];
        for place in servers
            .into_iter()
            .chain([mesh.pod(CLIENT).place(), web.place()])
        {
            // A load leaves tens of thousands of sockets in TIME-WAIT, and the next one must not run out of ports.
            let reuse = [("net/ipv4/tcp_tw_reuse", "1")];
            place.netns().set_parameters(&reuse)?;
        }
        let servers = servers
            .into_iter()
            .map(Servers::start)
            .collect::<Result<_>>()?;
        let proxies = Proxies::start(system, &mesh)?;
        let stage = Self {
            system,
            _servers: servers,
            proxies,
            mesh,
        };
        stage
            .show_encryption(Way::Across, system.has_proxies())
            .and_then(|()| stage.show_encryption(Way::Outside, false))
            .with_context(|| stage.proxies.last_words())?;
        Ok(stage)
    }

    /// The place that the loads come from.
    pub(super) fn client(&self) -> Place {
        self.mesh.pod(CLIENT).place().clone()
    }

    /// The server of a way.
    pub(super) fn server(&self, way: Way) -> IpAddr {
        match way {
            Way::Across => self.mesh.pod(WEB).ipv4().into(),
            Way::OneNode => self.mesh.pod(NEAR).ipv4().into(),
            Way::Outside => self.mesh.outside_ipv4().into(),
        }
    }

    /// Requests a unique marker from the server of a way, and returns whether it is readable on the wire.
    fn show_encryption(&self, way: Way, encrypted: bool) -> Result<()> {
        let word = format!("readable-{}", self.mesh.id());
        let url = format!(
            "http://{}/{word}",
            SocketAddr::new(self.server(way), NGINX_PORT)
        );
        let capture = self.mesh.wire().capture()?;
        let arguments = ["-sS", "--fail", "--max-time", "10", "--noproxy", "*", &url];
        let answer = self.client().run("curl", arguments)?.ok()?.stdout;
        let recording = capture.stop()?;
        ensure!(answer == BODY, "nginx answers {answer:?}");
        ensure!(
            !recording.packets().is_empty(),
            "nothing crossed the wire on the way to {url}"
        );
        ensure!(
            recording.contains(word.as_bytes()) != encrypted,
            "{}: a request to {url} is {}readable on the wire",
            self.system,
            if encrypted { "" } else { "not " }
        );
        Ok(())
    }
}

impl Servers {
    fn start(place: &Place) -> Result<Self> {
        Ok(Self {
            _nginx: Nginx::start_without_log(place, NGINX_PORT, BODY)?,
            _iperf3: Iperf3::start(place, IPERF3_PORT)?,
            _echo: place
                .app(&format!("echo-server --port {ECHO_PORT} --quiet"))?
                .listening()
                .context("the echo server")?,
        })
    }
}

const BODY: &str = "hello!";
