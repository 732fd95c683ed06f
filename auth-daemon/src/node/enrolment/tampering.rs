//! Finds and repairs what pods have changed of the daemon's set-up in their network namespaces.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::oneshot::{self, error::TryRecvError},
    task::spawn_blocking,
};

use super::Serving;
use crate::proxy::Pod;
use auth_datapath::Tampered;

/// Time between two checks of the pods' namespaces. A check takes some 0.3 ms for each pod.
const INTERVAL: Duration = Duration::from_secs(10);

/// What pods have tampered with.
#[derive(Debug, Default)]
pub(super) struct Tampering {
    /// When the last check ended.
    checked: Option<Instant>,
    /// Receives the results of the check that is under way.
    under_way: Option<oneshot::Receiver<Vec<Checked>>>,
    /// By the cookie of the pod's netns.
    found: HashMap<u64, Found>,
}

/// A pod, and what it has tampered with.
type Checked = (Arc<Pod>, io::Result<Tampered>);

#[derive(Debug, Default)]
struct Found {
    missing: BTreeSet<&'static str>,
    times: u64,
    is_preceded: bool,
}

impl Tampering {
    /// Takes note of a check that has ended. Starts one of the namespaces of the pods that are served, if it is time to, on
    /// another thread: a pod can make its own check slow. Must be called within the control runtime.
    pub(super) fn check(&mut self, serving: &HashMap<u64, Serving>) {
        if self.is_under_way() || self.checked.is_some_and(|at| at.elapsed() < INTERVAL) {
            return;
        }
        self.found.retain(|cookie, _| serving.contains_key(cookie));
        let pods: Vec<_> = serving
            .values()
            .map(|serving| serving.pod.clone())
            .collect();
        let (done, under_way) = oneshot::channel();
        spawn_blocking(move || {
            // It has no reader only if the daemon is ending.
            let _ = done.send(repair(pods));
        });
        self.under_way = Some(under_way);
    }

    /// Whether a check is under way. Takes note of what it has found if it has ended.
    fn is_under_way(&mut self) -> bool {
        let Some(under_way) = &mut self.under_way else {
            return false;
        };
        match under_way.try_recv() {
            Err(TryRecvError::Empty) => return true,
            Ok(checked) => {
                for (pod, tampered) in checked {
                    self.note(&pod, tampered);
                }
            }
            Err(TryRecvError::Closed) => {
                tracing::error!("the check of the pods' routes has failed")
            }
        }
        self.under_way = None;
        self.checked = Some(Instant::now());
        false
    }

    fn note(&mut self, pod: &Pod, tampered: io::Result<Tampered>) {
        let cookie = pod.enrolled.netns.cookie();
        let pod = &pod.workload.name;
        let Tampered {
            missing,
            is_preceded,
        } = match tampered {
            Ok(tampered) => tampered,
            // The namespace may be about to disappear; the next check retries.
            Err(error) => {
                tracing::debug!(%pod, %error, "cannot check a pod's routes");
                return;
            }
        };
        if missing.is_empty() && !is_preceded && !self.found.contains_key(&cookie) {
            return;
        }
        let found = self.found.entry(cookie).or_default();
        if is_preceded && !found.is_preceded {
            tracing::warn!(
                %pod,
                "routing rules of a pod precede the daemon's in its network namespace: connections to the pod may \
                 fail. Give them a preference above 100. Does the pod need CAP_NET_ADMIN?"
            );
        }
        found.is_preceded = is_preceded;
        if missing.is_empty() {
            return;
        }
        found.times += 1;
        let known = found.missing.len();
        found.missing.extend(missing.iter().copied());
        let is_new = found.missing.len() > known;
        if is_new {
            tracing::warn!(
                %pod, ?missing,
                "a pod has removed what the daemon set up in its network namespace; it is restored. Connections to \
                 the pod failed meanwhile. Does the pod need CAP_NET_ADMIN?"
            );
        }
    }

    /// What the status says of the pod whose netns has `cookie`. Empty if it did not tamper.
    pub(super) fn of(&self, cookie: u64) -> String {
        let Some(found) = self.found.get(&cookie) else {
            return String::new();
        };
        let mut parts = Vec::new();
        if found.times > 0 {
            let names: Vec<_> = found.missing.iter().copied().collect();
            let names = names.join(", ");
            parts.push(format!("removed {names}; restored {} times", found.times));
        }
        if found.is_preceded {
            parts.push("has routing rules that precede the daemon's".to_owned());
        }
        parts.join("; ")
    }
}

/// Repairs the namespaces of `pods`, one after the other.
fn repair(pods: Vec<Arc<Pod>>) -> Vec<Checked> {
    let checked = pods.into_iter().map(|pod| {
        let tampered = pod.enrolled.repair();
        (pod, tampered)
    });
    checked.collect()
}
