//! Discovery from a watched folder of Kubernetes manifests: an edit takes effect at once, and a file that cannot be
//! read keeps its last good state.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use notify::{
    Event, EventKind, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use serde_json::Value;
use tokio::sync::mpsc;

use super::{
    Sink,
    manifest::{self, Object},
};
use auth_mesh::{Edit, ObjectName, Snapshot, TrustDomain};

/// Maximum size of a manifest, in bytes. Larger ones are rejected.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Time to wait for more edits after the first.
const SETTLE: Duration = Duration::from_millis(50);
/// Maximum pause after a scan.
const MAX_PAUSE: Duration = Duration::from_millis(500);
/// Interval of scans without a notification, for file systems that send none.
const RESCAN: Duration = Duration::from_secs(10);

/// Starts discovery from a folder. Returns after the first scan; the returned future watches the folder and keeps
/// `sink` up to date.
///
/// Fails if the folder cannot be watched.
pub fn start(
    folder: PathBuf,
    trust_domain: TrustDomain,
    sink: Sink,
) -> anyhow::Result<impl Future<Output = ()>> {
    let (events, mut edits) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if may_be_an_edit(&event) {
            // If the channel is full, a scan is already pending.
            let _ = events.try_send(());
        }
    })?;
    watcher
        .watch(&folder, RecursiveMode::NonRecursive)
        .map_err(|error| anyhow::anyhow!("discovery.files: {}: {error}", folder.display()))?;
    let mut source = Source {
        folder,
        trust_domain,
        files: BTreeMap::new(),
        published: None,
    };
    source.scan(&sink);
    Ok(async move {
        let _watcher = watcher;
        loop {
            tokio::select! {
                edit = edits.recv() => if edit.is_none() { return },
                () = tokio::time::sleep(RESCAN) => {}
            }
            tokio::time::sleep(SETTLE).await;
            while edits.try_recv().is_ok() {}
            let started = Instant::now();
            source.scan(&sink);
            // A folder that keeps changing takes half of a processor at most.
            tokio::time::sleep(started.elapsed().min(MAX_PAUSE)).await;
        }
    })
}

/// Reports whether the event may be an edit. Opening a file sends an event too, so without this filter each scan would
/// cause the next one.
fn may_be_an_edit(event: &notify::Result<Event>) -> bool {
    match event.as_ref().map(|event| event.kind) {
        Ok(EventKind::Access(access)) => access == AccessKind::Close(AccessMode::Write),
        // An unknown event may be an edit.
        Ok(_) | Err(_) => true,
    }
}

struct Source {
    folder: PathBuf,
    trust_domain: TrustDomain,
    files: BTreeMap<PathBuf, File>,
    published: Option<Vec<(ObjectName, Object)>>,
}

/// A file's last read content, and the objects of its last valid content.
#[derive(Default)]
struct File {
    text: Vec<u8>,
    objects: Vec<(ObjectName, Object)>,
}

