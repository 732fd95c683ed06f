//! Network namespaces: identifying them, and entering one on the current thread.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use socket2::{Domain, Socket, Type};

use super::interfaces;

/// A network namespace (netns), held by a file descriptor.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: u64,
    inode: u64,
    path: PathBuf,
    /// Whether the path is the name of the netns. Otherwise it is only for display.
    is_named: bool,
}

impl Netns {
    /// Opens the netns at `path`: a mount such as /run/netns/x, or /proc/PID/ns/net. Fails at once for any other file, also
    /// for one that an ordinary open would wait for (a FIFO).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)?;
        Self::new(file, Some(path.to_owned()))
    }

    /// Opens the daemon's own netns, which is the node's.
    pub(super) fn the_daemons() -> io::Result<Self> {
        Self::nameless(home()?.try_clone()?)
    }

    /// Creates a netns without a name from `file`.
    pub(super) fn nameless(file: File) -> io::Result<Self> {
        Self::new(file, None)
    }

    fn new(file: File, name: Option<PathBuf>) -> io::Result<Self> {
        // The inode number of any other file would be taken for a netns, and lead to confusing errors later.
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "is not a network namespace",
            ));
        }
        let inode = file.metadata()?.ino();
        let mut netns = Self {
            file,
            cookie: 0,
            inode,
            is_named: name.is_some(),
            // The format of namespaces(7).
            path: name.unwrap_or_else(|| format!("net:[{inode}]").into()),
        };
        netns.cookie = netns.enter(read_cookie)??;
        Ok(netns)
    }

    /// Creates a netns that only has a cookie.
    #[cfg(test)]
    pub(crate) fn imagined(cookie: u64) -> Self {
        Self {
            file: File::open("/dev/null").unwrap(),
            cookie,
            inode: cookie,
            path: PathBuf::new(),
            is_named: false,
        }
    }

    /// Creates a netns. Needs root.
    #[cfg(test)]
    pub(crate) fn create() -> io::Result<Self> {
        // On a thread of its own, because it enters what it creates.
        let creating = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)?;
            Self::nameless(File::open("/proc/thread-self/ns/net")?)
        });
        creating.join().unwrap()
    }

    /// The kernel's number for the netns, as seen by the eBPF programs (SO_NETNS_COOKIE, Linux 5.14). Never reused.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The path where it was found, or a description if it has no name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its inode number, which is unique among all netns while this one is held.
    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Whether its path now leads to another netns. A path that leads to none is no evidence: the process that it
    /// referred to may have exited while others of the pod live on.
    pub fn is_replaced(&self) -> bool {
        self.is_named
            && std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() != self.inode)
    }

    /// Whether this is the daemon's own netns or that of the machine's first process, which belong to the node and
    /// never to a pod.
    pub fn is_the_nodes(&self) -> bool {
        the_nodes().contains(&self.inode)
    }

    /// The first address of each family with more than link scope, on an interface that is up. A pod with the
    /// capability can set its own addresses, so they do not identify it.
    pub fn own_addresses(&self) -> io::Result<Vec<IpAddr>> {
        let addresses = self
            .enter(interfaces::addresses_up)??
            .filter(|address| match address {
                IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
                IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
            });
        let (mut first_v4, mut first_v6) = (None, None);
        for address in addresses {
            if address.is_ipv4() {
                first_v4.get_or_insert(address);
            } else {
                first_v6.get_or_insert(address);
            }
        }
        Ok(first_v4.into_iter().chain(first_v6).collect())
    }

    /// Duplicates the descriptor that holds it.
    pub(super) fn try_clone_file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Runs `action` on the current thread inside the netns. `action` must not start threads.
    pub fn enter<T>(&self, action: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let _back = Back(home);
        Ok(action())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The netns of the machine's first process.
const FIRST_PROCESS: &str = "/proc/1/ns/net";

/// Inode numbers of the node's netns: the daemon's own and that of the machine's first process. The daemon's own is not
/// /proc/self/ns/net at this moment, which leads to the netns that the main thread has entered ([`Netns::enter`]).
pub(super) fn the_nodes() -> Vec<u64> {
    let own = home().and_then(File::metadata);
    let first = std::fs::metadata(FIRST_PROCESS);
    let found = [own, first].into_iter().flatten();
    found.map(|metadata| metadata.ino()).collect()
}

/// Opens the node's netns, as [`the_nodes`].
pub(super) fn open_the_nodes() -> Vec<File> {
    let own = home().and_then(File::try_clone);
    [own, File::open(FIRST_PROCESS)]
        .into_iter()
        .flatten()
        .collect()
}

/// Returns the thread to the daemon's netns, even if the action panics.
struct Back(&'static File);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // Every further socket of this thread would belong to the pod's netns.
            eprintln!("cannot return to the daemon's network namespace: {error}; aborting");
            std::process::abort();
        }
    }
}

fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let file = File::open("/proc/self/ns/net")?;
    Ok(HOME.get_or_init(|| file))
}

/// Cookie of the current thread's netns.
fn read_cookie() -> io::Result<u64> {
    socket_cookie(Socket::new(Domain::UNIX, Type::DGRAM, None)?.as_fd())
}

/// Returns the cookie of the netns that a socket belongs to: the one that it was created in. A connection that was accepted from
/// a Unix socket belongs to the netns of the socket that has connected. No process can change it (SO_NETNS_COOKIE, Linux 5.14).
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` is eight writable bytes and `length` says so; the descriptor lives.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// All netns that are held by a process or a mount, each once.
pub(super) fn all() -> Vec<Netns> {
    let mut seen = std::collections::HashSet::new();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, path) = (fields.next()?, fields.next()?);
        root.starts_with("net:[").then(|| PathBuf::from(path))
    });
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let entered = processes
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .map(|entry| entry.path().join("ns/net"));
    mounted
        .chain(entered)
        .filter(|path| std::fs::metadata(path).is_ok_and(|m| seen.insert(m.ino())))
        .filter_map(|path| Netns::open(&path).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn a_fifo_is_no_netns_and_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let error = Netns::open(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
