//! What is to happen to a connection: a plain table of who is in the mesh, what an address means and what the policies
//! say, which knows nothing of how the daemon works.

use std::net::{IpAddr, SocketAddr};

use crate::oracle::{Attributes, naive};
use crate::plan::Call;
use crate::world::{Object, POD_PORTS, PodState, Site, State, TRUST_DOMAIN, Target, World};

/// Whether a server may read what a caller sends, by the policies of this state. `local` is the address and port at
/// which the server accepts.
pub(crate) fn may_read(
    world: &World,
    state: &State,
    call: &Call,
    server: Site,
    local: SocketAddr,
) -> bool {
    let (Site::Pod(number) | Site::Nested(number)) = server else {
        return true;
    };
    let (pod, pod_state) = (&world.pods[number], &state.pods[number]);
    if !pod_state.member || call.from == Site::Pod(number) {
        return true;
    }
    // The node's own processes, such as the kubelet's probes.
    if call.from == Site::Node(pod.node) && translated_by(world, state, call).is_none() {
        return true;
    }
    let identity = match call.from {
        Site::Pod(caller) if state.pods[caller].member && !matches!(call.to, Target::Second(_)) => {
            Some(world.pods[caller].identity())
        }
        _ => None,
    };
    let source = source(world, state, call, server, local);
    allows(world, state, number, identity.as_deref(), source, local)
}

/// Whether the policies of this state admit plaintext to a server from this caller: what was open in plaintext before
/// its pod joined the mesh then continues.
pub(crate) fn admits_plaintext(
    world: &World,
    state: &State,
    call: &Call,
    server: Site,
    local: SocketAddr,
) -> bool {
    let (Site::Pod(number) | Site::Nested(number)) = server else {
        return true;
    };
    let source = source(world, state, call, server, local);
    allows(world, state, number, None, source, local)
}

fn allows(
    world: &World,
    state: &State,
    pod: usize,
    identity: Option<&str>,
    source: IpAddr,
    local: SocketAddr,
) -> bool {
    let attributes = Attributes::new(
        (identity, source),
        local,
        world.pods[pod].namespace,
        &state.pods[pod].labels,
        TRUST_DOMAIN,
    );
    let policies: Vec<_> = state.policies.values().cloned().collect();
    naive(&policies, world.mode, &attributes).allowed
}

/// The address that a server, which accepts at `local`, sees as its caller's.
pub(crate) fn source(
    world: &World,
    state: &State,
    call: &Call,
    server: Site,
    local: SocketAddr,
) -> IpAddr {
    let family = usize::from(local.is_ipv6());
    // A node reaches its own pods from its bridge.
    let of_node = |node: usize| match server {
        Site::Pod(pod) | Site::Nested(pod) if world.pods[pod].node == node => {
            let number = 1 + node as u8;
            let v6 = [0xfd77, number.into(), 0, 0, 0, 0, 0, 1];
            [IpAddr::from([10, 77, number, 1]), IpAddr::from(v6)][family]
        }
        _ => world.addresses(Site::Node(node))[family],
    };
    match (translated_by(world, state, call), call.from) {
        (Some(node), _) | (None, Site::Node(node) | Site::HostPod(node)) => of_node(node),
        (None, from) => world.addresses(from)[family],
    }
}

/// The node that translates both addresses of a connection, as it does where a Service or pod is exposed. It does not for
/// pods of the mesh: their daemon knows the Service or pod.
pub(crate) fn translated_by(world: &World, state: &State, call: &Call) -> Option<usize> {
    if is_member(state, call.from) {
        return None;
    }
    match call.to {
        Target::NodePort { node, .. } => Some(node),
        Target::HostPort(pod) => Some(world.pods[pod].node),
        Target::External { .. } => Some(match call.from {
            Site::Pod(pod) => world.pods[pod].node,
            // The host outside has a route to the first node.
            _ => 0,
        }),
        _ => None,
    }
}

/// Whether nothing that these two send each other may be readable on a wire: both are pods of the mesh.
///
/// The promise is only for STRICT. Pods of the mesh use TLS in PERMISSIVE as well, as long as both nodes have a daemon
/// or are known by manifests only, so the mode makes no difference here.
pub(crate) fn is_private(state: &State, from: Site, server: Site) -> bool {
    from != server && is_member(state, from) && is_member(state, server)
}