impl Source {
    fn scan(&mut self, sink: &Sink) {
        match self.read_folder() {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(
                    folder = %self.folder.display(), %error,
                    "cannot read the folder of manifests; keeping the known state"
                );
                return;
            }
        }
        let objects = self.objects();
        if self.published.as_ref() != Some(&objects) {
            let mut edit = Edit::from(Snapshot::default());
            let (mut pods, mut services, mut policies) = (0, 0, Vec::new());
            for (name, object) in &objects {
                match object {
                    Object::Pod(pod) => {
                        edit.pod(pod.clone());
                        pods += 1;
                    }
                    Object::Service(service) => {
                        edit.service(service.clone());
                        services += 1;
                    }
                    Object::Slice(slice) => edit.slice(slice.clone()),
                    Object::Namespace(membership) => edit.namespace(&name.name, *membership),
                    Object::Node(node) => edit.node(node.clone()),
                    Object::ServiceNetworks(networks) => {
                        edit.service_networks(&name.name, networks.clone());
                    }
                    Object::Policy(policy) => policies.push(policy.clone()),
                }
            }
            sink.publish_policies(policies);
            let snapshot = edit.finish();
            let errors: Vec<_> = snapshot.errors().collect();
            sink.registry.publish(snapshot);
            self.published = Some(objects);
            // Last, so that the manifests are in force once these lines are logged.
            for error in errors {
                tracing::error!("{error}");
            }
            tracing::info!(pods, services, "manifests read");
        }
    }

    fn read_folder(&mut self) -> std::io::Result<()> {
        let present = manifests(&self.folder)?;
        self.files.retain(|path, _| present.contains(path));
        for path in present {
            let text = match read_file(&path) {
                Ok(text) => text,
                // Removed since the listing. The next scan notices.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "cannot read a manifest; keeping its last good state");
                    continue;
                }
            };
            let known = self.files.entry(path.clone()).or_default();
            if known.text == text {
                continue;
            }
            let parsed = if text.trim_ascii().is_empty() && !known.objects.is_empty() {
                // A shell's `>` leaves an empty file until the program behind it writes.
                Err("is empty; remove the file to remove its objects".to_owned())
            } else {
                parse(&text, &self.trust_domain)
            };
            match parsed {
                Ok(objects) => known.objects = keep_good_policies(objects, &known.objects),
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "bad manifest; keeping the file's last good state");
                }
            }
            known.text = text;
        }
        Ok(())
    }

    /// Returns the objects of all files. Of two objects of the same kind and name, the first is used and the second is
    /// reported.
    fn objects(&self) -> Vec<(ObjectName, Object)> {
        let mut objects = Vec::new();
        let mut seen: BTreeMap<(&str, &ObjectName), &Path> = BTreeMap::new();
        for (path, file) in &self.files {
            for (name, object) in &file.objects {
                let kind = object.kind();
                match seen.entry((kind, name)) {
                    Entry::Occupied(first) => tracing::error!(
                        file = %path.display(),
                        "{kind} {name}: is already defined in {}; that definition is used", first.get().display()
                    ),
                    Entry::Vacant(free) => {
                        free.insert(path);
                        objects.push((name.clone(), object.clone()));
                    }
                }
            }
        }
        objects
    }
}

/// Returns the manifests in a folder, by name.
pub fn manifests(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut manifests = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let manifest = [".yaml", ".yml", ".json"].iter().any(|e| name.ends_with(e));
        if manifest && !name.starts_with('.') {
            manifests.push(path);
        }
    }
    manifests.sort();
    Ok(manifests)
}

/// Reads a manifest, up to the size limit.
pub fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("is not a regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!(
            "is larger than {MAX_FILE_BYTES} bytes"
        )));
    }
    fs::read(path)
}

/// Replaces each policy that cannot be read by its last readable version in `before`, if there is one.
fn keep_good_policies(
    objects: Vec<(ObjectName, Object)>,
    before: &[(ObjectName, Object)],
) -> Vec<(ObjectName, Object)> {
    let kept = objects.into_iter().map(|(name, object)| {
        let before = before
            .iter()
            .find(|(known, other)| *known == name && other.kind() == object.kind());
        let kept = manifest::keep_good_policy(object, before.map(|(_, object)| object));
        (name, kept)
    });
    kept.collect()
}

