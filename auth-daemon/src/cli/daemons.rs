//! Finds the daemons that a command asks: through the API server where there is a kubeconfig, else at addresses.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use auth_kubernetes::{
    Objects,
    objects::{Node, Pod},
};
use futures_util::{StreamExt, future::Either, stream};
use kube::Client;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::TcpStream,
    runtime::{self, Runtime},
    time::timeout,
};

use super::manifests::DAEMON_NAMESPACE;
use crate::{
    admin::{ADMIN_PORT, Identification},
    discovery::kubernetes::{DAEMON_NAME, NAME_LABEL},
};
use auth_support::http_client;

/// Maximum time to wait for a daemon's answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// Largest answer, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// How much of a daemon's error is shown, in bytes.
const MAX_ERROR: usize = 500;
/// Number of daemons that are asked at the same time.
const AT_ONCE: usize = 16;

/// Which daemons a command asks.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Which daemons")]
pub(super) struct Selection {
    /// Ask the daemon at this address (port 15000 by default), and may be repeated. Daemons listen on the loopback of their
    /// nodes only. Without a kubeconfig, the default is the daemon of this node.
    #[arg(long = "address", value_name = "HOST[:PORT]", conflicts_with_all = ["kubeconfig", "context"])]
    addresses: Vec<Address>,
    /// Ask all daemons of a cluster, through its API server. The default is $KUBECONFIG, else ~/.kube/config, if there is one.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context in the kubeconfig, if not the current one.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The namespace of the daemons' pods.
    #[arg(long, value_name = "NAMESPACE", default_value = DAEMON_NAMESPACE)]
    daemon_namespace: String,
    /// Only the daemon of this node.
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
}

/// Where a daemon's admin port is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    host: String,
    port: u16,
}

/// The daemons that a command asks.
pub(super) struct Daemons {
    runtime: Runtime,
    selection: Selection,
    cluster: Option<Client>,
    list: Vec<Daemon>,
    /// Nodes whose daemons cannot be reached.
    missing: Vec<Unanswered>,
}

/// A daemon that can be reached.
#[derive(Clone, Debug)]
pub(super) struct Daemon {
    /// The name of its node in a cluster, or its address.
    pub(super) name: String,
    way: Way,
}

#[derive(Clone)]
enum Way {
    Address(Address),
    Pod {
        client: Client,
        namespace: String,
        pod: String,
    },
}

/// A node about which nothing is known, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Unanswered {
    pub(super) node: String,
    pub(super) reason: String,
}

impl Daemons {
    /// Finds the daemons. Fails if the API server cannot be reached.
    pub(super) fn find(selection: &Selection) -> anyhow::Result<Self> {
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        let cluster = runtime.block_on(selection.cluster())?;
        let mut daemons = Self {
            runtime,
            selection: selection.clone(),
            cluster,
            list: Vec::new(),
            missing: Vec::new(),
        };
        daemons.refresh()?;
        Ok(daemons)
    }

    /// Finds the daemons again: nodes may have joined, and pods have been replaced.
    pub(super) fn refresh(&mut self) -> anyhow::Result<()> {
        (self.list, self.missing) = self.runtime.block_on(self.look())?;
        Ok(())
    }

    /// Returns the daemons that can be reached now, and the nodes whose daemons cannot. Does not change what `self` knows.
    pub(super) async fn look(&self) -> anyhow::Result<(Vec<Daemon>, Vec<Unanswered>)> {
        match &self.cluster {
            Some(client) => in_cluster(client, &self.selection).await,
            None => Ok(at_addresses(&self.selection).await),
        }
    }

    /// Runs `work` on the runtime that the daemons are asked on.
    pub(super) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// The daemons that can be reached, by name.
    pub(super) fn list(&self) -> &[Daemon] {
        &self.list
    }

    /// Nodes whose daemons cannot be reached.
    pub(super) fn missing(&self) -> &[Unanswered] {
        &self.missing
    }

