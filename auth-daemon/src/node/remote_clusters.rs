//! Applies changes of remote clusters to open connections, and logs the clusters that are not trusted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{observe::remote_clusters::check_cluster, proxy::Node};

/// Cuts the open connections to pods of remote clusters that are removed, or replaced by others of the same name. Logs which remote clusters are of a trust domain
/// without a federation entry.
///
/// Connections *from* pods of a removed cluster stay: what admits them is their certificate, trust and policies, and changes of
/// these cut them. The end of a single pod does not cut anything either: its last bytes may still be on their way.
pub(super) async fn keep(node: Arc<Node>) {
    let (mut changes, mut federation) = (node.remote.changes(), node.federation.changes());
    let (mut known, mut untrusted) = (None, BTreeSet::new());
    loop {
        let clusters = node.remote.current();
        let generations: BTreeMap<_, _> = clusters
            .iter()
            .map(|cluster| (cluster.name.clone(), cluster.generation))
            .collect();
        if known.as_ref() != Some(&generations) {
            node.connections.cut(|_, details| {
                let gone = check_cluster(&clusters, details.remote_server.as_ref()?).err()?;
                Some(gone.to_string())
            });
        }
        for cluster in clusters.iter() {
            let (name, trust_domain) = (&cluster.name, &cluster.trust_domain);
            if node.trusts(trust_domain) {
                if untrusted.remove(name) {
                    tracing::info!(
                        cluster = name,
                        trust_domain,
                        "remote cluster's trust domain is trusted again"
                    );
                }
            } else if untrusted.insert(name.clone()) {
                tracing::warn!(
                    cluster = name,
                    trust_domain,
                    "remote cluster's trust domain is not trusted: connections to and from its pods are refused; add the \
                     trust domain to federation, or delete the cluster's remote secret"
                );
            }
        }
        untrusted.retain(|name| generations.contains_key(name));
        known = Some(generations);
        // The senders live as long as the node.
        tokio::select! {
            _ = changes.changed() => {}
            _ = federation.changed() => {}
        }
    }
}
