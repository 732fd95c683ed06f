//! Names on demand: resources are subscribed to when a pod needs them, instead of all that there are.
//!
//! An address is asked for by name (`network/address`). istiod answers with what has the address (of a service, also
//! the endpoints), or that nothing has it. From then on, it reports changes of what it has sent, by those resources'
//! own names, but neither a service's new endpoints nor new addresses. So an address is asked for again once its answer
//! is old. A waypoint that an answer names is asked for with it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use crate::{
    read::Mesh,
    workload_api::{Address, GatewayAddress, address, gateway_address},
};

/// Maximum number of addresses that are asked for at once.
const MAX_BATCH: usize = 256;

/// What istiod says of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A workload or service has it.
    Known,
    /// Nothing has it.
    Absent,
    /// What has it cannot be used, for this reason.
    Rejected(String),
}

/// What is subscribed to by name.
#[derive(Debug, Default)]
pub(crate) struct Demand {
    /// The addresses of the next batch.
    queued: BTreeSet<IpAddr>,
    batch: Option<Batch>,
    /// The names that the current stream has subscribed to, or received.
    subscribed: HashSet<String>,
    /// Number of requests that needed a name which stands for nothing.
    placeholders: usize,
}

/// Addresses that are asked for together. Their answers count once all have arrived, with the waypoints that they name.
#[derive(Debug, Default)]
struct Batch {
    addresses: HashMap<String, (IpAddr, Option<Answer>)>,
    /// All names that belong to the batch.
    names: HashSet<String>,
    unsent: Vec<String>,
    waiting: HashSet<String>,
}

/// What connects a resource with others.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Other names of the resource: its addresses.
    pub(crate) aliases: Vec<String>,
    /// Names of the services that a workload is an endpoint of.
    services: Vec<String>,
    /// Name of the waypoint.
    waypoint: Option<String>,
    /// Whether it is a workload of the client's own node. istiod sends these in any case.
    is_local: bool,
}

/// Names to subscribe to, and names to unsubscribe from, in one request.
pub(crate) type Names = (Vec<String>, Vec<String>);

impl Demand {
    /// Adds addresses to the next batch.
    pub(crate) fn ask(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.queued.extend(addresses);
    }

    /// Reports whether a batch has not been answered yet.
    pub(crate) fn is_waiting(&self) -> bool {
        self.batch.is_some()
    }

    /// Begins a stream. Returns the names of the unanswered batch.
    pub(crate) fn open<'a>(&mut self, held: impl Iterator<Item = &'a String>) -> Vec<String> {
        self.subscribed = held.cloned().collect();
        let Some(batch) = &mut self.batch else {
            return Vec::new();
        };
        batch.unsent.clear();
        batch.waiting.clone_from(&batch.names);
        self.subscribed.extend(batch.names.iter().cloned());
        batch.names.iter().cloned().collect()
    }

    /// Reports whether a resource answers a name of the batch, so that the next stream must have it sent again.
    pub(crate) fn waits_for(&self, name: &str, links: Option<&Links>) -> bool {
        let aliases = links.map_or(&[][..], |links| &links.aliases);
        self.batch.as_ref().is_some_and(|batch| {
            batch.names.contains(name) || aliases.iter().any(|alias| batch.names.contains(alias))
        })
    }

    /// Returns what to request next, in order: names that the batch needs, or a new batch.
    pub(crate) fn requests(&mut self, mesh: &Mesh) -> Vec<Names> {
        if self.batch.is_none() && !self.queued.is_empty() {
            let mut batch = Batch::default();
            while batch.addresses.len() < MAX_BATCH
                && let Some(address) = self.queued.pop_first()
            {
                let name = address_name(mesh, address);
                batch.addresses.insert(name.clone(), (address, None));
                batch.wants(name);
            }
            self.batch = Some(batch);
        }
        let unsent = self.batch.as_mut().map(|batch| batch.unsent.split_off(0));
        let names = unsent.unwrap_or_default();
        if names.is_empty() {
            return Vec::new();
        }
        // istiod answers nothing to a name that is subscribed to already.
        let again = names.iter().filter(|name| self.subscribed.contains(*name));
        let again: Vec<_> = again.cloned().collect();
        let mut requests = Vec::new();
        requests.extend(self.unsubscribe(again, mesh));
        self.subscribed.extend(names.iter().cloned());
        requests.push((names, Vec::new()));
        requests
    }

    /// Returns a request that unsubscribes from `names`. istiod takes a request that only unsubscribes for one that
    /// removes all resources, so this one also subscribes to a name that stands for nothing.
    fn unsubscribe(&mut self, mut names: Vec<String>, mesh: &Mesh) -> Option<Names> {
        if names.is_empty() {
            return None;
        }
        for name in &names {
            self.subscribed.remove(name);
        }
        let of = |number: usize| format!("{}/{}", mesh.network, ["0.0.0.0", "::"][number % 2]);
        let (new, old) = (of(self.placeholders), of(self.placeholders + 1));
        self.placeholders += 1;
        names.push(old);
        Some((vec![new], names))
    }

    /// Takes note of an answer. `names` are all names of what it is about.
    pub(crate) fn note<'a>(
        &mut self,
        names: impl Iterator<Item = &'a String>,
        answer: &Answer,
        links: Option<&Links>,
    ) {
        let Some(batch) = &mut self.batch else {
            return;
        };
        let mut is_wanted = false;
        for name in names {
            is_wanted |= batch.names.contains(name);
            batch.waiting.remove(name);
            if let Some((_, noted)) = batch.addresses.get_mut(name) {
                *noted = Some(answer.clone());
            }
        }
        // The endpoints of a service come with it, and have no waypoint of their own to ask for until they are dialled.
        if let Some(waypoint) = links.and_then(|links| links.waypoint.clone())
            && is_wanted
        {
            batch.wants(waypoint);
        }
    }

    /// Takes note of a resource that the stream has sent.
    pub(crate) fn received(&mut self, name: &str) {
        if !self.subscribed.contains(name) {
            self.subscribed.insert(name.to_owned());
        }
    }

    /// Returns the answers of the batch, if all have arrived.
    pub(crate) fn answered(&mut self) -> Vec<(IpAddr, Answer)> {
        let Some(batch) = self.batch.take_if(|batch| batch.waiting.is_empty()) else {
            return Vec::new();
        };
        let answers = batch.addresses.into_values();
        answers
            .map(|(address, answer)| (address, answer.unwrap_or(Answer::Absent)))
            .collect()
    }

    /// Returns the resources that nothing needs any more, where the `used` addresses are needed, and the request that
    /// unsubscribes from them.
    pub(crate) fn release(
        &mut self,
        used: &HashSet<IpAddr>,
        held: &HashMap<&String, &Links>,
        mesh: &Mesh,
    ) -> (Vec<String>, Option<Names>) {
        let batch = self
            .batch
            .iter()
            .flat_map(|batch| batch.names.iter().cloned());
        let used = used.iter().map(|address| address_name(mesh, *address));
        let used: HashSet<String> = used.chain(batch).collect();
        let needed = needed(&used, held);
        let released = held.keys().filter(|name| !needed.contains(name.as_str()));
        let released: Vec<String> = released.map(|name| (*name).clone()).collect();
        let mut names: Vec<_> = self
            .subscribed
            .iter()
            .filter(|name| !used.contains(*name) && !needed.contains(name.as_str()))
            .cloned()
            .collect();
        names.sort();
        let request = self.unsubscribe(names, mesh);
        (released, request)
    }
}

