//! The known state of the cluster: the last good state of each object, and the changes since the last publication.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{Kind, POLICIES, Settings};
use crate::discovery::manifest::{self, Object};
use auth_mesh::{Edit, ObjectName, Service, Workload, policy::api};

/// Name of the daemons' DaemonSet, and value of [`NAME_LABEL`] of its pods.
pub const DAEMON_NAME: &str = "auth-daemon";
/// The label that names what a pod runs.
pub const NAME_LABEL: &str = "app.kubernetes.io/name";

/// A watch event for any kind of object.
pub(in crate::discovery) enum Event {
    Apply(Seen),
    Delete(ObjectName),
    /// A new list begins: all objects follow as `InitApply`, then `InitDone`.
    Init,
    InitApply(Seen),
    InitDone,
}

pub(in crate::discovery) struct Seen {
    pub(super) name: ObjectName,
    pub(super) uid: String,
    /// The parsed object, `None` if it is irrelevant to the mesh, or the reason why it cannot be parsed.
    pub(super) object: Result<Option<Object>, String>,
}

/// The last published snapshot, with the changes since.
pub(in crate::discovery) trait Model {
    /// The snapshot under construction.
    fn edit(&mut self) -> &mut Edit;

    /// Adds a pod, or replaces the pod of the same name.
    fn pod(&mut self, pod: Arc<Workload>);

    /// Removes the pod.
    fn remove_pod(&mut self, name: &ObjectName);

    /// Adds a service, or replaces the service of the same name.
    fn service(&mut self, service: Arc<Service>);

    /// Removes the service.
    fn remove_service(&mut self, name: &ObjectName);
}

/// Pods and services are what the API server says.
impl Model for Edit {
    fn edit(&mut self) -> &mut Edit {
        self
    }

    fn pod(&mut self, pod: Arc<Workload>) {
        Self::pod(self, pod);
    }

    fn remove_pod(&mut self, name: &ObjectName) {
        Self::remove_pod(self, name);
    }

    fn service(&mut self, service: Arc<Service>) {
        Self::service(self, service);
    }

    fn remove_service(&mut self, name: &ObjectName) {
        Self::remove_service(self, name);
    }
}

/// The known state of one cluster.
pub(in crate::discovery) struct Known {
    settings: Settings,
    kinds: BTreeMap<Kind, Objects>,
    /// Whether policies have changed since they were last published.
    policies_changed: bool,
    /// Whether it is not in force yet, so that no model gets its changes.
    is_draft: bool,
}

/// The objects of one kind.
#[derive(Default)]
struct Objects {
    current: HashMap<ObjectName, Kept>,
    /// The objects received so far from a list in progress.
    listed: Option<HashMap<ObjectName, Kept>>,
    complete: bool,
    /// Whether the last list was empty, although objects were known.
    doubted: bool,
}

/// The last good state of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    uid: String,
    /// `None` if the object is irrelevant to the mesh.
    object: Option<Object>,
}

impl Known {
    pub(super) fn new(settings: Settings, policies: bool) -> Self {
        let mut kinds = vec![Kind::Pod];
        if settings.services {
            kinds.extend(Kind::OF_SERVICES);
        }
        if policies {
            kinds.extend(POLICIES.map(Kind::Policy));
        }
        Self::of(settings, &kinds)
    }

    /// Creates the state of a cluster of which only these kinds are watched.
    pub(in crate::discovery) fn of(settings: Settings, kinds: &[Kind]) -> Self {
        Self {
            settings,
            kinds: kinds
                .iter()
                .map(|kind| (*kind, Objects::default()))
                .collect(),
            policies_changed: false,
            is_draft: false,
        }
    }

    /// Creates an empty state of the same cluster that is not in force, and whose changes go to no model, until
    /// [`Self::replace`] has it.
    pub(super) fn draft(&self) -> Self {
        let kinds: Vec<_> = self.kinds.keys().copied().collect();
        Self {
            is_draft: true,
            ..Self::of(self.settings.clone(), &kinds)
        }
    }

