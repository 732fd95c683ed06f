//! Files for the root of another machine: an image's layer, or a virtual machine's initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::architecture::Architecture;
use crate::libraries::shared_libraries;

/// Paths and their entries. Parent folders are added with a path.
#[derive(Debug, Clone, Default)]
pub struct FileTree {
    entries: BTreeMap<PathBuf, Entry>,
}

/// The entry at a path.
#[derive(Debug, Clone)]
pub(crate) enum Entry {
    /// A folder with this mode.
    Folder(u32),
    /// A copy of this file.
    File(PathBuf),
    /// A file with these bytes, not executable.
    Bytes(Vec<u8>),
    /// A symbolic link to this target.
    Link(PathBuf),
}

impl FileTree {
    /// Adds a folder, by default readable by all and writable by its owner only; `mode` sets another mode.
    ///
    /// # Errors
    /// If the path is not absolute or not normalized.
    pub fn folder(&mut self, path: impl Into<PathBuf>, mode: Option<u32>) -> Result<()> {
        self.add(path.into(), Entry::Folder(mode.unwrap_or(0o755)))
    }

    /// Adds a symbolic link at `path`. Entries that are added below it later are placed below its target.
    ///
    /// # Errors
    /// If the path is not absolute or not normalized.
    pub fn link(&mut self, path: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Result<()> {
        self.add(path.into(), Entry::Link(target.into()))
    }

    /// Adds a copy of a file of this machine.
    ///
    /// # Errors
    /// If the path is not absolute or not normalized.
    pub fn file(&mut self, path: impl Into<PathBuf>, source: &Path) -> Result<()> {
        self.add(path.into(), Entry::File(source.to_owned()))
    }

    /// Adds a file with these bytes.
    ///
    /// # Errors
    /// If the path is not absolute or not normalized.
    pub fn bytes(&mut self, path: impl Into<PathBuf>, bytes: Vec<u8>) -> Result<()> {
        self.add(path.into(), Entry::Bytes(bytes))
    }

    /// Adds a folder of this machine with its contents. Links are kept as links.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn copy(&mut self, path: &Path, source: &Path) -> Result<()> {
        let reading = || format!("reading {}", source.display());
        for entry in fs::read_dir(source).with_context(reading)? {
            let entry = entry.with_context(reading)?;
            let (here, there) = (entry.path(), path.join(entry.file_name()));
            let kind = entry.file_type().with_context(reading)?;
            if kind.is_dir() {
                self.copy(&there, &here)?;
            } else if kind.is_symlink() {
                self.link(there, fs::read_link(&here).with_context(reading)?)?;
            } else if kind.is_file() {
                self.file(there, &here)?;
            }
        }
        Ok(())
    }

    /// Adds a program of this machine at `path`, and the shared libraries that it needs, where its loader searches for
    /// them.
    ///
    /// # Errors
    /// If one of its libraries is missing.
    pub fn program(&mut self, path: impl Into<PathBuf>, source: &Path) -> Result<()> {
        self.program_for(Architecture::native()?, path, source)
    }

    /// Adds a program of an architecture, and the shared libraries that it needs, as [`Self::program`] does.
    ///
    /// # Errors
    /// If one of its libraries is missing.
    pub fn program_for(
        &mut self,
        architecture: Architecture,
        path: impl Into<PathBuf>,
        source: &Path,
    ) -> Result<()> {
        for (library, file) in shared_libraries(source, architecture)? {
            self.add(library, Entry::File(file))?;
        }
        self.file(path, source)
    }

