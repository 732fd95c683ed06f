//! Files that others write, and that the CA reads again when they change.

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::files;

/// A small file.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    path: PathBuf,
    limit: u64,
    seen: Option<Stamp>,
}

/// What changes with a file's content: the inode by a rename, the times by a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl WatchedFile {
    /// Reads nothing yet, and never more than `limit` bytes.
    pub(crate) fn new(path: PathBuf, limit: u64) -> Self {
        Self {
            path,
            limit,
            seen: None,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The content, if it may have changed since the last call that returned it.
    pub(crate) fn changed(&mut self) -> io::Result<Option<Vec<u8>>> {
        let outcome = self.read_if_changed();
        if outcome.is_err() {
            // A file that comes back is read, even if it looks the same.
            self.seen = None;
        }
        outcome
    }

    fn read_if_changed(&mut self) -> io::Result<Option<Vec<u8>>> {
        let stamp = Stamp::of(&std::fs::metadata(&self.path)?);
        if self.seen == Some(stamp) {
            return Ok(None);
        }
        let mut file = File::open(&self.path)?;
        let metadata = file.metadata()?;
        let content = files::read_regular(&mut file, self.limit)?;
        // From before the read, so that a later write is noticed next time.
        self.seen = Some(Stamp::of(&metadata));
        Ok(Some(content))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn reads_changed_content_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mut file = WatchedFile::new(path.clone(), 8);
        assert!(file.changed().is_err(), "missing");
        fs::write(&path, "one").unwrap();
        assert_eq!(file.changed().unwrap().as_deref(), Some(&b"one"[..]));
        assert_eq!(file.changed().unwrap(), None);
        let next = folder.path().join("y");
        fs::write(&next, "two").unwrap();
        fs::rename(&next, &path).unwrap();
        assert_eq!(file.changed().unwrap().as_deref(), Some(&b"two"[..]));
        fs::write(&path, "far too large").unwrap();
        assert!(file.changed().is_err());
        fs::write(&path, "three").unwrap();
        assert_eq!(file.changed().unwrap().as_deref(), Some(&b"three"[..]));
        assert!(WatchedFile::new(folder.path().into(), 8).changed().is_err());
    }
}
