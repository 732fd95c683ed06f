//! Requests one after the other, and what becomes of them while pods and daemons come and go.

use mesh_tests::{Context, Result, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{
    APPS, DAEMON, NODES, PATIENCE, SYSTEM, Stage, daemons_are_ready, ensure, name, overlay,
    pod_running,
};
use crate::traffic::{MARKER, server, service_address, who};

/// A pod that asks for the same URL again and again, a connection each time.
pub(crate) struct Load {
    pod: &'static str,
}

/// What curl says of each request: the HTTP status, its own exit code, and why.
const REPORT: &str = "%{http_code} %{exitcode} %{errormsg}\\n";

impl Load {
    /// Starts it, and waits until it is answered.
    pub(crate) fn start(stage: &Stage, pod: &'static str, node: &str, url: &str) -> Result<Self> {
        let script = format!(
            "while :; do curl -s -o /dev/null --max-time 20 -w '{REPORT}' {url}; sleep 0.05; done"
        );
        stage.apply(&[pod_running(pod, node, "client", &script)])?;
        let load = Self { pod };
        eventually_ok(PATIENCE, "the first answer", || {
            ensure(
                load.outcomes(stage)?.iter().any(|one| one == ANSWERED),
                || "none".to_owned(),
            )
        })?;
        Ok(load)
    }

    /// What became of each request until now, in order.
    pub(crate) fn outcomes(&self, stage: &Stage) -> Result<Vec<String>> {
        let log = stage.kubectl(&format!("logs -n {APPS} {}", self.pod))?;
        Ok(log.lines().map(|line| line.trim().to_owned()).collect())
    }

    /// The longest time between two answers since a mark, in seconds.
    pub(crate) fn longest_gap(&self, stage: &Stage, mark: usize) -> Result<f64> {
        let log = stage.kubectl(&format!("logs -n {APPS} {} --timestamps", self.pod))?;
        let answers = log.lines().skip(mark).filter_map(|line| {
            let (time, outcome) = line.split_once(' ')?;
            (outcome.trim() == ANSWERED).then(|| second_of_day(time))?
        });
        let answers: Vec<f64> = answers.collect();
        ensure(answers.len() > 1, || format!("{} answers", answers.len()))?;
        let gaps = answers
            .windows(2)
            .map(|pair| (pair[1] - pair[0]).rem_euclid(DAY));
        Ok(gaps.fold(0.0, f64::max))
    }

    /// How many there were until now.
    pub(crate) fn mark(&self, stage: &Stage) -> Result<usize> {
        Ok(self.outcomes(stage)?.len())
    }

    /// Those since a mark that were not answered.
    pub(crate) fn failures(&self, stage: &Stage, mark: usize) -> Result<Vec<String>> {
        let mut since = self.outcomes(stage)?.split_off(mark);
        since.retain(|one| one != ANSWERED);
        Ok(since)
    }

    /// Waits until this many in a row have been answered, from now on.
    pub(crate) fn goes_on(&self, stage: &Stage, count: usize) -> Result<()> {
        let mark = self.mark(stage)?;
        eventually_ok(PATIENCE, "requests that are answered", || {
            let since = self.outcomes(stage)?.split_off(mark);
            let in_a_row = since
                .iter()
                .rev()
                .take_while(|one| *one == ANSWERED)
                .count();
            ensure(in_a_row >= count, || format!("{:?}", since.last()))
        })
        .with_context(|| self.pod)
    }

    pub(crate) fn end(self, stage: &Stage) -> Result<()> {
        stage
            .kubectl(&format!(
                "delete pod -n {APPS} {} --now --wait=false",
                self.pod
            ))
            .map(drop)
    }
}

const DAY: f64 = 86_400.0;

/// Of a time as `2026-01-02T03:04:05.678Z`.
fn second_of_day(time: &str) -> Option<f64> {
    let (_, clock) = time.split_once('T')?;
    let mut parts = clock.get(..clock.find(['Z', '+'])?)?.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    Some((next()? * 60.0 + next()?) * 60.0 + next()?)
}

/// An outcome that is all right.
const ANSWERED: &str = "200 0";

pub(crate) fn scaling_loses_nothing(stage: &Stage) -> Result<()> {
    stage.apply(&server("scaled", None, 1))?;
    stage.rolled_out(APPS, "deployment/scaled")?;
    let load = Load::start(stage, "load-scaled", "node1", &who(stage, "scaled")?)?;
    let start = load.mark(stage)?;
    let scale = |replicas: u32| {
        stage.kubectl(&format!(
            "scale -n {APPS} deployment/scaled --replicas={replicas}"
        ))
    };
    scale(20)?;
    stage.rolled_out(APPS, "deployment/scaled")?;
    load.goes_on(stage, 100)?;
    let lost = load.failures(stage, start)?;
    ensure(lost.is_empty(), || format!("while it grew: {lost:?}"))?;

    scale(0)?;
    eventually_ok(PATIENCE, "the end of all its pods", || {
        let list = stage.get(&format!("pods -n {APPS} -l app=scaled"))?;
        let left = list["items"].as_array().map_or(0, Vec::len);
        ensure(left == 0, || format!("{left} are left"))
    })?;
    let outcomes = load.outcomes(stage)?;
    let last = outcomes
        .iter()
        .rposition(|one| one == ANSWERED)
        .context("no answer at all")?;
    let lost: Vec<_> = outcomes[start..last]
        .iter()
        .filter(|one| *one != ANSWERED)
        .collect();
    // One request at a time: what a pod's end can cut is one.
    ensure(lost.len() <= 1, || format!("while it shrank: {lost:?}"))?;
    println!(
        "    {} requests, {} cut while there were pods to answer",
        last + 1 - start,
        lost.len()
    );
    load.end(stage)?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} deployment/scaled service/scaled serviceaccount/scaled"
        ))
        .map(drop)
}

