//! A node of a cluster: containerd, kubelet and kube-proxy in namespaces of their own, at their usual paths.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use super::{ClusterOptions, PodNetwork, START};
use crate::cgroup::{self, Hierarchy};
use crate::eventually::eventually_ok;
use crate::kubernetes::{self, Kubernetes};
use crate::locate::kube_node;
use crate::mesh::Mesh;
use crate::node::Node;
use crate::process::{Finished, Process};
use crate::{mounts, plumbing};

/// A node that runs containers. Its network namespace is that of a [`Node`] of the mesh. It has a mount namespace and a
/// cgroup namespace of its own, which disappear with its processes.
#[derive(Debug)]
pub struct ClusterNode {
    node: Node,
    mesh_folder: String,
    options: ClusterOptions,
    running: Mutex<Running>,
    /// The archives of the images that it has.
    images: Mutex<Vec<PathBuf>>,
}

/// What a reboot replaces.
#[derive(Debug)]
struct Running {
    /// The node's folder in each cgroup v1 hierarchy.
    cgroups: Vec<PathBuf>,
    mounts: File,
    cgroup_root: File,
    programs: Vec<(&'static str, Process)>,
    _holder: Process,
}

impl Running {
    /// Prepares the cgroups and the namespaces of `node`.
    fn start(node: &Node, mesh_folder: &str) -> Result<Self> {
        let below = Path::new(mesh_folder).join(node.name());
        let mut roots = vec![format!("={}", node.cgroup().display())];
        let mut cgroups = Vec::new();
        let cgroup2 = mounts::cgroup2()?;
        if cgroup::has_controllers(&cgroup2)? {
            cgroup::enable_controllers(&cgroup2, node.cgroup())?;
        }
        for hierarchy in Hierarchy::all()? {
            let folder = hierarchy.create(&below)?;
            roots.push(format!("{}={}", hierarchy.options, folder.display()));
            cgroups.push(folder);
        }
        let mut command = node.place().command(kube_node()?)?;
        command.args(roots.iter().flat_map(|root| ["--root", root]));
        command.args(["--leaf", "host"]);
        let mut holder = Process::spawn(command)?;
        holder.wait_for_line("a node's namespaces", START, |line| {
            (line == "ready").then_some(())
        })?;
        let namespace = |name: &str| {
            let path = format!("/proc/{}/ns/{name}", holder.pid());
            File::open(&path).with_context(|| format!("opening {path}"))
        };
        Ok(Self {
            cgroups,
            mounts: namespace("mnt")?,
            cgroup_root: namespace("cgroup")?,
            programs: Vec::new(),
            _holder: holder,
        })
    }
}

impl ClusterNode {
    /// Starts containerd on `node`.
    pub(super) fn start(node: &Node, mesh_folder: &str, options: ClusterOptions) -> Result<Self> {
        let started = Self {
            node: node.clone(),
            mesh_folder: mesh_folder.to_owned(),
            options,
            running: Mutex::new(Running::start(node, mesh_folder)?),
            images: Mutex::default(),
        };
        started.start_containerd()?;
        Ok(started)
    }

