//! The CA's state in a directory of its own: keys and revocations in `ca.json`. `root-cert.pem` and `crl.pem` beside it
//! are for other programs.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use auth_ca_api::pem;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use rustls::pki_types::CertificateDer;
use tokio::sync::Mutex;

use super::{Store, StoreError, Stored};
use auth_support::files::{self, Readers};

/// Keys and revocations. Mode 0600.
pub(crate) const STATE: &str = "ca.json";
/// All trusted roots.
pub(crate) const ROOTS: &str = "root-cert.pem";
/// The embedded CA's root.
pub(crate) const EMBEDDED: &str = "root.pem";
const CRLS: &str = "crl.pem";
const LOCK: &str = "lock";
/// The record of issued certificates of earlier versions, which is not read any more.
const OLD_JOURNAL: &str = "issued.journal";

/// Largest state that is read, in bytes: some 100,000 revocations.
const MAX_STATE: u64 = 16 << 20;
const MAX_ROOT: u64 = 1 << 20;

/// Keeps the CA's state in a directory, which stays locked for as long as this exists.
#[derive(Debug)]
pub struct DirectoryStore {
    directory: PathBuf,
    /// Held during a write: writes follow one another.
    files: Arc<Mutex<Files>>,
}

#[derive(Debug)]
struct Files {
    steps: Steps,
    _lock: Flock<File>,
}

impl DirectoryStore {
    /// Locks `directory`, and creates it if it does not exist. Fails if another process uses it, or if others may write
    /// there.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_with(directory, Steps::default())
    }

    pub(crate) fn open_with(directory: &Path, steps: Steps) -> Result<Self, StoreError> {
        let failed = |path: &Path, error| failure(path, &error);
        files::create_own_directory(directory).map_err(|error| failed(directory, error))?;
        let path = directory.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed(&path, error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            if error == Errno::EWOULDBLOCK {
                return StoreError(format!(
                    "{}: another CA is using this directory: stop it, or give this one a directory of its own",
                    directory.display()
                ));
            }
            failed(&path, error.into())
        })?;
        for name in [STATE, ROOTS, CRLS] {
            let draft = draft_of(&directory.join(name));
            match fs::remove_file(&draft) {
                Ok(()) => {
                    tracing::info!(file = %draft.display(), "incomplete file of a crash removed")
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&draft, error)),
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            files: Arc::new(Mutex::new(Files { steps, _lock: lock })),
        })
    }

    fn read(&self) -> Result<Stored, StoreError> {
        let journal = self.directory.join(OLD_JOURNAL);
        if let Some(state) = read_private(&self.directory.join(STATE), MAX_STATE)? {
            if journal.exists() {
                tracing::info!(file = %journal.display(), "this version does not use the journal; it can be removed");
            }
            return Ok(Stored::State(state));
        }
        if journal.exists() {
            return Err(StoreError(format!(
                "{}: exists, but {STATE} does not: restore that from a backup, or remove the journal to start with a \
                 new root",
                journal.display()
            )));
        }
        let path = self.directory.join(EMBEDDED);
        let Some(root) = read_private(&path, MAX_ROOT)? else {
            return Ok(Stored::Nothing);
        };
        tracing::info!(file = %path.display(), "taking over the embedded CA's root");
        String::from_utf8(root)
            .map(Stored::EmbeddedRoot)
            .map_err(|_| StoreError(format!("{}: is not PEM", path.display())))
    }

    /// Replaces files on a thread where waiting for a disk blocks nothing else.
    async fn write(&self, all: Vec<(&'static str, u32, Vec<u8>)>) -> Result<(), StoreError> {
        let files = self.files.clone().lock_owned().await;
        let directory = self.directory.clone();
        let write = move || {
            all.iter().try_for_each(|(name, mode, content)| {
                let path = directory.join(name);
                let replaced = files.steps.replace(&path, content, *mode);
                replaced.map_err(|error| failure(&path, &error))
            })
        };
        let written = tokio::task::spawn_blocking(write).await;
        written.unwrap_or_else(|error| Err(StoreError(format!("the write failed: {error}"))))
    }
}

#[tonic::async_trait]
impl Store for DirectoryStore {
    async fn load(&self) -> Result<Stored, StoreError> {
        self.read()
    }

    async fn replace(&self, state: &[u8]) -> Result<(), StoreError> {
        self.write(vec![(STATE, 0o600, state.to_vec())]).await
    }

    async fn publish(
        &self,
        roots: &[CertificateDer<'static>],
        crls: &[Vec<u8>],
    ) -> Result<(), StoreError> {
        let crls: String = crls
            .iter()
            .map(|der| pem::encode("X509 CRL", der))
            .collect();
        let roots = (ROOTS, 0o644, pem::certificates(roots).into_bytes());
        self.write(vec![roots, (CRLS, 0o644, crls.into_bytes())])
            .await
    }
}

/// The system calls that replace a file. A crash between any two of them leaves the old or the new file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    #[cfg(test)]
    pub(crate) failures: tests::Failures,
}

