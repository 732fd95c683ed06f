//! Envoy's configuration: an HBONE server for apps of its pod, and an HBONE client by internal listeners, as Istio builds
//! both of Envoy.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use serde_json::{Value, json};

use crate::common::authority::{Files, spiffe};

/// What an Envoy does with a CONNECT to an `:authority`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    /// Connects to the app on this loopback port.
    App(u16),
    /// Answers with this status.
    Status(u16),
}

/// A configuration that can be added to.
pub(super) struct Config {
    files: Files,
    listeners: Vec<Value>,
    clusters: Vec<Value>,
}

impl Config {
    pub(super) fn new(files: Files) -> Self {
        Self {
            files,
            listeners: Vec::new(),
            clusters: Vec::new(),
        }
    }

    /// Serves HBONE on port 15008. Each request leaves a line in `log`.
    pub(super) fn serve(&mut self, answers: &[(SocketAddr, Answer)], log: &Path) {
        let mut hosts = Vec::new();
        for (number, (authority, answer)) in answers.iter().enumerate() {
            let mut route = json!({"match": {"connect_matcher": {}}});
            match answer {
                Answer::App(port) => {
                    let cluster = format!("app-{number}");
                    let app = socket_address(SocketAddr::from(([127, 0, 0, 1], *port)));
                    self.clusters
                        .push(cluster_of(&cluster, &json!({"address": app})));
                    route["route"] = json!({
                        "cluster": cluster,
                        "timeout": "0s",
                        "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
                    });
                }
                Answer::Status(status) => route["direct_response"] = json!({"status": status}),
            }
            hosts.push(json!({
                "name": format!("host-{number}"),
                "domains": [authority.to_string()],
                "routes": [route],
            }));
        }
        let line = json!({
            "authority": "%REQ(:AUTHORITY)%",
            "client": "%DOWNSTREAM_PEER_URI_SAN%",
            "from": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
            "status": "%RESPONSE_CODE%",
            "received": "%BYTES_RECEIVED%",
            "sent": "%BYTES_SENT%",
            "details": "%RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%",
        });
        let manager = typed(
            "envoy.filters.network.http_connection_manager",
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            json!({
                "stat_prefix": "hbone",
                "codec_type": "HTTP2",
                "stream_idle_timeout": "0s",
                "http2_protocol_options": {"allow_connect": true},
                "upgrade_configs": [{"upgrade_type": "CONNECT"}],
                "route_config": {"name": "hbone", "virtual_hosts": hosts},
                "http_filters": [typed(
                    "envoy.filters.http.router",
                    "envoy.extensions.filters.http.router.v3.Router",
                    json!({}),
                )],
                "access_log": [access_log(log, &line)],
            }),
        );
        let tls = typed(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            json!({
                "require_client_certificate": true,
                "common_tls_context": self.tls(&json!({"prefix": "spiffe://cluster.local/"})),
            }),
        );
        let mut address = socket_address(SocketAddr::from(([0; 8], HBONE)));
        address["socket_address"]["ipv4_compat"] = true.into();
        self.listeners.push(json!({
            "name": "hbone",
            "address": address,
            "filter_chains": [{"transport_socket": tls, "filters": [manager]}],
        }));
    }

