//! Steps about the CA alone.

use mesh_tests::{Context, Result, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{CA, PATIENCE, SYSTEM, Stage, address, ensure, name};

/// The leading pod: the only one with the leader's label, and the service's only endpoint.
fn leader(stage: &Stage) -> Result<Value> {
    let leader = stage.pod(SYSTEM, &format!("{CA},auth-daemon.io/ca-leader=true"))?;
    let slices = stage.get(&format!(
        "endpointslices -n {SYSTEM} -l kubernetes.io/service-name=auth-ca"
    ))?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let addresses: Vec<Value> = list(&slices["items"])
        .iter()
        .flat_map(|slice| list(&slice["endpoints"]))
        .flat_map(|endpoint| list(&endpoint["addresses"]))
        .collect();
    ensure(addresses == [address(&leader)], || {
        format!("{} leads, but the service has {addresses:?}", name(&leader))
    })?;
    Ok(leader)
}

/// The operator's view of a CA pod: `auth-daemon ca status --json`.
fn status(stage: &Stage, pod: &Value) -> Result<Value> {
    let stdout = stage.kubectl(&format!(
        "exec -n {SYSTEM} {} -- auth-daemon ca status --json",
        name(pod)
    ))?;
    serde_json::from_str(&stdout).context("the CA's status")
}

fn root(stage: &Stage, pod: &Value) -> Result<String> {
    let status = status(stage, pod)?;
    let root = status["roots"][0]["sha256"].as_str();
    Ok(root
        .with_context(|| format!("no root: {status}"))?
        .to_owned())
}

pub(crate) fn one_leads(stage: &Stage) -> Result<()> {
    stage.rolled_out(SYSTEM, "deployment/auth-ca")?;
    let pods = stage.pods(SYSTEM, CA)?;
    assert_eq!(pods.len(), 2);
    // On a slow machine, a leader may lose its lease meanwhile.
    eventually_ok(PATIENCE, "the same leader by label and by status", || {
        let leader = leader(stage)?;
        pods.iter().try_for_each(|pod| {
            let status = status(stage, pod)?;
            let is_expected = (status["leader"] == true) == (name(pod) == name(&leader));
            ensure(is_expected, || format!("{}: {status}", name(pod)))
        })
    })?;
    let budget = stage.get(&format!("poddisruptionbudget -n {SYSTEM} auth-ca"))?;
    eventually_ok(PATIENCE, "one allowed disruption", || {
        let budget = stage.get(&format!("poddisruptionbudget -n {SYSTEM} auth-ca"))?;
        ensure(budget["status"]["disruptionsAllowed"] == 1, || {
            budget.to_string()
        })
    })
    .with_context(|| budget.to_string())
}

pub(crate) fn roots_are_everywhere(stage: &Stage) -> Result<()> {
    for namespace in ["default", "kube-system", SYSTEM, crate::stage::APPS] {
        eventually_ok(PATIENCE, "the roots", || {
            let map = stage.get(&format!("configmap -n {namespace} auth-ca-root"))?;
            let roots = map["data"]["root-cert.pem"].as_str().unwrap_or_default();
            ensure(roots.contains("BEGIN CERTIFICATE"), || map.to_string())
        })?;
    }
    Ok(())
}

/// The CA reverts what others write into the ConfigMap with the roots.
pub(crate) fn roots_are_restored(stage: &Stage) -> Result<()> {
    let change = json!({"data": {"root-cert.pem": "none"}}).to_string();
    let patch = [
        "patch",
        "configmap",
        "-n",
        crate::stage::APPS,
        "auth-ca-root",
        "-p",
        &change,
    ];
    stage.cluster.kubectl(patch)?.ok()?;
    roots_are_everywhere(stage)
}

/// A revocation is in the CA's Secret.
pub(crate) fn revocation_is_stored(stage: &Stage) -> Result<()> {
    let revision = || {
        let secret = stage.get(&format!("secret -n {SYSTEM} auth-daemon-ca"))?;
        Ok::<_, mesh_tests::Error>(secret["metadata"]["resourceVersion"].clone())
    };
    let before = revision()?;
    // On a slow machine, the leader may lose its lease in between.
    eventually_ok(PATIENCE, "a leader that does both", || {
        let leader = leader(stage)?;
        ["revoke", "unrevoke"].into_iter().try_for_each(|command| {
            let command = format!("auth-daemon ca {command} --node gone");
            let exec = format!("exec -n {SYSTEM} {} -- {command}", name(&leader));
            stage.kubectl(&exec).map(drop)
        })
    })?;
    ensure(revision()? != before, || {
        "the Secret has not changed".to_owned()
    })
}

pub(crate) fn the_leader_is_replaced(stage: &Stage) -> Result<()> {
    let leader_and_root = || {
        let leader = leader(stage)?;
        let root = root(stage, &leader)?;
        Ok::<_, mesh_tests::Error>((leader, root))
    };
    let (before, root_before) = eventually_ok(PATIENCE, "a leader", leader_and_root)?;
    stage.kubectl(&format!(
        "delete pod -n {SYSTEM} {} --grace-period=0 --force",
        name(&before)
    ))?;
    let root_after = eventually_ok(PATIENCE, "another leader", || {
        let (after, root_after) = leader_and_root()?;
        ensure(name(&after) != name(&before), || "not yet".to_owned())?;
        Ok(root_after)
    })?;
    assert_eq!(root_after, root_before);
    stage.rolled_out(SYSTEM, "deployment/auth-ca")
}
