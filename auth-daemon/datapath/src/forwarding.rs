//! Keeps a pod from forwarding unjudged connections to network namespaces nested in it: attaches the `forward`
//! program to the interfaces that lead out of the pod's netns, once there are others. See auth-ebpf's `forward.rs`, and the
//! rules in `plumbing`.
//!
//! From Linux 6.6 on the program is attached as a tcx link, which is pinned and ends with the pin. Older kernels attach it as
//! a filter of the interface, which stays until it is removed.

use std::{
    collections::HashSet,
    fs, io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{
            NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
            qdisc_detach_program,
        },
    },
};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until},
};

use super::{
    Kernel, KernelError, Netns, features,
    interfaces::{Interface, Interfaces},
    kernel::{lock, program, program_error, replace_pin},
    netlink::Netlink,
    netns::open_the_nodes,
};

/// Name of the program.
pub(super) const PROGRAM: &str = "forward";
/// Minimum interval between two lists of a netns' interfaces because they have changed.
const PAUSE: Duration = Duration::from_millis(100);
/// Interval at which what failed is retried.
const RETRY: Duration = Duration::from_secs(1);
/// First kernel version with tcx links.
const TCX: (u32, u32) = (6, 6);
/// Priority and handle of the filter on older kernels.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x6d54);

/// Whether an enrolled netns forwards connections. A task of its own keeps that as wanted, because to attach the program takes
/// some 20 ms. The task ends when this is dropped, and leaves what it attached.
#[derive(Debug)]
pub(super) struct Forwarding {
    wanted: watch::Sender<Wanted>,
    /// `None` until the task has acted for the first time.
    applied: watch::Receiver<Option<Applied>>,
}

/// What the task has done last.
#[derive(Clone, Debug)]
struct Applied {
    wanted: Wanted,
    /// Whether there are interfaces that may lead to nested namespaces. Unknown for a netns that may forward anything.
    has_nested: bool,
    /// Why the wanted state is not in effect.
    failure: Option<Arc<KernelError>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// The netns may forward any connection.
    Forward,
    /// The netns forwards no unjudged connection. The addresses are the pod's.
    Refuse(Vec<IpAddr>),
}

impl Forwarding {
    /// Starts to keep `netns` from forwarding, if it `refuses` to. Must be called within the control plane's runtime.
    pub(super) fn start(
        kernel: &Kernel,
        netns: Arc<Netns>,
        addresses: &[IpAddr],
        refuses: bool,
    ) -> Self {
        let (wanted, changes) = watch::channel(wanted(addresses, refuses));
        let (done, applied) = watch::channel(None);
        tokio::spawn(keep(kernel.forward.clone(), netns, changes, done));
        Self { wanted, applied }
    }

