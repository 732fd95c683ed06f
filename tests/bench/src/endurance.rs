//! `cargo xtask bench hold` and `cargo xtask bench churn`: what the daemons of two nodes take for very many connections, at the
//! same time and one after the other.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::{App, Daemon, Mesh, Place, PodSpec};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};
use xtask_support::supervise::{self, supervise};

use super::Part;
use super::number::number;
use super::topology::{ECHO_PORT, NODE_A, NODE_B};
use super::usage::memory;

/// Runs one of the two, and prints its measurements.
///
/// # Errors
/// If the mesh does not start, a connection fails, or Ctrl-C ends it.
pub(super) fn run(part: Part, as_json: bool) -> Result<()> {
    raise_descriptor_limit();
    let mut measured = Vec::new();
    supervise(
        LONGEST,
        move |events, stop| {
            let run = Run { events, stop };
            match part {
                Part::Churn => run.churn(),
                _ => run.hold(),
            }
        },
        |event| {
            match event {
                Event::Begins(what) => eprintln!("{what}"),
                Event::Measured(one) => measured.push(one),
            }
            Ok(())
        },
    )?;
    if as_json {
        let object = measured.iter().map(|one| {
            let value = json!({"name": one.name, "unit": one.unit, "value": one.value});
            (one.key.to_owned(), value)
        });
        println!("{}", Value::Object(object.collect()));
        return Ok(());
    }
    for one in measured {
        println!("{:<56}{:>10} {}", one.name, number(one.value), one.unit);
    }
    Ok(())
}

/// An event from the thread that measures.
enum Event {
    Begins(String),
    Measured(Measured),
}

impl supervise::Event for Event {
    fn begins(&self) -> Option<&str> {
        match self {
            Self::Begins(what) => Some(what),
            Self::Measured(_) => None,
        }
    }
}

struct Measured {
    key: &'static str,
    name: &'static str,
    value: f64,
    unit: &'static str,
}

struct Run<'a> {
    events: Sender<Event>,
    stop: &'a AtomicBool,
}

