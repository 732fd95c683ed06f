//! What a cluster gives to another one that reads it.

use std::fs;

use anyhow::{Context, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Kubernetes, TokenOptions};

const RBAC: &str = "rbac.authorization.k8s.io";
const READER: &str = "remote-reader";

impl Kubernetes {
    /// Creates a service account in namespace `default` that may read what a remote cluster is read for, and nothing else.
    /// Returns a remote secret with its kubeconfig, for another cluster to create: this one's name there is `cluster`.
    pub fn remote_secret(&self, cluster: &str) -> Result<Value> {
        self.service_account("default", READER)?;
        let role = json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole", "metadata": {"name": READER},
            "rules": [{
                "apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"],
            }],
        });
        let binding = json!({
            "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRoleBinding", "metadata": {"name": READER},
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": READER},
            "subjects": [{"kind": "ServiceAccount", "name": READER, "namespace": "default"}],
        });
        for (plural, object) in [("clusterroles", role), ("clusterrolebindings", binding)] {
            self.create(&format!("/apis/{RBAC}/v1/{plural}"), &object)?;
        }
        let authority = fs::read(self.certificate_authority()).context("reading the CA")?;
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": cluster,
            "clusters": [{"name": cluster, "cluster": {
                "server": format!("https://{}", self.address()),
                "certificate-authority-data": STANDARD.encode(authority),
            }}],
            "users": [{"name": cluster, "user": {
                "token": self.token("default", READER, &TokenOptions::default())?,
            }}],
            "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": cluster}}],
        });
        Ok(json!({
            "apiVersion": "v1", "kind": "Secret",
            "metadata": {
                "name": format!("istio-remote-secret-{cluster}"),
                "labels": {"istio/multiCluster": "true"},
                "annotations": {"networking.istio.io/cluster": cluster},
            },
            "stringData": {cluster: kubeconfig.to_string()},
        }))
    }
}
