//! The access log: one line for each connection, written when it ends, within the limits of `access_limits`.

mod opentelemetry;

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use auth_mesh::{Identity, ObjectName};
use serde::{Deserialize, Serialize};

use super::{judgement::Judgement, log_writer};
use crate::config::{AccessFields, AccessLog};

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
    pub(crate) service: Option<Arc<ObjectName>>,
    pub(crate) client_identity: Option<Identity>,
    pub(crate) server_identity: Option<Identity>,
    pub(crate) bytes_to_server: u64,
    pub(crate) bytes_to_client: u64,
    pub(crate) duration: Duration,
    pub(crate) outcome: Outcome,
    /// Empty for [`Outcome::Ok`].
    pub(crate) reason: String,
    pub(crate) judgement: Judgement,
    /// The person who acts as the client, from its certificate.
    pub(crate) client_person: Option<Arc<str>>,
}

impl Finished {
    /// Whether it was allowed, and would not be if all dry-run policies were enforced.
    pub(crate) fn would_be_denied(&self) -> bool {
        self.outcome != Outcome::Refused && self.judgement.would_be_denied
    }

    /// Writes the line, unless `settings` leave it out.
    pub(super) fn write(&self, settings: AccessLog) {
        let write = || match settings.fields {
            AccessFields::Daemon => self.write_own(),
            AccessFields::OpenTelemetry => self.write_opentelemetry(),
        };
        if self.is_wanted() {
            write();
        } else if settings.sample.draw() {
            log_writer::yielding(write);
        }
    }

    /// Whether its line is wanted whatever the sample is.
    fn is_wanted(&self) -> bool {
        self.outcome != Outcome::Ok || self.judgement.is_audited || self.judgement.would_be_denied
    }

    /// Writes the line with the daemon's own names.
    fn write_own(&self) {
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
            policy = self.judgement.policies.as_deref(),
            client_person = self.client_person.as_deref(),
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

#[cfg(test)]
impl Finished {
    /// A connection from 10.0.0.1 that ended in order.
    pub(super) fn example() -> Self {
        Self {
            pod: 1,
            direction: Direction::Inbound,
            path: Path::Tunnel,
            client: ([10, 0, 0, 1], 4000).into(),
            destination: None,
            endpoint: None,
            service: None,
            client_identity: None,
            server_identity: None,
            bytes_to_server: 3,
            bytes_to_client: 4,
            duration: Duration::from_millis(5),
            outcome: Outcome::Ok,
            reason: String::new(),
            judgement: Judgement::default(),
            client_person: None,
        }
    }
}
