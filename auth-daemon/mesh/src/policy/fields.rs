//! Index of the values that rules require of a field of a connection.
//!
//! The time of a lookup hardly depends on the number of values: ten or ten thousand.

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{
    api::{Account, Pattern},
    bits::{Frozen, insert, members, words},
};

/// Index from the values that a field is compared with to the branches that require or exclude them.
pub(super) trait Index {
    /// A value that rules can name.
    type Listed: Ord + Clone;
    /// A value that a connection has.
    type Value: ?Sized;

    /// Creates an index of `entries`, whose branch numbers are below `count`.
    fn new(entries: BTreeMap<Self::Listed, Vec<u32>>, count: usize) -> Self;

    /// Calls `found` with each set of branches that name a value which `value` matches.
    fn find(&self, value: &Self::Value, found: impl FnMut(&Frozen));
}

/// A field, with all requirements on it.
#[derive(Debug)]
pub(super) struct Field<I> {
    /// A branch may place several requirements on a field, all of which must be met. The first layer holds the first
    /// requirement of each branch, and so on.
    layers: Vec<Layer<I>>,
    /// Values that branches exclude.
    none: Option<I>,
}

#[derive(Debug)]
struct Layer<I> {
    /// Branches without a requirement in this layer.
    free: Box<[u64]>,
    any: I,
}

/// Collects the requirements on a field.
pub(super) struct FieldBuilder<A> {
    layers: Vec<BTreeMap<A, Vec<u32>>>,
    /// Branches that have a requirement, by layer.
    bound: Vec<Vec<u32>>,
    none: BTreeMap<A, Vec<u32>>,
}

impl<A: Ord + Clone> FieldBuilder<A> {
    pub(super) fn new() -> Self {
        Self {
            layers: Vec::new(),
            bound: Vec::new(),
            none: BTreeMap::new(),
        }
    }

    /// Adds a requirement of branch `number`: one of `values`, or, `negated`, none of them. `layer` counts the branch's
    /// positive requirements on this field. Numbers must be in ascending order.
    pub(super) fn require(&mut self, number: u32, layer: &mut usize, values: &[A], negated: bool) {
        let entries = if negated {
            &mut self.none
        } else {
            if self.layers.len() == *layer {
                self.layers.push(BTreeMap::new());
                self.bound.push(Vec::new());
            }
            self.bound[*layer].push(number);
            *layer += 1;
            &mut self.layers[*layer - 1]
        };
        for value in values {
            let numbers = entries.entry(value.clone()).or_default();
            if numbers.last() != Some(&number) {
                numbers.push(number);
            }
        }
    }

    pub(super) fn build<I: Index<Listed = A>>(self, count: usize) -> Field<I> {
        let layers = self.layers.into_iter().zip(self.bound);
        Field {
            layers: layers
                .map(|(entries, bound)| {
                    let mut free = vec![!0; words(count)];
                    Frozen::new(&bound, count).take_from(&mut free);
                    Layer {
                        free: free.into(),
                        any: I::new(entries, count),
                    }
                })
                .collect(),
            none: (!self.none.is_empty()).then(|| I::new(self.none, count)),
        }
    }
}

impl<I: Index> Field<I> {
    /// Removes from `live` the branches whose requirements `value` does not meet. A missing value meets no `any` and
    /// violates no `none`. `scratch` must be as long as `live`.
    pub(super) fn narrow(&self, value: Option<&I::Value>, live: &mut [u64], scratch: &mut [u64]) {
        for layer in &self.layers {
            scratch.copy_from_slice(&layer.free);
            if let Some(value) = value {
                layer.any.find(value, |met| met.add_to(scratch));
            }
            live.iter_mut()
                .zip(&*scratch)
                .for_each(|(live, met)| *live &= met);
        }
        if let (Some(none), Some(value)) = (&self.none, value) {
            none.find(value, |broken| broken.take_from(live));
        }
    }
}

