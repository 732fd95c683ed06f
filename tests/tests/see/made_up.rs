//! A simulated mesh: a server that answers as a daemon of a node would, for sizes that no test can build.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, TcpStream},
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use mesh_tests::{InProcess, Place};
use serde_json::{Value, json};

/// A call between two workloads, and how often it happens.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) port: u16,
    /// `tunnel`, `same-node` or `plaintext`.
    pub(crate) path: &'static str,
    pub(crate) is_refused: bool,
    pub(crate) per_second: f64,
}

/// A mesh with continuing calls.
#[derive(Clone, Debug, Default)]
pub(crate) struct MadeUp {
    /// As `namespace/name`, each with its Service.
    pub(crate) workloads: Vec<(String, Option<String>)>,
    pub(crate) calls: Vec<Call>,
}

impl MadeUp {
    /// A shop of ten workloads.
    pub(crate) fn shop() -> Self {
        let with_service = |name: &str| {
            let service = name.split_once('/').map(|(_, name)| name.to_owned());
            (name.to_owned(), service)
        };
        let mut workloads: Vec<_> = [
            "shop/front",
            "shop/cart",
            "shop/catalog",
            "shop/checkout",
            "bank/payments",
            "bank/ledger",
            "data/orders-db",
            "data/cache",
            "ops/prometheus",
        ]
        .map(with_service)
        .into();
        workloads.push(("ops/nightly-report".into(), None));
        let call = |from: &str, to: &str, port, path, per_second| Call {
            from: from.to_owned(),
            to: to.to_owned(),
            port,
            path,
            is_refused: false,
            per_second,
        };
        let refused = |call: Call| Call {
            is_refused: true,
            ..call
        };
        let calls = vec![
            call("shop/front", "shop/cart", 8080, "same-node", 41.0),
            call("shop/front", "shop/catalog", 8080, "tunnel", 120.0),
            call("shop/cart", "shop/checkout", 8080, "tunnel", 6.0),
            call("shop/cart", "data/cache", 6379, "tunnel", 83.0),
            call("shop/catalog", "data/cache", 6379, "same-node", 35.0),
            call("shop/checkout", "bank/payments", 9443, "tunnel", 5.5),
            call("shop/checkout", "data/orders-db", 5432, "tunnel", 7.0),
            call("bank/payments", "bank/ledger", 9443, "tunnel", 5.4),
            call("ops/prometheus", "shop/front", 9090, "plaintext", 0.4),
            call("ops/prometheus", "bank/ledger", 9090, "tunnel", 0.4),
            refused(call(
                "ops/nightly-report",
                "bank/ledger",
                9443,
                "tunnel",
                0.3,
            )),
            call("ops/nightly-report", "data/orders-db", 5432, "tunnel", 0.2),
            refused(call("", "bank/payments", 9443, "plaintext", 0.2)),
        ];
        Self { workloads, calls }
    }

    /// 500 workloads in 25 namespaces, which call the workloads of their own namespace and of the next tier of five.
    pub(crate) fn large() -> Self {
        let name = |number: usize| format!("team-{:02}/service-{number:03}", number / 20);
        let paths = ["tunnel", "tunnel", "same-node", "tunnel", "tunnel"];
        let calls = (0..500).flat_map(|number: usize| {
            let (namespace, nth) = (number / 20, number % 20);
            let own = namespace * 20 + nth * 2 + 1;
            let next = (namespace / 5 + 1) * 100 + number * 7 % 100;
            let calls_next = nth.is_multiple_of(3) && next < 500;
            let own = (nth < 10).then_some(own);
            let called = own.into_iter().chain(calls_next.then_some(next));
            called.map(move |to| Call {
                from: name(number),
                to: name(to),
                port: 8080,
                path: if to == next && number.is_multiple_of(31) {
                    "plaintext"
                } else {
                    paths[nth % 5]
                },
                is_refused: to == next && number.is_multiple_of(47),
                per_second: 0.2 + (number % 17) as f64,
            })
        });
        Self {
            workloads: (0..500).map(|number| (name(number), None)).collect(),
            calls: calls.collect(),
        }
    }

    /// Answers as a daemon, at a port of a place.
    pub(crate) fn serve(self, place: &Place, port: u16) -> Result<InProcess> {
        let start = Instant::now();
        let address = (Ipv4Addr::LOCALHOST, port).into();
        InProcess::start(place, address, move |stream, _| {
            let seconds = start.elapsed().as_secs_f64();
            // A client that goes away misses its answer.
            let _ = self.answer(stream, seconds);
        })
    }

