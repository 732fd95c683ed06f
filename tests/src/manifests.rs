//! Folders of Kubernetes manifests, one for each node.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The manifest folder of one node, or those of all nodes at once.
///
/// Every node reads a folder of its own, so that nodes can have different manifests: write to all through
/// [`crate::Mesh::manifests`] and to one through [`crate::Node::manifests`]. An object is one file. Every change of a
/// file is atomic, and only final file names end in `.json`, `.yaml` or `.yml`.
#[derive(Debug, Clone)]
pub struct Manifests {
    folders: Vec<PathBuf>,
}

impl Manifests {
    pub(crate) fn new(folders: Vec<PathBuf>) -> Result<Self> {
        for folder in &folders {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        Ok(Self { folders })
    }

    /// The folder; for all nodes' folders, the first node's.
    pub fn folder(&self) -> &Path {
        &self.folders[0]
    }

    /// Writes an object. Replaces an existing one of the same kind, namespace and name.
    pub fn apply(&self, manifest: &Value) -> Result<()> {
        self.write(&file_of(manifest)?, &format!("{manifest:#}\n"))
    }

    /// Edits an object in place. `kind` is written as in `"Pod"`.
    pub fn edit(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
        change: impl Fn(&mut Value),
    ) -> Result<()> {
        let file = file_name(kind, namespace, name);
        for folder in &self.folders {
            let path = folder.join(&file);
            let text =
                fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let mut manifest = serde_json::from_str(&text)
                .with_context(|| format!("parsing {}", path.display()))?;
            change(&mut manifest);
            write(folder, &file, &format!("{manifest:#}\n"))?;
        }
        Ok(())
    }

    /// Removes an object, if it exists.
    pub fn remove(&self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.remove_file(&file_name(kind, namespace, name))
    }

    /// Writes a file with any text, as an operator would: YAML, several documents, or invalid content.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        self.folders
            .iter()
            .try_for_each(|folder| write(folder, file, text))
    }

    /// Removes a file, if it exists.
    pub fn remove_file(&self, file: &str) -> Result<()> {
        for folder in &self.folders {
            let path = folder.join(file);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn write(folder: &Path, file: &str, text: &str) -> Result<()> {
    // Hidden and without an extension, so that no reader takes it for a manifest.
    let temporary = folder.join(format!(".{file}.new"));
    let path = folder.join(file);
    fs::write(&temporary, text).with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, &path).with_context(|| format!("renaming {} into place", path.display()))
}

fn file_of(manifest: &Value) -> Result<String> {
    let metadata = &manifest["metadata"];
    match (
        manifest["kind"].as_str(),
        metadata["namespace"].as_str(),
        metadata["name"].as_str(),
    ) {
        (Some(kind), Some(namespace), Some(name)) => Ok(file_name(kind, namespace, name)),
        _ => bail!("a manifest without kind, metadata.namespace or metadata.name: {manifest}"),
    }
}

fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    format!("{}-{namespace}-{name}.json", kind.to_lowercase())
}
