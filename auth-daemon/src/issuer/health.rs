//! Whether the CA answers.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde::Serialize;

use auth_tunnel::tls::{rfc3339, unix_seconds};

/// The outcome of the last contact with the CA.
#[derive(Debug, Default)]
pub struct CaHealth(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    answered: Option<SystemTime>,
    failed: Option<(SystemTime, String)>,
    /// Whether the trust watch is open. `None` if the CA has none.
    watch: Option<bool>,
    /// Whether the last request for a certificate failed.
    request_failed: bool,
    authentication: Authentication,
}

/// How the daemon proves to the CA which node it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(tag = "by", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub(super) enum Authentication {
    /// By a token.
    #[default]
    Token,
    /// By a join token: it has not joined yet.
    JoinToken,
    /// By the node's own certificate.
    Certificate {
        /// The name in it.
        node: String,
        /// UTC, in the format of RFC 3339.
        not_after: String,
    },
}

/// The CA's health, for `auth-daemon status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CaStatus {
    /// Whether the trust watch is open, or, if the CA has none, whether the last request for a certificate succeeded.
    pub reachable: bool,
    /// When it last answered: UTC, in the format of RFC 3339.
    pub answered: Option<String>,
    /// The last error, also if the CA has answered since.
    pub last_error: Option<String>,
    /// When that was.
    pub last_error_at: Option<String>,
    /// How the daemon proves which node it is.
    authentication: Authentication,
}

impl CaHealth {
    /// Records that a certificate was issued.
    pub(super) fn issued(&self) {
        let mut state = self.lock();
        state.answered = Some(SystemTime::now());
        state.request_failed = false;
    }

    /// Records that a certificate was not issued.
    pub(super) fn not_issued(&self, why: &str) {
        let mut state = self.lock();
        state.failed = Some((SystemTime::now(), why.to_owned()));
        state.request_failed = true;
    }

    /// Records what went wrong on this machine, and not with the CA.
    pub(super) fn failed_here(&self, why: &str) {
        self.lock().failed = Some((SystemTime::now(), why.to_owned()));
    }

    /// Records a message of the trust watch.
    pub(super) fn watched(&self) {
        let mut state = self.lock();
        state.answered = Some(SystemTime::now());
        state.watch = Some(true);
    }

    /// Records that the trust watch failed.
    pub(super) fn watch_failed(&self, why: &str) {
        let mut state = self.lock();
        state.failed = Some((SystemTime::now(), why.to_owned()));
        state.watch = Some(false);
    }

    /// Records how the daemon proves which node it is.
    pub(super) fn authenticated_by(&self, authentication: Authentication) {
        self.lock().authentication = authentication;
    }

    /// Records that the CA has no trust watch.
    pub(super) fn has_no_watch(&self) {
        self.lock().watch = None;
    }

    /// Returns the present state.
    pub fn status(&self) -> CaStatus {
        let state = self.lock();
        let text = |time: &SystemTime| rfc3339(unix_seconds(*time));
        CaStatus {
            reachable: state.watch.unwrap_or(!state.request_failed),
            answered: state.answered.as_ref().map(text),
            last_error: state.failed.as_ref().map(|(_, why)| why.clone()),
            authentication: state.authentication.clone(),
            last_error_at: state.failed.as_ref().map(|(at, _)| text(at)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watch_says_whether_the_ca_is_reachable_if_there_is_one() {
        let health = CaHealth::default();
        health.not_issued("down");
        assert!(!health.status().reachable);
        health.watched();
        assert!(health.status().reachable, "it refuses one identity");
        assert_eq!(health.status().last_error.as_deref(), Some("down"));
        health.watch_failed("gone");
        health.issued();
        assert!(!health.status().reachable);
        health.has_no_watch();
        assert!(health.status().reachable);
    }
}
