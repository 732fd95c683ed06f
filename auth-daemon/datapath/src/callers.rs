//! Attests who has connected to a Unix socket of the node: a process of the pod that the connection's netns belongs to.
//!
//! The kernel gives two proofs. The connection belongs to the netns that the caller's socket was created in
//! (SO_NETNS_COOKIE), as if the caller had connected to a listener inside the pod. And the kernel knows the process that
//! called connect(2), whoever holds the descriptor now (SO_PEERPIDFD): that process must be in the pod's cgroup and netns, too.
//! So a socket that one pod hands to another is worth nothing to either.

use std::{
    collections::HashSet,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixListener},
    },
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        getsockopt,
        sockopt::{PeerCredentials, PeerPidfd},
    },
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::sync::{mpsc, oneshot};

use super::{
    Netns, PodUid,
    containers::{container, pods_around},
    hierarchies::{Hierarchies, see_as_the_node},
    netns::socket_cookie,
    processes::{Folder, open_at, read_at},
    sockets::set_option,
};
use auth_mesh::Workload;

/// Number of callers that may wait for their attestation. Further ones wait for these.
const WAITING: usize = 64;
/// Number of connections that may wait to be accepted.
const BACKLOG: i32 = 128;
/// Interval at which to read the mounts of cgroups again.
const MOUNTS: Duration = Duration::from_secs(10);
/// Socket option, which the libc crate does not have (Linux 6.16). Its number is the same on all architectures that the daemon
/// is built for.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Listens at `path`. Callers cannot pass descriptors, if the kernel knows how to refuse them (Linux 6.16): to close one may
/// take a caller as long as it likes, in the thread that reads the connection. Also returns whether they are refused.
pub fn listen_at(path: &Path) -> io::Result<(UnixListener, bool)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    // Connections inherit it, and some may be made as soon as it listens.
    let refused = set_option(socket.as_fd(), libc::SOL_SOCKET, SO_PASSRIGHTS, 0);
    let refuses_rights = match refused {
        Ok(()) => true,
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => false,
        Err(error) => return Err(error),
    };
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    Ok((socket.into(), refuses_rights))
}

/// The other end of a connection to a Unix socket, as the kernel knew it when it connected.
#[derive(Debug)]
pub struct Caller {
    /// Cookie of the netns that its socket was created in. No process can choose it for a socket.
    pub cookie: u64,
    /// ID of the process that connected. 0 if the daemon cannot see the process.
    pub pid: u32,
    /// Its user.
    pub user: u32,
    /// The process, or why it cannot be examined.
    process: Result<OwnedFd, Errno>,
}

impl Caller {
    /// Reads who is at the other end of `connection`, which was accepted from a Unix socket.
    pub fn of(connection: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = getsockopt(&connection, PeerCredentials)?;
        let pid = credentials.pid();
        let process = match getsockopt(&connection, PeerPidfd) {
            // Before Linux 6.5. The number may be another process's by now, which must then prove the same as this one.
            Err(Errno::ENOPROTOOPT) => open_process(pid),
            opened => opened,
        };
        Ok(Self {
            cookie: socket_cookie(connection)?,
            pid: u32::try_from(pid).unwrap_or(0),
            user: credentials.uid(),
            process,
        })
    }