    /// Carries connections to the given loopback ports to destinations on `server`, by HBONE. The server must have this
    /// service account. Each connection leaves a line in `log`.
    pub(super) fn call(
        &mut self,
        server: IpAddr,
        account: &str,
        ports: &[(u16, SocketAddr)],
        log: &Path,
    ) {
        let (tunnel, peer) = (format!("tunnel-{server}"), format!("peer-{server}"));
        for (port, destination) in ports {
            let cluster = format!("to-{port}");
            let mut inner = cluster_of(
                &cluster,
                &json!({
                    "address": {"envoy_internal_address": {
                        "server_listener_name": tunnel,
                        "endpoint_id": destination.to_string(),
                    }},
                }),
            );
            // The internal listener learns the destination from here.
            inner["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["metadata"] = json!({
                "filter_metadata": {"tunnel": {"destination": destination.to_string()}},
            });
            inner["transport_socket"] = typed(
                "envoy.transport_sockets.internal_upstream",
                "envoy.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
                json!({
                    "passthrough_metadata": [{"kind": {"host": {}}, "name": "tunnel"}],
                    "transport_socket": typed(
                        "envoy.transport_sockets.raw_buffer",
                        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer",
                        json!({}),
                    ),
                }),
            );
            self.clusters.push(inner);
            self.listeners.push(json!({
                "name": cluster,
                "address": socket_address(SocketAddr::from(([127, 0, 0, 1], *port))),
                "filter_chains": [{"filters": [tcp_proxy(&cluster, json!({}))]}],
            }));
        }
        let line = json!({
            "destination": "%DYNAMIC_METADATA(tunnel:destination)%",
            "server": "%UPSTREAM_PEER_URI_SAN%",
            "answer": "%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%",
            "received": "%BYTES_RECEIVED%",
            "sent": "%BYTES_SENT%",
            "details": "%RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% %CONNECTION_TERMINATION_DETAILS%",
        });
        self.listeners.push(json!({
            "name": tunnel,
            "internal_listener": {},
            "filter_chains": [{"filters": [tcp_proxy(&peer, json!({
                "tunneling_config": {
                    "hostname": "%DYNAMIC_METADATA(tunnel:destination)%",
                    "propagate_response_headers": true,
                },
                "access_log": [access_log(log, &line)],
            }))]}],
        }));
        let at = socket_address(SocketAddr::new(server, HBONE));
        let mut cluster = cluster_of(&peer, &json!({"address": at}));
        cluster["typed_extension_protocol_options"] = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}},
            },
        });
        cluster["transport_socket"] = typed(
            "envoy.transport_sockets.tls",
            "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            json!({"common_tls_context": self.tls(&json!({"exact": spiffe(account)}))}),
        );
        self.clusters.push(cluster);
    }

    /// The whole configuration.
    pub(super) fn finish(self) -> Value {
        json!({
            "node": {"id": "peer", "cluster": "peers"},
            "bootstrap_extensions": [typed(
                "envoy.bootstrap.internal_listener",
                "envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
                json!({}),
            )],
            "static_resources": {"listeners": self.listeners, "clusters": self.clusters},
        })
    }

    /// TLS with the pod's certificate and a peer whose identity matches.
    fn tls(&self, identity: &Value) -> Value {
        json!({
            "alpn_protocols": ["h2"],
            "tls_params": {
                "tls_minimum_protocol_version": "TLSv1_3",
                "tls_maximum_protocol_version": "TLSv1_3",
            },
            "tls_certificates": [{
                "certificate_chain": {"filename": self.files.certificate},
                "private_key": {"filename": self.files.key},
            }],
            "validation_context": {
                "trusted_ca": {"filename": self.files.root},
                "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": identity}],
            },
        })
    }
}

fn tcp_proxy(cluster: &str, mut more: Value) -> Value {
    more["stat_prefix"] = cluster.into();
    more["cluster"] = cluster.into();
    typed(
        "envoy.filters.network.tcp_proxy",
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        more,
    )
}

fn cluster_of(name: &str, endpoint: &Value) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
    })
}

fn access_log(path: &Path, line: &Value) -> Value {
    typed(
        "envoy.access_loggers.file",
        "envoy.extensions.access_loggers.file.v3.FileAccessLog",
        json!({"path": path, "log_format": {"json_format": line}}),
    )
}

fn typed(name: &str, kind: &str, mut config: Value) -> Value {
    config["@type"] = format!("type.googleapis.com/{kind}").into();
    json!({"name": name, "typed_config": config})
}

fn socket_address(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip(), "port_value": address.port()}})
}

const HBONE: u16 = 15008;
