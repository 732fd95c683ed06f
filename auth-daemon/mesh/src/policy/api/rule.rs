//! The rules of AuthorizationPolicies: requirements on a connection, each of one field of the object.
//!
//! Verdicts, explanations and warnings all derive from these, so that they cannot differ in what a rule means.

use ipnet::IpNet;

use super::{Account, Pattern};

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
