//! The rounds: every load on every system in turn, so that changes of the machine's load affect all systems alike.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use anyhow::{Context, Result};

use super::loads::{LOADS, Load, Measured, Row, When, title};
use super::number::number;
use super::stage::Stage;
use super::system::System;

/// What to measure, and for how long.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) systems: Vec<System>,
    pub(super) rounds: usize,
    /// Duration of each load.
    pub(super) time: Duration,
    /// Parts of rows' keys or titles; all rows when there are none.
    pub(super) only: Vec<String>,
}

/// An event from the thread that measures.
pub(super) enum Event {
    /// A part of the benchmark begins.
    Begins(String),
    /// A line of text for the user.
    Progress(String),
    /// A value of a row, from one round.
    Sample {
        key: &'static str,
        system: System,
        value: f64,
        round: usize,
    },
    /// An expectation was not met.
    Problem(String),
}

impl xtask_support::supervise::Event for Event {
    fn begins(&self) -> Option<&str> {
        match self {
            Self::Begins(what) => Some(what),
            _ => None,
        }
    }
}

impl Plan {
    /// Whether a row was requested.
    pub(super) fn wants(&self, load: &Load, row: &Row) -> bool {
        let title = title(load, row);
        let named = |part: &String| row.key.contains(part) || title.contains(part);
        self.only.is_empty() || self.only.iter().any(named)
    }

    /// The loads that fill a requested row.
    pub(super) fn loads(&self) -> Vec<&'static Load> {
        LOADS
            .iter()
            .filter(|load| load.rows.iter().any(|row| self.wants(load, row)))
            .collect()
    }
}

/// Measures until all loads are done or `stop` is set.
///
/// # Errors
/// If a system cannot be started. A load that fails is a [`Event::Problem`], and the next load follows.
pub(super) fn measure(plan: &Plan, events: &Sender<Event>, stop: &AtomicBool) -> Result<()> {
    let run = Run {
        plan,
        events,
        stop,
        failed: RefCell::default(),
    };
    let loads = plan.loads();
    let lasting = loads.iter().any(|load| load.when != When::OnFreshProxies);
    let stages: Vec<Stage> = if lasting {
        plan.systems
            .iter()
            .map(|system| run.stage(*system))
            .collect::<Result<_>>()?
    } else {
        Vec::new()
    };
    for round in 0..plan.rounds {
        for load in loads.iter().filter(|load| load.when != When::AtTheEnd) {
            run.load(load, &stages, round)?;
        }
    }
    for load in loads.iter().filter(|load| load.when == When::AtTheEnd) {
        run.load(load, &stages, 0)?;
    }
    run.begins("cleaning up".to_owned());
    Ok(())
}

struct Run<'a> {
    plan: &'a Plan,
    events: &'a Sender<Event>,
    stop: &'a AtomicBool,
    /// Systems on which a load has failed.
    failed: RefCell<BTreeSet<System>>,
}

impl Run<'_> {
    /// Runs a load on each system, in a different order in each round.
    fn load(&self, load: &'static Load, stages: &[Stage], round: usize) -> Result<()> {
        let systems = &self.plan.systems;
        let mut shown = Vec::new();
        for turn in 0..systems.len() {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            let system = systems[(turn + round) % systems.len()];
            if load.when != When::EachRound && !system.has_proxies() {
                continue;
            }
            self.begins(format!("{} of {system}", title(load, &load.rows[0])));
            let measured = match load.when {
                When::OnFreshProxies => Stage::set(system).and_then(|stage| self.on(load, &stage)),
                When::EachRound | When::AtTheEnd => stages
                    .iter()
                    .find(|stage| stage.system == system)
                    .context("each system has a stage")
                    .and_then(|stage| self.on(load, stage)),
            };
            match measured {
                Ok(measured) => {
                    self.samples(load, system, round, &measured);
                    if let Some(first) = measured.values.first().copied().flatten() {
                        shown.push((system, format!("{system} {}", number(first))));
                    }
                }
                Err(error) => self.problem(load, system, round, &format!("{error:#}")),
            }
        }
        shown.sort_by_key(|(system, _)| *system);
        let shown: Vec<String> = shown.into_iter().map(|(_, text)| text).collect();
        let row = &load.rows[0];
        self.tell(Event::Progress(format!(
            "{}, {}: {} {}",
            self.moment(load, round),
            title(load, row),
            shown.join(", "),
            row.unit
        )));
        Ok(())
    }

    /// Runs a load on one system, and verifies that it took the intended path.
    fn on(&self, load: &Load, stage: &Stage) -> Result<Measured> {
        let work = || {
            let mark = stage.proxies.mark(load.way)?;
            let measured = (load.run)(stage, load.way, self.plan.time)?;
            stage
                .proxies
                .check(&mark, load.way, measured.server, measured.moved)?;
            Ok(measured)
        };
        let result = work();
        // Errors that follow from the first failure add no information.
        let tell = result.is_err() && !self.stop.load(Ordering::Relaxed);
        if tell && self.failed.borrow_mut().insert(stage.system) {
            self.tell(Event::Progress(stage.proxies.last_words()));
        }
        result
    }

    fn samples(&self, load: &'static Load, system: System, round: usize, measured: &Measured) {
        for complaint in &measured.complaints {
            self.problem(load, system, round, complaint);
        }
        for (row, value) in load.rows.iter().zip(&measured.values) {
            let Some(value) = *value else { continue };
            if self.plan.wants(load, row) {
                self.tell(Event::Sample {
                    key: row.key,
                    system,
                    value,
                    round,
                });
            }
        }
    }

    fn stage(&self, system: System) -> Result<Stage> {
        self.begins(format!("two nodes for {system}"));
        let stage = Stage::set(system).with_context(|| format!("setting up {system}"))?;
        self.tell(Event::Progress(format!("{system}: ready")));
        Ok(stage)
    }

    fn problem(&self, load: &Load, system: System, round: usize, what: &str) {
        self.tell(Event::Problem(format!(
            "{system}, {}, {}: {}",
            self.moment(load, round),
            title(load, &load.rows[0]),
            what.trim()
        )));
    }

    fn moment(&self, load: &Load, round: usize) -> String {
        match load.when {
            When::AtTheEnd => "after all rounds".to_owned(),
            _ => format!("round {} of {}", round + 1, self.plan.rounds),
        }
    }

    fn begins(&self, what: String) {
        self.tell(Event::Begins(what));
    }

    fn tell(&self, event: Event) {
        // The receiver is gone after Ctrl-C.
        let _ = self.events.send(event);
    }
}
