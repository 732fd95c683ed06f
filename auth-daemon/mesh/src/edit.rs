//! Changes from one snapshot to the next. The cost of a change depends on what it touches, not on the size of the mesh.

use std::{collections::BTreeSet, hash::Hash, net::IpAddr, sync::Arc};

use imbl::{HashMap, OrdMap, OrdSet};

use super::{
    Membership, ObjectName, Service, Slice, Snapshot, Workload,
    claims::{Claim, Claimant, Claims},
    resolved::{MAX_SLICED, Resolved},
    snapshot::{Daemons, Namespace, ServiceState},
};

/// A snapshot under construction, based on a previous one.
#[derive(Debug)]
pub struct Edit {
    pub(super) next: Snapshot,
    /// Services whose endpoints must be resolved again.
    dirty: BTreeSet<ObjectName>,
    /// Whether networks of nodes or services have changed.
    pub(super) networks_changed: bool,
}

impl From<Snapshot> for Edit {
    fn from(next: Snapshot) -> Self {
        Self {
            next,
            dirty: BTreeSet::new(),
            networks_changed: false,
        }
    }
}

impl Edit {
    /// Adds `pod`, or replaces the pod of the same name.
    pub fn pod(&mut self, pod: impl Into<Arc<Workload>>) {
        let pod = pod.into();
        self.remove_pod(&pod.name);
        self.index(&pod);
        let namespace = self.namespace_of(&pod.name);
        namespace.pods.insert(pod.name.name.clone(), pod.clone());
        self.select(&pod, true);
    }

    /// Removes the pod.
    pub fn remove_pod(&mut self, name: &ObjectName) {
        let Some(namespace) = self.next.namespaces.get_mut(&name.namespace) else {
            return;
        };
        let Some(pod) = namespace.pods.remove(&name.name) else {
            return;
        };
        self.unindex(&pod);
        self.select(&pod, false);
        self.drop_if_empty(&name.namespace);
    }

    /// Adds `service`, or replaces the service of the same name.
    pub fn service(&mut self, service: impl Into<Arc<Service>>) {
        let service = service.into();
        self.remove_service(&service.name);
        let name = service.name.clone();
        let namespace = self.namespace_of(&name);
        let selected: OrdMap<_, _> = namespace
            .pods
            .iter()
            .filter(|(_, pod)| service.selects(pod))
            .map(|(name, pod)| (name.clone(), pod.clone()))
            .collect();
        if let Some(label) = index_label(&service) {
            let services = namespace.by_label.entry(label).or_default();
            services.insert(name.name.clone());
        }
        let state = ServiceState { service, selected };
        namespace
            .services
            .insert(name.name.clone(), Arc::new(state));
        self.dirty.insert(name);
    }

    /// Removes the service.
    pub fn remove_service(&mut self, name: &ObjectName) {
        let Some(namespace) = self.next.namespaces.get_mut(&name.namespace) else {
            return;
        };
        let Some(state) = namespace.services.remove(&name.name) else {
            return;
        };
        if let Some(label) = index_label(&state.service) {
            forget(&mut namespace.by_label, &label, &name.name);
        }
        // A service of a remote cluster adds its pods to that of this one.
        self.dirty.insert(name.clone());
        self.next.crowded.remove(name);
        self.hide_service(&state.service);
        for address in &state.service.addresses {
            self.unclaim(*address, Claimant::Service, name);
        }
        self.drop_if_empty(&name.namespace);
    }

    /// Adds `slice`, or replaces the slice of the same name.
    pub fn slice(&mut self, slice: impl Into<Arc<Slice>>) {
        let slice = slice.into();
        self.remove_slice(&slice.name);
        let by = &mut self.next.slices;
        for endpoint in &slice.endpoints {
            let slices = by.address.entry(endpoint.address).or_default();
            slices.insert(slice.name.clone());
            if let Some(pod) = &endpoint.pod {
                let slices = by.pod.entry(pod.clone()).or_default();
                slices.insert(slice.name.clone());
            }
        }
        self.dirty.insert(service_of(&slice));
        let namespace = self.namespace_of(&slice.name);
        let slices = namespace.by_service.entry(slice.service.clone());
        slices.or_default().insert(slice.name.name.clone());
        namespace.slices.insert(slice.name.name.clone(), slice);
    }