    fn is_running(&self) -> bool {
        let Ok(process) = &self.process else {
            return false;
        };
        // A descriptor of a process becomes readable when the process ends (pidfd_open(2)).
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// Reads what is known of its process, which has not exited meanwhile.
    fn see(&self, hierarchies: &Hierarchies, around: &HashSet<PodUid>) -> Result<Seen, NotOfPod> {
        if self.pid == 0 {
            return Err(NotOfPod::Invisible);
        }
        if let Err(error) = self.process {
            return Err(unopened(error));
        }
        let folder = Path::new("/proc").join(self.pid.to_string());
        let folder = Folder::open(&folder).ok_or(NotOfPod::Exited)?;
        let (mut buffer, mut again) = (Vec::new(), Vec::new());
        let seen = (|| {
            let cgroups = read_at(&folder.0, "cgroup", &mut buffer)?;
            let netns = fs::File::from(open_at(&folder.0, "ns/net")?);
            let netns = netns.metadata()?.ino();
            if read_at(&folder.0, "cgroup", &mut again)? != cgroups {
                return Err(io::Error::other("it has just moved to another cgroup"));
            }
            let pod = container(&cgroups, around).map(|(pod, _)| pod);
            let mut named = pods_around(&cgroups);
            named.retain(|pod| !around.contains(pod));
            Ok(Seen {
                pod: pod.filter(|pod| hierarchies.is_the_nodes(&cgroups, *pod)),
                is_named_pods: !named.is_empty(),
                netns,
            })
        })();
        // As long as it runs, no other process has its number.
        match seen {
            _ if !self.is_running() => Err(NotOfPod::Exited),
            Ok(seen) => Ok(seen),
            Err(error) => Err(NotOfPod::Unreadable(error)),
        }
    }
}

/// Why a caller is not attested whose process the kernel opens only with an error.
fn unopened(error: Errno) -> NotOfPod {
    match error {
        // What the versions of Linux answer for a process that is gone. The last one is that of a socket without a process.
        Errno::ESRCH | Errno::EINVAL | Errno::ENODATA => NotOfPod::Exited,
        // For example no more descriptors.
        error => NotOfPod::Unreadable(error.into()),
    }
}

/// pidfd_open(2), Linux 5.3.
fn open_process(pid: libc::pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: the call takes two numbers and returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match libc::c_int::try_from(fd) {
        // SAFETY: the kernel has just opened it for this process, and nothing else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Errno::last()),
    }
}

/// What is known of a caller's process.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// The pod in whose cgroup it is.
    pod: Option<PodUid>,
    /// Whether any of its cgroups is named like a pod's, whoever made it.
    is_named_pods: bool,
    /// Inode number of its netns.
    netns: u64,
}

/// Why a caller is not attested.
#[derive(Debug, thiserror::Error)]
pub enum NotOfPod {
    /// The daemon is not in the PID namespace of the node.
    #[error("the daemon cannot see its process: does it see the node's processes (hostPID: true)?")]
    Invisible,
    /// It has exited, so nothing is known about it.
    #[error("its process has exited")]
    Exited,
    /// The process's folder in /proc cannot be read.
    #[error("its process cannot be examined: {0}")]
    Unreadable(io::Error),
    /// It belongs to another pod.
    #[error("its process is in the cgroup of pod {0}, and its socket is another pod's")]
    OtherPod(PodUid),
    /// It belongs to no pod.
    #[error("its process is in no pod's cgroup")]
    NoPod,
    /// It has entered another netns than its socket's.
    #[error("its process is in another network namespace than its socket")]
    OtherNetns,
    /// The attestation's thread has ended.
    #[error("callers cannot be attested any more")]
    Ended,
}

/// The conditions that a caller's process must meet.
#[derive(Clone, Debug)]
struct Expected {
    uid: Option<PodUid>,
    /// Whether the pod's object names its netns: its runtime may then give it no cgroup.
    is_netns_named: bool,
    netns: Arc<Netns>,
}

impl Expected {
    fn check(&self, seen: Seen) -> Result<(), NotOfPod> {
        match seen.pod {
            Some(pod) if self.uid == Some(pod) => {}
            Some(pod) => return Err(NotOfPod::OtherPod(pod)),
            None if self.is_netns_named && !seen.is_named_pods => {}
            None => return Err(NotOfPod::NoPod),
        }
        if seen.netns != self.netns.inode() {
            return Err(NotOfPod::OtherNetns);
        }
        Ok(())
    }
}

struct Request {
    caller: Caller,
    expected: Expected,
    answer: oneshot::Sender<Result<(), NotOfPod>>,
}

/// A thread that attests callers, and sees the cgroups as the node does.
#[derive(Debug)]
pub struct Attestor {
    requests: mpsc::Sender<Request>,
}

impl Attestor {
    /// Starts the thread, which ends when the attestor is dropped.
    pub fn start() -> io::Result<Self> {
        let (requests, received) = mpsc::channel(WAITING);
        thread::Builder::new()
            .name("attestor".into())
            .spawn(move || attest(received))?;
        Ok(Self { requests })
    }

