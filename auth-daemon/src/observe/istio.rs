//! Istio's standard metrics for TCP (`metrics: istio`), so that Kiali and dashboards made for Istio show the mesh.
//!
//! They come from the counts that the pairs of workloads come from, under Istio's labels.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use auth_mesh::{Identity, ObjectName, Service, Snapshot, Workload, policy::suggest};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
};

use super::{
    access_log::{Direction, Path},
    bounded::{Limit, drop_oldest},
    pairs::{Counts, Ending, Entry},
    size::{BLOCK, HeapSize, in_table},
};

/// The most sets of labels that are kept. One takes some 1.5 KiB, and four or more lines of some 1 KiB each in an answer.
const MAX_SETS: Limit = Limit {
    entries: 1024,
    bytes: 1536 * 1024,
};
/// What Istio writes for a label that is not known.
const UNKNOWN: &str = "unknown";
/// The domain of Services' names: Istio's default, because neither pods nor Services contain it.
const CLUSTER_DOMAIN: &str = "svc.cluster.local";

/// Connections under Istio's labels.
#[derive(Debug)]
pub(crate) struct IstioMetrics {
    cluster: String,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    sets: HashMap<Box<Labels>, Totals>,
    dropped: u64,
}

#[derive(Debug)]
struct Totals {
    opened: u64,
    /// By `response_flags`.
    closed: [u64; FLAGS.len()],
    /// Bytes in Istio's sense: `sent` are the server's, for both reporters.
    sent: u64,
    received: u64,
    last: SystemTime,
}

/// Istio's response flags of TCP connections, as ztunnel has them: none, denied by policies, not connected.
const FLAGS: [&str; 3] = ["-", "DENY", "CONNECT"];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reporter: &'static str,
    source_workload: String,
    source_workload_namespace: String,
    source_principal: String,
    source_app: String,
    source_version: String,
    source_canonical_service: String,
    source_canonical_revision: String,
    source_cluster: String,
    destination_workload: String,
    destination_workload_namespace: String,
    destination_principal: String,
    destination_app: String,
    destination_version: String,
    destination_canonical_service: String,
    destination_canonical_revision: String,
    destination_cluster: String,
    destination_service: String,
    destination_service_name: String,
    destination_service_namespace: String,
    request_protocol: &'static str,
    connection_security_policy: &'static str,
}

impl IstioMetrics {
    /// Nothing is counted yet. `cluster` is Istio's name of the cluster.
    pub(crate) fn new(cluster: &str) -> Self {
        Self {
            cluster: cluster.to_owned(),
            known: Mutex::default(),
        }
    }

    /// Adds counts.
    pub(super) fn add<'a>(
        &self,
        entries: impl IntoIterator<Item = (&'a Entry, &'a Counts)>,
        snapshot: &Snapshot,
        now: SystemTime,
    ) {
        let mut entries = entries.into_iter().peekable();
        if entries.peek().is_none() {
            return;
        }
        let services = ByNamespace::of(snapshot);
        let mut known = self.lock();
        for (entry, counts) in entries {
            let labels = Labels::of(entry, counts, snapshot, &services, &self.cluster);
            let totals = known
                .sets
                .entry(Box::new(labels))
                .or_insert_with(|| Totals::since(now));
            totals.add(entry, counts);
            totals.last = now;
        }
        let Known { sets, dropped } = &mut *known;
        *dropped += drop_oldest(
            sets,
            MAX_SETS,
            |_| true,
            |totals| totals.last,
            |labels, _| labels.size(),
        );
    }

    /// Returns the number of sets of labels that were dropped, because there were too many.
    pub(crate) fn dropped(&self) -> u64 {
        self.lock().dropped
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Expects to be registered with the prefix `istio`.
impl Collector for IstioMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let known = self.lock();
        let mut metric = |name, help, value: &dyn Fn(&Totals, usize) -> u64, flags: &[usize]| {
            let mut encoder = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, totals) in &known.sets {
                for &flag in flags {
                    let count = value(totals, flag);
                    // A flag that never occurred is no series. Istio's own proxies do the same.
                    if flag > 0 && count == 0 {
                        continue;
                    }
                    let labels = (Labels::clone(labels), [("response_flags", FLAGS[flag])]);
                    let mut counter = encoder.encode_family(&labels)?;
                    counter.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
                }
            }
            fmt::Result::Ok(())
        };
        metric(
            "tcp_connections_opened",
            "TCP connections that were opened",
            &|totals, _| totals.opened,
            &[0],
        )?;
        metric(
            "tcp_connections_closed",
            "TCP connections that were closed",
            &|totals, flag| totals.closed[flag],
            &[0, 1, 2],
        )?;
        metric(
            "tcp_sent_bytes",
            "Bytes that servers sent in response, over TCP",
            &|totals, _| totals.sent,
            &[0],
        )?;
        metric(
            "tcp_received_bytes",
            "Bytes that servers received, over TCP",
            &|totals, _| totals.received,
            &[0],
        )
    }
}

