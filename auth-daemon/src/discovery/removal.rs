//! Detects that the daemon is being removed from the cluster rather than only restarted, so that it leaves nothing
//! behind.
//!
//! A pod that is terminated does not learn why. But `kubectl delete` of the whole deployment marks the namespace first,
//! and a watch that is already open reports it. A request at the end would be too late, because the permission for it
//! is gone by then.

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::{Api, Client, core::PartialObjectMeta, runtime::watcher};
use tokio::sync::watch;

use auth_kubernetes::follow;

/// Watches the daemon's own namespace. The value is true while the namespace is being deleted.
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
