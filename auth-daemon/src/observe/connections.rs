//! The open connections of this node. Each writes a line to the access log when it ends.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Instant, SystemTime},
};

use futures_util::future::AbortHandle;
use rustls::NamedGroup;
use serde::Serialize;

use super::{
    access_limits::AccessLimits,
    access_log::{Direction, Finished, Outcome, Path},
    flows::Flows,
    istio::IstioMetrics,
    judgement::Judgement,
    pairs::{Counts, Entry, MAX_OPEN_ENTRIES, Pairs, Progress},
    sharded::Sharded,
    totals::Totals,
};
use crate::config::{AccessLog, Observe};
use auth_mesh::{Identity, ObjectName, Registry, Workload, policy::Verdict};
use auth_tunnel::{Counters, tls::svid::Svid};

/// An open connection.
#[derive(Debug)]
pub struct Connection {
    /// Cookie of the pod's netns.
    pod: u64,
    direction: Direction,
    started: Instant,
    /// Bytes so far.
    pub counters: Arc<Counters>,
    /// Whether [`Counters::up`] counts bytes to the server.
    up_is_to_server: bool,
    details: Mutex<Details>,
    /// `None` once it has ended. Lock it before `details`, never while holding `details`.
    progress: Mutex<Option<Progress>>,
    /// Ends the connection's task.
    cut: AbortHandle,
    /// Why `cut` was used.
    cut_because: OnceLock<String>,
}

/// What is known about a connection so far.
#[derive(Clone, Debug)]
pub struct Details {
    /// The client's address. Inbound, it is the tunnel's source address until CONNECT is verified.
    pub client: SocketAddr,
    /// The address that the client dialled.
    pub destination: Option<SocketAddr>,
    /// The service that the destination belongs to.
    pub service: Option<Arc<ObjectName>>,
    /// The endpoint that was chosen.
    pub endpoint: Option<SocketAddr>,
    /// The pod at the endpoint, if it was one of a remote cluster when it was chosen.
    pub remote_server: Option<Arc<Workload>>,
    /// Cookie of the netns that the server is in, if it is a pod of this node. Its policies judge the connection, whatever
    /// address of the pod the endpoint is.
    pub server_netns: Option<u64>,
    /// The client's SPIFFE ID.
    pub client_identity: Option<Identity>,
    /// The server's SPIFFE ID.
    pub server_identity: Option<Identity>,
    /// The certificate that the tunnel's peer presented.
    pub peer: Option<Arc<Svid>>,
    /// The TLS key exchange of the tunnel.
    pub key_exchange: Option<NamedGroup>,
    /// How it reaches the server.
    pub path: Path,
    /// What policies said about it.
    pub judgement: Judgement,
}

/// The open connections of this node.
#[derive(Debug)]
pub struct OpenConnections {
    registry: Arc<Registry>,
    /// By number.
    connections: Sharded<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    limits: AccessLimits,
    access_log: AccessLog,
    observe: Observe,
    /// Counters of connections that have ended.
    pub totals: Totals,
    /// Those that ended last.
    pub flows: Flows,
    /// Which workloads call each other.
    pub pairs: Pairs,
    /// The same under Istio's labels, if the configuration wants it.
    pub(crate) istio: Option<Arc<IstioMetrics>>,
}

impl OpenConnections {
    /// There are none yet. `registry` names the pods at their ends.
    pub fn new(registry: Arc<Registry>, access_log: AccessLog, observe: Observe) -> Self {
        Self {
            registry,
            connections: Sharded::default(),
            next: AtomicU64::default(),
            limits: AccessLimits::default(),
            access_log,
            observe,
            totals: Totals::default(),
            flows: Flows::default(),
            pairs: Pairs::default(),
            istio: None,
        }
    }