impl Totals {
    fn since(now: SystemTime) -> Self {
        Self {
            opened: 0,
            closed: [0; FLAGS.len()],
            sent: 0,
            received: 0,
            last: now,
        }
    }

    fn add(&mut self, entry: &Entry, counts: &Counts) {
        let flag = match entry.ending {
            Ending::Established => 0,
            Ending::Denied => 1,
            Ending::Failed => 2,
        };
        self.opened += counts.opened;
        self.closed[flag] += counts.connections;
        self.sent += counts.bytes_to_client;
        self.received += counts.bytes_to_server;
    }
}

impl Labels {
    /// The memory that a set of labels and its totals take, in bytes.
    fn size(&self) -> usize {
        let texts = [
            &self.source_workload,
            &self.source_workload_namespace,
            &self.source_principal,
            &self.source_app,
            &self.source_version,
            &self.source_canonical_service,
            &self.source_canonical_revision,
            &self.source_cluster,
            &self.destination_workload,
            &self.destination_workload_namespace,
            &self.destination_principal,
            &self.destination_app,
            &self.destination_version,
            &self.destination_canonical_service,
            &self.destination_canonical_revision,
            &self.destination_cluster,
            &self.destination_service,
            &self.destination_service_name,
            &self.destination_service_namespace,
        ];
        let texts: usize = texts.into_iter().map(String::heap_size).sum();
        let table = in_table(size_of::<usize>() + size_of::<Totals>());
        table + size_of::<Self>() + BLOCK + texts
    }

    fn of(
        entry: &Entry,
        counts: &Counts,
        snapshot: &Snapshot,
        services: &ByNamespace<'_>,
        cluster: &str,
    ) -> Self {
        let pod = |address| snapshot.pod(address).map(|pod| &**pod);
        // Without TLS, nobody proves who they are, except to the kernel of their own node.
        let proven = |identity: &Option<Identity>| {
            identity.clone().filter(|_| entry.path != Path::Plaintext)
        };
        let server = entry.endpoint.and_then(|at| pod(at.ip()));
        let source = Party::new(pod(entry.client), proven(&entry.identity), cluster);
        let destination = Party::new(server, proven(&entry.server_identity), cluster);
        let dialled = counts
            .service
            .as_deref()
            .and_then(|name| name.split_once('/'));
        let service = match (dialled, server, entry.endpoint) {
            (Some((namespace, name)), _, _) => Some((namespace, name)),
            (None, Some(pod), Some(at)) if entry.direction == Direction::Inbound => {
                let found = services.in_front_of(pod, at.port());
                found.map(|name| (name.namespace.as_str(), name.name.as_str()))
            }
            _ => None,
        };
        let of_service = |text: &dyn Fn(&str, &str) -> String| {
            service.map_or_else(
                || UNKNOWN.to_owned(),
                |(namespace, name)| text(namespace, name),
            )
        };
        Self {
            reporter: match entry.direction {
                Direction::Outbound => "source",
                Direction::Inbound => "destination",
            },
            source_workload: source.workload,
            source_workload_namespace: source.namespace,
            source_principal: source.principal,
            source_app: source.service.clone(),
            source_version: source.revision.clone(),
            source_canonical_service: source.service,
            source_canonical_revision: source.revision,
            source_cluster: source.cluster,
            destination_workload: destination.workload,
            destination_workload_namespace: destination.namespace,
            destination_principal: destination.principal,
            destination_app: destination.service.clone(),
            destination_version: destination.revision.clone(),
            destination_canonical_service: destination.service,
            destination_canonical_revision: destination.revision,
            destination_cluster: destination.cluster,
            destination_service: of_service(&|namespace, name| {
                format!("{name}.{namespace}.{CLUSTER_DOMAIN}")
            }),
            destination_service_name: of_service(&|_, name| name.to_owned()),
            destination_service_namespace: of_service(&|namespace, _| namespace.to_owned()),
            request_protocol: "tcp",
            connection_security_policy: match entry.path {
                // Without either, it failed before both had proven who they are.
                Path::Tunnel | Path::Hbone
                    if entry.identity.is_some() && entry.server_identity.is_some() =>
                {
                    "mutual_tls"
                }
                _ => UNKNOWN,
            },
        }
    }
}

