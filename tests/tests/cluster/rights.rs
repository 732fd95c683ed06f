//! The step that compares the API rights that the chart grants with those that all steps before it used.

use std::collections::BTreeSet;

use mesh_tests::{Context, Result};
use serde_json::Value;

use crate::stage::{SYSTEM, Stage, ensure};

/// A verb on a resource that a role grants to a service account.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Right {
    account: String,
    verb: String,
    /// With its API group, which may be empty.
    resource: String,
    /// In all namespaces, or only in [`SYSTEM`].
    everywhere: bool,
    /// The objects that it is limited to; empty: any.
    names: BTreeSet<String>,
}

impl Right {
    /// Whether it covers a request, as the API server's RBAC authorizer decides.
    fn covers(&self, request: &Request) -> bool {
        self.account == request.account
            && self.verb == request.verb
            && self.resource == request.resource
            && (self.everywhere || request.namespace == SYSTEM)
            && (self.names.is_empty() || self.names.contains(&request.name))
    }
}

/// A request of a service account, from the API server's audit log.
struct Request {
    account: String,
    verb: String,
    resource: String,
    namespace: String,
    name: String,
}

/// The right that no step here uses, because the cluster's tokens name their node;
/// `auth-daemon/tests/kubernetes/attestation.rs` fails without it.
const USED_ELSEWHERE: (&str, &str, &str) = ("auth-ca", "get", "pods.");

fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}

/// The rights that the bindings of the chart grant to its service accounts.
fn granted(stage: &Stage) -> Result<BTreeSet<Right>> {
    let ours = "-l app.kubernetes.io/part-of=auth-daemon";
    let mut rights = BTreeSet::new();
    for (kind, everywhere) in [("clusterrolebindings", true), ("rolebindings", false)] {
        let bindings = stage.get(&format!("{kind} -n {SYSTEM} {ours}"))?;
        for binding in bindings["items"].as_array().context("no list")? {
            let role = &binding["roleRef"];
            let role = stage.get(&format!(
                "{} -n {SYSTEM} {}",
                text(role, "kind"),
                text(role, "name")
            ))?;
            let subject = &binding["subjects"][0];
            for rule in role["rules"].as_array().context("no rules")? {
                rights.extend(expanded(rule).map(|(verb, resource)| Right {
                    account: text(subject, "name").to_owned(),
                    verb,
                    resource,
                    everywhere,
                    names: list(rule, "resourceNames").into_iter().collect(),
                }));
            }
        }
    }
    Ok(rights)
}

/// The texts in a list of a rule, which may be absent.
fn list(rule: &Value, field: &str) -> Vec<String> {
    let entries = rule[field].as_array().into_iter().flatten();
    entries
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect()
}

/// Each verb of a rule on each of its resources.
fn expanded(rule: &Value) -> impl Iterator<Item = (String, String)> {
    let [verbs, resources, groups] =
        ["verbs", "resources", "apiGroups"].map(|field| list(rule, field));
    let resources: Vec<String> = groups
        .iter()
        .flat_map(|group| resources.iter().map(move |one| format!("{one}.{group}")))
        .collect();
    verbs.into_iter().flat_map(move |verb| {
        resources
            .clone()
            .into_iter()
            .map(move |one| (verb.clone(), one))
    })
}

/// A request of the audit log, if it is for a resource.
fn request(event: &Value) -> Option<Request> {
    let object = event["objectRef"].as_object()?;
    let field = |name: &str| {
        let value = object.get(name).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let user = event["user"]["username"].as_str()?;
    Some(Request {
        account: user.rsplit_once(':')?.1.to_owned(),
        verb: text(event, "verb").to_owned(),
        resource: format!("{}.{}", field("resource"), field("apiGroup")),
        namespace: field("namespace"),
        name: field("name"),
    })
}

/// Whether RBAC refused a request. What an admission plugin refuses also has the status 403: an object in a namespace
/// that is being deleted, for example.
fn is_forbidden(event: &Value) -> bool {
    event["annotations"]["authorization.k8s.io/decision"] == "forbid"
}

/// Each right was the only one to cover some request, and no request was forbidden.
pub(crate) fn all_are_used(stage: &Stage) -> Result<()> {
    let audited = stage.cluster.api().audited()?;
    let granted = granted(stage)?;
    // While it starts, the API server also refuses what bindings and roles grant that it has not read yet.
    let is_granted = |request: Request| granted.iter().any(|right| right.covers(&request));
    let not_granted: Vec<_> = audited
        .iter()
        .filter(|event| is_forbidden(event) && !request(event).is_some_and(is_granted))
        .collect();
    ensure(not_granted.is_empty(), || {
        format!("requested, but not granted: {not_granted:?}")
    })?;
    for account in ["auth-daemon", "auth-ca"] {
        ensure(granted.iter().any(|right| right.account == account), || {
            format!("{account} has no rights")
        })?;
    }
    let mut unused = granted.clone();
    for request in audited.iter().filter_map(request) {
        let mut covering = granted.iter().filter(|right| right.covers(&request));
        if let (Some(only), None) = (covering.next(), covering.next()) {
            unused.remove(only);
        }
    }
    unused.retain(|right| (&*right.account, &*right.verb, &*right.resource) != USED_ELSEWHERE);
    println!("    {} rights, {} requests", granted.len(), audited.len());
    ensure(unused.is_empty(), || {
        format!("granted, but not needed: {unused:#?}")
    })
}
