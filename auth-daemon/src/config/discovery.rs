//! Where the daemon gets the state of the mesh from.

use std::{collections::BTreeSet, path::PathBuf, str::FromStr};

use super::{
    CaServer, Proof, RemoteClusters,
    ca::{cluster_id, server},
    kubernetes_namespace,
};
use auth_mesh::{Membership, MeshDefault};
use auth_support::config::{Section, absolute};

/// Source of pods and services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// A folder of Kubernetes manifests, watched.
    Files(PathBuf),
    /// The API of the cluster.
    Kubernetes {
        /// Which pods are in the mesh. By default all except those of `kube-system` and of the daemon's own namespace.
        defaults: MeshDefault,
        /// The daemon's own namespace, `$POD_NAMESPACE`, where the other nodes' daemons are too.
        own_namespace: String,
        /// Defaults to ignore.
        node_taint: NodeTaint,
        /// Remote clusters. Defaults to none.
        remote: Option<RemoteClusters>,
    },
    /// istiod, the control plane of an Istio mesh, and for the pods of this node the API of the cluster.
    Istiod {
        /// How to reach it.
        server: CaServer,
        /// The node's network in Istio. Empty by default.
        network: String,
        /// As for Kubernetes.
        own_namespace: String,
        /// Whether istiod is asked only for what the node's pods need, instead of everything. Defaults to false.
        on_demand: bool,
    },
}

impl Discovery {
    /// Whether the daemon asks for names as its pods need them.
    pub fn is_on_demand(&self) -> bool {
        matches!(
            self,
            Self::Istiod {
                on_demand: true,
                ..
            }
        )
    }

    /// The daemon's own namespace. `None` outside a cluster.
    pub fn own_namespace(&self) -> Option<&str> {
        match self {
            Self::Files(_) => None,
            Self::Kubernetes { own_namespace, .. } | Self::Istiod { own_namespace, .. } => {
                Some(own_namespace)
            }
        }
    }
}

/// What the daemon does with the taint `auth-daemon.io/not-ready` of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeTaint {
    /// Removes it once it serves the node, and puts it back when it stops without a successor.
    Manage,
    /// Nothing.
    Ignore,
}

/// A folder, the cluster's API, or istiod.
pub(super) fn read(
    sources: &mut Section,
    own_namespace: Option<String>,
    errors: &mut Vec<String>,
) -> Option<Discovery> {
    const SOURCES: [&str; 3] = ["files", "kubernetes", "istiod"];
    let given: Vec<_> = SOURCES
        .into_iter()
        .filter(|name| sources.has(name))
        .collect();
    let own_namespace = |section: &str, errors: &mut Vec<String>| {
        let known = own_namespace.filter(|namespace| !namespace.is_empty());
        if known.is_none() {
            errors.push(format!(
                "discovery.{section}: $POD_NAMESPACE is not set; it says where the nodes' daemons are"
            ));
        }
        known
    };
    match given.as_slice() {
        ["files"] => sources
            .required("files", errors, absolute)
            .map(Discovery::Files),
        ["istiod"] => {
            let mut control_plane = sources.section("istiod", errors);
            let proof = control_plane.required("tokenFile", errors, absolute);
            let proof = proof.map(Proof::Token);
            let server = server("discovery.istiod", &mut control_plane, proof, errors);
            let network = control_plane.parsed("network", errors, cluster_id);
            let on_demand = control_plane.parsed("subscribe", errors, |s| match s {
                "all" => Ok(false),
                "onDemand" => Ok(true),
                _ => Err("is neither all nor onDemand"),
            });
            control_plane.refuse_the_rest(errors);
            let own_namespace = own_namespace("istiod", errors)?;
            Some(Discovery::Istiod {
                server: server?,
                network: network.unwrap_or_default(),
                own_namespace,
                on_demand: on_demand.unwrap_or(false),
            })
        }
        ["kubernetes"] => {
            let mut cluster = sources.section("kubernetes", errors);
            let membership = cluster.parsed("default", errors, Membership::from_str);
            let excluded = cluster.list("excludedNamespaces", errors, kubernetes_namespace);
            let node_taint = cluster.parsed("nodeTaint", errors, |s| match s {
                "manage" => Ok(NodeTaint::Manage),
                "ignore" => Ok(NodeTaint::Ignore),
                _ => Err("is neither manage nor ignore"),
            });
            let own_namespace = own_namespace("kubernetes", errors);
            let remote = cluster.has("remoteClusters").then(|| {
                let mut remote = cluster.section("remoteClusters", errors);
                let read = RemoteClusters::read(&mut remote, own_namespace.as_deref(), errors);
                remote.refuse_the_rest(errors);
                read
            });
            cluster.refuse_the_rest(errors);
            let own_namespace = own_namespace?;
            let mut excluded: BTreeSet<_> = excluded
                .unwrap_or_else(|| vec!["kube-system".into()])
                .into_iter()
                .collect();
            excluded.insert(own_namespace.clone());
            Some(Discovery::Kubernetes {
                defaults: MeshDefault {
                    membership: membership.unwrap_or(Membership::Enabled),
                    excluded,
                },
                own_namespace,
                node_taint: node_taint.unwrap_or(NodeTaint::Ignore),
                remote: remote.flatten(),
            })
        }
        [] => {
            errors.push(
                "discovery: has neither files, a folder of manifests, nor kubernetes, for the cluster's API, nor istiod"
                    .into(),
            );
            None
        }
        several => {
            errors.push(format!(
                "discovery: has {}; it is one or the other",
                several.join(" and ")
            ));
            for name in several {
                sources.skip(name);
            }
            None
        }
    }
}
