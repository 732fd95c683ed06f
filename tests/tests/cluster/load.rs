//! Requests in sequence, and their outcomes while pods and daemons start and stop.

use mesh_tests::{Context, Process, Result, eventually_ok, slowdown};
use serde_json::Value;

use crate::stage::{
    APPS, DAEMON, NODES, PATIENCE, SYSTEM, Stage, daemons_are_ready, ensure, is_ready, name,
    pod_running, pods_are_gone,
};
use crate::traffic::{MARKER, server, service_address, who};

/// A pod that requests the same URL in a loop, each time on a new connection.
pub(crate) struct Load {
    pod: &'static str,
}

/// What curl prints for each request: HTTP status, curl's exit code, and its error message.
const REPORT: &str = "%{http_code} %{exitcode} %{errormsg}\\n";

impl Load {
    /// Starts it and waits for the first answer.
    pub(crate) fn start(stage: &Stage, pod: &'static str, node: &str, url: &str) -> Result<Self> {
        let seconds = 20 * slowdown();
        let script = format!(
            "while :; do curl -s -o /dev/null --max-time {seconds} -w '{REPORT}' {url}; sleep 0.05; done"
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

    /// The outcome of each request so far, in order.
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

    /// The number of requests so far.
    pub(crate) fn mark(&self, stage: &Stage) -> Result<usize> {
        Ok(self.outcomes(stage)?.len())
    }

    /// The outcomes of unanswered requests since a mark.
    pub(crate) fn failures(&self, stage: &Stage, mark: usize) -> Result<Vec<String>> {
        let mut since = self.outcomes(stage)?.split_off(mark);
        since.retain(|one| one != ANSWERED);
        Ok(since)
    }

    /// Waits until this many requests in a row are answered, from now on.
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

/// The seconds since midnight of a time such as `2026-01-02T03:04:05.678Z`.
pub(crate) fn second_of_day(time: &str) -> Option<f64> {
    let (_, clock) = time.split_once('T')?;
    let mut parts = clock.get(..clock.find(['Z', '+'])?)?.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    Some((next()? * 60.0 + next()?) * 60.0 + next()?)
}

/// The outcome of an answered request.
const ANSWERED: &str = "200 0";

pub(crate) fn scaling_loses_no_request(stage: &Stage) -> Result<()> {
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

    scale(1)?;
    eventually_ok(PATIENCE, "one pod alone", || {
        let list = stage.get(&format!("pods -n {APPS} -l app=scaled"))?;
        let left = list["items"].as_array().map_or(0, Vec::len);
        ensure(left == 1, || format!("{left} are left"))
    })?;
    load.goes_on(stage, 20)?;
    let lost = load.failures(stage, start)?;
    ensure(lost.is_empty(), || format!("while it shrank: {lost:?}"))?;

    scale(0)?;
    pods_are_gone(stage, APPS, "app=scaled")?;
    let outcomes = load.outcomes(stage)?;
    let last = outcomes
        .iter()
        .rposition(|one| one == ANSWERED)
        .context("no answer at all")?;
    let lost: Vec<_> = outcomes[start..last]
        .iter()
        .filter(|one| *one != ANSWERED)
        .collect();
    // Requests are sequential, so the end of the last pod can cut only one.
    ensure(lost.len() <= 1, || format!("while it ended: {lost:?}"))?;
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

/// The number of lines of an endless answer so far, and of restarts of the pod that reads it.
fn ticks(stage: &Stage, pod: &str) -> Result<(usize, u64)> {
    let lines = stage
        .kubectl(&format!("logs -n {APPS} {pod}"))?
        .lines()
        .count();
    let state = stage.get(&format!("pod -n {APPS} {pod}"))?;
    let restarts = &state["status"]["containerStatuses"][0]["restartCount"];
    Ok((lines, restarts.as_u64().unwrap_or_default()))
}

pub(crate) fn restart_affects_one_node(stage: &Stage) -> Result<()> {
    let near = Load::start(stage, "load-near", "node1", &who(stage, "web-1")?)?;
    let far = Load::start(stage, "load-far", "node1", &who(stage, "web-2")?)?;
    let url = format!("http://{}/cgi-bin/tick", service_address(stage, "web-1")?);
    let stream = pod_running("stream", "node1", "client", &format!("exec curl -sN {url}"));
    stage.apply(&[stream])?;
    eventually_ok(PATIENCE, "the endless answer", || {
        let (lines, _) = ticks(stage, "stream")?;
        ensure(lines > 0, || "nothing of it".to_owned())
    })?;
    let (mark, mark_far) = (near.mark(stage)?, far.mark(stage)?);

    let before = eventually_ok(PATIENCE, "the daemon of node2", || stage.daemon_on("node2"))?;
    stage.kubectl(&format!("delete pod -n {SYSTEM} {}", name(&before)))?;
    eventually_ok(PATIENCE, "the next daemon of node2", || {
        stage.daemon_on("node2")
    })?;
    far.goes_on(stage, 20)?;
    near.goes_on(stage, 20)?;
    let lost = near.failures(stage, mark)?;
    ensure(lost.is_empty(), || format!("on the other node: {lost:?}"))?;
    let gap = far.longest_gap(stage, mark_far)?;
    println!("    {gap:.1} s without an answer from the node whose daemon was deleted");
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

/// The events of all daemon pods from now on, in the API server's order: each is the pod as it then was.
struct DaemonEvents(Process);

impl DaemonEvents {
    fn start(stage: &Stage) -> Result<Self> {
        let command =
            format!("get pods -n {SYSTEM} -l {DAEMON} --watch --output-watch-events -o json");
        let watch = Self(stage.cluster.start_kubectl(command.split(' '))?);
        eventually_ok(PATIENCE, "the first event", || {
            ensure(!watch.pods().is_empty(), || "none".to_owned())
        })?;
        Ok(watch)
    }

    fn pods(&self) -> Vec<Value> {
        let text = self.0.stdout();
        let events = serde_json::Deserializer::from_str(&text).into_iter::<Value>();
        // The last event may be incomplete.
        let events = events.map_while(std::result::Result::ok);
        events.map(|mut event| event["object"].take()).collect()
    }

    /// Checks that another pod of the same node was ready before `old` was asked to stop.
    fn standby_preceded_stop(&self, old: &Value) -> Result<()> {
        let pods = self.pods();
        let stopping = |pod: &&Value| {
            name(pod) == name(old) && !pod["metadata"]["deletionTimestamp"].is_null()
        };
        let before = pods.iter().take_while(|pod| !stopping(pod));
        let standby = before.into_iter().find(|pod| {
            pod["spec"]["nodeName"] == old["spec"]["nodeName"]
                && name(pod) != name(old)
                && is_ready(pod)
        });
        standby
            .map(drop)
            .with_context(|| format!("{} stopped before its successor was ready", name(old)))
    }
}

fn names(pods: &[Value]) -> Vec<&str> {
    pods.iter().map(name).collect()
}

/// Upgrades to another configuration.
pub(crate) fn upgrade(stage: &Stage) -> Result<()> {
    let options = ["--reuse-values", "--set", "daemon.config.nonTcp=allow"];
    replace_daemons(stage, "upgrade", &options)
}

/// Rolls that upgrade back: to the first revision.
pub(crate) fn rollback(stage: &Stage) -> Result<()> {
    replace_daemons(stage, "rollback", &["1"])
}

/// Runs a command of helm that replaces all daemons, under load, while a connection runs that never ends on its own: waiting
/// for it would take the whole of `drain`.
fn replace_daemons(stage: &Stage, command: &str, options: &[&str]) -> Result<()> {
    let before = stage.pods(SYSTEM, DAEMON)?;
    let load = Load::start(stage, "load-rolling", "node1", &who(stage, "web-2")?)?;
    let url = format!("http://{}/cgi-bin/tick", service_address(stage, "web-2")?);
    let stream = format!("exec curl -sN {url}");
    stage.apply(&[pod_running("stream-rolling", "node1", "client", &stream)])?;
    eventually_ok(PATIENCE, "the endless answer", || {
        let (lines, _) = ticks(stage, "stream-rolling")?;
        ensure(lines > 0, || "nothing of it".to_owned())
    })?;
    let events = DaemonEvents::start(stage)?;
    let start = load.mark(stage)?;
    let capture = stage.cluster.wire().capture()?;
    stage.helm(command, options)?;
    daemons_are_ready(stage)?;
    let after = stage.pods(SYSTEM, DAEMON)?;
    assert_eq!(after.len(), NODES.len());
    for old in &before {
        ensure(!names(&after).contains(&name(old)), || {
            format!("{} has not been replaced", name(old))
        })?;
        eventually_ok(PATIENCE, "the event of its deletion", || {
            let stopped = events.pods().iter().any(|pod| {
                name(pod) == name(old) && !pod["metadata"]["deletionTimestamp"].is_null()
            });
            ensure(stopped, || name(old).to_owned())
        })?;
        events.standby_preceded_stop(old)?;
    }
    for new in &after {
        eventually_ok(PATIENCE, "a daemon that has taken over", || {
            let answer = probed(stage, new)?;
            ensure(answer == "ready\n", || answer.clone())
        })?;
    }
    load.goes_on(stage, 20)?;
    let all = load.mark(stage)? - start;
    let lost = load.failures(stage, start)?.len();
    let gap = load.longest_gap(stage, start)?;
    println!("    {all} requests, {lost} refused; {gap:.2} s without an answer at the longest");
    ensure(gap < DRAIN, || {
        format!("{gap} s: not before all connections had ended")
    })?;
    let recording = capture.stop()?;
    ensure(!recording.contains(MARKER.as_bytes()), || {
        format!("{MARKER} is readable on the wire")
    })?;
    eventually_ok(PATIENCE, "the end of the old daemons", || {
        let list = stage.get(&format!("pods -n {SYSTEM} -l {DAEMON}"))?;
        let left = list["items"].as_array().map_or(0, Vec::len);
        ensure(left == NODES.len(), || format!("{left} pods"))
    })?;
    // The next such command starts them again.
    stage
        .kubectl(&format!(
            "delete pod -n {APPS} stream-rolling load-rolling --now --ignore-not-found"
        ))
        .map(drop)
}

/// The output of a daemon's readiness probe.
fn probed(stage: &Stage, pod: &Value) -> Result<String> {
    stage.kubectl(&format!(
        "exec -n {SYSTEM} {} -- auth-daemon probe ready",
        name(pod)
    ))
}

/// An upgrade to an image that no node can pull (nothing listens on port 1), and its rollback.
pub(crate) fn failed_upgrade(stage: &Stage) -> Result<()> {
    let before = stage.pods(SYSTEM, DAEMON)?;
    let load = Load::start(stage, "load-failed", "node1", &who(stage, "web-2")?)?;
    let start = load.mark(stage)?;
    let options = [
        "--reuse-values",
        "--set",
        "image.repository=127.0.0.1:1/absent",
    ];
    stage.helm("upgrade", &options)?;
    eventually_ok(PATIENCE, "a daemon pod without its image", || {
        let pods = stage.pods(SYSTEM, DAEMON)?;
        let reasons = pods
            .iter()
            .map(|pod| &pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"]);
        let failing = reasons
            .filter_map(Value::as_str)
            .any(|reason| ["ErrImagePull", "ImagePullBackOff"].contains(&reason));
        ensure(failing, || format!("{:?}", names(&pods)))
    })?;
    load.goes_on(stage, 50)?;
    stage.helm("rollback", &[])?;
    daemons_are_ready(stage)?;
    stage.rolled_out(SYSTEM, "deployment/auth-ca")?;
    // The controller may not have deleted the pod without its image yet.
    eventually_ok(PATIENCE, "the daemons from before alone", || {
        let after = stage.pods(SYSTEM, DAEMON)?;
        ensure(names(&after) == names(&before), || {
            format!("{:?} became {:?}", names(&before), names(&after))
        })
    })?;
    let lost = load.failures(stage, start)?;
    ensure(lost.is_empty(), || format!("{lost:?}"))?;
    load.end(stage)
}

/// `drain` of the daemons' configuration, in seconds.
const DRAIN: f64 = 20.0;