    /// Whether they are reached through an API server.
    pub(super) fn in_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// Nodes of the cluster that no daemon runs on. Fails without the right to list nodes.
    pub(super) fn nodes_without_daemon(&self) -> anyhow::Result<Vec<Unanswered>> {
        let Some(client) = &self.cluster else {
            return Ok(Vec::new());
        };
        let nodes = Objects::<Node>::all(client.clone());
        let nodes = self.runtime.block_on(nodes.list(""))?;
        let known: BTreeSet<_> = (self.list.iter().map(|daemon| &daemon.name))
            .chain(self.missing.iter().map(|missing| &missing.node))
            .collect();
        let names = nodes.into_iter().filter_map(|node| node.metadata.name);
        Ok(names
            .filter(|name| self.selection.takes(name) && !known.contains(name))
            .map(|node| Unanswered {
                node,
                reason: "no daemon runs on it".to_owned(),
            })
            .collect())
    }

    /// Asks all daemons for `path`. Returns the answers, and the nodes that cannot be reached, by name.
    pub(super) fn ask_all<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> (Vec<(String, T)>, Vec<Unanswered>) {
        let all: Vec<_> = self.list.iter().map(|daemon| (daemon, ())).collect();
        let (mut answers, mut missing) = (Vec::new(), self.missing.clone());
        for (daemon, answer) in (self.list.iter()).zip(self.ask_each(&all, |()| path.to_owned())) {
            let node = daemon.name.clone();
            match answer {
                Ok(answer) => answers.push((node, answer)),
                Err(error) => missing.push(Unanswered {
                    node,
                    reason: format!("{error:#}"),
                }),
            }
        }
        missing.sort_by(|a, b| a.node.cmp(&b.node));
        (answers, missing)
    }

    /// Asks each daemon for the path of its question. Returns the answers in the same order.
    pub(super) fn ask_each<Q: Copy, T: DeserializeOwned>(
        &self,
        questions: &[(&Daemon, Q)],
        path: impl Fn(Q) -> String,
    ) -> Vec<anyhow::Result<T>> {
        let requests = questions.iter().map(|(daemon, question)| {
            let path = path(*question);
            async move { daemon.request(&path, None).await }
        });
        let answers = stream::iter(requests).buffered(AT_ONCE).collect();
        self.runtime.block_on(answers)
    }

    /// Asks one daemon.
    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        daemon: &Daemon,
        path: &str,
    ) -> anyhow::Result<T> {
        self.runtime.block_on(daemon.request(path, None))
    }

    /// Asks the first daemon that answers, for what all of them know. Sends `body` as JSON if there is one.
    pub(super) fn ask_any<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let body = body.map(serde_json::to_vec).transpose()?;
        let mut failures: Vec<_> = self.missing.iter().map(ToString::to_string).collect();
        for daemon in &self.list {
            match self.runtime.block_on(daemon.request(path, body.clone())) {
                Ok(answer) => return Ok(answer),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        bail!("{}", failures.join("; "))
    }
}

impl Daemon {
    /// Requests `path`, with `body` if there is one, and reads the answer as JSON.
    pub(super) async fn request<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<Vec<u8>>,
    ) -> anyhow::Result<T> {
        let asked = async {
            let uri = format!("http://localhost:{ADMIN_PORT}{path}").parse()?;
            let stream = match &self.way {
                Way::Address(Address { host, port }) => {
                    Either::Left(TcpStream::connect((host.as_str(), *port)).await?)
                }
                Way::Pod {
                    client,
                    namespace,
                    pod,
                } => Either::Right(
                    auth_kubernetes::port_forward(client, namespace, pod, ADMIN_PORT).await?,
                ),
            };
            let answer = match (stream, body) {
                (Either::Left(tcp), None) => http_client::get(tcp, &uri, MAX_ANSWER).await,
                (Either::Left(tcp), Some(body)) => {
                    http_client::post(tcp, &uri, body, MAX_ANSWER).await
                }
                (Either::Right(pod), None) => http_client::get(pod, &uri, MAX_ANSWER).await,
                (Either::Right(pod), Some(body)) => {
                    http_client::post(pod, &uri, body, MAX_ANSWER).await
                }
            };
            answer.map_err(|error| anyhow!(error))
        };
        let (status, body) = timeout(DEADLINE, asked)
            .await
            .unwrap_or_else(|_| Err(anyhow!("no answer within {DEADLINE:?}")))
            .with_context(|| self.way.to_string())?;
        if status != 200 {
            let text = String::from_utf8_lossy(&body[..body.len().min(MAX_ERROR)]);
            let text = text.replace(char::is_control, " ");
            bail!("it answers HTTP {status} to {path}: {text}");
        }
        serde_json::from_slice(&body)
            .with_context(|| format!("its answer to {path} is not as expected"))
    }
}