/// What Istio's labels say about one side of a connection.
struct Party {
    workload: String,
    namespace: String,
    principal: String,
    /// The canonical service: a name for the workload's versions together.
    service: String,
    /// The canonical revision.
    revision: String,
    cluster: String,
}

impl Party {
    fn new(pod: Option<&Workload>, identity: Option<Identity>, cluster: &str) -> Self {
        let unknown = || UNKNOWN.to_owned();
        let label = |keys: &[&str]| {
            let labels = pod.map(|pod| &pod.labels)?;
            keys.iter().find_map(|key| labels.get(*key)).cloned()
        };
        let workload = pod.map_or(UNKNOWN, suggest::workload_name).to_owned();
        Self {
            namespace: match (pod, &identity) {
                (Some(pod), _) => pod.name.namespace.clone(),
                (None, Some(identity)) => identity.namespace().to_owned(),
                (None, None) => unknown(),
            },
            principal: identity.map_or_else(unknown, |identity| identity.to_string()),
            service: label(&[
                "service.istio.io/canonical-name",
                "app.kubernetes.io/name",
                "app",
            ])
            .unwrap_or_else(|| workload.clone()),
            revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or_else(|| pod.map_or(UNKNOWN, |_| "latest").to_owned()),
            cluster: pod.map_or(UNKNOWN, |_| cluster).to_owned(),
            workload,
        }
    }
}

/// The Services of the mesh.
struct ByNamespace<'a>(HashMap<&'a str, Vec<&'a Service>>);

impl<'a> ByNamespace<'a> {
    fn of(snapshot: &'a Snapshot) -> Self {
        let mut services: HashMap<_, Vec<_>> = HashMap::new();
        for service in snapshot.services() {
            let namespace = service.name.namespace.as_str();
            services.entry(namespace).or_default().push(&**service);
        }
        Self(services)
    }

    /// The first Service that leads to this port of the pod: a server's side does not learn which one a client dialled.
    fn in_front_of(&self, pod: &Workload, port: u16) -> Option<&'a ObjectName> {
        let mut services = self.0.get(pod.name.namespace.as_str())?.iter();
        let leads_there = |service: &&&Service| {
            let mut ports = service.ports.iter();
            service.selects(pod) && ports.any(|own| own.target.on(pod) == Some(port))
        };
        Some(&services.find(leads_there)?.name)
    }
}

#[cfg(test)]
mod tests {
    use std::{net::SocketAddr, sync::Arc, time::Duration};

    use auth_mesh::{Inventory, Port, TargetPort};
    use prometheus_client::{encoding::text::encode, registry::Registry};

    use super::*;
    use crate::observe::{
        access_log::{Finished, Outcome},
        judgement::Judgement,
        pairs::{Pairs, Progress},
    };

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    fn identity(account: &str) -> Identity {
        format!("spiffe://cluster.local/ns/shop/sa/{account}")
            .parse()
            .unwrap()
    }

    fn pod(pod: &str, address: [u8; 4], labels: &[(&str, &str)]) -> Workload {
        let mut workload = Workload::new(name(pod), identity(pod));
        workload.addresses = vec![address.into()];
        workload.labels = labels
            .iter()
            .map(|(key, value)| ((*key).into(), (*value).into()))
            .collect();
        workload
    }

    /// `cart-1` calls `pay` through a Service of the same name.
    fn mesh() -> Snapshot {
        let mut service = Service::new(name("pay"));
        service.addresses = vec![[10, 96, 0, 1].into()];
        service.selector = [("app".to_owned(), "pay".to_owned())].into();
        service.ports = vec![Port {
            name: String::new(),
            port: 80,
            target: TargetPort::Number(8080),
        }];
        Snapshot::new(Inventory {
            workloads: vec![
                pod("cart-6d-x", [10, 0, 0, 1], &[("pod-template-hash", "6d")]),
                pod("pay", [10, 0, 1, 1], &[("app", "pay"), ("version", "v2")]),
            ],
            services: vec![service],
        })
    }

    fn finished(direction: Direction) -> Finished {
        Finished {
            direction,
            destination: Some(([10, 96, 0, 1], 80).into()),
            endpoint: Some(([10, 0, 1, 1], 8080).into()),
            service: (direction == Direction::Outbound).then(|| Arc::new(name("pay"))),
            client_identity: Some(identity("cart")),
            server_identity: Some(identity("pay")),
            bytes_to_client: 40,
            ..Finished::example()
        }
    }