    /// All entries, folders before their contents.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (&Path, &Entry)> {
        self.entries.iter().map(|(path, entry)| (&**path, entry))
    }

    /// Writes an initramfs as the kernel expects it (cpio "newc", Documentation/driver-api/early-userspace).
    ///
    /// # Errors
    /// If a file cannot be read, or `output` cannot be written.
    pub fn write_initramfs(&self, mut output: impl Write) -> Result<()> {
        for (path, entry) in self.entries() {
            let name = path.strip_prefix("/").unwrap_or(path);
            let (mode, content) = match entry {
                Entry::Folder(mode) => (0o040_000 | mode, Vec::new()),
                Entry::Link(target) => (0o120_777, target.as_os_str().as_encoded_bytes().to_vec()),
                Entry::Bytes(bytes) => (0o100_644, bytes.clone()),
                Entry::File(source) => read_file(source)
                    .map(|(mode, content)| (0o100_000 | mode, content))
                    .with_context(|| format!("reading {}", source.display()))?,
            };
            let size = u32::try_from(content.len())
                .with_context(|| format!("{} is too large", path.display()))?;
            let mut file = cpio::newc::Builder::new(&name.to_string_lossy())
                .mode(mode)
                .nlink(1)
                .write(&mut output, size);
            file.write_all(&content)
                .and_then(|()| file.finish().map(drop))
                .with_context(|| format!("adding {}", path.display()))?;
        }
        cpio::newc::trailer(output).context("ending the archive")?;
        Ok(())
    }

    fn add(&mut self, path: PathBuf, entry: Entry) -> Result<()> {
        let plain = path.is_absolute()
            && path.file_name().is_some()
            && path
                .components()
                .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        ensure!(plain, "{}: is no plain absolute path", path.display());
        let path = self.resolved(&path)?;
        for above in path.ancestors().skip(1) {
            if above.file_name().is_some() && !self.entries.contains_key(above) {
                self.entries.insert(above.to_owned(), Entry::Folder(0o755));
            }
        }
        self.entries.insert(path, entry);
        Ok(())
    }

    /// Resolves links in the folders above a path: `/lib/x` is `/usr/lib/x` on most current machines.
    fn resolved(&self, path: &Path) -> Result<PathBuf> {
        let mut resolved = PathBuf::from("/");
        let mut links = 0;
        let mut parts = path.components().skip(1).peekable();
        while let Some(part) = parts.next() {
            resolved.push(part);
            while parts.peek().is_some()
                && let Some(Entry::Link(target)) = self.entries.get(&resolved)
            {
                links += 1;
                ensure!(links <= 40, "{}: too many links", path.display());
                ensure!(
                    target.components().all(|part| part != Component::ParentDir),
                    "{}: leads through a link to {}",
                    path.display(),
                    target.display()
                );
                resolved.pop();
                resolved.push(target);
            }
        }
        Ok(resolved)
    }
}

/// Returns a file's permissions, as 755 or 644, and its bytes.
pub(crate) fn read_file(path: &Path) -> io::Result<(u32, Vec<u8>)> {
    let mut file = fs::File::open(path)?;
    let executable = file.metadata()?.permissions().mode() & 0o111 != 0;
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok((if executable { 0o755 } else { 0o644 }, content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::env;

    #[test]
    fn what_lies_below_a_link_lies_where_it_leads() {
        let mut tree = FileTree::default();
        tree.link("/lib", "usr/lib").unwrap();
        tree.bytes("/lib/x/y", b"z".to_vec()).unwrap();
        let paths: Vec<_> = tree.entries().map(|(path, _)| path.to_owned()).collect();
        let expected = ["/lib", "/usr", "/usr/lib", "/usr/lib/x", "/usr/lib/x/y"];
        assert_eq!(paths, expected.map(PathBuf::from));

        tree.link("/up", "../x").unwrap();
        tree.link("/round", "round").unwrap();
        for path in ["etc", "/etc/../x", "/", "/up/x", "/round/x"] {
            assert!(tree.folder(path, None).is_err(), "{path}");
        }
    }

    #[test]
    fn an_initramfs_holds_the_files() {
        let mut tree = FileTree::default();
        tree.folder("/tmp", Some(0o1777)).unwrap();
        tree.link("/bin", "usr/bin").unwrap();
        tree.program("/bin/x", &env::current_exe().unwrap())
            .unwrap();
        tree.bytes("/etc/plan", b"go".to_vec()).unwrap();
        let mut archive = Vec::new();
        tree.write_initramfs(&mut archive).unwrap();

        let mut found = BTreeMap::new();
        let mut rest = archive.as_slice();
        loop {
            let mut file = cpio::newc::Reader::new(rest).unwrap();
            if file.entry().is_trailer() {
                break;
            }
            let (name, mode) = (file.entry().name().to_owned(), file.entry().mode());
            let mut content = Vec::new();
            file.read_to_end(&mut content).unwrap();
            rest = file.finish().unwrap();
            found.insert(name, (mode, content));
        }
        assert_eq!(found["tmp"].0, 0o041_777);
        assert_eq!(found["bin"], (0o120_777, b"usr/bin".to_vec()));
        assert_eq!(found["etc/plan"], (0o100_644, b"go".to_vec()));
        assert_eq!(found["usr/bin/x"].0, 0o100_755);
        assert!(found["usr/bin/x"].1.starts_with(b"\x7fELF"));
        assert!(found.keys().any(|name| name.contains("libc.so")));
    }
}
