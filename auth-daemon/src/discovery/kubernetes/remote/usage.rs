//! How much is kept of the objects of a remote cluster, whose API server others choose, and the limits.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use super::super::{Event, Kind, Seen};
use crate::discovery::manifest::Object;
use auth_mesh::{ObjectName, TargetPort};

/// Maximum number of objects of one kind.
const MAX_OBJECTS: usize = 100_000;
/// Maximum size of all objects of a cluster in memory, in bytes: some 45,000 pods with ten labels each.
const MAX_BYTES: usize = 128 << 20;
/// Size of an object without its texts, and of a text without its characters, in bytes; roughly.
const OBJECT: usize = 512;
const TEXT: usize = 64;

/// The size of all objects of a cluster in bytes.
#[derive(Clone, Default)]
pub(super) struct Total(Arc<AtomicUsize>);

/// What is kept of the objects of one kind.
pub(super) struct Usage {
    kind: Kind,
    names: RandomState,
    current: Sizes,
    /// What a list in progress has had so far.
    listed: Option<Sizes>,
    /// What this kind adds to the total: the larger of the two, so that neither all that is current nor all that is listed
    /// exceeds the limit.
    counted: usize,
    total: Total,
}

/// The size of each object in bytes, by the hash of its name.
#[derive(Default)]
struct Sizes {
    by_name: HashMap<u64, usize>,
    bytes: usize,
}

impl Usage {
    /// Counts nothing yet of a kind of the cluster that `total` is of.
    pub(super) fn new(kind: Kind, total: &Total) -> Self {
        Self {
            kind,
            names: RandomState::new(),
            current: Sizes::default(),
            listed: None,
            counted: 0,
            total: total.clone(),
        }
    }

    /// Counts an event. Fails if there would be too much. Then the event must not be applied, nothing that was listed may be
    /// kept, and the next event is of a new list.
    pub(super) fn take(&mut self, event: &Event) -> Result<(), String> {
        let mut before = None;
        match event {
            Event::Init => self.listed = Some(Sizes::default()),
            Event::InitApply(seen) => {
                let (name, size) = self.measure(seen);
                self.listed.get_or_insert_default().set(name, size);
            }
            Event::InitDone => {
                let listed = self.listed.take().unwrap_or_default();
                // An empty list deletes nothing.
                if !listed.by_name.is_empty() {
                    self.current = listed;
                }
            }
            Event::Apply(seen) => {
                let (name, size) = self.measure(seen);
                before = Some((name, self.current.set(name, size)));
            }
            Event::Delete(name) => {
                let name = self.hash(name);
                self.current.remove(name);
            }
        }
        let fits = self.check();
        if fits.is_err() {
            self.listed = None;
            if let Some((name, size)) = before {
                self.current.restore(name, size);
            }
            self.count();
        }
        fits
    }

    fn check(&mut self) -> Result<(), String> {
        let bytes = self.count();
        let sizes = self.listed.as_ref().unwrap_or(&self.current);
        if sizes.by_name.len() > MAX_OBJECTS {
            let kind = self.kind.plural();
            return Err(format!(
                "it has more than {MAX_OBJECTS} {kind}, the limit of a remote cluster"
            ));
        }
        if bytes > MAX_BYTES {
            let limit = MAX_BYTES >> 20;
            return Err(format!(
                "its objects take more than {limit} MiB of memory, the limit of a remote cluster"
            ));
        }
        Ok(())
    }

    /// Brings the total up to date. Returns it.
    fn count(&mut self) -> usize {
        let listed = self.listed.as_ref().map_or(0, |listed| listed.bytes);
        let now = self.current.bytes.max(listed);
        let before = std::mem::replace(&mut self.counted, now);
        let Total(total) = &self.total;
        total.fetch_add(now, Relaxed);
        total.fetch_sub(before, Relaxed) - before
    }

    /// Returns the hash of an object's name, and the object's size. One that cannot be read keeps the state that it had.
    fn measure(&self, seen: &Seen) -> (u64, usize) {
        let name = self.hash(&seen.name);
        let size = match &seen.object {
            Ok(object) => size(seen, object.as_ref()),
            Err(_) => {
                let before = self.current.by_name.get(&name).copied();
                before.unwrap_or_default().max(size(seen, None))
            }
        };
        (name, size)
    }

    fn hash(&self, name: &ObjectName) -> u64 {
        self.names.hash_one(name)
    }
}

impl Sizes {
    /// Sets the size of an object. Returns its previous size.
    fn set(&mut self, name: u64, size: usize) -> Option<usize> {
        let before = self.remove(name);
        self.by_name.insert(name, size);
        self.bytes += size;
        before
    }

    fn remove(&mut self, name: u64) -> Option<usize> {
        let before = self.by_name.remove(&name);
        self.bytes -= before.unwrap_or_default();
        before
    }

    /// Restores the previous size of an object.
    fn restore(&mut self, name: u64, before: Option<usize>) {
        match before {
            Some(size) => self.set(name, size),
            None => self.remove(name),
        };
    }
}

