//! Policies. istiod has already converted PeerAuthentications, and applied Istio's rules for HTTP attributes, which a layer-4
//! proxy does not know: an ALLOW rule with one is left out, a DENY rule ignores it.

use std::{collections::BTreeMap, sync::Arc};

use auth_mesh::{
    ObjectName,
    policy::api::{
        Account, Action, AuthorizationPolicy, Instead, Kind, MAX_VALUES, Object, Pattern,
        Requirement, Rule, Selector, Unreadable, Values, limit_values,
    },
};
use ipnet::IpNet;
use prost::Message;

use crate::{
    read::{Mesh, any_address, name, object_name},
    security_api::{self as api, string_match::MatchType},
};

/// Maximum size of a policy, in bytes: what etcd takes.
const MAX_BYTES: usize = 3 << 19;
/// Maximum number of rules that a policy may become.
const MAX_RULES: usize = 4096;

/// A policy that the model can enforce, or why it cannot.
pub(crate) struct Read {
    pub(crate) object: Arc<Object>,
    /// Why the policy is enforced as [`Object::Unreadable`].
    pub(crate) error: Option<String>,
}

/// Reads the policy `resource` (`namespace/name`). One that cannot be read allows nothing that it might have denied.
pub(crate) fn policy(
    resource: &str,
    bytes: Result<&[u8], String>,
    mesh: &Mesh,
) -> Result<Read, String> {
    let own_name = object_name("name", resource)?;
    let mut unreadable = Unreadable {
        kind: Kind::Authorization,
        name: own_name.clone(),
        field: "resource".into(),
        reason: String::new(),
        instead: Instead::DenyAll,
        selector: Selector::default(),
    };
    let found = match bytes.and_then(decode) {
        Ok(found) => found,
        Err(reason) => {
            unreadable.reason = reason;
            return Ok(failed(unreadable));
        }
    };
    let is_known = api::Action::try_from(found.action).is_ok();
    let action = match found.action() {
        api::Action::Allow => Action::Allow,
        api::Action::Deny => Action::Deny,
    };
    unreadable.instead = match (found.dry_run, is_known, action) {
        (true, ..) => Instead::Nothing,
        (false, true, Action::Allow) => Instead::AllowNothing,
        (false, ..) => Instead::DenyAll,
    };
    let (own_name, selector) = scope(&found, own_name, mesh);
    unreadable.name.clone_from(&own_name);
    unreadable.selector = selector.clone();
    let rules = match is_known {
        true => rules(&found.groups),
        false => Err(("action".into(), format!("{} is unknown", found.action))),
    };
    Ok(match rules {
        Ok(rules) => Read {
            object: Arc::new(Object::Authorization(AuthorizationPolicy {
                name: own_name,
                action,
                dry_run: found.dry_run,
                selector,
                elsewhere: false,
                rules: rules.into(),
                warnings: Vec::new(),
                rejected: None,
            })),
            error: None,
        },
        Err((field, reason)) => failed(Unreadable {
            field,
            reason,
            ..unreadable
        }),
    })
}

fn failed(unreadable: Unreadable) -> Read {
    Read {
        error: Some(unreadable.to_string()),
        object: Arc::new(Object::Unreadable(unreadable)),
    }
}

/// Decodes a policy. Fields that this version does not know could have narrowed what it matches, so it must not have any.
fn decode(bytes: &[u8]) -> Result<api::Authorization, String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("is larger than {MAX_BYTES} bytes"));
    }
    let found = api::Authorization::decode(bytes).map_err(|error| error.to_string())?;
    if found.encoded_len() != bytes.len() {
        return Err("has fields that this version does not know".into());
    }
    Ok(found)
}

