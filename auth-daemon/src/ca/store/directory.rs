//! A folder of this CA alone.
//!
//! `ca.json` holds keys and revocations, `issued.journal` what was issued. `root-cert.pem` and `crl.pem` are for whoever
//! wants to look.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use tokio::sync::{mpsc, oneshot};

use super::{
    Kept, Store, StoreError, Stored,
    disk::{Disk, draft_of},
    journal, record,
};
use crate::ca::{
    authority::{IssuedRecord, Published},
    files, pem,
    state::Core,
};

/// Keys and revocations. Mode 0600.
pub(in crate::ca) const CORE: &str = "ca.json";
/// What was issued. Mode 0600.
const JOURNAL: &str = "issued.journal";
const LOCK: &str = "lock";
/// All roots that are believed.
pub(in crate::ca) const ROOTS: &str = "root-cert.pem";
const CRLS: &str = "crl.pem";
/// What the embedded CA keeps its root in.
pub(in crate::ca) const EMBEDDED: &str = "root.pem";

/// Longest state that is read, in bytes: some 100,000 revocations.
const MAX_CORE: u64 = 16 << 20;
/// Longest journal that is read, in bytes: tens of millions of certificates.
const MAX_JOURNAL: u64 = 4 << 30;
/// Requests that wait for the writer.
const QUEUE: usize = 4096;
/// A journal that is shorter is not worth a rewrite, in bytes.
const WORTH_PRUNING: u64 = 64 * 1024;

/// Keeps a CA's state in a folder. One writes at a time: the folder is locked for as long as this lives.
pub struct DirectoryStore {
    directory: PathBuf,
    /// `None` only while this is dropped.
    queue: Option<mpsc::Sender<Request>>,
    writer: Option<JoinHandle<()>>,
}

type Reply<T> = oneshot::Sender<Result<T, StoreError>>;

enum Request {
    Load(Reply<Option<Kept>>),
    Keep(Vec<u8>, Reply<()>),
    Record(Vec<u8>, Reply<()>),
    Prune(u64, Reply<()>),
    Publish(Vec<(&'static str, String)>, Reply<()>),
}

impl DirectoryStore {
    /// Takes `directory`, making it if there is none. Fails if another process has it, or if others may write there.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        Self::open_on(directory, Disk::default())
    }

    pub(in crate::ca) fn open_on(directory: &Path, disk: Disk) -> Result<Self, StoreError> {
        let failed = |path: &Path, error| fault(path, &error);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| failed(directory, error))?;
        let metadata = fs::metadata(directory).map_err(|error| failed(directory, error))?;
        if let Some(what) = files::writable_by_others(&metadata) {
            return Err(StoreError(format!(
                "{}: {what}: somebody else could put a state of their own here. Give it to the CA's user and run \
                 `chmod 700 {}`",
                directory.display(),
                directory.display()
            )));
        }
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
                    "{}: another CA is using this folder: stop it, or give this one a folder of its own",
                    directory.display()
                ));
            }
            failed(&path, error.into())
        })?;
        for name in [CORE, JOURNAL, ROOTS, CRLS] {
            let draft = draft_of(&directory.join(name));
            match fs::remove_file(&draft) {
                Ok(()) => tracing::info!(file = %draft.display(), "removed what a crash has left"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&draft, error)),
            }
        }
        let (queue, requests) = mpsc::channel(QUEUE);
        let writer = Writer {
            directory: directory.to_owned(),
            disk,
            journal: None,
            _lock: lock,
        };
        let thread = std::thread::Builder::new()
            .name("ca-store".into())
            .spawn(move || writer.run(requests))
            .map_err(|error| failed(directory, error))?;
        Ok(Self {
            directory: directory.to_owned(),
            queue: Some(queue),
            writer: Some(thread),
        })
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, StoreError> {
        let ended = || {
            StoreError(format!(
                "{}: the writer has ended",
                self.directory.display()
            ))
        };
        let (reply, answer) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or_else(ended)?;
        queue.send(request(reply)).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

impl Store for DirectoryStore {
    fn load(&self) -> Stored<'_, Option<Kept>> {
        Box::pin(self.ask(Request::Load))
    }

    fn keep<'a>(&'a self, core: &'a [u8]) -> Stored<'a, ()> {
        Box::pin(self.ask(|reply| Request::Keep(core.to_vec(), reply)))
    }

    fn record<'a>(&'a self, issued: &'a [IssuedRecord]) -> Stored<'a, ()> {
        Box::pin(async move {
            let mut payload = Vec::new();
            for record in issued {
                record::encode(record, &mut payload)
                    .ok_or_else(|| StoreError("the node's name is too long to be kept".into()))?;
                if payload.len() > journal::MAX_PAYLOAD / 2 {
                    let full = std::mem::take(&mut payload);
                    self.ask(|reply| Request::Record(full, reply)).await?;
                }
            }
            if payload.is_empty() {
                return Ok(());
            }
            self.ask(|reply| Request::Record(payload, reply)).await
        })
    }

    fn prune(&self, now: u64) -> Stored<'_, ()> {
        Box::pin(self.ask(move |reply| Request::Prune(now, reply)))
    }

    fn publish<'a>(&'a self, published: &'a Published) -> Stored<'a, ()> {
        let roots = published
            .roots
            .iter()
            .map(|der| pem::certificate(der))
            .collect();
        let crls = published
            .crls
            .iter()
            .map(|der| pem::encode("X509 CRL", der))
            .collect();
        Box::pin(self.ask(move |reply| Request::Publish(vec![(ROOTS, roots), (CRLS, crls)], reply)))
    }
}

