//! A running `pod-app` and the events it prints.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::eventually::TIMEOUT;
use crate::locate::pod_app;
use crate::place::Place;
use crate::process::{Finished, Process, json_lines};

/// A `pod-app` process in a place. It prints one JSON object a line, each with an `event`.
#[derive(Debug)]
pub struct App {
    process: Process,
    consumed: VecDeque<usize>,
}

impl App {
    pub(crate) fn start<A: AsRef<OsStr>>(
        place: &Place,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
        let mut command = place.command(pod_app()?)?;
        command.args(arguments);
        let process = Process::spawn(command).with_context(|| format!("in {}", place.name()))?;
        Ok(Self {
            process,
            consumed: VecDeque::new(),
        })
    }

    /// Waits until the server listens, and returns `self`.
    pub fn listening(mut self) -> Result<Self> {
        self.event("listening", TIMEOUT)?;
        Ok(self)
    }

    /// Waits for the next event of this kind that no earlier call has returned.
    pub fn event(&mut self, kind: &str, deadline: Duration) -> Result<Value> {
        let mut number = 0;
        let consumed = &self.consumed;
        let (number, value) = self.process.wait_for_line(
            &format!("an event `{kind}` of pod-app"),
            deadline,
            |line| {
                let value = serde_json::from_str::<Value>(line).ok();
                number += 1;
                let value =
                    value.filter(|value| value["event"] == kind && !consumed.contains(&number))?;
                Some((number, value))
            },
        )?;
        self.consumed.push_back(number);
        Ok(value)
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Value> {
        json_lines(&self.process.stdout())
    }

    /// All events of this kind so far.
    pub fn events_of(&self, kind: &str) -> Vec<Value> {
        self.events()
            .into_iter()
            .filter(|event| event["event"] == kind)
            .collect()
    }

    /// Waits until the process exits, with any exit code, and returns all events. Clients exit with 1 when something
    /// failed.
    pub fn finish(self, deadline: Duration) -> Result<Finished> {
        self.process.finish(deadline)
    }

    /// Waits until the process exits with code 0 and returns the last event.
    pub fn success(self, deadline: Duration) -> Result<Value> {
        let mut events = self.finish(deadline)?.ok()?.json_lines();
        events.pop().context("pod-app ended without an event")
    }

    /// Waits until the process exits with a nonzero code and returns the last event.
    pub fn failure(self, deadline: Duration) -> Result<Value> {
        let finished = self.finish(deadline)?;
        if finished.status.success() {
            bail!("pod-app was to fail but did not: {}", finished.stdout);
        }
        let stderr = finished.stderr.clone();
        finished
            .json_lines()
            .pop()
            .with_context(|| format!("pod-app ended without an event: {stderr}"))
    }

    /// The process, to send it signals or read its standard error.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
