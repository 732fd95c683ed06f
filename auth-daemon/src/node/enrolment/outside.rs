//! Pods that are not in the mesh. The kernel keeps the netns of a pod closed until it is enrolled, or known to be
//! outside the mesh: inbound connections from other netns wait, and outbound ones to the mesh are refused. This decides
//! which are outside.
//!
//! A pod outside the mesh waits until its object is known and a census has found its netns: normally some milliseconds from
//! its first socket, as the kernel reports it, and mostly none, because its sandbox is found before its app starts. Without a
//! daemon it waits until there is one again. A netns that a pod has created within its own waits for a second longer, so that
//! one that the runtime prepares for another pod is not taken for it.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use super::{Enrolment, LATE};
use crate::proxy::Node;
use auth_datapath::{Census, Netns, Pauses, PodNetns, PodUid};
use auth_mesh::Snapshot;

/// How long a netns must have been there to count as created by the pod whose processes are in it.
const NESTED: Duration = Duration::from_secs(1);
/// Maximum number of such netns for each pod.
const MAX_NESTED: usize = 64;
/// Time for which a netns without processes stays open: a container may be about to start in it.
const EMPTY: Duration = Duration::from_secs(60);

/// The netns that are open, and what is known of the others.
#[derive(Default)]
pub(super) struct OutsidePods {
    /// When each open netns was last seen to be outside the mesh, by cookie.
    open: HashMap<u64, Instant>,
    closed: HashMap<u64, Closed>,
    /// The pods outside the mesh whose netns is not known.
    missing: HashSet<PodUid>,
    pauses: Pauses,
    census: Option<JoinHandle<Census>>,
    /// The netns of the last census. `None` if it has failed, or there was none yet.
    last: Option<Vec<PodNetns>>,
    /// See [`Census::has_cgroups`].
    has_cgroups: bool,
    /// See [`Census::is_partial`].
    is_partial: bool,
    /// Whether a pod has created a socket in a closed netns since the last census began.
    is_reported: bool,
    /// Whether the kernel closes what is not open.
    is_in_force: bool,
}

/// A netns that is neither enrolled nor outside the mesh.
struct Closed {
    since: Instant,
    is_logged: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Outside,
    /// Served in its own netns.
    Served,
    /// Its own netns is the node's.
    HostNetwork,
}

/// The verdict on a netns.
enum Verdict {
    Outside,
    /// Outside, if it has been there for long enough: a pod with a verdict has created it.
    Nested(PodUid),
    /// A pod's own that is in the mesh, or not known yet.
    Closed,
}

impl OutsidePods {
    /// Takes a census.
    pub(super) async fn look(&mut self, node: &Arc<Node>) {
        self.begin(node);
        let done = finished(&mut self.census).await;
        self.take(done);
    }

    /// Takes censuses when they are due, and returns when one has brought news. Cancel-safe.
    pub(super) async fn changed(&mut self, node: &Arc<Node>) {
        loop {
            let due = self.due().unwrap_or_else(Instant::now);
            let is_idle = self.census.is_none();
            tokio::select! {
                done = finished(&mut self.census) => if self.take(done) {
                    return;
                },
                () = tokio::time::sleep_until(due.into()), if is_idle => self.begin(node),
                () = node.kernel.gate.knocked() => self.is_reported = true,
            }
        }
    }

    fn begin(&mut self, node: &Arc<Node>) {
        self.is_reported = false;
        let node = node.clone();
        self.census = Some(tokio::task::spawn_blocking(move || node.kernel.census()));
    }

