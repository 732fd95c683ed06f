//! Publishes the root certificates in a ConfigMap of every namespace, for the node daemons and for apps. Only the leader
//! does this.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use auth_ca_api::pem;
use auth_kubernetes::{ApiError, Objects, follow, objects::Namespace};
use futures_util::{StreamExt, future::join_all};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{Api, Client, ResourceExt, api::ObjectMeta, core::PartialObjectMeta, runtime::watcher};
use tokio::time::{Instant, sleep_until};

use crate::{
    authority::{Authority, Leader, while_leading},
    schedule::Schedule,
};

/// The key in the ConfigMap, as in Istio's `istio-ca-root-cert`.
pub const KEY: &str = "root-cert.pem";
/// Namespaces that are reconciled at the same time.
const AT_ONCE: usize = 8;
/// How often a ConfigMap is checked without an event.
const CHECK: Duration = Duration::from_secs(600);

/// Where the roots are published.
#[derive(Clone)]
pub struct PublishedRoots {
    /// The cluster.
    pub client: Client,
    /// The ConfigMap's name in every namespace. Other content under this name is replaced.
    pub name: String,
}

impl std::fmt::Debug for PublishedRoots {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PublishedRoots")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl PublishedRoots {
    /// Keeps the ConfigMaps up to date while this replica is the leader. Runs for ever.
    pub async fn run(self, leader: Leader) {
        let run = &self;
        while_leading(
            leader,
            |authority| async move { run.keep(&authority).await },
        )
        .await;
    }

    async fn keep(&self, authority: &Authority) {
        let mut namespaces = Box::pin(follow(
            Api::<PartialObjectMeta<Namespace>>::all(self.client.clone()),
            watcher::Config::default(),
            "namespaces",
        ));
        // Only this name: the CA needs no access to other ConfigMaps.
        let by_name = format!("metadata.name={}", self.name);
        let mut maps = Box::pin(follow(
            Api::<PartialObjectMeta<ConfigMap>>::all(self.client.clone()),
            watcher::Config::default().fields(&by_name),
            "ConfigMaps with the roots",
        ));
        let mut published = authority.published();
        let mut known = BTreeSet::new();
        let mut listed = BTreeSet::new();
        let mut due = Schedule::default();
        loop {
            let next = due.next();
            tokio::select! {
                Some(event) = namespaces.next() => match event {
                    watcher::Event::Init => listed.clear(),
                    watcher::Event::InitApply(namespace) => { listed.insert(namespace.name_any()); }
                    watcher::Event::InitDone => {
                        for name in known.difference(&listed) {
                            due.forget(name);
                        }
                        known = std::mem::take(&mut listed);
                        known.iter().for_each(|name| due.now(name));
                    }
                    watcher::Event::Apply(namespace) => {
                        let name = namespace.name_any();
                        if namespace.metadata.deletion_timestamp.is_some() {
                            known.remove(&name);
                            due.forget(&name);
                        } else if known.insert(name.clone()) {
                            due.now(&name);
                        }
                    }
                    watcher::Event::Delete(namespace) => {
                        known.remove(&namespace.name_any());
                        due.forget(&namespace.name_any());
                    }
                },
                Some(event) = maps.next() => {
                    if let watcher::Event::Apply(map) | watcher::Event::Delete(map) = event
                        && let Some(namespace) = map.namespace().filter(|name| known.contains(name))
                    {
                        due.now(&namespace);
                    }
                }
                Ok(()) = published.changed() => known.iter().for_each(|name| due.now(name)),
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                    let roots = pem::certificates(&published.borrow_and_update().roots);
                    let some = due.take(Instant::now(), AT_ONCE);
                    let done = some.iter().map(|namespace| self.write(namespace, &roots));
                    for (namespace, done) in some.iter().zip(join_all(done).await) {
                        match done {
                            Ok(()) => due.after(namespace, CHECK),
                            Err(error) => {
                                tracing::error!(
                                    configmap = format!("{namespace}/{}", self.name), %error,
                                    "root certificates cannot be published"
                                );
                                due.failed(namespace);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Makes the ConfigMap of `namespace` contain `roots`.
    async fn write(&self, namespace: &str, roots: &str) -> Result<(), ApiError> {
        let maps: Objects<ConfigMap> = Objects::of(self.client.clone(), namespace);
        let wanted = BTreeMap::from([(KEY.to_owned(), roots.to_owned())]);
        let written = match maps.get(&self.name).await? {
            Some(found) if found.data.as_ref() == Some(&wanted) => return Ok(()),
            Some(found) => {
                let map = ConfigMap {
                    data: Some(wanted),
                    binary_data: None,
                    ..found
                };
                maps.replace(&self.name, &map).await
            }
            None => {
                let managed = ("app.kubernetes.io/managed-by".into(), "auth-daemon".into());
                let map = ConfigMap {
                    metadata: ObjectMeta {
                        name: Some(self.name.clone()),
                        namespace: Some(namespace.to_owned()),
                        labels: Some([managed].into()),
                        ..ObjectMeta::default()
                    },
                    data: Some(wanted),
                    ..ConfigMap::default()
                };
                maps.create(&map).await
            }
        };
        match written {
            // The namespace is gone, or being deleted.
            Err(error) if error.is_not_found() => Ok(()),
            Err(ApiError::Refused {
                code: 403, message, ..
            }) if message.contains("because it is being terminated") => Ok(()),
            Err(error) => Err(error),
            Ok(_) => {
                tracing::info!(
                    configmap = format!("{namespace}/{}", self.name),
                    "root certificates published"
                );
                Ok(())
            }
        }
    }
}
