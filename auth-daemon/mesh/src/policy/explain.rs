//! Explanations of verdicts, policy by policy and rule by rule.
//!
//! Evaluates the rules as they are written, one by one, whereas `rules.rs` evaluates all of them at once.

use std::{collections::BTreeMap, fmt};

use ipnet::IpNet;

use super::{
    api::{Account, AuthorizationPolicy, Condition, Kind, Matches, Object, Pattern, Rule, Source},
    compile::{Connection, PeerMode, Policies, Verdict},
    fields::Ports,
    rules::{Facts, port_set},
};
use crate::ObjectName;

/// Maximum number of sources of a rule that are explained, and of policies of other namespaces that are named.
const MAX_TOLD: usize = 5;

/// A verdict, and how each policy relates to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The verdict.
    pub verdict: Verdict,
    /// The mode of the port.
    pub mode: PeerMode,
    /// Findings for all policies, by kind and name.
    pub findings: Vec<Finding>,
}

/// How a policy relates to a verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Kind of the policy.
    pub kind: Kind,
    /// Name of the policy.
    pub policy: ObjectName,
    /// The policy's action or mode, and whether it is a dry run.
    pub does: String,
    /// Whether the policy matches.
    pub outcome: Outcome,
}

/// Whether a policy matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The policy applies to another namespace.
    OtherNamespace,
    /// The policy does not select this workload, for this reason.
    NotSelected(String),
    /// The policy matches. The value is the index of the first rule that does.
    Matches(usize),
    /// The policy does not match. The values are the reasons, one per rule.
    Misses(Vec<String>),
    /// The policy sets the port's mode.
    Counts,
    /// Another policy's mode takes precedence.
    Overruled,
    /// The policy is unreadable. The text says why, and what is enforced instead.
    Unreadable(String),
}

/// Explains the verdict on `connection` to a workload in `namespace` that has `labels`.
pub fn explain(
    policies: &Policies,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    connection: &Connection<'_>,
) -> Explanation {
    let view = policies.workload(namespace, labels);
    let port = connection.destination.port();
    let mode = view.mode(port).clone();
    let facts = Facts::new(
        connection.client,
        connection.source,
        connection.destination.ip(),
        port,
    );
    let root = policies.settings().root_namespace.as_str();
    let findings = policies.objects().iter().map(|object| {
        let (does, selector) = match &**object {
            Object::Authorization(policy) => {
                let dry = if policy.dry_run { ", dry run" } else { "" };
                (format!("{}{dry}", policy.action.as_str()), &policy.selector)
            }
            Object::Peer(policy) => {
                let mode = policy.mode.map_or("UNSET", |mode| mode.as_str());
                (mode.to_owned(), &policy.selector)
            }
            Object::Unreadable(unreadable) => ("refused".to_owned(), &unreadable.selector),
        };
        let scope = object.name().namespace.as_str();
        let outcome = if scope != root && scope != namespace {
            Outcome::OtherNamespace
        } else if !selector.selects(labels) {
            Outcome::NotSelected(format!("it selects {selector}"))
        } else {
            match &**object {
                Object::Authorization(policy) => authorization(policy, &facts),
                Object::Peer(policy) if scope == root && !policy.selector.is_empty() => {
                    Outcome::NotSelected(
                        "with a selector, in the root namespace, it selects nothing".into(),
                    )
                }
                Object::Peer(_) if mode.policy.as_deref() == Some(object.name()) => Outcome::Counts,
                Object::Peer(_) => Outcome::Overruled,
                Object::Unreadable(unreadable) => Outcome::Unreadable(format!(
                    "{}: {}; {} instead",
                    unreadable.field, unreadable.reason, unreadable.instead
                )),
            }
        };
        Finding {
            kind: object.kind(),
            policy: object.name().clone(),
            does,
            outcome,
        }
    });
    Explanation {
        findings: findings.collect(),
        verdict: view.evaluate(connection),
        mode,
    }
}

fn authorization(policy: &AuthorizationPolicy, facts: &Facts<'_>) -> Outcome {
    if policy.elsewhere {
        return Outcome::NotSelected("it is for a waypoint or gateway".into());
    }
    let misses: Vec<_> = policy.rules.iter().map(|rule| miss(rule, facts)).collect();
    match misses.iter().position(Option::is_none) {
        Some(rule) => Outcome::Matches(rule),
        None => Outcome::Misses(misses.into_iter().flatten().collect()),
    }
}

