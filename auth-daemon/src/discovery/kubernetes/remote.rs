//! Remote clusters: read by the kubeconfigs in Istio's remote secrets, and merged into this cluster's snapshot.
//!
//! Only namespaces, pods and services of a remote cluster are read. While its API server is unavailable, its last known
//! state stays in force; without its Secret, nothing of it does.

mod cluster;
mod usage;

use std::{collections::BTreeMap, future::pending, sync::Arc};

use futures_util::{StreamExt, stream::BoxStream};
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client, ResourceExt, runtime::watcher};
use tokio_stream::StreamMap;

use super::Settings;
use crate::{config::RemoteClusters, observe::remote_clusters::RemoteStatus};
use auth_kubernetes::{MAX_KUBECONFIG_BYTES, connect_by, follow};
use auth_mesh::{ClusterName, Edit, Published};
use cluster::{Cluster, Update, watch};

/// Label of a remote secret. Each key of its data is the name of a cluster, and the value is a kubeconfig for it
/// (<https://istio.io/latest/docs/setup/install/multicluster/>).
const REMOTE_SECRETS: &str = "istio/multiCluster=true";
/// Maximum number of remote clusters. The limit keeps a user who may write such Secrets from exhausting the memory of all nodes.
const MAX_CLUSTERS: usize = 100;

/// The remote clusters.
pub(super) struct Remote {
    /// `None`: there are none, and no Secret is read.
    follow: Option<Follow>,
}

struct Follow {
    settings: Settings,
    remote: RemoteClusters,
    events: BoxStream<'static, watcher::Event<Secret>>,
    /// The kubeconfigs in each remote secret, by the secret's name.
    secrets: BTreeMap<String, Kubeconfigs>,
    /// Whether the secrets have been listed once.
    is_listed: bool,
    /// Those received so far from a list in progress.
    listed: BTreeMap<String, Kubeconfigs>,
    clusters: BTreeMap<ClusterName, Cluster>,
    /// Number of the last reading of a cluster.
    generation: u64,
    updates: StreamMap<ClusterName, BoxStream<'static, Update>>,
    status: Arc<Published<Vec<RemoteStatus>>>,
}

type Kubeconfigs = BTreeMap<ClusterName, Vec<u8>>;

/// What happened.
pub(super) enum Change {
    Secret(Box<watcher::Event<Secret>>),
    Cluster(ClusterName, Update),
}

impl Remote {
    /// Follows the remote secrets, if `settings` name a namespace. Publishes the state of each cluster to `status`.
    pub(super) fn follow(
        client: &Client,
        settings: &Settings,
        status: Arc<Published<Vec<RemoteStatus>>>,
    ) -> Self {
        let follow = settings.remote.clone().map(|remote| {
            let secrets: Api<Secret> = Api::namespaced(client.clone(), &remote.namespace);
            let config = watcher::Config::default().labels(REMOTE_SECRETS);
            Follow {
                settings: Settings {
                    daemons: None,
                    remote: None,
                    ..settings.clone()
                },
                remote,
                events: follow(secrets, config, "remote secrets").boxed(),
                secrets: BTreeMap::new(),
                is_listed: false,
                listed: BTreeMap::new(),
                clusters: BTreeMap::new(),
                generation: 0,
                updates: StreamMap::new(),
                status,
            }
        });
        Self { follow }
    }

    /// Waits for the next change.
    pub(super) async fn next(&mut self) -> Change {
        match &mut self.follow {
            Some(follow) => follow.next().await,
            None => pending().await,
        }
    }

    /// Applies a change. Returns whether the snapshot has changed.
    pub(super) async fn take(&mut self, change: Change, edit: &mut Edit) -> bool {
        match &mut self.follow {
            Some(follow) => follow.take(change, edit).await,
            None => false,
        }
    }

    /// Reports whether nothing more is to be expected soon: each remote cluster has been read once, or is not likely
    /// to be.
    pub(super) fn is_settled(&self) -> bool {
        let follow = self.follow.as_ref();
        follow.is_none_or(|follow| {
            follow.is_listed && follow.clusters.values().all(Cluster::is_settled)
        })
    }

