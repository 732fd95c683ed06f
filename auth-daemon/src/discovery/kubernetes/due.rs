//! When the state of the cluster is published. Pure: the time comes from the caller.

use std::time::Duration;

use tokio::time::Instant;

use super::SETTLE;

/// How long the first publication waits for remote clusters, after the own cluster has been read. Before it, pods of this node
/// reach nothing new, so an API server that does not answer must not hold it up for long. One that answers sends the pods of
/// all but the largest clusters in that time.
pub(super) const REMOTE_WAIT: Duration = Duration::from_secs(10);

/// When the next publication is due.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// Whether anything has changed since the last publication.
    has_changed: bool,
    at: Option<Instant>,
    /// Until when the first publication waits for remote clusters.
    remote_by: Option<Instant>,
    is_published: bool,
}

impl Due {
    /// Returns when to publish. `None`: not before something else happens.
    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// Notes what has happened at `now`: whether the state has changed, whether the own cluster has been read, and whether
    /// remote clusters need not be waited for.
    pub(super) fn update(
        &mut self,
        now: Instant,
        has_changed: bool,
        is_read: bool,
        is_remote_settled: impl FnOnce() -> bool,
    ) {
        self.has_changed |= has_changed;
        if !self.has_changed || !is_read {
            return;
        }
        let by = match self.is_published || is_remote_settled() {
            true => now + SETTLE,
            false => *self.remote_by.get_or_insert(now + REMOTE_WAIT),
        };
        self.at = Some(self.at.map_or(by, |at| at.min(by)));
    }

    /// Notes that everything is published. Returns whether it is for the first time.
    pub(super) fn published(&mut self) -> bool {
        (self.has_changed, self.at) = (false, None);
        !std::mem::replace(&mut self.is_published, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_first_publication_waits_for_remote_clusters_but_not_for_long() {
        let start = Instant::now();
        let mut due = Due::default();
        due.update(start, true, false, || true);
        assert_eq!(due.at(), None, "the own cluster is not read");
        due.update(start + SECOND, false, true, || false);
        let late = start + SECOND + REMOTE_WAIT;
        assert_eq!(due.at(), Some(late));
        due.update(start + 2 * SECOND, true, true, || false);
        assert_eq!(due.at(), Some(late), "changes extend nothing");
        due.update(start + 3 * SECOND, false, true, || true);
        assert_eq!(due.at(), Some(start + 3 * SECOND + SETTLE));
    }

    #[test]
    fn later_ones_wait_for_nothing() {
        let start = Instant::now();
        let mut due = Due::default();
        due.update(start, true, true, || true);
        assert!(due.published() && due.at().is_none());
        due.update(start + SECOND, false, true, || false);
        assert_eq!(due.at(), None, "nothing has changed");
        for offset in [Duration::ZERO, SETTLE] {
            due.update(start + SECOND + offset, true, true, || false);
            assert_eq!(due.at(), Some(start + SECOND + SETTLE));
        }
        assert!(!due.published());
    }
}