impl Selection {
    /// The daemon of this node.
    pub(super) fn of_this_node() -> Self {
        Self {
            addresses: vec![Address::local()],
            ..Self::default()
        }
    }

    /// A client for the cluster whose daemons are asked. `None` if addresses are.
    async fn cluster(&self) -> anyhow::Result<Option<Client>> {
        let is_named = self.kubeconfig.is_some() || self.context.is_some();
        let is_wanted = is_named || self.addresses.is_empty() && auth_kubernetes::has_kubeconfig();
        if !is_wanted {
            return Ok(None);
        }
        let (file, context) = (self.kubeconfig.as_deref(), self.context.as_deref());
        let client = auth_kubernetes::connect_as_user(file, context).await;
        Ok(Some(client.context(
            "cannot find the daemons; use --address 127.0.0.1 to ask the one of this node",
        )?))
    }

    /// Whether one node's daemon is wanted.
    pub(super) fn names_a_node(&self) -> bool {
        self.node.is_some()
    }

    fn takes(&self, node: &str) -> bool {
        self.node.as_deref().is_none_or(|wanted| wanted == node)
    }
}

/// Finds the daemons of a cluster by the label of their pods.
async fn in_cluster(
    client: &Client,
    selection: &Selection,
) -> anyhow::Result<(Vec<Daemon>, Vec<Unanswered>)> {
    let namespace = &selection.daemon_namespace;
    let pods = Objects::<Pod>::of(client.clone(), namespace);
    let pods = pods.list(&format!("{NAME_LABEL}={DAEMON_NAME}")).await;
    let pods =
        pods.with_context(|| format!("cannot list the daemons' pods in namespace {namespace}"))?;
    let (running, rest) = by_node(pods, |node| selection.takes(node));
    if running.is_empty() && rest.is_empty() {
        match &selection.node {
            Some(node) => bail!("no daemon runs on node {node:?}, by the pods in {namespace}"),
            None => bail!(
                "namespace {namespace} has no pod of a daemon; --daemon-namespace says where they are"
            ),
        }
    }
    let daemons = running.into_iter().map(|(name, pod)| Daemon {
        name,
        way: Way::Pod {
            client: client.clone(),
            namespace: namespace.clone(),
            pod,
        },
    });
    Ok((daemons.collect(), rest))
}

/// Returns a running pod of each node, and the nodes that have none. The pods of a node all reach the daemon that serves it,
/// because they share the node's network.
fn by_node(
    pods: Vec<Pod>,
    takes: impl Fn(&str) -> bool,
) -> (BTreeMap<String, String>, Vec<Unanswered>) {
    let (mut running, mut rest) = (BTreeMap::new(), BTreeMap::new());
    for pod in pods {
        let (Some(node), Some(name)) = (pod.spec.node_name, pod.metadata.name) else {
            continue;
        };
        if !takes(&node) {
            continue;
        }
        match pod.status.phase.as_deref() {
            // One that is not being deleted stays longer.
            Some("Running") if pod.metadata.deletion_timestamp.is_none() => {
                running.insert(node, name);
            }
            Some("Running") => {
                running.entry(node).or_insert(name);
            }
            phase => {
                let phase = phase.unwrap_or("Unknown");
                rest.insert(node, format!("its daemon's pod {name} is {phase}"));
            }
        }
    }
    let rest = rest
        .into_iter()
        .filter(|(node, _)| !running.contains_key(node))
        .map(|(node, reason)| Unanswered { node, reason })
        .collect();
    (running, rest)
}

