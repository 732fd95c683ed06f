//! What a cluster gives to another one that reads it.

use std::fs;

use anyhow::{Context, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Kubernetes, TokenOptions};

const READER: &str = "remote-reader";

impl Kubernetes {
    /// Creates a service account in namespace `default` that may read what a remote cluster is read for, and nothing else.
    /// Returns a remote secret with its kubeconfig, for another cluster to create: this one's name there is `cluster`.
    pub fn remote_secret(&self, cluster: &str) -> Result<Value> {
        self.service_account("default", READER)?;
        let rules = json!([{
            "apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"],
        }]);
        self.grant(None, READER, ("default", READER), &rules)?;
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
