//! Enrols a pod's network namespace in the kernel side of the mesh, and removes it.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{IpAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use auth_common::{Inbound, Pod};

use super::{
    Kernel, KernelError, Netns,
    containers::NoPodUid,
    flows::{self, Accepted},
    forwarding::Forwarding,
    inbound::InboundProgram,
    kernel::{SocketMaps, lock, wire_address},
    netlink::Netlink,
    plumbing,
    sockets::Listeners,
};
use auth_mesh::{ObjectName, Workload};

/// Why a pod could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Nothing identifies the pod's netns.
    #[error(
        "pod {pod}: nothing names its network namespace: metadata.uid {uid:?} {error}, and no manifest names its path (annotation auth-daemon.io/netns, with file discovery)"
    )]
    NoNetns {
        /// The pod.
        pod: ObjectName,
        /// Value of `metadata.uid`.
        uid: String,
        /// Why it does not identify a pod.
        error: NoPodUid,
    },
    /// None of the pod's processes was found, so its netns is unknown.
    #[error("pod {pod}: {why}")]
    NoProcess {
        /// The pod.
        pod: ObjectName,
        /// What the scan found instead.
        why: String,
    },
    /// The pod's processes share a netns with those of another pod.
    #[error(
        "pod {pod}: its processes are in one network namespace with those of pod {other}: neither can be identified, so both are refused; does their runtime, or a privilege, let them share it?"
    )]
    Shared {
        /// The pod.
        pod: ObjectName,
        /// Name of the other pod, or its UID.
        other: String,
    },
    /// The daemon lacks permission to inspect the pod's processes.
    #[error(
        "pod {pod}: cannot open the network namespace of its process {pid}: {error}; the daemon needs CAP_SYS_PTRACE and CAP_SYS_ADMIN"
    )]
    Hidden {
        /// The pod.
        pod: ObjectName,
        /// ID of the process.
        pid: u32,
        /// Underlying error.
        error: Arc<io::Error>,
    },
    /// The pod's netns cannot be opened.
    #[error("pod {pod}: cannot open its network namespace {path}: {error}; was the pod deleted?")]
    Netns {
        /// The pod.
        pod: ObjectName,
        /// Path in the pod's annotation.
        path: PathBuf,
        /// Underlying error.
        error: io::Error,
    },
    /// The pod's annotation names the node's netns.
    #[error(
        "pod {pod}: {path} is the node's own network namespace, not a pod's; is the annotation out of date?"
    )]
    NodesOwn {
        /// The pod.
        pod: ObjectName,
        /// Path in the pod's annotation.
        path: PathBuf,
    },
    /// The pod's annotation names another pod's netns.
    #[error(
        "pod {pod}: {path} is the network namespace of pod {other}; one of the two objects is wrong"
    )]
    Taken {
        /// The pod.
        pod: ObjectName,
        /// Path in the pod's annotation.
        path: PathBuf,
        /// Pod that the netns belongs to.
        other: ObjectName,
    },
    /// The pod's listeners, routes or rules could not be set up.
    #[error("pod {pod}: {what}: {error}")]
    Setup {
        /// The pod.
        pod: ObjectName,
        /// The step that failed.
        what: &'static str,
        /// Underlying error.
        error: io::Error,
    },
    /// A map or program operation failed.
    #[error("pod {pod}: {error}")]
    Kernel {
        /// The pod.
        pod: ObjectName,
        /// Underlying error.
        error: Box<KernelError>,
    },
}

/// Opens the netns at `path`, which `pod`'s object names. Fails if it is a netns of the node.
pub fn open_netns(pod: &ObjectName, path: &Path) -> Result<Netns, EnrolError> {
    let path = path.to_owned();
    match Netns::open(&path) {
        Ok(netns) if netns.is_the_nodes() => Err(EnrolError::NodesOwn {
            pod: pod.clone(),
            path,
        }),
        Ok(netns) => Ok(netns),
        Err(error) => Err(EnrolError::Netns {
            pod: pod.clone(),
            path,
            error,
        }),
    }
}

