//! The remote clusters that are followed, as the status has them, and which pods belong to them.

use auth_mesh::Workload;
use serde::Serialize;

/// A remote cluster, as the daemon's status has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteStatus {
    /// Name of the cluster.
    pub name: String,
    /// The first reading that was of this cluster. Pods of earlier ones are of a former cluster of the same name.
    #[serde(skip)]
    pub generation: u64,
    /// Name of the Secret with its kubeconfig.
    pub secret: String,
    /// Trust domain of its pods.
    pub trust_domain: String,
    /// Number of its pods that are known.
    pub pods: usize,
    /// Number of its services that are known.
    pub services: usize,
    /// Why it cannot be read. What is known of it stays in force.
    pub error: Option<String>,
    /// Since when it cannot be read, as RFC 3339 has it.
    pub since: Option<String>,
}

/// Why a pod is not of a remote cluster any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClusterGone {
    /// There is no cluster of that name.
    #[error("the remote cluster {0} was removed")]
    Removed(String),
    /// Another cluster has the name.
    #[error("the remote cluster {0} was replaced by another one of that name")]
    Replaced(String),
}

/// Fails if the remote cluster that `pod` is of is not one of `clusters` any more. A pod of the daemon's own cluster
/// belongs to none.
pub(crate) fn check_cluster(clusters: &[RemoteStatus], pod: &Workload) -> Result<(), ClusterGone> {
    let Some(name) = pod.name.cluster() else {
        return Ok(());
    };
    match clusters.iter().find(|cluster| cluster.name == name) {
        None => Err(ClusterGone::Removed(name.to_owned())),
        Some(cluster) if pod.generation < cluster.generation => {
            Err(ClusterGone::Replaced(name.to_owned()))
        }
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use auth_mesh::ObjectName;

    use super::*;

    #[test]
    fn a_pod_is_of_the_cluster_in_which_it_was_found() {
        let pod = |namespace: &str, generation| Workload {
            generation,
            ..Workload::new(
                ObjectName {
                    namespace: namespace.into(),
                    name: "web".into(),
                },
                "spiffe://east.example/ns/shop/sa/web".parse().unwrap(),
            )
        };
        let clusters = [RemoteStatus {
            name: "east".into(),
            generation: 3,
            secret: String::new(),
            trust_domain: "east.example".into(),
            pods: 1,
            services: 0,
            error: None,
            since: None,
        }];
        let check = |namespace: &str, generation| {
            let checked = check_cluster(&clusters, &pod(namespace, generation));
            checked.map_err(|why| why.to_string())
        };
        assert_eq!(check("shop", 0), Ok(()));
        assert_eq!(check("shop@east", 3), Ok(()));
        // Read again, and still the same cluster.
        assert_eq!(check("shop@east", 4), Ok(()));
        let replaced = "the remote cluster east was replaced by another one of that name";
        assert_eq!(check("shop@east", 2), Err(replaced.to_owned()));
        let removed = "the remote cluster west was removed";
        assert_eq!(check("shop@west", 3), Err(removed.to_owned()));
    }
}
