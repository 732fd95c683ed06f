//! A daemon's configuration, as set by a scenario.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::ca::{Ca, CaAccess};
use crate::node::Node;

/// Options of a daemon. An option that is not set has the daemon's own default, except for the pods' networks, which
/// are the mesh's, and the log format, which is JSON.
#[derive(Debug, Clone, Default)]
pub struct DaemonOptions {
    settings: Map<String, Value>,
    pub(crate) ca_folder: Option<PathBuf>,
    ca: Option<CaAccess>,
    certificate_lifetime: Option<Duration>,
    log_level: Option<String>,
    pub(crate) environment: Vec<(String, String)>,
    pub(crate) stands_by: bool,
    pub(crate) refuses_programs: bool,
    pub(crate) descriptors: Option<u64>,
    pub(crate) log_stalls: bool,
    pub(crate) capabilities: Option<String>,
}

impl DaemonOptions {
    /// `mode: PERMISSIVE`.
    pub fn permissive(self) -> Self {
        self.setting("mode", "PERMISSIVE".into())
    }

    /// `sameNode: tunnel`: use TLS between two pods of the same node as well.
    pub fn same_node_tunnel(self) -> Self {
        self.setting("sameNode", "tunnel".into())
    }

    /// Sets another trust domain than `cluster.local`. Set another CA as well.
    pub fn trust_domain(self, name: &str) -> Self {
        self.setting("trustDomain", name.into())
    }

    /// How long connections may continue after SIGTERM.
    pub fn drain(self, time: Duration) -> Self {
        self.setting("drain", format!("{}ms", time.as_millis()).into())
    }

    /// The networks that contain the pods' addresses.
    pub fn pod_networks(self, networks: &[&str]) -> Self {
        self.setting("podNetworks", json!(networks))
    }

    /// Sets a CA folder other than the mesh's. Creates it, private to root, if it does not exist.
    pub fn ca_folder(mut self, path: PathBuf) -> Self {
        self.ca_folder = Some(path);
        self
    }

    /// Gets certificates from this CA, instead of from a folder shared with the other daemons.
    pub fn ca(mut self, ca: &Ca) -> Self {
        self.ca = Some(ca.access());
        self
    }

    /// The lifetime of certificates.
    pub fn certificate_lifetime(mut self, time: Duration) -> Self {
        self.certificate_lifetime = Some(time);
        self
    }

    /// Sets a log level other than the default `info`, or a filter.
    pub fn log_level(mut self, level: &str) -> Self {
        self.log_level = Some(level.to_owned());
        self
    }

    /// Sets any top-level setting; overrides all others.
    pub fn setting(mut self, name: &str, value: Value) -> Self {
        self.settings.insert(name.to_owned(), value);
        self
    }

    /// Sets an environment variable of the daemon's process.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Passes `--stand-by`, and gives the daemon the folder of its health socket to itself, as in a container.
    pub fn stand_by(mut self) -> Self {
        self.stands_by = true;
        self
    }

    /// Makes the kernel refuse this daemon's eBPF programs: bpf(2) returns EINVAL for BPF_PROG_LOAD.
    pub fn programs_refused(mut self) -> Self {
        self.refuses_programs = true;
        self
    }

    /// Sets the daemon's limit of open files (RLIMIT_NOFILE), soft and hard.
    pub fn descriptors(mut self, limit: u64) -> Self {
        self.descriptors = Some(limit);
        self
    }

    /// Runs the daemon with these capabilities alone, such as `CAP_NET_ADMIN`. Needs setpriv (util-linux).
    pub fn capabilities<S: AsRef<str>>(mut self, names: &[S]) -> Self {
        self.capabilities = Some(bounding_set(names));
        self
    }

    /// Sends the daemon's log to a pipe that nobody reads.
    pub fn log_stalls(mut self) -> Self {
        self.log_stalls = true;
        self
    }

    pub(crate) fn config(&self, node: &Node) -> Value {
        let mut ca = match &self.ca {
            Some(ca) => ca.section(node.name()),
            None => {
                json!({"directory": self.ca_folder.clone().unwrap_or_else(|| node.ca_folder())})
            }
        };
        if let Some(time) = self.certificate_lifetime {
            ca["certificateLifetime"] = format!("{}ms", time.as_millis()).into();
        }
        let mut config = json!({
            "nodeName": node.name(),
            "discovery": {"files": node.manifests().folder()},
            "ca": ca,
            "podNetworks": ["10.77.0.0/16", "fd77::/16"],
            "log": {"format": "json", "level": self.log_level.as_deref().unwrap_or("info")},
            "kernel": {"cgroup": node.cgroup(), "pins": node.pins()},
        });
        for (name, value) in &self.settings {
            config[name] = value.clone();
        }
        config
    }
}

/// These capabilities as setpriv's `--bounding-set`: what root's programs get at most.
fn bounding_set<S: AsRef<str>>(names: &[S]) -> String {
    let names = names.iter().map(|name| {
        let name = name.as_ref().trim_start_matches("CAP_");
        format!(",+{}", name.to_lowercase())
    });
    format!("-all{}", names.collect::<String>())
}
