//! A Kubernetes API server with an etcd of its own: the real ones, without nodes and controllers.
//!
//! Nothing runs pods, sets their status or removes what belongs to what was deleted: a test does itself what it needs.
//! [`crate::Cluster`] is one with all of that.

mod pki;

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::eventually::{TIMEOUT, eventually_ok};
use crate::id::MeshId;
use crate::place::Place;
use crate::process::{Finished, Process};
use crate::{cgroup, leftovers, mounts};

use pki::Pki;

/// Where the API server is, unless `$KUBE` says otherwise.
const DEFAULT_FOLDER: &str = "/opt/kube";
/// Two programs that wait for each other, on a machine that builds meanwhile.
const START: Duration = Duration::from_secs(120);

/// A running API server. Dropping it ends it and its etcd, and removes all their files.
#[derive(Debug)]
pub struct Kubernetes {
    site: Site,
    pki: Pki,
    address: SocketAddr,
    etcd: String,
    etcd_process: Process,
    server: Mutex<Option<Process>>,
}

/// Where an API server runs.
#[derive(Debug)]
enum Site {
    /// By itself, on the loopback; what carries the id is removed at its end.
    Alone { id: MeshId, folder: PathBuf },
    /// For a cluster with nodes and controllers. The place belongs to whoever made it.
    Cluster(Place),
}

impl Site {
    fn folder(&self) -> &Path {
        match self {
            Self::Alone { folder, .. } => folder,
            Self::Cluster(place) => place.folder(),
        }
    }

    /// Starts a program that ends with the rest, even if this process is killed.
    fn spawn(
        &self,
        program: impl AsRef<OsStr>,
        with: impl FnOnce(&mut Command),
    ) -> Result<Process> {
        match self {
            Self::Alone { id, .. } => {
                let mut command = Command::new(program);
                with(&mut command);
                confined(*id, command)
            }
            Self::Cluster(place) => {
                let mut command = place.command(program)?;
                with(&mut command);
                Process::spawn(command)
            }
        }
    }
}

