//! Runs a plan on a real mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::{App, Context, Daemon, DaemonOptions, Mesh, Place, Result, ServiceSpec, TIMEOUT};
use serde_json::Value;

use crate::events::Event;
use crate::history::{History, now};
use crate::observer::{Observer, Sighting};
use crate::plan::{self, Call, Step};
use crate::random::Random;
use crate::world::{
    Built, MEMBERSHIP, NESTED_PORT, NODES, Object, POD_PORTS, Site, State, World, is_ready,
    membership,
};

/// Everything that was planned, done and seen.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) seed: u64,
    pub(crate) world: World,
    pub(crate) history: History,
    pub(crate) events: Vec<(u64, String)>,
    pub(crate) calls: BTreeMap<u32, (Call, Report)>,
    pub(crate) reads: Vec<Read>,
    pub(crate) foreign: Vec<(Site, Value)>,
    pub(crate) sightings: BTreeSet<Sighting>,
}

/// What a caller says of its connection. Times are in nanoseconds of CLOCK_MONOTONIC.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// When each round's marker was sent.
    pub(crate) sent: Vec<u64>,
    /// When each round's marker was answered.
    pub(crate) answered: Vec<u64>,
    /// What failed, and the error.
    pub(crate) failure: Option<String>,
    /// Whether the caller was killed before it could say anything.
    pub(crate) killed: bool,
}

/// A marker that a server read.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) server: Site,
    pub(crate) id: u32,
    pub(crate) round: usize,
    pub(crate) peer: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) at: u64,
}

impl Report {
    /// The time in which the connection was opened.
    pub(crate) fn opening(&self) -> (u64, u64) {
        let opened = self.sent.first().copied().unwrap_or(self.end);
        (self.start, opened)
    }

    /// The time in which the marker of this round was under way.
    pub(crate) fn window(&self, round: usize) -> (u64, u64) {
        let start = self.sent.get(round).copied().unwrap_or(self.start);
        let end = self.answered.get(round).copied().unwrap_or(self.end);
        (start, end)
    }

    /// Whether the caller gave up waiting.
    pub(crate) fn hung(&self) -> bool {
        let failure = self.failure.as_deref().unwrap_or_default();
        ["TimedOut", "ETIMEDOUT", "EAGAIN"]
            .iter()
            .any(|error| failure.ends_with(error))
    }

    pub(crate) fn succeeded(&self) -> bool {
        self.failure.is_none() && !self.killed
    }
}

/// Generates a world and a plan from the seed and runs it. The same seed and number of connections make the same plan.
pub(crate) fn run(seed: u64, connections: usize) -> Result<Outcome> {
    let mut random = Random::new(seed);
    let (mut world, state) = World::generate(&mut random);
    let built = world.build(&state)?;
    let steps = plan::generate(&mut random, &world, state.clone(), connections);
    let mut run = Run::start(&world, &built, state)?;
    let observer = Observer::start(&built.mesh)?;
    for step in steps {
        run.step(step)?;
    }
    run.collect_all()?;
    let Run {
        history,
        events,
        calls,
        reads,
        foreign,
        ..
    } = run;
    Ok(Outcome {
        seed,
        history,
        events,
        calls,
        reads,
        foreign,
        sightings: observer.stop()?,
        world,
    })
}

struct Run<'a> {
    world: &'a World,
    mesh: &'a Mesh,
    nested: &'a BTreeMap<usize, Place>,
    servers: Vec<(Site, App)>,
    host_pods: Vec<Place>,
    daemons: [Option<Daemon>; 2],
    /// Whether the Service of [`Run::wait_for_reading`] is there.
    is_told: bool,
    history: History,
    events: Vec<(u64, String)>,
    calls: BTreeMap<u32, (Call, Report)>,
    reads: Vec<Read>,
    foreign: Vec<(Site, Value)>,
}

