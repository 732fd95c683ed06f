//! The trust domain in principals: `cluster.local` stands for the mesh's own trust domain, whatever its name is, as in
//! Istio (`istio.io/istio/pilot/pkg/trustdomain`). A policy that is copied from one mesh to another so keeps its meaning.

use std::sync::Arc;

use super::api::{AuthorizationPolicy, Condition, Object, Pattern};
use crate::TrustDomain;

/// The trust domain that stands for the mesh's own.
const OWN: &str = "cluster.local";

/// Returns `object` with the mesh's own trust domain in place of `cluster.local`.
pub(super) fn resolve(object: Arc<Object>, own: &TrustDomain) -> Arc<Object> {
    let Object::Authorization(policy) = &*object else {
        return object;
    };
    if own.as_str() == OWN || !principals(policy).any(|principal| domain(principal) == Some(OWN)) {
        return object;
    }
    let mut policy = policy.clone();
    for principal in principals_mut(&mut policy) {
        if let Pattern::Exact(text) | Pattern::Prefix(text) = principal
            && let Some((OWN, path)) = text.split_once('/')
        {
            *text = format!("{own}/{path}").into();
        }
    }
    Arc::new(Object::Authorization(policy))
}

/// Returns a warning for each principal of a trust domain other than the mesh's own: no client has such an identity.
pub(super) fn warnings(policy: &AuthorizationPolicy, own: &TrustDomain) -> Vec<String> {
    let mut warnings = Vec::new();
    for principal in principals(policy) {
        let Some(domain) = domain(principal).filter(|domain| *domain != own.as_str()) else {
            continue;
        };
        let warning = format!(
            "principal {principal} matches no client: its trust domain {domain} is not known here; \
             the mesh's own is {own}, which cluster.local stands for, too"
        );
        if !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }
    warnings
}

/// Returns the trust domain of a principal, unless a wildcard leaves it open.
fn domain(principal: &Pattern) -> Option<&str> {
    match principal {
        Pattern::Exact(text) | Pattern::Prefix(text) => Some(text.split_once('/')?.0),
        Pattern::Suffix(_) | Pattern::Present => None,
    }
}

fn principals(policy: &AuthorizationPolicy) -> impl Iterator<Item = &Pattern> {
    policy.rules.iter().flat_map(|rule| {
        let sources = rule.from.iter().map(|source| &source.principals);
        let conditions = rule.when.iter().filter_map(|condition| match condition {
            Condition::Principal(values) => Some(values),
            _ => None,
        });
        let matches = sources.chain(conditions);
        matches.flat_map(|matches| matches.any.iter().chain(&matches.none))
    })
}

fn principals_mut(policy: &mut AuthorizationPolicy) -> impl Iterator<Item = &mut Pattern> {
    policy.rules.iter_mut().flat_map(|rule| {
        let sources = rule.from.iter_mut().map(|source| &mut source.principals);
        let conditions = rule
            .when
            .iter_mut()
            .filter_map(|condition| match condition {
                Condition::Principal(values) => Some(values),
                _ => None,
            });
        let matches = sources.chain(conditions);
        matches.flat_map(|matches| matches.any.iter_mut().chain(&mut matches.none))
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr};

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        Identity,
        policy::{Connection, Policies, Settings},
    };

    fn policies(trust_domain: &str, action: &str, from: &Value) -> Policies {
        let document = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"action": action, "rules": [from]},
        });
        let settings = Settings {
            trust_domain: trust_domain.parse().unwrap(),
            ..Settings::default()
        };
        Policies::compile(settings, [Arc::new(Object::read(&document).unwrap())])
    }

    fn allows(policies: &Policies, client: &str) -> bool {
        let client: Identity = format!("spiffe://{client}").parse().unwrap();
        let connection = Connection {
            client: Some(&client),
            source: "10.0.0.1".parse().unwrap(),
            destination: SocketAddr::new("10.0.0.2".parse().unwrap(), 80),
        };
        let policy = policies.workload("shop", &BTreeMap::new());
        policy.evaluate(&connection).allowed()
    }

    #[test]
    fn cluster_local_stands_for_the_meshs_own_trust_domain() {
        let by_source = |field: &str, value: &str| {
            let mut source = json!({});
            source[field] = json!([value]);
            json!({"from": [{"source": source}]})
        };
        let by_condition = |field: &str, value: &str| {
            let mut when = json!({"key": "source.principal"});
            when[field] = json!([value]);
            json!({"when": [when]})
        };
        let web = "prod.example/ns/shop/sa/web";
        let api = "prod.example/ns/shop/sa/api";
        for (case, rule, action, web_allowed, api_allowed) in [
            (
                "exact",
                by_source("principals", "cluster.local/ns/shop/sa/web"),
                "DENY",
                false,
                true,
            ),
            (
                "prefix",
                by_source("principals", "cluster.local/ns/*"),
                "DENY",
                false,
                false,
            ),
            (
                "own name",
                by_source("principals", web),
                "ALLOW",
                true,
                false,
            ),
            (
                "not",
                by_source("notPrincipals", "cluster.local/ns/shop/sa/web"),
                "ALLOW",
                false,
                true,
            ),
            (
                "condition",
                by_condition("values", "cluster.local/ns/shop/sa/web"),
                "ALLOW",
                true,
                false,
            ),
            (
                "not in condition",
                by_condition("notValues", "cluster.local/ns/shop/sa/web"),
                "DENY",
                true,
                false,
            ),
        ] {
            let policies = policies("prod.example", action, &rule);
            assert_eq!(allows(&policies, web), web_allowed, "{case}");
            assert_eq!(allows(&policies, api), api_allowed, "{case}");
            assert_eq!(policies.warnings(), [""; 0], "{case}");
        }
    }

    #[test]
    fn warns_of_a_trust_domain_that_is_not_known() {
        let rule = json!({"from": [{"source": {"principals": ["other.example/ns/shop/sa/web", "*/sa/web"]}}]});
        let policies = policies("prod.example", "DENY", &rule);
        let warnings = policies.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].starts_with(
                "AuthorizationPolicy shop/web: principal other.example/ns/shop/sa/web matches no client"
            ),
            "{warnings:?}"
        );
    }

    #[test]
    fn cluster_local_is_not_a_second_name_where_it_is_the_own_one() {
        let rule = json!({"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/web"]}}]});
        let policies = policies("cluster.local", "ALLOW", &rule);
        assert!(allows(&policies, "cluster.local/ns/shop/sa/web"));
        assert_eq!(policies.warnings(), [""; 0]);
    }
}