pub(crate) fn is_member(state: &State, site: Site) -> bool {
    matches!(site, Site::Pod(pod) | Site::Nested(pod) if state.pods[pod].member)
}

/// Whether a call is to succeed in this state; `None` if that depends on something else.
pub(crate) fn expected(world: &World, state: &State, call: &Call) -> Option<bool> {
    let servers = servers(world, state, call);
    // A pod whose object is gone may be served or refused.
    let down = |site: &Site| match site {
        Site::Pod(pod) | Site::Nested(pod) => {
            let PodState {
                present, object, ..
            } = &state.pods[*pod];
            !state.serving[world.pods[*pod].node] || !present || *object != Object::Running
        }
        Site::Node(_) | Site::HostPod(_) | Site::Outside => false,
    };
    if servers.iter().chain([&call.from]).any(down) {
        return None;
    }
    match call.to {
        Target::Service(service) if !leads_somewhere(world, state, call.from, service) => {
            return Some(false);
        }
        // No endpoint is ready.
        _ if servers.is_empty() => return Some(false),
        // It is not guaranteed that a pod reaches itself by such an address.
        _ if call.to != Target::Site(call.from) && servers.contains(&call.from) => return None,
        Target::Second(_) if is_member(state, call.from) => return Some(false),
        // Where a policy restricts the callers of a pod, it forwards nothing but the node's connections.
        Target::Nested(pod) if is_member(state, call.from) || call.from == Site::Pod(pod) => {
            return None;
        }
        _ => {}
    }
    let family = usize::from(call.address.is_ipv6());
    let mut may = servers.iter().map(|server| {
        let local = match call.to {
            Target::Second(_) | Target::Nested(_) => call.address,
            _ => (world.addresses(*server)[family], POD_PORTS[call.port]).into(),
        };
        may_read(world, state, call, *server, local)
    });
    let first = may.next()?;
    // What policies allow may still be refused: the pod forwards without checking them.
    let certain = match call.to {
        Target::Nested(pod) => !first || call.from == Site::Node(world.pods[pod].node),
        _ => true,
    };
    (certain && may.all(|one| one == first)).then_some(first)
}

/// The servers that may answer a call.
pub(crate) fn servers(world: &World, state: &State, call: &Call) -> Vec<Site> {
    match call.to {
        Target::Site(site) => vec![site],
        Target::Second(pod) => vec![Site::Pod(pod)],
        Target::Nested(pod) => vec![Site::Nested(pod)],
        Target::HostPort(pod) => vec![Site::Pod(pod)],
        Target::NodePort { service, .. } | Target::External { service, .. }
            if translated_by(world, state, call).is_some() =>
        {
            let exposed = world.services[service].exposed.iter();
            exposed.map(|exposed| Site::Pod(exposed.pod)).collect()
        }
        Target::Service(service)
        | Target::NodePort { service, .. }
        | Target::External { service, .. } => endpoints(world, state, service),
    }
}

/// Whether a Service's cluster IP leads to its pods from here. There is no kube-proxy: only the daemon handles cluster
/// IPs, and only those of Services with a pod of the mesh.
pub(crate) fn leads_somewhere(world: &World, state: &State, from: Site, service: usize) -> bool {
    let pods = selected(world, state, service);
    is_member(state, from) && pods.iter().any(|pod| is_member(state, *pod))
}

/// The pods behind a Service that are ready.
fn endpoints(world: &World, state: &State, service: usize) -> Vec<Site> {
    let mut pods = selected(world, state, service);
    pods.retain(|pod| state.ready[world.machine(*pod)]);
    pods
}

/// The pods behind a Service.
fn selected(world: &World, state: &State, service: usize) -> Vec<Site> {
    let service = &world.services[service];
    let selected = |number: &usize| {
        let PodState { labels, object, .. } = &state.pods[*number];
        let app = labels.get("app");
        *object == Object::Running
            && world.pods[*number].namespace == service.namespace
            && app.is_some_and(|app| app == service.app)
    };
    (0..world.pods.len())
        .filter(selected)
        .map(Site::Pod)
        .collect()
}
