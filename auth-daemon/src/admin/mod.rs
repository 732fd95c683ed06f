//! The daemon's HTTP endpoints: status, metrics and readiness, and the page that shows the mesh.

mod health;
mod live;
mod metrics;
mod page;
mod status;

pub use health::{HEALTH_SOCKET, Health, LIVE, READY};
pub(crate) use live::{Missing, Nodes, Reachable};
pub(crate) use page::with_page;
pub use status::Identification;

use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use axum::{
    Json, Router,
    extract::{self, State},
    http::StatusCode,
    routing::{get, post},
};
use tokio::{
    net::{TcpListener, UnixListener},
    time::{Duration, Instant, sleep},
};

use crate::{
    config::Observe,
    observe::{connections::OpenConnections, flows::Page, pairs},
    proxy::Node,
};
use auth_mesh::policy::{
    diff::Inventory,
    question::{Answer, EnabledNamespace, KUBE_SYSTEM, Known, Question},
};
use auth_support::http_server::answer;

/// Port of the status endpoints, on the loopback.
pub const ADMIN_PORT: u16 = 15000;
/// Port of the metrics endpoint, on all addresses, because Prometheus runs elsewhere.
pub const METRICS_PORT: u16 = 15020;
/// Port of the readiness endpoint, on all addresses, because a kubelet may probe from the node's own address.
pub const READINESS_PORT: u16 = 15021;

/// Where the daemon answers.
#[derive(Debug)]
pub struct Listeners {
    admin: TcpListener,
    readiness: TcpListener,
    metrics: TcpListener,
}

/// Opens the listeners.
pub async fn bind() -> anyhow::Result<Listeners> {
    Ok(Listeners {
        admin: listen(SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN_PORT))).await?,
        readiness: listen_everywhere(READINESS_PORT).await?,
        metrics: listen_everywhere(METRICS_PORT).await?,
    })
}

async fn listen_everywhere(port: u16) -> anyhow::Result<TcpListener> {
    match listen((Ipv6Addr::UNSPECIFIED, port).into()).await {
        Ok(listener) => Ok(listener),
        // A node without IPv6.
        Err(_) => listen((Ipv4Addr::UNSPECIFIED, port).into()).await,
    }
}

async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        anyhow::anyhow!("cannot listen on {address}: {error}; is another daemon running here?")
    })
}

/// Opens the listeners. Waits up to `patience` for a previous daemon to release their ports.
pub async fn bind_after_another(patience: Duration) -> anyhow::Result<Listeners> {
    let start = Instant::now();
    loop {
        match bind().await {
            Err(_) if start.elapsed() < patience => sleep(Duration::from_millis(10)).await,
            outcome => return outcome,
        }
    }
}

/// Opens [`HEALTH_SOCKET`].
pub fn bind_health() -> anyhow::Result<UnixListener> {
    health::bind(Path::new(HEALTH_SOCKET))
        .map_err(|error| anyhow::anyhow!("cannot listen on {HEALTH_SOCKET}: {error}"))
}

/// Serves the health endpoints until the runtime ends.
pub async fn serve_health(listener: UnixListener, health: Arc<Health>) {
    health::serve(listener, health).await;
}

/// Answers until the runtime ends.
pub async fn serve(node: Arc<Node>, health: Arc<Health>, listeners: Listeners) {
    let status_routes = Router::new()
        .route("/node", get(status::identification))
        .route("/status", get(status::status))
        .route("/summary", get(status::summary))
        .route("/policy/check", post(check_policy))
        .route("/policy/list", post(list_policies))
        .route("/policy/pods", get(policy_pods))
        .route("/flows/{after}", get(flows))
        .route("/pairs", get(pairs))
        .route("/nodes", get(live::nodes))
        .route("/live/{after}/{since}", get(live::live))
        .route("/mesh", get(live::mesh))
        .route("/policy/pod/{namespace}/{name}", get(live::policies_of))
        .with_state(node.clone());
    let metrics_routes = Router::new()
        .route("/metrics", get(metrics::metrics))
        .with_state(node);
    tokio::join!(
        answer(listeners.admin, with_page(status_routes)),
        answer(listeners.readiness, health::routes(health)),
        answer(listeners.metrics, metrics_routes)
    );
}

/// Evaluates the policies in force for a connection between two workloads.
async fn check_policy(
    State(node): State<Arc<Node>>,
    Json(question): Json<Question>,
) -> Json<Result<Answer, String>> {
    let answer = known(&node).check(&question);
    Json(answer.map_err(|error| format!("{error:#}")))
}

async fn list_policies(State(node): State<Arc<Node>>) -> Json<Result<Answer, String>> {
    Json(Ok(known(&node).list()))
}

/// Returns what a comparison of policies needs to know of the mesh.
async fn policy_pods(State(node): State<Arc<Node>>) -> Json<Inventory> {
    let policies = node.policies.current();
    let snapshot = node.registry.snapshot();
    Json(Inventory::new(policies.settings(), &snapshot))
}

/// Returns the connections that ended as number `after` or later.
async fn flows(
    State(node): State<Arc<Node>>,
    extract::Path(after): extract::Path<u64>,
) -> Result<Json<Page>, Unobserved> {
    let connections = observed(&node)?;
    Ok(Json(connections.flows.after(after, &node.config.node_name)))
}

/// Returns which workloads call each other.
async fn pairs(State(node): State<Arc<Node>>) -> Result<Json<pairs::Answer>, Unobserved> {
    let connections = observed(&node)?;
    connections.settle_pairs();
    let unseen = node.with_unseen_callers();
    let answer = connections.pairs.answer(&node.config.node_name, unseen);
    Ok(Json(answer))
}

/// The answer of a daemon that observes nothing to a question about connections.
type Unobserved = (StatusCode, &'static str);

fn observed(node: &Node) -> Result<&OpenConnections, Unobserved> {
    match node.config.observe {
        Observe::Connections => Ok(&node.connections),
        Observe::Nothing => Err((
            StatusCode::NOT_FOUND,
            "this daemon keeps no record of connections: its configuration has observe: nothing",
        )),
    }
}

fn known(node: &Node) -> Known {
    let snapshot = node.registry.snapshot();
    Known {
        source: format!("what node {} knows", node.config.node_name),
        // Policies are about the pods of this cluster.
        pods: { snapshot.workloads() }
            .filter(|pod| pod.name.cluster().is_none())
            .cloned()
            .collect(),
        services: { snapshot.services() }
            .filter(|service| service.name.cluster().is_none())
            .cloned()
            .collect(),
        policies: node.policies.current(),
        memberships: snapshot.memberships(),
        enabled_namespaces: snapshot
            .enabled_namespaces()
            .map(|name| EnabledNamespace {
                name: name.to_owned(),
                file: None,
            })
            .collect(),
        system_namespaces: [KUBE_SYSTEM]
            .into_iter()
            .chain(node.config.discovery.own_namespace())
            .map(str::to_owned)
            .collect(),
        files: HashMap::new(),
    }
}
