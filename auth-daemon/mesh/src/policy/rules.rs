//! Many rules compiled into one matcher, whose run time hardly grows with the number of rules.
//!
//! Each rule is split into branches, one per source. All branches start as members of a set, and each field of the
//! connection removes those that require another value (T. V. Lakshman, D. Stiliadis: High-Speed Policy-Based Packet
//! Forwarding, SIGCOMM 1998). The branches that remain match.

use std::net::IpAddr;

use super::{
    api::{Account, Pattern, Requirement, Rule, Values},
    bits::{insert, members, words},
    fields::{Accounts, Blocks, Exact, Field, FieldBuilder, Patterns, Ports},
};
use crate::Identity;

/// Maximum number of words in a set that is kept on the stack.
const SMALL: usize = 16;

/// The attributes of a connection that rules match on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'a> {
    /// The client's SPIFFE ID without its scheme. `None` in plaintext, as are the next two.
    pub(super) principal: Option<&'a str>,
    pub(super) namespace: Option<&'a str>,
    /// The path of the client's SPIFFE ID.
    pub(super) account: Option<&'a str>,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
}

impl<'a> Facts<'a> {
    pub(super) fn new(
        client: Option<&'a Identity>,
        source: IpAddr,
        destination: IpAddr,
        port: u16,
    ) -> Self {
        let principal = client.map(|client| &client.as_str()["spiffe://".len()..]);
        Self {
            principal,
            namespace: client.map(Identity::namespace),
            account: client
                .zip(principal)
                .map(|(client, principal)| &principal[client.trust_domain().len()..]),
            source: source.to_canonical(),
            destination: destination.to_canonical(),
            port,
        }
    }
}

/// The rules of several policies. Each policy is referred to by its index among them.
#[derive(Debug)]
pub(super) struct Rules {
    /// Policy and rule of each branch, in order.
    branches: Box<[(u32, u32)]>,
    /// The set of all branches.
    all: Box<[u64]>,
    principals: Field<Patterns>,
    accounts: Field<Accounts>,
    namespaces: Field<Patterns>,
    ports: Field<Exact<u16>>,
    sources: Field<Blocks>,
    destinations: Field<Blocks>,
}

impl Rules {
    pub(super) fn new<'a>(policies: impl Iterator<Item = &'a [Rule]>) -> Self {
        let mut branches: Vec<(u32, u32)> = Vec::new();
        let mut principals = FieldBuilder::<Pattern>::new();
        let mut accounts = FieldBuilder::<Account>::new();
        let mut namespaces = FieldBuilder::<Pattern>::new();
        let mut ports = FieldBuilder::<u16>::new();
        let mut sources = FieldBuilder::new();
        let mut destinations = FieldBuilder::new();
        for (policy, rules) in policies.enumerate() {
            for (index, rule) in rules.iter().enumerate() {
                let open = port_set(rule);
                if rule.never.is_some() || open == Ports::nothing() {
                    continue;
                }
                let from = match rule.from.as_slice() {
                    [] => &[Vec::new()],
                    from => from,
                };
                for source in from {
                    let number = branches.len() as u32;
                    branches.push((policy as u32, index as u32));
                    let listed: Vec<u16> = open.listed.iter().copied().collect();
                    ports.require(number, &mut 0, &listed, open.excluded);
                    // Number of positive requirements that this branch has placed on each field.
                    let (mut of_principal, mut of_account, mut of_namespace) = (0, 0, 0);
                    let (mut of_source, mut of_destination) = (0, 0);
                    for Requirement {
                        negated, values, ..
                    } in source.iter().chain(&rule.when)
                    {
                        match values {
                            Values::Principals(values) => {
                                principals.require(number, &mut of_principal, values, *negated);
                            }
                            Values::Accounts(values) => {
                                accounts.require(number, &mut of_account, values, *negated);
                            }
                            Values::Namespaces(values) => {
                                namespaces.require(number, &mut of_namespace, values, *negated);
                            }
                            Values::Sources(values) => {
                                sources.require(number, &mut of_source, values, *negated);
                            }
                            Values::Destinations(values) => {
                                destinations.require(number, &mut of_destination, values, *negated);
                            }
                            // Already part of `open`.
                            Values::Ports(_) => {}
                        }
                    }
                }
            }
        }
        let count = branches.len();
        let mut all = vec![0; words(count)];
        (0..count).for_each(|number| insert(&mut all, number));
        Self {
            branches: branches.into(),
            all: all.into(),
            principals: principals.build(count),
            accounts: accounts.build(count),
            namespaces: namespaces.build(count),
            ports: ports.build(count),
            sources: sources.build(count),
            destinations: destinations.build(count),
        }
    }

    /// Calls `found` with the rules that match, as policy and rule, in order.
    pub(super) fn matching<T>(
        &self,
        facts: &Facts<'_>,
        found: impl FnOnce(&mut dyn Iterator<Item = (usize, usize)>) -> T,
    ) -> T {
        let words = self.all.len();
        let mut small = [0_u64; 2 * SMALL];
        let mut large;
        let sets: &mut [u64] = if words <= SMALL {
            &mut small[..2 * words]
        } else {
            large = vec![0; 2 * words];
            &mut large
        };
        let (live, scratch) = sets.split_at_mut(words);
        live.copy_from_slice(&self.all);
        self.principals.narrow(facts.principal, live, scratch);
        self.accounts.narrow(facts.account, live, scratch);
        self.namespaces.narrow(facts.namespace, live, scratch);
        self.ports.narrow(Some(&facts.port), live, scratch);
        self.sources.narrow(Some(&facts.source), live, scratch);
        self.destinations
            .narrow(Some(&facts.destination), live, scratch);
        let mut matching = members(live).map(|number| {
            let (policy, rule) = self.branches[number];
            (policy as usize, rule as usize)
        });
        found(&mut matching)
    }

    /// Returns the first rule that matches.
    pub(super) fn first(&self, facts: &Facts<'_>) -> Option<(usize, usize)> {
        self.matching(facts, |matching| matching.next())
    }
}

/// Returns the ports that a rule matches: those of any of its operations that also meet all of its conditions.
pub(super) fn port_set(rule: &Rule) -> Ports {
    let operations = rule
        .to
        .iter()
        .map(|operation| ports(operation))
        .reduce(|a, b| a.or(&b))
        .unwrap_or(Ports::all());
    operations.and(&ports(&rule.when))
}

/// Returns the ports that meet all of these requirements.
fn ports(requirements: &[Requirement]) -> Ports {
    requirements
        .iter()
        .fold(Ports::all(), |ports, requirement| {
            match &requirement.values {
                Values::Ports(values) => ports.and(&Ports::new(values, requirement.negated)),
                _ => ports,
            }
        })
}