/// Returns why `rule` does not match, or `None` if it does.
fn miss(rule: &Rule, facts: &Facts<'_>) -> Option<String> {
    if rule.never {
        return Some("it allows by what cannot be known below HTTP".into());
    }
    if !port_set(rule).contains(facts.port) {
        let within =
            |ports: &Matches<u16>| Ports::new(&ports.any, &ports.none).contains(facts.port);
        let operation = rule.to.is_empty() || rule.to.iter().any(|to| within(&to.ports));
        let field = if operation {
            "when: destination.port"
        } else {
            "to"
        };
        return Some(format!(
            "{field}: port {} is not among its ports",
            facts.port
        ));
    }
    if let Some(reason) = rule.when.iter().find_map(|when| condition(when, facts)) {
        return Some(format!("when: {reason}"));
    }
    let mut reasons = Vec::new();
    for from in &rule.from {
        match source(from, facts) {
            Some(reason) if !reasons.contains(&reason) => reasons.push(reason),
            Some(_) => {}
            None => return None,
        }
    }
    if reasons.is_empty() {
        return None;
    }
    let more = match reasons.len().saturating_sub(MAX_TOLD) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    reasons.truncate(MAX_TOLD);
    Some(format!("from: {}{more}", reasons.join("; ")))
}

fn source(source: &Source, facts: &Facts<'_>) -> Option<String> {
    text(
        &source.principals,
        "principal",
        facts.principal,
        Pattern::matches,
    )
    .or_else(|| {
        text(
            &source.accounts,
            "service account",
            facts.account,
            is_account,
        )
    })
    .or_else(|| {
        text(
            &source.namespaces,
            "namespace",
            facts.namespace,
            Pattern::matches,
        )
    })
    .or_else(|| address(&source.blocks, "source", facts.source))
    .or_else(|| address(&source.remote_blocks, "source", facts.source))
}

fn condition(condition: &Condition, facts: &Facts<'_>) -> Option<String> {
    match condition {
        Condition::SourceIp(blocks) | Condition::RemoteIp(blocks) => {
            address(blocks, "source", facts.source)
        }
        Condition::DestinationIp(blocks) => address(blocks, "destination", facts.destination),
        Condition::Namespace(names) => text(names, "namespace", facts.namespace, Pattern::matches),
        Condition::Principal(names) => text(names, "principal", facts.principal, Pattern::matches),
        Condition::Account(names) => text(names, "service account", facts.account, is_account),
        // Already checked by the caller.
        Condition::DestinationPort(_) => None,
    }
}

fn is_account(account: &Account, path: &str) -> bool {
    account.path() == path
}

fn text<T: fmt::Display>(
    asked: &Matches<T>,
    what: &str,
    value: Option<&str>,
    matches: impl Fn(&T, &str) -> bool,
) -> Option<String> {
    let Some(value) = value else {
        return (!asked.any.is_empty()).then(|| format!("plaintext has no {what}"));
    };
    if !asked.any.is_empty() && !asked.any.iter().any(|one| matches(one, value)) {
        return Some(format!("{what} {value} is not asked for"));
    }
    let hit = asked.none.iter().find(|one| matches(one, value))?;
    Some(format!("{what} {value} is left out by {hit}"))
}

fn address(asked: &Matches<IpNet>, what: &str, value: std::net::IpAddr) -> Option<String> {
    if !asked.any.is_empty() && !asked.any.iter().any(|block| block.contains(&value)) {
        return Some(format!("{what} address {value} is not asked for"));
    }
    let hit = asked.none.iter().find(|block| block.contains(&value))?;
    Some(format!("{what} address {value} is left out by {hit}"))
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict.decision)?;
        for hit in &self.verdict.audits {
            writeln!(f, "audited by {hit}")?;
        }
        if let Some(dry_run) = &self.verdict.dry_run {
            writeln!(f, "with the dry-run policies: {dry_run}")?;
        }
        writeln!(f, "mutual TLS: {}", self.mode)?;
        let mut others = Vec::new();
        for finding in &self.findings {
            match &finding.outcome {
                Outcome::OtherNamespace => others.push(finding),
                _ => writeln!(f, "  {finding}")?,
            }
        }
        if !others.is_empty() {
            let named = others
                .iter()
                .take(MAX_TOLD)
                .map(|other| other.policy.to_string());
            let named: Vec<_> = named.collect();
            let dots = if others.len() > MAX_TOLD { ", …" } else { "" };
            let (count, named) = (others.len(), named.join(", "));
            writeln!(f, "  for other namespaces: {count} ({named}{dots})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({}): ", self.kind, self.policy, self.does)?;
        match &self.outcome {
            Outcome::OtherNamespace => f.write_str("is for another namespace"),
            Outcome::NotSelected(reason) => write!(f, "does not select the workload: {reason}"),
            Outcome::Matches(rule) => write!(f, "rules[{rule}] matches"),
            Outcome::Misses(reasons) if reasons.is_empty() => {
                f.write_str("has no rule, so it never matches")
            }
            Outcome::Misses(reasons) => {
                f.write_str("does not match")?;
                for (rule, reason) in reasons.iter().enumerate() {
                    write!(f, "\n    rules[{rule}]: {reason}")?;
                }
                Ok(())
            }
            Outcome::Counts => f.write_str("sets the mode"),
            Outcome::Overruled => f.write_str("is overruled"),
            Outcome::Unreadable(reason) => f.write_str(reason),
        }
    }
}