/// A pod whose connections go through the daemon.
#[derive(Clone, Debug)]
pub struct Enrolled {
    /// The pod's netns.
    pub netns: Arc<Netns>,
    /// Addresses from the pod's object. Set later if the pod communicates before its object has them.
    addresses: OnceLock<Vec<IpAddr>>,
    /// Addresses found in the netns, shown to the pod itself until its object has some. They are used for nothing else,
    /// because a pod can set its own addresses.
    own_addresses: Vec<IpAddr>,
    /// What the kernel admits to the netns.
    inbound: Arc<InboundProgram>,
    /// Whether the netns forwards connections.
    pub(super) forwarding: Arc<Forwarding>,
    /// Whether the pod is refused in both directions.
    is_refused: Arc<AtomicBool>,
    /// Whether [`Enrolled::remove`] was called. Locked while the daemon's set-up in the netns is changed.
    is_removed: Arc<Mutex<bool>>,
    /// Bit mask of the sysctls that [`plumbing`] switched on.
    switched_on: u32,
    /// Whether the netns was enrolled before, by this daemon or a previous one.
    pub was_enrolled: bool,
}

impl Enrolled {
    /// Enrols `workload`, whose netns is `netns`. From now on, the returned listeners receive its connections; `mode`
    /// applies to inbound ones.
    ///
    /// A pod that cannot be served is left refused in both directions, until the next attempt. It
    /// never communicates in plaintext because a port or a route is missing.
    pub fn new(
        kernel: &Kernel,
        workload: &Workload,
        netns: Arc<Netns>,
        mode: Inbound,
    ) -> Result<(Self, Listeners), EnrolError> {
        let before = kernel.enrolled_before(netns.cookie());
        let setup = |what| {
            move |error| EnrolError::Setup {
                pod: workload.name.clone(),
                what,
                error,
            }
        };
        let in_kernel = |error| EnrolError::Kernel {
            pod: workload.name.clone(),
            error: Box::new(error),
        };
        let prepared = plumbing::set_up(&netns);
        // A previous daemon may have switched on some of them, and stored which.
        let switched_on = prepared.as_ref().map_or(0, |done| done.switched_on)
            | before.map_or(0, |before| before.switched_on);
        let listeners = match prepared {
            Ok(_) => Listeners::open(kernel, &netns).map_err(setup("cannot listen inside it")),
            Err(error) => Err(setup("cannot prepare its routes")(error)),
        };
        let admits = listeners.as_ref().ok();
        let admits = admits.map(|listeners| (mode, &listeners.tunnel));
        let inbound = kernel.attach_inbound(&netns, admits).map_err(in_kernel)?;
        let refuses = mode == Inbound::Strict || listeners.is_err();
        let forwarding = Forwarding::start(kernel, netns.clone(), &workload.addresses, refuses);
        let enrolled = Self {
            addresses: known(workload),
            own_addresses: own_addresses(workload, &netns),
            netns,
            inbound: Arc::new(inbound),
            forwarding: Arc::new(forwarding),
            is_refused: Arc::new(AtomicBool::new(listeners.is_err())),
            is_removed: Arc::default(),
            switched_on,
            was_enrolled: before.is_some(),
        };
        kernel
            .capture(enrolled.netns.cookie(), &enrolled.entry())
            .map_err(in_kernel)?;
        Ok((enrolled, listeners?))
    }

    /// Sends inbound connections to the pod's tunnel listener, according to `mode`. To be called again when the mode
    /// changes, and when [`Kernel::forwarding_changed`] returns: as long as the pod cannot be kept from forwarding
    /// unjudged connections, it is refused in both directions, and this returns why.
    pub fn admit(
        &self,
        kernel: &Kernel,
        mode: Inbound,
        tunnel: &TcpListener,
    ) -> Result<(), Arc<KernelError>> {
        let forwarding = self
            .forwarding
            .set(self.addresses(), mode == Inbound::Strict);
        if let Err(error) = forwarding {
            self.refuse(kernel);
            return Err(error);
        }
        if self.is_refused.swap(false, Ordering::Relaxed)
            && let Err(error) = kernel.capture(self.netns.cookie(), &self.entry())
        {
            self.is_refused.store(true, Ordering::Relaxed);
            return Err(error.into());
        }
        Ok(self.inbound.admit(mode, tunnel)?)
    }

    /// Assigns the same netns to `workload`. The kernel keeps capturing its connections throughout.
    pub fn hand_over(&self, kernel: &Kernel, workload: &Workload) -> Result<Self, EnrolError> {
        let enrolled = Self {
            addresses: known(workload),
            own_addresses: own_addresses(workload, &self.netns),
            was_enrolled: true,
            ..self.clone()
        };
        kernel
            .capture(enrolled.netns.cookie(), &enrolled.entry())
            .map_err(|error| EnrolError::Kernel {
                pod: workload.name.clone(),
                error: Box::new(error),
            })?;
        Ok(enrolled)
    }