    /// Adds a connection from `client` to or from the pod whose netns has the cookie `pod`. Its access log line is written when
    /// the guard is finished or dropped. `cut` ends the task that holds the guard.
    pub fn open(
        &self,
        direction: Direction,
        pod: u64,
        client: SocketAddr,
        cut: AbortHandle,
    ) -> Guard<'_> {
        self.insert(Connection {
            pod,
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
                remote_server: None,
                server_netns: None,
                client_identity: None,
                server_identity: None,
                peer: None,
                key_exchange: None,
                path: Path::Tunnel,
                judgement: Judgement::default(),
            }),
            progress: Mutex::new(Some(Progress::default())),
            cut,
            cut_because: OnceLock::new(),
        })
    }

    fn insert(&self, connection: Connection) -> Guard<'_> {
        let connection = Arc::new(connection);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.connections.of(id).insert(id, connection.clone());
        Guard {
            open: self,
            id,
            connection,
            finished: false,
        }
    }

    /// Counts a connection that has ended. Writes its access log line and keeps it for `auth-daemon observe`, unless there
    /// were many like it a moment ago.
    pub(crate) fn log(&self, finished: Finished) {
        self.end(finished, Progress::default());
    }

    fn end(&self, finished: Finished, mut progress: Progress) {
        self.totals.count(&finished);
        let is_observed = self.observe == Observe::Connections;
        if is_observed {
            self.pairs.count(&finished, &mut progress);
        }
        if self.limits.pass(&finished, Instant::now()) {
            finished.write(self.access_log);
            if is_observed {
                self.flows.add(finished, &self.registry.load());
            }
        }
    }

    /// Logs how many lines the access log has left out. `name` returns the name of the pod whose netns has a cookie.
    pub(crate) fn tell_left_out(&self, name: impl Fn(u64) -> Option<ObjectName>) {
        self.limits.tell(Instant::now(), name);
        self.settle_ended();
    }

    fn settle_ended(&self) {
        let snapshot = self.registry.snapshot();
        let istio = self.istio.as_deref();
        self.pairs.settle(&snapshot, SystemTime::now(), istio);
    }

    /// Makes [`Self::pairs`] current, open connections included.
    pub(crate) fn settle_pairs(&self) {
        self.settle_ended();
        let mut open: HashMap<Entry, (u64, Counts)> = HashMap::new();
        let mut anonymous = 0;
        for connection in self.all() {
            let mut progress = connection.progress();
            let Some(progress) = progress.as_mut().filter(|open| open.is_established()) else {
                continue;
            };
            let details = connection.lock();
            let entry = Entry::of_open(connection.pod, connection.direction, &details);
            if !open.contains_key(&entry) {
                let is_anonymous = entry.identity.is_none();
                let is_full = open.len() >= MAX_OPEN_ENTRIES
                    || is_anonymous && anonymous >= MAX_OPEN_ENTRIES / 4;
                // The others count when they end.
                if is_full {
                    continue;
                }
                anonymous += usize::from(is_anonymous);
            }
            let (number, counts) = open.entry(entry).or_default();
            *number += 1;
            let (to_server, to_client) = connection.bytes();
            counts.advance(progress, to_server, to_client);
            if counts.service.is_none() {
                counts.service = details.service.as_ref().map(ToString::to_string);
            }
        }
        let snapshot = self.registry.snapshot();
        let istio = self.istio.as_deref();
        self.pairs
            .settle_open(open, &snapshot, SystemTime::now(), istio);
    }

    /// Makes the metrics current. Only Istio's count open connections.
    pub(crate) fn settle_metrics(&self) {
        match self.istio {
            Some(_) => self.settle_pairs(),
            None => self.settle_ended(),
        }
    }

    /// Resets the connections for which `condition` returns a reason, at both ends. The reason goes to the access log.
    pub fn cut(&self, mut condition: impl FnMut(Direction, &Details) -> Option<String>) {
        for connection in self.all() {
            let reason = condition(connection.direction, &connection.lock());
            if let Some(reason) = reason {
                let _ = connection.cut_because.set(reason);
                connection.cut.abort();
            }
        }
    }

    /// The number of open connections.
    pub fn count(&self) -> usize {
        self.connections.each().map(|part| part.len()).sum()
    }

    /// All open connections, oldest first.
    pub fn list(&self) -> Vec<ConnectionStatus> {
        let mut connections = self.all();
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
                    endpoint: details.endpoint,
                    path: details.path.name(),
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

    fn all(&self) -> Vec<Arc<Connection>> {
        let parts = self.connections.each();
        parts
            .flat_map(|part| part.values().cloned().collect::<Vec<_>>())
            .collect()
    }
}

/// An open connection, for `auth-daemon status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionStatus {
    /// Whether the pod is the client or the server.
    pub direction: Direction,
    /// The client's address.
    pub client: SocketAddr,
    /// The address that it dialled.
    pub destination: Option<SocketAddr>,
    /// The server's own address and port.
    pub endpoint: Option<SocketAddr>,
    /// How it reaches the server, as in the access log.
    pub path: &'static str,
    /// The service that the destination belongs to.
    pub service: Option<String>,
    /// The client's SPIFFE ID.
    pub client_identity: Option<String>,
    /// The server's SPIFFE ID.
    pub server_identity: Option<String>,
    /// Bytes from client to server.
    pub bytes_to_server: u64,
    /// Bytes from server to client.
    pub bytes_to_client: u64,
    /// Age in seconds.
    pub seconds: f64,
}

