//! Decides how a connection reaches an endpoint. Pure: everything that the decision depends on is an argument.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use auth_common::TUNNEL_PORT;
use auth_mesh::{AddressKind, Endpoint, Published, Snapshot, Workload, policy::Policies};

use super::{
    local_pods::{LocalPod, LocalPods},
    unclaimed::{self, Unclaimed},
};

/// How a connection reaches an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChosenPath {
    /// The endpoint is the client's own pod: over its loopback.
    Itself,
    /// The endpoint is another pod that this node serves, and both have private links: directly, if both ends' checks pass.
    SameNode(Arc<LocalPod>),
    /// Without TLS, for this reason.
    Plaintext(&'static str),
    /// Over mutual TLS, to the daemon of the endpoint's node.
    Tunnel,
    /// Over mutual TLS by HBONE, to another daemon than ours, or to a waypoint.
    Hbone(Hbone),
}

/// Where an HBONE stream leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hbone {
    /// The address that speaks HBONE.
    pub(super) at: SocketAddr,
    /// What it is asked for: the endpoint or, at a waypoint, what the client has dialled.
    pub(super) authority: SocketAddr,
}

/// Why a connection must not reach an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPath {
    /// The endpoint is taken for one outside the mesh, but its address is the mesh's by now.
    #[error("it counts as outside the mesh, but its address is the mesh's")]
    NotOutside,
    /// No object claims the endpoint's address.
    #[error(transparent)]
    Unclaimed(#[from] unclaimed::Refused),
    /// The client's pod is itself the waypoint.
    #[error(
        "its traffic goes through a waypoint, which is the client itself: a waypoint within the mesh is not supported; \
         label its pods istio.io/dataplane-mode: none"
    )]
    OwnWaypoint,
    /// The endpoint's node has no daemon for it, and plaintext would be a downgrade.
    #[error("no daemon is ready on its node {node}, and {why}")]
    NoDaemon {
        node: String,
        /// Why plaintext is out of the question, and what to do.
        why: &'static str,
    },
}

const NOT_IN_MESH: &str = "the server is none of the mesh's pods";
const NO_DAEMON_YET: &str = "the server's node has had no ready daemon yet";
const MUTUAL_TLS_ONLY: &str = "it takes mutual TLS alone; see the DaemonSet's pod there";
const NOT_ITS_ADDRESS: &str =
    "an endpoint slice gives it an address that is not its own; fix the slice";
const HAD_DAEMON: &str = "there was one before, so plaintext would be a downgrade; see the DaemonSet's pod there or, if the \
     node leaves the mesh, annotate the Node with auth-daemon.io/tunnel: disabled";

/// What is known on the client's node.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// The client pod's addresses.
    pub(super) own_addresses: &'a [IpAddr],
    /// What a waypoint is asked for, if the endpoint is one that the traffic goes through: what the client has dialled or, if
    /// that is where a service or pod is exposed, the service's or pod's own address.
    pub(super) through_waypoint: Option<SocketAddr>,
    /// The pods that this node serves; `None` if the client's connections to them use the tunnel.
    pub(super) local_pods: Option<&'a LocalPods>,
    /// The name of this node.
    pub(super) node_name: &'a str,
    pub(super) snapshot: &'a Snapshot,
    pub(super) unclaimed: &'a Unclaimed,
    /// Whether a node has, or once had, a ready daemon.
    pub(super) had_daemon: &'a dyn Fn(&str) -> bool,
    /// Loaded only where the decision depends on them.
    pub(super) policies: &'a Published<Policies>,
}