fn freeze<A>(
    entries: impl IntoIterator<Item = (A, Vec<u32>)>,
    count: usize,
) -> impl Iterator<Item = (A, Frozen)> {
    entries
        .into_iter()
        .map(move |(value, numbers)| (value, Frozen::new(&numbers, count)))
}

/// Values that must be equal.
#[derive(Debug)]
pub(super) struct Exact<A>(HashMap<A, Frozen>);

impl Index for Exact<u16> {
    type Listed = u16;
    type Value = u16;

    fn new(entries: BTreeMap<u16, Vec<u32>>, count: usize) -> Self {
        Self(freeze(entries, count).collect())
    }

    fn find(&self, value: &u16, found: impl FnMut(&Frozen)) {
        self.0.get(value).into_iter().for_each(found);
    }
}

/// Service accounts, by the path of their SPIFFE ID.
#[derive(Debug)]
pub(super) struct Accounts(HashMap<Box<str>, Frozen>);

impl Index for Accounts {
    type Listed = Account;
    type Value = str;

    fn new(entries: BTreeMap<Account, Vec<u32>>, count: usize) -> Self {
        let entries = entries
            .into_iter()
            .map(|(account, numbers)| (account.path().into(), numbers));
        Self(freeze(entries, count).collect())
    }

    fn find(&self, value: &str, found: impl FnMut(&Frozen)) {
        self.0.get(value).into_iter().for_each(found);
    }
}

/// String patterns.
#[derive(Debug)]
pub(super) struct Patterns {
    present: Option<Frozen>,
    exact: HashMap<Box<str>, Frozen>,
    prefixes: Prefixes<Head>,
    suffixes: Prefixes<Tail>,
}

impl Index for Patterns {
    type Listed = Pattern;
    type Value = str;

    fn new(entries: BTreeMap<Pattern, Vec<u32>>, count: usize) -> Self {
        let (mut present, mut exact) = (None, HashMap::new());
        let (mut heads, mut tails) = (BTreeMap::new(), BTreeMap::new());
        for (pattern, numbers) in entries {
            match pattern {
                Pattern::Present => present = Some(Frozen::new(&numbers, count)),
                Pattern::Exact(text) => {
                    exact.insert(text, Frozen::new(&numbers, count));
                }
                Pattern::Prefix(text) => {
                    heads.insert(Head(text), numbers);
                }
                Pattern::Suffix(text) => {
                    tails.insert(Tail(text), numbers);
                }
            }
        }
        Self {
            present,
            exact,
            prefixes: Prefixes::new(heads, count),
            suffixes: Prefixes::new(tails, count),
        }
    }

    fn find(&self, value: &str, mut found: impl FnMut(&Frozen)) {
        if value.is_empty() {
            return;
        }
        let single = self.present.iter().chain(self.exact.get(value));
        single
            .chain(self.prefixes.longest(value))
            .chain(self.suffixes.longest(value))
            .for_each(&mut found);
    }
}

/// CIDR blocks.
#[derive(Debug)]
pub(super) struct Blocks(Prefixes<IpNet>);

impl Index for Blocks {
    type Listed = IpNet;
    type Value = IpAddr;

    fn new(entries: BTreeMap<IpNet, Vec<u32>>, count: usize) -> Self {
        Self(Prefixes::new(entries, count))
    }

    fn find(&self, value: &IpAddr, found: impl FnMut(&Frozen)) {
        self.0.longest(value).into_iter().for_each(found);
    }
}

/// A prefix: covers all values that begin with it.
///
/// In the order of prefixes, those that a prefix contains follow it directly, without a gap.
trait Prefix: Ord {
    type Value: ?Sized;

    /// Reports whether the prefix covers `value`.
    fn covers(&self, value: &Self::Value) -> bool;

    /// Reports whether the prefix covers all that `other` covers.
    fn contains(&self, other: &Self) -> bool;

    /// Compares the prefix with a value. A prefix that covers the value is never greater.
    fn order(&self, value: &Self::Value) -> Ordering;
}

