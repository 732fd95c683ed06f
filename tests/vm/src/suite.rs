//! The programs that run in a machine, and their results.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_tests::vm::{Cgroups, EMULATED, Event, Step};

use super::cluster;
use super::kernels::Kernel;
use super::machine::{Accelerator, Machine};
use super::programs::{OURS, Tests};
use super::table::{Cell, Column};
use test_runner::Summary;

/// A row of the table: its subject, and the tests that cover it.
struct Feature {
    title: &'static str,
    /// Their names begin with one of these.
    tests: &'static [&'static str],
}

const CHECK: &str = "`auth-daemon check`: programs load and verify, nothing is missing";
const DEMO: &str = "The demo";
const BOTH: &str = "Version 1 cgroups beside version 2";
const REFUSED: &str = "Refused, with the feature that is missing and the version that brought it";
const CLUSTER: &str = "A Kubernetes cluster with cgroup version 2 alone";
/// What is not named here asks nothing of the kernel that the others do not: certificates, the CA, configuration, logs.
const FEATURES: [Feature; 7] = [
    Feature {
        title: "Redirection and addresses",
        tests: &[
            "traffic::basics",
            "traffic::redirection",
            "traffic::addresses",
            "traffic::services",
        ],
    },
    Feature {
        title: "Ends of connections, and data before them",
        tests: &["traffic::endings", "early::endings", "early::sizes"],
    },
    Feature {
        title: "Fail closed, restarts, unload",
        tests: &[
            "lifecycle::changes",
            "lifecycle::claims",
            "lifecycle::drain",
            "lifecycle::fail_closed",
            "lifecycle::pods",
            "lifecycle::takeover",
            "lifecycle::unload",
        ],
    },
    Feature {
        title: "Hostile peers and pods",
        tests: &["hostile"],
    },
    Feature {
        title: "Pods of one node, in the kernel",
        tests: &["same_node"],
    },
    Feature {
        title: "Pods found by their processes, STRICT and policies",
        tests: &["lifecycle::enrolment", "traffic::policy"],
    },
    Feature {
        title: "Callers that are no mesh pods, and namespaces nested in a pod",
        tests: &["traffic::callers", "traffic::nested"],
    },
];
/// The modules that run with both versions of cgroups.
const WITH_BOTH: [&str; 4] = [
    "traffic::redirection",
    "lifecycle::fail_closed",
    "lifecycle::enrolment",
    "lifecycle::unload",
];
/// The modules in the short run.
const SHORT: [&str; 2] = ["lifecycle::fail_closed", "same_node::hostile"];

/// A program to run, the row that it counts for, and how its success is told.
struct Run {
    title: &'static str,
    step: Step,
    verdict: fn(&Output) -> Cell,
}

impl Run {
    /// Whether what it prints is shown as it comes, and not only when it has failed.
    fn is_shown(&self) -> bool {
        self.title == CLUSTER
    }
}

/// The outcome of a program.
#[derive(Debug, Default)]
struct Output {
    lines: Vec<String>,
    code: Option<i32>,
    late: bool,
    seconds: f64,
}

/// The programs to run in a machine.
pub(super) struct Suite {
    kernel: &'static str,
    runs: Vec<Run>,
}

impl Suite {
    /// What is run on this kernel.
    pub(super) fn of(
        kernel: &Kernel,
        accelerator: Accelerator,
        tests: &[Tests],
        short: bool,
        filtered: bool,
    ) -> Self {
        let mut runs = Vec::new();
        if !kernel.supported {
            runs.push(check(REFUSED, Cgroups::V2, refused));
            runs.push(refused_run());
        } else if !filtered {
            runs.push(check(CHECK, Cgroups::V2, met));
            runs.push(demo(DEMO, Cgroups::V2));
            for test in tests {
                if !short || SHORT.contains(&test.name.as_str()) {
                    runs.extend(tested(test, Cgroups::V2));
                }
            }
            runs.push(check(BOTH, Cgroups::Both, met));
            if !short {
                runs.push(demo(BOTH, Cgroups::Both));
            }
            for test in tests {
                let wanted = match short {
                    true => test.name == "traffic::redirection",
                    false => WITH_BOTH.iter().any(|name| test.name.starts_with(name)),
                };
                if wanted {
                    runs.extend(tested(test, Cgroups::Both));
                }
            }
        } else {
            for test in tests {
                runs.extend(tested(test, Cgroups::V2));
            }
        }
        Self::new(kernel, accelerator, runs)
    }

