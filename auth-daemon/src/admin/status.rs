//! The daemon's status, as JSON.

use std::{
    sync::{Arc, PoisonError},
    time::SystemTime,
};

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{config::Mode, observe::flows::format_time, proxy::Node};
use auth_tunnel::tls::{rfc3339, unix_seconds};

/// A daemon's own name and version.
#[derive(Debug, Deserialize, Serialize)]
pub struct Identification {
    /// The node's name.
    pub node: String,
    /// The daemon's version.
    pub version: String,
}

/// Says which daemon this is.
pub(super) async fn identification(State(node): State<Arc<Node>>) -> Json<Identification> {
    Json(Identification {
        node: node.config.node_name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Returns everything but the open connections.
pub(super) async fn summary(State(node): State<Arc<Node>>) -> Json<Value> {
    Json(without_connections(&node))
}

pub(super) async fn status(State(node): State<Arc<Node>>) -> Json<Value> {
    let mut status = without_connections(&node);
    status["connections"] = json!(node.connections.list());
    Json(status)
}

fn without_connections(node: &Node) -> Value {
    let (mesh_addresses, originals, pods) = node.kernel.occupancy();
    let pod_list = node
        .pods
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let idle: usize = pod_list.iter().map(|pod| pod.idle_tunnels).sum();
    json!({
        "node": node.config.node_name,
        "version": env!("CARGO_PKG_VERSION"),
        "time": format_time(SystemTime::now()),
        "trustDomain": node.config.trust_domain.as_str(),
        "mode": match node.config.mode { Mode::Strict => "STRICT", Mode::Permissive => "PERMISSIVE" },
        "ready": node.is_ready(),
        "pods": pod_list,
        "certificates": certificates(node),
        "ca": node.certificates.health().status(),
        "trust": trust(node),
        "federation": node.federation.list(),
        "remoteClusters": remote_clusters(node),
        "policies": policies(node),
        "openConnections": node.connections.count(),
        "kernel": {"meshAddresses": mesh_addresses, "originals": originals, "underWay": node.kernel.shares.under_way(), "pods": pods},
        "pool": {"idle": idle},
        "capacity": {
            "connections": node.capacity.connections(),
            "taken": node.capacity.taken().div_ceil(2),
        },
        "sameNode": {
            "verdicts": node.same_node.count(),
            "diverted": node.same_node.count_diverted(),
            "unlogged": node.kernel.same_node.lost(),
        },
    })
}

fn certificates(node: &Node) -> Vec<Value> {
    let held = node.certificates.list().into_iter();
    let shown = held.map(|(identity, svid)| {
        json!({
            "identity": identity.as_str(),
            "serial": svid.as_ref().map(|svid| &*svid.serial),
            "notBefore": svid.as_ref().map(|svid| rfc3339(unix_seconds(svid.not_before))),
            "notAfter": svid.as_ref().map(|svid| rfc3339(unix_seconds(svid.not_after))),
        })
    });
    shown.collect()
}

fn trust(node: &Node) -> Value {
    let trust = node.certificates.trust().current();
    json!({
        "version": trust.version,
        "phase": trust.phase,
        "roots": trust.bundle.roots.len(),
        "revoked": {
            "certificates": trust.revoked.serials.len(),
            "identities": trust.revoked.identities.iter().map(|(identity, reason)| {
                json!({"identity": identity.as_str(), "reason": reason.as_str()})
            }).collect::<Vec<_>>(),
            "nodes": trust.revoked.nodes.iter().map(|(node, reason)| {
                json!({"node": node, "reason": reason.as_str()})
            }).collect::<Vec<_>>(),
        },
    })
}

fn remote_clusters(node: &Node) -> Vec<Value> {
    let clusters = node.remote.load();
    let shown = clusters.iter().map(|cluster| {
        let mut shown = json!(cluster);
        shown["trusted"] = node.trusts(&cluster.trust_domain).into();
        shown
    });
    shown.collect()
}

fn policies(node: &Node) -> Vec<Value> {
    let policies = node.policies.current();
    let shown = policies.objects().map(|object| {
        json!({
            "kind": object.kind().to_string(),
            "name": object.name().to_string(),
            "error": object.error(),
        })
    });
    shown.collect()
}