impl Drop for DirectoryStore {
    fn drop(&mut self) {
        self.queue = None;
        // So that whoever comes next finds the folder free.
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl fmt::Debug for DirectoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DirectoryStore")
            .field(&self.directory)
            .finish()
    }
}

/// The thread that owns the files: nothing async waits for a disk, and many records share one sync.
struct Writer {
    directory: PathBuf,
    disk: Disk,
    /// `None` until it was read, and after a failure that leaves its length unknown.
    journal: Option<Journal>,
    _lock: Flock<File>,
}

struct Journal {
    file: File,
    /// How much of it is good.
    length: u64,
    /// A part of a write that failed may follow.
    torn: bool,
}

impl Writer {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut next = None;
        while let Some(request) = next.take().or_else(|| requests.blocking_recv()) {
            // Nobody waits for an answer any more? Then that is that.
            match request {
                Request::Load(reply) => drop(reply.send(self.load())),
                Request::Keep(core, reply) => drop(reply.send(self.put(CORE, &core, 0o600))),
                Request::Prune(now, reply) => drop(reply.send(self.prune(now))),
                Request::Publish(files, reply) => {
                    let put =
                        |(name, text): &(&str, String)| self.put(name, text.as_bytes(), 0o644);
                    drop(reply.send(files.iter().try_for_each(put)));
                }
                Request::Record(mut payload, reply) => {
                    let mut replies = vec![reply];
                    // All that came meanwhile goes with it.
                    loop {
                        match requests.try_recv() {
                            Ok(Request::Record(more, reply))
                                if payload.len() + more.len() <= journal::MAX_PAYLOAD =>
                            {
                                payload.extend_from_slice(&more);
                                replies.push(reply);
                            }
                            Ok(other) => {
                                next = Some(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    let result = self.record(&payload);
                    for reply in replies {
                        let result = result.as_ref().copied();
                        drop(reply.send(result.map_err(|error| StoreError(error.0.clone()))));
                    }
                }
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn put(&self, name: &str, content: &[u8], mode: u32) -> Result<(), StoreError> {
        let path = self.path(name);
        self.disk
            .replace(&path, content, mode)
            .map_err(|error| fault(&path, &error))
    }

    fn load(&mut self) -> Result<Option<Kept>, StoreError> {
        let Some(core) = read_private(&self.path(CORE), MAX_CORE)? else {
            return self.inherit();
        };
        let issued = self.open_journal()?;
        Ok(Some(Kept { core, issued }))
    }

    /// The state of a CA that has the embedded one's root, where there is one.
    fn inherit(&self) -> Result<Option<Kept>, StoreError> {
        let journal = self.path(JOURNAL);
        if journal.exists() {
            return Err(StoreError(format!(
                "{}: is here, but {CORE} is not: put that back from a backup, or take the journal away to begin anew \
                 with a new root",
                journal.display()
            )));
        }
        let path = self.path(EMBEDDED);
        let Some(root) = read_private(&path, 1 << 20)? else {
            return Ok(None);
        };
        let damaged = |what: String| StoreError(format!("{}: {what}", path.display()));
        let root = String::from_utf8(root).map_err(|_| damaged("is not PEM".into()))?;
        let core = Core::of_embedded(&root).map_err(damaged)?;
        tracing::info!(file = %path.display(), "the embedded CA's root is taken over");
        Ok(Some(Kept {
            core: core.to_json(),
            issued: Vec::new(),
        }))
    }

    /// Reads the journal, and cuts off what a crash has left at its end.
    fn open_journal(&mut self) -> Result<Vec<IssuedRecord>, StoreError> {
        self.journal = None;
        let path = self.path(JOURNAL);
        let Some(bytes) = read_private(&path, MAX_JOURNAL)? else {
            return Ok(Vec::new());
        };
        let contents = journal::read(&bytes).map_err(|what| {
            StoreError(format!(
                "{}: {what}: put it back from a backup. Without it the CA does not know which certificates a node was \
                 given",
                path.display()
            ))
        })?;
        let failed = |error| fault(&path, &error);
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(failed)?;
        if contents.length < bytes.len() {
            tracing::warn!(
                file = %path.display(), bytes = bytes.len() - contents.length,
                "cut off the rest of a write that a crash has ended; nothing in it was handed out"
            );
            self.disk
                .truncate(&file, contents.length as u64)
                .map_err(failed)?;
        }
        self.journal = Some(Journal {
            file,
            length: contents.length as u64,
            torn: false,
        });
        Ok(contents.records)
    }

    fn record(&mut self, payload: &[u8]) -> Result<(), StoreError> {
        let path = self.path(JOURNAL);
        if self.journal.is_none() {
            if !path.exists() {
                self.put(JOURNAL, journal::HEADER, 0o600)?;
            }
            self.open_journal()?;
        }
        let Some(journal) = &mut self.journal else {
            return Err(StoreError(format!("{}: has gone", path.display())));
        };
        let frame = journal::frame(payload);
        let written = journal.write(&self.disk, &frame);
        written.map_err(|error| fault(&path, &error))
    }

    fn prune(&mut self, now: u64) -> Result<(), StoreError> {
        if self
            .journal
            .as_ref()
            .is_none_or(|journal| journal.length < WORTH_PRUNING)
        {
            return Ok(());
        }
        let records = self.open_journal()?;
        let live = || records.iter().filter(|record| record.not_after >= now);
        if live().count() * 2 > records.len() {
            return Ok(());
        }
        // Whichever of both is in place afterwards, it is opened anew.
        self.journal = None;
        self.put(JOURNAL, &journal::whole(live()), 0o600)?;
        self.open_journal().map(drop)
    }
}

impl Journal {
    fn write(&mut self, disk: &Disk, frame: &[u8]) -> io::Result<()> {
        if self.torn {
            disk.truncate(&self.file, self.length)?;
            self.torn = false;
        }
        if let Err(error) = disk.append(&self.file, frame) {
            // Before anything else is written: else it would be damage in the middle.
            self.torn = disk.truncate(&self.file, self.length).is_err();
            return Err(error);
        }
        self.length += frame.len() as u64;
        Ok(())
    }
}

/// Reads a file that must be the CA's alone; `None` where there is none.
fn read_private(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fault(path, &error)),
    };
    // Of the open file: nobody can put another in its place meanwhile.
    let metadata = file.metadata().map_err(|error| fault(path, &error))?;
    if let Some(what) = files::writable_by_others(&metadata) {
        return Err(StoreError(format!(
            "{}: {what}: somebody else may have changed it",
            path.display()
        )));
    }
    if let Some(mode) = files::exposed_mode(&metadata) {
        return Err(StoreError(format!(
            "{}: mode {mode:03o} lets others than its owner in; what is in it may be known to them. If it is not, run \
             `chmod 600 {}`",
            path.display(),
            path.display()
        )));
    }
    let content = files::read_at_most(&mut file, limit).map_err(|error| fault(path, &error))?;
    Ok(Some(content))
}

fn fault(path: &Path, error: &io::Error) -> StoreError {
    let next = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; nothing was changed. Make room there: it goes on by itself"
        }
        _ => "",
    };
    StoreError(format!("{}: {error}{next}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::{super::disk::tests::Faults, *};

    fn record(number: u64, not_after: u64) -> IssuedRecord {
        let mut serial = [0x40; 16];
        serial[8..].copy_from_slice(&number.to_be_bytes());
        IssuedRecord {
            serial,
            not_after,
            signer: 1,
            identity: "spiffe://cluster.local/ns/default/sa/web".parse().unwrap(),
            node: Some("node-a".into()),
        }
    }

    async fn load(folder: &Path) -> Option<Kept> {
        DirectoryStore::open(folder).unwrap().load().await.unwrap()
    }

    fn error<T: fmt::Debug>(result: Result<T, StoreError>) -> String {
        result.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn keeps_what_it_gets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/ca");
        assert!(load(&path).await.is_none());
        let store = DirectoryStore::open(&path).unwrap();
        assert!(error(DirectoryStore::open(&path)).contains("another CA is using this folder"));
        store.keep(b"one").await.unwrap();
        store.keep(b"two").await.unwrap();
        let many: Vec<_> = (0..20_000).map(|n| record(n, 5)).collect();
        store.record(&many).await.unwrap();
        store.record(&[record(20_000, 6)]).await.unwrap();
        store.record(&[]).await.unwrap();
        drop(store);
        let kept = load(&path).await.unwrap();
        assert_eq!(kept.core, b"two");
        assert_eq!(kept.issued.len(), 20_001);
        assert_eq!(kept.issued[..20_000], many);
        for (name, mode) in [("", 0o700), (CORE, 0o600), (JOURNAL, 0o600)] {
            let found = fs::metadata(path.join(name)).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{name}");
        }
    }

    #[tokio::test]
    async fn forgets_when_most_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(folder.path()).unwrap();
        store.keep(b"core").await.unwrap();
        let many: Vec<_> = (0..10_000).map(|n| record(n, n)).collect();
        store.record(&many).await.unwrap();
        let length = || fs::metadata(folder.path().join(JOURNAL)).unwrap().len();
        let before = length();
        store.prune(4_000).await.unwrap();
        assert_eq!(length(), before, "not worth it yet");
        store.prune(9_000).await.unwrap();
        assert!(length() < before / 5);
        store.record(&[record(10_000, 10_000)]).await.unwrap();
        drop(store);
        let kept = load(folder.path()).await.unwrap().issued;
        assert_eq!(kept[..1000], many[9000..]);
        assert_eq!(kept.len(), 1001);
    }

    #[tokio::test]
    async fn refuses_folders_and_files_that_are_not_safe() {
        let folder = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(folder.path()).unwrap();
        store.keep(b"core").await.unwrap();
        store.record(&[record(1, 1)]).await.unwrap();
        drop(store);
        let mode = |name: &str, mode| {
            fs::set_permissions(folder.path().join(name), fs::Permissions::from_mode(mode))
                .unwrap();
        };
        mode("", 0o770);
        let why = error(DirectoryStore::open(folder.path()));
        assert!(
            why.contains("mode 770 lets others write") && why.contains("chmod 700"),
            "{why}"
        );
        mode("", 0o700);
        for name in [CORE, JOURNAL] {
            mode(name, 0o644);
            let why = error(DirectoryStore::open(folder.path()).unwrap().load().await);
            assert!(why.contains(name) && why.contains("chmod 600"), "{why}");
            mode(name, 0o600);
        }
        fs::rename(folder.path().join(CORE), folder.path().join("away")).unwrap();
        let why = error(DirectoryStore::open(folder.path()).unwrap().load().await);
        assert!(why.contains("back from a backup"), "{why}");
    }

    #[tokio::test]
    async fn cuts_a_torn_end_and_refuses_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(JOURNAL);
        let store = DirectoryStore::open(folder.path()).unwrap();
        store.keep(b"core").await.unwrap();
        for n in 0..3 {
            store.record(&[record(n, 5)]).await.unwrap();
        }
        drop(store);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let store = DirectoryStore::open(folder.path()).unwrap();
        assert_eq!(store.load().await.unwrap().unwrap().issued.len(), 2);
        store.record(&[record(7, 5)]).await.unwrap();
        drop(store);
        let serials: Vec<_> = load(folder.path()).await.unwrap().issued;
        assert_eq!(serials, [record(0, 5), record(1, 5), record(7, 5)]);
        let mut damaged = whole;
        damaged[journal::HEADER.len() + 30] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let why = error(DirectoryStore::open(folder.path()).unwrap().load().await);
        assert!(why.contains("damaged between byte 8"), "{why}");
        assert_eq!(fs::read(&path).unwrap(), damaged, "left as it is");
    }

    #[tokio::test]
    async fn a_crash_leaves_the_old_or_the_new() {
        for steps in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let store = DirectoryStore::open(folder.path()).unwrap();
            store.keep(b"old").await.unwrap();
            let many: Vec<_> = (0..1000).map(|n| record(n, n)).collect();
            store.record(&many).await.unwrap();
            drop(store);
            let faults = Faults::crash_after(steps);
            let disk = Disk {
                faults: faults.clone(),
            };
            let store = DirectoryStore::open_on(folder.path(), disk).unwrap();
            store.load().await.unwrap();
            let kept = store.keep(b"new").await.is_ok();
            let recorded = store.record(&[record(5000, 5000)]).await.is_ok();
            let pruned = store.prune(900).await.is_ok();
            let again = store.record(&[record(6000, 6000)]).await.is_ok();
            drop(store);
            let found = load(folder.path()).await.unwrap();
            assert!(
                found.core == b"new" || !kept && found.core == b"old",
                "after {steps}"
            );
            assert!(found.issued.contains(&record(999, 999)));
            assert!(
                !recorded || found.issued.contains(&record(5000, 5000)),
                "after {steps}"
            );
            assert!(
                !again || found.issued.contains(&record(6000, 6000)),
                "after {steps}"
            );
            assert!(!pruned || found.issued.len() < 200, "after {steps}");
            if !faults.crashed() {
                assert!(steps > 10);
                return;
            }
        }
    }

    #[tokio::test]
    async fn a_full_disk_fails_what_is_asked_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let faults = Faults::default();
        let disk = Disk {
            faults: faults.clone(),
        };
        let store = DirectoryStore::open_on(folder.path(), disk).unwrap();
        store.keep(b"old").await.unwrap();
        store.record(&[record(1, 5)]).await.unwrap();
        let length = || fs::metadata(folder.path().join(JOURNAL)).unwrap().len();
        let before = length();
        faults.fill(true);
        for _ in 0..3 {
            let why = error(store.record(&[record(2, 5)]).await);
            assert!(
                why.contains(JOURNAL) && why.contains("No space left"),
                "{why}"
            );
            assert_eq!(length(), before, "nothing half-written is left");
            assert!(error(store.keep(b"new").await).contains(CORE));
        }
        faults.fill(false);
        store.record(&[record(3, 5)]).await.unwrap();
        drop(store);
        let kept = load(folder.path()).await.unwrap();
        assert_eq!(kept.core, b"old");
        assert_eq!(kept.issued, [record(1, 5), record(3, 5)]);
    }

