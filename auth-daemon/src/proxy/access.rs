//! Connections under way, and the line that each leaves in the log when it ends.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::AbortHandle;
use serde::Serialize;

use super::Totals;
use auth_mesh::{Identity, ObjectName, policy::Decision};
use auth_tunnel::{Counters, tls::svid::Svid};

/// Whether the pod made the connection or got it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Made by a pod of this node.
    Outbound,
    /// Made to one.
    Inbound,
}

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Mutual TLS.
    Tunnel,
    /// Without TLS: PERMISSIVE.
    Plaintext,
    /// A pod that reached itself through a service.
    Itself,
    /// Nothing but this node's kernel: two pods of one node.
    SameNode,
}

/// A connection under way.
#[derive(Debug)]
pub struct Connection {
    direction: Direction,
    started: Instant,
    /// Bytes so far.
    pub counters: Arc<Counters>,
    /// Whether those that go up go to the server.
    up_is_to_server: bool,
    details: Mutex<Details>,
    /// Ends its task, and why it was used.
    cut: AbortHandle,
    cut_because: OnceLock<String>,
}

/// What is learnt of a connection on its way.
#[derive(Clone, Debug)]
pub struct Details {
    /// The client's own address; until that is known, the address that a tunnel comes from.
    pub client: SocketAddr,
    /// The address dialled.
    pub destination: Option<SocketAddr>,
    /// The service it belongs to.
    pub service: Option<ObjectName>,
    /// Where the connection went.
    pub endpoint: Option<SocketAddr>,
    /// Who called.
    pub client_identity: Option<Identity>,
    /// Who answered.
    pub server_identity: Option<Identity>,
    /// The certificate that the other end of its tunnel showed.
    pub peer: Option<Svid>,
    /// What carries it.
    pub path: Path,
    /// What policies had to say of it.
    pub policy: Option<String>,
}

/// How a connection ended, in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Both sides finished.
    Ok,
    /// It never came to be.
    Refused,
    /// It was cut.
    Reset,
}

/// The connections under way.
#[derive(Debug, Default)]
pub struct Live {
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    /// Those that have ended.
    pub totals: Totals,
}