    /// Ends everything on the node, as a power failure does, and starts it again, with an empty disk but for its images.
    pub(super) fn reboot(&self, mesh: &Mesh, api: &Kubernetes) -> Result<()> {
        mesh.reset(&self.node)?;
        let below = Path::new(&self.mesh_folder).join(self.name());
        for hierarchy in Hierarchy::all()? {
            hierarchy.remove(&below)?;
        }
        plumbing::outside_is_default_route([self.node.netns()].into_iter())?;
        *self.running() = Running::start(&self.node, &self.mesh_folder)?;
        self.start_containerd()?;
        let images = self
            .images
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for image in images {
            self.import(&image)?;
        }
        self.join(api)?;
        self.wait_ready(api)
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, as in the API.
    pub fn name(&self) -> &str {
        self.node.name()
    }

    /// The mesh node below it: its network namespace, addresses and cgroup.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// A command that will run on the node, outside of any container. Programs that `cargo xtask kubernetes` builds are
    /// in its `$PATH`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let join = |folder: &PathBuf| {
            let path = folder.join("cgroup.procs");
            OpenOptions::new()
                .write(true)
                .open(&path)
                .with_context(|| format!("opening {}", path.display()))
        };
        let running = self.running();
        let cgroups: Vec<File> = running.cgroups.iter().map(join).collect::<Result<_>>()?;
        let share = |namespace: &File| namespace.try_clone().context("sharing a namespace");
        let (mounts, cgroup_root) = (share(&running.mounts)?, share(&running.cgroup_root)?);
        drop(running);
        let mut command = self.node.place().command(program)?;
        command.env("PATH", kubernetes::path_variable()?);
        // SAFETY: between fork and exec only write(2) and setns(2) are called, both async-signal-safe, on files that
        // the closure owns; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                for procs in &cgroups {
                    nix::unistd::write(procs, b"0").map_err(io::Error::from)?;
                }
                setns(&mounts, CloneFlags::CLONE_NEWNS).map_err(io::Error::from)?;
                setns(&cgroup_root, CloneFlags::CLONE_NEWCGROUP).map_err(io::Error::from)
            });
        }
        Ok(command)
    }

    /// Runs a program on the node, outside of any container, and waits for its end.
    pub fn run<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        let mut command = self.command(program)?;
        command.args(arguments);
        Process::spawn(command)?
            .finish(START)
            .with_context(|| format!("on {}", self.name()))
    }

    /// Imports an image from an OCI archive, and again after each reboot.
    pub fn load(&self, archive: &Path) -> Result<()> {
        self.import(archive)?;
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.push(archive.to_owned());
        Ok(())
    }

    fn import(&self, archive: &Path) -> Result<()> {
        let mut command = self.command("ctr")?;
        command
            .args(["-n", "k8s.io", "images", "import"])
            .arg(archive);
        Process::spawn(command)?
            .finish(START)?
            .ok()
            .map(drop)
            .with_context(|| format!("loading {} on {}", archive.display(), self.name()))
    }

    /// The last lines of its programs' logs.
    pub(super) fn last_log_lines(&self, lines: usize) -> String {
        let running = self.running();
        let logs = running.programs.iter().map(|(name, _)| {
            let log = fs::read(self.log(name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let all: Vec<&str> = log.lines().collect();
            let last = all[all.len().saturating_sub(lines)..].join("\n");
            format!("---- {name} on {}\n{last}\n", self.name())
        });
        logs.collect()
    }

    /// The log of one of its programs: `containerd`, `kubelet` or `kube-proxy`.
    pub fn program_log(&self, program: &str) -> Result<String> {
        let path = self.log(program);
        let log = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(String::from_utf8_lossy(&log).into_owned())
    }

    /// The folder whose manifests the kubelet runs as static pods.
    pub fn static_pods(&self) -> PathBuf {
        self.node.folder().join("static-pods")
    }

    fn log(&self, program: &str) -> PathBuf {
        self.node.folder().join(format!("{program}.log"))
    }

    /// Starts one of its programs, with its output in a file.
    fn start_program(&self, name: &'static str, mut command: Command) -> Result<()> {
        let log = File::create(self.log(name)).context("making a log")?;
        command
            .stdout(log.try_clone().context("sharing a log")?)
            .stderr(log);
        let program = Process::spawn_as_is(command)?;
        self.running().programs.push((name, program));
        Ok(())
    }

    fn start_containerd(&self) -> Result<()> {
        let networks = self.node.folder().join("networks");
        fs::create_dir_all(&networks).context("creating the folder of the CNI configuration")?;
        let number = self.node.number();
        let (range, range6) = (
            json!([{"subnet": plumbing::pod_network(number)}]),
            json!([{"subnet": plumbing::pod_network6(number)}]),
        );
        let plugin = match self.options.network {
            PodNetwork::Bridge => json!({
                "type": "bridge", "bridge": plumbing::POD_BRIDGE, "isGateway": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "ranges": [range], "routes": [{"dst": "0.0.0.0/0"}],
                },
            }),
            PodNetwork::Routed => json!({
                "type": "ptp",
                "ipam": {
                    "type": "host-local", "ranges": [range, range6],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            }),
        };
        let network = json!({
            "cniVersion": "1.0.0", "name": "pods",
            "plugins": [plugin, {"type": "portmap", "capabilities": {"portMappings": true}}],
        });
        self.write("networks/pods.conflist", &network.to_string())?;
        let config = format!(
            r#"version = 3
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  # Lowering a container's OOM score needs CAP_SYS_RESOURCE, which this machine may lack.
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{}"]
    conf_dir = "{}"
[plugins."io.containerd.nri.v1.nri"]
  # By default it drops a plugin that has not answered for two seconds, as happens on a busy machine.
  plugin_registration_timeout = "60s"
  plugin_request_timeout = "60s"
"#,
            kubernetes::programs_folder().display(),
            networks.display()
        );
        let path = self.write("containerd.toml", &config)?;
        let mut command = self.command("containerd")?;
        command.arg("--config").arg(path);
        self.start_program("containerd", command)?;
        eventually_ok(START, "containerd", || self.run("ctr", ["version"])?.ok())
            .map(drop)
            .with_context(|| self.last_log_lines(10))
    }

    /// Starts kubelet and kube-proxy.
    pub(super) fn join(&self, api: &Kubernetes) -> Result<()> {
        let options = self.options;
        let (name, address) = (self.name().to_owned(), self.node.ipv4().to_string());
        let addresses = match options.network {
            PodNetwork::Bridge => address.clone(),
            PodNetwork::Routed => format!("{address},{}", self.node.ipv6()),
        };
        let user = format!("system:node:{name}");
        let kubeconfig =
            api.write_client(&name, (&user, Some("system:nodes")), &[&name, &address])?;
        let beside = |extension: &str| kubeconfig.with_extension(extension);
        // Pods must not use the machine's own resolver.
        let resolv = self.write("resolv.conf", "")?;
        let static_pods = self.static_pods();
        fs::create_dir_all(&static_pods).context("creating the folder of static pods")?;
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": address,
            "authentication": {
                "anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": api.certificate_authority()},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": beside("crt"), "tlsPrivateKeyFile": beside("key"),
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            // The machine may have the controllers in version 1, beside version 2.
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": [],
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "clusterDomain": "cluster.local", "resolvConf": resolv,
            "failSwapOn": false, "healthzPort": 0,
            "staticPodPath": static_pods, "fileCheckFrequency": "1s",
            // How often it measures volumes, by which it evicts pods.
            "volumeStatsAggPeriod": "5s",
            // The machine's disk may be nearly full without harm to these nodes.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        });
        let config = self.write("kubelet.json", &config.to_string())?;
        let mut command = self.command(kubernetes::program("kubelet"))?;
        command
            .arg("--config")
            .arg(config)
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .arg(format!("--hostname-override={name}"))
            .arg(format!("--node-ip={addresses}"));
        self.start_program("kubelet", command)?;

        let user = format!("{name}-proxy");
        let kubeconfig = api.write_client(&user, ("system:kube-proxy", None), &[])?;
        let mut command = self.command(kubernetes::program("kube-proxy"))?;
        command
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .arg(format!("--hostname-override={name}"))
            .arg(format!("--cluster-cidr={}", options.network.pods()))
            .arg(format!("--proxy-mode={}", options.proxy.as_str()))
            // The limit is the machine's, and cannot be set from a network namespace.
            .arg("--conntrack-max-per-core=0")
            .arg(format!("--healthz-bind-address={address}:10256"));
        self.start_program("kube-proxy", command)
    }

    /// Waits until the API reports it ready. Fails as soon as one of its programs exits.
    pub(super) fn wait_ready(&self, api: &Kubernetes) -> Result<()> {
        let path = format!("/api/v1/nodes/{}", self.name());
        let what = format!("node {} to be ready", self.name());
        let outcome = eventually_ok(START, &what, || {
            for (name, program) in &mut self.running().programs {
                if let Some(status) = program.ended()? {
                    return Ok(Err(anyhow!("{name} exited ({status})")));
                }
            }
            let node = api.get(&path)?.context("it has not joined")?;
            let conditions = node["status"]["conditions"].as_array();
            let ready = conditions.into_iter().flatten().any(is_ready);
            ready
                .then_some(Ok(()))
                .with_context(|| format!("{}", node["status"]["conditions"]))
        });
        outcome
            .and_then(|outcome| outcome)
            .with_context(|| self.last_log_lines(15))
    }

    fn write(&self, name: &str, content: &str) -> Result<PathBuf> {
        let path = self.node.folder().join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }
}

fn is_ready(condition: &Value) -> bool {
    condition["type"] == "Ready" && condition["status"] == "True"
}

/// The image of each pod's sandbox container.
pub(super) const PAUSE: &str = "docker.io/library/pause:1";
