//! Where a process runs: a network namespace and a cgroup.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::app::App;
use crate::eventually::{TIMEOUT, eventually_ok};
use crate::netns::Netns;
use crate::process::{Finished, Process};
use crate::sockets::{Endpoint, SocketCount, TcpState, sockets};

/// A network namespace and a cgroup: a pod, a node, or the outside host, as its processes see it.
#[derive(Debug, Clone)]
pub struct Place {
    name: String,
    netns: Netns,
    cgroup: PathBuf,
    folder: PathBuf,
    /// Cgroups that its processes join beside its own.
    limits: Arc<OnceLock<Vec<PathBuf>>>,
}

impl Place {
    pub(crate) fn new(name: &str, netns: Netns, cgroup: PathBuf, folder: PathBuf) -> Result<Self> {
        crate::cgroup::create(&cgroup)?;
        std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self {
            name: name.to_owned(),
            netns,
            cgroup,
            folder,
            limits: Arc::default(),
        })
    }

    /// Gives what starts here from now on an equal share of the CPU time of the cgroup above, and limits the number of its
    /// processes and threads. See [`Mesh::share_cpu`](crate::Mesh::share_cpu).
    pub fn limit(&self, processes: u32) -> Result<()> {
        let limits = crate::cgroup::limit(&crate::mounts::cgroup2()?, &self.cgroup, processes)?;
        // Those of an earlier call are the same.
        self.limits.set(limits).ok();
        Ok(())
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its folder of the cgroup tree.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A temporary folder for the files of programs that run here.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns a command that will run here, for what [`Place::run`] and [`Place::spawn`] do not offer. Pass it to
    /// [`Process::spawn`] so that it is killed when the test ends.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let netns = self.netns.file();
        let open = |cgroup: &PathBuf| {
            let path = cgroup.join("cgroup.procs");
            let procs = OpenOptions::new().write(true).open(&path);
            procs.with_context(|| format!("opening {}", path.display()))
        };
        let cgroups = self.limits.get().into_iter().flatten();
        let joined: Vec<_> = cgroups
            .chain([&self.cgroup])
            .map(open)
            .collect::<Result<_>>()?;
        let mut command = Command::new(program);
        command.current_dir(&self.folder);
        // SAFETY: between fork and exec only write(2) and setns(2) are called, both async-signal-safe, on files that
        // the closure owns; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                // Enter the namespace first: a program that finds pods by their cgroups must not find this process in
                // ours.
                setns(&*netns, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
                for procs in &joined {
                    nix::unistd::write(procs, b"0").map_err(io::Error::from)?;
                }
                Ok(())
            });
        }
        Ok(command)
    }

    /// Starts a program here. It is killed when the value is dropped.
    pub fn spawn<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Process> {
        let mut command = self.command(program)?;
        command.args(arguments);
        Process::spawn(command).with_context(|| format!("in {}", self.name))
    }

    /// Runs a program here until it exits, for at most [`TIMEOUT`]. A failure of the program is not an error: see
    /// [`Finished::ok`].
    pub fn run<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Finished> {
        self.spawn(program, arguments)?
            .finish(TIMEOUT)
            .with_context(|| format!("in {}", self.name))
    }

    /// Starts `pod-app` here with arguments separated by white space (there is no quoting), as in `"echo-server --port
    /// 7"`. Call [`App::listening`] to wait until a server listens.
    pub fn app(&self, arguments: &str) -> Result<App> {
        App::start(self, arguments.split_whitespace())
    }

    /// Runs `body` on a thread in the namespace, see [`Netns::enter`].
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> Result<T> {
        self.netns.enter(body)
    }

    /// Opens a connection from this namespace that no cgroup program sees, see [`Netns::enter`].
    pub fn connect(&self, to: SocketAddr) -> Result<TcpStream> {
        self.enter(|| TcpStream::connect_timeout(&to, TIMEOUT))?
            .with_context(|| format!("connecting to {to} from {}", self.name))
    }

    /// Opens a listener in this namespace, for the test itself to accept from.
    pub fn listen(&self, on: SocketAddr) -> Result<TcpListener> {
        self.enter(|| TcpListener::bind(on))?
            .with_context(|| format!("listening on {on} in {}", self.name))
    }

    /// Counts the TCP sockets of the namespace by state.
    pub fn sockets(&self) -> Result<SocketCount> {
        Ok(sockets(&self.netns)?.into_iter().collect())
    }

    /// Lists the TCP sockets of the namespace.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>> {
        sockets(&self.netns)
    }

    /// Waits until something listens on the port.
    pub fn wait_listening(&self, port: u16) -> Result<()> {
        self.wait_listeners(port, |count| count > 0)
    }

    /// Waits until the number of sockets that listen on the port is as `is_so` wants it.
    pub(crate) fn wait_listeners(&self, port: u16, is_so: impl Fn(usize) -> bool) -> Result<()> {
        let what = format!("the listeners on port {port} in {}", self.name);
        eventually_ok(TIMEOUT, &what, || {
            let sockets = self.endpoints()?.into_iter();
            let listeners = sockets
                .filter(|socket| socket.state == TcpState::Listen && socket.local.port() == port);
            let count = listeners.count();
            ensure!(is_so(count), "there are {count}");
            Ok(())
        })
    }
}
