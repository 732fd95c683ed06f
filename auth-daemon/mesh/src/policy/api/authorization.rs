//! AuthorizationPolicy: <https://istio.io/latest/docs/reference/config/security/authorization-policy/>.

use ipnet::IpNet;
use serde_json::Value;

use super::{
    Account, Pattern, Selector,
    pattern::{block, port},
    read::{FieldError, Node, quoted},
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
    pub rules: Vec<Rule>,
    /// Fields that cannot be enforced, each with an explanation.
    pub warnings: Vec<String>,
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

/// A rule, which matches a connection if at least one source, at least one operation and all conditions match. An empty
/// list of sources or operations matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// `from`.
    pub from: Vec<Source>,
    /// `to`.
    pub to: Vec<Operation>,
    /// `when`.
    pub when: Vec<Condition>,
    /// Whether the rule can never match, because it allows based on attributes that are unknown below HTTP.
    pub never: bool,
}

/// A requirement on a value: it must match one of `any`, unless that is empty, and none of `none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matches<T> {
    /// Values of which one must match. If empty, every value matches.
    pub any: Vec<T>,
    /// Values that must not match.
    pub none: Vec<T>,
}

/// `from.source`. All fields must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// `principals` and `notPrincipals`, without `spiffe://`.
    pub principals: Matches<Pattern>,
    /// `namespaces` and `notNamespaces`.
    pub namespaces: Matches<Pattern>,
    /// `serviceAccounts` and `notServiceAccounts`.
    pub accounts: Matches<Account>,
    /// `ipBlocks` and `notIpBlocks`.
    pub blocks: Matches<IpNet>,
    /// `remoteIpBlocks` and `notRemoteIpBlocks`. Compared with the same address as `blocks`, because no proxy forwards
    /// connections for others here.
    pub remote_blocks: Matches<IpNet>,
}

/// `to.operation`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// `ports` and `notPorts`.
    pub ports: Matches<u16>,
}

/// An entry of `when`: a key with its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Matches<IpNet>),
    /// `remote.ip`. See [`Source::remote_blocks`].
    RemoteIp(Matches<IpNet>),
    /// `source.namespace`.
    Namespace(Matches<Pattern>),
    /// `source.principal`.
    Principal(Matches<Pattern>),
    /// `source.serviceAccount`.
    Account(Matches<Account>),
    /// `destination.ip`.
    DestinationIp(Matches<IpNet>),
    /// `destination.port`.
    DestinationPort(Matches<u16>),
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
            return Err(provider.error("is for action CUSTOM, which is not known here"));
        }
        let selector = Selector::read(&spec.field("selector"))?;
        let mut warnings = Vec::new();
        let targets = targets(&spec);
        if let Some(targets) = &targets {
            if !spec.field("selector").is_null() {
                return Err(targets.error("contradicts spec.selector; a policy has one of them"));
            }
            warnings.push(format!(
                "{}: is for a waypoint or gateway, of which there are none here: the policy has no effect",
                targets.path()
            ));
        }
        if dry_run && action == Action::Audit {
            warnings.push(format!(
                "metadata.annotations[{DRY_RUN}]: means nothing for AUDIT, which never denies"
            ));
        }
        let reader = Reader {
            namespace: &name.namespace,
            action,
        };
        let rules = limited(&spec.field("rules"), MAX_RULES)?
            .iter()
            .map(|rule| reader.rule(rule, &mut warnings))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            action,
            dry_run: dry_run && action != Action::Audit,
            selector,
            elsewhere: targets.is_some(),
            rules,
            warnings,
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

