//! One remote cluster: what is read of it, and whether it can be read.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use futures_util::{
    StreamExt,
    stream::{BoxStream, select_all},
};
use kube::{Api, Client, Resource, runtime::watcher};
use serde::de::DeserializeOwned;

use super::{
    super::{Event, Kind, Known, Seen, Settings, manifest, parsed, pod},
    usage::{Total, Usage},
};
use crate::{discovery::manifest::Object, observe::remote_clusters::RemoteStatus};
use auth_kubernetes::{WATCH_SECONDS, follow_or_fail, objects};
use auth_mesh::{ClusterName, Edit, ObjectName, TrustDomain};
use auth_tunnel::tls::{rfc3339, unix_seconds};

/// What is read of a remote cluster.
const KINDS: [Kind; 3] = [Kind::Namespace, Kind::Pod, Kind::Service];

/// What a remote cluster says.
pub(in crate::discovery::kubernetes) enum Update {
    Event(Kind, Event),
    /// Objects of this kind cannot be read.
    Failed(Kind, String),
}

impl Update {
    /// Reports whether more of a list follows. Nothing is known from it before its end.
    pub(super) fn is_listing(&self) -> bool {
        matches!(self, Self::Event(_, Event::Init | Event::InitApply(_)))
    }
}

/// A remote cluster.
pub(super) struct Cluster {
    pub(super) secret: String,
    pub(super) trust_domain: TrustDomain,
    /// The last one in the secret, usable or not.
    pub(super) kubeconfig: Option<Vec<u8>>,
    /// What is in force of it.
    pub(super) known: Known,
    /// The first reading that was of this cluster.
    generation: u64,
    /// What has been read by the last kubeconfig, until everything has been read once. Before, a namespace that leaves the mesh
    /// may be missing.
    draft: Option<Draft>,
    pub(super) health: Health,
}

/// What has been read of a cluster that is not in force yet.
struct Draft {
    known: Known,
    generation: u64,
}

/// Whether a remote cluster can be read.
#[derive(Default)]
pub(super) struct Health {
    refused: Option<String>,
    failures: BTreeMap<Kind, Failure>,
    since: Option<SystemTime>,
}

/// A kind could not be read the last time.
struct Failure {
    error: String,
    /// Whether it could be read the time before.
    is_first: bool,
}

impl Cluster {
    /// A cluster of which nothing is read yet. Its readings begin with `generation`.
    pub(super) fn new(settings: Settings, generation: u64) -> Self {
        Self {
            secret: String::new(),
            trust_domain: settings.trust_domain.clone(),
            kubeconfig: None,
            known: Known::of(settings, &KINDS),
            generation,
            draft: None,
            health: Health::default(),
        }
    }

    /// Begins to read the cluster by another kubeconfig. What is in force stays until everything has been read once.
    pub(super) fn read_anew(&mut self, generation: u64) {
        self.health = Health::default();
        for kind in KINDS {
            self.known.forget_listed(kind);
        }
        self.draft = Some(Draft {
            known: self.known.draft(),
            generation,
        });
    }

    /// Applies what the cluster `name` says. Returns whether the snapshot has changed.
    pub(super) fn take(&mut self, name: &ClusterName, update: Update, edit: &mut Edit) -> bool {
        let (kind, event) = match update {
            Update::Event(kind, event) => (kind, event),
            Update::Failed(kind, error) => {
                let draft = self.draft.as_mut().map(|draft| &mut draft.known);
                draft.unwrap_or(&mut self.known).forget_listed(kind);
                if self.health.fails(kind, &error) {
                    tracing::warn!(
                        cluster = %name, error, pods = self.known.count_of(Kind::Pod),
                        "remote cluster cannot be read; what is known of it stays in force"
                    );
                }
                return false;
            }
        };
        if matches!(event, Event::InitDone) && self.health.works(kind) {
            tracing::info!(cluster = %name, "remote cluster can be read again");
        }
        let Some(mut draft) = self.draft.take() else {
            let event = of_reading(event, self.generation);
            return self.known.take(kind, event, edit);
        };
        draft.known.take(kind, event, edit);
        if !draft.known.is_complete() {
            self.draft = Some(draft);
            return false;
        }
        self.put_in_force(name, draft, edit);
        tracing::info!(
            cluster = %name, pods = self.known.count_of(Kind::Pod), services = self.known.count_of(Kind::Service),
            "remote cluster is read"
        );
        true
    }

