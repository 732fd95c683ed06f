//! Files that only this program's user may change, and keys that nobody else may read.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Who may read a file, besides its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Nobody.
    Nobody,
    /// If the file is root's and this process is not, its own group: Kubernetes gives a Secret so to a pod with `fsGroup`.
    OwnGroup,
    /// Everybody.
    Everybody,
}

/// How others could change the file of `metadata`, if they could.
fn writable_by_others(metadata: &fs::Metadata) -> Option<String> {
    let own = nix::unistd::geteuid().as_raw();
    if metadata.uid() != own && metadata.uid() != 0 {
        return Some(format!("belongs to user {}", metadata.uid()));
    }
    let mode = metadata.mode() & 0o777;
    (mode & 0o022 != 0).then(|| format!("mode {mode:03o} lets others write"))
}

/// Creates `directory` for this user alone, if it does not exist. Fails if others may write to it.
pub fn create_own_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    match writable_by_others(&fs::metadata(directory)?) {
        None => Ok(()),
        Some(what) => Err(io::Error::other(format!(
            "{what}: others could replace what is in it. Give it to the user of this program and run `chmod 700 {}`",
            directory.display()
        ))),
    }
}

/// Reads a file of at most `limit` bytes that nobody else may change, and only `readers` may read.
pub fn read_own(path: &Path, limit: u64, readers: Readers) -> io::Result<Vec<u8>> {
    let mut file = fs::File::open(path)?;
    // Of the open file, so that it cannot be replaced in between.
    let metadata = file.metadata()?;
    if let Some(what) = writable_by_others(&metadata) {
        let mode = match readers {
            Readers::Everybody => "go-w",
            Readers::Nobody | Readers::OwnGroup => "600",
        };
        return Err(io::Error::other(format!(
            "{what}: another user could replace it. Give it to the user of this program and run `chmod {mode} {}`",
            path.display()
        )));
    }
    let mode = metadata.mode() & 0o777;
    let exposed = match readers {
        Readers::Everybody => false,
        Readers::OwnGroup => mode & 0o077 != 0 && !is_secret_of_own_group(&metadata),
        Readers::Nobody => mode & 0o077 != 0,
    };
    if exposed {
        return Err(io::Error::other(format!(
            "mode {mode:03o} allows others than its owner to read it, so they may know the key. If they do not, run \
             `chmod 600 {}` (for a Kubernetes Secret's volume: `defaultMode: 0400`)",
            path.display()
        )));
    }
    read_at_most(&mut file, limit)
}

fn is_secret_of_own_group(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o037 == 0
        && metadata.uid() == 0
        && !nix::unistd::geteuid().is_root()
        && nix::unistd::getgroups()
            .is_ok_and(|groups| groups.iter().any(|group| group.as_raw() == metadata.gid()))
}

/// Reads the whole file. More than `limit` bytes are an error.
fn read_at_most(file: &mut fs::File, limit: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::other(format!("is larger than {limit} bytes")));
    }
    Ok(content)
}

/// Reads a regular file of at most `limit` bytes. Other files may never end.
pub fn read(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut file = fs::File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    read_at_most(&mut file, limit)
}

/// Creates a file and syncs it to the disk. Fails if it exists.
pub fn write_new(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content)?;
    file.sync_all()
}