/// Prefixes, looked up by longest match. Each also holds the branches of all prefixes that contain it.
#[derive(Debug)]
struct Prefixes<P> {
    sorted: Vec<(P, Frozen)>,
    /// For each prefix, the index in `sorted` of the nearest one that contains it.
    around: Vec<Option<u32>>,
}

impl<P: Prefix> Prefixes<P> {
    fn new(entries: BTreeMap<P, Vec<u32>>, count: usize) -> Self {
        let mut sorted: Vec<(P, Frozen)> = Vec::with_capacity(entries.len());
        let mut around: Vec<Option<u32>> = Vec::with_capacity(entries.len());
        let mut union = vec![0; words(count)];
        for (prefix, own) in entries {
            let mut container = sorted.len().checked_sub(1).map(|before| before as u32);
            while let Some(candidate) = container
                && !sorted[candidate as usize].0.contains(&prefix)
            {
                container = around[candidate as usize];
            }
            let numbers = match container {
                Some(container) => {
                    union.fill(0);
                    sorted[container as usize].1.add_to(&mut union);
                    own.iter()
                        .for_each(|number| insert(&mut union, *number as usize));
                    let all: Vec<u32> = members(&union).map(|number| number as u32).collect();
                    Frozen::new(&all, count)
                }
                None => Frozen::new(&own, count),
            };
            sorted.push((prefix, numbers));
            around.push(container);
        }
        Self { sorted, around }
    }

    /// Returns the branches of all prefixes that cover `value`.
    fn longest(&self, value: &P::Value) -> Option<&Frozen> {
        let after = self
            .sorted
            .partition_point(|(prefix, _)| prefix.order(value) != Ordering::Greater);
        let mut candidate = after.checked_sub(1);
        while let Some(index) = candidate {
            let (prefix, numbers) = &self.sorted[index];
            if prefix.covers(value) {
                return Some(numbers);
            }
            candidate = self.around[index].map(|index| index as usize);
        }
        None
    }
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Head(Box<str>);

impl Prefix for Head {
    type Value = str;

    fn covers(&self, value: &str) -> bool {
        value.starts_with(&*self.0)
    }

    fn contains(&self, other: &Self) -> bool {
        other.0.starts_with(&*self.0)
    }

    fn order(&self, value: &str) -> Ordering {
        (*self.0).cmp(value)
    }
}

/// The end of a string: a prefix of the string when read backwards.
#[derive(Debug, PartialEq, Eq)]
struct Tail(Box<str>);

impl Ord for Tail {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order(&other.0)
    }
}

impl PartialOrd for Tail {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Prefix for Tail {
    type Value = str;

    fn covers(&self, value: &str) -> bool {
        value.ends_with(&*self.0)
    }

    fn contains(&self, other: &Self) -> bool {
        other.0.ends_with(&*self.0)
    }

    fn order(&self, value: &str) -> Ordering {
        self.0.bytes().rev().cmp(value.bytes().rev())
    }
}

impl Prefix for IpNet {
    type Value = IpAddr;

    fn covers(&self, value: &IpAddr) -> bool {
        IpNet::contains(self, value)
    }

    fn contains(&self, other: &Self) -> bool {
        IpNet::contains(self, other)
    }

    fn order(&self, value: &IpAddr) -> Ordering {
        self.network().cmp(value)
    }
}

/// A set of ports: the listed ones, or all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) listed: BTreeSet<u16>,
    pub(super) excluded: bool,
}

impl Ports {
    /// Returns the set of all ports.
    pub(super) fn all() -> Self {
        Self {
            listed: Default::default(),
            excluded: true,
        }
    }

    /// Returns the empty set.
    pub(super) fn nothing() -> Self {
        Self {
            listed: Default::default(),
            excluded: false,
        }
    }

    /// Returns the set of these ports, or, `excluded`, of all others.
    pub(super) fn new(ports: &[u16], excluded: bool) -> Self {
        Self {
            listed: ports.iter().copied().collect(),
            excluded,
        }
    }

