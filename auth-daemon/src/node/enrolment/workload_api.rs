//! Serves the SPIFFE Workload API in the pods that may use it: on a listener in the pod's own netns, so that the kernel says
//! whose caller it is.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::TcpListener,
    sync::Arc,
    thread,
};

use auth_workload_api::serve;
use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::AbortHandle,
};

use super::Serving;
use crate::{
    issuer::AppCertificate,
    proxy::{Node, Pod},
};
use auth_datapath::sockets::{WORKLOAD_API_PORT, open_workload_api};

/// The pods that the API is served in, by the cookie of their netns.
#[derive(Default)]
pub(super) struct WorkloadApis {
    served: HashMap<u64, ServedPod>,
    /// Pods in which it cannot be served, as the log has said.
    failing: HashSet<u64>,
    thread: Option<ApiThread>,
}

struct ServedPod {
    pod: Arc<Pod>,
    /// A duplicate, for the next pod of the netns.
    listener: TcpListener,
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
        let runtime = match &self.thread {
            Some(thread) => &thread.runtime,
            None => &self.thread.insert(ApiThread::start()?).runtime,
        };
        let lifetime = node.config.workload_api.certificate_lifetime;
        let identity = &pod.workload.identity;
        let certificate = node.certificates.for_app(identity, lifetime);
        let (served, open) = (certificate.served.clone(), node.listening.subscribe());
        let accepting = listener.try_clone()?;
        let task = runtime.spawn(async move {
            match tokio::net::TcpListener::from_std(accepting) {
                Ok(accepting) => serve(accepting, served).await,
                Err(error) => tracing::error!(%error, "cannot watch the workload API's listener"),
            }
            drop(open);
        });
        Ok(ServedPod {
            pod: pod.clone(),
            listener,
            task: task.abort_handle(),
            _certificate: certificate,
        })
    }
}

/// A thread for the API of all pods, so that a flood of requests delays neither connections nor enrolment.
struct ApiThread {
    runtime: Handle,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

impl ApiThread {
    fn start() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        thread::Builder::new()
            .name("workload-api".into())
            .spawn(move || {
                let _ = runtime.block_on(stopped);
            })?;
        Ok(Self {
            runtime: handle,
            _stop: stop,
        })
    }
}
