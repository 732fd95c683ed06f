//! The setup for the checks: two nodes, their pods, the daemons, and the programs in the pods.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_tests::{
    Ca, CaOptions, Daemon, DaemonOptions, Mesh, Nginx, NginxRequest, OidcIssuer, Place, PodSpec,
    ServiceSpec, eventually, slowdown,
};

use serde_json::json;

use super::evidence::Evidence;
use super::person;

/// Fields are dropped from top to bottom: the programs first.
pub(super) struct Stage {
    nginx: BTreeMap<&'static str, Nginx>,
    daemons: BTreeMap<&'static str, Daemon>,
    ca: Option<Ca>,
    /// A pod in the network of the servers' node (`hostNetwork`).
    pub(super) host_network: Place,
    /// The issuer of people's tokens, which the CA trusts.
    pub(super) login: OidcIssuer,
    /// A marker in every request's path and every response; nothing else on the wire contains it.
    pub(super) marker: String,
    pub(super) mesh: Mesh,
}

impl Stage {
    pub(super) fn set(evidence: &Evidence) -> Result<Self> {
        let server = |name: &str| PodSpec::new(name).on(NODE_B).service_account("web");
        let service = |name: &str, v4: &str, v6: &str| {
            ServiceSpec::new(name)
                .selector("app", name)
                .address(v4)
                .address(v6)
                .port(80, PORT)
        };
        let mesh = Mesh::builder()
            .node(NODE_A)
            .node(NODE_B)
            .routed()
            .pod(PodSpec::new(CLIENT).on(NODE_A).service_account("client"))
            .pod(
                PodSpec::new(NEIGHBOUR)
                    .on(NODE_B)
                    .service_account(NEIGHBOUR),
            )
            .pod(server("web-1").label("app", "web"))
            .pod(server("web-2").label("app", "web"))
            .pod(server("shop").label("app", "shop"))
            .service(service("web", WEB, WEB_V6))
            .service(service("shop", SHOP, SHOP_V6))
            .start()?;
        // Before the daemons start, as the kubelet's cgroups are there before.
        let host_network = mesh
            .node(NODE_B)
            .host_network_pod("a6e27b64-0000-4000-8000-000000000001")?;
        let mut stage = Self {
            host_network,
            login: person::login()?,
            nginx: BTreeMap::new(),
            daemons: BTreeMap::new(),
            ca: None,
            marker: format!("the-secret-{}", mesh.id()),
            mesh,
        };
        for node in stage.mesh.nodes() {
            evidence.saw(format!("{}: {}", node.name(), node.ipv4()));
        }
        for pod in stage.mesh.pods() {
            let addresses: Vec<_> = pod.addresses().iter().map(IpAddr::to_string).collect();
            evidence.saw(format!(
                "pod {} on {}: {}",
                pod.name(),
                pod.node(),
                addresses.join(", ")
            ));
        }
        for name in SERVERS {
            let place = stage.mesh.pod(name).place().clone();
            stage.serve(name, &place, PORT)?;
        }
        let outside = stage.mesh.outside().clone();
        stage.serve(OUTSIDE, &outside, PORT)?;
        evidence.saw(format!(
            "host outside of the mesh: {}, {}",
            stage.mesh.outside_ipv4(),
            stage.mesh.outside_ipv6()
        ));
        evidence.saw(format!(
            "nginx answers on port {PORT} in {} and outside",
            SERVERS.join(", ")
        ));
        Ok(stage)
    }

    fn serve(&mut self, name: &'static str, place: &Place, port: u16) -> Result<()> {
        let body = format!("{} from {name}", self.marker);
        self.nginx.insert(name, Nginx::start(place, port, &body)?);
        Ok(())
    }

    /// Starts the CA and the daemons, and waits until their pods are enrolled.
    pub(super) fn start_daemons(&mut self, evidence: &Evidence) -> Result<()> {
        // Short lifetimes, so that certificates expire during the demo. The CA trusts the server's node about which
        // pods run there.
        let life = format!("{}s", certificate_life().as_secs());
        let spread = format!("{}s", ROOT_SPREAD.as_secs() * u64::from(slowdown()));
        let manifests = self.mesh.node(NODE_B).manifests().folder();
        let options = CaOptions::default()
            .setting("certificateLifetime", life.into())
            .setting("rotationSpread", spread.into())
            .setting("discovery", json!({"files": manifests}))
            .people(&self.login, person::accounts());
        let ca = self.ca.insert(self.mesh.start_ca(&options)?);
        evidence.saw(format!("CA at {}", ca.address()));
        for daemon in self.mesh.start_daemons_with(&self.options()?)? {
            let status = daemon.status()?;
            let pods: Vec<_> = status.pods.iter().map(|pod| pod.pod.as_str()).collect();
            evidence.saw(format!(
                "{}: process {}, mode {}, enrolled {}",
                daemon.node(),
                daemon.pid(),
                status.mode,
                pods.join(", ")
            ));
            let name = if daemon.node() == NODE_A {
                NODE_A
            } else {
                NODE_B
            };
            self.daemons.insert(name, daemon);
        }
        Ok(())
    }