    /// Replaces what is in force. A kubeconfig with another token leads to the same cluster, and its pods are the same.
    fn put_in_force(&mut self, name: &ClusterName, mut draft: Draft, edit: &mut Edit) {
        let before = identity(name, &self.known);
        if before.is_none() || before != identity(name, &draft.known) {
            self.generation = draft.generation;
        }
        draft.known.set_generation(self.generation);
        self.known.replace(draft.known, edit);
    }

    /// Reports whether everything has been read once.
    pub(super) fn is_read(&self) -> bool {
        self.known.is_complete()
    }

    /// Reports whether it has been read once, or is not likely to be read soon.
    pub(super) fn is_settled(&self) -> bool {
        self.is_read() || self.health.is_lasting()
    }

    /// Returns why it cannot be read, if it cannot.
    pub(super) fn error(&self) -> Option<&String> {
        self.health.error()
    }

    pub(super) fn status(&self, name: &ClusterName) -> RemoteStatus {
        let health = &self.health;
        RemoteStatus {
            name: name.to_string(),
            generation: self.generation,
            secret: self.secret.clone(),
            trust_domain: self.trust_domain.to_string(),
            pods: self.known.count_of(Kind::Pod),
            services: self.known.count_of(Kind::Service),
            error: health.error().cloned(),
            since: health.since.map(|since| rfc3339(unix_seconds(since))),
        }
    }
}

impl Health {
    fn error(&self) -> Option<&String> {
        let first = || Some(&self.failures.values().next()?.error);
        self.refused.as_ref().or_else(first)
    }

    /// Reports whether the cluster cannot be read, probably for some time. After a single failure, the next attempt, a second
    /// later, may well succeed.
    fn is_lasting(&self) -> bool {
        let mut failures = self.failures.values();
        self.refused.is_some() || failures.any(|failure| !failure.is_first)
    }

    pub(super) fn refused(&mut self, why: String) {
        self.refused = Some(why);
        self.since.get_or_insert_with(SystemTime::now);
    }

    /// Notes that a kind cannot be read. Returns whether everything could before.
    fn fails(&mut self, kind: Kind, error: &str) -> bool {
        let worked = self.failures.is_empty();
        let failure = Failure {
            error: error.to_owned(),
            is_first: !self.failures.contains_key(&kind),
        };
        self.failures.insert(kind, failure);
        self.since.get_or_insert_with(SystemTime::now);
        worked
    }

    /// Notes that a kind has been read. Returns whether everything can be read now that could not before.
    fn works(&mut self, kind: Kind) -> bool {
        let is_last = self.failures.remove(&kind).is_some() && self.failures.is_empty();
        if is_last && self.refused.is_none() {
            self.since = None;
        }
        is_last
    }
}

/// Returns what distinguishes a cluster from all others: the UID of a namespace that each has, and that is never deleted.
fn identity<'a>(cluster: &ClusterName, known: &'a Known) -> Option<&'a str> {
    let namespace = ObjectName {
        namespace: String::new(),
        name: cluster.qualify("kube-system"),
    };
    known.uid_of(Kind::Namespace, &namespace)
}

