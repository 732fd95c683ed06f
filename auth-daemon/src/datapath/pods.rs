//! Takes a pod's network namespace into the mesh in the kernel's eyes, and out again.

use std::{collections::HashSet, io, net::IpAddr, path::PathBuf, sync::Arc};

use auth_common::Pod;

use super::{Kernel, KernelError, Netns, kernel::wire_address, plumbing, sockets::Listeners};
use crate::mesh::{ObjectName, Workload};

/// Why a pod could not be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Nothing says where its namespace is.
    #[error(
        "pod {0}: nothing names its network namespace; set the annotation auth-daemon.io/netns"
    )]
    NoNetns(ObjectName),
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

/// Opens the network namespace that `workload`'s object names. A node's own is refused.
pub fn open_netns(workload: &Workload) -> Result<Netns, EnrolError> {
    let pod = &workload.name;
    let path = workload
        .netns
        .clone()
        .ok_or_else(|| EnrolError::NoNetns(pod.clone()))?;
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
    addresses: Vec<IpAddr>,
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
        netns: Netns,
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
            netns: Arc::new(netns),
            addresses: workload.addresses.clone(),
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
            addresses: workload.addresses.clone(),
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

    /// The pod's address of the same family as `address`.
    pub fn address_like(&self, address: IpAddr) -> Option<IpAddr> {
        self.addresses
            .iter()
            .find(|own| own.is_ipv4() == address.is_ipv4())
            .copied()
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
        let first = |v4: bool| {
            self.addresses
                .iter()
                .find(|address| address.is_ipv4() == v4)
                .map_or([0; 16], |address| wire_address(*address))
        };
        Pod {
            v4: first(true),
            v6: first(false),
            switched_on: self.switched_on,
            refused: 0,
        }
    }
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
