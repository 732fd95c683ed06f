//! The generated model: what there is, and what is in force.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};

use mesh_tests::{Firewall, Mesh, Place, PodSpec, Result, ServiceSpec};
use serde_json::{Value, json};

use crate::events::Event;
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
    /// Whether the nodes route between their pods, instead of a bridge on each node.
    pub(crate) routed: bool,
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
    /// Addresses that its namespace has and no object lists.
    pub(crate) second: Option<[IpAddr; 2]>,
    /// Whether a namespace is nested in it, with a server behind a port of the pod.
    pub(crate) nested: bool,
    /// The ports of its node that lead to its own (`hostPort`).
    pub(crate) host_ports: Option<[u16; 2]>,
}

/// A Service with a port 80 to 8080 and 81 to 8081.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) namespace: &'static str,
    pub(crate) app: &'static str,
    /// IPv4, IPv6.
    pub(crate) addresses: [IpAddr; 2],
    /// Whether the nodes have its addresses on their loopback, as in kube-proxy's mode IPVS.
    pub(crate) on_nodes: bool,
    /// If it is of type LoadBalancer: how it is exposed.
    pub(crate) exposed: Option<Exposed>,
}

/// How a Service is exposed on addresses that are not its own.
#[derive(Debug, Clone)]
pub(crate) struct Exposed {
    /// Its two ports on each node.
    pub(crate) node_ports: [u16; 2],
    /// IPv4, IPv6 of its load balancer, and of its `externalIPs`.
    external: [[IpAddr; 2]; 2],
    /// The pod to which the nodes translate all of these.
    pub(crate) pod: usize,
}

/// What a world is made of. Fields are dropped in this order.
#[derive(Debug)]
pub(crate) struct Built {
    /// The namespaces nested in pods.
    pub(crate) nested: BTreeMap<usize, Place>,
    _firewalls: Vec<Firewall>,
    pub(crate) mesh: Mesh,
}

/// What is in force at a moment.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) pods: Vec<PodState>,
    /// AuthorizationPolicies and PeerAuthentications by name.
    pub(crate) policies: BTreeMap<String, Value>,
    /// Whether each node's daemon is running and ready.
    pub(crate) serving: [bool; 2],
    /// Whether each node is ready, and with it its pods, as the API says.
    pub(crate) ready: [bool; 2],
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodState {
    /// Whether it is in the mesh. If not, its manifest says so.
    pub(crate) member: bool,
    /// Whether it exists. It does not while it is being recreated.
    pub(crate) present: bool,
    /// What its object says. Its processes run in any case.
    pub(crate) object: Object,
    pub(crate) labels: BTreeMap<String, String>,
}

/// What there is of a pod's manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Object {
    Running,
    /// `status.phase` says that it has failed.
    Failed,
    /// The manifest was removed.
    Removed,
}

/// Where programs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    Pod(usize),
    /// The namespace that is nested in a pod.
    Nested(usize),
    /// A process of the node itself.
    Node(usize),
    /// A pod with `hostNetwork`.
    HostPod(usize),
    Outside,
}