/// Watches a remote cluster.
pub(super) fn watch(
    client: &Client,
    cluster: &ClusterName,
    trust_domain: &TrustDomain,
) -> BoxStream<'static, Update> {
    let [pods, services] = [0; 2].map(|_| trust_domain.clone());
    let total = Total::default();
    let usage = |kind| Usage::new(kind, &total);
    let watches = [
        updates(
            Api::all(client.clone()),
            (Kind::Namespace, usage(Kind::Namespace)),
            cluster,
            |read: objects::Namespace| manifest::namespace(&read),
        ),
        updates(
            Api::all(client.clone()),
            (Kind::Pod, usage(Kind::Pod)),
            cluster,
            move |read: objects::Pod| pod(read, &pods),
        ),
        updates(
            Api::all(client.clone()),
            (Kind::Service, usage(Kind::Service)),
            cluster,
            move |read: objects::Service| manifest::service(read, &services),
        ),
    ];
    select_all(watches).boxed()
}

fn updates<K>(
    api: Api<K>,
    (kind, mut usage): (Kind, Usage),
    cluster: &ClusterName,
    parse: impl Fn(K) -> Result<Option<Object>, String> + Send + 'static,
) -> BoxStream<'static, Update>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let cluster = cluster.clone();
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let read = move |event| {
        let event = of_cluster(&cluster, kind, parsed(event, &parse));
        usage.take(&event)?;
        Ok(event)
    };
    follow_or_fail(api, config, read)
        .map(move |event| match event {
            Ok(event) => Update::Event(kind, event),
            Err(error) => Update::Failed(kind, error),
        })
        .boxed()
}

/// Returns what an event of `cluster` says, as the snapshot names its objects.
fn of_cluster(cluster: &ClusterName, kind: Kind, event: Event) -> Event {
    let qualified = |mut name: ObjectName| {
        let part = match kind {
            Kind::Namespace => &mut name.name,
            _ => &mut name.namespace,
        };
        *part = cluster.qualify(part);
        name
    };
    let seen = |seen: Seen| Seen {
        name: qualified(seen.name),
        object: seen.object.map(|object| {
            object.map(|object| match object {
                Object::Pod(pod) => {
                    let mut pod = cluster.pod(Arc::unwrap_or_clone(pod));
                    // Each has an entry in the kernel's map of the mesh's addresses, which others must not fill.
                    manifest::keep_one_of_each_family(&mut pod.addresses);
                    Object::Pod(pod.into())
                }
                Object::Service(service) => {
                    Object::Service(cluster.service(Arc::unwrap_or_clone(service)).into())
                }
                other => other,
            })
        }),
        ..seen
    };
    match event {
        Event::Apply(object) => Event::Apply(seen(object)),
        Event::Delete(name) => Event::Delete(qualified(name)),
        Event::Init => Event::Init,
        Event::InitApply(object) => Event::InitApply(seen(object)),
        Event::InitDone => Event::InitDone,
    }
}

