//! Explanations of verdicts, policy by policy and rule by rule.
//!
//! Names the first requirement of each rule that is not met, whereas `rules.rs` evaluates all rules at once.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use ipnet::IpNet;

use super::{
    api::{Account, Kind, Object, Pattern, Requirement, Rule, Values},
    compile::{Connection, PeerMode, Policies, Verdict},
    reading::{Effect, Policy, Selection},
    rules::Facts,
};
use crate::ObjectName;

/// Maximum number of sources of a rule that are explained, and of policies of other namespaces that are named.
const MAX_LISTED: usize = 5;

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
    SetsMode,
    /// Another policy's mode takes precedence.
    Overridden,
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
    let findings = policies.policies().iter().map(|policy| Finding {
        kind: policy.object.kind(),
        policy: (*policy.name).clone(),
        does: does(&policy.object),
        outcome: match policy.selection(namespace, labels) {
            Selection::OtherNamespace => Outcome::OtherNamespace,
            Selection::NotSelected(reason) => Outcome::NotSelected(reason),
            Selection::Selected => outcome(policy, &facts, &mode),
        },
    });
    Explanation {
        findings: findings.collect(),
        verdict: view.evaluate(connection),
        mode,
    }
}

/// Returns a policy's action or mode, and whether it is a dry run.
pub(super) fn does(object: &Object) -> String {
    match object {
        Object::Authorization(policy) => {
            let dry = if policy.dry_run { ", dry run" } else { "" };
            format!("{}{dry}", policy.action.as_str())
        }
        Object::Peer(policy) => policy.mode.map_or("UNSET", |mode| mode.as_str()).to_owned(),
        Object::Unreadable(_) => "refused".to_owned(),
    }
}

/// Returns how a policy that selects the workload relates to the verdict.
fn outcome(policy: &Policy, facts: &Facts<'_>, mode: &PeerMode) -> Outcome {
    if let Object::Unreadable(unreadable) = &*policy.object {
        return Outcome::Unreadable(format!(
            "{}: {}; {} instead",
            unreadable.field, unreadable.reason, unreadable.instead
        ));
    }
    match &policy.effect {
        Effect::Authorization { rules, .. } => {
            let misses: Vec<_> = rules.iter().map(|rule| miss(rule, facts)).collect();
            match misses.iter().position(Option::is_none) {
                Some(rule) => Outcome::Matches(rule),
                None => Outcome::Misses(misses.into_iter().flatten().collect()),
            }
        }
        Effect::Peer { .. } if mode.policy.as_ref() == Some(&policy.name) => Outcome::SetsMode,
        Effect::Peer { .. } | Effect::Nothing(_) => Outcome::Overridden,
    }
}

/// Returns why `rule` does not match, or `None` if it does.
fn miss(rule: &Rule, facts: &Facts<'_>) -> Option<String> {
    let all = |requirements: &[Requirement]| {
        let mut unmet = requirements.iter().filter_map(|one| unmet(one, facts));
        unmet.next()
    };
    let alternatives = |part: &str, alternatives: &[Vec<Requirement>]| {
        let mut reasons = Vec::new();
        for alternative in alternatives {
            let reason = all(alternative)?;
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
        if reasons.is_empty() {
            return None;
        }
        let more = match reasons.len().saturating_sub(MAX_LISTED) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        reasons.truncate(MAX_LISTED);
        Some(format!("{part}: {}{more}", reasons.join("; ")))
    };
    let conditions = || all(&rule.when).map(|reason| format!("when: {reason}"));
    (rule.never.clone())
        .or_else(|| alternatives("to", &rule.to))
        .or_else(conditions)
        .or_else(|| alternatives("from", &rule.from))
}

/// Returns why a connection does not meet a requirement, or `None` if it does.
fn unmet(requirement: &Requirement, facts: &Facts<'_>) -> Option<String> {
    let negated = requirement.negated;
    match &requirement.values {
        Values::Principals(patterns) => {
            let matches = |pattern: &Pattern, value: &str| pattern.matches(value);
            compare("principal", patterns, facts.principal, negated, matches)
        }
        Values::Accounts(accounts) => {
            let matches = |account: &Account, path: &str| account.path() == path;
            compare("service account", accounts, facts.account, negated, matches)
        }
        Values::Namespaces(patterns) => {
            let matches = |pattern: &Pattern, value: &str| pattern.matches(value);
            compare("namespace", patterns, facts.namespace, negated, matches)
        }
        Values::Sources(blocks) => {
            let contains = |block: &IpNet, address: &IpAddr| block.contains(address);
            let source = Some(&facts.source);
            compare("source address", blocks, source, negated, contains)
        }
        Values::Destinations(blocks) => {
            let contains = |block: &IpNet, address: &IpAddr| block.contains(address);
            let destination = Some(&facts.destination);
            compare(
                "destination address",
                blocks,
                destination,
                negated,
                contains,
            )
        }
        Values::Ports(ports) => compare("port", ports, Some(&facts.port), negated, u16::eq),
    }
}

/// Compares an attribute, `what`, with the values of a requirement. `value` is `None` if the connection lacks it.
fn compare<T: fmt::Display, V: fmt::Display + ?Sized>(
    what: &str,
    values: &[T],
    value: Option<&V>,
    negated: bool,
    matches: impl Fn(&T, &V) -> bool,
) -> Option<String> {
    let Some(value) = value else {
        return (!negated).then(|| format!("plaintext has no {what}"));
    };
    match values.iter().find(|one| matches(one, value)) {
        None if !negated => Some(format!("{what} {value} is not listed")),
        Some(hit) if negated => Some(format!("{what} {value} is excluded by {hit}")),
        _ => None,
    }
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
                .take(MAX_LISTED)
                .map(|other| other.policy.to_string());
            let named: Vec<_> = named.collect();
            let dots = if others.len() > MAX_LISTED {
                ", …"
            } else {
                ""
            };
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
            Outcome::SetsMode => f.write_str("sets the mode"),
            Outcome::Overridden => f.write_str("another policy sets the mode"),
            Outcome::Unreadable(reason) => f.write_str(reason),
        }
    }
}