impl<'a> Run<'a> {
    fn start(world: &'a World, built: &'a Built, state: State) -> Result<Self> {
        let mesh = &built.mesh;
        // The kubelet's cgroups are there before the daemon.
        let host_pods = NODES.into_iter().map(|node| {
            let uid = "5f0c0fd5-0000-4000-8000-000000000001";
            mesh.node(node).host_network_pod(uid)
        });
        let mut run = Self {
            world,
            mesh,
            nested: &built.nested,
            servers: Vec::new(),
            host_pods: host_pods.collect::<Result<_>>()?,
            daemons: [None, None],
            is_told: false,
            history: History::default(),
            events: Vec::new(),
            calls: BTreeMap::new(),
            reads: Vec::new(),
            foreign: Vec::new(),
        };
        for node in 0..NODES.len() {
            run.start_daemon(node, &state)?;
        }
        run.history.push(state);
        let pods = (0..world.pods.len()).map(Site::Pod);
        let others = [Site::Node(0), Site::Node(1), Site::Outside];
        let nested = built.nested.keys().copied().map(Site::Nested);
        for site in pods.chain(nested).chain(others) {
            run.start_server(site)?;
        }
        Ok(run)
    }

    fn step(&mut self, step: Step) -> Result<()> {
        let during = self.begin(step.during)?;
        let event = step.event;
        let mut state = self.history.last().clone();
        event.apply(&mut state);
        self.events.push((now(), event.to_string()));
        let mut meanwhile = state.clone();
        event.begin(&mut meanwhile);
        self.history.push(meanwhile);
        self.execute(&event, &state)
            .with_context(|| format!("{event}"))?;
        if event.has_an_end() {
            self.history.push(state);
        } else {
            self.wait_for_reading()?;
            self.history.note_known();
        }
        self.finish(during)?;
        let after = self.begin(step.after)?;
        self.finish(after)
    }

    fn execute(&mut self, event: &Event, state: &State) -> Result<()> {
        let manifests = self.mesh.manifests();
        let label = |pod: usize, key: &str, value: &str| {
            let pod = &self.world.pods[pod];
            manifests.edit("Pod", pod.namespace, &pod.name, |pod| {
                pod["metadata"]["labels"][key] = value.into();
            })
        };
        match event {
            Event::Apply(policy) => manifests.apply(policy),
            Event::Remove(policy) => {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                let (kind, metadata) = (text(&policy["kind"]), &policy["metadata"]);
                manifests.remove(
                    &kind,
                    &text(&metadata["namespace"]),
                    &text(&metadata["name"]),
                )
            }
            Event::Membership { pod, member } => label(*pod, MEMBERSHIP, membership(*member)),
            Event::Relabel { pod, app } => label(*pod, "app", app),
            Event::Object { pod, object } => {
                let pod = &self.world.pods[*pod];
                match object {
                    Object::Removed => manifests.remove("Pod", pod.namespace, &pod.name),
                    Object::Failed => manifests.edit("Pod", pod.namespace, &pod.name, |pod| {
                        pod["status"]["phase"] = "Failed".into();
                    }),
                    Object::Running => Ok(()),
                }
            }
            Event::Crash { node } => {
                self.daemons[*node].take().context("no daemon")?.kill()?;
                self.start_daemon(*node, state)
            }
            Event::Restart { node } => {
                let daemon = self.daemons[*node].take().context("no daemon")?;
                daemon.terminate(TIMEOUT)?;
                self.start_daemon(*node, state)
            }
            Event::Flap { node, ready } => {
                self.world.write_node(self.mesh, *node, *ready)?;
                let pods = self.world.pods.iter().zip(&state.pods);
                for (pod, _) in
                    pods.filter(|(pod, state)| pod.node == *node && state.object != Object::Removed)
                {
                    manifests.edit("Pod", pod.namespace, &pod.name, |pod| {
                        pod["status"]["conditions"] = is_ready(*ready);
                    })?;
                }
                Ok(())
            }
            Event::Recreate { pod } => self.recreate(*pod, state.pods[*pod].member),
        }
    }

