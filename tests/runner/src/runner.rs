//! Runs tests in parallel, each in a process of its own, and reports each result.

use std::fs::File;
use std::io::Write;
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::binaries::Binary;
use super::output::{read, temporary_file};
use super::summary::Summary;
use xtask_support::step::programs;

/// A test, and how it shares the machine with others.
#[derive(Debug)]
pub(crate) struct Test<'a> {
    pub(crate) binary: &'a Binary,
    pub(crate) name: String,
}

impl Test<'_> {
    /// The test's name with its binary's: `traffic::load::name`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}::{}", self.binary.name, self.name)
    }
}

/// The tests that may run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Group {
    /// Tests that compute: one per core.
    Unit,
    /// Tests that build meshes, which wait most of the time.
    Mesh,
    /// Tests that start an API server, which needs a core until it serves, and then wait: one per core, beside the groups above.
    ApiServer,
    /// Tests that run a cluster, which take minutes and wait for most of them: one at a time, beside the groups above.
    Cluster,
    /// Tests that take the longer the more they find, in the CPU time that others leave: one at a time, beside the groups above.
    Spare,
    /// Tests that measure time or resources: one at a time, with nothing in parallel.
    Alone,
}

impl Group {
    /// The group of a test, by its full name.
    pub(crate) fn of(test: &Test<'_>) -> Self {
        let name = test.full_name();
        if ALONE.iter().any(|prefix| name.starts_with(prefix)) {
            Self::Alone
        } else if SEARCHES.iter().any(|prefix| name.starts_with(prefix)) {
            Self::Spare
        } else if CLUSTER.iter().any(|prefix| name.starts_with(prefix)) {
            Self::Cluster
        } else if API_SERVER.iter().any(|prefix| name.starts_with(prefix)) {
            Self::ApiServer
        } else if test.binary.integration {
            Self::Mesh
        } else {
            Self::Unit
        }
    }

    fn width(self) -> usize {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        match self {
            Self::Unit | Self::ApiServer => cores,
            Self::Mesh => 2 * cores,
            Self::Cluster | Self::Spare | Self::Alone => 1,
        }
    }
}

/// Tests that start an API server.
const API_SERVER: [&str; 4] = [
    "kubernetes::",
    "kubernetes_ca::",
    "lifecycle::flap::",
    "lifecycle::remote_clusters::",
];
/// Tests that run a cluster of two nodes.
const CLUSTER: [&str; 2] = ["cluster::", "istio::"];
/// Tests that search for as long as they are told, and for how long.
const SEARCHES: [&str; 1] = ["fuzz_seeds::"];
const SEARCH_SECONDS: (&str, &str) = ("FUZZ_SECONDS", "20");
/// Tests that need the machine for themselves.
const ALONE: [&str; 7] = [
    "abuse::",
    "invariant::",
    "lifecycle::enrolment_churn::",
    "operator::footprint::",
    "same_node::changes::",
    "traffic::load::",
    "traffic::redirection_permissive::concurrent_tunnels_",
];
/// Tells the waits of mesh-tests that other tests run at the same time.
const BESIDE_OTHERS: &str = "MESH_BESIDE_OTHERS";
/// Time limit, after which a test is killed and counts as failed.
const LONGEST: Duration = Duration::from_secs(1800);
const POLL: Duration = Duration::from_millis(20);

/// Runs the tests, group by group, and adds their results to the summary. Prints the output of failed tests; the log
/// contains the output of all.
///
/// # Errors
/// If a test cannot be started or the log cannot be written.
pub(crate) fn run(tests: Vec<Test<'_>>, log: &mut File, summary: &mut Summary) -> Result<()> {
    let run = &Run {
        tests,
        results: Mutex::new(Results {
            log,
            summary,
            done: 0,
        }),
    };
    thread::scope(|scope| {
        let spawn = |group| scope.spawn(move || run.group(group));
        let beside = [Group::ApiServer, Group::Cluster, Group::Spare].map(spawn);
        for group in [Group::Unit, Group::Mesh] {
            run.group(group)?;
        }
        beside
            .into_iter()
            .try_for_each(|group| group.join().expect("no worker panics"))
    })?;
    run.group(Group::Alone)
}

