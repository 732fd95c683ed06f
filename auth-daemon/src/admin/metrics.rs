//! Prometheus metrics of a node.

use std::sync::{
    Arc, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use axum::{extract::State, response::IntoResponse};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

use crate::{observe::log_writer, proxy::Node};
use auth_support::http_server::open_metrics;
use auth_tunnel::tls::unix_seconds;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodState {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Plaintext {
    namespace: String,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Remote {
    cluster: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Foreign {
    trust_domain: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Whose {
    identity: String,
}

pub(super) async fn metrics(State(node): State<Arc<Node>>) -> impl IntoResponse {
    open_metrics(&collect(&node))
}

fn collect(node: &Node) -> Registry {
    let mut root = Registry::default();
    node.connections.settle_metrics();
    let registry = root.sub_registry_with_prefix("auth_daemon");
    registry.register(
        "build",
        "This daemon",
        Info::new([("version", env!("CARGO_PKG_VERSION"))]),
    );
    node.connections.totals.register(registry);
    node.refusals.register(registry);
    let mut gauge = |name: &str, help: &str, value: u64| {
        let gauge = Gauge::<u64, AtomicU64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge(
        "open_connections",
        "Open connections through this daemon",
        node.connections.count() as u64,
    );
    gauge(
        "lost_log_lines",
        "Lines that the log lost because its reader stalled",
        log_writer::lost_lines(),
    );
    gauge(
        "share_capacity",
        "Connections that the daemon's limits of open files and memory allow",
        node.capacity.connections() as u64,
    );
    gauge(
        "share_taken",
        "How many of them connections and idle tunnels use",
        (node.capacity.taken() / 2) as u64,
    );
    gauge(
        "ready",
        "Whether the node's pods have been enrolled once, as far as they can be",
        node.is_ready().into(),
    );
    gauge(
        "registry_version",
        "How often the daemon's view of the mesh has changed",
        *node.registry.changes().borrow(),
    );
    gauge(
        "unconfirmed_objects",
        "Objects that stay in force although the API server lists none of their kind any more",
        node.unconfirmed.load(Ordering::Relaxed) as u64,
    );
    gauge(
        "mesh_addresses",
        "Addresses and networks of the mesh that the kernel knows",
        node.kernel.occupancy().0 as u64,
    );
    {
        let gone = node.unclaimed.gone();
        gauge(
            "gone_addresses",
            "Former addresses of the mesh that are refused because no object claims them any more",
            gone.len() as u64,
        );
        gauge(
            "dropped_gone_addresses",
            "How many of those are no longer remembered, and so not refused, because there were too many",
            gone.dropped(),
        );
    }
    gauge(
        "trust_version",
        "Version of the trust bundle that the CA has published",
        node.certificates.trust().current().version,
    );
    gauge(
        "unlogged_connections",
        "Connections within the node without a line in the log",
        node.kernel.same_node.lost(),
    );
    gauge(
        "ca_reachable",
        "Whether the CA answers",
        node.certificates.health().status().reachable.into(),
    );
    let pods = node
        .pods
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    gauge(
        "idle_tunnels",
        "Idle TLS connections that are kept for reuse",
        pods.iter().map(|pod| pod.idle_tunnels as u64).sum(),
    );
    gauge(
        "tampered_pods",
        "Pods that have changed the daemon's set-up in their network namespaces",
        pods.iter().filter(|pod| !pod.tampered.is_empty()).count() as u64,
    );
    gauge(
        "connections_over_share",
        "Connections of pods that were refused because the pod had as many under way as its share of the kernel's maps",
        pods.iter().map(|pod| pod.over_share).sum(),
    );
    let states = Family::<PodState, Gauge>::default();
    for (state, enrolled) in [("enrolled", true), ("refused", false)] {
        let count = pods.iter().filter(|pod| pod.enrolled == enrolled).count();
        states
            .get_or_create(&PodState { state })
            .set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    registry.register("pods", "Pods of this node that are in the mesh", states);
    let plaintext = Family::<Plaintext, Counter>::default();
    for ((namespace, refused), count) in node.connections.pairs.plaintext() {
        let result = if refused { "refused" } else { "allowed" };
        plaintext
            .get_or_create(&Plaintext { namespace, result })
            .inc_by(count);
    }
    registry.register(
        "plaintext_connections",
        "Connections in plaintext to pods of this node that have ended, by the pods' namespace",
        plaintext,
    );
    let ends = Family::<Whose, Gauge>::default();
    for (identity, svid) in node.certificates.list() {
        // Without a certificate: expired since 1970.
        let end = svid.as_ref().map_or(0, |svid| unix_seconds(svid.not_after));
        ends.get_or_create(&Whose {
            identity: identity.to_string(),
        })
        .set(i64::try_from(end).unwrap_or(i64::MAX));
    }
    registry.register(
        "certificate_expiry_timestamp_seconds",
        "When the certificate of each identity on this node expires; 0 where there is none",
        ends,
    );
    register_federation(registry, node);
    register_remote_clusters(registry, node);
    if let Some(istio) = &node.connections.istio {
        let dropped = Counter::<u64>::default();
        dropped.inc_by(istio.dropped());
        registry.register(
            "istio_dropped_label_sets",
            "Sets of labels of Istio's metrics that were dropped because there were too many",
            dropped,
        );
        root.sub_registry_with_prefix("istio")
            .register_collector(Box::new(istio.clone()));
    }
    root
}

/// The foreign trust domains.
fn register_federation(registry: &mut Registry, node: &Node) {
    let (refreshed, roots) = (
        Family::<Foreign, Gauge>::default(),
        Family::<Foreign, Gauge>::default(),
    );
    let failures = Family::<Foreign, Counter>::default();
    for domain in node.federation.list() {
        let foreign = Foreign {
            trust_domain: domain.trust_domain,
        };
        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        refreshed
            .get_or_create(&foreign)
            .set(number(domain.refreshed_at));
        roots
            .get_or_create(&foreign)
            .set(number(domain.roots as u64));
        failures.get_or_create(&foreign).inc_by(domain.failures);
    }
    registry.register(
        "foreign_bundle_refreshed_timestamp_seconds",
        "When the bundle of each foreign trust domain was last known to be current; 0 if never",
        refreshed,
    );
    registry.register(
        "foreign_bundle_roots",
        "Roots of each foreign trust domain that are trusted",
        roots,
    );
    registry.register(
        "foreign_bundle_failures",
        "How often the bundle of each foreign trust domain could not be read or fetched",
        failures,
    );
}

/// The remote clusters.
fn register_remote_clusters(registry: &mut Registry, node: &Node) {
    let [readable, trusted] = [(); 2].map(|()| Family::<Remote, Gauge>::default());
    for known in node.remote.load().iter() {
        let cluster = Remote {
            cluster: known.name.clone(),
        };
        let is_readable = known.error.is_none();
        readable.get_or_create(&cluster).set(is_readable.into());
        let is_trusted = node.trusts(&known.trust_domain);
        trusted.get_or_create(&cluster).set(is_trusted.into());
    }
    registry.register(
        "remote_cluster_readable",
        "Whether each remote cluster can be read: 0 while only its last known state is",
        readable,
    );
    registry.register(
        "remote_cluster_trusted",
        "Whether each remote cluster is of the mesh's own trust domain, or of one with a federation entry",
        trusted,
    );
}
