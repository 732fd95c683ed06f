//! The rules of AuthorizationPolicies: requirements on a connection, each of one field of the object.
//!
//! Verdicts, explanations and warnings all derive from these, so that they cannot differ in what a rule means.

use ipnet::IpNet;

use super::{Account, Pattern};

/// Maximum number of values in the rules of a policy, as [`Rule::values`] counts them.
pub const MAX_VALUES: usize = 1 << 18;

/// A rule, which matches a connection if it meets all requirements of at least one source, of at least one operation, and
/// of all conditions. An empty list of sources or operations matches every connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// `from`.
    pub from: Vec<Vec<Requirement>>,
    /// `to`.
    pub to: Vec<Vec<Requirement>>,
    /// `when`.
    pub when: Vec<Requirement>,
    /// Why the rule can never match: it allows based on an attribute that is unknown below HTTP.
    pub never: Option<String>,
}

/// A requirement on an attribute of the connection: it must match one of the values, or, negated, none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    /// Path of the field, as `spec.rules[0].from[0].source.notPrincipals`.
    pub field: Box<str>,
    /// Whether no value may match. A connection without the attribute then meets the requirement.
    pub negated: bool,
    /// The attribute, and the values that it is compared with. Never empty.
    pub values: Values,
}

/// Values that an attribute is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Values {
    /// The client's SPIFFE ID without `spiffe://`.
    Principals(Vec<Pattern>),
    /// The client's service account.
    Accounts(Vec<Account>),
    /// The client's namespace.
    Namespaces(Vec<Pattern>),
    /// The client's address.
    Sources(Vec<IpNet>),
    /// The server's address.
    Destinations(Vec<IpNet>),
    /// The app's port.
    Ports(Vec<u16>),
}

impl Rule {
    /// Number of values that the rule compares attributes with. Those of operations and conditions count once for each source,
    /// together with which they are looked up.
    pub fn values(&self) -> usize {
        let all = |requirements: &[Requirement]| requirements.iter().map(Requirement::count).sum();
        let of_any = |alternatives: &[Vec<Requirement>]| -> usize {
            alternatives.iter().map(|one| -> usize { all(one) }).sum()
        };
        let for_each_source = of_any(&self.to) + all(&self.when);
        of_any(&self.from) + self.from.len().max(1).saturating_mul(for_each_source)
    }

    /// Returns all requirements.
    pub fn requirements(&self) -> impl Iterator<Item = &Requirement> {
        let alternatives = self.from.iter().chain(&self.to);
        alternatives.flatten().chain(&self.when)
    }

    /// Returns all requirements, to change them.
    pub fn requirements_mut(&mut self) -> impl Iterator<Item = &mut Requirement> {
        let alternatives = self.from.iter_mut().chain(&mut self.to);
        alternatives.flatten().chain(&mut self.when)
    }
}

impl Requirement {
    fn count(&self) -> usize {
        match &self.values {
            Values::Principals(values) | Values::Namespaces(values) => values.len(),
            Values::Accounts(values) => values.len(),
            Values::Sources(values) | Values::Destinations(values) => values.len(),
            Values::Ports(values) => values.len(),
        }
    }
}

/// Returns an error if the rules of one policy compare attributes with more than [`MAX_VALUES`] values, which would take too
/// much of all nodes' time and memory.
pub fn limit_values(rules: &[Rule]) -> Result<(), String> {
    let values = rules
        .iter()
        .map(Rule::values)
        .fold(0, usize::saturating_add);
    if values <= MAX_VALUES {
        return Ok(());
    }
    Err(format!(
        "has {values} values, of which {MAX_VALUES} are allowed: those of operations and conditions count once for each \
         source; split the policy"
    ))
}
