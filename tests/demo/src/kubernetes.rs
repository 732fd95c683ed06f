//! `cargo xtask demo --kubernetes`: the Helm chart on a real Kubernetes cluster of two nodes on this machine.

mod flap;

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use mesh_tests::cluster::apps::{MARKER, account, idle_pod, pod_running, server};
use mesh_tests::cluster::meshed::{
    APPS, DAEMON, MeshedCluster, PATIENCE, SYSTEM, address, is_ready, name,
};
use mesh_tests::{Cluster, ProxyMode, eventually_ok, programs_folder};
use serde_json::{Value, json};
use xtask_support::supervise::interrupts;

use super::evidence::Evidence;
use super::report::Report;
use super::{Arguments, conclude, nothing_left, prepare, show, step, wire};

/// A check, with the cluster that those before it have left.
struct Check {
    name: &'static str,
    /// The claim, in a few words.
    claim: &'static str,
    run: fn(&MeshedCluster, &Evidence) -> Result<()>,
}

const CHECKS: [Check; 7] = [
    Check {
        name: "plaintext-before",
        claim: "without the chart, what pods of two nodes send each other is readable between the nodes",
        run: plaintext_before,
    },
    Check {
        name: "helm-install",
        claim: "helm installs the chart: a CA, and a daemon on each node",
        run: helm_install,
    },
    Check {
        name: "mtls-on-wire",
        claim: "the same pods, which have not restarted, now communicate in TLS 1.3",
        run: mtls_on_wire,
    },
    Check {
        name: "strict-refuses-plaintext",
        claim: "in STRICT mode, pods of the mesh refuse a pod outside the mesh",
        run: outsider_is_refused,
    },
    Check {
        name: "policy-deny",
        claim: "an AuthorizationPolicy denies a service account, and the log says so",
        run: policy_deny,
    },
    Check {
        name: "flap",
        claim: "while the server's daemon is not ready, its pods are not dialled in plaintext, although they would take it",
        run: flap::flap,
    },
    Check {
        name: "helm-upgrade",
        claim: "an upgrade replaces all daemons while pods communicate, and nothing falls back to plaintext",
        run: helm_upgrade,
    },
];

/// Builds a cluster's programs where they are missing, and runs the checks on a cluster.
///
/// # Errors
/// If no cluster can run here: the error says what is missing. If a check fails.
pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let names = CHECKS.iter().map(|check| check.name).collect();
    let mut report = Report::new(arguments.json, names);
    let keep = arguments.keep;
    let (sender, kept) = mpsc::channel();
    let shown = prepare(arguments)
        .and_then(|()| programs(arguments))
        .and_then(|()| {
            show(&mut report, move |evidence, stop| {
                if let Some(cluster) = perform(evidence, stop, keep) {
                    let _ = sender.send(cluster);
                }
            })
        });
    let standing = kept.try_recv().ok();
    conclude(report, shown)?;
    match standing {
        Some(cluster) => stand(cluster),
        None => Ok(()),
    }
}

/// Installs and builds the programs of a cluster.
fn programs(arguments: &Arguments) -> Result<()> {
    if !arguments.no_build {
        xtask_support::kubernetes::ensure()?;
    }
    match Cluster::missing() {
        Some(why) => bail!("no cluster can run here: {why}"),
        None => Ok(()),
    }
}

/// Runs the checks on a cluster. Returns the cluster if it is to be kept.
fn perform(evidence: &Evidence, stop: &AtomicBool, keep: bool) -> Option<MeshedCluster> {
    let claim = "a Kubernetes cluster: API server, etcd, controllers, and two nodes with containerd and kubelet";
    let cluster = step(evidence, None, claim, || start(evidence))?;
    for check in &CHECKS {
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        let passed = step(evidence, Some(check.name), check.claim, || {
            let result = (check.run)(&cluster, evidence);
            if result.is_err() && !stop.load(Ordering::Relaxed) {
                cluster.cluster.print_state();
            }
            result
        });
        // Each check builds on those before it.
        if passed.is_none() {
            break;
        }
    }
    if keep {
        return Some(cluster);
    }
    step(evidence, None, "cleaning up", || {
        let id = cluster.cluster.mesh().id();
        drop(cluster);
        nothing_left(id)
    });
    None
}

