//! Finds and repairs what pods have changed of the daemon's set-up in their network namespaces.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use super::Serving;

/// Interval at which the pods' namespaces are checked. A check takes some 0.2 ms for each pod.
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
            let missing = match serving.pod.enrolled.repair() {
                Ok(missing) => missing,
                // The namespace may be on its way out; the next check retries.
                Err(error) => {
                    tracing::debug!(%pod, %error, "cannot check a pod's routes");
                    continue;
                }
            };
            if missing.is_empty() {
                continue;
            }
            let found = self.found.entry(*cookie).or_default();
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
        self.found.get(&cookie).map_or_else(String::new, |found| {
            let names: Vec<_> = found.missing.iter().copied().collect();
            format!(
                "removed {}; put back {} times",
                names.join(", "),
                found.times
            )
        })
    }
}
