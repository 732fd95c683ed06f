//! When the state of the mesh is published. Pure: the time comes from the caller.

use std::time::Duration;

use tokio::time::Instant;

use crate::discovery::kubernetes::SETTLE;

/// How long a workload that names a new policy waits for that policy. istiod sends it right after the workload; published
/// between the two, the workload would refuse everything for that moment, and end its open connections.
const POLICY_WAIT: Duration = Duration::from_secs(2);

/// When the next publication is due.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// The first change since the last publication.
    changed: Option<Instant>,
    at: Option<Instant>,
    /// Until when missing policies are waited for. It stays while one is missing, so that one which never comes delays a
    /// single publication.
    policies_by: Option<Instant>,
}

impl Due {
    /// Returns when to publish. `None` if nothing has changed since the last publication.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// Notes a change at `now`. `is_awaited` says whether connections wait for the publication, and `lacks_policies` whether
    /// a workload names a policy that has not arrived. All times begin with the first change: further ones delay nothing.
    pub(super) fn changed(&mut self, now: Instant, is_awaited: bool, lacks_policies: bool) {
        let changed = *self.changed.get_or_insert(now);
        let settled = match is_awaited {
            true => changed,
            false => changed + SETTLE,
        };
        let by = self.policies_by.unwrap_or(changed + POLICY_WAIT);
        self.policies_by = lacks_policies.then_some(by);
        self.at = Some(self.policies_by.map_or(settled, |by| by.max(settled)));
    }

    /// Notes that everything is published.
    pub(super) fn published(&mut self) {
        (self.changed, self.at) = (None, None);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn changes_gather_and_connections_do_not_wait() {
        let (mut due, start) = (Due::default(), Instant::now());
        assert_eq!(due.at(), None);
        due.changed(start, false, false);
        due.changed(start + SETTLE / 2, false, false);
        assert_eq!(due.at(), Some(start + SETTLE));
        due.changed(start + SETTLE / 2, true, false);
        assert_eq!(due.at(), Some(start));
        due.published();
        assert_eq!(due.at(), None);
    }

    #[test]
    fn a_workload_waits_for_its_policy() {
        let (mut due, start) = (Due::default(), Instant::now());
        due.changed(start, true, true);
        assert_eq!(due.at(), Some(start + POLICY_WAIT));
        due.changed(start + SECOND, false, false);
        assert_eq!(due.at(), Some(start + SETTLE), "it has arrived");
    }

    #[test]
    fn a_policy_that_never_comes_delays_one_publication() {
        let (mut due, start) = (Due::default(), Instant::now());
        due.changed(start, false, true);
        due.published();
        let later = start + 2 * POLICY_WAIT;
        due.changed(later, false, true);
        assert_eq!(due.at(), Some(later + SETTLE));
        due.published();
        due.changed(later + SECOND, false, false);
        due.published();
        due.changed(later + 2 * SECOND, false, true);
        let by = later + 2 * SECOND + POLICY_WAIT;
        assert_eq!(due.at(), Some(by), "another one");
    }

    proptest! {
        #[test]
        fn no_change_waits_longer_than_for_a_policy(
            changes in prop::collection::vec((0..3000_u64, any::<bool>(), any::<bool>()), 1..50),
        ) {
            let (mut due, mut now, mut first) = (Due::default(), Instant::now(), None);
            for (pause, is_awaited, lacks_policies) in changes {
                now += Duration::from_millis(pause);
                if due.at().is_some_and(|at| at <= now) {
                    due.published();
                    first = None;
                }
                let first = *first.get_or_insert(now);
                due.changed(now, is_awaited, lacks_policies);
                let at = due.at().unwrap();
                prop_assert!(at >= first && at <= first + POLICY_WAIT, "{:?}", at - first);
            }
        }
    }
}