    /// The pod's addresses, most preferred first. Empty while its object has none.
    pub fn addresses(&self) -> &[IpAddr] {
        self.addresses.get().map_or(&[], Vec::as_slice)
    }

    /// The pod's address of the same family as `address`.
    pub fn address_like(&self, address: IpAddr) -> Option<IpAddr> {
        first_like(self.addresses(), address.is_ipv4())
    }

    /// Opens one of the pod's `listeners` again if it has died, given by its index in [`Listeners::all`]. Returns whether it
    /// had. Until this succeeds and [`Enrolled::admit`] is called, the kernel refuses what the listener would accept.
    pub fn reopen(
        &self,
        kernel: &Kernel,
        listeners: &mut Listeners,
        index: usize,
    ) -> io::Result<bool> {
        listeners.reopen(index, kernel, &self.netns)
    }

    /// Whether a connection to `address` that the pod's tunnel listener has accepted is for the pod. Otherwise the pod would
    /// have forwarded it to a netns nested in it: see [`Enrolled::admit`].
    pub fn is_local(&self, address: IpAddr) -> bool {
        self.addresses().contains(&address)
            || self
                .netns
                .enter(|| Netlink::open()?.route(address))
                .flatten()
                // If it is not known, the connection is not for the pod.
                .is_ok_and(|route| route.is_local)
    }

    /// Sets the addresses of a pod whose object had none before. Existing connections continue.
    pub fn learn_addresses(
        &self,
        kernel: &Kernel,
        addresses: &[IpAddr],
    ) -> Result<(), KernelError> {
        kernel.capture(self.netns.cookie(), &self.entry_with(addresses))?;
        // If another thread set them first, it read the same object.
        let _ = self.addresses.set(addresses.to_vec());
        Ok(())
    }

    /// Lists the connections to the pod's apps that the daemon did not make: neither its deliveries, nor its own listeners'
    /// connections, nor those between pods of this node under a verdict, nor the pod's to itself. Those of the node itself
    /// are included: see [`Kernel::recorded`].
    pub fn accepted(&self, kernel: &Kernel) -> io::Result<Vec<Accepted>> {
        let SocketMaps { bypass, own } = kernel.socket_maps();
        flows::accepted(&self.netns, &[bypass, own, kernel.same_node.flows()])
    }

    /// Ends connections that [`Enrolled::accepted`] has listed, with a RST to both ends. Returns the number of those that
    /// still existed.
    pub fn end(&self, connections: &[Accepted]) -> io::Result<usize> {
        flows::end_all(&self.netns, connections)
    }

    /// Refuses the pod in both directions.
    pub fn refuse(&self, kernel: &Kernel) {
        // The entry may have been written for another reason, so it is written again even if the pod is refused already.
        self.is_refused.store(true, Ordering::Relaxed);
        let outbound = kernel.capture(self.netns.cookie(), &self.entry());
        let refused = outbound.and_then(|()| self.inbound.refuse());
        if let Err(error) = refused {
            tracing::error!(netns = %self.netns.path().display(), %error, "cannot refuse a pod");
        }
        // An error is logged by the next call that asks for one.
        let _ = self.forwarding.set(self.addresses(), true);
    }

    /// Restores the sysctls, routes and rules of the daemon that are missing in the netns, and reports them. A pod with
    /// CAP_NET_ADMIN can remove them. The pod determines how long this takes: up to seconds if it has a million rules.
    pub fn repair(&self) -> io::Result<Tampered> {
        Ok(Tampered {
            missing: self.put_back()?,
            is_preceded: plumbing::is_preceded(&self.netns)?,
        })
    }