/// Decides how a connection reaches `endpoint`. The first path that applies is chosen: the waypoint, the pod itself, a pod of
/// this node, plaintext, the tunnel, HBONE. It fails where plaintext would be a downgrade: a node that had a ready daemon once can do more.
pub(super) fn choose_path(endpoint: &Endpoint, view: &View<'_>) -> Result<ChosenPath, NoPath> {
    let address = endpoint.address.ip();
    let is_own = view.own_addresses.contains(&address);
    // Never around a waypoint: neither over the loopback, nor in the kernel, nor by our own framing.
    if let Some(authority) = view.through_waypoint {
        let at = endpoint.address;
        return match is_own {
            true => Err(NoPath::OwnWaypoint),
            false => Ok(ChosenPath::Hbone(Hbone { at, authority })),
        };
    }
    if is_own {
        return Ok(ChosenPath::Itself);
    }
    let local_pod = view
        .local_pods
        .and_then(|pods| pods.by_address.get(&address));
    if let Some(local_pod) = local_pod.filter(|pod| pod.has_private_link) {
        return Ok(ChosenPath::SameNode(local_pod.clone()));
    }
    // A peer of another trust domain or cluster runs this daemon too. What it is shows in the handshake.
    let pod = endpoint.workload.as_ref();
    if endpoint.foreign || pod.is_some_and(|pod| pod.name.cluster().is_some()) {
        return Ok(ChosenPath::Tunnel);
    }
    let (true, Some(server)) = (endpoint.meshed, &endpoint.workload) else {
        // Whatever an endpoint slice says: an address that belongs to the mesh by now is not reached without TLS, nor
        // one that may belong to it because no object claims it.
        return match view.snapshot.kind(address) {
            Some(AddressKind::Outside) => Ok(ChosenPath::Plaintext(NOT_IN_MESH)),
            Some(AddressKind::Pod | AddressKind::Service) => Err(NoPath::NotOutside),
            None => match view.unclaimed.refuse(address) {
                Some(refused) => Err(refused.into()),
                None => Ok(ChosenPath::Plaintext(NOT_IN_MESH)),
            },
        };
    };
    // Our own framing is preferred: it keeps the app's port, which network policies see. Where it is not known which nodes
    // have a daemon of ours, what is said about the pod counts.
    let own = server.node == view.node_name;
    let hbone = server.hbone == auth_mesh::Hbone::Offered;
    let has_daemon = view.snapshot.has_daemon(&server.node);
    if own || has_daemon && (view.snapshot.knows_daemons() || !hbone) {
        return Ok(ChosenPath::Tunnel);
    }
    if hbone {
        return Ok(ChosenPath::Hbone(Hbone {
            at: SocketAddr::new(address, TUNNEL_PORT),
            authority: endpoint.address,
        }));
    }
    // Plaintext needs the pod's own address: an endpoint slice that names another address for it is no reason. A finished
    // pod's address may be another's by now.
    let is_own_address = view
        .snapshot
        .pod(address)
        .is_some_and(|pod| pod.name == server.name && !pod.finished);
    let why = if !takes_plaintext(&view.policies.current(), endpoint.address, server) {
        MUTUAL_TLS_ONLY
    } else if (view.had_daemon)(&server.node) {
        HAD_DAEMON
    } else if !is_own_address {
        NOT_ITS_ADDRESS
    } else {
        return Ok(ChosenPath::Plaintext(NO_DAEMON_YET));
    };
    Err(NoPath::NoDaemon {
        node: server.node.clone(),
        why,
    })
}