    /// Removes the slice.
    pub fn remove_slice(&mut self, name: &ObjectName) {
        let Some(namespace) = self.next.namespaces.get_mut(&name.namespace) else {
            return;
        };
        let Some(slice) = namespace.slices.remove(&name.name) else {
            return;
        };
        forget(&mut namespace.by_service, &slice.service, &name.name);
        let by = &mut self.next.slices;
        for endpoint in &slice.endpoints {
            forget(&mut by.address, &endpoint.address, name);
            if let Some(pod) = &endpoint.pod {
                forget(&mut by.pod, pod, name);
            }
        }
        self.dirty.insert(service_of(&slice));
        self.drop_if_empty(&name.namespace);
    }

    /// Sets the membership that the namespace `name` specifies for its pods.
    pub fn namespace(&mut self, name: &str, membership: Option<Membership>) {
        let before = self.next.namespaces.get(name);
        if before.and_then(|before| before.membership) == membership {
            return;
        }
        let pods = before.map(|before| before.pods.clone()).unwrap_or_default();
        for pod in pods.values() {
            self.unindex(pod);
        }
        let namespace = self.next.namespaces.entry(name.to_owned()).or_default();
        namespace.membership = membership;
        for service in namespace.services.keys() {
            self.dirty.insert(ObjectName {
                namespace: name.to_owned(),
                name: service.clone(),
            });
        }
        for pod in pods.values() {
            self.index(pod);
        }
        self.drop_if_empty(name);
    }

    /// Starts to track daemons: from now on, only nodes reported by [`Edit::daemon`] count as having one.
    pub fn know_daemons(&mut self) {
        self.next.daemons.get_or_insert_default();
    }

    /// Records that the node daemon's pod `name` is ready on `node`, or, with `None`, not ready on any node.
    pub fn daemon(&mut self, name: &ObjectName, node: Option<&str>) {
        let Daemons { pods, nodes } = self.next.daemons.get_or_insert_default();
        if let Some(before) = pods.remove(name)
            && let Some(count) = nodes.get_mut(&before)
        {
            *count -= 1;
            if *count == 0 {
                nodes.remove(&before);
            }
        }
        if let Some(node) = node {
            pods.insert(name.clone(), node.to_owned());
            *nodes.entry(node.to_owned()).or_insert(0) += 1;
            if !self.next.disabled.contains(node) {
                self.next.proven.insert(node.to_owned());
            }
        }
    }

    /// Records whether an administrator has disabled the tunnel of `node`. Disabling forgets that the node ever had a
    /// daemon.
    pub fn disable_tunnel(&mut self, node: &str, is_disabled: bool) {
        let daemons = self.next.daemons.as_ref();
        let has_daemon = daemons.is_some_and(|daemons| daemons.nodes.contains_key(node));
        if is_disabled {
            self.next.disabled.insert(node.to_owned());
            self.next.proven.remove(node);
        } else if self.next.disabled.remove(node).is_some() && has_daemon {
            self.next.proven.insert(node.to_owned());
        }
    }

    /// Returns the snapshot with all changes applied.
    pub fn finish(mut self) -> Snapshot {
        self.apply();
        self.next
    }

    /// Returns the snapshot with all changes applied, of which this is the next one under construction.
    pub fn snapshot(&mut self) -> Snapshot {
        self.apply();
        self.next.clone()
    }

    fn apply(&mut self) {
        let dirty: BTreeSet<_> = std::mem::take(&mut self.dirty)
            .into_iter()
            .map(ObjectName::in_own_cluster)
            .collect();
        for name in dirty {
            self.work_out(&name);
        }
        self.collect_networks();
    }

    fn namespace_of(&mut self, name: &ObjectName) -> &mut Namespace {
        let namespaces = &mut self.next.namespaces;
        namespaces.entry(name.namespace.clone()).or_default()
    }

