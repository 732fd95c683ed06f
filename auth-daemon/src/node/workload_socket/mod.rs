//! The Unix socket of the node by which pods reach the SPIFFE Workload API: attests who connects, and hands the connection to the
//! server of the caller's pod. Whoever is not attested is told why, and the log has it, too.

mod file;

use std::{
    collections::HashMap,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use auth_datapath::{Attestor, Caller};
use auth_mesh::Published;
use auth_support::connection_limit::{ConnectionLimit, ConnectionPermit};
use auth_workload_api::{Attested, refuse};
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::Handle,
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::sleep,
};
use tonic::Status;

use crate::proxy::Pod;
use file::SocketFile;

/// Maximum number of connections at once, of all pods and of one.
const MAX_CONNECTIONS: usize = 1024;
const MAX_PER_POD: usize = 16;
/// Maximum number of callers at once that are told why they are refused, in all and of one pod. The callers in network
/// namespaces of no pod count as those of one, because a process may make such namespaces as it likes. Further ones are only
/// refused.
const MAX_REFUSED: usize = 64;
const MAX_REFUSED_PER_POD: usize = 8;
/// Pause between two log lines about refused callers of one network namespace.
const LOG_PAUSE: Duration = Duration::from_secs(10);
/// Maximum number of such lines in this time about network namespaces of no pod.
const MAX_LOGGED: usize = 16;
/// Pause after a connection could not be accepted for lack of a resource.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The pods of the node, by the cookie of their netns.
pub(super) type SocketPods = HashMap<u64, SocketPod>;

/// A pod of the mesh, to the socket.
#[derive(Clone, Debug)]
pub(super) struct SocketPod {
    pub(super) pod: Arc<Pod>,
    pub(super) access: Access,
}

/// What a pod's callers get.
#[derive(Clone, Debug)]
pub(super) enum Access {
    /// Their connections go to this server.
    Server(mpsc::Sender<Attested>),
    /// The account may use the API, and the pod's server cannot run.
    Failing,
    /// The account may not use the API.
    NotListed,
    /// The pod has ended, and only some of its processes have not.
    Ended,
}

/// The socket. Dropping it closes the socket; its file stays for the next daemon to replace.
pub(super) struct WorkloadSocket {
    path: PathBuf,
    pods: Arc<Published<SocketPods>>,
    open: Option<Open>,
    /// Why it cannot be opened, as the log has said.
    failing: Option<String>,
}

struct Open {
    file: SocketFile,
    accepting: AbortHandle,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl WorkloadSocket {
    /// Creates a socket that is not open yet.
    pub(super) fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            pods: Arc::default(),
            open: None,
            failing: None,
        }
    }

    /// Sets the node's pods, and opens the socket if it is not open, or if its file is not in place any more. It accepts on
    /// `runtime`, and holds a receiver of `listening` while it is open.
    pub(super) fn settle(
        &mut self,
        pods: SocketPods,
        runtime: &Handle,
        listening: &watch::Sender<()>,
    ) {
        self.pods.publish(pods);
        if let Some(open) = &self.open {
            if open.file.is_in_place() && !open.accepting.is_finished() {
                return;
            }
            tracing::error!(
                socket = %self.path.display(),
                "the workload API's socket was removed or replaced; opening it again"
            );
            self.open = None;
        }
        match self.listen(runtime, listening) {
            Ok(open) => {
                tracing::info!(socket = %self.path.display(), "workload API socket open");
                self.open = Some(open);
                self.failing = None;
            }
            Err(error) => {
                let error = error.to_string();
                if self.failing.as_ref() != Some(&error) {
                    tracing::error!(
                        socket = %self.path.display(), error, "cannot open the workload API's socket; retrying"
                    );
                }
                self.failing = Some(error);
            }
        }
    }

    fn listen(&self, runtime: &Handle, listening: &watch::Sender<()>) -> io::Result<Open> {
        let (listener, file) = SocketFile::listen(&self.path)?;
        let attestor = Attestor::start()?;
        let acceptor = Arc::new(Acceptor {
            node: auth_datapath::socket_cookie(listener.as_fd())?,
            pods: self.pods.clone(),
            attestor,
            places: Arc::new(ConnectionLimit::new(MAX_CONNECTIONS, MAX_PER_POD)),
            refused: Arc::new(ConnectionLimit::new(MAX_REFUSED, MAX_REFUSED_PER_POD)),
            logged: Mutex::default(),
        });
        let open = listening.subscribe();
        let accepting = runtime.spawn(async move {
            match UnixListener::from_std(listener) {
                Ok(listener) => acceptor.accept(listener).await,
                Err(error) => tracing::error!(%error, "cannot watch the workload API's socket"),
            }
            drop(open);
        });
        Ok(Open {
            file,
            accepting: accepting.abort_handle(),
        })
    }
}