impl Kubernetes {
    /// The one that tests of this process share: started for the first of them, ended with the last. Where it cannot
    /// run, says so, and gives none.
    pub fn shared(test: &str) -> Option<Arc<Self>> {
        static SHARED: Mutex<Weak<Kubernetes>> = Mutex::new(Weak::new());
        if let Some(why) = Self::missing() {
            println!("SKIPPED {test}: {why}");
            return None;
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = shared.upgrade() {
            return Some(running);
        }
        let started = Arc::new(Self::start().expect("an API server"));
        *shared = Arc::downgrade(&started);
        Some(started)
    }

    /// What has to be installed before it can run.
    pub fn missing() -> Option<String> {
        let server = program("kube-apiserver");
        if !server.is_file() {
            return Some(format!(
                "there is no {}: `cargo xtask kubernetes` makes it, or says why it cannot",
                server.display()
            ));
        }
        ["etcd", "kubectl", "curl"].into_iter().find_map(|name| {
            let path = env::var_os("PATH").unwrap_or_default();
            let there = env::split_paths(&path).any(|folder| folder.join(name).is_file());
            (!there).then(|| format!("there is no {name}: `cargo xtask kubernetes` installs it"))
        })
    }

    /// Starts one and waits until it is ready.
    pub fn start() -> Result<Self> {
        leftovers::remove_dead()?;
        let id = MeshId::next();
        let folder = id.temporary_folder();
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        // From here on something is there to be removed.
        let started = Self::start_in(id, &folder);
        if started.is_err() {
            let _ = leftovers::remove(id);
        }
        started
    }

    fn start_in(id: MeshId, folder: &Path) -> Result<Self> {
        let ip = loopback(id);
        // All are taken before one is given: they differ.
        let taken: Vec<_> = (0..3)
            .map(|_| TcpListener::bind((ip, 0)))
            .collect::<Result<_, _>>()?;
        let ports: Vec<u16> = taken
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port()))
            .collect::<Result<_>>()?;
        drop(taken);
        let folder = folder.to_owned();
        let site = Site::Alone { id, folder };
        Self::start_at(
            site,
            (ip, ports[2]).into(),
            [(ip, ports[0]), (ip, ports[1])],
        )
    }

    /// Starts one at `place`, on `ip`, for nodes and controllers.
    pub(crate) fn start_for_cluster(place: &Place, ip: IpAddr) -> Result<Self> {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let etcd = [(loopback, 2379), (loopback, 2380)];
        Self::start_at(Site::Cluster(place.clone()), (ip, 6443).into(), etcd)
    }

    /// `etcd`: where it is asked, and where it would talk to others.
    fn start_at(site: Site, address: SocketAddr, etcd: [(IpAddr, u16); 2]) -> Result<Self> {
        let folder = site.folder().to_owned();
        let pki = Pki::make(&folder)?;
        pki.leaf(
            "server",
            ("kube-apiserver", None),
            &[
                &address.ip().to_string(),
                SERVICE_ADDRESS,
                "localhost",
                "kubernetes.default.svc",
            ],
        )?;
        pki.leaf("admin", ("admin", Some("system:masters")), &[])?;
        let [etcd, peer] = etcd.map(|(ip, port)| format!("http://{ip}:{port}"));
        let etcd_process = site.spawn("etcd", |command| {
            command
                .arg("--data-dir")
                .arg(folder.join("etcd"))
                .args([
                    "--listen-client-urls",
                    &etcd,
                    "--advertise-client-urls",
                    &etcd,
                ])
                .args([
                    "--listen-peer-urls",
                    &peer,
                    "--initial-advertise-peer-urls",
                    &peer,
                ])
                .args(["--initial-cluster", &format!("default={peer}")])
                // A busy machine is no reason for an election among one.
                .args(["--heartbeat-interval", "500", "--election-timeout", "5000"])
                .args(["--log-level", "error"]);
        })?;
        let kubernetes = Self {
            site,
            pki,
            address,
            etcd,
            etcd_process,
            server: Mutex::new(None),
        };
        kubernetes.start_server()?;
        kubernetes.write_kubeconfig_of_leaf("admin")?;
        Ok(kubernetes)
    }

    /// Starts the API server, after [`Kubernetes::stop_server`].
    pub fn start_server(&self) -> Result<()> {
        let file = |name: &str| self.folder().join(name);
        let server = self.site.spawn(program("kube-apiserver"), |command| {
            command
                .arg(format!("--etcd-servers={}", self.etcd))
                .arg(format!("--bind-address={}", self.address.ip()))
                .arg(format!("--secure-port={}", self.address.port()))
                .arg("--service-cluster-ip-range=10.96.0.0/16")
                .arg(format!("--service-account-issuer={ISSUER}"));
            match self.site {
                Site::Alone { .. } => command
                    // Nobody reaches it by its service, so where that leads does not matter.
                    .args([
                        "--advertise-address=192.0.2.1",
                        "--endpoint-reconciler-type=none",
                    ])
                    .arg("--authorization-mode=RBAC")
                    // Definitions may have that group's later versions, which this one has not.
                    .arg("--runtime-config=discovery.k8s.io/v1beta1=false")
                    // It would ask for Secrets with tokens, which a controller makes.
                    .arg("--disable-admission-plugins=ServiceAccount"),
                Site::Cluster(_) => command
                    .arg(format!("--advertise-address={}", self.address.ip()))
                    .arg("--authorization-mode=Node,RBAC")
                    .arg("--enable-admission-plugins=NodeRestriction")
                    .arg("--allow-privileged=true")
                    .arg("--kubelet-preferred-address-types=InternalIP")
                    .arg(format!(
                        "--kubelet-certificate-authority={}",
                        file("ca.crt").display()
                    ))
                    .arg(format!(
                        "--kubelet-client-certificate={}",
                        file("admin.crt").display()
                    ))
                    .arg(format!(
                        "--kubelet-client-key={}",
                        file("admin.key").display()
                    )),
            };
            for (flag, name) in [
                ("tls-cert-file", "server.crt"),
                ("tls-private-key-file", "server.key"),
                ("client-ca-file", "ca.crt"),
                ("service-account-key-file", "accounts.pub"),
                ("service-account-signing-key-file", "accounts.key"),
                ("cert-dir", "certificates"),
            ] {
                command.arg(format!("--{flag}={}", file(name).display()));
            }
        })?;
        *self.server() = Some(server);
        // An end is an outcome, too: nothing is to be waited for any more.
        let ready = eventually_ok(START, "a ready API server", || {
            if let Some(server) = self.server().as_mut()
                && let Some(status) = server.ended()?
            {
                return Ok(Err(anyhow!("it has ended ({status})")));
            }
            match self.call("GET", "/readyz", None)? {
                (200, _) => {}
                (status, body) => bail!("{status}: {body}"),
            }
            // It makes that one a moment after it says that it is ready.
            let first = self.get("/api/v1/namespaces/default")?;
            first.map(|_| Ok(())).context("no namespace default yet")
        })
        .and_then(|outcome| outcome);
        ready.with_context(|| {
            let server = self.server();
            let said = server.as_ref().map(Process::stderr).unwrap_or_default();
            format!(
                "etcd: {}; API server: {}",
                last_lines(&self.etcd_process.stderr()),
                last_lines(&said)
            )
        })
    }

    /// Kills the API server, as an outage would.
    pub fn stop_server(&self) -> Result<()> {
        match self.server().take() {
            Some(mut server) => server.kill().map(drop),
            None => Ok(()),
        }
    }

    /// Stops the API server in the middle of whatever it does, or lets it go on: connections stay, answers do not come.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let signal = if frozen {
            Signal::SIGSTOP
        } else {
            Signal::SIGCONT
        };
        match self.server().as_ref() {
            Some(server) => server.signal(signal),
            None => bail!("the API server does not run"),
        }
    }

    fn server(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file for `$KUBECONFIG`, by which one may do everything.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder().join("admin.conf")
    }

    fn folder(&self) -> &Path {
        self.site.folder()
    }

    /// A file for `$KUBECONFIG`, by which one may do what the service account may.
    pub fn kubeconfig_of(&self, namespace: &str, account: &str) -> Result<PathBuf> {
        let token = self.token(namespace, account, &TokenOptions::default())?;
        self.write_kubeconfig(&format!("{namespace}-{account}"), &json!({"token": token}))
    }

    /// A certificate for somebody, of a common name and an organization, who is reached by `names`; and a file for
    /// `$KUBECONFIG` with it. They are `NAME.crt`, `NAME.key` and what is given, beside each other.
    pub(crate) fn write_client(
        &self,
        name: &str,
        subject: (&str, Option<&str>),
        names: &[&str],
    ) -> Result<PathBuf> {
        self.pki.leaf(name, subject, names)?;
        self.write_kubeconfig_of_leaf(name)
    }

    fn write_kubeconfig_of_leaf(&self, name: &str) -> Result<PathBuf> {
        let file = |kind: &str| self.folder().join(format!("{name}.{kind}"));
        let user = json!({"client-certificate": file("crt"), "client-key": file("key")});
        self.write_kubeconfig(name, &user)
    }

    fn write_kubeconfig(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let path = self.folder().join(format!("{name}.conf"));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": format!("https://{}", self.address),
                "certificate-authority": self.folder().join("ca.crt"),
            }}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        fs::write(&path, config.to_string())
            .with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// The certificate that the API server's and all others of the cluster's own are under (PEM).
    pub(crate) fn certificate_authority(&self) -> PathBuf {
        self.folder().join("ca.crt")
    }

    /// The key that signs service accounts' tokens (PKCS #8, PEM, P-256).
    pub fn accounts_key(&self) -> PathBuf {
        self.folder().join("accounts.key")
    }

    /// The object at `path`, as `/api/v1/namespaces/default/pods/web`; none where there is none.
    pub fn get(&self, path: &str) -> Result<Option<Value>> {
        match self.call("GET", path, None)? {
            (404, _) => Ok(None),
            answer => object(path, answer).map(Some),
        }
    }

    /// What is at `path`, as `/metrics`, where it is no object.
    pub fn text(&self, path: &str) -> Result<String> {
        match self.call("GET", path, None)? {
            (200, text) => Ok(text),
            (status, body) => bail!("{path}: {status}: {body}"),
        }
    }

    /// Makes an object in the list at `path`.
    pub fn create(&self, path: &str, new: &Value) -> Result<Value> {
        object(path, self.call("POST", path, Some(new))?)
    }

    /// Changes fields of an object (RFC 7396).
    pub fn merge(&self, path: &str, change: &Value) -> Result<Value> {
        object(path, self.call("PATCH", path, Some(change))?)
    }

    /// Deletes an object. A pod on a node goes at once with `?gracePeriodSeconds=0`, else when its node says so.
    pub fn delete(&self, path: &str) -> Result<Value> {
        object(path, self.call("DELETE", path, None)?)
    }

    /// Applies a file of manifests.
    pub fn apply(&self, file: &Path) -> Result<()> {
        // Of two tests that create the same object at once, one would fail.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        self.kubectl([OsStr::new("apply"), OsStr::new("-f"), file.as_os_str()])?
            .ok()
            .map(drop)
    }

    /// Runs `kubectl` to its end, as the cluster's administrator. That it failed is no error: see [`Finished::ok`].
    pub fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        let mut command = self.client("kubectl")?;
        command.args(arguments);
        Process::spawn(command)?.finish(START)
    }

    /// A program that may do everything, by `$KUBECONFIG`, where it reaches the API server.
    pub(crate) fn client(&self, program: &str) -> Result<Command> {
        let mut command = match &self.site {
            Site::Alone { .. } => Command::new(program),
            Site::Cluster(place) => place.command(program)?,
        };
        command.env("KUBECONFIG", self.kubeconfig());
        Ok(command)
    }

    /// Makes a namespace.
    pub fn namespace(&self, name: &str) -> Result<()> {
        let new = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.create("/api/v1/namespaces", &new).map(drop)
    }

    /// Makes a service account.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<Value> {
        let new = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
        self.create(
            &format!("/api/v1/namespaces/{namespace}/serviceaccounts"),
            &new,
        )
    }

    /// Makes a pod that seems to run on `node` with this address.
    pub fn pod(
        &self,
        namespace: &str,
        name: &str,
        account: &str,
        node: &str,
        address: &str,
    ) -> Result<Value> {
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let new = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "nodeName": node, "serviceAccountName": account,
                "containers": [{"name": "app", "image": "app"}],
            },
        });
        self.create(&path, &new)?;
        let status = json!({"status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        }});
        self.merge(&format!("{path}/{name}/status"), &status)
    }

    /// A token of the service account, by TokenRequest.
    pub fn token(
        &self,
        namespace: &str,
        account: &str,
        options: &TokenOptions<'_>,
    ) -> Result<String> {
        let mut spec = json!({"expirationSeconds": options.seconds.unwrap_or(3600)});
        if let Some(audience) = options.audience {
            spec["audiences"] = json!([audience]);
        }
        if let Some(pod) = options.pod {
            spec["boundObjectRef"] = json!({
                "apiVersion": "v1", "kind": "Pod",
                "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"],
            });
        }
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec,
        });
        let answer = self.create(&path, &request)?;
        let token = answer["status"]["token"].as_str();
        Ok(token.context("an answer without a token")?.to_owned())
    }

    /// Calls the API as its administrator.
    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String)> {
        let mut command = self.client("curl")?;
        command
            .args([
                "-sS",
                "--max-time",
                "20",
                "-X",
                method,
                "-w",
                "\n%{http_code}",
            ])
            .arg("--cacert")
            .arg(self.folder().join("ca.crt"))
            .arg("--cert")
            .arg(self.folder().join("admin.crt"))
            .arg("--key")
            .arg(self.folder().join("admin.key"))
            .arg(format!("https://{}{path}", self.address));
        if let Some(body) = body {
            let kind = if method == "PATCH" {
                "application/merge-patch+json"
            } else {
                "application/json"
            };
            command.args([
                "-H",
                &format!("Content-Type: {kind}"),
                "--data-binary",
                &body.to_string(),
            ]);
        }
        let said = Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout;
        let (body, status) = said.rsplit_once('\n').unwrap_or(("", &said));
        let status = status.trim().parse().context("curl gave no status")?;
        Ok((status, body.to_owned()))
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        let _ = self.stop_server();
        let _ = self.etcd_process.kill();
        if let Site::Alone { id, .. } = self.site
            && let Err(error) = leftovers::remove(id)
        {
            eprintln!("cannot remove what an API server left: {error:#}");
        }
    }
}