/// Says how to use the cluster, and removes it after Ctrl-C.
fn stand(cluster: MeshedCluster) -> Result<()> {
    let interrupted = interrupts()?;
    let netns = cluster.cluster.mesh().outside().netns().name().to_owned();
    let kubeconfig = cluster.cluster.api().kubeconfig();
    println!(
        "\nThe cluster is left standing. Its API server is in a network namespace, so use it like this, as root:\n\n  \
         export KUBECONFIG={}\n  export PATH={}:$PATH\n  \
         ip netns exec {netns} kubectl get pods --all-namespaces -o wide\n  \
         ip netns exec {netns} kubectl exec -n {APPS} {CLIENT} -- curl -s http://$(ip netns exec {netns} \
         kubectl get service -n {APPS} {WEB} -o 'jsonpath={{.spec.clusterIP}}')/cgi-bin/who\n  \
         ip netns exec {netns} kubectl exec -n {SYSTEM} daemonset/auth-daemon -- auth-daemon status\n\n\
         To remove it, press Ctrl-C here or `kill {}`.",
        kubeconfig.display(),
        programs_folder().display(),
        std::process::id(),
    );
    while !interrupted.load(Ordering::Relaxed) {
        thread::sleep(POLL);
    }
    eprintln!("removing the cluster");
    let id = cluster.cluster.mesh().id();
    drop(cluster);
    nothing_left(id)
}

fn start(evidence: &Evidence) -> Result<MeshedCluster> {
    let cluster = MeshedCluster::start(&NODES, ProxyMode::default())?;
    see(evidence, &cluster, "get nodes -o wide")?;
    let mut objects = vec![account("client"), idle_pod(CLIENT, NODES[0], "client")];
    objects.extend(server(WEB, Some(NODES[1]), 1));
    cluster.apply(&objects)?;
    cluster.rolled_out(APPS, &format!("deployment/{WEB}"))?;
    ready(&cluster, CLIENT)?;
    // kube-proxy needs a moment, too.
    answered(&cluster)?;
    evidence.saw(format!(
        "on {}, the pod {CLIENT}; on {}, a Deployment and a Service {WEB}",
        NODES[0], NODES[1]
    ));
    see(evidence, &cluster, &format!("get pods -n {APPS} -o wide"))?;
    Ok(cluster)
}

fn plaintext_before(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let capture = cluster.cluster.wire().capture()?;
    ask(cluster, evidence, CLIENT)?;
    let recording = capture.stop()?;
    let (client, web) = addresses(cluster)?;
    let streams = recording.tcp_between(client, web).streams();
    let answers = streams.iter().map(|stream| {
        String::from_utf8_lossy(&stream.to_client)
            .lines()
            .find(|line| line.contains(MARKER))
            .map(str::to_owned)
    });
    let line = answers.flatten().next();
    evidence.saw(format!(
        "on the wire, from {web} to {client}: {:?}",
        line.context("the answer is not readable on the wire")?
    ));
    Ok(())
}

fn helm_install(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let before = restarts(cluster)?;
    cluster.install(&[])?;
    evidence.saw("helm install auth-daemon deploy/chart --namespace auth-system --values …");
    cluster.rolled_out(SYSTEM, "deployment/auth-ca")?;
    cluster.rolled_out(SYSTEM, "daemonset/auth-daemon")?;
    let daemons = cluster.pods(SYSTEM, DAEMON)?;
    ensure!(
        daemons.len() == NODES.len() && daemons.iter().all(is_ready),
        "{} daemons",
        daemons.len()
    );
    see(evidence, cluster, &format!("get pods -n {SYSTEM} -o wide"))?;
    ensure!(before == restarts(cluster)?, "an app has restarted");
    Ok(())
}

fn mtls_on_wire(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let (client, web) = addresses(cluster)?;
    // The daemons may still be fetching the pods' certificates.
    answered(cluster)?;
    let capture = cluster.cluster.wire().capture()?;
    ask(cluster, evidence, CLIENT)?;
    // The connection of the request above may be used again, so another client adds one of its own.
    cluster.apply(&[idle_pod(SECOND, NODES[0], "client")])?;
    ready(cluster, SECOND)?;
    // The daemon may not have enrolled it yet.
    eventually_ok(PATIENCE, "an answer", || ask(cluster, evidence, SECOND))?;
    let second = pod_address(cluster, SECOND)?;
    let recording = capture.stop()?;
    wire::only_tls(&recording, second, web, MARKER, evidence)?;
    let line = logged(cluster, NODES[1], |line| {
        line["result"] == "ok" && text(line, "client").starts_with(&format!("{client}:"))
    })?;
    evidence.saw(format!(
        "the daemon of {} logged: client={} client_identity={} server_identity={}",
        NODES[1], line["client"], line["client_identity"], line["server_identity"]
    ));
    Ok(())
}

