//! Connections between two pods of this node. The daemon judges and relays the first connection to a destination. The
//! kernel carries the following ones by that verdict, for as long as the daemon would decide the same.

use std::{
    collections::{HashMap, HashSet, VecDeque, hash_map::Entry},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use auth_common::{MAX_VERDICTS, SHARES};
use tokio::sync::watch;

use super::{
    Node, Pod,
    local_pods::{LocalPod, LocalPods},
    routes::{NotDirect, Pair, Routes},
    verdict::{Basis, Decision, Facts},
};
use crate::{
    config,
    observe::{
        access_log::{Direction, Finished, Outcome, Path},
        judgement::Judgement,
    },
};
use auth_datapath::{
    Closing, Diverted, Ending, Grant, NodeLinks, PodEnd, SharedLink, Side, check_routes,
};

/// Interval at which the lease is renewed. A lease is valid for a few intervals.
const RENEWAL: Duration = Duration::from_secs(1);
/// Maximum number of withdrawn verdicts that are kept for the access log, because their connections may still be open.
const REMEMBERED: usize = 16_384;

/// Maximum number of verdicts on the connections of one client pod. Those beyond stay with the daemon.
const MAX_PER_CLIENT: usize = (MAX_VERDICTS / SHARES) as usize;

/// The verdicts in force.
#[derive(Debug)]
pub struct SameNode {
    local_pods: watch::Sender<Arc<LocalPods>>,
    /// The same pods, with their netns.
    pods: Mutex<Vec<Arc<Pod>>>,
    /// The node's routes between them.
    pub(crate) routes: Arc<Routes>,
    /// Locked from a decision until it is applied in the kernel.
    verdicts: Mutex<Verdicts>,
}

/// Why a connection between two pods of this node must not be carried without TLS.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Exposed {
    /// The link of one of them is not private any more.
    #[error(transparent)]
    Link(#[from] SharedLink),
    /// Packets between them leave their links.
    #[error(transparent)]
    Route(#[from] Diverted),
}

#[derive(Debug)]
struct Verdicts {
    /// Whether another daemon now manages the verdicts.
    released: bool,
    given: HashMap<(u64, SocketAddr), (u64, Decision)>,
    /// Number of them by the client's cookie.
    per_client: HashMap<u64, usize>,
    next: u64,
    /// Facts by verdict id, of the verdicts in force and of some that were withdrawn.
    facts: HashMap<u64, Facts>,
    past: VecDeque<u64>,
    /// The inputs that all verdicts were last checked against.
    basis: Option<Basis>,
    /// Whether the verdicts of a previous daemon have been adopted.
    adopted: bool,
}

impl SameNode {
    pub(crate) fn new() -> Self {
        let since_boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        let since_boot = since_boot.map_or(0, |time| Duration::from(time).as_nanos());
        Self {
            local_pods: watch::Sender::default(),
            pods: Mutex::default(),
            routes: Arc::default(),
            verdicts: Mutex::new(Verdicts {
                released: false,
                given: HashMap::new(),
                per_client: HashMap::new(),
                // Above every id that a previous daemon can have used.
                next: since_boot as u64,
                facts: HashMap::new(),
                past: VecDeque::new(),
                basis: None,
                adopted: false,
            }),
        }
    }

    /// Returns the pods of this node.
    pub(crate) fn local_pods(&self) -> Arc<LocalPods> {
        self.local_pods.borrow().clone()
    }

    /// Returns the number of verdicts in force.
    pub fn count(&self) -> usize {
        self.lock().given.len()
    }

    /// Returns the number of pairs of pods whose connections use TLS because their packets leave the node.
    pub fn count_diverted(&self) -> usize {
        self.routes.count_diverted()
    }

    /// Checks that packets between two pods with private links stay on these links.
    pub(crate) async fn check_route(&self, pair: Pair) -> Result<(), NotDirect> {
        self.routes.check(&self.local_pods(), pair).await
    }

    /// Waits until `server`, which is that of `pair`, has left this node or has changed, until the link of one of the two pods is
    /// not private any more, or until their packets leave these links. Returns why the link or the route ends a connection, if
    /// that is it.
    pub(crate) async fn gone(&self, pair: &Pair, server: &LocalPod) -> Option<String> {
        let shared = |now: &LocalPods| {
            let mut pods = [pair.client, pair.server].into_iter();
            let shared = pods.find_map(|cookie| now.by_cookie.get(&cookie)?.shared_link());
            shared.or_else(|| self.routes.forbids(pair))
        };
        let is_gone = |now: &Arc<LocalPods>| {
            let own = now.by_cookie.get(&server.cookie);
            own.map(|own| &**own) != Some(server) || shared(now).is_some()
        };
        let mut local_pods = self.local_pods.subscribe();
        let gone = local_pods.wait_for(is_gone).await;
        match gone.map(|now| shared(&now)).ok() {
            Some(shared) => shared,
            // Unreachable: `self` owns the sender.
            None => std::future::pending().await,
        }
    }

    /// Replaces the pods of this node.
    pub(crate) fn settle(&self, node: &Node, local_pods: LocalPods, pods: Vec<Arc<Pod>>) {
        // Connections of pods that have left are also found from those pods' own netns.
        let before = std::mem::replace(&mut *lock(&self.pods), pods);
        let mut lost_links = false;
        self.routes.retain(&local_pods);
        let changed = self.local_pods.send_if_modified(|now| {
            let changed = **now != local_pods;
            if changed {
                lost_links = local_pods.have_lost_links(now);
                if local_pods.links != now.links {
                    self.routes.links_changed();
                }
                *now = Arc::new(local_pods);
            }
            changed
        });
        if changed {
            self.revise(node);
            self.end_all_forbidden(node, &before, lost_links);
        }
    }

    /// Applies what has become known of the routes between pods of this node.
    pub(super) fn apply_routes(&self, node: &Node) {
        self.revise(node);
        self.end_all_forbidden(node, &[], true);
        // Wakes those that the daemon carries.
        self.local_pods.send_modify(|_| ());
    }

    /// Counts all pairs of pods as diverted, because the kernel's routes cannot be read.
    pub(super) fn doubt_routes(&self, node: &Node, error: &std::io::Error) {
        if self.routes.doubt(error) {
            self.apply_routes(node);
        }
    }

    /// Ends the connections that the kernel carries and whose pods have left, have changed identity or are revoked, as
    /// the daemon does with those that it carries itself.
    pub(crate) fn end_forbidden(&self, node: &Node) {
        self.end_all_forbidden(node, &[], false);
    }

    /// Likewise. The pods of `also_in` have left; `lost_links` says whether others have links that are not private any more, or
    /// whose packets may leave them.
    fn end_all_forbidden(&self, node: &Node, also_in: &[Arc<Pod>], lost_links: bool) {
        let basis = Basis::of(node);
        let mut verdicts = self.lock();
        // The daemon that manages the verdicts now has newer information.
        if verdicts.released {
            return;
        }
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
        // Only the pods are known of a verdict that a previous daemon granted and withdrew.
        let condition = |verdict, client, server| {
            forbidden.contains(&verdict)
                || adopted
                    && !known.contains(&verdict)
                    && basis
                        .forbids(&basis.local_pods.facts(client, server))
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
            && !lost_links
        {
            return;
        }
        // From the server's end if it exists: the client then sees a RST as from any server.
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

    /// Adopts those verdicts of a previous daemon that this one would grant, too. Withdraws the others, and ends their
    /// connections that are not allowed. Called once, when the pods are served.
    pub(crate) async fn adopt(&self, node: &Node) {
        if node.config.same_node == config::SameNode::Kernel {
            let basis = Basis::of(node);
            let pairs = node.kernel.same_node.granted().into_iter();
            let pairs = pairs.filter_map(|grant| basis.facts_of(&grant).pair());
            let pairs: HashSet<Pair> = pairs.collect();
            let pairs = pairs.into_iter().collect();
            self.routes.check_all(&basis.local_pods, pairs).await;
        }
        self.adopt_checked(node);
    }

    fn adopt_checked(&self, node: &Node) {
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
        let has_shared_links = !basis.local_pods.have_private_links();
        let is_diverted = self.count_diverted() > 0;
        self.end_all_forbidden(node, &[], has_shared_links || is_diverted);
    }

    /// Leaves the verdicts to another daemon. Afterwards this one neither grants nor withdraws any.
    pub(crate) fn release(&self) {
        self.lock().released = true;
    }

    /// Lets the kernel carry the client pod's later connections to `dialled`, if one verdict covers them all. Fails if the
    /// link of either pod is not private any more, or if packets between the two leave these links.
    pub(crate) async fn remember(
        &self,
        node: &Node,
        client_cookie: u64,
        dialled: SocketAddr,
    ) -> Result<(), Exposed> {
        if node.config.same_node == config::SameNode::Tunnel
            || !self.lock().has_room(client_cookie, dialled)
        {
            return Ok(());
        }
        let Some(decision) = Basis::of(node).decide(client_cookie, dialled) else {
            return Ok(());
        };
        let Some(pair) = decision.facts.pair() else {
            return Ok(());
        };
        // The change of a link or of a route may not be reported yet. What changes from here on withdraws the verdict.
        match self.check_now(pair).await {
            Ok(()) => {}
            Err(Exposed::Link(error @ SharedLink::Unreadable(_))) => {
                tracing::debug!(%dialled, %error, "no verdict");
                return Ok(());
            }
            Err(exposed) => return Err(exposed),
        }
        let mut verdicts = self.lock();
        let again = Basis::of(node).decide(client_cookie, dialled);
        let again = again.filter(|again| again.server_cookie == decision.server_cookie);
        let Some(decision) = again.filter(|_| verdicts.has_room(client_cookie, dialled)) else {
            return Ok(());
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
            // The daemon continues to carry them.
            Err(error) => tracing::debug!(%dialled, %error, "a verdict does not reach the kernel"),
        }
        Ok(())
    }

    /// Withdraws each verdict that would not be granted again. Called after every change of the verdicts' inputs.
    pub(crate) fn revise(&self, node: &Node) {
        let mut verdicts = self.lock();
        let basis = Basis::of(node);
        if verdicts.released {
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
            if let Some(id) = verdicts.remove(&key) {
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

    /// Checks that at this moment the links of both pods are private, and that packets between the two stay on them. Not on the
    /// caller's thread: the kernel may take milliseconds to list a node's interfaces.
    async fn check_now(&self, pair: Pair) -> Result<(), Exposed> {
        let pods = lock(&self.pods).clone();
        let check = move || -> Result<(), Exposed> {
            let node = NodeLinks::list().map_err(SharedLink::from)?;
            let end = |cookie, address| {
                let mut pods = pods.iter().map(|pod| &pod.enrolled);
                let pod = pods.find(|pod| pod.netns.cookie() == cookie);
                let pod = pod.ok_or(SharedLink::NoInterface)?;
                node.check(&pod.netns, pod.addresses())?;
                let links = node.indices(&pod.netns)?;
                Ok::<_, SharedLink>(PodEnd { links, address })
            };
            let client = end(pair.client, pair.source)?;
            let server = end(pair.server, pair.address)?;
            let routes = check_routes([(&client, &server)]).map_err(SharedLink::from)?;
            Ok(routes.into_iter().collect::<Result<(), Diverted>>()?)
        };
        let checked = tokio::task::spawn_blocking(check).await;
        checked.unwrap_or_else(|error| Err(SharedLink::Unreadable(error.to_string()).into()))
    }

    fn facts(&self, closing: &Closing) -> Facts {
        if let Some(facts) = self.lock().facts.get(&closing.verdict) {
            return facts.clone();
        }
        // A verdict of a previous daemon.
        self.local_pods()
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
        if self.given.insert(key, (id, decision)).is_none() {
            *self.per_client.entry(key.0).or_default() += 1;
        }
    }

    /// Returns the id of the verdict.
    fn remove(&mut self, key: &(u64, SocketAddr)) -> Option<u64> {
        let (id, _) = self.given.remove(key)?;
        if let Entry::Occupied(mut count) = self.per_client.entry(key.0) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        Some(id)
    }

    /// Whether a verdict on connections from the netns with `cookie` to `dialled` may be added.
    fn has_room(&self, cookie: u64, dialled: SocketAddr) -> bool {
        let given = self.per_client.get(&cookie).copied().unwrap_or(0);
        !self.released && !self.given.contains_key(&(cookie, dialled)) && given < MAX_PER_CLIENT
    }
}

/// Revises the verdicts when the registry changes, and renews their lease.
pub(crate) async fn keep(node: Arc<Node>) {
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

/// Writes an access log line for each end of a connection that the kernel carried.
pub(crate) async fn log_closed(node: Arc<Node>) {
    let log = async {
        let mut events = node.kernel.same_node.closed()?;
        loop {
            events
                .next(|closing| {
                    node.connections
                        .log(line(&closing, node.same_node.facts(&closing)))
                })
                .await?;
        }
    };
    let Err::<std::convert::Infallible, std::io::Error>(error) = log.await;
    tracing::error!(%error, "cannot read how connections between pods of this node close");
}

fn line(closing: &Closing, facts: Facts) -> Finished {
    let (direction, pod, service) = match closing.side {
        Side::Client => (Direction::Outbound, closing.client_cookie, facts.service),
        Side::Server => (Direction::Inbound, closing.server_cookie, None),
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
    // The server is known only if its netns accepted the connection.
    let answered = closing.claimed || closing.side == Side::Server;
    Finished {
        pod,
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
        judgement: Judgement::default(),
        client_person: None,
    }
}
