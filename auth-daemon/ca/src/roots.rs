//! Publishes the root certificates in a ConfigMap of every namespace, for the node daemons and for apps. Only the leader
//! does this.

use std::{collections::BTreeMap, time::Duration};

use auth_ca_api::pem;
use auth_kubernetes::{ApiError, Objects, follow, objects::Namespace};
use futures_util::{StreamExt, future::ready};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{reflector::ObjectRef, watcher},
};

use crate::{
    authority::{Authority, Leader, while_leading},
    control::{RETRY, reconcile_all, touched},
};

/// The key in the ConfigMap, as in Istio's `istio-ca-root-cert`.
pub const KEY: &str = "root-cert.pem";
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

impl PublishedRoots {
    /// Keeps the ConfigMaps up to date while this replica is the leader. Runs forever.
    pub async fn run(self, leader: Leader) {
        let run = &self;
        while_leading(
            leader,
            |authority| async move { run.keep(&authority).await },
        )
        .await;
    }

    async fn keep(&self, authority: &Authority) {
        // Only this name: the CA needs no access to other ConfigMaps.
        let by_name = format!("metadata.name={}", self.name);
        let maps = follow(
            Api::<PartialObjectMeta<ConfigMap>>::all(self.client.clone()),
            watcher::Config::default().fields(&by_name),
            "ConfigMaps with the roots",
        );
        let namespaces = touched(maps.map(Ok))
            .filter_map(|map| ready(map.namespace().map(|name| ObjectRef::new(&name))));
        reconcile_all(
            Api::<PartialObjectMeta<Namespace>>::all(self.client.clone()),
            "namespaces",
            namespaces,
            authority.published(),
            |namespace| async move {
                if namespace.metadata.deletion_timestamp.is_some() {
                    return CHECK;
                }
                let roots = pem::certificates(&authority.published().borrow().roots);
                let namespace = namespace.name_any();
                match self.write(&namespace, roots).await {
                    Ok(()) => CHECK,
                    Err(error) => {
                        tracing::error!(
                            configmap = format!("{namespace}/{}", self.name), %error,
                            "root certificates cannot be published"
                        );
                        RETRY
                    }
                }
            },
            |_| ready(()),
        )
        .await;
    }

    /// Makes the ConfigMap of `namespace` contain `roots`.
    async fn write(&self, namespace: &str, roots: String) -> Result<(), ApiError> {
        let maps: Objects<ConfigMap> = Objects::of(self.client.clone(), namespace);
        let wanted = Some(BTreeMap::from([(KEY.to_owned(), roots)]));
        let written = match maps.get(&self.name).await? {
            Some(found) if found.data == wanted => return Ok(()),
            Some(found) => {
                let map = ConfigMap {
                    data: wanted,
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
                    data: wanted,
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
