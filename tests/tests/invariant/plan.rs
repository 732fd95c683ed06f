//! The plan of a run: all events and connections, which a seed determines.

use std::net::SocketAddr;

use crate::events::Event;
use crate::random::Random;
use crate::table::{is_member, leads_somewhere};
use crate::world::{Object, Site, State, Target, World};

/// An event, the connections made while it takes effect, and those made after that.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) event: Event,
    pub(crate) during: Vec<Call>,
    pub(crate) after: Vec<Call>,
}

/// A connection.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) id: u32,
    pub(crate) from: Site,
    pub(crate) to: Target,
    pub(crate) address: SocketAddr,
    /// The number of the port, among those of a pod.
    pub(crate) port: usize,
    /// Milliseconds from the beginning of its batch.
    pub(crate) delay: usize,
    /// How many markers it sends.
    pub(crate) rounds: usize,
    /// Milliseconds between two of them.
    pub(crate) interval: usize,
}

/// Draws the steps of a run of so many connections. The world must be built: connections have addresses.
pub(crate) fn generate(
    random: &mut Random,
    world: &World,
    mut state: State,
    connections: usize,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut id = 0;
    while (id as usize) < connections {
        let event = Event::generate(random, world, &state, steps.len());
        let mut next = state.clone();
        event.apply(&mut next);
        let during = (0..DURING)
            .map(|_| {
                let mut call = call(random, world, &[&state, &next], &mut id);
                call.delay = random.below(DURING_MILLISECONDS);
                if random.chance(25) {
                    // One that is open before and after the event.
                    call.delay = random.below(BEFORE_EVENT_MILLISECONDS);
                    call.rounds = 6;
                    call.interval = 500 + random.below(150);
                }
                call
            })
            .collect();
        state = next;
        let after = (0..AFTER)
            .map(|_| {
                let mut call = call(random, world, &[&state], &mut id);
                call.delay = random.below(AFTER_MILLISECONDS);
                call
            })
            .collect();
        steps.push(Step {
            event,
            during,
            after,
        });
    }
    steps
}

/// Draws a connection for a time in which each of these states may be in force.
fn call(random: &mut Random, world: &World, states: &[&State], id: &mut u32) -> Call {
    let pod = |random: &mut Random| random.below(world.pods.len());
    let from = match random.below(100) {
        0..76 => Site::Pod(pod(random)),
        76..84 => Site::Node(random.below(2)),
        84..90 => Site::HostPod(random.below(2)),
        _ => Site::Outside,
    };
    let to = loop {
        let to = target(random, world);
        if states
            .iter()
            .all(|state| is_sensible(world, state, from, to))
        {
            break to;
        }
    };
    let (family, port) = (random.below(2), random.below(2));
    let id = {
        *id += 1;
        *id
    };
    Call {
        id,
        from,
        to,
        address: world.dialled(to, family, port),
        port,
        delay: 0,
        rounds: 1 + random.below(2),
        interval: 0,
    }
}

/// Whether a connection from here to there has a use in this state.
fn is_sensible(world: &World, state: &State, from: Site, to: Target) -> bool {
    match (from, to) {
        // A cluster IP that leads nowhere may take long to be refused: the kernel limits its ICMP errors.
        (_, Target::Service(service)) => leads_somewhere(world, state, from, service),
        // Pods of the mesh are led to the Service, unless it has none of them behind it.
        (from, Target::NodePort { service, .. } | Target::External { service, .. })
            if is_member(state, from) =>
        {
            leads_somewhere(world, state, from, service)
        }
        // Only a running pod's port is exposed. What is exposed outside of the mesh is the node's.
        (from, Target::HostPort(pod)) if is_member(state, from) => {
            let pod = &state.pods[pod];
            pod.member && pod.object == Object::Running
        }
        // A node does not translate what its own processes dial.
        (Site::Node(from) | Site::HostPod(from), Target::NodePort { node, .. }) => from != node,
        (Site::Node(from) | Site::HostPod(from), Target::HostPort(pod)) => {
            from != world.pods[pod].node
        }
        (Site::Node(_) | Site::HostPod(_), Target::External { .. }) => false,
        // What stays on machines outside of the mesh is not this test's.
        (from, Target::Site(to)) => matches!(from, Site::Pod(_)) || matches!(to, Site::Pod(_)),
        _ => true,
    }
}

fn target(random: &mut Random, world: &World) -> Target {
    let second: Vec<usize> = (0..world.pods.len())
        .filter(|pod| world.pods[*pod].second.is_some())
        .collect();
    let exposed: Vec<usize> = (0..world.services.len())
        .filter(|service| world.services[*service].exposed.is_some())
        .collect();
    let on_hosts: Vec<usize> = (0..world.pods.len())
        .filter(|pod| world.pods[*pod].host_ports.is_some())
        .collect();
    let nested: Vec<usize> = (0..world.pods.len())
        .filter(|pod| world.pods[*pod].nested)
        .collect();
    match random.below(100) {
        0..25 => Target::Service(random.below(world.services.len())),
        25..33 if !exposed.is_empty() => Target::NodePort {
            service: random.one(&exposed),
            node: random.below(2),
        },
        33..38 if !exposed.is_empty() => Target::External {
            service: random.one(&exposed),
            which: random.below(2),
        },
        38..43 if !on_hosts.is_empty() => Target::HostPort(random.one(&on_hosts)),
        43..51 if !second.is_empty() => Target::Second(random.one(&second)),
        51..56 if !nested.is_empty() => Target::Nested(random.one(&nested)),
        56..58 => Target::Site(Site::Node(random.below(2))),
        58..61 => Target::Site(Site::Outside),
        _ => Target::Site(Site::Pod(random.below(world.pods.len()))),
    }
}

/// How long connections are begun while an event takes effect: it has [`crate::history::GRACE`] for that.
const DURING_MILLISECONDS: usize = 2400;
const BEFORE_EVENT_MILLISECONDS: usize = 100;
const AFTER_MILLISECONDS: usize = 600;
const DURING: usize = 120;
const AFTER: usize = 120;