/// How many lines an endless answer has had, and how often it had to be asked for.
fn ticks(stage: &Stage, pod: &str) -> Result<(usize, u64)> {
    let lines = stage
        .kubectl(&format!("logs -n {APPS} {pod}"))?
        .lines()
        .count();
    let state = stage.get(&format!("pod -n {APPS} {pod}"))?;
    let restarts = &state["status"]["containerStatuses"][0]["restartCount"];
    Ok((lines, restarts.as_u64().unwrap_or_default()))
}

pub(crate) fn a_restart_is_its_nodes(stage: &Stage) -> Result<()> {
    let near = Load::start(stage, "load-near", "node1", &who(stage, "web-1")?)?;
    let far = Load::start(stage, "load-far", "node1", &who(stage, "web-2")?)?;
    let url = format!("http://{}/cgi-bin/tick", service_address(stage, "web-1")?);
    let stream = pod_running("stream", "node1", "client", &format!("exec curl -sN {url}"));
    stage.apply(&[stream])?;
    eventually_ok(PATIENCE, "the endless answer", || {
        let (lines, _) = ticks(stage, "stream")?;
        ensure(lines > 0, || "nothing of it".to_owned())
    })?;
    let mark = near.mark(stage)?;

    let before = stage.daemon_on("node2")?;
    stage.kubectl(&format!("delete pod -n {SYSTEM} {}", name(&before)))?;
    eventually_ok(PATIENCE, "the next daemon of node2", || {
        stage.daemon_on("node2")
    })?;
    far.goes_on(stage, 20)?;
    near.goes_on(stage, 20)?;
    let lost = near.failures(stage, mark)?;
    ensure(lost.is_empty(), || format!("on the other node: {lost:?}"))?;
    let (lines, _) = ticks(stage, "stream")?;
    eventually_ok(PATIENCE, "more of the endless answer", || {
        let (now, asked_again) = ticks(stage, "stream")?;
        assert_eq!(asked_again, 0, "it was cut");
        ensure(now > lines, || format!("{now} lines still"))
    })?;
    for load in [near, far] {
        load.end(stage)?;
    }
    stage
        .kubectl(&format!("delete pod -n {APPS} stream --now --wait=false"))
        .map(drop)
}

pub(crate) fn a_rolling_update(stage: &Stage) -> Result<()> {
    let names = || -> Result<Vec<String>> {
        let pods = stage.pods(SYSTEM, DAEMON)?;
        Ok(pods.iter().map(|pod| name(pod).to_owned()).collect())
    };
    let before = names()?;
    let load = Load::start(stage, "load-rolling", "node1", &who(stage, "web-2")?)?;
    let start = load.mark(stage)?;
    stage.kubectl(&format!(
        "rollout restart -n {SYSTEM} daemonset/auth-daemon"
    ))?;
    daemons_are_ready(stage)?;
    let after = names()?;
    assert_eq!(after.len(), NODES.len());
    assert!(
        after.iter().all(|name| !before.contains(name)),
        "{before:?} {after:?}"
    );
    load.goes_on(stage, 50)?;
    let (all, lost) = (
        load.mark(stage)? - start,
        load.failures(stage, start)?.len(),
    );
    let gap = load.longest_gap(stage, start)?;
    println!(
        "    {all} requests, {lost} refused while one of their nodes had no daemon: {gap:.1} s at the longest"
    );
    load.end(stage)
}

