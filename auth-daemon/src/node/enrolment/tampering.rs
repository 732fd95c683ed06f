//! Finds and repairs what pods have changed of the daemon's set-up in their network namespaces.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use super::Serving;
use auth_datapath::Tampered;

/// Interval at which the pods' namespaces are checked. A check takes some 0.3 ms for each pod.
const INTERVAL: Duration = Duration::from_secs(10);

/// What pods have tampered with.
#[derive(Debug, Default)]
pub(super) struct Tampering {
    checked: Option<Instant>,
    /// By the cookie of the pod's netns.
    found: HashMap<u64, Found>,
}

#[derive(Debug, Default)]
struct Found {
    missing: BTreeSet<&'static str>,
    times: u64,
    is_preceded: bool,
}

impl Tampering {
    /// Checks the namespaces of the pods that are served, if it is time to.
    pub(super) fn check(&mut self, serving: &HashMap<u64, Serving>) {
        if self.checked.is_some_and(|at| at.elapsed() < INTERVAL) {
            return;
        }
        self.checked = Some(Instant::now());
        self.found.retain(|cookie, _| serving.contains_key(cookie));
        for (cookie, serving) in serving {
            let pod = &serving.pod.workload.name;
            let Tampered {
                missing,
                is_preceded,
            } = match serving.pod.enrolled.repair() {
                Ok(tampered) => tampered,
                // The namespace may be on its way out; the next check retries.
                Err(error) => {
                    tracing::debug!(%pod, %error, "cannot check a pod's routes");
                    continue;
                }
            };
            if missing.is_empty() && !is_preceded && !self.found.contains_key(cookie) {
                continue;
            }
            let found = self.found.entry(*cookie).or_default();
            if is_preceded && !found.is_preceded {
                tracing::warn!(
                    %pod,
                    "routing rules of a pod precede the daemon's in its network namespace: connections to the pod may \
                     fail. Give them a preference above 100. Does the pod need CAP_NET_ADMIN?"
                );
            }
            found.is_preceded = is_preceded;
            if missing.is_empty() {
                continue;
            }
            found.times += 1;
            let known = found.missing.len();
            found.missing.extend(missing.iter().copied());
            let is_new = found.missing.len() > known;
            if is_new {
                tracing::warn!(
                    %pod, ?missing,
                    "a pod has removed what the daemon set up in its network namespace; it is put back. Connections to \
                     the pod failed meanwhile. Does the pod need CAP_NET_ADMIN?"
                );
            }
        }
    }

    /// What the status says of the pod whose netns has `cookie`. Empty if it did not tamper.
    pub(super) fn of(&self, cookie: u64) -> String {
        let Some(found) = self.found.get(&cookie) else {
            return String::new();
        };
        let mut told = Vec::new();
        if found.times > 0 {
            let names: Vec<_> = found.missing.iter().copied().collect();
            let names = names.join(", ");
            told.push(format!("removed {names}; put back {} times", found.times));
        }
        if found.is_preceded {
            told.push("has routing rules that precede the daemon's".to_owned());
        }
        told.join("; ")
    }
}
