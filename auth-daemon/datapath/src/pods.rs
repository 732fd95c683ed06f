//! Takes a pod's network namespace into the mesh in the kernel's eyes, and out again.

use std::{
    collections::HashSet,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use auth_common::Pod;

use super::{
    Kernel, KernelError, Netns, containers::NoPodUid, flows, kernel::wire_address, plumbing,
    sockets::Listeners,
};
use auth_mesh::{ObjectName, Workload};

/// Why a pod could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Nothing says where its namespace is.
    #[error(
        "pod {pod}: nothing names its network namespace: metadata.uid {uid:?} {error}, and it has no annotation auth-daemon.io/netns"
    )]
    NoNetns {
        /// The pod.
        pod: ObjectName,
        /// What its object has as its UID.
        uid: String,
        /// What is wrong with that.
        error: NoPodUid,
    },
    /// None of its processes is to be found, so that its namespace is not either.
    #[error("pod {pod}: {why}")]
    NoProcess {
        /// The pod.
        pod: ObjectName,
        /// What was seen.
        why: String,
    },
    /// Its processes are in another pod's namespace, or another pod's are in its own.
    #[error(
        "pod {pod}: its processes are in one network namespace with those of pod {other}: neither is believed, and both are refused; do their runtime or their privileges let them?"
    )]
    Shared {
        /// The pod.
        pod: ObjectName,
        /// The other one, or its UID.
        other: String,
    },
    /// Its processes may not be looked at.
    #[error(
        "pod {pod}: cannot open the network namespace of its process {pid}: {error}; the daemon needs CAP_SYS_PTRACE and CAP_SYS_ADMIN"
    )]
    Hidden {
        /// The pod.
        pod: ObjectName,
        /// The process.
        pid: u32,
        /// What happened.
        error: Arc<io::Error>,
    },
    /// Its namespace cannot be opened.
    #[error("pod {pod}: cannot open its network namespace {path}: {error}; was the pod deleted?")]
    Netns {
        /// The pod.
        pod: ObjectName,
        /// What its object names.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// What it names is the node's.
    #[error(
        "pod {pod}: {path} is the node's own network namespace, not a pod's; is the annotation out of date?"
    )]
    NodesOwn {
        /// The pod.
        pod: ObjectName,
        /// What its object names.
        path: PathBuf,
    },
    /// What it names is another pod's.
    #[error(
        "pod {pod}: {path} is the network namespace of pod {other}; one of the two objects is wrong"
    )]
    Taken {
        /// The pod.
        pod: ObjectName,
        /// What its object names.
        path: PathBuf,
        /// Whose it is.
        other: ObjectName,
    },
    /// Its listeners, routes or rules could not be made.
    #[error("pod {pod}: {what}: {error}")]
    Setup {
        /// The pod.
        pod: ObjectName,
        /// What was being made.
        what: &'static str,
        /// What happened.
        error: io::Error,
    },
    /// A map or program refused.
    #[error("pod {pod}: {error}")]
    Kernel {
        /// The pod.
        pod: ObjectName,
        /// What happened.
        error: Box<KernelError>,
    },
}

/// Opens the network namespace at `path`, which `pod`'s object names. A node's own is refused.
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
    /// Its network namespace.
    pub netns: Arc<Netns>,
    /// Set when they are known: a pod may talk before its object has them.
    addresses: OnceLock<Vec<IpAddr>>,
    /// Until then: what the namespace itself has, for the pod's own eyes. Nobody else believes it.
    own_addresses: Vec<IpAddr>,
    /// Which sysctls [`plumbing`] switched on.
    switched_on: u32,
}

