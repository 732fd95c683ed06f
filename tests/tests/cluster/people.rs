//! The step about a person outside the cluster who reaches a service of the mesh.

use mesh_tests::{Process, Result, auth_daemon, eventually_ok};
use serde_json::json;

use crate::stage::{APPS, PATIENCE, SYSTEM, Stage, account, ensure, role};
use crate::traffic::access;

/// The service account by whose kubeconfig the person reaches the API server.
const PERSON: &str = "alice";
/// The service account that the person acts as.
const ACTS_AS: &str = "support";

/// With the rights that docs/CONNECT.md lists, and no route to pods or to the CA: everything goes through the API server.
pub(crate) fn connects_through_the_api_server(stage: &Stage) -> Result<()> {
    let forward =
        json!({"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["get", "create"]});
    let rules = json!([
        {"apiGroups": [""], "resources": ["serviceaccounts/token"], "resourceNames": [ACTS_AS], "verbs": ["create"]},
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["auth-ca-root"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["services", "pods"], "verbs": ["get", "list"]},
        forward,
    ]);
    let at_the_ca = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}, forward]);
    let signing = "certificatesigningrequests";
    let posts = json!([{"apiGroups": ["certificates.k8s.io"], "resources": [signing], "verbs": ["create"]}]);
    let roles = [
        role(Some(APPS), PERSON, &rules),
        role(Some(SYSTEM), PERSON, &at_the_ca),
        role(None, PERSON, &posts),
    ];
    stage.apply(&[&[account(PERSON), account(ACTS_AS)], roles.as_flattened()].concat())?;

    let kubeconfig = stage.cluster.api().kubeconfig_of(APPS, PERSON)?;
    let connect = || {
        let mut command = stage.cluster.mesh().outside().command(auth_daemon()?)?;
        command
            .args(["connect", &format!("{APPS}/web-2:80")])
            .args(["--as", &format!("{APPS}/{ACTS_AS}")])
            .args(["--port-forward", "always", "--kubeconfig"])
            .arg(&kubeconfig)
            .args(["--", "sh", "-c"])
            .arg("curl -sSf http://$AUTH_DAEMON_ADDRESS/cgi-bin/who");
        Process::spawn(command)?.finish(PATIENCE)?.ok()
    };
    // Rights take effect a moment after they are granted.
    let connected = eventually_ok(PATIENCE, "an answer", connect)?;
    println!("{}{}", connected.stdout, connected.stderr);
    let person = format!("kubernetes:system:serviceaccount:{APPS}:{PERSON}");
    let identity = format!("/ns/{APPS}/sa/{ACTS_AS}");
    eventually_ok(PATIENCE, "the person in the server's log", || {
        let log = stage.daemon_log("node2")?;
        let found = access(&log).any(|line| {
            let client = line["client_identity"].as_str().unwrap_or_default();
            line["client_person"] == person && client.ends_with(&identity)
        });
        ensure(found, || "no such connection".to_owned())
    })
}
