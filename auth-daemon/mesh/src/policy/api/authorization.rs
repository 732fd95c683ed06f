//! AuthorizationPolicy: <https://istio.io/latest/docs/reference/config/security/authorization-policy/>.

use ipnet::IpNet;
use serde_json::Value;

use super::{
    Account, Pattern, Selector,
    pattern::{block, port},
    read::{Fault, Node, quoted},
    targets,
};
use crate::ObjectName;

/// Most rules of a policy, and sources or operations of a rule: Istio's own limit.
const MAX_RULES: usize = 512;
/// Most conditions of a rule.
const MAX_CONDITIONS: usize = 64;
/// Evaluates a policy without enforcing it.
const DRY_RUN: &str = "istio.io/dry-run";

/// Who may call the workloads that it selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizationPolicy {
    /// Its name. The namespace is its scope; the root namespace is the whole mesh.
    pub name: ObjectName,
    /// What a match does.
    pub action: Action,
    /// Whether its verdict is only told, not enforced.
    pub dry_run: bool,
    /// The workloads of its scope that it is for.
    pub selector: Selector,
    /// Whether it is for gateways or services: then it selects nothing here.
    pub elsewhere: bool,
    /// It matches when one of them does; so without any, never.
    pub rules: Vec<Rule>,
    /// What cannot be met, each with its field.
    pub warnings: Vec<String>,
}

/// What a match does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Allows. What it selects is otherwise denied.
    Allow,
    /// Denies, whatever allows.
    Deny,
    /// Is noted in the access log.
    Audit,
}

/// Matches a connection that one of the sources, one of the operations and all conditions match. Without sources, any
/// matches; so with operations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// `from`
    pub from: Vec<Source>,
    /// `to`
    pub to: Vec<Operation>,
    /// `when`
    pub when: Vec<Condition>,
    /// Whether it can never match: it allows by something that is not to be known below HTTP.
    pub never: bool,
}

/// Values of which one must match, where there are any, and none may match.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matches<T> {
    /// One of these, unless there are none.
    pub any: Vec<T>,
    /// None of these.
    pub none: Vec<T>,
}

/// `from.source`: all fields must match.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// `principals` and `notPrincipals`, without `spiffe://`.
    pub principals: Matches<Pattern>,
    /// `namespaces` and `notNamespaces`
    pub namespaces: Matches<Pattern>,
    /// `serviceAccounts` and `notServiceAccounts`
    pub accounts: Matches<Account>,
    /// `ipBlocks` and `notIpBlocks`
    pub blocks: Matches<IpNet>,
    /// `remoteIpBlocks` and `notRemoteIpBlocks`. Nothing here forwards for others, so this is the same address.
    pub remote_blocks: Matches<IpNet>,
}

/// `to.operation`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// `ports` and `notPorts`
    pub ports: Matches<u16>,
}

/// One of `when`: a key with its values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `source.ip`
    SourceIp(Matches<IpNet>),
    /// `remote.ip`: see [`Source::remote_blocks`].
    RemoteIp(Matches<IpNet>),
    /// `source.namespace`
    Namespace(Matches<Pattern>),
    /// `source.principal`
    Principal(Matches<Pattern>),
    /// `source.serviceAccount`
    Account(Matches<Account>),
    /// `destination.ip`
    DestinationIp(Matches<IpNet>),
    /// `destination.port`
    DestinationPort(Matches<u16>),
}

impl AuthorizationPolicy {
    pub(super) fn read(document: &Value, name: ObjectName) -> Result<Self, Fault> {
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
            return Err(provider.fault("is for action CUSTOM, which is not known here"));
        }
        let selector = Selector::read(&spec.field("selector"))?;
        let mut warnings = Vec::new();
        let targets = targets(&spec);
        if let Some(targets) = &targets {
            if !spec.field("selector").is_null() {
                return Err(targets.fault("contradicts spec.selector; a policy has one of them"));
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
    pub(super) fn read(node: &Node<'_>) -> Result<Self, Fault> {
        match node.text()? {
            None | Some("ALLOW") => Ok(Self::Allow),
            Some("DENY") => Ok(Self::Deny),
            Some("AUDIT") => Ok(Self::Audit),
            Some("CUSTOM") => {
                Err(node.fault("CUSTOM needs an external authorizer, of which there is none here"))
            }
            Some(other) => {
                Err(node.fault(format!("{} is none of ALLOW, DENY, AUDIT", quoted(other))))
            }
        }
    }

    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
        }
    }
}

