//! Steps about what a user sees of the cluster from a machine outside it, through the API server alone.

use mesh_tests::{Context, Finished, Process, Result, auth_daemon, eventually_ok};
use serde_json::{Value, json};

use crate::stage::{APPS, PATIENCE, SYSTEM, Stage, account, ensure};
use crate::traffic::who;

/// Runs a command of the daemon's program outside the cluster, with the API server's credentials of an administrator.
fn auth(stage: &Stage, words: &str, kubeconfig: &std::path::Path) -> Result<Finished> {
    let outside = stage.cluster.mesh().outside();
    let mut command = outside.command(auth_daemon()?)?;
    command.args(words.split_whitespace());
    command.arg("--kubeconfig").arg(kubeconfig);
    Process::spawn(command)?.finish(PATIENCE)
}

/// The status and the connections of all nodes, merged; and not without the right to forward ports.
pub(crate) fn through_the_api_server(stage: &Stage) -> Result<()> {
    let administrator = stage.cluster.api().kubeconfig();
    let status = auth(stage, "status --json", &administrator)?;
    let cluster: Value = serde_json::from_str(&status.stdout)
        .with_context(|| format!("{}{}", status.stdout, status.stderr))?;
    let names: Vec<_> = (cluster["nodes"].as_array().into_iter().flatten())
        .map(|node| node["node"].as_str().unwrap_or_default())
        .collect();
    let expected: Vec<_> = (stage.cluster.nodes().iter())
        .map(|node| node.name())
        .collect();
    ensure(names == expected, || format!("{names:?}: {cluster}"))?;
    println!("{}", auth(stage, "status", &administrator)?.stdout);

    stage.curl("client-1", &who(stage, "web-2")?)?;
    let both = eventually_ok(PATIENCE, "connections seen by both nodes", || {
        let words = format!("observe --from {APPS} --to {APPS} --verdict allowed");
        let flows = auth(stage, &words, &administrator)?.ok()?.json_lines();
        let seen = |node: &str| flows.iter().any(|flow| flow["node"] == node);
        ensure(expected.iter().all(|node| seen(node)), || {
            format!("{flows:?}")
        })?;
        Ok(flows)
    })?;
    let times: Vec<_> = both.iter().map(|flow| flow["time"].as_str()).collect();
    ensure(times.is_sorted(), || format!("{times:?}"))?;

    // Who may list the daemons' pods but not forward their ports learns why nothing is shown.
    let subject = json!([{"kind": "ServiceAccount", "name": "viewer", "namespace": APPS}]);
    let metadata = json!({"name": "viewer", "namespace": SYSTEM});
    let role = |rules: Value| json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": metadata, "rules": rules});
    let list = json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]});
    let forward =
        json!({"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]});
    stage.apply(&[
        account("viewer"),
        role(json!([list])),
        json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": metadata,
            "subjects": subject,
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "viewer"},
        }),
    ])?;
    let viewer = stage.cluster.api().kubeconfig_of(APPS, "viewer")?;
    let refused = auth(stage, "status", &viewer)?;
    ensure(
        refused.code() == Some(2) && refused.stderr.contains("pods/portforward"),
        || format!("{refused:?}"),
    )?;
    stage.apply(&[role(json!([list, forward]))])?;
    eventually_ok(PATIENCE, "the right to forward ports", || {
        let node = format!("status --json --node {}", expected[0]);
        let shown = auth(stage, &node, &viewer)?;
        let status: Value = serde_json::from_str(&shown.stdout).context(shown.stderr)?;
        ensure(status["node"] == expected[0], || status.to_string())
    })
}
