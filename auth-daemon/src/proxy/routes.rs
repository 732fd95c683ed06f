//! Whether packets between two pods of this node stay on their links. What the kernel answered for a pair of pods holds until it
//! reports a change of routes; then it is asked again, about all pairs that the change may concern.

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use auth_datapath::{Diverted, PodEnd, RouteChanges, RouteWatch, check_routes};
use tokio::{sync::Notify, time::sleep};

use super::{Node, local_pods::LocalPods};
use crate::config::SameNode;

/// Minimum time from one reading of reports to the next.
const PAUSE: Duration = Duration::from_millis(100);
/// Pause after pairs were checked again, as a multiple of the time that it took.
const IDLE: u32 = 9;
/// Pause before what failed is retried.
const RETRY: Duration = Duration::from_secs(1);
/// Maximum number of successive times that pairs may keep what they have although the kernel cannot be asked.
const MAX_FAILURES: u32 = 3;
/// Maximum number of times that a pair is checked for one connection because routes change meanwhile.
const MAX_CHECKS: usize = 3;

/// Two pods of this node, and the addresses that they use with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pair {
    /// Netns cookie of the client's pod.
    pub(crate) client: u64,
    /// Netns cookie of the server's pod.
    pub(crate) server: u64,
    /// The client's address.
    pub(crate) source: IpAddr,
    /// The server's address.
    pub(crate) address: IpAddr,
}

impl Pair {
    /// Both ends, if both pods are on this node and have these addresses.
    fn ends(&self, local_pods: &LocalPods) -> Option<[PodEnd; 2]> {
        let end = |cookie, address| {
            let pod = local_pods.by_cookie.get(&cookie)?;
            let links = local_pods.links.get(&cookie)?.clone();
            let is_own = pod.addresses.contains(&address);
            is_own.then_some(PodEnd { links, address })
        };
        Some([
            end(self.client, self.source)?,
            end(self.server, self.address)?,
        ])
    }
}

/// Why connections between two pods of this node use the tunnel although both have private links.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum NotDirect {
    /// Their packets do not stay on their links.
    #[error(transparent)]
    Diverted(Arc<Diverted>),
    /// The kernel cannot tell.
    #[error("the node's routes are not known: {0}")]
    Unknown(String),
}

impl From<io::Error> for NotDirect {
    fn from(error: io::Error) -> Self {
        Self::Unknown(error.to_string())
    }
}

/// What is known of the routes between pods of this node.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    state: Mutex<State>,
    /// Held while pairs of new connections are checked, so that connections that begin together are checked once.
    turn: tokio::sync::Mutex<()>,
    /// Notified when the pods' links have changed.
    links_changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Whether changes of routes are reported. Nothing is known otherwise.
    is_watched: bool,
    /// How often pairs were checked again.
    rounds: u64,
    /// How often what is known of a pair has changed.
    version: u64,
    known: HashMap<Pair, Result<(), Arc<Diverted>>>,
}

impl Routes {
    /// Whether packets of the pair are known to stay on the pods' links.
    pub(crate) fn is_direct(&self, pair: &Pair) -> bool {
        matches!(self.lock().known.get(pair), Some(Ok(())))
    }

    /// Why connections of the pair without TLS end, if its packets are known to leave the pods' links.
    pub(super) fn forbids(&self, pair: &Pair) -> Option<String> {
        let diverted = self.lock().known.get(pair)?.as_ref().err().cloned();
        diverted.map(|reason| {
            format!(
                "packets between the two pods may leave the node: {reason}; new connections use TLS"
            )
        })
    }

    /// Number of the pairs that are known to be diverted.
    pub(super) fn count_diverted(&self) -> usize {
        let state = self.lock();
        state.known.values().filter(|known| known.is_err()).count()
    }

    /// How often what is known of a pair has changed.
    pub(super) fn version(&self) -> u64 {
        self.lock().version
    }