    /// Logs which clusters are not known although the mesh's state is about to be used.
    pub(super) fn warn_of_unread(&self) {
        let Some(follow) = &self.follow else { return };
        if !follow.is_listed {
            tracing::warn!(
                namespace = follow.remote.namespace,
                "remote secrets are not read yet: until they are, connections to pods of remote clusters are not known to be \
                 the mesh's, and leave in plaintext unless podNetworks contains their addresses"
            );
        }
        for (name, cluster) in &follow.clusters {
            if !cluster.is_read() {
                tracing::warn!(
                    cluster = %name, error = cluster.error(),
                    "remote cluster is not read yet: until it is, connections to its pods are not known to be the mesh's, \
                     and leave in plaintext unless podNetworks contains their addresses"
                );
            }
        }
    }
}

impl Follow {
    async fn next(&mut self) -> Change {
        tokio::select! {
            Some(event) = self.events.next() => Change::Secret(Box::new(event)),
            Some((name, update)) = self.updates.next() => Change::Cluster(name, update),
            else => pending().await,
        }
    }

    async fn take(&mut self, change: Change, edit: &mut Edit) -> bool {
        let is_listing = matches!(&change, Change::Cluster(_, update) if update.is_listing());
        let has_changed = match change {
            Change::Secret(event) => self.take_secret(*event, edit).await,
            Change::Cluster(name, update) => match self.clusters.get_mut(&name) {
                Some(cluster) => cluster.take(&name, update, edit),
                None => false,
            },
        };
        // Within a list the status stays as it was, and with many clusters it costs more than the object.
        if !is_listing {
            self.publish();
        }
        has_changed
    }

    async fn take_secret(&mut self, event: watcher::Event<Secret>, edit: &mut Edit) -> bool {
        match event {
            watcher::Event::Init => {
                self.listed.clear();
                return false;
            }
            watcher::Event::InitApply(secret) => {
                self.listed.insert(secret.name_any(), kubeconfigs(secret));
                return false;
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                self.is_listed = true;
                // As for all other kinds, an empty list deletes nothing.
                if listed.is_empty() && !self.secrets.is_empty() {
                    tracing::warn!(
                        secrets = self.secrets.len(),
                        "the API server lists no remote secrets any more; remote clusters stay until it reports that each \
                         secret was deleted"
                    );
                    return false;
                }
                self.secrets = listed;
            }
            watcher::Event::Apply(secret) => {
                self.secrets.insert(secret.name_any(), kubeconfigs(secret));
            }
            watcher::Event::Delete(secret) => {
                self.secrets.remove(&secret.name_any());
            }
        }
        self.follow_secrets(edit).await
    }

    /// Follows the clusters that the secrets name, and no others. Returns whether the snapshot has changed.
    async fn follow_secrets(&mut self, edit: &mut Edit) -> bool {
        let wanted = wanted(&self.secrets);
        let known = self.clusters.keys();
        let gone: Vec<_> = known
            .filter(|name| !wanted.contains_key(*name))
            .cloned()
            .collect();
        for name in &gone {
            self.updates.remove(name);
            if let Some(mut cluster) = self.clusters.remove(name) {
                cluster.known.clear(edit);
                tracing::info!(cluster = %name, "remote cluster removed");
            }
        }
        for (name, (secret, kubeconfig)) in wanted {
            let settings = self.settings_of(name);
            let generation = self.generation + 1;
            let cluster = self.clusters.entry(name.clone());
            let cluster = cluster.or_insert_with(|| Cluster::new(settings, generation));
            secret.clone_into(&mut cluster.secret);
            if cluster.kubeconfig.as_deref() == Some(kubeconfig) {
                continue;
            }
            self.generation = generation;
            cluster.kubeconfig = Some(kubeconfig.to_owned());
            match connect_by(kubeconfig).await {
                Ok(client) => {
                    tracing::info!(cluster = %name, secret, "remote cluster is followed");
                    cluster.read_anew(generation);
                    let updates = watch(&client, name, &cluster.trust_domain);
                    self.updates.insert(name.clone(), updates);
                }
                // An older kubeconfig stays in use.
                Err(error) => {
                    tracing::error!(cluster = %name, secret, "remote cluster: {error}");
                    cluster.health.refused(error.to_string());
                }
            }
        }
        !gone.is_empty()
    }