/// Returns roughly what an object takes in memory, in bytes.
fn size(seen: &Seen, object: Option<&Object>) -> usize {
    let text = |text: &str| TEXT + text.len();
    // The object has them, too.
    let names = [&seen.name.namespace, &seen.name.name, &seen.uid];
    let named: usize = names.map(|name| text(name) + name.len()).iter().sum();
    let of_kind = match object {
        Some(Object::Pod(pod)) => {
            let labels = pod
                .labels
                .iter()
                .map(|(key, value)| text(key) + text(value));
            let ports = pod.named_ports.keys().map(|name| text(name));
            let addresses = pod.addresses.iter().map(|_| TEXT);
            let texts = text(&pod.node) + text(pod.identity.as_str());
            texts + labels.chain(ports).chain(addresses).sum::<usize>()
        }
        Some(Object::Service(service)) => {
            let selector = service.selector.iter();
            let selector = selector.map(|(key, value)| text(key) + text(value));
            let ports = service.ports.iter().map(|port| {
                let target = match &port.target {
                    TargetPort::Name(name) => text(name),
                    TargetPort::Number(_) => 0,
                };
                2 * TEXT + text(&port.name) + target
            });
            let identities = service.pinned_identities.iter().flatten();
            let identities = identities.map(|identity| text(identity.as_str()));
            selector.chain(ports).chain(identities).sum()
        }
        _ => 0,
    };
    OBJECT + named + of_kind
}

#[cfg(test)]
mod tests {
    use auth_mesh::{Port, Service, Workload};

    use super::*;

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "shop@east".into(),
            name: name.into(),
        }
    }

    /// A pod with a label of this length.
    fn pod(pod: &str, label: usize) -> Seen {
        let identity = "spiffe://east.example/ns/shop/sa/web".parse().unwrap();
        let workload = Workload {
            labels: [("app".to_owned(), "x".repeat(label))].into(),
            ..Workload::new(name(pod), identity)
        };
        Seen {
            name: name(pod),
            uid: pod.into(),
            object: Ok(Some(Object::Pod(workload.into()))),
        }
    }

    fn unreadable(name: &str) -> Seen {
        Seen {
            object: Err("no address".into()),
            ..pod(name, 0)
        }
    }

    #[test]
    fn a_list_of_too_many_objects_is_refused() {
        let mut usage = Usage::new(Kind::Pod, &Total::default());
        usage.take(&Event::Init).unwrap();
        for number in 0..MAX_OBJECTS {
            // Twice, which is no more than once.
            for _ in 0..2 {
                let pod = unreadable(&number.to_string());
                usage.take(&Event::InitApply(pod)).unwrap();
            }
        }
        let error = usage
            .take(&Event::InitApply(unreadable("last")))
            .unwrap_err();
        assert!(error.contains("more than 100000 pods"), "{error}");
        // The next list has fewer.
        usage.take(&Event::Init).unwrap();
        usage.take(&Event::InitApply(pod("one", 1))).unwrap();
        usage.take(&Event::InitDone).unwrap();
        assert_eq!(usage.current.by_name.len(), 1);
    }

    #[test]
    fn objects_that_are_added_one_by_one_are_counted_until_they_are_deleted() {
        const LONG: usize = 32 << 20;
        let mut usage = Usage::new(Kind::Pod, &Total::default());
        for event in [Event::Init, Event::InitDone] {
            usage.take(&event).unwrap();
        }
        let fitting = MAX_BYTES / LONG - 1;
        for number in 0..20 {
            let number = (number % fitting).to_string();
            usage.take(&Event::Apply(pod(&number, LONG))).unwrap();
            // It is kept as it was.
            usage.take(&Event::Apply(unreadable(&number))).unwrap();
        }
        for event in [Event::Init, Event::InitDone] {
            usage.take(&event).unwrap();
        }
        usage.take(&Event::Delete(name("0"))).unwrap();
        usage.take(&Event::Apply(pod("other", LONG))).unwrap();
        let error = usage.take(&Event::Apply(pod("0", LONG))).unwrap_err();
        assert!(
            error.contains("its objects take more than 128 MiB"),
            "{error}"
        );
        let before = usage.counted;
        usage.take(&Event::Delete(name("0"))).unwrap();
        assert_eq!(usage.counted, before, "what was refused is not kept");
    }

    #[test]
    fn all_kinds_of_a_cluster_share_its_limit() {
        const LONG: usize = 32 << 20;
        let total = Total::default();
        let mut kinds = [Kind::Pod, Kind::Service].map(|kind| Usage::new(kind, &total));
        let [pods, services] = &mut kinds;
        pods.take(&Event::Init).unwrap();
        for number in 0..3 {
            let pod = pod(&number.to_string(), LONG);
            pods.take(&Event::InitApply(pod)).unwrap();
        }
        pods.take(&Event::InitDone).unwrap();
        // While they are listed again, they still count.
        pods.take(&Event::Init).unwrap();
        services.take(&Event::Init).unwrap();
        let other = || Event::InitApply(pod("other", LONG));
        assert!(services.take(&other()).is_err());
        assert!(services.listed.is_none(), "it is not kept until the next");
        assert_eq!(total.0.load(Relaxed), pods.counted);
        // The pods become fewer.
        pods.take(&Event::InitApply(pod("0", LONG))).unwrap();
        pods.take(&Event::InitDone).unwrap();
        services.take(&Event::Init).unwrap();
        services.take(&other()).unwrap();
        assert_eq!(total.0.load(Relaxed), pods.counted + services.counted);
    }

    #[test]
    fn all_texts_of_an_object_are_counted() {
        const LONG: usize = 1 << 20;
        let counted = |seen: Seen| size(&seen, seen.object.as_ref().unwrap().as_ref());
        let service = Service {
            ports: vec![Port {
                name: "http".into(),
                port: 80,
                target: TargetPort::Name("x".repeat(LONG)),
            }],
            ..Service::new(name("web"))
        };
        let of_service = Seen {
            object: Ok(Some(Object::Service(service.into()))),
            ..pod("web", 0)
        };
        assert!(counted(of_service) > LONG, "a port's name");
        let long_uid = Seen {
            uid: "x".repeat(LONG),
            ..pod("web", 0)
        };
        assert!(counted(long_uid) > 2 * LONG, "it is kept twice");
    }
}
