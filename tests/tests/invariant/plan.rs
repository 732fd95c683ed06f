//! The plan of a run: all events and connections, which a seed determines.

use std::net::SocketAddr;

use crate::events::Event;
use crate::random::Random;
use crate::table::leads_somewhere;
use crate::world::{Site, State, Target, World};

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
        let joins = matches!(event, Event::Membership { member: true, .. });
        let holds = JOINING_ENDS_OPEN_CONNECTIONS || !joins;
        let during = (0..DURING)
            .map(|_| {
                let mut call = call(random, world, &state, &mut id);
                call.delay = random.below(DURING_MILLISECONDS);
                if holds && random.chance(25) {
                    // One that is open before and after the event.
                    call.delay = random.below(BEFORE_EVENT_MILLISECONDS);
                    call.rounds = 6;
                    call.interval = 500 + random.below(150);
                }
                call
            })
            .collect();
        event.apply(&mut state);
        let after = (0..AFTER)
            .map(|_| {
                let mut call = call(random, world, &state, &mut id);
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

fn call(random: &mut Random, world: &World, state: &State, id: &mut u32) -> Call {
    let site = |random: &mut Random, pods: usize| match random.below(100) {
        one if one < pods => Site::Pod(random.below(world.pods.len())),
        one if one < pods + (100 - pods) / 2 => Site::Node(random.below(2)),
        _ => Site::Outside,
    };
    let from = site(random, 80);
    let services: Vec<usize> = (0..world.services.len())
        // Others may take long to be refused: the kernel limits how many ICMP errors it sends.
        .filter(|service| leads_somewhere(world, state, from, *service))
        .collect();
    let to = loop {
        let to = if !services.is_empty() && random.chance(40) {
            Target::Service(random.one(&services))
        } else {
            Target::Site(site(random, 92))
        };
        // What stays on one machine outside of the mesh is not this test's.
        let outside = |site: Site| !matches!(site, Site::Pod(_));
        if !(outside(from) && matches!(to, Target::Site(to) if outside(to))) {
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

/// Whether connections in plaintext that are open when a pod joins the mesh are ended. They are not yet, so none is held
/// open then.
const JOINING_ENDS_OPEN_CONNECTIONS: bool = false;
/// How long connections are begun while an event takes effect: it has [`crate::history::GRACE`] for that.
const DURING_MILLISECONDS: usize = 2400;
const BEFORE_EVENT_MILLISECONDS: usize = 100;
const AFTER_MILLISECONDS: usize = 600;
const DURING: usize = 150;
const AFTER: usize = 250;