    /// The cluster test.
    pub(super) fn kubernetes(kernel: &Kernel, accelerator: Accelerator) -> Self {
        let mut step = cluster::step();
        step.environment.extend(environment());
        let kube_node = ("KUBE_NODE".to_owned(), ours("kube-node"));
        step.environment.push(kube_node);
        let run = Run {
            title: CLUSTER,
            step,
            verdict: all_passed,
        };
        Self::new(kernel, accelerator, vec![run])
    }

    fn new(kernel: &Kernel, accelerator: Accelerator, mut runs: Vec<Run>) -> Self {
        if accelerator == Accelerator::Tcg {
            for run in &mut runs {
                let emulated = (EMULATED.to_owned(), "1".to_owned());
                run.step.environment.push(emulated);
            }
        }
        Self {
            kernel: kernel.name,
            runs,
        }
    }

    /// The plan's steps.
    pub(super) fn steps(&self) -> Vec<Step> {
        self.runs.iter().map(|run| run.step.clone()).collect()
    }

    /// Runs the machine and tells what came of each row. A machine that goes down fails what it was at, and what it did not
    /// come to.
    ///
    /// # Errors
    /// If the host has a problem, not the virtual machine.
    pub(super) fn run(&self, machine: &Machine, release: &str) -> Result<Column> {
        let mut column = Column::new(self.kernel, release, machine.accelerator);
        for run in &self.runs {
            column.row(run.title);
        }
        let longest = self.runs.iter().map(|run| run.step.seconds).max();
        let patience = Duration::from_secs(longest.unwrap_or(0) + 60);
        let mut current: Option<(usize, Output, Instant)> = None;
        let mut done = 0;
        let result = machine.run(
            |event| {
                match event {
                    Event::Started(said) if said != release => {
                        bail!("Linux {said} has started, not {release}")
                    }
                    Event::Begins(index) => {
                        current = Some((index, Output::default(), Instant::now()));
                    }
                    Event::Line(line) => {
                        if let Some((index, output, _)) = &mut current {
                            let line = line.trim_end().to_owned();
                            if self.runs.get(*index).is_some_and(Run::is_shown) {
                                eprintln!("      {line}");
                            }
                            output.lines.push(line);
                        }
                    }
                    Event::Ended { code, late } => {
                        let (index, mut output, start) =
                            current.take().context("an end without a beginning")?;
                        let run = self.runs.get(index).context("an unknown step")?;
                        output.code = code;
                        output.late = late;
                        output.seconds = start.elapsed().as_secs_f64();
                        done = index + 1;
                        column.add(run.title, conclude(run, &output, release));
                    }
                    Event::Started(_) | Event::Trouble(_) | Event::Done => {}
                }
                Ok(())
            },
            patience,
        );
        if let Err(error) = result {
            let at = self.runs.get(done).or(self.runs.last());
            let name = at.map_or("its start", |run| run.step.name.as_str());
            if let Some((_, output, _)) = &current {
                show(output);
            }
            eprintln!("    Linux {release}: {name}: {error:#}");
            let why = error.to_string();
            let mut cell = Cell::failed(why.lines().next().unwrap_or_default().to_owned());
            for run in self.runs.iter().skip(done) {
                column.add(run.title, cell.named(&run.step.name));
                cell = Cell::failed("was not run, the machine was down".to_owned());
            }
            if done == self.runs.len() {
                column.add(self.runs[done - 1].title, cell);
            }
        }
        Ok(column)
    }
}

/// The row of a test, if it is run in machines.
pub(super) fn row(test: &str) -> Option<&'static str> {
    let has = |feature: &&Feature| feature.tests.iter().any(|start| test.starts_with(start));
    FEATURES.iter().find(has).map(|feature| feature.title)
}

/// Says on this machine's standard error what a program came to, and all that it wrote when it failed.
fn conclude(run: &Run, output: &Output, release: &str) -> Cell {
    let mut cell = (run.verdict)(output);
    if output.late {
        cell = Cell::failed(format!("did not end within {} s", run.step.seconds));
    }
    if cell.failures.is_empty() {
        if run.title == REFUSED {
            show(output);
        }
        eprintln!(
            "    Linux {release}: {}: {cell}, {:.1} s",
            run.step.name, output.seconds
        );
    } else {
        if !run.is_shown() {
            show(output);
        }
        eprintln!(
            "    Linux {release}: {}: FAILED after {:.1} s",
            run.step.name, output.seconds
        );
    }
    cell.named(&run.step.name)
}

