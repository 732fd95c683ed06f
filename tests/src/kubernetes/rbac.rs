//! Rights of service accounts.

use anyhow::Result;
use serde_json::{Value, json};

use super::Kubernetes;

const GROUP: &str = "rbac.authorization.k8s.io";

/// A role with `rules`, and its binding to the service account `account` of the namespace `of`. The name of both is `name`. They
/// hold in `namespace`, or everywhere.
pub(crate) fn role(
    namespace: Option<&str>,
    name: &str,
    (of, account): (&str, &str),
    rules: &Value,
) -> [Value; 2] {
    let version = format!("{GROUP}/v1");
    let kind = match namespace {
        Some(_) => "Role",
        None => "ClusterRole",
    };
    let metadata = json!({"name": name, "namespace": namespace});
    [
        json!({"apiVersion": version, "kind": kind, "metadata": metadata, "rules": rules}),
        json!({
            "apiVersion": version, "kind": format!("{kind}Binding"), "metadata": metadata,
            "roleRef": {"apiGroup": GROUP, "kind": kind, "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": of}],
        }),
    ]
}

impl Kubernetes {
    /// Creates a role with `rules`, and its binding to a service account (namespace and name). The name of both is `name`. They
    /// hold in `namespace`, or everywhere.
    pub fn grant(
        &self,
        namespace: Option<&str>,
        name: &str,
        account: (&str, &str),
        rules: &Value,
    ) -> Result<()> {
        let (within, kind) = match namespace {
            Some(namespace) => (format!("namespaces/{namespace}/"), "role"),
            None => (String::new(), "clusterrole"),
        };
        let objects = role(namespace, name, account, rules);
        for (object, plural) in objects.iter().zip(["s", "bindings"]) {
            self.create(&format!("/apis/{GROUP}/v1/{within}{kind}{plural}"), object)?;
        }
        Ok(())
    }
}