    /// Restarts a node's daemon and waits until its pods are enrolled.
    pub(super) fn start_daemon(&mut self, node: &'static str) -> Result<&Daemon> {
        let daemon = self.mesh.node(node).start_daemon_with(self.options()?)?;
        let pods: Vec<_> = self
            .mesh
            .pods()
            .iter()
            .filter(|pod| pod.node() == node)
            .map(|pod| pod.full_name())
            .collect();
        daemon.wait_enrolled(&pods)?;
        Ok(self.daemons.entry(node).or_insert(daemon))
    }

    /// The CA.
    pub(super) fn ca(&self) -> Result<&Ca> {
        self.ca.as_ref().context("no CA runs")
    }

    fn options(&self) -> Result<DaemonOptions> {
        Ok(DaemonOptions::default()
            .ca(self.ca()?)
            .certificate_lifetime(certificate_life())
            .setting("workloadApi", json!({"accounts": ["default/client"]})))
    }

    /// The running daemon of a node.
    pub(super) fn daemon(&self, node: &str) -> Result<&Daemon> {
        self.daemons
            .get(node)
            .with_context(|| format!("no daemon runs on {node}, as an earlier check has failed"))
    }

    /// Takes a node's daemon, to stop it.
    pub(super) fn take_daemon(&mut self, node: &str) -> Result<Daemon> {
        self.daemons
            .remove(node)
            .with_context(|| format!("no daemon runs on {node}, as an earlier check has failed"))
    }

    pub(super) fn nginx(&self, name: &str) -> &Nginx {
        &self.nginx[name]
    }

    /// The requests that a server has logged for a path.
    pub(super) fn requests(&self, name: &str, path: &str) -> Vec<NginxRequest> {
        let mut requests = self.nginx(name).requests();
        requests.retain(|request| request.path == path);
        requests
    }

    /// Waits for the log line of a request with a path that no other request has.
    pub(super) fn request(&self, name: &str, path: &str) -> Result<NginxRequest> {
        self.nginx(name).wait_for_request(path, LOGGED)
    }

    /// Returns a path that contains the marker and that no other request has.
    pub(super) fn path(&self, what: &str) -> String {
        format!("/{what}/{}", self.marker)
    }

    /// Sends a request from the client with curl, and expects the marker in the response.
    pub(super) fn ask(&self, server: SocketAddr, path: &str) -> Result<Answer> {
        self.ask_from(&self.mesh.pod(CLIENT), server, path)
    }

    /// Sends the same request from another place.
    pub(super) fn ask_from(&self, from: &Place, server: SocketAddr, path: &str) -> Result<Answer> {
        let answer = curl(from, server, path, PATIENCE)?;
        let Asked::Answered(answer) = answer else {
            bail!("curl http://{server}{path}: {answer}");
        };
        if !answer.body.contains(&self.marker) {
            bail!(
                "curl http://{server}{path} got another answer: {}",
                answer.body
            );
        }
        Ok(answer)
    }

    /// Sends the same request and expects it to be refused: at once, and with an error.
    pub(super) fn ask_in_vain(
        &self,
        from: &Place,
        server: SocketAddr,
        path: &str,
    ) -> Result<String> {
        match curl(from, server, path, PATIENCE)? {
            Asked::Answered(answer) => {
                bail!(
                    "curl http://{server}{path} was to be refused, but got: {}",
                    answer.body
                )
            }
            // A merely empty response would look like one from the application.
            Asked::Refused {
                code: code @ (EMPTY_ANSWER | TIMEOUT),
                message,
            } => {
                bail!(
                    "curl http://{server}{path} ended with {code} instead of a refusal: {message}"
                )
            }
            Asked::Refused { message, .. } => Ok(message),
        }
    }