/// Removes the socket that a daemon has left at `path`.
pub(crate) fn remove_socket(path: Option<&Path>) -> anyhow::Result<()> {
    if let Some(path) = path {
        let removed = file::remove(path);
        removed.with_context(|| {
            let path = path.display();
            format!("{path}: cannot remove the workload API's socket")
        })?;
    }
    Ok(())
}

struct Acceptor {
    /// Cookie of the node's netns.
    node: u64,
    pods: Arc<Published<SocketPods>>,
    attestor: Attestor,
    /// By cookie.
    places: Arc<ConnectionLimit<u64>>,
    /// By cookie. [`NO_POD`] stands for all network namespaces of no pod.
    refused: Arc<ConnectionLimit<u64>>,
    logged: Mutex<Logged>,
}

/// No netns has this cookie.
const NO_POD: u64 = 0;

/// Which refused callers were logged a moment ago.
#[derive(Debug, Default)]
struct Logged {
    /// When, by the cookie of their netns, and whether that is a pod's or the node's.
    at: HashMap<u64, (Instant, bool)>,
    /// Number of refused callers of no pod that were not logged since one was.
    left_out: u64,
}

impl Logged {
    /// Whether to log a caller in the netns with `cookie`, and how many others of no pod were not logged before it.
    fn may_log(&mut self, cookie: u64, is_known: bool) -> Option<u64> {
        self.at.retain(|_, (at, _)| at.elapsed() < LOG_PAUSE);
        if self.at.contains_key(&cookie) {
            return None;
        }
        let unknown = self.at.values().filter(|(_, is_known)| !is_known);
        if !is_known && unknown.count() >= MAX_LOGGED {
            self.left_out += 1;
            return None;
        }
        self.at.insert(cookie, (Instant::now(), is_known));
        Some(match is_known {
            true => 0,
            false => std::mem::take(&mut self.left_out),
        })
    }
}

/// Why a caller is refused.
struct Refusal {
    /// The pod that its socket belongs to.
    pod: Option<Arc<Pod>>,
    status: Status,
}