impl<T> Matches<T> {
    /// Whether nothing is asked for.
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

/// Whether the policy is annotated so.
pub(super) fn is_dry_run(document: &Value) -> Result<bool, Fault> {
    let annotations = Node::top(document, "metadata").field("annotations");
    let Some((_, node)) = annotations.entries()?.find(|(key, _)| *key == DRY_RUN) else {
        return Ok(false);
    };
    // Go's strconv.ParseBool, which Istio reads it with.
    match node.text()? {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False" | "") => Ok(false),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some(other) => Err(node.fault(format!("{} is neither true nor false", quoted(other)))),
    }
}

fn limited<'a>(node: &Node<'a>, limit: usize) -> Result<Vec<Node<'a>>, Fault> {
    let elements: Vec<_> = node.list()?.take(limit + 1).collect();
    if elements.len() > limit {
        return Err(node.fault(format!("has more than {limit} elements")));
    }
    Ok(elements)
}

/// What all rules of a policy are read with.
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
/// Those of them that a layer-4 proxy cannot meet.
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

/// Keys of conditions that cannot be met; those that end in a bracket or dot go on.
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
    fn rule(&self, node: &Node<'_>, warnings: &mut Vec<String>) -> Result<Rule, Fault> {
        if node.is_null() {
            return Err(node.fault("is null; a rule that matches everything is {}"));
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
        // Istio's documentation (ambient: use layer 4 security policy; tasks: authorization for TCP traffic): a rule
        // that allows by what cannot be known is left out, one that denies goes without it. Both refuse more than asked.
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

    /// The elements of `from` or `to`. An empty list would mean any; who writes it may mean none.
    fn alternatives<'a>(&self, node: &Node<'a>) -> Result<Vec<Node<'a>>, Fault> {
        let elements = limited(node, MAX_RULES)?;
        if elements.is_empty() && !node.is_null() {
            return Err(node.fault("is empty; leave it out to match any"));
        }
        Ok(elements)
    }

    fn source(&self, node: &Node<'_>, unmet: &mut Vec<String>) -> Result<Source, Fault> {
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
                .fault("cannot stand beside principals or namespaces"));
        }
        unmet.extend(set(node, UNMET_SOURCE_FIELDS)?);
        Ok(source)
    }

    fn operation(&self, node: &Node<'_>, unmet: &mut Vec<String>) -> Result<Operation, Fault> {
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
    ) -> Result<Option<Condition>, Fault> {
        node.only(&["key", "values", "notValues"])?;
        let key = node.field("key");
        let Some(name) = key.text()? else {
            return Err(key.fault("is missing"));
        };
        let given = |field: &str| Ok(node.field(field).list()?.next().is_some());
        if !given("values")? && !given("notValues")? {
            return Err(node.fault("has neither values nor notValues"));
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
                    return Err(key.fault(format!("{} is not known here", quoted(name))));
                }
                // Read all the same: what is no list of strings is a mistake.
                matches(node, "values", "notValues", |_| Ok(()))?;
                unmet.push(format!("{}: {}", key.path(), quoted(name)));
                return Ok(None);
            }
        };
        Ok(Some(condition))
    }
}

/// Refuses an object that has no fields, or others than `known`: without any, it would match everything.
fn present(node: &Node<'_>, known: &[&str]) -> Result<(), Fault> {
    node.only(known)?;
    if node.is_null() {
        return Err(node.fault("is missing"));
    }
    let empty = |field: &&str| {
        let value = node.field(field);
        value.is_null() || value.value().as_array().is_some_and(Vec::is_empty)
    };
    if known.iter().all(empty) {
        return Err(node.fault("is empty; leave it out to match any"));
    }
    Ok(())
}

fn matches<T>(
    node: &Node<'_>,
    any: &str,
    none: &str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Matches<T>, Fault> {
    Ok(Matches {
        any: node.field(any).texts(&parse)?,
        none: node.field(none).texts(&parse)?,
    })
}

/// Which of `fields` have values.
fn set(node: &Node<'_>, fields: &[&str]) -> Result<Vec<String>, Fault> {
    let mut paths = Vec::new();
    for field in fields {
        let field = node.field(field);
        if !field.texts(|_| Ok(()))?.is_empty() {
            paths.push(field.path().to_owned());
        }
    }
    Ok(paths)
}