/// Sets the reading that the pod in an event belongs to.
fn of_reading(mut event: Event, generation: u64) -> Event {
    if let Event::Apply(seen) | Event::InitApply(seen) = &mut event
        && let Ok(Some(Object::Pod(pod))) = &mut seen.object
    {
        Arc::make_mut(pod).generation = generation;
    }
    event
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Membership, MeshDefault, Snapshot, Workload};

    use super::*;

    fn east() -> ClusterName {
        "east".parse().unwrap()
    }

    /// A cluster of which the first reading has begun.
    fn cluster() -> Cluster {
        let settings = Settings {
            trust_domain: "east.example".parse().unwrap(),
            defaults: MeshDefault::default(),
            services: true,
            daemons: None,
            remote: None,
        };
        let mut cluster = Cluster::new(settings, 1);
        cluster.read_anew(1);
        cluster
    }

    fn pod(name: &str, address: &str) -> Event {
        let name = ObjectName {
            namespace: "shop".into(),
            name: name.into(),
        };
        let identity = "spiffe://east.example/ns/shop/sa/web".parse().unwrap();
        let pod = Workload {
            addresses: vec![address.parse().unwrap()],
            node: "a".into(),
            ..Workload::new(name.clone(), identity)
        };
        Event::InitApply(Seen {
            name,
            uid: address.into(),
            object: Ok(Some(Object::Pod(pod.into()))),
        })
    }

    fn namespace(membership: Membership) -> Event {
        Event::InitApply(Seen {
            name: ObjectName {
                namespace: String::new(),
                name: "shop".into(),
            },
            uid: "n".into(),
            object: Ok(Some(Object::Namespace(Some(membership)))),
        })
    }

    /// Passes on a cluster's events, all of one kind. Returns whether the snapshot has changed.
    fn tell(cluster: &mut Cluster, edit: &mut Edit, kind: Kind, events: Vec<Event>) -> bool {
        let mut has_changed = false;
        for event in events {
            let event = of_cluster(&east(), kind, event);
            has_changed |= cluster.take(&east(), Update::Event(kind, event), edit);
        }
        has_changed
    }

    fn pods(edit: &mut Edit) -> Vec<String> {
        let snapshot = edit.snapshot();
        let pods = snapshot.workloads();
        pods.map(|pod| format!("{} {}", pod.name, pod.node))
            .collect()
    }

    #[test]
    fn a_cluster_counts_once_everything_was_read() {
        use Event::{Init, InitDone};
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        let of_pods = |address| vec![Init, pod("web-0", address), InitDone];
        assert!(!tell(
            &mut cluster,
            &mut edit,
            Kind::Pod,
            vec![Init, pod("old", "10.2.0.9")]
        ));
        assert!(!tell(
            &mut cluster,
            &mut edit,
            Kind::Pod,
            of_pods("10.2.0.1")
        ));
        assert!(!tell(
            &mut cluster,
            &mut edit,
            Kind::Service,
            vec![Init, InitDone]
        ));
        assert_eq!(
            pods(&mut edit),
            [""; 0],
            "the namespace may be outside the mesh"
        );
        let namespaces = vec![Init, namespace(Membership::Enabled), InitDone];
        assert!(tell(&mut cluster, &mut edit, Kind::Namespace, namespaces));
        assert_eq!(pods(&mut edit), ["shop@east/web-0 a@east"]);
        // From here on, each change counts.
        assert!(tell(
            &mut cluster,
            &mut edit,
            Kind::Pod,
            of_pods("10.2.0.2")
        ));
        let status = cluster.status(&east());
        assert_eq!((status.pods, status.services, status.error), (1, 0, None));
        cluster.known.clear(&mut edit);
        assert_eq!(edit.snapshot().addresses().count(), 0);
        assert_eq!(pods(&mut edit), [""; 0]);
    }

    #[test]
    fn what_changes_before_everything_was_read_is_kept_once() {
        use Event::{Apply, Delete, Init, InitDone};
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        for kind in [Kind::Pod, Kind::Service] {
            tell(&mut cluster, &mut edit, kind, vec![Init, InitDone]);
        }
        let seen = |name: &str, last: u8| match pod(name, &format!("10.2.0.{last}")) {
            Event::InitApply(seen) => seen,
            _ => unreachable!(),
        };
        // The cluster's namespaces may never be readable, while its pods change forever.
        for round in 0..=u8::MAX {
            let gone = seen(&format!("gone-{round}"), 1);
            let name = gone.name.clone();
            let events = vec![Apply(seen("web-0", round)), Apply(gone), Delete(name)];
            assert!(!tell(&mut cluster, &mut edit, Kind::Pod, events));
        }
        let draft = &cluster.draft.as_ref().unwrap().known;
        assert_eq!((draft.count(), pods(&mut edit)), (1, Vec::new()));
        // A list that is in progress when the last kind is read ends later.
        tell(
            &mut cluster,
            &mut edit,
            Kind::Pod,
            vec![Init, pod("web-1", "10.2.0.7")],
        );
        let namespaces = vec![Init, namespace(Membership::Enabled), InitDone];
        assert!(tell(&mut cluster, &mut edit, Kind::Namespace, namespaces));
        assert_eq!(pods(&mut edit), ["shop@east/web-0 a@east"]);
        let snapshot = edit.snapshot();
        let addresses = snapshot.addresses().map(|(address, _)| address.to_string());
        assert_eq!(addresses.collect::<Vec<_>>(), ["10.2.0.255"]);
        assert!(tell(&mut cluster, &mut edit, Kind::Pod, vec![InitDone]));
        assert_eq!(pods(&mut edit), ["shop@east/web-1 a@east"]);
    }

    #[test]
    fn nothing_is_kept_of_a_list_that_failed_or_is_of_a_former_kubeconfig() {
        use Event::{Init, InitDone};
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        let begin = |cluster: &mut Cluster, edit: &mut Edit| {
            let events = vec![Init, pod("web-0", "10.2.0.1")];
            tell(cluster, edit, Kind::Pod, events);
        };
        let fail = |cluster: &mut Cluster, edit: &mut Edit| {
            let failed = Update::Failed(Kind::Pod, "too many".into());
            cluster.take(&east(), failed, edit);
        };
        begin(&mut cluster, &mut edit);
        fail(&mut cluster, &mut edit);
        for kind in KINDS {
            // An end without a beginning shows what was kept.
            tell(&mut cluster, &mut edit, kind, vec![InitDone]);
        }
        assert!(cluster.is_read());
        assert_eq!(cluster.known.count_of(Kind::Pod), 0);
        begin(&mut cluster, &mut edit);
        fail(&mut cluster, &mut edit);
        tell(&mut cluster, &mut edit, Kind::Pod, vec![InitDone]);
        assert_eq!(cluster.known.count_of(Kind::Pod), 0);
        begin(&mut cluster, &mut edit);
        cluster.read_anew(2);
        cluster.draft = None;
        tell(&mut cluster, &mut edit, Kind::Pod, vec![InitDone]);
        assert_eq!(cluster.known.count_of(Kind::Pod), 0);
    }

    #[test]
    fn another_kubeconfig_is_of_another_cluster_unless_its_system_namespace_is_the_same() {
        use Event::{Init, InitApply, InitDone};
        let system = |uid: &str| {
            InitApply(Seen {
                name: ObjectName {
                    namespace: String::new(),
                    name: "kube-system".into(),
                },
                uid: uid.into(),
                object: Ok(None),
            })
        };
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        let read = |cluster: &mut Cluster, edit: &mut Edit, uid: &str, address: &str| {
            for (kind, events) in [
                (Kind::Namespace, vec![Init, system(uid), InitDone]),
                (Kind::Service, vec![Init, InitDone]),
                (Kind::Pod, vec![Init, pod("web-0", address), InitDone]),
            ] {
                tell(cluster, edit, kind, events);
            }
            let pod = edit.snapshot().pod(address.parse().unwrap()).cloned();
            (
                cluster.status(&east()).generation,
                pod.map(|pod| pod.generation),
            )
        };
        let first = read(&mut cluster, &mut edit, "a", "10.2.0.1");
        assert_eq!(first, (1, Some(1)));
        let in_force = |edit: &mut Edit| {
            let pod = edit.snapshot().pod("10.2.0.1".parse().unwrap()).cloned();
            pod.unwrap()
        };
        let before = in_force(&mut edit);
        // Another token.
        cluster.read_anew(2);
        assert_eq!(pods(&mut edit).len(), 1, "what is known holds until then");
        let same = read(&mut cluster, &mut edit, "a", "10.2.0.1");
        assert_eq!(same, (1, Some(1)));
        let again = vec![Init, pod("web-0", "10.2.0.1"), InitDone];
        assert!(!tell(&mut cluster, &mut edit, Kind::Pod, again));
        assert!(
            Arc::ptr_eq(&before, &in_force(&mut edit)),
            "the pod is not applied again"
        );
        for (generation, uid) in [(3, "b"), (4, ""), (5, "")] {
            cluster.read_anew(generation);
            let address = format!("10.3.0.{generation}");
            let other = read(&mut cluster, &mut edit, uid, &address);
            assert_eq!(other, (generation, Some(generation)), "{uid:?}");
            let addresses = edit.snapshot().addresses().count();
            assert_eq!(addresses, 1, "nothing of the former cluster is left");
        }
    }

    #[test]
    fn a_pod_has_one_address_of_each_family() {
        let Event::InitApply(mut seen) = pod("web-0", "10.2.0.1") else {
            unreachable!()
        };
        let Ok(Some(Object::Pod(workload))) = &mut seen.object else {
            unreachable!()
        };
        let all = ["10.2.0.1", "10.2.0.2", "fd00::1", "10.2.0.3", "fd00::2"];
        let all = all.map(|address| address.parse().unwrap()).into_iter();
        let more = (0..=u8::MAX).map(|last| [10, 3, 0, last].into());
        Arc::make_mut(workload).addresses = all.chain(more).collect();
        let Event::Apply(seen) = of_cluster(&east(), Kind::Pod, Event::Apply(seen)) else {
            unreachable!()
        };
        let Ok(Some(Object::Pod(workload))) = seen.object else {
            unreachable!()
        };
        let left = workload.addresses.iter().map(ToString::to_string);
        assert_eq!(left.collect::<Vec<_>>(), ["10.2.0.1", "fd00::1"]);
        assert!(workload.addresses.capacity() < 10);
    }

    #[test]
    fn a_single_failure_does_not_settle_a_cluster() {
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        let mut fail = |cluster: &mut Cluster, kind| {
            let failed = Update::Failed(kind, "connection reset".into());
            cluster.take(&east(), failed, &mut edit);
            assert!(cluster.error().is_some());
            cluster.is_settled()
        };
        assert!(!fail(&mut cluster, Kind::Pod));
        assert!(!fail(&mut cluster, Kind::Service), "the first of its kind");
        cluster.health.works(Kind::Pod);
        assert!(!fail(&mut cluster, Kind::Pod), "not in a row");
        assert!(fail(&mut cluster, Kind::Pod));
        cluster.read_anew(2);
        assert!(!cluster.is_settled());
        cluster.health.refused("exec".into());
        assert!(cluster.is_settled(), "the kubeconfig cannot be used");
    }

    #[test]
    fn a_cluster_is_readable_again_once_each_kind_is() {
        let (mut cluster, mut edit) = (cluster(), Edit::from(Snapshot::default()));
        let whole = || vec![Event::Init, Event::InitDone];
        assert!(!cluster.is_settled());
        let refused = Update::Failed(Kind::Pod, "forbidden".into());
        cluster.take(&east(), refused, &mut edit);
        assert!(!cluster.is_read());
        for kind in KINDS {
            assert!(!cluster.is_read());
            tell(&mut cluster, &mut edit, kind, whole());
        }
        assert!(cluster.is_settled() && cluster.is_read());
        for kind in [Kind::Pod, Kind::Service] {
            let lost = Update::Failed(kind, "no route".into());
            assert!(!cluster.take(&east(), lost, &mut edit));
        }
        let is_lost = |cluster: &Cluster| {
            let status = cluster.status(&east());
            assert_eq!(status.error.is_some(), status.since.is_some());
            status.error.is_some()
        };
        tell(&mut cluster, &mut edit, Kind::Pod, whole());
        assert!(is_lost(&cluster), "services cannot be read");
        tell(&mut cluster, &mut edit, Kind::Service, vec![Event::Init]);
        assert!(is_lost(&cluster), "the list may still fail");
        tell(
            &mut cluster,
            &mut edit,
            Kind::Service,
            vec![Event::InitDone],
        );
        assert!(!is_lost(&cluster));
        cluster.health.refused("exec".into());
        assert!(is_lost(&cluster));
    }
}