impl Connection {
    fn details(&self) -> Details {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Details> {
        self.details.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self) -> MutexGuard<'_, Option<Progress>> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes to the server and to the client.
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

/// An entry in [`OpenConnections`]. If it is dropped unfinished, the task was ended from outside, and the line says so.
#[derive(Debug)]
pub struct Guard<'a> {
    open: &'a OpenConnections,
    id: u64,
    connection: Arc<Connection>,
    finished: bool,
}

impl<'a> Guard<'a> {
    /// Adds the server's side of an outbound connection to the pod of this node whose netns has the cookie `server`.
    pub fn servers_side(&self, server: u64) -> Guard<'a> {
        let connection = &self.connection;
        let details = connection.details();
        let progress = connection.progress().as_ref().map(Progress::of_other_side);
        self.open.insert(Connection {
            pod: server,
            direction: Direction::Inbound,
            started: connection.started,
            counters: connection.counters.clone(),
            up_is_to_server: connection.up_is_to_server,
            details: Mutex::new(Details {
                service: None,
                ..details
            }),
            progress: Mutex::new(Some(progress.unwrap_or_default())),
            cut: connection.cut.clone(),
            cut_because: OnceLock::new(),
        })
    }

    /// Updates the details.
    pub fn learn(&self, change: impl FnOnce(&mut Details)) {
        change(&mut self.connection.lock());
    }

    /// Records that the server's app has accepted the connection. From then on, its ends and its path stay as they are.
    pub fn established(&self) {
        if let Some(progress) = self.connection.progress().as_mut() {
            let key_exchange = self.connection.lock().key_exchange;
            progress.establish(self.connection.started.elapsed(), key_exchange);
        }
    }

    /// Records what policies said about the connection, and counts what they deny or would deny.
    pub(crate) fn judged(&self, verdict: &Verdict) {
        self.learn(|details| details.judgement = verdict.into());
        self.open.totals.count_verdict(verdict);
    }

    /// The byte counters.
    pub fn counters(&self) -> &Counters {
        &self.connection.counters
    }

    /// Writes the access log line. `reason` is empty for [`Outcome::Ok`].
    pub fn finish(mut self, outcome: Outcome, reason: impl fmt::Display) {
        self.write(outcome, &reason);
    }

    /// Writes no line, because the connection carries others, which have their own.
    pub(crate) fn discard(mut self) {
        self.finished = true;
    }

    fn write(&mut self, outcome: Outcome, reason: &dyn fmt::Display) {
        self.finished = true;
        let connection = &self.connection;
        // First, so that it is not counted as open while its details are taken.
        let progress = connection.progress().take();
        let (bytes_to_server, bytes_to_client) = connection.bytes();
        let mut details = connection.lock();
        let finished = Finished {
            pod: connection.pod,
            direction: connection.direction,
            path: details.path,
            client: details.client,
            destination: details.destination,
            endpoint: details.endpoint,
            service: details.service.take(),
            client_identity: details.client_identity.take(),
            server_identity: details.server_identity.take(),
            bytes_to_server,
            bytes_to_client,
            duration: connection.started.elapsed(),
            outcome,
            reason: reason.to_string(),
            judgement: std::mem::take(&mut details.judgement),
            client_person: details.peer.take().and_then(|peer| peer.person.clone()),
        };
        drop(details);
        self.open.end(finished, progress.unwrap_or_default());
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
        self.open.connections.of(self.id).remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_connection_is_counted_once_it_is_established_and_each_byte_once() {
        let open = OpenConnections::new(Arc::default(), AccessLog::default(), Observe::default());
        let (cut, _) = AbortHandle::new_pair();
        let access = open.open(Direction::Outbound, 1, ([10, 0, 0, 1], 4000).into(), cut);
        access.learn(|details| details.endpoint = Some(([10, 0, 0, 2], 8080).into()));
        let pairs = || {
            open.settle_pairs();
            open.pairs.answer("n", Vec::new()).pairs
        };
        assert_eq!(pairs(), []);

        access.established();
        access.counters().up.fetch_add(5, Ordering::Relaxed);
        for _ in 0..2 {
            let [pair] = &pairs()[..] else { panic!() };
            let counts = &pair.counts;
            assert_eq!((pair.open, counts.opened, counts.connections), (1, 1, 0));
            assert_eq!((counts.bytes_to_server, counts.bytes_to_client), (5, 0));
            assert!(counts.connect_times.percentile(50).is_some());
        }

        access.counters().up.fetch_add(2, Ordering::Relaxed);
        access.finish(Outcome::Ok, "");
        let [pair] = &pairs()[..] else { panic!() };
        let counts = &pair.counts;
        assert_eq!((pair.open, counts.opened, counts.connections), (0, 1, 1));
        assert_eq!(counts.bytes_to_server, 7);
    }
}