    /// Waits until the daemons have read the manifests as they are now, which may take long on a busy machine. A Service
    /// without pods, which comes and goes, tells.
    fn wait_for_reading(&mut self) -> Result<()> {
        let daemons: Vec<(&Daemon, u64)> = self
            .daemons
            .iter()
            .flatten()
            .map(|daemon| (daemon, daemon.log_position()))
            .collect();
        self.is_told = !self.is_told;
        let manifests = self.mesh.manifests();
        if self.is_told {
            let service = ServiceSpec::new(TELLING).address("10.96.255.254");
            manifests.apply(&service.manifest())?;
        } else {
            manifests.remove("Service", "default", TELLING)?;
        }
        let services = self.world.services.len() + usize::from(self.is_told);
        for (daemon, position) in daemons {
            daemon.wait_for_log_after(position, "the reading", TIMEOUT, |line| {
                line["message"] == "manifests read" && line["services"] == services
            })?;
        }
        Ok(())
    }

    fn recreate(&mut self, number: usize, member: bool) -> Result<()> {
        let site = Site::Pod(number);
        let server = self.servers.iter().position(|(at, _)| *at == site);
        let (_, server) = self.servers.remove(server.context("no server")?);
        let name = self.world.pods[number].full_name();
        self.mesh.pod(&name).kill_processes()?;
        self.collect(site, server)?;
        let pod = self.mesh.recreate_pod(&name)?;
        self.world.add_second_addresses(self.mesh, number)?;
        if member {
            // The status may still be about the network that is gone.
            pod.wait_listening(TUNNEL_PORT)?;
            let daemon = &self.daemons[self.world.pods[number].node];
            daemon
                .as_ref()
                .context("no daemon")?
                .wait_enrolled(&[name])?;
        }
        self.start_server(site)
    }

    fn start_daemon(&mut self, node: usize, state: &State) -> Result<()> {
        let mut options = DaemonOptions::default()
            .setting("mode", self.world.mode.into())
            .drain(DRAIN);
        if self.world.same_node_tunnel {
            options = options.same_node_tunnel();
        }
        let daemon = self.mesh.node(NODES[node]).start_daemon_with(options)?;
        let pods = self.world.pods.iter().zip(&state.pods);
        let members: Vec<String> = pods
            .filter(|(pod, state)| {
                pod.node == node && state.member && state.object == Object::Running
            })
            .map(|(pod, _)| pod.full_name())
            .collect();
        daemon.wait_enrolled(&members)?;
        self.daemons[node] = Some(daemon);
        Ok(())
    }

    fn start_server(&mut self, site: Site) -> Result<()> {
        let ports = POD_PORTS.map(|port| format!("--port {port}")).join(" ");
        let mut server = self.place(site).app(&format!("marker-server {ports}"))?;
        for _ in POD_PORTS {
            server.event("listening", TIMEOUT)?;
        }
        self.servers.push((site, server));
        Ok(())
    }

    /// Starts the callers of a batch, one process for each site.
    fn begin(&mut self, batch: Vec<Call>) -> Result<Batch> {
        let start = now();
        let mut callers = Vec::new();
        let mut rest = batch.as_slice();
        let mut sites: Vec<(Site, Vec<&Call>)> = Vec::new();
        while let Some((call, others)) = rest.split_first() {
            match sites.iter_mut().find(|(site, _)| *site == call.from) {
                Some((_, calls)) => calls.push(call),
                None => sites.push((call.from, vec![call])),
            }
            rest = others;
        }
        for (site, calls) in sites {
            let place = self.place(site);
            let path = place.folder().join(format!("calls-{}", calls[0].id));
            let lines = calls.iter().map(|call| {
                let Call {
                    id,
                    address,
                    delay,
                    rounds,
                    interval,
                    ..
                } = call;
                format!("{id} {address} {delay} {rounds} {interval}\n")
            });
            fs::write(&path, lines.collect::<String>())
                .with_context(|| format!("writing {}", path.display()))?;
            callers.push(place.app(&format!("marker-calls --plan {}", path.display()))?);
        }
        for caller in &mut callers {
            caller.event("started", TIMEOUT)?;
        }
        Ok(Batch {
            start,
            calls: batch,
            callers,
        })
    }