    /// The kernel's own "file too large": this test again, in a process that may not write more than 64 KiB into a file.
    #[tokio::test]
    async fn a_limit_of_the_kernels_fails_what_is_asked_and_nothing_else() {
        const FOLDER: &str = "DIRECTORY_STORE_TEST_FOLDER";
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        if let Some(folder) = std::env::var_os(FOLDER) {
            let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
            setrlimit(Resource::RLIMIT_FSIZE, 64 * 1024, hard).unwrap();
            let store = DirectoryStore::open(Path::new(&folder)).unwrap();
            let mut done = 0;
            let why = loop {
                match store.record(&[record(done, 5)]).await {
                    Ok(()) => done += 1,
                    Err(why) => break why.to_string(),
                }
            };
            assert!(why.contains("File too large"), "{why}");
            assert!(done > 100 && done < 1000, "{done}");
            error(store.keep(&[b'x'; 70_000]).await);
            setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
            store.record(&[record(done, 5)]).await.unwrap();
            drop(store);
            let kept = load(Path::new(&folder)).await.unwrap();
            assert_eq!((kept.core.len(), kept.issued.len() as u64), (4, done + 1));
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(folder.path()).unwrap();
        store.keep(b"core").await.unwrap();
        drop(store);
        // Ignored signals stay so over exec: SIGXFSZ would end the process where write(2) is to fail.
        let child = std::process::Command::new("sh")
            .args(["-c", "trap '' XFSZ; exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("ca::store::directory::tests::a_limit_of_the_kernels_fails_what_is_asked_and_nothing_else")
            .env(FOLDER, folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success() && said.contains("1 passed"),
            "{said}"
        );
    }
}