impl<T> Matches<T> {
    /// Reports whether there is no requirement.
    pub fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

impl<T> Default for Matches<T> {
    fn default() -> Self {
        Self {
            any: Vec::new(),
            none: Vec::new(),
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
const UNMET_SOURCE_FIELDS: &[&str] = SOURCE_FIELDS.split_at(10).1;

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
const UNMET_OPERATION_FIELDS: &[&str] = OPERATION_FIELDS.split_at(2).1;

/// Condition keys that cannot be enforced. A key that ends in a bracket or dot stands for all keys that begin with it.
const UNMET_KEYS: [&str; 9] = [
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
    fn rule(&self, node: &Node<'_>, warnings: &mut Vec<String>) -> Result<Rule, FieldError> {
        if node.is_null() {
            return Err(node.error("is null; a rule that matches everything is {}"));
        }
        node.only(&["from", "to", "when"])?;
        let mut rule = Rule::default();
        let mut unmet = Vec::new();
        for from in self.alternatives(&node.field("from"))? {
            from.only(&["source"])?;
            rule.from
                .push(self.source(&from.field("source"), &mut unmet)?);
        }
        for to in self.alternatives(&node.field("to"))? {
            to.only(&["operation"])?;
            rule.to
                .push(self.operation(&to.field("operation"), &mut unmet)?);
        }
        for when in limited(&node.field("when"), MAX_CONDITIONS)? {
            rule.when.extend(self.condition(&when, &mut unmet)?);
        }
        // Follows Istio's documentation (ambient: use layer 4 security policy; tasks: authorization for TCP traffic):
        // an ALLOW rule with an unknown attribute never matches, and a DENY rule ignores the attribute. Both deny more
        // than requested.
        rule.never = self.action == Action::Allow && !unmet.is_empty();
        warnings.extend(unmet.into_iter().map(|field| match self.action {
            Action::Allow => format!("{field}: cannot be known below HTTP, so this rule never allows"),
            Action::Deny => {
                format!("{field}: cannot be known below HTTP, so this rule denies without it: more than it says")
            }
            Action::Audit => format!("{field}: cannot be known below HTTP, so this rule audits without it"),
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

    fn source(&self, node: &Node<'_>, unmet: &mut Vec<String>) -> Result<Source, FieldError> {
        present(node, &SOURCE_FIELDS)?;
        let source = Source {
            principals: matches(node, "principals", "notPrincipals", Pattern::principal)?,
            namespaces: matches(node, "namespaces", "notNamespaces", Pattern::namespace)?,
            accounts: matches(node, "serviceAccounts", "notServiceAccounts", |text| {
                Account::new(text, self.namespace)
            })?,
            blocks: matches(node, "ipBlocks", "notIpBlocks", block)?,
            remote_blocks: matches(node, "remoteIpBlocks", "notRemoteIpBlocks", block)?,
        };
        let alone = source.principals.is_empty() && source.namespaces.is_empty();
        if !source.accounts.is_empty() && !alone {
            return Err(node
                .field("serviceAccounts")
                .error("cannot stand beside principals or namespaces"));
        }
        unmet.extend(set(node, UNMET_SOURCE_FIELDS)?);
        Ok(source)
    }

    fn operation(&self, node: &Node<'_>, unmet: &mut Vec<String>) -> Result<Operation, FieldError> {
        present(node, &OPERATION_FIELDS)?;
        let operation = Operation {
            ports: matches(node, "ports", "notPorts", port)?,
        };
        unmet.extend(set(node, UNMET_OPERATION_FIELDS)?);
        Ok(operation)
    }

    fn condition(
        &self,
        node: &Node<'_>,
        unmet: &mut Vec<String>,
    ) -> Result<Option<Condition>, FieldError> {
        node.only(&["key", "values", "notValues"])?;
        let key = node.field("key");
        let Some(name) = key.text()? else {
            return Err(key.error("is missing"));
        };
        let given = |field: &str| Ok(node.field(field).list()?.next().is_some());
        if !given("values")? && !given("notValues")? {
            return Err(node.error("has neither values nor notValues"));
        }
        let account = |text: &str| Account::new(text, self.namespace);
        let condition = match name {
            "source.ip" => Condition::SourceIp(matches(node, "values", "notValues", block)?),
            "remote.ip" => Condition::RemoteIp(matches(node, "values", "notValues", block)?),
            "source.namespace" => {
                Condition::Namespace(matches(node, "values", "notValues", Pattern::namespace)?)
            }
            "source.principal" => {
                Condition::Principal(matches(node, "values", "notValues", Pattern::principal)?)
            }
            "source.serviceAccount" => {
                Condition::Account(matches(node, "values", "notValues", account)?)
            }
            "destination.ip" => {
                Condition::DestinationIp(matches(node, "values", "notValues", block)?)
            }
            "destination.port" => {
                Condition::DestinationPort(matches(node, "values", "notValues", port)?)
            }
            _ => {
                let unmet_key =
                    UNMET_KEYS
                        .iter()
                        .any(|known| match known.strip_suffix(['[', '.']) {
                            Some(_) => name.starts_with(known),
                            None => name == *known,
                        });
                if !unmet_key {
                    return Err(key.error(format!("{} is not known here", quoted(name))));
                }
                // Parsed anyway, to reject values that are not lists of strings.
                matches(node, "values", "notValues", |_| Ok(()))?;
                unmet.push(format!("{}: {}", key.path(), quoted(name)));
                return Ok(None);
            }
        };
        Ok(Some(condition))
    }
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

fn matches<T>(
    node: &Node<'_>,
    any: &str,
    none: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Matches<T>, FieldError> {
    Ok(Matches {
        any: node.field(any).texts(&parse)?,
        none: node.field(none).texts(&parse)?,
    })
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