    /// Replaces all objects with those of `draft`, also in `model`.
    pub(super) fn replace(&mut self, draft: Self, model: &mut impl Model) {
        for (kind, objects) in draft.kinds {
            self.keep_all(kind, objects.current, model);
            let known = self.kinds.entry(kind).or_default();
            // A list may be in progress again.
            known.listed = objects.listed;
            known.complete = objects.complete;
            known.doubted = objects.doubted;
        }
    }

    /// Sets the reading that all pods belong to, including those of a list in progress.
    pub(super) fn set_generation(&mut self, generation: u64) {
        for objects in self.kinds.values_mut() {
            let listed = objects.listed.iter_mut().flat_map(HashMap::values_mut);
            for kept in objects.current.values_mut().chain(listed) {
                if let Some(Object::Pod(pod)) = &mut kept.object {
                    Arc::make_mut(pod).generation = generation;
                }
            }
        }
    }

    /// Reports whether each kind has been read completely once.
    pub(in crate::discovery) fn is_complete(&self) -> bool {
        self.kinds.values().all(|objects| objects.complete)
    }

    /// Returns the number of objects that are known only from before an empty list.
    pub(in crate::discovery) fn unconfirmed(&self) -> usize {
        let doubted = self.kinds.values().filter(|objects| objects.doubted);
        doubted.map(|objects| objects.current.len()).sum()
    }

    pub(super) fn count(&self) -> usize {
        self.kinds
            .values()
            .map(|objects| objects.current.len())
            .sum()
    }

    /// Returns the UID of an object, if it is known.
    pub(super) fn uid_of(&self, kind: Kind, name: &ObjectName) -> Option<&str> {
        let kept = self.kinds.get(&kind)?.current.get(name)?;
        Some(kept.uid.as_str()).filter(|uid| !uid.is_empty())
    }

    /// Returns the number of objects of a kind.
    pub(super) fn count_of(&self, kind: Kind) -> usize {
        let objects = self.kinds.get(&kind);
        objects.map_or(0, |objects| objects.current.len())
    }

    /// Applies an event, also to `model`. Returns whether it changed anything.
    pub(in crate::discovery) fn take(
        &mut self,
        kind: Kind,
        event: Event,
        model: &mut impl Model,
    ) -> bool {
        let objects = self.kinds.entry(kind).or_default();
        match event {
            Event::Apply(seen) => {
                let (name, kept) = read(seen, &objects.current);
                self.keep(kind, name, Some(kept), model)
            }
            Event::Delete(name) => self.keep(kind, name, None, model),
            Event::Init => {
                objects.listed = Some(HashMap::new());
                false
            }
            Event::InitApply(seen) => {
                let (name, kept) = read(seen, &objects.current);
                objects.listed.get_or_insert_default().insert(name, kept);
                false
            }
            // Objects missing from the list were deleted while the watch was interrupted. But an empty list deletes
            // nothing: it is more likely that the API server has lost its data, or does not serve the kind at this
            // moment, than that every object was deleted. Without its policies and pods the mesh would be open.
            Event::InitDone => {
                let listed = objects.listed.take().unwrap_or_default();
                let mut changed = !std::mem::replace(&mut objects.complete, true);
                let doubted = listed.is_empty() && !objects.current.is_empty();
                if doubted && !objects.doubted {
                    tracing::warn!(
                        objects = objects.current.len(),
                        "the API server lists no {} any more; those known stay in force until the API server reports \
                         that each was deleted. If they were deleted during an outage, restart the daemon",
                        kind.plural()
                    );
                }
                objects.doubted = doubted;
                if doubted {
                    return changed;
                }
                changed |= self.keep_all(kind, listed, model);
                changed
            }
        }
    }

    /// Forgets what a list in progress, which will not go on, has had so far.
    pub(super) fn forget_listed(&mut self, kind: Kind) {
        if let Some(objects) = self.kinds.get_mut(&kind) {
            objects.listed = None;
        }
    }

    /// Stores the state of all objects of a kind. Returns whether any changed for the mesh.
    fn keep_all(
        &mut self,
        kind: Kind,
        all: HashMap<ObjectName, Kept>,
        model: &mut impl Model,
    ) -> bool {
        let known = self.kinds.entry(kind).or_default().current.keys();
        let gone: Vec<_> = known
            .filter(|name| !all.contains_key(*name))
            .cloned()
            .collect();
        let mut changed = false;
        for name in gone {
            changed |= self.keep(kind, name, None, model);
        }
        for (name, kept) in all {
            changed |= self.keep(kind, name, Some(kept), model);
        }
        changed
    }

