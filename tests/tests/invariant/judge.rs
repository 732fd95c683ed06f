//! Compares what was seen with the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::net::SocketAddr;
use std::ops::AddAssign;

use crate::plan::Call;
use crate::run::{Outcome, Report};
use crate::table::{
    admits_plaintext, expected, is_private, may_read, servers, source, translated_by,
};
use crate::world::{POD_PORTS, Site, State, Target};

/// How many connections were judged, so that a test cannot pass by judging none.
#[derive(Debug, Default)]
pub(crate) struct Judged {
    pub(crate) connections: usize,
    /// Connections that had to succeed, and did.
    pub(crate) passed: usize,
    /// Connections that had to be refused, and were.
    pub(crate) refused: usize,
    /// Markers that servers read from pods of the mesh, of which nothing was to be seen on a wire.
    pub(crate) private: usize,
    /// Markers from and to others, which crossed the wire as they were.
    pub(crate) plain: usize,
}

impl AddAssign for Judged {
    fn add_assign(&mut self, other: Self) {
        self.connections += other.connections;
        self.passed += other.passed;
        self.refused += other.refused;
        self.private += other.private;
        self.plain += other.plain;
    }
}

/// Returns what is counted, or a description of all violations.
pub(crate) fn judge(outcome: &Outcome) -> Result<Judged, String> {
    let mut judge = Judge {
        outcome,
        judged: Judged {
            connections: outcome.calls.len(),
            ..Judged::default()
        },
        violations: Vec::new(),
    };
    judge.reads();
    judge.sightings();
    judge.foreign();
    judge.outcomes();
    if judge.violations.is_empty() {
        return Ok(judge.judged);
    }
    Err(judge.describe())
}

struct Judge<'a> {
    outcome: &'a Outcome,
    judged: Judged,
    violations: Vec<String>,
}

