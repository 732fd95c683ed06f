//! A real Kubernetes API server with its etcd, without nodes and controllers.
//!
//! Nothing runs pods, sets their status or collects garbage: a test does what it needs itself. [`crate::Cluster`] has
//! nodes and controllers.

mod istio_ca;
mod istiod;
mod pki;
mod programs;
mod rbac;
mod remote;

use std::ffi::OsStr;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::eventually::eventually_ok;
use crate::id::MeshId;
use crate::place::Place;
use crate::process::{Finished, Process};
use crate::{PodNetwork, cgroup, chart, leftovers, mounts};

pub use istio_ca::{IstioCa, IstioSvid};
pub use istiod::{Istiod, IstiodOptions};
pub use programs::{GoModule, folder as programs_folder};
pub(crate) use programs::{first_missing, path_variable, program};
pub(crate) use rbac::role;

use pki::Pki;

/// Time limit for the start of etcd and API server. Generous, because the machine may be compiling meanwhile.
const START: Duration = Duration::from_secs(120);
/// Time limit for a call, as long as the API server itself takes at most for one.
const CALL: Duration = Duration::from_secs(60);
/// How often kubectl runs again after a TLS handshake with the API server that took too long.
const MAX_RETRIES: usize = 5;

/// A running API server. Dropping it stops it and its etcd, and removes their files.
#[derive(Debug)]
pub struct Kubernetes {
    site: Site,
    pki: Pki,
    address: SocketAddr,
    services: &'static str,
    etcd: String,
    etcd_process: Process,
    server: Mutex<Option<Process>>,
}

/// Where an API server runs.
#[derive(Debug)]
enum Site {
    /// Alone, on a loopback address. Everything that carries the ID is removed at its end.
    Alone { id: MeshId, folder: PathBuf },
    /// For a cluster with nodes and controllers, which owns the place.
    Cluster(Place),
}

impl Site {
    fn folder(&self) -> &Path {
        match self {
            Self::Alone { folder, .. } => folder,
            Self::Cluster(place) => place.folder(),
        }
    }

    /// Starts a program that stops with everything else of this ID, even if this process is killed.
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
    /// The API server that the tests of this process share: started for the first test, stopped after the last. Where none
    /// can run, reports the test as skipped and returns `None`.
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

    /// Why none can run here: the first program that is missing.
    pub fn missing() -> Option<String> {
        first_missing(&["kube-apiserver", "etcd", "kubectl"], &["curl"])
    }

    /// Starts an API server and waits until it is ready.
    pub fn start() -> Result<Self> {
        leftovers::remove_dead()?;
        let id = MeshId::next();
        let folder = id.temporary_folder();
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let started = Self::start_in(id, &folder);
        if started.is_err() {
            let _ = leftovers::remove(id);
        }
        started
    }