    fn drop_if_empty(&mut self, name: &str) {
        let namespace = self.next.namespaces.get(name);
        let is_empty = namespace.is_some_and(|namespace| {
            namespace.membership.is_none()
                && namespace.pods.is_empty()
                && namespace.services.is_empty()
                && namespace.slices.is_empty()
        });
        if is_empty {
            self.next.namespaces.remove(name);
        }
    }

    /// Adds `pod` to the indices by address and by node.
    fn index(&mut self, pod: &Arc<Workload>) {
        self.touch(pod);
        // A pod without a node is not scheduled yet.
        if !pod.node.is_empty() {
            let pods = self.next.nodes.entry(pod.node.clone()).or_default();
            pods.insert(pod.name.clone(), pod.clone());
        }
        let is_member = self.next.is_member(pod);
        self.expose_pod(pod, is_member);
        if !is_member {
            // A remote cluster cannot say that an address is outside the mesh.
            if pod.name.cluster().is_some() {
                return;
            }
            for address in &pod.addresses {
                self.claim(*address, Claim::OutsidePod(pod.clone()));
            }
            return;
        }
        for address in &pod.addresses {
            self.claim(*address, Claim::Pod(pod.clone()));
        }
    }

    fn unindex(&mut self, pod: &Arc<Workload>) {
        self.touch(pod);
        self.hide_pod(pod);
        if let Some(pods) = self.next.nodes.get_mut(&pod.node) {
            pods.remove(&pod.name);
            if pods.is_empty() {
                self.next.nodes.remove(&pod.node);
            }
        }
        for address in &pod.addresses {
            self.unclaim(*address, Claimant::Pod, &pod.name);
        }
    }

    /// Marks services for resolution whose endpoint slices may refer to `pod`.
    fn touch(&mut self, pod: &Workload) {
        let by = &self.next.slices;
        let by_address = pod.addresses.iter().filter_map(|ip| by.address.get(ip));
        let names = by_address.chain(by.pod.get(&pod.name)).flatten();
        let slices = names.filter_map(|name| {
            let namespace = self.next.namespaces.get(&name.namespace)?;
            namespace.slices.get(&name.name)
        });
        self.dirty.extend(slices.map(|slice| service_of(slice)));
    }

    /// Adds `pod` to the services that select it, or removes it if `there` is false.
    fn select(&mut self, pod: &Arc<Workload>, there: bool) {
        let Some(namespace) = self.next.namespaces.get_mut(&pod.name.namespace) else {
            return;
        };
        let Namespace {
            services, by_label, ..
        } = namespace;
        for (key, value) in &pod.labels {
            let candidates = by_label.get(&(key.clone(), value.clone()));
            for name in candidates.into_iter().flatten() {
                let Some(state) = services.get_mut(name) else {
                    continue;
                };
                if !state.service.selects(pod) {
                    continue;
                }
                let selected = &mut Arc::make_mut(state).selected;
                if there {
                    selected.insert(pod.name.name.clone(), pod.clone());
                } else {
                    selected.remove(&pod.name.name);
                }
                self.dirty.insert(ObjectName {
                    namespace: pod.name.namespace.clone(),
                    name: name.clone(),
                });
            }
        }
    }

