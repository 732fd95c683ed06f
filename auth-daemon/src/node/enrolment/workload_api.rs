//! Serves the SPIFFE Workload API to the pods that may use it: on a listener in the pod's own netns, so that the kernel
//! identifies the calling pod, and on the node's socket.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::TcpListener,
    path::Path,
    sync::Arc,
    thread,
};

use auth_workload_api::{Attested, serve};
use tokio::{
    runtime::{Builder, Handle},
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

use super::Serving;
use crate::{
    issuer::AppCertificate,
    node::workload_socket::{Access, SocketPod, SocketPods, WorkloadSocket},
    proxy::{Node, Pod},
};
use auth_datapath::sockets::{WORKLOAD_API_PORT, open_workload_api};

/// Number of connections from the node's socket that may wait for a pod's server.
const WAITING: usize = 16;

/// The pods that the API is served in, by the cookie of their netns.
pub(super) struct WorkloadApis {
    served: HashMap<u64, ServedPod>,
    /// Pods in which it cannot be served, as the log has said.
    failing: HashSet<u64>,
    socket: Option<WorkloadSocket>,
    /// Serves the pods.
    thread: Option<ApiThread>,
    /// Accepts and refuses the socket's callers, who need not be pods: they delay no pod that is served.
    socket_thread: Option<ApiThread>,
}

struct ServedPod {
    pod: Arc<Pod>,
    /// A duplicate, for the next pod of the netns.
    listener: TcpListener,
    /// For connections that the node's socket has accepted.
    attested: mpsc::Sender<Attested>,
    task: AbortHandle,
    /// Renewed as long as the pod is served.
    _certificate: AppCertificate,
}

impl Drop for ServedPod {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl WorkloadApis {
    /// Creates the APIs of no pods yet. `socket` is the path of the node's socket.
    pub(super) fn new(socket: Option<&Path>) -> Self {
        Self {
            served: HashMap::new(),
            failing: HashSet::new(),
            socket: socket.map(WorkloadSocket::at),
            thread: None,
            socket_thread: None,
        }
    }

    /// Begins to serve the pods of `serving` that may use the API and are not served yet, and ends with the others.
    pub(super) fn settle(&mut self, node: &Node, serving: &HashMap<u64, Serving>) {
        let allowed = &node.config.workload_api;
        let may_use = |cookie: &u64| {
            let serving = serving.get(cookie)?;
            let identity = &serving.pod.workload.identity;
            (serving.ended.is_none() && allowed.allows(identity)).then_some(&serving.pod)
        };
        self.failing.retain(|cookie| may_use(cookie).is_some());
        let mut former = HashMap::new();
        self.served.retain(|cookie, served| {
            let stays = match may_use(cookie) {
                // A handed-over netns has another pod, and a listener that has died ends its task.
                Some(pod) => Arc::ptr_eq(pod, &served.pod) && !served.task.is_finished(),
                None => false,
            };
            if !stays && !served.task.is_finished() {
                former.extend(served.listener.try_clone().map(|it| (*cookie, it)));
            }
            stays
        });
        for cookie in serving.keys() {
            let Some(pod) = may_use(cookie) else {
                continue;
            };
            if self.served.contains_key(cookie) {
                continue;
            }
            let name = &pod.workload.name;
            match self.serve(node, pod, former.remove(cookie)) {
                Ok(served) => {
                    tracing::info!(
                        pod = %name, identity = %pod.workload.identity, port = WORKLOAD_API_PORT,
                        "workload API open"
                    );
                    self.failing.remove(cookie);
                    self.served.insert(*cookie, served);
                }
                Err(error) => {
                    if self.failing.insert(*cookie) {
                        tracing::error!(pod = %name, %error, "cannot serve the workload API; retrying");
                    }
                }
            }
        }
        self.settle_socket(node, serving);
    }

    fn settle_socket(&mut self, node: &Node, serving: &HashMap<u64, Serving>) {
        let Some(socket) = &mut self.socket else {
            return;
        };
        let runtime = match ApiThread::runtime(&mut self.socket_thread, "workload-socket") {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "cannot start the thread of the workload API's socket; retrying");
                return;
            }
        };
        let access = |cookie: &u64, serving: &Serving| {
            if serving.ended.is_some() {
                return Access::Ended;
            }
            let identity = &serving.pod.workload.identity;
            match self.served.get(cookie) {
                Some(served) => Access::Server(served.attested.clone()),
                None if node.config.workload_api.allows(identity) => Access::Failing,
                None => Access::NotListed,
            }
        };
        let pods: SocketPods = serving
            .iter()
            .map(|(cookie, serving)| {
                let pod = serving.pod.clone();
                let access = access(cookie, serving);
                (*cookie, SocketPod { pod, access })
            })
            .collect();
        socket.settle(pods, runtime, &node.listening);
    }

    fn serve(
        &mut self,
        node: &Node,
        pod: &Arc<Pod>,
        former: Option<TcpListener>,
    ) -> io::Result<ServedPod> {
        let listener = match former {
            Some(listener) => listener,
            None => open_workload_api(&node.kernel, &pod.enrolled.netns)?,
        };
        let runtime = ApiThread::runtime(&mut self.thread, "workload-api")?;
        let lifetime = node.config.workload_api.certificate_lifetime;
        let identity = &pod.workload.identity;
        let certificate = node.certificates.for_app(identity, lifetime);
        let (served, open) = (certificate.served.clone(), node.listening.subscribe());
        let accepting = listener.try_clone()?;
        let (attested, received) = mpsc::channel(WAITING);
        let task = runtime.spawn(async move {
            match tokio::net::TcpListener::from_std(accepting) {
                Ok(accepting) => serve(accepting, received, served).await,
                Err(error) => tracing::error!(%error, "cannot watch the workload API's listener"),
            }
            drop(open);
        });
        Ok(ServedPod {
            pod: pod.clone(),
            listener,
            attested,
            task: task.abort_handle(),
            _certificate: certificate,
        })
    }
}

/// A thread of the API, so that a flood of requests delays neither connections nor enrolment.
struct ApiThread {
    runtime: Handle,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

impl ApiThread {
    /// Returns the runtime of the thread, after starting it with this name if there is none.
    fn runtime<'a>(thread: &'a mut Option<Self>, name: &str) -> io::Result<&'a Handle> {
        Ok(match thread {
            Some(thread) => &thread.runtime,
            None => &thread.insert(Self::start(name)?).runtime,
        })
    }

    fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new().name(name.into()).spawn(move || {
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self {
            runtime: handle,
            _stop: stop,
        })
    }
}
