//! Discovery from the cluster's API: watches objects, and goes on with what is known while the API is away.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream::select_all};
use k8s_openapi::api::core::v1;
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{WatchStreamExt, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::manifest::{self, Object};
use crate::{
    kubernetes::with_causes,
    mesh::{Inventory, ObjectName, Registry, Snapshot, TrustDomain},
};

/// How long to wait for more changes after the first.
const SETTLE: Duration = Duration::from_millis(50);

/// Watches the cluster into `registry`, for ever. `synced` becomes true once everything has been read for the first
/// time; until then the registry stays as it is.
pub async fn run(
    client: Client,
    trust_domain: TrustDomain,
    registry: Arc<Registry>,
    synced: watch::Sender<bool>,
) {
    let pods = watched::<v1::Pod>(client, Kind::Pod, move |pod| {
        manifest::pod(pod, &trust_domain)
    });
    let mut events = select_all([pods]);
    let mut known = Known::new([Kind::Pod]);
    let mut publish_at = None;
    loop {
        tokio::select! {
            event = events.next() => {
                let Some((kind, event)) = event else { return };
                if known.take(kind, event) && known.is_complete() {
                    publish_at.get_or_insert_with(|| Instant::now() + SETTLE);
                }
            }
            () = sleep_until(publish_at.unwrap_or_else(Instant::now)), if publish_at.is_some() => {
                publish_at = None;
                publish(known.inventory(), &registry);
                synced.send_if_modified(|synced| !std::mem::replace(synced, true));
            }
        }
    }
}

fn publish(inventory: Inventory, registry: &Registry) {
    let (pods, services) = (inventory.workloads.len(), inventory.services.len());
    let snapshot = Snapshot::new(inventory);
    for fault in snapshot.faults() {
        tracing::error!("{fault}");
    }
    tracing::debug!(pods, services, "objects of the cluster read");
    registry.publish(snapshot);
}

/// What is watched. Each kind is read on its own, and all of them before the first snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Pod,
}

/// An event of any kind.
enum Event {
    Apply(Seen),
    Delete(ObjectName),
    /// Everything comes anew, as `InitApply`, until `InitDone`.
    Init,
    InitApply(Seen),
    InitDone,
}

struct Seen {
    name: ObjectName,
    uid: String,
    /// What it is to the mesh, or why that cannot be told.
    object: Result<Option<Object>, String>,
}

fn watched<K>(
    client: Client,
    kind: Kind,
    parse: impl Fn(K) -> Result<Option<Object>, String> + Send + 'static,
) -> Pin<Box<dyn Stream<Item = (Kind, Event)> + Send>>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let seen = move |object: K| Seen {
        name: name(&object),
        uid: object.uid().unwrap_or_default(),
        object: parse(object),
    };
    watcher(Api::<K>::all(client), watcher::Config::default())
        .default_backoff()
        .filter_map(move |event| {
            let event = match event {
                Ok(watcher::Event::Apply(object)) => Some(Event::Apply(seen(object))),
                Ok(watcher::Event::Delete(object)) => Some(Event::Delete(name(&object))),
                Ok(watcher::Event::Init) => Some(Event::Init),
                Ok(watcher::Event::InitApply(object)) => Some(Event::InitApply(seen(object))),
                Ok(watcher::Event::InitDone) => Some(Event::InitDone),
                Err(error) => {
                    tracing::error!(
                        ?kind, error = %with_causes(&error),
                        "cannot watch the cluster's objects; going on with what is known"
                    );
                    None
                }
            };
            std::future::ready(event.map(|event| (kind, event)))
        })
        .boxed()
}

