//! Warnings about policies and namespaces that have more effect than their author may expect, or none.
//!
//! [`Policies::warnings`](super::Policies::warnings) judges each object alone; these depend on the pods.

use super::{
    api::Action,
    diff::names,
    question::Known,
    reading::{Effect, Policy, Warning},
};

impl Known {
    /// Returns warnings for the authors of policies, each with the file if it is known, the object and the field.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for namespace in &self.enabled_namespaces {
            if self.system_namespaces.contains(&namespace.name) {
                warnings.push(format!(
                    "{}Namespace {}: {}",
                    file(namespace.file.as_deref()),
                    namespace.name,
                    "metadata.labels[auth-daemon.io/mesh]: puts pods into the mesh that the cluster or the mesh itself \
                     depends on: under STRICT they refuse plaintext from outside the mesh, such as the API server's to \
                     webhooks, other pods' DNS over TCP, and the nodes' to the CA; remove the label"
                ));
            }
        }
        for policy in self.policies.policies() {
            let found = policy
                .warnings()
                .chain(self.denies_everything(policy))
                .chain(self.selects_nothing(policy));
            for warning in found {
                let key = (warning.kind, warning.policy.clone());
                let file = file(self.files.get(&key).map(String::as_str));
                warnings.push(format!("{file}{warning}"));
            }
        }
        warnings
    }

    /// Warns about a policy that denies every connection to pods. An ALLOW policy does, if no other one allows any.
    fn denies_everything(&self, policy: &Policy) -> Option<Warning> {
        let (action, field) = policy.denies_everything()?;
        let mut pods: Vec<_> = self.selected(policy).collect();
        if action == Action::Allow {
            let allowing: Vec<_> = self
                .policies
                .policies()
                .iter()
                .filter(|other| other.can_allow())
                .collect();
            pods.retain(|pod| !allowing.iter().any(|other| other.applies_to(pod)));
        }
        if pods.is_empty() && !self.pods.is_empty() {
            return None;
        }
        let names_of_pods: Vec<_> = pods.iter().map(|pod| pod.name.to_string()).collect();
        let pods = match pods.len() {
            0 => "the pods that it selects".to_owned(),
            _ => names(&names_of_pods),
        };
        let text = match action {
            Action::Allow => format!(
                "no rule can match, and no other ALLOW policy allows anything to {pods}: every connection to them is \
                 denied; add a rule for the callers, unless that is the intention"
            ),
            _ => format!(
                "the rule matches every connection, so all connections to {pods} are denied, whatever other policies \
                 allow; name the callers or ports to deny, unless that is the intention"
            ),
        };
        Some(policy.warning(&field, &text))
    }

    /// Warns about a policy whose selector matches no pod. Without any pods there is nothing to compare with.
    fn selects_nothing(&self, policy: &Policy) -> Option<Warning> {
        let selector = policy.object.selector();
        let is_idle = matches!(policy.effect, Effect::Nothing(_)) || selector.is_empty();
        if is_idle || self.pods.is_empty() || self.selected(policy).next().is_some() {
            return None;
        }
        let place = match policy.is_mesh_wide {
            true => "the mesh".to_owned(),
            false => format!("namespace {}", policy.name.namespace),
        };
        let text = format!(
            "no pod of {place} has the labels {selector}, so the policy has no effect; compare the selector with the \
             pods' labels"
        );
        Some(policy.warning("spec.selector", &text))
    }
}

fn file(file: Option<&str>) -> String {
    file.map(|file| format!("{file}: ")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, sync::Arc};

    use serde_json::{Value, json};

    use crate::{
        Memberships, ObjectName, TrustDomain, Workload,
        policy::{
            Policies, Settings,
            api::Object,
            question::{EnabledNamespace, Known},
        },
    };

    /// Creates a mesh with the pods `shop/web` and `shop/db`, and these policies in namespace `shop`.
    fn known(specs: &[Value]) -> Known {
        let domain = TrustDomain::default();
        let pods = ["web", "db"].map(|app| {
            let name = ObjectName {
                namespace: "shop".into(),
                name: app.into(),
            };
            let mut pod = Workload::new(name, domain.identity("shop", app).unwrap());
            pod.labels.insert("app".into(), app.into());
            Arc::new(pod)
        });
        let objects: Vec<_> = specs
            .iter()
            .enumerate()
            .map(|(number, spec)| {
                let document = json!({
                    "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                    "metadata": {"namespace": "shop", "name": format!("p{number}")}, "spec": spec,
                });
                Arc::new(Object::read(&document).unwrap())
            })
            .collect();
        let files = objects
            .iter()
            .map(|object| ((object.kind(), object.name().clone()), "p.yaml".to_owned()));
        Known {
            source: "test".into(),
            pods: pods.to_vec(),
            services: Vec::new(),
            files: files.collect(),
            policies: Arc::new(Policies::compile(Settings::default(), objects)),
            memberships: Memberships::default(),
            enabled_namespaces: Vec::new(),
            system_namespaces: vec!["kube-system".into()],
        }
    }

    fn web(mut spec: Value) -> Value {
        spec["selector"] = json!({"matchLabels": {"app": "web"}});
        spec
    }

    #[test]
    fn warns_of_an_allow_policy_that_leaves_pods_without_callers() {
        let warnings = known(&[json!({})]).warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0]
                .starts_with("p.yaml: AuthorizationPolicy shop/p0: spec.rules: no rule can match"),
            "{warnings:?}"
        );
        assert!(warnings[0].contains("shop/web, shop/db"), "{warnings:?}");
        // A default that denies, with exceptions.
        let anyone = json!({"rules": [{}]});
        assert!(known(&[json!({}), anyone.clone()]).warnings().is_empty());
        let warnings = known(&[json!({}), web(anyone)]).warnings();
        assert!(warnings[0].contains("to shop/db: every"), "{warnings:?}");
        let by_method = json!({"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]});
        let warnings = known(&[by_method]).warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
    }

    #[test]
    fn warns_of_a_deny_policy_that_matches_every_connection() {
        let some = json!({"to": [{"operation": {"ports": ["80"]}}]});
        let deny = |rules: Value| web(json!({"action": "DENY", "rules": rules}));
        let warnings = known(&[deny(json!([some.clone(), {}]))]).warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].contains("shop/p0: spec.rules[1]: the rule matches every connection, so all connections to shop/web "),
            "{warnings:?}"
        );
        assert!(
            known(&[deny(json!([some])), deny(json!([]))])
                .warnings()
                .is_empty()
        );
    }

    #[test]
    fn warns_of_a_selector_that_matches_no_pod() {
        let spec = json!({"selector": {"matchLabels": {"app": "wbe"}}, "rules": [{}]});
        let warnings = known(std::slice::from_ref(&spec)).warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].contains("spec.selector: no pod of namespace shop has the labels app=wbe"),
            "{warnings:?}"
        );
        let mut without_pods = known(&[spec]);
        without_pods.pods.clear();
        assert!(without_pods.warnings().is_empty());
    }

    #[test]
    fn warns_of_an_enabled_system_namespace() {
        let mut known = known(&[]);
        known.enabled_namespaces = ["shop", "kube-system"]
            .map(|name| EnabledNamespace {
                name: name.into(),
                file: Some("n.yaml".into()),
            })
            .to_vec();
        known.files = HashMap::new();
        let warnings = known.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].starts_with(
                "n.yaml: Namespace kube-system: metadata.labels[auth-daemon.io/mesh]: puts"
            ),
            "{warnings:?}"
        );
    }
}
