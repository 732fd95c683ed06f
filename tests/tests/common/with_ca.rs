//! The pair of pods, with a CA on the host outside that issues the certificates of both nodes.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::{
    App, Ca, CaOptions, Daemon, DaemonOptions, Mesh, Pod, PodSpec, Result, TIMEOUT, eventually_ok,
    slowdown,
};
use serde_json::Value;

/// Fields are dropped in this order: the daemons, the CA, then the mesh.
pub(crate) struct WithCa {
    /// Of node a.
    pub(crate) near: Daemon,
    /// Of node b.
    pub(crate) far: Daemon,
    pub(crate) ca: Ca,
    /// On node a.
    pub(crate) client: Pod,
    /// On node a, with another service account.
    pub(crate) other: Pod,
    /// On node b.
    pub(crate) web: Pod,
    pub(crate) mesh: Mesh,
}

/// Time limit for daemons to learn a change from the CA.
pub(crate) const LEARNT: Duration = Duration::from_secs(2);

/// The shortest lifetime of certificates that a daemon accepts, of which it uses 40 to 60 percent before it renews one. Longer
/// beside other tests, where a renewal may take seconds.
pub(crate) fn short_lifetime() -> Duration {
    Duration::from_secs(10) * slowdown()
}

impl WithCa {
    pub(crate) fn start() -> Result<Self> {
        Self::start_with(&CaOptions::default(), &DaemonOptions::default())
    }

    pub(crate) fn start_with(ca: &CaOptions, daemons: &DaemonOptions) -> Result<Self> {
        let pod = |name: &str| PodSpec::new(name).service_account(name);
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .routed()
            .pod(pod("client").on("a"))
            .pod(pod("other").on("a"))
            .pod(pod("web").on("b"))
            .start()?;
        let ca = mesh.start_ca(ca)?;
        let options = daemons.clone().ca(&ca);
        let mut started = mesh.start_daemons_with(&options)?.into_iter();
        let (Some(near), Some(far)) = (started.next(), started.next()) else {
            unreachable!("each of two nodes has a daemon")
        };
        let stage = Self {
            near,
            far,
            ca,
            client: mesh.pod("client"),
            other: mesh.pod("other"),
            web: mesh.pod("web"),
            mesh,
        };
        for daemon in [&stage.near, &stage.far] {
            wait_certified(daemon)?;
        }
        Ok(stage)
    }

    /// Starts an exchange that continues until it is interrupted.
    pub(crate) fn chat(&self, from: &Pod, to: SocketAddr) -> Result<App> {
        let mut chat = from.app(&format!("chat --to {to} --interval 50"))?;
        chat.event("connected", TIMEOUT)?;
        Ok(chat)
    }

    /// Whether a connection can be made and its data comes back.
    pub(crate) fn reaches(&self, from: &Pod, to: SocketAddr) -> Result<bool> {
        let command = format!("connect --to {to} --send hi --shutdown --read");
        let events = from.app(&command)?.finish(TIMEOUT)?.json_lines();
        Ok(events.last().is_some_and(|last| last["text"] == "hi"))
    }

    /// Waits until such a connection can be made.
    pub(crate) fn wait_reaches(&self, from: &Pod, to: SocketAddr) -> Result<()> {
        eventually_ok(TIMEOUT, &format!("{} to reach {to}", from.name()), || {
            anyhow::ensure!(self.reaches(from, to)?, "it is refused");
            Ok(())
        })
    }

    /// The given daemon's access log line, after a position, with the reason why a connection was refused or cut.
    pub(crate) fn reason(
        &self,
        daemon: &Daemon,
        start: u64,
        what: &str,
        result: &str,
    ) -> Result<Value> {
        let wanted = format!("a line with {what:?}");
        daemon.wait_for_log_after(start, &wanted, TIMEOUT, |line| {
            line["target"] == "access"
                && line["result"] == result
                && line["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains(what))
        })
    }
}

/// Waits until every identity of a daemon has a certificate.
pub(crate) fn wait_certified(daemon: &Daemon) -> Result<()> {
    eventually_ok(TIMEOUT, "a certificate for each identity", || {
        let status = daemon.status_json()?;
        let certificates = status["certificates"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        anyhow::ensure!(!certificates.is_empty(), "no identity is known yet");
        let missing = certificates
            .iter()
            .find(|certificate| certificate["serial"].is_null());
        anyhow::ensure!(missing.is_none(), "{missing:?} has none");
        Ok(())
    })
}

/// The serial number of an identity's certificate on a node.
pub(crate) fn serial(daemon: &Daemon, account: &str) -> Result<String> {
    let identity = spiffe(account);
    let status = daemon.status_json()?;
    let certificates = status["certificates"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    certificates
        .iter()
        .find(|certificate| certificate["identity"] == identity)
        .and_then(|certificate| certificate["serial"].as_str())
        .map(str::to_owned)
        .ok_or_else(|| anyhow::anyhow!("no certificate for {identity}: {status:#}"))
}

pub(crate) fn spiffe(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}