fn name(object: &impl Resource) -> ObjectName {
    ObjectName {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

/// All that is known of the cluster.
struct Known {
    kinds: BTreeMap<Kind, Objects>,
}

/// The objects of one kind.
#[derive(Default)]
struct Objects {
    current: BTreeMap<ObjectName, Kept>,
    /// What a list that is under way has brought so far.
    listed: Option<BTreeMap<ObjectName, Kept>>,
    complete: bool,
}

/// An object as last understood.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    uid: String,
    /// `None`: no part of the mesh.
    object: Option<Object>,
}

impl Known {
    fn new(kinds: impl IntoIterator<Item = Kind>) -> Self {
        Self {
            kinds: kinds
                .into_iter()
                .map(|kind| (kind, Objects::default()))
                .collect(),
        }
    }

    /// Whether each kind has been read to its end once.
    fn is_complete(&self) -> bool {
        self.kinds.values().all(|objects| objects.complete)
    }

    /// Takes an event; tells whether that changed anything.
    fn take(&mut self, kind: Kind, event: Event) -> bool {
        let objects = self.kinds.entry(kind).or_default();
        match event {
            Event::Apply(seen) => {
                let before = objects.current.get(&seen.name);
                let (name, kept) = read(seen, before);
                match objects.current.entry(name) {
                    Entry::Occupied(known) if *known.get() == kept => false,
                    Entry::Occupied(mut known) => {
                        known.insert(kept);
                        true
                    }
                    Entry::Vacant(free) => free.insert(kept).object.is_some(),
                }
            }
            Event::Delete(name) => objects
                .current
                .remove(&name)
                .is_some_and(|kept| kept.object.is_some()),
            Event::Init => {
                objects.listed = Some(BTreeMap::new());
                false
            }
            Event::InitApply(seen) => {
                let before = objects.current.get(&seen.name);
                let (name, kept) = read(seen, before);
                objects.listed.get_or_insert_default().insert(name, kept);
                false
            }
            // What the list does not have was deleted while nobody watched.
            Event::InitDone => {
                let listed = objects.listed.take().unwrap_or_default();
                let first = !std::mem::replace(&mut objects.complete, true);
                let changed = listed != objects.current;
                objects.current = listed;
                changed || first
            }
        }
    }

    fn inventory(&self) -> Inventory {
        let mut inventory = Inventory::default();
        let kept = self
            .kinds
            .values()
            .flat_map(|objects| objects.current.values());
        for object in kept.filter_map(|kept| kept.object.clone()) {
            match object {
                Object::Pod(pod) => inventory.workloads.push(*pod),
                Object::Service(service) => inventory.services.push(*service),
            }
        }
        inventory
    }
}

/// An object that cannot be understood keeps its last good state, unless it was made anew.
fn read(seen: Seen, before: Option<&Kept>) -> (ObjectName, Kept) {
    let Seen { name, uid, object } = seen;
    let object = object.unwrap_or_else(|error| {
        let before = before.filter(|before| before.uid == uid);
        tracing::error!(
            known = before.is_some(),
            "{error}; going on with what is known of it"
        );
        before.and_then(|before| before.object.clone())
    });
    (name, Kept { uid, object })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn seen(name: &str, uid: &str, address: &str) -> Seen {
        let pod: v1::Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "uid": uid},
            "spec": {"nodeName": "a", "containers": []},
            "status": {"podIP": address},
        }))
        .unwrap();
        Seen {
            name: super::name(&pod),
            uid: uid.into(),
            object: manifest::pod(pod, &"cluster.local".parse().unwrap()),
        }
    }

    fn known() -> Known {
        Known::new([Kind::Pod])
    }

    fn pods(known: &Known) -> Vec<String> {
        let inventory = known.inventory();
        let pods = inventory.workloads.iter();
        pods.map(|pod| format!("{} {}", pod.name.name, pod.addresses[0]))
            .collect()
    }

    fn take(known: &mut Known, event: Event) -> bool {
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
        assert!(!known.is_complete());
        assert!(take(&mut known, Event::InitDone));
        assert!(known.is_complete());
        assert_eq!(pods(&known), ["one 10.0.0.1"]);
    }

    #[test]
    fn an_empty_cluster_is_complete_too() {
        let mut known = known();
        take(&mut known, Event::Init);
        assert!(take(&mut known, Event::InitDone), "worth publishing");
        assert!(known.is_complete());
    }

    #[test]
    fn a_list_that_is_read_anew_loses_no_deletion_and_nothing_meanwhile() {
        let mut known = known();
        take(&mut known, Event::Init);
        for (name, address) in [("one", "10.0.0.1"), ("two", "10.0.0.2")] {
            take(&mut known, Event::InitApply(seen(name, name, address)));
        }
        take(&mut known, Event::InitDone);
        take(&mut known, Event::Init);
        assert_eq!(
            pods(&known).len(),
            2,
            "the old state holds until the list is whole"
        );
        take(&mut known, Event::InitApply(seen("two", "two", "10.0.0.2")));
        // The connection broke: the list begins again.
        take(&mut known, Event::Init);
        take(&mut known, Event::InitApply(seen("two", "two", "10.0.0.2")));
        assert!(take(&mut known, Event::InitDone));
        assert_eq!(pods(&known), ["two 10.0.0.2"]);
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
        // Without an address it is no part of the mesh yet.
        assert!(!take(&mut known, Event::Apply(seen("two", "2", ""))));
        assert!(take(&mut known, Event::Apply(seen("two", "2", "10.0.0.2"))));
        let name = |name: &str| ObjectName {
            namespace: "default".into(),
            name: name.into(),
        };
        assert!(take(&mut known, Event::Delete(name("one"))));
        assert!(!take(&mut known, Event::Delete(name("one"))));
        assert_eq!(pods(&known), ["two 10.0.0.2"]);
    }

    #[test]
    fn what_cannot_be_understood_keeps_its_last_good_state_unless_made_anew() {
        let mut known = known();
        take(&mut known, Event::Init);
        take(&mut known, Event::InitDone);
        take(&mut known, Event::Apply(seen("one", "1", "10.0.0.1")));
        assert!(!take(
            &mut known,
            Event::Apply(seen("one", "1", "10.0.0.999"))
        ));
        assert_eq!(pods(&known), ["one 10.0.0.1"]);
        assert!(take(
            &mut known,
            Event::Apply(seen("one", "2", "10.0.0.999"))
        ));
        assert!(pods(&known).is_empty());
    }
}
