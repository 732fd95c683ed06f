//! What istiod and the API server say, as one state of the mesh. The API server says which pods are on this node, what
//! is in the mesh there, and at which ports of nodes and other addresses services are exposed; istiod says everything
//! else, and which policies select each workload.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use auth_mesh::{Edit, MeshDefault, ObjectName, Service, Snapshot, Workload, policy::api::Object};

use crate::{
    authorization::{marker, pending_marker, pending_policy},
    read::Mesh,
    session::Change,
    workload::{FoundWorkload, pod_uid},
};

/// The state of the mesh, with the changes since the last snapshot.
#[derive(Debug)]
pub struct State {
    mesh: Mesh,
    node: String,
    edit: Edit,
    /// istiod's workloads, by resource name.
    workloads: HashMap<String, FoundWorkload>,
    /// Names of istiod's services in the model, by resource name.
    services: HashMap<String, ObjectName>,
    /// istiod's services, by name.
    found_services: HashMap<ObjectName, Service>,
    /// The services that are exposed at other addresses than their own, from the API server.
    exposed: HashMap<ObjectName, Arc<Service>>,
    /// istiod's policies, by resource name (`namespace/name`).
    policies: BTreeMap<String, Arc<Object>>,
    policies_changed: bool,
    /// The pods of this node, from the API server.
    local: HashMap<ObjectName, Arc<Workload>>,
}

impl State {
    /// Creates an empty state for `node`. Pods of this node whose labels, and whose namespace's labels, say nothing are in
    /// the mesh according to `defaults`.
    pub fn new(mesh: Mesh, node: String, defaults: MeshDefault) -> Self {
        Self {
            mesh,
            node,
            edit: Edit::from(Snapshot::with_defaults(defaults)),
            workloads: HashMap::new(),
            services: HashMap::new(),
            found_services: HashMap::new(),
            exposed: HashMap::new(),
            policies: BTreeMap::new(),
            policies_changed: true,
            local: HashMap::new(),
        }
    }

    /// Applies a change of istiod's resources.
    pub fn take(&mut self, change: Change) {
        match change {
            Change::Workload(uid, found) => self.put_workload(uid, Some(*found)),
            Change::Service(key, service) => {
                let name = service.name.clone();
                if let Some(before) = self.services.insert(key, name.clone())
                    && before != name
                {
                    self.put_service(&before, None);
                }
                self.put_service(&name, Some(*service));
            }
            Change::NoAddress(key) => {
                if let Some(service) = self.services.remove(&key) {
                    self.put_service(&service, None);
                } else {
                    self.put_workload(key, None);
                }
            }
            Change::Policy(key, policy) => {
                let is_new = self.policies.insert(key, policy).is_none();
                self.policies_have_changed(is_new);
            }
            Change::NoPolicy(key) => {
                let is_gone = self.policies.remove(&key).is_some();
                self.policies_have_changed(is_gone);
            }
        }
    }

    /// Adds a pod of this node, or replaces the pod of the same name. Ignores pods of other nodes.
    pub fn local_pod(&mut self, pod: Arc<Workload>) {
        if pod.node != self.node {
            return;
        }
        let name = pod.name.clone();
        self.local.insert(name.clone(), pod);
        self.settle(&name);
    }

    /// Removes a pod of this node.
    pub fn remove_local_pod(&mut self, name: &ObjectName) {
        if self.local.remove(name).is_some() {
            self.settle(name);
        }
    }

    /// Takes from the API server's object where a service is exposed. The service itself is what istiod says.
    pub fn exposed_service(&mut self, service: Arc<Service>) {
        let name = service.name.clone();
        if service.node_ports.is_empty() && service.external_addresses.is_empty() {
            return self.remove_exposed_service(&name);
        }
        self.exposed.insert(name.clone(), service);
        self.settle_service(&name);
    }

    /// Forgets where a service is exposed.
    pub fn remove_exposed_service(&mut self, name: &ObjectName) {
        if self.exposed.remove(name).is_some() {
            self.settle_service(name);
        }
    }

