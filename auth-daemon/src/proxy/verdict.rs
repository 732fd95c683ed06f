//! Decides whether the kernel alone may carry the connections of a pod to an address of this node, and whether it still
//! may.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    Node,
    local_pods::{LocalPods, allows, permit},
    routes::{Pair, Routes},
    rules::{ByPod, Refused},
};
use auth_datapath::Grant;
use auth_mesh::{Identity, ObjectName, Snapshot, policy::Connection};
use auth_tunnel::tls::trust::{Revocations, Trust};

/// A decision that covers all connections of a client pod to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) endpoint: SocketAddr,
    pub(super) server_cookie: u64,
    pub(super) facts: Facts,
}

/// Details of a connection for the access log, besides its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) service: Option<Arc<ObjectName>>,
    pub(super) client_cookie: u64,
    pub(super) client: Option<Identity>,
    pub(super) server_cookie: u64,
    pub(super) server: Option<Identity>,
    /// Source and destination, if known.
    pub(super) route: Option<(IpAddr, SocketAddr)>,
    /// Why this daemon ended the connections, if it did.
    pub(super) ended_because: Option<String>,
}

impl Facts {
    /// The two pods, if their addresses are known.
    pub(super) fn pair(&self) -> Option<Pair> {
        let (source, destination) = self.route?;
        Some(Pair {
            client: self.client_cookie,
            server: self.server_cookie,
            source,
            address: destination.ip(),
        })
    }
}

impl LocalPods {
    /// Returns what is known about a connection from its two netns alone.
    pub(super) fn facts(&self, client_cookie: u64, server_cookie: u64) -> Facts {
        let identity = |cookie| Some(self.by_cookie.get(&cookie)?.identity.clone());
        Facts {
            service: None,
            client_cookie,
            client: identity(client_cookie),
            server_cookie,
            server: identity(server_cookie),
            route: None,
            ended_because: None,
        }
    }
}

/// Returns `None` if the kernel cannot decide alone: the server is no pod of this node, one of the two has no private link,
/// there is more than one endpoint, or the connection is not permitted.
fn decide(
    snapshot: &Snapshot,
    revoked: &Revocations,
    local_pods: &LocalPods,
    rules: &ByPod,
    client_cookie: u64,
    dialled: SocketAddr,
) -> Option<Decision> {
    let destination = snapshot.resolve(dialled).ok()?;
    let [endpoint] = &*destination.endpoints else {
        return None;
    };
    if destination.waypoint.is_some() {
        return None;
    }
    let address = endpoint.address;
    let client = local_pods.by_cookie.get(&client_cookie)?;
    let server = local_pods.by_address.get(&address.ip())?;
    let source = client.address_like(address.ip())?;
    if client.cookie == server.cookie || !client.has_private_link || !server.has_private_link {
        return None;
    }
    // A pod that has changed is not served with its new identity yet.
    let endpoint = endpoint.workload.as_ref()?;
    let is_current =
        endpoint.identity == server.identity && snapshot.pod(source)?.identity == client.identity;
    if !is_current
        || permit(
            snapshot,
            revoked,
            client,
            source,
            source,
            &destination,
            server,
        )
        .is_err()
        || !allows(rules, &client.identity, source, server.cookie, address)
    {
        return None;
    }
    Some(Decision {
        endpoint: address,
        server_cookie: server.cookie,
        facts: Facts {
            service: destination.service,
            client_cookie: client.cookie,
            client: Some(client.identity.clone()),
            server_cookie: server.cookie,
            server: Some(server.identity.clone()),
            route: Some((source, address)),
            ended_because: None,
        },
    })
}

/// The inputs of verdicts.
#[derive(Clone, Debug)]
pub(super) struct Basis {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) local_pods: Arc<LocalPods>,
    pub(super) trust: Arc<Trust>,
    pub(super) rules: Arc<ByPod>,
    pub(super) node_name: String,
    pub(super) routes: Arc<Routes>,
    /// The version of the routes that decisions are made by, at least.
    routes_version: u64,
}