impl Acceptor {
    /// Accepts connections for ever. They end when the future is dropped, unless a pod's server has them.
    async fn accept(self: Arc<Self>, listener: UnixListener) {
        let mut callers = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = callers.join_next() => continue,
            };
            let identified = accepted.and_then(|(connection, _)| {
                let caller = Caller::of(connection.as_fd())?;
                Ok((connection, caller))
            });
            let (connection, caller) = match identified {
                Ok(identified) => identified,
                Err(error) => {
                    tracing::warn!(%error, "a connection to the workload API's socket cannot be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let found = self.server_of(&caller);
            // Before anything else is done for the caller, so that a pod that connects again and again delays no other.
            let place = match &found {
                Ok(_) => self.places.admit(caller.cookie),
                Err(_) => None,
            };
            match (found, place) {
                (Ok((pod, server)), Some(place)) => {
                    callers.spawn(self.clone().admit(connection, caller, pod, server, place));
                }
                (Ok((pod, _)), None) => tracing::debug!(
                    pod = %pod.workload.name, "a connection to the workload API's socket is refused: too many are open"
                ),
                (Err(refusal), _) => {
                    let refused = self.clone().refuse(connection, Who::of(&caller), refusal);
                    callers.spawn(refused);
                }
            }
        }
    }

    /// The pod that the caller's socket belongs to, and its server.
    fn server_of(&self, caller: &Caller) -> Result<(Arc<Pod>, mpsc::Sender<Attested>), Refusal> {
        let pods = self.pods.load();
        let Some(SocketPod { pod, access }) = pods.get(&caller.cookie) else {
            let whose = if caller.cookie == self.node {
                "the caller is in the node's network namespace (hostNetwork), and in no pod of the mesh"
            } else {
                "the caller's network namespace is that of no pod of the mesh on this node"
            };
            return Err(Refusal {
                pod: None,
                status: Status::permission_denied(whose),
            });
        };
        let status = match access {
            Access::Server(server) => return Ok((pod.clone(), server.clone())),
            Access::Failing => Status::unavailable(
                "the API cannot be served to this pod at the moment: the node daemon's log says why",
            ),
            Access::NotListed => Status::permission_denied(format!(
                "the pod's account, {}, is not in the daemon's workloadApi.accounts",
                pod.workload.identity
            )),
            Access::Ended => Status::permission_denied("the pod has ended"),
        };
        Err(Refusal {
            pod: Some(pod.clone()),
            status,
        })
    }

    /// Hands the connection to the pod's server, if the caller's process is the pod's.
    async fn admit(
        self: Arc<Self>,
        connection: UnixStream,
        caller: Caller,
        pod: Arc<Pod>,
        server: mpsc::Sender<Attested>,
        permit: ConnectionPermit<u64>,
    ) {
        let who = Who::of(&caller);
        let netns = &pod.enrolled.netns;
        let checked = self.attestor.check(caller, &pod.workload, netns).await;
        match checked {
            Ok(()) => {
                // The pod may have left the mesh meanwhile.
                if let Err(error) = server.try_send(Attested { connection, permit }) {
                    tracing::debug!(pod = %pod.workload.name, %error, "a connection to the workload API's socket is closed");
                }
            }
            Err(why) => {
                drop(permit);
                let refusal = Refusal {
                    pod: Some(pod),
                    status: Status::permission_denied(why.to_string()),
                };
                self.refuse(connection, who, refusal).await;
            }
        }
    }

    /// Tells the caller and the log why it is refused.
    async fn refuse(self: Arc<Self>, connection: UnixStream, who: Who, refusal: Refusal) {
        let Refusal { pod, status } = refusal;
        let is_known = pod.is_some() || who.cookie == self.node;
        if let Some(left_out) = self.may_log(who.cookie, is_known) {
            let pod = pod.map(|pod| pod.workload.name.to_string());
            tracing::warn!(
                pid = who.pid,
                user = who.user,
                pod = pod.as_deref().unwrap_or_default(),
                left_out = (left_out > 0).then_some(left_out),
                reason = status.message(),
                "caller of the workload API refused"
            );
        }
        let source = if is_known { who.cookie } else { NO_POD };
        let Some(_place) = self.refused.admit(source) else {
            return;
        };
        refuse(connection, status).await;
    }

    fn may_log(&self, cookie: u64, is_known: bool) -> Option<u64> {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        logged.may_log(cookie, is_known)
    }
}

/// A caller that is refused.
#[derive(Clone, Copy, Debug)]
struct Who {
    /// Cookie of its netns.
    cookie: u64,
    pid: u32,
    user: u32,
}

impl Who {
    fn of(caller: &Caller) -> Self {
        Self {
            cookie: caller.cookie,
            pid: caller.pid,
            user: caller.user,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_of_no_pod_keep_no_others_from_being_logged() {
        let mut logged = Logged::default();
        // Each of them once, and no more than the limit.
        for cookie in 1..=100 {
            let expected = (cookie <= MAX_LOGGED as u64).then_some(0);
            assert_eq!(logged.may_log(cookie, false), expected, "{cookie}");
            assert_eq!(logged.may_log(1, false), None);
        }
        assert_eq!(logged.may_log(1000, true), Some(0));
        assert_eq!(logged.may_log(1000, true), None);
        assert_eq!(logged.may_log(1001, true), Some(0));
        // Later, the next one tells of those that were left out.
        let long_ago = Instant::now().checked_sub(LOG_PAUSE).unwrap();
        for (at, _) in logged.at.values_mut() {
            *at = long_ago;
        }
        assert_eq!(logged.may_log(1001, true), Some(0));
        assert_eq!(logged.may_log(2000, false), Some(100 - MAX_LOGGED as u64));
        assert_eq!(logged.may_log(2001, false), Some(0));
    }
}