    /// Checks that the process of `caller` is one of `workload`, whose netns is `netns`. The caller compares the cookies.
    pub async fn check(
        &self,
        caller: Caller,
        workload: &Workload,
        netns: &Arc<Netns>,
    ) -> Result<(), NotOfPod> {
        let (answer, answered) = oneshot::channel();
        let request = Request {
            caller,
            expected: Expected {
                uid: workload.uid.parse().ok(),
                is_netns_named: workload.netns.is_some(),
                netns: netns.clone(),
            },
            answer,
        };
        let sent = self.requests.send(request).await;
        sent.map_err(|_| NotOfPod::Ended)?;
        answered.await.unwrap_or(Err(NotOfPod::Ended))
    }
}

fn attest(mut requests: mpsc::Receiver<Request>) {
    see_as_the_node();
    let around = pods_around(&fs::read_to_string("/proc/1/cgroup").unwrap_or_default());
    let (mut hierarchies, mut read) = (Hierarchies::mounted(), Instant::now());
    while let Some(request) = requests.blocking_recv() {
        if request.answer.is_closed() {
            continue;
        }
        if read.elapsed() >= MOUNTS {
            (hierarchies, read) = (Hierarchies::mounted(), Instant::now());
        }
        let seen = request.caller.see(&hierarchies, &around);
        let checked = seen.and_then(|seen| request.expected.check(seen));
        let _ = request.answer.send(checked);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::IoSlice,
        os::{
            fd::AsRawFd,
            unix::{net::UnixStream, process::CommandExt},
        },
        process::{Command, Stdio},
    };

    use nix::sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg,
    };

    use super::*;

    const UID: &str = "0b1c2d3e-4f50-4a6b-8c7d-9e0f1a2b3c4d";
    const OTHER: &str = "11111111-2222-4333-8444-555555555555";
    const NETNS: u64 = 7;

    fn expected(is_netns_named: bool) -> Expected {
        Expected {
            uid: UID.parse().ok(),
            is_netns_named,
            netns: Arc::new(Netns::imagined(NETNS)),
        }
    }

    fn seen(pod: Option<&str>, netns: u64) -> Seen {
        Seen {
            pod: pod.map(|pod| pod.parse().unwrap()),
            is_named_pods: pod.is_some(),
            netns,
        }
    }

    #[test]
    fn a_process_that_cannot_be_opened_has_not_exited() {
        for gone in [Errno::ESRCH, Errno::EINVAL, Errno::ENODATA] {
            assert!(matches!(unopened(gone), NotOfPod::Exited), "{gone}");
        }
        for lack in [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM] {
            let why = unopened(lack).to_string();
            assert!(why.contains("cannot be examined"), "{why}");
        }
    }

    #[test]
    fn a_process_must_be_in_the_pods_cgroup_and_netns() {
        for is_netns_named in [false, true] {
            let expected = expected(is_netns_named);
            let check = |seen| expected.check(seen);
            assert!(check(seen(Some(UID), NETNS)).is_ok());
            let other = check(seen(Some(OTHER), NETNS));
            assert!(matches!(other, Err(NotOfPod::OtherPod(_))), "{other:?}");
            let elsewhere = check(seen(Some(UID), NETNS + 1));
            assert!(matches!(elsewhere, Err(NotOfPod::OtherNetns)));
        }
    }

    #[test]
    fn a_process_without_a_pods_cgroup_counts_only_if_the_netns_is_named() {
        let none = seen(None, NETNS);
        assert!(matches!(expected(false).check(none), Err(NotOfPod::NoPod)));
        assert!(expected(true).check(none).is_ok());
        // One that a user has created, or different pods in two hierarchies.
        let doubtful = Seen {
            is_named_pods: true,
            ..none
        };
        let refused = expected(true).check(doubtful);
        assert!(matches!(refused, Err(NotOfPod::NoPod)));
        let elsewhere = expected(true).check(seen(None, NETNS + 1));
        assert!(matches!(elsewhere, Err(NotOfPod::OtherNetns)));
    }

    #[test]
    fn a_pod_whose_uid_is_unknown_has_no_processes_in_pods_cgroups() {
        let expected = Expected {
            uid: None,
            ..expected(true)
        };
        let refused = expected.check(seen(Some(UID), NETNS));
        assert!(matches!(refused, Err(NotOfPod::OtherPod(_))));
        assert!(expected.check(seen(None, NETNS)).is_ok());
    }

    #[test]
    fn the_caller_is_the_process_that_connects_not_the_holder_of_the_descriptor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let held = UnixStream::connect(&path).unwrap();
        // Another process holds it, and this one does not any more.
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::from(OwnedFd::from(held)))
            .process_group(0)
            .spawn()
            .unwrap();
        let accepted = listener.accept().unwrap().0;
        let caller = Caller::of(accepted.as_fd()).unwrap();
        assert_eq!(caller.pid, std::process::id());
        assert!(caller.is_running());
        let seen = caller
            .see(&Hierarchies::mounted(), &HashSet::new())
            .unwrap();
        let own = fs::metadata("/proc/self/ns/net").unwrap();
        assert_eq!(seen.netns, own.ino());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_process_that_has_exited_is_not_attested() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let socket = nix::sys::socket::socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        let address = UnixAddr::new(&path).unwrap();
        let mut command = Command::new("true");
        // SAFETY: between fork and exec only connect(2) is called, on what the closure owns; nothing is allocated.
        unsafe {
            command.pre_exec(move || Ok(connect(socket.as_raw_fd(), &address)?));
        }
        let mut child = command.spawn().unwrap();
        let accepted = listener.accept().unwrap().0;
        let before = Caller::of(accepted.as_fd()).unwrap();
        child.wait().unwrap();
        let after = Caller::of(accepted.as_fd()).unwrap();
        for caller in [before, after] {
            let refused = caller.see(&Hierarchies::mounted(), &HashSet::new());
            assert!(matches!(refused, Err(NotOfPod::Exited)), "{refused:?}");
        }
    }

    #[test]
    fn a_process_is_followed_by_its_number_where_the_kernel_gives_no_descriptor() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = open_process(child.id() as libc::pid_t).unwrap();
        let caller = Caller {
            cookie: 0,
            pid: child.id(),
            user: 0,
            process: Ok(process),
        };
        let see = || caller.see(&Hierarchies::mounted(), &HashSet::new());
        assert!(see().is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(see(), Err(NotOfPod::Exited)));
        assert!(open_process(0).is_err());
        let invisible = Caller { pid: 0, ..caller };
        let refused = invisible.see(&Hierarchies::mounted(), &HashSet::new());
        assert!(matches!(refused, Err(NotOfPod::Invisible)));
    }

    #[test]
    fn a_connection_belongs_to_the_netns_of_its_callers_socket() {
        if crate::lacks_root("a_connection_belongs_to_the_netns_of_its_callers_socket") {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let netns = Netns::create().unwrap();
        let _connected = netns.enter(|| UnixStream::connect(&path)).unwrap().unwrap();
        let accepted = listener.accept().unwrap().0;
        let caller = Caller::of(accepted.as_fd()).unwrap();
        assert_eq!(caller.cookie, netns.cookie());
        assert_ne!(caller.cookie, socket_cookie(listener.as_fd()).unwrap());
    }

    #[test]
    fn callers_cannot_pass_descriptors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (listener, refuses_rights) = listen_at(&path).unwrap();
        if !refuses_rights {
            println!("SKIPPED callers_cannot_pass_descriptors: the kernel is older than 6.16");
            return;
        }
        let caller = UnixStream::connect(&path).unwrap();
        let send = |rights: &[ControlMessage<'_>]| {
            let bytes = [IoSlice::new(b"x")];
            let fd = caller.as_raw_fd();
            sendmsg::<()>(fd, &bytes, rights, MsgFlags::empty(), None)
        };
        let passed = [caller.as_raw_fd()];
        // Before it is accepted, and afterwards.
        let refused = send(&[ControlMessage::ScmRights(&passed)]);
        assert_eq!(refused, Err(Errno::EPERM));
        let _accepted = listener.accept().unwrap();
        let refused = send(&[ControlMessage::ScmRights(&passed)]);
        assert_eq!(refused, Err(Errno::EPERM));
        assert_eq!(send(&[]), Ok(1));
    }
}