/// Parses a file of one or more YAML or JSON documents. An error in one document fails the whole file.
pub fn parse(text: &[u8], trust_domain: &TrustDomain) -> Result<Vec<(ObjectName, Object)>, String> {
    let text = std::str::from_utf8(text).map_err(|error| format!("is not UTF-8: {error}"))?;
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| format!("is not YAML: {error}"))?;
    let several = documents.len() > 1;
    let mut objects = Vec::new();
    for (index, document) in documents.into_iter().enumerate() {
        let read = manifest::read(document, trust_domain).map_err(|error| {
            if several {
                format!("document {}: {error}", index + 1)
            } else {
                error
            }
        })?;
        objects.extend(read);
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use auth_mesh::Registry;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: NAME}\nspec: {nodeName: a, containers: []}\n\
                       status: {podIP: ADDRESS}\n";

    fn pod(name: &str, address: &str) -> String {
        POD.replace("NAME", name).replace("ADDRESS", address)
    }

    fn source(folder: &Path) -> Source {
        Source {
            folder: folder.to_owned(),
            trust_domain: "cluster.local".parse().unwrap(),
            files: BTreeMap::new(),
            published: None,
        }
    }

    fn pods(registry: &Registry) -> Vec<String> {
        let snapshot = registry.snapshot();
        snapshot.workloads().map(|w| w.name.name.clone()).collect()
    }

    #[test]
    fn a_broken_file_keeps_its_last_good_state() {
        let folder = tempfile::tempdir().unwrap();
        let sink = Sink::default();
        let registry = &sink.registry;
        let mut source = source(folder.path());
        let one = folder.path().join("one.yaml");
        fs::write(&one, pod("one", "10.0.0.1")).unwrap();
        fs::write(
            folder.path().join("two.yaml"),
            format!(
                "{}---\n{}",
                pod("two", "10.0.0.2"),
                pod("three", "10.0.0.3")
            ),
        )
        .unwrap();
        source.scan(&sink);
        assert_eq!(pods(registry), ["one", "three", "two"]);

        fs::write(&one, pod("one", "10.0.0.999")).unwrap();
        source.scan(&sink);
        assert_eq!(pods(registry), ["one", "three", "two"]);
        let version = *registry.changes().borrow();

        source.scan(&sink);
        assert_eq!(*registry.changes().borrow(), version, "nothing changed");

        fs::write(&one, pod("uno", "10.0.0.9")).unwrap();
        source.scan(&sink);
        assert_eq!(pods(registry), ["three", "two", "uno"]);

        fs::remove_file(&one).unwrap();
        source.scan(&sink);
        assert_eq!(pods(registry), ["three", "two"]);
    }

    #[test]
    fn a_reading_is_no_edit() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("one.yaml");
        fs::write(&file, pod("one", "10.0.0.1")).unwrap();
        let (sender, events) = std::sync::mpsc::channel();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let _ = sender.send((may_be_an_edit(&event), event.unwrap().paths));
        })
        .unwrap();
        watcher
            .watch(folder.path(), RecursiveMode::NonRecursive)
            .unwrap();
        source(folder.path()).scan(&Sink::default());
        // The event for this edit follows all events that the scan caused.
        let last = folder.path().join("last.yaml");
        fs::write(&last, pod("last", "10.0.0.2")).unwrap();
        let mut readings = 0;
        let first = loop {
            match events.recv_timeout(Duration::from_secs(10)).unwrap() {
                (true, paths) => break paths,
                (false, _) => readings += 1,
            }
        };
        assert_eq!(first, std::slice::from_ref(&last));
        assert!(readings > 0, "a watcher that does not tell of readings");
        // An editor may keep a file open and write to it for a long time.
        let written = |(edit, paths)| edit && paths == [last.clone()];
        assert!(
            std::iter::from_fn(|| events.recv_timeout(Duration::from_secs(10)).ok()).any(written)
        );
    }

    #[test]
    fn the_second_of_two_with_one_name_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let sink = Sink::default();
        let registry = &sink.registry;
        fs::write(folder.path().join("a.yaml"), pod("one", "10.0.0.1")).unwrap();
        fs::write(folder.path().join("b.yaml"), pod("one", "10.0.0.2")).unwrap();
        source(folder.path()).scan(&sink);
        let snapshot = registry.snapshot();
        assert_eq!(snapshot.workloads().count(), 1);
        assert!(snapshot.pod("10.0.0.1".parse().unwrap()).is_some());
    }

    #[test]
    fn faults_name_the_document() {
        let text = format!("{}---\n{}", pod("one", "10.0.0.1"), pod("two", "x"));
        let error = parse(text.as_bytes(), &"cluster.local".parse().unwrap()).unwrap_err();
        assert!(
            error.starts_with("document 2: Pod default/two: status.podIP"),
            "{error}"
        );
    }

    #[test]
    fn policies_come_into_force_and_a_broken_one_keeps_its_last_good_state() {
        let policy = |action: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
                 metadata: {{name: web, namespace: shop}}\nspec: {{action: {action}, rules: [{{}}]}}\n"
            )
        };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        let sink = Sink {
            policies: Some(Arc::default()),
            ..Sink::default()
        };
        let mut source = source(folder.path());
        let denies = |source: &mut Source, text: &str| {
            fs::write(&file, text).unwrap();
            source.scan(&sink);
            let policies = sink.policies.as_ref().unwrap().current();
            let connection = auth_mesh::policy::Connection {
                client: Some(&"spiffe://cluster.local/ns/a/sa/b".parse().unwrap()),
                source: "10.0.0.1".parse().unwrap(),
                destination: "10.0.0.2:80".parse().unwrap(),
            };
            let view = policies.workload("shop", &BTreeMap::new());
            !view.evaluate(&connection).allowed()
        };
        assert!(denies(&mut source, &policy("DENIE")), "never read: denied");
        assert!(!denies(&mut source, &policy("ALLOW")));
        assert!(!denies(&mut source, &policy("DENIE")), "the last good one");
        assert!(denies(&mut source, &policy("DENY")));
    }
}
