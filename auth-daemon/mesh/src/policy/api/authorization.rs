//! AuthorizationPolicy: <https://istio.io/latest/docs/reference/config/security/authorization-policy/>.

use std::sync::Arc;

use serde_json::Value;

use super::{
    Account, FieldWarning, Pattern, Requirement, Rule, Selector, Values,
    pattern::{block, port},
    read::{FieldError, Node, quoted},
    rule::limit_values,
    targets,
};
use crate::ObjectName;

/// Maximum number of rules in a policy, and of sources or operations in a rule. Istio has the same limit.
const MAX_RULES: usize = 512;
/// Maximum number of conditions in a rule.
const MAX_CONDITIONS: usize = 64;
/// Annotation that makes a policy evaluated but not enforced.
const DRY_RUN: &str = "istio.io/dry-run";

/// Which callers may connect to the selected workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Name of the policy. Its namespace is its scope; the root namespace stands for the whole mesh.
    pub name: ObjectName,
    /// Effect of a match.
    pub action: Action,
    /// Whether the verdict is only reported, not enforced.
    pub dry_run: bool,
    /// Workloads in scope that the policy applies to.
    pub selector: Selector,
    /// Whether the policy is bound to gateways or services, so that it selects no workload here.
    pub elsewhere: bool,
    /// The policy matches if any of these rules matches. Without rules, it never matches.
    pub rules: Arc<[Rule]>,
    /// Fields that cannot be enforced.
    pub warnings: Vec<FieldWarning>,
    /// Why a later version cannot be read, in whose place this one stays in force.
    pub rejected: Option<FieldWarning>,
}

/// Effect of a match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Allows. Connections to the selected workloads that no ALLOW policy matches are denied.
    Allow,
    /// Denies, even if other policies allow.
    Deny,
    /// Records the connection in the access log.
    Audit,
}

impl AuthorizationPolicy {
    pub(super) fn read(document: &Value, name: ObjectName) -> Result<Self, FieldError> {
        let spec = Node::top(document, "spec");
        spec.only(&[
            "action",
            "rules",
            "selector",
            "targetRef",
            "targetRefs",
            "provider",
        ])?;
        let action = Action::read(&spec.field("action"))?;
        let dry_run = is_dry_run(document)?;
        let provider = spec.field("provider");
        if !provider.is_null() {
            return Err(provider.error("is for action CUSTOM, which is not supported"));
        }
        let selector = Selector::read(&spec.field("selector"))?;
        let mut warnings = Vec::new();
        let targets = targets(&spec);
        if let Some(targets) = &targets {
            if !spec.field("selector").is_null() {
                return Err(targets.error("contradicts spec.selector; a policy has one of them"));
            }
            warnings.push(targets.warning(
                "is for a waypoint or gateway, of which there are none here: the policy has no effect",
            ));
        }
        if dry_run && action == Action::Audit {
            warnings.push(FieldWarning {
                field: format!("metadata.annotations[{DRY_RUN}]"),
                text: "has no meaning for AUDIT, which never denies".into(),
            });
        }
        let reader = Reader {
            namespace: &name.namespace,
            action,
        };
        let field = spec.field("rules");
        let rules: Arc<[Rule]> = limited(&field, MAX_RULES)?
            .iter()
            .map(|rule| reader.rule(rule, &mut warnings))
            .collect::<Result<_, _>>()?;
        limit_values(&rules).map_err(|reason| field.error(reason))?;
        Ok(Self {
            action,
            dry_run: dry_run && action != Action::Audit,
            selector,
            elsewhere: targets.is_some(),
            rules,
            warnings,
            rejected: None,
            name,
        })
    }
}

impl Action {
    pub(super) fn read(node: &Node<'_>) -> Result<Self, FieldError> {
        match node.text()? {
            None | Some("ALLOW") => Ok(Self::Allow),
            Some("DENY") => Ok(Self::Deny),
            Some("AUDIT") => Ok(Self::Audit),
            Some("CUSTOM") => {
                Err(node.error("CUSTOM needs an external authorizer, of which there is none here"))
            }
            Some(other) => {
                Err(node.error(format!("{} is none of ALLOW, DENY, AUDIT", quoted(other))))
            }
        }
    }

    /// Returns the action's name in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
        }
    }
}

/// Reports whether the policy has the dry-run annotation.
pub(super) fn is_dry_run(document: &Value) -> Result<bool, FieldError> {
    let annotations = Node::top(document, "metadata").field("annotations");
    let Some((_, node)) = annotations.entries()?.find(|(key, _)| *key == DRY_RUN) else {
        return Ok(false);
    };
    // The values that Go's strconv.ParseBool accepts, which Istio uses.
    match node.text()? {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False" | "") => Ok(false),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some(other) => Err(node.error(format!("{} is neither true nor false", quoted(other)))),
    }
}