    pub(super) fn and(&self, other: &Self) -> Self {
        let (a, b) = (&self.listed, &other.listed);
        Self {
            listed: match (self.excluded, other.excluded) {
                (false, false) => a & b,
                (false, true) => a - b,
                (true, false) => b - a,
                (true, true) => a | b,
            },
            excluded: self.excluded && other.excluded,
        }
    }

    pub(super) fn or(&self, other: &Self) -> Self {
        self.not().and(&other.not()).not()
    }

    fn not(&self) -> Self {
        Self {
            listed: self.listed.clone(),
            excluded: !self.excluded,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn met<I: Index>(index: &I, value: &I::Value, count: usize) -> Vec<usize> {
        let mut set = vec![0; words(count)];
        index.find(value, |found| found.add_to(&mut set));
        members(&set).collect()
    }

    proptest! {
        #[test]
        fn patterns_are_found_as_they_match(
            texts in prop::collection::vec("\\*|[ab/]{1,4}|[ab/]{1,3}\\*|\\*[ab/]{1,3}", 0..40),
            value in "[ab/]{0,6}",
        ) {
            let patterns: Vec<_> = texts.iter().map(|text| match (text.strip_prefix('*'), text.strip_suffix('*')) {
                (Some(""), _) => Pattern::Present,
                (Some(text), _) => Pattern::Suffix(text.into()),
                (_, Some(text)) => Pattern::Prefix(text.into()),
                _ => Pattern::Exact(text.as_str().into()),
            }).collect();
            let mut entries: BTreeMap<_, Vec<u32>> = BTreeMap::new();
            for (number, pattern) in patterns.iter().enumerate() {
                entries.entry(pattern.clone()).or_default().push(number as u32);
            }
            let expected: Vec<_> = (0..patterns.len()).filter(|n| patterns[*n].matches(&value)).collect();
            prop_assert_eq!(met(&Patterns::new(entries, patterns.len()), &value, patterns.len()), expected);
        }

        #[test]
        fn blocks_are_found_as_they_contain(
            texts in prop::collection::vec((any::<bool>(), any::<u8>(), 0..=32_u8), 0..40),
            six in any::<bool>(), bits in any::<u8>(),
        ) {
            let address = |six: bool, bits: u8| -> IpAddr {
                let spread = u32::from(bits) << 24 | u32::from(bits);
                if six { IpAddr::V6(u128::from(spread).into()) } else { IpAddr::V4(spread.into()) }
            };
            let blocks: Vec<_> = texts.iter().map(|(six, bits, length)| {
                let length = if *six { length + 96 } else { *length };
                IpNet::new(address(*six, *bits), length).unwrap().trunc()
            }).collect();
            let mut entries: BTreeMap<_, Vec<u32>> = BTreeMap::new();
            for (number, block) in blocks.iter().enumerate() {
                entries.entry(*block).or_default().push(number as u32);
            }
            let value = address(six, bits);
            let expected: Vec<_> = (0..blocks.len()).filter(|n| IpNet::contains(&blocks[*n], &value)).collect();
            prop_assert_eq!(met(&Blocks::new(entries, blocks.len()), &value, blocks.len()), expected);
        }

        #[test]
        fn ports_are_sets(
            a in (prop::collection::vec(0..6_u16, 0..4), any::<bool>()),
            b in (prop::collection::vec(0..6_u16, 0..4), any::<bool>()),
            port in 0..7_u16,
        ) {
            let plain = |(listed, excluded): &(Vec<u16>, bool)| listed.contains(&port) != *excluded;
            let contains = |ports: &Ports| ports.listed.contains(&port) != ports.excluded;
            let (x, y) = (Ports::new(&a.0, a.1), Ports::new(&b.0, b.1));
            prop_assert_eq!(contains(&x), plain(&a));
            prop_assert_eq!(contains(&x.and(&y)), plain(&a) && plain(&b));
            prop_assert_eq!(contains(&x.or(&y)), plain(&a) || plain(&b));
            prop_assert!(contains(&Ports::all()) && !contains(&Ports::nothing()));
        }
    }
}
