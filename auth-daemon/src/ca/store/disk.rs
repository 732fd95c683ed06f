//! The steps by which files change, so that a crash between any two leaves the old or the new. Tests decide after which
//! step the disk is full, or the process gone.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::super::files;

#[derive(Clone, Debug, Default)]
pub(in crate::ca) struct Disk {
    #[cfg(test)]
    pub(in crate::ca) faults: tests::Faults,
}

/// Of a file that is being written, to take another's place.
pub(super) fn draft_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.draft"))
}

impl Disk {
    /// Puts a file with `content` in the place of `path`, whether there is one or not. When this returns, it is there
    /// after a crash; when it fails, the old one may be.
    pub(super) fn replace(&self, path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        let draft = draft_of(path);
        let written = self.write_draft(&draft, content, mode).and_then(|()| {
            self.step()?;
            fs::rename(&draft, path)
        });
        if let Err(error) = written {
            // Of no use to anybody; what cannot be removed now, the next start removes.
            let _ = self.step().and_then(|()| fs::remove_file(&draft));
            return Err(error);
        }
        self.sync_directory(path)
    }

    fn write_draft(&self, draft: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        match fs::remove_file(draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.step()?;
        #[cfg(test)]
        self.faults.before_write(|half| {
            let _ = files::write_new(draft, &content[..half(content.len())], mode);
        })?;
        files::write_new(draft, content, mode)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Adds to the end of `file`, as far as it goes: a failure may leave a part behind.
    pub(super) fn append(&self, mut file: &File, content: &[u8]) -> io::Result<()> {
        self.step()?;
        #[cfg(test)]
        self.faults.before_write(|half| {
            let _ = file.write_all(&content[..half(content.len())]);
        })?;
        file.write_all(content)?;
        self.step()?;
        file.sync_data()
    }

    /// Cuts `file` down to `length`.
    pub(super) fn truncate(&self, file: &File, length: u64) -> io::Result<()> {
        self.step()?;
        file.set_len(length)?;
        file.sync_all()
    }

    fn step(&self) -> io::Result<()> {
        #[cfg(test)]
        return self.faults.step();
        #[cfg(not(test))]
        Ok(())
    }
}

#[cfg(test)]
pub(in crate::ca) mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What goes wrong from when on.
    #[derive(Clone, Debug, Default)]
    pub(in crate::ca) struct Faults(Arc<Mutex<Inner>>);

    #[derive(Debug, Default)]
    struct Inner {
        steps: usize,
        crash_after: Option<usize>,
        full: bool,
    }

    impl Faults {
        /// Nothing happens any more after so many steps. The one that is a write gets half done.
        pub(in crate::ca) fn crash_after(steps: usize) -> Self {
            let faults = Self::default();
            faults.0.lock().unwrap().crash_after = Some(steps);
            faults
        }

        pub(in crate::ca) fn fill(&self, full: bool) {
            self.0.lock().unwrap().full = full;
        }

        pub(in crate::ca) fn crashed(&self) -> bool {
            let inner = self.0.lock().unwrap();
            inner.crash_after.is_some_and(|after| inner.steps > after)
        }

        pub(super) fn step(&self) -> io::Result<()> {
            self.0.lock().unwrap().steps += 1;
            match self.crashed() {
                true => Err(io::Error::other("crashed")),
                false => Ok(()),
            }
        }

        pub(super) fn before_write(
            &self,
            write: impl FnOnce(fn(usize) -> usize),
        ) -> io::Result<()> {
            let full = self.0.lock().unwrap().full;
            let crash = self.step();
            if full || crash.is_err() {
                // Not when the step before was the last one.
                let before = {
                    let inner = self.0.lock().unwrap();
                    inner
                        .crash_after
                        .is_some_and(|after| inner.steps > after + 1)
                };
                if !before {
                    write(|length| length / 2);
                }
                crash?;
                return Err(io::Error::from_raw_os_error(
                    nix::errno::Errno::ENOSPC as i32,
                ));
            }
            Ok(())
        }
    }
}