impl Judge<'_> {
    /// No server reads what every state in force denies, nor what comes from another address than the caller's.
    fn reads(&mut self) {
        let Outcome {
            world,
            history,
            calls,
            sightings,
            ..
        } = self.outcome;
        let on_wire: BTreeSet<(u32, u8)> = sightings
            .iter()
            .filter(|sighting| sighting.node.is_none() && sighting.to_server)
            .map(|sighting| (sighting.id, sighting.round))
            .collect();
        for read in &self.outcome.reads {
            let Some((call, report)) = calls.get(&read.id) else {
                self.violations
                    .push(format!("a marker that nobody sent: {read:?}"));
                continue;
            };
            let (sent, _) = report.window(read.round);
            let states = history.in_force(sent, read.at);
            let was_open = self.was_open(call, report, read.server);
            let may = |state: &&State| {
                may_read(world, state, call, read.server, read.local)
                    || was_open && admits_plaintext(world, state, call, read.server, read.local)
            };
            if !states.iter().any(may) {
                let what = format!("delivered though denied: {read:?}");
                self.violation(&what, call, report, &states);
            }
            let from = |state: &&State| {
                source(world, state, call, read.server, read.local) == read.peer.ip()
            };
            // One that was open keeps its addresses.
            let (start, opened) = report.opening();
            let known = was_open && history.in_force(start, opened).iter().any(from);
            if call.from != read.server && !states.iter().any(from) && !known {
                let what = format!("from another address: {read:?}");
                self.violation(&what, call, report, &states);
            }
            let private = |state: &State| is_private(state, call.from, read.server);
            if states.iter().all(|state| private(state)) {
                self.judged.private += 1;
            }
            // Traffic outside the mesh passes unchanged. This also shows that the observer sees everything.
            let end = world.machine(read.server);
            let crosses = |state: &&State| {
                let machines = [
                    translated_by(world, state, call),
                    Some(world.machine(call.from)),
                ];
                machines.into_iter().flatten().any(|machine| machine != end)
            };
            if states.iter().all(crosses) && !states.iter().any(|state| private(state)) {
                let seen =
                    u8::try_from(read.round).is_ok_and(|round| on_wire.contains(&(read.id, round)));
                if seen {
                    self.judged.plain += 1;
                } else {
                    let what = format!("read, and not seen on the wire in between: {read:?}");
                    self.violation(&what, call, report, &states);
                }
            }
        }
    }

    /// Nothing between two pods of the mesh is readable on the wire, nor on their links, except what stays on a node
    /// whose daemon leaves it to the kernel.
    fn sightings(&mut self) {
        let Outcome { world, calls, .. } = self.outcome;
        for sighting in &self.outcome.sightings {
            let Some((call, report)) = calls.get(&sighting.id) else {
                self.violations
                    .push(format!("a marker that nobody sent: {sighting:?}"));
                continue;
            };
            let (start, end) = report.window(sighting.round.into());
            let states = self.outcome.history.in_force(start, end);
            let private = |state: &&State| match world.pod_at(sighting.server.ip()) {
                Some(server) => is_private(state, call.from, Site::Pod(server)),
                // Sent to an address that is no pod's, such as a Service's: any server that may answer counts.
                None => {
                    let servers = servers(world, state, call);
                    let private = |server: &Site| is_private(state, call.from, *server);
                    servers.iter().any(private)
                        && servers
                            .iter()
                            .all(|server| *server == call.from || private(server))
                }
            };
            let stays = world
                .pod_at(sighting.server.ip())
                .is_some_and(|server| world.machine(Site::Pod(server)) == world.machine(call.from));
            let (opening, opened) = report.opening();
            let at_start = self.outcome.history.in_force(opening, opened);
            let goes_on = |server: Site, local: SocketAddr| {
                let admits = |state: &&State| admits_plaintext(world, state, call, server, local);
                self.was_open(call, report, server) && states.iter().any(admits)
            };
            let goes_on = match world.pod_at(sighting.server.ip()) {
                Some(server) => goes_on(Site::Pod(server), sighting.server),
                // Sent to a node port before the caller joined the mesh: the node translates it as usual.
                None => at_start
                    .iter()
                    .filter(|state| translated_by(world, state, call).is_some())
                    .flat_map(|state| servers(world, state, call))
                    .any(|server| {
                        let family = usize::from(sighting.server.is_ipv6());
                        let address = world.addresses(server)[family];
                        goes_on(server, (address, POD_PORTS[call.port]).into())
                    }),
            };
            let by_kernel =
                sighting.node.is_some() && stays && world.routed && !world.same_node_tunnel;
            if !by_kernel && !goes_on && states.iter().all(private) {
                self.violation(
                    &format!("in plaintext: {sighting:?}"),
                    call,
                    report,
                    &states,
                );
            }
        }
    }

    /// Whether a connection may have been open in plaintext before one of its pods joined the mesh.
    fn was_open(&self, call: &Call, report: &Report, server: Site) -> bool {
        let (start, opened) = report.opening();
        let states = self.outcome.history.in_force(start, opened);
        let private = |state: &&State| is_private(state, call.from, server);
        !states.iter().all(private)
    }

    /// No server reads anything that no caller sent, except while its pod or the caller's joins or leaves the mesh: then
    /// the caller's daemon may still speak TLS to it. It also does to what is nested in a pod that forwards: nothing of the
    /// caller's is in that, and the handshake fails.
    fn foreign(&mut self) {
        let Outcome { world, history, .. } = self.outcome;
        for (site, event) in &self.outcome.foreign {
            if matches!(site, Site::Nested(_)) {
                continue;
            }
            let at = event["at"].as_u64().unwrap_or_default();
            let states = history.in_force(at, at);
            let server = match site {
                Site::Pod(pod) => Some(*pod),
                _ => None,
            };
            let peer = event["ends"]["peer"].as_str();
            let peer = peer.and_then(|peer| peer.parse::<SocketAddr>().ok());
            let caller = peer.and_then(|peer| world.pod_at(peer.ip()));
            let settled = [server, caller].into_iter().flatten().all(|pod| {
                let is_member = |state: &State| state.pods[pod].member;
                states
                    .iter()
                    .all(|state| is_member(state) == is_member(states[0]))
            });
            if settled {
                let site = world.describe(*site);
                // The kind of violation comes first, as in the others.
                self.violations.push(format!(
                    "foreign bytes: {site} read what nobody sent: {event}"
                ));
            }
        }
    }

    /// What is to succeed succeeds, and what is to be refused is refused, wherever all states in force agree.
    fn outcomes(&mut self) {
        let Outcome { world, history, .. } = self.outcome;
        for (call, report) in self.outcome.calls.values() {
            if report.killed {
                continue;
            }
            let states = history.in_force(report.start, report.end);
            let verdicts: Vec<Option<bool>> = states
                .iter()
                .map(|state| expected(world, state, call))
                .collect();
            // A pod that joins or leaves the mesh, or is recreated, loses its connections.
            let involved = servers(world, states[0], call);
            let undisturbed = involved.iter().chain([&call.from]).all(|site| {
                let (Site::Pod(pod) | Site::Nested(pod)) = site else {
                    return true;
                };
                let is = |state: &&State| {
                    let pod = &state.pods[*pod];
                    (pod.member, pod.present, pod.object)
                };
                states.iter().all(|state| is(state) == is(&states[0]))
            });
            if !undisturbed || verdicts.iter().any(|verdict| *verdict != verdicts[0]) {
                continue;
            }
            match verdicts[0] {
                Some(true) if report.succeeded() => self.judged.passed += 1,
                Some(true) => self.violation("refused though allowed", call, report, &states),
                Some(false) if !report.answered.is_empty() => {
                    self.violation("answered though denied", call, report, &states);
                }
                Some(false) if is_told(call) && report.hung() => {
                    self.violation("left waiting, not refused", call, report, &states);
                }
                Some(false) => self.judged.refused += 1,
                None => {}
            }
        }
    }

    fn violation(&mut self, what: &str, call: &Call, report: &Report, states: &[&State]) {
        let world = &self.outcome.world;
        let to = match call.to {
            Target::Site(site) => world.describe(site),
            Target::Nested(pod) => world.describe(Site::Nested(pod)),
            Target::HostPort(pod) => world.describe(Site::Pod(pod)),
            Target::Second(pod) => format!(
                "{} (an address that no object lists)",
                world.describe(Site::Pod(pod))
            ),
            Target::Service(number)
            | Target::NodePort {
                service: number, ..
            }
            | Target::External {
                service: number, ..
            } => {
                let service = &world.services[number];
                format!(
                    "service {}/{} (app={})",
                    service.namespace, service.name, service.app
                )
            }
        };
        let mut text = format!(
            "{what}\n  connection {} from {}\n  to {} of {to}\n  {}\n",
            call.id,
            world.describe(call.from),
            call.address,
            self.times(report),
        );
        for state in states {
            let pods: Vec<String> = servers(world, state, call)
                .into_iter()
                .chain([call.from])
                .filter_map(|site| match site {
                    Site::Pod(pod) | Site::Nested(pod) => {
                        Some((&world.pods[pod], &state.pods[pod]))
                    }
                    _ => None,
                })
                .map(|(pod, state)| {
                    let member = if state.member {
                        "in the mesh"
                    } else {
                        "not in the mesh"
                    };
                    format!(
                        "{} {member}, {:?}, {:?}",
                        pod.name, state.object, state.labels
                    )
                })
                .collect();
            let _ = writeln!(
                text,
                "  in force: mode {}; serving {:?}; ready {:?}; {}; expected {:?}",
                world.mode,
                state.serving,
                state.ready,
                pods.join("; "),
                expected(world, state, call),
            );
            for policy in state.policies.values() {
                let _ = writeln!(text, "    {policy}");
            }
        }
        self.violations.push(text);
    }

    fn times(&self, report: &Report) -> String {
        let times = |times: &[u64]| {
            let times = times.iter().map(|time| self.seconds(*time));
            times.collect::<Vec<_>>().join(" ")
        };
        format!(
            "from {} to {}; sent {}; answered {}; {}",
            self.seconds(report.start),
            self.seconds(report.end),
            times(&report.sent),
            times(&report.answered),
            report
                .failure
                .as_deref()
                .unwrap_or(if report.killed { "killed" } else { "succeeded" }),
        )
    }

    fn seconds(&self, time: u64) -> String {
        let start = self.outcome.history.start();
        format!("{:.3}", time.saturating_sub(start) as f64 / 1e9)
    }

    fn describe(&self) -> String {
        let Outcome {
            seed,
            world,
            events,
            calls,
            ..
        } = self.outcome;
        let mut kinds: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for violation in &self.violations {
            let kind = violation.split([':', '\n']).next().unwrap_or_default();
            kinds.entry(kind).or_default().push(violation);
        }
        let counts: Vec<String> = kinds
            .iter()
            .map(|(kind, found)| format!("{} {kind}", found.len()))
            .collect();
        let mut text = format!(
            "seed {seed}: the invariant is violated: {}\nthe same again: INVARIANT_SEED={seed} \
             INVARIANT_CONNECTS={}\nmode {}, sameNode {}, pods {}\n",
            counts.join(", "),
            calls.len(),
            world.mode,
            if world.same_node_tunnel {
                "tunnel"
            } else {
                "kernel"
            },
            if world.routed { "routed" } else { "bridged" },
        );
        for number in 0..world.pods.len() {
            let _ = writeln!(text, "  {}", world.describe(Site::Pod(number)));
        }
        for (at, event) in events {
            let _ = writeln!(text, "  {} {event}", self.seconds(*at));
        }
        let first = kinds
            .values()
            .flat_map(|found| found.iter().take(MOST_DESCRIBED));
        for violation in first {
            let _ = writeln!(text, "{violation}");
        }
        text
    }
}

/// Whether a caller is told at once that it is refused. A cluster IP that leads nowhere and a pod that does not forward
/// answer by ICMP errors, of which the kernel sends few.
fn is_told(call: &Call) -> bool {
    !matches!(call.to, Target::Service(_) | Target::Nested(_))
}

/// Of each kind.
const MOST_DESCRIBED: usize = 3;
