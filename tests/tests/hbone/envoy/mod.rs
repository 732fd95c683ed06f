//! Envoy as the peer: a pod of a node without a daemon, which has Envoy and a certificate of the mesh's CA.

mod client;
mod config;
mod server;
mod waypoint;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use mesh_tests::{
    Daemon, DaemonOptions, Envoy, Mesh, Package, Pod, PodSpec, TIMEOUT, eventually_ok,
};
use serde_json::Value;

use crate::common::authority::files;
use config::Config;

/// Fields are dropped in this order: the programs, then the mesh.
struct Facing {
    _envoy: Envoy,
    /// The daemon of `app`'s node.
    daemon: Daemon,
    /// A pod of the daemon's node.
    app: Pod,
    /// Envoy's pod.
    peer: Pod,
    log: PathBuf,
    mesh: Mesh,
}

impl Facing {
    /// Starts the daemon, and Envoy with a configuration that may name both pods, and the file for its access log. If
    /// there is no Envoy here, reports `test` as skipped and returns `None`.
    fn start(
        test: &str,
        configure: impl FnOnce(&mut Config, &Pod, &Pod, &std::path::Path),
    ) -> Result<Option<Self>> {
        if Package::folders(test, &[Package::ENVOY]).is_none() {
            return Ok(None);
        }
        let mesh = Mesh::builder()
            .node("a")
            .node("b")
            .pod(PodSpec::new("app").on("a").service_account("app"))
            .pod(
                PodSpec::new("peer")
                    .on("b")
                    .service_account("peer")
                    .annotation("ambient.istio.io/redirection", "enabled"),
            )
            .start()?;
        let node = mesh.node("a");
        let daemon = node.start_daemon_with(DaemonOptions::default())?;
        daemon.wait_enrolled(&["default/app"])?;
        let (app, peer) = (mesh.pod("app"), mesh.pod("peer"));
        let log = peer.folder().join("access.log");
        let mut config = Config::new(files(&node.ca_folder(), "peer", peer.folder())?);
        configure(&mut config, &app, &peer, &log);
        Ok(Some(Self {
            _envoy: Envoy::start(&peer, config.finish(), GROUP)?,
            daemon,
            app,
            peer,
            log,
            mesh,
        }))
    }

    /// Waits for a line of Envoy's access log that has these fields.
    fn wait_for_line(&self, fields: &[(&str, &str)]) -> Result<Value> {
        eventually_ok(TIMEOUT, "a line in Envoy's access log", || {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let mut lines = text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok());
            let has = |line: &Value, name: &str, wanted: &str| match &line[name] {
                Value::String(text) => text.contains(wanted),
                other => other.to_string().contains(wanted),
            };
            lines
                .find(|line: &Value| fields.iter().all(|(name, text)| has(line, name, text)))
                .with_context(|| format!("none has {fields:?}: {text}"))
        })
    }

    /// Waits for a line of the daemon's access log about a connection by HBONE that has these fields. Both identities must
    /// be in it.
    fn wait_for_access(
        &self,
        (client, server): (&str, &str),
        fields: &[(&str, &str)],
    ) -> Result<Value> {
        let line = self
            .daemon
            .wait_for_access(&format!("a line with {fields:?}"), TIMEOUT, |line| {
                fields
                    .iter()
                    .all(|(name, text)| line[name].as_str().is_some_and(|it| it.contains(text)))
            })
            .with_context(|| self.daemon.log_text())?;
        for (name, identity) in [("client_identity", client), ("server_identity", server)] {
            if line[name] != identity || line["path"] != "hbone" {
                bail!("{name} is not {identity}, or the path is not hbone: {line}");
            }
        }
        Ok(line)
    }
}

const APP: &str = "spiffe://cluster.local/ns/default/sa/app";
const PEER: &str = "spiffe://cluster.local/ns/default/sa/peer";
/// A group that exists everywhere.
const GROUP: u32 = 0;