    /// Resolves the addresses of a service.
    fn work_out(&mut self, name: &ObjectName) {
        let namespace = self.next.namespaces.get(&name.namespace);
        let Some(state) = namespace
            .and_then(|ns| ns.services.get(&name.name))
            .cloned()
        else {
            return;
        };
        let service = &*state.service;
        let slices: Vec<_> = self.next.slices_of(name).cloned().collect();
        let remote: Vec<_> = self.next.remote_services(name).cloned().collect();
        let backends = self.next.backends(&state, &slices);
        let remote: Vec<_> = remote
            .iter()
            .map(|state| (&*state.service, self.next.backends(state, &[])))
            .collect();
        // A service whose backends are all outside the mesh is not a mesh service, unless its owner pins the identities
        // that may run it, its connections go through a waypoint, or nothing but the mesh leads them to it. One without a backend is the mesh's if its next one
        // would be: until then, connections to it are refused.
        let ours = service.pinned_identities.is_some()
            || service.waypoint.is_some()
            || slices.iter().any(|slice| slice.mesh_only)
            || backends.any_meshed()
            || remote.iter().any(|(_, backends)| backends.any_meshed())
            || (backends.is_empty()
                && self.next.default_of(&name.namespace) == Membership::Enabled);
        let mut room = Some(MAX_SLICED);
        let claims: Vec<_> = service
            .addresses
            .iter()
            .map(|address| {
                let claim = if ours {
                    let resolved = Resolved::new(service, &backends, &remote, *address, &mut room);
                    Claim::Service(Arc::new(resolved))
                } else {
                    Claim::OutsideService(state.service.clone())
                };
                (*address, claim)
            })
            .collect();
        for address in &service.addresses {
            self.unclaim(*address, Claimant::Service, name);
        }
        for (address, claim) in claims {
            self.claim(address, claim);
        }
        self.expose_service(service, ours);
        match room {
            Some(_) => self.next.crowded.remove(name),
            None => self.next.crowded.insert(name.clone()),
        };
    }

    fn claim(&mut self, address: IpAddr, claim: Claim) {
        let others = self
            .next
            .addresses
            .get(&address)
            .map_or(&[][..], Claims::all);
        let claims = others.iter().cloned().chain([claim]).collect();
        self.settle(address, claims);
    }

    fn unclaim(&mut self, address: IpAddr, claimant: Claimant, name: &ObjectName) {
        let claims = self
            .next
            .addresses
            .get(&address)
            .map_or(&[][..], Claims::all);
        let others = claims.iter().filter(|claim| !claim.is_of(claimant, name));
        let others: Vec<_> = others.cloned().collect();
        if others.len() < claims.len() {
            self.settle(address, others);
        }
    }

    fn settle(&mut self, address: IpAddr, mut claims: Vec<Claim>) {
        let claims = match claims.len() {
            0 => {
                self.next.addresses.remove(&address);
                self.next.disputed.remove(&address);
                self.next.overruled.remove(&address);
                return;
            }
            1 => Claims::One(claims.remove(0)),
            _ => Claims::Several(claims.into()),
        };
        for (set, contains) in [
            (&mut self.next.disputed, claims.are_disputed()),
            (&mut self.next.overruled, claims.are_overruled()),
        ] {
            if contains {
                set.insert(address);
            } else {
                set.remove(&address);
            }
        }
        self.next.addresses.insert(address, claims);
    }
}

fn service_of(slice: &Slice) -> ObjectName {
    ObjectName {
        namespace: slice.name.namespace.clone(),
        name: slice.service.clone(),
    }
}