impl Live {
    /// Notes a connection from `client`. It leaves a line in the log when the guard is finished or dropped. `cut` ends
    /// the task that holds the guard.
    pub fn open(&self, direction: Direction, client: SocketAddr, cut: AbortHandle) -> Guard<'_> {
        self.insert(Connection {
            direction,
            started: Instant::now(),
            counters: Arc::default(),
            // Inbound, the app here is the server: what it sends goes up the tunnel.
            up_is_to_server: direction == Direction::Outbound,
            details: Mutex::new(Details {
                client,
                destination: None,
                service: None,
                endpoint: None,
                client_identity: None,
                server_identity: None,
                peer: None,
                path: Path::Tunnel,
                policy: None,
            }),
            cut,
            cut_because: OnceLock::new(),
        })
    }

    fn insert(&self, connection: Connection) -> Guard<'_> {
        let connection = Arc::new(connection);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, connection.clone());
        Guard {
            live: self,
            id,
            connection,
            finished: false,
        }
    }

    /// Writes the line of a connection that has ended, and counts it.
    pub(super) fn log(&self, finished: &Finished) {
        finished.write();
        self.totals.count(finished);
    }

    /// Cuts those for which `condition` has a reason: they end with a RST at both ends, and a line that says it.
    pub fn cut(&self, condition: impl Fn(Direction, &Details) -> Option<String>) {
        let connections: Vec<_> = self.lock().values().cloned().collect();
        for connection in connections {
            let reason = condition(connection.direction, &connection.lock());
            if let Some(reason) = reason {
                let _ = connection.cut_because.set(reason);
                connection.cut.abort();
            }
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// All of them, oldest first.
    pub fn list(&self) -> Vec<ConnectionStatus> {
        let mut connections: Vec<_> = self.lock().values().cloned().collect();
        connections.sort_by_key(|connection| connection.started);
        connections
            .iter()
            .map(|connection| {
                let details = connection.details();
                let (to_server, to_client) = connection.bytes();
                ConnectionStatus {
                    direction: connection.direction,
                    client: details.client,
                    destination: details.destination,
                    service: details.service.map(|name| name.to_string()),
                    client_identity: details.client_identity.map(|id| id.to_string()),
                    server_identity: details.server_identity.map(|id| id.to_string()),
                    bytes_to_server: to_server,
                    bytes_to_client: to_client,
                    seconds: connection.started.elapsed().as_secs_f64(),
                }
            })
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection under way, for `auth-daemon status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionStatus {
    /// Made or got.
    pub direction: Direction,
    /// The client's own address.
    pub client: SocketAddr,
    /// The address it dialled.
    pub destination: Option<SocketAddr>,
    /// The service that belongs to.
    pub service: Option<String>,
    /// Who called.
    pub client_identity: Option<String>,
    /// Who answered.
    pub server_identity: Option<String>,
    /// From client to server.
    pub bytes_to_server: u64,
    /// From server to client.
    pub bytes_to_client: u64,
    /// Since it began.
    pub seconds: f64,
}

impl Connection {
    fn details(&self) -> Details {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Details> {
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To the server, to the client.
    fn bytes(&self) -> (u64, u64) {
        let up = self.counters.up.load(Ordering::Relaxed);
        let down = self.counters.down.load(Ordering::Relaxed);
        if self.up_is_to_server {
            (up, down)
        } else {
            (down, up)
        }
    }
}

/// A connection's place among the live ones. Dropped unfinished (the task was ended from outside), it says so.
#[derive(Debug)]
pub struct Guard<'a> {
    live: &'a Live,
    id: u64,
    connection: Arc<Connection>,
    finished: bool,
}

impl<'a> Guard<'a> {
    /// The same outbound connection once more, as its server's side sees it: it is in the hands of one daemon.
    pub fn servers_side(&self) -> Guard<'a> {
        let connection = &self.connection;
        let details = connection.details();
        self.live.insert(Connection {
            direction: Direction::Inbound,
            started: connection.started,
            counters: connection.counters.clone(),
            up_is_to_server: connection.up_is_to_server,
            details: Mutex::new(Details {
                service: None,
                ..details
            }),
            cut: connection.cut.clone(),
            cut_because: OnceLock::new(),
        })
    }

    /// Adds what was learnt.
    pub fn learn(&self, change: impl FnOnce(&mut Details)) {
        change(&mut self.connection.lock());
    }

    /// Counts that policies have denied it.
    pub(super) fn count_denied(&self, decision: &Decision) {
        self.live.totals.count_denied(decision);
    }

    /// Where bytes are counted.
    pub fn counters(&self) -> &Counters {
        &self.connection.counters
    }

    /// Writes the line. `reason` is empty for [`Outcome::Ok`].
    pub fn finish(mut self, outcome: Outcome, reason: impl fmt::Display) {
        self.write(outcome, &reason);
    }

    fn write(&mut self, outcome: Outcome, reason: &dyn fmt::Display) {
        self.finished = true;
        let connection = &self.connection;
        let details = connection.details();
        let (bytes_to_server, bytes_to_client) = connection.bytes();
        let finished = Finished {
            direction: connection.direction,
            path: details.path,
            client: details.client,
            destination: details.destination,
            endpoint: details.endpoint,
            service: details.service,
            client_identity: details.client_identity,
            server_identity: details.server_identity,
            bytes_to_server,
            bytes_to_client,
            duration: connection.started.elapsed(),
            outcome,
            reason: reason.to_string(),
            policy: details.policy,
        };
        self.live.log(&finished);
    }
}

impl Direction {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl Path {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Plaintext => "plaintext",
            Self::Itself => "self",
            Self::SameNode => "same-node",
        }
    }
}

impl Outcome {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Reset => "reset",
        }
    }
}

/// All that the log says of a connection.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) direction: Direction,
    pub(super) path: Path,
    pub(super) client: SocketAddr,
    pub(super) destination: Option<SocketAddr>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) service: Option<ObjectName>,
    pub(super) client_identity: Option<Identity>,
    pub(super) server_identity: Option<Identity>,
    pub(super) bytes_to_server: u64,
    pub(super) bytes_to_client: u64,
    pub(super) duration: Duration,
    pub(super) outcome: Outcome,
    /// Empty for [`Outcome::Ok`].
    pub(super) reason: String,
    /// What policies had to say of it.
    pub(super) policy: Option<String>,
}

impl Finished {
    fn write(&self) {
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

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.finished {
            let connection = self.connection.clone();
            let reason = if std::thread::panicking() {
                "internal error in the daemon; its log has the details"
            } else if let Some(reason) = connection.cut_because.get() {
                reason
            } else {
                "ended by this daemon: the pod left the mesh, or the daemon stops"
            };
            self.write(Outcome::Reset, &reason);
        }
        self.live.lock().remove(&self.id);
    }
}

/// Nothing, for what is not known. Written in one piece: what writes the log checks and escapes each piece by itself, and
/// an address has a dozen.
struct Shown<'a, T>(Option<&'a T>);

impl<T: fmt::Display> fmt::Display for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => f.write_str(&value.to_string()),
            None => Ok(()),
        }
    }
}
