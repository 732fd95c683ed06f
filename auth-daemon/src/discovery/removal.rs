//! Detects that the daemon is being removed from the cluster rather than only restarted, so that it leaves nothing
//! behind. A pod that is terminated does not learn why.
//!
//! Two signs say so. `helm uninstall` creates the ConfigMap `auth-daemon-removal`, and keeps the daemon's API rights until it has
//! stopped, so the daemon asks for it at its end. A deleted namespace takes these rights away, so an open watch reports
//! that it is being deleted.

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::sync::watch;

use auth_kubernetes::{Objects, follow};

/// The ConfigMap in the daemon's namespace that exists while the daemons are being removed.
const MARK: &str = "auth-daemon-removal";

/// Knows whether this daemon is being removed.
pub struct Removal {
    marks: Objects<ConfigMap>,
    namespace_is_deleted: watch::Receiver<bool>,
}

impl Removal {
    /// Watches the daemon's own namespace.
    pub fn watch(client: &Client, namespace: &str) -> Self {
        let (sender, namespace_is_deleted) = watch::channel(false);
        let namespaces = Api::<PartialObjectMeta<Namespace>>::all(client.clone());
        let by_name = format!("metadata.name={namespace}");
        tokio::spawn(async move {
            let mut events = Box::pin(follow(
                namespaces,
                watcher::Config::default().fields(&by_name),
                "the daemon's own namespace",
            ));
            while let Some(event) = events.next().await {
                if let watcher::Event::Apply(namespace) | watcher::Event::InitApply(namespace) =
                    event
                {
                    let deleted = namespace.metadata.deletion_timestamp.is_some();
                    sender.send_if_modified(|known| std::mem::replace(known, deleted) != deleted);
                }
            }
        });
        Self {
            marks: Objects::of(client.clone(), namespace),
            namespace_is_deleted,
        }
    }

    /// Whether the daemon is being removed; asks the API server. If it cannot tell, the daemon is only being restarted.
    pub async fn is_under_way(&self) -> bool {
        if *self.namespace_is_deleted.borrow() {
            return true;
        }
        match self.marks.get(MARK).await {
            Ok(mark) => mark.is_some(),
            Err(error) => {
                tracing::warn!(
                    %error,
                    "daemon cannot tell whether it is being removed; if so, run auth-daemon unload on this node"
                );
                false
            }
        }
    }
}
