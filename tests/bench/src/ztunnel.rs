//! What a ztunnel has carried, by its metrics.

use anyhow::Result;
use mesh_tests::Ztunnel;

use super::counters::Counters;

/// Its counters so far.
pub(super) fn counters_of(ztunnel: &Ztunnel) -> Result<Counters> {
    Ok(counters(&ztunnel.metrics()?))
}

/// Sums the relevant metrics from their text.
fn counters(metrics: &str) -> Counters {
    let mut counters = Counters::default();
    for line in metrics.lines() {
        let Some((name, rest)) = line.split_once('{') else {
            continue;
        };
        let Some((labels, value)) = rest.rsplit_once("} ") else {
            continue;
        };
        let has = |label: &str| labels.split(',').any(|one| one == label);
        let tls = has("connection_security_policy=\"mutual_tls\"");
        let to_pods = has("reporter=\"destination\"");
        let value = value.trim().parse().unwrap_or(0);
        match name {
            "istio_tcp_connections_opened_total" if to_pods && tls => {
                counters.inbound.connections += value;
            }
            "istio_tcp_connections_opened_total" if !to_pods && !tls => counters.passed += value,
            "istio_tcp_received_bytes_total" | "istio_tcp_sent_bytes_total" if to_pods && tls => {
                counters.inbound.bytes += value;
            }
            _ => {}
        }
    }
    counters
}

#[cfg(test)]
mod tests {
    use super::super::counters::Moved;
    use super::*;

    #[test]
    fn connections_to_pods_under_tls_are_told_from_those_that_pass() {
        let metrics = "\
# TYPE istio_tcp_connections_opened counter
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"mutual_tls\"} 100
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"unknown\",x=\"a\"} 3
istio_tcp_connections_opened_total{reporter=\"source\",connection_security_policy=\"unknown\",x=\"b\"} 4
istio_tcp_connections_opened_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 20
istio_tcp_connections_opened_total{reporter=\"destination\",connection_security_policy=\"unknown\"} 1
istio_tcp_received_bytes_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 1000
istio_tcp_sent_bytes_total{reporter=\"destination\",connection_security_policy=\"mutual_tls\"} 2000
istio_tcp_sent_bytes_total{reporter=\"source\",connection_security_policy=\"mutual_tls\"} 7
workload_manager_active_proxy_count 2
";
        let expected = Counters {
            inbound: Moved {
                connections: 20,
                bytes: 3000,
            },
            passed: 7,
        };
        assert_eq!(counters(metrics), expected);
    }
}
