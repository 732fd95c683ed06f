//! Discovers the network namespaces of pods that are identified only by their UIDs, by the processes in their cgroups. Scans
//! frequently while a pod is not found, immediately after the kernel reports a socket in an unknown netns, and periodically in
//! any case, because a sandbox may have been recreated.
//!
//! Scans all processes of the node only for what no pod's cgroup shows: which processes keep a netns enrolled whose pod
//! has ended, every second, and pods whose cgroups are elsewhere, every ten seconds. However long that takes, it delays no
//! other scan.

mod schedule;

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use crate::{
    EnrolError, FirstSockets, Kernel, Netns, NetnsLocation, PodUid,
    pod_cgroups::PodCgroups,
    processes::{Proof, Residents, Scan, find, walk},
};
use auth_mesh::{ObjectName, Workload};
use schedule::{Schedule, Walks};

/// Maximum duration of one scan, and of one walk.
const LIMIT: Duration = Duration::from_secs(5);
/// Maximum number of netns whose first socket is remembered.
const REMEMBERED: usize = 4096;

/// The discovery, on the control plane's runtime. Reads /proc on separate threads.
pub struct NetnsDiscovery {
    sockets: Option<FirstSockets>,
    /// Cookies of the node's own netns, whose sockets are ignored.
    nodes: Vec<u64>,
    first_sockets: HashMap<u64, Instant>,
    sought: HashMap<PodUid, Sought>,
    /// Netns that stay enrolled for as long as they have processes, by cookie.
    held: HashMap<u64, Held>,
    cgroups: Arc<PodCgroups>,
    schedule: Schedule,
    look: Option<JoinHandle<io::Result<Scan>>>,
    /// Whether the current scan covers all pods, or only those that are not found.
    is_full: bool,
    walks: Walks,
    walk: Option<JoinHandle<io::Result<Scan>>>,
    /// The held netns that the current walk covers.
    counted: HashSet<u64>,
    last: Last,
}

struct Sought {
    /// Pods with this UID. More than one only if several objects claim the same UID.
    pods: Vec<ObjectName>,
    since: Instant,
    found: Option<NetnsLocation>,
    /// Why what was found is the pod's own.
    proof: Option<Proof>,
    /// Whether the pod may never have a process: it has finished, or its object is gone.
    may_end: bool,
}

struct Held {
    netns: Arc<Netns>,
    /// The pod whose processes count wherever they are.
    pod: Option<PodUid>,
    /// `None` until a walk has counted them.
    residents: Option<Residents>,
}

/// Result of the last scan.
enum Last {
    /// No scan has run yet.
    None,
    Done {
        /// Whether any process belongs to a pod.
        pods_seen: bool,
    },
    Failed(String),
}

impl Sought {
    /// The netns of the pod's processes, even if it is shared.
    fn netns(&self) -> Option<&Arc<Netns>> {
        match &self.found {
            Some(NetnsLocation::In(netns) | NetnsLocation::Shared(netns, _)) => Some(netns),
            _ => None,
        }
    }

    /// Takes what a scan has found of the pod with this UID. Returns whether it is news.
    fn see(&mut self, uid: PodUid, scan: &mut Scan) -> bool {
        let (seen, proof) = (scan.pods.remove(&uid), scan.proofs.remove(&uid));
        let now = match (self.may_end, &seen) {
            (true, None) => None,
            _ => after(self.found.as_ref(), seen),
        };
        let is_news = !is_same(self.found.as_ref(), now.as_ref());
        self.found = now;
        if self.netns().is_none() {
            self.proof = None;
        } else if proof.is_some() {
            self.proof = proof;
        }
        if let (true, Some(proof)) = (is_news, &self.proof) {
            tracing::debug!(%uid, %proof, "a pod's netns is found");
        }
        is_news
    }
}

