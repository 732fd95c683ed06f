//! The setup of this suite: an attacker and its neighbour on one node, and their servers on another.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::{
    App, Daemon, DaemonOptions, Mesh, MeshBuilder, Pod, PodSpec, Result, Snapshot, eventually_ok,
};

/// The daemons' limit of open files, so that an attacker reaches its share soon.
pub(crate) const DESCRIPTORS: u64 = 8000;
/// Seconds of one measurement.
const MEASURE: u64 = 4;
/// How long a daemon may take to return what an attack took: longer than timeouts of connections and idle tunnels.
const RECOVERY: Duration = Duration::from_secs(100);
/// The largest factor by which an attack may lengthen the neighbour's median. It is some two times as long; it was
/// forty times where the threads of the attacker's connections served the neighbour's, too.
const MOST: f64 = 15.0;
/// Memory that the allocator may keep of what an attack took, in KiB.
const MEMORY_KIB: u64 = 48 * 1024;
/// Descriptors and sockets that may differ after an attack: pools keep up to 64 idle tunnels to one endpoint.
const SOME: usize = 150;
const ECHO: u16 = 7000;

/// Fields are dropped in this order: programs, daemons, the mesh.
pub(crate) struct Stage {
    _echoes: Vec<App>,
    /// The daemon of node a, which the attacker and the neighbour share.
    pub(crate) near: Daemon,
    /// The daemon of node b, which both servers share.
    pub(crate) far: Daemon,
    pub(crate) attacker: Pod,
    pub(crate) neighbour: Pod,
    /// The server that the attacker connects to.
    pub(crate) target: Pod,
    /// The server that the neighbour connects to.
    pub(crate) web: Pod,
    /// A server outside the mesh, on the same node as the others.
    pub(crate) outside: Pod,
    /// What the neighbour sees of loads that do not reach the daemons.
    unmeshed: Vec<(&'static str, Measured)>,
    pub(crate) mesh: Mesh,
}

/// What the neighbour saw during one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured {
    /// Median of the time to connect and exchange a few bytes, in milliseconds.
    median: f64,
    /// Its 99th percentile.
    p99: f64,
    /// Connections per second.
    per_second: f64,
}

impl Measured {
    /// Fails if connections take far longer than before.
    pub(crate) fn ensure_fair(&self, before: &Self) -> Result<()> {
        let ratio = self.median / before.median;
        ensure!(
            ratio < MOST,
            "the neighbour's median is {ratio:.1} times as long"
        );
        Ok(())
    }

    pub(crate) fn print_ratio(&self, what: &str, before: &Self) {
        println!(
            "neighbour ÷ {what}: median {:.1}, p99 {:.1}, throughput {:.2}",
            self.median / before.median,
            self.p99 / before.p99,
            self.per_second / before.per_second
        );
    }
}

impl Stage {
    /// Pods `attacker` and `neighbour` on node a, `target` and `web` on node b with echo servers.
    pub(crate) fn set() -> Result<Self> {
        Self::set_with(
            &DaemonOptions::default().descriptors(DESCRIPTORS),
            |builder| builder,
        )
    }

    /// Like the above, with options of the daemons and additions to the mesh.
    pub(crate) fn set_with(
        options: &DaemonOptions,
        more: impl FnOnce(MeshBuilder) -> MeshBuilder,
    ) -> Result<Self> {
        let pod = |name: &str, node| PodSpec::new(name).on(node).service_account(name);
        let builder = Mesh::builder()
            .node("a")
            .node("b")
            .pod(pod("attacker", "a"))
            .pod(pod("neighbour", "a"))
            .pod(pod("target", "b"))
            .pod(pod("web", "b"))
            .pod(pod("outside", "b").annotation("auth-daemon.io/mesh", "disabled"));
        let mesh = more(builder).start()?;
        mesh.share_cpu()?;
        let mut daemons = mesh.start_daemons_with(&options.clone())?;
        let (far, near) = (daemons.remove(1), daemons.remove(0));
        let echo = |pod: &str| {
            let server = format!("echo-server --port {ECHO} --quiet");
            mesh.pod(pod).app(&server)?.listening()
        };
        Ok(Self {
            _echoes: ["target", "web", "outside"]
                .into_iter()
                .map(echo)
                .collect::<Result<_>>()?,
            near,
            far,
            attacker: mesh.pod("attacker"),
            neighbour: mesh.pod("neighbour"),
            target: mesh.pod("target"),
            web: mesh.pod("web"),
            outside: mesh.pod("outside"),
            unmeshed: Vec::new(),
            mesh,
        })
    }