    fn start_in(id: MeshId, folder: &Path) -> Result<Self> {
        let ip = loopback(id);
        // All three are bound at once, so that they differ.
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
            PodNetwork::Bridge.services(),
        )
    }

    /// Starts an API server at `place`, on `ip`, for nodes and controllers.
    pub(crate) fn start_for_cluster(
        place: &Place,
        ip: IpAddr,
        services: &'static str,
    ) -> Result<Self> {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let etcd = [(loopback, 2379), (loopback, 2380)];
        Self::start_at(
            Site::Cluster(place.clone()),
            (ip, 6443).into(),
            etcd,
            services,
        )
    }

    /// `etcd` holds etcd's address for clients and its address for peers, of which it has none; `services` the networks of
    /// Services.
    fn start_at(
        site: Site,
        address: SocketAddr,
        etcd: [(IpAddr, u16); 2],
        services: &'static str,
    ) -> Result<Self> {
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
        let etcd_process = site.spawn(program("etcd"), |command| {
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
                // On a busy machine, shorter timeouts cause elections, although there is one member.
                .args(["--heartbeat-interval", "500", "--election-timeout", "5000"])
                // Its data need not survive this machine, and a busy disk keeps it waiting for more than its deadlines.
                .arg("--unsafe-no-fsync")
                .args(["--log-level", "error"]);
        })?;
        let kubernetes = Self {
            site,
            pki,
            address,
            services,
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
        let audited = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
            "rules": [
                {
                    "level": "Metadata",
                    "userGroups": [format!("system:serviceaccounts:{}", chart::SYSTEM_NAMESPACE)],
                },
                // Who requested which token of a service account.
                {
                    "level": "Metadata",
                    "resources": [{"group": "", "resources": ["serviceaccounts/token"]}],
                },
                {"level": "None"},
            ],
        });
        fs::write(file(AUDIT_POLICY), audited.to_string()).context("writing the audit policy")?;
        let server = self.site.spawn(program("kube-apiserver"), |command| {
            command
                .arg(format!("--etcd-servers={}", self.etcd))
                .arg(format!(
                    "--audit-policy-file={}",
                    file(AUDIT_POLICY).display()
                ))
                .arg(format!("--audit-log-path={}", file(AUDIT_LOG).display()))
                .arg(format!("--bind-address={}", self.address.ip()))
                .arg(format!("--secure-port={}", self.address.port()))
                .arg(format!("--service-cluster-ip-range={}", self.services))
                .arg(format!("--service-account-issuer={ISSUER}"));
            match self.site {
                Site::Alone { .. } => command
                    // Nothing uses the service `kubernetes`, so its endpoint does not matter.
                    .args([
                        "--advertise-address=192.0.2.1",
                        "--endpoint-reconciler-type=none",
                    ])
                    .arg("--authorization-mode=RBAC")
                    // It requires service accounts to exist, which a controller creates.
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
        // Stop waiting when the API server exits.
        let ready = eventually_ok(START, "a ready API server", || {
            if let Some(server) = self.server().as_mut()
                && let Some(status) = server.ended()?
            {
                return Ok(Err(anyhow!("it exited ({status})")));
            }
            match self.call("GET", "/readyz", None)? {
                (200, _) => {}
                (status, body) => bail!("{status}: {body}"),
            }
            // The API server creates this namespace shortly after it reports ready.
            let first = self.get("/api/v1/namespaces/default")?;
            first.map(|_| Ok(())).context("no namespace default yet")
        })
        .and_then(|outcome| outcome);
        ready.with_context(|| {
            let server = self.server();
            let output = server.as_ref().map(Process::stderr).unwrap_or_default();
            format!(
                "etcd: {}; API server: {}",
                last_lines(&self.etcd_process.stderr()),
                last_lines(&output)
            )
        })
    }

    /// The requests of the chart's service accounts to a cluster's API server, from its audit log.
    pub fn audited(&self) -> Result<Vec<Value>> {
        let user = format!("system:serviceaccount:{}:", chart::SYSTEM_NAMESPACE);
        let is_charts = |event: &Value| {
            let name = event["user"]["username"].as_str();
            name.is_some_and(|name| name.starts_with(&user))
        };
        let mut events = self.audit_log()?;
        events.retain(is_charts);
        Ok(events)
    }

    /// The requests for tokens of service accounts, from the API server's audit log.
    pub fn token_requests(&self) -> Result<Vec<Value>> {
        let mut events = self.audit_log()?;
        events.retain(|event| event["objectRef"]["subresource"] == "token");
        Ok(events)
    }

    fn audit_log(&self) -> Result<Vec<Value>> {
        let path = self.folder().join(AUDIT_LOG);
        let log =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        // The last line may be incomplete, and so may one that was written when the API server was killed.
        let events = log.lines().map(serde_json::from_str);
        Ok(events.filter_map(std::result::Result::ok).collect())
    }

    /// Kills the API server, as an outage would.
    pub fn stop_server(&self) -> Result<()> {
        match self.server().take() {
            Some(mut server) => server.kill().map(drop),
            None => Ok(()),
        }
    }

    /// Suspends the API server (SIGSTOP) or resumes it: connections stay open, but get no answers.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        match self.server().as_ref() {
            Some(server) if frozen => server.suspend(),
            Some(server) => server.resume(),
            None => bail!("the API server is not running"),
        }
    }

    fn server(&self) -> std::sync::MutexGuard<'_, Option<Process>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The administrator's kubeconfig file.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder().join("admin.conf")
    }

    fn folder(&self) -> &Path {
        self.site.folder()
    }

    /// Writes a kubeconfig file for a service account.
    pub fn kubeconfig_of(&self, namespace: &str, account: &str) -> Result<PathBuf> {
        let token = self.token(namespace, account, &TokenOptions::default())?;
        self.write_kubeconfig(&format!("{namespace}-{account}"), &json!({"token": token}))
    }

    /// Writes a certificate with this common name, organization and these subject alternative names, and a kubeconfig file
    /// that uses it. Returns the kubeconfig's path; `NAME.crt` and `NAME.key` are in the same folder.
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

    /// The certificate of the cluster's own CA (PEM), which issues those of API server, kubelets and administrator.
    pub(crate) fn certificate_authority(&self) -> PathBuf {
        self.folder().join("ca.crt")
    }

    /// The key that signs service account tokens (PKCS #8, PEM, P-256).
    pub fn accounts_key(&self) -> PathBuf {
        self.folder().join("accounts.key")
    }

    /// The object at `path`, such as `/api/v1/namespaces/default/pods/web`, or `None` if it does not exist.
    pub fn get(&self, path: &str) -> Result<Option<Value>> {
        match self.call("GET", path, None)? {
            (404, _) => Ok(None),
            answer => object(path, answer).map(Some),
        }
    }

    /// The text at `path`, such as `/metrics`.
    pub fn text(&self, path: &str) -> Result<String> {
        match self.call("GET", path, None)? {
            (200, text) => Ok(text),
            (status, body) => bail!("{path}: {status}: {body}"),
        }
    }

    /// Creates an object in the collection at `path`.
    pub fn create(&self, path: &str, new: &Value) -> Result<Value> {
        object(path, self.call("POST", path, Some(new))?)
    }

    /// Changes fields of an object by a JSON merge patch (RFC 7396).
    pub fn merge(&self, path: &str, change: &Value) -> Result<Value> {
        object(path, self.call("PATCH", path, Some(change))?)
    }

    /// Deletes an object. A pod with a node is removed at once with `?gracePeriodSeconds=0`, otherwise when its kubelet
    /// confirms.
    pub fn delete(&self, path: &str) -> Result<Value> {
        object(path, self.call("DELETE", path, None)?)
    }

    /// Applies a file of manifests with `kubectl apply`.
    pub fn apply(&self, file: &Path) -> Result<()> {
        // If two tests created the same object at once, one of them would fail.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        self.kubectl([OsStr::new("apply"), OsStr::new("-f"), file.as_os_str()])?
            .ok()
            .map(drop)
    }

    /// Runs `kubectl` as the cluster's administrator, for at most two minutes. A failure of kubectl is not an error here:
    /// see [`Finished::ok`].
    ///
    /// Runs it again after a TLS handshake that took too long, because nothing was sent then: on an emulated machine, an API
    /// server beside pods that start takes longer than the ten seconds that kubectl waits.
    pub fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        let arguments: Vec<A> = arguments.into_iter().collect();
        let run = || {
            let mut command = self.client("kubectl")?;
            command.args(&arguments);
            Process::spawn(command)?.finish(START)
        };
        let mut finished = run()?;
        for _ in 0..MAX_RETRIES {
            if finished.status.success() || !finished.stderr.contains("TLS handshake timeout") {
                break;
            }
            finished = run()?;
        }
        Ok(finished)
    }

    /// A command that runs where it reaches the API server, with the administrator's kubeconfig in `$KUBECONFIG`.
    pub(crate) fn client(&self, program: &str) -> Result<Command> {
        let mut command = match &self.site {
            Site::Alone { .. } => Command::new(program),
            Site::Cluster(place) => place.command(program)?,
        };
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("PATH", path_variable()?);
        Ok(command)
    }

    /// Creates a namespace.
    pub fn namespace(&self, name: &str) -> Result<()> {
        let new = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        self.create("/api/v1/namespaces", &new).map(drop)
    }

    /// Creates a service account.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<Value> {
        let new = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}});
        self.create(
            &format!("/api/v1/namespaces/{namespace}/serviceaccounts"),
            &new,
        )
    }

    /// Creates a pod whose status says that it runs on `node` with this address.
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

    /// Requests a token of a service account (TokenRequest).
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
        Ok(token.context("the answer has no token")?.to_owned())
    }

    /// Calls the API as the administrator.
    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, String)> {
        let mut command = self.client("curl")?;
        command
            .args([
                "-sS",
                "--max-time",
                &CALL.as_secs().to_string(),
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
        let stdout = Process::spawn(command)?.finish(START)?.ok()?.stdout;
        let (body, status) = stdout.rsplit_once('\n').unwrap_or(("", &stdout));
        let status = status.trim().parse().context("curl printed no status")?;
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
            eprintln!("removing an API server's leftovers: {error:#}");
        }
    }
}

/// Options of a service account token.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenOptions<'a> {
    /// Its audience. Defaults to the API server.
    pub audience: Option<&'a str>,
    /// The pod, as the API returns it, that the token is bound to.
    pub pod: Option<&'a Value>,
    /// Its lifetime in seconds, at least 600. Defaults to one hour.
    pub seconds: Option<u32>,
}

const AUDIT_POLICY: &str = "audit-policy.json";
const AUDIT_LOG: &str = "audit.log";
const ISSUER: &str = "https://kubernetes.default.svc";
/// The address of the service `kubernetes`: the first of the service range.
const SERVICE_ADDRESS: &str = "10.96.0.1";

/// A loopback address that no other API server on this machine is likely to have.
fn loopback(id: MeshId) -> IpAddr {
    let pid = id.pid().to_be_bytes();
    Ipv4Addr::new(127, 64 | pid[1] & 0x3f, pid[2], pid[3] | 1).into()
}

/// Starts a program in a cgroup of this ID, so that removing leftovers stops it even if this process is killed.
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