/// What a connection dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Site(Site),
    Service(usize),
    /// A Service's port on a node.
    NodePort {
        service: usize,
        node: usize,
    },
    /// A Service's load balancer, or one of its external addresses.
    External {
        service: usize,
        which: usize,
    },
    /// A pod's port on its node.
    HostPort(usize),
    /// The address of a pod that no object lists.
    Second(usize),
    /// The port of a pod that leads to its nested namespace.
    Nested(usize),
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
                // In its node's network. The mesh's own pods have addresses from 2 upwards.
                second: random.chance(40).then(|| {
                    let (node, host) = (1 + node as u8, 200 + number as u8);
                    let v6 = [0xfd77, node.into(), 0, 0, 0, 0, 0, host.into()];
                    [IpAddr::from([10, 77, node, host]), IpAddr::from(v6)]
                }),
                nested: random.chance(25),
                host_ports: random.chance(40).then(|| {
                    let first = 31_080 + 2 * number as u16;
                    [first, first + 1]
                }),
            });
            states.push(PodState {
                member,
                present: true,
                object: Object::Running,
                labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
            });
        }
        let services = (0..4).map(|number| {
            let (namespace, app) = (policies::NAMESPACES[number / 2], policies::APPS[number % 2]);
            let selected: Vec<usize> = (0..count)
                .filter(|pod| {
                    pods[*pod].namespace == namespace && states[*pod].labels["app"] == app
                })
                .collect();
            let exposed = (!selected.is_empty() && random.chance(60)).then(|| {
                let first = 30_080 + 2 * number as u16;
                let external = [0x10, 0x20].map(|kind| {
                    let host = kind + number as u8;
                    let v6 = [0x2001, 0xdb8, 0x51, 0, 0, 0, 0, host.into()];
                    [IpAddr::from([198, 51, 100, host]), IpAddr::from(v6)]
                });
                Exposed {
                    node_ports: [first, first + 1],
                    external,
                    pod: random.one(&selected),
                }
            });
            Service {
                name: format!("s{number}"),
                namespace,
                app,
                addresses: [
                    IpAddr::from([10, 96, 0, 10 + number as u8]),
                    IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 0x10 + number as u16]),
                ],
                on_nodes: random.chance(40),
                exposed,
            }
        });
        let services = services.collect();
        let world = Self {
            pods,
            services,
            nodes: [UNKNOWN; 2],
            outside: UNKNOWN,
            mode: random.one(&["STRICT", "PERMISSIVE"]),
            same_node_tunnel: random.chance(30),
            routed: random.chance(50),
        };
        let mut state = State {
            pods: states,
            policies: BTreeMap::new(),
            serving: [true; 2],
            ready: [true; 2],
        };
        for number in 0..random.below(3) {
            Event::Apply(policies::generate(random, &format!("first-{number}"))).apply(&mut state);
        }
        (world, state)
    }

    /// Makes the mesh, without daemons, and enters all addresses.
    pub(crate) fn build(&mut self, state: &State) -> Result<Built> {
        let mut builder = Mesh::builder().node(NODES[0]).node(NODES[1]);
        if self.routed {
            builder = builder.routed();
        }
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
        for policy in state.policies.values() {
            mesh.manifests().apply(policy)?;
        }
        for pod in &mut self.pods {
            let built = mesh.pod(&pod.full_name());
            pod.addresses = [built.ipv4().into(), built.ipv6().into()];
        }
        self.nodes = NODES.map(|node| {
            let node = mesh.node(node);
            [node.ipv4().into(), node.ipv6().into()]
        });
        self.outside = [mesh.outside_ipv4().into(), mesh.outside_ipv6().into()];
        for number in 0..self.pods.len() {
            self.add_second_addresses(&mesh, number)?;
        }
        self.add_addresses_of_services(&mesh)?;
        self.expose(&mesh)?;
        let mut firewalls = Vec::new();
        for (number, node) in NODES.into_iter().enumerate() {
            let rules = self.translation(number);
            firewalls.push(Firewall::install(mesh.node(node), &rules)?);
        }
        let mut nested = BTreeMap::new();
        for (number, pod) in self.pods.iter().enumerate().filter(|(_, pod)| pod.nested) {
            let pod = mesh.pod(&pod.full_name());
            let (place, v4, v6) = mesh.nest(&pod)?;
            firewalls.push(Firewall::published_port(
                &pod,
                NESTED_PORT,
                SocketAddrV4::new(v4, POD_PORTS[0]),
                SocketAddrV6::new(v6, POD_PORTS[0], 0, 0),
            )?);
            nested.insert(number, place);
        }
        Ok(Built {
            nested,
            _firewalls: firewalls,
            mesh,
        })
    }

    /// Gives a pod its second addresses, if it has some.
    pub(crate) fn add_second_addresses(&self, mesh: &Mesh, number: usize) -> Result<()> {
        let pod = &self.pods[number];
        let built = mesh.pod(&pod.full_name());
        for address in pod.second.into_iter().flatten() {
            mesh.route_to_pod(&built, address)?;
            // Never a source address: IPv4 takes the first of a network, IPv6 takes none that is deprecated.
            let more: &[&str] = if address.is_ipv6() {
                &["noprefixroute", "nodad", "preferred_lft", "0"]
            } else {
                &["noprefixroute"]
            };
            let address = format!("{address}/{}", if address.is_ipv6() { 64 } else { 24 });
            let command = ["address", "add", &address, "dev", "eth0"];
            let command = command.iter().chain(more);
            built.run("ip", command)?.ok()?;
        }
        Ok(())
    }

    fn add_addresses_of_services(&self, mesh: &Mesh) -> Result<()> {
        let services = self.services.iter().filter(|service| service.on_nodes);
        for address in services.flat_map(|service| service.addresses) {
            for node in NODES {
                let command = ["address", "add", &address.to_string(), "dev", "lo"];
                mesh.node(node).run("ip", command)?.ok()?;
            }
        }
        Ok(())
    }

    /// Writes the objects of nodes, and how Services and pods are exposed.
    fn expose(&self, mesh: &Mesh) -> Result<()> {
        let manifests = mesh.manifests();
        // A daemon knows a node port by the addresses of the nodes.
        for node in 0..NODES.len() {
            self.write_node(mesh, node, true)?;
        }
        for service in &self.services {
            let Some(exposed) = &service.exposed else {
                continue;
            };
            let [balancer, external] = exposed.external;
            manifests.edit("Service", service.namespace, &service.name, |service| {
                service["spec"]["type"] = "LoadBalancer".into();
                service["spec"]["externalIPs"] = json!(external);
                let ingress = balancer.map(|ip| json!({"ip": ip}));
                service["status"] = json!({"loadBalancer": {"ingress": ingress}});
                for (number, port) in exposed.node_ports.into_iter().enumerate() {
                    service["spec"]["ports"][number]["nodePort"] = port.into();
                }
            })?;
        }
        for pod in &self.pods {
            let Some(host_ports) = pod.host_ports else {
                continue;
            };
            let addresses = self.nodes[pod.node].map(|ip| json!({"ip": ip}));
            manifests.edit("Pod", pod.namespace, &pod.name, |pod| {
                let ports = POD_PORTS.iter().zip(host_ports);
                let ports =
                    ports.map(|(port, host)| json!({"containerPort": port, "hostPort": host}));
                pod["spec"]["containers"][0]["ports"] = ports.collect();
                pod["status"]["hostIPs"] = json!(addresses);
            })?;
        }
        // The host outside reaches what is nobody's own address through the first node.
        let [v4, v6] = [
            mesh.node(NODES[0]).ipv4().to_string(),
            mesh.node(NODES[0]).ipv6().to_string(),
        ];
        for (network, node) in [(EXTERNAL[0], v4), (EXTERNAL[1], v6)] {
            let command = ["route", "add", network, "via", &node];
            mesh.outside().run("ip", command)?.ok()?;
        }
        Ok(())
    }

    /// Writes the object of a node.
    pub(crate) fn write_node(&self, mesh: &Mesh, number: usize, ready: bool) -> Result<()> {
        let name = NODES[number];
        let addresses = self.nodes[number].map(|ip| json!({"type": "InternalIP", "address": ip}));
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "status": {"addresses": addresses, "conditions": is_ready(ready)},
        });
        mesh.manifests()
            .write(&format!("node-{name}.json"), &node.to_string())
    }

    /// Packet filter rules that translate a node's ports, and the addresses at which Services are exposed, as kube-proxy's
    /// do: the pod sees the node's address.
    fn translation(&self, node: usize) -> String {
        let mut rules =
            "chain prerouting {\n  type nat hook prerouting priority dstnat;\n".to_owned();
        let mut lead = |[from_v4, from_v6]: [IpAddr; 2], ports: [u16; 2], pod: usize| {
            let [v4, v6] = self.pods[pod].addresses;
            for (port, to) in ports.into_iter().zip(POD_PORTS) {
                rules += &format!(
                    "  ip daddr {from_v4} tcp dport {port} dnat ip to {v4}:{to}\n  \
                     ip6 daddr {from_v6} tcp dport {port} dnat ip6 to [{v6}]:{to}\n",
                );
            }
        };
        for exposed in self
            .services
            .iter()
            .filter_map(|service| service.exposed.as_ref())
        {
            lead(self.nodes[node], exposed.node_ports, exposed.pod);
            for address in exposed.external {
                lead(address, SERVICE_PORTS, exposed.pod);
            }
        }
        for (number, pod) in self
            .pods
            .iter()
            .enumerate()
            .filter(|(_, pod)| pod.node == node)
        {
            if let Some(ports) = pod.host_ports {
                lead(self.nodes[node], ports, number);
            }
        }
        rules
            + "}\nchain postrouting {\n  type nat hook postrouting priority srcnat;\n  \
                 ct status dnat masquerade\n}"
    }

    /// The addresses by which others know a site: IPv4, IPv6.
    pub(crate) fn addresses(&self, site: Site) -> [IpAddr; 2] {
        match site {
            Site::Pod(pod) | Site::Nested(pod) => self.pods[pod].addresses,
            Site::Node(node) | Site::HostPod(node) => self.nodes[node],
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
            Target::NodePort { service, node } => {
                let exposed = self.services[service].exposed.as_ref();
                let exposed = exposed.expect("a target is one that there is");
                (self.nodes[node][family], exposed.node_ports[port])
            }
            Target::External { service, which } => {
                let exposed = self.services[service].exposed.as_ref();
                let exposed = exposed.expect("a target is one that there is");
                (exposed.external[which][family], SERVICE_PORTS[port])
            }
            Target::HostPort(number) => {
                let pod = &self.pods[number];
                let ports = pod.host_ports.expect("a target is one that there is");
                (self.nodes[pod.node][family], ports[port])
            }
            Target::Second(pod) => {
                let second = self.pods[pod].second;
                let second = second.expect("a target is one that there is");
                (second[family], POD_PORTS[port])
            }
            Target::Nested(pod) => (self.pods[pod].addresses[family], NESTED_PORT),
        }
        .into()
    }

    /// The pod that has this address.
    pub(crate) fn pod_at(&self, address: IpAddr) -> Option<usize> {
        let mut pods = self.pods.iter();
        pods.position(|pod| {
            pod.addresses
                .into_iter()
                .chain(pod.second.into_iter().flatten())
                .any(|own| own == address)
        })
    }

    /// The machine on which a site is; two sites of one machine have no wire between them.
    pub(crate) fn machine(&self, site: Site) -> usize {
        match site {
            Site::Pod(pod) | Site::Nested(pod) => self.pods[pod].node,
            Site::Node(node) | Site::HostPod(node) => node,
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
            Site::Nested(pod) => format!("what is nested in {}", self.describe(Site::Pod(pod))),
            Site::Node(node) => format!("node {}", NODES[node]),
            Site::HostPod(node) => format!("a pod in the network of node {}", NODES[node]),
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

/// The conditions of an object that is ready, or not.
pub(crate) fn is_ready(ready: bool) -> Value {
    let status = if ready { "True" } else { "False" };
    json!([{"type": "Ready", "status": status}])
}

/// The value of the label that says whether a pod is in the mesh.
pub(crate) fn membership(member: bool) -> &'static str {
    if member { "enabled" } else { "disabled" }
}

pub(crate) const NODES: [&str; 2] = ["a", "b"];
pub(crate) const MEMBERSHIP: &str = "auth-daemon.io/mesh";
pub(crate) const TRUST_DOMAIN: &str = "cluster.local";
/// The networks of load balancers and external addresses.
const EXTERNAL: [&str; 2] = ["198.51.100.0/24", "2001:db8:51::/64"];
/// The ports that every server listens on.
pub(crate) const POD_PORTS: [u16; 2] = [8080, 8081];
/// The port of a pod that leads to the server of its nested namespace.
pub(crate) const NESTED_PORT: u16 = 9090;
const SERVICE_PORTS: [u16; 2] = [80, 81];
/// Addresses before the mesh is made.
const UNKNOWN: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
];