fn limited<'a>(node: &Node<'a>, limit: usize) -> Result<Vec<Node<'a>>, FieldError> {
    let elements: Vec<_> = node.list()?.take(limit + 1).collect();
    if elements.len() > limit {
        return Err(node.error(format!("has more than {limit} elements")));
    }
    Ok(elements)
}

/// Context for parsing the rules of a policy.
struct Reader<'a> {
    namespace: &'a str,
    action: Action,
}

const SOURCE_FIELDS: [&str; 14] = [
    "principals",
    "notPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "ipBlocks",
    "notIpBlocks",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
    "requestPrincipals",
    "notRequestPrincipals",
    "trustDomains",
    "notTrustDomains",
];
/// The fields of `SOURCE_FIELDS` that a layer-4 proxy cannot enforce.
const UNKNOWN_SOURCE_FIELDS: &[&str] = SOURCE_FIELDS.split_at(10).1;

const OPERATION_FIELDS: [&str; 8] = [
    "ports",
    "notPorts",
    "hosts",
    "notHosts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
];
const UNKNOWN_OPERATION_FIELDS: &[&str] = OPERATION_FIELDS.split_at(2).1;

/// Condition keys that cannot be enforced. A key that ends in a bracket or dot stands for all keys that begin with it.
const UNKNOWN_KEYS: [&str; 9] = [
    "request.headers[",
    "request.experimental.inline.headers[",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[",
    "connection.sni",
    "source.trustDomain",
    "experimental.envoy.filters.",
];

impl Reader<'_> {
    fn rule(&self, node: &Node<'_>, warnings: &mut Vec<FieldWarning>) -> Result<Rule, FieldError> {
        if node.is_null() {
            return Err(node.error("is null; a rule that matches everything is {}"));
        }
        node.only(&["from", "to", "when"])?;
        let mut rule = Rule::default();
        let mut unknown = Vec::new();
        for from in self.alternatives(&node.field("from"))? {
            from.only(&["source"])?;
            rule.from
                .push(self.source(&from.field("source"), &mut unknown)?);
        }
        for to in self.alternatives(&node.field("to"))? {
            to.only(&["operation"])?;
            rule.to
                .push(self.operation(&to.field("operation"), &mut unknown)?);
        }
        for when in limited(&node.field("when"), MAX_CONDITIONS)? {
            self.condition(&when, &mut rule.when, &mut unknown)?;
        }
        // Follows Istio's documentation (ambient: use layer 4 security policy; tasks: authorization for TCP traffic):
        // an ALLOW rule with an unknown attribute never matches, and a DENY rule ignores the attribute. Both deny more
        // than requested.
        if self.action == Action::Allow {
            rule.never = unknown
                .first()
                .map(|field| format!("{field} is unknown below HTTP"));
        }
        let consequence = match self.action {
            Action::Allow => "this rule never allows",
            Action::Deny => "this rule denies without it, which is more than it says",
            Action::Audit => "this rule audits without it",
        };
        warnings.extend(unknown.into_iter().map(|field| FieldWarning {
            field,
            text: format!("is unknown below HTTP, so {consequence}"),
        }));
        Ok(rule)
    }

    /// Parses the elements of `from` or `to`. Rejects an empty list: it would match everything, but its author may mean
    /// nothing.
    fn alternatives<'a>(&self, node: &Node<'a>) -> Result<Vec<Node<'a>>, FieldError> {
        let elements = limited(node, MAX_RULES)?;
        if elements.is_empty() && !node.is_null() {
            return Err(node.error("is empty; leave it out to match any"));
        }
        Ok(elements)
    }

    fn source(
        &self,
        node: &Node<'_>,
        unknown: &mut Vec<String>,
    ) -> Result<Vec<Requirement>, FieldError> {
        present(node, &SOURCE_FIELDS)?;
        let mut source = Vec::new();
        let mut add = |fields, parse: &dyn Fn(&Node<'_>) -> Result<Values, FieldError>| {
            require(node, fields, parse, &mut source)
        };
        add(["principals", "notPrincipals"], &principals)?;
        add(["serviceAccounts", "notServiceAccounts"], &|node| {
            self.accounts(node)
        })?;
        add(["namespaces", "notNamespaces"], &namespaces)?;
        add(["ipBlocks", "notIpBlocks"], &sources)?;
        // The same address, because no proxy forwards connections for others here.
        add(["remoteIpBlocks", "notRemoteIpBlocks"], &sources)?;
        let is_account = |one: &Requirement| matches!(one.values, Values::Accounts(_));
        let is_name =
            |one: &Requirement| matches!(one.values, Values::Principals(_) | Values::Namespaces(_));
        if source.iter().any(is_account) && source.iter().any(is_name) {
            return Err(node
                .field("serviceAccounts")
                .error("cannot be combined with principals or namespaces"));
        }
        unknown.extend(set(node, UNKNOWN_SOURCE_FIELDS)?);
        Ok(source)
    }

    fn operation(
        &self,
        node: &Node<'_>,
        unknown: &mut Vec<String>,
    ) -> Result<Vec<Requirement>, FieldError> {
        present(node, &OPERATION_FIELDS)?;
        let mut operation = Vec::new();
        require(node, ["ports", "notPorts"], &ports, &mut operation)?;
        unknown.extend(set(node, UNKNOWN_OPERATION_FIELDS)?);
        Ok(operation)
    }

    fn condition(
        &self,
        node: &Node<'_>,
        conditions: &mut Vec<Requirement>,
        unknown: &mut Vec<String>,
    ) -> Result<(), FieldError> {
        const FIELDS: [&str; 2] = ["values", "notValues"];
        node.only(&["key", "values", "notValues"])?;
        let key = node.field("key");
        let Some(name) = key.text()? else {
            return Err(key.error("is missing"));
        };
        let given = |field: &str| Ok(node.field(field).list()?.next().is_some());
        if !given("values")? && !given("notValues")? {
            return Err(node.error("has neither values nor notValues"));
        }
        let mut add = |parse: &dyn Fn(&Node<'_>) -> Result<Values, FieldError>| {
            require(node, FIELDS, parse, conditions)
        };
        match name {
            "source.ip" | "remote.ip" => add(&sources),
            "source.namespace" => add(&namespaces),
            "source.principal" => add(&principals),
            "source.serviceAccount" => add(&|node| self.accounts(node)),
            "destination.ip" => add(&|node| node.texts(block).map(Values::Destinations)),
            "destination.port" => add(&ports),
            _ => {
                let is_unknown =
                    UNKNOWN_KEYS
                        .iter()
                        .any(|known| match known.strip_suffix(['[', '.']) {
                            Some(_) => name.starts_with(known),
                            None => name == *known,
                        });
                if !is_unknown {
                    return Err(key.error(format!("{} is not supported", quoted(name))));
                }
                // Parsed anyway, to reject values that are not lists of strings.
                for field in FIELDS {
                    node.field(field).texts(|_| Ok(()))?;
                }
                unknown.push(format!("{}: {}", key.path(), quoted(name)));
                Ok(())
            }
        }
    }

    fn accounts(&self, node: &Node<'_>) -> Result<Values, FieldError> {
        node.texts(|text| Account::new(text, self.namespace))
            .map(Values::Accounts)
    }
}

