//! The chart on a real cluster of two nodes whose only control plane is istiod: its certificates, its view of the mesh and its
//! policies.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use mesh_tests::cluster::apps::{MARKER, PORT, account, idle_pod, server};
use mesh_tests::cluster::meshed::{APPS, MeshedCluster, PATIENCE, SYSTEM};
use mesh_tests::{Cluster, Context, Error, Istiod, ProxyMode, Result, eventually_ok};
use serde_json::{Value, json};

const NODES: [&str; 2] = ["node1", "node2"];

/// A cluster with istiod.
struct Stage {
    // First: it runs beside the cluster's API server.
    istiod: Istiod,
    meshed: MeshedCluster,
    /// The chart's values.
    values: PathBuf,
}

type Step = fn(&mut Stage) -> Result<()>;

/// All steps, in order.
const STEPS: &[(&str, Step)] = &[
    (
        "istio-certificates: daemons serve with istiod's",
        daemons_serve,
    ),
    (
        "istio-traffic: pods of both nodes reach services",
        pods_talk,
    ),
    ("istio-redirection: pods are announced", pods_are_announced),
    (
        "istio-policy: istiod's policies are enforced",
        policies_are_enforced,
    ),
    (
        "istio-service-entry: a service of Istio's own leads to pods",
        service_entry_is_reached,
    ),
    (
        "istio-opt-out: a pod's label takes it out of the mesh, and back in",
        pod_opts_out,
    ),
    (
        "istio-outage: traffic continues without istiod",
        without_istiod,
    ),
    (
        "istio-on-demand: daemons ask for what their pods dial",
        names_on_demand,
    ),
];

#[test]
fn mesh_whose_only_control_plane_is_istiod() -> Result<()> {
    if let Some(why) = Cluster::missing().or_else(Istiod::missing) {
        println!("SKIPPED mesh_whose_only_control_plane_is_istiod: {why}");
        return Ok(());
    }
    let mut stage = set()?;
    for (name, step) in STEPS {
        let start = Instant::now();
        let done = step(&mut stage);
        let elapsed = start.elapsed();
        if let Err(error) = &done {
            println!("{name}: FAILED after {elapsed:.1?}: {error:#}");
            stage.meshed.cluster.print_state();
            stage.meshed.print_logs();
            println!("{}", stage.istiod.log());
        }
        done.with_context(|| format!("step {name}, after {elapsed:.1?}"))?;
        println!("{name}: {elapsed:.1?}");
    }
    Ok(())
}

/// Starts the cluster and istiod, and installs the chart without its CA.
fn set() -> Result<Stage> {
    let meshed = MeshedCluster::start(&NODES, ProxyMode::default())?;
    let trusted = format!("{SYSTEM}/auth-daemon");
    let istiod = Istiod::start(meshed.cluster.api(), &trusted)?;
    let roots = istiod.root_file(meshed.cluster.api(), SYSTEM)?;
    meshed.kubectl(&format!(
        "label namespace {APPS} istio.io/dataplane-mode=ambient"
    ))?;
    let (address, name) = (istiod.address().to_string(), Istiod::SERVER_NAME);
    let values = json!({
        "mode": "PERMISSIVE",
        "istio": {"enabled": true, "address": address},
        "ca": {
            "enabled": false, "address": address, "audience": Istiod::AUDIENCE,
            "rootConfigMap": "istio-ca-root-cert",
        },
        // The cluster has no DNS, so istiod is at an address that is not in its certificate.
        "daemon": {"config": {
            "ca": {"address": address, "serverName": name},
            "discovery": {"istiod": {"serverName": name}},
        }},
    });
    let file = roots.with_file_name("istio-values.json");
    fs::write(&file, values.to_string())?;
    meshed.install(&["--values", &file.display().to_string()])?;
    Ok(Stage {
        istiod,
        meshed,
        values: file,
    })
}

fn daemons_serve(stage: &mut Stage) -> Result<()> {
    stage.meshed.rolled_out(SYSTEM, "daemonset/auth-daemon")?;
    for node in NODES {
        eventually_ok(PATIENCE, "a ready daemon", || stage.meshed.daemon_on(node))?;
    }
    Ok(())
}

/// The URL of a service.
fn who(stage: &Stage, name: &str) -> Result<String> {
    let service = stage.meshed.get(&format!("service -n {APPS} {name}"))?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("no address")?;
    Ok(format!("http://{address}/cgi-bin/who"))
}

/// Fails unless `client` gets an answer of `web`.
fn answers(stage: &Stage, client: &str, web: &str) -> Result<()> {
    answers_at(stage, client, &who(stage, web)?, web)
}

/// Fails unless `client` gets an answer of `web` from this URL.
fn answers_at(stage: &Stage, client: &str, url: &str, web: &str) -> Result<()> {
    let answer = stage.meshed.curl(client, url)?;
    let expected = answer.contains(MARKER) && answer.contains(web);
    expected
        .then_some(())
        .with_context(|| format!("{client} to {web}: {answer:?}"))
}