impl Batch {
    fn wants(&mut self, name: String) {
        if self.names.insert(name.clone()) {
            self.waiting.insert(name.clone());
            self.unsent.push(name);
        }
    }
}

/// Returns the names of the resources that have a used name, and of those that belong to them: endpoints of services, and
/// waypoints.
fn needed<'a>(used: &HashSet<String>, held: &HashMap<&'a String, &'a Links>) -> HashSet<&'a str> {
    let mut by_alias: HashMap<&str, &'a str> = HashMap::new();
    let mut endpoints: HashMap<&str, Vec<&'a str>> = HashMap::new();
    for (name, links) in held {
        let name = name.as_str();
        let aliases = links.aliases.iter().map(String::as_str);
        by_alias.extend(aliases.chain([name]).map(|alias| (alias, name)));
        for service in &links.services {
            endpoints.entry(service).or_default().push(name);
        }
    }
    let is_root = |name: &String, links: &Links| {
        links.is_local || used.contains(name) || links.aliases.iter().any(|it| used.contains(it))
    };
    let roots = held.iter().filter(|(name, links)| is_root(name, links));
    let mut left: Vec<&'a str> = roots.map(|(name, _)| name.as_str()).collect();
    let links: HashMap<&str, &Links> = held.iter().map(|(name, it)| (name.as_str(), *it)).collect();
    let mut needed = HashSet::new();
    while let Some(name) = left.pop() {
        if !needed.insert(name) {
            continue;
        }
        left.extend(endpoints.get(name).into_iter().flatten());
        let waypoint = links.get(name).and_then(|links| links.waypoint.as_deref());
        left.extend(waypoint.and_then(|waypoint| by_alias.get(waypoint)));
    }
    needed
}

impl Links {
    pub(crate) fn of(found: &Address, aliases: Vec<String>, node: &str) -> Self {
        let (services, waypoint, is_local) = match &found.r#type {
            Some(address::Type::Workload(workload)) => (
                workload.services.keys().cloned().collect(),
                workload.waypoint.as_ref(),
                workload.node == node,
            ),
            Some(address::Type::Service(service)) => (Vec::new(), service.waypoint.as_ref(), false),
            None => (Vec::new(), None, false),
        };
        Self {
            aliases,
            services,
            waypoint: waypoint.and_then(waypoint_name),
            is_local,
        }
    }
}

fn address_name(mesh: &Mesh, address: IpAddr) -> String {
    format!("{}/{address}", mesh.network)
}

fn waypoint_name(waypoint: &GatewayAddress) -> Option<String> {
    use gateway_address::Destination;
    let name = match waypoint.destination.as_ref()? {
        Destination::Hostname(at) => Some(format!("{}/{}", at.namespace, at.hostname)),
        Destination::Address(at) => {
            let address = crate::read::any_address(&at.address).ok()?;
            Some(format!("{}/{address}", at.network))
        }
    };
    name.filter(|name| crate::read::name("waypoint", name).is_ok())
}

#[cfg(test)]
mod tests;
