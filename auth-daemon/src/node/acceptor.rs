//! Accepts connections from the pods' listeners and distributes them to the workers.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::AbortHandle,
};

use super::{Workers, connection_tasks::ConnectionTasks};
use crate::proxy::{Node, Pod, inbound, outbound};
use auth_datapath::sockets::canonical;
use auth_support::connection_limit::ConnectionPermit;

/// Interval at which a drain checks whether all connections have ended.
pub(super) const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Pause after an `accept` that failed for lack of a resource, such as file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// One of a pod's listeners.
#[derive(Clone, Copy)]
pub(super) enum Side {
    /// Accepts the connections that the pod opens.
    Outbound,
    /// Accepts the connections to the pod.
    Inbound,
}

/// Serves the connections of one of `pod`'s listeners. If the task is aborted, all its connections are dropped.
pub(super) fn accept(
    node: &Arc<Node>,
    pod: &Arc<Pod>,
    workers: &Arc<Workers>,
    listener: std::net::TcpListener,
    side: Side,
) -> AbortHandle {
    let acceptor = Acceptor {
        node: node.clone(),
        pod: pod.clone(),
        side,
        workers: workers.clone(),
        connections: ConnectionTasks::default(),
    };
    let draining = node.draining.subscribe();
    let open = node.listening.subscribe();
    let watch = async move {
        match TcpListener::from_std(listener) {
            Ok(listener) => acceptor.run(listener, draining, open).await,
            Err(error) => tracing::error!(%error, "cannot watch a listener"),
        }
    };
    workers.next().runtime.spawn(watch).abort_handle()
}

/// Accepts the connections of one of a pod's listeners. Dropping it drops all its connections.
struct Acceptor {
    node: Arc<Node>,
    pod: Arc<Pod>,
    side: Side,
    workers: Arc<Workers>,
    connections: ConnectionTasks,
}

impl Acceptor {
    /// Accepts until told to drain, then only waits for the open connections.
    async fn run(
        self,
        listener: TcpListener,
        mut draining: watch::Receiver<bool>,
        open: watch::Receiver<()>,
    ) {
        while !*draining.borrow() {
            tokio::select! {
                accepted = listener.accept() => {
                    if let Err(error) = accepted.and_then(|(tcp, from)| self.take(tcp, from)) {
                        tracing::warn!(
                            pod = %self.pod.workload.name, %error, "cannot accept a connection"
                        );
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
                _ = draining.changed() => {}
            }
        }
        drop(listener);
        drop(open);
        while !self.connections.is_empty() {
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    /// Gives a connection to the worker that has the fewest connections.
    fn take(&self, tcp: TcpStream, from: SocketAddr) -> io::Result<()> {
        let from = canonical(from);
        let place = match self.side {
            Side::Outbound => None,
            Side::Inbound => match self.pod.handshakes.admit(from.ip()) {
                Some(place) => Some(place),
                None => {
                    tracing::warn!(
                        pod = %self.pod.workload.name, client = %from,
                        "too many handshakes at once; refused"
                    );
                    return Ok(());
                }
            },
        };
        let worker = self.workers.idlest();
        let load = worker.count();
        let (node, pod) = (self.node.clone(), self.pod.clone());
        if worker.is_current() {
            self.connections.spawn(&worker.runtime, async move {
                serve(&node, &pod, tcp, from, place).await;
                drop(load);
            });
            return Ok(());
        }
        // Register the socket with the worker's runtime, so that it wakes the worker's thread.
        let tcp = tcp.into_std()?;
        let elsewhere = async move {
            match TcpStream::from_std(tcp) {
                Ok(tcp) => serve(&node, &pod, tcp, from, place).await,
                Err(error) => tracing::warn!(
                    pod = %pod.workload.name, client = %from, %error, "cannot serve a connection"
                ),
            }
            drop(load);
        };
        self.connections.spawn(&worker.runtime, elsewhere);
        Ok(())
    }
}

/// Serves one connection: outbound, or inbound if there is a `place` among the handshakes. Each future is boxed by
/// itself, so that neither takes as much memory as the larger one.
async fn serve(
    node: &Node,
    pod: &Pod,
    tcp: TcpStream,
    from: SocketAddr,
    place: Option<ConnectionPermit>,
) {
    match place {
        None => Box::pin(outbound::serve(node, pod, tcp, from)).await,
        Some(place) => Box::pin(inbound::serve(node, pod, tcp, from, place)).await,
    }
}
