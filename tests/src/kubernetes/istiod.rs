//! A real istiod, beside an API server.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use super::{Kubernetes, START, Site, first_missing, last_lines, program};
use crate::eventually::eventually_ok;
use crate::process::Process;

/// A control plane of an Istio mesh in ambient mode. Dropping it stops it.
#[derive(Debug)]
pub struct Istiod {
    trusted: String,
    options: IstiodOptions,
    /// Of the gRPC API over TLS, and of the readiness endpoint.
    addresses: [SocketAddr; 2],
    process: Option<Process>,
}

/// How an istiod differs from one that has only defaults.
#[derive(Debug, Clone, Default)]
pub struct IstiodOptions {
    /// The folder of an [`super::IstioCa`] whose keys it signs with, instead of its own.
    pub ca: Option<PathBuf>,
    /// Further fields of its mesh configuration (`MeshConfig`), in YAML.
    pub mesh_config: String,
}

impl Istiod {
    /// The name in istiod's certificate.
    pub const SERVER_NAME: &str = "istiod.istio-system.svc";
    /// The audience of tokens for istiod.
    pub const AUDIENCE: &str = "istio-ca";

    /// Why none can run here: the first program that is missing.
    pub fn missing() -> Option<String> {
        Kubernetes::missing().or_else(|| first_missing(&["pilot-discovery"], &[]))
    }

    /// Starts istiod and waits until it is ready. `trusted`, as `namespace/account`, may ask for certificates of the pods of
    /// its node.
    pub fn start(cluster: &Kubernetes, trusted: &str) -> Result<Self> {
        Self::start_with(cluster, trusted, IstiodOptions::default())
    }

    /// Like the above, with options.
    pub fn start_with(cluster: &Kubernetes, trusted: &str, options: IstiodOptions) -> Result<Self> {
        if cluster.get("/api/v1/namespaces/istio-system")?.is_none() {
            cluster.namespace("istio-system")?;
        }
        for kind in ["ServiceEntry", "WorkloadEntry"] {
            define(cluster, kind)?;
        }
        let ip = cluster.address.ip();
        let addresses = match &cluster.site {
            Site::Alone { .. } => {
                let taken = [TcpListener::bind((ip, 0))?, TcpListener::bind((ip, 0))?];
                let [one, other] = taken.map(|listener| listener.local_addr());
                [one?, other?]
            }
            Site::Cluster(_) => [(ip, 15012).into(), (ip, 8080).into()],
        };
        let mut istiod = Self {
            trusted: trusted.to_owned(),
            options,
            addresses,
            process: None,
        };
        istiod.run(cluster)?;
        Ok(istiod)
    }

    /// Starts it again, after [`Istiod::stop`].
    pub fn run(&mut self, cluster: &Kubernetes) -> Result<()> {
        let folder = cluster.folder();
        let mesh = folder.join("mesh.yaml");
        fs::write(
            &mesh,
            format!(
                "trustDomain: cluster.local\nrootNamespace: istio-system\n{}",
                self.options.mesh_config
            ),
        )?;
        // A folder without files makes it sign with keys of its own.
        let ca = self.options.ca.clone();
        let ca = ca.unwrap_or_else(|| folder.join("no-cacerts"));
        let [api, ready] = self.addresses.map(|address| address.to_string());
        let mut process = cluster.site.spawn(program("pilot-discovery"), |command| {
            command
                .current_dir(folder)
                .arg("discovery")
                .arg("--kubeconfig")
                .arg(cluster.kubeconfig())
                .arg("--meshConfig")
                .arg(&mesh)
                .args(["--secureGRPCAddr", &api, "--httpAddr", &ready])
                .args(["--grpcAddr", "", "--httpsAddr", "", "--monitoringAddr", ""])
                .args(["--ctrlz_port", "0", "--log_output_level", "default:info"])
                .env("POD_NAMESPACE", "istio-system")
                .env("POD_NAME", "istiod")
                .env("PILOT_ENABLE_AMBIENT", "true")
                .env("CLUSTER_ID", "Kubernetes")
                .env("CA_TRUSTED_NODE_ACCOUNTS", &self.trusted)
                .env("ROOT_CA_DIR", &ca)
                // Without it, istiod takes no other root while it runs.
                .env("ISTIO_MULTIROOT_MESH", "true");
        })?;
        let is_ready = eventually_ok(START, "a ready istiod", || {
            if let Some(status) = process.ended()? {
                return Ok(Err(anyhow!("it exited ({status})")));
            }
            let mut curl = cluster.client("curl")?;
            curl.args(["-sf", "--max-time", "5", &format!("http://{ready}/ready")]);
            match Process::spawn(curl)?.finish(START)?.code() {
                Some(0) => Ok(Ok(())),
                other => bail!("curl ends with {other:?}"),
            }
        })
        .and_then(|outcome| outcome);
        is_ready.with_context(|| {
            let output = format!("{}\n{}", process.stdout(), process.stderr());
            format!("istiod: {}", last_lines(&output))
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// Kills it, as an outage would.
    pub fn stop(&mut self) -> Result<()> {
        match self.process.take() {
            Some(mut process) => process.kill().map(drop),
            None => Ok(()),
        }
    }

    /// The address of its gRPC API over TLS.
    pub fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// Writes the roots that istiod publishes in `namespace` (`istio-ca-root-cert`) into a file, as a kubelet would.
    pub fn root_file(&self, cluster: &Kubernetes, namespace: &str) -> Result<PathBuf> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/istio-ca-root-cert");
        let roots = eventually_ok(START, "istiod's roots", || {
            let found = cluster.get(&path)?;
            let roots = found
                .as_ref()
                .and_then(|map| map["data"]["root-cert.pem"].as_str());
            roots
                .map(str::to_owned)
                .with_context(|| format!("no {path} yet"))
        })?;
        let file = cluster
            .folder()
            .join(format!("istio-roots-{namespace}.pem"));
        fs::write(&file, roots)?;
        Ok(file)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let process = self.process.as_ref();
        process.map_or_else(String::new, |process| process.stdout() + &process.stderr())
    }
}

/// Defines a kind of Istio's networking API, with any fields.
fn define(cluster: &Kubernetes, kind: &str) -> Result<()> {
    let plural = format!("{}ies", kind.to_lowercase().trim_end_matches('y'));
    let name = format!("{plural}.networking.istio.io");
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    if cluster.get(&format!("{path}/{name}"))?.is_some() {
        return Ok(());
    }
    let open = json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true});
    let schema = json!({"type": "object", "properties": {"spec": open, "status": open}});
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": name},
        "spec": {
            "group": "networking.istio.io", "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [{
                "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": schema},
            }],
        },
    });
    cluster.create(path, &definition).map(drop)
}