impl Run<'_> {
    /// Holds connections, and sets up others beside them.
    fn hold(&self) -> Result<()> {
        self.begins("two nodes and their pods".to_owned())?;
        let stage = Stage::set(PAIRS)?;
        let count = HELD.min(stage.capacity()? * 3 / 5) / PAIRS * PAIRS;
        self.begins("connections without others beside them".to_owned())?;
        let alone = stage.set_up()?;
        let before = stage.resident()?;
        self.begins(format!("{count} connections"))?;
        let start = Instant::now();
        let held = stage.hold(count / PAIRS)?;
        let seconds = start.elapsed().as_secs_f64();
        for daemon in &stage.daemons {
            let taken = capacity(daemon, "taken")?;
            ensure!(
                taken >= count,
                "the daemon of {} carries {taken} connections, not {count}",
                daemon.node()
            );
        }
        let after = stage.resident()?;
        self.begins("connections beside them".to_owned())?;
        let beside = stage.set_up()?;
        self.begins("an exchange on each, and its end".to_owned())?;
        held.release()?;
        let each = |index: usize| (after[index] - before[index]) as f64 / count as f64;
        self.measured("held", "held at the same time", count as f64, "");
        self.measured("opened", "opened, per second", count as f64 / seconds, "/s");
        self.measured("memory-client", "client's daemon", mib(after[0]), "MiB");
        self.measured("memory-server", "server's daemon", mib(after[1]), "MiB");
        self.measured("each-client", "  for each connection", each(0), "KiB");
        self.measured(
            "each-server",
            "  for each connection, server's daemon",
            each(1),
            "KiB",
        );
        self.measured(
            "alone-p50",
            "connection set-up without them, p50",
            alone[0],
            "µs",
        );
        self.measured("alone-p99", "  p99", alone[1], "µs");
        self.measured(
            "beside-p50",
            "connection set-up beside them, p50",
            beside[0],
            "µs",
        );
        self.measured("beside-p99", "  p99", beside[1], "µs");
        Ok(())
    }

    /// Opens and closes connections beside idle ones.
    fn churn(&self) -> Result<()> {
        self.begins("two nodes and their pods".to_owned())?;
        let stage = Stage::set(1)?;
        // One caller may hold a third of the capacity with one pod.
        let count = IDLE.min(stage.capacity()? * 3 / 10);
        self.begins(format!("{count} idle connections"))?;
        let idle = stage.hold(count)?;
        let mut seconds = 0.0;
        let mut all = Vec::new();
        // The first ones are not counted: they leave the memory that the later ones use again.
        for part in 0..=PARTS {
            self.begins(format!("short connections, part {part} of {PARTS}"))?;
            let done = stage
                .client(0)
                .app(&format!(
                    "churn --to {} --connections {PART} --concurrency 32",
                    stage.server(0)
                ))?
                .success(LONGEST)?;
            let resident = stage.resident()?;
            eprintln!(
                "  {} and {} MiB",
                number(mib(resident[0])),
                number(mib(resident[1]))
            );
            all.push(resident);
            if part > 0 {
                seconds += done["seconds"].as_f64().context("no duration")?;
            }
        }
        self.begins("an exchange on each idle connection, and its end".to_owned())?;
        idle.release()?;
        let (first, last) = (all[0], all[all.len() - 1]);
        let most = |index: usize| all[1..].iter().map(|one| one[index]).max().unwrap_or(0);
        let growth = |index: usize| 100.0 * (last[index] as f64 / first[index] as f64 - 1.0);
        let rate = (PART * PARTS) as f64 / seconds;
        self.measured("idle", "idle beside them", count as f64, "");
        self.measured("rate", "short connections, per second", rate, "/s");
        self.measured(
            "client-first",
            "client's daemon, at first",
            mib(first[0]),
            "MiB",
        );
        self.measured("client-most", "  at most", mib(most(0)), "MiB");
        self.measured("client-growth", "  growth", growth(0), "%");
        self.measured(
            "server-first",
            "server's daemon, at first",
            mib(first[1]),
            "MiB",
        );
        self.measured("server-most", "  at most", mib(most(1)), "MiB");
        self.measured("server-growth", "  growth", growth(1), "%");
        Ok(())
    }

    fn begins(&self, what: String) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        // The receiver is gone after Ctrl-C.
        let _ = self.events.send(Event::Begins(what));
        Ok(())
    }

    fn measured(&self, key: &'static str, name: &'static str, value: f64, unit: &'static str) {
        let one = Measured {
            key,
            name,
            value,
            unit,
        };
        let _ = self.events.send(Event::Measured(one));
    }
}

/// Pairs of a client on one node and a server on another. Fields are dropped from top to bottom: the programs first.
struct Stage {
    _servers: Vec<App>,
    /// The client's, then the server's.
    daemons: Vec<Daemon>,
    pairs: u64,
    mesh: Mesh,
}

impl Stage {
    fn set(pairs: u64) -> Result<Self> {
        let mut mesh = Mesh::builder().node(NODE_A).node(NODE_B).routed();
        for pair in 0..pairs {
            let ends = [(client_name(pair), NODE_A), (server_name(pair), NODE_B)];
            for (name, node) in ends {
                mesh = mesh.pod(
                    PodSpec::new(&name)
                        .on(node)
                        .service_account(&name)
                        .ipv4_only(),
                );
            }
        }
        let mesh = mesh.start()?;
        // The load leaves tens of thousands of sockets in TIME-WAIT.
        let reuse = [("net/ipv4/tcp_tw_reuse", "1")];
        let mut servers = Vec::new();
        for pair in 0..pairs {
            let (client, server) = (mesh.pod(&client_name(pair)), mesh.pod(&server_name(pair)));
            for pod in [&client, &server] {
                pod.place().netns().set_parameters(&reuse)?;
            }
            let serve = format!("idle-server --port {ECHO_PORT}");
            servers.push(server.place().app(&serve)?.listening()?);
        }
        let mut daemons = mesh.start_daemons()?;
        daemons.sort_by_key(|daemon| daemon.node() != NODE_A);
        Ok(Self {
            _servers: servers,
            daemons,
            pairs,
            mesh,
        })
    }

