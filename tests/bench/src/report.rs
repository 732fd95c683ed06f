//! Output of the benchmark: progress, the table, the targets, and the JSON object for programs.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Error, Result};
use serde_json::{Value, json};

use super::chart;
use super::loads::title;
use super::machine::Machine;
use super::results::Results;
use super::runner::{Event, Plan};
use super::system::System;
use super::table;
use super::targets::TARGETS;
use xtask_support::page;
use xtask_support::step::workspace;

/// Collects the loads' results. Text for people goes to stdout; with JSON, which is alone on stdout, it goes to stderr.
pub(super) struct Report {
    pub(super) plan: Plan,
    pub(super) results: Results,
    /// Problems, one line each.
    pub(super) problems: Vec<String>,
    json: bool,
    machine: Machine,
    start: Instant,
}

impl Report {
    pub(super) fn new(plan: Plan, json: bool) -> Self {
        // If it cannot be found, that was reported when the plan was made.
        let ztunnel = mesh_tests::peers::ztunnel::named().ok().flatten();
        let ztunnel = ztunnel.filter(|_| plan.systems.contains(&System::Ztunnel));
        let report = Self {
            plan,
            results: Results::default(),
            problems: Vec::new(),
            json,
            machine: Machine::look(ztunnel.as_deref()),
            start: Instant::now(),
        };
        let loads = report.plan.loads().len();
        eprintln!(
            "{loads} loads of {} s on {} systems, {} rounds",
            report.plan.time.as_secs(),
            report.plan.systems.len(),
            report.plan.rounds
        );
        report
    }

    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Begins(_) => {}
            Event::Progress(line) => eprintln!("{:6.0} s  {line}", self.seconds()),
            Event::Sample {
                key,
                system,
                value,
                round,
            } => self.results.add(key, system, round, value),
            Event::Problem(what) => {
                eprintln!("{:6.0} s  PROBLEM: {what}", self.seconds());
                self.problems.push(what);
            }
        }
    }

    /// Prints the results; `broken` is the reason for an early end.
    pub(super) fn finish(&self, broken: Option<&Error>) {
        let text = self.text(broken);
        // A reader that has closed the pipe (`| head`) is no reason to fail.
        if self.json {
            let _ = writeln!(io::stdout(), "{}", self.object(broken));
            eprint!("{text}");
        } else {
            let _ = write!(io::stdout(), "{text}");
        }
    }

    /// Writes the chart.
    pub(super) fn draw(&self, path: &Path) -> Result<()> {
        let svg = chart::svg(&self.results, &self.plan.systems, &self.machine.line())?;
        fs::write(path, svg).with_context(|| format!("writing {}", path.display()))
    }

    /// Writes the JSON object and the chart into the documentation, and the table into its page.
    pub(super) fn save(&self) -> Result<()> {
        let folder = workspace().join("docs");
        let table = table::markdown(&self.results, &self.plan.loads(), &self.plan.systems);
        let mut text = format!("{table}\n\n{}\n{}", self.method(), self.machine.line());
        if self.machine.busy() {
            text.push('\n');
            text.push_str(BUSY);
        }
        page::write("PERFORMANCE.md", "bench --save", &text)?;
        let path = folder.join("bench.json");
        fs::write(&path, format!("{:#}\n", self.object(None)))
            .with_context(|| format!("writing {}", path.display()))?;
        self.draw(&folder.join("bench.svg"))
    }

    fn text(&self, broken: Option<&Error>) -> String {
        let systems = &self.plan.systems;
        let table = table::table(&self.results, &self.plan.loads(), systems);
        let targets = table::targets(&self.results);
        let mut text = format!("\n{}\n\n{table}\nTargets\n{targets}\n", self.machine.line());
        for system in systems {
            text.push_str(&format!("{system:7}  {}\n", system.description()));
        }
        for line in self.notes() {
            text.push_str(&line);
            text.push('\n');
        }
        for problem in &self.problems {
            text.push_str(&format!("PROBLEM: {problem}\n"));
        }
        if let Some(error) = broken {
            text.push_str(&format!("ended early: {error:#}\n"));
        }
        text
    }

    /// Describes how the numbers were measured.
    fn method(&self) -> String {
        format!(
            "Medians of {} rounds, loads of {} s, in brackets the least and the most; ↓: less is better. A ratio is the \
             median of the rounds' own ratios.",
            self.plan.rounds,
            self.plan.time.as_secs()
        )
    }

    /// Explains how to read the numbers.
    fn notes(&self) -> Vec<String> {
        let mut notes = vec![self.method()];
        notes.extend(NOTES.map(str::to_owned));
        if self.machine.busy() {
            notes.push(BUSY.to_owned());
        }
        if !self.plan.systems.contains(&System::Ztunnel) {
            notes.push(NO_ZTUNNEL.to_owned());
        }
        notes
    }

    fn object(&self, broken: Option<&Error>) -> Value {
        let systems = &self.plan.systems;
        let ratios = table::ratios(systems);
        let mut rows = Vec::new();
        for load in self.plan.loads() {
            for row in load.rows.iter().filter(|row| self.results.has(row.key)) {
                let mut object = json!({
                    "key": row.key,
                    "name": title(load, row),
                    "unit": row.unit,
                    "better": format!("{:?}", row.better).to_lowercase(),
                });
                for system in systems {
                    let Some(summary) = self.results.summary(row.key, *system) else {
                        continue;
                    };
                    object[system.name()] = json!({
                        "median": summary.median,
                        "least": summary.least,
                        "most": summary.most,
                        "samples": self.results.samples(row.key, *system),
                    });
                }
                for (of, to) in &ratios {
                    object[format!("{of}/{to}")] = self.results.ratio(row.key, *of, *to).into();
                }
                rows.push(object);
            }
        }
        let targets = TARGETS.iter().map(|target| {
            let verdict = target.judge(&self.results);
            json!({
                "row": verdict.key,
                "wanted": verdict.wanted,
                "value": verdict.value,
                "met": verdict.met,
            })
        });
        let described = systems
            .iter()
            .map(|system| (system.name().to_owned(), system.description().into()));
        json!({
            "machine": self.machine,
            "rounds": self.plan.rounds,
            "seconds": self.plan.time.as_secs(),
            "systems": described.collect::<serde_json::Map<String, Value>>(),
            "rows": rows,
            "targets": targets.collect::<Vec<_>>(),
            "notes": self.notes(),
            "problems": self.problems,
            "ended_early": broken.map(|error| format!("{error:#}")),
        })
    }

    fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

const NO_ZTUNNEL: &str =
    "ztunnel was not run: ZTUNNEL names no binary, or --systems leaves it out.";

const BUSY: &str = "Other programs kept this machine busy: none of this is worth keeping.";

const NOTES: [&str; 3] = [
    "All programs share the machine's cores. Work of the network stack in soft interrupts is charged to whoever runs \
     at that moment, so CPU times of proxies hold some of the pods' and lack some of their own.",
    "Memory is VmRSS and, at most, VmHWM; the pages of a program's file count in it, though sidecars of one node share \
     them.",
    "A node has one daemon for all of its pods, but a sidecar for each.",
];
