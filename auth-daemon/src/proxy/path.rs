//! Decides how a connection reaches an endpoint. Pure: everything that the decision depends on is an argument.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use auth_mesh::{Endpoint, Snapshot, Workload, policy::Policies};

use super::local_pods::{LocalPod, LocalPods};

/// How a connection reaches an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ChosenPath {
    /// The endpoint is the client's own pod: over its loopback.
    Itself,
    /// The endpoint is another pod that this node serves: directly, if both ends' checks pass.
    SameNode(Arc<LocalPod>),
    /// Without TLS, for this reason.
    Plaintext(&'static str),
    /// Over mutual TLS, to the daemon of the endpoint's node.
    Tunnel,
}

/// Why a connection must not reach an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPath {
    /// The endpoint is taken for one outside the mesh, but its address is the mesh's by now.
    #[error("it is taken to be outside of the mesh, and its address is the mesh's")]
    NotOutside,
    /// The endpoint takes mutual TLS only, and its node has no daemon for it.
    #[error(
        "no daemon is ready on its node {0}, and it takes mutual TLS alone; see the DaemonSet's pod there"
    )]
    NoDaemon(String),
}

/// What is known on the client's node.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    /// The client pod's addresses.
    pub(super) own_addresses: &'a [IpAddr],
    /// The pods that this node serves; `None` if connections between them use the tunnel.
    pub(super) local_pods: Option<&'a LocalPods>,
    /// The name of this node.
    pub(super) node_name: &'a str,
    pub(super) snapshot: &'a Snapshot,
    pub(super) policies: &'a Policies,
}

/// Decides how a connection reaches `endpoint`. The first path that applies is chosen: the pod itself, a pod of this node,
/// plaintext, the tunnel. It fails where plaintext would be a downgrade.
pub(super) fn choose_path(endpoint: &Endpoint, view: &View<'_>) -> Result<ChosenPath, NoPath> {
    let address = endpoint.address.ip();
    if view.own_addresses.contains(&address) {
        return Ok(ChosenPath::Itself);
    }
    let local_pod = view
        .local_pods
        .and_then(|pods| pods.by_address.get(&address));
    if let Some(local_pod) = local_pod {
        return Ok(ChosenPath::SameNode(local_pod.clone()));
    }
    let (true, Some(server)) = (endpoint.meshed, &endpoint.workload) else {
        // Whatever an endpoint slice says: an address that is the mesh's by now is not reached without TLS.
        return match view.snapshot.kind(address) {
            None => Ok(ChosenPath::Plaintext(
                "the server is none of the mesh's pods",
            )),
            Some(_) => Err(NoPath::NotOutside),
        };
    };
    if server.node == view.node_name || view.snapshot.has_daemon(&server.node) {
        return Ok(ChosenPath::Tunnel);
    }
    // Plaintext needs the pod's own address: an endpoint slice that names another address for it is no reason.
    let is_own_address = view
        .snapshot
        .pod(address)
        .is_some_and(|pod| pod.name == server.name);
    if is_own_address && takes_plaintext(view.policies, endpoint.address, server) {
        Ok(ChosenPath::Plaintext(
            "no daemon is ready on the server's node",
        ))
    } else {
        Err(NoPath::NoDaemon(server.node.clone()))
    }
}

fn takes_plaintext(policies: &Policies, address: SocketAddr, server: &Workload) -> bool {
    let policy = policies.workload(&server.name.namespace, &server.labels);
    policy.mode(address.port()).mode.takes_plaintext()
}

#[cfg(test)]
mod tests {
    use auth_mesh::{
        Edit, Inventory, ObjectName,
        policy::{Settings, api::Mode},
    };

    use super::*;