    /// Opens as many connections of each pair, and holds them.
    fn hold(&self, connections: u64) -> Result<Held> {
        let until = self.client(0).folder().join("release");
        let mut clients = Vec::new();
        for pair in 0..self.pairs {
            clients.push(self.client(pair).app(&format!(
                "many --to {} --connections {connections} --at-a-time {AT_A_TIME} --until {}",
                self.server(pair),
                until.display()
            ))?);
        }
        for client in &mut clients {
            let open = client.event("open", LONGEST)?;
            ensure!(open["failed"] == 0, "not all came about: {open}");
        }
        Ok(Held { clients, until })
    }

    /// The 50th and the 99th percentile of a connection's set-up, in microseconds.
    fn set_up(&self) -> Result<[f64; 2]> {
        let done = self
            .client(0)
            .app(&format!(
                "set-up --to {} --time {}",
                self.server(0),
                SET_UP.as_millis()
            ))?
            .success(LONGEST)?;
        let number = |name: &str| done[name].as_f64().with_context(|| format!("no {name}"));
        Ok([number("p50")?, number("p99")?])
    }

    fn client(&self, pair: u64) -> Place {
        self.mesh.pod(&client_name(pair)).place().clone()
    }

    fn server(&self, pair: u64) -> SocketAddr {
        let server = self.mesh.pod(&server_name(pair));
        SocketAddr::new(server.ipv4().into(), ECHO_PORT)
    }

    /// How many connections both daemons can take.
    fn capacity(&self) -> Result<u64> {
        let capacities = self.daemons.iter().map(|one| capacity(one, "connections"));
        let least = capacities.collect::<Result<Vec<_>>>()?.into_iter().min();
        least.context("there is no daemon")
    }

    /// Resident memory of the client's and the server's daemon, in KiB.
    fn resident(&self) -> Result<[u64; 2]> {
        let of = |index: usize| anyhow::Ok(memory(self.daemons[index].pid())?.resident);
        Ok([of(0)?, of(1)?])
    }
}

/// Open connections.
struct Held {
    clients: Vec<App>,
    /// The clients hold them until there is a file at this path.
    until: PathBuf,
}

impl Held {
    /// Has the clients exchange once more on each connection, and close it.
    fn release(self) -> Result<()> {
        fs::write(&self.until, "").with_context(|| format!("writing {}", self.until.display()))?;
        for client in self.clients {
            client.success(LONGEST)?;
        }
        Ok(())
    }
}

fn client_name(pair: u64) -> String {
    format!("client-{pair}")
}

fn server_name(pair: u64) -> String {
    format!("server-{pair}")
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// A number of the daemon's capacity, in connections.
fn capacity(daemon: &Daemon, name: &str) -> Result<u64> {
    let status = daemon.status_json()?;
    let number = status["capacity"][name].as_u64();
    number.with_context(|| format!("the daemon's status has no capacity.{name}"))
}

/// Raises the limit of open files, soft and hard, of this process and of those that it starts. Only CAP_SYS_RESOURCE allows
/// that; without it, the daemons have less capacity.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let limit = hard.max(DESCRIPTORS);
        let _ = setrlimit(Resource::RLIMIT_NOFILE, limit, limit);
    }
}

/// Connections that are held at the same time.
const HELD: u64 = 50_000;
/// A pod may hold less than what is free, and so may each of its callers: one pair would be refused.
const PAIRS: u64 = 4;
/// Connections that a client opens at the same time.
const AT_A_TIME: u64 = 16;
/// Connections that are idle beside the short ones.
const IDLE: u64 = 10_000;
/// Short connections of each part.
const PART: u64 = 100_000;
const PARTS: u64 = 10;
/// The limit of open files that is tried: a daemon takes two for a connection, and pods hold three fifths of its capacity.
const DESCRIPTORS: u64 = 1 << 18;
/// How long connections are set up one by one.
const SET_UP: Duration = Duration::from_secs(10);
/// How long a step may take.
const LONGEST: Duration = Duration::from_secs(600);