/// The daemons at the given addresses, or this node's. Their nodes' names are asked for if only one is wanted.
async fn at_addresses(selection: &Selection) -> (Vec<Daemon>, Vec<Unanswered>) {
    let addresses = match selection.addresses.as_slice() {
        [] => vec![Address::local()],
        addresses => addresses.to_vec(),
    };
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for address in addresses {
        let daemon = Daemon {
            name: address.to_string(),
            way: Way::Address(address),
        };
        if selection.node.is_some() {
            match daemon.request::<Identification>("/node", None).await {
                Ok(named) if selection.takes(&named.node) => {}
                Ok(_) => continue,
                Err(error) => {
                    missing.push(Unanswered {
                        node: daemon.name,
                        reason: format!("{error:#}"),
                    });
                    continue;
                }
            }
        }
        found.push(daemon);
    }
    (found, missing)
}

impl Address {
    fn local() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: ADMIN_PORT,
        }
    }
}

impl FromStr for Address {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const INVALID: &str = "is not HOST, HOST:PORT, an IP address or [ADDRESS]:PORT";
        let with = |host: &str, port| Self {
            host: host.to_owned(),
            port,
        };
        if let Ok(address) = text.parse::<std::net::SocketAddr>() {
            return Ok(with(&address.ip().to_string(), address.port()));
        }
        if text.parse::<std::net::IpAddr>().is_ok() {
            return Ok(with(text, ADMIN_PORT));
        }
        let is_name = |host: &str| {
            let mut bytes = host.bytes();
            !host.is_empty() && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
        };
        match text.split_once(':') {
            None if is_name(text) => Ok(with(text, ADMIN_PORT)),
            Some((host, port)) if is_name(host) => {
                Ok(with(host, port.parse().map_err(|_| INVALID)?))
            }
            _ => Err(INVALID),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Says what was asked, as the context of an error.
impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) if *address == Address::local() => write!(
                f,
                "no daemon answers at http://{address}; is it running, and is this the node's network namespace?"
            ),
            Self::Address(address) => write!(f, "no daemon answers at http://{address}"),
            Self::Pod { namespace, pod, .. } => {
                write!(
                    f,
                    "port {ADMIN_PORT} of pod {namespace}/{pod} does not answer"
                )
            }
        }
    }
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Pod { namespace, pod, .. } => write!(f, "{namespace}/{pod}"),
        }
    }
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} cannot be reached: {}", self.node, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_with_and_without_a_port() {
        for (text, expected) in [
            ("127.0.0.1", Some("127.0.0.1:15000")),
            ("node-1.example:81", Some("node-1.example:81")),
            ("node-1", Some("node-1:15000")),
            ("fd00::1", Some("[fd00::1]:15000")),
            ("[fd00::1]:81", Some("[fd00::1]:81")),
            ("", None),
            (":80", None),
            ("a:b", None),
            ("a b", None),
            ("a:70000", None),
        ] {
            let address = text.parse::<Address>().ok();
            let address = address.map(|address| address.to_string());
            assert_eq!(address.as_deref(), expected, "{text}");
        }
    }

    fn pod(name: &str, node: &str, phase: &str, deleted: bool) -> Pod {
        let mut metadata = json!({"name": name});
        if deleted {
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        serde_json::from_value(json!({
            "metadata": metadata, "spec": {"nodeName": node}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    #[test]
    fn each_node_has_one_pod_that_is_asked() {
        let pods = vec![
            pod("old", "a", "Running", true),
            pod("new", "a", "Running", false),
            pod("last", "b", "Running", true),
            pod("standby", "b", "Pending", false),
            pod("waits", "c", "Pending", false),
            pod("other", "d", "Running", false),
        ];
        let (running, rest) = by_node(pods, |node| node != "d");
        let expected = [("a", "new"), ("b", "last")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        assert_eq!(running, expected.into());
        assert_eq!(rest.len(), 1);
        assert_eq!(
            rest[0].to_string(),
            "node c cannot be reached: its daemon's pod waits is Pending"
        );
    }
}
