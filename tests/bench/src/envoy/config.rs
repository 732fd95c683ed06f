//! A sidecar's configuration: the listeners and clusters that Istio would configure, for TCP.
//!
//! Where Istio's own choice slows Envoy down, the faster one is used: certificates on P-256 instead of RSA, many TLS
//! sessions to resume, no tls_inspector, no access log, no telemetry filters.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use super::certificates::{Files, TRUST_DOMAIN, spiffe};

/// A pod that other pods may call.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    /// Its service account.
    pub(crate) account: String,
}

/// The configuration of a pod's sidecar. All servers have the same ports.
pub(super) fn config(pod: &str, files: &Files, servers: &[Server], ports: &[u16]) -> Value {
    let mut to_servers = Vec::new();
    let mut clusters = vec![json!({
        "name": PASSTHROUGH,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": CONNECT_TIMEOUT,
        "circuit_breakers": no_limits(),
    })];
    for server in servers {
        for port in ports {
            let cluster = format!("{}-{port}", server.name);
            to_servers.push(json!({
                "filter_chain_match": {
                    "prefix_ranges": [{"address_prefix": server.address, "prefix_len": 32}],
                    "destination_port": port,
                },
                "filters": [tcp_proxy(MESH, &cluster)],
            }));
            let mut cluster = cluster_of(&cluster, server.address, *port);
            cluster["transport_socket"] = client_tls(files, server);
            clusters.push(cluster);
        }
    }
    let to_app = ports.iter().map(|port| {
        json!({
            "filter_chain_match": {"destination_port": port},
            "transport_socket": server_tls(files),
            "filters": [tcp_proxy(IN, &format!("app-{port}"))],
        })
    });
    let inbound = listener(
        "inbound",
        INBOUND,
        json!({"filter_chains": to_app.collect::<Vec<_>>()}),
    );
    let outbound = listener(
        "outbound",
        OUTBOUND,
        json!({
            "filter_chains": to_servers,
            "default_filter_chain": {"filters": [tcp_proxy(PASSTHROUGH, PASSTHROUGH)]},
        }),
    );
    clusters.extend(
        ports
            .iter()
            .map(|port| cluster_of(&format!("app-{port}"), Ipv4Addr::LOCALHOST.into(), *port)),
    );
    json!({
        "node": {"id": pod, "cluster": "bench"},
        // Nothing is flushed by a timer.
        "stats_flush_on_admin": true,
        "static_resources": {"listeners": [outbound, inbound], "clusters": clusters},
    })
}

fn listener(name: &str, port: u16, chains: Value) -> Value {
    let mut listener = json!({
        "name": name,
        "stat_prefix": name,
        "address": address(Ipv4Addr::UNSPECIFIED.into(), port),
        "listener_filters": [{
            "name": "envoy.filters.listener.original_dst",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
            },
        }],
        "tcp_backlog_size": BACKLOG,
    });
    if let (Some(listener), Value::Object(chains)) = (listener.as_object_mut(), chains) {
        listener.extend(chains);
    }
    listener
}

fn tcp_proxy(counted_as: &str, cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": counted_as,
            "cluster": cluster,
        },
    })
}

fn cluster_of(name: &str, ip: IpAddr, port: u16) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": CONNECT_TIMEOUT,
        "circuit_breakers": no_limits(),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(ip, port)}}]}],
        },
    })
}

fn client_tls(files: &Files, server: &Server) -> Value {
    let identity = json!({"san_type": "URI", "matcher": {"exact": spiffe(&server.account)}});
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": format!("{}.default.svc.cluster.local", server.name),
            "common_tls_context": tls(files, &identity),
            // One ticket, Envoy's default, is used up by the first of many concurrent connections.
            "max_session_keys": SESSIONS,
        },
    })
}

fn server_tls(files: &Files) -> Value {
    let identity = json!({"san_type": "URI", "matcher": {"prefix": format!("{TRUST_DOMAIN}/")}});
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": tls(files, &identity),
        },
    })
}

fn tls(files: &Files, identity: &Value) -> Value {
    json!({
        "alpn_protocols": ["istio"],
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3",
            "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": {"filename": files.certificate},
            "private_key": {"filename": files.key},
        }],
        "validation_context": {
            "trusted_ca": {"filename": files.root},
            "match_typed_subject_alt_names": [identity],
        },
    })
}

/// Istio raises Envoy's own limit of 1,024 connections.
fn no_limits() -> Value {
    json!({"thresholds": [{
        "max_connections": u32::MAX,
        "max_pending_requests": u32::MAX,
        "max_requests": u32::MAX,
    }]})
}

fn address(ip: IpAddr, port: u16) -> Value {
    json!({"socket_address": {"address": ip, "port_value": port}})
}

/// The port to which the pod's own connections are redirected.
pub(super) const OUTBOUND: u16 = 15001;
/// The port to which connections to the pod are redirected.
pub(super) const INBOUND: u16 = 15006;
/// What connections to pods of the mesh are counted as.
const MESH: &str = "mesh";
/// What connections to the pod are counted as.
pub(super) const IN: &str = "in";
/// What connections to the rest of the world are counted as.
pub(super) const PASSTHROUGH: &str = "passthrough";
const CONNECT_TIMEOUT: &str = "10s";
const BACKLOG: u32 = 4096;
const SESSIONS: u32 = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_port_of_each_server_has_a_chain_and_a_cluster() {
        let server = |name: &str, last| Server {
            name: name.to_owned(),
            address: [10, 77, 2, last].into(),
            account: name.to_owned(),
        };
        let files = Files {
            certificate: "c".into(),
            key: "k".into(),
            root: "r".into(),
        };
        let config = config("a", &files, &[server("x", 2), server("y", 3)], &[80, 81]);
        let resources = &config["static_resources"];
        let chains = |number: usize| {
            let chains = resources["listeners"][number]["filter_chains"].as_array();
            chains.map_or(0, Vec::len)
        };
        assert_eq!((chains(0), chains(1)), (4, 2));
        // Four to servers, two to the app, one to the world.
        assert_eq!(resources["clusters"].as_array().map(Vec::len), Some(7));
    }
}
