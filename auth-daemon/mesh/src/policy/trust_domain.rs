//! The trust domain in principals: `cluster.local` stands for the mesh's own trust domain, whatever its name is, as in
//! Istio (`istio.io/istio/pilot/pkg/security/trustdomain`). So a policy that is copied from one mesh to another keeps
//! its meaning. The same holds for the trust domain's aliases.

use std::{collections::HashSet, sync::Arc};

use super::{
    Settings,
    api::{AuthorizationPolicy, FieldWarning, Pattern, Requirement, Rule, Values},
};
use crate::TrustDomain;

/// The trust domain that stands for the mesh's own.
const OWN: &str = "cluster.local";
/// Maximum number of principals of a policy that warnings name. A policy may list 200,000.
const MAX_NAMED: usize = 20;

/// Returns the rules of `policy`, with the mesh's own trust domain in place of `cluster.local` and of its aliases.
pub(super) fn resolve(policy: &AuthorizationPolicy, own: &TrustDomain) -> Arc<[Rule]> {
    let is_other_name = |name: &str| name != own.as_str() && (name == OWN || own.is_named(name));
    if !principals(policy).any(|(_, principal)| domain(principal).is_some_and(is_other_name)) {
        return policy.rules.clone();
    }
    let mut rules = policy.rules.to_vec();
    for requirement in rules.iter_mut().flat_map(Rule::requirements_mut) {
        let Values::Principals(principals) = &mut requirement.values else {
            continue;
        };
        for principal in principals {
            if let Pattern::Exact(text) | Pattern::Prefix(text) = principal
                && let Some((name, path)) = text.split_once('/')
                && is_other_name(name)
            {
                *text = format!("{own}/{path}").into();
            }
        }
    }
    rules.into()
}

/// Returns a warning for each principal of a trust domain that is neither the mesh's own nor one that it federates with: no
/// client has such an identity. The last one counts those that are not named.
pub(super) fn warnings(policy: &AuthorizationPolicy, settings: &Settings) -> Vec<FieldWarning> {
    let own = &settings.trust_domain;
    let foreign = &settings.foreign_trust_domains;
    let mut warnings = Vec::new();
    let mut found = HashSet::new();
    for (requirement, principal) in principals(policy) {
        let is_foreign = |name: &str| foreign.iter().any(|domain| domain.as_str() == name);
        let is_unknown = |name: &&str| *name != OWN && !own.is_named(name) && !is_foreign(name);
        let Some(domain) = domain(principal).filter(is_unknown) else {
            continue;
        };
        if !found.insert((&*requirement.field, principal)) || found.len() > MAX_NAMED {
            continue;
        }
        warnings.push(FieldWarning {
            field: requirement.field.to_string(),
            text: format!(
                "principal {principal} matches no client, because its trust domain {domain} is neither the \
                 mesh's, nor one of trustDomainAliases, nor one of federation; use cluster.local, which stands for the mesh's own ({own})"
            ),
        });
    }
    let unnamed = found.len() - warnings.len();
    if unnamed > 0 {
        warnings.push(FieldWarning {
            field: "spec.rules".into(),
            text: format!("{unnamed} more principals match no client for the same reason"),
        });
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

fn principals(policy: &AuthorizationPolicy) -> impl Iterator<Item = (&Requirement, &Pattern)> {
    let requirements = policy.rules.iter().flat_map(Rule::requirements);
    requirements.flat_map(|requirement| {
        let principals = match &requirement.values {
            Values::Principals(principals) => principals.as_slice(),
            _ => &[],
        };
        principals
            .iter()
            .map(move |principal| (requirement, principal))
    })
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr};

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        Identity,
        policy::{Connection, Policies, Settings, api::Object},
    };

    fn policies(trust_domain: &str, action: &str, from: &Value) -> Policies {
        compile(trust_domain.parse().unwrap(), action, from)
    }

    fn compile(trust_domain: TrustDomain, action: &str, from: &Value) -> Policies {
        let document = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"action": action, "rules": [from]},
        });
        let settings = Settings {
            trust_domain,
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
            assert_eq!(policies.warnings(), [], "{case}");
        }
    }

    #[test]
    fn an_alias_is_another_name_of_the_meshs_own_trust_domain() {
        let rule = json!({"from": [{"source": {"principals": ["old.example/ns/shop/sa/web"]}}]});
        for own in ["new.example", "cluster.local"] {
            let domain: TrustDomain = own.parse().unwrap();
            let aliased = domain.with_aliases(["old.example".parse().unwrap()]);
            let policies = compile(aliased, "ALLOW", &rule);
            assert!(allows(&policies, &format!("{own}/ns/shop/sa/web")), "{own}");
            assert!(
                !allows(&policies, &format!("{own}/ns/shop/sa/api")),
                "{own}"
            );
            assert_eq!(policies.warnings(), [], "{own}");
            let unknown = super::tests::policies(own, "ALLOW", &rule);
            assert!(!allows(&unknown, &format!("{own}/ns/shop/sa/web")), "{own}");
            assert_eq!(unknown.warnings().len(), 1, "{own}");
        }
    }

    #[test]
    fn warns_of_a_trust_domain_that_is_not_known() {
        let rule = json!({"from": [{"source": {"principals": ["other.example/ns/shop/sa/web", "*/sa/web"]}}]});
        let policies = policies("prod.example", "DENY", &rule);
        let warnings = policies.warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(
            warnings[0].to_string().starts_with(
                "AuthorizationPolicy shop/web: spec.rules[0].from[0].source.principals: principal \
                 other.example/ns/shop/sa/web matches no client"
            ),
            "{warnings:?}"
        );
    }

    #[test]
    fn a_principal_of_a_foreign_trust_domain_is_that_one_alone() {
        let rule = json!({"from": [{"source": {"principals": ["other.example/ns/shop/sa/web"]}}]});
        let document = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"action": "ALLOW", "rules": [rule]},
        });
        let settings = Settings {
            foreign_trust_domains: vec!["other.example".parse().unwrap()],
            ..Settings::default()
        };
        let policies = Policies::compile(settings, [Arc::new(Object::read(&document).unwrap())]);
        assert_eq!(policies.warnings(), []);
        for (client, expected) in [
            ("other.example/ns/shop/sa/web", true),
            ("other.example/ns/shop/sa/api", false),
            ("cluster.local/ns/shop/sa/web", false),
            ("third.example/ns/shop/sa/web", false),
        ] {
            assert_eq!(allows(&policies, client), expected, "{client}");
        }
    }

    #[test]
    fn very_many_unknown_principals_are_counted() {
        let principals: Vec<_> = (0..100_000).map(|number| format!("a/{number}")).collect();
        let source = json!({"source": {"principals": principals}});
        let policies = policies("prod.example", "DENY", &json!({"from": [source]}));
        let warnings = policies.warnings();
        assert_eq!(warnings.len(), MAX_NAMED + 1);
        assert!(warnings[0].text.contains("principal a/0 matches no client"));
        let last = &warnings[MAX_NAMED].text;
        assert!(last.starts_with("99980 more principals"), "{last}");
    }

    #[test]
    fn cluster_local_is_not_a_second_name_where_it_is_the_own_one() {
        let rule = json!({"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/web"]}}]});
        let policies = policies("cluster.local", "ALLOW", &rule);
        assert!(allows(&policies, "cluster.local/ns/shop/sa/web"));
        assert_eq!(policies.warnings(), []);
    }
}