fn draft_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.draft"))
}

impl Steps {
    fn replace(&self, path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        let draft = draft_of(path);
        let replaced = self
            .write_draft(&draft, content, mode)
            .and_then(|()| self.step(|| fs::rename(&draft, path)));
        if let Err(error) = replaced {
            // If this fails too, the next start removes the draft.
            let _ = self.step(|| fs::remove_file(&draft));
            return Err(error);
        }
        let directory = path.parent().unwrap_or(Path::new("."));
        self.step(|| File::open(directory)?.sync_all())
    }

    fn write_draft(&self, draft: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        match self.step(|| fs::remove_file(draft)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        #[cfg(test)]
        if self.failures.is_disk_full() {
            let _ = files::write_new(draft, &content[..content.len() / 2], mode);
            return Err(io::Error::from_raw_os_error(Errno::ENOSPC as i32));
        }
        self.step(|| files::write_new(draft, content, mode))
    }

    fn step(&self, call: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        #[cfg(test)]
        self.failures.before_step()?;
        call()
    }
}

/// Reads a file that only the CA's user may access; `None` if it does not exist.
fn read_private(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    match files::read_own(path, limit, Readers::Nobody) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failure(path, &error)),
    }
}

fn failure(path: &Path, error: &io::Error) -> StoreError {
    let next = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; nothing was changed. Make room there: the CA then continues by itself"
        }
        _ => "",
    };
    StoreError(format!("{}: {error}{next}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        os::unix::fs::PermissionsExt,
        sync::{Mutex, PoisonError},
    };

    use super::*;

    /// What fails from when on.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Failures(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        steps: usize,
        crash_after: Option<usize>,
        full: bool,
    }

    impl Failures {
        /// Nothing happens any more after so many steps.
        pub(crate) fn crash_after(steps: usize) -> Self {
            let failures = Self::default();
            failures.state().crash_after = Some(steps);
            failures
        }

        pub(crate) fn fill_disk(&self, full: bool) {
            self.state().full = full;
        }

        pub(super) fn is_disk_full(&self) -> bool {
            self.state().full
        }

        pub(crate) fn crashed(&self) -> bool {
            let state = self.state();
            state.crash_after.is_some_and(|after| state.steps > after)
        }

        pub(super) fn before_step(&self) -> io::Result<()> {
            self.state().steps += 1;
            match self.crashed() {
                true => Err(io::Error::other("crashed")),
                false => Ok(()),
            }
        }

        fn state(&self) -> std::sync::MutexGuard<'_, State> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    pub(crate) fn open_failing(directory: &Path, failures: &Failures) -> DirectoryStore {
        let failures = failures.clone();
        DirectoryStore::open_with(directory, Steps { failures }).unwrap()
    }

    async fn load(directory: &Path) -> Result<Stored, StoreError> {
        DirectoryStore::open(directory)?.load().await
    }

    fn error<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
        result.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn keeps_the_last_state() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/ca");
        assert_eq!(load(&path).await.unwrap(), Stored::Nothing);
        let store = DirectoryStore::open(&path).unwrap();
        let second = error(DirectoryStore::open(&path));
        assert!(second.contains("another CA is using this directory"));
        store.replace(b"one").await.unwrap();
        store.replace(b"two").await.unwrap();
        drop(store);
        assert_eq!(load(&path).await.unwrap(), Stored::State(b"two".into()));
        for (name, mode) in [("", 0o700), (STATE, 0o600)] {
            let found = fs::metadata(path.join(name)).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{name}");
        }
    }

    #[tokio::test]
    async fn refuses_unsafe_directories_and_files() {
        let folder = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(folder.path()).unwrap();
        store.replace(b"state").await.unwrap();
        drop(store);
        let mode = |name: &str, mode| {
            let permissions = fs::Permissions::from_mode(mode);
            fs::set_permissions(folder.path().join(name), permissions).unwrap();
        };
        mode("", 0o770);
        let why = error(load(folder.path()).await);
        assert!(why.contains("mode 770 lets others write") && why.contains("chmod 700"));
        mode("", 0o700);
        mode(STATE, 0o644);
        let why = error(load(folder.path()).await);
        assert!(why.contains(STATE) && why.contains("chmod 600"), "{why}");
        mode(STATE, 0o600);
        fs::write(folder.path().join(OLD_JOURNAL), "").unwrap();
        load(folder.path()).await.unwrap();
        fs::remove_file(folder.path().join(STATE)).unwrap();
        let why = error(load(folder.path()).await);
        assert!(why.contains("from a backup"), "{why}");
    }
}
