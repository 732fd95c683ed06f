//! Pods that the container runtime is about to start. Each waits until this node serves it and has its certificate, so
//! that no container runs before that; but none waits longer than [`DEADLINE`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use auth_mesh::{Snapshot, Workload};
use auth_nri::{Sandbox, Starting};
use auth_support::backoff;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::Enrolment;
use crate::issuer::Certificate;

/// The pods that wait, and the connection to the runtime.
#[derive(Debug)]
pub(super) struct StartingPods {
    requests: mpsc::Receiver<Starting>,
    waiting: Vec<Starting>,
    /// Keeps the connection to the runtime.
    plugin: Option<AbortHandle>,
}

/// What a pod waits for.
pub(super) enum Decision {
    /// To be served.
    Wait,
    /// For its certificate: it is served.
    Served(Arc<Certificate>),
    /// Nothing: it is not in the mesh.
    Start,
}

impl StartingPods {
    /// Registers with the runtime behind this socket, now and after each end of the connection; without a socket, no
    /// pod ever waits. Must be called within the control runtime.
    pub(super) fn new(socket: Option<&Path>) -> Self {
        let (sender, requests) = mpsc::channel(MOST);
        let plugin =
            socket.map(|socket| tokio::spawn(keep(socket.to_owned(), sender)).abort_handle());
        Self {
            requests,
            waiting: Vec::new(),
            plugin,
        }
    }

    /// Waits for the next pod to start.
    pub(super) async fn changed(&mut self) {
        match self.requests.recv().await {
            Some(starting) => self.waiting.push(starting),
            None => std::future::pending().await,
        }
    }

    /// Answers the runtime for the pods that need not wait, or only for their certificates.
    pub(super) fn answer(&mut self, decide: impl Fn(&Sandbox) -> Decision) {
        for starting in std::mem::take(&mut self.waiting) {
            // The plugin has given up at the deadline, or the runtime has gone.
            if starting.ready.is_closed() {
                continue;
            }
            match decide(&starting.sandbox) {
                Decision::Wait => self.waiting.push(starting),
                Decision::Served(certificate) => {
                    tokio::spawn(async move {
                        certificate.obtain(DEADLINE).await;
                        let _ = starting.ready.send(());
                    });
                }
                Decision::Start => {
                    let _ = starting.ready.send(());
                }
            }
        }
    }
}

impl Drop for StartingPods {
    fn drop(&mut self) {
        if let Some(plugin) = &self.plugin {
            plugin.abort();
        }
    }
}

impl Enrolment {
    /// Answers the runtime for pods that this node serves, and for those outside the mesh. One that no object describes
    /// waits: discovery may be behind the kubelet.
    pub(super) fn answer_starting(&mut self, snapshot: &Snapshot) {
        let (serving, node) = (&self.serving, &self.node.config.node_name);
        self.starting.answer(|Sandbox { uid, .. }| {
            let served = serving
                .values()
                .find(|serving| serving.pod.workload.uid == *uid);
            if let Some(serving) = served {
                return Decision::Served(serving.pod.certificate.clone());
            }
            let is_outside = |pod: &Arc<Workload>| {
                pod.uid == *uid && (pod.host_network || snapshot.is_excluded(&pod.name, uid))
            };
            if snapshot.all_on(node).any(is_outside) {
                Decision::Start
            } else {
                Decision::Wait
            }
        });
    }
}

async fn keep(socket: PathBuf, sender: mpsc::Sender<Starting>) {
    let mut failures = 0;
    loop {
        let error = match auth_nri::serve(&socket, DEADLINE, sender.clone()).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if matches!(error, auth_nri::Error::Connect { .. }) {
            if failures == 0 {
                tracing::warn!(%error, "the container runtime does not wait for the daemon before it starts pods");
            }
            failures += 1;
        } else {
            tracing::warn!(%error, "the connection to the container runtime ended; connecting again");
            failures = 1;
        }
        let pause = backoff::pause(FIRST_PAUSE, LONGEST_PAUSE, failures, rand::random());
        tokio::time::sleep(pause).await;
    }
}

/// The most pods that wait at the same time; more start at once.
const MOST: usize = 1024;
/// The longest that a pod waits.
const DEADLINE: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