/// Removes `value` from the set of `key`.
fn forget<K, V>(index: &mut HashMap<K, OrdSet<V>>, key: &K, value: &V)
where
    K: Clone + Eq + Hash,
    V: Clone + Ord,
{
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

/// Returns the label under which pods with that label find the service.
fn index_label(service: &Service) -> Option<(String, String)> {
    let (key, value) = service.selector.first_key_value()?;
    Some((key.clone(), value.clone()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ClusterName, HostPort, Inventory, Port, SliceEndpoint, TargetPort};

    #[derive(Clone, Debug)]
    enum Change {
        Pod(Workload),
        Service(Service),
        Slice(Slice),
        NoPod(ObjectName),
        NoService(ObjectName),
        NoSlice(ObjectName),
        Namespace(String, Option<Membership>),
    }

    fn name() -> impl Strategy<Value = ObjectName> {
        ("[xy]", "[abc]").prop_map(|(namespace, name)| ObjectName { namespace, name })
    }

    /// The cluster that an object is of: mostly this one.
    fn cluster() -> impl Strategy<Value = Option<ClusterName>> {
        prop::option::weighted(0.2, "[ef]".prop_map(|name| name.parse().unwrap()))
    }

    fn membership() -> impl Strategy<Value = Option<Membership>> {
        prop::sample::select(vec![
            None,
            None,
            Some(Membership::Enabled),
            Some(Membership::Disabled),
        ])
    }

    fn address() -> impl Strategy<Value = Vec<IpAddr>> {
        let one = (1..5_u8).prop_map(|last| IpAddr::from([10, 0, 0, last]));
        prop::collection::btree_set(one, 0..3).prop_map(|all| all.into_iter().collect())
    }

    fn change() -> impl Strategy<Value = Change> {
        let flags = (any::<bool>(), any::<[bool; 2]>(), any::<bool>());
        let exposed = (address(), prop::option::of(node_address()));
        let names = (name(), cluster());
        let pod = (names, exposed, "[mn]?", "[pq]", membership(), flags).prop_map(
            |((name, cluster), (addresses, host), node, app, membership, flags)| {
                let (ready, [terminating, finished], host_network) = flags;
                let host_port = host.map(|address| HostPort {
                    addresses: vec![address],
                    port: 80,
                    target: 8080,
                });
                let account = format!("spiffe://c/ns/{}/sa/{app}", name.namespace);
                let pod = Workload {
                    addresses,
                    node,
                    ready,
                    terminating,
                    finished,
                    host_network,
                    membership,
                    host_ports: host_port.into_iter().collect(),
                    labels: [("app".to_owned(), app), ("x".to_owned(), "y".to_owned())].into(),
                    ..Workload::new(name, account.parse().unwrap())
                };
                Change::Pod(match cluster {
                    Some(cluster) => cluster.pod(pod),
                    None => pod,
                })
            },
        );
        let exposed = (prop::option::of(node_address()), any::<bool>());
        let service = ((name(), cluster()), address(), "[pq]?", exposed);
        let service = service.prop_map(
            |((name, cluster), addresses, app, (external, has_node_port))| {
                let selector = (!app.is_empty()).then(|| ("app".to_owned(), app));
                let service = Service {
                    addresses,
                    ports: vec![Port {
                        name: String::new(),
                        port: 80,
                        target: TargetPort::Number(8080),
                    }],
                    selector: selector.into_iter().collect(),
                    external_addresses: external.into_iter().collect(),
                    node_ports: has_node_port.then_some((80, 80)).into_iter().collect(),
                    ..Service::new(name)
                };
                Change::Service(match cluster {
                    Some(cluster) => cluster.service(service),
                    None => service,
                })
            },
        );
        prop_oneof![
            4 => pod,
            2 => service,
            2 => slice(),
            1 => any_name().prop_map(Change::NoPod),
            1 => name().prop_map(Change::NoSlice),
            1 => any_name().prop_map(Change::NoService),
            1 => ("[xy](@[ef])?", membership()).prop_map(|(name, membership)| Change::Namespace(name, membership)),
        ]
    }

    fn any_name() -> impl Strategy<Value = ObjectName> {
        (name(), cluster()).prop_map(|(mut name, cluster)| {
            if let Some(cluster) = cluster {
                name.namespace = cluster.qualify(&name.namespace);
            }
            name
        })
    }

    fn node_address() -> impl Strategy<Value = IpAddr> {
        (4..7_u8).prop_map(|last| IpAddr::from([10, 0, 0, last]))
    }

    fn slice() -> impl Strategy<Value = Change> {
        let endpoint = (
            (1..5_u8).prop_map(|last| IpAddr::from([10, 0, 0, last])),
            prop::option::of(name()),
            any::<bool>(),
            any::<bool>(),
        );
        let endpoint = endpoint.prop_map(|(address, pod, ready, serves_last)| SliceEndpoint {
            address,
            pod,
            node: None,
            ready,
            serves_last,
        });
        let endpoints = prop::collection::vec(endpoint, 0..4);
        let slice = (name(), "[abc]", endpoints, any::<bool>());
        slice.prop_map(|(name, service, endpoints, mesh_only)| {
            Change::Slice(Slice {
                name,
                service,
                ports: vec![(String::new(), 8080)],
                endpoints,
                mesh_only,
            })
        })
    }

    /// Everything that can be queried from a snapshot.
    fn observed(snapshot: &Snapshot) -> Vec<String> {
        let mut seen: Vec<_> = (1..8_u8)
            .map(|last| {
                let found = snapshot.resolve(([10, 0, 0, last], 80).into());
                format!("{found:?}")
            })
            .collect();
        seen.extend(snapshot.addresses().map(|(address, kind)| {
            let owner = snapshot
                .describe(address)
                .filter(|_| snapshot.addresses[&address].owner().is_some());
            format!("{address} {kind:?} {owner:?}")
        }));
        seen.extend(snapshot.workloads().map(|pod| pod.name.to_string()));
        for node in ["m", "n", ""] {
            seen.extend(
                snapshot
                    .on_node(node)
                    .map(|pod| format!("{node} {}", pod.name)),
            );
        }
        seen.extend(snapshot.exposed().map(|at| format!("{at:?}")));
        seen.extend(snapshot.exposed_errors());
        seen.push(format!("{:?} {:?}", snapshot.disputed, snapshot.overruled));
        seen
    }

    proptest! {
        #[test]
        fn change_by_change_is_the_same_as_at_once(changes in prop::collection::vec(change(), 0..40)) {
            let mut last = Snapshot::default();
            for change in &changes {
                let mut edit = Edit::from(last.clone());
                match change.clone() {
                    Change::Pod(pod) => edit.pod(pod),
                    Change::Service(service) => edit.service(service),
                    Change::Slice(slice) => edit.slice(slice),
                    Change::NoPod(name) => edit.remove_pod(&name),
                    Change::NoSlice(name) => edit.remove_slice(&name),
                    Change::NoService(name) => edit.remove_service(&name),
                    Change::Namespace(name, membership) => edit.namespace(&name, membership),
                }
                let next = edit.finish();
                let mut reported: std::collections::BTreeMap<_, _> = last.addresses().collect();
                for (address, kind) in next.addresses_since(&last) {
                    match kind {
                        Some(kind) => reported.insert(address, kind),
                        None => reported.remove(&address),
                    };
                }
                prop_assert!(reported.into_iter().eq(next.addresses()), "the differences are complete");
                let mut exposed: BTreeSet<_> = last.exposed().collect();
                for (at, is_exposed) in next.exposed_since(&last) {
                    let has_changed = match is_exposed {
                        true => exposed.insert(at),
                        false => exposed.remove(&at),
                    };
                    prop_assert!(has_changed, "{at:?}");
                }
                prop_assert!(exposed.into_iter().eq(next.exposed()), "of exposed ports, too");
                let namespaces = || next.namespaces.values();
                let pods = namespaces().flat_map(|ns| ns.pods.values());
                // Of remote clusters, only pods of the mesh claim anything.
                let pods = pods.filter(|pod| pod.name.cluster().is_none() || next.is_member(pod));
                let pods = pods.flat_map(|pod| &pod.addresses);
                let services = namespaces().flat_map(|ns| ns.services.values());
                let services = services.flat_map(|state| &state.service.addresses);
                let claimed: BTreeSet<_> = pods.chain(services).copied().collect();
                prop_assert!(
                    claimed.into_iter().eq(next.addresses().map(|(address, _)| address)),
                    "an address is known exactly if an object has it"
                );
                last = next;
            }
            // The same objects, in the order of their names.
            let mut namespaces = Edit::from(Snapshot::default());
            let mut inventory = Inventory::default();
            for (name, namespace) in &last.namespaces {
                namespaces.namespace(name, namespace.membership);
                inventory.workloads.extend(namespace.pods.values().map(|pod| (**pod).clone()));
                inventory.services.extend(namespace.services.values().map(|s| (*s.service).clone()));
                for slice in namespace.slices.values() {
                    namespaces.slice(slice.clone());
                }
            }
            for service in inventory.services {
                namespaces.service(service);
            }
            for pod in inventory.workloads {
                namespaces.pod(pod);
            }
            prop_assert_eq!(observed(&last), observed(&namespaces.finish()));
        }
    }
}
