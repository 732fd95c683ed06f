//! Takes a pod into the mesh in its kernel's eyes, and out again.

use std::{collections::HashSet, io, net::IpAddr, path::PathBuf};

use auth_common::{Inbound, Pod};

use super::{
    Kernel, KernelError, Netns,
    kernel::wire_address,
    plumbing,
    sockets::{self, Listeners},
};
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

/// A pod whose connections go through the daemon.
#[derive(Debug)]
pub struct Enrolled {
    /// Its network namespace.
    pub netns: Netns,
    addresses: Vec<IpAddr>,
    switched_on: u32,
}

impl Enrolled {
    /// Enrols `workload`: from here on its connections come to the returned listeners, and what comes for it too.
    ///
    /// Inbound first, outbound last: a pod never speaks for the mesh before it can be spoken to.
    pub fn new(
        kernel: &Kernel,
        workload: &Workload,
        mode: Inbound,
    ) -> Result<(Self, Listeners), EnrolError> {
        let pod = &workload.name;
        let path = workload
            .netns
            .clone()
            .ok_or_else(|| EnrolError::NoNetns(pod.clone()))?;
        let netns = Netns::open(&path).map_err(|error| EnrolError::Netns {
            pod: pod.clone(),
            path,
            error,
        })?;
        let setup = |what| {
            move |error| EnrolError::Setup {
                pod: workload.name.clone(),
                what,
                error,
            }
        };
        let before = kernel
            .enrolled()
            .into_iter()
            .find(|(cookie, _)| *cookie == netns.cookie())
            .map(|(_, entry)| entry);
        let switched_on = plumbing::set_up(&netns, &workload.addresses)
            .map_err(setup("cannot prepare its routes"))?;
        // A daemon before this one may have switched some on already, and knew what they were.
        let switched_on = switched_on | before.map_or(0, |before| before.switched_on);
        let enrolled = Self {
            netns,
            addresses: workload.addresses.clone(),
            switched_on,
        };
        match enrolled.connect(kernel, mode, setup("cannot listen inside it"), pod) {
            Ok(listeners) => Ok((enrolled, listeners)),
            Err(error) => {
                enrolled.remove(kernel);
                Err(error)
            }
        }
    }

    fn connect(
        &self,
        kernel: &Kernel,
        mode: Inbound,
        setup: impl FnOnce(io::Error) -> EnrolError,
        pod: &ObjectName,
    ) -> Result<Listeners, EnrolError> {
        let failed = |error| EnrolError::Kernel {
            pod: pod.clone(),
            error: Box::new(error),
        };
        let listeners = sockets::listen(&self.netns, &self.addresses).map_err(setup)?;
        kernel
            .admit(&self.addresses, &listeners.tunnel, mode)
            .map_err(failed)?;
        kernel.attach_inbound(&self.netns).map_err(failed)?;
        kernel
            .capture(self.netns.cookie(), &self.entry())
            .map_err(failed)?;
        Ok(listeners)
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
        kernel.forget(self.netns.cookie(), &self.addresses);
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
            padding: 0,
        }
    }
}

/// Forgets pods that a daemon before this one enrolled and that are not among `served`.
pub fn forget_others<'a>(kernel: &Kernel, served: impl Iterator<Item = &'a Enrolled>) {
    let mut cookies = HashSet::new();
    let mut addresses_served: HashSet<IpAddr> = HashSet::new();
    for enrolled in served {
        cookies.insert(enrolled.netns.cookie());
        addresses_served.extend(&enrolled.addresses);
    }
    let others: Vec<_> = kernel
        .enrolled()
        .into_iter()
        .filter(|(cookie, _)| !cookies.contains(cookie))
        .collect();
    if others.is_empty() {
        return;
    }
    let namespaces = super::netns::all();
    for (cookie, entry) in others {
        let addresses: Vec<IpAddr> = [entry.v4, entry.v6]
            .into_iter()
            .filter(|address| *address != [0; 16])
            .map(|address| IpAddr::from(address).to_canonical())
            // Another pod may have the address by now.
            .filter(|address| !addresses_served.contains(address))
            .collect();
        tracing::info!(
            netns_cookie = cookie,
            ?addresses,
            "a pod left while no daemon ran"
        );
        kernel.forget(cookie, &addresses);
        if let Some(netns) = namespaces.iter().find(|netns| netns.cookie() == cookie)
            && let Err(error) = plumbing::tear_down(netns, entry.switched_on)
        {
            tracing::warn!(netns = %netns.path().display(), %error, "cannot undo a pod's routes");
        }
    }
}