    /// Waits until all callers are done, and keeps their reports.
    fn finish(&mut self, batch: Batch) -> Result<()> {
        let mut reports = BTreeMap::new();
        for caller in batch.callers {
            let finished = caller.finish(TIMEOUT)?;
            for event in finished.json_lines() {
                if event["event"] == "call" {
                    reports.insert(event["id"].as_u64(), report(&event)?);
                }
            }
        }
        for call in batch.calls {
            let report = reports.remove(&Some(call.id.into())).unwrap_or(Report {
                start: batch.start,
                end: now(),
                sent: Vec::new(),
                answered: Vec::new(),
                failure: None,
                killed: true,
            });
            self.calls.insert(call.id, (call, report));
        }
        Ok(())
    }

    fn collect_all(&mut self) -> Result<()> {
        for (site, server) in std::mem::take(&mut self.servers) {
            self.collect(site, server)?;
        }
        Ok(())
    }

    /// Ends a server and keeps what it has read.
    fn collect(&mut self, site: Site, mut server: App) -> Result<()> {
        server.process().kill()?;
        for event in server.finish(TIMEOUT)?.json_lines() {
            if event["event"] == "foreign" {
                self.foreign.push((site, event));
            } else if event["event"] == "read" {
                let local = |text: &str| -> Option<SocketAddr> {
                    let local: SocketAddr = text.parse().ok()?;
                    // What is nested knows its own address only.
                    Some(match site {
                        Site::Nested(_) => {
                            let own = self.world.addresses(site)[usize::from(local.is_ipv6())];
                            (own, NESTED_PORT).into()
                        }
                        _ => local,
                    })
                };
                let read = || {
                    Some(Read {
                        server: site,
                        id: event["id"].as_u64()?.try_into().ok()?,
                        round: event["round"].as_u64()?.try_into().ok()?,
                        peer: event["peer"].as_str()?.parse().ok()?,
                        local: local(event["local"].as_str()?)?,
                        at: event["at"].as_u64()?,
                    })
                };
                self.reads.push(read().with_context(|| event.to_string())?);
            }
        }
        Ok(())
    }

    fn place(&self, site: Site) -> Place {
        match site {
            Site::Pod(pod) => self
                .mesh
                .pod(&self.world.pods[pod].full_name())
                .place()
                .clone(),
            Site::Nested(pod) => self.nested[&pod].clone(),
            Site::Node(node) => self.mesh.node(NODES[node]).place().clone(),
            Site::HostPod(node) => self.host_pods[node].clone(),
            Site::Outside => self.mesh.outside().clone(),
        }
    }
}

struct Batch {
    start: u64,
    calls: Vec<Call>,
    callers: Vec<App>,
}

fn report(event: &Value) -> Result<Report> {
    let times = |value: &Value| {
        let times = value.as_array()?.iter();
        times.map(Value::as_u64).collect::<Option<Vec<u64>>>()
    };
    let read = || {
        Some(Report {
            start: event["start"].as_u64()?,
            end: event["end"].as_u64()?,
            sent: times(&event["sent"])?,
            answered: times(&event["answered"])?,
            failure: event["failure"].as_array().map(|failure| {
                let words = failure.iter().filter_map(Value::as_str);
                words.collect::<Vec<_>>().join(": ")
            }),
            killed: false,
        })
    };
    read().with_context(|| event.to_string())
}

/// How long a daemon that is stopped lets connections continue.
const DRAIN: Duration = Duration::from_millis(500);
/// The name of a Service that shows which manifests the daemons have read.
const TELLING: &str = "telling";
/// The daemon's listener in a pod that is enrolled.
const TUNNEL_PORT: u16 = 15008;