/// Returns the name and selector that give a policy its scope in the model: the namespace of its name, and the workloads
/// that name it.
fn scope(found: &api::Authorization, own_name: ObjectName, mesh: &Mesh) -> (ObjectName, Selector) {
    match api::Scope::try_from(found.scope) {
        Ok(api::Scope::Namespace) => (own_name, Selector::default()),
        Ok(api::Scope::WorkloadSelector) => {
            let selector = Selector::of([marker(&own_name)].into());
            (own_name, selector)
        }
        // An unknown scope may be any.
        Ok(api::Scope::Global) | Err(_) => {
            let name = match own_name.namespace == mesh.root_namespace {
                true => own_name.name,
                false => own_name.to_string(),
            };
            let namespace = mesh.root_namespace.clone();
            (ObjectName { namespace, name }, Selector::default())
        }
    }
}

/// Returns the label of workloads that the policy `name` selects. No label of Kubernetes has a colon in its key.
pub(crate) fn marker(name: &ObjectName) -> (String, String) {
    (format!("istiod:{name}"), String::new())
}

/// The name of the policy that denies every connection to the workloads whose policies are not known.
const PENDING: &str = "istiod:pending";

/// Returns the label of workloads whose policies are not known yet.
pub(crate) fn pending_marker() -> (String, String) {
    (PENDING.to_owned(), String::new())
}

/// Returns the policy that denies every connection to the workloads with [`pending_marker`].
pub(crate) fn pending_policy(mesh: &Mesh) -> Arc<Object> {
    Arc::new(Object::Authorization(AuthorizationPolicy {
        name: ObjectName {
            namespace: mesh.root_namespace.clone(),
            name: PENDING.into(),
        },
        action: Action::Deny,
        dry_run: false,
        selector: Selector::of(BTreeMap::from([pending_marker()])),
        elsewhere: false,
        rules: Arc::new([Rule::default()]),
        warnings: Vec::new(),
        rejected: None,
    }))
}

type FieldError = (String, String);
/// Requirements of which all must be met.
type All = Vec<Requirement>;

/// Converts groups, of which any may match.
fn rules(groups: &[api::Group]) -> Result<Vec<Rule>, FieldError> {
    let mut converted = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        let field = format!("groups[{index}]");
        converted.extend(group_rules(&field, group, MAX_RULES - converted.len())?);
    }
    limit_values(&converted).map_err(|reason| ("groups".to_owned(), reason))?;
    Ok(converted)
}

/// Converts a group, which matches if one match of each of its rules does. The model has two places for alternatives: `to`,
/// which is about ports alone, and `from`, which is about everything else. More alternatives become rules of their own.
fn group_rules(field: &str, group: &api::Group, room: usize) -> Result<Vec<Rule>, FieldError> {
    let mut first = Rule::default();
    let mut others: Vec<Vec<All>> = Vec::new();
    for (index, rules) in group.rules.iter().enumerate() {
        let field = format!("{field}.rules[{index}]");
        if rules.matches.is_empty() {
            return Err((field, "has no match".into()));
        }
        let mut alternatives = rules
            .matches
            .iter()
            .enumerate()
            .map(|(index, one)| requirements(&format!("{field}.matches[{index}]"), one))
            .collect::<Result<Vec<All>, _>>()?;
        let about_ports = |one: &Requirement| matches!(one.values, Values::Ports(_));
        let mut all = alternatives.iter().flatten();
        if alternatives.len() == 1 {
            first.when.append(&mut alternatives[0]);
        } else if first.to.is_empty() && all.clone().all(about_ports) {
            first.to = alternatives;
        } else if first.from.is_empty() && !all.any(about_ports) {
            first.from = alternatives;
        } else {
            others.push(alternatives);
        }
    }
    if room == 0 {
        return Err((field.to_owned(), format!("is beyond {MAX_RULES} rules")));
    }
    let mut converted = vec![first];
    for alternatives in others {
        if converted.len().saturating_mul(alternatives.len()) > room {
            return Err((field.to_owned(), format!("is more than {MAX_RULES} rules")));
        }
        // Each of them is copied for each alternative.
        let values: usize = converted.iter().map(Rule::values).sum();
        if values.saturating_mul(alternatives.len()) > MAX_VALUES {
            return Err((
                field.to_owned(),
                format!("is more than {MAX_VALUES} values"),
            ));
        }
        let combined = |rule: &Rule, all: &All| {
            let mut rule = rule.clone();
            rule.when.extend(all.iter().cloned());
            rule
        };
        converted = converted
            .iter()
            .flat_map(|rule| alternatives.iter().map(move |all| combined(rule, all)))
            .collect();
    }
    Ok(converted)
}