    const CLIENT: &str = "10.1.0.1";
    const SERVER: &str = "10.1.0.2";
    const OUTSIDE: &str = "192.0.2.7";

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
            node: None,
        }
    }

    /// Two pods; node b has a daemon, or not.
    fn snapshot(b_has_daemon: bool) -> Snapshot {
        let workloads = vec![
            (*pod("client", CLIENT, "a")).clone(),
            (*pod("server", SERVER, "b")).clone(),
        ];
        let mut edit = Edit::from(Snapshot::new(Inventory {
            workloads,
            services: Vec::new(),
        }));
        edit.know_daemons();
        if b_has_daemon {
            edit.daemon(&name("daemon-b"), Some("b"));
        }
        edit.finish()
    }

    fn policies(mode: Mode) -> Policies {
        let settings = Settings {
            mode,
            ..Settings::default()
        };
        Policies::compile(settings, [])
    }

    fn local_pods(pods: &[Arc<Workload>]) -> LocalPods {
        let mut local_pods = LocalPods::default();
        for (cookie, pod) in (1..).zip(pods) {
            let local_pod = Arc::new(LocalPod {
                cookie,
                identity: pod.identity.clone(),
                addresses: pod.addresses.clone(),
            });
            local_pods.by_address.insert(pod.addresses[0], local_pod);
        }
        local_pods
    }

    /// What node a chooses, with a daemon on node b or not, in `mode`.
    fn choose(endpoint: &Endpoint, b_has_daemon: bool, mode: Mode) -> Result<ChosenPath, NoPath> {
        choose_path(
            endpoint,
            &View {
                own_addresses: &[CLIENT.parse().unwrap()],
                local_pods: None,
                node_name: "a",
                snapshot: &snapshot(b_has_daemon),
                policies: &policies(mode),
            },
        )
    }

    #[test]
    fn chooses_by_membership_daemon_and_mode() {
        let server = pod("server", SERVER, "b");
        let mesh_pod = endpoint(Some(server.clone()), SERVER, true);
        let other_address = endpoint(Some(server.clone()), OUTSIDE, true);
        let known_outside = endpoint(Some(server), SERVER, false);
        let outside = endpoint(None, OUTSIDE, false);
        let unknown_in_mesh = endpoint(None, SERVER, true);
        let local = endpoint(Some(pod("neighbour", "10.1.0.3", "a")), "10.1.0.3", true);
        let plain = |reason| Ok(ChosenPath::Plaintext(reason));
        let no_mesh_pod = "the server is none of the mesh's pods";
        let no_daemon = "no daemon is ready on the server's node";
        let needs_daemon = Err(NoPath::NoDaemon("b".into()));
        for (case, endpoint, b_has_daemon, mode, expected) in [
            (
                "a daemon",
                &mesh_pod,
                true,
                Mode::Strict,
                Ok(ChosenPath::Tunnel),
            ),
            (
                "a daemon",
                &mesh_pod,
                true,
                Mode::Permissive,
                Ok(ChosenPath::Tunnel),
            ),
            (
                "no daemon",
                &mesh_pod,
                false,
                Mode::Strict,
                needs_daemon.clone(),
            ),
            (
                "no daemon",
                &mesh_pod,
                false,
                Mode::Permissive,
                plain(no_daemon),
            ),
            (
                "a slice's address",
                &other_address,
                false,
                Mode::Permissive,
                needs_daemon,
            ),
            (
                "a slice's address",
                &other_address,
                true,
                Mode::Permissive,
                Ok(ChosenPath::Tunnel),
            ),
            ("outside", &outside, true, Mode::Strict, plain(no_mesh_pod)),
            (
                "outside, but a pod's address",
                &known_outside,
                true,
                Mode::Permissive,
                Err(NoPath::NotOutside),
            ),
            (
                "no pod, but a pod's address",
                &unknown_in_mesh,
                true,
                Mode::Permissive,
                Err(NoPath::NotOutside),
            ),
            (
                "this node",
                &local,
                false,
                Mode::Strict,
                Ok(ChosenPath::Tunnel),
            ),
        ] {
            assert_eq!(
                choose(endpoint, b_has_daemon, mode),
                expected,
                "{case}, {mode:?}"
            );
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
        let (snapshot, policies) = (snapshot(true), policies(Mode::Strict));
        let view = |local_pods| View {
            own_addresses: &own,
            local_pods,
            node_name: "a",
            snapshot: &snapshot,
            policies: &policies,
        };
        let same_node = ChosenPath::SameNode(local.by_address[&SERVER.parse().unwrap()].clone());
        assert_eq!(choose_path(&to_server, &view(Some(&local))), Ok(same_node));
        assert_eq!(choose_path(&to_server, &view(None)), Ok(ChosenPath::Tunnel));
        assert_eq!(
            choose_path(&to_itself, &view(Some(&local))),
            Ok(ChosenPath::Itself)
        );
    }
}