    fn answer(&self, mut stream: TcpStream, seconds: f64) -> std::io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") && head.len() < 4096 {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head);
        let path = head.split(' ').nth(1).unwrap_or_default();
        let body = match path.split('/').nth(1) {
            Some("live") => self.live(seconds),
            Some("mesh") => self.mesh(),
            Some("summary") => self.status(),
            _ => policies(),
        };
        let body = body.to_string();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    fn mesh(&self) -> Value {
        let workloads = self.workloads.iter().map(|(workload, service)| {
            let (namespace, name) = split(workload);
            json!({
                "namespace": namespace, "name": name, "identities": [identity(workload)],
                "pods": [format!("{name}-7d4b9-x2x9k")], "pod_count": 1, "nodes": ["node-1"],
                "services": service.iter().collect::<Vec<_>>(),
            })
        });
        json!({"workloads": workloads.collect::<Vec<_>>(), "services": [], "left_out": 0})
    }

    fn status(&self) -> Value {
        let certificates = self.workloads.iter().map(|(workload, _)| {
            json!({
                "identity": identity(workload), "serial": "5c1e90a17fd4b3a2",
                "notBefore": "2026-01-01T00:00:00Z", "notAfter": "2026-01-02T00:00:00Z",
            })
        });
        json!({"pods": [], "policies": [], "certificates": certificates.collect::<Vec<_>>()})
    }

    fn live(&self, seconds: f64) -> Value {
        let time = now();
        let pairs = self.calls.iter().map(|call| {
            let connections = (call.per_second * (600.0 + seconds)) as u64;
            let is_unknown = call.from.is_empty();
            let reason = match (call.is_refused, is_unknown) {
                (false, _) => "",
                (true, true) => "plaintext, but the port requires mutual TLS: STRICT by the mesh's default",
                (true, false) => "denied: no rule matches of AuthorizationPolicy bank/ledger",
            };
            let client = match is_unknown {
                true => json!({"namespace": null, "workload": null, "identity": null, "address": "203.0.113.9"}),
                false => party(&call.from, call.path != "plaintext"),
            };
            json!({
                "direction": "inbound", "client": client, "server": party(&call.to, true),
                "port": call.port, "path": call.path,
                "verdict": if call.is_refused { "denied" } else { "allowed" },
                "connections": connections, "open": 0, "resets": 0, "would_be_denied": 0,
                "bytes_to_server": connections * 420, "bytes_to_client": connections * 5300,
                "reason": reason, "policy": null, "service": null, "first": time, "last": time,
            })
        });
        json!({
            "time": time,
            "flows": {"started": 1, "next": 0, "lost": 0, "flows": []},
            "pairs": {"pairs": pairs.collect::<Vec<_>>()},
        })
    }
}

/// What the policies mean for any pod of the mesh.
fn policies() -> Value {
    let reach = |service: &str, allowed: bool, why: &str| json!({"service": service, "allowed": allowed, "why": why});
    json!({"Ok": {
        "mode": "STRICT by the mesh's default",
        "policies": ["AuthorizationPolicy shop/checkout (ALLOW): selects app=checkout"],
        "reach": [
            reach("bank/payments:9443", true, "allowed by AuthorizationPolicy bank/payments rules[0]"),
            reach("bank/ledger:9443", false, "denied: no rule matches of AuthorizationPolicy bank/ledger"),
        ],
        "left_out": 0,
    }})
}

fn split(workload: &str) -> (&str, &str) {
    workload.split_once('/').unwrap_or(("default", workload))
}

fn identity(workload: &str) -> String {
    let (namespace, name) = split(workload);
    format!("spiffe://cluster.local/ns/{namespace}/sa/{name}")
}

fn party(workload: &str, is_proven: bool) -> Value {
    let (namespace, name) = split(workload);
    json!({
        "namespace": namespace, "workload": name,
        "identity": is_proven.then(|| identity(workload)),
    })
}

/// The time of day in the daemons' format. The day does not matter.
fn now() -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let of_day = since.as_secs() % 86400;
    let (hours, minutes, seconds) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!(
        "2026-01-01T{hours:02}:{minutes:02}:{seconds:02}.{:03}Z",
        since.subsec_millis()
    )
}