    /// Sets up the netns again, unless the pod has been removed meanwhile. Returns what was missing.
    fn put_back(&self) -> io::Result<Vec<&'static str>> {
        let is_removed = lock(&self.is_removed);
        if *is_removed {
            return Ok(Vec::new());
        }
        Ok(plumbing::set_up(&self.netns)?.missing)
    }

    /// Removes the pod from the mesh. The owner of its listeners closes them. Errors are logged, because the pod may
    /// already be gone.
    pub fn remove(&self, kernel: &Kernel) {
        let mut is_removed = lock(&self.is_removed);
        *is_removed = true;
        remove(kernel, &self.netns, self.switched_on);
        // It may be attaching its program at this moment.
        let _ = self.forwarding.set(&[], false);
    }

    fn entry(&self) -> Pod {
        self.entry_with(self.addresses())
    }

    fn entry_with(&self, addresses: &[IpAddr]) -> Pod {
        let addresses = match addresses {
            [] => &self.own_addresses,
            known => known,
        };
        let first = |v4| first_like(addresses, v4).map_or([0; 16], wire_address);
        Pod {
            v4: first(true),
            v6: first(false),
            switched_on: self.switched_on,
            refused: self.is_refused.load(Ordering::Relaxed).into(),
        }
    }
}

/// What a pod has changed of the daemon's set-up in its netns.
#[derive(Debug)]
pub struct Tampered {
    /// What was missing, and has been restored.
    pub missing: Vec<&'static str>,
    /// Whether rules of the pod's own precede the daemon's. They stay, and the answers of the pod's apps may not reach the
    /// daemon.
    pub is_preceded: bool,
}

fn known(workload: &Workload) -> OnceLock<Vec<IpAddr>> {
    match workload.addresses.as_slice() {
        [] => OnceLock::new(),
        addresses => OnceLock::from(addresses.to_vec()),
    }
}

/// Addresses found in the netns. Empty if the pod's object has addresses.
fn own_addresses(workload: &Workload, netns: &Netns) -> Vec<IpAddr> {
    if !workload.addresses.is_empty() {
        return Vec::new();
    }
    netns.own_addresses().unwrap_or_else(|error| {
        tracing::warn!(pod = %workload.name, %error, "cannot see the addresses of its namespace");
        Vec::new()
    })
}

fn first_like(addresses: &[IpAddr], v4: bool) -> Option<IpAddr> {
    let mut addresses = addresses.iter();
    addresses.find(|address| address.is_ipv4() == v4).copied()
}

/// A netns that the kernel has enrolled, and that no pod is served in.
#[derive(Debug)]
pub struct Unserved {
    /// The netns.
    pub netns: Arc<Netns>,
    entry: Pod,
}

/// Returns the netns that the kernel has enrolled and that are not in `kept`: those that a previous daemon enrolled, and
/// those of pods that could not be served. Forgets those that do not exist any more.
pub fn unserved(kernel: &Kernel, kept: &HashSet<u64>) -> Vec<Unserved> {
    let mut others = kernel.enrolled();
    others.retain(|(cookie, _)| !kept.contains(cookie));
    if others.is_empty() {
        return Vec::new();
    }
    let mut namespaces: HashMap<u64, Netns> = super::netns::all()
        .into_iter()
        .map(|netns| (netns.cookie(), netns))
        .collect();
    let mut found = Vec::new();
    for (cookie, entry) in others {
        match namespaces.remove(&cookie) {
            Some(netns) => found.push(Unserved {
                netns: Arc::new(netns),
                entry,
            }),
            None => {
                tracing::info!(netns_cookie = cookie, "a pod that was not served is gone");
                kernel.forget(cookie);
            }
        }
    }
    found
}

impl Unserved {
    /// Refuses all connections from and to the netns, except those that the kernel has recorded.
    pub fn refuse(&self, kernel: &Kernel) -> Result<(), KernelError> {
        let entry = Pod {
            refused: 1,
            ..self.entry
        };
        kernel.capture(self.netns.cookie(), &entry)?;
        // The pinned link keeps the program.
        kernel.attach_inbound(&self.netns, None).map(drop)
    }

    /// Removes the netns from the mesh. Errors are logged, because it may already be gone.
    pub fn remove(&self, kernel: &Kernel) {
        let netns = &self.netns;
        tracing::info!(
            netns_cookie = netns.cookie(),
            "a pod that was not served is gone"
        );
        remove(kernel, netns, self.entry.switched_on);
    }
}

fn remove(kernel: &Kernel, netns: &Netns, switched_on: u32) {
    kernel.forget(netns.cookie());
    if let Err(error) = plumbing::tear_down(netns, switched_on) {
        tracing::warn!(netns = %netns.path().display(), %error, "cannot undo a pod's routes");
    }
}
