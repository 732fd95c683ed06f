//! What is to happen to a connection: a plain table of who is in the mesh, what an address means and what the policies
//! say, which knows nothing of how the daemon works.

use std::net::SocketAddr;

use crate::oracle::{Attributes, naive};
use crate::plan::Call;
use crate::world::{POD_PORTS, Site, State, TRUST_DOMAIN, Target, World};

/// Whether a server may read what a caller sends, by the policies of this state. `local` is the address and port at
/// which the server accepts.
pub(crate) fn may_read(
    world: &World,
    state: &State,
    from: Site,
    server: Site,
    local: SocketAddr,
) -> bool {
    let Site::Pod(number) = server else {
        return true;
    };
    let (pod, pod_state) = (&world.pods[number], &state.pods[number]);
    if !pod_state.member || from == server || from == Site::Node(pod.node) {
        return true;
    }
    let identity = match from {
        Site::Pod(caller) if state.pods[caller].member => Some(world.pods[caller].identity()),
        _ => None,
    };
    let source = world.addresses(from)[usize::from(local.is_ipv6())];
    let attributes = Attributes::new(
        (identity.as_deref(), source),
        local,
        pod.namespace,
        &pod_state.labels,
        TRUST_DOMAIN,
    );
    let policies: Vec<_> = state.policies.values().cloned().collect();
    naive(&policies, world.mode, &attributes).allowed
}

/// Whether nothing that these two send each other may be readable on a wire: both are pods of the mesh.
///
/// The promise is only for STRICT. Pods of the mesh use TLS in PERMISSIVE as well, as long as both nodes have a daemon
/// or are known by manifests only, so the mode makes no difference here.
pub(crate) fn is_private(state: &State, from: Site, server: usize) -> bool {
    let Site::Pod(caller) = from else {
        return false;
    };
    caller != server && state.pods[caller].member && state.pods[server].member
}

/// Whether a call is to succeed in this state; `None` if that depends on something else.
pub(crate) fn expected(world: &World, state: &State, call: &Call) -> Option<bool> {
    let involved = involved(world, state, call);
    let down = |site: &Site| match site {
        Site::Pod(pod) => !state.serving[world.pods[*pod].node] || !state.pods[*pod].present,
        Site::Node(_) | Site::Outside => false,
    };
    if involved.iter().any(down) {
        return None;
    }
    let servers = match call.to {
        Target::Site(site) => vec![site],
        Target::Service(service) => {
            if !leads_somewhere(world, state, call.from, service) {
                return Some(false);
            }
            let endpoints = endpoints(world, state, service);
            if endpoints.contains(&call.from) {
                return None;
            }
            endpoints
        }
    };
    let family = usize::from(call.address.is_ipv6());
    let mut may = servers.iter().map(|server| {
        let local = (world.addresses(*server)[family], POD_PORTS[call.port]).into();
        may_read(world, state, call.from, *server, local)
    });
    let first = may.next()?;
    may.all(|one| one == first).then_some(first)
}

/// The caller, and whoever may answer.
pub(crate) fn involved(world: &World, state: &State, call: &Call) -> Vec<Site> {
    let mut involved = match call.to {
        Target::Site(site) => vec![site],
        Target::Service(service) => endpoints(world, state, service),
    };
    involved.push(call.from);
    involved
}

/// Whether a Service's cluster IP leads to its pods from here. There is no kube-proxy: nobody but the daemon knows what
/// a cluster IP is, and it takes care only of Services with a pod of the mesh.
pub(crate) fn leads_somewhere(world: &World, state: &State, from: Site, service: usize) -> bool {
    let member = |site: &Site| matches!(site, Site::Pod(pod) if state.pods[*pod].member);
    member(&from) && endpoints(world, state, service).iter().any(member)
}

/// The pods behind a Service.
fn endpoints(world: &World, state: &State, service: usize) -> Vec<Site> {
    let service = &world.services[service];
    let selected = |number: &usize| {
        let app = state.pods[*number].labels.get("app");
        world.pods[*number].namespace == service.namespace
            && app.is_some_and(|app| app == service.app)
    };
    (0..world.pods.len())
        .filter(selected)
        .map(Site::Pod)
        .collect()
}
