//! When the state of the mesh is published. Pure: the time comes from the caller.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::time::Instant;

use crate::discovery::kubernetes::SETTLE;
use auth_mesh::ObjectName;

/// How long a workload that names a new policy waits for that policy. istiod sends it right after the workload; published
/// between the two, the workload would refuse everything for that moment, and end its open connections.
const POLICY_WAIT: Duration = Duration::from_secs(2);
/// Maximum number of policies of workloads that are waited for. Others that are missing are not.
const MAX_MISSING: usize = 1024;

/// When the next publication is due.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// The first change since the last publication.
    changed: Option<Instant>,
    at: Option<Instant>,
    missing: Missing,
}

impl Due {
    /// Returns when to publish. `None` if nothing has changed since the last publication.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// Notes a change at `now`. `is_awaited` says whether connections wait for the publication, and `missing` which workloads
    /// name policies that have not arrived. Nothing waits longer than [`POLICY_WAIT`] from the first change on: it may be
    /// another policy, which denies what is allowed until then.
    pub(super) fn changed<'a>(
        &mut self,
        now: Instant,
        is_awaited: bool,
        missing: impl Iterator<Item = (&'a ObjectName, &'a ObjectName)>,
    ) {
        let changed = *self.changed.get_or_insert(now);
        let settled = match is_awaited {
            true => changed,
            false => changed + SETTLE,
        };
        let last = changed + POLICY_WAIT;
        let waits_until = self.missing.update(now, missing.collect());
        self.at = Some(waits_until.map_or(settled, |until| until.min(last).max(settled)));
    }

    /// Notes that everything is published.
    pub(super) fn published(&mut self) {
        (self.changed, self.at) = (None, None);
    }
}

/// The missing policies of workloads, each with the end of its own wait, so that one which never comes takes no time from
/// another. It stays in the list while it is missing, so that it is waited for once.
#[derive(Debug, Default)]
struct Missing(HashMap<(ObjectName, ObjectName), Instant>);