    /// Applies the result of a census. Returns whether there may be something to do.
    fn take(&mut self, done: io::Result<Census>) -> bool {
        self.census = None;
        // A failed census may have used up its time limit.
        let effort = done.as_ref().map_or(Census::LIMIT, |census| census.effort);
        self.pauses.ended(Instant::now(), effort);
        let before = self.last.take();
        match done {
            Ok(census) => {
                self.has_cgroups = census.has_cgroups;
                if census.is_partial && !self.is_partial {
                    tracing::warn!(
                        "not all pods were read within {:?}; new pods outside the mesh that have many processes stay closed",
                        Census::LIMIT
                    );
                }
                self.is_partial = census.is_partial;
                self.last = Some(census.netns);
            }
            Err(error) => {
                tracing::error!(%error, "cannot list the netns of pods; new pods outside the mesh stay closed")
            }
        }
        self.last != before || !self.closed.is_empty()
    }

    /// Takes a census as soon as possible, because a pod has a new sandbox.
    pub(super) fn search_now(&mut self) {
        self.is_reported = true;
    }

    /// Logs each netns that stays closed for long, once.
    fn warn_of_closed(&mut self) {
        for netns in self.last.iter().flatten() {
            let Some(closed) = self.closed.get_mut(&netns.cookie) else {
                continue;
            };
            if closed.since.elapsed() > LATE && !std::mem::replace(&mut closed.is_logged, true) {
                let uids: Vec<_> = netns.pods.keys().map(PodUid::to_string).collect();
                tracing::warn!(
                    netns_cookie = netns.cookie, pods = ?uids,
                    "a netns of pods stays closed: it is neither enrolled nor known to be outside the mesh {LATE:?} after it was found"
                );
            }
        }
    }

    /// Time of the next census. `None`: now.
    fn due(&self) -> Option<Instant> {
        self.pauses.due(if self.is_reported {
            Duration::ZERO
        } else if !self.missing.is_empty() {
            self.pauses.while_missing()
        } else if !self.closed.is_empty() {
            NESTED
        } else {
            Pauses::SLOW
        })
    }
}

impl Enrolment {
    /// Opens the netns that are outside the mesh, before the pods in them are released. Returns their cookies.
    pub(super) fn open_outside(&mut self, snapshot: &Snapshot) -> HashSet<u64> {
        let (uids, mut outside) = self.pods_outside(snapshot);
        let kinds = self.kinds(snapshot);
        let pods = &mut self.outside;
        let now = Instant::now();
        let census = pods.last.as_deref().unwrap_or_default();
        let own = census.iter().flat_map(|netns| &netns.pods);
        let found: HashSet<PodUid> = own.filter(|(_, own)| **own).map(|(uid, _)| *uid).collect();
        let missing: HashSet<PodUid> = match pods.has_cgroups {
            true => uids.difference(&found).copied().collect(),
            false => HashSet::new(),
        };
        if !missing.is_subset(&pods.missing) {
            pods.pauses.restart();
        }
        pods.missing = missing;

        let mut nested: HashMap<PodUid, usize> = HashMap::new();
        let mut closed = HashMap::new();
        for netns in census {
            let before = pods.closed.remove(&netns.cookie);
            let since = before.as_ref().map_or(now, |before| before.since);
            let is_open = match verdict(netns, &kinds) {
                Verdict::Outside => true,
                Verdict::Nested(pod) => {
                    let count = nested.entry(pod).or_default();
                    *count += 1;
                    let is_known = pods.open.contains_key(&netns.cookie);
                    *count <= MAX_NESTED && (is_known || now - since >= NESTED)
                }
                Verdict::Closed => outside.contains(&netns.cookie),
            };
            if is_open {
                outside.insert(netns.cookie);
            } else if !self.serving.contains_key(&netns.cookie) {
                let before = before.unwrap_or(Closed {
                    since,
                    is_logged: false,
                });
                closed.insert(netns.cookie, before);
            }
        }
        pods.closed = closed;
        for cookie in &outside {
            if pods.open.insert(*cookie, now).is_some() {
                continue;
            }
            if let Err(error) = self.node.kernel.gate.open(*cookie) {
                tracing::error!(netns_cookie = cookie, %error, "cannot open the netns of a pod outside the mesh; retrying");
                pods.open.remove(cookie);
            }
        }
        outside
    }

