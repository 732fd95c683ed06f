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
}

impl Right {
    /// Whether it covers a request. RBAC also compares the object's name; a request that it refuses for its name fails
    /// this step, too.
    fn covers(&self, request: &Request) -> bool {
        self.account == request.account
            && self.verb == request.verb
            && self.resource == request.resource
            && (self.everywhere || request.namespace == SYSTEM)
    }
}

/// A request of a service account, from the API server's audit log.
struct Request {
    account: String,
    verb: String,
    resource: String,
    namespace: String,
}

/// What no step here uses, because the cluster's tokens name their node; `auth-daemon/tests/kubernetes/attestation.rs`
/// fails without it.
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
                }));
            }
        }
    }
    Ok(rights)
}

/// Each verb of a rule on each of its resources.
fn expanded(rule: &Value) -> impl Iterator<Item = (String, String)> {
    let list = |field: &str| -> Vec<String> {
        let entries = rule[field].as_array().into_iter().flatten();
        entries
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect()
    };
    let (verbs, resources, groups) = (list("verbs"), list("resources"), list("apiGroups"));
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
    })
}

/// Whether the API server refused a request for want of a right. While it starts, it refuses those of roles that it has
/// not read yet, and says so.
fn is_forbidden(event: &Value) -> bool {
    let reason = text(&event["annotations"], "authorization.k8s.io/reason");
    event["responseStatus"]["code"] == 403 && !reason.contains("not found")
}

/// Each right was the only one to cover some request, and no request was refused.
pub(crate) fn all_are_used(stage: &Stage) -> Result<()> {
    let audited = stage.cluster.api().audited()?;
    let forbidden: Vec<_> = audited.iter().filter(|event| is_forbidden(event)).collect();
    ensure(forbidden.is_empty(), || format!("forbidden: {forbidden:?}"))?;
    let granted = granted(stage)?;
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
