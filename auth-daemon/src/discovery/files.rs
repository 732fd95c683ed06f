//! Discovery from a folder of Kubernetes manifests, watched: an edit takes effect at once, and a file that cannot be
//! read keeps its last good state.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecursiveMode, Watcher};
use serde_json::Value;
use tokio::sync::mpsc;

use super::manifest::{self, Object};
use crate::mesh::{Edit, ObjectName, Registry, Snapshot, TrustDomain};

/// A manifest larger than this is refused, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// How long to wait for more edits after the first.
const SETTLE: Duration = Duration::from_millis(50);
/// How often to look without being told: covers folders whose file system tells nothing.
const RESCAN: Duration = Duration::from_secs(10);

/// Reads the folder into `registry` and keeps doing so. Returns after the first reading; the returned future watches.
///
/// Fails when the folder cannot be read at all.
pub fn start(
    folder: PathBuf,
    trust_domain: TrustDomain,
    registry: Arc<Registry>,
) -> anyhow::Result<impl Future<Output = ()>> {
    let (events, mut edits) = mpsc::channel::<()>(1);
    let mut watcher = notify::recommended_watcher(move |_| {
        // A full channel already promises a reading.
        let _ = events.try_send(());
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
    source.scan(&registry);
    Ok(async move {
        let _watcher = watcher;
        loop {
            tokio::select! {
                edit = edits.recv() => if edit.is_none() { return },
                () = tokio::time::sleep(RESCAN) => {}
            }
            tokio::time::sleep(SETTLE).await;
            while edits.try_recv().is_ok() {}
            source.scan(&registry);
        }
    })
}

struct Source {
    folder: PathBuf,
    trust_domain: TrustDomain,
    files: BTreeMap<PathBuf, File>,
    published: Option<Vec<(ObjectName, Object)>>,
}

/// A file's content as last seen, and its objects as last understood.
#[derive(Default)]
struct File {
    text: Vec<u8>,
    objects: Vec<(ObjectName, Object)>,
}

impl Source {
    fn scan(&mut self, registry: &Registry) {
        match self.read_folder() {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(
                    folder = %self.folder.display(), %error,
                    "cannot read the manifests' folder; going on with what is known"
                );
                return;
            }
        }
        let objects = self.objects();
        if self.published.as_ref() != Some(&objects) {
            let mut edit = Edit::from(Snapshot::default());
            let (mut pods, mut services) = (0, 0);
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
                    Object::Namespace(membership) => edit.namespace(&name.name, *membership),
                }
            }
            let snapshot = edit.finish();
            for fault in snapshot.faults() {
                tracing::error!("{fault}");
            }
            tracing::info!(pods, services, "manifests read");
            registry.publish(snapshot);
            self.published = Some(objects);
        }
    }

    fn read_folder(&mut self) -> std::io::Result<()> {
        let mut present = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let manifest = [".yaml", ".yml", ".json"].iter().any(|e| name.ends_with(e));
            if manifest && !name.starts_with('.') {
                present.push(path);
            }
        }
        self.files.retain(|path, _| present.contains(path));
        for path in present {
            let text = match read_file(&path) {
                Ok(text) => text,
                // Removed since it was listed: the next reading sees it gone.
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
                // What a shell's `>` leaves before the writer behind it has written.
                Err("is empty; remove the file to remove its objects".to_owned())
            } else {
                parse(&text, &self.trust_domain)
            };
            match parsed {
                Ok(objects) => known.objects = objects,
                Err(error) => {
                    tracing::error!(file = %path.display(), %error, "bad manifest; keeping the file's last good state");
                }
            }
            known.text = text;
        }
        Ok(())
    }

    /// All files' objects; the first of two with the same kind and name counts, and the second is reported.
    fn objects(&self) -> Vec<(ObjectName, Object)> {
        let mut objects = Vec::new();
        let mut seen: BTreeMap<(&str, &ObjectName), &Path> = BTreeMap::new();
        for (path, file) in &self.files {
            for (name, object) in &file.objects {
                let kind = object.kind();
                match seen.entry((kind, name)) {
                    Entry::Occupied(first) => tracing::error!(
                        file = %path.display(),
                        "{kind} {name}: stands in {} already; that one counts", first.get().display()
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

fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
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

/// All objects of a file of one or more YAML or JSON documents; all or none.
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
    use super::*;

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
        let registry = Registry::new();
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
        source.scan(&registry);
        assert_eq!(pods(&registry), ["one", "three", "two"]);

        fs::write(&one, pod("one", "10.0.0.999")).unwrap();
        source.scan(&registry);
        assert_eq!(pods(&registry), ["one", "three", "two"]);
        let version = *registry.changes().borrow();

        source.scan(&registry);
        assert_eq!(*registry.changes().borrow(), version, "nothing changed");

        fs::write(&one, pod("uno", "10.0.0.9")).unwrap();
        source.scan(&registry);
        assert_eq!(pods(&registry), ["three", "two", "uno"]);

        fs::remove_file(&one).unwrap();
        source.scan(&registry);
        assert_eq!(pods(&registry), ["three", "two"]);
    }

    #[test]
    fn the_second_of_two_with_one_name_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::new();
        fs::write(folder.path().join("a.yaml"), pod("one", "10.0.0.1")).unwrap();
        fs::write(folder.path().join("b.yaml"), pod("one", "10.0.0.2")).unwrap();
        source(folder.path()).scan(&registry);
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
}