    /// Closes the netns that are not outside the mesh any more, after the pods in them are enrolled. From the first time on,
    /// the kernel closes whatever is not open, also if no census has succeeded yet.
    pub(super) fn close_undecided(&mut self, outside: &HashSet<u64>) {
        self.close_former(outside);
        self.put_in_force();
        self.outside.warn_of_closed();
    }

    fn close_former(&mut self, outside: &HashSet<u64>) {
        let pods = &mut self.outside;
        let Some(census) = &pods.last else {
            return;
        };
        let kernel = &self.node.kernel;
        let is_partial = pods.is_partial;
        let populated: HashSet<u64> = census.iter().map(|netns| netns.cookie).collect();
        pods.open.retain(|cookie, seen| {
            let is_over = self.serving.contains_key(cookie)
                || populated.contains(cookie)
                || !is_partial && seen.elapsed() > EMPTY;
            if outside.contains(cookie) || !is_over {
                return true;
            }
            match kernel.gate.close(*cookie) {
                Ok(()) => false,
                Err(error) => {
                    tracing::error!(netns_cookie = cookie, %error, "cannot close a netns that is not outside the mesh any more; retrying");
                    true
                }
            }
        });
    }

    fn put_in_force(&mut self) {
        let pods = &mut self.outside;
        if pods.is_in_force {
            return;
        }
        match self.node.kernel.close_undecided() {
            Ok(()) => pods.is_in_force = true,
            Err(error) => {
                tracing::error!(%error, "cannot close the netns of new pods; they are open until they are enrolled");
            }
        }
    }

    /// The UIDs of the pods outside the mesh, and the cookies of the netns that their objects name.
    fn pods_outside(&self, snapshot: &Snapshot) -> (HashSet<PodUid>, HashSet<u64>) {
        let (mut uids, mut named) = (HashSet::new(), HashSet::new());
        for pod in snapshot.excluded_on(&self.node.config.node_name) {
            match &pod.netns {
                Some(path) => named.extend(Netns::open(path).ok().map(|netns| netns.cookie())),
                None if !pod.finished => uids.extend(pod.uid.parse::<PodUid>()),
                None => {}
            }
        }
        (uids, named)
    }

    /// The pods of this node on which there is a verdict.
    fn kinds(&self, snapshot: &Snapshot) -> HashMap<PodUid, Kind> {
        let node_name = &self.node.config.node_name;
        let host_network = snapshot.all_on(node_name).filter(|pod| pod.host_network);
        let host_network = host_network.map(|pod| (pod, Kind::HostNetwork));
        let excluded = snapshot.excluded_on(node_name);
        let excluded = excluded.map(|pod| (pod, Kind::Outside));
        let objects = host_network
            .chain(excluded)
            .map(|(pod, kind)| (&pod.uid, kind));
        let serving = self.serving.values();
        let serving = serving.map(|serving| (&serving.pod.workload.uid, Kind::Served));
        // Of a pod that is served and whose object says that it is outside, the object counts.
        let all = serving.chain(objects);
        all.filter_map(|(uid, kind)| Some((uid.parse().ok()?, kind)))
            .collect()
    }
}

fn verdict(netns: &PodNetns, kinds: &HashMap<PodUid, Kind>) -> Verdict {
    let mut verdict = Verdict::Closed;
    let mut is_outside = true;
    for (pod, is_own) in &netns.pods {
        match (kinds.get(pod), is_own) {
            (None, _) | (Some(Kind::Served), true) => return Verdict::Closed,
            (Some(Kind::Outside), true) => {}
            _ => is_outside = false,
        }
        verdict = Verdict::Nested(*pod);
    }
    if is_outside {
        Verdict::Outside
    } else {
        verdict
    }
}

async fn finished(census: &mut Option<JoinHandle<Census>>) -> io::Result<Census> {
    match census {
        Some(census) => census.await.map_err(io::Error::other),
        None => std::future::pending().await,
    }
}