impl Basis {
    pub(super) fn of(node: &Node) -> Self {
        Self {
            snapshot: node.registry.snapshot(),
            local_pods: node.same_node.local_pods(),
            trust: node.certificates.trust().current(),
            rules: node.rules.current(),
            node_name: node.config.node_name.clone(),
            routes: node.same_node.routes.clone(),
            routes_version: node.same_node.routes.version(),
        }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.snapshot, &other.snapshot)
            && Arc::ptr_eq(&self.local_pods, &other.local_pods)
            && Arc::ptr_eq(&self.trust, &other.trust)
            && Arc::ptr_eq(&self.rules, &other.rules)
            && self.routes_version == other.routes_version
    }

    /// Returns why a connection with these facts may not continue, or `None` if it may.
    pub(super) fn forbids(&self, facts: &Facts) -> Option<String> {
        for (cookie, identity) in [
            (facts.client_cookie, &facts.client),
            (facts.server_cookie, &facts.server),
        ] {
            let Some(identity) = identity else {
                return Some("a pod has left this node, or the mesh".into());
            };
            match self.local_pods.by_cookie.get(&cookie) {
                Some(local_pod) if local_pod.identity == *identity => {
                    if let Some(shared) = local_pod.shared_link() {
                        return Some(shared);
                    }
                }
                _ => return Some(format!("{identity} has left this node, or the mesh")),
            }
            let revoked = &self.trust.revoked;
            let checked = revoked.check_identity(identity);
            let checked = checked.and_then(|()| revoked.check_node(&self.node_name));
            if let Err(revoked) = checked {
                return Some(revoked.to_string());
            }
        }
        let diverted = facts.pair().and_then(|pair| self.routes.forbids(&pair));
        diverted.or_else(|| Some(self.denies(facts)?.to_string()))
    }

    /// Returns what is known about the connections of a previous daemon's verdict.
    pub(super) fn facts_of(&self, grant: &Grant) -> Facts {
        let client = self.local_pods.by_cookie.get(&grant.client_cookie);
        let source = client.and_then(|client| client.address_like(grant.endpoint.ip()));
        Facts {
            route: source.map(|source| (source, grant.endpoint)),
            ..self
                .local_pods
                .facts(grant.client_cookie, grant.server_cookie)
        }
    }

    /// Returns why the server's policies deny the connection, or `None` if they do not.
    pub(super) fn denies(&self, facts: &Facts) -> Option<Refused> {
        let Some((source, destination)) = facts.route else {
            // The port of a previous daemon's verdict is not known.
            let policy = self.rules.of(facts.server_cookie);
            return match policy {
                Ok(policy) if policy.is_unrestricted() => None,
                Ok(_) => Some(Refused("policies have changed since it began".into())),
                Err(refused) => Some(refused),
            };
        };
        let connection = Connection {
            client: facts.client.as_ref(),
            source,
            destination,
        };
        match self.rules.verdict(facts.server_cookie, &connection) {
            Ok(verdict) if verdict.allowed() => None,
            Ok(verdict) => Some(Refused(verdict.decision.to_string())),
            Err(refused) => Some(refused),
        }
    }

    /// Decides whether the kernel alone may carry connections from the netns with `client_cookie` to `dialled`. It may if their
    /// packets are known to stay on the pods' links.
    pub(super) fn decide(&self, client_cookie: u64, dialled: SocketAddr) -> Option<Decision> {
        let decision = decide(
            &self.snapshot,
            &self.trust.revoked,
            &self.local_pods,
            &self.rules,
            client_cookie,
            dialled,
        )?;
        let pair = decision.facts.pair()?;
        self.routes.is_direct(&pair).then_some(decision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{proxy::caller::Denied, proxy::local_pods::Forbidden, proxy::local_pods::LocalPod};
    use auth_mesh::{
        Inventory, Port, Service, TargetPort, Waypoint, WaypointAt, Workload, policy::Policies,
    };

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn pod(pod: &str, account: &str, address: &str) -> Workload {
        Workload {
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            labels: [("app".to_owned(), account.to_owned())].into(),
            ..Workload::new(
                name(pod),
                format!("spiffe://a/ns/default/sa/{account}")
                    .parse()
                    .unwrap(),
            )
        }
    }

    fn service() -> Service {
        Service {
            addresses: vec!["10.96.0.7".parse().unwrap()],
            ports: vec![Port {
                name: String::new(),
                port: 80,
                target: TargetPort::Number(8080),
            }],
            selector: [("app".to_owned(), "web".to_owned())].into(),
            ..Service::new(name("web"))
        }
    }

    fn snapshot(workloads: Vec<Workload>) -> Snapshot {
        Snapshot::new(Inventory {
            workloads,
            services: vec![service()],
        })
    }

    /// Policies of pods without labels, whose cookies count from 1.
    fn rules(policies: &Policies) -> ByPod {
        let policy = policies.workload("default", &Default::default());
        (1..10).map(|cookie| (cookie, policy.clone())).collect()
    }

    /// Local pods whose cookies count from 1. Those called "bridged" have no private link.
    fn local_pods(pods: &[Workload]) -> LocalPods {
        let mut local_pods = LocalPods::default();
        for (cookie, pod) in (1..).zip(pods) {
            let local_pod = Arc::new(LocalPod {
                cookie,
                identity: pod.identity.clone(),
                addresses: pod.addresses.clone(),
                has_private_link: pod.name.name != "bridged",
            });
            local_pods.by_cookie.insert(cookie, local_pod.clone());
            for address in &pod.addresses {
                local_pods.by_address.insert(*address, local_pod.clone());
            }
        }
        local_pods
    }

    const CLIENT: u64 = 1;

    fn decided(workloads: &[Workload], enrolled: &[Workload], dialled: &str) -> Option<Decision> {
        decide(
            &snapshot(workloads.to_vec()),
            &Revocations::default(),
            &local_pods(enrolled),
            &rules(&Policies::default()),
            CLIENT,
            dialled.parse().unwrap(),
        )
    }

    #[test]
    fn a_pod_of_the_node_is_decided_on_by_its_address_and_by_its_services() {
        let pods = [
            pod("client", "client", "10.1.0.1"),
            pod("web", "web", "10.1.0.2"),
        ];
        let by_address = decided(&pods, &pods, "10.1.0.2:8080").unwrap();
        assert_eq!(by_address.server_cookie, 2);
        assert_eq!(by_address.facts.service, None);
        let by_service = decided(&pods, &pods, "10.96.0.7:80").unwrap();
        assert_eq!(by_service.endpoint, "10.1.0.2:8080".parse().unwrap());
        assert_eq!(by_service.facts.service, Some(Arc::new(name("web"))));
        assert_eq!(by_service.facts.server, Some(pods[1].identity.clone()));
        assert_eq!(by_service.facts.client, Some(pods[0].identity.clone()));
    }

    #[test]
    fn the_kernel_alone_decides_nothing_else() {
        let (client, web) = (
            pod("client", "client", "10.1.0.1"),
            pod("web", "web", "10.1.0.2"),
        );
        let second = pod("second", "web", "10.1.0.3");
        let both = [client.clone(), web.clone()];
        // The other pod is not enrolled here, or the client is not.
        assert_eq!(decided(&both, &both[..1], "10.1.0.2:8080"), None);
        assert_eq!(decided(&both, &[], "10.1.0.2:8080"), None);
        // Two endpoints, of which only one is on this node.
        let three = [client.clone(), web.clone(), second];
        assert_eq!(decided(&three, &both, "10.96.0.7:80"), None);
        // The pod itself, a port that the service does not have, and an unknown address.
        assert_eq!(decided(&both, &both, "10.1.0.1:8080"), None);
        assert_eq!(decided(&both, &both, "10.96.0.7:81"), None);
        assert_eq!(decided(&both, &both, "10.1.0.9:8080"), None);
        // One of the pods has changed its identity since it was enrolled.
        let became = [client.clone(), pod("web", "promoted", "10.1.0.2")];
        assert_eq!(decided(&became, &both, "10.1.0.2:8080"), None);
        let became = [pod("client", "promoted", "10.1.0.1"), web.clone()];
        assert_eq!(decided(&became, &both, "10.1.0.2:8080"), None);
        // One of the two has no private link.
        let server = [client.clone(), pod("bridged", "web", "10.1.0.2")];
        assert_eq!(decided(&server, &server, "10.1.0.2:8080"), None);
        assert_eq!(decided(&server, &server, "10.96.0.7:80"), None);
        let caller = [pod("bridged", "client", "10.1.0.1"), web.clone()];
        assert_eq!(decided(&caller, &caller, "10.1.0.2:8080"), None);
        // The server's traffic goes through a waypoint.
        let waypoint = Waypoint {
            at: WaypointAt::Address("10.1.0.4".parse().unwrap()),
            port: 15008,
        };
        let behind = Workload {
            waypoint: Some(Arc::new(waypoint)),
            ..web.clone()
        };
        assert_eq!(
            decided(&[client.clone(), behind], &both, "10.1.0.2:8080"),
            None
        );
        // Another pod claims the client's address.
        let disputed = [client, web, pod("thief", "thief", "10.1.0.1")];
        assert_eq!(decided(&disputed, &both, "10.1.0.2:8080"), None);
    }

    #[test]
    fn naming_and_addresses_are_asked_for() {
        let pods = [
            pod("client", "client", "10.1.0.1"),
            pod("web", "web", "10.1.0.2"),
        ];
        let (snapshot, local_pods) = (snapshot(pods.to_vec()), local_pods(&pods));
        let destination = snapshot.resolve("10.1.0.2:80".parse().unwrap()).unwrap();
        let (client, web) = (&local_pods.by_cookie[&1], &local_pods.by_cookie[&2]);
        let own = client.addresses[0];
        let ask = |claimed, server| {
            let nothing = Revocations::default();
            permit(
                &snapshot,
                &nothing,
                client,
                own,
                claimed,
                &destination,
                server,
            )
        };
        assert_eq!(ask(own, web), Ok(()));
        let wrong = ask(own, client).unwrap_err().to_string();
        assert_eq!(
            wrong,
            "secure naming: it is spiffe://a/ns/default/sa/client, but may only be spiffe://a/ns/default/sa/web"
        );
        let forged = ask(web.addresses[0], web).unwrap_err();
        assert!(matches!(
            forged,
            Forbidden::Client(Denied::ClaimedAddress { .. })
        ));
    }
}