    /// Returns the own addresses of the services that are exposed elsewhere.
    pub fn exposed_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let services = self.exposed.values();
        services.flat_map(|service| service.addresses.iter().copied())
    }

    /// Returns the snapshot under construction, for what istiod does not say.
    pub fn edit(&mut self) -> &mut Edit {
        &mut self.edit
    }

    /// Returns the policies that istiod says select a pod of this node, and has not sent: the pod, and the policy.
    pub fn missing_policies(&self) -> impl Iterator<Item = (&ObjectName, &ObjectName)> {
        let found = self.local.keys().filter_map(|name| self.found(name));
        found.flat_map(|found| {
            let policies = found.policies.iter();
            let missing = policies.filter(|policy| !self.is_known(found, policy));
            missing.map(|policy| (&found.workload.name, policy))
        })
    }

    /// Returns all policies, if they have changed since the last call.
    pub fn policies(&mut self) -> Option<Vec<Arc<Object>>> {
        if !std::mem::take(&mut self.policies_changed) {
            return None;
        }
        let pending = pending_policy(&self.mesh);
        Some(self.policies.values().cloned().chain([pending]).collect())
    }

    /// Returns a snapshot of everything else.
    pub fn snapshot(&mut self) -> Snapshot {
        let edit = std::mem::replace(&mut self.edit, Edit::from(Snapshot::default()));
        let snapshot = edit.finish();
        self.edit = Edit::from(snapshot.clone());
        snapshot
    }

    fn policies_have_changed(&mut self, in_number: bool) {
        self.policies_changed = true;
        if in_number {
            // It may have changed whether all policies of a pod are known.
            let names: Vec<_> = self.local.keys().cloned().collect();
            for name in names {
                self.settle(&name);
            }
        }
    }

    fn put_service(&mut self, name: &ObjectName, found: Option<Service>) {
        match found {
            Some(found) => self.found_services.insert(name.clone(), found),
            None => self.found_services.remove(name),
        };
        self.settle_service(name);
    }

    /// Makes the model's service of that name what both sources say.
    fn settle_service(&mut self, name: &ObjectName) {
        let Some(found) = self.found_services.get(name) else {
            return self.edit.remove_service(name);
        };
        let mut service = found.clone();
        if let Some(exposed) = self.exposed.get(name) {
            service.node_ports.clone_from(&exposed.node_ports);
            let external = &exposed.external_addresses;
            service.external_addresses.clone_from(external);
        }
        self.edit.service(service);
    }

    fn put_workload(&mut self, uid: String, found: Option<FoundWorkload>) {
        let before = match &found {
            Some(found) => self.workloads.insert(uid, found.clone()),
            None => self.workloads.remove(&uid),
        };
        let slices = found.as_ref().map_or(&[][..], |found| &found.slices);
        for old in before.iter().flat_map(|before| &before.slices) {
            if !slices.iter().any(|slice| slice.name == old.name) {
                self.edit.remove_slice(&old.name);
            }
        }
        for slice in slices {
            self.edit.slice(slice.clone());
        }
        let name = found.or(before).map(|found| found.workload.name);
        if let Some(name) = name {
            self.settle(&name);
        }
    }

    /// Makes the model's pod of that name what both sources say.
    fn settle(&mut self, name: &ObjectName) {
        match (self.local.get(name), self.found(name)) {
            (Some(local), found) => {
                let mut pod = Workload::clone(local);
                let known = found.map(|found| self.known_policies(found));
                match known.flatten() {
                    Some(markers) => pod.labels.extend(markers),
                    // Nothing says yet which policies select the pod.
                    None => pod.labels.extend([pending_marker()]),
                }
                if let Some(found) = found {
                    pod.hbone = found.workload.hbone;
                    pod.waypoint.clone_from(&found.workload.waypoint);
                }
                self.edit.pod(pod);
            }
            // For pods of this node, the API server takes precedence.
            (None, Some(found)) if found.workload.node != self.node => {
                self.edit.pod(found.workload.clone());
            }
            (None, _) => self.edit.remove_pod(name),
        }
    }

    /// Returns what istiod says of a workload. One that is no pod is named by its UID.
    fn found(&self, name: &ObjectName) -> Option<&FoundWorkload> {
        let pod = self.workloads.get(&pod_uid(&self.mesh, name));
        let found = pod.or_else(|| self.workloads.get(&name.name));
        found.filter(|found| found.workload.name == *name)
    }

    /// Returns the labels by which the policies of a workload select it. `None` if one of them is not known.
    fn known_policies(&self, found: &FoundWorkload) -> Option<Vec<(String, String)>> {
        let policies = found.policies.iter();
        policies
            .map(|policy| self.is_known(found, policy).then(|| marker(policy)))
            .collect()
    }

    /// Reports whether a policy that selects the workload has arrived, and is of its namespace or the root's: the model applies
    /// no other.
    fn is_known(&self, found: &FoundWorkload, policy: &ObjectName) -> bool {
        let namespaces = [&found.workload.name.namespace, &self.mesh.root_namespace];
        namespaces.contains(&&policy.namespace) && self.policies.contains_key(&policy.to_string())
    }
}

#[cfg(test)]
mod tests;
