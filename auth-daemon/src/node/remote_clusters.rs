//! Applies changes of remote clusters to open connections, and tells of those that cannot be reached.

use std::{collections::BTreeSet, sync::Arc};

use crate::proxy::Node;

/// Cuts the open connections to pods of remote clusters that are removed. Logs which remote clusters are of a trust domain
/// without a federation entry.
///
/// Connections *from* pods of a removed cluster stay: what admits them is their certificate, trust and policies, and changes of
/// these cut them. Nor does the end of a single pod cut anything: its last bytes may still be on their way.
pub(super) async fn keep(node: Arc<Node>) {
    let (mut changes, mut federation) = (node.remote.changes(), node.federation.changes());
    let (mut known, mut untrusted) = (None, BTreeSet::new());
    loop {
        let clusters = node.remote.current();
        let names: BTreeSet<_> = clusters
            .iter()
            .map(|cluster| cluster.name.clone())
            .collect();
        if known.as_ref() != Some(&names) {
            node.connections.cut(|_, details| {
                let cluster = details.remote_server.as_ref()?.name.cluster()?;
                let is_gone = !names.contains(cluster);
                is_gone.then(|| format!("the remote cluster {cluster} was removed"))
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
        untrusted.retain(|name| names.contains(name));
        known = Some(names);
        // The senders live as long as the node.
        tokio::select! {
            _ = changes.changed() => {}
            _ = federation.changed() => {}
        }
    }
}