/// Waits until `client` gets no answer of `web` any more.
fn is_refused(stage: &Stage, client: &str, web: &str) -> Result<()> {
    eventually_ok(PATIENCE, "a refusal", || {
        match answers(stage, client, web) {
            Err(_) => Ok(()),
            Ok(()) => Err(Error::msg(format!("{web} answers"))),
        }
    })
}

/// Waits until the access log of a node has a line that says what `wanted` says.
fn log_has(stage: &Stage, node: &str, wanted: &[(&str, &str)]) -> Result<()> {
    log_has_after(stage, node, wanted, || Ok(()))
}

/// Calls `connect` until the access log of a node has a line that says what `wanted` says. What arrives in parts, or after
/// other things, decides only about later connections.
fn log_has_after(
    stage: &Stage,
    node: &str,
    wanted: &[(&str, &str)],
    connect: impl Fn() -> Result<()>,
) -> Result<()> {
    eventually_ok(PATIENCE, "a line of the access log", || {
        connect()?;
        let found = count(stage, node, wanted)? > 0;
        found
            .then_some(())
            .with_context(|| format!("{node} has no line of {wanted:?}"))
    })
}

/// Counts the lines of a node's access log that say what `wanted` says.
fn count(stage: &Stage, node: &str, wanted: &[(&str, &str)]) -> Result<usize> {
    let log = stage.meshed.daemon_log(node)?;
    let lines = log.lines();
    let lines = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let lines = lines.filter(|line| line["target"] == "access");
    let says = |line: &Value| wanted.iter().all(|(field, value)| line[field] == *value);
    Ok(lines.filter(says).count())
}

fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/{APPS}/sa/{account}")
}

/// Starts a client on the first node and a server on each, and lets them talk.
fn pods_talk(stage: &mut Stage) -> Result<()> {
    let mut objects = vec![account("client"), idle_pod("client-1", "node1", "client")];
    for (node, web) in NODES.into_iter().zip(["web-1", "web-2"]) {
        objects.extend(server(web, Some(node), 1));
    }
    stage.meshed.apply(&objects)?;
    for web in ["web-1", "web-2"] {
        stage
            .meshed
            .rolled_out(APPS, &format!("deployment/{web}"))?;
    }
    stage.meshed.kubectl(&format!(
        "wait -n {APPS} pod client-1 --for=condition=Ready --timeout={}s",
        PATIENCE.as_secs()
    ))?;
    for web in ["web-1", "web-2"] {
        eventually_ok(PATIENCE, "an answer", || answers(stage, "client-1", web))?;
    }
    let (client, web) = (identity("client"), identity("web-2"));
    // Both nodes have a daemon of this kind, so HBONE is not needed between them.
    let line = [
        ("path", "tunnel"),
        ("client_identity", client.as_str()),
        ("server_identity", web.as_str()),
    ];
    NODES.into_iter().try_for_each(|node| {
        log_has_after(stage, node, &line, || answers(stage, "client-1", "web-2"))
    })
}

fn pods_are_announced(stage: &mut Stage) -> Result<()> {
    let labels = ["app=web-1", "app=web-2", "app=client-1"];
    labels
        .into_iter()
        .try_for_each(|label| is_announced(stage, label, true))
}

/// Waits until a pod has the annotation by which its peers choose HBONE, or has lost it.
fn is_announced(stage: &Stage, label: &str, announced: bool) -> Result<()> {
    eventually_ok(PATIENCE, "the annotation of a pod", || {
        let pod = stage.meshed.pod(APPS, label)?;
        let found = &pod["metadata"]["annotations"]["ambient.istio.io/redirection"];
        ((found == "enabled") == announced)
            .then_some(())
            .with_context(|| format!("{label}: {found}"))
    })
}

/// An address that only a ServiceEntry gives to a service.
const ENTRY: &str = "10.200.0.1";

fn service_entry_is_reached(stage: &mut Stage) -> Result<()> {
    stage.meshed.apply(&[json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": {"name": "entry", "namespace": APPS},
        "spec": {
            "hosts": ["entry.example.com"], "addresses": [ENTRY], "location": "MESH_INTERNAL",
            "resolution": "STATIC", "workloadSelector": {"labels": {"app": "web-2"}},
            "ports": [{"number": 80, "name": "tcp", "protocol": "TCP", "targetPort": PORT}],
        },
    })])?;
    entry_is_reached(stage)
}

/// Waits until a connection to the ServiceEntry reaches its pod by mutual TLS.
fn entry_is_reached(stage: &Stage) -> Result<()> {
    let url = format!("http://{ENTRY}/cgi-bin/who");
    let (destination, web) = (format!("{ENTRY}:80"), identity("web-2"));
    let line = [
        ("path", "tunnel"),
        ("destination", destination.as_str()),
        ("server_identity", web.as_str()),
    ];
    log_has_after(stage, "node1", &line, || {
        answers_at(stage, "client-1", &url, "web-2")
    })
}