    /// Lets the netns forward connections from outside to namespaces nested in it, or not. `addresses` are the pod's. Returns
    /// why an earlier call has no effect yet, if it failed.
    pub(super) fn set(&self, addresses: &[IpAddr], refuses: bool) -> Result<(), Arc<KernelError>> {
        let wanted = wanted(addresses, refuses);
        self.wanted.send_if_modified(|before| {
            let is_new = *before != wanted;
            *before = wanted;
            is_new
        });
        let applied = self.applied.borrow();
        match applied.as_ref().and_then(|done| done.failure.as_ref()) {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Whether the netns has interfaces that may lead to nested namespaces. `None` while what is wanted has no effect yet.
    pub(super) fn has_nested(&self) -> Option<bool> {
        let applied = self.applied.borrow();
        let done = applied.as_ref()?;
        (done.failure.is_none() && done.wanted == *self.wanted.borrow()).then_some(done.has_nested)
    }
}

fn wanted(addresses: &[IpAddr], refuses: bool) -> Wanted {
    match refuses {
        true => Wanted::Refuse(addresses.to_vec()),
        false => Wanted::Forward,
    }
}

/// Keeps `netns` as wanted: acts on changes of `wanted`, and of the interfaces of the netns. Retries what fails.
async fn keep(
    program: Arc<ForwardProgram>,
    netns: Arc<Netns>,
    mut wanted: watch::Receiver<Wanted>,
    done: watch::Sender<Option<Applied>>,
) {
    let mut has_failed = false;
    let mut attached = Attached::default();
    loop {
        let began = Instant::now();
        let now = wanted.borrow_and_update().clone();
        let (program_of, netns_of) = (program.clone(), netns.clone());
        let of_now = now.clone();
        let applied = tokio::task::spawn_blocking(move || {
            let result = attached.apply(&program_of, &netns_of, &of_now);
            (attached, result)
        });
        let failure;
        (attached, failure) = match applied.await {
            Ok((attached, result)) => (attached, result.err()),
            Err(error) => (
                Attached::default(),
                Some(interfaces_error(&netns, io::Error::other(error))),
            ),
        };
        let is_news = has_failed || failure.is_some();
        has_failed = failure.is_some();
        done.send_replace(Some(Applied {
            wanted: now,
            has_nested: attached.has_nested,
            failure: failure.map(Arc::new),
        }));
        if is_news {
            program.failures.notify_one();
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() {
                return;
            },
            () = attached.changed() => sleep_until(began + PAUSE).await,
            () = sleep(RETRY), if has_failed => {}
        }
    }
}

/// What is attached to the interfaces of a netns.
#[derive(Default)]
struct Attached {
    /// Reports changes of the interfaces.
    changes: Option<AsyncFd<Netlink>>,
    /// Interfaces with the program, by index.
    interfaces: HashSet<u32>,
    /// Whether there are interfaces that may lead to nested namespaces.
    has_nested: bool,
}

impl Attached {
    fn apply(
        &mut self,
        program: &ForwardProgram,
        netns: &Netns,
        wanted: &Wanted,
    ) -> Result<(), KernelError> {
        let failed = |error| interfaces_error(netns, error);
        let Wanted::Refuse(addresses) = wanted else {
            *self = Self::default();
            return program.detach(netns);
        };
        match &mut self.changes {
            Some(changes) => {
                changes.get_mut().drain();
            }
            // Before the interfaces are listed, so that none is missed.
            None => {
                let netlink = netns.enter(Netlink::watch_links).flatten();
                let netlink = netlink.map_err(failed)?;
                // SAFETY: the socket owns its descriptor, always returns the same one, and closes it only when it is dropped.
                let changes = unsafe { AsyncFd::register(netlink) };
                self.changes = Some(changes.map_err(io::Error::from).map_err(failed)?);
            }
        }
        let nodes = open_the_nodes();
        let interfaces = netns
            .enter(|| Interfaces::list(&nodes, addresses))
            .flatten()
            .map_err(failed)?;
        self.has_nested = interfaces.has_nested;
        // Most pods have nothing to forward to, and each packet that arrives would pay for the program.
        if !self.has_nested {
            return Ok(());
        }
        let indices = interfaces
            .leading_out
            .iter()
            .map(|interface| interface.index);
        let indices: HashSet<u32> = indices.collect();
        self.interfaces.retain(|index| indices.contains(index));
        for interface in &interfaces.leading_out {
            if !self.interfaces.contains(&interface.index) {
                program.attach(netns, interface)?;
                self.interfaces.insert(interface.index);
            }
        }
        Ok(())
    }

    /// Waits until the interfaces may have changed.
    async fn changed(&self) {
        match &self.changes {
            Some(changes) => {
                // An error of the descriptor is a reason to list the interfaces, too.
                if let Ok(mut ready) = changes.readable().await {
                    ready.clear_ready();
                }
            }
            None => std::future::pending().await,
        }
    }
}

/// The program, for all pods.
#[derive(Debug)]
pub(super) struct ForwardProgram {
    /// The programs of the object that contains it.
    pub(super) programs: Mutex<Ebpf>,
    /// Folder of the links' pins.
    pins: PathBuf,
    /// Notified when a netns is not as wanted, or is so again.
    pub(super) failures: Notify,
}

impl ForwardProgram {
    /// `programs` contains the loaded program. Links are pinned in the folder `pins`.
    pub(super) fn new(programs: Ebpf, pins: PathBuf) -> Self {
        Self {
            programs: Mutex::new(programs),
            pins,
            failures: Notify::new(),
        }
    }

    /// Attaches the program to an interface of `netns`, and replaces the one that a previous daemon attached.
    fn attach(&self, netns: &Netns, interface: &Interface) -> Result<(), KernelError> {
        let mut ebpf = lock(&self.programs);
        let program: &mut SchedClassifier = program(&mut ebpf, PROGRAM)?;
        let link = netns
            .enter(|| attach(program, &interface.name))
            .map_err(ProgramError::from)
            .flatten()
            .map_err(program_error(PROGRAM))?;
        match link {
            Some(link) => {
                let pin = format!("{}-{}", netns.cookie(), interface.index);
                replace_pin(&self.pins, &pin, link)
            }
            None => Ok(()),
        }
    }

    /// Undoes [`ForwardProgram::attach`] for all interfaces of `netns`. It is not an error if it is already undone.
    fn detach(&self, netns: &Netns) -> Result<(), KernelError> {
        self.unpin(netns.cookie());
        netns
            .enter(detach_filters)
            .flatten()
            .map_err(|error| interfaces_error(netns, error))
    }

    /// Removes the pins of the links to interfaces of the netns with `cookie`, which ends the links.
    pub(super) fn unpin(&self, cookie: u64) {
        let prefix = format!("{cookie}-");
        let pins = fs::read_dir(&self.pins).into_iter().flatten();
        for pin in pins.flatten() {
            if pin.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = fs::remove_file(pin.path());
            }
        }
    }
}

fn interfaces_error(netns: &Netns, error: io::Error) -> KernelError {
    KernelError::Interfaces {
        netns: netns.path().to_owned(),
        error,
    }
}

/// Attaches the program to an interface of the current netns. Returns the link to pin, if there is one to pin.
fn attach(program: &mut SchedClassifier, interface: &str) -> Result<Option<FdLink>, ProgramError> {
    if has_tcx() {
        // Before the pod's own programs, which could let a packet pass this one.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = match program.attach_with_options(interface, TcAttachType::Ingress, options) {
            Ok(id) => id,
            // This daemon attached it before, for a pod that it could not serve. The link is pinned.
            Err(ProgramError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::AlreadyExists =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let link = program.take_link(id)?.try_into();
        return link
            .map(Some)
            .map_err(|_| ProgramError::UnexpectedProgramType);
    }
    // It fails if the interface has it already. If it fails otherwise, so does what follows.
    let _ = qdisc_add_clsact(interface);
    let before =
        SchedClassifierLink::attached(interface, TcAttachType::Ingress, PRIORITY, HANDLE, None)?;
    // Replace the filter of a previous daemon without a gap, or else add one.
    let id = program.attach_to_link(before).or_else(|_| {
        let options = NlOptions {
            priority: PRIORITY,
            handle: HANDLE,
            classid: None,
        };
        program.attach_with_options(
            interface,
            TcAttachType::Ingress,
            TcAttachOptions::Netlink(options),
        )
    })?;
    // The filter outlives the daemon.
    std::mem::forget(program.take_link(id)?);
    Ok(None)
}

/// Removes the filters from all interfaces of the current netns, where links do not end with their pins.
pub(super) fn detach_filters() -> io::Result<()> {
    if has_tcx() {
        return Ok(());
    }
    for interface in nix::net::if_::if_nameindex()?.iter() {
        let name = interface.name().to_string_lossy();
        match qdisc_detach_program(&name, TcAttachType::Ingress, PROGRAM) {
            Ok(()) => {}
            // The interface has no such filter, or no filters at all.
            Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Err(TcError::NetlinkError(_)) => {}
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(())
}

fn has_tcx() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| features::version() >= TCX)
}