/// The same daemons once more, in pods that another DaemonSet keeps: what a rolling update with maxSurge makes, which
/// Kubernetes 1.20 does not have.
fn next_daemons(stage: &Stage) -> Result<Value> {
    let now = stage.get(&format!("daemonset -n {SYSTEM} auth-daemon"))?;
    let mut template = now["spec"]["template"].clone();
    template["metadata"]["labels"]["generation"] = json!("next");
    let labels = template["metadata"]["labels"].clone();
    Ok(json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": "auth-daemon-next", "namespace": SYSTEM},
        "spec": {"selector": {"matchLabels": labels}, "template": template},
    }))
}

/// What the probe of a daemon says.
fn probed(stage: &Stage, pod: &Value) -> Result<String> {
    stage.kubectl(&format!(
        "exec -n {SYSTEM} {} -- auth-daemon probe ready",
        name(pod)
    ))
}

/// Lets go of one generation of daemons while another one stands by, under load and with a connection that does not end: it
/// would take all of `drain` to wait for that.
fn taken_over(
    stage: &Stage,
    (leaving, staying): (&str, &str),
    (load, stream): (&'static str, &str),
) -> Result<()> {
    let pods = || stage.pods(SYSTEM, &format!("{DAEMON},{staying}"));
    stage.rolled_out(SYSTEM, &format!("daemonset/{}", generation(staying)))?;
    for pod in pods()? {
        let said = probed(stage, &pod)?;
        ensure(said.starts_with("standing by"), || said.clone())?;
    }
    let load = Load::start(stage, load, "node1", &who(stage, "web-2")?)?;
    let url = format!("http://{}/cgi-bin/tick", service_address(stage, "web-2")?);
    stage.apply(&[pod_running(
        stream,
        "node1",
        "client",
        &format!("exec curl -sN {url}"),
    )])?;
    eventually_ok(PATIENCE, "the endless answer", || {
        let (lines, _) = ticks(stage, stream)?;
        ensure(lines > 0, || "nothing of it".to_owned())
    })?;
    let start = load.mark(stage)?;
    let capture = stage.cluster.wire().capture()?;
    stage.kubectl(&format!(
        "delete daemonset -n {SYSTEM} {} --wait=false",
        generation(leaving)
    ))?;
    for pod in pods()? {
        eventually_ok(PATIENCE, "a daemon that has taken over", || {
            let said = probed(stage, &pod)?;
            ensure(said == "ready\n", || said.clone())
        })?;
    }
    load.goes_on(stage, 20)?;
    let all = load.mark(stage)? - start;
    let lost = load.failures(stage, start)?.len();
    let gap = load.longest_gap(stage, start)?;
    println!("    {all} requests, {lost} refused in {gap:.2} s at the longest");
    ensure(gap < DRAIN, || {
        format!("{gap} s: not before all connections had ended")
    })?;
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    eventually_ok(PATIENCE, "the end of those before", || {
        let list = stage.get(&format!("pods -n {SYSTEM} -l {DAEMON},{leaving}"))?;
        let left = list["items"].as_array().map_or(0, Vec::len);
        ensure(left == 0, || format!("{left} are left"))
    })?;
    load.end(stage)?;
    stage
        .kubectl(&format!("delete pod -n {APPS} {stream} --now --wait=false"))
        .map(drop)
}

/// `drain` of the daemons' configuration, in seconds.
const DRAIN: f64 = 20.0;
/// Which daemons, as labels that select them.
const NOW: &str = "generation!=next";
const NEXT: &str = "generation=next";

/// Their DaemonSet.
fn generation(label: &str) -> &'static str {
    match label {
        NEXT => "auth-daemon-next",
        _ => "auth-daemon",
    }
}

pub(crate) fn the_next_daemons_stand_by(stage: &Stage) -> Result<()> {
    stage.apply(&[next_daemons(stage)?])?;
    taken_over(stage, (NOW, NEXT), ("load-next", "stream-next"))?;
    stage.kubectl(&format!("apply -k {}", overlay()))?;
    taken_over(stage, (NEXT, NOW), ("load-back", "stream-back"))?;
    daemons_are_ready(stage)
}