    /// Sends a request whose packets are dropped on the way.
    pub(super) fn ask_nobody(&self, from: &Place, server: SocketAddr) -> Result<String> {
        match curl(from, server, "/", LITTLE_PATIENCE)? {
            Asked::Answered(answer) => bail!("curl http://{server}/ got: {}", answer.body),
            Asked::Refused { message, .. } => Ok(message),
        }
    }

    /// The last lines of the daemons' logs.
    pub(super) fn print_logs(&self) {
        for (node, daemon) in &self.daemons {
            let log = daemon.log_text();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES_OF_LOG)..];
            eprintln!("---- auth-daemon on {node}\n{}", last.join("\n"));
        }
        if let Some(ca) = &self.ca {
            let log = ca.log_text();
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES_OF_LOG)..];
            eprintln!("---- auth-daemon ca\n{}", last.join("\n"));
        }
    }
}

/// The outcome of a request.
enum Asked {
    Answered(Answer),
    Refused { code: i32, message: String },
}

/// A response, and the connection's addresses as reported by curl's own socket.
pub(super) struct Answer {
    pub(super) body: String,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
}

impl std::fmt::Display for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Answered(answer) => f.write_str(&answer.body),
            Self::Refused { message, .. } => f.write_str(message),
        }
    }
}

fn curl(from: &Place, server: SocketAddr, path: &str, seconds: u32) -> Result<Asked> {
    let url = format!("http://{server}{path}");
    let seconds = (seconds * slowdown()).to_string();
    let addresses = "\n%{local_ip} %{local_port} %{remote_ip} %{remote_port}";
    let arguments = [
        "-gsS",
        "-m",
        &seconds,
        "--noproxy",
        "*",
        "-w",
        addresses,
        &url,
    ];
    let finished = from.run("curl", arguments)?;
    if let Some(code) = finished.code().filter(|code| *code != 0) {
        let message = finished.stderr.trim();
        let message = message.strip_prefix("curl: ").unwrap_or(message).to_owned();
        return Ok(Asked::Refused { code, message });
    }
    let finished = finished.ok()?;
    let (body, addresses) = finished
        .stdout
        .rsplit_once('\n')
        .context("curl did not report its addresses")?;
    let words: Vec<_> = addresses.split(' ').collect();
    let address = |ip: usize| -> Result<SocketAddr> {
        let [ip, port] = [words.get(ip), words.get(ip + 1)].map(|word| word.unwrap_or(&""));
        let ip: IpAddr = ip
            .parse()
            .with_context(|| format!("curl printed {addresses:?}"))?;
        Ok((
            ip,
            port.parse()
                .with_context(|| format!("curl printed {addresses:?}"))?,
        )
            .into())
    };
    Ok(Asked::Answered(Answer {
        body: body.to_owned(),
        local: address(0)?,
        remote: address(2)?,
    }))
}

/// Waits for a log entry that a program writes shortly after the event.
pub(super) fn soon<T>(what: &str, probe: impl FnMut() -> Option<T>) -> Result<T> {
    eventually(LOGGED, what, probe)
}

pub(super) const NODE_A: &str = "node-a";
pub(super) const NODE_B: &str = "node-b";
pub(super) const CLIENT: &str = "client";
/// On the servers' node.
pub(super) const NEIGHBOUR: &str = "neighbour";
pub(super) const SERVERS: [&str; 3] = ["web-1", "web-2", "shop"];
pub(super) const OUTSIDE: &str = "outside";
/// The port of all servers.
pub(super) const PORT: u16 = 8080;
pub(super) const WEB: &str = "10.96.0.10";
pub(super) const WEB_V6: &str = "fd96::10";
pub(super) const SHOP: &str = "10.96.0.20";
const SHOP_V6: &str = "fd96::20";
/// curl's exit code for `Empty reply from server`.
const EMPTY_ANSWER: i32 = 52;
/// curl's exit code for `Operation timed out`.
const TIMEOUT: i32 = 28;
/// curl's timeout for a response, in seconds.
const PATIENCE: u32 = 15;
/// curl's timeout where no response can arrive, in seconds.
const LITTLE_PATIENCE: u32 = 2;
/// Time limit for a log line.
pub(super) const LOGGED: Duration = Duration::from_secs(10);
const LINES_OF_LOG: usize = 8;
/// How long the daemons have to learn of a new root before it signs.
const ROOT_SPREAD: Duration = Duration::from_secs(2);

/// Lifetime of a certificate. It is renewed when about half of that has passed, and must be before it expires. Not longer than
/// the demo has time for.
pub(super) fn certificate_life() -> Duration {
    Duration::from_secs(10) * slowdown().min(3)
}