    /// Checks the pair if nothing is known of it. The kernel is asked on another thread.
    pub(super) async fn check(&self, local_pods: &LocalPods, pair: Pair) -> Result<(), NotDirect> {
        if let Some(known) = self.known(&pair) {
            return known;
        }
        let _turn = self.turn.lock().await;
        for _ in 0..MAX_CHECKS {
            if let Some(known) = self.known(&pair) {
                return known;
            }
            let round = self.round().ok_or_else(unwatched)?;
            let unknown = || NotDirect::Unknown("one of the pods has left the node".into());
            let ends = pair.ends(local_pods).ok_or_else(unknown)?;
            let checked = ask(vec![ends]).await?;
            if let Some(result) = checked.into_iter().next() {
                self.learn(pair, result, round);
            }
        }
        let late = "they change faster than they can be read";
        self.known(&pair)
            .unwrap_or_else(|| Err(NotDirect::Unknown(late.into())))
    }

    /// Checks those pairs of which nothing is known.
    pub(super) async fn check_all(&self, local_pods: &LocalPods, mut pairs: Vec<Pair>) {
        for _ in 0..MAX_CHECKS {
            pairs.retain(|pair| self.known(pair).is_none());
            let Some(round) = self.round().filter(|_| !pairs.is_empty()) else {
                return;
            };
            let (pairs, ends) = with_ends(local_pods, pairs.iter().copied());
            match ask(ends).await {
                Ok(checked) => {
                    for (pair, result) in pairs.into_iter().zip(checked) {
                        self.learn(pair, result, round);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot check the routes between pods of this node");
                }
            }
        }
    }

    /// Forgets pairs of pods that have left, or whose addresses have changed.
    pub(super) fn retain(&self, local_pods: &LocalPods) {
        let is_kept = |pair: &Pair| pair.ends(local_pods).is_some();
        self.lock().known.retain(|pair, _| is_kept(pair));
    }

    /// Makes all pairs be checked again, because the pods' links have changed.
    pub(super) fn links_changed(&self) {
        self.links_changed.notify_one();
    }

    fn known(&self, pair: &Pair) -> Option<Result<(), NotDirect>> {
        let known = self.lock().known.get(pair)?.clone();
        Some(known.map_err(NotDirect::Diverted))
    }

    /// The number of the current round. `None` if changes are not reported.
    fn round(&self) -> Option<u64> {
        let state = self.lock();
        state.is_watched.then_some(state.rounds)
    }

    /// Remembers what was found, unless routes have changed since `round`.
    fn learn(&self, pair: Pair, result: Result<(), Diverted>, round: u64) {
        let mut state = self.lock();
        if !state.is_watched || state.rounds != round {
            return;
        }
        if let Err(diverted) = &result {
            let is_first = !state.known.values().any(Result::is_err);
            if is_first {
                tracing::info!(
                    reason = %diverted,
                    "packets between two pods of this node may leave it; their connections use TLS"
                );
            } else {
                tracing::debug!(reason = %diverted, "connections between two pods of this node use TLS");
            }
        }
        state.known.insert(pair, result.map_err(Arc::new));
    }

    /// Begins to check again the pairs that `changes` may concern, and returns them.
    fn begin_round(&self, changes: &RouteChanges) -> Vec<Pair> {
        let mut state = self.lock();
        state.rounds += 1;
        let pairs = state.known.keys();
        let concerned =
            |pair: &&Pair| changes.concern(pair.source) || changes.concern(pair.address);
        pairs.filter(concerned).copied().collect()
    }

    /// Changes what is known of pairs. Returns whether it is something else than before.
    fn change(&self, pairs: impl IntoIterator<Item = (Pair, Result<(), Diverted>)>) -> bool {
        let mut state = self.lock();
        let (mut is_changed, mut diverted) = (false, Vec::new());
        for (pair, result) in pairs {
            if let Some(known) = state.known.get_mut(&pair)
                && known.as_ref().map_err(|known| &**known) != result.as_ref()
            {
                *known = result.map_err(Arc::new);
                diverted.extend(known.as_ref().err().cloned());
                is_changed = true;
            }
        }
        state.version += u64::from(is_changed);
        if let Some(reason) = diverted.first() {
            tracing::warn!(
                pairs = diverted.len(), %reason,
                "packets between pods of this node may leave it from now on; their connections use TLS"
            );
        }
        is_changed
    }

    /// Opens a watch of changes. What is learned from now on holds until [`keep`], which takes the watch, reads of a change.
    /// Must be called within the control plane's runtime.
    pub(crate) fn watch(&self) -> io::Result<RouteWatch> {
        let watch = RouteWatch::open()?;
        self.lock().is_watched = true;
        Ok(watch)
    }

    /// Counts all pairs as diverted, because the kernel cannot be asked. Returns whether that is a change.
    pub(super) fn doubt(&self, error: &io::Error) -> bool {
        let pairs = self.begin_round(&RouteChanges::all());
        let unread = |pair: Pair| Diverted::Unread {
            from: pair.source,
            to: pair.address,
            why: error.to_string(),
        };
        self.change(pairs.into_iter().map(|pair| (pair, Err(unread(pair)))))
    }

    fn unwatch(&self) {
        self.lock().is_watched = false;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unwatched() -> NotDirect {
    NotDirect::Unknown("their changes are not reported".into())
}

/// Pairs with their ends, without those of pods that have left the node.
fn with_ends(
    local_pods: &LocalPods,
    pairs: impl Iterator<Item = Pair>,
) -> (Vec<Pair>, Vec<[PodEnd; 2]>) {
    pairs
        .filter_map(|pair| Some((pair, pair.ends(local_pods)?)))
        .unzip()
}

/// Asks the kernel about pairs of pods, on a thread that may block.
async fn ask(pairs: Vec<[PodEnd; 2]>) -> io::Result<Vec<Result<(), Diverted>>> {
    let check = move || check_routes(pairs.iter().map(|[one, other]| (one, other)));
    let checked = tokio::task::spawn_blocking(check).await;
    checked.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Checks pairs again when routes change, and withdraws the verdicts and ends the connections of those that are diverted. What
/// reports cost is bounded, however many there are: some of them a pod can cause.
pub(crate) async fn keep(node: Arc<Node>, watch: io::Result<RouteWatch>) {
    if node.config.same_node == SameNode::Tunnel {
        return;
    }
    let routes = &*node.same_node.routes;
    let mut watch = Some(watch);
    let mut failures = 0;
    // What has changed since pairs were last checked.
    let mut changes = RouteChanges::default();
    loop {
        let opened = watch.take().unwrap_or_else(|| routes.watch());
        let failed = match opened {
            Ok(mut reports) => loop {
                if changes.is_empty() {
                    let news = tokio::select! {
                        news = reports.changed() => news,
                        () = routes.links_changed.notified() => Ok(RouteChanges::all()),
                    };
                    match news {
                        Ok(news) => changes.add(news),
                        Err(error) => break error,
                    }
                }
                let began = Instant::now();
                if let Err(error) = check_again(&node, &changes).await {
                    watch = Some(Ok(reports));
                    break error;
                }
                changes = RouteChanges::default();
                failures = 0;
                sleep(PAUSE.max(began.elapsed() * IDLE)).await;
            },
            Err(error) => error,
        };
        if watch.is_none() {
            routes.unwatch();
            changes = RouteChanges::all();
        }
        failures += 1;
        if failures > MAX_FAILURES {
            node.same_node.doubt_routes(&node, &failed);
        }
        tracing::warn!(error = %failed, "cannot read the node's routes; retrying");
        sleep(RETRY).await;
    }
}

/// Checks those pairs again that `changes` concern.
async fn check_again(node: &Node, changes: &RouteChanges) -> io::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let (same_node, routes) = (&node.same_node, &node.same_node.routes);
    let pairs = routes.begin_round(changes);
    let (pairs, ends) = with_ends(&same_node.local_pods(), pairs.into_iter());
    if pairs.is_empty() {
        return Ok(());
    }
    let checked = ask(ends).await?;
    if routes.change(pairs.into_iter().zip(checked)) {
        same_node.apply_routes(node);
    }
    Ok(())
}
