//! Steps about outages of the CA and of the API server.

use std::thread;
use std::time::Duration;

use mesh_tests::{Result, eventually_ok};
use serde_json::Value;

use crate::load::Load;
use crate::stage::{
    APPS, CA, PATIENCE, SYSTEM, Stage, account, address, ensure, idle_pod, name, pods_are_gone,
};
use crate::traffic::{log_has_tunnel, server, who};

pub(crate) fn without_the_ca(stage: &Stage) -> Result<()> {
    let url = who(stage, "web-2")?;
    let load = Load::start(stage, "load-no-ca", "node1", &url)?;
    let start = load.mark(stage)?;
    let replicas = stage.pods(SYSTEM, CA)?;
    stage.kubectl(&format!(
        "scale -n {SYSTEM} deployment/auth-ca --replicas=0"
    ))?;
    // Killed before the controller knows that none is wanted, a pod would be replaced.
    eventually_ok(PATIENCE, "the deletion of the CA's pods", || {
        let living = stage.pods(SYSTEM, CA)?;
        ensure(living.is_empty(), || format!("{} live", living.len()))
    })?;
    stage.kubectl(&format!(
        "delete pods -n {SYSTEM} -l {CA} --grace-period=0 --force"
    ))?;
    pods_are_gone(stage, SYSTEM, CA)?;
    // The API no longer has the pods; their processes run until the kubelets learn of it.
    for replica in &replicas {
        eventually_ok(PATIENCE, "the exit of the CA", || {
            ensure(stage.process(replica, "container").is_err(), || {
                format!("{} still runs", name(replica))
            })
        })?;
    }
    // A pod that starts meanwhile has no certificate, and gets no answer.
    stage.apply(&[account("late"), idle_pod("late", "node1", "late")])?;
    stage.becomes("pod/late", "Ready")?;
    ensure(stage.curl("late", &url).is_err(), || {
        "answered without a certificate".to_owned()
    })?;
    load.goes_on(stage, 50)?;
    let lost = load.failures(stage, start)?;
    ensure(lost.is_empty(), || format!("without the CA: {lost:?}"))?;

    stage.kubectl(&format!(
        "scale -n {SYSTEM} deployment/auth-ca --replicas=2"
    ))?;
    stage.rolled_out(SYSTEM, "deployment/auth-ca")?;
    eventually_ok(PATIENCE, "a certificate", || stage.curl("late", &url))?;
    log_has_tunnel(stage, "node2", "late", "web-2", None)?;
    let lost = load.failures(stage, start)?;
    ensure(lost.is_empty(), || format!("as the CA came back: {lost:?}"))?;
    stage.kubectl(&format!(
        "delete -n {APPS} pod/late serviceaccount/late --now --wait=false"
    ))?;
    load.end(stage)
}

/// Kills all processes of one of a pod's containers or of its sandbox, bypassing kubelet and API.
fn kill(stage: &Stage, pod: &Value, kind: &str) -> Result<()> {
    let (node, container) = stage.container(pod, kind)?;
    let kill = [
        "-n", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", &container,
    ];
    node.run("ctr", kill)?.ok().map(drop)
}

pub(crate) fn without_the_api_server(stage: &Stage) -> Result<()> {
    stage.apply(&server("moved", Some("node2"), 1))?;
    stage.rolled_out(APPS, "deployment/moved")?;
    let before = stage.pod(APPS, "app=moved")?;
    let restarted = stage.pod(APPS, "app=web-1")?;
    let (moved, web_1) = (who(stage, "moved")?, who(stage, "web-1")?);
    // The client's daemon may not know the new service yet.
    eventually_ok(PATIENCE, "an answer", || stage.curl("client-1", &moved))?;
    let load = Load::start(stage, "load-no-api", "node1", &who(stage, "web-2")?)?;
    let start = load.mark(stage)?;

    stage.cluster.api().stop_server()?;
    // The kubelet restarts one pod with a new address, which the API server does not learn, and one container.
    kill(stage, &before, "sandbox")?;
    kill(stage, &restarted, "container")?;
    // The step is about the length of the outage, so there is nothing else to wait for.
    thread::sleep(Duration::from_secs(60));
    stage.cluster.api().start_server()?;
    // After such an outage they have lost their lease and exited, where they use one.
    stage.cluster.restart_controllers()?;

    let after = eventually_ok(PATIENCE, "the pod's new address", || {
        let after = stage.pod(APPS, "app=moved")?;
        ensure(address(&after) != address(&before), || {
            address(&after).to_owned()
        })?;
        Ok(after)
    })?;
    stage.rolled_out(APPS, "deployment/moved")?;
    assert_eq!(name(&after), name(&before));
    eventually_ok(PATIENCE, "the pod at its new address", || {
        stage.curl("client-1", &moved)
    })?;
    let endpoint = format!("{}:", address(&after));
    log_has_tunnel(stage, "node2", "client", "moved", Some(&endpoint))?;
    eventually_ok(PATIENCE, "the app that was restarted", || {
        stage.curl("client-2", &web_1)
    })?;
    log_has_tunnel(stage, "node1", "client", "web-1", None)?;

    load.goes_on(stage, 20)?;
    let (all, lost) = (load.mark(stage)? - start, load.failures(stage, start)?);
    ensure(lost.is_empty(), || format!("of {all}: {lost:?}"))?;
    println!("    {all} requests, none lost");
    load.end(stage)?;
    stage
        .kubectl(&format!(
            "delete -n {APPS} deployment/moved service/moved serviceaccount/moved"
        ))
        .map(drop)
}