    /// Forgets all objects, also in `model`.
    pub(super) fn clear(&mut self, model: &mut impl Model) {
        let mut all = Vec::new();
        for (kind, objects) in &self.kinds {
            all.extend(objects.current.keys().map(|name| (*kind, name.clone())));
        }
        for (kind, name) in all {
            self.keep(kind, name, None, model);
        }
    }

    /// Stores the state of an object. Returns whether it changed for the mesh.
    fn keep(
        &mut self,
        kind: Kind,
        name: ObjectName,
        kept: Option<Kept>,
        model: &mut impl Model,
    ) -> bool {
        let objects = &mut self.kinds.entry(kind).or_default().current;
        let object = kept.as_ref().and_then(|kept| kept.object.clone());
        let before = match kept {
            Some(kept) => objects.insert(name.clone(), kept),
            None => objects.remove(&name),
        };
        let before = before.and_then(|before| before.object);
        if before == object {
            // The model has the former copy, and would keep a second one in memory.
            if let Some(kept) = objects.get_mut(&name) {
                kept.object = before;
            }
            return false;
        }
        if self.is_draft {
            return true;
        }
        // Daemons may be watched apart from the other pods.
        let tells_of_daemons = self.settings.daemons.is_some()
            && (kind == Kind::Daemon || !self.kinds.contains_key(&Kind::Daemon));
        let edit = model.edit();
        match (kind, object) {
            (_, Some(Object::Pod(pod))) => {
                if tells_of_daemons {
                    let is_ready = self.settings.has_daemon(&pod);
                    edit.daemon(&name, is_ready.then_some(pod.node.as_str()));
                }
                if kind == Kind::Pod {
                    model.pod(pod);
                }
            }
            (_, Some(Object::Service(service))) => model.service(service),
            (_, Some(Object::Slice(slice))) => edit.slice(slice),
            (_, Some(Object::Policy(_))) | (Kind::Policy(_), None) => self.policies_changed = true,
            (_, Some(Object::Namespace(membership))) => edit.namespace(&name.name, membership),
            (_, Some(Object::Node(node))) => edit.node(node),
            (_, Some(Object::ServiceNetworks(networks))) => {
                edit.service_networks(&name.name, networks);
            }
            (Kind::Pod | Kind::Daemon, None) => {
                if tells_of_daemons {
                    edit.daemon(&name, None);
                }
                if kind == Kind::Pod {
                    model.remove_pod(&name);
                }
            }
            (Kind::Service, None) => model.remove_service(&name),
            (Kind::Slice, None) => edit.remove_slice(&name),
            (Kind::Namespace, None) => edit.namespace(&name.name, None),
            (Kind::Node, None) => edit.remove_node(&name.name),
            (Kind::ServiceCidr, None) => edit.service_networks(&name.name, Arc::from([])),
        }
        true
    }

    /// Returns all policies, if they have changed.
    pub(super) fn policies(&mut self) -> Option<Vec<Arc<api::Object>>> {
        if !std::mem::take(&mut self.policies_changed) {
            return None;
        }
        let kept = self
            .kinds
            .values()
            .flat_map(|objects| objects.current.values());
        let policies = kept.filter_map(|kept| match &kept.object {
            Some(Object::Policy(policy)) => Some(policy.clone()),
            _ => None,
        });
        Some(policies.collect())
    }
}

impl Settings {
    /// Reports whether `pod` is a node daemon that serves its node's pods.
    fn has_daemon(&self, pod: &Workload) -> bool {
        self.daemons.as_ref() == Some(&pod.name.namespace)
            && pod
                .labels
                .get(NAME_LABEL)
                .is_some_and(|name| name == DAEMON_NAME)
            && pod.ready
            && !pod.terminating
            && !pod.finished
    }
}

