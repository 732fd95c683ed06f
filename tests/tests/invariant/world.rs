//! The generated model: what there is, and what is in force.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_tests::{Mesh, PodSpec, Result, ServiceSpec};
use serde_json::Value;

use crate::policies;
use crate::random::Random;

/// What does not change during a run.
#[derive(Debug, Clone)]
pub(crate) struct World {
    pub(crate) pods: Vec<Pod>,
    pub(crate) services: Vec<Service>,
    /// The nodes' addresses on the wire: IPv4, IPv6.
    nodes: [[IpAddr; 2]; 2],
    outside: [IpAddr; 2],
    /// The daemons' `mode`.
    pub(crate) mode: &'static str,
    /// Whether the daemons use TLS between pods of one node as well: `sameNode: tunnel`.
    pub(crate) same_node_tunnel: bool,
}

/// A pod, whether or not it is in the mesh.
#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) namespace: &'static str,
    pub(crate) account: &'static str,
    pub(crate) node: usize,
    /// IPv4, IPv6.
    pub(crate) addresses: [IpAddr; 2],
}

/// A Service with a port 80 to 8080 and 81 to 8081.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) namespace: &'static str,
    pub(crate) app: &'static str,
    /// IPv4, IPv6.
    pub(crate) addresses: [IpAddr; 2],
}

/// What is in force at a moment.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) pods: Vec<PodState>,
    /// AuthorizationPolicies and PeerAuthentications by name.
    pub(crate) policies: BTreeMap<String, Value>,
    /// Whether each node's daemon is running and ready.
    pub(crate) serving: [bool; 2],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodState {
    /// Whether it is in the mesh. If not, its manifest says so.
    pub(crate) member: bool,
    /// Whether it is there. It is not while it is made anew.
    pub(crate) present: bool,
    pub(crate) labels: BTreeMap<String, String>,
}

/// Where programs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    Pod(usize),
    Node(usize),
    Outside,
}

/// What a connection dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Site(Site),
    Service(usize),
}

impl World {
    pub(crate) fn generate(random: &mut Random) -> (Self, State) {
        let count = 6 + random.below(3);
        let mut pods = Vec::new();
        let mut states = Vec::new();
        // Two of the mesh's pods on different nodes, a pod outside of it, and more of any kind.
        for number in 0..count {
            let node = if number < 2 { number } else { random.below(2) };
            let member = number < 2 || (number != 2 && random.chance(75));
            let namespace = random.one(&policies::NAMESPACES);
            let app = if number < 2 {
                policies::APPS[number]
            } else {
                random.one(&policies::APPS)
            };
            pods.push(Pod {
                name: format!("p{number}"),
                namespace,
                account: random.one(&policies::ACCOUNTS),
                node,
                addresses: UNKNOWN,
            });
            states.push(PodState {
                member,
                present: true,
                labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            });
        }
        let services = (0..4).map(|number| Service {
            name: format!("s{number}"),
            namespace: policies::NAMESPACES[number / 2],
            app: policies::APPS[number % 2],
            addresses: [
                IpAddr::from([10, 96, 0, 10 + number as u8]),
                IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 0x10 + number as u16]),
            ],
        });
        let world = Self {
            pods,
            services: services.collect(),
            nodes: [UNKNOWN; 2],
            outside: UNKNOWN,
            mode: random.one(&["STRICT", "PERMISSIVE"]),
            same_node_tunnel: random.chance(30),
        };
        let state = State {
            pods: states,
            policies: BTreeMap::new(),
            serving: [true; 2],
        };
        (world, state)
    }

    /// Makes the mesh, without daemons, and enters all addresses.
    pub(crate) fn build(&mut self, state: &State) -> Result<Mesh> {
        let mut builder = Mesh::builder().node(NODES[0]).node(NODES[1]);
        for (pod, state) in self.pods.iter().zip(&state.pods) {
            let mut spec = PodSpec::new(&pod.name)
                .namespace(pod.namespace)
                .on(NODES[pod.node])
                .service_account(pod.account)
                .label(MEMBERSHIP, membership(state.member));
            for (key, value) in &state.labels {
                spec = spec.label(key, value);
            }
            builder = builder.pod(spec);
        }
        for service in &self.services {
            let mut spec = ServiceSpec::new(&service.name)
                .namespace(service.namespace)
                .selector("app", service.app);
            for address in service.addresses {
                spec = spec.address(&address.to_string());
            }
            for (port, target) in SERVICE_PORTS.iter().zip(POD_PORTS) {
                spec = spec.port(*port, target);
            }
            builder = builder.service(spec);
        }
        let mesh = builder.start()?;
        for pod in &mut self.pods {
            let built = mesh.pod(&pod.full_name());
            pod.addresses = [built.ipv4().into(), built.ipv6().into()];
        }
        self.nodes = NODES.map(|node| {
            let node = mesh.node(node);
            [node.ipv4().into(), node.ipv6().into()]
        });
        self.outside = [mesh.outside_ipv4().into(), mesh.outside_ipv6().into()];
        Ok(mesh)
    }

    /// The addresses by which others know a site: IPv4, IPv6.
    pub(crate) fn addresses(&self, site: Site) -> [IpAddr; 2] {
        match site {
            Site::Pod(pod) => self.pods[pod].addresses,
            Site::Node(node) => self.nodes[node],
            Site::Outside => self.outside,
        }
    }

    /// What a connection dials; `family` is 0 for IPv4 and 1 for IPv6, `port` the number of the port.
    pub(crate) fn dialled(&self, to: Target, family: usize, port: usize) -> SocketAddr {
        match to {
            Target::Site(site) => (self.addresses(site)[family], POD_PORTS[port]),
            Target::Service(number) => {
                (self.services[number].addresses[family], SERVICE_PORTS[port])
            }
        }
        .into()
    }

    /// The pod that has this address.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<usize> {
        let mut pods = self.pods.iter();
        pods.position(|pod| pod.addresses.contains(&address))
    }

    /// The machine on which a site is; two sites of one machine have no wire between them.
    pub(crate) fn machine(&self, site: Site) -> usize {
        match site {
            Site::Pod(pod) => self.pods[pod].node,
            Site::Node(node) => node,
            Site::Outside => NODES.len(),
        }
    }

    pub(crate) fn describe(&self, site: Site) -> String {
        match site {
            Site::Pod(pod) => {
                let pod = &self.pods[pod];
                let node = NODES[pod.node];
                let [v4, v6] = pod.addresses;
                format!(
                    "pod {} ({v4}, {v6}; account {}; node {node})",
                    pod.full_name(),
                    pod.account
                )
            }
            Site::Node(node) => format!("node {}", NODES[node]),
            Site::Outside => "the host outside".to_owned(),
        }
    }
}

impl Pod {
    pub(crate) fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    pub(crate) fn identity(&self) -> String {
        format!(
            "spiffe://{TRUST_DOMAIN}/ns/{}/sa/{}",
            self.namespace, self.account
        )
    }
}

/// The value of the label that says whether a pod is in the mesh.
pub(crate) fn membership(member: bool) -> &'static str {
    if member { "enabled" } else { "disabled" }
}

pub(crate) const NODES: [&str; 2] = ["a", "b"];
pub(crate) const MEMBERSHIP: &str = "auth-daemon.io/mesh";
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";
/// The ports that every server listens on.
pub(crate) const POD_PORTS: [u16; 2] = [8080, 8081];
const SERVICE_PORTS: [u16; 2] = [80, 81];
/// Addresses before the mesh is made.
const UNKNOWN: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];