fn show(output: &Output) {
    for line in &output.lines {
        eprintln!("      {line}");
    }
}

fn ours(name: &str) -> String {
    format!("{OURS}/{name}")
}

fn check(title: &'static str, cgroups: Cgroups, verdict: fn(&Output) -> Cell) -> Run {
    let step = Step {
        name: named("auth-daemon check", cgroups),
        cgroups,
        command: vec![ours("auth-daemon"), "check".to_owned()],
        environment: Vec::new(),
        seconds: 120,
    };
    Run {
        title,
        step,
        verdict,
    }
}

fn demo(title: &'static str, cgroups: Cgroups) -> Run {
    let step = Step {
        name: named("demo", cgroups),
        cgroups,
        command: vec![ours("xtask"), "demo".to_owned(), "--no-build".to_owned()],
        environment: environment(),
        seconds: 1800,
    };
    Run {
        title,
        step,
        verdict: demonstrated,
    }
}

/// The run of a module of tests, if it has a row.
fn tested(tests: &Tests, cgroups: Cgroups) -> Option<Run> {
    let title = row(&tests.name)?;
    let mut command = vec![
        ours(&format!("tests/{}", tests.binary)),
        "--show-output".to_owned(),
        "--exact".to_owned(),
    ];
    command.extend(tests.tests.iter().cloned());
    let step = Step {
        name: named(&tests.name, cgroups),
        cgroups,
        command,
        environment: environment(),
        seconds: 1800,
    };
    Some(Run {
        title: match cgroups {
            Cgroups::V2 => title,
            Cgroups::Both => BOTH,
        },
        step,
        verdict: some_passed,
    })
}

/// The daemon itself, started without looking at `check` first.
fn refused_run() -> Run {
    let script = format!(
        "echo '{{nodeName: x, discovery: {{files: /root}}, ca: {{directory: /tmp/ca}}}}' >/tmp/config.yaml; \
         {} run --config /tmp/config.yaml; code=$?; \
         for link in /sys/fs/bpf/auth-daemon/*/links/*; do [ ! -e \"$link\" ] || echo \"left attached: $link\"; done; \
         exit $code",
        ours("auth-daemon")
    );
    let step = Step {
        name: "auth-daemon run".to_owned(),
        cgroups: Cgroups::V2,
        command: ["sh", "-c", &script].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        seconds: 120,
    };
    Run {
        title: REFUSED,
        step,
        verdict: refused,
    }
}

fn named(what: &str, cgroups: Cgroups) -> String {
    match cgroups {
        Cgroups::V2 => what.to_owned(),
        Cgroups::Both => format!("{what}, both versions of cgroups"),
    }
}