impl NetnsDiscovery {
    /// Creates a discovery that searches for no pod. Call it once, within the control plane's runtime.
    pub fn new(kernel: &Kernel) -> Self {
        let sockets = kernel.first_sockets().map_err(|error| {
            tracing::error!(%error, "the kernel cannot report new pods; they are found a little later");
        });
        let nodes = ["/proc/self/ns/net", "/proc/1/ns/net"];
        let nodes = nodes.map(|path| Netns::open(path.as_ref()).ok());
        Self {
            sockets: sockets.ok(),
            nodes: nodes.iter().flatten().map(Netns::cookie).collect(),
            first_sockets: HashMap::new(),
            sought: HashMap::new(),
            held: HashMap::new(),
            cgroups: Arc::new(PodCgroups::new(kernel.cgroup())),
            schedule: Schedule::default(),
            look: None,
            is_full: false,
            walks: Walks::default(),
            walk: None,
            counted: HashSet::new(),
            last: Last::None,
        }
    }

    /// Sets the pods to search for: `running`, and `ended`, which have finished or have no object any more, and may
    /// have processes or not. Skips those whose object names their netns.
    pub fn want<'a>(
        &mut self,
        running: impl Iterator<Item = &'a Workload>,
        ended: impl Iterator<Item = &'a Workload>,
    ) {
        for sought in self.sought.values_mut() {
            sought.pods.clear();
        }
        let now = Instant::now();
        let running = running.map(|workload| (workload, false));
        let all = running.chain(ended.map(|workload| (workload, true)));
        for (workload, may_end) in all.filter(|(workload, _)| workload.netns.is_none()) {
            let Ok(uid) = workload.uid.parse() else {
                continue;
            };
            let sought = self.sought.entry(uid).or_insert_with(|| {
                if !may_end {
                    self.schedule.news();
                }
                Sought {
                    pods: Vec::new(),
                    since: now,
                    found: None,
                    proof: None,
                    may_end,
                }
            });
            sought.pods.push(workload.name.clone());
            sought.may_end = may_end;
        }
        self.sought.retain(|_, sought| !sought.pods.is_empty());
    }

    /// Sets the netns whose processes to count. A netns that is found by its pod's processes comes with that pod, whose
    /// processes count wherever they are. The first count comes soon, further ones every second.
    pub fn hold(&mut self, held: impl Iterator<Item = (Arc<Netns>, Option<PodUid>)>) {
        let mut before = std::mem::take(&mut self.held);
        for (netns, pod) in held {
            let known = before.remove(&netns.cookie());
            let known = known.filter(|known| known.pod == pod);
            let held = known.unwrap_or_else(|| {
                self.walks.is_due = true;
                Held {
                    netns,
                    pod,
                    residents: None,
                }
            });
            self.held.insert(held.netns.cookie(), held);
        }
    }

    /// Returns the processes of a held netns, or `None` if they are not counted yet.
    pub fn residents(&self, cookie: u64) -> Option<&Residents> {
        self.held.get(&cookie)?.residents.as_ref()
    }

    /// Returns the netns of a pod, or why it is not known.
    pub fn netns(&self, workload: &Workload) -> Result<Arc<Netns>, EnrolError> {
        let pod = workload.name.clone();
        let uid: PodUid = workload.uid.parse().map_err(|error| EnrolError::NoNetns {
            pod: pod.clone(),
            uid: workload.uid.clone(),
            error,
        })?;
        let Some(sought) = self.sought.get(&uid) else {
            let why = "no scan has searched for it yet".to_owned();
            return Err(EnrolError::NoProcess { pod, why });
        };
        if let Some(other) = sought.pods.iter().find(|name| **name != pod) {
            let other = other.to_string();
            return Err(EnrolError::Shared { pod, other });
        }
        match &sought.found {
            Some(NetnsLocation::In(netns)) => Ok(netns.clone()),
            Some(NetnsLocation::Shared(_, other)) => Err(EnrolError::Shared {
                pod,
                other: self.name(*other),
            }),
            Some(NetnsLocation::Hidden { pid, error }) => Err(EnrolError::Hidden {
                pod,
                pid: *pid,
                error: error.clone(),
            }),
            Some(NetnsLocation::Node) => Err(EnrolError::NoProcess {
                pod,
                why: "all its processes are in the node's own network namespace".into(),
            }),
            None => Err(EnrolError::NoProcess {
                pod,
                why: self.why_none(),
            }),
        }
    }

    /// Returns why the netns that was found for a pod is its own. Empty if none was found.
    pub fn proof(&self, workload: &Workload) -> String {
        let uid = workload.uid.parse().ok();
        let sought = uid.and_then(|uid: PodUid| self.sought.get(&uid));
        let proof = sought.and_then(|sought| sought.proof.as_ref());
        proof.map_or_else(String::new, Proof::to_string)
    }

    fn name(&self, uid: PodUid) -> String {
        let sought = self.sought.get(&uid);
        let name = sought.and_then(|sought| sought.pods.first());
        name.map_or_else(|| uid.to_string(), ObjectName::to_string)
    }

    fn why_none(&self) -> String {
        match &self.last {
            Last::None => "no scan has searched for its processes yet".into(),
            Last::Failed(error) => format!("cannot look for its processes: {error}"),
            Last::Done { pods_seen: false } => {
                "no process on this node is any pod's: does the daemon see the node's processes (hostPID: true)?".into()
            }
            Last::Done { pods_seen: true } => "it has no process yet".into(),
        }
    }

    /// Cookie of the pod's netns, if processes of another pod are in it too.
    pub fn shared(&self, workload: &Workload) -> Option<u64> {
        let uid = workload.uid.parse().ok()?;
        let sought = self.sought.get(&uid)?;
        match &sought.found {
            Some(NetnsLocation::Shared(netns, _)) => Some(netns.cookie()),
            // Two objects claim to be the pod in it.
            Some(NetnsLocation::In(netns)) if sought.pods.len() > 1 => Some(netns.cookie()),
            _ => None,
        }
    }

    /// Whether the netns of every pod with processes is known. Until then, a netns that a previous daemon enrolled may
    /// belong to any pod.
    pub fn knows_all(&self) -> bool {
        let hidden = |sought: &Sought| matches!(sought.found, Some(NetnsLocation::Hidden { .. }));
        self.sought.is_empty()
            || matches!(self.last, Last::Done { .. }) && !self.sought.values().any(hidden)
    }

    /// How long `workload`, whose netns has `cookie`, has been creating sockets without being served: since the kernel
    /// reported the first one, or since the pod is known, whichever is later. `None` if no socket was reported.
    pub fn unserved(&mut self, workload: &Workload, cookie: u64) -> Option<Duration> {
        let first = self.first_sockets.remove(&cookie)?;
        let sought = self.sought.get(&workload.uid.parse().ok()?)?;
        Some(sought.since.max(first).elapsed())
    }

    /// Runs one scan, if there are pods to search for.
    pub async fn look(&mut self) {
        if self.sought.is_empty() {
            return;
        }
        self.begin();
        let done = finished(&mut self.look).await;
        self.take(done);
        if self.needs_walk() {
            self.begin_walk();
            let done = finished(&mut self.walk).await;
            self.take_walk(done);
        }
    }

    /// Runs scans when they are due, and returns when one has changed a result. Cancel-safe.
    pub async fn changed(&mut self) {
        loop {
            let due = self.schedule.due(self.is_missing());
            let walk_due = self.walks.due(!self.held.is_empty());
            let mut reported = Vec::new();
            let may_begin = self.look.is_none() && !self.sought.is_empty();
            let may_walk = self.walk.is_none() && self.needs_walk();
            tokio::select! {
                done = finished(&mut self.look) => if self.take(done) {
                    return;
                },
                done = finished(&mut self.walk) => if self.take_walk(done) {
                    return;
                },
                () = sleep_until(due), if may_begin => self.begin(),
                () = sleep_until(walk_due), if may_walk => self.begin_walk(),
                received = receive(&mut self.sockets, &mut reported) => {
                    if let Err(error) = received {
                        tracing::error!(%error, "the kernel does not report new pods any more; they are found a little later");
                        self.sockets = None;
                    }
                    for (cookie, at) in reported {
                        self.reported(cookie, at);
                    }
                }
            }
        }
    }

    fn is_missing(&self) -> bool {
        let mut running = self.sought.values().filter(|sought| !sought.may_end);
        running.any(|sought| sought.netns().is_none())
    }

    fn needs_walk(&self) -> bool {
        self.is_missing() || !self.held.is_empty()
    }

    fn begin(&mut self) {
        self.is_full = self.schedule.begun(Instant::now(), self.is_missing());
        let sought: HashMap<_, _> = self
            .sought
            .iter()
            .map(|(uid, sought)| (*uid, sought.netns().cloned()))
            .filter(|(_, netns)| self.is_full || netns.is_none())
            .collect();
        let cgroups = self.cgroups.clone();
        self.look = Some(tokio::task::spawn_blocking(move || {
            find(&cgroups, &sought, LIMIT)
        }));
    }

    fn begin_walk(&mut self) {
        self.walks.is_due = false;
        let sought = self.sought.iter();
        let sought = sought.filter(|(_, sought)| sought.netns().is_none());
        let sought: HashMap<_, _> = sought.map(|(uid, _)| (*uid, None)).collect();
        let held = self.held.values();
        let held: HashMap<_, _> = held.map(|held| (held.netns.inode(), held.pod)).collect();
        self.counted = self.held.keys().copied().collect();
        self.walk = Some(tokio::task::spawn_blocking(move || {
            walk(&sought, &held, LIMIT)
        }));
    }

    /// Applies the result of a scan. Returns whether anything changed.
    fn take(&mut self, done: io::Result<Scan>) -> bool {
        self.look = None;
        // A failed scan may have used up its time limit.
        let effort = done.as_ref().map_or(LIMIT, |scan| scan.effort);
        self.schedule.ended(Instant::now(), effort);
        let mut scan = match done {
            Ok(scan) => scan,
            Err(error) => return self.note_failure(&error),
        };
        tracing::debug!(
            processes = scan.processes, pods = scan.pods.len(), effort = ?scan.effort,
            "scanned the cgroups of pods for their processes"
        );
        let mut news = !matches!(self.last, Last::Done { .. });
        if news {
            self.last = Last::Done { pods_seen: true };
        }
        let held: HashMap<u64, PodUid> = self
            .sought
            .iter()
            .filter_map(|(uid, sought)| Some((sought.netns()?.cookie(), *uid)))
            .collect();
        for (uid, sought) in &mut self.sought {
            if !self.is_full && sought.netns().is_some() {
                continue;
            }
            news |= sought.see(*uid, &mut scan);
            let cookie = sought.netns().map(|netns| netns.cookie());
            if cookie.is_some_and(|cookie| held.get(&cookie).is_some_and(|owner| owner != uid)) {
                // Only a scan of both pods can tell whose netns it is.
                self.schedule.doubt();
            }
        }
        news
    }

    /// Applies the result of a walk. Returns whether anything changed.
    fn take_walk(&mut self, done: io::Result<Scan>) -> bool {
        self.walk = None;
        let effort = done.as_ref().map_or(LIMIT, |scan| scan.effort);
        self.walks.ended(Instant::now(), effort);
        let mut scan = match done {
            Ok(scan) => scan,
            Err(error) => return self.note_failure(&error),
        };
        tracing::debug!(
            processes = scan.processes, of_pods = scan.of_pods, effort = ?scan.effort,
            "walked through all processes"
        );
        let pods_seen = scan.of_pods > 0;
        let mut news =
            !matches!(self.last, Last::Done { pods_seen: before } if before == pods_seen);
        self.last = Last::Done { pods_seen };
        for (uid, sought) in &mut self.sought {
            if sought.netns().is_none() && scan.pods.contains_key(uid) {
                news |= sought.see(*uid, &mut scan);
            }
        }
        for (cookie, held) in &mut self.held {
            if self.counted.contains(cookie) {
                let residents = scan.residents.remove(&held.netns.inode());
                // Unless every process was read, the pod may have one although none was found.
                let residents = residents.or_else(|| (!scan.is_partial).then(Residents::default));
                news |= held.residents != residents;
                held.residents = residents;
            }
        }
        news
    }

    /// Notes why a scan or a walk failed. Returns whether that is news.
    fn note_failure(&mut self, error: &io::Error) -> bool {
        let reason = error.to_string();
        let is_known = matches!(&self.last, Last::Failed(before) if *before == reason);
        if !is_known {
            tracing::error!(%error, "cannot scan for pods' processes; new pods may not be enrolled");
        }
        self.last = Last::Failed(reason);
        !is_known
    }

    /// Scans as soon as possible, because a pod has a new sandbox.
    pub fn search_now(&mut self) {
        self.schedule.reported();
    }

    /// Handles the kernel's report of a socket in the netns with `cookie`.
    fn reported(&mut self, cookie: u64, at: Instant) {
        let known = |sought: &Sought| matches!(&sought.found, Some(NetnsLocation::In(netns)) if netns.cookie() == cookie);
        if self.nodes.contains(&cookie) || self.sought.values().any(known) {
            return;
        }
        self.schedule.reported();
        if self.first_sockets.len() >= REMEMBERED {
            // The entries are only used for logging, and most are never read.
            self.first_sockets.clear();
        }
        self.first_sockets.entry(cookie).or_insert(at);
    }
}