/// What a token is for.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenOptions<'a> {
    /// For whom it is; the API server unless said otherwise.
    pub audience: Option<&'a str>,
    /// The pod, as the API gives it, that the token ends with.
    pub pod: Option<&'a Value>,
    /// How long it holds, in seconds; the API server gives at least 600. An hour unless said otherwise.
    pub seconds: Option<u32>,
}

const ISSUER: &str = "https://kubernetes.default.svc";
/// Where the service `kubernetes` is: the first of its range.
const SERVICE_ADDRESS: &str = "10.96.0.1";

/// Where a program of Kubernetes' own is.
pub(crate) fn program(name: &str) -> PathBuf {
    let folder = env::var_os("KUBE").map_or_else(|| DEFAULT_FOLDER.into(), PathBuf::from);
    folder.join(name)
}

/// An address that no other one on this machine is likely to have.
fn loopback(id: MeshId) -> IpAddr {
    let pid = id.pid().to_be_bytes();
    Ipv4Addr::new(127, 64 | pid[1] & 0x3f, pid[2], pid[3] | 1).into()
}

/// Starts a program that ends with what carries the id, even if this process is killed.
fn confined(id: MeshId, command: Command) -> Result<Process> {
    let folder = mounts::cgroup2()?.join(id.folder_name());
    cgroup::create(&folder)?;
    let process = Process::spawn(command)?;
    let members = folder.join("cgroup.procs");
    fs::write(&members, process.pid().to_string())
        .with_context(|| format!("writing {}", members.display()))?;
    Ok(process)
}

fn object(path: &str, (status, body): (u16, String)) -> Result<Value> {
    if !(200..300).contains(&status) {
        bail!("{path}: {status}: {body}");
    }
    serde_json::from_str(&body).map_err(|error| anyhow!("{path}: {error}: {body}"))
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}