struct Run<'a> {
    tests: Vec<Test<'a>>,
    results: Mutex<Results<'a>>,
}

struct Results<'a> {
    log: &'a mut File,
    summary: &'a mut Summary,
    done: usize,
}

impl Run<'_> {
    /// Runs the tests of a group, as many in parallel as the group allows.
    fn group(&self, group: Group) -> Result<()> {
        let tests = self.tests.iter().filter(|test| Group::of(test) == group);
        in_parallel(group.width(), tests, |test| {
            let ended = execute(test)?;
            self.report(test, &ended)
        })
    }

    fn report(&self, test: &Test<'_>, ended: &Ended) -> Result<()> {
        let mut results = lock(&self.results);
        results.done += 1;
        let (done, total, name) = (results.done, self.tests.len(), test.full_name());
        let seconds = ended.time.as_secs_f64();
        let passed = ended.passed();
        let verdict = if passed { "ok" } else { "FAILED" };
        let line = format!("{done}/{total} {verdict} {seconds:.1} s {name}\n");
        let output = &ended.output;
        write!(results.log, "{line}{output}").context("cannot write the log")?;
        print!("{line}");
        for skipped in output.lines().filter(|line| line.contains("SKIPPED ")) {
            println!("    {}", skipped.trim_start());
        }
        if !passed {
            println!("{output}{}", ended.end);
        }
        results.summary.add(&name, passed, output);
        Ok(())
    }
}

/// The outcome of a test.
struct Ended {
    /// `None` if it was killed because it exceeded its time limit.
    status: Option<ExitStatus>,
    end: String,
    output: String,
    time: Duration,
}

impl Ended {
    fn passed(&self) -> bool {
        self.status.is_some_and(|status| status.success())
            && self.output.contains("test result: ok. 1 passed")
    }
}

fn execute(test: &Test<'_>) -> Result<Ended> {
    let mut file = temporary_file()?;
    let writer = || file.try_clone().context("cannot share a file");
    let start = Instant::now();
    let mut command = match Group::of(test) {
        Group::Spare => {
            let (variable, seconds) = SEARCH_SECONDS;
            let mut command = test.binary.command_for_spare_time();
            command.env(variable, seconds);
            command
        }
        _ => test.binary.command(),
    };
    if Group::of(test) != Group::Alone {
        command.env(BESIDE_OTHERS, "1");
    }
    let mut child = command
        .args(["--exact", &test.name, "--show-output"])
        .env("AUTH_DAEMON", programs()?.join("auth-daemon"))
        .stdout(writer()?)
        .stderr(writer()?)
        .spawn()
        .with_context(|| format!("cannot run {}", test.binary.path.display()))?;
    let mut status = None;
    while status.is_none() && start.elapsed() < LONGEST {
        thread::sleep(POLL);
        status = child.try_wait().context("cannot wait for a test")?;
    }
    if status.is_none() {
        child.kill().context("cannot kill a test")?;
        child.wait().context("cannot wait for a test")?;
    }
    let time = start.elapsed();
    Ok(Ended {
        end: match status {
            Some(status) => format!("{}: {status}\n", test.full_name()),
            None => format!("{} did not end within {LONGEST:?}\n", test.full_name()),
        },
        status,
        output: read(&mut file)?,
        time,
    })
}

/// Works on all items, in their order and on `width` of them at a time.
fn in_parallel<T>(
    width: usize,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> Result<()> + Sync,
) -> Result<()> {
    let items = &Mutex::new(items);
    let work = || {
        loop {
            // A statement of its own, so that the lock is released before the work.
            let item = lock(items).next();
            let Some(item) = item else { return Ok(()) };
            work(item)?;
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..width).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no worker panics"))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no worker panics")
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn works_on_as_many_items_at_a_time_as_told() {
        let (first, second) = (mpsc::channel(), mpsc::channel());
        // Each tells the other that it has begun, and waits to hear the same.
        let ends = [(first.0, second.1), (second.0, first.1)];
        in_parallel(2, ends.into_iter(), |(begun, other)| {
            begun.send(())?;
            Ok(other.recv_timeout(Duration::from_secs(60))?)
        })
        .expect("both began before either ended");
    }
}
