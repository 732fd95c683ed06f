//! Accepts connections from the pods' listeners and distributes them to the workers.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::{AbortHandle, JoinSet},
};

use super::{Workers, connection_tasks::ConnectionTasks, workers::Worker};
use crate::{
    observe::{
        access_log::{Direction, Finished, Outcome, Path},
        judgement::Judgement,
        line_limit::LineLimit,
        refusals::Refusal,
    },
    proxy::{
        Node, Pod,
        handshakes::{Place, Source},
        inbound, outbound,
        shares::Permit,
        work::Work,
    },
};
use auth_datapath::sockets::canonical;

/// Interval at which a drain checks whether all connections have ended.
pub(super) const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Pause after an `accept` that failed for lack of a resource, such as file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Number of connections that a listener accepts before the worker's other tasks run.
const ACCEPTS_PER_TURN: u32 = 16;

/// A task that serves the connections of one of a pod's listeners. When this is dropped, it accepts no more, and
/// continues to serve those that it has accepted.
pub(super) struct Accepting {
    /// Aborting the task drops all its connections.
    pub(super) task: AbortHandle,
    stop: oneshot::Sender<Infallible>,
}

impl Accepting {
    /// Whether the task still accepts connections. It does not if the listener has died.
    pub(super) fn is_accepting(&self) -> bool {
        !self.stop.is_closed()
    }
}

/// One of a pod's listeners.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// Accepts the connections that the pod opens.
    Outbound,
    /// Accepts the connections to the pod.
    Inbound,
}

/// Serves the connections of one of `pod`'s listeners.
pub(super) fn accept(
    node: &Arc<Node>,
    pod: &Arc<Pod>,
    workers: &Arc<Workers>,
    listener: std::net::TcpListener,
    side: Side,
) -> Accepting {
    let work = match side {
        Side::Outbound => &pod.outbound_work,
        Side::Inbound => &pod.inbound_work,
    };
    let acceptor = Acceptor {
        node: node.clone(),
        pod: pod.clone(),
        side,
        workers: workers.clone(),
        connections: ConnectionTasks::new(work.clone()),
        work: work.clone(),
    };
    let draining = node.draining.subscribe();
    let open = node.listening.subscribe();
    let (stop, stopped) = oneshot::channel();
    let run = Arc::new(acceptor).run(listener, draining, open, stopped);
    let task = workers.next(false).runtime.spawn(run).abort_handle();
    Accepting { task, stop }
}

/// Accepts the connections of one of a pod's listeners. Dropping it drops all its connections.
struct Acceptor {
    node: Arc<Node>,
    pod: Arc<Pod>,
    side: Side,
    workers: Arc<Workers>,
    connections: ConnectionTasks,
    work: Arc<Work>,
}