fn pod_opts_out(stage: &mut Stage) -> Result<()> {
    let label = |value: &str| {
        let command = format!("label pod -n {APPS} -l app=web-2 istio.io/dataplane-mode{value}");
        stage.meshed.kubectl(&command).map(drop)
    };
    label("=none")?;
    is_announced(stage, "app=web-2", false)?;
    // Nobody logs a connection that the kernel carries in plaintext.
    let web = identity("web-2");
    let tunnelled = || count(stage, "node2", &[("server_identity", web.as_str())]);
    eventually_ok(PATIENCE, "an answer in plaintext", || {
        let before = tunnelled()?;
        answers(stage, "client-1", "web-2")?;
        (tunnelled()? == before)
            .then_some(())
            .context("it is tunnelled")
    })?;
    label("-")?;
    is_announced(stage, "app=web-2", true)?;
    eventually_ok(PATIENCE, "a tunnelled answer", || {
        let before = tunnelled()?;
        answers(stage, "client-1", "web-2")?;
        (tunnelled()? > before)
            .then_some(())
            .context("it is not tunnelled")
    })
}

/// Lets the daemons subscribe only to what is asked for, and repeats what matters.
fn names_on_demand(stage: &mut Stage) -> Result<()> {
    let values = stage.values.display().to_string();
    let options = [
        "--reuse-values",
        "--values",
        values.as_str(),
        "--set",
        "daemon.config.discovery.istiod.subscribe=onDemand",
    ];
    stage.meshed.helm("upgrade", &options)?;
    daemons_serve(stage)?;
    // A connection is refused if istiod takes more than five seconds to say what is dialled.
    for web in ["web-1", "web-2"] {
        eventually_ok(PATIENCE, "an answer", || answers(stage, "client-1", web))?;
    }
    entry_is_reached(stage)?;
    policies_are_enforced(stage)?;
    // Nothing has this address: it is outside the mesh, and nothing listens there.
    let outside = "198.51.100.9:80";
    let unreachable = stage.meshed.curl("client-1", &format!("http://{outside}"));
    (unreachable.is_err()).then_some(()).context("an answer")?;
    log_has(
        stage,
        "node1",
        &[("path", "plaintext"), ("destination", outside)],
    )?;
    // Known names continue to work without istiod; connections that would need an answer from it are refused.
    stage.istiod.stop()?;
    answers(stage, "client-1", "web-2")?;
    let unknown = "198.51.100.10:80";
    let refused = stage.meshed.curl("client-1", &format!("http://{unknown}"));
    (refused.is_err()).then_some(()).context("an answer")?;
    log_has(
        stage,
        "node1",
        &[("result", "refused"), ("destination", unknown)],
    )?;
    stage.istiod.run(stage.meshed.cluster.api())
}

/// A policy of Istio that denies `client` at the servers of `web`.
fn denial(web: &str) -> Value {
    let principal = identity("client").replace("spiffe://", "");
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": format!("no-clients-{web}"), "namespace": APPS},
        "spec": {
            "action": "DENY", "selector": {"matchLabels": {"app": web}},
            "rules": [{"from": [{"source": {"principals": [principal]}}]}],
        },
    })
}

/// Applies the policy, and waits until the server's node denies a connection by it.
fn deny(stage: &Stage, node: &str, web: &str) -> Result<()> {
    let policy = format!("denied by AuthorizationPolicy {APPS}/no-clients-{web} rules[0]");
    let line = [
        ("direction", "inbound"),
        ("result", "refused"),
        ("policy", policy.as_str()),
    ];
    let before = count(stage, node, &line)?;
    stage.meshed.apply(&[denial(web)])?;
    // A connection that is open when the policy comes into force is ended, not denied: try until one is denied.
    eventually_ok(PATIENCE, "a denial", || {
        is_refused(stage, "client-1", web)?;
        let denied = count(stage, node, &line)? > before;
        denied
            .then_some(())
            .with_context(|| format!("{node} has no new line of {line:?}"))
    })
}

fn policies_are_enforced(stage: &mut Stage) -> Result<()> {
    for (node, web) in NODES.into_iter().zip(["web-1", "web-2"]) {
        deny(stage, node, web)?;
        stage.meshed.kubectl(&format!(
            "delete authorizationpolicy -n {APPS} no-clients-{web}"
        ))?;
        eventually_ok(PATIENCE, "an answer", || answers(stage, "client-1", web))?;
    }
    Ok(())
}

fn without_istiod(stage: &mut Stage) -> Result<()> {
    deny(stage, "node1", "web-1")?;
    stage.istiod.stop()?;
    for _ in 0..5 {
        answers(stage, "client-1", "web-2")?;
        let refused = answers(stage, "client-1", "web-1").is_err();
        refused.then_some(()).context("the policy is forgotten")?;
    }
    stage.meshed.kubectl(&format!(
        "delete authorizationpolicy -n {APPS} no-clients-web-1"
    ))?;
    stage.istiod.run(stage.meshed.cluster.api())?;
    eventually_ok(PATIENCE, "an answer", || {
        answers(stage, "client-1", "web-1")
    })
}
