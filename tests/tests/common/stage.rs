//! The setup of the attacks: two nodes with daemons, a client, a server, and a host outside that the attacker controls.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use mesh_tests::{
    App, Daemon, DaemonOptions, InProcess, Mesh, Nginx, Pod, PodSpec, Result, Snapshot, TIMEOUT,
    eventually, eventually_ok,
};

use super::hostile::{Authority, Peer, Presented, client_config, dial};

pub(crate) const HTTP: u16 = 8080;
pub(crate) const ECHO: u16 = 7000;
pub(crate) const WITNESS: u16 = 7001;
const MARKER: &str = "real traffic goes on";

/// Fields are dropped in this order: programs, daemons, the mesh.
pub(crate) struct Stage {
    pub(crate) authority: Authority,
    _nginx: Nginx,
    _echo: App,
    _witness: InProcess,
    ends: Ends,
    /// The daemon of node a, which runs the client.
    pub(crate) client_daemon: Daemon,
    /// The daemon of node b, which runs the server.
    pub(crate) daemon: Daemon,
    pub(crate) mesh: Mesh,
}

/// What the witness application saw when the connection of the client at this address was closed.
type Ends = Arc<Mutex<Vec<(SocketAddr, String)>>>;

impl Stage {
    /// Pods `client` on node a, `web` on node b with nginx, an echo server and a witness, and `other` on node a.
    pub(crate) fn set() -> Result<Self> {
        Self::set_with(&DaemonOptions::default())
    }

    /// Like the above, with daemons that have these options.
    pub(crate) fn set_with(options: &DaemonOptions) -> Result<Self> {
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .pod(PodSpec::new("client").on("a").service_account("client"))
            .pod(PodSpec::new("other").on("a").service_account("other"))
            .pod(PodSpec::new("web").on("b").service_account("web"))
            .start()?;
        let mut daemons = mesh.start_daemons_with(options)?;
        let (daemon, client_daemon) = (daemons.remove(1), daemons.remove(0));
        let web = mesh.pod("web");
        let ends = Ends::default();
        let seen = Arc::clone(&ends);
        let stage = Self {
            authority: Authority::stolen(&mesh.node("a").ca_folder())?,
            _nginx: Nginx::start(&web, HTTP, MARKER)?,
            _echo: web
                .app(&format!("echo-server --port {ECHO} --quiet"))?
                .listening()?,
            _witness: InProcess::start(&web, web.at(WITNESS), move |mut stream, peer| {
                let end = match std::io::copy(&mut stream, &mut std::io::sink()) {
                    Ok(count) => format!("finished after {count} bytes"),
                    Err(error) => format!("error: {:?}", error.kind()),
                };
                seen.lock().expect("no holder panics").push((peer, end));
            })?,
            ends,
            client_daemon,
            daemon,
            mesh,
        };
        stage.traffic();
        Ok(stage)
    }

    pub(crate) fn web(&self) -> Pod {
        self.mesh.pod("web")
    }

    /// A TLS client on the outside host with a valid certificate, after its handshake.
    pub(crate) fn outsider(&self, port: u16) -> Result<Peer> {
        let certificate = self.authority.mint("outsider")?;
        self.outsider_as(port, Some(&certificate))
    }

    /// A TLS client on the outside host with this certificate. Its handshake succeeds from its own point of view.
    pub(crate) fn outsider_as(&self, port: u16, certificate: Option<&Presented>) -> Result<Peer> {
        let config = client_config(certificate, &[super::hostile::ALPN])?;
        let tcp = dial(self.mesh.outside(), self.web().at(port))?;
        Ok(Peer::client(tcp, config)?)
    }

    /// What the witness saw at the end of the connection from `client`.
    pub(crate) fn witnessed(&self, client: SocketAddr) -> Result<String> {
        let what = format!("the end of {client} at the app");
        eventually(TIMEOUT, &what, || {
            let ends = self.ends.lock().expect("no holder panics");
            let mut ends = ends.iter();
            ends.find(|(peer, _)| *peer == client)
                .map(|(_, end)| end.clone())
        })
    }

    /// Whether the witness has seen the end of a connection from this host.
    pub(crate) fn was_witnessed(&self, client: SocketAddr) -> bool {
        let ends = self.ends.lock().expect("no holder panics");
        ends.iter().any(|(peer, _)| peer.ip() == client.ip())
    }

    /// Asserts that a request of the honest client is answered.
    pub(crate) fn traffic(&self) {
        let url = format!("http://{}/", self.web().at(HTTP));
        let answer = self
            .mesh
            .pod("client")
            .run("curl", ["-sS", "-m", "30", &url])
            .and_then(mesh_tests::Finished::ok)
            .unwrap_or_else(|error| panic!("real traffic: {error:#}"));
        assert_eq!(answer.stdout, MARKER);
    }

    /// Takes a snapshot of the server's node.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(&self.daemon, &[self.web().place()])
    }

    /// Asserts that the daemons are running, nothing has leaked since `before`, and traffic continues.
    pub(crate) fn assert_unharmed(&mut self, before: &Snapshot, memory_kib: u64) {
        self.traffic();
        for daemon in [&mut self.daemon, &mut self.client_daemon] {
            assert!(daemon.is_running(), "a daemon died: {}", daemon.log_text());
            let log = daemon.log_text();
            assert!(!log.contains("panicked"), "a daemon panicked: {log}");
        }
        eventually_ok(TIMEOUT, "nothing to be left", || {
            let growth = self.snapshot()?.growth_since(before, memory_kib, 4);
            anyhow::ensure!(growth.is_empty(), "{growth:?}");
            Ok(())
        })
        .unwrap_or_else(|error| panic!("something leaks: {error:#}"));
    }
}
