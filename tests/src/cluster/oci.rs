//! A container image as an OCI archive (image-spec 1.0: `oci-layout`, `index.json`, `blobs`), without Docker.
//!
//! The same files give the same bytes: entries are sorted, without times and users.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use aws_lc_rs::digest;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use crate::architecture::Architecture;
use crate::tree::{Entry, FileTree, read_file};

/// The content and configuration of an image.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// The files of its only layer.
    pub(super) files: FileTree,
    architecture: Architecture,
    config: Value,
}

impl Image {
    /// An image without files. `config` is the image's `config` (image-spec, config.md): `Entrypoint`, `Cmd`, `User`, `Env`, …
    pub(super) fn new(architecture: Architecture, config: Value) -> Self {
        Self {
            files: FileTree::default(),
            architecture,
            config,
        }
    }

    /// Writes the archive to `output`, for containerd to import under the name `reference`, such as
    /// `docker.io/library/auth-daemon:0.1.0`. Returns the digest of the image's manifest.
    pub(super) fn write(&self, reference: &str, output: &Path) -> Result<String> {
        let (_, tag) = reference
            .rsplit_once(':')
            .filter(|(_, tag)| !tag.contains('/'))
            .with_context(|| format!("image name {reference} has no tag"))?;
        let platform = json!({"architecture": self.architecture.name(), "os": "linux"});

        let mut blobs = BTreeMap::new();
        let mut keep = |content: Vec<u8>| {
            let (digest, size) = (sha256(&content), content.len());
            blobs.insert(digest.clone(), content);
            (format!("sha256:{digest}"), size)
        };
        let (layer, layer_size) = keep(self.layer()?);
        let mut config = platform.clone();
        config["config"] = self.config.clone();
        config["rootfs"] = json!({"type": "layers", "diff_ids": [layer]});
        let (config, config_size) = keep(config.to_string().into_bytes());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": config, "size": config_size},
            "layers": [{"mediaType": LAYER, "digest": layer, "size": layer_size}],
        });
        let (manifest, manifest_size) = keep(manifest.to_string().into_bytes());
        let index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [{
                "mediaType": MANIFEST, "digest": manifest, "size": manifest_size, "platform": platform,
                "annotations": {
                    "io.containerd.image.name": reference,
                    "org.opencontainers.image.ref.name": tag,
                },
            }],
        });

        let file =
            File::create(output).with_context(|| format!("creating {}", output.display()))?;
        let mut archive = Builder::new(BufWriter::new(file));
        let written = (|| -> io::Result<()> {
            append(&mut archive, "oci-layout", 0o644, LAYOUT.as_bytes())?;
            append(
                &mut archive,
                "index.json",
                0o644,
                index.to_string().as_bytes(),
            )?;
            for (digest, content) in &blobs {
                append(
                    &mut archive,
                    format!("blobs/sha256/{digest}"),
                    0o644,
                    content,
                )?;
            }
            archive.into_inner()?.flush()
        })();
        written.with_context(|| format!("writing {}", output.display()))?;
        Ok(manifest)
    }

    /// The image's only layer, in memory: some tens of megabytes.
    fn layer(&self) -> Result<Vec<u8>> {
        let mut layer = Builder::new(Vec::new());
        for (path, entry) in self.files.entries() {
            let name = path.strip_prefix("/").unwrap_or(path);
            let added = match entry {
                Entry::Folder(mode) => {
                    let mut header = header(EntryType::Directory, *mode, 0);
                    layer.append_data(&mut header, name.join(""), io::empty())
                }
                Entry::Link(target) => {
                    let mut header = header(EntryType::Symlink, 0o777, 0);
                    layer.append_link(&mut header, name, target)
                }
                Entry::Bytes(bytes) => append(&mut layer, name, 0o644, bytes),
                Entry::File(source) => read_file(source)
                    .and_then(|(mode, content)| append(&mut layer, name, mode, &content)),
            };
            added.with_context(|| format!("adding {}", path.display()))?;
        }
        layer.into_inner().context("finishing the layer")
    }
}

fn append(
    archive: &mut Builder<impl Write>,
    name: impl AsRef<Path>,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let mut header = header(EntryType::Regular, mode, content.len() as u64);
    archive.append_data(&mut header, name, content)
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn sha256(content: &[u8]) -> String {
    digest::digest(&digest::SHA256, content)
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;
    use std::fs::{self, Permissions};
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    fn read(archive: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(File::open(archive).unwrap());
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn archive_index_leads_to_files() {
        let folder = env::temp_dir().join(format!("oci-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let image = |program: &Path| {
            let config = json!({"Entrypoint": ["/usr/bin/x"]});
            let mut image = Image::new(Architecture::native().unwrap(), config);
            image.files.folder("/tmp", Some(0o1777)).unwrap();
            image.files.link("/bin", "usr/bin").unwrap();
            image.files.program("/usr/bin/x", program).unwrap();
            image
        };
        let program = env::current_exe().unwrap();
        let (one, other) = (folder.join("one.tar"), folder.join("other.tar"));
        let digest = image(&program).write("example.org/x:1", &one).unwrap();
        // The same program elsewhere, newer and with other permissions.
        let copy = folder.join("copy");
        fs::copy(&program, &copy).unwrap();
        fs::set_permissions(&copy, Permissions::from_mode(0o700)).unwrap();
        let same = image(&copy).write("example.org/x:1", &other).unwrap();
        assert_eq!(digest, same);
        assert!(fs::read(&one).unwrap() == fs::read(&other).unwrap());

        let files = read(&one);
        fs::remove_dir_all(&folder).unwrap();
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"].as_str().unwrap();
            let content = &files[&digest.replacen("sha256:", "blobs/sha256/", 1)];
            assert_eq!(format!("sha256:{}", sha256(content)), digest);
            assert_eq!(descriptor["size"], content.len());
            content.as_slice()
        };
        let json = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
        assert_eq!(json(&files["oci-layout"])["imageLayoutVersion"], "1.0.0");
        let index = json(&files["index.json"]);
        assert_eq!(index["manifests"][0]["digest"], digest);
        let manifest = json(blob(&index["manifests"][0]));
        let config = json(blob(&manifest["config"]));
        assert_eq!(config["config"]["Entrypoint"][0], "/usr/bin/x");
        assert_eq!(
            config["rootfs"]["diff_ids"][0],
            manifest["layers"][0]["digest"]
        );

        let mut layer = tar::Archive::new(blob(&manifest["layers"][0]));
        let headers: BTreeMap<_, _> = layer
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                (
                    entry.path().unwrap().display().to_string(),
                    entry.header().clone(),
                )
            })
            .collect();
        assert_eq!(headers["tmp/"].mode().unwrap(), 0o1777);
        assert_eq!(headers["bin"].entry_type(), EntryType::Symlink);
        assert_eq!(headers["usr/bin/x"].mode().unwrap(), 0o755);
        assert!(
            headers.keys().any(|name| name.contains("libc.so")),
            "{:?}",
            headers.keys()
        );
        assert!(headers.values().all(|header| header.mtime().unwrap() == 0));
    }

    #[test]
    fn rejects_untagged_names() {
        let image = Image::new(Architecture::Arm64, Value::Null);
        for name in ["x", "localhost:5000/x"] {
            assert!(
                image.write(name, Path::new("/nonexistent/x")).is_err(),
                "{name}"
            );
        }
    }
}