    /// Returns how objects of `cluster` are interpreted.
    fn settings_of(&self, cluster: &ClusterName) -> Settings {
        let own = &self.settings.trust_domain;
        let foreign = self.remote.trust_domains.get(cluster);
        let foreign = foreign.filter(|domain| !own.is_named(domain.as_str()));
        Settings {
            trust_domain: foreign.unwrap_or(own).clone(),
            ..self.settings.clone()
        }
    }

    fn publish(&self) {
        let clusters = self.clusters.iter();
        let status: Vec<_> = clusters
            .map(|(name, cluster)| cluster.status(name))
            .collect();
        if **self.status.load() != status {
            self.status.publish(status);
        }
    }
}

/// Returns the kubeconfigs of a secret.
fn kubeconfigs(secret: Secret) -> Kubeconfigs {
    let name = secret.name_any();
    let data = secret.data.unwrap_or_default().into_iter();
    data.filter_map(|(cluster, kubeconfig)| {
        let read = cluster.parse::<ClusterName>();
        let read = read.inspect_err(|error| tracing::error!(secret = name, "a key {error}"));
        // What is too long is refused later, and need not be kept until then.
        let mut kubeconfig = kubeconfig.0;
        kubeconfig.truncate(MAX_KUBECONFIG_BYTES + 1);
        Some((read.ok()?, kubeconfig))
    })
    .collect()
}

/// Returns the clusters that the secrets name, each with its secret and kubeconfig. A cluster that several secrets name is that
/// of the first by name.
fn wanted(secrets: &BTreeMap<String, Kubeconfigs>) -> BTreeMap<&ClusterName, (&str, &[u8])> {
    let mut wanted: BTreeMap<&ClusterName, (&str, &[u8])> = BTreeMap::new();
    for (secret, kubeconfigs) in secrets {
        for (name, kubeconfig) in kubeconfigs {
            if let Some((first, _)) = wanted.get(name) {
                tracing::warn!(cluster = %name, secret, first, "remote secret ignored: another one names the cluster, too");
            } else if wanted.len() == MAX_CLUSTERS {
                tracing::error!(cluster = %name, secret, "remote secret ignored: there are {MAX_CLUSTERS} already");
            } else {
                wanted.insert(name, (secret, kubeconfig));
            }
        }
    }
    wanted
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;

    use super::*;

    #[test]
    fn a_cluster_that_two_secrets_name_is_that_of_the_first() {
        let configs = |clusters: &[&str], config: &[u8]| -> Kubeconfigs {
            let clusters = clusters.iter();
            clusters
                .map(|name| (name.parse().unwrap(), config.to_vec()))
                .collect()
        };
        let secrets = BTreeMap::from([
            ("b".to_owned(), configs(&["east", "west"], b"2")),
            ("a".to_owned(), configs(&["east"], b"1")),
        ]);
        let wanted = wanted(&secrets);
        let shown: Vec<_> = { wanted.iter() }
            .map(|(name, (secret, config))| format!("{name} {secret} {}", config[0] as char))
            .collect();
        assert_eq!(shown, ["east a 1", "west b 2"]);
    }

    #[test]
    fn there_are_no_more_clusters_than_the_limit() {
        let all = (0..=MAX_CLUSTERS).map(|n| (format!("c{n}").parse().unwrap(), Vec::new()));
        let secrets = BTreeMap::from([("a".to_owned(), all.collect())]);
        assert_eq!(wanted(&secrets).len(), MAX_CLUSTERS);
    }

    #[test]
    fn keys_of_secrets_are_clusters_and_what_is_too_long_is_not_kept() {
        let data = [("east", "x"), ("a b", "x")];
        let data = data.map(|(name, text)| (name.to_owned(), ByteString(text.into())));
        let long = ("long".to_owned(), ByteString(vec![0; 1 << 20]));
        let secret = Secret {
            data: Some(data.into_iter().chain([long]).collect()),
            ..Secret::default()
        };
        let read = kubeconfigs(secret);
        let shown: Vec<_> = { read.iter() }
            .map(|(name, config)| format!("{name} {}", config.len()))
            .collect();
        let too_long = MAX_KUBECONFIG_BYTES + 1;
        assert_eq!(shown, ["east 1".to_owned(), format!("long {too_long}")]);
    }
}