fn takes_plaintext(policies: &Policies, address: SocketAddr, server: &Workload) -> bool {
    let policy = policies.workload(&server.name.namespace, &server.labels);
    policy.mode(address.port()).mode.takes_plaintext()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use auth_common::MeshKind;
    use auth_mesh::{
        Edit, Inventory, Membership, ObjectName,
        policy::{Settings, api::Mode},
    };

    use super::*;
    use crate::proxy::unclaimed::Gone;

    const CLIENT: &str = "10.1.0.1";
    const SERVER: &str = "10.1.0.2";
    const OUTSIDE: &str = "192.0.2.7";
    const KNOWN_OUTSIDE: &str = "10.1.0.8";
    /// Was a pod's address.
    const GONE: &str = "192.0.2.8";

    fn name(name: &str) -> ObjectName {
        ObjectName {
            namespace: "default".into(),
            name: name.into(),
        }
    }

    fn pod(pod: &str, address: &str, node: &str) -> Arc<Workload> {
        Arc::new(Workload {
            addresses: vec![address.parse().unwrap()],
            node: node.into(),
            ..Workload::new(
                name(pod),
                format!("spiffe://a/ns/default/sa/{pod}").parse().unwrap(),
            )
        })
    }

    fn endpoint(workload: Option<Arc<Workload>>, address: &str, meshed: bool) -> Endpoint {
        Endpoint {
            workload,
            address: SocketAddr::new(address.parse().unwrap(), 8080),
            meshed,
            foreign: false,
            node: None,
        }
    }

    /// What node a knows of the daemon on node b.
    #[derive(Clone, Copy, Debug)]
    enum Daemon {
        /// None has been ready yet.
        Never,
        Ready,
        /// One was ready before.
        Before,
        /// One was ready before this node's daemon started.
        BeforeRestart,
        /// One was ready before an administrator disabled the node's tunnel.
        Disabled,
        /// Nothing reports which nodes have one.
        Untracked,
    }

    /// Two pods, and one outside the mesh.
    fn snapshot(daemon: Daemon) -> Snapshot {
        let known_outside = Workload {
            membership: Some(Membership::Disabled),
            ..(*pod("outside", KNOWN_OUTSIDE, "b")).clone()
        };
        let workloads = vec![
            (*pod("client", CLIENT, "a")).clone(),
            (*pod("server", SERVER, "b")).clone(),
            known_outside,
        ];
        let mut edit = Edit::from(Snapshot::new(Inventory {
            workloads,
            services: Vec::new(),
        }));
        if !matches!(daemon, Daemon::Untracked) {
            edit.know_daemons();
        }
        if !matches!(
            daemon,
            Daemon::Never | Daemon::BeforeRestart | Daemon::Untracked
        ) {
            edit.daemon(&name("daemon-b"), Some("b"));
        }
        if matches!(daemon, Daemon::Before | Daemon::Disabled) {
            edit.daemon(&name("daemon-b"), None);
        }
        edit.disable_tunnel("b", matches!(daemon, Daemon::Disabled));
        edit.finish()
    }

    fn policies(mode: Mode) -> Published<Policies> {
        let settings = Settings {
            mode,
            ..Settings::default()
        };
        Published::holding(Policies::compile(settings, []))
    }

    fn local_pods(pods: &[Arc<Workload>]) -> LocalPods {
        let mut local_pods = LocalPods::default();
        for (cookie, pod) in (1..).zip(pods) {
            let local_pod = Arc::new(LocalPod {
                cookie,
                identity: pod.identity.clone(),
                addresses: pod.addresses.clone(),
                has_private_link: true,
            });
            local_pods.by_address.insert(pod.addresses[0], local_pod);
        }
        local_pods
    }

    /// What node a chooses, with this daemon on node b, in `mode`.
    fn choose(endpoint: &Endpoint, daemon: Daemon, mode: Mode) -> Result<ChosenPath, NoPath> {
        let unclaimed = Unclaimed::default();
        let network = ("10.1.0.0/16".parse().unwrap(), MeshKind::PodNetwork);
        unclaimed.set_networks([network].into());
        let gone = Gone {
            was: Some("pod default/old".into()),
            is_service: false,
            since: Instant::now(),
        };
        unclaimed.gone().add(GONE.parse().unwrap(), gone);
        let snapshot = snapshot(daemon);
        let remembered = matches!(daemon, Daemon::BeforeRestart);
        choose_path(
            endpoint,
            &View {
                own_addresses: &[CLIENT.parse().unwrap()],
                through_waypoint: None,
                local_pods: None,
                node_name: "a",
                snapshot: &snapshot,
                unclaimed: &unclaimed,
                had_daemon: &|node| snapshot.had_daemon(node) || (remembered && node == "b"),
                policies: &policies(mode),
            },
        )
    }

    fn plain(why: &'static str) -> Result<ChosenPath, NoPath> {
        Ok(ChosenPath::Plaintext(why))
    }

    fn no_daemon(why: &'static str) -> Result<ChosenPath, NoPath> {
        Err(NoPath::NoDaemon {
            node: "b".into(),
            why,
        })
    }

    #[test]
    fn reaches_a_pod_of_a_remote_cluster_by_the_tunnel_alone() {
        let east: auth_mesh::ClusterName = "east".parse().unwrap();
        // Its node has the name of this one.
        let remote = east.pod((*pod("server", SERVER, "a")).clone());
        let remote = endpoint(Some(Arc::new(remote)), SERVER, true);
        for daemon in [Daemon::Never, Daemon::Disabled, Daemon::Untracked] {
            let chosen = choose(&remote, daemon, Mode::Permissive);
            assert_eq!(chosen, Ok(ChosenPath::Tunnel));
        }
    }

    #[test]
    fn reaches_a_mesh_pod_by_the_tunnel_and_never_in_plaintext_once_its_node_had_a_daemon() {
        use Daemon::{Before, BeforeRestart, Disabled, Never, Ready};
        use Mode::{Permissive, Strict};
        let server = pod("server", SERVER, "b");
        let mesh_pod = endpoint(Some(server.clone()), SERVER, true);
        let other_address = endpoint(Some(server), OUTSIDE, true);
        let local = endpoint(Some(pod("neighbour", "10.1.0.3", "a")), "10.1.0.3", true);
        let tunnel = Ok(ChosenPath::Tunnel);
        for (endpoint, daemon, mode, expected) in [
            (&mesh_pod, Ready, Strict, tunnel.clone()),
            (&mesh_pod, Ready, Permissive, tunnel.clone()),
            (&mesh_pod, Never, Strict, no_daemon(MUTUAL_TLS_ONLY)),
            (&mesh_pod, Before, Strict, no_daemon(MUTUAL_TLS_ONLY)),
            (&mesh_pod, Disabled, Strict, no_daemon(MUTUAL_TLS_ONLY)),
            (&mesh_pod, Never, Permissive, plain(NO_DAEMON_YET)),
            (&mesh_pod, Before, Permissive, no_daemon(HAD_DAEMON)),
            (&mesh_pod, BeforeRestart, Permissive, no_daemon(HAD_DAEMON)),
            (&mesh_pod, Disabled, Permissive, plain(NO_DAEMON_YET)),
            (
                &other_address,
                Never,
                Permissive,
                no_daemon(NOT_ITS_ADDRESS),
            ),
            (&other_address, Ready, Permissive, tunnel.clone()),
            (&local, Never, Strict, tunnel),
        ] {
            let chosen = choose(endpoint, daemon, mode);
            assert_eq!(chosen, expected, "{endpoint:?}, {daemon:?}, {mode:?}");
        }
    }

    #[test]
    fn prefers_our_own_framing_to_hbone_and_hbone_to_plaintext() {
        use Daemon::{Before, Never, Ready, Untracked};
        let hbone = ChosenPath::Hbone(Hbone {
            at: SocketAddr::new(SERVER.parse().unwrap(), 15008),
            authority: SocketAddr::new(SERVER.parse().unwrap(), 8080),
        });
        let server = |node| {
            let server = Arc::new(Workload {
                hbone: auth_mesh::Hbone::Offered,
                ..(*pod("server", SERVER, node)).clone()
            });
            endpoint(Some(server), SERVER, true)
        };
        for (node, daemon, expected) in [
            ("b", Ready, ChosenPath::Tunnel),
            ("b", Never, hbone.clone()),
            ("b", Before, hbone.clone()),
            ("b", Untracked, hbone),
            // A pod of this node is served by this daemon.
            ("a", Never, ChosenPath::Tunnel),
        ] {
            let chosen = choose(&server(node), daemon, Mode::Permissive);
            assert_eq!(chosen, Ok(expected), "node {node}, {daemon:?}");
        }
    }

    #[test]
    fn reaches_an_endpoint_outside_the_mesh_only_if_its_address_is_known_or_in_no_network() {
        let at = |address| {
            choose(
                &endpoint(None, address, false),
                Daemon::Ready,
                Mode::Permissive,
            )
        };
        assert_eq!(at(OUTSIDE), plain(NOT_IN_MESH));
        assert_eq!(at(KNOWN_OUTSIDE), plain(NOT_IN_MESH));
        // Whatever a slice says, and whichever pod it names.
        assert_eq!(at(SERVER), Err(NoPath::NotOutside));
        for (workload, meshed) in [(Some(pod("server", SERVER, "b")), false), (None, true)] {
            let endpoint = endpoint(workload, SERVER, meshed);
            let chosen = choose(&endpoint, Daemon::Ready, Mode::Permissive);
            assert_eq!(chosen, Err(NoPath::NotOutside), "{endpoint:?}");
        }
        for address in [GONE, "10.1.0.77"] {
            let chosen = at(address);
            assert!(matches!(chosen, Err(NoPath::Unclaimed(_))), "{chosen:?}");
        }
    }

    #[test]
    fn reaches_an_endpoint_of_another_trust_domain_by_the_tunnel_alone() {
        for address in [OUTSIDE, KNOWN_OUTSIDE, GONE, SERVER, "10.1.0.77"] {
            let foreign = Endpoint {
                foreign: true,
                ..endpoint(None, address, false)
            };
            for daemon in [Daemon::Never, Daemon::Ready, Daemon::Disabled] {
                let chosen = choose(&foreign, daemon, Mode::Permissive);
                assert_eq!(chosen, Ok(ChosenPath::Tunnel), "{address} {daemon:?}");
            }
        }
    }

    #[test]
    fn prefers_the_pod_itself_and_pods_of_this_node() {
        let server = pod("server", SERVER, "b");
        let client = pod("client", CLIENT, "a");
        let local = local_pods(&[client.clone(), server.clone()]);
        let own = [CLIENT.parse().unwrap()];
        let to_server = endpoint(Some(server), SERVER, true);
        let to_itself = endpoint(Some(client), CLIENT, true);
        let (snapshot, policies) = (snapshot(Daemon::Ready), policies(Mode::Strict));
        let unclaimed = Unclaimed::default();
        let view = |local_pods| View {
            own_addresses: &own,
            through_waypoint: None,
            local_pods,
            node_name: "a",
            snapshot: &snapshot,
            unclaimed: &unclaimed,
            had_daemon: &|_| false,
            policies: &policies,
        };
        let same_node = ChosenPath::SameNode(local.by_address[&SERVER.parse().unwrap()].clone());
        assert_eq!(choose_path(&to_server, &view(Some(&local))), Ok(same_node));
        assert_eq!(choose_path(&to_server, &view(None)), Ok(ChosenPath::Tunnel));
        assert_eq!(
            choose_path(&to_itself, &view(Some(&local))),
            Ok(ChosenPath::Itself)
        );
        // On a shared link, TLS must prove who answers. The pod itself is reached without a link.
        let mut shared = local_pods(&[]);
        for (address, pod) in &local.by_address {
            let on_shared = LocalPod {
                has_private_link: false,
                ..(**pod).clone()
            };
            shared.by_address.insert(*address, Arc::new(on_shared));
        }
        let chosen = choose_path(&to_server, &view(Some(&shared)));
        assert_eq!(chosen, Ok(ChosenPath::Tunnel));
        let chosen = choose_path(&to_itself, &view(Some(&shared)));
        assert_eq!(chosen, Ok(ChosenPath::Itself));
    }

    #[test]
    fn reaches_a_waypoint_by_hbone_alone_wherever_it_is() {
        let dialled = "10.96.0.7:80".parse().unwrap();
        let local = local_pods(&[pod("proxy", SERVER, "a")]);
        let own = [CLIENT.parse().unwrap()];
        let unclaimed = Unclaimed::default();
        let policies = policies(Mode::Permissive);
        for (node, address, meshed, expected) in [
            // Outside the mesh, as waypoints are, or in it; served by this node, or by another with a daemon of ours.
            ("a", SERVER, false, Ok(SERVER)),
            ("a", SERVER, true, Ok(SERVER)),
            ("b", SERVER, true, Ok(SERVER)),
            ("b", OUTSIDE, false, Ok(OUTSIDE)),
            ("a", CLIENT, true, Err(NoPath::OwnWaypoint)),
        ] {
            let proxy = endpoint(Some(pod("proxy", address, node)), address, meshed);
            let snapshot = snapshot(Daemon::Ready);
            let view = View {
                own_addresses: &own,
                through_waypoint: Some(dialled),
                local_pods: Some(&local),
                node_name: "a",
                snapshot: &snapshot,
                unclaimed: &unclaimed,
                had_daemon: &|_| true,
                policies: &policies,
            };
            let expected = expected.map(|at| {
                ChosenPath::Hbone(Hbone {
                    at: SocketAddr::new(at.parse().unwrap(), 8080),
                    authority: dialled,
                })
            });
            assert_eq!(
                choose_path(&proxy, &view),
                expected,
                "{node} {address} {meshed}"
            );
        }
    }
}
