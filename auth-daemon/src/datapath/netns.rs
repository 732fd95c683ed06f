//! Network namespaces: entering one on the current thread, and telling one from another.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use socket2::{Domain, Socket, Type};

/// A network namespace, held by a file descriptor.
#[derive(Debug)]
pub struct Netns {
    file: File,
    cookie: u64,
    inode: u64,
    path: PathBuf,
}

impl Netns {
    /// Opens the namespace that `path` names: a mount such as /run/netns/x, or /proc/PID/ns/net.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        // Anything else would give its inode number for a namespace's, and fail later and stranger.
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
            path: path.to_owned(),
        };
        netns.cookie = netns.enter(read_cookie)??;
        Ok(netns)
    }

    /// The kernel's name for it, as the programs see it (SO_NETNS_COOKIE, Linux 5.14). Never used again.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path names another namespace by now. A path that names none says nothing of the pod: the process that
    /// it went by may have ended while others of the pod live on.
    pub fn is_replaced(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.ino() != self.inode)
    }

    /// Whether this is the daemon's own namespace, or that of the machine's first process: a node's, never a pod's.
    pub fn is_the_nodes(&self) -> bool {
        ["/proc/self/ns/net", "/proc/1/ns/net"]
            .into_iter()
            .any(|path| std::fs::metadata(path).is_ok_and(|m| m.ino() == self.inode))
    }

    /// Runs `action` on this thread inside the namespace. `action` must not start threads.
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

/// Brings the thread home, also when the action panics.
struct Back(&'static File);

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // Every socket that this thread made from here on would be some pod's.
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

/// The cookie of the namespace that this thread is in.
fn read_cookie() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
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

/// Every network namespace that a process is in or a mount holds, once each.
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