    /// What Prometheus reads after these connections.
    fn text(connections: impl IntoIterator<Item = Finished>) -> String {
        let (pairs, istio) = (Pairs::default(), IstioMetrics::new("c1"));
        for finished in connections {
            pairs.count(&finished, &mut Progress::default());
        }
        pairs.settle(&mesh(), SystemTime::now(), Some(&istio));
        let mut registry = Registry::default();
        registry
            .sub_registry_with_prefix("istio")
            .register_collector(Box::new(istio));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn both_sides_have_istios_labels() {
        let ends = "source_workload=\"cart\",source_workload_namespace=\"shop\",\
             source_principal=\"spiffe://cluster.local/ns/shop/sa/cart\",source_app=\"cart\",source_version=\"latest\",\
             source_canonical_service=\"cart\",source_canonical_revision=\"latest\",source_cluster=\"c1\",\
             destination_workload=\"pay\",destination_workload_namespace=\"shop\",\
             destination_principal=\"spiffe://cluster.local/ns/shop/sa/pay\",destination_app=\"pay\",\
             destination_version=\"v2\",destination_canonical_service=\"pay\",destination_canonical_revision=\"v2\",\
             destination_cluster=\"c1\",destination_service=\"pay.shop.svc.cluster.local\",\
             destination_service_name=\"pay\",destination_service_namespace=\"shop\",request_protocol=\"tcp\",\
             connection_security_policy=\"mutual_tls\",response_flags=\"-\"";
        for (direction, reporter) in [
            (Direction::Outbound, "source"),
            // The server's side finds the Service by the port that it leads to.
            (Direction::Inbound, "destination"),
        ] {
            let text = text([finished(direction), finished(direction)]);
            for (metric, value) in [
                ("connections_opened", 2),
                ("connections_closed", 2),
                // What the server sent, for both.
                ("sent_bytes", 80),
                ("received_bytes", 6),
            ] {
                let line =
                    format!("istio_tcp_{metric}_total{{reporter=\"{reporter}\",{ends}}} {value}\n");
                assert!(text.contains(&line), "{line} is not in\n{text}");
            }
        }
    }

    #[test]
    fn refusals_have_a_flag_and_plaintext_has_no_principal() {
        let denied = Finished {
            path: Path::Plaintext,
            outcome: Outcome::Refused,
            judgement: Judgement {
                is_denied: true,
                ..Judgement::default()
            },
            client_identity: None,
            ..finished(Direction::Inbound)
        };
        let failed = Finished {
            outcome: Outcome::Refused,
            // Peers write parts of reasons.
            reason: "denied: cannot connect".into(),
            server_identity: None,
            ..finished(Direction::Outbound)
        };
        let text = text([denied, failed]);
        let closed = |flag: &str| {
            let flag = format!("response_flags=\"{flag}\"");
            let mut lines = text.lines();
            lines.find(|line| {
                line.starts_with("istio_tcp_connections_closed")
                    && line.contains(&flag)
                    && line.ends_with(" 1")
            })
        };
        let denied = closed("DENY").unwrap();
        assert!(
            denied.contains("source_principal=\"unknown\",source_app=\"cart\""),
            "{denied}"
        );
        assert!(
            denied.contains("connection_security_policy=\"unknown\""),
            "{denied}"
        );
        let failed = closed("CONNECT").unwrap();
        assert!(
            failed.contains("destination_principal=\"unknown\""),
            "{failed}"
        );
        assert!(
            failed.contains("connection_security_policy=\"unknown\""),
            "{failed}"
        );
        assert!(!text.contains("connections_opened_total{}"));
    }

    #[test]
    fn strangers_share_a_set_and_the_oldest_sets_are_dropped_first() {
        let stranger = |number: u32| Finished {
            client: SocketAddr::new(std::net::Ipv4Addr::from(0xc000_0200 + number).into(), 1),
            client_identity: None,
            path: Path::Plaintext,
            ..finished(Direction::Inbound)
        };
        let text = text((0..50).map(stranger));
        let opened: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("istio_tcp_connections_opened_total"))
            .collect();
        assert!(
            matches!(opened[..], [line] if line.ends_with(" 50")),
            "{opened:?}"
        );

        let (pairs, istio) = (Pairs::default(), IstioMetrics::new("c1"));
        for number in 0..MAX_SETS.entries as u64 + 10 {
            let caller = Finished {
                client_identity: Some(identity(&format!("n{number}"))),
                ..finished(Direction::Inbound)
            };
            pairs.count(&caller, &mut Progress::default());
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(number);
            pairs.settle(&mesh(), now, Some(&istio));
        }
        assert_eq!(istio.dropped(), 10);
        let known = istio.lock();
        assert_eq!(known.sets.len(), MAX_SETS.entries);
        let has = |number: usize| {
            let identity = identity(&format!("n{number}")).to_string();
            known
                .sets
                .keys()
                .any(|labels| labels.source_principal == identity)
        };
        assert!(!has(9) && has(10) && has(MAX_SETS.entries + 9));
    }
}
