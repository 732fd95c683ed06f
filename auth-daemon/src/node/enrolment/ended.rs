//! Pods that have finished or whose objects are gone, and netns that no object names. Enrolment follows processes: a netns
//! stays enrolled, served or refused, for as long as it has any. Only an object that says that its pod is not in the mesh
//! ends it earlier.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use super::{Enrolment, Serving};
use crate::proxy::PodStatus;
use auth_datapath::{EnrolError, Netns, PodUid, Unserved, open_netns, unserved};
use auth_mesh::{ObjectName, Snapshot, Workload};

/// The pods of this node, by name.
pub(super) type Pods<'a> = BTreeMap<&'a ObjectName, &'a Arc<Workload>>;

/// Why a pod is served only for its processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Its phase is Succeeded or Failed.
    Finished,
    /// No object describes it any more.
    Gone,
    /// It is another pod, or in another netns, by now.
    Replaced,
}

impl Ended {
    fn why(self) -> &'static str {
        match self {
            Self::Finished => "its phase says that it has finished",
            Self::Gone => "its object is gone",
            Self::Replaced => "its object describes another network namespace by now",
        }
    }
}

/// What is known of the pods that have ended.
#[derive(Default)]
pub(super) struct EndedPods {
    /// Netns that the kernel has enrolled, and that no object names, by cookie. They are refused.
    unserved: HashMap<u64, Unserved>,
    /// Netns that finished pods name, and whose processes are not counted yet.
    candidates: Vec<Arc<Netns>>,
    /// Finished pods whose netns had no process, by name and UID. They stay without.
    empty: HashSet<(ObjectName, String)>,
    /// Why netns are still enrolled, according to the log, by cookie. `None`: no object names the netns.
    logged: HashMap<u64, Option<Ended>>,
}

impl Enrolment {
    /// Sets the pods whose netns to search for, and the netns whose processes to count.
    pub(super) fn look_for(&mut self, running: &Pods<'_>, finished: &Pods<'_>) {
        let known: HashSet<&str> = running
            .values()
            .chain(finished.values())
            .map(|workload| workload.uid.as_str())
            .collect();
        // Without the pods that are gone, one that shares the netns of another would not be noticed.
        let gone = self.serving.values().filter(|serving| {
            serving.ended.is_some() && !known.contains(serving.pod.workload.uid.as_str())
        });
        let gone = gone.map(|serving| &serving.pod.workload);
        self.netns_discovery.want(
            running.values().map(|workload| &***workload),
            finished.values().map(|workload| &***workload).chain(gone),
        );
    }

    /// Serves finished pods that have processes, as after a restart, and moves them to `leaving`.
    pub(super) fn serve_finished(
        &mut self,
        finished: &Pods<'_>,
        leaving: &mut HashMap<u64, Serving>,
    ) {
        let key = |workload: &Workload| (workload.name.clone(), workload.uid.clone());
        self.ended.candidates.clear();
        self.ended
            .empty
            .retain(|(name, uid)| finished.get(name).is_some_and(|pod| pod.uid == *uid));
        for workload in finished.values() {
            let mut served = leaving.values();
            if served.any(|serving| self.is_served(workload, serving))
                || self.ended.empty.contains(&key(workload))
            {
                continue;
            }
            if let Some(path) = &workload.netns {
                let Ok(netns) = open_netns(&workload.name, path) else {
                    continue;
                };
                match self.netns_discovery.residents(netns.cookie()) {
                    None => {
                        self.ended.candidates.push(Arc::new(netns));
                        continue;
                    }
                    Some(residents) if residents.processes == 0 => {
                        self.ended.empty.insert(key(workload));
                        continue;
                    }
                    Some(_) => {}
                }
            }
            match self.serve(workload, leaving) {
                Ok(cookie) => leaving.extend(self.serving.remove_entry(&cookie)),
                // It has no process, or its netns is another pod's by now: it needs nothing.
                Err(EnrolError::NoProcess { .. } | EnrolError::Taken { .. }) => {
                    self.failing.remove(&workload.name);
                }
                Err(error) => self.note_failure(workload, &error),
            }
        }
    }

