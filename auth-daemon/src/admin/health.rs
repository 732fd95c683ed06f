//! Health endpoints for probes. They answer from the daemon's start, also while another daemon serves the node.

use std::{
    fs, io,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::net::UnixListener;

use crate::{node::Pulse, proxy::Node};
use auth_mesh::Registry;
use auth_support::http_server::answer;

/// Path of the health socket. While two daemons share the node's addresses, each has its own socket.
pub const HEALTH_SOCKET: &str = "/run/auth-daemon/health.sock";
/// Path that reports whether the daemon serves its node, or is ready to take over as a standby.
pub const READY: &str = "/healthz/ready";
/// Path that reports whether the daemon is alive. If it is not, it should be restarted.
pub const LIVE: &str = "/healthz/live";

/// The daemon's health.
#[derive(Debug)]
pub struct Health {
    pulse: Pulse,
    registry: Arc<Registry>,
    stands_by: AtomicBool,
    node: OnceLock<Arc<Node>>,
}

impl Health {
    /// Creates the health of a daemon that has just started.
    pub fn new(pulse: Pulse, registry: Arc<Registry>) -> Self {
        Self {
            pulse,
            registry,
            stands_by: AtomicBool::new(false),
            node: OnceLock::new(),
        }
    }

    /// Records that another daemon serves the node.
    pub fn stand_by(&self) {
        self.stands_by.store(true, Ordering::Relaxed);
    }

    /// Records that this daemon serves the node.
    pub fn serve(&self, node: Arc<Node>) {
        // There is one.
        let _ = self.node.set(node);
    }

    fn ready(&self) -> Result<&'static str, &'static str> {
        match self.node.get() {
            Some(node) if node.is_ready() => Ok("ready\n"),
            Some(_) => Err("not ready: pods are being enrolled, or the daemon is draining\n"),
            None if !self.stands_by.load(Ordering::Relaxed) => {
                Err("not ready: the daemon is starting\n")
            }
            None if *self.registry.changes().borrow() == 0 => {
                Err("not ready: standing by, and no pods are known yet\n")
            }
            None => Ok("standing by: another daemon serves this node\n"),
        }
    }

    /// The answer itself shows that the control thread is alive.
    fn live(&self) -> Result<&'static str, String> {
        match self.pulse.stuck(Instant::now()) {
            None => Ok("live\n"),
            Some((thread, silence)) => Err(format!(
                "data-path-{thread} has been stuck for {} s\n",
                silence.as_secs()
            )),
        }
    }
}

fn response<T: Into<String>, E: Into<String>>(outcome: Result<T, E>) -> (StatusCode, String) {
    match outcome {
        Ok(answer) => (StatusCode::OK, answer.into()),
        Err(answer) => (StatusCode::SERVICE_UNAVAILABLE, answer.into()),
    }
}

pub(super) fn routes(health: Arc<Health>) -> Router {
    let ready = async |State(health): State<Arc<Health>>| response(health.ready());
    let live = async |State(health): State<Arc<Health>>| response(health.live());
    Router::new()
        .route(READY, get(ready))
        .route(LIVE, get(live))
        .with_state(health)
}

/// Opens [`HEALTH_SOCKET`], replacing the socket of a previous daemon.
pub(super) fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Serves the socket until the runtime ends.
pub(super) async fn serve(listener: UnixListener, health: Arc<Health>) {
    answer(listener, routes(health)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Workers;
    use auth_mesh::Snapshot;

    #[tokio::test]
    async fn a_standby_is_ready_once_pods_are_known() {
        let workers = Workers::start(2).unwrap();
        let registry = Arc::new(Registry::new());
        let health = Health::new(workers.pulse(), registry.clone());
        assert!(health.ready().is_err());
        health.stand_by();
        assert!(
            health
                .ready()
                .unwrap_err()
                .contains("no pods are known yet")
        );
        registry.publish(Snapshot::default());
        assert!(health.ready().unwrap().starts_with("standing by"));
        assert_eq!(health.live(), Ok("live\n"));
    }

    #[tokio::test]
    async fn each_daemon_has_a_socket_and_the_last_one_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/health.sock");
        let registry = Arc::new(Registry::new());
        let workers = Workers::start(1).unwrap();
        let health = Arc::new(Health::new(workers.pulse(), registry.clone()));
        drop(bind(&path).unwrap());
        let listener = bind(&path).unwrap();
        tokio::spawn(serve(listener, health.clone()));
        let ask = async |what: &'static str| {
            let path = path.clone();
            let asked = tokio::task::spawn_blocking(move || crate::cli::probe::ask(&path, what));
            asked.await.unwrap().unwrap()
        };
        let (ready, said) = ask(READY).await;
        assert!(
            !ready && said == "not ready: the daemon is starting\n",
            "{said}"
        );
        health.stand_by();
        registry.publish(Snapshot::default());
        let (ready, said) = ask(READY).await;
        assert!(ready && said.starts_with("standing by"), "{said}");
        assert_eq!(ask(LIVE).await, (true, "live\n".to_owned()));
        let (found, _) = ask("/healthz/other").await;
        assert!(!found);
    }
}