fn principals(node: &Node<'_>) -> Result<Values, FieldError> {
    node.texts(Pattern::principal).map(Values::Principals)
}

fn namespaces(node: &Node<'_>) -> Result<Values, FieldError> {
    node.texts(Pattern::namespace).map(Values::Namespaces)
}

fn sources(node: &Node<'_>) -> Result<Values, FieldError> {
    node.texts(block).map(Values::Sources)
}

fn ports(node: &Node<'_>) -> Result<Values, FieldError> {
    node.texts(port).map(Values::Ports)
}

/// Adds the requirements of a field and of its negative form, if they are set.
fn require(
    node: &Node<'_>,
    [positive, negative]: [&str; 2],
    parse: &dyn Fn(&Node<'_>) -> Result<Values, FieldError>,
    requirements: &mut Vec<Requirement>,
) -> Result<(), FieldError> {
    for (name, negated) in [(positive, false), (negative, true)] {
        let field = node.field(name);
        let values = parse(&field)?;
        if field.list()?.next().is_some() {
            requirements.push(Requirement {
                field: field.path().into(),
                negated,
                values,
            });
        }
    }
    Ok(())
}

/// Rejects an object that has unknown fields, or no fields, because without fields it would match everything.
fn present(node: &Node<'_>, known: &[&str]) -> Result<(), FieldError> {
    node.only(known)?;
    if node.is_null() {
        return Err(node.error("is missing"));
    }
    let empty = |field: &&str| {
        let value = node.field(field);
        value.is_null() || value.value().as_array().is_some_and(Vec::is_empty)
    };
    if known.iter().all(empty) {
        return Err(node.error("is empty; leave it out to match any"));
    }
    Ok(())
}

/// Returns the paths of those `fields` that have values.
fn set(node: &Node<'_>, fields: &[&str]) -> Result<Vec<String>, FieldError> {
    let mut paths = Vec::new();
    for field in fields {
        let field = node.field(field);
        if !field.texts(|_| Ok(()))?.is_empty() {
            paths.push(field.path().to_owned());
        }
    }
    Ok(paths)
}