    /// The address of the echo server in `pod`: `target`, `web` or `outside`.
    pub(crate) fn echo(&self, pod: &Pod) -> SocketAddr {
        pod.at(ECHO)
    }

    /// Measures the neighbour during a load that does not reach the daemons. What it costs is the attacker's own use of the
    /// machine, and no mesh can prevent it.
    pub(crate) fn compare_with<L>(
        &mut self,
        what: &'static str,
        load: impl FnOnce(&Self) -> Result<L>,
    ) -> Result<()> {
        let running = load(self)?;
        self.unmeshed.push((what, self.measure()?));
        drop(running);
        Ok(())
    }

    /// Measures the neighbour, quietly and during the attack that `start` begins, and prints the ratios. `check` runs while
    /// the attack goes on, after the measurement. Then ends the attack and asserts that the daemons return what it took.
    ///
    /// # Panics
    /// If a connection of the neighbour fails, or a daemon keeps what the attack took.
    pub(crate) fn attack<A>(
        &mut self,
        name: &str,
        start: impl FnOnce(&Self) -> Result<A>,
        check: impl FnOnce(&Self, &mut A) -> Result<()>,
    ) -> Result<()> {
        let quiet = self.measure()?;
        let before = self.snapshots()?;
        let mut attack = start(self)?;
        let attacked = self.measure()?;
        println!("{name}: quiet {quiet:?}, attacked {attacked:?}");
        attacked.print_ratio("quiet", &quiet);
        for (what, unmeshed) in &self.unmeshed {
            print!("{what}: ");
            unmeshed.print_ratio("quiet", &quiet);
        }
        attacked.ensure_fair(&quiet)?;
        check(self, &mut attack)?;
        drop(attack);
        self.assert_recovered(&before)?;
        self.measure().map(drop)
    }

    /// Connects from the neighbour to its server for some seconds. Fails if a connection fails.
    pub(crate) fn measure(&self) -> Result<Measured> {
        self.measure_for(MEASURE)
    }

    pub(crate) fn measure_for(&self, seconds: u64) -> Result<Measured> {
        let to = self.echo(&self.web);
        let paced = format!("paced --to {to} --seconds {seconds}");
        let report = self.neighbour.app(&paced)?.success(RECOVERY)?;
        Ok(Measured {
            median: report["p50"].as_f64().unwrap_or(f64::NAN),
            p99: report["p99"].as_f64().unwrap_or(f64::NAN),
            per_second: report["perSecond"].as_f64().unwrap_or(f64::NAN),
        })
    }

    /// Snapshots of both daemons and their pods, the near one first.
    pub(crate) fn snapshots(&self) -> Result<[Snapshot; 2]> {
        Ok([
            Snapshot::take(&self.near, &[self.attacker.place(), self.neighbour.place()])?,
            Snapshot::take(&self.far, &[self.target.place(), self.web.place()])?,
        ])
    }

    /// Waits until both daemons hold no more descriptors, memory, map entries and sockets than `before`.
    ///
    /// # Panics
    /// If a daemon has died or panicked.
    pub(crate) fn assert_recovered(&mut self, before: &[Snapshot; 2]) -> Result<()> {
        for daemon in [&mut self.near, &mut self.far] {
            assert!(daemon.is_running(), "a daemon died: {}", daemon.log_text());
            let log = daemon.log_text();
            assert!(!log.contains("panicked"), "a daemon panicked: {log}");
        }
        eventually_ok(RECOVERY, "the daemons to return what was taken", || {
            for (now, before) in self.snapshots()?.iter().zip(before) {
                let growth = now.growth_since(before, MEMORY_KIB, SOME);
                ensure!(growth.is_empty(), "{}", growth.join(", "));
            }
            Ok(())
        })
    }
}
