//! Connections between two pods of this node. The daemon decides on the first of each kind and carries it; the kernel
//! carries the others by that verdict, for as long as the daemon would decide the same.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use super::{
    Node, Pod,
    access::{Direction, Finished, Outcome, Path},
    residents::{Resident, Residents, allows, permit},
    rules::{ByPod, Refused},
};
use crate::{
    config,
    datapath::{Closing, Ending, Grant, Side},
    mesh::{Identity, ObjectName, Snapshot},
    policy::Connection,
    tunnel::trust::{Revocations, Trust},
};

/// How often the lease is renewed; it holds for a few times that.
const RENEWAL: Duration = Duration::from_secs(1);
/// Verdicts taken back of which connections may still be open: so many are remembered, for their lines in the log.
const REMEMBERED: usize = 16_384;

/// What holds for a client pod and an address, if it can be said once for all connections.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Decision {
    endpoint: SocketAddr,
    server_cookie: u64,
    facts: Facts,
}

/// What the log says of a connection beside its own numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Facts {
    service: Option<ObjectName>,
    client_cookie: u64,
    client: Option<Identity>,
    server_cookie: u64,
    server: Option<Identity>,
    /// From where to where, if that is known.
    route: Option<(IpAddr, SocketAddr)>,
    /// Why this daemon has ended the connections, if it has.
    ended_because: Option<String>,
}