fn environment() -> Vec<(String, String)> {
    [
        ("AUTH_DAEMON", ours("auth-daemon")),
        ("POD_APP", ours("pod-app")),
        ("RUST_BACKTRACE", "0".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

/// `check` has found everything.
fn met(output: &Output) -> Cell {
    let missing = output
        .lines
        .iter()
        .filter(|line| line.starts_with("MISSING"));
    let missing: Vec<String> = missing.cloned().collect();
    let found = output
        .lines
        .iter()
        .filter(|line| line.starts_with("ok "))
        .count();
    match output.code {
        Some(0) if missing.is_empty() && found > 0 => Cell::passed(found),
        _ if missing.is_empty() => Cell::failed(ended(output)),
        _ => Cell::failed(missing.join("; ")),
    }
}

/// The daemon does not run here, and names a feature with the version of Linux that brought it.
fn refused(output: &Output) -> Cell {
    let named = output
        .lines
        .iter()
        .any(|line| line.contains("came with Linux "));
    let attached = output
        .lines
        .iter()
        .any(|line| line.starts_with("left attached: "));
    match output.code {
        Some(code) if code != 0 && named && !attached => Cell::passed(1),
        _ => Cell::failed(format!("is not refused as it should be: {}", ended(output))),
    }
}

/// The demo's closing line: `21 of 21 checks passed in 31.0 s`.
fn demonstrated(output: &Output) -> Cell {
    let closing = output.lines.iter().find_map(|line| {
        let (passed, rest) = line.split_once(" of ")?;
        let (all, _) = rest.split_once(" checks passed")?;
        Some((passed.parse::<usize>().ok()?, all.parse::<usize>().ok()?))
    });
    match closing {
        Some((passed, all)) if passed == all && output.code == Some(0) => Cell::passed(all),
        Some((passed, all)) => Cell {
            passed,
            failures: vec![format!("{} of {all} checks failed", all - passed)],
            skipped: Vec::new(),
        },
        None => Cell::failed(ended(output)),
    }
}

/// The result according to libtest's output.
fn passed(output: &Output) -> Cell {
    let mut summary = Summary::default();
    for line in &output.lines {
        summary.line(line);
    }
    let mut cell = Cell {
        passed: summary.passed(),
        failures: summary.failed_tests(),
        skipped: summary.skipped_tests(),
    };
    if output.code != Some(0) && cell.failures.is_empty() {
        cell.failures.push(ended(output));
    }
    cell
}

/// The same, where there is at least one.
fn some_passed(output: &Output) -> Cell {
    match passed(output) {
        none if none == Cell::default() => Cell::failed(ended(output)),
        cell => cell,
    }
}

/// The same, where none is skipped.
fn all_passed(output: &Output) -> Cell {
    let mut cell = some_passed(output);
    cell.failures.append(&mut cell.skipped);
    cell
}

fn ended(output: &Output) -> String {
    let last = output.lines.iter().rev().find(|line| !line.is_empty());
    let last = last.map_or("nothing", String::as_str);
    match output.code {
        Some(code) => format!("it ended with {code} and said: {last}"),
        None => format!("it was killed, and had said: {last}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xtask_support::step::workspace;

    fn output(code: i32, text: &str) -> Output {
        Output {
            lines: text.lines().map(str::to_owned).collect(),
            code: Some(code),
            ..Output::default()
        }
    }

    #[test]
    fn tests_have_rows_by_their_names() {
        assert_eq!(row("traffic::addresses"), Some(FEATURES[0].title));
        assert_eq!(row("traffic::endings"), Some(FEATURES[1].title));
        assert_eq!(row("same_node::policy"), Some(FEATURES[4].title));
        assert_eq!(row("identity::ca_rotation"), None);
        for name in WITH_BOTH.iter().chain(&SHORT) {
            assert!(row(name).is_some(), "{name}");
            let file = format!("tests/tests/{}.rs", name.replace("::", "/"));
            assert!(workspace().join(file).is_file(), "{name}");
        }
    }

    #[test]
    fn a_check_is_passed_when_nothing_is_missing() {
        assert_eq!(met(&output(0, "ok   a\nok   b\n")), Cell::passed(2));
        for (code, text) in [(1, "ok   a\nMISSING b  no\n"), (1, "ok a"), (0, "")] {
            assert!(!met(&output(code, text)).failures.is_empty(), "{text}");
        }
    }

    #[test]
    fn a_refusal_names_the_version() {
        assert!(
            refused(&output(1, "MISSING x it came with Linux 5.17"))
                .failures
                .is_empty()
        );
        let attached = "it came with Linux 5.17\nleft attached: /sys/fs/bpf/x";
        for (code, text) in [(0, "it came with Linux 5.17"), (1, "no"), (1, attached)] {
            assert!(!refused(&output(code, text)).failures.is_empty(), "{text}");
        }
    }

    #[test]
    fn the_demo_counts_its_checks() {
        assert_eq!(
            demonstrated(&output(0, "\n21 of 21 checks passed in 31.0 s\n")),
            Cell::passed(21)
        );
        let some = demonstrated(&output(1, "20 of 21 checks passed in 31.0 s\n"));
        assert_eq!((some.passed, some.failures.len()), (20, 1));
        assert!(!demonstrated(&output(0, "")).failures.is_empty());
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let text =
            "running 2 tests\ntest a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n";
        assert_eq!(passed(&output(0, text)), Cell::passed(1));
        assert_eq!(some_passed(&output(0, text)), Cell::passed(1));
        assert!(
            !some_passed(&output(0, "running 0 tests\n"))
                .failures
                .is_empty()
        );
        assert!(!passed(&output(101, "test a ... ok\n")).failures.is_empty());
    }
}