async fn finished(look: &mut Option<JoinHandle<io::Result<Scan>>>) -> io::Result<Scan> {
    match look {
        Some(look) => look.await.map_err(io::Error::other)?,
        None => std::future::pending().await,
    }
}

async fn sleep_until(due: Option<Instant>) {
    if let Some(due) = due {
        tokio::time::sleep_until(due.into()).await;
    }
}

async fn receive(
    sockets: &mut Option<FirstSockets>,
    reported: &mut Vec<(u64, Instant)>,
) -> io::Result<()> {
    match sockets {
        Some(sockets) => sockets.next(|cookie, at| reported.push((cookie, at))).await,
        None => std::future::pending().await,
    }
}

/// Returns a pod's new location, given its previous one and the one that a scan has `seen`. A netns that was found
/// stays the pod's until another one is found, because between two containers there may be no process, or none that can
/// be inspected.
fn after(before: Option<&NetnsLocation>, seen: Option<NetnsLocation>) -> Option<NetnsLocation> {
    match (before, seen) {
        (_, Some(found @ (NetnsLocation::In(_) | NetnsLocation::Shared(..)))) => Some(found),
        (Some(held @ NetnsLocation::In(_)), _) => Some(held.clone()),
        (_, seen) => seen,
    }
}

fn is_same(one: Option<&NetnsLocation>, other: Option<&NetnsLocation>) -> bool {
    match (one, other) {
        (Some(NetnsLocation::In(one)), Some(NetnsLocation::In(other))) => {
            one.cookie() == other.cookie()
        }
        (Some(NetnsLocation::Shared(one, with)), Some(NetnsLocation::Shared(other, also))) => {
            (one.cookie(), with) == (other.cookie(), also)
        }
        (Some(NetnsLocation::Node), Some(NetnsLocation::Node)) | (None, None) => true,
        (
            Some(NetnsLocation::Hidden { error: one, .. }),
            Some(NetnsLocation::Hidden { error: other, .. }),
        ) => one.kind() == other.kind(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_held_until_something_else_is() {
        let found = |cookie| NetnsLocation::In(Arc::new(Netns::imagined(cookie)));
        let cookie = |now: Option<NetnsLocation>| match now {
            Some(NetnsLocation::In(netns)) => Some(netns.cookie()),
            _ => None,
        };
        assert_eq!(cookie(after(None, Some(found(1)))), Some(1));
        assert_eq!(cookie(after(Some(&found(1)), None)), Some(1));
        assert_eq!(
            cookie(after(Some(&found(1)), Some(NetnsLocation::Node))),
            Some(1)
        );
        assert_eq!(cookie(after(Some(&found(1)), Some(found(2)))), Some(2));
        assert!(after(Some(&NetnsLocation::Node), None).is_none());
        let other = "11111111-2222-4333-8444-555555555555".parse().unwrap();
        let shared = NetnsLocation::Shared(Arc::new(Netns::imagined(1)), other);
        let now = after(Some(&found(1)), Some(shared.clone()));
        assert!(
            is_same(now.as_ref(), Some(&shared)),
            "neither is identified"
        );
        assert!(after(Some(&shared), None).is_none());
    }
}
