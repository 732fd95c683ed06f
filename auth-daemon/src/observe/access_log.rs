//! The access log: one line for each connection, written when it ends, within the limits of `access_limits`.

use std::{fmt, net::SocketAddr, time::Duration};

use auth_mesh::{Identity, ObjectName};
use serde::{Deserialize, Serialize};

/// Whether a pod of this node is the client or the server of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The pod is the client.
    Outbound,
    /// The pod is the server.
    Inbound,
}

/// How a connection reaches the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// Mutual TLS, with our own framing.
    Tunnel,
    /// Mutual TLS, with HBONE.
    Hbone,
    /// Without TLS, as PERMISSIVE allows.
    Plaintext,
    /// To the pod itself, through a service.
    Itself,
    /// Between two pods of this node, without TLS.
    SameNode,
}

/// How a connection ended, in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Both sides ended it in order.
    Ok,
    /// It was never established.
    Refused,
    /// It was reset.
    Reset,
}

impl Direction {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl Path {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Hbone => "hbone",
            Self::Plaintext => "plaintext",
            Self::Itself => "self",
            Self::SameNode => "same-node",
        }
    }
}

impl Outcome {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Reset => "reset",
        }
    }
}

/// What the access log says about a connection.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Cookie of the netns of the pod on this node whose line it is.
    pub(crate) pod: u64,
    pub(crate) direction: Direction,
    pub(crate) path: Path,
    pub(crate) client: SocketAddr,
    pub(crate) destination: Option<SocketAddr>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) service: Option<ObjectName>,
    pub(crate) client_identity: Option<Identity>,
    pub(crate) server_identity: Option<Identity>,
    pub(crate) bytes_to_server: u64,
    pub(crate) bytes_to_client: u64,
    pub(crate) duration: Duration,
    pub(crate) outcome: Outcome,
    /// Empty for [`Outcome::Ok`].
    pub(crate) reason: String,
    /// The policies that decided, or that audited it.
    pub(crate) policy: Option<String>,
}

/// How [`Finished::policy`] begins to tell that dry-run policies would deny a connection.
pub(crate) const DRY_RUN: &str = "dry run: ";

impl Finished {
    /// Whether it was allowed, and would not be if all dry-run policies were enforced.
    pub(crate) fn would_be_denied(&self) -> bool {
        let told = self
            .policy
            .as_deref()
            .and_then(|told| told.rsplit_once(DRY_RUN));
        self.outcome != Outcome::Refused
            && told.is_some_and(|(_, decision)| decision.starts_with("denied"))
    }

    /// Writes the line.
    pub(super) fn write(&self) {
        tracing::info!(
            target: "access",
            direction = self.direction.name(),
            path = self.path.name(),
            client = %Shown(Some(&self.client)),
            client_identity = %Shown(self.client_identity.as_ref()),
            destination = %Shown(self.destination.as_ref()),
            endpoint = %Shown(self.endpoint.as_ref()),
            service = %Shown(self.service.as_ref()),
            server_identity = %Shown(self.server_identity.as_ref()),
            bytes_to_server = self.bytes_to_server,
            bytes_to_client = self.bytes_to_client,
            duration_ms = self.duration.as_millis() as u64,
            result = self.outcome.name(),
            reason = %self.reason,
            policy = self.policy.as_deref(),
            "connection"
        );
    }
}

/// Shows a value, or nothing for `None`. It writes one string, because the log escapes each fragment separately and an
/// address consists of a dozen.
struct Shown<'a, T>(Option<&'a T>);

impl<T: fmt::Display> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => f.write_str(&value.to_string()),
            None => Ok(()),
        }
    }
}
