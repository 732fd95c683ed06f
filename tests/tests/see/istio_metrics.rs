//! Istio's standard metrics for TCP, with `metrics: istio`.

use std::collections::BTreeMap;

use mesh_tests::{DaemonOptions, TIMEOUT, eventually};

use crate::common::lifecycle_pair::{Echoing, MARKER, SERVICES, call, echoes, pair};

/// A series of a daemon's metrics: its labels and its value.
type Series = (BTreeMap<String, String>, u64);

/// The series of a metric in a daemon's answer.
fn series(metrics: &str, name: &str) -> Vec<Series> {
    let lines = metrics.lines();
    let lines = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix('{'));
    lines
        .map(|line| {
            let (labels, value) = line.rsplit_once("} ").unwrap();
            let labels = labels.trim_matches('"').split("\",").map(|label| {
                let (key, value) = label.split_once("=\"").unwrap();
                (key.to_owned(), value.to_owned())
            });
            (labels.collect(), value.parse().unwrap())
        })
        .collect()
}

#[test]
fn both_daemons_report_a_connection_with_istios_labels() {
    let options = DaemonOptions::default().setting("metrics", "istio".into());
    let stage = Echoing::on(pair(), &options);
    echoes(&stage.client, SERVICES[0].parse().unwrap());
    assert_eq!(
        call(stage.mesh.outside(), stage.web.at(8080))["event"],
        "failed"
    );

    let bytes = MARKER.len() as u64;
    for (daemon, reporter) in [(&stage.a, "source"), (&stage.b, "destination")] {
        // A connection is closed once both directions have ended on its node.
        let metrics = eventually(TIMEOUT, "the closed connection", || {
            let metrics = daemon.metrics().ok()?;
            let closed = series(&metrics, "istio_tcp_connections_closed_total");
            let is_closed = |(labels, count): &Series| {
                *count == 1 && labels["connection_security_policy"] == "mutual_tls"
            };
            closed.iter().any(is_closed).then_some(metrics)
        })
        .unwrap();
        let of = |metric: &str| {
            let all = series(&metrics, &format!("istio_tcp_{metric}_total"));
            let mut of_client = all
                .into_iter()
                .filter(|(labels, _)| labels["source_workload"] == "client");
            let found = of_client.next().unwrap_or_else(|| panic!("{metrics}"));
            assert_eq!(of_client.next(), None, "{metrics}");
            found
        };
        let (labels, opened) = of("connections_opened");
        assert_eq!(opened, 1);
        let expected = [
            ("reporter", reporter),
            ("source_workload", "client"),
            ("source_workload_namespace", "default"),
            (
                "source_principal",
                "spiffe://cluster.local/ns/default/sa/client",
            ),
            ("source_app", "client"),
            ("source_version", "latest"),
            ("source_canonical_service", "client"),
            ("source_canonical_revision", "latest"),
            ("source_cluster", "Kubernetes"),
            ("destination_workload", "web"),
            ("destination_workload_namespace", "default"),
            (
                "destination_principal",
                "spiffe://cluster.local/ns/default/sa/web",
            ),
            ("destination_app", "web"),
            ("destination_version", "latest"),
            ("destination_canonical_service", "web"),
            ("destination_canonical_revision", "latest"),
            ("destination_cluster", "Kubernetes"),
            ("destination_service", "web.default.svc.cluster.local"),
            ("destination_service_name", "web"),
            ("destination_service_namespace", "default"),
            ("request_protocol", "tcp"),
            ("response_flags", "-"),
            ("connection_security_policy", "mutual_tls"),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(labels, expected.into());
        for metric in ["connections_closed", "sent_bytes", "received_bytes"] {
            let (others, value) = of(metric);
            assert_eq!(others, labels, "{metric}");
            let expected = if metric == "connections_closed" {
                1
            } else {
                bytes
            };
            assert_eq!(value, expected, "{metric}");
        }
    }
    // Only the server's daemon sees who calls in plaintext.
    let refused = |metrics: &str| {
        let closed = series(metrics, "istio_tcp_connections_closed_total");
        let mut denied = closed
            .into_iter()
            .filter(|(labels, _)| labels["response_flags"] == "DENY");
        denied.next()
    };
    assert_eq!(refused(&stage.a.metrics().unwrap()), None);
    let (labels, _) =
        eventually(TIMEOUT, "the refusal", || refused(&stage.b.metrics().ok()?)).unwrap();
    for (key, value) in [
        ("source_workload", "unknown"),
        ("source_principal", "unknown"),
        ("connection_security_policy", "unknown"),
        ("destination_workload", "web"),
    ] {
        assert_eq!(labels[key], value, "{labels:?}");
    }
}

#[test]
fn bytes_of_an_open_connection_count() {
    let options = DaemonOptions::default().setting("metrics", "istio".into());
    let stage = Echoing::on(pair(), &options);
    let mut open = stage
        .client
        .app(&format!(
            "connect --to {} --send {MARKER} --read --timeout 60000",
            stage.web.at(8080)
        ))
        .unwrap();
    let sum = |metric: &str| {
        let metrics = stage.b.metrics().unwrap();
        let all = series(&metrics, &format!("istio_tcp_{metric}_total"));
        all.iter().map(|(_, value)| value).sum::<u64>()
    };
    eventually(TIMEOUT, "the bytes of an open connection", || {
        (sum("received_bytes") == MARKER.len() as u64).then_some(())
    })
    .unwrap();
    assert_eq!(
        (sum("connections_opened"), sum("connections_closed")),
        (1, 0)
    );
    open.process().kill().unwrap();
    eventually(TIMEOUT, "its end", || {
        (sum("connections_closed") == 1).then_some(())
    })
    .unwrap();
    assert_eq!(
        sum("received_bytes"),
        MARKER.len() as u64,
        "each byte counts once"
    );
    assert_eq!(sum("connections_opened"), 1);
}