fn requirements(field: &str, found: &api::Match) -> Result<All, FieldError> {
    if !found.extensions.is_empty() {
        let field = format!("{field}.extensions");
        return Err((field, "are not supported".into()));
    }
    let principals = |list: &[api::StringMatch]| patterns(list).map(Values::Principals);
    let namespaces = |list: &[api::StringMatch]| patterns(list).map(Values::Namespaces);
    let mut all = Vec::new();
    let mut add = |name: &str, is_set: bool, negated: bool, values: Result<Values, String>| {
        let field = format!("{field}.{name}");
        match values {
            Err(reason) => Err((field, reason)),
            Ok(_) if !is_set => Ok(()),
            Ok(values) => {
                all.push(Requirement {
                    field: field.into(),
                    negated,
                    values,
                });
                Ok(())
            }
        }
    };
    macro_rules! add {
        ($field:ident, $negated:expr, $read:expr) => {
            add(
                stringify!($field),
                !found.$field.is_empty(),
                $negated,
                $read(&found.$field),
            )?
        };
    }
    add!(principals, false, principals);
    add!(not_principals, true, principals);
    add!(namespaces, false, namespaces);
    add!(not_namespaces, true, namespaces);
    add!(service_accounts, false, accounts);
    add!(not_service_accounts, true, accounts);
    let sources = |list: &[api::Address]| blocks(list).map(Values::Sources);
    let destinations = |list: &[api::Address]| blocks(list).map(Values::Destinations);
    add!(source_ips, false, sources);
    add!(not_source_ips, true, sources);
    add!(destination_ips, false, destinations);
    add!(not_destination_ips, true, destinations);
    add!(destination_ports, false, ports);
    add!(not_destination_ports, true, ports);
    Ok(all)
}

fn patterns(list: &[api::StringMatch]) -> Result<Vec<Pattern>, String> {
    list.iter()
        .map(|found| {
            let text = |text: &str| name("text", text).map(Box::from);
            Ok(match &found.match_type {
                Some(MatchType::Exact(exact)) => Pattern::Exact(text(exact)?),
                Some(MatchType::Prefix(prefix)) => Pattern::Prefix(text(prefix)?),
                Some(MatchType::Suffix(suffix)) => Pattern::Suffix(text(suffix)?),
                Some(MatchType::Presence(())) => Pattern::Present,
                None => return Err("has a match of an unknown type".into()),
            })
        })
        .collect()
}

fn accounts(list: &[api::ServiceAccountMatch]) -> Result<Values, String> {
    let accounts = list.iter().map(|found| {
        Account::new(
            &format!("{}/{}", found.namespace, found.service_account),
            "",
        )
    });
    accounts.collect::<Result<_, _>>().map(Values::Accounts)
}

/// Reads networks. IPv4-mapped ones become IPv4.
fn blocks(list: &[api::Address]) -> Result<Vec<IpNet>, String> {
    list.iter()
        .map(|found| {
            let address = any_address(&found.address)?;
            let length = u8::try_from(found.length).unwrap_or(u8::MAX);
            let canonical = address.to_canonical();
            let length = match address == canonical {
                true => Some(length),
                false => length.checked_sub(96),
            };
            length
                .and_then(|length| IpNet::new(canonical, length).ok())
                .map(|net| net.trunc())
                .ok_or_else(|| format!("{address}/{} is not a network", found.length))
        })
        .collect()
}

fn ports(list: &[u32]) -> Result<Values, String> {
    let ports = list
        .iter()
        .map(|port| u16::try_from(*port).map_err(|_| format!("{port} is not a port")));
    ports.collect::<Result<_, _>>().map(Values::Ports)
}

#[cfg(test)]
mod tests;