/// Returns the state to store. An object that cannot be parsed keeps its last good state, unless it was recreated.
fn read(seen: Seen, known: &HashMap<ObjectName, Kept>) -> (ObjectName, Kept) {
    let Seen { name, uid, object } = seen;
    let before = known.get(&name).filter(|before| before.uid == uid);
    let before = before.and_then(|before| before.object.as_ref());
    let object = match object {
        Ok(object) => object.map(|object| manifest::keep_good_policy(object, before)),
        Err(error) => {
            tracing::error!(
                known = before.is_some(),
                "{error}; keeping its last good state"
            );
            before.cloned()
        }
    };
    (name, Kept { uid, object })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::{name as name_of, pod},
        *,
    };
    use auth_kubernetes::objects;
    use auth_mesh::{MeshDefault, Snapshot};

    fn seen(name: &str, uid: &str, address: &str) -> Seen {
        let read: objects::Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": uid},
            "spec": {"nodeName": "a", "serviceAccountName": "web", "containers": []},
            "status": {"podIP": address},
        }))
        .unwrap();
        Seen {
            name: name_of(&read),
            uid: uid.into(),
            object: pod(read, &"cluster.local".parse().unwrap()),
        }
    }

    /// A cluster, and the snapshot under construction.
    struct Tested {
        known: Known,
        edit: Edit,
    }

    impl Tested {
        fn take(&mut self, kind: Kind, event: Event) -> bool {
            self.known.take(kind, event, &mut self.edit)
        }
    }

    fn known() -> Tested {
        let mut known = Tested {
            edit: Edit::from(Snapshot::default()),
            known: Known::new(
                Settings {
                    trust_domain: "cluster.local".parse().unwrap(),
                    defaults: MeshDefault::default(),
                    services: true,
                    daemons: Some("auth-system".into()),
                    remote: None,
                },
                true,
            ),
        };
        for kind in Kind::OF_SERVICES
            .into_iter()
            .chain(POLICIES.map(Kind::Policy))
        {
            known.take(kind, Event::Init);
            known.take(kind, Event::InitDone);
        }
        known
    }

    fn pods(known: &mut Tested) -> Vec<String> {
        let snapshot = known.edit.snapshot();
        let pods = snapshot.workloads();
        pods.map(|pod| format!("{} {:?}", pod.name.name, pod.addresses))
            .collect()
    }

    fn take(known: &mut Tested, event: Event) -> bool {
        known.take(Kind::Pod, event)
    }

    #[test]
    fn nothing_counts_before_everything_was_read() {
        let mut known = known();
        assert!(!take(&mut known, Event::Init));
        assert!(!take(
            &mut known,
            Event::InitApply(seen("one", "1", "10.0.0.1"))
        ));
        assert!(!known.known.is_complete());
        assert!(take(&mut known, Event::InitDone));
        assert!(known.known.is_complete());
        assert_eq!(pods(&mut known), ["one [10.0.0.1]"]);
    }

    #[test]
    fn mirror_pods_and_pods_without_an_account_have_no_identity() {
        let mirror = json!({"kubernetes.io/config.mirror": "0123456789abcdef0123456789abcdef"});
        let (source, none) = (json!({"kubernetes.io/config.source": "file"}), json!({}));
        for (annotations, account, expected) in [
            (&none, json!("web"), 1),
            (&none, json!(null), 0),
            (&none, json!(""), 0),
            (&mirror, json!(null), 0),
            (&mirror, json!("web"), 0),
            (&source, json!("web"), 0),
        ] {
            let read: objects::Pod = serde_json::from_value(json!({
                "metadata": {
                    "name": "one", "namespace": "default", "uid": "1", "annotations": annotations,
                    "labels": {manifest::MESH_LABEL: "enabled"},
                },
                "spec": {"nodeName": "a", "serviceAccountName": account, "containers": []},
                "status": {"podIP": "10.0.0.1"},
            }))
            .unwrap();
            let mut known = known();
            let (name, uid) = (name_of(&read), "1".to_owned());
            let object = pod(read, &"cluster.local".parse().unwrap());
            take(&mut known, Event::Apply(Seen { name, uid, object }));
            let snapshot = known.edit.snapshot();
            let running = |account: &str| {
                let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
                snapshot.running("a", &identity.parse().unwrap()).count()
            };
            let found = running("web") + running("default");
            assert_eq!(found, expected, "{annotations} {account}");
        }
    }

    #[test]
    fn an_empty_cluster_is_complete_too() {
        let mut known = known();
        take(&mut known, Event::Init);
        assert!(take(&mut known, Event::InitDone), "worth publishing");
        assert!(known.known.is_complete());
    }

    #[test]
    fn a_list_that_is_read_again_loses_no_deletion_and_no_change() {
        let mut known = known();
        take(&mut known, Event::Init);
        for (name, address) in [("one", "10.0.0.1"), ("two", "10.0.0.2")] {
            take(&mut known, Event::InitApply(seen(name, name, address)));
        }
        take(&mut known, Event::InitDone);
        take(&mut known, Event::Init);
        assert_eq!(
            pods(&mut known).len(),
            2,
            "the old state holds until the list is whole"
        );
        take(&mut known, Event::InitApply(seen("two", "two", "10.0.0.2")));
        // The connection is lost, and a new list begins.
        take(&mut known, Event::Init);
        take(&mut known, Event::InitApply(seen("two", "two", "10.0.0.2")));
        assert!(take(&mut known, Event::InitDone));
        assert_eq!(pods(&mut known), ["two [10.0.0.2]"]);
    }

    #[test]
    fn an_object_that_a_list_repeats_is_in_memory_once() {
        let mut known = known();
        for _ in 0..2 {
            take(&mut known, Event::Init);
            take(&mut known, Event::InitApply(seen("one", "1", "10.0.0.1")));
            take(&mut known, Event::InitDone);
        }
        let snapshot = known.edit.snapshot();
        let in_force = snapshot.pod("10.0.0.1".parse().unwrap()).unwrap();
        let objects = &known.known.kinds[&Kind::Pod].current;
        let Some(Object::Pod(kept)) = objects.values().find_map(|kept| kept.object.as_ref()) else {
            panic!("no pod");
        };
        assert!(Arc::ptr_eq(in_force, kept));
    }

    #[test]
    fn an_empty_list_deletes_nothing_until_a_watch_does() {
        let mut known = known();
        take(&mut known, Event::Init);
        for (name, address) in [("one", "10.0.0.1"), ("two", "10.0.0.2")] {
            take(&mut known, Event::InitApply(seen(name, name, address)));
        }
        take(&mut known, Event::InitDone);
        take(&mut known, Event::Init);
        assert!(!take(&mut known, Event::InitDone));
        assert_eq!(pods(&mut known).len(), 2);
        assert_eq!(known.known.unconfirmed(), 2);
        let name = |name: &str| ObjectName {
            namespace: "default".into(),
            name: name.into(),
        };
        assert!(take(&mut known, Event::Delete(name("one"))));
        assert_eq!(pods(&mut known), ["two [10.0.0.2]"]);
        assert_eq!(known.known.unconfirmed(), 1);
        take(&mut known, Event::Init);
        take(
            &mut known,
            Event::InitApply(seen("three", "three", "10.0.0.3")),
        );
        assert!(take(&mut known, Event::InitDone));
        assert_eq!(pods(&mut known), ["three [10.0.0.3]"]);
        assert_eq!(known.known.unconfirmed(), 0);
    }

    #[test]
    fn changes_that_change_nothing_are_not_published() {
        let mut known = known();
        take(&mut known, Event::Init);
        take(&mut known, Event::InitDone);
        assert!(take(&mut known, Event::Apply(seen("one", "1", "10.0.0.1"))));
        assert!(!take(
            &mut known,
            Event::Apply(seen("one", "1", "10.0.0.1"))
        ));
        assert!(take(&mut known, Event::Apply(seen("two", "2", ""))));
        assert!(take(&mut known, Event::Apply(seen("two", "2", "10.0.0.2"))));
        let name = |name: &str| ObjectName {
            namespace: "default".into(),
            name: name.into(),
        };
        assert!(take(&mut known, Event::Delete(name("one"))));
        assert!(!take(&mut known, Event::Delete(name("one"))));
        assert_eq!(pods(&mut known), ["two [10.0.0.2]"]);
    }

    #[test]
    fn an_unreadable_object_keeps_its_last_good_state_unless_recreated() {
        let mut known = known();
        take(&mut known, Event::Init);
        take(&mut known, Event::InitDone);
        take(&mut known, Event::Apply(seen("one", "1", "10.0.0.1")));
        assert!(!take(
            &mut known,
            Event::Apply(seen("one", "1", "10.0.0.999"))
        ));
        assert_eq!(pods(&mut known), ["one [10.0.0.1]"]);
        assert!(take(
            &mut known,
            Event::Apply(seen("one", "2", "10.0.0.999"))
        ));
        assert!(pods(&mut known).is_empty());
    }

    #[test]
    fn a_slip_in_a_label_takes_no_pod_out_of_the_mesh() {
        let mut known = known();
        take(&mut known, Event::Init);
        take(&mut known, Event::InitDone);
        let read: objects::Pod = serde_json::from_value(json!({
            "metadata": {"name": "one", "namespace": "default", "labels": {manifest::MESH_LABEL: "of"}},
            "spec": {"serviceAccountName": "web"},
            "status": {"podIP": "10.0.0.1"},
        }))
        .unwrap();
        let seen = Seen {
            name: name_of(&read),
            uid: "1".into(),
            object: pod(read, &"cluster.local".parse().unwrap()),
        };
        assert!(take(&mut known, Event::Apply(seen)));
        assert_eq!(pods(&mut known), ["one [10.0.0.1]"]);
    }

    #[test]
    fn namespaces_and_daemons() {
        let mut known = known();
        take(&mut known, Event::Init);
        take(&mut known, Event::InitApply(seen("one", "1", "10.0.0.1")));
        take(&mut known, Event::InitDone);
        let namespace = |disabled: bool| {
            let membership = disabled.then_some(auth_mesh::Membership::Disabled);
            Event::Apply(Seen {
                name: ObjectName {
                    namespace: String::new(),
                    name: "default".into(),
                },
                uid: "n".into(),
                object: Ok(Some(Object::Namespace(membership))),
            })
        };
        assert!(known.take(Kind::Namespace, namespace(true)));
        assert!(pods(&mut known).is_empty());
        assert!(known.take(Kind::Namespace, namespace(false)));
        assert_eq!(pods(&mut known).len(), 1);

        let daemon = |ready: bool| {
            let read: objects::Pod = serde_json::from_value(json!({
                "metadata": {"name": "d", "namespace": "auth-system", "labels": {NAME_LABEL: DAEMON_NAME}},
                "spec": {"nodeName": "a", "hostNetwork": true},
                "status": {"conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]},
            }))
            .unwrap();
            Seen {
                name: name_of(&read),
                uid: "d".into(),
                object: pod(read, &"cluster.local".parse().unwrap()),
            }
        };
        let name = daemon(true).name;
        for (event, expected) in [
            (Event::Apply(daemon(false)), false),
            (Event::Apply(daemon(true)), true),
            (Event::Delete(name), false),
        ] {
            take(&mut known, event);
            assert_eq!(known.edit.snapshot().has_daemon("a"), expected);
        }
    }

    #[test]
    fn a_policy_that_cannot_be_read_keeps_its_last_good_version() {
        let mut known = known();
        let seen = |uid: &str, action: &str| {
            let document = json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "web", "namespace": "shop"}, "spec": {"action": action, "rules": [{}]},
            });
            let policy = api::Object::read(&document).unwrap();
            Event::Apply(Seen {
                name: policy.name().clone(),
                uid: uid.into(),
                object: Ok(Some(Object::Policy(Arc::new(policy)))),
            })
        };
        let kind = Kind::Policy(api::Kind::Authorization);
        assert!(known.take(kind, seen("1", "ALLOW")));
        assert_eq!(known.known.policies().unwrap().len(), 1);
        assert!(known.known.policies().is_none(), "told once");
        assert!(known.take(kind, seen("1", "ALOW")), "its error is news");
        let policies = known.known.policies().unwrap();
        assert!(matches!(*policies[0], api::Object::Authorization(_)));
        assert!(policies[0].error().is_some());
        assert!(
            known.take(kind, seen("2", "ALOW")),
            "another object of that name"
        );
        let policies = known.known.policies().unwrap();
        assert!(matches!(*policies[0], api::Object::Unreadable(_)));
    }
}
