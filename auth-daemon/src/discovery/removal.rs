//! Whether the daemon is being taken out of the cluster, and not only restarted: then it leaves nothing behind.
//!
//! A pod that ends is not told why. What `kubectl delete` of everything does first is to mark the namespace, and the
//! watch that is open by then says so; to ask at the end would be too late, for the right to ask is gone, too.

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::sync::watch;

use auth_kubernetes::follow;

/// Follows the daemon's own namespace: true as long as that is being deleted.
pub fn watch(client: Client, namespace: &str) -> watch::Receiver<bool> {
    let (told, removed) = watch::channel(false);
    let by_name = format!("metadata.name={namespace}");
    tokio::spawn(async move {
        let mut events = Box::pin(follow(
            Api::<PartialObjectMeta<Namespace>>::all(client),
            watcher::Config::default().fields(&by_name),
            "the daemon's own namespace",
        ));
        while let Some(event) = events.next().await {
            if let watcher::Event::Apply(namespace) | watcher::Event::InitApply(namespace) = event {
                let marked = namespace.metadata.deletion_timestamp.is_some();
                told.send_if_modified(|known| std::mem::replace(known, marked) != marked);
            }
        }
    });
    removed
}