    /// Decides on the pods that are not wanted any more: those whose netns has processes are served on.
    pub(super) fn settle_leaving(
        &mut self,
        snapshot: &Snapshot,
        (running, finished): (&Pods<'_>, &Pods<'_>),
        leaving: HashMap<u64, Serving>,
    ) {
        for (cookie, mut serving) in leaving {
            let workload = &serving.pod.workload;
            let residents = self.netns_discovery.residents(cookie);
            if self.netns_discovery.shared(workload) == Some(cookie) {
                // More than one pod may own the netns: its connections are refused until that is resolved.
                serving.pod.enrolled.refuse(&self.node.kernel);
                self.end(serving);
            } else if snapshot.is_excluded(&workload.name, &workload.uid)
                || residents.is_some_and(|residents| residents.processes == 0)
            {
                self.release(serving);
            } else {
                let is_of = |pods: &Pods<'_>| {
                    let pod = pods.get(&workload.name);
                    pod.is_some_and(|pod| pod.uid == workload.uid)
                };
                serving.ended = Some(if is_of(finished) {
                    Ended::Finished
                } else if is_of(running) {
                    Ended::Replaced
                } else {
                    Ended::Gone
                });
                self.serving.insert(cookie, serving);
            }
        }
    }

    /// Decides on the netns that the kernel has enrolled but that are not in `kept`: those that a previous daemon enrolled,
    /// and those of pods that could not be served and are gone. They are refused while they have processes.
    pub(super) fn settle_unserved(&mut self, snapshot: &Snapshot, kept: &HashSet<u64>) {
        let kernel = &self.node.kernel;
        self.ended
            .unserved
            .retain(|cookie, _| !kept.contains(cookie));
        let known = kept.iter().chain(self.ended.unserved.keys());
        for other in unserved(kernel, &known.copied().collect()) {
            if let Err(error) = other.refuse(kernel) {
                tracing::error!(netns = %other.netns.path().display(), %error, "cannot refuse a netns that no object names");
            }
            self.ended.unserved.insert(other.netns.cookie(), other);
        }
        if self.ended.unserved.is_empty() {
            return;
        }
        let excluded = snapshot.excluded_on(&self.node.config.node_name);
        let excluded: Vec<_> = excluded.collect();
        let uids: HashSet<PodUid> = excluded
            .iter()
            .filter_map(|pod| pod.uid.parse().ok())
            .collect();
        let named: HashSet<u64> = excluded
            .iter()
            .filter_map(|pod| Some(Netns::open(pod.netns.as_deref()?).ok()?.cookie()))
            .collect();
        self.ended.unserved.retain(|cookie, other| {
            let residents = self.netns_discovery.residents(*cookie);
            let is_over = residents.is_some_and(|residents| {
                residents.processes == 0 || residents.pods.iter().any(|pod| uids.contains(pod))
            });
            if is_over || named.contains(cookie) {
                other.remove(kernel);
            }
            !is_over && !named.contains(cookie)
        });
    }

    /// Sets the netns whose processes keep them enrolled, and logs each once.
    pub(super) fn hold_ended(&mut self) {
        let ended = self.serving.values().filter_map(|serving| {
            let workload = &serving.pod.workload;
            // A replaced pod's processes are the new pod's, too.
            let is_over = serving.ended? != Ended::Replaced;
            let pod = workload.uid.parse().ok();
            let pod = pod.filter(|_| is_over && workload.netns.is_none());
            Some((serving.pod.enrolled.netns.clone(), pod))
        });
        let unserved = self.ended.unserved.values().map(|other| &other.netns);
        let others = unserved.chain(&self.ended.candidates);
        let others = others.map(|netns| (netns.clone(), None));
        self.netns_discovery.hold(ended.chain(others));

        let mut logged = HashMap::new();
        for (cookie, serving) in &self.serving {
            let (Some(ended), Some(processes)) = (serving.ended, self.processes(*cookie)) else {
                continue;
            };
            if self.ended.logged.get(cookie) != Some(&Some(ended)) {
                tracing::info!(
                    pod = %serving.pod.workload.name, processes,
                    "pod stays enrolled: {}, but processes run in its netns", ended.why()
                );
            }
            logged.insert(*cookie, Some(ended));
        }
        for (cookie, other) in &self.ended.unserved {
            let Some(processes) = self.processes(*cookie) else {
                continue;
            };
            if self.ended.logged.get(cookie) != Some(&None) {
                tracing::warn!(
                    netns = %other.netns.path().display(), netns_cookie = cookie, processes,
                    "a netns stays refused: no object names it, but processes run in it"
                );
            }
            logged.insert(*cookie, None);
        }
        self.ended.logged = logged;
    }

    /// Number of processes that keep a netns enrolled. `None` if it is not known yet.
    fn processes(&self, cookie: u64) -> Option<usize> {
        let residents = self.netns_discovery.residents(cookie)?;
        Some(residents.processes)
    }

    /// Why a pod is still served. Empty if its object says so.
    pub(super) fn why_served(&self, serving: &Serving) -> String {
        match serving.ended {
            None => String::new(),
            Some(ended) => format!("{}; {}", ended.why(), self.told_processes(serving.cookie())),
        }
    }

    fn told_processes(&self, cookie: u64) -> String {
        match self.processes(cookie) {
            None => "the processes in its netns are not counted yet".into(),
            Some(processes) => format!("{processes} processes run in its netns"),
        }
    }

    /// The status of the netns that no object names.
    pub(super) fn unserved_status(&self) -> impl Iterator<Item = PodStatus> {
        let unserved = self.ended.unserved.values();
        unserved.map(|Unserved { netns, .. }| PodStatus {
            pod: "unknown".into(),
            identity: String::new(),
            addresses: Vec::new(),
            netns: shown(netns.path()),
            found_by: String::new(),
            enrolled: false,
            reason: format!(
                "no object names it: refused; {}",
                self.told_processes(netns.cookie())
            ),
            tampered: String::new(),
            shared_link: String::new(),
            over_share: 0,
            idle_tunnels: 0,
            refused: BTreeMap::new(),
        })
    }
}

pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}