impl Residents {
    /// What can be said of a connection by its ends alone.
    fn facts(&self, client_cookie: u64, server_cookie: u64) -> Facts {
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

/// `None` where the kernel cannot decide alone: no pod of this node, more than one endpoint to choose from, or not
/// permitted.
fn decide(
    snapshot: &Snapshot,
    revoked: &Revocations,
    residents: &Residents,
    rules: &ByPod,
    client_cookie: u64,
    dialled: SocketAddr,
) -> Option<Decision> {
    let destination = snapshot.resolve(dialled).ok()?;
    let [endpoint] = &*destination.endpoints else {
        return None;
    };
    let address = endpoint.address;
    let client = residents.by_cookie.get(&client_cookie)?;
    let server = residents.by_address.get(&address.ip())?;
    let source = client.address_like(address.ip())?;
    if client.cookie == server.cookie {
        return None;
    }
    // A pod that has become another one is not served as that yet.
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

/// The verdicts that hold.
#[derive(Debug)]
pub struct SameNode {
    residents: watch::Sender<Arc<Residents>>,
    /// Them, with their namespaces.
    pods: Mutex<Vec<Arc<Pod>>>,
    /// Held over a decision and what becomes of it in the kernel.
    verdicts: Mutex<Verdicts>,
}

#[derive(Debug)]
struct Verdicts {
    /// Whether they are another daemon's to give and to take back.
    let_go: bool,
    given: HashMap<(u64, SocketAddr), (u64, Decision)>,
    next: u64,
    /// By the verdict's id: of those that hold, and of some that did.
    facts: HashMap<u64, Facts>,
    past: VecDeque<u64>,
    /// What all were last seen to follow from.
    basis: Option<Basis>,
    /// Whether those of a daemon before this one are among them.
    adopted: bool,
}

/// What verdicts follow from.
#[derive(Clone, Debug)]
struct Basis {
    snapshot: Arc<Snapshot>,
    residents: Arc<Residents>,
    trust: Arc<Trust>,
    rules: Arc<ByPod>,
    node_name: String,
}

impl Basis {
    fn of(node: &Node) -> Self {
        Self {
            snapshot: node.registry.snapshot(),
            residents: node.same_node.residents(),
            trust: node.certificates.trust().current(),
            rules: node.rules.current(),
            node_name: node.config.node_name.clone(),
        }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.snapshot, &other.snapshot)
            && Arc::ptr_eq(&self.residents, &other.residents)
            && Arc::ptr_eq(&self.trust, &other.trust)
            && Arc::ptr_eq(&self.rules, &other.rules)
    }

    /// Why a connection by the verdict with these facts may not go on, if so.
    fn forbids(&self, facts: &Facts) -> Option<String> {
        for (cookie, identity) in [
            (facts.client_cookie, &facts.client),
            (facts.server_cookie, &facts.server),
        ] {
            let Some(identity) = identity else {
                return Some("a pod has left this node, or the mesh".into());
            };
            match self.residents.by_cookie.get(&cookie) {
                Some(resident) if resident.identity == *identity => {}
                _ => return Some(format!("{identity} has left this node, or the mesh")),
            }
            let revoked = &self.trust.revoked;
            let checked = revoked.check_identity(identity);
            let checked = checked.and_then(|()| revoked.check_node(&self.node_name));
            if let Err(revoked) = checked {
                return Some(revoked.to_string());
            }
        }
        self.denies(facts).map(|refused| refused.to_string())
    }

    /// What can be said of the connections by a verdict of a daemon before this one.
    fn facts_of(&self, grant: &Grant) -> Facts {
        let client = self.residents.by_cookie.get(&grant.client_cookie);
        let source = client.and_then(|client| client.address_like(grant.endpoint.ip()));
        Facts {
            route: source.map(|source| (source, grant.endpoint)),
            ..self
                .residents
                .facts(grant.client_cookie, grant.server_cookie)
        }
    }

    /// Why the server's policies are against it, if they are.
    fn denies(&self, facts: &Facts) -> Option<Refused> {
        let Some((source, destination)) = facts.route else {
            // Of an earlier daemon's verdict not even the port is known.
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

    fn decide(&self, client_cookie: u64, dialled: SocketAddr) -> Option<Decision> {
        decide(
            &self.snapshot,
            &self.trust.revoked,
            &self.residents,
            &self.rules,
            client_cookie,
            dialled,
        )
    }
}

impl SameNode {
    pub(super) fn new() -> Self {
        let since_boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        let since_boot = since_boot.map_or(0, |time| Duration::from(time).as_nanos());
        Self {
            residents: watch::Sender::default(),
            pods: Mutex::default(),
            verdicts: Mutex::new(Verdicts {
                let_go: false,
                given: HashMap::new(),
                // Above all that a daemon before this one can have come to.
                next: since_boot as u64,
                facts: HashMap::new(),
                past: VecDeque::new(),
                basis: None,
                adopted: false,
            }),
        }
    }

    /// The pods of this node.
    pub(super) fn residents(&self) -> Arc<Residents> {
        self.residents.borrow().clone()
    }

    /// How many verdicts hold.
    pub fn count(&self) -> usize {
        self.lock().given.len()
    }

    /// Returns when `server` is no pod of this node any more, or not the same.
    pub(super) async fn gone(&self, server: &Resident) {
        let is_gone =
            |now: &Arc<Residents>| now.by_cookie.get(&server.cookie).map(|r| &**r) != Some(server);
        if self.residents.subscribe().wait_for(is_gone).await.is_err() {
            // The sender is this value's own.
            std::future::pending().await
        }
    }

    /// The pods of this node are these now.
    pub(super) fn settle(&self, node: &Node, residents: Residents, pods: Vec<Arc<Pod>>) {
        // What those have open that have left is seen from their own namespaces too.
        let before = std::mem::replace(&mut *lock(&self.pods), pods);
        let changed = self.residents.send_if_modified(|now| {
            let changed = **now != residents;
            if changed {
                *now = Arc::new(residents);
            }
            changed
        });
        if changed {
            self.revise(node);
            self.end_forbidden(node, &before);
        }
    }

    /// Ends the connections in the kernel's hands whose pods have left or become others, or are revoked: what the
    /// daemon does with those in its own.
    pub(super) fn end_forbidden(&self, node: &Node, also_in: &[Arc<Pod>]) {
        let basis = Basis::of(node);
        let mut verdicts = self.lock();
        let mut forbidden = HashSet::new();
        for (id, facts) in &mut verdicts.facts {
            if facts.ended_because.is_none()
                && let Some(reason) = basis.forbids(facts)
            {
                facts.ended_because = Some(reason);
                forbidden.insert(*id);
            }
        }
        let known: HashSet<u64> = verdicts.facts.keys().copied().collect();
        let adopted = verdicts.adopted;
        drop(verdicts);
        // Of a verdict that a daemon before this one gave and took back, all that is known is whose pods they are.
        let condition = |verdict, client, server| {
            forbidden.contains(&verdict)
                || adopted
                    && !known.contains(&verdict)
                    && basis
                        .forbids(&basis.residents.facts(client, server))
                        .is_some()
        };
        let mut pods = lock(&self.pods).clone();
        let staying = pods.len();
        pods.extend_from_slice(also_in);
        pods.sort_by_key(|pod| pod.enrolled.netns.cookie());
        pods.dedup_by_key(|pod| pod.enrolled.netns.cookie());
        if forbidden.is_empty()
            && pods.len() == staying
            && basis.trust.revoked.is_empty()
            && basis.rules.is_unrestricted()
        {
            return;
        }
        // By the server's end where there is one: its client is told as by any server that resets it.
        let ends = |side| pods.iter().map(move |pod| (side, pod));
        for (side, pod) in ends(Side::Server).chain(ends(Side::Client)) {
            let netns = &pod.enrolled.netns;
            match node.kernel.same_node.end(netns, side, condition) {
                Ok(0) => {}
                Ok(connections) => tracing::info!(
                    pod = %pod.workload.name, connections, "ended connections between pods of this node"
                ),
                Err(error) => tracing::error!(
                    pod = %pod.workload.name, %error,
                    "cannot end connections between pods of this node that are not allowed any more"
                ),
            }
        }
    }

    /// Takes over the verdicts of a daemon before this one that this one would give too, and takes the others back, with
    /// the connections by them that may not be. Called once, when the pods are served.
    pub(super) fn adopt(&self, node: &Node) {
        let mut verdicts = self.lock();
        let basis = Basis::of(node);
        let mut gone = Vec::new();
        for grant in node.kernel.same_node.granted() {
            let key = (grant.client_cookie, grant.dialled);
            let decision = basis.decide(key.0, key.1).filter(|decision| {
                node.config.same_node == config::SameNode::Kernel
                    && decision.endpoint == grant.endpoint
                    && decision.server_cookie == grant.server_cookie
            });
            match decision {
                Some(decision) => verdicts.insert(key, grant.id, decision),
                None => {
                    gone.push(key);
                    verdicts.facts.insert(grant.id, basis.facts_of(&grant));
                    verdicts.past.push_back(grant.id);
                }
            }
        }
        node.kernel.same_node.withdraw(&gone);
        verdicts.adopted = true;
        drop(verdicts);
        self.end_forbidden(node, &[]);
    }

    /// Leaves the verdicts to another daemon: gives none and takes none back any more.
    pub(super) fn let_go(&self) {
        self.lock().let_go = true;
    }

    /// Lets the kernel carry what the client pod dials there from now on, if that can be said.
    pub(super) fn remember(&self, node: &Node, client_cookie: u64, dialled: SocketAddr) {
        if node.config.same_node == config::SameNode::Tunnel {
            return;
        }
        let mut verdicts = self.lock();
        if verdicts.let_go || verdicts.given.contains_key(&(client_cookie, dialled)) {
            return;
        }
        let Some(decision) = Basis::of(node).decide(client_cookie, dialled) else {
            return;
        };
        let id = verdicts.next;
        verdicts.next += 1;
        let granted = node.kernel.same_node.grant(&Grant {
            client_cookie,
            dialled,
            endpoint: decision.endpoint,
            server_cookie: decision.server_cookie,
            id,
        });
        match granted {
            Ok(()) => verdicts.insert((client_cookie, dialled), id, decision),
            // The daemon carries them, then.
            Err(error) => tracing::debug!(%dialled, %error, "a verdict does not reach the kernel"),
        }
    }

    /// Takes back each verdict that would not be given again. Called after every change of what they follow from.
    pub(super) fn revise(&self, node: &Node) {
        let mut verdicts = self.lock();
        let basis = Basis::of(node);
        if verdicts.let_go {
            return;
        }
        if verdicts.basis.as_ref().is_some_and(|was| was.is(&basis)) {
            return;
        }
        let gone: Vec<_> = verdicts
            .given
            .iter()
            .filter(|((cookie, dialled), (_, decision))| {
                basis.decide(*cookie, *dialled).as_ref() != Some(decision)
            })
            .map(|(key, _)| *key)
            .collect();
        if !gone.is_empty() {
            node.kernel.same_node.withdraw(&gone);
        }
        for key in gone {
            if let Some((id, _)) = verdicts.given.remove(&key) {
                verdicts.past.push_back(id);
            }
        }
        while verdicts.past.len() > REMEMBERED
            && let Some(id) = verdicts.past.pop_front()
        {
            verdicts.facts.remove(&id);
        }
        verdicts.basis = Some(basis);
    }

    fn facts(&self, closing: &Closing) -> Facts {
        if let Some(facts) = self.lock().facts.get(&closing.verdict) {
            return facts.clone();
        }
        // A verdict of a daemon before this one.
        self.residents()
            .facts(closing.client_cookie, closing.server_cookie)
    }

    fn lock(&self) -> MutexGuard<'_, Verdicts> {
        lock(&self.verdicts)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Verdicts {
    fn insert(&mut self, key: (u64, SocketAddr), id: u64, decision: Decision) {
        self.facts.insert(id, decision.facts.clone());
        self.given.insert(key, (id, decision));
    }
}

/// Keeps verdicts true to the registry and their lease alive.
pub(super) async fn keep(node: Arc<Node>) {
    let kernel = &node.kernel.same_node;
    if node.config.same_node == config::SameNode::Tunnel {
        if let Err(error) = kernel.end_lease() {
            tracing::error!(%error, "cannot end the lease of verdicts");
        }
        return;
    }
    let mut changes = node.registry.changes();
    let mut lost = kernel.lost();
    loop {
        changes.borrow_and_update();
        node.same_node.revise(&node);
        if let Err(error) = kernel.renew_lease() {
            tracing::error!(%error, "cannot renew the lease of verdicts; the daemon carries all connections");
        }
        let more = kernel.lost();
        if more > lost {
            tracing::warn!(
                lines = more - lost,
                "connections between pods of this node closed faster than they could be logged"
            );
            lost = more;
        }
        let _ = tokio::time::timeout(RENEWAL, changes.changed()).await;
    }
}

/// Writes a line for each end of a connection that the kernel carried.
pub(super) async fn log_closed(node: Arc<Node>) {
    let log = async {
        let mut events = node.kernel.same_node.closed()?;
        loop {
            events
                .next(|closing| {
                    node.live
                        .log(&line(&closing, node.same_node.facts(&closing)))
                })
                .await?;
        }
    };
    let Err::<std::convert::Infallible, std::io::Error>(error) = log.await;
    tracing::error!(%error, "cannot read how connections between pods of this node close");
}

fn line(closing: &Closing, facts: Facts) -> Finished {
    let (direction, service) = match closing.side {
        Side::Client => (Direction::Outbound, facts.service),
        Side::Server => (Direction::Inbound, None),
    };
    let (outcome, reason) = match closing.ending {
        Ending::InOrder => (Outcome::Ok, ""),
        Ending::Reset => {
            let ours = facts.ended_because.as_deref();
            let theirs = "one of the apps reset it, or it timed out";
            (Outcome::Reset, ours.unwrap_or(theirs))
        }
        Ending::Refused => (Outcome::Refused, "its app refuses the connection"),
        Ending::Unanswered => (Outcome::Refused, "its app does not answer"),
    };
    // That the server's namespace took the connection says who answered.
    let answered = closing.claimed || closing.side == Side::Server;
    Finished {
        direction,
        path: Path::SameNode,
        client: closing.client,
        destination: Some(closing.dialled),
        endpoint: Some(closing.server),
        service,
        client_identity: facts.client,
        server_identity: facts.server.filter(|_| answered),
        bytes_to_server: closing.to_server,
        bytes_to_client: closing.to_client,
        duration: closing.duration,
        outcome,
        reason: reason.to_owned(),
        policy: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mesh::{Inventory, Port, Service, TargetPort, Workload},
        policy::{Denied, Policies},
        proxy::residents::Forbidden,
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

    /// Of pods with cookies from 1, that have no labels.
    fn rules(policies: &Policies) -> ByPod {
        let policy = policies.workload("default", &Default::default());
        (1..10).map(|cookie| (cookie, policy.clone())).collect()
    }

    /// Their cookies count from 1.
    fn residents(pods: &[Workload]) -> Residents {
        let mut residents = Residents::default();
        for (cookie, pod) in (1..).zip(pods) {
            let resident = Arc::new(Resident {
                cookie,
                identity: pod.identity.clone(),
                addresses: pod.addresses.clone(),
            });
            residents.by_cookie.insert(cookie, resident.clone());
            for address in &pod.addresses {
                residents.by_address.insert(*address, resident.clone());
            }
        }
        residents
    }

    const CLIENT: u64 = 1;

    fn decided(workloads: &[Workload], enrolled: &[Workload], dialled: &str) -> Option<Decision> {
        decide(
            &snapshot(workloads.to_vec()),
            &Revocations::default(),
            &residents(enrolled),
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
        assert_eq!(by_service.facts.service, Some(name("web")));
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
        // Two to choose from, of which only one is here.
        let three = [client.clone(), web.clone(), second];
        assert_eq!(decided(&three, &both, "10.96.0.7:80"), None);
        // The pod itself, no port of the service, nobody.
        assert_eq!(decided(&both, &both, "10.1.0.1:8080"), None);
        assert_eq!(decided(&both, &both, "10.96.0.7:81"), None);
        assert_eq!(decided(&both, &both, "10.1.0.9:8080"), None);
        // One of the two has become another since it was enrolled.
        let became = [client.clone(), pod("web", "promoted", "10.1.0.2")];
        assert_eq!(decided(&became, &both, "10.1.0.2:8080"), None);
        let became = [pod("client", "promoted", "10.1.0.1"), web.clone()];
        assert_eq!(decided(&became, &both, "10.1.0.2:8080"), None);
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
        let (snapshot, residents) = (snapshot(pods.to_vec()), residents(&pods));
        let destination = snapshot.resolve("10.1.0.2:80".parse().unwrap()).unwrap();
        let (client, web) = (&residents.by_cookie[&1], &residents.by_cookie[&2]);
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