impl Missing {
    /// Makes the list that of what is missing at `now`. Returns when the last wait ends.
    fn update(
        &mut self,
        now: Instant,
        missing: HashSet<(&ObjectName, &ObjectName)>,
    ) -> Option<Instant> {
        self.0
            .retain(|(workload, policy), _| missing.contains(&(workload, policy)));
        for (workload, policy) in missing {
            if self.0.len() < MAX_MISSING {
                let name = (workload.clone(), policy.clone());
                self.0.entry(name).or_insert(now + POLICY_WAIT);
            }
        }
        self.0.values().max().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        }
    }

    /// Notes a change while workloads lack a policy each.
    fn change(due: &mut Due, now: Instant, is_awaited: bool, workloads: &[&str]) {
        let (workloads, policy) = (workloads.iter().copied().map(name), name("policy"));
        let workloads: Vec<_> = workloads.collect();
        let missing = workloads.iter().map(|workload| (workload, &policy));
        due.changed(now, is_awaited, missing);
    }

    #[test]
    fn changes_gather_and_connections_do_not_wait() {
        let (mut due, start) = (Due::default(), Instant::now());
        assert_eq!(due.at(), None);
        change(&mut due, start, false, &[]);
        change(&mut due, start + SETTLE / 2, false, &[]);
        assert_eq!(due.at(), Some(start + SETTLE));
        change(&mut due, start + SETTLE / 2, true, &[]);
        assert_eq!(due.at(), Some(start));
        due.published();
        assert_eq!(due.at(), None);
    }

    #[test]
    fn a_workload_waits_for_its_policy() {
        let (mut due, start) = (Due::default(), Instant::now());
        change(&mut due, start, true, &["web"]);
        assert_eq!(due.at(), Some(start + POLICY_WAIT));
        change(&mut due, start + SECOND, false, &[]);
        assert_eq!(due.at(), Some(start + SETTLE), "it has arrived");
    }

    #[test]
    fn a_policy_that_never_comes_delays_one_publication() {
        let (mut due, start) = (Due::default(), Instant::now());
        change(&mut due, start, false, &["web"]);
        due.published();
        let later = start + 2 * POLICY_WAIT;
        change(&mut due, later, false, &["web"]);
        assert_eq!(due.at(), Some(later + SETTLE));
        due.published();
        change(&mut due, later + SECOND, false, &[]);
        due.published();
        let again = later + 2 * SECOND;
        change(&mut due, again, false, &["web"]);
        assert_eq!(due.at(), Some(again + POLICY_WAIT), "it was there");
    }

    #[test]
    fn a_policy_that_never_comes_takes_no_time_from_another() {
        let (mut due, start) = (Due::default(), Instant::now());
        change(&mut due, start, false, &["never"]);
        due.published();
        let later = start + 2 * POLICY_WAIT;
        change(&mut due, later, false, &["never", "web"]);
        assert_eq!(due.at(), Some(later + POLICY_WAIT));
        change(&mut due, later + SECOND / 2, false, &["never"]);
        assert_eq!(due.at(), Some(later + SETTLE), "it has arrived");
        due.published();
        // The same if the other one still has some of its time.
        change(&mut due, later + SECOND, false, &["never", "other"]);
        due.published();
        let then = later + 2 * SECOND;
        change(&mut due, then, false, &["never", "other", "web"]);
        assert_eq!(due.at(), Some(then + POLICY_WAIT));
        change(&mut due, then + SECOND / 2, false, &["never", "other"]);
        assert_eq!(due.at(), Some(later + SECOND + POLICY_WAIT));
    }

    #[test]
    fn the_list_of_missing_policies_is_bounded_and_forgets() {
        let (mut due, start) = (Due::default(), Instant::now());
        let workloads: Vec<_> = (0..2 * MAX_MISSING).map(|n| n.to_string()).collect();
        let workloads: Vec<_> = workloads.iter().map(String::as_str).collect();
        change(&mut due, start, false, &workloads);
        assert_eq!(due.missing.0.len(), MAX_MISSING);
        due.published();
        let later = start + 2 * POLICY_WAIT;
        change(&mut due, later, false, &workloads);
        assert_eq!(due.at(), Some(later + SETTLE), "the same ones are listed");
        change(&mut due, later, false, &[]);
        assert!(due.missing.0.is_empty());
    }

    proptest! {
        #[test]
        fn each_policy_is_waited_for_once_and_no_change_longer(
            changes in prop::collection::vec((0..3000_u64, any::<bool>(), any::<[bool; 3]>()), 1..50),
        ) {
            let (mut due, mut now, mut first) = (Due::default(), Instant::now(), None);
            let mut since = [None; 3];
            for (pause, is_awaited, are_missing) in changes {
                now += Duration::from_millis(pause);
                if due.at().is_some_and(|at| at <= now) {
                    due.published();
                    first = None;
                }
                let first = *first.get_or_insert(now);
                for (since, is_missing) in since.iter_mut().zip(are_missing) {
                    *since = is_missing.then(|| since.unwrap_or(now));
                }
                let missing = ["a", "b", "c"].into_iter().zip(are_missing);
                let missing: Vec<_> = missing.filter(|one| one.1).map(|one| one.0).collect();
                change(&mut due, now, is_awaited, &missing);
                let at = due.at().unwrap();
                let last = first + POLICY_WAIT;
                let settled = if is_awaited { first } else { first + SETTLE };
                prop_assert!(at >= settled && at <= last, "{:?}", at - first);
                let waits = since.into_iter().flatten().map(|since| since + POLICY_WAIT);
                let waits: Vec<_> = waits.collect();
                prop_assert!(waits.iter().all(|end| at >= last.min(*end)), "each has its own wait");
                prop_assert!(at == settled || waits.iter().any(|end| at <= *end), "once");
            }
        }
    }
}
