//! Named network namespaces, and running code inside them.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};

use crate::ip::ip;

/// A network namespace under `/run/netns`.
///
/// The value holds the namespace open: it refers to the same namespace even if the file is removed and recreated. Only
/// `Netns::recreate` changes that, for all clones.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    file: Arc<Mutex<Arc<File>>>,
}

impl Netns {
    /// Creates network namespaces with these names, in order.
    pub(crate) fn create(names: &[String]) -> Result<Vec<Self>> {
        ip(
            None,
            &names
                .iter()
                .map(|name| format!("netns add {name}"))
                .collect::<Vec<_>>(),
        )?;
        names.iter().map(|name| Self::open(name)).collect()
    }

    /// Opens the namespace of this name, which must exist.
    pub fn open(name: &str) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            file: Arc::new(Mutex::new(Self::open_file(name)?)),
        })
    }

    /// Replaces the namespace by a new one of the same name, which has no interfaces but a loopback.
    pub(crate) fn recreate(&self) -> Result<()> {
        Self::remove(&self.name)?;
        ip(None, &[format!("netns add {}", self.name)])?;
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Self::open_file(&self.name)?;
        Ok(())
    }

    fn open_file(name: &str) -> Result<Arc<File>> {
        let path = Self::path_of(name);
        let file = File::open(&path)
            .with_context(|| format!("opening the namespace {}", path.display()))?;
        Ok(Arc::new(file))
    }

    /// Its name under `/run/netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of its file, as in the annotation `auth-daemon.io/netns`.
    pub fn path(&self) -> PathBuf {
        Self::path_of(&self.name)
    }

    /// The open namespace, for `setns`.
    pub(crate) fn file(&self) -> Arc<File> {
        Arc::clone(&self.file.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `body` on a thread inside the namespace and returns its value.
    ///
    /// Sockets created there stay in the namespace and can be used from anywhere. Read `/proc/thread-self/net`, not
    /// `/proc/net`, which belongs to the process. The thread stays in the test's own cgroup, so no program attached to
    /// a mesh's cgroups sees what it does; use [`crate::Place::spawn`] for what the programs must see.
    ///
    /// # Panics
    /// If `body` panics, with its payload.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.file();
        thread::scope(|scope| {
            let inside = thread::Builder::new()
                .name(format!("in {}", self.name))
                .spawn_scoped(scope, || {
                    setns(&*file, CloneFlags::CLONE_NEWNET)
                        .with_context(|| format!("entering the namespace {}", self.name))?;
                    Ok(body())
                })
                .map_err(|error| anyhow!("starting a thread for {}: {error}", self.name))?;
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sets kernel parameters of the namespace, with names such as `net/ipv4/ip_forward`.
    pub fn set_parameters(&self, parameters: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (name, value) in parameters {
                fs::write(Path::new("/proc/sys").join(name), value)
                    .with_context(|| format!("setting {name} = {value} in {}", self.name))?;
            }
            Ok(())
        })?
    }

    /// Removes the name. The namespace itself is removed with its last process and socket.
    pub(crate) fn remove(name: &str) -> Result<()> {
        let path = Self::path_of(name);
        // The name may be a plain file, if a run was killed between creating the file and mounting on it.
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing the namespace {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn path_of(name: &str) -> PathBuf {
        Path::new(FOLDER).join(name)
    }

    /// The names of all namespaces under `/run/netns`.
    pub(crate) fn names() -> Vec<String> {
        let Ok(entries) = fs::read_dir(FOLDER) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }
}

const FOLDER: &str = "/run/netns";