fn outsider_is_refused(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let mut outsider = idle_pod(OUTSIDER, NODES[0], "client");
    outsider["metadata"]["labels"]["auth-daemon.io/mesh"] = json!("disabled");
    cluster.apply(&[outsider])?;
    ready(cluster, OUTSIDER)?;
    let address = pod_address(cluster, OUTSIDER)?;
    // Its own node refuses it, too, until the daemon knows that it is outside the mesh. No attempt may be answered.
    let refused = eventually_ok(PATIENCE, "the refusal by the server's node", || {
        let why = match ask_in_vain(cluster, OUTSIDER) {
            Ok(why) => why,
            Err(answered) => return Ok(Err(answered)),
        };
        let line = logged_so_far(cluster, NODES[1], |line| {
            line["result"] == "refused" && text(line, "client").starts_with(&format!("{address}:"))
        })?;
        Ok(Ok((why, line)))
    })?;
    let (why, line) = refused?;
    evidence.saw(format!(
        "curl from {OUTSIDER}, which has the label auth-daemon.io/mesh=disabled: {why}"
    ));
    evidence.saw(format!(
        "the daemon of {} logged: client={} reason={}",
        NODES[1], line["client"], line["reason"]
    ));
    Ok(())
}

fn policy_deny(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-clients", "namespace": APPS},
        "spec": {
            "selector": {"matchLabels": {"app": WEB}}, "action": "DENY",
            "rules": [{"from": [{"source": {"principals": [format!("cluster.local/ns/{APPS}/sa/client")]}}]}],
        },
    });
    cluster.apply(std::slice::from_ref(&policy))?;
    evidence.saw(format!("applied: {}", policy["spec"]));
    // Again until there is a line: a request that was open when the policy came into force was reset, and not refused.
    let (why, line) = eventually_ok(PATIENCE, "the refusal", || {
        let why = ask_in_vain(cluster, CLIENT)?;
        let line = logged_so_far(cluster, NODES[1], |line| {
            line["result"] == "refused" && text(line, "reason").contains("AuthorizationPolicy")
        })?;
        Ok((why, line))
    })?;
    evidence.saw(format!("curl from {CLIENT}: {why}"));
    evidence.saw(format!(
        "the daemon of {} logged: client_identity={} reason={}",
        NODES[1], line["client_identity"], line["reason"]
    ));
    cluster.kubectl(&format!("delete authorizationpolicy -n {APPS} no-clients"))?;
    answered(cluster)?;
    evidence.saw("after the policy was deleted: answered");
    Ok(())
}

fn helm_upgrade(cluster: &MeshedCluster, evidence: &Evidence) -> Result<()> {
    // Each line is curl's exit code for a request on a new connection.
    let script = format!(
        "while :; do curl -s -o /dev/null --max-time 20 {}; echo $?; sleep 0.05; done",
        who(cluster)?
    );
    cluster.apply(&[pod_running(LOAD, NODES[0], "client", &script)])?;
    let outcomes = || -> Result<Vec<String>> {
        let log = cluster.kubectl(&format!("logs -n {APPS} {LOAD}"))?;
        Ok(log.lines().map(str::to_owned).collect())
    };
    let answers_after = |mark: usize| {
        eventually_ok(PATIENCE, "requests that are answered", || {
            let outcomes = outcomes()?;
            let answered = outcomes
                .iter()
                .skip(mark)
                .rev()
                .take_while(|code| *code == "0");
            ensure!(answered.count() >= 20, "{:?}", outcomes.last());
            Ok(outcomes.len())
        })
    };
    let start = answers_after(0)?;
    let before = cluster.pods(SYSTEM, DAEMON)?;
    let capture = cluster.cluster.wire().capture()?;
    let options = ["--reuse-values", "--set", "daemon.config.nonTcp=allow"];
    cluster.helm("upgrade", &options)?;
    evidence.saw(format!(
        "helm upgrade auth-daemon deploy/chart {}",
        options.join(" ")
    ));
    cluster.rolled_out(SYSTEM, "daemonset/auth-daemon")?;
    let replaced = cluster.pods(SYSTEM, DAEMON)?;
    for old in &before {
        ensure!(
            replaced.iter().all(|new| name(new) != name(old)),
            "{} was not replaced",
            name(old)
        );
        evidence.saw(format!("{} was replaced", name(old)));
    }
    let end = answers_after(outcomes()?.len())?;
    let outcomes = &outcomes()?[start..end];
    let cut = outcomes.iter().filter(|code| *code != "0").count();
    evidence.saw(format!(
        "meanwhile, a pod made {} requests, each on a new connection; {cut} met a daemon that was handing over to its \
         successor, and were reset",
        outcomes.len()
    ));
    ensure!(
        cut * 4 <= outcomes.len(),
        "too many: {outcomes:?} (curl's exit codes)"
    );
    let recording = capture.stop()?;
    ensure!(
        !recording.contains(MARKER.as_bytes()),
        "{MARKER} is readable on the wire"
    );
    evidence.saw(format!(
        "no answer is readable in the {} packets between the nodes",
        recording.packets().len()
    ));
    cluster
        .kubectl(&format!("delete pod -n {APPS} {LOAD} --now --wait=false"))
        .map(drop)
}