impl Acceptor {
    /// Accepts until it has to drain or to stop, or until the listener dies. Then only waits for the open connections.
    async fn run(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        mut draining: watch::Receiver<bool>,
        open: watch::Receiver<()>,
        mut stopped: oneshot::Receiver<Infallible>,
    ) {
        let mut listener = Some(listener);
        let mut accepting = JoinSet::new();
        while !*draining.borrow_and_update() {
            if let Some(listener) = listener.take() {
                let of_busy = self.work.is_busy();
                let accept = self.clone().accept(listener, of_busy, open.clone());
                accepting.spawn_on(accept, &self.workers.next(of_busy).runtime);
            }
            tokio::select! {
                moving = accepting.join_next() => match moving {
                    Some(Ok(Some(moving))) => listener = Some(moving),
                    _ => break,
                },
                _ = &mut stopped => break,
                _ = draining.changed() => {}
            }
        }
        accepting.shutdown().await;
        drop((listener, open, stopped));
        while !self.connections.is_empty() {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    /// Accepts on this worker, which is one of those for busy listeners if `of_busy`. Returns the listener when it becomes busy,
    /// or quiet, and belongs on another worker. Returns `None` when it has died.
    async fn accept(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        of_busy: bool,
        _open: watch::Receiver<()>,
    ) -> Option<std::net::TcpListener> {
        let pod = &self.pod.workload.name;
        let unwatched = |error: io::Error| {
            tracing::error!(%pod, %error, "cannot watch a listener; retrying");
        };
        let listener = TcpListener::from_std(listener).map_err(unwatched).ok()?;
        let mut accepted_in_turn = 0;
        let mut failed = LineLimit::default();
        loop {
            let accepted = listener.accept().await;
            let is_busy = self.work.is_busy();
            if let Err(error) = accepted.and_then(|(tcp, from)| self.take(tcp, from, is_busy)) {
                if !auth_datapath::sockets::is_listening(&listener) {
                    tracing::error!(
                        %pod, %error, "a listener was closed in the pod's netns; it is opened again"
                    );
                    return None;
                }
                if let Some(failures) = failed.note(1, 1, Instant::now()) {
                    tracing::warn!(%pod, failures, %error, "cannot accept a connection");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            if is_busy != of_busy {
                return listener.into_std().map_err(unwatched).ok();
            }
            accepted_in_turn += 1;
            if accepted_in_turn == ACCEPTS_PER_TURN {
                accepted_in_turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    /// Gives a connection to the worker that has the fewest connections. Resets it if the pod or the peer holds its share.
    fn take(&self, tcp: TcpStream, from: SocketAddr, of_busy: bool) -> io::Result<()> {
        let from = canonical(from);
        let worker = self.workers.idlest(of_busy);
        let Admitted { permit, place } = match self.admit(from.ip(), worker) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.refuse(&tcp, from, refusal);
                return Ok(());
            }
        };
        let tcp = if worker.is_current() {
            tcp
        } else {
            // Register the socket with the worker's runtime, so that it wakes the worker's thread.
            let tcp = tcp.into_std()?;
            let _entered = worker.runtime.enter();
            TcpStream::from_std(tcp)?
        };
        let charged = (worker.count(), permit);
        let (node, pod) = (self.node.clone(), self.pod.clone());
        match place {
            None => {
                let outbound = outbound::serve(node, pod, tcp, from);
                self.connections.spawn(worker, charged, outbound);
            }
            Some(place) => {
                let inbound = inbound::serve(node, pod, tcp, from, place);
                self.connections.spawn(worker, charged, inbound);
            }
        }
        Ok(())
    }

    /// Counts and logs a refused connection.
    fn refuse(&self, tcp: &TcpStream, from: SocketAddr, refusal: Refusal) {
        let (node, workload) = (&self.node, &self.pod.workload);
        node.refusals.note(&workload.name, refusal, from);
        let identity = Some(workload.identity.clone());
        let local = tcp.local_addr().ok().map(canonical);
        let (direction, destination, endpoint, client_identity, server_identity) = match self.side {
            Side::Outbound => {
                let dialled = node.kernel.dialled(tcp);
                (Direction::Outbound, dialled, None, identity, None)
            }
            Side::Inbound => (Direction::Inbound, local, local, None, identity),
        };
        node.connections.log(Finished {
            pod: self.pod.enrolled.netns.cookie(),
            direction,
            path: Path::Tunnel,
            client: from,
            destination,
            endpoint,
            service: None,
            client_identity,
            server_identity,
            bytes_to_server: 0,
            bytes_to_client: 0,
            duration: Duration::ZERO,
            outcome: Outcome::Refused,
            reason: refusal.advice().to_owned(),
            judgement: Judgement::default(),
            client_person: None,
        });
    }

    /// Charges a connection from `peer`, which `worker` will serve, to the pod's shares.
    fn admit(&self, peer: IpAddr, worker: &Worker) -> Result<Admitted, Refusal> {
        match self.side {
            Side::Outbound => {
                let permit = self.pod.outbound.connection(None);
                Ok(Admitted {
                    permit: permit.map_err(|_| Refusal::Outbound)?,
                    place: None,
                })
            }
            Side::Inbound => {
                let source = Source::of(peer, &self.node.registry.snapshot());
                let permit = self.pod.inbound.connection(Some(source));
                let permit = permit.map_err(Refusal::from)?;
                let handshake = self.pod.handshakes.admit(source.address());
                let place = Some(Place {
                    source,
                    turns: worker.turns.clone(),
                    _permit: handshake.ok_or(Refusal::Handshakes)?,
                });
                Ok(Admitted { permit, place })
            }
        }
    }
}

/// What a connection is charged until it ends. An inbound one also counts as a handshake until its own is complete.
struct Admitted {
    permit: Permit,
    place: Option<Place>,
}
