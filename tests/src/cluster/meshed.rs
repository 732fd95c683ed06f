//! A cluster with the chart installed, and the operations that its users share: kubectl, helm, and curl inside pods.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{Cluster, ClusterNode, ClusterOptions, auth_daemon_image};
use crate::chart;
use crate::eventually::slowdown;
use crate::locate::auth_daemon;
use crate::process::Finished;

/// The namespace of everything in the chart.
pub const SYSTEM: &str = chart::SYSTEM_NAMESPACE;
/// The name under which the chart is installed.
pub const RELEASE: &str = "auth-daemon";
/// The namespace of the apps.
pub const APPS: &str = "shop";
/// The label of the CA's pods.
pub const CA: &str = "app.kubernetes.io/name=auth-ca";
/// The label of the daemons' pods.
pub const DAEMON: &str = "app.kubernetes.io/name=auth-daemon";
/// How long users wait for a change of the cluster. Generous, because pods start slowly on a machine of two cores.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster whose nodes have the daemon's image, and the chart once [`MeshedCluster::install`] has installed it.
#[derive(Debug)]
pub struct MeshedCluster {
    /// The cluster.
    pub cluster: Cluster,
    folder: PathBuf,
}

impl MeshedCluster {
    /// Starts a cluster of these nodes, loads the daemon's image on them, and creates the namespaces of the chart and of
    /// the apps.
    pub fn start(nodes: &[&str], options: impl Into<ClusterOptions>) -> Result<Self> {
        let cluster = Cluster::start(nodes, options)?;
        let folder = cluster.mesh().outside().folder().join("meshed");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let archive = folder.join("auth-daemon.tar");
        auth_daemon_image(&auth_daemon()?, &archive)?;
        cluster.load(&archive)?;
        let meshed = Self { cluster, folder };
        let namespace = |name: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        meshed.apply(&[namespace(SYSTEM), namespace(APPS), ca_service()])?;
        Ok(meshed)
    }

    /// Installs the chart, in STRICT mode, with more options of `helm install`. Does not wait for its pods.
    pub fn install(&self, options: &[&str]) -> Result<()> {
        let values = self.folder.join("values.json");
        fs::write(&values, installed_values().to_string())
            .with_context(|| format!("writing {}", values.display()))?;
        let values = values.display().to_string();
        let options = [&["--values", values.as_str()], options].concat();
        self.helm("install", &options).map(drop)
    }

    /// Runs a command of helm on the release, with the chart if the command takes one, and returns its output.
    pub fn helm(&self, command: &str, options: &[&str]) -> Result<String> {
        let chart = chart::folder().display().to_string();
        let mut arguments = vec![command, RELEASE];
        if ["install", "upgrade"].contains(&command) {
            arguments.push(&chart);
        }
        arguments.extend(["--namespace", SYSTEM]);
        arguments.extend(options);
        self.cluster.helm(arguments, PATIENCE)
    }

    /// Runs kubectl with arguments separated by spaces, and returns its output.
    pub fn kubectl(&self, arguments: &str) -> Result<String> {
        let finished = self.cluster.kubectl(arguments.split(' '))?;
        Ok(finished.ok()?.stdout)
    }

    /// An object, or a list of them.
    pub fn get(&self, what: &str) -> Result<Value> {
        let stdout = self.kubectl(&format!("get {what} -o json"))?;
        serde_json::from_str(&stdout).with_context(|| format!("kubectl get {what}"))
    }