/// Shows the output of a kubectl command.
fn see(evidence: &Evidence, cluster: &MeshedCluster, command: &str) -> Result<()> {
    evidence.saw(format!("kubectl {command}"));
    for line in cluster.kubectl(command)?.lines() {
        evidence.saw(format!("  {}", line.trim_end()));
    }
    Ok(())
}

fn ready(cluster: &MeshedCluster, pod: &str) -> Result<()> {
    let seconds = PATIENCE.as_secs();
    cluster
        .kubectl(&format!(
            "wait -n {APPS} pod {pod} --for=condition=Ready --timeout={seconds}s"
        ))
        .map(drop)
}

/// The URL of the service of the web server.
fn who(cluster: &MeshedCluster) -> Result<String> {
    let service = cluster.get(&format!("service -n {APPS} {WEB}"))?;
    let address = service["spec"]["clusterIP"]
        .as_str()
        .context("a service without an address")?;
    Ok(format!("http://{address}/cgi-bin/who"))
}

/// Waits until the client is answered.
fn answered(cluster: &MeshedCluster) -> Result<()> {
    eventually_ok(PATIENCE, "an answer", || {
        cluster.curl(CLIENT, &who(cluster)?)
    })
    .map(drop)
}

fn ask(cluster: &MeshedCluster, evidence: &Evidence, from: &str) -> Result<()> {
    let url = who(cluster)?;
    let answer = cluster.curl(from, &url)?;
    evidence.saw(format!("curl {url} in {from} got {:?}", answer.trim_end()));
    ensure!(answer.contains(MARKER), "another answer");
    Ok(())
}

/// curl's error message for a request that must not be answered.
fn ask_in_vain(cluster: &MeshedCluster, from: &str) -> Result<String> {
    let finished = cluster.exec(from, &["curl", "-sS", "--max-time", "15", &who(cluster)?])?;
    ensure!(
        finished.code() != Some(0) && !finished.stdout.contains(MARKER),
        "{from} was answered: {}",
        finished.stdout
    );
    Ok(finished
        .stderr
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned())
}

fn pod_address(cluster: &MeshedCluster, pod: &str) -> Result<IpAddr> {
    let pod = cluster.get(&format!("pod -n {APPS} {pod}"))?;
    address(&pod).parse().context("a pod without an address")
}

/// The addresses of the client and of the web server.
fn addresses(cluster: &MeshedCluster) -> Result<(IpAddr, IpAddr)> {
    let web = cluster.pod(APPS, &format!("app={WEB}"))?;
    let web = address(&web).parse().context("a pod without an address")?;
    Ok((pod_address(cluster, CLIENT)?, web))
}

/// The names of the apps' pods, and how often their containers have restarted.
fn restarts(cluster: &MeshedCluster) -> Result<Vec<(String, Value)>> {
    let pods = cluster.get(&format!("pods -n {APPS}"))?;
    let pods = pods["items"].as_array().context("no list")?.iter();
    Ok(pods
        .map(|pod| {
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"].clone();
            (name(pod).to_owned(), restarts)
        })
        .collect())
}

/// Waits for a line of the access log of a node's daemon.
fn logged(cluster: &MeshedCluster, node: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    eventually_ok(PATIENCE, "a line of the access log", || {
        logged_so_far(cluster, node, &wanted)
    })
}

/// The first such line so far.
fn logged_so_far(
    cluster: &MeshedCluster,
    node: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let log = cluster.daemon_log(node)?;
    let mut lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|line| line["target"] == "access");
    lines.find(wanted).context("it is not there")
}

fn text<'a>(line: &'a Value, field: &str) -> &'a str {
    line[field].as_str().unwrap_or_default()
}

const NODES: [&str; 2] = ["node1", "node2"];
const CLIENT: &str = "client-1";
const SECOND: &str = "client-2";
const OUTSIDER: &str = "outsider";
const LOAD: &str = "load";
const WEB: &str = "web";
/// Interval at which Ctrl-C is checked.
const POLL: Duration = Duration::from_millis(100);