impl Enrolled {
    /// Enrols `workload`, which lives in `netns`: its connections come to the returned listeners from here on. What comes
    /// for it is refused until [`Kernel::set_inbound`] leads it to the tunnel listener.
    ///
    /// A pod in which the daemon cannot work is left refused in both directions, for the next attempt or for
    /// [`forget_others`]: it never talks plainly for want of a port or a route.
    pub fn new(
        kernel: &Kernel,
        workload: &Workload,
        netns: Arc<Netns>,
    ) -> Result<(Self, Listeners), EnrolError> {
        let before = kernel
            .enrolled()
            .into_iter()
            .find(|(cookie, _)| *cookie == netns.cookie())
            .map(|(_, entry)| entry);
        let setup = |what| {
            move |error| EnrolError::Setup {
                pod: workload.name.clone(),
                what,
                error,
            }
        };
        let prepared = plumbing::set_up(&netns);
        let enrolled = Self {
            addresses: known(workload),
            own_addresses: own_addresses(workload, &netns),
            netns,
            // A daemon before this one may have switched some on already, and knew what they were.
            switched_on: prepared.as_ref().map_or(0, |bits| *bits)
                | before.map_or(0, |before| before.switched_on),
        };
        let listeners = match prepared {
            Ok(_) => Listeners::open(&enrolled.netns).map_err(setup("cannot listen inside it")),
            Err(error) => Err(setup("cannot prepare its routes")(error)),
        };
        let entry = Pod {
            refused: listeners.is_err().into(),
            ..enrolled.entry()
        };
        kernel
            .attach_inbound(&enrolled.netns)
            .and_then(|()| kernel.capture(enrolled.netns.cookie(), &entry))
            .map_err(|error| EnrolError::Kernel {
                pod: workload.name.clone(),
                error: Box::new(error),
            })?;
        Ok((enrolled, listeners?))
    }

    /// The same namespace, now `workload`'s: it never leaves the kernel's hands.
    pub fn hand_over(&self, kernel: &Kernel, workload: &Workload) -> Result<Self, EnrolError> {
        let enrolled = Self {
            addresses: known(workload),
            own_addresses: own_addresses(workload, &self.netns),
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

    /// The pod's addresses, most preferred first; none while its object has none.
    pub fn addresses(&self) -> &[IpAddr] {
        self.addresses.get().map_or(&[], Vec::as_slice)
    }

    /// The pod's address of the same family as `address`.
    pub fn address_like(&self, address: IpAddr) -> Option<IpAddr> {
        first_like(self.addresses(), address.is_ipv4())
    }

    /// Gives a pod that had no addresses those that its object has now. Its connections go on.
    pub fn learn_addresses(
        &self,
        kernel: &Kernel,
        addresses: &[IpAddr],
    ) -> Result<(), KernelError> {
        kernel.capture(self.netns.cookie(), &self.entry_with(addresses))?;
        // Whoever was first has read the same object.
        let _ = self.addresses.set(addresses.to_vec());
        Ok(())
    }

    /// Ends the connections that its apps have accepted and whose own and peer's address meet the condition. Returns how
    /// many.
    pub fn end_accepted(
        &self,
        condition: impl Fn(SocketAddr, SocketAddr) -> bool,
    ) -> io::Result<usize> {
        flows::end_accepted(&self.netns, &condition)
    }

    /// Leaves the pod refused in both directions: its connects are, and what comes for it finds no listener of its own.
    pub fn refuse(&self, kernel: &Kernel) {
        let entry = Pod {
            refused: 1,
            ..self.entry()
        };
        if let Err(error) = kernel.capture(self.netns.cookie(), &entry) {
            tracing::error!(netns = %self.netns.path().display(), %error, "cannot refuse what a pod dials");
        }
    }

    /// Takes the pod out of the mesh; its listeners are closed by their owner. What fails is logged: the pod may be
    /// gone already.
    pub fn remove(&self, kernel: &Kernel) {
        kernel.forget(self.netns.cookie());
        if let Err(error) = plumbing::tear_down(&self.netns, self.switched_on) {
            tracing::warn!(netns = %self.netns.path().display(), %error, "cannot undo a pod's routes");
        }
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
            refused: 0,
        }
    }
}

fn known(workload: &Workload) -> OnceLock<Vec<IpAddr>> {
    match workload.addresses.as_slice() {
        [] => OnceLock::new(),
        addresses => OnceLock::from(addresses.to_vec()),
    }
}

/// Those of the namespace, where the object has none.
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

/// Forgets pods whose namespaces are not among `kept`: those that a daemon before this one enrolled, and those that could
/// not be served and are not wanted any more.
pub fn forget_others(kernel: &Kernel, kept: &HashSet<u64>) {
    let others: Vec<_> = kernel
        .enrolled()
        .into_iter()
        .filter(|(cookie, _)| !kept.contains(cookie))
        .collect();
    if others.is_empty() {
        return;
    }
    let namespaces = super::netns::all();
    for (cookie, entry) in others {
        tracing::info!(netns_cookie = cookie, "a pod that was not served is gone");
        kernel.forget(cookie);
        if let Some(netns) = namespaces.iter().find(|netns| netns.cookie() == cookie)
            && let Err(error) = plumbing::tear_down(netns, entry.switched_on)
        {
            tracing::warn!(netns = %netns.path().display(), %error, "cannot undo a pod's routes");
        }
    }
}