    /// `kubectl apply` of objects.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let path = self.folder.join("objects.json");
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        fs::write(&path, list.to_string())?;
        self.kubectl(&format!("apply -f {}", path.display()))
            .map(drop)
    }

    /// Runs a program in a pod of the apps.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<Finished> {
        let kubectl = ["-n", APPS, "exec", pod, "--"];
        self.cluster.kubectl(kubectl.iter().chain(command))
    }

    /// The body that curl in a pod gets from a URL.
    pub fn curl(&self, pod: &str, url: &str) -> Result<String> {
        let seconds = (15 * slowdown()).to_string();
        let finished = self.exec(pod, &["curl", "-sSf", "--max-time", &seconds, url])?;
        Ok(finished.ok()?.stdout)
    }

    /// The pods that a label selects, without those being deleted.
    pub fn pods(&self, namespace: &str, label: &str) -> Result<Vec<Value>> {
        let list = self.get(&format!("pods -n {namespace} -l {label}"))?;
        let items = list["items"].as_array().context("no list")?;
        let living = items
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(living.cloned().collect())
    }

    /// The only such pod.
    pub fn pod(&self, namespace: &str, label: &str) -> Result<Value> {
        let pods = self.pods(namespace, label)?;
        let [pod] = pods.as_slice() else {
            let names: Vec<_> = pods.iter().map(name).collect();
            bail!("{label} selects {names:?}");
        };
        Ok(pod.clone())
    }

    /// The node of a pod, and containerd's ID and the process ID of its container, or of its sandbox, that runs. The runtime
    /// keeps one that has exited beside the one that replaced it.
    fn running(&self, pod: &Value, kind: &str) -> Result<(&ClusterNode, String, String)> {
        let node = pod["spec"]["nodeName"]
            .as_str()
            .context("a pod on no node")?;
        let node = self.cluster.node(node);
        let filter = format!(
            r#"labels."io.kubernetes.pod.uid"=={},labels."io.cri-containerd.kind"=={kind}"#,
            pod["metadata"]["uid"]
                .as_str()
                .context("a pod without a UID")?
        );
        let list = node.run("ctr", ["-n", "k8s.io", "containers", "ls", "-q", &filter])?;
        let list = list.ok()?.stdout;
        let containers: Vec<_> = list.lines().collect();
        let tasks = node
            .run("ctr", ["-n", "k8s.io", "tasks", "ls"])?
            .ok()?
            .stdout;
        let running = tasks.lines().find_map(|row| {
            let mut fields = row.split_whitespace();
            let (id, process, state) = (fields.next()?, fields.next()?, fields.next()?);
            (state == "RUNNING" && containers.contains(&id))
                .then(|| (node, id.to_owned(), process.to_owned()))
        });
        running.with_context(|| format!("{}'s {kind} does not run", name(pod)))
    }

    /// The node of a pod, and containerd's ID of its container or of its sandbox.
    pub fn container(&self, pod: &Value, kind: &str) -> Result<(&ClusterNode, String)> {
        let (node, container, _) = self.running(pod, kind)?;
        Ok((node, container))
    }

    /// The process ID of a pod's container or of its sandbox.
    pub fn process(&self, pod: &Value, kind: &str) -> Result<String> {
        let (_, _, process) = self.running(pod, kind)?;
        Ok(process)
    }

    /// Runs a program of the node in a pod's network namespace, and returns its output.
    pub fn in_netns(&self, pod: &Value, command: &str) -> Result<String> {
        let (node, _, process) = self.running(pod, "sandbox")?;
        let target = format!("--target={process}");
        let enter = [target.as_str(), "--net"];
        // The exit code is ignored: some versions of ip fail on an empty routing table.
        let finished = node.run("nsenter", enter.into_iter().chain(command.split(' ')))?;
        Ok(finished.stdout)
    }

    /// The ready daemon's pod on a node.
    pub fn daemon_on(&self, node: &str) -> Result<Value> {
        let daemons = self.pods(SYSTEM, DAEMON)?;
        let mut on_node = daemons
            .into_iter()
            .filter(|pod| pod["spec"]["nodeName"] == node && is_ready(pod));
        on_node
            .next()
            .with_context(|| format!("no daemon is ready on {node}"))
    }

    /// The log of a node's daemon.
    pub fn daemon_log(&self, node: &str) -> Result<String> {
        let daemon = self.daemon_on(node)?;
        self.kubectl(&format!("logs -n {SYSTEM} {}", name(&daemon)))
    }

    /// Prints the last log lines of daemons and CA.
    pub fn print_logs(&self) {
        for label in [DAEMON, CA] {
            let logs = self.kubectl(&format!("logs -n {SYSTEM} -l {label} --prefix --tail=30"));
            println!("{}", logs.unwrap_or_else(|error| format!("{error:#}")));
        }
    }

    /// Waits until a rollout, such as of `deployment/web`, is complete.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<()> {
        self.kubectl_waits(namespace, &format!("rollout status {what}"))
    }

    /// Waits until objects of the apps, such as `pod/a pod/b`, have a condition.
    pub fn becomes(&self, what: &str, condition: &str) -> Result<()> {
        self.kubectl_waits(APPS, &format!("wait {what} --for=condition={condition}"))
    }

    fn kubectl_waits(&self, namespace: &str, command: &str) -> Result<()> {
        let seconds = (PATIENCE * slowdown()).as_secs();
        self.kubectl(&format!("{command} -n {namespace} --timeout={seconds}s"))
            .map(drop)
    }
}

/// The cluster has no DNS, so the daemons use the CA at this address of the service range.
const CA_ADDRESS: &str = "10.96.150.12";

/// A Service at [`CA_ADDRESS`], as the chart's is at an address that the API server chooses.
fn ca_service() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "ca-without-dns", "namespace": SYSTEM},
        "spec": {
            "clusterIP": CA_ADDRESS, "ports": [{"port": 15012}],
            "selector": {
                "app.kubernetes.io/name": "auth-ca", "auth-daemon.io/ca-leader": "true",
            },
        },
    })
}

/// The chart's values for this cluster.
fn installed_values() -> Value {
    let ca = json!({
        "address": format!("{CA_ADDRESS}:15012"), "serverName": format!("auth-ca.{SYSTEM}.svc"),
    });
    json!({"mode": "STRICT", "daemon": {"config": {"ca": ca}}})
}

/// An object's name.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// A pod's address.
pub fn address(pod: &Value) -> &str {
    pod["status"]["podIP"].as_str().unwrap_or_default()
}

/// All addresses of a pod, the first one first.
pub fn addresses(pod: &Value) -> Result<Vec<IpAddr>> {
    let all = pod["status"]["podIPs"].as_array().into_iter().flatten();
    let all = all.filter_map(|one| one["ip"].as_str());
    all.map(|text| text.parse().with_context(|| format!("address {text:?}")))
        .collect()
}

/// Whether a pod is ready.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}
